"""cut_stages: say for every op of a program of microbatches in which pipeline stage it stands, and make a program of each stage.

The chain that is cut is the program in order (autoshard.stage_chain), with the seconds of every op forward and backward in the layouts
that were chosen, what autograd keeps of it, and the bytes that go over each cut. Weights are held, gathered and stepped in every stage
that reads them; what arguments alone make is computed where it is read. autoshard.cutting finds the cut of least predicted step time
under each schedule, and lists of actions are made for the stages that were found; the best of all is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from autoshard.backward_halves import can_split, wholes
from autoshard.chain import stage_costs
from autoshard.collectives import axis_links
from autoshard.costs import CostModel
from autoshard.cutting import Cut, Link, cut, evaluate_cut
from autoshard.errors import AutoshardError, BudgetError, ConstraintError, PlanError
from autoshard.hardware import Hardware
from autoshard.list_scheduling import list_schedule
from autoshard.mesh import PIPELINE_AXIS
from autoshard.pipeline import Pipeline, Pipelining
from autoshard.pipeline_timeline import simulate
from autoshard.program import Program, facts
from autoshard.schedules import NAMES, SPLITS_BACKWARD, Schedule, make_schedule, stage_ranks
from autoshard.stage_chain import PlacedChain, chain_of
from autoshard.stages import kinds_of, readers, stage_programs
from autoshard.text import human_bytes, human_seconds

LISTED = "list"
_TRIED = (("1f1b", 1), (LISTED, 1), ("interleaved_1f1b", 2), (LISTED, 2))


@dataclass(frozen=True)
class CutStages:
    """Cut into the stages of axis `pp`; programs without one are left as they are. fixed: by parameter the stages that hold it already.

    memory_budget_bytes: upper bound per rank on parameters, gradients, optimizer state and what is kept of microbatches in flight.
    Raises PlanError, ConstraintError, BudgetError.
    """

    hardware: Hardware
    asked: Pipelining = field(default_factory=Pipelining)
    fixed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stage_ranks: tuple[int, ...] = ()
    memory_budget_bytes: float | None = None

    def __call__(self, program: Program) -> Program:
        pipeline = program.pipeline
        if pipeline is None:
            return program
        placed = chain_of(program, CostModel(program.mesh, self.hardware))
        if not placed.places:
            raise PlanError(
                "nothing that the model computes depends on a batch that microbatches cut, so there are no stages: say which dim of which "
                "argument it is, Pipelining(batch={\"x\": 0}), or leave out axis 'pp'"
            )
        axis = pipeline.mesh.index(PIPELINE_AXIS)
        links = axis_links(self.hardware, pipeline.mesh.shape, axis)
        link = Link(links.hop_latency_s, links.hop_bytes_per_s)
        if self.fixed:
            found = self._as_before(program, placed, link)
        else:
            found = self._best(program, placed, link)
        name, schedule, lies, result = found
        placed.write(result.starts)
        facts(program.output).stage = len(lies) - 1
        program.pipeline = replace(pipeline, name=name, stage_ranks=lies, schedule=schedule, costs=result.costs, latency_s=link.latency_s)
        program.stats |= {"pipeline_s": result.total_s, "pipeline_bound_s": result.bound_s, "stage_balance": result.balance}
        program.stats["stage_bytes"] = max(result.peak_bytes, default=0.0)  # of a rank: weights, and what is kept in flight
        available = self.hardware.device.memory_bytes
        if self.memory_budget_bytes is None and program.is_training and program.stats["stage_bytes"] > available:
            program.note(
                f"a rank of these stages keeps {human_bytes(program.stats['stage_bytes'])} by prediction, a device of hardware "
                f"{self.hardware.name!r} has {human_bytes(available)}; memory_budget_bytes={0.9 * available:.3g} cuts for less"
            )
        program.stages = stage_programs(program)
        if not self.fixed:
            _compare(program, placed, link, result)
        _price_whole_backwards(program)
        return program

    def _best(self, program: Program, placed: PlacedChain, link: Link) -> tuple[str, Schedule, tuple[int, ...], Cut]:
        """The name, schedule, ranks of stages and cut of least predicted time."""
        assert program.pipeline is not None
        starts, together = self._constraints(placed)
        best: tuple[str, Schedule, tuple[int, ...], Cut] | None = None
        errors: list[AutoshardError] = []
        for name, per_rank in self._tried(program.pipeline):
            try:
                found = self._cut(program.pipeline, placed, link, name, per_rank, starts, together)
            except (PlanError, ConstraintError, BudgetError) as error:
                errors.append(error)
                continue
            if best is None or found[3].total_s < best[3].total_s * (1 - 1e-9):
                best = found
        if best is None:
            raise next((error for error in errors if isinstance(error, BudgetError)), errors[0])
        return best

    def _tried(self, pipeline: Pipeline) -> Iterator[tuple[str, int]]:
        name, per_rank = self.asked.schedule, self.asked.stages_per_rank
        if name is not None and name not in (*NAMES, LISTED):
            raise PlanError(f"there is no schedule {name!r}; there are {', '.join((*NAMES, LISTED))}")
        if name is not None:
            yield name, per_rank or (1 if name in ("gpipe", "1f1b", LISTED) else 2)
        elif pipeline.loss is None:
            yield "gpipe", per_rank or 1  # forward alone: the order of backward is not asked for
        elif per_rank is None:
            yield from _TRIED
        else:
            yield from (("1f1b" if per_rank == 1 else "interleaved_1f1b", per_rank), (LISTED, per_rank))

    def _cut(
        self,
        pipeline: Pipeline,
        placed: PlacedChain,
        link: Link,
        name: str,
        per_rank: int,
        starts: list[int],
        together: list[list[int]],
    ) -> tuple[str, Schedule, tuple[int, ...], Cut]:
        ranks, count = pipeline.mesh.stages, pipeline.microbatches
        plain = name if name != LISTED else ("1f1b" if per_rank == 1 else "interleaved_1f1b")
        lies = stage_ranks(plain, ranks, per_rank)  # type: ignore[arg-type]
        schedule = make_schedule(plain, ranks, count, per_rank)
        found = cut(placed.chain, schedule, lies, link, self.memory_budget_bytes, starts, together)
        if name == LISTED:
            budget = self.memory_budget_bytes
            limit = None if budget is None else [budget - weights for weights in _resident(placed, found, lies, ranks)]
            listed = list_schedule(found.costs, lies, count, None, False, limit, link.latency_s)
            again = evaluate_cut(placed.chain, found.starts, listed, lies, link)
            work_s = count * sum([*placed.chain.forward_s, *placed.chain.backward_s]) / ranks  # of any list, if no rank ever waits
            if again.total_s < found.total_s:
                schedule, found = listed, again
            found = replace(found, bound_s=min(work_s, found.total_s))
        return name, schedule, lies, found

    def _constraints(self, placed: PlacedChain) -> tuple[list[int], list[list[int]]]:
        starts = []
        for module in self.asked.starts:
            place = placed.starts_of(module)
            if place < 0:
                raise ConstraintError(
                    f"starts names {module!r}, in which nothing is computed; name a module by its path: {_examples(placed)}"
                )
            starts.append(place)
        together = []
        for module in self.asked.together:
            places = placed.of(module)
            if not places:
                raise ConstraintError(
                    f"together names {module!r}, in which nothing is computed; name a module by its path: {_examples(placed)}"
                )
            together.append(list(range(places[0], places[-1] + 1)))
        return starts, together

    def _as_before(self, program: Program, placed: PlacedChain, link: Link) -> tuple[str, Schedule, tuple[int, ...], Cut]:
        """The cut in which every place finds its weights where they lie already."""
        assert program.pipeline is not None
        lies = self.stage_ranks
        starts = _following(program, placed, self.fixed, len(lies))
        ranks, name = program.pipeline.mesh.stages, self.asked.schedule
        per_rank = len(lies) // ranks
        plain = name if name is not None and name != LISTED else ("1f1b" if per_rank == 1 else "interleaved_1f1b")
        if stage_ranks(plain, ranks, per_rank) != lies:  # type: ignore[arg-type]
            plain = "zbv"
        schedule = make_schedule(plain, ranks, program.pipeline.microbatches, per_rank)
        bounds = [*starts, len(placed.places)]
        costs = tuple(stage_costs(placed.chain, a, b, link)[0] for a, b in itertools.pairwise(bounds))
        timeline = simulate(schedule, costs, lies, link.latency_s)
        return plain, schedule, lies, Cut(tuple(starts), costs, timeline.total_s, 0.0, ())


def _price_whole_backwards(program: Program) -> None:
    """Where the schedule splits backward: stages that cannot run theirs in halves run it whole. Raises PlanError where none can."""
    pipeline, reasons = program.pipeline, wholes(program)
    assert pipeline is not None
    told = [f"stage {number}: {reason}" for number, reason in enumerate(reasons) if reason]
    if not told:
        return
    if not any(map(can_split, program.stages)):
        raise PlanError(
            f"schedule {pipeline.name!r} runs backward in two halves, which no stage of this model can: {'; '.join(told)}. Ask for "
            "another, such as '1f1b' or 'interleaved_1f1b'"
        )
    priced = zip(pipeline.costs, reasons, strict=True)
    costs = tuple(replace(cost, backward_input_s=cost.backward_s) if reason else cost for cost, reason in priced)
    program.pipeline = replace(pipeline, costs=costs)
    program.stats["pipeline_s"] = simulate(pipeline.schedule, costs, pipeline.stage_ranks, pipeline.latency_s).total_s
    program.note(f"backward is not split in two halves in {len(told)} of {len(reasons)} stages ({'; '.join(told[:3])})")


def _examples(placed: PlacedChain) -> str:
    return ", ".join(list(dict.fromkeys(facts(node).source.module for node in placed.places if facts(node).source.module))[:6])


def _resident(placed: PlacedChain, found: Cut, lies: tuple[int, ...], ranks: int) -> list[float]:
    """Bytes of weights by rank."""
    bounds = [*found.starts, len(placed.places)]
    held = [0.0] * ranks
    for stage, rank in enumerate(lies):
        places = range(bounds[stage], bounds[stage + 1])
        held[rank] += sum(w.bytes for w in placed.chain.weights if any(p in places for p in w.places))
    return held


def _following(program: Program, placed: PlacedChain, fixed: Mapping[str, tuple[int, ...]], stages: int) -> list[int]:
    """First places of stages that hold the weights which their places read. Raises PlanError where there are none."""
    kinds = kinds_of(program)
    wanted: dict[fx.Node, set[int]] = {}
    for name, node in program.parameters().items():
        for place in readers(node, kinds):
            wanted[place] = wanted.get(place, set(range(stages))) & set(fixed.get(name, range(stages)))
    starts = [0]
    for k, node in enumerate(placed.places):
        stage = len(starts) - 1
        later = [number for number in wanted.get(node, {stage}) if number >= stage]
        if not later:
            raise PlanError(
                f"{node.name} ({facts(node).source}) reads weights of an earlier pipeline stage than what it needs: this call runs the "
                "model in another order than the first one did"
            )
        starts += [k] * (min(later) - stage)
    return [*starts, *[len(placed.places)] * (stages - len(starts))]


# ------------------------------------------------------------------------------------------------------------- to compare


def _compare(program: Program, placed: PlacedChain, link: Link, found: Cut) -> None:
    """What the usual cuts would take: as many layers in each stage, and as many bytes of parameters."""
    pipeline = program.pipeline
    assert pipeline is not None
    stages = len(pipeline.stage_ranks)
    for name, starts in (("even_layers_s", even_layers(placed, stages)), ("even_parameters_s", even_parameters(placed, stages))):
        if starts is not None:
            program.stats[name] = _seconds(
                pipeline, evaluate_cut(placed.chain, starts, pipeline.schedule, pipeline.stage_ranks, link), link
            )
    if found.total_s > found.bound_s * (1 + 1e-9):
        program.note(
            f"the predicted step of these pipeline stages is {human_seconds(found.total_s)}; "
            f"no cut takes less than {human_seconds(found.bound_s)}"
        )


def _seconds(pipeline: Pipeline, given: Cut, link: Link) -> float:
    """Of a step of the cut; where the schedule is a list made for other stages, by one made for these if that is faster."""
    if pipeline.name != LISTED:
        return given.total_s
    schedule = list_schedule(given.costs, pipeline.stage_ranks, pipeline.microbatches, latency_s=link.latency_s)
    return min(given.total_s, simulate(schedule, given.costs, pipeline.stage_ranks, link.latency_s).total_s)


def even_layers(placed: PlacedChain, stages: int) -> list[int] | None:
    """First places of stages of as many layers each: what lies before the first layer stands in the first stage, the rest in the last."""
    layers = [_layer(node) for node in placed.places]
    first: dict[str, int] = {}
    for k, layer in enumerate(layers):
        if layer:
            first.setdefault(layer, k)
    begins = sorted(first.values())
    if len(begins) < stages:
        return None
    return _allowed(placed, [0, *(begins[stage * len(begins) // stages] for stage in range(1, stages))])


def _layer(node: fx.Node) -> str:
    parts = facts(node).source.module.split(".")
    numbered = next((k for k, part in enumerate(parts) if part.isdigit()), None)
    return "" if numbered is None else ".".join(parts[: numbered + 1])


def even_parameters(placed: PlacedChain, stages: int) -> list[int] | None:
    """First places of stages with as many bytes of weights each, counted where they are read first."""
    held = [0.0] * (len(placed.places) + 1)
    for weight in placed.chain.weights:
        if weight.places:
            held[min(weight.places) + 1] += weight.bytes
    total, starts, before = sum(held), [0], 0.0
    for k, more in enumerate(held):
        before += more
        if len(starts) < stages and k > starts[-1] and before >= total * len(starts) / stages:
            starts.append(k)
    found = _allowed(placed, starts) if len(starts) == stages and starts[-1] < len(placed.places) else None
    return found


def _allowed(placed: PlacedChain, starts: list[int]) -> list[int] | None:
    """The nearest places after `starts` where a cut may lie; None where two would meet."""
    may, found = placed.chain.is_cut_allowed, list[int]()
    for start in starts:
        while may is not None and start < len(placed.places) and not may[start]:
            start += 1
        found.append(start)
    return found if len(set(found)) == len(found) and found[-1] < len(placed.places) else None


__all__ = ["LISTED", "SPLITS_BACKWARD", "CutStages", "even_layers", "even_parameters"]
