"""One use or more of every op that has a row: a file per family of ops, as in autoshard/ops."""

from importlib import import_module

from autoshard.ops import FAMILIES
from uses.arguments import Use

USES: dict[str, list[Use]] = {}
for family in FAMILIES:
    USES |= import_module(f"uses.{family.__name__.rpartition('.')[2]}").USES
