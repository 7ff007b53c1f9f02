"""What a profile says of one plan: single calls timed on this device in place of the roofline, and what is extrapolated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from autoshard.candidates import bound_rule
from autoshard.conversions import COMMUNICATES
from autoshard.costs import CostModel, split_of
from autoshard.errors import HardwareError, InputError
from autoshard.measured import op_key
from autoshard.ops.row import Call, TensorInfo
from autoshard.placements import Layout
from autoshard.plan import Plan
from autoshard.profile_file import Profile, load_profile, newest_profile
from autoshard.profile_measuring import time_call
from autoshard.program import Program, call_of, facts, tensor_operands
from autoshard.traffic import sent_by

_MOST_SHARE = 0.1  # of the predicted seconds outside the measured range that pass without a word


def measure_ops(
    plan: Plan,
    profile: Profile | str | Path | None = None,
    *,
    share: float = 0.9,
    most: int = 32,
    budget_s: float = 0.2,
    cache_dir: str | None = None,
) -> Profile:
    """Time on this device the calls that matter most in `plan`, as each rank runs them; a profile with those times in it, saved.

    Plan again with `hardware=` its `.hardware()` (or "measured"): op calls with the same local shapes, dtypes and arguments are then
    priced by what they took, all others by the fitted rates.
    profile: one of this machine, or its path; None is the newest in `cache_dir` (None: the user's cache folder).
    share: of the predicted seconds of all ops, products (matrix products, attention, convolution) first. most: no more calls
    than that. budget_s: seconds for each call and direction, about. Lowered ops, which communicate inside, and ops under autocast
    are not timed; the notes say how many. Raises HardwareError without a profile of this machine.
    """
    if not isinstance(plan, Plan):
        raise InputError(
            f"measure_ops takes a Plan, got {type(plan).__name__}; autoshard.plan makes one, `.plan` of a compiled model is one"
        )
    known = profile if isinstance(profile, Profile) else newest_profile(cache_dir) if profile is None else load_profile(profile)
    device_type = str(known.fingerprint["device_type"])
    if device_type == "cuda" and not torch.cuda.is_available():
        raise HardwareError("the profile is of a GPU, and there is none here; profile and measure on the machine with the GPU")
    costs = CostModel(plan.mesh, known.hardware())
    weight, uses, skipped = _weighed(plan.program, costs)
    total, timed = sum(seconds for _, seconds in weight.values()), 0.0
    ops = dict(known.ops)
    ranked = sorted(weight, key=lambda key: (not weight[key][0], -weight[key][1]))
    for key in ranked[:most]:
        if timed >= share * total:
            break
        timed += weight[key][1]
        ops[key] = _time(uses[key], costs, device_type, budget_s)
    notes = [note for note in known.notes if not note.startswith(_NOTE)]
    if skipped:
        notes.append(f"{_NOTE} {skipped} calls of a plan were not, as they communicate inside, run under autocast or read shapes")
    found = dataclasses.replace(known, ops=ops, notes=tuple(notes))
    found.save(cache_dir)
    return found


_NOTE = "single calls were timed;"


def _weighed(program: Program, costs: CostModel) -> tuple[dict[str, tuple[bool, float]], dict[str, fx.Node], int]:
    """Per distinct call: whether it multiplies, and the predicted seconds of all its uses; a node of each; how many are left out."""
    weight: dict[str, tuple[bool, float]] = {}
    uses: dict[str, fx.Node] = {}
    skipped = 0
    for node, call, seconds in _priced(program, costs):
        rule, _ = bound_rule(node)
        if not seconds:
            continue
        if facts(node).op is not None or facts(node).autocast or rule is None or rule.shape or rule.piece:
            skipped += 1
            continue
        key = op_key(call, costs.local_shapes(call.inputs, _layouts(node)))
        is_product = rule.bound == "matmul"
        weight[key] = (is_product, weight.get(key, (is_product, 0.0))[1] + seconds)
        uses.setdefault(key, node)
    return weight, uses, skipped


def _priced(program: Program, costs: CostModel) -> Iterator[tuple[fx.Node, Call, float]]:
    for node in program.nodes("op"):
        if facts(node).is_constant:
            continue
        call, (rule, equation) = call_of(node), bound_rule(node)
        values, layouts = (*call.inputs, *call.outputs), [*_layouts(node), *facts(node).layouts]
        split = split_of(equation, _factors(node, costs), program.mesh.shape)
        yield node, call, costs.op_s(call.op, rule, equation, values, layouts, split, None if facts(node).op else call)


def _layouts(node: fx.Node) -> list[Layout]:
    return [facts(operand).layout for operand in tensor_operands(node)]


def _time(node: fx.Node, costs: CostModel, device_type: str, budget_s: float) -> tuple[float, float]:
    """Seconds of one op node on random local operands."""
    call, operands = call_of(node), list(tensor_operands(node))
    shapes = costs.local_shapes(call.inputs, _layouts(node))
    tensors = {id(o): _operand(info, shape, device_type) for o, info, shape in zip(operands, call.inputs, shapes, strict=True)}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: tensors[id(n)])

    def work() -> Any:
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return time_call(work, list(tensors.values()), device_type, budget_s)[:2]


def _operand(info: TensorInfo, shape: tuple[int, ...], device_type: str) -> Tensor:
    sizes = [int(size) for size in shape]
    if not info.dtype.is_floating_point and not info.dtype.is_complex:
        return torch.zeros(sizes, dtype=info.dtype, device=device_type)  # indices must exist
    return torch.randn(sizes, dtype=info.dtype, device=device_type).requires_grad_(info.needs_grad)


def extrapolations(program: Program, costs: CostModel) -> list[str]:
    """What a plan's prediction takes from outside the sizes that the hardware's profile measured; nothing for a data sheet."""
    measured = costs.hardware.measured
    if measured is None:
        return []
    amounts: dict[str, list[tuple[float, float]]] = {}  # kind -> size and seconds of each use
    for node, call, seconds in _priced(program, costs):
        if seconds and op_key(call, costs.local_shapes(call.inputs, _layouts(node))) not in measured.ops:
            kind, size = _amount(node, call, costs)
            amounts.setdefault(kind, []).append((size, seconds))
    amounts["collectives"] = list(_sent(program, costs))
    found = list(measured.notes)
    for kind, uses in amounts.items():
        least, most = measured.ranges.get(kind, (math.inf, -math.inf))
        beyond = [seconds for size, seconds in uses if not least <= size <= most]
        share = sum(beyond) / (sum(seconds for _, seconds in uses) or 1.0)
        if share > _MOST_SHARE:
            known = f"{least:.2g} to {most:.2g} {'flops' if kind.startswith('product') else 'bytes'}" if most > 0 else "nothing"
            found.append(
                f"the profile measured {known} of {kind}: {len(beyond)} of {len(uses)} uses are extrapolated, {share:.0%} of their time"
            )
    return found


def _amount(node: fx.Node, call: Call, costs: CostModel) -> tuple[str, float]:
    """Which range an op is judged by, and its flops or bytes on one rank."""
    rule, equation = bound_rule(node)
    values = (*call.inputs, *call.outputs)
    if rule is None or equation is None or rule.bound != "matmul":
        layouts = [*_layouts(node), *facts(node).layouts]
        return "memory", sum(costs.local_bytes(value, layout) for value, layout in zip(values, layouts, strict=True))
    flops = 2.0 * rule.products(equation.sizes, values) / split_of(equation, _factors(node, costs), costs.mesh.shape)
    return f"product {str(call.inputs[0].dtype).removeprefix('torch.')}", flops


def _factors(node: fx.Node, costs: CostModel) -> list[str]:
    return [strategy.factor for strategy in facts(node).strategies] or [""] * costs.mesh.ndim


def _sent(program: Program, costs: CostModel) -> Iterator[tuple[float, float]]:
    """Bytes that the axis holds together, and seconds, of every collective of the conversions."""
    for node in program.nodes("conversion"):
        for axis, name, whole in sent_by(program, node, costs):
            if name in COMMUNICATES and not facts(node).is_constant:
                yield whole, costs.collective_s(name, program.mesh.index(axis), whole)
