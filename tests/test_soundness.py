"""Ways in which a partitioned model could silently differ from the original: each is equal, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from processes import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import autoshard
from autoshard.program import facts

X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """A linear layer around which tests do what they test."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Hooked(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)
        h.register_hook(lambda grad: grad * 2)
        return h


class Penalised(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)
        (grad,) = torch.autograd.grad(h.pow(2).sum(), self.inner.weight, retain_graph=True)
        return h.sum() + grad.pow(2).sum()


def with_backward_hook() -> nn.Module:
    model = Plain()
    model.inner.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    return model


def with_parameter_hook() -> nn.Module:
    model = Plain()
    model.inner.weight.register_hook(lambda grad: grad * 3)
    return model


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Hooked, "Tensor.register_hook at .*test_soundness.py:.*tracing would lose it"),
        (Penalised, "torch.autograd.grad at .*test_soundness.py:.*tracing would lose it"),
        (with_backward_hook, "module inner has a backward hook"),
        (with_parameter_hook, "parameter inner.weight has a hook"),
    ],
)
def test_what_tracing_would_lose_is_refused(model: Any, text: str) -> None:
    with pytest.raises(autoshard.AutoshardError, match=text):
        autoshard.plan(model(), "a=2", (X,))


def test_in_place_keeps_the_dtype() -> None:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 1).add_(torch.ones(8, dtype=torch.float64))

    x = torch.randn(4, 8)
    plan = autoshard.plan(Mixed(), "a=2", (x,))
    assert autoshard.verify(Mixed(), plan, (x,)).is_equal


def test_random_ops_without_a_row_draw_alike_on_every_rank() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout2d(0.5))
    plan = autoshard.plan(model, "a=2", (torch.randn(4, 3, 2, 2),))
    (node,) = (n for n in plan.program.nodes("op") if "feature_dropout" in str(n.target))
    assert facts(node).random_axes == ()
    first, second = autoshard.simulate(plan, model, (torch.randn(4, 3, 2, 2),)).values[node.name].values
    assert torch.equal(first, second)


@pytest.mark.parametrize("template", ["ddp", "megatron"])
def test_targets_out_of_range_raise(template: str) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 8, dtype=torch.float64)

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(x), target)

    model, target = Loss(), torch.tensor([0, 1, 2, 8])
    plan = autoshard.plan(model, "a=2", (X, target), template=template)  # type: ignore[arg-type]
    with pytest.raises((RuntimeError, IndexError), match=r"out of (range|bounds)"):
        autoshard.simulate(plan, model, (X, target))


def test_equal_infinities_are_equal() -> None:
    class Infinite(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x / 0.0, x - x / 0.0 + x / 0.0])

    plan = autoshard.plan(Infinite(), "a=2", (X,))
    assert autoshard.verify(Infinite(), plan, (X,)).is_equal


class Buffered(Plain):
    """Scales by a function of a buffer, which the program computes once."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (self.temperature * 1.0).exp()


def on_two_ranks() -> dict[str, float]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    found: dict[str, float] = {}

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).detach().abs().max())

    for template in ("ddp", "fsdp", "megatron"):
        model = Plain()
        compiled = autoshard.compile(copy.deepcopy(model), mesh, template=template)  # type: ignore[arg-type]
        sides = []
        for side in (model, compiled):
            x = X.clone().requires_grad_()
            (grad,) = torch.autograd.grad(side(x).square().sum(), x, create_graph=True)
            ((grad.norm(dim=1) - 1) ** 2).mean().backward()
            weight = side.inner.weight.grad
            sides.append(weight.full_tensor() if hasattr(weight, "full_tensor") else weight)
        found[f"gradient penalty, {template}"] = difference(*sides)

    compiled = autoshard.compile(Plain(), mesh)
    expected = compiled(X).detach()
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        for parameter in compiled.parameters():
            parameter.zero_()
    found["a copy runs on its own weights"] = difference(twin(X), expected)

    model = Buffered()
    compiled = autoshard.compile(copy.deepcopy(model), mesh)
    compiled(X)
    for side in (model, compiled):
        side.temperature.fill_(2.0)
    found["a buffer that changes"] = difference(compiled(X), model(X))

    compiled = autoshard.compile(copy.deepcopy(model), mesh, template="fsdp")
    with torch.inference_mode():
        compiled(X)
    compiled(X).sum().backward()
    found["validation before training"] = float(compiled.inner.weight.grad is None)
    return found


def test_on_two_ranks() -> None:
    for found in run_on_ranks(2, on_two_ranks):
        assert {name: value for name, value in found.items() if value > 1e-12} == {}


def checkpointed_from_outside() -> str:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    compiled = autoshard.compile(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).double(), mesh)
    x = X.clone().requires_grad_()
    compiled(x)
    try:
        torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=False).sum().backward()
    except autoshard.AutoshardError as error:
        return str(error)
    return "no error"


def test_recomputation_from_outside_is_refused_with_dropout() -> None:
    assert all("the masks would differ" in text for text in run_on_ranks(2, checkpointed_from_outside))
