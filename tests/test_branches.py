"""torch.cond: both branches planned, one of them run, gradients those of the single device."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_on_ranks
from test_compiled_module import assert_same_gradients, run_checks
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import autoshard
from autoshard import runtime
from autoshard.branches import is_either
from autoshard.checker import check
from autoshard.errors import PlacementError, PlanError, TraceError
from autoshard.plan_file import digest
from autoshard.program import facts

# torch.cond of the eager model is compiled by torch, which reads .grad of what is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
WIDTH = 8
Branch = Callable[[nn.Module, Tensor], Any]


class Gate(nn.Module):
    """`a` before, one of two branches, `d` behind; the branches may use `b` and `c`."""

    def __init__(self, yes: Branch, no: Branch, around: Callable = lambda function, x: function(x)) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.register_buffer("shift", torch.ones(WIDTH))
        self.yes, self.no, self.around = yes, no, around

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        hidden = self.a(x)

        def cond(hidden: Tensor) -> Any:
            return torch.cond(x.sum() > 0, lambda x: self.yes(self, x), lambda x: self.no(self, x), (hidden,))

        found = self.around(cond, hidden)
        first = pytree.tree_leaves(found)[0]
        return (self.d(first).square().mean() if first.is_floating_point() else hidden.mean()), found


def mlp(m: nn.Module, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.up(x)))


def inner(m: nn.Module, x: Tensor) -> Tensor:
    """A cond in a branch of another, which itself runs both ways."""
    return m.b(torch.cond(x[0, 0] > 0, lambda x: x.sin() + m.c(x), lambda x: mlp(m, x), (x,)))


def written(m: nn.Module, x: Tensor) -> Tensor:
    y = m.b(x).clone()
    y.add_(m.shift)
    y[0] = 3
    return y


def quiet(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.b(x)
    return x * y + m.c(x)


def recomputed(function: Callable, x: Tensor) -> Any:
    return checkpoint(function, x, use_reentrant=False)


CASES: dict[str, tuple] = {
    "layers": (mlp, lambda m, x: m.b(x).relu()),
    "nested": (inner, lambda m, x: m.c(x)),
    "several": (lambda m, x: {"y": m.b(x), "z": (x.mean(), 3)}, lambda m, x: {"y": x * 2, "z": (m.c(x).sum(), 3)}),
    "detached": (lambda m, x: (m.b(x.detach()), m.c(x)), lambda m, x: (x.detach() * 2, x + 1)),
    "in place": (written, mlp),
    "no gradient": (quiet, lambda m, x: m.b(x)),
    "recomputed": (mlp, lambda m, x: m.c(x), recomputed),
    "recomputed within": (lambda m, x: recomputed(lambda y: mlp(m, y), x.sin()), lambda m, x: m.b(x)),
    "shared": (lambda m, x: F.layer_norm(m.b(x) * m.shift, (WIDTH,)), lambda m, x: torch.ones_like(x)),
}
EAGER_CANNOT = ("recomputed within", "several")  # torch.cond itself: no checkpoint inside, no backward of what returns numbers


def gate(name: str) -> Gate:
    torch.manual_seed(0)
    return Gate(*CASES[name]).double()


def rows(sign: int) -> Tensor:
    x = torch.randn(8, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return sign * x.sum().sign() * x


def python_cond(predicate: Tensor, yes: Callable, no: Callable, operands: tuple) -> Any:
    return (yes if predicate else no)(*operands)


class Expected:
    """Results and gradients of the eager model, once per branch."""

    def __init__(self, name: str) -> None:
        self.model, self.found = gate(name), {}
        for sign in (1, -1):
            eager, x = gate(name), rows(sign).requires_grad_()
            original = torch.cond
            torch.cond = python_cond if name in EAGER_CANNOT else original
            try:
                outputs = [leaf for leaf in pytree.tree_leaves(eager(x)) if isinstance(leaf, Tensor)]
            finally:
                torch.cond = original
            cotangents = [torch.randn_like(y) if y.requires_grad else None for y in outputs]
            torch.autograd.backward([y for y in outputs if y.requires_grad], [g for g in cotangents if g is not None])
            grads = {key: p.grad for key, p in eager.named_parameters()}
            self.found[sign] = (x, outputs, cotangents, grads, name not in EAGER_CANNOT)

    def compare(self, plan: autoshard.Plan) -> None:
        for sign, (x, outputs, cotangents, grads, is_exact) in self.found.items():
            simulation = autoshard.simulate(plan, copy.deepcopy(self.model), (x.detach().requires_grad_(),))
            found = [y for y in simulation.outputs if hasattr(y, "values")]
            simulation.backward([g if y.values[0].requires_grad else None for g, y in zip(cotangents, found, strict=True)])
            for wanted, ranks in zip(outputs, found, strict=True):
                for value in ranks.values:
                    torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11)
            for key, wanted in grads.items():
                gradient = simulation.gradient(key)
                if is_exact:
                    assert (gradient is None) == (wanted is None), (key, sign)
                zeros = torch.zeros_like(dict(self.model.named_parameters())[key])
                pair = [zeros if grad is None else grad for grad in (gradient, wanted)]
                torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_both_branches_compute_what_eager_computes(name: str) -> None:
    expected = Expected(name)
    kinds: list[tuple[str, dict]] = [("a=2", {"template": "fsdp"}), ("dp=2,tp=2", {"template": "megatron_sp"})]
    kinds += [("a=2,b=2", {"options": autoshard.Options(seed=seed)}) for seed in range(1)]
    for mesh, keywords in kinds:
        plan = autoshard.plan(expected.model, mesh, (rows(1).requires_grad_(),), **keywords)
        expected.compare(plan)


def test_splits_differ_between_the_branches_and_stay_in_them() -> None:
    """Megatron's column and row splits in one branch; what a branch sends stands in that branch."""
    plan = autoshard.plan(gate("layers"), "tp=2", (rows(1),), template="megatron")
    placed = {facts(node).name: str(facts(node).layout[0]) for node in plan.program.nodes("parameter")}
    assert (placed["up.weight"], placed["down.weight"]) == ("S(0)", "S(1)")
    plan = autoshard.plan(gate("layers"), "dp=2", (rows(1),), template="fsdp")
    gathers = {node.name: facts(node).branch for node in plan.program.nodes("conversion") if "weight" in node.name}
    assert {path for name, path in gathers.items() if name.startswith(("up", "down"))} <= {((1, True),)}
    assert plan.source().count("if self.decide(") == 1


def test_the_other_branch_is_not_run() -> None:
    """Its NaN would poison gradients if it ran; and its dropout would draw."""
    bad = (lambda m, x: ((x - x) / (x - x)).sqrt() + m.b(x), lambda m, x: m.c(x))
    torch.manual_seed(0)
    model = Gate(*bad).double()
    plan = autoshard.plan(model, "a=2", (rows(1),), template="fsdp")
    simulation = autoshard.simulate(plan, model, (rows(-1),))
    simulation.backward()
    assert not any("sqrt" in name for name in simulation.values)
    for key, parameter in model.named_parameters():
        gradient = simulation.gradient(key)
        assert (gradient is None) == key.startswith(("up", "down")), "what no branch reads"
        assert gradient is None or bool(gradient.isfinite().all())
        assert gradient is None or gradient.shape == parameter.shape
    assert not simulation.gradient("b.weight").any()
    assert simulation.gradient("c.weight").any()
    simulation = autoshard.simulate(plan, model, (rows(1),))
    assert simulation.outputs[0].values[0].isnan()


def test_dropout_in_a_branch() -> None:
    torch.manual_seed(0)
    model = Gate(lambda m, x: F.dropout(m.b(x), 0.5, m.training), lambda m, x: m.c(x)).double()
    for template in ("ddp", "megatron"):
        plan = autoshard.plan(model, "a=2", (rows(1),), template=template)
        for sign in (1, -1):
            assert autoshard.verify(model, plan, (rows(sign),)).is_equal
    simulation = autoshard.simulate(plan, model, (rows(1),))
    assert (simulation.whole(next(node.name for node in plan.program.nodes("op") if "dropout" in node.name)) == 0).any()


def test_autocast_in_a_branch() -> None:
    def half(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mlp(m, x).float()

    torch.manual_seed(0)
    model = Gate(half, lambda m, x: m.b(x))
    for template in ("ddp", "fsdp"):
        plan = autoshard.plan(model, "a=2", (rows(1).float(),), template=template)
        states = {node.name: facts(node).autocast for node in plan.program.nodes("op")}
        assert states["up_linear"]
        assert not states["b_linear"]
        assert not states["cond"]
        assert all(autoshard.verify(model, plan, (rows(sign).float(),)).is_equal for sign in (1, -1))


def test_sizes_that_change() -> None:
    model = gate("layers")
    plan = autoshard.plan(model, "dp=2,tp=2", (rows(1),), template="megatron", dynamic={"x": {0: "batch"}})
    for x in (rows(1), rows(-1)[:6], torch.cat([rows(1), rows(1)])):
        assert autoshard.verify(model, plan, (x,)).is_equal
    by_size = Gate(mlp, lambda m, x: m.b(x)).double()
    by_size.forward = lambda x: torch.cond(x.shape[0] > 1, lambda x: mlp(by_size, x), lambda x: by_size.b(x), (x,))
    assert not any(map(is_either, autoshard.plan(by_size, "dp=2", (rows(1),)).program.graph.nodes))


def test_numbers_that_depend_on_sizes() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            count = x.shape[0]
            return x * (count // 2) - x * torch.sym_ite(count % 4 == 0, count // 4, count) + torch.sym_sqrt(count)

    plan = autoshard.plan(Scaled(), "dp=2", (rows(1),), template="ddp", dynamic={"x": {0: "batch"}})
    for text in ("x_slice_varying * (batch // 2)", "* ((batch // 4) if (batch % 4) == 0 else batch)", "+ (batch**0.5)"):
        assert text in plan.source()
    assert all(autoshard.verify(Scaled(), plan, (rows(1)[:size],)).is_equal for size in (8, 6, 2))


@pytest.mark.parametrize(
    ("yes", "no", "text"),
    [
        (lambda m, x: x.add_(1) * 2, mlp, "add_.Tensor at .*test_branches.py.* changes, in a branch of torch.cond, a tensor from outside"),
        (lambda m, x: m.shift.mul_(2) + x, mlp, "changes, in a branch of torch.cond, a tensor from outside; let the branch return"),
        (lambda m, x: F.batch_norm(x, m.shift, m.shift + 1, training=True), mlp, "writes its running statistics in a branch"),
        (lambda m, x: x[:2], mlp, r"torch.cond at .*test_branches.py:\d+ return torch.float64 of shape \[2, 8\] and .* \[8, 8\]"),
        (lambda m, x: (x + 1, 3), lambda m, x: (x, 4), "return 3 and 4; return tensors where they differ"),
        (lambda m, x: (x + 1,), lambda m, x: x * 2, "return different structures"),
        (lambda m, x: Scaled.apply(x), mlp, "custom autograd.Function Scaled"),
    ],
)
def test_branches_that_cannot_be_kept_are_refused(yes: Branch, no: Branch, text: str) -> None:
    with pytest.raises(TraceError, match=text):
        autoshard.plan(Gate(yes, no).double(), "dp=2", (rows(1),))


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


# ------------------------------------------------------------------------------------------------ checking and plan files


def finished(name: str = "layers", template: str = "fsdp") -> autoshard.Plan:
    return autoshard.plan(gate(name), "dp=2", (rows(1),), template=template)


def result(plan: autoshard.Plan) -> fx.Node:
    return next(node for node in plan.program.graph.nodes if is_either(node))


def leave_out_the_tie(node: fx.Node) -> None:
    node.update_arg(1, node.args[1].args[0])


def swap_the_predicate(node: fx.Node) -> None:
    other = next(n for n in node.graph.nodes if n.op == "call_function")
    node.update_arg(0, other)


def take_a_node_out(node: fx.Node) -> None:
    facts(next(n for n in node.graph.nodes if facts(n).branch and facts(n).role == "op")).branch = ()


def put_a_node_in(node: fx.Node) -> None:
    facts(next(n for n in node.graph.nodes if n.name == "a_linear")).branch = ((1, True),)


def read_the_other_branch(node: fx.Node) -> None:
    node.update_arg(1, node.args[2])


def make_it_constant(node: fx.Node) -> None:
    facts(next(n for n in node.graph.nodes if facts(n).branch)).is_constant = True


def invent_a_cond(node: fx.Node) -> None:
    facts(next(n for n in node.graph.nodes if facts(n).branch)).branch = ((7, True),)


MUTATIONS = {
    leave_out_the_tie: "its first branch gives no gradient to",
    swap_the_predicate: "no strategy of|does not fit|is no result",
    take_a_node_out: "stands between the nodes of a branch|is read outside",
    put_a_node_in: "is read outside of the branch that makes it",
    read_the_other_branch: "is read outside of the branch that makes it|gives no gradient",
    make_it_constant: "is called constant",
    invent_a_cond: "stands in cond 7, which has no result",
}


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_the_checker_sees_what_is_wrong_with_branches(mutate: Callable) -> None:
    plan = finished()
    check(plan.program)
    mutate(result(plan))
    with pytest.raises(PlacementError, match=MUTATIONS[mutate]):
        check(plan.program)


@pytest.mark.parametrize("name", ["layers", "nested", "several", "recomputed", "recomputed within"])
def test_plan_files_keep_branches(tmp_path: Any, name: str) -> None:
    plan = finished(name)
    plan.save(tmp_path / "plan.json")
    assert autoshard.Plan.load(tmp_path / "plan.json").source() == plan.source()


def _first(body: dict, target: str) -> dict:
    return next(entry for entry in body["program"]["nodes"] if entry["target"] == target)


def _call_a_name(body: dict) -> None:
    _first(body, "runtime:either")["args"]["tuple"][3] = "exit()"


def _spell_a_branch(body: dict) -> None:
    next(entry for entry in body["program"]["nodes"] if entry["facts"]["branch"])["facts"]["branch"] = [["exit()", True]]


def _tie_with_another_function(body: dict) -> None:
    _first(body, "runtime:zero_gradients")["target"] = "runtime:decide"


def _tie_too_much(body: dict) -> None:
    _first(body, "runtime:zero_gradients")["args"]["tuple"].append("self.tensor")


def _forget_the_number(body: dict) -> None:
    _first(body, "runtime:either")["args"]["tuple"].pop()


def _stand_elsewhere(body: dict) -> None:
    [entry for entry in body["program"]["nodes"] if entry["facts"]["branch"]][-1]["facts"]["branch"] = []


@pytest.mark.parametrize(
    "alter", [_call_a_name, _spell_a_branch, _tie_with_another_function, _tie_too_much, _forget_the_number, _stand_elsewhere]
)
def test_altered_plan_files_are_refused(tmp_path: Any, alter: Callable) -> None:
    path = tmp_path / "plan.json"
    finished().save(path)
    body = json.loads(path.read_text())
    body.pop("sha256")
    alter(body)
    path.write_text(json.dumps({"sha256": digest(body), **body}))
    with pytest.raises((PlanError, PlacementError)):
        autoshard.Plan.load(path)


def test_gradients_of_zero() -> None:
    value, other = torch.randn(3, requires_grad=True), torch.full((2,), float("nan"), requires_grad=True)
    runtime.zero_gradients(value, other).sum().backward()
    assert value.grad.tolist() == [1.0, 1.0, 1.0]
    assert other.grad.tolist() == [0.0, 0.0]


# --------------------------------------------------------------------------------------------------------- real processes


def both_branches_train(mesh: DeviceMesh) -> None:
    reference = gate("nested")
    models = [autoshard.compile(copy.deepcopy(reference), mesh, template=template) for template in ("fsdp", "megatron")]
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2) for model in (reference, *models)]
    for sign in (1, -1, 1):
        for model, optimizer in zip((reference, *models), optimizers, strict=True):
            optimizer.zero_grad()
            model(rows(sign))[0].backward()
            optimizer.step()
        for compiled in models:
            assert_same_gradients(compiled, reference)
            for mine, theirs in zip(compiled.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(mine.full_tensor(), theirs.detach(), rtol=1e-9, atol=1e-11)


def ranks_that_see_different_predicates_take_the_same_branch(mesh: DeviceMesh) -> None:
    axis = runtime.Axis("dp", 2, mesh.get_rank(), mesh.get_group("dp").group_name)
    program = runtime.Program([axis], lambda name: torch.empty(0), torch.device("cpu"))
    assert program.decide(torch.tensor(mesh.get_rank() == 1))
    assert not program.decide(torch.tensor(False))


def the_program_runs_under_torch_compile(mesh: DeviceMesh) -> None:
    compiled = autoshard.compile(gate("layers"), mesh, template="fsdp", example_inputs=(rows(1),))
    fast = torch.compile(autoshard.compile(gate("layers"), mesh, template="fsdp", example_inputs=(rows(1),)), backend="aot_eager")
    for sign in (1, -1):
        losses = [model(rows(sign))[0] for model in (compiled, fast)]
        torch.testing.assert_close(*losses)
        [loss.backward() for loss in losses]
    assert_same_gradients(compiled, fast._orig_mod)


def test_two_ranks() -> None:
    checks = [both_branches_train, ranks_that_see_different_predicates_take_the_same_branch, the_program_runs_under_torch_compile]
    run_on_ranks(2, run_checks, checks, (2,), ("dp",))
