"""Mutants of the CUDA column, killed by its tests on the host."""

POOLING, LINEAR, BATCH_NORM, DROPOUT, ACTIVATION, TILE, LOAD = (
    f"csrc/cuda/{name}"
    for name in ("pooling.cu", "linear.cu", "batch_norm.cu", "dropout.cu", "activation.cuh", "mma_tile.cuh", "tile_load.cuh")
)
POOLING_WINDOW, POOLING_ADAPTIVE_MAX, POOLING_LP = (f"csrc/cuda/pooling_{name}" for name in ("window.cuh", "adaptive_max.cu", "lp.cu"))
LAYER_NORM, RNN, RNN_BACKWARD, RNN_STEPS, RNN_GATES, RNN_ROWS, RNN_OPTIONS, RNN_OPTIONS_BACKWARD = (
    f"csrc/cuda/{name}" for name in (
        "layer_norm.cu", "rnn.cu", "rnn_backward.cu", "rnn_steps.cuh", "rnn_gates.cuh", "rnn_rows.cuh", "rnn_options.cu",
        "rnn_options_backward.cu",
    )
)
POSITIONS, OPTIM, EMBEDDING, LOSS, CONV = (f"csrc/cuda/{name}.cu" for name in ("positions", "optim", "embedding", "loss", "conv"))
FAST_DIVIDE = "csrc/cuda/fast_divide.cuh"
ATTENTION, ATTENTION_BACKWARD, ATTENTION_TILE = (
    f"csrc/cuda/{name}" for name in ("attention.cu", "attention_backward.cu", "attention_tile.cuh")
)
ATTENTION_OPS, ATTENTION_VARLEN = (f"csrc/ops/cuda_attention{name}.cpp" for name in ("", "_varlen"))
POSITIONS_TURN = "csrc/cuda/positions_turn.cuh"


ATTENTION_HOPPER, ATTENTION_HOPPER_BACKWARD, ATTENTION_HOPPER_TILE = (
    f"csrc/cuda/attention_{name}" for name in ("sm90.cu", "backward_sm90.cu", "sm90.cuh")
)
LINEAR_HOPPER, CONV_HOPPER, WGMMA_TILE, TILE_STORE, PTX, HOPPER = (
    f"csrc/cuda/{name}"
    for name in ("linear_sm90.cu", "conv_sm90.cu", "wgmma_tile.cuh", "tile_store.cuh", "ptx.cuh", "hopper.cuh")
)


def _mutant(file: str, old: str, new: str, selection: str, family: str = "") -> dict:
    return dict(file=file, old=old, new=new, tests=[f"tests/test_cuda{family}.py", "-k", selection], build="cuda_on_host")


def _large_mutant(file: str, old: str, new: str, selection: str) -> dict:
    return _mutant(file, old, new, selection, "_large")


def _norm_mutant(old: str, new: str, selection: str = "test_layer_norm and float32") -> dict:
    return _mutant(LAYER_NORM, old, new, selection, "_layer_norm")


def _loss_mutant(old: str, new: str, selection: str = "test_cross_entropy and float32") -> dict:
    return _mutant(LOSS, old, new, selection, "_loss")


def _optim_mutant(old: str, new: str, selection: str) -> dict:
    return _mutant(OPTIM, old, new, selection, "_optim")


def _embedding_mutant(old: str, new: str, selection: str = "between_tiles") -> dict:
    return _mutant(EMBEDDING, old, new, selection, "_embedding")


def _rnn_mutant(file: str, old: str, new: str, selection: str) -> dict:
    return _mutant(file, old, new, selection, "_rnn")


def _attention_mutant(file: str, old: str, new: str, selection: str) -> dict:
    return _mutant(file, old, new, selection, "_attention")


_MAX = "test_max_pool2d and not 2x8x9x11"
_AVERAGE = "avg_pool2d and float32 and channels_last"
_LINEAR = "test_linear and (rows2 or rows3 or rows4)"
_LINEAR_ACTIVATION = "test_linear_with_activation"
_NORM = "test_batch_norm and 3x8x19x20"
_EVAL = "test_batch_norm and eval and 2x5x7x9"

MUTANTS = [
    # torch's stream: among the global symbols, where it is not
    dict(file="csrc/ops/cuda_common.h", old="library ? dlsym(library, name) : nullptr", new="nullptr",
         tests=["tests/test_cuda_stream.py"], build=""),
    # max_pool2d_forward_kernel
    _mutant(POOLING, "value > best[v] || value != value", "value > best[v]", "test_max_pool2d_special"),
    _mutant(POOLING, "value > best[v] ||", "value >= best[v] ||", "test_max_pool2d_special"),
    _mutant(POOLING, "const int s0 = w0 < 0 ? (-w0 + g.width.dilation - 1)", "const int s0 = w0 < 0 ? (-w0)", _MAX),
    _mutant(POOLING, "      if (w >= g.width.size) break;", "      if (w >= g.width.size - 1) break;", _MAX),
    # max_pool2d_backward_kernel
    _mutant(POOLING, "if (down % g.height.dilation != 0) continue;", "", _MAX),
    _mutant(POOLING_WINDOW, "(padded - reach + axis.stride - 1)", "(padded - reach + axis.stride)", _MAX),
    _mutant(POOLING, "down / g.height.dilation * g.width.kernel", "down / g.height.dilation * g.height.kernel", _MAX),
    # avg_pool2d_forward_kernel
    _mutant(POOLING_WINDOW, "axis.size + axis.padding)", "axis.size + 2 * axis.padding)", "test_avg_pool2d and ceil"),
    _mutant(POOLING, "sum[v] += row_sum[v]", "sum[v] = row_sum[v]", _AVERAGE),
    _mutant(POOLING_WINDOW, "axis.size + axis.out_size - 1) / axis.out_size", "axis.size) / axis.out_size", _AVERAGE),
    _mutant(POOLING, "return static_cast<float>(rule.divisor_override);", "return 1.0f;", "test_avg_pool2d and divisor"),
    # avg_pool2d_backward_kernel
    _mutant(POOLING, "to_float(grad.at[v]) / by", "to_float(grad.at[v]) * by", _AVERAGE),
    _mutant(POOLING_WINDOW, "axis.size - 1) / axis.size) - 1}", "axis.size - 1) / axis.size) - 2}", _AVERAGE),
    _mutant(POOLING, "window<ADAPTIVE>(g.width, ow)", "window<ADAPTIVE>(g.width, columns.first)", _AVERAGE),
    # pooling_adaptive_max.cu
    _mutant(POOLING_ADAPTIVE_MAX, "value > best[v] ||", "value >= best[v] ||", "test_adaptive_max_pool2d_special"),
    _mutant(POOLING_ADAPTIVE_MAX, "|| value != value", "", "test_adaptive_max_pool2d_special"),
    _mutant(POOLING_ADAPTIVE_MAX, "== self ?", "!= -1 ?", "test_adaptive_max_pool2d and float32"),
    # pooling_lp.cu
    _mutant(POOLING_LP, "sum[v] *= share", "share = 1", "test_lp_pool2d and ceil and float32"),
    _mutant(POOLING_LP, "sum[v] == 0 ? 0 :", "", "test_lp_pool2d_special"),
    _mutant(POOLING_LP, "sum[v] != sum[v] ? slope * 0 :", "", "test_lp_pool2d_special"),
    _mutant(POOLING_LP, "Power<A>(norm - 1.0)", "Power<A>(norm)", "test_lp_pool2d and ceil and float32"),
    _mutant(POOLING_LP, "whole < 0 ? 1 / result : result", "result", "test_lp_pool2d and ceil and float32"),
    # Slices of large tensors: their first image, their size; windows over more than 31 bits
    _large_mutant(POOLING_WINDOW, "return data + first * g.height.size", "return data + 0 * g.height.size", "pooling_in_slices"),
    _large_mutant(POOLING_WINDOW, "return data + first * g.height.out_size", "return data + 0 * g.height.out_size", "pooling_in_slices"),
    _large_mutant(POOLING, "places = from_output(static_cast<int64_t*>(indices), geometry, first)", "places = indices", "pooling_in_slices"),
    _large_mutant(FAST_DIVIDE, "outer - first < most ? outer - first : most", "outer - first", "pooling_in_slices"),
    _large_mutant(FAST_DIVIDE, "most_numbers() / inner", "most_numbers() / inner + 1", "pooling_in_slices"),
    _large_mutant(POSITIONS, "places.first + row", "row", "rotary_in_slices"),
    _large_mutant(POOLING, "static_cast<uint32_t>((r - r0) * g.height.dilation)", "static_cast<uint32_t>(r * g.height.dilation)",
                  "31_bits"),
    _large_mutant(POOLING, "(s - s0) * g.width.dilation", "s * g.width.dilation", "31_bits"),
    # linear_forward_kernel
    _mutant(LINEAR, "second += to_float(args.bias[column + 1])", "second += to_float(args.bias[column])", _LINEAR),
    _mutant(LINEAR, "activated(second, args.activation)", "second", _LINEAR_ACTIVATION),
    _mutant(TILE_STORE, "if (column + 1 < columns) at[1] = pair.at[1];", "", _LINEAR),
    # linear_backward_input_kernel, and what all three share
    _mutant(TILE, "ldmatrix_x4_transposed(out, tile + (k_at", "ldmatrix_x4(out, tile + (k_at", _LINEAR),
    _mutant(TILE, "(SECOND == Second::outer ? low : high)", "(SECOND == Second::outer ? high : low)", _LINEAR),
    _mutant(TILE, "static_cast<int>(ceil_div(a.k, kBlockK<T>))", "static_cast<int>(a.k / kBlockK<T>)", _LINEAR),
    _mutant(TILE, "cp_async_wait<SHAPE::kStages - 2>();", "cp_async_wait<SHAPE::kStages - 1>();", _LINEAR),
    _mutant(TILE, "    __syncthreads();", "    //", _LINEAR),
    _mutant(LOAD, "inside ? 16 : 0", "16", _LINEAR),
    _mutant(LOAD, "inside ? *source : from_float<T>(0.0f)", "*source", _LINEAR),
    _mutant(PTX, "mma_16x8x16(c, a, b0, b1, kHalf)", "mma_16x8x16(c, a, b0, b1, false)", _LINEAR),
    _mutant(TILE, "at[4 * k * TileType::kStride", "at[k * TileType::kStride", "test_tf32", "_conv"),
    _mutant(TILE, "out[i] = to_tf32(__uint_as_float(out[i]));", "out[i] = out[i];", "test_tf32", "_conv"),
    _mutant(TILE, "(SECOND == Second::outer ? high : low) * kPiece", "(SECOND == Second::outer ? high : low) * 8", "test_tf32", "_conv"),
    _mutant(CONV, "return is_16_bit(element) ? 8 : 4;", "return is_16_bit(element) ? 8 : 1;", "test_tf32", "_conv"),
    # linear_backward_weight_kernel
    _mutant(LINEAR, "for (int k = 0; k < kBlockK<T>; k++)", "for (int k = 1; k < kBlockK<T>; k++)", _LINEAR),
    _mutant(LINEAR, "args.grad_bias && blockIdx.y == 0", "args.grad_bias && blockIdx.y == 1", _LINEAR),
    _mutant(TILE, "if (step + SHAPE::kStages - 1 < steps) load", "if (step + SHAPE::kStages < steps) load",
            "test_linear and rows6"),
    # linear_sm90_kernel, conv2d_sm90_kernel and their ring of tiles
    _mutant(WGMMA_TILE, "(step / kStages + 1) % 2", "(step / kStages) % 2", "test_linear_on_hopper and wide"),
    _mutant(WGMMA_TILE, "mbarrier_arrive(empty + (step - 1) % kStages)", "mbarrier_arrive(empty + step % kStages)",
            "test_linear_on_hopper and rows2"),
    _mutant(WGMMA_TILE, "    wgmma_wait_all(sum.value);\n", "", "test_linear_on_hopper and wide"),
    _mutant(HOPPER, "A_FIRST, B_FIRST, adds, kHalf)", "A_FIRST, B_FIRST, adds, false)", "test_linear_on_hopper and wide"),
    _mutant(LINEAR_HOPPER, "(piece ^ k % 8)", "piece", "test_linear_on_hopper and wide"),
    _mutant(LINEAR_HOPPER, "if (column + 1 < args.columns) second +=", "if (column + 2 < args.columns) second +=",
            "test_linear_on_hopper and wide"),
    _mutant(CONV_HOPPER, "window.taps - 1 - here", "here", "test_on_hopper", "_conv"),
    _mutant(CONV_HOPPER, "window.first_w + (window.width - 1) * window.stride_w - (width - 1)",
            "window.first_w + (window.width - 1) * window.stride_w - width", "test_on_hopper", "_conv"),
    _mutant(CONV_HOPPER, "first_pixel = blockIdx.y * args.part_length", "first_pixel = blockIdx.y * 64", "test_on_hopper", "_conv"),
    _mutant(CONV_HOPPER, "tap % window.taps_w * args.tap_w", "tap % window.taps_w * args.tap_h", "test_on_hopper", "_conv"),
    # attention_varlen_forward_kernel, attention_varlen_backward_query_kernel, attention_varlen_backward_key_kernel
    _attention_mutant(ATTENTION_TILE, " + static_cast<uint64_t>(x.sequence)", "", "varlen_has_the_bits and 12-float32"),
    _attention_mutant(ATTENTION_TILE, "most_shared_bytes() >= kWideFloatBytes", "true", "least_shared_memory and float32"),
    _attention_mutant(ATTENTION, "attention::most_columns(a.element)", "attention::kMostColumns",
                      "least_shared_memory and float32"),
    _attention_mutant(ATTENTION_TILE, "tile.sequence, tile.keys - tile.queries}", "tile.sequence, 0}", "test_varlen_windows"),
    _attention_mutant(ATTENTION_TILE, "static_cast<int64_t>(x.heads) * tile.first_query", "int64_t{tile.first_query}",
                      "varlen_has_the_bits and 12-float32"),
    _attention_mutant(ATTENTION, "from_row<T>(output, tile.first_query)", "output", "varlen_has_the_bits and 12-float32"),
    _attention_mutant(ATTENTION_BACKWARD, "args.split = tile.keys <= kFewKeys", "args.split = true",
                      "varlen_has_the_bits and 12-float32"),
    _attention_mutant(ATTENTION_BACKWARD, "j0 - x.right - shift_of(x)", "j0 - x.right", "test_varlen_windows"),
    _attention_mutant(ATTENTION_BACKWARD, "x.left - shift_of(x)", "x.left", "test_varlen_windows"),
    _attention_mutant(ATTENTION_VARLEN, "(of_keys ? n : tiles - 1 - n) * ", "0 * ", "varlen_has_the_bits and 12-float32"),
    # attention_forward_sm90_kernel
    _attention_mutant(ATTENTION_HOPPER, "sum[i] *= shrink[r];", "sum[i] *= 1.0f;", "test_attention_on_hopper and plain"),
    _attention_mutant(ATTENTION_HOPPER, "of_values ? use / 2 - 1", "of_values ? use / 2", "test_attention_on_hopper and plain"),
    _attention_mutant(ATTENTION_HOPPER, "wgmma_wait<0>(sum, p);\n        ring.release(values_use);",
                      "ring.release(values_use);", "test_attention_on_hopper and plain"),
    _attention_mutant(ATTENTION_HOPPER_TILE, "j0 + c < span[r].begin ||", "", "test_attention_on_hopper and window"),
    _attention_mutant(ATTENTION_HOPPER_TILE, "(use / STAGES + 1) % 2", "(use / STAGES) % 2", "test_attention_on_hopper and plain"),
    _attention_mutant(ATTENTION_HOPPER_TILE, "matrix_descriptor(tile + row * 64, 2 * kPanel)",
                      "matrix_descriptor(tile + row * 64, kPanel)", "test_attention_on_hopper and plain and 128"),
    _attention_mutant(ATTENTION_HOPPER_TILE, "else if (stride[d] == 0)\n      return false;", "", "hopper_leaves"),
    # attention_backward_query_sm90_kernel, attention_backward_key_sm90_kernel
    _attention_mutant(ATTENTION_HOPPER_BACKWARD, "change[i] - delta[r]", "change[i]", "test_attention_on_hopper and plain"),
    _attention_mutant(ATTENTION_HOPPER_BACKWARD, "return kh * x.group + n / query_tiles;", "return kh * x.group;",
                      "test_attention_on_hopper and plain"),
    _attention_mutant(ATTENTION_HOPPER_BACKWARD, "kFewKeys || tensors.from_scores)", "kFewKeys)", "hopper_leaves"),
    _attention_mutant(ATTENTION_HOPPER_BACKWARD, "j < span.begin ||", "", "test_attention_on_hopper and window"),
    _attention_mutant(ATTENTION_HOPPER_BACKWARD, "i < x.queries ? exponent_of(x, place) : INFINITY", "exponent_of(x, place)",
                      "test_attention_on_hopper and plain"),
    _attention_mutant(ATTENTION_HOPPER_BACKWARD, "j0 + kBlockRows + x.left", "j0 + x.left", "test_attention_on_hopper and window"),
    # their float16, and packed sequences
    _attention_mutant(ATTENTION_HOPPER_TILE, "s[i] *= inverse[r];", "s[i] *= 1.0f;", "beyond_float16_on_hopper"),
    _attention_mutant(ATTENTION_HOPPER_TILE, "sum[i] *= shrink[r];", "sum[i] *= 1.0f;", "test_attention_on_hopper and plain and float16"),
    _attention_mutant(ATTENTION_HOPPER_BACKWARD, "undo(scale, of_key);", "", "test_attention_on_hopper and plain and float16"),
    _attention_mutant(HOPPER, "a, b, B_FIRST, adds, kHalf)", "a, b, B_FIRST, adds, false)", "test_attention_on_hopper and plain and float16"),
    _attention_mutant(ATTENTION_HOPPER_TILE, "i = begin * kAcross +", "i = (begin + 1) * kAcross +", "varlen_on_hopper_has and 64"),
    _attention_mutant(ATTENTION_HOPPER, "kPacked<A> && start", "false && start", "varlen_on_hopper_has and 64"),
    _attention_mutant(ATTENTION_HOPPER, "(origin.query + i) *", "i *", "varlen_on_hopper_has and 64"),
    _attention_mutant(ATTENTION_HOPPER, "origin.key + start", "start", "varlen_on_hopper_has and 64"),
    _attention_mutant(ATTENTION_HOPPER_BACKWARD, "kPacked<A> && j0 + kAcross > x.keys", "false", "varlen_on_hopper_has and 64"),
    _attention_mutant(ATTENTION_HOPPER_BACKWARD, "kPacked<A> && i0 + kAcross > x.queries", "false", "varlen_on_hopper_has and 64"),
    _attention_mutant(ATTENTION_HOPPER_BACKWARD, "j0 - x.right - shift_of(x)", "j0 - x.right", "test_varlen_on_hopper and 70"),
    _attention_mutant(ATTENTION_HOPPER_BACKWARD, "x.left - shift_of(x)", "x.left", "test_varlen_on_hopper and 70"),
    _attention_mutant(ATTENTION_HOPPER_BACKWARD, "head) * DEPTH, int64_t{heads} * DEPTH}", "head) * DEPTH, DEPTH}",
                      "varlen_on_hopper_has and 64"),
    _attention_mutant(ATTENTION_VARLEN, "hopper ? kFew : kNone", "hopper ? kAll : kNone", "varlen_on_hopper_has and 64"),
    # batch_norm_partial_kernel, batch_norm_statistics_kernel, batch_norm_running_kernel
    _mutant(BATCH_NORM, "for (int rows = kThreads / plan.lanes / 2; rows > 0; rows /= 2) {\n    __syncthreads();\n"
            "    if (at.row >= rows) continue;\n    const int other = thread + rows * plan.lanes;\n#pragma unroll\n"
            "    for (int c = 0; c < kChannels; c++) merge",
            "for (int rows = kThreads / plan.lanes / 2; rows > 1; rows /= 2) {\n    __syncthreads();\n"
            "    if (at.row >= rows) continue;\n    const int other = thread + rows * plan.lanes;\n#pragma unroll\n"
            "    for (int c = 0; c < kChannels; c++) merge", _NORM),
    _large_mutant(BATCH_NORM, "const uint32_t start = LAST ? 0 :", "const uint32_t start = true ? 0 :", "short_chunks and 130"),
    _large_mutant(BATCH_NORM, "base = LAST ? image * p.channels + channel", "base = LAST ? channel", "short_chunks and 130"),
    _large_mutant(BATCH_NORM, "wanted < largest ? wanted : largest", "wanted", "chunks_are_cut"),
    _mutant(BATCH_NORM, "      found = u + 1;", "      found = 1;", _NORM),
    _mutant(BATCH_NORM, "const float rest = left[c] / new_count;", "const float rest = 0.0f;", "test_batch_norm_long_chunks"),
    _mutant(BATCH_NORM, "left < items_a_chunk ? left : items_a_chunk", "items_a_chunk", _NORM),
    _mutant(BATCH_NORM, "m2 / (count - 1.0)", "m2 / count", _NORM),
    _mutant(BATCH_NORM, "for (int r = 1; r < kFinalRows; r++) {", "for (int r = 2; r < kFinalRows; r++) {", _NORM),
    _mutant(BATCH_NORM, "1.0 / sqrt(load_channel(running_var, channel) + eps)", "1.0 / sqrt(load_channel(running_var, channel))",
            _EVAL),
    # batch_norm_apply_kernel
    _mutant(BATCH_NORM, "if (residual) y += to_float(added.at[v]);", "", "with_activation_and_residual and float32"),
    _mutant(BATCH_NORM, "* scale[c] + bias[c];", "* scale[c];", _EVAL),
    _mutant(BATCH_NORM, "(image * p.channels + channel) * p.inner", "(image * p.channels) * p.inner", _EVAL),
    # batch_norm_backward_partial_kernel, batch_norm_backward_sums_kernel
    _mutant(BATCH_NORM, "thread_dot[c].add_product(g, to_float(x.at[v]) - mean[c]);",
            "thread_dot[c].add_product(g, to_float(x.at[v]));", _NORM),
    _mutant(BATCH_NORM, "totals[c][thread] = total[c] += totals[c][other];", "total[c] += totals[c][other];", _NORM),
    _mutant(BATCH_NORM, "store_channel(grad_weight, channel, dot * invstd);", "store_channel(grad_weight, channel, dot);",
            _EVAL),
    # batch_norm_backward_apply_kernel
    _mutant(BATCH_NORM, "- (to_float(x.at[v]) - mean[c]) * slope[c];", ";", _NORM),
    _mutant(BATCH_NORM, "g = g - mean_g[c]", "g = g", _NORM),
    _mutant(BATCH_NORM, "before.at[v] = from_float<T>(g);", "before.at[v] = grad.at[v];",
            "with_activation_and_residual and float32"),
    # dropout_kernel
    _mutant(DROPOUT, "word >= rule.threshold", "word < rule.threshold", "test_dropout_drops"),
    _mutant(DROPOUT, "group * philox::kRun + in_run + v", "group * philox::kRun + in_run", "test_dropout_drops"),
    _mutant(DROPOUT, "if (at + v < count) output", "if (at + v + 1 < count) output", "test_dropout_drops"),
    _mutant(DROPOUT, "const int64_t first = group * philox::kGroup", "const int64_t first = group * philox::kRun",
            "test_dropout_drops"),
    # feature_dropout_kernel
    _mutant(DROPOUT, "i / (c * inner) * c + i % c", "i % c", "test_dropout_drops"),
    _mutant(DROPOUT, "feature / philox::kGroup * philox::kRun", "0", "test_dropout_of_many"),
    _mutant(DROPOUT, "feature / philox::kRun % 4", "0", "test_dropout_of_many"),
    # activation_backward_kernel
    _mutant(ACTIVATION, "y <= 0.0f ? 0.0f : grad", "y < 0.0f ? 0.0f : grad", _LINEAR_ACTIVATION),
    _mutant(ACTIVATION, "grad * (1.0f - y * y)", "grad * (1.0f - y)", _LINEAR_ACTIVATION),
    _mutant(LINEAR, "for (int64_t i = start; i < count; i++)", "for (int64_t i = start; i + 1 < count; i++)", _LINEAR_ACTIVATION),
    # layer_norm_forward_kernel, layer_norm_backward_kernel, layer_norm_sums_kernel
    _norm_mutant("(value - mean) * (value - mean)", "value * value"),
    _norm_mutant("value[v] *= of_weight[v];", "value[v] *= of_weight[0];"),
    _norm_mutant("- normal[p * VEC + v] * mean_second", ""),
    _norm_mutant("to[columns + j + v] = (fresh ? 0.0f : to[columns + j + v]) + gradient[i];",
                 "to[columns + j + v] = gradient[i];"),
    _norm_mutant("for (int warp = 0; warp < My::kRowsAtOnce; warp++)", "for (int warp = 1; warp < My::kRowsAtOnce; warp++)"),
    _norm_mutant("part < count; part += kFinalRows", "part < count; part += count", "test_layer_norm_sums"),
    # sgd_kernel, adam_kernel, lars_rate_kernel, grad_norm_kernel, grad_clamp_kernel; the table and its cuts
    _optim_mutant("row.fresh ? grad[v] :", "row.fresh ? 0.5f * grad[v] :", "parity and momentum"),
    _optim_mutant("corrections[2 * row.counted + 1]", "corrections[2 * row.counted]", "parity and adam"),
    _optim_mutant("largest[v] < square[v] ||", "largest[v] > square[v] ||", "parity and amsgrad"),
    _optim_mutant("parts[row.first_block + i]", "parts[i]", "test_lars_follows"),
    _optim_mutant("return a > b || a != a ? a : b;", "return a > b ? a : b;", "not_finite"),
    _optim_mutant("factor >= 1.0 ? 1.0 : factor", "factor", "test_clipping_by_norm"),
    _optim_mutant("if (limit != limit) x[v] = limit;", "", "test_clipping_by_value"),
    _optim_mutant("row.first_block = static_cast<int32_t>(blocks);", "row.first_block = i;", "more_tensors"),
    _optim_mutant("    before += blocks;\n", "", "more_tensors"),
    _optim_mutant("if (v < left) x[v] = from_float", "x[v] = from_float", "odd_addresses"),
    # embedding_forward_kernel, embedding_keys_kernel, embedding_sums_kernel, embedding_parts_kernel
    _embedding_mutant("exists ? from[j] : missing<Word>()", "from[j]", "out_of_range"),
    _embedding_mutant("(args.width | args.stride) * args.element_bytes", "args.width * args.element_bytes", "words"),
    _embedding_mutant(" && row != padding_idx", ""),
    _embedding_mutant("  if (lane == 31) next = after;\n", ""),
    _embedding_mutant("opened = begin == 0 && before == row", "opened = begin == 0"),
    _embedding_mutant("(args, sum, p + 1 - begin);", "(args, sum, p + 1);"),
    _embedding_mutant("  if (first > 0 && args.keys[first - 1] == row) return;\n", ""),
    _embedding_mutant("j == 0 ? tail_of(tile) : head_of(tile + j)", "head_of(tile + j)"),
    _embedding_mutant("for (int other = 1; other < kWarps; other++)", "for (int other = 2; other < kWarps; other++)"),
    _embedding_mutant("(args, sum, end - begin);", "(args, sum, (more + 1) * kTile);"),
    # rnn_forward_kernel
    _rnn_mutant(RNN_STEPS, "met * gridDim.x", "(met - 1) * gridDim.x", "test_rnn_same_bits_in_every_thread_order"),
    _rnn_mutant(RNN_STEPS, "for (int w = 1; w < kWarpsK; w++)", "for (int w = 2; w < kWarpsK; w++)", "test_rnn_long_sums"),
    _rnn_mutant(RNN_STEPS, "kLast ? of_unit < hidden : k_at < k", "true", "test_rnn and odd"),
    _rnn_mutant(RNN_STEPS, "mma_16x8x16<T>(value[2 * j], a", "mma_16x8x16<bf16>(value[2 * j], a", "test_rnn and float16 and odd"),
    _rnn_mutant("csrc/ops/cuda_rnn.h", "rnn_input(s.element,", "rnn_input(cuda::Element::bfloat16,", "test_rnn and float16 and odd"),
    _rnn_mutant(RNN, "b < before.size ? *cell :", "n > 0 ? *cell :", "test_rnn_packed and lstm"),
    _rnn_mutant(RNN_GATES, "candidate + x.r * recurrent", "candidate + recurrent", "test_rnn and gru and odd"),
    _rnn_mutant(RNN, "if (b >= after.size) a.h_n", "if (n + 1 == s.steps) a.h_n", "test_rnn_packed and sorted"),
    _rnn_mutant(RNN_STEPS, "Long::shared_bytes(0, false) > most_shared_bytes()", "false", "least_shared_memory and float32"),
    # rnn_padding_kernel
    _rnn_mutant(RNN, "if (t < s.steps && b < s.sizes[t]) return;", "if (t < s.steps) return;", "test_rnn_lengths"),
    # rnn_backward_kernel
    _rnn_mutant(RNN_BACKWARD, "if (GATES == 3 && goes_on) dh += *carry;", "", "test_rnn and gru and odd"),
    _rnn_mutant(RNN_GATES, "dn * recurrent * r * (1.0f - r)", "dn * r * (1.0f - r)", "test_rnn and gru and odd"),
    _rnn_mutant(RNN_BACKWARD, "b >= step.size || b >= after.size", "b >= step.size", "test_rnn_packed and sorted"),
    _rnn_mutant(RNN_BACKWARD, "s.first_rows ? s.first_rows[b] : ", "", "test_rnn_packed and unsorted"),
    _rnn_mutant(RNN_GATES, "of_cell * cell_before * forget", "of_cell * forget", "test_rnn and lstm and odd"),
    # rnn_options: the mask in the product, the row of a norm, the sequences that a step has, the peephole of o
    _rnn_mutant(RNN_OPTIONS, "operand[here] = from_float<T>(options.mask ? h * options.mask[here] : h);",
                "operand[here] = from_float<T>(h);", "test_rnn_options and dropout and float32"),
    _rnn_mutant(RNN_OPTIONS, "float* const x = given + blockIdx.x * count;", "float* const x = given;",
                "test_rnn_options and norm and float32"),
    _rnn_mutant(RNN_OPTIONS, "  if (b >= step.size) return;\n  const bool last", "  const bool last", "test_rnn_options_lengths"),
    _rnn_mutant(RNN_OPTIONS, "to_float(peephole[2 * hidden + j]) * x.cell", "to_float(peephole[2 * hidden + j]) * before",
                "test_rnn_options and peephole and float32"),
    _rnn_mutant(RNN_OPTIONS, "if (last) h_n[here] = from_float<T>(h);", "h_n[here] = from_float<T>(0.0f);",
                "test_rnn_projections and float32"),
    # rnn_options_backward: the same of the gradients, what zoneout passes on, a barrier, the state that was multiplied
    _rnn_mutant(RNN_OPTIONS_BACKWARD, "if (o.mask) dh *= o.mask[here];", "", "test_rnn_options and dropout and float32"),
    _rnn_mutant(RNN_OPTIONS_BACKWARD, "a.carry[here] = zoned(0.0f, dh, chosen, o.zoneout_h);", "a.carry[here] = 0.0f;",
                "test_rnn_options and zoneout and float32"),
    _rnn_mutant(RNN_OPTIONS_BACKWARD, "passed += to_float(peephole[j]) * d.in +", "passed +=",
                "test_rnn_options and peephole and float32"),
    _rnn_mutant(RNN_OPTIONS_BACKWARD, "row_before = before.offset + at", "row_before = step.offset + at",
                "test_rnn_options and gru and float32"),
    _rnn_mutant(RNN_OPTIONS_BACKWARD, "for (int other = 1; other < kSumRows; other++)", "for (int other = 2; other < kSumRows; other++)",
                "test_rnn_options and norm and float32"),
    # rnn_rows.cuh: the mean's correction to a norm's gradient, the expectation of zoneout
    _rnn_mutant(RNN_ROWS, "weighted - mean - normed * along", "weighted - normed * along", "test_rnn_options and norm and float32"),
    _rnn_mutant(RNN_ROWS, "share * old + (1.0f - share) * fresh", "fresh", "test_rnn_options_evaluation"),
    # attention_forward_kernel
    _attention_mutant(ATTENTION, "__syncthreads();  // the values are there", "//", "test_attention and plain"),
    _attention_mutant(ATTENTION, "sum.at[r][c] *= shrink;", "sum.at[r][c] *= 1.0f;", "test_attention and plain"),
    _attention_mutant(ATTENTION_TILE, "if (length < span.end) span.end = static_cast<int>(length);", "",
                      "test_attention and lengths and float32"),
    _attention_mutant(ATTENTION_TILE, "sum.at[r][c] *= shrink;", "sum.at[r][c] *= 1.0f;", "beyond_float16"),
    _attention_mutant(ATTENTION_TILE, "if constexpr (std::is_same_v<T, fp16>) {", "if constexpr (false) {", "beyond_float16"),
    _attention_mutant(ATTENTION_TILE, "(N == 64 ? 0 : j % 64 / 16) + further", "further", "drops_the_same"),
    # attention_backward_query_kernel, attention_backward_key_kernel, attention_backward_mask_kernel
    _attention_mutant(ATTENTION_BACKWARD, "weight_sums[d] += of_weight;", "weight_sums[d] = of_weight;",
                      "test_attention and additive and float32 and not depths"),
    _attention_mutant(ATTENTION_BACKWARD, "const int steps = query_tiles * x.group;", "const int steps = query_tiles;",
                      "test_attention and plain"),
    _attention_mutant(ATTENTION_BACKWARD, "tensors.of_mask || tensors.from_scores ||", "tensors.of_mask ||", "keeps_the_scores"),
    _attention_mutant(ATTENTION_BACKWARD, "j0 + kTileRows + x.left", "j0 + x.left", "test_attention and window"),
    _attention_mutant(ATTENTION_BACKWARD, "for (int r = 0; r < kTileRows; r++) sum += totals",
                      "for (int r = 1; r < kTileRows; r++) sum += totals", "test_attention and shared"),
    # attention_backward_mask_kernel: 9 KB beside the tiles are more than a launch has
    _attention_mutant(ATTENTION_BACKWARD, "auto* const totals = reinterpret_cast<float (*)[kAcross + 1]>(memory.all_rows());",
                      "DLKERN_SHARED(float, totals, [kTileRows][kAcross + 1]);", "mask_gradient_of_pairwise"),
    # attention_rotary_forward_kernel: what is behind the pairs, the other half's place, rows outside, another row's angles,
    # another batch's, 16 bytes at a time where they do not lie so
    _attention_mutant(ATTENTION_TILE, "0, x.depth, 2 * x.half);", "0, x.depth, x.depth);", "test_attention and rotary and part"),
    _attention_mutant(ATTENTION_TILE, "2 * d : d, second = x.neighbours ? first + VEC : x.half + d;",
                      "2 * d : d, second = first + VEC;", "test_attention and rotary and not neighbours"),
    _attention_mutant(ATTENTION_TILE, "if (row < side.rows) {", "if (row <= side.rows) {", "test_attention and rotary"),
    _attention_mutant(ATTENTION_TILE, "x.turn<VEC, T>(b, row, d, false", "x.turn<VEC, T>(b, r, d, false", "test_attention and rotary"),
    _attention_mutant(ATTENTION_TILE, "b * angles_stride + ", "", "test_attention and rotary and neighbours"),
    _attention_mutant(ATTENTION_TILE, "if (x.packed && side.operand.aligned)", "if (side.operand.aligned)", "rotary_sizes"),
    _attention_mutant(ATTENTION_TILE, "x.packed && side.operand.aligned", "x.packed", "rotary_operands"),
    # attention_rotary_backward_query_kernel, attention_rotary_backward_key_kernel
    _attention_mutant(ATTENTION_TILE, "x.turn<1, T>(b, first + r, d, true", "x.turn<1, T>(b, first + r, d, false",
                      "test_attention and rotary"),
    _attention_mutant(ATTENTION_BACKWARD, "turn_back(of_key, x, b, first, x.keys", "turn_back(of_key, x, b, first, x.queries",
                      "test_attention and rotary"),
    _attention_mutant(ATTENTION_BACKWARD, "turn_back(sum, x, b, first, x.queries, memory.all_rows());", ";",
                      "test_attention and rotary"),
    # heads and masks that are turned first
    _attention_mutant(ATTENTION, "a.depth <= attention::most_columns(a.element) && ", "", "rotary_of_a_deep_head"),
    _attention_mutant(ATTENTION_OPS, "problem.turned(op, of_key, true)", "problem.turned(op, of_key)", "rotary_of_a_deep_head"),
    _attention_mutant(ATTENTION_OPS, "return of_mask || ", "return ", "test_attention and rotary and neighbours"),
    # rotary_kernel
    _mutant(POSITIONS_TURN, "inverse ? -sin[v] : sin[v]", "sin[v]", "test_rotary"),
    _mutant(POSITIONS_TURN, "in[(2 * v + 1) / VEC][(2 * v + 1) % VEC] :", "in[1][v] :", "test_rotary"),
    _mutant(POSITIONS, "const int64_t behind = args.half + d;", "const int64_t behind = d;", "test_rotary"),
    _mutant(POSITIONS, "for (int64_t stride : args.x_stride) wide = wide && stride % vec == 0;", "", "test_rotary_odd"),
    # cross_entropy_forward_kernel, class_weights_kernel, loss_reduce_kernel
    _loss_mutant("total *= expf(most - value);", ""),
    _loss_mutant("end + lane() - head;", "end + lane();"),
    _loss_mutant("total += other.total * expf(other.most - shift());", "total += other.total;"),
    _loss_mutant("most == -kInfinity ? 0.0f : most", "most", "special_values"),
    _loss_mutant("weight[v] * (x[v] - first)", "weight[v] * x[v]"),
    _loss_mutant("share = w * own;", "share = w;", "weights_of_places"),
    _loss_mutant("for (int64_t c = threadIdx.x; c < classes;", "for (int64_t c = threadIdx.x + 1; c < classes;"),
    _loss_mutant("weight += parts[count + i];", "weight += 1;"),
    # cross_entropy_backward_kernel
    _loss_mutant("value[v] = c + v == target ? chosen : value[v];", ""),
    _loss_mutant("if (used) {  // else zeros", "if (true) {  // else zeros", "special_values"),
    _loss_mutant("along + spread * weights", "along + spread"),
    # probabilities_forward_kernel, probabilities_backward_kernel
    _loss_mutant("other += of_class * (softmax.most - x[v]);", "other += of_class * -x[v];", "of_probabilities and float32"),
    _loss_mutant("mass = my.sum(mass, partial[2]);", "", "of_probabilities and float32"),
    _loss_mutant("rounded_product(expf(x[v] - most), factor)", "expf(x[v] - most)", "of_probabilities and float32"),
    _loss_mutant("smoothed.keep * weight[v] * (log_total", "smoothed.keep * (log_total", "of_probabilities and float32"),
]
