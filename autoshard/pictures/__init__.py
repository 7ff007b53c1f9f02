"""Pictures of a partitioned program: where weights and activations are split, and where ranks communicate.

A picture node stands for a group of graph nodes, at three levels:

    modules   one card per module, with its parameters and what it sends; repeated layers are drawn once
    layer     one of the repeated layers: every op that does work, and what goes in and out
    ops       every node, as long as there are few enough

Repeated layers are found in folding, groups made in grouping, and written in sketch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from torch import fx

from autoshard.costs import CostModel
from autoshard.errors import InputError
from autoshard.hardware import hardware_of
from autoshard.passes.overlap_collectives import joined
from autoshard.pictures import labels
from autoshard.pictures.folding import Folding, card_of, fold_layers, homes_of, is_inside, layer_of, opened_modules, parent, prefixes
from autoshard.pictures.grouping import Groups, all_apart, group, is_view
from autoshard.pictures.picture import Picture
from autoshard.pictures.sketch import Sketch
from autoshard.pictures.staging import cut_modules, is_stage, module_of
from autoshard.program import Program, facts

__all__ = ["Level", "Picture", "draw"]

Level = Literal["modules", "layer", "ops"]
_MOST_NODES = 500  # more take dot longer than a person waits


def draw(program: Program, level: Level = "modules", costs: CostModel | None = None) -> Picture:
    """The graph of `program` after insert_collectives; no Graphviz binary is needed until it is rendered.

    level: "modules", "layer" or "ops", see above. costs: prices of the mesh (the bytes that are shown do not depend on the hardware).
    What runs in two parts is drawn as one node. At level "ops" repeated layers are drawn once where there are more than 500 nodes. At
    any level no more than the first 500 are drawn; the picture says what is left out.
    Raises InputError for another level, and for "layer" where no module is numbered.
    """
    if level not in get_args(Level):
        raise InputError(f"level={level!r} is not known; there are {', '.join(map(repr, get_args(Level)))}")
    program = joined(program)
    homes = homes_of(program)
    sketch = {"modules": _modules, "layer": _layer, "ops": _ops}[level](program, homes, costs or CostModel(program.mesh, hardware_of(None)))
    picture = Picture("autoshard", comment=f"mesh {program.mesh.whole}, level {level}")
    picture.attr(nodesep="0.15", ranksep="0.22", fontname="Helvetica", labelloc="t", bgcolor="white", tooltip=" ")
    picture.attr("node", fontname="Helvetica", fontsize="11", fontcolor=labels.INK, height="0.2", width="0.3", **labels.NODE)
    picture.attr("edge", fontname="Helvetica", color=labels.LINE, arrowsize="0.6")
    sketch.draw(picture)
    return picture


def _modules(program: Program, homes: Mapping[fx.Node, str], costs: CostModel) -> Sketch:
    folding = fold_layers(program, homes)
    opened = opened_modules(homes, folding)
    groups = group(program, homes, folding.first, opened)
    cards = {head: card for head in groups.members if (card := _card(head, homes, opened)) is not None}
    counts = _counted(parent(cards[head]) if head in cards else homes[head] for head in groups.members)
    cut = cut_modules(opened)
    wide = {path for path in counts if path in opened and (counts[path] > 1 or path in folding.copies) and module_of(path) not in cut}
    frames = {prefix: None for path in counts for prefix in prefixes(path) if is_stage(prefix) or prefix in wide}
    shown, left_out = _capped(list(groups.members))
    return Sketch(program, costs, homes, folding, groups, frames, shown, cards, left_out=left_out)


def _card(head: fx.Node, homes: Mapping[fx.Node, str], opened: set[str]) -> str | None:
    return None if facts(head).role in ("input", "output") or is_view(head) else card_of(homes[head], opened)


def _layer(program: Program, homes: Mapping[fx.Node, str], costs: CostModel) -> Sketch:
    folding = fold_layers(program, homes)
    path = layer_of(homes, folding)
    if not path:
        raise InputError("level='layer' draws one of several numbered modules (layers.0, layers.1, ...), of which this model has none")
    groups = group(program, homes, folding.first, None)
    shown = {head: None for head in groups.members if is_inside(module_of(homes[head]), module_of(path))}
    for step in (reversed(groups.members), groups.members):  # conversions on the way in, then those on the way out
        for head in [head for head in step if facts(head).role == "conversion" and head not in shown]:
            users = {groups.head_of(user) for member in groups.members[head] for user in member.users}
            if shown.keys() & (users if step is not groups.members else set(groups.operands(head))):
                shown[head] = None
    for head in groups.members:
        if facts(head).role == "parameter" and any(user in shown for user in _readers(head, groups)):
            shown[head] = None
    ordered, left_out = _capped([head for head in groups.members if head in shown])
    return Sketch(
        program, costs, homes, folding, groups, _frames(ordered, homes, module_of(path)), ordered, has_stubs=True, left_out=left_out
    )


def _readers(head: fx.Node, groups: Groups) -> list[fx.Node]:
    return [groups.head_of(user) for member in groups.members[head] for user in member.users]


def _ops(program: Program, homes: Mapping[fx.Node, str], costs: CostModel) -> Sketch:
    count = sum(1 for _ in program.nodes())
    folding = fold_layers(program, homes) if count > _MOST_NODES else Folding({}, {})
    groups = all_apart(program, folding.first)
    shown, left_out = _capped(list(groups.members))
    if folding.first:
        left_out = (f"of {count:,} nodes, those of repeated layers are drawn once", *left_out)
    return Sketch(program, costs, homes, folding, groups, _frames(shown, homes, "", folding.copies), shown, left_out=left_out)


def _capped(heads: list[fx.Node]) -> tuple[dict[fx.Node, None], tuple[str, ...]]:
    """As many as may be drawn, in the order of the program, and a sentence about the others."""
    shown, away = dict.fromkeys(heads[:_MOST_NODES]), len(heads) - _MOST_NODES
    if away <= 0:
        return shown, ()
    return shown, (f"only the first {_MOST_NODES:,} are drawn, up to {heads[_MOST_NODES - 1].name}; {away:,} more are left out",)


def _frames(shown: Iterable[fx.Node], homes: Mapping[fx.Node, str], outer: str, copies: Iterable[str] = ()) -> dict[str, None]:
    """Stages, and in module `outer` the modules to frame: those with several nodes, or with nodes of their own beside other modules."""
    drawn = [homes[head] for head in shown]
    counts = _counted(prefix for head in shown if facts(head).role == "op" for prefix in prefixes(homes[head]))
    stages = {prefix: None for home in drawn for prefix in prefixes(home)[:1] if is_stage(prefix)}
    wanted = {**stages, **{path: None for path in counts if is_inside(module_of(path), outer)}}
    held = {next((p for p in reversed(prefixes(home)) if p in wanted), "") for home in drawn}
    parents = [next((p for p in reversed(prefixes(parent(path))) if p in wanted), "") for path in wanted]
    kept = {*stages, *held, *copies}
    return {path: None for path in wanted if path in kept or module_of(path) == outer or parents.count(path) > 1}


def _counted(paths: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path in paths:
        counts[path] = counts.get(path, 0) + 1
    return counts
