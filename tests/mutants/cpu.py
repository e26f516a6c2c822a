"""Mutants of the CPU column."""

MUTANTS = [
    dict(file="csrc/cpu/dropout.cpp", old="word[w][i] >= threshold", new="word[3 - w][i] >= threshold",
         tests=["tests/test_dropout.py", "-k", "same_elements or share"], build="native"),
    dict(file="csrc/cpu/dropout.cpp", old="first + i] = static_cast<T>(word",
         new="first + i - (i == kWords - 1)] = static_cast<T>(word",
         tests=["tests/test_dropout.py", "-k", "same_elements"], build="native"),
    dict(file="csrc/cpu/dropout.cpp", old="1.0 / (1.0 - args.p)", new="1.0 - args.p",
         tests=["tests/test_dropout.py", "-k", "same_elements"], build="native"),
]
