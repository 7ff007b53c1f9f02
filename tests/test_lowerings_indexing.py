"""Lowerings of indexing on simulated axes: what is sent, indices at the edges of pieces, and indices that are nowhere."""

from __future__ import annotations

import pytest
import torch
from test_lowerings import MESH, ints, run, x
from torch import nn

import autoshard
from autoshard.errors import TraceError
from autoshard.placements import P, S
from autoshard.runtime import gather, index, index_put, index_select, one_hot, scatter
from autoshard.simulator import SimulatedAxis
from autoshard.testing import OpCase, check_rule

aten = torch.ops.aten
AXES = (SimulatedAxis(MESH, "a"), SimulatedAxis(MESH, "b"))


@pytest.mark.parametrize(
    ("op", "args", "factors", "layout"),
    [
        (aten.index.Tensor, (x(12, 8), [torch.tensor([0, 2, 3, 5, 6, 11, -1, -12])]), ("u", "u"), (P, P)),
        (aten.index.Tensor, (x(4, 12, 8), [None, ints(12, 4, 1), ints(8, 4)]), ("u", "v"), (P, P)),
        (aten.index.Tensor, (x(12, 8), [ints(12, 4)]), ("u", "r1"), (P, S(1))),
        (aten.gather.default, (x(4, 12), 1, torch.arange(12).flip(0).expand(4, 12)), ("u", "d0"), (P, S(0))),
        (aten.index_select.default, (x(4, 12), 1, torch.arange(11, -1, -1)), ("u", "u"), (P, P)),
        (aten.index_put.default, (x(12, 8), [torch.tensor([0, 5, 6, -1])], x(4, 8)), ("u", "u"), (S(0), S(0))),
        (aten.index_put.default, (x(12, 8), [ints(12, 4), ints(8, 4)], x(4), True), ("u", "v"), (S(0), S(1))),
        (aten.scatter_add.default, (x(12, 8), 0, ints(12, 4, 8), x(4, 8)), ("u", "i"), (S(0), P)),
        (aten.index_add.default, (x(12, 8), 0, torch.tensor([0, 11, 11, 5]), x(4, 8)), ("u", "u"), (S(0), S(0))),
        (aten.tril.default, (x(8, 12), 1), ("r", "c"), (S(0), S(1))),
        (aten.triu.default, (x(8, 12), -3), ("r", "r"), (S(0), S(0))),
        (aten.one_hot.default, (torch.arange(12), 12), ("c", "c"), (S(1), S(1))),
    ],
)
def test_nothing_is_sent(op: torch._ops.OpOverload, args: tuple, factors: tuple[str, str], layout: tuple, wire: list) -> None:
    case = OpCase(op, args, {}, MESH)
    assert run(case, *factors)[1] == layout
    assert wire == []


@pytest.mark.parametrize(
    "read",
    [
        lambda table, rows: index(table, [rows], first_axes=AXES),
        lambda table, rows: index_put(table, [rows], x(2, 4), first_axes=AXES),
        lambda table, rows: index_select(table, 0, rows, index_axes=AXES),
        lambda table, rows: gather(table, 0, rows.view(-1, 1), index_axes=AXES),
        lambda table, rows: scatter(table, 0, rows.view(-1, 1), 1.0, index_axes=AXES),
        lambda table, rows: one_hot(rows, 12, class_axes=AXES),
    ],
)
@pytest.mark.parametrize("wrong", [12, -13])
def test_an_index_that_is_nowhere_raises(read: object, wrong: int) -> None:
    """Read as zero or dropped on every rank it would be silent."""
    with pytest.raises(RuntimeError, match="index out of range"):
        read(x(3, 4), torch.tensor([0, wrong]))  # type: ignore[operator]


def test_batch_positions_of_a_mask() -> None:
    """`mask[batch, position]` as transformers writes it: the positions are global, so a split mask is never read by a split index."""
    mask, batch, place = ints(2, 4, 6).bool(), torch.arange(4).view(4, 1, 1, 1), torch.arange(6)
    proved = check_rule(aten.index.Tensor, mask, [batch, place], mesh="a=2")
    assert {joint[0].factor for joint in proved} == {"", "b.3", "b.0"}
    assert all(not joint[0].inputs[0].is_split for joint in proved)


class Finds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[x > 0].sum() + self.w).sum()


def test_what_depends_on_values_is_refused() -> None:
    with pytest.raises(TraceError, match="depends on the values of tensors"):
        autoshard.plan(Finds(), "a=2", (torch.randn(4, 4),))


class Table(nn.Module):
    """A table that is read, written and masked by index, inside a model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 8))
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        read = self.table[rows] @ self.weight
        written = self.table.index_add(0, rows[0], x).scatter_add(0, rows[:1].t().expand(4, 8), x)
        return (read.tril() * written[rows]).gather(1, rows[:, :, None].expand(2, 4, 8) % 4)


@pytest.mark.parametrize("mesh", ["a=2", "a=2,b=2"])
def test_a_model_of_index_ops(mesh: str) -> None:
    torch.manual_seed(0)
    model, given = Table().double(), (ints(12, 2, 4), x(4, 8))
    for seed in (None, 0, 1, 2):
        plan = autoshard.plan(model, mesh, given, options=autoshard.Options(seed=seed))
        assert autoshard.verify(model, plan, given).is_equal
