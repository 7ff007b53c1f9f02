"""The command profile: measure this machine, and under torchrun the collectives of a mesh."""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh

from autoshard.cli.command import FINE, Command
from autoshard.cli.screen import Screen
from autoshard.errors import InputError
from autoshard.mesh import MeshSpec
from autoshard.profile_file import Profile
from autoshard.profile_fitting import FitRow
from autoshard.profile_measuring import LIMIT_S, profile
from autoshard.text import human_bytes, human_seconds


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", metavar="AXES", help="axes of the mesh whose collectives are measured, e.g. dp=2,tp=2; needs torchrun")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help="about how many seconds to take (default: %(default)s)")
    parser.add_argument("--cache", metavar="DIR", help="where the profile is kept (default: autoshard in the user's cache folder)")


def run_profile(asked: argparse.Namespace, screen: Screen) -> int:
    """Measure, save and print."""
    if asked.mesh is None:
        with screen.working("measure this machine"):
            found = profile(None, asked.device, limit_s=asked.limit, save=False)
        _show(found, asked, screen)
        return FINE
    spec = MeshSpec.of(asked.mesh)
    if "RANK" not in os.environ:
        raise InputError(
            f"the collectives of a mesh are measured by its processes: torchrun --nproc-per-node {spec.size} -m autoshard profile "
            f"--mesh {spec}"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if spec.size != world:
        raise InputError(f"mesh {spec} has {spec.size} ranks, torchrun started {world} processes; start as many as the mesh has")
    device_type = asked.device or ("cuda" if _has_gpus() else "cpu")
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(device_type, spec.shape, mesh_dim_names=spec.axes)
        found = profile(mesh, device_type, limit_s=asked.limit, save=False)
        if dist.get_rank() == 0:
            _show(found, asked, screen)
    finally:
        dist.destroy_process_group()
    return FINE


def _has_gpus() -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _show(found: Profile, asked: argparse.Namespace, screen: Screen) -> None:
    """Save the profile and print it: as JSON, or as a table of what was fitted."""
    try:
        path = found.save(asked.cache)
    except OSError as error:
        raise InputError(
            f"cannot keep the profile in {asked.cache or 'the cache folder'}: {error.strerror}; name another --cache"
        ) from error
    if screen.is_json:
        screen.document(found.to_json())
        return
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
    notes = [f"note: {note}" for note in (fit.hardware.measured.notes if fit.hardware.measured else ())]
    screen.answer(None, table, *notes, f'saved as {path}; plan with hardware="measured" or hardware="profile:{path}"')


def _fitted(row: FitRow) -> str:
    if row.unit == "s":
        return f"start {human_seconds(row.value)}" if row.value else "no start"
    if row.unit == "bytes/s":
        return f"{human_bytes(row.value)}/s"
    return f"{row.value / 1e9:,.1f} Gflop/s"


def _size(row: FitRow, size: float) -> str:
    return human_bytes(size) if row.unit != "flops/s" else f"{size / 1e6:,.3g} Mflop"


COMMANDS = (
    Command(
        "profile",
        "measure this machine, for --hardware measured",
        "Measure this machine in under a minute: matrix products, attention, convolution, memory-bound ops, kernel launches; and, under\n"
        "torchrun, the collectives on every axis of a mesh.",
        (
            "autoshard profile",
            "torchrun --nproc-per-node 4 -m autoshard profile --mesh dp=2,tp=2",
            "autoshard plan train.py:build --mesh dp=2,tp=2 --hardware measured",
        ),
        _options,
        run_profile,
    ),
)
