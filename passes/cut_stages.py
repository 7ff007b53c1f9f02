"""cut_stages: say for every op of a program of microbatches in which pipeline stage it stands, and make a program of each stage.

The chain that is cut is the program in order: each op that depends on a microbatch and on weights is a place, with its seconds
forward and backward in the layouts that were chosen, what autograd keeps of it, and over each cut the bytes of what later places
read. Weights are held, gathered and stepped in every stage that reads them; what arguments alone make is computed where it is read.
autoshard.cutting finds the cut of least predicted step time under each schedule; the best of these is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autoshard.errors import PlanError
from autoshard.hardware import Hardware
from autoshard.mesh import PIPELINE_AXIS
from autoshard.pipeline import Pipelining
from autoshard.program import Program, facts
from autoshard.schedules import make_schedule, stage_ranks
from autoshard.stages import kinds_of, readers, stage_programs


@dataclass(frozen=True)
class CutStages:
    """Cut into the stages of axis `pp`; programs without one are left as they are. fixed: by parameter the stages that hold it already.

    Raises PlanError, BudgetError.
    """

    hardware: Hardware
    asked: Pipelining = field(default_factory=Pipelining)
    fixed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    memory_budget_bytes: float | None = None

    def __call__(self, program: Program) -> Program:
        if program.pipeline is None:
            return program
        ranks = program.pipeline.mesh.shape[program.pipeline.mesh.index(PIPELINE_AXIS)]
        name = self.asked.schedule or "1f1b"
        lies = stage_ranks(name, ranks, self.asked.stages_per_rank or 1)
        kinds = kinds_of(program)
        places = [node for node in program.nodes() if kinds[node] == "place" and facts(node).role != "output"]
        if self.fixed:
            _follow(program, self.fixed, len(lies))
        else:
            for k, node in enumerate(places):
                facts(node).stage = k * len(lies) // len(places)
        for node in places:
            if facts(node).role == "projection":
                facts(node).stage = facts(node.args[0]).stage
        order = make_schedule(name, ranks, program.pipeline.microbatches, self.asked.stages_per_rank or 1)
        program.pipeline = replace(program.pipeline, name=name, stage_ranks=lies, schedule=order)
        program.stages = stage_programs(program)
        return program


def _follow(program: Program, fixed: Mapping[str, tuple[int, ...]], stages: int) -> None:
    """Stages in which every place finds its weights where they lie already. Raises PlanError where there are none."""
    kinds = kinds_of(program)
    wanted: dict[fx.Node, set[int]] = {}
    for name, node in program.parameters().items():
        for place in readers(node, kinds):
            wanted[place] = wanted.get(place, set(range(stages))) & set(fixed.get(name, range(stages)))
    stage = 0
    for node in program.nodes():
        if kinds[node] != "place" or facts(node).role == "output":
            continue
        later = [number for number in wanted.get(node, {stage}) if number >= stage]
        if not later:
            raise PlanError(
                f"{node.name} ({facts(node).source}) reads weights of an earlier pipeline stage than what it needs: this call runs the "
                "model in another order than the first one did"
            )
        stage = min(later)
        facts(node).stage = stage
    facts(program.output).stage = stages - 1
