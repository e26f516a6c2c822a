"""Which heads of attention matter, by three scores, and what is left of the accuracy without the others.

A Transformer of two layers with eight heads each reads rows of digits and says at each place which digit came before it and
which stands at the mirrored place. Its heads are then scored by how much their outputs vary, by how large the loss's
gradient with respect to their outputs is, and by how much the loss grows without them; and removed, least first.

What to see: by variance and by ablation a few heads of the first layer stand out (left); the loss's gradients differ less from
head to head. Removed from the least on, by any of the scores, most can go before the accuracy falls (right): the network had
more than it needs, and becomes smaller with each. The other way round (dotted), the most important head first, the accuracy
falls with the third or fourth. Ablation asks what one wants to know, at the price of one run a head; the others need one run.
"""

import copy

import torch
from common import figure, run, save

import dlkern
from dlkern import nn

DIGITS, LENGTH, WIDTH, HEADS, LAYERS = 10, 12, 64, 8, 2
SCORES = ("variance", "gradient_norm", "ablation")


class Tagger(torch.nn.Module):
    """Digits [n, LENGTH] to logits [n, LENGTH, 2, DIGITS]: of the digit before, and of that at the mirrored place."""

    def __init__(self):
        super().__init__()
        self.digits, self.places = nn.Embedding(DIGITS, WIDTH), nn.LearnedPositions(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        torch.nn.init.normal_(self.places.weight)
        self.output = nn.Linear(WIDTH, 2 * DIGITS)

    def forward(self, x):
        return self.output(self.layers(self.places(self.digits(x)))).unflatten(-1, (2, DIGITS))


def wanted(x):
    """[n, LENGTH, 2]."""
    return torch.stack([x.roll(1, 1), x.flip(1)], -1)


def pruned(model, heads):
    """A copy without some heads, given as pairs of layer and head; one head a layer stays in any case."""
    smaller = copy.deepcopy(model)
    for number, layer in enumerate(smaller.layers.layers):
        nn.prune_heads(layer.self_attn, [head for of, head in heads if of == number][: HEADS - 1])
    return smaller


def main(steps=120, report=None):
    model = Tagger()
    optimizer = dlkern.optim.Adam(model.parameters(), lr=3e-3)

    def loss_of(x):
        return nn.functional.cross_entropy(model(x).flatten(0, 2), wanted(x).flatten())

    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(torch.randint(DIGITS, (32, LENGTH)))
        loss.backward()
        optimizer.step()
    model.eval()
    batches = [torch.randint(DIGITS, (64, LENGTH)) for _ in range(4)]
    test = torch.randint(DIGITS, (256, LENGTH))

    def accuracy(network):
        with torch.no_grad():
            return (network(test).argmax(-1) == wanted(test)).double().mean().item()

    numbers = {"accuracy": accuracy(model), "parameters": sum(p.numel() for p in model.parameters())}
    drawing, ((a, b),) = figure(1, 2, (13, 4.5))
    counts = range(0, LAYERS * (HEADS - 1) + 1)
    for i, method in enumerate(SCORES):
        found = torch.stack(list(nn.head_importance(model, loss_of, batches, method).values()))  # [LAYERS, HEADS]
        order = [divmod(k, HEADS) for k in found.flatten().argsort().tolist()]
        a.bar([k + 0.27 * (i - 1) for k in range(LAYERS * HEADS)], (found.flatten() / found.max()).tolist(), 0.25, label=method)
        curve = [accuracy(pruned(model, order[:count])) for count in counts]
        b.plot(counts, curve, label=method)
        numbers[f"{method}: accuracy without half of the heads"] = curve[LAYERS * HEADS // 2]
    worst = [accuracy(pruned(model, order[::-1][:count])) for count in counts]
    b.plot(counts, worst, ":", color="black", label="the most important first, by ablation")
    numbers["accuracy without the most important half"] = worst[LAYERS * HEADS // 2]
    half = pruned(model, order[: LAYERS * HEADS // 2])
    numbers["parameters without half of the heads"] = sum(p.numel() for p in half.parameters())
    a.set(title="score over the largest", xlabel="head (eight a layer)")
    b.set(title="accuracy", xlabel="heads removed")
    a.legend()
    b.legend()
    save(drawing, report, "head_pruning")
    return numbers


if __name__ == "__main__":
    run(main, 120)
