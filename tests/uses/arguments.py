"""Small tensors to call ops with, and `use`: one call of an op and what its rule must be able to split."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Use(NamedTuple):
    splits: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def use(splits: str, *args: Any, **kwargs: Any) -> Use:
    return Use(splits, args, kwargs)


_generator = torch.Generator().manual_seed(0)


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_generator)


def pos(*shape: int) -> Tensor:
    """Positive, away from zero."""
    return x(*shape).abs() + 0.5


def ints(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=_generator)


def bools(*shape: int) -> Tensor:
    return ints(2, *shape).bool()


def labels(classes: int, *shape: int) -> Tensor:
    """Class numbers of which some are -100."""
    found = ints(classes, *shape)
    return torch.where(ints(4, *shape) == 0, -100, found)


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()
