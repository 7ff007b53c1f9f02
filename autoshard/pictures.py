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
from typing import Literal

import graphviz
from torch import fx

from autoshard.conversions import BY_NAME, COMMUNICATES
from autoshard.costs import CostModel, traffic, wire_bytes
from autoshard.hardware import hardware_of
from autoshard.placements import Layout, format_layout
from autoshard.program import Program, arguments, facts, op_name
from autoshard.rules import rule_of
from autoshard.text import describe_value, human_bytes, human_seconds, short_dtype

Level = Literal["ops", "modules"]
_VIEWS = re.compile(
    "view|reshape|_unsafe_view|transpose|permute|t|numpy_T|unsqueeze|squeeze|expand|flatten|unflatten|slice|select|split|split_with_sizes"
    "|chunk|unbind|alias|detach|contiguous"
)
_SHORT = {"scaled_dot_product_attention": "attention", "cross_entropy_loss": "cross_entropy", "convolution": "conv"}
_INK, _PALE, _LINE = "#1f2933", "#6b7785", "#8a97a6"
_CHIPS = {"S": ("#cfe3ff", "#0b3d91"), "P": ("#ffdfb8", "#8a3b00"), "R": ("#ffffff", _PALE), "I": ("#ffffff", _PALE)}
_PILLS = {"all_gather": "#1b7a43", "reduce_scatter": "#7436a8", "all_reduce": "#b3261e", "all_to_all": "#0b6e82"}
_DEPTHS = ("#f6f8fb", "#edf1f7", "#e4eaf3", "#dbe3ee")
_LABELLED = "<TABLE BORDER='0' CELLBORDER='0' CELLSPACING='1' CELLPADDING='1'>{}</TABLE>"


def draw(program: Program, level: Level = "modules", costs: CostModel | None = None) -> graphviz.Digraph:
    """The graph of `program` after insert_collectives; no Graphviz binary is needed until it is rendered.

    level: "ops" draws every node, "modules" one layer of each kind and one node per run of light ops. costs: prices of
    the mesh (bytes do not depend on the hardware).
    """
    homes = _homes(program)
    is_folded = level == "modules"
    first, folds = _fold_layers(program, homes) if is_folded else ({}, {})
    classes = _contract(program, homes, first) if is_folded else _Classes({node: node for node in program.nodes()}, first)
    sketch = _Sketch(program, costs or CostModel(program.mesh, hardware_of(None)), homes, first, folds, classes, level)
    graph = graphviz.Digraph("autoshard", comment=f"mesh {program.mesh}, level {level}")
    graph.attr(nodesep="0.18", ranksep="0.22", fontname="Helvetica", labelloc="t", bgcolor="white", label=sketch.title(), tooltip=" ")
    graph.attr("node", fontname="Helvetica", fontcolor=_INK, shape="box", style="rounded,filled", fillcolor="white")
    graph.attr("node", margin="0.08,0.04", height="0.2", width="0.3")
    graph.attr("edge", fontname="Helvetica", color=_LINE, arrowsize="0.6")
    _add_legend(graph)
    sketch.add_nodes(graph)
    sketch.add_edges(graph)
    return graph


# --------------------------------------------------------------------------------------------- which nodes are one node


def _homes(program: Program) -> dict[fx.Node, str]:
    """The module path that each node is drawn in; of a conversion the innermost one around its source and all its users."""
    homes: dict[fx.Node, str] = {}
    for node in program.nodes():
        known = facts(node)
        is_named = known.role in ("parameter", "buffer", "update")
        homes[node] = known.name.rpartition(".")[0] if is_named else known.source.module if known.role in ("op", "projection") else ""
    users: dict[fx.Node, set[str]] = {}
    for node in reversed(list(program.nodes("conversion"))):
        users[node] = {path for user in node.users for path in users.get(user, {homes[user]})}
    for node, paths in reversed(users.items()):
        parts = [path.split(".") for path in (homes[node.all_input_nodes[0]], *sorted(paths))]
        shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
        homes[node] = ".".join(column[0] for column in shared)
    return homes


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: k + 1]) for k in range(len(parts))]


def _fold_layers(program: Program, homes: Mapping[fx.Node, str]) -> tuple[dict[fx.Node, fx.Node], dict[str, list[str]]]:
    """Nodes of repeated layers -> their counterpart in the first one; path of each first layer -> paths of its copies."""
    inside: dict[str, list[fx.Node]] = {}
    for node, home in homes.items():
        for path in _prefixes(home):
            inside.setdefault(path, []).append(node)
    split = {path: path.rpartition(".") for path in inside}
    numbered = [path for path, (_, _, last) in split.items() if last.isdigit()]
    numbered.sort(key=lambda path: (path.count("."), split[path][0], int(split[path][2])))
    first: dict[fx.Node, fx.Node] = {}
    folds: dict[str, list[str]] = {}
    for _, same in itertools.groupby(numbered, key=lambda path: (split[path][0], _signature(path, inside[path]))):
        kept, *copies = same
        if not copies or inside[kept][0] in first:
            continue
        folds[kept] = copies
        first.update((twin, node) for copy in copies for node, twin in zip(inside[kept], inside[copy], strict=True))
    between: dict[tuple, fx.Node] = {}
    for node in program.nodes("conversion"):
        source = node.all_input_nodes[0]
        found = between.setdefault((node.target, first.get(source, source), *node.args[1:]), node)
        if node not in first and found is not node:
            first[node] = found
    return first, folds


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

    def merge(self, into: fx.Node, node: fx.Node) -> None:
        kept, gone = sorted((self.head[into], self.head[node]), key=self.order.__getitem__)
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
    shown = [node for node in program.nodes() if node not in first]
    classes = _Classes({node: node for node in shown}, first)
    named: dict[tuple, fx.Node] = {}
    for node in shown:
        operands, role = classes.operands(node), facts(node).role
        if operands and (role == "projection" or _is_view(node)):
            classes.merge(operands[0], node)
        elif role == "conversion":
            classes.merge(named.setdefault((node.target, node.args[1], operands[0]), node), node)
        elif role in ("parameter", "buffer", "update"):
            classes.merge(named.setdefault((role == "update", homes[node]), node), node)
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
    return bool(_VIEWS.fullmatch(_packet(node))) or (_packet(node) == "dropout" and not (given.get("p") and given.get("train")))


def _is_light(node: fx.Node) -> bool:
    """Whether an op may share a picture node: bound by memory, and the same code on every rank."""
    rule = rule_of(op_name(node))
    return facts(node).role == "op" and facts(node).op is None and rule is not None and rule.bound == "memory"


# --------------------------------------------------------------------------------------------------------- what is drawn


def _text(text: str, color: str = _INK, size: int = 11, bold: bool = False) -> str:
    if not text:
        return ""  # Graphviz takes no empty tag
    inner = html.escape(text)
    return f"<FONT COLOR='{color}' POINT-SIZE='{size}'>{f'<B>{inner}</B>' if bold else inner}</FONT>"


def _tooltip(text: str) -> str:
    return graphviz.escape(text.strip() or " ")


def _next(head: fx.Node) -> str:
    """Name of the mark below a class that stands for its users in the copies of a folded layer."""
    return f"{head.name}__next"


def _add_legend(graph: graphviz.Digraph) -> None:
    def chip(kind: str, text: str) -> str:
        return f"<TD BGCOLOR='{_CHIPS[kind][0]}'>{_text(kind, _CHIPS[kind][1], 9)}</TD><TD ALIGN='LEFT'>{_text(text, size=9)}</TD>"

    chips = (("S", "split along a dim"), ("P", "partial: the value is the sum"), ("R", "whole, used differently"), ("I", "whole, used identically"))
    rows = [f"<TR>{chip(*row)}</TR>" for row in chips]
    for name, color in _PILLS.items():
        rows.append(f"<TR><TD BGCOLOR='{color}'>      </TD><TD ALIGN='LEFT'>{_text(name.replace('_', '-'), size=9)}</TD></TR>")
    rows.append(f"<TR><TD COLOR='{_PILLS['all_reduce']}' BORDER='1'>      </TD><TD ALIGN='LEFT'>{_text('in backward only', size=9)}</TD></TR>")
    rows.append(f"<TR><TD BGCOLOR='#e3e7ec'>      </TD><TD ALIGN='LEFT'>{_text('local, no communication', size=9)}</TD></TR>")
    with graph.subgraph(name="cluster_legend") as legend:
        legend.attr(label="legend", fontsize="11", style="rounded", color=_LINE, labeljust="l", tooltip="legend")
        legend.node("legend", f"<{_LABELLED.format(''.join(rows))}>", shape="plain", style="", tooltip="bytes: what a rank sends; fwd, bwd: forward, backward")


@dataclass
class _Sketch:
    """All that drawing one program needs: where nodes live, what is folded, which nodes are one."""

    program: Program
    costs: CostModel
    homes: Mapping[fx.Node, str]
    first: Mapping[fx.Node, fx.Node]
    folds: Mapping[str, list[str]]
    classes: _Classes
    level: Level

    def __post_init__(self) -> None:
        ops = [head for head in self.classes.members if facts(head).role == "op"]
        counts: dict[str, int] = {}
        for path in (path for head in ops for path in _prefixes(self.homes[head])):
            counts[path] = counts.get(path, 0) + 1
        wanted = {path for path, count in counts.items() if count > 1 or self.level == "ops" or path in self.folds}
        homes = {self._frame(self.homes[head], wanted) for head in self.classes.members}
        parents = [self._frame(path.rpartition(".")[0], wanted) for path in wanted]
        self.clusters = {path for path in wanted if path in homes or path in self.folds or parents.count(path) > 1}
        self.passing = self._collect()
        self.module_classes = {facts(node).source.module: facts(node).source.module_class for node in self.program.nodes("op")}

    @staticmethod
    def _frame(path: str, clusters: Iterable[str]) -> str:
        """The innermost cluster around a path; "" for none."""
        return next((prefix for prefix in reversed(_prefixes(path)) if prefix in clusters), "")

    def title(self) -> str:
        mesh, step_s = self.program.mesh, self.program.stats.get("objective_s")
        parts = [f"mesh {mesh}: {mesh.size} ranks", *([f"predicted step {human_seconds(step_s)}"] if step_s else [])]
        moved = [f"{name.replace('_', '-')} {human_bytes(count)}" for name, count in traffic(self.program, self.costs).items()]
        sent = "a rank sends per step: " + (", ".join(moved) or "nothing")
        return f"<{_text(', '.join(parts), size=15, bold=True)}<BR/>{_text(sent, _PALE)}<BR/> >"

    def add_nodes(self, graph: graphviz.Digraph, path: str = "") -> None:
        """Nodes of one cluster, then the clusters in it."""
        for head, members in self.classes.members.items():
            if self._frame(self.homes[head], self.clusters) == path:
                self._add_node(graph, head, members)
                if (head.name, _next(head)) in self.passing:
                    graph.node(_next(head), f"<{_text('↻ next layer', _PALE, 9)}>", shape="plain", style="", tooltip="what the folded layers read")
        for child in [p for p in self._ordered() if self._frame(p.rpartition(".")[0], self.clusters) == path]:
            with graph.subgraph(name=f"cluster_{child}") as inner:
                depth = min(sum(p in self.clusters for p in _prefixes(child)), len(_DEPTHS)) - 1
                names = [p.removeprefix(f"{path}.") for p in (child, *self.folds.get(child, ()))]
                name = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}  ×{len(names)}"
                inner.attr(label=f"<{_text(name, bold=True)} {_text(self.module_classes.get(child, ''), _PALE)}>", tooltip=_tooltip(child))
                inner.attr(style="rounded,filled", fillcolor=_DEPTHS[depth], color=_INK if child in self.folds else _LINE, labeljust="l")
                inner.attr(penwidth="2" if child in self.folds else "1", fontsize="11", margin="8")
                self.add_nodes(inner, child)

    def _ordered(self) -> list[str]:
        return list(dict.fromkeys(p for home in self.homes.values() for p in _prefixes(home) if p in self.clusters))

    def _add_node(self, graph: graphviz.Digraph, head: fx.Node, members: list[fx.Node]) -> None:
        draw_one = {"parameter": self._note, "buffer": self._note, "conversion": self._pill, "input": self._port, "output": self._port}
        label, style = draw_one.get(facts(head).role, self._op)(head, members)
        lines = [f"{member.name}: {self._described(member)}  {facts(member).source}" for member in members[:12]]
        graph.node(head.name, label, tooltip=_tooltip("\n".join(lines)), **style)

    def _described(self, node: fx.Node) -> str:
        return describe_value(facts(node), self.program) if facts(node).values else ""

    def _shape(self, node: fx.Node) -> str:
        return self._described(node).partition("  ")[0] + (f" ×{len(facts(node).values)}" if len(facts(node).values) > 1 else "")

    def _chips(self, layout: Layout) -> str:
        cells = zip(layout, format_layout(layout, self.program.mesh).split(), strict=True)
        return "".join(f"<TD BGCOLOR='{_CHIPS[p.kind][0]}'>{_text(text, _CHIPS[p.kind][1], 9)}</TD>" for p, text in cells)

    def _note(self, head: fx.Node, members: list[fx.Node]) -> tuple[str, dict[str, str]]:
        rows, frame = [], self._frame(self.homes[head], self.clusters)
        for node in members:
            if facts(node).role in ("parameter", "buffer"):
                name = _text(facts(node).name.removeprefix(f"{frame}."), size=9, bold=facts(node).role == "parameter")
                rows.append(f"<TR><TD ALIGN='LEFT'>{name} {_text(self._shape(node), _PALE, 9)}</TD>{self._chips(facts(node).layout)}</TR>")
        return f"<{_LABELLED.format(''.join(rows))}>", {"shape": "note", "style": "filled", "fillcolor": "#fffbe6", "color": "#b59f3b", "margin": "0.03,0.01"}

    def _port(self, head: fx.Node, members: list[fx.Node]) -> tuple[str, dict[str, str]]:
        role = facts(head).role
        title = f"{role} {facts(head).name}".strip()
        shape = f"<BR/>{_text(self._shape(head), _PALE, 9)}" if facts(head).values else ""
        return f"<{_text(title, bold=True)}{shape}>", {"fillcolor": "#d8dee6", "color": _INK, "penwidth": "1.5", "style": "filled"}

    def _op(self, head: fx.Node, members: list[fx.Node]) -> tuple[str, dict[str, str]]:
        ops = [node for node in members if not _is_view(node) and facts(node).role != "projection"]
        names = list(dict.fromkeys(_SHORT.get(_packet(node), _packet(node).strip("_")) for node in ops or members))
        home, shape = self.homes[head], self._shape((ops or members)[-1])
        is_framed, is_pale = self._frame(home, self.clusters) == home, not ops or facts(head).is_constant or facts(head).role == "update"
        title = _text(" ".join(names[:4]) + " …" * (len(names) > 4), bold=is_framed)
        if not is_framed:
            title = f"{_text(home.rpartition('.')[2], bold=True)} {title if len(ops) == 1 else _text(self.module_classes.get(home, ''))}"
        if is_pale:
            return f"<{title} {_text(shape, _PALE, 8)}>", {"color": "#c9d0d8", "fillcolor": "#fbfcfd", "margin": "0.04,0.02", "fontsize": "9"}
        return f"<{title}<BR/>{_text(shape, _PALE, 9)}>", {"color": _INK}

    def _pill(self, head: fx.Node, members: list[fx.Node]) -> tuple[str, dict[str, str]]:
        members = [node for node in members if facts(node).role == "conversion"]
        row, axis = BY_NAME[head.target.__name__], head.args[1]  # type: ignore[union-attr]
        sent = [sum(column) for column in zip(*(wire_bytes(self.program, node, self.costs) for node in members), strict=True)]
        copies = sum(twin is head for twin in self.first.values()) if not any(p in self.folds for p in _prefixes(self.homes[head])) else 0
        count = f" ×{1 + copies}" if copies else ""
        ways = [(name, way, bytes_) for name, way, bytes_ in zip((row.forward, row.backward), ("fwd", "bwd"), sent, strict=True) if bytes_]
        if not ways:
            local = row.name.removesuffix("_invariant").replace("_", " ")
            return f"<{_text(f'{local} @{axis}{count}', _PALE, 8)}>", {"fillcolor": "#e3e7ec", "color": "#c9d0d8", "margin": "0.05,0.02"}
        main, color = ways[0][0], _PILLS[ways[0][0]]
        title = f"{main.replace('_', '-')} @{axis}{count}"
        ink = "#ffffff" if row.forward in COMMUNICATES else color
        lines = [f"{way} {human_bytes(bytes_)}" if name == main else f"{way} {name.replace('_', '-')} {human_bytes(bytes_)}" for name, way, bytes_ in ways]
        fill = {"fillcolor": color} if row.forward in COMMUNICATES else {"fillcolor": "#ffffff", "penwidth": "1.5"}
        return f"<{_text(title, ink, 10, True)}<BR/>{_text(', '.join(lines), ink, 8)}>", {"color": color, **fill}

    def _collect(self) -> dict[tuple[str, str], dict[str, fx.Node]]:
        """Pairs of classes with an edge -> the values that pass, by what is written on it."""
        passing: dict[tuple[str, str], dict[str, fx.Node]] = {}
        for node in self.program.nodes():
            target, drawn = self.classes.head_of(node), self.classes.operands(self.first.get(node, node))
            for operand, source in zip(node.all_input_nodes, self.classes.operands(node), strict=True):
                end = target.name if source in drawn else _next(source)
                if source.name != end:
                    passing.setdefault((source.name, end), {}).setdefault(self._passed(operand), operand)
        return passing

    def add_edges(self, graph: graphviz.Digraph) -> None:
        """One edge per pair of classes, with every layout that passes."""
        for ends, values in self.passing.items():
            is_note = all(facts(value).role in ("parameter", "buffer") for value in values.values())
            label = "" if is_note else f"<{_LABELLED.format(''.join(f'<TR>{row}</TR>' for row in values if row))}>"
            tip = _tooltip("\n".join(f"{value.name}: {self._described(value)}" for value in values.values()))
            graph.edge(*ends, label, tooltip=tip, labeltooltip=tip, weight="1" if is_note else "3")

    def _passed(self, node: fx.Node) -> str:
        """Layout of a value as chips, and its global shape where the op behind it changed that."""
        known, operands = facts(node), node.all_input_nodes
        if not known.layouts:
            return ""
        is_new = _is_view(node) or any(p.is_split for p in known.layout)
        if not is_new or not operands or facts(operands[0]).value.shape == known.value.shape:
            return self._chips(known.layout)
        return self._chips(known.layout) + f"<TD>{_text(f'{short_dtype(known.value.dtype)}{list(known.value.shape)}', _PALE, 8)}</TD>"
