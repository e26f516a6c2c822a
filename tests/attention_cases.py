"""What the tests of attention in the Triton and the CUDA column share: options of every kind, over several tiles, and both
sides of a comparison with the reference."""

import torch

from dlkern import ops
from dlkern.nn import functional
from dlkern.ops.attention import ADDITIVE, COSINE, GAUSSIAN, Settings
from dlkern.reference import attention as reference
from dlkern.testing import check


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


def _angles(batch, half):
    positions = torch.randint(0, 100, (batch, 1, KEYS))
    return torch.stack(functional.rotary_angles(positions, 2 * half))  # [2, batch, 1, KEYS, half]


# Of a depth of 12: all of it or a part, the same for all rows or not, halves or neighbours as pairs.
ROTARY = {
    "rotary": (Settings(scale=0.2, right=0), dict(rotary=lambda: (*_angles(1, 6), False))),
    "rotary, neighbours": (
        Settings(scale=0.2), dict(rotary=lambda: (*_angles(2, 6), True), lengths=lambda: torch.tensor([[3], [KEYS]])),
    ),
    "rotary of a part": (Settings(scale=0.2, left=20, right=5), dict(rotary=lambda: (*_angles(1, 4), False))),
    "rotary of a part, neighbours": (
        Settings(scale=0.2, softcap=3.0),
        dict(rotary=lambda: (*_angles(2, 5), True), mask=lambda: randn(1, 2, 1, KEYS), slopes=lambda: torch.rand(2).double()),
    ),
}  # fmt: skip


def sides(settings, more, shapes):
    """Our op, the reference, and what draws their inputs: query, key and value of these shapes, an added mask and the
    additive score's weight. `more` is the second half of an option."""
    more = {key: make() for key, make in more.items()}
    mask, lengths, slopes, seed = (more.get(key) for key in ("mask", "lengths", "slopes", "seed"))
    rotary = more.get("rotary")
    wanted = mask is not None and mask.is_floating_point()

    def on(function):
        def call(q, k, v, *rest):
            rest = list(rest)
            m = rest.pop(0) if wanted else mask
            of_heads = None if slopes is None else slopes.to(q.dtype)
            if rotary is not None:
                angles = (x.to(torch.promote_types(q.dtype, torch.float32)) for x in rotary[:2])
                return function(q, k, v, m, lengths, of_heads, seed, settings, *angles, rotary[2])
            return function(q, k, v, m, lengths, of_heads, rest[0] if rest else None, seed, settings)

        return call

    def inputs():
        drawn = leaves(*shapes)
        if wanted:
            drawn += leaves(mask.shape)
        return drawn + (leaves((shapes[0][3],)) if settings.score == ADDITIVE else [])

    if rotary is not None:
        ours = on(lambda *a: ops.attention_rotary.attention_rotary("scaled_dot_product_attention", *a))
        return ours, on(lambda *a: reference.attention_rotary(*a[:7], *a[8:10], *a[7][:-1], a[10])), inputs
    ours = on(lambda *a: ops.attention.attention("dot_attention", *a))
    return ours, on(lambda *a: reference.attention(*a[:-1], *a[-1])), inputs


def assert_by_the_rule(ours, theirs, inputs, dtype=torch.float32, draws=1, name="op"):
    for count in (draws, 8 * draws, 32 * draws):  # over few, chance decides the largest of few errors: more draws tell
        certificate = check(ours, theirs, inputs, dtype=dtype, draws=count, name=name)
        if certificate.ok:
            return
    certificate.raise_if_failed()


def kept_scores(of_query, of_key, scale, equal):
    """Our op, torch's, and what draws their inputs. torch's tiles are of four dimensions whose leading ones are alike; of
    others it has the matrix of scores, and gradients that do not start from a rounded output. Of equal values the scores'
    gradients are nothing but rounding."""

    def inputs():
        q, k, v = leaves(of_query, of_key, of_key)
        return [q, k, torch.ones_like(v).requires_grad_() if equal else v]

    functions = functional.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention
    return *((lambda *x, f=f: f(*x, scale=scale)) for f in functions), inputs


# Of the additive score: how far queries and keys spread, the mean of their sum, and the weight's size. Where tanh is nearly
# linear, and where it is nearly one, so that its derivative cancels.
ADDITIVE_RANGES = {"small": (0.01, 0, 1), "saturated": (1, -6, 0.3)}


def check_additive_range(name, draws=16):
    """As torch computes it, by the rule."""
    spread, mean, size = ADDITIVE_RANGES[name]

    def theirs(q, k, v, w):
        return torch.softmax(torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)) @ w, -1) @ v

    def inputs():
        q, k, v, w = randn(9, 20), randn(11, 20), randn(11, 5), randn(20)
        return [t.requires_grad_() for t in (q * spread + mean / 2, k * spread + mean / 2, v, w * size)]

    assert_by_the_rule(functional.additive_attention, theirs, inputs, draws=draws, name=name)
