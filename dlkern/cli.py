"""The `dlkern` command: info, check, compare, train, bench, demo."""

from __future__ import annotations

import contextlib
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import dlkern
from dlkern import _native, columns, models
from dlkern import report as reports
from dlkern.report import Section, Table
from dlkern.testing._parity import Certificate, Row
from dlkern.testing._training import check_training

__all__ = ["main"]

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_COLUMN = click.Choice(["auto", *columns.COLUMNS])


def _console() -> Console:
    # Into a file or a pipe: wide enough for the tables, no colours.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _errors_as_messages() -> Iterator[None]:
    """Turns an error that the user's arguments caused into a message and exit code 1."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dlkern.__version__, prog_name="dlkern")
def main() -> None:
    """dlkern: fast kernels for the classic deep-learning layers, as drop-in PyTorch ops that train."""


# info ----------------------------------------------------------------------------------------------------------------


def _versions() -> Table:
    facts = _native.facts()
    build: dict[str, str] = facts.get("build", {})
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    made_with = f"{build['compiler']}, torch {build['torch']}" if build else facts.get("error", "")
    rows = [
        ("dlkern", dlkern.__version__),
        ("native library", "loaded" if _native.load() else str(_native.LIBRARY_ERROR)),
        ("built with", made_with),
        ("CUDA kernels built for", build.get("cuda_architectures") or "none: built without nvcc, or left out"),
        ("torch", torch.__version__),
        ("triton", triton_version),
        ("python", platform.python_version()),
        ("CPU", f"{facts.get('cpu_isa', 'unknown')} code, {torch.get_num_threads()} threads"),
        ("CPU features", ", ".join(k for k, v in facts.get("cpu_features", {}).items() if v) or "none looked at"),
        ("GPU", _gpu()),
    ]
    return Table(("what", "here"), rows)


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees"
    capability = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{capability[0]}{capability[1]}"


def _why_not(column: str) -> str | None:
    """Why a column cannot serve any call on this machine, or None."""
    reason = columns.unavailable(column)
    if reason is None and column in ("triton", "cuda") and not torch.cuda.is_available():
        reason = "serves CUDA tensors, and torch sees no GPU"
    return reason


def _columns() -> Table:
    rows = []
    for column in columns.COLUMNS:
        reason = _why_not(column)
        rows.append((column, "no" if reason else "yes", reason or ""))
    return Table(("column", "available", "why not"), rows)


@main.command()
def info() -> None:
    """What this machine and this build have, and which columns can run."""
    console = _console()
    console.print(_versions().rich("dlkern on this machine"))
    console.print(_columns().rich("columns"))
    kernels = _native.facts().get("cuda_kernels", [])
    if kernels:
        names = list(dict.fromkeys(key for kernel in kernels for key in kernel))
        rows = [[kernel.get(name, "") for name in names] for kernel in kernels]
        console.print(Table(names, rows).rich("CUDA kernels"))


# check ---------------------------------------------------------------------------------------------------------------


def _with_layout(inputs: list[Any], channels_last: bool) -> list[Any]:
    if channels_last:
        inputs[0] = inputs[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    return inputs


def _certify(case: Any, column: str, dtype: torch.dtype, device: torch.device) -> tuple[list[Certificate], str]:
    """Certificates of a case in its layouts, and why the column did not serve it ("" where it did)."""
    certificates = []
    for channels_last in (False, True) if case.images else (False,):

        def inputs(channels_last: bool = channels_last) -> list[Any]:
            drawn = [
                x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
                for x in case.inputs()
            ]
            return _with_layout(drawn, channels_last)

        with columns.backend(column), dlkern.trace() as calls:
            label = f"{case.name}{', channels_last' if channels_last else ''}"
            certificate = dlkern.testing.check(
                case.ours, case.theirs, inputs, dtype=dtype, draws=case.draws, name=label
            )
        handed_on = {call.reason for call in calls if call.backend != column}
        if handed_on:
            return [], "; ".join(sorted(handed_on))
        certificates.append(certificate)
    return certificates, ""


@main.command()
@click.argument("op", required=False)
@click.option("--column", "only_column", type=click.Choice(columns.COLUMNS), help="One column instead of all.")
@click.option("--dtype", "only_dtype", type=click.Choice(list(_DTYPES)), help="One dtype instead of all.")
@click.option("-v", "--verbose", is_flag=True, help="List every case.")
def check(op: str | None, only_column: str | None, only_dtype: str | None, verbose: bool) -> None:
    """Parity certificates: every op, or OP, in every column and dtype, against float64.

    The rule: an error of at most twice torch's own in the same dtype, or one unit roundoff; outputs, gradients and
    their borders. The exit code is 1 where it is broken.
    """
    from dlkern.testing import CASES

    ops = list(dict.fromkeys(case.op for case in CASES))
    if op is not None and op not in ops:
        raise click.BadParameter(f"no op {op!r}; there are {', '.join(ops)}", param_hint="OP")
    if only_column and (reason := _why_not(only_column)):
        raise click.ClickException(f"the {only_column} column is not available: {reason}")
    chosen = [only_column] if only_column else [c for c in columns.COLUMNS if not _why_not(c)]
    dtypes = [only_dtype] if only_dtype else list(_DTYPES)
    console, failures, rows = _console(), [], []
    with _progress(console) as progress:
        total = len(chosen) * len(dtypes) * sum(op in (None, case.op) for case in CASES)
        task = progress.add_task("checking", note="", total=total)
        for name in ops if op is None else [op]:
            for column in chosen:
                device = torch.device("cuda") if column in ("triton", "cuda") else torch.device("cpu")
                for dtype in dtypes:
                    certificates: list[Certificate] = []
                    left_out: set[str] = set()
                    for case in (c for c in CASES if c.op == name):
                        torch.manual_seed(0)
                        found, why = _certify(case, column, _DTYPES[dtype], device)
                        certificates += found
                        left_out |= {why} if why else set()
                        progress.advance(task)
                    failures += [c for c in certificates if not c.ok]
                    rows.append(_check_row(name, column, dtype, certificates, left_out))
                    if verbose:
                        rows += [_check_row(f"  {c.name}", column, dtype, [c], set()) for c in certificates]
    heads = ("op", "column", "dtype", "cases", "error / limit, worst", "where", "result")
    console.print(Table(heads, rows).rich("parity against float64"))
    for certificate in failures:
        console.print(str(certificate), markup=False)
    console.print(f"{len(failures)} failed" if failures else "all keep the rule")
    if failures:
        sys.exit(1)


def _ratio(row: Row) -> float:
    return float("inf") if row.error != row.error else row.error / (row.limit or 1e-300)


def _check_row(op: str, column: str, dtype: str, certificates: list[Certificate], left_out: set[str]) -> list[str]:
    if not certificates:
        return [op, column, dtype, "0", "-", "", "; ".join(sorted(left_out))]
    measured = [c.worst() for c in certificates if c.rows]
    worst = max(measured, key=_ratio) if measured else None
    failed = sum(not c.ok for c in certificates)
    result = f"{failed} FAILED" if failed else "ok"
    if left_out:
        result += f" (not here: {'; '.join(sorted(left_out))})"
    return [
        op, column, dtype, str(len(certificates)), f"{_ratio(worst):.2f}" if worst else "-",
        f"{worst.tensor}, {worst.region}" if worst else "", result,
    ]  # fmt: skip


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


# compare -------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("model")
@click.option(
    "--input", "inputs", multiple=True, required=True, metavar="SIZES[:DTYPE[:BELOW]]",
    help="A random input of these sizes, 8,3,224,224; 8,128:int64:1000 for integers below 1000. Repeat for several.",
)  # fmt: skip
@click.option("--forward-only", is_flag=True, help="No gradients.")
@click.option("--seconds", default=2.0, show_default=True, help="How long to time the whole model.")
@click.option("--layer-seconds", default=0.1, show_default=True, help="How long to time each different layer.")
def compare(model: str, inputs: Sequence[str], forward_only: bool, seconds: float, layer_seconds: float) -> None:
    """What dlkern would do for MODEL (package.module:factory): what it swaps, parity, speed, a table by layer."""
    from dlkern.comparison import compare_models, load_model, parse_input

    console, device = _console(), _device()
    generator = torch.Generator().manual_seed(0)
    with _errors_as_messages():
        loaded = load_model(model).to(device)
        tensors = [parse_input(text, generator).to(device) for text in inputs]
        try:
            found = compare_models(
                loaded, tensors, backward=not forward_only, seconds=seconds, layer_seconds=layer_seconds
            )
        except Exception as error:
            raise ValueError(f"{model} on inputs {', '.join(inputs)}: {type(error).__name__}: {error}") from error
    from dlkern.convert import report_table

    console.print(report_table(found.modules).rich("whose kernels each module runs on"))
    if found.functional:
        ops = ", ".join(f"{op} ×{n}" for op, n in _count(call.op for call in found.functional))
        console.print(f"called as functions, which `with dlkern.enabled():` would take as well: {ops}")
    elsewhere = [call for call in found.calls if call.backend in ("torch", "reference")]
    for op, reason in dict.fromkeys((call.op, call.reason) for call in elsewhere):
        console.print(f"handed on: {op}, because {reason}")
    if found.layers:
        console.print(_layers(found.layers).rich("by layer"))
    console.print(_whole_model(found.forward, found.training).rich("the whole model"))
    console.print(_parity_line(found.rows))
    if not found.ok:
        sys.exit(1)


def _count(names: Iterator[str]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return list(counts.items())


def _layers(layers: Sequence[Any]) -> Table:
    heads = ["layer", "class", "input", "column", "forward ms, torch", "dlkern", "ratio"]
    rows = [
        [x.name, x.kind, "×".join(map(str, x.shape)), x.backends, *_timing(x.forward)] for x in layers
    ]  # fmt: skip
    if any(x.training for x in layers):
        heads += ["with backward, torch", "dlkern", "ratio"]
        rows = [row + list(_timing(x.training) if x.training else "---") for row, x in zip(rows, layers)]
    return Table(heads, rows)


def _timing(timing: Any) -> tuple[str, str, str]:
    return f"{timing.torch_ms:.3g}", f"{timing.dlkern_ms:.3g}", f"{timing.ratio:.2f}×"


def _whole_model(forward: Any, training: Any) -> Table:
    rows = [["forward, no grad", *_timing(forward)]]
    if training is not None:
        rows.append(["forward + backward", *_timing(training)])
    return Table(("", "torch ms", "dlkern ms", "torch / dlkern"), rows)


def _parity_line(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if not row.ok]
    worst = max(rows, key=_ratio)
    lines = [f"parity: {'FAILED' if failed else 'ok'}, {len({r.tensor for r in rows})} tensors against float64"]
    for row in failed or [worst]:
        lines.append(f"  {row.tensor} ({row.measure}): error {row.error:.3g}, limit {row.limit:.3g}")
    return "\n".join(lines)


# train ---------------------------------------------------------------------------------------------------------------

_BATCHES = click.IntRange(min=1)


def _settings(command: Any) -> Any:
    """The options that every training has."""
    for option in (
        click.option("--report", "folder", type=click.Path(file_okay=False), help="Write DIR/index.html with the plots."),
        click.option("--column", type=_COLUMN, default="auto", show_default=True),
        click.option("--seed", default=0, show_default=True),
    ):
        command = option(command)
    return command


@main.group()
def train() -> None:
    """Train a network with torch and with dlkern side by side, from the same seed."""


def _report_training(console: Console, folder: str | None, name: str, run: Callable[[], Section]) -> None:
    with _errors_as_messages():
        if folder:
            reports.make_folder(folder)
        section = run()
        if folder:
            console.print(f"report: {reports.write(folder, f'dlkern: training {name}', _stamp(), [section])}")


@train.command("lenet")
@click.option("--steps", default=400, show_default=True, type=_BATCHES)
@click.option("--batch", default=64, show_default=True, type=_BATCHES)
@_settings
def train_lenet(steps: int, batch: int, seed: int, column: str, folder: str | None) -> None:
    """LeNet on scikit-learn's digits."""
    console = _console()
    _report_training(console, folder, "lenet", lambda: _train(console, steps, batch, seed, column)[0])


@contextlib.contextmanager
def _showing(console: Console, what: str, steps: int) -> Iterator[Any]:
    """A progress bar with both sides' losses; gives what a training calls after each step."""
    with _progress(console) as progress:
        task = progress.add_task(f"{what}, torch and dlkern", total=steps, note="")

        def show(step: int, so_far: Any) -> None:
            note = f"loss {so_far.torch.losses[-1]:.4f} | {so_far.dlkern.losses[-1]:.4f}"
            progress.update(task, completed=step, note=note)

        yield show


def _train(console: Console, steps: int, batch: int, seed: int, column: str) -> tuple[Section, float]:
    """Trains LeNet, prints, and returns the report's section and dlkern's accuracy."""
    from dlkern.training import digits, train_side_by_side

    data = digits()
    with _showing(console, "lenet", steps) as show:
        result = train_side_by_side(
            lambda nn: models.lenet(nn=nn), data, steps=steps, batch=batch, seed=seed, column=column, device=_device(),
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
    console = _console()
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
            seed=seed, column=column, device=_device(), progress=show,
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
    prompt = corpus.vocabulary.encode(tokenize("The value of an expression is ", level)).to(_device())
    generator = torch.Generator(_device()).manual_seed(seed)
    model.eval()
    added = models.generate(model, prompt, count, temperature=0.7, generator=generator)
    given, written = (between.join(corpus.vocabulary.decode(tokens)) for tokens in (prompt, added))
    return f"[{given}]{between}{written}"


def _stamp() -> str:
    isa = _native.facts().get("cpu_isa", "no native")
    where = _gpu() if torch.cuda.is_available() else f"CPU with {isa} code, {torch.get_num_threads()} threads"
    return f"dlkern {dlkern.__version__}, torch {torch.__version__}, {where}"


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
    console = _console()
    _report_training(console, folder, "a translator", lambda: _train_translation(console, **settings))


def _train_translation(
    console: Console, model: str, width: int, dropout: float, beams: int, steps: int, batch: int, seed: int, column: str
) -> Section:
    """Trains, prints, and returns the report's section."""
    from dlkern import translation

    if model == "transformer" and width % 4:
        raise ValueError(f"--width {width}: the Transformer's four heads need a multiple of 4")
    corpus, device = translation.bilingual(), _device()
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
    batch = translation.as_batch(pair, [0], corpus).to(_device())
    weights = network.attention_map(batch.source, batch.lengths, batch.given)[0]
    return weights.cpu(), [*pair.target[0], "<end>"], pair.source[0]


# bench ---------------------------------------------------------------------------------------------------------------


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: Sequence[str]) -> None:
    """Benchmarks with floors; `dlkern bench --help` lists what it takes."""
    from dlkern import bench as benchmark

    sys.exit(benchmark.main(list(arguments)))


# demo ----------------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--steps", default=400, show_default=True, type=click.IntRange(min=1), help="Of LeNet's training.")
@click.option("--report", "folder", default="report", show_default=True, type=click.Path(file_okay=False))
@click.option("--bench/--no-bench", "with_bench", default=True, help="End with the quick benchmark.")
def demo(steps: int, folder: str, with_bench: bool) -> None:
    """Everything at a glance: train LeNet, a ResNet-18 step, a quick benchmark, and a report."""
    console = _console()
    with _errors_as_messages():
        reports.make_folder(folder)
    versions, available = _versions(), _columns()
    console.print(versions.rich("dlkern on this machine"))
    console.print(available.rich("columns"))
    with _errors_as_messages():
        lenet, accuracy = _train(console, steps, 64, 0, "auto")
    sections = [lenet]
    ok = True
    for section, good in (_lenet_parity(console), _resnet_step(console)):
        sections.append(section)
        ok &= good
    if with_bench:
        sections.append(_quick_bench(console, Path(folder) / "bench"))
    sections.append(Section("This machine", tables=[versions, available]))
    path = reports.write(folder, "dlkern demo", _stamp(), sections)
    console.print(f"accuracy on held-out digits: {100 * accuracy:.2f}%; parity: {'ok' if ok else 'FAILED'}")
    console.print(f"report: {path}")
    if not ok:
        sys.exit(1)


def _certificate_section(console: Console, title: str, note: str, certificate: Any) -> Section:
    console.print(f"{title}, {_parity_line(certificate.rows)}", markup=False)
    worst = sorted(certificate.rows, key=_ratio, reverse=True)[:5]
    rows = [[r.tensor, r.measure, f"{r.error:.2e}", f"{r.limit:.2e}", "ok" if r.ok else "FAILED"] for r in worst]
    return Section(title, note, [Table(("nearest to its limit", "measure", "error", "limit", "result"), rows)])


_RULE = (
    "The rule: our distance to torch's float64 run is at most twice the largest of five torch float32 runs whose "
    "inputs were moved by one unit in the last place."
)


def _lenet_parity(console: Console) -> tuple[Section, bool]:
    from dlkern.training import batches, digits

    device = _device()
    stream = batches(digits(), 32, 1)
    drawn = [(x.to(device), y.to(device)) for x, y in (next(stream) for _ in range(20))]
    torch.manual_seed(0)
    certificate = check_training(lambda nn: models.lenet(nn=nn).to(device), drawn, name="LeNet, 20 steps")
    note = f"Output, gradients, loss curve and final weights. {_RULE}"
    return _certificate_section(console, "LeNet, 20 training steps", note, certificate), certificate.ok


def _resnet_step(console: Console, batch: int = 8) -> tuple[Section, bool]:
    from dlkern.comparison import interleave

    device = _device()
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 64, 64).to(device), torch.randint(0, 10, (batch,)).to(device)
    make = lambda nn: models.resnet18(10, nn=nn).to(device)  # noqa: E731
    certificate = check_training(make, [(images, labels)], name="ResNet-18, one step")
    note = f"{batch} images of 3×64×64: output, every gradient, weights and running statistics after. {_RULE}"
    section = _certificate_section(console, "ResNet-18, one training step", note, certificate)

    def stepper(nn: Any) -> Any:
        model = make(nn)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return step

    timing = interleave(stepper(torch.nn), stepper(dlkern.nn), device, seconds=3.0)
    times = Table(("", "torch ms", "dlkern ms", "torch / dlkern"), [["ResNet-18 training step", *_timing(timing)]])
    console.print(times.rich())
    section.tables.insert(0, times)
    return section, certificate.ok


def _quick_bench(console: Console, folder: Path) -> Section:
    from dlkern import bench as benchmark

    def echo(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    result = benchmark.run(quick=True, output=folder, overhead=False, echo=echo)
    rows = [
        [row.op, row.shape, row.layout, row.direction, row.column, _number(row.ms), _number(row.torch_ms),
         _number(row.ratio, "×"), _number(row.floor_percent, "%"), row.parity]
        for row in result.rows
    ]  # fmt: skip
    heads = ("op", "shape", "layout", "direction", "column", "ms", "torch ms", "ratio", "of the floor", "parity")
    note = "Small problems, a few runs each: a first impression, not the measurement `dlkern bench` makes."
    return Section("Quick benchmark", note, [Table(heads, rows)], link="bench/index.html")


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.3g}{unit}"
