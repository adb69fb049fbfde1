"""The paper's optimizer: SGD with momentum, coupled L2 and a learning rate that drops in steps."""

import optax


def step_schedule(
    learning_rate: float, num_steps: int, drop_at: tuple[float, ...], drop_factor: float
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
    schedule: optax.Schedule, momentum: float, nesterov: bool, weight_decay: float
) -> optax.GradientTransformation:
    """SGD as PyTorch computes it: weight_decay · w joins the gradient of every weight."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
    )
