"""flex_attention: its functions in ordinary ops, against scores that are computed number by number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import EXAMPLES
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import autoshard
from autoshard.errors import TraceError
from autoshard.flex_attention import flex_attention_in_ops
from autoshard.program import facts, op_name

BATCH, HEADS, LENGTH, WIDTH = 4, 4, 6, 4
compiled_flex_attention = torch.compile(flex_attention)
Score = Callable[..., Tensor]


class Attention(nn.Module):
    """Queries, keys and values of one input; tables that the functions of scores and masks read."""

    def __init__(self, score: Score | None = None, mask: Score | None = None, heads: int = HEADS, flex: Callable = flex_attention) -> None:
        super().__init__()
        self.query, self.both = nn.Linear(16, HEADS * WIDTH), nn.Linear(16, 2 * heads * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, 16)
        self.slope, self.table = nn.Parameter(torch.randn(HEADS)), nn.Parameter(torch.randn(HEADS, 2 * LENGTH))
        documents = torch.tensor([[0, 0, 1, 1, 2, 2], [0] * 6, [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
        self.register_buffer("documents", documents)
        self.score, self.mask, self.heads, self.flex = score, mask, heads, flex
        self.is_plain = False
        self.keywords: dict[str, Any] = {}

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        query = self.query(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        key, value = self.both(x).unflatten(-1, (2, self.heads, WIDTH)).permute(2, 0, 3, 1, 4)
        score = None if self.score is None else lambda s, b, h, q, k: self.score(self, s, b, h, q, k)
        mask = None if self.mask is None else lambda b, h, q, k: self.mask(self, b, h, q, k)
        if self.is_plain:
            found = plain_attention(query, key, value, score, mask)
        else:
            blocks = None if mask is None else create_block_mask(mask, BATCH, HEADS, x.shape[1], x.shape[1], device=x.device)
            found = self.flex(query, key, value, score, blocks, enable_gqa=self.heads != HEADS, **self.keywords)
        output, *others = found if isinstance(found, tuple) else (found,)
        output = self.out(output.transpose(1, 2).flatten(2))
        lse = [getattr(other, "lse", other) for other in others]
        return output, *(x.clamp(-9) for x in lse)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, score: Score | None, mask: Score | None) -> tuple[Tensor, Tensor]:
    """Every score by itself, from 0-dim tensors."""
    key, value = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-2, -1) / math.sqrt(WIDTH)
    numbers = []
    for place in itertools.product(*map(range, scores.shape)):
        at = [torch.tensor(k) for k in place]
        number = scores[place] if score is None else score(scores[place], *at)
        numbers.append(number if mask is None or mask(*at) else torch.full((), -math.inf, dtype=number.dtype))
    scores = torch.stack(numbers).reshape(scores.shape)
    is_hidden = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(is_hidden, 0.0).softmax(-1).masked_fill(is_hidden, 0.0)
    return weights @ value, scores.masked_fill(is_hidden, -20.0).logsumexp(-1)


def causal(m: Attention, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def documents(m: Attention, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (m.documents[b, q] == m.documents[b, k]) & (q >= k)


def by_head(m: Attention, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A window on some heads; the first queries see nothing at all."""
    return (q >= k) & ((h < 2) | (q - k < 2)) & (q > 1)


def alibi(m: Attention, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return s + m.slope[h] * (q - k)


def relative(m: Attention, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return s + m.table[h][q - k + LENGTH] + torch.where(b > 1, 0.5, 0)


def capped(m: Attention, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return 5 * torch.tanh(s / 5)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({"mask": causal}, {}),
    "documents": ({"mask": documents}, {}),
    "by head": ({"mask": by_head, "heads": 2}, {}),
    "alibi": ({"score": alibi, "mask": causal}, {}),
    "relative": ({"score": relative, "heads": 2}, {}),
    "capped": ({"score": capped, "mask": by_head, "flex": compiled_flex_attention}, {}),
    "statistics": ({"score": alibi, "mask": by_head}, {"return_aux": AuxRequest(lse=True)}),
    "statistics of a mask": ({"mask": causal, "heads": 2}, {"return_lse": True}),
}


def attention(name: str) -> Attention:
    torch.manual_seed(0)
    model = Attention(**CASES[name][0]).double()
    model.keywords = CASES[name][1]
    return model


def rows() -> tuple[Tensor]:
    return (torch.randn(BATCH, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),)


@pytest.mark.filterwarnings("ignore:return_lse is deprecated")
@pytest.mark.parametrize("name", CASES)
def test_plans_compute_what_plain_attention_computes(name: str) -> None:
    model, plain = attention(name), attention(name)
    plain.is_plain = True
    expected = plain(*rows())
    kinds: list[tuple[str, dict]] = [("dp=2", {"template": "fsdp"}), ("dp=2,tp=2", {"template": "megatron"})]
    kinds += [("a=2", {"options": autoshard.Options(seed=0)})]
    cotangents = [torch.randn_like(y) for y in expected]
    plans = [autoshard.plan(model, mesh, rows(), **keywords) for mesh, keywords in kinds]
    simulations = [autoshard.simulate(plan, model, rows()) for plan in plans]
    torch.autograd.backward(expected[: len(simulations[0].outputs)], cotangents[: len(simulations[0].outputs)])
    for simulation in simulations:
        simulation.backward(cotangents[: len(simulation.outputs)])
        for wanted, found in zip(expected, simulation.outputs, strict=False):
            for value in found.values:
                torch.testing.assert_close(value, wanted.clamp(-9) if wanted.dim() == 3 and wanted.shape[1] == HEADS else wanted)
        for key, parameter in plain.named_parameters():
            gradient = simulation.gradient(key)
            assert (gradient is None) == (parameter.grad is None), key
            if gradient is not None:
                torch.testing.assert_close(gradient, parameter.grad, msg=lambda text, key=key: f"{key}: {text}")


def test_heads_and_batches_are_split() -> None:
    for name in ("alibi",):
        plan = autoshard.plan(attention(name), "dp=2,tp=2", rows(), template="megatron")
        heavy = [n for n in plan.program.nodes("op") if op_name(n) in ("aten.matmul.default", "aten.scaled_dot_product_attention.default")]
        assert heavy
        layouts = [[str(p) for p in facts(node).layout] for node in heavy]
        assert all(layout[1] == "S(1)" for layout in layouts)
        assert ["S(0)", "S(1)"] in layouts


def test_what_the_user_is_told() -> None:
    (note,) = [note for note in autoshard.plan(attention("alibi"), "dp=2", rows()).notes if "flex" in note]
    size = BATCH * HEADS * LENGTH * LENGTH
    assert "test_flex_attention.py:" in note
    assert f"dense scores, which take {size * 8 / 1000:.1f} kB on one device" in note
    model = attention("by head")
    model.keywords = {"kernel_options": {"BLOCK_M": 32}}
    (note,) = [note for note in autoshard.plan(model, "dp=2", rows()).notes if "flex" in note]
    assert f"its mask takes up to {size} B where it is not causal; its kernel options are ignored" in note


def test_a_causal_mask_is_the_flag_of_fused_kernels() -> None:
    plan = autoshard.plan(attention("causal"), "dp=2", rows())
    (node,) = [n for n in plan.program.nodes("op") if op_name(n) == "aten.scaled_dot_product_attention.default"]
    assert node.kwargs["is_causal"]
    model = attention("causal")  # as libraries write it: a function of scores that changes nothing
    model.score = lambda m, s, b, h, q, k: s
    assert "is_causal=True" in autoshard.plan(model, "dp=2", rows()).source()


def test_the_model_itself_is_left_as_it_was() -> None:
    """Forward, torch's own flex_attention computes the same; on CPUs it has no backward."""
    model = attention("relative")
    with torch.no_grad(), pytest.warns(UserWarning, match="without torch.compile"):
        wanted = model(*rows())
    before = flex_attention.__code__, flex_attention.__defaults__, flex_attention.__kwdefaults__, create_block_mask.__code__
    with flex_attention_in_ops(), flex_attention_in_ops():
        found = model(*rows())
    assert before == (flex_attention.__code__, flex_attention.__defaults__, flex_attention.__kwdefaults__, create_block_mask.__code__)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        model(*rows())
    assert autoshard.verify(model, autoshard.plan(model, "dp=2", rows(), template="fsdp"), rows()).is_equal


def test_masks_are_no_arguments() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, mask: Any) -> Tensor:
            return flex_attention(x, x, x, block_mask=mask)  # type: ignore[return-value]

    x = torch.randn(2, 2, 128, 16)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu")
    with pytest.raises(TraceError, match=r"a BlockMask is an argument .* call create_block_mask in forward"):
        autoshard.plan(Given(), "dp=2", (x, mask))


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask", "ignore:torch.compile is ignored")
def test_transformers() -> None:
    model, (args, kwargs) = EXAMPLES["hf_llama"].model(), EXAMPLES["hf_llama"].batch(0)
    model.set_attn_implementation("flex_attention")
    plan = autoshard.plan(model, "dp=2", args, kwargs, template="megatron")
    assert any("flex_attention" in note and "scaled_dot_product_attention computes it" in note for note in plan.notes)
    assert "is_causal=True" in plan.source()
    found = autoshard.simulate(plan, model, args, kwargs).outputs[0].values[0]
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, model(*args, **kwargs).loss)
