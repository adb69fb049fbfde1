"""What an optimizer must be for a prediction to hold, tried out on random gradients.

Rates may be 0 at first, gradients be collected over several updates, and clipping act on large ones
only: so gradients are of several sizes, and updates are made until each size has moved every array,
but no more than `MOST` for the sake of arrays that nothing moves.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zerojax.step.determinism import jit_in_mode
from zerojax.symmetry.trial import first_line

Tree = Any

SIZES = (1e-3, 1.0, 1e3)  # of successive gradients
LEAST, MOST = 2 * len(SIZES), 20 * len(SIZES)  # updates
ROUNDING = 1e-5  # of an array's largest update; Optax's elementwise ones differ by 1e-7 or nothing


def follows_gradients(tx: optax.GradientTransformation, params: Tree) -> bool:
    """Whether every array that a gradient moves is moved by a small change of it a little.

    Not so where signs of gradients are taken: their derivative is 0.

    Args:
        params: of which shapes and dtypes count.
    """

    def update(state: Tree, params: Tree, grads: Tree, change: Tree) -> tuple[Any, ...]:
        def updates_for(grads: Tree) -> Tree:
            return tx.update(grads, state, params)[0]

        updates, new_state = tx.update(grads, state, params)
        opposite = updates_for(jax.tree.map(jnp.negative, grads))
        _, derivatives = jax.jvp(updates_for, (grads,), (change,))
        moved = jax.tree.map(lambda a, b: jnp.any(a != b), updates, opposite)
        followed = jax.tree.map(lambda x: jnp.any(x != 0), derivatives)
        return new_state, optax.apply_updates(params, updates), (moved, followed)

    update = jit_in_mode(update, 'deterministic')
    rng = np.random.default_rng(0)
    params = _random(rng, params, 1.0)
    state = tx.init(params)
    moved: list[list[Any]] = []
    followed: list[list[Any]] = []
    while len(moved) < MOST and not _all_moved(moved):
        size = SIZES[len(moved) % len(SIZES)]
        grads, change = _random(rng, params, size), _random(rng, params, size)
        state, params, of_both = update(state, params, grads, change)
        for each, noted in zip(jax.device_get(of_both), (moved, followed), strict=True):
            noted.append(jax.tree.leaves(each))
    return not (np.any(moved, axis=0) & ~np.any(followed, axis=0)).any()


def check_each_alone(
    tx: optax.GradientTransformation, params: Tree, expand: Callable[[Tree], Tree]
) -> None:
    """Checks that each weight is updated by its own gradient and value, whatever the others are.

    Then a tree in which weights stand several times, with equal gradients, has equal updates.

    Args:
        params: of which shapes and dtypes count.
        expand: gives such a tree of one like params; both in NumPy arrays.

    Raises:
        ValueError: it is not so, or cannot be seen.
    """
    try:
        alike, moved = _updates_of_both(tx, params, expand)
    except Exception as error:
        raise ValueError(
            f'tx: fails for a smaller network ({first_line(error)}); what it holds for each weight '
            'must come from the params that it is given; leave out `make`, for the linear '
            'prediction alone'
        ) from error
    if not alike:
        raise ValueError(
            'tx: what it does to a weight is random or depends on others, as in clipping by a '
            'norm, LARS, LAMB, Adafactor and Muon, so no smaller network is trained alike; leave '
            'out `make`, for the linear prediction alone'
        )
    if not moved:
        raise ValueError(
            f'tx: does nothing in {MOST} updates, so it cannot be seen whether it treats each '
            'weight by itself; leave out `make`, for the linear prediction alone'
        )


def _updates_of_both(
    tx: optax.GradientTransformation, params: Tree, expand: Callable[[Tree], Tree]
) -> tuple[bool, bool]:
    """Whether the updates of the expanded tree are the expanded updates; whether any are not 0."""

    def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree, Tree]:
        updates, state = tx.update(grads, state, params)
        return updates, state, optax.apply_updates(params, updates)

    update = jit_in_mode(update, 'deterministic')
    rng = np.random.default_rng(0)
    few = _random(rng, params, 1.0)
    many = expand(few)
    state_of_few, state_of_many = tx.init(few), tx.init(many)
    moved: list[list[Any]] = []
    while len(moved) < MOST and not _all_moved(moved):
        grads = _random(rng, params, SIZES[len(moved) % len(SIZES)])
        found, state_of_few, few = update(grads, state_of_few, few)
        expected, state_of_many, many = update(expand(grads), state_of_many, many)
        found, expected = jax.device_get((found, expected))
        if not all(jax.tree.leaves(jax.tree.map(_same, expand(found), expected))):
            return False, True
        moved.append([x.any() for x in jax.tree.leaves(found)])
    return True, bool(np.any(moved))


def _all_moved(moved: list[list[Any]]) -> bool:
    """Whether gradients of each size moved every array: bool [updates, arrays]."""
    of_size = [np.any(moved[i :: len(SIZES)], axis=0) for i in range(len(SIZES))]
    return len(moved) >= LEAST and bool(np.all(of_size))


def _random(rng: np.random.Generator, like: Tree, size: float) -> Tree:
    """Normal numbers of this size, in NumPy arrays; in float32 at least, for their squares."""

    def draw(x: Any) -> np.ndarray:
        dtype = np.float32 if jnp.finfo(x.dtype).bits < 32 else x.dtype
        return (size * rng.normal(size=x.shape)).astype(dtype)

    return jax.tree.map(draw, like)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are, but for rounding."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return bool(np.abs(a - b).max(initial=0.0) <= ROUNDING * np.abs(b).max(initial=0.0))
