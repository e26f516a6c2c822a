"""What the commands of dlkern share: the console, progress bars, the machine in words, errors as messages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import dlkern
from dlkern import _native, columns

__all__ = ["COLUMN", "device_here", "errors_as_messages", "gpu_name", "new_console", "progress_bar", "stamp"]

COLUMN = click.Choice(["auto", *columns.COLUMNS])


def new_console() -> Console:
    # Into a file or a pipe: wide enough for the tables, no colours.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turns an error that the user's arguments caused into a message and exit code 1."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def gpu_name() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees"
    capability = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{capability[0]}{capability[1]}"


def stamp() -> str:
    isa = _native.facts().get("cpu_isa", "no native")
    where = gpu_name() if torch.cuda.is_available() else f"CPU with {isa} code, {torch.get_num_threads()} threads"
    return f"dlkern {dlkern.__version__}, torch {torch.__version__}, {where}"


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
