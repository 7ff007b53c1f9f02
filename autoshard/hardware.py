"""Hardware as data: what a device computes and moves per second, and what each mesh axis carries.

Source of the presets: the vendors' data sheets (dense bf16 rate, memory bandwidth, link bandwidth per direction); the
fraction of peak that real kernels reach is `efficiency`. `cpu` stands for two cores of a server and gloo over loopback.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoshard.errors import MeshError


@dataclass(frozen=True)
class Hardware:
    """One device and its links. Rates in flops/s and bytes/s, latencies in s; `node_size` devices share the fast link."""

    name: str
    flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: float
    node_size: int
    inner_bytes_per_s: float
    outer_bytes_per_s: float
    collective_latency_s: float
    kernel_latency_s: float
    efficiency: float = 0.6

    def axis_bytes_per_s(self, shape: tuple[int, ...]) -> tuple[float, ...]:
        """Bandwidth of each axis: an axis whose ranks fit in one node, with all axes inside it, rides on the fast link."""
        rates, span = [], 1
        for size in reversed(shape):
            span *= size
            rates.append(self.inner_bytes_per_s if span <= self.node_size else self.outer_bytes_per_s)
        return tuple(reversed(rates))


PRESETS = {
    hardware.name: hardware
    for hardware in (
        # NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s bf16, 2.039 TB/s, NVLink 600 GB/s both ways; node link 200 Gb/s per GPU.
        Hardware("a100", 312e12, 2.039e12, 80e9, 8, 300e9, 25e9, 12e-6, 4e-6),
        # NVIDIA H100 SXM data sheet: 989 TFLOP/s bf16, 3.35 TB/s, NVLink 900 GB/s both ways; node link 400 Gb/s per GPU.
        Hardware("h100", 989e12, 3.35e12, 80e9, 8, 450e9, 50e9, 12e-6, 4e-6),
        # NVIDIA H200 SXM data sheet: as H100 with 4.8 TB/s and 141 GB.
        Hardware("h200", 989e12, 4.8e12, 141e9, 8, 450e9, 50e9, 12e-6, 4e-6),
        # NVIDIA B200 (DGX B200 data sheet, per GPU): 2.25 PFLOP/s dense bf16, 8 TB/s, NVLink 1.8 TB/s both ways.
        Hardware("b200", 2250e12, 8e12, 180e9, 8, 900e9, 50e9, 12e-6, 4e-6),
        Hardware("cpu", 50e9, 10e9, 8e9, 64, 1e9, 1e9, 200e-6, 5e-6),
    )
}


def hardware_of(given: str | Hardware | None, device_type: str = "cpu") -> Hardware:
    """A preset by name, a Hardware as it is, or the default of a device type (`h100` for cuda). Raises MeshError."""
    if isinstance(given, Hardware):
        return given
    name = given or ("cpu" if device_type in ("cpu", "meta") else "h100")
    if name not in PRESETS:
        raise MeshError(f"no hardware preset {name!r}; there are {', '.join(PRESETS)}, or pass an autoshard.Hardware")
    return PRESETS[name]
