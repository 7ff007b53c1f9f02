"""Plans as files: what is saved is what is loaded, and a file that was altered runs nothing."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import EXAMPLES, MLP

import autoshard
from autoshard import plan_file
from autoshard.errors import AutoshardError, PlanError
from autoshard.plan_schema import check_source

MARK = "raise SystemExit('executed')"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    autoshard.plan(EXAMPLES["gpt"].make(), "dp=2,tp=2", EXAMPLES["gpt"].batch(0)[0], template="megatron", hardware="h100").save(path)
    return path.read_text()


def load(text: str | bytes, folder: Path) -> autoshard.Plan:
    (folder / "plan.json").write_bytes(text.encode() if isinstance(text, str) else text)
    return autoshard.Plan.load(folder / "plan.json")


def altered(text: str, change: Callable[[dict], Any]) -> str:
    """The plan after `change`, with a checksum that fits."""
    body = json.loads(text)
    del body["sha256"]
    change(body)
    return json.dumps({"sha256": plan_file.digest(body), **body})


def node(body: dict, part: str, role: str = "op") -> dict:
    return next(n for n in body["program"]["nodes"] if part in n["target"] and n["facts"]["role"] == role)


@pytest.mark.parametrize("example", EXAMPLES)
def test_what_is_saved_is_what_is_loaded(example: str, tmp_path: Path) -> None:
    model = EXAMPLES[example].model()
    args, kwargs = EXAMPLES[example].batch(0)
    plan = autoshard.plan(model, "dp=2,tp=2", args, kwargs, template="megatron_sp", hardware="h100")
    plan.save(tmp_path / "first.json")
    loaded = autoshard.Plan.load(tmp_path / "first.json")
    loaded.save(tmp_path / "second.json")
    assert (tmp_path / "first.json").read_text() == (tmp_path / "second.json").read_text()
    assert loaded.source() == plan.source()
    assert loaded.fingerprint == plan.fingerprint
    assert loaded.parameter_layouts == plan.parameter_layouts
    assert loaded.notes == plan.notes
    assert loaded.stats == plan.stats
    assert autoshard.verify(model, loaded, args, kwargs, tolerance=1e-5).is_equal


def test_a_truncated_plan_is_refused(text: str, tmp_path: Path) -> None:
    for length in [0, 1, 10, *range(100, len(text) - 1, len(text) // 50), len(text) - 2]:
        with pytest.raises(PlanError, match="this is not a plan, or a truncated one"):
            load(text[:length], tmp_path)


def test_a_plan_with_one_flipped_byte_is_refused(text: str, tmp_path: Path) -> None:
    """Or it reads as the same plan: white space between fields may change."""
    raw, draw = text.encode(), random.Random(0)
    original = load(text, tmp_path)
    refused = 0
    for _ in range(300):
        position = draw.randrange(len(raw))
        flipped = raw[:position] + bytes([raw[position] ^ (1 << draw.randrange(8))]) + raw[position + 1 :]
        try:
            assert load(flipped, tmp_path).source() == original.source()
        except PlanError:
            refused += 1
    assert refused > 100


def test_a_changed_plan_without_its_checksum(text: str, tmp_path: Path) -> None:
    changed = text.replace('"megatron"', '"fsdp"', 1)
    with pytest.raises(
        PlanError, match=r"the plan was altered after it was saved .*; plan again, and change constraints rather than the file"
    ):
        load(changed, tmp_path)
    with pytest.raises(PlanError, match="the plan has format version 99, this autoshard reads 3"):
        load(altered(text, lambda body: body.update(version=99)), tmp_path)
    with pytest.raises(PlanError, match=r"cannot read the plan .*absent\.json"):
        autoshard.Plan.load(tmp_path / "absent.json")


def set_path(*path: Any, value: Any) -> Callable[[dict], None]:
    def change(body: dict) -> None:
        for step in path[:-1]:
            body = body[step]
        body[path[-1]] = value

    return change


def on_node(part: str, role: str, *path: Any, value: Any) -> Callable[[dict], None]:
    return lambda body: set_path(*path, value=value)(node(body, part, role))


_ENUM = json.dumps(
    [1, {"type": "builtins.dict", "context": json.dumps([{"__enum__": True, "fqn": "this:x", "name": "a"}]), "children_spec": []}]
)
_FACTORY = {"default_factory_module": "this", "default_factory_name": "s", "dict_context": []}
_DEFAULTDICT = json.dumps([1, {"type": "collections.defaultdict", "context": _FACTORY, "children_spec": []}])
MALICIOUS = {
    "an op that reads files": (
        on_node("aten.linear", "op", "target", value="aten.from_file.default"),
        "aten.from_file.default, which plans may not",
    ),
    "an op that writes": (on_node("aten.add", "op", "target", value="aten.add_.Tensor"), "aten.add_.Tensor, which plans may not"),
    "no op": (on_node("aten.add", "op", "target", value="aten.__class__.mro"), "which is no torch op here"),
    "a library": (on_node("aten.add", "op", "target", value="load_library"), "'load_library', which is no torch op here"),
    "a function that does not exist": (
        on_node("runtime:vary", "conversion", "target", value="runtime:exec"),
        "calls 'exec', which is not a function",
    ),
    "a function of the runtime's own": (
        on_node("runtime:vary", "conversion", "target", value="runtime:seeded"),
        "calls 'seeded', which is not",
    ),
    "another lowering": (on_node("runtime:cross_entropy", "op", "target", value="runtime:embedding"), "is lowered to embedding"),
    "a node of another kind": (on_node("aten.add", "op", "kind", value="call_method"), "a node of kind 'call_method'"),
    "an op that claims to be an update": (on_node("aten.add", "op", "facts", "role", value="update"), "a update calls aten.add.Tensor"),
    "an op that claims to be a parameter": (
        on_node("aten.add", "op", "facts", "role", value="parameter"),
        "a call_function in the role of parameter",
    ),
    "code in a parameter's name": (
        on_node("weight", "parameter", "facts", "name", value=f'x")\n        {MARK}\n        ("'),
        "malformed: the name",
    ),
    "code in the source line": (
        on_node("aten.add", "op", "facts", "source", value=["", "", "", "a.py", 1, f"x\n        {MARK}"]),
        "where a node comes from",
    ),
    "code in the file": (on_node("aten.add", "op", "facts", "source", value=["", "", "", f"a\r{MARK}", 1, "x"]), "where a node comes from"),
    "code in the line number": (
        on_node("aten.add", "op", "facts", "source", value=["", "", "", "a.py", f"1\n{MARK}", "x"]),
        "where a node comes",
    ),
    "code in a random site": (on_node("aten.add", "op", "facts", "site", value=f"exec({MARK!r})"), "malformed: site"),
    "code in random axes": (on_node("aten.add", "op", "facts", "random_axes", value=[f"exec({MARK!r})"]), "malformed: random_axes"),
    "code in a keyword": (on_node("aten.add", "op", "kwargs", value={"dict": {f"alpha=exec({MARK!r}), b": 1}}), "has no argument"),
    "code in axes": (
        on_node("runtime:cross_entropy", "op", "kwargs", value={"dict": {"batch_axes": {"tuple": [f"exec({MARK!r})"]}}}),
        "batch_axes of",
    ),
    "code in a number": (on_node("aten.add", "op", "kwargs", value={"dict": {"alpha": {"float": f"exec({MARK!r})"}}}), "a number"),
    "code in the model's name": (set_path("model_name", value=f'"""\n{MARK}\n"""'), "the model's name"),
    "code in the passes": (set_path("program", "passes", value=[f'"""\n{MARK}\n"""']), "names of passes"),
    "code in an axis": (set_path("program", "mesh", "axes", value=["dp", f"tp\n{MARK}"]), "is not a name"),
    "a dtype that is a function": (on_node("aten.add", "op", "facts", "values", value=[[[4, 8, 16], "load", True]]), "'load' is no dtype"),
    "an enum that imports a module": (set_path("program", "in_spec", value=_ENUM), "names a Python object; plans hold plain containers"),
    "a container that imports a module": (set_path("program", "out_spec", value=_DEFAULTDICT), "names a Python object"),
    "no output": (lambda body: body["program"]["nodes"].pop(), "does not end in one output"),
    "a missing field": (lambda body: body["program"].pop("stats"), "does not describe a program: KeyError: 'stats'"),
    "a missing hardware": (lambda body: body.pop("hardware"), "'hardware'"),
    "another layout": (on_node("aten.linear", "op", "facts", "layouts", value=["S(0)@dp S(1)@tp"]), "does not type-check"),
    "a dropped conversion": (lambda body: drop(body, "runtime:all_reduce_invariant"), "does not type-check"),
    "another collective": (on_node("runtime:all_reduce", "conversion", "target", value="runtime:vary"), "does not type-check"),
    "another axis": (on_node("runtime:all_reduce_invariant", "conversion", "args", "tuple", 1, value="dp"), "does not type-check"),
    "a shape that does not divide": (
        on_node("weight", "parameter", "facts", "values", value=[[[33, 16], "float32", True]]),
        "does not type-check",
    ),
}


def drop(body: dict, target: str) -> None:
    """Take a conversion out, its users read what it read."""
    gone = node(body, target, "conversion")
    body["program"]["nodes"].remove(gone)
    source = gone["args"]["tuple"][0]["node"]
    rest = json.dumps(body["program"]["nodes"]).replace(json.dumps({"node": gone["name"]}), json.dumps({"node": source}))
    body["program"]["nodes"] = json.loads(rest)


@pytest.mark.parametrize("name", MALICIOUS)
def test_an_altered_plan_with_a_fitting_checksum_is_refused(name: str, text: str, tmp_path: Path) -> None:
    change, reason = MALICIOUS[name]
    with pytest.raises(AutoshardError) as caught:
        load(altered(text, change), tmp_path)
    assert reason in str(caught.value)


def test_fields_of_other_types_give_one_kind_of_error(text: str, tmp_path: Path) -> None:
    """Every field of the plan and of some nodes, replaced by values of other types."""
    plan = load(text, tmp_path)
    paths: list[tuple] = [("program", key) for key in json.loads(text)["program"]]
    entry = json.loads(text)["program"]["nodes"][-3]
    paths += [("program", "nodes", -3, key) for key in entry] + [("program", "nodes", -3, "facts", key) for key in entry["facts"]]
    for path in paths:
        for value in (None, 7, "x", [], {}, [[]], [{"node": "none"}], True):
            try:
                changed = load(altered(text, set_path(*path, value=copy.deepcopy(value))), tmp_path)
            except AutoshardError:
                continue
            check_source(changed.source())
            assert changed.mesh == plan.mesh


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import os", "imports more than torch"),
        ("from os import system", "imports more than its runtime"),
        ("print(1)", "calls print"),
        ("torch.load('x')", "calls torch.load"),
        ("x = ().__class__", "reads __class__"),
        ("__import__('os')", "its program calls __import__"),
        ("x = (", "does not give a program"),
    ],
)
def test_programs_call_ops_and_the_runtime_only(line: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_source(f"import torch\n{line}\n")


def test_what_was_asked_survives(tmp_path: Path) -> None:
    plan = autoshard.plan(MLP(), "dp=2", (torch.randn(4, 8),), constraints={"up.weight": "S(0)"}, inputs="local", outputs="dtensor")
    plan.save(tmp_path / "plan.json")
    loaded = autoshard.Plan.load(tmp_path / "plan.json")
    assert (loaded.inputs, loaded.outputs, loaded.template, loaded.constraints) == ("local", "dtensor", "auto", {"up.weight": "S(0)"})
    assert loaded.hardware == plan.hardware
