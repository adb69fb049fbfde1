"""Whether a function of parameters stays the same when the features of a stream are permuted."""

import jax
import numpy as np

from tests import quick
from zerojax import symmetry


def axes_by_leaf(inferred, params):
    """The declared tuple of each array, in the order of the leaves."""
    return jax.tree.structure(params).flatten_up_to(inferred.axes)


def random_like(params, rng):
    """Random float64 weights, positive where they are variances; whole numbers stay."""

    def fill(path, x):
        if not np.issubdtype(x.dtype, np.floating):
            return x
        noise = rng.normal(size=x.shape)
        return np.abs(noise) if 'var' in jax.tree_util.keystr(path) else noise

    return jax.tree_util.tree_map_with_path(fill, params)


def broken_streams(apply, params, inputs, seed=0):
    """What is inferred, and the names of those streams whose permutation does change the function.

    At random weights in float64, to rounding.
    """
    with jax.enable_x64(True):
        inferred = symmetry.infer_feature_axes(apply, params, inputs)
        rng = np.random.default_rng(seed)
        treedef = jax.tree.structure(params)
        weights, axes = jax.tree.leaves(random_like(params, rng)), axes_by_leaf(inferred, params)
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        compiled = quick.jit(apply)
        outputs = jax.tree.leaves(compiled(treedef.unflatten(weights), *inputs))
        broken = []
        for stream in sorted({name for names in axes for name in names if name}):
            permuted = _permuted(weights, axes, stream, rng)
            others = jax.tree.leaves(compiled(treedef.unflatten(permuted), *inputs))
            pairs = zip(outputs, others, strict=True)
            assert all(np.isfinite(x).all() for x in outputs)
            if not all(np.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs):
                broken.append(stream)
    return inferred, broken


def _permuted(weights, axes, stream, rng):
    """By a cycle, which moves every feature, of features in a random order."""
    sizes = {
        x.shape[i]
        for x, names in zip(weights, axes, strict=True)
        for i, name in enumerate(names)
        if name == stream
    }
    (size,) = sizes
    order = rng.permutation(size)
    permutation = np.empty(size, int)
    permutation[order] = np.roll(order, 1)
    permuted = []
    for x, names in zip(weights, axes, strict=True):
        for i, name in enumerate(names):
            if name == stream:
                x = np.take(x, permutation, i)
        permuted.append(x)
    return permuted
