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
