"""Hardware as data: presets and their text forms, what is refused, and how mesh axes lie on nested links."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import autoshard
from autoshard import Device, Hardware, Link, plan_file
from autoshard.collectives import axis_links, collective_terms
from autoshard.errors import HardwareError
from autoshard.hardware import PRESETS, hardware_of


def test_rates_depend_on_the_dtype() -> None:
    h100 = hardware_of("h100").device
    assert h100.flops_per_s["float64"] == 67e12
    assert h100.reached_flops_per_s(torch.float64) == 67e12 * h100.efficiency
    assert h100.reached_flops_per_s(torch.bfloat16) > 10 * h100.reached_flops_per_s(torch.float32)
    assert h100.reached_flops_per_s(torch.complex64) == h100.reached_flops_per_s(torch.float32) / 4
    faster = hardware_of("h100").with_tf32()
    assert faster.device.reached_flops_per_s(torch.float32) == 494.7e12 * h100.efficiency
    assert hardware_of("cpu").with_tf32().device.flops_per_s == hardware_of("cpu").device.flops_per_s


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_read_back_from_json(name: str) -> None:
    preset = hardware_of(name)
    assert Hardware.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset
    assert hash(preset) == hash(hardware_of(name))


def test_text_forms() -> None:
    assert hardware_of(None, "cuda") is PRESETS["h100"]
    assert hardware_of(None) is PRESETS["cpu"]
    assert hardware_of("h100x8") is PRESETS["h100"]
    four = hardware_of("h100x4")
    assert (four.name, four.links[0].devices, four.links[1].devices, four.device) == ("h100x4", 4, None, PRESETS["h100"].device)
    assert hardware_of(four) is four


@pytest.mark.parametrize("text", ["h1000", "h100x0", "h100x", "H100", "", "h100 x 4", "x4"])
def test_unknown_names_are_refused(text: Any) -> None:
    if text == "":
        assert hardware_of(text) is PRESETS["cpu"]  # as None
        return
    with pytest.raises(HardwareError, match=r"there are a100 \(a100x4: nodes of 4\), h100 .*, cpu; 'measured'"):
        hardware_of(text)


@pytest.mark.parametrize("given", [8, 0, lambda: None])
def test_other_things_are_refused(given: Any) -> None:
    with pytest.raises(HardwareError, match=r"an autoshard\.Hardware or a name, not a (int|function); of a profile: profile\.hardware\(\)"):
        hardware_of(given)


def test_a_cpu_has_no_nodes() -> None:
    with pytest.raises(HardwareError, match="cpu has no nodes"):
        hardware_of("cpux4")


def refused(change: dict[str, Any], device: dict[str, Any] | None = None, link: dict[str, Any] | None = None) -> dict[str, Any]:
    body = hardware_of("h100").to_dict()
    body["device"] |= device or {}
    body["links"][0] |= link or {}
    return {**body, **change}


WRONG = {
    "no device": (refused({"device": {}}), "missing"),
    "a field more": (refused({}, {"colour": "green"}), "colour"),
    "no float32": (refused({}, {"flops_per_s": {"float64": 1e12}}), "float32 among them"),
    "an unknown dtype": (refused({}, {"flops_per_s": {"float32": 1e12, "float31": 1e12}}), "no dtype 'float31'"),
    "a negative rate": (refused({}, {"flops_per_s": {"float32": -1e12}}), "flops_per_s of float32 is -1000000000000.0"),
    "no memory": (refused({}, {"memory_bytes": 0.0}), "memory_bytes is 0.0"),
    "a rate that is no number": (refused({}, {"memory_bytes_per_s": math.nan}), "memory_bytes_per_s is nan"),
    "an endless latency": (refused({}, {"kernel_latency_s": math.inf}), "kernel_latency_s is inf"),
    "a rate in words": (refused({}, {}, {"bytes_per_s": "fast"}), "bytes_per_s is 'fast'"),
    "a truth for a number": (refused({}, {"efficiency": True}), "efficiency is True"),
    "half a device": (refused({}, {}, {"devices": 0.5}), "got 0.5"),
    "no links": (refused({"links": []}), "got \\[\\]"),
    "links that shrink": (refused({"links": [{**refused({})["links"][0], "devices": d} for d in (8, 4)]}), "got \\[8, 4\\]"),
    "links that do not nest": (refused({"links": [{**refused({})["links"][0], "devices": d} for d in (8, 12)]}), "got \\[8, 12\\]"),
    "links without end inside": (refused({"links": [{**refused({})["links"][0], "devices": d} for d in (None, 8)]}), "got \\[inf, 8\\]"),
    "two links without end": (refused({"links": [{**refused({})["links"][0], "devices": d} for d in (None, None)]}), "outermost|holds"),
    "a name of two lines": (refused({"name": "a\nb"}), "printable"),
    "measured nothing": (refused({"measured": {"ranges": {"memory": [1.0, -1.0]}}}), "range of memory is 1.0 to -1.0"),
    "a measured call of no time": (refused({"measured": {"ops": {"aten.mm": [0.0, 1.0]}}}), "seconds of aten.mm are 0.0 and 1.0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_hardware_is_refused(name: str) -> None:
    body, reason = WRONG[name]
    with pytest.raises(HardwareError, match=reason):
        Hardware.from_dict(body)


def test_plans_keep_their_hardware(tmp_path: Path) -> None:
    plan = autoshard.plan(nn.Linear(4, 8), "dp=2,tp=2", (torch.zeros(4, 4),), hardware="h200x4")
    path = tmp_path / "plan.json"
    plan.save(path)
    assert autoshard.Plan.load(path).hardware == plan.hardware == hardware_of("h200x4")
    body = json.loads(path.read_text())
    body["hardware"]["device"]["memory_bytes"] = -1
    del body["sha256"]
    path.write_text(json.dumps({"sha256": plan_file.digest(body), **body}))
    with pytest.raises(HardwareError, match="memory_bytes is -1"):
        autoshard.Plan.load(path)


# ------------------------------------------------------------------------------------------------------- axes on links

LINKS = {  # hardware, mesh shape, axis -> bytes/s of its ring, hops of a ring and of a tree by link
    "inside a node": ("h100", (2, 8), 1, 450e9, (7, 0), (7, 0)),
    "one rank in each node": ("h100", (16, 8), 0, 50e9, (0, 15), (0, 4)),
    "over two nodes, eight ports": ("h100", (16,), 0, 400e9, (14, 1), (7, 1)),
    "over four nodes, two ranks in each": ("h100", (8, 4), 0, 100e9, (4, 3), (1, 2)),
    "nodes of four": ("h100x4", (2, 8), 1, 200e9, (6, 1), (3, 1)),
    "three ranks, the last alone in its node": ("h100", (3, 4), 0, 50e9, (1, 1), (1, 1)),
    "one link": ("cpu", (4, 4), 0, 1e9, (3,), (3,)),
}


@pytest.mark.parametrize("name", LINKS)
def test_axes_lie_on_links(name: str) -> None:
    preset, shape, axis, rate, ring, tree = LINKS[name]
    hardware = hardware_of(preset)
    found = axis_links(hardware, shape, axis)
    assert found.ring_bytes_per_s == pytest.approx(rate)
    assert found.ring_latency_s == pytest.approx(sum(hops * link.latency_s for hops, link in zip(ring, hardware.links, strict=True)))
    assert found.tree_latency_s == pytest.approx(sum(hops * link.latency_s for hops, link in zip(tree, hardware.links, strict=True)))
    several = len(collective_terms(hardware, found, "all_gather"))
    assert several == (2 if sum(tree) < sum(ring) else 1)


def test_an_all_to_all_between_nodes_goes_by_each_ranks_own_port() -> None:
    """16 ranks in two nodes: half of what a rank holds leaves its node; a ring of eight ports is eight times as wide."""
    hardware = hardware_of("h100")
    links = axis_links(hardware, (16,), 0)
    ((_, per_byte),) = collective_terms(hardware, links, "all_to_all")
    assert per_byte == pytest.approx(8 / 16 / 16 / 50e9)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.sampled_from([(2,), (4,), (2, 8), (3, 6)]), st.data())
def test_hops_and_rates_against_the_ring_itself(shape: list[int], nodes: tuple[int, ...], data: st.DataObject) -> None:
    """Each ring is walked: a hop is on the innermost link that holds both ends; what leaves a block leaves by its members' ports."""
    axis = data.draw(st.integers(0, len(shape) - 1))
    links = tuple(Link(f"l{k}", n, 1e9 / (k + 1), 1e-6 * 10**k) for k, n in enumerate((*nodes, None)))
    hardware = Hardware("nested", hardware_of("h100").device, links)
    coordinates = list(itertools.product(*map(range, shape)))
    groups: dict[tuple, list[int]] = {}
    for rank, coordinate in enumerate(coordinates):
        groups.setdefault((*coordinate[:axis], *coordinate[axis + 1 :]), []).append(rank)

    def link_between(a: int, b: int) -> int:
        return next(k for k, n in enumerate((*nodes, 10**6)) if a // n == b // n)

    latency, rate = 0.0, math.inf
    for group in groups.values():
        hops = [link_between(a, b) for a, b in itertools.pairwise(group)]
        latency = max(latency, sum(links[k].latency_s for k in hops))
        for k in set(hops):
            inside = 1 if k == 0 else nodes[k - 1]  # devices of a block that this link connects with others
            members = min(sum(other // inside == rank // inside for other in group) for rank in group)
            rate = min(rate, members * links[k].bytes_per_s)
    found = axis_links(hardware, tuple(shape), axis)
    assert found.ring_latency_s == pytest.approx(latency)
    assert found.ring_bytes_per_s == pytest.approx(rate)
    assert found.tree_latency_s <= found.ring_latency_s * (1 + 1e-9)


def test_more_ranks_than_devices_are_refused() -> None:
    eight = dataclasses.replace(hardware_of("h100"), links=hardware_of("h100").links[:1])
    assert axis_links(eight, (8,), 0).n == 8
    with pytest.raises(HardwareError, match="16 ranks, hardware 'h100' has 8 devices"):
        axis_links(eight, (2, 8), 0)


def test_one_rate_and_one_link() -> None:
    rates = {"flops_per_s": 1.0, "memory_bytes_per_s": 2.0, "memory_bytes": 3.0, "link_bytes_per_s": 4.0}
    plain = Hardware.uniform("plain", **rates, collective_latency_s=0.0, kernel_latency_s=0.0)
    assert {plain.device.reached_flops_per_s(dtype) for dtype in (torch.float64, torch.int64, torch.bfloat16)} == {1.0}
    assert axis_links(plain, (4, 4), 0).ring_bytes_per_s == 4.0
    assert isinstance(plain.device, Device)
