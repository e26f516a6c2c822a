"""A recurrent network with additive (Bahdanau) attention translates Django's messages, and two searches let it write.

A bidirectional GRU reads the English message; another GRU writes the French one, word by word, and attends before each word
to what was read. Greedy search takes the likeliest word each time. Beam search keeps the best few unfinished sentences instead.

What to see: the loss (left) falls to almost nothing: some 600 messages are learned by heart, and with those every search
finds the same. Of new messages, more beams find sentences the model thinks likelier (second panel: mean log-probability), for
a first word that looks worse may lead to a better whole; most of the gain comes with the second beam. Whether they are better
is another question: BLEU (third) moves little, and either way. Right: where each written word (rows) looked. The dark
places run down a rough diagonal, since both languages say it in nearly one order; words that English lacks look where their
neighbours look.
"""

import torch
from common import figure, run, save

import dlkern
from dlkern import nn
from dlkern.decoding import beam_search, greedy_search
from dlkern.models import seq2seq
from dlkern.translation import BEGIN, END, Pairs, as_batch, bilingual, bleu, join, pair_batches, token_loss

BEAMS = (1, 2, 4, 8)


@torch.no_grad()
def written(model, corpus, batch, beams):
    """Translations as tokens, and their mean log-probability."""
    start, settings = torch.full((len(batch.source),), BEGIN), dict(end=END, max_length=20)
    state = model.start(batch.source, batch.lengths)
    if beams == 1:
        found = greedy_search(model.step, state, start, **settings)
    else:
        found = beam_search(model.step, state, start, beams=beams, **settings)
    return [corpus.target_words.decode(row) for row in found.best()], found.scores[:, 0].mean().item()


def main(steps=300, report=None):
    corpus = bilingual(longest=12)
    torch.manual_seed(0)
    model = seq2seq(len(corpus.source_words), len(corpus.target_words), embedding=64, hidden=96)
    optimizer = dlkern.optim.Adam(model.parameters(), lr=4e-3)
    stream, losses = pair_batches(corpus, 32, 0), []
    for _ in range(steps):
        batch = next(stream)
        optimizer.zero_grad()
        loss = token_loss(nn, model(batch.source, batch.lengths, batch.given), batch.wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    numbers = {"first loss": losses[0], "last loss": losses[-1]}
    drawing, ((a, b, c, d),) = figure(1, 4, (20, 4.5))
    a.plot(losses)
    a.set(title="loss", xlabel="step", yscale="log")
    count = len(corpus.test)
    spread = slice(0, len(corpus.train) // count * count, len(corpus.train) // count)
    known = Pairs(corpus.train.source[spread], corpus.train.target[spread])
    for name, part in (("learned", known), ("new", corpus.test)):
        batch, scores, points = as_batch(part, range(count), corpus), [], []
        for beams in BEAMS:
            sentences, score = written(model, corpus, batch, beams)
            scores.append(score)
            points.append(bleu(sentences, part.target))
        b.plot(BEAMS, scores, "o-", label=f"{name} messages")
        c.plot(BEAMS, points, "o-", label=f"{name} messages")
        numbers[f"{name}: log-probability by beams"], numbers[f"{name}: BLEU by beams"] = scores, points
    for axes, title in ((b, "log-probability"), (c, "BLEU")):
        axes.set(title=title, xlabel="beams", xticks=BEAMS)
        axes.legend()
    longest = max(range(count), key=lambda i: len(join(known.source[i])))
    source = known.source[longest]
    (sentence,), _ = written(model, corpus, as_batch(known, [longest], corpus), 4)
    batch = as_batch(Pairs([source], [sentence]), [0], corpus)
    weights = model.attention_map(batch.source, batch.lengths, batch.given)[0]
    d.imshow(weights.numpy(), cmap="Reds", vmin=0, vmax=1, aspect="auto")
    d.set_xticks(range(len(source)), source, rotation=60)
    d.set_yticks(range(len(weights)), [*sentence, "<end>"])
    d.set(title="attention")
    save(drawing, report, "translation")
    numbers["weights sum to"] = weights.sum(1).mean().item()
    return numbers | {"English": join(source), "French": join(sentence)}


if __name__ == "__main__":
    run(main, 300)
