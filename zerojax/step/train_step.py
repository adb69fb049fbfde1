"""The pure train step, and how it is jitted."""

import functools
from collections.abc import Callable
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import optax

from zerojax import perturb, symmetry
from zerojax.step.determinism import jit_in_mode
from zerojax.step.loss import accuracy, cross_entropy
from zerojax.step.model import Model
from zerojax.step.order import reordered_sums
from zerojax.step.precision import at_least_float32
from zerojax.step.state import TrainState

Tree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def _pruned(params: Tree, mask: Tree) -> Tree:
    if mask is None:
        return params
    return jax.tree.map(lambda w, keep: jnp.where(keep, w, jnp.zeros_like(w)), params, mask)


def _all_finite(tree: Tree) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _first_time(recorded: jax.Array, happened: jax.Array, step: jax.Array) -> jax.Array:
    return jnp.where((recorded < 0) & happened, step, recorded)


def train_step_function(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    perturbation: perturb.Perturbation = perturb.NONE,
    project: bool = False,
    orbits: symmetry.Orbits | None = None,
    frozen: str = '',
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The train step as a pure function that is not jitted; see `make_train_step`."""
    feature_axes = model.feature_axes()

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if project and state.mask is not None:
            raise ValueError(
                'project=True: the state has a mask, and features of one orbit with different '
                'weights pruned cannot be equal; must be False'
            )
        noise_key = state.keys['perturbation']
        params = perturb.perturb_weights(
            perturbation,
            state.params,
            noise_key,
            state.step,
            feature_axes['params'],
            frozen=frozen,
        )
        params = _pruned(params, state.mask)
        symmetric = symmetry.is_symmetric_by_stream(params, feature_axes['params'], orbits)

        def loss_function(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
            logits_BxN, updated = model.apply(
                {'params': params, 'batch_stats': state.batch_stats},
                batch['image'],
                train=True,
                mutable=['batch_stats'],
                rngs={'dropout': jax.random.fold_in(state.keys['dropout'], state.step)},
            )
            loss = jnp.mean(cross_entropy(logits_BxN, batch['label']))
            return loss, (logits_BxN, flax.core.unfreeze(updated.get('batch_stats', {})))

        def perturbed_loss_function(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
            key = jax.random.fold_in(noise_key, state.step)
            if perturbation.kind == 'order':
                acting = reordered_sums(perturbation, params, key)
            else:
                acting = perturb.perturbed_outputs(perturbation, feature_axes['params'], key)
            with acting:
                return loss_function(params)

        gradient = jax.value_and_grad(loss_function, has_aux=True)
        if perturbation.kind in perturb.LAYER_KINDS:
            perturbed = jax.value_and_grad(perturbed_loss_function, has_aux=True)
            if perturbation.always_due:
                gradient = perturbed
            else:
                # Two whole programs, so that a step without it has the ordinary arithmetic.
                due = perturbation.due(state.step)
                gradient = functools.partial(jax.lax.cond, due, perturbed, gradient)
        (loss, (logits_BxN, batch_stats)), grads = gradient(params)
        grads = perturb.perturb_gradients(
            perturbation, grads, noise_key, state.step, feature_axes['params']
        )
        updates, opt_state = tx.update(grads, state.opt_state, params)
        params = _pruned(optax.apply_updates(params, updates), state.mask)
        if project:
            params = symmetry.project(params, feature_axes['params'], orbits)
            batch_stats = symmetry.project(batch_stats, feature_axes['batch_stats'], orbits)

        metrics = {
            'loss': loss,
            'accuracy': accuracy(logits_BxN, batch['label']),
            'grad_norm': optax.tree.norm(
                jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), grads)
            ),
        }
        finite = _all_finite((metrics, params, batch_stats, opt_state))
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            mask=state.mask,
            opt_state=opt_state,
            keys=state.keys,
            # A quotient network has no streams, and leaves those of the state it began with.
            broken_streams=state.broken_streams
            | {
                stream: _first_time(state.broken_streams[stream], ~equal, state.step)
                for stream, equal in symmetric.items()
            },
            nonfinite_at_step=_first_time(state.nonfinite_at_step, ~finite, state.step + 1),
        )
        return new_state, metrics

    return train_step


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    determinism: str = 'deterministic',
    perturbation: perturb.Perturbation = perturb.NONE,
    project: bool = False,
    orbits: symmetry.Orbits | None = None,
    frozen: str = '',
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted train step (state, batch) -> (state, metrics); the state's buffers are donated.

    Args:
        model: a network with `feature_axes`.
        tx: the optimizer.
        determinism: 'deterministic' or 'hardware', see `zerojax.step.determinism`.
        perturbation: see `zerojax.perturb`.
        project: whether the new weights and statistics are projected onto the symmetric subspace,
            so that no asymmetry outlives a step, whatever the kernels do.
        orbits: which features are meant to be equal, by default all of a layer.
        frozen: regular expression on paths of the parameters that `tx` freezes
            (`zerojax.step.optimizer.freeze`): a perturbation of weights leaves them alone as well.

    The batch is {'image': float [B, H, W, C], 'label': int32 [B] or probabilities [B, N]}; the
    metrics are scalars of this batch: 'loss' (mean cross-entropy, nats), 'accuracy' and 'grad_norm'
    (L2, without weight decay).

    Raises:
        ValueError: the mode cannot be granted on this backend or in this process. When it is first
            called: `project` with a state that has a mask, since the projection would bring pruned
            weights back.
    """
    train_step = train_step_function(
        model, tx, perturbation=perturbation, project=project, orbits=orbits, frozen=frozen
    )
    return jit_in_mode(train_step, determinism, donate_argnums=0)


def make_train_steps(
    one_step: Callable[[TrainState, Tree], tuple[TrainState, Metrics]],
    *,
    determinism: str,
    steps_per_call: int,
    backend: str | None = None,
    out_shardings: Any = None,
) -> Any:
    """Several train steps in one dispatch: jitted (state, data, count) -> (state, last metrics).

    `one_step(state, data)` is pure and returns the next state and the step's metrics. `count`
    (int32 [], between 1 and `steps_per_call`) is a traced number, so all counts share one
    executable and one arithmetic. The state's buffers are donated. `backend` is where it will run,
    by default JAX's. `out_shardings` are those of (state, metrics); by default JAX chooses.

    Raises:
        ValueError: the mode cannot be granted on this backend or in this process.
    """

    def many_steps(state: TrainState, data: Tree, count: jax.Array) -> tuple[TrainState, Metrics]:
        shapes = jax.eval_shape(one_step, state, data)[1]
        metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.fori_loop(
            0, count, lambda _, carry: one_step(carry[0], data), (state, metrics)
        )

    def single_step(state: TrainState, data: Tree, count: jax.Array) -> tuple[TrainState, Metrics]:
        del count
        return one_step(state, data)

    # XLA's CPU convolutions lose their threads inside a loop, so one step is not wrapped in one.
    steps = single_step if steps_per_call == 1 else many_steps
    return jit_in_mode(
        steps, determinism, backend=backend, donate_argnums=0, out_shardings=out_shardings
    )
