"""What autograd keeps for backward, op by op, of the global program that the passes trace: asked of autograd itself.

Every op is run once on tensors without memory, under torch's saved-tensor hooks, which see all that it keeps: operands, results, and
tensors of its own (a norm's statistics, the log-sum-exp of attention, a dropout mask, the indices of a pooling). Equal calls share one
answer, so that repeated layers cost next to nothing. Memory is counted where it lies: what keeps a view keeps the whole value that the
view looks at.

    kept = kept_values(program)             # after normalisation and folding, before or after sharding decisions
    kept.of_op[node].operands               # per tensor_operands(node): does the op keep it
    kept.of_op[node].outputs                # per output
    kept.of_op[node].extra_bytes            # what it keeps besides, at global size
    kept.base[node, k]                      # the value that has the memory of output k of node; itself if it is no view
    kept.values                             # bases that some op keeps, each once

Sharding changes none of the flags: an op keeps its operand in the layout that its strategy wants, and its result in the layout it gives.
A converted operand is therefore kept converted; that the value before the conversion is not kept, unless another op keeps it, follows.
Parameters, buffers and inputs are there anyway, and are in `values` where an op keeps them. Inside a region of torch.utils.checkpoint
nothing is kept but what the region reads from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from autoshard import autocast
from autoshard.ops.row import TensorInfo
from autoshard.program import Program, facts, op_name, op_of, producer, tensor_operands
from autoshard.torch_internals import FakeTensor, FakeTensorMode, fake_mode

Value = tuple[fx.Node, int]  # a producing node and the number of its output


@dataclass(frozen=True)
class Saves:
    """What one op keeps: flags per tensor operand (in schema order, one per use) and per output, and bytes besides (global size)."""

    operands: tuple[bool, ...] = ()
    outputs: tuple[bool, ...] = ()
    extra_bytes: int = 0


@dataclass
class Kept:
    """What the ops of a program keep. `assumed`: ops that could not be run without values; they are taken to keep everything they read."""

    of_op: dict[fx.Node, Saves] = field(default_factory=dict)
    base: dict[Value, Value] = field(default_factory=dict)
    values: set[Value] = field(default_factory=set)
    assumed: list[fx.Node] = field(default_factory=list)

    @property
    def extra_bytes(self) -> dict[fx.Node, int]:
        """Ops that keep tensors of their own, with their bytes at global size."""
        return {node: saves.extra_bytes for node, saves in self.of_op.items() if saves.extra_bytes}


@dataclass(frozen=True)
class _Strided:
    """A value as an op sees it: strides decide whether a reshape copies, and so what is kept."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool

    @classmethod
    def contiguous(cls, info: TensorInfo) -> _Strided:
        shape = tuple(map(int, info.shape))
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= max(size, 1)
        return cls(shape, tuple(reversed(strides)), info.dtype, info.needs_grad)


@dataclass(frozen=True)
class _Answer:
    """Of one call: per output its strides and the operand whose memory it is (None: its own); what is kept; whether it was run."""

    strides: tuple[tuple[int, ...], ...]
    views: tuple[int | None, ...]
    saves: Saves
    is_known: bool = True


def kept_values(program: Program) -> Kept:
    """What autograd keeps for backward of a program before sharding; sizes that may change are taken at their example.

    Milliseconds for repeated layers, about a millisecond for each distinct call.
    """
    kept, mode = Kept(), fake_mode()
    seen: dict[Value, _Strided] = {}
    known: dict[object, _Answer] = {}
    for node in program.graph.nodes:
        infos = facts(node).values
        if node.op == "placeholder":
            seen[node, 0], kept.base[node, 0] = _Strided.contiguous(infos[0]), (node, 0)
        if facts(node).role != "op":
            continue
        sources = [producer(operand) for operand in tensor_operands(node)]
        operands = [seen[source] for source in sources]
        key = (op_of(node), facts(node).autocast, tuple(operands), _frozen(node.args), _frozen(node.kwargs), len(infos))
        if key not in known:
            known[key] = _ask(node, operands, mode)
        answer = known[key]
        if not answer.is_known:
            kept.assumed.append(node)
        kept.of_op[node] = answer.saves
        for k, info in enumerate(infos):
            seen[node, k] = replace(_Strided.contiguous(info), strides=answer.strides[k])
            view = answer.views[k]
            kept.base[node, k] = (node, k) if view is None else kept.base[sources[view]]
    _settle(kept)
    return kept


def _settle(kept: Kept) -> None:
    """Empty what regions keep inside, and collect the kept values."""
    for node, saves in kept.of_op.items():
        sources, region = [producer(operand) for operand in tensor_operands(node)], facts(node).recompute
        if region is not None:
            enters = [facts(source).recompute != region and facts(node).needs_grad for source, _ in sources]
            saves = kept.of_op[node] = Saves(tuple(enters), (False,) * len(saves.outputs), 0)
        kept.values |= {kept.base[source] for source, is_kept in zip(sources, saves.operands, strict=True) if is_kept}
        kept.values |= {kept.base[node, k] for k, is_kept in enumerate(saves.outputs) if is_kept}


def _frozen(value: Any) -> Any:
    """An argument as a dictionary's key; nodes, whose values are part of the key by themselves, are all alike."""
    if isinstance(value, fx.Node):
        return "node"
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, (dict, slice)):
        return str(value)
    return (type(value).__name__, value)  # 1, 1.0 and True are equal and mean different calls


def _ask(node: fx.Node, operands: Sequence[_Strided], mode: FakeTensorMode) -> _Answer:
    """Run one op on tensors without memory: first as the CPU would, else by shapes alone; if neither can be had, assume."""
    for device, context in (("cpu", mode), ("meta", nullcontext())):
        try:
            with context:
                return _run(node, [_tensor(x, mode, device) for x in operands], device)
        except Exception:  # an op that must see values, or that has no such kernel
            continue
    contiguous = tuple(_Strided.contiguous(info).strides for info in facts(node).values)
    saves = Saves(tuple(facts(node).needs_grad for _ in operands), (False,) * len(contiguous))
    return _Answer(contiguous, (None,) * len(contiguous), saves, is_known=False)


def _tensor(x: _Strided, mode: FakeTensorMode, device: str) -> Tensor:
    meta = torch.empty_strided(x.shape, x.strides, dtype=x.dtype, device="meta")
    tensor = FakeTensor(mode, meta, torch.device("cpu")) if device == "cpu" else meta
    return tensor.requires_grad_(x.needs_grad)


def _run(node: fx.Node, tensors: Sequence[Tensor], device: str) -> _Answer:
    given = iter(tensors)
    by_node: dict[fx.Node, list[Tensor]] = {}
    for operand in tensor_operands(node):
        by_node.setdefault(operand, []).append(next(given))
    args, kwargs = (_localized(fx.map_arg(x, lambda operand: by_node[operand][0]), device) for x in (node.args, dict(node.kwargs)))
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    regions = tuple(region._replace(device="cpu") for region in facts(node).autocast[:1])
    with autocast.entered(regions), saved_tensors_hooks(keep, lambda x: x):
        result = op_of(node)(*args, **kwargs)
    outputs = [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]
    if len(outputs) != len(facts(node).values):
        raise TypeError(f"{op_name(node)} gives {len(outputs)} tensors")
    memories = [_memory(x) for x in tensors]
    views = tuple(memories.index(_memory(x)) if _memory(x) in memories else None for x in outputs)
    own = [_memory(x) for x in outputs]
    kept = {_memory(x): x for x in saved}
    extra = sum(x.untyped_storage().nbytes() for memory, x in kept.items() if memory not in memories and memory not in own)
    saves = Saves(tuple(m in kept for m in memories), tuple(m in kept and v is None for m, v in zip(own, views, strict=True)), extra)
    return _Answer(tuple(tuple(x.stride()) for x in outputs), views, saves)


def _localized(value: Any, device: str) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_localized(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _localized(item, device) for name, item in value.items()}
    return torch.device(device) if isinstance(value, torch.device) else value


def _memory(tensor: Tensor) -> int:
    """What two tensors have in common that share memory."""
    return tensor.untyped_storage()._cdata
