"""The op table: one row per op, in the notation of autoshard.equations.

A row is an equation, or a builder that writes one for a given call (autoshard.ops). The rest of a row says
what the equation cannot: the argument that holds a shape, the function that replaces the op when some factors are split
(a lowering, in autoshard.runtime), whether the op draws random numbers, and what dominates its time.
An op without a row is replicated, and the plan reports it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from autoshard.equations import parse
from autoshard.errors import RuleError
from autoshard.ops import RULES
from autoshard.ops.row import Rule


def rule_of(op: str) -> Rule | None:
    """The row of an op named like `aten.linear.default`, or None."""
    return RULES.get(op)


def register_rule(op: str, equation: str, *, bound: Literal["matmul", "memory"] = "matmul") -> None:
    """Add the row of a custom op: `register_rule("mylib::scale", "~b* i, i -> b* i")`.

    op: `namespace::name` or `namespace::name.overload`. equation: one operand per tensor argument, in schema order; a
    factor that the outputs lack is taken to be summed, write `[i]` where it is not. Sound only if the equation is:
    autoshard.testing.check_rule proves it by execution.
    Raises RuleError when the equation does not parse or the op does not exist.
    """
    parse(equation)
    namespace, _, name = op.partition("::")
    base, _, overload = name.partition(".")
    try:
        getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    except (AttributeError, RuntimeError) as error:
        raise RuleError(f"no op {op!r}: import or define it before registering its rule (write it as 'namespace::name')") from error
    RULES[f"{namespace}.{base}.{overload or 'default'}"] = Rule(equation, bound=bound)


def catalogue() -> str:
    """The page docs/ops.md: every row of the table with its equation and its lowering."""
    lines = [
        "# Op rules",
        "",
        "Every op that autoshard can split, by the equations of `autoshard/equations.py`; `tests/test_rules.py` proves each row by",
        "execution. Where the equation depends on the call, a builder in `autoshard/ops` writes it. A lowering replaces",
        "the op where one of the factors named is split. Made from the table, to be made anew when it changes:",
        "`python -c \"from autoshard.rules import catalogue; print(catalogue(), end='')\" > docs/ops.md`",
        "",
        "| op | equation | lowering |",
        "| --- | --- | --- |",
    ]
    for op, rule in sorted(RULES.items()):
        summary = (getattr(rule.equation, "__doc__", None) or "").partition("\n")[0]
        text = f"`{rule.equation}`" if isinstance(rule.equation, str) else f"{rule.equation.__name__}: {summary}"
        lowering = f"`{rule.lowering.function}` of {', '.join(sorted(rule.lowering.axes))}" if rule.lowering else ""
        lines.append(f"| `{op}` | {text.replace('|', '&#124;')} | {lowering} |")
    return "\n".join(lines) + "\n"


def describe(op: str) -> str:
    """The row as a line of the catalogue."""
    rule = RULES[op]
    text = rule.equation if isinstance(rule.equation, str) else f"<{rule.equation.__name__}>"
    parts: list[Any] = [text]
    if rule.lowering is not None:
        parts.append(f"{rule.lowering.function}({', '.join(sorted(set(rule.lowering.axes)))})")
    return "   ".join(parts)
