"""Branches of torch.cond: ordinary nodes that remember where they stand, and nodes that give the value of the branch that ran.

    predicate                   one bool, whole on every rank
    nodes of the first branch   facts.branch ends in (number, True); every op typed, conversions between them
    nodes of the second branch  (number, False)
    either(predicate, a, b)     one per result, behind both: `a` from the first, `b` from the second, in the same layout

A cond is so one unbroken run of nodes, which the program prints as an `if`. All ranks take the same branch, so a branch may
communicate, forward and backward. Passes insert nodes that know of no branch; settle_branches gives them theirs.

Gradients are those of torch.cond: what a branch does not lead to a result gets zeros from it, by a tie (runtime.zero_gradients)
on the branch's results, so that it has a gradient whichever branch runs. See docs/decisions/010-branches.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from autoshard import runtime
from autoshard.conversions import without_gradient
from autoshard.program import Branch, Facts, Program, facts, op_name, set_facts
from autoshard.regions import comes_from_parameter

SIDES = {True: 1, False: 2}  # a branch -> where its value stands among the arguments of `either`


def is_either(node: fx.Node) -> bool:
    """Whether the node is a result of a cond."""
    return node.target is runtime.either


def number_of(node: fx.Node) -> int:
    """The number of the cond that a node is a result of."""
    return node.args[3]  # type: ignore[return-value]


def results_of(program: Program) -> dict[int, list[fx.Node]]:
    """The results of every cond, by its number, inner conds first."""
    found: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if is_either(node):
            found.setdefault(number_of(node), []).append(node)
    return found


def predicates(program: Program) -> dict[int, fx.Node]:
    """The predicate of every cond, by its number."""
    return {number: nodes[0].args[0] for number, nodes in results_of(program).items()}  # type: ignore[misc]


def runs(node: fx.Node, known: Mapping[int, fx.Node], holds: Callable[[fx.Node], bool]) -> bool:
    """Whether `node` is run where `holds` tells what the predicates, `known` by number, are."""
    return all(holds(known[number]) == side for number, side in facts(node).branch)


def taken(node: fx.Node, holds: Callable[[fx.Node], bool]) -> Any:
    """The operand whose value the result `node` of a cond has."""
    return node.args[SIDES[holds(node.args[0])]]  # type: ignore[arg-type]


def uses_of(node: fx.Node) -> list[Branch]:
    """Where a node is read: what a result of a cond takes from a branch is read in that branch."""
    found: list[Branch] = []
    for user in node.users:
        path = facts(user).branch
        if is_either(user):
            found += [(*path, (number_of(user), side)) for side, k in SIDES.items() if user.args[k] is node]
            found += [path] if user.args[0] is node else []
        else:
            found.append(path)
    return found


def drop_without_result(program: Program) -> None:
    """Remove branches of which nothing is read any more."""
    known = results_of(program)
    for node in reversed(list(program.graph.nodes)):
        if any(number not in known for number, _ in facts(node).branch):
            program.graph.erase_node(node)


def settle_branches(program: Program) -> None:
    """Give inserted nodes their branch, tie what a branch does not read, and make every cond one unbroken run of nodes."""
    conds = results_of(program)
    if not conds:
        return
    for node in reversed(list(program.graph.nodes)):
        if facts(node).is_constant:  # computed once, outside
            facts(node).branch = ()
        elif _is_inserted(node) and node.users:
            facts(node).branch = _common(uses_of(node))
            facts(node).recompute = _recomputed(node, conds) if facts(node).branch else facts(node).recompute
    tie_branches(program)
    order = _ordered(list(program.graph.nodes), 0)
    for before, node in itertools.pairwise(order):
        before.append(node)


def tie_branches(program: Program) -> None:
    """Give every value that a cond reads a gradient from either of its branches."""
    for number, results in results_of(program).items():
        for (result, side), lost in unreached(program, number, results).items():
            _tie(program, result, side, lost)


def _recomputed(node: fx.Node, conds: Mapping[int, list[fx.Node]]) -> int | None:
    """The checkpointed region that the conds around a node stand in."""
    found = (facts(conds[number][0]).recompute for number, _ in facts(node).branch)
    return next((number for number in found if number is not None), None)


def _is_inserted(node: fx.Node) -> bool:
    known = facts(node)
    is_free = op_name(node) == "aten.detach.default" or (op_name(node) == "aten.to.dtype" and comes_from_parameter(node))
    return known.role == "conversion" or (is_free and not known.branch and known.recompute is None)


def _common(paths: Sequence[Branch]) -> Branch:
    """The innermost branch that contains all of `paths`."""
    same = itertools.takewhile(lambda steps: len(set(steps)) == 1, zip(*paths, strict=False))
    return tuple(steps[0] for steps in same)


def is_inside(path: Branch, number: int) -> bool:
    """Whether a branch is one of the cond `number`, or stands in one."""
    return any(step[0] == number for step in path)


# ------------------------------------------------------------------------------------------------------------- gradients


def unreached(program: Program, number: int, results: Iterable[fx.Node]) -> dict[tuple[fx.Node, bool], list[fx.Node]]:
    """By result and branch of a cond: the values from outside that get a gradient by way of the cond, but not from there."""
    inside = [node for node in program.graph.nodes if is_inside(facts(node).branch, number)]
    read = [operand for node in inside for operand in node.all_input_nodes]
    read += [_value_from(side, result) for result in results for side in SIDES]
    entering = dict.fromkeys(_origin(operand) for operand in read)
    wanted = [node for node in entering if facts(node).needs_grad and not is_inside(facts(node).branch, number)]
    found: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
    for result in results:
        for side in SIDES if facts(result).needs_grad else ():
            reached = _reached(_value_from(side, result), number)
            lost = [node for node in wanted if node not in reached]
            if lost:
                found[result, side] = lost
    return found


def _value_from(side: bool, result: fx.Node) -> fx.Node:
    return result.args[SIDES[side]]  # type: ignore[return-value]


def _origin(node: fx.Node) -> fx.Node:
    """What a node's value is, but for its layout."""
    while facts(node).role in ("start", "conversion", "mask"):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _reached(result: fx.Node, number: int) -> set[fx.Node]:
    """Values from outside of the cond `number` that get a gradient from `result` of one of its branches."""
    found: set[fx.Node] = set()
    pending = [result]
    while pending:
        node = pending.pop()
        if node in found or not facts(node).needs_grad:
            continue
        found.add(node)
        if is_inside(facts(node).branch, number) or facts(node).role in ("start", "conversion", "mask"):
            pending += node.all_input_nodes
    return found


def _tie(program: Program, result: fx.Node, side: bool, others: Sequence[fx.Node]) -> None:
    value, known = _value_from(side, result), facts(result)
    with program.graph.inserting_before(result):
        new = program.graph.create_node("call_function", runtime.zero_gradients, (value, *others), name=f"{value.name}_tied")
    layouts = facts(value).layouts[:1] if facts(value).needs_grad else known.layouts
    tie = Facts("tie", known.values, source=known.source, layouts=layouts, recompute=known.recompute)
    tie.branch = (*known.branch, (number_of(result), side))
    set_facts(new, tie)
    result.update_arg(SIDES[side], new)


# ----------------------------------------------------------------------------------------------------------------- order


def _ordered(nodes: list[fx.Node], depth: int) -> list[fx.Node]:
    """`nodes`, whose branches have `depth` steps in common, in an order in which every cond is one unbroken run."""
    order: list[fx.Node] = []
    conds = [cond_of(node, depth) for node in nodes]
    last = {number: k for k, number in enumerate(conds)}
    k = 0
    while k < len(nodes):
        number, end = conds[k], last[conds[k]]
        if number is None:
            order.append(nodes[k])
            k += 1
            continue
        own = [node for node, cond in zip(nodes[k : end + 1], conds[k : end + 1], strict=True) if cond == number]
        order += _ordered([node for node in nodes[k:end] if node not in set(own)], depth)
        for side in SIDES:
            order += _ordered([node for node in own if facts(node).branch[depth : depth + 1] == ((number, side),)], depth + 1)
        order += [node for node in own if len(facts(node).branch) == depth]
        k = end + 1
    return order


def cond_of(node: fx.Node, depth: int) -> int | None:
    """The number of the cond that a node belongs to, as a result or in a branch, inside a branch of `depth` steps."""
    path = facts(node).branch
    if len(path) > depth:
        return path[depth][0]
    return number_of(node) if is_either(node) else None


# --------------------------------------------------------------------------------------------------------------- checking


def branch_faults(program: Program) -> Iterator[str]:
    """What is wrong with the branches of a finished program."""
    order = list(program.graph.nodes)
    known = results_of(program)
    for node in order:
        path = facts(node).branch
        yield from (f"{node.name}: stands in cond {number}, which has no result" for number, _ in path if number not in known)
        if path and facts(node).role not in ("op", "conversion", "mask", "tie", "projection"):
            yield f"{node.name}: a {facts(node).role} cannot stand in a branch"
        if path and facts(node).is_constant:
            yield f"{node.name}: is called constant, and stands in a branch"
        for other in uses_of(node):
            if other[: len(path)] != path:
                yield f"{node.name}: is read outside of the branch that makes it"
        if is_either(node):
            yield from _result_faults(node, known[number_of(node)][0])
    if all(number in known for node in order for number, _ in facts(node).branch):
        wrong = next((node for node, wanted in zip(order, _ordered(order, 0), strict=True) if node is not wanted), None)
        if wrong is not None:
            yield f"{wrong.name}: stands between the nodes of a branch"
        for number, results in known.items():
            for (result, side), lost in unreached(program, number, results).items():
                names = ", ".join(node.name for node in lost)
                yield f"{result.name}: its {'first' if side else 'second'} branch gives no gradient to {names}"


def _result_faults(node: fx.Node, first: fx.Node) -> Iterator[str]:
    if len(node.args) != 4 or type(node.args[3]) is not int or node.kwargs:
        yield f"{node.name}: is called with {node.args[3:]}, a cond has a number"
    elif (node.args[0], facts(node).branch, facts(node).recompute) != (first.args[0], facts(first).branch, facts(first).recompute):
        yield f"{node.name}: is no result of the cond of {first.name}"


def tie_faults(node: fx.Node) -> Iterator[str]:
    """What is wrong with a node that gives gradients of zero."""
    value, known = node.args[0], facts(node)
    if node.target is not runtime.zero_gradients or node.kwargs or not isinstance(value, fx.Node):
        yield f"calls {node.target}, which is not zero_gradients"
        return
    given = facts(value)
    same = known.value.shape == given.value.shape and known.value.dtype == given.value.dtype
    fitting = known.layout == given.layout if given.needs_grad else without_gradient(known.layout) == given.layout
    if not same or not fitting or not known.needs_grad:
        yield f"changes more of {value.name} than its gradient"
    if any(not is_either(user) for user in node.users):
        yield "is read by more than the result of its cond"
