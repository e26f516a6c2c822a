"""A support vector machine's dual: Lagrange multipliers, the KKT conditions, and the kernel trick.

Two rings of points. The dual maximises sum(a) - 1/2 sum over i, j of a_i a_j y_i y_j k(x_i, x_j) for 0 <= a <= C and
sum(a y) = 0, with the Gaussian kernel k. Sequential minimal optimisation changes two multipliers at a time, so that the
equality stays, choosing the pair that breaks the KKT conditions most (Keerthi et al. 2001).

What to see: the decision line (left) closes around the inner ring, which no straight line separates; points with a > 0
(circled) lie at the margin (the thin lines) or inside. The duality gap and the largest KKT violation (right) fall to
zero together: a = 0 where a point is outside the margin, a = C where it is inside, between where it lies on it.
"""

import torch
from common import figure, run, save

from dlkern.nn import functional as F

C, WIDTH = 5.0, 0.7


def gaussian(a, b):
    """k(a_i, b_j) = exp(-|a_i - b_j|² / (2 width²)), its products from the linear kernel."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * F.linear(a, b)
    return (-squares.clamp(min=0) / (2 * WIDTH**2)).exp()


def rings(count):
    angle = torch.rand(count, dtype=torch.float64) * 6.2832
    y = (torch.arange(count) % 2 * 2 - 1).double()
    radius = torch.where(y > 0, 0.8, 1.8) + 0.25 * torch.randn(count, dtype=torch.float64)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y


def violation(alpha, y, gradient):
    """The pair that breaks the KKT conditions most, by how much, and the bias between the two. gradient = dual's, times y."""
    up = ((y > 0) & (alpha < C)) | ((y < 0) & (alpha > 0))
    down = ((y > 0) & (alpha > 0)) | ((y < 0) & (alpha < C))
    high = torch.where(up, gradient, torch.full_like(gradient, -torch.inf))
    low = torch.where(down, gradient, torch.full_like(gradient, torch.inf))
    i, j = int(high.argmax()), int(low.argmin())
    return i, j, (high[i] - low[j]).item(), ((high[i] + low[j]) / 2).item()


def main(steps=2000, report=None, count=120):
    x, y = rings(count)
    kernel = gaussian(x, x)
    alpha = torch.zeros(count, dtype=torch.float64)
    gaps, breaks = [], []
    for _ in range(steps):
        output = kernel @ (alpha * y)
        i, j, broken, bias = violation(alpha, y, y - output)
        primal = 0.5 * (alpha * y) @ output + C * (1 - y * (output + bias)).clamp(min=0).sum()
        dual = alpha.sum() - 0.5 * (alpha * y) @ output
        gaps.append((primal - dual).item())
        breaks.append(broken)
        if broken < 1e-6:
            break
        # alpha_i y_i goes up by t and alpha_j y_j down, as far as the parabola says and the box allows.
        t = broken / (kernel[i, i] + kernel[j, j] - 2 * kernel[i, j]).clamp(min=1e-12).item()
        room = [C - alpha[i] if y[i] > 0 else alpha[i], alpha[j] if y[j] > 0 else C - alpha[j]]
        t = min(t, *(r.item() for r in room))
        alpha[i] += y[i] * t
        alpha[j] -= y[j] * t
        alpha.clamp_(0, C)
    margin = y * (kernel @ (alpha * y) + bias)
    free = (alpha > 1e-8) & (alpha < C - 1e-8)
    drawing, ((a, b),) = figure(1, 2, (11, 5))
    line = torch.linspace(-2.8, 2.8, 80, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    height = (gaussian(grid, x) @ (alpha * y) + bias).view(80, 80)
    a.contour(line, line, height.T, levels=[-1, 0, 1], colors="black", linewidths=[0.7, 2, 0.7])
    a.scatter(x[:, 0], x[:, 1], c=y, cmap="coolwarm", s=12)
    a.scatter(*x[alpha > 1e-8].T, facecolors="none", edgecolors="black", s=60)
    a.set(title="decision line, margins, support vectors")
    b.semilogy([max(g, 1e-12) for g in gaps], label="duality gap")
    b.semilogy([max(v, 1e-12) for v in breaks], label="largest KKT violation")
    b.set(xlabel="step")
    b.legend()
    save(drawing, report, "svm_dual")
    return {
        "support vectors": int((alpha > 1e-8).sum()), "duality gap": gaps[-1], "KKT violation": breaks[-1],
        "sum of alpha y": (alpha @ y).item(), "accuracy": (margin > 0).double().mean().item(),
        "margin of free support vectors off 1 by": (margin[free] - 1).abs().max().item() if free.any() else 0.0,
    }


if __name__ == "__main__":
    run(main, 2000)
