"""Runs a function on several gloo processes and returns what each rank returned."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT_S = 120


def _worker(rank: int, size: int, folder: str, payload: bytes) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=_TIMEOUT_S)
        )
        function, args = pickle.loads(payload)
        result: Any = ("ok", function(*args))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        result = ("error", traceback.format_exc())
    with open(f"{folder}/{rank}.partial", "wb") as file:
        torch.save(result, file)
    os.replace(f"{folder}/{rank}.partial", f"{folder}/{rank}.pt")


def run_on_ranks(size: int, function: Callable, *args: Any) -> list[Any]:
    """`function(*args)` on `size` gloo processes; results in rank order. Raises AssertionError with the first rank's traceback."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        payload = pickle.dumps((function, args))
        workers = [context.Process(target=_worker, args=(rank, size, folder, payload)) for rank in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(_TIMEOUT_S * 2)
        alive = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        for worker in workers:
            worker.kill()
        assert not alive, f"ranks {alive} did not finish"
        lost = {rank: worker.exitcode for rank, worker in enumerate(workers) if not os.path.exists(f"{folder}/{rank}.pt")}
        assert not lost, f"ranks ended without a result; their exit codes: {lost}"
        results = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]
    for rank, (status, value) in enumerate(results):
        assert status == "ok", f"rank {rank} failed:\n{value}"
    return [value for _, value in results]
