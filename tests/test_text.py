"""Tokens, vocabularies, and batches of a long sequence: what every cut must keep."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dlkern import text

TEXT = "The cat's hat; the Hat of 3 cats?\nDon't."
sizes = st.tuples(st.integers(2, 200), st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**31))


def test_tokenize():
    assert "".join(text.tokenize(TEXT)) == TEXT
    assert text.tokenize(TEXT, "word") == ["the", "cat's", "hat", "the", "hat", "of", "cats", "don't"]
    assert text.tokenize("'a' b_c", "word") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="level"):
        text.tokenize(TEXT, "letter")
    for wrong in (b"ab", None, ["a"]):
        with pytest.raises(TypeError, match="string"):
            text.tokenize(wrong)


def test_topics_is_english():
    words = text.tokenize(text.topics(), "word")
    assert len(words) > 40_000 and text.Vocabulary(words).tokens[1] == "the"


def test_vocabulary_by_frequency():
    vocabulary = text.Vocabulary("abracadabra", reserved=("<pad>",), min_count=2)
    assert vocabulary.tokens == ["<unk>", "<pad>", "a", "b", "r"] and len(vocabulary) == 5
    assert vocabulary.counts["c"] == 1 and "c" not in vocabulary and vocabulary["c"] == 0 and vocabulary["b"] == 3
    assert vocabulary.decode(vocabulary.encode("bracket")) == ["b", "r", "a", "<unk>", "<unk>", "<unk>", "<unk>"]
    for wrong in ([5], [-1]):
        with pytest.raises(IndexError):
            vocabulary.decode(wrong)
    for wrong in (torch.zeros(2, 2, dtype=torch.long), torch.tensor(1), torch.ones(2), torch.tensor([True])):
        with pytest.raises(ValueError, match="row of integers"):
            vocabulary.decode(wrong)
    for reserved in (("<unk>",), ("<a>", "<a>"), "<pad>"):
        with pytest.raises(ValueError, match="reserved"):
            text.Vocabulary("ab", reserved=reserved)


def test_ngrams():
    words = text.tokenize("a rose is a rose is a rose", "word")
    assert text.ngrams(words, 1) == {("a",): 3, ("rose",): 3, ("is",): 2}
    assert text.ngrams(words, 2) == {("a", "rose"): 3, ("rose", "is"): 2, ("is", "a"): 2}
    assert text.ngrams(iter("aaab"), 3).most_common() == [(("a", "a", "a"), 1), (("a", "a", "b"), 1)]
    assert text.ngrams("ab", 2) == {("a", "b"): 1} and text.ngrams("ab", 3) == text.ngrams([], 1) == {}
    for wrong, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError), (None, TypeError)):
        with pytest.raises(error):
            text.ngrams("abc", wrong)


@given(st.text("ab", max_size=12), st.integers(1, 4))
def test_ngrams_count_every_place(string, n):
    found = text.ngrams(string, n)
    assert found.total() == max(0, len(string) - n + 1)
    for run, count in found.items():
        assert count == sum(string.startswith("".join(run), i) for i in range(len(string)))


@given(st.text(), st.integers(1, 3))
def test_vocabulary_round_trip(string, least):
    vocabulary = text.Vocabulary(string, min_count=least)
    numbers = vocabulary.encode(string)
    assert numbers.dtype == torch.int64 and numbers.shape == (len(string),)
    for token, back, number in zip(string, vocabulary.decode(numbers), numbers.tolist()):
        assert back == (token if string.count(token) >= least else "<unk>")
        assert (number == 0) == (string.count(token) < least)


def test_corpus():
    found = text.corpus("word", text="a b c " * 10 + "d d", held_out=0.25, min_count=2)
    assert len(found.train) == 24 and len(found.test) == 8
    assert found.test[-2:].tolist() == [0, 0] and found.vocabulary.tokens == ["<unk>", "a", "b", "c"]
    with pytest.raises(ValueError, match="held_out"):
        text.corpus(held_out=1.0)
    characters = text.corpus()
    assert len(characters.train) > 15 * len(characters.test) and len(characters.vocabulary) > 90


@given(sizes, st.booleans())
def test_sequential_batches_go_on_where_the_last_ended(size, random_lengths):
    count, batch, steps, seed = size
    assume(count > batch)
    tokens = torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    batches = list(text.sequential_batches(tokens, batch, steps, random_lengths=random_lengths, generator=generator))
    for i, (x, y) in enumerate(batches):
        assert torch.equal(y, x + 1) and x.shape[1] == batch and x.is_contiguous()
        if random_lengths:
            assert 1 <= len(x) <= 2 * steps - 1
        else:
            assert len(x) == steps or (i == len(batches) - 1 and len(x) < steps)
    columns = torch.cat([x for x, _ in batches])  # [length, batch]
    first, length = int(columns[0, 0]), len(columns)
    assert torch.equal(columns.t().reshape(-1), torch.arange(first, first + batch * length))
    assert first < steps and count - 1 - first - batch * length < batch  # nothing but a rest is left out


@given(sizes)
def test_random_batches_meet_every_piece_once(size):
    count, batch, steps, seed = size
    assume(count > batch * steps)
    generator = torch.Generator().manual_seed(seed)
    batches = list(text.random_batches(torch.arange(count), batch, steps, generator=generator))
    starts = []
    for x, y in batches:
        assert x.shape == (steps, batch) and torch.equal(y, x + 1) and int(y.max()) < count
        assert torch.equal(x, x[:1] + torch.arange(steps)[:, None])
        starts += x[0].tolist()
    assert len(set(starts)) == len(starts) and len({s % steps for s in starts}) == 1
    assert len(starts) == ((count - 1 - starts[0] % steps) // steps) // batch * batch > 0


def test_draws_obey_the_generator_and_differ_by_pass():
    tokens = torch.arange(400)
    for cut in (text.random_batches, text.sequential_batches):
        one, same = (next(cut(tokens, 3, 11, generator=torch.Generator().manual_seed(5)))[0] for _ in range(2))
        assert torch.equal(one, same)
        generator = torch.Generator().manual_seed(5)
        firsts = {tuple(next(cut(tokens, 3, 11, generator=generator))[0][0].tolist()) for _ in range(8)}
        assert len(firsts) > 1
        torch.manual_seed(7)
        one = next(cut(tokens, 3, 11))[0]
        torch.manual_seed(7)
        assert torch.equal(one, next(cut(tokens, 3, 11))[0])


@pytest.mark.parametrize("cut", [text.random_batches, text.sequential_batches])
def test_wrong_calls_raise(cut):
    for wrong in (torch.randn(30), torch.zeros(3, 4, dtype=torch.long), torch.ones(30, dtype=torch.bool)):
        with pytest.raises(ValueError, match="row of integers"):
            next(cut(wrong, 2, 2))
    for batch, steps in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="at least one"):
            next(cut(torch.arange(30), batch, steps))
    with pytest.raises(ValueError, match="too few"):
        next(cut(torch.arange(4), 4, 1))
