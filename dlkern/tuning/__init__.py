"""Measured choices, a JSON file a GPU: <gpu>.json, named as bench/results names its folders ("h200").

{"orders": {"<op>|<dtype>": ["triton", "cuda"], "<op>|<dtype>|<class>": [...]}}: the columns to try, best first. The
class is made of the facts a dispatch function passes ("grouped" of conv2d), never of sizes. `bench/gpu.sh tune` writes
one; what is not in it, and a GPU without a file, gets the default order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path

__all__ = ["key", "load", "slug"]


def slug(name: str) -> str:
    """The file's name for a GPU torch calls `name`: "h200" for "NVIDIA H200"."""
    words = name.lower().replace("nvidia", "").split()
    return re.sub(r"[^a-z0-9]+", "-", words[0] if words else "gpu")


def key(op: str, dtype: str, *facts: Hashable) -> str:
    """An entry's name: key("conv2d", "bfloat16", "grouped")."""
    return "|".join((op, dtype, *map(str, facts)))


def load(name: str, folder: Path = Path(__file__).parent) -> dict[str, list[str]]:
    """The orders measured on the GPU torch calls `name`; {} where there is no file.

    Raises:
        ValueError: the file does not hold orders.
    """
    path = folder / f"{slug(name)}.json"
    if not path.exists():
        return {}
    orders = json.loads(path.read_text()).get("orders")
    if not isinstance(orders, dict) or not all(isinstance(order, list) for order in orders.values()):
        raise ValueError(f"{path}: expected {{'orders': {{'op|dtype': [columns]}}}}")
    return orders
