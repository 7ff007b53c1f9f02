"""What a report is about: a plan, and what is computed of it once for several sections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from autoshard.cost_report import CostReport
from autoshard.costs import CostModel
from autoshard.explanation import Explanation
from autoshard.memory import Memory
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
    def memory(self) -> Memory | None:
        """Predicted memory, where it was asked for: that takes seconds."""
        return self.plan.memory() if self.has_memory else None

    @property
    def costs(self) -> CostModel:
        return CostModel(self.plan.mesh, self.plan.hardware)

    @property
    def budget_bytes(self) -> float | None:
        """The memory budget that the plan was made under; files of plans do not hold it."""
        from autoshard.passes import AnnotateShardings

        passes = self.plan.resolver.passes if self.plan.resolver else ()
        return next((a_pass.memory_budget_bytes for a_pass in passes if isinstance(a_pass, AnnotateShardings)), None)
