"""The parser of all commands, and what becomes of errors: one line on stderr and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import autoshard
from autoshard.cli import doctor, planning, profiling, reading
from autoshard.cli.command import BAD_INPUT, INTERRUPTED, NO, READER_GONE, Command
from autoshard.cli.options import add_output_options
from autoshard.cli.screen import Screen
from autoshard.cli.user_model import describe, place_of
from autoshard.errors import AutoshardError

COMMANDS: tuple[Command, ...] = (*planning.COMMANDS, *reading.COMMANDS, *profiling.COMMANDS, *doctor.COMMANDS)
_DESCRIPTION = "A compiler that partitions an unmodified PyTorch model over a device mesh."
_EPILOG = (
    "exit status: 0 fine, 1 the answer is no (a plan differs, none fits the budget), 2 bad input, 130 interrupted\n"
    "autoshard COMMAND --help shows its options and examples"
)


class UsageError(Exception):
    """A command line that does not parse."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help shows what there is")


def main(given: Sequence[str] | None = None) -> int:
    """Run one command line (None: that of the process) -> its exit status. Prints its answer or its error, and raises nothing."""
    try:
        asked = parser().parse_args(given)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except SystemExit as done:  # of --help and --version
        return int(done.code or 0)
    screen = Screen(sys.stdout, sys.stderr, asked.json, asked.quiet, asked.debug)
    try:
        # What the caller's model prints while it is made and traced is no part of the answer.
        with contextlib.redirect_stdout(sys.stderr):
            return asked.run(asked, screen)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _leave_pipe()
        return READER_GONE
    except Exception as error:
        if asked.debug:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return NO if isinstance(error, planning.ANSWERS_NO) else BAD_INPUT


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    whole = _Parser(
        "autoshard", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    whole.add_argument("--version", action="version", version=f"autoshard {autoshard.__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for command in COMMANDS:
        one = commands.add_parser(
            command.name,
            help=command.help,
            description=command.description,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_options(one)
        add_output_options(one)
        one.set_defaults(run=command.run)
    return whole


def _one_line(error: Exception) -> str:
    """What an error says. One that is not autoshard's own is a fault of autoshard or torch, or of code that they call."""
    if isinstance(error, AutoshardError):
        lines = [line.strip() for line in str(error).splitlines()]
        return " ".join(line if line.endswith((".", ":", ";")) else f"{line};" for line in lines).removesuffix(";")
    return f"unexpected, {place_of(error).removeprefix(': ')}{describe(error)}; --debug shows the whole traceback"


def _leave_pipe() -> None:
    """Whoever read the output has gone: nothing that is still to be flushed may complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
