"""Mutants of the CPU column."""


def _dropout(old: str, new: str, tests: str = "same_elements") -> dict:
    return dict(file="csrc/cpu/dropout.cpp", old=old, new=new, tests=["tests/test_dropout.py", "-k", tests], build="native")


def _loss(old: str, new: str, tests: str) -> dict:
    return dict(file="csrc/cpu/loss.cpp", old=old, new=new, tests=["tests/test_loss.py", "-k", tests], build="native")


MUTANTS = [
    # dropout: words swapped, a vector's counters counted wrongly, the scale
    _dropout("left < kWords ? left : kWords, word[w], threshold", "left < kWords ? left : kWords, word[3 - w], threshold",
             "same_elements or share"),
    {**_dropout("odd{low + 1, high,", "odd{low + 2, high,"), "file": "csrc/cpu/philox_vector.h"},
    _dropout("1.0 / (1.0 - args.p)", "1.0 - args.p"),
    # loss, forward: a row's tail, the change of the largest logit, the weighted mean
    _loss("first_lanes<T>(exp_nonpositive(load_some(x + c, count - c) - largest), count - c)",
          "exp_nonpositive(load_some(x + c, count - c) - largest)", "test_parity"),
    _loss("row.sum *= row.sum == 0 ? 1.0 :", "row.sum *= row.sum >= 0 ? 1.0 :", "test_parity"),
    _loss("sums.weight += w * own;", "sums.weight += own;", "test_parity"),
    # loss, backward: the target's class, ignored places side by side, the mean
    _loss("out[target] = static_cast<T>(at_target(", "out[0] = static_cast<T>(at_target(", "test_parity"),
    _loss("value = ignored ? Vec<T>{} : value;", "value = ignored ? value : value;", "ignored_places"),
    _loss("if (args.reduction == 1) g /=", "if (args.reduction == 2) g /=", "test_parity"),
]


def _attention(old: str, new: str, tests: str, file: str = "attention.cpp") -> dict:
    return dict(file=f"csrc/cpu/{file}", old=old, new=new, tests=["tests/test_attention.py", "-k", tests], build="native")


_TILE, _STRIPS, _ATTENTION_BACKWARD = "attention_tile.h", "attention_strips.h", "attention_backward.cpp"
MUTANTS += [
    # What was summed is not brought down to a new largest score, a tile too many skipped, a tail's keys left out.
    _attention("total *= shrink;", "", "tile_borders"),
    _attention("seen.first >= j0 + tile.n) continue;", "seen.first >= j0) continue;", "parity"),
    _attention("smaller(tile.n, seen.last - j0);", "smaller(tile.n, seen.last - j0 - 1);", "tile_borders"),
    _attention("inverse = sum == 0 ? A(0) : A(1) / sum;", "inverse = A(1) / sum;", "sees_nothing"),
    # The window's far side, the groups of dropout, tanh beyond the exponentials' range, heads that share keys.
    _attention("smaller(s.keys, place + s.right + 1)", "smaller(s.keys, place + s.right)", "parity", _TILE),
    _attention("(row * groups + (j0 + j) / 64) * 16 + c)", "(row * groups + j / 64) * 16 + c)", "dropout", _TILE),
    _attention("key_bound <= kSafe<A>)", "key_bound <= 1000 * kSafe<A>)", "additive_far", _TILE),
    _attention("? 1 : -1;", "? -1 : -1;", "additive_ranges", _TILE),
    _attention("u = s * rest", "u = A(0.25) * (A(1) - t * t)", "additive_ranges", _ATTENTION_BACKWARD),
    # Backward: delta, a split's partial sums, the mask's gradient behind the cap, lengths of the rows of cosine.
    _attention("(load(d + j) - sum);", "load(d + j);", "parity", _ATTENTION_BACKWARD),
    _attention("args.grad_mask || s.from_scores ||", "args.grad_mask ||", "keeps_the_scores", _ATTENTION_BACKWARD),
    _attention("for (int64_t split = 1; split < splits;", "for (int64_t split = 2; split < splits;", "parity", _ATTENTION_BACKWARD),
    _attention("s.softcap != 0 && through_cap", "s.softcap != 0", "parity", _ATTENTION_BACKWARD),
    _attention("(load(grad + d) - load(row + d) * along) * inverse", "load(grad + d) * inverse", "parity", _TILE),
    _attention("slice + row % (group * s.queries) * depth;", "slice + row % s.queries * depth;", "parity", _ATTENTION_BACKWARD),
    # By AMX's tiles (killed where the CPU has them): a row's sums not brought down, numbers that tiles flush or that overflow,
    # probabilities of an earlier block left beside a shorter one, gradients of scores without delta, sums turned back.
    _attention("if (shrinks[r] != 1) {", "if (false) {", "parity"),
    _attention("return a == 0 || b == 0 || (", "return true || (", "by_tiles", _STRIPS),
    _attention("return a < 0x1p56f;", "return true;", "by_tiles", _STRIPS),
    _attention("std::memset(weights + at, 0, kStepBytes<T>);", "", "parity", _ATTENTION_BACKWARD),
    _attention("- delta[half]);", ");", "parity", _ATTENTION_BACKWARD),
    _attention("store(row, load(row) + square[r]);", "store(row, square[r]);", "by_tiles", _STRIPS),
]


def _varlen(old: str, new: str) -> dict:
    return dict(file="csrc/ops/attention_varlen.cpp", old=old, new=new, tests=["tests/test_varlen.py"], build="native")


MUTANTS += [
    # Windows aligned at the first query, sequences without keys left as they are, statistics of one sequence over another's.
    _varlen("shift = args.shape.keys - args.shape.queries;", "shift = 0;"),
    _varlen("if (!s.all) torch::stable::zero_(output), torch::stable::zero_(statistics);", ""),
    _varlen("args.largest = statistics + s.heads * first;", "args.largest = statistics + first;"),
]


def _layer_norm(old: str, new: str) -> dict:
    return dict(file="csrc/cpu/layer_norm.cpp", old=old, new=new, tests=["tests/test_layer_norm.py", "-k", "parity"],
                build="native")


MUTANTS += [
    # A row's tail counted in the variance, the mean of g w left out, the last chunk of rows forgotten.
    _layer_norm("first_lanes<A>(d * d, count)", "d * d"),
    _layer_norm("((gradient * w[v] - first) -", "(gradient * w[v] -"),
    _layer_norm("some.rows = smaller(most, last - row);", "some.rows = larger(1, smaller(most, last - row) - 1);"),
    _layer_norm("for (int64_t c = 0; c < chunks; ++c) {\n        of_weight", "for (int64_t c = 0; c + 1 < chunks; ++c) {\n        of_weight"),
]


def _rnn(old: str, new: str, tests: str, file: str = "rnn_options_backward.cpp") -> dict:
    return dict(file=f"csrc/cpu/{file}", old=old, new=new, tests=["tests/test_rnn.py", "-k", tests], build="native")


_RNN_STEPS, _RNN_OPTIONS, _RNN_BACKWARD = "rnn_options_steps.h", "rnn_options.cpp", "rnn_backward.cpp"
MUTANTS += [
    # rnn: what passes GRU's gates, the cell's gradient along f, states of padded sequences
    _rnn("if (mode == kRnnGru && i < going_on) dh += load_some(direct + b * hidden + j, some);", "", "modules_keep and gru", _RNN_BACKWARD),
    _rnn("out(to + hidden, dc * c_before * f * (A(1) - f));", "out(to + hidden, dc * f * (A(1) - f));", "initial_states", _RNN_BACKWARD),
    _rnn("copy(args.output + layer.last_row(b) * state,", "copy(args.output + layer.first_row(b) * state,", "modules_keep", "rnn.cpp"),
    # rnn with options: which unit stays, a row's tail, the part of a normalisation's gradient along the row
    _rnn("!= Vec<A>{} ? fresh : old;", "== Vec<A>{} ? fresh : old;", "options_keep and zoneout", _RNN_STEPS),
    _rnn("first_lanes<A>(load_some(from + j, some) - static_cast<A>(mean), some);", "load_some(from + j, some) - static_cast<A>(mean);",
         "options_keep and norm", _RNN_STEPS),
    _rnn("(g - mean - load_some(normed + j, some) * slope)", "(g - mean)", "options_keep and norm", _RNN_STEPS),
    # The mask forgotten, in the next step and in the gradient; the peephole of f in what goes back, the wrong cell in o's.
    _rnn("h * load_some(o.mask + at.b * s.state + j, count), count);", "h, count);", "options_keep and recurrent", _RNN_OPTIONS),
    _rnn("if (o.mask) dh *= load_some(o.mask + of_b, count);", "", "options_keep and recurrent"),
    _rnn("in(o.peephole) * di + in(o.peephole + hidden) * df;", "in(o.peephole) * di;", "options_keep and peephole"),
    _rnn("if (gate == 2)  // o's sees", "if (gate == 3)  // o's sees", "options_keep and peephole"),
    # A sequence that ends in the middle of a batch.
    _rnn("while (going_on < end && layer.after(t, going_on) >= 0)", "while (going_on < end)", "options_with_lengths"),
    # A sequence that begins in an odd step; a normalised row's gates one block on; the state's factors in the weight's gradient.
    _rnn("copy(args.h0, states + s.batch * state, s.batch * state);", "", "options_with_lengths", _RNN_OPTIONS),
    _rnn("store_some(to + gate * hidden, load(from", "store_some(to, load(from", "options_keep and norm", _RNN_OPTIONS),
    _rnn("gather_previous(args, layer, h0, o.mask, previous);", "gather_previous<T, A>(args, layer, h0, nullptr, previous);",
         "options_keep and recurrent"),
]


def _positions(old: str, new: str) -> dict:
    return dict(file="csrc/cpu/positions.cpp", old=old, new=new, tests=["tests/test_positions.py", "-k", "rotary"], build="native")


MUTANTS += [
    # The gradient turned the same way, the wrong partner, what is beyond the pairs left out.
    _positions("args.inverse ? A(-1) : A(1)", "args.inverse ? A(1) : A(1)"),
    _positions("q = load_some(x + half + d, count), c", "q = load_some(x + d, count), c") | {"file": "csrc/cpu/positions_turn.h"},
    _positions("for (int64_t d = 2 * half; d < args.depth; ++d)", "for (int64_t d = 2 * half + 1; d < args.depth; ++d)"),
    # In attention: a position of the tile, gradients not turned back.
    _positions("turn(args.rotary, b, first + r, A(1)", "turn(args.rotary, b, r, A(1)") | {"file": "csrc/cpu/attention_tile.h"},
    _positions("b, j0 + j, A(-1), grad_key", "b, j0 + j, A(1), grad_key") | {"file": "csrc/cpu/attention_backward.cpp"},
    _positions("b, i, A(-1), sum", "b, i, A(1), sum") | {"file": "csrc/cpu/attention_backward.cpp"},
]

_MAX, _MAX_BACKWARD = "csrc/cpu/pooling_max.cpp", "csrc/cpu/pooling_max_backward.cpp"
_AVG, _ADAPTIVE = "csrc/cpu/pooling_avg.cpp", "csrc/cpu/pooling_adaptive.cpp"
_WINDOW = "csrc/cpu/pooling_window.h"


def _pool(file, old, new, selection):
    return dict(file=file, old=old, new=new, tests=["tests/test_pooling.py", "-k", selection], build="native")


MUTANTS += [
    # NaN no longer wins; ties take the last; padding's tag is not that of the first element inside.
    _pool(_WINDOW, "const auto won = (value > best) | (value != value);", "const auto won = (value >= best) | (value != value);", "special"),
    _pool(_WINDOW, "(__m512)value, (__m512)best, _CMP_NGT_UQ)", "(__m512)value, (__m512)best, _CMP_NGE_UQ)", "max_is_torchs"),
    _pool(_WINDOW, "ordered, (__m512)value, (__m512)best", "__mmask16(-1), (__m512)value, (__m512)best", "special"),
    _pool(_MAX, "Taps(x0, s.w, s.kernel_w, s.dilation_w).begin));", "0));", "special"),
    _pool(_MAX, "challenge<T, tagged>(second, first_tag + 1, best, tag);", "challenge<T, tagged>(second, first_tag, best, tag);", "max_is_torchs"),
    _pool(_MAX, "if (value > best || value != value) best = value,", "if (value > best) best = value,", "windows_far"),
    # Windows in the wrong order of rows, a dropped tap, a foreign row's tag, lanes shifted, a tail left out.
    _pool(_MAX_BACKWARD, "row_tag[count++] = r * s.kernel_w;\n          });\n          if (y + 1 == s.h)",
          "row_tag[count++] = r * s.kernel_h;\n          });\n          if (y + 1 == s.h)", "max_is_torchs"),
    _pool(_MAX_BACKWARD, "at[j] = row_at[k] + taps.shift[t];", "at[j] = row_at[k] + (taps.shift[t] > 0 ? 1 : taps.shift[t]);", "max_is_torchs"),
    _pool(_WINDOW, "if (window >= 0 && window < windows)", "if (window >= 1 && window < windows)", "max_is_torchs"),
    _pool(_MAX_BACKWARD, "add_where<T>(Vec<T>{}, tag, target + 1, gradient)", "add_where<T>(Vec<T>{}, tag, target, gradient)", "max_is_torchs"),
    _pool(_MAX_BACKWARD, "if (y >= 0 && y < s.h && x >= 0 && x < s.w)", "if (y >= 0 && y < s.h - 1 && x >= 0 && x < s.w)", "max_is_torchs"),
    # Padding counted where it should not be, a window row too few, the wrong column's divisor, reciprocals of no power of two.
    _pool(_AVG, "return args.count_include_pad ? stop - start", "return !args.count_include_pad ? stop - start", "avg_is_torchs"),
    _pool(_AVG, "stop = smaller(start + kernel, extent + pad);", "stop = start + kernel;", "avg_is_torchs or by_hand"),
    _pool(_AVG, "return i > 0 && (i & (i - 1)) == 0;", "return i > 0;", "avg_parity"),
    _pool(_AVG, "sum = (sum + even) + odd;", "sum = sum + even + even;", "avg_is_torchs"),
    _pool(_AVG, "rows = smaller(y0 + s.kernel_h, s.h) - top;", "rows = smaller(y0 + s.kernel_h, s.h - 1) - top;", "avg_is_torchs"),
    _pool(_AVG, "sum += load(shares + row_at[k] + m + taps.shift[j]);", "sum = load(shares + row_at[k] + m + taps.shift[j]);", "avg_is_torchs"),
    _pool(_WINDOW, "window < windows) f(tap[j], window);", "window < windows - 1) f(tap[j], window);", "avg_is_torchs"),
    _pool(_AVG, "store_pairs(args.output + (i * s.kernel_h + r) * s.w + 2 * q, share, share, limit);",
          "store_pairs(args.output + (i * s.kernel_h + r) * s.w + 2 * q, share, share, limit - 1);", "avg_is_torchs"),
    _pool(_AVG, "const int64_t first_p = larger(0, floor_div(y + s.pad_h - s.kernel_h, s.stride_h) + 1);",
          "const int64_t first_p = larger(1, floor_div(y + s.pad_h - s.kernel_h, s.stride_h) + 1);", "far_beyond"),
    # Window ends rounded down, a tail of a run left in, compensation dropped; shares of the wrong extent, copies where windows differ.
    _pool(_WINDOW, "return ceil_div((i + 1) * size, out_size); }", "return larger(i * size / out_size + 1, (i + 1) * size / out_size); }", "adaptive_is_torchs"),
    _pool(_ADAPTIVE, "first_lanes<float>(load_before(p + i, limit), count - i, vfloat{});", "load_before(p + i, limit);", "adaptive_parity"),
    _pool("csrc/cpu/simd.h", "lost += (value - (next - added)) + (x - added);", "", "carries"),
    _pool(_ADAPTIVE, "(load(q + 2 * apart) + load(q + 3 * apart))", "(load(q + 2 * apart) + load(q + 2 * apart))", "adaptive_parity"),
    _pool(_ADAPTIVE, "if (i > begin && y > 0 && p0 == before_p0 && p1 == before_p1) {", "if (i > begin && y > 0 && p0 == before_p0) {", "adaptive_is_torchs"),
    _pool(_ADAPTIVE, "return gradient / (rows * columns);", "return gradient / (rows + columns);", "adaptive_is_torchs"),
    _pool(_ADAPTIVE, "for (int64_t k = 0; k < plane; k += kLanes<T>) store_before", "for (int64_t k = 0; k + 1 < plane; k += kLanes<T>) store_before", "adaptive_is_torchs"),
    dict(file="csrc/cpu/conv_depthwise_last.cpp",
         old='if (EDGE && (j < begin || j >= end)) continue;',
         new='if (EDGE && j < begin) continue;',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_last.cpp",
         old='const int64_t c = smaller(next, tile.channels - lanes);',
         new='const int64_t c = smaller(next, tile.channels - lanes - (tile.channels > lanes));',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_last.cpp",  # bfloat16, even and odd channels apart: the last ones, their weights
         old='const int64_t c = smaller(next, tile.channels - 2 * lanes);',
         new='const int64_t c = smaller(next, tile.channels - 2 * lanes - (tile.channels > 2 * lanes));',
         tests=["tests/test_conv.py", "-k", "test_parity and depthwise"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_last.cpp",
         old='return take_odd(load(p), load(p + lanes));', new='return take_even(load(p), load(p + lanes));',
         tests=["tests/test_conv.py", "-k", "test_parity and depthwise"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_last.cpp",
         old='const int64_t q = smaller(next, z.columns - pixels);  // the last tile overlaps the one before',
         new='const int64_t q = smaller(next, z.columns - pixels - (z.columns > pixels));',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_last.cpp",
         old='      pass.start_h = a, pass.start_w = b;',
         new='      pass.start_h = a, pass.start_w = 0;',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_last.cpp",
         old='tile.weight_row = z.taps_h.kernel_step * z.kernel_w * z.padded;',
         new='tile.weight_row = z.kernel_w * z.padded;',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_last.cpp",
         old='if (pass.taps_w.count == 0) pass.taps_h.count = 0;  // zeros are written',
         new='if (pass.taps_w.count == 0) continue;',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_last.cpp",
         old='for (int64_t j = lanes - held; j < lanes; ++j)',
         new='for (int64_t j = 0; j < lanes; ++j)',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_last.cpp",
         old='kInner || j < left ? load(y + j * z.channels) : Vec<A>{};',
         new='kInner || j <= left ? load(y + j * z.channels) : Vec<A>{};',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_last.cpp",
         old='for (int64_t i = 0; i < size; ++i) totals[i] += totals[task * size + i];',
         new='for (int64_t i = 1; i < size; ++i) totals[i] += totals[task * size + i];',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_planar.cpp",
         old='const int64_t row = smaller(next, count - tile_rows);',
         new='const int64_t row = smaller(next, count - tile_rows - (count > tile_rows));',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_planar.cpp",
         old='copied = band_rows == z.rows ? plane : -1;',
         new='copied = plane;',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_planar.cpp",
         old='if (count > lanes) store_lanes(output + lanes,',
         new='if (count > lanes + 1) store_lanes(output + lanes,',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_planar.cpp",
         old='const A* source = band.rows + (taps_h.first - first_h) * band.row();',
         new='const A* source = band.rows - first_h * band.row();',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_planar.cpp",
         old='  for (; i < z.count; ++i)\n    for (int64_t q = 0; q < columns; q += lanes)\n      add.',
         new='  for (; i + 1 < z.count; ++i)\n    for (int64_t q = 0; q < columns; q += lanes)\n      add.',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_planar.cpp",
         old='other[i] = i ^ half;',
         new='other[i] = i ^ (half > 2 ? half : 2);',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_depthwise_planar.cpp",
         old='(n * z.c + k / times) * z.h * z.w, z.h, z.w, p * z.stride_h',
         new='(n * z.c + k % z.c) * z.h * z.w, z.h, z.w, p * z.stride_h',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (depthwise)"], build="native"),
    dict(file="csrc/cpu/conv_grouped.cpp",
         old='start[l] = static_cast<int>(l / group * group);',
         new='start[l] = static_cast<int>(l / group * group % 8);',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (groups)"], build="native"),
    dict(file="csrc/cpu/conv_grouped.cpp",
         old='        const int64_t q = smaller(next, z.columns - pixels);  // the last tile overlaps the one before',
         new='        const int64_t q = smaller(next, z.columns - pixels - (z.columns > pixels));',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (groups)"], build="native"),
    dict(file="csrc/cpu/conv_grouped.cpp",
         old='if (row < z.rows) run_band(z, place / bands, block, row, smaller(row + even, z.rows));',
         new='if (row + 1 < z.rows) run_band(z, place / bands, block, row, smaller(row + even, z.rows));',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (groups or grouped)"], build="native"),
    dict(file="csrc/cpu/conv_grouped.cpp",
         old='weight[(c + l / group * group + o) * elements',
         new='weight[(c + l / group * group) * elements',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (groups)"], build="native"),
    dict(file="csrc/cpu/conv_grouped.cpp",
         old='to[k * plane + i * z.step_h * z.out_w + q * z.step_w]',
         new='to[k * plane + i * z.out_w + q * z.step_w]',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (groups)"], build="native"),
    dict(file="csrc/cpu/conv_grouped.cpp",
         old='    for (; q < columns; ++q, y += lanes,',
         new='    for (; q + 1 < columns; ++q, y += lanes,',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (groups)"], build="native"),
    dict(file="csrc/cpu/conv_grouped.cpp",
         old='rows.x = band.x + r * z.dilation_h * (band.x_row / z.stride_h);',
         new='rows.x = band.x + r * (band.x_row / z.stride_h);',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (groups)"], build="native"),
    dict(file="csrc/cpu/conv_grouped.cpp",
         old='          for (int64_t i = 0; i < elements * lanes; ++i) total[i] += sums[i];',
         new='          for (int64_t i = 0; i < elements * lanes; ++i) total[i] = sums[i];',
         tests=["tests/test_conv.py", "-k", "exact_on_integers and (groups)"], build="native"),
]

_NORM, _NORM_SUMS, _NORM_APPLY = "csrc/cpu/batch_norm.cpp", "csrc/cpu/batch_norm_sums.h", "csrc/cpu/batch_norm_apply.h"


def _norm(file, old, new, selection):
    return dict(file=file, old=old, new=new, tests=["tests/test_batch_norm.py", "-k", selection], build="native")


MUTANTS += [
    # Forward: the centre not put back, a tail of a row left in, float sums where they do not do, a half of a vector twice.
    _norm(_NORM, "args.mean[c] = t.centre + mean;", "args.mean[c] = mean;", "mean_much_larger"),
    _norm(_NORM_SUMS, "        if (lanes < step) Rule::leave_out(v, c[u], lanes);\n", "", "sizes_around"),
    _norm(_NORM, "      if (!good) {", "      if (false) {", "huge"),
    _norm(_NORM_SUMS, "    wide[1] += widen(high_half(p[0]));", "    wide[1] += widen(low_half(p[0]));", "against_numpy"),
    # Backward: the mean left in, the mean of the gradient not taken out, a scale squared.
    _norm(_NORM_SUMS, "sums.add(u, g, v[1] - mean);", "sums.add(u, g, v[1]);", "mean_much_larger"),
    _norm(_NORM_APPLY, "g = g - k[2] - (load", "g = g - (load", "against_numpy"),
    _norm(_NORM_APPLY, "g = g * k[1] + finite_part(g * k[4]);", "g = g * k[1] * k[1];", "frozen_backward"),
    # Fused: a residual's first element, its gradient, and the sums' gradient before the activation.
    _norm(_NORM_APPLY, "if (residual) y +=", "if (residual && at > 0) y +=", "fused_is"),
    _norm(_NORM_APPLY, "if (grad_residual) store_at(grad_residual + at, g);",
          "if (grad_residual) store_at(grad_residual + at, load_at(grad_output + at));", "fused_is"),
    _norm(_NORM_SUMS, "activation_backward(v[0], v[kStreams - 1], activation)", "v[0]", "fused_is"),
]

_CONV = "csrc/cpu/conv.cpp"


def _transposed(old: str, new: str, file: str = _CONV, tests: tuple[str, ...] = ("tests/test_conv_transpose.py", "-k", "exact")) -> dict:
    return dict(file=file, old=old, new=new, tests=list(tests), build="native")


MUTANTS += [
    # rows that follow each other in memory, where pixels do not
    _transposed("if (columns == z.out_w && z.step_h == 1 && z.step_w == 1) together", "if (columns == z.out_w && z.step_h == 1) together",
                file="csrc/cpu/conv_finish.h", tests=("tests/test_conv.py", "-k", "exact and wide")),
    # transposed convolution: no bias in gaps, none behind the depthwise kernels, none in the dense kernel
    _transposed("if (gaps && args.bias) {", "if (gaps && !args.bias) {"),
    _transposed("if (args.bias) apply_bias(args, false);", "if (args.bias && args.grad_input_channels_last) apply_bias(args, false);"),
    _transposed("      c.bias = args.bias;\n      c.groups = z.groups;\n      is_planar", "      c.groups = z.groups;\n      is_planar"),
    # the bias's gradient: the last pixels, the images
    _transposed("load_partial<T>(from + p, static_cast<int>(pixels - p)));\n      }", "load(from + p));\n      }", "csrc/cpu/conv_weight.cpp"),
    _transposed("for (int64_t n = 0; n < args.n; ++n) {\n        const T* from = args.grad_output + (n * args.k + k)",
                "for (int64_t n = 0; n < args.n; ++n) {\n        const T* from = args.grad_output + k", "csrc/cpu/conv_weight.cpp"),
    # freeze: a bias of the wrong group, a filter's last tap, groups' weights mixed up
    _transposed("z.bias[g * plan.outputs + j]) : acc_t<T>(0);\n}", "z.bias[j]) : acc_t<T>(0);\n}"),
    _transposed("for (int64_t s = 0; s < z.s; ++s) kernel_w[s] = s;\n  c.kernel_h", "for (int64_t s = 0; s < z.s; ++s) kernel_w[s] = 0;\n    c.kernel_h",
                tests=("tests/test_freeze.py", "-k", "same_bits")),
    _transposed("c.packed = args.packed;", "c.packed = args.packed ? args.packed + 1 : nullptr;", tests=("tests/test_freeze.py", "-k", "same_bits")),
]

_CONV, _KERNEL, _BORDERS, _PLANAR, _WEIGHT = (
    f"csrc/cpu/conv{name}" for name in (".cpp", "_kernel.h", "_borders.h", "_planar.h", "_weight.cpp")
)
_GEMM = "csrc/cpu/gemm.h"
_DENSE = "exact_on_integers and float32 and (3x3 or stride or dilated or padd or kernel or one)"


def _conv(file, old, new, selection=_DENSE):
    return dict(file=file, old=old, new=new, tests=["tests/test_conv.py", "-k", selection], build="native")


def _matmul(file, old, new, selection):
    return dict(file=file, old=old, new=new, tests=["tests/test_linear.py", "-k", selection], build="native")


MUTANTS += [
    # Dense: the bias in no block, pixels of a class short by one, a task's first image, the copy's row, a column's step.
    _conv(_CONV, "block + 1 == plan.block_count ? bias : nullptr", "block + 1 < plan.block_count ? bias : nullptr"),
    _conv(_CONV, "correlate_tile_for<A>(smaller(kTilePixels, first_pixel[c + 1] - p)",
          "correlate_tile_for<A>(smaller(kTilePixels - 1, first_pixel[c + 1] - p)"),
    _conv(_CONV, "if (pieces == 0 && block > 0 && !add_bias) continue;", "if (pieces == 0) continue;"),
    _conv(_CONV, "copy + k * plan.local_h * plan.row + q * plan.local_w * plan.pixel",
          "copy + k * plan.row + q * plan.local_w * plan.pixel"),
    _conv(_CONV, "const int64_t reach = residue + padding - r * dilation;", "const int64_t reach = residue + padding - r;"),
    # The micro-kernel: sums of the blocks before lost, the weights' step, the last window's row for all.
    _conv(_KERNEL, "V value = add ? load(out + j * lanes) + sum[i][j] : sum[i][j];", "V value = sum[i][j];"),
    _conv(_KERNEL, "const A* w = weights + pieces[t].step * (NV * lanes);", "const A* w = weights + t * (NV * lanes);"),
    _conv(_KERNEL, "a[i] = rows[i] + pieces[t].offset;", "a[i] = rows[0] + pieces[t].offset;"),
    # Borders: classes off by one at either side, a piece cut at the block's end, the row's taps of a merged run.
    _conv(_BORDERS, "tap[range.begin] < 0) ++range.begin;", "tap[range.begin] < -1) ++range.begin;"),
    _conv(_BORDERS, "tap[range.end - 1] >= size) --range.end;", "tap[range.end - 1] > size) --range.end;"),
    _conv(_BORDERS, "offset += part;", "offset += 1;", "exact_on_integers and float32 and (many or odd or 3x3)"),
    # Planar: the right padding, the last vector's shift, channels summed anew in each block, the bias.
    _conv(_PLANAR, "zero(left + width, plan.pitch - left - width);", "", "exact_on_integers and float32 and (stem or one or 5x5)"),
    _conv(_PLANAR, "sums_row, c > 0);", "sums_row, false);", "exact_on_integers and float32 and (3x3 or stem or one or 5x5)"),
    _conv(_PLANAR, "source[count] = copy + i * z.stride_h * plan.pitch", "source[count] = copy + i * plan.pitch",
          "exact_on_integers and float32"),
    _conv(_PLANAR, "static_cast<T>(from[q] + bias)", "static_cast<T>(from[q])", "exact_on_integers and float32 and (one or 5x5)"),
    # Weight gradient: a band's sums lost, a tail of channels, the last taps; turned: the same, and the dilated row.
    _conv(_WEIGHT, "    i > band_begin || p > 0);", "    p > 0);", "exact_on_integers and float32"),
    _conv(_WEIGHT, "const int64_t offset = r * z.dilation_h * plan.row + s", "const int64_t offset = r * plan.row + s"),
    _conv(_WEIGHT, "store(row + j, load(row + j) + load(other + j));", "store(row + j, load(other + j));", "exact_on_integers and float32"),
    _conv(_WEIGHT, "gradient_row, i > band_begin || p > 0);", "gradient_row, p > 0);", "exact_on_integers and float32"),
    _conv(_WEIGHT, "copy + r * z.dilation_h * plan.row + e, packed", "copy + r * plan.row, packed",
          "exact_on_integers and float32"),
    _conv(_WEIGHT, "outer_tile_for<true, A>(smaller(kOuterRows, run - e)", "outer_tile_for<true, A>(smaller(kOuterRows - 1, run - e)",
          "exact_on_integers and float32"),
    # Products: blocks of k that do not add up (and an epilogue too soon), the last columns, packed rows and columns, a dot product's tail.
    _matmul(_GEMM, "if (add) value += count == lanes ? load(out) : load_partial<C>(out, count);", "", "test_parity"),
    _matmul(_GEMM, "for (int64_t c = columns; c < width; ++c) packed[p * width + c] = P(0);",
            "for (int64_t c = columns - 1; c < width; ++c) packed[p * width + c] = P(0);", "test_layouts"),
    _matmul(_GEMM, "const bool first = pc == 0, last = pc + kc_step >= g.k;", "const bool first = pc == 0, last = pc == 0;",
            "test_activation or test_parity"),
    _matmul(_GEMM, "load_partial<T>(b + j * b_column + p, rest);", "load_partial<T>(b + j * b_column, rest);", "test_parity"),
    # linear: the bias's gradient short of a row, its tail of columns, an activation's gradient.
    _matmul("csrc/cpu/column_sums.h", "for (int64_t i = 0; i < rows; ++i, from += row) {", "for (int64_t i = 1; i < rows; ++i, from += row) {", "test_parity"),
    _matmul(_GEMM, "load(bias + j) : load_partial<C>(bias + j, count);", "load(bias) : load_partial<C>(bias + j, count);", "test_parity"),
    _matmul(_GEMM, "if (bias) value += load(bias + j * lanes);", "if (bias) value += load(bias);", "test_parity"),
    _matmul(_GEMM, "const int64_t covered = k + 1 - ceil_div(whole, kMR);", "const int64_t covered = k;", "test_parity"),
    _matmul("csrc/cpu/activation.h", "return grad * (1 - y * y);", "return grad * (1 - y);", "test_activation"),
    _matmul("csrc/cpu/simd.h", "const V part = 2 / sum, rest = 1 - part;", "const V part = 2 / one, rest = 1 - part;", "test_activation"),
]

# The plain weight gradient of a handful of products: the group's channels, the right border, the layout.
_PLAIN = dict(file="csrc/cpu/conv_weight.cpp", tests=["tests/test_conv.py", "-k", "handful"], build="native")
MUTANTS += [
    dict(_PLAIN, old="channel = k / outputs * channels + c;", new="channel = c;"),
    dict(_PLAIN, old="if (y < 0 || y >= z.h || x < 0 || x >= z.w) continue;",
         new="if (y < 0 || y >= z.h || x < 0 || x >= z.w - 1) continue;"),
    dict(_PLAIN, old="at(args.input_channels_last, z.c, z.h, z.w, n, channel, y, x)",
         new="at(args.grad_output_channels_last, z.c, z.h, z.w, n, channel, y, x)"),
]


def _sixteen_bits(file: str, old: str, new: str, tests: list[str]) -> dict:
    return dict(file=f"csrc/ops/{file}", old=old, new=new, tests=tests, build="native")


MUTANTS += [
    # float16's parameters taken for bfloat16's, those in float32 refused, its images refused.
    _sixteen_bits("common.h", "dtype == ScalarType::Half ? f(", "dtype == ScalarType::BFloat16 ? f(",
                  ["tests/test_layer_norm.py", "-k", "parity"]),
    _sixteen_bits("layer_norm.cpp", "is_reduced(input.scalar_type()) && x", "input.scalar_type() == ScalarType::BFloat16 && x",
                  ["tests/test_layer_norm.py", "-k", "16_bits"]),
    _sixteen_bits("pooling.cpp", "dtype == ScalarType::Double || is_reduced(dtype)", "dtype == ScalarType::Double",
                  ["tests/test_pooling.py", "-k", "torch.float16"]),
]


def _optim(old: str, new: str, tests: str, file: str = "csrc/cpu/optim.cpp") -> dict:
    return dict(file=file, old=old, new=new, tests=["tests/test_optim.py", "-k", tests], build="native")


_OPTIM_LAYER, _OPTIM_CHECKS = "csrc/ops/optim.cpp", "csrc/ops/optim_checks.h"
MUTANTS += [
    # Dampening, Nesterov, decoupled decay, the largest square; an element left out; norms of a tail; copies not brought back.
    _optim("static_cast<A>(1 - t.dampening)", "static_cast<A>(1 + t.dampening)", "parity and momentum"),
    _optim("t.nesterov ? grad + momentum * buffer : buffer", "t.nesterov ? grad + buffer : buffer", "parity and nesterov"),
    _optim("square = maximum(", "square = 0.5f * maximum(", "parity and amsgrad"),
    _optim("f(*tensor, (begin - tensor->first_block) * kOptimBlock,", "f(*tensor, (begin - tensor->first_block) * kOptimBlock + 1,",
           "parity"),
    _optim("rate *= t.trust_coefficient * param_norm / below;", "rate *= t.trust_coefficient / below;", "lars"),
    _optim("for (; i < end; i += lanes)", "for (; i + lanes <= end; i += lanes)", "clipping_by_norm"),
    _optim("v = v < low ? low : v;", "v = v < low ? high : v;", "clipping_by_value"),
    _optim("if (written_) copy_(used_, original_);", "", "any_strides", _OPTIM_CHECKS),
    _optim("1 - lr * row[4] : 1;", "1 - row[4] : 1;", "parity and adamw", _OPTIM_LAYER),
    _optim("ranges[i].begin < ranges[i - 1].end", "false", "share_memory", _OPTIM_CHECKS),
]


def _embedding(old: str, new: str, tests: str) -> dict:
    return dict(file="csrc/cpu/embedding.cpp", old=old, new=new, tests=["tests/test_embedding.py", "-k", tests], build="native")


MUTANTS += [
    # A position too few, lanes behind the whole vectors, the padding's row, rows that threads share.
    _embedding("for (int64_t p = 0; p < count; ++p) {", "for (int64_t p = 1; p < count; ++p) {", "parity"),
    _embedding("if (rest) sum[vectors] +=", "if (rest < 0) sum[vectors] +=", "parity"),
    # Few rows: the padding's row, a row's columns that follow another's.
    _embedding("v == args.padding_idx ? Wide<T>{} :", "v == args.padding_idx - 1 ? Wide<T>{} :", "parity"),
    _embedding("sums + args.indices[i] * vectors", "sums + args.indices[i] * (vectors - 1)", "parity"),
    _embedding("v == args.padding_idx ? 0 :", "v == args.padding_idx - 1 ? 0 :", "parity"),
    _embedding("part + 1 == parts ? rows : row_of(part + 1)", "part + 1 == parts ? rows : row_of(part + 1) - 1", "threads"),
    # The weight of a single position, in what a mean is divided by and in the gradient.
    _loss("sums.weight += w * own;", "sums.weight += w;", "sample_weight"),
    _loss("if (args.sample_weight) g *=", "if (args.sample_weight && i < 0) g *=", "sample_weight"),
    # Probabilities: a row's tail, the mean over places, the smoothed targets' gradient.
    _loss("v = first_wide(v, count);", "", "probabilities"),
    dict(_loss("return {first_lanes<double>(v.low, count),", "return {v.low,", "probabilities"), file="csrc/cpu/wide.h"),
    _loss("if (args.reduction == 1) total /=", "if (args.reduction == 2) total /=", "probabilities"),
    _loss("grad * smoothed.keep * weight *", "grad * weight *", "probabilities"),
]

# AMX's tiles, in memory: the last step of k, one of float's six products, bfloat16's layout, blocks of k that do not add up,
# sums that cannot be trusted (infinite, and nearly zero), the turned product.
_TILES = dict(tests=["tests/test_builds.py", "-k", "tiles_on_any_machine and test_tiles.py"], build="wide")
MUTANTS += [
    dict(_TILES, file="csrc/cpu/tiles.h", old="return load_some(from + r * row, columns);", new="return load(from + r * row);"),
    dict(_TILES, file="csrc/cpu/tiles.h",
         old="  if constexpr (PARTS == 3 || (PARTS == 2 && WHOLE)) {\n    load_right(1);\n    multiply_parts<ROWS, COLUMNS>();\n  }\n", new=""),
    dict(_TILES, file="csrc/cpu/tiles.h", old="if (along != LEFT) transpose(row);", new="if (along) transpose(row);"),
    dict(_TILES, file=_GEMM, old="if (block > 0) add_strip(other, sum);", new=""),
    dict(_TILES, file="csrc/cpu/tiles.h", old=" && largest < 0x7f800000;", new=";"),
    dict(_TILES, file="csrc/cpu/tiles.h", old="return largest >= 0x1f800000 &&", new="return"),
    dict(_TILES, file=_GEMM, old="                turn_strip(sum, other);\n", new=""),
]

# Convolution by tiles: rows that run into each other, blocks of a sum, sums that cannot be trusted,
# the next block's columns, a tap's offset.
_TILES_CONV = dict(tests=["tests/test_builds.py", "-k", "tiles_on_any_machine and conv"], build="wide")
MUTANTS += [
    dict(_TILES_CONV, file="csrc/cpu/conv_tiles.h", old="f.pitch = f.merged ? columns : apart(f.w, columns, source_w);",
         new="f.pitch = columns;"),
    dict(_TILES_CONV, file="csrc/cpu/conv_tiles.h", old="if (b > 1) add_strip(spare, sums);", new=""),
    dict(_TILES_CONV, file="csrc/cpu/conv.cpp", old="return !any || is_exact(most);", new="return true;"),
    dict(_TILES_CONV, file="csrc/cpu/conv_weight_tiles.h", old="plan.y.only_block = true;", new="plan.y.only_block = false;"),
    dict(_TILES_CONV, file="csrc/cpu/conv_weight_tiles.h", old="if (waiting) add_strip(sums, waiting);", new="if (waiting) add_strip(sums, waiting), add_strip(sums, waiting);"),
    # bfloat16's words: of weights, of positions' pairs
    dict(_TILES_CONV, file="csrc/cpu/conv_tiles.h", old="apart = kHasPairs<T> ? 1 : kTile;", new="apart = kTile;"),
    dict(_TILES_CONV, file="csrc/cpu/conv_weight_tiles.h", old="kHasPairs<T> ? 2 * kCell : kCell,", new="kCell,"),
]


def _winograd(file: str, old: str, new: str, tests: str = "integers") -> dict:
    return dict(file=f"csrc/cpu/{file}", old=old, new=new, tests=["tests/test_conv_winograd.py", "-k", tests], build="native")


_FEW = ["tests/test_conv.py", "-k", "few_pixels"]
MUTANTS += [
    # a phase of dilation, the second row of an odd image, zeros outside the image
    _winograd("winograd.h", "line / down % dilation_h + line", "line"),
    _winograd("conv_winograd.h", "row + lines.dilation_h < z.rows ? 2 : 1", "true ? 2 : 1"),
    _winograd("winograd.h", "pixels[y][i] = inside && row[y] ? row[y]", "pixels[y][i] = row[y] ? row[y]"),
    # the transforms
    _winograd("winograd.h", "t[4] = d[3] - d[4], t[5] = d[4],", "t[4] = d[3] - d[4], t[5] = d[3],"),
    _winograd("winograd.h", "t[2] = y[0] - y[1], t[3] = -y[1];", "t[2] = y[0] - y[1], t[3] = y[1];"),
    # one chain of all channels, of all tiles, of all pixels
    _winograd("winograd.h", "constexpr int64_t kChain = 16;", "constexpr int64_t kChain = 4096;", tests="parity and many"),
    _winograd("conv_kernel.h", "constexpr int64_t kOuterChain = 32;", "constexpr int64_t kOuterChain = 128;", tests="parity and panels"),
    # sums that are there already
    _winograd("conv_winograd.h", "sums_plane, c > 0);", "sums_plane, false);"),
    _winograd("conv_weight_winograd.h", "row, add || t > 0, nullptr, 0);", "row, t > 0, nullptr, 0);"),
    _winograd("conv_weight_winograd.h", "part = 1; part < parts;", "part = 1; part < 1;", tests="threads"),
    # channels of a group; each tap of filters whose channels are neighbours
    _winograd("conv_winograd.h", "first = group * outputs + panel * kWidth;", "first = panel * kWidth;"),
    _winograd("conv_winograd.h", "if (by_tap) part.data += f.taps[tap];", ""),
    # what a tile spreads
    _winograd("winograd.h", "if (bits[l] >= 0x7f800000) return false;", "if (bits[l] > 0x7fffffff) return false;", tests="infinity"),
    # few pixels: each tap's own, none, those of a group
    dict(file="csrc/cpu/conv_weight.cpp", old="plan.cut ? t % tiles_a_block : 0", new="0", tests=_FEW, build="native"),
    dict(file="csrc/cpu/conv_weight.cpp", old="if (some.count == 0)", new="if (false)", tests=_FEW, build="native"),
    dict(file="csrc/cpu/conv_weight.cpp", old="if (group != copied) {", new="if (copied < 0) {", tests=_FEW, build="native"),
    # what transforms would blur: zero taps, taps that an output does not see, few numbers
    _winograd("conv_winograd.h", "if (8 * zeros > some * some) return false;", "", tests="masked"),
    _winograd("conv_winograd.h", "if (!(all <= 4 * most_of(", "if (!(all <= 1000 * most_of(", tests="largest_tap"),
    _winograd("winograd.h", "some += x.data[at + i] != 0;", "some += 1;", tests="sparse"),
    # bias; residual of a dilated line's second row
    _winograd("conv_winograd.h", "out[y][x] + bias[v],", "out[y][x],"),
    _winograd("conv_winograd.h", "y = 0; y < high(line)", "y = 0; y < 1", tests="residual"),
    _winograd("isa.cpp", "return !wanted || std::strcmp(wanted, \"0\") != 0;", "return true || wanted;", tests="switch"),
]
