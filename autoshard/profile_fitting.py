"""From samples to rates and latencies: the cost model's own formulas, fitted to the medians on a logarithmic scale.

    memory       bytes / rate + kernel latency                        one rate
    products     max(flops / rate, bytes / memory rate) + latency     one rate per dtype, fitted to matrix products
    collectives  autoshard.collectives, on one link per axis          a start for all, a hop and a rate per link

What is minimised is the sum of soft-L1 losses of log(predicted / measured): a factor of two counts alike at a microsecond
and at a second, and single outliers count little. The typical error that is reported is the median of |log|.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from autoshard.collectives import axis_links, collective_terms
from autoshard.errors import HardwareError
from autoshard.hardware import PRESETS, Device, Hardware, Link
from autoshard.measured import Measured
from autoshard.profile_file import CollectiveSample, Profile, Sample

_LEAST_S = 1e-9  # less cannot be told from nothing
_MOST_CONFIDENT = 0.2  # a residual of 20 % is where the loss turns from squares to absolute values


@dataclass(frozen=True)
class FitRow:
    """One fitted number. least, most: of the sizes measured (flops or bytes); typical_error: 0.1 where predictions are 10 % off.

    backward: seconds backward per second forward, median; 0 where there is none.
    """

    what: str
    value: float
    unit: str
    samples: int
    least: float
    most: float
    typical_error: float
    backward: float = 0.0


@dataclass(frozen=True)
class Fit:
    """What came of a profile."""

    hardware: Hardware
    rows: tuple[FitRow, ...]


def fit(profile: Profile) -> Fit:
    """Fit a profile. Raises HardwareError where it has too few samples."""
    latency_s = profile.kernel_latency_s
    in_memory = [sample for sample in profile.samples if sample.kind == "memory"]
    products = {s.dtype: [each for each in profile.samples if each.kind == "matmul" and each.dtype == s.dtype] for s in profile.samples}
    products = {dtype: samples for dtype, samples in products.items() if samples}
    if not in_memory or "float32" not in products:
        raise HardwareError(
            "the profile has no samples of memory-bound ops, or none of float32 products; measure again, with a longer limit"
        )
    memory_rate = _rate(in_memory, [s.moved_bytes for s in in_memory], lambda s, rate: s.moved_bytes / rate + latency_s)

    def product_s(sample: Sample, rate: float) -> float:
        return max(sample.flops / rate, sample.moved_bytes / memory_rate) + latency_s

    rates = {dtype: _rate(samples, [s.flops for s in samples], product_s) for dtype, samples in products.items()}
    rows = [_row("memory", memory_rate, "bytes/s", in_memory, lambda s: s.moved_bytes / memory_rate + latency_s, lambda s: s.moved_bytes)]
    for dtype, rate in rates.items():
        rows.append(_row(f"product {dtype}", rate, "flops/s", products[dtype], lambda s: product_s(s, rates[s.dtype]), lambda s: s.flops))
    for kind in ("attention", "convolution"):  # not fitted: what the rates of matrix products say of them
        samples = [s for s in profile.samples if s.kind == kind and s.dtype in rates]
        if samples:
            reached = float(np.median([s.flops / s.forward_s for s in samples]))
            rows.append(_row(kind, reached, "flops/s", samples, lambda s: product_s(s, rates[s.dtype]), lambda s: s.flops))
    name = f"measured {profile.fingerprint['device']}"
    device = Device(name, rates, profile.memory_bytes, memory_rate, latency_s)
    links, start_s, link_rows = _links(profile, device)
    rows += link_rows
    ranges = {row.what: (row.least, row.most) for row in rows if row.what.partition(" ")[0] in ("memory", "product", "collectives")}
    measured = Measured(ranges, profile.ops, (*profile.notes, *_notes(profile, rates)))
    return Fit(Hardware(name, device, links, start_s, measured), tuple(rows))


def _minimised(predict: Callable[[np.ndarray], np.ndarray], seconds: Sequence[float], start: Sequence[float]) -> np.ndarray:
    """Positive parameters (in their own units) from which `predict` gives the seconds best."""
    measured = np.log(seconds)
    found = least_squares(
        lambda x: np.log(predict(np.exp(x))) - measured, np.log(start), loss="soft_l1", f_scale=_MOST_CONFIDENT, bounds=(-40, 50)
    )
    return np.exp(found.x)


def _rate(samples: Sequence[Sample], amounts: Sequence[float], seconds: Callable[[Sample, float], float]) -> float:
    guess = max(amount / sample.forward_s for amount, sample in zip(amounts, samples, strict=True))
    fitted = _minimised(lambda x: np.array([seconds(s, float(x[0])) for s in samples]), [s.forward_s for s in samples], [guess])
    return float(fitted[0])


def _row(
    what: str, value: float, unit: str, samples: Sequence[Sample], seconds: Callable[[Sample], float], size: Callable[[Sample], float]
) -> FitRow:
    sizes = [size(s) for s in samples]
    error = _typical_error([seconds(s) for s in samples], [s.forward_s for s in samples])
    backward = float(np.median([s.backward_s / s.forward_s for s in samples]))
    return FitRow(what, value, unit, len(samples), min(sizes), max(sizes), error, backward)


def _typical_error(predicted: Iterable[float], measured: Iterable[float]) -> float:
    return float(np.expm1(np.median(np.abs(np.log(list(predicted)) - np.log(list(measured))))))


# ---------------------------------------------------------------------------------------------------------- collectives


def _links(profile: Profile, device: Device) -> tuple[tuple[Link, ...], float, list[FitRow]]:
    """Links with the start of a collective, and their rows; those of a preset where no collective was measured."""
    if profile.mesh is None or profile.mesh.size == 1 or not profile.collectives:
        preset = PRESETS[_preset_of(profile)]
        return preset.links, preset.collective_latency_s, []
    axes = [axis for axis, n in enumerate(profile.mesh.shape) if n > 1]
    samples = [s for s in profile.collectives if profile.mesh.index(s.axis) in axes]
    smallest, largest = min(samples, key=lambda s: s.whole_bytes), max(samples, key=lambda s: s.whole_bytes)
    start = [smallest.seconds / 2, *[smallest.seconds / 2] * len(axes), *[largest.whole_bytes / largest.seconds] * len(axes)]
    fitted = _minimised(lambda x: _seconds(_hardware(profile, device, x), profile, samples), [s.seconds for s in samples], start)
    hardware = _hardware(profile, device, fitted)
    rows = []
    for link in hardware.links:
        for name in dict.fromkeys(s.name for s in samples):
            own = [s for s in samples if s.axis == link.name and s.name == name]
            if own:
                error = _typical_error(_seconds(hardware, profile, own), [s.seconds for s in own])
                sizes = [s.whole_bytes for s in own]
                rows.append(FitRow(f"{name} on {link.name}", link.bytes_per_s, "bytes/s", len(own), min(sizes), max(sizes), error))
    sizes, error = [s.whole_bytes for s in samples], _typical_error(_seconds(hardware, profile, samples), [s.seconds for s in samples])
    rows.append(FitRow("collectives", hardware.collective_latency_s, "s", len(samples), min(sizes), max(sizes), error))
    return hardware.links, hardware.collective_latency_s, rows


def _hardware(profile: Profile, device: Device, x: np.ndarray) -> Hardware:
    """One link per axis of more than one rank, innermost first: x = start, hops, rates. The outermost has any number of devices."""
    mesh = profile.mesh
    assert mesh is not None
    axes = [axis for axis in reversed(range(mesh.ndim)) if mesh.shape[axis] > 1]
    links, devices = [], 1
    for k, axis in enumerate(axes):
        devices *= mesh.shape[axis]
        is_last = k == len(axes) - 1
        links.append(Link(mesh.axes[axis], None if is_last else devices, float(x[1 + len(axes) + k]), _noticeable(x[1 + k])))
    return Hardware("measured", device, tuple(links), _noticeable(x[0]))


def _noticeable(seconds: float) -> float:
    return float(seconds) if seconds > _LEAST_S else 0.0


def _seconds(hardware: Hardware, profile: Profile, samples: Sequence[CollectiveSample]) -> np.ndarray:
    mesh = profile.mesh
    assert mesh is not None
    links = {name: axis_links(hardware, mesh.shape, axis) for axis, name in enumerate(mesh.axes)}
    terms = {(s.axis, s.name): collective_terms(hardware, links[s.axis], s.name) for s in samples}
    return np.array([min(fixed + per_byte * s.whole_bytes for fixed, per_byte in terms[s.axis, s.name]) for s in samples])


def _preset_of(profile: Profile) -> str:
    """The preset whose links are taken where none were measured: by the device's name."""
    if profile.fingerprint["device_type"] == "cpu":
        return "cpu"
    device = str(profile.fingerprint["device"]).lower()
    return next((name for name in PRESETS if name in device), "h100")


def _notes(profile: Profile, rates: dict[str, float]) -> list[str]:
    """What stands on something else than measurement."""
    notes = []
    missing = [name for name in ("float64", "bfloat16", "float16", "int8") if name not in rates]
    if missing:
        notes.append(f"products of {', '.join(missing)} were not measured: they count as float32's")
    if profile.mesh is None or profile.mesh.size == 1 or not profile.collectives:
        notes.append(f"no collective was measured: links are those of the preset {_preset_of(profile)!r}")
    else:
        notes.append(
            f"collectives were measured on mesh {profile.mesh}, {profile.fingerprint['backend']}; other numbers of ranks are extrapolated"
        )
    return notes
