"""Runs an emitted program: torchrun --nproc-per-node N run.py [--steps 3] [--weights model.pt] [--device auto].

Stands in the emitted folder as run.py beside program.py (or a file per pipeline stage), autoshard_runtime and plan.json; needs
torch and nothing else. Every rank cuts its part of each parameter out of the weights (memory-mapped, one at a time) or out of
small seeded random values, and runs forward and backward on seeded random inputs, the same on all ranks. Where there are
pipeline stages, microbatches of these inputs go through them by the plan's schedule.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import inspect
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

sys.path[:0] = [] if __package__ else [str(Path(__file__).parent)]
if __package__:
    from autoshard import runtime
    from autoshard.runtime import microbatches
    from autoshard.runtime.dtypes import dtype_of
else:
    import autoshard_runtime as runtime  # type: ignore[import-not-found,no-redef]
    from autoshard_runtime import microbatches  # type: ignore[no-redef]
    from autoshard_runtime.dtypes import dtype_of  # type: ignore[import-not-found,no-redef]

_SPLIT = re.compile(r"S\((\d+)(?::(?:(\d+)x(\d+)|([\d+]+)))?\)")
PIPELINE_AXIS = "pp"
Entry = tuple[list[int], str, str]  # global shape, dtype, layout: a row of the program's tables


def local_piece(whole: Tensor, layout: str, mesh: Mapping[str, int], coordinate: Mapping[str, int]) -> Tensor:
    """This rank's part of a global tensor. layout: `"S(0:3x32)@dp I@tp"`; pieces of one dim nest, outer axis first."""
    piece = whole
    parts: dict[int, tuple[int, int]] = {}  # dim -> into how many parts outer axes cut the whole of it, and each segment
    for text in layout.split():
        placement, _, axis = text.partition("@")
        match = _SPLIT.fullmatch(placement)
        if match is None:
            continue
        dim, count, size, sizes = int(match[1]), match[2], match[3], match[4]
        segments = [int(size)] * int(count) if count else [int(s) for s in sizes.split("+")] if sizes else []
        plain, segmented = parts.get(dim, (1, 1))
        local = [segment // segmented for segment in segments[: len(segments) // plain]]
        piece = runtime.cut(piece, dim, local, mesh[axis])[coordinate[axis]]
        parts[dim] = (plain, segmented * mesh[axis]) if segments else (plain * mesh[axis], segmented)
    return piece.contiguous().clone()


def random_value(name: str, entry: Entry, role: str) -> Tensor:
    """A global value drawn from the name: parameters small, buffers positive, integers 0 or 1, booleans true."""
    shape, dtype = entry[0], dtype_of(entry[1])
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    if role == "buffer":
        return (torch.rand(shape, generator=generator) + 0.5).to(dtype)
    return (torch.randn(shape, generator=generator) * (0.02 if role == "parameter" else 1.0)).to(dtype)


def read_constants(plan: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors that the model made outside its parameters and buffers, from plan.json."""
    found = {}
    for name, value in plan["program"]["constants"].items():
        raw = torch.tensor(list(base64.b64decode(value["data"])), dtype=torch.uint8)
        found[name] = raw.view(getattr(torch, value["dtype"])).reshape(value["shape"])
    return found


def read_weights(path: str, tables: Mapping[str, Entry]) -> dict[str, Tensor]:
    """A full state dict, memory-mapped. Exits with a message where it does not hold what the program reads."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"cannot read the weights {path}: {error}")
    missing = [name for name in tables if name not in weights]
    if missing:
        sys.exit(
            f"the weights {path} lack {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; save them with "
            "torch.save({**model.state_dict(), **dict(model.named_buffers())}, path)"
        )
    shapes = {name: (list(weights[name].shape), entry[0]) for name, entry in tables.items()}
    wrong = [f"{name} is {has}, the program reads {wanted}" for name, (has, wanted) in shapes.items() if has != wanted]
    if wrong:
        sys.exit(f"the weights {path} are of another model: " + "; ".join(wrong[:5]))
    return weights


class Worker:
    """One rank: its tensors, its program, and one step. programs: the emitted classes that this rank runs."""

    def __init__(
        self, programs: Sequence[Any], plan: Mapping[str, Any], mesh: DeviceMesh, device: torch.device, weights: str | None
    ) -> None:
        self.device, self.step_number = device, 0
        self.sizes = {name: size for program in programs for name, size in program.MESH.items()}
        self.coordinate = {name: mesh.get_local_rank(name) for name in self.sizes}
        placeholders = [node["facts"] for node in plan["program"]["nodes"] if node["kind"] == "placeholder"]
        self.with_gradient = {known["name"] for known in placeholders if known["values"][0][2]}
        self.parameters = {name: entry for program in programs for name, entry in program.PARAMETERS.items()}
        tables = {"parameter": self.parameters, "buffer": {n: entry for program in programs for n, entry in program.BUFFERS.items()}}
        given = read_constants(plan)
        if weights:
            needed = {**tables["parameter"], **tables["buffer"]}
            given |= read_weights(weights, {name: entry for name, entry in needed.items() if name not in given})
        self.tensors = {}
        for role, table in tables.items():
            for name, entry in table.items():
                self.tensors[name] = self._place(name, entry, given[name] if name in given else random_value(name, entry, role))
        self.axes = [runtime.Axis(name, size, self.coordinate[name], mesh.get_group(name).group_name) for name, size in self.sizes.items()]
        self.copies = {name: self._copies(entry[2]) for name, entry in self.parameters.items()}
        self._load(programs, plan, mesh)

    def _load(self, programs: Sequence[Any], plan: Mapping[str, Any], mesh: DeviceMesh) -> None:
        """Make the program and its inputs."""
        (program,) = programs
        self.inputs = [self._place(name, entry, random_value(name, entry, "input")) for name, entry in program.INPUTS.items()]
        self.program = program(self.axes, self.tensors.__getitem__, self.device, lambda: self.step_number)

    def _place(self, name: str, entry: Entry, whole: Tensor) -> Tensor:
        local = local_piece(whole, entry[2], self.sizes, self.coordinate).to(self.device, dtype_of(entry[1]))
        return local.requires_grad_(name in self.with_gradient)

    def _copies(self, layout: str) -> int:
        """How many ranks hold the same piece."""
        return torch.Size(self.sizes[text.partition("@")[2]] for text in layout.split() if text[0] in "IR").numel()

    def step(self) -> tuple[str, float, float]:
        """Forward and backward. Returns the results in words, the norm of all gradients, and milliseconds."""
        self.step_number += 1
        self._wait()
        started = time.perf_counter()
        results = self._run()
        self._wait()
        elapsed_ms = 1e3 * (time.perf_counter() - started)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, copies in self.copies.items():
            gradient = self.tensors[name].grad
            if gradient is not None:
                total += gradient.double().square().sum() / copies
                self.tensors[name].grad = None
        dist.all_reduce(total)
        return self._told(results), float(total.sqrt()), elapsed_ms

    def _run(self) -> list[Any]:
        results = list(self.program.forward(*self.inputs))
        roots = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
        if roots:
            torch.autograd.backward([next((x for x in roots if x.dim() == 0), roots[0]).sum()])
        return results

    def _told(self, results: list[Any]) -> str:
        return describe(results)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        dist.barrier()


@dataclass(frozen=True)
class Batching:
    """How plan.json says that a batch is taken apart; see autoshard_runtime.microbatches."""

    microbatches: int
    inputs: Mapping[str, tuple[str, int | None]]
    rows: Mapping[str, int]
    results: Sequence[Any]


class StageWorker(Worker):
    """One rank of a pipeline: its stages, and one run of the schedule. programs: the classes of its stages, in order."""

    def _load(self, programs: Sequence[Any], plan: Mapping[str, Any], mesh: DeviceMesh) -> None:
        if __package__:
            from autoshard.runtime import actions, pipeline_engine, stage_program
        else:
            from autoshard_runtime import actions, pipeline_engine, stage_program  # type: ignore[no-redef]
        self.pipeline, self.group = plan["program"]["pipeline"], mesh.get_group(PIPELINE_AXIS)
        self.nodes = {node["name"]: node for node in plan["program"]["nodes"]}
        returned = plan["program"]["nodes"][-1]["args"]["tuple"][0]
        leaves = returned["tuple"] if isinstance(returned, dict) else returned
        self.returned = [leaf["node"] if isinstance(leaf, dict) and "node" in leaf else None for leaf in leaves]  # None: a constant
        ranks, here = self.pipeline["stage_ranks"], dist.get_rank(self.group)
        self.batching = Batching(*(self.pipeline[name] for name in ("microbatches", "inputs", "rows", "results")))
        self.given = self._inputs(programs)
        everyone = [program_of(f"stage_{number}") for number in range(len(ranks))]
        held: dict[str, list[int]] = {}
        for number, program in enumerate(everyone):
            for name in program.PARAMETERS:
                held.setdefault(name, []).append(number)
        self.copies = {name: copies * len({ranks[stage] for stage in held[name]}) for name, copies in self.copies.items()}
        self.tied, self.add_tied = stage_program.tied_groups(held, ranks, self.group), stage_program.add_tied
        self.stages, parts = [], []
        numbers = [number for number, rank in enumerate(ranks) if rank == here]
        for number, program in zip(numbers, programs, strict=True):
            code = program(self.axes, self.tensors.__getitem__, self.device, self._seed)
            received = tuple(getattr(program, "RECEIVED", ()))
            wants = self._names(code.prepare) if hasattr(code, "prepare") else ()
            stage = stage_program.StageProgram(number, code, received, self._names(code.forward), wants)
            results = [name for name in self.returned if name is not None]
            sent = results if number == len(ranks) - 1 else list(everyone[number + 1].RECEIVED)
            metas = self._metas(received), self._metas(sent)
            parts.append(pipeline_engine.EngineStage(number, self._forward(stage), *metas, program.SPLITS_BACKWARD))
            self.stages.append(stage)
        count = self.pipeline["microbatches"]
        self.engine = pipeline_engine.PipelineEngine(parts, ranks, count, self.group, self.device)
        self.schedule = tuple(tuple(map(actions.Action.parse, texts)) for texts in self.pipeline["schedule"])
        self.last = dist.get_global_rank(self.group, ranks[-1])

    def _seed(self) -> int:
        return self.step_number

    def _inputs(self, programs: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Of every microbatch what it is given: its part of the whole arguments, and of that this rank's piece."""
        entries = {name: entry for program in programs for name, entry in program.INPUTS.items()}
        wholes: dict[str, Tensor] = {}
        for name, (argument, dim) in self.batching.inputs.items():
            shape, dtype, _ = self._described(self._placeholder(name))
            whole = [size * (self.batching.microbatches if k == dim else 1) for k, size in enumerate(shape)]
            wholes[argument] = random_value(argument, (whole, dtype, ""), "input")
        found = []
        for number in range(self.batching.microbatches):
            parts = microbatches.of_microbatch(self.batching, wholes, number)
            found.append({name: self._place(name, entry, parts[name]) for name, entry in entries.items()})
        return found

    def _placeholder(self, name: str) -> str:
        """The node of an argument."""
        return next(key for key, node in self.nodes.items() if node["kind"] == "placeholder" and node["facts"]["name"] == name)

    def _names(self, method: Any) -> tuple[str, ...]:
        """What a method of an emitted program takes, by the names of arguments and of received values."""
        nodes = [(name, self.nodes[name]) for name in inspect.signature(method).parameters]
        return tuple(node["facts"]["name"] if node["kind"] == "placeholder" else name for name, node in nodes)

    def _described(self, name: str) -> tuple[list[int], str, str]:
        """Global shape, dtype and layout of a node's value."""
        known = self.nodes[name]["facts"]
        shape, dtype, _ = known["values"][0]
        return shape, dtype, known["layouts"][0]

    def _metas(self, names: Sequence[str]) -> tuple[Tensor, ...]:
        """What goes from stage to stage for a microbatch, as tensors without memory that say shape on this rank, dtype and gradient."""
        found = []
        for name in names:
            shape, dtype, layout = self._described(name)
            local = list(shape)
            for text in layout.split():
                match = _SPLIT.fullmatch(text.partition("@")[0])
                if match is not None:
                    local[int(match[1])] = -(-local[int(match[1])] // self.sizes[text.partition("@")[2]])
            needs_grad = self.nodes[name]["facts"]["values"][0][2]
            found.append(torch.empty(local, dtype=dtype_of(dtype), device="meta", requires_grad=needs_grad))
        return tuple(found)

    def _forward(self, stage: Any) -> Any:
        return lambda values, number: stage.forward(values, self.given[number], number, self._seed)

    def _run(self) -> list[Any]:
        loss = self.pipeline["loss"]
        with torch.set_grad_enabled(loss is not None):
            for stage in self.stages:
                stage.prepare(self.given[0], self._seed)
        if loss is None:
            return self._joined(self.engine.evaluate())
        number = sum(name is not None for name in self.returned[:loss])
        results = self._joined(self.engine.train(self.schedule, number))
        for stage in self.stages:
            stage.reduce()
        self.add_tied({name: self.tensors[name] for name in self.parameters if self.tensors[name].requires_grad}, self.tied)
        if results:
            results[loss].requires_grad_()
        return results

    def _joined(self, found: Sequence[tuple[Tensor, ...]]) -> list[Any]:
        """The results of the whole batch, where the last stage runs; [] elsewhere."""
        filled = []
        for values in found:
            order = iter(values)
            filled.append([None if name is None else next(order) for name in self.returned])
        return microbatches.joined(self.batching, filled) if filled else []

    def _told(self, results: list[Any]) -> str:
        """The results in the words of the rank that has them."""
        told = [describe(results)]
        dist.broadcast_object_list(told, self.last, group=self.group)
        return told[0]


def describe(results: list[Any]) -> str:
    """`loss 3.46573590` for a scalar, shape and mean of other outputs."""
    shown = []
    for value in results:
        if isinstance(value, Tensor):
            what = f"output {list(value.shape)} mean" if value.dim() else "loss" if value.requires_grad else "scalar"
            shown.append(f"{what} {value.detach().double().mean().item():.8f}")
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")


def program_of(file: str) -> Any:
    """The class that an emitted file defines."""
    return importlib.import_module(file).Rank


def main() -> None:
    """Read the command line, start this rank, print what rank 0 sees of every step."""
    parser = argparse.ArgumentParser(description="Run the emitted program of this folder on the processes that torchrun starts.")
    parser.add_argument("--steps", type=int, default=3, help="how many forward and backward passes to run")
    parser.add_argument("--weights", help="a full state dict saved with torch.save; small seeded random values without it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    plan = json.loads((Path(__file__).parent / "plan.json").read_text())
    pipeline = plan["program"]["pipeline"]
    spec = plan["program"]["mesh"] if pipeline is None else pipeline["mesh"]
    sizes = dict(zip(spec["axes"], spec["shape"], strict=True))
    needed, mesh_text = torch.Size(sizes.values()).numel(), ",".join(f"{name}={size}" for name, size in sizes.items())
    device = start(needed, mesh_text, options.device)
    alone = {name: 1 for name in plan["program"]["mesh"]["axes"] if name not in sizes}  # of stages that one rank runs each
    axes = {**sizes, **alone}
    mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    if pipeline is None:
        worker = Worker([program_of("program")], plan, mesh, device, options.weights)
    else:
        mine = [number for number, rank in enumerate(pipeline["stage_ranks"]) if rank == mesh.get_local_rank(PIPELINE_AXIS)]
        worker = StageWorker([program_of(f"stage_{number}") for number in mine], plan, mesh, device, options.weights)
    is_first = dist.get_rank() == 0
    if is_first:
        held = sum(worker.tensors[name].nbytes for name in worker.parameters)
        print(f"mesh {mesh_text} on {device.type}; {len(worker.parameters)} parameters, {held} bytes of them on rank 0", flush=True)
        if pipeline is not None:
            stages, count = len(pipeline["stage_ranks"]), pipeline["microbatches"]
            print(f"{stages} stages, {count} microbatches, schedule {pipeline['name']}", flush=True)
    for number in range(options.steps):
        told, norm, elapsed_ms = worker.step()
        if is_first:
            print(f"step {number}: {told}, gradient norm {norm:.8f}, {elapsed_ms:.2f} ms", flush=True)
    dist.destroy_process_group()


def start(needed: int, mesh: str, asked: str) -> torch.device:
    """Join the other processes; returns this rank's device. Exits with a message where torchrun started another number of them."""
    if "WORLD_SIZE" not in os.environ:
        sys.exit(f"start this with torchrun --nproc-per-node {needed} {sys.argv[0]}")
    if int(os.environ["WORLD_SIZE"]) != needed:
        started = os.environ["WORLD_SIZE"]
        sys.exit(f"the program is for mesh {mesh}, {needed} processes; torchrun started {started}: use --nproc-per-node {needed}")
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", needed))
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    if asked == "cuda" and not has_gpus:
        sys.exit(f"--device cuda needs {local_size} GPUs on this machine, there are {torch.cuda.device_count()}")
    device = torch.device("cuda", local_rank) if has_gpus and asked != "cpu" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


if __name__ == "__main__":
    main()
