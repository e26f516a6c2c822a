"""The numerics rule, and the certificate that shows it op by op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

__all__ = ["Certificate", "Row", "check", "compare", "unit_roundoff"]

# A border smaller than this has no meaningful relative error of its own: chance decides it.
_SMALLEST_REGION = 8

# Unit roundoff of float64 over float32's.
_DOUBLE_IN_SINGLE = 2.0**-29


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: 2**-24 for float32, 2**-8 for bfloat16."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Row:
    """One comparison: `error` and `baseline` (torch's) relative to the float64 reference, against `limit`."""

    tensor: str
    region: str
    measure: str  # "norm" or "max"
    error: float
    baseline: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass
class Certificate:
    """What `check` found, one row a tensor, region and measure."""

    name: str
    dtype: torch.dtype
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # broken promises other than parity

    @property
    def ok(self) -> bool:
        return bool(self.rows) and not self.notes and all(row.ok for row in self.rows)

    def worst(self) -> Row:
        """The row nearest to, or farthest over, its limit."""
        return max(self.rows, key=lambda row: float("inf") if row.error != row.error else row.error / (row.limit or 1e-300))

    def raise_if_failed(self) -> None:
        """Raises AssertionError that lists every row over its limit."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        failed = [row for row in self.rows if not row.ok]
        head = f"{self.name} {str(self.dtype).removeprefix('torch.')}: {'ok' if self.ok else 'FAILED'}"
        lines = [head, *self.notes]
        for row in failed or [self.worst()] if self.rows else []:
            lines.append(
                f"  {row.tensor} [{row.region}] {row.measure}: {row.error:.3g} "
                f"(torch {row.baseline:.3g}, limit {row.limit:.3g})"
            )
        return "\n".join(lines)


def _regions(shape: torch.Size) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The whole tensor, the first and last slice along each dimension, and the corners of the last two."""
    yield "whole", ()
    for d, size in enumerate(shape):
        if size < 2:
            continue
        for label, index in (("first", 0), ("last", size - 1)):
            yield f"{label} of dim {d}", (slice(None),) * d + (index,)
    if len(shape) >= 3 and shape[-1] > 1 and shape[-2] > 1:
        for i in (0, shape[-2] - 1):
            for j in (0, shape[-1] - 1):
                yield f"corner {i},{j}", (..., i, j)


def _errors(difference: torch.Tensor, reference: torch.Tensor, absolute: bool) -> tuple[float, float]:
    if absolute:
        return difference.norm().item(), difference.abs().max().item()
    norm, largest = reference.norm(), reference.abs().max()
    tiny = torch.finfo(torch.float64).tiny
    return (difference.norm() / (norm + tiny)).item(), (difference.abs().max() / (largest + tiny)).item()


def compare(
    name: str, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> list[Row]:
    """Rows of one tensor, over several draws of the inputs, by the rule.

    Args:
        name: what to call the tensor.
        ours, theirs: it as dlkern and as torch computed it, a tensor a draw.
        reference: it in float64.
        dtype: the dtype computed in, whose unit roundoff is always allowed.

    A border's error may be as large as twice torch's over that border or over the whole tensor. Where the reference
    is zero but for rounding (a convolution's bias before batch norm), absolute sizes are compared.
    """
    rows: list[Row] = []
    u = unit_roundoff(dtype)
    draws = [tuple(t.detach().double().cpu() for t in triple) for triple in zip(ours, theirs, reference)]
    if draws[0][2].numel() == 0:
        return rows
    whole: dict[str, float] = {}
    scale = max(t.abs().max().item() for _, t, _ in draws)
    true_zero = max(r.abs().max().item() for _, _, r in draws) <= u * u * scale
    for region, index in _regions(draws[0][2].shape):
        parts = [tuple(t[index].reshape(-1) for t in triple) for triple in draws]
        a, b, r = (torch.cat(column) for column in zip(*parts))
        if region != "whole" and a.numel() < _SMALLEST_REGION:
            continue
        special = ~torch.isfinite(r)
        if special.any():  # NaN and infinities must be the same ones; the rest is measured
            same = torch.equal(torch.nan_to_num(a[special], nan=0.5), torch.nan_to_num(r[special], nan=0.5))
            a, b, r = a[~special], b[~special], r[~special]
            if not same:
                rows.append(Row(name, region, "max", float("nan"), 0.0, 0.0))
            if a.numel() == 0:
                continue
        for measure, error, baseline in zip(("norm", "max"), _errors(a - r, r, true_zero), _errors(b - r, r, true_zero)):
            if region == "whole":
                whole[measure] = baseline
            limit = max(2 * baseline, 2 * whole[measure], 0.0 if true_zero else u)
            rows.append(Row(name, region, measure, error, baseline, limit))
    return rows


def _leaves(inputs: Sequence[Any], dtype: torch.dtype | None) -> list[Any]:
    """The inputs as leaves of a new graph, floating-point ones cast to dtype; integers and settings as they are."""
    result = []
    for x in inputs:
        if isinstance(x, torch.Tensor):
            y = x.detach().clone(memory_format=torch.preserve_format)
            if x.is_floating_point() and dtype is not None:
                y = y.to(dtype)
            result.append(y.requires_grad_(x.requires_grad and y.is_floating_point()))
        else:
            result.append(x)
    return result


def _as_tuple(output: Any) -> tuple[torch.Tensor, ...]:
    outputs = output if isinstance(output, tuple | list) else (output,)
    return tuple(t for t in outputs if isinstance(t, torch.Tensor) and t.is_floating_point())


def _run(
    function: Callable[..., Any], inputs: Sequence[Any], dtype: torch.dtype | None, cotangents: Sequence[torch.Tensor] | None
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor], list[str], tuple[torch.Tensor, ...]]:
    """Outputs, gradients, names of the gradients, cotangents used."""
    leaves = _leaves(inputs, dtype)
    outputs = _as_tuple(function(*leaves))
    if cotangents is None:
        cotangents = [torch.randn(o.shape, dtype=torch.float64).to(o.device) for o in outputs]
    wanted = [(f"grad of input {i}", x) for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.requires_grad]
    gradients: list[torch.Tensor] = []
    if wanted:
        pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents) if o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs], [x for _, x in wanted], [c for _, c in pairs], allow_unused=True
        )
        gradients = [torch.zeros_like(x) if g is None else g for g, (_, x) in zip(found, wanted)]
    return outputs, gradients, [n for n, _ in wanted], tuple(cotangents)


def check(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Callable[[], Sequence[Any]] | Sequence[Any],
    *,
    dtype: torch.dtype = torch.float32,
    baseline: Callable[..., Any] | None = None,
    draws: int = 1,
    name: str = "op",
) -> Certificate:
    """The parity certificate of one op: of dlkern's, or of your own against your reference.

    Args:
        function: what is checked; called with the inputs in `dtype`.
        reference: the same function, called with the inputs rounded to `dtype` and widened to float64.
        inputs: positional arguments, or a function that draws them anew; tensors that require grad get theirs
            checked. Never zeros: those hide unwritten outputs.
        dtype: the dtype to check in.
        baseline: whose error is the measure, called in `dtype`; the reference's where None, which is torch's own op
            when the reference is a torch function.
        draws: how often the inputs are drawn; small outputs (a loss) need several for an error to mean something.
        name: for the certificate's heading.

    Returns:
        A Certificate; `.ok` says whether every row keeps the rule, and whether inputs were left unchanged and two
        runs gave the same bits.
    """
    certificate = Certificate(name, dtype)
    double = dtype == torch.float64
    columns: dict[str, list[list[torch.Tensor]]] = {}
    for _ in range(draws):
        drawn = list(inputs() if callable(inputs) else inputs)
        rounded = _leaves(drawn, dtype)
        before = [x.detach().clone() if isinstance(x, torch.Tensor) else None for x in rounded]
        exact, exact_grads, _, cotangents = _run(reference, rounded, torch.float64, None)
        cotangents = tuple(c.to(dtype).double() for c in cotangents)
        exact, exact_grads, names, _ = _run(reference, rounded, torch.float64, cotangents)
        theirs, their_grads, _, _ = _run(baseline or reference, rounded, dtype, cotangents)
        float32_errors: list[torch.Tensor] = []
        if double:
            float32_errors = _float32_errors(baseline or reference, reference, rounded, cotangents)
        state = torch.random.get_rng_state()
        ours, our_grads, _, _ = _run(function, rounded, dtype, cotangents)
        torch.random.set_rng_state(state)
        again, again_grads, _, _ = _run(function, rounded, dtype, cotangents)
        for x, b in zip(rounded, before):
            if b is not None and not torch.equal(torch.nan_to_num(x.detach()), torch.nan_to_num(b)):
                certificate.notes.append("  an input was changed")
        for first, second in zip((*ours, *our_grads), (*again, *again_grads)):
            if not torch.equal(torch.nan_to_num(first.detach()), torch.nan_to_num(second.detach())):
                certificate.notes.append("  two runs gave different bits")
        labels = [f"output {i}" if len(ours) > 1 else "output" for i in range(len(ours))] + names
        for i, (label, a, b, r) in enumerate(
            zip(labels, (*ours, *our_grads), (*theirs, *their_grads), (*exact, *exact_grads))
        ):
            if a.shape != r.shape or a.dtype != b.dtype:
                certificate.notes.append(
                    f"  {label}: shape {tuple(a.shape)} {a.dtype}, torch has {tuple(r.shape)} {b.dtype}"
                )
                continue
            if double:  # torch's float32 error stands for its float64 one, and ours is magnified to that scale
                a, b, r = a.detach(), b.detach(), r.detach()
                a = torch.where(torch.isfinite(a - r), r + (a - r) / _DOUBLE_IN_SINGLE, a)
                # Once and a half, so that the limit is three times torch's error: the reference has one itself.
                b = torch.where(torch.isfinite(float32_errors[i]), r + 1.5 * float32_errors[i], b)
            columns.setdefault(label, []).append([a, b, r])
    for label, triples in columns.items():
        ours_, theirs_, reference_ = zip(*triples)
        rows = compare(label, ours_, theirs_, reference_, torch.float32 if double else dtype)
        if double:
            # Torch's error is an estimate here: the largest of a border's few elements would be decided by chance.
            rows = [row for row in rows if row.region == "whole" or row.measure == "norm"]
            rows = [
                replace(row, **{k: getattr(row, k) * _DOUBLE_IN_SINGLE for k in ("error", "baseline", "limit")})
                for row in rows
            ]
        certificate.rows += rows
    return certificate


def _float32_errors(
    baseline: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Any], cotangents: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Errors of the baseline's outputs and gradients in float32, on the inputs rounded to float32.

    There is no wider reference to hold torch's float64 op against, but rounding errors scale with the unit roundoff.
    oneDNN, which has no float64, is left out: another algorithm's error would stand for nothing.
    """
    rounded = _leaves(inputs, torch.float32)
    cotangents = [c.float().double() for c in cotangents]
    with torch.backends.mkldnn.flags(enabled=False):
        outputs, gradients, _, _ = _run(baseline, rounded, torch.float32, cotangents)
    exact, exact_gradients, _, _ = _run(reference, rounded, torch.float64, cotangents)
    return [(a.detach().double() - r.detach()) for a, r in zip((*outputs, *gradients), (*exact, *exact_gradients))]
