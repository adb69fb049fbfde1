"""How far apart two networks are: in weights, in features, in predictions.

Pure functions of arrays, or of nested dictionaries of them, on the host; sums are float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zerojax.step.precision import at_least_float32
from zerojax.symmetry import named_axes

Tree = Any


def _vector(tree: Tree) -> np.ndarray:
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])


def l2_distance(a: Tree, b: Tree) -> float:
    """|a - b| over all arrays of two trees of one structure, in units of the weights."""
    return float(np.linalg.norm(_vector(a) - _vector(b)))


def l2_by_stream(a: Tree, b: Tree, feature_axes: Tree) -> dict[str, float]:
    """|a - b| over the arrays that each stream indexes, by name of an axis; see `zerojax.symmetry`.

    Raises:
        ValueError: trees and declaration do not fit each other.
    """
    squares: dict[str, float] = {}
    for (_, x, names), (_, y, _) in zip(
        named_axes(a, feature_axes), named_axes(b, feature_axes), strict=True
    ):
        for stream in dict.fromkeys(names.values()):
            squares[stream] = squares.get(stream, 0.0) + l2_distance(x, y) ** 2
    return {stream: float(np.sqrt(square)) for stream, square in squares.items()}


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


def debiased_cka(gram_a: np.ndarray, gram_b: np.ndarray) -> float:
    """CKA of two Gram matrices [N, N] of the same N examples, by unbiased estimates, from -1 to 1.

    Linear centred kernel alignment, Kornblith et al., "Similarity of Neural Network
    Representations Revisited", 2019, is <K, M> / (|K| |M|) of centred Gram matrices. It is biased
    upwards where features outnumber examples: 500 examples of 20,000 independent features have
    0.98. So its HSIC_0 is replaced by HSIC_1 of Song et al., "Feature Selection via Dependence
    Maximization", 2012, whose mean is that of infinitely many examples, as Nguyen, Raghu and
    Kornblith, "Do Wide and Deep Networks Learn the Same Things?", 2021, do. So independent features
    have about 0, however many they are; features equal up to rotation, scaling and shift have 1.
    nan for fewer than 4 examples, or where all different examples are as similar to one another.
    """
    if len(gram_a) < 4:
        return float('nan')
    return _cosine(_off_diagonal(gram_a), _off_diagonal(gram_b))


def _off_diagonal(gram: np.ndarray) -> np.ndarray:
    """The U-centred matrix of Székely and Rizzo, 2014: the diagonal is 0 and so is every row's sum.

    The inner product of two is N (N - 3) HSIC_1. 0 throughout where only rounding would be left.
    """
    k = np.array(gram, np.float64)
    n, size = len(k), np.linalg.norm(k)
    np.fill_diagonal(k, 0)
    sums = k.sum(axis=0)
    k = k - (sums[:, None] + sums[None, :]) / (n - 2) + k.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(k, 0)
    return k if np.linalg.norm(k) > 1e-6 * size else np.zeros_like(k)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.vdot(a, b) / norms) if norms > 0 else float('nan')


def disagreement(classes_a: np.ndarray, classes_b: np.ndarray) -> float:
    """Share of examples whose predicted classes, int [N] and [N], differ."""
    return float(np.mean(classes_a != classes_b))
