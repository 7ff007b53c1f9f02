"""What a command is, and the exit statuses that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from autoshard.cli.screen import Screen

# An interrupted command exits as a shell reports a signal: 128 + SIGINT; so does one whose reader has gone, with SIGPIPE.
FINE, NO, BAD_INPUT, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141


@dataclass(frozen=True)
class Command:
    """One command. help: its line in the list of all; examples: command lines for its own help; run: returns the exit status."""

    name: str
    help: str
    description: str
    examples: tuple[str, ...]
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Screen], int]

    @property
    def epilog(self) -> str:
        return "\n".join(["examples:", *(f"  {line}" for line in self.examples)])
