"""One stage on the runtime of torch.distributed.pipelining: what its actions do.

The library runs the list of a rank's actions. What an action does is written here, since the library's own stage sends
only contiguous tensors, wants gradients for integers (before 2.13), keeps a receive buffer for every microbatch for ever,
and finds out shapes by running stages on memory that nobody wrote.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.autograd.profiler import record_function
from torch.distributed.pipelining import PipelineStage

# The two halves of a backward pass. If they move: schedules with I and W.
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from .actions import Kind
from .dtypes import short_dtype
from .errors import PlanError, StageError

Values = tuple[Tensor, ...]
_KINDS = {"F": "forward", "B": "backward", "I": "backward of the inputs", "W": "backward of the weights"}


@dataclass(frozen=True)
class EngineStage:
    """One stage that this rank runs.

    forward: from the values that the stage before passes on and the number of the microbatch to the values for the next
    stage, or to the results at the last one. received, sent: meta tensors of one microbatch; shape, strides, dtype and
    requires_grad are those of the values.
    """

    index: int
    forward: Callable[[Values, int], Values]
    received: Values
    sent: Values
    splits: bool = True


@dataclass(frozen=True)
class Failure:
    """What a stage raised, in words that can be sent to other ranks."""

    at_s: float
    text: str


@dataclass
class Step:
    """The step that a rank runs now; its stages share it."""

    trains: bool = False
    splits: bool = False  # whether the schedule splits backward passes
    loss: int = 0
    failure: Failure | None = None
    cause: Exception | None = None
    results: dict[int, Values] = field(default_factory=dict)
    sends: deque[Transfer] = field(default_factory=deque)
    measured: list[tuple[int, Kind, int, float, float]] | None = None  # stage, kind, microbatch, start and end in s of this clock

    def post(self, transfer: Transfer) -> Transfer:
        """Remember a send until it is done; forget those that are."""
        while self.sends and self.sends[0].is_done():
            self.sends.popleft()
        self.sends.append(transfer)
        return transfer


class Transfer:
    """Tensors on their way between two ranks, in one direction; `what` says which, for errors."""

    def __init__(self, post: Callable[[Tensor], dist.Work | None], tensors: Values, what: Callable[[], str]) -> None:
        self.tensors, self._what = tensors, what
        with self._named():
            self._works = [work for tensor in tensors if (work := post(_flat(tensor)))]

    def wait(self) -> Values:
        """The tensors, once they are there. Raises StageError where the other rank is gone or late."""
        with self._named():
            for work in self._works:
                work.wait()
        tensors, self.tensors, self._works = self.tensors, (), []
        return tensors

    def is_done(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def _named(self) -> _Named:
        return _Named(self._what)


class _Named:
    """Turns errors of communication into a StageError that says what was waited for."""

    def __init__(self, what: Callable[[], str]) -> None:
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            raise StageError(f"{self.what()}: {error}. That rank ended, or was still busy when the timeout ran out.") from error


def _flat(tensor: Tensor) -> Tensor:
    """All of a dense tensor's memory as one dim; what is sent must be contiguous."""
    return tensor.as_strided((tensor.numel(),), (1,))


def empty(layout: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(layout.shape, layout.stride(), dtype=layout.dtype, device=device)


@dataclass
class _Tape:
    """What a forward pass leaves for its backward pass."""

    received: Values
    roots: list[Tensor | GradientEdge | None]  # None: nothing of it needs a gradient
    grads: Sequence[Tensor | None] = ()  # of the roots


class Stage(PipelineStage):
    """A stage as the library's runtime drives it: every method below replaces one of the library's, so that none of theirs runs.

    The hooks that list messages post them themselves and leave none to the runtime: so a rank that waits in vain can say for
    what, receive buffers live from the message to its use, and what was sent is freed once it has arrived.

    A stage that raises computes nothing more in this step, but goes on sending zeros and receiving: nobody waits for it, and
    at the end of the step all ranks learn what happened.
    """

    def __init__(self, plan: EngineStage, stage_ranks: Sequence[int], step: Step, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(nn.Module(), plan.index, len(stage_ranks), device, group=group)
        self._group = group
        self._begin(plan, stage_ranks, step)

    def _begin(self, plan: EngineStage, stage_ranks: Sequence[int], step: Step) -> None:
        """What this class keeps beside the library's stage."""
        self._plan, self._ranks, self._step = plan, tuple(stage_ranks), step
        self._received = tuple(torch.empty_like(meta) for meta in plan.received)  # dense, as they travel
        self._sent = tuple(torch.empty_like(meta) for meta in plan.sent)
        self._arriving: dict[tuple[str, int], Transfer] = {}
        self._inputs: dict[int, Values] = {}
        self._outputs: dict[int, Values] = {}
        self._leaving: dict[int, Transfer] = {}
        self._tapes: dict[int, _Tape] = {}
        self._output_grads: dict[int, tuple[Tensor | None, ...]] = {}
        self._input_grads: dict[int, tuple[Tensor | None, ...]] = {}
        self._weights: dict[int, Callable[[], None]] = {}

    def clear_runtime_states(self) -> None:
        for kept in (self._arriving, self._inputs, self._outputs, self._leaving, self._tapes, self._output_grads, self._input_grads):
            kept.clear()
        self._weights.clear()

    # ------------------------------------------------------------------------------------------------------ messages

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._arriving["F", fwd_chunk_id] = self._receive(self._received, self.stage_index - 1, "F", fwd_chunk_id)
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        layouts = tuple(layout for layout, meta in zip(self._sent, self._plan.sent, strict=True) if meta.requires_grad)
        self._arriving["B", bwd_chunk_id] = self._receive(layouts, self.stage_index + 1, "B", bwd_chunk_id)
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        values = self._outputs.pop(fwd_chunk_id)
        tensors = tuple(self._dense(value, layout) for value, layout in zip(values, self._sent, strict=True))
        sent = self._send(tensors, self.stage_index + 1, "F", fwd_chunk_id)
        if self._step.trains:
            self._leaving[fwd_chunk_id] = sent
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        grads = zip(self._input_grads.pop(bwd_chunk_id), self._received, self._plan.received, strict=True)
        tensors = tuple(self._dense(grad, layout) for grad, layout, meta in grads if meta.requires_grad)
        self._send(tensors, self.stage_index - 1, "B", bwd_chunk_id)
        return []

    def set_local_fwd_input(self, prev_stage_outputs: Values, mb_index: int) -> None:
        self._inputs[mb_index] = prev_stage_outputs

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        return self._input_grads.pop(mb_index)

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        self._output_grads[mb_index] = next_stage_bwd_outputs

    def _is_here(self, stage: int) -> bool:
        return self._ranks[stage] == self.group_rank

    def _receive(self, layouts: Values, stage: int, kind: str, microbatch: int) -> Transfer:
        buffers = tuple(empty(layout, self.device) for layout in layouts)
        post = functools.partial(dist.irecv, group=self._group, group_src=self._ranks[stage])
        return Transfer(post, buffers, functools.partial(self._what, "waited for", kind, microbatch, "from", stage))

    def _send(self, tensors: Values, stage: int, kind: str, microbatch: int) -> Transfer:
        post = functools.partial(dist.isend, group=self._group, group_dst=self._ranks[stage])
        return self._step.post(Transfer(post, tensors, functools.partial(self._what, "sent", kind, microbatch, "to", stage)))

    def _what(self, verb: str, kind: str, microbatch: int, way: str, stage: int) -> str:
        what = f"the {'values' if kind == 'F' else 'gradients'} of microbatch {microbatch}"
        peer = dist.get_global_rank(self._group, self._ranks[stage])
        return f"stage {self.stage_index} on rank {dist.get_rank()} {verb} {what} {way} stage {stage} on rank {peer}"

    def _dense(self, value: Tensor | None, layout: Tensor) -> Tensor:
        """A value as it travels; None is a gradient that nothing contributed to."""
        if value is None:
            return empty(layout, self.device).zero_()
        if value.device == self.device and value.stride() == layout.stride():
            return value
        return empty(layout, self.device).copy_(value)

    # ------------------------------------------------------------------------------------------------------- compute

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Values:
        arriving = self._arriving.pop(("F", fwd_chunk_id), None)
        values = self._inputs.pop(fwd_chunk_id, ()) if arriving is None else arriving.wait()
        outputs = self._attempt("F", fwd_chunk_id, lambda: self._forward(values, fwd_chunk_id))
        if outputs is None:
            outputs = tuple(empty(layout, self.device).zero_() for layout in self._sent)
        if self.is_last:
            self._step.results[fwd_chunk_id] = outputs
        elif not self._is_here(self.stage_index + 1):
            self._outputs[fwd_chunk_id] = outputs
        return outputs

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, full_backward: bool = True, **kwargs: Any) -> None:
        grads = self._arrived_grads(bwd_chunk_id)
        tape = self._tapes.pop(bwd_chunk_id, _Tape((), []))
        tape.grads = grads or tape.grads
        run = self._backward if full_backward or not self._plan.splits else self._backward_of_inputs
        found = self._attempt("B" if full_backward else "I", bwd_chunk_id, lambda: run(tape, bwd_chunk_id))
        self._input_grads[bwd_chunk_id] = (None,) * len(self._received) if found is None else found

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        self._attempt("W", bwd_chunk_id, self._weights.pop(bwd_chunk_id, lambda: None))

    def _attempt(self, kind: Kind, microbatch: int, compute: Callable[[], Any]) -> Any:
        """What `compute` returns; None where it raises, or where anything on this rank raised before it in this step."""
        if self._step.failure is None:
            started = self._now()
            try:
                with record_function(f"{self.stage_index}{kind}{microbatch}"):
                    return compute()
            except Exception as error:
                place = f"stage {self.stage_index}, {_KINDS[kind]} of microbatch {microbatch}, failed on rank {dist.get_rank()}"
                self._step.failure, self._step.cause = Failure(time.time(), f"{place}: {type(error).__name__}: {error}"), error
            finally:
                if self._step.measured is not None:
                    self._step.measured.append((self.stage_index, kind, microbatch, started, self._now()))
        self._tapes.clear()
        self._weights.clear()
        return None

    def _now(self) -> float:
        """The clock where a step is measured, after what the device still has to do."""
        if self._step.measured is None:
            return 0.0
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)
        return time.perf_counter()

    def _forward(self, values: Values, microbatch: int) -> Values:
        if self._step.trains:
            values = tuple(value.requires_grad_(meta.requires_grad) for value, meta in zip(values, self._plan.received, strict=True))
        outputs = self._plan.forward(values, microbatch)
        self._check(outputs)
        if self._step.trains:
            ends = [outputs[self._step.loss]] if self.is_last else outputs
            seeds = [torch.ones_like(ends[0].detach())] if self.is_last else []
            self._tapes[microbatch] = _Tape(values, [self._root(end) for end in ends], seeds)
        return tuple(output.detach() for output in outputs)

    def _check(self, outputs: Values) -> None:
        """Raises PlanError where the outputs are not what the plan says: they would arrive as something else."""
        planned = self._plan.sent
        wrong = [f"{len(outputs)} values instead of {len(planned)}"] if len(outputs) != len(planned) else []
        for number, (output, meta) in enumerate(zip(outputs, planned, strict=False)):
            if output.shape != meta.shape or output.dtype != meta.dtype:
                wrong.append(f"value {number} is {spell(output)} instead of {spell(meta)}")
            elif output.requires_grad and not meta.requires_grad and self._step.trains and not self.is_last:
                wrong.append(f"value {number} needs a gradient, but none is planned to come back")
        if wrong:
            raise PlanError(f"stage {self.stage_index} passes on other values than planned: {'; '.join(wrong)}")

    def _root(self, output: Tensor) -> Tensor | GradientEdge | None:
        """Where backward starts: the edge alone, so that a value may be freed before its gradient comes."""
        if not output.requires_grad:
            return None
        return _Root.apply(output) if self._step.splits and self._plan.splits else get_gradient_edge(output)

    def _arrived_grads(self, microbatch: int) -> tuple[Tensor | None, ...]:
        """Gradients of what the stage passed on, in that order; () at the last stage."""
        arriving = self._arriving.pop(("B", microbatch), None)
        if arriving is None:
            return self._output_grads.pop(microbatch, ())
        found, sent = arriving.wait(), self._leaving.pop(microbatch)
        if found:
            sent.wait()  # it has been used, so it has arrived
        ordered = iter(found)
        return tuple(next(ordered) if meta.requires_grad else None for meta in self._plan.sent)

    def _backward(self, tape: _Tape, microbatch: int) -> tuple[Tensor | None, ...]:
        roots, grads = _with_gradient(tape)
        if roots:
            torch.autograd.backward(roots, grads)
        return tuple(value.grad for value in tape.received)

    def _backward_of_inputs(self, tape: _Tape, microbatch: int) -> tuple[Tensor | None, ...]:
        grads, self._weights[microbatch] = split_backward(tape.received, *_with_gradient(tape))
        return grads


class _Root(torch.autograd.Function):
    """A tensor without memory that backward starts from in place of an output.

    The library's split backward detaches its roots in place, which a view forbids and an op that saved its own result does not survive.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return torch.empty_strided(output.shape, (0,) * output.dim(), dtype=output.dtype, device=output.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _with_gradient(tape: _Tape) -> tuple[list[Any], list[Tensor]]:
    pairs = [(root, grad) for root, grad in zip(tape.roots, tape.grads, strict=True) if root is not None and grad is not None]
    return [root for root, _ in pairs], [grad for _, grad in pairs]


def spell(tensor: Tensor) -> str:
    return f"{short_dtype(tensor.dtype)}{list(tensor.shape)}"


# ------------------------------------------------------------------------------------------------------ split backward


def split_backward(received: Values, roots: list[Tensor], grads: list[Tensor]) -> tuple[tuple[Tensor | None, ...], Callable[[], None]]:
    """Gradients of the received values now, and a function that adds those of all other leaves to their `.grad`.

    The library finds the weights on the way from a root to a received value. It would lose, silently, those of roots that no
    received value reaches, and the whole stage where none needs a gradient: these run whole, later.
    """
    wanted = {id(value): number for number, value in enumerate(received) if value.requires_grad}
    reached = [leaves_of([root]) for root in roots]
    joined = [number for number, leaves in enumerate(reached) if any(id(leaf) in wanted for leaf in leaves)]
    alone = [number for number in range(len(roots)) if number not in joined]
    own_roots, own_grads = [roots[number] for number in alone], [grads[number] for number in alone]
    found: list[Tensor | None] = [None] * len(received)
    groups: list[dict[str, Any]] = []
    weights: list[Any] = []
    if joined:
        ends = [roots[number] for number in joined]
        weights = [leaf for leaf in leaves_of(ends) if id(leaf) not in wanted]
        inputs = [received[number] for number in wanted.values()]
        try:
            found_grads, groups = stage_backward_input(ends, [grads[number] for number in joined], inputs, iter(weights))
        except RuntimeError as error:
            raise error.__cause__ or error  # noqa: B904  # the library wraps what an op raised in a listing of all tensors
        for number, grad in zip(wanted.values(), found_grads, strict=True):
            found[number] = grad

    def backward_of_weights() -> None:
        if own_roots:
            torch.autograd.backward(own_roots, own_grads, retain_graph=True)
        stage_backward_weight(iter(weights), groups, retain_graph=True)  # weights that are used twice share what a group would free

    return tuple(found), backward_of_weights


def leaves_of(roots: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that backward from `roots` reaches."""
    waiting: list[Any] = [get_gradient_edge(root).node for root in roots]
    seen, leaves = set(waiting), []
    while waiting:
        node = waiting.pop()
        if node.name().endswith("AccumulateGrad"):
            leaves.append(node.variable)
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting.extend(new)
    return leaves
