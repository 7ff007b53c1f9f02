"""What it takes to solve a plan again: its program before any layout was chosen, and the passes that follow.

The copy is made once per plan, of nodes and of what is known about them; constants, rules and equations are shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autoshard.instantiation import instantiate
from autoshard.placements import Layout
from autoshard.program import Program, example_sizes
from autoshard.runner import Pass, run_passes

if TYPE_CHECKING:
    from autoshard.hardware import Hardware


@dataclass(frozen=True)
class Resolver:
    """`program`: without layouts. `passes`: autoshard.passes from annotate_shardings on."""

    program: Program
    passes: tuple[Pass, ...]

    def solve(
        self,
        constraints: Mapping[str, str] | None = None,
        sizes: Mapping[str, int] | None = None,
        fixed_parameters: Mapping[str, Layout] | None = None,
    ) -> Program:
        """The program under further `constraints`, at other `sizes`, with parameters where `fixed_parameters` say; without source text.

        Raises ConstraintError and BudgetError as planning does.
        """
        from autoshard.passes import AnnotateShardings, EmitPrograms

        passes: list[Pass] = []
        for a_pass in self.passes:
            if isinstance(a_pass, AnnotateShardings):
                asked, fixed = {**a_pass.constraints, **(constraints or {})}, {**a_pass.fixed_parameters, **(fixed_parameters or {})}
                passes.append(replace(a_pass, constraints=asked, fixed_parameters=fixed))
            elif not isinstance(a_pass, EmitPrograms):
                passes.append(a_pass)
        return run_passes(passes, copied(self.program, sizes))

    @property
    def hardware(self) -> Hardware:
        """What the search was told of the devices."""
        return next(a_pass.hardware for a_pass in self.passes if hasattr(a_pass, "hardware"))


def copied(program: Program, sizes: Mapping[str, int] | None = None) -> Program:
    """A copy that passes may change, at other sizes where these are given."""
    new = instantiate(program, {**example_sizes(program), **(sizes or {})})
    new.notes, new.stats, new.passes = list(program.notes), dict(program.stats), list(program.passes)
    return new


def run_and_keep(passes: Sequence[Pass], program: Program, dump_dir: str | None = None) -> tuple[Program, Resolver]:
    """Run all passes, and keep what it takes to run those again that choose layouts."""
    from autoshard.passes import AnnotateShardings

    first = next(k for k, a_pass in enumerate(passes) if isinstance(a_pass, AnnotateShardings))
    program = run_passes(passes[:first], program, dump_dir)
    kept = copied(program)
    return run_passes(passes[first:], program, dump_dir, first), Resolver(kept, tuple(passes[first:]))
