"""Cross-entropy and accuracy, from labels or from probabilities.

Shapes are written as suffixes: B batch, N classes.
"""

import jax
import jax.numpy as jnp
import optax

from zerojax.step.precision import at_least_float32


def _probabilities(labels: jax.Array, logits_BxN: jax.Array) -> jax.Array:
    """Labels int [B] as one-hot rows [B, N]; labels that are such rows already as they are."""
    if labels.ndim == 2:
        return labels.astype(logits_BxN.dtype)
    return jax.nn.one_hot(labels, logits_BxN.shape[-1], dtype=logits_BxN.dtype)


def cross_entropy(logits_BxN: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each example in nats, [B], computed in float32 or better.

    `labels` are int [B] or probabilities [B, N]. One-hot rows stand for the former, so that the
    gradient needs no scatter.
    """
    logits_BxN = logits_BxN.astype(at_least_float32(logits_BxN.dtype))
    return optax.softmax_cross_entropy(logits_BxN, _probabilities(labels, logits_BxN))


def accuracy(logits_BxN: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean probability that the labels (as in `cross_entropy`) give the predicted class, []."""
    logits_BxN = logits_BxN.astype(at_least_float32(logits_BxN.dtype))
    predicted_BxN = jax.nn.one_hot(jnp.argmax(logits_BxN, axis=-1), logits_BxN.shape[-1])
    predicted_BxN = predicted_BxN.astype(logits_BxN.dtype)
    return jnp.mean(jnp.sum(predicted_BxN * _probabilities(labels, logits_BxN), axis=-1))
