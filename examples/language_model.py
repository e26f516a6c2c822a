"""A GRU learns to write the help texts of Python's standard library, character by character.

Two choices are compared from the same start. How the text is cut: sequential partitioning lets the state go on from batch to
batch, random sampling begins each piece anew from zeros. What a character becomes: a one-hot vector, or a learned embedding.

What to see: perplexity says between how many characters, equally likely, the model is as unsure; 1 would be certainty. It
falls below what the shares of single characters reach (dotted) within a few steps. The two ways to cut (left) learn about as
fast, but not the same (middle): with random sampling the first characters of a piece are guessed nearly blindly, and each
further one better; a state that goes on makes all places alike. A one-hot vector times the GRU's matrix is a row of
that matrix, which is what an embedding is, so both (right) can learn the same; the embedding's larger numbers let it start
faster. What the model writes (printed) looks like English words long before it says anything. Printed, too: how likely the two
characters are that three searches find to go on after beginnings from the held-out text. Greedy search takes the likeliest
first, which may lead nowhere; exhaustive search tries all pairs; a beam of three comes near it at a small part of the work.
"""

import math

import torch
from common import figure, run, save

import dlkern
from dlkern import nn
from dlkern.decoding import beam_search, exhaustive_search, greedy_search
from dlkern.models.language import LanguageModel, detached, generate
from dlkern.text import corpus
from dlkern.training import perplexity, text_batches

HIDDEN, BATCH = 128, 32


def held_out(data):
    """2,000 characters from eight places of the text that is not trained on: some of it is tables, which are easy."""
    return data.test[: len(data.test) // 8 * 8].view(8, -1)[:, :250].flatten()


def train(data, steps, length, sampling, embedding, numbers, name):
    """(step, perplexity of held-out text) of some steps; the last steps' loss by the place in a piece, [length]; the model."""
    torch.manual_seed(0)
    model = LanguageModel(len(data.vocabulary), HIDDEN, embedding=embedding)
    optimizer = dlkern.optim.Adam(model.parameters(), lr=5e-3)
    test, state, curve, places = held_out(data), None, [], []
    stream = text_batches(data.train, BATCH, length, sampling, 0)
    for step in range(steps + 1):
        if step % max(1, steps // 10) == 0 or step == steps:
            curve.append((step, perplexity(model, test)))
        begins, tokens, targets = next(stream)
        logits, state = model(tokens, None if begins or sampling == "random" else detached(state))
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step > steps * 3 // 4 and len(tokens) == length:
            places.append(losses.detach().view(length, -1).mean(1))
    numbers[f"{name}: perplexity"] = curve[-1][1]
    return curve, torch.stack(places).mean(0), model


def searched(model, text, numbers):
    """How three searches go on after 40 beginnings of 20 characters."""
    starts = text[: len(text) // 40 * 40].view(40, -1)[:, :20].T  # [20, 40]
    with torch.no_grad():
        _, state = model(starts[:-1])

    def step(tokens, state):  # [rows], [rows, layers, hidden]
        logits, state = model(tokens[None], state.transpose(0, 1).contiguous())
        return logits[0], state.transpose(0, 1)

    begin, settings = (step, state.transpose(0, 1), starts[-1]), dict(end=None, max_length=2)
    found = {
        "greedy": greedy_search(*begin, **settings), "beam of 3": beam_search(*begin, beams=3, **settings),
        "exhaustive": exhaustive_search(*begin, **settings),
    }  # fmt: skip
    for name, result in found.items():
        numbers[f"{name} search: mean log-probability"] = result.scores[:, 0].mean().item()


def main(steps=400, report=None):
    data, numbers = corpus("char"), {}
    shares = torch.bincount(data.train, minlength=len(data.vocabulary)).double() + 1
    chance = math.exp(-(shares / shares.sum()).log()[held_out(data)].mean().item())
    numbers["single characters: perplexity"] = chance
    drawing, ((a, c, b),) = figure(1, 3, (16, 4.5))
    for sampling in ("sequential", "random"):
        curve, places, _ = train(data, steps, 8, sampling, 32, numbers, sampling)
        a.plot(*zip(*curve), label=sampling)
        c.plot(range(1, 9), places.exp(), label=sampling)
        numbers[f"{sampling}: perplexity of a piece's first and last character"] = places[[0, -1]].exp().tolist()
    for name, embedding in (("one-hot", None), ("embedding", 32)):
        curve, _, model = train(data, steps, 32, "sequential", embedding, numbers, name)
        b.plot(*zip(*curve), label=name)
    for axes, title in ((a, "pieces of 8 characters"), (b, "pieces of 32 characters")):
        axes.axhline(chance, linestyle=":", color="black")
        axes.set(title=title, xlabel="step", ylabel="perplexity", yscale="log")
        axes.legend()
    c.set(title="by the place in a piece", xlabel="character", ylabel="perplexity")
    c.legend()
    save(drawing, report, "language_model")
    searched(model, data.test, numbers)
    written = generate(model, data.vocabulary.encode("The "), 80, temperature=0.5, generator=torch.Generator().manual_seed(0))
    return numbers | {"it writes": "The " + "".join(data.vocabulary.decode(written))}


if __name__ == "__main__":
    run(main, 400)
