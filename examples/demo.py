"""Train a GPT of 10.7 M parameters on four processes and on one, and show that the two runs are the same run.

The text is the source of Python's standard library, found where this interpreter keeps it. The four processes form the mesh
dp=2,tp=2 over gloo; the single process runs the same model, seed and batches without autoshard.

    python examples/demo.py                      what `make demo` runs
    python examples/demo.py --small --steps 3    a few seconds: what `make check` runs
    python examples/demo.py --only single        the single process alone
"""

import argparse
import resource
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpt import GPT, SMALL, GPTConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

MESH = {"dp": 2, "tp": 2}
TOLERANCE = 1e-3  # of the loss: float32 sums in another order, and AdamW divides by the root of small squared gradients
MIB = 2**20


@dataclass(frozen=True)
class Run:
    """All that fixes a training run."""

    config: GPTConfig
    steps: int
    batch: int
    out: Path
    seed: int = 0
    learning_rate: float = 3e-4
    text_bytes: int = 1_000_000


@dataclass
class Report:
    """What one process found out."""

    rank: int
    losses: list[float] = field(default_factory=list)
    held_bytes: dict[str, int] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    compile_s: float = 0.0
    plan_text: str = ""
    wire_bytes: dict[str, float] = field(default_factory=dict)


def load_text(max_bytes: int) -> Tensor:
    """Characters of the standard library's modules, as ASCII codes. Returns int64 [at most max_bytes]."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_bytes()
        if source.isascii():
            text += source
        if len(text) >= max_bytes:
            break
    if len(text) < 10_000:
        raise SystemExit(f"found only {len(text)} characters of source under {sysconfig.get_path('stdlib')}; the demo needs a text")
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8).long()


def draw_batches(text: Tensor, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (ids, labels), int64 [batch, block] each; labels are ids one character later. The same on every process."""
    text = text % run.config.vocab
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(run.steps):
        starts = torch.randint(len(text) - run.config.block, (run.batch, 1), generator=generator)
        at = starts + torch.arange(run.config.block)
        yield text[at], text[at + 1]


def local_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of these tensors that lie on this process: a DTensor counts with its shard only."""
    shards = (t.to_local() if hasattr(t, "to_local") else t for t in tensors if isinstance(t, Tensor))
    return sum(shard.numel() * shard.element_size() for shard in shards)


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory at the moment of the fork
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def train(model: torch.nn.Module, run: Run, report: Report, messages: Any) -> None:
    """The training loop, the same lines for both runs. Fills the report; tells the parent about each step."""
    optimizer = torch.optim.AdamW(model.parameters(), run.learning_rate, foreach=True)
    for step, (ids, labels) in enumerate(draw_batches(load_text(run.text_bytes), run), start=1):
        loss = model(ids, labels=labels)
        loss.backward()
        optimizer.step()
        if step == run.steps:
            parameters = list(model.parameters())
            report.held_bytes = {
                "parameters": local_bytes(parameters),
                "gradients": local_bytes(p.grad for p in parameters),
                "optimizer state": local_bytes(value for state in optimizer.state.values() for value in state.values()),
            }
        optimizer.zero_grad()
        report.losses.append(loss.item())
        if report.rank == 0:
            messages.put((step, report.losses[-1]))
    report.peak_rss_bytes = peak_rss_bytes()


def run_single(rank: int, run: Run, messages: Any, store: str) -> None:
    """The reference: plain PyTorch in one process."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    report = Report(rank)
    train(GPT(run.config), run, report, messages)
    messages.put(report)


def run_rank(rank: int, run: Run, messages: Any, store: str) -> None:
    """One of the four processes."""
    import autoshard  # here, so that the reference runs without it

    torch.set_num_threads(1)
    world = MESH["dp"] * MESH["tp"]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=120))
    mesh = dist.device_mesh.init_device_mesh("cpu", tuple(MESH.values()), mesh_dim_names=tuple(MESH))
    torch.manual_seed(run.seed)
    report = Report(rank)
    start = time.perf_counter()
    ids, labels = next(draw_batches(load_text(run.text_bytes), run))
    model = autoshard.compile(GPT(run.config), mesh, example_inputs=(ids,), example_kwargs={"labels": labels})
    report.compile_s = time.perf_counter() - start
    if rank == 0:
        messages.put((0, float("nan")))
    train(model, run, report, messages)
    wire = model.plan.stats["wire_bytes_per_step"]
    report.wire_bytes = dict(wire) if isinstance(wire, dict) else {"all": wire}
    if rank == 0:
        report.plan_text = write_artifacts(model.plan, run.out)
    dist.barrier()
    messages.put(report)
    dist.destroy_process_group()


def write_artifacts(plan: Any, out: Path) -> str:
    """Write the programs, plan.json and the picture under `out`. Returns the plan's table as text."""
    plan.emit(str(out / "programs"))
    plan.save(str(out / "plan.json"))
    graph = plan.graph()
    if shutil.which("dot"):
        graph.render(outfile=str(out / "graph.svg"), cleanup=True)
    else:
        graph.save(str(out / "graph.gv"))
    console = Console(width=140)
    with console.capture() as capture:
        console.print(plan.table())
    return capture.get()


def spawn(title: str, worker: Any, world: int, run: Run, console: Console) -> list[Report]:
    """Run `worker` in `world` processes under a progress bar. Returns the reports by rank; exits with a message if one fails."""
    messages = mp.get_context("spawn").Queue()
    reports: list[Report] = []
    text = (TextColumn("{task.description:<34}"), TextColumn("{task.fields[note]}"))
    columns = (text[0], BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text[1])
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        bar = progress.add_task(title, total=run.steps, note="starting")
        context = mp.spawn(worker, (run, messages, f"{folder}/store"), nprocs=world, join=False)
        try:
            while len(reports) < world:
                ended = context.join(timeout=0)  # raises where a process failed, after it has stopped the others
                try:
                    message = messages.get(timeout=5 if ended else 0.2)
                except Empty:
                    if ended:
                        raise SystemExit(f"{title}: ended with {len(reports)} of {world} reports") from None
                    continue
                if isinstance(message, Report):
                    reports.append(message)
                else:
                    step, loss = message
                    progress.update(bar, completed=step, note=f"loss {loss:.3f}" if step else "compiled")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise SystemExit(f"{title}: process {error.error_index} failed, the others were stopped.\n{error}") from None
        finally:
            for process in context.processes:
                process.join(timeout=10 if len(reports) == world else 0)
                process.kill()
    return sorted(reports, key=lambda report: report.rank)


def show_losses(sharded: list[float], single: list[float]) -> Table:
    table = Table("step", "four processes", "one process", "difference", title="Loss", title_justify="left")
    for step, (a, b) in enumerate(zip(sharded, single, strict=True), start=1):
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}")
    return table


def show_memory(sharded: list[Report], single: Report) -> Table:
    table = Table("MiB", *single.held_bytes, "sum", "of single", "peak RSS", title="Memory", title_justify="left")
    whole = sum(single.held_bytes.values())
    for name, report in [("single", single), *((f"rank {r.rank}", r) for r in sharded)]:
        held = report.held_bytes
        cells = [f"{n / MIB:.1f}" for n in (*held.values(), sum(held.values()))]
        table.add_row(name, *cells, f"{sum(held.values()) / whole:.0%}", f"{report.peak_rss_bytes / MIB:.0f}")
    return table


def show_wire(sharded: list[Report]) -> Table:
    kinds = list(dict.fromkeys(kind for report in sharded for kind in report.wire_bytes))
    table = Table("MiB a step", *kinds, "sum", title="Sent by each rank", title_justify="left")
    for report in sharded:
        counts = [report.wire_bytes.get(kind, 0) for kind in kinds]
        table.add_row(f"rank {report.rank}", *(f"{n / MIB:.2f}" for n in (*counts, sum(counts))))
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a GPT on four processes and on one, and compare.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="sequences in the global batch")
    parser.add_argument("--small", action="store_true", help="a model of two narrow layers")
    parser.add_argument("--only", choices=("single",), help="leave the four processes out")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    console = Console()
    run = Run(SMALL if args.small else GPTConfig(), args.steps, args.batch, args.out)
    size = sum(p.numel() for p in GPT(run.config).parameters())
    console.print(f"A GPT of {size:,} parameters, {run.batch} sequences of {run.config.block} characters a step")
    if args.only == "single":
        print(spawn("one process", run_single, 1, run, console)[0])
        return
    run.out.mkdir(parents=True, exist_ok=True)
    sharded = spawn("four processes, mesh dp=2,tp=2", run_rank, 4, run, console)
    (single,) = spawn("one process", run_single, 1, run, console)

    print(sharded[0].plan_text)
    for table in (show_losses(sharded[0].losses, single.losses), show_memory(sharded, single), show_wire(sharded)):
        console.print(table, "")
    console.print(f"Compiled in {sharded[0].compile_s:.1f} s. The programs, plan.json and the picture are in {run.out}/")
    if not (run.out / "graph.svg").exists():
        console.print("The picture is graph.gv: for an SVG install graphviz (apt-get install graphviz) and run again.")
    difference = max(abs(a - b) for report in sharded for a, b in zip(report.losses, single.losses, strict=True))
    console.print(f"Largest difference of the losses over {run.steps} steps, any rank: {difference:.1e}")
    if not difference < TOLERANCE:
        raise SystemExit(f"the runs differ by more than {TOLERANCE}: this is a defect, please report it")


if __name__ == "__main__":
    main()
