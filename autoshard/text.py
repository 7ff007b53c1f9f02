"""Programs as text for people: short dtypes, local shapes, sizes, and a listing of any intermediate graph."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx

from autoshard.placements import format_layout, local_shape
from autoshard.program import Facts, Program, facts
from autoshard.runtime.dtypes import short_dtype as short_dtype
from autoshard.symbolic import short


def describe_value(known: Facts, program: Program, index: int = 0) -> str:
    """`f32[4, 512]  S(0)@dp I@tp`: local shape and layout; the global shape while there is no layout."""
    value = known.values[index]
    if not known.layouts:
        return f"{short_dtype(value.dtype)}{_described(value.shape)}"
    layout = known.layouts[index]
    shape = local_shape(value.shape, layout, program.mesh.shape)
    lies = "" if program.mesh.is_alone else f"  {format_layout(layout, program.mesh)}"
    return f"{short_dtype(value.dtype)}{_described(shape or ())}{lies}"


def _described(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(short, shape))}]"


def listing(program: Program) -> str:
    """Every node of a program with its facts, one per line: what a dump between passes shows."""
    lines = [f"# mesh {program.mesh.whole}; passes: {', '.join(program.passes) or 'none'}"]
    for node in program.graph.nodes:
        known = facts(node)
        values = "; ".join(describe_value(known, program, k) for k in range(len(known.values)))
        flags = "".join(letter for letter, is_set in (("g", known.needs_grad), ("c", known.is_constant)) if is_set)
        lines.append(f"{known.role:<10} {flags:<2} {_line(node):<100} # {values}   {known.source}".rstrip())
    return "\n".join(lines) + "\n"


def _line(node: fx.Node) -> str:
    arguments = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
    return f"{node.name} = {node.target}({arguments})"


def human_bytes(count: float) -> str:
    """`12.6 MB`; decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """`1.23 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def fold_name(name: str) -> str:
    """A name without the numbers of repeated layers: `layers.3.mlp` is `layers.*.mlp`, the node `layers_3_mlp_add` `layers_*_mlp_add`."""
    return re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "*", name)
