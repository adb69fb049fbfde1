"""The toy: one hidden layer, whose number of unique features is chosen."""

from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax
from jax.nn.initializers import variance_scaling, zeros

from zerojax.models import initializers
from zerojax.models.arguments import require, require_default, require_one_of
from zerojax.models.layers import Linear

INITS = ('averaging', 'random')


class MLP(nn.Module):
    """One hidden ReLU layer with a chosen number of unique features at the start.

    `weight_init` 'random' draws `unique_features` hidden features from He's N(0, 2/fan_in) (not
    truncated) and repeats them; 'averaging' starts all of them as the mean of the pixels. Hidden
    biases and the head start at 0, so copies have the same gradient and stay copies until something
    breaks the symmetry. Called as `StagedNetwork`; it has no statistics, and `train` changes
    nothing.
    """

    width: int
    num_classes: int
    weight_init: str = 'random'
    unique_features: int | None = None
    precision: str = 'highest'

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        del train
        if self.weight_init == 'averaging':
            kernel_init = initializers.averaging()
        else:
            he = variance_scaling(2.0, 'fan_in', 'normal')
            kernel_init = initializers.repeated(he, self.unique_features or self.width)
        pixels_BxC = images_BxHxWxC.reshape(len(images_BxHxWxC), -1)
        hidden = Linear(self.width, kernel_init, self.precision, name='hidden')(pixels_BxC)
        head = nn.Dense(self.num_classes, kernel_init=zeros, precision=self.precision, name='head')
        return head(nn.relu(hidden))

    def with_features(self, counts: Mapping[str, int]) -> Self:
        """As `StagedNetwork.with_features`; unless given weights, all its features are unique."""
        return self.clone(width=counts['hidden'], unique_features=None)

    def layers(self) -> list[str]:
        """As `StagedNetwork.layers`."""
        return ['hidden']

    def noiseless(self) -> 'MLP | None':
        """As `StagedNetwork.noiseless`."""
        return self if self.unique_features is not None else None

    def feature_axes(self) -> dict[str, Any]:
        """As `StagedNetwork.feature_axes`."""
        params = {
            'hidden': {'kernel': (None, 'hidden'), 'bias': ('hidden',)},
            'head': {'kernel': ('hidden', None), 'bias': (None,)},
        }
        return {'params': params, 'batch_stats': {}}


def create(
    *,
    depth: int,
    width: int,
    num_classes: int,
    init: str,
    unique_features: int | None,
    convolution: str,
    precision: str,
) -> MLP:
    """See `models.create`."""
    del depth, convolution  # whatever they are, so that any config may have the toy for its model
    if init != 'random':
        require_default(None, 'unique_features', unique_features, 'mlp', init)
    require_one_of(INITS, 'init', init)
    in_range = unique_features is None or 1 <= unique_features <= width
    require(in_range, 'unique_features', unique_features, f'must be from 1 to width={width}')
    return MLP(width, num_classes, init, unique_features, precision)
