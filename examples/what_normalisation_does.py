"""What batch norm, dropout and weight decay do to LeNet.

LeNet in its first form (sigmoids, average pooling) on scikit-learn's digits. First row: without and with batch norm, at
rising learning rates. Second row: few images, so that the network can learn them by heart; alone, with dropout, with
weight decay: error on the images it trains on and on others.

What to see: without batch norm the sigmoid network does not move at any of these rates, because its gradients vanish on the
way back; with it every rate trains, and large rates train fastest. In the second row the training error (solid) falls to almost
nothing, with dropout last, and the held-out error (dashed) stays well above it: that gap is overfitting. On 150 images of
digits neither dropout nor weight decay closes it by more than chance (other seeds order the three otherwise): what this
network lacks is data.
"""

import torch
from common import figure, run, save

import dlkern
from dlkern import nn
from dlkern.training import batches, digits

RATES = (0.1, 0.5, 2.0)


def lenet(batch_norm=False, dropout=0.0):
    """LeNet with sigmoids; batch norm goes between a layer and its sigmoid."""

    def norm(layer):
        return [layer] if batch_norm else []

    def drop():
        return [nn.Dropout(dropout)] if dropout else []

    return torch.nn.Sequential(
        nn.Conv2d(1, 6, 5), *norm(nn.BatchNorm2d(6)), torch.nn.Sigmoid(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), *norm(nn.BatchNorm2d(16)), torch.nn.Sigmoid(), nn.AvgPool2d(2), torch.nn.Flatten(),
        nn.Linear(400, 120), *norm(nn.BatchNorm1d(120)), torch.nn.Sigmoid(), *drop(),
        nn.Linear(120, 84), *norm(nn.BatchNorm1d(84)), torch.nn.Sigmoid(), *drop(), nn.Linear(84, 10),
    )  # fmt: skip


def losses(model, stream, steps, optimizer):
    """The loss of each step."""
    curve = []
    for _ in range(steps):
        images, labels = next(stream)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def error(model, images, labels):
    """Share of images that are classified wrongly."""
    model.eval()
    with torch.no_grad():
        wrong = (model(images).argmax(1) != labels).double().mean().item()
    model.train()
    return wrong


def main(steps=120, report=None):
    data, numbers = digits(), {}
    drawing, axes = figure(2, 3, (13, 7))
    for column, rate in enumerate(RATES):
        for batch_norm in (False, True):
            torch.manual_seed(0)
            model = nn.init.xavier_uniform_(lenet(batch_norm))
            curve = losses(model, batches(data, 64, 0), steps, dlkern.optim.SGD(model.parameters(), lr=rate))
            name = "with batch norm" if batch_norm else "without"
            axes[0, column].plot(curve, label=name)
            numbers[f"last loss at rate {rate} {name}"] = sum(curve[-5:]) / len(curve[-5:])
        axes[0, column].set(title=f"learning rate {rate}", xlabel="step", ylabel="training loss", ylim=(0, 3))
        axes[0, column].legend()
    few = data.train_images[:150], data.train_labels[:150]
    for column, (name, dropout, decay) in enumerate([("plain", 0, 0), ("dropout", 0.5, 0), ("weight decay", 0, 0.02)]):
        torch.manual_seed(0)
        model = nn.init.xavier_uniform_(lenet(True, dropout))
        optimizer = dlkern.optim.SGD(model.parameters(), lr=0.3, weight_decay=decay)
        seen, held_out, marks = [], [], []
        for step in range(0, steps, 5):
            index = torch.randint(150, (5, 50))
            losses(model, iter([(few[0][i], few[1][i]) for i in index]), min(5, steps - step), optimizer)
            marks.append(step)
            seen.append(error(model, *few))
            held_out.append(error(model, data.test_images, data.test_labels))
        axes[1, column].plot(marks, seen, label="training images")
        axes[1, column].plot(marks, held_out, "--", label="held out")
        axes[1, column].set(title=name, xlabel="step", ylabel="error", ylim=(0, 1))
        axes[1, column].legend()
        numbers[f"{name}: training error"], numbers[f"{name}: held-out error"] = seen[-1], held_out[-1]
    save(drawing, report, "what_normalisation_does")
    return numbers


if __name__ == "__main__":
    run(main, 120)
