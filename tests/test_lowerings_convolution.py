"""Split space: what neighbours lend, and a net whose only dims that divide are those of space, on two processes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from processes import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autoshard
from autoshard.hardware import hardware_of
from autoshard.mesh import MeshSpec
from autoshard.runtime import Collective
from autoshard.simulator import SimulatedAxis
from autoshard.testing import OpCase

aten = torch.ops.aten


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def rotated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each rank lends, per loan."""
    lent: list[int] = []
    run = SimulatedAxis.run

    def counting(self: SimulatedAxis, collective: Collective, values: list[Tensor]) -> list[Tensor]:
        assert collective.name == "rotate", f"{collective.name} where neighbours alone should talk"
        lent.append(values[0].numel())
        return run(self, collective, values)

    monkeypatch.setattr(SimulatedAxis, "run", counting)
    return lent


LOANS = {
    "three wide": ((x(1, 3, 8, 8), x(4, 3, 3, 3), None, [1, 1], [1, 1]), [24, 24]),
    "patches": ((x(1, 3, 8, 8), x(4, 3, 2, 2), None, [2, 2]), []),
    "one wide, strided": ((x(1, 3, 8, 8), x(4, 3, 1, 1), None, [2, 2]), []),
    "seven wide, strided": ((x(1, 3, 12, 8), x(4, 3, 7, 3), None, [2, 1], [3, 1]), [72, 48]),
    "dilated": ((x(1, 3, 8, 8), x(4, 3, 3, 3), None, [1, 1], [2, 2], [2, 2]), [48, 48]),
}


@pytest.mark.parametrize("name", LOANS)
def test_neighbours_lend_the_rows_of_the_halo_and_no_more(name: str, rotated: list[int]) -> None:
    args, expected = LOANS[name]
    case = OpCase(aten.conv2d.default, args, {}, MeshSpec.of("a=2"))
    candidate = next(c for c in case.candidates({}) if c.strategies[0].factor == "h_in&h_out")
    rotated.clear()
    case.run(candidate)
    assert rotated[: len(expected)] == expected
    assert sorted(rotated) == sorted(expected * 2), "as much backward as forward"


def test_space_stays_whole_where_pieces_would_not_be_alike() -> None:
    """Without padding the result is shorter than the input by a rest: windows of later pieces would lie elsewhere in them."""
    case = OpCase(aten.conv2d.default, (x(1, 3, 8, 8), x(4, 3, 3, 3)), {}, MeshSpec.of("a=2"))
    assert not any("&" in c.strategies[0].factor for c in case.candidates({}))


def test_a_halo_is_never_wider_than_a_piece() -> None:
    args = (x(1, 3, 8, 8), x(4, 3, 7, 7), None, [1, 1], [3, 3])
    factors = {
        n: {c.strategies[0].factor for c in OpCase(aten.conv2d.default, args, {}, MeshSpec.of(f"a={n}")).candidates({})} for n in (2, 4)
    }
    assert "h_in&h_out" in factors[2]
    assert "h_in&h_out" not in factors[4], "three rows of a neighbour that holds two"


class Net(nn.Module):
    """Batch 1 and odd channels: nothing but space divides by 2."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mix, self.up = nn.Conv2d(3, 5, 3, 2, 1), nn.Conv2d(5, 5, 3, 1, 2, 2), nn.ConvTranspose2d(5, 3, 4, 2, 1)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.norm(self.down(x))), 3, 1, 1)
        y = F.avg_pool2d(F.gelu(self.mix(y)), 3, 1, 1)
        y = self.up(y) + F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        return F.adaptive_avg_pool2d(y, 1).square().sum() + y.square().mean()


def train(model: nn.Module, image: Tensor) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05), []
    for _ in range(3):
        loss = model(image)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _train_on_a_rank() -> tuple[list[float], list[float], str]:
    torch.manual_seed(0)
    model, image = Net().double(), x(1, 3, 128, 16)
    alone = copy.deepcopy(model)
    cpu = hardware_of("cpu")
    links = (replace(cpu.links[0], latency_s=0.0),)  # so that small images are worth splitting
    hardware = replace(cpu, collective_latency_s=0.0, links=links)
    compiled = autoshard.compile(model, init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)), hardware=hardware)
    return train(compiled, image), train(alone, image), compiled.plan.program.source


def test_split_space_trains_on_two_processes() -> None:
    for mine, theirs, source in run_on_ranks(2, _train_on_a_rank):
        assert mine == pytest.approx(theirs, rel=1e-10)
        assert source.count("height_axes=(cp,)") >= 5, source
