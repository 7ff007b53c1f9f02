"""The search as a whole: optimal against an ILP, never worse than a template, budgets kept, sharing charged once."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from test_solver import ilp
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import autoshard
from autoshard.candidates import bound_rule
from autoshard.constraints import template_constraints
from autoshard.conversion_table import ConversionTable
from autoshard.costs import CostModel
from autoshard.hardware import hardware_of
from autoshard.mesh import MeshSpec
from autoshard.ops.row import TensorInfo
from autoshard.passes import FoldConstants, NormalizeGraph, TraceModel
from autoshard.passes.fold_constants import evaluate
from autoshard.placements import I, Layout, P, R, S, local_shape
from autoshard.program import Program, arguments, call_of, facts, op_name
from autoshard.search_space import SearchSpace
from autoshard.solver import solve

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import gpt

IDS = torch.zeros(8, 16, dtype=torch.long)
TEMPLATES = ("ddp", "fsdp", "megatron", "megatron_sp")


def traced(model: nn.Module, args: tuple, mesh: str) -> Program:
    program = Program(fx.Graph(), MeshSpec.of(mesh))
    for a_pass in (TraceModel(model, args), NormalizeGraph(), FoldConstants()):
        program = a_pass(program)
    return program


class Mixer(nn.Module):
    """Two projections of one value, a residual and a reduction: small enough for an ILP."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(8, 16, bias=False), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.c(F.gelu(self.a(x)) * self.b(x))).square().mean()


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=2"])
def test_optimum_equals_ilp(mesh: str) -> None:
    program = traced(Mixer(), (torch.zeros(4, 8),), mesh)
    problem, _ = SearchSpace(program, CostModel(program.mesh, hardware_of("h100")), {}).problem()
    assert solve(problem).objective_s == pytest.approx(ilp(problem), rel=1e-6)


@pytest.mark.parametrize("mesh", ["dp=4", "dp=2,tp=2", "dp=2,tp=4"])
@pytest.mark.parametrize("hardware", ["cpu", "h100"])
def test_auto_is_never_worse_than_a_template(mesh: str, hardware: str) -> None:
    model = gpt.GPT(gpt.SMALL)
    best = autoshard.plan(model, mesh, (IDS, IDS), hardware=hardware).stats["objective_s"]
    for template in TEMPLATES:
        assert best <= autoshard.plan(model, mesh, (IDS, IDS), hardware=hardware, template=template).stats["objective_s"] * (1 + 1e-9)


def test_three_axes_jointly() -> None:
    model = Mixer().double()
    x = torch.randn(4, 8, dtype=torch.float64)
    plan = autoshard.plan(model, "a=2,b=2,c=2", (x,), hardware="h100")
    assert plan.stats["objective_s"] == plan.stats["bound_s"]
    assert autoshard.verify(model, plan, (x,)).is_equal


def test_budget_is_kept_and_the_gap_reported() -> None:
    model = gpt.GPT(gpt.SMALL)
    free = autoshard.plan(model, "dp=2,tp=2", (IDS, IDS), hardware="h100")
    budget = 0.5 * free.stats["kept_bytes"]
    tight = autoshard.plan(model, "dp=2,tp=2", (IDS, IDS), hardware="h100", memory_budget_bytes=budget)
    assert tight.stats["kept_bytes"] <= budget
    assert free.stats["objective_s"] <= tight.stats["bound_s"] * (1 + 1e-9) <= tight.stats["objective_s"] * (1 + 2e-9)
    with pytest.raises(autoshard.AutoshardError, match="least reachable is"):
        autoshard.plan(model, "dp=2,tp=2", (IDS, IDS), hardware="h100", memory_budget_bytes=1000)


def test_shared_conversion_is_inserted_once() -> None:
    """Query, key and value projections read one value: their gradients are summed before one all-reduce."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q, self.k, self.v, self.o = nn.LayerNorm(32), *(nn.Linear(32, 32, bias=False) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            q, k, v = (f(h).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = nn.Sequential(nn.Linear(32, 32), Attention())
    pins = {
        "*.q.weight": "S(0)@tp",
        "*.k.weight": "S(0)@tp",
        "*.v.weight": "S(0)@tp",
        "*.o.weight": "S(1)@tp",
        "0.weight": "I",
        "1.norm.*": "I",
    }
    plan = autoshard.plan(
        model, "tp=2", (torch.zeros(2, 8, 32),), hardware="h100", constraints={**pins, "output:0": "I@tp", "output:1": "I@tp"}
    )
    conversions = [op_name(node) for node in plan.program.nodes("conversion")]
    assert len([name for name in conversions if name == "all_reduce_invariant"]) == 1
    assert conversions.count("vary") == 1


def test_causal_mask_becomes_a_flag() -> None:
    class Masked(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            mask = torch.arange(8).unsqueeze(1) >= torch.arange(8)
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask[None, None].expand(2, 1, 8, 8))

    program = traced(Masked(), (torch.zeros(2, 2, 8, 4),), "tp=2")
    (attention,) = (node for node in program.nodes("op") if "attention" in op_name(node))
    assert "True" in attention.format_node()
    assert not any(facts(node).is_constant for node in program.nodes())


class HeldMask(nn.Module):
    """Attention of six layers under one mask, made as Hugging Face's models make theirs."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        batch, _, length, _ = q.shape
        at = torch.arange(length).add(0)
        rows = (at.unsqueeze(0).expand(batch, -1).diff(dim=-1, prepend=at[:1].sub(1).expand(batch, 1)) != 1).cumsum(-1)
        of, i, j = torch.arange(batch)[:, None, None, None], at[None, None, :, None], at[None, None, None, :]
        mask = torch.ones((), dtype=torch.bool) & (rows[of, i] == rows[of, j]) & (j <= i + self.ahead)
        for _ in range(6):
            q = F.scaled_dot_product_attention(q, q, q, attn_mask=mask.expand(batch, -1, length, length))
        return q


@pytest.mark.parametrize("ahead", [0, 1])
def test_masks_of_any_batch_are_recognised_and_only_triangles(ahead: int) -> None:
    """4,096 sequences of 512: the whole mask has 2**30 entries, and is the same for every sequence."""
    program = traced(HeldMask(ahead), (torch.zeros(4096, 1, 512, 4, device="meta"),), "tp=2")
    flags = [arguments(node)["is_causal"] for node in program.nodes("op") if "attention" in op_name(node)]
    assert flags == [ahead == 0] * 6


def test_constants_are_computed_exactly() -> None:
    """Values with repeats are computed once and shown in full: sums, indices and types are those of the plain computation."""

    def constant() -> torch.Tensor:
        at = torch.arange(6, dtype=torch.int32)
        steps = (at.unsqueeze(0).expand(4, -1).ne(3).cumsum(-1) * torch.full((), 2, dtype=torch.int64) + at).float()
        return steps.expand(5, 4, 6).sum(0) / torch.full((4, 1), 3.0) + at.expand(4, 6)[:, ::2].repeat(1, 2)

    class Adds(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + constant()

    program = traced(Adds(), (torch.zeros(4, 6),), "tp=2")
    (last,) = [node for node in program.nodes("op") if not facts(node).is_constant]
    known: dict = {}
    assert torch.equal(evaluate(last.args[1], known), constant())
    for node, value in known.items():
        assert (tuple(value.shape), value.dtype) == (facts(node).value.shape, facts(node).value.dtype)


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), (2, 8, 16, 16)),
        (nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=True), (2, 8, 16, 16)),
        (nn.Conv1d(8, 12, 5), (2, 8, 16)),
        (nn.ConvTranspose2d(8, 12, 4, stride=2, groups=2), (2, 8, 6, 6)),
        (nn.Conv3d(3, 4, 2), (1, 3, 4, 5, 6)),
        (nn.Linear(8, 12), (2, 5, 8)),
    ],
)
def test_work_is_what_torch_counts(op: nn.Module, shape: tuple[int, ...]) -> None:
    """Against torch's own counter, two flops per product."""
    x = torch.zeros(shape)
    with FlopCounterMode(display=False) as counter:
        op(x)
    (node,) = traced(op, (x,), "a=2").nodes("op")
    rule, equation = bound_rule(node)
    call = call_of(node)
    assert rule is not None
    assert equation is not None
    assert 2 * rule.products(equation.sizes, (*call.inputs, *call.outputs)) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("mesh", "shape", "segments"),
    [("a=2,b=3", (12, 6), (6, 6)), ("a=2,b=2,c=2", (16, 2), (4, 4, 4, 4)), ("a=2,b=3,c=2", (24, 7), (12, 12)), ("a=2,b=2,c=2", (9, 8), ())],
)
@pytest.mark.parametrize("needs_grad", [True, False])
def test_conversion_table_equals_single_routes(mesh: str, shape: tuple[int, ...], segments: tuple[int, ...], needs_grad: bool) -> None:
    """Whole tables of prices against the route that insertion takes, for every pair of layouts, nested segments among them."""
    spec, info = MeshSpec.of(mesh), TensorInfo(shape, torch.float32, needs_grad)
    costs = CostModel(spec, hardware_of("h100"))
    kinds = (I, R, P, S(0), S(1), *([S(0, segments)] if segments else []))
    layouts: list[Layout] = [x for x in itertools.product(kinds, repeat=spec.ndim) if local_shape(shape, x, spec.shape)]
    layouts = layouts[:: max(1, len(layouts) // 40)]
    table = ConversionTable(costs)
    assert table.seconds(layouts[:7], layouts, info).shape == (7, len(layouts))  # some first, all later
    seconds = table.seconds(layouts, layouts, info)
    for i, src in enumerate(layouts):
        for j, dst in enumerate(layouts):
            route = costs.best_route(src, dst, info)
            assert route is not None
            assert seconds[i, j] == pytest.approx(route[0], rel=1e-9)
            assert seconds[i, j] > 0 or src == dst or route[0] == 0


def test_templates_are_constraints() -> None:
    program = traced(gpt.GPT(gpt.SMALL), (IDS, IDS), "dp=2,tp=2")
    assert set(template_constraints(program, "ddp").values()) == {"I", "S(0)@dp S(0)@tp"}
    assert template_constraints(program, "auto") == {}
