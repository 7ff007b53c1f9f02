"""What one model of the zoo is, and how Hugging Face models are made from small configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

BATCH, LENGTH, VOCAB = 4, 8, 64

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One model. make: the model, positional and keyword arguments, from random weights.

    package: names of what must be installed beside torch, else the entry is skipped. dtype: what the model is made in. tolerance: largest
    difference allowed beside the largest value of a tensor; None: by the least precise dtype that the trace computes in.
    modes: which modes can run. refusal: the model cannot be traced, and this
    is a part of the one error that says so.
    """

    name: str
    family: str
    make: Callable[[], Made]
    package: str = ""
    dtype: torch.dtype = torch.float64
    tolerance: float | None = None
    modes: tuple[str, ...] = ("train", "eval")
    refusal: str = ""


@dataclass
class Table:
    """Entries of one file, in order."""

    entries: list[Entry] = field(default_factory=list)

    def add(self, name: str, family: str, **options: Any) -> Callable:
        """A decorator for a function that makes a model and its arguments."""

        def register(make: Callable[[], Made]) -> Callable[[], Made]:
            self.entries.append(Entry(name, family, make, **options))
            return make

        return register


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(*shape: int, vocab: int = VOCAB, seed: int = 1) -> torch.Tensor:
    """Token numbers from 4 on: the first few are special in many models."""
    return torch.randint(4, vocab, shape or (BATCH, LENGTH), generator=generator(seed))


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def no_weight_is_zero(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Zero biases, ones in norms and tiny layer scales would hide errors: every parameter is moved a little."""
    draw = generator(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter.dtype) * scale)
    return model


def hugging_face(
    model: str, config: str, inputs: Callable[[], Mapping[str, Any]], dtype: torch.dtype = torch.float64, **sizes: Any
) -> Callable[[], Made]:
    """A maker of `transformers.<model>` from `transformers.<config>` with `sizes`."""

    def make() -> Made:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(**sizes)).to(dtype)
        return made, (), dict(inputs())

    return make
