"""Finds the rule of an op by execution: the row to register for an op that the table does not know.

A *move* is a hypothesis: these dims of the operands are split, the others are whole, and every output is then split along
one dim or is a sum of terms. Which of the two is read off what the op computes on the pieces. A move stands when values and
gradients agree for two counts of ranks in every sample; dims that move together are one factor, dims that never move are
whole. Operands are linear where random terms of them give terms of the outputs. The equation so assembled is proved by
autoshard.testing.check_rule on every sample before it is returned.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoshard.candidates import Candidate
from autoshard.errors import RuleError
from autoshard.mesh import MeshSpec
from autoshard.placements import P, Placement, R, S, unshard
from autoshard.rules import RULES, Rule
from autoshard.testing import OpCase, check_rule, failure_of, op_overload, spread

_MOST_HYPOTHESES = 5000
_LETTERS = "abcdefghijklmnopqrs"  # names of factors; whole dims are w0, w1, ..., and any number of dims x*
_LETTER = re.compile(r"\b[a-s](?=\d*(?:\W|$))")
_COUNTS = 2  # how many counts of ranks a move is tried on
Sample = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Move:
    """Dims that one axis splits, per operand and per output; None where the operand is whole or the output is a sum.

    joined: "outputs" when the output's dim is the concatenation of the operands' dims, "inputs" the other way round.
    """

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    joined: str = ""

    @property
    def ends(self) -> set[tuple[int, int]]:
        """(number of the tensor, dim), inputs first."""
        return {(k, dim) for k, dim in enumerate((*self.inputs, *self.outputs)) if dim is not None}

    def placements(self, case: OpCase, additive: frozenset[int]) -> tuple[list[Placement], list[Placement]]:
        """Placements of operands and outputs on the axis."""
        is_summed = all(dim is None for dim in self.outputs)
        whole = [P if is_summed and k in additive else R for k in range(len(self.inputs))]
        parts = tuple(x.shape[d] for x, d in zip(case.operands, self.inputs, strict=True) if d is not None)
        pieces = tuple(y.shape[d] for y, d in zip(case.outputs, self.outputs, strict=True) if d is not None)
        given, got = pieces if self.joined == "inputs" else (), parts if self.joined == "outputs" else ()
        return (
            [w if dim is None else S(dim, given) for w, dim in zip(whole, self.inputs, strict=True)],
            [P if dim is None else S(dim, got) for dim in self.outputs],
        )


@dataclass(frozen=True)
class Discovery:
    """What was found. equation: of the row; strategies: how many it allows and check_rule proved, per sample; undecided: the rest."""

    op: str
    equation: str
    strategies: tuple[int, ...]
    undecided: tuple[str, ...] = ()

    def __str__(self) -> str:
        namespace, base, overload = self.op.split(".")
        name = f"{namespace}::{base}" + (f".{overload}" if overload != "default" else "")
        proved = f"  # {', '.join(map(str, self.strategies))} strategies proved"
        return "\n".join([f'register_rule("{name}", "{self.equation}"){proved}', *(f"# {text}" for text in self.undecided)])


def discover(op: torch._ops.OpOverload | str, samples: Sequence[Sample]) -> Discovery:
    """See autoshard.testing.discover_rule."""
    overload = op_overload(op)
    cases = [OpCase(overload, tuple(given), dict(named), MeshSpec.of("a=2")) for given, named in samples]
    for case in cases:
        _check(case)
    kinds = dict[tuple, list[OpCase]]()
    for case in cases:
        kinds.setdefault(tuple(x.ndim for x in (*case.operands, *case.outputs)), []).append(case)
    notes = dict[str, None]()
    largest = max(kinds, key=lambda ndims: (len(ndims), sum(ndims)))
    drafts = {ndims: _draft(group, notes) for ndims, group in kinds.items()}
    draft = drafts[largest]
    while True:
        texts = [draft.text()] if len(kinds) == 1 else [*draft.variadic()]
        proofs = {text: _prove(cases, text) for text in texts}
        if sound := {text: proof for text, proof in proofs.items() if not isinstance(proof, str)}:
            best = max(sound, key=lambda text: sum(sound[text]))
            return Discovery(str(overload), best, tuple(sound[best]), tuple(notes))
        if not draft.moves and not draft.linear and not draft.additive:
            raise RuleError(f"no rule of {overload} is sound for all samples, not even with everything whole: {proofs[texts[0]]}")
        notes[f"{draft.drop_one()} does not fit together with the rest, in all samples"] = None


def _check(case: OpCase) -> None:
    if not case.operands or not case.outputs:
        raise RuleError(f"{case.op} has no tensors among its operands, or none among its results")
    again = OpCase(case.op, case.args, case.kwargs, case.mesh)
    if any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(case.outputs, again.outputs, strict=True)):
        raise RuleError(f"{case.op} gives another result each time: it draws random numbers, or leaves memory unset")


# ------------------------------------------------------------------------------------------------------------- hypotheses


def _draft(cases: Sequence[OpCase], notes: dict[str, None]) -> Draft:
    """Moves and linear operands that all cases, of equal numbers of dims, agree on."""
    sets = [_linear_sets(case) for case in cases]
    linear, additive, left = _linearity([s for s in sets[0] if all(s in other for other in sets)])
    for names in left:
        notes[f"linear jointly in operands {names}, which no marks can say"] = None
    found = [list(_moves(case, additive, notes)) for case in cases]
    agreed = list[Move]()
    for move in dict.fromkeys(itertools.chain(*found)):
        merged = _merge(move, found, cases)
        if merged is None:
            notes[f"{_told(move, cases[0])} holds in some samples and fails in others"] = None
        elif not any(merged.ends & other.ends for other in agreed):
            agreed.append(merged)
    return Draft(list(cases), agreed, linear, additive)


def _linear_sets(case: OpCase) -> list[frozenset[int]]:
    """Least sets of operands whose terms give terms of all outputs."""
    if not all(_has_terms(y) for y in case.outputs):
        return []
    able = [k for k, x in enumerate(case.operands) if _has_terms(x)]
    found: list[frozenset[int]] = []
    for count in range(1, len(able) + 1):
        for chosen in map(frozenset, itertools.combinations(able, count)):
            if not any(known <= chosen for known in found):
                inputs = [P if k in chosen else R for k in range(len(case.operands))]
                if all(not _failure(case, inputs, [P] * len(case.outputs), n) for n in (2, 3)):
                    found.append(chosen)
    return found


def _linearity(sets: Sequence[frozenset[int]]) -> tuple[frozenset[int], frozenset[int], list[str]]:
    """Operands marked `~`, operands marked `+`, and sets that the marks cannot say.

    The marks say that each linear operand, jointly with all additive ones, or the additive ones alone, may be terms.
    """
    if len(sets) == 1 and len(sets[0]) > 1:
        return frozenset(), sets[0], []
    common = frozenset.intersection(*sets) if sets else frozenset()
    common = common if len(sets) > 1 else frozenset()
    sayable = [s for s in sets if len(s - common) == 1]
    return (
        frozenset().union(*(s - common for s in sayable)),
        common if sayable else frozenset(),
        [str(sorted(s)) for s in sets if s not in sayable],
    )


def _moves(case: OpCase, additive: frozenset[int], notes: dict[str, None]) -> Iterator[Move]:
    """Every move that stands, those of few operands first; no dim takes part in two."""
    choices = [[None, *(dim for dim, size in enumerate(x.shape) if size > 1)] for x in case.operands]
    if math.prod(map(len, choices)) > _MOST_HYPOTHESES:
        notes[f"more than {_MOST_HYPOTHESES} ways to split {len(choices)} operands: only operands alone and in pairs were tried"] = None
    taken = set[tuple[int, int]]()
    few = 2 if math.prod(map(len, choices)) > _MOST_HYPOTHESES else len(choices)
    hypotheses = (inputs for inputs in itertools.product(*choices) if 0 < len(inputs) - inputs.count(None) <= few)
    for inputs in sorted(hypotheses, key=lambda inputs: (-inputs.count(None), [-1 if d is None else d for d in inputs])):
        if taken & {(k, dim) for k, dim in enumerate(inputs) if dim is not None}:
            continue
        move = _observe(case, inputs, additive)
        if move is None:
            continue
        sizes = [tensor.shape[dim] for k, tensor in enumerate((*case.operands, *case.outputs)) for n, dim in move.ends if n == k]
        if not move.joined and len(set(sizes)) > 1:
            notes[f"{_told(move, case)}: their lengths {sizes} differ, so they are products like (a b), which are not discovered"] = None
            continue
        gradients = {failure for n in _counts(case, move) if (failure := _failure(case, *move.placements(case, additive), n))}
        if gradients:
            notes[f"{_told(move, case)} holds for values, but the {gradients.pop()}"] = None
            continue
        if len(_counts(case, move)) < _COUNTS:
            notes[f"{_told(move, case)} was tried on {_counts(case, move)[0]} ranks alone: lengths like 4 and 6 decide more"] = None
        taken |= move.ends
        yield move


def _observe(case: OpCase, inputs: tuple[int | None, ...], additive: frozenset[int]) -> Move | None:
    """The move that splits operands along `inputs`, if the outputs on every count of ranks lie in one same way."""
    for joined in ("", "inputs", "outputs"):
        for outputs in itertools.product(*([*range(y.ndim), None] for y in case.outputs)):
            move = Move(inputs, outputs, joined)
            if _is_sensible(move, case) and (counts := _counts(case, move)) and all(_computes(case, move, additive, n) for n in counts):
                return move
    return None


def _is_sensible(move: Move, case: OpCase) -> bool:
    """Whether lengths allow the move: terms only of dtypes that add up, joined lengths that add up."""
    parts = [x.shape[d] for x, d in zip(case.operands, move.inputs, strict=True) if d is not None]
    pieces = [y.shape[d] for y, d in zip(case.outputs, move.outputs, strict=True) if d is not None]
    if not all(_has_terms(y) for y, dim in zip(case.outputs, move.outputs, strict=True) if dim is None):
        return False
    if move.joined == "inputs":
        return len(parts) == 1 and len(pieces) == len(move.outputs) > 1 and sum(pieces) == parts[0]
    if move.joined == "outputs":
        return len(parts) > 1 and len(pieces) == len(move.outputs) and all(piece == sum(parts) for piece in pieces)
    return True


def _counts(case: OpCase, move: Move) -> list[int]:
    """The least counts of ranks that divide everything the move splits."""
    lengths = [x.shape[d] for x, d in zip(case.operands, move.inputs, strict=True) if d is not None]
    lengths += [y.shape[d] for y, d in zip(case.outputs, move.outputs, strict=True) if d is not None]
    common = math.gcd(*lengths)
    return [n for n in range(2, common + 1) if not common % n][:_COUNTS]


def _computes(case: OpCase, move: Move, additive: frozenset[int], n: int) -> bool:
    """Whether the values on `n` ranks are those of the whole."""
    mesh, generator = MeshSpec(("a",), (n,)), torch.Generator().manual_seed(0)
    given, wanted = move.placements(case, additive)
    operands = [spread(x.detach(), (p,), mesh, generator) for x, p in zip(case.operands, given, strict=True)]
    try:
        results = [case.compute([pieces[rank] for pieces in operands]) for rank in range(n)]
        found = [unshard(column, (p,), mesh) for column, p in zip(zip(*results, strict=True), wanted, strict=True)]
    except Exception:  # an op may raise anything on operands that do not fit together
        return False
    return all(y.shape == want.shape and y.dtype == want.dtype and _is_close(y, want) for y, want in zip(found, case.outputs, strict=True))


def _failure(case: OpCase, inputs: Sequence[Placement], outputs: Sequence[Placement], n: int) -> str:
    """What is wrong with these placements on `n` ranks, values and gradients."""
    on_ranks = OpCase(case.op, case.args, case.kwargs, MeshSpec(("a",), (n,)))
    return failure_of(on_ranks, Candidate((), tuple((p,) for p in inputs), tuple((p,) for p in outputs), 0.0), is_localized=False)


def _merge(move: Move, found: Sequence[Sequence[Move]], cases: Sequence[OpCase]) -> Move | None:
    """The move with the ends that other samples add, where they have length 1 here; None where a sample contradicts it."""
    merged = move
    for moves, case in zip(found, cases, strict=True):
        tensors = [*case.operands, *case.outputs]
        same = [other for other in moves if other.ends & merged.ends]
        long = {(k, dim) for k, dim in merged.ends if tensors[k].shape[dim] > 1}
        if not same:
            if long:
                return None
            continue
        other = same[0]
        if len(same) > 1 or other.joined != merged.joined or long - other.ends:
            return None
        pairs = [
            (a if a is not None else b) for a, b in zip((*merged.inputs, *merged.outputs), (*other.inputs, *other.outputs), strict=True)
        ]
        merged = Move(tuple(pairs[: len(move.inputs)]), tuple(pairs[len(move.inputs) :]), move.joined)
    return merged


def _told(move: Move, case: OpCase) -> str:
    """`x along 0, w along 1 -> output along 0`."""
    outputs = [f"output {k}" if len(case.outputs) > 1 else "output" for k in range(len(case.outputs))]
    given = [f"{name} along {dim}" for name, dim in zip(case.names, move.inputs, strict=True) if dim is not None]
    got = [f"{name} along {dim}" if dim is not None else f"{name} a sum" for name, dim in zip(outputs, move.outputs, strict=True)]
    return f"splitting {', '.join(given)} -> {', '.join(got)}"


def _has_terms(x: Tensor) -> bool:
    return x.dtype.is_floating_point or (x.dtype.itemsize >= 4 and x.dtype != torch.bool)


def _is_close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    precision = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(a, b, precision, precision, equal_nan=True)


# --------------------------------------------------------------------------------------------------------------- equations


@dataclass
class Draft:
    """An equation in the making, of cases with equal numbers of dims."""

    cases: list[OpCase]
    moves: list[Move]
    linear: frozenset[int]
    additive: frozenset[int]

    def drop_one(self) -> str:
        """Give up the last move, or the marks when no move is left; what was given up."""
        if self.moves:
            return _told(self.moves.pop(), self.cases[0])
        self.linear = self.additive = frozenset()
        return "linearity"

    def terms(self) -> list[list[str]]:
        """Per operand and output, a term per dim."""
        letters, wholes = iter(_LETTERS), (f"[w{k}]" for k in itertools.count())
        names, case = dict[Move, str](), self.cases[0]
        tensors = [[*c.operands, *c.outputs] for c in self.cases]
        found: list[list[str]] = []
        for number, tensor in enumerate(tensors[0]):
            found.append([])
            for dim in range(tensor.ndim):
                move = next((move for move in self.moves if (number, dim) in move.ends), None)
                if move is not None:
                    names[move] = names.get(move) or next(letters)
                    found[-1].append(_term(move, names[move], number, len(case.operands)))
                else:
                    found[-1].append("1" if all(group[number].shape[dim] == 1 for group in tensors) else next(wholes))
        return found

    def text(self, terms: Sequence[Sequence[str]] | None = None) -> str:
        """The equation."""
        count = len(self.cases[0].operands)
        marks = ["~" if k in self.linear else "+" if k in self.additive else "" for k in range(count)]
        spelled = [" ".join(dims) for dims in terms or self.terms()]
        text = f"{', '.join(mark + dims for mark, dims in zip(marks, spelled, strict=False))} -> {', '.join(spelled[count:])}"
        order = dict.fromkeys(_LETTER.findall(text))
        renamed = dict(zip(order, _LETTERS, strict=False))
        return _LETTER.sub(lambda letter: renamed[letter[0]], text)

    def variadic(self) -> Iterator[str]:
        """Equations in which a run of factors stands for any number of dims: `x*`, in operands that have it, or its last part."""
        terms = self.terms()
        yield self.text(terms)
        runs = {tuple(dims[i:j]) for dims in terms for i in range(len(dims)) for j in range(i + 1, len(dims) + 1)}
        for run in sorted(runs, key=lambda run: (-len(run), run)):
            whole = all(term.startswith("[") for term in run)
            if not (whole or all(term.isalpha() for term in run)):
                continue
            replaced = [_replace(dims, run, "[x*]" if whole else "x*") for dims in terms]
            if all(dims is not None for dims in replaced):
                yield self.text([dims for dims in replaced if dims is not None])


def _term(move: Move, name: str, number: int, inputs: int) -> str:
    """The factor; of joined dims each part has its own, and the concatenation lists them."""
    if not move.joined:
        return name
    is_input = number < inputs
    parts = [k for k, dim in enumerate(move.inputs if move.joined == "outputs" else move.outputs) if dim is not None]
    if is_input == (move.joined == "outputs"):
        return f"{name}{parts.index(number if is_input else number - inputs)}"
    return "|".join(f"{name}{k}" for k in range(len(parts)))


def _replace(dims: Sequence[str], run: tuple[str, ...], star: str) -> list[str] | None:
    """`dims` with the run, or a last part of it, as one term; None where other parts of it stand."""
    here = [k for k, term in enumerate(dims) if term in run]
    if not here:
        return list(dims)
    part = tuple(dims[here[0] : here[-1] + 1])
    if part != run[len(run) - len(part) :]:
        return None
    return [*dims[: here[0]], star, *dims[here[-1] + 1 :]]


def _prove(cases: Sequence[OpCase], text: str) -> list[int] | str:
    """How many strategies of the equation are proved, per case; or why it does not fit or is refuted."""
    op, counts = str(cases[0].op), list[int]()
    before = RULES.get(op)
    RULES[op] = Rule(text)
    try:
        for case in cases:
            lengths = {size for x in (*case.operands, *case.outputs) for size in x.shape}
            sizes = [n for n in (2, 3, 5, 7) if any(length and not length % n for length in lengths)][:_COUNTS] or [2]
            proved = [len(check_rule(case.op, *case.args, mesh=f"a={n}", **case.kwargs)) for n in sizes]
            check_rule(case.op, *case.args, mesh=f"a={sizes[0]},b={sizes[0]}", **case.kwargs)
            counts.append(max(proved))
    except RuleError as error:
        return str(error)
    finally:
        RULES.pop(op)
        if before is not None:
            RULES[op] = before
    return counts
