"""A Llama, written as one would for a single device: RoPE, grouped-query attention, RMSNorm, SwiGLU.

Nothing in this file knows that it may be partitioned.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the model; the defaults are about 1.1 billion parameters."""

    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    width: int = 2048
    hidden: int = 8192
    vocab: int = 32768
    rope_theta: float = 500_000.0


SMALL = LlamaConfig(layers=2, heads=8, kv_heads=4, width=64, hidden=128, vocab=64)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of features by their position's angle. x: [batch, heads, length, size]; cos, sin: [length, size]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads, self.kv_heads, self.size = config.heads, config.kv_heads, config.width // config.heads
        self.q = nn.Linear(config.width, config.heads * self.size, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * self.size, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * self.size, bias=False)
        self.out = nn.Linear(config.heads * self.size, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = rotate(self.q(x).view(batch, length, self.heads, self.size).transpose(1, 2), cos, sin)
        k = rotate(self.k(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2), cos, sin)
        v = self.v(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        k, v = (self._per_head(part) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, self.heads * self.size))

    def _per_head(self, x: Tensor) -> Tensor:
        """Each key and value head once for every query head that reads it."""
        batch, _, length, _ = x.shape
        repeated = x[:, :, None].expand(batch, self.kv_heads, self.heads // self.kv_heads, length, self.size)
        return repeated.reshape(batch, self.heads, length, self.size)


class SwiGLU(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, eps=1e-5)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.width, eps=1e-5)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.tok = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of every position, or the mean cross-entropy where labels are given. ids, labels: int64 [batch, length]."""
        x = self.tok(ids)
        cos, sin = self._angles(ids.shape[1], x)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        if labels is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))

    def _angles(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config.width // self.config.heads
        steps = torch.arange(0, size, 2, device=like.device, dtype=torch.float32) / size
        positions = torch.arange(length, device=like.device, dtype=torch.float32)
        angles = positions[:, None] / self.config.rope_theta**steps
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
