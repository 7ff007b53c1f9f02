"""normalize_graph: in-place ops and no-grad regions. What is accepted trains as on one device; the rest is refused.

An in-place op that the pass understands wrongly gives wrong numbers without any error, so every kind of sharing between
the written tensor and another one that is read later stands here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import SLOW
from test_properties import Written, rows
from torch import Tensor, fx, nn
from torch.nn import functional as F
from training_oracle import Case

import autoshard
from autoshard.errors import TraceError
from autoshard.mesh import MeshSpec
from autoshard.passes import NormalizeGraph, TraceModel
from autoshard.program import Program


def a_buffer_is_written_twice(m, x):
    m.n.mul_(0.9)
    m.n.add_(x.detach().mean(0))
    return x @ m.w + m.n


def writes_to_a_buffer_chain(m, x):
    m.n.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return x @ m.w


def a_buffer_is_written_through_a_name(m, x):
    n = m.n
    n += 1.0
    n *= 2.0
    return x @ m.w


def a_buffer_is_written_without_gradient(m, x):
    with torch.no_grad():
        m.n.mul_(0.9).add_(x.mean(0))
    return x @ m.w


def a_buffer_is_written_without_gradient_then_read(m, x):
    with torch.no_grad():
        m.n.mul_(0.9)
        m.n.add_(x.mean(0))
    return x @ m.w + m.n


def a_buffer_is_copied_into(m, x):
    with torch.no_grad():
        t = m.n * 0.9 + x.mean(0)
        m.n.copy_(t)
    return x @ m.w + m.n


def a_counter_counts(m, x):
    m.c += 1
    return (x @ m.w) * m.c


def a_region_writes_its_own_values(m, x):
    with torch.no_grad():
        a = m.n + 1
        a.mul_(2.0)
        b = a.clone()
        a.add_(5.0)
    return (x @ m.w) * a + b


def a_region_reads_what_has_a_gradient(m, x):
    y = x @ m.w
    with torch.no_grad():
        z, u, k = y * 2, m.w.sum(), y.view(-1)
    return y * z + u, k * k


def a_region_has_an_op_of_several_results(m, x):
    with torch.no_grad():
        top, _ = (x @ m.w).max(1)
    return (x @ m.w) + top[:, None]


def ops_write_to_their_operand(m, x):
    y = x @ m.w
    y *= m.u
    y = y + 1
    y -= x
    y += y
    return y


def a_view_is_written_and_only_it_is_read(m, x):
    y = (x @ m.w)[:, :3]
    y.mul_(2.0)
    return y, y.t()


def a_view_is_made_after_the_write(m, x):
    y = (x @ m.w) * 1.5
    y.mul_(0.5)
    return y.t() + y.t(), y.view(-1)


def the_base_of_a_view(m, x):
    y = x @ m.w
    y.view(-1).add_(1.0)
    return y


def the_view_of_a_base(m, x):
    y = x @ m.w
    z = y.t()
    y.mul_(2.0)
    return z


def the_base_of_a_slice(m, x):
    y = x @ m.w
    y[:, 0] = 0.0
    return y


def the_base_of_an_expanded_value(m, x):
    y = x @ m.w
    z = y.expand(2, 4, 6)
    y.add_(1.0)
    return z


def the_operand_of_a_dropout_that_drops_nothing(m, x):
    y = x @ m.w
    z = F.dropout(y, 0.0, m.training)
    z.mul_(2.0)
    return y


def the_base_of_a_view_in_a_region(m, x):
    with torch.no_grad():
        y = x @ m.w
        y.view(-1).mul_(0.0)
        z = y + 0.0
    return z + m.u


def the_whole_of_a_piece_in_a_region(m, x):
    with torch.no_grad():
        y = x @ m.w
        a, b = y.chunk(2, -1)
        a.add_(1.0)
        z = torch.cat([a, b], -1) + y
    return z * m.u


def a_part_of_a_buffer(m, x):
    m.n.view(2, 3).add_(1.0)
    return x @ m.w


def a_range_is_added_to(m, x):
    y = x @ m.w
    y[:, 1:3] += 1
    y[1:, 2:] *= x[1:, 2:]
    return y


def a_row_and_a_column_are_set(m, x):
    y = x @ m.w
    y[0] = m.u
    y[:, 0] = x[:, 1] * 2
    y[..., -1] = 3.0
    return y * y


def values_are_shifted_right(m, x):
    y = x @ m.w
    z = y.new_zeros(y.shape)
    z[:, 1:] = y[:, :-1].clone()
    z[:, 0] = 1.0
    return z.masked_fill_(z > 1.0, 0.5)


def views_of_views_are_written(m, x):
    y = x @ m.w
    v = y.t()[1:].unsqueeze(0)
    v[0, 1:3].mul_(2.0)
    v.squeeze(0)[:, 0] = 0.0
    return y, v


def stale_views_of_every_kind_are_read(m, x):
    y = (x @ m.w).view(2, 2, 6)
    p, d, e, f = y.permute(2, 0, 1), y.diagonal(0, 0, 1), y.flatten(1), y[0]
    y.add_(1.0)
    f.mul_(m.u)
    p[0] = 0.0
    return p + 0, d * 2, e.sum(0), f, y


def a_diagonal_is_written(m, x):
    y = (x @ m.w).view(2, 2, 6)
    y.diagonal(0, 0, 1).add_(x.view(2, 2, 6)[0, 0].unsqueeze(-1))
    y.permute(2, 0, 1)[0].fill_(1.0)
    return y


def a_reshape_that_copies_is_written(m, x):
    y = x @ m.w
    z = y.t().reshape(-1)
    z.add_(1.0)
    return y * z.view(6, 4).t()


def index_writes(m, x):
    y = x @ m.w
    rows = torch.tensor([2, 0])
    y[rows] = x[:2]
    y.index_add_(1, torch.tensor([1, 1, 4]), x[:, :3])
    y.index_fill_(0, torch.tensor([3]), 0.5)
    y.index_copy_(1, torch.tensor([5]), x[:, :1])
    y.scatter_(1, torch.zeros(4, 1, dtype=torch.int64), 2.0).scatter_add_(0, torch.ones(2, 6, dtype=torch.int64), x[:2])
    y[x > 1.0] = 0.0
    return y


def a_range_of_rows_of_a_range_takes_an_index_write(m, x):
    y = x @ m.w
    y[1:, 1:].index_put_((torch.tensor([0, 1]),), x[0, :5], accumulate=True)
    y[:, ::2].masked_fill_(x[:, ::2] > 0, 0.25)
    return y


def integers_and_masks_are_written(m, x):
    n = torch.zeros(4, 6, dtype=torch.int64)
    n[1:, 0] = 3
    n[0].fill_(1)
    k = torch.ones(4, 6, dtype=torch.bool)
    k[:, 2:4] = False
    return (x @ m.w) * n * k


def another_dtype_and_a_broadcast_are_copied(m, x):
    y = x @ m.w
    y[1:] = torch.arange(6)
    y[:, 2].copy_(torch.tensor(2.0, dtype=torch.float32))
    return y * x


def pieces_are_written_without_gradient(m, x):
    with torch.no_grad():
        y = x @ m.w
        first, second, *_ = y.unbind(1)
        left, right = y.split([2, 4], 1)
        second.mul_(2.0)
        right[:, 1] += first
        left.zero_()
        z = y + 0.0
    return z * m.u, (x @ m.w) * right.sum()


def a_part_of_a_buffer_and_a_view_of_it(m, x):
    v = m.n.view(2, 3)
    m.n[1:3] += 1.0
    v[1] *= 2.0
    return (x @ m.w) * m.n + v.sum()


ACCEPTED = (
    a_buffer_is_written_twice,
    writes_to_a_buffer_chain,
    a_buffer_is_written_through_a_name,
    a_buffer_is_written_without_gradient,
    a_buffer_is_written_without_gradient_then_read,
    a_buffer_is_copied_into,
    a_counter_counts,
    a_region_writes_its_own_values,
    a_region_reads_what_has_a_gradient,
    a_region_has_an_op_of_several_results,
    ops_write_to_their_operand,
    a_view_is_written_and_only_it_is_read,
    a_view_is_made_after_the_write,
    a_range_is_added_to,
    a_row_and_a_column_are_set,
    values_are_shifted_right,
    views_of_views_are_written,
    stale_views_of_every_kind_are_read,
    a_diagonal_is_written,
    a_reshape_that_copies_is_written,
    index_writes,
    a_range_of_rows_of_a_range_takes_an_index_write,
    integers_and_masks_are_written,
    another_dtype_and_a_broadcast_are_copied,
    pieces_are_written_without_gradient,
    a_part_of_a_buffer_and_a_view_of_it,
    the_base_of_a_view,
    the_view_of_a_base,
    the_base_of_a_slice,
    the_base_of_an_expanded_value,
    the_operand_of_a_dropout_that_drops_nothing,
    the_base_of_a_view_in_a_region,
    the_whole_of_a_piece_in_a_region,
    a_part_of_a_buffer,
)


@pytest.mark.parametrize("function", ACCEPTED, ids=lambda f: f.__name__)
def test_in_place_ops_become_functional(function: Any) -> None:
    case = Case.of(Written(function), rows())
    for seed, mesh in enumerate(("a=2", "a=2,b=2", "a=2", "a=2,b=3")):
        case.prove(case.plan(mesh, seed, is_scattered=seed > 1), is_text=seed % 2 == 0)


def a_parameter(m, x):
    with torch.no_grad():
        m.w.clamp_(-1, 1)
    return x @ m.w


def a_value_with_a_gradient(m, x):
    y = x @ m.w
    with torch.no_grad():
        y.mul_(2.0)
    return y


def an_expanded_value(m, x):
    y = torch.zeros(6, dtype=x.dtype)
    z = y.expand(4, 6)
    z[:, 0].fill_(1.0)
    return (x @ m.w) * y


def a_view_made_without_gradient(m, x):
    y = x @ m.w
    with torch.no_grad():
        v = y.view(-1)
    y.add_(1.0)
    return y, v


def an_argument(m, x):
    x.add_(1.0)
    return x @ m.w


def what_a_region_views(m, x):
    y = x @ m.w
    with torch.no_grad():
        y.view(-1).mul_(0.0)
    return y


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (a_parameter, "writes into the parameter w"),
        (a_value_with_a_gradient, "changes, without gradient, a value that has one"),
        (an_argument, "writes into the argument x"),
        (what_a_region_views, "changes, without gradient, a value that has one"),
        (an_expanded_value, "writes into memory that \\w+ reads later"),
        (a_view_made_without_gradient, "views, without gradient, memory with a gradient that is written later"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_writes_are_refused(function: Any, text: str) -> None:
    with pytest.raises(TraceError, match=text):
        Case.of(Written(function), rows())


def test_names_do_not_hide_what_the_text_calls() -> None:
    """An op of the model itself is named after the op: `embedding`, `mean`; an argument may be called like a mesh axis."""

    class Shadows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(12, 4, dtype=torch.float64))

        def forward(self, a: torch.Tensor, vary: torch.Tensor, aten: torch.Tensor) -> torch.Tensor:
            return (F.embedding(a, self.table) * vary * aten).mean((0, 1)).mean()

    given = {"a": torch.randint(12, (4, 4)), "vary": torch.randn(4, 4, 4, dtype=torch.float64), "aten": torch.randn(4, dtype=torch.float64)}
    case = Case.of(Shadows(), given, "a=2")
    for seed in range(8):
        case.prove(case.plan("a=2", seed), is_text=True)


def t5() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(T5Config(**sizes, use_cache=False, decoder_start_token_id=0))
    return model, {"input_ids": torch.randint(2, 32, (4, 8)), "labels": torch.randint(2, 32, (4, 6))}


def bart() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import BartConfig, BartForConditionalGeneration

    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"vocab_size": 32, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 16}
    model = BartForConditionalGeneration(BartConfig(**layers, **sizes, dropout=0.0, use_cache=False, pad_token_id=1))
    labels = torch.randint(3, 32, (4, 6))
    labels[:, 4:] = -100
    return model, {"input_ids": torch.randint(3, 32, (4, 8)), "labels": labels}


def whisper() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"vocab_size": 32, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    lengths = {"max_source_positions": 8, "max_target_positions": 16}
    model = WhisperForConditionalGeneration(WhisperConfig(**layers, **sizes, **special, **lengths, dropout=0.0, use_cache=False))
    return model, {"input_features": torch.randn(4, 4, 16, dtype=torch.float64), "labels": torch.randint(4, 32, (4, 6))}


@pytest.mark.parametrize("make", [t5, bart, whisper], ids=lambda make: make.__name__)
def test_labels_that_a_model_shifts_right_in_place(make: Any) -> None:
    torch.manual_seed(0)
    model, given = make()
    model = model.double()
    for seed in (None, 3):
        plan = autoshard.plan(model, "a=2", (), given, hardware=SLOW, options=autoshard.Options(seed=seed))
        assert autoshard.verify(model, plan, (), given).is_equal


class Made(nn.Module):
    """Tensors that take the dtype and device of another, and nothing else of it."""

    def forward(self, x: Tensor) -> Tensor:
        made = x.new_zeros(4, 2) + x.new_ones((4, 2)) + x.new_full((4, 2), 0.5)
        filled = x.new_empty(4, 2)
        filled.fill_(2.0)
        return (made + filled).sum() * x.sum()


def test_what_is_made_like_a_tensor_does_not_read_it() -> None:
    program = NormalizeGraph()(TraceModel(Made(), (torch.randn(4, 6),))(Program(fx.Graph(), MeshSpec.of("a=2"))))
    makers = [node for node in program.nodes("op") if not node.all_input_nodes]
    assert {str(node.target) for node in makers} >= {"aten.zeros.default", "aten.ones.default", "aten.full.default"}
    assert not any("new_" in str(node.target) for node in program.graph.nodes)
    plan = autoshard.plan(Made().double(), "a=2", (torch.randn(4, 6, dtype=torch.float64),), template="ddp")
    assert not plan.notes, plan.notes
    assert autoshard.verify(Made().double(), plan, (torch.randn(4, 6, dtype=torch.float64),)).is_equal
