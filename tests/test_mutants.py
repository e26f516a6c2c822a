"""The list of mutants itself: `make mutate` can only apply a text that is there, once."""

import importlib
import pkgutil
from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = [module.name for module in pkgutil.iter_modules(mutants.__path__)]


@pytest.mark.parametrize("module", MODULES)
def test_every_text_occurs_once(module):
    found = importlib.import_module(f"mutants.{module}").MUTANTS
    assert found
    for mutant in found:
        count = (ROOT / mutant["file"]).read_text().count(mutant["old"])
        assert count == 1 and mutant["new"] != mutant["old"], (count, mutant["file"], mutant["old"])
        assert mutant["tests"][0].startswith("tests/") and (ROOT / mutant["tests"][0]).exists()
        assert mutant["build"] in ("", "native", "wide", "cuda_on_host")
