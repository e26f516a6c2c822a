"""Trains a network that translates English to French, on dlkern and on torch side by side, and measures what it writes.

The sentences are Django's own: the messages of its user interface and their translations, which every installation holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

import dlkern.nn
from dlkern.decoding import beam_search
from dlkern.text import Vocabulary
from dlkern.training import SideBySide, _now, _Side

__all__ = [
    "Bilingual", "Pairs", "bilingual", "bleu", "django_messages", "pair_batches", "rouge_l", "tokenize",
    "train_translation", "translate",
]  # fmt: skip

_RESERVED = ("<pad>", "<begin>", "<end>")
UNKNOWN, PAD, BEGIN, END = range(4)  # their numbers in a Vocabulary

# Placeholders of format strings stay whole; an elided article keeps its apostrophe (l' école).
_TOKEN = re.compile(r"%\(\w+\)\w|%%|%[a-z]|\{[^{}]*\}|\w+(?:'(?=\w))?|[^\w\s]")


def django_messages(language: str = "fr") -> list[tuple[str, str]]:
    """Django's messages in English and in another language, each pair once, in the order of its catalogues.

    Raises:
        RuntimeError: Django or polib is not installed, or Django has no such language.
    """
    try:
        import django
        import polib
    except ImportError:
        raise RuntimeError("the sentences are Django's, read with polib: pip install django polib") from None
    pairs: dict[tuple[str, str], None] = {}
    for path in sorted(Path(django.__file__).parent.glob(f"**/locale/{language}/LC_MESSAGES/*.po")):
        for entry in polib.pofile(str(path)):
            if entry.obsolete or entry.fuzzy:
                continue
            forms = entry.msgstr_plural
            found = [(entry.msgid, forms.get(0, entry.msgstr))]
            if forms:
                found.append((entry.msgid_plural, forms[max(forms)]))
            pairs.update((pair, None) for pair in found if all(pair))
    if not pairs:
        raise RuntimeError(f"Django has no messages in {language!r}")
    return list(pairs)


def tokenize(text: str) -> list[str]:
    """Words in lower case, punctuation marks and placeholders."""
    return _TOKEN.findall(text.lower().replace("’", "'"))


def join(tokens: Iterable[str]) -> str:
    """A text of tokens, without spaces after apostrophes and brackets and before most punctuation marks."""
    text = re.sub(r"([(\[«]|\w') ", r"\1", " ".join(tokens))
    return re.sub(r" ([.,)\]…])", r"\1", text)


@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations as tokens."""

    source: list[list[str]]
    target: list[list[str]]

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Bilingual:
    """Pairs to train on and held out, and both vocabularies, which the first alone have made."""

    train: Pairs
    test: Pairs
    source_words: Vocabulary
    target_words: Vocabulary


def bilingual(
    messages: Sequence[tuple[str, str]] | None = None, *, longest: int = 16, min_count: int = 1, every: int = 10
) -> Bilingual:
    """Sentence pairs for training.

    Args:
        messages: pairs of texts; Django's English and French by default.
        longest: pairs with more tokens on either side are left out.
        min_count: words that occur less often in the pairs to train on are unknown.
        every: each so many-th pair is held out.

    Raises:
        ValueError: nothing is left to train on, or to hold out.
    """
    both = [(tokenize(a), tokenize(b)) for a, b in (django_messages() if messages is None else messages)]
    distinct: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    for a, b in both:  # one translation a sentence, so that none is trained on and held out
        if a and b and max(len(a), len(b)) <= longest:
            distinct.setdefault(tuple(a), (a, b))
    pairs = list(distinct.values())
    train, test = ([p for i, p in enumerate(pairs) if (i % every == every - 1) == held] for held in (False, True))
    if not train or not test:
        raise ValueError(f"bilingual: {len(pairs)} pairs of up to {longest} tokens are too few")
    known, held_out = (Pairs([a for a, _ in part], [b for _, b in part]) for part in (train, test))
    source, target = (
        Vocabulary(chain.from_iterable(sentences), min_count=min_count, reserved=_RESERVED)
        for sentences in (known.source, known.target)
    )
    return Bilingual(known, held_out, source, target)


@dataclass(frozen=True)
class Batch:
    """Sources [B, S] of which `lengths` [B] count, what the decoder gets [B, T], and what it is to write [B, T]."""

    source: torch.Tensor
    lengths: torch.Tensor
    given: torch.Tensor
    wanted: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device) for t in (self.source, self.lengths, self.given, self.wanted)))


def as_batch(pairs: Pairs, index: Iterable[int], corpus: Bilingual) -> Batch:
    """Some of the pairs, padded to the longest of them."""
    index = list(index)
    source = [corpus.source_words.encode(pairs.source[i]) for i in index]
    target = [torch.tensor([BEGIN, *corpus.target_words.encode(pairs.target[i]).tolist(), END]) for i in index]
    lengths = torch.tensor([len(s) for s in source])
    padded = pad_sequence(target, batch_first=True, padding_value=PAD)
    given = padded[:, :-1].masked_fill(padded[:, :-1] == END, PAD)
    return Batch(pad_sequence(source, batch_first=True, padding_value=PAD), lengths, given, padded[:, 1:])


def pair_batches(corpus: Bilingual, size: int, seed: int) -> Iterator[Batch]:
    """Batches without end, shuffled anew each epoch; the last, smaller batch of an epoch is left out."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(corpus.train))
    while True:
        for index in torch.randperm(len(corpus.train), generator=generator).split(size):
            if len(index) == size:
                yield as_batch(corpus.train, index.tolist(), corpus)


def token_loss(nn: Any, logits: torch.Tensor, wanted: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of the wanted tokens, padding left out."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), wanted.flatten(), ignore_index=PAD, reduction=reduction)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=2e-3)


class _Translator(_Side):
    """A side that translates."""

    clip = 1.0

    def train(self, batch: Batch) -> None:
        start = _now(batch.source.device)
        with self.inside():
            loss = token_loss(self.nn, self.model(batch.source, batch.lengths, batch.given), batch.wanted)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
        self.run.milliseconds.append((_now(batch.source.device) - start) * 1e3)
        self.run.losses.append(loss.item())

    @torch.no_grad()
    def read(self, batch: Batch, step: int) -> None:
        """Perplexity of held-out translations."""
        self.model.eval()
        with self.inside():
            logits = self.model(batch.source, batch.lengths, batch.given)
            loss = token_loss(self.nn, logits, batch.wanted)
        self.model.train()
        self.run.perplexity.append((step, math.exp(loss.item())))


def train_translation(
    make: Callable[[int, int, Any], torch.nn.Module],
    corpus: Bilingual,
    *,
    steps: int = 600,
    batch: int = 32,
    seed: int = 0,
    column: str = "auto",
    device: str | torch.device = "cpu",
    optimizer: Callable[..., torch.optim.Optimizer] = adam,
    evaluations: int = 10,
    progress: Callable[[int, SideBySide], None] | None = None,
) -> SideBySide:
    """Trains dlkern's network and its torch twin together, with teacher forcing and gradients clipped to norm 1.

    Args:
        make: builds the network of (source words, target words, nn), such as models.seq2seq; nn is dlkern.nn or torch.nn.
        corpus: what to train on and to hold out.
        steps, batch: how many steps of how many pairs.
        seed, column, device, optimizer, progress: as for training.train_side_by_side.
        evaluations: how often to measure the perplexity of the held-out translations, the last time after the last step.

    Returns:
        Losses, times and perplexities of both, and the trained models (torch's first), in eval mode. The two take turns in
        going first.
    """
    device, result = torch.device(device), SideBySide()
    torch.manual_seed(seed)
    words = len(corpus.source_words), len(corpus.target_words)
    twin, ours = (make(*words, nn).to(device) for nn in (torch.nn, dlkern.nn))
    ours.load_state_dict(twin.state_dict())
    sides = [
        _Translator(twin, torch.nn, optimizer(twin.parameters()), result.torch, None),
        _Translator(ours, dlkern.nn, optimizer(ours.parameters()), result.dlkern, column),
    ]
    held_out = as_batch(corpus.test, range(len(corpus.test)), corpus).to(device)
    marks = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    stream = pair_batches(corpus, batch, seed)
    for step in range(1, steps + 1):
        drawn = next(stream).to(device)
        for side in sides if step % 2 else reversed(sides):
            side.train(drawn)
        if step in marks:
            for side in sides:
                side.read(held_out, step)
        if progress is not None:
            progress(step, result)
    result.models = twin.eval(), ours.eval()
    return result


@torch.no_grad()
def translate(
    model: torch.nn.Module, corpus: Bilingual, sentences: Sequence[Sequence[str]], *, beams: int = 4,
    length_penalty: float = 0.75, max_length: int = 32,
) -> list[list[str]]:
    """Translations of tokenized sentences by beam search, all beams of all sentences at once.

    Args:
        model: a network that train_translation has trained, in eval mode.
        corpus: whose vocabularies it knows.
        sentences: tokens, as tokenize() gives them.
        beams, length_penalty, max_length: as for decoding.beam_search.
    """
    device = next(model.parameters()).device
    source = [corpus.source_words.encode(tokens) for tokens in sentences]
    lengths = torch.tensor([len(s) for s in source], device=device)
    padded = pad_sequence(source, batch_first=True, padding_value=PAD).to(device)
    found = beam_search(
        model.step, model.start(padded, lengths), torch.full((len(source),), BEGIN, device=device), end=END,  # type: ignore[operator, arg-type]
        max_length=max_length, beams=beams, length_penalty=length_penalty,
    )  # fmt: skip
    return [corpus.target_words.decode(numbers) for numbers in found.best()]


def bleu(written: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """BLEU of tokenized translations, 0 to 100. Papineni et al. 2002, as sacrebleu computes it (Post 2018).

    Raises:
        RuntimeError: sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError:
        raise RuntimeError("BLEU is sacrebleu's: pip install sacrebleu") from None
    texts = ([" ".join(tokens) for tokens in side] for side in (written, wanted))
    # Four logarithms' rounding may end above 100.
    return min(sacrebleu.corpus_bleu(next(texts), [next(texts)], tokenize="none", force=True).score, 100.0)


class _Spaces:
    """What rouge_score splits texts with: its own drops accents."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def rouge_l(written: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L F-measure of tokenized translations, 0 to 100. Lin 2004, as rouge_score computes it.

    Raises:
        RuntimeError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise RuntimeError("ROUGE is rouge_score's: pip install rouge-score") from None
    scorer = RougeScorer(["rougeL"], tokenizer=_Spaces())
    scores = [scorer.score(" ".join(b), " ".join(a))["rougeL"].fmeasure for a, b in zip(written, wanted)]
    return 100 * sum(scores) / len(scores)
