"""`dlkern train`: networks trained with torch and with dlkern side by side."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import click
import torch
from rich.console import Console

from dlkern import models
from dlkern import report as reports
from dlkern._cli_shared import COLUMN, device_here, errors_as_messages, new_console, progress_bar, stamp
from dlkern.report import Section, Table

__all__ = ["lenet_on_digits", "train"]

_BATCHES = click.IntRange(min=1)


def _settings(command: Any) -> Any:
    """The options that every training has."""
    for option in (
        click.option("--report", "folder", type=click.Path(file_okay=False), help="Write DIR/index.html with the plots."),
        click.option("--column", type=COLUMN, default="auto", show_default=True),
        click.option("--seed", default=0, show_default=True),
    ):
        command = option(command)
    return command


@click.group()
def train() -> None:
    """Train a network with torch and with dlkern side by side, from the same seed."""


def _report_training(console: Console, folder: str | None, name: str, run: Callable[[], Section]) -> None:
    with errors_as_messages():
        if folder:
            reports.make_folder(folder)
        section = run()
        if folder:
            console.print(f"report: {reports.write(folder, f'dlkern: training {name}', stamp(), [section])}")


@train.command("lenet")
@click.option("--steps", default=400, show_default=True, type=_BATCHES)
@click.option("--batch", default=64, show_default=True, type=_BATCHES)
@_settings
def train_lenet(steps: int, batch: int, seed: int, column: str, folder: str | None) -> None:
    """LeNet on scikit-learn's digits."""
    console = new_console()
    _report_training(console, folder, "lenet", lambda: lenet_on_digits(console, steps, batch, seed, column)[0])


@contextlib.contextmanager
def _showing(console: Console, what: str, steps: int) -> Iterator[Any]:
    """A progress bar with both sides' losses; gives what a training calls after each step."""
    with progress_bar(console) as progress:
        task = progress.add_task(f"{what}, torch and dlkern", total=steps, note="")

        def show(step: int, so_far: Any) -> None:
            note = f"loss {so_far.torch.losses[-1]:.4f} | {so_far.dlkern.losses[-1]:.4f}"
            progress.update(task, completed=step, note=note)

        yield show


def lenet_on_digits(console: Console, steps: int, batch: int, seed: int, column: str) -> tuple[Section, float]:
    """Trains LeNet, prints, and returns the report's section and dlkern's accuracy."""
    from dlkern.training import digits, train_side_by_side

    data = digits()
    with _showing(console, "lenet", steps) as show:
        result = train_side_by_side(
            lambda nn: models.lenet(nn=nn), data, steps=steps, batch=batch, seed=seed, column=column, device=device_here(),
            progress=show,
        )  # fmt: skip
    theirs, ours = result.torch, result.dlkern
    curve = _curve(result, "accuracy", lambda a: f"{100 * a:.2f}%")
    summary = _summary(result, "accuracy, held out", *(f"{100 * run.accuracy[-1][1]:.2f}%" for run in (theirs, ours)))
    title = "lenet on scikit-learn's digits"
    console.print(curve.rich(f"{title}: losses (mean of the last ten steps) and accuracy"))
    plots = _print_summary(console, summary, result)
    note = (
        f"{steps} steps of {batch} images, both from seed {seed}, a step of each in turn; "
        f"{len(data.test_labels)} digits held out; column {column}."
    )
    return Section(title, note, [summary, curve], plots), ours.accuracy[-1][1]


def _curve(result: Any, measure: str, form: Callable[[float], str]) -> Table:
    """Losses (mean of the last ten steps) and a measure ("accuracy", "perplexity") of both sides where it was taken."""
    theirs, ours = result.torch, result.dlkern
    return Table(
        ("step", "loss, torch", "loss, dlkern", f"{measure}, torch", f"{measure}, dlkern"),
        [
            [step, *(f"{statistics.mean(run.losses[max(0, step - 10):step]):.4f}" for run in (theirs, ours)), form(a), form(b)]
            for (step, a), (_, b) in zip(getattr(theirs, measure), getattr(ours, measure))
        ],
    )  # fmt: skip


def _summary(result: Any, measure: str, theirs: str, ours: str) -> Table:
    return Table(
        ("", "torch", "dlkern"),
        [
            [measure, theirs, ours],
            ["median ms per step", f"{result.torch.median_ms:.2f}", f"{result.dlkern.median_ms:.2f}"],
            ["seconds of training", *(f"{sum(run.milliseconds) / 1e3:.1f}" for run in (result.torch, result.dlkern))],
            ["torch / dlkern", "", f"{result.speedup:.2f}×"],
        ],
    )


def _print_summary(console: Console, summary: Table, result: Any) -> list[bytes]:
    """Prints it, and returns the plot where there can be one."""
    console.print(summary.rich())
    plot = reports.training_plot(result)
    if plot is None:
        console.print("no plots: matplotlib is not installed")
        return []
    return [plot]


@train.command("language-model")
@click.option("--cell", type=click.Choice(["rnn", "gru", "lstm"]), default="gru", show_default=True)
@click.option("--level", type=click.Choice(["char", "word"]), default="char", show_default=True)
@click.option("--layers", default=1, show_default=True, type=_BATCHES)
@click.option("--hidden", default=256, show_default=True, type=_BATCHES, help="Units of a layer.")
@click.option("--embedding", default=0, show_default=True, type=click.IntRange(min=0),
              help="Length of a token's vector; 0: one-hot for characters, as many as hidden for words.")  # fmt: skip
@click.option("--tied", is_flag=True, help="The output's weight is the embedding's.")
@click.option("--dropout", default=0.0, show_default=True, type=click.FloatRange(0, 1, max_open=True))
@click.option("--sampling", type=click.Choice(["sequential", "random-lengths", "random"]), default="sequential",
              show_default=True, help="How the text is cut; the first two carry the state on.")  # fmt: skip
@click.option("--steps", default=1500, show_default=True, type=_BATCHES)
@click.option("--batch", default=32, show_default=True, type=_BATCHES, help="Sequences.")
@click.option("--length", default=64, show_default=True, type=_BATCHES, help="Tokens of a sequence in a batch.")
@click.option("--clip", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Gradients' norm.")
@_settings
def train_language_model(folder: str | None, **settings: Any) -> None:
    """A recurrent language model on the help texts of Python's standard library."""
    console = new_console()
    _report_training(console, folder, "a language model", lambda: _train_language_model(console, **settings))


def _train_language_model(
    console: Console, cell: str, level: str, layers: int, hidden: int, embedding: int, tied: bool, dropout: float,
    sampling: str, steps: int, batch: int, length: int, clip: float, seed: int, column: str,
) -> Section:
    """Trains, prints, and returns the report's section."""
    from dlkern import text, training

    corpus = text.corpus(level, min_count=1 if level == "char" else 3)
    size: int | None = embedding or (hidden if level == "word" or tied else None)

    def make(nn: Any) -> models.LanguageModel:
        return models.LanguageModel(
            len(corpus.vocabulary), hidden, layers, cell=cell, embedding=size, dropout=dropout, tied=tied, nn=nn
        )

    with _showing(console, f"{cell} language model", steps) as show:
        result = training.train_language_model(
            make, corpus, steps=steps, batch=batch, length=length, sampling=sampling.replace("-", " "), clip=clip,
            seed=seed, column=column, device=device_here(), progress=show,
        )  # fmt: skip
    theirs, ours = result.torch, result.dlkern
    curve = _curve(result, "perplexity", lambda p: f"{p:.3f}")
    summary = _summary(result, "perplexity, held out", *(f"{run.perplexity[-1][1]:.3f}" for run in (theirs, ours)))
    title = f"{cell} language model of {'characters' if level == 'char' else 'words'}"
    console.print(curve.rich(f"{title}: losses (mean of the last ten steps) and perplexity of held-out text"))
    plots = _print_summary(console, summary, result)
    sample = _continuation(result.models[1], corpus, level, seed)
    console.print("dlkern's model goes on (what it was given in brackets):", sample, markup=False)
    note = (
        f"{layers} × {hidden} units, {len(corpus.vocabulary)} tokens in the vocabulary; {steps} steps of {batch} sequences "
        f"of {length} tokens, {sampling} sampling, Adam, gradients clipped to {clip:g}, both from seed {seed}, a step of each "
        f"in turn; {len(corpus.test)} tokens of {len(corpus.train) + len(corpus.test)} held out; column {column}."
    )
    return Section(title, note, [summary, curve, Table(("dlkern's model goes on",), [[sample]])], plots)


def _continuation(model: models.LanguageModel, corpus: Any, level: str, seed: int) -> str:
    """The beginning of a sentence and what the model would write next."""
    from dlkern.text import tokenize

    count, between = (240, "") if level == "char" else (48, " ")
    prompt = corpus.vocabulary.encode(tokenize("The value of an expression is ", level)).to(device_here())
    generator = torch.Generator(device_here()).manual_seed(seed)
    model.eval()
    added = models.generate(model, prompt, count, temperature=0.7, generator=generator)
    given, written = (between.join(corpus.vocabulary.decode(tokens)) for tokens in (prompt, added))
    return f"[{given}]{between}{written}"


# train translation ---------------------------------------------------------------------------------------------------

_TRANSLATORS = {
    "bahdanau": lambda source, target, nn, width, dropout: models.seq2seq(
        source, target, embedding=width, hidden=width, dropout=dropout, nn=nn
    ),
    "transformer": lambda source, target, nn, width, dropout: models.transformer(
        source, target, width=width, feedforward=2 * width, dropout=dropout, norm_first=True, nn=nn
    ),
}


@train.command("translation")
@click.option("--model", type=click.Choice(list(_TRANSLATORS)), default="bahdanau", show_default=True)
@click.option("--width", default=128, show_default=True, type=click.IntRange(min=4), help="Of embeddings and layers.")
@click.option("--dropout", default=0.0, show_default=True, type=click.FloatRange(0, 1, max_open=True),
              help="Above 0 the two sides drop different elements.")  # fmt: skip
@click.option("--beams", default=4, show_default=True, type=_BATCHES, help="Of the beam search that translates.")
@click.option("--steps", default=200, show_default=True, type=_BATCHES)
@click.option("--batch", default=32, show_default=True, type=_BATCHES, help="Sentence pairs.")
@_settings
def train_translation(folder: str | None, **settings: Any) -> None:
    """English to French on Django's messages: GRU with additive attention, or a Transformer."""
    console = new_console()
    _report_training(console, folder, "a translator", lambda: _train_translation(console, **settings))


def _train_translation(
    console: Console, model: str, width: int, dropout: float, beams: int, steps: int, batch: int, seed: int, column: str
) -> Section:
    """Trains, prints, and returns the report's section."""
    from dlkern import translation

    if model == "transformer" and width % 4:
        raise ValueError(f"--width {width}: the Transformer's four heads need a multiple of 4")
    corpus, device = translation.bilingual(), device_here()
    with _showing(console, model, steps) as show:
        result = translation.train_translation(
            lambda source, target, nn: _TRANSLATORS[model](source, target, nn, width, dropout), corpus, steps=steps,
            batch=batch, seed=seed, column=column, device=device, progress=show,
        )  # fmt: skip
    theirs, ours = result.torch, result.dlkern
    curve = _curve(result, "perplexity", lambda p: f"{p:.3f}")
    summary = _summary(result, "perplexity, held out", *(f"{run.perplexity[-1][1]:.3f}" for run in (theirs, ours)))
    known = translation.Pairs(corpus.train.source[: len(corpus.test)], corpus.train.target[: len(corpus.test)])
    written = {
        name: [translation.translate(network, corpus, part.source, beams=beams) for network in result.models]
        for name, part in (("held out", corpus.test), ("trained on", known))
    }
    for name, part in (("held out", corpus.test), ("trained on", known)):
        for measure, score in (("BLEU", translation.bleu), ("ROUGE-L", translation.rouge_l)):
            summary.rows.append([f"{measure}, {name}", *(f"{score(side, part.target):.2f}" for side in written[name])])
    examples = Table(
        ("English", "Django's French", "torch", "dlkern"),
        [
            [translation.join(tokens) for tokens in row]
            for row in zip(corpus.test.source, corpus.test.target, *written["held out"])
        ][::5],
    )
    title = f"{model} on Django's messages, English to French"
    console.print(curve.rich(f"{title}: losses (mean of the last ten steps) and perplexity of held-out pairs"))
    console.print(examples.rich("held-out sentences, translated by beam search"))
    plots = _print_summary(console, summary, result)
    heat = reports.heat_map(*_attended(result.models[1], corpus, written["held out"][1]), "what dlkern's model attends to")
    note = (
        f"Width {width}; {steps} steps of {batch} pairs, Adam, gradients clipped to 1, both from seed {seed}, a step of each "
        f"in turn; {len(corpus.test)} of {len(corpus.train) + len(corpus.test)} pairs held out; {beams} beams; "
        f"column {column}."
    )
    return Section(title, note, [summary, curve, examples], plots + ([heat] if heat else []))


def _attended(network: Any, corpus: Any, written: list[list[str]]) -> tuple[Any, list[str], list[str]]:
    """The attention of the longest translation: weights [T, S], the tokens written and those read."""
    from dlkern import translation

    index = max(range(len(written)), key=lambda i: len(written[i]))
    pair = translation.Pairs([corpus.test.source[index]], [written[index]])
    batch = translation.as_batch(pair, [0], corpus).to(device_here())
    weights = network.attention_map(batch.source, batch.lengths, batch.given)[0]
    return weights.cpu(), [*pair.target[0], "<end>"], pair.source[0]
