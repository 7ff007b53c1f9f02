"""torch's own operator database as a source of calls: what its samples become in a traced model, with the tensors they get.

Every entry is an op with sample inputs that torch tests itself on. A sample is traced as torch.export traces a model for
training, before autograd and without decompositions, and the graph is run once more to read off each call's arguments.
"""

from __future__ import annotations

import sys
import types
import unittest
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

DTYPES = (torch.float64, torch.int64, torch.bool)


@dataclass(frozen=True)
class OpCall:
    """One call of an aten op with the tensors that a sample gives it."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.op)

    def __str__(self) -> str:
        parts = [*map(_text, self.args), *(f"{key}={_text(value)}" for key, value in self.kwargs.items())]
        return f"{self.name}({', '.join(parts)})"

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, (list, tuple)) else repr(value)


@cache
def entries() -> dict[str, Any]:
    """The database by name; what its module imports for torch's own test cases is not needed here."""
    if "expecttest" not in sys.modules:
        try:
            import expecttest  # noqa: F401
        except ImportError:
            sys.modules["expecttest"] = types.ModuleType("expecttest")
            sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {f"{info.name}.{info.variant_test_name}".rstrip("."): info for info in op_db}


def samples(info: Any, most: int | None) -> list[Any]:
    """Sample inputs in the first dtype of DTYPES that the op takes; with `most`, as many, from all over the list."""
    dtype = next((dtype for dtype in DTYPES if dtype in info.dtypes), None)
    if dtype is None:
        return []
    torch.manual_seed(0)  # the samples are random tensors
    found = list(info.sample_inputs("cpu", dtype, requires_grad=False))
    if most is None or len(found) <= most:
        return found
    return [found[k * len(found) // most] for k in range(most)]


def calls(info: Any, sample: Any) -> Iterator[OpCall]:
    """The aten calls that one sample is traced to."""
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))

    def run(*tensors: Tensor) -> Any:
        given = iter(tensors)
        first, args, kwargs = pytree.tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        return info.op(first, *args, **kwargs)

    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    recorder = _Recorder(make_fx(run, pre_dispatch=True)(*tensors))
    recorder.run(*tensors)
    yield from recorder.calls


class _Recorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.calls: list[OpCall] = []

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
            self.calls.append(OpCall(target, *pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (args, dict(kwargs)))))
        return super().call_function(target, args, kwargs)
