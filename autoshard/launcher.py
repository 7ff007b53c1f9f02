"""Runs an emitted program: torchrun --nproc-per-node N run.py [--steps 3] [--weights model.pt] [--device auto].

Stands in the emitted folder as run.py beside program.py, autoshard_runtime and plan.json; needs torch and nothing else.
Every rank cuts its part of each parameter out of the weights (memory-mapped, one at a time) or out of small seeded random
values, and runs forward and backward on seeded random inputs, the same on all ranks.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

sys.path[:0] = [] if __package__ else [str(Path(__file__).parent)]
if __package__:
    from autoshard import runtime
else:
    import autoshard_runtime as runtime  # type: ignore[import-not-found,no-redef]

_DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64, "i32": torch.int32,
    "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
_SPLIT = re.compile(r"S\((\d+)(?::(?:(\d+)x(\d+)|([\d+]+)))?\)")
Entry = tuple[list[int], str, str]  # global shape, dtype, layout: a row of the program's tables


def dtype_of(name: str) -> torch.dtype:
    return _DTYPES[name] if name in _DTYPES else getattr(torch, name)


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
    """One rank: its tensors, its program, and one step."""

    def __init__(self, rank_class: Any, plan: Mapping[str, Any], mesh: DeviceMesh, device: torch.device, weights: str | None) -> None:
        self.device, self.step_number = device, 0
        self.sizes = dict(rank_class.MESH)
        self.coordinate = dict(zip(self.sizes, mesh.get_coordinate() or (), strict=True))
        placeholders = [node["facts"] for node in plan["program"]["nodes"] if node["kind"] == "placeholder"]
        self.with_gradient = {known["name"] for known in placeholders if known["values"][0][2]}
        tables = {"parameter": rank_class.PARAMETERS, "buffer": rank_class.BUFFERS, "input": rank_class.INPUTS}
        given = read_constants(plan)
        if weights:
            needed = {**rank_class.PARAMETERS, **rank_class.BUFFERS}
            given |= read_weights(weights, {name: entry for name, entry in needed.items() if name not in given})
        self.tensors, self.inputs = {}, []
        for role, table in tables.items():
            for name, entry in table.items():
                is_given = role != "input" and name in given
                local = self._place(name, entry, given[name] if is_given else random_value(name, entry, role))
                if role == "input":
                    self.inputs.append(local)
                else:
                    self.tensors[name] = local
        axes = [runtime.Axis(name, size, self.coordinate[name], mesh.get_group(name).group_name) for name, size in self.sizes.items()]
        self.program = rank_class(axes, self.tensors.__getitem__, device, lambda: self.step_number)
        self.copies = {name: self._copies(entry[2]) for name, entry in rank_class.PARAMETERS.items()}

    def _place(self, name: str, entry: Entry, whole: Tensor) -> Tensor:
        local = local_piece(whole, entry[2], self.sizes, self.coordinate).to(self.device, dtype_of(entry[1]))
        return local.requires_grad_(name in self.with_gradient)

    def _copies(self, layout: str) -> int:
        """How many ranks hold the same piece."""
        return torch.Size(self.sizes[text.partition("@")[2]] for text in layout.split() if not text.startswith("S")).numel()

    def step(self) -> tuple[list[Any], float, float]:
        """Forward and backward. Returns what the program returns, the norm of all gradients, and milliseconds."""
        self.step_number += 1
        self._wait()
        started = time.perf_counter()
        results = list(self.program.forward(*self.inputs))
        roots = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
        if roots:
            torch.autograd.backward([next((x for x in roots if x.dim() == 0), roots[0]).sum()])
        self._wait()
        elapsed_ms = 1e3 * (time.perf_counter() - started)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, copies in self.copies.items():
            gradient = self.tensors[name].grad
            if gradient is not None:
                total += gradient.double().square().sum() / copies
                self.tensors[name].grad = None
        dist.all_reduce(total)
        return results, float(total.sqrt()), elapsed_ms

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        dist.barrier()


def describe(results: list[Any]) -> str:
    """`loss 3.46573590` for a scalar, shape and mean of other outputs."""
    shown = []
    for value in results:
        if isinstance(value, Tensor):
            what = f"output {list(value.shape)} mean" if value.dim() else "loss" if value.requires_grad else "scalar"
            shown.append(f"{what} {value.detach().double().mean().item():.8f}")
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")


def main() -> None:
    """Read the command line, start this rank, print what rank 0 sees of every step."""
    parser = argparse.ArgumentParser(description="Run the emitted program of this folder on the processes that torchrun starts.")
    parser.add_argument("--steps", type=int, default=3, help="how many forward and backward passes to run")
    parser.add_argument("--weights", help="a full state dict saved with torch.save; small seeded random values without it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    here = Path(__file__).parent
    from program import Rank  # type: ignore[import-not-found]

    sizes = dict(Rank.MESH)
    needed, mesh_text = torch.Size(sizes.values()).numel(), ",".join(f"{name}={size}" for name, size in sizes.items())
    if "WORLD_SIZE" not in os.environ:
        sys.exit(f"start this with torchrun --nproc-per-node {needed} {sys.argv[0]}")
    if int(os.environ["WORLD_SIZE"]) != needed:
        started = os.environ["WORLD_SIZE"]
        sys.exit(f"the program is for mesh {mesh_text}, {needed} processes; torchrun started {started}: use --nproc-per-node {needed}")
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", needed))
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    if options.device == "cuda" and not has_gpus:
        sys.exit(f"--device cuda needs {local_size} GPUs on this machine, there are {torch.cuda.device_count()}")
    device = torch.device("cuda", local_rank) if has_gpus and options.device != "cpu" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    worker = Worker(Rank, json.loads((here / "plan.json").read_text()), mesh, device, options.weights)
    is_first = dist.get_rank() == 0
    if is_first:
        held = sum(worker.tensors[name].nbytes for name in Rank.PARAMETERS)
        print(f"mesh {mesh_text} on {device.type}; {len(Rank.PARAMETERS)} parameters, {held} bytes of them on rank 0", flush=True)
    for number in range(options.steps):
        results, norm, elapsed_ms = worker.step()
        if is_first:
            print(f"step {number}: {describe(results)}, gradient norm {norm:.8f}, {elapsed_ms:.2f} ms", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
