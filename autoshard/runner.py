"""Runs passes over a program: times each, checks the program after it, and dumps it where asked."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from autoshard.checker import check
from autoshard.program import Program
from autoshard.text import listing

Pass = Callable[[Program], Program]


def pass_name(a_pass: Pass) -> str:
    """`AnnotateShardings` is `annotate_shardings`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(a_pass).__name__).lower()


def run_passes(passes: Sequence[Pass], program: Program, dump_dir: str | Path | None = None, first: int = 0) -> Program:
    """Run `passes` in order. dump_dir: a folder that gets the graph after each pass as `03_annotate_shardings.txt`.

    first: the number of the first of them, where others ran before.

    Raises PlacementError when a pass leaves a program that does not type-check, naming the pass.
    """
    for number, a_pass in enumerate(passes, first):
        name = pass_name(a_pass)
        started = time.perf_counter()
        program.passes.append(name)
        program = a_pass(program)
        program.stats[f"{name.partition('_')[0]}_s"] = time.perf_counter() - started
        program.graph.lint()
        if program.is_typed:
            check(program)
        if dump_dir is not None:
            folder = Path(dump_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02d}_{name}.txt").write_text(listing(program))
    return program
