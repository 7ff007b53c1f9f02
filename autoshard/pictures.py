"""Pictures of a partitioned program: where weights and activations are split, and where ranks communicate.

A picture node stands for a class of graph nodes. At level "ops" every node is a class of its own. At level "modules"

    layers       numbered modules that repeat their neighbour node by node are drawn once (_fold_layers)
    views        belong to the value that they look at (_contract)
    light ops    of one module join while no path between them leaves the class, so the picture stays acyclic
    parameters   of one module share a note, and equal conversions of one class share a pill
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import graphviz
from torch import fx

from autoshard.conversions import BY_NAME, COMMUNICATES, WIRE
from autoshard.costs import CostModel
from autoshard.errors import InputError
from autoshard.hardware import hardware_of
from autoshard.placements import Layout, format_layout
from autoshard.program import Program, arguments, facts, op_name
from autoshard.rules import rule_of
from autoshard.text import describe_value, human_bytes, human_seconds, short_dtype
from autoshard.traffic import sent_inside, traffic, wire_bytes

Level = Literal["ops", "modules"]
_VIEWS = re.compile(
    "view|reshape|_unsafe_view|transpose|permute|t|numpy_T|unsqueeze|squeeze|expand|flatten|unflatten|slice|select|split|split_with_sizes"
    "|chunk|unbind|alias|detach|contiguous"
)
_SHORT = {"scaled_dot_product_attention": "attention", "cross_entropy_loss": "cross_entropy"}
_INK, _PALE, _LINE = "#1f2933", "#5f6b78", "#8a97a6"
_CHIPS = {"S": ("#cfe3ff", "#0b3d91"), "P": ("#ffdfb8", "#8a3b00"), "R": ("#ffffff", _PALE), "I": ("#ffffff", _PALE)}
_PILLS = {"all_gather": "#1b7a43", "reduce_scatter": "#7436a8", "all_reduce": "#b3261e", "all_to_all": "#0b6e82", "rotate": "#8a5a00"}
_DEPTHS = ("#f6f8fb", "#edf1f7", "#e4eaf3", "#dbe3ee")
_NODE = {"shape": "box", "style": "rounded,filled", "fillcolor": "white", "color": _INK, "margin": "0.08,0.04"}
_SMALL = {"color": "#c9d0d8", "fillcolor": "#fbfcfd", "margin": "0.04,0.02"}
_LOCAL = {**_SMALL, "fillcolor": "#e3e7ec"}
_NOTE = {"shape": "note", "style": "filled", "fillcolor": "#fffbe6", "color": "#b59f3b", "margin": "0.03,0.01"}
_PORT = {"style": "filled", "fillcolor": "#d8dee6", "penwidth": "1.5"}
_PLAIN = {"shape": "plain", "style": ""}
Drawn = tuple[str, dict[str, str]]  # a label and the node's attributes


def draw(program: Program, level: Level = "modules", costs: CostModel | None = None) -> graphviz.Digraph:
    """The graph of `program` after insert_collectives; no Graphviz binary is needed until it is rendered.

    level: "ops" draws every node, "modules" one layer of each kind and one node per run of light ops. costs: prices of
    the mesh (the bytes that are shown do not depend on the hardware).
    Raises InputError for another level.
    """
    if level not in get_args(Level):
        raise InputError(f"level={level!r} is not known; there are {', '.join(map(repr, get_args(Level)))}")
    homes, is_folded = _homes(program), level == "modules"
    first, copies = _fold_layers(program, homes) if is_folded else ({}, {})
    classes = _contract(program, homes, first) if is_folded else _Classes({node: node for node in program.nodes()}, first)
    sketch = _Sketch(program, costs or CostModel(program.mesh, hardware_of(None)), homes, copies, classes, level)
    graph = graphviz.Digraph("autoshard", comment=f"mesh {program.mesh}, level {level}")
    graph.attr(nodesep="0.18", ranksep="0.22", fontname="Helvetica", labelloc="t", bgcolor="white", label=sketch.title(), tooltip=" ")
    graph.attr("node", fontname="Helvetica", fontsize="11", fontcolor=_INK, height="0.2", width="0.3", **_NODE)
    graph.attr("edge", fontname="Helvetica", color=_LINE, arrowsize="0.6")
    _add_legend(graph)
    sketch.add_nodes(graph)
    sketch.add_edges(graph)
    return graph


# --------------------------------------------------------------------------------------------- which nodes are one node


def _homes(program: Program) -> dict[fx.Node, str]:
    """The module path that each node is drawn in; of parameters and conversions the innermost one around source and users."""
    homes: dict[fx.Node, str] = {}
    for node in program.nodes():
        known = facts(node)
        is_named = known.role in ("parameter", "buffer", "update")
        homes[node] = known.name.rpartition(".")[0] if is_named else known.source.module if known.role in ("op", "projection") else ""
    users: dict[fx.Node, set[str]] = {}
    for node in reversed(list(program.nodes("conversion", "parameter"))):
        users[node] = {path for user in node.users for path in users.get(user, {homes[user]})}
    for node, paths in reversed(users.items()):
        parts = [path.split(".") for path in (homes[(*node.all_input_nodes, node)[0]], *sorted(paths))]
        shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
        homes[node] = ".".join(column[0] for column in shared)
    return homes


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: k + 1]) for k in range(len(parts))]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _fold_layers(program: Program, homes: Mapping[fx.Node, str]) -> tuple[dict[fx.Node, fx.Node], dict[str, list[str]]]:
    """Nodes of repeated layers -> their counterpart in the first one; path of each first layer -> paths of its copies."""
    inside: dict[str, list[fx.Node]] = {}
    for node, home in homes.items():
        for path in _prefixes(home):
            inside.setdefault(path, []).append(node)
    numbered = [path for path in inside if path.rpartition(".")[2].isdigit()]
    numbered.sort(key=lambda path: (path.count("."), _parent(path), int(path.rpartition(".")[2])))
    first: dict[fx.Node, fx.Node] = {}
    copies: dict[str, list[str]] = {}
    for _, same in itertools.groupby(numbered, key=lambda path: (_parent(path), _signature(path, inside[path]))):
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
    return first, copies


def _signature(path: str, nodes: list[fx.Node]) -> tuple:
    """Equal for layers that do the same with the same layouts."""
    number = {node: str(k) for k, node in enumerate(nodes)}
    rows = []
    for node in nodes:
        known = facts(node)
        given = fx.map_arg((node.args, node.kwargs), lambda operand: number.get(operand, "outside"))
        name = op_name(node) if node.op == "call_function" else known.name[len(path) :]
        rows.append((known.role, name, str(given), known.values, known.layouts))
    return tuple(rows)


@dataclass
class _Classes:
    """A partition of the drawn nodes; the earliest node of a class is its head. first: undrawn nodes -> their counterpart."""

    head: dict[fx.Node, fx.Node]
    first: Mapping[fx.Node, fx.Node]
    members: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.members = {node: [node] for node in self.head}
        self.order = {node: k for k, node in enumerate(self.head)}

    def head_of(self, node: fx.Node) -> fx.Node:
        return self.head[self.first.get(node, node)]

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Heads of what `node` reads."""
        return [self.head_of(operand) for operand in node.all_input_nodes]

    def merge(self, one: fx.Node, other: fx.Node) -> None:
        kept, gone = sorted((self.head[one], self.head[other]), key=self.order.__getitem__)
        if kept is not gone:
            self.members[kept] = sorted(self.members[kept] + self.members.pop(gone), key=self.order.__getitem__)
            self.head.update((member, kept) for member in self.members[kept])

    def may_join(self, head: fx.Node, later: fx.Node) -> bool:
        """Whether no path from class `head` to class `later` passes another class."""
        stack = [o for member in self.members[later] for o in self.operands(member) if o not in (head, later)]
        seen = set(stack)
        while stack:
            for operand in (o for member in self.members[stack.pop()] for o in self.operands(member)):
                if operand is head:
                    return False
                if operand not in seen:
                    seen.add(operand)
                    stack.append(operand)
        return True


def _contract(program: Program, homes: Mapping[fx.Node, str], first: Mapping[fx.Node, fx.Node]) -> _Classes:
    classes = _Classes({node: node for node in program.nodes() if node not in first}, first)
    named: dict[tuple, fx.Node] = {}
    for node in list(classes.head):
        operands, role = classes.operands(node), facts(node).role
        is_update = bool(node.users) and all(facts(user).role == "update" for user in node.users) and role == "op"
        if operands and (role in ("projection", "tie") or _is_view(node)):
            classes.merge(operands[0], node)
        elif role == "conversion":
            classes.merge(named.setdefault((node.target, node.args[1], operands[0]), node), node)
        elif role in ("parameter", "buffer", "update") or is_update:
            named_in = homes[node] if is_update else _parent(facts(node).name)
            classes.merge(named.setdefault((role == "update" or is_update, named_in), node), node)
        elif _is_light(node):
            for head in map(classes.head_of, operands):
                later = classes.head[node]
                if head is not later and homes[head] == homes[node] and _is_light(head) and classes.may_join(head, later):
                    classes.merge(head, node)
    return classes


def _packet(node: fx.Node) -> str:
    parts = op_name(node).split(".")
    return parts[1] if len(parts) == 3 else parts[0]


def _is_view(node: fx.Node) -> bool:
    """Whether an op moves no data worth drawing; dropout that drops nothing is one."""
    if facts(node).role != "op":
        return False
    given = arguments(node)
    is_idle = _packet(node) == "dropout" and not (given.get("p") and given.get("train"))
    return is_idle or _VIEWS.fullmatch(_packet(node)) is not None


def _is_light(node: fx.Node) -> bool:
    """Whether an op may share a picture node: bound by memory, and no lowering took its place."""
    rule = rule_of(op_name(node))
    return facts(node).role == "op" and facts(node).op is None and rule is not None and rule.bound == "memory"


# --------------------------------------------------------------------------------------------------------- what is drawn


def _text(text: str, color: str = _INK, size: int = 11, is_bold: bool = False) -> str:
    inner = html.escape(text)
    inner = f"<B>{inner}</B>" if is_bold else inner
    return f"<FONT COLOR='{color}' POINT-SIZE='{size}'>{inner}</FONT>" if text else ""


def _table(rows: Iterable[str]) -> str:
    inner = "".join(f"<TR>{row}</TR>" for row in rows if row)
    return f"<<TABLE BORDER='0' CELLBORDER='0' CELLSPACING='1' CELLPADDING='1'>{inner}</TABLE>>" if inner else ""


def _cell(inner: str, attributes: str = "ALIGN='LEFT'") -> str:
    return f"<TD {attributes}>{inner or ' '}</TD>"


def _chip(kind: str, text: str) -> str:
    return _cell(_text(text, _CHIPS[kind][1], 9), f"BGCOLOR='{_CHIPS[kind][0]}'")


def _tooltip(lines: Iterable[str]) -> str:
    return graphviz.escape("\n".join(lines).strip() or " ")


def _stub(head: fx.Node) -> str:
    """Name of the mark below a class that stands for its users in the copies of a folded layer; the space makes it unique."""
    return f"{head.name} next"


def _add_legend(graph: graphviz.Digraph) -> None:
    meanings = {"S": "split along a dim", "P": "partial, to be summed", "R": "whole, used differently", "I": "whole, used alike"}
    swatches = [(f"BGCOLOR='{color}'", name.replace("_", "-")) for name, color in _PILLS.items()]
    swatches += [(f"BORDER='1' COLOR='{_PILLS['all_reduce']}'", "in backward only"), (f"BGCOLOR='{_LOCAL['fillcolor']}'", "local")]
    rows = [_chip(kind, kind) + _cell(_text(text, size=9)) for kind, text in meanings.items()]
    rows += [_cell("      ", swatch) + _cell(_text(text, size=9)) for swatch, text in swatches]
    with graph.subgraph(name="cluster legend") as legend:
        legend.attr(label="legend", fontsize="11", style="rounded", color=_LINE, labeljust="l", tooltip="legend")
        legend.node("the legend", _table(rows), _attributes={**_PLAIN, "tooltip": "bytes that a rank sends: forward (fwd), backward (bwd)"})


@dataclass
class _Sketch:
    """What drawing one program needs: where nodes live, which layers are folded, which nodes are one."""

    program: Program
    costs: CostModel
    homes: Mapping[fx.Node, str]
    copies: Mapping[str, list[str]]
    classes: _Classes
    level: Level

    def __post_init__(self) -> None:
        counts: dict[str, int] = {}
        for path in (path for head in self.classes.members if facts(head).role == "op" for path in _prefixes(self.homes[head])):
            counts[path] = counts.get(path, 0) + 1
        wanted = {path: None for path, count in counts.items() if count > 1 or self.level == "ops" or path in self.copies}
        homes = {self._frame(self.homes[head], wanted) for head in self.classes.members}
        parents = [self._frame(_parent(path), wanted) for path in wanted]
        self.clusters = {path: None for path in wanted if path in homes or path in self.copies or parents.count(path) > 1}
        self.contents: dict[str, list[fx.Node]] = {}
        for head in self.classes.members:
            self.contents.setdefault(self._frame(self.homes[head]), []).append(head)
        self.kinds = {facts(node).source.module: facts(node).source.module_class for node in self.program.nodes("op")}
        self.passing = self._collect()

    def _frame(self, path: str, clusters: Iterable[str] | None = None) -> str:
        """The innermost cluster around a path; "" for none."""
        known = self.clusters if clusters is None else clusters
        return next((prefix for prefix in reversed(_prefixes(path)) if prefix in known), "")

    def title(self) -> str:
        mesh, step_s = self.program.mesh, self.program.stats.get("objective_s")
        first = f"mesh {mesh}, {mesh.size} ranks" + (f", predicted step {human_seconds(step_s)}" if step_s else "")
        moved = [f"{name.replace('_', '-')} {human_bytes(count)}" for name, count in traffic(self.program, self.costs).items()]
        second = f"a rank sends per step: {', '.join(moved) or 'nothing'}"
        return f"<{_text(first, size=15, is_bold=True)}<BR/>{_text(second, _PALE)}<BR/> >"

    def add_nodes(self, graph: graphviz.Digraph, path: str = "") -> None:
        """Nodes of one cluster, then the clusters in it."""
        for head in self.contents.get(path, ()):
            members = self.classes.members[head]
            label, attributes = self._drawn(head, members)
            tip = _tooltip(f"{member.name}: {self._described(member)}  {facts(member).source}" for member in members[:12])
            graph.node(head.name, label, _attributes={**attributes, "tooltip": tip})
            if (head.name, _stub(head)) in self.passing:
                graph.node(_stub(head), f"<{_text('↻ next layer', _PALE, 9)}>", _attributes=_PLAIN)
        for child in self.clusters:
            if self._frame(_parent(child)) == path:
                with graph.subgraph(name=f"cluster_{child}") as inner:
                    inner.attr(_attributes=self._cluster(child, path))
                    self.add_nodes(inner, child)

    def _cluster(self, child: str, path: str) -> dict[str, str]:
        names = [".".join(p.split(".")[-2:]) for p in (child, *self.copies.get(child, ()))]
        name = child.removeprefix(f"{path}.") if len(names) == 1 else f"{names[0]} … {names[-1]}  ×{len(names)}"
        depth = sum(p in self.clusters for p in _prefixes(child)) - 1
        line = {"color": _INK, "penwidth": "2"} if child in self.copies else {"color": _LINE, "penwidth": "1"}
        label = f"<{_text(name, is_bold=True)} {_text(self.kinds.get(child, ''), _PALE)}>"
        fill = {"style": "rounded,filled", "fillcolor": _DEPTHS[min(depth, len(_DEPTHS) - 1)]}
        return {"label": label, "labeljust": "l", "margin": "8", "tooltip": _tooltip([child]), **fill, **line}

    def _drawn(self, head: fx.Node, members: list[fx.Node]) -> Drawn:
        role = facts(head).role
        if role in ("parameter", "buffer"):
            return self._note(head, members)
        if role == "conversion":
            return self._pill(head, [node for node in members if facts(node).role == "conversion"])
        if role in ("input", "output"):
            shape = f"<BR/>{_text(self._shape(head), _PALE, 9)}" if facts(head).values else ""
            return f"<{_text(f'{role} {facts(head).name}'.strip(), is_bold=True)}{shape}>", _PORT
        return self._op(head, members)

    def _described(self, node: fx.Node) -> str:
        return describe_value(facts(node), self.program) if facts(node).values else ""

    def _shape(self, node: fx.Node) -> str:
        return self._described(node).partition("  ")[0] + (f" ×{len(facts(node).values)}" if len(facts(node).values) > 1 else "")

    def _chips(self, layout: Layout) -> str:
        texts = format_layout(layout, self.program.mesh).split() if layout else ()
        return "".join(_chip(placement.kind, text) for placement, text in zip(layout, texts, strict=True))

    def _note(self, head: fx.Node, members: list[fx.Node]) -> Drawn:
        rows, frame = [], self._frame(self.homes[head])
        for known in map(facts, members):
            if known.role in ("parameter", "buffer"):
                name = _text(known.name.removeprefix(f"{frame}."), size=9, is_bold=known.role == "parameter")
                shape = describe_value(known, self.program).partition("  ")[0]
                rows.append(_cell(f"{name} {_text(shape, _PALE, 9)}") + self._chips(known.layouts[0] if known.layouts else ()))
        return _table(rows), _NOTE

    def _op(self, head: fx.Node, members: list[fx.Node]) -> Drawn:
        updates = [f"update {facts(node).name.rpartition('.')[2]}" for node in members if facts(node).role == "update"]
        ops = [node for node in members if not _is_view(node) and facts(node).role == "op"]
        names = updates or list(dict.fromkeys(_SHORT.get(_packet(node), _packet(node).strip("_")) for node in ops or members))
        if facts(head).role == "projection":
            names = [f"[{head.args[1]}]"]
        home, shape = self.homes[head], _text(self._shape((ops or members)[-1]), _PALE, 9)
        is_framed = self._frame(home) == home
        title, name = " ".join(names[:4]) + " …" * (len(names) > 4), "" if is_framed else home.rpartition(".")[2]
        if name and len(ops) > 1:
            title = self.kinds.get(home) or title
        if updates or not ops or facts(head).is_constant:
            return f"<{_text(f'{name} {title}'.strip(), _PALE, 9)} {shape}>", _SMALL
        lines = [f"{_text(name, is_bold=True)} {_text(title, is_bold=is_framed)}", shape, *map(self._inside, ops)]
        return f"<{'<BR/>'.join(filter(None, lines))}>", {}

    def _inside(self, node: fx.Node) -> str:
        """What the lowering of an op sends by itself, forward and backward together."""
        sent: dict[tuple[str, str], float] = {}
        for axis, name, whole in sent_inside(self.program, node):
            count = WIRE[name](self.program.mesh.shape[self.program.mesh.index(axis)]) * whole
            sent[name, axis] = sent.get((name, axis), 0.0) + count
        lines = [(name, f"{name.replace('_', '-')} @{axis} {human_bytes(count)}") for (name, axis), count in sent.items() if count]
        return "<BR/>".join(_text(line, _PILLS[name], 8, is_bold=True) for name, line in lines)

    def _pill(self, head: fx.Node, members: list[fx.Node]) -> Drawn:
        row, axis = BY_NAME[head.target.__name__], head.args[1]  # type: ignore[union-attr]
        is_inside = any(path in self.copies for path in _prefixes(self.homes[head]))
        copies = 0 if is_inside else sum(twin is head for twin in self.classes.first.values())
        where = f" @{axis}" + (f" ×{1 + copies}" if copies else "")
        sent = map(sum, zip(*(wire_bytes(self.program, node, self.costs) for node in members), strict=True))
        ways = [way for way in zip((row.forward, row.backward), ("fwd", "bwd"), sent, strict=True) if way[2]]
        if not ways:
            return f"<{_text(row.name.removesuffix('_invariant').replace('_', ' ') + where, _PALE, 8)}>", _LOCAL
        main, is_forward = ways[0][0], row.forward in COMMUNICATES
        ink, fill = ("#ffffff", {"fillcolor": _PILLS[main]}) if is_forward else (_PILLS[main], {"penwidth": "1.5"})
        counts = [f"{way} {'' if name == main else name.replace('_', '-') + ' '}{human_bytes(count)}" for name, way, count in ways]
        title = _text(main.replace("_", "-") + where, ink, 10, is_bold=True)
        return f"<{title}<BR/>{_text(', '.join(counts), ink, 8)}>", {"color": _PILLS[main], **fill}

    def _collect(self) -> dict[tuple[str, str], dict[str, fx.Node]]:
        """Pairs of classes with an edge -> the values that pass, by what is written on it."""
        passing: dict[tuple[str, str], dict[str, fx.Node]] = {}
        for node in self.program.nodes():
            target, drawn = self.classes.head_of(node), self.classes.operands(self.classes.first.get(node, node))
            for operand, source in zip(node.all_input_nodes, self.classes.operands(node), strict=True):
                end = target.name if source in drawn else _stub(source)
                if source.name != end:
                    passing.setdefault((source.name, end), {}).setdefault(self._passed(operand), operand)
        return passing

    def _passed(self, node: fx.Node) -> str:
        """Layout of a value, and its global shape where the op that made it changed that and no node shows it."""
        known, operands = facts(node), node.all_input_nodes
        if not known.layouts or known.role in ("parameter", "buffer"):
            return ""
        is_told = not (_is_view(node) or any(placement.is_split for placement in known.layout))
        if is_told or not operands or facts(operands[0]).value.shape == known.value.shape:
            return self._chips(known.layout)
        return self._chips(known.layout) + _cell(_text(f"{short_dtype(known.value.dtype)}{list(known.value.shape)}", _PALE, 8))

    def add_edges(self, graph: graphviz.Digraph) -> None:
        """One edge per pair of classes, with every layout that passes."""
        for ends, values in self.passing.items():
            tip = _tooltip(f"{value.name}: {self._described(value)}" for value in values.values())
            graph.edge(*ends, _table(values), tooltip=tip, labeltooltip=tip, weight="3" if any(values) else "1")
