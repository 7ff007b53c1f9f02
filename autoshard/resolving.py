"""What it takes to solve a plan again: its program before any layout was chosen, and the passes that follow.

The copy is made once per plan, of nodes and of what is known about them; constants, rules and equations are shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoshard.constraints import Template
from autoshard.instantiation import instantiate
from autoshard.placements import Layout
from autoshard.program import Program, example_sizes
from autoshard.runner import Pass, run_passes


@dataclass(frozen=True)
class Resolver:
    """`program`: without layouts. `passes`: autoshard.passes from annotate_shardings on."""

    program: Program
    passes: tuple[Pass, ...]

    def solve(
        self, overrides: Mapping[str, str] | None = None, sizes: Mapping[str, int] | None = None, template: Template | None = None
    ) -> Program:
        """The program with `overrides` in place of what else is asked of the values they name, at other `sizes`; without source text.

        template: in place of the one that the plan was made under. Raises ConstraintError and BudgetError as planning does.
        """
        from autoshard.passes import AnnotateShardings, EmitPrograms

        asked: dict[str, Any] = {"overrides": dict(overrides or {}), **({"template": template} if template else {})}
        kept = (a_pass for a_pass in self.passes if not isinstance(a_pass, EmitPrograms))
        passes = [replace(a_pass, **asked) if isinstance(a_pass, AnnotateShardings) else a_pass for a_pass in kept]
        return run_passes(passes, copied(self.program, sizes))

    @property
    def fixed_parameters(self) -> Mapping[str, Layout]:
        """Parameters whose layouts were given: those of a plan that was reused, or of a model that is sharded already."""
        from autoshard.passes import AnnotateShardings

        return next((a_pass.fixed_parameters for a_pass in self.passes if isinstance(a_pass, AnnotateShardings)), {})


def copied(program: Program, sizes: Mapping[str, int] | None = None) -> Program:
    """A copy that passes may change, at other sizes where these are given."""
    new = instantiate(program, {**example_sizes(program), **(sizes or {})})
    new.notes, new.stats, new.passes = list(program.notes), dict(program.stats), list(program.passes)
    return new


def run_and_keep(passes: Sequence[Pass], program: Program, dump_dir: str | None = None, number: int = 0) -> tuple[Program, Resolver]:
    """Run all passes, the first of which has `number`, and keep what it takes to run those again that choose layouts."""
    from autoshard.passes import AnnotateShardings

    first = next(k for k, a_pass in enumerate(passes) if isinstance(a_pass, AnnotateShardings))
    program = run_passes(passes[:first], program, dump_dir, number)
    kept = copied(program)
    return run_passes(passes[first:], program, dump_dir, number + first), Resolver(kept, tuple(passes[first:]))
