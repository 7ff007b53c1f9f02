"""A Hugging Face mixture of experts (Mixtral, random and tiny) on two processes, each of which holds half of the experts.

    torchrun --standalone --nproc-per-node 2 examples/train_moe.py

One constraint asks for it. Where the batch is split on the same axis, as here, tokens travel to the processes that hold their experts and
back (two all-to-alls forward, two backward), each to as many as its router says: no token is dropped, and no capacity is to be chosen.
"""

import argparse
import copy

import torch
import torch.distributed as dist
from side_by_side import finish, show, train
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW
from transformers import MixtralConfig, MixtralForCausalLM

import autoshard
from autoshard.debug import count_communication

CONFIG = MixtralConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=32,
    use_cache=False,
)
CONSTRAINTS = {"parameter:*experts*": "S(0)@ep", "input:*": "S(0)@ep", "split:*.experts.*": "t&e"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny Mixtral whose experts are split.")
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))

    torch.manual_seed(0)
    reference = MixtralForCausalLM(CONFIG)
    ids = torch.randint(CONFIG.vocab_size, (4, 16))
    given = {"input_ids": ids, "labels": ids}
    model = autoshard.compile(copy.deepcopy(reference), mesh, example_kwargs=given, constraints=CONSTRAINTS)

    sharded, single = (train(m, AdamW(m.parameters(), 3e-3, foreach=True), [given] * steps) for m in (model, reference))
    with count_communication(mesh) as sent:
        model(**given).loss.backward()
    if dist.get_rank() == 0:
        show(sharded, single)
        for name, parameter in model.named_parameters():
            if "layers.0" in name and "experts" in name:
                print(f"{name:40} {tuple(parameter.shape)!s:16} {parameter.placements}")
        print("sent in a step:", {kind: f"{sent.calls[kind]} calls, {nbytes:,.0f} bytes" for kind, nbytes in sent.sent_bytes.items()})
    finish([sharded], single, 1e-3)


if __name__ == "__main__":
    main()
