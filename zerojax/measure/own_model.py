"""Anyone's model, from a function and its weights to the onset of training.

    model = own_model.Model(apply, params, tx, loss, batches)
    print(own_model.predict(model, scales=(1e-8, 1e-6)))

says how fast a small asymmetry of each stream grows along the run whose features all start equal,
and after how many updates noise of these sizes on the initial weights will have made them different
(linear prediction, see `zerojax.stability`). `own_model.measure` trains the network itself, with
such noise or without. Given the same network with any number of features (`make`), reduced
networks follow it past the linear law, see `zerojax.measure.reduced`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from zerojax import perturb, symmetry
from zerojax.measure import optimizers, prediction, reduced, stability
from zerojax.measure.prediction import Curves
from zerojax.measure.stability import State
from zerojax.step.determinism import jit_in_mode
from zerojax.symmetry.check import fitted
from zerojax.symmetry.orbits import feature_counts
from zerojax.symmetry.trial import first_line

__all__ = ['Model', 'Prediction', 'check_predictable', 'measure', 'predict']

Tree = Any
Apply = Callable[..., Tree]
Batch = tuple[Tree, Tree]


class Model:
    """A network and how it is trained.

    Args:
        apply: a pure (params, *inputs) -> outputs, as in training but without dropout. Running
            averages, which training does not read, are left out.
        params: any pytree of floats, all features of each stream equal.
        tx: the optimizer.
        loss: a pure (outputs, targets) -> scalar.
        batches: (inputs, targets) of each step, in order: a list. Inputs are a tuple, or the only
            one, such as an array.
        axes: which axes of the params are indexed by the same features, a tree like params
            (`zerojax.symmetry`); None: they are inferred.
        make: a function {stream: number of features} -> the same network's apply with so many, for
            the reduced prediction; its params have the same structure.

    Attributes:
        params: as nested dictionaries, by the paths of the arrays, whatever tree they were.
        axes: the feature axes of these, likewise.
        streams: {stream: number of features}.
        report: what the inference of the axes said; '' if they were given.

    Raises:
        ValueError: one of these is not as it must be.
    """

    def __init__(
        self,
        apply: Apply,
        params: Tree,
        tx: optax.GradientTransformation,
        loss: Callable[[Tree, Tree], jax.Array],
        batches: Sequence[Batch],
        axes: Tree = None,
        make: Callable[[dict[str, int]], Apply] | None = None,
    ) -> None:
        _check_params(params)
        _check_batches(batches)
        self.apply, self.tx, self.loss, self.batches, self.make = apply, tx, loss, batches, make
        self.report = ''
        self.reductions: dict[int, Any] = {}  # of `reduced.networks`, which are tried out once
        if axes is None:
            inferred = symmetry.infer_feature_axes(apply, params, batches[0][0])
            axes, self.report = inferred.axes, str(inferred.report)
        _, _, declared = fitted(params, axes)
        self._treedef = jax.tree.structure(params)
        self._paths = [
            tuple(jax.tree_util.keystr((key,), simple=True) for key in path) or ('params',)
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        self.params = self.nested(jax.tree.map(jnp.asarray, params))
        self.axes = unflatten_dict(dict(zip(self._paths, declared, strict=True)))
        self.streams = feature_counts(self.params, self.axes)
        if not self.streams:
            raise ValueError(
                'axes: no axis has a name, so there is no symmetry to break\n' + self.report
            )
        _check_loss(self)
        _check_optimizer(self)
        _check_steps(self)

    def nested(self, tree: Tree) -> Tree:
        """A tree like the user's params as nested dictionaries."""
        return unflatten_dict(dict(zip(self._paths, jax.tree.leaves(tree), strict=True)))

    def restored(self, nested: Tree) -> Tree:
        """The other way."""
        flat = flatten_dict(nested)
        return jax.tree.unflatten(self._treedef, [flat[path] for path in self._paths])

    def call(self, apply: Apply, params: Tree, inputs: Tree) -> Tree:
        """What a function like `apply` gives for params that are nested dictionaries."""
        return apply(self.restored(params), *_arguments(inputs))

    def step(self, state: State, batch: Batch) -> State:
        """One update of a state (params, optimizer state), as `zerojax.stability` takes it."""
        inputs, targets = batch

        def loss(params: Tree) -> jax.Array:
            return self.loss(self.apply(params, *_arguments(inputs)), targets)

        params = self.restored(state[0])
        updates, opt_state = self.tx.update(jax.grad(loss)(params), state[1], params)
        return self.nested(optax.apply_updates(params, updates)), opt_state

    def start(self, scale: float = 0.0, seed: int = 0) -> State:
        """The state before the first step, with gaussian noise of this scale on all weights."""
        params = self.params
        if scale:
            params = perturb.gaussian(params, jax.random.key(seed), scale)
        return params, self.tx.init(self.restored(params))


def _arguments(inputs: Tree) -> tuple[Tree, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What small noise on the initial weights will come to.

    Attributes:
        streams: {stream: number of features}.
        growth: {stream: mean slope of the natural logarithm of its asymmetry over the second half
            of the steps; None where it has none}.
        linear: {scale: {stream: natural logarithm of its asymmetry, [steps + 1]}}, by the linear
            law.
        reduced: {scale: the same by a reduced network, of each seed of the noise}; empty without
            `make`.
        report: of the inference of the axes.
    """

    streams: dict[str, int]
    growth: dict[str, float | None]
    linear: dict[float, Curves]
    reduced: dict[float, list[Curves]]
    report: str

    def onset(self, scale: float, stream: str | None = None) -> int | None:
        """The number of updates after which the asymmetry of a stream, or the largest of all, first
        is 0.1 by the linear law; None if it never is."""
        curves = self.linear[scale]
        return stability.predict_onset(
            prediction.largest(curves) if stream is None else curves[stream]
        )

    def __str__(self) -> str:
        width = max(23, *map(len, self.streams)) + 1
        row = f'{{:<{width}}}' + '{:>9}{:>15}' + '{:>12}' * len(self.linear)
        onsets = [f'{scale:g}' for scale in self.linear]
        lines = [row.format('stream', 'features', 'growth a step', *onsets)]
        for stream, count in self.streams.items():
            growth = self.growth[stream]
            cells = [_shown(self.onset(scale, stream)) for scale in self.linear]
            slope = '-' if growth is None else f'{growth:+.4f}'
            lines.append(row.format(stream, count, slope, *cells))
        cells = [_shown(self.onset(scale)) for scale in self.linear]
        lines.append(row.format('any', '', '', *cells))
        return '\n'.join(
            [*lines, 'onset: the step at which noise of that scale has an asymmetry of 0.1']
        )


def _shown(onset: int | None) -> str:
    return 'never' if onset is None else str(onset)


def predict(
    model: Model,
    scales: Sequence[float] = (1e-6,),
    steps: int = 400,
    *,
    features: int = 8,
    seeds: int = 5,
) -> Prediction:
    """What gaussian noise of these scales on all initial weights will come to.

    Linear: one symmetric run of the network itself, with a derivative for each stream, so that a
    step takes the time of about three train steps for each. Reduced, if the model has `make`: by
    networks of some features a stream, for several draws of the noise.

    Args:
        model: with its features equal at the start.
        scales: standard deviations of the noise.
        steps: how many are looked at; no more than there are batches.
        features: of each stream of the reduced networks, at least 4.
        seeds: number of draws that they follow, 0, 1, ...; the first is that of the linear
            prediction. `measure` draws the same.

    Raises:
        ValueError: as `check_predictable`, or the step or its derivative is not finite.
    """
    if not all(scale > 0 for scale in scales):
        raise ValueError(f'scales={scales}: must be above 0')
    numbers = [('steps', steps, 1)]
    if model.make:
        numbers += [('seeds', seeds, 1), ('features', features, prediction.ALONE + 1)]
    for name, number, least in numbers:
        if number < least:
            raise ValueError(f'{name}={number}: must be at least {least}')
    check_predictable(model, features)
    noises = [_unit_noise(model, seed) for seed in range(seeds if model.make else 1)]
    active, passive = _of_unit(model, noises[0], steps)
    of_unit = {name: np.maximum(active[name], passive[name]) for name in model.streams}
    return Prediction(
        streams=model.streams,
        growth={name: prediction.growth_per_step(curve) for name, curve in of_unit.items()},
        linear={
            scale: {name: curve + math.log(scale) for name, curve in of_unit.items()}
            for scale in scales
        },
        reduced=reduced.follow(model, scales, steps, features, noises, passive)
        if model.make
        else {},
        report=model.report,
    )


def _of_unit(model: Model, noise: Tree, steps: int) -> tuple[Curves, Curves]:
    """Each stream's curve per unit of scale: of its own part of the noise, and of what is left."""
    batches = model.batches[:steps]
    tangents, owners = _tangents(noise, model.axes)
    none = np.full(len(batches) + 1, -np.inf)
    if not owners:  # streams of a single feature
        return (dict.fromkeys(model.streams, none),) * 2
    tangents = jax.tree.map(lambda x, like: x.astype(like.dtype), tangents, model.params)
    growth = stability.growth(model.step, model.start(), batches, tangents, model.axes)

    def curve(stream: str, owner: str | None) -> np.ndarray:
        if owner not in owners:
            return none
        return growth.log_by_stream[stream][:, owners.index(owner)]

    active = {name: curve(name, name) for name in model.streams}
    # What is left of the noise differs along a stream only if that has several features.
    passive = {
        name: curve(name, None) if count > 1 else none for name, count in model.streams.items()
    }
    return active, passive


def measure(
    model: Model, scale: float = 0.0, steps: int = 400, seed: int = 0
) -> dict[str, np.ndarray]:
    """Trains the network from noise of this scale; the asymmetry of each stream, [steps + 1].

    Without noise (0.0) it is exactly 0 as long as equal features stay equal to the bit. NaN once a
    weight is not finite.
    """
    advance = jit_in_mode(model.step, 'deterministic')
    asymmetry = jit_in_mode(
        lambda params: prediction.while_finite(
            params, symmetry.asymmetry_by_stream(params, model.axes)
        ),
        'deterministic',
    )
    state = model.start(scale, seed)
    found = [asymmetry(state[0])]
    for batch in model.batches[:steps]:
        state = advance(state, batch)
        found.append(asymmetry(state[0]))
    found = jax.device_get(found)
    return {name: np.array([each[name] for each in found], np.float64) for name in model.streams}


def check_predictable(model: Model, features: int = 8) -> None:
    """Checks all of a model that can be known before it is trained.

    Raises:
        ValueError: features of a stream start unequal, the optimizer takes signs of gradients,
            `features` are too few, or what `make` gives is not the same network, or is not trained
            as it is.
    """
    unique = symmetry.unique_features_by_stream(jax.device_get(model.params), model.axes)
    unequal = [f'{name} has {n} different ones' for name, n in unique.items() if n > 1]
    if unequal:
        raise ValueError(
            f'params: all features of a stream must start equal, but {", ".join(unequal)}; make '
            'the initial weights constant along its axes'
        )
    if not optimizers.follows_gradients(model.tx, model.restored(model.params)):
        raise ValueError(
            'tx: takes signs of gradients, as Lion does, which has the derivative 0 whatever the '
            'noise comes to, so nothing can be predicted; `measure` trains the model'
        )
    if model.make:
        reduced.networks(model, features)


def _unit_noise(model: Model, seed: int) -> Tree:
    """What `Model.start` adds per unit of scale, in NumPy arrays of float64."""
    zeros = jax.tree.map(jnp.zeros_like, model.params)
    noise = jax.device_get(perturb.gaussian(zeros, jax.random.key(seed), 1.0))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), noise)


def _tangents(noise: Tree, axes: Tree) -> tuple[Tree, list[str | None]]:
    """The noise in parts, [parts, ...], and whose each is.

    One for each stream, in which its features differ and those of all others do not; and what is
    left, of arrays of two streams, None. In one array two streams would drown each other's digits
    once one has grown far beyond the other.
    """
    streams = [name for name, count in feature_counts(noise, axes).items() if count > 1]
    parts: dict[Any, list[np.ndarray]] = {}
    for path, x, names in symmetry.named_axes(noise, axes):
        of_stream = {stream: np.zeros_like(x) for stream in streams}
        for axis, name in names.items():
            if name in of_stream:
                of_stream[name] = of_stream[name] + prediction.own_part(x, axis, names)
        parts[path] = [*of_stream.values(), prediction.passive_part(x, names)]
    owners: list[str | None] = [*streams, None]
    if not any(each[-1].any() for each in parts.values()):
        owners.pop()
    if not owners:
        return {}, owners
    kept = {path: jnp.asarray(np.stack(each[: len(owners)])) for path, each in parts.items()}
    return unflatten_dict(kept), owners


def _check_params(params: Tree) -> None:
    for path, x in zip(perturb.paths_of(params), jax.tree.leaves(params), strict=True):
        if not hasattr(x, 'dtype') or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f'params: {path} is {getattr(x, "dtype", type(x).__name__)}; must be floats, all '
                'of which are trained; put what is not into apply'
            )
        if 0 in x.shape:
            raise ValueError(f'params: {path} has the shape {x.shape}, so is empty; leave it out')


def _check_batches(batches: Sequence[Batch]) -> None:
    if not isinstance(batches, Sequence) or not batches:
        raise ValueError(
            'batches: must be a list of (inputs, targets), one for each step; of a generator take '
            'list(itertools.islice(batches, 400))'
        )
    for i, batch in enumerate(batches):
        if not isinstance(batch, tuple) or len(batch) != 2:
            what = f'a tuple of {len(batch)}' if isinstance(batch, tuple) else type(batch).__name__
            raise ValueError(f'batches: number {i} is {what}; each must be (inputs, targets)')


def _check_loss(model: Model) -> None:
    inputs, targets = model.batches[0]
    outputs = jax.eval_shape(model.apply, model.restored(model.params), *_arguments(inputs))
    found = jax.eval_shape(model.loss, outputs, targets)
    if getattr(found, 'shape', None) != ():
        raise ValueError(f'loss: returns {found}; must be a scalar, such as the mean of the batch')
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f'loss: returns {found.dtype}; must be a float, which has a gradient')


def _check_optimizer(model: Model) -> None:
    def updates(params: Tree) -> Tree:
        params = model.restored(params)
        return model.tx.update(params, model.tx.init(params), params)[0]

    try:
        jax.eval_shape(updates, model.params)
    except Exception as error:
        raise ValueError(
            f'tx: fails ({type(error).__name__}: {first_line(error)}); must be an optimizer of '
            'Optax for these params, whose update takes gradients, state and params alone'
        ) from error


def _check_steps(model: Model) -> None:
    """Raises what a step would, as of batches that do not fit the function, before any is taken."""
    state = jax.eval_shape(model.start)
    shapes = (jax.eval_shape(lambda batch: batch, each) for each in model.batches)
    for batch in {str(each): each for each in shapes}.values():
        jax.eval_shape(model.step, state, batch)
