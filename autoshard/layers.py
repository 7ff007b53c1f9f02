"""Layers: the repeated parts of a model, which backward may run again instead of keeping what they hold.

A layer is a module that a list holds (`layers.3`, `h.0`), at the innermost level that still holds most of the ops: blocks
rather than stages, and rather than the experts of a block. Each unbroken run of its ops counts as one, so a module that
is called twice gives two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx

from autoshard.program import Program, facts
from autoshard.regions import statistics

_FEWEST_OPS = 4  # with a gradient, on average of the members of a list: below, keeping the input costs about as much
_MOST = 0.8  # share of a list's ops that the lists inside it must hold to stand for it


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer, or one call of it: `path` of the module, and its nodes in order."""

    path: str
    nodes: tuple[fx.Node, ...]


def find_layers(program: Program) -> list[Layer]:
    """Layers of a normalised program, in order. What the model itself checkpoints is none, nor what reads a buffer that it writes."""
    ops = [node for node in program.nodes("op") if not facts(node).is_constant]
    runs: dict[str, list[list[fx.Node]]] = {}  # of every path that ends in a number
    open_paths: set[str] = set()
    for node in ops:
        own = set(_numbered(facts(node).source.module)) if facts(node).recompute is None else set()
        for path in own:
            if path not in open_paths:
                runs.setdefault(path, []).append([])
            runs[path][-1].append(node)
        open_paths = own
    lists: dict[str, list[int]] = {}
    for path, parts in runs.items():
        lists.setdefault(re.sub(r"\b\d+\b", "*", path), []).extend(sum(facts(node).needs_grad for node in part) for part in parts)
    held = {pattern: sum(counts) for pattern, counts in lists.items() if sum(counts) >= _FEWEST_OPS * len(counts)}
    chosen: set[str] = set()
    for pattern in sorted(held, key=len):  # from outside in
        outer = {other for other in chosen if pattern.startswith(other + ".")}
        if all(held[pattern] >= _MOST * held[other] for other in outer):
            chosen = chosen - outer | {pattern}
    found = [Layer(path, tuple(part)) for path, parts in runs.items() if re.sub(r"\b\d+\b", "*", path) in chosen for part in parts]
    place = {node: k for k, node in enumerate(ops)}
    return sorted((layer for layer in found if _may_run_again(layer)), key=lambda layer: place[layer.nodes[0]])


def _numbered(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: k + 1]) for k, part in enumerate(parts) if part.isdigit()]


def _may_run_again(layer: Layer) -> bool:
    """Whether some op has a gradient, none stands in a branch, and a buffer that the model writes is read as running statistics alone."""
    if not any(facts(node).needs_grad for node in layer.nodes) or any(facts(node).branch for node in layer.nodes):
        return False
    for node in layer.nodes:
        for buffer in (operand for operand in node.all_input_nodes if facts(operand).role == "buffer"):
            is_written = any(facts(user).role == "update" or buffer in statistics(user) for user in buffer.users)
            if is_written and buffer not in statistics(node):
                return False
    return True
