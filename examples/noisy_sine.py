"""A noisy sine, predicted k steps ahead: an autoregressive model and a latent-state model. Both its values and its pace are
noisy, so that no model can know it far ahead.

The autoregressive one, an MLP, looks at the last 8 values. The latent-state one, a GRU, carries what it has seen in a hidden
state. Both learn to predict one step; further steps feed predictions back in as if they were data.

What to see: one step ahead both lie on the curve (first panel). From a point on without data (second) the predictions
drift off, because each error becomes an input of the next step. The third panel measures it: the error over k = 1 ... 48
grows from the noise's size towards the series' own spread (dashed line: always answering the mean).
"""

import math

import torch
from common import figure, run, save

import dlkern
from dlkern import nn

PAST, NOISE, PACE = 8, 0.1, 0.1


def series(length):
    phase = (2 * math.pi / 40 + PACE * torch.randn(length)).cumsum(0)
    return phase.sin() + NOISE * torch.randn(length)


class Autoregressive(torch.nn.Module):
    """Next value [n] from the last PAST values [n, PAST]."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(nn.Linear(PAST, 16), torch.nn.ReLU(), nn.Linear(16, 1))

    def forward(self, past):
        return self.layers(past)[:, 0]

    def loss(self, x):
        windows = x.unfold(0, PAST + 1, 1)
        return (self(windows[:, :-1]) - windows[:, -1]).square().mean()

    def ahead(self, history, k):
        """Predictions of the next k values [n, k] from histories [n, length]."""
        seen = history
        for _ in range(k):
            seen = torch.cat([seen, self(seen[:, -PAST:])[:, None]], 1)
        return seen[:, history.shape[1] :]


class Latent(torch.nn.Module):
    """A GRU whose state stands for all it has seen."""

    def __init__(self):
        super().__init__()
        self.rnn, self.output = nn.GRU(1, 16), nn.Linear(16, 1)

    def loss(self, x):
        pieces = x[: len(x) // 50 * 50].view(-1, 50).T[..., None]  # [50, pieces, 1]
        states, _ = self.rnn(pieces[:-1])
        return (self.output(states) - pieces[1:]).square()[PAST:].mean()

    def ahead(self, history, k):
        states, state = self.rnn(history.T[..., None])
        found = [self.output(states[-1:])]
        for _ in range(k - 1):
            states, state = self.rnn(found[-1], state)
            found.append(self.output(states))
        return torch.cat(found)[..., 0].T


def main(steps=200, report=None, k=48):
    x, test = series(600), series(400)
    drawing, ((a, b, c),) = figure(1, 3, (16, 4))
    a.plot(test[PAST:120], ".", color="gray", label="data")
    b.plot(range(60, 120), test[60:120], ".", color="gray", label="data")
    numbers = {}
    histories = test.unfold(0, 40, 3)[: (len(test) - 40 - k) // 3]  # [n, 40]
    futures = test[40:].unfold(0, k, 3)[: len(histories)]  # [n, k]
    for model in (Autoregressive(), Latent()):
        name = "autoregressive" if isinstance(model, Autoregressive) else "latent state"
        optimizer = dlkern.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            model.loss(x).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            one = [model.ahead(test[None, :t], 1).item() for t in range(PAST, 120)]
            a.plot(one, label=name)
            b.plot(range(80, 120), model.ahead(test[None, :80], 40)[0], label=name)
            errors = (model.ahead(histories, k) - futures).square().mean(0).sqrt()
        c.plot(range(1, k + 1), errors, label=name)
        numbers[f"{name}: error 1 step ahead"], numbers[f"{name}: error {k} steps ahead"] = errors[0].item(), errors[-1].item()
    c.axhline(test.std(), linestyle="--", color="black")
    a.set(title="one step ahead", xlabel="time")
    b.set(title="from step 80 on without data", xlabel="time")
    c.set(title="error k steps ahead", xlabel="k")
    for axes in (a, b, c):
        axes.legend()
    save(drawing, report, "noisy_sine")
    return numbers


if __name__ == "__main__":
    run(main, 200)
