import os

os.environ["DLKERN_POISON"] = "1"  # before the library is loaded: results start as NaN, so that a hole is seen

import pytest
import torch

torch.set_warn_always(True)  # so that a missing autograd kernel is seen by every test, not by the first


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
