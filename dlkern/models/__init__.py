"""Reference networks built from dlkern.nn, each with the torch twin it is checked against.

Every factory takes `nn`, the namespace its layers come from: `lenet()` runs on dlkern, `lenet(nn=torch.nn)` is its
torch twin, and a state_dict of one loads into the other.
"""

from dlkern.models.lenet import LeNet, lenet
from dlkern.models.resnet import ResNet, resnet18

__all__ = ["LeNet", "ResNet", "lenet", "resnet18"]
