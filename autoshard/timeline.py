"""The timeline: one training step of a finished program on one compute stream and one communication stream per mesh axis.

    compute stream   ops in program order, then their backward in autograd's order (the last of the forward pass first), then
                     the optimizer
    axis streams     collectives, each axis by itself, in the order of their launch

A collective runs once it is launched and its stream is free. What is in one part is waited for at once; `start` launches and
goes on, `wait` blocks the compute stream until the collective is done. In backward `wait` launches and `start` blocks. Prices
are those of the search (autoshard.costs), so without any overlap the total is the sum that the search minimised, over the
conversions that the program shares.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import fx
from torch.fx.node import map_aggregate

from autoshard.candidates import bound_rule
from autoshard.conversions import COMMUNICATES, Step
from autoshard.costs import CostModel, split_of
from autoshard.ops.row import Call, TensorInfo
from autoshard.placements import padded_axes
from autoshard.program import Program, asked_of, call_of, facts, is_wait, row_of, tensor_operands
from autoshard.traffic import meter

COMPUTE = "compute"
Phase = Literal["forward", "backward", "recompute", "optimizer"]


@dataclass(frozen=True)
class Task:
    """What a step does next: `run` on the compute stream, `launch` on an axis' stream, or `wait` for what was launched under `name`."""

    verb: Literal["run", "launch", "wait"]
    stream: str
    name: str
    seconds: float = 0.0
    module: str = ""
    kind: Phase = "forward"


@dataclass(frozen=True)
class Event:
    """Something that ran on a stream: "compute" or the name of a mesh axis. Times in seconds from the start of the step."""

    stream: str
    name: str
    module: str
    start_s: float
    end_s: float
    kind: Phase


@dataclass(frozen=True)
class Timeline:
    """One predicted step. exposed_s: by axis, how long compute stands still for its collectives; busy_s: by stream, how long it works."""

    events: tuple[Event, ...]
    total_s: float
    exposed_s: dict[str, float]

    @property
    def busy_s(self) -> dict[str, float]:
        found = dict.fromkeys((COMPUTE, *self.exposed_s), 0.0)
        for event in self.events:
            found[event.stream] += event.end_s - event.start_s
        return found

    @property
    def compute_s(self) -> float:
        return self.busy_s[COMPUTE]

    def to_chrome_trace(self, path: str | Path) -> Path:
        """Write a trace that chrome://tracing and ui.perfetto.dev open: one row per stream, times in microseconds."""
        rows = {stream: number for number, stream in enumerate((COMPUTE, *self.exposed_s))}
        named: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": stream if row == 0 else f"collectives @{stream}"}}
            for stream, row in rows.items()
        ]
        shown = [
            {"ph": "X", "pid": 0, "tid": rows[e.stream], "name": e.name, "cat": e.kind, "args": {"module": e.module}}
            | {"ts": e.start_s * 1e6, "dur": (e.end_s - e.start_s) * 1e6}
            for e in self.events
        ]
        path = Path(path)
        path.write_text(json.dumps({"traceEvents": [*named, *shown], "displayTimeUnit": "ms"}))
        return path

    def __repr__(self) -> str:
        exposed = ", ".join(f"{seconds * 1e3:.3f} ms exposed @{axis}" for axis, seconds in self.exposed_s.items())
        return f"Timeline({self.total_s * 1e3:.3f} ms, {self.compute_s * 1e3:.3f} ms compute, {exposed})"


def schedule(tasks: Iterable[Task], axes: Sequence[str]) -> Timeline:
    """When everything runs. A launch and its wait share a name, which is used anew afterwards."""
    now, free, exposed = 0.0, dict.fromkeys(axes, 0.0), dict.fromkeys(axes, 0.0)
    done: dict[str, float] = {}
    events: list[Event] = []
    for task in tasks:
        if task.verb == "wait":
            exposed[task.stream] += max(0.0, done[task.name] - now)
            now = max(now, done.pop(task.name))
            continue
        begin = now if task.verb == "run" else max(now, free[task.stream])
        end = begin + task.seconds
        if task.verb == "run":
            now = end
        else:
            free[task.stream] = done[task.name] = end
        if task.seconds:
            events.append(Event(task.stream, task.name, task.module, begin, end, task.kind))
    return Timeline(tuple(events), max([now, *free.values()]), exposed)


def timeline_of(program: Program, costs: CostModel) -> Timeline:
    """One predicted training step of a finished program (forward alone, where nothing has a gradient)."""
    return schedule(tasks_of(program, costs), program.mesh.axes)


def tasks_of(program: Program, costs: CostModel) -> list[Task]:
    """Forward in program order, backward in reverse with checkpointed regions run again, then the optimizer."""
    works = [work_of(program, node, costs) for node in program.nodes() if not facts(node).is_constant]
    tasks = [task for work in works for task in work.forward]
    for number, run in itertools.groupby(reversed(works), key=lambda work: work.region):
        region = list(run)
        if number is not None and any(work.backward for work in region):
            tasks += [replace(task, kind="recompute") for work in reversed(region) for task in work.forward]
        tasks += [replace(task, kind="backward") for work in region for task in work.backward]
    for name, node in program.parameters().items():
        seconds = costs.parameter_s(facts(node).value, facts(node).layout)
        tasks += [Task("run", COMPUTE, name, seconds, name.rpartition(".")[0], "optimizer")] if seconds else []
    return tasks


@dataclass(frozen=True)
class Work:
    """What one node does, each way; `region`: the checkpointed region it belongs to."""

    forward: tuple[Task, ...] = ()
    backward: tuple[Task, ...] = ()
    region: int | None = None

    @property
    def forward_s(self) -> float:
        """Seconds on the compute stream in the forward pass."""
        return sum(task.seconds for task in self.forward if task.verb == "run")


def work_of(program: Program, node: fx.Node, costs: CostModel) -> Work:
    """The tasks of one node."""
    known = facts(node)
    if known.role in ("start", "conversion"):
        return _conversion_work(program, node, costs)
    ways = {"op": _op_seconds, "mask": _copy_seconds, "parameter": _padding_seconds}.get(known.role)
    if ways is None:
        return Work(region=known.recompute)
    both = ways(program, node, costs)
    tasks = [tuple(_tasks(node, seconds)) for seconds in both]
    return Work(tasks[0], tasks[1], known.recompute)


def _tasks(node: fx.Node, seconds: dict[str, float]) -> Iterator[Task]:
    """Work of one node one way, by stream; what an op sends by itself is waited for at once."""
    module = facts(node).source.module
    for stream, spent in seconds.items():
        if stream == COMPUTE:
            yield Task("run", COMPUTE, node.name, spent, module)
        elif spent:
            yield Task("launch", stream, node.name, spent, module)
            yield Task("wait", stream, node.name)


def _conversion_work(program: Program, node: fx.Node, costs: CostModel) -> Work:
    """A conversion, or either part of one: each part launches one way and waits the other."""
    known, asked, row = facts(node), asked_of(node), row_of(node)
    wait = next(iter(node.users)) if known.role == "start" else node
    axis, before = program.mesh.index(str(asked.args[1])), facts(asked.all_input_nodes[0]).layout
    step = Step(axis, before[axis], facts(wait).layout[axis])
    whole = costs.whole_bytes(step, known.value, before)
    ways = []
    for name, parts in ((row.forward, (known.role == "start", is_wait(node))), (row.backward, (is_wait(node), known.role == "start"))):
        spent = costs.collective_s(name, axis, whole)
        stream = program.mesh.axes[axis] if name in COMMUNICATES else COMPUTE
        task = Task("launch" if name in COMMUNICATES else "run", stream, wait.name, spent, known.source.module)
        launches, waits = parts if any(parts) else (True, True)
        found = [task] if launches and task.seconds else []
        found += [Task("wait", stream, wait.name)] if waits and task.verb == "launch" and task.seconds else []
        ways.append(tuple(found))
    again = ways[0] if row.is_repeated and program.is_training else ()
    return Work(ways[0], (*again, *(ways[1] if known.needs_grad else ())), known.recompute)


def _copy_seconds(program: Program, node: fx.Node, costs: CostModel) -> tuple[dict[str, float], dict[str, float]]:
    value, layout = facts(node).value, facts(node).layout
    forward = costs.copy_s(replace(value, needs_grad=False), layout)
    return {COMPUTE: forward}, {COMPUTE: costs.copy_s(value, layout) - forward}


def _padding_seconds(program: Program, node: fx.Node, costs: CostModel) -> tuple[dict[str, float], dict[str, float]]:
    """A parameter is padded where its dims do not divide; its optimizer step is another task."""
    is_padded = bool(padded_axes(facts(node).value.shape, facts(node).layout, program.mesh.shape))
    return _copy_seconds(program, node, costs) if is_padded else ({}, {})


def _op_seconds(program: Program, node: fx.Node, costs: CostModel) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by stream, forward and backward: the op itself, and what its lowering sends."""
    call, operands = call_of(node), tensor_operands(node)
    layouts = [*(facts(operand).layout for operand in operands), *facts(node).layouts]
    rule, equation = bound_rule(node)
    factors = [strategy.factor for strategy in facts(node).strategies] if equation is not None else []
    split = split_of(equation, factors, program.mesh.shape) if factors else 1.0
    axes: dict[str, Any] = {key: value for key, value in node.kwargs.items() if key.endswith("_axes")}
    measured = None if axes else call  # times are measured of ops, not of their lowerings
    once = costs.op_times(call.op, rule, equation, (*call.inputs, *call.outputs), layouts, split, measured)
    forward, both = ({COMPUTE: once[0]}, {COMPUTE: sum(once)})
    for asked, seconds in ((_without_gradients(call), forward), (call, both)):
        for axis, name, whole in meter(node.target.__name__, asked, layouts, axes, program.mesh) if axes else ():  # type: ignore[union-attr]
            seconds[axis] = seconds.get(axis, 0.0) + costs.collective_s(name, program.mesh.index(axis), whole)
    return forward, {stream: seconds - forward.get(stream, 0.0) for stream, seconds in both.items()}


def _without_gradients(call: Call) -> Call:
    def plain(leaf: Any) -> Any:
        return replace(leaf, needs_grad=False) if isinstance(leaf, TensorInfo) else leaf

    inputs, outputs = (tuple(map(plain, infos)) for infos in (call.inputs, call.outputs))
    return Call(call.op, map_aggregate(dict(call.arguments), plain), inputs, outputs)
