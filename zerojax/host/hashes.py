"""Hashes of weights and of all that a checkpoint holds."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict


def params_sha256(params: Any) -> str:
    """SHA-256 over the parameters' bytes, parameters in the order of their '/'-joined paths.

    An array counts as its C-ordered, little-endian bytes; names and shapes do not enter.
    """
    digest = hashlib.sha256()
    for _, x in sorted(flatten_dict(params, sep='/').items()):
        array = np.ascontiguousarray(x)
        digest.update(array.astype(array.dtype.newbyteorder('<')).tobytes())
    return digest.hexdigest()


def tree_sha256(tree: Any) -> str:
    """Over the bytes of all arrays of a tree, in the order of its leaves."""
    digest = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        digest.update(np.ascontiguousarray(jax.device_get(x)).tobytes())
    return digest.hexdigest()
