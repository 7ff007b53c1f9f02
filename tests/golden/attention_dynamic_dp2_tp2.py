"""Attention on mesh dp=2,tp=2, training: the program of every rank. Written by autoshard.

Passes: trace_model, normalize_graph, draw_whole, fold_constants, split_microbatches, annotate_shardings, insert_collectives, localize_shapes, cut_stages, overlap_collectives, emit_programs.
Sizes that may change from call to call:
    batch: a multiple of 2, 2 or more; 4 in the example.
    seq: 2 or more; 8 in the example.
"""

import torch
from autoshard_runtime import Program, all_gather, all_gather_invariant, slice_varying, vary

aten = torch.ops.aten


class Rank(Program):
    MESH = {"dp": 2, "tp": 2}
    PARAMETERS = {
        "qkv.weight": ([48, 16], "f32", "I@dp S(0:3x16)@tp"),
        "qkv.bias": ([48], "f32", "I@dp S(0:3x16)@tp"),
        "proj.weight": ([16, 16], "f32", "I@dp S(0)@tp"),
        "proj.bias": ([16], "f32", "I@dp S(0)@tp"),
    }
    BUFFERS = {}
    INPUTS = {
        "x": ([4, 8, 16], "f32", "R@dp R@tp"),
    }

    def forward(self, x):
        dp, tp = self.axes
        batch = x.shape[0]
        seq = x.shape[1]
        x_slice_varying = slice_varying(x, dp, 0)                                                         # f32[batch/2, seq, 16]  S(0)@dp R@tp   slice
        qkv_weight = self.tensor("qkv.weight")                                                            # f32[24, 16]  I@dp S(0:3x16)@tp
        qkv_weight_vary = vary(qkv_weight, dp)                                                            # f32[24, 16]  R@dp S(0:3x16)@tp   identity; backward all_reduce
        qkv_bias = self.tensor("qkv.bias")                                                                # f32[24]  I@dp S(0:3x16)@tp
        qkv_bias_vary = vary(qkv_bias, dp)                                                                # f32[24]  R@dp S(0:3x16)@tp   identity; backward all_reduce
        # ---- qkv (Linear)
        # models.py:28  q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        qkv_linear = aten.linear.default(x_slice_varying, qkv_weight_vary, qkv_bias_vary)                 # f32[batch/2, seq, 24]  S(0)@dp S(2:3x16)@tp
        del x_slice_varying, qkv_weight_vary, qkv_bias_vary
        # ---- the model itself (Attention)
        chunk = aten.chunk.default(qkv_linear, 3, -1)                                                     # 3 x f32[batch/2, seq, 8]  S(0)@dp S(2)@tp
        getitem = chunk[0]                                                                                # f32[batch/2, seq, 8]  S(0)@dp S(2)@tp
        getitem_1 = chunk[1]                                                                              # f32[batch/2, seq, 8]  S(0)@dp S(2)@tp
        getitem_2 = chunk[2]                                                                              # f32[batch/2, seq, 8]  S(0)@dp S(2)@tp
        reshape = aten.reshape.default(getitem, [batch // 2, seq, 2, -1])                                 # f32[batch/2, seq, 2, 4]  S(0)@dp S(2)@tp
        transpose = aten.transpose.int(reshape, 1, 2)                                                     # f32[batch/2, 2, seq, 4]  S(0)@dp S(1)@tp
        reshape_1 = aten.reshape.default(getitem_1, [batch // 2, seq, 2, -1])                             # f32[batch/2, seq, 2, 4]  S(0)@dp S(2)@tp
        transpose_1 = aten.transpose.int(reshape_1, 1, 2)                                                 # f32[batch/2, 2, seq, 4]  S(0)@dp S(1)@tp
        reshape_2 = aten.reshape.default(getitem_2, [batch // 2, seq, 2, -1])                             # f32[batch/2, seq, 2, 4]  S(0)@dp S(2)@tp
        transpose_2 = aten.transpose.int(reshape_2, 1, 2)                                                 # f32[batch/2, 2, seq, 4]  S(0)@dp S(1)@tp
        # models.py:29  y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        scaled_dot_product_attention = aten.scaled_dot_product_attention.default(transpose, transpose_1, transpose_2, None, 0.0, True)  # f32[batch/2, 2, seq, 4]  S(0)@dp S(1)@tp
        scaled_dot_product_attention_all_gather = all_gather(scaled_dot_product_attention, tp, 1)         # f32[batch/2, 4, seq, 4]  S(0)@dp R@tp   all_gather; backward reduce_scatter
        # models.py:30  return self.drop(self.proj(y.transpose(1, 2).reshape(batch, length, width)))
        transpose_3 = aten.transpose.int(scaled_dot_product_attention_all_gather, 1, 2)                   # f32[batch/2, seq, 4, 4]  S(0)@dp R@tp
        reshape_3 = aten.reshape.default(transpose_3, [batch // 2, seq, 16])                              # f32[batch/2, seq, 16]  S(0)@dp R@tp
        proj_weight = self.tensor("proj.weight")                                                          # f32[8, 16]  I@dp S(0)@tp
        proj_weight_vary = vary(proj_weight, dp)                                                          # f32[8, 16]  R@dp S(0)@tp   identity; backward all_reduce
        proj_bias = self.tensor("proj.bias")                                                              # f32[8]  I@dp S(0)@tp
        proj_bias_vary = vary(proj_bias, dp)                                                              # f32[8]  R@dp S(0)@tp   identity; backward all_reduce
        del qkv_linear, chunk, getitem, reshape, getitem_1, reshape_1, getitem_2, reshape_2, transpose, transpose_1, transpose_2, scaled_dot_product_attention, scaled_dot_product_attention_all_gather, transpose_3
        # ---- proj (Linear)
        proj_linear = aten.linear.default(reshape_3, proj_weight_vary, proj_bias_vary)                    # f32[batch/2, seq, 8]  S(0)@dp S(2)@tp
        del reshape_3, proj_weight_vary, proj_bias_vary
        # ---- drop (Dropout)
        drop_dropout = aten.dropout.default(proj_linear, 0.0, True)                                       # f32[batch/2, seq, 8]  S(0)@dp S(2)@tp
        drop_dropout_all_gather_invariant = all_gather_invariant(drop_dropout, tp, 2)                     # f32[batch/2, seq, 16]  S(0)@dp I@tp   all_gather; backward slice
        drop_dropout_all_gather_invariant_1 = all_gather_invariant(drop_dropout_all_gather_invariant, dp, 0)  # f32[batch, seq, 16]  I@dp I@tp   all_gather; backward slice
        return (drop_dropout_all_gather_invariant_1,)
