"""One training step of one rank of a pipeline on tensors without memory.

What runs is what ranks run: a PipelinedProgram, the engine with its very list of actions, receives and sends, and the emitted programs of
the stages. Messages alone are left out: what is received is there as soon as its buffer is. What is sent on is let go when its gradient
comes back; gradients that are sent back have arrived when the rank sends the next time on a GPU, and on the CPU they stay until the
step ends, as gloo does not say before when a message has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoshard.memory_recorder import Event
from autoshard.pipelined_program import PipelinedProgram
from autoshard.program import Program, facts
from autoshard.rehearsal import REHEARSED_FILE, Around, MakeOptimizer, Phase
from autoshard.runtime.actions import Kind
from autoshard.runtime.pipeline_engine import PipelineEngine
from autoshard.runtime.pipeline_stage import EngineStage, Failure, Stage, Step, Transfer, Values, empty
from autoshard.torch_internals import outside_modes, pytree

_PHASES: dict[str, Phase] = {"F": "forward", "B": "backward", "I": "backward", "W": "backward"}


class _Sent(dist.Work):
    """A message to a neighbour that is not there."""

    def __init__(self, has_arrived: bool) -> None:
        super().__init__()
        self.has_arrived = has_arrived

    def is_completed(self) -> bool:
        return self.has_arrived

    def wait(self, timeout: Any = None) -> bool:
        return True


class StageAlone(Stage):
    """A stage whose neighbours are not there. What it raises is raised."""

    def __init__(
        self,
        plan: EngineStage,
        stage_ranks: Sequence[int],
        step: Step,
        device: torch.device,
        begins: Callable[[Kind, str], None] = lambda kind, action: None,
        receives: Callable[[str, Values], None] = lambda kind, buffers: None,
        tells: bool = True,
    ) -> None:
        """begins: told of every action before it runs; receives: of the buffers that are made for a message.

        tells: whether one can ask if a message has arrived, without waiting for it.
        """
        self.submod, self.stage_index, self.num_stages, self.device = nn.Module(), plan.index, len(stage_ranks), device
        self.group_rank, self.group_size, self.has_backward = stage_ranks[plan.index], max(stage_ranks) + 1, False
        self.begins, self.receives, self.tells = begins, receives, tells
        self._begin(plan, stage_ranks, step)

    def _attempt(self, kind: Kind, microbatch: int, compute: Callable[[], Any]) -> Any:
        self.begins(kind, f"{self.stage_index}{kind}{microbatch}")
        return compute()

    def _receive(self, layouts: Values, stage: int, kind: str, microbatch: int) -> Transfer:
        buffers = tuple(empty(layout, self.device) for layout in layouts)
        self.receives(kind, buffers)
        return Transfer(lambda tensor: None, buffers, str)

    def _send(self, tensors: Values, stage: int, kind: str, microbatch: int) -> Transfer:
        return self._step.post(Transfer(lambda tensor: _Sent(self.tells), tensors, str))


class EngineAlone(PipelineEngine):
    """The engine of one rank whose others are not there."""

    def __init__(self, *parts: Any) -> None:
        """parts: as _begin takes them."""
        self._begin(*parts)

    def fail(self, error: Exception) -> None:
        raise error

    def _exchange_failures(self) -> list[Failure]:
        return []


class StagesStep(PipelinedProgram):
    """What the rank `rank` along `pp` holds, and how it trains."""

    def __init__(self, program: Program, around: Around, rank: int) -> None:
        self.around = around
        held = {facts(node).name: facts(node) for stage in program.stages for node in stage.nodes("parameter", "buffer")}
        self._begin(program, rank, lambda name: self.mine_by_name[name], around.device, lambda: 0)
        names = {facts(node).name for k in self.mine for node in program.stages[k].nodes("parameter", "buffer")}
        self.mine_by_name = {name: around.local(held[name], program.mesh) for name in held if name in names}
        self.arguments = {name: around.local(known, program.mesh) for name, known in program.given().items()}
        around.hold(self.mine_by_name, list(self.arguments.values()), set(self.held))
        self._load(lambda number, text: around.load(program.stages[number], f"{REHEARSED_FILE} {number}", self.read))
        with outside_modes():  # what only says shapes takes no memory
            parts, ranks = [self._engine_stage(stage) for stage in self.stages], self.pipeline.stage_ranks
            self.engine = EngineAlone(parts, ranks, self.pipeline.microbatches, self.device, self._stage_alone)
        self.tied, self.group = {}, None  # type: ignore[assignment]  # nobody is spoken to

    def _stage_alone(self, stage: EngineStage, step: Step) -> Stage:
        position, recorder, tells = self.around.position, self.around.recorder, self.around.kind != "cpu"

        def begins(kind: Kind, action: str) -> None:
            position.enter(_PHASES[kind], action)

        def receives(kind: str, buffers: Values) -> None:
            recorder.hold(buffers, "activations" if kind == "F" else "activation gradients")

        return StageAlone(stage, self.pipeline.stage_ranks, step, self.device, begins, receives, tells)

    def _broadcast(self, value: Tensor) -> None: ...

    def _shape(self, node: Any, how: Any) -> Any:
        with outside_modes():
            return super()._shape(node, how)

    def _reduce(self) -> None:
        recorder, position = self.around.recorder, self.around.position
        position.enter("backward")
        for stage in self.stages:
            recorder.hold([copy.grad for _, copy in stage.made if copy.grad is not None], "gradients")
        super()._reduce()
        for name, leaf in self.leaves.items():
            if leaf.grad is not None:
                recorder.hold([leaf.grad], "gradients", name.rpartition(".")[0])

    def run(self, make: MakeOptimizer | None) -> list[Event]:
        """The step; its events up to the moment when it has ended and nothing is released yet."""
        recorder, leaves = self.around.recorder, [self.arguments.get(name or "") for name in self.program.flat_inputs]
        parameters = [self.mine_by_name[name] for name in self.held if self.mine_by_name[name].requires_grad]
        optimizer = make(parameters) if make is not None and parameters else None
        loss = self.pipeline.loss if make is not None else None
        trains = loss is not None
        self.around.position.enter("forward")
        with torch.set_grad_enabled(trains):
            results = self(leaves)
        whole = (x for k, x in enumerate(pytree.tree_leaves(results)) if self.rank == self.last or not trains or k == loss)
        recorder.hold([x for x in whole if isinstance(x, Tensor)], "activations")
        if loss is not None:
            pytree.tree_leaves(results)[loss].backward()
        if optimizer is not None and loss is not None:
            self.around.optimize(optimizer, self.mine_by_name)
        return list(recorder.events)
