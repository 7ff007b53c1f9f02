"""The placement checker: every single change to a valid program that could change what it computes is refused.

Mutations of conversions: dropped, doubled, every other row, every other axis, other dims and segments, another recorded
placement. Mutations of ops: another layout of a result, other lowering axes, another local shape, other random axes, a
gradient claimed or denied, a constant claimed. A mutant is left out only where it is the same program.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from models import EXAMPLES, GPT
from torch import fx
from training_oracle import fresh

import autoshard
from autoshard import runtime
from autoshard.checker import check, faults_of
from autoshard.conversions import CONVERSIONS
from autoshard.errors import PlacementError
from autoshard.ops.row import TensorInfo
from autoshard.placements import I, P, Placement, R, S
from autoshard.program import Program, facts, set_facts
from autoshard.rules import rule_of

IS_FULL = settings().max_examples >= 1000  # the full profile changes every node, the other one of each kind

Mutant = tuple[str, Callable[[fx.Node, Program], Any]]  # what is changed, and the change to a copy of the node

PLANS = [
    ("gpt", "a=2", {"seed": 1}),
    ("gpt", "a=2,b=2", {"seed": 2}),
    ("gpt", "dp=2,tp=2", {"template": "megatron_sp"}),
    ("gpt", "dp=2", {"template": "ddp"}),
    ("hf_llama", "tp=2", {"template": "megatron"}),
    ("hf_llama", "a=2,b=2", {"seed": 3}),
    ("conv_net", "a=2,b=2", {"seed": 4}),
    ("conv_net", "dp=2", {"template": "fsdp"}),
    ("encoder", "a=4", {"seed": 5}),
]


def finished(name: str, mesh: str, asked: dict[str, Any]) -> Program:
    asked = dict(asked)
    options = autoshard.Options(seed=asked.pop("seed", None))
    if name == "dropout":
        model, (args, kwargs) = GPT(dropout=0.1), EXAMPLES["gpt"].batch(0)
    else:
        model, (args, kwargs) = EXAMPLES[name].model(), EXAMPLES[name].batch(0)
    return autoshard.plan(model, mesh, args, kwargs, options=options, **asked).program


def copied(program: Program, node: fx.Node) -> tuple[Program, fx.Node]:
    """A copy, and what stands for `node` in it."""
    copy = fresh(program, program.mesh)
    return copy, next(other for other in copy.graph.nodes if other.name == node.name)


def survivors(program: Program, node: fx.Node, mutants: Iterator[Mutant], tried: Counter[str]) -> list[str]:
    """Names of the mutants of one node that the checker lets pass; counts all in `tried`."""
    found = []
    for name, change in mutants:
        mutant, there = copied(program, node)
        near = [there, *there.users, *(user for operand in there.all_input_nodes for user in operand.users), *mutant.nodes("output")]
        change(there, mutant)
        tried[name] += 1
        kept = set(mutant.graph.nodes)
        if any(fault for other in near if other in kept for fault in faults_of(mutant, other)):
            continue  # what check raises for; looking near the change first is faster
        try:
            check(mutant)
        except PlacementError:
            continue
        found.append(f"{node.name}: {name}")
    return found


def one_of_each(nodes: Iterator[fx.Node], kind: Callable[[fx.Node], Any]) -> list[fx.Node]:
    """The last node of each kind; all of them with the full profile."""
    every = list(nodes)
    return every if IS_FULL else list({kind(node): node for node in every}.values())


# ------------------------------------------------------------------------------------------------------- conversions


def mutants_of_conversion(program: Program, node: fx.Node) -> Iterator[Mutant]:
    known, mesh = facts(node), program.mesh
    axis = mesh.index(str(node.args[1]))

    def drop(there: fx.Node, _: Program) -> None:
        there.replace_all_uses_with(there.args[0])
        there.graph.erase_node(there)

    def double(there: fx.Node, _: Program) -> None:
        with there.graph.inserting_after(there):
            again = there.graph.node_copy(there)
        set_facts(again, replace(facts(there)))
        there.replace_all_uses_with(again)
        again.args = (there, *there.args[1:])

    yield "dropped", drop
    yield "doubled", double
    for row in CONVERSIONS:
        if row.name != node.target.__name__:  # type: ignore[union-attr]
            yield "another row", lambda there, _, row=row: setattr(there, "target", getattr(runtime, row.name))
    for other in mesh.axes:
        if other != node.args[1]:
            yield "another axis", lambda there, _, other=other: there.update_arg(1, other)
    for args in _other_arguments(node, len(known.value.shape)):
        yield "other arguments", lambda there, _, args=args: setattr(there, "args", (*there.args[:2], *args))
    for placement in _placements(len(known.value.shape)):
        if placement != known.layout[axis] and not _is_same(placement, known.layout[axis], known.needs_grad):
            layout = (*known.layout[:axis], placement, *known.layout[axis + 1 :])
            yield "another recorded placement", lambda there, _, layout=layout: setattr(facts(there), "layouts", (layout,))
    yield "gradient flipped", lambda there, _: _flip(there)


def _other_arguments(node: fx.Node, ndim: int) -> Iterator[tuple]:
    args = node.args[2:]
    for k, value in enumerate(args):
        if isinstance(value, int):
            yield from ((*args[:k], dim, *args[k + 1 :]) for dim in range(ndim) if dim != value)
        else:
            yield (*args[:k], (2, 2) if value != (2, 2) else (), *args[k + 1 :])
    if args:
        yield args[:-1]
    yield (*args, 0)


def _placements(ndim: int) -> list[Placement]:
    return [P, R, I, *(S(dim) for dim in range(ndim)), *(S(dim, (2, 2)) for dim in range(ndim))]


def _is_same(a: Placement, b: Placement, needs_grad: bool) -> bool:
    return not needs_grad and a.is_whole and b.is_whole


def _flip(there: fx.Node) -> None:
    known = facts(there)
    known.values = tuple(TensorInfo(v.shape, v.dtype, not v.needs_grad) for v in known.values)


# --------------------------------------------------------------------------------------------------------------- ops


def mutants_of_op(program: Program, node: fx.Node) -> Iterator[Mutant]:
    known = facts(node)
    for k, (value, layout) in enumerate(zip(known.values, known.layouts, strict=True)):
        for axis, placement in itertools.product(range(program.mesh.ndim), _placements(len(value.shape))):
            if placement != layout[axis] and not _is_same(placement, layout[axis], value.needs_grad):
                changed = (*layout[:axis], placement, *layout[axis + 1 :])
                layouts = (*known.layouts[:k], changed, *known.layouts[k + 1 :])
                yield "another layout", lambda there, _, layouts=layouts: setattr(facts(there), "layouts", layouts)
    if all(v.dtype.is_floating_point for v in known.values):
        yield "gradient flipped", lambda there, _: _flip(there)
    if not known.is_constant:
        yield "called constant", lambda there, _: setattr(facts(there), "is_constant", True)
    if known.random_axes is not None:
        for axes in ((), program.mesh.axes, None, program.mesh.axes[:1]):
            if axes != known.random_axes:
                yield "other random axes", lambda there, _, axes=axes: setattr(facts(there), "random_axes", axes)
    yield from _lowering_mutants(program, node)
    yield from _size_mutants(node)


def _lowering_mutants(program: Program, node: fx.Node) -> Iterator[Mutant]:
    for keyword, axes in node.kwargs.items():
        if not keyword.endswith("_axes"):
            continue
        others = [c for n in range(program.mesh.ndim + 1) for c in itertools.permutations(program.mesh.axes, n) if c != axes]
        for other in others:
            yield "other lowering axes", lambda there, _, keyword=keyword, other=other: there.update_kwarg(keyword, other)

        def plain(there: fx.Node, _: Program) -> None:
            there.target = facts(there).op  # type: ignore[assignment]
            there.kwargs = {k: v for k, v in there.kwargs.items() if not k.endswith("_axes")}
            facts(there).op = None

        yield "not lowered", plain
        yield "another function", lambda there, _: setattr(there, "target", runtime.all_reduce)
        yield (
            "another function",
            lambda there, _: setattr(there, "target", runtime.mean if there.target is not runtime.mean else runtime.embedding),
        )


def _size_mutants(node: fx.Node) -> Iterator[Mutant]:
    """Sizes among the arguments that the rule says are local."""
    rule = rule_of(str(facts(node).op or node.target))
    if rule is None:
        return
    schema = [argument.name for argument in (facts(node).op or node.target)._schema.arguments]  # type: ignore[union-attr]
    for name in filter(None, (rule.shape, rule.piece)):
        k = schema.index(name)
        given = node.args[k]
        if isinstance(given, int):
            for other in (given * 2, given + 1, 1):
                if other != given:
                    yield "another size", lambda there, _, k=k, other=other: there.update_arg(k, other)
            continue
        for j, size in enumerate(given):  # type: ignore[arg-type,var-annotated]
            if size == -1:
                continue
            for other in (size * 2, size + 1):
                sizes = [other if i == j else n for i, n in enumerate(given)]  # type: ignore[arg-type]
                yield "another size", lambda there, _, k=k, sizes=sizes: there.update_arg(k, sizes)


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(("name", "mesh", "asked"), PLANS, ids=lambda value: str(value))
def test_every_change_to_a_conversion_is_refused(name: str, mesh: str, asked: dict[str, Any]) -> None:
    program = finished(name, mesh, asked)
    check(program)
    tried: Counter[str] = Counter()
    nodes = one_of_each(program.nodes("conversion"), lambda node: (node.target, node.args[1], facts(node).needs_grad, len(node.args)))
    passed = [text for node in nodes for text in survivors(program, node, mutants_of_conversion(program, node), tried)]
    assert not passed, f"{len(passed)} of {tried.total()} mutants pass: {passed[:10]}"
    assert tried.total() > 15 * len(nodes), tried


@pytest.mark.parametrize(("name", "mesh", "asked"), [*PLANS, ("dropout", "a=2,b=2", {"seed": 6})], ids=lambda value: str(value))
def test_every_change_to_an_op_is_refused(name: str, mesh: str, asked: dict[str, Any]) -> None:
    program = finished(name, mesh, asked)
    tried: Counter[str] = Counter()
    nodes = one_of_each(program.nodes("op"), lambda node: (node.target, len(node.kwargs), facts(node).needs_grad, facts(node).random_axes))
    passed = [text for node in nodes for text in survivors(program, node, mutants_of_op(program, node), tried)]
    assert not passed, f"{len(passed)} of {tried.total()} mutants pass: {passed[:10]}"
    assert tried.total() > 5 * len(nodes), tried


def test_outputs_must_be_whole_or_split() -> None:
    program = finished("conv_net", "dp=2", {"template": "fsdp"})
    passed = 0
    for node in [
        n
        for n in program.nodes("op", "conversion")
        if any(p in (P, R) for p in facts(n).layouts[0]) and len(facts(n).values) == 1 and facts(n).needs_grad
    ]:
        mutant, there = copied(program, node)
        mutant.output.update_arg(0, [there])
        with pytest.raises(PlacementError, match=r"leaves the program as .*; only whole \(I\) or split values may"):
            check(mutant)
        passed += 1
    assert passed > 2


def test_the_text_names_the_node_the_axis_the_layouts_and_the_line() -> None:
    program = finished("gpt", "tp=2", {"template": "megatron", "hardware": "h100"})
    node = next(n for n in program.nodes("conversion") if n.target is runtime.all_reduce_invariant and "down" in n.name)
    node.replace_all_uses_with(node.args[0])
    program.graph.erase_node(node)
    with pytest.raises(PlacementError) as caught:
        check(program)
    expected = (
        "the program on tp=2 does not type-check:\n"
        "  blocks_0_drop_dropout: no strategy of aten.dropout.default on axis tp takes (blocks_0_down_linear P) to (I); at "
    )
    assert expected in str(caught.value), str(caught.value)
    assert "models.py:" in str(caught.value)


def test_all_faults_are_reported() -> None:
    program = finished("gpt", "tp=2", {"template": "megatron"})
    for node in program.nodes("conversion"):
        node.update_arg(1, "dp")
    with pytest.raises(PlacementError, match=r"converts on axis 'dp', which the mesh does not have[\s\S]*converts on axis 'dp'"):
        check(program)


def test_a_buffer_is_written_whole() -> None:
    program = finished("conv_net", "dp=2", {"template": "ddp"})
    updates = list(program.nodes("update"))
    for node in updates:
        mutant, there = copied(program, node)
        facts(there.args[0]).is_constant = True  # type: ignore[arg-type]
        with pytest.raises(PlacementError, match="writes a buffer that is called constant"):
            check(mutant)
    assert updates
