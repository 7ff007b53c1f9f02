"""Every example runs to its end on a small size; each compares itself with one process, and exits with an error where it differs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORTED = {"gpt.py", "llama.py", "side_by_side.py"}  # by other examples and tests
COMMANDS = {
    "custom_op.py": [],
    "train_mlp.py": [],
    "train_hf_llama.py": ["--steps", "2"],
    "train_vit.py": ["--steps", "2", "--batch", "8"],
    "train_unet.py": ["--steps", "2", "--size", "32"],
    "train_moe.py": ["--steps", "2"],
    "resume_elsewhere.py": ["--steps", "1"],
    "pipeline_uneven.py": ["--steps", "1"],
    "demo.py": ["--small", "--steps", "2"],
    "plan_llama.py": [],
    "plan_llama_70b.py": ["--layers", "2"],
}
QUICK = ("custom_op.py",)


def run(name: str, folder: Path) -> str:
    """Run an example as its docstring says. Returns what it printed."""
    path = ROOT / "examples" / name
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if "torchrun" in path.read_text() else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(path), *COMMANDS[name]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS])
def test_runs(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path).strip()
    for trace in (tmp_path / "out" / "pipeline").glob("*.json"):
        rows = {event["args"]["name"] for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "thread_name"}
        assert rows == {"rank 0", "rank 1", "rank 0 measured", "rank 1 measured"}


def test_every_example_is_run_and_says_how() -> None:
    examples = {path.name for path in (ROOT / "examples").glob("*.py")} - IMPORTED
    assert examples == set(COMMANDS)
    target = re.search(r"^examples:.*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert target is not None
    for name in examples:
        assert f"examples/{name}" in (ROOT / "examples" / name).read_text().split('"""')[1], (
            f"the docstring of {name} does not say how to run it"
        )
        assert f"examples/{name}" in target[1], f"make examples does not run {name}"
