"""Backward in two halves: proved on a stage's graph or refused by name, a violation of each condition, and gradients either way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pipeline_models import CASES, WIDTH, Deep, vectors
from pipelines import assert_same, chain, schedule_of, single_process
from processes import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import autoshard
from autoshard import Pipelining
from autoshard.backward_halves import whole_because, wholes
from autoshard.errors import PlanError
from autoshard.program import facts
from autoshard.rules import RULES, register_rule
from autoshard.runtime.attention import split_attention
from autoshard.runtime.pipeline_stage import EngineStage
from autoshard.stage_rehearsal import EngineAlone, StageAlone

LIBRARY = "autoshard_halves"


@torch.library.custom_op(f"{LIBRARY}::scale", mutates_args=())
def scale(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


scale.register_fake(lambda x, weight: torch.empty_like(x))
scale.register_autograd(
    lambda ctx, grad: (grad * ctx.saved_tensors[1], (grad * ctx.saved_tensors[0]).sum(0)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@contextmanager
def known_scale() -> Iterator[None]:
    register_rule(f"{LIBRARY}::scale", "b i, i -> b i")
    try:
        yield
    finally:
        RULES.pop(f"{LIBRARY}.scale", None)


class Ends(Deep):
    """Four layers, of which the last one is used as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.scale = how, nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.hidden(x)
        last = self.layers[3]
        if self.how == "twice":
            x = torch.tanh(last(torch.tanh(x)))
        if self.how == "a function of it twice":
            weight = self.scale.exp()
            x = torch.tanh(x * weight) * weight
        if self.how == "again":
            x = checkpoint(lambda x: torch.tanh(self.head.weight.sum() * last.bias * x), x, use_reentrant=False)
        if self.how == "fused":
            x = scale(x, self.scale)
        return F.cross_entropy(self.head(x), y)


def plan_of(model: nn.Module, schedule: str = "zbv", mesh: str = "pp=2", starts: tuple[str, ...] = ()) -> autoshard.Plan:
    args, kwargs = vectors(0)
    return autoshard.plan(model.double(), mesh, args, kwargs, pipeline=Pipelining(4, schedule, starts=starts))


# ------------------------------------------------------------------------------------------------------ proved or refused


@pytest.mark.parametrize("case", ["gpt", pytest.param("llama", marks=pytest.mark.slow), "UNet", "MoE", "SeveralInputsAndOutputs"])
def test_usual_models_are_proved(case: str) -> None:
    args, kwargs = CASES[case].batch(0)
    plan = autoshard.plan(CASES[case].model(), "pp=2", args, kwargs, pipeline=Pipelining(4, "zbv"))
    assert not any(wholes(plan.program))
    assert not any("two halves" in note for note in plan.notes)
    assert "SPLITS_BACKWARD" not in plan.program.source


VIOLATIONS = {
    "twice": r"layers\.3\.weight reaches the activations in layers_3_linear and in layers_3_linear_1; what lies between would run twice",
    "a function of it twice": r"scale reaches the activations in mul_\d+ and in mul_\d+; what lies between would run twice|"
    r"scale reaches the activations in mul and in mul_1; what lies between would run twice",
    "again": r", which reads \S+, stands in a checkpointed region, which would run again in both halves",
    "fused": r"scale\S* computes the gradients of scale and of its other operands in one function, which would run twice",
}


@pytest.mark.parametrize("how", VIOLATIONS)
def test_a_stage_that_cannot_be_split_runs_whole(how: str) -> None:
    with known_scale():
        plan = plan_of(Ends(how), starts=("layers.1", "layers.2", "layers.3"))
    reasons = wholes(plan.program)
    assert [bool(reason) for reason in reasons] == [False, False, False, True]
    note = next(note for note in plan.notes if "two halves" in note)
    assert note.startswith("backward is not split in two halves in 1 of 4 stages (stage 3: ")
    assert re.search(VIOLATIONS[how], reasons[3]), reasons[3]
    for number, stage in enumerate(plan.program.stages):
        assert ("SPLITS_BACKWARD = False  # " in stage.source) == (number == 3)
    assert plan.memory("sgd").peak_bytes  # which runs the text
    timeline = plan.timeline()
    assert timeline.total_s == plan.stats["pipeline_s"]
    spent = {(event.stage, event.kind): event.end_s - event.start_s for event in timeline.events}  # type: ignore[union-attr]
    assert spent[3, "W"] == 0 < spent[2, "W"]
    assert spent[3, "I"] == pytest.approx(plan.program.pipeline.costs[3].backward_s)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_a_recurrent_layer_runs_whole() -> None:
    """It meets its weights once in the program, and at every step of the sequence in autograd's graph."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.last = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.GRU(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.last(x)[0].square().mean()

    asked = Pipelining(4, "zbv", starts=("layers.1", "layers.2", "last"))
    plan = autoshard.plan(Recurrent().double(), "pp=2", (torch.zeros(8, 5, 8, dtype=torch.float64),), pipeline=asked)
    assert [reason for reason in wholes(plan.program) if reason] == [
        "last_gru computes the gradients of last.weight_ih_l0 and of its other operands in one function, which would run twice"
    ]


def test_attention_over_split_sequences_with_a_learned_mask_runs_whole() -> None:
    """Planted: the op that reads a weight is put in place of another."""
    stage = plan_of(Ends("")).program.stages[3]
    assert not whole_because(stage)
    node = next(node for node in stage.nodes("op") if any(facts(o).role == "parameter" for o in node.all_input_nodes))
    node.target = split_attention
    assert "in one function, which would run twice" in whole_because(stage)


def test_a_schedule_that_no_stage_can_follow_is_refused() -> None:
    class Round(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            for _ in range(8):
                x = torch.tanh(self.layer(x))
            return x.square().mean() + 0 * y.sum()

    with pytest.raises(
        PlanError, match=r"schedule 'zbv' runs backward in two halves, which no stage of this model can: stage 1: layer\.weight"
    ):
        plan_of(Round())
    assert not any(wholes(plan_of(Round(), "interleaved_1f1b").program))
    with pytest.raises(PlanError, match=r"Ask for another, such as '1f1b' or 'interleaved_1f1b'$"):
        plan_of(Round(), "interleaved_zero_bubble")


def test_stages_without_weights_or_gradients_from_before_have_nothing_to_prove() -> None:
    args, kwargs = vectors(0)
    for case in ("NothingLearnedAtTheEnd", "NothingLearnedAtFirst"):
        plan = autoshard.plan(CASES[case].model(), "pp=2", args, kwargs, pipeline=Pipelining(4, "zbv"))
        assert not any(wholes(plan.program))


# ------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("whole", [(), (1,), (2, 3), (0, 1, 2, 3, 4)], ids=str)
def test_gradients_are_those_of_one_process(whole: tuple[int, ...]) -> None:
    """Five stages on one rank, some of which run backward whole where the schedule splits it."""
    torch.set_default_dtype(torch.float64)
    try:
        kinds, count, lies = "smtme", 3, (0,) * 5
        reference, stages = chain(kinds, count), chain(kinds, count)
        metas, results = single_process(reference, count)

        def part(number: int) -> EngineStage:
            given = metas[number - 1] if number else ()
            return EngineStage(number, lambda values, microbatch: stages[number](microbatch, *values), given, metas[number])

        parts = [replace(part(number), splits=number not in whole) for number in range(5)]
        device = torch.device("cpu")
        engine = EngineAlone(parts, lies, count, device, lambda stage, step: StageAlone(stage, lies, step, device))
        found = engine.train(schedule_of("split", lies, count), len(results[0]) - 1)
        assert_same(found, results)
        for own, other in zip(stages, reference, strict=True):
            for mine, theirs in zip(own.parameters(), other.parameters(), strict=True):
                assert_same(mine.grad, theirs.grad)
    finally:
        torch.set_default_dtype(torch.float32)


def train(hows: list[str], schedules: list[str]) -> list[float]:
    """By model and schedule the largest difference of a gradient to one process'."""
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",)), []
    args, kwargs = vectors(1)
    with known_scale():
        for how in hows:
            for schedule in schedules:
                torch.manual_seed(0)
                model = Ends(how).double()
                compiled = autoshard.compile(model, mesh, pipeline=Pipelining(4, schedule, starts=("layers.1", "layers.2", "layers.3")))
                compiled(*args, **kwargs).backward()
                model(*args, **kwargs).backward()
                alone: dict[str, Any] = dict(model.named_parameters())
                pairs = [(p.grad, alone[name].grad) for name, p in compiled.named_parameters() if p.grad is not None]
                assert pairs
                found.append(max(float((mine.full_tensor() - theirs).abs().max()) for mine, theirs in pairs))
    return found


@pytest.mark.slow
def test_stages_that_run_whole_train_as_one_process() -> None:
    for rank in run_on_ranks(2, train, ["", *VIOLATIONS], ["zbv", "interleaved_zero_bubble"]):
        assert max(rank) < 1e-12
