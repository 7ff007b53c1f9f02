"""plan.memory: predicted bytes against the allocator's, what the curve and the table say, the caching allocator, and bad input."""

from __future__ import annotations

import io

import pytest
import torch
from allocation_tracker import compiled, fake_group, measure_step
from rich.console import Console
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo.models import ENTRIES, build

import autoshard
from autoshard.caching_allocator import MIB, CachingAllocator
from autoshard.errors import InputError, PlanError
from autoshard.memory import KINDS
from autoshard.mesh import MeshSpec
from autoshard.placements import shard
from autoshard.program import facts
from autoshard.rehearsal import OPTIMIZERS, rehearse

pytestmark = pytest.mark.filterwarnings("ignore")  # libraries of models warn of their own plans
STEPS = [
    ("nanogpt", "a=2", "fsdp", "adamw"),
    ("mlp", "a=2", "ddp", "adafactor"),
    ("two_tower", "a=2,b=2", "megatron", "sgd_momentum"),
    ("unet_plain", "a=2", "fsdp", "adamw"),
    ("convnet_batchnorm", "a=2,b=2", "fsdp", "sgd"),
]


@pytest.mark.parametrize(("name", "mesh", "kind", "optimizer"), STEPS)
def test_the_peak_is_the_allocators(name: str, mesh: str, kind: str, optimizer: str) -> None:
    """Within 5 %, the bar of the median; what is at rest is exact."""
    with fake_group(MeshSpec.of(mesh).size):
        model, args, kwargs = build(ENTRIES[name], "train")
        sharded = compiled(model, mesh, args, kwargs, kind)
        measured = measure_step(sharded, args, kwargs, OPTIMIZERS[optimizer])
        memory = sharded.plan.memory(optimizer)
    rest = ("parameters", "optimizer state", "buffers", "inputs")
    assert sum(memory.at_peak[kind] for kind in rest) == measured.rest_bytes
    assert memory.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.05)
    assert measured.left_bytes == 0


class Net(nn.Module):
    def __init__(self, is_checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))
        self.is_checkpointed = is_checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x))
        return x.square().mean()


def planned(
    mesh: str = "dp=2", batch: int = 64, template: str = "fsdp", is_checkpointed: bool = False, **options: object
) -> autoshard.Plan:
    return autoshard.plan(Net(is_checkpointed), mesh, (torch.zeros(batch, 64),), template=template, **options)  # type: ignore[arg-type]


def test_what_rests_follows_from_layouts_and_the_optimizer() -> None:
    plan = planned()
    held = sum(
        shard(torch.empty(facts(node).value.shape, device="meta"), facts(node).layout, plan.mesh, (0,)).numel() * 4
        for node in plan.program.parameters().values()
    )
    for optimizer, moments in (("sgd", 0), ("sgd_momentum", 1), ("adam", 2), ("adamw", 2)):
        at = plan.memory(optimizer).at_peak
        assert at["parameters"] == held
        steps = 4 * len(plan.program.parameters()) if moments == 2 else 0
        assert at["optimizer state"] == moments * held + steps
    last = plan.memory("sgd").curve[-1]
    assert (last.phase, last.kinds()["gradients"]) == ("optimizer", held)


def test_the_curve_goes_through_the_step() -> None:
    memory = planned().memory()
    phases = [point.phase for point in memory.curve]
    assert phases == sorted(phases, key=["forward", "backward", "optimizer"].index)
    assert memory.peak_bytes == max(point.total_bytes for point in memory.curve) == sum(memory.at_peak.values())
    assert {kind: sum(kinds.get(kind, 0) for kinds in memory.at_peak_by_module.values()) for kind in KINDS} == memory.at_peak
    modules = [point.module for point in memory.curve if point.phase == "backward" and "blocks" in point.module]
    assert modules[0].startswith("blocks.3")
    assert modules[-1].startswith("blocks.0")
    kept = [point.kinds()["activations"] for point in memory.curve if point.phase == "forward"]
    assert kept[-1] == max(kept)  # nothing that backward needs is let go before


def test_gathered_weights_of_fsdp_are_seen() -> None:
    sharded, replicated = planned().memory(), planned(template="ddp").memory()
    assert max(point.kinds()["gathered weights"] for point in sharded.curve) > 0
    assert max(point.kinds()["gathered weights"] for point in replicated.curve) == 0
    assert max(point.kinds()["collective buffers"] for point in sharded.curve) > 0


def test_checkpointed_regions_keep_less() -> None:
    plain, checkpointed = (planned(batch=1024, is_checkpointed=flag).memory("sgd") for flag in (False, True))
    assert checkpointed.peak_bytes < 0.7 * plain.peak_bytes
    assert max(p.kinds()["activations"] for p in checkpointed.curve if p.phase == "backward") > checkpointed.curve[0].kinds()["activations"]


def test_inference_keeps_nothing() -> None:
    training, inference = planned(batch=1024).memory(), planned(batch=1024).memory(None)
    assert {point.phase for point in inference.curve} == {"forward"}
    assert inference.peak_bytes < 0.5 * training.peak_bytes
    assert inference.at_peak["optimizer state"] == inference.at_peak["gradients"] == 0


def test_any_torch_optimizer_can_be_asked() -> None:
    def rmsprop(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(parameters, centered=True, momentum=0.9)

    held = planned().memory("sgd").at_peak["parameters"]
    memory = planned().memory(rmsprop)
    assert memory.optimizer == "rmsprop"
    assert 3 * held <= memory.at_peak["optimizer state"] <= 3 * held + 1024
    together, one_by_one = (planned().memory(lambda ps, is_f=f: torch.optim.AdamW(ps, foreach=is_f)) for f in (True, False))
    assert together.peak_of("optimizer") > one_by_one.peak_of("optimizer")


def test_autocast_casts_are_counted() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    plain = planned(batch=1024).memory("sgd")
    cast = autoshard.plan(Cast(), "dp=2", (torch.zeros(1024, 64),), template="fsdp").memory("sgd")
    assert cast.peak_of("forward") < plain.peak_of("forward")


def test_on_a_gpu_blocks_are_rounded_and_segments_leave_a_margin() -> None:
    plan = planned(hardware="h100")
    memory = plan.memory("sgd")
    assert memory.device == "cuda"
    assert memory.at_peak["workspace"] >= 33_554_432  # cuBLAS's
    assert all(count % 512 == 0 for count in memory.at_peak.values())
    assert memory.margin_bytes > 0
    assert memory.reserved_bytes % (2 * MIB) == 0
    assert plan.memory("sgd", device="cpu").margin_bytes == 0


def test_dropout_keeps_a_byte_per_number_on_a_gpu() -> None:
    model = nn.Sequential(nn.Linear(64, 4096), nn.Dropout(0.5), nn.Linear(4096, 8))
    plan = autoshard.plan(model, "dp=2", (torch.zeros(64, 64),), template="ddp", hardware="h100")
    counts = [max(p.kinds()["activations"] for p in plan.memory("sgd", device).curve) for device in ("cpu", "cuda")]  # type: ignore[arg-type]
    assert counts[0] - counts[1] == pytest.approx(3 * 32 * 4096, rel=0.05)


def test_the_table_names_the_peak() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(planned().memory().table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("at the peak", "in backward", "optimizer state", "activations", "blocks.0"):
        assert words in text


def test_an_unknown_optimizer_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="optimizer='lion' is not known; there are 'sgd', 'sgd_momentum', 'adam'"):
        planned().memory("lion")


def test_a_step_that_must_see_values_is_one_clear_error() -> None:
    def fails(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        raise ValueError("no such rate")

    with pytest.raises(PlanError, match="does not run on tensors without memory: ValueError: no such rate"):
        planned().memory(fails)
    plan = planned()
    plan.program.source = plan.program.source.replace("aten.gelu.default(", "float(", 1)
    with pytest.raises(PlanError, match=r"without memory, at blocks_0_1_gelu \(blocks\.0\.1"):
        plan.memory()


def test_what_is_not_counted_is_said() -> None:
    assert planned().memory().notes == ()
    assert "does not run on split DTensors (blocks.0.0.weight and 15 more" in planned().memory("adafactor").notes[0]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    plan = autoshard.plan(model, "dp=2", (torch.zeros(4, 3, 8, 8),), hardware="h100", template="ddp")
    assert plan.memory().notes == ("Workspace that cuDNN takes for convolutions is not counted.",)


def test_predictions_do_not_disturb_the_plan() -> None:
    plan = planned()
    before = plan.fingerprint
    peak = plan.memory().peak_bytes
    assert plan.fingerprint == before
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert plan.memory().peak_bytes == peak
        assert not torch.is_grad_enabled()
    assert rehearse(plan.program, "sgd", "cpu")


# ------------------------------------------------------------------------------------------------ the caching allocator


def test_blocks_are_cut_from_segments_and_joined_again() -> None:
    allocator = CachingAllocator()
    assert [allocator.allocate(k, 1000) for k in range(3)] == [1024] * 3
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (3072, 2 * MIB)
    allocator.release(1)
    assert allocator.allocate("fits the hole", 700) == 1024
    for key in (0, 2, "fits the hole"):
        allocator.release(key)
    assert allocator.allocate("all", MIB) == MIB
    assert allocator.allocate("rest", MIB) == MIB
    assert allocator.reserved_bytes == 2 * MIB


def test_large_blocks_have_segments_of_their_own() -> None:
    allocator = CachingAllocator()
    assert allocator.allocate("large", 3 * MIB) == 3 * MIB
    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.allocate("next", 18 * MIB + 1) == 18 * MIB + 512
    assert allocator.reserved_bytes == (20 + 20) * MIB
    allocator.release("next")
    assert allocator.allocate("whole", 19 * MIB + 1) == 20 * MIB  # what is left, below 1 MiB, stays with the block
    assert allocator.reserved_bytes == 40 * MIB
    assert allocator.allocate("nothing", 0) == 0
