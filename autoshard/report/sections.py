"""The sections of a report, in their order. Each is a function from a Subject to HTML, or None where it has nothing to say.

To add one: write the function (here, or in a file of its own) and put a row into SECTIONS.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoshard.cost_report import CostRow, source_of_value
from autoshard.costs import CostModel
from autoshard.errors import PlanError
from autoshard.explanation import nodes_of_rows, reason_of, why_sent
from autoshard.memory import Memory
from autoshard.pipeline_timeline import PipelineTimeline
from autoshard.placements import local_shape, shown_layout
from autoshard.plan_diff import value_texts
from autoshard.program import facts
from autoshard.report import charts
from autoshard.report.comparisons import alternatives, comparison
from autoshard.report.graph import graph
from autoshard.report.markup import Cell, Markup, code, count, element, joined, nbytes, paragraph, seconds, share, table, whole
from autoshard.report.subject import Subject
from autoshard.stage_shares import kept_by_rank, stage_shares, weights_by_rank
from autoshard.symbolic import short
from autoshard.text import fold_name, human_bytes, human_seconds, short_dtype
from autoshard.timeline import Timeline
from autoshard.traffic import traffic

if TYPE_CHECKING:
    from autoshard.plan import Plan

_MOST_PROGRAM = 200_000  # characters
_BOUNDS = ("compute", "memory", "latency", "copy", "optimizer")


@dataclass(frozen=True)
class Section:
    """name: of the anchor. build: its HTML; None leaves it out."""

    name: str
    title: str
    build: Callable[[Subject], Markup | None]


def summary(subject: Subject) -> Markup:
    """The plan in words and in a few numbers."""
    plan, timeline = subject.plan, subject.timeline
    if plan.program.pipeline is None:
        held = sum(subject.costs.local_bytes(facts(node).value, facts(node).layout) for node in plan.program.parameters().values())
    else:
        held = max(parameters for parameters, _ in weights_by_rank(plan.program, subject.costs))
    sent = sum(traffic(plan.program, subject.costs).values())
    figures = {
        "predicted step": human_seconds(timeline.total_s),
        **_waiting(timeline),
        "a rank sends per step": human_bytes(sent),
        "parameters on a rank": human_bytes(held),
    }
    if "kept_bytes" in plan.program.stats:
        figures["state and kept results on a rank"] = human_bytes(kept_by_rank(subject.cost))
    tiles = (element("div", element("dt", name), element("dd", shown)) for name, shown in figures.items())
    notes = element("ul", *(element("li", note) for note in subject.explanation.fallbacks))
    to_know = joined([element("h3", "To know"), notes]) if subject.explanation.fallbacks else ""
    caveat = paragraph("Every number is predicted by the cost model, per rank and step, at the sizes of the example inputs.", "note")
    return joined([element("dl", *tiles, class_="tiles"), *map(paragraph, subject.explanation.summary), to_know, caveat])


def _waiting(timeline: Timeline | PipelineTimeline) -> dict[str, str]:
    if isinstance(timeline, PipelineTimeline):
        return {"ranks stand idle (bubble)": f"{timeline.bubble:.1%}"}
    exposed = sum(timeline.exposed_s.values())
    return {"of it waiting for collectives": human_seconds(exposed) if exposed else "nothing"}


def modules(subject: Subject) -> Markup:
    """By module: what it returns and where, and what it takes."""
    returned: dict[str, dict[str, None]] = {}
    for name, layout in value_texts(subject.cost.program).items():
        returned.setdefault(fold_name(name.removeprefix("output:")), {})[layout] = None
    kinds = {fold_name(facts(node).source.module): facts(node).source.module_class for node in subject.cost.program.nodes("op")}
    paths: dict[str, set[str]] = {}
    for row in subject.cost.rows:
        paths.setdefault(fold_name(row.module) or "(model)", set()).add(row.module)
    total = subject.cost.total_s
    rows: list[list[Cell]] = []
    for group in subject.cost.by("module"):
        lies = joined((whole(layout) for layout in returned.get(group.name, ())), " or ")
        rows.append([code(group.name), kinds.get(group.name, ""), count(len(paths[group.name])), lies, seconds(group.forward_s)])
        rows[-1] += [seconds(group.backward_s), seconds(group.optimizer_s), share(group.total_s, total), nbytes(group.wire_bytes)]
    columns = ("module", "class", "#modules", "returns", "#forward", "#backward", "#optimizer", "#share", "#sent")
    words = "Repeated layers are one row (layers.*). What a module returns is written as in the program: placement @ mesh axis."
    return joined([paragraph(words), table("Time and traffic by module", columns, rows)])


def parameters(subject: Subject) -> Markup:
    """Where parameters rest, and why they are sent."""
    return parameter_table(subject.plan, has_reasons=True)


def parameter_table(plan: Plan, has_reasons: bool) -> Markup:
    """Parameters with global and local shape, layout and bytes, those of repeated layers in one row; with reasons, what is sent and why."""
    program, costs = plan.program, CostModel(plan.mesh, plan.hardware)
    reasons = _reasons(plan) if has_reasons else {}
    groups: dict[tuple, list[str]] = {}
    for name, node in program.parameters().items():
        known = facts(node)
        groups.setdefault((fold_name(name), known.value.dtype, known.value.shape, known.layout), []).append(name)
    rows: list[list[Cell]] = []
    for (name, dtype, shape, layout), names in groups.items():
        value = facts(program.parameters()[names[0]]).value
        local = local_shape(shape, layout, program.mesh.shape) or ()
        row: list[Cell] = [code(name if len(names) > 1 else names[0]), count(len(names)), whole(f"{short_dtype(dtype)}{_shape(shape)}")]
        row += [whole(_shape(local)), whole(shown_layout(layout, program.mesh)), nbytes(len(names) * costs.local_bytes(value, layout))]
        rows.append([*row, *([reasons.get(names[0], "read as it rests, nothing is sent")] if has_reasons else [])])
    columns = [
        "parameter",
        "#count",
        "global shape",
        "on a rank",
        "rests as",
        "#bytes on a rank",
        *(["why it is sent"] if has_reasons else []),
    ]
    return table("Parameters", columns, rows)


def _reasons(plan: Plan) -> dict[str, str]:
    """Parameter -> why it or its gradient is sent, and by what."""
    cost = plan.cost
    nodes, found = nodes_of_rows(cost.program), dict[str, dict[str, dict[str, None]]]()
    for row in cost.rows:
        if row.axis and row.is_per_step and row.node in nodes and facts(nodes[row.node]).role == "conversion":
            source = source_of_value(nodes[row.node])
            if facts(source).role == "parameter":
                found.setdefault(facts(source).name, {}).setdefault(reason_of(row.op, is_parameter=True), {})[_label(row)] = None
    return {name: ". ".join(f"{', '.join(labels)}: {reason}" for reason, labels in reasons.items()) for name, reasons in found.items()}


def _shape(sizes: Sequence[int]) -> str:
    return f"[{', '.join(map(short, sizes))}]"


def _label(row: CostRow) -> str:
    return row.label.replace("_", "-").replace("@", " @")


_PASSED = "later stages read it"


def communication(subject: Subject) -> Markup:
    """What is sent: by collective and axis, by module, and every collective with its reason, dearest first."""
    sent = [row for row in subject.cost.rows if row.is_per_step and row.axis]
    if not sent:
        return paragraph("Nothing is sent between ranks.")
    total = subject.cost.total_s
    nodes, program = nodes_of_rows(subject.cost.program), subject.cost.program
    rows: list[list[Cell]] = []
    for group in _grouped(sent, lambda row: (fold_name(row.node), row.label)):
        first, spent = group[0], sum(row.total_s for row in group)
        each: list[Cell] = [
            code(fold_name(first.node)),
            first.kind.replace("_", "-"),
            f"@{first.axis}",
            count(sum(row.times for row in group)),
        ]
        each += [nbytes(sum(row.wire_bytes for row in group)), seconds(sum(row.forward_s for row in group))]
        each += [
            seconds(sum(row.backward_s for row in group)),
            share(spent, total),
            why_sent(program, nodes[first.node], first) if first.node in nodes else _PASSED,
        ]
        rows.append(each)
    columns = ("at", "collective", "axis", "#count", "#sent", "#forward", "#backward", "#share", "why")
    by_kind = _totals(sent, "Sent by collective and axis", "collective", _label, total)
    by_module = _totals(sent, "Sent by module", "module", lambda row: fold_name(row.module) or "(model)", total)
    return joined([charts.columns(by_kind, by_module), table("Every collective, dearest first", columns, rows)])


def _grouped(rows: list[CostRow], key: Callable[[CostRow], object]) -> list[list[CostRow]]:
    groups: dict[object, list[CostRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return sorted(groups.values(), key=lambda group: -sum(row.total_s for row in group))


def _totals(sent: list[CostRow], caption: str, column: str, name: Callable[[CostRow], str], total: float) -> Markup:
    def cells(group: list[CostRow]) -> Iterator[Cell]:
        spent = sum(row.total_s for row in group)
        yield code(name(group[0]))
        yield count(sum(row.times for row in group))
        yield nbytes(sum(row.wire_bytes for row in group))
        yield seconds(spent)
        yield share(spent, total)

    return table(caption, (column, "#count", "#sent", "#time", "#share"), [list(cells(group)) for group in _grouped(sent, name)])


def time(subject: Subject) -> Markup:
    """Where the step goes: what bounds the ops, and each collective."""
    groups = {group.name: group for group in subject.cost.by("kind") if group.total_s}
    order = [name for name in _BOUNDS if name in groups] + [name for name in groups if name not in _BOUNDS]
    looks = {name: f"time-{name}" if name in _BOUNDS else _look(name, subject.plan.program.whole_mesh.axes) for name in order}
    said = {name: f"bound by {name}" if name in _BOUNDS[:3] else name.replace("_", "-").replace("@", " @") for name in order}
    parts = [(said[name], looks[name], groups[name].total_s, human_seconds(groups[name].total_s)) for name in order]
    rows: list[list[Cell]] = []
    for name in order:
        group = groups[name]
        rows.append([said[name], seconds(group.forward_s), seconds(group.backward_s), seconds(group.optimizer_s), seconds(group.total_s)])
        rows[-1].append(share(group.total_s, subject.cost.total_s))
    key = charts.legend({said[name]: looks[name] for name in order})
    words = f"The work of one step laid end to end takes {human_seconds(subject.cost.total_s)}, nothing overlapped."
    columns = ("kind", "#forward", "#backward", "#optimizer", "#together", "#share")
    return joined([paragraph(words), charts.stacked_bar(parts, words), key, table("Time by kind", columns, rows)])


def _look(label: str, axes: Sequence[str]) -> str:
    """Classes of a collective's colour: its kind's, lighter for every further axis."""
    kind, _, axis = label.partition("@")
    return f"time-{kind.replace('_', '-')} axis-{min(axes.index(axis), 3)}"


def stages(subject: Subject) -> Markup | None:
    """Where the model is cut, and what every stage takes."""
    program, pipeline = subject.plan.program, subject.plan.program.pipeline
    if pipeline is None:
        return None
    rows: list[list[Cell]] = []
    for stage, own in zip(stage_shares(program, subject.costs), pipeline.costs, strict=True):
        rows.append([count(stage.number), count(stage.rank), code(stage.modules), seconds(own.forward_s), seconds(own.backward_s)])
        rows[-1] += [seconds(own.once_s + own.after_s), seconds(own.send_s), nbytes(stage.parameter_bytes), nbytes(own.kept_bytes)]
    words = f"{pipeline.described[0].upper()}{pipeline.described[1:]}. Seconds and kept bytes are those of one microbatch."
    usual = {"as many layers in each stage": "even_layers_s", "as many bytes of parameters": "even_parameters_s"}
    others = [f"{human_seconds(program.stats[key])} with {name}" for name, key in usual.items() if key in program.stats]
    found = f"The step takes {human_seconds(subject.timeline.total_s)}" + (f", against {' and '.join(others)}." if others else ".")
    columns = ("#stage", "#rank of pp", "from, to", "#forward", "#backward", "#once a step", "#sending", "#parameters", "#kept")
    return joined([paragraph(words), paragraph(found), table("Stages", columns, rows)])


def timeline(subject: Subject) -> Markup:
    """What runs when."""
    found = subject.timeline
    if isinstance(found, PipelineTimeline):
        said = f"ranks stand idle for {found.bubble:.1%} of it; rows are ranks of pp."
    else:
        waits = [f"{human_seconds(spent)} for @{axis}" for axis, spent in found.exposed_s.items() if spent]
        said = f"compute waits {', '.join(waits) or 'for nothing'}."
    words = f"One step takes {human_seconds(found.total_s)}; {said}"
    hint = "plan.timeline().to_chrome_trace(path) writes every event for chrome://tracing and ui.perfetto.dev."
    return joined(
        [paragraph(words), element("div", charts.timeline_chart(found), class_="wide"), charts.phase_legend(found), paragraph(hint, "note")]
    )


def memory(subject: Subject) -> Markup:
    """Bytes over the step, against what the device has and what was allowed; with pipeline stages of every rank along `pp`."""
    device = subject.plan.hardware.device
    limits = {f"the memory of {device.name}, {human_bytes(device.memory_bytes)}": device.memory_bytes}
    if subject.budget_bytes is not None:
        limits[f"the budget, {human_bytes(subject.budget_bytes)}"] = subject.budget_bytes
    try:
        every = subject.memories
    except PlanError as error:
        return paragraph(f"{error}", "note")
    if not every:
        return paragraph(
            "Not computed: plan.report(path, memory=True) runs the step on tensors without memory, which takes seconds.", "note"
        )
    found = max(every, key=lambda one: one.reserved_bytes)
    words = f"At most {human_bytes(found.peak_bytes)} at once{found.at} ({found.peak.where}), with {found.optimizer}"
    words += f"; with fragmentation {human_bytes(found.reserved_bytes)} reserved." if found.margin_bytes else "."
    against = [f"That is {found.reserved_bytes / limit:.1%} of {name}." for name, limit in limits.items() if limit]
    drawn = [
        joined(
            [
                element("h3", f"A rank{one.at}") if len(every) > 1 else "",
                element("div", charts.memory_chart(one.curve, limits), class_="wide"),
            ]
        )
        for one in every
    ]
    kinds = charts.memory_legend([point for one in every for point in one.curve])
    notes = [paragraph(note, "note") for note in found.notes]
    return joined([*map(paragraph, (words, *against)), _ranks(every, limits), *drawn, kinds, _at_the_peak(found), *notes])


def _ranks(every: Sequence[Memory], limits: Mapping[str, float]) -> Markup:
    """What each rank along `pp` needs, where there are several."""
    if len(every) < 2:
        return Markup("")
    limit = min((limit for limit in limits.values() if limit), default=0.0)
    rows: list[list[Cell]] = []
    for one in every:
        kept = max(point.kinds()["activations"] for point in one.curve)
        rows.append([one.at.strip().removeprefix("at "), nbytes(one.peak_bytes), one.peak.where, nbytes(one.at_peak["parameters"])])
        rows[-1] += [nbytes(one.at_peak["optimizer state"]), nbytes(kept), share(one.reserved_bytes, limit) if limit else ""]
    columns = ("rank", "#at most", "at", "#parameters", "#optimizer state", "#activations at most", "#of what it may take")
    return table("Memory of ranks", columns, rows)


def _at_the_peak(found: Memory) -> Markup:
    """Whose the bytes are."""
    rows: list[list[Cell]] = [[kind, nbytes(size), share(size, found.peak_bytes)] for kind, size in found.at_peak.items() if size]
    held = sorted(found.at_peak_by_module.items(), key=lambda item: -sum(item[1].values()))
    folded: dict[str, int] = {}
    for path, kinds in held:
        folded[fold_name(path) or "(model)"] = folded.get(fold_name(path) or "(model)", 0) + sum(kinds.values())
    owners: list[list[Cell]] = [
        [code(path), nbytes(size), share(size, found.peak_bytes)] for path, size in sorted(folded.items(), key=lambda x: -x[1])
    ]
    return charts.columns(
        table("At the peak, by kind", ("kind", "#bytes", "#share"), rows),
        table("At the peak, by module", ("module", "#bytes", "#share"), owners),
    )


def program(subject: Subject) -> Markup:
    """The text that ranks run, as far as it does not swell the file."""
    lines = subject.plan.program.source.splitlines(keepends=True)
    ends = list(itertools.accumulate(map(len, lines)))
    shown = sum(end <= _MOST_PROGRAM for end in ends)
    more = paragraph(f"The first {shown:,} lines; plan.source() returns all.", "note") if shown < len(lines) else ""
    text = element("pre", "".join(lines[:shown]), tabindex="0")
    pipeline = subject.plan.program.pipeline
    whose = "that every rank runs" if pipeline is None else "of the stages in order; every rank runs those of its own"
    return element("details", element("summary", f"{len(lines):,} lines of Python {whose}"), more, text)


SECTIONS = (
    Section("summary", "Summary", summary),
    Section("modules", "Modules", modules),
    Section("parameters", "Parameters", parameters),
    Section("communication", "Communication", communication),
    Section("time", "Time", time),
    Section("stages", "Stages", stages),
    Section("timeline", "Timeline", timeline),
    Section("memory", "Memory", memory),
    Section("graph", "Graph", graph),
    Section("alternatives", "Alternatives", alternatives),
    Section("comparison", "Comparison", comparison),
    Section("program", "Program", program),
)
