"""What a network has learned goes to a file and into another network, whole or in part.

LeNet learns the digits 0 to 4 and is saved. A fresh network that loads all of it gives the same answers to the last bit. Then
there are the digits 5 to 9, of which only four images each are known: one network starts from scratch, one loads the saved
convolutions alone and goes on training all layers, one loads them and trains only what comes behind.

What to see: the two that begin with the saved convolutions (right) are far ahead in the first steps, and a little at the end:
strokes and corners, once learned, serve for digits never seen. Whether the convolutions are trained further matters little
here; keeping them costs less. Twenty images are soon known by heart, and all three lose some accuracy then. Left: the loaded
kernels.
"""

import tempfile
from pathlib import Path

import torch
from common import figure, run, save

import dlkern
from dlkern import nn
from dlkern.models import lenet
from dlkern.training import digits


def chosen(data, first, count=None):
    """Images and labels from 0 of the classes first ... first + 4: `count` a class to train on, and those held out."""
    parts = []
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        keep = [((labels == k).nonzero()[:, 0])[: count if not parts else None] for k in range(first, first + 5)]
        parts += [images[torch.cat(keep)], labels[torch.cat(keep)] - first]
    return parts


def train(model, parameters, parts, steps):
    """Held-out accuracy after each tenth of the steps, and before the first."""
    images, labels, test_images, test_labels = parts
    optimizer = dlkern.optim.SGD(parameters, lr=0.05, momentum=0.9)
    curve = []
    for step in range(steps + 1):
        if step % max(1, steps // 10) == 0:
            with torch.no_grad():
                curve.append((step, (model(test_images).argmax(1) == test_labels).double().mean().item()))
        some = torch.randint(len(labels), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[some]), labels[some]).backward()
        optimizer.step()
    return curve


def main(steps=40, report=None, draws=3):
    data, numbers = digits(), {}
    old = lenet(5)
    few = chosen(data, 5, count=4)
    numbers["accuracy on 0 to 4"] = train(old, old.parameters(), chosen(data, 0), 2 * steps)[-1][1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lenet.pt"
        torch.save(old.state_dict(), file)
        numbers["bytes of the file"] = file.stat().st_size
        saved = torch.load(file)
    copy = lenet(5)
    copy.load_state_dict(saved)
    with torch.no_grad():
        numbers["the copy gives the same bits"] = torch.equal(copy(few[2]), old(few[2]))
    features = {key: value for key, value in saved.items() if key.startswith("features.")}
    drawing, ((a, b),) = figure(1, 2, (12, 4.5))
    framed = torch.nn.functional.pad(saved["features.0.weight"][:, 0], (0, 1, 0, 1), value=torch.nan)  # [6, 6, 6]
    a.imshow(framed.view(2, 3, 6, 6).transpose(1, 2).reshape(12, 18)[:-1, :-1].numpy(), cmap="gray")
    a.set(title="kernels of the first layer", xticks=[], yticks=[])
    for name in ("from scratch", "loaded, all trained", "loaded, the rest trained"):
        curves = []
        for draw in range(draws):
            torch.manual_seed(draw)
            model = lenet(5)
            if name != "from scratch":
                missing, unexpected = model.load_state_dict(features, strict=False)
                assert not unexpected and all(key.startswith("classifier.") for key in missing)
            part = model.classifier if name == "loaded, the rest trained" else model
            curves.append(train(model, part.parameters(), few, steps))
        mean = torch.tensor(curves)[..., 1].mean(0)
        b.plot([step for step, _ in curves[0]], mean, label=name)
        numbers[f"{name}: accuracy early and at the end"] = mean[[1, -1]].tolist()
    b.set(title="accuracy on 5 to 9", xlabel="step")
    b.legend()
    save(drawing, report, "saving_and_loading")
    return numbers


if __name__ == "__main__":
    run(main, 40)
