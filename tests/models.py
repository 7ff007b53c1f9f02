"""Small models that the tests partition, each with inputs; written as one would for a single device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoshard import Hardware

BATCH, LENGTH, VOCAB = 4, 8, 32


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.drop(self.proj(y.transpose(1, 2).reshape(batch, length, width)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, dropout)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Fused qkv, learned positions, tied head, dropout."""

    def __init__(self, layers: int = 1, width: int = 16, heads: int = 4, dropout: float = 0.0):
        super().__init__()
        self.tok, self.pos = nn.Embedding(VOCAB, width), nn.Embedding(LENGTH, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.drop(self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits if labels is None else F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1))


class ConvNet(nn.Module):
    """Convolutions with BatchNorm: under a split batch the statistics are those of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.classify = nn.Linear(8, 4)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.classify(self.features(images).mean((2, 3)))
        return F.cross_entropy(logits, labels), {"logits": logits}


class Encoder(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.head(self.encoder(x)), target)


class MLP(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def hf_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_head": 4, "n_embd": 16, "vocab_size": VOCAB, "n_positions": LENGTH}
    quiet = {"use_cache": False, "bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLM"}
    return GPT2LMHeadModel(GPT2Config(**sizes, **quiet, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def hf_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": VOCAB, "max_position_embeddings": LENGTH}
    return LlamaForCausalLM(LlamaConfig(**heads, **sizes, use_cache=False))


# Slow at computing, with links that cost nothing: what the solver distributes even when it is tiny.
SLOW = Hardware.uniform(
    "slow",
    flops_per_s=6e8,
    memory_bytes_per_s=1e9,
    memory_bytes=1e12,
    link_bytes_per_s=1e15,
    collective_latency_s=1e-9,
    kernel_latency_s=1e-9,
)


@dataclass(frozen=True)
class Example:
    """A model and what it is called with. batch: positional and keyword arguments, different for every seed."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().to(dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=_generator(seed))


def _images(seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = _generator(seed)
    images = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
    return (images, torch.randint(0, 4, (BATCH,), generator=generator)), {}


def _vectors(seed: int, last: int = 4) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = _generator(seed)
    return tuple(torch.randn(BATCH, LENGTH, width, generator=generator, dtype=torch.float64) for width in (16, last)), {}


EXAMPLES = {
    "gpt": Example(GPT, lambda seed: ((_tokens(seed), _tokens(seed + 1000)), {})),
    "hf_gpt2": Example(hf_gpt2, lambda seed: ((), {"input_ids": _tokens(seed), "labels": _tokens(seed)})),
    "hf_llama": Example(hf_llama, lambda seed: ((), {"input_ids": _tokens(seed), "labels": _tokens(seed)})),
    "conv_net": Example(ConvNet, _images),
    "encoder": Example(Encoder, _vectors),
}


def loss_of(result: Any) -> Tensor:
    """The loss in what a model of EXAMPLES returns."""
    if isinstance(result, Tensor):
        return result
    return result[0] if isinstance(result, tuple) else result["loss"]
