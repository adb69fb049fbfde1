"""From a set held on the device to the batch of a step: what happens inside jit.

All that is drawn is drawn in float32 or int32, so that JAX's x64 mode changes no draw.

Shapes are written as suffixes: B batch, H and W space, C channels, N examples.
"""

import jax
import jax.numpy as jnp
import numpy as np

PAD = 4  # pixels that the random crop may shift an image by, as in the paper


def normalize(images_BxHxWxC: jax.Array, mean_C: np.ndarray, std_C: np.ndarray) -> jax.Array:
    """(uint8 images - mean) / std as float32; mean and std in units of 0 to 255."""
    return (images_BxHxWxC.astype(jnp.float32) - mean_C[None, None, None]) / std_C[None, None, None]


def epoch_order(key: jax.Array, epoch: jax.Array, num_examples: int) -> jax.Array:
    """The order of examples in an epoch, a permutation int32 [N] that depends on nothing else."""
    examples = jnp.arange(num_examples, dtype=jnp.int32)
    return jax.random.permutation(jax.random.fold_in(key, epoch), examples)


def steps_per_epoch(num_examples: int, batch_size: int, keep_last: bool = False) -> int:
    """Updates in an epoch: N // B, or, if the last N % B examples are kept, one more for them."""
    return num_examples // batch_size + (keep_last and num_examples % batch_size > 0)


def batch_indices(
    order_N: jax.Array, step: jax.Array, batch_size: int, keep_last: bool = False
) -> jax.Array:
    """Indices of the examples of update `step` (from 0) in its epoch's order, int32 [B].

    The N % B examples at the end of the order are not among them: if they are kept, they are those
    of the epoch's last update, see `last_batch_indices`.
    """
    position = step % steps_per_epoch(len(order_N), batch_size, keep_last)
    return jax.lax.dynamic_slice_in_dim(order_N, position * batch_size, batch_size)


def last_batch_indices(order_N: jax.Array, batch_size: int) -> jax.Array:
    """Indices of the examples that are left at the end of an epoch's order, int32 [N % B]."""
    return order_N[len(order_N) - len(order_N) % batch_size :]


def augment(key: jax.Array, images_BxHxWxC: jax.Array) -> jax.Array:
    """Reflect-pads by 4 pixels, crops at random to the old size, mirrors half of the images."""
    batch, height, width, channels = images_BxHxWxC.shape
    crop_key, flip_key = jax.random.split(key)
    offsets_Bx2 = jax.random.randint(crop_key, (batch, 2), 0, 2 * PAD + 1, jnp.int32)
    flips_B = jax.random.bernoulli(flip_key, jnp.float32(0.5), (batch,))
    padded = jnp.pad(images_BxHxWxC, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), mode='reflect')

    def crop_and_flip(image: jax.Array, offset: jax.Array, flip: jax.Array) -> jax.Array:
        image = jax.lax.dynamic_slice(
            image, (offset[0], offset[1], jnp.int32(0)), (height, width, channels)
        )
        return jnp.where(flip, image[:, ::-1], image)

    return jax.vmap(crop_and_flip)(padded, offsets_Bx2, flips_B)


def cutout(key: jax.Array, images_BxHxWxC: jax.Array, size: int) -> jax.Array:
    """Sets a square of `size` pixels a side to 0 in each image (DeVries and Taylor, 2017).

    Its centre is any pixel of the image, so the square may be cut by the border. On normalised
    images 0 is the mean.
    """
    batch, height, width, _ = images_BxHxWxC.shape
    row_key, column_key = jax.random.split(key)

    def inside(key: jax.Array, side: int) -> jax.Array:
        start_B = jax.random.randint(key, (batch,), 0, side, jnp.int32) - size // 2
        distance_BxS = jnp.arange(side, dtype=jnp.int32)[None, :] - start_B[:, None]
        return (distance_BxS >= 0) & (distance_BxS < size)

    hole_BxHxW = inside(row_key, height)[:, :, None] & inside(column_key, width)[:, None, :]
    return jnp.where(hole_BxHxW[..., None], 0, images_BxHxWxC)


def mixup(
    key: jax.Array, images: jax.Array, labels_B: jax.Array, num_classes: int, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """λ · batch + (1 - λ) · the same batch in a random order (Zhang et al., "mixup", 2018).

    One λ ~ Beta(alpha, alpha) for the whole batch, as in the paper's code. The labels come back as
    probabilities, float32 [B, num_classes].
    """
    beta_key, order_key = jax.random.split(key)
    share = jax.random.beta(beta_key, alpha, alpha, dtype=jnp.float32)
    order_B = jax.random.permutation(order_key, jnp.arange(len(labels_B), dtype=jnp.int32))
    one_hot_BxN = jax.nn.one_hot(labels_B, num_classes, dtype=jnp.float32)

    def mix(x: jax.Array) -> jax.Array:
        return share * x + (1 - share) * x[order_B]

    return mix(images), mix(one_hot_BxN)
