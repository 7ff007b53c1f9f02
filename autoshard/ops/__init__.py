"""The op table: one file per family of ops holds its rows and the builders that write their equations."""

from autoshard.ops import (
    attention,
    contraction,
    convolution,
    embedding,
    experts,
    indexing,
    loss,
    normalization,
    pointwise,
    random,
    recurrent,
    reduction,
    shape,
)
from autoshard.ops.row import Rule

FAMILIES = (
    pointwise,
    random,
    contraction,
    convolution,
    recurrent,
    attention,
    embedding,
    indexing,
    experts,
    normalization,
    reduction,
    loss,
    shape,
)
RULES: dict[str, Rule] = {op: rule for family in FAMILIES for op, rule in family.ROWS.items()}


def lowerings() -> list[str]:
    """Names of the functions of autoshard.runtime that stand in for ops."""
    return sorted({rule.lowering.function for rule in RULES.values() if rule.lowering is not None})
