"""The optimizers of the paper's code: SGD with coupled L2, RAdam; freezing; the schedule."""

from typing import Any

import jax
import optax

from zerojax import perturb

Number = float | jax.Array  # may be traced, so that runs share an executable


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

    As in its authors' code, learning rate · weight_decay · w is taken off every weight beside the
    adaptive update, and the first updates, whose variance cannot be rectified, are not adaptive.
    """
    return optax.chain(
        optax.scale_by_radam(b1, b2),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def freeze(tx: optax.GradientTransformation, layers: str) -> optax.GradientTransformation:
    """`tx`, but the parameters whose path the regular expression `layers` matches stay as they are.

    Paths are '/'-joined ('block1_0/conv/kernel') and matched from the start, as `re.match` does.
    Neither gradient nor weight decay moves a frozen weight.
    """

    def frozen(params: Any) -> Any:
        return perturb.is_chosen(params, layers)

    def learning(params: Any) -> Any:
        return jax.tree.map(lambda x: not x, frozen(params))

    return optax.chain(optax.masked(tx, learning), optax.masked(optax.set_to_zero(), frozen))
