"""How far features are from being equal, and the nearest weights where they are.

Deviations are taken from the orbit's first feature and not from its mean, because the mean of
identical numbers is rounded and need not be that number.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zerojax.symmetry.bits import bit_patterns
from zerojax.symmetry.orbits import Orbits, Path, Tree, first_equal_rows, named_axes, signature


def _along(x: jax.Array, axis: int, first: np.ndarray | None) -> jax.Array:
    """Every slice along the axis replaced by that of its orbit's first feature; one orbit if None.

    May have length 1 along the axis, to be broadcast.
    """
    if first is None or not first.any():
        return jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    return jnp.take(x, first, axis=axis)


def _classes(
    path: Path, names: dict[int, str], orbits: Orbits | None
) -> list[tuple[list[str], Any]]:
    """(axis names concerned, function x -> x with all that must be equal replaced by its first)."""
    if orbits is not None and path in orbits.entries:
        index = orbits.entries[path]
        return [(list(names.values()), lambda x: x.reshape(-1)[index])]
    first = {} if orbits is None else orbits.first
    return [
        ([name], functools.partial(_along, axis=axis, first=first.get(name)))
        for axis, name in names.items()
    ]


def _is_first(x: jax.Array, to_first: Any) -> jax.Array:
    bits = bit_patterns(jnp.asarray(x))
    return jnp.all(bits == to_first(bits))


def is_symmetric(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> jax.Array:
    """Whether all features of every orbit are equal: bool []. Exact; 0.0 equals -0.0.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    equal = [
        _is_first(x, to_first)
        for path, x, names in named_axes(tree, feature_axes)
        for _, to_first in _classes(path, names, orbits)
    ]
    return jnp.all(jnp.array(equal))


def asymmetry(
    tree: Tree, feature_axes: Tree, orbits: Orbits | None = None, *, relative_to: Tree = None
) -> dict[str, jax.Array]:
    """Largest relative deviation of any feature from its orbit's first, for each layer.

    A feature is all that its axis name indexes: weights into it, its normalisation, weights out of
    it. So a deviation in any array is taken relative to the largest of all weights indexed by that
    name: max |w - w[first feature]| / max |w'| with w' running over all arrays with that name.
    (Relative to its own array alone, any noise on weights that start at 0 would count as 1.) A
    layer is the module that holds the arrays ('block1_0/conv'); its value is the largest over its
    arrays and their named axes: a float [] between 0 and 2 in the arrays' dtype, exactly 0 if and
    only if all features are equal.

    With `relative_to` the w' are those of another tree like it: if `tree` is a direction in which
    symmetric weights `relative_to` are moved, this is the asymmetry gained per unit moved.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    leaves = list(named_axes(tree, feature_axes))
    scales: dict[str, jax.Array] = {}
    for _, x, names in leaves if relative_to is None else named_axes(relative_to, feature_axes):
        for name in names.values():
            largest = jnp.max(jnp.abs(x))
            scales[name] = jnp.maximum(scales[name], largest) if name in scales else largest

    layers: dict[str, list[jax.Array]] = {}
    for path, x, names in leaves:
        for concerned, to_first in _classes(path, names, orbits):
            # A difference so small that the arithmetic loses it is still a difference.
            tiny = jnp.finfo(x.dtype).tiny
            scale = functools.reduce(jnp.maximum, (scales[name] for name in concerned))
            largest = jnp.max(jnp.abs(x - to_first(x)))
            relative = jnp.maximum(largest / jnp.maximum(scale, tiny), tiny)
            relative = jnp.where(_is_first(x, to_first), jnp.zeros_like(relative), relative)
            layers.setdefault('/'.join(path[:-1]), []).append(relative)
    return {layer: jnp.max(jnp.stack(values)) for layer, values in layers.items()}


def distance(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> dict[str, jax.Array]:
    """L2 distance of each layer's weights from the symmetric subspace, in units of the weights.

    That is from the nearest weights that are symmetric, where each weight is the mean of all that
    must equal it: a float [] a layer, exactly 0 if and only if all of them are equal, or so close
    that the square of the distance is lost. The distance of the whole tree is the root of the sum
    of squares.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    layers: dict[str, list[jax.Array]] = {}
    deviations = flatten_dict(transverse(tree, feature_axes, orbits))
    for path, _, names in named_axes(tree, feature_axes):
        if names:
            layers.setdefault('/'.join(path[:-1]), []).append(jnp.sum(deviations[path] ** 2))
    return {layer: jnp.sqrt(sum(values)) for layer, values in layers.items()}


def transverse(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> Tree:
    """The part of the tree that is orthogonal to the symmetric subspace.

    That is each weight less the mean of all that must equal it; exactly 0 where they are equal.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    parts = {}
    for path, x, names in named_axes(tree, feature_axes):
        deviation = x - _project(x, path, names, orbits)  # exactly 0 where features are equal
        parts[path] = deviation - _class_mean(deviation, path, names, orbits)
    return unflatten_dict(parts)


def _class_mean(
    x: jax.Array, path: Path, names: dict[int, str], orbits: Orbits | None
) -> jax.Array:
    """Every weight replaced by the mean of all that must equal it."""
    if orbits is not None and path in orbits.entries:
        index = orbits.entries[path].ravel()
        sums = jnp.zeros(x.size, x.dtype).at[index].add(x.ravel())
        sizes = np.bincount(index, minlength=x.size)
        return (sums / np.maximum(sizes, 1).astype(x.dtype))[index].reshape(x.shape)
    for axis, name in names.items():
        first = None if orbits is None else orbits.first.get(name)
        if first is None:
            first = np.zeros(x.shape[axis], int)
        members = (first[:, None] == first[None, :]) / np.bincount(first)[first][:, None]
        mean = jnp.tensordot(jnp.asarray(members, x.dtype), x, axes=(1, axis), precision='highest')
        x = jnp.moveaxis(mean, 0, axis)
    return x


def unique_features(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> dict[str, int]:
    """Number of features of each layer that differ from one another in at least one weight.

    The features of a layer are indexed by the last named axis of its arrays: the output axis of a
    convolution, the input axis of a dense head whose outputs are classes. Exact; 0.0 equals -0.0.
    Of arrays in `orbits.entries` (an identity) the order of the weights within an orbit does not
    count. Runs on the host.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    layers: dict[str, list[np.ndarray]] = {}
    for path, x, names in named_axes(tree, feature_axes):
        if names:
            x, axis = np.asarray(x), max(names)
            if orbits is not None and path in orbits.entries:
                rows = signature(x, axis, names, orbits.first)
            else:
                rows = np.moveaxis(bit_patterns(x), axis, 0).reshape(x.shape[axis], -1)
            layers.setdefault('/'.join(path[:-1]), []).append(rows)
    return {layer: len(set(first_equal_rows(rows))) for layer, rows in layers.items()}


def project(tree: Tree, feature_axes: Tree, orbits: Orbits | None = None) -> Tree:
    """The tree with every feature replaced by its orbit's first one.

    A symmetric tree comes back bit for bit, which a projection onto the mean would not grant.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    return unflatten_dict(
        {
            path: _project(x, path, names, orbits)
            for path, x, names in named_axes(tree, feature_axes)
        }
    )


def _project(x: jax.Array, path: Path, names: dict[int, str], orbits: Orbits | None) -> jax.Array:
    shape = x.shape
    for _, to_first in _classes(path, names, orbits):
        x = jnp.broadcast_to(to_first(x), shape)
    return x
