"""From a config to the parts of a run: optimizer, orbits, initial state, mesh, batches."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from zerojax import symmetry
from zerojax.host.errors import UsageError
from zerojax.models import Network
from zerojax.run.data import Split, normalization
from zerojax.step import Batch, TrainState, batch, create_state, jit_without_products, optimizer

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
Shape = tuple[int, int, int]  # of an image: [H, W, C]


class Source(NamedTuple):
    """What the train steps of an epoch read.

    Attributes:
        examples: the training set, see `examples_of`.
        order: that of the epoch, int32 [N]; of batched runs [R, N].
        scalars: the runs' `SCALARS`, each []; of batched runs [R].
    """

    examples: Any
    order: jax.Array
    scalars: Scalars


def examples_of(split: Split) -> dict[str, np.ndarray]:
    """{'image': uint8 [N, H·W·C], 'label': int32 [N]}, as a device holds them.

    An image is a row: to take some of [N, H, W, C], a TPU copies all of it in each step, as its
    layout has the examples along the lanes, and the copy is padded to four times the size.
    """
    return {'image': split.images.reshape(len(split.images), -1), 'label': split.labels}


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


def build_orbits(model: Network, image_shape: Shape) -> symmetry.Orbits | None:
    """Which features the network is meant to have equal; None: all of a layer."""
    noiseless = model.noiseless()
    if noiseless is None:
        return None

    def init(key: jax.Array) -> Any:
        variables = noiseless.init(key, jnp.zeros((1, *image_shape)), train=False)
        return flax.core.unfreeze(variables['params'])

    params = jit_without_products(init)(jax.random.key(0))
    return symmetry.find_orbits(params, model.feature_axes()['params'])


def new_state(
    config: ConfigDict, model: Network, image_shape: Shape, scalars: Scalars
) -> TrainState:
    """The state before the first step; with pruning, its mask still keeps every weight."""
    state = create_state(
        model,
        build_optimizer(config, scalars),
        image_shape,
        seed=scalars['seed'],
        perturbation_seed=scalars['perturbation.seed'],
        dtype=jnp.dtype(config.param_dtype),
    )
    if config.pruning.source:
        mask = jax.tree.map(lambda x: jnp.ones(x.shape, bool), state.params)
        state = dataclasses.replace(state, mask=mask)
    return state


def build_mesh(
    config: ConfigDict, runs: int | None, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """Axis 'data' of `config.mesh.data` devices, and 'run' of as many more as batched runs can use.

    These are the most devices there are that divide the number of runs. None if it is one device.
    `devices` are by default JAX's.

    Raises:
        UsageError: names `mesh.data`, and why the devices do not fit.
    """
    devices = jax.devices() if devices is None else devices
    along_data, number = config.mesh.data, len(devices)
    processes = len({device.process_index for device in devices})
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
    taken = np.array(devices[: along_run * along_data])
    return Mesh(taken.reshape(along_run, along_data), ('run', 'data'))


def keeps_last(config: ConfigDict) -> bool:
    """Whether an epoch ends with a smaller batch, of the examples that are left."""
    return config.dataset.last_batch == 'keep'


def steps_per_epoch(config: ConfigDict, num_examples: int) -> int:
    """Updates in an epoch of so many examples."""
    return batch.steps_per_epoch(num_examples, config.batch_size, keeps_last(config))


def make_batch_function(
    config: ConfigDict,
    image_shape: Shape,
    num_classes: int,
    mesh: Mesh | None = None,
    *,
    last: bool = False,
) -> Callable[[TrainState, Source], Batch]:
    """A pure (state, source) -> batch of the state's step, spread over the mesh's axis 'data'.

    If `last`, of a step that ends an epoch with the examples that are left: a shape of its own.
    """
    mean, std = normalization(config)
    settings = config.dataset

    def make_batch(state: TrainState, source: Source) -> Batch:
        if last:
            indices = batch.last_batch_indices(source.order, config.batch_size)
        else:
            indices = batch.batch_indices(
                source.order, state.step, config.batch_size, keeps_last(config)
            )
        if mesh is not None:
            # Each device has the whole order. Were it cut in parts, they would exchange their ends.
            for along in (P(), P('data')):
                indices = jax.lax.with_sharding_constraint(indices, NamedSharding(mesh, along))
        images = source.examples['image'][indices].reshape(-1, *image_shape)
        labels = source.examples['label'][indices]
        keys = {
            purpose: jax.random.fold_in(state.keys[purpose], state.step)
            for purpose in ('augmentation', 'cutout', 'mixup')
        }
        if settings.augment:
            images = batch.augment(keys['augmentation'], images)
        images = batch.normalize(images, mean, std)
        if settings.cutout > 0:
            images = batch.cutout(keys['cutout'], images, settings.cutout)
        if settings.mixup > 0:
            images, labels = batch.mixup(keys['mixup'], images, labels, num_classes, settings.mixup)
        return {'image': images, 'label': labels}

    return make_batch
