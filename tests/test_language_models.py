"""Language models and the encoder-decoder against their torch twins: outputs, gradients, fifty steps of training."""

import pytest
import torch

import dlkern
import dlkern.nn.functional as F
from dlkern import models, text
from dlkern.testing._training import check_training
from dlkern.training import perplexity, train_language_model

VOCABULARY = 13
TOKENS = torch.randint(0, VOCABULARY, (900,), generator=torch.Generator().manual_seed(1))


class Reads(torch.nn.Module):
    """A language model that gives logits alone and carries its state on, detached; from zeros at each new start."""

    def __init__(self, model):
        super().__init__()
        self.model, self.state = model, None

    def load_state_dict(self, *args, **options):
        self.state = None
        return super().load_state_dict(*args, **options)

    def forward(self, tokens):
        logits, state = self.model(tokens, self.state)
        self.state = models.detached(state)
        return logits.flatten(0, 1)


def make(hidden, layers=1, **options):
    def build(nn):
        torch.manual_seed(0)
        return models.LanguageModel(VOCABULARY, hidden, layers, nn=nn, **options)

    return build


MODELS = {
    "rnn, one-hot": make(17, cell="rnn"), "gru, one-hot": make(17, cell="gru"), "lstm, one-hot": make(17, cell="lstm"),
    "gru, embedding": make(19, cell="gru", embedding=6), "deep lstm, tied": make(9, 2, cell="lstm", embedding=9, tied=True),
    "deep rnn, embedding": make(16, 2, cell="rnn", embedding=11),
}
each_model = pytest.mark.parametrize("name", MODELS)


def clipped(parameters):
    """SGD that clips gradients, as training does."""
    parameters = list(parameters)

    class Clipped(torch.optim.SGD):
        def step(self):
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            super().step()

    return Clipped(parameters, lr=0.5)


def sequential(count, random_lengths=False):
    generator = torch.Generator().manual_seed(2)
    stream = text.sequential_batches(TOKENS, 3, 5, random_lengths=random_lengths, generator=generator)
    found = [(x, y.flatten()) for x, y in stream]
    assert len(found) >= count
    return found[:count]


@each_model
def test_fifty_steps_carrying_the_state(name):
    """Output, every gradient, the loss curve and the weights at the end by the rule, the state carried on."""
    certificate = check_training(
        lambda nn: Reads(MODELS[name](nn)), sequential(50, random_lengths="deep" in name), optimizer=clipped, name=name
    )
    certificate.raise_if_failed()
    assert len(certificate.losses["dlkern"]) == 50
    assert certificate.losses["dlkern"][-1] != certificate.losses["dlkern"][0]


@each_model
def test_twins_have_the_same_start_and_run_on_our_kernels(name):
    ours, twin = MODELS[name](dlkern.nn), MODELS[name](torch.nn)
    assert repr(ours) == repr(twin)
    assert ours.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), twin.state_dict().values(), strict=True))
    with dlkern.trace() as calls:
        logits, _ = ours(TOKENS[:12].reshape(4, 3))
    assert logits.shape == (4, 3, VOCABULARY)
    assert {call.backend for call in calls} == {"cpu"} and len(calls) >= 2


def test_the_rule_of_training_can_fail_on_tokens():
    def broken(nn):
        model = make(17, cell="gru")(nn)
        if nn is dlkern.nn:
            model.recurrent.register_forward_hook(lambda module, args, y: (y[0] * (1 + 1e-5), y[1]))
        return Reads(model)

    assert not check_training(broken, sequential(3)).ok


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_carried_state_is_one_long_sequence_cut_for_gradients(cell):
    model = make(8, 2, cell=cell, embedding=5)(dlkern.nn)
    tokens = TOKENS[:24].reshape(8, 3)
    whole, _ = model(tokens)
    first, state = model(tokens[:5])
    second, _ = model(tokens[5:], models.detached(state))
    torch.testing.assert_close(torch.cat((first, second)), whole)
    model.zero_grad()
    second.sum().backward()
    used = torch.zeros(VOCABULARY, dtype=torch.bool)
    used[tokens[5:].flatten()] = True  # what came before gets no gradient
    assert torch.equal(model.embedding.weight.grad.abs().sum(1) > 0, used)
    assert models.detached(None) is None


def test_tied_weights_are_one_parameter():
    model = MODELS["deep lstm, tied"](dlkern.nn)
    assert model.embedding.weight is model.head.weight
    assert sum(p.shape == (VOCABULARY, 9) for p in model.parameters()) == 1
    with pytest.raises(ValueError, match="tied"):
        models.LanguageModel(5, 4, embedding=3, tied=True)
    with pytest.raises(ValueError, match="cell"):
        models.LanguageModel(5, 4, cell="mlp")


class Translates(torch.nn.Module):
    """An encoder-decoder whose input holds source and target one above the other."""

    def __init__(self, model, lengths=None):
        super().__init__()
        self.model, self.lengths = model, lengths

    def forward(self, both):
        return self.model(both[:6], both[6:], self.lengths).flatten(0, 1)


@pytest.mark.parametrize(
    ("cell", "layers", "bidirectional", "padded"),
    [("gru", 1, False, False), ("lstm", 2, True, True), ("rnn", 1, True, False), ("gru", 2, True, True)],
)
def test_encoder_decoder_trains_as_its_twin(cell, layers, bidirectional, padded):
    generator = torch.Generator().manual_seed(4)
    batches = []
    for _ in range(12):
        both = torch.randint(0, VOCABULARY, (11, 4), generator=generator)
        batches.append((both, torch.randint(0, VOCABULARY, (20,), generator=generator)))
    lengths = torch.tensor([3, 6, 1, 4]) if padded else None

    def build(nn):
        torch.manual_seed(0)
        options = dict(embedding=6, cell=cell, bidirectional=bidirectional, nn=nn)
        return Translates(models.EncoderDecoder(VOCABULARY, VOCABULARY, 9, layers, **options), lengths)

    assert repr(build(dlkern.nn)) == repr(build(torch.nn))
    check_training(build, batches, optimizer=clipped, name=cell).raise_if_failed()


def test_padding_of_a_source_has_no_effect_and_greedy_is_the_likeliest():
    model = models.EncoderDecoder(7, 9, 8, 2, embedding=4, cell="lstm", bidirectional=True)
    source, target = torch.randint(0, 7, (5, 2)), torch.randint(0, 9, (4, 2))
    lengths = torch.tensor([3, 5])
    expected = model(source, target, lengths)
    changed = source.clone()
    changed[3:, 0] = (source[3:, 0] + 1) % 7
    assert torch.equal(model(changed, target, lengths), expected)
    assert not torch.equal(model(changed, target), expected)
    tokens = model.greedy(source, 1, 6, lengths)
    assert tokens.shape == (6, 2)
    fed = torch.cat((torch.full((1, 2), 1), tokens[:-1]))
    assert torch.equal(model(source, fed, lengths).argmax(-1), tokens)


def test_convert_gives_the_twin_our_kernels():
    torch.manual_seed(0)
    model = models.EncoderDecoder(7, 9, 8, embedding=4, nn=torch.nn)
    source, target, lengths = torch.randint(0, 7, (5, 2)), torch.randint(0, 9, (4, 2)), torch.tensor([2, 5])
    expected = model(source, target, lengths)
    dlkern.convert(model)
    with dlkern.trace() as calls:
        torch.testing.assert_close(model(source, target, lengths), expected)
    assert {call.backend for call in calls} == {"cpu"}


def test_generate():
    model = make(12, cell="gru")(dlkern.nn).eval()
    prompt = TOKENS[:5]
    likeliest = models.generate(model, prompt, 7, temperature=0)
    logits, _ = model(torch.cat((prompt, likeliest))[:-1, None])
    assert torch.equal(logits[4:, 0].argmax(-1), likeliest)
    one, same, other = (
        models.generate(model, prompt, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other) and one.shape == (20,)
    assert len(models.generate(model, prompt, 0)) == 0
    for wrong in ((prompt[:0], 3), (prompt[None], 3), (prompt, -1)):
        with pytest.raises(ValueError, match="generate"):
            models.generate(model, *wrong)


def test_compiles_whole_with_another_length():
    torch._dynamo.reset()
    model = make(10, 2, cell="gru", embedding=4)(dlkern.nn).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for steps in (3, 6):
        x = TOKENS[: 2 * steps].reshape(steps, 2)
        with torch.no_grad():
            for a, b in zip(compiled(x), model(x)):
                assert torch.equal(a, b)


@pytest.mark.parametrize("sampling", ["sequential", "random lengths", "random"])
def test_training_side_by_side(sampling):
    words = text.corpus("word", text="the cat sat on the mat and the dog sat on the cat " * 40, held_out=0.1)
    seen = []
    result = train_language_model(
        lambda nn: models.LanguageModel(len(words.vocabulary), 24, embedding=8, nn=nn), words, steps=30, batch=4, length=6,
        sampling=sampling, evaluations=2, progress=lambda i, r: seen.append(i),
    )
    assert seen == list(range(1, 31))
    for run in (result.torch, result.dlkern):
        assert len(run.losses) == len(run.milliseconds) == 30
        assert [step for step, _ in run.perplexity] == [15, 30]
        assert 1 < run.perplexity[1][1] < run.perplexity[0][1] < len(words.vocabulary)
    torch.testing.assert_close(torch.tensor(result.dlkern.losses[:5]), torch.tensor(result.torch.losses[:5]))
    twin, ours = result.models
    assert type(twin.recurrent) is torch.nn.GRU and type(ours.recurrent) is dlkern.nn.GRU
    with pytest.raises(ValueError, match="sampling"):
        train_language_model(lambda nn: twin, words, sampling="none")


def test_perplexity_of_a_text():
    model = make(8)(dlkern.nn)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    assert perplexity(model, TOKENS) == pytest.approx(VOCABULARY)
    assert model.training
    logits, _ = model(TOKENS[:10, None])
    assert F.perplexity(logits.flatten(0, 1), TOKENS[:10]).item() == pytest.approx(VOCABULARY)
