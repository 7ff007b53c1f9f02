"""Draw the pictures that the documentation shows, into docs/images: graphs by Graphviz's dot, reports as Debian's chromium shows them.

    python .ci/make_screenshots.py [--out docs/images]

Plans are of models in examples/ and of a Llama with 8 billion parameters, without weights. Their numbers are predictions for H100s, so
they are the same on every machine; fonts may differ.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import autoshard
from autoshard.pipeline import Pipelining

ROOT = Path(__file__).parent.parent
MOST_BYTES = 200_000
NEEDED = {"dot": "apt-get install graphviz", "chromium": "apt-get install chromium"}


@dataclass(frozen=True)
class Shot:
    """One picture of a report. sections: their names, where only these are shown."""

    name: str
    report: str
    width: int
    height: int
    is_dark: bool = False
    sections: tuple[str, ...] = ()


SHOTS = (
    Shot("report_light.png", "llama", 1200, 900),
    Shot("report_dark.png", "llama", 1200, 900, is_dark=True),
    Shot("report_narrow_light.png", "llama", 390, 844),
    Shot("report_narrow_dark.png", "llama", 390, 844, is_dark=True, sections=("time", "timeline")),
    Shot("report_graph.png", "llama", 1200, 1000, sections=("graph",)),
    Shot("report_pipeline.png", "stages", 1200, 960, is_dark=True, sections=("stages", "timeline")),
)


def plan(model: nn.Module, mesh: str, *batch: Tensor, **asked: Any) -> autoshard.Plan:
    return autoshard.plan(model, mesh, batch, hardware="h100", **asked)


def plan_llama(mesh: str, **asked: Any) -> autoshard.Plan:
    """A Llama of 8.0 billion parameters on 8 sequences of 4,096 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False, attn_implementation="sdpa")).to(torch.bfloat16)
        ids = torch.zeros(8, 4096, dtype=torch.long)
    return autoshard.plan(model, mesh, (), {"input_ids": ids, "labels": ids}, hardware="h100", **asked)


def draw_graphs(folder: Path) -> None:
    """A GPT by modules and one of its layers, a small model op by op, and a U-Net cut in stages."""
    from gpt import GPT, GPTConfig
    from train_unet import UNet, draw_images

    ids = torch.zeros(8, 128, dtype=torch.long)
    gpt = plan(GPT(GPTConfig()), "dp=2,tp=2", ids, ids, template="megatron")  # left to the search, so small a model is not split
    mlp = plan(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), "dp=2,tp=2", torch.zeros(8, 64), template="megatron")
    stages = Pipelining(microbatches=4, schedule="1f1b")
    unet = plan(UNet(), "pp=2,dp=2", *draw_images(32, 64), pipeline=stages, template="ddp")
    for name, picture in (
        ("gpt_dp2_tp2", gpt.graph("modules")),
        ("gpt_layer_dp2_tp2", gpt.graph("layer")),
        ("mlp_ops_dp2_tp2", mlp.graph("ops")),
        ("unet_pp2_dp2", unet.graph("modules")),
    ):
        picture.render(outfile=folder / f"{name}.svg", cleanup=True)


def write_reports(folder: Path) -> None:
    """llama.html and stages.html."""
    plan_llama("dp=2,tp=4").report(folder / "llama.html")
    plan_llama("pp=4,dp=2", pipeline=Pipelining(microbatches=8, schedule="1f1b")).report(folder / "stages.html")


def take(shot: Shot, reports: Path, out: Path) -> None:
    """One picture, by a browser of its own."""
    page = reports / f"{shot.name}.html"
    hidden = f"section:not({', '.join(f'#{name}' for name in shot.sections)}) {{ display: none; }}" if shot.sections else ""
    page.write_text((reports / f"{shot.report}.html").read_text().replace("</style>", f"{hidden}</style>", 1))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={reports / 'profile'}"]
    look = [f"--window-size={shot.width},{shot.height}", f"--blink-settings=preferredColorScheme={0 if shot.is_dark else 1}"]
    target = out / shot.name
    target.unlink(missing_ok=True)
    command = ["chromium", *flags, *look, f"--screenshot={target}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if not target.exists():
        raise SystemExit(f"chromium took no picture of {page.name}:\n{done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    out = parser.parse_args().out.resolve()
    missing = [f"{name} ({how})" for name, how in NEEDED.items() if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"pictures need programs that are not on PATH: {', '.join(missing)}")
    sys.path.insert(0, str(ROOT / "examples"))
    out.mkdir(parents=True, exist_ok=True)
    draw_graphs(out)
    with tempfile.TemporaryDirectory() as folder:
        write_reports(Path(folder))
        for shot in SHOTS:
            take(shot, Path(folder), out)
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size / 1e3:6.0f} kB  {path.name}")
    large = [path.name for path in out.iterdir() if path.stat().st_size > MOST_BYTES]
    if large:
        raise SystemExit(f"more than {MOST_BYTES / 1e3:.0f} kB: {', '.join(sorted(large))}")


if __name__ == "__main__":
    main()
