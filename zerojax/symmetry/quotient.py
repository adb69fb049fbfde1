"""The small networks that a large one is equal to, or is followed by.

As long as the features of an orbit are equal, one of them stands for all. Where a layer sums over
its input features, that one is counted as often as its orbit has features. The gradient of a weight
of the small network is then the sum of the gradients of all weights that it stands for; divided by
their number it is the gradient of each. So the small network, trained with these gradients,
computes what the large one computes, at a fraction of its cost:

    orbits = symmetry.find_orbits(params, feature_axes['params'])
    small = quotient.Quotient(make_model(orbits.counts()), feature_axes, orbits)
    small_params = quotient.reduce(params, feature_axes['params'], orbits)
    tx = optax.chain(quotient.average_gradients(feature_axes['params'], orbits), tx)

`make_model` returns the same architecture with these numbers of features, {axis name: number}: of
zerojax's networks `model.with_features`.

With `find_orbits` this is the quotient of a symmetric network, of one feature a stream. With
`shares(counts, m)` in its place it is a *reduced network*: each stream's features in m sets that
stay equal within, but differ from one another. It is equal to the large network that starts with m
unique features a stream (`perturb.unequal_init`), and follows one whose features all differ a
little: started from `average`, each of its features from the mean of those that it stands for.

Three things must hold of other networks and optimizers. Arrays sum over all named axes but their
last axis, and never over that, as the kernels [..., in, out] of dense layers and convolutions do; a
readout of one output is [in, 1] and not [in]. Nothing else sums over features (the statistics of a
LayerNorm do, and are the same only if all orbits have one size). The optimizer treats each weight
by itself: SGD, Adam and weight decay do, clipping by the global norm does not.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from zerojax.symmetry.bits import bit_patterns
from zerojax.symmetry.orbits import Orbits, Path, Tree, named_axes

__all__ = ['Quotient', 'average', 'average_gradients', 'counted', 'expand', 'reduce', 'shares']


def shares(counts: Mapping[str, int], m: int) -> Orbits:
    """Orbits of m features a stream: feature d is in that of all d + n · m.

    Args:
        counts: number of features of each axis name, as of `orbits.feature_counts`.
        m: number of orbits of each; a stream of fewer features has one for each of them.

    Raises:
        ValueError: m is below 1.
    """
    if m < 1:
        raise ValueError(f'm={m}: must be at least 1')
    return Orbits({name: np.arange(count) % m for name, count in counts.items()}, entries={})


def average(tree: Tree, feature_axes: Tree, orbits: Orbits) -> Tree:
    """The mean of the features of each orbit, in NumPy arrays: [..., orbits, ...] along named axes.

    Of a symmetric tree it is what `reduce` returns, up to rounding. Summed in float64 and rounded
    once to the dtype.

    Raises:
        ValueError: tree, declaration and orbits do not fit each other.
    """
    averaged = {}
    for path, x, names in named_axes(tree, feature_axes):
        mean = np.asarray(x, np.float64)
        for axis, name in names.items():
            _check_length(path, name, x.shape[axis], len(orbits.first.get(name, ())))
            members = [
                np.flatnonzero(orbits.first[name] == i) for i in np.unique(orbits.first[name])
            ]
            mean = np.stack([mean.take(each, axis).mean(axis) for each in members], axis)
        averaged[path] = mean.astype(x.dtype)
    return unflatten_dict(averaged)


def reduce(tree: Tree, feature_axes: Tree, orbits: Orbits) -> Tree:
    """One feature of each orbit: arrays with as many entries along a named axis as orbits.

    Raises:
        ValueError: tree, declaration and orbits do not fit each other; the tree is not symmetric;
            or weights differ between two orbits (`orbits.entries`), so that the features of one
            do not all see the same.
    """
    if orbits.entries:
        arrays = ', '.join('/'.join(path) for path in orbits.entries)
        raise ValueError(f'no quotient: weights between the same two orbits differ in {arrays}')
    kept = {name: np.unique(first) for name, first in orbits.first.items()}
    lengths = {name: len(first) for name, first in orbits.first.items()}
    reduced = _take_along_named(tree, feature_axes, kept, lengths)
    same = expand(reduced, feature_axes, orbits)
    equal = [
        np.array_equal(bit_patterns(np.asarray(x)), bit_patterns(np.asarray(y)))
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(same), strict=True)
    ]
    if not all(equal):
        raise ValueError('no quotient: features of one orbit differ')
    return reduced


def expand(reduced: Tree, feature_axes: Tree, orbits: Orbits) -> Tree:
    """The symmetric tree that `reduce` makes `reduced` of, bit for bit.

    Raises:
        ValueError: tree, declaration and orbits do not fit each other.
    """
    members = {
        name: np.unique(first, return_inverse=True)[1] for name, first in orbits.first.items()
    }
    return _take_along_named(reduced, feature_axes, members, orbits.counts())


def _take_along_named(
    tree: Tree, feature_axes: Tree, indices: dict[str, np.ndarray], lengths: dict[str, int]
) -> Tree:
    """The entries at these indices along the named axes, which must have these lengths."""
    taken = {}
    for path, x, names in named_axes(tree, feature_axes):
        for axis, name in names.items():
            _check_length(path, name, x.shape[axis], lengths.get(name))
            x = x.take(indices[name], axis)
        taken[path] = x
    return unflatten_dict(taken)


def _check_length(path: Path, name: str, length: int, fitting: int | None) -> None:
    if length != fitting:
        raise ValueError(
            f'{"/".join(path)}: axis {name!r} has length {length}; {fitting} would fit the orbits'
        )


def _sizes(x: jax.Array, axis: int, name: str, orbits: Orbits) -> np.ndarray:
    """Number of features of each orbit, in the shape and dtype to multiply `x` along the axis."""
    _, sizes = np.unique(orbits.first[name], return_counts=True)
    others = tuple(each for each in range(x.ndim) if each != axis)
    return np.expand_dims(sizes.astype(x.dtype), others)


def counted(reduced: Tree, feature_axes: Tree, orbits: Orbits) -> Tree:
    """The weights with which an ordinary network of that size computes what the large one does.

    Each is multiplied by the number of features it stands for, along all named axes but the last.

    Raises:
        ValueError: tree, declaration and orbits do not fit each other.
    """
    weights = {}
    for path, x, names in named_axes(reduced, feature_axes):
        for axis, name in names.items():
            if axis != x.ndim - 1:
                x = x * _sizes(x, axis, name, orbits)
        weights[path] = x
    return unflatten_dict(weights)


def average_gradients(feature_axes: Tree, orbits: Orbits) -> optax.GradientTransformation:
    """Divides the gradient of each weight by the number of weights it stands for.

    To be the first of a chain, in front of the optimizer of the large network.
    """

    def average(grads: Tree, params: Tree) -> Tree:
        del params
        averaged = {}
        for path, x, names in named_axes(grads, feature_axes):
            for axis, name in names.items():
                x = x / _sizes(x, axis, name, orbits)
            averaged[path] = x
        return unflatten_dict(averaged)

    return optax.stateless(average)


class Quotient:
    """The small network, to be applied to reduced variables; fits `step.make_train_step`.

    Args:
        small_model: a Linen model with as many features as there are orbits, without dropout, which
            would part the features of an orbit.
        feature_axes: of the large network's variables: {'params': ..., 'batch_stats': ...}.
        orbits: of the large network.
    """

    def __init__(self, small_model: Any, feature_axes: Tree, orbits: Orbits) -> None:
        if getattr(small_model, 'dropout', 0):
            raise ValueError(f'dropout={small_model.dropout}: breaks the symmetry; must be 0')
        self._model = small_model
        self._axes = feature_axes
        self._orbits = orbits

    def apply(self, variables: Tree, *args: Any, **kwargs: Any) -> Any:
        """As `small_model.apply`, but with `counted` weights."""
        params = counted(variables['params'], self._axes['params'], self._orbits)
        return self._model.apply({**variables, 'params': params}, *args, **kwargs)

    def feature_axes(self) -> Tree:
        """None for all axes: no two features of the small network are meant to be equal."""
        return jax.tree.map(
            lambda axes: (None,) * len(axes), self._axes, is_leaf=lambda x: isinstance(x, tuple)
        )
