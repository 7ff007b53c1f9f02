"""What changed between two plans: layouts by name, collectives, predicted time and memory.

Plans may be of different meshes or of a model before and after an edit: names that only one of them has are shown as such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from torch import fx

from autoshard.cost_report import CostReport, readers_of
from autoshard.mesh import MeshSpec
from autoshard.pipeline import Pipeline
from autoshard.placements import shown_layout
from autoshard.program import Program, facts, producer
from autoshard.stage_shares import kept_by_rank
from autoshard.text import fold_name, human_bytes, human_seconds

if TYPE_CHECKING:
    from autoshard.plan import Plan


@dataclass(frozen=True)
class LayoutChange:
    """One parameter, or one value that a module returns. before, after: layouts as text, None where the plan has no such name."""

    kind: str
    name: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        return f"{self.name}: {self.before or '(not there)'} -> {self.after or '(not there)'}"


@dataclass(frozen=True)
class CollectiveChange:
    """Collectives of one kind on one axis: how many a step makes, and the bytes that a rank sends in them."""

    label: str
    count_before: int
    count_after: int
    bytes_before: float
    bytes_after: float


@dataclass(frozen=True)
class PlanDiff:
    """The difference as data; prints as tables. before_s, after_s: predicted step. before_bytes, after_bytes: what a rank keeps."""

    title: str
    layouts: tuple[LayoutChange, ...]
    collectives: tuple[CollectiveChange, ...]
    before_s: float
    after_s: float
    before_bytes: float
    after_bytes: float
    mesh_before: MeshSpec
    mesh_after: MeshSpec
    unchanged: int = field(default=0)  # parameters that lie alike in both
    stages: tuple[str, ...] = ()  # what is otherwise about pipeline stages, in words

    @property
    def is_empty(self) -> bool:
        """Whether both plans lay every value alike, on the same mesh, in the same pipeline stages."""
        return not self.layouts and self.mesh_before == self.mesh_after and not self.stages

    @property
    def parameters(self) -> tuple[LayoutChange, ...]:
        """Changes of parameters alone."""
        return tuple(change for change in self.layouts if change.kind == "parameter")

    def words(self) -> str:
        """Time, memory and mesh in one or two lines."""
        lines = [] if self.mesh_before == self.mesh_after else [f"mesh {self.mesh_before} -> {self.mesh_after}"]
        lines += self.stages
        if not self.layouts:
            lines.append("every layout is the same")
        lines.append(f"predicted step {_change(self.before_s, self.after_s, human_seconds)}")
        lines.append(f"kept per rank {_change(self.before_bytes, self.after_bytes, human_bytes)}")
        return "; ".join(lines)

    def __rich__(self) -> Group:
        shown: list[Table | str] = [self.title, self.words()]
        if self.layouts:
            shown.append(layout_table(self.layouts))
        moved = [row for row in self.collectives if (row.count_before, row.bytes_before) != (row.count_after, row.bytes_after)]
        if moved:
            table = _table("sent per step", "before", "after")
            for row in moved:
                sides = ((row.count_before, row.bytes_before), (row.count_after, row.bytes_after))
                table.add_row(row.label, *(f"{count} x, {human_bytes(sent)}" if count else "none" for count, sent in sides))
            shown.append(table)
        return Group(*shown)


def diff(before: Plan, after: Plan) -> PlanDiff:
    """What `after` does otherwise than `before`."""
    same = f"{before.model_name} under {before.template!r} -> {after.model_name} under {after.template!r}"
    return diff_programs(before.program, before.cost, after.program, after.cost, same)


def diff_programs(old: Program, old_cost: CostReport, new: Program, new_cost: CostReport, title: str) -> PlanDiff:
    """As diff, of two programs and their prices."""
    layouts: list[LayoutChange] = []
    unchanged = 0
    for kind, named in (("parameter", parameter_texts), ("value", value_texts)):
        left, right = named(old), named(new)
        for name in dict.fromkeys([*left, *right]):
            if left.get(name) != right.get(name):
                layouts.append(LayoutChange(kind, name, left.get(name), right.get(name)))
            elif kind == "parameter":
                unchanged += 1
    return PlanDiff(
        title,
        tuple(layouts),
        tuple(_collectives(old_cost, new_cost)),
        old_cost.step_s,
        new_cost.step_s,
        kept_by_rank(old_cost),
        kept_by_rank(new_cost),
        old.whole_mesh,
        new.whole_mesh,
        unchanged,
        tuple(_stage_changes(old.pipeline, new.pipeline)),
    )


def _stage_changes(old: Pipeline | None, new: Pipeline | None) -> Iterator[str]:
    """What is otherwise about the pipelines of two plans."""
    first, second = ("no stages" if pipeline is None else pipeline.described for pipeline in (old, new))
    if first != second:
        yield f"{first} -> {second}"
    elif old is not None and new is not None and (old.schedule, old.stage_ranks) != (new.schedule, new.stage_ranks):
        yield "actions of the schedule in another order"
    elif old is not None and new is not None and old.costs != new.costs:
        yield "stages are cut elsewhere"


def parameter_texts(program: Program) -> dict[str, str]:
    """Parameter -> its layout as text."""
    return {name: shown_layout(facts(node).layout, program.mesh) for name, node in program.parameters().items()}


def value_texts(program: Program) -> dict[str, str]:
    """`output:module` -> how what the module returns lies; several values are listed in order."""
    return {
        f"output:{path}": "; ".join(shown_layout(resting_layout(node), program.mesh) for node in nodes)
        for path, nodes in returned_by(program).items()
    }


def resting_layout(node: fx.Node) -> tuple:
    """The layout that readers find a value in: its hub where the search chose one, else as it is made."""
    known = facts(node)
    return known.hub if known.hub is not None else known.layout


def returned_by(program: Program) -> dict[str, list[fx.Node]]:
    """Module path -> values made inside it and read outside it; conversions and masks are looked through."""
    inside = {node: facts(producer(node)[0]).source.module for node in program.nodes("op", "projection") if not facts(node).is_constant}
    found: dict[str, list[fx.Node]] = {}
    for node, path in inside.items():
        if len(facts(node).values) > 1:
            continue
        readers = {inside.get(user, "") for user in readers_of(node)}
        while path and any(reader != path and not reader.startswith(path + ".") for reader in readers):
            found.setdefault(path, []).append(node)
            path = path.rpartition(".")[0]
    return found


def _collectives(old: CostReport, new: CostReport) -> Iterator[CollectiveChange]:
    counts, sent = [Counter[str](), Counter[str]()], [Counter[str](), Counter[str]()]
    for side, report in enumerate((old, new)):
        for row in report.rows:
            if row.is_per_step and row.wire_bytes:
                counts[side][row.label] += row.times
                sent[side][row.label] += row.wire_bytes  # type: ignore[assignment]
    for label in sorted({*counts[0], *counts[1]}):
        yield CollectiveChange(label, counts[0][label], counts[1][label], float(sent[0][label]), float(sent[1][label]))


def _change(before: float, after: float, said: Callable[[float], str]) -> str:
    if abs(after - before) <= 1e-9 * max(abs(before), abs(after)):
        return f"{said(before)}, the same"
    share = f" ({(after / before - 1) * 100:+.2g} %)" if before else ""
    return f"{said(before)} -> {said(after)}{share}"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def layout_table(changes: Sequence[LayoutChange]) -> Table:
    """Changes with those of repeated layers in one row."""
    table = _table("layout of", "before", "after")
    for change, count in folded(changes):
        name = f"{change.name} x{count}" if count > 1 else change.name
        table.add_row(name, change.before or "(not there)", change.after or "(not there)")
    return table


def folded(changes: Iterable[LayoutChange]) -> list[tuple[LayoutChange, int]]:
    """Changes with those of repeated layers made one, whose name has `*` for their numbers -> how many it stands for."""
    groups: dict[tuple, list[LayoutChange]] = {}
    for change in changes:
        groups.setdefault((change.kind, fold_name(change.name), change.before, change.after), []).append(change)
    return [(replace(same[0], name=key[1]) if len(same) > 1 else same[0], len(same)) for key, same in groups.items()]


def in_words(changes: Iterable[LayoutChange], most: int) -> list[str]:
    """The first `most` changes, folded, one text each, and how many more there are."""
    texts = [f"{change} x{count}" if count > 1 else str(change) for change, count in folded(changes)]
    return [*texts[:most], *([f"and {len(texts) - most} more"] if len(texts) > most else [])]
