"""GPT on mesh dp=2,tp=2, training: the program of every rank. Written by autoshard.

Passes: trace_model, normalize_graph, draw_whole, fold_constants, split_microbatches, annotate_shardings, insert_collectives, localize_shapes, cut_stages, overlap_collectives, emit_programs.
"""

import torch
from autoshard_runtime import Program, all_gather, all_gather_invariant, all_reduce_invariant, cross_entropy, embedding, keep_first_invariant, slice_invariant, slice_varying, vary

aten = torch.ops.aten


class Rank(Program):
    MESH = {"dp": 2, "tp": 2}
    PARAMETERS = {
        "pos.weight": ([16, 32], "f32", "I@dp S(0)@tp"),
        "blocks.0.norm1.weight": ([32], "f32", "I@dp I@tp"),
        "blocks.0.norm1.bias": ([32], "f32", "I@dp I@tp"),
        "blocks.0.attn.qkv.weight": ([96, 32], "f32", "I@dp S(0:3x32)@tp"),
        "blocks.0.attn.qkv.bias": ([96], "f32", "I@dp S(0:3x32)@tp"),
        "blocks.0.attn.proj.weight": ([32, 32], "f32", "I@dp S(1)@tp"),
        "blocks.0.attn.proj.bias": ([32], "f32", "I@dp I@tp"),
        "blocks.0.norm2.weight": ([32], "f32", "I@dp I@tp"),
        "blocks.0.norm2.bias": ([32], "f32", "I@dp I@tp"),
        "blocks.0.mlp.up.weight": ([128, 32], "f32", "I@dp S(0)@tp"),
        "blocks.0.mlp.up.bias": ([128], "f32", "I@dp S(0)@tp"),
        "blocks.0.mlp.down.weight": ([32, 128], "f32", "I@dp S(1)@tp"),
        "blocks.0.mlp.down.bias": ([32], "f32", "I@dp I@tp"),
        "blocks.1.norm1.weight": ([32], "f32", "I@dp I@tp"),
        "blocks.1.norm1.bias": ([32], "f32", "I@dp I@tp"),
        "blocks.1.attn.qkv.weight": ([96, 32], "f32", "I@dp S(0:3x32)@tp"),
        "blocks.1.attn.qkv.bias": ([96], "f32", "I@dp S(0:3x32)@tp"),
        "blocks.1.attn.proj.weight": ([32, 32], "f32", "I@dp S(1)@tp"),
        "blocks.1.attn.proj.bias": ([32], "f32", "I@dp I@tp"),
        "blocks.1.norm2.weight": ([32], "f32", "I@dp I@tp"),
        "blocks.1.norm2.bias": ([32], "f32", "I@dp I@tp"),
        "blocks.1.mlp.up.weight": ([128, 32], "f32", "I@dp S(0)@tp"),
        "blocks.1.mlp.up.bias": ([128], "f32", "I@dp S(0)@tp"),
        "blocks.1.mlp.down.weight": ([32, 128], "f32", "I@dp S(1)@tp"),
        "blocks.1.mlp.down.bias": ([32], "f32", "I@dp I@tp"),
        "norm.weight": ([32], "f32", "I@dp I@tp"),
        "norm.bias": ([32], "f32", "I@dp I@tp"),
        "head.weight": ([64, 32], "f32", "I@dp S(0)@tp"),
    }
    BUFFERS = {}
    INPUTS = {
        "ids": ([4, 16], "i64", "R@dp R@tp"),
        "labels": ([4, 16], "i64", "R@dp R@tp"),
    }

    def constants(self):
        arange = aten.arange.default(16, device=self.device, pin_memory=False)                            # i64[16]  R@dp R@tp
        return {"arange": arange}

    def forward(self, ids, labels):
        dp, tp = self.axes
        arange = self.constant("arange")
        head_weight = self.tensor("head.weight")                                                          # f32[32, 32]  I@dp S(0)@tp
        head_weight_vary = vary(head_weight, dp)                                                          # f32[32, 32]  R@dp S(0)@tp   identity; backward all_reduce
        head_weight_all_gather_invariant = all_gather_invariant(head_weight_vary, tp, 0)                  # f32[64, 32]  R@dp I@tp   all_gather; backward slice
        ids_slice_varying = slice_varying(ids, dp, 0)                                                     # i64[2, 16]  S(0)@dp R@tp   slice
        del head_weight_vary
        # ---- tok (Embedding)
        # gpt.py:94  x = self.drop(self.tok(ids) + self.pos(positions))
        tok_embedding = aten.embedding.default(head_weight_all_gather_invariant, ids_slice_varying)       # f32[2, 16, 32]  S(0)@dp I@tp
        del ids_slice_varying
        # ---- pos (Embedding)
        pos_weight = self.tensor("pos.weight")                                                            # f32[8, 32]  I@dp S(0)@tp
        pos_embedding = embedding(pos_weight, arange, row_axes=(tp,))                                     # f32[16, 32]  I@dp P@tp
        pos_embedding_slice_invariant = slice_invariant(pos_embedding, dp, 0)                             # f32[8, 32]  S(0)@dp P@tp   slice; backward all_gather
        pos_embedding_all_reduce_invariant = all_reduce_invariant(pos_embedding_slice_invariant, tp)      # f32[8, 32]  S(0)@dp I@tp   all_reduce; backward identity
        pos_embedding_all_gather = all_gather(pos_embedding_all_reduce_invariant, dp, 0)                  # f32[16, 32]  R@dp I@tp   all_gather; backward reduce_scatter
        del arange, pos_embedding, pos_embedding_slice_invariant, pos_embedding_all_reduce_invariant
        # ---- the model itself (GPT)
        add = tok_embedding + pos_embedding_all_gather                                                    # f32[2, 16, 32]  S(0)@dp I@tp
        del tok_embedding, pos_embedding_all_gather
        # ---- drop (Dropout)
        drop_dropout = aten.dropout.default(add, 0.0, True)                                               # f32[2, 16, 32]  S(0)@dp I@tp
        blocks_0_norm1_weight = self.tensor("blocks.0.norm1.weight")                                      # f32[32]  I@dp I@tp
        blocks_0_norm1_weight_vary = vary(blocks_0_norm1_weight, dp)                                      # f32[32]  R@dp I@tp   identity; backward all_reduce
        blocks_0_norm1_bias = self.tensor("blocks.0.norm1.bias")                                          # f32[32]  I@dp I@tp
        blocks_0_norm1_bias_vary = vary(blocks_0_norm1_bias, dp)                                          # f32[32]  R@dp I@tp   identity; backward all_reduce
        del add
        # ---- blocks.0.norm1 (LayerNorm)
        # gpt.py:64  x = x + self.attn(self.norm1(x))
        blocks_0_norm1_layer_norm = aten.layer_norm.default(drop_dropout, [32], blocks_0_norm1_weight_vary, blocks_0_norm1_bias_vary, 1e-05, False)  # f32[2, 16, 32]  S(0)@dp I@tp
        blocks_0_norm1_layer_norm_vary = vary(blocks_0_norm1_layer_norm, tp)                              # f32[2, 16, 32]  S(0)@dp R@tp   identity; backward all_reduce
        blocks_0_attn_qkv_weight = self.tensor("blocks.0.attn.qkv.weight")                                # f32[48, 32]  I@dp S(0:3x32)@tp
        blocks_0_attn_qkv_weight_vary = vary(blocks_0_attn_qkv_weight, dp)                                # f32[48, 32]  R@dp S(0:3x32)@tp   identity; backward all_reduce
        blocks_0_attn_qkv_bias = self.tensor("blocks.0.attn.qkv.bias")                                    # f32[48]  I@dp S(0:3x32)@tp
        blocks_0_attn_qkv_bias_vary = vary(blocks_0_attn_qkv_bias, dp)                                    # f32[48]  R@dp S(0:3x32)@tp   identity; backward all_reduce
        del blocks_0_norm1_weight_vary, blocks_0_norm1_bias_vary, blocks_0_norm1_layer_norm
        # ---- blocks.0.attn.qkv (Linear)
        # gpt.py:37  part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        blocks_0_attn_qkv_linear = aten.linear.default(blocks_0_norm1_layer_norm_vary, blocks_0_attn_qkv_weight_vary, blocks_0_attn_qkv_bias_vary)  # f32[2, 16, 48]  S(0)@dp S(2:3x32)@tp
        del blocks_0_norm1_layer_norm_vary, blocks_0_attn_qkv_weight_vary, blocks_0_attn_qkv_bias_vary
        # ---- blocks.0.attn (Attention)
        blocks_0_attn_chunk = aten.chunk.default(blocks_0_attn_qkv_linear, 3, -1)                         # 3 x f32[2, 16, 16]  S(0)@dp S(2)@tp
        blocks_0_attn_getitem = blocks_0_attn_chunk[0]                                                    # f32[2, 16, 16]  S(0)@dp S(2)@tp
        blocks_0_attn_getitem_1 = blocks_0_attn_chunk[1]                                                  # f32[2, 16, 16]  S(0)@dp S(2)@tp
        blocks_0_attn_getitem_2 = blocks_0_attn_chunk[2]                                                  # f32[2, 16, 16]  S(0)@dp S(2)@tp
        # gpt.py:36  q, k, v = (
        blocks_0_attn_reshape = aten.reshape.default(blocks_0_attn_getitem, [2, 16, 2, 8])                # f32[2, 16, 2, 8]  S(0)@dp S(2)@tp
        blocks_0_attn_transpose = aten.transpose.int(blocks_0_attn_reshape, 1, 2)                         # f32[2, 2, 16, 8]  S(0)@dp S(1)@tp
        blocks_0_attn_reshape_1 = aten.reshape.default(blocks_0_attn_getitem_1, [2, 16, 2, 8])            # f32[2, 16, 2, 8]  S(0)@dp S(2)@tp
        blocks_0_attn_transpose_1 = aten.transpose.int(blocks_0_attn_reshape_1, 1, 2)                     # f32[2, 2, 16, 8]  S(0)@dp S(1)@tp
        blocks_0_attn_reshape_2 = aten.reshape.default(blocks_0_attn_getitem_2, [2, 16, 2, 8])            # f32[2, 16, 2, 8]  S(0)@dp S(2)@tp
        blocks_0_attn_transpose_2 = aten.transpose.int(blocks_0_attn_reshape_2, 1, 2)                     # f32[2, 2, 16, 8]  S(0)@dp S(1)@tp
        # gpt.py:40  y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        blocks_0_attn_scaled_dot_product_attention = aten.scaled_dot_product_attention.default(blocks_0_attn_transpose, blocks_0_attn_transpose_1, blocks_0_attn_transpose_2, None, 0.0, True)  # f32[2, 2, 16, 8]  S(0)@dp S(1)@tp
        # gpt.py:41  return self.drop(self.proj(y.transpose(1, 2).reshape(batch, length, width)))
        blocks_0_attn_transpose_3 = aten.transpose.int(blocks_0_attn_scaled_dot_product_attention, 1, 2)  # f32[2, 16, 2, 8]  S(0)@dp S(2)@tp
        blocks_0_attn_reshape_3 = aten.reshape.default(blocks_0_attn_transpose_3, [2, 16, 16])            # f32[2, 16, 16]  S(0)@dp S(2)@tp
        blocks_0_attn_proj_weight = self.tensor("blocks.0.attn.proj.weight")                              # f32[32, 16]  I@dp S(1)@tp
        blocks_0_attn_proj_weight_vary = vary(blocks_0_attn_proj_weight, dp)                              # f32[32, 16]  R@dp S(1)@tp   identity; backward all_reduce
        blocks_0_attn_proj_bias = self.tensor("blocks.0.attn.proj.bias")                                  # f32[32]  I@dp I@tp
        blocks_0_attn_proj_bias_vary = vary(blocks_0_attn_proj_bias, dp)                                  # f32[32]  R@dp I@tp   identity; backward all_reduce
        blocks_0_attn_proj_bias_keep_first_invariant = keep_first_invariant(blocks_0_attn_proj_bias_vary, tp)  # f32[32]  R@dp P@tp   keep_first; backward identity
        del blocks_0_attn_qkv_linear, blocks_0_attn_chunk, blocks_0_attn_getitem, blocks_0_attn_reshape, blocks_0_attn_getitem_1, blocks_0_attn_reshape_1, blocks_0_attn_getitem_2, blocks_0_attn_reshape_2, blocks_0_attn_transpose, blocks_0_attn_transpose_1, blocks_0_attn_transpose_2, blocks_0_attn_scaled_dot_product_attention, blocks_0_attn_transpose_3, blocks_0_attn_proj_bias_vary
        # ---- blocks.0.attn.proj (Linear)
        blocks_0_attn_proj_linear = aten.linear.default(blocks_0_attn_reshape_3, blocks_0_attn_proj_weight_vary, blocks_0_attn_proj_bias_keep_first_invariant)  # f32[2, 16, 32]  S(0)@dp P@tp
        blocks_0_attn_proj_linear_all_reduce_invariant = all_reduce_invariant(blocks_0_attn_proj_linear, tp)  # f32[2, 16, 32]  S(0)@dp I@tp   all_reduce; backward identity
        del blocks_0_attn_reshape_3, blocks_0_attn_proj_weight_vary, blocks_0_attn_proj_bias_keep_first_invariant, blocks_0_attn_proj_linear
        # ---- blocks.0.attn.drop (Dropout)
        blocks_0_attn_drop_dropout = aten.dropout.default(blocks_0_attn_proj_linear_all_reduce_invariant, 0.0, True)  # f32[2, 16, 32]  S(0)@dp I@tp
        del blocks_0_attn_proj_linear_all_reduce_invariant
        # ---- blocks.0 (Block)
        # gpt.py:64  x = x + self.attn(self.norm1(x))
        blocks_0_add = drop_dropout + blocks_0_attn_drop_dropout                                          # f32[2, 16, 32]  S(0)@dp I@tp
        blocks_0_norm2_weight = self.tensor("blocks.0.norm2.weight")                                      # f32[32]  I@dp I@tp
        blocks_0_norm2_weight_vary = vary(blocks_0_norm2_weight, dp)                                      # f32[32]  R@dp I@tp   identity; backward all_reduce
        blocks_0_norm2_bias = self.tensor("blocks.0.norm2.bias")                                          # f32[32]  I@dp I@tp
        blocks_0_norm2_bias_vary = vary(blocks_0_norm2_bias, dp)                                          # f32[32]  R@dp I@tp   identity; backward all_reduce
        del drop_dropout, blocks_0_attn_drop_dropout
        # ---- blocks.0.norm2 (LayerNorm)
        # gpt.py:65  return x + self.mlp(self.norm2(x))
        blocks_0_norm2_layer_norm = aten.layer_norm.default(blocks_0_add, [32], blocks_0_norm2_weight_vary, blocks_0_norm2_bias_vary, 1e-05, False)  # f32[2, 16, 32]  S(0)@dp I@tp
        blocks_0_norm2_layer_norm_vary = vary(blocks_0_norm2_layer_norm, tp)                              # f32[2, 16, 32]  S(0)@dp R@tp   identity; backward all_reduce
        blocks_0_mlp_up_weight = self.tensor("blocks.0.mlp.up.weight")                                    # f32[64, 32]  I@dp S(0)@tp
        blocks_0_mlp_up_weight_vary = vary(blocks_0_mlp_up_weight, dp)                                    # f32[64, 32]  R@dp S(0)@tp   identity; backward all_reduce
        blocks_0_mlp_up_bias = self.tensor("blocks.0.mlp.up.bias")                                        # f32[64]  I@dp S(0)@tp
        blocks_0_mlp_up_bias_vary = vary(blocks_0_mlp_up_bias, dp)                                        # f32[64]  R@dp S(0)@tp   identity; backward all_reduce
        del blocks_0_norm2_weight_vary, blocks_0_norm2_bias_vary, blocks_0_norm2_layer_norm
        # ---- blocks.0.mlp.up (Linear)
        # gpt.py:52  return self.drop(self.down(F.gelu(self.up(x))))
        blocks_0_mlp_up_linear = aten.linear.default(blocks_0_norm2_layer_norm_vary, blocks_0_mlp_up_weight_vary, blocks_0_mlp_up_bias_vary)  # f32[2, 16, 64]  S(0)@dp S(2)@tp
        del blocks_0_norm2_layer_norm_vary, blocks_0_mlp_up_weight_vary, blocks_0_mlp_up_bias_vary
        # ---- blocks.0.mlp (MLP)
        blocks_0_mlp_gelu = aten.gelu.default(blocks_0_mlp_up_linear)                                     # f32[2, 16, 64]  S(0)@dp S(2)@tp
        blocks_0_mlp_down_weight = self.tensor("blocks.0.mlp.down.weight")                                # f32[32, 64]  I@dp S(1)@tp
        blocks_0_mlp_down_weight_vary = vary(blocks_0_mlp_down_weight, dp)                                # f32[32, 64]  R@dp S(1)@tp   identity; backward all_reduce
        blocks_0_mlp_down_bias = self.tensor("blocks.0.mlp.down.bias")                                    # f32[32]  I@dp I@tp
        blocks_0_mlp_down_bias_vary = vary(blocks_0_mlp_down_bias, dp)                                    # f32[32]  R@dp I@tp   identity; backward all_reduce
        blocks_0_mlp_down_bias_keep_first_invariant = keep_first_invariant(blocks_0_mlp_down_bias_vary, tp)  # f32[32]  R@dp P@tp   keep_first; backward identity
        del blocks_0_mlp_up_linear, blocks_0_mlp_down_bias_vary
        # ---- blocks.0.mlp.down (Linear)
        blocks_0_mlp_down_linear = aten.linear.default(blocks_0_mlp_gelu, blocks_0_mlp_down_weight_vary, blocks_0_mlp_down_bias_keep_first_invariant)  # f32[2, 16, 32]  S(0)@dp P@tp
        blocks_0_mlp_down_linear_all_reduce_invariant = all_reduce_invariant(blocks_0_mlp_down_linear, tp)  # f32[2, 16, 32]  S(0)@dp I@tp   all_reduce; backward identity
        del blocks_0_mlp_gelu, blocks_0_mlp_down_weight_vary, blocks_0_mlp_down_bias_keep_first_invariant, blocks_0_mlp_down_linear
        # ---- blocks.0.mlp.drop (Dropout)
        blocks_0_mlp_drop_dropout = aten.dropout.default(blocks_0_mlp_down_linear_all_reduce_invariant, 0.0, True)  # f32[2, 16, 32]  S(0)@dp I@tp
        del blocks_0_mlp_down_linear_all_reduce_invariant
        # ---- blocks.0 (Block)
        # gpt.py:65  return x + self.mlp(self.norm2(x))
        blocks_0_add_1 = blocks_0_add + blocks_0_mlp_drop_dropout                                         # f32[2, 16, 32]  S(0)@dp I@tp
        blocks_1_norm1_weight = self.tensor("blocks.1.norm1.weight")                                      # f32[32]  I@dp I@tp
        blocks_1_norm1_weight_vary = vary(blocks_1_norm1_weight, dp)                                      # f32[32]  R@dp I@tp   identity; backward all_reduce
        blocks_1_norm1_bias = self.tensor("blocks.1.norm1.bias")                                          # f32[32]  I@dp I@tp
        blocks_1_norm1_bias_vary = vary(blocks_1_norm1_bias, dp)                                          # f32[32]  R@dp I@tp   identity; backward all_reduce
        del blocks_0_add, blocks_0_mlp_drop_dropout
        # ---- blocks.1.norm1 (LayerNorm)
        # gpt.py:64  x = x + self.attn(self.norm1(x))
        blocks_1_norm1_layer_norm = aten.layer_norm.default(blocks_0_add_1, [32], blocks_1_norm1_weight_vary, blocks_1_norm1_bias_vary, 1e-05, False)  # f32[2, 16, 32]  S(0)@dp I@tp
        blocks_1_norm1_layer_norm_vary = vary(blocks_1_norm1_layer_norm, tp)                              # f32[2, 16, 32]  S(0)@dp R@tp   identity; backward all_reduce
        blocks_1_attn_qkv_weight = self.tensor("blocks.1.attn.qkv.weight")                                # f32[48, 32]  I@dp S(0:3x32)@tp
        blocks_1_attn_qkv_weight_vary = vary(blocks_1_attn_qkv_weight, dp)                                # f32[48, 32]  R@dp S(0:3x32)@tp   identity; backward all_reduce
        blocks_1_attn_qkv_bias = self.tensor("blocks.1.attn.qkv.bias")                                    # f32[48]  I@dp S(0:3x32)@tp
        blocks_1_attn_qkv_bias_vary = vary(blocks_1_attn_qkv_bias, dp)                                    # f32[48]  R@dp S(0:3x32)@tp   identity; backward all_reduce
        del blocks_1_norm1_weight_vary, blocks_1_norm1_bias_vary, blocks_1_norm1_layer_norm
        # ---- blocks.1.attn.qkv (Linear)
        # gpt.py:37  part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        blocks_1_attn_qkv_linear = aten.linear.default(blocks_1_norm1_layer_norm_vary, blocks_1_attn_qkv_weight_vary, blocks_1_attn_qkv_bias_vary)  # f32[2, 16, 48]  S(0)@dp S(2:3x32)@tp
        del blocks_1_norm1_layer_norm_vary, blocks_1_attn_qkv_weight_vary, blocks_1_attn_qkv_bias_vary
        # ---- blocks.1.attn (Attention)
        blocks_1_attn_chunk = aten.chunk.default(blocks_1_attn_qkv_linear, 3, -1)                         # 3 x f32[2, 16, 16]  S(0)@dp S(2)@tp
        blocks_1_attn_getitem = blocks_1_attn_chunk[0]                                                    # f32[2, 16, 16]  S(0)@dp S(2)@tp
        blocks_1_attn_getitem_1 = blocks_1_attn_chunk[1]                                                  # f32[2, 16, 16]  S(0)@dp S(2)@tp
        blocks_1_attn_getitem_2 = blocks_1_attn_chunk[2]                                                  # f32[2, 16, 16]  S(0)@dp S(2)@tp
        # gpt.py:36  q, k, v = (
        blocks_1_attn_reshape = aten.reshape.default(blocks_1_attn_getitem, [2, 16, 2, 8])                # f32[2, 16, 2, 8]  S(0)@dp S(2)@tp
        blocks_1_attn_transpose = aten.transpose.int(blocks_1_attn_reshape, 1, 2)                         # f32[2, 2, 16, 8]  S(0)@dp S(1)@tp
        blocks_1_attn_reshape_1 = aten.reshape.default(blocks_1_attn_getitem_1, [2, 16, 2, 8])            # f32[2, 16, 2, 8]  S(0)@dp S(2)@tp
        blocks_1_attn_transpose_1 = aten.transpose.int(blocks_1_attn_reshape_1, 1, 2)                     # f32[2, 2, 16, 8]  S(0)@dp S(1)@tp
        blocks_1_attn_reshape_2 = aten.reshape.default(blocks_1_attn_getitem_2, [2, 16, 2, 8])            # f32[2, 16, 2, 8]  S(0)@dp S(2)@tp
        blocks_1_attn_transpose_2 = aten.transpose.int(blocks_1_attn_reshape_2, 1, 2)                     # f32[2, 2, 16, 8]  S(0)@dp S(1)@tp
        # gpt.py:40  y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        blocks_1_attn_scaled_dot_product_attention = aten.scaled_dot_product_attention.default(blocks_1_attn_transpose, blocks_1_attn_transpose_1, blocks_1_attn_transpose_2, None, 0.0, True)  # f32[2, 2, 16, 8]  S(0)@dp S(1)@tp
        # gpt.py:41  return self.drop(self.proj(y.transpose(1, 2).reshape(batch, length, width)))
        blocks_1_attn_transpose_3 = aten.transpose.int(blocks_1_attn_scaled_dot_product_attention, 1, 2)  # f32[2, 16, 2, 8]  S(0)@dp S(2)@tp
        blocks_1_attn_reshape_3 = aten.reshape.default(blocks_1_attn_transpose_3, [2, 16, 16])            # f32[2, 16, 16]  S(0)@dp S(2)@tp
        blocks_1_attn_proj_weight = self.tensor("blocks.1.attn.proj.weight")                              # f32[32, 16]  I@dp S(1)@tp
        blocks_1_attn_proj_weight_vary = vary(blocks_1_attn_proj_weight, dp)                              # f32[32, 16]  R@dp S(1)@tp   identity; backward all_reduce
        blocks_1_attn_proj_bias = self.tensor("blocks.1.attn.proj.bias")                                  # f32[32]  I@dp I@tp
        blocks_1_attn_proj_bias_vary = vary(blocks_1_attn_proj_bias, dp)                                  # f32[32]  R@dp I@tp   identity; backward all_reduce
        blocks_1_attn_proj_bias_keep_first_invariant = keep_first_invariant(blocks_1_attn_proj_bias_vary, tp)  # f32[32]  R@dp P@tp   keep_first; backward identity
        del blocks_1_attn_qkv_linear, blocks_1_attn_chunk, blocks_1_attn_getitem, blocks_1_attn_reshape, blocks_1_attn_getitem_1, blocks_1_attn_reshape_1, blocks_1_attn_getitem_2, blocks_1_attn_reshape_2, blocks_1_attn_transpose, blocks_1_attn_transpose_1, blocks_1_attn_transpose_2, blocks_1_attn_scaled_dot_product_attention, blocks_1_attn_transpose_3, blocks_1_attn_proj_bias_vary
        # ---- blocks.1.attn.proj (Linear)
        blocks_1_attn_proj_linear = aten.linear.default(blocks_1_attn_reshape_3, blocks_1_attn_proj_weight_vary, blocks_1_attn_proj_bias_keep_first_invariant)  # f32[2, 16, 32]  S(0)@dp P@tp
        blocks_1_attn_proj_linear_all_reduce_invariant = all_reduce_invariant(blocks_1_attn_proj_linear, tp)  # f32[2, 16, 32]  S(0)@dp I@tp   all_reduce; backward identity
        del blocks_1_attn_reshape_3, blocks_1_attn_proj_weight_vary, blocks_1_attn_proj_bias_keep_first_invariant, blocks_1_attn_proj_linear
        # ---- blocks.1.attn.drop (Dropout)
        blocks_1_attn_drop_dropout = aten.dropout.default(blocks_1_attn_proj_linear_all_reduce_invariant, 0.0, True)  # f32[2, 16, 32]  S(0)@dp I@tp
        del blocks_1_attn_proj_linear_all_reduce_invariant
        # ---- blocks.1 (Block)
        # gpt.py:64  x = x + self.attn(self.norm1(x))
        blocks_1_add = blocks_0_add_1 + blocks_1_attn_drop_dropout                                        # f32[2, 16, 32]  S(0)@dp I@tp
        blocks_1_norm2_weight = self.tensor("blocks.1.norm2.weight")                                      # f32[32]  I@dp I@tp
        blocks_1_norm2_weight_vary = vary(blocks_1_norm2_weight, dp)                                      # f32[32]  R@dp I@tp   identity; backward all_reduce
        blocks_1_norm2_bias = self.tensor("blocks.1.norm2.bias")                                          # f32[32]  I@dp I@tp
        blocks_1_norm2_bias_vary = vary(blocks_1_norm2_bias, dp)                                          # f32[32]  R@dp I@tp   identity; backward all_reduce
        del blocks_0_add_1, blocks_1_attn_drop_dropout
        # ---- blocks.1.norm2 (LayerNorm)
        # gpt.py:65  return x + self.mlp(self.norm2(x))
        blocks_1_norm2_layer_norm = aten.layer_norm.default(blocks_1_add, [32], blocks_1_norm2_weight_vary, blocks_1_norm2_bias_vary, 1e-05, False)  # f32[2, 16, 32]  S(0)@dp I@tp
        blocks_1_norm2_layer_norm_vary = vary(blocks_1_norm2_layer_norm, tp)                              # f32[2, 16, 32]  S(0)@dp R@tp   identity; backward all_reduce
        blocks_1_mlp_up_weight = self.tensor("blocks.1.mlp.up.weight")                                    # f32[64, 32]  I@dp S(0)@tp
        blocks_1_mlp_up_weight_vary = vary(blocks_1_mlp_up_weight, dp)                                    # f32[64, 32]  R@dp S(0)@tp   identity; backward all_reduce
        blocks_1_mlp_up_bias = self.tensor("blocks.1.mlp.up.bias")                                        # f32[64]  I@dp S(0)@tp
        blocks_1_mlp_up_bias_vary = vary(blocks_1_mlp_up_bias, dp)                                        # f32[64]  R@dp S(0)@tp   identity; backward all_reduce
        del blocks_1_norm2_weight_vary, blocks_1_norm2_bias_vary, blocks_1_norm2_layer_norm
        # ---- blocks.1.mlp.up (Linear)
        # gpt.py:52  return self.drop(self.down(F.gelu(self.up(x))))
        blocks_1_mlp_up_linear = aten.linear.default(blocks_1_norm2_layer_norm_vary, blocks_1_mlp_up_weight_vary, blocks_1_mlp_up_bias_vary)  # f32[2, 16, 64]  S(0)@dp S(2)@tp
        del blocks_1_norm2_layer_norm_vary, blocks_1_mlp_up_weight_vary, blocks_1_mlp_up_bias_vary
        # ---- blocks.1.mlp (MLP)
        blocks_1_mlp_gelu = aten.gelu.default(blocks_1_mlp_up_linear)                                     # f32[2, 16, 64]  S(0)@dp S(2)@tp
        blocks_1_mlp_down_weight = self.tensor("blocks.1.mlp.down.weight")                                # f32[32, 64]  I@dp S(1)@tp
        blocks_1_mlp_down_weight_vary = vary(blocks_1_mlp_down_weight, dp)                                # f32[32, 64]  R@dp S(1)@tp   identity; backward all_reduce
        blocks_1_mlp_down_bias = self.tensor("blocks.1.mlp.down.bias")                                    # f32[32]  I@dp I@tp
        blocks_1_mlp_down_bias_vary = vary(blocks_1_mlp_down_bias, dp)                                    # f32[32]  R@dp I@tp   identity; backward all_reduce
        blocks_1_mlp_down_bias_keep_first_invariant = keep_first_invariant(blocks_1_mlp_down_bias_vary, tp)  # f32[32]  R@dp P@tp   keep_first; backward identity
        del blocks_1_mlp_up_linear, blocks_1_mlp_down_bias_vary
        # ---- blocks.1.mlp.down (Linear)
        blocks_1_mlp_down_linear = aten.linear.default(blocks_1_mlp_gelu, blocks_1_mlp_down_weight_vary, blocks_1_mlp_down_bias_keep_first_invariant)  # f32[2, 16, 32]  S(0)@dp P@tp
        blocks_1_mlp_down_linear_all_reduce_invariant = all_reduce_invariant(blocks_1_mlp_down_linear, tp)  # f32[2, 16, 32]  S(0)@dp I@tp   all_reduce; backward identity
        del blocks_1_mlp_gelu, blocks_1_mlp_down_weight_vary, blocks_1_mlp_down_bias_keep_first_invariant, blocks_1_mlp_down_linear
        # ---- blocks.1.mlp.drop (Dropout)
        blocks_1_mlp_drop_dropout = aten.dropout.default(blocks_1_mlp_down_linear_all_reduce_invariant, 0.0, True)  # f32[2, 16, 32]  S(0)@dp I@tp
        del blocks_1_mlp_down_linear_all_reduce_invariant
        # ---- blocks.1 (Block)
        # gpt.py:65  return x + self.mlp(self.norm2(x))
        blocks_1_add_1 = blocks_1_add + blocks_1_mlp_drop_dropout                                         # f32[2, 16, 32]  S(0)@dp I@tp
        norm_weight = self.tensor("norm.weight")                                                          # f32[32]  I@dp I@tp
        norm_weight_vary = vary(norm_weight, dp)                                                          # f32[32]  R@dp I@tp   identity; backward all_reduce
        norm_bias = self.tensor("norm.bias")                                                              # f32[32]  I@dp I@tp
        norm_bias_vary = vary(norm_bias, dp)                                                              # f32[32]  R@dp I@tp   identity; backward all_reduce
        del blocks_1_add, blocks_1_mlp_drop_dropout
        # ---- norm (LayerNorm)
        # gpt.py:97  logits: Tensor = self.head(self.norm(x))
        norm_layer_norm = aten.layer_norm.default(blocks_1_add_1, [32], norm_weight_vary, norm_bias_vary, 1e-05, False)  # f32[2, 16, 32]  S(0)@dp I@tp
        del blocks_1_add_1, norm_weight_vary, norm_bias_vary
        # ---- head (Linear)
        head_linear = aten.linear.default(norm_layer_norm, head_weight_all_gather_invariant)              # f32[2, 16, 64]  S(0)@dp I@tp
        del norm_layer_norm, head_weight_all_gather_invariant
        # ---- the model itself (GPT)
        # gpt.py:100  return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
        reshape = aten.reshape.default(head_linear, [-1, 64])                                             # f32[32, 64]  S(0)@dp I@tp
        labels_slice_varying = slice_varying(labels, dp, 0)                                               # i64[2, 16]  S(0)@dp R@tp   slice
        reshape_1 = aten.reshape.default(labels_slice_varying, [-1])                                      # i64[32]  S(0)@dp R@tp
        cross_entropy_loss = cross_entropy(reshape, reshape_1, batch_axes=(dp,))                          # f32[]  P@dp I@tp
        cross_entropy_loss_all_reduce_invariant = all_reduce_invariant(cross_entropy_loss, dp)            # f32[]  I@dp I@tp   all_reduce; backward identity
        return (cross_entropy_loss_all_reduce_invariant,)
