"""One training step of one rank's emitted program on tensors without memory, under the recorder of memory_recorder.

What runs is the text that ranks run, autograd, and the optimizer itself; kernels and communication alone are left out. What autograd
keeps, when it lets go, and in which order gradients are made and added up is therefore observed, not modelled.
"""

from __future__ import annotations

import re
import sys
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

from autoshard import autocast, runtime
from autoshard.errors import InputError, PlanError
from autoshard.kernel_stand_ins import BalancedAxis, Kernels, Ops
from autoshard.memory_recorder import Event, Recorder
from autoshard.placements import shard
from autoshard.program import Program, facts
from autoshard.torch_internals import FakeTensor, fake_mode, holders, ops_seen_by_autograd, running_gradient_number

Phase = Literal["rest", "forward", "backward", "optimizer"]
DeviceType = Literal["cpu", "cuda"]
MakeOptimizer = Callable[[list[Tensor]], Optimizer]
OPTIMIZERS: Mapping[str, MakeOptimizer] = {
    "sgd": lambda parameters: SGD(parameters, 1e-3),
    "sgd_momentum": lambda parameters: SGD(parameters, 1e-3, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, 1e-3),
    "adamw": lambda parameters: AdamW(parameters, 1e-3),
    "adafactor": lambda parameters: Adafactor(parameters, 1e-3),
}
_FILE = "<autoshard rehearsal>"
_ASSIGNED = re.compile(r"\s+(\w+) = ")


class Place(NamedTuple):
    """Where a step stands: the node of the program whose forward code or whose gradient is running, where it is one.

    is_again: forward code runs in backward, in a checkpointed region.
    """

    phase: Phase
    node: fx.Node | None = None
    is_again: bool = False


def rehearse(program: Program, optimizer: str | MakeOptimizer | None, device: DeviceType) -> list[Event]:
    """Events of rank 0 (whose pieces are never shorter than another's): what it holds before a step, then one step.

    optimizer: a name of OPTIMIZERS, or what makes a torch optimizer of a list of parameters; None for a forward pass without
    gradients. Optimizer state is there before the step, as in all steps but the first. device: whose kernels are taken into account.
    Backward starts at the first result that is a number, or at the sum of all results where there is none; results live until the
    step ends. Raises InputError for an unknown optimizer, PlanError for a step that must see values.
    """
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        known = ", ".join(map(repr, OPTIMIZERS))
        raise InputError(f"optimizer={optimizer!r} is not known; there are {known}, or pass a function of a list of parameters")
    make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    position = _Position(program)
    state_bytes = torch.get_rng_state().numel() if device == "cpu" else 0  # of the generator; a GPU's lies on the host
    recorder = Recorder(position.place, position.tick, Ops(device))
    try:
        with _apart_from_the_caller(), _without_memory(program) as without_memory, Kernels(device, recorder.take), recorder:
            events = _Step(program, recorder, position, without_memory, state_bytes).run(make)
    except Exception as error:  # whatever an op or an optimizer raises
        raise PlanError(
            "the memory of this step cannot be predicted, as it does not run on tensors without memory"
            f"{_where(error, position)}: {type(error).__name__}: {error}"
        ) from error
    at_rest = [event for event in events if event.place.phase == "rest" or event.block.kind == "optimizer state"]
    return at_rest + [event for event in events if event.place.phase != "rest" and event.block.kind != "optimizer state"]


@contextmanager
def _apart_from_the_caller() -> Iterator[None]:
    """With gradients, and in no region of autocast but the program's own."""
    with torch.inference_mode(False), torch.enable_grad(), autocast.entered(()):
        yield


def _where(error: BaseException, position: _Position) -> str:
    """The node whose line raised, where the emitted program did."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == _FILE]
    node = position.by_line[lines[-1]] if lines else None
    return f", at {node.name} ({facts(node).source})" if node is not None else ""


@contextmanager
def _without_memory(program: Program) -> Iterator[Callable[[Tensor], Tensor]]:
    """Tensors on the meta device; where the program stands in autocast, which knows no such device, fakes that claim to be on the CPU."""
    if not any(facts(node).autocast for node in program.nodes()):
        yield lambda meta: meta
        return
    with fake_mode() as mode:
        yield lambda meta: FakeTensor(mode, meta, torch.device("cpu"))


class _Position:
    """Follows where a step stands: by line of the emitted text, in backward by the number that autograd gave to each forward op."""

    def __init__(self, program: Program) -> None:
        nodes = {node.name: node for node in program.graph.nodes}
        self.phase: Phase = "rest"
        self.by_line: list[fx.Node | None] = [None]
        for line in program.source.splitlines():
            assigned = _ASSIGNED.match(line)
            self.by_line.append(nodes.get(assigned[1], self.by_line[-1]) if assigned else self.by_line[-1])
        self._numbers: list[int] = []  # autograd's count when a line had been reached, and the line's node
        self._nodes: list[fx.Node | None] = []
        self._last: fx.Node | None = None

    def place(self) -> Place:
        if self.phase in ("forward", "backward"):
            node, is_text = self._of_text()
            if self.phase == "backward":
                return Place("backward", node if is_text else self._of_gradient(), is_text)
            return Place("forward", node)
        return Place(self.phase)

    def tick(self) -> None:
        if self.phase == "forward":
            number = ops_seen_by_autograd()
            if not self._numbers or self._numbers[-1] != number:
                self._numbers.append(number)
                self._nodes.append(self._of_text()[0])

    def _of_text(self) -> tuple[fx.Node | None, bool]:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename == _FILE:
                return self.by_line[frame.f_lineno], True
            frame = frame.f_back
        return None, False

    def _of_gradient(self) -> fx.Node | None:
        number = running_gradient_number()
        if number is not None:
            found = bisect_right(self._numbers, number)
            self._last = self._nodes[found] if found < len(self._nodes) else self._last
        return self._last


class _AtRest(torch.autograd.Function):
    """A parameter as the program reads it: as torch_internals.local_of reads a DTensor's, copies of gradients included."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        is_shared = holders(grad)[0] > 1 or not grad.is_contiguous()
        return grad.clone(memory_format=torch.contiguous_format) if is_shared else grad


class _Step:
    """What rank 0 holds, and how it trains."""

    def __init__(
        self,
        program: Program,
        recorder: Recorder,
        position: _Position,
        without_memory: Callable[[Tensor], Tensor],
        state_bytes: int,
    ) -> None:
        self.program, self.recorder, self.position, self.state_bytes = program, recorder, position, state_bytes
        self.without_memory = without_memory
        self.held = {facts(node).name: self._local(node) for node in program.nodes("parameter", "buffer")}
        self.inputs = [self._local(node) for node in program.nodes("input")]
        self.parameters = [self.held[name] for name in program.parameters() if self.held[name].requires_grad]
        for name, tensor in self.held.items():
            kind = "parameters" if name in program.parameters() else "buffers"
            recorder.hold([tensor], kind, name.rpartition(".")[0])
        recorder.hold(self.inputs, "inputs")

    def _local(self, node: fx.Node) -> Tensor:
        known = facts(node)
        whole = torch.empty([*map(int, known.value.shape)], dtype=known.value.dtype, device="meta")
        piece = shard(whole, known.layout, self.program.mesh, (0,) * self.program.mesh.ndim)
        tensor = self.without_memory(torch.empty(piece.shape, dtype=piece.dtype, device="meta"))
        return tensor.requires_grad_(known.value.needs_grad)

    def run(self, make: MakeOptimizer | None) -> list[Event]:
        """The step; its events up to the moment when it has ended and nothing is released yet."""
        rank = self._rank()
        optimizer = make(self.parameters) if make is not None and self.parameters else None
        if make is None or not any(x.requires_grad for x in (*self.parameters, *self.inputs)):
            self.position.phase = "forward"
            with torch.no_grad():
                results = rank.forward(*self.inputs)
            return list(self.recorder.events)
        self.position.phase = "forward"
        results = [x for x in rank.forward(*self.inputs) if isinstance(x, Tensor)]
        loss = loss_of(results)
        self.position.phase = "backward"
        if loss is not None:
            loss.backward()
        for name, tensor in (*self.held.items(), *(("", x) for x in self.inputs)):
            if tensor.grad is not None:
                self.recorder.hold([tensor.grad], "gradients", name.rpartition(".")[0])
        if optimizer is None:
            return list(self.recorder.events)
        self.position.phase = "optimizer"
        self.recorder.take(0)  # an optimizer without temporaries has its place on the curve too
        optimizer.step()
        for name, tensor in self.held.items():
            state = optimizer.state.get(tensor, {})
            self.recorder.hold([x for x in state.values() if isinstance(x, Tensor)], "optimizer state", name.rpartition(".")[0])
        return list(self.recorder.events)

    def _rank(self) -> Any:
        """The emitted program, loaded; constants are computed."""
        sys.modules.setdefault("autoshard_runtime", runtime)
        space: dict[str, Any] = {"__name__": "rehearsal"}
        exec(compile(self.program.source, _FILE, "exec"), space)
        axes = [BalancedAxis(name, size, 0, "") for name, size in zip(self.program.mesh.axes, self.program.mesh.shape, strict=True)]
        device, state_bytes = self.without_memory(torch.empty(0, device="meta")).device, self.state_bytes

        base: Any = space["Rank"]

        class Rehearsed(base):
            def random(self, site: int, axes: Any, op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
                generator = torch.empty(state_bytes, dtype=torch.uint8, device=device)  # noqa: F841 - kept while it draws by a seed
                return op(*args, **kwargs)

        rank = Rehearsed(axes, lambda name: _AtRest.apply(x) if (x := self.held[name]).requires_grad else x, device)
        with torch.no_grad():
            rank._constants = rank.constants()
        self.recorder.hold(rank._constants.values(), "buffers")
        return rank


def loss_of(results: Sequence[Tensor]) -> Tensor | None:
    """What backward starts from: the first result that is a number and has a gradient, else the sum of all that have one."""
    graded = [x for x in results if x.requires_grad]
    numbers = [x for x in graded if x.dim() == 0]
    if numbers or not graded:
        return numbers[0] if numbers else None
    total = graded[0].sum()
    for x in graded[1:]:
        total = total + x.sum()
    return total
