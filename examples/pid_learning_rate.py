"""Who sets the learning rate: a PID controller, a bandit; and learning on when the world changes.

Left: a network on digits whose rate starts far too low or far too high. A PID controller measures by how much a step moves
the parameters, relative to their norm, compares its logarithm with a set point's, and turns the logarithm of the rate by
proportional, integral and derivative parts of the difference.

Middle: an epsilon-greedy bandit has five rates as arms; the reward of a pull is by how much a few steps lower the loss. Mostly
it pulls the best arm so far, sometimes a random one; old rewards fade, since the best rate changes while a network learns.

Right: concept shift. After half of a stream of digits all labels turn (3 is now called 4 ...). A model trained on the first
half and frozen falls to nothing; one that goes on taking a step a batch recovers.

What to see: from both sides the controlled rates come within a factor of two of each other in a few dozen steps, and rise
later, as gradients shrink; the bandit soon pulls 0.1 most, and seldom 1, which does harm; the updated model's accuracy
falls and comes back.
"""

import math

import torch
from common import figure, run, save

import dlkern
from dlkern import nn
from dlkern.training import digits

ARMS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def network():
    torch.manual_seed(0)
    return nn.init.kaiming_normal_(torch.nn.Sequential(nn.Linear(64, 32), torch.nn.ReLU(), nn.Linear(32, 10)))


def step_on(model, optimizer, x, y, size=64):
    index = torch.randint(len(y), (size,))
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x[index]), y[index])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 2.0)
    optimizer.step()
    return loss.item()


def norm(tensors):
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


class PID:
    """u = kp e + ki sum(e) + kd (e - e before)."""

    def __init__(self, kp, ki, kd):
        self.gains, self.total, self.before = (kp, ki, kd), 0.0, 0.0

    def __call__(self, error):
        self.total = max(-3.0, min(3.0, self.total + error))  # no wind-up
        kp, ki, kd = self.gains
        result = kp * error + ki * self.total + kd * (error - self.before)
        self.before = error
        return result


def controlled(x, y, steps, rate, set_point=0.01):
    """Rates and losses; the rate's logarithm follows the controller."""
    model, controller = network(), PID(0.2, 0.02, 0.05)
    optimizer = dlkern.optim.SGD(model.parameters(), lr=rate)
    rates, losses = [], []
    for _ in range(steps):
        optimizer.param_groups[0]["lr"] = rate
        before = [p.detach().clone() for p in model.parameters()]
        losses.append(step_on(model, optimizer, x, y))
        rates.append(rate)
        moved = norm([p.detach() - q for p, q in zip(model.parameters(), before)]) / norm(before)
        rate *= math.exp(controller(math.log(set_point / max(moved, 1e-12))))
    return rates, losses


def judged(model, x, y):
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x[:400]), y[:400]).item()


def bandit(x, y, pulls, epsilon=0.2, length=4):
    """How often each arm was pulled, and the loss after each pull."""
    model = network()
    optimizer = dlkern.optim.SGD(model.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(0)
    value, count, losses = [0.5] * len(ARMS), [0] * len(ARMS), []
    last = judged(model, x, y)
    for _ in range(pulls):
        arm = max(range(len(ARMS)), key=value.__getitem__)
        if torch.rand((), generator=generator).item() < epsilon:
            arm = int(torch.randint(len(ARMS), (), generator=generator))
        optimizer.param_groups[0]["lr"] = ARMS[arm]
        for _ in range(length):
            step_on(model, optimizer, x, y)
        loss = judged(model, x, y)
        value[arm] += 0.3 * (math.log(last / loss) - value[arm])  # newer rewards weigh more
        count[arm] += 1
        last = loss
        losses.append(loss)
    return count, losses


def shifted(x, y, steps):
    """Accuracy on each batch of a stream, before learning from it: frozen after the first half, and updated."""
    results = {}
    for name in ("frozen", "updated"):
        model, curve = network(), []
        optimizer = dlkern.optim.SGD(model.parameters(), lr=0.3)
        generator = torch.Generator().manual_seed(1)
        for step in range(steps):
            index = torch.randint(len(y), (64,), generator=generator)
            labels = y[index] if step < steps // 2 else (y[index] + 1) % 10
            logits = model(x[index])
            curve.append((logits.argmax(1) == labels).double().mean().item())
            if name == "updated" or step < steps // 2:
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, labels).backward()
                optimizer.step()
        results[name] = curve
    return results


def main(steps=200, report=None):
    data = digits()
    x, y = nn.functional.avg_pool2d(data.train_images, 4).flatten(1), data.train_labels
    drawing, ((a, b, c),) = figure(1, 3, (15, 4))
    numbers = {}
    for start in (1e-4, 5.0):
        rates, losses = controlled(x, y, steps, start)
        a.semilogy(rates, label=f"rate from {start:g}")
        a.semilogy(losses, ":", label=f"loss from {start:g}")
        numbers[f"from {start:g}: last rate"], numbers[f"from {start:g}: last loss"] = rates[-1], sum(losses[-5:]) / 5
    a.set(title="PID controller", xlabel="step")
    a.legend()
    count, losses = bandit(x, y, max(5, steps // 3))
    b.bar([f"{arm:g}" for arm in ARMS], count)
    b.set(title="pulls of each rate", xlabel="learning rate")
    numbers["pulls"], numbers["bandit's last loss"] = count, losses[-1]
    for name, curve in shifted(x, y, steps).items():
        c.plot(curve, label=name)
        numbers[f"{name}: accuracy at the end"] = sum(curve[-5:]) / 5
    c.set(title="concept shift in the middle", xlabel="batch", ylabel="accuracy")
    c.legend()
    save(drawing, report, "pid_learning_rate")
    return numbers


if __name__ == "__main__":
    run(main, 200)
