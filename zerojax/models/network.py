"""What the convolutional networks share: a stem, three stages of blocks, a head that starts at 0.

Shapes are written as suffixes: B batch, H and W space, C channels, N classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.nn.initializers import zeros

from zerojax.models import convolutions
from zerojax.models.batch_norm import BatchNorm
from zerojax.models.layers import Conv, ModuleDef, dropout

STEM_FEATURES = 16


class Place(NamedTuple):
    """Where in its network a block stands."""

    number: int  # from 0 over all stages
    name: str
    source: str  # axis name of the features that it reads
    stream: str  # and of those that it writes; the same where it adds to them
    features: int  # number of those that it writes
    stride: int

    @property
    def makes_features(self) -> bool:
        """Whether it writes others than it reads (with a skip connection, through a shortcut)."""
        return self.stream != self.source


class StagedNetwork(nn.Module):
    """Stages of 16k, 32k and 64k features (k is the width) with strides 1, 2, 2, n blocks each.

    Called on images [B, H, W, C] of any float dtype, it returns logits [B, num_classes]; all
    arithmetic is in the dtype of the parameters, but for `dtype`, see `create`. With `train=True`
    it normalises by the batch, needs `mutable=['batch_stats']`, and with `dropout` > 0 also
    `rngs={'dropout': key}`. The strides divide the size of the images, which may be any, by 4; the
    mean over what is left of space goes to the head.

    `feature_counts` gives the number of features of an axis name where it is not the usual one, as
    in the small network of `zerojax.quotient`.
    """

    depth: int
    width: int
    num_classes: int
    weight_init: str
    dropout: float = 0.0
    convolution: str = 'auto'
    precision: str = 'highest'
    dtype: str | None = None
    feature_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    layers_per_block: ClassVar[int] = 1
    has_skips: ClassVar[bool] = True  # blocks add to a stream of features for as long as they can

    def __post_init__(self) -> None:
        self.feature_counts = FrozenDict(self.feature_counts)  # modules must be hashable
        super().__post_init__()

    def with_features(self, counts: Mapping[str, int]) -> Self:
        """The same network with these numbers of features, {axis name: number}."""
        return self.clone(feature_counts=counts)

    @property
    def stem_features(self) -> int:
        """Number of features of the stem."""
        return self.feature_counts.get('stem', STEM_FEATURES)

    def blocks(self) -> Iterator[Place]:
        """The places of all blocks, in order."""
        per_stage = (self.depth - 4) // (3 * self.layers_per_block)
        stream, width = 'stem', STEM_FEATURES
        for stage in range(3):
            features = 16 * self.width * 2**stage
            for layer in range(per_stage):
                name, source = f'block{stage + 1}_{layer}', stream
                if features != width or not self.has_skips:
                    stream, width = name, features
                yield Place(
                    number=stage * per_stage + layer,
                    name=name,
                    source=source,
                    stream=stream,
                    features=self.feature_counts.get(stream, features),
                    stride=2 if stage > 0 and layer == 0 else 1,
                )

    def layers(self) -> list[str]:
        """Names of the submodules whose outputs follow one another, from the image on."""
        return ['stem', *(place.name for place in self.blocks())]

    def noiseless(self) -> 'StagedNetwork | None':
        """The network without noise in its initial weights, from which `symmetry.find_orbits` tells
        which features are meant to be equal; None if all of a layer are."""
        return None

    def feature_axes(self) -> dict[str, Any]:
        """Which axes of which array are indexed by the same features.

        A tree like the variables `{'params': ..., 'batch_stats': ...}`; each leaf is a tuple with a
        name for every axis, or None for an axis that no features index (space, image channels,
        classes). Axes of one name are indexed by the same features, see `Place`.
        """
        params: dict[str, Any] = {'stem': {'kernel': (None, None, None, 'stem')}}
        blocks = list(self.blocks())
        params |= {place.name: self.block_axes(place) for place in blocks}
        params |= self.last_axes(blocks[-1].stream)
        params['head'] = {'kernel': (blocks[-1].stream, None), 'bias': (None,)}
        flat = flatten_dict(params)
        statistics = {
            (*module, statistic): axes
            for (*module, leaf), axes in flat.items()
            if leaf == 'scale' and (*module, 'bias') in flat  # a BatchNorm
            for statistic in ('mean', 'var')
        }
        return {'params': params, 'batch_stats': unflatten_dict(statistics)}

    def block_axes(self, place: Place) -> dict[str, Any]:
        """The part of `feature_axes` for the parameters of one block."""
        raise NotImplementedError

    def last_axes(self, stream: str) -> dict[str, Any]:
        """The part of `feature_axes` for parameters between the blocks and the head."""
        return {}

    def layer_types(self, train: bool) -> tuple[ModuleDef, ModuleDef, Callable[..., jax.Array]]:
        """Convolution, BatchNorm and dropout, as they are handed to the blocks.

        The paper's BatchNorm: running averages keep 0.9 a step. Statistics are computed in float32
        or better; what it returns is rounded to `dtype`.
        """
        convolution = convolutions.resolve(self.convolution)
        conv = functools.partial(
            Conv,
            convolve=convolutions.CONVOLUTIONS[convolution],
            precision=self.precision,
            dtype=self.dtype,
        )
        norm = functools.partial(
            BatchNorm if convolution == 'mixed' else nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        return conv, norm, functools.partial(dropout, rate=self.dropout, train=train)


def conv_axes(source: str, stream: str) -> dict[str, Any]:
    """`feature_axes` of a convolution."""
    return {'kernel': (None, None, source, stream)}


def norm_axes(stream: str) -> dict[str, Any]:
    """`feature_axes` of a BatchNorm."""
    return {'scale': (stream,), 'bias': (stream,)}


def head(x_BxHxWxC: jax.Array, num_classes: int, precision: str, dtype: str | None) -> jax.Array:
    """Logits [B, N] of the mean over space; in float32 where the layers before it compute in a
    `dtype` of their own."""
    x_BxC = jnp.mean(x_BxHxWxC.astype(jnp.float32) if dtype else x_BxHxWxC, axis=(1, 2))
    return nn.Dense(num_classes, kernel_init=zeros, precision=precision, name='head')(x_BxC)
