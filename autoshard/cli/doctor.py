"""The command doctor: what this machine has, what of autoshard works on it, and what does not and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

import autoshard
from autoshard.cli import loopback
from autoshard.cli.command import FINE, NO, Command
from autoshard.cli.machine import available_memory_bytes
from autoshard.cli.screen import Screen
from autoshard.profile_measuring import seconds_of
from autoshard.text import human_bytes

TORCH_RANGE, PYTHON_RANGE = ((2, 11), (2, 14)), ((3, 11), (3, 14))  # at least, below; as pyproject.toml says
_LIMIT_S = 120.0  # for two processes to import torch and talk
_COPIED_BYTES = 2**26
Status = Literal["ok", "limited", "broken"]
_STYLES = {"ok": "green", "limited": "yellow", "broken": "red"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. status: "limited" where some uses do without it, "broken" where none does. note: what follows."""

    name: str
    found: str
    status: Status = "ok"
    note: str = ""


def run_doctor(asked: argparse.Namespace, screen: Screen) -> int:
    """Look at everything and say what will not work."""
    checks = []
    with screen.working("look at this machine"):
        for check in (*_versions(), *_devices(), *_backends(), _dot(), *_memory(), *([] if asked.no_processes else [check_loopback()])):
            checks.append(check)
    is_broken = any(check.status == "broken" for check in checks)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "found", "", "what follows"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, Text(check.found), Text(check.status, _STYLES[check.status]), Text(check.note))
    missing = [f"{check.name}: {check.note}" for check in checks if check.status != "ok"]
    closing = ["will not work here, or not fully:", *(f"  {line}" for line in missing)] if missing else ["everything works here"]
    screen.answer({"works": not is_broken, "checks": checks}, table, *closing)
    return NO if is_broken else FINE


def _versions() -> Iterator[Check]:
    yield Check("autoshard", autoshard.__version__)
    yield _ranged("python", platform.python_version(), PYTHON_RANGE)
    yield _ranged("torch", torch.__version__, TORCH_RANGE)
    for name, use in (("transformers", "models named by a config.json cannot be built; models named by a function can"),):
        try:
            yield Check(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "not installed", "limited", f"{use}; pip install {name}")


def _ranged(name: str, version: str, limits: tuple[tuple[int, int], tuple[int, int]]) -> Check:
    major, minor = (int(part) for part in version.split(".")[:2])
    least, below = (".".join(map(str, limit)) for limit in limits)
    if limits[0] <= (major, minor) < limits[1]:
        return Check(name, version)
    return Check(name, version, "broken", f"autoshard is made for {name} from {least} to below {below}; install one of these")


def _devices() -> Iterator[Check]:
    yield Check("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for k in range(count):
        free, total = torch.cuda.mem_get_info(k)
        yield Check(f"cuda:{k}", f"{torch.cuda.get_device_name(k)}, {human_bytes(free)} free of {human_bytes(total)}")
    if not count:
        built = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        yield Check("cuda", "none", "limited", f"{built}: models are planned and verified, and run on the CPU over gloo")


def _backends() -> Iterator[Check]:
    if not dist.is_available():
        yield Check("torch.distributed", "none", "broken", "this build of torch has no distributed package; install another")
        return
    has_gpu = torch.cuda.is_available()
    yield (
        Check("nccl", "yes")
        if dist.is_nccl_available()
        else Check("nccl", "no", "limited", "GPUs cannot talk to each other" if has_gpu else "needed by GPUs alone, of which there is none")
    )
    yield (
        Check("gloo", "yes")
        if dist.is_gloo_available()
        else Check("gloo", "no", "limited" if has_gpu else "broken", "CPU processes cannot talk to each other")
    )


def _dot() -> Check:
    found = shutil.which("dot")
    if found:
        return Check("graphviz dot", found)
    return Check("graphviz dot", "not on PATH", "limited", "pictures stay .gv texts: apt-get install graphviz")


def _memory() -> Iterator[Check]:
    yield Check("free memory", human_bytes(available_memory_bytes()))
    source, target = (torch.zeros(_COPIED_BYTES, dtype=torch.uint8) for _ in range(2))
    seconds = seconds_of(lambda: target.copy_(source), "cpu", 0.2)
    yield Check("memory bandwidth", f"about {human_bytes(2 * _COPIED_BYTES / seconds)}/s, reading and writing")


def check_loopback(limit_s: float = _LIMIT_S) -> Check:
    """Start two processes that all-reduce over gloo; they are ended after `limit_s`."""
    name = "gloo between processes"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        command = [sys.executable, "-P", str(Path(loopback.__file__)), folder]
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        ranks = [
            stack.enter_context(
                subprocess.Popen([*command, str(k)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
            )
            for k in range(loopback.RANKS)
        ]
        until = time.monotonic() + limit_s
        try:
            said = [rank.communicate(timeout=max(until - time.monotonic(), 0.01)) for rank in ranks]
        except subprocess.TimeoutExpired:
            return Check(name, f"no answer in {limit_s:.0f} s", "broken", "processes cannot reach each other; is a firewall between them?")
        finally:
            for rank in ranks:
                rank.kill()
    failed = [err.strip().splitlines()[-1:] for rank, (_, err) in zip(ranks, said, strict=True) if rank.returncode]
    if failed:
        return Check(name, "failed", "broken", f"compiled models cannot run here: {''.join(failed[0]) or 'a process ended'}")
    return Check(name, f"{loopback.RANKS} processes, about {human_bytes(json.loads(said[0][0])['bytes_per_s'])}/s each way")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-processes", action="store_true", help="leave out the two processes that try gloo")


COMMANDS = (
    Command(
        "doctor",
        "what this machine has, and what will not work on it",
        "Look at versions, devices, backends and free memory, let two processes talk over gloo, and say what will not work here and why.\n"
        "Exit status 1: something that every use needs is broken.",
        ("autoshard doctor", "autoshard doctor --json"),
        _options,
        run_doctor,
    ),
)
