"""Symmetry of features, measured to the bit.

A model declares once which axes of which parameter are indexed by the same features: a tree like
the parameters (nested dictionaries) whose leaves are tuples with a name, or None, for every axis
(the form known from permutation alignment, Ainsworth et al., "Git Re-Basin", 2022). The features
along a named axis are one orbit: they start identical. Everything here follows from that
declaration and works on any nested dictionary of arrays that has one.

Deviations are taken from the orbit's first feature and not from its mean, because the mean of
identical numbers is rounded and need not be that number.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = Any
Path = tuple[str, ...]

_UINTS = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def _leaves(tree: Tree, feature_axes: Tree) -> Iterator[tuple[Path, Any, list[int]]]:
    """Path, array and indices of the named axes, for every array of the tree."""
    arrays, declared = flatten_dict(tree), flatten_dict(feature_axes)
    if arrays.keys() != declared.keys():
        differing = sorted('/'.join(path) for path in arrays.keys() ^ declared.keys())
        raise ValueError(f'feature_axes and tree differ in {", ".join(differing)}')
    for path, x in arrays.items():
        if len(declared[path]) != x.ndim:
            raise ValueError(f'{"/".join(path)}: {declared[path]} does not fit shape {x.shape}')
        yield path, x, [axis for axis, name in enumerate(declared[path]) if name is not None]


def _first(x: jax.Array, axis: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, 0, 1, axis=axis)


def _equal_along(x: jax.Array, axes: list[int]) -> jax.Array:
    # Bits are compared, not values: XLA's comparison takes subnormal numbers for 0.
    bits = jax.lax.bitcast_convert_type(x, _UINTS[x.dtype.itemsize])
    negative_zero = jax.lax.bitcast_convert_type(jnp.asarray(-0.0, x.dtype), bits.dtype)
    bits = jnp.where(bits == negative_zero, jnp.zeros_like(bits), bits)
    return jnp.all(jnp.array([jnp.all(bits == _first(bits, axis)) for axis in axes]))


def is_symmetric(tree: Tree, feature_axes: Tree) -> jax.Array:
    """Whether all features of every orbit are equal: bool []. Exact; 0.0 equals -0.0.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    return jnp.all(
        jnp.array([_equal_along(x, axes) for _, x, axes in _leaves(tree, feature_axes) if axes])
    )


def asymmetry(tree: Tree, feature_axes: Tree) -> dict[str, jax.Array]:
    """Largest relative deviation of any feature from its orbit's first, for each layer.

    A feature is all that its axis name indexes: weights into it, its normalisation, weights out of
    it. So a deviation in any array is taken relative to the largest of all weights indexed by that
    name: max |w - w[first feature]| / max |w'| with w' running over all arrays with that name.
    (Relative to its own array alone, any noise on weights that start at 0 would count as 1.) A
    layer is the module that holds the arrays ('block1_0/conv'); its value is the largest over its
    arrays and their named axes: a float [] between 0 and 2 in the arrays' dtype, exactly 0 if and
    only if all features are equal.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    declared = flatten_dict(feature_axes)
    leaves = list(_leaves(tree, feature_axes))
    scales: dict[str, jax.Array] = {}
    for path, x, axes in leaves:
        for axis in axes:
            name = declared[path][axis]
            largest = jnp.max(jnp.abs(x))
            scales[name] = jnp.maximum(scales[name], largest) if name in scales else largest

    layers: dict[str, list[jax.Array]] = {}
    for path, x, axes in leaves:
        for axis in axes:
            # A difference so small that the arithmetic loses it is still a difference.
            tiny = jnp.finfo(x.dtype).tiny
            scale = jnp.maximum(scales[declared[path][axis]], tiny)
            relative = jnp.maximum(jnp.max(jnp.abs(x - _first(x, axis))) / scale, tiny)
            relative = jnp.where(_equal_along(x, [axis]), jnp.zeros_like(relative), relative)
            layers.setdefault('/'.join(path[:-1]), []).append(relative)
    return {layer: jnp.max(jnp.stack(values)) for layer, values in layers.items()}


def unique_features(tree: Tree, feature_axes: Tree) -> dict[str, int]:
    """Number of features of each layer that differ from one another in at least one weight.

    The features of a layer are indexed by the last named axis of its arrays: the output axis of a
    convolution, the input axis of a dense head whose outputs are classes. Exact; 0.0 equals -0.0.
    Runs on the host.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    layers: dict[str, list[np.ndarray]] = {}
    for path, x, axes in _leaves(tree, feature_axes):
        if axes:
            features = np.moveaxis(np.asarray(x), axes[-1], 0)
            rows = features.reshape(len(features), -1) + np.zeros((), x.dtype)  # -0.0 + 0.0 is 0.0
            layers.setdefault('/'.join(path[:-1]), []).append(rows)
    return {
        layer: len(np.unique(np.concatenate(rows, axis=1), axis=0))
        for layer, rows in layers.items()
    }


def project(tree: Tree, feature_axes: Tree) -> Tree:
    """The tree with every feature replaced by its orbit's first one.

    A symmetric tree comes back bit for bit, which a projection onto the mean would not grant.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    projected = {}
    for path, x, axes in _leaves(tree, feature_axes):
        for axis in axes:
            x = jnp.broadcast_to(_first(x, axis), x.shape)
        projected[path] = x
    return unflatten_dict(projected)
