"""cut_stages: say for every op of a program of microbatches in which pipeline stage it stands, and make a program of each stage.

The chain that is cut is the program in order: each op that depends on a microbatch and on weights is a place, with its seconds
forward and backward in the layouts that were chosen, what autograd keeps of it, and over each cut the bytes of what later places
read. Weights are held, gathered and stepped in every stage that reads them; what arguments alone make is computed where it is read.
autoshard.cutting finds the cut of least predicted step time under each schedule; the best of these is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from autoshard.hardware import Hardware
from autoshard.mesh import PIPELINE_AXIS
from autoshard.pipeline import Pipelining
from autoshard.program import Program, facts
from autoshard.schedules import make_schedule, stage_ranks
from autoshard.stages import kinds_of, stage_programs


@dataclass(frozen=True)
class CutStages:
    """Cut into the stages of axis `pp`; programs without one are left as they are. Raises PlanError, BudgetError."""

    hardware: Hardware
    asked: Pipelining = field(default_factory=Pipelining)
    memory_budget_bytes: float | None = None

    def __call__(self, program: Program) -> Program:
        if program.pipeline is None:
            return program
        ranks = program.pipeline.mesh.shape[program.pipeline.mesh.index(PIPELINE_AXIS)]
        name = self.asked.schedule or "1f1b"
        lies = stage_ranks(name, ranks, self.asked.stages_per_rank or 1)
        kinds = kinds_of(program)
        places = [node for node in program.nodes() if kinds[node] == "place" and facts(node).role != "output"]
        for k, node in enumerate(places):
            facts(node).stage = k * len(lies) // len(places)
        for node in places:
            if facts(node).role == "projection":
                facts(node).stage = facts(node.args[0]).stage
        order = make_schedule(name, ranks, program.pipeline.microbatches, self.asked.stages_per_rank or 1)
        program.pipeline = replace(program.pipeline, name=name, stage_ranks=lies, schedule=order)
        program.stages = stage_programs(program)
        return program
