"""A program at other sizes than those of its example: which sizes a call has, whether the program holds there.

A program that was planned at one size is not trusted at another: every Size in it takes its new value, and the placement
checker judges the result, which binds every op's equation anew. What passes is as sound as a plan made at that size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from autoshard.checker import check
from autoshard.dynamic_dims import LeafMarks, Mark
from autoshard.errors import InputError, PlacementError
from autoshard.program import Program, example_sizes, facts, info_at, set_facts
from autoshard.symbolic import Size, at, evaluate, names_of


def instantiate(program: Program, sizes: Mapping[str, int]) -> Program:
    """The same program where the symbols have the values `sizes`; nodes keep their names."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        env[node] = new = graph.node_copy(node, env.__getitem__)
        new.args = map_aggregate(new.args, lambda leaf: at(leaf, sizes))
        new.kwargs = map_aggregate(new.kwargs, lambda leaf: at(leaf, sizes))
        set_facts(new, replace(facts(node), values=tuple(info_at(value, sizes) for value in facts(node).values)))
    symbols = {name: replace(symbol, example=sizes[name]) for name, symbol in program.symbols.items()}
    return replace(program, graph=graph, symbols=symbols)


def sizes_of(program: Program, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The sizes that arguments of global `shapes` (by input name) have. Raises InputError where they do not fit the program."""
    found: dict[str, tuple[int, str]] = {}
    for known in program.given().values():
        given = tuple(shapes[known.name])
        fixed = [isinstance(size, Size) or size == has for size, has in zip(known.value.shape, given, strict=False)]
        if len(given) != len(known.value.shape) or not all(fixed):
            raise InputError(f"{known.name} has shape {given}, the plan was made for {known.value.shape}")
        for dim, (size, has) in enumerate(zip(known.value.shape, given, strict=True)):
            if isinstance(size, Size):
                place = f"dim {dim} of {known.name}"
                other, where = found.setdefault(str(size), (has, place))
                if other != has:
                    raise InputError(f"{size} is one size, and is {other} as {where} and {has} as {place}")
    sizes = {name: has for name, (has, _) in found.items()}
    for name, symbol in program.symbols.items():
        if sizes[name] < symbol.least or (symbol.most is not None and sizes[name] > symbol.most):
            raise InputError(
                f"{name} is {sizes[name]} as {found[name][1]}; the traced model serves {symbol.range}. "
                f"Pass other sizes, or leave {name} out of dynamic"
            )
    return sizes


def check_sizes(program: Program, sizes: Mapping[str, int]) -> None:
    """Raise InputError unless the program is sound at `sizes`; says which sizes are."""
    if dict(sizes) == example_sizes(program):
        return
    for size, axes, ways in sorted(split_sizes(program), key=lambda split: -split[2]):
        length = evaluate(str(size), sizes)
        if length % ways or not length:
            raise InputError(_indivisible(program, sizes, size, axes, ways, length))
    try:
        check(instantiate(program, sizes))
    except PlacementError as error:
        fault = str(error).splitlines()[1].strip()
        raise InputError(
            f"the plan was made for {_listed(example_sizes(program))} and does not hold for {_listed(sizes)}: {fault}. "
            "Plan with example inputs of that size, or leave that size out of dynamic"
        ) from error


def split_sizes(program: Program) -> Iterator[tuple[Size, tuple[str, ...], int]]:
    """Every symbolic length that the program splits, once: the axes that split it and in how many parts."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for node in program.nodes():
        for value, layout in zip(facts(node).values, facts(node).layouts, strict=False):
            for dim, size in enumerate(value.shape):
                if not isinstance(size, Size):
                    continue
                axes = tuple(axis for axis, p in zip(program.mesh.axes, layout, strict=True) if p.is_split and p.dim == dim)
                if axes and (str(size), axes) not in seen:
                    seen.add((str(size), axes))
                    yield size, axes, math.prod(program.mesh.shape[program.mesh.index(axis)] for axis in axes)


def multiple_of(program: Program, name: str, sizes: Mapping[str, int] | None = None) -> int | None:
    """The least number whose multiples the program can split as sizes of `name`, other sizes given; None if there is none."""
    others = dict(sizes or example_sizes(program))
    wanted = [(str(size), ways) for size, _, ways in split_sizes(program) if name in names_of(size)]

    def divides(length: int) -> bool:
        return not any(evaluate(text, {**others, name: length}) % ways for text, ways in wanted)

    candidates = (m for m in range(1, program.mesh.size + 1) if program.mesh.size % m == 0)
    return next((m for m in candidates if all(divides(m * k) for k in range(1, 8))), None)


def _indivisible(program: Program, sizes: Mapping[str, int], size: Size, axes: Sequence[str], ways: int, length: int) -> str:
    name = next(n for n in program.symbols if n in names_of(size))
    what = f"{name} {sizes[name]}" if str(size) == name else f"{size} = {length} (with {_listed(sizes)})"
    where = f"the {ways} ranks of {'axis' if len(axes) == 1 else 'axes'} {', '.join(axes)}"
    multiple = multiple_of(program, name, sizes)
    if multiple is None:
        advice = f"use {_listed(example_sizes(program))}, which the plan was made for"
    else:
        below = sizes[name] // multiple * multiple
        near = [m for m in (below, below + multiple) if m >= program.symbols[name].least and m != sizes[name]]
        advice = f"use a multiple of {multiple} for {name}, such as {' or '.join(map(str, near))}"
    return f"{what} does not divide over {where}; {advice}"


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {int(size)}" for name, size in sizes.items())


def leaf_marks(program: Program) -> LeafMarks | None:
    """The dims that the program's plan was made to let change."""
    inputs = {facts(node).name: facts(node).value for node in program.nodes("input")}

    def marks(name: str | None) -> dict[int, Any]:
        shape = inputs[name].shape if name in inputs else ()
        symbols = ((dim, program.symbols[str(size)]) for dim, size in enumerate(shape) if isinstance(size, Size))
        return {dim: Mark(symbol.name, symbol.least, symbol.most) for dim, symbol in symbols}

    return LeafMarks(tuple(map(marks, program.flat_inputs))) if program.symbols else None
