"""Equations of ops whose factors depend on the call: on its shapes, its dims or its flags.

Each builder takes a Call and returns the equation as text, with the sizes of factors that no shape shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True)
class TensorInfo:
    """Global shape and dtype of a tensor, and whether a gradient flows to it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool = False

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Call:
    """One use of an op: its arguments by schema name (tensors as TensorInfo), and its tensor operands in schema order."""

    op: str
    arguments: Mapping[str, Any]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)


Sized = tuple[str, Mapping[str, int]]


def _names(count: int, letter: str = "d") -> list[str]:
    return [f"{letter}{k}" for k in range(count)]


def _text(inputs: Sequence[str], outputs: Sequence[str]) -> str:
    return f"{', '.join(inputs)} -> {', '.join(outputs)}"


def _dims(call: Call, argument: str, ndim: int) -> list[int]:
    """Dims that an int, a list or None (all) names, counted from the front."""
    given = call.get(argument)
    listed = list(range(ndim)) if given is None or given == [] else [given] if isinstance(given, int) else list(given)
    return sorted(dim % max(ndim, 1) for dim in listed)


def pointwise(call: Call) -> str:
    """Elementwise, with broadcasting; not linear."""
    return _text(["p*"] * len(call.inputs), ["p*"])


def additive(call: Call) -> str:
    """Sums of tensors; a scalar term makes the op affine, so then partial terms would each add it."""
    return _text(["+p*"] * 2, ["p*"]) if len(call.inputs) == 2 else pointwise(call)


def multilinear(call: Call) -> str:
    """Elementwise, linear in each operand."""
    return _text(["~p*"] * len(call.inputs), ["p*"])


def first_linear(call: Call) -> str:
    """Elementwise, linear in the first operand."""
    return _text(["~p*", *["p*"] * (len(call.inputs) - 1)], ["p*"])


def cast(call: Call) -> str:
    """Linear, except from floats to integers: a sum rounded is not the sum of the terms rounded."""
    mark = "" if call.inputs[0].dtype.is_floating_point and not call.outputs[0].dtype.is_floating_point else "~"
    return _text([f"{mark}p*", *["[w*]"] * (len(call.inputs) - 1)], ["p*"])


def addmm(call: Call) -> str:
    """beta * bias + alpha * a @ b, bias of shape (n) or (m, n)."""
    return "+n, ~m k, ~k n -> m n" if len(call.inputs[0].shape) == 1 else "+m n, ~m k, ~k n -> m n"


def matmul(call: Call) -> str:
    """torch.matmul: vectors, matrices and broadcast batches of matrices."""
    a, b = (len(t.shape) for t in call.inputs)
    left = "~k" if a == 1 else "~b* m k"
    right = "~k" if b == 1 else "~k n" if b == 2 else "~b* k n"
    out = " ".join([*(["b*"] if max(a, b) > 2 else []), *(["m"] if a > 1 else []), *(["n"] if b > 1 else [])])
    return f"{left if a != 2 or b > 2 else '~m k'}, {right} -> {out}"


def convolution(call: Call) -> str:
    """Whole in space; input channels are contracted; with groups the channels stay whole."""
    space = len(call.inputs[1].shape) - 2
    batch = "b " if len(call.inputs[0].shape) == space + 2 else ""
    i, o = ("i", "o") if call.get("groups", 1) == 1 else ("[i]", "[o]")
    x, w, y = (" ".join(f"[{name}]" for name in _names(space, letter)) for letter in "xwy")
    weight_in = i if call.get("groups", 1) == 1 else "[j]"
    return f"~{batch}{i} {x}, ~{o} {weight_in} {w}, +{o} -> {batch}{o} {y}"


def attention(call: Call) -> str:
    """softmax(q k^T) v: keys stay whole, queries too under a causal mask; grouped queries share their keys' heads."""
    query = "[q]" if call.get("is_causal") else "q"
    heads, grouped = "", ""
    sizes = {}
    if call.get("enable_gqa") and call.inputs[0].shape[-3] != call.inputs[1].shape[-3]:
        heads, grouped = "g ", "(g r) "
        sizes["g"] = call.inputs[1].shape[-3]
        mask = _grouped_mask(call.inputs[3].shape, query) if len(call.inputs) > 3 else f"{query} [k]"
    else:
        mask = f"b* {query} [k]"
    text = f"b* {grouped}{query} [d], b* {heads}[k] [d], ~b* {heads}[k] e, {mask} -> b* {grouped}{query} e"
    return (text, sizes) if sizes else text  # type: ignore[return-value]


def _grouped_mask(shape: Sequence[int], query: str) -> str:
    """A mask per query head is split as the heads are."""
    heads = "" if len(shape) < 3 else "b* 1 " if shape[-3] == 1 else "b* (g r) "
    return f"{heads}{query} [k]"


def embedding(call: Call) -> str:
    """Rows looked up; gradients scaled by how often a row occurs need all the indices, sparse ones the whole table."""
    if call.get("scale_grad_by_freq") or call.get("sparse"):
        return "~[v] h, [b*] -> [b*] h"
    return "~v h, b* -> b* h"


def last_dims_norm(call: Call) -> str:
    """Normalisation over the last dims; what else it returns has length 1 there."""
    names = _names(len(call.get("normalized_shape")), "n")
    whole = " ".join(f"[{name}]" for name in names)
    statistics = " ".join("1" for _ in names)
    return _text([f"b* {whole}", *[whole] * (len(call.inputs) - 1)], [f"b* {whole}", *[f"b* {statistics}"] * (len(call.outputs) - 1)])


def batch_norm(call: Call) -> str:
    """Statistics are sums over batch and space, which the lowering makes exact; tracked statistics keep channels whole."""
    channel = "[c]" if call.get("training") and call.get("running_mean") is not None else "c"
    return _text([f"b {channel} s*", *[channel] * (len(call.inputs) - 1)], [f"b {channel} s*"])


def whole_dim(call: Call) -> str:
    """Works along one dim, or along all; the others are untouched."""
    ndim = len(call.inputs[0].shape)
    if call.get("dim") is None:
        return _text([" ".join(f"[{n}]" for n in _names(ndim))], [" ".join("1" for _ in call.outputs[0].shape)])
    dim = call.get("dim") % max(ndim, 1)
    names = _names(ndim)
    out = [f"[{n}]" if k == dim else n for k, n in enumerate(names)]
    if len(call.outputs[0].shape) < ndim or (call.outputs[0].shape and call.outputs[0].shape[dim] != call.inputs[0].shape[dim]):
        kept = ["1" if k == dim else n for k, n in enumerate(names)]
        return _text([" ".join(out)], [" ".join(n for k, n in enumerate(kept) if call.get("keepdim") or k != dim)])
    return _text([" ".join(out)], [" ".join(out)])


def cross_entropy(call: Call) -> str:
    """Classes on dim 1 (dim 0 of a single sample); targets are class numbers, or probabilities of the input's shape."""
    logits, target = call.inputs[:2]
    batch = "b " if len(logits.shape) > 1 else ""
    given_probabilities = target.dtype.is_floating_point
    wanted = f"{batch}c s*" if given_probabilities else f"{batch}s*"
    weight = ", c" if len(call.inputs) > 2 else ""
    out = f"{batch}s*" if call.get("reduction", 1) == 0 else ""
    text = f"{batch}c s*, {wanted}{weight} -> {out}"
    return text.replace("c", "[c]").replace("b ", "[b] ").replace("s*", "[s*]") if given_probabilities else text


def _reduced(call: Call, mark: str, whole: bool) -> str:
    ndim = len(call.inputs[0].shape)
    over = set(_dims(call, "dim", ndim))
    names = [f"d{k}" if k in over else f"k{k}" for k in range(ndim)]
    kept = ["1" if k in over else n for k, n in enumerate(names) if k not in over or call.get("keepdim")]
    source = [f"[{n}]" if whole and k in over else n for k, n in enumerate(names)]
    return _text([mark + " ".join(source)], [" ".join(kept)])


def reduction(call: Call) -> str:
    """Sums over dims; terms must not be rounded to integers first."""
    rounds = call.inputs[0].dtype.is_floating_point and not call.outputs[0].dtype.is_floating_point
    return _reduced(call, "" if rounds else "~", False)


def whole_reduction(call: Call) -> str:
    """Reduces dims that stay whole."""
    return _reduced(call, "", True)


def reshape(call: Call) -> Sized:
    """Common refinement of both shapes: `(a b) c -> a (b c)`; dims that share no refinement stay whole."""
    source, target = list(call.inputs[0].shape), list(call.outputs[0].shape)
    sizes: dict[str, int] = {}
    left: list[list[str]] = [[] for _ in source]
    right: list[list[str]] = [[] for _ in target]
    i = j = 0
    a, b = _at(source, 0), _at(target, 0)
    while i < len(source) or j < len(target):
        if a == 1 and i < len(source):
            i, a = i + 1, _at(source, i + 1)
        elif b == 1 and j < len(target):
            j, b = j + 1, _at(target, j + 1)
        elif not a or not b or (a % b and b % a):
            return _whole_reshape(source, target)
        else:
            name = f"f{len(sizes)}"
            sizes[name] = min(a, b)
            left[i].append(name)
            right[j].append(name)
            a, b = a // sizes[name], b // sizes[name]
    return f"~{_spell(left)} -> {_spell(right)}", sizes


def _at(shape: Sequence[int], k: int) -> int:
    return shape[k] if k < len(shape) else 1


def _whole_reshape(source: Sequence[int], target: Sequence[int]) -> Sized:
    """Leading dims that agree are factors of their own, the rest is whole."""
    same = 0
    while same < min(len(source), len(target)) and source[same] == target[same]:
        same += 1
    lead = _names(same, "f")
    parts = [" ".join([*lead, *(f"[{n}]" for n in _names(len(shape) - same, letter))]) for shape, letter in ((source, "x"), (target, "y"))]
    return f"~{parts[0]} -> {parts[1]}", {}


def _spell(dims: Sequence[Sequence[str]]) -> str:
    return " ".join("1" if not dim else dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in dims)


def squeeze(call: Call) -> str:
    """Drops dims of length 1; a longer one that is named stays whole, since its pieces may have length 1."""
    shape = call.inputs[0].shape
    named = set(_dims(call, "dim", len(shape))) if call.get("dim") != [] else set()
    source = ["1" if k in named and size == 1 else f"[d{k}]" if k in named else f"d{k}" for k, size in enumerate(shape)]
    return _text(["~" + " ".join(source)], [" ".join(term for term in source if term != "1")])


def permute(call: Call) -> str:
    """Dims in another order."""
    ndim = len(call.inputs[0].shape)
    order = list(range(ndim))
    if "dim0" in call.arguments:
        if ndim:
            a, b = call.get("dim0") % ndim, call.get("dim1") % ndim
            order[a], order[b] = order[b], order[a]
    elif "dims" in call.arguments:
        order = [dim % ndim for dim in call.get("dims")]
    else:
        order.reverse()
    names = _names(ndim)
    return _text(["~" + " ".join(names)], [" ".join(names[k] for k in order)])


def expand(call: Call) -> str:
    """Repeats dims of length 1, and adds dims in front."""
    before, after = call.inputs[0].shape, call.outputs[0].shape
    names = _names(len(after))
    skipped = len(after) - len(before)
    source = [n if before[k] == after[k + skipped] else "1" for k, n in enumerate(names[skipped:])]
    return _text(["~" + " ".join(source)], [" ".join(names)])


def resized_dims(call: Call) -> str:
    """Dims whose length the op changes, or that it moves along, stay whole; the others are untouched."""
    moved = set(_dims(call, "dims", len(call.inputs[0].shape))) if call.get("dims") is not None else set()
    padding = call.get("pad", ())  # two numbers per dim, the last dim first; (1, -1) moves a dim and keeps its length
    moved |= {len(call.inputs[0].shape) - 1 - k // 2 for k, width in enumerate(padding) if width}
    if call.op == "aten.diff.default":
        moved.add(call.get("dim", -1) % len(call.inputs[0].shape))
    shapes = [t.shape for t in (*call.inputs, *call.outputs)]
    kept = [len({shape[k] for shape in shapes}) == 1 and k not in moved for k in range(len(shapes[0]))]
    operand = [" ".join(f"d{k}" if keep else f"[m{k}x{t}]" for k, keep in enumerate(kept)) for t in range(len(shapes))]
    mark = "~" if len(call.inputs) == 1 and not padding else ""
    return _text([mark + operand[0], *operand[1:-1]], operand[-1:])


def select(call: Call) -> str:
    """Drops one dim, which stays whole."""
    ndim = len(call.inputs[0].shape)
    dim = call.get("dim") % ndim
    names = _names(ndim)
    source = " ".join(f"[{n}]" if k == dim else n for k, n in enumerate(names))
    return _text(["~" + source], [" ".join(n for k, n in enumerate(names) if k != dim)])


def _pieces(whole: TensorInfo, parts: Sequence[TensorInfo], dim: int) -> tuple[str, list[str], dict[str, int]]:
    """The joined operand, its parts, and the sizes of the parts' factors."""
    names = _names(len(whole.shape))
    pieces = [f"q{k}" for k in range(len(parts))]
    sizes = {piece: part.shape[dim] for piece, part in zip(pieces, parts, strict=True)}
    long = " ".join("|".join(pieces) if k == dim and len(pieces) > 1 else pieces[0] if k == dim else n for k, n in enumerate(names))
    short = [" ".join(piece if k == dim else n for k, n in enumerate(names)) for piece in pieces]
    return long, short, sizes


def split(call: Call) -> Sized:
    """Pieces along one dim, all split together; an only piece stays whole, as its length is an argument."""
    dim = call.get("dim", 0) % len(call.inputs[0].shape)
    if len(call.outputs) == 1:
        names = " ".join(f"[{n}]" if k == dim else n for k, n in enumerate(_names(len(call.inputs[0].shape))))
        return _text(["~" + names], [names]), {}
    long, short, sizes = _pieces(call.inputs[0], call.outputs, dim)
    return _text(["~" + long], short), sizes


def concatenate(call: Call) -> Sized:
    """Joins along one dim, whose parts are split together."""
    dim = call.get("dim", 0) % len(call.outputs[0].shape)
    long, short, sizes = _pieces(call.outputs[0], call.inputs, dim)
    return _text(["+" + piece for piece in short], [long]), sizes


def unbind(call: Call) -> str:
    """Takes one dim apart, which stays whole."""
    ndim = len(call.inputs[0].shape)
    dim = call.get("dim", 0) % ndim
    names = _names(ndim)
    out = " ".join(n for k, n in enumerate(names) if k != dim)
    return _text(["~" + " ".join(f"[{n}]" if k == dim else n for k, n in enumerate(names))], [out] * len(call.outputs))


def stack(call: Call) -> str:
    """A new dim, which stays whole."""
    ndim = len(call.outputs[0].shape)
    dim = call.get("dim", 0) % ndim
    names = _names(ndim)
    out = " ".join(f"[{n}]" if k == dim else n for k, n in enumerate(names))
    return _text(["+" + " ".join(n for k, n in enumerate(names) if k != dim)] * len(call.inputs), [out])
