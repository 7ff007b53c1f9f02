"""draw_whole: where asked, random ops draw as a single process does, for debugging; else nothing changes.

With randomness "single_device" every random op draws the whole global value on every rank, from torch's default generator
and in the order of the program. Dropout becomes a product with a mask that is drawn whole, attention with dropout what
torch's math path computes, with such a mask; factories are drawn whole. Other random ops (bernoulli of a tensor,
multinomial, recurrent layers) are computed whole. Draws fill memory in order, so masks are drawn in the order in which the
single device holds the value and are transposed afterwards.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoshard.ops.random import SHAPE_ALONE
from autoshard.ops.row import TensorInfo
from autoshard.planner import Randomness
from autoshard.program import Facts, Program, arguments, carries_gradient, draws_random, facts, op_name, set_facts

aten = torch.ops.aten
_DROPOUTS = {f"aten.{name}.default" for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")}
_ALPHA = 1.7580993408473766  # of SELU, whose mean and variance alpha dropout keeps


@dataclass(frozen=True)
class DrawWhole:
    """Rewrite random ops for `randomness`."""

    randomness: Randomness = "per_rank"

    def __call__(self, program: Program) -> Program:
        for node in program.nodes("op"):
            if not draws_random(node):
                continue
            if self.randomness == "per_rank":
                if not node.users:
                    program.graph.erase_node(node)
            elif _draws(node):
                _Rewriter(program, node).rewrite()
        return program


def _draws(node: fx.Node) -> bool:
    """Whether this call draws any number."""
    bound = arguments(node)
    if op_name(node) in _DROPOUTS:
        return bool(bound["train"] is not False and 0 < bound["p"] < 1)
    if "dropout" in bound and "train" in bound:  # recurrent layers
        return bool(bound["train"] and bound["dropout"] and bound.get("num_layers", 1) > 1)
    return bool(bound.get("dropout_p", 1) and bound.get("training", True))


class _Rewriter:
    """Replaces one random op."""

    def __init__(self, program: Program, node: fx.Node) -> None:
        self.program, self.node, self.known, self.bound = program, node, facts(node), arguments(node)

    def rewrite(self) -> None:
        name = op_name(self.node)
        is_math = not self.bound.get("enable_gqa") and (self.bound.get("scale") or 1) > 0
        if name == "aten.native_dropout.default":
            self._native_dropout()
        elif name in _DROPOUTS:
            self._replace(self._dropout(name))
        elif name in SHAPE_ALONE:
            self._replace(self._like())
        elif name == "aten.scaled_dot_product_attention.default" and is_math:
            self._replace(self._attention())
        else:
            self.known.is_drawn_whole = True

    def _replace(self, new: fx.Node) -> None:
        self.node.replace_all_uses_with(new)
        self.program.graph.erase_node(self.node)

    def _call(self, target: Any, args: tuple, shape: tuple[int, ...], dtype: torch.dtype, kwargs: dict[str, Any] | None = None) -> fx.Node:
        name = f"{self.node.name}_{target.__name__.split('.')[0].strip('_')}"
        with self.program.graph.inserting_before(self.node):
            new = self.program.graph.create_node("call_function", target, args, kwargs or {}, name=name)
        set_facts(new, Facts("op", (TensorInfo(shape, dtype),), source=self.known.source))
        facts(new).recompute, facts(new).branch = self.known.recompute, self.known.branch
        flows = carries_gradient(new) and dtype.is_floating_point
        facts(new).values = (TensorInfo(shape, dtype, flows),)
        return new

    @staticmethod
    def _on_device(dtype: torch.dtype) -> dict[str, Any]:
        return {"dtype": dtype, "device": torch.device("cpu")}  # printed as the program's own device

    def _drawn(self, target: Any, shape: tuple[int, ...], dtype: torch.dtype, args: tuple, out: torch.dtype | None = None) -> fx.Node:
        """`target(ones of shape, *args)`, drawn whole; the ones take no memory."""
        one = self._call(aten.ones.default, ([],), (), dtype, self._on_device(dtype))
        ones = self._call(aten.expand.default, (one, list(shape)), shape, dtype)
        drawn = self._call(target, (ones, *args), shape, out or dtype)
        facts(drawn).is_drawn_whole = True
        return drawn

    def _in_memory_order(self, target: Any, dtype: torch.dtype, args: tuple, out: torch.dtype | None = None) -> fx.Node:
        """As _drawn, of the node's shape, with the strides that the value has on the single device."""
        shape, strides = self.known.values[0].shape, self.known.strides
        dims = [dim for dim in range(len(shape)) if shape[dim] > 1]
        order = sorted(dims, key=lambda dim: -strides[dim]) if strides else dims
        if order == dims:
            return self._drawn(target, shape, dtype, args, out)
        order = [*(dim for dim in range(len(shape)) if dim not in dims), *order]
        held, back = tuple(shape[dim] for dim in order), [order.index(dim) for dim in range(len(shape))]
        if target is aten.bernoulli.p:  # stands for bernoulli_, and returns other strides than its argument has
            return self._call(aten.permute.default, (self._drawn(target, held, dtype, args, out), back), shape, out or dtype)
        one = self._call(aten.ones.default, (list(held),), held, dtype, self._on_device(dtype))
        ones = self._call(aten.permute.default, (one, back), shape, dtype)
        drawn = self._call(target, (ones, *args), shape, out or dtype)
        facts(drawn).is_drawn_whole = True
        return drawn

    def _dropout(self, name: str) -> fx.Node:
        x, p, value = self.bound["input"], self.bound["p"], self.known.value
        shape, dtype = value.shape, value.dtype
        noisy = (*shape[:2], *(1 for _ in shape[2:])) if name.startswith("aten.feature") else shape
        if name == "aten.feature_dropout.default":
            return self._call(aten.mul.Tensor, (x, self._drawn(aten.feature_dropout.default, noisy, dtype, (p, True))), shape, dtype)
        if name == "aten.dropout.default":
            return self._call(aten.mul.Tensor, (x, self._in_memory_order(aten.dropout.default, dtype, (p, True))), shape, dtype)
        scale = 1 / math.sqrt((_ALPHA * _ALPHA * p + 1) * (1 - p))
        draw = self._drawn(aten.dropout.default, noisy, dtype, (p, True)) if noisy != shape else None
        mask = draw if draw is not None else self._in_memory_order(aten.dropout.default, dtype, (p, True))
        is_kept = self._call(aten.ne.Scalar, (mask, 0), noisy, torch.bool)
        kept = self._call(aten.to.dtype, (is_kept, dtype), noisy, dtype)
        dropped = self._call(aten.mul.Tensor, (self._call(aten.add.Tensor, (kept, -1), noisy, dtype), _ALPHA * scale), noisy, dtype)
        shift = self._call(aten.add.Tensor, (dropped, _ALPHA * scale * p), noisy, dtype)
        scaled = self._call(aten.mul.Tensor, (x, self._call(aten.mul.Tensor, (kept, scale), noisy, dtype)), shape, dtype)
        return self._call(aten.add.Tensor, (scaled, shift), shape, dtype)

    def _native_dropout(self) -> None:
        x, p, value = self.bound["input"], self.bound["p"], self.known.values[0]
        mask = self._drawn(aten.dropout.default, value.shape, value.dtype, (p, True))
        results = [
            self._call(aten.mul.Tensor, (x, mask), value.shape, value.dtype),
            self._call(aten.ne.Scalar, (mask, 0), value.shape, torch.bool),
        ]
        for user in list(self.node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            self.program.graph.erase_node(user)
        self.program.graph.erase_node(self.node)

    def _like(self) -> fx.Node:
        first, *rest = self.bound.items()
        schema = {argument.name for argument in self.node.target._schema.arguments if argument.kwarg_only}  # type: ignore[union-attr]
        operand = first[1]
        dtype = facts(operand).value.dtype
        plain = tuple(value for name, value in rest if name not in schema)
        drawn = self._in_memory_order(self.node.target, dtype, plain, self.known.value.dtype)
        if self.bound.get("dtype") is not None:
            drawn.kwargs = {"dtype": self.bound["dtype"]}
        return drawn

    def _attention(self) -> fx.Node:
        """torch's _scaled_dot_product_attention_math, in its order."""
        value = self.known.value
        dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
        query, key, values = (self._cast(self._cast(self.bound[name], value.dtype), dtype) for name in ("query", "key", "value"))
        shapes = [facts(node).value.shape for node in (query, key)]
        transposed, scores = (*shapes[1][:-2], shapes[1][-1], shapes[1][-2]), (*shapes[0][:-1], shapes[1][-2])
        scale = math.sqrt(self.bound.get("scale") or 1 / math.sqrt(shapes[0][-1]))
        query = self._call(aten.mul.Tensor, (query, scale), shapes[0], dtype)
        key = self._call(aten.transpose.int, (self._call(aten.mul.Tensor, (key, scale), shapes[1], dtype), -2, -1), transposed, dtype)
        weights = self._masked(self._call(aten.matmul.default, (query, key), scores, dtype), scores, dtype)
        softmax = aten.softmax.int if self.bound.get("attn_mask") is None else aten._safe_softmax.default
        weights = self._call(softmax, (weights, -1), scores, dtype)
        drawn = self._drawn(aten.dropout.default, scores, dtype, (self.bound["dropout_p"], True))
        weights = self._call(aten.mul.Tensor, (weights, drawn), scores, dtype)
        return self._cast(self._call(aten.matmul.default, (weights, values), value.shape, dtype), value.dtype)

    def _masked(self, weights: fx.Node, scores: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        mask = self.bound.get("attn_mask")
        if self.bound.get("is_causal"):
            square = scores[-2:]
            ones = self._call(aten.ones.default, (list(square),), square, torch.bool, self._on_device(torch.bool))
            mask = self._call(aten.tril.default, (ones,), square, torch.bool)
        if mask is None:
            return weights
        info = facts(mask).value
        if info.dtype != torch.bool:
            return self._call(aten.add.Tensor, (weights, self._cast(mask, dtype)), scores, dtype)
        hidden = self._call(aten.bitwise_not.default, (mask,), info.shape, torch.bool)
        return self._call(aten.masked_fill.Scalar, (weights, hidden, -math.inf), scores, dtype)

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if facts(node).value.dtype == dtype:
            return node
        return self._call(aten.to.dtype, (node, dtype), facts(node).value.shape, dtype)
