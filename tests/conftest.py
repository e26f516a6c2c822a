import pytest
import torch

torch.set_warn_always(True)  # so that a missing autograd kernel is seen by every test, not by the first


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
