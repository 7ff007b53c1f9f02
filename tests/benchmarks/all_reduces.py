"""A GPT with separate query, key and value projections under tensor parallelism: what real processes send, by autoshard and by DTensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import autoshard
from autoshard.debug import count_communication

LAYERS, WIDTH, HEADS, VOCAB, BATCH, LENGTH = 4, 32, 4, 64, 2, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class SeparateGPT(nn.Module):
    """ids, labels: i64[batch, length] -> loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


# Megatron's tensor parallelism of the blocks; embedding, head and norms are whole, so that all that is sent is the blocks'.
PINS = {
    **{f"blocks.*.{name}.weight": "S(0)@tp" for name in ("q", "k", "v", "up")},
    **{f"blocks.*.{name}.weight": "S(1)@tp" for name in ("o", "down")},
    **dict.fromkeys(("embed.weight", "head.weight", "norm.*", "blocks.*.norm1.*", "blocks.*.norm2.*"), "I"),
    **{f"output:blocks.{k}": "I@tp" for k in range(LAYERS)},
}


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(VOCAB, (BATCH, LENGTH), generator=generator) for _ in range(2))
    return ids, labels


def counts(kind: str) -> tuple[dict[str, int], float]:
    """Collectives that this rank calls in one forward and backward, by name, and the loss. kind: "autoshard" or "dtensor"."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model: Any = _as_dtensor(SeparateGPT(), mesh) if kind == "dtensor" else None
    if kind == "autoshard":
        model = autoshard.compile(SeparateGPT(), mesh, example_inputs=tokens(), constraints=PINS, hardware="h100")
    model(*tokens()).backward()  # the first step also compares plans among the ranks
    with count_communication() as sent:
        loss = model(*tokens())
        loss.backward()
    return sent.calls, float(loss.detach())


def _as_dtensor(model: SeparateGPT, mesh: Any) -> nn.Module:
    """The same layouts by torch.distributed.tensor.parallel."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {f"blocks.*.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")}
    plan |= {f"blocks.*.{name}": RowwiseParallel() for name in ("o", "down")}
    return parallelize_module(model, mesh, plan)
