"""Injected asymmetry: what is added to the weights, where, when and how much."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = Any

KINDS = ('none', 'gaussian')


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A perturbation of the weights, applied before the gradient of a step is taken.

    Attributes:
        kind: 'none', or 'gaussian': scale · N(0, 1) is added to every chosen weight.
        scale: standard deviation of the noise, in units of the weights.
        at_step: number of updates done when it is applied (first); 0 perturbs the initial weights.
        every: 0 applies it once; n > 0 again, with new noise, every n steps after `at_step`.
        layers: regular expression; parameters whose path ('block1_0/conv/kernel') it matches from
            the start, as `re.match` does, are perturbed. The default chooses all.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """

    kind: str = 'none'
    scale: float = 0.0
    at_step: int = 0
    every: int = 0
    layers: str = '.*'

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f'kind={self.kind!r}: must be one of {", ".join(KINDS)}')
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f'scale={self.scale}: must be finite and at least 0')
        if self.at_step < 0:
            raise ValueError(f'at_step={self.at_step}: must be at least 0')
        if self.every < 0:
            raise ValueError(f'every={self.every}: must be at least 0 (0: only once)')
        try:
            re.compile(self.layers)
        except re.error as error:
            raise ValueError(f'layers={self.layers!r}: not a regular expression: {error}') from None


NONE = Perturbation()


def chosen(params: Tree, layers: str) -> list[str]:
    """Paths of the parameters that the regular expression `layers` chooses, sorted."""
    return sorted(path for path in flatten_dict(params, sep='/') if re.match(layers, path))


def gaussian(params: Tree, key: jax.Array, scale: float, layers: str = '.*') -> Tree:
    """Adds scale · N(0, 1) to every weight of the chosen parameters, in the weights' dtype.

    The noise of a weight does not depend on which parameters are chosen.
    """
    flat = flatten_dict(params, sep='/')
    paths = sorted(flat)
    # One draw for all parameters, because XLA compiles one generator much faster than dozens.
    dtype = jnp.result_type(*flat.values())
    noise = jax.random.normal(key, (sum(flat[path].size for path in paths),), dtype)
    start = 0
    perturbed = dict(flat)
    for path in paths:
        x = flat[path]
        if re.match(layers, path):
            its_noise = noise[start : start + x.size].reshape(x.shape).astype(x.dtype)
            perturbed[path] = x + jnp.asarray(scale, x.dtype) * its_noise
        start += x.size
    return unflatten_dict(perturbed, sep='/')


def apply(perturbation: Perturbation, params: Tree, key: jax.Array, step: jax.Array) -> Tree:
    """The weights that update number `step` (int32 [], from 0) computes its gradient with.

    Where the perturbation is not due, the weights come back bit for bit. The noise is drawn from
    `fold_in(key, step)`.
    """
    if perturbation.kind == 'none':
        return params
    since = step - perturbation.at_step
    due = since == 0
    if perturbation.every > 0:
        due = (since >= 0) & (since % perturbation.every == 0)
    return jax.lax.cond(
        due,
        lambda params: gaussian(
            params, jax.random.fold_in(key, step), perturbation.scale, perturbation.layers
        ),
        lambda params: params,
        params,
    )
