"""The parts of tests/gpu/run.py; each is one call of this file: `parts.py NAME cuda|cpu RESULT.json`."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]

import memory as memory_part  # noqa: E402
from gpt import GPT, GPTConfig  # noqa: E402
from llama import SMALL as SMALL_LLAMA  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from processes import run_on_ranks  # noqa: E402

import autoshard  # noqa: E402
from autoshard.conversions import BY_NAME, WIRE  # noqa: E402
from autoshard.costs import CostModel  # noqa: E402
from autoshard.placements import shard  # noqa: E402
from autoshard.program import facts  # noqa: E402
from autoshard.traffic import seconds_inside, sent_inside, wire_bytes  # noqa: E402

LEARNING_RATE = 3e-4
MIB = 2**20


class Findings:
    """Checks and tables of one part, kept on disk as they come."""

    def __init__(self, path: str) -> None:
        self.path, self.checks, self.tables = Path(path), [], []

    def check(self, name: str, is_good: bool, detail: str) -> None:
        self.checks.append([name, bool(is_good), detail])
        self._write()

    def table(self, title: str, columns: list[str], rows: list[list[Any]], note: str = "") -> None:
        self.tables.append({"title": title, "columns": columns, "rows": rows, "note": note})
        self._write()

    def _write(self) -> None:
        self.path.write_text(json.dumps({"checks": self.checks, "tables": self.tables}))


# ------------------------------------------------------------------------------------------------------------- measuring


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def alternate(works: dict[str, Callable[[], Any]], device: str, rounds: int, warmups: int = 3) -> dict[str, list[float]]:
    """Seconds of each work, the works taking turns."""
    for _ in range(warmups):
        for work in works.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds_of(work, device))
    return times


def peak_bytes(work: Callable[[], Any], device: str) -> tuple[int, int] | None:
    """Memory allocated before `work` and its peak; None where there is no GPU to ask."""
    if device != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    synchronize(device)
    return before, torch.cuda.max_memory_allocated()


def in_mib(count: float | None) -> str:
    return "not measured" if count is None else f"{count / MIB:,.0f} MiB"


def in_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def difference(expected: Tensor, actual: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    expected, actual = expected.detach().double(), actual.detach().double()
    error = float((expected - actual).abs().max() / expected.abs().max().clamp(min=1e-12))
    return error if error == error else float("inf")


# --------------------------------------------------------------------------------------------------------------- training


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def trainer(model: nn.Module, ids: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """One training step."""

    def step() -> None:
        model(ids, labels=ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextmanager
def one_rank(device: str) -> Iterator[DeviceMesh]:
    """A process group of this process alone, NCCL on a GPU, and its mesh dp=1,tp=1."""
    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        own = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1, device_id=own)
        try:
            yield init_device_mesh(device, (1, 1), mesh_dim_names=("dp", "tp"))
        finally:
            dist.destroy_process_group()


def stage_through_host() -> torch.library.Library:
    """Let gloo take CUDA tensors: copy them to the host and back.

    gloo's all-gather into a tensor reads the device's pointer on the host and crashes (pytorch issue 152645). The library
    object that is returned keeps the replacement alive.
    """
    library = torch.library.Library("_c10d_functional", "IMPL")
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"):
        library.impl(name, _staged(getattr(torch.ops._c10d_functional, name).default), "CUDA")
    return library


def _staged(collective: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *rest: Any) -> Tensor:
        return torch.ops._c10d_functional.wait_tensor(collective(x.cpu(), *rest)).to(x.device)

    return run


# ----------------------------------------------------------------------------------------- a GPT on one rank, and as it is

# About 124 million parameters, the sizes of GPT-2 small.
GPT_ON_GPU = GPTConfig(layers=12, heads=12, width=768, block=1024, vocab=50304)
GPT_ON_CPU = GPTConfig(layers=2, heads=4, width=64, block=32, vocab=64)


def run_one_rank(found: Findings, device: str, is_compiled: bool = False) -> None:
    """The emitted program on a mesh of size-1 axes against the model itself: it should cost nothing."""
    on_gpu = device == "cuda"
    config, batch, dtype = (GPT_ON_GPU, 8, torch.bfloat16) if on_gpu else (GPT_ON_CPU, 2, torch.float32)
    torch.manual_seed(0)
    model = GPT(config).to(device, dtype)
    ids = torch.randint(config.vocab, (batch, config.block), device=device)
    with one_rank(device) as mesh:
        sharded = autoshard.compile(GPT(config).to(device, dtype), mesh, example_inputs=(ids,), example_kwargs={"labels": ids})
        sharded.load_state_dict(model.state_dict())
        sharded(ids, labels=ids)  # agrees with the other ranks once, outside what torch.compile traces
        runs: dict[str, nn.Module] = {"the model": model, "emitted program": sharded}
        if is_compiled:
            backend = "inductor" if on_gpu else "aot_eager"
            runs = {name: torch.compile(module, backend=backend) for name, module in runs.items()}
        compare_gradients(found, model, sharded, runs, ids, tolerance=2e-2 if on_gpu else 1e-5)
        owners = dict(zip(runs, (model, sharded), strict=True))
        measure_side_by_side(found, {name: (run, owners[name]) for name, run in runs.items()}, ids, device, is_compiled)


def compare_gradients(
    found: Findings, model: nn.Module, sharded: nn.Module, runs: dict[str, nn.Module], ids: Tensor, tolerance: float
) -> None:
    """Loss and every gradient; how far two runs of the model itself differ stands beside it."""
    run_model, run_sharded = runs.values()

    def gradients(run: nn.Module, of: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        loss = run(ids, labels=ids)
        loss.backward()
        grads = {name: local(p.grad).clone() for name, p in of.named_parameters()}
        of.zero_grad()
        return loss.detach(), grads

    (loss, expected), (_, again) = gradients(run_model, model), gradients(run_model, model)
    sharded_loss, actual = gradients(run_sharded, sharded)
    itself = max(difference(expected[name], again[name]) for name in expected)
    worst = max(actual, key=lambda name: difference(expected[name], actual[name]))
    errors = (difference(loss, sharded_loss), difference(expected[worst], actual[worst]))
    tolerance = max(tolerance, 2 * itself)  # kernels that add in no fixed order
    detail = f"loss {errors[0]:.1e}, gradients {errors[1]:.1e} ({worst}), tolerance {tolerance:.0e}; the model against itself {itself:.1e}"
    found.check("loss and gradients equal the model's", max(errors) <= tolerance and list(expected) == list(actual), detail)


def measure_side_by_side(
    found: Findings, runs: dict[str, tuple[nn.Module, nn.Module]], ids: Tensor, device: str, is_compiled: bool
) -> None:
    """Seconds and memory of each run; a run is what is called and the module that owns its parameters."""
    rounds = 15 if device == "cuda" else 3

    def forward_backward(run: nn.Module, of: nn.Module) -> Callable[[], None]:
        def work() -> None:
            run(ids, labels=ids).backward()
            of.zero_grad()

        return work

    passes = alternate({name: forward_backward(run, of) for name, (run, of) in runs.items()}, device, rounds)
    steps = {name: trainer(run, ids, torch.optim.AdamW(of.parameters(), LEARNING_RATE, foreach=True)) for name, (run, of) in runs.items()}
    whole = alternate(steps, device, rounds)
    rows = []
    for name, step in steps.items():
        memory = peak_bytes(step, device)
        above = in_mib(None if memory is None else memory[1] - memory[0])
        rows.append([name, in_ms(statistics.median(passes[name])), in_ms(statistics.median(whole[name])), above])
    first, second = steps
    ratios = [statistics.median(b / a for a, b in zip(times[first], times[second], strict=True)) for times in (passes, whole)]
    rows.append(["ratio", *(f"{ratio:.3f}" for ratio in ratios), ""])
    size = sum(p.numel() for p in runs[first][1].parameters()) / 1e6
    how, (batch, length) = "torch.compile" if is_compiled else "eager", ids.shape
    title = f"One rank, {how}: a GPT of {size:,.1f} M parameters, {batch} x {length} tokens"
    columns = ["", "forward and backward", "with AdamW (foreach)", "peak above what rests"]
    found.table(title, columns, rows, f"Medians of {rounds} alternating runs; the ratio is the median of the pairs' ratios.")


# --------------------------------------------------------------------------------------------------- four ranks on one GPU

STEPS = 3
TEMPLATES = ("auto", "fsdp", "megatron_sp")
# Float32 sums in another order, and AdamW divides by the root of small squared gradients: parameters may be one step apart.
TOLERANCES = {torch.float64: (1e-10, 1e-9), torch.float32: (1e-4, LEARNING_RATE)}


def train(model: nn.Module, batches: Sequence[Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    """A few steps. Returns the losses and what this process holds of the parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, foreach=True)
    losses = []
    for ids in batches:
        loss = model(ids, labels=ids.roll(-1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: local(p).detach().cpu() for name, p in model.named_parameters(remove_duplicate=False)}


def make_task(device: str, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = GPT(GPT_ON_CPU).to(device, dtype)
    return model, [torch.randint(GPT_ON_CPU.vocab, (4, GPT_ON_CPU.block)).to(device) for _ in range(STEPS)]


def train_on_rank(device: str, templates: Sequence[str], dtypes: Sequence[torch.dtype]) -> dict[tuple[str, torch.dtype], Any]:
    """Every template and dtype, on one of four processes."""
    if device == "cuda":
        torch.cuda.set_device(0)
        torch.cuda.init()
        staging = stage_through_host()  # noqa: F841 - alive until the end
    mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("dp", "tp"))
    results: dict[tuple[str, torch.dtype], Any] = {}
    for template in templates:
        for dtype in dtypes:
            model, batches = make_task(device, dtype)
            sharded = autoshard.compile(model, mesh, template=template)  # type: ignore[arg-type]
            results[template, dtype] = (*train(sharded, batches), sharded.plan.parameter_layouts)
    return results


def errors_of(expected: tuple[list[float], dict[str, Tensor]], ranks: Sequence[Any]) -> tuple[float, float]:
    """Largest difference of any rank's losses and of its pieces of the parameters."""
    (losses, parameters), mesh = expected, autoshard.MeshSpec(("dp", "tp"), (2, 2))
    in_losses = in_parameters = 0.0
    for (mine, pieces, layouts), coordinate in zip(ranks, mesh.coordinates(), strict=True):
        in_losses = max([in_losses, *(abs(a - b) for a, b in zip(losses, mine, strict=True))])
        for name, layout in layouts.items():
            piece = shard(parameters[name], layout, mesh, coordinate)
            in_parameters = max(in_parameters, float((piece - pieces[name]).abs().max()))
    return in_losses, in_parameters


def run_four_ranks(found: Findings, device: str) -> None:
    """Mesh dp=2,tp=2, all ranks on the same GPU: losses and parameters after three steps equal one process's."""
    templates, dtypes = (TEMPLATES, list(TOLERANCES)) if device == "cuda" else (TEMPLATES[:1], [torch.float64])
    expected = {dtype: train(*make_task(device, dtype)) for dtype in dtypes}
    ranks = run_on_ranks(4, train_on_rank, device, templates, dtypes)
    for template in templates:
        for dtype in dtypes:
            (loss_tolerance, tolerance), got = TOLERANCES[dtype], [rank[template, dtype] for rank in ranks]
            loss_error, error = errors_of(expected[dtype], got)
            is_good = loss_error <= loss_tolerance and error <= tolerance
            detail = f"losses {loss_error:.1e} (at most {loss_tolerance:.0e}), parameters {error:.1e} (at most {tolerance:.0e})"
            found.check(f"{template}, {str(dtype).removeprefix('torch.')}: {STEPS} steps equal one process", is_good, detail)


# ----------------------------------------------------------------------------------------- one rank of eight, on a fake group


def preset_of(device: str) -> str:
    """The hardware preset that fits this device's name; h100 where none does."""
    if device != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    return next((preset for preset in ("h200", "h100", "a100", "b200") if preset in name), "h100")


def communication_s(plan: autoshard.Plan) -> float:
    """Predicted seconds of a plan's collectives, in conversions and inside lowered ops, both passes."""
    costs = CostModel(plan.mesh, plan.hardware)
    total = sum(seconds_inside(costs, sent_inside(plan.program, node)) for node in plan.program.nodes("op"))
    for node in plan.program.nodes("conversion"):
        if facts(node).is_constant:
            continue
        axis, row = plan.mesh.index(str(node.args[1])), BY_NAME[node.target.__name__]
        for name, sent in zip((row.forward, row.backward), wire_bytes(plan.program, node, costs), strict=True):
            total += costs.collective_s(name, axis, sent / WIRE[name](plan.mesh.shape[axis])) if sent else 0.0
    return total


FAKE_COLUMNS = [
    "",
    "step, measured",
    "step without collectives, predicted",
    "measured / predicted",
    "collectives, predicted",
    "peak memory, measured",
    "kept for a step, predicted",
    "at rest, measured",
]


def run_fake_group(found: Findings, device: str) -> None:
    """Rank 0 of dp=2,tp=4 alone: its collectives return at once, its compute and memory are those of a real run."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh = init_device_mesh(device, (2, 4), mesh_dim_names=("dp", "tp"))
    on_gpu = device == "cuda"
    config, batch, length, dtype = (LlamaConfig(), 8, 2048, torch.bfloat16) if on_gpu else (SMALL_LLAMA, 8, 32, torch.float32)
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    size = sum(p.numel() for p in model.parameters()) / 1e9
    ids = torch.randint(config.vocab, (batch, length), device=device)
    rows = []
    for template in ("auto", "fsdp", "megatron_sp") if on_gpu else ("auto",):
        try:
            rows.append(fake_row(model, mesh, ids, device, template, rounds=10 if on_gpu else 2))
            found.check(f"{template}: a rank trains alone", True, f"{rows[-1][1]} a step")
        except Exception as error:
            traceback.print_exc()
            found.check(f"{template}: a rank trains alone", False, f"{type(error).__name__}: {error}"[:200])
    title = f"One rank of dp=2,tp=4 alone: a Llama of {size:.2f} B parameters, {batch} x {length} tokens, {dtype}, AdamW"
    note = (
        f"Predicted for the preset {preset_of(device)}. On a fake process group collectives return at once, so the measured step "
        "has compute and local copies alone, and stands against the predicted step less the predicted time of the collectives. "
        "The predicted memory is parameters, gradients, optimizer state and activations kept for backward; the measured peak has "
        "working memory too."
    )
    found.table(title, FAKE_COLUMNS, rows, note)
    dist.destroy_process_group()


def fake_row(model: nn.Module, mesh: DeviceMesh, ids: Tensor, device: str, template: str, rounds: int) -> list[str]:
    gc.collect()
    base = torch.cuda.memory_allocated() if device == "cuda" else 0
    options: dict[str, Any] = {"template": template, "hardware": preset_of(device)}
    sharded = autoshard.compile(model, mesh, example_inputs=(ids,), example_kwargs={"labels": ids}, **options)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    sharded.materialize(lambda name: torch.randn(shapes[name], device=device) * 0.02 if len(shapes[name]) > 1 else torch.ones(shapes[name]))
    step = trainer(sharded, ids, torch.optim.AdamW(sharded.parameters(), LEARNING_RATE, foreach=True))
    measured_s = statistics.median(alternate({template: step}, device, rounds)[template])
    memory = peak_bytes(step, device)
    stats = sharded.plan.stats
    moving_s = communication_s(sharded.plan)
    computing_s = stats["objective_s"] - moving_s
    rested, peak = (count - base for count in memory) if memory else (None, None)
    times = [in_ms(measured_s), in_ms(computing_s), f"{measured_s / computing_s:.2f}", in_ms(moving_s)]
    return [template, *times, in_mib(peak), in_mib(stats["kept_bytes"]), in_mib(rested)]


PARTS: dict[str, Callable[[Findings, str], None]] = {
    "one_rank": run_one_rank,
    "four_ranks": run_four_ranks,
    "fake_group": run_fake_group,
    "memory": memory_part.run_memory,
    "one_rank_compiled": lambda found, device: run_one_rank(found, device, is_compiled=True),
}

if __name__ == "__main__":
    part, on_device, path = sys.argv[1:]
    if on_device == "cuda":
        torch.cuda.set_device(0)
        torch.cuda.init()
    PARTS[part](Findings(path), on_device)
