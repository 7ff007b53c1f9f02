"""What a plan file may say. Its texts become source that is executed, so each is checked before anything is made of it.

Two fences, either of which would do: every field has the type and the characters that a saved plan has, and the program
that is emitted from what was read calls torch ops, the runtime's functions and nothing else.
"""

from __future__ import annotations

import ast
import inspect
import json
import operator
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch
from torch import fx

from autoshard import autocast, runtime
from autoshard.conversions import BY_NAME, PADDING
from autoshard.errors import PlanError
from autoshard.mesh import MeshSpec
from autoshard.ops import RULES, lowerings
from autoshard.program import Facts, Role
from autoshard.symbolic import name_fault

FUNCTIONS = {name: getattr(runtime, name) for name in (*BY_NAME, *PADDING, *lowerings(), "either", "zero_gradients")}
_KINDS = {
    "placeholder": {"parameter", "buffer", "input"},
    "output": {"output"},
    "call_function": {"op", "conversion", "mask", "tie", "projection", "update"},
}
_BITWISE = {f"aten.__{name}__" for name in ("and", "or", "xor", "lshift", "rshift")}  # ops that torch calls so
_FACTS = {"name": str, "site": int, "is_constant": bool, "is_persistent": bool, "is_pinned": bool, "is_drawn_whole": bool}


def is_line(text: Any) -> bool:
    """Whether `text` can stand in a comment: one line."""
    return isinstance(text, str) and text.isprintable()


def is_quotable(text: Any) -> bool:
    """Whether `text` can stand between quotes as it is."""
    return is_line(text) and not set(text) & {'"', "'", "\\"}


def require(is_met: bool, what: str) -> None:
    if not is_met:
        raise PlanError(f"the plan is malformed: {what}")


def check_body(body: Mapping[str, Any]) -> None:
    """The fields around the graph. Raises PlanError."""
    require(is_quotable(body["model_name"]), "the model's name")
    for name, known in {"inputs": ("global", "local"), "outputs": ("whole", "dtensor")}.items():
        require(body[name] in known, f"{name} is {body[name]!r}")
    program = body["program"]
    require(all(type(size) is int for size in program["mesh"]["shape"]), "sizes of the mesh")
    require(type(program["is_training"]) is bool, "is_training")
    require(all(is_line(note) for note in program["notes"]), "notes")
    require(all(isinstance(name, str) and name.isidentifier() for name in program["passes"]), "names of passes")
    require(all(type(number) in (int, float) for number in program["stats"].values()), "stats")
    require(
        all(is_quotable(name) for name in (*program["aliases"], *program["aliases"].values(), *program["constants"])), "names of tensors"
    )
    require(all(name is None or is_quotable(name) for name in program["flat_inputs"]), "names of inputs")
    kinds = [entry["kind"] for entry in program["nodes"]]
    require(kinds.count("output") == 1 and kinds[-1] == "output", "the program does not end in one output")


def check_spec(text: str) -> None:
    """A serialised pytree structure: torch imports modules that some of them name; those are refused."""

    def walk(spec: Mapping[str, Any]) -> None:
        context = spec["context"]
        names_module = spec["type"] == "collections.defaultdict" or "__enum__" in _keys(
            json.loads(context) if _is_json(context) else context
        )
        require(not names_module, f"the container {spec['type']} of an input or output names a Python object; plans hold plain containers")
        for child in spec["children_spec"]:
            walk(child)

    walk(json.loads(text)[1])


def _is_json(text: Any) -> bool:
    try:
        json.loads(text)
    except (TypeError, ValueError):
        return False
    return True


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from _keys(item)


def check_facts(body: Mapping[str, Any], mesh: MeshSpec) -> None:
    """The facts of one node, as read from the file. Raises PlanError."""
    require(body["role"] in get_args(Role), f"role {body['role']!r}")
    for name, cls in _FACTS.items():
        require(type(body[name]) is cls, f"{name} is {body[name]!r}")
    require(is_quotable(body["name"]), f"the name {body['name']!r}")
    require(body["random_axes"] is None or set(body["random_axes"]) <= set(mesh.axes), f"random_axes are {body['random_axes']!r}")
    devices = [device for device, _ in body["autocast"]]
    require(set(devices) <= set(autocast.DEVICES) and devices == sorted(set(devices)), f"autocast is {body['autocast']!r}")
    number = body["recompute"]
    require(number is None or (type(number) is int and number > 0), f"recompute is {number!r}")
    steps = body["branch"]
    is_path = all(len(step) == 2 and type(step[0]) is int and step[0] > 0 and type(step[1]) is bool for step in steps)
    require(type(steps) is list and is_path, f"branch is {steps!r}")
    module, module_class, call, file, line, text = body["source"]
    require(all(map(is_line, (module, module_class, call, file, text))) and type(line) is int, "where a node comes from")
    for shape, _, needs_grad in body["values"]:
        require(all(_is_size(size) for size in shape) and type(needs_grad) is bool, f"a value of shape {shape}")


def _is_size(size: Any) -> bool:
    if isinstance(size, dict):
        return set(size) == {"size"}  # its text is read by autoshard.symbolic, which knows numbers, symbols and operators
    return type(size) is int and size >= 0


def check_symbols(entries: Any, mesh: MeshSpec) -> None:
    """The sizes that may change. Raises PlanError."""
    for entry in entries:
        fault = name_fault(entry["name"], {*mesh.axes, *vars(runtime)}) if is_quotable(entry["name"]) else "no name"
        require(not fault, f"a size is called {entry['name']!r}: {fault}")
        numbers = [entry["example"], entry["least"], *([] if entry["most"] is None else [entry["most"]])]
        require(all(type(number) is int and number >= 2 for number in numbers), f"the range of {entry['name']}")
    require(len({entry["name"] for entry in entries}) == len(entries), "two sizes of one name")


def check_node(kind: str, target: Any, kwargs: Mapping[str, Any], known: Facts, mesh: MeshSpec) -> None:
    """Whether role, target and keywords of one node belong together. Raises PlanError."""
    require(known.role in _KINDS[kind], f"a {kind} in the role of {known.role}")
    if kind != "call_function":
        return
    is_op = isinstance(target, torch._ops.OpOverload)
    name = str(target) if is_op else target.__name__
    writes = target is torch.ops.aten.copy_.default
    is_mask = target is runtime.mask_padding
    expected = {"projection": target is operator.getitem, "conversion": name in BY_NAME and not is_op, "mask": is_mask, "update": writes}
    expected["tie"] = target is runtime.zero_gradients
    if known.role != "op":
        require(expected[known.role], f"a {known.role} calls {name}")
    elif known.op is None:
        require(not writes if is_op else name in RULES, f"an op calls {name}")
    else:
        lowering = getattr(RULES.get(str(known.op)), "lowering", None)
        require(lowering is not None and name == lowering.function and not is_op, f"{known.op} is lowered to {name}")
    names = {argument.name for argument in target._schema.arguments} if is_op else {*inspect.signature(target).parameters}
    for keyword, value in kwargs.items():
        require(keyword in names, f"{name} has no argument {keyword!r}")
        require(not keyword.endswith("_axes") or set(value) <= set(mesh.axes), f"{keyword} of {name} are {value!r}")


def check_cond(target: Any, args: tuple) -> None:
    """Whether what gives the result of a cond, or its gradients of zero, has the arguments that they have. Raises PlanError."""
    nodes, rest = args[: 3 if target is runtime.either else None], args[3:] if target is runtime.either else (1,)
    require(all(isinstance(node, fx.Node) for node in nodes), f"{target.__name__} takes values of the program")
    require(len(nodes) > 1 and len(rest) == 1 and type(rest[0]) is int, f"{target.__name__} is called with {args!r}")


def check_source(text: str) -> None:
    """Whether an emitted program imports torch and the runtime alone and calls only ops, conversions and its own base class."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise PlanError(f"the plan does not give a program: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            require([alias.name for alias in node.names] == ["torch"], "its program imports more than torch")
        elif isinstance(node, ast.ImportFrom):
            require(node.module == "autoshard_runtime", "its program imports more than its runtime")
        elif isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            require(not name.startswith("__") or ast.unparse(node) in _BITWISE, f"its program reads {name}")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            plain = ("float", "max", "min", "torch.autocast")
            is_known = called in FUNCTIONS or called in plain or called.startswith(("aten.", "torch.ops.", "self."))
            require(is_known, f"its program calls {called}")
