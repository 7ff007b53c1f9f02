"""Measure how long planning takes for large models on large meshes; writes docs/benchmarks/plan_speed.md.

python tests/benchmarks/plan_speed.py                    all cases, each in a fresh process; no GPU, no weights, tens of minutes
python tests/benchmarks/plan_speed.py --only llama-8b    some of them
python tests/benchmarks/plan_speed.py --once llama-8b    one, in this process, its numbers as JSON
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
from page import OUT, heading, table, write

import autoshard
from autoshard.text import human_bytes, human_seconds

BATCH, LENGTH = 16, 2048
TIMEOUT_S = 3600


def llama(layers: int, width: int, inner: int, heads: int, kv_heads: int = 8) -> nn.Module:
    """Sizes of Llama 3 (Grattafiori et al., "The Llama 3 herd of models", 2024, table 3); vocabulary of 128,256."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=8192,
            rope_theta=500000.0,
            use_cache=False,
        )
    )


def olmoe() -> nn.Module:
    """OLMoE-1B-7B: 64 experts of which 8 work on a token (Muennighoff et al., 2024)."""
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=50304,
            hidden_size=2048,
            intermediate_size=1024,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=16,
            num_experts=64,
            num_experts_per_tok=8,
            use_cache=False,
        )
    )


class Case(NamedTuple):
    """A model on a mesh of H100s."""

    name: str
    make: Callable[[], nn.Module]
    mesh: str


CASES = {
    "llama-8b": Case("Llama 3 8B, 32 layers", lambda: llama(32, 4096, 14336, 32), "dp=8,tp=8"),
    "llama-70b": Case("Llama 3 70B, 80 layers", lambda: llama(80, 8192, 28672, 64), "dp=8,tp=8"),
    "olmoe": Case("OLMoE 7B, 16 layers, 64 experts", olmoe, "dp=8,tp=8"),
    "llama-70b-3d": Case("Llama 3 70B, 80 layers", lambda: llama(80, 8192, 28672, 64), "dp=4,cp=4,tp=4"),
    "llama-405b-2-layers": Case("Llama 3 405B, 2 of its layers", lambda: llama(2, 16384, 53248, 128), "dp=16,cp=8,tp=8"),
    "llama-405b": Case("Llama 3 405B, 126 layers", lambda: llama(126, 16384, 53248, 128), "dp=16,cp=8,tp=8"),
}


def plan_once(case: Case) -> dict[str, Any]:
    """Plan in this process; seconds from the module to the emitted program: import and construction are not counted."""
    with torch.device("meta"):
        model = case.make().to(torch.bfloat16)
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    wall, cpu = time.perf_counter(), time.process_time()
    with mock.patch("time.perf_counter", time.process_time):  # phases in CPU seconds, whatever else the machine does
        plan = autoshard.plan(model, case.mesh, (), {"input_ids": ids, "labels": ids}, hardware="h100")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = {key: value for key, value in plan.stats.items() if isinstance(value, (int, float))}
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "parameters": sum(p.numel() for p in model.parameters()), "wall_s": wall, "cpu_s": cpu, "peak_rss_bytes": rss}


def measure(key: str) -> dict[str, Any]:
    """plan_once in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--once", key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"{key} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def cells(case: Case, run: dict[str, Any]) -> list[str]:
    phases = [run[f"{name}_s"] for name in ("trace", "build", "solve", "emit")]
    shown = [f"{seconds:.2f}" for seconds in (*phases, run["cpu_s"] - sum(phases))]
    if sum(phases) > run["cpu_s"]:  # of an older file, in wall seconds
        shown = [""] * len(shown)
    size = f"{run['parameters'] / 1e9:.1f} B"
    whole = [f"{run['cpu_s']:.1f}", f"{run['wall_s']:.1f}", human_bytes(run["peak_rss_bytes"])]
    predicted = [human_seconds(run[name]) for name in ("objective_s", "bound_s")]
    return [case.name, size, case.mesh, str(run["nodes"]), str(run["variables"]), *shown, *whole, *predicted]


def report(runs: dict[str, dict[str, Any]]) -> str:
    columns = ["model", "parameters", "mesh", "nodes", "variables", "trace, s", "build, s", "solve, s", "emit, s", "other, s"]
    columns += ["CPU, s", "wall, s", "peak RSS", "objective", "bound"]
    lines = [
        *heading("How long large plans take", "tests/benchmarks/plan_speed.py"),
        f"Hugging Face modules on the meta device in bfloat16, training, {BATCH} x {LENGTH} tokens, template `auto`, hardware h100, each",
        "case once in a fresh process on one thread. Phases are CPU seconds; `other` is normalising, folding, inserting collectives,",
        "localising and the placement checker. CPU and wall are from the module to the emitted program; wall is above CPU where the",
        "machine did other work at the same time. Phases are left out where only their wall seconds are known.",
        "",
        *table(columns, [cells(CASES[key], run) for key, run in runs.items()]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure planning of large models, write docs/benchmarks/plan_speed.md.")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--once", choices=list(CASES), help="one plan, its numbers as JSON")
    parser.add_argument("--from-json", type=Path, help="a folder of such numbers, CASE.json: write the page of these, run nothing")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(plan_once(CASES[args.once])))
        return
    if args.from_json:
        files = {key: args.from_json / f"{key}.json" for key in CASES}
        found = {key: json.loads(file.read_text()) for key, file in files.items() if file.exists() and file.read_text()}
        write(args.out, "plan_speed.md", report(found))
        return
    runs = {}
    for key in args.only:
        runs[key] = measure(key)
        print("  ".join(cells(CASES[key], runs[key])), flush=True)
        write(args.out, "plan_speed.md", report(runs))


if __name__ == "__main__":
    main()
