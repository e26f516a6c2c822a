"""Text for language models: a corpus that every Python has, tokens, a vocabulary, and batches of a long sequence.

Batches are time-major, [steps, batch], as torch.nn's recurrent layers take them, and come as pairs: each target is the
token after its input.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Corpus", "Vocabulary", "corpus", "ngrams", "random_batches", "sequential_batches", "tokenize", "topics"]

Batch = tuple[torch.Tensor, torch.Tensor]


def topics() -> str:
    """The help texts of Python's own documentation, from the standard library's pydoc_data.topics: about 465 KB of
    English, which differs a little from one version of Python to the next."""
    from pydoc_data.topics import topics as texts

    return "\n".join(texts[name] for name in sorted(texts))


def tokenize(text: str, level: str = "char") -> list[str]:
    """Splits a text into tokens.

    Args:
        text: any text.
        level: "char" for its characters, all of them; "word" for its words in lower case: runs of letters with
            apostrophes inside, and nothing else.

    Raises:
        TypeError: text is no string.
        ValueError: any other level.
    """
    if not isinstance(text, str):
        raise TypeError(f"tokenize: expected a string, got {type(text).__name__}")
    if level == "char":
        return list(text)
    if level == "word":
        return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower())
    raise ValueError(f'tokenize: expected level "char" or "word", got {level!r}')


def ngrams(tokens: Iterable[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n tokens occurs in a sequence, runs that overlap included.

    Args:
        tokens: the sequence, such as tokenize() gives it.
        n: how many tokens a run has: 1 counts the tokens themselves, 2 pairs of neighbours.

    Returns:
        Counts by tuples of n tokens; their sum is len(tokens) - n + 1, or 0 of shorter sequences.

    Raises:
        ValueError: n is below 1.
        TypeError: n is not an integer.
    """
    if operator.index(n) < 1:
        raise ValueError(f"ngrams: expected a positive n, got {n}")
    sequence = list(tokens)
    return Counter(zip(*(sequence[i:] for i in range(n))))


class Vocabulary:
    """Numbers for tokens: 0 stands for any unknown one, then come the reserved ones, then the others from the most
    frequent down (of equally frequent ones, the first in the order of strings).

    Args:
        tokens: what to count.
        min_count: tokens that occur less often are unknown.
        reserved: tokens that get a number in any case, such as "<pad>" or "<end>".
        unknown: how the unknown token is written.

    Attributes:
        tokens: the token of each number.
        counts: how often each token occurred, those left out too.

    Raises:
        ValueError: reserved tokens are not distinct, hold `unknown`, or are one string.
    """

    def __init__(
        self, tokens: Iterable[str], *, min_count: int = 1, reserved: Sequence[str] = (), unknown: str = "<unk>"
    ) -> None:
        if isinstance(reserved, str):  # a sequence of characters, which nobody means
            raise ValueError(f"Vocabulary: reserved must be a sequence of tokens, got {reserved!r}; for one: ({reserved!r},)")
        self.counts = Counter(tokens)
        first = [unknown, *reserved]
        if len(set(first)) != len(first):
            raise ValueError(f"Vocabulary: reserved tokens must differ from each other and from {unknown!r}")
        frequent = sorted((t for t, n in self.counts.items() if n >= min_count), key=lambda t: (-self.counts[t], t))
        self.tokens = first + [token for token in frequent if token not in first]
        self._numbers = {token: number for number, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self._numbers

    def __getitem__(self, token: str) -> int:
        """The token's number, 0 where it is unknown."""
        return self._numbers.get(token, 0)

    def encode(self, tokens: Iterable[str]) -> torch.Tensor:
        """The tokens' numbers, int64 [n]."""
        return torch.tensor([self[token] for token in tokens], dtype=torch.int64)

    def decode(self, numbers: torch.Tensor | Iterable[int]) -> list[str]:
        """The tokens of a one-dimensional row of numbers.

        Raises:
            IndexError: a number is outside [0, len(self)).
            ValueError: a tensor that is not one row of integers.
        """
        if isinstance(numbers, torch.Tensor):
            _check_row("Vocabulary", numbers)
        found = numbers.tolist() if isinstance(numbers, torch.Tensor) else list(numbers)
        for number in found:
            if not 0 <= number < len(self):
                raise IndexError(f"Vocabulary: expected numbers in [0, {len(self)}), got {number}")
        return [self.tokens[number] for number in found]


@dataclass(frozen=True)
class Corpus:
    """Tokens int64 [n] to train on and held out, and their vocabulary, which the first alone have made."""

    train: torch.Tensor
    test: torch.Tensor
    vocabulary: Vocabulary


def corpus(level: str = "char", *, min_count: int = 1, held_out: float = 0.05, text: str | None = None) -> Corpus:
    """A text as two sequences of tokens.

    Args:
        level: "char" or "word", as for tokenize.
        min_count: tokens that occur less often become the unknown one.
        held_out: the share of the text, from its end, that is not trained on.
        text: what to read; `topics()` by default.

    Raises:
        ValueError: another level, or a held-out share that is not between 0 and 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"corpus: expected a held_out share between 0 and 1, got {held_out}")
    tokens = tokenize(topics() if text is None else text, level)
    end = round(len(tokens) * (1 - held_out))
    vocabulary = Vocabulary(tokens[:end], min_count=min_count)
    return Corpus(vocabulary.encode(tokens[:end]), vocabulary.encode(tokens[end:]), vocabulary)


def _check_row(op: str, tokens: torch.Tensor) -> None:
    if tokens.dim() != 1 or tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise ValueError(f"{op}: expected one row of integers, got {tuple(tokens.shape)} of {tokens.dtype}")


def _check(op: str, tokens: torch.Tensor, batch: int, steps: int) -> None:
    _check_row(op, tokens)
    if batch < 1 or steps < 1:
        raise ValueError(f"{op}: expected at least one sequence and one step, got batch {batch}, steps {steps}")


def _draw(below: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(0, below, (), generator=generator))


def random_batches(
    tokens: torch.Tensor, batch: int, steps: int, *, generator: torch.Generator | None = None
) -> Iterator[Batch]:
    """Random sampling: one pass over a long sequence cut into pieces, which come in random order.

    Args:
        tokens: integers [n].
        batch: how many pieces a batch has.
        steps: how long a piece is.
        generator: what to draw from; torch's own by default.

    Yields:
        (inputs, targets), each [steps, batch]: no token is the input of two pieces, and the pieces of a batch have nothing
        to do with those at the same place of the batch before, so no state can go from one to the next. Up to steps - 1
        tokens at the beginning are skipped by chance, so that each pass cuts elsewhere; what does not fill a batch is left
        out.

    Raises:
        ValueError: tokens are not one row of integers, too few for one batch, or batch or steps is not positive.
    """
    _check("random_batches", tokens, batch, steps)
    spare = len(tokens) - 1 - batch * steps
    if spare < 0:
        raise ValueError(f"random_batches: {len(tokens)} tokens are too few for a batch of {batch} × {steps} and a target")
    first = _draw(min(steps, spare + 1), generator)
    pieces = (len(tokens) - 1 - first) // steps
    starts = first + steps * torch.randperm(pieces, generator=generator)
    within = torch.arange(steps)[:, None]  # [steps, 1]
    for chosen in starts[: pieces // batch * batch].split(batch):
        at = (chosen + within).to(tokens.device)  # [steps, batch]
        yield tokens[at], tokens[at + 1]


def sequential_batches(
    tokens: torch.Tensor,
    batch: int,
    steps: int,
    *,
    random_lengths: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[Batch]:
    """Sequential partitioning: one pass over a long sequence that lets a recurrent state go from batch to batch.

    Args:
        tokens: integers [n].
        batch: into how many rows to cut the sequence, side by side.
        steps: how many steps a batch has (the last one may have fewer).
        random_lengths: draw each batch's number of steps evenly from 1 ... 2 · steps - 1, so that backpropagation is not
            always cut at the same places.
        generator: what to draw from; torch's own by default.

    Yields:
        (inputs, targets), each [steps, batch]: column b of a batch goes on where column b of the batch before ended. Up to
        steps - 1 tokens at the beginning are skipped by chance, so that each pass cuts elsewhere.

    Raises:
        ValueError: tokens are not one row of integers, too few for one step, or batch or steps is not positive.
    """
    _check("sequential_batches", tokens, batch, steps)
    spare = len(tokens) - 1 - batch
    if spare < 0:
        raise ValueError(f"sequential_batches: {len(tokens)} tokens are too few for {batch} sequences and a target")
    first = _draw(min(steps, spare + 1), generator)
    length = (len(tokens) - 1 - first) // batch
    inputs, targets = (
        tokens[start : start + batch * length].reshape(batch, length).t().contiguous() for start in (first, first + 1)
    )  # [length, batch]
    at = 0
    while at < length:
        count = 1 + _draw(2 * steps - 1, generator) if random_lengths else steps
        yield inputs[at : at + count], targets[at : at + count]
        at += count
