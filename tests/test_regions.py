"""Regions of the model's forward that the program keeps: torch.autocast and torch.utils.checkpoint."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import EXAMPLES, hf_gpt2
from processes import run_on_ranks
from test_compiled_module import assert_same_gradients, run_checks
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import autoshard
from autoshard.autocast import Autocast
from autoshard.checker import check
from autoshard.errors import PlacementError, PlanError, TraceError
from autoshard.program import facts

BF16 = torch.bfloat16
TEMPLATES = [("dp=1", "ddp"), ("dp=2,tp=2", "megatron"), ("dp=2", "fsdp"), ("dp=2,tp=2", "megatron_sp"), ("dp=2", "ddp")]


# --------------------------------------------------------------------------------------------------------------- autocast


class Mixed(nn.Module):
    """Every op that autocast treats in its own way, nested regions, no_grad on either side of a region's border."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.bn = nn.Embedding(16, 8), nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.up, self.down, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 16)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, ids: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(ids)
        with torch.autocast("cpu", BF16):
            y = self.down(F.gelu(self.up(x)))
            with torch.autocast("cpu", enabled=False):
                y = self.norm(y.float())
            with torch.no_grad():
                z = self.down(F.relu(self.up(x)))
            y = self.down(F.silu(self.up(y))) + z
            q = y.unflatten(-1, (2, 4)).transpose(1, 2)
            y = y + F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
            y = self.bn(self.conv(y.transpose(1, 2))).transpose(1, 2)
            logits = self.head(y)
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        with torch.no_grad(), torch.autocast("cpu", BF16):
            w = self.up(x)
        return loss, logits.softmax(-1), w


class Plain(nn.Module):
    """Says nothing of autocast itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.up(x)
        return self.down(F.gelu(x)).float().square().mean() + (F.layer_norm(self.down(F.relu(x)), (8,)) - 1).square().mean()


def ids() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(16, (4, 6), generator=generator), torch.randint(16, (4, 6), generator=generator)


def assert_equal_to_eager(model: nn.Module, plan: autoshard.Plan, args: tuple[Any, ...], tolerance: float) -> None:
    """Results and gradients of all simulated ranks, of the eager model's dtypes; 0 means bit for bit."""
    eager = copy.deepcopy(model)
    expected = eager(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    simulation = autoshard.simulate(plan, copy.deepcopy(model), args)
    cotangents = [torch.randn_like(y) if y.requires_grad else None for y in expected]
    torch.autograd.backward([y for y in expected if y.requires_grad], [g for g in cotangents if g is not None])
    simulation.backward(cotangents)
    pairs = [(y, found.values[0]) for y, found in zip(expected, simulation.outputs, strict=True)]
    pairs += [(p.grad, simulation.gradient(name)) for name, p in eager.named_parameters()]
    for wanted, found in pairs:
        scale = float(wanted.detach().abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(scale, 1.0))


@pytest.mark.parametrize(("mesh", "template"), [("dp=1", "ddp"), ("tp=2", "megatron"), ("dp=2", "fsdp"), ("dp=2", "ddp")])
def test_autocast_regions(mesh: str, template: str) -> None:
    torch.manual_seed(0)
    model = Mixed()
    plan = autoshard.plan(model, mesh, ids(), template=template)
    assert_equal_to_eager(model, plan, ids(), 0.0 if mesh == "dp=1" else 0.03)
    assert autoshard.verify(model, plan, ids()).is_equal


@pytest.mark.parametrize("seed", range(5))
def test_autocast_regions_under_random_plans(seed: int) -> None:
    torch.manual_seed(0)
    model = Mixed()
    plan = autoshard.plan(model, "a=2", ids(), options=autoshard.Options(seed=seed))
    verification = autoshard.verify(model, plan, ids())
    assert verification.is_equal, verification


def test_weights_are_gathered_in_the_dtype_of_the_region() -> None:
    gathered = {"all_gather", "all_gather_invariant"}

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(256, 256)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", BF16):
                x = self.layer(self.layer(x))
                with torch.no_grad():
                    return self.layer(x) + x

    plan = autoshard.plan(Wide(), "dp=4", (torch.randn(512, 256),), template="fsdp")
    nodes = [n for n in plan.program.nodes("conversion") if n.target.__name__ in gathered and n.name.startswith("layer_")]
    assert nodes
    assert {facts(node).value.dtype for node in nodes} == {BF16}


@pytest.mark.parametrize(("mesh", "template"), TEMPLATES)
def test_the_callers_autocast(mesh: str, template: str) -> None:
    torch.manual_seed(0)
    model, args = Plain(), (torch.randn(8, 8),)
    outside = autoshard.plan(model, mesh, args, template=template)
    with torch.autocast("cpu", BF16):
        plan = autoshard.plan(model, mesh, args, template=template)
        assert_equal_to_eager(model, plan, args, 0.0 if mesh == "dp=1" else 0.03)
    assert plan.program.baked != outside.program.baked
    assert not any(facts(node).autocast for node in outside.program.nodes())
    with torch.autocast("cpu", BF16):  # what was planned outside runs as it would outside
        simulation = autoshard.simulate(outside, model, args)
    torch.testing.assert_close(simulation.outputs[0].values[0], model(*args))


def test_states_of_nested_regions() -> None:
    plan = autoshard.plan(Mixed(), "dp=1", ids())
    states = {node.name: facts(node).autocast for node in plan.program.nodes("op")}
    inside = (Autocast("cpu", BF16),)
    assert states["up_linear"] == inside
    assert states["norm_layer_norm"] == ()
    assert states["embed_embedding"] == ()
    assert states["cross_entropy_loss"] == inside
    assert plan.source().count('with torch.autocast("cpu", torch.bfloat16):') == 3


# ---------------------------------------------------------------------------------------------------------- recomputation


class Layer(nn.Module):
    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.rate = rate

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = F.dropout(F.gelu(self.up(self.norm(x))), self.rate, self.training)
        x = x + F.dropout(self.down(y), self.rate, self.training) * scale
        return x, x.square().mean()


class Deep(nn.Module):
    """Layers that are recomputed, or not: with equal numbers of random draws."""

    def __init__(self, kind: str, rate: float = 0.25, width: int = 8) -> None:
        super().__init__()
        self.kind, self.scale = kind, nn.Parameter(torch.ones(()))
        self.layers = nn.ModuleList(Layer(width, rate) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        extra, scale = 0.0, self.scale * 2
        for layer in self.layers:
            if self.kind == "none":
                x, norm = layer(x, scale)
            else:
                x, norm = checkpoint(layer, x, scale, use_reentrant=self.kind == "reentrant")
            extra = extra + norm
        return x.square().mean() + 0.1 * extra


def regions(plan: autoshard.Plan) -> dict[int, list[fx.Node]]:
    found: dict[int, list[fx.Node]] = {}
    for node in plan.program.nodes():
        if facts(node).recompute is not None:
            found.setdefault(facts(node).recompute, []).append(node)
    return found


def rows(seed: int = 0) -> Tensor:
    return torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("mesh", "template", "kind"), [*((*asked, "plain") for asked in TEMPLATES[:-1]), ("dp=2", "ddp", "reentrant")])
def test_recomputed_regions_are_functions(mesh: str, template: str, kind: str) -> None:
    model = Deep(kind).double()
    plan = autoshard.plan(model, mesh, (rows(),), template=template)
    assert list(regions(plan)) == [1, 2, 3]
    for number in regions(plan):
        assert f"def region_{number}(" in plan.source()
        assert f"= self.checkpoint(region_{number}, " in plan.source()
    assert not any("checkpoint" in note for note in plan.notes)
    assert autoshard.verify(model, plan, (rows(),)).is_equal


@pytest.mark.parametrize("seed", range(4))
def test_recomputed_regions_under_random_plans(seed: int) -> None:
    model = Deep("plain").double()
    plan = autoshard.plan(model, "a=2,b=2", (rows(),), options=autoshard.Options(seed=seed))
    assert autoshard.verify(model, plan, (rows(),)).is_equal


def test_weights_are_gathered_again() -> None:
    plan = autoshard.plan(Deep("plain").double(), "dp=2", (rows(),), template="fsdp")
    gathers = [node for node in plan.program.nodes("conversion") if node.name.startswith("layers_1_down_weight")]
    assert gathers
    assert {facts(node).recompute for node in gathers} == {2}


def test_spellings_of_checkpoint() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.stack, 4, x, use_reentrant=False)

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def body(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x.sin(), use_reentrant=False).cos()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False) + x

    for model, count in ((Sequence().double(), 3), (Nested().double(), 1)):
        plan = autoshard.plan(model, "dp=2", (rows(),), template="fsdp")
        assert list(regions(plan)) == list(range(1, count + 1))
        assert autoshard.verify(model, plan, (rows(),)).is_equal


def test_gradient_checkpointing_of_transformers() -> None:
    model = hf_gpt2().double()
    with warnings.catch_warnings():  # transformers means to rename it
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    _, kwargs = EXAMPLES["hf_gpt2"].batch(0)
    plan = autoshard.plan(model, "dp=2,tp=2", (), kwargs, template="megatron")
    assert list(regions(plan)) == list(range(1, model.config.n_layer + 1))
    assert autoshard.verify(model, plan, (), kwargs).is_equal


def test_checkpointed_regions_with_autocast_inside_and_outside() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def body(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", BF16):
                x = self.first(x).tanh()
            return self.second(x.float())

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", BF16):
                y = checkpoint(self.first, x, use_reentrant=False)
            return checkpoint(self.body, y.float(), use_reentrant=False)

    torch.manual_seed(0)
    model, args = Both(), (torch.randn(4, 8),)
    plan = autoshard.plan(model, "dp=1", args)
    assert list(regions(plan)) == [1, 2]
    assert_equal_to_eager(model, plan, args, 0.0)


def test_buffers_that_a_region_would_see_change_are_refused() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.register_buffer("mean", torch.zeros(8))

        def body(self, x: Tensor) -> Tensor:
            y = self.inner(x) - self.mean
            self.mean.mul_(0.9)
            return y.tanh()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    with pytest.raises(TraceError, match=r"the buffer mean is written, and read in a checkpointed region at .*test_regions\.py"):
        autoshard.plan(Average(), "dp=2", (torch.randn(4, 8),))


def test_the_checker_wants_regions_unbroken() -> None:
    plan = autoshard.plan(Deep("plain").double(), "dp=2", (rows(),), template="fsdp")
    middle = regions(plan)[2][len(regions(plan)[2]) // 2]
    facts(middle).recompute = None
    with pytest.raises(PlacementError, match="goes on with region 2, which ended at"):
        check(plan.program)


def test_regions_are_kept_in_plan_files(tmp_path: Any) -> None:
    for model, args in ((Deep("plain").double(), (rows(),)), (Mixed(), ids())):
        plan = autoshard.plan(model, "dp=2", args)
        plan.save(tmp_path / "plan.json")
        assert autoshard.Plan.load(tmp_path / "plan.json").source() == plan.source()


@pytest.mark.parametrize(("old", "new"), [('"bfloat16"', '"bfloat17"'), ('"recompute": 1', '"recompute": -1'), ('"cpu"', '"cpu\\""')])
def test_altered_plan_files_are_refused(tmp_path: Any, old: str, new: str) -> None:
    import json

    from autoshard.plan_file import digest

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", BF16):
                return checkpoint(self.inner, x, use_reentrant=False)

    path = tmp_path / "plan.json"
    autoshard.plan(Both(), "dp=2", (torch.randn(4, 8),)).save(path)
    assert old in path.read_text()
    body = json.loads(path.read_text().replace(old, new))
    body.pop("sha256")
    path.write_text(json.dumps({"sha256": digest(body), **body}))
    with pytest.raises(PlanError):
        autoshard.Plan.load(path)


# --------------------------------------------------------------------------------------------------------- real processes


@contextlib.contextmanager
def counted(sizes: list[int]) -> Any:
    """Collect the sizes of what autograd keeps for backward."""
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        yield


def recomputation_saves_memory_and_changes_no_number(mesh: DeviceMesh) -> None:
    for template in ("fsdp", "megatron_sp"):
        kept, models, losses = {}, {}, {}
        for kind in ("none", "plain"):
            torch.manual_seed(1)
            model = Deep(kind).double()
            torch.manual_seed(2)
            models[kind] = autoshard.compile(model, mesh, template=template, example_inputs=(rows(),))
            kept[kind] = []
            with counted(kept[kind]):
                first = models[kind](rows(1))
            second = models[kind](rows(2))  # the step goes on before the first backward
            (first + second).backward()
            losses[kind] = torch.stack([first.detach(), second.detach()])
        assert torch.equal(losses["none"], losses["plain"])
        assert_same_gradients(models["none"], models["plain"])
        assert sum(kept["plain"]) < 0.3 * sum(kept["none"]), (template, kept)


def without_gradients_a_region_is_a_plain_call(mesh: DeviceMesh) -> None:
    model = Deep("plain").double().eval()
    compiled = autoshard.compile(copy.deepcopy(model), mesh, template="megatron")
    with torch.no_grad():
        loss = compiled(rows())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, model(rows()))
    loss = compiled(rows())  # the same program, with gradients
    loss.backward()
    model(rows()).backward()
    assert_same_gradients(compiled, model)


class Counting(nn.Module):
    def __init__(self, is_recomputed: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8))
        self.is_recomputed = is_recomputed

    def forward(self, x: Tensor) -> Tensor:
        return (checkpoint(self.inner, x, use_reentrant=False) if self.is_recomputed else self.inner(x)).square().mean()


def running_statistics_are_written_once(mesh: DeviceMesh) -> None:
    for template in ("ddp", "fsdp"):
        torch.manual_seed(0)
        model, reference = Counting(True).double(), Counting(False).double()
        reference.load_state_dict(model.state_dict())
        compiled = autoshard.compile(model, mesh, template=template)
        for step in range(2):
            compiled(rows(step)).backward()
            reference(rows(step)).backward()
        assert_same_gradients(compiled, reference)
        assert "once(" in compiled.plan.source()
        for name, buffer in reference.named_buffers():
            torch.testing.assert_close(dict(compiled.named_buffers())[name], buffer, msg=name)


def the_callers_autocast_chooses_the_program(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model = Plain()
    compiled, args = autoshard.compile(copy.deepcopy(model), mesh, template="fsdp"), (torch.randn(8, 8),)
    for is_enabled in (True, False, True):
        with torch.autocast("cpu", BF16, enabled=is_enabled):
            loss, expected = compiled(*args), model(*args)
        torch.testing.assert_close(loss, expected, rtol=2e-2 if is_enabled else 1e-5, atol=1e-6)
        loss.backward()
        expected.backward()
    for mine, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=5e-2, atol=5e-2 * float(theirs.grad.abs().max()))
    assert len(compiled._state.ready) == 2


def regions_run_under_torch_compile(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    for model, args in ((Deep("plain", 0.0).double(), (rows(),)), (Mixed(), ids())):
        compiled = autoshard.compile(copy.deepcopy(model), mesh, template="fsdp", example_inputs=args)
        again = autoshard.compile(copy.deepcopy(model), mesh, template="fsdp", example_inputs=args)
        fast = torch.compile(again, backend="aot_eager")
        for _ in range(2):
            losses = [result[0] if isinstance(result, tuple) else result for result in (compiled(*args), fast(*args))]
            torch.testing.assert_close(*losses)
            [loss.backward() for loss in losses]
        for mine, theirs in zip(compiled.parameters(), again.parameters(), strict=True):
            a, b = mine.grad.full_tensor(), theirs.grad.full_tensor()
            torch.testing.assert_close(a, b, rtol=0, atol=0.02 * float(a.abs().max()))


def test_two_ranks() -> None:
    checks = [
        recomputation_saves_memory_and_changes_no_number,
        without_gradients_a_region_is_a_plain_call,
        running_statistics_are_written_once,
        the_callers_autocast_chooses_the_program,
        regions_run_under_torch_compile,
    ]
    run_on_ranks(2, run_checks, checks, (2,), ("dp",))
