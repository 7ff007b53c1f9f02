"""Which nodes of a program are one node of the picture: a partition of the graph whose quotient stays acyclic."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from torch import fx

from autoshard.pictures.folding import card_of, parent
from autoshard.pictures.staging import stage_of
from autoshard.program import Program, arguments, facts, op_name
from autoshard.rules import rule_of

_VIEWS = re.compile(
    "view|reshape|_unsafe_view|transpose|permute|t|numpy_T|unsqueeze|squeeze|expand|flatten|unflatten|slice|select|split|split_with_sizes"
    "|chunk|unbind|alias|detach|contiguous"
)


@dataclass
class Groups:
    """A partition of the drawn nodes; the first node of a group is its head. first: undrawn nodes -> their counterpart.

    ancestors: per group the groups before it, as bits by the number of a group.
    """

    first: Mapping[fx.Node, fx.Node]
    head: dict[fx.Node, fx.Node] = field(default_factory=dict)
    members: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    number: dict[fx.Node, int] = field(default_factory=dict)
    ancestors: dict[fx.Node, int] = field(default_factory=dict)

    def first_of(self, node: fx.Node) -> fx.Node:
        """The node that is drawn for `node`: itself but in repeated layers."""
        return self.first.get(node, node)

    def head_of(self, node: fx.Node) -> fx.Node:
        return self.head[self.first_of(node)]

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Heads of what `node` reads."""
        return [self.head_of(operand) for operand in node.all_input_nodes]

    def _before(self, node: fx.Node) -> int:
        found = 0
        for head in self.operands(node):
            found |= 1 << self.number[head] | self.ancestors[head]
        return found

    def add(self, node: fx.Node) -> None:
        """`node` as a group of its own; its operands have been added."""
        self.ancestors[node] = self._before(node)
        self.head[node], self.members[node], self.number[node] = node, [node], len(self.number)

    def may_join(self, head: fx.Node, node: fx.Node) -> bool:
        """Whether no path from group `head` to `node`, which is not added yet, passes another group."""
        return not any(operand is not head and self.ancestors[operand] >> self.number[head] & 1 for operand in self.operands(node))

    def join(self, head: fx.Node, node: fx.Node) -> bool:
        """Add `node` to group `head` if that keeps the picture acyclic. Returns whether it did."""
        if not self.may_join(head, node):
            return False
        bit = 1 << self.number[head]
        new = self._before(node) & ~bit
        self.head[node] = head
        self.members[head].append(node)
        if new & ~self.ancestors[head]:
            self.ancestors[head] |= new
            for other, before in self.ancestors.items():
                if before & bit:
                    self.ancestors[other] = before | new
        return True

    def join_any(self, heads: list[fx.Node], node: fx.Node) -> None:
        """Add `node` to the first of `heads` that it may join, else by itself."""
        if not any(self.join(head, node) for head in heads):
            self.add(node)


def all_apart(program: Program, first: Mapping[fx.Node, fx.Node]) -> Groups:
    """Every drawn node by itself."""
    groups = Groups(first)
    for node in program.nodes():
        if node not in first:
            groups.head[node], groups.members[node] = node, [node]
    return groups


def group(program: Program, homes: Mapping[fx.Node, str], first: Mapping[fx.Node, fx.Node], opened: set[str] | None) -> Groups:
    """Groups at level "modules", where `opened` has the modules whose parts are shown, or, with None, at level "layer".

    Both: views and masks belong to what they read, parameters of one module are one, equal conversions of a value are one. "modules": what
    is in a closed module is one, light ops of an open one join, and conversions of a value that follow each other are one.
    """
    groups, named = Groups(first), dict[Hashable, fx.Node]()
    is_coarse = opened is not None
    idle = _idle_cards(program, homes, opened or set())
    for node in (node for node in program.nodes() if node not in first):
        role, home = facts(node).role, homes[node]
        card = card_of(home, opened) if opened is not None and role not in ("input", "output") else None
        card = None if card in idle else card
        operands = groups.operands(node)
        if card is None and operands and (role in ("projection", "tie", "mask") or is_view(node)):
            groups.join_any(operands[:1], node)
            continue
        key, also = _key(node, home, operands, card), list[fx.Node]()
        if is_coarse and card is None:
            also = _neighbours(node, home, homes, operands, groups)
        groups.join_any([*([named[key]] if key in named else []), *also], node)
        if key is not None:
            named[key] = groups.head[node]
    return groups


def _idle_cards(program: Program, homes: Mapping[fx.Node, str], opened: set[str]) -> set[str]:
    """Closed modules that only look at values."""
    works: dict[str, bool] = {}
    for node in program.nodes():
        card = card_of(homes[node], opened)
        if card is not None:
            works[card] = works.get(card, False) or not is_view(node)
    return {card for card, does_work in works.items() if not does_work}


def _key(node: fx.Node, home: str, operands: list[fx.Node], card: str | None) -> Hashable:
    """What nodes of one group share; None for a node that stands for itself."""
    role = facts(node).role
    if card is not None:
        return ("module", card)
    if role == "conversion":
        return ("conversion", node.target, node.args[1], operands[0])
    is_update = role == "update" or (role == "op" and bool(node.users) and all(facts(user).role == "update" for user in node.users))
    if is_update:
        return ("update", home)
    return ("parameters", stage_of(home), parent(facts(node).name)) if role in ("parameter", "buffer") else None


def _neighbours(node: fx.Node, home: str, homes: Mapping[fx.Node, str], operands: list[fx.Node], groups: Groups) -> list[fx.Node]:
    """Groups of operands that a node joins for being alike: light ops of one module, steps of one conversion."""
    role = facts(node).role
    if role == "conversion":
        before = node.all_input_nodes[0]
        readers = {(user.target, user.args[1:]) for user in before.users}
        is_alike = facts(before).role == "conversion" and stage_of(homes[before]) == stage_of(home)
        is_next = is_alike and len(readers) == 1 and groups.first.get(before, before) is before
        return operands if is_next else []
    if not is_light(node):
        return []
    return [head for head in operands if homes[head] == home and is_light(head)]


def packet(node: fx.Node) -> str:
    """`linear` of `aten.linear.default`."""
    parts = op_name(node).split(".")
    return parts[1] if len(parts) == 3 else parts[0]


def is_view(node: fx.Node) -> bool:
    """Whether an op moves no data worth drawing; dropout that drops nothing is one."""
    if facts(node).role != "op":
        return False
    given = arguments(node)
    is_idle = packet(node) == "dropout" and not (given.get("p") and given.get("train"))
    return is_idle or _VIEWS.fullmatch(packet(node)) is not None


def is_light(node: fx.Node) -> bool:
    """Whether an op may share a picture node: bound by memory, and no lowering took its place."""
    rule = rule_of(op_name(node))
    return facts(node).role == "op" and facts(node).op is None and rule is not None and rule.bound == "memory"
