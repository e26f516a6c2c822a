"""Mutants of the CPU column."""


def _dropout(old: str, new: str, tests: str = "same_elements") -> dict:
    return dict(file="csrc/cpu/dropout.cpp", old=old, new=new, tests=["tests/test_dropout.py", "-k", tests], build="native")


def _loss(old: str, new: str, tests: str) -> dict:
    return dict(file="csrc/cpu/loss.cpp", old=old, new=new, tests=["tests/test_loss.py", "-k", tests], build="native")


MUTANTS = [
    # dropout: words swapped, a vector's counters counted wrongly, the scale
    _dropout("left < kWords ? left : kWords, word[w], threshold", "left < kWords ? left : kWords, word[3 - w], threshold",
             "same_elements or share"),
    _dropout("odd{low + 1, high,", "odd{low + 2, high,"),
    _dropout("1.0 / (1.0 - args.p)", "1.0 - args.p"),
    # loss, forward: a row's tail, the change of the largest logit, the weighted mean
    _loss("keep<T>(exp_nonpositive(load_some(x + c, count - c) - largest), count - c, 0)",
          "exp_nonpositive(load_some(x + c, count - c) - largest)", "test_parity"),
    _loss("row.sum *= row.sum == 0 ? 1.0 :", "row.sum *= row.sum >= 0 ? 1.0 :", "test_parity"),
    _loss("sums.weight += w;", "sums.weight += 1;", "test_parity"),
    # loss, backward: the target's class, ignored places side by side, the mean
    _loss("out[target] = static_cast<T>(at_target(", "out[0] = static_cast<T>(at_target(", "test_parity"),
    _loss("value = ignored ? Vec<T>{} : value;", "value = ignored ? value : value;", "ignored_places"),
    _loss("if (args.reduction == 1) g /=", "if (args.reduction == 2) g /=", "test_parity"),
]

_MAX, _MAX_BACKWARD = "csrc/cpu/pooling_max.cpp", "csrc/cpu/pooling_max_backward.cpp"
_AVG, _ADAPTIVE = "csrc/cpu/pooling_avg.cpp", "csrc/cpu/pooling_adaptive.cpp"


def _pool(file, old, new, selection):
    return dict(file=file, old=old, new=new, tests=["tests/test_pooling.py", "-k", selection], build="native")


MUTANTS += [
    # NaN no longer wins; ties take the last; padding's tag is not that of the first element inside.
    _pool(_MAX, "const auto won = (value > best) | (value != value);", "const auto won = (value >= best) | (value != value);", "special"),
    _pool(_MAX, "(__m512)value, (__m512)best, _CMP_NGT_UQ)", "(__m512)value, (__m512)best, _CMP_NGE_UQ)", "max_is_torchs"),
    _pool(_MAX, "ordered, (__m512)value, (__m512)best", "__mmask16(-1), (__m512)value, (__m512)best", "special"),
    _pool(_MAX, "Taps(x0, s.w, s.kernel_w, s.dilation_w).begin));", "0));", "special"),
    _pool(_MAX, "challenge<T, tagged>(second, first_tag + 1, best, tag);", "challenge<T, tagged>(second, first_tag, best, tag);", "max_is_torchs"),
    _pool(_MAX, "if (value > best || value != value) best = value,", "if (value > best) best = value,", "windows_far"),
    # Windows in the wrong order of rows, a dropped tap, a foreign row's tag, lanes shifted, a tail left out.
    _pool(_MAX_BACKWARD, "row_tag[count++] = r * s.kernel_w;\n      });\n      const int64_t next",
          "row_tag[count++] = r * s.kernel_h;\n      });\n      const int64_t next", "max_is_torchs"),
    _pool(_MAX_BACKWARD, "at[j] = row_at[k] + taps.shift[t];", "at[j] = row_at[k] + (taps.shift[t] > 0 ? 1 : taps.shift[t]);", "max_is_torchs"),
    _pool(_MAX_BACKWARD, "if (q < 0 || q >= s.out_w) continue;", "if (q < 1 || q >= s.out_w) continue;", "max_is_torchs"),
    _pool(_MAX_BACKWARD, "add_where<T>(Vec<T>{}, tag, target + 1, gradient)", "add_where<T>(Vec<T>{}, tag, target, gradient)", "max_is_torchs"),
    _pool(_MAX_BACKWARD, "if (y >= 0 && y < s.h && x >= 0 && x < s.w) sums", "if (y >= 0 && y < s.h - 1 && x >= 0 && x < s.w) sums", "max_is_torchs"),
    # Padding counted where it should not be, a window row too few, the wrong column's divisor, reciprocals of no power of two.
    _pool(_AVG, "return args.count_include_pad ? stop - start", "return !args.count_include_pad ? stop - start", "avg_is_torchs"),
    _pool(_AVG, "stop = smaller(start + kernel, extent + pad);", "stop = start + kernel;", "avg_is_torchs or by_hand"),
    _pool(_AVG, "return i > 0 && (i & (i - 1)) == 0;", "return i > 0;", "avg_parity"),
    _pool(_AVG, "sum = (sum + even) + odd;", "sum = sum + even + even;", "avg_is_torchs"),
    _pool(_AVG, "rows = smaller(y0 + s.kernel_h, s.h) - top;", "rows = smaller(y0 + s.kernel_h, s.h - 1) - top;", "avg_is_torchs"),
    _pool(_AVG, "sum += load(shares + row_at[k] + m + taps.shift[j]);", "sum = load(shares + row_at[k] + m + taps.shift[j]);", "avg_is_torchs"),
    _pool(_AVG, "if (q >= 0 && q < s.out_w) at[count++]", "if (q >= 0 && q < s.out_w - 1) at[count++]", "avg_is_torchs"),
    _pool(_AVG, "store_pairs(args.output + (i * s.kernel_h + r) * s.w + 2 * q, share, share, limit);",
          "store_pairs(args.output + (i * s.kernel_h + r) * s.w + 2 * q, share, share, limit - 1);", "avg_is_torchs"),
    _pool(_AVG, "const int64_t first_p = larger(0, floor_div(y + s.pad_h - s.kernel_h, s.stride_h) + 1);",
          "const int64_t first_p = larger(1, floor_div(y + s.pad_h - s.kernel_h, s.stride_h) + 1);", "far_beyond"),
    # Window ends rounded down, a tail of a run left in, compensation dropped; shares of the wrong extent, copies where windows differ.
    _pool(_ADAPTIVE, "return ceil_div((i + 1) * size, out_size); }", "return larger(i * size / out_size + 1, (i + 1) * size / out_size); }", "adaptive_is_torchs"),
    _pool(_ADAPTIVE, "first_lanes<float>(load_before(p + i, limit), count - i, vfloat{});", "load_before(p + i, limit);", "adaptive_parity"),
    _pool(_ADAPTIVE, "lost += (value - (next - added)) + (x - added);", "", "carries"),
    _pool(_ADAPTIVE, "load_wide_before(from + 3 * in.x + c, input_end);", "load_wide_before(from + 2 * in.x + c, input_end);", "adaptive_parity"),
    _pool(_ADAPTIVE, "if (i > begin && y > 0 && p0 == before_p0 && p1 == before_p1) {", "if (i > begin && y > 0 && p0 == before_p0) {", "adaptive_is_torchs"),
    _pool(_ADAPTIVE, "return gradient / (rows * columns); }", "return gradient / (rows + columns); }", "adaptive_is_torchs"),
    _pool(_ADAPTIVE, "for (int64_t k = 0; k < plane; k += kLanes<T>) store_before", "for (int64_t k = 0; k + 1 < plane; k += kLanes<T>) store_before", "adaptive_is_torchs"),
]
