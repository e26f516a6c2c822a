"""Attention pooling as regression: Nadaraya-Watson without and with a learned width, and all five scores on one task.

Points y = 2 sin x + x^0.8 + noise. A query is a place x; keys are the training places, values their y. The estimate is the
values' mean, weighted by softmax(-(query - key)² / (2 width²)).

What to see: with width 1 (first panel) the curve is too smooth, and the heat map of its weights (third) is a wide band. The
learned width (second) makes the band narrow (fourth), and the curve follows the data, a little unsteadily. Last panel: the
same regression with each scoring function on learned features of x; dot and scaled dot product, additive, cosine and
Gaussian scores all learn it, at their own pace.
"""

import torch
from common import figure, run, save

import dlkern
from dlkern import nn


def truth(x):
    return 2 * x.sin() + x**0.8


class Embedded(torch.nn.Module):
    """Attention over learned features of places [1, n, 1]."""

    def __init__(self, score, width=16):
        super().__init__()
        self.features = torch.nn.Sequential(nn.Linear(1, width), torch.nn.Tanh(), nn.Linear(width, width))
        self.score = score

    def forward(self, query, key, value, attn_mask=None):
        return self.score(self.features(query), self.features(key), value, attn_mask=attn_mask)


def fit(model, x, y, steps, rate):
    """Trains on the points themselves; a point does not see its own value."""
    others = ~torch.eye(len(x), dtype=torch.bool)
    optimizer = dlkern.optim.Adam(model.parameters(), lr=rate)
    curve, places, values = [], x[None, :, None], y[None, :, None]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(places, places, values, attn_mask=others) - values).square().mean()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def weights(model, query, key):
    """The attention weights: what the model makes of values that are unit vectors."""
    return model(query[None, :, None], key[None, :, None], torch.eye(len(key))[None])[0].detach()


def main(steps=150, report=None):
    x = (torch.rand(50) * 5).sort().values
    y = truth(x) + 0.5 * torch.randn(50)
    places = torch.linspace(0, 5, 60)
    drawing, ((a, b, c, d, e),) = figure(1, 5, (20, 4))
    plain, learned = nn.GaussianAttention(), nn.GaussianAttention(learned=True)
    fit(learned, x, y, steps, 0.05)
    numbers = {"learned width": abs(learned.width.item())}
    for axes, picture, model, name in ((a, c, plain, "width 1"), (b, d, learned, "learned width")):
        with torch.no_grad():
            estimate = model(places[None, :, None], x[None, :, None], y[None, :, None])[0, :, 0]
        axes.plot(x, y, ".", label="points")
        axes.plot(places, truth(places), "--", label="truth")
        axes.plot(places, estimate, label="estimate")
        axes.set(title=name, xlabel="x")
        axes.legend()
        picture.imshow(weights(model, places, x).numpy(), aspect="auto", cmap="Reds")
        picture.set(title=f"weights, {name}", xlabel="keys", ylabel="queries")
        numbers[f"squared error, {name}"] = (estimate - truth(places)).square().mean().item()
    scores = {
        "dot": nn.DotAttention(scaled=False), "scaled dot": nn.DotAttention(), "cosine": nn.CosineAttention(scale=8.0),
        "Gaussian": nn.GaussianAttention(), "additive": nn.AdditiveAttention(16, 16, 16),
    }
    for name, score in scores.items():
        torch.manual_seed(0)
        curve = fit(Embedded(score), x, y, steps, 0.01)
        e.plot(curve, label=name)
        numbers[f"{name}: first and last error"] = (curve[0], curve[-1])
    e.set(title="five scores", xlabel="step", ylabel="error of the points left out")
    e.legend()
    save(drawing, report, "attention_pooling")
    return numbers


if __name__ == "__main__":
    run(main, 150)
