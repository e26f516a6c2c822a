"""Every example runs, writes its picture, and shows what its text says one sees. Short runs; the scripts' own are longer."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlkern

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "tests"))


def edge_filter(n):
    assert n["left weight"] == pytest.approx(1, abs=0.05) and n["right weight"] == pytest.approx(-1, abs=0.05)
    assert n["last error"] < n["first error"] / 1000


def normalisation(n):
    for rate in (0.1, 0.5, 2.0):
        assert n[f"last loss at rate {rate} with batch norm"] < n[f"last loss at rate {rate} without"] - 0.2
        assert n[f"last loss at rate {rate} without"] > math.log(10) - 0.2
    for kind in ("plain", "dropout", "weight decay"):
        assert n[f"{kind}: training error"] < n[f"{kind}: held-out error"] - 0.02
    ratios = [n[f"{name}: the first layer's gradient over the last's"] for name in ("without", "with batch norm")]
    assert ratios[0] < 0.01 < 0.1 < ratios[1]
    assert n["batch norm behind: last loss"] < n["batch norm before: last loss"] < math.log(10) - 0.2
    assert n["scales from, to"][0] < 1 < n["scales from, to"][1] and n["shifts from, to"][0] < 0 < n["shifts from, to"][1]
    early = "ReLU, {}: held-out error within 25 steps and at the end"
    assert max(n[early.format(name)][0] for name in ("batch norm", "both")) < n[early.format("dropout")][0] - 0.02


def pooling(n):
    assert n["learned width"] < 0.8 and n["squared error, learned width"] < n["squared error, width 1"]
    for score in ("dot", "scaled dot", "additive", "cosine", "Gaussian"):
        first, last = n[f"{score}: first and last error"]
        assert last < 0.8 * first, score


def shift(n):
    assert n["covariate, weighted"] > n["covariate, plain"] + 0.03
    assert n["label, weighted"] > n["label, plain"] + 0.03


def stability(n):
    assert n["sigmoid, Xavier: gradient at layer 1 over layer 30"] < 1e-10
    assert 0.05 < n["tanh, Xavier: gradient at layer 1 over layer 30"] < 20
    assert 0.05 < n["ReLU, He: gradient at layer 1 over layer 30"] < 20
    assert n["ReLU, twice He: gradient at layer 1 over layer 30"] > 1e6
    assert n["bound over largest singular value"] > 1 and n["smallest over largest singular value"] < 1e-6
    first_over_last = "{}: gradient at the first step over the last"
    assert n[first_over_last.format("RNN")] < 1e-3 * n[first_over_last.format("LSTM")]
    assert n[first_over_last.format("RNN")] < 1e-3 * n[first_over_last.format("GRU")]
    assert n[first_over_last.format("RNN, ReLU, larger weights")] > 1e3
    assert n["jump, norm at most 1"] < 0.11 < n["jump, no clipping"]
    assert not n["no clipping: last loss"] < 1e6 and n["norm at most 1: last loss"] < n["norm at most 1: first loss"] / 2


def newton(n):
    for name in ("Newton", "Newton-CG"):
        assert n[f"{name}: above the optimum at the end"] < 1e-8
    assert n["Newton: size of the gradient at the end"] < 1e-8
    early, rise = (
        [n[f"{name}: {what}"] for name in ("stochastic", "mini-batches of 8", "gradient descent")]
        for what in ("above the optimum after a pass", "largest rise between two looks")
    )
    assert early == sorted(early) and rise == sorted(rise, reverse=True) and rise[0] > 2 and rise[-1] < 1
    assert n["gradient descent: above the optimum at the end"] > 1e-6
    first, last = n["network: first and last loss"]
    assert last < first


def svm(n):
    assert n["duality gap"] < 1e-3 and n["KKT violation"] < 1e-3 and n["accuracy"] > 0.9
    assert abs(n["sum of alpha y"]) < 1e-9 and n["margin of free support vectors off 1 by"] < 1e-3


def pid(n):
    assert 1 / 3 < n["from 5: last rate"] / n["from 0.0001: last rate"] < 3  # it was 50,000 at first
    assert n["from 0.0001: last rate"] > 1e-3 and n["from 0.0001: last loss"] < 2
    assert n["updated: accuracy at the end"] > n["frozen: accuracy at the end"] + 0.2
    assert max(n["pulls"]) == n["pulls"][3] and min(n["pulls"]) == n["pulls"][4]  # rates 0.1 and 1


def markov(n):
    assert n["worst deviation in standard deviations"] < 5 and n["distance to stationary"] < 0.01
    assert n["rows sum to"] == pytest.approx(1, abs=1e-12)


def sine(n):
    for name in ("autoregressive", "latent state"):
        assert n[f"{name}: error 1 step ahead"] < 0.5 < 1.3 * n[f"{name}: error 48 steps ahead"]
        assert n[f"{name}: error 1 step ahead"] < n[f"{name}: error 48 steps ahead"]


def zipf(n):
    words, pairs, triples = (n[f"{name}: slope"] for name in ("words", "pairs", "triples"))
    assert -1.2 < words < -0.8 and words < pairs < triples < 0
    assert n["words: most frequent"] == "the" and n["words: distinct"] < n["pairs: distinct"] < n["triples: distinct"]
    new = [n[f"{name}: share never seen before"] for name in ("words", "pairs", "triples")]
    assert new == sorted(new) and new[-1] > 0.5


def language(n):
    for name in ("sequential", "random", "one-hot", "embedding"):
        assert n[f"{name}: perplexity"] < n["single characters: perplexity"]
    first, last = n["random: perplexity of a piece's first and last character"]
    assert first > 1.2 * last
    first, last = n["sequential: perplexity of a piece's first and last character"]
    assert first < 1.2 * last
    greedy, beam, best = (n[f"{name} search: mean log-probability"] for name in ("greedy", "beam of 3", "exhaustive"))
    assert greedy < beam <= best < 0 and best - beam < (best - greedy) / 2
    assert n["it writes"].startswith("The ") and len(n["it writes"]) == 84


def translating(n):
    assert n["last loss"] < 0.7 * n["first loss"] and n["weights sum to"] == pytest.approx(1)
    for name in ("learned", "new"):
        greedy, two, *_, eight = n[f"{name}: log-probability by beams"]
        assert greedy < two < eight < 0
        assert all(0 <= points <= 100 for points in n[f"{name}: BLEU by beams"])


def heads(n):
    assert n["accuracy"] > 0.9
    for score in ("variance", "gradient_norm", "ablation"):
        assert n[f"{score}: accuracy without half of the heads"] > n["accuracy"] - 0.1
    assert n["accuracy without the most important half"] < n["ablation: accuracy without half of the heads"] - 0.05
    assert n["parameters without half of the heads"] < 0.85 * n["parameters"]


def saving(n):
    assert n["the copy gives the same bits"] is True and n["accuracy on 0 to 4"] > 0.8
    early, _ = n["from scratch: accuracy early and at the end"]
    for name in ("loaded, all trained", "loaded, the rest trained"):
        assert n[f"{name}: accuracy early and at the end"][0] > early + 0.1


def lazy(n):
    for size, inputs in ((32, 8 * 14 * 14), (24, 8 * 10 * 10)):
        assert n[f"lazy, {size} x {size}: inputs of the last layer"] == (0, inputs)
        assert n[f"lazy, {size} x {size}: it became"] == "Linear"
    rounding = torch.finfo(torch.float64).eps
    assert n["shared gradient, off the sum of the copies' by"] < 8 * 64 * rounding  # of eight places and 64 images
    assert n["eight layers: parameters"] - n["one layer eight times: parameters"] == 7 * (32 * 32 + 32)
    for name in ("eight layers", "one layer eight times"):
        first, last = n[f"{name}: first and last loss"]
        assert last < 0.8 * first


def backward(n):
    assert n["by hand, largest difference"] < 40 * torch.finfo(torch.float64).eps  # sums of 40 rows
    (s64, e64), (s32, e32) = (n[f"{dtype}: best step, its relative error"] for dtype in ("float64", "float32"))
    assert s64 < s32 and e64 < 1e-6 < e32
    one, sixteen = n["KiB kept for training, depth 1 and 16"]
    assert sixteen > 8 * one > 0 and n["KiB kept without gradients, depth 1 and 16"] == (0, 0)


def large_batch(n):
    assert n["LARS: rates that learn"] >= n["SGD: rates that learn"] + 2
    assert max(n["LARS: accuracy by rate"]) > 0.75 and n["largest over smallest ratio"] > 2


def custom(n):
    assert n["reduction over an einsum, largest difference"] < 64 * torch.finfo(torch.float64).eps  # sums of 64
    assert abs(n["mean behind the centred layer"]) < 64 * 128 * torch.finfo(torch.float64).eps
    assert n["accuracy"] > 0.8 and n["parameters"] == 10 * 64 + 10 + 1


def positions(n):
    kinds = ("none", "ALiBi", "learned", "rotary")
    within, beyond = zip(*(n[f"{kind}: accuracy within the trained length and beyond"] for kind in kinds))
    assert max(within[:2]) < 0.5 and within[3] > 0.95 and beyond[3] > beyond[2] + 0.1
    for name in ("sinusoidal", "rotary"):  # sums of 64 products
        assert n[f"{name}: scores of one distance differ by"] < 64 * torch.finfo(torch.float32).eps
    assert 3 in n["relative: distances of the heads' largest bias"]


def arithmetic(n):
    assert n["sizes tried"] > 300 and n["sizes off the formula"] == 0
    assert n["1 x 1 is linear, off by"] < 4 * torch.finfo(torch.float32).eps
    assert n["channels are summed, off by"] < 27 * torch.finfo(torch.float64).eps  # sums of 27 products
    edges, places, whole = (
        n[f"{name}: likeness after a move of 4 pixels"] for name in ("edges", "pooled, 8 x 8", "pooled, whole image")
    )
    assert edges < 0.7 < places - 0.05 < whole


def networks(n):
    for name, millions in (("alexnet", 61.10), ("vgg11", 132.86), ("nin", 0.97)):  # torchvision's; the paper's layers counted
        convolutions, linear = n[f"{name}: millions of parameters in convolutions, linear layers"]
        assert convolutions + linear == pytest.approx(millions, abs=0.02)
        assert (linear == 0) if name == "nin" else (linear > 10 * convolutions)
        convolutions, linear = n[f"{name}: millions of multiply-adds in convolutions, linear layers"]
        assert convolutions > 10 * linear
    plain, norm, residual, dense = (n[f"{kind}: last loss"] for kind in ("plain", "batch norm", "residual", "dense"))
    assert plain > math.log(10) - 0.1 and norm < plain - 0.1 and residual < norm - 0.3 and dense < plain - 0.1


def one_process(n):
    assert n["processes"] == 1 and n["largest difference from one process"] == 0
    assert n["last loss"] < n["first loss"]


# script -> (steps of the short run, what must hold)
EXAMPLES = {
    "learn_edge_filter": (30, edge_filter),
    "what_normalisation_does": (25, normalisation),
    "attention_pooling": (60, pooling),
    "distribution_shift": (60, shift),
    "numerical_stability": (30, stability),
    "newton": (4, newton),
    "svm_dual": (800, svm),
    "pid_learning_rate": (60, pid),
    "markov_chain": (8, markov),
    "noisy_sine": (60, sine),
    "zipf": (100, zipf),
    "distributed": (12, one_process),
    "language_model": (25, language),
    "translation": (40, translating),
    "head_pruning": (80, heads),
    "saving_and_loading": (20, saving),
    "lazy_and_shared": (80, lazy),
    "backpropagation": (5, backward),
    "custom_layers": (60, custom),
    "lars": (20, large_batch),
    "positions": (60, positions),
    "classic_networks": (25, networks),
    "convolution": (24, arithmetic),
}


def test_every_script_is_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} - {"common"} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    steps, holds = EXAMPLES[name]
    module = importlib.import_module(name)
    assert "What to see:" in module.__doc__
    torch.manual_seed(0)
    with dlkern.trace() as calls:
        numbers = module.main(steps, tmp_path)
    assert {call.backend for call in calls} == ({"cpu"} if name != "zipf" else set()), "work that is not dlkern's kernels'"
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    holds(numbers)


def test_as_a_script(tmp_path):
    """As a user starts it: from anywhere, with options."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "markov_chain.py"), "--steps", "3", "--report", str(tmp_path / "new")],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert result.returncode == 0, result.stderr
    assert "stationary" in result.stdout and (tmp_path / "new" / "markov_chain.png").exists()
    page = (tmp_path / "new" / "examples.html").read_text()
    assert page.count("<img") == 1 and "markov_chain.png" in page and "<p>What to see:" in page


@pytest.mark.parametrize("wrong", ["0", "-3", "many", "1.5"])
def test_wrong_steps(wrong, monkeypatch, capsys):
    common, called = importlib.import_module("common"), []
    monkeypatch.setattr(sys, "argv", ["script", "--steps", wrong])
    with pytest.raises(SystemExit):
        common.run(lambda steps, report: called.append(steps), 3)
    assert "--steps" in capsys.readouterr().err and not called


def test_distributed_in_two_processes(tmp_path):
    """The losses under torchrun are those of one process with the whole batch: in float64, where only rounding differs."""
    steps = 4
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "examples" / "distributed.py"), "--steps", str(steps), "--dtype", "float64"]
    result = subprocess.run(
        [*command, *script, "--report", str(tmp_path / "two")], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "processes: 2" in result.stdout
    importlib.import_module("distributed").main(steps, tmp_path / "one", "float64")
    two, one = (json.loads((tmp_path / name / "distributed.json").read_text())["losses"] for name in ("two", "one"))
    assert len(two) == steps and len(set(two)) == steps
    torch.testing.assert_close(torch.tensor(two, dtype=torch.float64), torch.tensor(one, dtype=torch.float64))
