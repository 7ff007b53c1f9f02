"""Coverage: before any search, which traced ops can be split on a mesh, and what those that cannot will cost.

split     the row of the op has a strategy that shares the work on some axis of the mesh
whole     every rank computes the op whole: its row allows no split of this call, or no size divides
unknown   no row, or none that fits this call: computed whole on every rank; autoshard.register_rule adds one
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from torch import fx, nn

from autoshard.candidates import CandidateTable, bound_rule
from autoshard.costs import CostModel
from autoshard.hardware import Hardware, hardware_of
from autoshard.mesh import MeshSpec
from autoshard.placements import R
from autoshard.program import Program, Source, call_of, facts, op_name
from autoshard.rules import rule_of
from autoshard.runner import run_passes

Kind = Literal["split", "whole", "unknown"]


@dataclass(frozen=True)
class Fallback:
    """Uses of one op at one line that every rank computes whole.

    reason: why. seconds: of all uses, forward and backward, on every rank. extra_s, extra_bytes: what that is more than an
    even share of the work and of the results. source: where in the user's code.
    """

    op: str
    kind: Kind
    reason: str
    uses: int
    seconds: float
    extra_s: float
    extra_bytes: float
    source: Source


@dataclass(frozen=True)
class Coverage:
    """What can be split. counts: traced ops by kind, constants left out; seconds: of one device, by kind."""

    model_name: str
    mesh: MeshSpec
    counts: Mapping[Kind, int]
    seconds: Mapping[Kind, float]
    fallbacks: tuple[Fallback, ...]

    @property
    def split_share(self) -> float:
        """Share of one device's predicted time that is in ops that can be split."""
        total = sum(self.seconds.values())
        return self.seconds["split"] / total if total else 1.0

    def __str__(self) -> str:
        counts = self.counts
        lines = [
            f"{self.model_name} on mesh {self.mesh}: {sum(counts.values())} ops; {counts['split']} can be split "
            f"({self.split_share:.1%} of the predicted time), {counts['whole']} only whole, {counts['unknown']} unknown"
        ]
        if not self.fallbacks:
            return lines[0]
        table = Table("op", "uses", "why", "time a step", "more than its share", "memory more", "first at", box=None, pad_edge=False)
        for row in self.fallbacks:
            times = (f"{seconds * 1e6:,.1f} us" for seconds in (row.seconds, row.extra_s))
            table.add_row(row.op, str(row.uses), row.reason, *times, f"{row.extra_bytes / 2**20:,.2f} MiB", str(row.source))
        console = Console(
            file=io.StringIO(), width=max(len(str(row.source)) + len(row.reason) + 150 for row in self.fallbacks), color_system=None
        )
        console.print(table)
        return "\n".join([*lines, console.file.getvalue().rstrip()])  # type: ignore[attr-defined]


def coverage(
    model: nn.Module,
    mesh: MeshSpec | Mapping[str, int] | str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    hardware: str | Hardware | None = None,
) -> Coverage:
    """Trace `model(*args, **kwargs)` and say which ops can be split on `mesh`; nothing is searched or run.

    Arguments as in autoshard.plan. Times are predictions for `hardware`. Raises TraceError.
    """
    from autoshard.passes import FoldConstants, NormalizeGraph, TraceModel

    spec = MeshSpec.of(mesh)
    trace = (TraceModel(model, tuple(args), dict(kwargs or {})), NormalizeGraph(), FoldConstants())
    program = run_passes(trace, Program(fx.Graph(), spec))
    return coverage_of(program, hardware_of(hardware, "cpu"), type(model).__name__)


def coverage_of(program: Program, hardware: Hardware, model_name: str) -> Coverage:
    """Coverage of a traced, normalized program."""
    costs = CostModel(program.mesh, hardware)
    table = CandidateTable(program, costs)
    counts: dict[Kind, int] = {"split": 0, "whole": 0, "unknown": 0}
    seconds: dict[Kind, float] = {"split": 0.0, "whole": 0.0, "unknown": 0.0}
    found: dict[tuple[str, str, Source], list[tuple[Kind, float, float]]] = {}
    for node in program.nodes("op"):
        if facts(node).is_constant:
            continue
        kind, reason = _kind(table, node)
        cost = _seconds(costs, node) if _is_worth_splitting(node) else 0.0
        counts[kind] += 1
        seconds[kind] += cost
        if kind != "split" and (cost or kind == "unknown"):  # views that stay whole cost nothing by themselves
            size = float(sum(value.nbytes for value in facts(node).values))
            found.setdefault((op_name(node), reason, facts(node).source), []).append((kind, cost, size))
    extra = 1 - 1 / math.prod(program.mesh.shape)
    rows = [
        Fallback(
            op, uses[0][0], reason, len(uses), (total := sum(u[1] for u in uses)), total * extra, sum(u[2] for u in uses) * extra, source
        )
        for (op, reason, source), uses in found.items()
    ]
    return Coverage(model_name, program.mesh, counts, seconds, tuple(sorted(rows, key=lambda row: -row.extra_s)))


def _kind(table: CandidateTable, node: fx.Node) -> tuple[Kind, str]:
    rule, equation = bound_rule(node)
    if rule is None and rule_of(op_name(node)) is None:
        return "unknown", "no row"
    if equation is None:
        return "unknown", "its row does not fit this call"
    if any(strategy.factor for candidate in table.of_op(node) for strategy in candidate.strategies):
        return "split", ""
    free = [f"{name} of {equation.sizes[name]}" for name in equation.factors if name not in equation.whole and equation.sizes[name] > 1]
    return "whole", f"no size divides ({', '.join(free)})" if free else "its row allows no split of this call"


def _is_worth_splitting(node: fx.Node) -> bool:
    """Whether the op works on more than single numbers, step counters for example."""
    call = call_of(node)
    return any(math.prod(value.shape) > 1 for value in (*call.inputs, *call.outputs))


def _seconds(costs: CostModel, node: fx.Node) -> float:
    """Forward and backward on one device."""
    call, (rule, equation) = call_of(node), bound_rule(node)
    values = (*call.inputs, *call.outputs)
    whole = [(R,) * costs.mesh.ndim] * len(values)
    return costs.op_s(call.op, rule, equation, values, whole, 1.0, call)
