"""What only a GPU can show: collectives and random numbers on CUDA tensors, programs on NCCL. Each runs on the CPU too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parts import GPT, GPTConfig, difference, local, one_rank, stage_through_host
from processes import run_on_ranks
from torch import Tensor

import autoshard
from autoshard import runtime
from autoshard.runtime import Axis, Collective

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SEGMENTS = (2, 4)


def whole_inputs(device: str) -> list[Tensor]:
    """What each of two ranks holds; the same on both."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]


def expected_results(inputs: list[Tensor], rank: int) -> dict[Collective, Tensor]:
    """What each collective gives on `rank`, by its definition."""
    a, b = inputs
    own, zero = inputs[rank], torch.zeros_like(inputs[rank])
    columns = slice(3 * rank, 3 * rank + 3)
    rows = slice(2 * rank, 2 * rank + 2)
    joined = torch.cat((a[:, :2], b[:, :2], a[:, 2:], b[:, 2:]), dim=1)
    segments = torch.cat((own[:, rank : rank + 1], own[:, 2 + 2 * rank : 4 + 2 * rank]), dim=1)
    return {
        Collective("identity"): own,
        Collective("all_gather", 0): torch.cat((a, b)),
        Collective("all_gather", 1): torch.cat((a, b), dim=1),
        Collective("all_gather", 1, (4, 8)): joined,
        Collective("reduce_scatter", 0): (a + b)[rows],
        Collective("reduce_scatter", 1): (a + b)[:, columns],
        Collective("all_reduce"): a + b,
        Collective("all_to_all", 0, (), 1, ()): torch.cat((a[:, columns], b[:, columns])),
        Collective("slice", 1): own[:, columns],
        Collective("slice", 1, SEGMENTS): segments,
        Collective("place", 0): torch.cat((own, zero) if rank == 0 else (zero, own)),
        Collective("keep_first"): own if rank == 0 else zero,
    }


def differing_collectives(device: str) -> list[str]:
    if device == "cuda":
        torch.cuda.set_device(0)
        staging = stage_through_host()  # noqa: F841 - alive until the end
    inputs, rank = whole_inputs(device), dist.get_rank()
    axis = Axis("dp", 2, rank, dist.group.WORLD.group_name)
    wrong = []
    for collective, expected in expected_results(inputs, rank).items():
        found = runtime.run(collective, inputs[rank], axis)
        if found.device != expected.device or found.shape != expected.shape or not torch.allclose(found, expected):
            wrong.append(f"{collective}: {found.tolist()} instead of {expected.tolist()}")
    return wrong


@pytest.mark.parametrize("device", DEVICES)
def test_collectives_on_two_ranks(device: str) -> None:
    assert run_on_ranks(2, differing_collectives, device) == [[], []]


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_is_the_same_where_the_value_is(device: str) -> None:
    def draw(rank: int, is_split: bool, step: int = 0, site: int = 0) -> Tensor:
        axis = Axis("dp", 2, rank, "")
        program = runtime.Program((axis,), lambda name: torch.empty(0), torch.device(device), lambda: step)
        return program.random(site, (axis,) if is_split else (), F.dropout, torch.ones(256, device=device), 0.5)

    state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    assert torch.equal(draw(0, is_split=False), draw(1, is_split=False))
    assert not torch.equal(draw(0, is_split=True), draw(1, is_split=True))
    assert not torch.equal(draw(0, is_split=False), draw(0, is_split=False, step=1))
    assert not torch.equal(draw(0, is_split=False), draw(0, is_split=False, site=1))
    assert torch.equal(state, torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_gpt_on_one_rank_equals_the_model(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, heads=2, width=64, block=32, vocab=64)).to(device, dtype)
    ids = torch.randint(64, (4, 32), device=device)
    expected = model(ids, labels=ids)
    expected.backward()
    with one_rank(device) as mesh:
        sharded = autoshard.compile(model, mesh)
        loss = sharded(ids, labels=ids)
        loss.backward()
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert difference(expected, loss) <= tolerance
    found = {name: local(p.grad) for name, p in sharded.named_parameters()}
    errors = {name: difference(p.grad, found[name]) for name, p in model.named_parameters()}
    assert max(errors.values()) <= tolerance, errors
