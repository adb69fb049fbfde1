"""Initializers with the signature of `jax.nn.initializers`: (key, shape, dtype) -> array.

Kernels are laid out as Flax has them, [k, k, c_in, c_out] or [in, out], so fan_in = k² c_in and
fan_out = k² c_out. JAX's own `he_normal` and `delta_orthogonal` complete the set.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer, variance_scaling, zeros

__all__ = [
    'averaging', 'fixup', 'hadamard', 'lettered', 'random_control', 'repeated', 'tiled_identity',
]  # fmt: skip

LETTERS = {
    '1': 'averaging',
    'i': 'identity',
    'h': 'random',
    'k': 'noisy identity',
    'a': 'noisy averaging',
}
NOISY_CONSTANT = 0.99  # share of the constant in a noisy layer; the rest is variance of the noise


def _on_centre_tap(matrix: jax.Array, shape: Sequence[int]) -> jax.Array:
    """A kernel that is `matrix` [c_in, c_out] at its centre tap and 0 at all others."""
    *sides, _, _ = shape
    if any(side % 2 == 0 for side in sides):
        size = 'x'.join(map(str, sides))
        raise ValueError(f'needs a kernel with a centre tap, not one of {size}')
    kernel = matrix.reshape(*(1 for _ in sides), *matrix.shape)
    return jnp.pad(kernel, [*((side // 2, side // 2) for side in sides), (0, 0), (0, 0)])


def averaging(factor: float = 1.0) -> Initializer:
    """Every output feature is `factor` times the mean of the input features (the paper's "1").

    The centre tap is factor/c_in for each pair of features and all other taps are 0, so all c_out
    features are identical. The kernel's sides must be odd; ValueError otherwise.
    """

    def init(
        key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        del key, out_sharding
        return _on_centre_tap(jnp.full(shape[-2:], factor / shape[-2], dtype), shape)

    return init


def tiled_identity(factor: float = 1.0) -> Initializer:
    """Output feature d is `factor` times input feature d mod c_in (the paper's "i").

    So c_in features at the input become c_in orbits of identical ones. Raises ValueError where
    c_out < c_in, which would lose features, or the kernel's sides are even.
    """

    def init(
        key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        del key, out_sharding
        c_in, c_out = shape[-2:]
        if c_out < c_in:
            raise ValueError(f'identity of {c_in} features onto {c_out}: needs at least as many')
        is_copy = jnp.arange(c_in)[:, None] == jnp.arange(c_out)[None, :] % c_in
        matrix = jnp.where(is_copy, jnp.asarray(factor, dtype), jnp.zeros((), dtype))
        return _on_centre_tap(matrix, shape)

    return init


def hadamard() -> Initializer:
    """ZerO: identity where features are kept or dropped, Hadamard where they grow in number.

    Zhao, Schaefer and Anandkumar, "ZerO Initialization", 2022, Algorithms 1 and 2: the centre tap
    is the (partial) identity if c_out <= c_in, and else the upper left [c_in, c_out] corner of the
    Hadamard matrix of size 2^m, m = ceil(log2 c_out), divided by 2^(m/2), which makes its columns
    orthonormal. Nothing is random. The kernel's sides must be odd; ValueError otherwise.
    """

    def init(
        key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        del key, out_sharding
        c_in, c_out = shape[-2:]
        if c_out <= c_in:
            matrix = jnp.eye(c_in, c_out, dtype=dtype)
        else:  # entry (i, j) has the sign (-1)^(number of bits that i and j share)
            size = 2 ** math.ceil(math.log2(c_out))
            shared = jnp.arange(c_in)[:, None] & jnp.arange(c_out)[None, :]
            entry = jnp.asarray(1 / math.sqrt(size), dtype)
            matrix = jnp.where(lax.population_count(shared) % 2 == 0, entry, -entry)
        return _on_centre_tap(matrix, shape)

    return init


def random_control(gain: float) -> Initializer:
    """N(0, gain / fan_out), second argument the variance: the paper's random control; 0 is zeros.

    `gain` is 2 σ_w for the convolutions of blocks, σ_w for stem and shortcuts. The normal
    distribution is not truncated.
    """
    return variance_scaling(gain, 'fan_out', 'normal', dtype=jnp.float32) if gain > 0 else zeros


def lettered(letter: str, block: int | None, negative_slope: float) -> Initializer:
    """The initializer of one LeakyNet convolution, named by a letter of the paper's init string.

    Args:
        letter: '1' averaging, 'i' tiled identity, 'h' random N(0, g / fan_in), 'k' and 'a' noisy
            identity and noisy averaging: 0.99 of the constant plus N(0, 0.01 g / fan_in). The
            second argument of N is the variance, and g = √2 (1 + negative_slope). (In the paper's
            code every other letter is a noisy averaging; here that is 'a'.)
        block: number of the block over all stages, from 0; None for the stem. The constants of odd
            blocks are multiplied by -1/negative_slope: with the even block before, the pair
            computes exactly -x. (-1 for a slope of 0, where a pair hands on nothing.)
        negative_slope: ρ of the leaky ReLU.

    Raises:
        ValueError: another letter.
    """
    if letter not in LETTERS:
        allowed = ', '.join(f"'{each}' {name}" for each, name in LETTERS.items())
        raise ValueError(f'letter {letter!r}: must be one of {allowed}')
    odd = block is not None and block % 2 == 1
    sign = -1 / (negative_slope or 1.0) if odd else 1.0
    share = {'1': 1.0, 'i': 1.0, 'h': 0.0, 'k': NOISY_CONSTANT, 'a': NOISY_CONSTANT}[letter]
    constant = (tiled_identity if letter in 'ik' else averaging)(share * sign)
    if share == 1:
        return constant
    gain = math.sqrt(2) * (1 + negative_slope) * (1 - share)
    noise = variance_scaling(gain, 'fan_in', 'normal', dtype=jnp.float32)
    return noise if share == 0 else _sum(constant, noise)


def _sum(first: Initializer, second: Initializer) -> Initializer:
    def init(
        key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        del out_sharding
        return first(key, shape, dtype) + second(key, shape, dtype)

    return init


def repeated(base: Initializer, unique_features: int) -> Initializer:
    """`base` with only `unique_features` different output features: d is a copy of d mod that.

    `base` is called with the last axis cut to `unique_features`, so it must not scale by fan_out.
    Raises ValueError if there are fewer output features than that.
    """

    def init(
        key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        del out_sharding
        *others, c_out = shape
        if not 1 <= unique_features <= c_out:
            raise ValueError(f'{unique_features} unique features: must be from 1 to {c_out}')
        unique = base(key, (*others, unique_features), dtype)
        return unique[..., jnp.arange(c_out) % unique_features]

    return init


def fixup(num_branches: int) -> Initializer:
    """The first convolution of a residual branch of two: He's, times num_branches^(-1/2).

    Zhang, Dauphin and Ma, "Fixup Initialization", 2019, rule 2 with m = 2 layers in a branch. The
    second convolution of the branch and the network's head start at 0 (rule 1).
    """
    return variance_scaling(2.0 / num_branches, 'fan_in', 'normal', dtype=jnp.float32)
