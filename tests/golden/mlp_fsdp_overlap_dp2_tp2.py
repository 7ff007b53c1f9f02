"""Sequential on mesh dp=2,tp=2, training: the program of every rank. Written by autoshard.

Passes: trace_model, normalize_graph, draw_whole, fold_constants, split_microbatches, annotate_shardings, insert_collectives, localize_shapes, cut_stages, overlap_collectives, emit_programs.
"""

import torch
from autoshard_runtime import Program, all_gather, all_gather_invariant, slice_varying, start_all_gather, wait

aten = torch.ops.aten


class Rank(Program):
    MESH = {"dp": 2, "tp": 2}
    PARAMETERS = {
        "0.weight": ([128, 64], "f32", "S(0)@dp S(0)@tp"),
        "0.bias": ([128], "f32", "S(0)@dp S(0)@tp"),
        "2.weight": ([64, 128], "f32", "S(0)@dp S(0)@tp"),
        "2.bias": ([64], "f32", "S(0)@dp S(0)@tp"),
        "4.weight": ([64, 64], "f32", "S(0)@dp S(0)@tp"),
        "4.bias": ([64], "f32", "S(0)@dp S(0)@tp"),
    }
    BUFFERS = {}
    INPUTS = {
        "input": ([16, 64], "f32", "R@dp R@tp"),
    }

    def forward(self, input_1):
        dp, tp = self.axes
        _2_weight = self.tensor("2.weight")                                                               # f32[16, 128]  S(0)@dp S(0)@tp
        _2_weight_all_gather_start = start_all_gather(_2_weight, tp, 0)                                   # f32[16, 128]  S(0)@dp S(0)@tp   all_gather starts; backward reduce_scatter ends
        _2_bias = self.tensor("2.bias")                                                                   # f32[16]  S(0)@dp S(0)@tp
        _2_bias_all_gather_start = start_all_gather(_2_bias, tp, 0)                                       # f32[16]  S(0)@dp S(0)@tp   all_gather starts; backward reduce_scatter ends
        input_1_slice_varying = slice_varying(input_1, dp, 0)                                             # f32[8, 64]  S(0)@dp R@tp   slice
        input_1_slice_varying_1 = slice_varying(input_1_slice_varying, tp, 0)                             # f32[4, 64]  S(0)@dp S(0)@tp   slice
        input_1_all_gather = all_gather(input_1_slice_varying_1, tp, 0)                                   # f32[8, 64]  S(0)@dp R@tp   all_gather
        input_1_all_gather_1 = all_gather(input_1_all_gather, dp, 0)                                      # f32[16, 64]  R@dp R@tp   all_gather
        del input_1_slice_varying, input_1_slice_varying_1, input_1_all_gather
        # ---- 0 (Linear)
        # linear.py:134  return F.linear(input, self.weight, self.bias)
        _0_weight = self.tensor("0.weight")                                                               # f32[32, 64]  S(0)@dp S(0)@tp
        _0_bias = self.tensor("0.bias")                                                                   # f32[32]  S(0)@dp S(0)@tp
        _0_linear = aten.linear.default(input_1_all_gather_1, _0_weight, _0_bias)                         # f32[16, 32]  S(1)@dp S(1)@tp
        _0_linear_all_gather = all_gather(_0_linear, tp, 1)                                               # f32[16, 64]  S(1)@dp R@tp   all_gather; backward reduce_scatter
        _0_linear_all_gather_1 = all_gather(_0_linear_all_gather, dp, 1)                                  # f32[16, 128]  R@dp R@tp   all_gather; backward reduce_scatter
        _2_weight_all_gather = wait(_2_weight_all_gather_start)                                           # f32[32, 128]  S(0)@dp R@tp   all_gather; backward reduce_scatter
        _2_weight_all_gather_1_start = start_all_gather(_2_weight_all_gather, dp, 0)                      # f32[32, 128]  S(0)@dp R@tp   all_gather starts; backward reduce_scatter ends
        _2_bias_all_gather = wait(_2_bias_all_gather_start)                                               # f32[32]  S(0)@dp R@tp   all_gather; backward reduce_scatter
        _2_bias_all_gather_1_start = start_all_gather(_2_bias_all_gather, dp, 0)                          # f32[32]  S(0)@dp R@tp   all_gather starts; backward reduce_scatter ends
        _0_linear_slice_varying = slice_varying(_0_linear_all_gather_1, dp, 0)                            # f32[8, 128]  S(0)@dp R@tp   slice; backward place
        _0_linear_slice_varying_1 = slice_varying(_0_linear_slice_varying, tp, 0)                         # f32[4, 128]  S(0)@dp S(0)@tp   slice; backward place
        del input_1_all_gather_1, _0_linear, _0_linear_all_gather, _2_weight_all_gather_start, _2_weight_all_gather, _2_bias_all_gather_start, _2_bias_all_gather, _0_linear_all_gather_1, _0_linear_slice_varying
        # ---- 1 (ReLU)
        # activation.py:143  return F.relu(input, inplace=self.inplace)
        _1_relu = aten.relu.default(_0_linear_slice_varying_1)                                            # f32[4, 128]  S(0)@dp S(0)@tp
        _2_weight_all_gather_1 = wait(_2_weight_all_gather_1_start)                                       # f32[64, 128]  R@dp R@tp   all_gather; backward reduce_scatter
        _2_bias_all_gather_1 = wait(_2_bias_all_gather_1_start)                                           # f32[64]  R@dp R@tp   all_gather; backward reduce_scatter
        _4_weight = self.tensor("4.weight")                                                               # f32[16, 64]  S(0)@dp S(0)@tp
        _4_weight_all_gather_start = start_all_gather(_4_weight, tp, 0)                                   # f32[16, 64]  S(0)@dp S(0)@tp   all_gather starts; backward reduce_scatter ends
        _4_bias = self.tensor("4.bias")                                                                   # f32[16]  S(0)@dp S(0)@tp
        _4_bias_all_gather_start = start_all_gather(_4_bias, tp, 0)                                       # f32[16]  S(0)@dp S(0)@tp   all_gather starts; backward reduce_scatter ends
        del _0_linear_slice_varying_1, _2_weight_all_gather_1_start, _2_bias_all_gather_1_start
        # ---- 2 (Linear)
        # linear.py:134  return F.linear(input, self.weight, self.bias)
        _2_linear = aten.linear.default(_1_relu, _2_weight_all_gather_1, _2_bias_all_gather_1)            # f32[4, 64]  S(0)@dp S(0)@tp
        _4_weight_all_gather = wait(_4_weight_all_gather_start)                                           # f32[32, 64]  S(0)@dp R@tp   all_gather; backward reduce_scatter
        _4_weight_all_gather_1_start = start_all_gather(_4_weight_all_gather, dp, 0)                      # f32[32, 64]  S(0)@dp R@tp   all_gather starts; backward reduce_scatter ends
        _4_bias_all_gather = wait(_4_bias_all_gather_start)                                               # f32[32]  S(0)@dp R@tp   all_gather; backward reduce_scatter
        _4_bias_all_gather_1_start = start_all_gather(_4_bias_all_gather, dp, 0)                          # f32[32]  S(0)@dp R@tp   all_gather starts; backward reduce_scatter ends
        del _1_relu, _2_weight_all_gather_1, _2_bias_all_gather_1, _4_weight_all_gather_start, _4_weight_all_gather, _4_bias_all_gather_start, _4_bias_all_gather
        # ---- 3 (ReLU)
        # activation.py:143  return F.relu(input, inplace=self.inplace)
        _3_relu = aten.relu.default(_2_linear)                                                            # f32[4, 64]  S(0)@dp S(0)@tp
        _4_weight_all_gather_1 = wait(_4_weight_all_gather_1_start)                                       # f32[64, 64]  R@dp R@tp   all_gather; backward reduce_scatter
        _4_bias_all_gather_1 = wait(_4_bias_all_gather_1_start)                                           # f32[64]  R@dp R@tp   all_gather; backward reduce_scatter
        del _2_linear, _4_weight_all_gather_1_start, _4_bias_all_gather_1_start
        # ---- 4 (Linear)
        # linear.py:134  return F.linear(input, self.weight, self.bias)
        _4_linear = aten.linear.default(_3_relu, _4_weight_all_gather_1, _4_bias_all_gather_1)            # f32[4, 64]  S(0)@dp S(0)@tp
        _4_linear_all_gather_invariant = all_gather_invariant(_4_linear, tp, 0)                           # f32[8, 64]  S(0)@dp I@tp   all_gather; backward slice
        _4_linear_all_gather_invariant_1 = all_gather_invariant(_4_linear_all_gather_invariant, dp, 0)    # f32[16, 64]  I@dp I@tp   all_gather; backward slice
        return (_4_linear_all_gather_invariant_1,)
