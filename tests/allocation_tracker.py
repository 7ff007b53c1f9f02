"""The memory that a training step really takes on the CPU: every allocation and release that torch's allocator reports, byte by byte.

Knows nothing of how memory is predicted: tensors are real, kernels run, what they take and give back inside an op is counted too, and
the model is trained through autoshard.compile, as a user trains it. One process stands for rank 0 of a mesh: on torch's fake process
group collectives allocate their results as always and return at once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

import autoshard
from autoshard.loaded_program import LoadedProgram
from autoshard.pipelined_program import PipelinedProgram
from autoshard.program import facts
from autoshard.rehearsal import loss_of


@dataclass(frozen=True)
class Measured:
    """Bytes: at rest before the step, at most during it, and left over after it."""

    rest_bytes: int
    peak_bytes: int
    left_bytes: int


@contextmanager
def fake_group(size: int) -> Iterator[None]:
    """This process as rank 0 of `size`, alone."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def allocations(run: Callable[[], None]) -> list[int]:
    """Bytes that each allocation adds and each release takes away (negative) while `run` runs, in order."""
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
    finally:
        gc.enable()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors; of a DTensor, what this rank holds."""
    local = [x.to_local() if isinstance(x, DTensor) else x for x in (y.detach() for y in tensors)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in local if x.numel()}.values())


def constants_of(ready: LoadedProgram | PipelinedProgram) -> list[Tensor]:
    """What the programs of this rank compute once, and what the plan has computed that they read."""
    codes = [stage.code for stage in ready.stages] if isinstance(ready, PipelinedProgram) else [ready.program]
    parts = [ready.plan.program.stages[k] for k in ready.mine] if isinstance(ready, PipelinedProgram) else [ready.plan.program]
    read = {facts(node).name for part in parts for node in part.nodes("buffer")}
    found = [x for name, x in ready.plan.program.constants.items() if name in read]
    return found + [x for code in codes for x in (code._constants or {}).values()]


def measure_step(
    model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], make: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> Measured:
    """One step of a compiled model that has trained two steps already."""
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = make(parameters)
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]

    def step() -> None:
        results = model(*args, **kwargs)
        loss = loss_of([x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)])
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for leaf in leaves:
            leaf.grad = None

    for _ in range(2):
        step()
    state = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    constants = [x for ready in model._state.ready.values() for x in constants_of(ready)]
    rest = storage_bytes([*model.parameters(), *model.buffers(), *state, *constants, *leaves])
    now = peak = 0
    for change in allocations(step):
        now += change
        peak = max(peak, now)
    return Measured(rest, rest + peak, now)


def compiled(model: nn.Module, mesh: str, args: Sequence[Any], kwargs: Mapping[str, Any], kind: str) -> Any:
    """The model as rank 0 of a mesh runs it, inside fake_group. kind: a template, or `random N` for a random plan."""
    spec = autoshard.MeshSpec.of(mesh)
    device_mesh = init_device_mesh("cpu", spec.shape, mesh_dim_names=spec.axes)
    options: dict[str, Any] = {"template": kind}
    if kind.startswith("random"):
        options = {"options": autoshard.Options(seed=int(kind.split()[1]))}
    return autoshard.compile(model, device_mesh, example_inputs=args, example_kwargs=kwargs, **options)
