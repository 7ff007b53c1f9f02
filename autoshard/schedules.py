"""Pipeline schedules as data: what every pipeline rank computes, in order.

A model is cut into stages, a batch into microbatches. Each pipeline rank holds one stage or several and runs a fixed list of
actions; what it receives and sends follows from the list. An action needs, before it:

    F of stage s    the forward of stage s - 1 for the same microbatch
    B or I          the forward of the same stage, and the backward (B or I) of stage s + 1
    W               I of the same stage

Where stages lie: in a loop (stage s on rank s mod p) or, for zbv and dualpipev, in a V (rank r holds stages r and 2p - 1 - r).
The lists are those of torch.distributed.pipelining wherever torch has them right. Its table of 1F1B counts wrong on the last rank
(torch itself runs 1F1B without that table), and it refuses numbers of microbatches that its runtime could run: 1f1b takes any here,
and the interleaved schedules take rounds that differ by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import Literal, get_args

from autoshard.errors import PlanError
from autoshard.runtime.actions import Action as Action
from autoshard.runtime.actions import Kind as Kind
from autoshard.runtime.actions import Schedule as Schedule

ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"]
NAMES: tuple[ScheduleName, ...] = get_args(ScheduleName)
SPLITS_BACKWARD: frozenset[ScheduleName] = frozenset(("interleaved_zero_bubble", "zbv", "dualpipev"))
"""Schedules with I and W; the others run whole backwards."""
V_SHAPED: frozenset[ScheduleName] = frozenset(("zbv", "dualpipev"))


def stage_ranks(name: ScheduleName, ranks: int, stages_per_rank: int = 1) -> tuple[int, ...]:
    """The pipeline rank of every stage. Raises PlanError where `name` does not take `stages_per_rank`."""
    _check_request(name, ranks, 1, stages_per_rank)
    if name in V_SHAPED:
        return (*range(ranks), *reversed(range(ranks)))
    return tuple(range(ranks)) * stages_per_rank


def ranks_of(schedule: Schedule) -> tuple[int, ...]:
    """The pipeline rank of every stage, read off a complete schedule."""
    where = {action.stage: rank for rank, actions in enumerate(schedule) for action in actions}
    return tuple(where[stage] for stage in range(len(where)))


@lru_cache(maxsize=256)
def make_schedule(name: ScheduleName, ranks: int, microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """The schedule of that name for one training step.

    Equal requests give the same object, which `pipeline_timeline.simulate` recognises. Raises PlanError, with what to do, where
    the name's conditions on its numbers do not hold.
    """
    _check_request(name, ranks, microbatches, stages_per_rank)
    if name == "dualpipev" and microbatches < 2 * ranks:
        raise PlanError(
            f"dualpipev needs a microbatch for each of its {2 * ranks} stages, not {microbatches}: use zbv, or more microbatches"
        )
    return tuple(tuple(_rank_actions(name, rank, ranks, microbatches, stages_per_rank)) for rank in range(ranks))


def _check_request(name: ScheduleName, ranks: int, microbatches: int, stages_per_rank: int) -> None:
    if name not in NAMES:
        raise PlanError(f"there is no schedule {name!r}; there are {', '.join(NAMES)}")
    if min(ranks, microbatches, stages_per_rank) < 1:
        raise PlanError(
            f"a pipeline of {ranks} ranks, {microbatches} microbatches and {stages_per_rank} stages per rank: use at least 1 of each"
        )
    if name in V_SHAPED and stages_per_rank != 2:
        raise PlanError(f"{name} runs exactly 2 stages per rank, not {stages_per_rank}: cut {2 * ranks} stages, or use another schedule")
    if name in ("gpipe", "1f1b") and stages_per_rank != 1:
        several = "looped_bfs" if name == "gpipe" else "interleaved_1f1b"
        raise PlanError(f"{name} runs 1 stage per rank, not {stages_per_rank}: use {several}, or cut {ranks} stages")
    if name == "interleaved_1f1b" and stages_per_rank == 1:
        raise PlanError(f"interleaved_1f1b runs 2 or more stages per rank: use 1f1b, or cut a multiple of {ranks} stages")


def _rank_actions(name: ScheduleName, rank: int, ranks: int, microbatches: int, stages_per_rank: int) -> Iterable[Action]:
    match name:
        case "gpipe" | "looped_bfs":
            return _breadth_first(range(rank, ranks * stages_per_rank, ranks), microbatches, is_reversed=name == "looped_bfs")
        case "1f1b":
            return _depth_first(rank, ranks, microbatches, 1, ahead_per_hop=1)
        case "interleaved_1f1b":
            return _depth_first(rank, ranks, microbatches, stages_per_rank, ahead_per_hop=2)
        case "interleaved_zero_bubble":
            return _depth_first(rank, ranks, microbatches, stages_per_rank, ahead_per_hop=1, splits_backward=True)
        case "zbv":
            actions = _numbered(_zbv(rank, ranks, max(microbatches, 2 * ranks - 1)), rank, ranks)
            return [action for action in actions if action.microbatch < microbatches]
        case "dualpipev":
            return _numbered(_dualpipev(rank, ranks, microbatches), rank, ranks)


def forward_only(stage_ranks: Sequence[int], microbatches: int) -> Schedule:
    """A schedule without backward, for any stages on any ranks: every rank runs the deepest of its stages that has its input.

    Arranged as if every stage took one tick.
    """
    ranks, stages = max(stage_ranks) + 1, len(stage_ranks)
    own = [[stage for stage in reversed(range(stages)) if stage_ranks[stage] == rank] for rank in range(ranks)]
    done = [0] * stages
    orders: list[list[Action]] = [[] for _ in range(ranks)]
    while done[-1] < microbatches:
        arrived = [microbatches, *done]
        for rank, order in enumerate(orders):
            stage = next((stage for stage in own[rank] if done[stage] < arrived[stage]), None)
            if stage is not None:
                order.append(Action(stage, "F", done[stage]))
                done[stage] += 1
    return tuple(map(tuple, orders))


# ------------------------------------------------------------------------------------------------------ soundness


def check_schedule(schedule: Schedule, stage_ranks: Sequence[int], microbatches: int, is_training: bool = True) -> None:
    """Raise PlanError, naming the actions, unless every rank runs what it must, once, in an order that always comes to its end.

    With `is_training` every stage and microbatch has F, and either B or I and W; without it F alone.
    """
    if len(schedule) != max(stage_ranks) + 1:
        raise PlanError(f"the schedule is of {len(schedule)} ranks, its stages lie on {max(stage_ranks) + 1}: give every rank a list")
    _check_complete(schedule, stage_ranks, microbatches, is_training)
    _check_order(schedule, len(stage_ranks))


def _check_complete(schedule: Schedule, stage_ranks: Sequence[int], microbatches: int, is_training: bool) -> None:
    seen: set[Action] = set()
    wrong = []
    for rank, actions in enumerate(schedule):
        for action in actions:
            if not (0 <= action.stage < len(stage_ranks) and 0 <= action.microbatch < microbatches):
                wrong.append(f"{action} is of no stage or microbatch")
            elif stage_ranks[action.stage] != rank:
                wrong.append(f"{action} is on rank {rank}, its stage on rank {stage_ranks[action.stage]}")
            elif action in seen:
                wrong.append(f"{action} runs twice")
            elif action.kind != "F" and not is_training:
                wrong.append(f"{action} runs without training")
            seen.add(action)
    for stage in range(len(stage_ranks)):
        for microbatch in range(microbatches):
            forward, whole, inputs, weights = (Action(stage, kind, microbatch) for kind in get_args(Kind))
            if forward not in seen:
                wrong.append(f"{forward} is missing")
            if whole in seen and (inputs in seen or weights in seen):
                wrong.append(f"{whole} runs beside {inputs if inputs in seen else weights}")
            if is_training and whole not in seen and not (inputs in seen and weights in seen):
                parts = f"{weights}" if inputs in seen else f"{inputs}" if weights in seen else f"{whole} (or {inputs} and {weights})"
                wrong.append(f"{parts} is missing")
    if wrong:
        more = f", and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise PlanError(f"the schedule of {len(stage_ranks)} stages and {microbatches} microbatches: {', '.join(wrong[:8])}{more}")


def _check_order(schedule: Schedule, stages: int) -> None:
    """Sort the actions topologically, by what each needs and by the order of every rank."""
    everything = {action for actions in schedule for action in actions}
    waits_for: dict[Action, set[Action]] = {action: set(_needs(action, stages)) & everything for action in everything}
    for rank, actions in enumerate(schedule):
        place = {action: number for number, action in enumerate(actions)}
        for action in actions:
            for need in waits_for[action]:
                if place.get(need, -1) > place[action]:
                    raise PlanError(f"rank {rank} runs {action} before {need}, which it needs: swap them")
        for before, after in pairwise(actions):
            waits_for[after].add(before)
    users: dict[Action, list[Action]] = {action: [] for action in everything}
    for action, needs in waits_for.items():
        for need in needs:
            users[need].append(action)
    ready = [action for action, needs in waits_for.items() if not needs]
    while ready:
        done = ready.pop()
        for user in users[done]:
            waits_for[user].discard(done)
            if not waits_for[user]:
                ready.append(user)
        del waits_for[done]
    if waits_for:
        stuck = ((rank, next((action for action in actions if action in waits_for), None)) for rank, actions in enumerate(schedule))
        told = [f"rank {rank} at {action} for {_names(set(_needs(action, stages)) & set(waits_for))}" for rank, action in stuck if action]
        raise PlanError(f"the schedule deadlocks: {', '.join(told)}: each waits for another. Move what is waited for forward")


def _needs(action: Action, stages: int) -> list[Action]:
    """What must have run before `action`; of B and I of the next stage, the one that the schedule has."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        return [Action(stage - 1, "F", microbatch)] if stage else []
    if action.kind == "W":
        return [Action(stage, "I", microbatch)]
    after = [Action(stage + 1, "B", microbatch), Action(stage + 1, "I", microbatch)] if stage < stages - 1 else []
    return [Action(stage, "F", microbatch), *after]


def _names(actions: Iterable[Action]) -> str:
    return " and ".join(sorted(map(str, actions)))


# ------------------------------------------------------------------------------------------------------ stages in a loop


def _breadth_first(stages: Sequence[int], microbatches: int, is_reversed: bool) -> list[Action]:
    """Every microbatch through a stage before the next stage. Source: GPipe, arXiv:1811.06965; looped BFS, arXiv:2211.05953."""
    back = range(microbatches)[::-1] if is_reversed else range(microbatches)
    forwards = [Action(stage, "F", m) for stage in stages for m in range(microbatches)]
    return forwards + [Action(stage, "B", m) for stage in reversed(stages) for m in back]


def _depth_first(
    rank: int, ranks: int, microbatches: int, stages_per_rank: int, ahead_per_hop: int, splits_backward: bool = False
) -> list[Action]:
    """Some forwards ahead, then forward and backward in turn; microbatches pass a rank's stages in rounds of about `ranks`.

    With `splits_backward` every rank runs W as many backwards after its I as it is from the first rank, and the rest at the end.
    Source: 1F1B, arXiv:1806.03377; interleaved, arXiv:2104.04473 section 2.2; ZB1P, arXiv:2401.10241.
    """
    rounds = _rounds(ranks, microbatches)
    stages = range(rank, ranks * stages_per_rank, ranks)
    forwards = [Action(stage, "F", m) for members in rounds for stage in stages for m in members]
    backs = [(stage, m) for members in rounds for stage in reversed(stages) for m in members]
    ahead = min(len(forwards), (stages_per_rank - 1) * len(rounds[0]) + ahead_per_hop * (ranks - 1 - rank))
    backwards = [Action(stage, "I" if splits_backward else "B", m) for stage, m in backs]
    weights: list[Action | None] = [Action(stage, "W", m) for stage, m in backs] if splits_backward else []
    turns = zip_longest(forwards[ahead:], backwards, [*[None] * rank, *weights])
    return [*forwards[:ahead], *(action for turn in turns for action in turn if action is not None)]


def _rounds(ranks: int, microbatches: int) -> list[range]:
    """Microbatches in as many rounds as have one for every rank, the larger rounds first."""
    count = max(1, microbatches // ranks)
    size, larger = divmod(microbatches, count)
    starts = [number * size + min(number, larger) for number in range(count + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


# ------------------------------------------------------------------------------------------------------ stages in a V


def _numbered(moves: Iterable[str], rank: int, ranks: int) -> list[Action]:
    """The actions of `moves` on a rank, every stage taking its microbatches in order.

    A move is a kind and which of the rank's two stages: d where the V goes down, u where it comes up; `W` alone: the oldest I whose
    W is still to come, if there is one.
    """
    stages = {"d": rank, "u": 2 * ranks - 1 - rank}
    counts: Counter[tuple[int, bool]] = Counter()
    waiting: list[Action] = []
    actions = []
    for move in moves:
        kind: Kind = move[0]  # type: ignore[assignment]
        if kind == "W":
            found = next((action for action in waiting if move == "W" or action.stage == stages[move[1]]), None)
            if found is not None:
                waiting.remove(found)
                actions.append(Action(found.stage, "W", found.microbatch))
            continue
        key = (stages[move[1]], kind == "F")
        actions.append(Action(key[0], kind, counts[key]))
        counts[key] += 1
        if kind == "I":
            waiting.append(actions[-1])
    return actions


def _zbv(rank: int, ranks: int, microbatches: int) -> list[str]:
    """For at least 2 * ranks - 1 microbatches. Source: arXiv:2401.10241 section 6."""
    after = ranks - 1 - rank
    return [
        *(["Fd"] * (2 * after + 1) + ["Fu", "Fd"] * rank + ["Fu", "Iu", "Wu"] * (after + 1)),
        *(["Fd", "Id", "Wd", "Fu", "Iu", "Wu"] * (microbatches - ranks - after) + ["Id", "Wd", "Fu", "Iu", "Wu"] * after),
        *(["Id", "Iu"] * rank + ["Id", "Wd"] * (after + 1) + ["Wu"] * rank + ["Wd"] * rank),
    ]


def _dualpipev(rank: int, ranks: int, microbatches: int) -> list[str]:
    """For at least 2 * ranks microbatches; a forward and a backward that torch may run at once follow each other here.

    Source: DualPipe, arXiv:2412.19437, and its code for one copy of the weights.
    """
    after = ranks - 1 - rank
    whole, odd = divmod(rank + 1, 2)  # of the last rank + 1 pairs of backwards half run whole; of the pair in the middle, one does
    return [
        *(["Fd"] * (2 * after) + ["Fd", "Fu"] * (rank + 1) + ["Iu", "W", "Fu"] * after),
        *(["Fd", "Bu", "Fu", "Bd"] * (microbatches - ranks - after) + ["Bu", "Fu", "Bd"] * after),
        *(["Bu", "Bd"] * whole + ["Bu", "Id"] * odd + ["Iu", "Id"] * whole + ["W", "Id"] * after + ["W"] * (rank + 1)),
    ]
