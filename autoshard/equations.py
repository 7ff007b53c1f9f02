"""Equations over factors: the one-line notation that op rules are written in, and the strategies that follow from it.

    linear        ~b* i, ~o i, +o -> b* o
    layer_norm    b* [n], [n], [n] -> b* [n]
    view          b (t n d) -> b t n d
    chunk         b* q|k|v -> b* q, b* k, b* v
    avg_pool1d    b* [x] -> b* [y]; x&y

A term per dim of an operand: `i` a factor; `b*` any number of dims, each a factor of its own; `[n]` a factor that stays
whole; `(a [b])` a dim made of several factors, major first; `q|k|v` a dim that is the concatenation of several, which are
split together; `1` a dim without a factor. A factor that no output has is summed over. Marks on operands: `~` the op is
linear in this operand (jointly with the additive ones); `+` an additive operand. After `;` stand factors that a lowering
splits together on one axis, `x&y`, whether or not each may be split by itself; an operand with several of them is split
along the first. Factors of one dim `(x y)` are linked to cut that dim as one, wherever the cuts fall; operands that lack any
of them stay whole.

On one axis of n ranks, the sound strategies are
    1. inputs I -> outputs I, and inputs R -> outputs R (the work is done n times);
    2. for each factor that is not whole: operands and outputs that have it split, other operands R (additive ones P
       when the factor is summed), other outputs P;
    3. for each operand marked `~`: it and the additive ones P, the others R -> outputs P.
Operands that need no gradient take R where I is asked. Strategies on different axes compose freely while sizes divide. A factor that
does not divide may be split on one axis, its pieces padded, where `may_pad` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from autoshard.errors import RuleError
from autoshard.placements import I, P, Placement, R, S, padded_piece

Dim = tuple[str, ...]  # the factors of one dim, major first; () is a dim of size 1


@dataclass(frozen=True)
class Operand:
    """Dims of an input or output; `joined` holds, per dim, whether its factors are concatenated rather than multiplied."""

    dims: tuple[Dim, ...]
    joined: tuple[bool, ...]
    is_additive: bool = False
    is_linear: bool = False


@dataclass(frozen=True)
class Equation:
    """A parsed equation bound to shapes: `sizes` of every factor, `whole` the factors that may not be split."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    sizes: Mapping[str, int]
    whole: frozenset[str] = frozenset()
    joined: tuple[tuple[str, ...], ...] = field(default=())  # groups of factors that lie one after the other in a dim
    linked: tuple[tuple[str, ...], ...] = field(default=())  # groups of factors of different dims that are split together
    limits: Mapping[str, int] = field(default_factory=dict)  # most pieces of a factor or (`x&y`) of a linked group
    termless: frozenset[int] = frozenset()  # positions, inputs first, of operands and outputs that cannot be P
    ordered: frozenset[str] = frozenset()  # factors, without their numbers, that may not be split in segments
    settled: frozenset[str] = frozenset()  # factors, without their numbers, whose lowering leaves I where it says P
    lowered: frozenset[str] = frozenset()  # factors, without their numbers, whose split is a lowering's
    uneven: frozenset[str] = frozenset()  # those of them whose pieces may be padded

    @property
    def factors(self) -> list[str]:
        """Every factor, in order of appearance, inputs first."""
        seen: dict[str, None] = {}
        for operand in (*self.inputs, *self.outputs):
            for dim in operand.dims:
                seen.update(dict.fromkeys(dim))
        return list(seen)


@dataclass(frozen=True)
class Strategy:
    """Placements of every input and output on one axis; `factor` is what is split ("" when nothing is)."""

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    factor: str = ""


_NAME = r"[A-Za-z_]\w*"
_PART = rf"(?:{_NAME}|\[{_NAME}\])"
_TERM = re.compile(rf"\(\s*({_PART}(?:\s+{_PART})*)\s*\)|\[({_NAME}\*?)\]|({_NAME}(?:\|{_NAME})+|{_NAME}\*?|1)(?=\s|$)")


@dataclass(frozen=True)
class _Template:
    inputs: tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...]
    outputs: tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...]
    linked: tuple[tuple[str, ...], ...]


@cache
def parse(text: str) -> _Template:
    """Read the notation. Raises RuleError that shows the part it cannot read."""
    body, _, links = text.partition(";")
    left, arrow, right = body.partition("->")
    if not arrow:
        raise RuleError(f"rule {text!r} has no '->' between its inputs and its outputs")
    inputs, outputs = tuple(map(_parse_operand, _operands(left))), tuple(map(_parse_operand, _operands(right) or [""]))
    linked = tuple(tuple(part.split("&")) for part in _operands(links))
    named = {name.rstrip("*") for _, terms in (*inputs, *outputs) for _, names in terms for name in map(_bare, names)}
    unknown = [name for group in linked for name in group if name.partition(".")[0] not in named]
    if unknown or any(len(group) < 2 for group in linked):
        raise RuleError(f"rule {text!r} links {unknown or links!r}; write factors of its operands, as in 'b* [x] -> b* [y]; x&y'")
    return _Template(inputs, outputs, linked)


def _operands(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _parse_operand(text: str) -> tuple[str, tuple[tuple[str, tuple[str, ...]], ...]]:
    mark = text[0] if text[:1] in ("~", "+") else ""
    body, terms, position = text[len(mark) :].strip(), [], 0
    while position < len(body):
        match = _TERM.match(body, position)
        if match is None:
            raise RuleError(f"cannot read {body[position:]!r} in rule operand {text!r}; terms look like i, b*, [n], (a b), q|k|v or 1")
        product, whole, plain = match.groups()
        if product is not None:
            terms.append(("product", tuple(product.split())))
        elif whole is not None:
            terms.append(("whole", (whole,)))
        elif "|" in plain:
            terms.append(("joined", tuple(plain.split("|"))))
        else:
            terms.append(("variadic" if plain.endswith("*") else "one" if plain == "1" else "factor", (plain.rstrip("*"),)))
        position = match.end()
        position += len(body[position:]) - len(body[position:].lstrip())
    if sum(names[0].endswith("*") or kind == "variadic" for kind, names in terms) > 1:
        raise RuleError(f"rule operand {text!r} has two terms that stand for any number of dims; at most one can")
    return mark, tuple(terms)


def bind(text: str, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], sizes: Mapping[str, int] | None = None) -> Equation:
    """Bind an equation to the shapes of an op's tensor operands.

    `sizes` names factors that no shape shows, e.g. both parts of `(a b)`; one unknown part is inferred.
    Raises RuleError when ranks or sizes do not fit. Dims of size 1 against a larger factor broadcast.
    """
    template = parse(text)
    if 0 < len(template.inputs) < len(inputs) or len(template.outputs) != len(outputs):
        described = f"{len(template.inputs)} inputs and {len(template.outputs)} outputs"
        raise RuleError(f"rule {text!r} describes {described}, got {len(inputs)} and {len(outputs)}")
    found: dict[str, int] = dict(sizes or {})
    whole: set[str] = set()
    given = template.inputs or (("", ()),) * len(inputs)  # ` -> ` also describes operands without dims
    operands, shapes = [*given[: len(inputs)], *template.outputs], [tuple(s) for s in (*inputs, *outputs)]
    expanded = [_expand(mark_terms, shape, whole, text) for mark_terms, shape in zip(operands, shapes, strict=True)]
    plainest_first = sorted(zip(expanded, shapes, strict=True), key=lambda pair: max((len(dim) for dim in pair[0][0]), default=0))
    for (dims, joined, _), shape in plainest_first:
        for dim, is_joined, size in zip(dims, joined, shape, strict=True):
            _bind_dim(dim, is_joined, size, found, text, shapes)
    groups = {dim for dims, joined, _ in expanded for dim, is_joined in zip(dims, joined, strict=True) if is_joined}
    bound = []
    for position, ((dims, joined, mark), shape) in enumerate(zip(expanded, shapes, strict=True)):
        kept = tuple(() if size == 1 and len(dim) == 1 and found[dim[0]] != 1 else dim for dim, size in zip(dims, shape, strict=True))
        lost = [dim[0] for dim, rest in zip(dims, kept, strict=True) if dim and not rest and dim[0] not in whole]
        if lost and position >= len(inputs):
            where = f"an output has length 1 along {lost[0]!r}"
            raise RuleError(f"rule {text!r} does not fit shapes {shapes}: {where}; write 1 there if it is reduced")
        bound.append(Operand(kept, joined, mark == "+", mark == "~"))
    plain = {name: int(size) for name, size in found.items()}  # placements hold no sizes that may change
    return Equation(
        tuple(bound[: len(inputs)]), tuple(bound[len(inputs) :]), plain, frozenset(whole), tuple(sorted(groups)), template.linked
    )


def _expand(operand: tuple, shape: tuple[int, ...], whole: set[str], text: str) -> tuple[list[Dim], tuple[bool, ...], str]:
    """Dims of one operand with every variadic term spelled out, counted from the right: `b*` over 2 dims is b.1 b.0."""
    mark, terms = operand
    variadic = [names[0] for kind, names in terms if kind == "variadic" or names[0].endswith("*")]
    count = len(shape) - (len(terms) - len(variadic))
    if count < 0 or len(variadic) > 1 or (count and not variadic):
        raise RuleError(f"rule {text!r} does not fit a tensor of shape {tuple(shape)}")
    dims: list[Dim] = []
    joined: list[bool] = []
    for kind, names in terms:
        if kind == "variadic" or names[0].endswith("*"):
            factors: list[Dim] = [(f"{names[0].rstrip('*')}.{k}",) for k in reversed(range(count))]
            whole.update(f[0] for f in factors if kind == "whole")
            dims += factors
            joined += [False] * count
        else:
            whole.update(_bare(name) for name in names if kind == "whole" or name.startswith("["))
            dims.append(() if kind == "one" else tuple(map(_bare, names)))
            joined.append(kind == "joined")
    return dims, tuple(joined), mark


def _bare(name: str) -> str:
    return name.strip("[]")


def _bind_dim(dim: Dim, is_joined: bool, size: int, found: dict[str, int], text: str, shapes: list) -> None:
    known = [found[name] for name in dim if name in found]
    unknown = [name for name in dim if name not in found]
    if len(unknown) == 1:
        total = sum(known) if is_joined else _product(known)
        found[unknown[0]] = size - total if is_joined else size // total if total else 0
        known, unknown = [found[name] for name in dim], []
    if len(dim) == 1 and size != found[dim[0]] and 1 in (size, found[dim[0]]):
        found[dim[0]] = max(size, found[dim[0]]) if size else 0
        return
    if unknown or (dim and (sum(known) if is_joined else _product(known)) != size):
        raise RuleError(f"rule {text!r} does not fit shapes {shapes}: dim {' '.join(dim)} of size {size} with {dict(found)}")


def _product(values: Iterable[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


def strategies(equation: Equation, n: int, segmentations: Mapping[int, Sequence[tuple[int, ...]]] | None = None) -> list[Strategy]:
    """Every sound strategy on an axis of `n` ranks. `segmentations` proposes segments for plain dims, by dim size."""
    count, outs = len(equation.inputs), len(equation.outputs)
    found: list[Strategy | None] = [Strategy((R,) * count, (R,) * outs), Strategy((I,) * count, (I,) * outs)]
    groups = {name: group for group in equation.joined for name in group}
    for factor in equation.factors:
        group = groups.get(factor, (factor,))
        is_padded = len(group) == 1 and equation.sizes[factor] % n > 0 and is_padded_split(equation, factor, n)
        if factor != group[0] or equation.whole & set(group) or not (is_padded or _divides(equation, group, n)):
            continue
        is_proposed = len(group) == 1 and base(factor) not in equation.ordered and not is_padded
        proposals = [(), *(segmentations or {}).get(equation.sizes[factor], ())] if is_proposed else [()]
        for segments in proposals:
            if any(size % n for size in segments):
                continue
            found.append(_split(equation, group, segments))
    found += [_split(equation, group, ()) for group in equation.linked if _divides(equation, group, n)]
    found += _partial(equation)
    sound = dict.fromkeys(strategy for strategy in found if strategy is not None)
    return [s for s in sound if base(s.factor) in equation.settled or not any((*s.inputs, *s.outputs)[k] == P for k in equation.termless)]


def base(factor: str) -> str:
    """Name of a factor without its number: `b.1` is `b`, `d0` is `d`, `x1&y1` is `x&y`."""
    return "&".join(name.partition(".")[0].rstrip("0123456789") for name in factor.split("&"))


def _divides(equation: Equation, group: tuple[str, ...], n: int) -> bool:
    """Whether `n` ranks may share a group of factors that are split together."""
    within = n <= equation.limits.get("&".join(group) if group in equation.linked else group[0], n)
    if _is_product(equation, group):
        return within and _product(equation.sizes[name] for name in group) % n == 0
    return within and all(equation.sizes[name] and equation.sizes[name] % n == 0 for name in group)


def _is_product(equation: Equation, group: tuple[str, ...]) -> bool:
    """Whether a group of linked factors makes up a dim, which is then cut as one."""
    return group in equation.linked and any(set(group) <= set(dim) for operand in equation.inputs for dim in operand.dims)


def is_padded_split(equation: Equation, factor: str, n: int) -> bool:
    """Whether `n` ranks may share a factor that does not divide, as padded pieces."""
    return padded_piece(equation.sizes[factor], n) is not None and may_pad(equation, factor)


def may_pad(equation: Equation, factor: str) -> bool:
    """Whether the pieces of a factor may be padded: see docs/decisions/008-uneven-sizes.md.

    It must stand alone in its dims. Where every output has it, padding stays what copies of the last slice give. Where none has
    it, it is summed over, and padding must add nothing: an operand that the op is linear in is set to zero there, or the
    lowering leaves it out.
    """
    if any(factor in group for group in equation.joined) or factor in equation.limits or factor in equation.whole:
        return False
    if base(factor) in equation.lowered and base(factor) not in equation.uneven:
        return False
    if any(factor in dim and len(dim) > 1 for operand in (*equation.inputs, *equation.outputs) for dim in operand.dims):
        return False
    kept = [(factor,) in operand.dims for operand in equation.outputs]
    return all(kept) or (not any(kept) and (base(factor) in equation.uneven or bool(linear_operands(equation, factor))))


def linear_operands(equation: Equation, factor: str) -> list[int]:
    """Inputs, by number, that have the factor as a dim and that the op is linear in."""
    return [k for k, operand in enumerate(equation.inputs) if operand.is_linear and (factor,) in operand.dims]


def _split(equation: Equation, group: tuple[str, ...], segments: tuple[int, ...]) -> Strategy | None:
    """Strategy 2 for one factor (or one group of concatenated or linked factors)."""
    is_linked = group in equation.linked
    is_summed = not any(name in dim for operand in equation.outputs for dim in operand.dims for name in group)
    placements: list[Placement] = []
    for position, operand in enumerate((*equation.inputs, *equation.outputs)):
        is_output = position >= len(equation.inputs)
        at = [k for name in group for k, dim in enumerate(operand.dims) if name in dim] if is_linked else []
        at = at[:1] or [k for k, dim in enumerate(operand.dims) if set(group) & set(dim)]
        if _is_product(equation, group):
            at = [k for k, dim in enumerate(operand.dims) if set(group) <= set(dim)]
        if len(at) > 1:
            return None
        if at:
            split = _placement(equation, operand, at[0], group, segments)
            if split is None:
                return None
            placements.append(split)
        else:
            placements.append(P if is_output or (operand.is_additive and is_summed) else R)
    name = "&".join(group) if is_linked else group[0]
    return Strategy(tuple(placements[: len(equation.inputs)]), tuple(placements[len(equation.inputs) :]), name)


def _placement(equation: Equation, operand: Operand, k: int, group: tuple[str, ...], segments: tuple[int, ...]) -> Placement | None:
    dim = operand.dims[k]
    if operand.joined[k]:
        return S(k, [equation.sizes[name] for name in dim])
    before = _product(equation.sizes[name] for name in dim[: dim.index(next(n for n in dim if n in group))])
    if before == 1:
        return S(k, segments) if not segments or len([f for f in dim if equation.sizes[f] > 1]) == 1 else None
    length = _product(equation.sizes[name] for name in dim)
    return S(k, (length // before,) * before) if not segments else None


def _partial(equation: Equation) -> list[Strategy]:
    """Strategy 3."""
    linear = [k for k, operand in enumerate(equation.inputs) if operand.is_linear]
    additive = [k for k, operand in enumerate(equation.inputs) if operand.is_additive]
    outputs = (P,) * len(equation.outputs)
    sets = [{k, *additive} for k in linear] or ([set(additive)] if additive else [])
    return [Strategy(tuple(P if k in chosen else R for k in range(len(equation.inputs))), outputs) for chosen in sets]


def divides(equation: Equation, factors: Sequence[str], sizes: Sequence[int]) -> bool:
    """Whether every factor divides by all the axes that split it; `factors` holds one per axis, "" where nothing is split."""
    ways: dict[str, int] = {}
    for factor, n in zip(factors, sizes, strict=True):
        ways[factor] = ways.get(factor, 1) * n
    groups = {group[0]: group for group in equation.joined} | {"&".join(group): group for group in equation.linked}
    total: dict[str, int] = {}
    for factor, n in ways.items():
        if _is_product(equation, groups.get(factor, ())):
            if set(groups[factor]) & set(ways) or _product(equation.sizes[name] for name in groups[factor]) % n:
                return False
            continue
        for name in groups.get(factor, (factor,)) if factor else ():
            total[name] = total.get(name, 1) * n
    within = all(n <= equation.limits.get(factor, n) for factor, n in ways.items())
    uneven = [name for name, n in total.items() if equation.sizes[name] % n]
    return within and all(factors.count(name) == 1 and is_padded_split(equation, name, ways[name]) for name in uneven)
