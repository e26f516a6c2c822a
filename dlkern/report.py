"""report/index.html: what the demo measured, one file with its plots inside."""

from __future__ import annotations

import base64
import html
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlkern.training import SideBySide

__all__ = ["Section", "Table", "training_plot", "write"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5d9de; }
p.note { color: #57606a; margin-top: .2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid #e6e8eb; }
th { background: #f4f6f8; } td.number, th.number { text-align: right; }
img { max-width: 100%; }
"""

TORCH_COLOUR, DLKERN_COLOUR = "#e8590c", "#1864ab"


class Table:
    """Rows of text under a heading; columns whose every entry is a number are set to the right."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.columns = list(columns)
        self.rows = [[str(cell) for cell in row] for row in rows]

    def numeric(self, i: int) -> bool:
        cells = [row[i] for row in self.rows if row[i] not in ("", "-")]
        return bool(cells) and all(_is_number(cell) for cell in cells)

    def html(self) -> str:
        kinds = [' class="number"' if self.numeric(i) else "" for i in range(len(self.columns))]
        head = "".join(f"<th{k}>{html.escape(c)}</th>" for k, c in zip(kinds, self.columns))
        body = "".join(
            "<tr>" + "".join(f"<td{k}>{html.escape(c)}</td>" for k, c in zip(kinds, row)) + "</tr>" for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def rich(self, title: str = "") -> Any:
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if self.numeric(i) else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("%×"))
    except ValueError:
        return False
    return True


class Section:
    """A heading, a sentence, and what stands under it."""

    def __init__(
        self, title: str, note: str = "", tables: Sequence[Table] = (), plots: Sequence[bytes] = (), link: str = ""
    ) -> None:
        self.title, self.note, self.tables, self.plots, self.link = title, note, list(tables), list(plots), link

    def html(self) -> str:
        parts = [f"<h2>{html.escape(self.title)}</h2>"]
        if self.note:
            parts.append(f'<p class="note">{html.escape(self.note)}</p>')
        for png in self.plots:
            data = base64.b64encode(png).decode()
            parts.append(f'<img alt="{html.escape(self.title)}" src="data:image/png;base64,{data}">')
        parts += [table.html() for table in self.tables]
        if self.link:
            parts.append(f'<p><a href="{html.escape(self.link)}">{html.escape(self.link)}</a></p>')
        return "\n".join(parts)


def make_folder(folder: str | Path) -> Path:
    """The folder, made where it is not there; to be called before what takes long, so that no result has nowhere to go.

    Raises:
        ValueError: it cannot be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder}: cannot write results there: {error.strerror}") from error
    return folder


def write(folder: str | Path, title: str, note: str, sections: Sequence[Section]) -> Path:
    """Writes folder/index.html and the plots beside it, and returns the page's path."""
    folder = make_folder(folder)
    for i, section in enumerate(sections):
        for j, png in enumerate(section.plots):
            (folder / f"{i + 1}-{j + 1}.png").write_bytes(png)
    body = "\n".join(section.html() for section in sections)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f'<p class="note">{html.escape(note)}</p>\n{body}\n</body></html>\n'
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def training_plot(result: SideBySide) -> bytes | None:
    """Loss, accuracy (or perplexity) and time per step of both sides as one PNG; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    losses, quality, times = figure.subplots(1, 3)
    reads = bool(result.torch.perplexity)
    steps = range(1, len(result.torch.losses) + 1)
    # torch's curve is broad and lies beneath: where the two agree, both are seen.
    losses.plot(steps, result.torch.losses, color=TORCH_COLOUR, alpha=0.45, linewidth=4, label="torch")
    losses.plot(steps, result.dlkern.losses, color=DLKERN_COLOUR, linewidth=1, label="dlkern")
    losses.set(title="training loss", xlabel="step", yscale="log")
    for run, colour, width, marker, label in (
        (result.torch, TORCH_COLOUR, 5, "s", "torch"), (result.dlkern, DLKERN_COLOUR, 1.5, "o", "dlkern")
    ):  # fmt: skip
        at, values = zip(*(run.perplexity if reads else [(step, 100 * share) for step, share in run.accuracy]))
        quality.plot(
            at, values, color=colour, linewidth=width, alpha=0.45 if width > 2 else 1, marker=marker,
            markersize=width + 3 if width > 2 else 4, label=label,
        )  # fmt: skip
    quality.set(title="perplexity of held-out text" if reads else "accuracy on held-out digits, %", xlabel="step")
    boxes = times.boxplot(
        [result.torch.milliseconds, result.dlkern.milliseconds], showfliers=False, widths=0.5, patch_artist=True
    )
    for box, colour in zip(boxes["boxes"], (TORCH_COLOUR, DLKERN_COLOUR)):
        box.set(facecolor=colour, alpha=0.5)
    for line in boxes["medians"]:
        line.set_color("black")
    times.set_xticks([1, 2], ["torch", "dlkern"])
    times.set(title="time per step, ms", ylim=(0, None))
    for axes in (losses, quality, times):
        axes.grid(alpha=0.3)
    losses.legend()
    quality.legend(loc="upper right" if reads else "lower right")
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
