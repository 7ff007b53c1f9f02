"""Bad input: one clear error each, and nothing half done."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from models import EXAMPLES, MLP
from processes import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

import autoshard
from autoshard.errors import AutoshardError, BudgetError, ConstraintError, InputError, MeshError, PlanError, RuleError, TraceError

X = torch.randn(4, 8)


def fails(error: type[AutoshardError], text: str, call: Callable[[], Any]) -> None:
    """`call` raises `error` whose text holds every line of `text`."""
    with pytest.raises(error) as caught:
        call()
    for line in text.splitlines():
        assert line.strip() in str(caught.value), f"{line.strip()!r} is not in {str(caught.value)!r}"


# ---------------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        ("2,4", "cannot read mesh '2,4'; write it like 'dp=2,tp=4'"),
        ("dp=2,dp=2", "mesh axis names must differ, got ('dp', 'dp')"),
        ({"a b": 2}, "mesh axis 'a b' is not a name; use letters, digits and underscores, e.g. 'dp'"),
        ({"self": 2}, "mesh axis 'self' is a word that emitted programs use otherwise; choose another, e.g. 'dp'"),
        ({"dp": 0}, "mesh axis 'dp' has size 0; sizes start at 1"),
        (5, "a mesh is a DeviceMesh, a MeshSpec, a dict or a text like 'dp=2,tp=4', not int"),
    ],
)
def test_meshes(mesh: Any, text: str) -> None:
    fails(MeshError, text, lambda: autoshard.plan(MLP(), mesh, (X,)))


def test_compile_needs_a_device_mesh() -> None:
    text = "compile runs on a torch DeviceMesh (init_device_mesh), got str; autoshard.plan takes texts and dicts"
    fails(InputError, text, lambda: autoshard.compile(MLP(), "dp=2"))


# ------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("keywords", "rows", "text"),
    [
        (
            {"template": "ddp"},
            3,
            "template 'ddp' splits dim 0 of the arguments, of length 3, in 2 on axis dp, which does not divide; use a batch of 2 or 4",
        ),
        (
            {"template": "fsdp", "mesh": "dp=2,tp=2"},
            6,
            "of length 6, in 4 on axes dp, tp together, which does not divide; use a batch of 4 or 8",
        ),
        (
            {"inputs": "local"},
            5,
            "inputs='local' splits dim 0 of the arguments, of length 5, in 2 on axis dp, which does not divide; use a batch of 4 or 6",
        ),
        ({"template": "zero3"}, 4, "template='zero3' is not known; there are 'auto', 'ddp', 'fsdp', 'megatron', 'megatron_sp'"),
        ({"inputs": "mine"}, 4, "inputs='mine' is not known; there are 'global', 'local'"),
        ({"outputs": "some"}, 4, "outputs='some' is not known; there are 'whole', 'dtensor'"),
    ],
)
def test_calls(keywords: dict[str, Any], rows: int, text: str) -> None:
    mesh = keywords.get("mesh", "dp=2")
    rest = {key: value for key, value in keywords.items() if key != "mesh"}
    fails(InputError, text, lambda: autoshard.plan(MLP(), mesh, (torch.randn(rows, 8),), **rest))


def test_auto_keeps_an_indivisible_batch_whole() -> None:
    model, x = MLP().double(), torch.randn(3, 8, dtype=torch.float64)
    plan = autoshard.plan(model, "dp=2", (x,))
    assert autoshard.verify(model, plan, (x,)).is_equal


def test_what_is_no_model_and_no_tuple() -> None:
    fails(InputError, "a model is an nn.Module, not function", lambda: autoshard.plan(lambda x: x, "dp=2", (X,)))
    fails(
        InputError, "the example inputs are a tuple of arguments; write (x,) for a single tensor", lambda: autoshard.plan(MLP(), "dp=2", X)
    )


# ---------------------------------------------------------------------------------------------------------------- models


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


class Masked(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.nonzero()


class ToNumpy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.detach().numpy())


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 3


class Custom(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Tripled.apply(x)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        context_fn = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False, context_fn=context_fn)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Branch(), "cannot trace Branch: \ntest_errors.py:\nif x.sum() > 0:\nbranches on values of tensors\nuse torch.where"),
        (
            Masked(),
            "the shape of what aten.nonzero.default returns depends on the values of tensors\nreturn x.nonzero()\nuse a mask",
        ),
        (ToNumpy(), "cannot trace ToNumpy: .numpy() is not supported\ntest_errors.py:\nreturn torch.from_numpy(x.detach().numpy())"),
        (
            Custom(),
            "custom autograd.Function Tripled at \ntest_errors.py:\nlose its backward\ntorch.library.custom_op with register_autograd",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_models_that_cannot_be_traced(model: nn.Module, text: str) -> None:
    fails(TraceError, text, lambda: autoshard.plan(model, "dp=2", (X,)))


def test_selective_checkpointing_is_reported() -> None:
    (note,) = autoshard.plan(Checkpointed(), "dp=2", (X,)).notes
    assert re.fullmatch(
        r"checkpoint at \S+test_errors\.py:\d+ has its own context_fn, which is not looked at: the whole region is recomputed", note
    )


@torch.library.custom_op("autoshard_tests::odd", mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


odd.register_fake(torch.empty_like)
odd.register_autograd(
    lambda ctx, grad: grad * ctx.saved_tensors[0].cos(), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return odd(self.inner(x)) + odd(x)


def test_an_op_without_a_row_is_replicated_and_reported(tmp_path: Any) -> None:
    model, x = Odd().double(), X.double()
    plan = autoshard.plan(model, "dp=2", (x,), template="ddp")
    (note,) = plan.notes
    assert re.fullmatch(
        r"no rule for autoshard_tests\.odd\.default \(2 uses, first at test_errors\.py:\d+  return odd\(self\.inner\(x\)\) \+ odd\(x\)\): "
        r"computed whole on every rank, \d+\.\d+ ms a step predicted; autoshard\.register_rule adds one",
        note,
    )
    assert autoshard.verify(model, plan, (x,)).is_equal
    plan.save(tmp_path / "plan.json")
    text = "the plan calls autoshard_tests.odd.default, which plans may not; register a rule if it is an op of yours"
    fails(PlanError, text, lambda: autoshard.Plan.load(tmp_path / "plan.json"))


def test_rules_that_do_not_parse() -> None:
    fails(RuleError, "cannot read '(' in rule operand '('", lambda: autoshard.register_rule("autoshard_tests::odd", "b i -> ("))


# ----------------------------------------------------------------------------------------------------------- constraints


@pytest.mark.parametrize(
    ("constraints", "text"),
    [
        ({"nothing.*": "I"}, "constraint 'nothing.*': 'I' matches nothing; there are, for example, down, down.bias"),
        (
            {"up.weight": "I", "*.weight": "S(0)"},
            "up.weight of shape (16, 8) on mesh dp=2 cannot satisfy 'up.weight': 'I'; '*.weight': 'S(0)'.",
        ),
        ({"up.weight": "S(0) S(1)"}, "constraint 'up.weight': 'S(0) S(1)' asks two placements on axis 'dp'"),
        ({"up.weight": "S(0)@tp"}, "constraint 'up.weight': 'S(0)@tp' names axis 'tp'; the mesh has dp"),
        ({"up.weight": "Q"}, "constraint 'up.weight': 'Q': cannot read placement 'Q'; write R, I, P, S(0) or S(0:3x64)"),
        ({"up.weight": "P"}, "up.weight of shape (16, 8) on mesh dp=2 cannot satisfy 'up.weight': 'P'"),
    ],
)
def test_constraints(constraints: dict[str, str], text: str) -> None:
    fails(ConstraintError, text, lambda: autoshard.plan(MLP(), "dp=2", (X,), constraints=constraints))


def test_a_batch_that_a_constraint_cannot_split() -> None:
    text = "x of shape (3, 8) on mesh dp=2 cannot satisfy 'input:x': 'S(0)'. dim 0 has size 3\n2 or 4 would work"
    fails(ConstraintError, text, lambda: autoshard.plan(MLP(), "dp=2", (torch.randn(3, 8),), constraints={"input:x": "S(0)"}))


def test_a_budget_that_nothing_fits() -> None:
    text = "no plan on dp=2 fits: budget of 10 bytes, least reachable is \nuse more ranks on the axes that split, or a larger budget"
    fails(BudgetError, text, lambda: autoshard.plan(MLP(), "dp=2", (X,), memory_budget_bytes=10))


# ------------------------------------------------------------------------------------------------- plans for other models


def test_a_plan_for_another_model_or_call() -> None:
    plan = autoshard.plan(MLP(), "dp=2", (X,))
    text = "this plan was made for another MLP: up.weight is f32[16, 16] in the model, f32[16, 8] in the plan"
    fails(PlanError, text, lambda: autoshard.verify(MLP(16), plan, (X,)))
    fails(InputError, "x has shape (6, 8), the plan was made for (4, 8)", lambda: autoshard.simulate(plan, MLP(), (torch.randn(6, 8),)))
    fails(PlanError, "rank 2 is not on mesh dp=2, which has ranks 0 to 1", lambda: plan.source(2))


# ------------------------------------------------------------------------------------------------------- several processes


class FailsOnOneRank(MLP):
    def __init__(self, is_bad: bool) -> None:
        super().__init__()
        self.is_bad = is_bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_bad:
            raise ValueError("the disk is full")
        return super().forward(x)


def caught(call: Callable[[], Any]) -> str:
    try:
        call()
    except AutoshardError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors_on_ranks() -> dict[str, str]:
    """What each bad call says on this rank."""
    torch.manual_seed(0)
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))

    def compiled(model: nn.Module | None = None, seed: int = 0, **keywords: Any) -> nn.Module:
        torch.manual_seed(seed)
        return autoshard.compile(model or MLP(), mesh, **keywords)

    def different_modes() -> Any:
        model = compiled()
        return model.train(rank == 0)(X)

    meta = MLP().to("meta")
    found = {
        "names": caught(lambda: autoshard.compile(MLP(), DeviceMesh("cpu", [0, 1]))),
        "pp": caught(lambda: autoshard.compile(MLP(), init_device_mesh("cpu", (2,), mesh_dim_names=("pp",)))(torch.zeros(4, 8))),
        "part of the world": caught(lambda: autoshard.compile(MLP(), DeviceMesh("cpu", [1], mesh_dim_names=("dp",)))) if rank == 0 else "",
        "values": caught(lambda: compiled()(torch.full((4, 8), float(rank)))),
        "weights": caught(lambda: compiled(seed=rank)(torch.zeros(4, 8))),
        "shapes": caught(lambda: compiled()(torch.zeros(4 + 2 * rank, 8))),
        "modes": caught(different_modes),
        "models": caught(lambda: compiled(MLP(8) if rank == 0 else nn.Sequential(MLP()))(torch.zeros(4, 8))),
        "templates": caught(lambda: compiled(template="fsdp" if rank else "ddp")(torch.zeros(4, 8))),
        "one fails": caught(lambda: compiled(FailsOnOneRank(rank == 1))(torch.zeros(4, 8))),
        "partial": caught(lambda: compiled()(DTensor.from_local(torch.zeros(4, 8), mesh, [Partial()]))),
        "uneven": caught(lambda: compiled()(DTensor.from_local(torch.zeros(2 - rank, 8), mesh, [Shard(0)], shape=(3, 8), stride=(8, 1)))),
        "device": caught(lambda: compiled()(torch.zeros(4, 8, device="meta"))),
        "meta": caught(lambda: compiled(meta)(torch.zeros(4, 8))),
        "materialize": caught(lambda: compiled(meta).materialize({})),
        "no plan": caught(lambda: compiled().plan),
        "works after all that": caught(lambda: compiled()(torch.zeros(4, 8))),
    }
    return found | plan_errors(mesh) | state_dict_errors(mesh)


def plan_errors(mesh: DeviceMesh) -> dict[str, str]:
    model = MLP()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = autoshard.plan(model, "dp=2", (X,), template="fsdp")
    found = {
        "another mesh": caught(lambda: autoshard.plan(model, "dp=4", (X,)).apply(model, mesh)),
        "another model": caught(lambda: plan.apply(MLP(16), mesh)),
        "another architecture": caught(lambda: plan.apply(EXAMPLES["gpt"].model(), mesh)),
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return found


def state_dict_errors(mesh: DeviceMesh) -> dict[str, str]:
    compiled = autoshard.compile(MLP(), mesh, template="fsdp", example_inputs=(X,))
    state = {name: tensor.full_tensor() for name, tensor in compiled.state_dict().items()}
    other = {name: tensor + 1 for name, tensor in state.items()}
    found = {
        "shapes of a state dict": caught(lambda: compiled.load_state_dict({**other, "down.bias": torch.zeros(3)})),
        "names of a state dict": caught(lambda: compiled.load_state_dict({k: v for k, v in other.items() if k != "up.bias"} | {"more": X})),
    }
    assert all(torch.equal(tensor.full_tensor(), state[name]) for name, tensor in compiled.state_dict().items())
    return found


ON_BOTH = {
    "names": "MeshError: the mesh has no axis names; build it with init_device_mesh('cpu', (2,), mesh_dim_names=('dp', ...))",
    "pp": "PlanError: a pipeline needs the loss inside the model\nclass WithLoss(nn.Module)",
    "values": "InputError: ranks disagree on the values of arguments, stopped before the first step: ranks 0 have \n; ranks 1 have \n"
    "seed the data loader alike, or pass inputs='local' when each rank loads its own part",
    "weights": "InputError: ranks disagree on the values of parameters, stopped before the first step: ranks 0 have \n; ranks 1 have \n"
    "Build the model with the same seed, or load the same weights, on every rank before autoshard.compile.",
    "shapes": "InputError: ranks disagree on the shapes of arguments, stopped before the first step: "
    "ranks 0 have [(4, 8)]; ranks 1 have [(6, 8)].",
    "modes": "InputError: ranks disagree on the mode, stopped before the first step: "
    "ranks 0 have training; ranks 1 have evaluation. Call train()",
    "models": "InputError: ranks disagree on the program, stopped before the first step: "
    "rank 0 has `\n`; rank 1 has `\nSequential\nBuild the model,",
    "templates": "InputError: ranks disagree on the program, stopped before the first step: rank 0 has `\n`; rank 1 has `\nI@dp\nS(0)@dp",
    "partial": "InputError: a DTensor argument with placement P(sum) cannot enter the program; redistribute it to Shard or Replicate",
    "uneven": "InputError: a DTensor argument of shape (3, 8) is split unevenly on a mesh of (2,); every split dim must divide",
    "device": "InputError: an argument is on meta, the model on cpu; move it there first",
    "meta": "InputError: up.weight and 3 more are on the meta device; call materialize before the first step",
    "materialize": "PlanError: plan before materialize, so that each rank keeps its part only: pass example_inputs to autoshard.compile",
    "no plan": "PlanError: there is no plan before the first call; pass example_inputs to autoshard.compile to plan at once",
    "works after all that": "no error",
    "another mesh": "PlanError: this plan is for mesh dp=4, not dp=2; plan again for that mesh",
    "another model": "PlanError: this plan was made for another MLP: up.weight is f32[16, 16] in the model, f32[16, 8] in the plan",
    "another architecture": "PlanError: this plan was made for another MLP: up.weight [16, 8] is missing",
    "shapes of a state dict": "PlanError: cannot load this state dict, nothing was changed: down.bias is (3,), the model has (8,)",
    "names of a state dict": "PlanError: cannot load this state dict, nothing was changed: up.bias is missing; more is not in the model",
}


def test_several_processes_stop_together() -> None:
    first, second = run_on_ranks(2, errors_on_ranks)
    for name, text in ON_BOTH.items():
        for found in (first[name], second[name]):
            missing = [line for line in text.splitlines() if line.strip() not in found]
            assert not missing, f"{name}: {missing} not in {found!r}"
    assert first["part of the world"] == "MeshError: this process (rank 0) is not on the mesh dp=1, whose ranks are [1]"
    assert "stopped, because other ranks failed: rank 1: cannot trace FailsOnOneRank: the disk is full" in first["one fails"]
    assert "TraceError: cannot trace FailsOnOneRank: the disk is full" in second["one fails"]
