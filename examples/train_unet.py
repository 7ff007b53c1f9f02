"""A U-Net whose images are split in space: each of two processes holds the upper or the lower half of every picture.

    torchrun --standalone --nproc-per-node 2 examples/train_unet.py

For images too large for one device there is no batch to split. Two constraints ask for it: convolutions and norms split the height.
Everything else follows: convolutions, strided and transposed ones too, fetch the rows at the edge from the neighbour, group norms add up
their statistics, and the weights are whole on both.
"""

import argparse
import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from side_by_side import finish, show, train
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Adam

import autoshard
from autoshard.debug import count_communication

CONSTRAINTS = {"split:*conv*": "h_in&h_out@sp", "split:*group_norm": "s.1@sp"}  # factors of the ops' rules, see docs/ops.md


class Double(nn.Sequential):
    """Two convolutions, each with a group norm."""

    def __init__(self, inside: int, outside: int) -> None:
        halves = [(nn.Conv2d(width, outside, 3, padding=1), nn.GroupNorm(4, outside), nn.SiLU()) for width in (inside, outside)]
        super().__init__(*halves[0], *halves[1])


class UNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter, self.down = Double(1, width), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle, self.up = Double(2 * width, 2 * width), nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.leave = nn.Sequential(Double(2 * width, width), nn.Conv2d(width, 1, 1))

    def forward(self, image: Tensor, clean: Tensor) -> Tensor:
        """The mean squared error of the image without its noise. image, clean: f32[batch, 1, height, width]."""
        high = self.enter(image)
        low = self.up(self.middle(self.down(high)))
        return F.mse_loss(image - self.leave(torch.cat((high, low), dim=1)), clean)


def draw_images(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Waves, with noise and without."""
    at = torch.linspace(0, 6.0, size)
    turns = torch.rand(count, 2, 1, 1) * 3
    clean = torch.sin(turns[:, :1] * at[:, None] + turns[:, 1:] * at)
    return clean + 0.3 * torch.randn_like(clean), clean


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a U-Net on images that are split by height.")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("sp",))

    torch.manual_seed(0)
    reference = UNet()
    images = draw_images(1, args.size)
    model = autoshard.compile(copy.deepcopy(reference), mesh, example_inputs=images, constraints=CONSTRAINTS)

    sharded, single = (train(m, Adam(m.parameters(), 3e-3, foreach=True), [images] * args.steps) for m in (model, reference))
    with count_communication(mesh) as sent:
        model(*images).backward()
    if dist.get_rank() == 0:
        show(sharded, single)
        print(next(line.strip() for line in model.plan.source().splitlines() if "conv" in line and "axes=" in line))
        print("sent in a step:", {kind: f"{sent.calls[kind]} calls, {nbytes:,.0f} bytes" for kind, nbytes in sent.sent_bytes.items()})
    finish([sharded], single, 1e-3)


if __name__ == "__main__":
    main()
