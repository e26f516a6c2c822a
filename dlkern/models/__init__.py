"""Reference networks built from dlkern.nn, each with the torch twin it is checked against.

Every factory (and the language models' classes) takes `nn`, the namespace its layers come from: `lenet()` runs on
dlkern, `lenet(nn=torch.nn)` is its torch twin, and a state_dict of one loads into the other.
"""

from dlkern.models.alexnet import AlexNet, alexnet
from dlkern.models.densenet import DenseNet, densenet121
from dlkern.models.googlenet import GoogLeNet, googlenet
from dlkern.models.language import Decoder, Encoder, EncoderDecoder, LanguageModel, detached, generate
from dlkern.models.lenet import LeNet, lenet
from dlkern.models.mlp import MLP, mlp
from dlkern.models.nin import NiN, nin
from dlkern.models.resnet import ResNet, preact_resnet18, preact_resnet50, resnet18, resnet50
from dlkern.models.seq2seq import Seq2Seq, seq2seq
from dlkern.models.transformer import Transformer, transformer
from dlkern.models.vgg import VGG, vgg11, vgg16

__all__ = [
    "MLP", "VGG", "AlexNet", "Decoder", "DenseNet", "Encoder", "EncoderDecoder", "GoogLeNet", "LanguageModel", "LeNet", "NiN",
    "ResNet", "Seq2Seq", "Transformer", "alexnet", "densenet121", "detached", "generate", "googlenet", "lenet", "mlp", "nin",
    "preact_resnet18", "preact_resnet50", "resnet18", "resnet50", "seq2seq", "transformer", "vgg11", "vgg16",
]  # fmt: skip
