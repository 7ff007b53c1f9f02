"""Checkpointed regions: each is one unbroken run of nodes, which the program prints as a function of its own.

What the passes insert is not traced, so nothing says to which region it belongs. A conversion belongs to the region of its
users when all of them lie in one and it is cheaper to run it twice than to keep what it makes: what comes from parameters
(backward gathers weights again), from within the region, or grows. Everything else moves out of the way.
"""

from __future__ import annotations

import math

from torch import fx

from autoshard import runtime
from autoshard.errors import TraceError
from autoshard.placements import local_shape
from autoshard.program import Program, facts, op_name, op_of, row_of

_RESHAPES = {
    f"aten.{name}"
    for name in (
        "alias.default", "contiguous.default", "detach.default", "flatten.using_ints", "mT.default", "movedim.int", "numpy_T.default",
        "permute.default", "reshape.default", "squeeze.default", "squeeze.dim", "t.default", "to.dtype", "transpose.int",
        "unflatten.int", "unsqueeze.default", "view.default",
    )
}  # fmt: skip


def settle_regions(program: Program) -> None:
    """Give inserted nodes their region, and reorder the graph so that every region is unbroken."""
    numbers = list(dict.fromkeys(facts(node).recompute for node in program.graph.nodes if facts(node).recompute is not None))
    if not numbers:
        return
    for node in reversed(list(program.graph.nodes)):
        if facts(node).is_constant:  # computed once, outside
            facts(node).recompute = None
            continue
        if node.users and not facts(node).needs_grad and all(_only_updates(user) for user in node.users):
            facts(node).recompute = None  # it serves a buffer's new value, which backward does not ask for
        users = {facts(user).recompute for user in node.users}
        if _is_inserted(node) and len(users) == 1 and None not in users:
            number = users.pop()
            if _is_worth_repeating(program, node, number):
                facts(node).recompute = number
    for number in numbers:
        _gather(program, number)
    for node in program.nodes("conversion"):
        row = row_of(node)
        if row.is_repeated and facts(node).recompute is not None:  # the region runs again by itself
            node.target = getattr(runtime, row.name.removesuffix("_again"))
    _refuse_written_buffers(program)


def members(program: Program, number: int | None) -> list[fx.Node]:
    """The nodes of a region, in order."""
    return [node for node in program.graph.nodes if facts(node).recompute == number]


def results(nodes: list[fx.Node]) -> list[fx.Node]:
    """What a region makes that others read."""
    own = set(nodes)
    return [node for node in nodes if any(user not in own for user in node.users)]


def statistics(node: fx.Node) -> list[fx.Node]:
    """Buffers that an op writes while it runs: running mean and variance."""
    schema = getattr(op_of(node), "_schema", None) if facts(node).role == "op" else None
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    found = [value for name, value in zip(names, node.args, strict=False) if name in ("running_mean", "running_var")]
    return [value for value in found if isinstance(value, fx.Node)]


def _only_updates(node: fx.Node) -> bool:
    if facts(node).role == "update":
        return True
    is_outside = facts(node).role in ("op", "conversion") and facts(node).recompute is None
    return is_outside and bool(node.users) and not facts(node).needs_grad and all(map(_only_updates, node.users))


def _refuse_written_buffers(program: Program) -> None:
    """A region that runs again must not see what the first run wrote."""
    for buffer in program.nodes("buffer"):
        is_written = any(facts(user).role == "update" and user.args[0] is buffer for user in buffer.users)
        is_written = is_written or any(buffer in statistics(user) for user in buffer.users)
        reader = next((u for u in buffer.users if facts(u).recompute is not None and buffer not in statistics(u)), None)
        if is_written and reader is not None:
            raise TraceError(
                f"the buffer {facts(buffer).name} is written, and read in a checkpointed region at {facts(reader).source}: running the "
                "region again would read the new value; hand the region a clone of the buffer as an argument"
            )


def _is_inserted(node: fx.Node) -> bool:
    known = facts(node)
    if known.recompute is not None:
        return False
    is_cast = op_name(node) == "aten.to.dtype" and comes_from_parameter(node)
    return known.role == "conversion" or op_name(node) == "aten.detach.default" or is_cast


def repeats_gathers(program: Program) -> bool:
    """Whether some weight is gathered once more in backward."""
    return any(row_of(node).is_repeated for node in program.nodes("conversion"))


def comes_from_parameter(node: fx.Node) -> bool:
    """Whether a value is a parameter but for its place, dtype and shape."""
    while facts(node).role in ("start", "conversion", "projection") or op_name(node) in _RESHAPES:
        if len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return facts(node).role == "parameter"


def _is_worth_repeating(program: Program, node: fx.Node, number: int | None) -> bool:
    source = node.all_input_nodes[0]
    if facts(node).role != "conversion" or facts(source).recompute == number or comes_from_parameter(node):
        return True
    sizes = program.mesh.shape
    before, after = (local_shape(facts(n).value.shape, facts(n).layout, sizes) or () for n in (source, node))
    return math.prod(after) > math.prod(before)


def _gather(program: Program, number: int | None) -> None:
    """Move what stands between a region's nodes before it, or behind it when it depends on the region."""
    order, own = list(program.graph.nodes), set(members(program, number))
    if not own:
        return
    places = [k for k, node in enumerate(order) if node in own]
    span = order[places[0] : places[-1] + 1]
    behind: set[fx.Node] = set()
    for node in span:
        if node not in own and any(operand in own or operand in behind for operand in node.all_input_nodes):
            behind.add(node)
    for node in reversed(span):
        if node in behind and any(user in own for user in node.users):  # it leads from the region back into it
            behind.discard(node)
            own.add(node)
            facts(node).recompute = number
    first, last = span[0], span[-1]
    for node in span:
        if node not in own and node not in behind:
            first.prepend(node)
    for node in reversed([node for node in span if node in behind]):
        last.append(node)
