"""trace_model: torch.export of the model into a graph of ATen ops, on tensors without memory.

Non-strict export keeps autograd semantics of everything but custom autograd.Functions (refused, their backward would be
lost) and activation checkpointing, whose regions are remembered as marks on the nodes.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from autoshard import autocast, runtime
from autoshard.dynamic_dims import Marks
from autoshard.errors import TraceError
from autoshard.flex_attention import flex_attention_in_ops, refuse_block_masks
from autoshard.ops.row import TensorInfo
from autoshard.placements import Layout
from autoshard.program import Facts, Program, Source, baked_values, draws_random, facts, set_facts
from autoshard.symbolic import SizeReader, Symbol, name_fault
from autoshard.torch_internals import (
    branch_of,
    fake_copy,
    fake_like,
    fake_mode,
    keep_branches,
    keep_nested_no_grad,
    pytree,
    record_lost_backwards,
    record_size_guards,
    region_of,
    spell_out_keywords,
    tag_checkpoints,
)

_TOLD = {  # what torch.export says of sizes -> what autoshard says
    r"You marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)": r"it fixes \1 at \2",
    r"L\['(\w+)'\]\.size\(\)\[(\d+)\]": r"\1.shape[\2]",
    "in the specified range satisfy the generated guard": "satisfy",
    r" and [^ ]* <= IntInfinity\(\)": "",
}
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in .*\n\s*(?P<text>.*)')


@dataclass(frozen=True)
class TraceModel:
    """Fill an empty program with the graph of `model(*args, **kwargs)`.

    args, kwargs: example inputs with global shapes; only shapes, dtypes and requires_grad of tensors are read, other
    values are baked in. device: where the program will run. entry_layouts: how each tensor argument is given, when not
    whole on every rank. dynamic: dims whose sizes may change from call to call. Raises TraceError.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    entry_layouts: tuple[Layout, ...] = ()
    dynamic: Marks = ()

    def __call__(self, program: Program) -> Program:
        mode, device = fake_mode(), torch.device(self.device)
        model = fake_copy(self.model, mode, device)
        leaves, program.in_spec = pytree.tree_flatten((tuple(self.args), dict(self.kwargs)))
        refuse_block_masks(leaves)
        wants_grad = [isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves]
        fakes = [fake_like(leaf.detach(), mode, device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(fakes, program.in_spec)
        exported = self._export(model, args, kwargs, program, _dims(self.dynamic, fakes, program))
        program.is_training = self.model.training
        program.graph, program.out_spec = exported.graph, exported.call_spec.out_spec
        program.aliases = _aliases(self.model)
        sizes = _read_sizes(program, exported, self.dynamic)
        _describe_nodes(program, exported, self.model, leaves, wants_grad, sizes)
        _drop_constants(program)
        for name, layout in zip(filter(None, program.flat_inputs), self.entry_layouts, strict=False):
            next(facts(node) for node in program.nodes("input") if node.name == name).layouts = (layout,)
        return program

    def _export(self, model: nn.Module, args: tuple, kwargs: dict, program: Program, dims: torch.export.ShapesCollection | None) -> Any:
        lost: list[tuple[str, str]] = []
        selective: list[str] = []
        guards: list[tuple[str, str]] = []
        _refuse_hooks(self.model)
        try:
            watched = record_lost_backwards(lambda *what: lost.append(what))
            guarded = record_size_guards(lambda *what: guards.append(what))
            in_ops = flex_attention_in_ops(program.note, is_traced=True)
            with torch.enable_grad(), watched, guarded, contextlib.ExitStack() as stack:
                for region in (tag_checkpoints(selective.append), keep_nested_no_grad(), keep_branches(), in_ops):
                    stack.enter_context(region)
                if dims is not None:
                    spell_out_keywords(model, args, kwargs)
                shapes = None if dims is None else dims.dynamic_shapes(model, args, kwargs)
                exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except TraceError:
            raise
        except Exception as error:  # torch.export raises many types; all mean that the model cannot be traced
            fixes = _explain_sizes(error, self.model, guards) if dims is not None else ""
            raise TraceError(fixes or _explain(error, self.model)) from error
        for kind, where in dict.fromkeys(lost):
            if kind in ("Tensor.register_hook", "torch.autograd.grad"):
                raise TraceError(f"{kind} at {where}: tracing would lose it, and gradients would be wrong; change the model there")
            raise TraceError(
                f"custom autograd.Function {kind} at {where}: tracing keeps its forward and would lose its backward. "
                "Write it as a torch.library.custom_op with register_autograd, or in plain torch ops."
            )
        for where in dict.fromkeys(selective):
            program.note(f"checkpoint at {where} has its own context_fn, which is not looked at: the whole region is recomputed")
        return exported


def _refuse_hooks(model: nn.Module) -> None:
    """Hooks on gradients are no part of a trace."""
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise TraceError(
                f"module {name or 'the model itself'} has a backward hook, which tracing would lose; remove it before compiling"
            )
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise TraceError(
                f"parameter {name} has a hook, which the compiled model would lose; register it on the compiled model's parameter"
            )


def _explain(error: Exception, model: nn.Module) -> str:
    """The reason and the innermost line of the caller's code, from an export error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in ("/torch/", "/autoshard/", "/passes/")) and f.line]
    text = str(error)
    shown = _FRAME.findall(text)
    own_text = [f for f in shown if "/torch/" not in f[0]]
    if own_text:
        place = f"{own_text[-1][0]}:{own_text[-1][1]}: {own_text[-1][2]}"
    else:
        place = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "no line known"
    reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    data_dependent = "data-dependent" in text.lower() or "data dependent" in text.lower()
    advice = (
        "The model branches on values of tensors, which one graph cannot follow: use torch.where or torch.cond there."
        if data_dependent
        else "torch.export must be able to trace the model; try torch.export.export(model, args, strict=False) to see its full report."
    )
    return f"cannot trace {type(model).__name__}: {reason}\n  at {place}\n  {advice}"


def _explain_sizes(error: Exception, model: nn.Module, guards: list[tuple[str, str]]) -> str:
    """Why a dim that was called dynamic cannot be, and the lines that say so; "" for other errors."""
    text = str(error)
    if "Constraints violated" not in text and "Specializations unexpectedly" not in text:
        return ""
    reasons = [line.strip()[2:].split(". If you")[0] for line in text.splitlines() if line.strip().startswith("- ")]
    for told, plain in _TOLD.items():
        reasons = [re.sub(told, plain, reason).rstrip(".") for reason in reasons]
    fixes = text.partition("Suggested fixes:")[2].partition("\n\n")[0].strip().splitlines()
    ranges = [line.strip() for line in fixes if "Dim(" in line and "_" not in line]
    if ranges:
        advice = f"Give the range in dynamic, as torch.export.Dim: {'; '.join(ranges)}; or change the code there."
    elif any(" = " in line and not line.strip().rpartition(" ")[2].isdigit() and "_" not in line for line in fixes):
        advice = f"Give sizes that must be equal one name in dynamic: {'; '.join(line.strip() for line in fixes)}."
    else:
        advice = (
            "Take the size from a tensor's shape there, without int(), float() or a comparison; give a range without the sizes that "
            "differ (torch.export.Dim); or leave it out of dynamic."
        )
    places = dict.fromkeys(where for expr, where in guards if not expr.startswith("Ne(")) or dict.fromkeys(where for _, where in guards)
    lines = "".join(f"\n  at {place}" for place in list(places)[:3])
    return f"{type(model).__name__} does not keep its sizes dynamic: {'; '.join(reasons[:2])}{lines}\n  {advice}"


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every further name of a tied parameter or buffer -> its last name, the one that export reads."""
    last: dict[int, str] = {}
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in everything:
        last[id(tensor)] = name
    return {name: last[id(tensor)] for name, tensor in everything if last[id(tensor)] != name}


def _describe_nodes(
    program: Program, exported: Any, model: nn.Module, leaves: list[Any], wants_grad: list[bool], sizes: SizeReader
) -> None:
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs if hasattr(spec.arg, "name")}
    originals = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    user_inputs = [node for node in exported.graph.nodes if node.op == "placeholder" and specs[node.name].kind == InputKind.USER_INPUT]
    program.flat_inputs = tuple(
        node.name if isinstance(leaf, torch.Tensor) else None for node, leaf in zip(user_inputs, leaves, strict=True)
    )
    program.baked = baked_values(leaves, model)
    grads = {node.name: wanted for node, wanted in zip(user_inputs, wants_grad, strict=True)}
    bodies = [sub.graph for sub in exported.graph_module.modules() if isinstance(sub, fx.GraphModule)]
    for node in (node for graph in bodies for node in graph.nodes):
        if node.op == "placeholder" and node.graph is not exported.graph:
            set_facts(node, Facts("input", _infos(node.meta.get("val"), sizes), number=_number(node, sizes)))
        elif node.op == "placeholder":
            set_facts(node, _placeholder_facts(node, specs[node.name], originals, grads, sizes))
        elif node.op in ("call_function", "get_attr"):
            _require_static(node, sizes)
            known = Facts("op", _infos(node.meta.get("val"), sizes), source=_source(node), number=_number(node, sizes))
            known.recompute, known.branch = region_of(node), branch_of(node)
            set_facts(node, known)
            if draws_random(node) and isinstance(node.meta.get("val"), torch.Tensor):
                known.strides = tuple(sizes.number(stride) for stride in node.meta["val"].stride())  # type: ignore[misc]
            known.autocast = autocast.ambient() if node.graph is exported.graph else ()
        else:
            set_facts(node, Facts("output"))
    _keep_constants(program, exported, model)


def _drop_constants(program: Program) -> None:
    """Arguments that are no tensors are baked in; the program does not take them."""
    for node in program.nodes("input"):
        if node.name not in program.flat_inputs and not node.users:
            program.graph.erase_node(node)


def _placeholder_facts(
    node: fx.Node, spec: Any, originals: Mapping[str, torch.Tensor], grads: Mapping[str, bool], sizes: SizeReader
) -> Facts:
    values = _infos(node.meta["val"], sizes)
    if spec.kind == InputKind.USER_INPUT:
        values = tuple(TensorInfo(v.shape, v.dtype, grads[node.name]) for v in values)
        return Facts("input", values, name=node.name)
    original = originals.get(spec.target)
    needs_grad = isinstance(original, nn.Parameter) and original.requires_grad
    values = tuple(TensorInfo(v.shape, v.dtype, needs_grad) for v in values)
    is_parameter = spec.kind == InputKind.PARAMETER
    return Facts("parameter" if is_parameter else "buffer", values, name=spec.target, is_persistent=bool(spec.persistent or is_parameter))


def _keep_constants(program: Program, exported: Any, model: nn.Module) -> None:
    """Values of tensors that the model made outside its parameters and buffers."""
    own = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for node in program.nodes("buffer"):
        name = facts(node).name
        value = exported.constants.get(name)
        if name not in own and isinstance(value, torch.Tensor):
            program.constants[name] = value.detach()


def _require_static(node: fx.Node, sizes: SizeReader) -> None:
    """Raise TraceError for a value whose shape depends on what other tensors hold."""
    value = node.meta.get("val")
    for tensor in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(tensor, torch.Tensor) and not all(map(sizes.knows, tensor.shape)):
            raise TraceError(
                f"the shape of what {node.target} returns depends on the values of tensors, at {_source(node)}: {list(tensor.shape)}. "
                "Every shape must follow from the shapes of the arguments: use a mask and torch.where there."
            )


def _infos(value: Any, sizes: SizeReader) -> tuple[TensorInfo, ...]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return tuple(TensorInfo(sizes.shape(v), v.dtype) for v in values if isinstance(v, torch.Tensor))


def _number(node: fx.Node, sizes: SizeReader) -> int | float | None:
    """What a node computes that is no tensor but follows from sizes; None for anything else."""
    value = node.meta.get("val")
    is_number = isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
    return sizes.number(value) if is_number and sizes.knows(value) else None


def _dims(dynamic: Marks, fakes: list[Any], program: Program) -> torch.export.ShapesCollection | None:
    """The marked dims as torch.export wants them: one Dim per name."""
    if not any(dynamic):
        return None
    taken, made, collection = {*program.mesh.axes, *vars(runtime)}, {}, torch.export.ShapesCollection()
    for dims, fake in zip(dynamic, fakes, strict=True):
        for mark in dims.values():
            fault = name_fault(mark.name, taken)
            if fault:
                raise TraceError(f"dynamic calls a size {mark.name!r}: {fault}; choose another name")
            made[mark.name] = torch.export.Dim(mark.name, min=mark.least if mark.least > 2 else None, max=mark.most)
        if dims:
            collection[fake] = {dim: made[mark.name] for dim, mark in dims.items()}
    return collection


def _read_sizes(program: Program, exported: Any, dynamic: Marks) -> SizeReader:
    """Name the trace's symbols, and record the range in which the trace is valid."""
    if not any(dynamic):
        return SizeReader({})
    kinds = {spec.arg.name: spec.kind for spec in exported.graph_signature.input_specs if hasattr(spec.arg, "name")}
    inputs = [node for node in exported.graph.nodes if node.op == "placeholder" and kinds[node.name] == InputKind.USER_INPUT]
    names: dict[Any, str] = {}
    for node, dims in zip(inputs, dynamic, strict=True):
        for dim, mark in dims.items():
            size = node.meta["val"].shape[dim]
            expr = None if isinstance(size, int) else size.node.expr
            if expr is None or not expr.is_Symbol or names.setdefault(expr, mark.name) != mark.name:
                raise TraceError(f"{mark.name}, dim {dim} of {node.name}, is no size of its own in the trace; leave it out of dynamic")
            bounds, example = exported.range_constraints[expr], size.node.hint
            most = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**62 else None
            program.symbols[mark.name] = Symbol(mark.name, example, max(2, mark.least, int(bounds.lower)), most)
    return SizeReader(names)


def _source(node: fx.Node) -> Source:
    stack = node.meta.get("nn_module_stack") or {}
    key, (path, cls) = list(stack.items())[-1] if stack else ("", ("", ""))
    cls = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0] and not frame[0].startswith("<")]
    file, line, text = (own or frames or [("", 0, "")])[-1]
    return Source(path, cls.rsplit(".", 1)[-1], key, file, int(line), text.strip())
