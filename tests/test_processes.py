"""Real processes train through autoshard.compile, and losses, parameters and buffers equal those of one process.

Every template on every family of models on two ranks; on four ranks (two axes) the pairs that matter, plans that one side
saved, and ranks in an order of their own. The whole cross product is marked slow.
"""

from __future__ import annotations

import copy
import traceback
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import EXAMPLES, SLOW, loss_of
from processes import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import autoshard

STEPS = 5
TEMPLATES = ("auto", "ddp", "fsdp", "megatron", "megatron_sp")
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2, eps=1e-6, foreach=True),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, 1e-2, eps=1e-6, fused=True),
    "adamw_loop": lambda parameters: torch.optim.AdamW(parameters, 1e-2, eps=1e-6, foreach=False),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-1, momentum=0.9),
}


@dataclass(frozen=True)
class Job:
    """One model trained under one plan. seed: a random sound plan. plan: a file that was saved elsewhere."""

    example: str
    template: str = "auto"
    optimizer: str = "adamw"
    seed: int | None = None
    clip: float | None = None
    is_lazy: bool = False
    plan: str | None = None


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state_difference(compiled: nn.Module, reference: nn.Module) -> float:
    """Largest difference over parameters and buffers; both have the same names in the same order."""
    mine, theirs = compiled.state_dict(), reference.state_dict()
    assert list(mine) == list(theirs)
    return max((float((whole(mine[name]).double() - theirs[name].double()).abs().max()) for name in theirs), default=0.0)


def steps(model: nn.Module, job: Job) -> list[float]:
    optimizer, losses = OPTIMIZERS[job.optimizer](model.parameters()), []
    for number in range(STEPS):
        args, kwargs = EXAMPLES[job.example].batch(number)
        loss = loss_of(model(*args, **kwargs))
        loss.backward()
        if job.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compiled_for(job: Job, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    if job.plan is not None:
        return autoshard.Plan.load(job.plan).apply(model, mesh)
    args, kwargs = ((), {}) if job.is_lazy else EXAMPLES[job.example].batch(0)
    examples: dict[str, Any] = {} if job.is_lazy else {"example_inputs": args, "example_kwargs": kwargs}
    return autoshard.compile(model, mesh, template=job.template, hardware=SLOW, options=autoshard.Options(seed=job.seed), **examples)


def train(jobs: list[Job], shape: tuple[int, ...], names: tuple[str, ...], ranks: list | None = None) -> list[str]:
    """Run every job on this rank; returns what went wrong."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names) if ranks is None else DeviceMesh("cpu", ranks, mesh_dim_names=names)
    wrong = []
    for job in jobs:
        model = EXAMPLES[job.example].model()
        reference = copy.deepcopy(model)
        try:
            compiled = compiled_for(job, model, mesh)
            losses, expected = steps(compiled, job), steps(reference, job)
            loss_error = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
            state_error = state_difference(compiled, reference)
        except Exception:
            wrong.append(f"{job}: {traceback.format_exc()}")
            continue
        tolerance = 1e-4 if job.example.startswith("hf_") else 1e-9  # Hugging Face computes the loss in float32
        if not max(loss_error, state_error) <= tolerance:
            wrong.append(f"{job}: losses differ by {loss_error}, parameters and buffers by {state_error}")
    return wrong


def check(size: int, *args: Any) -> None:
    wrong = [fault for rank in run_on_ranks(size, train, *args) for fault in rank]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("example", EXAMPLES)
def test_two_ranks_under_every_template(example: str) -> None:
    jobs = [Job(example, template, is_lazy=template == "fsdp") for template in TEMPLATES]
    check(2, [*jobs, Job(example, seed=1), Job(example, "megatron", "sgd", clip=0.1)], (2,), ("tp",))


def test_four_ranks_on_two_axes() -> None:
    jobs = [
        Job("gpt", "megatron_sp", clip=0.1),
        Job("gpt", seed=2, optimizer="adamw_fused"),
        Job("gpt", "fsdp", "adamw_loop", is_lazy=True),
        Job("hf_gpt2", "megatron"),
        Job("conv_net", "ddp"),
        Job("conv_net", seed=3),
        Job("encoder", "megatron_sp", "adamw_fused"),
    ]
    check(4, jobs, (2, 2), ("dp", "tp"))


def test_plans_from_a_file_on_ranks_in_an_order_of_their_own(tmp_path: Any) -> None:
    jobs = []
    for example, template in [("gpt", "megatron"), ("hf_llama", "megatron_sp"), ("encoder", "fsdp"), ("conv_net", "auto")]:
        args, kwargs = EXAMPLES[example].batch(0)
        options = autoshard.Options(seed=5 if template == "auto" else None)
        plan = autoshard.plan(EXAMPLES[example].model(), "a=2,b=2", args, kwargs, template=template, hardware=SLOW, options=options)
        plan.save(tmp_path / f"{example}.json")
        jobs.append(Job(example, template, plan=str(tmp_path / f"{example}.json")))
    check(4, jobs, (2, 2), ("a", "b"), [[0, 2], [1, 3]])


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_four_ranks_under_every_template(example: str) -> None:
    check(4, [Job(example, template, optimizer) for template in TEMPLATES for optimizer in OPTIMIZERS], (2, 2), ("dp", "tp"))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_four_ranks_under_random_plans(example: str) -> None:
    check(4, [Job(example, seed=seed) for seed in range(20)], (2, 2), ("dp", "tp"))
