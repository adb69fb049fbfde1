"""How far apart two networks are: in weights, in features, in predictions.

Pure functions of arrays, or of nested dictionaries of them, on the host; sums are float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zerojax.step.precision import at_least_float32

Tree = Any


def _vector(tree: Tree) -> np.ndarray:
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])


def l2_distance(a: Tree, b: Tree) -> float:
    """|a - b| over all arrays of two trees of one structure, in units of the weights."""
    return float(np.linalg.norm(_vector(a) - _vector(b)))


def angle(a: Tree, b: Tree) -> float:
    """Angle in degrees, 0 to 180, between two trees of one structure as vectors; nan if one is 0.

    2 atan2(|u - v|, |u + v|) with the unit vectors u and v (Kahan), exact also where the cosine is
    1 to within its rounding.
    """
    u, v = _vector(a), _vector(b)
    norms = np.linalg.norm(u), np.linalg.norm(v)
    if 0 in norms:
        return float('nan')
    u, v = u / norms[0], v / norms[1]
    return float(np.degrees(2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))))


def gram(x: jax.Array) -> jax.Array:
    """Inner products [N, N] of examples [N, ...], each feature centred over the examples.

    The input may have any size: it is divided by its largest entry. At least float32.
    """
    x = x.reshape(len(x), -1)
    x = x.astype(at_least_float32(x.dtype))
    x = x - jnp.mean(x, axis=0, keepdims=True)
    largest = jnp.max(jnp.abs(x))
    x = x / jnp.where(largest > 0, largest, 1)
    return jnp.matmul(x, x.T, precision='highest')


def cka(gram_a: np.ndarray, gram_b: np.ndarray) -> float:
    """CKA of two centred Gram matrices [N, N]: <K, M> / (|K| |M|), from 0 to 1; nan if one is 0."""
    k, m = np.asarray(gram_a, np.float64).ravel(), np.asarray(gram_b, np.float64).ravel()
    norms = np.linalg.norm(k) * np.linalg.norm(m)
    return float(k @ m / norms) if norms > 0 else float('nan')


def linear_cka(a: jax.Array, b: jax.Array) -> float:
    """Linear centred kernel alignment of features [N, ...] and [N, ...] of the same N examples.

    Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019: with centred
    features X and Y as matrices, |YᵀX|² / (|XᵀX| |YᵀY|) in Frobenius norms, computed from the Gram
    matrices X Xᵀ and Y Yᵀ as in their equation for wide layers. Between 0 and 1; it is 1 if and
    only if the features are equal up to rotation, reflection, scaling and shift. nan where the
    features of one are the same for all examples.
    """
    return cka(np.asarray(gram(a)), np.asarray(gram(b)))


def disagreement(classes_a: np.ndarray, classes_b: np.ndarray) -> float:
    """Share of examples whose predicted classes, int [N] and [N], differ."""
    return float(np.mean(classes_a != classes_b))
