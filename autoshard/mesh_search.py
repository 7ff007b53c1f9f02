"""Search over meshes: the ways to factor a number of devices into axes, each planned from one trace, ranked.

    meshes   devices = n_1 * .. * n_k, k = 1 .. 3, axes nested in the cluster in this order; orders that put equal sizes on
             equal links are one mesh
    bound    the axes are put into groups; a plan on all of them is, seen on one group alone, a plan on that group whose values
             the other axes split at best evenly:

                 step(mesh)  >=  sum over groups g of  ranks(g) / devices * min over plans on g of (compute * share(g) + conversions on g)

             with shares that add up to one. Every axis alone is a quick bound, a pair and a single axis a better one.

Meshes are searched in the order of their quick bounds; those that cannot beat the best mesh so far are left out. Constraints and
the memory budget are not in the bound: they only make plans slower.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from autoshard.api import check_call
from autoshard.conversions import COMMUNICATES
from autoshard.costs import CostModel
from autoshard.errors import AutoshardError, BudgetError, ConstraintError, InputError
from autoshard.hardware import Hardware, hardware_of
from autoshard.mesh import PIPELINE_AXIS, MeshSpec
from autoshard.ops.row import TensorInfo
from autoshard.passes import AnnotateShardings, InsertCollectives, LocalizeShapes, SplitMicrobatches
from autoshard.pipeline_timeline import simulate
from autoshard.placements import Layout
from autoshard.plan import Plan
from autoshard.planner import Inputs, Outputs, Request, Settings, check_batch, entry_layout, passes_for, plan_stages
from autoshard.program import Program, facts
from autoshard.runner import announce, pass_name, run_passes
from autoshard.search_space import SearchSpace, Value
from autoshard.solver import InfeasibleError, solve
from autoshard.text import human_bytes, human_seconds
from autoshard.torch_internals import pytree
from autoshard.traffic import seconds_by_term, traffic

AXES = {1: ("dp",), 2: ("dp", "tp"), 3: ("dp", "cp", "tp")}  # names promise nothing: the search decides what an axis does
_PLANNING = (AnnotateShardings, InsertCollectives, LocalizeShapes)  # what every mesh has of its own; what is before them is done once

Status = Literal["planned", "pruned", "refused"]


@dataclass(frozen=True)
class RankedMesh:
    """One mesh of the ranking.

    predicted_step_s, memory_bytes (parameters, gradients, optimizer state, kept activations) and wire_bytes (by collective) are per rank
    and step. seconds: the predicted step in parts, by what it is spent on. reason: why it lost, was pruned, or has no plan.
    bound_s: no plan on this mesh is predicted below; 0 where nothing is known.
    """

    mesh: MeshSpec
    status: Status
    reason: str = ""
    predicted_step_s: float = float("inf")
    memory_bytes: float = 0.0
    wire_bytes: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    bound_s: float = 0.0


@dataclass(frozen=True)
class MeshSearch:
    """What autoshard.search returns. best: the plan on the first mesh of `ranking`; print it for the table."""

    best: Plan
    ranking: tuple[RankedMesh, ...]
    devices: int
    seconds: float

    def table(self) -> Table:
        """One row per mesh, best first."""
        counts = {status: sum(row.status == status for row in self.ranking) for status in get_args(Status)}
        pruned = f", {counts['pruned']} pruned (bounded by groups of axes: they cannot beat the best)" if counts["pruned"] else ""
        refused = f", {counts['refused']} without a plan" if counts["refused"] else ""
        caption = f"{counts['planned']} meshes searched{pruned}{refused}; {human_seconds(self.seconds)} in all"
        title = f"{self.best.model_name} on {self.devices} devices ({self.best.hardware.name})"
        table = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for name in ("mesh", "predicted step", "memory/rank", "sent/rank"):
            table.add_column(name, justify="left" if name == "mesh" else "right", no_wrap=True)
        table.add_column("")
        for row in self.ranking:
            numbers = ("", "", "")
            if row.status == "planned":
                sent = human_bytes(sum(row.wire_bytes.values()))
                numbers = (human_seconds(row.predicted_step_s), human_bytes(row.memory_bytes), sent)
            table.add_row(str(row.mesh), *numbers, row.reason)
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(width=140, color_system=None)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get()


def search(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    devices: int,
    cluster: str | Hardware | None = None,
    max_axes: int = 2,
    max_stages: int = 1,
    constraints: Mapping[str, str] | None = None,
    memory_budget_bytes: float | None = None,
    inputs: Inputs = "global",
    outputs: Outputs = "whole",
) -> MeshSearch:
    """Plan `model(*args, **kwargs)` on every mesh of `devices` devices and rank the meshes by predicted step.

    args, kwargs: global inputs, of which only shapes and dtypes are read. cluster: a hardware preset by name or an
    autoshard.Hardware; its nesting of links decides which orders of axes differ. max_axes: 1 to 3; a mesh of three axes takes
    many times as long to plan as one of two. max_stages: the most pipeline stages, an axis pp before the others, to try; their
    microbatches and schedules are chosen. memory_budget_bytes: upper bound per rank, the device's memory if not given.
    constraints, inputs, outputs: as in autoshard.compile; axes are called dp, then tp, and cp between them.
    Raises InputError; BudgetError when no mesh fits the budget; ConstraintError when none satisfies the constraints.
    """
    started = time.perf_counter()
    check_call(model, args)
    limited = {"devices": (devices, None), "max_axes": (max_axes, len(AXES)), "max_stages": (max_stages, None)}
    for name, (number, most) in limited.items():
        if type(number) is not int or number < 1 or (most is not None and number > most):
            limits = f"1 to {most}" if most is not None else "1 or more"
            raise InputError(f"{name} is a whole number, {limits}; got {number!r}")
    hardware = hardware_of(cluster)
    budget = hardware.device.memory_bytes if memory_budget_bytes is None else memory_budget_bytes
    settings = Settings(hardware, "auto", dict(constraints or {}), budget, inputs, outputs)
    meshes = list(meshes_of(devices, hardware, max_axes))
    request = Request(model, tuple(args), dict(kwargs or {}), meshes[-1], settings)
    passes = passes_for(request)
    first = next(k for k, a_pass in enumerate(passes) if isinstance(a_pass, SplitMicrobatches))
    meshes += piped_meshes(devices, hardware, max_axes, max_stages)
    finder = _Search(request, run_passes(passes[:first], Program(fx.Graph(), request.mesh)))
    rows = finder.rank(meshes)
    return MeshSearch(finder.finish(), rows, devices, time.perf_counter() - started)


def factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Ordered ways to write `number` as a product of `parts` numbers above 1 (of one part: itself, even 1)."""
    if parts == 1:
        yield (number,)
        return
    for first in (n for n in range(2, number // 2 + 1) if number % n == 0):
        yield from ((first, *rest) for rest in factorisations(number // first, parts - 1) if 1 not in rest)


def meshes_of(devices: int, hardware: Hardware, max_axes: int = 3) -> Iterator[MeshSpec]:
    """Meshes of up to `max_axes` axes that differ in the sizes of their axes or in what these ride on."""
    seen = set()
    for count in range(1, max_axes + 1):
        for shape in factorisations(devices, count):
            mesh = MeshSpec(AXES[count], shape)
            costs = CostModel(mesh, hardware)
            carried = [(n, *(costs.collective_terms(name, axis) for name in sorted(COMMUNICATES))) for axis, n in enumerate(shape)]
            key = tuple(sorted(carried, key=repr))
            if key not in seen:
                seen.add(key)
                yield mesh


def piped_meshes(devices: int, hardware: Hardware, max_axes: int, max_stages: int) -> Iterator[MeshSpec]:
    """Meshes with 2 to `max_stages` pipeline stages, each on a mesh of what that leaves."""
    for stages in range(2, min(max_stages, devices) + 1):
        for inner in meshes_of(devices // stages, hardware, max_axes) if devices % stages == 0 else ():
            alone = inner.size == 1
            yield MeshSpec((PIPELINE_AXIS, *(() if alone else inner.axes)), (stages, *(() if alone else inner.shape)))


@dataclass(frozen=True)
class _Group(CostModel):
    """Prices of some axes of a larger mesh, for the bound: their conversions, and a `share` of the compute."""

    whole: CostModel = field(kw_only=True)
    axes: tuple[int, ...] = field(kw_only=True)
    share: float = field(kw_only=True)

    def op_s(self, *args: Any, **kwargs: Any) -> float:
        return self.share * super().op_s(*args, **kwargs)

    def copy_s(self, value: TensorInfo, layout: Layout) -> float:
        return self.share * super().copy_s(value, layout)

    def parameter_s(self, *args: Any, **kwargs: Any) -> float:
        return self.share * super().parameter_s(*args, **kwargs)

    def collective_terms(self, name: str, axis: int) -> Any:
        return self.whole.collective_terms(name, self.axes[axis])


class _FreeInputs(SearchSpace):
    """Readers of inputs are not charged: the program shares their conversions, so their sum is no lower bound."""

    def from_fixed(self, value: Value, user: fx.Node, k: int) -> np.ndarray:
        return np.zeros(len(self.domains[user]))


@dataclass
class _Search:
    """Plans one traced program on mesh after mesh."""

    request: Request
    traced: Program
    best: Program | None = None
    best_s: float = float("inf")
    errors: list[AutoshardError] = field(default_factory=list)
    _bounds: dict[object, float] = field(default_factory=dict)

    @cached_property
    def leaves(self) -> list[torch.Tensor]:
        tree = (self.request.args, dict(self.request.kwargs))
        return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    def rank(self, meshes: Sequence[MeshSpec]) -> tuple[RankedMesh, ...]:
        """Every mesh, best first, then those that were pruned, then those without a plan. Raises where there is no plan at all."""
        rows: list[RankedMesh] = []
        quick = sorted((self.bound_s(mesh), k, mesh) for k, mesh in enumerate(meshes)) if len(meshes) > 1 else [(0.0, 0, meshes[0])]
        for bound_s, _, mesh in quick:
            least = min((row.predicted_step_s for row in rows), default=float("inf"))
            if bound_s < least < float("inf") and mesh.of_stage.ndim > 2:
                count = mesh.of_stage.ndim
                bound_s = max(bound_s, *(self.bound_s(mesh, (count - 1 - k,)) for k in range(count)))
            if bound_s >= least:
                rows.append(RankedMesh(mesh, "pruned", f"pruned: no plan below {human_seconds(bound_s)}", bound_s=bound_s))
            else:
                rows.append(self.row(mesh, bound_s))
        rows.sort(key=lambda row: (get_args(Status).index(row.status), row.predicted_step_s, row.bound_s))
        if rows[0].status != "planned":
            raise self._no_plan(len(meshes))
        return (rows[0], *(_explained(row, rows[0]) for row in rows[1:]))

    def row(self, mesh: MeshSpec, bound_s: float = 0.0) -> RankedMesh:
        """Search one mesh; its program is kept if it is the best so far."""
        if PIPELINE_AXIS in mesh.axes:
            return self._piped_row(mesh, bound_s)
        program = self.given(mesh)
        settings = self.request.settings
        passes = [a_pass for a_pass in passes_for(self.request) if isinstance(a_pass, _PLANNING)]
        try:
            check_batch((self.request.args, self.request.kwargs), mesh, settings.template, settings.inputs)
            for a_pass in passes:
                program.passes.append(pass_name(a_pass))
                announce(f"{pass_name(a_pass)} on {mesh}")
                program = a_pass(program)
        except (BudgetError, ConstraintError, InputError) as error:
            self.errors.append(error)
            return RankedMesh(mesh, "refused", f"no plan: {_first_clause(error)}")
        costs, stats = CostModel(mesh, settings.hardware), program.stats
        self._keep(program, stats["objective_s"])
        moved, terms = traffic(program, costs), seconds_by_term(program, costs)
        return RankedMesh(mesh, "planned", "", stats["objective_s"], stats["kept_bytes"], moved, terms, max(bound_s, stats["bound_s"]))

    def _piped_row(self, mesh: MeshSpec, bound_s: float) -> RankedMesh:
        """A mesh with pipeline stages, with the best microbatches and schedule that are found."""
        settings = self.request.settings
        request = replace(self.request, mesh=mesh)
        try:
            program = plan_stages(request, self.given(mesh.of_stage))
        except AutoshardError as error:
            self.errors.append(error)
            return RankedMesh(mesh, "refused", f"no plan: {_first_clause(error)}")
        costs, stats = CostModel(program.mesh, settings.hardware), program.stats
        assert program.pipeline is not None
        step_s = stats["pipeline_s"]
        self._keep(program, step_s)
        timeline = simulate(program.pipeline.schedule, program.pipeline.costs, program.pipeline.stage_ranks, program.pipeline.latency_s)
        terms = {"bubble": timeline.bubble * step_s, "compute": (1 - timeline.bubble) * step_s}
        return RankedMesh(mesh, "planned", "", step_s, stats["stage_bytes"], traffic(program, costs), terms, bound_s)

    def _keep(self, program: Program, step_s: float) -> None:
        if step_s < self.best_s:
            self.best, self.best_s = program, step_s

    def given(self, mesh: MeshSpec) -> Program:
        """The traced program on a mesh, its inputs as the caller gives them."""
        program = self.traced.on_mesh(mesh)
        named = dict(zip(filter(None, program.flat_inputs), self.leaves, strict=True))
        for known in map(facts, program.nodes("input")):
            known.layouts = (entry_layout(named[known.name], mesh, self.request.settings.inputs),)
        return program

    def finish(self) -> Plan:
        """The best plan, checked and emitted."""
        assert self.best is not None
        asked, name = self.request.settings, type(self.request.model).__name__
        program = self.best if self.best.stages else run_passes(passes_for(self.request)[-1:], self.best)
        return Plan(program, asked.hardware, name, asked.inputs, asked.outputs, asked.template, dict(asked.constraints))

    def bound_s(self, mesh: MeshSpec, apart: tuple[int, ...] = ()) -> float:
        """No plan on `mesh` is predicted below this. apart: the axis that stands apart from the others; without it every axis does."""
        hardware = self.request.settings.hardware
        if hardware.measured is not None and hardware.measured.ops:
            return 0.0  # measured seconds of some shapes say nothing of the seconds of their pieces
        whole = CostModel(mesh.of_stage, hardware)
        count = whole.mesh.ndim
        if not apart:
            groups: list[tuple[int, ...]] = [(axis,) for axis in range(count)]
        else:
            groups = [apart, tuple(axis for axis in range(count) if axis not in apart)]
        return sum(self._group_s(whole, group) for group in groups) / mesh.stages  # stages share the work at best evenly

    def _group_s(self, whole: CostModel, axes: tuple[int, ...]) -> float:
        """The least seconds that a plan spends on some axes, a part of the compute included; 0 where they have no plan."""
        shape = tuple(whole.mesh.shape[axis] for axis in axes)
        terms = tuple(whole.collective_terms(name, axis) for name in sorted(COMMUNICATES) for axis in axes)
        key = (shape, terms, whole.mesh.ndim)
        mesh = MeshSpec(tuple(whole.mesh.axes[axis] for axis in axes), shape)
        if key not in self._bounds:
            costs = _Group(mesh, whole.hardware, whole=whole, axes=axes, share=len(axes) / whole.mesh.ndim)
            is_whole = self.request.settings.outputs == "whole"
            try:
                self._bounds[key] = solve(_FreeInputs(self.given(mesh), costs, {}, is_whole).problem()[0]).bound_s
            except InfeasibleError:
                self._bounds[key] = 0.0
        return self._bounds[key] * mesh.size / whole.mesh.size

    def _no_plan(self, count: int) -> AutoshardError:
        kinds = {type(error) for error in self.errors}
        kind = kinds.pop() if len(kinds) == 1 else ConstraintError
        return kind(f"none of the {count} meshes has a plan. The last says: {self.errors[-1]}")


def _first_clause(error: AutoshardError) -> str:
    return str(error).splitlines()[0].partition("; use more")[0]


def _explained(row: RankedMesh, best: RankedMesh) -> RankedMesh:
    """The row with what it spends more on than the best: the largest difference by term."""
    if row.status != "planned":
        return row
    ratio = row.predicted_step_s / best.predicted_step_s if best.predicted_step_s else 1.0
    kinds = _by_kind(row.seconds), _by_kind(best.seconds)
    extra = {kind: kinds[0].get(kind, 0.0) - kinds[1].get(kind, 0.0) for kind in itertools.chain(*kinds)}
    worst = max(extra, key=lambda kind: extra[kind], default="")
    if ratio <= 1.0 or not worst or extra[worst] <= 0.0:
        return replace(row, reason="as good as the best")
    return replace(row, reason=f"x{ratio:.3f}: {human_seconds(extra[worst])} more in {worst}")


def _by_kind(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by collective, whatever the axis: axes of two meshes are not the same."""
    kinds: dict[str, float] = {}
    for term, value in seconds.items():
        kind = term.partition(" on ")[0]
        kinds[kind] = kinds.get(kind, 0.0) + value
    return kinds
