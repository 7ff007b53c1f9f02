"""Plans under a memory budget: they equal the single device, keep what they promise, and no cheaper one is missed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_on_ranks
from test_compiled_module import assert_same_gradients, run_checks
from test_search import traced
from test_solver import ilp
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import autoshard
from autoshard import runtime
from autoshard.budget import fit
from autoshard.budget_space import BudgetSpace, memory_of_plan
from autoshard.checker import check
from autoshard.conversions import BY_NAME
from autoshard.costs import CostModel
from autoshard.errors import BudgetError, PlacementError
from autoshard.hardware import Hardware
from autoshard.layers import find_layers
from autoshard.passes import AnnotateShardings, EmitPrograms, InsertCollectives, LocalizeShapes
from autoshard.program import Program, facts
from autoshard.regions import comes_from_parameter
from autoshard.runner import run_passes
from autoshard.search_space import SearchSpace
from autoshard.solver import Problem, memory_of, solve

RATES = {"flops_per_s": 989e12, "memory_bytes_per_s": 3.35e12, "link_bytes_per_s": 450e9, "collective_latency_s": 1e-8}
FAST = Hardware.uniform("fast", memory_bytes=80e9, kernel_latency_s=1e-8, **RATES)  # latency does not hide what small sizes cost


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Deep(nn.Module):
    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def rows(count: int = 16) -> Tensor:
    return torch.randn(count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def deep(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return Deep(layers).double()


def regions(plan: autoshard.Plan) -> set[int]:
    return {number for node in plan.program.nodes() if (number := facts(node).recompute) is not None}


def gathered_again(program: Program) -> list[fx.Node]:
    return [node for node in program.nodes("conversion") if BY_NAME[node.target.__name__].is_repeated]


def planned(share: float, mesh: str = "dp=2", template: str = "fsdp", layers: int = 3, count: int = 16) -> autoshard.Plan:
    """A plan of Deep within a share of what the fastest one keeps."""
    free = autoshard.plan(deep(layers), mesh, (rows(count),), hardware=FAST, template=template)
    budget = share * free.stats["kept_bytes"]
    plan = autoshard.plan(deep(layers), mesh, (rows(count),), hardware=FAST, template=template, memory_budget_bytes=budget)
    assert plan.stats["kept_bytes"] <= budget
    assert plan.stats["objective_s"] >= plan.stats["bound_s"] >= free.stats["objective_s"] * (1 - 1e-9)
    assert plan.stats["gap"] == pytest.approx(plan.stats["objective_s"] / plan.stats["bound_s"] - 1)
    return plan


# ----------------------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize(("mesh", "template", "share"), [("dp=2", "fsdp", 0.9), ("dp=2,tp=2", "fsdp", 0.75), ("dp=2,tp=2", "auto", 0.4)])
def test_plans_under_a_budget_equal_the_single_device(mesh: str, template: str, share: float) -> None:
    plan = planned(share, mesh, template)
    assert autoshard.verify(deep(), plan, (rows(),)).is_equal
    if template == "fsdp":
        assert gathered_again(plan.program)
        assert "@gathers_again" in plan.source()


def test_layers_run_again_when_activations_are_most() -> None:
    plan = planned(0.7, count=256, template="ddp", layers=4)
    assert regions(plan)
    assert len(regions(plan)) < 4  # no more than needed
    assert autoshard.verify(deep(4), plan, (rows(256),)).is_equal


def test_plan_files_keep_what_is_gathered_and_run_again(tmp_path: Any) -> None:
    for plan in (planned(0.9), planned(0.7, count=256, template="ddp", layers=4)):
        plan.save(tmp_path / "plan.json")
        assert autoshard.Plan.load(tmp_path / "plan.json").source() == plan.source()


def test_without_need_nothing_changes() -> None:
    free = autoshard.plan(deep(), "dp=2", (rows(),), hardware=FAST, template="fsdp")
    plan = autoshard.plan(deep(), "dp=2", (rows(),), hardware=FAST, template="fsdp", memory_budget_bytes=free.stats["kept_bytes"])
    assert plan.source() == free.source()
    assert not gathered_again(plan.program)
    assert free.stats["gap"] == 0.0


def test_a_budget_below_every_plan_says_the_smallest() -> None:
    with pytest.raises(BudgetError, match=r"least reachable is [\d,]+ bytes \(.* of parameters, gradients") as refused:
        autoshard.plan(deep(), "dp=2", (rows(),), hardware=FAST, memory_budget_bytes=1000)
    least = int(str(refused.value).split("least reachable is ")[1].split(" bytes")[0].replace(",", ""))
    plan = autoshard.plan(deep(), "dp=2", (rows(),), hardware=FAST, memory_budget_bytes=least + 1)
    assert plan.stats["kept_bytes"] <= least + 1


def test_a_plan_that_exceeds_the_device_is_said() -> None:
    small = Hardware.uniform("small", memory_bytes=10_000.0, kernel_latency_s=1e-8, **RATES)
    plan = autoshard.plan(deep(), "dp=2", (rows(),), hardware=small)
    assert any("memory_budget_bytes=9e+03 searches for a plan that fits" in note for note in plan.notes)
    assert not any("memory_budget_bytes" in note for note in autoshard.plan(deep(), "dp=2", (rows(),), hardware=FAST).notes)


def test_layers_are_blocks_not_their_parts() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(nn.Sequential(Block(8), Block(8)) for _ in range(2))
            self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = stage(x)
            return self.head(self.head(x)).sum()

    found = find_layers(traced(Stages(), (torch.zeros(4, 8),), "dp=2"))
    assert [layer.path for layer in found] == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]


# ----------------------------------------------------------------------------------------------------------------- oracles


def spaces(mesh: str, layers: int, count: int) -> tuple[SearchSpace, BudgetSpace, Problem, float]:
    """The plain search, the one under a budget, and the bytes of the plain optimum."""
    program = traced(deep(layers), (rows(count),), mesh)
    space = SearchSpace(program, CostModel(program.mesh, FAST), {})
    problem, order = space.problem()
    plain = memory_of_plan(space, dict(zip(order, solve(problem).choices, strict=True)))
    wider = BudgetSpace(space)
    return space, wider, wider.problem(), plain


def test_without_a_price_on_bytes_both_searches_agree() -> None:
    space, _, problem, plain = spaces("dp=2", 2, 64)
    free = solve(problem, 1e15)
    assert free.objective_s == pytest.approx(solve(space.problem()[0]).objective_s, rel=1e-12)
    assert free.memory_bytes == pytest.approx(plain)


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_equals_the_ilp(share: float) -> None:
    _, _, problem, plain = spaces("dp=2", 1, 64)
    problem = replace(problem, costs=tuple(1e6 * c for c in problem.costs), pairs={scope: 1e6 * t for scope, t in problem.pairs.items()})
    budget = share * plain
    solution, least = solve(problem, budget), ilp(problem, budget)  # in microseconds, which HiGHS's tolerances fit
    assert memory_of(problem, solution.choices) <= budget
    assert solution.bound_s <= least * (1 + 1e-6)
    assert least <= solution.objective_s * (1 + 1e-6)
    assert solution.objective_s <= least * 1.05
    assert solution == solve(problem, budget)


def test_every_choice_of_bytes_costs_time() -> None:
    """Gathering or running again is never free: the fastest plan does neither."""
    _, wider, problem, _ = spaces("dp=2", 2, 64)
    choices = solve(problem).choices
    assert not any(choices[wider.order.index(layer)] for layer in wider.layers)
    numbers = {wider.order.index(layer) for layer in wider.layers}
    decided = [(table, dim) for scope, table in problem.pairs.items() for dim, v in enumerate(scope) if v in numbers]
    assert decided
    for table, dim in decided:
        once, twice = table.take(0, axis=dim), table.take(1, axis=dim)
        assert (twice >= once - 1e-15)[np.isfinite(once)].all()


def test_room_is_left_for_what_a_layer_holds_while_it_runs_again() -> None:
    program = traced(deep(4), (rows(256),), "dp=2")
    space = SearchSpace(program, CostModel(program.mesh, FAST), {})
    problem, order = space.problem()
    plain = memory_of_plan(space, dict(zip(order, solve(problem).choices, strict=True)))
    fitted = fit(space, 0.6 * plain)
    inside = fitted.space.running_again(fitted.space.problem(), fitted.solution.choices)
    assert fitted.kept_bytes == pytest.approx(fitted.solution.memory_bytes + inside + fitted.space.fixed_bytes())
    assert fitted.kept_bytes <= 0.6 * plain


# ----------------------------------------------------------------------------------- gathering again, by hand and by rule


class Sharing(nn.Module):
    """One weight read by several ops: as it is, transposed, reshaped, cast, and by an op that does not keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.table = nn.Parameter(torch.randn(8, 8)), nn.Embedding(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = (x @ self.w).tanh() @ self.w.t()
        z = F.linear(y, self.w.reshape(4, 16).view(8, 8)) * self.w.to(torch.float32).double().sum()
        return F.linear(z, self.table.weight).logsumexp(-1).mean()


def finished(program: Program, is_again: bool = True, template: Any = "fsdp") -> Program:
    """Every weight gathered again."""
    program = run_passes((AnnotateShardings(FAST, template=template),), program)
    for node in program.nodes("parameter"):
        facts(node).gathers_again = is_again
    return run_passes((InsertCollectives(FAST), LocalizeShapes(), EmitPrograms("Sharing")), program)


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2"])
def test_shared_weights_have_exact_gradients(mesh: str) -> None:
    torch.manual_seed(0)
    model, ids = Sharing().double(), torch.randint(8, (4, 6))
    program = finished(traced(model, (ids,), mesh))
    assert gathered_again(program)
    plan = autoshard.Plan(program, FAST, "Sharing")
    assert autoshard.verify(model, plan, (ids,)).is_equal


def test_the_checker_refuses_what_cannot_be_gathered_again() -> None:
    program = traced(deep(), (rows(),), "dp=2")
    program = finished(program, is_again=False)
    check(program)
    gather = next(node for node in program.nodes("conversion") if node.target is runtime.all_gather)
    gather.target = runtime.all_gather_again
    check(program)
    facts(gather).recompute = 1
    with pytest.raises(PlacementError, match="stands in region 1, which runs again by itself"):
        check(program)
    annotate = AnnotateShardings(FAST, template="ddp", constraints={"output:layers.0": "S(0)", "output:layers.1": "I"})
    program = run_passes((annotate, InsertCollectives(FAST), LocalizeShapes()), traced(deep(), (rows(),), "dp=2"))
    gathers = [node for node in program.nodes("conversion") if node.target.__name__.startswith("all_gather")]
    activation = next(node for node in gathers if not comes_from_parameter(node))
    activation.target = getattr(runtime, f"{activation.target.__name__}_again")
    with pytest.raises(PlacementError, match="_again gathers what is no parameter"):
        check(program)


# ---------------------------------------------------------------------------------------------------------- real processes


@contextlib.contextmanager
def counted(sizes: dict[int, int]) -> Iterator[None]:
    """Collect the memories that autograd keeps through hooks, by address; a shard in place of a weight is kept anyway."""
    original = torch.autograd.graph.saved_tensors_hooks

    def see(x: Any) -> Any:
        if isinstance(x, Tensor):
            sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    class Seeing(original):  # type: ignore[misc,valid-type]
        def __init__(self, pack: Any, unpack: Any) -> None:
            super().__init__(lambda x: see(pack(x)), unpack)

    torch.autograd.graph.saved_tensors_hooks = Seeing
    try:
        with original(see, lambda x: x):
            yield
    finally:
        torch.autograd.graph.saved_tensors_hooks = original


def kept_and_trained(mesh: DeviceMesh, budget: float | None, count: int, template: Any) -> tuple[float, nn.Module]:
    """Bytes kept by the emitted program for one step, without parameters, and the module with its gradients."""
    module = autoshard.compile(deep(4), mesh, template=template, hardware=FAST, example_inputs=(rows(count),), memory_budget_bytes=budget)
    sizes: dict[int, int] = {}
    with counted(sizes):
        loss = module(rows(count))
    for parameter in module.parameters():
        sizes.pop(parameter.to_local().untyped_storage()._cdata, None)
    loss.backward()
    return float(sum(sizes.values())), module


def less_is_kept_and_gradients_are_equal(mesh: DeviceMesh) -> None:
    for count, template, share in ((4, "fsdp", 0.94), (256, "ddp", 0.7)):
        model = deep(4)
        model(rows(count)).backward()
        free, module = kept_and_trained(mesh, None, count, template)
        budget = share * module.plan.stats["kept_bytes"]
        tight, small = kept_and_trained(mesh, budget, count, template)
        assert_same_gradients(module, model)
        assert_same_gradients(small, model)
        predicted = module.plan.stats["kept_bytes"] - small.plan.stats["kept_bytes"]
        assert free - tight > 0.8 * predicted > 0, (free, tight, predicted)
        assert bool(gathered_again(small.plan.program)) == (template == "fsdp")
        assert template == "fsdp" or regions(small.plan)


def gathering(mesh: DeviceMesh) -> nn.Module:
    """One layer, compiled, whose weights are gathered again."""
    given = {"template": "fsdp", "hardware": FAST, "example_inputs": (rows(4),)}
    free = autoshard.compile(deep(1), mesh, **given).plan.stats["kept_bytes"]
    module = autoshard.compile(deep(1), mesh, **given, memory_budget_bytes=0.94 * free)
    assert gathered_again(module.plan.program)
    return module


def a_weight_that_changed_before_backward_is_refused(mesh: DeviceMesh) -> None:
    module = gathering(mesh)
    loss = module(rows(4))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def it_runs_under_torch_compile(mesh: DeviceMesh) -> None:
    module, model = gathering(mesh), deep(1)
    torch.compile(module, backend="aot_eager")(rows(4)).backward()
    model(rows(4)).backward()
    assert_same_gradients(module, model)


def test_two_ranks() -> None:
    checks = [less_is_kept_and_gradients_are_equal, a_weight_that_changed_before_backward_is_refused, it_runs_under_torch_compile]
    run_on_ranks(2, run_checks, checks, (2,), ("dp",))
