"""What a run compiles, shared by all runs that differ only in the numbers of `SCALARS`.

These numbers are arguments of the compiled functions, so a run computes the same bits whether its
program was compiled for it alone or for a whole sweep. Several such runs can also be computed at
once, as one batched program: then every array of their states has a leading axis [R], and their
bits are those of that program.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax import symmetry
from zerojax.host import distributed
from zerojax.measure import metrics
from zerojax.run import data
from zerojax.run.building import (
    Scalars,
    Source,
    build_mesh,
    build_optimizer,
    build_orbits,
    examples_of,
    keeps_last,
    make_batch_function,
    new_state,
    scalars_of,
    steps_per_epoch,
    structure,
)
from zerojax.run.checks import check_memory
from zerojax.run.evaluate import Evaluation, LayerMeasurement
from zerojax.run.executable import Executable
from zerojax.step import (
    Batch,
    Metrics,
    TrainState,
    batch,
    jit_in_mode,
    make_train_steps,
    train_step_function,
)

MEASURED_ON_HOST = 2**20  # weights of all runs together


class Program:
    """The compiled functions of a resolved config, and its data on the device.

    Args:
        config: as `checks.resolve` returns it; its `SCALARS` are not looked at.
        dataset: the config's data.
        runs: None, or how many runs are computed at once.
        devices: what it is compiled for, by default JAX's. They may be described only, and not be
            here: then the train steps can be compiled for `shapes`, and nothing can be run.

    Attributes:
        everywhere: sharding of what is on the device, or has a copy on each.
        steps_per_epoch: updates in an epoch.
        last_is_smaller: whether the last update of an epoch has a smaller batch than the others.

    On several devices, see `build_mesh`, arrays of batched runs are spread along the mesh's axis
    'run', every batch along its axis 'data'; means over a batch, those of BatchNorm too, are over
    the whole of it. Everything else has a copy on each device.

    Raises:
        UsageError: there are not as many devices, they cannot share the batch evenly, or the
            network is too large for them.
    """

    def __init__(
        self,
        config: ConfigDict,
        dataset: data.Dataset,
        runs: int | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.runs = runs
        self._devices = jax.devices() if devices is None else devices
        self._backend = None if devices is None else devices[0].platform
        self.model = config_lib.build_model(
            config, dataset.num_classes, batched=runs is not None, backend=self._backend
        )
        self._new_state = functools.partial(new_state, config, self.model, dataset.image_shape)
        if devices is None:
            check_memory(config, self._new_state)
        self.feature_axes = self.model.feature_axes()['params']
        self.orbits = build_orbits(self.model, dataset.image_shape)
        self.mesh = build_mesh(config, runs, self._devices)
        # Said of a single device too, as what checkpoints give back has one: so a run that goes on
        # is compiled as it was begun.
        self.everywhere: Sharding
        self._for_each_run: Sharding
        if self.mesh is not None:
            self.everywhere = NamedSharding(self.mesh, P())
            self._for_each_run = NamedSharding(self.mesh, P('run'))
        elif devices is not None:
            self.everywhere = self._for_each_run = SingleDeviceSharding(devices[0])
        else:  # where JAX puts arrays, see `jax.default_device`
            self.everywhere = self._for_each_run = jax.device_put(0).sharding
        self._make_batch = functools.partial(
            make_batch_function, config, dataset.image_shape, dataset.num_classes, self.mesh
        )
        self.make_batch = self._make_batch()
        self.steps_per_epoch = steps_per_epoch(config, len(dataset.train.labels))
        rest = len(dataset.train.labels) % config.batch_size
        self.last_is_smaller = keeps_last(config) and rest > 0
        self._jit = functools.partial(
            jit_in_mode, mode=config.determinism.mode, backend=self._backend
        )

    @functools.cached_property
    def examples(self) -> Batch:
        """The training set, on the device."""
        return jax.device_put(examples_of(self.dataset.train), self.everywhere)

    @functools.cached_property
    def initial_state(self) -> Callable[[Scalars], TrainState]:
        """Jitted scalars -> state before the first step."""
        return self._jit(
            self._for_all_runs(self._new_state, out_axes=self._state_axes()),
            out_shardings=self._state_shardings(),
        )

    @functools.cached_property
    def epoch_order(self) -> Callable[[jax.Array, int], jax.Array]:
        """Jitted (keys of the purpose 'order', epoch) -> the order of examples in the epoch."""
        num_examples = len(self.dataset.train.labels)
        order = functools.partial(batch.epoch_order, num_examples=num_examples)
        return self._jit(
            self._for_all_runs(order, in_axes=(0, None)), out_shardings=self._run_sharding()
        )

    def one_step(self, state: TrainState, source: Source) -> tuple[TrainState, Metrics]:
        """A single run's train step, pure."""
        return self._step(state, source, self.make_batch(state, source))

    def one_last_step(self, state: TrainState, source: Source) -> tuple[TrainState, Metrics]:
        """The same for the update that ends an epoch, where `last_is_smaller`."""
        return self._step(state, source, self._make_batch(last=True)(state, source))

    def _step(self, state: TrainState, source: Source, data: Batch) -> tuple[TrainState, Metrics]:
        train_step = train_step_function(
            self.model,
            build_optimizer(self.config, source.scalars),
            perturbation=config_lib.build_perturbation(
                self.config, source.scalars['perturbation.scale']
            ),
            project=self.config.symmetry.project,
            orbits=self.orbits,
            frozen=self.config.optimizer.freeze,
        )
        return train_step(state, data)

    @functools.cached_property
    def train_steps(self) -> Any:
        """Jitted (state, source, count) -> (state, last metrics), see `step.make_train_steps`."""
        return self._make_train_steps(self.one_step, self.config.steps_per_call)

    @functools.cached_property
    def _train_steps(self) -> Executable:
        return Executable(self.train_steps)

    @functools.cached_property
    def _last_step(self) -> Executable:
        return Executable(self._make_train_steps(self.one_last_step, steps_per_call=1))

    def _make_train_steps(self, one_step: Any, steps_per_call: int) -> Any:
        whole: Any = None  # all runs read the same examples
        each: Any = 0
        axes = self._state_axes(), Source(whole, order=each, scalars=each)
        return make_train_steps(
            self._for_all_runs(one_step, axes, (self._state_axes(), 0)),
            determinism=self.config.determinism.mode,
            steps_per_call=steps_per_call,
            backend=self._backend,
            out_shardings=(self._state_shardings(), self._run_sharding()),
        )

    @functools.cached_property
    def evaluate(self) -> Evaluation:
        """state -> {'loss', 'accuracy'} on the held-out set."""
        return Evaluation(
            self.config, self.dataset, self.model, self._for_all_runs, self._batch_sharding()
        )

    @functools.cached_property
    def measure_layers(self) -> LayerMeasurement:
        """state -> `metrics.of_layer_outputs`, on the host."""
        return LayerMeasurement(
            self.config,
            self.dataset,
            self.runs is not None,
            self._for_all_runs,
            self._batch_sharding(),
        )

    @functools.cached_property
    def measure_asymmetry(self) -> Executable:
        """params -> (asymmetry of each layer, of each stream)."""

        def measure(params: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
            return (
                symmetry.asymmetry(params, self.feature_axes, self.orbits),
                symmetry.asymmetry_by_stream(params, self.feature_axes, self.orbits),
            )

        return Executable(self._jit(self._for_all_runs(measure)))

    @functools.cached_property
    def measure_distance(self) -> Executable:
        """params -> distance of each stream."""

        def measure(params: Any) -> dict[str, jax.Array]:
            return symmetry.distance_by_stream(params, self.feature_axes, self.orbits)

        return Executable(self._jit(self._for_all_runs(measure)))

    @functools.cached_property
    def _measure_kernels(self) -> Executable:
        return Executable(self._jit(self._for_all_runs(metrics.of_kernels)))

    @contextlib.contextmanager
    def compiling_measurements(self, state: TrainState) -> Iterator[None]:
        """Compiles what an evaluation calls beside what is compiled within it.

        XLA's compiler does not keep all cores busy with one program.
        """
        lowered = [
            self.evaluate.lower(state),
            self.measure_layers.lower(state),
            self.measure_asymmetry.lower(state.params),
            self.measure_distance.lower(state.params),
        ]
        if not self._measures_on_host(state.params):
            lowered.append(self._measure_kernels.lower(state.params))
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
            compiled = thread.submit(lambda: [each.compile() for each in lowered])
            if jax.process_count() > 1:
                compiled.result()  # compilers may wait for those of other processes, in this order
            yield
            compiled.result()

    def source(self, state: TrainState, scalars: Scalars, epoch: int) -> Source:
        """What the train steps of an epoch (from 0) read, on the device."""
        return Source(self.examples, self.epoch_order(state.keys['order'], epoch), scalars)

    def shapes(self) -> tuple[TrainState, Source]:
        """What the train steps of a single run take, shapes and shardings in place of arrays."""
        state = jax.eval_shape(self._new_state, scalars_of(self.config))
        order = jax.eval_shape(self.epoch_order, state.keys['order'], 0)
        source = Source(examples_of(self.dataset.train), order, scalars_of(self.config))

        def placed(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.everywhere)

        return jax.tree.map(placed, (state, source))

    def compile_train_steps(self, state: TrainState, source: Source) -> Any:
        """`train_steps` as an executable for arguments of these shapes, compiled once."""
        return self._train_steps.lower(state, source, np.int32(1)).compile()

    def compile_last_step(self, state: TrainState, source: Source) -> Any:
        """The executable of the update that ends an epoch, where `last_is_smaller`; called as
        `train_steps`, with a count of 1."""
        return self._last_step.lower(state, source, np.int32(1)).compile()

    def _measures_on_host(self, params: Any) -> bool:
        return sum(x.size for x in jax.tree.leaves(params)) <= MEASURED_ON_HOST

    def measure_params(self, params: Any) -> tuple[Any, Any]:
        """(numbers of unique features of each layer and stream, `metrics.of_kernels`), for each
        run."""
        on_host = distributed.fetch(params)

        def of_each(function: Callable[[Any], Any]) -> Any:
            measured = [function(each) for each in self.split(on_host)]
            return jax.tree.map(lambda *x: np.stack(x), *measured) if self.runs else measured[0]

        def count(params: Any) -> dict[str, dict[str, int]]:
            what = params, self.feature_axes, self.orbits
            return {
                'unique_features': symmetry.unique_features(*what),
                'unique_features_by_stream': symmetry.unique_features_by_stream(*what),
            }

        counts = of_each(count)
        # Small kernels cost the host less than the compiler.
        if self._measures_on_host(params):
            with np.errstate(all='ignore'):  # weights may be infinite, of runs that have failed
                return counts, of_each(metrics.of_kernels)
        return counts, distributed.fetch(self._measure_kernels(params))

    def place(self, x: Any) -> Any:
        """The array on the device, or a copy of it on each."""
        return jax.device_put(x, self.everywhere)

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

        return self._jit(stack, out_shardings=self._state_shardings())(states)

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

        return self._jit(take, out_shardings=self.everywhere)

    def _of_state(self, each: Any, step: Any) -> Any:
        # All runs are at the same step, so what is due at a step is decided once, not per run.
        fields: dict[str, Any] = {field.name: each for field in dataclasses.fields(TrainState)}
        return TrainState(**(fields | {'step': step}))

    def _state_axes(self) -> Any:
        return self._of_state(0, step=None)

    def _for_all_runs(self, function: Any, in_axes: Any = 0, out_axes: Any = 0) -> Any:
        if self.runs is None:
            return function
        along = None if self.mesh is None else 'run'
        return jax.vmap(function, in_axes, out_axes, spmd_axis_name=along)

    def _run_sharding(self) -> Sharding:
        return self.everywhere if self.runs is None else self._for_each_run

    def _state_shardings(self) -> Any:
        if self.runs is None or self.mesh is None:
            return self.everywhere
        return self._of_state(self._for_each_run, step=self.everywhere)

    def _batch_sharding(self) -> Any:
        return None if self.mesh is None else NamedSharding(self.mesh, P('data'))


class Programs:
    """The newest dataset and program, for runs of one structure that follow one another."""

    def __init__(self) -> None:
        self._dataset: tuple[Any, data.Dataset] | None = None
        self._program: tuple[Any, Program] | None = None

    def dataset(self, config: ConfigDict) -> data.Dataset:
        """The config's data.

        Raises:
            UsageError: as `data.load`.
        """
        s = config.dataset
        what = s.name, s.data_dir, s.train_split, s.eval_split
        if self._dataset is None or self._dataset[0] != what:
            self._dataset = what, data.load(*what)
        return self._dataset[1]

    def program(self, config: ConfigDict, dataset: data.Dataset, runs: int | None) -> Program:
        """The program of a resolved config, see `Program`."""
        what = structure(config), runs
        if self._program is None or self._program[0] != what:
            self._program = what, Program(config, dataset, runs)
        return self._program[1]
