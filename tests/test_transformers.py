"""Hugging Face transformers with attn_implementation="dlkern" against "sdpa"."""

import copy
import pickle

import pytest
import torch
from torchvision_stub import transformers as import_transformers

import dlkern
from dlkern.testing import compare

transformers = import_transformers()

SMALL = dict(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
BERT = dict(SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
CONFIGURATIONS = {
    "bert": transformers.BertConfig(**BERT),
    "bert decoder": transformers.BertConfig(**BERT, is_decoder=True),
    "roberta": transformers.RobertaConfig(**BERT),
    "xlm roberta": transformers.XLMRobertaConfig(**BERT),
    "camembert": transformers.CamembertConfig(**BERT),
    "albert": transformers.AlbertConfig(**BERT, embedding_size=16),
    "gpt2": transformers.GPT2Config(
        vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
}


@pytest.fixture(autouse=True)
def _registered():
    dlkern.register_transformers()


def make(name, kind=transformers.AutoModel):
    """The model on dlkern, its twin on sdpa, and that in float64, with the same weights."""
    models = []
    # transformers cannot make the causal mask of BERT's sdpa in float64
    for attention in ("dlkern", "sdpa", "eager" if name == "bert decoder" else "sdpa"):
        torch.manual_seed(0)
        models.append(kind.from_config(copy.deepcopy(CONFIGURATIONS[name]), attn_implementation=attention))
    return *models[:2], models[2].double()


def run(model, tokens, mask):
    """The output where the mask sees it, and every gradient."""
    model.zero_grad()
    y = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    y = y if mask is None else y * mask[..., None]
    (y * torch.linspace(-1, 1, y.shape[-1]).to(y.dtype)).sin().sum().backward()
    found = {"output": y.detach()}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [None, "right", "left"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equals_sdpa(name, padded):
    # ALBERT's class of attention has the layer norm behind it, too.
    assert_by_the_rule(make(name), padded, {"linear", "layer_norm"} if name == "albert" else {"linear"})


def assert_by_the_rule(models, padded, others=frozenset({"linear"})):
    for seeds in (range(3), range(3, 27)):  # over few, chance decides the largest of few errors: more draws tell
        rows = rows_of(models, padded, seeds, others)
        if all(row.ok for row in rows):
            break
    assert not [row for row in rows if not row.ok]


def rows_of(models, padded, seeds, others):
    draws = []
    for seed in seeds:
        tokens = torch.randint(2, 50, (3, 9), generator=torch.Generator().manual_seed(seed))
        mask = None
        if padded is not None:
            lengths = torch.tensor([9, 4, 7])[:, None]
            mask = (torch.arange(9) < lengths).long()
            mask = mask if padded == "right" else mask.flip(1)
        with dlkern.trace() as calls:
            ours = run(models[0], tokens, mask)
        assert [(c.op, c.backend) for c in calls if c.op not in others] == [("scaled_dot_product_attention", "cpu")] * 2
        draws.append((ours, run(models[1], tokens, mask), run(models[2], tokens, mask)))
    assert draws[0][0].keys() == draws[0][2].keys() and len(draws[0][0]) > 20
    rows = []
    for tensor in draws[0][2]:
        rows += compare(tensor, *([draw[i][tensor] for draw in draws] for i in range(3)), torch.float32)
    return rows


def test_heads_of_keys_are_not_repeated():
    model = make("llama")[0]
    with dlkern.trace() as calls:
        model(torch.arange(10)[None])
    assert all(call.shapes[:3] == ((1, 4, 10, 6), (1, 2, 10, 6), (1, 2, 10, 6)) for call in calls)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generates_the_same(name):
    models = make(name, transformers.AutoModelForCausalLM)[:2]
    tokens, mask = torch.randint(2, 50, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = [model.eval().generate(tokens, attention_mask=mask, **settings) for model in models]
    assert found[0].shape == (2, 13)
    assert torch.equal(*found)


def linear_calls(model):
    with dlkern.trace() as calls:
        model(torch.arange(10)[None])
    return [c for c in calls if c.op == "linear"]


def test_convert_takes_gpt2s_linear_layer():
    models = make("gpt2")
    before = {k: v.clone() for k, v in models[0].state_dict().items()}
    assert not linear_calls(models[0])
    with dlkern.enabled():  # torch.addmm
        assert len(linear_calls(models[0])) == 8
    assert "convertible" in {r.status for r in dlkern.conversion_report(models[0])}
    assert dlkern.convert(models[0]) is models[0]
    assert len(linear_calls(models[0])) == 8
    assert {r.status for r in dlkern.conversion_report(models[0]) if r.kind == "Conv1D"} == {"dlkern"}
    assert_by_the_rule(models, "left", others={"linear", "layer_norm", "embedding"})
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in models[0].parameters())
    tokens = torch.arange(10)[None]
    again = pickle.loads(pickle.dumps(models[0]))
    assert torch.equal(again(tokens).last_hidden_state, models[0](tokens).last_hidden_state)
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens).last_hidden_state, models[0](tokens).last_hidden_state)
    dlkern.revert(models[0])
    assert not linear_calls(models[0]) and models[0].h[0].mlp.c_fc.__class__.__module__ == "transformers.pytorch_utils"
    assert all(torch.equal(v, before[k]) for k, v in models[0].state_dict().items())


def test_masked_heads():
    """transformers 4 alone hands factors of heads on."""
    from dlkern.huggingface import attention

    q, factors = torch.randn(2, 3, 5, 4), torch.tensor([1.0, 0, 0.5])[:, None, None]
    whole, _ = attention(torch.nn.Module(), q, q, q, None)
    masked, _ = attention(torch.nn.Module(), q, q, q, None, head_mask=factors)
    assert torch.equal(masked, whole * factors.view(3, 1))


def test_refuses_what_it_has_not():
    from dlkern.huggingface import attention

    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="sinks"):
        attention(torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="head_mask"):
        attention(torch.nn.Module(), q, q, q, None, head_mask=torch.ones(1, 2, 3, 3))
    y, weights = attention(torch.nn.Module(), q, q, q, None, softcap=2.0)
    expected = dlkern.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, softcap=2.0)
    assert weights is None and torch.equal(y, expected.transpose(1, 2))
