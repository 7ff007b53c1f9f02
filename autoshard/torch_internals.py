"""Every private name of torch that autoshard uses, each with the reason and what breaks if it moves."""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# FakeTensor: tracing without memory, on the device where the program will run. If it moves: trace_model cannot start.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

# _StridedShard: the only DTensor placement that says "the shard's part of every segment". If it moves: segmented parameters
# cannot be stored; pin them to a plain split.
from torch.distributed.tensor.placement_types import _StridedShard

# _pytree's TreeSpec text form: the public torch.utils._pytree has no public spelling yet. If it moves: Plan.save and Plan.load.
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as checkpoint_module

__all__ = [
    "FakeTensor",
    "_StridedShard",
    "fake_copy",
    "fake_mode",
    "is_in_backward",
    "let_segments_be_read",
    "local_of",
    "pytree",
    "record_lost_backwards",
]


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_like(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    """A tensor without memory of the same size and type that claims to lie on `device`."""
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    fake = FakeTensor(mode, meta, device)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def fake_copy(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> nn.Module:
    """A deep copy of `model` whose parameters and buffers have no memory; ties are kept."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): fake_like(tensor, mode, device) for tensor in tensors})


@contextlib.contextmanager
def record_lost_backwards(found: Callable[[str, str], Any]) -> Iterator[None]:
    """Call `found(kind, where)` for what non-strict export drops silently while the block runs.

    kind: "checkpoint", or the name of a custom autograd.Function. Patches Function.apply and checkpoint's own inner
    function, which every spelling of torch.utils.checkpoint reaches. If they move: test_trace_model fails.
    """
    apply, inner = vars(torch.autograd.Function)["apply"], checkpoint_module._checkpoint_without_reentrant_generator

    def where() -> str:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "/autoshard/" not in f.filename]
        return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown line"

    def recording_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ == checkpoint_module.__name__:
            found("checkpoint", where())
        elif not cls.__module__.startswith("torch."):
            found(cls.__qualname__, where())
        return apply.__get__(None, cls)(*args, **kwargs)  # a Python classmethod, or one of C

    def recording_inner(*args: Any, **kwargs: Any) -> Any:
        found("checkpoint", where())
        return inner(*args, **kwargs)

    def recording_hook(tensor: Any, hook: Any) -> Any:
        found("Tensor.register_hook", where())
        return register_hook(tensor, hook)

    def recording_grad(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("create_graph"):
            found("torch.autograd.grad", where())
        return autograd_grad(*args, **kwargs)

    register_hook, autograd_grad = torch.Tensor.register_hook, torch.autograd.grad
    torch.Tensor.register_hook, torch.autograd.grad = recording_hook, recording_grad  # type: ignore[method-assign]
    torch.autograd.Function.apply = classmethod(recording_apply)  # type: ignore[method-assign,assignment]
    checkpoint_module._checkpoint_without_reentrant_generator = recording_inner
    try:
        yield
    finally:
        torch.Tensor.register_hook, torch.autograd.grad = register_hook, autograd_grad  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
        checkpoint_module._checkpoint_without_reentrant_generator = inner


def is_in_backward() -> bool:
    """Whether autograd is running a backward pass now. Private: torch._C._current_graph_task_id; nothing public tells."""
    return torch._C._current_graph_task_id() != -1


class _Local(torch.autograd.Function):
    """A DTensor's local tensor; the gradient comes back as a DTensor that lies as the parameter does.

    DTensor.to_local derives global shape and layout of every gradient anew, and lets two parameters share one gradient's
    memory, so that accumulating into one changes the other (test_shared_gradients). Here the parameter's own spec serves,
    and a gradient that anybody else holds is copied. Private: DTensor's constructor, `_spec`, `Tensor._use_count`. If they
    move: use `DTensor.to_local` on a clone.
    """

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> torch.Tensor:
        ctx.spec = parameter._spec
        return parameter._local_tensor.view_as(parameter._local_tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> DTensor:
        if grad._use_count() > 1 or not grad.is_contiguous():  # type: ignore[attr-defined]
            grad = grad.clone(memory_format=torch.contiguous_format)
        return DTensor(grad, ctx.spec, requires_grad=grad.requires_grad)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of a DTensor, differentiably; other tensors as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to_local() if torch.compiler.is_compiling() else _Local.apply(tensor)


def let_segments_be_read() -> None:
    """Let `full_tensor()` and redistribute read parameters that are split by segments on torch before 2.13.

    There DTensor's planner takes every _StridedShard for a nesting of axes and raises ValueError for one that stands alone;
    from 2.13 on it falls back to the greedy planner by itself, as it does here. If it moves: such parameters can be trained
    and saved shard by shard, but not put together.
    """
    if torch.torch_version.TorchVersion(torch.__version__) >= (2, 13):  # type: ignore[operator]
        return
    from torch.distributed.tensor._redistribute import DTensorRedistributePlanner as Planner

    original = Planner.generate_graph_based_transform_infos
    if getattr(original, "falls_back", False):
        return

    def generate(self: Any, src_spec: Any, dst_spec: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, src_spec, dst_spec, *args, **kwargs)
        except ValueError:
            return self.generate_greedy_transform_infos(src_spec, dst_spec)

    generate.falls_back = True  # type: ignore[attr-defined]
    Planner.generate_graph_based_transform_infos = generate  # type: ignore[method-assign]
