"""What a training script does with a compiled module, on real processes: each works as on the original module.

The checks of one test share their processes, as starting those takes longest. Every rank runs every check.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from models import EXAMPLES, GPT, MLP, ConvNet, hf_gpt2
from processes import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import autoshard

Check = Callable[[DeviceMesh], None]


def run_checks(checks: list[Check], shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for check in checks:
        torch.manual_seed(0)
        try:
            check(mesh)
        except Exception as error:
            error.add_note(f"in {check.__name__}")
            raise


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_state(mine: nn.Module, theirs: nn.Module, what: Callable = lambda tensor: tensor) -> None:
    for (name, a), (other, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert (what(a) is None) == (what(b) is None), name
        if what(a) is not None:
            torch.testing.assert_close(whole(what(a)), whole(what(b)), rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_gradients(mine: nn.Module, theirs: nn.Module) -> None:
    assert_same_state(mine, theirs, lambda parameter: parameter.grad)


def pair(mesh: DeviceMesh, example: str = "gpt", template: str = "megatron", **keywords: Any) -> tuple[nn.Module, nn.Module]:
    """A compiled model and its original."""
    model = EXAMPLES[example].model()
    return autoshard.compile(model, mesh, template=template, **keywords), copy.deepcopy(model)


def batch(example: str = "gpt", seed: int = 0) -> tuple[Any, ...]:
    return EXAMPLES[example].batch(seed)[0]


def everyones(value: torch.Tensor) -> list[torch.Tensor]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


# ------------------------------------------------------------------------------------------------------ training scripts


def gradients_accumulate(mesh: DeviceMesh) -> None:
    compiled, reference = pair(mesh)
    for model in (compiled, reference):
        for seed in range(3):
            (model(*batch(seed=seed)) / 3).backward()
    assert_same_gradients(compiled, reference)


def clipping_returns_the_norm_of_the_whole_model(mesh: DeviceMesh) -> None:
    compiled, reference = pair(mesh, template="fsdp")
    norms = []
    for model in (compiled, reference):
        model(*batch()).backward()
        norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
    torch.testing.assert_close(*norms)
    assert_same_gradients(compiled, reference)


def evaluation_has_its_own_plan_and_the_same_parameters(mesh: DeviceMesh) -> None:
    compiled, reference = pair(mesh, "conv_net", "ddp")
    args = batch("conv_net")
    before = dict(compiled.named_parameters())
    compiled(*args), reference(*args)
    training = compiled.plan
    compiled.eval(), reference.eval()
    with torch.no_grad():
        (loss, extra), (expected, expected_extra) = compiled(*args), reference(*args)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(extra, expected_extra)
    assert training.program.is_training
    assert not compiled.plan.program.is_training
    assert all(before[name] is parameter for name, parameter in compiled.named_parameters())
    compiled.train()
    compiled(*args)
    assert compiled.plan is training
    assert int(compiled.state_dict()["features.1.num_batches_tracked"]) == 2


def a_submodule_may_be_in_evaluation_mode(mesh: DeviceMesh) -> None:
    compiled, reference = pair(mesh, "conv_net", "ddp")
    args = batch("conv_net")
    for model in (compiled, reference):
        model.features[1].eval()
        model(*args)[0].backward()
    assert_same_gradients(compiled, reference)
    counts = [int(compiled.state_dict()[f"features.{k}.num_batches_tracked"]) for k in (1, 5)]
    assert counts == [0, 1]


def without_gradients_nothing_is_recorded(mesh: DeviceMesh) -> None:
    compiled, reference = pair(mesh)
    with torch.no_grad():
        loss = compiled(*batch())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(*batch()).detach())


def parameters_freeze_and_thaw(mesh: DeviceMesh) -> None:
    compiled, reference = pair(mesh)
    for model in (compiled, reference):
        model.tok.weight.requires_grad_(False)
        model.blocks.requires_grad_(False)
        model(*batch()).backward()
    assert_same_gradients(compiled, reference)
    for model in (compiled, reference):
        model.requires_grad_(True)
        model.zero_grad()
        model(*batch()).backward()
    assert_same_gradients(compiled, reference)
    assert compiled.blocks[0].up.weight.grad is not None
    for model in (compiled, reference):
        model.requires_grad_(False)
    torch.testing.assert_close(compiled(*batch()), reference(*batch()))


def tied_weights_stay_one_parameter(mesh: DeviceMesh) -> None:
    compiled, reference = pair(mesh)
    compiled.prepare(*batch())
    assert compiled.head.weight is compiled.tok.weight
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in reference.named_parameters()]
    assert list(compiled.state_dict()) == list(reference.state_dict())
    assert all(isinstance(parameter, DTensor) for parameter in compiled.parameters())


def two_compiled_models_live_side_by_side(mesh: DeviceMesh) -> None:
    (first, first_reference), (second, second_reference) = pair(mesh, template="fsdp"), pair(mesh, "encoder", "megatron")
    losses = [first(*batch()), second(*batch("encoder")), first_reference(*batch()), second_reference(*batch("encoder"))]
    torch.testing.assert_close(losses[0] + losses[1], losses[2] + losses[3])
    (losses[0] + losses[1]).backward()
    (losses[2] + losses[3]).backward()
    assert_same_gradients(first, first_reference)
    assert_same_gradients(second, second_reference)


def the_optimizer_may_come_before_the_first_step(mesh: DeviceMesh) -> None:
    compiled, reference = pair(mesh, template="fsdp")
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (compiled, reference)]
    for model, optimizer in zip((compiled, reference), optimizers, strict=True):
        model(*batch()).backward()
        optimizer.step()
    assert_same_state(compiled, reference)
    assert any(isinstance(p, Shard) for parameter in compiled.parameters() for p in parameter.placements)


def the_dtype_may_change(mesh: DeviceMesh) -> None:
    model = MLP()
    compiled = autoshard.compile(model, mesh, template="megatron")
    x = torch.randn(4, 8)
    compiled(x)
    compiled.double()
    torch.testing.assert_close(compiled(x.double()), copy.deepcopy(model).double()(x.double()), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------- arguments and results


def arguments_may_be_distributed(mesh: DeviceMesh) -> None:
    model = MLP().double()
    compiled, reference = autoshard.compile(model, mesh, template="megatron"), copy.deepcopy(model)
    x = torch.randn(4, 8, dtype=torch.float64)
    for placement in (Shard(0), Replicate(), Shard(1)):
        mine = distribute_tensor(x, mesh, [placement] * mesh.ndim).requires_grad_()
        theirs = x.clone().requires_grad_()
        result, expected = compiled(mine), reference(theirs)
        torch.testing.assert_close(result, expected)
        result.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)
    assert_same_gradients(compiled, reference)


def a_plan_for_whole_arguments_is_not_used_for_split_ones(mesh: DeviceMesh) -> None:
    model = MLP().double()
    x = torch.randn(4, 8, dtype=torch.float64)
    plan = autoshard.plan(model, mesh, (x,), template="megatron")
    compiled = plan.apply(model, mesh)
    torch.testing.assert_close(compiled(distribute_tensor(x, mesh, [Shard(0)] * mesh.ndim)), model(x))
    assert compiled.plan is not plan
    torch.testing.assert_close(compiled(x), model(x))
    assert compiled.plan is plan


def arguments_may_be_this_ranks_part(mesh: DeviceMesh) -> None:
    compiled, reference = pair(mesh, inputs="local", template="ddp")
    axis = mesh.mesh_dim_names.index("dp") if "dp" in mesh.mesh_dim_names else 0
    parts = [x.chunk(mesh.size(axis))[mesh.get_local_rank(axis)] for x in batch()]
    loss, expected = compiled(*parts), reference(*batch())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(compiled, reference)


def a_plan_for_this_ranks_part_is_used(mesh: DeviceMesh) -> None:
    model = MLP().double()
    x = torch.randn(4, 8, dtype=torch.float64)
    plan = autoshard.plan(model, mesh, (x,), inputs="local")
    axis = mesh.mesh_dim_names.index("dp") if "dp" in mesh.mesh_dim_names else 0
    compiled = plan.apply(model, mesh)
    compiled(x.chunk(mesh.size(axis))[mesh.get_local_rank(axis)])
    assert compiled.plan is plan


def results_may_be_distributed(mesh: DeviceMesh) -> None:
    model = MLP().double()
    compiled = autoshard.compile(model, mesh, template="ddp", outputs="dtensor")
    reference, x = copy.deepcopy(model), torch.randn(4, 8, dtype=torch.float64)
    result = compiled(x)
    assert isinstance(result, DTensor)
    assert any(isinstance(placement, Shard) for placement in result.placements)
    torch.testing.assert_close(result.full_tensor(), reference(x))
    result.square().sum().full_tensor().backward()
    reference(x).square().sum().backward()
    assert_same_gradients(compiled, reference)


def results_keep_the_models_own_structure(mesh: DeviceMesh) -> None:
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

    kwargs = EXAMPLES["hf_gpt2"].batch(0)[1]
    torch.manual_seed(0)
    model = hf_gpt2()
    compiled = autoshard.compile(model, mesh, template="megatron")
    result = compiled(**kwargs)
    assert type(result) is CausalLMOutputWithCrossAttentions
    assert list(result) == ["loss", "logits"]
    torch.testing.assert_close(result.logits, model(**kwargs).logits, rtol=1e-4, atol=1e-5)
    assert compiled.config is not None
    plain = compiled(**kwargs, return_dict=False)
    assert type(plain) is tuple
    torch.testing.assert_close(plain[0], result.loss)


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()

    def forward(self, x: torch.Tensor, scale: float = 1.0, negate: bool = False) -> dict[str, Any]:
        y = self.inner(x) * scale
        return {"y": -y if negate else y, "count": 3, "none": None, "pair": [y.sum(), (y,)]}


def constants_pass_through(mesh: DeviceMesh) -> None:
    model, x = Structured().double(), torch.randn(4, 8, dtype=torch.float64)
    for outputs in ("whole", "dtensor"):
        compiled = autoshard.compile(model, mesh, template="ddp", outputs=outputs)
        for arguments in ((x,), (x, 3.0), (x, 3.0, True)):
            result, expected = compiled(*arguments), model(*arguments)
            assert list(result) == list(expected)
            assert (result["count"], result["none"]) == (3, None)
            torch.testing.assert_close(whole(result["y"]), expected["y"])
            torch.testing.assert_close(result["pair"][0], expected["pair"][0])
            torch.testing.assert_close(whole(result["pair"][1][0]), expected["pair"][1][0])


# --------------------------------------------------------------------------------------------------------------- dropout


class Drop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x * self.scale, 0.25, self.training)


def dropout_is_equal_where_values_are_and_differs_where_they_are_split(mesh: DeviceMesh) -> None:
    x = torch.ones(2048, 8)
    for layout in ("R", "S(0)"):
        compiled = autoshard.compile(Drop(), mesh, constraints={"input:x": layout})
        result = compiled(x)
        kept = (result != 0).double().mean().item()
        assert abs(kept - 0.75) < 0.02, kept
        torch.testing.assert_close(result[result != 0], torch.full_like(result[result != 0], 4 / 3))
        assert all(torch.equal(result, other) for other in everyones(result.detach()))
        pieces = (result != 0).chunk(mesh.size())
        assert not any(torch.equal(pieces[0], piece) for piece in pieces[1:]), layout
        result.sum().backward()
        torch.testing.assert_close(compiled.scale.grad.full_tensor(), result.detach().sum())


def dropout_is_reproducible_by_seed(mesh: DeviceMesh) -> None:
    def losses(seed: int) -> list[float]:
        torch.manual_seed(7)
        model = GPT(dropout=0.2)
        torch.manual_seed(seed)
        compiled = autoshard.compile(model, mesh, template="megatron")
        return [compiled(*batch()).item() for _ in range(3)]

    first = losses(1)
    assert losses(1) == first
    assert losses(2) != first
    assert len(set(first)) == 3
    assert all(everyones(torch.tensor(first))[0].tolist() == other.tolist() for other in everyones(torch.tensor(first)))


def dropout_leaves_the_expectation(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model = GPT(dropout=0.1)
    compiled = autoshard.compile(model, mesh, template="megatron_sp")
    with torch.no_grad():
        samples = torch.stack([compiled(*batch()) for _ in range(60)])
        expected = torch.stack([model(*batch()) for _ in range(60)])
    noise = (samples.var() / 60 + expected.var() / 60).sqrt()
    assert abs(samples.mean() - expected.mean()) < 5 * noise
    assert 0.4 < samples.std() / expected.std() < 2.5


# ----------------------------------------------------------------------------------------------------- saving and loading


def state_dicts_carry_over_to_another_template(mesh: DeviceMesh) -> None:
    first, reference = pair(mesh)
    first.prepare(*batch())
    full = {name: whole(tensor) for name, tensor in first.state_dict().items()}
    assert list(full) == list(reference.state_dict())
    for name, tensor in reference.state_dict().items():
        assert torch.equal(full[name], tensor), name
    for template in ("fsdp", "megatron_sp"):
        for given in (full, first.state_dict()):
            second = autoshard.compile(EXAMPLES["gpt"].model(seed=1), mesh, template=template, example_inputs=batch())
            second.load_state_dict(given)
            assert_same_state(second, reference)
            assert second.head.weight is second.tok.weight
            torch.testing.assert_close(second(*batch()), reference(*batch()))


def checkpoints_move_between_templates_and_meshes(mesh: DeviceMesh) -> None:
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    flat = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))
    reference = EXAMPLES["gpt"].model()
    setups = [(mesh, "megatron"), (flat, "fsdp")]
    for number, (where, template) in enumerate(setups):
        source = autoshard.compile(EXAMPLES["gpt"].model(), where, template=template, example_inputs=batch())
        dcp.save(source.state_dict(), checkpoint_id=f"{folder[0]}/{number}")
        for target_mesh, target_template in setups:
            target = autoshard.compile(EXAMPLES["gpt"].model(seed=1), target_mesh, template=target_template, example_inputs=batch())
            state = target.state_dict()
            dcp.load(state, checkpoint_id=f"{folder[0]}/{number}")
            target.load_state_dict(state)
            assert_same_state(target, reference)


def optimizers_are_saved_and_loaded(mesh: DeviceMesh) -> None:
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            model(*batch(seed=seed)).backward()
            optimizer.step()
            optimizer.zero_grad()

    first, reference = pair(mesh, template="megatron")
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-6, foreach=True) for model in (first, reference)]
    steps(first, optimizers[0], range(2))
    steps(reference, optimizers[1], range(4))
    dcp.save({"model": first.state_dict(), "optimizer": autoshard.checkpointable(optimizers[0].state_dict())}, checkpoint_id=folder[0])
    second = autoshard.compile(EXAMPLES["gpt"].model(seed=1), mesh, template="fsdp")
    optimizer = torch.optim.AdamW(second.parameters(), 1e-2, eps=1e-6, foreach=True)
    steps(second, optimizer, range(1))
    state = {"model": second.state_dict(), "optimizer": autoshard.checkpointable(optimizer.state_dict())}
    dcp.load(state, checkpoint_id=folder[0])
    second.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    steps(second, optimizer, range(2, 4))
    assert_same_state(second, reference)


def a_meta_model_is_materialised_shard_by_shard(mesh: DeviceMesh) -> None:
    reference = EXAMPLES["gpt"].model()
    with torch.device("meta"):
        model = GPT().double()
    model.head.weight = model.tok.weight
    compiled = autoshard.compile(model, mesh, template="megatron", example_inputs=batch())
    assert all(parameter.is_meta for parameter in compiled.parameters())
    asked: list[str] = []

    def value(name: str) -> torch.Tensor:
        asked.append(name)
        return reference.state_dict()[name]

    compiled.materialize(value)
    assert asked == [name for name, _ in reference.named_parameters()]
    for parameter in compiled.parameters():
        size = parameter.to_local().untyped_storage().nbytes()
        assert size == parameter.to_local().numel() * 8
        assert size < parameter.numel() * 8 or all(isinstance(p, Replicate) for p in parameter.placements)
    held = sum(parameter.to_local().numel() for parameter in compiled.parameters())
    assert held < 0.7 * sum(parameter.numel() for parameter in reference.parameters())
    loss = compiled(*batch())
    torch.testing.assert_close(loss, reference(*batch()))
    loss.backward()
    reference(*batch()).backward()
    assert_same_gradients(compiled, reference)


def a_meta_model_with_buffers_is_materialised(mesh: DeviceMesh) -> None:
    reference = EXAMPLES["conv_net"].model()
    with torch.device("meta"):
        model = ConvNet().double()
    compiled = autoshard.compile(model, mesh, template="fsdp", example_inputs=batch("conv_net"))
    compiled.materialize(reference.state_dict())
    torch.testing.assert_close(compiled(*batch("conv_net"))[0], reference(*batch("conv_net"))[0])
    torch.testing.assert_close(compiled.state_dict()["features.1.running_var"], reference.state_dict()["features.1.running_var"])


def a_plan_saved_by_one_rank_serves_all(mesh: DeviceMesh) -> None:
    model = EXAMPLES["gpt"].model()
    paths = [f"{tempfile.mkdtemp()}/plan.json" if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(paths)
    if dist.get_rank() == 0:
        autoshard.plan(model, autoshard.MeshSpec.of(mesh), batch(), template="megatron_sp").save(paths[0])
    dist.barrier()
    plan = autoshard.Plan.load(Path(paths[0]))
    compiled = plan.apply(model, mesh)
    loss, expected = compiled(*batch()), model(*batch())
    assert compiled.plan is plan
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(compiled, model)


# --------------------------------------------------------------------------------------------------------- torch.compile


def torch_compile_makes_one_graph_of_equal_gradients(mesh: DeviceMesh) -> None:
    from torch._dynamo.utils import counters

    compiled, reference = pair(mesh, template="megatron_sp", example_inputs=batch())
    compiled(*batch())  # planned and checked before
    fast = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        loss, expected = fast(*batch(seed=seed)), reference(*batch(seed=seed))
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
    assert_same_gradients(compiled, reference)
    assert counters["stats"]["unique_graphs"] == 1


def torch_compile_before_and_after_the_plan(mesh: DeviceMesh) -> None:
    for options in ({}, {"example_inputs": batch()}):
        compiled, reference = pair(mesh, template="fsdp", **options)
        fast = torch.compile(compiled, backend="aot_eager")
        for seed in range(2):
            loss, expected = fast(*batch(seed=seed)), reference(*batch(seed=seed))
            torch.testing.assert_close(loss, expected)
            loss.backward()
            expected.backward()
        assert_same_gradients(compiled, reference)


TRAINING = [
    gradients_accumulate,
    clipping_returns_the_norm_of_the_whole_model,
    evaluation_has_its_own_plan_and_the_same_parameters,
    a_submodule_may_be_in_evaluation_mode,
    without_gradients_nothing_is_recorded,
    parameters_freeze_and_thaw,
    tied_weights_stay_one_parameter,
    two_compiled_models_live_side_by_side,
    the_optimizer_may_come_before_the_first_step,
    the_dtype_may_change,
]
VALUES = [
    arguments_may_be_distributed,
    a_plan_for_whole_arguments_is_not_used_for_split_ones,
    arguments_may_be_this_ranks_part,
    a_plan_for_this_ranks_part_is_used,
    results_may_be_distributed,
    results_keep_the_models_own_structure,
    constants_pass_through,
    dropout_is_equal_where_values_are_and_differs_where_they_are_split,
    dropout_is_reproducible_by_seed,
    dropout_leaves_the_expectation,
]
FILES = [
    state_dicts_carry_over_to_another_template,
    a_meta_model_is_materialised_shard_by_shard,
    a_meta_model_with_buffers_is_materialised,
    a_plan_saved_by_one_rank_serves_all,
]


@pytest.mark.parametrize("checks", [TRAINING, VALUES, FILES], ids=["training", "values", "files"])
def test_two_ranks(checks: list[Check]) -> None:
    run_on_ranks(2, run_checks, checks, (2,), ("tp",))


def test_torch_compile() -> None:
    run_on_ranks(2, run_checks, [torch_compile_makes_one_graph_of_equal_gradients, torch_compile_before_and_after_the_plan], (2,), ("tp",))


def test_four_ranks() -> None:
    checks = [
        checkpoints_move_between_templates_and_meshes,
        optimizers_are_saved_and_loaded,
        arguments_may_be_distributed,
        arguments_may_be_this_ranks_part,
        results_may_be_distributed,
        dropout_is_equal_where_values_are_and_differs_where_they_are_split,
    ]
    run_on_ranks(4, run_checks, checks, (2, 2), ("dp", "tp"))
