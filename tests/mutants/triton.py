"""Mutants of the Triton column: no build, the interpreted tests must fail."""


def _mutant(file: str, old: str, new: str, selection: str) -> dict:
    return dict(file=f"kernels/{file}.py", old=old, new=new, tests=["tests/test_triton.py", "-k", selection], build="")


def _attention(file: str, old: str, new: str, selection: str) -> dict:
    return _mutant(file, old, new, selection) | {"tests": ["tests/test_triton_attention.py", "-k", selection]}


def _options(file: str, old: str, new: str, selection: str) -> dict:
    return _mutant(f"_rnn_{file}", old, new, selection) | {"tests": ["tests/test_triton_rnn.py", "-k", selection]}


def _optim(old: str, new: str, selection: str) -> dict:
    return _mutant("optim", old, new, selection) | {"tests": ["tests/test_optim.py", "-k", f"triton and ({selection})"]}


MUTANTS = [
    # dropout: words swapped, a lost tail mask, a scale
    _mutant("dropout", "first + 1024, word1", "first + 1024, word2", "dropout_drops"),
    _mutant("dropout", "scale.to(ACC), 0.0)\n    tl.store(output_ptr + element, y.to(output_ptr.dtype.element_ty), mask=element < count)",
            "scale.to(ACC), 0.0)\n    tl.store(output_ptr + element, y.to(output_ptr.dtype.element_ty))", "dropout_drops"),
    _mutant("dropout", "x, output, seed, x.numel(), 1.0 / (1.0 - p)", "x, output, seed, x.numel(), 1.0 - p",
            "dropout_drops"),
    # linear: a lost tail mask of the contraction, the bias's gradient of one part, a wrong stride, an activation
    _mutant("linear", "mask=(m < M)[:, None] & in_k[None, :]", "mask=(m < M)[:, None]", "test_float32 and linear"),
    _mutant("linear", "tl.store(sum_ptr + part * M + m,", "tl.store(sum_ptr + m,", "linear_activations"),
    _mutant("linear", "b_ptrs += BLOCK_K * b_stride_k", "b_ptrs += BLOCK_K * b_stride_n", "test_float32 and linear"),
    _mutant("_activation", "grad = grad * (1.0 - output * output)", "grad = grad * (1.0 - output)", "linear_activations"),
    _mutant("_parts", "part * tl.cast(count, tl.int64) + i", "i", "linear_activations"),
    # conv: padding read as image, filter steps of the input gradient, group offset, depthwise, the bias's gradient
    _mutant("conv", "inside = (m < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W)", "inside = (m < M) & (h < H) & (w < W)",
            "deeper_than_a_tile"),
    _mutant("conv", "weight_row = k * weight_stride_k + a * STEP_H * weight_stride_r + b * STEP_W * weight_stride_s\n"
            "            weight = tl.load(\n                weight_column[None, :] + weight_row[:, None], mask=(rsk",
            "weight_row = k * weight_stride_k + a * weight_stride_r + b * STEP_W * weight_stride_s\n"
            "            weight = tl.load(\n                weight_column[None, :] + weight_row[:, None], mask=(rsk",
            "test_float32 and 3x3_stride_2"),
    _mutant("conv", "dy_channel = dy_ptr + (group * K + k) * dy_stride_k", "dy_channel = dy_ptr + k * dy_stride_k",
            "test_float32 and grouped"),
    _mutant("conv", "bias += tl.sum(dy.to(ACC), axis=1)", "bias = tl.sum(dy.to(ACC), axis=1)",
            "test_float32 and even_kernel"),
    _mutant("conv", "bias_ptr + group * C + c, mask=c < C", "bias_ptr + c, mask=c < C", "test_float32 and transpose2d_grouped"),
    _mutant("conv", "dbias_ptr + part * K + k, tl.sum(", "dbias_ptr + k, tl.sum(",
            "test_float32 and transpose2d_grouped"),
    _mutant("conv", "(input.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + reach",
            "(input.shape[2 + i] - 1) * stride[i] - padding[i] + reach", "test_float32 and transpose2d_4x4"),
    _mutant("_depthwise", "acc += tl.load(bias_ptr + c, mask", "acc -= tl.load(bias_ptr + c, mask",
            "test_float32 and transpose2d_depthwise"),
    _mutant("_depthwise", "reach_h % STRIDE_H == 0", "reach_h >= 0", "multiplier"),
    _mutant("_depthwise", "(k // MULTIPLIER * x_stride_c)[None, :]\n    acc", "(k * x_stride_c)[None, :]\n    acc",
            "multiplier"),
    # pooling: the tie, a window short, the divisor at a border, windows of the adaptive backward
    _mutant("pooling", "((x > best) | (x != x) | (place < 0))", "(x >= best)", "max_pooling_is_torchs"),
    _mutant("pooling", "(k - 1) * dil // s + 1 for d, k, s, dil", "(k - 1) * dil // s for d, k, s, dil",
            "test_float32 and max_pool2d"),
    _mutant("pooling", "h_end = tl.minimum(h + KERNEL_H, H + PADDING_H)", "h_end = h + KERNEL_H",
            "average_over_padding"),
    _mutant("pooling", "dy_ptr + n * dy_stride_n + c * dy_stride_c\n    p_start, p_end = h * P // H, ((h + 1) * P + H - 1) // H",
            "dy_ptr + n * dy_stride_n + c * dy_stride_c\n    p_start, p_end = h * P // H, h * P // H + 1",
            "test_float32 and adaptive"),
    # batch norm: a tail of rows, Chan's merge, the unbiased variance, the mean of g
    _mutant("batch_norm", "deviation = tl.where(inside, x - tile_mean[None, :], 0.0)", "deviation = x - tile_mean[None, :]",
            "test_float32 and batch_norm"),
    _mutant("batch_norm", "m2 += tile_m2 + delta * (delta * (count * tile_count / total))", "m2 += tile_m2",
            "test_float32 and batch_norm"),
    _mutant("batch_norm", "momentum * (m2 / (rows - 1.0))", "momentum * (m2 / rows)", "running_statistics"),
    _mutant("batch_norm", "g = g - mean_g[None, :] - ", "g = g - ", "test_float32 and batch_norm"),
    # loss: the running maximum, the ignored targets, the share of the smoothed target
    _mutant("loss", "total * tl.exp(most - shift) + ", "total + ", "several_tiles"),
    _mutant("loss", "(position < POSITIONS) & (target != ignore_index)", "position < POSITIONS", "test_float32 and cross_entropy"),
    _mutant("loss", "soft = grad * (smoothing / C).to(ACC)", "soft = grad * smoothing.to(ACC)", "test_float32 and smoothed"),
    # its probabilities: the mean over positions, the smoothed targets, the targets' gradient
    _mutant("loss", "grad = grad / tl.cast(POSITIONS, ACC)", "grad = grad / tl.cast(C, ACC)", "test_float32 and probabilities"),
    _mutant("loss", "(target.to(ACC) * keep + spread)", "(target.to(ACC) * keep)", "test_float32 and probabilities"),
    _mutant("loss", "-grad[:, None] * keep *", "-grad[:, None] *", "test_float32 and probabilities"),
    # embedding: a tile of columns, further positions of a row, the padding's row
    _mutant("embedding", "mask=inside & exists[:, None], other", "mask=inside, other", "outside"),
    _mutant("embedding", "start += BLOCK_P", "start += BLOCK_P + 1", "embedding"),
    _mutant("embedding", "tl.where(row == padding_idx, 0.0, total)", "total", "embedding"),
    # layer norm: Chan's merge, a block's tail, the mean of g, the sums' rows
    _mutant("layer_norm", "m2 += block_m2 + delta * (delta * (seen * here / total))", "m2 += block_m2", "long_rows"),
    _mutant("layer_norm", "(start + column < COLUMNS)[None, :], here)", "(column < COLUMNS)[None, :], here)", "long_rows"),
    _mutant("layer_norm", "((weighted - first[:, None]) - xhat", "(weighted - xhat", "test_float32 and layer_norm"),
    _mutant("layer_norm", "dbias += tl.sum(g, axis=0)\n        else:", "dbias = tl.sum(g, axis=0)\n        else:",
            "test_float32 and layer_norm"),
    # rnn: lengths, the state before, a bias, r of the candidate, what passes the gates, the initial state, the padding
    _mutant("rnn", "active = (b < B) & (t < length)\n", "active = b < B\n", "mixed_lengths and gru"),
    _mutant("rnn", "            before = T - n\n", "            before = T - 2 - n\n", "mixed_lengths and gru-reverse"),
    _mutant("rnn", "bias2, bias3 = _bias(bias_ih_ptr", "bias3, bias2 = _bias(bias_ih_ptr", "mixed_lengths and gru-forward"),
    _mutant("rnn", "carried = tl.where(here, dc * x1, carried)", "carried = tl.where(here, dc, carried)",
            "mixed_lengths and lstm-forward"),
    _mutant("rnn", "slot = (part + 1) % 3 if MODE == _GRU else part", "slot = part", "mixed_lengths and gru-forward"),
    _mutant("rnn", "begins = (goes_on & (active == 0))", "begins = (goes_on & (t < 0))", "mixed_lengths and gru-reverse"),
    _mutant("rnn", "mask=(i < count) & (row // B < length), other=0.0)", "mask=i < count, other=0.0)",
            "mixed_lengths and rnn_tanh-forward"),
    _mutant("rnn", "tl.store(cell_ptr + place, c, mask=inside & (last < T))", "tl.store(cell_ptr + place, c, mask=inside & (last > T))",
            "mixed_lengths and lstm-forward"),
    # options of rnn: the mask in the product and in its gradient, which share zoneout keeps, a norm's mean in its gradient, the
    # row of what is projected, padding, the peephole of o, a bias among the terms
    _options("options", "h * tl.load(factor_ptr + at, mask=here, other=0.0).to(ACC), mask=here)", "h, mask=here)", "test_options and dropout"),
    _options("options_backward", "        dh *= factor\n", "        pass\n", "test_options and dropout"),
    _options("rows", "tl.cast(share, ACC) * old + tl.cast(1.0 - share, ACC) * new",
             "tl.cast(share, ACC) * new + tl.cast(1.0 - share, ACC) * old", "test_lengths and evaluation"),
    _options("options_backward", "scale * (g0 - mean - a0 * along)", "scale * (g0 - a0 * along)", "test_options and norm"),
    _options("options_backward", "tl.store(projected_ptr + row * H + j,", "tl.store(projected_ptr + b * H + j,", "test_projections"),
    _options("options", "h = tl.where(here, _zoned(h, old, fresh_ptr, out, here, share, ZONEOUT, ACC), 0.0)",
             "h = _zoned(h, old, fresh_ptr, out, here, share, ZONEOUT, ACC)", "test_lengths"),
    _options("options", "tl.load(peephole_ptr + 2 * H + j, mask=here, other=0.0).to(ACC) * made",
             "tl.load(peephole_ptr + 2 * H + j, mask=here, other=0.0).to(ACC) * c", "test_options and peephole"),
    _options("options_backward", "_put(terms_ptr + COUNT * H, d0, d1, h2, d3,", "_put(terms_ptr + COUNT * H, d0, d1, d2, d3,", "test_options and gru and norm"),
    # attention: sums not brought down to a new largest score, dropout's factor, a tile of keys skipped, a shared head's
    # gradient, the cap, delta, the order of dropout's words, the mask's batches
    _attention("attention", "total = total * shrink + ", "total = total + ", "test_parity and plain"),
    _attention("_attention_tile", "tl.where(z < 0.39,", "tl.where(z < 0.0,", "additive_ranges and small"),
    _attention("attention", "inverse = inverse * kept.to(ACC)", "inverse = inverse", "test_parity and dropout"),
    _attention("_attention_tile", "end = tl.minimum(end, tl.minimum(i0 + BLOCK_M, queries) + right)",
               "end = tl.minimum(end, tl.minimum(i0 + BLOCK_M, queries) + right - 1)", "tile_borders"),
    _attention("_attention_backward", "for member in range(0, GROUP):", "for member in range(0, 1):", "test_parity and plain"),
    _attention("attention", "of_mask or from_scores or call", "of_mask or call", "keeps_the_scores"),
    _attention("_attention_tile", "cap = 1.0 - t * t", "cap = 1.0 - t", "test_parity and softcap"),
    _attention("_attention_backward", "for block in range(0, V_BLOCKS):", "for block in range(1, V_BLOCKS):", "delta"),
    _attention("_attention_tile", "(0, 1, 4, 3, 2)", "(0, 1, 3, 4, 2)", "drops_the_same"),
    _attention("_attention_tile", "d = block * BLOCK + tl.arange(0, BLOCK)", "d = (BLOCKS - 1) * BLOCK + tl.arange(0, BLOCK)",
               "depths_beyond"),
    _attention("_attention_backward", "b_end = tl.where(MASK_B == 1, B,", "b_end = tl.where(MASK_B == 1, 1,",
               "test_parity and shared"),
    # rotary positions: the gradient turned the same way, the partner's sign, the partner itself, angles of another row
    _mutant("positions", "            sin = -sin\n", "            sin = sin * 1.0\n", "rotary_layouts"),
    _mutant("positions", "tl.join(a * cos - b * sin", "tl.join(a * cos + b * sin", "rotary_layouts"),
    _attention("_attention_tile", "tl.where(first[None, :], -sin, sin)", "tl.where(first[None, :], sin, -sin)", "test_parity and rotary"),
    _attention("_attention_tile", "tl.where(first, column + HALF, column - HALF)", "column + HALF", "test_parity and rotary"),
    _attention("attention", "interleaved, True, query.dtype)", "interleaved, False, query.dtype)", "test_parity and rotary"),
    # sequences one after another: a window's alignment, a sequence's seed, its statistics, where its tiles begin
    _attention("attention", "        left -= S - L\n", "", "varlen_windows"),
    _attention("attention", "            seed += sequence\n", "            seed += 0\n", "varlen_options"),
    _attention("attention", "        statistics_ptr += first_q * H\n", "        statistics_ptr += first_q\n", "varlen_windows"),
    _attention("attention_varlen", "(torch.arange(len(before)) - before) * block", "torch.arange(len(before)) * block",
               "varlen_parity and several"),
    # optimisers: the wrong tensor, a lost tail, a buffer of anything, a rate, a root, the device's count, copies left, order
    _optim("middle * ROW + _FIRST) <= block", "middle * ROW + _FIRST) < block", "parity and maximize"),
    _optim("x = tl.load(ptr + i, mask=i < left, other=0.0)", "x = tl.load(ptr + i, mask=i <= left, other=0.0)", "lars_follows"),
    _optim("buffer = tl.where(fresh != 0, grad, buffer)", "buffer = tl.where(fresh == 2, grad, buffer)", "parity and nesterov"),
    _optim("scaled = lr * (trust * param_norm", "scaled = lr * (param_norm", "lars_follows"),
    _optim("norm = tl.sqrt(norm)", "norm = norm * 0.5", "clipping_by_norm"),
    _optim("lr / (1.0 - tl.exp(count * log_beta1))", "lr / (1.0 - tl.exp(log_beta1))", "counted_on_the_device"),
    _optim("for original, copy in self.copies:", "for original, copy in self.copies[1:]:", "any_strides"),
    _optim("        if begin < end:", "        if begin < 0:", "shared_memory"),
]
