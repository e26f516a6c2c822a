"""Networks that translate: against their torch twins, padding, decoding, attention maps, and training side by side."""

import math

import pytest
import torch

import dlkern
from dlkern import models, translation
from dlkern.decoding import beam_search, exhaustive_search, greedy_search
from dlkern.testing._training import check_training

SOURCE, TARGET = 13, 11  # vocabularies; 0 is padding, 1 begins, 2 ends
S, T = 6, 5
NETWORKS = {
    "seq2seq": ("seq2seq", dict(embedding=10, hidden=12)),
    "deep seq2seq": ("seq2seq", dict(embedding=7, hidden=9, layers=2)),
    "transformer": ("transformer", dict(width=12, heads=3, layers=2, feedforward=20)),
    "transformer, norm first": ("transformer", dict(width=8, heads=2, layers=1, feedforward=9, norm_first=True)),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def make(name):
    def build(nn):
        torch.manual_seed(0)
        factory, settings = NETWORKS[name]
        return getattr(models, factory)(SOURCE, TARGET, nn=nn, **settings)

    return build


def draw(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(3, SOURCE, (batch, S), generator=generator)
    lengths = torch.randint(1, S + 1, (batch,), generator=generator)
    target = torch.randint(3, TARGET, (batch, T), generator=generator)
    return source.masked_fill(torch.arange(S) >= lengths[:, None], 0), lengths, target


class Packed(torch.nn.Module):
    """Lengths, source and target as one tensor of integers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x[:, 1 : S + 1], x[:, 0], x[:, S + 1 :]).flatten(0, 1)


def batches(count, batch=4):
    for seed in range(count):
        source, lengths, target = draw(batch, seed)
        shifted = torch.cat([torch.ones(batch, 1, dtype=torch.int64), target[:, :-1]], 1)
        yield torch.cat([lengths[:, None], source, shifted], 1), target.flatten()


@each_network
def test_twins_have_the_same_start_and_state(name):
    ours, twin = make(name)(dlkern.nn), make(name)(torch.nn)
    assert repr(ours) == repr(twin)
    assert ours.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), twin.state_dict().values(), strict=True))
    assert not any(r.status == "convertible" for r in dlkern.conversion_report(ours))
    assert {r.kind for r in dlkern.conversion_report(twin) if r.status == "dlkern"} <= {"SinusoidalPositions"}  # no parameters


@each_network
def test_twenty_training_steps(name):
    """Output, every gradient, the loss curve and the weights at the end."""
    with dlkern.trace() as calls:
        certificate = check_training(lambda nn: Packed(make(name)(nn)), list(batches(20)), name=name)
    certificate.raise_if_failed()
    assert {call.backend for call in calls} == {"cpu"}
    seen = {call.op for call in calls}
    attention = "additive_attention" if "seq2seq" in name else "scaled_dot_product_attention"
    assert {attention, "linear", "cross_entropy"} < seen and ("gru" in seen) == ("seq2seq" in name)
    assert {f"grad of model.{n}" for n, _ in make(name)(torch.nn).named_parameters()} < {r.tensor for r in certificate.rows}


@each_network
def test_padding_changes_nothing(name):
    model = make(name)(dlkern.nn).double().eval()
    source, lengths, target = draw(3, 1)
    with torch.no_grad():
        together = model(source, lengths, target)
        for row, length in enumerate(lengths.tolist()):
            alone = model(source[row : row + 1, :length], lengths[row : row + 1], target[row : row + 1])
            torch.testing.assert_close(together[row], alone[0])
        other = source.masked_fill(torch.arange(S) >= lengths[:, None], 7)
        torch.testing.assert_close(model(other, lengths, target), together)


@each_network
def test_later_tokens_change_nothing(name):
    model = make(name)(dlkern.nn).double().eval()
    source, lengths, target = draw(3, 2)
    changed = target.clone()
    changed[:, 3:] = 9
    with torch.no_grad():
        a, b = model(source, lengths, target), model(source, lengths, changed)
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert (a[:, 3:] - b[:, 3:]).abs().max() > 1e-3


@each_network
def test_steps_are_teacher_forcing(name):
    """step() after step() gives what forward() gives for the whole, and the searches decode with it."""
    model = make(name)(dlkern.nn).double().eval()
    source, lengths, target = draw(3, 3)
    with torch.no_grad():
        whole, state, logits = model(source, lengths, target), model.start(source, lengths), []
        for token in target.unbind(1):
            found, state = model.step(token, state)
            logits.append(found)
        torch.testing.assert_close(torch.stack(logits, 1), whole)
        start = torch.ones(3, dtype=torch.int64)
        greedy = greedy_search(model.step, model.start(source, lengths), start, end=2, max_length=6)
        beams = beam_search(model.step, model.start(source, lengths), start, end=2, max_length=6, beams=3)
    assert greedy.tokens.shape[:2] == (3, 1) and beams.tokens.shape[:2] == (3, 3)
    tokens = torch.cat([start[:, None], greedy.tokens[:, 0, :-1]], 1)
    expected = torch.log_softmax(model(source, lengths, tokens), -1).gather(-1, greedy.tokens[:, 0, :, None])[..., 0]
    expected = expected.masked_fill(torch.arange(tokens.shape[1]) >= greedy.lengths, 0.0).sum(1)
    torch.testing.assert_close(greedy.scores[:, 0], expected)


@pytest.mark.parametrize("side", ["dlkern", "torch", "converted", "pruned"])
@pytest.mark.parametrize("name", ["transformer", "transformer, norm first"])
def test_kept_keys_change_nothing(name, side):
    """The Transformer's steps against the whole sequence computed again at each, in every search."""
    model = make(name)(torch.nn if side in ("torch", "converted") else dlkern.nn).double().eval()
    for p in model.parameters():  # biases too
        torch.nn.init.normal_(p, std=0.5)
    if side == "converted":
        dlkern.convert(model)
    elif side == "pruned":
        dlkern.nn.prune_heads(model.decoder.layers[0].self_attn, [1])
        dlkern.nn.prune_heads(model.decoder.layers[0].multihead_attn, [0])
    source, lengths, _ = draw(2, 5)
    start = torch.ones(2, dtype=torch.int64)

    def step(tokens, state):
        written = torch.cat((state["written"], tokens[:, None]), 1)
        return model(state["source"], state["lengths"], written)[:, -1], state | {"written": written}

    again = {"source": source, "lengths": lengths, "written": source[:, :0]}
    for search, options in (
        (greedy_search, dict(max_length=7)), (beam_search, dict(max_length=7, beams=3, length_penalty=0.75)),
        (exhaustive_search, dict(max_length=3, count=4)),
    ):  # fmt: skip
        with dlkern.trace() as calls:
            found = search(model.step, model.start(source, lengths), start, end=2, **options)
        expected = search(step, again, start, end=2, **options)
        assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.lengths, expected.lengths)
        torch.testing.assert_close(found.scores, expected.scores)
        assert bool(calls) == (side != "torch") and {call.backend for call in calls} <= {"cpu"}


def test_a_step_computes_one_token():
    """However long the sequence is: only keys of the new token are made, and those of the source never again."""
    model = make("transformer")(dlkern.nn).eval()
    source, lengths, target = draw(3, 6)
    with torch.no_grad():
        state = model.start(source, lengths)
        for i, token in enumerate(target.unbind(1)):
            with dlkern.trace() as calls:
                _, state = model.step(token, state)
            shapes = [call.shapes for call in calls if call.op == "scaled_dot_product_attention"]
            assert [s[0][2] for s in shapes] == [1] * 4 and [s[1][2] for s in shapes] == [i + 1, S] * 2
            assert all(call.shapes[0][-2] in (1, 3) for call in calls if call.op == "linear")


@each_network
def test_attention_map(name):
    ours, twin = make(name)(dlkern.nn).double().eval(), make(name)(torch.nn).double().eval()
    source, lengths, target = draw(3, 4)
    weights = ours.attention_map(source, lengths, target)
    assert weights.shape == (3, T, S)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, T).double())
    assert (weights.masked_select((torch.arange(S) >= lengths[:, None])[:, None]) == 0).all()
    torch.testing.assert_close(weights, twin.attention_map(source, lengths, target))


def test_encoder_without_positions_is_equivariant():
    """Of the Transformer's encoder: a permutation of the source permutes what is read, but for the positions."""
    model = make("transformer")(dlkern.nn).double().eval()
    source, lengths, order = torch.arange(3, 3 + S)[None], torch.tensor([S]), torch.tensor([3, 1, 5, 0, 2, 4])
    with torch.no_grad():
        straight, turned = model._read(source, lengths)[0], model._read(source[:, order], lengths)[0]
        assert (straight[:, order] - turned).abs().max() > 0.01
        model.positions.table.zero_()
        straight, turned = model._read(source, lengths)[0], model._read(source[:, order], lengths)[0]
        torch.testing.assert_close(straight[:, order], turned)


# Data and training


MESSAGES = [
    ("Add another %(name)s?", "Ajouter un autre objet %(name)s ?"), ("The school’s list (all)", "La liste de l’école (tout)"),
    ("Save", "Enregistrer"), ("Save {count} items", "Enregistrer {count} éléments"), ("", "vide"), ("Save", "Sauver"),
    ("a " * 20, "long"), ("Close", "Fermer"), ("Delete", "Supprimer"),
]  # fmt: skip


def test_tokens():
    assert translation.tokenize(MESSAGES[0][0]) == ["add", "another", "%(name)s", "?"]
    french = translation.tokenize("Lis l’école (100 %, {count})…")
    assert french == ["lis", "l'", "école", "(", "100", "%", ",", "{count}", ")", "…"]
    assert translation.join(french) == "lis l'école (100 %, {count})…"


def test_bilingual():
    corpus = translation.bilingual(MESSAGES, every=3, longest=10)
    assert [len(part) for part in (corpus.train, corpus.test)] == [4, 2]
    assert corpus.test.source == [["save"], ["delete"]] and corpus.test.target[0] == ["enregistrer"]
    words = corpus.target_words
    assert words.tokens[:5] == ["<unk>", "<pad>", "<begin>", "<end>", "%(name)s"] and "supprimer" not in words.tokens
    assert words.decode(words.encode(["fermer", "supprimer"])) == ["fermer", "<unk>"]
    with pytest.raises(ValueError, match="too few"):
        translation.bilingual(MESSAGES[:1])


def test_batches_of_pairs():
    corpus = translation.bilingual(MESSAGES, every=3, longest=10)
    batch = translation.as_batch(corpus.train, [0, 3], corpus)
    assert batch.lengths.tolist() == [4, 1] and batch.source.shape == (2, 4)
    pad, begin, end = translation.PAD, translation.BEGIN, translation.END
    assert (batch.source[1, 1:] == pad).all() and (batch.given[:, 0] == begin).all()
    wanted = [row[row != pad].tolist() for row in batch.wanted]
    given = [row[row != pad].tolist() for row in batch.given]
    for w, g, sentence in zip(wanted, given, (corpus.train.target[0], corpus.train.target[3]), strict=True):
        assert w == [*corpus.target_words.encode(sentence).tolist(), end] and g == [begin, *w[:-1]]
    epochs = translation.pair_batches(corpus, 2, 0)
    drawn = [next(epochs) for _ in range(2)]
    assert sorted(length for batch in drawn for length in batch.lengths.tolist()) == sorted(map(len, corpus.train.source))


def test_django_messages():
    pytest.importorskip("django")
    pytest.importorskip("polib")
    messages = translation.django_messages()
    assert len(messages) > 500 and ("January", "Janvier") in [(a, b.capitalize()) for a, b in messages]
    assert len(set(messages)) == len(messages) and all(a and b for a, b in messages)
    with pytest.raises(RuntimeError, match="'xx'"):
        translation.django_messages("xx")


def test_scores():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    wanted = [["le", "chat", "est", "sur", "le", "tapis"], ["à", "bientôt"]]
    assert translation.bleu(wanted, wanted) <= 100 and translation.bleu(wanted, wanted) == pytest.approx(100)
    assert translation.rouge_l(wanted, wanted) == pytest.approx(100)
    other = [["le", "chat", "est", "sur", "le", "sol"], ["bientôt"]]
    matches = [6 / 7, 4 / 5, 3 / 4, 2 / 3]  # of one to four words
    assert translation.bleu(other, wanted) == pytest.approx(100 * math.exp(1 - 8 / 7) * math.prod(matches) ** 0.25)
    assert translation.rouge_l(other, wanted) == pytest.approx(100 * (5 / 6 + 2 / 3) / 2)


@pytest.mark.parametrize("name", ["seq2seq", "transformer"])
def test_first_fifty_steps(name):
    """The loss curves of both sides, with the optimiser and the batches of the training."""
    corpus = translation.bilingual(MESSAGES * 2, every=3, longest=10)
    stream, drawn = translation.pair_batches(corpus, 3, 0), []
    for _ in range(50):
        batch = next(stream)
        width = torch.full_like(batch.lengths, batch.source.shape[1])
        x = torch.cat([batch.lengths[:, None], width[:, None], batch.source, batch.given], 1)
        drawn.append((x, batch.wanted))

    class Any(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            end = 2 + int(x[0, 1])
            return self.model(x[:, 2:end], x[:, 0], x[:, end:])

    def make(nn):
        torch.manual_seed(0)
        words = len(corpus.source_words), len(corpus.target_words)
        return Any(getattr(models, name)(*words, nn=nn, **NETWORKS[name][1]))

    certificate = check_training(make, drawn, optimizer=translation.adam, loss=translation.token_loss, runs=3)
    assert not [row for row in certificate.rows if row.tensor == "loss curve" and not row.ok]
    curve = certificate.losses["dlkern"]
    assert len(curve) == 50 and sum(curve[-5:]) < 0.8 * sum(curve[:5])


@pytest.mark.parametrize("name", ["seq2seq", "transformer"])
def test_learns_its_sentences_by_heart(name):
    corpus = translation.bilingual(MESSAGES, every=3, longest=10)
    seen = []
    result = translation.train_translation(
        lambda s, t, nn: getattr(models, name)(s, t, nn=nn, **NETWORKS[name][1]), corpus, steps=60, batch=4,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02), evaluations=2, progress=lambda i, r: seen.append(i),
    )  # fmt: skip
    assert seen == list(range(1, 61)) and [step for step, _ in result.dlkern.perplexity] == [30, 60]
    for model in result.models:
        for beams in (1, 3):
            assert translation.translate(model, corpus, corpus.train.source, beams=beams) == corpus.train.target
