"""The placement checker: re-derives the type of every node of a finished program and refuses one that does not follow.

It reads nothing of how the program was made: an op must have, on every axis, operand and result placements that are a row
of its rule's strategies; a conversion must be a row of the table, between the layouts beside it, on a dim whose pieces do
not interleave, and in two parts only where one wait ends one start; what an op sums over must be zero at padding, and
nothing else may be; what leaves the program must be whole or split. All faults are reported, not the first.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from autoshard import runtime
from autoshard.branches import branch_faults, tie_faults
from autoshard.candidates import (
    Mask,
    axes_in_place,
    base,
    bound_rule,
    is_storable,
    layouts_of,
    lowered_sizes,
    masks_of,
    settle,
    whole_strategy,
)
from autoshard.conversions import (
    AGAIN,
    BY_KINDS,
    BY_NAME,
    STARTS,
    Step,
    is_step_sound,
    replace_axis,
    step_arguments,
    step_sizes,
    without_gradient,
)
from autoshard.equations import Equation, divides, strategies
from autoshard.errors import PlacementError
from autoshard.ops.row import Rule, is_differentiable
from autoshard.placements import I, Layout, P, Placement, R, local_shape, padded_axes, shown_layout
from autoshard.program import (
    Facts,
    Program,
    arguments,
    asked_of,
    call_of,
    carries_gradient,
    draws_random,
    facts,
    is_wait,
    op_of,
    producer,
    tensor_operands,
)
from autoshard.regions import comes_from_parameter
from autoshard.stage_checker import stage_faults


def check(program: Program) -> None:
    """Raise PlacementError that lists every fault of the program."""
    faults: list[str] = []
    sound: set[object] = set()
    for node in program.nodes():
        key = _everything_read(node)
        if key is None or key not in sound:
            found = [f"{node.name}: {fault}" for fault in faults_of(program, node)]
            faults += found
            if key is not None and not found:
                sound.add(key)
    faults += [*_region_faults(program), *branch_faults(program), *stage_faults(program)]
    if faults:
        shown = "\n  ".join(faults[:20]) + (f"\n  and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise PlacementError(f"the program on {program.mesh.whole} does not type-check:\n  {shown}")


def _everything_read(node: fx.Node) -> object | None:
    """All that `faults_of` reads of an op: equal ops of repeated layers are judged once. None for what is judged each time."""
    known, operands = facts(node), tensor_operands(node) if facts(node).role == "op" else []
    if known.role != "op" or any(facts(operand).role == "mask" for operand in operands):
        return None
    made = [producer(operand) for operand in operands]
    given = tuple((facts(p).values[k], facts(o).layouts, facts(o).is_constant) for (p, k), o in zip(made, operands, strict=True))
    own = (known.values, known.layouts, known.strategies, known.random_axes, known.is_constant, known.op, known.is_drawn_whole)
    # repr: arguments hold lists, and sizes that may change, which are equal to numbers
    arguments_ = repr(fx.map_arg((node.args, node.kwargs), lambda operand: None))
    return (node.target, arguments_, repr([value.shape for value, *_ in given]), given, repr(known.values), own)


def _region_faults(program: Program) -> Iterator[str]:
    """Whether every checkpointed region is one unbroken run of nodes that can run twice."""
    seen: dict[int, fx.Node] = {}
    before: int | None = None
    for node in program.nodes():
        number = facts(node).recompute
        if number is not None and number != before and number in seen:
            yield f"{node.name}: goes on with region {number}, which ended at {seen[number].name}"
        if number is not None:
            seen[number] = node
            if facts(node).role not in ("op", "conversion", "tie", "projection") or facts(node).is_constant:
                yield f"{node.name}: a {facts(node).role} cannot be recomputed"
        before = number


def faults_of(program: Program, node: fx.Node) -> Iterator[str]:
    """What is wrong with one node, given the nodes that it reads."""
    known = facts(node)
    if known.role == "output":
        for operand in tensor_operands(node):
            yield from _leaving_faults(program, operand)
        return
    if len(known.layouts) != len(known.values):
        yield "has no layout"
        return
    for value, layout in zip(known.values, known.layouts, strict=True):
        if local_shape(value.shape, layout, program.mesh.shape) is None:
            yield f"shape {value.shape} does not divide as {shown_layout(layout, program.mesh)}"
            return
        if not value.needs_grad and layout != without_gradient(layout):
            yield f"{shown_layout(layout, program.mesh)} of a value without gradient; I is written R there"
    depends = known.role in ("parameter", "input") or not all(facts(operand).is_constant for operand in node.all_input_nodes)
    if known.is_constant and depends:
        yield "is called constant, and depends on a parameter or input"
    if known.role != "op" and any(facts(operand).role == "mask" for operand in node.all_input_nodes) and known.role != "mask":
        yield "reads a masked value; only an op that sums over padding may"
    if known.role != "conversion" and any(facts(operand).role == "start" for operand in node.all_input_nodes):
        yield "reads a conversion that was started and not waited for"
    check_role = {
        "op": _op_faults,
        "start": _start_faults,
        "conversion": _conversion_faults,
        "mask": _mask_faults,
        "projection": _projection_faults,
    }.get(known.role, _placeholder_faults)
    yield from tie_faults(node) if known.role == "tie" else check_role(program, node, known)


def _leaving_faults(program: Program, operand: fx.Node) -> Iterator[str]:
    layout, whole = facts(operand).layout, I if facts(operand).needs_grad else R
    text = f"{operand.name} leaves the program as {shown_layout(layout, program.mesh)}"
    if any(not (p.is_split or p == whole) for p in layout):
        yield f"{text}; only whole (I) or split values may"
    if program.leaves_whole and any(p.is_split for p in layout):
        yield f"{text}; whole results are promised"
    if not is_storable(layout):
        yield f"{text}, which DTensor cannot say"
    if facts(operand).role == "mask" or padded_axes(facts(operand).value.shape, layout, program.mesh.shape):
        yield f"{text}, with padding"


def _placeholder_faults(program: Program, node: fx.Node, known: Facts) -> Iterator[str]:
    if known.role == "update":
        if facts(tensor_operands(node)[0]).is_constant:
            yield "writes a buffer that is called constant"
        if any(facts(operand).layout != without_gradient((I,) * program.mesh.ndim) for operand in tensor_operands(node)):
            yield "writes a buffer with a value that is not whole on every rank"
        return
    if any(placement == P or (placement == R and known.needs_grad) for placement in known.layout):
        yield f"enters as {shown_layout(known.layout, program.mesh)}; parameters and inputs are whole (I) or split"
    if known.role == "parameter" and not is_storable(known.layout):
        yield f"{shown_layout(known.layout, program.mesh)} cannot be stored as a DTensor"


def _projection_faults(program: Program, node: fx.Node, known: Facts) -> Iterator[str]:
    source, index = producer(node)
    if (
        node.target is not operator.getitem
        or known.values != (facts(source).values[index],)
        or known.layout != facts(source).layouts[index]
    ):
        yield f"is not output {index} of {source.name}"


def _start_faults(program: Program, node: fx.Node, known: Facts) -> Iterator[str]:
    """What `wait` converts is judged there; here, whether the first part stands alone."""
    source, row = node.args[0] if node.args else None, STARTS.get(getattr(node.target, "__name__", ""))
    if row is None or node.target is not getattr(runtime, f"start_{row.name}") or not isinstance(source, fx.Node):
        yield f"calls {node.target}, which starts no conversion"
        return
    if (known.values, known.layouts) != (facts(source).values, facts(source).layouts):
        yield f"starts with another value or layout than {source.name} has"
    waits = [user for user in node.users if facts(user).role == "conversion" and is_wait(user)]
    if len(waits) != 1 or len(node.users) != 1:
        yield f"is waited for {len(waits)} times and read by {len(node.users)} nodes; one wait has to end it"
    if node.kwargs or known.value.dtype.is_complex:
        yield "starts a conversion of complex numbers or of a dim that does not divide, which has one part alone"
    if known.is_constant or known.recompute is not None:
        yield "starts what is computed once or runs again"


def _conversion_faults(program: Program, node: fx.Node, known: Facts) -> Iterator[str]:
    asked, name = node, getattr(node.target, "__name__", "")
    if is_wait(node):
        asked = asked_of(node) if node.all_input_nodes else node
        name = asked.target.__name__.removeprefix("start_") if facts(asked).role == "start" else ""  # type: ignore[union-attr]
        if not name or node.args != (asked,) or node.kwargs or known.recompute is not None:
            yield f"waits for {node.args}, which is not a conversion that was started for it"
            return
    row = BY_NAME.get(name)
    if row is None or (asked is node and node.target is not getattr(runtime, row.name)):
        yield f"calls {node.target}, which is not a conversion"
        return
    if len(asked.args) < 2:
        yield f"{row.name} is called with {asked.args}"
        return
    source, axis_name = asked.args[0], asked.args[1]
    if asked is node and facts(source).role == "start":  # type: ignore[arg-type]
        yield f"converts {source}, which was started and not waited for"
    if axis_name not in program.mesh.axes or not isinstance(source, fx.Node):
        yield f"converts on axis {axis_name!r}, which the mesh does not have"
        return
    if known.values != (facts(source).value,):
        yield f"changes the value of {source.name}"
    axis, before = program.mesh.axes.index(axis_name), facts(source).layout
    step = Step(axis, before[axis], known.layout[axis])
    expected_row = BY_KINDS.get((step.src.kind, step.dst.kind))
    if row.is_repeated and not comes_from_parameter(source):
        yield f"{row.name} gathers what is no parameter; backward would need {source.name} kept"
    elif row.is_repeated and known.recompute is not None:
        yield f"{row.name} stands in region {known.recompute}, which runs again by itself"
    if replace_axis(before, axis, known.layout[axis]) != known.layout:
        yield f"changes {shown_layout(before, program.mesh)} into {shown_layout(known.layout, program.mesh)}, more than axis {axis_name}"
    elif row != (AGAIN.get(expected_row.name) if row.is_repeated and expected_row else expected_row) or step.src == step.dst:
        yield f"{row.name} takes {row.src} to {row.dst}, here {step.src} to {step.dst} on {axis_name}"
    elif not is_step_sound(before, step):
        yield f"{row.name} on {axis_name} would interleave the pieces of {shown_layout(before, program.mesh)}"
    else:
        expected = step_arguments(before, step, known.value.shape, program.mesh.shape)
        if tuple(asked.args[2:]) != expected:
            yield f"{row.name} is called with {asked.args[2:]}, its layouts ask {expected}"
        lengths = step_sizes(before, step, known.value.shape, program.mesh.shape)
        if dict(asked.kwargs) != lengths:
            yield f"{row.name} is called with {dict(asked.kwargs)}, its layouts ask {lengths}"


def _mask_faults(program: Program, node: fx.Node, known: Facts) -> Iterator[str]:
    source = node.args[0]
    if node.target is not runtime.mask_padding or not isinstance(source, fx.Node):
        yield f"calls {node.target}, which is not mask_padding"
    elif (known.values, known.layouts) != (facts(source).values, facts(source).layouts):
        yield f"changes more of {source.name} than its padding"
    elif _masks(program, node, 0) is None:
        yield f"masks {node.args[1:]} {dict(node.kwargs)}, where {shown_layout(known.layout, program.mesh)} has no such padding"


def _masks(program: Program, node: fx.Node, number: int) -> list[Mask] | None:
    """The masks on an operand, by its number; None where one is no padding of its layout."""
    found: list[Mask] = []
    while facts(node).role == "mask":
        known, padded = facts(node), padded_axes(facts(node).value.shape, facts(node).layout, program.mesh.shape)
        found += [Mask(number, a, dim, known.value.shape[dim]) for a, dim in padded if node.args[1:] == (program.mesh.axes[a], dim)]
        if not found or node.kwargs != {"size": found[-1].size} or len(set(found)) < len(found):
            return None
        node = node.args[0]  # type: ignore[assignment]
    return found


def _op_faults(program: Program, node: fx.Node, known: Facts) -> Iterator[str]:
    operands = tensor_operands(node)
    values = [*(facts(p).values[k] for p, k in map(producer, operands)), *known.values]
    layouts = [*(facts(operand).layout for operand in operands), *known.layouts]
    flows = carries_gradient(node)
    for k, value in enumerate(known.values):
        if value.needs_grad != (flows and is_differentiable(value.dtype)):
            claims = "claims a gradient that it does not have" if value.needs_grad else "denies the gradient that its operands have"
            yield f"output {k} {claims}"
    rule, equation = bound_rule(node)
    proposals: dict[int, list[tuple[int, ...]]] = {}
    for layout in layouts:
        for placement in layout:
            if placement.segments and placement.segments not in proposals.setdefault(sum(placement.segments), []):
                proposals[sum(placement.segments)].append(placement.segments)
    factors: list[str] = []
    for axis, n in enumerate(program.mesh.shape):
        call, actual = call_of(node), tuple(layout[axis] for layout in layouts)
        allowed = (
            [whole_strategy(call, R), whole_strategy(call, I)]
            if equation is None
            else [settle(s, rule) for s in strategies(equation, n, proposals)]
        )
        matching = [s for s in allowed if tuple(x[0] for x in layouts_of((s,), values, len(operands))) == actual]
        if not matching:
            yield _mismatch(program, node, axis, actual, len(operands))
            return
        recorded = known.strategies[axis].factor if axis < len(known.strategies) else ""
        factors.append(recorded if any(s.factor == recorded for s in matching) else matching[0].factor)
    if equation is not None and not divides(equation, factors, program.mesh.shape):
        yield f"splits factors {factors} of {op_of(node)} more ways than their sizes divide"
    if program.is_localized:
        yield from _local_faults(program, node, known, rule, equation, tuple(factors))


def _mismatch(program: Program, node: fx.Node, axis: int, actual: tuple[Placement, ...], inputs: int) -> str:
    names = [operand.name for operand in tensor_operands(node)]
    given = ", ".join(f"{name} {placement}" for name, placement in zip(names, actual, strict=False))
    wanted = ", ".join(map(str, actual[inputs:]))
    return f"no strategy of {op_of(node)} on axis {program.mesh.axes[axis]} takes ({given}) to ({wanted}); at {facts(node).source}"


def _local_faults(
    program: Program, node: fx.Node, known: Facts, rule: Rule | None, equation: Equation | None, factors: tuple[str, ...]
) -> Iterator[str]:
    """Whether the node is rewritten for local tensors as its strategies ask."""
    found = [mask for k, operand in enumerate(tensor_operands(node)) for mask in _masks(program, operand, k) or []]
    wanted = masks_of(rule, equation, factors, program.mesh.shape)
    if sorted(found) != sorted(wanted):
        yield f"reads operands masked as {found}, its sums ask {wanted}"
    if rule is None:
        if known.random_axes != (() if draws_random(node) and not known.is_drawn_whole else None):
            yield f"draws random numbers on axes {known.random_axes}, but is computed whole"
        return
    axes = axes_in_place(rule, node, factors, program.mesh)
    lengths = lowered_sizes(rule, equation, factors, program.mesh.shape)
    given = {key: value for key, value in node.kwargs.items() if key.endswith(("_axes", "_sizes"))}
    is_own = known.op is None and rule.lowering is not None and node.target is getattr(runtime, rule.lowering.function)
    if given != {**axes, **lengths} or (bool(axes) != (known.op is not None) and not is_own):
        yield f"is lowered for axes {given}, its layouts ask { ({**axes, **lengths}) }"
    elif axes and node.target is not getattr(runtime, rule.lowering.function):  # type: ignore[union-attr]
        yield f"calls {node.target}, its lowering is {rule.lowering.function}"  # type: ignore[union-attr]
    drawn = tuple(a for a, f in zip(program.mesh.axes, factors, strict=True) if f and base(f) not in rule.undrawn)
    if known.random_axes != (drawn if rule.is_random(call_of(node)) else None):
        yield f"draws random numbers on axes {known.random_axes}, its layouts ask {drawn}"
    if rule.shape is not None:
        local: Layout | tuple = local_shape(known.value.shape, known.layout, program.mesh.shape) or ()
        sizes = arguments(node)[rule.shape]
        start = arguments(node)["dim"] % (len(local) - len(sizes) + 1) if rule.shape == "sizes" else 0
        wrong = [(g, n) for g, n in zip(sizes, local[start:], strict=False) if g not in (-1, n)]
        if wrong:
            yield f"asks for shape {sizes}, the local one is {list(local)}"
    if rule.piece is not None:
        dim, given_sizes = arguments(node)["dim"] % len(known.value.shape), arguments(node)[rule.piece]
        pieces = [(local_shape(v.shape, x, program.mesh.shape) or v.shape)[dim] for v, x in zip(known.values, known.layouts, strict=True)]
        is_right = given_sizes == (pieces[0] if isinstance(given_sizes, int) else pieces)
        if not is_right and not (isinstance(given_sizes, int) and len(pieces) == 1 and given_sizes > pieces[0]):
            yield f"cuts pieces of {given_sizes}, the local ones are {pieces}"
