"""Mutants of adaptive max pooling, power-average pooling, dropout of channels and SyncBatchNorm."""

_MAX, _LP = "csrc/cpu/pooling_adaptive_max.cpp", "csrc/cpu/pooling_lp.cpp"
_FEATURE, _SYNC = "csrc/cpu/dropout_feature.cpp", "dlkern/ops/batch_norm_sync.py"


def _mutant(file: str, old: str, new: str, test: str, selection: str, build: str = "native") -> dict:
    return dict(file=file, old=old, new=new, tests=[f"tests/test_{test}.py", "-k", selection], build=build)


MUTANTS = [
    # The later of equal elements, the first NaN, in vectors and one by one; a row too few; a channel's place; sums per window.
    _mutant(_MAX, "((value == best) & earlier)", "((value == best) & later)", "adaptive_max_pooling", "is_torchs"),
    _mutant(_MAX, "(nan & (~best_nan | later))", "(nan & ~best_nan)", "adaptive_max_pooling", "special"),
    _mutant(_MAX, "nan ? !best_nan || value_place > place", "nan ? !best_nan", "adaptive_max_pooling", "special"),
    _mutant(_MAX, "for (int64_t y = y0 + 1; y < y1; ++y)", "for (int64_t y = y0 + 1; y < y1 - 1; ++y)", "adaptive_max_pooling", "is_torchs"),
    _mutant(_MAX, "rows[ix * inner + c] * s.w + ix, best, place", "rows[ix * inner + c] * s.h + ix, best, place",
            "adaptive_max_pooling", "is_torchs"),
    _mutant(_MAX, "sums[place * together + c] +=", "sums[place * together + c] =", "adaptive_max_pooling", "is_torchs"),
    _mutant(_MAX, "if (place >= 0 && place < pixels)", "if (place >= 0)", "adaptive_max_pooling", "foreign"),
    # A window cut off counted as whole, gradients through a sum of zero, one row of windows too few, the power's slope.
    _mutant(_LP, "const double share = size / static_cast<double>((y1 - y0) * (x1 - x0));", "const double share = 1;",
            "lp_pooling", "parity or cut_off"),
    _mutant(_LP, "sum == 0.0 ? vdouble{} : sum != sum", "sum != sum", "lp_pooling", "special"),
    _mutant(_LP, "p1 = smaller(y / s.stride_h, s.out_h - 1);", "p1 = smaller(y / s.stride_h, s.out_h - 2);", "lp_pooling", "parity"),
    _mutant(_LP, "power_slope(args.norm - 1.0)", "power_slope(args.norm)", "lp_pooling", "parity"),
    _mutant(_LP, "return whole_ < 0 ? 1.0 / result : result;", "return result;", "lp_pooling", "parity"),
    # Channels of another image, NaN times zero, a tail left out.
    _mutant(_FEATURE, "args.factors + i / inner * c;", "args.factors;", "dropout", "same_channels"),
    _mutant(_FEATURE, "store(y + i, f == 0 ? Vec<T>{} : load(x + i) * f);", "store(y + i, load(x + i) * f);", "dropout", "special or same"),
    _mutant(_FEATURE, "if (i < count) {", "if (i + 1 < count) {", "dropout", "same_channels"),
    # The spread of the processes' means, their counts, the mean of the gradient.
    _mutant(_SYNC, "(squares + counts * (means - mean).square()).sum(0)", "squares.sum(0)", "sync_batch_norm", "joined", ""),
    _mutant(_SYNC, "mean = (means * counts).sum(0) / total", "mean = means.mean(0)", "sync_batch_norm", "joined", ""),
    _mutant(_SYNC, "slope, offset = (-shares).to(dtype)", "slope, offset = (0 * shares).to(dtype)", "sync_batch_norm", "joined", ""),
    _mutant(_SYNC, "deviations / (total - 1).clamp(min=1)", "deviations / total", "sync_batch_norm", "joined", ""),
    # Triton: the later of equals, a window's place, a window short; a cut-off window's share, the slope at zero; words.
    _mutant("kernels/pooling.py", "take = inside & ((x > best) | (x != x))  # the first", "take = inside & ((x >= best) | (x != x))  # the first",
            "triton", "adaptive_max_and_lp", ""),
    _mutant("kernels/pooling.py", "mine = tl.load(indices_ptr + offset, mask=inside, other=-1) == h * W + w",
            "mine = tl.load(indices_ptr + offset, mask=inside, other=-1) == h * H + w", "triton", "adaptive_max_and_lp", ""),
    _mutant("kernels/pooling.py", "best = tl.full((BLOCK,), -float(\"inf\"), ACC)\n    place = (h_start", "best = tl.full((BLOCK,), 0.0, ACC)\n    place = (h_start",
            "triton", "adaptive_max_and_lp", ""),
    _mutant("kernels/_lp_pooling.py", "return total * share, share", "return total, share", "triton", "test_float32 and lp_pool2d", ""),
    _mutant("kernels/_lp_pooling.py", "tl.where(total == 0, 0.0, tl.where", "tl.where(total == -1, 0.0, tl.where", "triton", "adaptive_max_and_lp", ""),
    _mutant("kernels/_lp_pooling.py", "(h - p * STRIDE_H < KERNEL_H)", "(h - p * STRIDE_H <= KERNEL_H)", "triton", "test_float32 and lp_pool", ""),
    _mutant("kernels/dropout.py", "(channels * inner) * channels + element % channels", "(channels * inner) * channels + element % inner",
            "triton", "dropout_drops", ""),
]
