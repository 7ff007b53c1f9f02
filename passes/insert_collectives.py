"""insert_collectives: put conversion nodes between what is made and what is wanted, each conversion of a value once.

A value reaches each wanted layout from the cheapest one that exists already: as made, the hub that the search chose, or
another wanted layout. A value that is pinned is converted to the pin first and read from there only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from autoshard import runtime
from autoshard.branches import settle_branches
from autoshard.candidates import leaving_layout
from autoshard.conversions import AGAIN, Step, is_step_sound, replace_axis, step_arguments, step_sizes, without_gradient
from autoshard.costs import CostModel
from autoshard.errors import PlacementError
from autoshard.hardware import Hardware
from autoshard.placements import Layout, shown_layout
from autoshard.program import Facts, Program, facts, native_layout, replace_operands, set_facts, tensor_operands
from autoshard.regions import settle_regions
from autoshard.text import human_bytes, human_seconds
from autoshard.traffic import sent_by, wire_bytes

_LITTLE = 0.01  # of a predicted step


@dataclass(frozen=True)
class InsertCollectives:
    """Insert conversions. `wants_whole_outputs`: what leaves the program is whole on every rank, else it may stay split."""

    hardware: Hardware
    wants_whole_outputs: bool = True

    def __call__(self, program: Program) -> Program:
        model = CostModel(program.mesh, self.hardware)
        routers: dict[fx.Node, _Router] = {}
        wanted = {node: self._wanted(program, node) for node in program.nodes("op", "update", "output")}
        for node, layouts in wanted.items():
            for operand, layout in zip(tensor_operands(node), layouts, strict=True):
                routers.setdefault(operand, _Router(program, model, operand)).want(layout)
        for router in routers.values():
            router.plan()
        for node, layouts in wanted.items():
            replace_operands(node, [routers[o].fetch(x, node) for o, x in zip(tensor_operands(node), layouts, strict=True)])
        for node in program.nodes("update"):
            facts(node).layouts = (native_layout(program.mesh.ndim, False),)
        settle_branches(program)
        settle_regions(program)
        program.is_typed, program.leaves_whole = True, self.wants_whole_outputs
        if self.wants_whole_outputs and program.is_training and program.pipeline is None:
            _note_gathered_results(program, model)
        return program

    def _wanted(self, program: Program, node: fx.Node) -> list[Layout]:
        operands, ndim = tensor_operands(node), program.mesh.ndim
        if facts(node).role == "op":
            columns = zip(*(strategy.inputs for strategy in facts(node).strategies), strict=True) if operands else ()
            return [tuple(c) if facts(o).needs_grad else without_gradient(tuple(c)) for o, c in zip(operands, columns, strict=True)]
        if facts(node).role == "update":
            return [native_layout(ndim, False) for _ in operands]
        return [self._leaving(facts(o), program.mesh.shape) for o in operands]

    def _leaving(self, known: Facts, sizes: tuple[int, ...]) -> Layout:
        made = known.hub if known.is_pinned and known.hub else known.layout
        return leaving_layout(made, known.value, self.wants_whole_outputs, sizes)


def _note_gathered_results(program: Program, model: CostModel) -> None:
    """Say what it costs to give results whole to every rank, where that is more than little of the step."""
    found: dict[str, tuple[float, float]] = {}
    for node in tensor_operands(program.output):
        if not facts(node).value.shape:  # whole in any case
            continue
        seconds, nbytes, at = 0.0, 0.0, node
        while facts(at).role == "conversion" and not facts(at).is_constant:
            axis, collective, whole = sent_by(program, at, model)[0]
            seconds += model.collective_s(collective, program.mesh.index(axis), whole)
            nbytes += wire_bytes(program, at, model)[0]
            at = at.args[0]  # type: ignore[assignment]
        found[at.name] = (seconds, nbytes)
    total_s, total_bytes = sum(seconds for seconds, _ in found.values()), sum(nbytes for _, nbytes in found.values())
    if total_s > _LITTLE * program.stats.get("objective_s", 0.0):
        names = ", ".join(name for name, (seconds, _) in found.items() if seconds > _LITTLE * total_s)
        program.note(
            f"results are made whole on every rank ({names}): {human_seconds(total_s)} and {human_bytes(total_bytes)} sent a step; "
            "outputs='dtensor' leaves them split, as DTensors, and the loss as it is"
        )


class _Router:
    """Ways from one value to every layout its users want."""

    def __init__(self, program: Program, model: CostModel, node: fx.Node) -> None:
        self.program, self.model, self.node, self.known = program, model, node, facts(node)
        self.wants: dict[Layout, None] = {}
        self.source: dict[Layout, Layout] = {}  # layout -> the layout it is converted from
        hub = self.known.hub
        self.hub = hub if hub is not None and hub != self.known.layout else None
        self.reads_hub_only = self.known.is_pinned and self.hub is not None
        self.made: dict[Layout, fx.Node] = {} if self.reads_hub_only else {self.known.layout: node}

    def want(self, layout: Layout) -> None:
        self.wants[layout] = None

    def plan(self) -> None:
        """Greedy tree: the cheapest layout to reach next, from any that is reached."""
        reached = [self.hub] if self.reads_hub_only and self.hub else [self.known.layout]
        if self.hub is not None and not self.reads_hub_only:
            self.source[self.hub] = self.known.layout
            reached.append(self.hub)
        missing = list(self.wants)
        while missing := [x for x in missing if x not in reached]:
            priced = [(self._price(a, b), i, j) for i, b in enumerate(missing) for j, a in enumerate(reached)]
            _, i, j = min(priced)
            self.source[missing[i]] = reached[j]
            reached.append(missing[i])

    def _price(self, src: Layout, dst: Layout) -> float:
        best = self.model.best_route(src, dst, self.known.value)
        return float("inf") if best is None else best[0]

    def fetch(self, layout: Layout, user: fx.Node) -> fx.Node:
        """The node that holds the value in `layout`, made before `user` where it does not exist."""
        if layout not in self.made:
            starts = self.reads_hub_only and layout == self.hub
            node = self.node if starts else self.fetch(self.source[layout], user)
            best = self.model.best_route(facts(node).layout, layout, self.known.value)
            if best is None:
                raise PlacementError(f"no conversion of {self.node.name} from {facts(node).layout} to {layout}")
            for step in best[1]:
                node = self._insert(node, step, user)
            self.made[layout] = node
        return self.made[layout]

    def _insert(self, node: fx.Node, step: Step, user: fx.Node) -> fx.Node:
        with self.program.graph.inserting_before(user):
            return insert_conversion(self.program, node, step)


def insert_conversion(program: Program, node: fx.Node, step: Step) -> fx.Node:
    """Add the node of one conversion step at the graph's insertion point."""
    known, axis = facts(node), program.mesh.axes[step.axis]
    row = AGAIN.get(step.row.name, step.row) if known.gathers_again else step.row
    after = replace_axis(known.layout, step.axis, step.dst)
    if not is_step_sound(known.layout, step):
        raise PlacementError(
            f"{step.row.name} of {node.name} on {axis} would interleave pieces of {shown_layout(known.layout, program.mesh)}"
        )
    args = step_arguments(known.layout, step, known.value.shape, program.mesh.shape)
    kwargs: dict[str, Any] = step_sizes(known.layout, step, known.value.shape, program.mesh.shape)
    stem = known.name if known.role == "conversion" else node.name
    new = program.graph.create_node("call_function", getattr(runtime, row.name), (node, axis, *args), kwargs, name=f"{stem}_{row.name}")
    again = known.gathers_again  # of every copy that is made on the way
    set_facts(new, Facts("conversion", (known.value,), stem, known.source, (after,), is_constant=known.is_constant, gathers_again=again))
    return new
