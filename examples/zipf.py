"""Zipf's law: the r-th most frequent word of a text occurs about 1/r times as often as the first.

Words, pairs and triples of neighbouring words are counted in the help texts of Python's standard library, and each count is
drawn over its rank, both axes logarithmic. A law c / r^s is a straight line of slope -s there, which least squares finds
from ranks evenly spaced on the axis. --steps is how many per cent of the text to read.

What to see: words lie near a straight line, of a slope near -1: a few of them are most of the text and most of them occur
once or twice. Pairs and triples fall more slowly, because there are far more of them, each rarer. The right panel says why
counting alone makes no language model: of the pairs in the last tenth of the text a good part, and of the triples most,
never occurred before it, however common their words.
"""

import math

import torch
from common import figure, run, save

from dlkern.text import ngrams, tokenize, topics


def slope(counts, least=2):
    """The slope of log count over log rank, where counts are at least 2 (ranks of equal counts are arbitrary)."""
    last = sum(count >= least for count in counts)
    ranks = sorted({round(math.exp(x)) for x in torch.linspace(0, math.log(last), 200).tolist()})
    x = torch.tensor(ranks, dtype=torch.float64).log()
    y = torch.tensor([counts[rank - 1] for rank in ranks], dtype=torch.float64).log()
    return (((x - x.mean()) @ (y - y.mean())) / (x - x.mean()).square().sum()).item()


def main(steps=100, report=None):
    words = tokenize(topics(), "word")
    words = words[: len(words) * steps // 100]
    earlier, later = words[: len(words) * 9 // 10], words[len(words) * 9 // 10 :]
    drawing, ((a, b),) = figure(1, 2, (12, 4.5))
    numbers = {"words": len(words)}
    new = []
    for n, name in ((1, "words"), (2, "pairs"), (3, "triples")):
        found = ngrams(words, n).most_common()
        counts = [count for _, count in found]
        numbers[f"{name}: most frequent"] = " ".join(found[0][0])
        numbers[f"{name}: distinct"] = len(found)
        numbers[f"{name}: slope"] = slope(counts)
        known = ngrams(earlier, n)
        test = ngrams(later, n)
        new.append(sum(count for gram, count in test.items() if gram not in known) / test.total())
        numbers[f"{name}: share never seen before"] = new[-1]
        a.loglog(range(1, len(counts) + 1), counts, label=f"{name}, slope {numbers[f'{name}: slope']:.2f}")
    a.set(title="counts by rank", xlabel="rank", ylabel="count")
    a.legend()
    b.bar(["words", "pairs", "triples"], new)
    b.set(title="share of the last tenth that never occurred before", ylim=(0, 1))
    save(drawing, report, "zipf")
    return numbers


if __name__ == "__main__":
    run(main, 100)
