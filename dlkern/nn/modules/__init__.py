"""Subclasses of torch.nn's modules, a file a family: constructors, repr, state_dict and isinstance are torch's."""

from dlkern.nn.modules.dropout import Dropout

__all__ = ["Dropout"]
