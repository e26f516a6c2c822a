"""What the examples share: arguments, training a classifier, the report folder, pictures."""

from __future__ import annotations

import argparse
import ast
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dlkern import nn


def losses(model, stream, steps, optimizer):
    """Trains on the next `steps` batches, (images, labels), of `stream`; the cross-entropy of each."""
    curve = []
    for _ in range(steps):
        images, labels = next(stream)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def positive(text: str) -> int:
    """An argument that is an integer from 1 on."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def run(main: Callable[..., Any], steps: int, **choices: tuple[str, ...]) -> None:
    """Calls main(steps, report) with what the command line says, prints the numbers it returns, and puts the picture on the
    page of all of them.

    choices: further arguments of main, what each may be, the default first.
    """
    parser = argparse.ArgumentParser(description=main.__globals__["__doc__"], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=positive, default=steps, help=f"how long to train (default: {steps})")
    parser.add_argument("--report", type=Path, default=Path("report"), help="folder of the picture (default: report)")
    for name, allowed in choices.items():
        parser.add_argument(f"--{name}", choices=allowed, default=allowed[0], help=f"(default: {allowed[0]})")
    torch.manual_seed(0)
    arguments = parser.parse_args()
    numbers = main(**vars(arguments))
    for name, value in numbers.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    if numbers:  # of several processes one has them
        print(f"report: {page(arguments.report)}")


def page(report: Path) -> Path:
    """Writes <report>/examples.html: the pictures that are there, each under what its script says."""
    parts = ["<!doctype html><meta charset=utf-8><title>dlkern: examples</title>",
             "<style>body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: auto } p { white-space: pre-line }"
             " img { max-width: 100% }</style>"]  # fmt: skip
    for script in sorted(Path(__file__).parent.glob("*.py")):
        if (report / f"{script.stem}.png").exists():
            text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
            parts += [f"<h2>{script.stem}</h2>", *(f"<p>{html.escape(part)}</p>" for part in text.split("\n\n"))]
            parts.append(f'<img src="{script.stem}.png" alt="{script.stem}">')
    path = report / "examples.html"
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return path


def figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, drawn without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def save(drawing: Any, report: Path, name: str) -> Path:
    """Writes <report>/<name>.png and closes the figure."""
    from matplotlib import pyplot

    report.mkdir(parents=True, exist_ok=True)
    path = report / f"{name}.png"
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)
    return path
