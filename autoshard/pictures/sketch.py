"""What is written on a picture: the nodes of each group, its edges, and what stands for that which is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import graphviz
from torch import fx

from autoshard.cost_report import CostRow, Pricer
from autoshard.costs import CostModel
from autoshard.pictures import labels
from autoshard.pictures.folding import Folding, is_inside, parent, prefixes
from autoshard.pictures.grouping import Groups, is_view, packet
from autoshard.pictures.labels import PALE, cell, text, tooltip
from autoshard.pictures.staging import cut_modules, is_stage, module_of, stage_of, stage_title
from autoshard.placements import Layout, format_layout
from autoshard.program import Facts, Program, facts, row_of
from autoshard.text import describe_value, human_bytes, human_seconds
from autoshard.traffic import traffic

_SHORT = {"scaled_dot_product_attention": "attention", "cross_entropy_loss": "cross_entropy"}
_MOST_VALUES, _MOST_PARAMETERS, _MOST_TIPS, _MOST_READERS, _MOST_OF_BRIEF = 3, 8, 12, 16, 2
Drawn = tuple[str, dict[str, str]]  # a label and the node's attributes
Sends = dict[tuple[str, str], list[float]]  # kind and axis -> times, bytes and seconds forward, then the same backward


@dataclass
class Sketch:
    """What drawing one program needs.

    clusters: modules that get a frame. closed: modules that are one node. shown: heads of the groups to draw; what they exchange with
    others is drawn as stubs if has_stubs. left_out: what the picture does not show, one sentence each.
    """

    program: Program
    costs: CostModel
    homes: Mapping[fx.Node, str]
    folding: Folding
    groups: Groups
    clusters: dict[str, None]
    shown: dict[fx.Node, None]
    card: Mapping[fx.Node, str] = field(default_factory=dict)
    has_stubs: bool = False
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.contents: dict[str, list[fx.Node]] = {}
        for head in self.shown:
            self.contents.setdefault(self._frame(self._home(head)), []).append(head)
        self.kinds = {facts(node).source.module: facts(node).source.module_class for node in self.program.nodes("op")}
        self.pricer = Pricer(self.program, self.costs)
        self.edges = self._collect()
        self.readers = Counter(start for start, _ in self.edges)
        self.cut = cut_modules(prefix for node in self.program.nodes("op") for prefix in prefixes(self.homes[node]))

    # ------------------------------------------------------------------------------------------------------- the graph

    def draw(self, graph: graphviz.Digraph) -> None:
        """Everything into `graph`."""
        graph.attr(label=self._title())
        self._add_nodes(graph, "")
        self._add_stubs(graph)
        stages = {head.name: stage_of(self.homes[head]) for head in self.shown}
        for ends, values in self.edges.items():
            tip = [f"{value.name}: {self._described(value)}" for value in values[:_MOST_TIPS]]
            style = {"style": "dashed"} if all(facts(value).role in ("parameter", "buffer") for value in values) else {}
            start, stage = self._start(graph, *ends, values[0]), stages.get(ends[1])
            if None not in (stage, stages.get(start)) and stage != stages[start]:
                tip, style = [f"sent to stage {stage}", *tip], labels.SENT
            graph.edge(start, ends[1], _attributes={"tooltip": tooltip(tip), **style})

    def _start(self, graph: graphviz.Digraph, start: str, end: str, value: fx.Node) -> str:
        """Where an edge starts: at the node, or, where too many edges would cross the picture, at a mark with its name."""
        if self.readers[start] <= _MOST_READERS:
            return start
        mark = f"{start} for {end}"
        graph.node(mark, labels.table([cell(text(start, PALE, 9)), *self._values([value])]), _attributes={**labels.STUB, "tooltip": " "})
        return mark

    def _title(self) -> str:
        mesh, pipeline = self.program.whole_mesh, self.program.pipeline
        first = f"mesh {mesh}, {mesh.size} ranks"
        if pipeline is not None:
            first += f", predicted step {human_seconds(self.program.stats.get('pipeline_s', 0.0))}: {pipeline.described}"
        elif "objective_s" in self.program.stats:
            step_s = sum(row.total_s for row in self.pricer.rows() if row.is_per_step)
            first += f", predicted step {human_seconds(step_s)}, nothing overlapped"
        moved = traffic(self.program, self.costs)
        sent = [f"{name.replace('_', '-')} {human_bytes(count)}" for name, count in moved.items()]
        rows = [text(first, size=15, is_bold=True), text(f"a rank sends per step: {', '.join(sent) or 'nothing'}", PALE)]
        if pipeline is not None:
            rows.append(text("shapes, bytes and seconds beside a module are those of one microbatch", PALE))
        rows += [text(words, "#b3261e", 11, is_bold=True) for words in self.left_out]
        rows = [cell(row, "ALIGN='CENTER'") for row in rows]
        return labels.table([*rows, *(cell(row, "ALIGN='CENTER'") for row in labels.legend(moved, pipeline is not None))])

    def _home(self, head: fx.Node) -> str:
        """The module that a group's node stands in: of a closed module the one around it."""
        return parent(self.card[head]) if head in self.card else self.homes[head]

    def _frame(self, path: str) -> str:
        """The innermost cluster around a path; "" for none."""
        return next((prefix for prefix in reversed(prefixes(path)) if prefix in self.clusters), "")

    def _add_nodes(self, graph: graphviz.Digraph, path: str) -> None:
        """Nodes of one cluster, then the clusters in it."""
        for head in self.contents.get(path, ()):
            label, attributes = self._drawn(head)
            graph.node(head.name, label, _attributes={**attributes, "tooltip": self._tip(head)})
            if (head.name, _next(head)) in self.edges:
                graph.node(_next(head), f"<{text('↻ next layer', PALE, 9)}>", _attributes=labels.PLAIN)
        for child in self.clusters:
            if self._frame(parent(child)) == path and any(is_inside(other, child) for other in self.contents):
                with graph.subgraph(name=f"cluster_{child}") as inner:
                    inner.attr(_attributes=self._cluster(child, path))
                    self._add_nodes(inner, child)

    def _add_stubs(self, graph: graphviz.Digraph) -> None:
        """Where values come from and go to beyond what is drawn."""
        drawn = {head.name for head in self.shown}
        by_name = {head.name: head for head in self.groups.members}
        for (start, end), values in self.edges.items():
            if not self.has_stubs:
                return
            if start not in drawn and start.endswith(" in"):
                rows = [cell(text(f"from {self._where(by_name[start[:-3]])}", PALE, 9)), *self._values(values)]
                graph.node(start, labels.table(rows), _attributes={**labels.STUB, "tooltip": " "})
            if end not in drawn and end.endswith(" out"):
                users = [user for value in values for user in value.users]
                beyond = [self._where(head) for head in map(self.groups.head_of, users) if head not in self.shown]
                readers = dict.fromkeys([*(["the next layer"] if any(user in self.folding.first for user in users) else []), *beyond])
                shown = [*list(readers)[:_MOST_VALUES], *([f"{len(readers) - _MOST_VALUES} more"] if len(readers) > _MOST_VALUES else [])]
                label = labels.table([cell(text(f"to {', '.join(shown)}", PALE, 9))])
                graph.node(end, label, _attributes={**labels.STUB, "tooltip": " "})

    def _where(self, head: fx.Node) -> str:
        known = facts(head)
        if known.role in ("input", "output"):
            return f"{known.role} {known.name}".strip()
        path, stage = module_of(self.homes[head]) or packet(head), stage_of(self.homes[head])
        is_elsewhere = stage is not None and all(stage_of(self.homes[other]) != stage for other in self.shown)
        return f"{path} in stage {stage}" if is_elsewhere else path

    def _collect(self) -> dict[tuple[str, str], list[fx.Node]]:
        """Pairs of drawn nodes with an edge -> the values that pass."""
        found: dict[tuple[str, str], dict[fx.Node, None]] = {}
        for node in self.program.nodes():
            target, drawn = self.groups.head_of(node), self.groups.operands(self.groups.first_of(node))
            for operand, source in zip(node.all_input_nodes, self.groups.operands(node), strict=True):
                ends = self._ends(source, target, source in drawn, node in self.folding.first)
                if ends and ends[0] != ends[1]:
                    found.setdefault(ends, {}).setdefault(operand)
        return {ends: list(values) for ends, values in found.items()}

    def _ends(self, source: fx.Node, target: fx.Node, is_drawn: bool, is_twin: bool) -> tuple[str, str] | None:
        """Names of the ends of an edge, stubs where an end is not drawn; None for what is not to be seen."""
        if source in self.shown and (target in self.shown or not is_drawn):
            if is_drawn:
                return source.name, target.name
            return source.name, f"{source.name} out" if self.has_stubs else _next(source)
        if not self.has_stubs or is_twin:
            return None
        if source in self.shown:
            return source.name, f"{source.name} out"
        return (f"{source.name} in", target.name) if target in self.shown else None

    def _cluster(self, child: str, path: str) -> dict[str, str]:
        depth = sum(p in self.clusters for p in prefixes(child)) - 1
        line = {"color": labels.INK, "penwidth": "2"} if child in self.folding.copies else {"color": labels.LINE, "penwidth": "1"}
        pipeline, stage = self.program.pipeline, stage_of(child)
        if pipeline is not None and stage is not None and is_stage(child):
            name, said = stage_title(pipeline, stage)
            look = labels.stage(pipeline.stage_ranks[stage])
            return {"label": f"<{text(name, is_bold=True)} {text(said, PALE)}>", "labeljust": "l", "tooltip": f"{name}, {said}", **look}
        label = f"<{text(self._named(child, path), is_bold=True)} {text(self._kind(child), PALE)}>"
        fill = {"style": "rounded,filled", "fillcolor": labels.DEPTHS[min(depth, len(labels.DEPTHS) - 1)]}
        return {"label": label, "labeljust": "l", "margin": "8", "tooltip": tooltip([module_of(child)]), **fill, **line}

    def _kind(self, path: str) -> str:
        """The class of a module; of one that a stage boundary cuts also that this is a part of it."""
        words = [self.kinds.get(module_of(path), ""), *(["in part"] if module_of(path) in self.cut else [])]
        return ", ".join(filter(None, words))

    def _named(self, path: str, frame: str) -> str:
        """A module's name within `frame`, with its copies."""
        paths = [module_of(p) for p in (path, *self.folding.copies.get(path, ()))]
        names = [".".join(p.split(".")[-2:]) for p in paths]
        return paths[0].removeprefix(f"{module_of(frame)}.") if len(names) == 1 else f"{names[0]} … {names[-1]}  ×{len(names)}"

    # -------------------------------------------------------------------------------------------------------- one node

    def _drawn(self, head: fx.Node) -> Drawn:
        role, members = facts(head).role, self.groups.members[head]
        if head in self.card:
            return self._card(head, members)
        if role in ("parameter", "buffer"):
            return labels.table([cell(self._parameters(members, self._frame(self.homes[head])))]), labels.NOTE
        if role == "conversion":
            return self._pill(head, [node for node in members if facts(node).role == "conversion"])
        if role in ("input", "output"):
            name = cell(text(f"{role} {facts(head).name}".strip(), is_bold=True))
            return labels.table([name, *(self._values([head]) if facts(head).values else ())]), labels.PORT
        return self._op(head, members)

    def _tip(self, head: fx.Node) -> str:
        members = self.groups.members[head]
        told = [node for node in members if not is_view(node)] or members
        said = [f"{node.name}: {self._described(node)}  {facts(node).source}  {self._cost([node])}".rstrip() for node in told[:_MOST_TIPS]]
        more = [f"and {len(told) - _MOST_TIPS} more"] if len(told) > _MOST_TIPS else []
        total = [f"{module_of(self.card[head])}: {self._cost(members)}"] if head in self.card else []
        return tooltip([*total, *said, *more])

    def _rows(self, node: fx.Node) -> list[CostRow]:
        """Prices of a node at every step; none where no strategies were chosen."""
        known = facts(node)
        is_priced = bool(known.layouts) and (known.role != "op" or bool(known.strategies))
        return [row for row in self.pricer.of(node) if row.is_per_step] if is_priced else []

    def _cost(self, nodes: Iterable[fx.Node]) -> str:
        """Predicted seconds on one rank, each way."""
        rows = [row for node in nodes for row in self._rows(node)]
        parts = {"fwd": "forward_s", "bwd": "backward_s", "optimizer": "optimizer_s"}
        seconds = {name: sum(getattr(row, part) for row in rows) for name, part in parts.items()}
        return ", ".join(f"{name} {human_seconds(spent)}" for name, spent in seconds.items() if spent)

    def _described(self, node: fx.Node) -> str:
        return describe_value(facts(node), self.program) if facts(node).values else ""

    def _value(self, known: Facts, index: int = 0) -> str:
        """One value: dtype with local shape, then its placements."""
        shape = describe_value(known, self.program, index).partition("  ")[0]
        layout: Layout = known.layouts[index] if known.layouts else ()
        layout = () if self.program.mesh.is_alone else layout
        texts = format_layout(layout, self.program.mesh).split() if layout else ()
        placements = (labels.placement(placement.kind, words) for placement, words in zip(layout, texts, strict=True))
        return " ".join([text(shape, PALE, 9), *placements])

    def _values(self, nodes: Iterable[fx.Node]) -> list[str]:
        """A cell of what `nodes` make, equal values once."""
        rows = list(dict.fromkeys(self._value(facts(node), k) for node in nodes for k in range(len(facts(node).values))))
        return [cell(labels.lines(_cut(rows, _MOST_VALUES)))] if rows else []

    def _leaving(self, head: fx.Node, members: Sequence[fx.Node]) -> list[fx.Node]:
        """Values that others read; what views make of a value counts as that value."""
        inside = set(members)
        made = [node for node in members if any(self.groups.head_of(user) is not head for user in node.users)]
        plain = []
        for node in made or members[-1:]:
            while is_view(node) and node.all_input_nodes[0] in inside and facts(node).layouts == facts(node.all_input_nodes[0]).layouts:
                node = node.all_input_nodes[0]
            plain.append(node)
        return [node for node in dict.fromkeys(plain) if facts(node).role not in ("parameter", "buffer", "update")]

    def _parameters(self, members: Iterable[fx.Node], frame: str) -> str:
        """A line per parameter or buffer: name, dtype and local shape, placements."""
        rows = []
        for known in map(facts, members):
            if known.role in ("parameter", "buffer"):
                name = text(known.name.removeprefix(f"{module_of(frame)}."), size=9, is_bold=known.role == "parameter")
                rows.append(f"{name} {self._value(known)}")
        return labels.lines(_cut(rows, _MOST_PARAMETERS))

    def _card(self, head: fx.Node, members: Sequence[fx.Node]) -> Drawn:
        """A closed module: name, what leaves it and what it sends, beside that its parameters; of layers among stages only sums."""
        path, frame = self.card[head], self._frame(self._home(head))
        title = f"{text(self._named(path, frame), is_bold=True)} {text(self._kind(path), PALE)}"
        held = [node for node in members if facts(node).role == "parameter"]
        is_brief = stage_of(path) is not None and path.rpartition(".")[2].isdigit() and len(held) > _MOST_OF_BRIEF
        sends = self._kinds_sent(members) if is_brief else self._sends(members)
        left = [cell(title), *self._values(self._leaving(head, members)), *sends]
        parameters = self._bytes_of(held) if is_brief else self._parameters(members, path)
        beside = cell(parameters, f"ALIGN='LEFT' BGCOLOR='{labels.PARAMETER}' ROWSPAN='{len(left)}'") if parameters else ""
        return labels.table([left[0] + beside, *left[1:]]), labels.CARD

    def _op(self, head: fx.Node, members: Sequence[fx.Node]) -> Drawn:
        updates = [f"update {facts(node).name.rpartition('.')[2]}" for node in members if facts(node).role == "update"]
        ops = [node for node in members if not is_view(node) and facts(node).role == "op"]
        names = updates or list(dict.fromkeys(_SHORT.get(packet(node), packet(node).strip("_")) for node in ops or members))
        if facts(head).role == "projection":
            names = [f"[{head.args[1]}]"]
        home = self.homes[head]
        is_framed = self._frame(home) == home
        title, name = " ".join(names[:4]) + " …" * (len(names) > 4), "" if is_framed else module_of(home).rpartition(".")[2]
        if name and len(ops) > 1:
            title = self.kinds.get(module_of(home)) or title
        values = self._values(self._leaving(head, members))
        if updates or not ops or facts(head).is_constant:
            return labels.table([cell(text(f"{name} {title}".strip(), PALE, 9)), *values]), labels.SMALL
        first = cell(f"{text(name, is_bold=True)} {text(title, is_bold=is_framed)}")
        sends = self._sends(ops)
        return labels.table([first, *values, *sends]), labels.CARD if sends else {}

    def _sent(self, nodes: Iterable[fx.Node]) -> Sends:
        """What nodes send, conversions and lowerings alike."""
        sends: Sends = {}
        for row in (row for node in nodes for row in self._rows(node) if row.axis):
            amounts = sends.setdefault((row.kind, row.axis), [0.0] * 6)
            way = 0 if row.forward_s or not row.backward_s else 3
            for k, amount in enumerate((row.times, row.wire_bytes, row.total_s)):
                amounts[way + k] += amount
        return sends

    def _sends(self, nodes: Iterable[fx.Node], copies: str = "") -> list[str]:
        """A coloured row per collective and axis, with bytes and seconds each way; copies: how often all of it happens."""
        rows = []
        for (kind, axis), amounts in self._sent(nodes).items():
            ways = [f"{way} {_amount(*amounts[k : k + 3])}" for way, k in (("fwd", 0), ("bwd", 3)) if amounts[k]]
            words = f"{kind.replace('_', '-')} @{axis}{copies}  {'; '.join(ways)}"
            rows.append(labels.collective_cell(kind, words, bool(amounts[0])))
        return rows

    def _kinds_sent(self, nodes: Iterable[fx.Node]) -> list[str]:
        """The bytes of every kind of collective, both ways, in one coloured row."""
        kinds: dict[str, list[float]] = {}
        for (kind, _), amounts in self._sent(nodes).items():
            found = kinds.setdefault(kind, [0.0, 0.0])
            found[0] += amounts[0]
            found[1] += amounts[1] + amounts[4]
        cells = [labels.collective_cell(k, f"{k.replace('_', '-')} {human_bytes(sent)}", bool(n)) for k, (n, sent) in kinds.items()]
        return [cell(labels.row(cells))] if cells else []

    def _bytes_of(self, parameters: Sequence[fx.Node]) -> str:
        """How many parameters there are, and their bytes on one rank."""
        held = sum(self.costs.local_bytes(facts(node).value, facts(node).layout) for node in parameters if facts(node).layouts)
        return labels.lines(text(words, PALE, 9) for words in (f"{len(parameters)} parameters", human_bytes(held)))

    def _pill(self, head: fx.Node, members: Sequence[fx.Node]) -> Drawn:
        """One conversion, or several of one value one after the other."""
        steps: dict[tuple, list[fx.Node]] = {}
        for node in members:
            steps.setdefault((node.target, node.args[1]), []).append(node)
        local = []
        for nodes in steps.values():
            if not self._sent(nodes):
                local.append(
                    f"{row_of(nodes[0]).name.removesuffix('_invariant').replace('_', ' ')} @{nodes[0].args[1]}{self._times(nodes[0])}"
                )
        sends = self._sends(members, self._times(members[0]))
        ends = self._values(self._leaving(head, members))
        if not sends:
            return labels.table([cell(text(", ".join(local), PALE, 9)), *ends]), labels.LOCAL
        rows = [*sends, *(cell(text(words, PALE, 8)) for words in local)]
        kind, _ = next(iter(self._sent(members)))
        return labels.table([*rows, *ends]), {**labels.CARD, "color": labels.PILLS[kind], "penwidth": "1.5"}

    def _times(self, node: fx.Node) -> str:
        """How often a conversion between folded layers stands."""
        if any(path in self.folding.copies for path in prefixes(self.homes[node])):
            return ""
        copies = sum(twin is node for twin in self.folding.first.values())
        return f" ×{1 + copies}" if copies else ""


def _amount(times: float, sent: float, seconds: float) -> str:
    count = f"{times:.0f}×, " if times > 1 else ""
    return f"{count}{human_bytes(sent)}, {human_seconds(seconds)}"


def _cut(rows: list[str], most: int) -> list[str]:
    more = [text(f"and {len(rows) - most} more", PALE, 9)] if len(rows) > most else []
    return [*rows[:most], *more]


def _next(head: fx.Node) -> str:
    """Name of the mark below a group that stands for its users in the copies of a folded layer; the space makes it unique."""
    return f"{head.name} next"
