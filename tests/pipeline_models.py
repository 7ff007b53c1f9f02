"""Small models whose batch is cut in microbatches in every way that models are written, each with inputs, float64 and float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from models import GPT, LENGTH, VOCAB
from torch import Tensor, nn

BATCH, WIDTH, CLASSES = 8, 8, 6
Batch = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A model and what it is called with. tolerance: what is computed in float32 is less exact."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    tolerance: float = 1e-12

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().double()


CASES: dict[str, Case] = {}


def case(batch: Callable[[int], Batch], tolerance: float = 1e-12) -> Callable[[Any], Any]:
    """Add a model's class, or a function that makes one, under its name."""

    def add(make: Any) -> Any:
        CASES[make.__name__] = Case(make, batch, tolerance)
        return make

    return add


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(seed: int, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, length), generator=draws(seed))


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64)


def text(seed: int) -> Batch:
    """i64[BATCH, LENGTH] ids and labels, by keyword; some labels do not count, unevenly among rows."""
    labels = tokens(seed + 1000)
    labels[0, 1:], labels[3] = -100, -100
    return (), {"input_ids": tokens(seed), "labels": labels}


def vectors(seed: int) -> Batch:
    """f64[BATCH, WIDTH] and a class of each row; some classes are to be ignored."""
    y = torch.randint(0, CLASSES, (BATCH,), generator=draws(seed + 1))
    y[:3] = 2
    return (numbers(seed, BATCH, WIDTH), y), {}


def sequences(seed: int) -> Batch:
    """f64[BATCH, LENGTH, WIDTH], and a target of the same shape."""
    return (numbers(seed, BATCH, LENGTH, WIDTH), numbers(seed + 1, BATCH, LENGTH, WIDTH)), {}


def ids_and_labels(seed: int) -> Batch:
    given = text(seed)[1]
    return (given["input_ids"], given["labels"]), {}


def pictures(seed: int) -> Batch:
    return (numbers(seed, BATCH, 3, 8, 8), numbers(seed + 1, BATCH, 3, 8, 8)), {}


# ------------------------------------------------------------------------------------------------------ whole models


@case(ids_and_labels)
def gpt() -> nn.Module:
    return GPT(layers=4)


@case(text, tolerance=1e-5)
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": VOCAB, "max_position_embeddings": LENGTH}
    return LlamaForCausalLM(LlamaConfig(**heads, **sizes, use_cache=False, tie_word_embeddings=True))


@case(
    lambda seed: ((), {**text(seed)[1], "attention_mask": (torch.arange(LENGTH) < torch.arange(BATCH)[:, None] + 1).long()}), tolerance=1e-5
)
def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": VOCAB, "max_position_embeddings": LENGTH}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(num_hidden_layers=3, num_attention_heads=4, **sizes, **quiet))


@case(text, tolerance=1e-5)
def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, use_cache=False, decoder_start_token_id=0))


@case(pictures)
class UNet(nn.Module):
    """Convolutions down and up, with skips from one end to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.down = nn.ModuleList([nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(8, 8, 2, stride=2), nn.ConvTranspose2d(16, 4, 2, stride=2)])
        self.norms = nn.ModuleList([nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)])
        self.join = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        first = self.enter(x)
        second = F.silu(self.norms[0](self.down[0](first)))
        y = F.silu(self.norms[1](self.down[1](second)))
        y = torch.cat([self.up[0](y), second], 1)
        y = self.join(torch.cat([self.up[1](y), first], 1))
        return F.mse_loss(self.leave(F.silu(y)), target)


class Experts(nn.Module):
    """A dense mixture of experts; returns its output and the balance term of Switch: fraction of tokens times mean probability."""

    def __init__(self, width: int = WIDTH, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(count, width, 16) * 0.3), nn.Parameter(torch.randn(count, 16, width) * 0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chances = self.router(x).softmax(-1)
        chosen = F.one_hot(chances.argmax(-1), chances.shape[-1]).to(x.dtype)
        y = torch.einsum("btw,ewf->btef", x, self.up).relu()
        y = torch.einsum("btef,efw,bte->btw", y, self.down, chances * chosen)
        balance = (chosen.mean((0, 1)) * chances.mean((0, 1))).sum() * chances.shape[-1]
        return x + y, balance


@case(sequences)
class MoE(nn.Module):
    """Layers of experts whose balance terms are part of the loss; returns the loss, its main part, and the sum of the terms."""

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = weight
        self.enter, self.layers, self.leave = nn.Linear(WIDTH, WIDTH), nn.ModuleList([Experts(), Experts()]), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, balance = self.enter(x), torch.zeros((), dtype=x.dtype)
        for layer in self.layers:
            x, term = layer(x)
            balance = balance + term
        main = F.mse_loss(self.leave(x), target)
        return main + self.weight * balance, main.detach(), balance.detach()


# ----------------------------------------------------------------------------------------------- what crosses stages


class Deep(nn.Module):
    """Four linear layers to derive from."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.head = nn.Linear(WIDTH, CLASSES)

    def hidden(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@case(lambda seed: ((tokens(seed), numbers(seed, BATCH, LENGTH, WIDTH)), {}))
class IntegersAndMasks(Deep):
    """Numbers of the first layer's largest entries and a mask of them, made early and read late."""

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        first = self.layers[0](x)
        order, mask, odd = first.argsort(-1), first > 0, ids % 2 == 1
        y = self.hidden(first)
        y = torch.where(mask, y, y * 0.5).gather(-1, order)
        return (y * odd[..., None]).square().mean()


@case(
    lambda seed: (
        (numbers(seed, BATCH, WIDTH), {"left": numbers(seed + 1, BATCH, WIDTH), "scale": numbers(seed + 2, WIDTH)}),
        {"y": numbers(seed + 3, BATCH, CLASSES)},
    )
)
class SeveralInputsAndOutputs(Deep):
    """Arguments in a dict and by keyword, one of no batch; results in a dict, one with two batch dims swapped, one that is a number."""

    def forward(self, x: Tensor, extra: dict[str, Tensor], *, y: Tensor) -> dict[str, Any]:
        hidden = self.hidden(x * extra["scale"])
        hidden = hidden + extra["left"]
        logits = self.head(hidden)
        loss = F.mse_loss(logits, y)
        return {"loss": loss, "logits": logits, "across": hidden.t(), "classes": logits.argmax(-1), "name": "deep", "sum": hidden.sum()}


@case(vectors)
class ValuesManyRead(Deep):
    """The first layer's output is read by every later one."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first = torch.tanh(self.layers[0](x))
        for layer in self.layers[1:]:
            x = torch.tanh(layer(x)) * first + first
        return F.cross_entropy(self.head(x), y)


@case(vectors)
class NothingLearnedAtTheEnd(Deep):
    """The last ops, most of them, read no weight."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.head(self.layers[0](x))
        for _ in range(12):
            z = torch.sin(z) + z * 0.1
        return F.cross_entropy(z, y)


@case(vectors)
class NothingLearnedInTheMiddle(Deep):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.layers[0](x)
        for _ in range(12):
            z = torch.sin(z) + z * 0.1
        return F.cross_entropy(self.head(z), y)


@case(vectors)
class NothingLearnedAtFirst(Deep):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(12):
            x = torch.sin(x) + x * 0.1
        return F.cross_entropy(self.head(self.layers[0](x)), y)


@case(vectors)
class OneLayerUsedOftenAndFrozen(Deep):
    """One layer applied four times, another frozen, a third never used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1].requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(self.layers[0](x))
        return F.cross_entropy(self.head(self.layers[1](x)), y)


@case(lambda seed: ((numbers(seed, BATCH, WIDTH).requires_grad_(), numbers(seed, BATCH, CLASSES)), {}))
class Doubled(Deep):
    """Returns the hidden state twice, and an argument as it came."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        hidden = self.hidden(x.detach())
        return F.mse_loss(self.head(hidden), y), hidden, hidden, y


# ------------------------------------------------------------------------------------------------------------ losses


def loss_case(name: str, function: Callable[[Tensor, Tensor], Tensor], batch: Callable[[int], Batch] = vectors) -> None:
    """Add four layers with a loss of f64[BATCH, CLASSES] logits and labels."""

    class WithLoss(Deep):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return function(self.head(self.hidden(x)), y)

    CASES[name] = Case(WithLoss, batch)


WEIGHTS = torch.tensor([0.5, 1.0, 3.0, 0.1, 2.0, 1.5], dtype=torch.float64)


def targets(seed: int) -> Batch:
    return (numbers(seed, BATCH, WIDTH), numbers(seed + 1, BATCH, CLASSES)), {}


def chances(seed: int) -> Batch:
    return (numbers(seed, BATCH, WIDTH), numbers(seed + 1, BATCH, CLASSES).softmax(-1)), {}


def flags(seed: int) -> Batch:
    return (numbers(seed, BATCH, WIDTH), (numbers(seed + 1, BATCH, CLASSES) > 0).double()), {}


loss_case("mse", lambda z, y: F.mse_loss(z, y), targets)
loss_case("l1", lambda z, y: F.l1_loss(z, y), targets)
loss_case("smooth_l1", lambda z, y: F.smooth_l1_loss(z, y), targets)
loss_case("huber_sum", lambda z, y: F.huber_loss(z, y, reduction="sum"), targets)
loss_case("root_of_squares", lambda z, y: (z - y).square().sum(-1).sqrt().mean(), targets)
loss_case("cross_entropy", lambda z, y: F.cross_entropy(z, y))
loss_case("cross_entropy_ignore", lambda z, y: F.cross_entropy(z, y, ignore_index=2))
loss_case("cross_entropy_weight", lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS))
loss_case("cross_entropy_weight_ignore", lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS, ignore_index=2))
loss_case("cross_entropy_smooth", lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1))
loss_case("cross_entropy_all", lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS, ignore_index=2, label_smoothing=0.1))
loss_case("cross_entropy_sum", lambda z, y: F.cross_entropy(z, y, reduction="sum", ignore_index=2))
loss_case("cross_entropy_none", lambda z, y: F.cross_entropy(z, y, reduction="none", ignore_index=2).mean())
loss_case("cross_entropy_chances", lambda z, y: F.cross_entropy(z, y), chances)
loss_case("cross_entropy_chances_weight", lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS, label_smoothing=0.1), chances)
loss_case("nll", lambda z, y: F.nll_loss(z.log_softmax(-1), y))
loss_case("nll_ignore_weight", lambda z, y: F.nll_loss(z.log_softmax(-1), y, weight=WEIGHTS, ignore_index=2))
loss_case("kl_batchmean", lambda z, y: F.kl_div(z.log_softmax(-1), y, reduction="batchmean"), chances)
loss_case("kl_sum", lambda z, y: F.kl_div(z.log_softmax(-1), y, reduction="sum"), chances)
loss_case("kl_log", lambda z, y: F.kl_div(z.log_softmax(-1), y.log(), reduction="batchmean", log_target=True), chances)
loss_case("kl_mean", lambda z, y: F.kl_div(z.log_softmax(-1), y, reduction="none").mean(), chances)
loss_case("bce_logits", lambda z, y: F.binary_cross_entropy_with_logits(z, y), flags)
loss_case("bce_logits_pos_weight", lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=WEIGHTS), flags)
loss_case("bce", lambda z, y: F.binary_cross_entropy(z.sigmoid(), y), flags)
loss_case("masked_mean", lambda z, y: (F.cross_entropy(z, y, reduction="none") * (y != 2)).sum() / (y != 2).sum())
loss_case("masked_mean_clamped", lambda z, y: (F.cross_entropy(z, y, reduction="none") * (y != 2)).sum() / (y != 2).sum().clamp(min=1))
loss_case("masked_mean_of_rest", lambda z, y: (F.cross_entropy(z, y, reduction="none") * (y != 2)).sum() / ((y != 2).double().mean() * 8))
loss_case("mean_over_part_of_rows", lambda z, y: z.square().sum() / ((y != 2).double().mean() * BATCH + torch.ones(())))
loss_case("two_terms", lambda z, y: F.cross_entropy(z, y) + 0.5 * F.mse_loss(z, F.one_hot(y, CLASSES).to(z.dtype)))
loss_case("scaled", lambda z, y: 3 * F.cross_entropy(z, y) / 7 - 1.25)
loss_case("mean_of_other_dim", lambda z, y: z.mean(-1).square().sum() / z.shape[0])
loss_case("mean_of_means", lambda z, y: z.square().mean(0).mean())
loss_case("sum_over_size", lambda z, y: z.square().sum() / z.numel())
loss_case("sum_times_constant", lambda z, y: (z.square().sum(-1) * (1 / BATCH)).sum())
loss_case("none_counts", lambda z, y: F.cross_entropy(z, y * 0 + 2, ignore_index=2, reduction="sum"))


@case(ids_and_labels)
class TokenWeighted(nn.Module):
    """Losses of tokens, weighted by their places, over the sum of the weights of those that count; a perplexity beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT(layers=2)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(ids)[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        weights = torch.linspace(0.5, 2.0, LENGTH - 1, dtype=logits.dtype) * (labels[:, 1:] != -100)
        return (losses * weights).sum() / weights.sum(), losses.mean(1)


@case(targets)
class Penalised(Deep):
    """An L2 term of parameters only, which counts once for the whole batch."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        penalty = sum((p.square().sum() for p in self.layers.parameters()), torch.zeros((), dtype=x.dtype))
        return F.mse_loss(self.head(self.hidden(x)), y) + 0.01 * penalty


@case(targets)
class PenaltyBeside(Deep):
    """The penalty is a result too, and the loss a product with it."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        penalty = self.layers[0].weight.square().mean()
        return F.mse_loss(self.head(self.hidden(x)), y) * (1 + penalty), penalty


@case(targets)
class PenaltyAlone(Deep):
    """The loss reads parameters only; the batch makes another result."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        penalty = self.layers[0].weight.square().sum() + self.head.weight.square().sum()
        return penalty, self.head(self.hidden(x)).detach() - y


# ------------------------------------------------------------------------------------------- where the batch dim goes


@case(sequences)
class FlatBatch(Deep):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        b, t, c = x.shape
        y = self.hidden(x.view(b * t, c)).view(b, t, c)
        return F.mse_loss(y.reshape(b * t, c), target.reshape(b * t, c))


@case(sequences)
class BatchSecond(Deep):
    """(T, B, C) inside, as recurrent nets and attention of old are written."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        y = x.transpose(0, 1)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        y = self.hidden(y)
        return F.mse_loss(y.transpose(0, 1), target), y


@case(lambda seed: ((numbers(seed, LENGTH, BATCH, WIDTH), numbers(seed + 1, LENGTH, BATCH, WIDTH)), {}))
class BatchSecondGiven(Deep):
    """(T, B, C) arguments; T is as long as B: which dim the batch is must be said."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.hidden(x).cumsum(0), target)


@case(lambda seed: ((tokens(seed), torch.randint(0, LENGTH, (BATCH,), generator=draws(seed + 5)), tokens(seed + 7)[:, 0] % CLASSES), {}))
class RowsByNumber(Deep):
    """Picks one token of every row by an explicit index of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)

    def forward(self, ids: Tensor, last: Tensor, y: Tensor) -> Tensor:
        x = self.hidden(self.table(ids))
        rows = torch.arange(ids.shape[0])
        some = x[rows[:, None], torch.stack([last, last * 0 - 2], 1)]
        x = x[rows, last] + x[rows, -1] + some.mean(1) * ids[rows, last - LENGTH][:, None]
        return F.cross_entropy(self.head(x), y)


@case(vectors)
class ConstantsOfTheBatch(Deep):
    """Tensors of the batch's length that are made in forward: ones, a ramp, an identity, and a random constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("per_row", numbers(3, BATCH, WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        ramp = torch.arange(x.shape[0], dtype=x.dtype) / x.shape[0]
        x = x * torch.ones(x.shape[0], 1, dtype=x.dtype) + ramp[:, None]
        x = self.hidden(x + self.per_row) * torch.linspace(0, 1, x.shape[0], dtype=x.dtype).unsqueeze(1)
        return (F.cross_entropy(self.head(x), y, reduction="none") * ramp).sum()


@case(ids_and_labels)
class PositionsForEveryRow(nn.Module):
    """Position embeddings, a class token and a mask, all expanded to the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.randn(1, LENGTH + 1, WIDTH))
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Embedding(LENGTH + 1, WIDTH)
        self.qkv = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3)])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        b, t = ids.shape
        places = torch.arange(t + 1).unsqueeze(0).expand(b, -1)
        x = torch.cat([self.first.expand(b, -1, -1), self.table(ids)], 1) + self.positions.expand(b, -1, -1) + self.places(places)
        mask = torch.full((b, 1, t + 1, t + 1), float("-inf"), dtype=x.dtype).triu(1)
        for layer in self.qkv:
            q, k, v = (part.view(b, t + 1, 2, -1).transpose(1, 2) for part in layer(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, t + 1, WIDTH)
        return F.cross_entropy(self.head(x[:, 0]), labels[:, 0].clamp(min=0) % CLASSES)


@case(targets)
class InputsOfNoMeanAndUnitVariance(Deep):
    """Arguments are standardised over the whole batch: what arguments alone make is had of all of them."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = (x - x.mean(0)) / (x.var(0) + 0.1).sqrt() / x.abs().amax()
        return F.mse_loss(self.head(self.hidden(x)), y)


@case(vectors)
class ExpandedParameter(Deep):
    """A learned query of one row stands for every row; a learned row for each of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.rows = nn.Parameter(torch.randn(1, WIDTH)), nn.Parameter(torch.randn(BATCH, WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.query.repeat(x.shape[0], 1) * self.rows
        return F.cross_entropy(self.head(self.hidden(q) * torch.sigmoid(x)), y)


@case(sequences)
class ReversedAndRolled(Deep):
    """Reorders along the sequence, splits and joins along it and along channels."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y = self.hidden(x).flip(1).roll(1, 1)
        a, b = y.chunk(2, 1)
        c, d = torch.cat([b, a], 1).split(WIDTH // 2, -1)
        return F.mse_loss(torch.stack([d, c], -1).flatten(2), target)


@case(sequences)
class Recurrent(Deep):
    """A GRU, whose first state is made of the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        state, states = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype), []
        for step in self.hidden(x).unbind(1):
            state = self.cell(step, state)
            states.append(state)
        return F.mse_loss(torch.stack(states, 1), target)


class Mixing(Deep):
    """Every row reads another's: cannot be cut in microbatches."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.how(self.hidden(x))
        return F.cross_entropy(self.head(x), y[: x.shape[0]])
