"""One-shot magnitude pruning, layer by layer, for the lottery-ticket experiment.

Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019: train, remove the smallest weights of
each layer, set the rest back to what they were at the start (or at an early step), train again. The
control removes as many weights of each layer at random.
"""

from typing import Any

import jax
import jax.numpy as jnp

from zerojax import perturb

Tree = Any

# As in the paper's code: no shortcuts, no normalisation, no head.
LAYERS = r'(stem|hidden|.*/conv\d?)/kernel'
MASKS = ('magnitude', 'random')


def _mask(scores: jax.Array, fraction: float) -> jax.Array:
    """False at the int(fraction · n) smallest scores; among equal ones, at the first."""
    order = jnp.argsort(scores.ravel(), stable=True)
    removed = order[: int(fraction * scores.size)]
    return jnp.ones(scores.size, bool).at[removed].set(False).reshape(scores.shape)


def magnitude_mask(params: Tree, fraction: float, layers: str = LAYERS) -> Tree:
    """Bools like `params`: False at the `fraction` smallest |w| of each chosen array.

    `layers` is a regular expression on '/'-joined paths, matched from the start; arrays that it
    does not choose are kept whole. `fraction` is in [0, 1); of n weights int(fraction · n) go.
    `params` are any pytree, with paths as in `perturb.paths_of`.
    """

    def mask(x: jax.Array, chosen: bool) -> jax.Array:
        return _mask(jnp.abs(x), fraction) if chosen else jnp.ones(x.shape, bool)

    return jax.tree.map(mask, params, perturb.is_chosen(params, layers))


def random_mask(params: Tree, fraction: float, key: jax.Array, layers: str = LAYERS) -> Tree:
    """As `magnitude_mask`: as many weights of each chosen array go, but chance says which."""
    leaves, definition = jax.tree.flatten(params)
    paths = perturb.paths_of(params)
    noise = list(leaves)
    for number, i in enumerate(sorted(range(len(leaves)), key=paths.__getitem__)):
        noise[i] = jax.random.uniform(jax.random.fold_in(key, number), leaves[i].shape, jnp.float32)
    return magnitude_mask(jax.tree.unflatten(definition, noise), fraction, layers)
