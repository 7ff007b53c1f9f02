"""Ops that write elsewhere than an op of the same name without `_` would say: `div.out`, `topk.values`, `__iand__`, `pow_`.

    torch.div(x, y, out=z)    div.out(x, y, out=z)    =>  copy_(z, div.Tensor(x, y))
    mask &= other             __iand__.Tensor(a, b)   =>  copy_(a, __and__.Tensor(a, b))

Which functional op computes the same is read off the schemas: the one with the same arguments, but what is written, that
writes none. copy_ has the dtype of what is written, and is functionalised like every other in-place op.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autoshard.errors import TraceError
from autoshard.ops.row import TensorInfo
from autoshard.program import Program, facts, set_facts

aten = torch.ops.aten


def expand_out_variants(program: Program) -> None:
    """Rewrite such ops everywhere in the traced graph. Raises TraceError where `out` would change its shape."""
    owner = program.graph.owning_module
    assert owner is not None
    for graph in (module.graph for module in owner.modules() if isinstance(module, fx.GraphModule)):
        for node in list(graph.nodes):
            op = node.target
            functional = functional_form(op) if isinstance(op, torch._ops.OpOverload) else None
            if functional is not None:
                _expand(node, op, functional)


def functional_form(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """What `op` computes, as an op that writes nothing; None for an op that does not write, draws random numbers, or is named as usual."""
    written = _written(op)
    if not written or torch.Tag.nondeterministic_seeded in op.tags:
        return None
    name = op._schema.name.partition("::")[2]
    kept = [str(a.type) for a in op._schema.arguments if not a.is_out]
    if len(kept) == len(op._schema.arguments):  # in place
        is_operator = name.startswith("__i")
        plain = f"__{name[3:]}" if is_operator else name.removesuffix("_")
        if plain == name or (not is_operator and hasattr(getattr(aten, plain, None), op._overloadname)):
            return None
        name = plain
    packet = getattr(getattr(torch.ops, op.namespace), name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    alike = (o for o in overloads if not _written(o) and [str(a.type) for a in o._schema.arguments] == kept)
    return next(alike, None)


def _written(op: torch._ops.OpOverload) -> list[str]:
    """Names of the arguments that an op writes."""
    return [argument.name for argument in op._schema.arguments if argument.alias_info is not None and argument.alias_info.is_write]


def _expand(node: fx.Node, op: torch._ops.OpOverload, functional: torch._ops.OpOverload) -> None:
    """The functional op, and a copy of each of its results to what `node` writes."""
    schema, names = op._schema.arguments, _written(op)
    bound = {**dict(zip((a.name for a in schema), node.args, strict=False)), **node.kwargs}
    places: list[Any] = [bound[name] for name in names]
    outs = {argument.name for argument in schema if argument.is_out}
    kwargs = {name: value for name, value in node.kwargs.items() if name not in outs}
    values = _values(functional, node.args, kwargs)
    known = facts(node)
    infos = [TensorInfo(info.shape, value.dtype) for info, value in zip(known.values, values, strict=True)]
    with node.graph.inserting_before(node):
        call = _add(node, functional, node.args, kwargs, infos, values)
        results = [call]
        if len(places) > 1:
            results = [_add(node, operator.getitem, (call, k), {}, [info], [values[k]]) for k, info in enumerate(infos)]
        kept = [_kept(node, place, result) for place, result in zip(places, results, strict=True)]
    if len(places) == 1:
        node.replace_all_uses_with(kept[0])
    for user in list(node.users):
        user.replace_all_uses_with(kept[user.args[1]])  # type: ignore[index]
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _values(functional: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What the functional op returns, as the fake tensors of the trace tell."""
    given = fx.map_arg((args, kwargs), lambda operand: operand.meta["val"])
    with torch.no_grad():
        found = functional(*given[0], **given[1])
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _add(node: fx.Node, target: Any, args: tuple, kwargs: dict, infos: Sequence[TensorInfo], values: Sequence[torch.Tensor]) -> fx.Node:
    """A node of the traced graph that stands where `node` does."""
    new = node.graph.call_function(target, args, kwargs)
    new.meta["val"] = values[0] if len(values) == 1 else list(values)
    set_facts(new, replace(facts(node), values=tuple(infos)))
    return new


def _kept(node: fx.Node, place: fx.Node, result: fx.Node) -> fx.Node:
    """`place` with its new value. An empty one becomes as large as the result, which then takes its place."""
    old, new = facts(place).value, facts(result).value
    if old.shape == new.shape:
        return _add(node, aten.copy_.default, (place, result), {}, [old], [place.meta["val"]])
    if 0 not in old.shape or not isinstance(place.target, torch._ops.OpOverload) or _is_view(place.target):
        raise TraceError(
            f"{node.target} changes the shape of {place.name}, {list(old.shape)}, at {facts(node).source}; "
            f"give it an out of shape {list(new.shape)}"
        )
    cast = _add(node, aten.to.dtype, (result, old.dtype), {}, [replace(new, dtype=old.dtype)], [result.meta["val"].to(old.dtype)])
    place.replace_all_uses_with(cast, delete_user_cb=lambda user: user > node)
    return cast


def _is_view(op: torch._ops.OpOverload) -> bool:
    return any(result.alias_info is not None for result in op._schema.returns)
