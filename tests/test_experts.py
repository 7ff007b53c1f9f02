"""Mixtures of experts: recognised as Hugging Face writes them, dispatched densely, and trained with tokens and experts on one axis."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.moe as hf_moe
from models import SLOW
from processes import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from training_oracle import Case
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import autoshard
from autoshard.ops import RULES
from autoshard.ops.row import Call
from autoshard.program import Program, facts
from autoshard.runtime import expert_dispatch
from autoshard.traffic import sent_inside

_SIZES = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1, "vocab_size": 32}
_SIZES |= {"max_position_embeddings": 16, "intermediate_size": 8, "num_experts_per_tok": 2, "use_cache": False}
_RANKS = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
_GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0}
FAMILIES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, moe_intermediate_size=8, num_experts=4, head_dim=4)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**_SIZES, num_experts=4, pad_token_id=0, eos_token_id=1)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**_SIZES, **_RANKS, **_GROUPS, moe_intermediate_size=8)),
}


@pytest.fixture(autouse=True)
def _double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's grouped product takes no float64; the fallback, which is what traces hold, does."""
    monkeypatch.setattr(hf_moe, "_can_use_grouped_mm", lambda *args: False)


def mixtures(program: Program) -> list[tuple[str, ...]]:
    """What every mixture of a program splits, per axis."""
    nodes = [node for node in program.nodes("op") if getattr(node.target, "__name__", "") == "experts"]
    return [tuple(strategy.factor for strategy in facts(node).strategies) for node in nodes]


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(seed))


def routed(tokens: int, choices: int = 2, experts: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Hidden states, distinct experts and weights for every token."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    weights, index = scores.topk(choices, -1)
    hidden = torch.randn(tokens, 16, generator=generator, dtype=torch.float64)
    return {"hidden_states": hidden.requires_grad_(), "top_k_index": index, "top_k_weights": weights.requires_grad_()}


def hf_experts(activation: str = "silu") -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(**_SIZES, num_local_experts=4, hidden_act=activation, experts_implementation="grouped_mm")
    module = MixtralExperts(config).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def allow_only(*factors: str) -> None:
    """Forbid every other split of a mixture, so that plans show these ones."""
    rule = RULES["experts"]

    def narrowed(call: Call) -> Any:
        text, sizes, limits = rule.equation(call)  # type: ignore[operator]
        return text, sizes, {**dict.fromkeys(("t", "e", "f", "o", "t&e"), 1), **limits, **dict.fromkeys(factors, 8)}

    RULES["experts"] = dataclasses.replace(rule, equation=narrowed)


@pytest.fixture(autouse=True)
def _every_split() -> Iterator[None]:
    rule = RULES["experts"]
    yield
    RULES["experts"] = rule


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_mixture_is_recognised_and_equal(activation: str) -> None:
    """Results, and the gradients of hidden states, router weights and both expert weights, in float64 under random plans."""
    case = Case.of(hf_experts(activation), routed(8))
    assert mixtures(case.traced) == [()]
    for seed in range(3):
        case.prove(case.plan("a=2,b=2", seed, is_scattered=seed == 2), is_text=seed == 0)


@pytest.mark.parametrize(
    ("factors", "mesh"), [("t&e", "a=2"), ("t&e", "a=4"), ("t&e", "a=2,b=2"), ("t&e e", "a=2,b=2"), ("t&e t f", "a=2,b=2")]
)
def test_tokens_travel_to_their_experts(factors: str, mesh: str) -> None:
    """Tokens and experts share an axis: alone, on two axes, and beside a split that needs no exchange."""
    case = Case.of(hf_experts(), routed(8))
    allow_only(*factors.split())
    plans = (case.plan(mesh, seed, is_scattered=True) for seed in range(60))
    exchanging = list(itertools.islice((plan for plan in plans if "t&e" in mixtures(plan)[0]), 3))
    assert len(exchanging) == 3
    for plan in exchanging:
        case.prove(plan)


def test_experts_that_no_token_chooses() -> None:
    given = routed(8)
    given["top_k_index"] = torch.tensor([[0, 1]]).expand(8, 2).contiguous()
    case = Case.of(hf_experts(), given)
    for seed in range(8):
        case.prove(case.plan("a=2,b=2", seed))


class OtherActivation(nn.Module):
    """A mixture whose gate is no function that autoshard knows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = hf_experts()
        self.experts.act_fn = nn.Tanh()

    def forward(self, **given: Tensor) -> Tensor:
        return self.experts(**given)


def test_a_mixture_that_differs_is_left_as_it_is() -> None:
    case = Case.of(OtherActivation(), routed(8))
    assert mixtures(case.traced) == []
    assert any("is not written as autoshard knows it" in note for note in case.traced.notes)
    for seed in range(4):
        case.prove(case.plan("a=2", seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_families(family: str) -> None:
    torch.manual_seed(0)
    model, given = FAMILIES[family]().double(), {"input_ids": tokens(), "labels": tokens(1)}
    plan = autoshard.plan(model, "ep=2", (), given, hardware=SLOW, constraints={"parameter:*experts*": "S(0)@ep"})
    assert len(mixtures(plan.program)) == 1
    assert autoshard.verify(model, plan, (), given).is_equal


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_hugging_face_families_on_two_axes(family: str) -> None:
    torch.manual_seed(0)
    model, given = FAMILIES[family]().double(), {"input_ids": tokens(), "labels": tokens(1)}
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        for seed in (None, 1, 2):
            plan = autoshard.plan(model, "dp=2,ep=2", (), given, hardware=SLOW, options=autoshard.Options(seed=seed))
            assert len(mixtures(plan.program)) == 1
            assert autoshard.verify(model, plan, (), given).is_equal


def test_large_experts_stay_where_they_are() -> None:
    """Tokens travel, weights do not, when that is less: one pair of all-to-alls of rows each way in place of gathered weights."""
    wide = {**_SIZES, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 1024, "max_position_embeddings": 2048}
    wide |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**wide, num_local_experts=8))
    ids = torch.zeros(8, 2048, dtype=torch.int64)
    plan = autoshard.plan(model, "ep=8", (), {"input_ids": ids, "labels": ids}, hardware="h100")
    assert mixtures(plan.program) == [("t&e",)]
    node = next(node for node in plan.program.nodes("op") if getattr(node.target, "__name__", "") == "experts")
    rows = 8 * 2048 * 2 * 512 * 4  # tokens, choices, width, bytes
    assert [sent for _, name, sent in sent_inside(plan.program, node) if name == "all_to_all" and sent > 10_000] == [rows] * 4


class DenseDispatch(nn.Module):
    """GShard: a one-hot dispatch mask with a capacity per expert and group, batched expert weights, a weighted combination."""

    def __init__(self, experts: int = 4, width: int = 8, inner: int = 8, capacity: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, inner))
        self.down = nn.Parameter(torch.randn(experts, inner, width))
        self.capacity = capacity

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        chosen = F.one_hot(gates.argmax(-1), self.up.shape[0])
        place = (chosen.cumsum(1) - 1) * chosen
        slots = F.one_hot(place.clamp(max=self.capacity - 1), self.capacity) * ((place < self.capacity) * chosen).unsqueeze(-1)
        combine = gates.unsqueeze(-1) * slots
        sent = torch.einsum("gsec,gsh->egch", slots.to(x.dtype), x)
        y = torch.einsum("egcf,efh->egch", F.relu(torch.einsum("egch,ehf->egcf", sent, self.up)), self.down)
        return torch.einsum("gsec,egch->gsh", combine, y)


class EveryExpert(nn.Module):
    """Every expert on every token, weighted: batched weights and `bmm`."""

    def __init__(self, experts: int = 4, width: int = 8, inner: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, inner))
        self.down = nn.Parameter(torch.randn(experts, inner, width))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        y = torch.bmm(F.relu(torch.bmm(flat.expand(self.up.shape[0], *flat.shape), self.up)), self.down)
        return (y * self.router(flat).softmax(-1).t().unsqueeze(-1)).sum(0).view(x.shape)


@pytest.mark.parametrize("make", [DenseDispatch, EveryExpert])
def test_dense_mixtures_split_their_experts(make: Any) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(4, 8, 8, dtype=torch.float64)
    pins = {"parameter:up": "S(0)@ep", "parameter:down": "S(0)@ep"}
    plan = autoshard.plan(model, "ep=2", (x,), hardware=SLOW, constraints=pins)
    products = [node for node in plan.program.nodes("op") if str(node.target) in ("aten.einsum.default", "aten.bmm.default")]
    assert any(strategy.factor in ("e", "b") for node in products for strategy in facts(node).strategies)
    assert autoshard.verify(model, plan, (x,)).is_equal
    case = Case.of(model, {"x": x})
    for seed, mesh in enumerate(["a=2", "a=2,b=2", "a=2,b=2"]):
        case.prove(case.plan(mesh, seed), is_text=seed == 0)


def train(families: list[str]) -> list[tuple[tuple[str, ...], float]]:
    """On this rank, for every family: what its mixture splits, and how far two steps are from one process's."""
    hf_moe._can_use_grouped_mm = lambda *args: False
    allow_only("t&e")
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), []
    for family in families:
        torch.manual_seed(0)
        model = FAMILIES[family]().double()
        reference = copy.deepcopy(model)
        compiled = autoshard.compile(model, mesh, example_kwargs={"input_ids": tokens(), "labels": tokens(1)}, hardware=SLOW)
        for each in (compiled, reference):
            optimizer = torch.optim.SGD(each.parameters(), 0.1)
            for step in range(2):
                each(input_ids=tokens(step), labels=tokens(step + 9)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        pairs = zip(compiled.parameters(), reference.parameters(), strict=True)
        far = max(float((mine.full_tensor() - theirs).abs().max()) for mine, theirs in pairs)
        found.append((mixtures(compiled.plan.program)[0], far))
    return found


def test_two_processes_exchange_tokens() -> None:
    """Training through compile(), tokens and experts on one axis."""
    for rank in run_on_ranks(2, train, ["mixtral", "qwen3_moe"]):
        assert [factors for factors, _ in rank] == [("t&e",)] * 2
        assert max(far for _, far in rank) <= 1e-5


def test_plan_of_a_mixture_is_saved_and_loaded(tmp_path: Path) -> None:
    allow_only("t&e")
    torch.manual_seed(0)
    model, given = FAMILIES["mixtral"]().double(), {"input_ids": tokens(), "labels": tokens(1)}
    autoshard.plan(model, "ep=2", (), given, hardware=SLOW).save(tmp_path / "plan.json")
    loaded = autoshard.Plan.load(tmp_path / "plan.json")
    assert mixtures(loaded.program) == [("t&e",)]
    assert autoshard.verify(model, loaded, (), given).is_equal


def test_grouped_products_in_bfloat16() -> None:
    """torch's own kernel, forward and backward, with an expert that gets no row."""
    torch.manual_seed(0)
    ends, results = torch.tensor([3, 3, 10]), []
    x, weight, seed = torch.randn(10, 16), torch.randn(3, 24, 16), torch.randn(10, 24).bfloat16()
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (x, weight)]
        y = expert_dispatch._grouped(*leaves, ends)
        (y * seed.to(dtype)).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for low, high in zip(*results, strict=True):
        torch.testing.assert_close(low.double(), high, rtol=2e-2, atol=5e-2)
