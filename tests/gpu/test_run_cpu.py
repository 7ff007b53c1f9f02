"""tests/gpu/run.py on a machine without a GPU: its parts run with small sizes, and it says what failed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("run.py")


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_parts_run_on_the_cpu(tmp_path: Path) -> None:
    done = call("--cpu", "--out", str(tmp_path), "--only", "one_rank", "four_ranks", "fake_group", "memory", "one_rank_compiled")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: [is_good for _, is_good, _ in part["checks"]] for name, part in parts.items()} == {
        "one_rank": [True],
        "four_ranks": [True],
        "fake_group": [True],
        "memory": [True],
        "one_rank_compiled": [True],
    }
    text = (tmp_path / "gpu.md").read_text()
    assert text in done.stdout
    assert "## One rank of dp=2,tp=4 alone" in text


def test_a_part_that_hangs_is_stopped_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)  # by its path: the benchmarks have a run.py too
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    waits = [sys.executable, "-c", "import time; print('waiting', flush=True); time.sleep(60)"]
    monkeypatch.setattr(run, "command", lambda part, device, result: waits)
    found = run.run_part(run.PARTS[1], "cpu", limit_s=1)
    assert found["checks"] == [["runs to its end", False, "stopped after 1 s; waiting"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = call()
    assert done.returncode == 1
    assert "no CUDA device here, so nothing was checked" in done.stderr
