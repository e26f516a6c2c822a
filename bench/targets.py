"""The speed the project aims at, and the geometric means that answer.

CPU targets are for two cores with AVX-512, float32, against eager torch in a steady state; GPU targets for an H200.
A target is torch's time over ours, geometric mean over a class of rows of a fixed list.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dlkern.bench.harness import Row

__all__ = ["Summary", "geometric_mean", "summarize", "target"]

# class -> direction -> layout ("" for both) -> ratio
CPU: dict[str, dict[str, dict[str, float]]] = {
    "conv dense": {"forward": {"": 1.0}, "training": {"": 1.05}},
    "conv 1x1": {"forward": {"": 1.3}, "training": {"contiguous": 1.7, "channels_last": 1.25}},
    "conv stem, few channels": {"forward": {"": 1.2}, "training": {"": 2.2}},
    "conv grouped, dilated": {"forward": {"": 1.5}, "training": {"": 1.7}},
    "conv depthwise": {"forward": {"": 1.5}, "training": {"": 2.5}},
    "pooling": {
        "forward": {"contiguous": 8.0, "channels_last": 1.5},
        "training": {"contiguous": 5.0, "channels_last": 1.5},
    },
    "batch_norm": {
        "forward": {"contiguous": 3.0, "channels_last": 1.3},
        "training": {"contiguous": 2.5, "channels_last": 1.3},
    },
    "batch_norm fused": {"forward": {"": 4.0}, "training": {"": 3.0}},
    "linear": {"forward": {"": 1.6}, "training": {"": 1.6}},
    "lstm": {"forward": {"": 1.4}, "training": {"": 1.5}},
    "gru": {"forward": {"": 3.5}, "training": {"": 4.0}},
    "lstm packed": {"training": {"": 4.0}},
    "gru packed": {"training": {"": 4.0}},
    "rnn tanh": {"forward": {"": 1.8}, "training": {"": 2.5}},
    "attention": {"forward": {"": 2.0}, "training": {"": 2.0}},
    "attention causal": {"forward": {"": 3.0}, "training": {"": 3.0}},
    "attention masked": {"forward": {"": 2.0}, "training": {"": 2.0}},
    "attention additive": {"forward": {"": 15.0}, "training": {"": 10.0}},
    "layer_norm": {"forward": {"": 1.5}, "training": {"": 1.5}},
}
GPU: dict[str, dict[str, dict[str, float]]] = {
    "conv dense": {"forward": {"": 1.0}, "training": {"": 1.0}},
    "conv 1x1": {"forward": {"": 1.0}, "training": {"": 1.0}},
    "conv stem, few channels": {"forward": {"": 2.0}, "training": {"": 2.0}},
    "conv grouped, dilated": {"forward": {"": 2.0}, "training": {"": 2.0}},
    "conv depthwise": {"forward": {"": 2.0}, "training": {"": 2.0}},
    "pooling": {"forward": {"": 2.5}, "training": {"": 2.5}},
    "batch_norm": {"forward": {"": 2.5}, "training": {"": 2.5}},
    "batch_norm fused": {"forward": {"": 2.5}, "training": {"": 2.5}},
}


def target(device: str, group: str, direction: str, layout: str) -> float | None:
    """The ratio aimed at for a class, or None where none was set."""
    by_layout = (CPU if device == "cpu" else GPU).get(group, {}).get(direction, {})
    return by_layout.get(layout, by_layout.get(""))


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean.

    Raises:
        ValueError: no values, or one that is not positive.
    """
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("geometric_mean: no values")
    return math.exp(sum(logs) / len(logs))


@dataclass(frozen=True)
class Summary:
    """One class: the geometric mean of its rows' ratios, the worst row, and the target beside them."""

    group: str
    dtype: str
    layout: str
    direction: str
    rows: int
    ratio: float
    worst: float
    worst_row: str
    floor_percent: float
    target: float | None
    left_out: int  # rows of the class without a ratio

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(rows: Iterable[Row], device: str) -> list[Summary]:
    """A Summary for each class, dtype, layout and direction that has a ratio, in the order of the rows."""
    classes: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        classes.setdefault((row.group, row.dtype, row.layout, row.direction), []).append(row)
    found = []
    for (group, dtype, layout, direction), members in classes.items():
        timed = [row for row in members if row.ratio is not None]
        if not timed:
            continue
        worst = min(timed, key=lambda row: row.ratio or 0.0)
        floors = [row.floor_percent for row in timed if row.floor_percent]
        found.append(
            Summary(
                group,
                dtype,
                layout,
                direction,
                len(timed),
                geometric_mean(row.ratio or 1.0 for row in timed),
                worst.ratio or 0.0,
                f"{worst.name}: {worst.shape}",
                geometric_mean(floors) if floors else 0.0,
                target(device, group, direction, layout),
                len(members) - len(timed),
            )
        )
    return found
