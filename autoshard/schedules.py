"""The order in which the ranks of a pipeline compute: what a schedule is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["F", "B", "I", "W"]  # forward, whole backward, backward of inputs, backward of weights


@dataclass(frozen=True, slots=True)
class Action:
    """One stage computes one microbatch."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Schedule = tuple[tuple[Action, ...], ...]  # the actions of each pipeline rank, in order
