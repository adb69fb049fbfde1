"""The pure evaluation of one batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from zerojax.step.loss import cross_entropy
from zerojax.step.model import Model

Tree = Any


def eval_step_function(
    model: Model, preprocess: Callable[[jax.Array], jax.Array]
) -> Callable[[Tree, jax.Array, jax.Array], dict[str, jax.Array]]:
    """A pure (variables, images [B, H, W, C], labels int32 [B]) -> sums over the batch.

    `preprocess` turns the images into what the model takes. Labels below 0 mark padding. The sums
    are 'loss' (nats, float []) and 'correct' (int32 []).
    """

    def eval_step(variables: Tree, images: jax.Array, labels_B: jax.Array) -> dict[str, jax.Array]:
        logits_BxN: Any = model.apply(variables, preprocess(images), train=False)
        real_B = labels_B >= 0
        losses_B = jnp.where(real_B, cross_entropy(logits_BxN, labels_B), 0.0)
        predicted_B = jnp.argmax(logits_BxN, axis=-1).astype(labels_B.dtype)
        correct_B = real_B & (predicted_B == labels_B)
        return {
            'loss': jnp.sum(losses_B),
            'correct': jnp.sum(correct_B, dtype=jnp.int32),
        }

    return eval_step
