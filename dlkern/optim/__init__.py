"""torch.optim's optimisers on dlkern's kernels: all parameters in one pass. Subclasses of torch's, so constructors,
param_groups, hooks and state_dict are torch's, and a state_dict of one loads into the other."""

from dlkern.optim.adam import Adam, AdamW
from dlkern.optim.lars import LARS
from dlkern.optim.sgd import SGD

__all__ = ["LARS", "SGD", "Adam", "AdamW"]
