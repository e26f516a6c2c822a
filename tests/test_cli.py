"""The dlkern command: each subcommand, and what it says when it is called wrongly."""

import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import dlkern
from dlkern import cli, report
from dlkern.comparison import parse_input
from dlkern.training import Run, SideBySide

MODEL = '''
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(36, 5),
    )

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        return {"logits": self.out(nn.functional.linear(self.table(tokens), self.table.weight[:8]))}

ready = small()
seven = 7
def number():
    return 7
def broken():
    raise KeyError("no weights")
'''


def call(*arguments):
    return CliRunner().invoke(cli.main, [str(a) for a in arguments])


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A directory with a user's module in it."""
    (tmp_path / "usersmodel.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("usersmodel", None)


def test_help_names_the_commands():
    result = call("--help")
    assert result.exit_code == 0
    for command in ("info", "check", "compare", "train", "bench", "demo"):
        assert command in result.output
    assert dlkern.__version__ in call("--version").output
    assert "No such command 'tarin'" in call("tarin").output


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "dlkern", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and dlkern.__version__ in done.stdout


def test_info():
    result = call("info")
    assert result.exit_code == 0
    for word in ("torch", torch.__version__, "cpu", "triton", "cuda", "reference", "available"):
        assert word in result.output
    assert "\x1b" not in result.output  # no colours into a pipe


def test_check_one_op():
    result = call("check", "dropout", "--column", "cpu", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "all keep the rule" in result.output
    assert "p=0.2" in call("check", "dropout", "--column", "cpu", "--dtype", "float32", "-v").output


def test_check_tells_a_failure(monkeypatch):
    from dlkern.testing import CASES

    wrong = next(c for c in CASES if c.op == "linear")
    right = wrong.ours
    object.__setattr__(wrong, "ours", lambda *t: right(*t) * 1.01)
    try:
        result = call("check", "linear", "--column", "cpu", "--dtype", "float32")
    finally:
        object.__setattr__(wrong, "ours", right)
    assert result.exit_code == 1
    assert "FAILED" in result.output and f"{wrong.name} float32: FAILED" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "conv7d"), "no op 'conv7d'; there are conv2d"),
        (("check", "--column", "gpu"), "'gpu' is not one of"),
        (("check", "linear", "--dtype", "int8"), "'int8' is not one of"),
        (("train", "alexnet"), "No such command 'alexnet'"),
        (("train", "lenet", "--steps", "0"), "0 is not in the range"),
        (("train", "translation", "--model", "rnn"), "'rnn' is not one of"),
        (("train", "translation", "--model", "transformer", "--width", "6"), "multiple of 4"),
        (("compare", "usersmodel"), "expected package.module:factory, got 'usersmodel'"),
        (("compare", "nowhere:make", "--input", "1,2"), "cannot import nowhere: ModuleNotFoundError"),
        (("compare", "usersmodel:large", "--input", "1,2"), "usersmodel has no 'large'"),
        (("compare", "usersmodel:seven", "--input", "1,2"), "neither a model nor a function"),
        (("compare", "usersmodel:number", "--input", "1,2"), "gave int, not a torch.nn.Module"),
        (("compare", "usersmodel:broken", "--input", "1,2"), "failed: KeyError"),
        (("compare", "usersmodel:small", "--input", "1,x"), "expected sizes like 8,3,224,224"),
        (("compare", "usersmodel:small", "--input", "1,2:float31"), "expected sizes like 8,3,224,224"),
        (("compare", "usersmodel:small", "--input", "1,4,8,8"), "on inputs 1,4,8,8: RuntimeError"),
        (("compare", "usersmodel:small"), "Missing option '--input'"),
        (("train", "lenet", "--report", "/dev/null/x"), "/dev/null/x: cannot write results there"),
        (("demo", "--report", "/dev/null/x"), "/dev/null/x: cannot write results there"),
    ],
)
def test_wrong_calls(user, arguments, message):
    if arguments == ("compare", "usersmodel"):
        arguments = (*arguments, "--input", "1,2")
    result = call(*arguments)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="the column is there")
def test_a_column_that_is_not_there():
    result = call("check", "linear", "--column", "triton")
    assert result.exit_code == 1 and "not available" in result.output
    result = call("train", "lenet", "--steps", "1", "--column", "triton")
    assert result.exit_code == 1 and "emulated" in result.output and "Traceback" not in result.output


QUICKLY = ("--seconds", 0.01, "--layer-seconds", 0.001)


@pytest.mark.parametrize("factory", ["small", "ready"])
def test_compare(user, factory):
    result = call("compare", f"usersmodel:{factory}", "--input", "2,3,8,8", *QUICKLY)
    assert result.exit_code == 0, result.output
    for word in ("Conv2d", "BatchNorm2d", "activations stay torch's", "by layer", "2×3×8×8", "parity: ok", "backward"):
        assert word in result.output


def test_compare_without_parameters():
    result = call("compare", "torch.nn:Identity", "--input", "2,3", *QUICKLY)
    assert result.exit_code == 0 and "parity: ok" in result.output, result.output


def test_compare_with_integers_and_functions(user):
    result = call("compare", "usersmodel:Words", "--input", "2,5:int64:20", "--forward-only", *QUICKLY)
    assert result.exit_code == 0, result.output
    assert "would take as well: linear ×1" in result.output
    assert "forward + backward" not in result.output


def test_train_writes_a_report(tmp_path):
    result = call("train", "lenet", "--steps", 4, "--batch", 16, "--report", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert "accuracy, held out" in result.output and "torch / dlkern" in result.output
    page = (tmp_path / "report" / "index.html").read_text()
    assert "lenet on scikit-learn" in page and "<table>" in page
    pytest.importorskip("matplotlib")
    assert "data:image/png;base64," in page
    assert (tmp_path / "report" / "1-1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("model", ["bahdanau", "transformer"])
def test_train_translation(tmp_path, model):
    for package in ("django", "polib", "sacrebleu", "rouge_score"):
        pytest.importorskip(package)
    settings = ("--model", model, "--width", 12, "--steps", 3, "--batch", 6, "--beams", 2)
    result = call("train", "translation", *settings, "--report", tmp_path / "report")
    assert result.exit_code == 0, result.output
    for word in ("perplexity, held out", "torch / dlkern", "BLEU, held out", "ROUGE-L, trained on", "Django's French"):
        assert word in result.output
    page = (tmp_path / "report" / "index.html").read_text()
    assert f"{model} on Django" in page and "BLEU, held out" in page
    pytest.importorskip("matplotlib")
    assert (tmp_path / "report" / "1-2.png").read_bytes().startswith(b"\x89PNG")  # what it attends to


@pytest.mark.parametrize("level", ["char", "word"])
def test_train_a_language_model(tmp_path, level):
    settings = ("--level", level, "--hidden", 16, "--steps", 3, "--batch", 4, "--length", 8, "--sampling", "random-lengths")
    result = call("train", "language-model", "--cell", "lstm", *settings, "--tied", "--report", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert "perplexity, held out" in result.output and "torch / dlkern" in result.output and "goes on" in result.output
    page = (tmp_path / "report" / "index.html").read_text()
    assert f"lstm language model of {level}" in page and "goes on" in page


def test_no_plots_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.training_plot(SideBySide(Run([1.0], [1.0], [(1, 0.5)]), Run([1.0], [1.0], [(1, 0.5)]))) is None
    assert report.heat_map([[1.0]], ["a"], ["b"], "c") is None


def test_report_escapes(tmp_path):
    page = report.write(tmp_path, "<t>", "&", [report.Section("a<b", tables=[report.Table(["x"], [["<i>"]])])])
    text = page.read_text()
    assert "<i>" not in text and "&lt;i&gt;" in text and "<title>&lt;t&gt;" in text


def test_parse_input():
    generator = torch.Generator().manual_seed(0)
    assert parse_input("2,3", generator).dtype == torch.float32
    tokens = parse_input("4,9:int64:30", generator)
    assert tokens.dtype == torch.int64 and 2 < tokens.max() < 30


def test_bench_help():
    done = subprocess.run([sys.executable, "-m", "dlkern", "bench", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--quick" in done.stdout
