"""Bags of embeddings in a traced graph: aten.embedding_bag, of which models read one of four results, becomes an op with that one.

Indices in two dims, bags of one length, are traced as a flat list and the offsets 0, k, 2k, ...: such bags get their two dims
back, and can be split then.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from autoshard import runtime
from autoshard.program import Facts, Program, arguments, facts, op_name, set_facts

_MODES = ("sum", "mean", "max")
_BAGS = ("aten.embedding_bag.default", "aten.embedding_bag.padding_idx")


def rewrite_bags(program: Program) -> None:
    """Replace every aten.embedding_bag whose last three results nobody reads by a node that calls runtime.embedding_bag."""
    for node in program.nodes("op"):
        users = {user for user in node.users if user.users}
        if op_name(node) in _BAGS and all(user.target is operator.getitem and user.args[1] == 0 for user in users):
            _rewrite(program, node)


def _rewrite(program: Program, node: fx.Node) -> None:
    given, known = arguments(node), facts(node)
    padding = given.get("padding_idx")
    options = {
        "mode": _MODES[given["mode"]],
        **({} if padding is None else {"padding_idx": padding % facts(given["weight"]).value.shape[0]}),
        **{name: True for name in ("include_last_offset", "scale_grad_by_freq", "sparse") if given[name]},
    }
    listed = (given["indices"], given["offsets"], given["per_sample_weights"])
    with program.graph.inserting_before(node):
        operands = (given["weight"], *(_in_two_dims(*listed) or listed))
        bags = program.graph.create_node("call_function", runtime.embedding_bag, operands, options, name=f"{node.name}_bags")
    set_facts(bags, Facts("op", known.values[:1], source=known.source, autocast=known.autocast, recompute=known.recompute))
    for user in list(node.users):
        if user.users:
            user.replace_all_uses_with(bags)
        program.graph.erase_node(user)
    program.graph.erase_node(node)


def _in_two_dims(indices: fx.Node, offsets: fx.Node, weights: fx.Node | None) -> tuple[fx.Node, None, fx.Node | None] | None:
    """Indices (bags, length) and their weights, where the list and the offsets were made of them."""
    table, weighted = _flattened(indices), None if weights is None else _flattened(weights)
    if table is None or op_name(offsets) != "aten.arange.start_step" or (weights is not None and weighted is None):
        return None
    bags, length = facts(table).value.shape
    starts = arguments(offsets)
    is_regular = (starts["start"], starts["end"], starts["step"]) == (0, bags * length, length)
    is_weighted_alike = weighted is None or facts(weighted).value.shape == facts(table).value.shape
    return (table, None, weighted) if is_regular and is_weighted_alike else None


def _flattened(node: Any) -> fx.Node | None:
    """The matrix that `node` is the list of."""
    if facts(node).role != "op" or op_name(node) not in ("aten.reshape.default", "aten.view.default", "aten.flatten.using_ints"):
        return None
    matrix = node.args[0]
    return matrix if len(facts(matrix).value.shape) == 2 and len(facts(node).value.shape) == 1 else None
