"""All that decides the next step, as one pytree."""

from typing import Any

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from zerojax.step.precision import at_least_float32
from zerojax.symmetry.orbits import feature_counts

Tree = Any

# Everything random is drawn from `fold_in(key of its own purpose, step)`, so one source of
# randomness can be varied with the others held.
KEY_PURPOSES = ('order', 'augmentation', 'dropout', 'cutout', 'mixup')


@flax.struct.dataclass
class TrainState:
    """All that decides the next step.

    Attributes:
        step: number of updates done, int32 [].
        params: the network's weights.
        batch_stats: its other variables.
        mask: None, or bools like `params`: weights where it is False are pruned, held at 0.
        opt_state: state of the optax transformation.
        keys: a typed PRNG key [] for each purpose: `KEY_PURPOSES` and 'perturbation'.
        broken_streams: for each stream, a name of `feature_axes`, the first step whose gradient was
            taken at weights that were not symmetric in it, int32 []; -1 as long as there was none.
        nonfinite_at_step: the first update (counted from 1) whose loss, gradient or new state was
            not finite, int32 []; -1 as long as there was none.
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    mask: Tree
    opt_state: Tree
    keys: dict[str, jax.Array]
    broken_streams: dict[str, jax.Array]
    nonfinite_at_step: jax.Array


def create_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    *,
    seed: int,
    perturbation_seed: int,
    dtype: Any = jnp.float32,
) -> TrainState:
    """The state before the first step, for images of shape [H, W, C].

    `seed` decides the initial weights, the order of examples, augmentation and dropout;
    `perturbation_seed` only the perturbation. Parameters are drawn in float32 and then rounded to
    `dtype`, in which the network computes; statistics are held in float32 or better. The model
    declares its `feature_axes`, see `Model`.

    Raises:
        ValueError: they do not fit the parameters.
    """
    root = jax.random.key(seed)
    init_key, *keys = [jax.random.fold_in(root, i) for i in range(1 + len(KEY_PURPOSES))]
    perturbation_key = jax.random.fold_in(jax.random.key(perturbation_seed), 1 + len(KEY_PURPOSES))
    # As plain dictionaries, whatever FLAX_RETURN_FROZENDICT says.
    variables = flax.core.unfreeze(model.init(init_key, jnp.zeros((1, *image_shape)), train=False))
    params = jax.tree.map(lambda x: x.astype(dtype), variables['params'])
    batch_stats = jax.tree.map(
        lambda x: x.astype(at_least_float32(dtype)), variables.get('batch_stats', {})
    )
    streams = feature_counts(params, model.feature_axes()['params'])
    return TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=batch_stats,
        mask=None,
        opt_state=tx.init(params),
        keys=dict(zip(KEY_PURPOSES, keys, strict=True)) | {'perturbation': perturbation_key},
        broken_streams={stream: jnp.int32(-1) for stream in streams},
        nonfinite_at_step=jnp.int32(-1),
    )
