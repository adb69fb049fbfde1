"""ConstNet: a residual network that starts at zeros and constants.

Blumenfeld, Gilboa, Soudry, "Beyond Signal Propagation", ICML 2020, as its published code computes
it (github.com/yanivbl6/BeyondSigProp). One 3x3 convolution a block: 3n + 4 layers with the
shortcuts and the head.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer, delta_orthogonal, he_normal, zeros

from zerojax.models import initializers
from zerojax.models.arguments import require, require_default, require_depth, require_one_of
from zerojax.models.layers import ModuleDef
from zerojax.models.network import Place, StagedNetwork, conv_axes, head, norm_axes

INITS = ('averaging', 'random', 'he', 'delta_orthogonal', 'hadamard')
SHORTCUTS = ('post_relu', 'pre_relu')
DROPOUT_PLACES = ('blocks', 'stem')


def kernels(init: str, sigma_w: float) -> tuple[Initializer, Initializer, Initializer]:
    """Initializers of the stem, block convolutions and shortcuts. The head starts at 0.

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


class ConstNetBlock(nn.Module):
    """y = relu(bn(x)); out = conv3x3(y); x + out, or conv1x1(y) + out where features are new.

    The 1x1 shortcut reads y after the ReLU, as the paper's code does (`shortcut='post_relu'`), or
    bn(x) before it (`'pre_relu'`).
    """

    place: Place
    kernel_init: Initializer
    shortcut_init: Initializer
    shortcut: str
    conv: ModuleDef
    norm: ModuleDef
    dropout: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        normalized = self.norm(name='bn')(x_BxHxWxC)
        y = nn.relu(normalized)
        features, stride = self.place.features, self.place.stride
        out = self.dropout(self.conv(features, 3, stride, self.kernel_init, name='conv')(y))
        if not self.place.makes_features:
            return x_BxHxWxC + out
        source = y if self.shortcut == 'post_relu' else normalized
        return self.conv(features, 1, stride, self.shortcut_init, name='shortcut')(source) + out


class ConstNet(StagedNetwork):
    """Pre-activation residual network of one convolution a block; build it with `create`."""

    sigma_w: float = 0.0
    dropout_at: str = 'blocks'
    shortcut: str = 'post_relu'

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        stem_init, kernel_init, shortcut_init = kernels(self.weight_init, self.sigma_w)
        conv, norm, dropout = self.layer_types(train)
        x = conv(self.stem_features, 3, 1, stem_init, name='stem')(images_BxHxWxC)
        if self.dropout_at == 'stem':
            x = dropout(x)
            dropout = functools.partial(dropout, rate=0.0)  # of the blocks
        for place in self.blocks():
            inits = kernel_init, shortcut_init, self.shortcut
            x = ConstNetBlock(place, *inits, conv, norm, dropout, name=place.name)(x)
        return head(nn.relu(x), self.num_classes, self.precision, self.dtype)

    def noiseless(self) -> 'ConstNet | None':
        """As `StagedNetwork.noiseless`: of ZerO's initial weights, which has no noise."""
        return self if self.weight_init == 'hadamard' else None

    def block_axes(self, place: Place) -> dict[str, Any]:
        """As `StagedNetwork.block_axes`."""
        axes = {'bn': norm_axes(place.source), 'conv': conv_axes(place.source, place.stream)}
        if place.makes_features:
            axes['shortcut'] = conv_axes(place.source, place.stream)
        return axes


def create(
    *,
    depth: int,
    width: int,
    num_classes: int,
    init: str,
    dropout: float,
    dropout_at: str,
    shortcut: str,
    sigma_w: float | None,
    convolution: str,
    precision: str,
    dtype: str | None,
) -> ConstNet:
    """See `models.create`."""
    if init not in ('averaging', 'random'):
        require_default(None, 'sigma_w', sigma_w, 'constnet', init)
    require_depth(ConstNet.layers_per_block, depth)
    require_one_of(INITS, 'init', init)
    if sigma_w is None:
        sigma_w = 1.0 if init == 'random' else 0.0
    require(0 <= sigma_w <= 1e6, 'sigma_w', sigma_w, 'must be from 0 to 1e6')
    return ConstNet(
        depth, width, num_classes, init, dropout, convolution, precision, dtype,
        sigma_w=sigma_w, dropout_at=dropout_at, shortcut=shortcut,
    )  # fmt: skip
