"""Which modules a picture opens, where each node is drawn, and which repeated layers are drawn once."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from autoshard.pictures.staging import is_stage, module_of, staged, stages_of
from autoshard.program import Program, facts, op_name

_MOST_CARDS, _MOST_CARDS_OF_LAYERS = 10, 24  # modules on one screen; more where repeated layers are only found further inside


@dataclass(frozen=True)
class Folding:
    """What stands for what. first: node of a repeated layer -> its counterpart in the one that is drawn; copies: path of that -> paths
    of the others."""

    first: Mapping[fx.Node, fx.Node]
    copies: Mapping[str, list[str]]


def prefixes(path: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
    parts = path.split(".") if path else []
    return [".".join(parts[: k + 1]) for k in range(len(parts))]


def parent(path: str) -> str:
    """`a.b.c` -> `a.b`."""
    return path.rpartition(".")[0]


def is_inside(path: str, outer: str) -> bool:
    """Whether a module is `outer` or in it."""
    return not outer or path == outer or path.startswith(outer + ".")


def homes_of(program: Program) -> dict[fx.Node, str]:
    """The module path that each node is drawn in; of parameters and conversions the innermost one around source and users.

    Paths of a pipelined program begin with the stage (see staging).
    """
    homes: dict[fx.Node, str] = {}
    for node in program.nodes():
        known = facts(node)
        is_named = known.role in ("parameter", "buffer", "update")
        is_passing = known.role in ("mask", "tie") and bool(node.all_input_nodes)
        own = known.source.module if known.role in ("op", "projection") else ""
        homes[node] = parent(known.name) if is_named else homes[node.all_input_nodes[0]] if is_passing else own
    users: dict[fx.Node, set[str]] = {}
    for node in reversed(list(program.nodes("conversion", "parameter"))):
        users[node] = {path for user in node.users for path in users.get(user, {homes[user]})}
    for node, paths in reversed(users.items()):
        parts = [path.split(".") for path in (homes[(*node.all_input_nodes, node)[0]], *sorted(paths))]
        shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
        homes[node] = ".".join(column[0] for column in shared)
    stages = stages_of(program)
    return {node: staged(home, stages.get(node)) for node, home in homes.items()}


def _inside(homes: Mapping[fx.Node, str]) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for node, home in homes.items():
        for path in prefixes(home):
            found.setdefault(path, []).append(node)
    return found


def fold_layers(program: Program, homes: Mapping[fx.Node, str]) -> Folding:
    """Numbered modules that repeat their neighbours in the stage node by node, and conversions between them."""
    inside = _inside(homes)
    numbered = [path for path in inside if path.rpartition(".")[2].isdigit()]
    numbered.sort(key=lambda path: (path.count("."), parent(path), int(path.rpartition(".")[2])))
    first: dict[fx.Node, fx.Node] = {}
    copies: dict[str, list[str]] = {}
    for _, same in itertools.groupby(numbered, key=lambda path: (parent(path), _signature(path, inside[path]))):
        kept, *others = same
        if others and inside[kept][0] not in first:
            copies[kept] = others
            first.update((twin, node) for other in others for node, twin in zip(inside[kept], inside[other], strict=True))
    between: dict[tuple, fx.Node] = {}
    for node in program.nodes("conversion"):
        source = node.all_input_nodes[0]
        found = between.setdefault((node.target, first.get(source, source), *node.args[1:]), node)
        if found is not node:
            first.setdefault(node, found)
    return Folding(first, copies)


def _signature(path: str, nodes: list[fx.Node]) -> tuple:
    """Equal for layers that do the same with the same layouts."""
    number, cut = {node: str(k) for k, node in enumerate(nodes)}, len(module_of(path))
    rows = []
    for node in nodes:
        known = facts(node)
        given = fx.map_arg((node.args, node.kwargs), lambda operand: number.get(operand, "outside"))
        name = op_name(node) if node.op == "call_function" else known.name[cut:]
        rows.append((known.role, name, str(given), known.values, known.layouts))
    return tuple(rows)


def layer_of(homes: Mapping[fx.Node, str], folding: Folding) -> str:
    """Path of the numbered module that stands for most of the program; "" where none is numbered."""
    inside = _inside({node: home for node, home in homes.items() if node not in folding.first})
    numbered = [path for path in inside if path.rpartition(".")[2].isdigit()]
    return max(numbered, key=lambda path: (len(inside[path]) * (1 + len(folding.copies.get(path, ()))), -len(path)), default="")


def opened_modules(homes: Mapping[fx.Node, str], folding: Folding) -> set[str]:
    """Modules whose parts are drawn, the model ("") among them; any other is one card.

    Opened are all stages, then the repeated layers and what holds them, from the outermost, then the largest module while few cards are
    drawn. Layers that a stage boundary cuts stay closed where others are repeated whole, and so do those that repeat the layers of another
    stage where all are too many.
    """
    layers = list(folding.copies) or [layer_of(homes, folding)]
    opened = _opened(homes, folding, layers)
    if any(map(is_stage, opened)) and not opened.issuperset(layers):
        inside = _inside(homes)
        alike = {(module_of(parent(path)), _signature(path, inside[path])): path for path in reversed(layers) if path}
        opened = _opened(homes, folding, list(alike.values()))
    return opened


def _opened(homes: Mapping[fx.Node, str], folding: Folding, layers: Sequence[str]) -> set[str]:
    """As opened_modules, where of numbered modules beside `layers` none but these are opened to show them."""
    drawn = [home for node, home in homes.items() if facts(node).role == "op" and node not in folding.first]
    sizes = {path: 0 for home in drawn for path in prefixes(home)}
    for path in itertools.chain.from_iterable(map(prefixes, drawn)):
        sizes[path] += 1
    children: dict[str, list[str]] = {}
    for path in sizes:
        children.setdefault(parent(path), []).append(path)
    own = set(drawn)
    roots = {"", *filter(is_stage, sizes)}
    opened, cards = set(roots), 1 + sum(len(children.get(root, ())) + (root in own) - 1 for root in roots)
    families = {module_of(parent(path)) for path in layers if path}
    beside = {path for path in sizes if path.rpartition(".")[2].isdigit() and module_of(parent(path)) in families} - {*layers}
    leading = _leads_to([*layers, *map(parent, beside)])
    kept_closed = beside if len(roots) > 1 and folding.copies else set()

    def open_under(roots: Iterable[str], most: int, is_wanted: Callable[[str], bool], rank: Callable[[str], tuple]) -> None:
        nonlocal cards
        ready = [(rank(path), path) for root in roots for path in children.get(root, ()) if is_wanted(path) and path not in opened]
        heapq.heapify(ready)
        while ready:
            _, path = heapq.heappop(ready)
            more = len(children[path]) + (path in own) - 1
            if cards + more <= most:
                opened.add(path)
                cards += more
                for child in filter(is_wanted, children[path]):
                    heapq.heappush(ready, (rank(child), child))

    def is_opened_first(path: str) -> bool:
        return path in leading and path in children

    open_under(sorted(opened), _MOST_CARDS_OF_LAYERS, is_opened_first, lambda path: (path.count("."), -sizes[path]))
    open_under(sorted(opened), _MOST_CARDS, lambda path: path in children and path not in kept_closed, lambda path: (-sizes[path],))
    return opened


def _leads_to(paths: Iterable[str]) -> set[str]:
    return {prefix for path in paths for prefix in prefixes(path)}


def card_of(home: str, opened: set[str]) -> str | None:
    """The closed module that a node at `home` belongs to; None where it stands by itself in an open one."""
    return next((path for path in prefixes(home) if path not in opened), None)
