"""Pipeline schedules: torch's tables where torch has them right, what every list must hold, and how wrong lists are refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from autoshard.errors import PlanError
from autoshard.schedules import (
    NAMES,
    SPLITS_BACKWARD,
    V_SHAPED,
    Action,
    Schedule,
    ScheduleName,
    check_schedule,
    forward_only,
    make_schedule,
    ranks_of,
    stage_ranks,
)

TORCH = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "looped_bfs": "LoopedBFS",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}
Request = tuple[ScheduleName, int, int, int]


def stages_per_rank(name: ScheduleName) -> st.SearchStrategy[int]:
    least, most = {"gpipe": (1, 1), "1f1b": (1, 1), "interleaved_1f1b": (2, 4)}.get(name, (1, 3))
    return st.just(2) if name in V_SHAPED else st.integers(least, most)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Numbers that a name takes."""
    name, ranks = draw(st.sampled_from(NAMES)), draw(st.integers(1, 6))
    least = 2 * ranks if name == "dualpipev" else 1
    return name, ranks, draw(st.integers(least, least + 14)), draw(stages_per_rank(name))


def parsed(*lists: str) -> Schedule:
    return tuple(tuple(map(Action.parse, text.split())) for text in lists)


def shown(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, actions)) for actions in schedule]


def finishes(schedule: Schedule, stages: int) -> bool:
    """Whether the lists come to their end when they are run: each rank does what it can, again and again."""
    done: set[tuple[str, int, int]] = set()
    lists = [list(actions) for actions in schedule]
    moved = True
    while moved:
        moved = False
        for actions in lists:
            while actions:
                stage, kind, m = actions[0].stage, actions[0].kind, actions[0].microbatch
                if kind == "F":
                    can = stage == 0 or ("F", stage - 1, m) in done
                elif kind == "W":
                    can = ("I", stage, m) in done
                else:
                    can = ("F", stage, m) in done and (stage == stages - 1 or bool({("B", stage + 1, m), ("I", stage + 1, m)} & done))
                if not can:
                    break
                actions.pop(0)
                done.add((kind, stage, m))
                moved = True
    return not any(lists)


# ------------------------------------------------------------------------------------------------------ the lists with names


def torch_table(name: ScheduleName, ranks: int, microbatches: int, stages_per_rank: int) -> list[str]:
    """Torch's own table: its compute actions, those that it may run at once one after the other."""
    rows = get_schedule_ops(TORCH[name], ranks, microbatches, num_stages_per_rank=stages_per_rank)
    flat = [[part for action in row if action is not None for part in (action.sub_actions or (action,))] for row in rows]
    return [" ".join(text for text in map(str, row) if text[-1].isdigit()) for row in flat]


def torch_takes(name: ScheduleName, ranks: int, microbatches: int) -> bool:
    rounds = max(1, microbatches // ranks)
    return microbatches % rounds == 0 if name in ("interleaved_1f1b", "interleaved_zero_bubble") else True


@pytest.mark.parametrize("name", [name for name in NAMES if name != "1f1b"])
def test_lists_are_those_of_torch(name: ScheduleName) -> None:
    compared = 0
    for ranks, microbatches in itertools.product((1, 2, 3, 5), (1, 3, 4, 6, 10)):
        if not torch_takes(name, ranks, microbatches) or (name == "dualpipev" and microbatches < 2 * ranks):
            continue
        for count in (1,) if name == "gpipe" else (2,) if name in V_SHAPED or ranks > 2 else (2, 3):
            assert shown(make_schedule(name, ranks, microbatches, count)) == torch_table(name, ranks, microbatches, count)
            compared += 1
    assert compared > 8


def test_1f1b_is_torchs_but_for_its_last_rank() -> None:
    """Torch's table has F1..FM there, of which no pipeline can run the last: if this fails, torch has mended it."""
    for ranks, microbatches in [(2, 2), (3, 7), (4, 8)]:
        ours, table = shown(make_schedule("1f1b", ranks, microbatches)), torch_table("1f1b", ranks, microbatches, 1)
        assert ours[:-1] == table[:-1]
        assert f"{ranks - 1}F{microbatches}" in table[-1]
        assert ours[-1] == " ".join(f"{ranks - 1}F{m} {ranks - 1}B{m}" for m in range(microbatches))


def test_short_lists() -> None:
    assert shown(make_schedule("1f1b", 3, 2)) == ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1", "2F0 2B0 2F1 2B1"]
    assert shown(make_schedule("interleaved_zero_bubble", 2, 3)) == [
        "0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2",
        "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2",
    ]
    assert shown(make_schedule("interleaved_1f1b", 2, 3, 2)) == [
        "0F0 0F1 0F2 2F0 2F1 2F2 2B0 2B1 2B2 0B0 0B1 0B2",
        "1F0 1F1 1F2 3F0 3B0 3F1 3B1 3F2 3B2 1B0 1B1 1B2",
    ]


@given(requests())
def test_every_schedule_is_complete_and_comes_to_its_end(request: Request) -> None:
    name, ranks, microbatches, count = request
    schedule, where = make_schedule(*request), stage_ranks(name, ranks, count)
    check_schedule(schedule, where, microbatches)
    assert finishes(schedule, len(where))
    assert ranks_of(schedule) == where
    assert (name in SPLITS_BACKWARD) == any(action.kind in ("I", "W") for actions in schedule for action in actions)
    assert make_schedule(*request) is schedule


def test_stages_lie_in_a_loop_or_in_a_v() -> None:
    assert stage_ranks("interleaved_1f1b", 3, 2) == (0, 1, 2, 0, 1, 2)
    assert stage_ranks("zbv", 3, 2) == (0, 1, 2, 2, 1, 0)


@given(requests())
def test_torchs_runtime_takes_every_schedule(request: Request) -> None:
    """Its validation, and its sends and receives: one of each for every hop between ranks, each way."""
    name, ranks, microbatches, count = request
    schedule, where = make_schedule(*request), stage_ranks(name, ranks, count)
    order = {rank: [torch_schedules._Action.from_str(str(action)) for action in actions] for rank, actions in enumerate(schedule)}
    assert torch_schedules._validate_schedule(order, ranks, len(where), microbatches) == dict(enumerate(where))
    sent = torch_schedules._add_send_recv(order, stage_to_rank=lambda stage: where[stage], num_stages=len(where))
    kinds = [action.computation_type.value for actions in sent.values() for action in actions]
    hops = microbatches * sum(one != other for one, other in itertools.pairwise(where))
    assert [kinds.count(kind) for kind in ("SEND_F", "RECV_F", "SEND_B", "RECV_B")] == [hops] * 4


@given(st.data(), st.integers(1, 5), st.integers(1, 9))
def test_forward_only_takes_any_stages_on_any_ranks(data: st.DataObject, ranks: int, microbatches: int) -> None:
    more = data.draw(st.lists(st.integers(0, ranks - 1), max_size=5))
    where = data.draw(st.permutations([*range(ranks), *more]))
    schedule = forward_only(where, microbatches)
    check_schedule(schedule, where, microbatches, is_training=False)
    assert finishes(schedule, len(where))


def test_forward_only_feeds_the_next_rank_early() -> None:
    assert shown(forward_only((0, 0, 1), 2)) == ["0F0 1F0 0F1 1F1", "2F0 2F1"]
    assert shown(forward_only((0, 1, 0, 1), 3)) == ["0F0 0F1 2F0 2F1 0F2 2F2", "1F0 1F1 3F0 3F1 1F2 3F2"]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (("pipedream", 2, 2, 1), "there is no schedule 'pipedream'; there are gpipe, 1f1b, interleaved_1f1b"),
        (("gpipe", 2, 0, 1), "a pipeline of 2 ranks, 0 microbatches and 1 stages per rank: use at least 1 of each"),
        (("gpipe", 2, 4, 2), "gpipe runs 1 stage per rank, not 2: use looped_bfs, or cut 2 stages"),
        (("1f1b", 2, 4, 2), "1f1b runs 1 stage per rank, not 2: use interleaved_1f1b, or cut 2 stages"),
        (("interleaved_1f1b", 2, 4, 1), "interleaved_1f1b runs 2 or more stages per rank: use 1f1b, or cut a multiple of 2 stages"),
        (("zbv", 3, 4, 1), "zbv runs exactly 2 stages per rank, not 1: cut 6 stages, or use another schedule"),
        (("dualpipev", 3, 5, 2), "dualpipev needs a microbatch for each of its 6 stages, not 5: use zbv, or more microbatches"),
    ],
)
def test_conditions_say_what_to_do(request_: Request, said: str) -> None:
    with pytest.raises(PlanError) as error:
        make_schedule(*request_)
    assert str(error.value).startswith(said)


# ------------------------------------------------------------------------------------------------------ the check


@given(st.integers(0, 99), st.sampled_from("FBIW"), st.integers(0, 999))
def test_an_action_is_its_text(stage: int, kind: str, microbatch: int) -> None:
    action = Action(stage, kind, microbatch)  # type: ignore[arg-type]
    assert str(action) == f"{stage}{kind}{microbatch}"
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "0F", "0X1", "-1F0", "0F1 ", "0f1", "0SEND_F1", "²F0"])
def test_other_texts_are_no_actions(text: str) -> None:
    with pytest.raises(PlanError, match="is no action of a pipeline schedule"):
        Action.parse(text)


def broken(schedule: Schedule) -> Iterator[tuple[Action, Schedule]]:
    """The schedule with one action left out, run twice, run on the next rank, or of another kind; and that action."""
    for rank, actions in enumerate(schedule):
        for number, action in enumerate(actions):
            before, after = actions[:number], actions[number + 1 :]
            other = Action(action.stage, {"F": "B", "B": "W", "I": "F", "W": "B"}[action.kind], action.microbatch)  # type: ignore[arg-type]
            beyond = Action(action.stage, action.kind, action.microbatch + 1000)
            for changed in ((*before, *after), (*actions, action), (*before, other, *after), (*before, beyond, *after)):
                yield action, (*schedule[:rank], changed, *schedule[rank + 1 :])
            if len(schedule) > 1:
                lists = [before + after if r == rank else actions for r, actions in enumerate(schedule)]
                lists[rank - 1] = (*lists[rank - 1], action)
                yield action, tuple(lists)


@pytest.mark.parametrize("request_", [("1f1b", 3, 3, 1), ("interleaved_zero_bubble", 2, 2, 2), ("dualpipev", 2, 4, 2)])
def test_lists_that_are_not_complete_are_refused_by_name(request_: Request) -> None:
    name, ranks, microbatches, count = request_
    for action, schedule in broken(make_schedule(*request_)):
        with pytest.raises(PlanError) as error:
            check_schedule(schedule, stage_ranks(name, ranks, count), microbatches)
        assert re.search(rf"\b{action.stage}[FBIW]{action.microbatch}\b", str(error.value))


@given(requests(), st.randoms(use_true_random=False), st.integers(1, 6))
def test_an_order_is_refused_where_it_does_not_come_to_its_end(request: Request, random: object, swaps: int) -> None:
    """Neighbours of a good order, some of which deadlock: the check knows which."""
    name, ranks, microbatches, count = request
    lists = [list(actions) for actions in make_schedule(*request)]
    assume(max(map(len, lists)) > 1)
    for _ in range(swaps):
        actions = random.choice(lists)  # type: ignore[attr-defined]
        one, other = (random.randrange(len(actions)) for _ in range(2))  # type: ignore[attr-defined]
        actions[one], actions[other] = actions[other], actions[one]
    schedule, where = tuple(map(tuple, lists)), stage_ranks(name, ranks, count)
    if finishes(schedule, len(where)):
        check_schedule(schedule, where, microbatches)
    else:
        with pytest.raises(PlanError, match=r"before|deadlocks"):
            check_schedule(schedule, where, microbatches)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        (("0F0 0B0 0F1 0B1",), "the schedule is of 1 ranks, its stages lie on 2: give every rank a list"),
        (
            ("0F0 0F1 0B0", "1F0 1B0 1F1 1I1"),
            "the schedule of 2 stages and 2 microbatches: 0B1 (or 0I1 and 0W1) is missing, 1W1 is missing",
        ),
        (
            ("0F0 0F1 0B0 0B1 0B1", "1F0 1B0 1F1 1B1 1F5", "2F0"),
            "the schedule is of 3 ranks, its stages lie on 2: give every rank a list",
        ),
        (
            ("0F0 0F1 0B0 0B1 0B1", "1F0 1B0 1F1 1B1 1F5"),
            "the schedule of 2 stages and 2 microbatches: 0B1 runs twice, 1F5 is of no stage or microbatch",
        ),
        (
            ("0F0 0F1 0B0 1F0", "1F1 1B0 1I0 1B1"),
            "the schedule of 2 stages and 2 microbatches: 1F0 is on rank 0, its stage on rank 1, 0B1 (or 0I1 and 0W1) is missing,"
            " 1B0 runs beside 1I0",
        ),
        (
            ("0F0 0B0 0F1 0B1", "1F0 1F1 1I1 1I0 1W1 1W0"),
            "the schedule deadlocks: rank 0 at 0B0 for 1I0, rank 1 at 1F1 for 0F1: each waits for another. Move what is waited for forward",
        ),
        (("0F0 0F1 0B0 0B1", "1F0 1B0 1B1 1F1"), "rank 1 runs 1B1 before 1F1, which it needs: swap them"),
        (
            ("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0"),
            "the schedule deadlocks: rank 0 at 0B0 for 1B0, rank 1 at 1F1 for 0F1: each waits for another. Move what is waited for forward",
        ),
    ],
)
def test_texts_of_the_check(lists: tuple[str, ...], said: str) -> None:
    with pytest.raises(PlanError) as error:
        check_schedule(parsed(*lists), (0, 1), 2)
    assert str(error.value) == said


def test_backwards_are_refused_without_training() -> None:
    with pytest.raises(PlanError, match="0B0 runs without training"):
        check_schedule(parsed("0F0 0B0"), (0,), 1, is_training=False)
