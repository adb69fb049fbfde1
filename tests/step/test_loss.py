import jax
import jax.numpy as jnp
import pytest

from zerojax import step


def test_labels_may_be_probabilities():
    logits = jax.random.normal(jax.random.key(0), (6, 4))
    labels = jnp.arange(6) % 4
    one_hot = jax.nn.one_hot(labels, 4)
    assert (step.cross_entropy(logits, labels) == step.cross_entropy(logits, one_hot)).all()
    assert step.accuracy(logits, labels) == jnp.mean(jnp.argmax(logits, 1) == labels)
    mixed = 0.75 * one_hot + 0.25 * one_hot[::-1]
    expected = 0.75 * step.accuracy(logits, one_hot) + 0.25 * step.accuracy(logits, one_hot[::-1])
    assert float(step.accuracy(logits, mixed)) == pytest.approx(float(expected), rel=1e-6)
