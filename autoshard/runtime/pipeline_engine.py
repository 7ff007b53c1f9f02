"""Runs the stages of a pipeline on real processes, by any schedule: torch.distributed.pipelining keeps the order, stages come from a plan.

Every rank of a group runs one stage or several. Values go from stage to stage, gradients come back; what a stage does for a
microbatch is a function of the values it received. When a step ends, every rank knows whether every stage ran:

    rank 0   0F0 0F1 .   .   0B0 0B1   |  all-reduce: did anything fail?
    rank 1   .   1F0 1B0 1F1 1B1       |
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The runtime, its actions, and the pass that adds sends and receives to them. If they move: `check_library` says so.
from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _ComputationType, _PipelineScheduleRuntime, _validate_schedule

from .actions import Action, Schedule
from .errors import PlanError, StageError
from .pipeline_stage import EngineStage, Failure, Stage, Step, spell

__all__ = ["EngineStage", "PipelineEngine"]


class PipelineEngine:
    """The stages of one rank, and how they run. Making one and running it are collective: every rank of `group` takes part.

    stages: those of this rank. stage_ranks: for every stage of the pipeline, the rank within `group` that runs it; any map in
    which every rank runs a stage. Raises PlanError, on all ranks, where ranks disagree or a stage passes on other values than
    the next one receives.

    A step in which a stage raised ends on every rank with StageError, which shows what was raised first; its gradients are
    incomplete, and the next step may run. Where a rank is gone, or did not answer within the group's timeout, the step ends with
    StageError too, and so does every step after it. On a GPU a step ends with a synchronisation: that is where ranks learn
    whether all went well.
    """

    def __init__(
        self,
        stages: Sequence[EngineStage],
        stage_ranks: Sequence[int],
        microbatches: int,
        group: dist.ProcessGroup,
        device: torch.device,
        everyone: dist.ProcessGroup | None = None,
    ) -> None:
        """everyone: the ranks that must learn of a failure, `group` and others that run the same pipeline on other data."""
        check_library()
        self._group, self._everyone = group, everyone or group
        _raise_disagreements(stages, tuple(stage_ranks), microbatches, group)
        here = torch.empty(0, device=device).device  # with its index
        self._begin(stages, stage_ranks, microbatches, here, lambda stage, step: Stage(stage, stage_ranks, step, group, here))

    def _begin(
        self,
        stages: Sequence[EngineStage],
        stage_ranks: Sequence[int],
        microbatches: int,
        device: torch.device,
        make: Callable[[EngineStage, Step], Stage],
    ) -> None:
        """What needs no other rank."""
        self._stage_ranks, self._microbatches, self._device = tuple(stage_ranks), microbatches, device
        self._failed: Exception | None = None
        self._step = Step()
        self._stages = [make(stage, self._step) for stage in sorted(stages, key=lambda stage: stage.index)]
        self._forwards = _Runtime(self._stages, microbatches, _forward_actions(self._stage_ranks, microbatches))
        self._training: tuple[Schedule, _Runtime, bool] | None = None
        self._lost = ""

    def train(self, schedule: Schedule, loss: int) -> list[tuple[Tensor, ...]]:
        """Forward and backward of every microbatch, in the schedule's order; gradients add up in the leaves that stages read.

        loss: which result of the last stage backward starts from, with 1 for every microbatch. Returns the results of every
        microbatch, detached, on the rank of the last stage, [] elsewhere. Raises StageError, PlanError for a bad schedule.
        """
        if self._training is None or self._training[0] != schedule:
            actions = _training_actions(schedule, self._stage_ranks, self._microbatches)
            splits = any(action.kind == "I" for own in schedule for action in own)
            self._training = schedule, _Runtime(self._stages, self._microbatches, actions), splits
        self._step.trains, self._step.splits, self._step.loss = True, self._training[2], loss
        return self._run(self._training[1], torch.enable_grad())

    def evaluate(self) -> list[tuple[Tensor, ...]]:
        """Forward of every microbatch, without gradients. Returns and raises as `train` does."""
        self._step.trains = False
        return self._run(self._forwards, torch.no_grad())

    def fail(self, error: Exception) -> None:
        """Let the next step end on all ranks with what this rank raised before it; it computes nothing in that step."""
        self._failed = error

    def measure(self, schedule: Schedule, loss: int) -> list[tuple]:
        """One step as `train` runs it, and what every rank ran when: rank, stage, kind, microbatch, start, end in s from a common start.

        The same on every rank. Raises as `train` does. On an accelerator every action is waited for, which the step as it is otherwise
        run does not do.
        """
        self._step.measured = []
        try:
            dist.barrier(group=self._group)
            start = time.perf_counter()
            self.train(schedule, loss)
            own = [(stage, kind, number, a - start, b - start) for stage, kind, number, a, b in self._step.measured]
        finally:
            self._step.measured = None
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, own, group=self._group)
        return [(rank, *event) for rank, events in enumerate(everyone) for event in events]

    def _run(self, runtime: _Runtime, mode: AbstractContextManager) -> list[tuple[Tensor, ...]]:
        if self._lost:
            raise StageError(f"this pipeline stopped for good in an earlier step: {self._lost}. Start its processes again.")
        step, self._lost = self._step, "it was interrupted"
        step.failure, step.cause = None, None
        if self._failed is not None:
            error, self._failed = self._failed, None
            step.failure = Failure(time.time(), f"before the first microbatch, on rank {dist.get_rank()}: {type(error).__name__}: {error}")
            step.cause = error
        try:
            with mode:
                runtime.run()
            while step.sends:
                step.sends.popleft().wait()
            failures = self._exchange_failures()
            self._lost = ""
        except Exception as error:
            self._lost = str(error)
            raise
        finally:
            cause, step.cause = step.cause, None
            results = [step.results[number] for number in sorted(step.results)]
            step.results.clear()
            step.sends.clear()
            for stage in self._stages:
                stage.clear_runtime_states()
        if failures:
            raise StageError(_told(failures)) from cause
        return results

    def _exchange_failures(self) -> list[Failure]:
        """Of all ranks, in the order in which they happened; [] costs one small all-reduce."""
        try:
            mark = torch.tensor(self._step.failure is not None, dtype=torch.int32, device=self._device)
            dist.all_reduce(mark, dist.ReduceOp.MAX, group=self._everyone)
            if not mark.item():
                return []
            everyone: list[Any] = [None] * dist.get_world_size(self._everyone)
            dist.all_gather_object(everyone, self._step.failure, group=self._everyone)
        except Exception as error:
            own = self._step.failure.text if self._step.failure else f"rank {dist.get_rank()} ran its part of a step"
            raise StageError(f"{own}; then a rank of the pipeline was gone, or late: {error}") from error
        return sorted((failure for failure in everyone if failure), key=lambda failure: failure.at_s)


def _told(failures: Sequence[Failure]) -> str:
    first, *later = [failure.text for failure in failures]
    return f"{first}. After it: {'; '.join(later)}" if later else first


def _raise_disagreements(stages: Sequence[EngineStage], stage_ranks: tuple[int, ...], microbatches: int, group: dist.ProcessGroup) -> None:
    """Raise the same PlanError on every rank where the parts of the pipeline do not fit together."""
    mine = stage_ranks, microbatches, [(stage.index, _metas(stage.received), _metas(stage.sent)) for stage in stages]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    wrong = disagreements(everyone)
    if wrong:
        raise PlanError(f"the stages of this pipeline do not fit together: {'; '.join(wrong)}")


def _metas(values: Sequence[Tensor]) -> list[tuple]:
    return [(spell(value), torch.empty_like(value, device="meta").stride(), value.requires_grad) for value in values]


def disagreements(everyone: Sequence[tuple[tuple[int, ...], int, Sequence[tuple[int, list, list]]]]) -> list[str]:
    """What is wrong with a pipeline of which each rank says (stage_ranks, microbatches, [(stage, received, sent)])."""
    stage_ranks, microbatches, _ = everyone[0]
    if any((ranks, count) != (stage_ranks, microbatches) for ranks, count, _ in everyone):
        each = (f"rank {n} has stage_ranks {ranks} and {count} microbatches" for n, (ranks, count, _) in enumerate(everyone))
        return [f"ranks disagree: {', '.join(each)}"]
    wrong = [] if microbatches > 0 else [f"{microbatches} microbatches"]
    if set(stage_ranks) != set(range(len(everyone))):
        wrong.append(f"stage_ranks {list(stage_ranks)} must name every rank of 0 to {len(everyone) - 1} at least once, and no other")
    for rank, (_, _, stages) in enumerate(everyone):
        planned = [stage for stage, where in enumerate(stage_ranks) if where == rank]
        if sorted(stage for stage, _, _ in stages) != planned:
            wrong.append(f"rank {rank} brings stages {sorted(stage for stage, _, _ in stages)}, stage_ranks say {planned}")
    known = {stage: (received, sent) for _, _, stages in everyone for stage, received, sent in stages}
    if known.get(0, ([],))[0]:
        wrong.append(f"stage 0 receives {known[0][0]}, but there is no stage before it")
    for stage in range(1, len(stage_ranks)):
        if stage in known and stage - 1 in known and known[stage - 1][1] != known[stage][0]:
            wrong.append(f"stage {stage - 1} sends {known[stage - 1][1]}, stage {stage} receives {known[stage][0]}")
    return wrong


# ------------------------------------------------------------------------------------------------------------ the library


class _Runtime(_PipelineScheduleRuntime):
    """The library's loop over this rank's actions."""

    def __init__(self, stages: Sequence[Stage], microbatches: int, actions: dict[int, list[_Action]]) -> None:
        super().__init__(list(stages), microbatches, scale_grads=False)
        self.pipeline_order_with_comms = actions

    def _initialize_stages(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the plan says all shapes, and a stage makes its buffers itself."""

    def run(self) -> None:
        """Run the actions. What goes wrong is raised, without the library's listing of every rank's actions."""
        library = logging.getLogger(_PipelineScheduleRuntime.__module__)
        was, library.disabled = library.disabled, True
        try:
            self.step(return_outputs=False)
        finally:
            library.disabled = was


def _training_actions(schedule: Schedule, stage_ranks: Sequence[int], microbatches: int) -> dict[int, list[_Action]]:
    """A training schedule with its sends and receives. Raises PlanError for one that is incomplete or could not run."""
    actions = _actions(schedule)
    where = {action.stage: rank for rank, own in enumerate(schedule) for action in own}
    if where != dict(enumerate(stage_ranks)) or any(len(set(own)) < len(own) for own in schedule):
        raise PlanError(f"the schedule runs stages on other ranks than {list(stage_ranks)}, or an action twice: {_shown(schedule)}")
    splits = any(action.kind in "IW" for own in schedule for action in own)
    if splits and torch.torch_version.TorchVersion(torch.__version__) < (2, 13):  # type: ignore[operator]
        raise PlanError("before torch 2.13 gradients are wrong where backward is split into I and W: take a schedule without, such as 1f1b")
    try:
        _validate_schedule(actions, len(schedule), len(stage_ranks), microbatches)
        return _add_send_recv(actions, stage_ranks.__getitem__, len(stage_ranks))
    except (AssertionError, KeyError) as error:
        raise PlanError(f"this schedule of {microbatches} microbatches cannot run: {error}; {_shown(schedule)}") from error


def _forward_actions(stage_ranks: Sequence[int], microbatches: int) -> dict[int, list[_Action]]:
    """Forwards alone, with sends and receives, in the order that suits stages which take equally long."""
    order = sorted(itertools.product(range(len(stage_ranks)), range(microbatches)), key=lambda at: (sum(at), -at[0]))
    schedule = tuple(tuple(Action(s, "F", m) for s, m in order if stage_ranks[s] == rank) for rank in range(max(stage_ranks) + 1))
    return _add_send_recv(_actions(schedule), stage_ranks.__getitem__, len(stage_ranks))


def _actions(schedule: Schedule) -> dict[int, list[Any]]:
    return {rank: [_Action(a.stage, _ComputationType(a.kind), a.microbatch) for a in own] for rank, own in enumerate(schedule)}


def _shown(schedule: Schedule) -> str:
    return "; ".join(f"rank {rank}: {' '.join(map(str, own))}" for rank, own in enumerate(schedule))


_EXPECTED_LISTS = [["0F0", "0SEND_F0", "0RECV_B0", "0B0"], ["1RECV_F0", "1F0", "1I0", "1SEND_B0", "1W0"]]
_EXPECTED_CALLS = [
    "clear_runtime_states",
    "get_fwd_recv_ops",
    "forward_one_chunk",
    "backward_one_chunk",
    "get_bwd_send_ops",
    "backward_weight_one_chunk",
]


class _Witness:
    """Takes a stage's place, stage 1 of 2 on rank 1 of 2, and notes what the runtime asks of it."""

    stage_index, num_stages, group_rank, group_size, is_first, is_last = 1, 2, 1, 2, False, True

    def __init__(self) -> None:
        self.submod, self.asked = torch.nn.Module(), list[str]()

    def __getattr__(self, name: str) -> Any:
        def note(*args: Any, **kwargs: Any) -> list:
            self.asked.append(name)
            return []

        return note


@functools.cache
def check_library() -> None:
    """Raises PlanError where torch.distributed.pipelining is not the library that these files were written for.

    All of it is private: the messages that it adds to a schedule, and what it asks of a stage for every action.
    """
    witness: Any = _Witness()
    lists: Any = {}
    try:
        schedule = ((Action(0, "F", 0), Action(0, "B", 0)), (Action(1, "F", 0), Action(1, "I", 0), Action(1, "W", 0)))
        lists = _add_send_recv(_actions(schedule), (0, 1).__getitem__, 2)
        _Runtime([witness], 1, lists).run()
        problem = ""
    except Exception as error:
        problem = f"{type(error).__name__}: {error}; "
    found = [list(map(str, lists[rank])) for rank in sorted(lists)]
    if problem or (found, witness.asked) != (_EXPECTED_LISTS, _EXPECTED_CALLS):
        found_text = f"{problem}messages {found}, calls {witness.asked}"
        raise PlanError(f"torch {torch.__version__} changed torch.distributed.pipelining ({found_text}): install torch >= 2.11, < 2.14")
