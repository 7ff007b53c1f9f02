"""The timeline of a pipeline: equal to a simulation without any order of its own, and to the closed forms of even stages."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.errors import PlanError
from autoshard.pipeline_timeline import PipelineEvent, PipelineTimeline, StageCosts, simulate
from autoshard.schedules import NAMES, V_SHAPED, Action, Schedule, ScheduleName, forward_only, make_schedule, ranks_of, stage_ranks

Times = dict[tuple[int, str, int], tuple[float, float]]
"""Start and end by stage, kind and microbatch."""


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    name, ranks = draw(st.sampled_from((*NAMES, None))), draw(st.integers(1, 4))
    if name is None:
        where = draw(st.permutations([*range(ranks), *draw(st.lists(st.integers(0, ranks - 1), max_size=3))]))
        return forward_only(where, draw(st.integers(1, 6)))
    least, most = {"gpipe": (1, 1), "1f1b": (1, 1), "interleaved_1f1b": (2, 3)}.get(name, (1, 3))
    count = 2 if name in V_SHAPED else draw(st.integers(least, most))
    first = 2 * ranks if name == "dualpipev" else 1
    return make_schedule(name, ranks, draw(st.integers(first, first + 6)), count)


@st.composite
def stage_costs(draw: st.DrawFn) -> StageCosts:
    """Whole numbers, so that sums are exact in any order."""
    number = st.integers(1, 9)
    backward = draw(st.integers(2, 18))
    extra = [draw(st.integers(0, 5)) for _ in range(5)]
    return StageCosts(draw(number), backward, draw(st.integers(1, backward - 1)), *extra)


def relaxed(schedule: Schedule, costs: list[StageCosts], latency_s: float, overhead_s: float) -> Times:
    """Start with every action at 0 and put off whatever starts too early, until nothing does."""
    where, last = ranks_of(schedule), len(costs) - 1

    def seconds(action: Action) -> float:
        cost = costs[action.stage]
        part = cost.backward_input_s if action.stage else 0.0  # torch's stage 0 does all of its backward in W
        return overhead_s + {"F": cost.forward_s, "B": cost.backward_s, "I": part, "W": cost.backward_s - part}[action.kind]

    def hop(one: int, other: int) -> float:
        sent = costs[one].send_s if other > one else costs[one].send_back_s
        return 0.0 if where[one] == where[other] else sent + latency_s

    start = {action: 0.0 for actions in schedule for action in actions}
    first = {stage: next(a for a in schedule[where[stage]] if a.stage == stage) for stage in range(len(costs))}
    final = {stage: [a for a in schedule[where[stage]] if a.stage == stage and a.kind != "F"][-1:] for stage in range(len(costs))}
    after = {action: costs[stage].after_s for stage, found in final.items() for action in found}
    changed = True
    while changed:
        changed = False
        for actions in schedule:
            for number, action in enumerate(actions):
                stage, kind, m = action.stage, action.kind, action.microbatch
                previous = actions[number - 1] if number else None
                free = start[previous] + seconds(previous) + after.get(previous, 0.0) if previous else 0.0
                bounds = [free + (costs[stage].once_s if action == first[stage] else 0.0)]
                needs = {"F": [Action(stage - 1, "F", m)], "W": [Action(stage, "I", m)]}.get(kind, [Action(stage, "F", m)])
                if kind in ("B", "I") and stage < last:
                    needs += [Action(stage + 1, "B", m), Action(stage + 1, "I", m)]
                bounds += [start[need] + seconds(need) + hop(need.stage, stage) for need in needs if need in start]
                if max(bounds) > start[action]:
                    start[action], changed = max(bounds), True
    return {(a.stage, a.kind, a.microbatch): (begin, begin + seconds(a)) for a, begin in start.items()}


@given(schedules(), st.data(), st.integers(0, 3), st.integers(0, 3))
def test_equal_to_a_simulation_without_order(schedule: Schedule, data: st.DataObject, latency: int, overhead: int) -> None:
    where = ranks_of(schedule)
    costs = [data.draw(stage_costs()) for _ in where]
    timeline = simulate(schedule, costs, where, latency, overhead)
    found = {(e.stage, e.kind, e.microbatch): (e.start_s, e.end_s) for e in timeline.events if e.microbatch >= 0}
    times = relaxed(schedule, costs, latency, overhead)
    assert found == times
    assert all(where[event.stage] == event.rank for event in timeline.events)
    assert timeline.total_s == max(event.end_s for event in timeline.events)
    for rank in range(len(schedule)):
        own = sorted((e.start_s, e.end_s) for e in timeline.events if e.rank == rank)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(own))
        assert timeline.busy_s[rank] == sum(end - start for start, end in own)
        assert (timeline.in_flight[rank], timeline.peak_bytes[rank]) == peaks(schedule[rank], times, costs)
    assert 0 <= timeline.bubble < 1


def peaks(actions: tuple[Action, ...], times: Times, costs: list[StageCosts]) -> tuple[int, float]:
    """The most activations that are between the start of F and the end of B or W when a forward starts: how many, how many bytes."""
    forwards = [(a.stage, a.microbatch) for a in actions if a.kind == "F"]

    def span(stage: int, m: int) -> tuple[float, float]:
        freed = [times[stage, kind, m][1] for kind in ("B", "W") if (stage, kind, m) in times]
        return times[stage, "F", m][0], freed[0] if freed else times[stage, "F", m][1]

    spans = [(*span(*key), costs[key[0]].kept_bytes) for key in forwards]
    alive = [[kept for begin, end, kept in spans if begin <= now < end] for now, _, _ in spans]
    return max(map(len, alive)), max(map(sum, alive))


# ------------------------------------------------------------------------------------------------------ closed forms


def even(name: ScheduleName, ranks: int, microbatches: int, count: int, forward: int = 3, backward: int = 5) -> PipelineTimeline:
    where = stage_ranks(name, ranks, count)
    costs = [StageCosts(forward, backward, kept_bytes=10.0)] * len(where)
    return simulate(make_schedule(name, ranks, microbatches, count), costs, where)


RANKS, ROUNDS = st.integers(1, 6), st.integers(1, 4)
SECONDS = st.integers(1, 9)


def assert_bubble(timeline: PipelineTimeline, ranks: int, turns: int, forward: int, backward: int) -> None:
    """Every rank works `turns` times forwards and backwards; ranks - 1 turns are lost."""
    assert timeline.total_s == (turns + ranks - 1) * (forward + backward)
    assert timeline.busy_s == (turns * (forward + backward),) * ranks
    assert timeline.bubble == pytest.approx(Fraction(ranks - 1, turns + ranks - 1), abs=1e-12)


@given(RANKS, st.integers(1, 20), SECONDS, SECONDS)
def test_gpipe_and_1f1b_lose_the_same_and_1f1b_keeps_less(ranks: int, microbatches: int, forward: int, backward: int) -> None:
    gpipe, one = (even(name, ranks, microbatches, 1, forward, backward) for name in ("gpipe", "1f1b"))  # type: ignore[arg-type]
    assert_bubble(gpipe, ranks, microbatches, forward, backward)
    assert_bubble(one, ranks, microbatches, forward, backward)
    assert gpipe.in_flight == (microbatches,) * ranks
    assert one.in_flight == tuple(min(microbatches, ranks - rank) for rank in range(ranks))
    assert one.peak_bytes == tuple(10.0 * count for count in one.in_flight)


@given(RANKS, st.integers(0, 12), st.integers(1, 4), SECONDS, SECONDS)
def test_looped_bfs(ranks: int, more: int, count: int, forward: int, backward: int) -> None:
    microbatches = ranks + more
    timeline = even("looped_bfs", ranks, microbatches, count, forward, backward)
    assert_bubble(timeline, ranks, count * microbatches, forward, backward)
    assert timeline.in_flight == (count * microbatches,) * ranks


@given(RANKS, ROUNDS, st.integers(2, 4), SECONDS, SECONDS)
def test_interleaved_1f1b(ranks: int, rounds: int, count: int, forward: int, backward: int) -> None:
    timeline = even("interleaved_1f1b", ranks, rounds * ranks, count, forward, backward)
    assert_bubble(timeline, ranks, count * rounds * ranks, forward, backward)
    ahead = ((count - 1) * ranks + 2 * (ranks - rank - 1) + 1 for rank in range(ranks))
    assert timeline.in_flight == tuple(min(count * rounds * ranks, most) for most in ahead)


@given(st.integers(1, 6), st.integers(0, 8))
def test_split_backwards_lose_a_third_of_a_turn_per_rank(ranks: int, more: int) -> None:
    """Where forward and both parts of the backward take as long: ranks - 1 forwards on their way to the last rank, and no more."""
    for name, in_flight in (("zbv", 2 * ranks), ("dualpipev", 2 * ranks + 1)):
        timeline = even(name, ranks, 2 * ranks + more, 2, forward=1, backward=2)  # type: ignore[arg-type]
        assert timeline.total_s == 2 * (2 * ranks + more) * 3 + ranks - 1
        assert timeline.in_flight == (in_flight,) * ranks
    timeline = even("interleaved_zero_bubble", ranks, ranks + more, 1, forward=1, backward=2)
    assert timeline.total_s == (ranks + more) * 3 + ranks - 1
    assert timeline.in_flight == (ranks,) * ranks


# ------------------------------------------------------------------------------------------------------ by hand


def test_sends_delay_only_who_receives() -> None:
    """Two ranks, one hop of 3 + 1 seconds on, 5 + 1 back; nothing between stages of one rank."""
    costs = [StageCosts(2, 4, send_s=3), StageCosts(2, 4, send_s=100, send_back_s=5), StageCosts(2, 4, send_back_s=100)]
    timeline = simulate(make_schedule("1f1b", 2, 2), costs[:2], (0, 1), latency_s=1)
    assert [(str(e), e.start_s, e.end_s) for e in timeline.events] == [
        *(("0F0", 0, 2), ("0F1", 2, 4), ("0B0", 18, 22), ("0B1", 24, 28)),
        *(("1F0", 6, 8), ("1B0", 8, 12), ("1F1", 12, 14), ("1B1", 14, 18)),
    ]
    both = tuple(tuple(map(Action.parse, text.split())) for text in ("0F0 0B0", "1F0 2F0 2B0 1B0"))
    assert simulate(both, costs, (0, 1, 1)).total_s == 2 + 3 + 2 + 2 + 4 + 4 + 5 + 4


def test_once_and_after() -> None:
    costs = [StageCosts(1, 2, once_s=4, after_s=8), StageCosts(1, 2, once_s=16)]
    timeline = simulate(make_schedule("gpipe", 2, 1), costs, (0, 1))
    assert [(str(e), e.kind, e.microbatch, e.start_s, e.end_s) for e in timeline.events] == [
        *(("0 once", "once", -1, 0, 4), ("0F0", "F", 0, 4, 5), ("0B0", "B", 0, 19, 21), ("0 after", "after", -1, 21, 29)),
        *(("1 once", "once", -1, 0, 16), ("1F0", "F", 0, 16, 17), ("1B0", "B", 0, 17, 19)),
    ]
    assert (timeline.total_s, timeline.busy_s) == (29, (15, 19))
    assert simulate(forward_only((0, 1), 1), costs, (0, 1)).total_s == 17


def test_stage_0_does_its_whole_backward_in_w() -> None:
    timeline = simulate(make_schedule("interleaved_zero_bubble", 1, 1), [StageCosts(1, 6)], (0,), overhead_s=0.5)
    assert [(e.kind, e.end_s - e.start_s) for e in timeline.events] == [("F", 1.5), ("I", 0.5), ("W", 6.5)]


def test_forwards_alone_keep_nothing() -> None:
    timeline = simulate(forward_only((0, 1, 0), 5), [StageCosts(1, 2, kept_bytes=7)] * 3, (0, 1, 0))
    assert (timeline.in_flight, timeline.peak_bytes) == ((1, 1), (7, 7))


def test_the_same_lists_cost_anew() -> None:
    """What is kept of a schedule between simulations has nothing to do with its costs."""
    schedule = make_schedule("1f1b", 2, 4)
    totals = [simulate(schedule, [StageCosts(scale, 2 * scale)] * 2, (0, 1)).total_s for scale in (1, 5, 1)]
    assert totals == [15, 75, 15]


# ------------------------------------------------------------------------------------------------------ refusals and pictures


def test_what_cannot_be_simulated_is_refused() -> None:
    costs = [StageCosts(1, 2)] * 2
    with pytest.raises(PlanError, match="there are costs of 2 stages and ranks of 3: give both for every stage"):
        simulate(make_schedule("1f1b", 3, 3), costs, (0, 1, 2))
    with pytest.raises(PlanError, match="rank 0 runs stage 0, which is not its own"):
        simulate(make_schedule("1f1b", 2, 3), costs, (1, 0))
    for lists in (
        ("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0"),
        ("0B0 0F0", "1F0 1B0"),
        ("0F0 0B0", "1B0 1F0"),
        ("0F0 0W0 0I0", "1F0 1B0"),
        ("0F0 0B0", "1F0"),
    ):
        with pytest.raises(PlanError, match="the schedule deadlocks before 0"):
            simulate(tuple(tuple(map(Action.parse, text.split())) for text in lists), costs, (0, 1))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"forward_s": -1.0}, "forward_s of a stage is -1.0: give a finite number that is not negative"),
        ({"send_s": float("nan")}, "send_s of a stage is nan"),
        ({"kept_bytes": float("inf")}, "kept_bytes of a stage is inf"),
        ({"backward_input_s": 3.0}, "backward_input_s 3.0 is a part of backward_s 2.0: give no more than that"),
    ],
)
def test_costs_that_cannot_be(numbers: dict[str, float], said: str) -> None:
    with pytest.raises(PlanError) as error:
        StageCosts(**({"forward_s": 1.0, "backward_s": 2.0} | numbers))
    assert str(error.value).startswith(said)


def test_chrome_trace_lays_what_was_measured_below(tmp_path: Path) -> None:
    timeline = even("1f1b", 2, 3, 1)
    measured = [PipelineEvent(1, 1, "F", 0, 0.5, 0.75)]
    traces = [timeline.to_chrome_trace(tmp_path / "plain.json"), timeline.to_chrome_trace(tmp_path / "both.json", measured)]
    plain, both = (json.loads(path.read_text())["traceEvents"] for path in traces)
    rows = [{event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"} for events in (plain, both)]
    assert list(rows[0].values()) == ["rank 0", "rank 1"]
    assert [rows[1][row] for row in sorted(rows[1])] == ["rank 0", "rank 0 measured", "rank 1", "rank 1 measured"]
    shown = [event for event in plain if event["ph"] == "X"]
    assert [event["name"] for event in shown if event["tid"] == 0] == ["0F0", "0F1", "0B0", "0F2", "0B1", "0B2"]
    assert [(event["ts"], event["dur"]) for event in shown if event["name"] == "1B0"] == [(6e6, 5e6)]
    added = [event for event in both if event["ph"] == "X" and event not in shown]
    assert [(event["tid"], event["name"], event["ts"], event["dur"]) for event in added] == [(3, "1F0", 5e5, 2.5e5)]


def test_repr_is_short() -> None:
    assert repr(even("1f1b", 2, 3, 1)) == "PipelineTimeline(32000.000 ms, 2 ranks, 25.0% bubble, in flight 2 1)"
