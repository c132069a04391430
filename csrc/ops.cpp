// Every operator's schema, once. The implementations are registered by csrc/cpu/*.cpp (key CPU) and
// csrc/cuda/ops.cpp (key CUDA); fake kernels and autograd by bitnet_ext/_ops.py.
//
// Shapes: M tokens, N out_features, K in_features. `x` and its int8 form keep their leading dimensions.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bitnet_ext, m) {
  // --- quantisation ---
  m.def("quantize_act_int8(Tensor x) -> (Tensor x_i8, Tensor act_scale)");
  m.def(
      "rms_norm_quantize(Tensor x, Tensor? gain, float eps) -> (Tensor x_i8, Tensor act_scale, Tensor rstd)");
  m.def(
      "add_rms_norm_quantize(Tensor x, Tensor residual, Tensor? gain, float eps) -> "
      "(Tensor x_i8, Tensor act_scale, Tensor sum)");
  m.def(
      "glu_quantize(Tensor gate, Tensor up, str activation, Tensor? gain, float eps, bool normalize) -> "
      "(Tensor x_i8, Tensor act_scale)");
  m.def("quantize_weight_ternary(Tensor weight) -> (Tensor codes, Tensor weight_scale)");
  m.def("quantize_pack_weight(Tensor weight) -> (Tensor packed, Tensor weight_scale)");
  // Several weights [N_i, K], each with a scale of its own, stacked along N: packed on the CPU, prepacked on
  // CUDA.
  m.def("quantize_weights(Tensor[] weights) -> (Tensor packed, Tensor weight_scale)");
  // The same for many stacks in place. abs_sums float64: the partial sums of |w| that adam_step_ wrote.
  m.def(
      "quantize_weight_groups_(Tensor[] weights, int[] group_sizes, Tensor(a!)[] packed, "
      "Tensor(b!)[] weight_scale, Tensor? abs_sums) -> ()");
  // --- packing ---
  m.def("pack_ternary(Tensor codes) -> Tensor");
  m.def("unpack_ternary(Tensor packed, int K) -> Tensor");
  // Prepacked (csrc/prepacked.h): int32 [ceil(N / 16), ceil(K / 128), 32, 4] for ternary weights,
  // int32 [ceil(N / 16), ceil(K / 128), 4, 32, 4] for int8 ones.
  m.def("prepack_ternary(Tensor packed, int K) -> Tensor");
  m.def("unprepack_ternary(Tensor prepacked, int N, int K) -> Tensor");
  m.def("prepack_int8(Tensor codes) -> Tensor");
  m.def("dequantize_ternary(Tensor packed, Tensor weight_scale, int K, ScalarType dtype) -> Tensor");
  m.def(
      "dequantize_prepacked(Tensor prepacked, Tensor weight_scale, int N, int K, ScalarType dtype) -> "
      "Tensor");
  m.def("dequantize_act(Tensor x_i8, Tensor act_scale, ScalarType dtype) -> Tensor");
  // --- products ---
  m.def("int8xint2_mm_int32(Tensor x_i8, Tensor packed) -> Tensor");
  m.def(
      "int8xint2_mm(Tensor x_i8, Tensor act_scale, Tensor packed, Tensor weight_scale, Tensor? bias, "
      "int[] segments, ScalarType out_dtype) -> Tensor");
  m.def("prepacked_mm_int32(Tensor x_i8, Tensor prepacked, int N) -> Tensor");
  m.def(
      "prepacked_mm(Tensor x_i8, Tensor act_scale, Tensor prepacked, int N, Tensor weight_scale, "
      "Tensor? bias, int[] segments, ScalarType out_dtype, bool weight_is_constant) -> Tensor");
  // `weights` [N_i, K] are stacked along N; `packed` and `weight_scale` [S] are their codes as of
  // quantize_weights: the canonical form on the CPU and the prepacked one on CUDA. `backward` ("exact",
  // "int8") names the gradients, which are those of _autograd.py. first_norm_weight: gain of a norm in front
  // of the other, rounded to x's type; on CUDA for the rows of csrc/cuda/norm_pair.h. With it sum is x where
  // there is no delta, so that its gradient is added in the norms' backward.
  m.def(
      "bit_linear(Tensor x, Tensor? delta, Tensor[] weights, Tensor packed, Tensor weight_scale, "
      "Tensor? bias, Tensor? norm_weight, float norm_eps, bool normalize, Tensor? first_norm_weight, "
      "float first_norm_eps, ScalarType out_dtype, str backward) -> "
      "(Tensor y, Tensor x_i8, Tensor act_scale, Tensor rstd, Tensor sum, Tensor first_rstd)");
  // act(gate) * up of gate_up [.., 2 K], an RMS norm of it, int8 activations and the product.
  m.def(
      "glu_bit_linear(Tensor gate_up, Tensor weight, Tensor packed, Tensor weight_scale, Tensor? bias, "
      "Tensor? norm_weight, float norm_eps, bool normalize, str activation, ScalarType out_dtype, "
      "str backward) -> (Tensor y, Tensor x_i8, Tensor act_scale, Tensor rstd)");
  m.def(
      "glu_backward(Tensor grad_y, Tensor gate_up, str activation, Tensor? gain, Tensor rstd, "
      "bool normalize) -> (Tensor grad_gate_up, Tensor grad_gain)");
  // --- the norm, of x or of x + delta, which is returned as sum ---
  m.def("rms_norm(Tensor x, Tensor? delta, Tensor? gain, float eps) -> (Tensor y, Tensor sum, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor grad_y, Tensor x, Tensor? gain, Tensor rstd, Tensor? grad_residual, "
      "ScalarType delta_dtype) -> (Tensor grad_x, Tensor grad_delta, Tensor grad_gain)");
  // Of two norms one behind the other, grad_z that of the last; x, first_gain and first_rstd of the first.
  m.def(
      "norm_pair_backward(Tensor grad_z, Tensor x, Tensor first_gain, Tensor first_rstd, Tensor gain, "
      "Tensor rstd, Tensor? grad_residual, ScalarType delta_dtype) -> "
      "(Tensor grad_x, Tensor grad_delta, Tensor grad_first_gain, Tensor grad_gain)");
  // The exact gradients of bit_linear's product for few tokens, on CUDA; [0] tensors for what is not needed.
  m.def(
      "bit_linear_grad(Tensor grad_y, Tensor x_i8, Tensor act_scale, Tensor prepacked, Tensor weight_scale, "
      "int[] segments, bool need_input, bool need_weight, ScalarType weight_dtype) -> "
      "(Tensor grad_x_q, Tensor grad_weight)");
  // --- the int8 backward, CUDA only (csrc/cuda/int8_gradient.h) ---
  m.def(
      "quantize_grad(Tensor grad_y, Tensor act_scale, Tensor weight_scale, int[] segments, Tensor seed, "
      "bool by_row, bool by_column) -> (Tensor g_row, Tensor row_scale, Tensor g_column, Tensor order, "
      "Tensor stage_bound, Tensor column_max)");
  m.def("transpose_prepacked(Tensor prepacked, int N, int K) -> Tensor");
  m.def("transpose_int8(Tensor x_i8, Tensor? order) -> Tensor");
  m.def(
      "int8_weight_grad(Tensor g_column, Tensor x_column, Tensor column_max, Tensor stage_bound, "
      "ScalarType out_dtype) -> Tensor");
  // --- optimiser ---
  m.def("sum_of_squares(Tensor[] tensors) -> Tensor");
  // (norm, grad_scale), both float32 []. latch float64 [2 + n]: the first step whose norm was not finite, or
  // a negative number, a counter of the kernel's, and the sums of squares of that step; once it holds a step,
  // grad_scale is NaN. known: square_partials of grads[known_index], which is then not read (else -1).
  m.def(
      "clip_gradients_(Tensor[] grads, Tensor step, float max_norm, Tensor(a!) latch, Tensor? known, "
      "int known_index) -> (Tensor norm, Tensor grad_scale)");
  // float64: sums of squares over fixed runs of elements.
  m.def("square_partials(Tensor tensor) -> Tensor");
  // int32 [V] (or [S, V]): the place of an id in ids [T] (or in each of [S, T]) where it first occurs, or -1.
  m.def("row_slots(Tensor ids, int V) -> Tensor");
  // The gradient of an embedding [V, H] from the rows [T, H] of ids [T] and their row_slots: sums [T, H]
  // holds the sum of all rows of an id where it first occurs, else 0.
  m.def("sum_rows(Tensor ids, Tensor rows, Tensor slots) -> Tensor");
  // decay, ternary: 0 or 1 for each of params. abs_sums: partial sums of the new magnitudes of the ternary
  // ones, for quantize_weight_groups_. slots: grads[row_param] holds rows, as from sum_rows (else -1).
  // num_blocks: 0 to fill a GPU, or blocks that leave room beside them.
  m.def(
      "adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
      "Tensor hyper, Tensor grad_scale, int[] decay, int[] ternary, Tensor(d!)? abs_sums, Tensor? slots, "
      "int row_param, float beta1, float beta2, float eps, bool decoupled, int num_blocks) -> ()");
  // The same for one param [V, H] whose rows wait for the updates of several steps, each with a gradient by
  // rows, an entry of grad_scales and a row of slots and hyper: of a row those from its last slot on. ids
  // [T]: of the step behind them, with a row of slots too: only these rows. Else all, by num_blocks.
  m.def(
      "adam_rows_(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor[] grads, Tensor slots, "
      "Tensor hyper, Tensor[] grad_scales, Tensor? ids, bool decay, float beta1, float beta2, float eps, "
      "bool decoupled, int num_blocks) -> ()");
  // --- loss ---
  m.def(
      "softmax_stats(Tensor logits, Tensor target) -> "
      "(Tensor lse, Tensor target_logit, Tensor mean_logit, Tensor expected_logit, Tensor argmax)");
  // Logits are [T, S] with the vocabulary in the first V columns; what lies behind is padding.
  m.def("count_targets(Tensor target) -> Tensor");
  m.def(
      "cross_entropy_rows_(Tensor(a!) logits, int V, Tensor target, Tensor? count, Tensor? log_marginal, "
      "float label_smoothing, float z_loss, float entropy_weight, float diversity_weight, float softcap) -> "
      "(Tensor lse, Tensor cross_entropy, Tensor entropy, Tensor smoothing, Tensor argmax)");
  m.def(
      "cross_entropy_mean(Tensor lse, Tensor cross_entropy, Tensor entropy, Tensor smoothing, Tensor target, "
      "Tensor? marginal_entropy, Tensor? square_sum, float label_smoothing, float z_loss, "
      "float entropy_weight, float diversity_weight, float output_l2) -> "
      "(Tensor loss, Tensor mean_cross_entropy, Tensor mean_entropy, Tensor mean_square)");
  m.def("probability_sums(Tensor logits, int V, Tensor target, Tensor lse, float softcap) -> Tensor");
  // What a model predicts, on the CPU; the logits are used up. mass float64 [V]: the sum of the
  // distributions of the rows whose target is not negative.
  m.def(
      "predicted_rows_(Tensor(a!) logits, int V, Tensor target) -> (Tensor cross_entropy, Tensor entropy, "
      "Tensor top_log_probability, Tensor logit_std, Tensor argmax, Tensor mass)");
  m.def("scale_(Tensor(a!)[] tensors, Tensor scale) -> ()");
  // Implemented in bitnet_ext/ops/loss.py from the operators above and matrix products.
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, float label_smoothing, "
      "float z_loss, float entropy_weight, float diversity_weight, float softcap, float output_l2, "
      "int chunk_bytes, bool needs_grad_hidden, bool needs_grad_weight) -> "
      "(Tensor loss, Tensor mean_cross_entropy, Tensor mean_entropy, Tensor mean_square, "
      "Tensor marginal_entropy, Tensor cross_entropy, Tensor entropy, Tensor argmax, Tensor mean_p, "
      "Tensor grad_hidden, Tensor grad_weight)");
  // fp32 products of few tokens with a tall matrix, on CUDA: hidden [T, H], weight [V, H], grad [T, V].
  // nt: out [T, S] = hidden weight^T, with zeros in the columns beyond V; nn: out [T, H] = grad weight; tn:
  // out [V, H] = grad^T hidden, or out plus that, by at most max_blocks multiprocessors (0: all).
  m.def("skinny_mm_nt_(Tensor(a!) out, Tensor hidden, Tensor weight) -> ()");
  m.def("skinny_mm_nn_(Tensor(a!) out, Tensor grad, Tensor weight) -> ()");
  m.def("skinny_mm_tn_(Tensor(a!) out, Tensor grad, Tensor hidden, bool accumulate, int max_blocks) -> ()");
  // Asks the system for large pages behind a tensor that is about to be written first. Without effect where
  // there are none.
  m.def("_prefer_huge_pages(Tensor tensor) -> ()");
  // --- attention, on CUDA only: the caller composes it of PyTorch's operators elsewhere ---
  // qkv [B, T, (num_heads + 2 num_kv_heads) D] stacks queries, keys and values; cos, sin float32 [T, D] of
  // rotary_table. Short: T <= 128 and T D <= 8192, D = 32, 64 or 128. lse float32 [B, num_heads, T].
  m.def(
      "short_attention(Tensor qkv, Tensor cos, Tensor sin, int num_heads, int num_kv_heads) -> "
      "(Tensor out, Tensor lse)");
  m.def(
      "short_attention_backward(Tensor grad_out, Tensor qkv, Tensor cos, Tensor sin, Tensor out, Tensor lse, "
      "int num_heads, int num_kv_heads) -> Tensor");
  // (query [B, T, num_heads, D], key [B, T, num_kv_heads, D]), rotated, or the same within qkv; the backward
  // takes such gradients of query, key and value, D contiguous, and returns that of qkv.
  m.def(
      "rotary_query_key(Tensor qkv, Tensor cos, Tensor sin, int num_heads, int num_kv_heads) -> "
      "(Tensor query, Tensor key)");
  m.def("rotate_query_key_(Tensor(a!) qkv, Tensor cos, Tensor sin, int num_heads, int num_kv_heads) -> ()");
  m.def(
      "rotary_query_key_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor cos, "
      "Tensor sin) -> Tensor");
  // --- settings of the process, for tests and bug reports ---
  m.def("_cpu_isa() -> str");
  m.def("_set_cpu_isa(str isa) -> ()");
  m.def("_cpu_info() -> str");    // JSON (csrc/build_info.cpp)
  m.def("_build_info() -> str");  // JSON (CMakeLists.txt)
}
