"""Constraints: layouts that the caller pins by name pattern, and the templates, which are nothing but constraints.

    {"*.c_attn.weight": "S(0)@tp",      a parameter rests in this placement on axis tp, other axes are free
     "input:ids": "S(0)@dp",            an input is cut like this first
     "output:h.*": "I@tp",              what a module returns lies like this
     "*.norm.weight": "I",              on every axis
     "node:h_0_add": "S(0)@dp",     what one node of the program makes, by the node's name
     "split:*.attn.scaled_dot_product_attention": "s&k@cp"}   ops of a module split this factor of their rule

A placement may be `S` for a split along any dim, and alternatives are separated by `|`. A pattern without a prefix names
parameters, then inputs, then module outputs: the first kind that it matches.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from autoshard.equations import Strategy
from autoshard.errors import ConstraintError, PlacementError
from autoshard.mesh import PIPELINE_AXIS, MeshSpec
from autoshard.placements import Layout, Placement, local_shape, padded_axes, padded_piece
from autoshard.program import Program, facts, op_name, producer

Subject = Literal["parameter", "input", "output", "split", "node"]
Allowed = tuple[tuple[str, ...], ...]  # per axis, the texts of allowed placements; () is free


@dataclass(frozen=True)
class Pin:
    """One constraint at work on one value. `is_soft` pins of templates give way where no size divides.

    is_split: `allowed` are the factors that an op may split, not placements.
    """

    pattern: str
    text: str
    allowed: Allowed
    is_soft: bool = False
    is_split: bool = False

    def admits_split(self, strategies: Sequence[Strategy]) -> bool:
        """Whether an op with these strategies, one per axis, splits what the pin asks."""
        return all(not factors or strategy.factor in factors for strategy, factors in zip(strategies, self.allowed, strict=True))

    def admits(self, layout: Layout, needs_grad: bool = True) -> bool:
        """Whether `layout` satisfies the pin; I and R are the same where no gradient flows."""

        def matches(placement: Placement, text: str) -> bool:
            return (
                str(placement) == text
                or (text == "S" and placement.is_split)
                or (not needs_grad and placement.is_whole and text in ("I", "R"))
            )

        return all(
            not texts or any(matches(placement, text) for text in texts) for placement, texts in zip(layout, self.allowed, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.pattern!r}: {self.text!r}"


def parse_constraint(pattern: str, text: str, mesh: MeshSpec, is_soft: bool = False) -> Pin:
    """Read `"S(0)@tp I@dp"` or, for every axis, `"I"`. Raises ConstraintError."""
    allowed: list[tuple[str, ...]] = [() for _ in mesh.axes]
    is_split = pattern.startswith("split:")
    for part in text.replace(",", " ").split():
        placements, at, axis = part.partition("@")
        options = tuple(placements.split("|"))
        for option in options:
            if option != "S" and not is_split:
                try:
                    Placement.parse(option)
                except PlacementError as error:
                    raise ConstraintError(f"constraint {pattern!r}: {text!r}: {error}") from error
        if at and axis not in mesh.axes:
            raise ConstraintError(f"constraint {pattern!r}: {text!r} names axis {axis!r}; {_axes_to_name(axis, mesh)}")
        for k in [mesh.axes.index(axis)] if at else range(mesh.ndim):
            if allowed[k] and allowed[k] != options:
                raise ConstraintError(f"constraint {pattern!r}: {text!r} asks two placements on axis {mesh.axes[k]!r}")
            allowed[k] = options
    return Pin(pattern, text, tuple(allowed), is_soft, is_split)


def _axes_to_name(axis: str, mesh: MeshSpec) -> str:
    """Which axes values can lie on."""
    if mesh.inside is None:
        return f"the mesh has {', '.join(mesh.axes)}"
    others = "has no other axis" if mesh.is_alone else f"has {', '.join(mesh.axes)} beside it"
    cuts = "; say where stages start with Pipelining(starts=..., together=...)" if axis == PIPELINE_AXIS else ""
    return f"axis {PIPELINE_AXIS} holds pipeline stages, on which nothing is laid out, and mesh {mesh.inside} {others}{cuts}"


def pins_of(program: Program, constraints: Mapping[str, str], is_soft: bool = False) -> dict[fx.Node, list[Pin]]:
    """Which node each constraint pins. Raises ConstraintError for a pattern that matches nothing."""
    names: dict[Subject, dict[str, list[fx.Node]]] = {"parameter": {}, "input": {}, "output": module_outputs(program), "split": {}}
    for node in program.nodes("op"):
        names["split"].setdefault(f"{facts(node).source.module}.{op_name(node).split('.')[-2:][0]}".lstrip("."), []).append(node)
    names["node"] = {node.name: [node] for node in program.nodes("op", "projection") if len(facts(node).values) == 1}
    for name, node in program.parameters().items():
        names["parameter"].setdefault(name, []).append(node)
        for alias in (alias for alias, target in program.aliases.items() if target == name):
            names["parameter"].setdefault(alias, []).append(node)
    for node in program.nodes("input"):
        names["input"].setdefault(facts(node).name, []).append(node)
    pins: dict[fx.Node, list[Pin]] = {}
    for pattern, text in constraints.items():
        pin = parse_constraint(pattern, text, program.mesh, is_soft)
        prefix, _, rest = pattern.rpartition(":")
        kinds = [kind for kind in names if (kind.startswith(prefix) if prefix else kind not in ("split", "node"))]
        matched = next((found for kind in kinds if (found := _matching(names[kind], rest))), [])
        if not matched and not is_soft:
            known = sorted(name for kind in kinds for name in names[kind])
            raise ConstraintError(f"constraint {pin} matches nothing; there are, for example, {', '.join(known[:8])}")
        for node in matched:
            pins.setdefault(node, []).append(pin)
    return pins


def _matching(names: Mapping[str, list[fx.Node]], pattern: str) -> list[fx.Node]:
    return [node for name, nodes in names.items() if fnmatch.fnmatchcase(name, pattern) for node in nodes]


def module_outputs(program: Program) -> dict[str, list[fx.Node]]:
    """The values that leave each module: made inside it, read outside it."""
    inside = {node: facts(producer(node)[0]).source.module for node in program.nodes("op", "projection")}
    found: dict[str, list[fx.Node]] = {}
    for node, path in inside.items():
        readers = {inside.get(user, "") for user in node.users if facts(user).role != "projection"}
        while path:
            if any(not _is_within(reader, path) for reader in readers):
                found.setdefault(path, []).append(node)
            path = path.rpartition(".")[0]
    return found


def _is_within(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


# --------------------------------------------------------------------------------------------------------- templates

Template = Literal["auto", "ddp", "fsdp", "megatron", "megatron_sp"]


def tensor_axis_of(template: str, mesh: MeshSpec) -> str:
    """The axis on which a template splits weights by their work: `tp`, else the last one; "" for templates that split the batch alone."""
    return ("tp" if "tp" in mesh.axes else mesh.axes[-1]) if template.startswith("megatron") else ""


def template_constraints(program: Program, template: Template) -> dict[str, str]:
    """Constraints of a template, for the parameters and modules of this program.

    ddp: the batch split on every axis, parameters whole. fsdp: the batch split on every axis, parameters split on their
    first dim that divides. megatron: weights of two and more dims split on the tensor axis (`tp`, else the last one),
    what repeated blocks and norms return whole there, other axes as ddp. megatron_sp: as megatron, with dim 1 of what
    blocks and norms return split on the tensor axis.
    """
    mesh = program.mesh
    if template == "auto":
        return {}
    tensor_axis = tensor_axis_of(template, mesh)
    batch = " ".join(f"S(0)@{axis}" for axis in mesh.axes if axis != tensor_axis)
    constraints: dict[str, str] = {}
    for name, node in program.parameters().items():
        constraints[f"parameter:{name}"] = _parameter_template(program, node, template, tensor_axis)
    for node in program.nodes("input"):
        if facts(node).value.shape and batch:
            constraints[f"input:{facts(node).name}"] = batch
    for path, nodes in module_outputs(program).items():
        if not all(facts(node).needs_grad and len(facts(node).value.shape) > 1 for node in nodes):
            continue
        at_blocks = len(facts(nodes[0]).value.shape) > 2 and (path.rpartition(".")[2].isdigit() or _is_norm(program, path))
        if not tensor_axis:
            constraints[f"output:{path}"] = batch
        elif at_blocks:
            constraints[f"output:{path}"] = f"{batch} {'I' if template == 'megatron' else 'S(1)'}@{tensor_axis}".strip()
        elif batch:
            constraints[f"output:{path}"] = batch
    return constraints


def _is_norm(program: Program, path: str) -> bool:
    """Whether all parameters of a module are vectors, as those of every norm."""
    shapes = [facts(node).value.shape for name, node in program.parameters().items() if name.startswith(path + ".")]
    return bool(shapes) and all(len(shape) == 1 for shape in shapes)


def _parameter_template(program: Program, node: fx.Node, template: Template, tensor_axis: str) -> str:
    mesh, value = program.mesh, facts(node).value
    if template == "ddp":
        return "I"
    if template == "fsdp":
        layout: list[Placement] = [Placement("I")] * mesh.ndim
        for axis in range(mesh.ndim):
            fitting: list[list[Placement]] = []
            for dim in range(len(value.shape)):
                tried = [*layout[:axis], Placement("S", dim), *layout[axis + 1 :]]
                if mesh.shape[axis] > 1 and local_shape(value.shape, tuple(tried), mesh.shape):
                    fitting.append(tried)
            layout = min(fitting, key=lambda tried: len(padded_axes(value.shape, tuple(tried), mesh.shape)), default=layout)
        return " ".join(f"{placement}@{axis}" for placement, axis in zip(layout, mesh.axes, strict=True))
    size = mesh.shape[mesh.index(tensor_axis)]
    splits = len(value.shape) > 1 and any(padded_piece(length, size) for length in value.shape) and size > 1
    others = " ".join(f"I@{axis}" for axis in mesh.axes if axis != tensor_axis)
    return f"{others} {'S@' + tensor_axis if splits else ''}".strip() or "I|S"
