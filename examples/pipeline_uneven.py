"""Two pipeline stages of a GPT with a large vocabulary and a short trunk: cut by cost, and cut in equal numbers of layers.

    torchrun --standalone --nproc-per-node 2 examples/pipeline_uneven.py

The head costs as much as several layers, so equal numbers of layers make uneven stages. By cost the cut may fall anywhere, between two ops
of a layer too. Both pipelines are predicted and measured, and written as traces for ui.perfetto.dev: in each, what was measured lies in the
row below what was predicted. The seconds are for this machine to say, and depend on what else it does; the losses are checked.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from gpt import GPT, GPTConfig
from side_by_side import finish, train
from torch.distributed.device_mesh import init_device_mesh

import autoshard

CONFIG = GPTConfig(layers=4, heads=4, width=128, block=64, vocab=8192)
STARTS = {"cut by cost": (), "cut in equal layers": (f"blocks.{CONFIG.layers // 2}",)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut a GPT in two stages, by cost and by layers.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("out/pipeline"))
    args = parser.parse_args()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("pp",))
    if dist.get_rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    ids = torch.randint(CONFIG.vocab, (8, CONFIG.block))
    losses = {"one process": trained(make(), ids, args.steps)}
    for title, starts in STARTS.items():
        asked = autoshard.Pipelining(args.microbatches, "1f1b", starts=starts)
        model = autoshard.compile(make(), mesh, example_inputs=(ids, ids), pipeline=asked)
        losses[title] = trained(model, ids, args.steps)
        measured = model.measure(ids, ids)
        if dist.get_rank() == 0:
            report(title, model.plan, measured, args.out / f"{title.replace(' ', '_')}.json")
    if dist.get_rank() == 0:
        for title, found in losses.items():
            print(f"{title:20} losses {'  '.join(f'{loss:.6f}' for loss in found)}")
    finish(losses.values(), losses["one process"], 1e-4)


def make() -> GPT:
    torch.manual_seed(1)
    return GPT(CONFIG)


def trained(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> list[float]:
    return train(model, torch.optim.SGD(model.parameters(), 0.1), [(ids, ids)] * steps)


def report(title: str, plan: autoshard.Plan, measured: list, trace: Path) -> None:
    """What is predicted and what was measured, in a few lines and in a trace."""
    timeline = plan.timeline()
    shares = [sum(event.end_s - event.start_s for event in measured if event.rank == rank) for rank in range(2)]
    print(f"{title}: stage 1 begins at {first_module(plan)}")
    print(f"    predicted {timeline.total_s * 1e3:7.1f} ms a step, busy {' '.join(f'{s * 1e3:.1f}' for s in timeline.busy_s)} ms")
    print(f"    measured  {max(e.end_s for e in measured) * 1e3:7.1f} ms a step, busy {' '.join(f'{s * 1e3:.1f}' for s in shares)} ms")
    print(f"    {timeline.to_chrome_trace(trace, measured)}", flush=True)


def first_module(plan: autoshard.Plan) -> str:
    """The module whose lines come first in the program of stage 1."""
    return next(line.strip(" #-") for line in plan.source(rank=1).splitlines() if line.strip().startswith("# ----"))


if __name__ == "__main__":
    main()
