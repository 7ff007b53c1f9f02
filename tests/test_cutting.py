"""Cutting a chain into stages: equal to trying every cut, bounded by what is proven, within the memory of every rank."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.chain import blocks
from autoshard.cut_objectives import Greatest, Line, StepTime, rank_memory
from autoshard.cut_search import Completion, Search, Windows
from autoshard.cutting import Chain, Copy, Cut, Link, Weight, cut, evaluate_cut
from autoshard.errors import BudgetError, ConstraintError, PlanError
from autoshard.pipeline_timeline import simulate
from autoshard.schedules import NAMES, Schedule, make_schedule, stage_ranks

TWO_STAGES_A_RANK = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")
FREE = Link(0.0, 1.0)


def eighths(most: int) -> st.SearchStrategy[float]:
    """Sums of these are exact, so that equal cuts are equal in any order of adding up."""
    return st.one_of(st.just(0.0), st.integers(0, most).map(lambda eighth: eighth / 8))


@st.composite
def chains(draw: st.DrawFn, least: int = 1, most: int = 9) -> Chain:
    n = draw(st.integers(least, most))
    each = lambda values, count=n: draw(st.lists(values, min_size=count, max_size=count))  # noqa: E731
    readers = st.lists(st.integers(0, n - 1), min_size=1, max_size=3, unique=True).map(tuple)
    seconds, traffic = eighths(40), st.integers(0, 30).map(float)
    backward = each(seconds)
    return Chain(
        forward_s=each(seconds),
        backward_s=backward,
        backward_input_s=[b * part for b, part in zip(backward, each(st.sampled_from([0.0, 0.25, 0.5, 1.0])), strict=True)],
        sent_bytes=[0.0, *each(traffic, n - 1), 0.0],
        sent_back_bytes=[0.0, *each(traffic, n - 1), 0.0],
        kept_bytes=each(st.integers(0, 20).map(float)),
        weights=draw(st.lists(st.builds(Weight, readers, st.integers(0, 50).map(float), seconds, seconds, seconds), max_size=n)),
        copies=draw(st.lists(st.builds(Copy, readers, seconds), max_size=3)),
        is_cut_allowed=[True, *each(st.sampled_from([True, True, True, True, False]), n - 1), True],
    )


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Schedule, tuple[int, ...]]:
    """A schedule of 1 to 4 stages, one or two a rank, and the ranks of its stages."""
    name = draw(st.sampled_from(NAMES))
    per_rank = 2 if name in TWO_STAGES_A_RANK else 1
    ranks = draw(st.integers(1, 4 // per_rank))
    microbatches = draw(st.integers(2 * ranks if name in ("zbv", "dualpipev") else 1, 6))
    if name.startswith("interleaved"):
        microbatches = max(ranks, microbatches - microbatches % ranks)
    return make_schedule(name, ranks, microbatches, per_rank), stage_ranks(name, ranks, per_rank)


links = st.builds(Link, st.sampled_from([0.0, 0.5]), st.sampled_from([8.0, 64.0]))


def every_cut(chain: Chain, pipeline: tuple[Schedule, tuple[int, ...]], link: Link, starts_at: list[int], overhead_s: float) -> list[Cut]:
    allowed = chain.is_cut_allowed or [True] * (len(chain.forward_s) + 1)
    return [
        evaluate_cut(chain, (0, *rest), *pipeline, link, overhead_s)
        for rest in itertools.combinations(range(1, len(chain.forward_s)), len(pipeline[1]) - 1)
        if all(allowed[k] for k in rest) and set(starts_at) <= {0, *rest}
    ]


@settings(deadline=None, max_examples=120)
@given(
    chains(),
    pipelines(),
    links,
    st.sets(st.integers(0, 8), max_size=1),
    st.sampled_from([0.0, 0.25]),
    st.sampled_from([None, -1, 0, 9, 40]),
)
def test_equals_the_best_of_all_cuts(
    chain: Chain, pipeline: tuple[Schedule, tuple[int, ...]], link: Link, forced: set[int], overhead_s: float, spare: int | None
) -> None:
    allowed = chain.is_cut_allowed or []
    starts_at = [k for k in forced if k < len(chain.forward_s) and allowed[k]]
    tried = every_cut(chain, pipeline, link, starts_at, overhead_s)
    if not tried:
        with pytest.raises(ConstraintError):
            cut(chain, *pipeline, link, starts_at=starts_at, overhead_s=overhead_s)
        return
    least_bytes = min(max(c.peak_bytes) for c in tried)
    memory_bytes = None if spare is None else least_bytes + spare
    fit = [c for c in tried if memory_bytes is None or max(c.peak_bytes) <= memory_bytes]
    if not fit:
        with pytest.raises(BudgetError, match=f"no cut takes less; give a budget of {least_bytes:.0f} bytes, "):
            cut(chain, *pipeline, link, memory_bytes, starts_at, overhead_s=overhead_s)
        return
    found = cut(chain, *pipeline, link, memory_bytes, starts_at, overhead_s=overhead_s)
    assert found.total_s == pytest.approx(min(c.total_s for c in fit), rel=1e-12, abs=0)
    assert found.bound_s <= found.total_s
    assert found.is_optimal
    assert replace(found, bound_s=0.0) in fit


@pytest.mark.parametrize("left_out", [("_try_levelled", "_descend"), ("_try_levelled", "_descend", "_play")])
@settings(deadline=None, max_examples=30)
@given(chains(5, 9), pipelines(), links, st.sampled_from([None, 0, 20]))
def test_branching_alone_finds_the_best(
    left_out: tuple[str, ...], chain: Chain, pipeline: tuple[Schedule, tuple[int, ...]], link: Link, spare: int | None
) -> None:
    """Whatever finds good cuts early is left out: what remains has to look at every cut that could be the best."""
    chain = replace(chain, is_cut_allowed=None)
    tried = every_cut(chain, pipeline, link, [], 0.0)
    memory_bytes = None if spare is None else min(max(c.peak_bytes) for c in tried) + spare
    limits = [] if memory_bytes is None else [(line, memory_bytes) for line in rank_memory(*pipeline)]
    with ExitStack() as stack:
        for name in left_out:
            stack.enter_context(mock.patch.object(Search, name, return_value=None))
        found = Search(blocks(chain, link), len(pipeline[1]), StepTime(*pipeline, link.latency_s, 0.0), limits).find()
    best = min(c.total_s for c in tried if memory_bytes is None or max(c.peak_bytes) <= memory_bytes)
    assert found.value == pytest.approx(best, rel=1e-12, abs=0)
    assert found.bound == pytest.approx(best, rel=1e-12, abs=0)


@settings(deadline=None, max_examples=50)
@given(chains(4, 9), pipelines(), links, st.randoms(use_true_random=False))
def test_costs_of_blocks_are_those_of_stages(chain: Chain, pipeline: tuple[Schedule, tuple[int, ...]], link: Link, random) -> None:
    parts = blocks(chain, link)
    stages = min(len(pipeline[1]), parts.count)
    starts = (0, *sorted(random.sample(range(1, parts.count), stages - 1)))
    schedule, ranks = make_schedule("gpipe", stages, 2), tuple(range(stages))
    given_cut = evaluate_cut(chain, [int(parts.cuts[k]) for k in starts], schedule, ranks, link)
    costs = parts.costs(np.array([starts]))
    relaxed = parts.relaxed_costs(np.array([starts]))
    names = ("forward_s", "backward_s", "backward_input_s", "send_s", "send_back_s", "once_s", "after_s", "kept_bytes")
    for stage, (start, expected) in enumerate(zip(starts, given_cut.costs, strict=True)):
        assert costs[0, stage, :-1] == pytest.approx([getattr(expected, name) for name in names], abs=1e-12)
        stop = (*starts, parts.count)[stage + 1]
        assert parts.costs_from(start, slice(start + 1, parts.count + 1))[:, stop - start - 1] == pytest.approx(costs[0, stage], abs=1e-12)
    assert (relaxed <= costs + 1e-12).all()
    memory = Greatest(rank_memory(schedule, ranks)).values(costs)[0]
    assert memory == pytest.approx(max(given_cut.peak_bytes), abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(chains(4, 9), chains(4, 9), pipelines(), links, st.sampled_from([0.0, 0.25]))
def test_the_longest_path_bounds_every_cut(
    one: Chain, other: Chain, pipeline: tuple[Schedule, tuple[int, ...]], link: Link, overhead_s: float
) -> None:
    """The objective is what `simulate` says; the line at one cut equals it there, and is nowhere above it."""
    time = StepTime(*pipeline, link.latency_s, overhead_s)
    stages = len(pipeline[1])
    cuts = [evaluate_cut(replace(c, is_cut_allowed=None), tuple(range(stages)), *pipeline, link, overhead_s) for c in (one, other)]
    costs = np.concatenate([blocks(replace(c, is_cut_allowed=None), link).costs(np.array([range(stages)])) for c in (one, other)])
    expected = [simulate(pipeline[0], c.costs, pipeline[1], link.latency_s, overhead_s).total_s for c in cuts]
    assert time.values(costs) == pytest.approx(expected, rel=1e-12)
    line = time.line(costs[0])
    assert line(costs)[0] == pytest.approx(expected[0], rel=1e-12)
    assert line(costs)[1] <= expected[1] * (1 + 1e-12)


@settings(deadline=None, max_examples=50)
@given(chains(4, 9), st.integers(2, 4), st.randoms(use_true_random=False))
def test_completions_and_windows_leave_out_no_cut(chain: Chain, stages: int, random) -> None:
    """The bound is the least of the line over all cuts, and no stage of a cut within a limit is left out."""
    parts = blocks(replace(chain, is_cut_allowed=None), FREE)
    line = Line(np.array([[random.randint(0, 4) for _ in range(9)] for _ in range(stages)], float), 1.0)
    windows = Windows(np.full((stages, parts.count + 1), parts.count))
    completion = Completion(parts, line, windows)
    cuts = [(0, *rest) for rest in itertools.combinations(range(1, parts.count), stages - 1)]
    values = line(parts.relaxed_costs(np.array(cuts)))
    assert completion.bound == pytest.approx(values.min(), rel=1e-12)
    assert values[cuts.index(completion.starts())] == pytest.approx(values.min(), rel=1e-12)
    limit = float(np.median(values)) * (1 + 1e-9)
    last = completion.last_within(limit)
    for starts, value in zip(cuts, values, strict=True):
        if value <= limit:
            assert all(stop <= last[stage, start] for stage, (start, stop) in enumerate(itertools.pairwise((*starts, parts.count))))
    ends = [max((s + (parts.count,))[k + 1] for s, v in zip(cuts, values, strict=True) if v <= limit and s[k] == 0) for k in range(1)]
    assert last[0, 0] == ends[0]


def even_chain(forward_s: list[float], sent_bytes: float = 0.0, **fields) -> Chain:
    n = len(forward_s)
    sent = [0.0, *[sent_bytes] * (n - 1), 0.0]
    return Chain(forward_s, [2 * f for f in forward_s], forward_s, sent, sent, [1.0] * n, **fields)


def test_stages_with_heavy_ends_hold_fewer_layers() -> None:
    """Three layers beside the embedding, one beside the head, where the even cut by layers has two each: 12 against 14 seconds."""
    schedule, ranks = make_schedule("1f1b", 2, 4), stage_ranks("1f1b", 2)
    chain = even_chain([0.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    even, found = evaluate_cut(chain, (0, 3), schedule, ranks, FREE), cut(chain, schedule, ranks, FREE)
    assert (found.starts, found.balance, found.is_optimal) == ((0, 4), 1.0, True)
    assert even.starts == (0, 3)
    assert even.balance == pytest.approx(4 / 3)
    assert found.total_s == 3 * (4 * 3 + 3)  # forward and backward of 4 microbatches, and of one on the other stage
    assert even.total_s == 3 * (4 * 4 + 2)


def test_cuts_where_little_is_sent() -> None:
    """A stage a tenth longer is better than ten seconds on the link."""
    chain = replace(even_chain([1.0] * 20), sent_bytes=[0.0, *[10.0] * 8, 0.1, *[10.0] * 10, 0.0])
    found = cut(chain, make_schedule("gpipe", 2, 2), (0, 1), FREE)
    assert found.starts == (0, 9)
    assert found.costs[0].send_s == 0.1


def test_a_shared_weight_is_held_and_stepped_by_every_stage_that_reads_it() -> None:
    tied = Weight((0, 3), bytes=100.0, once_s=0.5, after_s=0.25, step_s=0.125)
    chain = even_chain([1.0] * 4, weights=[tied], copies=[Copy((1, 2), 0.5)])
    schedule, ranks = make_schedule("gpipe", 2, 1), (0, 1)
    halves = evaluate_cut(chain, (0, 2), schedule, ranks, FREE)
    assert [c.once_s for c in halves.costs] == [0.5, 0.5]
    assert [c.after_s for c in halves.costs] == [0.375, 0.375]
    assert [c.forward_s for c in halves.costs] == [2.5, 2.5]
    assert halves.peak_bytes == (102.0, 102.0)
    assert evaluate_cut(chain, (0, 3), schedule, ranks, FREE).costs[1].forward_s == 1.0
    assert cut(chain, schedule, ranks, FREE).starts != (0, 2)  # the copy would be computed twice


def test_memory_moves_the_cut() -> None:
    """1F1B keeps two microbatches on the first rank and one on the second: weights beside activations decide where it may be cut."""
    chain = even_chain([1.0] * 6, weights=[Weight((p,), 10.0) for p in range(6)])
    schedule, ranks = make_schedule("1f1b", 2, 4), stage_ranks("1f1b", 2)
    assert cut(chain, schedule, ranks, FREE).peak_bytes == (36.0, 33.0)
    with pytest.raises(BudgetError) as caught:
        cut(chain, schedule, ranks, FREE, memory_bytes=35.0)
    assert str(caught.value) == (
        "no cut into 2 stages fits 35 B a rank: the leanest found takes 36 B on its fullest rank, and no cut takes less; "
        "give a budget of 36 bytes, more stages or fewer microbatches in flight"
    )
    uneven = replace(chain, kept_bytes=[1.0, 1.0, 20.0, 1.0, 1.0, 1.0])
    assert cut(uneven, schedule, ranks, FREE).starts == (0, 3)
    found = cut(uneven, schedule, ranks, FREE, memory_bytes=64.0)
    assert (found.starts, found.peak_bytes) == ((0, 2), (24.0, 63.0))


def test_constraints() -> None:
    schedule, ranks, chain = make_schedule("gpipe", 2, 4), (0, 1), even_chain([1.0] * 6)
    assert cut(chain, schedule, ranks, FREE).starts == (0, 3)
    assert cut(chain, schedule, ranks, FREE, starts_at=[0, 5]).starts == (0, 5)
    search = Search(blocks(chain, FREE, starts_at=[4]), 2, StepTime(schedule, ranks, 0.0, 0.0))
    assert np.isinf(search._try(np.array([[0, 3], [0, 4], [0, 5]]))).tolist() == [True, False, True]
    assert cut(chain, schedule, ranks, FREE, together=[(4, 1)]).starts in ((0, 1), (0, 5))
    with pytest.raises(ConstraintError, match=r"^stages must start at places \[3\], where no cut is allowed; drop them from starts_at or"):
        cut(chain, schedule, ranks, FREE, starts_at=[3], together=[(1, 4)])
    with pytest.raises(ConstraintError, match=r"^starts_at asks for 3 stages of 2; drop 1 of its places or use more stages$"):
        cut(chain, schedule, ranks, FREE, starts_at=[2, 4])
    with pytest.raises(ConstraintError, match=r"^2 stages need 1 places to cut at, and only 0 are allowed; use fewer stages$"):
        cut(chain, schedule, ranks, FREE, together=[range(6)])
    with pytest.raises(ConstraintError, match=r"^starts \[1, 3\] are not those of 2 stages: give rising places, the first of them 0$"):
        evaluate_cut(chain, (1, 3), schedule, ranks, FREE)


def test_numbers_that_are_no_chain() -> None:
    chain = even_chain([1.0] * 3)
    with pytest.raises(PlanError, match=r"^sent_bytes has 3 entries; 3 places need 4$"):
        replace(chain, sent_bytes=[0.0] * 3)
    with pytest.raises(PlanError, match=r"^kept_bytes of a chain must be finite and not negative; the least is -1.0$"):
        replace(chain, kept_bytes=[1.0, -1.0, 0.0])
    with pytest.raises(PlanError, match=r"^backward_input_s is a part of backward_s: give no more than that at any place$"):
        replace(chain, backward_input_s=[3.0] * 3)
    with pytest.raises(PlanError, match=r"^weights and copies are read by places 0 to 2, not 1 or 3$"):
        replace(chain, weights=[Weight((1, 3), 1.0)])


def long_chain(layers: int, ops: int) -> Chain:
    """Ops of uneven length, most of them views, with little traffic between layers and more within; a heavy head."""
    random = np.random.default_rng(0)
    count = layers * ops + 1
    forward = random.choice([0.0, 0.0, 0.0, 1.0, 2.0, 8.0, 20.0], count) * 1e-5
    forward[-1] = 8e-3
    sent = 3e7 * random.choice([1.0, 2.0, 3.0, 4.0], count + 1)
    sent[::ops] = 3e7
    sent[[0, -1]] = 0.0
    weights = [Weight((p,), 3e8, 1e-4, 1e-4, 1e-5) for p in range(0, count, 20)] + [Weight((0, count - 1), 2e9, 1e-3, 1e-3, 1e-4)]
    kept = random.integers(0, 10**6, count).astype(float)
    return Chain(forward, 2 * forward, forward, sent, sent, kept, weights, [Copy(tuple(range(0, count, ops)), 1e-5)])


@pytest.mark.parametrize(("name", "ranks", "per_rank"), [("1f1b", 16, 1), ("interleaved_1f1b", 8, 2)])
def test_a_chain_of_twelve_thousand_places(name, ranks: int, per_rank: int) -> None:
    """Faster than the even cut by layers, and within a hundredth of what is proven."""
    chain = long_chain(126, 95)
    schedule, stages = make_schedule(name, ranks, 64, per_rank), stage_ranks(name, ranks, per_rank)
    link = Link(1e-5, 5e10)
    even = evaluate_cut(chain, [95 * round(126 * k / 16) for k in range(16)], schedule, stages, link)
    found = cut(chain, schedule, stages, link)
    assert len(chain.forward_s) == 11_971
    assert found.total_s < even.total_s
    assert found.bound_s <= found.total_s < 1.01 * found.bound_s


def test_the_bound_holds_where_the_search_ends_before_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoshard.cut_search._WORK", 0.0)
    chain, schedule, ranks = long_chain(3, 4), make_schedule("1f1b", 4, 6), stage_ranks("1f1b", 4)
    parts = blocks(chain, Link(0.0, 1e10))
    found = Search(parts, 4, StepTime(schedule, ranks, 0.0, 0.0)).find()
    best = min(c.total_s for c in every_cut(chain, (schedule, ranks), Link(0.0, 1e10), [], 0.0))
    assert found.bound < best * (1 - 1e-6)
    assert found.value >= best * (1 - 1e-12)
