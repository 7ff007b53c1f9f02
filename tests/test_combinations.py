"""Features together: collectives in two parts with conds, budgets and comparisons of plans; costs of layers that run again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoshard

OVERLAP = autoshard.Options(overlap=True)


class ReadInsideAndOutside(nn.Module):
    """A cond whose branches read weights that are read before it, or in both branches, behind other ops."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.p, self.a, self.b = (nn.Linear(16, 16, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.p(x).relu()).relu()
        (y,) = torch.cond(y.sum() > 0, lambda t: (self.a(t).relu() * 2,), lambda t: ((t * 3).sin(),), (y,))
        (y,) = torch.cond(y.sum() > 1, lambda t: (self.b(t.sin()).relu() * 2,), lambda t: (self.b(t * 3).sin(),), (y,))
        return y


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own cond, in eager mode
@pytest.mark.parametrize("template", ["fsdp", "ddp"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_overlap_leaves_conds_whole(template: str, sign: float) -> None:
    model, x = ReadInsideAndOutside(), sign * torch.linspace(-1, 2, 128, dtype=torch.float64).view(8, 16)
    plan = autoshard.plan(model, "dp=2", (x,), template=template, options=OVERLAP, hardware="h100")
    assert autoshard.verify(model, plan, (x,)).is_equal


def blocks(count: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(count))
    return nn.Sequential(*layers).double()


def test_overlap_is_no_difference_of_layouts() -> None:
    model, x = blocks(2), torch.randn(8, 64, dtype=torch.float64)
    asked: dict[str, Any] = {"template": "fsdp", "hardware": "h100"}
    alone, overlapped = (autoshard.plan(model, "dp=2", (x,), options=options, **asked) for options in (None, OVERLAP))
    assert list(overlapped.program.nodes("start"))
    assert alone.diff(overlapped).is_empty


def test_costs_count_what_runs_again() -> None:
    model, x = blocks(4), torch.zeros(4096, 64, dtype=torch.float64)
    asked: dict[str, Any] = {"template": "fsdp", "hardware": "h100"}
    free = autoshard.plan(model, "dp=2", (x,), **asked)
    tight = autoshard.plan(model, "dp=2", (x,), memory_budget_bytes=0.5 * free.stats["kept_bytes"], **asked)
    assert any(node.meta["autoshard"].recompute is not None for node in tight.program.graph.nodes)
    assert tight.cost.total_s == pytest.approx(tight.stats["objective_s"], rel=1e-9)
    assert tight.cost.total_s == pytest.approx(tight.timeline().total_s, rel=1e-9)
    assert tight.cost.total_s > free.cost.total_s


def test_weights_gathered_again_in_two_parts_before() -> None:
    """I@dp S@tp read as R@dp R@tp: one step is in two parts, the other gathers again."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(3))).double()
    x = torch.randn(256, 64, dtype=torch.float64)
    weights = {f"{k}.{j}.weight": "I@dp S(0)@tp" for k in range(3) for j in (0, 2)}
    asked: dict[str, Any] = {"constraints": weights | {f"output:{k}.2": "S(0)@dp S(0)@tp" for k in range(3)}, "hardware": "h100"}
    free = autoshard.plan(model, "dp=2,tp=2", (x,), **asked)
    plan = autoshard.plan(model, "dp=2,tp=2", (x,), memory_budget_bytes=0.9 * free.stats["kept_bytes"], options=OVERLAP, **asked)
    assert autoshard.verify(model, plan, (x,)).is_equal
