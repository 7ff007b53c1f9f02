"""The command line: `autoshard COMMAND ...`, the same as `python -m autoshard COMMAND ...`."""

from autoshard.cli.command_line import main

__all__ = ["main"]
