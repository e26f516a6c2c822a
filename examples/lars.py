"""Layer-wise adaptive rate scaling: a large batch needs a large rate, and one rate does not suit all layers.

With 1024 images a step, few steps are left for a pass, so each must be long. How long a step a layer bears depends on how
large its weights are beside their gradients. LARS gives each layer a rate in proportion to that ratio (You, Gitman and Ginsburg
2017). A network of four hidden layers with ReLU learns the digits in twenty passes, at six rates with each optimiser.

What to see: the ratio (left) differs between layers by a factor of three or four, and the layers change places as training
goes on. SGD with momentum (right) learns in a narrow range of rates, above which its first steps spoil the network and below
which twenty passes do not suffice. LARS learns over a range some ten times wider.
"""

import torch
from common import figure, run, save

import dlkern
from dlkern import nn
from dlkern.training import digits

BATCH, HIDDEN = 1024, 4


def network():
    hidden = [part for _ in range(HIDDEN) for part in (nn.Linear(64, 64, bias=False), torch.nn.ReLU())]
    return nn.init.kaiming_normal_(torch.nn.Sequential(*hidden, nn.Linear(64, 10, bias=False)))


def train(make, images, labels, passes):
    """The network after some passes, and each layer's |weights| / |gradient| at each step, [steps, layers]."""
    torch.manual_seed(0)
    model = network()
    optimizer = make(model.parameters())
    ratios = []
    for _ in range(passes):
        some = torch.randperm(len(labels))[:BATCH]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[some]), labels[some]).backward()
        ratios.append([(p.norm() / p.grad.norm()).item() for p in model.parameters()])
        optimizer.step()
    return model, ratios


def main(steps=20, report=None):
    data = digits()
    images, test = (nn.functional.avg_pool2d(x, 4).flatten(1) for x in (data.train_images, data.test_images))
    kinds = {
        "SGD": (dlkern.optim.SGD, [0.01 * 3**k for k in range(6)]),
        "LARS": (dlkern.optim.LARS, [1.0 * 3**k for k in range(6)]),  # times its trust coefficient, 0.001
    }
    numbers = {}
    drawing, ((a, b),) = figure(1, 2, (13, 4.5))
    for name, (optimizer, rates) in kinds.items():
        found = []
        for rate in rates:
            model, ratios = train(
                lambda p, of=optimizer, rate=rate: of(p, lr=rate, momentum=0.9), images, data.train_labels, steps
            )
            with torch.no_grad():
                found.append((model(test).argmax(1) == data.test_labels).double().mean().item())
            if name == "LARS" and rate == rates[1]:
                a.semilogy(ratios, label=[f"layer {i}" for i in range(1, HIDDEN + 2)])
                numbers["largest over smallest ratio"] = max(max(r) / min(r) for r in ratios)
        b.semilogx([rate / rates[0] for rate in rates], found, "o-", label=f"{name}, from {rates[0]} on")
        numbers[f"{name}: accuracy by rate"] = found
        numbers[f"{name}: rates that learn"] = sum(accuracy > 0.6 for accuracy in found)
    a.set(title="size of weights over size of gradients", xlabel="step")
    b.set(title=f"accuracy after {steps} passes", xlabel="rate over the smallest")
    a.legend()
    b.legend()
    save(drawing, report, "lars")
    return numbers


if __name__ == "__main__":
    run(main, 20)
