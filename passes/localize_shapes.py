"""localize_shapes: rewrite what a node says about global sizes into this rank's, and put lowerings in place.

Shape arguments become local shapes, sizes of pieces along a split dim shrink, ops whose split factor needs other code
call their lowering with the axes that split it, and random ops learn on which axes their draws differ. Where a dim that is
summed over does not divide, an operand is masked first: zero at padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import fx

from autoshard import runtime
from autoshard.candidates import axes_in_place, base, bound_rule, lowered_sizes, masks_of
from autoshard.equations import Equation
from autoshard.ops.row import Rule
from autoshard.placements import local_shape
from autoshard.program import (
    Program,
    arguments,
    call_of,
    draws_random,
    facts,
    replace_operands,
    set_argument,
    set_facts,
    tensor_operands,
)


@dataclass(frozen=True)
class LocalizeShapes:
    """Make every op node runnable on local tensors."""

    def __call__(self, program: Program) -> Program:
        site = 0
        masked: dict[tuple, fx.Node] = {}
        for node in program.nodes("op"):
            rule, equation = bound_rule(node)
            if facts(node).is_drawn_whole:
                continue
            if draws_random(node) and equation is None:
                site += 1
                facts(node).site, facts(node).random_axes = site, ()  # computed whole: the same numbers on every rank
            if rule is None or equation is None:
                continue
            if rule.is_random(call_of(node)):
                site += 1
                facts(node).site = site
                facts(node).random_axes = tuple(
                    axis
                    for axis, strategy in zip(program.mesh.axes, facts(node).strategies, strict=True)
                    if strategy.factor and base(strategy.factor) not in rule.undrawn
                )
            _mask(program, node, rule, equation, masked)
            localize_sizes(program, node, rule, equation)
            _lower(program, node, rule, equation)
        program.is_localized = True
        return program


def localize_sizes(program: Program, node: fx.Node, rule: Rule, equation: Equation) -> None:
    """Write the sizes among an op's arguments as those of its local results."""
    known, sizes = facts(node), program.mesh.shape
    if rule.shape is not None:
        local = local_shape(known.value.shape, known.layout, sizes)
        assert local is not None
        given, dim = arguments(node)[rule.shape], arguments(node).get("dim", 0)
        start = dim % (len(local) - len(given) + 1) if rule.shape == "sizes" else 0  # `dim` counts dims of the input
        set_argument(node, rule.shape, [g if g == -1 else n for g, n in zip(given, local[start:], strict=False)])
    if rule.piece is not None:
        pieces = equation.joined[0] if equation.joined else ()
        shrink = math.prod(n for strategy, n in zip(known.strategies, sizes, strict=True) if strategy.factor in pieces)
        given = arguments(node)[rule.piece]
        set_argument(node, rule.piece, given // shrink if isinstance(given, int) else [size // shrink for size in given])


def _mask(program: Program, node: fx.Node, rule: Rule, equation: Equation, masked: dict[tuple, fx.Node]) -> None:
    """Put mask nodes between the op and what it sums over padding of; one serves all ops that sum over the same."""
    operands = tensor_operands(node)
    for mask in masks_of(rule, equation, _factors(node), program.mesh.shape):
        source = operands[mask.operand]
        key = (source, mask.axis, mask.dim, facts(node).recompute, facts(node).branch)
        if key not in masked:
            with program.graph.inserting_before(node):
                args = (source, program.mesh.axes[mask.axis], mask.dim)
                new = program.graph.create_node(
                    "call_function", runtime.mask_padding, args, {"size": mask.size}, name=f"{source.name}_mask_padding"
                )
            known = replace(facts(source), role="mask", strategies=(), hub=None, is_pinned=False, op=None, random_axes=None)
            set_facts(new, replace(known, autocast=(), recompute=facts(node).recompute, branch=facts(node).branch))
            masked[key] = new
        operands[mask.operand] = masked[key]
    replace_operands(node, operands)


def _factors(node: fx.Node) -> list[str]:
    return [strategy.factor for strategy in facts(node).strategies]


def _lower(program: Program, node: fx.Node, rule: Rule, equation: Equation) -> None:
    axes = axes_in_place(rule, node, _factors(node), program.mesh)
    if axes and rule.lowering is not None:
        node.kwargs = {**node.kwargs, **axes, **lowered_sizes(rule, equation, _factors(node), program.mesh.shape)}
        lowering = getattr(runtime, rule.lowering.function)
        if node.target is not lowering:  # what passes recognise calls its lowering from the start
            facts(node).op, node.target = node.target, lowering  # type: ignore[assignment]
