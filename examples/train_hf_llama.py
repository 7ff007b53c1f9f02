"""A Hugging Face causal language model, random and tiny, on two processes: Megatron's tensor parallelism, and the model is not edited.

    torchrun --standalone --nproc-per-node 2 examples/train_hf_llama.py

The same steps on one process give the same losses; what the processes send each other is what the plan says.
"""

import argparse
import copy

import torch
import torch.distributed as dist
from side_by_side import finish, show, train
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

import autoshard
from autoshard.debug import count_communication

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    use_cache=False,
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny Llama on two processes.")
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))

    torch.manual_seed(0)
    reference = LlamaForCausalLM(CONFIG)
    ids = torch.randint(CONFIG.vocab_size, (4, 32))
    batch = {"input_ids": ids, "labels": ids}
    # the loss is all that is read: the logits stay split
    model = autoshard.compile(copy.deepcopy(reference), mesh, template="megatron", outputs="dtensor", example_kwargs=batch)

    sharded, single = (train(m, AdamW(m.parameters(), 1e-3, foreach=True), [batch] * steps) for m in (model, reference))
    with count_communication(mesh) as sent:
        model(**batch).loss.backward()
    if dist.get_rank() == 0:
        show(sharded, single)
        print("sent in a step:", {kind: f"{sent.calls[kind]} calls, {nbytes:,.0f} bytes" for kind, nbytes in sent.sent_bytes.items()})
        print("as planned:    ", {kind: f"{nbytes:,.0f} bytes" for kind, nbytes in model.plan.stats["wire_bytes_per_step"].items()})
    finish([sharded], single, 1e-4)


if __name__ == "__main__":
    main()
