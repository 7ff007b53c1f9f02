"""Pipelines on real processes: gradients and results of any schedule equal those of one process, and no failure leaves a rank waiting."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from torch import Tensor, nn

from autoshard import pipeline_engine
from autoshard.errors import PlanError, StageError
from autoshard.pipeline_engine import EngineStage, PipelineEngine, check_library, disagreements
from autoshard.pipeline_stage import leaves_of, split_backward
from autoshard.schedules import Action, Kind, Schedule

WIDTH, ROWS = 4, 3
Part = Callable[..., tuple[Tensor, ...]]

# ------------------------------------------------------------------------------------------------------------ schedules


def gpipe(stage_ranks: Sequence[int], microbatches: int) -> Schedule:
    """All forwards, then all backwards."""
    every = list(itertools.product(range(microbatches), range(len(stage_ranks))))
    order = [Action(s, "F", m) for m, s in every] + [Action(s, "B", m) for m, s in sorted(every, key=lambda at: (at[0], -at[1]))]
    return tuple(tuple(action for action in order if stage_ranks[action.stage] == rank) for rank in range(max(stage_ranks) + 1))


def one_f_one_b(stage_ranks: Sequence[int], microbatches: int, split: bool = False) -> Schedule:
    """Backward as soon as it can be, at most as many microbatches in flight as there are stages behind: 1F1B for any map."""
    last, done = len(stage_ranks) - 1, set[Action]()
    kinds: list[Kind] = ["I", "F", "W"] if split else ["B", "F"]
    left = [Action(s, kind, m) for kind in kinds for m in range(microbatches) for s in range(last, -1, -1)]
    lists: list[list[Action]] = [[] for _ in range(max(stage_ranks) + 1)]

    def is_ready(action: Action) -> bool:
        s, m = action.stage, action.microbatch
        if action.kind == "F":
            in_flight = sum(a.kind == "F" and a.stage == s for a in done) - sum(a.kind in "BI" and a.stage == s for a in done)
            return in_flight <= last - s and (s == 0 or Action(s - 1, "F", m) in done) and (m == 0 or Action(s, "F", m - 1) in done)
        if action.kind == "W":
            return Action(s, "I", m) in done
        return Action(s, "F", m) in done and (s == last or Action(s + 1, action.kind, m) in done)

    while left:
        now = []
        for rank, own in enumerate(lists):
            chosen = next((a for a in left if stage_ranks[a.stage] == rank and is_ready(a)), None)
            if chosen is not None:
                own.append(chosen)
                now.append(chosen)
        assert now, "the schedule does not advance"
        done.update(now)
        left = [action for action in left if action not in done]
    return tuple(map(tuple, lists))


# --------------------------------------------------------------------------------------------------------------- models


class Start(nn.Module):
    """The first stage: reads the microbatch's own inputs. Values: hidden, ids, mask, scale, skip, unused."""

    def __init__(self, inputs: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.inputs = inputs
        self.table = nn.Parameter(torch.randn(10, WIDTH))

    def forward(self, number: int) -> tuple[Tensor, ...]:
        x, ids = self.inputs[number]
        hidden = (x + self.table[ids]).t()  # its memory is not in order
        return hidden, ids, ids > 4, x.abs().max(), self.table[ids].exp()[:, 1:3], hidden * 2


class Middle(nn.Module):
    """Adds to the hidden state by what it received; passes the others on as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(10, WIDTH))

    def forward(self, number: int, hidden: Tensor, ids: Tensor, mask: Tensor, scale: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        change = torch.tanh(self.linear(hidden.t())) * scale + self.table[ids] * mask[:, None]
        return hidden + change.t(), ids, mask, scale, *rest


class Bare(nn.Module):
    """A stage without parameters."""

    def forward(self, number: int, hidden: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return torch.sin(hidden), *rest


class End(nn.Module):
    """The last stage: other results, and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, number: int, hidden: Tensor, ids: Tensor, mask: Tensor, scale: Tensor, skip: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        scores = self.head(hidden.t()) * skip
        return scores, ids, (scores * scores).sum() / scale


class Inputs(nn.Module):
    """A first stage that only hands on inputs: nothing of it needs a gradient."""

    def __init__(self, inputs: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.inputs = inputs

    def forward(self, number: int) -> tuple[Tensor, ...]:
        x, ids = self.inputs[number]
        return x.t(), ids, ids > 4, x.abs().max(), x[:, 1:3]


class Twice(nn.Module):
    """Two weights, each used twice, interleaved; and a value that comes from a weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, number: int, hidden: Tensor, ids: Tensor, mask: Tensor, scale: Tensor, skip: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        mixed = torch.tanh(self.b @ torch.tanh(self.a @ torch.tanh(self.b @ torch.tanh(self.a @ hidden))))
        return mixed, ids, mask, scale, (self.a * self.b)[:ROWS, :2].exp(), *rest


def inputs_of(microbatches: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    shapes = range(microbatches)
    return [(torch.randn(ROWS, WIDTH, generator=generator), torch.randint(0, 10, (ROWS,), generator=generator)) for _ in shapes]


def chain(kinds: str, microbatches: int) -> list[nn.Module]:
    """The stages that the letters of `kinds` name, the same on every rank."""
    torch.manual_seed(0)
    make: dict[str, Callable[[], nn.Module]] = {
        "s": lambda: Start(inputs_of(microbatches)),
        "i": lambda: Inputs(inputs_of(microbatches)),
        "m": Middle,
        "b": Bare,
        "t": Twice,
        "e": End,
    }
    return [make[kind]() for kind in kinds]


def metas_of(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta", requires_grad=v.requires_grad and v.is_floating_point())
        for v in values
    )


def single_process(stages: Sequence[nn.Module], microbatches: int) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """Runs all stages here, forward and backward: the metas between stages, and the results."""
    results: list[tuple[Tensor, ...]] = []
    for number in range(microbatches):
        values: tuple[Tensor, ...] = ()
        metas = []
        for stage in stages:
            values = stage(number, *values)
            metas.append(metas_of(values))
        values[-1].backward()
        results.append(tuple(value.detach() for value in values))
    return metas, results


def engine_of(stages: Sequence[nn.Module], metas: Sequence[tuple[Tensor, ...]], stage_ranks: Sequence[int], microbatches: int) -> PipelineEngine:
    def forward_of(stage: nn.Module) -> Callable[[tuple[Tensor, ...], int], tuple[Tensor, ...]]:
        return lambda values, number: stage(number, *values)

    own = [index for index, rank in enumerate(stage_ranks) if rank == dist.get_rank()]
    plans = [EngineStage(index, forward_of(stages[index]), metas[index - 1] if index else (), metas[index]) for index in own]
    return PipelineEngine(plans, stage_ranks, microbatches, dist.group.WORLD, torch.device("cpu"))


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def assert_gradients(stages: Sequence[nn.Module], reference: Sequence[nn.Module], stage_ranks: Sequence[int], times: int = 1) -> None:
    for stage, alone, rank in zip(stages, reference, stage_ranks, strict=True):
        for own, other in zip(stage.parameters(), alone.parameters(), strict=True):
            if rank != dist.get_rank():
                assert own.grad is None
            elif other.grad is None:
                assert own.grad is None
            else:
                assert_same(own.grad, other.grad * times)


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


def schedule_of(name: str, stage_ranks: Sequence[int], microbatches: int) -> Schedule:
    return gpipe(stage_ranks, microbatches) if name == "gpipe" else one_f_one_b(stage_ranks, microbatches, name == "split")


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


# ----------------------------------------------------------------------------------------- several engines, tied weights


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


# ------------------------------------------------------------------------------------------------------------- failures


class Failing(torch.autograd.Function):
    """Identity; raises in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyError("no gradient today")


class Wrecked(nn.Module):
    """A stage that fails at one microbatch, once it is told how."""

    def __init__(self, stage: nn.Module, number: int) -> None:
        super().__init__()
        self.stage, self.number, self.how = stage, number, ""

    def forward(self, number: int, *values: Tensor) -> tuple[Tensor, ...]:
        if self.how and number == self.number:
            if self.how == "backward":
                return self.stage(number, Failing.apply(values[0]), *values[1:])
            if self.how == "fewer":
                return self.stage(number, *values)[:-1]
            if self.how == "smaller":
                hidden, *rest = self.stage(number, *values)
                return hidden[:1], *rest
            raise ValueError("a bad batch")
        return self.stage(number, *values)


def failures_of(kinds: str, stage_ranks: tuple[int, ...], name: str, hows: Sequence[str]) -> list[tuple[str, str]]:
    """Stage 1 fails in every way of `hows`, each followed by a step that is right; the errors that this rank saw, and their causes."""
    torch.set_default_dtype(torch.float64)
    microbatches, seen = 4, []
    reference, stages = chain(kinds, microbatches), chain(kinds, microbatches)
    metas, results = single_process(reference, microbatches)
    wrecked = Wrecked(stages[1], 2)
    engine = engine_of([stages[0], wrecked, *stages[2:]], metas, stage_ranks, microbatches)
    schedule, loss = schedule_of(name, stage_ranks, microbatches), len(results[0]) - 1
    for how in hows:
        wrecked.how = how.removeprefix("evaluate ")
        with pytest.raises(StageError) as caught:
            engine.evaluate() if how.startswith("evaluate") else engine.train(schedule, loss)
        seen.append((str(caught.value), repr(caught.value.__cause__)))
        wrecked.how = ""
        for stage in stages:
            stage.zero_grad()
        found = engine.train(schedule, loss)
        assert_same(found, results if stage_ranks[-1] == dist.get_rank() else [])
        assert_gradients(stages, reference, stage_ranks)
    return seen


EXPECTED = {
    "forward": ("forward of microbatch 2", "ValueError: a bad batch", "ValueError('a bad batch')"),
    "evaluate forward": ("forward of microbatch 2", "ValueError: a bad batch", "ValueError('a bad batch')"),
    "backward": ("backward of microbatch 2", "KeyError: 'no gradient today'", "KeyError('no gradient today')"),
    "fewer": ("forward of microbatch 2", "PlanError: stage 1 passes on other values than planned: 5 values instead of 6", "PlanError"),
    "smaller": ("forward of microbatch 2", "value 0 is f64[1, 3] instead of f64[4, 3]", "PlanError"),
}


@pytest.mark.parametrize(
    ("kinds", "stage_ranks", "name"), [("sme", (0, 1, 0), "1f1b"), ("smme", (0, 1, 2, 3), "gpipe"), ("smme", (0, 1, 1, 0), "split")]
)
def test_a_stage_that_raises_ends_the_step_everywhere_and_the_next_is_right(kinds: str, stage_ranks: tuple[int, ...], name: str) -> None:
    hows = list(EXPECTED)
    seen = run_on_ranks(max(stage_ranks) + 1, failures_of, kinds, stage_ranks, name, hows)
    for rank, errors in enumerate(seen):
        for how, (text, cause) in zip(hows, errors, strict=True):
            place, reason, original = EXPECTED[how]
            place = place.replace("backward", "backward of the inputs") if name == "split" else place
            assert text.startswith(f"stage 1, {place}, failed on rank 1: "), text
            assert reason in text
            assert cause.startswith(original) if rank == 1 else cause == "None"


def loses_a_rank(folder: str, lost: int, stage_ranks: tuple[int, ...]) -> None:
    """A rank dies in its forward of microbatch 1; the others write down what they were told, now and at the next step."""
    torch.set_default_dtype(torch.float64)
    kinds, microbatches = "s" + "m" * (len(stage_ranks) - 2) + "e", 3
    stages = chain(kinds, microbatches)
    metas, results = single_process(chain(kinds, microbatches), microbatches)

    class Dying(nn.Module):
        def forward(self, number: int, *values: Tensor) -> tuple[Tensor, ...]:
            if number == 1:
                os._exit(13)
            return stages[lost](number, *values)

    engine = engine_of([Dying() if rank == lost else stage for stage, rank in zip(stages, stage_ranks, strict=True)], metas, stage_ranks, 3)
    errors = []
    for _ in range(2):
        with pytest.raises(StageError) as caught:
            engine.train(one_f_one_b(stage_ranks, microbatches), len(results[0]) - 1)
        errors.append(str(caught.value))
    (Path(folder) / str(dist.get_rank())).write_text("\n".join(errors))
    os._exit(0)


def test_the_others_end_when_a_rank_dies(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"their exit codes: \{0: 0, 1: 13, 2: 0\}"):
        run_on_ranks(3, loses_a_rank, str(tmp_path), 1, (0, 1, 2))
    for rank in (0, 2):
        first, second = (tmp_path / str(rank)).read_text().split("\n", 1)
        assert "of microbatch" in first
        assert "on rank 1: " in first
        assert second.startswith("this pipeline stopped for good in an earlier step: ")


def waits_in_vain() -> str:
    """Rank 1 does not come to the step within the group's timeout; returns what rank 0 was told."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    store = dist.distributed_c10d._get_default_store()
    value = torch.empty(2, device="meta", requires_grad=True)
    forward = [lambda values, number: (torch.ones(2, requires_grad=True) * 2,), lambda values, number: (values[0].sum(),)]
    loss = torch.empty((), device="meta", requires_grad=True)
    own = EngineStage(dist.get_rank(), forward[dist.get_rank()], (value,) * dist.get_rank(), ((value,), (loss,))[dist.get_rank()])
    engine = PipelineEngine([own], (0, 1), 2, group, torch.device("cpu"))
    if dist.get_rank() == 1:
        store.wait(["rank 0 gave up"])
        return ""
    with pytest.raises(StageError) as caught:
        engine.train(gpipe((0, 1), 2), 0)
    store.set("rank 0 gave up", "yes")
    return str(caught.value)


def test_a_rank_that_does_not_answer_is_named_after_the_timeout() -> None:
    text = run_on_ranks(2, waits_in_vain)[0]
    assert text.startswith("stage 0 on rank 0 waited for the gradients of microbatch 0 from stage 1 on rank 1: ")


# -------------------------------------------------------------------------------------------------------- what is refused


def refused() -> list[str]:
    """What the engine says about pipelines and schedules that cannot run; the same on both ranks."""
    reference = chain("sme", 2)
    metas, _ = single_process(reference, 2)
    texts = []
    for wrong_metas, stage_ranks in ((metas, (0, 0, 0)), ([metas[0], metas[1][:-1] + metas[0][1:2], metas[2]], (0, 1, 0))):
        with pytest.raises(PlanError) as caught:
            stages = [EngineStage(s, lambda values, number: values, metas[s - 1] if s else (), wrong_metas[s]) for s in range(3)]
            own = [stage for stage in stages if stage_ranks[stage.index] == dist.get_rank()]
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
    with pytest.raises(PlanError, match="changed torch.distributed.pipelining"):
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
