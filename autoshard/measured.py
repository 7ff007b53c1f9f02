"""What of a hardware was measured: the ranges of sizes behind its rates, and seconds of single calls that replace the roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoshard.errors import HardwareError
from autoshard.ops.row import Call, TensorInfo

Range = tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """ranges: least and most of what was measured, by kind: flops of products (`product float32`), bytes (`memory`, `collective`).

    ops: seconds forward and backward of calls on this device, by op_key. notes: what was not measured and stands on something else.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    ops: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", {kind: tuple(pair) for kind, pair in self.ranges.items()})
        object.__setattr__(self, "ops", {key: tuple(pair) for key, pair in self.ops.items()})
        object.__setattr__(self, "notes", tuple(self.notes))
        for kind, (least, most) in self.ranges.items():
            if not (is_positive(least) and is_positive(most) and least <= most):
                raise HardwareError(f"the measured range of {kind} is {least!r} to {most!r}; measure this machine again")
        for key, (forward_s, backward_s) in self.ops.items():
            if not (is_positive(forward_s) and is_positive(backward_s, zero=True)):
                raise HardwareError(f"the measured seconds of {key} are {forward_s!r} and {backward_s!r}; measure this machine again")
        if not all(isinstance(note, str) and note.isprintable() for note in self.notes):
            raise HardwareError("the notes of a measured hardware are no lines of text; measure this machine again")

    def to_dict(self) -> dict[str, Any]:
        return {"ranges": dict(self.ranges), "ops": dict(self.ops), "notes": list(self.notes)}


def is_positive(value: Any, zero: bool = False) -> bool:
    """Whether a value is a finite number above 0, or 0 where that is allowed."""
    return type(value) in (int, float) and math.isfinite(value) and (value > 0 or (zero and value == 0))


def op_key(call: Call, shapes: Sequence[Sequence[int]]) -> str:
    """Names one use of an op on one rank: the op, local `shapes` of its tensor operands, dtypes, what needs gradients, arguments."""
    operands = [
        f"{str(info.dtype).removeprefix('torch.')}{[int(size) for size in shape]}{'*' if info.needs_grad else ''}"
        for info, shape in zip(call.inputs, shapes, strict=True)
    ]
    given = [f"{name}={_text(value)}" for name, value in call.arguments.items() if not isinstance(value, TensorInfo)]
    return f"{call.op}({', '.join([*operands, *given])})"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return "tensor" if isinstance(value, TensorInfo) else str(value)
