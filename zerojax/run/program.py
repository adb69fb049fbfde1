"""What a run compiles, shared by all runs that differ only in the numbers of `SCALARS`.

These numbers are arguments of the compiled functions, so a run computes the same bits whether its
program was compiled for it alone or for a whole sweep. Several such runs can also be computed at
once, as one batched program: then every array of their states has a leading axis [R], and their
bits are those of that program.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax import symmetry
from zerojax.host import distributed
from zerojax.host.errors import UsageError
from zerojax.measure import step_audit
from zerojax.run import data
from zerojax.run.evaluate import make_evaluation, make_layer_measurement
from zerojax.step import (
    Batch,
    Metrics,
    TrainState,
    create_state,
    determinism,
    make_train_steps,
    optimizer,
    train_step_function,
)

# Fields that a compiled program takes as arguments. Not perturbation.at_step: where it differs
# between batched runs, all of them would draw the noise at every step.
SCALARS = (
    'seed',
    'perturbation.seed',
    'perturbation.scale',
    'optimizer.learning_rate',
    'optimizer.momentum',
    'optimizer.weight_decay',
)

Scalars = dict[str, Any]


class Source(NamedTuple):
    """What the train steps of an epoch read.

    Attributes:
        examples: the training set, {'image': uint8 [N, H, W, C], 'label': int32 [N]}.
        order: that of the epoch, int32 [N]; of batched runs [R, N].
        scalars: the runs' `SCALARS`, each []; of batched runs [R].
    """

    examples: Batch
    order: jax.Array
    scalars: Scalars


def scalars_of(config: ConfigDict) -> Scalars:
    """The config's `SCALARS`: int32 [], and floats [] of float32, or float64 where JAX has it."""
    flat = flatten_dict(config.to_dict(), sep='.')
    float_dtype = jax.dtypes.canonicalize_dtype(np.float64)
    return {
        field: np.asarray(flat[field], np.int32 if isinstance(flat[field], int) else float_dtype)
        for field in SCALARS
    }


def structure(config: ConfigDict) -> str:
    """All other fields of a resolved config: runs for which it is equal share a program.

    Which weights are pruned is no matter of the program, only whether any are.
    """
    flat = flatten_dict(config.to_dict(), sep='.')
    rest = {k: v for k, v in flat.items() if k not in SCALARS and not k.startswith('pruning.')}
    return json.dumps(rest | {'pruning': bool(config.pruning.source)}, sort_keys=True)


class Program:
    """The compiled functions of a resolved config, and its data on the device.

    Args:
        config: as `checks.resolve` returns it; its `SCALARS` are not looked at.
        dataset: the config's data.
        runs: None, or how many runs are computed at once.

    Attributes:
        everywhere: sharding of what has a copy on each device; None on a single one.

    On several devices, see `build_mesh`, arrays of batched runs are spread along the mesh's axis
    'run', every batch along its axis 'data'; means over a batch, those of BatchNorm too, are over
    the whole of it. Everything else has a copy on each device.

    Raises:
        UsageError: there are not as many devices, they cannot share the batch evenly, or the
            network is too large for them.
    """

    def __init__(self, config: ConfigDict, dataset: data.Dataset, runs: int | None = None) -> None:
        self.config = config
        self.dataset = dataset
        self.runs = runs
        check_memory(config, dataset)
        self.model = config_lib.build_model(config, dataset.num_classes)
        self.feature_axes = self.model.feature_axes()['params']
        self.orbits = build_orbits(config, dataset)
        self.mesh = build_mesh(config, runs)
        self._for_each_run = None if self.mesh is None else NamedSharding(self.mesh, P('run'))
        self.everywhere = None if self.mesh is None else NamedSharding(self.mesh, P())
        self.make_batch = make_batch_function(config, dataset.num_classes, self.mesh)
        self._jit = functools.partial(determinism.jit_in_mode, mode=config.determinism.mode)
        self._executable: Any = None

    @functools.cached_property
    def examples(self) -> Batch:
        """The training set, on the device."""
        split = self.dataset.train
        return jax.device_put({'image': split.images, 'label': split.labels}, self.everywhere)

    @functools.cached_property
    def initial_state(self) -> Callable[[Scalars], TrainState]:
        """Jitted scalars -> state before the first step."""
        new = functools.partial(new_state, self.config, self.dataset)
        return self._jit(
            self._for_all_runs(new, out_axes=self._state_axes()),
            out_shardings=self._state_shardings(),
        )

    @functools.cached_property
    def epoch_order(self) -> Callable[[jax.Array, int], jax.Array]:
        """Jitted (keys of the purpose 'order', epoch) -> the order of examples in the epoch."""
        num_examples = len(self.dataset.train.labels)
        order = functools.partial(data.epoch_order, num_examples=num_examples)
        return self._jit(
            self._for_all_runs(order, in_axes=(0, None)), out_shardings=self._run_sharding()
        )

    def one_step(self, state: TrainState, source: Source) -> tuple[TrainState, Metrics]:
        """A single run's train step, pure."""
        train_step = train_step_function(
            self.model,
            build_optimizer(self.config, source.scalars),
            perturbation=config_lib.build_perturbation(
                self.config, source.scalars['perturbation.scale']
            ),
            project=self.config.symmetry.project,
            orbits=self.orbits,
        )
        return train_step(state, self.make_batch(state, source))

    @functools.cached_property
    def train_steps(self) -> Any:
        """Jitted (state, source, count) -> (state, last metrics), see `step.make_train_steps`."""
        whole: Any = None  # all runs read the same examples
        each: Any = 0
        axes = self._state_axes(), Source(whole, order=each, scalars=each)
        return make_train_steps(
            self._for_all_runs(self.one_step, axes, (self._state_axes(), 0)),
            determinism=self.config.determinism.mode,
            steps_per_call=self.config.steps_per_call,
            out_shardings=(self._state_shardings(), self._run_sharding()),
        )

    @functools.cached_property
    def evaluate(self) -> Callable[[TrainState], dict[str, Any]]:
        """state -> {'loss', 'accuracy'} on the held-out set."""
        return make_evaluation(
            self.config, self.dataset, self.model, self._for_all_runs, self._batch_sharding()
        )

    @functools.cached_property
    def measure_layers(self) -> Callable[[TrainState], Any]:
        """state -> what the 'layers' lines of metrics.jsonl hold, on the host."""
        return make_layer_measurement(
            self.config, self.dataset, self._for_all_runs, self._batch_sharding()
        )

    @functools.cached_property
    def measure_asymmetry(self) -> Callable[[Any], dict[str, jax.Array]]:
        """Jitted params -> asymmetry of each layer."""
        return self._jit(
            self._for_all_runs(
                functools.partial(
                    symmetry.asymmetry, feature_axes=self.feature_axes, orbits=self.orbits
                )
            )
        )

    def compile_train_steps(self, state: TrainState, source: Source) -> Any:
        """`train_steps` as an executable for arguments of these shapes, compiled once."""
        if self._executable is None:
            self._executable = self.train_steps.lower(state, source, np.int32(1)).compile()
        return self._executable

    def unique_features(self, params: Any) -> Any:
        """Number of unique features of each layer, for each run."""
        counts = [
            symmetry.unique_features(each, self.feature_axes, self.orbits)
            for each in self.split(distributed.fetch(params))
        ]
        return jax.tree.map(lambda *x: np.stack(x), *counts) if self.runs else counts[0]

    def place_scalars(self, scalars: list[Scalars]) -> Scalars:
        """The scalars of all runs, on the device."""
        if self.runs is None:
            (placed,) = scalars
        else:
            placed = jax.tree.map(lambda *x: np.stack(x), *scalars)
        return jax.device_put(placed, self._run_sharding())

    def stack_states(self, states: list[TrainState]) -> TrainState:
        """One state for the batched functions; all are at the same step, kept as one number."""
        if self.runs is None:
            (state,) = states
            return state

        def stack(states: list[TrainState]) -> TrainState:
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
            return dataclasses.replace(stacked, step=states[0].step)

        return jax.jit(stack, out_shardings=self._state_shardings())(states)

    def split(self, tree: Any) -> list[Any]:
        """A tree for each run, from what the functions return."""
        if self.runs is None:
            return [tree]
        leaves, definition = jax.tree.flatten(tree)
        return [jax.tree.unflatten(definition, [x[i] for x in leaves]) for i in range(self.runs)]

    def split_state(self, state: TrainState) -> list[TrainState]:
        """The state of each run."""
        if self.runs is None:
            return [state]
        return [self._run_of(state, i) for i in range(self.runs)]

    @functools.cached_property
    def _run_of(self) -> Callable[[TrainState, int], TrainState]:
        none: Any = None

        def take(state: TrainState, i: jax.Array) -> TrainState:
            own = jax.tree.map(lambda x: x[i], dataclasses.replace(state, step=none))
            return dataclasses.replace(own, step=state.step)

        return jax.jit(take, out_shardings=self.everywhere)

    def _state_axes(self) -> Any:
        # All runs are at the same step, so what is due at a step is decided once, not per run.
        axes: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(TrainState)}
        return TrainState(**(axes | {'step': None}))

    def _for_all_runs(self, function: Any, in_axes: Any = 0, out_axes: Any = 0) -> Any:
        if self.runs is None:
            return function
        along = None if self.mesh is None else 'run'
        return jax.vmap(function, in_axes, out_axes, spmd_axis_name=along)

    def _run_sharding(self) -> Any:
        return self.everywhere if self.runs is None else self._for_each_run

    def _state_shardings(self) -> Any:
        if self.runs is None:
            return self.everywhere
        shardings = dict.fromkeys(field.name for field in dataclasses.fields(TrainState))
        shardings = dict.fromkeys(shardings, self._for_each_run) | {'step': self.everywhere}
        return TrainState(**shardings) if self.mesh is not None else None

    def _batch_sharding(self) -> Any:
        return None if self.mesh is None else NamedSharding(self.mesh, P('data'))


class Programs:
    """The newest dataset and program, for runs of one structure that follow one another."""

    def __init__(self) -> None:
        self._datasets: dict[str, data.Dataset] = {}
        self._programs: dict[tuple[str, int | None], Program] = {}

    def dataset(self, config: ConfigDict) -> data.Dataset:
        """The config's data.

        Raises:
            UsageError: as `data.load`.
        """
        s = config.dataset
        what = (s.name, s.data_dir, s.train_split, s.eval_split)
        if repr(what) not in self._datasets:
            self._datasets = {repr(what): data.load(*what)}
        return self._datasets[repr(what)]

    def program(self, config: ConfigDict, dataset: data.Dataset, runs: int | None) -> Program:
        """The program of a resolved config, see `Program`."""
        what = (structure(config), runs)
        if what not in self._programs:
            self._programs = {what: Program(config, dataset, runs)}
        return self._programs[what]


def build_schedule(config: ConfigDict, learning_rate: Any) -> Callable[[Any], Any]:
    """Learning rate of update n (from 0), in a run that starts with `learning_rate`."""
    settings = config.optimizer
    return optimizer.step_schedule(
        learning_rate, config.num_steps, settings.drop_at, settings.drop_factor
    )


def build_optimizer(config: ConfigDict, scalars: Scalars) -> Any:
    """The config's optax transformation, with these numbers."""
    settings, dtype = config.optimizer, jnp.dtype(config.param_dtype)
    schedule = build_schedule(config, scalars['optimizer.learning_rate'])
    decay = jnp.asarray(scalars['optimizer.weight_decay'], dtype)
    if settings.name == 'sgd':
        momentum = jnp.asarray(scalars['optimizer.momentum'], dtype)
        tx = optimizer.sgd(schedule, momentum, settings.nesterov, decay)
    else:
        tx = optimizer.radam(schedule, settings.b1, settings.b2, decay)
    return optimizer.freeze(tx, settings.freeze) if settings.freeze else tx


def build_orbits(config: ConfigDict, dataset: data.Dataset) -> symmetry.Orbits | None:
    """Which features the config's network is meant to have equal; None: all of a layer."""
    model = config_lib.build_model(config, dataset.num_classes)
    noiseless = model.noiseless()
    if noiseless is None:
        return None
    images = jnp.zeros((1, *dataset.train.images.shape[1:]))
    init = jax.jit(functools.partial(noiseless.init, train=False))
    params = init(jax.random.key(0), images)['params']
    return symmetry.find_orbits(params, model.feature_axes()['params'])


def new_state(config: ConfigDict, dataset: data.Dataset, scalars: Scalars) -> TrainState:
    """The state before the first step; with pruning, its mask still keeps every weight."""
    state = create_state(
        config_lib.build_model(config, dataset.num_classes),
        build_optimizer(config, scalars),
        dataset.train.images.shape[1:],
        seed=scalars['seed'],
        perturbation_seed=scalars['perturbation.seed'],
        dtype=jnp.dtype(config.param_dtype),
    )
    if config.pruning.source:
        mask = jax.tree.map(lambda x: jnp.ones(x.shape, bool), state.params)
        state = dataclasses.replace(state, mask=mask)
    return state


def check_memory(config: ConfigDict, dataset: data.Dataset) -> None:
    """Checks that a run's weights, their gradient and the optimizer's state fit into memory.

    Activations come on top; what they need is known only to the compiler.

    Raises:
        UsageError: they do not.
    """
    new = functools.partial(new_state, config, dataset)
    state = jax.eval_shape(new, scalars_of(config))
    arrays = jax.tree.leaves((state.params, state.params, state.opt_state, state.batch_stats))
    needed = sum(x.size * x.dtype.itemsize for x in arrays)
    there = device_memory()
    if needed > there:
        count = sum(x.size for x in jax.tree.leaves(state.params))
        raise UsageError(
            f'model.width={config.model.width}, model.depth={config.model.depth}: {count:,} '
            f'weights with gradient and optimizer need {needed / 2**30:,.1f} GiB of memory; '
            f'must be at most {there / 2**30:,.1f}, what there is'
        )


def device_memory() -> int:
    """Bytes of memory that a device has; for CPUs, that the machine has."""
    stats = jax.local_devices()[0].memory_stats() or {}  # CPUs have none
    return stats.get('bytes_limit') or os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def build_mesh(config: ConfigDict, runs: int | None) -> Mesh | None:
    """Axis 'data' of `config.mesh.data` devices, and 'run' of as many more as batched runs can use.

    These are the most devices there are that divide the number of runs. None if it is one device.

    Raises:
        UsageError: names `mesh.data`, and why the devices do not fit.
    """
    along_data, number, processes = config.mesh.data, jax.device_count(), jax.process_count()
    if along_data > number:
        raise UsageError(f'mesh.data={along_data}: must be at most {number}, the devices there are')
    if config.batch_size % along_data:
        raise UsageError(
            f'mesh.data={along_data}: must divide batch_size={config.batch_size} evenly'
        )
    runs = runs or 1
    along_run = max(n for n in range(1, number // along_data + 1) if runs % n == 0)
    if along_run * along_data == 1 and processes == 1:
        return None
    if processes > 1 and along_run * along_data != number:
        raise UsageError(
            f'mesh.data={along_data}: {runs} runs at once use {along_run * along_data} devices; '
            f'all {number} of the {processes} processes must be used'
        )
    devices = np.array(jax.devices()[: along_run * along_data])
    return Mesh(devices.reshape(along_run, along_data), ('run', 'data'))


def make_batch_function(
    config: ConfigDict, num_classes: int, mesh: Mesh | None = None
) -> Callable[[TrainState, Source], Batch]:
    """A pure (state, source) -> batch of the state's step, spread over the mesh's axis 'data'."""
    mean, std = (np.array(x, np.float32) for x in (config.dataset.mean, config.dataset.std))

    def make_batch(state: TrainState, source: Source) -> Batch:
        indices = data.batch_indices(source.order, state.step, config.batch_size)
        if mesh is not None:
            indices = jax.lax.with_sharding_constraint(indices, NamedSharding(mesh, P('data')))
        images = source.examples['image'][indices]
        labels = source.examples['label'][indices]
        keys = {
            purpose: jax.random.fold_in(state.keys[purpose], state.step)
            for purpose in ('augmentation', 'cutout', 'mixup')
        }
        if config.dataset.augment:
            images = data.augment(keys['augmentation'], images)
        images = data.normalize(images, mean, std)
        if config.dataset.cutout > 0:
            images = data.cutout(keys['cutout'], images, config.dataset.cutout)
        if config.dataset.mixup > 0:
            images, labels = data.mixup(
                keys['mixup'], images, labels, num_classes, config.dataset.mixup
            )
        return {'image': images, 'label': labels}

    return make_batch


def symmetric(program: Program, state: TrainState) -> TrainState:
    """`step_audit.symmetric_state` of a program's run."""
    tx = build_optimizer(program.config, scalars_of(program.config))
    state = step_audit.symmetric_state(state, program.model, tx, program.orbits)
    return jax.device_put(state, program.everywhere)


def compile_inspection(program: Program, state: TrainState, source: Source) -> Any:
    """What `step_audit.CompiledStep` calls beside the train steps, without dropout."""
    config = ConfigDict(program.config.to_dict())
    config.model.dropout = 0.0
    inspect = step_audit.make_inspection(
        config_lib.build_model(config, program.dataset.num_classes), program.make_batch
    )
    inspect = determinism.jit_in_mode(
        inspect, config.determinism.mode, out_shardings=program.everywhere
    )
    return inspect.lower(state, source).compile()
