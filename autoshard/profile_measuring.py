"""Measuring this machine, in under a minute: single ops, forward and backward, and the collectives of a mesh.

Every number is a median over rounds, after a warm-up; a round repeats what is short, so that reading the clock costs nothing.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autoshard import runtime
from autoshard.errors import InputError
from autoshard.mesh import MeshSpec, check_mesh
from autoshard.profile_cases import Case, cases
from autoshard.profile_file import COLLECTIVES, CollectiveSample, Profile, Sample, loads_profile, machine
from autoshard.runtime import Collective
from autoshard.runtime.axes import run

LIMIT_S = 45.0
_QUIET_SHARE = 0.8  # of one core, at least
_ROUND_S = 5e-4  # a round lasts at least this long
_MOST_ROUNDS, _FEWEST_ROUNDS = 15, 3
_WHOLE_BYTES = (2**12, 2**16, 2**20, 2**23)


def round_s(work: Callable[[], Any], device_type: str, repeats: int) -> float:
    """Seconds of one call, of `repeats` in a row."""
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device_type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return max(time.perf_counter() - started, 1e-9) / repeats


def seconds_of(work: Callable[[], Any], device_type: str, budget_s: float) -> float:
    """Median seconds of one call of `work`, measured for about `budget_s`, at least three rounds."""
    work()
    repeats, rounds = _rounds(round_s(work, device_type, 1), budget_s)
    return statistics.median(round_s(work, device_type, repeats) for _ in range(rounds))


def _rounds(once_s: float, budget_s: float) -> tuple[int, int]:
    """Calls in a round, and rounds."""
    repeats = max(1, min(1000, math.ceil(_ROUND_S / once_s)))
    return repeats, max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, int(budget_s / (once_s * repeats))))


def profile(
    mesh: DeviceMesh | None = None, device: str | None = None, *, limit_s: float = LIMIT_S, cache_dir: str | None = None, save: bool = True
) -> Profile:
    """Measure this machine: single ops forward and backward, and each collective on every axis of `mesh` (None: no collectives).

    Every process of the mesh calls this; rank 0's device stands for all, and all get the same profile.
    device: "cpu" or "cuda"; None is the mesh's, or cuda where there is one. limit_s: about how long, in seconds: larger sizes are
    left out on slow machines, and the notes of the profile say so. save: write it into `cache_dir` (None: the user's cache
    folder), where hardware="measured" finds it. Raises InputError for a device that is not there, MeshError for a mesh without processes.
    """
    device_type = device or (mesh.device_type if mesh is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if device_type not in ("cpu", "cuda") or (device_type == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"there is no device {device_type!r} to measure here; write 'cpu' or, on a machine with a GPU, 'cuda'")
    if not limit_s > 0:
        raise InputError(f"limit_s is {limit_s!r}; give some seconds, e.g. {LIMIT_S}")
    spec = None if mesh is None else MeshSpec.of(mesh)
    if mesh is not None and spec is not None:
        check_mesh(mesh, spec)
    backend, size = (dist.get_backend(mesh.get_group(0)), mesh.size()) if mesh is not None else ("", 1)
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    samples, notes = _measure_ops(device_type, limit_s * 0.8)
    if device_type == "cpu":
        notes += _shared_note(time.perf_counter() - started_s, time.process_time() - started_cpu_s)
    collectives = _measure_collectives(mesh, device_type, limit_s * 0.2) if mesh is not None else ()
    x = torch.zeros(1, device=device_type)
    found = Profile(
        {**machine(device_type), "backend": backend, "world_size": size},
        seconds_of(lambda: x.add(1), device_type, 0.05),
        _memory_bytes(device_type) / (size if device_type == "cpu" else 1),  # processes on one host share its memory
        samples,
        spec,
        collectives,
        notes=notes,
    )
    if mesh is not None:
        found = _of_first_rank(found)
    if save and (mesh is None or dist.get_rank() == int(mesh.mesh.flatten()[0])):
        found.save(cache_dir)
    return found


def _shared_note(elapsed_s: float, cpu_s: float) -> tuple[str, ...]:
    """What to say where this process had less than a core to itself."""
    share = cpu_s / elapsed_s
    if share >= _QUIET_SHARE:
        return ()
    return (f"other work took the processor for {1 - share:.0%} of the time: these times are longer than those of a quiet machine",)


def _memory_bytes(device_type: str) -> float:
    if device_type == "cuda":
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _of_first_rank(found: Profile) -> Profile:
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, found.to_json())
    return loads_profile(texts[0])


def _measure_ops(device_type: str, limit_s: float) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """Every case, each with an equal share of the time; a case that would take more than its share is left out, with the larger ones."""
    todo = cases(device_type)
    budget_s = limit_s / len(todo) / 2
    samples: list[Sample] = []
    slowest: dict[str, tuple[float, float]] = {}  # per family: work and seconds of the case before
    skipped: dict[str, str] = {}
    for case in todo:
        work = case.flops or float(math.prod(case.shapes[0]))
        before = slowest.get(case.family)
        if case.family in skipped or (before is not None and before[1] * work / before[0] * 2 * _FEWEST_ROUNDS > 4 * budget_s):
            skipped.setdefault(case.family, case.what)
            continue
        sample = _measure(case, device_type, budget_s)
        slowest[case.family] = (work, sample.forward_s + sample.backward_s)
        samples.append(sample)
    return tuple(samples), tuple(f"{what} and larger in {family} would have taken too long to measure" for family, what in skipped.items())


def _measure(case: Case, device_type: str, budget_s: float) -> Sample:
    operands = case.operands(device_type)
    forward_s, backward_s, result = time_call(lambda: case.function(*operands), operands, device_type, budget_s)
    moved = case.moved_bytes(result[0])
    return Sample(case.kind, case.what, str(case.dtype).removeprefix("torch."), case.flops, moved, forward_s, backward_s)


def time_call(call: Callable[[], Any], operands: Sequence[Tensor], device_type: str, budget_s: float) -> tuple[float, float, list[Tensor]]:
    """Seconds forward, seconds backward (0 where nothing needs a gradient), and the results of one call."""
    result = call()
    results = [x for x in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(x, Tensor)]
    wanted = [x for x in operands if x.requires_grad]
    roots = [x for x in results if x.requires_grad]
    forward_s = seconds_of(call, device_type, budget_s)
    if not wanted or not roots:
        return forward_s, 0.0, results
    seeds = [torch.ones_like(x) for x in roots]
    backward = partial(torch.autograd.grad, roots, wanted, seeds, retain_graph=True, allow_unused=True)
    return forward_s, seconds_of(backward, device_type, budget_s), results


# ---------------------------------------------------------------------------------------------------------- collectives


def _measure_collectives(mesh: DeviceMesh, device_type: str, limit_s: float) -> tuple[CollectiveSample, ...]:
    """Every collective on every axis, all groups of an axis at once; as many rounds on every rank."""
    spec = MeshSpec.of(mesh)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    todo = [
        (k, name, whole)
        for k, n in enumerate(spec.shape)
        for name in COLLECTIVES
        for whole in (_WHOLE_BYTES if device_type == "cpu" else [16 * size for size in _WHOLE_BYTES])
        if n > 1
    ]
    samples = []
    for k, name, whole in todo:
        axis = runtime.Axis(spec.axes[k], spec.shape[k], coordinate[k], mesh.get_group(k).group_name)
        x = _piece(name, whole, axis.size, device_type)
        held = x.numel() * x.element_size() * (1 if name in ("reduce_scatter", "all_reduce") else axis.size)
        collective = Collective(name, dim=1 if name == "rotate" else 0, cut_dim=1)
        seconds = _slowest_s(partial(run, collective, x, axis), device_type, limit_s / len(todo))
        samples.append(CollectiveSample(axis.name, name, float(held), seconds))
    return tuple(samples)


def _piece(name: str, whole_bytes: int, n: int, device_type: str) -> Tensor:
    """What one rank gives to a collective on about `whole_bytes`, float32; its first dim, of all_to_all the second, divides by n."""
    rows = -(-whole_bytes // 4 // n // n)
    if name in ("reduce_scatter", "all_reduce"):
        return torch.zeros(rows * n * n, device=device_type)
    return torch.zeros((rows, n) if name == "all_to_all" else rows * n, device=device_type)


def _slowest_s(work: Callable[[], Any], device_type: str, budget_s: float) -> float:
    """Median seconds of one collective on the slowest rank; all ranks run as many rounds."""

    def slowest(seconds: float) -> float:
        all_s = torch.tensor([seconds], device=device_type, dtype=torch.float64)
        dist.all_reduce(all_s, dist.ReduceOp.MAX)
        return float(all_s)

    work()
    repeats, rounds = _rounds(slowest(round_s(work, device_type, 3)), budget_s)
    times = []
    for _ in range(rounds):
        dist.barrier()
        times.append(round_s(work, device_type, repeats))
    return slowest(statistics.median(times))
