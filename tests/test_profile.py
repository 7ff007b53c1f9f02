"""Profiles: what is fitted from samples, files that are refused, and one real measurement (whose times nothing is asserted of)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import autoshard
from autoshard import Hardware, profile_cases
from autoshard.cli import main
from autoshard.costs import CostModel
from autoshard.errors import HardwareError, InputError
from autoshard.hardware import Device, Link, hardware_of
from autoshard.measured import is_positive
from autoshard.mesh import MeshSpec
from autoshard.profile_cases import cases
from autoshard.profile_file import COLLECTIVES, CollectiveSample, Profile, Sample, load_profile, loads_profile, machine, newest_profile

TRUE = Hardware(
    "true",
    Device("true", {"float64": 2e10, "float32": 5e10}, 8e9, 2e10, 4e-6),
    (Link("tp", 2, 4e9, 3e-6), Link("dp", None, 1e9, 2e-5)),
    5e-5,
)


def sampled(noise: float = 0.05, is_on_mesh: bool = True) -> Profile:
    """What would be measured on TRUE, off by up to `noise`, one sample of each kind by a factor of ten."""
    chance, samples = random.Random(0), []
    for case in cases("cpu"):
        dtype = str(case.dtype).removeprefix("torch.")
        if case.kind in ("matmul", "memory") and (dtype in TRUE.device.flops_per_s or case.kind == "memory"):
            moved = case.moved_bytes(torch.empty(case.shapes[0], device="meta"))
            rate = TRUE.device.flops_per_s.get(dtype, math.inf)
            seconds = max(case.flops / rate, moved / TRUE.device.memory_bytes_per_s) + TRUE.device.kernel_latency_s
            seconds *= chance.uniform(1 - noise, 1 + noise)
            samples.append(Sample(case.kind, case.what, dtype, case.flops, moved, seconds, 2 * seconds))
    for kind in ("matmul", "memory"):
        k = next(k for k, sample in enumerate(samples) if sample.kind == kind and sample.dtype == "float32")
        samples[k] = dataclasses.replace(samples[k], forward_s=10 * samples[k].forward_s)
    mesh = MeshSpec.of("dp=3,one=1,tp=2") if is_on_mesh else None
    collectives = []
    for axis, name, size in ((a, n, s) for a in ("dp", "tp") for n in COLLECTIVES for s in (2**12, 2**16, 2**20, 2**24) if mesh):
        seconds = CostModel(mesh, TRUE).collective_s(name, mesh.index(axis), size) * chance.uniform(1 - noise, 1 + noise)  # type: ignore[arg-type,union-attr]
        collectives.append(CollectiveSample(axis, name, float(size), seconds))
    fingerprint = {**machine("cpu"), "backend": "gloo" if mesh else "", "world_size": 6 if mesh else 1}
    return Profile(fingerprint, 4e-6, 8e9, tuple(samples), mesh, tuple(collectives))


# --------------------------------------------------------------------------------------------------------------- fitting


def test_rates_and_latencies_are_found_through_noise_and_outliers() -> None:
    fit = sampled().fit()
    found = fit.hardware
    assert found.device.flops_per_s == pytest.approx(TRUE.device.flops_per_s, rel=0.05)
    assert found.device.memory_bytes_per_s == pytest.approx(TRUE.device.memory_bytes_per_s, rel=0.05)
    assert [(link.name, link.devices) for link in found.links] == [("tp", 2), ("dp", None)]
    assert [link.bytes_per_s for link in found.links] == pytest.approx([4e9, 1e9], rel=0.1)
    mesh = MeshSpec.of("dp=3,one=1,tp=2")
    for name in COLLECTIVES:
        for axis in (0, 2):
            for size in (1e3, 1e5, 1e7):
                expected = CostModel(mesh, TRUE).collective_s(name, axis, size)
                assert CostModel(mesh, found).collective_s(name, axis, size) == pytest.approx(expected, rel=0.2)
    errors = {row.what: row.typical_error for row in fit.rows}
    assert max(errors.values()) < 0.15
    assert {"memory", "product float64", "product float32", "all_reduce on dp", "all_to_all on tp", "collectives"} <= set(errors)


def test_what_was_not_measured_is_said() -> None:
    on_mesh, alone = sampled().hardware().measured, sampled(is_on_mesh=False).hardware()
    assert on_mesh is not None
    assert on_mesh.notes == (
        "products of bfloat16, float16, int8 were not measured: they count as float32's",
        "collectives were measured on mesh dp=3,one=1,tp=2, gloo; other numbers of ranks are extrapolated",
    )
    assert alone.links == hardware_of("cpu").links
    assert alone.measured is not None
    assert alone.measured.notes[-1] == "no collective was measured: links are those of the preset 'cpu'"
    gpu = dataclasses.replace(sampled(is_on_mesh=False), fingerprint={**machine("cpu"), "device_type": "cuda", "device": "NVIDIA H200"})
    assert gpu.hardware().links == hardware_of("h200").links


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(HardwareError, match="no samples of memory-bound ops, or none of float32"):
        dataclasses.replace(sampled(), samples=()).fit()


def test_a_plan_says_what_it_extrapolates() -> None:
    hardware = sampled().hardware()
    assert Hardware.from_dict(json.loads(json.dumps(hardware.to_dict()))) == hardware
    small = autoshard.plan(nn.Linear(256, 256), "dp=3,tp=2", (torch.zeros(768, 256),), hardware=hardware)
    large = autoshard.plan(nn.Linear(8192, 8192, device="meta"), "dp=3,tp=2", (torch.empty(49152, 8192, device="meta"),), hardware=hardware)
    assert hardware.measured is not None
    assert all(note in plan.notes for plan in (small, large) for note in hardware.measured.notes)
    assert not any("uses are extrapolated" in note for note in small.notes)
    assert any("the profile measured 1.3e+05 to 2.1e+09 flops of product float32: 1 of 1 uses are extrapolated" in n for n in large.notes)
    unmeasured = autoshard.plan(nn.Linear(64, 64).half(), "tp=2", (torch.zeros(64, 64).half(),), hardware=hardware)
    assert any("measured nothing of product float16" in note for note in unmeasured.notes)


# ----------------------------------------------------------------------------------------------------------------- files


def test_profiles_are_kept_by_content_and_read_back(tmp_path: Path) -> None:
    profile = sampled()
    path = profile.save(tmp_path)
    assert path.name == f"cpu-{json.loads(path.read_text())['sha256'][:16]}.json"
    assert load_profile(path) == profile
    assert Hardware.from_profile(path) == hardware_of(f"profile:{path}") == profile.hardware()
    assert profile.save(tmp_path) == path
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(HardwareError, match=r"there is no profile of this machine in .*; measure it: python -m autoshard profile"):
        hardware_of("measured")
    old, new = (dataclasses.replace(sampled(), kernel_latency_s=latency) for latency in (1e-6, 2e-6))
    other = dataclasses.replace(sampled(), fingerprint={**sampled().fingerprint, "cores": 1000})
    import os

    for age, profile in enumerate((other, new, old)):
        os.utime(profile.save(), (1e9 - age, 1e9 - age))
    assert hardware_of("measured") == new.hardware()
    assert newest_profile(tmp_path / "autoshard") == new


def altered(change: Callable[[dict], Any], is_resealed: bool = True) -> str:
    body = json.loads(sampled().to_json())
    change(body)
    if is_resealed:
        rest = {key: value for key, value in body.items() if key != "sha256"}
        body["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps(body)


def put(*path: Any, value: Any) -> Callable[[dict], Any]:
    def change(body: Any) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return change


BROKEN = {
    "truncated": (lambda: sampled().to_json()[:500], "not a profile, or a truncated one"),
    "no JSON": (lambda: "hello", "not a profile"),
    "a list": (lambda: "[1, 2]", "not a profile"),
    "altered": (lambda: altered(put("kernel_latency_s", value=1.0), is_resealed=False), "altered after it was saved"),
    "another version": (lambda: altered(put("version", value=99)), "profile version 99, this autoshard reads 1"),
    "NaN": (lambda: altered(put("samples", 3, "forward_s", value=math.nan)), "forward_s of sample 3 .* is nan"),
    "negative": (lambda: altered(put("samples", 0, "backward_s", value=-1.0)), "backward_s of sample 0 .* is -1.0"),
    "zero": (lambda: altered(put("collectives", 2, "seconds", value=0)), "seconds of collective 2 .* is 0,"),
    "endless": (lambda: altered(put("memory_bytes", value=math.inf)), "memory_bytes is inf"),
    "no flops": (lambda: altered(put("samples", 0, "flops", value=0)), "flops of sample 0 .* is 0,"),
    "a word": (lambda: altered(put("kernel_latency_s", value="fast")), "kernel_latency_s is 'fast'"),
    "an unknown kind": (lambda: altered(put("samples", 0, "kind", value="magic")), "sample 0 is of 'magic'"),
    "an unknown collective": (lambda: altered(put("collectives", 0, "name", value="gossip")), "collective 0 is 'gossip'"),
    "an axis that is not there": (lambda: altered(put("collectives", 0, "axis", value="ep")), "on axis 'ep'"),
    "an op of no time": (lambda: altered(put("ops", value={"aten.mm": [0.0, 0.0]})), "forward seconds of aten.mm is 0.0"),
    "an op of half a time": (lambda: altered(put("ops", value={"aten.mm": [1.0]})), "backward seconds of aten.mm"),
    "a missing field": (lambda: altered(lambda body: body.pop("samples")), "samples"),
    "no fingerprint": (lambda: altered(lambda body: body["fingerprint"].pop("cores")), "no cores"),
    "a wrong mesh": (lambda: altered(put("mesh", "shape", value=[3, 1])), "one size per axis"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_profiles_are_refused(name: str, tmp_path: Path) -> None:
    make, reason = BROKEN[name]
    (tmp_path / "profile.json").write_text(make())
    with pytest.raises(HardwareError, match=reason) as caught:
        hardware_of(f"profile:{tmp_path / 'profile.json'}")
    assert "python -m autoshard profile" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match=r"cannot read the profile .*nowhere.json"):
        Hardware.from_profile(tmp_path / "nowhere.json")


def test_another_machine_is_refused_or_warned_of(tmp_path: Path) -> None:
    elsewhere = dataclasses.replace(sampled(), fingerprint={**sampled().fingerprint, "device": "abacus", "torch": "1.0"})
    path = elsewhere.save(tmp_path)
    with pytest.raises(
        HardwareError, match=r"of another machine: device is 'abacus' there, .* here; torch is '1.0' there, .*any_machine=True"
    ):
        hardware_of(f"profile:{path}")
    with pytest.warns(UserWarning, match="of another machine: device is 'abacus'"):
        found = Hardware.from_profile(path, any_machine=True)
    assert found == elsewhere.hardware()


# ------------------------------------------------------------------------------------------------------------- measuring


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest of every family."""
    families = {case.family: case for case in reversed(cases("cpu"))}
    monkeypatch.setattr("autoshard.profile_measuring.cases", lambda device_type: list(families.values()))


@pytest.mark.usefixtures("few_cases")
def test_this_machine_is_measured_and_planned_for(tmp_path: Path) -> None:
    profile = autoshard.profile(None, "cpu", limit_s=0.2, cache_dir=str(tmp_path))
    assert {(s.kind, s.dtype) for s in profile.samples} >= {("matmul", "float64"), ("attention", "bfloat16"), ("convolution", "float32")}
    assert all(is_positive(number) for s in profile.samples for number in (s.forward_s, s.backward_s, s.moved_bytes))
    assert newest_profile(tmp_path) == profile == loads_profile(profile.to_json())
    model, x = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), torch.zeros(8, 16)
    plan = autoshard.plan(model, "tp=2", (x,), hardware=profile.hardware(), template="megatron")
    measured = autoshard.measure_ops(plan, profile, share=1.0, budget_s=0.001, cache_dir=str(tmp_path))
    assert {key.partition("(")[0] for key in measured.ops} == {"aten.linear.default", "aten.gelu.default"}
    assert "aten.linear.default(float32[8, 16], float32[32, 16]*, float32[32]*)" in measured.ops
    assert newest_profile(tmp_path) == measured
    free = dataclasses.replace(measured, ops=dict.fromkeys(measured.ops, (1e-12, 0.0)))
    again = autoshard.plan(model, "tp=2", (x,), hardware=free.hardware(), template="megatron")
    latencies = 3 * profile.kernel_latency_s  # of the three ops, which cost at least that where no time is known
    assert again.stats["objective_s"] < plan.stats["objective_s"] - latencies
    assert autoshard.verify(model, again, (x,)).is_equal


def test_larger_cases_are_left_out_where_time_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [case for case in cases("cpu") if case.family == "linear torch.float64"]
    monkeypatch.setattr(profile_cases, "cases", lambda device_type: some)
    monkeypatch.setattr("autoshard.profile_measuring.cases", lambda device_type: some)
    profile = autoshard.profile(None, "cpu", limit_s=1e-6, save=False)
    assert len(profile.samples) == 1
    assert profile.notes[0] == "linear 128x128x128 and larger in linear torch.float64 would have taken too long to measure"
    assert not any("linear 64x64x64" in note for note in profile.notes)


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize(("cpu_s", "is_said"), [(0.25, True), (1.0, False), (2.0, False)])
def test_a_busy_machine_is_said(cpu_s: float, is_said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which this process has had `cpu_s` of every second."""

    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls) -> float:
            cls.now += 1e-3
            return cls.now

        @classmethod
        def process_time(cls) -> float:
            return cls.now * cpu_s

    monkeypatch.setattr("autoshard.profile_measuring.time", Clock)
    profile = autoshard.profile(None, "cpu", limit_s=0.1, save=False)
    said = "other work took the processor for 75% of the time: these times are longer than those of a quiet machine"
    assert (said in profile.notes) == is_said
    assert len(profile.notes) == is_said


@pytest.mark.parametrize(("device", "limit_s", "reason"), [("tpu", 1.0, "no device 'tpu'"), ("cpu", 0.0, "limit_s is 0.0")])
def test_wrong_arguments_are_refused(device: str, limit_s: float, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        autoshard.profile(None, device, limit_s=limit_s, save=False)


def test_measure_ops_needs_a_plan_and_a_profile(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes a Plan, got Linear"):
        autoshard.measure_ops(nn.Linear(2, 2))  # type: ignore[arg-type]
    plan = autoshard.plan(nn.Linear(4, 4), "tp=2", (torch.zeros(4, 4),))
    with pytest.raises(HardwareError, match="measure it: python -m autoshard profile"):
        autoshard.measure_ops(plan, cache_dir=str(tmp_path))


def _profile_on_a_rank(folder: str) -> Profile:
    few = {case.family: case for case in reversed(cases("cpu"))}
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoshard.profile_measuring.cases", lambda device_type: list(few.values()))
        patch.setattr("autoshard.profile_measuring._WHOLE_BYTES", (2**10, 2**14))
        return autoshard.profile(mesh, limit_s=0.2, cache_dir=folder)


def test_collectives_are_measured_on_every_axis(tmp_path: Path) -> None:
    one, other = run_on_ranks(2, _profile_on_a_rank, str(tmp_path))
    assert one == other
    assert {(s.axis, s.name, s.whole_bytes) for s in one.collectives} == {("dp", n, s) for n in COLLECTIVES for s in (2.0**10, 2.0**14)}
    assert (one.fingerprint["backend"], one.fingerprint["world_size"], len(list(tmp_path.iterdir()))) == ("gloo", 2, 1)
    assert [(link.name, link.devices) for link in one.hardware().links] == [("dp", None)]


# ---------------------------------------------------------------------------------------------------------- command line


@pytest.mark.usefixtures("few_cases")
def test_the_command_prints_json_or_a_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = ["profile", "--device", "cpu", "--limit", "0.1", "--cache", str(tmp_path)]
    assert main([*asked, "--json"]) == 0
    printed = loads_profile(capsys.readouterr().out)
    (path,) = tmp_path.iterdir()
    assert load_profile(path) == printed
    assert main(asked) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(word in shown for word in ("memory", "convolution", "kernel", "note: no collective was measured", 'hardware="measured"'))


def test_the_command_explains_what_is_missing(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["profile", "--mesh", "dp=2,tp=2"]) == 2
    assert "torchrun --nproc-per-node 4 -m autoshard profile --mesh dp=2,tp=2" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["profile", "--mesh", "dp=2,tp=2"]) == 2
    assert "has 4 ranks, torchrun started 2 processes" in capsys.readouterr().err
    assert main(["profile", "--mesh", "dp"]) == 2
    assert "cannot read mesh 'dp'" in capsys.readouterr().err
