"""Random ops: right in distribution where values are split, equal on replicas, reproducible, and equal to one process on request."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import EXAMPLES, GPT, Encoder
from processes import run_on_ranks
from test_compiled_module import batch, everyones, run_checks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import autoshard
from autoshard.checker import check
from autoshard.errors import InputError

SINGLE = autoshard.Options(randomness="single_device")


class Apply(nn.Module):
    """A function of one tensor, and a parameter so that there is something to train."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return self.function(x * self.scale)


class Dropping(nn.Module):
    """One dropout module, whose result can be pinned."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


# ---------------------------------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize("layout", ["R", "S(0)@a", "S(0)@a S(1)@b", "S(0)@a S(0)@b"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_right_share(layout: str, rate: float) -> None:
    """Over many draws: mean and variance of the kept share are binomial, pieces are independent, replicas equal."""
    x = torch.ones(64, 64, dtype=torch.float64)
    model = Dropping(nn.Dropout(rate))
    plan = autoshard.plan(model, "a=2,b=2", (x,), constraints={"drop": layout})
    (name,) = [node.name for node in plan.program.nodes("op") if "dropout" in node.name]
    draws, size = 200, x.numel()
    shares, kept = [], []
    for seed in range(draws):
        simulation = autoshard.simulate(plan, model, (x,), seed=seed)
        whole = simulation.whole(name) != 0
        shares.append(whole.double().mean())
        kept.append(whole.flatten())
    share, deviation = torch.stack(shares), (rate * (1 - rate) / size) ** 0.5
    assert abs(share.mean() - (1 - rate)) < 5 * deviation / draws**0.5
    assert 0.8 < share.std() / deviation < 1.25
    means = torch.stack(kept).double().mean(0)  # every place is kept as often as any other
    assert (means - (1 - rate)).abs().max() < 6 * (rate * (1 - rate) / draws) ** 0.5
    quarters = (torch.stack(kept).double() - (1 - rate)).reshape(draws, 64, 64)
    pieces = torch.stack([quarters[:, :32, :32], quarters[:, 32:, :32], quarters[:, :32, 32:], quarters[:, 32:, 32:]]).flatten(1)
    correlation = torch.corrcoef(pieces) - torch.eye(4)
    assert correlation.abs().max() < 5 / pieces.shape[1] ** 0.5, "pieces do not draw independently"


def test_replicas_draw_alike_and_pieces_do_not() -> None:
    x = torch.ones(64, 64, dtype=torch.float64)
    model = Dropping(nn.Dropout(0.5))
    plan = autoshard.plan(model, "a=2,b=2", (x,), constraints={"drop": "S(0)@a R@b"})
    (name,) = [node.name for node in plan.program.nodes("op") if "dropout" in node.name]
    first, second, third, fourth = autoshard.simulate(plan, model, (x,), seed=3).values[name].values
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert not torch.equal(first, third)


FACTORIES: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: x + torch.rand(x.shape[0], 1, dtype=x.dtype),
    "randn": lambda x: x + torch.randn(x.shape, dtype=x.dtype),
    "randint": lambda x: x + torch.randint(5, x.shape),
    "randint_low": lambda x: x + torch.randint(2, 5, x.shape),
    "randperm": lambda x: x[torch.randperm(x.shape[0])],
    "normal": lambda x: x + torch.normal(1.0, 2.0, x.shape).double(),
}
LIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "rand_like": lambda x: x * torch.rand_like(x),
    "randn_like": lambda x: x + torch.randn_like(x),
    "randn_like_transposed": lambda x: x + torch.randn_like(x.t()).t(),
    "randint_like": lambda x: x * torch.randint_like(x, 1, 5),
    "rand_like_dtype": lambda x: x * torch.rand_like(x, dtype=torch.float32),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()).detach(),
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.3),
    "bernoulli_default": lambda x: x * x.new_empty(x.shape[0], 1).bernoulli_(),
    "normal_": lambda x: x + torch.empty_like(x).normal_(1.0, 2.0),
    "uniform_": lambda x: x * torch.empty_like(x).uniform_(1.0, 2.0),
    "exponential_": lambda x: x * torch.empty_like(x).exponential_(),
    "gumbel": lambda x: F.gumbel_softmax(x, dim=-1),
    "multinomial": lambda x: x.gather(1, torch.multinomial(x.detach().softmax(-1), 2)),
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout_": lambda x: F.dropout(x * 1, 0.3, inplace=True),
    "dropout_transposed": lambda x: F.dropout(x.t(), 0.3) * 2,
    "normal_transposed": lambda x: x + torch.empty_like(x.t()).normal_().t(),
    "uniform_transposed": lambda x: x + torch.rand_like(x.t()).t(),
    "bernoulli_transposed": lambda x: x * torch.empty_like(x.t()).bernoulli_(0.3).t(),
    "dropout_all": lambda x: F.dropout(x, 1.0) + x,
    "dropout_unread": lambda x: (F.dropout(x, 0.3), F.dropout(x, 0.2))[1],
    "alpha": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "alpha_transposed": lambda x: F.alpha_dropout(x.t(), 0.3, training=True),
    "feature": lambda x: F.dropout1d(x.view(2, -1, x.shape[1]), 0.3),
    "feature_alpha": lambda x: F.feature_alpha_dropout(x.view(2, -1, x.shape[1]), 0.3, training=True),
    "native": lambda x: torch.native_dropout(x, 0.3, True)[0] + torch.native_dropout(x, 0.3, True)[1],
    "rrelu": lambda x: F.rrelu(x, training=True),
}


def trained(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(11)
    y = model(x)
    y.sum().backward()
    return y.detach(), model.scale.grad


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("name", [*FACTORIES, *LIKE])
def test_one_process_bit_for_bit(name: str, seed: int | None) -> None:
    """With randomness="single_device" every rank draws what one process draws."""
    x = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = Apply({**FACTORIES, **LIKE}[name])
    plan = autoshard.plan(model, "a=2,b=2", (x,), options=autoshard.Options(randomness="single_device", seed=seed))
    expected, gradient = trained(copy.deepcopy(model), x)
    torch.manual_seed(11)
    simulation = autoshard.simulate(plan, copy.deepcopy(model), (x,))
    after = torch.rand(())
    for output in simulation.outputs[0].values:
        assert output.dtype == expected.dtype
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(output == 0, expected == 0)
    simulation.backward()
    torch.testing.assert_close(simulation.gradient("scale"), gradient, rtol=1e-12, atol=1e-12)
    torch.manual_seed(11)
    model(x)
    assert torch.equal(after, torch.rand(())), "the generator has moved on as it does on one process"
    assert autoshard.verify(model, plan, (x,)).is_equal
    check(plan.program)


@pytest.mark.parametrize("name", [*FACTORIES, *LIKE])
def test_every_rank_draws_its_own_piece(name: str, tmp_path: Any) -> None:
    """Without it: equal on replicas (the results are whole), other numbers for another seed, and the plan can be kept."""
    x = torch.randn(8, 12, dtype=torch.float64)
    model = Apply({**FACTORIES, **LIKE}[name])
    for seed in (None, 0, 1):
        plan = autoshard.plan(model, "a=2,b=2", (x,), options=autoshard.Options(seed=seed))
        simulations = [autoshard.simulate(plan, copy.deepcopy(model), (x,), seed=number) for number in (1, 1, 2)]
        first, again, other = (simulation.outputs[0].values for simulation in simulations)
        simulations[0].backward()
        assert simulations[0].gradient("scale") is not None
        assert all(torch.equal(first[0], value) for value in (*first, *again))
        assert name == "dropout_all" or not torch.equal(first[0], other[0])
        plan.save(tmp_path / "plan.json")
        assert autoshard.Plan.load(tmp_path / "plan.json").source() == plan.source()


def test_spatial_dropout_is_alike_along_split_space() -> None:
    x = torch.ones(2, 16, 8, dtype=torch.float64)
    model = Dropping(nn.Dropout1d(0.5))
    plan = autoshard.plan(model, "a=2", (x,), constraints={"drop": "S(2)"})
    (name,) = [node.name for node in plan.program.nodes("op") if "dropout" in node.name]
    whole = autoshard.simulate(plan, model, (x,), seed=1).whole(name)
    assert torch.equal(whole, whole[..., :1].expand_as(whole))
    assert 0 < (whole == 0).double().mean() < 1


class Attending(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.qkv, self.kind = nn.Linear(8, 24), kind

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mask = {"bool": torch.arange(6)[:, None] > torch.arange(6), "float": torch.arange(36.0).view(6, 6).to(x.dtype) / 36}.get(self.kind)
        scale = {"scale": 0.3, "negative": -0.3}.get(self.kind)
        return F.scaled_dot_product_attention(q, k, v, mask, 0.25, self.kind == "causal", scale=scale)


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "scale", "negative"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_of_one_process(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Attending(kind).to(dtype), torch.randn(4, 6, 8, dtype=dtype)
    for seed in (None, 0, 1):
        options = autoshard.Options(randomness="single_device", seed=seed)
        plan = autoshard.plan(model, "a=2" if seed is None else "a=2,b=2", (x,), options=options)
        verification = autoshard.verify(model, plan, (x,))
        assert not verification.is_random_off
        assert verification.is_equal, verification
    plan = autoshard.plan(model, "a=1", (x,), options=SINGLE)
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    assert torch.equal(autoshard.simulate(plan, model, (x,)).outputs[0].values[0], expected)


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")  # torch.export, of recurrent layers
def test_recurrent_layers_of_one_process() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 4, 2, dropout=0.3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.gru(x)[0], 0.2)

    model, x = Recurrent().double(), torch.randn(4, 3, 4, dtype=torch.float64)
    plan = autoshard.plan(model, "a=2", (x,), options=SINGLE)
    verification = autoshard.verify(model, plan, (x,))
    assert not verification.is_random_off
    assert verification.is_equal, verification


def test_unknown_randomness_is_refused() -> None:
    with pytest.raises(InputError, match="randomness='same' is not known; there are 'per_rank', 'single_device'"):
        autoshard.plan(GPT(), "dp=2", batch(), options=autoshard.Options(randomness="same"))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- real processes


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return F.dropout(x, 0.1, self.training).square().mean()


def training_is_that_of_one_process(mesh: DeviceMesh) -> None:
    rows = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cases: list[tuple[nn.Module, tuple, str]] = [
        (GPT(dropout=0.2).double(), batch(), "megatron"),
        (Encoder(0.2).double(), EXAMPLES["encoder"].batch(0)[0], "fsdp"),
        (Recomputed().double(), (rows,), "fsdp"),
    ]
    for model, args, template in cases:
        reference = copy.deepcopy(model)
        compiled = autoshard.compile(model, mesh, template=template, options=SINGLE)
        histories = []
        for which in (reference, compiled):
            optimizer = torch.optim.SGD(which.parameters(), 0.1)
            torch.manual_seed(3)
            losses = []
            for _ in range(3):
                loss = which(*args)
                loss = loss if loss.dim() == 0 else loss.square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            histories.append((losses, torch.rand(()).item()))
        (expected, after), (found, then) = histories
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-12, atol=1e-12)
        assert then == after
        assert len(set(found)) == 3


def generators_that_differ_are_refused(mesh: DeviceMesh) -> None:
    compiled = autoshard.compile(GPT(dropout=0.2), mesh, options=SINGLE)
    torch.manual_seed(torch.distributed.get_rank())
    with pytest.raises(InputError, match=r"ranks disagree on the state of the random generator.*torch.manual_seed with the same number"):
        compiled(*batch())
    torch.manual_seed(0)
    compiled(*batch())


def two_models_draw_different_numbers(mesh: DeviceMesh) -> None:
    def masks(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        models = [autoshard.compile(Apply(lambda x: F.dropout(x, 0.5)), mesh) for _ in range(2)]
        return [model(torch.ones(64, dtype=torch.float64)).detach() for model in models]

    first, second = masks(1)
    assert not torch.equal(first, second)
    again = masks(1)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, masks(2)[0])
    assert all(torch.equal(first, other) for other in everyones(first))


CHECKS = [training_is_that_of_one_process, generators_that_differ_are_refused, two_models_draw_different_numbers]


def test_two_ranks() -> None:
    run_on_ranks(2, run_checks, CHECKS, (2,), ("tp",))


def test_four_ranks() -> None:
    run_on_ranks(4, run_checks, CHECKS[:1], (2, 2), ("dp", "tp"))
