"""normalize_graph: one flat graph of functional ops, without asserts and dead nodes, with stable names and gradient flow.

No-grad regions are inlined and their results detached; autocast regions are inlined, and each op remembers in which it
runs. A weight that such an op casts is cast by a node of its own, so that it can be gathered after the cast. In-place ops
become functional ones: what they write goes back through the views to the tensor that has the memory, and other views of it
are made anew where they are read. What a model writes into its buffers becomes an update at the end. A mixture of experts becomes one op.
"""

from __future__ import annotations

import itertools
import operator
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from autoshard import runtime
from autoshard.autocast import inside
from autoshard.branches import drop_without_result
from autoshard.conversions import BY_NAME
from autoshard.embedding_bags import rewrite_bags
from autoshard.errors import TraceError
from autoshard.expert_regions import fuse_experts, report_experts
from autoshard.ops import lowerings
from autoshard.ops.random import SHAPE_ALONE
from autoshard.ops.row import TensorInfo, is_differentiable
from autoshard.out_variants import expand_out_variants
from autoshard.program import Facts, Program, carries_gradient, draws_random, facts, producer, set_facts, writes_statistics
from autoshard.torch_internals import result_of
from autoshard.views import shares_memory, write_back

aten = torch.ops.aten
_DROPPED = {"aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten._assert_async.msg"}
# Higher-order ops whose body is inlined -> where the body stands among their arguments; the operands follow it.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
# Ops that autocast runs in its dtype on every device, weights cast like activations.
_CAST_INSIDE = {f"aten.{name}.default" for name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d")}
_CAST_INSIDE |= {f"aten.conv{n}d.padding" for n in (1, 2, 3)}
# In-place random ops whose functional form has another name.
_FUNCTIONAL = {"aten.bernoulli_.float": aten.bernoulli.p, "aten.normal_.default": aten.normal_functional.default}
_CASTS = {
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.to.device",
    "aten.type_as.default",
    "aten.alias.default",
    "aten.lift_fresh_copy.default",
}
# In-place ops whose functional form has the dtype of its first operand whatever the others have.
_KEEPS_DTYPE = ("fill", "masked_", "index_", "scatter")
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
# Ops that take of their first operand the dtype and device alone; what is empty is made zero, so that no run differs from another.
_FACTORIES = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
    aten.new_empty.default: aten.zeros.default,
}
_NO_WRITING = "let the branch return a new value, and write that behind the cond"
# What the emitted text itself calls by these names, besides the mesh axes.
_RESERVED = {"self", "torch", "aten", "Program", *BY_NAME, *lowerings()}


@dataclass(frozen=True)
class NormalizeGraph:
    """Rebuild the traced graph in normal form. Raises TraceError for what cannot be partitioned soundly."""

    def __call__(self, program: Program) -> Program:
        expand_out_variants(program)
        writer = _Writer(program, program.graph.owning_module)
        writer.memory.read(program.graph, program.graph.owning_module)
        for node in program.graph.nodes:
            writer.copy(node)
        program.graph = writer.graph
        fuse_experts(program)
        rewrite_bags(program)
        _drop_dead(program)
        drop_without_result(program)
        report_experts(program)
        return program


class _Memory:
    """Which traced nodes share memory, and when each is last read; no-grad regions count as if they stood in the graph.

    root: of a view, the node whose memory it shares. same: of a node that is another node's very tensor, that node.
    viewed: of a view, the node that it is a view of.
    bodies: the no-grad region that a node is made in, if any.
    """

    def __init__(self) -> None:
        self.root: dict[fx.Node, fx.Node] = {}
        self.same: dict[fx.Node, fx.Node] = {}
        self.viewed: dict[fx.Node, fx.Node] = {}
        self.position: dict[fx.Node, int] = {}
        self.last_read: dict[fx.Node, int] = {}
        self.bodies: dict[fx.Node, fx.Node | None] = {}
        self.results: dict[fx.Node, list[Any]] = {}

    def read(self, graph: fx.Graph, owner: Any, body: fx.Node | None = None) -> None:
        for node in graph.nodes:
            self.position[node], self.bodies[node] = len(self.position), body
            for operand in node.all_input_nodes:
                for read in (operand, self.identity(operand)):
                    self.last_read[read] = self.position[node]
            if isinstance(node.target, torch._ops.HigherOrderOperator) and str(node.target) in _REGIONS:
                self._read_region(node, owner, node if str(node.target) == "wrap_with_set_grad_enabled" else body)
            elif isinstance(node.target, torch._ops.OpOverload) and node.all_input_nodes:
                first = node.all_input_nodes[0]
                if _writes(node):
                    self.same[node] = self.identity(first)
                if _writes(node) or _returns_alias(node, first):
                    self.root[node], self.viewed[node] = self.memory_of(first), first
            elif node.target is operator.getitem:
                source, index = node.args
                result = self.results[source][index] if source in self.results else None
                if isinstance(result, fx.Node):
                    self.same[node], self.root[node] = self.identity(result), self.memory_of(result)
                elif source in self.root:
                    self.root[node], self.viewed[node] = self.root[source], source

    def _read_region(self, node: fx.Node, owner: Any, body: fx.Node | None) -> None:
        place = _REGIONS[str(node.target)]
        module = getattr(owner, str(node.args[place].target))  # type: ignore[union-attr]
        sub = module.graph
        placeholders = [inner for inner in sub.nodes if inner.op == "placeholder"]
        for inner, operand in zip(placeholders, node.args[place + 1 :], strict=True):
            self.same[inner], self.root[inner] = self.identity(operand), self.memory_of(operand)  # type: ignore[arg-type]
        self.read(sub, module, body)
        self.results[node] = list(next(iter(reversed(sub.nodes))).args[0])

    def identity(self, node: fx.Node) -> fx.Node:
        return self.same.get(node, node)

    def memory_of(self, node: fx.Node) -> fx.Node:
        return self.root.get(node, node)

    def read_after(self, node: fx.Node) -> fx.Node | None:
        """A view made before `node` of the memory that it writes, other than the tensor it writes to, that is read afterwards."""
        own, root, now = self.identity(node), self.memory_of(node), self.position[node]
        before = itertools.takewhile(lambda other: self.position[other] < now, self.position)
        views = (other for other in before if self.memory_of(other) is root and self.identity(other) is not own)
        return next((other for other in views if self.last_read.get(other, -1) > now), None)


def _writes(node: fx.Node) -> bool:
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in node.target._schema.arguments)  # type: ignore[union-attr]


def _returns_alias(node: fx.Node, first: fx.Node) -> bool:
    """Whether the result shares its first operand's memory. Dropout that drops nothing returns its very operand."""
    if "dropout" in str(node.target):
        bound = {**dict(zip(("input", "p", "train"), node.args, strict=False)), **node.kwargs}
        return not (bound.get("train") and bound.get("p"))
    return any(result.alias_info is not None for result in node.target._schema.returns) and shares_memory(node, first)  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Unknown:
    """Stands for a number that a traced node computes in a way that programs cannot."""

    node: fx.Node


class _Writer:
    """Copies nodes one by one into a new graph."""

    def __init__(self, program: Program, owner: Any) -> None:
        self.program, self.owner, self.graph = program, owner, fx.Graph()
        self.env: dict[fx.Node, Any] = {}  # traced tensor, by its identity -> its value now
        self.detached: dict[fx.Node, fx.Node] = {}  # what enters a no-grad region with a gradient -> the same without
        self.weights: dict[tuple, fx.Node] = {}  # parameter, dtype, stretch -> the parameter in that dtype
        self.stretch = 0  # number of autocast regions entered so far; export cuts one where no_grad begins and ends inside it
        self.memory = _Memory()
        self.writes: dict[fx.Node, int] = {}  # traced root -> how often views of it were written through to it
        self.made: dict[fx.Node, int] = {}  # traced view, by its identity -> the same number when its value was made
        self.placeholders: dict[fx.Node, fx.Node] = {}  # traced -> new
        self.updates: dict[fx.Node, fx.Node] = {}  # traced buffer -> its new value

    def copy(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.env[node] = self._create("placeholder", self._identifier(facts(node).name), (), {}, facts(node), facts(node).name)
            self.placeholders[node] = self.env[node]
        elif node.op == "output":
            self._finish(node)
        elif node.op == "get_attr":
            self.env[node] = getattr(self.owner, str(node.target))
        elif str(node.target) in _DROPPED:
            pass
        elif facts(node).number is not None:  # a size: arguments that use it hold its expression
            self.env[node] = facts(node).number
        elif isinstance(node.meta.get("val"), _SYMBOLIC):
            self.env[node] = _Unknown(node)
        elif node.target is operator.getitem:
            self._project(node)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            self._inline(node)
        elif isinstance(node.target, torch._ops.OpOverload):
            self._copy_op(node)
        else:
            raise TraceError(f"{node.target} at {facts(node).source} is neither a torch op nor known to autoshard")

    def _map(self, value: Any) -> Any:
        return fx.map_arg(value, self._now)

    def _now(self, node: fx.Node) -> Any:
        if node in self.detached:
            return self.detached[node]
        own = self.memory.identity(node)
        if self.made.get(own, 0) < self.writes.get(self.memory.memory_of(own), 0):
            self._make_anew(own)
        found = self.env[own]
        if isinstance(found, _Unknown):
            raise TraceError(
                f"{found.node.target} at {facts(found.node).source} computes {found.node.meta['val']}, which programs cannot compute "
                "from the sizes of arguments; write it with + - * // % of sizes, or leave the size out of dynamic"
            )
        return found

    def _make_anew(self, view: fx.Node) -> None:
        """The value of a view after the memory that it shows was written."""
        memory, root = self.memory, self.memory.memory_of(view)
        self.made[view] = self.writes[root]
        if view is root:
            return
        if memory.bodies[view] is not memory.bodies[root] and facts(self._now(root)).needs_grad:
            raise TraceError(
                f"{view.name} views, without gradient, memory with a gradient that is written later; copy it there, at {facts(view).source}"
            )
        if view.target is operator.getitem:
            self._project(view)
        else:
            self._copy_op(view)

    def _set(self, node: fx.Node, value: Any) -> None:
        self.env[node] = value
        self.made[node] = self.writes.get(self.memory.memory_of(node), 0)

    def _copy_op(self, node: fx.Node) -> None:
        target = node.target
        args, kwargs = self._map(node.args), self._map(node.kwargs)
        number = result_of(node)
        if number is not None:
            where = facts(node).source
            self.program.note(f"torch.cond at {where}: one branch runs; predicted time and memory are those of both together")
            self._set(node, self._call(runtime.either, (*args, number), {}, facts(node), f"{where.module}_cond".lstrip("_")))
            return
        if facts(node).branch and writes_statistics(node):
            raise TraceError(
                f"{node.target} at {facts(node).source} writes its running statistics in a branch of torch.cond; {_NO_WRITING}"
            )
        if node.graph is self.program.graph and not facts(node).autocast:
            self.stretch += 1
        if _writes(node):
            self._make_functional(node, args, kwargs)
            return
        source = args[0] if args else None
        if str(target) in _CASTS and isinstance(source, fx.Node) and facts(source).value.dtype == facts(node).value.dtype:
            self._set(node, source)
            return
        target = aten.zeros_like.default if target is aten.empty_like.default else target
        if target in _FACTORIES:
            made = {"dtype": facts(node).value.dtype, "device": node.meta["val"].device}
            self._set(node, self._call(_FACTORIES[target], args[1:], made, facts(node)))
            return
        args = tuple(self._cast(node, operand) for operand in args) if str(target) in _CAST_INSIDE else args
        reshapes = target is aten.view.default  # a view's strides are those of the traced device and mode
        self._set(node, self._call(aten.reshape.default if reshapes else target, args, kwargs, facts(node)))

    def _cast(self, node: fx.Node, operand: Any) -> Any:
        """A float32 parameter in the dtype that autocast computes in; once per region, as torch's cache does."""
        known, device = facts(node), node.meta["val"].device.type
        region = next((region for region in known.autocast if region.device == device), None)
        is_detached = isinstance(operand, fx.Node) and operand.target is aten.detach.default
        weight = operand.args[0] if is_detached else operand
        is_weight = isinstance(weight, fx.Node) and facts(weight).role == "parameter" and facts(weight).value.dtype == torch.float32
        if region is None or not is_weight or known.value.dtype != region.dtype:
            return operand
        key = (weight, region.dtype, self.stretch)
        cast = Facts("op", (TensorInfo(facts(weight).value.shape, region.dtype),), source=known.source, autocast=known.autocast)
        if key not in self.weights:
            self.weights[key] = self._call(aten.to.dtype, (weight, region.dtype), {}, cast)
        return self._call(aten.detach.default, (self.weights[key],), {}, cast) if is_detached else self.weights[key]

    def _make_functional(self, node: fx.Node, args: tuple, kwargs: dict) -> None:
        """Give the tensor that an in-place op writes its new value, and the tensor that it is a view of."""
        memory, written = self.memory, self.memory.identity(node)
        root = memory.memory_of(node)
        name, overload = node.target._schema.name.split("::")[1], node.target._overloadname  # type: ignore[union-attr]
        functional = getattr(getattr(aten, name.rstrip("_"), None), overload, None) if name.endswith("_") else None
        functional = _FUNCTIONAL.get(str(node.target), functional)
        if functional is aten.bernoulli.p and len(args) == 1:
            args, kwargs = (*args, kwargs.get("p", 0.5)), {key: value for key, value in kwargs.items() if key != "p"}
        reader = memory.read_after(node)
        role = facts(root).role if root.op == "placeholder" else "op"
        region = memory.bodies[node]
        is_elsewhere = [region is not None and memory.bodies[place] is not region for place in (written, root)]
        loses = is_elsewhere[0] and facts(self.env[written]).needs_grad
        loses |= reader is not None and is_elsewhere[1] and facts(self.env[root]).needs_grad
        what = ""
        if role == "parameter" or (role == "input" and memory.bodies[root] is None):
            what = f"{node.target} writes into the {'parameter' if role == 'parameter' else 'argument'} {facts(root).name}"
        elif loses:
            what = f"{node.target} changes, without gradient, a value that has one"
        elif functional is None:
            what = f"{node.target} has no functional form"
        if facts(root).branch != facts(node).branch:
            raise TraceError(
                f"{node.target} at {facts(node).source} changes, in a branch of torch.cond, a tensor from outside; {_NO_WRITING}"
            )
        if what:
            raise TraceError(f"{what}, at {facts(node).source}; write the model without this in-place op")
        self._set(written, self._copied(node, *args[:2]) if name == "copy_" else self._call(functional, args, kwargs, facts(node)))
        dtypes = {facts(operand).value.dtype for operand in node.all_input_nodes if facts(operand).values}
        if name != "copy_" and not name.startswith(_KEEPS_DTYPE) and len(dtypes) > 1:
            dtype = facts(node).value.dtype  # in place the result keeps its dtype, out of place it may be promoted
            self._set(written, self._call(aten.to.dtype, (self.env[written], dtype), {}, facts(node)))
        if reader is not None or role == "buffer":
            self._write_through(node, written, root, reader)
        if role == "buffer":
            self.updates[root] = self.env[root]

    def _copied(self, node: fx.Node, target: fx.Node, source: fx.Node) -> fx.Node:
        """What copy_ leaves in its first operand: the second one in its dtype and shape."""
        old, wanted, given = facts(node), facts(target).value, facts(source).value
        if given.dtype != wanted.dtype:
            values = (TensorInfo(given.shape, wanted.dtype),)
            source = self._call(aten.to.dtype, (source, wanted.dtype), {}, replace(old, values=values))
        return source if given.shape == wanted.shape else self._call(aten.expand.default, (source, list(wanted.shape)), {}, old)

    def _write_through(self, node: fx.Node, written: fx.Node, root: fx.Node, reader: fx.Node | None) -> None:
        """Bring the new value of a view to the tensor that has the memory; other views of it are stale from now on."""

        def make(target: Any, args: tuple, info: TensorInfo) -> fx.Node:
            return self._call(target, args, {}, replace(facts(node), values=(info,)))

        chain, view, value = [written], written, self.env[written]
        while view is not root:
            base = self.memory.viewed[view]
            whole = self.memory.viewed[base] if view.target is operator.getitem else base  # pieces stand for the whole
            new = write_back(view, self._now(whole), value, make)
            if new is None:
                where = f"memory that {reader.name} reads later" if reader else f"a part of the buffer {facts(root).name}"
                raise TraceError(f"{node.target} writes into {where}, at {facts(node).source}; write the model without this in-place op")
            view, value = self.memory.identity(whole), new
            self.env[view] = value
            chain.append(view)
        self.writes[root] = self.writes.get(root, 0) + 1
        self.made |= dict.fromkeys(chain, self.writes[root])

    def _inline(self, node: fx.Node) -> None:
        if str(node.target) not in _REGIONS:
            sources = (
                facts(sub).source for graph in map(self._map, node.args) if isinstance(graph, fx.GraphModule) for sub in graph.graph.nodes
            )
            where = next((source for source in (facts(node).source, *sources) if source.file), facts(node).source)
            raise TraceError(f"{node.target} at {where} is not supported: control flow cannot be partitioned yet")
        place, state = _REGIONS[str(node.target)], facts(node).autocast
        settings, body = node.args[:place], self._map(node.args[place])
        loses_gradient = settings == (False,)
        if len(settings) == 4:
            state = inside(state, *settings[:3])  # type: ignore[arg-type]
        outer, operands = self.owner, iter(node.args[place + 1 :])
        self.owner = body
        for sub in body.graph.nodes:
            facts(sub).autocast = state
            if sub.op == "placeholder":
                self._enter(sub, next(operands), loses_gradient)  # type: ignore[arg-type]
            elif sub.op == "output":
                self.env[node] = list(sub.args[0])
            else:
                self.copy(sub)
        self.owner = outer

    def _enter(self, inner: fx.Node, operand: fx.Node, loses_gradient: bool) -> None:
        """A value enters a region; into a no-grad one it goes without its gradient."""
        if operand in self.detached:
            self.detached[inner] = self.detached[operand]
        elif not isinstance(self._now(operand), fx.Node):
            return  # a size
        elif loses_gradient and facts(producer(self._now(operand))[0]).needs_grad:
            value = self._now(operand)
            known = Facts("op", facts(value).values, source=facts(value).source, autocast=facts(inner).autocast)
            known.branch = facts(value).branch
            self.detached[inner] = self._call(aten.detach.default, (value,), {}, known)

    def _project(self, node: fx.Node) -> None:
        source, index = self._now(node.args[0]), node.args[1]  # type: ignore[arg-type]
        if isinstance(source, (list, tuple)):  # a region's results
            if source[index] in self.detached:  # type: ignore[index]
                self.detached[node] = self.detached[source[index]]  # type: ignore[index]
            return
        value = facts(source).values[index]  # type: ignore[index]
        known = Facts("projection", (value,), source=facts(source).source, recompute=facts(source).recompute)
        known.branch = facts(source).branch
        self._set(node, self._create("call_function", operator.getitem, (source, index), {}, known))

    def _call(self, target: Any, args: tuple, kwargs: dict, old: Facts, name: str = "") -> fx.Node:
        if str(target) in SHAPE_ALONE and facts(producer(args[0])[0]).needs_grad:
            detached = Facts("op", facts(args[0]).values, source=old.source, branch=facts(args[0]).branch)
            args = (self._call(aten.detach.default, args[:1], {}, detached), *args[1:])
        known = Facts("op", old.values, source=old.source, autocast=old.autocast, recompute=old.recompute, strides=old.strides)
        known.branch = old.branch
        node = self._create("call_function", target, args, kwargs, known, name)
        flows = carries_gradient(node)
        facts(node).values = tuple(TensorInfo(v.shape, v.dtype, flows and is_differentiable(v.dtype)) for v in old.values)
        return node

    def _create(self, op: str, target: Any, args: tuple, kwargs: dict, new: Facts, name: str = "") -> fx.Node:
        base = name or "_".join(part for part in (new.source.module, getattr(target, "__name__", "op").split(".")[0]) if part)
        node = self.graph.create_node(op, target, args, kwargs, name=self._identifier(base))
        set_facts(node, new)
        return node

    def _identifier(self, text: str) -> str:
        """`text` as a variable of the emitted program, which must not hide what the program calls."""
        name = re.sub(r"\W", "_", text)
        if name in _RESERVED or name in self.program.mesh.axes or name in self.program.symbols:
            return f"{name}_"
        return name if not name[:1].isdigit() else f"_{name}"

    def _finish(self, output: fx.Node) -> None:
        results = self._map(output.args[0])
        for buffer, value in self.updates.items():
            node = self.graph.call_function(aten.copy_.default, (self.placeholders[buffer], value))
            set_facts(node, Facts("update", facts(buffer).values, name=facts(buffer).name))
        node = self.graph.output(results)
        set_facts(node, Facts("output"))


def _drop_dead(program: Program) -> None:
    for node in reversed(list(program.graph.nodes)):
        role = facts(node).role
        is_alias = role == "parameter" and facts(node).name in program.aliases
        if not node.users and (
            is_alias or role in ("projection", "buffer") or (role == "op" and not (writes_statistics(node) or draws_random(node)))
        ):
            program.graph.erase_node(node)
