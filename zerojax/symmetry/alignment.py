"""Permutations of features that bring one network's weights as close as possible to another's.

Features have no order: permuting them along all axes of one name, in every array, leaves the
network's function as it is. Which axes those are is what a model's `feature_axes()` declares, see
`zerojax.symmetry`; everything here works on any nested dictionary of arrays that has such a
declaration. Runs on the host, in float64.
"""

import numpy as np
from flax.traverse_util import unflatten_dict
from scipy.optimize import linear_sum_assignment

from zerojax.symmetry.orbits import Tree, feature_counts, named_axes

Permutations = dict[str, np.ndarray]
Names = dict[int, str]  # of the named axes of an array


def permute(tree: Tree, feature_axes: Tree, permutations: Permutations) -> Tree:
    """The tree with new feature i being old feature `permutations[name][i]`, in NumPy arrays.

    Axes whose name is not in `permutations` stay as they are, and so do all dtypes.

    Raises:
        ValueError: tree and declaration do not fit each other.
    """
    return unflatten_dict(
        {
            path: _permute_array(np.asarray(x), names, permutations)
            for path, x, names in named_axes(tree, feature_axes)
        }
    )


def _permute_array(x: np.ndarray, names: Names, permutations: Permutations) -> np.ndarray:
    for axis, name in names.items():
        if name in permutations:
            x = np.take(x, permutations[name], axis)
    return x


def weight_matching(a: Tree, b: Tree, feature_axes: Tree) -> Permutations:
    """Permutations under which `permute(b, ...)` is close to `a`: an int array for each axis name.

    Algorithm 1 of Ainsworth, Hayase and Srinivasa, "Git Re-Basin", 2022: name after name, with all
    other permutations held, the squared L2 distance is minimised by solving a linear assignment
    problem, until no name brings a and b closer. Unlike there, names take turns in the order of
    their declaration, so the result is repeatable, and a permutation is kept only if it does
    shorten the distance: where a name indexes two axes of one array (a convolution from the
    residual stream into itself) the distance is quadratic in it, the assignment solves that with
    one of the two axes held, and may miss. The result is a local minimum, never further than `b` as
    it is. A name of n features costs O(n³) a turn, and the products of its arrays' matrices.

    Raises:
        ValueError: a tree does not fit the declaration, or their shapes differ.
    """
    counts = feature_counts(a, feature_axes)
    if counts != feature_counts(b, feature_axes):
        raise ValueError('a and b differ in their numbers of features')
    arrays = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64), names)
        for (_, x, names), (_, y, _) in zip(
            named_axes(a, feature_axes), named_axes(b, feature_axes), strict=True
        )
    ]
    permutations = {name: np.arange(count) for name, count in counts.items()}
    closer = True
    while closer:
        closer = False
        for name in counts:
            concerned = [each for each in arrays if name in each[2].values()]
            trial = permutations | {name: _best_assignment(concerned, name, permutations)}
            if _squared_distance(concerned, trial) < _squared_distance(concerned, permutations):
                permutations, closer = trial, True
    return permutations


def _squared_distance(
    arrays: list[tuple[np.ndarray, np.ndarray, Names]], permutations: Permutations
) -> float:
    return sum(
        float(np.sum((x - _permute_array(y, names, permutations)) ** 2)) for x, y, names in arrays
    )


def _best_assignment(
    arrays: list[tuple[np.ndarray, np.ndarray, Names]], name: str, permutations: Permutations
) -> np.ndarray:
    """For each feature of a, the feature of b that goes with it, all else held."""
    count = len(permutations[name])
    similarity = np.zeros((count, count))
    for x, y, names in arrays:
        for axis in (axis for axis, each in names.items() if each == name):
            others = {i: each for i, each in names.items() if i != axis}
            similarity += (
                _centred_rows(x, axis)
                @ _centred_rows(_permute_array(y, others, permutations), axis).T
            )
    return linear_sum_assignment(similarity, maximize=True)[1]


def _centred_rows(x: np.ndarray, axis: int) -> np.ndarray:
    """Features as rows, less their mean.

    The mean adds the same to every assignment, and would drown what tells almost equal features
    apart in its rounding.
    """
    rows = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    return rows - rows.mean(axis=0, keepdims=True)
