"""Sequential on mesh dp=2,tp=4, training: the program of every rank. Written by autoshard.

Passes: trace_model, normalize_graph, draw_whole, fold_constants, split_microbatches, annotate_shardings, insert_collectives, localize_shapes, cut_stages, overlap_collectives, emit_programs.
"""

import torch
from autoshard_runtime import Program, all_reduce_invariant, keep_first_invariant

aten = torch.ops.aten


class Rank(Program):
    MESH = {"dp": 2, "tp": 4}
    PARAMETERS = {
        "0.weight": ([8192, 1024], "f32", "S(0)@dp S(0)@tp"),
        "0.bias": ([8192], "f32", "S(0)@dp S(0)@tp"),
        "2.weight": ([1024, 8192], "f32", "S(1)@dp S(1)@tp"),
        "2.bias": ([1024], "f32", "I@dp I@tp"),
    }
    BUFFERS = {}
    INPUTS = {
        "input": ([64, 1024], "f32", "R@dp R@tp"),
    }

    def forward(self, input_1):
        dp, tp = self.axes
        # ---- 0 (Linear)
        # linear.py:134  return F.linear(input, self.weight, self.bias)
        _0_weight = self.tensor("0.weight")                                                               # f32[1024, 1024]  S(0)@dp S(0)@tp
        _0_bias = self.tensor("0.bias")                                                                   # f32[1024]  S(0)@dp S(0)@tp
        _0_linear = aten.linear.default(input_1, _0_weight, _0_bias)                                      # f32[64, 1024]  S(1)@dp S(1)@tp
        # ---- 1 (ReLU)
        # activation.py:143  return F.relu(input, inplace=self.inplace)
        _1_relu = aten.relu.default(_0_linear)                                                            # f32[64, 1024]  S(1)@dp S(1)@tp
        _2_bias = self.tensor("2.bias")                                                                   # f32[1024]  I@dp I@tp
        _2_bias_keep_first_invariant = keep_first_invariant(_2_bias, dp)                                  # f32[1024]  P@dp I@tp   keep_first; backward identity
        _2_bias_keep_first_invariant_1 = keep_first_invariant(_2_bias_keep_first_invariant, tp)           # f32[1024]  P@dp P@tp   keep_first; backward identity
        del _0_linear, _2_bias_keep_first_invariant
        # ---- 2 (Linear)
        # linear.py:134  return F.linear(input, self.weight, self.bias)
        _2_weight = self.tensor("2.weight")                                                               # f32[1024, 1024]  S(1)@dp S(1)@tp
        _2_linear = aten.linear.default(_1_relu, _2_weight, _2_bias_keep_first_invariant_1)               # f32[64, 1024]  P@dp P@tp
        _2_linear_all_reduce_invariant = all_reduce_invariant(_2_linear, dp)                              # f32[64, 1024]  I@dp P@tp   all_reduce; backward identity
        _2_linear_all_reduce_invariant_1 = all_reduce_invariant(_2_linear_all_reduce_invariant, tp)       # f32[64, 1024]  I@dp I@tp   all_reduce; backward identity
        return (_2_linear_all_reduce_invariant_1,)
