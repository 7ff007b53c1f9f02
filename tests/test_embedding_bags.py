"""Bags of embeddings: how torch.export traces them, what becomes of them, and what their lowering sends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from test_lowerings import MESH, ints, run, x
from torch import Tensor, nn

import autoshard
from autoshard import runtime
from autoshard.placements import P, S
from autoshard.program import facts, op_name
from autoshard.simulator import SimulatedAxis
from autoshard.testing import OpCase


class Bags(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(12, 8, dtype=torch.float64, **options)
        self.out = nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, indices: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.out(self.bag(indices, offsets, weights))


TABLE, LIST, STARTS = ints(12, 4, 6), ints(12, 12), torch.tensor([0, 3, 3, 8])
# The module's options, its arguments, and how its bags may be split.
MODELS = {
    "sum": ({"mode": "sum"}, (TABLE,), "v h b k"),
    "mean without padding": ({"padding_idx": -3}, (TABLE,), "v h b k"),
    "maximum": ({"mode": "max", "padding_idx": 2}, (TABLE,), "h b"),
    "offsets": ({}, (LIST, STARTS), "v h n"),
    "last offset": ({"mode": "sum", "include_last_offset": True}, (LIST, torch.tensor([0, 3, 3, 8, 12])), "v h n"),
    "weighted": ({"mode": "sum"}, (TABLE, None, x(4, 6)), "v h b k"),
    "scaled gradients": ({"scale_grad_by_freq": True}, (TABLE,), "h"),
}


@pytest.mark.parametrize(("options", "args", "splits"), MODELS.values(), ids=MODELS)
def test_a_model_with_bags(options: dict, args: tuple, splits: str) -> None:
    torch.manual_seed(0)
    model = Bags(**options)
    for mesh, seed in (("a=2", None), ("a=2,b=2", 0), ("a=2,b=2", 1)):
        is_ddp = seed is None and args[0].dim() == 2  # a list has no dim of samples
        asked = autoshard.Options(seed=seed)
        plan = autoshard.plan(model, mesh, args, template="ddp" if is_ddp else "auto", options=asked)
        bag = next(node for node in plan.program.nodes("op") if op_name(node) == "embedding_bag")
        used = {strategy.factor for strategy in facts(bag).strategies} - {""}
        assert used <= set(splits.split())
        if is_ddp:
            assert used == ({"b"} if "b" in splits else set())
        assert autoshard.verify(model, plan, args).is_equal


def test_bags_of_samples_that_change_in_number() -> None:
    plan = autoshard.plan(Bags(), "a=2", (TABLE,), dynamic={"indices": {0: "batch"}}, template="ddp")
    assert "embedding_bag(" in plan.program.source
    for samples in (2, 6):
        assert autoshard.verify(Bags(), plan, (ints(12, samples, 6),)).is_equal


COUNTED = {"mode": "mean", "padding_idx": 3}


@pytest.mark.parametrize(
    ("args", "options", "factors", "layout", "sent"),
    [
        ((x(12, 6), ints(12, 4, 8), None, None), COUNTED, ("v", "v"), (P, P), []),
        ((x(12, 6), ints(12, 4, 8), None, None), COUNTED, ("b", "v"), (S(0), P), []),
        ((x(12, 6), ints(12, 4, 8), None, None), COUNTED, ("k", "k"), (P, P), [("all_reduce", 4)] * 2),
        ((x(12, 6), ints(12, 12), STARTS, None), COUNTED, ("n", "n"), (P, P), [("all_reduce", 4)] * 2),
        ((x(12, 6), ints(12, 12), STARTS, x(12)), {"mode": "sum"}, ("n", "h"), (P, S(1)), []),
    ],
)
def test_numbers_of_indices_alone_cross_the_axes(args: tuple, options: dict, factors: tuple, layout: tuple, sent: list, wire: list) -> None:
    assert run(OpCase(runtime.embedding_bag, args, options, MESH), *factors)[1] == layout
    assert Counter(wire) == Counter(sent)


@pytest.mark.parametrize("wrong", [12, -1])
def test_an_index_that_is_nowhere_raises(wrong: int) -> None:
    axes = (SimulatedAxis(MESH, "a"), SimulatedAxis(MESH, "b"))
    with pytest.raises(RuntimeError, match="index out of range"):
        runtime.embedding_bag(x(3, 4), torch.tensor([[0, wrong]]), None, None, mode="sum", row_axes=axes)
