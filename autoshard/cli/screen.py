"""Where a command's answer goes: text for people or one JSON document on stdout, what passes by on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from autoshard.mesh import MeshSpec
from autoshard.runner import heard_by

_PIPE_WIDTH = 120  # columns of tables where no terminal says how many it has


class _Console(Console):
    """A console that leaves a reader who has gone to the caller; rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(file: TextIO) -> Console:
    console = _Console(file=file, highlight=False)
    return console if console.is_terminal else _Console(file=file, highlight=False, width=max(console.width, _PIPE_WIDTH))


@dataclasses.dataclass(frozen=True)
class Screen:
    """is_json: stdout gets one JSON document and nothing else. is_quiet: no text for people at all, and no progress.

    is_debug: nothing that torch logs or prints is held back.
    """

    stdout: TextIO
    stderr: TextIO
    is_json: bool = False
    is_quiet: bool = False
    is_debug: bool = False

    def answer(self, data: Any, *shown: RenderableType) -> None:
        """The answer of a command: `data` as JSON where that was asked for, else `shown`, of which texts are printed as they are."""
        if self.is_json:
            self.document(as_json(data))
        elif not self.is_quiet:
            for item in shown:
                if isinstance(item, str):
                    self.stdout.write(item.rstrip("\n") + "\n")
                else:
                    _console(self.stdout).print(item)
        self.stdout.flush()

    def document(self, text: str) -> None:
        """JSON that is text already."""
        self.stdout.write(text.rstrip("\n") + "\n")

    def note(self, text: str) -> None:
        """One line on stderr that the reader should know, beside the answer."""
        if not self.is_quiet:
            print(f"note: {text}", file=self.stderr)

    @contextlib.contextmanager
    def working(self, title: str) -> Iterator[None]:
        """A spinner with the pass that runs now and the time it has taken, on stderr if that is a terminal."""
        console = _console(self.stderr)
        if self.is_quiet or not (self.stderr.isatty() and console.is_interactive):
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(title, total=None)
            with heard_by(lambda text: progress.update(task, description=f"{title}: {text}")):
                yield

    @contextlib.contextmanager
    def tracing(self, title: str) -> Iterator[None]:
        """As `working`, for work that traces a model: where tracing fails, the error alone is shown, not torch's graphs and logs."""
        if self.is_debug:
            with self.working(title):
                yield
            return
        printed, level = io.StringIO(), logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with self.working(title), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                yield
        finally:
            logging.disable(level)
        self.stderr.write(printed.getvalue())


def as_json(data: Any) -> str:
    """JSON of dataclasses, mappings, sequences, paths and meshes; a number that is not finite is null."""
    return json.dumps(_plain(data), indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, MeshSpec):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value)
