"""overlap_collectives: start collectives early and wait for them late, where there is compute in between.

The nodes that compute, in order, stand at the places 0, 1, 2, ...; a checkpointed region is one place. Per chain of conversions
between a value and its readers:

    need     the place of the first reader: there the chain has to be done
    ready    the place after the one that makes its operand; 0 for what comes from parameters alone
    start    the earliest place from `ready` on from which it fits: at every place, what is on its way or waits to be read may
             hold `ahead_bytes`, counting what is needed no later

By default that is what the layer holds that gathers most, so weights are gathered while the layer before computes. Several steps of a
chain are spread evenly over the compute between start and need. In backward everything is mirrored: the dual of a collective is
launched where the forward pass waits, and waited for where it starts. A parameter's `I->R` moves nothing in the forward
pass, and its gradient is kept anyway: it holds nothing, starts at the top, and is waited for at the end of backward.

Every rank runs this one program, so all launch their collectives in one order. Collectives inside checkpointed regions, of complex
numbers, and over dims that do not divide stay in one part.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import fx

from autoshard import runtime
from autoshard.branches import cond_of
from autoshard.conversions import COMMUNICATES
from autoshard.costs import CostModel
from autoshard.hardware import Hardware
from autoshard.program import Facts, Program, asked_of, facts, is_wait, op_name, row_of, set_facts
from autoshard.timeline import work_of

_LIGHT = ("aten.to.dtype", "aten.detach.default")  # what may stand between a parameter and its conversion


@dataclass(frozen=True)
class OverlapCollectives:
    """Split and move collectives. ahead_bytes: what may be on its way, see above. With is_on=False, leave the program as it is."""

    hardware: Hardware
    is_on: bool = True
    ahead_bytes: float | None = None

    def __call__(self, program: Program) -> Program:
        if not self.is_on:
            return program
        if program.pipeline is not None:
            program.note("collectives of pipeline stages are not overlapped with compute: overlap=True has no effect")
            return program
        costs = CostModel(program.mesh, self.hardware)
        places = _Places.of(program, costs)
        chains = _chains(program, places, costs)
        limit = _largest_layer(chains) if self.ahead_bytes is None else self.ahead_bytes
        _choose_starts(chains, limit, len(places.first))
        _arrange(program, places, chains)
        return program


@dataclass
class _Places:
    """Where each node that computes stands, the first node of each place, and the forward seconds of ops before it."""

    number: dict[fx.Node, int] = field(default_factory=dict)
    first: list[fx.Node] = field(default_factory=list)
    before_s: list[float] = field(default_factory=lambda: [0.0])

    @classmethod
    def of(cls, program: Program, costs: CostModel) -> _Places:
        places, region, cond = cls(), None, None
        for node in program.nodes():
            known = facts(node)
            if node.op == "placeholder" or known.is_constant or _is_movable(program, node):
                continue
            goes_on = (known.recompute is not None and known.recompute == region) or (cond is not None and cond == cond_of(node, 0))
            if not goes_on:
                places.first.append(node)
                places.before_s.append(places.before_s[-1])
            region, cond = known.recompute, cond_of(node, 0)
            places.number[node] = len(places.first) - 1
            places.before_s[-1] += work_of(program, node, costs).forward_s if known.role == "op" else 0.0
        return places

    def middle(self, start: int, need: int, share: float) -> int:
        """The place before which `share` of the compute from `start` up to `need` is done."""
        wanted = self.before_s[start] + share * (self.before_s[need] - self.before_s[start])
        return min(max(bisect.bisect_left(self.before_s, wanted), start), need)

    def has_compute(self, start: int, need: int) -> bool:
        return self.before_s[need] > self.before_s[start]


@dataclass
class _Chain:
    """Nodes that run one after the other from a value to its readers; `parts` are those that may be taken apart."""

    nodes: list[fx.Node]
    parts: list[fx.Node]
    ready: int
    need: int
    held_bytes: float
    layer: str
    start: int = 0


def _is_movable(program: Program, node: fx.Node) -> bool:
    """What may be taken apart, and what leads from a parameter to it."""
    known = facts(node)
    if known.recompute is not None or known.branch or not node.users:
        return False
    return _may_split(program, node) or _is_of_parameter(node)


def _may_split(program: Program, node: fx.Node) -> bool:
    known = facts(node)
    if known.role != "conversion" or known.is_constant or known.recompute is not None or known.branch or node.kwargs or is_wait(node):
        return False
    row = row_of(node)
    moves = row.forward in COMMUNICATES or (row.backward in COMMUNICATES and known.needs_grad)
    is_alone = program.mesh.shape[program.mesh.index(str(node.args[1]))] == 1
    return moves and not row.is_repeated and not is_alone and not known.value.dtype.is_complex


def _is_of_parameter(node: fx.Node) -> bool:
    """Whether a node is a parameter, or follows from one alone by conversions and casts."""
    while facts(node).role == "conversion" or op_name(node) in _LIGHT:
        node = node.all_input_nodes[0]
    return facts(node).role == "parameter"


def _chains(program: Program, places: _Places, costs: CostModel) -> list[_Chain]:
    """Movable nodes as chains, operands first. A node that several read ends its chain, and its readers begin others."""
    movable = [node for node in program.nodes() if node.op != "placeholder" and node not in places.number and not facts(node).is_constant]
    need: dict[fx.Node, int] = {}
    for node in reversed(movable):
        need[node] = min(need[user] if user in need else places.number[user] for user in node.users)
    taken: set[fx.Node] = set()
    found: list[_Chain] = []
    for node in movable:
        if node in taken:
            continue
        nodes = [node]
        while len(nodes[-1].users) == 1 and next(iter(nodes[-1].users)) in need:
            nodes.append(next(iter(nodes[-1].users)))
        taken.update(nodes)
        source = node.all_input_nodes[0]
        ready = need[source] if source in need else places.number.get(source, -1) + 1
        parts = [part for part in nodes if _may_split(program, part)]
        is_free = _is_of_parameter(node) and all(row_of(part).forward not in COMMUNICATES for part in parts)
        held = 0.0 if is_free else max(costs.local_bytes(facts(part).value, facts(part).layout) for part in nodes)
        layer = _layer(facts(places.first[need[nodes[-1]]]).source.module)
        found.append(_Chain(nodes, parts, ready, need[nodes[-1]], held, layer))
    return found


def _layer(path: str) -> str:
    """The layer that a module belongs to: its path up to the first number, `blocks.3` of `blocks.3.mlp.up`."""
    parts = path.split(".")
    numbered = next((k for k, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: numbered + 1])


def _largest_layer(chains: list[_Chain]) -> float:
    held: dict[str, float] = {}
    for chain in chains:
        held[chain.layer] = held.get(chain.layer, 0.0) + chain.held_bytes
    return max(held.values(), default=0.0)


def _choose_starts(chains: list[_Chain], limit: float, count: int) -> None:
    """Set `start` of each chain, those that are needed first before others; weights are launched in the order of need."""
    ahead, latest = [0.0] * count, 0
    for chain in sorted(chains, key=lambda chain: chain.need):
        is_weight = chain.ready == 0 and chain.held_bytes > 0
        earliest = max(chain.ready, latest) if is_weight else chain.ready
        chain.start = chain.need
        while chain.start > earliest and ahead[chain.start - 1] + chain.held_bytes <= limit:
            chain.start -= 1
            ahead[chain.start] += chain.held_bytes
        latest = chain.start if is_weight else latest


def _arrange(program: Program, places: _Places, chains: list[_Chain]) -> None:
    """Put every chain where it was chosen to run. At one place, what is needed there comes first."""
    planned = [
        (slot, slot < chain.need, chain.need, k, node) for k, chain in enumerate(chains) for slot, node in _slots(program, places, chain)
    ]
    for slot, *_, node in sorted(planned, key=lambda entry: entry[:4]):
        places.first[slot].prepend(node)


def _slots(program: Program, places: _Places, chain: _Chain) -> Iterator[tuple[int, fx.Node]]:
    """The chain's nodes, in order and with starts between them, each with the place before which it stands."""
    start = chain.start if places.has_compute(chain.start, chain.need) else chain.need
    steps, number = len(chain.parts), 0
    bounds = [*(places.middle(start, chain.need, k / steps) for k in range(steps)), chain.need]
    for node in chain.nodes:
        if node in chain.parts:
            number += 1
            if places.has_compute(bounds[number - 1], bounds[number]):
                yield bounds[number - 1], _split(program, node)
        yield bounds[number], node


def _split(program: Program, node: fx.Node) -> fx.Node:
    """Make `node` the wait for a new node that starts it."""
    known, source = facts(node), node.all_input_nodes[0]
    with program.graph.inserting_before(node):
        start = program.graph.create_node(
            "call_function", getattr(runtime, f"start_{row_of(node).name}"), node.args, {}, name=f"{node.name}_start"
        )
    set_facts(start, Facts("start", known.values, known.name, known.source, facts(source).layouts))
    node.target, node.args = runtime.wait, (start,)
    return start


def joined(program: Program) -> Program:
    """A copy with every conversion in one part again, just before its first reader; the program itself where none is split."""
    if not any(True for _ in program.nodes("start")):
        return program
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node) -> None:
        asked = asked_of(node) if is_wait(node) else node
        for operand in asked.all_input_nodes:
            if operand not in new:
                copy(operand)
        new[node] = graph.node_copy(asked, new.__getitem__)
        new[node].name = node.name
        if asked is not node:
            new[node].target = getattr(runtime, row_of(node).name)
        set_facts(new[node], replace(facts(node)))

    for node in program.nodes():
        is_late = facts(node).role == "conversion" and facts(node).recompute is None and bool(node.users)
        if node not in new and not is_late and facts(node).role != "start":
            copy(node)
    return replace(program, graph=graph)
