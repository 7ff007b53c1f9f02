"""The report before any search: what can be split, what every rank would compute whole, why, at what cost, and where."""

import pytest
import torch
from models import EXAMPLES
from torch import Tensor, nn

import autoshard


class Odd(nn.Module):
    """One op without a row, and sizes of which none divides."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.linalg.matrix_exp(x.reshape(1, 1, 5, 5))
        return self.proj(y).sum()


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_op_of_the_examples_can_be_split(name: str) -> None:
    example = EXAMPLES[name]
    args, kwargs = example.batch(0)
    found = autoshard.coverage(example.model(), "dp=2,tp=2", args, kwargs)
    assert found.fallbacks == (), str(found)
    assert found.split_share == 1.0


def test_fallbacks_name_the_op_the_reason_the_cost_and_the_line() -> None:
    found = autoshard.coverage(Odd(), "dp=2,tp=2", (torch.randn(1, 25),))
    assert found.counts == {"split": 0, "whole": 3, "unknown": 1}
    by_op = {row.op: row for row in found.fallbacks}
    exp, linear = by_op["aten.linalg_matrix_exp.default"], by_op["aten.linear.default"]
    assert (exp.kind, exp.reason, exp.uses) == ("unknown", "no row", 1)
    assert exp.source.text == "y = torch.linalg.matrix_exp(x.reshape(1, 1, 5, 5))"
    assert exp.extra_bytes == 25 * 4 * 3 / 4
    assert linear.kind == "whole"
    assert linear.reason == "no size divides (b.0 of 5, i of 5, o of 5)"
    assert linear.source.module == "proj"
    assert linear.extra_s == pytest.approx(linear.seconds * 3 / 4)
    first, *lines = str(found).splitlines()
    assert first == "Odd on mesh dp=2,tp=2: 4 ops; 0 can be split (0.0% of the predicted time), 3 only whole, 1 unknown"
    assert [line.split()[0] for line in lines] == ["op", *(row.op for row in found.fallbacks)]


def test_an_axis_that_divides_is_enough() -> None:
    found = autoshard.coverage(Odd(), "a=2,b=5", (torch.randn(1, 25),))
    assert found.counts["split"] == 3, str(found)
