"""Random ops switched off: a plan of a model that draws any agrees with its trace on one device, and what it computes still counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoshard


def drops_paths(x: Tensor) -> Tensor:
    return x * torch.empty(x.shape[0], 1, dtype=x.dtype).bernoulli_(0.9) / 0.9


def adds_gumbel(x: Tensor) -> Tensor:
    return F.gumbel_softmax(x, dim=-1)


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "feature_dropout": lambda x: F.dropout1d(x, 0.5),
    "rand_like": lambda x: x + torch.rand_like(x),
    "randn_like": lambda x: x * torch.randn_like(x),
    "randint_like": lambda x: x + torch.randint_like(x, 2, 9),
    "randn": lambda x: x + torch.randn(4, 8, dtype=x.dtype),
    "rand": lambda x: x * (torch.rand(4, 1, dtype=x.dtype) + 0.9).floor(),
    "randperm": lambda x: x[torch.randperm(4)],
    "bernoulli of numbers": lambda x: x * torch.bernoulli(x.detach().sigmoid()),
    "multinomial": lambda x: x.gather(1, torch.multinomial(x.detach().exp(), 2)).repeat(1, 4),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "drop path": drops_paths,
    "gumbel": adds_gumbel,
    "uniform_": lambda x: x + torch.empty_like(x).uniform_(-1, 1),
    "normal_": lambda x: x + torch.empty_like(x).normal_(),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(4, 2, 2, 2)] * 3, dropout_p=0.5).reshape(4, 8),
}


class Draws(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.draw, self.last = nn.Linear(8, 8, dtype=torch.float64), draw, nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.draw(self.first(x)))


@pytest.mark.parametrize("name", DRAWS)
def test_a_model_that_draws(name: str) -> None:
    torch.manual_seed(0)
    model, given = Draws(DRAWS[name]), (torch.randn(4, 8, dtype=torch.float64),)
    for seed in (None, 0, 1):
        found = autoshard.verify(model, autoshard.plan(model, "a=2", given, options=autoshard.Options(seed=seed)), given)
        assert found.is_random_off
        assert found.is_equal, (name, found)


def test_a_wrong_plan_is_found_all_the_same() -> None:
    """What a drawn mask would drop is kept, so a branch behind it counts."""
    model, given = Draws(drops_paths), (torch.randn(4, 8, dtype=torch.float64),)
    plan = autoshard.plan(model, "a=2", given, template="megatron")
    node = next(node for node in plan.program.nodes("conversion") if node.target.__name__ == "all_reduce_invariant")  # type: ignore[union-attr]
    node.replace_all_uses_with(node.args[0])
    assert not autoshard.verify(model, plan, given).is_equal
