"""An MLP on two processes. Each line that mentions autoshard or the mesh is all that partitioning adds to the script.

    torchrun --standalone --nproc-per-node 2 examples/train_mlp.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import autoshard


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1))
    inputs = torch.randn(512, 64)
    targets = inputs[:, :8].prod(dim=1, keepdim=True)

    model = autoshard.compile(net, mesh, example_inputs=(inputs,))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, foreach=True)
    for step in range(50):
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 10 == 9:
            print(f"step {step + 1:3}  loss {loss.item():.4f}", flush=True)

    if dist.get_rank() == 0:
        for name, parameter in model.named_parameters():
            print(f"{name:10} {tuple(parameter.shape)!s:12} {parameter.placements}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
