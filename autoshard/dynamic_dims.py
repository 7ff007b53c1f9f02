"""Which dims of the arguments may change from call to call: what the user writes, read against one call.

    dynamic="batch"                                        dim 0 of every tensor argument
    dynamic={"ids": {0: "batch", 1: "seq"}, "labels": "batch"}   by argument name; a name alone means dim 0
    dynamic=({0: "batch"}, None)                           by position
    dynamic={"ids": {1: torch.export.Dim("seq", max=512)}}  with a range

The same name is the same size. In an argument that is a list or dict of tensors, dims apply to every tensor in it, and a
list or dict of such entries tells them apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoshard.errors import InputError
from autoshard.torch_internals import pytree

_DIM: Any = type(torch.export.Dim("name"))
Dynamic = str | Mapping[Any, Any] | Sequence[Any] | None


@dataclass(frozen=True)
class Mark:
    """One dim that may change: the name of its size, and the range that the user gave."""

    name: str
    least: int = 2
    most: int | None = None


Marks = tuple[Mapping[int, Mark], ...]  # per leaf of (args, kwargs): dim -> its mark


@dataclass(frozen=True)
class LeafMarks:
    """Marks that a plan was made with, for calls of the same structure."""

    marks: Marks


def marks_of(model: nn.Module, dynamic: Dynamic | LeafMarks, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Marks:
    """The dims that `dynamic` names, for every leaf of (args, kwargs). Raises InputError for what names no dim of this call."""
    leaves: Any = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]
    if dynamic is None:
        return ()
    if isinstance(dynamic, LeafMarks):
        return dynamic.marks if len(dynamic.marks) == len(leaves) else ()
    positional = _positional_names(model, len(args))
    by_name = _by_name(dynamic, positional, model, kwargs)
    marks = []
    for (kind, top, *rest), leaf in leaves:
        name = positional[top.idx] if kind.idx == 0 else top.key
        found = {0: dynamic} if isinstance(dynamic, str) and _has_dims(leaf) else _entry(by_name.get(name), rest, leaf, name)
        marks.append({dim: _mark(mark, name) for dim, mark in found.items()})
    _check_lengths(marks, [leaf for _, leaf in leaves])
    return tuple(marks)


def without_short(marks: Marks, leaves: Sequence[Any]) -> Marks:
    """Marks of sizes of 2 and more: torch treats lengths of 0 and 1 differently, so that one graph cannot serve both."""
    if not marks:
        return ()
    short = {mark.name for dims, leaf in zip(marks, leaves, strict=True) for dim, mark in dims.items() if leaf.shape[dim] < 2}
    return tuple({dim: mark for dim, mark in dims.items() if mark.name not in short} for dims in marks)


def _positional_names(model: nn.Module, count: int) -> list[str]:
    """The name of each positional argument."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    single = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [*single, *(f"{p.name}[{k}]" for p in parameters if p.kind == p.VAR_POSITIONAL for k in range(count))]


def _by_name(dynamic: Dynamic, positional: Sequence[str], model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of each argument."""
    if isinstance(dynamic, str):
        return {}
    if isinstance(dynamic, Sequence):
        dynamic = dict(enumerate(dynamic))
    if not isinstance(dynamic, Mapping):
        raise InputError(f'dynamic is a name, or a dict like {{"ids": {{0: "batch"}}}}, not {dynamic!r}')
    known = {**dict.fromkeys(positional), **dict.fromkeys(inspect.signature(model.forward).parameters), **dict.fromkeys(kwargs)}
    found = {}
    for key, entry in dynamic.items():
        name = positional[key] if isinstance(key, int) and 0 <= key < len(positional) else key
        if name not in known:
            raise InputError(f"dynamic names {key!r}, which is no argument of {type(model).__name__}; its arguments are {', '.join(known)}")
        found[name] = entry
    return found


def _has_dims(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


def _entry(entry: Any, rest: Sequence[Any], leaf: Any, name: str) -> dict[int, Any]:
    """Dims that an argument's entry names of the leaf at path `rest` in it."""
    for step in rest:
        key = getattr(step, "idx", getattr(step, "key", getattr(step, "name", None)))
        if isinstance(entry, (list, tuple)) and isinstance(key, int) and key < len(entry):
            entry = entry[key]
        elif isinstance(entry, Mapping) and not all(isinstance(k, int) for k in entry):
            entry = entry.get(key)
    if entry is None or (rest and not _has_dims(leaf)) or leaf is None:
        return {}
    dims = {0: entry} if isinstance(entry, (str, _DIM)) else entry
    if not isinstance(dims, Mapping) or not all(isinstance(dim, int) for dim in dims):
        raise InputError(f'dynamic says {entry!r} of {name}; write its dims and their names, like {{0: "batch"}}')
    if not isinstance(leaf, torch.Tensor):
        raise InputError(f"dynamic names dims of {name}, which is {leaf!r} in this call, not a tensor")
    wrong = [dim for dim in dims if not -leaf.dim() <= dim < leaf.dim()]
    if wrong:
        raise InputError(f"dynamic names dim {wrong[0]} of {name}, which has shape {tuple(leaf.shape)}")
    return {dim % leaf.dim(): mark for dim, mark in dims.items() if mark is not None}


def _mark(mark: Any, name: str) -> Mark:
    if isinstance(mark, str):
        return Mark(mark)
    if not isinstance(mark, _DIM):
        raise InputError(f'dynamic says {mark!r} of a dim of {name}; give a name like "batch", or torch.export.Dim("batch", max=64)')
    most = None if mark.max > 2**62 else int(mark.max)  # without an upper bound torch says infinity, or the largest integer
    return Mark(mark.__name__, max(2, int(mark.min)), most)


def _check_lengths(marks: Sequence[Mapping[int, Mark]], leaves: Sequence[Any]) -> None:
    """One name has one length and one range."""
    lengths: dict[str, set[int]] = {}
    ranges: dict[str, set[tuple[int, int | None]]] = {}
    for dims, leaf in zip(marks, leaves, strict=True):
        for dim, mark in dims.items():
            lengths.setdefault(mark.name, set()).add(int(leaf.shape[dim]))
            ranges.setdefault(mark.name, set()).add((mark.least, mark.most))
    for name, found in lengths.items():
        if len(found) > 1:
            raise InputError(f"{name} is the name of one size, and this call has lengths {sorted(found)} there; give them different names")
        if len(ranges[name]) > 1:
            raise InputError(f"{name} has several ranges in dynamic; give the same torch.export.Dim everywhere")
