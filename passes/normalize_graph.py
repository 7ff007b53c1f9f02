"""normalize_graph: one flat graph of functional ops, without asserts and dead nodes, with stable names and gradient flow.

No-grad regions are inlined and their results detached. In-place ops become functional ones where no other view of the
tensor is read afterwards, else the model is refused. What a model writes into its buffers becomes an update at the end.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoshard.conversions import BY_NAME
from autoshard.equation_builders import TensorInfo
from autoshard.errors import TraceError
from autoshard.program import Facts, Program, facts, producer, set_facts, tensor_operands
from autoshard.rules import RULES

aten = torch.ops.aten
_DROPPED = {"aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten._assert_async.msg"}
_CASTS = {"aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.type_as.default", "aten.alias.default", "aten.lift_fresh_copy.default"}
# What the emitted text itself calls by these names, besides the mesh axes.
_RESERVED = {"self", "torch", "aten", "Program", *BY_NAME, *(rule.lowering.function for rule in RULES.values() if rule.lowering)}
_WITHOUT_GRADIENT = re.compile(r"aten\.(detach|zeros_like|ones_like|full_like|empty_like|rand_like|randn_like|new_\w+)\.")


@dataclass(frozen=True)
class NormalizeGraph:
    """Rebuild the traced graph in normal form. Raises TraceError for what cannot be partitioned soundly."""

    def __call__(self, program: Program) -> Program:
        owner = program.graph.owning_module
        writer = _Writer(program, owner)
        last_use = {operand: k for k, node in enumerate(program.graph.nodes) for operand in node.all_input_nodes}
        for position, node in enumerate(program.graph.nodes):
            writer.position = position
            writer.last_use = last_use
            writer.copy(node)
        program.graph = writer.graph
        _drop_dead(program)
        return program


class _Writer:
    """Copies nodes one by one into a new graph."""

    def __init__(self, program: Program, owner: Any) -> None:
        self.program, self.owner, self.graph = program, owner, fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.aliases: dict[fx.Node, fx.Node] = {}  # old node -> the old node whose memory it shares
        self.updates: dict[fx.Node, fx.Node] = {}  # buffer -> its new value
        self.position, self.last_use = 0, {}

    def copy(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.env[node] = self._create("placeholder", self._identifier(facts(node).name), (), {}, facts(node), facts(node).name)
        elif node.op == "output":
            self._finish(node)
        elif node.op == "get_attr":
            self.env[node] = getattr(self.owner, str(node.target))
        elif str(node.target) in _DROPPED:
            pass
        elif node.target is operator.getitem:
            self.env[node] = self._project(node)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            self._inline(node)
        elif isinstance(node.target, torch._ops.OpOverload):
            self._copy_op(node)
        else:
            raise TraceError(f"{node.target} at {facts(node).source} is neither a torch op nor known to autoshard")

    def _map(self, value: Any) -> Any:
        return fx.map_arg(value, lambda operand: self.env[operand])

    def _copy_op(self, node: fx.Node) -> None:
        schema, target = node.target._schema, node.target  # type: ignore[union-attr]
        args, kwargs = self._map(node.args), self._map(node.kwargs)
        returns_alias = any(result.alias_info is not None for result in schema.returns)
        mutated = [k for k, argument in enumerate(schema.arguments) if argument.alias_info is not None and argument.alias_info.is_write]
        if mutated:
            self._make_functional(node, args, kwargs)
            return
        if returns_alias and node.all_input_nodes:
            self.aliases[node] = self._root(node.all_input_nodes[0])
        source = args[0] if args else None
        if str(target) in _CASTS and isinstance(source, fx.Node) and facts(source).value.dtype == facts(node).value.dtype:
            self.env[node] = source
            return
        if target is aten.view.default:  # a view's strides are those of the traced device and mode
            target = aten.reshape.default
        elif str(target).startswith("aten.squeeze."):  # drops dims by length, and local lengths differ
            target, args = aten.reshape.default, (source, list(facts(node).value.shape))
        self.env[node] = self._call(target, args, kwargs, facts(node))

    def _root(self, node: fx.Node) -> fx.Node:
        return self.aliases.get(node, node)

    def _make_functional(self, node: fx.Node, args: tuple, kwargs: dict) -> None:
        name, overload = node.target._schema.name.split("::")[1], node.target._overloadname  # type: ignore[union-attr]
        written, root = node.args[0], self._root(node.args[0])  # type: ignore[arg-type]
        sharing = {other for other in (*self.aliases, root) if self._root(other) is root and other not in (written, node)}
        read_later = [other for other in sharing if self.last_use.get(other, -1) > self.position]
        packet = getattr(aten, name.rstrip("_"), None)
        functional = getattr(packet, overload, None) if name.endswith("_") and name != "copy_" else None
        if read_later or functional is None:
            what = f"{node.target} writes into memory that {read_later[0].name} reads later" if read_later else f"{node.target} has no functional form"
            raise TraceError(f"{what}, at {facts(node).source}; write the model without this in-place op")
        self.env[node] = self.env[written] = self._call(functional, args, kwargs, facts(node))  # type: ignore[index]
        self.aliases[node] = root
        if facts(root).role in ("buffer", "parameter") and root.op == "placeholder":
            self.updates[args[0]] = self.env[node]

    def _inline(self, node: fx.Node) -> None:
        if str(node.target) != "wrap_with_set_grad_enabled":
            raise TraceError(f"{node.target} at {facts(node).source} is not supported: autocast regions and control flow cannot be partitioned yet")
        enabled, body, *operands = self._map(node.args)
        for sub in body.graph.nodes:
            if sub.op == "placeholder":
                self.env[sub] = operands.pop(0)
            elif sub.op == "output":
                results = self._map(sub.args[0])
                self.env[node] = [r if enabled or not isinstance(r, fx.Node) else self._detach(r) for r in results]
            else:
                self.copy(sub)

    def _detach(self, node: fx.Node) -> fx.Node:
        return self._call(aten.detach.default, (node,), {}, facts(node)) if facts(node).needs_grad else node

    def _project(self, node: fx.Node) -> Any:
        source, index = self.env[node.args[0]], node.args[1]  # type: ignore[index]
        if isinstance(source, (list, tuple)):
            return source[index]  # type: ignore[index]
        value = facts(source).values[index]  # type: ignore[index]
        return self._create("call_function", operator.getitem, (source, index), {}, Facts("projection", (value,), source=facts(source).source))

    def _call(self, target: Any, args: tuple, kwargs: dict, old: Facts) -> fx.Node:
        node = self._create("call_function", target, args, kwargs, Facts("op", old.values, source=old.source))
        flows = any(facts(p).values[k].needs_grad for p, k in map(producer, tensor_operands(node))) and not _WITHOUT_GRADIENT.match(str(target))
        facts(node).values = tuple(TensorInfo(v.shape, v.dtype, flows and v.dtype.is_floating_point) for v in old.values)
        return node

    def _create(self, op: str, target: Any, args: tuple, kwargs: dict, new: Facts, name: str = "") -> fx.Node:
        base = name or "_".join(part for part in (new.source.module, getattr(target, "__name__", "op").split(".")[0]) if part)
        node = self.graph.create_node(op, target, args, kwargs, name=self._identifier(base))
        set_facts(node, new)
        return node

    def _identifier(self, text: str) -> str:
        """`text` as a variable of the emitted program, which must not hide what the program calls."""
        name = re.sub(r"\W", "_", text)
        if name in _RESERVED or name in self.program.mesh.axes:
            return f"{name}_"
        return name if not name[:1].isdigit() else f"_{name}"

    def _finish(self, output: fx.Node) -> None:
        for buffer, value in self.updates.items():
            node = self.graph.call_function(aten.copy_.default, (buffer, value))
            set_facts(node, Facts("update", facts(buffer).values, name=facts(buffer).name))
        node = self.graph.output(self._map(output.args[0]))
        set_facts(node, Facts("output"))


def _drop_dead(program: Program) -> None:
    for node in reversed(list(program.graph.nodes)):
        role = facts(node).role
        is_alias = role == "parameter" and facts(node).name in program.aliases
        if not node.users and (is_alias or role in ("projection", "buffer") or role == "op" and not _has_effect(node)):
            program.graph.erase_node(node)


def _has_effect(node: fx.Node) -> bool:
    """Whether an op without users still writes running statistics."""
    return str(node.target) == "aten.batch_norm.default"

