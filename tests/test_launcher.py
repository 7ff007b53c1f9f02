"""An emitted folder runs under torchrun by itself, equal to the single process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import EXAMPLES

import autoshard
from autoshard import launcher
from autoshard.mesh import MeshSpec
from autoshard.placements import parse_layout, shard


def run(folder: Path, processes: int, *options: str) -> subprocess.CompletedProcess:
    """Run the folder from elsewhere, where autoshard cannot be imported."""
    block = folder / "no_autoshard"
    block.mkdir(exist_ok=True)
    (block / "autoshard.py").write_text("raise ImportError('an emitted program must not need autoshard')\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(block)}
    command = [*torchrun, str(folder / "run.py"), "--steps", "2", *options]
    return subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("example", "template", "mesh"), [("gpt", "megatron", "tp=2"), ("conv_net", "ddp", "dp=2")])
def test_equal_to_the_single_process(example: str, template: str, mesh: str, tmp_path: Path) -> None:
    model = EXAMPLES[example].model()
    args, kwargs = EXAMPLES[example].batch(0)
    plan = autoshard.plan(model, mesh, args, kwargs, template=template, hardware="h100")
    folder = plan.emit(tmp_path / "out")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    result = run(folder, 2, "--weights", str(tmp_path / "model.pt"), "--device", "cpu")
    assert result.returncode == 0, result.stderr

    namespace: dict = {}
    sys.modules.setdefault("autoshard_runtime", __import__("autoshard.runtime", fromlist=["runtime"]))
    exec(plan.source(), namespace)
    inputs = [launcher.random_value(name, entry, "input") for name, entry in namespace["Rank"].INPUTS.items()]
    returned = model(*inputs)
    loss = returned[0] if isinstance(returned, tuple) else returned
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    shown = re.search(r"step 0: loss (\S+),.* gradient norm (\S+), \S+ ms", result.stdout)
    assert shown is not None, result.stdout
    assert float(shown[1]) == pytest.approx(loss.item(), abs=2e-8)
    assert float(shown[2]) == pytest.approx(norm.item(), rel=1e-6)
    assert "step 1: " in result.stdout
    assert f"mesh {mesh} on cpu" in result.stdout


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    model = EXAMPLES["gpt"].model()
    folder = autoshard.plan(model, "tp=2", EXAMPLES["gpt"].batch(0)[0], template="megatron").emit(tmp_path / "out")
    assert "the program is for mesh tp=2, 2 processes; torchrun started 1: use --nproc-per-node 2" in run(folder, 1).stderr
    alone = subprocess.run([sys.executable, folder / "run.py"], capture_output=True, text=True, check=False)
    assert "start this with torchrun --nproc-per-node 2" in alone.stderr
    with pytest.raises(SystemExit, match=r"cannot read the weights .*none\.pt"):
        launcher.read_weights(str(tmp_path / "none.pt"), {})
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(SystemExit, match=r"lack head\.weight; save them with torch\.save\(\{\*\*model\.state_dict\(\)"):
        launcher.read_weights(str(tmp_path / "weights.pt"), {"head.weight": ([2], "f32", "I@tp")})
    with pytest.raises(SystemExit, match=r"are of another model: a is \[2\], the program reads \[3\]"):
        launcher.read_weights(str(tmp_path / "weights.pt"), {"a": ([3], "f32", "I@tp")})


@pytest.mark.parametrize(
    "text",
    ["S(0)@a I@b", "S(1)@a S(0)@b", "S(0)@a S(0)@b", "S(0:3x8)@a I@b", "S(0:3x8)@a S(0:3x8)@b", "R@a S(0:8+8+8)@b"],
)
def test_pieces_are_those_of_the_planner(text: str) -> None:
    mesh, whole = MeshSpec(("a", "b"), (2, 2)), torch.arange(24 * 4).view(24, 4)
    for coordinate in mesh.coordinates():
        mine = launcher.local_piece(whole, text, {"a": 2, "b": 2}, dict(zip("ab", coordinate, strict=True)))
        assert torch.equal(mine, shard(whole, parse_layout(text, mesh), mesh, coordinate)), coordinate


def test_constants_come_from_the_plan() -> None:
    from autoshard.plan_file import _tensor

    values = {"a": torch.tensor([[1, 2]]), "b": torch.tensor(True), "c": torch.zeros(0, 3)}
    read = launcher.read_constants({"program": {"constants": {name: _tensor(value) for name, value in values.items()}}})
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in values.items())
