"""What every node of a plan costs: seconds, flops and bytes, as rows that sum to the predicted step time.

A row is one kind of work of one node: an op's own kernels, one collective of a conversion or inside a lowering (forward and
backward apart, as they are different collectives), or the optimizer step of a parameter. The prices are those of
autoshard.costs and nothing else; rows are of the program that runs, where a conversion that several ops read is made once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import fx

from autoshard.candidates import bound_rule, layouts_of
from autoshard.conversions import COMMUNICATES, WIRE
from autoshard.costs import CostModel, optimizer_cost, split_of
from autoshard.equations import Equation
from autoshard.errors import InputError, PlanError
from autoshard.mesh import PIPELINE_AXIS
from autoshard.ops.row import Call, Rule, TensorInfo
from autoshard.passes.overlap_collectives import joined
from autoshard.pipeline_timeline import simulate
from autoshard.placements import Layout, padded_axes
from autoshard.program import Program, call_of, facts, op_name, row_of, tensor_operands
from autoshard.text import fold_name, human_bytes, human_seconds
from autoshard.traffic import is_sent_again, messages_of, meter, sent_by

if TYPE_CHECKING:
    import sympy

    from autoshard.crossovers import Crossover
    from autoshard.plan import Plan

By = Literal["kind", "module", "node"]


@dataclass(frozen=True)
class CostRow:
    """One kind of work of one node, on one rank, in one step.

    kind: "compute", "memory" or "latency" (what bounds an op), "copy" (a conversion that only moves memory), "optimizer", or
    the name of a collective, then with its mesh `axis`. flops, bytes_moved (read and written in device memory), wire_bytes
    (sent): forward and backward together. times: how often it runs. is_per_step: False for what is computed once, at loading.
    """

    node: str
    op: str
    module: str
    kind: str
    axis: str = ""
    forward_s: float = 0.0
    backward_s: float = 0.0
    optimizer_s: float = 0.0
    flops: float = 0.0
    bytes_moved: float = 0.0
    wire_bytes: float = 0.0
    times: int = 1
    is_per_step: bool = True

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s + self.optimizer_s

    @property
    def label(self) -> str:
        """`all_gather@tp`, `compute`."""
        return f"{self.kind}@{self.axis}" if self.axis else self.kind


Work = tuple[Rule | None, Equation | None, Sequence[TensorInfo], list[Layout], float]

# ------------------------------------------------------------------------------------------------------------ the rows


@dataclass
class Pricer:
    """Prices nodes; ops with equal calls and strategies are priced once."""

    program: Program
    costs: CostModel

    def __post_init__(self) -> None:
        self._known: dict[Hashable, list[CostRow]] = {}

    def rows(self) -> list[CostRow]:
        """Rows of all nodes, in the order of the program."""
        return [row for node in self.program.graph.nodes for row in self.of(node)]

    def of(self, node: fx.Node) -> list[CostRow]:
        """Rows of one node; none for what costs nothing by itself (inputs, projections, outputs)."""
        known = facts(node)
        priced = {"op": self._op, "conversion": self._conversion, "parameter": self._parameter, "mask": self._mask}.get(known.role)
        if priced is None:
            return []
        name, source = known.name if known.role == "parameter" else node.name, source_of_value(node)
        module = facts(source).name.rpartition(".")[0] if facts(source).role == "parameter" else known.source.module
        return [replace(row, node=name, module=module, is_per_step=not known.is_constant) for row in priced(node)]

    def _parameter(self, node: fx.Node) -> list[CostRow]:
        value, layout = facts(node).value, facts(node).layout
        moved = optimizer_cost("adamw").passes * self.costs.local_bytes(value, layout) if value.needs_grad else 0.0
        rows = [CostRow("", "optimizer", "", "optimizer", optimizer_s=self.costs.parameter_s(value, layout), bytes_moved=moved)]
        return [*rows, *self._mask(node)] if padded_axes(value.shape, layout, self.program.mesh.shape) else rows

    def _mask(self, node: fx.Node) -> list[CostRow]:
        """Reading and writing a value once each way: what padding takes."""
        value, layout = facts(node).value, facts(node).layout
        forward_s = self.costs.copy_s(replace(value, needs_grad=False), layout)
        backward_s = self.costs.copy_s(value, layout) - forward_s
        again = self._is_again(node)
        moved = 2 * self.costs.local_bytes(value, layout) * (1 + value.needs_grad + again)
        return [CostRow("", "padding", "", "memory", "", forward_s, backward_s + again * forward_s, bytes_moved=moved)]

    def _is_again(self, node: fx.Node) -> int:
        """How often what a node does in forward is done once more in backward: 0 or 1."""
        return int(self.program.is_training and is_sent_again(node))

    def _conversion(self, node: fx.Node) -> list[CostRow]:
        row, sent = row_of(node), sent_by(self.program, node, self.costs)
        ways = [(one, k == 0) for k, one in enumerate(sent)]
        if self._is_again(node):
            ways.append((sent[0], False))
        rows = [self._sent(row.name, axis, name, whole, is_forward) for (axis, name, whole), is_forward in ways]
        return [found for found in rows if found.kind != "identity"]

    def _sent(self, op: str, axis: str, collective: str, whole: float, is_forward: bool, times: int = 1) -> CostRow:
        number = self.program.mesh.index(axis)
        seconds = times * self.costs.collective_s(collective, number, whole)
        parts = (seconds, 0.0) if is_forward else (0.0, seconds)
        if collective not in COMMUNICATES:
            kind = "identity" if collective == "identity" else "copy"
            return CostRow("", op, "", kind, "", *parts, bytes_moved=times * whole, times=times)
        wire = times * WIRE[collective](self.program.mesh.shape[number]) * whole
        return CostRow("", op, "", collective, axis, *parts, wire_bytes=wire, times=times)

    def _op(self, node: fx.Node) -> list[CostRow]:
        call = call_of(node)
        lowered: dict[str, Any] = {key: value for key, value in node.kwargs.items() if key.endswith("_axes")}
        arguments = str(sorted(call.arguments.items(), key=lambda item: item[0]))
        shapes = str([info.shape for info in (*call.inputs, *call.outputs)])  # a size that may change reads as its expression
        key = (call.op, call.inputs, call.outputs, arguments, shapes, facts(node).strategies, str(lowered), self._is_again(node))
        if key not in self._known:
            self._known[key] = [self._kernels(node, call), *self._inside(node, call, lowered)]
        return self._known[key]

    def _kernels(self, node: fx.Node, call: Call) -> CostRow:
        """An op's own kernels. Backward, a contraction runs once more per operand with a gradient; a bias's is a pass over memory."""
        device, (rule, equation, values, layouts, split) = self.costs.hardware.device, self._work(node, call)
        plain = None if any(key.endswith("_axes") for key in node.kwargs) else call  # times are measured of ops, not of their lowerings
        forward_s, backward_s = self.costs.op_times(call.op, rule, equation, values, layouts, split, plain)
        if not forward_s:
            return CostRow("", op_name(node), "", "view")
        flops, held = flops_of(rule, equation, call) / split, list(map(self.costs.local_bytes, values, layouts))
        again = self._is_again(node)
        moved, passes, sums = sum(held), 1.0 + again, 0.0
        if rule is not None and rule.backward is not None:
            passes += rule.backward if backward_s else 0.0
        elif flops and equation is not None:
            for operand, value, size in zip(equation.inputs, values, held, strict=False):
                passes += value.needs_grad and not operand.is_additive
                sums += size + sum(held[len(call.inputs) :]) if value.needs_grad and operand.is_additive else 0.0
        elif backward_s:
            passes += 1.0
        bounds = {
            "compute": flops / device.reached_flops_per_s(values[0].dtype) if values else 0.0,
            "memory": moved / device.memory_bytes_per_s,
            "latency": device.kernel_latency_s,
        }
        kind = max(bounds, key=lambda name: bounds[name])
        backward_s += again * forward_s
        return CostRow("", op_name(node), "", kind, "", forward_s, backward_s, 0.0, flops * passes, moved * passes + sums)

    def _work(self, node: fx.Node, call: Call) -> Work:
        """What the cost model prices an op by."""
        (rule, equation), values, strategies = bound_rule(node), (*call.inputs, *call.outputs), facts(node).strategies
        split = split_of(equation, [strategy.factor for strategy in strategies], self.program.mesh.shape)
        return rule, equation, values, layouts_of(strategies, values, len(call.inputs)), split

    def _inside(self, node: fx.Node, call: Call, axes: Mapping[str, Sequence[str]]) -> Iterable[CostRow]:
        """What a lowered op sends. What it sends where no gradient flows, it sends forward; the rest backward."""
        if not axes:
            return
        layouts = [facts(operand).layout for operand in tensor_operands(node)]
        function, mesh = node.target.__name__, self.program.mesh  # type: ignore[union-attr]
        both = Counter(meter(function, call, layouts, axes, mesh))
        forward = Counter(meter(function, _without_gradients(call), layouts, axes, mesh)) & both
        again = forward if self._is_again(node) else Counter()
        for sent, is_forward in ((forward, True), (both - forward + again, False)):
            for (axis, collective, whole), times in sent.items():
                if collective != "identity":
                    yield self._sent(op_name(node), axis, collective, whole, is_forward, times)


def flops_of(rule: Rule | None, equation: Equation | None, call: Call) -> float:
    """Floating point operations of one forward pass over the global values; 0 for ops that memory bounds."""
    if rule is None or equation is None or rule.bound != "matmul":
        return 0.0
    return 2.0 * rule.products(equation.sizes, (*call.inputs, *call.outputs))


def _without_gradients(call: Call) -> Call:
    inputs, outputs = (tuple(replace(info, needs_grad=False) for info in infos) for infos in (call.inputs, call.outputs))
    return Call(call.op, call.arguments, inputs, outputs)


# ---------------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class CostGroup:
    """Rows with something in common, summed; `nodes` is how many nodes they belong to."""

    name: str
    nodes: int
    forward_s: float
    backward_s: float
    optimizer_s: float
    flops: float
    bytes_moved: float
    wire_bytes: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s + self.optimizer_s


_SUMMED = ("forward_s", "backward_s", "optimizer_s", "flops", "bytes_moved", "wire_bytes")


@dataclass(frozen=True)
class CostReport:
    """Predicted costs of one plan, per rank and step.

    With pipeline stages, rows are of all stages, each on one of its ranks, for all microbatches of a step: total_s is what the ranks
    along `pp` work together, and step_s what a step takes.

    rows: one per kind of work of each node, in the order of the program. Those computed once (is_per_step False) are shown
    and not summed. objective_s: what the search minimised. It may charge a conversion of a pinned value to every reader though
    the program makes it once (`shared_s`), so that total_s = objective_s - shared_s.
    """

    plan: Plan
    program: Program
    rows: tuple[CostRow, ...]
    objective_s: float

    @property
    def shared_s(self) -> float:
        """Seconds of conversions that the search charged more than once; NaN with pipeline stages, where it prices one microbatch."""
        return self.objective_s - self.total_s if self.program.pipeline is None else math.nan

    @property
    def total_s(self) -> float:
        """Seconds of all rows: forward, backward and optimizer, nothing overlapped."""
        return sum(row.total_s for row in self.rows if row.is_per_step)

    @property
    def step_s(self) -> float:
        """Predicted seconds of one step: total_s, or with pipeline stages what their schedule takes."""
        pipeline = self.program.pipeline
        return (
            self.total_s
            if pipeline is None
            else simulate(pipeline.schedule, pipeline.costs, pipeline.stage_ranks, pipeline.latency_s).total_s
        )

    def symbolic(self, fixed: Collection[str] = ()) -> sympy.Expr:
        """total_s as an expression; see autoshard.symbolic_cost.step_time.

        Its symbols are the mesh axes and the sizes that were called dynamic in autoshard.plan, but for those in `fixed`, which stay
        numbers. Raises InputError for other names, and where a size cannot be a symbol, PlanError for a plan with pipeline stages.
        """
        if self.program.pipeline is not None:
            raise PlanError("the step of pipeline stages follows from their schedule and is no expression; plan without axis 'pp' for one")
        from autoshard.symbolic_cost import step_time

        return step_time(self.program, self.plan.hardware, fixed)

    def crossovers(self, size: str, values: Sequence[int]) -> list[Crossover]:
        """Values of a dynamic size at which another plan becomes the best; see autoshard.crossovers.crossovers."""
        from autoshard.crossovers import crossovers

        return crossovers(self.plan, size, values)

    def by(self, what: By = "kind") -> list[CostGroup]:
        """Sums by "kind" (collectives by axis), "module" or "node" (numbers of repeated layers folded), dearest first."""
        names: dict[str, Callable[[CostRow], str]] = {
            "kind": lambda row: row.label,
            "module": lambda row: fold_name(row.module) or "(model)",
            "node": lambda row: f"{fold_name(row.node)} ({row.op})",
        }
        if what not in names:
            raise InputError(f"costs are summed by {', '.join(map(repr, names))}, not by {what!r}")
        groups: dict[str, list[CostRow]] = {}
        for row in self.rows:
            if row.is_per_step:
                groups.setdefault(names[what](row), []).append(row)
        found = [
            CostGroup(name, len({row.node for row in rows}), *(sum(getattr(row, part) for row in rows) for part in _SUMMED))
            for name, rows in groups.items()
        ]
        return sorted(found, key=lambda group: -group.total_s)

    def table(self, by: By = "kind", most: int = 30) -> Table:
        """A rich table of the `most` dearest groups."""
        groups = self.by(by)
        where = f"{self.plan.model_name} on {self.program.whole_mesh} ({self.plan.hardware.name})"
        title = f"{where}, predicted step {human_seconds(self.step_s)}"
        title += f"; all stages together {human_seconds(self.total_s)}" if self.program.pipeline is not None else ""
        hidden = groups[most:]
        caption = [f"{len(hidden)} more, {human_seconds(sum(group.total_s for group in hidden))} together"] if hidden else []
        table = Table(title=title, caption="\n".join([*caption, self.account]), caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.padding = (0, 1, 0, 0)
        table.add_column(by, overflow="fold", min_width=20)
        for name in ("forward", "backward", "optimizer", "share", "GFLOP", "moved", "sent"):
            table.add_column(name, justify="right", no_wrap=True)
        for group in groups[:most]:
            seconds = [human_seconds(part) if part else "" for part in (group.forward_s, group.backward_s, group.optimizer_s)]
            share = f"{group.total_s / self.total_s:.1%}" if self.total_s else ""
            sizes = [human_bytes(part) if part else "" for part in (group.bytes_moved, group.wire_bytes)]
            name = f"{group.name} x{group.nodes}" if group.nodes > 1 else group.name
            table.add_row(name, *seconds, share, f"{group.flops / 1e9:.3g}" if group.flops else "", *sizes)
        return table

    @property
    def account(self) -> str:
        """How the total and what the search minimised differ, in words; "" where they do not."""
        if self.program.pipeline is not None:
            return f"the search of layouts minimised {human_seconds(self.objective_s)}: all stages, for one microbatch"
        if abs(self.shared_s) <= 1e-9 * self.total_s:
            return ""
        return f"the search minimised {human_seconds(self.objective_s)}: it charges a shared conversion to each of its readers"

    def __rich__(self) -> Table:
        return self.table()

    def __repr__(self) -> str:
        return f"CostReport({len(self.rows)} rows, {human_seconds(self.total_s)})"


def price(plan: Plan, program: Program | None = None) -> CostReport:
    """Price every node of `plan`, or of another `program` for the same model and mesh."""
    program = joined(program or plan.program)  # what runs in two parts costs what it does in one
    costs = CostModel(program.mesh, plan.hardware)
    rows = Pricer(program, costs).rows() if program.pipeline is None else list(_rows_of_stages(program, costs))
    return CostReport(plan, program, tuple(rows), program.stats.get("objective_s", math.nan))


def _rows_of_stages(program: Program, costs: CostModel) -> Iterator[CostRow]:
    """Rows of every stage for a whole step, and what goes to its neighbours: what is prepared costs once, all else with each microbatch."""
    assert program.pipeline is not None
    count, ranks = program.pipeline.microbatches, program.pipeline.stage_ranks
    for number, (stage, stage_costs) in enumerate(zip(program.stages, program.pipeline.costs, strict=True)):
        pricer = Pricer(stage, costs)
        for node in stage.graph.nodes:
            is_once = facts(node).is_prepared or facts(node).role == "parameter" or facts(node).is_constant
            yield from (row if is_once else _repeated(row, count) for row in pricer.of(node))
        forward_b, backward_b = messages_of(stage, costs)
        after, before = (0 <= k < len(ranks) and ranks[k] != ranks[number] for k in (number + 1, number - 1))
        sent = CostRow(f"stage {number}", "send", "", "send", PIPELINE_AXIS, after * stage_costs.send_s, before * stage_costs.send_back_s)
        if after or before:
            yield _repeated(replace(sent, wire_bytes=after * forward_b + before * backward_b), count)


def _repeated(row: CostRow, count: int) -> CostRow:
    """What a row costs `count` times."""
    summed = {name: count * getattr(row, name) for name in (*_SUMMED, "times")}
    return replace(row, **summed)


def source_of_value(node: fx.Node) -> fx.Node:
    """The node whose value `node` is: conversions and masks are looked through."""
    while facts(node).role in ("start", "conversion", "mask"):
        node = node.args[0]  # type: ignore[assignment]
    return node


def readers_of(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes that read a value, as it is or converted."""
    for user in node.users:
        if facts(user).role in ("start", "conversion", "mask", "projection"):
            yield from readers_of(user)
        else:
            yield user
