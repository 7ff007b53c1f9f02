"""Random ops switched off, so that two runs can be compared: dropout drops nothing, and numbers that are drawn are a constant.

An op with a probability of dropping is called with 0 in its place. Every other op that draws is run as it is, for the shape
and dtype of what it returns, which is then filled: with a number that models meet often, or a permutation with 0, 1, 2, ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from autoshard.program import arguments, op_name

# What stands for numbers that an op of this name draws. A mask that is drawn keeps everything.
DRAWN = {
    "bernoulli": 1.0,
    "binomial": 1.0,
    "cauchy": 0.25,
    "exponential": 0.5,
    "geometric": 1.0,
    "log_normal": 1.0,
    "normal": 0.25,
    "normal_functional": 0.25,
    "poisson": 1.0,
    "rand": 0.5,
    "rand_like": 0.5,
    "randn": 0.25,
    "randn_like": 0.25,
    "uniform": 0.5,
}
_PERMUTATION = "randperm"


def without_draws(node: fx.Node) -> tuple[Callable[..., Any], tuple, dict[str, Any]]:
    """What to call in place of a random op, with which arguments (nodes among them): the same at every call and on every rank."""
    bound = arguments(node)
    name = op_name(node).split(".")[1]
    if "dropout" in name or "dropout_p" in bound or "dropout" in bound:
        bound = {key: 0.0 if key in ("p", "dropout_p", "dropout") else value for key, value in bound.items()}
        return node.target, *_given(node, bound)  # type: ignore[return-value]
    if name == "rrelu":
        return node.target, *_given(node, {**bound, "training": False})  # type: ignore[return-value]
    lowest = bound.get("low", bound.get("from", 0))

    def constant(*args: Any, **kwargs: Any) -> Tensor:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        return filled(result, name, 0 if lowest is None else lowest)

    return constant, *_given(node, bound)


def filled(drawn: Tensor, name: str, lowest: float = 0) -> Tensor:
    """`drawn` with the constant of op `name` in place of its numbers, or the lowest integer that might be drawn."""
    if name == _PERMUTATION:
        return torch.arange(drawn.shape[0], dtype=drawn.dtype, device=drawn.device)
    is_real = drawn.dtype.is_floating_point and name in DRAWN
    return torch.full_like(drawn, DRAWN[name] if is_real else lowest)


def _given(node: fx.Node, bound: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments."""
    keyword_only = {argument.name for argument in node.target._schema.arguments if argument.kwarg_only}  # type: ignore[union-attr]
    return tuple(v for k, v in bound.items() if k not in keyword_only), {k: v for k, v in bound.items() if k in keyword_only}
