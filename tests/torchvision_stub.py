"""torchvision's Python models beside a CPU build of torch that its compiled ops were not built for.

Importing torchvision registers fake kernels for ops of its library. Where that library does not load, the ops are
declared here first, as schemas without an implementation: none of the models needs them. Import this before
torchvision; it skips the test where torchvision is not installed at all.
"""

import importlib.util
import sys

import pytest
import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None


def torchvision():
    """The torchvision module, imported with what its library would have declared."""
    global _library
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _forget()
        _library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            _library.define(schema)
        import torchvision
    except ImportError:
        pytest.skip("torchvision is not installed")
    return torchvision


def transformers():
    """The transformers module, which imports torchvision where that is installed."""
    module = pytest.importorskip("transformers")
    if importlib.util.find_spec("torchvision") is not None:
        torchvision()
    return module


def _forget():

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
