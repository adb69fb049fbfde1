"""LeakyNet: a chain of convolutions without skip connections.

Blumenfeld, Gilboa, Soudry, "Beyond Signal Propagation", ICML 2020, as its published code computes
it (github.com/yanivbl6/BeyondSigProp). One 3x3 convolution a block: 3n + 4 layers as ConstNet.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer

from zerojax.models import initializers
from zerojax.models.arguments import require_depth
from zerojax.models.layers import ModuleDef, Scalar
from zerojax.models.network import Place, StagedNetwork, conv_axes, head, norm_axes


class LeakyNetBlock(nn.Module):
    """leaky_relu(conv3x3(x + b)) with one scalar b; behind it BatchNorm, in odd blocks only."""

    place: Place
    kernel_init: Initializer
    negative_slope: float
    conv: ModuleDef
    norm: ModuleDef
    dropout: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        shifted = x_BxHxWxC + Scalar(0.0, 'bias', name='shift')().astype(x_BxHxWxC.dtype)
        features, stride = self.place.features, self.place.stride
        out = self.conv(features, 3, stride, self.kernel_init, name='conv')(shifted)
        out = self.dropout(nn.leaky_relu(out, self.negative_slope))
        return self.norm(name='bn')(out) if is_normalized(self.place) else out


class LeakyNet(StagedNetwork):
    """Chain of convolutions without any skip connection; build it with `create`.

    The init string has a letter for the stem and for each block, see `initializers.lettered`. Even
    blocks (counted from 0 over all stages) start with the factor 1, odd ones with -1/ρ, so that a
    pair computes -x although it has two leaky ReLUs in it.
    """

    negative_slope: float = 0.01

    has_skips = False

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        inits = [
            initializers.lettered(letter, None if i == 0 else i - 1, self.negative_slope)
            for i, letter in enumerate(self.weight_init.replace('_', ''))
        ]
        conv, norm, dropout = self.layer_types(train)
        x = conv(self.stem_features, 3, 1, inits[0], name='stem')(images_BxHxWxC)
        for place, init in zip(self.blocks(), inits[1:], strict=True):
            types = conv, norm, dropout
            x = LeakyNetBlock(place, init, self.negative_slope, *types, name=place.name)(x)
        return head(
            nn.leaky_relu(x, self.negative_slope), self.num_classes, self.precision, self.dtype
        )

    def noiseless(self) -> 'LeakyNet | None':
        """As `StagedNetwork.noiseless`: identities keep apart what they read."""
        letters = self.weight_init.translate(str.maketrans('hak', '11i'))
        return self.clone(weight_init=letters) if 'i' in letters else None

    def block_axes(self, place: Place) -> dict[str, Any]:
        """As `StagedNetwork.block_axes`."""
        axes: dict[str, Any] = {'shift': {'bias': (None,)}}
        axes['conv'] = conv_axes(place.source, place.stream)
        if is_normalized(place):
            axes['bn'] = norm_axes(place.stream)
        return axes


def is_normalized(place: Place) -> bool:
    return place.number % 2 == 1


def create(
    *,
    depth: int,
    width: int,
    num_classes: int,
    init: str,
    dropout: float,
    negative_slope: float,
    convolution: str,
    precision: str,
    dtype: str | None,
) -> LeakyNet:
    """See `models.create`."""
    require_depth(LeakyNet.layers_per_block, depth)
    check_letters(init, depth)
    return LeakyNet(
        depth, width, num_classes, init, dropout, convolution, precision, dtype,
        negative_slope=negative_slope,
    )  # fmt: skip


def check_letters(init: str, depth: int) -> None:
    """An init string, letter by letter."""
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
