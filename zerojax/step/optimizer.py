"""The optimizers of the paper's code: SGD with coupled L2, RAdam; freezing; the schedule."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zerojax import perturb
from zerojax.step.precision import at_least_float32

Number = float | jax.Array  # may be traced, so that runs share an executable

RADAM_EPSILON = 1e-8


def step_schedule(
    learning_rate: Number, num_steps: int, drop_at: tuple[float, ...], drop_factor: float
) -> optax.Schedule:
    """The learning rate of update number n (from 0).

    It is multiplied by `drop_factor` from update round(f · num_steps) on, for each fraction f in
    `drop_at`. The paper's 300 epochs drop it by 0.2 from epochs 160, 220 and 260 (counted from 1)
    on, that is at 159/300, 219/300 and 259/300 of the run.
    """
    factors: dict[int, float] = {}
    for fraction in drop_at:
        update = round(fraction * num_steps)
        factors[update] = factors.get(update, 1.0) * drop_factor  # in short runs drops may coincide
    return optax.piecewise_constant_schedule(learning_rate, factors)


def sgd(
    schedule: optax.Schedule, momentum: Number, nesterov: bool, weight_decay: Number
) -> optax.GradientTransformation:
    """SGD as PyTorch computes it: weight_decay · w joins the gradient of every weight."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
    )


def radam(
    schedule: optax.Schedule, b1: float, b2: float, weight_decay: Number
) -> optax.GradientTransformation:
    """RAdam (Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020).

    As its authors' code (github.com/LiyuanLucasLiu/RAdam) in the version that the paper's code
    uses: learning rate · weight_decay · w is taken off every weight beside the adaptive update, and
    the first updates, whose variance cannot be rectified, are not adaptive. Their epsilon, 1e-8, is
    added to √v before the bias of v is corrected, so in early steps it counts for up to
    1 / √(1 - b2) times as much as in `optax.radam`: other updates where gradients are as small as
    ConstNet's first ones.
    """
    return optax.chain(
        _scale_by_radam(b1, b2),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _scale_by_radam(b1: float, b2: float) -> optax.GradientTransformation:
    """RAdam's update without learning rate; both moments are held in float32 or better."""
    first_rectified = _first_rectified(b2)

    def wide(x: jax.Array) -> jax.Array:
        return x.astype(at_least_float32(x.dtype))

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(lambda x: jnp.zeros_like(wide(x)), params)
        return optax.ScaleByAdamState(count=jnp.int32(0), mu=zeros, nu=zeros)

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * wide(g), grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * wide(g) ** 2, grads, state.nu)

        def scaled(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            t = count.astype(m.dtype)
            plain = m / _one_minus_power(b1, t)
            if first_rectified is None:
                return plain.astype(g.dtype)
            size = jnp.sqrt(_one_minus_power(b2, t) * _rectification(b2, t))
            rectified = count >= first_rectified
            # Without the 1, √ at v = 0 would make NaN of plain's derivative backwards.
            root = jnp.sqrt(jnp.where(rectified, v, 1.0))
            adaptive = size * plain / (root + RADAM_EPSILON)
            return jnp.where(rectified, adaptive, plain).astype(g.dtype)

        return jax.tree.map(scaled, grads, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _first_rectified(b2: float) -> int | None:
    """The first update whose moving average is over at least 5 gradients, as the authors count
    them; None if there is none. In float64: in float32 it may be another."""
    longest = 2 / (1 - b2) - 1
    if longest <= 5:
        return None
    update = 5  # the average is never longer than the number of updates
    while longest - 2 * update * b2**update / (1 - b2**update) < 5:
        update += 1
    return update


def _one_minus_power(b: float, t: jax.Array) -> jax.Array:
    """1 - b^t, without the rounding of b^t near 1."""
    return -jnp.expm1(t * math.log(b)) if b > 0 else jnp.ones_like(t)


def _rectification(b2: float, t: jax.Array) -> jax.Array:
    """The authors' r² of update t, from the length of the moving average; at least 0.

    That length is 2 / (1 - b2) - 1 - 2 t b2^t / (1 - b2^t), a small difference of large numbers.
    With y = -ln b2 and h(x) = 1 - x / (e^x - 1) it is 1 + 2 (h(t y) - h(y)) / y, whose terms are
    of its own size.
    """
    y = -math.log(b2)
    x = jnp.minimum(t * y, 80.0)  # e^x is finite in float32; h is 1 there
    series = x / 2 - x**2 / 12 + x**4 / 720 - x**6 / 30240 + x**8 / 1209600 - x**10 / 47900160
    h = jnp.where(x < 0.25, series, 1 - x / jnp.expm1(x))
    longest = 2 / (1 - b2) - 1
    length = 1 + 2 * (h - (1 - y / math.expm1(y))) / y
    ratio = (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2)
    return jnp.maximum(ratio, 0)


def freeze(tx: optax.GradientTransformation, layers: str) -> optax.GradientTransformation:
    """`tx`, but the parameters whose path the regular expression `layers` matches stay as they are.

    Paths are '/'-joined ('block1_0/conv/kernel') and matched from the start, as `re.match` does.
    Neither gradient nor weight decay moves a frozen weight. What changes weights beside the
    optimizer is not its business: a perturbation leaves them alone if the step is told of them
    (`frozen` of `make_train_step`), a projection keeps what is symmetric, and what is pruned is 0.
    Statistics of BatchNorm are no parameters and move on.
    """

    def frozen(params: Any) -> Any:
        return perturb.is_chosen(params, layers)

    def learning(params: Any) -> Any:
        return jax.tree.map(lambda x: not x, frozen(params))

    return optax.chain(optax.masked(tx, learning), optax.masked(optax.set_to_zero(), frozen))
