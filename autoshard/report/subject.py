"""What a report is about: a plan, and what is computed of it once for several sections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from autoshard.cost_report import CostReport
from autoshard.costs import CostModel
from autoshard.explanation import Explanation
from autoshard.memory import Memory, device_type_of, memory_by_rank
from autoshard.pipeline_timeline import PipelineTimeline
from autoshard.timeline import Timeline

if TYPE_CHECKING:
    from autoshard.plan import Plan


@dataclass(frozen=True)
class Subject:
    """A plan and what was asked of its report. alternatives: templates to solve for; other: a plan to compare with."""

    plan: Plan
    has_memory: bool = False
    alternatives: tuple[str, ...] = ()
    other: Plan | None = None

    @cached_property
    def cost(self) -> CostReport:
        return self.plan.cost

    @cached_property
    def explanation(self) -> Explanation:
        return self.plan.explain()

    @cached_property
    def timeline(self) -> Timeline | PipelineTimeline:
        return self.plan.timeline()

    @cached_property
    def memories(self) -> tuple[Memory, ...]:
        """Predicted memory of a rank, with pipeline stages of every place along `pp`; () where it was not asked for: it takes seconds."""
        plan, device = self.plan, self.plan.hardware
        return memory_by_rank(plan.program, "adamw", device_type_of(device), device.device.name) if self.has_memory else ()

    @property
    def costs(self) -> CostModel:
        return CostModel(self.plan.mesh, self.plan.hardware)

    @property
    def budget_bytes(self) -> float | None:
        """The memory budget that the plan was made under; files of plans do not hold it."""
        from autoshard.passes import AnnotateShardings, CutStages

        passes = self.plan.resolver.passes if self.plan.resolver else ()
        under = AnnotateShardings if self.plan.program.pipeline is None else CutStages
        return next((a_pass.memory_budget_bytes for a_pass in passes if isinstance(a_pass, under)), None)
