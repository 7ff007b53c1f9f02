"""The memory of a training step of one rank: its peak, the curve over the step, and whose the bytes are.

Nothing is estimated by formula but workspace inside kernels (autoshard.kernel_workspace): the emitted program, autograd and the optimizer
run on tensors without memory (autoshard.rehearsal), and what is alive when is read off. Kinds:

    parameters, buffers, inputs, optimizer state    at rest; buffers with the constants of the program
    gradients               of parameters (and of inputs that have one), from their birth in backward
    activations             made in forward, most of them kept for backward, or made again there by a checkpointed region; results
    gathered weights        made of a parameter alone: gathered, cast, padded
    activation gradients    made in backward, and handed on from op to op
    collective buffers      what collectives receive, and gradients on their way through them
    workspace               all that lives no longer than the op that needs it, the optimizer's temporaries, cuBLAS's workspace
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import fx

from autoshard.caching_allocator import CachingAllocator
from autoshard.hardware import Hardware
from autoshard.memory_recorder import Block, Event
from autoshard.mesh import PIPELINE_AXIS
from autoshard.program import Program, facts
from autoshard.rehearsal import DeviceType, MakeOptimizer, Phase, Place, rehearse
from autoshard.text import human_bytes

KINDS = (
    *("parameters", "gradients", "optimizer state", "buffers", "inputs"),
    *("activations", "gathered weights", "activation gradients", "collective buffers", "workspace"),
)
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")
# What torch hands to cuBLAS at the first matrix product and keeps, in bytes. Source: aten/src/ATen/cuda/CublasHandlePool.cpp.
_CUBLAS = {"a100": 8_519_680, "h100": 33_554_432, "h200": 33_554_432, "b200": 33_554_432}


@dataclass(frozen=True)
class Point:
    """The most that is held while one op of the program (or its gradient) runs; in the optimizer's phase there is no op.

    module, node: where in the model and in the program. by_kind: bytes, in the order of KINDS. action: of a pipeline's schedule, "0F3" is
    the forward of stage 0 for microbatch 3; "" before the first and without stages.
    """

    phase: Phase
    module: str
    node: str
    by_kind: tuple[int, ...]
    action: str = ""

    @property
    def total_bytes(self) -> int:
        return sum(self.by_kind)

    def kinds(self) -> dict[str, int]:
        """Bytes by kind."""
        return dict(zip(KINDS, self.by_kind, strict=True))

    @property
    def where(self) -> str:
        """`backward 1B0, head_linear in head`."""
        phase = f"{self.phase} {self.action}".strip()
        return f"{phase}, {self.node or 'step'}" + (f" in {self.module}" if self.module else "")


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of one rank in one step.

    peak_bytes: most that is allocated at once (torch.cuda.max_memory_allocated on a GPU). margin_bytes: what the GPU's caching
    allocator holds beyond that at its own peak, for fragmentation and rounding of segments; 0 on the CPU. curve: in the order of
    the step. at_peak: bytes by kind; at_peak_by_module: module path -> bytes by kind. notes: what is not counted. stage_rank: the
    rank's place along `pp`, None without pipeline stages.
    """

    optimizer: str
    device: DeviceType
    peak_bytes: int
    margin_bytes: int
    curve: tuple[Point, ...]
    peak: Point
    at_peak_by_module: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...] = ()
    stage_rank: int | None = None

    @property
    def reserved_bytes(self) -> int:
        """What the device must have free for this process."""
        return self.peak_bytes + self.margin_bytes

    @property
    def at(self) -> str:
        """` at pp=1`; nothing without pipeline stages."""
        return "" if self.stage_rank is None else f" at {PIPELINE_AXIS}={self.stage_rank}"

    @property
    def at_peak(self) -> dict[str, int]:
        return self.peak.kinds()

    def peak_of(self, phase: Phase) -> int:
        """Most bytes in one phase: "forward", "backward" or "optimizer"; 0 for one that does not run."""
        return max((point.total_bytes for point in self.curve if point.phase == phase), default=0)

    def table(self, modules: int = 8) -> Table:
        """Bytes by kind at the peak and at that of each phase, and the `modules` that hold most at the peak."""
        title = f"Memory of a rank{self.at}, {self.optimizer}: {human_bytes(self.peak_bytes)} at the peak ({self.peak.where})"
        phases = [phase for phase in PHASES if self.peak_of(phase)]
        table = Table(title=title, caption="\n".join(self.notes) or None, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        for column in ("at the peak", *(f"in {phase}" for phase in phases)):
            table.add_column(column, justify="right", no_wrap=True)
        tops = [max((p for p in self.curve if p.phase == phase), key=lambda p: p.total_bytes) for phase in phases]
        for k, kind in enumerate(KINDS):
            if any(point.by_kind[k] for point in (self.peak, *tops)):
                table.add_row(kind, *(human_bytes(point.by_kind[k]) for point in (self.peak, *tops)))
        table.add_row("together", *(human_bytes(point.total_bytes) for point in (self.peak, *tops)), style="bold")
        if self.margin_bytes:
            table.add_row("fragmentation margin", human_bytes(self.margin_bytes))
        table.add_section()
        ranked = sorted(self.at_peak_by_module.items(), key=lambda item: -sum(item[1].values()))
        for module, kinds in ranked[:modules]:
            table.add_row(module or "the model itself", human_bytes(sum(kinds.values())))
        return table

    def __repr__(self) -> str:
        return f"Memory(peak {human_bytes(self.peak_bytes)} in {self.peak.phase}{self.at}, {self.optimizer}, {self.device})"


def device_type_of(hardware: Hardware) -> DeviceType:
    """What runs on this hardware: a GPU, but for the preset `cpu` and what was measured on something else than one."""
    name = hardware.device.name.lower()
    is_cpu = name == "cpu" if hardware.measured is None else "nvidia" not in name
    return "cpu" if is_cpu else "cuda"


def memory_of(
    program: Program,
    optimizer: str | MakeOptimizer | None = "adamw",
    device: DeviceType = "cpu",
    hardware: str = "",
    stage_rank: int | None = None,
) -> Memory:
    """Predict the memory of rank 0 of a finished program, or of the first rank at `stage_rank` along `pp`.

    optimizer: a name of rehearsal.OPTIMIZERS, a function from a list of parameters to a torch optimizer, or None for inference.
    device: whose kernels and whose allocator; hardware: name of the device, for cuBLAS's workspace. Sizes that may change are taken
    at their example. Raises InputError, PlanError.
    """
    events = rehearse(program, optimizer, device, stage_rank or 0)
    margin = 0
    if device == "cuda":
        cublas = next((count for name, count in _CUBLAS.items() if name in hardware.lower()), max(_CUBLAS.values()))
        workspace = Block(cublas, Place("rest"), kind="workspace")
        events = [Event(workspace, True, workspace.place), *events]
        margin = _as_allocated(events)
    curve, peak, by_module = _curve(events)
    name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "optimizer") if optimizer else "inference"
    notes = _notes(program, name, device)
    return Memory(name, device, peak.total_bytes, max(0, margin - peak.total_bytes), curve, peak, by_module, notes, stage_rank)


def memory_by_rank(
    program: Program, optimizer: str | MakeOptimizer | None = "adamw", device: DeviceType = "cpu", hardware: str = ""
) -> tuple[Memory, ...]:
    """Predictions for every place along `pp`; a single one for a program without pipeline stages. Raises as memory_of does."""
    if program.pipeline is None:
        return (memory_of(program, optimizer, device, hardware),)
    return tuple(memory_of(program, optimizer, device, hardware, rank) for rank in range(program.pipeline.mesh.stages))


def _as_allocated(events: Sequence[Event]) -> int:
    """Give blocks the sizes that the caching allocator gives them. Returns the bytes that it reserves in the end."""
    allocator = CachingAllocator()
    for block, is_made, _ in events:
        if is_made:
            block.nbytes = allocator.allocate(id(block), block.nbytes)
        else:
            allocator.release(id(block))
    return allocator.reserved_bytes


def _curve(events: Sequence[Event]) -> tuple[tuple[Point, ...], Point, dict[str, dict[str, int]]]:
    """A point per place, the highest one, and what modules hold there."""
    index = {kind: k for k, kind in enumerate(KINDS)}
    kinds = {id(block): index[kind_of(block)] for block, is_made, _ in events if is_made}
    held, points = [0] * len(KINDS), []
    at: Place | None = None
    most: tuple[int, ...] = tuple(held)
    highest, when = -1, 0
    first = next((k for k, event in enumerate(events) if not _is_at_rest(event)), len(events))
    for k, (block, is_made, place) in enumerate(events):
        if k >= first and place != at:
            if at is not None:
                points.append(_point(at, most))
            at, most = place, tuple(held)
        held[kinds[id(block)]] += block.nbytes if is_made else -block.nbytes
        total = sum(held)
        if k >= first and total > sum(most):
            most = tuple(held)
        if k >= first and total > highest:
            highest, when = total, k
    points.append(_point(at or Place("forward"), most))
    live = {id(block): block for block, is_made, _ in events[: when + 1] if is_made}
    for block, is_made, _ in events[: when + 1]:
        if not is_made:
            live.pop(id(block), None)
    return tuple(points), max(points, key=lambda point: point.total_bytes), _by_module(live.values())


def _is_at_rest(event: Event) -> bool:
    return event.place.phase == "rest" or event.block.kind == "optimizer state"


def _point(place: Place, most: tuple[int, ...]) -> Point:
    node = place.node
    module, name = (facts(node).source.module, node.name) if node is not None else ("", "")
    return Point(place.phase, module, name, most, place.action)


def _by_module(blocks: Iterable[Block]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for block in blocks:
        node = block.place.node
        module = block.module or (facts(node).source.module if node is not None else "")
        kinds = found.setdefault(module, {})
        kinds[kind_of(block)] = kinds.get(kind_of(block), 0) + block.nbytes
    return found


def kind_of(block: Block) -> str:
    """Which of KINDS a block is, from where it was made and when it was released."""
    if block.kind:
        return block.kind
    place, left = block.place, block.left
    if place.phase == "rest":
        return "buffers"
    is_ended = left is not None and left == place
    if place.phase == "optimizer" or place.node is None:
        return "workspace" if place.phase != "forward" or is_ended else "activations"
    is_collective = block.op.startswith("_c10d_functional.")
    if place.phase == "backward" and not place.is_again:
        return "collective buffers" if is_collective else "workspace" if is_ended else "activation gradients"
    if _is_of_parameter(place.node):
        return "gathered weights"
    if place.phase == "backward" or left is None or left.phase != "forward":
        return "activations"
    return "collective buffers" if is_collective else "workspace" if is_ended else "activations"


def _is_of_parameter(node: fx.Node) -> bool:
    """Whether a node's value is made of one parameter alone."""
    while facts(node).role in ("conversion", "mask", "op") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return facts(node).role == "parameter"


def _notes(program: Program, optimizer: str, device: DeviceType) -> tuple[str, ...]:
    """What the prediction leaves out, one sentence each."""
    found = []
    split = [name for name, node in program.parameters().items() if any(p.is_split for p in facts(node).layout)]
    if optimizer == "adafactor" and split:
        found.append(
            f"torch's Adafactor does not run on split DTensors ({split[0]} and {len(split) - 1} more, on torch 2.13); "
            "its state is counted as if every rank factorised its own pieces."
        )
    ops: dict[str, Any] = {str(facts(node).op or node.target): node for node in program.nodes("op")}
    if device == "cuda" and any(".conv" in name for name in ops):
        found.append("Workspace that cuDNN takes for convolutions is not counted.")
    if any("experts" in name or "grouped_mm" in name for name in ops):
        found.append("Experts are counted as if every rank got as many rows as it sends.")
    if any(facts(node).autocast and facts(node).autocast[0].device == "cuda" for node in program.nodes()):
        found.append("Ops in autocast regions of a GPU are counted with the casts that the CPU's autocast makes.")
    return tuple(found)
