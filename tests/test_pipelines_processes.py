"""Pipelines on real processes, through autoshard.compile: the training loop of one process, and what goes beside it.

Parameters after five steps of AdamW are those of one process; so are gradients in every order that losses are made and released.
Several checks share a run, as starting processes and planning take most of the time.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import GPT, LENGTH, VOCAB
from pipeline_models import BATCH, CASES
from processes import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

import autoshard
from autoshard import Pipelining
from autoshard.errors import InputError, PlanError, StageError
from autoshard.schedules import NAMES

STEPS = 5


@dataclass(frozen=True)
class Job:
    """One model trained as a pipeline. tolerance: of losses, parameters and buffers."""

    case: str
    schedule: str | None = "1f1b"
    microbatches: int = 2
    template: str = "auto"
    tolerance: float = 1e-12


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loss_of(result: Any) -> Tensor:
    """The first tensor of what a model returns."""
    return next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))


def loss_in_parts(model: nn.Module, args: tuple, kwargs: dict, count: int) -> Tensor:
    """The mean of the losses of `count` microbatches."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    parts = [pytree.tree_unflatten(list(part), spec) for part in zip(*(leaf.chunk(count) for leaf in flat), strict=True)]
    return torch.stack([loss_of(model(*own, **named)) for own, named in parts]).mean()


def steps(model: nn.Module, loss: Callable[[tuple, dict], Tensor], job: Job) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-6, foreach=True), []
    for number in range(STEPS):
        value = loss(*CASES[job.case].batch(number))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def train(jobs: list[Job], shape: tuple[int, ...], names: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """Run every job on this rank: what went wrong, and the names of what this rank holds."""
    mesh, found = init_device_mesh("cpu", shape, mesh_dim_names=names), []
    for job in jobs:
        model = CASES[job.case].model()
        reference = copy.deepcopy(model)
        pipeline = Pipelining(job.microbatches, job.schedule)
        try:
            compiled = autoshard.compile(model, mesh, template=job.template, pipeline=pipeline)  # type: ignore[arg-type]
            args, kwargs = CASES[job.case].batch(0)
            compiled.prepare(*args, **kwargs)
            losses = steps(compiled, lambda args, kwargs: loss_of(compiled(*args, **kwargs)), job)  # noqa: B023
            parts = job.microbatches if job.case == "MoE" else 1
            expected = steps(reference, lambda args, kwargs: loss_in_parts(reference, args, kwargs, parts), job)  # noqa: B023
            theirs = dict(reference.state_dict())
            mine = compiled.state_dict()
            worst = max((float((whole(mine[name]).double() - theirs[name].double()).abs().max()) for name in mine), default=0.0)
            worst = max(worst, *(abs(a - b) for a, b in zip(losses, expected, strict=True)))
        except Exception:
            found.append((f"{job}: {traceback.format_exc()}", []))
            continue
        found.append(("" if worst <= job.tolerance else f"{job}: off by {worst}", list(mine)))
    return found


def check(jobs: list[Job], shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    size = int(torch.tensor(shape).prod())
    ranks = run_on_ranks(size, train, jobs, shape, names)
    wrong = [fault for rank in ranks for fault, _ in rank if fault]
    assert not wrong, "\n".join(wrong)
    for number, job in enumerate(jobs):
        own = [set(rank[number][1]) for rank in ranks]
        assert set().union(*own) == set(CASES[job.case].model().state_dict()), job
        assert any(held != own[0] for held in own), f"{job}: every rank holds every weight"


SINGLE = 1e-5  # of models whose loss is computed in float32


def test_two_stages_train_as_one_process() -> None:
    jobs = [Job("gpt"), Job("gpt", "interleaved_1f1b", 4), Job("llama", tolerance=SINGLE), Job("t5", "gpipe", tolerance=SINGLE)]
    jobs += [Job("UNet", "list", 4), Job("MoE", tolerance=SINGLE), Job("OneLayerUsedOftenAndFrozen", None)]
    check(jobs, (2,), ("pp",))


class Bare(nn.Module):
    """Its last layers have no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(4, 4), nn.ModuleList(nn.Tanh() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.rest:
            x = layer(x) * 1.5
        return x.square().sum()


def train_bare() -> tuple[int, float, float]:
    """How many weights this rank has, and how far loss and norm of the gradients are from one process' after three steps."""
    torch.manual_seed(0)
    model, x = Bare().double(), torch.randn(4, 4, dtype=torch.float64)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    compiled = autoshard.compile(copy.deepcopy(model), mesh, pipeline=Pipelining(2, "1f1b", starts=("rest.1",)))
    compiled.prepare(x)
    found = []
    for each in (model, compiled):
        optimizer = torch.optim.AdamW(each.parameters(), 0.1)
        for _ in range(3):
            loss = each(x)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append((float(loss.detach()), float(whole(norm))))
    return len(compiled.state_dict()), abs(found[0][0] - found[1][0]), abs(found[0][1] - found[1][1])


def test_a_rank_without_weights_runs_the_same_loop() -> None:
    ranks = run_on_ranks(2, train_bare)
    assert [held for held, _, _ in ranks] == [2, 0]
    assert all(loss < 1e-12 and norm < 1e-6 for _, loss, norm in ranks)  # a norm of no gradients is told in float32


@pytest.mark.slow
def test_every_schedule_trains_as_one_process() -> None:
    check([Job("two_terms", schedule, 4) for schedule in (*NAMES, "list")], (2,), ("pp",))


@pytest.mark.slow
def test_four_stages_train_as_one_process() -> None:
    check([Job("gpt", "1f1b", 4), Job("ValuesManyRead", "zbv", 2), Job("SeveralInputsAndOutputs", "gpipe", 4)], (4,), ("pp",))


def test_stages_beside_data_parallelism() -> None:
    check([Job("gpt", "1f1b", 2, "fsdp"), Job("UNet", "1f1b", 2, "ddp"), Job("TokenWeighted", "zbv", 4)], (2, 2), ("pp", "dp"))


def test_stages_beside_tensor_parallelism() -> None:
    check([Job("gpt", "1f1b", 2, "megatron"), Job("MoE", "1f1b", 2, tolerance=SINGLE)], (2, 2), ("tp", "pp"))


@pytest.mark.slow
@pytest.mark.parametrize("names", [("pp",), ("pp", "dp"), ("pp", "tp")], ids=str)
@pytest.mark.parametrize("case", ["gpt", "llama", "t5", "UNet", "MoE", "bert"])
def test_every_schedule_on_every_mesh(case: str, names: tuple[str, ...]) -> None:
    tolerance = 1e-12 if case in ("gpt", "UNet") else SINGLE
    jobs = [Job(case, schedule, 4, tolerance=tolerance) for schedule in (*NAMES, "list") if len(names) > 1 or schedule != "dualpipev"]
    check(jobs, (4,) if len(names) == 1 else (2, 2), names)


# ------------------------------------------------------------------------------------------------------------- the loop


def batch(seed: int, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCAB, (2, rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    return ids[0], ids[1]


def gpt(mesh: DeviceMesh, layers: int = 2, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A pipeline, and the model on one process."""
    torch.manual_seed(seed)
    model = GPT(layers=layers).double()
    compiled = autoshard.compile(copy.deepcopy(model), mesh, pipeline=Pipelining(2, "1f1b"))
    compiled.prepare(*batch(0))
    return compiled, model


def same_gradients(compiled: nn.Module, model: nn.Module) -> None:
    """Of the weights that this rank holds."""
    alone = dict(model.named_parameters())
    for name, parameter in compiled.named_parameters():
        assert (parameter.grad is None) == (alone[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(whole(parameter.grad), alone[name].grad, rtol=1e-12, atol=1e-14)
    for each in (compiled, model):
        each.zero_grad()


def orders_of_losses(compiled: nn.Module, model: nn.Module) -> None:
    """Losses made and released in every order that a training loop knows."""
    for each in (compiled, model):  # accumulated
        for seed in (1, 2):
            (each(*batch(seed)) / 2).backward()
    same_gradients(compiled, model)
    for each in (compiled, model):  # zero_grad between forward and backward
        loss = each(*batch(3))
        each.zero_grad()
        loss.backward()
    same_gradients(compiled, model)
    for each in (compiled, model):  # a sum of two calls, and one that is thrown away
        a, _, b = each(*batch(1)), each(*batch(5)), each(*batch(2))
        (3 * a + b).backward()
    same_gradients(compiled, model)
    for each in (compiled, model):  # later first; a loss scaled by 0
        a, b, c = each(*batch(1)), each(*batch(2)), each(*batch(3))
        b.backward()
        a.backward()
        (0.0 * c).backward()
    same_gradients(compiled, model)
    for each in (compiled, model):  # frozen now and trained again
        for parameter in each.parameters():
            parameter.requires_grad_(False)
        name = next(iter(dict(model.named_parameters())))
        for held, parameter in each.named_parameters():
            parameter.requires_grad_(held != name)
        each(*batch(1)).backward()
    same_gradients(compiled, model)
    for each in (compiled, model):
        each.requires_grad_()
        each(*batch(1)).backward()
    same_gradients(compiled, model)


def evaluations(compiled: nn.Module, model: nn.Module) -> None:
    """Without gradients, with and without labels, in both modes: results on every rank, and training goes on."""
    ids, labels = batch(4)
    for is_training in (False, True):
        compiled.train(is_training)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(compiled(ids, labels), model(ids, labels), rtol=1e-12, atol=1e-12)
            assert not compiled(ids, labels).requires_grad
    compiled.eval()
    torch.testing.assert_close(compiled(ids).detach(), model(ids).detach(), rtol=1e-12, atol=1e-12)
    ids, labels = batch(6, rows=3)  # any number of rows without gradients
    with torch.inference_mode():
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-12, atol=1e-12)
    compiled.train()
    for each in (compiled, model):
        each(*batch(1)).backward()
    same_gradients(compiled, model)


def refusals(compiled: nn.Module, model: nn.Module) -> None:
    """What cannot be is refused on every rank alike, and the model goes on."""
    loss = compiled(*batch(1))
    loss.backward()
    with pytest.raises(RuntimeError, match="taken by an earlier backward; call the model again"):
        loss.backward()
    compiled.zero_grad()
    with pytest.raises(RuntimeError, match="leave out create_graph=True"), warnings.catch_warnings(action="ignore"):
        compiled(*batch(1)).backward(create_graph=True)
    compiled.zero_grad()
    with pytest.raises(
        PlanError, match=r"(?s)the loss inside the model.*def forward\(self, x, y\): return criterion\(self.model\(x\), y\)"
    ):
        compiled(batch(1)[0])
    with pytest.raises(InputError, match=r"length 7 along its batch dim 0, which does not divide in 2 microbatches; use a batch of 6 or 8"):
        compiled(*batch(1, rows=7))
    ids, labels = batch(1)
    labels[1::2, -1] = VOCAB  # no such class: the last stage raises
    with pytest.raises(StageError, match=r"^stage 1, forward of microbatch 0, failed on rank [13]: .*out of bounds"):
        compiled(ids, labels)
    ids[1::2, 0] = VOCAB  # no such token: the first stage raises
    with pytest.raises(StageError, match=r"^stage 0, forward of microbatch 0, failed on rank [02]: .*out of range"):
        compiled(ids, labels)
    for each in (compiled, model):
        each(*batch(1)).backward()
    same_gradients(compiled, model)


def two_models(mesh: DeviceMesh, compiled: nn.Module, model: nn.Module) -> None:
    """Their steps overlap."""
    other, alone = gpt(mesh, layers=1, seed=1)
    for first, second in ((compiled, other), (model, alone)):
        a, b = first(*batch(1)), second(*batch(2))
        c = first(*batch(3))
        (a + b).backward()
        c.backward()
    same_gradients(compiled, model)
    same_gradients(other, alone)


def checkpoints(mesh: DeviceMesh, compiled: nn.Module, model: nn.Module, folder: str) -> list[str]:
    """Out of a pipeline into plain tensors, and back; returns the names that this rank saved."""
    names = list(compiled.state_dict())
    torch.manual_seed(3)
    other = GPT(layers=2).double()
    dcp.save(compiled.state_dict(), checkpoint_id=f"{folder}/stages")
    plain = {name: torch.empty_like(value) for name, value in other.state_dict().items()}
    dcp.load(plain, checkpoint_id=f"{folder}/stages")
    for name, value in model.state_dict().items():
        assert torch.equal(plain[name], value), name
    dcp.save(other.state_dict(), checkpoint_id=f"{folder}/plain")
    own = compiled.state_dict()
    dcp.load(own, checkpoint_id=f"{folder}/plain")
    compiled.load_state_dict(own)
    assert_holds(compiled, other)
    compiled.load_state_dict(model.state_dict())
    assert_holds(compiled, model)
    with pytest.raises(PlanError, match="is not in the model"):
        compiled.load_state_dict({**model.state_dict(), "extra": torch.ones(1)})
    with pytest.raises(PlanError, match="is missing"):
        compiled.load_state_dict({})
    for each in (compiled, model):
        each(*batch(1)).backward()
    same_gradients(compiled, model)
    return names


def assert_holds(compiled: nn.Module, model: nn.Module) -> None:
    theirs = model.state_dict()
    for name, value in compiled.state_dict().items():
        assert torch.equal(whole(value), theirs[name]), name


def a_day(shape: tuple[int, ...], names: tuple[str, ...], folder: str) -> tuple[list[str], list[str]]:
    """All of the above on one model; returns the names of this rank's weights, and what failed."""
    mesh, wrong, held = init_device_mesh("cpu", shape, mesh_dim_names=names), [], list[str]()
    compiled, model = gpt(mesh)
    for part in (orders_of_losses, evaluations, refusals, two_models, checkpoints):
        try:
            if part is two_models:
                two_models(mesh, compiled, model)
            elif part is checkpoints:
                held = checkpoints(mesh, compiled, model, folder)
            else:
                part(compiled, model)
        except BaseException:
            wrong.append(f"rank {dist.get_rank()}, {part.__name__}: {traceback.format_exc()}")
            break
    return held, wrong


@pytest.mark.parametrize(("shape", "names"), [((2,), ("pp",)), pytest.param((2, 2), ("dp", "pp"), marks=pytest.mark.slow)], ids=str)
def test_a_training_loop_goes_on_as_on_one_process(shape: tuple[int, ...], names: tuple[str, ...], tmp_path: Path) -> None:
    ranks = run_on_ranks(2 ** len(shape), a_day, shape, names, str(tmp_path))
    wrong = [fault for _, faults in ranks for fault in faults]
    assert not wrong, "\n".join(wrong)
    assert set().union(*(held for held, _ in ranks)) == set(GPT(layers=2).state_dict())
    assert any(len(held) < len(GPT(layers=2).state_dict()) for held, _ in ranks)
