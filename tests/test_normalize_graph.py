"""normalize_graph: in-place ops and no-grad regions. What is accepted trains as on one device; the rest is refused.

An in-place op that the pass understands wrongly gives wrong numbers without any error, so every kind of sharing between
the written tensor and another one that is read later stands here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_properties import Written, rows
from torch.nn import functional as F
from training_oracle import Case

from autoshard.errors import TraceError


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
)


@pytest.mark.parametrize("function", ACCEPTED, ids=lambda f: f.__name__)
def test_in_place_ops_become_functional(function: Any) -> None:
    case = Case.of(Written(function), rows())
    for seed, mesh in enumerate(("a=2", "a=2,b=2", "a=2", "a=2,b=3")):
        case.prove(case.plan(mesh, seed, is_scattered=seed > 1), is_text=seed % 2 == 0)


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


def what_a_region_views(m, x):
    y = x @ m.w
    with torch.no_grad():
        y.view(-1).mul_(0.0)
    return y


def the_whole_of_a_piece_in_a_region(m, x):
    with torch.no_grad():
        y = x @ m.w
        a, b = y.chunk(2, -1)
        a.add_(1.0)
        z = torch.cat([a, b], -1) + y
    return z * m.u


READ_LATER = (
    the_base_of_a_view,
    the_view_of_a_base,
    the_base_of_a_slice,
    the_base_of_an_expanded_value,
    the_operand_of_a_dropout_that_drops_nothing,
    the_base_of_a_view_in_a_region,
    what_a_region_views,
    the_whole_of_a_piece_in_a_region,
)


@pytest.mark.parametrize("function", READ_LATER, ids=lambda f: f.__name__)
def test_writes_into_memory_that_is_read_later_are_refused(function: Any) -> None:
    with pytest.raises(TraceError, match=r"writes into memory that \w+ reads later, at .*; write the model without this in-place op"):
        Case.of(Written(function), rows())


def a_parameter(m, x):
    with torch.no_grad():
        m.w.clamp_(-1, 1)
    return x @ m.w


def a_value_with_a_gradient(m, x):
    y = x @ m.w
    with torch.no_grad():
        y.mul_(2.0)
    return y


def an_argument(m, x):
    x.add_(1.0)
    return x @ m.w


def a_part_of_a_buffer(m, x):
    m.n.view(2, 3).add_(1.0)
    return x @ m.w


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (a_parameter, "writes into the parameter w"),
        (a_value_with_a_gradient, "changes, without gradient, a value that has one"),
        (an_argument, "writes into the argument x"),
        (a_part_of_a_buffer, "writes into a part of the buffer n"),
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
