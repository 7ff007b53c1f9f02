"""Schedules made from costs: list scheduling, for stages that are uneven, and the best of it and of the schedules with names.

    minimise      the time at which the last action of a step has ended (pipeline_timeline.simulate)
    over          the order of every rank's actions
    subject to    the order within a microbatch (schedules), and on every rank at every time
                  sum over its stages of weight * microbatches between the start of F and the end of B or W  <=  limit

`_Run` builds a schedule forwards in time: the rank that can start first starts the best of the actions that are there by then, so no
rank idles while it could work. Microbatches are alike, so a stage takes them in order without loss. What is best is a `Rule`. A step
read from its end is a step too, with forward and backward exchanged, so each rule also builds one backwards in time (`_mirrored`).
Of all these `list_schedule` takes the fastest: a heuristic, which the tests compare with the optimum of small cases.

The limit never deadlocks, by the banker's rule (Dijkstra, EWD 623): a forward runs only if the rank could afterwards finish what it has
begun, one microbatch after the other, the oldest first. The oldest microbatch of all is the oldest on every rank that still works on
it, so it always gets on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from autoshard.errors import BudgetError, PlanError
from autoshard.pipeline_timeline import KINDS, PipelineTimeline, StageCosts, lags_of, seconds_by_slot, simulate
from autoshard.schedules import SPLITS_BACKWARD, Action, Kind, Schedule, ScheduleName, make_schedule
from autoshard.schedules import stage_ranks as ranks_of_stages
from autoshard.text import human_bytes

AnyName = ScheduleName | Literal["list", "list_v"]
"""A schedule with a name, or one made from costs: `list` with its stages in a loop, `list_v` in a V."""
NAMES: tuple[AnyName, ...] = (*get_args(ScheduleName), "list", "list_v")
Rule = Literal["backward", "forward", "deepest"]
"""What a rank prefers of the actions that could start: backwards, forwards, or what is of its deepest stage."""
SLACK = 1e-9  # relative: sums of the same bytes in another order


def best_schedule(
    costs: Sequence[StageCosts],
    ranks: int,
    microbatches: int,
    names: Sequence[AnyName] = NAMES,
    memory_bytes: float | Sequence[float] | None = None,
    splits_backward: bool = False,
    latency_s: float = 0.0,
    overhead_s: float = 0.0,
) -> tuple[AnyName, Schedule, PipelineTimeline]:
    """The schedule of the shortest simulated step among `names`; of equals, the one that keeps least, then the first.

    costs: of every stage, first to last. Names that do not take these numbers are passed over and, without `splits_backward`, those
    that split it. memory_bytes: what kept activations may take on each rank, or on any of them. Where the stages lie follows from
    the schedule: `schedules.ranks_of`. Raises PlanError where no name takes the numbers, and BudgetError where none fits the memory,
    saying the least that one takes.
    """
    if not 1 <= ranks <= len(costs):
        raise PlanError(f"a pipeline of {ranks} ranks and {len(costs)} stages: cut at least one stage for every rank")
    limits = _limits(memory_bytes, ranks)
    best: tuple[AnyName, Schedule, PipelineTimeline] | None = None
    least, refusals = math.inf, []
    for name in names:
        try:
            where = _ranks_of_name(name, len(costs), ranks, splits_backward)
            if name == "list" or name == "list_v":
                least = min(least, max(_least_bytes(costs, where)))
                schedule = list_schedule(costs, where, microbatches, None, splits_backward, limits, latency_s, overhead_s)
            else:
                schedule = make_schedule(name, ranks, microbatches, len(costs) // ranks)
        except PlanError as error:
            refusals.append(str(error))
            continue
        except BudgetError:
            continue
        timeline = simulate(schedule, costs, where, latency_s, overhead_s)
        least = min(least, max(timeline.peak_bytes))
        fits = all(peak <= limit * (1 + SLACK) for peak, limit in zip(timeline.peak_bytes, limits, strict=True))
        if fits and (best is None or _is_better(timeline, best[2])):
            best = (name, schedule, timeline)
    if best is None and math.isinf(least):
        raise PlanError(f"no schedule for {len(costs)} stages on {ranks} ranks: {'; '.join(refusals) or 'names is empty'}")
    if best is None:
        raise BudgetError(
            f"no schedule keeps the activations of {microbatches} microbatches within {human_bytes(min(limits))} on every rank; the least"
            f" that one of them takes on its fullest rank is {human_bytes(least)}. Use smaller microbatches, recomputation, or more ranks"
        )
    return best


def list_schedule(
    costs: Sequence[StageCosts],
    stage_ranks: Sequence[int],
    microbatches: int,
    most_in_flight: Sequence[int] | None = None,
    splits_backward: bool = False,
    memory_bytes: float | Sequence[float] | None = None,
    latency_s: float = 0.0,
    overhead_s: float = 0.0,
) -> Schedule:
    """A schedule made from what the stages cost, wherever they lie.

    most_in_flight: by rank, of how many microbatches and stages it may keep activations at one time, as PipelineTimeline.in_flight
    counts; memory_bytes: how many bytes of them, on each rank or on any. At most one of the two. Raises BudgetError where not even
    one microbatch fits.
    """
    ranks = max(stage_ranks) + 1
    if microbatches < 1 or len(costs) != len(stage_ranks) or set(stage_ranks) != set(range(ranks)):
        raise PlanError(
            f"{len(costs)} costs and {microbatches} microbatches for stages on ranks {list(stage_ranks)}: give costs of every stage,"
            " a stage to every rank, and at least one microbatch"
        )
    if most_in_flight is not None and memory_bytes is not None:
        raise PlanError("both most_in_flight and memory_bytes are given: give one")
    limits = _limits(most_in_flight if most_in_flight is not None else memory_bytes, ranks)
    weights = [1.0] * len(costs) if most_in_flight is not None else [cost.kept_bytes for cost in costs]
    for rank, (least, limit) in enumerate(zip(_sums(weights, stage_ranks), limits, strict=True)):
        if least > limit * (1 + SLACK):
            told = (f"{least:.0f} in flight", f"{limit:.0f}") if most_in_flight is not None else (human_bytes(least), human_bytes(limit))
            raise BudgetError(
                f"one microbatch on rank {rank} takes {told[0]}, allowed are {told[1]}: use smaller microbatches or more ranks"
            )
    problem = _Problem(costs, stage_ranks, microbatches, weights, limits, splits_backward, latency_s, overhead_s)
    found = [_Run(problem, rule).schedule() for rule in get_args(Rule)]
    if not splits_backward:
        mirror = problem.mirrored()
        found += [_mirrored(_Run(mirror, rule).schedule(), microbatches) for rule in get_args(Rule)]
    timed = [(simulate(schedule, costs, stage_ranks, latency_s, overhead_s), schedule) for schedule in dict.fromkeys(found)]
    best = timed[0]
    for other in timed[1:]:
        best = other if _is_better(other[0], best[0]) else best
    return best[1]


def _is_better(one: PipelineTimeline, other: PipelineTimeline) -> bool:
    if math.isclose(one.total_s, other.total_s, rel_tol=SLACK):
        return (max(one.peak_bytes), sum(one.in_flight)) < (max(other.peak_bytes), sum(other.in_flight))
    return one.total_s < other.total_s


def _ranks_of_name(name: AnyName, stages: int, ranks: int, splits_backward: bool) -> tuple[int, ...]:
    if name in SPLITS_BACKWARD and not splits_backward:
        raise PlanError(f"{name} splits the backward: allow it with splits_backward=True")
    if name == "list":
        return tuple(stage % ranks for stage in range(stages))
    if stages % ranks:
        raise PlanError(f"{name} runs the same number of stages on every rank: cut a multiple of {ranks} stages, not {stages}")
    return ranks_of_stages("zbv" if name == "list_v" else name, ranks, stages // ranks)


def _limits(given: float | Sequence[float] | None, ranks: int) -> list[float]:
    limits = [math.inf] * ranks if given is None else [float(given)] * ranks if isinstance(given, (int, float)) else list(map(float, given))
    if len(limits) != ranks:
        raise PlanError(f"limits of {len(limits)} ranks for a pipeline of {ranks}: give one for each rank, or one number for all")
    return limits


def _sums(weights: Sequence[float], stage_ranks: Sequence[int]) -> list[float]:
    """By rank, what one microbatch takes on all its stages."""
    return [sum(weight for weight, on in zip(weights, stage_ranks, strict=True) if on == rank) for rank in range(max(stage_ranks) + 1)]


def _least_bytes(costs: Sequence[StageCosts], stage_ranks: Sequence[int]) -> list[float]:
    return _sums([cost.kept_bytes for cost in costs], stage_ranks)


# ------------------------------------------------------------------------------------------------------ backwards in time


@dataclass(frozen=True)
class _Problem:
    """What a schedule is made for. weights: of every stage, what a microbatch in flight takes; limits: by rank, of their sum."""

    costs: Sequence[StageCosts]
    stage_ranks: Sequence[int]
    microbatches: int
    weights: Sequence[float]
    limits: Sequence[float]
    splits_backward: bool
    latency_s: float
    overhead_s: float

    def mirrored(self) -> _Problem:
        """The step read from its end: its backwards, from the first stage to the last, are forwards. For whole backwards only."""
        costs = []
        for number, cost in enumerate(self.costs):
            send_s = self.costs[number + 1].send_back_s if number + 1 < len(self.costs) else 0.0
            send_back_s = self.costs[number - 1].send_s if number else 0.0
            costs.append(StageCosts(cost.backward_s, cost.forward_s, 0.0, send_s, send_back_s, cost.kept_bytes, cost.after_s, cost.once_s))
        return replace(self, costs=costs)


def _mirrored(schedule: Schedule, microbatches: int) -> Schedule:
    """The schedule read from its end."""
    return tuple(
        tuple(
            Action(action.stage, "B" if action.kind == "F" else "F", microbatches - 1 - action.microbatch) for action in reversed(actions)
        )
        for actions in schedule
    )


# ------------------------------------------------------------------------------------------------------ forwards in time


@dataclass
class _Stage:
    """How far a stage has come. By kind (B for I too): when the microbatches arrived that it can take, and how many it has done."""

    number: int
    rank: int
    weight: float
    backward: Kind  # B, or I with W to follow
    arrived: dict[Kind, list[float]] = field(default_factory=lambda: {"F": [], "B": [], "W": []})
    done: dict[Kind, int] = field(default_factory=lambda: {"F": 0, "B": 0, "W": 0})

    @property
    def freed(self) -> int:
        """How many microbatches it keeps nothing of any more."""
        return self.done["B" if self.backward == "B" else "W"]


Choice = tuple[float, tuple[int, ...], int, Kind]
"""When an action can start, how much its rank prefers it (least first), its stage, and F, B (or I) or W."""


class _Run:
    """One schedule under one rule. On stage 0 backwards are whole: nobody waits for a part of them, so torch does not split them."""

    def __init__(self, problem: _Problem, rule: Rule) -> None:
        ranks = range(max(problem.stage_ranks) + 1)
        self.costs, self.limits, self.rule = problem.costs, problem.limits, rule
        self.seconds = seconds_by_slot(problem.costs, problem.overhead_s)
        self.lags = lags_of(problem.costs, problem.stage_ranks, problem.latency_s)
        self.stages = [
            _Stage(number, rank, weight, "I" if problem.splits_backward and number else "B")
            for number, (rank, weight) in enumerate(zip(problem.stage_ranks, problem.weights, strict=True))
        ]
        self.stages[0].arrived["F"] = [0.0] * problem.microbatches
        self.own = [[stage for stage in self.stages if stage.rank == rank] for rank in ranks]
        self.free = [0.0 for _ in ranks]
        self.lists: list[list[Action]] = [[] for _ in ranks]

    def schedule(self) -> Schedule:
        choices = [self._choice(rank) for rank in range(len(self.lists))]
        while any(choices):
            _, rank = min((choice, rank) for rank, choice in enumerate(choices) if choice)
            start, _, number, kind = choices[rank]  # type: ignore[misc]
            stage = self.stages[number]
            for changed in {rank, *self._run(stage, kind, start)}:
                choices[changed] = self._choice(changed)
        return tuple(map(tuple, self.lists))

    def _choice(self, rank: int) -> Choice | None:
        """What the rank would run next, were nothing else to arrive."""
        found: list[Choice] = []
        for stage in self.own[rank]:
            for kind, arrivals in stage.arrived.items():
                done = stage.done[kind]
                if done < len(arrivals) and (kind != "F" or self._fits(stage)):
                    found.append((max(self.free[rank], arrivals[done]), self._preference(stage.number, kind), stage.number, kind))
        return min(found, default=None)

    def _preference(self, stage: int, kind: Kind) -> tuple[int, ...]:
        nobody_waits = kind == "W" or (kind == "B" and stage == 0)
        match self.rule:
            case "backward":
                return nobody_waits, kind == "F", -stage
            case "forward":
                return nobody_waits, kind != "F", -stage
            case "deepest":
                return nobody_waits, -stage, kind == "F"

    def _fits(self, stage: _Stage) -> bool:
        """Whether, the stage's next forward run, its rank could still finish its microbatches, the oldest first, within the limit."""
        own, limit = self.own[stage.rank], self.limits[stage.rank]
        oldest = min(other.freed for other in own)
        if limit == math.inf or stage.done["F"] == oldest:
            return True
        spans = [(other.weight, other.freed, other.done["F"] + (other is stage)) for other in own]
        held = sum(weight * (forwards - freed) for weight, freed, forwards in spans)
        for microbatch in range(oldest, max(forwards for _, _, forwards in spans)):
            if held + sum(weight for weight, _, forwards in spans if forwards <= microbatch) > limit * (1 + SLACK):
                return False
            held -= sum(weight for weight, freed, forwards in spans if freed <= microbatch < forwards)
        return True

    def _run(self, stage: _Stage, kind: Kind, start: float) -> list[int]:
        """Do it, and say on which ranks something arrives."""
        number, shown = stage.number, stage.backward if kind == "B" else kind
        is_first = kind == "F" and not stage.done["F"]
        end = start + self.seconds[len(KINDS) * number + KINDS.index(shown)] + (self.costs[number].once_s if is_first else 0.0)
        self.free[stage.rank] = end
        self.lists[stage.rank].append(Action(number, shown, stage.done[kind]))
        stage.done[kind] += 1
        if shown == "I":
            stage.arrived["W"].append(end)
        if kind == "F" and number + 1 == len(self.stages):
            stage.arrived["B"].append(end)
        elif kind == "F" or (kind == "B" and number):
            onto = self.stages[number + 1 if kind == "F" else number - 1]
            onto.arrived[kind].append(end + self.lags[2 * number + (1 if kind == "F" else 2)])
            return [onto.rank]
        return []
