"""Attention of sequences that lie one after another, [tokens, heads, depth]: the kernels of attention.py, one launch each.

A program's tile is a row of a table that the host makes of where sequences begin: the sequence's number, first query and
first key, its lengths, and the tile's first row. Windows are aligned at the last query and the last key.
"""

import torch

from dlkern.kernels._attention_tile import DOT
from dlkern.kernels._launch import accumulator_dtype, check, check_tensors
from dlkern.kernels.attention import Call, backward, forward


def _check_starts(op, name, starts, tokens):
    fits = starts.device.type == "cpu" and starts.dtype == torch.int64 and starts.dim() == 1 and starts.numel() >= 1
    check(fits, f"{op}: {name} must be int64 [sequences + 1] on the CPU")
    rises = starts[0] == 0 and starts[-1] == tokens and bool((starts.diff() >= 0).all())
    check(rises, f"{op}: {name} must rise from 0 to the {tokens} tokens")


class VarlenCall(Call):
    """The operands of a call, as heads of one long sequence, and a table of tiles."""

    varlen = True

    def __init__(self, op, query, key, value, starts_of_queries, starts_of_keys, seed, p, scale, softcap, left, right):
        for x in (query, key, value):
            check(x.dim() == 3, f"{op}: operands must be [tokens, heads, depth]")
        _check_starts(op, "cu_seq_q", starts_of_queries, query.shape[0])
        _check_starts(op, "cu_seq_k", starts_of_keys, key.shape[0])
        check(starts_of_queries.shape == starts_of_keys.shape, f"{op}: cu_seq_q and cu_seq_k count different sequences")
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        super().__init__(op, query, key, value, None, None, None, None, seed, p, scale, softcap, left, right, DOT)
        self.flags |= dict(HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0)
        # Number, first query, first key, queries, keys of each sequence.
        firsts = starts_of_queries[:-1], starts_of_keys[:-1]
        lengths = starts_of_queries.diff(), starts_of_keys.diff()
        self.sequences = torch.stack([torch.arange(len(firsts[0])), *firsts, *lengths], 1)
        self.most_keys = int(self.sequences[:, 4].max()) if len(self.sequences) else 0

    def tiles(self, of_keys, block):
        rows = self.sequences[:, 4 if of_keys else 3]
        counts = (rows + block - 1) // block
        before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        first = (torch.arange(len(before)) - before) * block
        table = torch.cat([torch.repeat_interleave(self.sequences, counts, 0), first[:, None]], 1).int()
        if self.query.device.type != "cpu":
            table = table.pin_memory().to(self.query.device, non_blocking=True)
        return table, len(table) * (self.key_heads if of_keys else self.heads)

    def output(self):
        return self.query.new_empty((self.queries, self.heads, self.value_depth)).transpose(0, 1)[None]

    def gradient(self, x, dtype):
        _, heads, tokens, depth = x.shape
        return torch.empty((tokens, heads, depth), dtype=dtype, device=x.device).transpose(0, 1)[None]


def attention_varlen_forward(
    query, key, value, starts_of_queries, starts_of_keys, seed, p, scale, softcap, left, right
):
    """(output [Tq, H, Dv], statistics [2, H Tq]) of query [Tq, H, D], key [Tk, Hk, D] and value [Tk, Hk, Dv]."""
    op, starts = "attention_varlen", (starts_of_queries, starts_of_keys)
    call = VarlenCall(op, query, key, value, *starts, seed, p, scale, softcap, left, right)
    output, statistics = forward(call)
    return output[0].transpose(0, 1), statistics.view(2, -1)


def attention_varlen_backward(
    grad_output, query, key, value, starts_of_queries, starts_of_keys, seed, output, statistics, p, scale, softcap, left,
    right,
):
    """Gradients of query, key and value."""
    op, starts = "attention_varlen_backward", (starts_of_queries, starts_of_keys)
    call = VarlenCall(op, query, key, value, *starts, seed, p, scale, softcap, left, right)
    tokens, heads = query.shape[:2]
    check_tensors(op, query, grad_output, output)
    size = (tokens, heads, value.shape[2])
    check(tuple(grad_output.shape) == tuple(output.shape) == size, f"{op}: grad_output or output is not of the output's size")
    fits = tuple(statistics.shape) == (2, heads * tokens) and statistics.dtype == accumulator_dtype(query.dtype)
    check(fits, f"{op}: statistics is not what attention_varlen_forward gave")
    grad_output, output = (x.transpose(0, 1)[None] for x in (grad_output, output))
    found = backward(op, call, grad_output, output, statistics.view(2, 1, heads, tokens), False)
    return tuple(x[0].transpose(0, 1) for x in found[:3])
