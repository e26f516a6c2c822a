"""docs/course-map.md: everything it names is there."""

import re
from pathlib import Path

import click
import pytest

import dlkern
from dlkern import cli, decoding, models, text, translation

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "course-map.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")][1:]
SPACES = (dlkern, dlkern.nn, dlkern.nn.functional, models, models.language, text, decoding, translation)
ids = [row[0] for row in ROWS]


def named(path, space):
    """The attribute of a dotted name, or None."""
    for part in path.split("."):
        space = getattr(space, part, None)
    return space


def test_rows_are_whole():
    assert len(ROWS) > 40 and all(len(row) == 4 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_names_of_ops_and_modules(row):
    for name in re.findall(r"`([^`]*)`", row[1]):
        path = re.sub(r"\(.*\)", "", name).removeprefix("dlkern.")
        if not path.endswith("=") and "=" not in path:
            assert any(named(path, space) is not None for space in SPACES), name


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_examples(row):
    """A cell holds names of scripts and `dlkern …` commands; what is in brackets is a remark."""
    for entry in re.split("[,;] ", re.sub(r" \(.*?\)", "", row[2])):
        if entry.startswith("`"):
            command = entry.strip("`").split()
            assert command[0] == "dlkern"
            found = cli.main
            for word in command[1:]:
                if word.startswith("--"):
                    assert any(word in option.opts for option in found.params), entry
                else:
                    assert isinstance(found, click.Group), entry
                    found = found.commands[word]
        elif entry != "–":
            assert (ROOT / "examples" / f"{entry}.py").exists(), entry


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_tests(row):
    entries = re.sub(r" \(.*?\)", "", row[3]).split(", ")
    for entry in entries:
        assert (ROOT / "tests" / f"{entry}.py").exists(), entry
    if "test_examples" in entries:
        assert row[2] != "–"


def test_every_script_is_on_the_page():
    for path in (ROOT / "examples").glob("*.py"):
        assert path.stem == "common" or re.search(rf"\b{path.stem}\b", PAGE), path.stem
