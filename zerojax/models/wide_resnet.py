"""Wide ResNet, the ordinary baseline: random weights, two convolutions a block.

Zagoruyko and Komodakis, "Wide Residual Networks", 2016, in its pre-activation form; and the same
network without normalisation under Fixup, Zhang, Dauphin and Ma, "Fixup Initialization", 2019.

Shapes are written as suffixes: B batch, H and W space, C channels, N classes.
"""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.nn.initializers import he_normal, zeros

from zerojax.models import initializers
from zerojax.models.layers import Conv, Scalar, batch_norm, mean_over_space


class NormalizedBlock(nn.Module):
    """bn, relu, conv3x3, bn, relu, dropout, conv3x3, added to x or to conv1x1(relu(bn(x)))."""

    features: int
    stride: int
    dropout: float
    convolution: str
    dtype: str | None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        def conv(size: int, stride: int, name: str) -> Conv:
            how = self.convolution, self.dtype
            return Conv(self.features, size, stride, he_normal(), *how, name=name)

        y = nn.relu(batch_norm(train, self.dtype, name='bn1')(x_BxHxWxC))
        out = conv(3, self.stride, 'conv1')(y)
        out = nn.relu(batch_norm(train, self.dtype, name='bn2')(out))
        if self.dropout > 0:
            out = nn.Dropout(self.dropout, deterministic=not train)(out)
        out = conv(3, 1, 'conv2')(out)
        if x_BxHxWxC.shape[-1] == self.features:
            return x_BxHxWxC + out
        return conv(1, self.stride, 'shortcut')(y) + out


class FixupBlock(nn.Module):
    """The same without BatchNorm: a scalar bias before each ReLU and convolution, one multiplier.

    The first convolution starts small (`initializers.fixup`), the second at 0.
    """

    features: int
    stride: int
    num_branches: int
    dropout: float
    convolution: str
    dtype: str | None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        def bias(name: str) -> jax.Array:
            return Scalar(0.0, 'bias', name=name)().astype(x_BxHxWxC.dtype)

        def conv(size: int, stride: int, init: nn.initializers.Initializer, name: str) -> Conv:
            return Conv(self.features, size, stride, init, self.convolution, self.dtype, name=name)

        y = nn.relu(x_BxHxWxC + bias('bias1a'))
        first_init = initializers.fixup(self.num_branches)
        out = conv(3, self.stride, first_init, 'conv1')(y + bias('bias1b'))
        out = nn.relu(out + bias('bias2a'))
        if self.dropout > 0:
            out = nn.Dropout(self.dropout, deterministic=not train)(out)
        out = conv(3, 1, zeros, 'conv2')(out + bias('bias2b'))
        multiplier = Scalar(1.0, 'scale', name='multiplier')().astype(out.dtype)
        out = out * multiplier + bias('bias2c')
        if x_BxHxWxC.shape[-1] == self.features:
            return x_BxHxWxC + out
        return conv(1, self.stride, he_normal(), 'shortcut')(y) + out


class WideResNet(nn.Module):
    """Stages of 16k, 32k and 64k features, strides 1, 2, 2, n blocks each, depth 6n + 4.

    `weight_init` 'he' is the network with BatchNorm, 'fixup' the one without. The head starts at 0
    in both. Build it with `models.create`; called as `models.ConstNet`.
    """

    depth: int
    width: int
    num_classes: int
    weight_init: str = 'he'
    dropout: float = 0.0
    convolution: str = 'direct'
    dtype: str | None = None

    def blocks(self) -> Iterator[tuple[str, int, int]]:
        """Name, number of output features and stride of each block, in order."""
        for stage in range(3):
            for layer in range((self.depth - 4) // 6):
                stride = 2 if stage > 0 and layer == 0 else 1
                yield f'block{stage + 1}_{layer}', 16 * self.width * 2**stage, stride

    def layers(self) -> list[str]:
        """Names of the submodules whose outputs follow one another, from the image on."""
        return ['stem', *(name for name, _, _ in self.blocks())]

    def noiseless(self) -> None:
        """As `models.ConstNet.noiseless`: without noise all features of a layer would be equal."""
        return None

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        fixup = self.weight_init == 'fixup'
        how = self.convolution, self.dtype
        x = Conv(16, 3, 1, he_normal(), *how, name='stem')(images_BxHxWxC)
        for name, features, stride in self.blocks():
            if fixup:
                branches = (self.depth - 4) // 2
                x = FixupBlock(features, stride, branches, self.dropout, *how, name=name)(x, train)
            else:
                x = NormalizedBlock(features, stride, self.dropout, *how, name=name)(x, train)
        if fixup:
            x = x + Scalar(0.0, 'bias', name='bias')().astype(x.dtype)
        else:
            x = batch_norm(train, self.dtype, name='bn')(x)
        x_BxC = mean_over_space(nn.relu(x), self.dtype)
        return nn.Dense(self.num_classes, kernel_init=zeros, name='head')(x_BxC)

    def feature_axes(self) -> dict[str, Any]:
        """As `models.ConstNet.feature_axes`; a block has features of its own between its layers."""
        fixup = self.weight_init == 'fixup'
        params: dict[str, Any] = {'stem': {'kernel': (None, None, None, 'stem')}}
        batch_stats: dict[str, Any] = {}
        stream, width = 'stem', 16
        for name, features, _ in self.blocks():
            source, inside, grows = stream, f'{name}/conv1', features != width
            if grows:
                stream, width = name, features
            params[name] = {
                'conv1': {'kernel': (None, None, source, inside)},
                'conv2': {'kernel': (None, None, inside, stream)},
            }
            if grows:
                params[name]['shortcut'] = {'kernel': (None, None, source, stream)}
            if fixup:
                for bias in ('bias1a', 'bias1b', 'bias2a', 'bias2b', 'bias2c'):
                    params[name][bias] = {'bias': (None,)}
                params[name]['multiplier'] = {'scale': (None,)}
            else:
                batch_stats[name] = {}
                for norm, axis in (('bn1', source), ('bn2', inside)):
                    params[name][norm] = {'scale': (axis,), 'bias': (axis,)}
                    batch_stats[name][norm] = {'mean': (axis,), 'var': (axis,)}
        if fixup:
            params['bias'] = {'bias': (None,)}
        else:
            params['bn'] = {'scale': (stream,), 'bias': (stream,)}
            batch_stats['bn'] = {'mean': (stream,), 'var': (stream,)}
        params['head'] = {'kernel': (stream, None), 'bias': (None,)}
        return {'params': params, 'batch_stats': batch_stats}
