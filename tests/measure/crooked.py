"""A layer whose arithmetic treats its last feature otherwise than the rest."""

import flax.linen as nn
import jax.numpy as jnp


class Crooked(nn.Module):
    """A product summed from the first input to the last; if `crooked`, for the last feature from
    the last to the first, as at the edge of a kernel's tile."""

    features: int
    crooked: bool

    @nn.compact
    def __call__(self, x_bxc):
        shape = x_bxc.shape[-1], self.features
        kernel = self.param('kernel', nn.initializers.zeros, shape, jnp.float32)
        terms = x_bxc[:, :, None] * kernel[None]
        forward, backward = terms[:, 0], terms[:, -1]
        for i in range(1, terms.shape[1]):
            forward = forward + terms[:, i]
            backward = backward + terms[:, -1 - i]
        last = jnp.arange(self.features)[None, :] == self.features - 1
        return jnp.where(last & self.crooked, backward, forward)
