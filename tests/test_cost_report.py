"""Costs of a plan: every node's, summed to the predicted step; as an expression in sizes; where another plan becomes the best."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from models import GPT
from rich.console import Console
from torch import Tensor, nn

import autoshard
from autoshard.cost_report import CostReport, price
from autoshard.errors import InputError, PlanError
from autoshard.instantiation import instantiate
from autoshard.measured import Measured
from autoshard.plan_diff import parameter_texts
from autoshard.program import facts
from autoshard.text import human_bytes

TEMPLATES = ("auto", "ddp", "fsdp", "megatron", "megatron_sp")
DYNAMIC = {"ids": "batch", "labels": "batch"}


def batch(size: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(size, 8, dtype=torch.long), torch.zeros(size, 8, dtype=torch.long)


def mlp(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))


def number(expr: sympy.Expr, **sizes: int) -> float:
    return float(expr.subs({sympy.Symbol(name, integer=True, positive=True): size for name, size in sizes.items()}))


@cache
def gpt_plan(template: str) -> autoshard.Plan:
    return autoshard.plan(GPT(), "dp=2,tp=2", batch(4), template=template, dynamic=DYNAMIC, hardware="h100")  # type: ignore[arg-type]


@pytest.mark.parametrize("template", TEMPLATES)
def test_rows_sum_to_what_the_search_minimised(template: str) -> None:
    plan = gpt_plan(template)
    report = plan.cost
    assert report.objective_s == plan.stats["objective_s"]
    assert report.total_s == pytest.approx(plan.stats["objective_s"], rel=1e-12)
    assert report.shared_s == pytest.approx(0, abs=1e-12 * report.total_s)
    for by in ("kind", "module", "node"):
        assert sum(group.total_s for group in report.by(by)) == pytest.approx(report.total_s, rel=1e-12)


@pytest.mark.parametrize("template", TEMPLATES)
def test_bytes_on_the_wire_are_those_of_the_program(template: str) -> None:
    plan = gpt_plan(template)
    sent: dict[str, float] = {}
    for row in plan.cost.rows:
        if row.is_per_step and row.wire_bytes:
            sent[row.kind] = sent.get(row.kind, 0.0) + row.wire_bytes
    assert sent == pytest.approx(plan.stats["wire_bytes_per_step"])


PLAIN = autoshard.Hardware.uniform(
    "plain", flops_per_s=1e12, memory_bytes_per_s=1e12, memory_bytes=1e9, link_bytes_per_s=1e9, collective_latency_s=1e-5,
    kernel_latency_s=1e-6,
)  # fmt: skip


def test_a_linear_by_hand() -> None:
    model = nn.Linear(32, 16, bias=False)
    plan = autoshard.plan(model, "dp=4", (torch.zeros(64, 32),), template="ddp", outputs="dtensor", hardware=PLAIN)
    report = plan.cost
    (linear,) = [row for row in report.rows if row.op == "aten.linear.default"]
    flops, moved = 2 * 64 * 32 * 16 / 4, 4 * (64 / 4 * 32 + 16 * 32 + 64 / 4 * 16)
    assert (linear.flops, linear.bytes_moved) == (2 * flops, 2 * moved)  # the input needs no gradient
    assert linear.forward_s == pytest.approx(max(flops, moved) / 1e12 + 1e-6)
    (reduced,) = [row for row in report.rows if row.kind == "all_reduce"]
    assert (reduced.axis, reduced.forward_s, reduced.wire_bytes) == ("dp", 0.0, 2 * 3 / 4 * 16 * 32 * 4)
    assert reduced.backward_s == pytest.approx(1e-5 + reduced.wire_bytes / 1e9)
    (step,) = [row for row in report.rows if row.kind == "optimizer"]
    assert (step.node, step.optimizer_s) == ("weight", pytest.approx(7 * 16 * 32 * 4 / 1e12))


def test_results_that_are_gathered_are_named() -> None:
    def notes(**asked: Any) -> list[str]:
        split = {"split:linear": "b.0"}
        plan = autoshard.plan(nn.Linear(32, 16), "dp=4", (torch.zeros(64, 32),), constraints=split, hardware=PLAIN, **asked)
        return [note for note in plan.notes if "whole on every rank" in note]

    (note,) = notes()
    sent = 64 * 16 * 4 * 3 / 4
    assert note.startswith("results are made whole on every rank (linear): ")
    assert note.endswith(f" {human_bytes(sent)} sent a step; outputs='dtensor' leaves them split, as DTensors, and the loss as it is")
    assert not notes(outputs="dtensor")


class Shared(nn.Module):
    """A value that is pinned and read by three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.readers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return sum((F.relu(reader(x)) for reader in self.readers), torch.zeros(()))


def test_a_conversion_that_readers_share_is_one_row() -> None:
    pins = {"output:norm": "I", "split:readers.*.linear": "o@tp"}
    plan = autoshard.plan(Shared(), "tp=2", (torch.zeros(8, 16),), constraints=pins, hardware="h100")
    report = plan.cost
    (varied,) = [row for row in report.rows if row.op == "vary"]
    times = round(report.shared_s / varied.total_s)
    assert report.shared_s == pytest.approx(times * varied.total_s)
    assert times in (0, 2)
    assert ("charges a shared conversion" in report.account) == bool(times)


def test_constants_are_shown_and_not_summed() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + torch.arange(16.0).cos()

    report = autoshard.plan(Table(), "tp=2", (torch.zeros(8, 16),)).cost
    once = [row for row in report.rows if not row.is_per_step]
    assert "aten.cos.default" in {row.op for row in once}
    assert all(row.total_s > 0 for row in once if row.kind != "view")
    assert report.total_s == pytest.approx(sum(row.total_s for row in report.rows if row not in once))


def test_tables_print() -> None:
    report: CostReport = gpt_plan("megatron").cost
    console = Console(width=120)
    with console.capture() as text:
        console.print(report, report.table("module"), report.table("node", most=3))
    assert "all_reduce@tp" in text.get()
    assert "blocks.*.attn" in text.get()
    assert "more, " in text.get()
    with pytest.raises(InputError, match="'kind', 'module', 'node', not by 'layer'"):
        report.by("layer")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- as expressions


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_expression_is_the_price_of_the_program_at_every_size(template: str) -> None:
    plan = gpt_plan(template)
    expr = plan.cost.symbolic()
    assert {symbol.name for symbol in expr.free_symbols} >= {"batch"}
    for size in (4, 12, 4096):
        priced = price(plan, instantiate(plan.program, {"batch": size}))
        assert number(expr, batch=size, dp=2, tp=2) == pytest.approx(priced.total_s, rel=1e-12)


@pytest.mark.parametrize("template", TEMPLATES[1:])
@pytest.mark.parametrize(("mesh", "size"), [("dp=2,tp=2", 64), ("dp=4,tp=2", 8), ("dp=2,tp=8", 16)])
def test_planning_the_same_layouts_anew_costs_what_the_expression_says(template: str, mesh: str, size: int) -> None:
    plan = autoshard.plan(mlp(), "dp=2,tp=2", (torch.zeros(8, 64),), template=template, dynamic="batch", hardware="h100")
    pins = {f"parameter:{name}": text for name, text in parameter_texts(plan.program).items()}
    for node in plan.program.nodes("op"):
        split = " ".join(f"{s.factor}@{axis}" for axis, s in zip(plan.mesh.axes, facts(node).strategies, strict=True) if s.factor)
        pins |= {f"split:{facts(node).source.module}.{node.name.rpartition('_')[2]}": split} if split else {}
    other = autoshard.plan(mlp(), mesh, (torch.zeros(size, 64),), template=template, constraints=pins, hardware="h100")
    assert layouts(other) == layouts(plan)
    sizes = dict(zip(other.mesh.axes, other.mesh.shape, strict=True))
    assert number(plan.cost.symbolic(), batch=size, **sizes) == pytest.approx(other.cost.total_s, rel=1e-12)


def test_axes_alone_are_symbols_of_a_plan_without_dynamic_sizes() -> None:
    plan = autoshard.plan(mlp(), "dp=2,tp=2,one=1", (torch.zeros(8, 64),), template="megatron")
    expr = plan.cost.symbolic()
    assert {symbol.name for symbol in expr.free_symbols} == {"dp", "tp"}
    assert number(expr, dp=2, tp=2) == pytest.approx(plan.cost.total_s, rel=1e-12)
    at_two = plan.cost.symbolic(fixed=["dp", "tp"])
    assert float(at_two) == pytest.approx(plan.cost.total_s, rel=1e-12)
    with pytest.raises(InputError, match="no size 'batch' to fix; this plan has dp, tp, one"):
        plan.cost.symbolic(fixed=["batch"])


def test_a_roofline_is_a_max() -> None:
    plan = autoshard.plan(mlp(), "dp=2,tp=2", (torch.zeros(8, 64),), dynamic="batch", constraints={"*.weight": "I"})
    expr = plan.cost.symbolic()
    assert expr.atoms(sympy.Max)
    small, large = (number(expr, batch=size, dp=2, tp=2) for size in (8, 8000))
    assert small == pytest.approx(plan.cost.total_s, rel=1e-12)
    assert large > 100 * small / 8


def test_padding_is_in_the_expression() -> None:
    model = nn.Linear(64, 63, bias=False)
    pins = {"weight": "S(0)@tp"}
    plan = autoshard.plan(model, "tp=2", (torch.zeros(8, 64),), constraints=pins)
    assert number(plan.cost.symbolic(), tp=2) == pytest.approx(plan.cost.total_s, rel=1e-12)
    assert plan.cost.symbolic().atoms(sympy.ceiling)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_ring_has_no_expression_in_its_ranks() -> None:
    pins = {"split:*scaled_dot_product_attention": "s&k@cp"}
    plan = autoshard.plan(Attention(), "cp=2", (torch.zeros(2, 8, 16),), constraints=pins, dynamic="batch")
    with pytest.raises(InputError, match=r"depends on cp .*symbolic\(fixed=\('cp',\)\)"):
        plan.cost.symbolic()
    expr = plan.cost.symbolic(fixed=("cp",))
    assert number(expr, batch=2) == pytest.approx(plan.cost.total_s, rel=1e-12)
    other = autoshard.plan(Attention(), "cp=2", (torch.zeros(6, 8, 16),), constraints={**pins, "parameter:*": "I"})
    same = autoshard.plan(Attention(), "cp=2", (torch.zeros(2, 8, 16),), constraints={**pins, "parameter:*": "I"}, dynamic="batch")
    assert number(same.cost.symbolic(("cp",)), batch=6) == pytest.approx(other.cost.total_s, rel=1e-12)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mean((0, 1))


def test_a_lowering_that_sends_nothing_may_ask_for_its_ranks() -> None:
    plan = autoshard.plan(Mean(), "dp=2", (torch.zeros(8, 16),), template="ddp", dynamic="batch", hardware="h100")
    assert any("reduced_axes" in node.kwargs for node in plan.program.nodes("op"))
    assert number(plan.cost.symbolic(), batch=8, dp=2) == pytest.approx(plan.cost.total_s, rel=1e-12)
    priced = price(plan, instantiate(plan.program, {"batch": 64}))
    assert number(plan.cost.symbolic(), batch=64, dp=2) == pytest.approx(priced.total_s, rel=1e-12)


def test_measured_op_times_are_no_expression() -> None:
    measured = Measured({}, {"aten.linear.default": (1e-6, 1e-6)})
    hardware = replace(autoshard.hardware.hardware_of("h100"), name="mine", measured=measured)
    plan = autoshard.plan(mlp(), "dp=2", (torch.zeros(8, 64),), hardware=hardware)
    with pytest.raises(InputError, match="hardware 'mine' has measured seconds of single ops"):
        plan.cost.symbolic()


# ----------------------------------------------------------------------------------------------------------- crossovers


def test_crossovers_are_where_planning_anew_changes() -> None:
    model, sizes = mlp(), range(8, 513, 8)
    plan = autoshard.plan(model, "dp=2,tp=2", (torch.zeros(8, 64),), dynamic="batch")
    found = plan.cost.crossovers("batch", sizes)
    assert found
    assert all(crossover.at == crossover.below + 8 for crossover in found)
    expr = plan.cost.symbolic(("dp", "tp"))
    for crossover in found:
        before, after = (autoshard.plan(model, "dp=2,tp=2", (torch.zeros(size, 64),)) for size in (crossover.below, crossover.at))
        assert layouts(before) != layouts(after)
        assert crossover.best_s == pytest.approx(after.cost.total_s, rel=1e-9)
        assert crossover.best_s < crossover.kept_s
    first = found[0]
    assert first.kept_s == pytest.approx(number(expr, batch=first.at), rel=1e-9)  # the plan of the smallest batch is the given one
    assert str(first).startswith(f"from batch {first.at} on the plan changes (it takes ")
    assert "0.weight: I@dp I@tp -> " in str(first)


def layouts(plan: autoshard.Plan) -> list[tuple]:
    return [(node.name, facts(node).layouts) for node in plan.program.nodes("parameter", "op")]


def test_crossovers_need_a_dynamic_size(tmp_path) -> None:
    x = torch.zeros(8, 64)
    fixed, free = (autoshard.plan(mlp(), "tp=2", (x,), dynamic=dynamic) for dynamic in (None, "batch"))
    with pytest.raises(InputError, match=r"'batch' is no size of this plan that may change \(there are: none\); plan with dynamic='batch'"):
        fixed.cost.crossovers("batch", range(8, 65, 8))
    with pytest.raises(InputError, match="the values of batch are of 2 or more; got 1 to 7"):
        free.cost.crossovers("batch", range(1, 8))
    free.save(tmp_path / "plan.json")
    loaded = autoshard.Plan.load(tmp_path / "plan.json")
    assert number(loaded.cost.symbolic() - free.cost.symbolic(), batch=8, tp=2) == 0.0
    with pytest.raises(PlanError, match="read from a file"):
        loaded.cost.crossovers("batch", range(8, 65, 8))


def test_costs_of_empty_programs_are_nothing() -> None:
    report = autoshard.plan(nn.Identity(), "dp=2", (torch.zeros(4, 4),)).cost
    assert report.total_s == 0.0
    assert math.isfinite(report.objective_s)
    assert report.symbolic() == 0
