"""What each pipeline stage holds and works, per rank of it, for the words and tables of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoshard.costs import CostModel
from autoshard.pipeline import Pipeline
from autoshard.pipeline_timeline import simulate
from autoshard.program import Facts, Program, facts
from autoshard.text import human_seconds

if TYPE_CHECKING:
    from autoshard.cost_report import CostReport


@dataclass(frozen=True)
class StageShare:
    """One stage, on one of its ranks. first, last: modules. forward_s, backward_s: of a microbatch."""

    number: int
    rank: int
    first: str
    last: str
    forward_s: float
    backward_s: float
    parameter_bytes: float

    @property
    def name(self) -> str:
        return f"stage {self.number} on pp rank {self.rank}"

    @property
    def modules(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"

    @property
    def times(self) -> str:
        return f"forward {human_seconds(self.forward_s)}, backward {human_seconds(self.backward_s)}"


def stage_shares(program: Program, costs: CostModel) -> tuple[StageShare, ...]:
    """Shares of all stages; () for a program without."""
    pipeline = program.pipeline
    if pipeline is None:
        return ()
    found = []
    for number, (stage, rank) in enumerate(zip(program.stages, pipeline.stage_ranks, strict=True)):
        modules = [facts(node).source.module or "(model)" for node in stage.nodes("op") if facts(node).stage == number] or ["nothing"]
        parameters, _ = _weights([facts(node) for node in stage.nodes("parameter")], costs)
        own = pipeline.costs[number]
        found.append(StageShare(number, rank, modules[0], modules[-1], own.forward_s, own.backward_s, parameters))
    return tuple(found)


def in_flight(pipeline: Pipeline, stage: int) -> int:
    """For how many microbatches at most a stage keeps what its backward needs: from F up to B or W."""
    most = now = 0
    for action in pipeline.schedule[pipeline.stage_ranks[stage]]:
        if action.stage == stage:
            now += {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
            most = max(most, now)
    return most


def kept_by_rank(report: CostReport) -> float:
    """Bytes that a rank keeps by prediction: with pipeline stages, the rank along `pp` that keeps most."""
    program, pipeline = report.program, report.program.pipeline
    if pipeline is None:
        return program.stats.get("kept_bytes", 0.0)
    timeline = simulate(pipeline.schedule, pipeline.costs, pipeline.stage_ranks, pipeline.latency_s)
    held = weights_by_rank(program, CostModel(program.mesh, report.plan.hardware))
    return max(state + kept for (_, state), kept in zip(held, timeline.peak_bytes, strict=True))


def weights_by_rank(program: Program, costs: CostModel) -> list[tuple[float, float]]:
    """By rank along `pp` the bytes of its parameters, and with gradients and optimizer state; what its stages share counts once."""
    assert program.pipeline is not None
    own: list[dict[str, Facts]] = [{} for _ in range(program.pipeline.mesh.stages)]
    for stage, rank in zip(program.stages, program.pipeline.stage_ranks, strict=True):
        own[rank] |= {facts(node).name: facts(node) for node in stage.nodes("parameter")}
    return [_weights(list(known.values()), costs) for known in own]


def _weights(known: Sequence[Facts], costs: CostModel) -> tuple[float, float]:
    held = [costs.local_bytes(k.value, k.layout) for k in known]
    sizes = zip(held, known, strict=True)
    return sum(held), sum(size * (2 if k.value.needs_grad else 1) + costs.state_bytes(k.value, k.layout) for size, k in sizes)
