"""Command lines run in this process, each with its exit status and what it printed."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from dataclasses import dataclass
from typing import Any

from autoshard.cli import main


@dataclass(frozen=True)
class Ran:
    """What a command line did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document that is all of stdout."""
        return json.loads(self.out, parse_constant=refuse)

    @property
    def words(self) -> str:
        """stdout with its runs of blanks as one, so that tables can be searched."""
        return " ".join(self.out.split())


def refuse(text: str) -> None:
    """NaN and infinities are no JSON."""
    raise ValueError(f"{text} is no JSON")


def run(line: str) -> Ran:
    """`run("plan net.py:build --mesh dp=2")`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(shlex.split(line))
    return Ran(status, out.getvalue(), err.getvalue())


def refused(line: str, status: int = 2) -> str:
    """The text of the one line that a refused command prints; stdout stays empty."""
    ran = run(line)
    assert (ran.status, ran.out, ran.err.count("\n")) == (status, "", 1), ran
    assert ran.err.startswith("error: ")
    return ran.err.removeprefix("error: ").rstrip("\n")
