"""What the paper measures, as pure functions of kernels, activations and gradients.

Kernels are [..., c_in, c_out], activations and their gradients [..., C] with features last, of any
float dtype; results are float32, or float64 for such input. Kernels may be NumPy's arrays, whose
correlations NumPy computes. The definitions of correlation, diversity and feature variance are
those of the paper's code (github.com/yanivbl6/BeyondSigProp, correlation.py and remodel.py);
`layer_outputs` gets the activations and gradients of any Linen model.
"""

import collections
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from zerojax.step.precision import at_least_float32
from zerojax.symmetry.bits import bit_patterns

__all__ = [
    'all_gradients', 'backward_correlation', 'count_unique_features', 'diversity',
    'effective_width', 'feature_variance', 'forward_correlation', 'kernels_by_layer',
    'layer_outputs', 'mean_correlation', 'of_kernels', 'of_layer_outputs', 'second_moment',
]  # fmt: skip

Tree = Any


def mean_correlation(rows: jax.Array) -> jax.Array:
    """Mean Pearson correlation between two different rows of [n, m]: a float [] from -1 to 1.

    A row of equal numbers has no correlation (NumPy's `corrcoef` gives NaN), nor has one that holds
    a NaN; it counts as 1 with each other row, as in the paper's code. With an infinity in a row the
    result is NaN. Costs n·m operations: the sum over pairs of unit vectors is the squared norm of
    their sum, less n. Raises ValueError if there are less than two rows.
    """
    n, xp = len(rows), _namespace(rows)
    if n < 2:
        raise ValueError(f'a correlation between rows needs two of them, not shape {rows.shape}')
    rows = rows.astype(at_least_float32(rows.dtype))
    span = xp.max(rows, axis=1, keepdims=True) - xp.min(rows, axis=1, keepdims=True)
    varies = span > 0
    centred = (rows - xp.mean(rows, axis=1, keepdims=True)) / xp.where(varies, span, 1)
    norm = xp.sqrt(xp.sum(centred**2, axis=1, keepdims=True))  # of order 1: nothing underflows
    unit = xp.where(varies, centred / xp.where(varies, norm, 1), 0)
    v = xp.sum(varies, dtype=rows.dtype)
    sum_of_valid = xp.sum(xp.sum(unit, axis=0) ** 2) - v
    pairs = float(n * (n - 1))  # of many rows more than an int32 holds
    return (sum_of_valid + pairs - v * (v - 1)) / pairs


def _namespace(x: Any) -> Any:
    """The module whose functions take such arrays, NumPy or jax.numpy."""
    return np if isinstance(x, np.ndarray | np.generic) else jnp


def forward_correlation(kernel: jax.Array) -> jax.Array:
    """Mean correlation between the output features of a kernel [..., c_in, c_out], each a vector of
    all its incoming weights; float []. See `mean_correlation`."""
    rows = _namespace(kernel).moveaxis(kernel, -1, 0)
    return mean_correlation(rows.reshape(kernel.shape[-1], -1))


def backward_correlation(kernel: jax.Array) -> jax.Array:
    """Mean correlation between the input features of a kernel [..., c_in, c_out], each a vector of
    all its outgoing weights; float []. See `mean_correlation`."""
    rows = _namespace(kernel).moveaxis(kernel, -2, 0)
    return mean_correlation(rows.reshape(kernel.shape[-2], -1))


def diversity(backward_correlations: jax.Array) -> jax.Array:
    """Σ ln √(1 - c²) over the backward correlations c of a network's kernels; float [].

    0 if no kernel's slices are correlated, minus infinity if those of any are identical. As far as
    the arithmetic knows: in float32 c is then 1 to within about 1e-7, which may add -7 instead.
    """
    c, xp = backward_correlations, _namespace(backward_correlations)
    with np.errstate(divide='ignore'):
        return xp.sum(xp.log(xp.sqrt(xp.maximum((1 - c) * (1 + c), 0))))


def kernels_by_layer(params: Tree) -> dict[str, jax.Array]:
    """Every weight array with at least two axes, by the path of its layer ('block1_0/conv').

    Where a layer holds several, by the path of the array ('attention/query_kernel'). `params` are
    nested dictionaries.
    """
    kernels = {path: x for path, x in flatten_dict(params).items() if x.ndim >= 2}
    in_layer = collections.Counter(path[:-1] for path in kernels)
    return {
        '/'.join(path[:-1] if in_layer[path[:-1]] == 1 else path): x for path, x in kernels.items()
    }


def feature_variance(t: jax.Array) -> jax.Array:
    """Mean of (t - mean over features)²: how far the features of [..., C] are from being one;
    float [], in squared units of t."""
    t = t.astype(at_least_float32(t.dtype))
    return jnp.mean((t - jnp.mean(t, axis=-1, keepdims=True)) ** 2)


def second_moment(t: jax.Array) -> jax.Array:
    """Mean of t², float []: the size of a signal or gradient, whatever its features."""
    return jnp.mean(t.astype(at_least_float32(t.dtype)) ** 2)


def effective_width(t: jax.Array) -> jax.Array:
    """Participation ratio of the singular values s of t as a matrix [N, C]: (Σ s²)² / Σ s⁴.

    Between 1 (all features are multiples of one) and C (orthogonal features of one size); 0 if t is
    0 everywhere. Computed from the Gram matrix [C, C], without a decomposition. float [].
    """
    x = t.astype(at_least_float32(t.dtype)).reshape(-1, t.shape[-1])
    largest = jnp.max(jnp.abs(x))
    x = x / jnp.where(largest > 0, largest, 1)
    gram = jnp.matmul(x.T, x, precision='highest')
    fourth_powers = jnp.sum(gram**2)
    return jnp.trace(gram) ** 2 / jnp.where(fourth_powers > 0, fourth_powers, 1)


def count_unique_features(t: jax.Array) -> jax.Array:
    """Number of features of [..., C] that differ from all features before them, int32 [].

    Exact: bits are compared, 0.0 equals -0.0, and a NaN or an infinity what has its bits.
    """
    bits = bit_patterns(jnp.asarray(t).reshape(-1, t.shape[-1]))

    def count(feature: jax.Array, found: jax.Array) -> jax.Array:
        its_bits = jax.lax.dynamic_slice_in_dim(bits, feature, 1, axis=1)
        first_equal = jnp.argmax(jnp.all(bits == its_bits, axis=0))
        return found + (first_equal == feature).astype(jnp.int32)

    return jax.lax.fori_loop(0, bits.shape[1], count, jnp.int32(0))


def layer_outputs(
    loss: Callable[[], jax.Array], layers: Collection[str]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Outputs of a Linen model's submodules, and the gradients of a loss with respect to them.

    Args:
        loss: a function without arguments that calls `model.apply` once and returns a scalar.
        layers: paths of submodules ('block1_0', 'encoder/dense'), each called once in the model and
            returning one array.

    Returns:
        (activations, gradients): dictionaries from path to array, each pair of one shape.

    Raises:
        ValueError: a path is not that of a submodule that was called.
    """
    _, activations, gradients, _ = all_gradients(lambda _: loss(), {}, layers)
    return activations, gradients


def all_gradients(
    loss: Callable[[Tree], jax.Array], params: Tree, layers: Collection[str]
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array], Tree]:
    """A loss, and its gradients with respect to both layer outputs and parameters.

    Args:
        loss: a function of the parameters, otherwise as in `layer_outputs`.
        params: what it is called with.
        layers: as in `layer_outputs`.

    Returns:
        (loss [], activations, their gradients, gradients of the parameters).

    Raises:
        ValueError: a path is not that of a submodule that was called.
    """

    def run(offsets: dict[str, jax.Array], params: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs: dict[str, jax.Array] = {}

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            output = call(*args, **kwargs)
            path = '/'.join(context.module.path)
            if context.method_name == '__call__' and path in layers:
                output = output + offsets[path] if path in offsets else output
                outputs[path] = output
            return output

        with nn.intercept_methods(intercept):
            return loss(params), outputs

    _, shapes = jax.eval_shape(run, {}, params)
    missing = sorted(set(layers) - shapes.keys())
    if missing:
        raise ValueError(f'layers={missing}: no submodules that were called')
    offsets = {path: jnp.zeros(x.shape, x.dtype) for path, x in shapes.items()}
    (value, activations), (gradients, params_gradients) = jax.value_and_grad(
        run, argnums=(0, 1), has_aux=True
    )(offsets, params)
    return value, activations, gradients, params_gradients


def of_kernels(params: Tree) -> dict[str, Any]:
    """{'forward_correlation': {layer: []}, 'backward_correlation': {layer: []}, 'diversity': []}.

    A kernel with one output (input) feature has no forward (backward) correlation. The head is
    among the kernels, as in the paper's code; while it is 0, its correlations are 1 and the
    diversity is minus infinity.
    """
    by_layer = kernels_by_layer(params)
    forward = {k: forward_correlation(x) for k, x in by_layer.items() if x.shape[-1] > 1}
    backward = {k: backward_correlation(x) for k, x in by_layer.items() if x.shape[-2] > 1}
    correlations = list(backward.values())
    xp = _namespace(jax.tree.leaves(params)[0])
    return {
        'forward_correlation': forward,
        'backward_correlation': backward,
        'diversity': diversity(xp.asarray(correlations)),
    }


def of_layer_outputs(
    activations: dict[str, jax.Array], gradients: dict[str, jax.Array]
) -> dict[str, dict[str, jax.Array]]:
    """For each layer of `layer_outputs`: size, variance between features, and their number."""
    return {
        'signal': {k: second_moment(x) for k, x in activations.items()},
        'feature_variance': {k: feature_variance(x) for k, x in activations.items()},
        'effective_width': {k: effective_width(x) for k, x in activations.items()},
        'unique_activations': {k: count_unique_features(x) for k, x in activations.items()},
        'gradient': {k: second_moment(x) for k, x in gradients.items()},
        'gradient_variance': {k: feature_variance(x) for k, x in gradients.items()},
    }
