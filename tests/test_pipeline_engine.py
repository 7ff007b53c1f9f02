"""Pipelines on real processes: results and gradients of any schedule equal those of one process; what cannot run is refused."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipelines import WIDTH, Wrecked, assert_gradients, assert_same, chain, engine_of, gpipe, one_f_one_b, schedule_of, single_process
from processes import run_on_ranks
from torch import Tensor

from autoshard.errors import PlanError, StageError
from autoshard.runtime import pipeline_engine
from autoshard.runtime.pipeline_engine import EngineStage, PipelineEngine, check_library, disagreements
from autoshard.runtime.pipeline_stage import leaves_of, split_backward

# -------------------------------------------------------------------------------------------------- equal to one process

Case = tuple[str, tuple[int, ...], str, int]  # kinds of stages, rank of each, schedule, microbatches
CASES: dict[int, list[Case]] = {
    1: [("sme", (0, 0, 0), "1f1b", 3)],
    2: [
        ("se", (0, 1), "gpipe", 4),
        ("se", (0, 1), "1f1b", 5),
        ("smme", (0, 1, 0, 1), "1f1b", 4),  # interleaved
        ("smbe", (0, 0, 1, 1), "1f1b", 4),  # neighbours on one rank
        ("imte", (0, 1, 1, 0), "gpipe", 3),  # no gradient to the first stage, none to a weight's own value
        ("smme", (0, 1, 1, 0), "split", 4),  # a V
        ("imte", (0, 1, 0, 1), "split", 3),
        ("stbtte", (0, 1, 1, 0, 1, 0), "split", 2),
    ],
    3: [("smbme", (0, 1, 1, 2, 0), "1f1b", 4), ("smmme", (2, 2, 0, 1, 1), "split", 5)],
    4: [("smme", (0, 1, 2, 3), "gpipe", 4), ("smme", (3, 1, 0, 2), "1f1b", 6), ("smmbmtme", (0, 1, 2, 3, 3, 2, 1, 0), "split", 8)],
}


def trains_as_one_process(case: Case) -> None:
    kinds, stage_ranks, name, microbatches = case
    torch.set_default_dtype(torch.float64)
    reference, stages = chain(kinds, microbatches), chain(kinds, microbatches)
    metas, results = single_process(reference, microbatches)
    engine = engine_of(stages, metas, stage_ranks, microbatches)
    schedule, loss = schedule_of(name, stage_ranks, microbatches), len(results[0]) - 1
    expected = results if stage_ranks[-1] == dist.get_rank() else []
    assert_same(engine.evaluate(), expected)
    assert all(parameter.grad is None for stage in stages for parameter in stage.parameters())
    assert_same(engine.train(schedule, loss), expected)
    assert_gradients(stages, reference, stage_ranks)
    assert_same(engine.evaluate(), expected)
    found = engine.train(schedule, loss)
    assert_same(found, expected)
    assert not any(value.requires_grad for values in found for value in values)
    assert_gradients(stages, reference, stage_ranks, times=2)


def run_cases(size: int) -> None:
    for case in CASES[size]:
        try:
            trains_as_one_process(case)
        except Exception as error:
            raise AssertionError(f"{case} on rank {dist.get_rank()}") from error


@pytest.mark.parametrize("size", CASES)
def test_gradients_and_results_equal_those_of_one_process(size: int) -> None:
    run_on_ranks(size, run_cases, size)


# ------------------------------------------------------------------------- groups, several engines, memory, tied weights


def pipelines_side_by_side() -> list[str]:
    """Ranks 0 and 2 run one pipeline, 1 and 3 another; the second one fails at the end."""
    torch.set_default_dtype(torch.float64)
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group, microbatches = groups[dist.get_rank() % 2], 3 + dist.get_rank() % 2
    stage_ranks = (1, 0, 1)
    reference, stages = chain("sme", microbatches), chain("sme", microbatches)
    metas, results = single_process(reference, microbatches)
    wrecked = Wrecked(stages[0], 1)
    engine = engine_of([wrecked, *stages[1:]], metas, stage_ranks, microbatches, group)
    engine.train(one_f_one_b(stage_ranks, microbatches), len(results[0]) - 1)
    assert_gradients(stages, reference, stage_ranks, 1, group)
    wrecked.how = "forward" if microbatches == 4 else ""
    try:
        engine.evaluate()
    except StageError as error:
        return [str(error)]
    return []


def test_pipelines_side_by_side_name_ranks_of_the_world() -> None:
    text = "stage 0, forward of microbatch 1, failed on rank 3: ValueError: a bad batch"
    assert run_on_ranks(4, pipelines_side_by_side) == [[], [text], [], [text]]


def received_alive() -> list[int]:
    """How many received values of the second of two stages are alive whenever it runs forward; then rank 0 is interrupted."""
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    interrupts = False

    def first(values: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        if interrupts:
            raise KeyboardInterrupt
        return (torch.ones(2, requires_grad=True) * number,)

    def second(values: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        alive.append(weakref.ref(values[0]))
        counts.append(sum(value() is not None for value in alive))
        return ((values[0] * values[0]).sum(),)

    value, loss = torch.empty(2, device="meta", requires_grad=True), torch.empty((), device="meta", requires_grad=True)
    own = EngineStage(0, first, (), (value,)) if dist.get_rank() == 0 else EngineStage(1, second, (value,), (loss,))
    engine = PipelineEngine([own], (0, 1), 5, dist.group.WORLD, torch.device("cpu"))
    engine.train(one_f_one_b((0, 1), 5), 0)
    engine.train(gpipe((0, 1), 5), 0)
    interrupts = True
    if dist.get_rank() == 0:
        with pytest.raises(KeyboardInterrupt):
            engine.train(gpipe((0, 1), 5), 0)
        with pytest.raises(StageError, match=r"for good in an earlier step: it was interrupted\."):
            engine.train(gpipe((0, 1), 5), 0)
    return counts


def test_received_values_live_until_their_backward() -> None:
    assert run_on_ranks(2, received_alive)[1] == [1, 1, 1, 1, 1] + [1, 2, 3, 4, 5]


def several_engines() -> None:
    """Two engines on one group, a step of each in turn; the second one's first stage is the first one's last rank."""
    torch.set_default_dtype(torch.float64)
    engines = []
    for kinds, stage_ranks, microbatches in (("sme", (0, 1, 0), 3), ("imbe", (1, 0, 1, 0), 2)):
        reference, stages = chain(kinds, microbatches), chain(kinds, microbatches)
        metas, results = single_process(reference, microbatches)
        engines.append((engine_of(stages, metas, stage_ranks, microbatches), reference, stages, stage_ranks, microbatches, results))
    for times in (1, 2):
        for engine, reference, stages, stage_ranks, microbatches, results in engines:
            found = engine.train(one_f_one_b(stage_ranks, microbatches), len(results[0]) - 1)
            assert_same(found, results if stage_ranks[-1] == dist.get_rank() else [])
            assert_gradients(stages, reference, stage_ranks, times)


def test_several_engines_share_a_group() -> None:
    run_on_ranks(2, several_engines)


def tied_weight() -> Tensor:
    """A weight that the first and the last stage read, a leaf on each: returns this rank's term of its gradient."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    leaf, ids = torch.randn(10, WIDTH).requires_grad_(), torch.arange(6).reshape(3, 2)

    def first(values: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        return (leaf[ids[number]],)

    def last(values: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        return ((values[0] @ leaf.t()).logsumexp(1).sum(),)

    hidden = torch.empty(2, WIDTH, device="meta", requires_grad=True)
    loss = torch.empty((), device="meta", requires_grad=True)
    own = EngineStage(0, first, (), (hidden,)) if dist.get_rank() == 0 else EngineStage(1, last, (hidden,), (loss,))
    engine = PipelineEngine([own], (0, 1), 3, dist.group.WORLD, torch.device("cpu"))
    engine.train(one_f_one_b((0, 1), 3), 0)
    found = leaf.grad
    assert found is not None
    return found


def test_a_tied_weight_gets_its_gradient_in_two_terms() -> None:
    torch.manual_seed(0)
    tied = torch.randn(10, WIDTH, dtype=torch.float64).requires_grad_()
    rows = tied[torch.arange(6)]
    (rows @ tied.t()).logsumexp(1).sum().backward()
    first, last = run_on_ranks(2, tied_weight)
    assert first[6:].abs().sum() == 0  # rows that no microbatch looks up
    assert last[6:].abs().sum() > 0
    assert_same(first + last, tied.grad)


# -------------------------------------------------------------------------------------------------------- what is refused


def refused() -> list[str]:
    """What the engine says about pipelines and schedules that cannot run; the same on both ranks."""
    reference = chain("sme", 2)
    metas, _ = single_process(reference, 2)
    texts = []
    for wrong_metas, stage_ranks in ((metas, (0, 0, 0)), ([metas[0], metas[1][:-1] + metas[0][1:2], metas[2]], (0, 1, 0))):
        stages = [EngineStage(s, lambda values, number: values, metas[s - 1] if s else (), wrong_metas[s]) for s in range(3)]
        own = [stage for stage in stages if stage_ranks[stage.index] == dist.get_rank()]
        with pytest.raises(PlanError) as caught:
            PipelineEngine(own, stage_ranks, 2, dist.group.WORLD, torch.device("cpu"))
        texts.append(str(caught.value))
    engine = engine_of(chain("sme", 2), metas, (0, 1, 0), 2)
    good = one_f_one_b((0, 1, 0), 2)
    twice = (good[0] + good[0][-1:], good[1])
    for schedule in (good[::-1], twice, (good[0][:-1], good[1]), (good[0][::-1], good[1]), one_f_one_b((0, 1, 0), 3)):
        with pytest.raises(PlanError) as caught:
            engine.train(schedule, 2)
        texts.append(str(caught.value))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "2.12.1")
        with pytest.raises(PlanError) as caught:
            engine.train(one_f_one_b((0, 1, 0), 2, split=True), 2)
        texts.append(str(caught.value))
    engine.train(good, 2)
    return texts


def test_what_cannot_run_is_refused_alike_on_every_rank() -> None:
    first, second = run_on_ranks(2, refused)
    assert first == second
    assert "stage_ranks [0, 0, 0] must name every rank of 0 to 1 at least once" in first[0]
    assert "stage 1 sends" in first[1]
    assert "stage 2 receives" in first[1]
    for text in first[2:4]:
        assert text.startswith("the schedule runs stages on other ranks than [0, 1, 0], or an action twice: rank 0: ")
    for text in first[4:7]:
        assert text.startswith("this schedule of 2 microbatches cannot run: ")
    assert "before torch 2.13 gradients are wrong where backward is split" in first[7]


def test_ranks_that_disagree_are_listed() -> None:
    value, other = ("f32[4]", (1,), True), ("f32[4]", (1,), False)
    assert disagreements([((0, 1), 2, [(0, [], [value])]), ((0, 1), 2, [(1, [value], [])])]) == []
    assert disagreements([((0, 1), 2, [(0, [], [value])]), ((0, 1), 3, [(1, [value], [])])]) == [
        "ranks disagree: rank 0 has stage_ranks (0, 1) and 2 microbatches, rank 1 has stage_ranks (0, 1) and 3 microbatches"
    ]
    assert disagreements([((0, 1), 0, [(0, [value], [value])]), ((0, 1), 0, [(1, [other], []), (2, [], [])])]) == [
        "0 microbatches",
        "rank 1 brings stages [1, 2], stage_ranks say [1]",
        f"stage 0 receives {[value]}, but there is no stage before it",
        f"stage 0 sends {[value]}, stage 1 receives {[other]}",
    ]


def test_a_changed_library_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_library.__wrapped__()
    monkeypatch.setattr(pipeline_engine, "_add_send_recv", lambda actions, stage_to_rank, num_stages: actions)
    with pytest.raises(PlanError, match=r"changed torch\.distributed\.pipelining"):
        check_library.__wrapped__()


def test_a_runtime_that_asks_for_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = pipeline_engine._Runtime.step

    def other_step(self: Any, **kwargs: Any) -> None:
        step(self, **kwargs)
        self._stages[0].perform_reduce_grad(1)

    monkeypatch.setattr(pipeline_engine._Runtime, "step", other_step)
    with pytest.raises(PlanError, match="perform_reduce_grad"):
        check_library.__wrapped__()


# ---------------------------------------------------------------------------------------------------------- split backward


@pytest.mark.parametrize("reads", ["both", "weight alone", "nothing that needs a gradient"])
def test_split_backward_gives_every_gradient(reads: str) -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    received = (x if reads != "nothing that needs a gradient" else x.detach(), torch.arange(3))

    def roots() -> list[Tensor]:
        mixed = torch.tanh(a @ torch.tanh(b @ torch.tanh(a @ received[0])))
        return [mixed, (a * b).exp()] if reads == "weight alone" else [mixed]

    grads = [torch.randn_like(root) for root in roots()]
    torch.autograd.backward(roots(), grads)
    expected = [leaf.grad for leaf in (x, a, b)]
    x.grad = a.grad = b.grad = None
    found, backward_of_weights = split_backward(received, roots(), grads)
    assert a.grad is None
    assert_same(found, (expected[0], None))
    backward_of_weights()
    assert_same([a.grad, b.grad], expected[1:])
    assert {id(leaf) for leaf in leaves_of(roots())} == {id(leaf) for leaf in (x, a, b)} - ({id(x)} if expected[0] is None else set())
