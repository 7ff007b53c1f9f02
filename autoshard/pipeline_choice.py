"""What a pipeline leaves open, chosen by predicted step time: the number of microbatches, and where memory is short the template.

Microbatches are tried from as many as there are ranks upwards, doubling, as long as the step gets shorter: more of them make the
bubble smaller and every op less efficient. Where the fastest layouts do not fit a memory budget, those of the templates that split
weights are tried. The model is traced once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from autoshard.constraints import Template
from autoshard.errors import AutoshardError, BudgetError, InputError
from autoshard.program import Program
from autoshard.resolving import Resolver, copied, run_and_keep
from autoshard.runner import Pass

_LEANER: tuple[Template, ...] = ("fsdp", "megatron_sp")  # templates that split weights
_MOST_DOUBLINGS = 3

PassesFor = Callable[[int, Template], Sequence[Pass]]


def choose(
    program: Program, passes_for: PassesFor, asked: int | None, template: Template, ranks: int, dump_dir: str | None, first: int
) -> tuple[Program, Resolver]:
    """Plan `program`, before split_microbatches, with the best of what is open.

    passes_for: the passes from there on, by number of microbatches and template. first: the number of the first of them.
    Raises what planning with the first number that divides the batch raises.
    """
    best: tuple[Program, Resolver] | None = None
    refusal: AutoshardError | None = None
    for count in (asked,) if asked is not None else _numbers(ranks):
        try:
            found = _fitting(program, passes_for, count, template, dump_dir, first)
        except InputError as error:  # this number does not divide the batch
            refusal = refusal or error
            continue
        except AutoshardError as error:
            if best is None and asked is not None:
                raise
            refusal = error
            continue
        if best is not None and _step_s(found[0]) >= _step_s(best[0]):
            break
        best = found
    if best is None and isinstance(refusal, InputError) and asked is None:
        return _fitting(program, passes_for, 1, template, dump_dir, first)
    if best is None:
        assert refusal is not None
        raise refusal
    return best


def _numbers(ranks: int) -> Iterator[int]:
    return (ranks * 2**k for k in range(_MOST_DOUBLINGS + 1))


def _step_s(program: Program) -> float:
    return program.stats["pipeline_s"]


def _fitting(
    program: Program, passes_for: PassesFor, count: int, template: Template, dump_dir: str | None, first: int
) -> tuple[Program, Resolver]:
    try:
        return run_and_keep(passes_for(count, template), copied(program), dump_dir, first)
    except BudgetError:
        if template != "auto":
            raise
        found = [plan for plan in (_tried(program, passes_for, count, leaner, first) for leaner in _LEANER) if plan is not None]
        if not found:
            raise
        best = min(found, key=lambda plan: _step_s(plan[0]))
        best[0].note("the layouts of the fastest plan do not fit the memory budget; these are the fastest of a template's that do")
        return best


def _tried(program: Program, passes_for: PassesFor, count: int, template: Template, first: int) -> tuple[Program, Resolver] | None:
    try:
        return run_and_keep(passes_for(count, template), copied(program), None, first)
    except AutoshardError:
        return None
