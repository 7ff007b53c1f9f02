"""Ops that move, join and cut dims."""

from __future__ import annotations

from collections.abc import Sequence

from autoshard.ops.row import Call, Limited, Lowering, Rule, Sized, TensorInfo, dims_of, letters, rows, spell

SHIFTED = "uvw"  # factors of the first dims that an op moves numbers along: each is split by an argument of its own


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
    lead = letters(same, "f")
    parts = [" ".join([*lead, *(f"[{n}]" for n in letters(len(shape) - same, letter))]) for shape, letter in ((source, "x"), (target, "y"))]
    return f"~{parts[0]} -> {parts[1]}", {}


def _spell(dims: Sequence[Sequence[str]]) -> str:
    return " ".join("1" if not dim else dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in dims)


def squeeze(call: Call) -> str:
    """Drops dims of length 1; a longer one that is named stays whole, since its pieces may have length 1."""
    shape = call.inputs[0].shape
    named = set(dims_of(call, "dim", len(shape))) if call.get("dim") != [] else set()
    source = ["1" if k in named and size == 1 else f"[d{k}]" if k in named else f"d{k}" for k, size in enumerate(shape)]
    return spell(["~" + " ".join(source)], [" ".join(term for term in source if term != "1")])


def permute(call: Call) -> str:
    """Dims in another order."""
    ndim = len(call.inputs[0].shape)
    order = list(range(ndim))
    if "dim0" in call.arguments:
        if ndim:
            a, b = call.get("dim0") % ndim, call.get("dim1") % ndim
            order[a], order[b] = order[b], order[a]
    elif "axis0" in call.arguments:
        a, b = call.get("axis0") % ndim, call.get("axis1") % ndim
        order[a], order[b] = order[b], order[a]
    elif "source" in call.arguments:
        order = _moved(ndim, call.get("source"), call.get("destination"))
    elif "dims" in call.arguments:
        order = [dim % ndim for dim in call.get("dims")]
    elif call.op != "aten.numpy_T.default" and ndim > 1:  # mT, mH, adjoint, matrix_H: the last two dims
        order[-2:] = [ndim - 1, ndim - 2]
    else:
        order.reverse()
    names = letters(ndim)
    return spell(["~" + " ".join(names)], [" ".join(names[k] for k in order)])


def _moved(ndim: int, source: int | Sequence[int], destination: int | Sequence[int]) -> list[int]:
    """The order of dims after those of `source` went to the places of `destination`."""
    pairs = zip(*([d % ndim for d in ([given] if isinstance(given, int) else given)] for given in (source, destination)), strict=True)
    places = {to: at for at, to in pairs}
    rest = iter(k for k in range(ndim) if k not in places.values())
    return [places[k] if k in places else next(rest) for k in range(ndim)]


def expand(call: Call) -> str:
    """Repeats dims of length 1, and adds dims in front."""
    before, after = call.inputs[0].shape, call.outputs[0].shape
    names = letters(len(after))
    skipped = len(after) - len(before)
    source = [n if before[k] == after[k + skipped] else "1" for k, n in enumerate(names[skipped:])]
    return spell(["~" + " ".join(source)], [" ".join(names)])


def expand_like(call: Call) -> str:
    """Repeats dims of length 1 to the shape of the second operand, whose values are not read."""
    inner = expand(call)
    source, _, out = inner.partition(" -> ")
    return f"{source}, {out} -> {out}"


def reshape_like(call: Call) -> Sized:
    """The shape of the second operand, whose values are not read."""
    text, sizes = reshape(call)
    source, _, out = text.partition(" -> ")
    return f"{source}, {out} -> {out}", sizes


def broadcast(call: Call) -> str:
    """Each tensor repeated along its dims of length 1 to one shape."""
    after = call.outputs[0].shape
    names = letters(len(after))
    operands = []
    for t in call.inputs:
        own = names[len(after) - len(t.shape) :]
        operands.append(
            "+"
            + " ".join(n if size == full else "1" for n, size, full in zip(own, t.shape, after[len(after) - len(t.shape) :], strict=True))
        )
    return spell(operands, [" ".join(names)] * len(call.inputs))


def tiles(call: Call) -> str:
    """Dims repeated as blocks: those that are repeated stay whole."""
    before, after = call.inputs[0].shape, call.outputs[0].shape
    names = letters(len(after))
    own = names[len(after) - len(before) :]
    kept = [a == b for a, b in zip(before, after[len(after) - len(before) :], strict=True)]
    source = [n if keep else f"[x{n}]" for n, keep in zip(own, kept, strict=True)]
    lead = [f"[{n}]" for n in names[: len(after) - len(before)]]
    out = [*lead, *(n if keep else f"[{n}]" for n, keep in zip(own, kept, strict=True))]
    return spell(["~" + " ".join(source)], [" ".join(out)])


def windows(call: Call) -> str:
    """Sliding windows along one dim, which stays whole; a new last dim holds each window."""
    ndim = len(call.inputs[0].shape)
    dim = call.get("dimension") % max(ndim, 1)
    source = " ".join(f"[m{k}]" if k == dim else f"d{k}" for k in range(ndim))
    out = " ".join([*(f"[n{k}]" if k == dim else f"d{k}" for k in range(ndim)), "[w]"])
    return spell(["~" + source], [out])


def bytes_viewed(call: Call) -> str:
    """Bits read as another dtype: no sum. The last dim changes length with the size of the dtype and stays whole then."""
    ndim = len(call.inputs[0].shape)
    names = letters(ndim)
    same = call.inputs[0].dtype.itemsize == call.outputs[0].dtype.itemsize
    source, out = ([n if same or k < ndim - 1 else f"[{letter}]" for k, n in enumerate(names)] for letter in "xy")
    return spell([" ".join(source)], [" ".join(out)])


def resized_dims(call: Call) -> str:
    """Dims whose length the op changes stay whole, as pieces of the result would end where no piece did; the others are untouched."""
    moved = set(dims_of(call, "dims", len(call.inputs[0].shape))) if call.get("dims") is not None else set()
    moved |= {"aten.flipud.default": {0}, "aten.fliplr.default": {1}}.get(call.op, set())
    if call.op in ("aten.diff.default", "aten.narrow.default"):
        moved.add(call.get("dim", -1) % len(call.inputs[0].shape))
    shapes = [t.shape for t in (*call.inputs, *call.outputs)]
    kept = [len({shape[k] for shape in shapes}) == 1 and k not in moved for k in range(len(shapes[0]))]
    operand = [" ".join(f"d{k}" if keep else f"[m{k}x{t}]" for k, keep in enumerate(kept)) for t in range(len(shapes))]
    mark = "~" if len(call.inputs) == 1 else ""
    return spell([mark + operand[0], *operand[1:-1]], operand[-1:])


def flipped(call: Call) -> str:
    """Dims that are turned round stay whole: pieces would change places with their mirror images; the others are untouched."""
    return resized_dims(call)


def sliced(call: Call) -> Sized:
    """A part of one dim, which stays whole, unless it is one of every few numbers of all: then each piece gives its own."""
    shape, step, start = call.inputs[0].shape, call.get("step", 1), call.get("start") or 0
    dim = call.get("dim", 0) % len(shape)
    is_spread = 0 <= start < step and shape[dim] % step == 0 and call.outputs[0].shape[dim] == shape[dim] // step
    if step == 1 or not is_spread:
        return resized_dims(call), {}
    names = letters(len(shape))
    return spell(["~" + " ".join(f"({n} [s])" if k == dim else n for k, n in enumerate(names))], [" ".join(names)]), {"s": step}


def padded(call: Call) -> Limited:
    """Padded dims stay whole, unless all is moved along and as much falls off: the neighbour lends that, to a constant's other end."""
    shape, widths = call.inputs[0].shape, call.get("pad")
    is_constant, value = call.get("mode", "constant") == "constant", call.get("value")
    source, out, limits = letters(len(shape)), letters(len(shape)), {}
    for number, k in enumerate(_padded_dims(len(shape), widths)):
        before, after = _widths(len(shape), widths, k)
        source[k], out[k] = f"[m{k}]", f"[n{k}]"
        if is_constant and before == -after and number < len(SHIFTED):
            source[k] = out[k] = SHIFTED[number]
            limits[SHIFTED[number]] = shape[k] // abs(before)
    mark = "" if is_constant and value else "~"
    return spell([mark + " ".join(source)], [" ".join(out)]), {}, limits


def _widths(ndim: int, widths: Sequence[int], dim: int) -> tuple[int, int]:
    """What is put before and after a dim; `widths` has two numbers per dim, the last dim first."""
    at = 2 * (ndim - 1 - dim)
    return tuple(widths[at : at + 2])  # type: ignore[return-value]


def _padded_dims(ndim: int, widths: Sequence[int]) -> list[int]:
    return [dim for dim in range(ndim - len(widths) // 2, ndim) if any(_widths(ndim, widths, dim))]


def rolled(call: Call) -> Limited:
    """Dims moved round: up to three of them may be split, neighbours lend what moves; without dims all is one list, which stays whole."""
    ndim = len(call.inputs[0].shape)
    dims, shifts = ([given] if isinstance(given, int) else list(given or ()) for given in (call.get("dims"), call.get("shifts")))
    dims = [dim % ndim for dim in dims]
    names, limits = letters(ndim), {}
    if not dims or len(set(dims)) < len(dims):
        names = [f"[{name}]" if k in dims or not dims else name for k, name in enumerate(names)]
        return spell(["~" + " ".join(names)], [" ".join(names)]), {}, {}
    for number, (dim, shift) in enumerate(zip(dims, shifts, strict=True)):
        names[dim] = SHIFTED[number] if number < len(SHIFTED) else f"[{names[dim]}]"
        size = max(call.inputs[0].shape[dim], 1)
        limits[names[dim]] = size // max(min(shift % size, -shift % size), 1)
    return spell(["~" + " ".join(names)], [" ".join(names)]), {}, limits


def select(call: Call) -> str:
    """Drops one dim, which stays whole."""
    ndim = len(call.inputs[0].shape)
    dim = call.get("dim") % ndim
    names = letters(ndim)
    source = " ".join(f"[{n}]" if k == dim else n for k, n in enumerate(names))
    return spell(["~" + source], [" ".join(n for k, n in enumerate(names) if k != dim)])


def _pieces(whole: TensorInfo, parts: Sequence[TensorInfo], dim: int) -> tuple[str, list[str], dict[str, int]]:
    """The joined operand, its parts, and the sizes of the parts' factors."""
    names = letters(len(whole.shape))
    pieces = [f"q{k}" for k in range(len(parts))]
    sizes = {piece: part.shape[dim] for piece, part in zip(pieces, parts, strict=True)}
    long = " ".join("|".join(pieces) if k == dim and len(pieces) > 1 else pieces[0] if k == dim else n for k, n in enumerate(names))
    short = [" ".join(piece if k == dim else n for k, n in enumerate(names)) for piece in pieces]
    return long, short, sizes


def split(call: Call) -> Sized:
    """Pieces along one dim, all split together; an only piece stays whole, as its length is an argument."""
    dim = call.get("dim", 0) % len(call.inputs[0].shape)
    if len(call.outputs) == 1:
        names = " ".join(f"[{n}]" if k == dim else n for k, n in enumerate(letters(len(call.inputs[0].shape))))
        return spell(["~" + names], [names]), {}
    long, short, sizes = _pieces(call.inputs[0], call.outputs, dim)
    return spell(["~" + long], short), sizes


def concatenate(call: Call) -> Sized:
    """Joins along one dim, whose parts are split together."""
    dim = call.get("dim", 0) % len(call.outputs[0].shape)
    ndim = len(call.outputs[0].shape)
    joined = [t for t in call.inputs if len(t.shape) == ndim]  # an empty tensor of one dim is skipped, whatever the others' shape
    long, short, sizes = _pieces(call.outputs[0], joined, dim)
    pieces = iter(short)
    return spell(["+" + next(pieces) if len(t.shape) == ndim else "[e]" for t in call.inputs], [long]), sizes


def unbind(call: Call) -> str:
    """Takes one dim apart, which stays whole."""
    ndim = len(call.inputs[0].shape)
    dim = call.get("dim", 0) % ndim
    names = letters(ndim)
    out = " ".join(n for k, n in enumerate(names) if k != dim)
    return spell(["~" + " ".join(f"[{n}]" if k == dim else n for k, n in enumerate(names))], [out] * len(call.outputs))


def stack(call: Call) -> str:
    """A new dim, which stays whole."""
    ndim = len(call.outputs[0].shape)
    dim = call.get("dim", 0) % ndim
    names = letters(ndim)
    out = " ".join(f"[{n}]" if k == dim else n for k, n in enumerate(names))
    return spell(["+" + " ".join(n for k, n in enumerate(names) if k != dim)] * len(call.inputs), [out])


_SHIFT_AXES = {"u": "first_axes", "v": "second_axes", "w": "third_axes"}

ROWS: dict[str, Rule] = {
    # Shapes.
    **rows("view _unsafe_view", Rule(reshape, shape="size")),
    **rows("reshape", Rule(reshape, shape="shape")),
    **rows("unflatten.int", Rule(reshape, shape="sizes")),
    **rows("flatten.using_ints unsqueeze ravel atleast_1d atleast_2d atleast_3d", Rule(reshape)),
    **rows("reshape_as view_as", Rule(reshape_like)),
    **rows("view.dtype", Rule(bytes_viewed)),
    **rows("expand broadcast_to", Rule(expand, shape="size")),
    **rows("expand_as", Rule(expand_like)),
    **rows("broadcast_tensors", Rule(broadcast)),
    **rows("repeat tile", Rule(tiles)),
    **rows("unfold", Rule(windows)),
    **rows("permute transpose.int t numpy_T mT mH matrix_H adjoint", Rule(permute)),
    **rows("swapaxes swapdims movedim.int movedim.intlist moveaxis.int moveaxis.intlist", Rule(permute)),
    **rows("squeeze.dim squeeze squeeze.dims", Rule(squeeze)),
    **rows("slice.Tensor", Rule(sliced)),
    **rows("narrow diff", Rule(resized_dims)),
    **rows("flip fliplr flipud rot90", Rule(flipped)),
    **rows("pad constant_pad_nd", Rule(padded, Lowering("shift", _SHIFT_AXES, ordered=frozenset(SHIFTED)))),
    **rows("roll", Rule(rolled, Lowering("roll", _SHIFT_AXES, ordered=frozenset(SHIFTED)))),
    **rows("select.int", Rule(select)),
    **rows("chunk unsafe_chunk tensor_split.sections", Rule(split)),
    **rows("split.Tensor unsafe_split.Tensor", Rule(split, piece="split_size")),
    **rows("split_with_sizes unsafe_split_with_sizes", Rule(split, piece="split_sizes")),
    **rows("split.sizes", Rule(split, piece="split_size")),
    **rows("unbind.int", Rule(unbind)),
    **rows("cat concat concatenate", Rule(concatenate)),
    **rows("stack", Rule(stack)),
}
