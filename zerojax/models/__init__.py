"""The paper's networks: ConstNet, LeakyNet, and the toy with one hidden layer.

Blumenfeld, Gilboa, Soudry, "Beyond Signal Propagation", ICML 2020, as its published code computes
them (github.com/yanivbl6/BeyondSigProp). Both deep networks have a stem of 16 features and three
stages of 16k, 32k and 64k features (k is the widen factor) with strides 1, 2 and 2, n blocks each,
one 3x3 convolution a block: 3n + 4 layers with the shortcuts and the head. They take images of any
size and any number of channels: the strides divide the size by 4, the mean over what is left of
space goes to the head.

Shapes are written as suffixes: B batch, H and W space, C channels, N classes.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import FrozenDict
from jax.nn.initializers import Initializer, delta_orthogonal, he_normal, zeros

from zerojax.models import initializers
from zerojax.models.layers import CONVOLUTIONS, Conv, Linear, Scalar, batch_norm, mean_over_space
from zerojax.models.wide_resnet import WideResNet

CONSTNET_INITS = ('averaging', 'random', 'he', 'delta_orthogonal', 'hadamard')
MLP_INITS = ('averaging', 'random')
WIDE_RESNET_INITS = ('he', 'fixup')
SHORTCUTS = ('post_relu', 'pre_relu')
DROPOUT_PLACES = ('blocks', 'stem')
DTYPES = (None, 'bfloat16')


def constnet_kernels(init: str, sigma_w: float) -> tuple[Initializer, Initializer, Initializer]:
    """Initializers of ConstNet's stem, block convolutions and shortcuts. The head starts at 0.

    'averaging' with sigma_w = 0 is the paper's ConstNet, 'random' with sigma_w = 1 its random
    control; 'averaging' with sigma_w > 0 lies between them. The rest is from the literature:
    'he' (He et al. 2015, truncated normal), 'delta_orthogonal' (Xiao et al. 2018; gain √2 behind a
    ReLU) and 'hadamard' (ZerO, Zhao et al. 2022, with residual branches that start at 0).
    """
    control = initializers.random_control
    return {
        'averaging': (initializers.averaging(), control(2 * sigma_w), initializers.averaging()),
        'random': (control(sigma_w), control(2 * sigma_w), control(sigma_w)),
        'he': (he_normal(), he_normal(), he_normal()),
        'delta_orthogonal': (
            delta_orthogonal(1.0),
            delta_orthogonal(math.sqrt(2)),
            delta_orthogonal(math.sqrt(2)),
        ),
        'hadamard': (initializers.hadamard(), zeros, initializers.hadamard()),
    }[init]


def stages(depth: int, width: int) -> Iterator[tuple[str, int, int]]:
    """Name, number of output features and stride of each block of ConstNet and LeakyNet."""
    for stage in range(3):
        for layer in range((depth - 4) // 3):
            stride = 2 if stage > 0 and layer == 0 else 1
            yield f'block{stage + 1}_{layer}', 16 * width * 2**stage, stride


class ConstNetBlock(nn.Module):
    """y = relu(bn(x)); out = conv3x3(y); x + out, or conv1x1(y) + out where features are new.

    The 1x1 shortcut reads y after the ReLU, as the paper's code does (`shortcut='post_relu'`), or
    bn(x) before it (`'pre_relu'`); None if the block adds to the features that it reads.
    """

    features: int
    stride: int
    kernel_init: Initializer
    shortcut_init: Initializer
    dropout: float
    shortcut: str | None
    convolution: str
    dtype: str | None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        normalized = batch_norm(train, self.dtype, name='bn')(x_BxHxWxC)
        y = nn.relu(normalized)
        how = self.convolution, self.dtype
        out = Conv(self.features, 3, self.stride, self.kernel_init, *how, name='conv')(y)
        if self.dropout > 0:
            out = nn.Dropout(self.dropout, deterministic=not train)(out)
        if self.shortcut is None:
            return x_BxHxWxC + out
        source = y if self.shortcut == 'post_relu' else normalized
        shortcut = Conv(self.features, 1, self.stride, self.shortcut_init, *how, name='shortcut')
        return shortcut(source) + out


class ConstNet(nn.Module):
    """Pre-activation residual network of one convolution a block; build it with `create`.

    Called on images [B, H, W, C] of any float dtype, it returns logits [B, num_classes]; all
    arithmetic is in the dtype of the parameters, but for `dtype`, see `create`. With `train=True`
    it normalises by the batch, needs `mutable=['batch_stats']`, and with `dropout` > 0 also
    `rngs={'dropout': key}`.

    `feature_counts` gives the number of features of an axis name where it is not the usual one, as
    in the small network of `zerojax.quotient`.
    """

    depth: int
    width: int
    num_classes: int
    weight_init: str = 'averaging'
    sigma_w: float = 0.0
    dropout: float = 0.0
    dropout_at: str = 'blocks'
    shortcut: str = 'post_relu'
    convolution: str = 'direct'
    dtype: str | None = None
    feature_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.feature_counts = FrozenDict(self.feature_counts)  # modules must be hashable
        super().__post_init__()

    def blocks(self) -> Iterator[tuple[str, int, int]]:
        """Name, number of output features and stride of each block, in order."""
        return stages(self.depth, self.width)

    def streams(self) -> Iterator[tuple[str, str]]:
        """Axis names of the features that each block reads and writes; equal where it adds to them.

        The residual stream keeps its features until a shortcut convolution makes new ones.
        """
        stream, width = 'stem', 16
        for name, features, _ in self.blocks():
            source = stream
            if features != width:
                stream, width = name, features
            yield source, stream

    def layers(self) -> list[str]:
        """Names of the submodules whose outputs follow one another, from the image on."""
        return ['stem', *(name for name, _, _ in self.blocks())]

    def noiseless(self) -> 'ConstNet | None':
        """The network without noise in its initial weights, from which `symmetry.find_orbits` tells
        which features are meant to be equal; None if all of a layer are."""
        return self if self.weight_init == 'hadamard' else None

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        stem_init, kernel_init, shortcut_init = constnet_kernels(self.weight_init, self.sigma_w)
        features = self.feature_counts.get('stem', 16)
        stem = Conv(features, 3, 1, stem_init, self.convolution, self.dtype, name='stem')
        x = stem(images_BxHxWxC)
        if self.dropout > 0 and self.dropout_at == 'stem':
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for (name, features, stride), (source, stream) in zip(
            self.blocks(), self.streams(), strict=True
        ):
            block = ConstNetBlock(
                self.feature_counts.get(stream, features),
                stride,
                kernel_init,
                shortcut_init,
                self.dropout if self.dropout_at == 'blocks' else 0.0,
                None if source == stream else self.shortcut,
                self.convolution,
                self.dtype,
                name=name,
            )
            x = block(x, train)
        x_BxC = mean_over_space(nn.relu(x), self.dtype)
        return nn.Dense(self.num_classes, kernel_init=zeros, name='head')(x_BxC)

    def feature_axes(self) -> dict[str, Any]:
        """Which axes of which array are indexed by the same features.

        A tree like the variables `{'params': ..., 'batch_stats': ...}`; each leaf is a tuple with a
        name for every axis, or None for an axis that no features index (space, image channels,
        classes). Axes of one name are indexed by the same features, see `streams`.
        """
        params: dict[str, Any] = {'stem': {'kernel': (None, None, None, 'stem')}}
        batch_stats: dict[str, Any] = {}
        stream = 'stem'
        for name, (source, stream) in zip(self.layers()[1:], self.streams(), strict=True):
            params[name] = {
                'bn': {'scale': (source,), 'bias': (source,)},
                'conv': {'kernel': (None, None, source, stream)},
            }
            if source != stream:
                params[name]['shortcut'] = {'kernel': (None, None, source, stream)}
            batch_stats[name] = {'bn': {'mean': (source,), 'var': (source,)}}
        params['head'] = {'kernel': (stream, None), 'bias': (None,)}
        return {'params': params, 'batch_stats': batch_stats}


class LeakyNetBlock(nn.Module):
    """leaky_relu(conv3x3(x + b)) with one scalar b; behind it BatchNorm, in odd blocks only."""

    features: int
    stride: int
    kernel_init: Initializer
    negative_slope: float
    normalize: bool
    dropout: float
    convolution: str
    dtype: str | None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        shifted = x_BxHxWxC + Scalar(0.0, 'bias', name='shift')().astype(x_BxHxWxC.dtype)
        how = self.convolution, self.dtype
        convolution = Conv(self.features, 3, self.stride, self.kernel_init, *how, name='conv')
        out = nn.leaky_relu(convolution(shifted), self.negative_slope)
        if self.dropout > 0:
            out = nn.Dropout(self.dropout, deterministic=not train)(out)
        return batch_norm(train, self.dtype, name='bn')(out) if self.normalize else out


class LeakyNet(nn.Module):
    """Chain of convolutions without any skip connection; build it with `create`.

    The init string has a letter for the stem and for each block, see `initializers.lettered`. Even
    blocks (counted from 0 over all stages) start with the factor 1, odd ones with -1/ρ, so that a
    pair computes -x although it has two leaky ReLUs in it. Called as `ConstNet`, and with
    `feature_counts` as there.
    """

    depth: int
    width: int
    num_classes: int
    weight_init: str
    negative_slope: float = 0.01
    dropout: float = 0.0
    convolution: str = 'direct'
    dtype: str | None = None
    feature_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.feature_counts = FrozenDict(self.feature_counts)  # modules must be hashable
        super().__post_init__()

    def blocks(self) -> Iterator[tuple[str, int, int]]:
        """Name, number of output features and stride of each block, in order."""
        return stages(self.depth, self.width)

    def layers(self) -> list[str]:
        """Names of the submodules whose outputs follow one another, from the image on."""
        return ['stem', *(name for name, _, _ in self.blocks())]

    def noiseless(self) -> 'LeakyNet | None':
        """The network without noise in its initial weights, from which `symmetry.find_orbits` tells
        which features are meant to be equal; None if all of a layer are."""
        letters = self.weight_init.translate(str.maketrans('hak', '11i'))
        return self.clone(weight_init=letters) if 'i' in letters else None

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        stem_letter, *letters = list(self.weight_init.replace('_', ''))
        stem_init = initializers.lettered(stem_letter, None, self.negative_slope)
        features = self.feature_counts.get('stem', 16)
        stem = Conv(features, 3, 1, stem_init, self.convolution, self.dtype, name='stem')
        x = stem(images_BxHxWxC)
        for i, (name, features, stride) in enumerate(self.blocks()):
            block = LeakyNetBlock(
                self.feature_counts.get(name, features),
                stride,
                initializers.lettered(letters[i], i, self.negative_slope),
                self.negative_slope,
                i % 2 == 1,
                self.dropout,
                self.convolution,
                self.dtype,
                name=name,
            )
            x = block(x, train)
        x_BxC = mean_over_space(nn.leaky_relu(x, self.negative_slope), self.dtype)
        return nn.Dense(self.num_classes, kernel_init=zeros, name='head')(x_BxC)

    def feature_axes(self) -> dict[str, Any]:
        """As `ConstNet.feature_axes`: each convolution makes new features."""
        params: dict[str, Any] = {'stem': {'kernel': (None, None, None, 'stem')}}
        batch_stats: dict[str, Any] = {}
        source = 'stem'
        for i, (name, _, _) in enumerate(self.blocks()):
            params[name] = {
                'shift': {'bias': (None,)},
                'conv': {'kernel': (None, None, source, name)},
            }
            if i % 2 == 1:
                params[name]['bn'] = {'scale': (name,), 'bias': (name,)}
                batch_stats[name] = {'bn': {'mean': (name,), 'var': (name,)}}
            source = name
        params['head'] = {'kernel': (source, None), 'bias': (None,)}
        return {'params': params, 'batch_stats': batch_stats}


class MLP(nn.Module):
    """The toy: one hidden ReLU layer with a chosen number of unique features at the start.

    `weight_init` 'random' draws `unique_features` hidden features from He's N(0, 2/fan_in) (not
    truncated) and repeats them; 'averaging' starts all of them as the mean of the pixels. Hidden
    biases and the head start at 0, so copies have the same gradient and stay copies until something
    breaks the symmetry. Called as `ConstNet`; it has no statistics, and `train` changes nothing.
    """

    width: int
    num_classes: int
    weight_init: str = 'random'
    unique_features: int | None = None

    def layers(self) -> list[str]:
        """Names of the submodules whose outputs follow one another, from the image on."""
        return ['hidden']

    def noiseless(self) -> 'MLP | None':
        """The network without noise in its initial weights, from which `symmetry.find_orbits` tells
        which features are meant to be equal; None if all of a layer are."""
        return self if self.unique_features is not None else None

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        del train
        if self.weight_init == 'averaging':
            kernel_init = initializers.averaging()
        else:
            he = jax.nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')
            kernel_init = initializers.repeated(he, self.unique_features or self.width)
        pixels_BxC = images_BxHxWxC.reshape(len(images_BxHxWxC), -1)
        hidden = Linear(self.width, kernel_init, name='hidden')(pixels_BxC)
        return nn.Dense(self.num_classes, kernel_init=zeros, name='head')(nn.relu(hidden))

    def feature_axes(self) -> dict[str, Any]:
        """As `ConstNet.feature_axes`."""
        params = {
            'hidden': {'kernel': (None, 'hidden'), 'bias': ('hidden',)},
            'head': {'kernel': ('hidden', None), 'bias': (None,)},
        }
        return {'params': params, 'batch_stats': {}}


Network = ConstNet | LeakyNet | MLP | WideResNet


def create(
    name: str,
    *,
    depth: int = 16,
    width: int = 10,
    num_classes: int = 10,
    init: str = 'averaging',
    dropout: float = 0.0,
    dropout_at: str = 'blocks',
    shortcut: str = 'post_relu',
    sigma_w: float | None = None,
    negative_slope: float = 0.01,
    unique_features: int | None = None,
    convolution: str = 'direct',
    dtype: str | None = None,
) -> Network:
    """Builds a network.

    Args:
        name: 'constnet', 'leakynet', 'mlp' (the toy) or 'wideresnet' (the ordinary baseline).
        depth: of 'constnet' and 'leakynet' 3n + 4, of 'wideresnet' 6n + 4, with n >= 1 blocks in
            each of the three stages; 'mlp' has no use for it.
        width: the widen factor k: stages have 16k, 32k and 64k features; of 'mlp' the number of
            hidden features.
        num_classes: number of logits.
        init: of 'constnet' one of `CONSTNET_INITS`, see `constnet_kernels`; of 'leakynet' a letter
            for the stem and for each block, see `initializers.lettered`, underscores ignored; of
            'mlp' 'random' or 'averaging'; of 'wideresnet' 'he' or 'fixup'. The head starts at 0.
        dropout: rate of dropout, in [0, 1).
        dropout_at: 'blocks' (on each block convolution's output) or 'stem' (on the stem's output
            only; 'constnet').
        shortcut: what the 1x1 shortcut of 'constnet' reads, 'post_relu' (the paper's code) or
            'pre_relu'; see `ConstNetBlock`.
        sigma_w: noise of 'constnet', from 0 to 1e6: with init 'averaging' the block convolutions
            start as N(0, 2 sigma_w / fan_out) (default 0), with 'random' all of them scale
            (default 1).
        negative_slope: of the leaky ReLU of 'leakynet', 0 or from 1e-6 to below 1.
        unique_features: of 'mlp' with init 'random', from 1 to `width` (default: all).
        convolution: how a convolution is computed: 'direct' (XLA's convolution) or 'patches' (one
            matrix product). Equal up to rounding; which is faster depends on size and device.
        dtype: 'bfloat16' is mixed precision: convolutions and activations in bfloat16, but
            parameters, statistics of BatchNorm, head and loss in float32. None: all in the dtype
            of the parameters. 'mlp' has no use for it.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    allowed: dict[str, tuple[str, tuple[str, ...]]] = {
        'name': (name, ('constnet', 'leakynet', 'mlp', 'wideresnet')),
        'dropout_at': (dropout_at, DROPOUT_PLACES),
        'shortcut': (shortcut, SHORTCUTS),
        'convolution': (convolution, CONVOLUTIONS),
    }
    for argument, (text, choices) in allowed.items():
        _require(text in choices, argument, text, f'must be one of {", ".join(choices)}')
    _require(dtype in DTYPES, 'dtype', dtype, 'must be None or bfloat16')
    _require(1 <= width <= 2**20, 'width', width, f'must be from 1 to {2**20}')
    _require(num_classes >= 1, 'num_classes', num_classes, 'must be at least 1')
    _require(0 <= dropout < 1, 'dropout', dropout, 'must be at least 0 and below 1')
    slope_fits = negative_slope == 0 or 1e-6 <= negative_slope < 1
    slopes = 'must be 0, or from 1e-6 to below 1'
    _require(slope_fits, 'negative_slope', negative_slope, slopes)
    # argument: value, default, whether the network has a use for it
    optional = {
        'dropout': (dropout, 0.0, name != 'mlp'),
        'dropout_at': (dropout_at, 'blocks', name == 'constnet'),
        'shortcut': (shortcut, 'post_relu', name == 'constnet'),
        'sigma_w': (sigma_w, None, name == 'constnet' and init in ('averaging', 'random')),
        'negative_slope': (negative_slope, 0.01, name == 'leakynet'),
        'unique_features': (unique_features, None, name == 'mlp' and init == 'random'),
        'dtype': (dtype, None, name != 'mlp'),
    }
    for argument, (value, default, used) in optional.items():
        useless = f'{name} with init {init!r} has no use for it; leave it at {default!r}'
        _require(used or value == default, argument, value, useless)

    if name == 'mlp':
        _require(init in MLP_INITS, 'init', init, f'must be one of {", ".join(MLP_INITS)}')
        in_range = unique_features is None or 1 <= unique_features <= width
        _require(in_range, 'unique_features', unique_features, f'must be from 1 to width={width}')
        return MLP(width, num_classes, init, unique_features)

    step = 6 if name == 'wideresnet' else 3
    examples = ', '.join(str(4 + step * n) for n in (1, 2, 3))
    is_depth = 4 + step <= depth <= 10_000 and (depth - 4) % step == 0
    _require(is_depth, 'depth', depth, f'must be {step}n + 4 with n >= 1: {examples}, ... 10000')
    if name == 'wideresnet':
        choices = WIDE_RESNET_INITS
        _require(init in choices, 'init', init, f'must be one of {", ".join(choices)}')
        return WideResNet(depth, width, num_classes, init, dropout, convolution, dtype)
    if name == 'leakynet':
        _check_letters(init, depth)
        return LeakyNet(
            depth, width, num_classes, init, negative_slope, dropout, convolution, dtype
        )
    choices = CONSTNET_INITS
    _require(init in choices, 'init', init, f'must be one of {", ".join(choices)}')
    if sigma_w is None:
        sigma_w = 1.0 if init == 'random' else 0.0
    _require(0 <= sigma_w <= 1e6, 'sigma_w', sigma_w, 'must be from 0 to 1e6')
    return ConstNet(
        depth, width, num_classes, init, sigma_w, dropout, dropout_at, shortcut, convolution, dtype
    )


def _require(condition: bool, argument: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f'{argument}={value!r}: {allowed}')


def _check_letters(init: str, depth: int) -> None:
    """An init string of LeakyNet, letter by letter."""
    letters = init.replace('_', '')
    for i, letter in enumerate(letters):
        layer = 'the stem' if i == 0 else f'block {i - 1}'
        try:
            initializers.lettered(letter, None, 0.0)
        except ValueError as error:
            raise ValueError(f'init={init!r}: {layer}, {error}') from None
    if len(letters) != depth - 3:
        raise ValueError(
            f'init={init!r}: has {len(letters)} letters; depth={depth} needs {depth - 3}, '
            f'one for the stem and one for each of {depth - 4} blocks'
        )
