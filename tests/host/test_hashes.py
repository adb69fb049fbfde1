import hashlib

import jax.numpy as jnp
import numpy as np

from zerojax.host import hashes


def test_params_sha256_is_over_bytes_in_path_order():
    first, second = np.arange(3, dtype=np.float32), np.array([[1.5, -0.0]], np.float32)
    params = {'b': {'w': jnp.asarray(second)}, 'a': {'z': jnp.asarray(first)}}
    expected = hashlib.sha256(first.tobytes() + second.tobytes()).hexdigest()
    assert hashes.params_sha256(params) == expected
    assert hashes.params_sha256({'a': {'z': first}, 'b': {'w': np.abs(second)}}) != expected
