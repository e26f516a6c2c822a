"""Problems to measure: the shape tables of bench/shapes/*.csv as Shape objects.

Every table has the same columns, but deepbench_conv.csv and deepbench_rnn.csv, which keep DeepBench's own. Pairs are
written `3` or `3x1`; an empty cell is the default. `repeat` is how often the layer occurs in its network.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields, replace
from pathlib import Path

__all__ = ["FAMILIES", "TABLES", "Shape", "load"]

DIRECTORY = Path(__file__).resolve().parent / "shapes"

FAMILIES = {
    "conv2d": "conv",
    "max_pool2d": "pooling",
    "avg_pool2d": "pooling",
    "adaptive_avg_pool2d": "pooling",
    "batch_norm": "batch_norm",
    "batch_norm_eval": "batch_norm",
    "batch_norm_relu": "batch_norm",
    "batch_norm_add_relu": "batch_norm",
    "linear": "linear",
    "linear_relu": "linear",
    "dropout": "dropout",
    "embedding": "embedding",
    "cross_entropy": "loss",
    "layer_norm": "layer_norm",
    "rnn_tanh": "rnn",
    "lstm": "rnn",
    "gru": "rnn",
    "lstm_packed": "rnn",
    "gru_packed": "rnn",
    "attention": "attention",
    "attention_causal": "attention",
    "attention_masked": "attention",
    "attention_additive": "attention",
}
"""op -> family, the file name in every folder."""


@dataclass(frozen=True)
class Shape:
    """One problem.

    A linear layer has `batch` rows, `channels` inputs and `out_channels` outputs; a loss `batch` rows of `channels`
    classes; an embedding `batch` indices of `channels` rows of `out_channels` numbers; adaptive pooling's output size
    stands in `kernel`; layer norm has `batch` rows of `channels`. A recurrent layer reads `batch` sequences of `steps`
    times (a packed one of as many at most) `channels` numbers with `out_channels` units; attention has `batch` times
    `heads` times `steps` queries, and as many keys, of `channels` numbers.
    """

    op: str
    name: str = ""
    repeat: int = 1
    batch: int = 1
    channels: int = 1
    height: int = 1
    width: int = 1
    out_channels: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    steps: int = 1
    heads: int = 1
    input_grad: bool = True
    table: str = ""

    @property
    def family(self) -> str:
        return FAMILIES[self.op]

    @property
    def spatial(self) -> bool:
        """Whether the input is [N, C, H, W], so that memory format means something."""
        return self.family in ("conv", "pooling", "batch_norm") or self.height * self.width > 1

    def _out(self, d: int) -> int:
        if self.op == "adaptive_avg_pool2d":
            return self.kernel[d]
        if self.family not in ("conv", "pooling"):
            return (self.height, self.width)[d]
        size = (self.height, self.width)[d]
        return (size + 2 * self.padding[d] - self.dilation[d] * (self.kernel[d] - 1) - 1) // self.stride[d] + 1

    @property
    def out_height(self) -> int:
        return self._out(0)

    @property
    def out_width(self) -> int:
        return self._out(1)

    @property
    def batch_sizes(self) -> list[int]:
        """Of a recurrent layer, how many sequences each step has; packed ones have all lengths from `steps` to half of it."""
        if not self.op.endswith("_packed"):
            return [self.batch] * self.steps
        lengths = [self.steps - b * self.steps // (2 * self.batch) for b in range(self.batch)]
        return [sum(length > t for length in lengths) for t in range(self.steps)]

    @property
    def input_numel(self) -> int:
        return sum(self.batch_sizes) * self.heads * self.channels * self.height * self.width

    @property
    def output_numel(self) -> int:
        if self.op == "cross_entropy":
            return 1
        positions = sum(self.batch_sizes) * self.heads * self.out_height * self.out_width
        return positions * (self.out_channels or self.channels)

    @property
    def weight_numel(self) -> int:
        if self.op == "conv2d":
            return self.out_channels * (self.channels // self.groups) * self.kernel[0] * self.kernel[1]
        return self.channels * self.out_channels if self.family == "linear" else 0

    @property
    def group(self) -> str:
        """The class whose target it counts towards (bench/targets.py)."""
        if self.op != "conv2d":
            fused = self.op in ("batch_norm_relu", "batch_norm_add_relu")
            by_op = self.family in ("rnn", "attention")
            return "batch_norm fused" if fused else self.op.replace("_", " ") if by_op else self.family
        if self.groups > 1 and self.groups == self.channels:
            return "conv depthwise"
        if self.groups > 1 or self.dilation != (1, 1):
            return "conv grouped, dilated"
        if self.channels <= 8 or max(self.kernel) >= 7:
            return "conv stem, few channels"
        return "conv 1x1" if self.kernel == (1, 1) else "conv dense"

    def __str__(self) -> str:
        def pair(p: tuple[int, int]) -> str:
            return str(p[0]) if p[0] == p[1] else f"{p[0]}x{p[1]}"

        if self.family in ("linear", "embedding"):
            text = f"{self.batch}x{self.channels}->{self.out_channels}"
        elif self.family == "rnn":
            text = f"{self.steps}x{self.batch}x{self.channels}->{self.out_channels}"
        elif self.family == "attention":
            text = f"{self.batch}x{self.heads}x{self.steps}x{self.channels}"
        elif self.spatial:
            text = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        else:
            text = f"{self.batch}x{self.channels}"
        if self.op == "conv2d":
            text += f"->{self.out_channels}"
        if self.family in ("conv", "pooling"):
            text += (" to " if self.op.startswith("adaptive") else " k") + pair(self.kernel)
            for letter, value, default in (
                ("s", self.stride, (1, 1)),
                ("p", self.padding, (0, 0)),
                ("d", self.dilation, (1, 1)),
            ):
                if value != default:
                    text += f" {letter}{pair(value)}"
            if self.groups > 1:
                text += f" g{self.groups}"
        return text

    def with_batch(self, batch: int) -> Shape:
        return replace(self, batch=batch)


TABLES = tuple(sorted(path.stem for path in DIRECTORY.glob("*.csv")))


def load(table: str, batch: int | None = None) -> list[Shape]:
    """The problems of one table, in its order.

    Args:
        table: a name of TABLES, or the path of a CSV file with the same columns.
        batch: replaces the table's batch sizes.

    Raises:
        ValueError: no such table, or a row that makes no sense.
    """
    path = Path(table) if table.endswith(".csv") else DIRECTORY / f"{table}.csv"
    if not path.exists():
        raise ValueError(f"shapes: no table {table!r}; there are {', '.join(TABLES)}")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    deepbench = bool(rows) and "set" in rows[0]
    shapes = []
    seen: set[Shape] = set()
    for line, row in enumerate(rows, start=2):
        try:
            shape = _deepbench(row) if deepbench else _parse(row)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}:{line}: {error}") from error
        shape = replace(shape, table=path.stem, batch=batch or shape.batch)
        if shape.op not in FAMILIES or min(shape.out_height, shape.out_width, shape.batch, shape.channels) < 1:
            raise ValueError(f"{path.name}:{line}: not a problem: {shape}")
        if deepbench and shape in seen:  # its sets overlap
            continue
        seen.add(shape)
        shapes.append(shape)
    return shapes


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition("x")
    return int(first), int(second or first)


def _parse(row: dict[str, str]) -> Shape:
    values: dict[str, object] = {}
    for field in fields(Shape):
        cell = (row.get(field.name) or "").strip()
        if not cell:
            continue
        if field.name in ("op", "name"):
            values[field.name] = cell
        elif field.name in ("kernel", "stride", "padding", "dilation"):
            values[field.name] = _pair(cell)
        else:
            values[field.name] = bool(int(cell)) if field.name == "input_grad" else int(cell)
    return Shape(**values)  # type: ignore[arg-type]


_CELLS = {"vanilla": "rnn_tanh", "lstm": "lstm", "gru": "gru"}


def _deepbench(row: dict[str, str]) -> Shape:
    if "cell" in row:
        batch, hidden, steps = (int(row[key]) for key in ("batch", "hidden", "steps"))
        return Shape(_CELLS[row["cell"]], "deepbench", batch=batch, channels=hidden, out_channels=hidden, steps=steps)
    cell = {key: int(value) for key, value in row.items() if key != "set"}
    return Shape(
        op="conv2d",
        name="deepbench",
        batch=cell["batch"],
        channels=cell["in_channels"],
        height=cell["height"],
        width=cell["width"],
        out_channels=cell["out_channels"],
        kernel=(cell["kernel_h"], cell["kernel_w"]),
        stride=(cell["stride_h"], cell["stride_w"]),
        padding=(cell["pad_h"], cell["pad_w"]),
    )
