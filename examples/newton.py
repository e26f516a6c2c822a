"""Newton's method and Newton-CG with second derivatives from dlkern's own double backward.

Logistic regression of digits against each other (3 or 8) with a little weight decay: convex, so the optimum is known.
Newton builds the whole Hessian, a product with each unit vector; Newton-CG solves for its step by conjugate gradients and
needs a few Hessian-vector products only, which also serves networks (here a small one, right panel). Gradient descent takes
the whole set a step, stochastic gradient descent one image, mini-batches 8, all at one rate: 1 over the largest curvature,
the Hessian's largest eigenvalue, which no point of this problem exceeds.

What to see: Newton's error (left) falls off a cliff after a few steps, each doubling its digits; Newton-CG follows. Gradient
descent creeps. Counted in images looked at (middle), all of which it needs for one step, it is the slowest: one image a step
is far ahead after the first pass, but then rattles without gaining, as its noise has it; mini-batches come down smoothly
and catch up. A network (right) is not convex, and second derivatives pay there, too.
"""

import bisect
import itertools

import torch
from common import figure, run, save

import dlkern
from dlkern import nn
from dlkern.training import digits

F = nn.functional
DECAY = 1e-2


def problem():
    data = digits()
    chosen = (data.train_labels == 3) | (data.train_labels == 8)
    x = F.avg_pool2d(data.train_images[chosen], 4).flatten(1).double()
    return x, (data.train_labels[chosen] == 8).long()


def objective(x, y, parameters):
    """Cross-entropy of a linear classifier (or a network of two layers), with weight decay."""
    hidden = x
    for weight in parameters[:-1]:
        hidden = torch.tanh(F.linear(hidden, weight))
    return F.cross_entropy(F.linear(hidden, parameters[-1]), y) + DECAY / 2 * sum((p**2).sum() for p in parameters)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


class Curvature:
    """Loss, gradient and Hessian-vector products at a point, from one graph."""

    def __init__(self, x, y, parameters):
        self.parameters = parameters
        self.loss = objective(x, y, parameters)
        self.gradient = flat(torch.autograd.grad(self.loss, parameters, create_graph=True))

    def times(self, vector):
        return flat(torch.autograd.grad(self.gradient @ vector, self.parameters, retain_graph=True))

    def hessian(self):
        return torch.stack([self.times(row) for row in torch.eye(len(self.gradient), dtype=torch.float64)])


def conjugate_gradients(times, b, most, tolerance):
    """Solves H s = b; stops at a direction of negative curvature. Nocedal and Wright 2006, algorithm 7.1."""
    s, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(most):
        if r.norm() <= tolerance * b.norm():
            break
        product = times(p)
        curvature = p @ product
        if curvature <= 0:
            return s if s.any() else b
        step = (r @ r) / curvature
        s += step * p
        fresh = r - step * product
        p = fresh + (fresh @ fresh) / (r @ r) * p
        r = fresh
    return s


def move(parameters, direction, x, y, loss, slope):
    """A step along `direction`, halved until the loss falls enough (Armijo)."""
    parts = direction.split([p.numel() for p in parameters])
    length = 1.0
    while True:
        moved = [(p - length * d.view_as(p)).detach().requires_grad_() for p, d in zip(parameters, parts)]
        if length < 1e-6 or objective(x, y, moved).item() <= loss - 1e-4 * length * slope:
            return moved
        length /= 2


def second_order(x, y, parameters, steps, cg):
    losses = []
    for _ in range(steps):
        at = Curvature(x, y, parameters)
        losses.append(at.loss.item())
        gradient = at.gradient.detach()
        if cg:
            direction = conjugate_gradients(at.times, gradient, 30, min(0.5, gradient.norm().item() ** 0.5))
        else:
            direction = torch.linalg.solve(at.hessian(), gradient)
        parameters = move(parameters, direction, x, y, at.loss.item(), (gradient @ direction).item())
    return losses + [objective(x, y, parameters).item()], parameters


def first_order(x, y, parameters, passes, batch, rate):
    """Passes over the images, and the loss of all images after them; looks are evenly spaced on a logarithmic axis. A step
    takes `batch` images."""
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer = dlkern.optim.SGD(parameters, lr=rate)
    seen, looks, losses = 0.0, [], []
    for _ in range(passes):
        for index in torch.randperm(len(y)).split(batch):
            optimizer.zero_grad()
            objective(x[index], y[index], parameters).backward()
            optimizer.step()
            seen += len(index) / len(y)
            if not looks or seen > 1.2 * looks[-1]:
                looks.append(seen)
                with torch.no_grad():
                    losses.append(objective(x, y, parameters).item())
    return looks, losses


def main(steps=20, report=None):
    x, y = problem()
    start = [torch.zeros(2, 64, dtype=torch.float64, requires_grad=True)]
    newton, found = second_order(x, y, start, 8, cg=False)
    newton_cg, _ = second_order(x, y, start, 8, cg=True)
    optimum = min(newton + newton_cg)
    # At zero weights all probabilities are 1/2, where cross-entropy is most curved.
    rate = 1 / torch.linalg.eigvalsh(Curvature(x, y, start).hessian())[-1].item()
    curves = {"Newton": (range(9), newton), "Newton-CG": (range(9), newton_cg)}
    for name, batch in (("gradient descent", len(y)), ("mini-batches of 8", 8), ("stochastic", 1)):
        curves[name] = first_order(x, y, start, steps, batch, rate)
    drawing, ((a, b, c),) = figure(1, 3, (16, 4.5))
    for axes, names in ((a, list(curves)[:3]), (b, list(curves)[2:])):
        for name in names:
            axes.semilogy(curves[name][0], [max(value - optimum, 1e-16) for value in curves[name][1]], label=name)
        axes.legend()
    a.set(title="logistic regression: loss above the optimum", xlabel="step")
    b.set(title="the same, by looks at images", xlabel="passes over all images", xscale="log")
    network = [(torch.randn(n, m) * m**-0.5).double().requires_grad_() for m, n in ((64, 10), (10, 2))]
    deep, _ = second_order(x, y, network, max(2, steps // 2), cg=True)
    c.semilogy(deep, label="Newton-CG")
    c.semilogy(*first_order(x, y, network, max(2, steps // 2), len(y), rate), label="gradient descent")
    c.set(title="a network with 10 hidden units: loss", xlabel="step")
    c.legend()
    save(drawing, report, "newton")
    numbers = {f"{name}: above the optimum at the end": losses[-1] - optimum for name, (_, losses) in curves.items()}
    for name in ("gradient descent", "mini-batches of 8", "stochastic"):
        above = [value - optimum for value in curves[name][1]]
        numbers[f"{name}: above the optimum after a pass"] = above[bisect.bisect(curves[name][0], 1 - 1e-9)]
        numbers[f"{name}: largest rise between two looks"] = max(b / a for a, b in itertools.pairwise(above))
    numbers["Newton: size of the gradient at the end"] = Curvature(x, y, found).gradient.norm().item()
    return numbers | {"network: first and last loss": (deep[0], deep[-1])}


if __name__ == "__main__":
    run(main, 20)
