"""Wide ResNet, the ordinary baseline: random weights, two convolutions a block.

Zagoruyko and Komodakis, "Wide Residual Networks", 2016, in its pre-activation form; and the same
network without normalisation under Fixup, Zhang, Dauphin and Ma, "Fixup Initialization", 2019.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.nn.initializers import he_normal, zeros

from zerojax.models import initializers
from zerojax.models.arguments import require_depth, require_one_of
from zerojax.models.layers import ModuleDef, Scalar
from zerojax.models.network import Place, StagedNetwork, conv_axes, head, norm_axes

INITS = ('he', 'fixup')


class NormalizedBlock(nn.Module):
    """bn, relu, conv3x3, bn, relu, dropout, conv3x3, added to x or to conv1x1(relu(bn(x))).

    `inside` is the number of features between the two convolutions.
    """

    place: Place
    inside: int
    conv: ModuleDef
    norm: ModuleDef
    dropout: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        features, stride = self.place.features, self.place.stride
        y = nn.relu(self.norm(name='bn1')(x_BxHxWxC))
        out = self.conv(self.inside, 3, stride, he_normal(), name='conv1')(y)
        out = self.dropout(nn.relu(self.norm(name='bn2')(out)))
        out = self.conv(features, 3, 1, he_normal(), name='conv2')(out)
        if not self.place.makes_features:
            return x_BxHxWxC + out
        return self.conv(features, 1, stride, he_normal(), name='shortcut')(y) + out


class FixupBlock(nn.Module):
    """The same without BatchNorm: a scalar bias before each ReLU and convolution, one multiplier.

    The first convolution starts small (`initializers.fixup`), the second at 0. The shortcut reads
    what the first convolution reads, with the same bias before it, as in the authors' code.
    """

    place: Place
    inside: int
    num_branches: int
    conv: ModuleDef
    dropout: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        def bias(name: str) -> jax.Array:
            return Scalar(0.0, 'bias', name=name)().astype(x_BxHxWxC.dtype)

        features, stride = self.place.features, self.place.stride
        y = nn.relu(x_BxHxWxC + bias('bias1a')) + bias('bias1b')
        first_init = initializers.fixup(self.num_branches)
        out = self.conv(self.inside, 3, stride, first_init, name='conv1')(y)
        out = self.dropout(nn.relu(out + bias('bias2a')))
        out = self.conv(features, 3, 1, zeros, name='conv2')(out + bias('bias2b'))
        multiplier = Scalar(1.0, 'scale', name='multiplier')().astype(out.dtype)
        out = out * multiplier + bias('bias2c')
        if not self.place.makes_features:
            return x_BxHxWxC + out
        return self.conv(features, 1, stride, he_normal(), name='shortcut')(y) + out


class WideResNet(StagedNetwork):
    """Two convolutions a block, depth 6n + 4; build it with `create`.

    `weight_init` 'he' is the network with BatchNorm, 'fixup' the one without. Features between the
    two convolutions of a block have the axis name 'BLOCK/conv1'.

    Of 'fixup', rule 3 is a scalar multiplier in every branch, and a scalar bias before each
    convolution, ReLU and linear layer; as in the authors' code (github.com/hongyi-zhang/Fixup) the
    stem, which reads the images, has none before it. They train these scalars at a tenth of the
    learning rate; here all parameters have one. The head's bias is added before the mean over
    space instead of after it, which is the same number.
    """

    layers_per_block = 2

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        conv, norm, dropout = self.layer_types(train)
        x = conv(self.stem_features, 3, 1, he_normal(), name='stem')(images_BxHxWxC)
        blocks = list(self.blocks())
        for place in blocks:
            inside = self.feature_counts.get(f'{place.name}/conv1', place.features)
            if self.weight_init == 'fixup':
                x = FixupBlock(place, inside, len(blocks), conv, dropout, name=place.name)(x)
            else:
                x = NormalizedBlock(place, inside, conv, norm, dropout, name=place.name)(x)
        if self.weight_init == 'fixup':
            x = nn.relu(x + Scalar(0.0, 'bias', name='bias')().astype(x.dtype))
            x = x + Scalar(0.0, 'bias', name='head_bias')().astype(x.dtype)
        else:
            x = nn.relu(norm(name='bn')(x))
        return head(x, self.num_classes, self.precision, self.dtype)

    def block_axes(self, place: Place) -> dict[str, Any]:
        """As `StagedNetwork.block_axes`."""
        source, inside, stream = place.source, f'{place.name}/conv1', place.stream
        axes = {'conv1': conv_axes(source, inside), 'conv2': conv_axes(inside, stream)}
        if place.makes_features:
            axes['shortcut'] = conv_axes(source, stream)
        if self.weight_init == 'fixup':
            biases = ('bias1a', 'bias1b', 'bias2a', 'bias2b', 'bias2c')
            scalars = {name: {'bias': (None,)} for name in biases}
            return axes | scalars | {'multiplier': {'scale': (None,)}}
        return axes | {'bn1': norm_axes(source), 'bn2': norm_axes(inside)}

    def last_axes(self, stream: str) -> dict[str, Any]:
        """As `StagedNetwork.last_axes`."""
        if self.weight_init == 'fixup':
            return {'bias': {'bias': (None,)}, 'head_bias': {'bias': (None,)}}
        return {'bn': norm_axes(stream)}


def create(
    *,
    depth: int,
    width: int,
    num_classes: int,
    init: str,
    dropout: float,
    convolution: str,
    precision: str,
    dtype: str | None,
) -> WideResNet:
    """See `models.create`."""
    require_depth(WideResNet.layers_per_block, depth)
    require_one_of(INITS, 'init', init)
    return WideResNet(depth, width, num_classes, init, dropout, convolution, precision, dtype)
