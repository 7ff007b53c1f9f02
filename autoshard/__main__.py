"""The command line: python -m autoshard profile."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh

from autoshard.errors import AutoshardError, InputError
from autoshard.mesh import MeshSpec
from autoshard.profile_file import Profile
from autoshard.profile_fitting import FitRow
from autoshard.profile_measuring import LIMIT_S, profile
from autoshard.text import human_bytes, human_seconds

_PROFILE = (
    "Measure this machine in under a minute: matrix products, attention, convolution, memory-bound ops, kernel launches; and, under "
    "torchrun, the collectives on every axis of a mesh: torchrun --nproc-per-node 4 -m autoshard profile --mesh dp=2,tp=2"
)


def main(given: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    arguments = _parser().parse_args(given)
    try:
        run_profile(arguments)
    except AutoshardError as error:
        print(f"autoshard: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autoshard", description="A compiler that partitions an unmodified PyTorch model over a device mesh."
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("profile", help="measure this machine, for hardware='measured'", description=_PROFILE)
    command.add_argument("--mesh", help="axes of the mesh whose collectives are measured, e.g. dp=2,tp=2; needs torchrun")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    command.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help="about how many seconds to take (default: %(default)s)")
    command.add_argument("--cache", metavar="DIR", help="where the profile is kept (default: autoshard in the user's cache folder)")
    command.add_argument("--json", action="store_true", help="print the profile as JSON, and nothing else")
    return parser


def run_profile(arguments: argparse.Namespace) -> None:
    """Measure, save and print."""
    if arguments.mesh is None:
        show(profile(None, arguments.device, limit_s=arguments.limit, save=False), arguments)
        return
    spec = MeshSpec.of(arguments.mesh)
    if "RANK" not in os.environ:
        raise InputError(
            f"the collectives of a mesh are measured by its processes: torchrun --nproc-per-node {spec.size} -m autoshard profile "
            f"--mesh {spec}"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if spec.size != world:
        raise InputError(f"mesh {spec} has {spec.size} ranks, torchrun started {world} processes; start as many as the mesh has")
    device_type = arguments.device or ("cuda" if _has_gpus() else "cpu")
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(device_type, spec.shape, mesh_dim_names=spec.axes)
        found = profile(mesh, device_type, limit_s=arguments.limit, save=False)
        if dist.get_rank() == 0:
            show(found, arguments)
    finally:
        dist.destroy_process_group()


def _has_gpus() -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def show(found: Profile, arguments: argparse.Namespace) -> None:
    """Save the profile and print it: as JSON, or as a table of what was fitted."""
    path = found.save(arguments.cache)
    if arguments.json:
        print(found.to_json(), end="")
        return
    console = Console(width=max(Console().width, 110))  # of a pipe too
    fit = found.fit()
    machine = found.fingerprint
    cores = f", {machine['cores']} cores, {machine['threads']} threads" if machine["cores"] else ""
    title = f"{machine['device']}{cores}, torch {machine['torch']}"
    columns = ("what", "fitted", "samples", "measured from", "to", "typical error", "backward/forward")
    table = Table(*columns, title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for row in fit.rows:
        backward = f"{row.backward:.1f}" if row.backward else ""
        sizes = (_size(row, size) for size in (row.least, row.most))
        table.add_row(row.what, _fitted(row), str(row.samples), *sizes, f"{row.typical_error:.0%}", backward)
    for link in fit.hardware.links if found.collectives else ():
        table.add_row(f"hop on {link.name}", human_seconds(link.latency_s) if link.latency_s else "none")
    table.add_row("kernel launch", human_seconds(found.kernel_latency_s))
    console.print(table)
    for note in fit.hardware.measured.notes if fit.hardware.measured else ():
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    console.print(f'saved as {path}; plan with hardware="measured" or hardware="profile:{path}"', highlight=False, soft_wrap=True)


def _fitted(row: FitRow) -> str:
    if row.unit == "s":
        return f"start {human_seconds(row.value)}" if row.value else "no start"
    if row.unit == "bytes/s":
        return f"{human_bytes(row.value)}/s"
    return f"{row.value / 1e9:,.1f} Gflop/s"


def _size(row: FitRow, size: float) -> str:
    return human_bytes(size) if row.unit != "flops/s" else f"{size / 1e6:,.3g} Mflop"


if __name__ == "__main__":
    sys.exit(main())
