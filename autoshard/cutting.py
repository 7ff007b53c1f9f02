"""Cut a chain of places into the pipeline stages of the least predicted step time, within the memory of every rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from autoshard.chain import Blocks, Chain, Copy, Link, Weight, blocks, stage_costs
from autoshard.cut_objectives import Greatest, StepTime, rank_memory
from autoshard.cut_search import Search
from autoshard.errors import BudgetError, ConstraintError
from autoshard.pipeline_timeline import StageCosts, simulate
from autoshard.schedules import Schedule
from autoshard.text import human_bytes

__all__ = ["Chain", "Copy", "Cut", "Link", "Weight", "cut", "evaluate_cut"]


@dataclass(frozen=True)
class Cut:
    """Pipeline stages of a chain. total_s: simulated by the schedule that will run."""

    starts: tuple[int, ...]  # first place of each stage; the first is 0
    costs: tuple[StageCosts, ...]
    total_s: float
    bound_s: float  # proven: no cut takes less; 0 where the cut was given
    peak_bytes: tuple[float, ...]  # by rank: its weights, and the most activations in flight

    @property
    def is_optimal(self) -> bool:
        """Whether it is proven that no cut takes less."""
        return self.total_s <= self.bound_s * (1 + 1e-12)

    @property
    def balance(self) -> float:
        """Compute of the longest stage over that of the mean one, forward and backward; 1 where nothing computes."""
        seconds = [c.forward_s + c.backward_s for c in self.costs]
        return max(seconds) * len(seconds) / sum(seconds) if sum(seconds) else 1.0


def cut(
    chain: Chain,
    schedule: Schedule,
    stage_ranks: Sequence[int],
    link: Link,
    memory_bytes: float | None = None,
    starts_at: Collection[int] = (),
    together: Collection[Collection[int]] = (),
    overhead_s: float = 0.0,
) -> Cut:
    """The cut of `chain` into the stages of `schedule` of the least step time, as far as its bound tells.

    stage_ranks: of every stage, whose number they give. memory_bytes: of a rank, for the weights of its stages and for what is in
    flight. starts_at: places at which a stage must start. together: groups of places that no cut may part. overhead_s: of every action.
    Raises ConstraintError where the constraints leave no cut, BudgetError, which says the least memory that works, where none fits.
    """
    ranks = tuple(stage_ranks)
    parts = blocks(chain, link, starts_at, together)
    _check_stages(parts, len(ranks))
    memory = rank_memory(schedule, ranks)
    seeds = []
    if memory_bytes is not None:
        least = Search(parts, len(ranks), Greatest(memory)).find(enough=memory_bytes)
        assert least.starts is not None, "constraints that passed _check_stages leave a cut"
        if least.value > memory_bytes:
            raise BudgetError(_too_small(memory_bytes, least.value, least.bound, len(ranks)))
        seeds.append(least.starts)
    limits = [] if memory_bytes is None else [(line, memory_bytes) for line in memory]
    found = Search(parts, len(ranks), StepTime(schedule, ranks, link.latency_s, overhead_s), limits).find(seeds)
    assert found.starts is not None, "the seed is within the limits, and without limits every cut is"
    best = evaluate_cut(chain, [int(parts.cuts[k]) for k in found.starts], schedule, ranks, link, overhead_s)
    bound_s = best.total_s if found.bound >= found.value * (1 - 1e-12) else min(found.bound, best.total_s)
    return Cut(best.starts, best.costs, best.total_s, bound_s, best.peak_bytes)


def evaluate_cut(
    chain: Chain, starts: Sequence[int], schedule: Schedule, stage_ranks: Sequence[int], link: Link, overhead_s: float = 0.0
) -> Cut:
    """The cut with given starts, to compare with: an even one by layers, say, or by bytes of parameters. Nothing is searched."""
    if len(starts) != len(stage_ranks) or starts[0] != 0 or list(starts) != sorted(set(starts)) or starts[-1] >= len(chain.forward_s):
        raise ConstraintError(f"starts {list(starts)} are not those of {len(stage_ranks)} stages: give rising places, the first of them 0")
    bounds = [*starts, len(chain.forward_s)]
    costs, resident = zip(*(stage_costs(chain, start, stop, link) for start, stop in itertools.pairwise(bounds)), strict=True)
    timeline = simulate(schedule, costs, stage_ranks, latency_s=link.latency_s, overhead_s=overhead_s)
    held = [math.fsum(b for b, rank in zip(resident, stage_ranks, strict=True) if rank == r) for r in range(len(schedule))]
    peaks = tuple(peak + weights for peak, weights in zip(timeline.peak_bytes, held, strict=True))
    return Cut(tuple(starts), costs, timeline.total_s, 0.0, peaks)


def _check_stages(parts: Blocks, stages: int) -> None:
    pieces = len(set(parts.forced.tolist()) | {0})
    if parts.count < stages:
        raise ConstraintError(
            f"{stages} stages need {stages - 1} places to cut at, and only {max(parts.count - 1, 0)} are allowed; use fewer stages"
        )
    if pieces > stages:
        raise ConstraintError(f"starts_at asks for {pieces} stages of {stages}; drop {pieces - stages} of its places or use more stages")


def _too_small(memory_bytes: float, least: float, bound: float, stages: int) -> str:
    proof = "no cut takes less" if bound >= least * (1 - 1e-12) else f"no cut takes less than {human_bytes(bound)}"
    return (
        f"no cut into {stages} stages fits {human_bytes(memory_bytes)} a rank: the leanest found takes {human_bytes(least)} on its fullest "
        f"rank, and {proof}; give a budget of {math.ceil(least)} bytes, more stages or fewer microbatches in flight"
    )
