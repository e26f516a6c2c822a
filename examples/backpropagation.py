"""Forward and backward through a network with one hidden layer, by hand, and three things to know about it.

Forward: z = x W1', h = tanh z, o = h W2', J = cross-entropy(o, y) + decay/2 (|W1|² + |W2|²). Backward, from the end on, the
chain rule once for each: dJ/do = (softmax o - onehot y) / n, dJ/dW2 = (dJ/do)' h + decay W2, dJ/dh = dJ/do W2,
dJ/dz = dJ/dh (1 - h²), dJ/dW1 = (dJ/dz)' x + decay W1.

What to see: dlkern's backward finds what these lines find, to rounding (printed). Left: the slope of J along some direction,
measured by central differences with step s: the error falls with s², then rises again as 1/s, because rounding is divided by
an ever smaller step; in float32 it never gets good. Backward needs no step. Middle: what forward keeps for backward grows
with the depth; without gradients nothing is kept. Right: forward and backward together cost a few forwards, differences two for
every parameter.
"""

import time

import torch
from common import figure, run, save

from dlkern import nn

DECAY = 0.1


def objective(x, y, w1, w2):
    loss = nn.functional.cross_entropy(nn.functional.linear(nn.functional.linear(x, w1).tanh(), w2), y)
    return loss + DECAY / 2 * (w1.square().sum() + w2.square().sum())


def by_hand(x, y, w1, w2):
    """dJ/dW1 and dJ/dW2."""
    h = (x @ w1.T).tanh()
    do = (torch.softmax(h @ w2.T, 1) - torch.nn.functional.one_hot(y, len(w2))) / len(x)
    dz = do @ w2 * (1 - h.square())
    return dz.T @ x + DECAY * w1, do.T @ h + DECAY * w2


def kept(depth, gradients=True):
    """Bytes that the forward pass of `depth` layers keeps for the backward pass, parameters left out."""
    model = torch.nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(32, 32), torch.nn.Tanh())])
    own, found = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.set_grad_enabled(gradients):
        result = model(torch.randn(256, 32))
    del result
    return sum(found.values())


def seconds(function, times):
    start = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - start) / times


def main(steps=50, report=None):
    x, y = torch.randn(40, 12).double(), torch.randint(5, (40,))
    weights = [(torch.randn(*shape).double() / 3).requires_grad_() for shape in ((16, 12), (5, 16))]
    found = torch.autograd.grad(objective(x, y, *weights), weights)
    expected = by_hand(x, y, *(w.detach() for w in weights))
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected))
    numbers = {"by hand, largest difference": difference}
    drawing, ((a, b, c),) = figure(1, 3, (16, 4.5))
    direction = [torch.randn_like(w) for w in weights]
    slope = sum((g * d).sum() for g, d in zip(found, direction)).item()
    widths = [10.0**-k for k in torch.linspace(0, 10, 31).tolist()]
    for dtype in (torch.float64, torch.float32):
        errors = []
        for width in widths:
            with torch.no_grad():
                ends = [
                    objective(x.to(dtype), y, *((w + s * width * d).to(dtype) for w, d in zip(weights, direction))).item()
                    for s in (1, -1)
                ]
            errors.append(abs((ends[0] - ends[1]) / (2 * width) / slope - 1))
        name = str(dtype).split(".")[1]
        a.loglog(widths, errors, label=name)
        best = min(range(len(widths)), key=errors.__getitem__)
        numbers[f"{name}: best step, its relative error"] = (widths[best], errors[best])
    a.set(title="central differences: relative error", xlabel="step")
    a.legend()
    depths = (1, 2, 4, 8, 16)
    for gradients, name in ((True, "for training"), (False, "without gradients")):
        sizes = [kept(depth, gradients) / 1024 for depth in depths]
        b.plot(depths, sizes, "o-", label=name)
        numbers[f"KiB kept {name}, depth 1 and 16"] = (sizes[0], sizes[-1])
    b.set(title="KiB kept for the backward pass", xlabel="layers")
    b.legend()
    large = [torch.randn(512, 256), torch.randint(64, (512,))]
    wide = [(torch.randn(*shape) / 16).requires_grad_() for shape in ((256, 256), (64, 256))]

    def forward():
        with torch.no_grad():
            objective(*large, *wide)

    forward()
    once = seconds(forward, steps)
    both = seconds(lambda: torch.autograd.grad(objective(*large, *wide), wide), steps)
    parameters = sum(w.numel() for w in wide)
    c.bar(["forward", "forward, backward", f"differences\n({parameters} parameters)"], [1, both / once, 2 * parameters])
    c.set(title="time, in forward passes", yscale="log")
    save(drawing, report, "backpropagation")
    return numbers | {"forward and backward over forward": both / once}


if __name__ == "__main__":
    run(main, 50)
