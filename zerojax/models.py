"""ConstNet, the paper's deep residual network that can start with all features identical.

Blumenfeld, Gilboa, Soudry, "Beyond Signal Propagation", ICML 2020, as its published code computes
it (github.com/yanivbl6/BeyondSigProp).

Shapes are written as suffixes: B batch, H and W space, C channels, N classes.
"""

from collections.abc import Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from zerojax import initializers

INITS = ('averaging', 'random')
SHORTCUTS = ('post_relu', 'pre_relu')
CONVOLUTIONS = ('direct', 'patches')


def convolve_direct(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution padded by k // 2 on all sides (not Flax's 'SAME', which differs at stride 2)."""
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x_BxHxWxC,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


def convolve_patches(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The same convolution as one matrix product: patches [B, H, W, k·k·C] times kernel."""
    size, _, c_in, c_out = kernel.shape
    pad = size // 2
    x = jnp.pad(x_BxHxWxC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    batch, height, width, _ = x.shape
    out_height, out_width = (height - size) // stride + 1, (width - size) // stride + 1
    taps = [
        lax.slice(
            x,
            (0, i, j, 0),
            (batch, i + stride * (out_height - 1) + 1, j + stride * (out_width - 1) + 1, c_in),
            (1, stride, stride, 1),
        )
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(taps, axis=-1) @ kernel.reshape(size * size * c_in, c_out)


class Conv(nn.Module):
    """Square convolution without bias; computes in the dtype of its kernel."""

    features: int
    kernel_size: int
    stride: int
    kernel_init: nn.initializers.Initializer
    convolution: str

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x_BxHxWxC.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
        convolve = {'direct': convolve_direct, 'patches': convolve_patches}[self.convolution]
        return convolve(x_BxHxWxC.astype(kernel.dtype), kernel, self.stride)


class ConstNetBlock(nn.Module):
    """y = relu(bn(x)); out = conv3x3(y); x + out, or conv1x1(y) + out where the width changes.

    The 1x1 shortcut reads y after the ReLU, as the paper's code does (`shortcut='post_relu'`), or
    bn(x) before it (`'pre_relu'`).
    """

    features: int
    stride: int
    weight_init: str
    dropout: float
    shortcut: str
    convolution: str

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        random = self.weight_init == 'random'
        normalized = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, name='bn'
        )(x_BxHxWxC)
        y = nn.relu(normalized)
        kernel_init = initializers.random_control(2.0) if random else nn.initializers.zeros
        out = Conv(self.features, 3, self.stride, kernel_init, self.convolution, name='conv')(y)
        if self.dropout > 0:
            out = nn.Dropout(self.dropout, deterministic=not train)(out)
        if x_BxHxWxC.shape[-1] == self.features:
            return x_BxHxWxC + out
        source = y if self.shortcut == 'post_relu' else normalized
        kernel_init = initializers.random_control(1.0) if random else initializers.averaging()
        shortcut = Conv(
            self.features, 1, self.stride, kernel_init, self.convolution, name='shortcut'
        )
        return shortcut(source) + out


class ConstNet(nn.Module):
    """Pre-activation residual network of one convolution a block; build it with `create`.

    Called on images [B, H, W, C] of any float dtype (any size, any number of channels), it returns
    logits [B, num_classes]; all arithmetic is in the dtype of the parameters. With `train=True` it
    normalises by the batch, needs `mutable=['batch_stats']`, and with `dropout` > 0 also
    `rngs={'dropout': key}`.
    """

    depth: int
    width: int
    num_classes: int
    weight_init: str = 'averaging'
    dropout: float = 0.0
    shortcut: str = 'post_relu'
    convolution: str = 'direct'

    def blocks(self) -> Iterator[tuple[str, int, int]]:
        """Name, number of output channels and stride of each block, in order."""
        for stage in range(3):
            for layer in range((self.depth - 4) // 3):
                stride = 2 if stage > 0 and layer == 0 else 1
                yield f'block{stage + 1}_{layer}', 16 * self.width * 2**stage, stride

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        random = self.weight_init == 'random'
        kernel_init = initializers.random_control(1.0) if random else initializers.averaging()
        x = Conv(16, 3, 1, kernel_init, self.convolution, name='stem')(images_BxHxWxC)
        for name, features, stride in self.blocks():
            block = ConstNetBlock(
                features,
                stride,
                self.weight_init,
                self.dropout,
                self.shortcut,
                self.convolution,
                name=name,
            )
            x = block(x, train)
        x_BxC = jnp.mean(nn.relu(x), axis=(1, 2))
        head = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name='head')
        return head(x_BxC)

    def feature_axes(self) -> dict[str, Any]:
        """Which axes of which array are indexed by the same features.

        A tree like the variables `{'params': ..., 'batch_stats': ...}`; each leaf is a tuple with a
        name for every axis, or None for an axis that no features index (space, image channels,
        classes). Axes of one name are indexed by the same features: the residual stream keeps its
        features from block to block until a shortcut convolution makes new ones.
        """
        params: dict[str, Any] = {'stem': {'kernel': (None, None, None, 'stem')}}
        batch_stats: dict[str, Any] = {}
        stream, width = 'stem', 16
        for name, features, _ in self.blocks():
            source, source_width = stream, width
            if features != source_width:
                stream, width = name, features
            params[name] = {
                'bn': {'scale': (source,), 'bias': (source,)},
                'conv': {'kernel': (None, None, source, stream)},
            }
            if features != source_width:
                params[name]['shortcut'] = {'kernel': (None, None, source, stream)}
            batch_stats[name] = {'bn': {'mean': (source,), 'var': (source,)}}
        params['head'] = {'kernel': (stream, None), 'bias': (None,)}
        return {'params': params, 'batch_stats': batch_stats}


def create(
    name: Literal['constnet'],
    *,
    depth: int = 16,
    width: int = 10,
    num_classes: int = 10,
    init: str = 'averaging',
    dropout: float = 0.0,
    shortcut: str = 'post_relu',
    convolution: str = 'direct',
) -> ConstNet:
    """Builds a network.

    Args:
        name: 'constnet'.
        depth: 3n + 4 with n >= 1 blocks in each of the three stages.
        width: the paper's widen factor k; stages have 16k, 32k and 64k features.
        num_classes: number of logits.
        init: 'averaging' (block convolutions 0, stem and shortcuts averaging) or 'random' (the
            paper's random control). The dense head starts at 0 in both.
        dropout: rate of the dropout on each block convolution's output, in [0, 1).
        shortcut: 'post_relu' (the paper's code) or 'pre_relu', see `ConstNetBlock`.
        convolution: how a convolution is computed: 'direct' (XLA's convolution) or 'patches' (one
            matrix product). Equal up to rounding; which is faster depends on size and device.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    if name != 'constnet':
        raise ValueError(f"name={name!r}: no such model; allowed: 'constnet'")
    if depth < 7 or (depth - 4) % 3:
        raise ValueError(f'depth={depth}: must be 3n + 4 with n >= 1: 7, 10, 13, 16, ...')
    if width < 1:
        raise ValueError(f'width={width}: must be at least 1')
    if num_classes < 1:
        raise ValueError(f'num_classes={num_classes}: must be at least 1')
    if not 0 <= dropout < 1:
        raise ValueError(f'dropout={dropout}: must be at least 0 and below 1')
    choices = {
        'init': (init, INITS),
        'shortcut': (shortcut, SHORTCUTS),
        'convolution': (convolution, CONVOLUTIONS),
    }
    for argument, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f'{argument}={value!r}: must be one of {", ".join(allowed)}')
    return ConstNet(depth, width, num_classes, init, dropout, shortcut, convolution)
