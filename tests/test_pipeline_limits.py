"""What pipeline stages cannot have is refused before it computes something else, with a text that says what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autoshard
from autoshard.errors import PlanError

TWO = autoshard.Pipelining(2)
X = torch.arange(24.0, dtype=torch.float64).reshape(4, 6) / 24


class Net(nn.Module):
    """Three layers, a loss, and room for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        return torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))).square().mean()


class Counter(Net):
    """Scales by the number of calls."""

    def __init__(self, is_read_before: bool) -> None:
        super().__init__()
        self.is_read_before = is_read_before
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        if self.is_read_before:
            loss = super().forward(x) * self.calls
            self.calls += 1
            return loss
        self.calls += 1
        return super().forward(x * self.calls) * self.calls


class TwoLosses(Net):
    def forward(self, x: Tensor) -> Any:
        loss = super().forward(x)
        return {"extra": self.a(x).square().mean(), "loss": loss}


class Counted(Net):
    """A number of rows that only the whole batch knows."""

    def forward(self, x: Tensor) -> Any:
        loss = super().forward(x)
        return {"loss": loss, "large": (self.a(x) > 0).sum() > 3}


class Shared(Net):
    """One BatchNorm, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.norm(self.b(self.norm(self.a(x)))))


@pytest.mark.parametrize(
    ("model", "x", "text"),
    [
        (lambda: Counter(is_read_before=True), X, "calls is a buffer that the model writes and computes with"),
        (lambda: Counter(is_read_before=False), X, "calls is a buffer that the model writes and computes with"),
        (Counted, X, "whole number or a bool of the whole batch"),
    ],
)
def test_refused_before_planning(model: Callable[[], nn.Module], x: Tensor, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        autoshard.plan(model().to(x.dtype), "pp=2", (x,), pipeline=TWO)


def test_statistics_of_one_norm_in_two_stages_are_refused() -> None:
    with pytest.raises(PlanError, match=r"norm.running_mean is written by ops of stages 0 and 1; keep them in one"):
        autoshard.plan(Shared().double(), "pp=2", (X,), pipeline=autoshard.Pipelining(2, starts=("b",)))


def test_of_several_numbers_the_one_called_loss_is_differentiated() -> None:
    plan = autoshard.plan(TwoLosses().double(), "pp=2", (X,), pipeline=TWO)
    assert plan.program.pipeline is not None
    assert plan.program.pipeline.loss == 1


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum])
def test_complex_sums_over_the_batch(reduce: Callable[[Tensor], Tensor]) -> None:
    class Complex(Net):
        def forward(self, x: Tensor) -> Any:
            return torch.real(reduce(torch.complex(self.a(x), self.b(x))))

    model = Complex().double()
    plan = autoshard.plan(model, "pp=2", (X,), pipeline=TWO)
    assert autoshard.verify(model, plan, (X,)).is_equal


def told(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def compiled(model: nn.Module) -> Any:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    return autoshard.compile(model.double(), mesh, pipeline=autoshard.Pipelining(2, starts=("c",)))


class Weighted(Net):
    """A loss whose count of labels is computed before the first microbatch, where a label may be out of range."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(6))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return nn.functional.cross_entropy(self.c(torch.tanh(self.b(self.a(x)))), y, self.weight)


def limits() -> dict[str, Any]:
    """What this rank is told, by case."""
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    model = compiled(Net())
    model(X).backward()
    found["clip a part"] = told(lambda: torch.nn.utils.clip_grad_norm_(next(iter(model.parameters())), 1.0))
    found["copy"] = abs(float(copy.deepcopy(model)(X).detach()) - float(model(X).detach()))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: None)
    found["hooks"] = told(lambda: model(X))
    found["argument"] = told(lambda: compiled_net()(X.clone().requires_grad_()))
    both = compiled(TwoLosses())
    results = both(X)
    found["beside the loss"] = told(lambda: (results["extra"] + 0 * results["extra"]).backward())
    frozen, here = compiled(Net()), dist.get_rank()
    frozen(X).backward()
    names = [name for name, _ in frozen.named_parameters() if here == 0]  # what the first stage alone holds
    for name in names[:1]:
        frozen.get_parameter(name).requires_grad_(False)
    found["frozen here"] = told(lambda: frozen(X))
    with torch.no_grad():
        found["frozen, without gradients"] = float(frozen(X)) > 0
    found["frozen, another shape"] = told(lambda: frozen(torch.cat([X, X])))
    for name in names[:1]:
        frozen.get_parameter(name).requires_grad_(True)
    found["thawed"] = told(lambda: frozen(X).backward())
    hooked = compiled(Net())
    for parameter in hooked.parameters() if here == 1 else ():
        parameter.register_post_accumulate_grad_hook(lambda _: None)
    found["hooks of one stage"] = told(lambda: hooked(X))
    labels = torch.tensor([0, 1, 2, 9])
    weighted = compiled(Weighted())
    found["before the first microbatch"] = told(lambda: weighted(X, labels))
    found["after it"] = float(weighted(X, labels % 6).detach()) > 0
    other = autoshard.compile(Net().double(), init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)), template="fsdp")
    other(X)
    found["state of another mesh"] = told(lambda: compiled_net().load_state_dict(other.state_dict()))
    first = compiled(Net())
    with torch.no_grad():
        first.eval()(X[:1])
    first.train()(X)
    found["microbatches"] = first.plan.program.pipeline.microbatches
    dist.barrier()
    return found


def compiled_net() -> Any:
    model = compiled(Net())
    model(X)
    return model


EXPECTED = {
    "argument": "PlanError: the argument x needs a gradient, which pipeline stages do not give; pass it detached",
    "clip a part": "PlanError: clip the gradients of all parameters of a model with pipeline stages in one call",
    "hooks": "has a gradient hook, which pipeline stages would not call",
    "frozen here": "StageError: before the first microbatch, on rank 0: PlanError: requires_grad of a.weight changed after",
    "frozen, another shape": "requires_grad of a.weight changed after the model was cut into pipeline stages",
    "thawed": "no error",
    "hooks of one stage": "StageError: before the first microbatch, on rank 1: PlanError: c.weight has a gradient hook",
    "beside the loss": "PlanError: a model with pipeline stages is differentiated from its loss alone",
    "before the first microbatch": "StageError: before the first microbatch, on rank 1: IndexError",
    "state of another mesh": "lies on another mesh than the pipeline stage that holds it; save with torch.distributed.checkpoint",
}


def test_limits_on_processes() -> None:
    for found in run_on_ranks(2, limits):
        for name, text in EXPECTED.items():
            assert text in found[name], f"{name}: {found[name]}"
        assert found["copy"] == 0
        assert found["after it"]
        assert found["frozen, without gradients"]
        assert found["microbatches"] == 2
