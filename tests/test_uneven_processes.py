"""Uneven shards on real processes: conversions, training with clipped gradients, state dicts, checkpoints that one process reads."""

from __future__ import annotations

import copy
import itertools
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import run_on_ranks
from test_processes import state_difference
from test_uneven import NARROW, SHAPES, UNEVEN, UNEVEN_ROWS, WHOLE, batch, gpt, leaves, value
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import autoshard
from autoshard import runtime
from autoshard.conversions import Step, step_arguments, step_sizes
from autoshard.mesh import MeshSpec
from autoshard.placements import S
from autoshard.simulator import Ranks, SimulatedAxis
from autoshard.testing import dual, spread

STEPS = 3


def conversions() -> list[str]:
    """Every row on this rank and simulated, value and gradient; returns what differs."""
    n, rank = dist.get_world_size(), dist.get_rank()
    mesh = MeshSpec(("a",), (n,))
    axis = runtime.Axis("a", n, rank, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    wrong = []
    for row, dim in itertools.product(UNEVEN_ROWS, (0, 1)):
        src = S(dim) if row.src == "S" else WHOLE[row.src]
        dst = WHOLE[row.dst] if row.dst != "S" else S(1 - dim) if row.src == "S" else S(dim)
        step, shape, generator = Step(0, src, dst), SHAPES[n], torch.Generator().manual_seed(0)
        args, kwargs = step_arguments((src,), step, shape, (n,)), step_sizes((src,), step, shape, (n,))
        function, before = getattr(runtime, row.name), leaves(spread(value(shape), (src,), mesh, generator))
        mine = before[rank].detach().clone().requires_grad_()
        wanted, found = function(Ranks(before), SimulatedAxis(mesh, "a"), *args, **kwargs).values, function(mine, axis, *args, **kwargs)
        seeds = spread(value(shape, 1), dual((dst,)), mesh, generator, is_gradient=True)
        torch.autograd.backward(wanted, seeds)
        found.backward(seeds[rank])
        for what, one, other in (("value", found, wanted[rank]), ("gradient", mine.grad, before[rank].grad)):
            if not (one.is_contiguous() and torch.allclose(one, other, rtol=1e-12, atol=1e-12)):
                wrong.append(f"{what} of {row.name} on dim {dim}")
    return wrong


def test_conversions_run_as_simulated() -> None:
    assert run_on_ranks(3, conversions) == [[]] * 3


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
    """Losses and gradient norms of clipped steps."""
    found = []
    for number in numbers:
        loss = model(*batch(number))
        loss.backward()
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found += [loss.item(), float(norm.full_tensor() if isinstance(norm, DTensor) else norm)]
    return found


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-6, weight_decay=0.1, foreach=True)


def train_save_and_load(shape: tuple[int, ...], names: tuple[str, ...], template: Any) -> str:
    """Returns the folder of a checkpoint of what was trained."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    reference = gpt()
    compiled = autoshard.compile(gpt(), mesh, template=template, constraints=UNEVEN, hardware=NARROW, example_inputs=batch())
    held: Any = compiled.get_parameter("tok.weight")
    piece = -(-257 // shape[-1])
    assert held.to_local().shape[0] == min(piece, 257 - mesh.get_local_rank(names[-1]) * piece)
    optimizers = [adamw(model) for model in (compiled, reference)]
    ours, theirs = (steps(model, o, range(STEPS)) for model, o in zip((compiled, reference), optimizers, strict=True))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-9, atol=1e-9)
    assert state_difference(compiled, reference) < 1e-9
    dcp.save({"model": compiled.state_dict(), "optimizer": autoshard.checkpointable(optimizers[0].state_dict())}, checkpoint_id=folder[0])

    second = autoshard.compile(gpt(1), mesh, template="fsdp" if len(shape) == 1 else "ddp", example_inputs=batch())
    resumed = adamw(second)
    steps(second, resumed, range(1))
    state = {"model": second.state_dict(), "optimizer": autoshard.checkpointable(resumed.state_dict())}
    dcp.load(state, checkpoint_id=folder[0])
    second.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    for model, optimizer in ((second, resumed), (compiled, optimizers[0]), (reference, optimizers[1])):
        steps(model, optimizer, range(STEPS, STEPS + 2))
    assert state_difference(second, reference) < 1e-9
    assert state_difference(compiled, reference) < 1e-9

    other = autoshard.compile(gpt(2), mesh, template=template, constraints=UNEVEN, hardware=NARROW, example_inputs=batch())
    other.load_state_dict(reference.state_dict())
    assert state_difference(copy.deepcopy(other), reference) == 0.0
    return folder[0]


def in_one_process(folder: str) -> None:
    """A checkpoint of several processes, read by one without autoshard, is what one process trains."""
    reference, loaded = gpt(), gpt(1)
    steps(reference, adamw(reference), range(STEPS))
    state = {"model": loaded.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    loaded.load_state_dict(state["model"])
    assert state_difference(loaded, reference) < 1e-9


def on_two() -> str:
    inputs_given_split()
    return train_save_and_load((2,), ("tp",), "megatron_sp")


def on_four() -> list[str]:
    return [train_save_and_load((4,), ("tp",), "megatron"), train_save_and_load((2, 2), ("dp", "tp"), "megatron")]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_processes() -> None:
    in_one_process(run_on_ranks(2, on_two)[0])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_four_processes() -> None:
    for folder in run_on_ranks(4, on_four)[0]:
        in_one_process(folder)


def inputs_given_split() -> None:
    """A DTensor argument whose dim does not divide is taken as it lies, and its gradient comes back so."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("a",))
    torch.manual_seed(0)
    model, whole = nn.Linear(4, 4).double(), value((7, 4)).requires_grad_()
    given = distribute_tensor(whole.detach(), mesh, [Shard(0)]).requires_grad_()
    compiled = autoshard.compile(copy.deepcopy(model), mesh)
    result, expected = compiled(given), model(whole)
    torch.testing.assert_close(result, expected)
    result.square().sum().backward()
    expected.square().sum().backward()
    assert given.grad.placements == (Shard(0),)  # type: ignore[union-attr]
    torch.testing.assert_close(given.grad.full_tensor(), whole.grad)  # type: ignore[union-attr]
    assert "pad_shard(" in compiled.plan.program.source
