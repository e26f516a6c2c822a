"""What the tests of attention in the Triton and the CUDA column share: options of every kind, over several tiles, and both
sides of a comparison with the reference."""

import torch

from dlkern import ops
from dlkern.ops.attention import ADDITIVE, COSINE, GAUSSIAN, Settings
from dlkern.reference import attention as reference


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


QUERIES, KEYS = 67, 70
OPTIONS = {
    "plain": (Settings(scale=0.2), {}), "causal": (Settings(scale=0.2, right=0), {}),
    "window": (Settings(scale=0.2, left=20, right=5), {}), "softcap": (Settings(scale=0.5, softcap=2.0), {}),
    "negative scale": (Settings(scale=-0.3), {}), "alibi": (Settings(scale=0.2), dict(slopes=lambda: torch.rand(2).double())),
    "bool mask": (Settings(scale=0.2), dict(mask=lambda: torch.rand(2, 1, QUERIES, KEYS) > 0.3)),
    "bool mask of keys": (Settings(scale=0.2), dict(mask=lambda: torch.rand(2, 1, 1, KEYS) > 0.3)),
    "added mask": (Settings(scale=0.2), dict(mask=lambda: randn(2, 2, QUERIES, KEYS))),
    "added mask, shared": (Settings(scale=0.2, softcap=3.0, right=7), dict(mask=lambda: randn(1, 2, 1, KEYS))),
    "added mask of queries": (Settings(scale=0.2), dict(mask=lambda: randn(2, 1, QUERIES, 1))),
    "lengths": (Settings(scale=0.2), dict(lengths=lambda: torch.tensor([[3], [KEYS]]))),
    "lengths of queries": (Settings(scale=0.2), dict(lengths=lambda: torch.randint(0, KEYS + 1, (2, QUERIES)))),
    "dropout": (Settings(scale=0.2, p=0.3), dict(seed=lambda: torch.randint(0, 2**62, ()))),
    "gaussian": (Settings(scale=0.3, score=GAUSSIAN), {}), "cosine": (Settings(scale=2.0, score=COSINE), {}),
    "additive": (Settings(score=ADDITIVE), {}),
}


def sides(settings, more, shapes):
    """Our op, the reference, and what draws their inputs: query, key and value of these shapes, an added mask and the
    additive score's weight. `more` is the second half of an option."""
    more = {key: make() for key, make in more.items()}
    mask, lengths, slopes, seed = (more.get(key) for key in ("mask", "lengths", "slopes", "seed"))
    wanted = mask is not None and mask.is_floating_point()

    def on(function):
        def call(q, k, v, *rest):
            rest = list(rest)
            m = rest.pop(0) if wanted else mask
            of_heads = None if slopes is None else slopes.to(q.dtype)
            return function(q, k, v, m, lengths, of_heads, rest[0] if rest else None, seed, settings)

        return call

    def inputs():
        drawn = leaves(*shapes)
        if wanted:
            drawn += leaves(mask.shape)
        return drawn + (leaves((shapes[0][3],)) if settings.score == ADDITIVE else [])

    ours = on(lambda *a: ops.attention.attention("dot_attention", *a))
    return ours, on(lambda *a: reference.attention(*a[:-1], *a[-1])), inputs
