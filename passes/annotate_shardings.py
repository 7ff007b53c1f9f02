"""annotate_shardings: choose a layout for every value, by exact search over the sound strategies under the constraints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import fx

from autoshard.budget import fit
from autoshard.budget_space import What, blocks_of, memory_of_plan
from autoshard.candidates import Candidate, bound_rule
from autoshard.constraints import Pin, Template, pins_of, template_constraints
from autoshard.costs import CostModel
from autoshard.errors import ConstraintError
from autoshard.hardware import Hardware
from autoshard.layers import Layer, find_layers
from autoshard.placements import Layout
from autoshard.program import Program, draws_random, facts, native_layout, op_name, producer, tensor_operands
from autoshard.search_space import SearchSpace
from autoshard.solver import InfeasibleError, Problem, Solution, solve
from autoshard.text import human_bytes

_ENTRIES_OF_A_RANDOM_PLAN = 2**18


@dataclass(frozen=True)
class AnnotateShardings:
    """Solve for the least predicted step time.

    constraints: layout by name pattern (autoshard.constraints). fixed_parameters: layouts that parameters already have.
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

    def __call__(self, program: Program) -> Program:
        started = time.perf_counter()
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
        kept_bytes = memory_of_plan(space, choice)  # type: ignore[arg-type]
        if self.memory_budget_bytes is not None and kept_bytes > self.memory_budget_bytes:
            fitted = fit(space, self.memory_budget_bytes)
            space, choice, solution, kept_bytes = fitted.space.space, fitted.choice, fitted.solution, fitted.kept_bytes
            program.stats["build_s"] += fitted.build_s
            started += fitted.build_s
            _mark_repeated(program, fitted.repeated)
        program.stats |= {"solve_s": time.perf_counter() - started, "variables": len(choice), "largest_table": solution.largest_table}
        program.stats |= {"objective_s": solution.objective_s, "bound_s": solution.bound_s, "kept_bytes": kept_bytes}
        program.stats["gap"] = solution.objective_s / max(solution.bound_s, 1e-30) - 1
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
        available = self.hardware.memory_bytes
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
        return f"no plan on {program.mesh} satisfies these constraints together: {shown}. Drop or change one of them."


def _mark_repeated(program: Program, layers: Sequence[Layer]) -> None:
    """Number the regions that backward runs again, behind those that the model has."""
    number = max((facts(node).recompute or 0 for node in program.nodes()), default=0)
    for layer in layers:
        number += 1
        nodes = set(layer.nodes)
        for node in (*layer.nodes, *(n for n in program.nodes("projection") if producer(n)[0] in nodes)):
            facts(node).recompute = number


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
            f"the predicted step is within {100 * program.stats['gap']:.2g} % of the best possible (proven, of plans in which every value "
            "has one layout that its readers share)"
        )
