"""Profiles of a machine as JSON: what was measured, with a fingerprint of the machine, under the name of its content's hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autoshard.errors import AutoshardError, HardwareError
from autoshard.hardware import DTYPES, Hardware
from autoshard.measured import is_positive
from autoshard.mesh import MeshSpec

if TYPE_CHECKING:
    from autoshard.profile_fitting import Fit

VERSION = 1
KINDS = ("matmul", "attention", "convolution", "memory")
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "rotate")
_MACHINE = ("device_type", "device", "architecture", "cores", "threads", "torch")  # what must agree for a profile to be used


@dataclass(frozen=True)
class Sample:
    """One op timed: flops of its products (0 for none), bytes of its inputs and outputs, median seconds each way."""

    kind: str
    what: str
    dtype: str
    flops: float
    moved_bytes: float
    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class CollectiveSample:
    """One collective timed on one axis of the profile's mesh: bytes that the axis holds together, seconds of the slowest rank."""

    axis: str
    name: str
    whole_bytes: float
    seconds: float


@dataclass(frozen=True)
class Profile:
    """What was measured of one machine.

    fingerprint: the machine, see machine(), and `backend` and `world_size` of the collectives. mesh: whose axes they are on.
    ops: seconds forward and backward of single calls (autoshard.measure_ops), by autoshard.measured.op_key. notes: what was left out.
    """

    fingerprint: Mapping[str, Any]
    kernel_latency_s: float
    memory_bytes: float
    samples: tuple[Sample, ...]
    mesh: MeshSpec | None = None
    collectives: tuple[CollectiveSample, ...] = ()
    ops: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def fit(self) -> Fit:
        """Rates and latencies behind the samples, and how far each is from them."""
        from autoshard.profile_fitting import fit

        return fit(self)

    def hardware(self) -> Hardware:
        """As a Hardware to plan for."""
        return self.fit().hardware

    def to_json(self) -> str:
        """As JSON with a checksum; loads_profile reads it back."""
        body = {"version": VERSION, **dataclasses.asdict(self)}
        return json.dumps({"sha256": _digest(body), **body}, indent=1) + "\n"

    def save(self, folder: str | Path | None = None) -> Path:
        """Write into the cache folder (or `folder`) under the name of its content's hash."""
        text = self.to_json()
        target = Path(folder or cache_folder()) / f"{self.fingerprint['device_type']}-{json.loads(text)['sha256'][:16]}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".partial", delete=False) as file:
            file.write(text)
        os.replace(file.name, target)  # whoever reads finds all of it or nothing
        return target


def cache_folder() -> Path:
    """`autoshard` under XDG_CACHE_HOME, ~/.cache where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoshard"


def machine(device_type: str) -> dict[str, Any]:
    """What tells machines apart, as far as speed goes."""
    found = {
        "device_type": device_type,
        "device": torch.cuda.get_device_name() if device_type == "cuda" and torch.cuda.is_available() else _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return found if device_type == "cpu" else {**found, "cores": 0, "threads": 0}  # a GPU's speed is not that of its host


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load_profile(path: str | Path, *, any_machine: bool = False) -> Profile:
    """Read a profile. Raises HardwareError for a file that is none, was altered, or is of another machine.

    any_machine: take one of another machine too, with a warning.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise HardwareError(f"cannot read the profile {path}: {error}; `python -m autoshard profile` writes one") from error
    profile = loads_profile(text, str(path))
    wrong = differences(profile)
    if wrong and not any_machine:
        raise HardwareError(
            f"the profile {path} is of another machine: {'; '.join(wrong)}. Measure this one (python -m autoshard profile), or take it all "
            "the same: autoshard.Hardware.from_profile(path, any_machine=True)"
        )
    if wrong:
        warnings.warn(f"the profile {path} is of another machine: {'; '.join(wrong)}", stacklevel=3)
    return profile


def loads_profile(text: str, where: str = "text") -> Profile:
    """Inverse of Profile.to_json. Raises HardwareError."""
    again = "measure again: python -m autoshard profile"
    try:
        body = json.loads(text)
        checksum, version = body.pop("sha256"), body.pop("version")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise HardwareError(f"{where} is not a profile, or a truncated one ({type(error).__name__}: {error}); {again}") from error
    if version != VERSION:
        raise HardwareError(f"{where} has profile version {version!r}, this autoshard reads {VERSION}; {again}")
    if checksum != _digest({"version": version, **body}):
        raise HardwareError(f"{where} was altered after it was saved (its checksum differs); {again}")
    try:
        return _read(body)
    except (KeyError, TypeError, ValueError, AttributeError, AutoshardError) as error:
        raise HardwareError(f"{where} does not describe a machine: {error}; {again}") from error


def newest_profile(folder: str | Path | None = None) -> Profile:
    """The newest profile of this machine in the cache folder. Raises HardwareError where there is none."""
    place = Path(folder or cache_folder())
    others: list[str] = []
    for path in sorted(place.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return load_profile(path)
        except HardwareError as error:
            others.append(str(error))
    seen = f" ({len(others)} cannot be used, the newest because {others[0]})" if others else ""
    raise HardwareError(f"there is no profile of this machine in {place}{seen}; measure it: python -m autoshard profile")


def differences(profile: Profile) -> list[str]:
    """What differs between the machine of a profile and this one."""
    own = machine(str(profile.fingerprint["device_type"]))
    return [
        f"{name} is {profile.fingerprint[name]!r} there, {own[name]!r} here" for name in _MACHINE if profile.fingerprint[name] != own[name]
    ]


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read(body: Mapping[str, Any]) -> Profile:
    mesh = None if body["mesh"] is None else MeshSpec(tuple(body["mesh"]["axes"]), tuple(body["mesh"]["shape"]))
    samples = tuple(Sample(**each) for each in body["samples"])
    collectives = tuple(CollectiveSample(**each) for each in body["collectives"])
    ops = {key: tuple(pair) for key, pair in body["ops"].items()}
    found = Profile(
        body["fingerprint"], body["kernel_latency_s"], body["memory_bytes"], samples, mesh, collectives, ops, tuple(body["notes"])
    )
    missing = [name for name in (*_MACHINE, "backend", "world_size") if name not in found.fingerprint]
    if missing:
        raise HardwareError(f"its fingerprint has no {missing[0]}")
    numbers = {"kernel_latency_s": found.kernel_latency_s, "memory_bytes": found.memory_bytes}
    for k, sample in enumerate(samples):
        if sample.kind not in KINDS or sample.dtype not in DTYPES or not isinstance(sample.what, str):
            raise HardwareError(f"sample {k} is of {sample.kind!r} in {sample.dtype!r}")
        numbers |= {f"{name} of sample {k} ({sample.what})": getattr(sample, name) for name in ("moved_bytes", "forward_s", "backward_s")}
        if not is_positive(sample.flops, zero=sample.kind == "memory"):
            raise HardwareError(f"flops of sample {k} ({sample.what}) is {sample.flops!r}, which no measurement gives")
    for k, each in enumerate(collectives):
        if each.name not in COLLECTIVES or mesh is None or each.axis not in mesh.axes:
            raise HardwareError(f"collective {k} is {each.name!r} on axis {each.axis!r}")
        numbers |= {f"{name} of collective {k} ({each.name} on {each.axis})": getattr(each, name) for name in ("whole_bytes", "seconds")}
    for key, pair in ops.items():
        numbers |= {f"forward seconds of {key}": pair[0]}
        if len(pair) != 2 or not is_positive(pair[1], zero=True):
            raise HardwareError(f"backward seconds of {key} are {pair[1:]!r}, which no measurement gives")
    for name, number in numbers.items():
        if not is_positive(number):
            raise HardwareError(f"{name} is {number!r}, which no measurement gives")
    return found
