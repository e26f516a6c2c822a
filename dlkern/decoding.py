"""Writing sequences token by token with a model of the next one: greedy, beam and exhaustive search.

The model is a function step(tokens, state): tokens int64 [R], the last one of each row; state: tensors whose first dimension
counts rows, alone or in tuples, lists and dicts. It returns logits [R, V] and the new state. Rows know nothing of each
other, so all beams of all sequences are one call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["Decoded", "Step", "beam_search", "exhaustive_search", "greedy_search"]

Step = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]

_MOST = 1 << 20  # sequences of an exhaustive search


@dataclass(frozen=True)
class Decoded:
    """Sequences that a search found, the best first.

    Attributes:
        tokens: int64 [B, n, T], without the start token; after an end token come more of them.
        lengths: int64 [B, n], with the end token where there is one.
        scores: float64 [B, n]: log-probability / length^length_penalty; -inf where there are fewer than n sequences.
        end: the end token, or None.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    scores: torch.Tensor
    end: int | None

    def best(self) -> list[list[int]]:
        """The best sequence of each row, without its end token."""
        found = [t[:n] for t, n in zip(self.tokens[:, 0].tolist(), self.lengths[:, 0].tolist())]
        return [t[:-1] if t[-1] == self.end else t for t in found]


def _check(op: str, start: torch.Tensor, end: int | None, max_length: int) -> None:
    if start.dim() != 1 or start.dtype != torch.int64:
        raise ValueError(f"{op}: start must be int64 [B], got {start.dtype} {tuple(start.shape)}")
    if max_length < 1:
        raise ValueError(f"{op}: max_length must be positive, got {max_length}")
    if end is not None and end < 0:
        raise ValueError(f"{op}: end must not be negative, got {end}")


def _next(op: str, step: Step, tokens: torch.Tensor, state: Any, end: int | None) -> tuple[torch.Tensor, Any]:
    """Log-probabilities of each row's next token, float64 [R, V], and the new state."""
    logits, state = step(tokens, state)
    if logits.dim() != 2 or len(logits) != len(tokens):
        raise ValueError(f"{op}: step must return logits [{len(tokens)}, V], got {tuple(logits.shape)}")
    if end is not None and end >= logits.shape[1]:
        raise ValueError(f"{op}: end {end} is outside the vocabulary of {logits.shape[1]}")
    return torch.log_softmax(logits.double(), -1), state


def _rows(op: str, state: Any, index: torch.Tensor, count: int) -> Any:
    """Some of a state's `count` rows."""

    def chosen(t: torch.Tensor) -> torch.Tensor:
        if t.dim() == 0 or len(t) != count:
            raise ValueError(f"{op}: the state's tensors must have {count} rows, got {tuple(t.shape)}")
        return t.index_select(0, index)

    return pytree.tree_map_only(torch.Tensor, chosen, state)


@torch.no_grad()
def greedy_search(step: Step, state: Any, start: torch.Tensor, *, end: int | None, max_length: int) -> Decoded:
    """The likeliest next token, again and again.

    Args:
        step, state: the model, and what it starts from (see the module).
        start: int64 [B], the first token of each row, no part of the result.
        end: a row ends with this token; None: with max_length alone.
        max_length: the most tokens to write.

    Returns:
        A sequence a row (n = 1); scores are log-probabilities.

    Raises:
        ValueError: a wrong shape or dtype, max_length below 1, end outside the vocabulary.
    """
    _check("greedy_search", start, end, max_length)
    score = torch.zeros(len(start), dtype=torch.float64, device=start.device)
    length, done = torch.zeros_like(start), torch.zeros_like(start, dtype=torch.bool)
    tokens, written = start, []
    for _ in range(max_length):
        found, state = _next("greedy_search", step, tokens, state, end)
        best, tokens = found.max(-1)
        score += best.masked_fill(done, 0.0)
        length += ~done
        if end is not None:
            tokens = tokens.masked_fill(done, end)
            done = done | (tokens == end)
        written.append(tokens)
        if done.all():
            break
    return Decoded(torch.stack(written, -1)[:, None], length[:, None], score[:, None], end)


@torch.no_grad()
def beam_search(
    step: Step, state: Any, start: torch.Tensor, *, end: int | None, max_length: int, beams: int = 4,
    length_penalty: float = 0.0,
) -> Decoded:
    """The best of many unfinished sequences, by step. Graves 2012, "Sequence transduction with RNNs"; Sutskever et al. 2014.

    Each step keeps, of all continuations of a row's beams by one token, the `beams` of the highest score; finished ones
    compete as they are. With one beam that is greedy search; with as many as there are sequences, exhaustive search.

    Args:
        step, state, start, end, max_length: as in greedy_search; state has a row for each of start.
        beams: how many sequences to keep for each row.
        length_penalty: α of the score log-probability / length^α; 0 favours short sequences.

    Returns:
        `beams` sequences a row, or as many as there are.

    Raises:
        ValueError: as in greedy_search, beams below 1, or a state with another number of rows.
    """
    _check("beam_search", start, end, max_length)
    if beams < 1:
        raise ValueError(f"beam_search: beams must be positive, got {beams}")
    batch = len(start)
    total = torch.zeros(batch, 1, dtype=torch.float64, device=start.device)  # log-probabilities, [batch, width]
    length, done = torch.zeros_like(start)[:, None], torch.zeros_like(start, dtype=torch.bool)[:, None]
    tokens, written = start[:, None], start.new_empty(batch, 1, 0)
    score = total
    for _ in range(max_length):
        width = tokens.shape[1]
        found, state = _next("beam_search", step, tokens.reshape(-1), state, end)
        words = found.shape[1]
        found = found.view(batch, width, words)
        if end is not None:  # a finished beam goes on in one way, which costs nothing
            stay = found.new_full((words,), -torch.inf)
            stay[end] = 0.0
            found = torch.where(done[..., None], stay, found)
        found = total[..., None] + found  # [batch, width, words]
        length = length + ~done
        ranked = found / length.double().pow(length_penalty)[..., None]
        score, chosen = ranked.flatten(1).topk(min(beams, width * words))
        beam, tokens = chosen // words, chosen % words
        total, length, done = found.flatten(1).gather(1, chosen), length.gather(1, beam), done.gather(1, beam)
        written = torch.cat([written.gather(1, beam[..., None].expand(-1, -1, written.shape[2])), tokens[..., None]], 2)
        index = torch.arange(batch, device=start.device)[:, None] * width + beam
        state = _rows("beam_search", state, index.flatten(), batch * width)
        if end is not None:
            done = done | (tokens == end) | (total == -torch.inf)
            if done.all():
                break
    return Decoded(written, length, score, end)


@torch.no_grad()
def exhaustive_search(
    step: Step, state: Any, start: torch.Tensor, *, end: int | None, max_length: int, count: int = 1,
    length_penalty: float = 0.0,
) -> Decoded:
    """The best of all sequences, each of them tried: for tiny vocabularies, and to see what a beam search misses.

    Arguments as in beam_search; count: how many sequences to return for each row.

    Raises:
        ValueError: as in greedy_search; count below 1; more than 2^20 sequences.
    """
    _check("exhaustive_search", start, end, max_length)
    if count < 1:
        raise ValueError(f"exhaustive_search: count must be positive, got {count}")
    batch, last = len(start), -1 if end is None else end
    total = torch.zeros(batch, 1, dtype=torch.float64, device=start.device)  # of unfinished ones, [batch, width]
    tokens, written = start[:, None], start.new_empty(batch, 1, 0)
    ends: list[tuple[torch.Tensor, torch.Tensor, int]] = []  # sequences [batch, *, max_length], totals, length
    for i in range(max_length):
        width = tokens.shape[1]
        found, state = _next("exhaustive_search", step, tokens.reshape(-1), state, end)
        words = found.shape[1]
        if batch * words**max_length > _MOST:
            raise ValueError(f"exhaustive_search: {batch} · {words}^{max_length} sequences are too many")
        total = (total[..., None] + found.view(batch, width, words)).flatten(1)
        row = torch.arange(words, device=start.device).repeat(width)  # the tokens of each sequence's continuations
        tokens = row.expand(batch, -1)
        written = torch.cat([written.repeat_interleave(words, 1), tokens[..., None]], 2)  # [batch, width · words, i + 1]
        index = torch.arange(batch * width, device=start.device).repeat_interleave(words)
        state = _rows("exhaustive_search", state, index, batch * width)
        finished = row == last if i + 1 < max_length else torch.ones_like(row, dtype=torch.bool)
        rest = torch.full((batch, int(finished.sum()), max_length - i - 1), last, device=start.device)
        ends.append((torch.cat([written[:, finished], rest], 2), total[:, finished], i + 1))
        live = ~finished
        total, tokens, written = total[:, live], tokens[:, live], written[:, live]
        state = _rows("exhaustive_search", state, live.repeat(batch).nonzero()[:, 0], batch * width * words)
        if not live.any():
            break
    sequences = torch.cat([s for s, _, _ in ends], 1)
    score = torch.cat([t / n**length_penalty for _, t, n in ends], 1)
    length = torch.cat([torch.full(t.shape, n, device=start.device) for _, t, n in ends], 1)
    score, chosen = score.topk(min(count, score.shape[1]))
    sequences = sequences.gather(1, chosen[..., None].expand(-1, -1, max_length))
    return Decoded(sequences, length.gather(1, chosen), score, end)
