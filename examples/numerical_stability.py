"""Gradients that vanish and explode through depth and through time, and what helps.

Panels, left to right, top to bottom:
1. A sigmoid and its derivative, at most 1/4.
2. The gradient's size at each of 30 layers, seen from the loss at the right: sigmoids and tanh with Xavier's weights, ReLU
   with He's, ReLU with weights twice as large.
3. Singular values of a product of 1 to 20 random matrices: the largest against its bound (the product of the largest ones).
4. The gradient of a recurrent network's last state for the input at each step: an RNN with tanh, one with ReLU and larger
   weights, an LSTM and a GRU whose forget (or update) gate is open.
5. A training step on an exploding deep network: how far the parameters jump, without clipping and with.
6. An exploding RNN that learns to repeat a part of its last input, without clipping and with.

What to see: with the very weights that keep tanh's gradients level, those of sigmoids fall by a factor a layer, until nothing
arrives at the first ones. He's weights keep ReLU's level, twice their size makes them grow as fast as the sigmoids' fall. The
product's singular values part: the largest grows, the smallest vanishes, and the bound is far above. Through time the same
happens: one RNN forgets in a few steps, the other explodes, gates keep a path open. Clipping bounds the jump, and where
training without it ends with infinities after some steps (the curve breaks off), with it the network learns.
"""

import torch
from common import figure, run, save

import dlkern
from dlkern import nn

WIDTH = 64


def gradient_norms(activation, fill, depth=30):
    """Norms of the loss's gradient at the output of each layer."""
    torch.manual_seed(0)
    x, seen = torch.randn(16, WIDTH), []
    for _ in range(depth):
        layer = nn.Linear(WIDTH, WIDTH)
        fill(layer)
        x = activation(layer(x))
        if x.requires_grad:
            x.retain_grad()
        seen.append(x)
    x.square().mean().backward()
    norms = torch.stack([x.grad.norm() for x in seen])
    return norms / norms[-1]


def twice_he(layer):
    nn.init.kaiming_normal_(layer)
    with torch.no_grad():
        layer.weight *= 2


def through_time(module, std, length):
    """Norm of the gradient of the last state's sum for the input at each step."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=std)
        if "bias" in name and isinstance(module, torch.nn.LSTM):
            parameter.data[WIDTH : 2 * WIDTH] = 2.0  # the forget gate
        if "bias" in name and isinstance(module, torch.nn.GRU):
            parameter.data[WIDTH : 2 * WIDTH] = 2.0  # the update gate keeps the old state
    x = torch.randn(length, 4, WIDTH, requires_grad=True)
    module(x)[0][-1].sum().backward()
    return x.grad.flatten(1).norm(dim=1)


def jump(clip):
    """How far one step of SGD moves a network whose gradients explode."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(12)]
    for layer in layers:
        twice_he(layer)
    model = torch.nn.Sequential(*[m for layer in layers for m in (layer, torch.nn.ReLU())])
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    model(torch.randn(16, WIDTH)).square().mean().backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    dlkern.optim.SGD(model.parameters(), lr=0.1).step()
    return (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item()


def trained(clip, steps):
    """Losses of an RNN whose state would grow with each step, as it learns to repeat a number of its last input."""
    torch.manual_seed(0)
    rnn, output = nn.RNN(4, 32, nonlinearity="relu"), nn.Linear(32, 1)
    for parameter in rnn.parameters():
        nn.init.normal_(parameter, std=0.3)
    parameters, losses = [*rnn.parameters(), *output.parameters()], []
    optimizer = dlkern.optim.SGD(parameters, lr=0.3)
    for _ in range(steps):
        x = torch.randn(20, 32, 4)  # [length, batch, inputs]
        optimizer.zero_grad()
        loss = (output(rnn(x)[0][-1]) - x[-1, :, :1]).square().mean()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(steps=40, report=None):
    drawing, ((a, b, c), (d, e, f)) = figure(2, 3, (14, 8))
    x = torch.linspace(-8, 8, 200)
    a.plot(x, x.sigmoid(), label="sigmoid")
    a.plot(x, x.sigmoid() * (1 - x.sigmoid()), label="its derivative")
    a.set(title="sigmoid")
    a.legend()
    depths = {
        "sigmoid, Xavier": (torch.sigmoid, nn.init.xavier_normal_),
        "tanh, Xavier": (torch.tanh, nn.init.xavier_normal_),
        "ReLU, He": (torch.relu, nn.init.kaiming_normal_),
        "ReLU, twice He": (torch.relu, twice_he),
    }
    numbers = {}
    for name, (activation, fill) in depths.items():
        norms = gradient_norms(activation, fill)
        b.semilogy(range(1, 31), norms, label=name)
        numbers[f"{name}: gradient at layer 1 over layer 30"] = norms[0].item()
    b.set(title="gradient through depth", xlabel="layer")
    b.legend()
    product, bound, rows = torch.eye(4, dtype=torch.float64), 1.0, []
    for _ in range(20):
        matrix = torch.randn(4, 4, dtype=torch.float64)
        product = nn.functional.linear(product, matrix)
        bound *= torch.linalg.svdvals(matrix)[0].item()
        values = torch.linalg.svdvals(product)
        rows.append((bound, values[0].item(), max(values[-1].item(), 1e-300)))
    c.semilogy(range(1, 21), rows, label=["bound of the largest", "largest", "smallest"])
    c.set(title="singular values of a product", xlabel="matrices")
    c.legend()
    numbers["bound over largest singular value"] = rows[-1][0] / rows[-1][1]
    numbers["smallest over largest singular value"] = rows[-1][2] / rows[-1][1]
    recurrent = {
        "RNN": (nn.RNN(WIDTH, WIDTH), 0.1),
        "RNN, ReLU, larger weights": (nn.RNN(WIDTH, WIDTH, nonlinearity="relu"), 0.25),
        "LSTM": (nn.LSTM(WIDTH, WIDTH), 0.1),
        "GRU": (nn.GRU(WIDTH, WIDTH), 0.1),
    }
    for name, (module, std) in recurrent.items():
        norms = through_time(module, std, steps)
        d.semilogy(norms / norms[-1], label=name)
        numbers[f"{name}: gradient at the first step over the last"] = (norms[0] / norms[-1]).item()
    d.set(title="gradient through time", xlabel="step")
    d.legend()
    for name, clip in (("no clipping", None), ("norm at most 1", 1.0)):
        numbers[f"jump, {name}"] = jump(clip)
        e.bar(name, numbers[f"jump, {name}"], log=True)
        losses = trained(clip, 2 * steps)
        f.semilogy(losses, ".-", label=name)
        numbers[f"{name}: first loss"], numbers[f"{name}: last loss"] = losses[0], losses[-1]
    e.set(title="one step's jump")
    f.set(title="training an RNN: loss", xlabel="step")
    f.legend()
    save(drawing, report, "numerical_stability")
    return numbers


if __name__ == "__main__":
    run(main, 40)
