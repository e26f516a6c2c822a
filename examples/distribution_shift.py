"""Training data from one distribution, test data from another: importance weights repair it.

Covariate shift: digits of the training set are mostly turned upright, of the test set mostly tilted. A logistic regression
that tells training images from test images (without labels) gives each training image the weight p(test) / p(training),
clipped; the weighted loss trains for the test set.

Label shift: even digits are common in training and rare in the test set. What probabilities a classifier answers, on held-out
training images (its confusion matrix C) and on the test images (mu), gives the test set's label shares by solving C w = mu;
w are the classes' weights in the loss.

What to see: bars of accuracy on the shifted test set. The weighted training regains part of what shift cost; trained
on images like the test set's would be best ("no shift"). Right: the estimated class weights against the true ones.
"""

import torch
from common import figure, run, save

import dlkern
from dlkern import nn
from dlkern.training import digits

F = nn.functional


def small(images):
    return F.avg_pool2d(images, 4).flatten(1)  # [n, 64]


def tilted(images):
    """Turned by half a right angle, as a resampling of the image."""
    angle = torch.tensor(0.7)
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    grid = torch.nn.functional.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1


def classifier(outputs=10, hidden=12):
    layers = [nn.Linear(64, hidden), torch.nn.ReLU(), nn.Linear(hidden, outputs)] if hidden else [nn.Linear(64, outputs)]
    return nn.init.kaiming_normal_(torch.nn.Sequential(*layers))


def train(model, x, y, steps, sample_weight=None, class_weight=None):
    """Full-batch Adam on the (weighted) cross-entropy."""
    optimizer = dlkern.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, weight=class_weight, sample_weight=sample_weight).backward()
        optimizer.step()
    return model


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def covariate(data, steps):
    """Accuracy on tilted images, mostly, after training on upright ones, mostly: plain, weighted, and without shift."""
    upright, turned = small(data.train_images), small(tilted(data.train_images))
    few = torch.rand(len(upright)) < 0.1
    x, y = torch.where(few[:, None], turned, upright), data.train_labels
    target = torch.where((torch.rand(len(data.test_labels)) < 0.9)[:, None], small(tilted(data.test_images)),
                         small(data.test_images))  # fmt: skip
    both = torch.cat([x, target])
    domain = torch.cat([torch.zeros(len(x)), torch.ones(len(target))]).long()
    share = torch.tensor([len(both) / (2 * len(x)), len(both) / (2 * len(target))])
    # Judged by a coin of equal sides: class weights level the two sets' sizes.
    logistic = train(classifier(2, hidden=0), both, domain, steps, class_weight=share)
    with torch.no_grad():
        odds = logistic(x)
    weight = (odds[:, 1] - odds[:, 0]).exp().clamp(max=20.0)
    results = {}
    for name, w in (("plain", None), ("weighted", weight)):
        torch.manual_seed(1)
        results[name] = accuracy(train(classifier(), x, y, steps, w), target, data.test_labels)
    torch.manual_seed(1)
    results["no shift"] = accuracy(train(classifier(), torch.where(few[:, None], upright, turned), y, steps), target,
                                   data.test_labels)  # fmt: skip
    return results


def label(data, steps):
    """The same for label shift, and estimated and true class weights."""
    even = torch.arange(10) % 2 == 0
    x, y = small(data.train_images), data.train_labels
    noise = 0.4 * torch.randn(x.shape)  # hard enough that how common a class is matters
    keep = even[y] | (torch.rand(len(y)) < 0.2)
    x, y = (x + noise)[keep], y[keep]
    xt, yt = small(data.test_images), data.test_labels
    kept = ~even[yt] | (torch.rand(len(yt)) < 0.2)
    xt, yt = (xt + 0.4 * torch.randn(xt.shape))[kept], yt[kept]
    held = torch.arange(len(y)) % 3 == 0
    torch.manual_seed(2)
    first = train(classifier(hidden=0), x[~held], y[~held], steps)
    with torch.no_grad():  # of probabilities: less noisy than counts
        said, said_of_test = first(x[held]).softmax(1), first(xt).softmax(1)
    confusion = said.T @ torch.eye(10)[y[held]] / len(said)
    mu = said_of_test.mean(0)
    # Least squares for w - 1 with a small ridge: C's columns of rare classes are estimated from few images.
    square = confusion.T @ confusion + 1e-4 * torch.eye(10)
    estimated = (1 + torch.linalg.solve(square, confusion.T @ (mu - confusion.sum(1)))).clamp(0.05, 20)
    true = (torch.bincount(yt, minlength=10) / len(yt)) / (torch.bincount(y, minlength=10) / len(y))
    results = {}
    for name, w in (("plain", None), ("weighted", estimated), ("true weights", true)):
        torch.manual_seed(2)
        results[name] = accuracy(train(classifier(), x, y, steps, class_weight=w), xt, yt)
    return results, estimated, true


def main(steps=120, report=None):
    data = digits()
    torch.manual_seed(0)
    shifted, (relabelled, estimated, true) = covariate(data, steps), label(data, steps)
    drawing, ((a, b, c),) = figure(1, 3, (13, 4))
    for axes, results, title in ((a, shifted, "covariate shift"), (b, relabelled, "label shift")):
        axes.bar(list(results), list(results.values()))
        axes.set(title=title, ylabel="accuracy on the test set", ylim=(0, 1))
    c.plot(true, "o", label="true")
    c.plot(estimated, "x", label="estimated")
    c.set(title="class weights", xlabel="digit")
    c.legend()
    save(drawing, report, "distribution_shift")
    return {f"{kind}, {k}": v for kind, r in (("covariate", shifted), ("label", relabelled)) for k, v in r.items()}


if __name__ == "__main__":
    run(main, 120)
