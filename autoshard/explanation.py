"""A plan in words, on one screen: where time and memory go by module, what is sent and why, and what fell back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from torch import fx

from autoshard.cost_report import CostReport, CostRow, readers_of, source_of_value
from autoshard.costs import CostModel
from autoshard.pipeline import Pipeline
from autoshard.pipeline_timeline import PipelineTimeline
from autoshard.program import Program, facts, op_name
from autoshard.stage_shares import in_flight, kept_by_rank, stage_shares, weights_by_rank
from autoshard.text import fold_name, human_bytes, human_seconds

if TYPE_CHECKING:
    from autoshard.plan import Plan

_MOST_MODULES, _MOST_SENT, _MOST_NOTES = 10, 5, 4

# Why a conversion is there, by whether it starts from a parameter, and by its row of autoshard.conversions.
_REASONS = {
    (True, "all_gather"): "the parameter rests split and is read whole; its gradient is summed into pieces",
    (True, "all_gather_invariant"): "the parameter rests split and is read whole, alike on every rank",
    (True, "vary"): "ranks read the parameter for different data, so its gradient is summed",
    (False, "all_gather"): "made split, read whole and differently by each rank; the gradient is summed into pieces",
    (False, "all_gather_invariant"): "made split, read whole alike on every rank",
    (False, "all_reduce"): "each rank holds a term of a sum, and reads the sum differently, so the gradient is summed too",
    (False, "all_reduce_invariant"): "each rank holds a term of a sum",
    (False, "reduce_scatter"): "each rank holds a term of a sum, and reads a piece of it",
    (False, "vary"): "ranks read the same value differently, so its gradient is summed",
    (False, "slice_invariant"): "each rank reads its piece of a whole value; the gradient is put together again",
    (False, "all_to_all"): "made split along one dim, read split along another",
}


@dataclass(frozen=True)
class ModuleShare:
    """What the modules of one (folded) path take per rank. state_bytes: parameters, gradients, optimizer; result_bytes: what their ops
    return that needs a gradient, whether backward keeps it or not."""

    name: str
    modules: int
    step_s: float
    sent_bytes: float
    state_bytes: float
    result_bytes: float


@dataclass(frozen=True)
class Communication:
    """Collectives at one (folded) place, forward and backward. label: of which kinds, by axis. why: which layouts meet."""

    label: str
    count: int
    seconds: float
    sent_bytes: float
    why: str


@dataclass(frozen=True)
class Explanation:
    """`str` gives the text; rich prints it with tables."""

    summary: tuple[str, ...]
    modules: tuple[ModuleShare, ...]
    communications: tuple[Communication, ...]
    sent_elsewhere_s: float
    fallbacks: tuple[str, ...]
    has_stages: bool = False

    def __rich__(self) -> Group:
        total = sum(row.step_s for row in self.modules)
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("module", overflow="fold", min_width=20)
        for name in ("step", "share", "sent", "state", "results"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.modules:
            name = f"{row.name} x{row.modules}" if row.modules > 1 else row.name
            sizes = (human_bytes(size) if size else "" for size in (row.sent_bytes, row.state_bytes, row.result_bytes))
            table.add_row(name, human_seconds(row.step_s), f"{row.step_s / total:.0%}" if total else "", *sizes)
        return Group(*self.summary, table, *self._sent(), *self._fallbacks())

    def _sent(self) -> Iterator[str]:
        if not self.communications:
            yield "Nothing else is sent between ranks." if self.has_stages else "Nothing is sent between ranks."
            return
        yield "Largest communications:"
        for row in self.communications:
            times = f"{row.count} x " if row.count > 1 else ""
            yield f"  {human_seconds(row.seconds)}  {times}{row.label}, {human_bytes(row.sent_bytes)}: {row.why}".replace("[", r"\[")
        if self.sent_elsewhere_s:
            yield f"  {human_seconds(self.sent_elsewhere_s)}  elsewhere"

    def _fallbacks(self) -> Iterator[str]:
        if self.fallbacks:
            yield "To know:"
        for note in self.fallbacks[:_MOST_NOTES]:
            yield f"  {note}".replace("[", r"\[")
        if len(self.fallbacks) > _MOST_NOTES:
            yield f"  and {len(self.fallbacks) - _MOST_NOTES} more: plan.notes"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True)
        with console.capture() as text:
            console.print(self)
        return text.get()


def explain(plan: Plan) -> Explanation:
    """Where the step time and the memory of `plan` go and why; every number is predicted, per rank and step."""
    report = plan.cost
    communications, elsewhere_s = _communications(report.program, report)
    padded = sum(1 for _ in plan.program.nodes("mask"))
    notes = [*plan.notes, *([f"{padded} values are masked where a dim that does not divide is summed over"] if padded else [])]
    modules = _modules(plan, report)
    summary, has_stages = tuple(_summary(plan, report, modules)), plan.program.pipeline is not None
    return Explanation(summary, modules, communications, elsewhere_s, tuple(notes), has_stages)


def _summary(plan: Plan, report: CostReport, modules: Sequence[ModuleShare]) -> Iterator[str]:
    shares = {group.name: group.total_s for group in report.by("kind")}
    total, pipeline = report.total_s or 1.0, plan.program.pipeline
    sent = {name: seconds for name, seconds in shares.items() if "@" in name}
    how = f"under template {plan.template!r}" if plan.template != "auto" else "solved for the least step time"
    yield f"{plan.model_name} on {plan.program.whole_mesh} ({plan.hardware.name}), {how}."
    parts = {part: sum(getattr(row, part) for row in report.rows if row.is_per_step) for part in ("forward_s", "backward_s", "optimizer_s")}
    times = ", ".join(f"{name.removesuffix('_s')} {human_seconds(seconds)}" for name, seconds in parts.items())
    if pipeline is None:
        yield f"Predicted step {human_seconds(report.total_s)}: {times}; nothing is counted as overlapped."
    else:
        yield from _of_stages(plan, pipeline, report, times)
    own = [f"{shares[kind] / total:.0%} bound by {kind}" for kind in ("compute", "memory", "latency") if shares.get(kind)]
    moved = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in list(sent.items())[:4])
    yield f"Of it, {', '.join(own)}; {sum(sent.values()) / total:.0%} communication{f' ({moved})' if moved else ''}."
    values, costs = [facts(node) for node in plan.program.parameters().values()], CostModel(plan.mesh, plan.hardware)
    held, whole = sum(costs.local_bytes(v.value, v.layout) for v in values), sum(v.value.nbytes for v in values)
    if pipeline is None:
        state = sum(row.state_bytes for row in modules)
        said = f"Per rank: parameters {human_bytes(held)} of {human_bytes(whole)}"
    else:
        most, state = max(weights_by_rank(plan.program, costs), key=lambda pair: pair[1])
        said = f"Of the weights, {human_bytes(whole)}, a rank has {human_bytes(most)} at most"
    said += f", with gradients and AdamW's moments {human_bytes(state)}"
    if pipeline is not None or "kept_bytes" in plan.program.stats:
        said += f"; with what is kept for backward, {human_bytes(kept_by_rank(report))}, as the search counts them"
    yield f"{said}."


def _of_stages(plan: Plan, pipeline: Pipeline, report: CostReport, times: str) -> Iterator[str]:
    """The schedule, and where the stages are cut."""
    timeline = plan.timeline()
    assert isinstance(timeline, PipelineTimeline)
    yield f"{pipeline.described[0].upper()}{pipeline.described[1:]}."
    yield f"Predicted step {human_seconds(report.step_s)}, of which a rank stands idle {timeline.bubble:.0%} on average."
    yield f"The stages together take {human_seconds(report.total_s)}: {times}; nothing in them is counted as overlapped."
    passed = plan.stats["wire_bytes_per_step"].get("send", 0)
    yield f"Stages pass on values and send back gradients: {human_bytes(passed)} by the rank that sends most."
    shares = stage_shares(plan.program, CostModel(plan.mesh, plan.hardware))
    for share in shares[:_MOST_MODULES]:
        yield f"  {share.name}: {share.modules}; {share.times} a microbatch"
    if len(shares) > _MOST_MODULES:
        yield f"  and {len(shares) - _MOST_MODULES} more: plan.table()"


def _modules(plan: Plan, report: CostReport) -> tuple[ModuleShare, ...]:
    """Rows by module path, cut where there would be too many, dearest first."""
    program, costs, pipeline = plan.program, CostModel(plan.mesh, plan.hardware), plan.program.pipeline
    rows = [row for row in report.rows if row.is_per_step]
    prefixes = _prefixes(rows)
    shares: dict[str, list[float]] = {}
    members: dict[str, set[str]] = {}
    busy = {row.node for row in rows if row.total_s}

    def add(path: str, place: int, amount: float) -> None:
        parts = _parts(path)
        depth = next((d for d in range(len(parts), 0, -1) if parts[:d] in prefixes), 1)
        name = ".".join(parts[:depth]).replace("/*", ".*") or "(model)"
        shares.setdefault(name, [0.0] * 4)[place] += amount
        members.setdefault(name, set()).add(".".join(path.split(".")[: name.count(".") + 1]))

    for row in rows:
        add(row.module, 0, row.total_s)
        add(row.module, 1, row.wire_bytes)
    for name, node in program.parameters().items():
        value, layout = facts(node).value, facts(node).layout
        held = costs.local_bytes(value, layout)
        add(name.rpartition(".")[0], 2, held * (2 if value.needs_grad else 1) + costs.state_bytes(value, layout))
    for node in program.nodes("op"):
        if node.name in busy:
            for value, layout in zip(facts(node).values, facts(node).layouts, strict=True):
                times = 1 if pipeline is None or facts(node).stage is None else in_flight(pipeline, facts(node).stage or 0)
                add(facts(node).source.module, 3, times * costs.local_bytes(value, layout) if value.needs_grad else 0.0)
    found = [ModuleShare(name, len(members[name]), *amounts) for name, amounts in shares.items()]
    return tuple(sorted(found, key=lambda row: -row.step_s))


def _parts(path: str) -> tuple[str, ...]:
    """A folded module path in parts; the numbers of repeated layers belong to what they number."""
    return tuple(fold_name(path).replace(".*", "/*").split(".")) if path else ()


def _prefixes(rows: Sequence[CostRow]) -> set[tuple[str, ...]]:
    """Module paths that get a row of their own: from the outermost, the dearest is opened while its parts fit the screen."""
    seconds: dict[tuple[str, ...], float] = {}
    for row in rows:
        parts = _parts(row.module)
        for depth in range(len(parts) + 1):
            seconds[parts[:depth]] = seconds.get(parts[:depth], 0.0) + row.total_s
    shown: set[tuple[str, ...]] = {()}
    closed: list[tuple[str, ...]] = [()]
    while closed:
        closed.sort(key=lambda parts: seconds[parts])
        opened = closed.pop()
        inside = [parts for parts in seconds if len(parts) == len(opened) + 1 and parts[:-1] == opened]
        if not opened or len(shown) + len(inside) <= _MOST_MODULES:
            shown.update(inside)
            closed += inside
    return shown


def _communications(program: Program, report: CostReport) -> tuple[tuple[Communication, ...], float]:
    """The dearest collectives, those of repeated layers together, and the seconds of the others."""
    nodes = nodes_of_rows(program)
    groups: dict[str, list[CostRow]] = {}
    for row in report.rows:
        if row.is_per_step and row.axis and row.kind != "send":  # what stages send each other is named with the stages
            groups.setdefault(fold_name(row.node), []).append(row)
    found = []
    for rows in groups.values():
        labels = dict.fromkeys(row.label for row in rows)
        count = max(sum(row.times for row in rows if row.label == label) for label in labels)
        seconds, sent = sum(row.total_s for row in rows), sum(row.wire_bytes for row in rows)
        found.append(Communication(" and ".join(labels), count, seconds, sent, why_sent(program, nodes[rows[0].node], rows[0])))
    found.sort(key=lambda row: -row.seconds)
    return tuple(found[:_MOST_SENT]), sum(row.seconds for row in found[_MOST_SENT:])


def reason_of(conversion: str, is_parameter: bool) -> str:
    """Why such a conversion stands behind a parameter, or behind another value."""
    return _REASONS.get((is_parameter, conversion), _REASONS.get((False, conversion), conversion))


def nodes_of_rows(program: Program) -> dict[str, fx.Node]:
    """What the rows of a CostReport call a node -> the node: parameters by their names in the model."""
    return {facts(n).name if facts(n).role == "parameter" else n.name: n for n in program.graph.nodes}


def why_sent(program: Program, node: fx.Node, row: CostRow) -> str:
    """Which layouts meet at a collective."""
    if facts(node).role != "conversion":
        split = [f"{s.factor}@{axis}" for axis, s in zip(program.mesh.axes, facts(node).strategies, strict=True) if s.factor]
        return f"inside {fold_name(node.name)} ({op_name(node)}), whose work is split ({', '.join(split)})"
    source, before = source_of_value(node), node.args[0]
    is_parameter = facts(source).role == "parameter"
    reason = reason_of(row.op, is_parameter)
    readers = list(dict.fromkeys(fold_name(reader.name) for reader in readers_of(node)))
    more = f" and {len(readers) - 1} more" if len(readers) > 1 else ""
    axis = program.mesh.index(row.axis)
    made, read = (facts(x).layout[axis] for x in (before, node))  # type: ignore[arg-type]
    named = facts(source).name if is_parameter else source.name
    return f"{fold_name(named)} is {made}@{row.axis}, {readers[0] if readers else 'the result'}{more} reads {read}@{row.axis}; {reason}"
