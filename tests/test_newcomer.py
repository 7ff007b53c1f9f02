"""A newcomer's walk, by processes as a reader starts them: the model of the first tutorial, planned, reported and emitted by the command
line, and what was emitted run by torchrun, against one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoshard.launcher import random_value
from autoshard.runtime.dtypes import short_dtype

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / ".ci"))

from run_code_blocks import blocks_of  # noqa: E402

SAVE = "import torch; from net import build; torch.save(build()[0].state_dict(), 'model.pt')"


def say(folder: Path, *words: str, module: str = "autoshard") -> str:
    """`python -m module words` in `folder`: what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT) if module == "autoshard" else ""}
    command = [sys.executable, *(["-m", module] if module else []), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    ("asked", "program"),
    [
        (["--mesh", "tp=2", "--template", "megatron"], "program.py"),
        pytest.param(["--mesh", "pp=2", "--microbatches", "4"], "stage_1.py", marks=pytest.mark.slow),
    ],
    ids=["tp", "pp"],
)
def test_from_the_tutorial_to_two_processes(asked: list[str], program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "tutorials" / "first-model.md").read_text()
    (text,) = ("\n".join([*block.lines, ""]) for block in blocks_of(page) if block.file == "net.py")
    (tmp_path / "net.py").write_text(text)

    assert asked[1] in say(tmp_path, "plan", "net.py:build", *asked, "--out", "plan.json")
    say(tmp_path, "report", "plan.json", "--out", "report.html")
    report = (tmp_path / "report.html").read_text()
    assert f"<h1>Net on {asked[1]}</h1>" in report
    told = say(tmp_path, "emit", "plan.json", "emitted")
    assert (tmp_path / "emitted" / program).exists()

    command = re.search(r"torchrun --standalone --nproc-per-node 2 emitted/run.py", told)
    assert command is not None, told
    say(tmp_path, "-c", SAVE, module="")
    ran = say(tmp_path, *command[0].split()[1:], "--steps", "1", "--device", "cpu", "--weights", "model.pt", module="torch.distributed.run")
    found = re.search(r"step 0: loss (\S+),.* gradient norm (\S+), ", ran)
    assert found is not None, ran
    loss, norm = on_one_process(tmp_path, monkeypatch)
    assert float(found[1]) == pytest.approx(loss, rel=1e-6)
    assert float(found[2]) == pytest.approx(norm, rel=1e-6)


def on_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Loss and gradient norm of the model itself, on the arguments that the launcher draws."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "net", raising=False)
    from net import build  # type: ignore[import-not-found]

    monkeypatch.delitem(sys.modules, "net")
    model, given = build()
    entries = {name: ([*value.shape], short_dtype(value.dtype), "") for name, value in zip("xy", given, strict=True)}
    loss = model(*(random_value(name, entry, "input") for name, entry in entries.items()))
    loss.backward()
    return loss.item(), torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item()
