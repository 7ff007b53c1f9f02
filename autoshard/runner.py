"""Runs passes over a program: times each, checks the program after it, and dumps it where asked.

Whoever waits may listen: inside `with heard_by(listener)`, the listener gets the name of each pass before it runs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from autoshard.checker import check
from autoshard.program import Program
from autoshard.text import listing

Pass = Callable[[Program], Program]
Listener = Callable[[str], None]
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


def pass_name(a_pass: Pass) -> str:
    """`AnnotateShardings` is `annotate_shardings`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(a_pass).__name__).lower()


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """While this lasts, in this thread, `listener` gets what is announced: one short text each."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def announce(text: str) -> None:
    """Tell the listener, if there is one, what begins now."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(text)


def run_passes(passes: Sequence[Pass], program: Program, dump_dir: str | Path | None = None, first: int = 0) -> Program:
    """Run `passes` in order. dump_dir: a folder that gets the graph after each pass as `03_annotate_shardings.txt`.

    first: the number of the first of them, where others ran before.

    Raises PlacementError when a pass leaves a program that does not type-check, naming the pass.
    """
    for number, a_pass in enumerate(passes, first):
        name = pass_name(a_pass)
        announce(name)
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
