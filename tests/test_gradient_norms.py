"""Clipping by norm and loss scaling over pipeline stages, on real processes: equal to the single process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autoshard


class Tied(nn.Module):
    """Words in and out by one weight, which the first and the last stage hold; optionally a stage without weights in between."""

    def __init__(self, words: int = 12, width: int = 8, layers: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return nn.functional.cross_entropy(x @ self.words.weight.T, labels)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(12, (8,), generator=generator), torch.randint(12, (8,), generator=generator)


def both(shape: tuple[int, ...], names: tuple[str, ...], template: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    model = Tied().double()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return copy.deepcopy(model), autoshard.compile(model, mesh, template=template, pipeline=autoshard.Pipelining(2))  # type: ignore[arg-type]


def apart(reference: nn.Module, compiled: Any) -> float:
    expected = dict(reference.named_parameters())
    return max(float((p.full_tensor() - expected[name]).detach().abs().max()) for name, p in compiled.named_parameters())


def clip(shape: tuple[int, ...], names: tuple[str, ...], template: str) -> list[tuple[float, float, float]]:
    """By order of the norm: both norms after two steps, and how far the parameters are apart."""
    found = []
    for order in (2.0, 1.0, float("inf")):
        reference, compiled = both(shape, names, template)
        compiled(*data()).backward()  # before the optimizer is made, so that it holds what this rank trains
        compiled.zero_grad()
        optimizers = [torch.optim.SGD(model.parameters(), 0.5) for model in (reference, compiled)]
        for _ in range(2):
            norms = []
            for model, optimizer in zip((reference, compiled), optimizers, strict=True):
                model(*data()).backward()
                norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01, order)))
                optimizer.step()
                optimizer.zero_grad()
        found.append((norms[0], norms[1], apart(reference, compiled)))
    return found


ELSEWHERE = [((2, 2), ("pp", "dp"), "fsdp"), ((4,), ("pp",), "auto")]


@pytest.mark.parametrize(
    ("shape", "names", "template"), [((2,), ("pp",), "auto"), *(pytest.param(*way, marks=pytest.mark.slow) for way in ELSEWHERE)]
)
def test_clipping_is_by_the_norm_of_all_stages(shape: tuple[int, ...], names: tuple[str, ...], template: str) -> None:
    for found in run_on_ranks(torch.Size(shape).numel(), clip, shape, names, template):
        for expected, actual, difference in found:
            assert actual == pytest.approx(expected, rel=1e-12)
            assert difference < 1e-12


def scale() -> tuple[list[float], list[float], float]:
    """Scales after each step of both, one of which overflows in the gradient of the first stage alone, and how far parameters are apart."""
    reference, compiled = both((2,), ("pp",), "auto")
    compiled(*data()).backward()
    compiled.zero_grad()
    scales: list[list[float]] = []
    for model in (reference, compiled):
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        scales.append([])
        for step in range(4):
            loss = model(*data())
            scaler.scale(loss).backward()
            if step == 1:
                overflow(model, loss)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales[-1].append(scaler.get_scale())
    return scales[0], scales[1], apart(reference, compiled)


def overflow(model: nn.Module, loss: Tensor) -> None:
    """An infinite scale: every gradient overflows on the single device, and those of some stages or all on several."""
    model.zero_grad()
    model(*data()).backward(torch.full_like(loss, torch.inf))


def overflow_of_one(is_scaled: bool) -> list[bool]:
    """Whether any gradient is not finite, by rank, where those of the last stage alone overflow; is_scaled: by a GradScaler, by 1."""
    torch.manual_seed(1)
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = model

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)).detach() * 1e200).mul(1e200).sum() + self.first(x).sum()

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    pipeline = autoshard.Pipelining(2, starts=("second",))
    compiled = autoshard.compile(Net(), mesh, pipeline=pipeline)
    loss = compiled(torch.ones(4, 4, dtype=torch.float64))
    (torch.amp.GradScaler("cpu", init_scale=1.0).scale(loss) if is_scaled else loss * 2.0).backward()
    own = any(not bool(p.grad.to_local().isfinite().all()) for p in compiled.parameters() if p.grad is not None)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def overflow_in_other_formats() -> bool:
    """As overflow_of_one of convolutions whose gradients lie with channels innermost; whether any is finite on this rank."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.first(x))
            return self.second(y.detach() * 1e200).mul(1e200).sum() + y.sum()

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    model = Net().double().to(memory_format=torch.channels_last)
    compiled = autoshard.compile(model, mesh, pipeline=autoshard.Pipelining(2, starts=("second",)))
    (compiled(torch.ones(4, 4, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)) * 2.0).backward()
    return any(bool(p.grad.to_local().isfinite().all()) for p in compiled.parameters() if p.grad is not None)


def scales_without_weights() -> tuple[list[float], list[float]]:
    """Scales after each step of one process and of stages of which one has no weights; the second step overflows."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = nn.Linear(4, 4), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.first(x)).sum()

    torch.manual_seed(0)
    mesh, model, x = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",)), Net().double(), torch.ones(4, 4, dtype=torch.float64)
    compiled = autoshard.compile(copy.deepcopy(model), mesh, pipeline=autoshard.Pipelining(2, starts=("rest",)))
    compiled.prepare(x)
    found: list[list[float]] = []
    for each in (model, compiled):
        optimizer, scaler = torch.optim.SGD(each.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        found.append([])
        for factor in (1.0, torch.inf, 1.0):
            (scaler.scale(each(x)) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            found[-1].append(scaler.get_scale())
    return found[0], found[1]


def freeze_for_evaluation() -> tuple[float, float]:
    """Losses before and after everything is frozen, which on each rank is another set of parameters."""
    mesh, x = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",)), torch.ones(4, 4, dtype=torch.float64)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x))).square().sum()

    torch.manual_seed(0)
    compiled = autoshard.compile(Net().double(), mesh, pipeline=autoshard.Pipelining(2, starts=("second",)))
    before = compiled(x).item()
    compiled.requires_grad_(False).eval()
    with torch.no_grad():
        return before, compiled(x).item()


def of_unlike_stages() -> tuple[bool, tuple[list[float], list[float]], tuple[float, float]]:
    return overflow_in_other_formats(), scales_without_weights(), freeze_for_evaluation()


def test_stages_that_are_unlike_scale_and_evaluate_alike() -> None:
    for is_any_finite, (expected, actual), (before, after) in run_on_ranks(2, of_unlike_stages):
        assert not is_any_finite
        assert expected == actual == [16.0, 8.0, 16.0]
        assert before == after


def both_scalings() -> tuple[tuple[list[float], list[float], float], list[bool]]:
    by_one = overflow_of_one(is_scaled=True)  # first, as a scaler that was used once is remembered
    return scale(), [*by_one, *overflow_of_one(is_scaled=False)]


def test_a_scaler_skips_the_same_steps_on_all_stages() -> None:
    for (expected, actual, difference), overflows in run_on_ranks(2, both_scalings):
        assert expected == actual
        assert expected[1] < expected[0]
        assert difference < 1e-12
        assert overflows == [True, True, True, True]
