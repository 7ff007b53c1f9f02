"""Collectives in two parts between real processes: values and gradients bit for bit as in one part, whatever else autograd does."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from typing import Any

import torch
from models import EXAMPLES
from processes import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import autoshard
from autoshard import runtime
from autoshard.conversions import STARTS
from autoshard.program import facts

PLANS: list[dict[str, Any]] = [{"template": "ddp"}, {"template": "fsdp"}, {"template": "megatron"}, {"template": "megatron_sp"}]
AUTO = autoshard.Hardware.uniform(  # so slow that splitting pays
    "slow",
    flops_per_s=6e5,
    memory_bytes_per_s=1e9,
    memory_bytes=1e9,
    link_bytes_per_s=1e9,
    collective_latency_s=1e-6,
    kernel_latency_s=1e-6,
)
DIMS: dict[str, tuple] = {
    "all_gather": (0,),
    "all_gather_invariant": (1,),
    "reduce_scatter": (1,),
    "slice_invariant": (1,),
    "all_to_all": (0, (), 1, ()),
}


def mesh_of_two() -> DeviceMesh:
    return init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))


def each(*checks: Callable[[DeviceMesh], None]) -> list[str]:
    """Run every check on this rank; returns what went wrong."""
    mesh, wrong = mesh_of_two(), []
    for check in checks:
        try:
            check(mesh)
        except Exception:
            wrong.append(f"{check.__name__}: {traceback.format_exc()}")
    return wrong


def axis_of(mesh: DeviceMesh) -> runtime.Axis:
    return runtime.Axis("dp", 2, mesh.get_local_rank("dp"), mesh.get_group("dp").group_name)


# -------------------------------------------------------------------------------------------------------------- rows


def rows_give_the_same(mesh: DeviceMesh) -> None:
    """Each row, on dims that come first and others, with segments, other work in between, and a source nobody else holds."""
    axis = axis_of(mesh)
    cases = [(row.name, DIMS.get(row.name, ())) for row in STARTS.values()]
    cases += [("all_gather", (1,)), ("all_gather", (1, (12, 4))), ("reduce_scatter", (0,)), ("reduce_scatter", (1, (4, 4)))]
    cases += [
        ("slice_invariant", (0,)),
        ("all_to_all", (1, (), 0, ())),
        ("all_to_all", (1, (12, 4), 0, ())),
        ("all_gather_invariant", (0,)),
    ]
    for name, dims in cases:
        results = []
        for is_split in (False, True):
            torch.manual_seed(axis.rank)
            leaf = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
            x = leaf * 2
            if is_split:
                started = getattr(runtime, f"start_{name}")(x, axis, *dims)
                del x
                scratch = [torch.full((4, 8), float(k), dtype=torch.float64) for k in range(8)]  # would take the source's memory
                y = runtime.wait(started)
                del scratch
            else:
                y = getattr(runtime, name)(x, axis, *dims)
            torch.manual_seed(5)
            (y * torch.randn(y.shape, dtype=y.dtype)).sin().sum().backward()
            results.append((y.detach(), leaf.grad))
        for expected, found in zip(*results, strict=True):
            assert torch.equal(expected, found), (name, dims)


def a_gradient_that_two_branches_read(mesh: DeviceMesh) -> None:
    """`a + b` hands one gradient to both; while it is being sent for `a`, autograd adds to it for `b`."""
    axis, found = axis_of(mesh), []
    for is_split in (False, True):
        torch.manual_seed(axis.rank)
        leaf = torch.randn(512, 512, dtype=torch.float64, requires_grad=True)
        b = torch.randn(1024, 512, dtype=torch.float64, requires_grad=True)
        other = b * 1.5
        extra = other.sum() * 0.25
        a = runtime.wait(runtime.start_all_gather(leaf, axis, 0)) if is_split else runtime.all_gather(leaf, axis, 0)
        ((a + other).square().sum() + extra).backward()
        found.append((leaf.grad, b.grad))
    for expected, split in zip(*found, strict=True):
        assert torch.equal(expected, split)


# ------------------------------------------------------------------------------------------------------------ autograd


def two_layers(mesh: DeviceMesh, is_split: bool) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """Two FSDP layers, the second one's weight on its way while the first runs."""
    axis = axis_of(mesh)
    torch.manual_seed(axis.rank)
    weights = [torch.randn(4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def forward(x: Tensor) -> Tensor:
        if not is_split:
            return torch.tanh(torch.tanh(x @ runtime.all_gather(weights[0], axis, 0)) @ runtime.all_gather(weights[1], axis, 0)).sum()
        first, second = (runtime.start_all_gather(weight, axis, 0) for weight in weights)
        return torch.tanh(torch.tanh(x @ runtime.wait(first)) @ runtime.wait(second)).sum()

    return forward, weights


def second_gradients(mesh: DeviceMesh) -> None:
    found = []
    for is_split in (False, True):
        forward, weights = two_layers(mesh, is_split)
        loss = forward(torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8))
        firsts = torch.autograd.grad(loss, weights, create_graph=True)
        found.append([*firsts, *torch.autograd.grad(sum(g.square().sum() for g in firsts), weights)])  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def backward_twice_and_of_one_weight(mesh: DeviceMesh) -> None:
    found = []
    for is_split in (False, True):
        forward, weights = two_layers(mesh, is_split)
        loss = forward(torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8))
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        found.append([*(w.grad for w in weights), *torch.autograd.grad(loss, weights[1:])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def anomaly_mode(mesh: DeviceMesh) -> None:
    """It looks for nan in what backward hands on, which is not there yet where the backward is split: it is not, then."""
    forward, weights = two_layers(mesh, True)
    with torch.autograd.detect_anomaly(check_nan=True):
        forward(torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)).backward()
    anomalous = [w.grad for w in weights]
    forward, weights = two_layers(mesh, False)
    forward(torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)).backward()
    assert all(torch.equal(a, w.grad) for a, w in zip(anomalous, weights, strict=True))  # type: ignore[arg-type]


def without_gradients(mesh: DeviceMesh) -> None:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert torch.equal(two_layers(mesh, True)[0](x), two_layers(mesh, False)[0](x))


# ---------------------------------------------------------------------------------------------------- the shipped path


def run_model(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    result: Any = model(*args, **kwargs)
    loss = result if isinstance(result, Tensor) else result.loss
    loss.backward()
    grads = [p.grad.to_local().clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    return [loss.detach(), *grads]


def plans_give_the_same(mesh: DeviceMesh) -> None:
    model, (args, kwargs) = EXAMPLES["gpt"].model(), EXAMPLES["gpt"].batch(0)
    asked: list[dict[str, Any]] = [*PLANS, {"seed": 3}, {}]
    counts = []
    for one in asked:
        found = []
        for overlap in (False, True):
            given = {"hardware": AUTO} | one
            options = autoshard.Options(seed=given.pop("seed", None), overlap=overlap)
            compiled = autoshard.compile(copy.deepcopy(model), mesh, options=options, example_inputs=args, example_kwargs=kwargs, **given)
            found.append([*run_model(compiled, args, kwargs), *run_model(compiled, args, kwargs)])
            with torch.no_grad():
                found[-1].append(compiled(*args, **kwargs))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), one
        counts.append(sum(facts(node).role == "start" for node in compiled.plan.program.graph.nodes))
    assert all(counts[:2]), counts
    assert sum(counts[2:]) > 0, counts


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16)).double()


def whole_graphs_of_torch_compile(mesh: DeviceMesh) -> None:
    x = torch.linspace(-1, 1, 4096, dtype=torch.float64).view(256, 16)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).square().mean()

    expected: list[Tensor] = []
    for overlap, backend in ((False, None), (True, None), (True, "aot_eager")):
        compiled = autoshard.compile(Loss(), mesh, template="fsdp", options=autoshard.Options(overlap=overlap), example_inputs=(x,))
        compiled(x)  # torch.compile sees a model that has checked its inputs
        if backend is not None:
            assert any(True for _ in compiled.plan.program.nodes("start"))
        run = torch.compile(compiled, backend=backend, fullgraph=True) if backend else compiled
        found = run_model(run, (x,), {})  # type: ignore[arg-type]
        expected = expected or found
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), backend


def checks() -> list[str]:
    return each(
        rows_give_the_same,
        a_gradient_that_two_branches_read,
        second_gradients,
        backward_twice_and_of_one_weight,
        anomaly_mode,
        without_gradients,
        plans_give_the_same,
        whole_graphs_of_torch_compile,
    )


def test_two_parts_are_one_on_real_processes() -> None:
    wrong = [fault for rank in run_on_ranks(2, checks) for fault in rank]
    assert not wrong, "\n".join(wrong)
