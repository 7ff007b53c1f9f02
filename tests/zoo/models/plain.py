"""Models written in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.models.entry import BATCH, LENGTH, VOCAB, Made, Table, normal, tokens

TABLE = Table()
PLAIN = "plain torch"


@TABLE.add("mlp", PLAIN)
def mlp() -> Made:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 4))
    return model.double(), (normal(BATCH, 8).requires_grad_(),), {}


@TABLE.add("mlp_odd_sizes", PLAIN)
def mlp_odd_sizes() -> Made:
    """Widths that no axis divides."""
    return nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5), nn.SiLU(), nn.Linear(5, 3)).double(), (normal(BATCH, 7),), {}


class TiedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


@TABLE.add("mlp_tied", PLAIN)
def mlp_tied() -> Made:
    return TiedMLP().double(), (normal(BATCH, 8),), {}


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part.view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in self.c_attn(x).split(c, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), CausalAttention(width, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4, layers: int = 2, dropout: float = 0.1):
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(VOCAB, width), nn.Embedding(LENGTH, width), nn.Dropout(dropout)
        self.h = nn.ModuleList(GPTBlock(width, heads, dropout) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device)))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


@TABLE.add("nanogpt", PLAIN)
def nanogpt() -> Made:
    return NanoGPT().double(), (tokens(), tokens(seed=4)), {}


@TABLE.add("nanogpt_odd_sizes", PLAIN)
def nanogpt_odd_sizes() -> Made:
    """Three heads, seven positions."""
    return NanoGPT(width=15, heads=3, dropout=0.0).double(), (tokens(BATCH, 7), tokens(BATCH, 7, seed=4)), {}


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int, groups: int):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk, self.wv = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down, self.norm1, self.norm2 = nn.Linear(2 * width, width, bias=False), RMSNorm(width), RMSNorm(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, c = x.shape
        y = self.norm1(x)
        q = rotate(self.wq(y).view(b, t, self.heads, self.size).transpose(1, 2), cos, sin)
        k = rotate(self.wk(y).view(b, t, self.groups, self.size).transpose(1, 2), cos, sin)
        v = self.wv(y).view(b, t, self.groups, self.size).transpose(1, 2)
        k, v = (z.repeat_interleave(self.heads // self.groups, dim=1) for z in (k, v))
        x = x + self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class PlainLlama(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4, groups: int = 2, layers: int = 2):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(VOCAB, width), RMSNorm(width), nn.Linear(width, VOCAB, bias=False)
        self.layers = nn.ModuleList(LlamaBlock(width, heads, groups) for _ in range(layers))
        size = width // heads
        angles = torch.outer(torch.arange(32.0), 1 / 10000 ** (torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x, t = self.embed(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


@TABLE.add("llama_plain", PLAIN)
def llama_plain() -> Made:
    """RMSNorm, rotary positions, grouped queries and a gated MLP."""
    return PlainLlama().double(), (tokens(), tokens(seed=4)), {}


@TABLE.add("convnet_batchnorm", PLAIN)
def convnet_batchnorm() -> Made:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return model.double(), (normal(BATCH, 3, 8, 8).requires_grad_(),), {}


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.skip = (
            nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)) if stride > 1 else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.skip(x)
        return F.relu(y, inplace=True)


@TABLE.add("resnet_plain", PLAIN)
def resnet_plain() -> Made:
    blocks = [nn.Conv2d(3, 8, 3, padding=1), Residual(8, 8, 1), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)]
    return nn.Sequential(*blocks).double(), (normal(BATCH, 3, 8, 8),), {}


class UNet(nn.Module):
    """Skips, strided and transposed convolutions, group norm, nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.middle, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.up, self.merge, self.leave = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.silu(self.enter(x))
        low = F.silu(self.norm(self.middle(self.down(high))))
        y = F.silu(self.merge(torch.cat((self.up(low), high), dim=1)))
        return self.leave(torch.cat((y, F.interpolate(low, scale_factor=2, mode="nearest")), dim=1))


@TABLE.add("unet_plain", PLAIN)
def unet_plain() -> Made:
    return UNet().double(), (normal(BATCH, 4, 8, 8),), {}


@TABLE.add("transformer_encoder", PLAIN)
def transformer_encoder() -> Made:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double(), (normal(BATCH, LENGTH, 16).requires_grad_(),), {}


@TABLE.add("transformer_encoder_decoder", PLAIN)
def transformer_encoder_decoder() -> Made:
    model = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True).double()
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    return model, (normal(BATCH, LENGTH, 16), normal(BATCH, 4, 16, seed=5)), {"tgt_mask": mask, "tgt_is_causal": True}


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: object):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(VOCAB, 8), kind(8, 8, batch_first=True, **options), nn.LazyLinear(VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


def _recurrent(kind: type[nn.RNNBase], **options: object) -> Made:
    model = Recurrent(kind, **options)
    model(tokens())
    return model.double(), (tokens(),), {}


@TABLE.add("lstm", PLAIN)
def lstm() -> Made:
    return _recurrent(nn.LSTM, num_layers=2, bidirectional=True)


@TABLE.add("gru", PLAIN)
def gru() -> Made:
    return _recurrent(nn.GRU)


class DenseMoE(nn.Module):
    """Top-2 routing by a one-hot dispatch mask and stacked expert weights."""

    def __init__(self, width: int = 8, experts: int = 4):
        super().__init__()
        self.route = nn.Linear(width, experts, bias=False)
        self.w1, self.w2 = (nn.Parameter(torch.randn(experts, width, width) * 0.3) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chance = self.route(x).softmax(-1)
        weight, expert = chance.topk(2, dim=-1)
        dispatch = (F.one_hot(expert, self.w1.shape[0]).to(x) * weight.unsqueeze(-1)).sum(-2)
        hidden = F.gelu(torch.einsum("btd,edf->btef", x, self.w1))
        y = torch.einsum("btef,efd,bte->btd", hidden, self.w2, dispatch)
        return y, (chance.mean((0, 1)) * dispatch.mean((0, 1))).sum()


@TABLE.add("moe_dense", PLAIN)
def moe_dense() -> Made:
    return DenseMoE().double(), (normal(BATCH, LENGTH, 8),), {}


class GraphNet(nn.Module):
    """Message passing: gather along edges, index_add into nodes, scatter-mean over graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update, self.read = nn.Linear(16, 8), nn.GRUCell(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        for _ in range(2):
            sent = F.relu(self.message(torch.cat((x[edges[0]], x[edges[1]]), dim=-1)))
            x = self.update(torch.zeros_like(x).index_add(0, edges[1], sent), x)
        count = torch.zeros(BATCH, 1, dtype=x.dtype).scatter_add(0, graph[:, None], torch.ones_like(x[:, :1]))
        pooled = torch.zeros(BATCH, 8, dtype=x.dtype).scatter_add(0, graph[:, None].expand(-1, 8), x)
        return self.read(pooled / count.clamp(min=1))


@TABLE.add("graph_net", PLAIN)
def graph_net() -> Made:
    edges = torch.randint(0, 16, (2, 32), generator=torch.Generator().manual_seed(6))
    return GraphNet().double(), (normal(16, 8), edges, torch.arange(BATCH).repeat_interleave(4)), {}


class TwoTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.scale = nn.Linear(8, 16), nn.Linear(12, 16), nn.Parameter(torch.tensor(1.0))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        logits = F.normalize(self.left(a), dim=-1) @ F.normalize(self.right(b), dim=-1).t() * self.scale.exp()
        target = torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


@TABLE.add("two_tower", PLAIN)
def two_tower() -> Made:
    """A contrastive loss, which mixes the whole batch."""
    return TwoTower().double(), (normal(BATCH, 8), normal(BATCH, 12, seed=5)), {}


class VAE(nn.Module):
    def __init__(self, draws: bool):
        super().__init__()
        self.draws, self.encode, self.decode = draws, nn.Linear(16, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, dim=-1)
        noise = torch.randn_like(mean) if self.draws else torch.zeros_like(mean)
        y = self.decode(mean + (log_variance / 2).exp() * noise)
        return y, F.mse_loss(y, x) - 0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(-1).mean()


@TABLE.add("vae", PLAIN)
def vae() -> Made:
    return VAE(draws=False).double(), (normal(BATCH, 16),), {}


class MixerBlock(nn.Module):
    def __init__(self, length: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.along = nn.Sequential(nn.Linear(length, 2 * length), nn.GELU(), nn.Linear(2 * length, length))
        self.across = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.along(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.across(self.norm2(x))


@TABLE.add("mlp_mixer", PLAIN)
def mlp_mixer() -> Made:
    return nn.Sequential(MixerBlock(8, 12), MixerBlock(8, 12), nn.LayerNorm(12)).double(), (normal(BATCH, 8, 12),), {}


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(VOCAB, 8, mode=mode) for mode in ("sum", "mean"))
        self.bottom, self.top = nn.Linear(4, 8), nn.Sequential(nn.Linear(11, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense: Tensor, sparse: Tensor, clicked: Tensor) -> Tensor:
        found = torch.stack([F.relu(self.bottom(dense)), *(bag(ids) for bag, ids in zip(self.bags, sparse.unbind(1), strict=True))], dim=1)
        products = torch.bmm(found, found.transpose(1, 2))
        row, column = torch.tril_indices(3, 3, -1)
        logit = self.top(torch.cat((found[:, 0], products[:, row, column]), dim=1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logit, clicked)


@TABLE.add("recommender", PLAIN)
def recommender() -> Made:
    """Embedding bags and pairwise products, as DLRM."""
    return Recommender().double(), (normal(BATCH, 4), tokens(BATCH, 2, 3), (normal(BATCH, seed=7) > 0).double()), {}


class Conv1dNet(nn.Module):
    """Dilated causal convolutions with gates and weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 16, 2, dilation=2**k)) for k in range(2))
        self.out = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for k, conv in enumerate(self.convs):
            a, b = conv(F.pad(x, (2**k, 0))).chunk(2, dim=1)
            x = x + torch.tanh(a) * torch.sigmoid(b)
        return self.out(x)


@TABLE.add("wavenet_plain", PLAIN)
def wavenet_plain() -> Made:
    return Conv1dNet().double(), (normal(BATCH, 8, 12),), {}


class LinearAttention(nn.Module):
    """Causal linear attention by cumulative sums, and a learned buffer of statistics."""

    def __init__(self, width: int = 8, heads: int = 4):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.cumsum(torch.einsum("bhtd,bhte->bhtde", k, v), dim=2)
        y = torch.einsum("bhtd,bhtde->bhte", q, state) / torch.einsum("bhtd,bhtd->bht", q, k.cumsum(2)).unsqueeze(-1)
        if self.training:
            self.steps += 1
            self.average.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


@TABLE.add("linear_attention", PLAIN)
def linear_attention() -> Made:
    return LinearAttention().double(), (normal(BATCH, LENGTH, 8).requires_grad_(),), {}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 2 if y.sum() > 0 else y


@TABLE.add("branch_on_values", PLAIN, refusal="The model branches on values of tensors")
def branch_on_values() -> Made:
    return Branches().double(), (normal(BATCH, 8),), {}


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


class OwnBackward(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(self.linear(x))


@TABLE.add("own_backward", PLAIN, refusal="custom autograd.Function Scaled")
def own_backward() -> Made:
    return OwnBackward().double(), (normal(BATCH, 8),), {}


class Nonzero(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[x > 0]


@TABLE.add("shape_from_values", PLAIN, refusal="depends on the values of tensors")
def shape_from_values() -> Made:
    return Nonzero().double(), (normal(BATCH, 8),), {}


@TABLE.add("vae_drawing", PLAIN)
def vae_drawing() -> Made:
    """Draws noise: compared with the graph's random ops switched off, where that is possible."""
    return VAE(draws=True).double(), (normal(BATCH, 16),), {}
