"""What else could be: templates on the same program, and another plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from autoshard.cost_report import price
from autoshard.errors import BudgetError, ConstraintError
from autoshard.plan_diff import folded
from autoshard.program import Program
from autoshard.report.markup import Cell, Markup, code, count, joined, nbytes, paragraph, seconds, table
from autoshard.report.subject import Subject
from autoshard.text import human_seconds
from autoshard.timeline import timeline_of

if TYPE_CHECKING:
    from autoshard.constraints import Template


def alternatives(subject: Subject) -> Markup:
    """Other templates for the same model and mesh, each solved for the least step time under it."""
    plan = subject.plan
    if not subject.alternatives:
        return paragraph(
            "Not computed: plan.report(path, alternatives=True) solves for every template and prices it, a search each.", "note"
        )
    if plan.resolver is None:
        return paragraph("This plan was read from a file, which does not hold what it takes to solve for templates.", "note")
    if plan.program.pipeline is not None:
        return paragraph("Templates are not priced beside pipeline stages; autoshard.search compares meshes and stages.", "note")
    before = subject.timeline.total_s
    rows = [_row(subject, f"this plan ({plan.template})", plan.program, before)]
    failed = []
    for name in subject.alternatives:
        try:
            rows.append(_row(subject, name, plan.resolver.solve(template=cast("Template", name)), before))
        except (ConstraintError, BudgetError) as error:
            failed.append(paragraph(f"{name}: {error}", "note"))
    columns = ("plan", "#predicted step", "against this plan", "#work end to end", "#sent by a rank", "#state and kept results")
    return joined([table("Templates on the same model and mesh", columns, rows), *failed])


def _row(subject: Subject, name: str, program: Program, before_s: float) -> list[Cell]:
    report = price(subject.plan, program)
    step_s = timeline_of(program, subject.costs).total_s
    sent = sum(row.wire_bytes for row in report.rows if row.is_per_step)
    more = step_s / before_s - 1 if before_s else 0.0
    against = "the same" if abs(more) < 1e-9 else f"{more:+.1%}"
    return [name, seconds(step_s), against, seconds(report.total_s), nbytes(sent), nbytes(program.stats.get("kept_bytes", 0.0))]


def comparison(subject: Subject) -> Markup | None:
    """What the other plan does otherwise; None without one."""
    if subject.other is None:
        return None
    found = subject.plan.diff(subject.other)
    steps = f"On their timelines: {human_seconds(subject.timeline.total_s)} -> {human_seconds(subject.other.timeline().total_s)}."
    rows: list[list[Cell]] = []
    for change, times in folded(found.layouts):
        rows.append(
            [code(change.name), count(times), change.kind, *(code(text or "(not there)") for text in (change.before, change.after))]
        )
    layouts = table("Layouts that change", ("name", "#count", "of a", "this plan", "the other"), rows)
    sent: list[list[Cell]] = [
        [
            row.label.replace("_", "-").replace("@", " @"),
            count(row.count_before),
            count(row.count_after),
            nbytes(row.bytes_before),
            nbytes(row.bytes_after),
        ]
        for row in found.collectives
    ]
    columns = ("collective", "#count, this plan", "#count, the other", "#sent, this plan", "#sent, the other")
    return joined(
        [*map(paragraph, (f"{found.title}.", f"{found.words()}.", steps)), layouts if rows else "", table("Sent per step", columns, sent)]
    )
