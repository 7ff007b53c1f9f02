"""Two processes, one all-reduce: what the doctor starts to see whether gloo works here. Needs torch alone.

    python loopback.py FOLDER RANK

Rank 0 prints the bytes that each rank sent in a second, as JSON.
"""

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

RANKS, COUNT, ROUNDS, TIMEOUT_S = 2, 2**20, 5, 60


def main(folder: str, rank: int) -> None:
    """All-reduce COUNT float32 numbers ROUNDS times between two processes that meet in a file of `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT_S))
    seconds = []
    for _ in range(ROUNDS):
        x = torch.full((COUNT,), float(rank + 1))
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(x)
        seconds.append(time.perf_counter() - started)
        if not bool((x == sum(range(1, RANKS + 1))).all()):
            raise SystemExit("the all-reduce gave wrong numbers")
    if rank == 0:
        sent = 2 * (RANKS - 1) / RANKS * x.nbytes  # by one rank of a ring
        print(json.dumps({"bytes_per_s": sent / sorted(seconds)[ROUNDS // 2]}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
