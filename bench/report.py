"""What is written and printed: JSON and CSV for programs, a table and plots for people."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dlkern.bench.harness import Row
from dlkern.bench.targets import Summary

__all__ = ["compare_results", "load", "number", "progress_header", "progress_line", "summary_table", "table", "write"]


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "–"
    if digits == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a plain-text table; the first column to the left, the others to the right."""
    rows = [tuple(header), *(tuple(row) for row in body)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()

    return [line(rows[0]), "  ".join("-" * width for width in widths), *(line(row) for row in rows[1:])]


_PROGRESS = "{:20} {:38} {:4} {:4} {:9} {:9} {:>9} {:>9} {:>8} {:>7} {}"
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
_LAYOUT = {"contiguous": "nchw", "channels_last": "nhwc"}


def progress_header() -> str:
    return _PROGRESS.format(
        "op", "shape", "type", "form", "direction", "column", "ms", "torch ms", "% floor", "ratio", "parity"
    )


def progress_line(row: Row) -> str:
    """One row as it is measured. No ratio where parity failed or another than dlkern's kernels ran."""
    ratio = f"{number(row.ratio)}x" if row.ratio is not None else "–"
    remark = row.parity + (f": {row.note}" if row.note else "")
    return _PROGRESS.format(
        row.op,
        row.shape[:38],
        _SHORT.get(row.dtype, row.dtype),
        _LAYOUT.get(row.layout, row.layout)[:4],
        row.direction,
        row.column[:9],
        number(row.ms),
        number(row.torch_ms),
        number(row.floor_percent, 0),
        ratio,
        remark[:120],
    )


def summary_table(summaries: Sequence[Summary]) -> list[str]:
    """Geometric means per class beside the targets."""
    body = []
    for s in summaries:
        if s.target is None:
            verdict = ""
        else:
            verdict = "reached" if s.ratio >= s.target else f"{100 * (1 - s.ratio / s.target):.0f} % short"
        body.append(
            (
                s.group,
                _SHORT.get(s.dtype, s.dtype),
                _LAYOUT.get(s.layout, s.layout),
                s.direction,
                str(s.rows),
                f"{number(s.ratio)}x",
                number(s.target) + ("x" if s.target else ""),
                verdict,
                f"{number(s.worst)}x",
                number(s.floor_percent, 0),
                str(s.left_out or ""),
            )
        )
    return table(
        ("class", "type", "form", "direction", "rows", "ratio", "target", "", "worst", "% floor", "left out"), body
    )


def write(result: dict[str, Any], directory: Path, plots: bool = True) -> list[Path]:
    """Writes results.json, results.csv, index.html and, where matplotlib is, speedup.png and floor.png."""
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "results.json"]
    written[0].write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    rows = result["rows"]
    if rows:
        path = directory / "results.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        written.append(path)
        drawn = _plots(rows, result, directory) if plots else []
        written += drawn
        path = directory / "index.html"
        path.write_text(_html(result, [plot.name for plot in drawn]))
        written.append(path)
    return written


def load(path: str | Path) -> dict[str, Any]:
    """A results.json, or the one in a folder.

    Raises:
        ValueError: not a results file of this harness.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or "rows" not in result:
        raise ValueError(f"{path}: not a results file of dlkern bench")
    return result


def _key(row: dict[str, Any]) -> str:
    return "|".join(str(row[k]) for k in ("op", "shape", "dtype", "layout", "direction", "column"))


def compare_results(old: str | Path | dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """What changed between two runs, row by row, for rows that both have.

    Judged by the ratio to torch, not by milliseconds: torch ran beside ours both times, so a slower machine cancels.
    A change counts when it is larger than 5 % and the two spreads (20th to 80th percentile) do not meet.

    Args:
        old: a results.json (or its folder, or its content).
        new: the content of another, or what run() returned.

    Returns:
        A dict a row: key, old_ms, new_ms, old_ratio, new_ratio, change (new over old), verdict ("faster", "slower",
        "same", "lost" where there is no ratio any more, "gained").
    """
    before = old if isinstance(old, dict) else load(old)
    previous = {_key(row): row for row in before["rows"]}
    changes = []
    for row in new["rows"]:
        row = row.as_dict() if isinstance(row, Row) else row
        past = previous.get(_key(row))
        if past is None:
            continue
        change, verdict = None, "same"
        if past["ratio"] is None or row["ratio"] is None:
            verdict = "same" if past["ratio"] == row["ratio"] else "lost" if row["ratio"] is None else "gained"
        else:
            change = row["ratio"] / past["ratio"]
            apart = row["ratio_p20"] > past["ratio_p80"] or row["ratio_p80"] < past["ratio_p20"]
            if abs(change - 1) > 0.05 and apart:
                verdict = "faster" if change > 1 else "slower"
        changes.append(
            {
                "key": _key(row),
                "old_ms": past["ms"],
                "new_ms": row["ms"],
                "old_ratio": past["ratio"],
                "new_ratio": row["ratio"],
                "change": change,
                "verdict": verdict,
            }
        )
    return changes


def changes_table(changes: Sequence[dict[str, Any]]) -> list[str]:
    """The rows that changed, then a count."""
    body = [
        (
            c["key"].replace("|", " "),
            number(c["old_ms"]),
            number(c["new_ms"]),
            number(c["old_ratio"]),
            number(c["new_ratio"]),
            number(c["change"]),
            c["verdict"],
        )
        for c in changes
        if c["verdict"] != "same"
    ]
    lines = table(("row", "old ms", "new ms", "old ratio", "new ratio", "change", ""), body) if body else []
    same = sum(c["verdict"] == "same" for c in changes)
    return [*lines, f"{len(changes)} rows in both, {same} unchanged"]


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 82rem; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
th, td { padding: .2rem .6rem; text-align: right }
th { border-bottom: 2px solid #1b1f24; position: sticky; top: 0; background: #fff }
tr:nth-child(even) { background: #f4f6f8 }
td:first-child, th:first-child, td.text { text-align: left } .good { color: #0a6b2d } .bad { color: #a4161a }
img { max-width: 100% } dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
dt { font-weight: 600 }
"""


def _html(result: dict[str, Any], plots: Sequence[str]) -> str:
    def cell(value: Any, kind: str = "") -> str:
        return f"<td{f' class={kind}' if kind else ''}>{html.escape(str(value))}</td>"

    def facts(title: str, entries: dict[str, Any]) -> str:
        items = "".join(
            f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in entries.items() if v
        )
        return f"<details><summary>{title}</summary><dl>{items}</dl></details>"

    machine = result["machine"]
    parts = [
        "<!doctype html><meta charset=utf-8><title>dlkern benchmark</title>",
        f"<style>{_STYLE}</style>",
        "<h1>dlkern benchmark</h1>",
        f"<p>{html.escape(machine.get('gpu') or machine['cpu'])}, torch {html.escape(machine['torch'])}, commit "
        f"{html.escape(machine['commit'] or 'unknown')}, {html.escape(machine['date'])}. The ratio is torch's time "
        "over ours, the median of interleaved pairs; a row whose parity failed shows none. The floor is what the "
        "machine's own memory bandwidth and arithmetic rate allow.</p>",
        facts("Machine", machine),
        facts("Settings of both sides", result["settings"]),
        facts("Ceilings measured", result["floors"]),
        "<h2>By class</h2><table><tr><th>class<th>dtype<th>layout<th>direction<th>rows<th>ratio<th>target<th>worst"
        "<th>% of floor</tr>",
    ]
    for s in result["summary"]:
        kind = "" if s["target"] is None else "good" if s["ratio"] >= s["target"] else "bad"
        parts.append(
            "<tr>"
            + cell(s["group"])
            + cell(s["dtype"])
            + cell(s["layout"])
            + cell(s["direction"])
            + cell(s["rows"])
            + cell(number(s["ratio"]), kind)
            + cell(number(s["target"]))
            + cell(f"{number(s['worst'])} ({s['worst_row']})")
            + cell(number(s["floor_percent"], 0))
            + "</tr>"
        )
    parts.append("</table>" + "".join(f"<p><img src={name} alt={name.split('.')[0]}></p>" for name in plots))
    parts.append(
        "<h2>Rows</h2><table><tr><th>op<th>problem<th>dtype<th>layout<th>direction<th>column<th>ms<th>20–80 %"
        "<th>floor ms<th>% of floor<th>torch ms<th>compile ms<th>ratio<th>20–80 %<th>parity<th>note</tr>"
    )
    for row in result["rows"]:
        kind = "" if row["ratio"] is None else "good" if row["ratio"] >= 1 else "bad"
        spread = f"{number(row['ratio_p20'])}–{number(row['ratio_p80'])}" if row["ratio"] is not None else ""
        parts.append(
            "<tr>"
            + cell(row["op"])
            + cell(f"{row['name']} {row['shape']}", "text")
            + cell(row["dtype"])
            + cell(row["layout"])
            + cell(row["direction"])
            + cell(row["column"])
            + cell(number(row["ms"]))
            + cell(f"{number(row['ms_p20'])}–{number(row['ms_p80'])}")
            + cell(number(row["floor_ms"]))
            + cell(number(row["floor_percent"], 0))
            + cell(number(row["torch_ms"]))
            + cell(number(row["compile_ms"]))
            + cell(number(row["ratio"]), kind)
            + cell(spread)
            + cell(row["parity"], "" if row["parity"].startswith(("ok", "not")) else "bad")
            + cell(row["note"], "text")
            + "</tr>"
        )
    return "\n".join(parts) + "</table>\n"


def _plots(rows: Sequence[dict[str, Any]], result: dict[str, Any], directory: Path) -> list[Path]:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    written = []
    summary = result["summary"]
    if summary:
        labels = [
            f"{s['group']}, {s['dtype']} {_LAYOUT.get(s['layout'], s['layout'])}, {s['direction']}" for s in summary
        ]
        figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.24 * len(summary)), layout="constrained")
        positions = range(len(summary))
        axes.barh(
            positions,
            [s["ratio"] for s in summary],
            color=["#2f6f4f" if s["ratio"] >= 1 else "#b3403a" for s in summary],
        )
        aims = [(i, s["target"]) for i, s in enumerate(summary) if s["target"]]
        axes.plot([t for _, t in aims], [i for i, _ in aims], "k|", markersize=9, markeredgewidth=2, label="target")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set(yticks=list(positions), yticklabels=labels, xscale="log", xlabel="torch's time / ours, geometric mean")
        axes.tick_params(axis="y", labelsize=7)
        axes.invert_yaxis()
        if aims:
            axes.legend()
        written.append(directory / "speedup.png")
        figure.savefig(written[-1], dpi=110)
        pyplot.close(figure)
    timed = [row for row in rows if row["floor_percent"] and row["torch_ms"]]
    if timed:
        figure, axes = pyplot.subplots(figsize=(7, 6), layout="constrained")
        for family in dict.fromkeys(row["family"] for row in timed):
            own = [row for row in timed if row["family"] == family]
            axes.scatter(
                [100 * row["floor_ms"] / row["torch_ms"] for row in own],
                [row["floor_percent"] for row in own],
                s=14,
                alpha=0.7,
                label=family,
            )
        largest = max(max(row["floor_percent"], 100 * row["floor_ms"] / row["torch_ms"]) for row in timed)
        axes.plot([1, max(100, largest)], [1, max(100, largest)], color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="torch, % of the floor", ylabel="dlkern, % of the floor")
        axes.legend()
        written.append(directory / "floor.png")
        figure.savefig(written[-1], dpi=110)
        pyplot.close(figure)
    return written
