"""Small trees with a declaration, and features that are equal within known orbits."""

import numpy as np

from zerojax.symmetry import Orbits

# Of three features at 'a' (two and one), five at 'b' (two, two, one).
ORBITS = Orbits({'a': np.array([0, 1, 0]), 'b': np.array([0, 1, 0, 1, 4])}, {})
AXES = {'in': {'kernel': (None, 'a')}, 'mid': {'kernel': ('a', 'b'), 'bias': ('b',)}}


def tree_with_orbits():
    """Features of one orbit are equal, those of different orbits are not."""
    rng = np.random.default_rng(0)
    return {
        'in': {'kernel': rng.normal(size=(4, 3)).astype(np.float32)[:, ORBITS.first['a']]},
        'mid': {
            'kernel': rng.normal(size=(3, 5)).astype(np.float32)[
                np.ix_(ORBITS.first['a'], ORBITS.first['b'])
            ],
            'bias': rng.normal(size=5).astype(np.float32)[ORBITS.first['b']],
        },
    }


def identity_tree():
    """An identity between hidden layers: weights differ, features do not."""
    return {
        'in': {'kernel': np.tile(np.float32([[1], [2]]), (1, 4))},
        'mid': {'kernel': np.eye(4, dtype=np.float32), 'bias': np.zeros(4, np.float32)},
    }


def changed(tree, layer, name, index, change):
    """The tree with one weight changed."""
    x = tree[layer][name].copy()
    x[index] = change(x[index])
    return tree | {layer: tree[layer] | {name: x}}


def next_above(x):
    return np.nextafter(x, x.dtype.type(np.inf))
