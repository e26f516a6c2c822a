"""Where a token stands: five ways to tell attention, which by itself sees a set, not a sequence.

Sinusoidal and learned positions are added to the embeddings; relative positions add a learned number to each score, one for
each bucket of distances; ALiBi takes a fixed number times the distance away; rotary positions turn queries and keys, by
angles that grow with the place. One layer of attention then has to say, at each place, which token stood three places before.
It learns on sequences of 24 tokens and is asked about 96.

What to see: a sinusoidal position (first panel, one a row) has fast and slow waves, as a binary number has digits. Products of
two such positions (second) depend on their distance alone, as do those of two equal vectors that rotary positions have turned
(the same curve: both have the same waves). The learned relative bias has its peak at the distance that the task asks for.
Four ways learn the task (third), rotary positions by far the fastest. Without positions the network guesses among what it
sees; ALiBi can prefer near tokens, but not single out the third. At places it was not trained on (last, right of the line)
no way is safe: learned positions know nothing there, sinusoids come and go, the relative bias fades as more and more other
tokens share the attention, and rotary positions hold the longest.
"""

import torch
from common import figure, run, save

import dlkern
from dlkern import nn

F = nn.functional
TOKENS, WIDTH, HEADS, BACK = 8, 64, 4, 3
SHORT, LONG = 24, 96
KINDS = ("none", "sinusoidal", "learned", "relative", "ALiBi", "rotary")


class Network(torch.nn.Module):
    """Tokens [n, length] to logits [n, length, TOKENS], by one layer of attention to the places before."""

    def __init__(self, kind):
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.attended, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, TOKENS)
        self.added = {"sinusoidal": nn.SinusoidalPositions(WIDTH), "learned": nn.LearnedPositions(LONG, WIDTH)}.get(kind)
        self.bias = nn.RelativePositionBias(HEADS, bidirectional=False) if kind == "relative" else None
        self.turned = nn.RotaryPositions(WIDTH // HEADS) if kind == "rotary" else None
        self.slopes = F.alibi_slopes(HEADS) if kind == "ALiBi" else None

    def forward(self, tokens):
        x = self.tokens(tokens)
        x = self.added(x) if self.added else x
        heads = self.attended(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [3, n, HEADS, length, width]
        query, key, value = heads.unbind()
        if self.turned:
            query, key = self.turned(query, key)
        bias = self.bias(tokens.shape[1], tokens.shape[1]) if self.bias else None
        found = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=True, alibi_slopes=self.slopes
        )  # [n, HEADS, length, width]
        return self.output(found.transpose(1, 2).flatten(2))


def train(kind, steps):
    """The network and its losses."""
    torch.manual_seed(0)
    model, losses = Network(kind), []
    optimizer = dlkern.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        tokens = torch.randint(TOKENS, (32, SHORT))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens)[:, BACK:].flatten(0, 1), tokens[:, :-BACK].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def accuracy(model):
    """Of each place from BACK on, [LONG - BACK]."""
    tokens = torch.randint(TOKENS, (200, LONG))
    with torch.no_grad():
        return (model(tokens)[:, BACK:].argmax(-1) == tokens[:, :-BACK]).double().mean(0)


def main(steps=300, report=None):
    drawing, ((a, b, c, d),) = figure(1, 4, (20, 4.5))
    numbers = {}
    table = F.sinusoidal_positions(LONG, WIDTH)
    a.imshow(table.numpy(), aspect="auto", cmap="coolwarm")
    a.set(title="sinusoidal positions", xlabel="element", ylabel="place")
    for kind in KINDS:
        model, losses = train(kind, steps)
        right = accuracy(model)
        c.plot(losses, label=kind)
        d.plot(range(BACK, LONG), right, label=kind)
        inside, beyond = right[: SHORT - BACK].mean().item(), right[SHORT - BACK :].mean().item()
        numbers[f"{kind}: accuracy within the trained length and beyond"] = inside, beyond
        if kind == "relative":
            with torch.no_grad():
                learned = model.bias(LONG, LONG)[:, -1].flip(1)  # [HEADS, distance], of the last query
    products = table @ table.T
    far = torch.arange(SHORT)
    same = torch.ones(1, 1, LONG, WIDTH)
    query, key = nn.RotaryPositions(WIDTH)(same, same)
    turned = (query @ key.mT)[0, 0]
    for name, scores in (("sinusoidal", products), ("rotary", turned)):
        spread = max((scores.diagonal(-k) - scores[k, 0]).abs().max().item() for k in far.tolist())
        numbers[f"{name}: scores of one distance differ by"] = spread / scores[0, 0].item()
        b.plot(far, scores[far, 0] / scores[0, 0], "--" if name == "rotary" else "-", label=name)
    best = learned[:, :SHORT].max(1)
    numbers["relative: distances of the heads' largest bias"] = best.indices.tolist()
    head = best.values.argmax()
    b.plot(far, learned[head, :SHORT] / best.values[head], label="learned bias of one head")
    b.plot(far, -far * F.alibi_slopes(HEADS)[0], label="ALiBi, first head")
    b.set(title="score by distance, over the largest", xlabel="distance", ylim=(-2, 1.1))
    c.set(title=f"loss, {SHORT} places", xlabel="step")
    d.axvline(SHORT, linestyle=":", color="black")
    d.set(title="accuracy by the place", xlabel="place", ylim=(0, 1.05))
    for axes in (b, c, d):
        axes.legend()
    save(drawing, report, "positions")
    return numbers


if __name__ == "__main__":
    run(main, 300)
