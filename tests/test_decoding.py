"""Searches against each other and against every sequence there is."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlkern.decoding import beam_search, exhaustive_search, greedy_search


class Model:
    """Logits drawn at random for each prefix of each row, so that nothing is remembered but by the state."""

    def __init__(self, words, seed):
        self.words, self.seed, self.calls = words, seed, []

    def logits(self, row, prefix):
        number = 1 + row
        for token in prefix:
            number = number * (self.words + 1) + token + 1
        return 2 * torch.randn(self.words, generator=torch.Generator().manual_seed(self.seed + number), dtype=torch.float64)

    def start(self, batch):
        return {"row": torch.arange(batch), "prefix": (torch.empty(batch, 0, dtype=torch.int64),)}

    def step(self, tokens, state):
        self.calls.append(len(tokens))
        prefix = torch.cat([state["prefix"][0], tokens[:, None]], 1)
        logits = [self.logits(r, p[1:]) for r, p in zip(state["row"].tolist(), prefix.tolist())]
        return torch.stack(logits), {"row": state["row"], "prefix": (prefix,)}

    def score(self, row, sequence, penalty):
        total = 0.0
        for i, token in enumerate(sequence):
            total += torch.log_softmax(self.logits(row, sequence[:i]), 0)[token].item()
        return total / len(sequence) ** penalty


def sequences(words, end, length):
    """Every sequence that ends with `end` or is full."""
    for n in range(1, length + 1):
        for sequence in itertools.product(range(words), repeat=n):
            if end not in sequence[:-1] and (n == length or sequence[-1] == end):
                yield sequence


cases = st.tuples(
    st.integers(1, 3), st.integers(2, 4), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([0.0, 0.75, 1.0]),
    st.booleans(),
)  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(cases)
def test_exhaustive_is_the_best_of_all(case):
    batch, words, length, seed, penalty, ends = case
    end = words - 1 if ends else None
    model, start = Model(words, seed), torch.zeros(batch, dtype=torch.int64)
    found = exhaustive_search(
        model.step, model.start(batch), start, end=end, max_length=length, count=5, length_penalty=penalty
    )
    for row in range(batch):
        every = sorted(((model.score(row, s, penalty), s) for s in sequences(words, end, length)), reverse=True)
        n = min(5, len(every))
        assert found.scores.shape == (batch, n)
        torch.testing.assert_close(found.scores[row], torch.tensor([s for s, _ in every[:n]], dtype=torch.float64))
        assert [tuple(t[:k]) for t, k in zip(found.tokens[row].tolist(), found.lengths[row].tolist())] == [
            s for _, s in every[:n]
        ]
        assert all(t == end for t in found.tokens[row, 0, found.lengths[row, 0] :].tolist())


@settings(max_examples=15, deadline=None)
@given(cases)
def test_a_wide_beam_is_exhaustive_and_one_is_greedy(case):
    batch, words, length, seed, penalty, ends = case
    end = 0 if ends else None
    model, start = Model(words, seed), torch.zeros(batch, dtype=torch.int64)
    arguments = dict(end=end, max_length=length)
    every = words**length + length
    wide = beam_search(model.step, model.start(batch), start, beams=every, length_penalty=penalty, **arguments)
    best = exhaustive_search(model.step, model.start(batch), start, count=every, length_penalty=penalty, **arguments)
    count = best.scores.shape[1]
    torch.testing.assert_close(wide.scores[:, :count], best.scores)
    assert (wide.scores[:, count:] == -torch.inf).all()
    assert wide.best() == best.best()
    one = beam_search(model.step, model.start(batch), start, beams=1, length_penalty=penalty, **arguments)
    greedy = greedy_search(model.step, model.start(batch), start, **arguments)
    assert torch.equal(one.tokens, greedy.tokens) and torch.equal(one.lengths, greedy.lengths)
    torch.testing.assert_close(one.scores, greedy.scores / greedy.lengths**penalty)


@settings(max_examples=15, deadline=None)
@given(cases, st.integers(2, 5))
def test_beams_have_the_scores_they_say_and_rows_stand_alone(case, beams):
    batch, words, length, seed, penalty, ends = case
    end = words - 1 if ends else None
    model = Model(words, seed)
    arguments = dict(end=end, max_length=length, beams=beams, length_penalty=penalty)
    found = beam_search(model.step, model.start(batch), torch.zeros(batch, dtype=torch.int64), **arguments)
    assert (found.scores.diff(dim=1) <= 0).all()
    assert max(model.calls) <= batch * beams  # all beams of all rows are one call
    assert len(model.calls) <= length
    for row in range(batch):
        state = {"row": torch.tensor([row]), "prefix": (torch.empty(1, 0, dtype=torch.int64),)}
        alone = beam_search(model.step, state, torch.zeros(1, dtype=torch.int64), **arguments)
        torch.testing.assert_close(found.scores[row], alone.scores[0])
        seen = set()
        for tokens, n, score in zip(found.tokens[row].tolist(), found.lengths[row].tolist(), found.scores[row].tolist()):
            if score > -torch.inf:
                assert abs(model.score(row, tokens[:n], penalty) - score) < 1e-9
                seen.add(tuple(tokens[:n]))
        assert len(seen) == (found.scores[row] > -torch.inf).sum()


def test_wider_beams_find_better():
    """Not each time, but a search that is better nowhere would be greedy."""
    better = 0
    for seed in range(20):
        model, start = Model(4, seed), torch.zeros(1, dtype=torch.int64)
        scores = [
            beam_search(model.step, model.start(1), start, end=0, max_length=5, beams=b, length_penalty=0.75).scores[0, 0]
            for b in (1, 8)
        ]
        better += int(scores[1] > scores[0] + 1e-9)
    assert better > 5


@pytest.mark.parametrize("search", [greedy_search, beam_search, exhaustive_search])
@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        (torch.zeros(2), {}, "start must be int64"),
        (torch.zeros(2, 1, dtype=torch.int64), {}, "start must be int64"),
        (torch.zeros(2, dtype=torch.int64), dict(max_length=0), "max_length"),
        (torch.zeros(2, dtype=torch.int64), dict(end=3), "outside the vocabulary of 3"),
        (torch.zeros(2, dtype=torch.int64), dict(end=-1), "negative"),
    ],
)
def test_wrong_calls(search, start, options, message):
    model = Model(3, 0)
    with pytest.raises(ValueError, match=message):
        search(model.step, model.start(2), start, **(dict(end=0, max_length=2) | options))


def test_more_wrong_calls():
    model, start = Model(3, 0), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="beams"):
        beam_search(model.step, model.start(2), start, end=0, max_length=2, beams=0)
    with pytest.raises(ValueError, match="count"):
        exhaustive_search(model.step, model.start(2), start, end=0, max_length=2, count=0)
    with pytest.raises(ValueError, match="too many"):
        exhaustive_search(model.step, model.start(2), start, end=0, max_length=20)
    with pytest.raises(ValueError, match=r"logits \[2, V\]"):
        greedy_search(lambda tokens, state: (torch.zeros(3, 4), state), None, start, end=0, max_length=2)
    for search in (beam_search, exhaustive_search):
        for rows in (torch.zeros(1, 3), torch.tensor(1.0)):
            with pytest.raises(ValueError, match="2 rows"):
                search(lambda tokens, state: (torch.zeros(len(tokens), 3), state), {"h": rows}, start, end=0, max_length=2)


@pytest.mark.parametrize("search", [greedy_search, beam_search, exhaustive_search])
def test_no_rows(search):
    logits = torch.randn(3, 3)
    state = {"h": torch.zeros(0, 2)}
    found = search(lambda t, s: (logits[t], s), state, torch.zeros(0, dtype=torch.int64), end=0, max_length=2)
    assert found.best() == [] and found.tokens.shape[0] == found.lengths.shape[0] == found.scores.shape[0] == 0
