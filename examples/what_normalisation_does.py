"""What batch norm, dropout and weight decay do to LeNet.

LeNet in its first form (sigmoids, average pooling) on scikit-learn's digits. First row: without and with batch norm, at
rising learning rates. Second row: few images, so that the network can learn them by heart; alone, with dropout, with
weight decay: error on the images it trains on and on others. Third row: batch norm before the activation or behind it; what
its scales and shifts have become; batch norm against dropout on the few images, with ReLU, which learns without either.

What to see: without batch norm the sigmoid network does not move at any of these rates, because its gradients vanish on the
way back (printed: the first layer's over the last's); with it every rate trains, and large rates train fastest, once over
their first jumps. In the second row the training error (solid) falls to almost
nothing, with dropout last, and the held-out error (dashed) stays well above it: that gap is overfitting. On 150 images of
digits neither dropout nor weight decay closes it by more than chance (other seeds order the three otherwise): what this
network lacks is data. Batch norm works in both places, and behind sigmoids better, whose outputs are all positive. Scales
(which began at 1) and shifts (at 0) have moved, each channel's its own way: the network does not keep the unit variance that
it is given. Dropout slows the first steps down, batch norm speeds them up, with dropout too; in the end all four are alike.
"""

import torch
from common import figure, losses, run, save

import dlkern
from dlkern import nn
from dlkern.training import batches, digits

RATES = (0.1, 0.5, 2.0)


def lenet(norm="", dropout=0.0, activation=torch.nn.Sigmoid):
    """LeNet with batch norm "before" or "behind" each activation, or without."""

    def active(layer):
        return {"": [activation()], "before": [layer, activation()], "behind": [activation(), layer]}[norm]

    def drop():
        return [nn.Dropout(dropout)] if dropout else []

    return torch.nn.Sequential(
        nn.Conv2d(1, 6, 5), *active(nn.BatchNorm2d(6)), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), *active(nn.BatchNorm2d(16)), nn.AvgPool2d(2), torch.nn.Flatten(),
        nn.Linear(400, 120), *active(nn.BatchNorm1d(120)), *drop(),
        nn.Linear(120, 84), *active(nn.BatchNorm1d(84)), *drop(), nn.Linear(84, 10),
    )  # fmt: skip


def error(model, images, labels):
    """Share of images that are classified wrongly."""
    model.eval()
    with torch.no_grad():
        wrong = (model(images).argmax(1) != labels).double().mean().item()
    model.train()
    return wrong


def first_over_last(norm, data):
    """Size of the first layer's gradient over the last layer's, before the first step."""
    torch.manual_seed(0)
    model = nn.init.xavier_uniform_(lenet(norm))
    nn.functional.cross_entropy(model(data.train_images[:64]), data.train_labels[:64]).backward()
    return (model[0].weight.grad.norm() / model[-1].weight.grad.norm()).item()


def on_few(model, data, steps, rate, decay=0.0):
    """Steps, and the errors after them on 150 training images and on those held out."""
    images, labels = data.train_images[:150], data.train_labels[:150]
    optimizer = dlkern.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)
    marks, seen, held_out = [], [], []
    for step in range(0, steps, 5):
        index = torch.randint(150, (5, 50))
        losses(model, iter([(images[i], labels[i]) for i in index]), min(5, steps - step), optimizer)
        marks.append(min(step + 5, steps))
        seen.append(error(model, images, labels))
        held_out.append(error(model, data.test_images, data.test_labels))
    return marks, seen, held_out


def main(steps=120, report=None):
    data, numbers = digits(), {}
    drawing, axes = figure(3, 3, (13, 10))

    def curve(norm, rate):
        torch.manual_seed(0)
        model = nn.init.xavier_uniform_(lenet(norm))
        return model, losses(model, batches(data, 64, 0), steps, dlkern.optim.SGD(model.parameters(), lr=rate))

    for norm, name in (("", "without"), ("before", "with batch norm")):
        numbers[f"{name}: the first layer's gradient over the last's"] = first_over_last(norm, data)
    for column, rate in enumerate(RATES):
        for norm, name in (("", "without"), ("before", "with batch norm")):
            _, found = curve(norm, rate)
            axes[0, column].plot(found, label=name)
            numbers[f"last loss at rate {rate} {name}"] = sum(found[-5:]) / len(found[-5:])
        axes[0, column].set(title=f"learning rate {rate}", xlabel="step", ylabel="training loss", ylim=(0, 3))
    for column, (name, dropout, decay) in enumerate([("plain", 0, 0), ("dropout", 0.5, 0), ("weight decay", 0, 0.02)]):
        torch.manual_seed(0)
        marks, seen, held_out = on_few(nn.init.xavier_uniform_(lenet("before", dropout)), data, steps, 0.3, decay)
        axes[1, column].plot(marks, seen, label="training images")
        axes[1, column].plot(marks, held_out, "--", label="held out")
        axes[1, column].set(title=name, xlabel="step", ylabel="error", ylim=(0, 1))
        numbers[f"{name}: training error"], numbers[f"{name}: held-out error"] = seen[-1], held_out[-1]
    for norm in ("before", "behind"):
        model, found = curve(norm, 0.5)
        axes[2, 0].plot(found, label=f"{norm} the activation")
        numbers[f"batch norm {norm}: last loss"] = sum(found[-5:]) / len(found[-5:])
        if norm == "before":
            scales, shifts = [], []
            for layer in model:
                if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                    scales += layer.weight.tolist()
                    shifts += layer.bias.tolist()
                    axes[2, 1].plot(layer.bias.tolist(), layer.weight.tolist(), ".", label=f"{layer.num_features} channels")
            numbers["scales from, to"], numbers["shifts from, to"] = (min(scales), max(scales)), (min(shifts), max(shifts))
    axes[2, 0].set(title="placement, rate 0.5", xlabel="step", ylabel="training loss", ylim=(0, 3))
    axes[2, 1].set(title="learned scales and shifts", xlabel="shift", ylabel="scale")
    for name, norm, dropout in (
        ("neither", "", 0), ("dropout", "", 0.5), ("batch norm", "before", 0), ("both", "before", 0.5)
    ):  # fmt: skip
        torch.manual_seed(0)
        marks, _, held_out = on_few(nn.init.kaiming_uniform_(lenet(norm, dropout, torch.nn.ReLU)), data, steps, 0.1)
        axes[2, 2].plot(marks, held_out, label=name)
        early = held_out[:5]
        numbers[f"ReLU, {name}: held-out error within 25 steps and at the end"] = sum(early) / len(early), held_out[-1]
    axes[2, 2].set(title="ReLU, few images", xlabel="step", ylabel="held-out error", ylim=(0, 1))
    for row in axes:
        for place in row:
            place.legend()
    save(drawing, report, "what_normalisation_does")
    return numbers


if __name__ == "__main__":
    run(main, 120)
