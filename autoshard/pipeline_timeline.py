"""The timeline of a pipeline: when every action of a schedule runs, predicted from what its stages cost."""

from __future__ import annotations

from dataclasses import dataclass

from autoshard.schedules import Kind


@dataclass(frozen=True)
class StageCosts:
    """Seconds and bytes of one stage for one microbatch."""

    forward_s: float
    backward_s: float  # whole backward; I takes backward_input_s, W the rest
    backward_input_s: float = -1.0  # left out: half of backward_s
    send_s: float = 0.0  # of what goes to the next stage, on the link
    send_back_s: float = 0.0  # of the gradients that go to the stage before
    kept_bytes: float = 0.0  # kept for backward by every microbatch in flight
    once_s: float = 0.0  # once a step, before the stage's first action (gathering weights)
    after_s: float = 0.0  # once a step, after the stage's last backward (reducing gradients)

    def __post_init__(self) -> None:
        if self.backward_input_s < 0:
            object.__setattr__(self, "backward_input_s", self.backward_s / 2)


@dataclass(frozen=True)
class PipelineEvent:
    """One action as it ran on a pipeline rank; seconds from the start of the step."""

    rank: int
    stage: int
    kind: Kind
    microbatch: int
    start_s: float
    end_s: float
