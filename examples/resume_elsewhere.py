"""Training moves: begun with data parallelism, saved, and gone on with tensor parallelism, or with pipeline stages, from the same files.

    torchrun --standalone --nproc-per-node 2 examples/resume_elsewhere.py

Parameters and optimizer state are DTensors under the model's own names, so torch.distributed.checkpoint saves what each process holds and
loads it into any other layout. In float64 the losses go on as those of one process that never stopped.
"""

import argparse
import shutil
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gpt import GPT, SMALL
from side_by_side import finish, train
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autoshard

MESHES = {"dp": "ddp", "tp": "megatron", "pp": "auto"}  # the axis and the template


def make(axis: str, ids: Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model on two processes of one axis, and its optimizer. "": on one process."""
    torch.manual_seed(0)
    model: nn.Module = GPT(SMALL).double()
    if axis:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(axis,))
        model = autoshard.compile(model, mesh, template=MESHES[axis], example_inputs=(ids, ids))
    return model, torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Parameters and optimizer state by the names of the parameters: numbers would differ between pipeline stages."""
    kept = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    return {"model": model.state_dict(), "optimizer": autoshard.checkpointable(kept)}


def make_room(optimizer: torch.optim.AdamW) -> None:
    """The state that AdamW would make at its first step, for a checkpoint to be loaded into."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Save on one mesh and resume on others.")
    parser.add_argument("--steps", type=int, default=3, help="steps before the checkpoint, and after it")
    steps = parser.parse_args().steps
    dist.init_process_group("gloo")
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randint(SMALL.vocab, (4, SMALL.block), generator=generator),) * 2 for _ in range(2 * steps)]

    single = train(*make("", batches[0][0]), batches)
    model, optimizer = make("dp", batches[0][0])
    begun = train(model, optimizer, batches[:steps])
    dcp.save(state_of(model, optimizer), checkpoint_id=folder[0])

    resumed = {}
    for axis in ("tp", "pp"):
        model, optimizer = make(axis, batches[0][0])
        make_room(optimizer)
        state = state_of(model, optimizer)
        dcp.load(state, checkpoint_id=folder[0])  # in place: the tensors of the state are those of the model and the optimizer
        resumed[axis] = begun + train(model, optimizer, batches[steps:])
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
        print("step  one process       dp=2, then tp=2   dp=2, then pp=2")
        for step, losses in enumerate(zip(single, *resumed.values(), strict=True), start=1):
            print(f"{step:4}  {'  '.join(f'{loss:.14f}' for loss in losses)}{'   <- saved here' if step == steps else ''}")
    finish(resumed.values(), single, 1e-9)


if __name__ == "__main__":
    main()
