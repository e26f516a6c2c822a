"""Newton's method and Newton-CG with second derivatives from dlkern's own double backward.

Logistic regression of digits against each other (3 or 8) with a little weight decay: convex, so the optimum is known.
Newton builds the whole Hessian, a product with each unit vector; Newton-CG solves for its step by conjugate gradients and
needs a few Hessian-vector products only, which also serves networks (here a small one, right panel). Gradient descent takes
the whole set a step, stochastic gradient descent one image, mini-batches 32.

What to see: Newton's error falls off a cliff after a few steps, each doubling its digits; Newton-CG follows. Gradient
descent goes straight down on the logarithmic axis; stochastic descent is fast at first and then rattles at a floor that its
noise sets, and mini-batches rattle lower.
"""

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
    x = torch.nn.functional.avg_pool2d(data.train_images[chosen], 4).flatten(1).double()
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


def first_order(x, y, parameters, steps, batch, rate):
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer, losses = dlkern.optim.SGD(parameters, lr=rate), []
    for _ in range(steps):
        losses.append(objective(x, y, parameters).item())
        index = torch.randint(len(y), (batch,)) if batch else slice(None)
        optimizer.zero_grad()
        objective(x[index], y[index], parameters).backward()
        optimizer.step()
    return losses


def main(steps=60, report=None):
    x, y = problem()
    start = [torch.zeros(2, 64, dtype=torch.float64, requires_grad=True)]
    newton, _ = second_order(x, y, start, 8, cg=False)
    newton_cg, _ = second_order(x, y, start, 8, cg=True)
    optimum = min(newton + newton_cg)
    curves = {"Newton": newton, "Newton-CG": newton_cg}
    for name, batch, rate in (("gradient descent", 0, 0.5), ("stochastic", 1, 0.05), ("mini-batches of 32", 32, 0.3)):
        curves[name] = first_order(x, y, start, steps, batch, rate)
    drawing, ((a, b),) = figure(1, 2, (12, 5))
    for name, losses in curves.items():
        a.semilogy([max(value - optimum, 1e-16) for value in losses], label=name)
    a.set(title="logistic regression: loss above the optimum", xlabel="step")
    a.legend()
    network = [(torch.randn(n, m) * m**-0.5).double().requires_grad_() for m, n in ((64, 10), (10, 2))]
    deep, _ = second_order(x, y, network, max(2, steps // 6), cg=True)
    b.semilogy(deep, label="Newton-CG")
    b.semilogy(first_order(x, y, network, max(2, steps // 6), 0, 0.5), label="gradient descent")
    b.set(title="a network with 10 hidden units: loss", xlabel="step")
    b.legend()
    save(drawing, report, "newton")
    numbers = {f"{name}: above the optimum at the end": losses[-1] - optimum for name, losses in curves.items()}
    return numbers | {"network: first and last loss": (deep[0], deep[-1])}


if __name__ == "__main__":
    run(main, 60)
