"""Plans as JSON: every decision as data, read back without executing anything that the file says.

An op is read only if it is a torch op that writes nothing and has a rule or reads a tensor (or is one of the factories),
a function only if it is one of autoshard.runtime's. The file carries a checksum, and the placement checker judges the
program that was read before anybody runs it.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from autoshard import runtime
from autoshard.autocast import Autocast
from autoshard.equations import Strategy
from autoshard.errors import AutoshardError, PlanError
from autoshard.mesh import MeshSpec
from autoshard.ops import RULES
from autoshard.ops.row import TensorInfo
from autoshard.pipeline_file import check_stage, pipeline_body, read_pipeline
from autoshard.placements import Placement, format_layout, parse_layout
from autoshard.plan_schema import FUNCTIONS, check_body, check_cond, check_facts, check_node, check_spec, check_symbols, require
from autoshard.program import Facts, Program, Source, facts, set_facts
from autoshard.symbolic import Real, Size, Symbol, evaluate, parse
from autoshard.torch_internals import pytree

VERSION = 3
_FACTORIES = {
    f"aten.{name}"
    for name in [
        "arange.default",
        "arange.start",
        "arange.start_step",
        "zeros.default",
        "ones.default",
        "full.default",
        "eye.default",
        "scalar_tensor.default",
        "empty.memory_format",
        "rand.default",
        "randn.default",
        "randint.default",
        "randint.low",
        "randperm.default",
        "normal.float_float",
    ]
}
_TORCH = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


def dumps(program: Program, extra: Mapping[str, Any]) -> str:
    """The plan as JSON text with a checksum."""
    body = {"version": VERSION, **extra, "program": _program(program)}
    return json.dumps({"sha256": digest(body), **body}, indent=1)


def loads(text: str) -> tuple[Program, dict[str, Any]]:
    """Inverse of dumps. Raises PlanError for text that is not a plan, was altered, or names anything unknown."""
    try:
        body = json.loads(text)
        checksum = body.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise PlanError(f"this is not a plan, or a truncated one: {error}") from error
    if body.get("version") != VERSION:
        raise PlanError(f"the plan has format version {body.get('version')}, this autoshard reads {VERSION}; plan again with this version")
    if checksum != digest(body):
        raise PlanError(
            "the plan was altered after it was saved (its checksum differs); plan again, and change constraints rather than the file"
        )
    try:
        check_body(body)
        return _read_program(body["program"]), body
    except AutoshardError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, AssertionError) as error:
        raise PlanError(f"the plan does not describe a program: {type(error).__name__}: {error}") from error


def digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _program(program: Program) -> dict[str, Any]:
    return {
        "mesh": {"axes": program.mesh.axes, "shape": program.mesh.shape},
        "is_training": program.is_training,
        "in_spec": pytree.treespec_dumps(program.in_spec),
        "out_spec": pytree.treespec_dumps(program.out_spec),
        "flat_inputs": program.flat_inputs,
        "baked": program.baked,
        "aliases": program.aliases,
        "notes": program.notes,
        "passes": program.passes,
        "stats": program.stats,
        "constants": {name: _tensor(value) for name, value in program.constants.items()},
        "symbols": [dataclasses.asdict(symbol) for symbol in program.symbols.values()],
        "pipeline": None if program.pipeline is None else pipeline_body(program.pipeline),
        "nodes": [_node(node, program.mesh) for node in program.graph.nodes],
    }


def _read_program(body: dict[str, Any]) -> Program:
    mesh = MeshSpec(tuple(body["mesh"]["axes"]), tuple(body["mesh"]["shape"]))
    check_spec(body["in_spec"])
    check_spec(body["out_spec"])
    try:
        in_spec, out_spec = pytree.treespec_loads(body["in_spec"]), pytree.treespec_loads(body["out_spec"])
    except NotImplementedError as error:
        raise PlanError(
            f"the plan's inputs or outputs use a container type that is not registered here; import its library first: {error}"
        ) from error
    program = Program(fx.Graph(), mesh, body["is_training"], in_spec=in_spec, out_spec=out_spec)
    program.flat_inputs, program.baked, program.aliases = tuple(body["flat_inputs"]), tuple(body["baked"]), dict(body["aliases"])
    program.notes, program.passes, program.stats = list(body["notes"]), list(body["passes"]), dict(body["stats"])
    program.constants = {name: _read_tensor(value) for name, value in body["constants"].items()}
    check_symbols(body["symbols"], mesh)
    program.symbols = {entry["name"]: Symbol(**entry) for entry in body["symbols"]}
    known: dict[str, fx.Node] = {}
    for entry in body["nodes"]:
        node = program.graph.create_node(
            entry["kind"],
            _read_target(entry["target"], entry["kind"]),
            _decode(entry["args"], known, program.symbols),
            _decode(entry["kwargs"], known, program.symbols),
            name=entry["name"],
        )
        known[entry["name"]] = node
        check_facts(entry["facts"], mesh)
        check_stage(entry["facts"]["stage"], body["pipeline"])
        set_facts(node, _read_facts(entry["facts"], mesh, program.symbols))
        check_node(node.op, node.target, node.kwargs, facts(node), mesh)
        if node.target in (runtime.either, runtime.zero_gradients):
            check_cond(node.target, node.args)
    if body["pipeline"] is not None:
        program.pipeline = read_pipeline(body["pipeline"], program)
        program.mesh = program.pipeline.mesh.of_stage  # which knows the links of the whole mesh
    program.is_typed = program.is_localized = True
    return program


def _node(node: fx.Node, mesh: MeshSpec) -> dict[str, Any]:
    return {
        "name": node.name,
        "kind": node.op,
        "target": _target(node.target),
        "args": _encode(node.args),
        "kwargs": _encode(dict(node.kwargs)),
        "facts": _facts(facts(node), mesh),
    }


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    if target is operator.getitem:
        return "getitem"
    return str(target) if isinstance(target, torch._ops.OpOverload) else f"runtime:{target.__name__}"


def _read_target(name: str, kind: str) -> Any:
    if kind in ("placeholder", "output"):
        return name
    if kind != "call_function":
        raise PlanError(f"the plan holds a node of kind {kind!r}, which no plan has")
    if name == "getitem":
        return operator.getitem
    if name.startswith("runtime:"):
        if name[8:] not in FUNCTIONS:
            raise PlanError(f"the plan calls {name[8:]!r}, which is not a function of the runtime")
        return FUNCTIONS[name[8:]]
    return _read_op(name)


def _read_op(name: str) -> torch._ops.OpOverload:
    op: Any = torch.ops
    namespace, *_ = parts = name.split(".")
    for part in parts:
        op = getattr(op, part, None)
    if not isinstance(op, torch._ops.OpOverload):
        raise PlanError(f"the plan calls {name!r}, which is no torch op here; import the library that defines it first")
    arguments = op._schema.arguments
    reads_tensor = any("Tensor" in str(argument.type) for argument in arguments)
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments)
    if name != "aten.copy_.default" and (writes or not (name in RULES or name in _FACTORIES or (namespace == "aten" and reads_tensor))):
        raise PlanError(f"the plan calls {name}, which plans may not; register a rule if it is an op of yours")
    return op


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        items = [_encode(item) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    for kind, cls in _TORCH.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, float) and not isinstance(value, Real) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, (Size, Real)):
        return {"size" if isinstance(value, Size) else "real": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PlanError(f"an argument of type {type(value).__name__} cannot be written to a plan")


def _decode(value: Any, known: Mapping[str, fx.Node], symbols: Mapping[str, Symbol]) -> Any:
    if isinstance(value, list):
        return [_decode(item, known, symbols) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return known[inner]
    if kind == "tuple":
        return tuple(_decode(item, known, symbols) for item in inner)
    if kind == "dict":
        return {key: _decode(item, known, symbols) for key, item in inner.items()}
    if kind in ("size", "real"):
        return _read_size(inner, Size if kind == "size" else Real, symbols)
    if kind == "device":
        return torch.device(inner)
    if kind == "float":
        require(inner in ("inf", "-inf", "nan"), f"a number {inner!r}")
        return float(inner)
    found = getattr(torch, inner)
    require(kind in _TORCH and isinstance(found, _TORCH[kind]), f"{inner!r} is no {kind}")
    return found


def _dtype(name: str) -> torch.dtype:
    return _decode({"dtype": name}, {}, {})


def _read_size(text: Any, cls: type[Size] | type[Real], symbols: Mapping[str, Symbol]) -> Size | Real:
    """A number that follows from sizes, at the example's."""
    require(isinstance(text, str), f"the expression {text!r} of a size")
    number = evaluate(text, {name: symbol.example for name, symbol in symbols.items()})
    require(isinstance(number, (int, float) if cls is Real else int), f"the size {text!r}")
    return cls(number, parse(text, symbols))


def _facts(known: Facts, mesh: MeshSpec) -> dict[str, Any]:
    body: dict[str, Any] = {
        "role": known.role,
        "values": [[_encode(list(v.shape)), str(v.dtype).removeprefix("torch."), v.needs_grad] for v in known.values],
        "layouts": [format_layout(layout, mesh) for layout in known.layouts],
        "strategies": [[[str(p) for p in s.inputs], [str(p) for p in s.outputs], s.factor] for s in known.strategies],
        "hub": None if known.hub is None else format_layout(known.hub, mesh),
        "op": None if known.op is None else str(known.op),
        "random_axes": known.random_axes,
        "autocast": [[region.device, str(region.dtype).removeprefix("torch.")] for region in known.autocast],
        "recompute": known.recompute,
        "branch": known.branch,
        "stage": known.stage,
        "source": [_one_line(part) for part in dataclasses.astuple(known.source)],
    }
    for name in ("name", "site", "is_constant", "is_persistent", "is_pinned", "is_drawn_whole"):
        body[name] = getattr(known, name)
    return body


def _one_line(part: Any) -> Any:
    return "".join(letter if letter.isprintable() else " " for letter in part) if isinstance(part, str) else part


def _read_facts(body: dict[str, Any], mesh: MeshSpec, symbols: Mapping[str, Symbol]) -> Facts:
    values = tuple(TensorInfo(tuple(_decode(shape, {}, symbols)), _dtype(dtype), needs_grad) for shape, dtype, needs_grad in body["values"])
    strategies = tuple(
        Strategy(tuple(map(Placement.parse, i)), tuple(map(Placement.parse, o)), factor) for i, o, factor in body["strategies"]
    )
    known = Facts(
        body["role"], values, body["name"], Source(*body["source"]), tuple(parse_layout(text, mesh) for text in body["layouts"]), strategies
    )
    known.hub = None if body["hub"] is None else parse_layout(body["hub"], mesh)
    known.op = None if body["op"] is None else _read_op(body["op"])
    known.random_axes = None if body["random_axes"] is None else tuple(body["random_axes"])
    known.autocast = tuple(Autocast(device, _dtype(dtype)) for device, dtype in body["autocast"])
    known.recompute, known.is_drawn_whole, known.stage = body["recompute"], body["is_drawn_whole"], body["stage"]
    known.branch = tuple((number, side) for number, side in body["branch"])
    known.site, known.is_constant, known.is_persistent, known.is_pinned = (
        body[k] for k in ("site", "is_constant", "is_persistent", "is_pinned")
    )
    return known


def _tensor(value: torch.Tensor) -> dict[str, Any]:
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), "data": base64.b64encode(raw).decode()}


def _read_tensor(body: dict[str, Any]) -> torch.Tensor:
    raw = np.frombuffer(base64.b64decode(body["data"]), dtype=np.uint8).copy()
    return torch.from_numpy(raw).view(_dtype(body["dtype"])).reshape(body["shape"])
