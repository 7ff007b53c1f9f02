"""A plan whose emitted text is loaded on this rank, ready to be called."""

from __future__ import annotations

import linecache
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoshard import autocast, runtime
from autoshard.dtensors import torch_placements
from autoshard.plan import Plan
from autoshard.plan_file import digest
from autoshard.program import Facts, facts, info_at
from autoshard.torch_internals import local_of, pytree


class LoadedProgram:
    """A plan with its program loaded on this rank."""

    def __init__(self, plan: Plan, program: Any, slots: Callable[[str], torch.Tensor]) -> None:
        self.plan, self.program = plan, program
        nodes = list(plan.program.output.args[0])  # type: ignore[arg-type]
        self.results = [facts(node) if isinstance(node, fx.Node) else None for node in nodes]  # a result may be a constant
        self.takes = [k for k, name in enumerate(plan.program.flat_inputs) if name is not None]
        self.as_dtensors = plan.outputs == "dtensor"
        self.is_checked = False
        self.sizes: dict[tuple, dict[str, int]] = {}  # shapes of arguments -> the sizes that may change, once found sound
        self.watched = [name for name in _constant_buffers(plan) if name not in plan.program.constants]
        self.seen: list[tuple[int, int]] = []
        self.slots = slots
        self.is_random = any(facts(node).random_axes is not None for node in plan.program.nodes("op"))

    def __call__(self, leaves: list[Any], mesh: DeviceMesh, sizes: Mapping[str, int]) -> Any:
        if self.watched:
            self._watch()
        given = [leaves[k] for k in self.takes]
        if any(map(torch.is_autocast_enabled, autocast.DEVICES)):  # the program enters the regions that it was traced in by itself
            with autocast.entered(()):
                results = self.program.forward(*map(local_of, given))
        else:
            results = self.program.forward(*map(local_of, given))
        if self.as_dtensors:
            results = [
                self._distributed(x, known, mesh, sizes) if known and known.value.shape else x
                for x, known in zip(results, self.results, strict=True)
            ]
        return pytree.tree_unflatten(list(results), self.plan.program.out_spec)

    def forget_constants(self) -> None:
        """Compute them anew at the next call."""
        self.program.forget_constants()

    def _watch(self) -> None:
        """Compute constants anew when a buffer that they were made from was written."""
        buffers = [self.slots(name) for name in self.watched]
        now = [(id(buffer), -1 if buffer.is_inference() else buffer._version) for buffer in buffers]
        if now != self.seen:
            self.program.forget_constants()
            self.seen = now

    @staticmethod
    def _distributed(local: torch.Tensor, known: Facts, mesh: DeviceMesh, sizes: Mapping[str, int]) -> DTensor:
        shape = torch.Size([int(size) for size in info_at(known.value, sizes).shape])
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, torch_placements(known.layout), run_check=False, shape=shape, stride=strides)


def load_program(
    plan: Plan, axes: tuple[runtime.Axis, ...], tensor: Callable[[str], torch.Tensor], device: torch.device, seed: Callable[[], int]
) -> Any:
    """Execute the emitted text of a plan in memory: the text that `plan.emit` writes."""
    constants = {name: value.to(device) for name, value in plan.program.constants.items()}
    return load_text(
        plan.program.source, plan.model_name, axes, lambda name: constants[name] if name in constants else tensor(name), device, seed
    )


def load_text(
    text: str,
    name: str,
    axes: tuple[runtime.Axis, ...],
    tensor: Callable[[str], torch.Tensor],
    device: torch.device,
    seed: Callable[[], int],
) -> Any:
    """The program that an emitted text defines."""
    sys.modules.setdefault("autoshard_runtime", runtime)
    number = digest(text)[:12]
    filename = f"<autoshard {name} {number}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    module = types.ModuleType(f"autoshard_program_{number}")
    sys.modules[module.__name__] = module  # torch.compile looks its globals up there
    exec(compile(text, filename, "exec"), vars(module))
    return module.Rank(axes, tensor, device, seed)


def _constant_buffers(plan: Plan) -> list[str]:
    """Buffers from which the program computes constants once."""
    nodes = (node for node in plan.program.nodes("buffer") if any(facts(user).is_constant for user in node.users))
    return [facts(node).name for node in nodes]
