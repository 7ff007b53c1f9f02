"""annotate_shardings: choose a layout for every value, by exact search over the sound strategies under the constraints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np
from torch import fx

from autoshard.autograd_saves import kept_values
from autoshard.budget import fit
from autoshard.budget_space import What, blocks_of, memory_of_plan
from autoshard.candidates import Candidate, bound_rule
from autoshard.constraints import Pin, Template, pins_of, template_constraints
from autoshard.costs import CostModel
from autoshard.errors import BudgetError, ConstraintError
from autoshard.hardware import Hardware
from autoshard.layers import Layer, find_layers
from autoshard.placements import Layout
from autoshard.program import Program, draws_random, facts, native_layout, op_name, producer, tensor_operands
from autoshard.search_space import SearchSpace, Value
from autoshard.solver import InfeasibleError, Problem, Solution, solve
from autoshard.text import human_bytes

_ENTRIES_OF_A_RANDOM_PLAN = 2**18
_LITTLE = 1e-3  # share of a step that the search may not see before the templates' plans, which may win there, are compared
_WITHIN = "the predicted step is within"


@dataclass(frozen=True)
class AnnotateShardings:
    """Solve for the least predicted step time.

    constraints: layout by name pattern (autoshard.constraints). fixed_parameters: layouts that parameters already have.
    overrides: constraints that stand in place of all others on the values they name.
    memory_budget_bytes: upper bound per rank on parameters, gradients, optimizer state and what autograd keeps for
    backward; where the fastest plan is over it, weights may be gathered again and layers run again in backward
    (autoshard.budget). seed: draw random prices instead of real ones, which makes a random sound plan.
    Raises ConstraintError, BudgetError.
    """

    hardware: Hardware
    template: Template = "auto"
    constraints: Mapping[str, str] = field(default_factory=dict)
    fixed_parameters: Mapping[str, Layout] = field(default_factory=dict)
    memory_budget_bytes: float | None = None
    wants_whole_outputs: bool = True
    seed: int | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, program: Program) -> Program:
        if self.template != "auto" or self.seed is not None:
            return self._annotate(program)
        before = program.on_mesh(program.mesh)
        try:
            found = self._annotate(program)
        except BudgetError as error:  # of plans that take inputs as they are given
            return self._best_of_templates(before, None, error)
        is_proven = (
            found.stats["objective_s"] == found.stats["bound_s"] and found.stats["unsearched_s"] <= _LITTLE * found.stats["objective_s"]
        )
        return found if is_proven else self._best_of_templates(before, found)

    def _best_of_templates(self, before: Program, found: Program | None, error: BudgetError | None = None) -> Program:
        """The cheapest plan of `found`, if there is one, and the templates', which may take inputs otherwise than they are given."""
        for template in get_args(Template)[1:]:
            try:
                rival = replace(self, template=template)._annotate(before.on_mesh(before.mesh))
            except (BudgetError, ConstraintError):
                continue
            if found is None or rival.stats["objective_s"] < found.stats["objective_s"]:
                rival.notes = [note for note in rival.notes if not note.startswith(_WITHIN)]  # that is of plans under the template
                rival.note(f"no plan was found that is cheaper than that of template {template!r}")
                if found is not None:
                    rival.stats["bound_s"] = min(found.stats["bound_s"], rival.stats["bound_s"])
                rival.stats["gap"] = _gap(rival.stats["objective_s"], rival.stats["bound_s"])
                found = rival
        if found is None:
            assert error is not None
            raise error
        return found

    def _annotate(self, program: Program) -> Program:
        started = time.perf_counter()
        if program.pipeline is not None:  # cut_stages asks, when conversions stand between
            program.kept = kept_values(program) if program.is_training else None
        pins = self._pins(program, self.constraints)
        space = self._space(program, pins)
        problem, order = space.problem()
        problem = replace(problem, blocks=blocks_of(space, order, find_layers(program)))
        program.stats["build_s"] = time.perf_counter() - started
        started = time.perf_counter()
        try:
            solution = self._solve(problem)
        except InfeasibleError as error:
            raise ConstraintError(self._conflict(program)) from error
        choice: Mapping[What, int] = dict(zip(order, solution.choices, strict=True))
        kept_bytes, repeated = memory_of_plan(space, choice), list[fx.Node]()  # type: ignore[arg-type]
        if self.memory_budget_bytes is not None and kept_bytes > self.memory_budget_bytes:
            fitted = fit(space, self.memory_budget_bytes)
            space, choice, solution, kept_bytes = fitted.space.space, fitted.choice, fitted.solution, fitted.kept_bytes
            program.stats["build_s"] += fitted.build_s
            started += fitted.build_s
            _mark_repeated(program, fitted.repeated)
            repeated = [node for layer in fitted.repeated for node in layer.nodes]
        program.stats |= {"solve_s": time.perf_counter() - started, "variables": len(choice), "largest_table": solution.largest_table}
        decided_s = _decided_s(program, space, choice) if self.seed is None else 0.0
        program.stats |= {"objective_s": solution.objective_s + decided_s, "bound_s": solution.bound_s + decided_s}
        program.stats |= {"kept_bytes": kept_bytes, "gap": _gap(program.stats["objective_s"], program.stats["bound_s"])}
        unsearched_s = sum(c.cost_s for node, c in space.chosen.items() if not facts(node).is_constant)
        program.stats["unsearched_s"] = unsearched_s + (_shareable_s(space) if self.seed is None else 0.0)
        taken = {**space.chosen, **{node: options[choice[node]] for node, options in space.domains.items()}}
        again_s = sum(float(space.table.forward_s(node, [taken[node]])[0]) for node in repeated)
        program.stats["ops_s"] = sum(c.cost_s for node, c in taken.items() if not facts(node).is_constant) + again_s
        _write(program, space, choice)
        _report(program, space, solution, self.seed is not None)
        self._warn(program, kept_bytes)
        return program

    def _solve(self, problem: Problem) -> Solution:
        """The best choices without a budget. Of random prices any choices do: tables stay small then, unless that finds none."""
        if self.seed is not None:
            with contextlib.suppress(InfeasibleError):
                return solve(problem, max_table_entries=_ENTRIES_OF_A_RANDOM_PLAN)
        return solve(problem)

    def _warn(self, program: Program, kept_bytes: float) -> None:
        """Say when a plan that nobody limited does not fit the device."""
        available = self.hardware.device.memory_bytes
        if self.memory_budget_bytes is None and program.is_training and kept_bytes > available:
            program.note(
                f"a rank keeps {human_bytes(kept_bytes)} by prediction, a device of hardware {self.hardware.name!r} has "
                f"{human_bytes(available)}; memory_budget_bytes={0.9 * available:.3g} searches for a plan that fits"
            )

    def _pins(self, program: Program, constraints: Mapping[str, str]) -> dict[fx.Node, list[Pin]]:
        pins = pins_of(program, constraints)
        for node, extra in pins_of(program, template_constraints(program, self.template), is_soft=True).items():
            given = pins.get(node, [])  # what the caller pins replaces what the template says of it
            pins[node] = given if any(not pin.is_split for pin in given) else [*extra, *given]
        for name, layout in self.fixed_parameters.items():
            if name in program.parameters():
                pins[program.parameters()[name]] = [Pin(f"parameter:{name}", "where it already lies", tuple((str(p),) for p in layout))]
        pins |= pins_of(program, self.overrides)
        return pins

    def _space(self, program: Program, pins: Mapping[fx.Node, list[Pin]]) -> SearchSpace:
        random = None if self.seed is None else np.random.default_rng(self.seed)
        return SearchSpace(program, CostModel(program.mesh, self.hardware), pins, self.wants_whole_outputs, random)

    def _conflict(self, program: Program) -> str:
        """A smallest set of constraints that no plan satisfies: each is dropped in turn, and kept out if still infeasible."""
        kept = dict(self.constraints)
        for pattern in list(kept):
            fewer = {other: text for other, text in kept.items() if other != pattern}
            try:
                solve(self._space(program, self._pins(program, fewer)).problem()[0])
            except InfeasibleError:
                kept = fewer
        shown = "; ".join(f"{pattern!r}: {text!r}" for pattern, text in kept.items()) or f"template {self.template!r}"
        return f"no plan on {program.mesh.whole} satisfies these constraints together: {shown}. Drop or change one of them."


def _mark_repeated(program: Program, layers: Sequence[Layer]) -> None:
    """Number the regions that backward runs again, behind those that the model has."""
    number = max((facts(node).recompute or 0 for node in program.nodes()), default=0)
    for layer in layers:
        number += 1
        nodes = set(layer.nodes)
        for node in (*layer.nodes, *(n for n in program.nodes("projection") if producer(n)[0] in nodes)):
            facts(node).recompute = number


def _gap(objective_s: float, bound_s: float) -> float:
    return max(0.0, objective_s / bound_s - 1.0) if bound_s > 0.0 else math.inf if objective_s > bound_s else 0.0


def _decided_s(program: Program, space: SearchSpace, choice: Mapping[What, int]) -> float:
    """Seconds that the search does not see: of what was decided before it, which differs between plans that take inputs differently.

    The search charges every reader of a decided value for its own conversion. The program makes equal ones once, so what was
    charged twice is taken off again.
    """
    total = sum(chosen.cost_s for node, chosen in space.chosen.items() if not facts(node).is_constant)
    searched = {node: options[choice[node]] for node, options in space.domains.items()}
    wanted: dict[tuple[Value, Layout], float] = {}

    def route_s(value: Value, have: Layout, want: Layout) -> float:
        best = space.costs.best_route(have, want, facts(value[0]).values[value[1]])
        return best[0] if best is not None else 0.0

    for node, taken in {**space.chosen, **searched}.items():
        for operand, want in zip(tensor_operands(node) if facts(node).role == "op" else [], taken.inputs, strict=True):
            value = producer(operand)
            if value in space.fixed and not facts(value[0]).is_constant:
                wanted[value, want] = seconds = route_s(value, space.fixed[value], want)
                total -= seconds if node in searched and want not in space.made_anyway(value) else 0.0
    for node in program.nodes("output"):
        for value in map(producer, tensor_operands(node)):
            if value in space.fixed and not facts(value[0]).is_constant:
                want = space.leaves_as(space.fixed[value], facts(value[0]).values[value[1]])
                wanted[value, want] = route_s(value, space.fixed[value], want)
    for node in program.nodes("input"):
        known = facts(node)
        if known.is_pinned and known.hub is not None:
            given = known.layouts[0] if known.layouts else native_layout(program.mesh.ndim, known.needs_grad)
            total += route_s((node, 0), given, known.hub)  # apart from what readers convert back
    return total + sum(wanted.values())


def _shareable_s(space: SearchSpace) -> float:
    """The most that any plan may save, beyond the search's prices, where several searched ops read one decided value converted alike."""
    total = 0.0
    for value, users in space.uses.items():
        searched = [(user, k) for user, k in users if user in space.domains]
        if value in space.fixed and len(searched) > 1 and not facts(value[0]).is_constant:
            most = [max((float(s) for s in space.from_fixed(value, user, k) if math.isfinite(s)), default=0.0) for user, k in searched]
            total += sum(most) - min(most)
    return total


def _write(program: Program, space: SearchSpace, choice: Mapping[What, int]) -> None:
    """Record the chosen strategies and layouts on the nodes."""
    for node in program.graph.nodes:
        known = facts(node)
        if node in space.domains or node in space.chosen:
            chosen: Candidate = space.domains[node][choice[node]] if node in space.domains else space.chosen[node]
            known.strategies, known.layouts, known.gathers_again = chosen.strategies, chosen.outputs, chosen.gathers_again
        elif known.role in ("input", "buffer"):
            known.layouts = known.layouts or (native_layout(program.mesh.ndim, known.needs_grad),)
    for node in program.nodes("projection"):
        source, index = producer(node)
        facts(node).layouts = (facts(source).layouts[index],)
    for node in program.nodes("parameter", "op", "projection"):
        value = producer(node)
        if value in space.supplies and (facts(node).role == "projection" or len(facts(node).values) == 1):
            way = space.supplies[value][choice[value]]
            facts(node).hub, facts(node).is_pinned = way.hub, bool(space.pins_of(value))


def _report(program: Program, space: SearchSpace, solution: Solution, is_random: bool) -> None:
    unknown: dict[str, list[fx.Node]] = {}
    for node in program.nodes("op"):
        # torch.arange and the like read nothing that could be split
        is_made = facts(node).is_drawn_whole or (not tensor_operands(node) and not draws_random(node))
        if not (facts(node).is_constant or is_made) and bound_rule(node)[1] is None:
            unknown.setdefault(op_name(node), []).append(node)
    for name, nodes in unknown.items():
        cost = sum((space.chosen.get(node) or space.domains[node][0]).cost_s for node in nodes)
        program.note(
            f"no rule for {name} ({len(nodes)} uses, first at {facts(nodes[0]).source}): computed whole on every rank, "
            f"{cost * 1e3:.3f} ms a step predicted; autoshard.register_rule adds one"
        )
    if not solution.is_exact and not is_random:
        program.note(
            f"{_WITHIN} {100 * program.stats['gap']:.2g} % of the best possible (proven, of plans in which every value "
            "has one layout that its readers share)"
        )
