"""The command line as a process: `python -m autoshard` interrupted, and with a reader who goes away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import autoshard
from autoshard.cli.command import INTERRUPTED, READER_GONE

ROOT = Path(__file__).parent.parent
SLOW = """
import time
from pathlib import Path

def build():
    Path("started").touch()
    time.sleep(300)
"""


def start(*words: str, folder: Path, **environment: str) -> subprocess.Popen:
    """`python -m autoshard words...` in `folder`."""
    own: dict[str, Any] = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "autoshard", *words]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it, and so would their children
    )


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A saved plan."""
    path = tmp_path / "plan.json"
    autoshard.plan(torch.nn.Linear(8, 8), "dp=2", (torch.zeros(4, 8),), template="fsdp").save(path)
    return path


def test_an_interrupt_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    with start("plan", "slow.py:build", "--mesh", "dp=2", folder=tmp_path) as process:
        while not (tmp_path / "started").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (INTERRUPTED, "", "interrupted\n")


def test_a_reader_who_has_gone_is_no_error(plan: Path) -> None:
    with start("show", str(plan), folder=plan.parent) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert (process.wait(), err) == (READER_GONE, "")


def test_a_plan_of_a_hugging_face_model_is_shown_in_another_process(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.zeros(4, 4, dtype=torch.long)
    autoshard.plan(model, "dp=2", (), {"input_ids": ids, "labels": ids, "use_cache": False}).save(tmp_path / "plan.json")
    process = start("show", "plan.json", folder=tmp_path)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "LlamaForCausalLM on dp=2" in shown
