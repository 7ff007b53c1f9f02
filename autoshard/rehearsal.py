"""One training step of one rank's emitted program on tensors without memory, under the recorder of memory_recorder.

What runs is the text that ranks run, autograd, and the optimizer itself; kernels and communication alone are left out. What autograd
keeps, when it lets go, and in which order gradients are made and added up is therefore observed, not modelled.
"""

from __future__ import annotations

import re
import sys
import traceback
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

from autoshard import autocast, runtime
from autoshard.errors import InputError, PlanError
from autoshard.kernel_stand_ins import BalancedAxis, Kernels, Ops
from autoshard.memory_recorder import Event, Recorder
from autoshard.mesh import MeshSpec
from autoshard.placements import shard
from autoshard.program import Facts, Program, facts
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
REHEARSED_FILE = "<autoshard rehearsal>"
_ASSIGNED = re.compile(r"\s+(\w+) = ")


class Place(NamedTuple):
    """Where a step stands: the node of the program whose forward code or whose gradient is running, where it is one.

    is_again: forward code runs in backward, in a checkpointed region. action: of a pipeline's schedule, "0F3".
    """

    phase: Phase
    node: fx.Node | None = None
    is_again: bool = False
    action: str = ""


def rehearse(program: Program, optimizer: str | MakeOptimizer | None, device: DeviceType, stage_rank: int = 0) -> list[Event]:
    """Events of a rank (one whose pieces are never shorter than another's): what it holds before a step, then one step.

    With pipeline stages that is the rank `stage_rank` along `pp`, and the step is what a PipelinedProgram does there by the plan's
    schedule (autoshard.stage_rehearsal). optimizer: a name of OPTIMIZERS, or what makes a torch optimizer of a list of parameters;
    None for a forward pass without gradients. Optimizer state is there before the step, as in all steps but the first. device: whose
    kernels are taken into account.
    Backward starts at the first result that is a number, or at the sum of all results where there is none; results live until the
    step ends. Raises InputError for an unknown optimizer, PlanError for a step that must see values.
    """
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        known = ", ".join(map(repr, OPTIMIZERS))
        raise InputError(f"optimizer={optimizer!r} is not known; there are {known}, or pass a function of a list of parameters")
    make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    texts = {f"{REHEARSED_FILE} {number}": stage for number, stage in enumerate(program.stages)} or {REHEARSED_FILE: program}
    position = Position(texts)
    recorder = Recorder(position.place, position.tick, Ops(device))
    try:
        with _apart_from_the_caller(), _without_memory(program) as without_memory, Kernels(device, recorder.take), recorder:
            around = Around(recorder, position, without_memory, device)
            if program.pipeline is None:
                events = Step(program, around).run(make)
            else:
                from autoshard.stage_rehearsal import StagesStep

                events = StagesStep(program, around, stage_rank).run(make)
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


def _where(error: BaseException, position: Position) -> str:
    """The node whose line raised, where the emitted program did."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    nodes = [position.by_line[file][line] for file, line in frames if file in position.by_line]
    node = nodes[-1] if nodes else None
    return f", at {node.name} ({facts(node).source})" if node is not None else ""


@contextmanager
def _without_memory(program: Program) -> Iterator[Callable[[Tensor], Tensor]]:
    """Tensors on the meta device; where the program stands in autocast, which knows no such device, fakes that claim to be on the CPU."""
    if not any(facts(node).autocast for node in program.nodes()):
        yield lambda meta: meta
        return
    with fake_mode() as mode:
        yield lambda meta: FakeTensor(mode, meta, torch.device("cpu"))


class Position:
    """Follows where a step stands: by line of the emitted text, in backward by the number that autograd gave to each forward op."""

    def __init__(self, texts: Mapping[str, Program]) -> None:
        """texts: by the name of the file that it is compiled as, a program with its text."""
        self.phase: Phase = "rest"
        self.action = ""
        self.by_line = {file: _nodes_by_line(program) for file, program in texts.items()}
        self._numbers: list[int] = []  # autograd's count when a line had been reached, and the line's node
        self._nodes: list[fx.Node | None] = []
        self._last: fx.Node | None = None

    def enter(self, phase: Phase, action: str = "") -> None:
        """A phase begins; with pipeline stages an action, and then forward may follow backward."""
        if phase == "forward":
            self._count(None)  # what autograd numbered since the last op is no forward op's
        self.phase, self.action = phase, action

    def place(self) -> Place:
        if self.phase in ("forward", "backward"):
            node, is_text = self._of_text()
            if self.phase == "backward":
                return Place("backward", node if is_text else self._of_gradient(), is_text, self.action)
            return Place("forward", node, False, self.action)
        return Place(self.phase)

    def tick(self) -> None:
        if self.phase == "forward":
            self._count(self._of_text()[0])

    def _count(self, node: fx.Node | None) -> None:
        number = ops_seen_by_autograd()
        if not self._numbers or self._numbers[-1] != number:
            self._numbers.append(number)
            self._nodes.append(node)

    def _of_text(self) -> tuple[fx.Node | None, bool]:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename in self.by_line:
                return self.by_line[frame.f_code.co_filename][frame.f_lineno], True
            frame = frame.f_back
        return None, False

    def _of_gradient(self) -> fx.Node | None:
        number = running_gradient_number()
        if number is not None:
            found = bisect_right(self._numbers, number)
            node = self._nodes[found] if found < len(self._nodes) else None
            self._last = self._last if node is None else node
        return self._last


def _nodes_by_line(program: Program) -> list[fx.Node | None]:
    """By line of a program's text, from 1: the node whose statement begins there or before."""
    nodes = {node.name: node for node in program.graph.nodes}
    found: list[fx.Node | None] = [None]
    for line in program.source.splitlines():
        assigned = _ASSIGNED.match(line)
        found.append(nodes.get(assigned[1], found[-1]) if assigned else found[-1])
    return found


class _AtRest(torch.autograd.Function):
    """A parameter as the program reads it: as torch_internals.local_of reads a DTensor's, copies of gradients included."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        is_shared = holders(grad)[0] > 1 or not grad.is_contiguous()
        return grad.clone(memory_format=torch.contiguous_format) if is_shared else grad


@dataclass(frozen=True)
class Around:
    """What a step is rehearsed with. kind: of the device that is imitated."""

    recorder: Recorder
    position: Position
    without_memory: Callable[[Tensor], Tensor]
    kind: DeviceType

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, needs_grad: bool) -> Tensor:
        return self.without_memory(torch.empty(tuple(shape), dtype=dtype, device="meta")).requires_grad_(needs_grad)

    def local(self, known: Facts, mesh: MeshSpec) -> Tensor:
        """A parameter, buffer or argument as a rank has it."""
        whole = torch.empty([*map(int, known.value.shape)], dtype=known.value.dtype, device="meta")
        piece = shard(whole, known.layout, mesh, (0,) * mesh.ndim)
        return self.tensor(piece.shape, piece.dtype, known.value.needs_grad)

    def hold(self, held: Mapping[str, Tensor], inputs: Sequence[Tensor], parameters: Collection[str]) -> None:
        """What lies there before the step. held: parameters and buffers by name."""
        for name, tensor in held.items():
            self.recorder.hold([tensor], "parameters" if name in parameters else "buffers", name.rpartition(".")[0])
        self.recorder.hold(inputs, "inputs")

    def load(self, program: Program, file: str, tensor: Callable[[str], Tensor]) -> Any:
        """The emitted program, loaded; constants are computed. tensor: what it reads by name."""
        sys.modules.setdefault("autoshard_runtime", runtime)
        space: dict[str, Any] = {"__name__": "rehearsal"}
        exec(compile(program.source, file, "exec"), space)
        axes = [BalancedAxis(name, size, 0, "") for name, size in zip(program.mesh.axes, program.mesh.shape, strict=True)]
        device = self.device
        state_bytes = torch.get_rng_state().numel() if self.kind == "cpu" else 0  # of the generator; a GPU's lies on the host
        base: Any = space["Rank"]

        class Rehearsed(base):
            def random(self, site: int, axes: Any, op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
                generator = torch.empty(state_bytes, dtype=torch.uint8, device=device)  # noqa: F841 - kept while it draws by a seed
                return op(*args, **kwargs)

        rank = Rehearsed(axes, tensor, device)
        with torch.no_grad():
            rank._constants = rank.constants()
        self.recorder.hold(rank._constants.values(), "buffers")
        return rank

    @property
    def device(self) -> torch.device:
        return self.without_memory(torch.empty(0, device="meta")).device

    def optimize(self, optimizer: Optimizer, held: Mapping[str, Tensor]) -> None:
        """The optimizer's step; what it keeps then is its state."""
        self.position.enter("optimizer")
        self.recorder.take(0)  # an optimizer without temporaries has its place on the curve too
        optimizer.step()
        for name, tensor in held.items():
            state = optimizer.state.get(tensor, {})
            self.recorder.hold([x for x in state.values() if isinstance(x, Tensor)], "optimizer state", name.rpartition(".")[0])


class Step:
    """What a rank without pipeline stages holds, and how it trains."""

    def __init__(self, program: Program, around: Around) -> None:
        self.program, self.around = program, around
        self.held = {facts(node).name: around.local(facts(node), program.mesh) for node in program.nodes("parameter", "buffer")}
        self.inputs = [around.local(facts(node), program.mesh) for node in program.nodes("input")]
        self.parameters = [self.held[name] for name in program.parameters() if self.held[name].requires_grad]
        around.hold(self.held, self.inputs, program.parameters())

    def run(self, make: MakeOptimizer | None) -> list[Event]:
        """The step; its events up to the moment when it has ended and nothing is released yet."""
        position, recorder = self.around.position, self.around.recorder
        rank = self.around.load(self.program, REHEARSED_FILE, lambda name: _AtRest.apply(x) if (x := self.held[name]).requires_grad else x)
        optimizer = make(self.parameters) if make is not None and self.parameters else None
        if make is None or not any(x.requires_grad for x in (*self.parameters, *self.inputs)):
            position.enter("forward")
            with torch.no_grad():
                results = rank.forward(*self.inputs)
            return list(recorder.events)
        position.enter("forward")
        results = [x for x in rank.forward(*self.inputs) if isinstance(x, Tensor)]
        loss = loss_of(results)
        position.enter("backward")
        if loss is not None:
            loss.backward()
        for name, tensor in (*self.held.items(), *(("", x) for x in self.inputs)):
            if tensor.grad is not None:
                recorder.hold([tensor.grad], "gradients", name.rpartition(".")[0])
        if optimizer is not None:
            self.around.optimize(optimizer, self.held)
        return list(recorder.events)


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
