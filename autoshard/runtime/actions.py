"""What a pipeline rank runs: actions, and lists of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .errors import PlanError

Kind = Literal["F", "B", "I", "W"]
"""Forward; whole backward; backward of the inputs; backward of the weights. The letters are those of torch.distributed.pipelining."""


@dataclass(frozen=True, slots=True)
class Action:
    """One stage's work for one microbatch. Its text is torch's: `0F3` is the forward of stage 0 for microbatch 3."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @staticmethod
    def parse(text: str) -> Action:
        """The action that `text` names; raises PlanError for any other text."""
        found = re.fullmatch(r"(\d+)([FBIW])(\d+)", text, re.ASCII)
        if found is None:
            raise PlanError(f"{text!r} is no action of a pipeline schedule; one is written stage, F, B, I or W, microbatch: '0F3'")
        return Action(int(found[1]), found[2], int(found[3]))  # type: ignore[arg-type]


Schedule = tuple[tuple[Action, ...], ...]
"""The compute actions of every pipeline rank, in order."""
