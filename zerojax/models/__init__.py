"""The networks, each with the ways that its weights may start.

`create` builds one from plain arguments: ConstNet, LeakyNet, the MLP (the toy) or the wide ResNet
(the baseline). `initializers` is of use to networks of your own. To add a network: a file with the
module and its `create`, and an entry in `create.NETWORKS`; `network.StagedNetwork` holds what the
convolutional ones share; they are built of `layers`, `convolutions` (the ways of computing one, and
which is taken where) and `batch_norm`.
"""

from zerojax.models.constnet import ConstNet
from zerojax.models.create import Network, create
from zerojax.models.leakynet import LeakyNet
from zerojax.models.mlp import MLP
from zerojax.models.wide_resnet import WideResNet

__all__ = ['MLP', 'ConstNet', 'LeakyNet', 'Network', 'WideResNet', 'create']
