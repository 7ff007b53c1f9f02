"""Hardware as data: what a device computes and moves per second, and the links that nest around it, inner to outer.

    h100        nodes of 8 GPUs, NVLink inside, one 400 Gb/s port per GPU outside; any number of nodes
    h100x4      the same GPUs and ports in nodes of 4
    cpu         two cores of a server, gloo over loopback

Rates of the presets are those of the vendors' data sheets, dense (without the sparsity that doubles them in headlines);
`efficiency` is the share of the arithmetic rate that large real kernels reach. What a machine really does is measured by
autoshard.profile. How a mesh axis lies on the links, and what collectives cost there: autoshard.collectives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from autoshard.errors import HardwareError
from autoshard.measured import Measured, is_positive

DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16", "int8")
# Whose rate a dtype takes, and by what it divides: a complex multiply-add is four real ones; 8-bit floats run as fast as
# int8 on every tensor core that has both; other integers run on the ordinary cores, as float32 does.
_COUNTED_AS = {
    torch.float64: ("float64", 1),
    torch.float32: ("float32", 1),
    torch.bfloat16: ("bfloat16", 1),
    torch.float16: ("float16", 1),
    torch.complex128: ("float64", 4),
    torch.complex64: ("float32", 4),
    torch.complex32: ("float16", 4),
    torch.int8: ("int8", 1),
    torch.uint8: ("int8", 1),
    torch.float8_e4m3fn: ("int8", 1),
    torch.float8_e5m2: ("int8", 1),
}


@dataclass(frozen=True)
class Device:
    """One device. flops_per_s: dense matrix products, by dtype name (DTYPES; float32 must be there); memory in bytes, bytes/s.

    kernel_latency_s: of launching one kernel. efficiency: share of flops_per_s that kernels reach.
    """

    name: str
    flops_per_s: Mapping[str, float] = field(hash=False)
    memory_bytes: float
    memory_bytes_per_s: float
    kernel_latency_s: float
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        where = f"device {self.name!r}"
        if not isinstance(self.flops_per_s, Mapping) or "float32" not in self.flops_per_s:
            raise HardwareError(f"{where}: flops_per_s maps dtype names to rates, float32 among them; got {self.flops_per_s!r}")
        unknown = [name for name in self.flops_per_s if name not in DTYPES]
        if unknown:
            raise HardwareError(f"{where}: flops_per_s has no dtype {unknown[0]!r}; there are {', '.join(DTYPES)}")
        for name, rate in self.flops_per_s.items():
            _require_number(rate, f"{where}: flops_per_s of {name}")
        for name in ("memory_bytes", "memory_bytes_per_s", "efficiency"):
            _require_number(getattr(self, name), f"{where}: {name}")
        _require_number(self.kernel_latency_s, f"{where}: kernel_latency_s", zero=True)

    def reached_flops_per_s(self, dtype: torch.dtype) -> float:
        """Flops/s that matrix products of this dtype reach. A dtype that is not listed takes float32's rate."""
        name, share = _COUNTED_AS.get(dtype, ("float32", 1))
        return self.flops_per_s.get(name, self.flops_per_s["float32"]) * self.efficiency / share


@dataclass(frozen=True)
class Link:
    """What connects `devices` devices (None: any number); inside are the devices, or the groups that the link within connects.

    bytes_per_s: per direction, for every device while all of them send. latency_s: of one hop between neighbours.
    """

    name: str
    devices: int | None
    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if self.devices is not None and (type(self.devices) is not int or self.devices < 1):
            raise HardwareError(
                f"link {self.name!r}: devices is how many share the link, 1 or more, or None for any number; got {self.devices!r}"
            )
        _require_number(self.bytes_per_s, f"link {self.name!r}: bytes_per_s")
        _require_number(self.latency_s, f"link {self.name!r}: latency_s", zero=True)


@dataclass(frozen=True)
class Hardware:
    """A device and its links, inner to outer. collective_latency_s: of starting one collective, beside its hops.

    measured: what stands on measurement, where a profile of a machine was made; None for a data sheet.
    """

    name: str
    device: Device
    links: tuple[Link, ...]
    collective_latency_s: float = 0.0
    measured: Measured | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "links", tuple(self.links))
        if not isinstance(self.name, str) or not self.name.isprintable() or not isinstance(self.device, Device):
            raise HardwareError(f"hardware has a printable name and a Device, got {self.name!r} and {type(self.device).__name__}")
        _require_number(self.collective_latency_s, f"hardware {self.name!r}: collective_latency_s", zero=True)
        sizes = [link.devices if link.devices is not None else math.inf for link in self.links]
        if not sizes or any(outer <= inner or outer % inner for inner, outer in pairwise(sizes) if outer < math.inf):
            raise HardwareError(f"hardware {self.name!r}: each link holds a multiple of the devices of the one before; got {sizes}")
        if sizes.count(math.inf) > 1 or math.inf in sizes[:-1]:
            raise HardwareError(f"hardware {self.name!r}: only the outermost link may have any number of devices")

    @classmethod
    def uniform(
        cls,
        name: str,
        *,
        flops_per_s: float,
        memory_bytes_per_s: float,
        memory_bytes: float,
        link_bytes_per_s: float,
        collective_latency_s: float,
        kernel_latency_s: float,
    ) -> Hardware:
        """The plainest hardware: one arithmetic rate for all dtypes, one link for all devices, no time per hop."""
        device = Device(name, dict.fromkeys(DTYPES, flops_per_s), memory_bytes, memory_bytes_per_s, kernel_latency_s)
        return cls(name, device, (Link("link", None, link_bytes_per_s, 0.0),), collective_latency_s)

    def with_tf32(self) -> Hardware:
        """As after torch.set_float32_matmul_precision("high"): float32 products take the rate of tf32, where the device has it."""
        rates = dict(self.device.flops_per_s)
        rates["float32"] = rates.get("tf32", rates["float32"])
        return replace(self, name=f"{self.name}, tf32", device=replace(self.device, flops_per_s=rates))

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON; from_dict reads it back."""
        device = {f.name: getattr(self.device, f.name) for f in fields(Device)} | {"flops_per_s": dict(self.device.flops_per_s)}
        links = [{f.name: getattr(link, f.name) for f in fields(Link)} for link in self.links]
        body = {"name": self.name, "device": device, "links": links, "collective_latency_s": self.collective_latency_s}
        return body if self.measured is None else {**body, "measured": self.measured.to_dict()}

    @classmethod
    def from_profile(cls, path: str | Path, *, any_machine: bool = False) -> Hardware:
        """What a profile (autoshard.profile) measured. Raises HardwareError for one of another machine, unless `any_machine`."""
        from autoshard.profile_file import load_profile

        return load_profile(path, any_machine=any_machine).hardware()

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Hardware:
        """Inverse of to_dict. Raises HardwareError for anything else."""
        try:
            device, links = Device(**body["device"]), tuple(Link(**link) for link in body["links"])
            measured = Measured(**body["measured"]) if "measured" in body else None
            return cls(body["name"], device, links, body["collective_latency_s"], measured)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise HardwareError(f"this is no hardware: {type(error).__name__}: {error}; Hardware.to_dict shows what is expected") from error


def _require_number(value: Any, what: str, zero: bool = False) -> None:
    if not is_positive(value, zero):
        raise HardwareError(f"{what} is {value!r}; it must be a finite number {'of 0 or more' if zero else 'above 0'}")


def _tera(**rates: float) -> dict[str, float]:
    return {name: rate * 1e12 for name, rate in rates.items()}


def _nodes(device: Device, nvlink_bytes_per_s: float, port_bytes_per_s: float, per_node: int = 8) -> Hardware:
    """Nodes of GPUs on an NVSwitch, one network port per GPU.

    Latencies: NCCL's tuning model, protocol LL128: 10 us to start a ring, 1.9 us a hop on NVLink, 4 us on the network.
    Source: baseLat and hwLat in NCCL's src/graph/tuning.cc.
    """
    links = (Link("NVLink", per_node, nvlink_bytes_per_s, 1.9e-6), Link("network", None, port_bytes_per_s, 4e-6))
    return Hardware(device.name, device, links, 10e-6)


_HOPPER = _tera(float64=67, float32=67, tf32=494.7, bfloat16=989.4, float16=989.4, int8=1978.9)
PRESETS = {
    hardware.name: hardware
    for hardware in (
        # NVIDIA A100 80GB SXM data sheet: float64 19.5 (tensor cores), float32 19.5, tf32 156, bf16 312, int8 624; 2,039 GB/s;
        # NVLink 600 GB/s both ways. DGX A100: one 200 Gb/s port per GPU.
        _nodes(
            Device("a100", _tera(float64=19.5, float32=19.5, tf32=156, bfloat16=312, float16=312, int8=624), 80e9, 2.039e12, 4e-6, 0.6),
            300e9,
            25e9,
        ),
        # NVIDIA H100 SXM data sheet: float64 67 (tensor cores), float32 67, tf32 989, bf16 1,979, int8 3,958, the last three with
        # sparsity, so half of that; 3.35 TB/s; NVLink 900 GB/s both ways. DGX H100: one 400 Gb/s port per GPU.
        _nodes(Device("h100", _HOPPER, 80e9, 3.35e12, 4e-6, 0.6), 450e9, 50e9),
        # NVIDIA H200 SXM data sheet: as H100 with 141 GB at 4.8 TB/s.
        _nodes(Device("h200", _HOPPER, 141e9, 4.8e12, 4e-6, 0.6), 450e9, 50e9),
        # NVIDIA HGX B200 data sheet, per GPU: float64 37 (tensor cores), float32 75, tf32 1.1 dense, bf16 2.25 P dense, int8 4.5 P
        # dense. DGX B200: 180 GB at 8 TB/s; NVLink 1.8 TB/s both ways; one 400 Gb/s port per GPU.
        _nodes(
            Device("b200", _tera(float64=37, float32=75, tf32=1100, bfloat16=2250, float16=2250, int8=4500), 180e9, 8e12, 4e-6, 0.6),
            900e9,
            50e9,
        ),
        # No data sheet: round numbers of two cores and of gloo over loopback; `autoshard.profile` measures a machine.
        Hardware(
            "cpu",
            Device("cpu", _tera(float64=0.025, float32=0.05, bfloat16=0.05, float16=0.05, int8=0.05), 8e9, 10e9, 5e-6, 0.6),
            (Link("loopback", None, 1e9, 50e-6),),
            100e-6,
        ),
    )
}


def hardware_of(given: str | Hardware | None, device_type: str = "cpu") -> Hardware:
    """A Hardware as it is, or by name; None is the default of a device type, `h100` for cuda. Raises HardwareError.

    Names: a preset (`"h100"`, `"h100x4"`), `"profile:/path.json"` for what autoshard.profile wrote, `"measured"` for the newest
    profile of this machine in the cache folder.
    """
    if isinstance(given, Hardware):
        return given
    if isinstance(given, str) and given.startswith("profile:"):
        return Hardware.from_profile(given.removeprefix("profile:"))
    if given == "measured":
        from autoshard.profile_file import newest_profile

        return newest_profile().hardware()
    if given is not None and not isinstance(given, str):
        raise HardwareError(f"hardware is an autoshard.Hardware or a name, not a {type(given).__name__}; of a profile: profile.hardware()")
    text = given or ("cpu" if device_type in ("cpu", "meta") else "h100")
    found = re.fullmatch(r"([a-z0-9]+?)(?:x([1-9]\d{0,5}))?", text)
    if found is None or found[1] not in PRESETS:
        names = ", ".join(f"{name} ({name}x4: nodes of 4)" if len(PRESETS[name].links) > 1 else name for name in PRESETS)
        raise HardwareError(
            f"no hardware preset {text!r}; there are {names}; 'measured' or 'profile:/path.json', of autoshard.profile; or pass an "
            "autoshard.Hardware"
        )
    hardware = PRESETS[found[1]]
    return hardware if found[2] is None else _in_nodes(hardware, int(found[2]), text)


def _in_nodes(hardware: Hardware, per_node: int, text: str) -> Hardware:
    inner, *outer = hardware.links
    if not outer:
        raise HardwareError(f"hardware {text!r}: {hardware.name} has no nodes, all its devices share one link; write {hardware.name!r}")
    return replace(hardware, name=text, links=(replace(inner, devices=per_node), *outer)) if per_node != inner.devices else hardware
