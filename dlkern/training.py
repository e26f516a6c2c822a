"""Trains a network on dlkern and on torch side by side: same start, same batches, a step of each in turn."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import dlkern.nn
from dlkern.columns import backend
from dlkern.models.language import LanguageModel, detached
from dlkern.text import Corpus, random_batches, sequential_batches

__all__ = ["Data", "Run", "SideBySide", "digits", "perplexity", "train_language_model", "train_side_by_side"]


@dataclass(frozen=True)
class Data:
    """Images [n, 1, 32, 32] and classes [n], to train on and held out."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, 8×8 enlarged and centred in LeNet's 32×32; every fifth is held out.

    Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI repository; ships with scikit-learn.

    Raises:
        RuntimeError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RuntimeError("the digits come with scikit-learn: pip install scikit-learn") from None
    raw = load_digits()
    small = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8] in -1 .. 1
    large = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    images = torch.nn.functional.pad(large, (2, 2, 2, 2), value=-1.0)
    labels = torch.tensor(raw.target)
    held_out = torch.arange(len(labels)) % 5 == 4
    return Data(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


@dataclass
class Run:
    """One side: a loss and a time for each step, and the accuracy on held-out images, or the perplexity of held-out text,
    after some of them."""

    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)  # (step, share of held-out images)
    perplexity: list[tuple[int, float]] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.milliseconds)


@dataclass
class SideBySide:
    """Two trainings of one network from the same weights on the same batches."""

    torch: Run = field(default_factory=Run)
    dlkern: Run = field(default_factory=Run)
    models: tuple[Any, ...] = ()  # both, trained

    @property
    def speedup(self) -> float:
        """Median over the steps of torch's time divided by dlkern's; the two were timed next to each other."""
        return statistics.median(t / d for t, d in zip(self.torch.milliseconds, self.dlkern.milliseconds))


@dataclass
class _Side:
    model: torch.nn.Module
    nn: Any
    optimizer: torch.optim.Optimizer
    run: Run
    column: str | None  # None: torch's side

    def inside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.column is None else backend(self.column)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        start = _now(images.device)
        with self.inside():
            loss = self.nn.functional.cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.run.milliseconds.append((_now(images.device) - start) * 1e3)
        self.run.losses.append(loss.item())

    def evaluate(self, images: torch.Tensor, labels: torch.Tensor, step: int) -> None:
        self.model.eval()
        with torch.no_grad(), self.inside():
            right = (self.model(images).argmax(1) == labels).double().mean().item()
        self.model.train()
        self.run.accuracy.append((step, right))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def batches(data: Data, size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end, shuffled anew each epoch, each image shifted by up to two pixels either way.

    The last, smaller batch of an epoch is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = data.train_images.shape[-2:]
    wide = torch.nn.functional.pad(data.train_images, (2, 2, 2, 2), value=-1.0)
    while True:
        order = torch.randperm(len(data.train_labels), generator=generator)
        for index in order.split(size):
            if len(index) < size:
                continue
            offsets = torch.randint(0, 5, (size, 2), generator=generator).tolist()
            images = [wide[i, :, r : r + height, c : c + width] for i, (r, c) in zip(index.tolist(), offsets)]
            yield torch.stack(images), data.train_labels[index]


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def train_side_by_side(
    make: Callable[[Any], torch.nn.Module],
    data: Data,
    *,
    steps: int = 400,
    batch: int = 64,
    seed: int = 0,
    column: str = "auto",
    device: str | torch.device = "cpu",
    optimizer: Callable[..., torch.optim.Optimizer] = _sgd,
    evaluations: int = 10,
    progress: Callable[[int, SideBySide], None] | None = None,
) -> SideBySide:
    """Trains dlkern's network and its torch twin together.

    Args:
        make: builds the network; called with dlkern.nn and with torch.nn.
        data: what to train on and to hold out.
        steps, batch: how many steps of how many images.
        seed: of the weights and of the batches' order.
        column: the dlkern column, as for dlkern.backend.
        device: where to train.
        optimizer: makes the optimiser from the parameters.
        evaluations: how often to measure the accuracy, the last time after the last step.
        progress: called after each step with the step's number and what there is so far.

    Returns:
        Losses, times and accuracies of both. The two take turns in going first, so that neither finds the caches
        warm more often.
    """
    result = SideBySide()
    torch.manual_seed(seed)
    twin = make(torch.nn).to(device)
    ours = make(dlkern.nn).to(device)
    ours.load_state_dict(twin.state_dict())
    sides = [
        _Side(twin, torch.nn, optimizer(twin.parameters()), result.torch, None),
        _Side(ours, dlkern.nn, optimizer(ours.parameters()), result.dlkern, column),
    ]
    held_out = data.test_images.to(device), data.test_labels.to(device)
    marks = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    stream = batches(data, min(batch, len(data.train_labels)), seed)
    for step in range(1, steps + 1):
        images, labels = (t.to(device) for t in next(stream))
        for side in sides if step % 2 else reversed(sides):
            side.step(images, labels)
        if step in marks:
            for side in sides:
                side.evaluate(*held_out, step)
        if progress is not None:
            progress(step, result)
    result.models = twin, ours
    return result


# language models ------------------------------------------------------------------------------------------------------


@dataclass
class _Reader(_Side):
    """A side that reads text; its state goes from batch to batch where batches follow each other."""

    clip: float = 1.0
    carries: bool = True
    state: Any = None

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        start = _now(tokens.device)
        with self.inside():
            logits, state = self.model(tokens, self.state)
            loss = self.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
        self.state = detached(state) if self.carries else None
        self.run.milliseconds.append((_now(tokens.device) - start) * 1e3)
        self.run.losses.append(loss.item())

    def evaluate(self, tokens: torch.Tensor, _: torch.Tensor, step: int) -> None:
        with self.inside():
            self.run.perplexity.append((step, perplexity(self.model, tokens)))


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: torch.Tensor, *, batch: int = 16, steps: int = 128) -> float:
    """Perplexity of a text under a language model, read in `batch` rows from beginning to end, the state carried on:
    exp(-mean log p(token | those before it in its row)). In eval mode; the model's own mode comes back.

    Raises:
        ValueError: tokens int64 [n] are too few for one step.
    """
    training = model.training
    model.eval()
    total, count, state = 0.0, 0, None
    generator = torch.Generator().manual_seed(0)
    for inputs, targets in sequential_batches(tokens, min(batch, max(1, len(tokens) - 1)), steps, generator=generator):
        logits, state = model(inputs, state)
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    model.train(training)
    return math.exp(total / count)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def text_batches(
    tokens: torch.Tensor, batch: int, steps: int, sampling: str, seed: int
) -> Iterator[tuple[bool, torch.Tensor, torch.Tensor]]:
    """Batches without end, pass after pass: whether a pass begins, inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if sampling == "random":
            stream = random_batches(tokens, batch, steps, generator=generator)
        else:
            stream = sequential_batches(
                tokens, batch, steps, random_lengths=sampling == "random lengths", generator=generator
            )
        for i, (inputs, targets) in enumerate(stream):
            yield i == 0, inputs, targets


def train_language_model(
    make: Callable[[Any], LanguageModel],
    corpus: Corpus,
    *,
    steps: int = 1000,
    batch: int = 32,
    length: int = 64,
    sampling: str = "sequential",
    clip: float = 1.0,
    seed: int = 0,
    column: str = "auto",
    device: str | torch.device = "cpu",
    optimizer: Callable[..., torch.optim.Optimizer] = _adam,
    evaluations: int = 10,
    progress: Callable[[int, SideBySide], None] | None = None,
) -> SideBySide:
    """Trains dlkern's language model and its torch twin together on the next token of a text.

    Args:
        make: builds the model; called with dlkern.nn and with torch.nn.
        corpus: what to read and to hold out.
        steps, batch, length: how many steps of how many sequences of how many tokens.
        sampling: "sequential" (truncated backpropagation through time: the state is carried from batch to batch,
            detached), "random lengths" (the same, cut at random places) or "random" (pieces at random, from a state of
            zeros).
        clip: gradients are scaled down to this norm.
        seed: of the weights and of the batches.
        column, device, optimizer, progress: as for train_side_by_side.
        evaluations: how often to measure the perplexity of the held-out text, the last time after the last step.

    Returns:
        Losses, times and perplexities of both, and the trained models (torch's first).

    Raises:
        ValueError: another sampling, or a text too short for a batch.
    """
    if sampling not in ("sequential", "random lengths", "random"):
        raise ValueError(f"train_language_model: no sampling {sampling!r}")
    result = SideBySide()
    torch.manual_seed(seed)
    twin = make(torch.nn).to(device)
    ours = make(dlkern.nn).to(device)
    ours.load_state_dict(twin.state_dict())
    carries = sampling != "random"
    sides = [
        _Reader(twin, torch.nn, optimizer(twin.parameters()), result.torch, None, clip, carries),
        _Reader(ours, dlkern.nn, optimizer(ours.parameters()), result.dlkern, column, clip, carries),
    ]
    held_out = corpus.test.to(device)
    marks = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    stream = text_batches(corpus.train, batch, length, sampling, seed)
    for step in range(1, steps + 1):
        begins, inputs, targets = next(stream)
        for side in sides if step % 2 else reversed(sides):
            if begins:
                side.state = None
            side.step(inputs.to(device), targets.to(device))
        if step in marks:
            for side in sides:
                side.evaluate(held_out, held_out, step)
        if progress is not None:
            progress(step, result)
    result.models = twin, ours
    return result
