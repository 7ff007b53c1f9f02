"""A small Vision Transformer on two processes that load different images: sharded data parallelism (ZeRO, FSDP), by a template's name.

    torchrun --standalone --nproc-per-node 2 examples/train_vit.py

Each process passes its own part of the batch (inputs="local"), as a DistributedSampler would hand it out. The loss is that of the whole
batch, and equals the loss of one process that is given all of it.
"""

import argparse
import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from side_by_side import finish, show, train
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW

import autoshard

IMAGE, PATCH, WIDTH, HEADS, LAYERS, CLASSES = 32, 8, 64, 4, 3, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.randn((IMAGE // PATCH) ** 2, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy. images: f32[batch, 3, IMAGE, IMAGE]; labels: i64[batch]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x).mean(dim=1)), labels)


def draw_batch(size: int) -> tuple[Tensor, Tensor]:
    """Noise in which one colour is brighter than the others: that is the label."""
    images, labels = torch.randn(size, 3, IMAGE, IMAGE), torch.randint(CLASSES, (size,))
    images[torch.arange(size), labels] += 0.5
    return images, labels


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small ViT on two processes.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="images in the global batch")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))

    torch.manual_seed(0)
    reference = ViT()
    batches = [draw_batch(args.batch) for _ in range(args.steps)]
    own = [(images.chunk(world)[rank], labels.chunk(world)[rank]) for images, labels in batches]
    model = autoshard.compile(copy.deepcopy(reference), mesh, template="fsdp", inputs="local", example_inputs=own[0])

    both = (model, own), (reference, batches)
    sharded, single = (train(m, AdamW(m.parameters(), 1e-3, foreach=True), given) for m, given in both)
    if rank == 0:
        show(sharded, single, every=max(1, args.steps // 5))
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        whole = sum(parameter.numel() for parameter in reference.parameters())
        print(f"each process holds {held:,} of {whole:,} parameters, and as much of gradients and optimizer state")
    finish([sharded], single, 1e-3)


if __name__ == "__main__":
    main()
