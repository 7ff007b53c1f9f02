"""Attention over split sequences: what it sends and keeps, rows of which no key is seen, precision; whole models on a split sequence.

tests/test_rules.py proves that the strategies compute what the op computes; tests/test_split_attention_processes.py runs them for real.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import GPT, SLOW, VOCAB
from torch import Tensor, nn
from torch.nn import functional as F

import autoshard
from autoshard.candidates import lowered_axes
from autoshard.costs import CostModel
from autoshard.errors import ConstraintError
from autoshard.hardware import hardware_of
from autoshard.mesh import MeshSpec
from autoshard.program import call_of, facts, op_name
from autoshard.rules import rule_of
from autoshard.runtime import Axis, Collective, split_attention
from autoshard.runtime import attention as lowering
from autoshard.simulator import SimulatedAxis
from autoshard.testing import OpCase, check_rule, difference, dual
from autoshard.traffic import meter, seconds_inside

op = torch.ops.aten.scaled_dot_product_attention.default
ALONE = (Axis("a", 1, 0, ""),)
BATCH, HEADS, LENGTH, WIDTH = 2, 4, 8, 2


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    return x(BATCH, HEADS, LENGTH, WIDTH), x(BATCH, HEADS, length, WIDTH, seed=1), x(BATCH, HEADS, length, WIDTH, seed=2)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every collective that moves data: its name and how many bytes each rank gives."""
    sent: list[tuple[str, int]] = []
    run, maximum = SimulatedAxis.run, SimulatedAxis.maximum

    def counting_run(self: SimulatedAxis, collective: Collective, values: Sequence[Tensor]) -> list[Tensor]:
        sent.append((collective.name, values[0].nbytes))
        return run(self, collective, values)

    def counting_maximum(self: SimulatedAxis, given: Any) -> Any:
        sent.append(("all_reduce", given.values[0].nbytes))
        return maximum(self, given)

    monkeypatch.setattr(SimulatedAxis, "run", counting_run)
    monkeypatch.setattr(SimulatedAxis, "maximum", counting_maximum)
    return sent


def price(case: OpCase, factors: tuple[str, ...]) -> list[tuple[str, int]]:
    """What the cost model says is sent: name, bytes that the ranks of the axis hold together."""
    candidate = next(c for c in case.candidates({}) if tuple(s.factor for s in c.strategies) == factors)
    _, node = case.program()
    axes = lowered_axes(rule_of(op_name(node)), factors, case.mesh.axes)
    return [(name, whole) for _, name, whole in meter("split_attention", call_of(node), candidate.inputs, axes, case.mesh)]


def run(case: OpCase, *factors: str) -> None:
    """Run the use with `factors` split, one per axis; values and gradients are the op's own."""
    candidate = next(c for c in case.candidates({}) if tuple(s.factor for s in c.strategies) == factors)
    found = case.run(candidate)
    assert difference(found.outputs[0], candidate.outputs[0], case.outputs[0], case.mesh) == ""
    for pieces, layout, gradient in zip(found.operands, candidate.inputs, case.gradients, strict=True):
        if gradient is not None:
            assert difference([piece.grad for piece in pieces], dual(layout), gradient, case.mesh) == ""


def case_of(mesh: str, *args: Any, **kwargs: Any) -> OpCase:
    return OpCase(op, args, kwargs, MeshSpec.of(mesh))


# ---------------------------------------------------------------------------------------------------------- what is sent


def test_split_queries_send_nothing(wire: list) -> None:
    case = case_of("a=4", *qkv(), None, 0.0, True)
    assert price(case, ("s",)) == []
    run(case, "s")
    assert wire == []


def test_split_keys_send_three_numbers_per_query(wire: list) -> None:
    """The largest and the sum of exponentials, and in backward the share of each query in its gradient."""
    case = case_of("a=4", *qkv())
    assert price(case, ("k",)) == [("all_reduce", 8 * BATCH * HEADS * LENGTH)] * 3
    run(case, "k")
    assert wire == price(case, ("k",))


@pytest.mark.parametrize("n", [2, 4])
def test_ring_sends_keys_and_values_around(n: int, wire: list) -> None:
    """n - 1 times forward; backward n - 1 times again, and their gradients n times, back to where they belong."""
    case = case_of(f"a={n}", *qkv(), None, 0.0, True)
    block = 8 * BATCH * HEADS * LENGTH * WIDTH // n
    run(case, "s&k")
    assert wire == [("rotate", block)] * (2 * (n - 1) + 2 * (n - 1) + 2 * n)
    assert price(case, ("s&k",)) == [(name, count * n) for name, count in wire]
    costs = CostModel(case.mesh, hardware_of("h100"))
    ((fixed, per_byte),) = costs.collective_terms("rotate", 0)
    assert seconds_inside(costs, [("a", "rotate", block * n)]) == fixed + block / costs.axis_rates[0] == fixed + per_byte * block * n


def test_ring_without_gradients_sends_forward_alone() -> None:
    args = tuple(nn.Buffer(each) for each in qkv())
    assert price(case_of("a=2", *args), ("q&k",)) == [("rotate", 8 * BATCH * HEADS * LENGTH * WIDTH)] * 2


# ---------------------------------------------------------------------------------------------------- what is kept and done


def attend(*args: Any, **kwargs: Any) -> Tensor:
    """The ring of one rank: the function itself, on plain tensors."""
    return split_attention(*args, query_axes=ALONE, key_axes=ALONE, **kwargs)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "row", "column"])
def test_rows_taken_a_few_at_a_time(rows: int, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few scores are in memory at a time, results and gradients are the op's, that of the mask too."""
    monkeypatch.setattr(lowering, "_MOST_SCORES", rows * BATCH * HEADS * LENGTH)
    shapes = {"float": (HEADS, LENGTH, LENGTH), "row": (BATCH, 1, 1, LENGTH), "column": (LENGTH, 1)}
    given = x(*shapes[mask], seed=3) if mask in shapes else torch.eye(LENGTH, dtype=torch.bool) if mask == "bool" else None
    gradients = []
    for function in (attend, F.scaled_dot_product_attention):
        tensors = [each.clone().requires_grad_() for each in (*qkv(), *([given] if mask in shapes else []))]
        found = function(*tensors[:3], tensors[3] if mask in shapes else given, 0.0, mask == "causal")  # type: ignore[operator]
        gradients.append([found, *torch.autograd.grad(found.square().sum(), tensors)])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_no_probabilities_are_kept() -> None:
    kept: list[int] = []
    length = 64
    tensors = [x(1, 1, length, WIDTH, seed=k).requires_grad_() for k in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        attend(*tensors, is_causal=True)
    assert sorted(kept) == sorted([length * WIDTH] * 4 + [length])


def test_blocks_that_are_masked_whole_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made, scores = [], lowering._scores
    monkeypatch.setattr(lowering, "_scores", lambda *args: made.append(args[0]) or scores(*args))
    run(case_of("a=4", *qkv(), None, 0.0, True), "s&k")
    assert len(made) == 2 * (1 + 2 + 3 + 4)  # of 2 * 16: forward and backward


@pytest.mark.parametrize("is_float", [True, False])
@pytest.mark.parametrize("mesh", ["a=2", "a=2,b=2"])
def test_rows_of_which_no_key_is_seen_are_zero(mesh: str, is_float: bool) -> None:
    """As the op makes them, whether a whole row is masked, or all keys of some ranks."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)
    mask[5], mask[6, 1:] = False, False
    given = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~mask, -torch.inf) if is_float else mask
    case = case_of(mesh, *qkv(), given)
    assert not case.outputs[0][:, :, [0, 5]].any()
    assert len(check_rule(op, *qkv(), given, mesh=mesh)) == (9 if mesh == "a=2" else 79)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_precision(dtype: torch.dtype) -> None:
    """Results have the dtype of the queries and are as near to exact ones as the op's are."""
    tensors = [each.to(dtype).requires_grad_() for each in qkv()]
    exact = F.scaled_dot_product_attention(*[each.double() for each in tensors])
    exact_gradients = torch.autograd.grad(exact.square().sum(), tensors)
    found = attend(*tensors)
    assert found.dtype == dtype
    gradients = torch.autograd.grad(found.square().sum(), tensors)
    torch.testing.assert_close(found.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(gradients, exact_gradients, rtol=0.0, atol=32 * torch.finfo(dtype).eps)


def test_autocast_computes_in_its_dtype() -> None:
    tensors = [each.float().requires_grad_() for each in qkv()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = attend(*tensors), F.scaled_dot_product_attention(*tensors)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.03)
    found.sum().backward()
    assert all(each.grad is not None and each.grad.dtype == torch.float32 for each in tensors)


def test_gradients_of_gradients_are_refused() -> None:
    tensors = [each.requires_grad_() for each in qkv()]
    (gradient,) = torch.autograd.grad(attend(*tensors).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ---------------------------------------------------------------------------------------------------------- whole models


def tokens(seed: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def gpt() -> tuple[nn.Module, dict[str, Tensor], dict[str, str]]:
    torch.manual_seed(0)
    pins = {"output:blocks*": "S(1)", "split:*.linear": "b.0", "split:*.scaled_dot_product_attention": "s&k"}
    return GPT().double(), {"ids": tokens(0, 8), "labels": tokens(1, 8)}, pins


def llama() -> tuple[nn.Module, dict[str, Tensor], dict[str, str]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": VOCAB, "max_position_embeddings": 16}
    model = LlamaForCausalLM(LlamaConfig(**heads, **sizes, use_cache=False)).double()
    pins = {"output:model.layers.0": "S(1)", "split:*.linear": "b.0"}
    return model, {"input_ids": tokens(0, 16), "labels": tokens(1, 16)}, pins


MATMULS = ("aten.linear.default", "aten.scaled_dot_product_attention.default")


@pytest.mark.parametrize("mesh", ["cp=2", "cp=4"])
@pytest.mark.parametrize("make", [gpt, llama])
@pytest.mark.parametrize("is_pinned", [False, True])
def test_context_parallel(make: Any, mesh: str, is_pinned: bool) -> None:
    """One sample: every matrix product is shared. Pinned to a split sequence, layers compute a part of the tokens each."""
    model, kwargs, pins = make()
    constraints = {"parameter:*": "I", **pins} if is_pinned else {}
    plan = autoshard.plan(model, mesh, (), kwargs, constraints=constraints, hardware=SLOW)
    split = {node.name: facts(node).strategies[0].factor for node in plan.program.nodes("op") if op_name(node) in MATMULS}
    assert all(split.values()), split
    if is_pinned:
        attention = next(factor for name, factor in split.items() if "scaled" in name)
        assert attention == ("s&k" if make is gpt else "s")
        assert {factor for name, factor in split.items() if "scaled" not in name} == {"b.0"}  # tokens
    found = autoshard.verify(model, plan, (), kwargs, tolerance=1e-9 if make is gpt else 1e-6)  # Hugging Face's loss is float32
    assert found.is_equal, str(found)


@pytest.mark.parametrize("template", ["auto", "megatron"])
def test_more_ranks_than_heads_of_keys(template: Any) -> None:
    """Four ranks, two heads of keys that the model itself repeats for its four heads of queries."""
    model, kwargs, _ = llama()
    pins = {"split:*.scaled_dot_product_attention": "b.0"}
    plan = autoshard.plan(model, "tp=4", (), kwargs, template=template, constraints=pins, hardware=SLOW)
    assert autoshard.verify(model, plan, (), kwargs, tolerance=1e-6).is_equal


@pytest.mark.parametrize(("heads", "groups", "mesh"), [(12, 2, "a=4"), (12, 3, "a=4"), (12, 2, "a=3"), (6, 3, "a=2"), (8, 2, "a=8")])
def test_heads_of_queries_that_share_keys_across_ranks(heads: int, groups: int, mesh: str) -> None:
    """Shares of heads that begin and end within groups: one group on several ranks, several groups on one, and both."""
    keys = x(1, groups, 4, 2, seed=1), x(1, groups, 4, 2, seed=2)
    for mask in (None, x(1, 1, 4, 4, seed=3), x(1, heads, 4, 4, seed=4)):
        case = case_of(mesh, x(1, heads, 4, 2), *keys, mask, 0.0, mask is None, enable_gqa=True)
        assert price(case, ("g&r",)) == []
        run(case, "g&r")


def test_split_asked_where_there_is_none() -> None:
    model, kwargs, _ = gpt()
    with pytest.raises(ConstraintError, match=r"cannot split as .* asks; by axis, it can split cp: b.0, s, k, e, s&k\."):
        autoshard.plan(model, "cp=2", (), kwargs, constraints={"split:*.scaled_dot_product_attention": "q&k"})
    with pytest.raises(ConstraintError, match=r"'split:nothing': 's' matches nothing; there are, for example, add, arange, "):
        autoshard.plan(model, "cp=2", (), kwargs, constraints={"split:nothing": "s"})


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("is_norm_first", [True, False])
def test_encoder_in_evaluation_has_no_fused_op(is_norm_first: bool, needs_grad: bool) -> None:
    """The fused layer that torch runs in evaluation is not what is traced: attention is split as in training."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True, norm_first=is_norm_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double().eval().requires_grad_(needs_grad)
    padding = torch.arange(8) >= torch.tensor([[6], [8], [3], [8]])
    inputs, kwargs = (x(4, 8, 16),), {"src_key_padding_mask": padding}
    plan = autoshard.plan(model, "tp=2", inputs, kwargs, hardware=SLOW)
    assert all("template" in note for note in plan.program.notes), "no op is computed whole for want of a rule"
    assert "aten.scaled_dot_product_attention.default" in map(op_name, plan.program.nodes("op"))
    assert autoshard.verify(model, plan, inputs, kwargs).is_equal
