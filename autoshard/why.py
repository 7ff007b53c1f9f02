"""Why a value does not lie otherwise: the plan is solved again with that choice pinned, and the two are compared.

The answer is exact under the cost model, as the plan itself: the best plan that has the asked layout, not this plan with one
layout exchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich.console import Group
from torch import fx

from autoshard.constraints import parse_constraint
from autoshard.cost_report import price
from autoshard.errors import BudgetError, ConstraintError, PlanError
from autoshard.placements import shown_layout
from autoshard.plan_diff import PlanDiff, diff_programs, in_words, resting_layout, returned_by
from autoshard.program import Program, facts
from autoshard.text import human_bytes, human_seconds

if TYPE_CHECKING:
    from autoshard.plan import Plan

Verdict = Literal["already so", "impossible", "equal", "dearer", "cheaper"]
_MOST_SHOWN = 8


@dataclass(frozen=True)
class Why:
    """What another layout would cost. `constraint` is what was pinned; `diff` is None where the layout is already so or impossible.

    verdict: "cheaper" only where the plan was made under a template, constraints or a memory budget that gave way, or where
    the search charged a conversion to several readers that the program makes once. reason: of an impossible one.
    held: how many parameters were not free to move, because a plan was reused.
    """

    name: str
    constraint: tuple[str, str]
    current: str
    verdict: Verdict
    diff: PlanDiff | None = None
    reason: str = ""
    held: int = 0

    @property
    def text(self) -> str:
        """The answer in words."""
        asked = self.constraint[1]
        if self.verdict == "already so":
            return f"{self.name} lies as {self.current} already, which is {asked}."
        if self.verdict == "impossible" or self.diff is None:
            return f"{self.name} lies as {self.current}; {asked} is impossible: {self.reason}"
        found = self.diff
        if self.verdict == "equal":
            said = f"{asked} costs the same, {human_seconds(found.after_s)} a step: the search took either"
        else:
            more = abs(found.after_s - found.before_s)
            said = f"{asked} would be {self.verdict} by {human_seconds(more)}: {found.words()}"
        others = [change for change in found.layouts if change.name not in (self.name, f"output:{self.name}")]
        held = [f"  ({self.held} parameters were held where the reused plan has them)"] if self.held else []
        head = "It would also change:" if others else "No other layout would change."
        lines = [f"  {text}" for text in in_words(others, _MOST_SHOWN)]
        return "\n".join([f"{self.name} lies as {self.current}; {said}.", head, *lines, *self._sent(), *held])

    def _sent(self) -> list[str]:
        moved = [row for row in self.diff.collectives if row.bytes_before != row.bytes_after] if self.diff else []
        return [f"  {row.label}: {human_bytes(row.bytes_before)} -> {human_bytes(row.bytes_after)} sent per step" for row in moved]

    def __str__(self) -> str:
        return self.text

    def __rich__(self) -> Group | str:
        return self.text.replace("[", r"\[")


def why(plan: Plan, name: str, layout: str) -> Why:
    """Compare `plan` with the best plan in which `name` has `layout`.

    name: a parameter, an input, a module (what it returns), or a node of the program, with `parameter:`, `input:`, `output:`
    or `node:` before it where names coincide. layout: as constraints write it.
    Raises PlanError for unknown names and for a plan that cannot be solved again, ConstraintError for a layout that cannot be read.
    """
    if plan.resolver is None:
        raise PlanError(
            "this plan was read from a file, which does not hold what it takes to solve again; "
            "plan the model anew, autoshard.plan(model, ..., reuse=plan) keeps its layouts, and ask that plan"
        )
    pattern, nodes = find_subject(plan.program, name)
    pin = parse_constraint(pattern, layout, plan.mesh)
    lies = [(resting_layout(node), facts(node).needs_grad) for node in nodes]
    current = "; ".join(dict.fromkeys(shown_layout(where, plan.mesh) for where, _ in lies))
    asked = (pattern, layout)
    if all(pin.admits(where, needs_grad) for where, needs_grad in lies):
        return Why(name, asked, current, "already so")
    if any(facts(node).is_constant for node in nodes):
        return Why(name, asked, current, "impossible", reason="it is computed once, whole on every rank, and not planned")
    try:
        other = plan.resolver.solve({pattern: layout})
    except (ConstraintError, BudgetError) as error:
        return Why(name, asked, current, "impossible", reason=str(error))
    found = diff_programs(plan.program, plan.cost, other, price(plan, other), f"{pattern} as {layout}")
    change = found.after_s - found.before_s
    is_equal = abs(change) <= 1e-9 * found.before_s
    verdict: Verdict = "equal" if is_equal else "dearer" if change > 0 else "cheaper"
    return Why(name, asked, current, verdict, found, held=len(plan.resolver.fixed_parameters))


def find_subject(program: Program, name: str) -> tuple[str, list[fx.Node]]:
    """The constraint pattern that names `name` alone, and the values it pins. Raises PlanError with the nearest names."""
    parameters = program.parameters()
    named: dict[str, dict[str, list[fx.Node]]] = {
        "parameter": {found: [node] for found, node in parameters.items()},
        "input": {facts(node).name: [node] for node in program.nodes("input")},
        "output": returned_by(program),
        "node": {node.name: [node] for node in program.nodes("op", "projection") if len(facts(node).values) == 1},
    }
    named["parameter"] |= {alias: [parameters[target]] for alias, target in program.aliases.items() if target in parameters}
    kind, _, rest = name.rpartition(":")
    if kind and kind not in named:
        raise PlanError(f"{name!r} begins with {kind!r}; names begin with {', '.join(f'{k}:' for k in named)} or nothing")
    for known, nodes in named.items():
        if (not kind or kind == known) and rest in nodes:
            return f"{known}:{_literal(rest)}", nodes[rest]
    raise PlanError(f"no parameter, input, module or node {name!r} in this plan{_nearest(rest, (n for k in named.values() for n in k))}")


def _literal(name: str) -> str:
    """A name as a pattern that matches nothing else."""
    return name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 3, 0.4)
    return f"; the nearest names are {', '.join(near)}" if near else ""
