"""What can be wrong with a run is found here, before anything is written."""

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax import perturb, symmetry
from zerojax.host.errors import UsageError
from zerojax.run.building import Scalars, keeps_last, new_state, scalars_of, steps_per_epoch
from zerojax.run.data import Dataset, channel_statistics
from zerojax.step import TrainState, determinism, order
from zerojax.step.batch import PAD
from zerojax.step.precision import numbers_of

Tree = Any

# Options of JAX under which no run can be had.
IN_THE_WAY = (
    'jax_disable_jit', 'jax_no_tracing', 'jax_no_execution', 'jax_transfer_guard',
    'jax_transfer_guard_host_to_device', 'jax_transfer_guard_device_to_device',
    'jax_transfer_guard_device_to_host',
)  # fmt: skip


def resolve(config: ConfigDict, dataset: Dataset) -> ConfigDict:
    """A copy of the config with everything that depends on the data filled in.

    Raises:
        UsageError: a field does not fit the data.
    """
    num_examples, height, width, channels = dataset.train.images.shape
    if config.batch_size > num_examples:
        raise UsageError(
            f'batch_size={config.batch_size}: must be at most {num_examples}, '
            'the number of training examples'
        )
    if keeps_last(config) and num_examples % config.batch_size % config.mesh.data:
        raise UsageError(
            f"dataset.last_batch='keep': the last batch has {num_examples % config.batch_size} "
            f"examples, which mesh.data={config.mesh.data} does not divide evenly; must be 'drop'"
        )
    if config.dataset.augment and min(height, width) <= PAD:
        raise UsageError(
            f'dataset.augment=True: images of {height}x{width} are too small to be padded by '
            f'{PAD}; must be False'
        )
    if config.dataset.cutout > min(height, width):
        raise UsageError(
            f'dataset.cutout={config.dataset.cutout}: must be at most {min(height, width)}, '
            f'images are {height}x{width}'
        )
    if dataset.eval.images.shape[1:] != dataset.train.images.shape[1:]:
        raise UsageError(
            f'dataset.eval_split={config.dataset.eval_split!r}: images of shape '
            f'{dataset.eval.images.shape[1:]}, must be as in train_split: '
            f'{dataset.train.images.shape[1:]}'
        )
    resolved = ConfigDict(config.to_dict())
    if resolved.num_steps is None:
        resolved.num_steps = config.num_epochs * steps_per_epoch(config, num_examples)
        resolved.num_epochs = None
        if resolved.num_steps > config_lib.INT32:
            raise UsageError(
                f'num_epochs={config.num_epochs}: are {resolved.num_steps} steps; must be at most '
                f'{config_lib.INT32} steps'
            )
    if any(step > resolved.num_steps for step in config.keep_checkpoints_at):
        raise UsageError(
            f'keep_checkpoints_at={config.keep_checkpoints_at}: must be at most '
            f'num_steps={resolved.num_steps}'
        )
    if len(config.dataset.mean) == 0:
        mean, std = channel_statistics(dataset.train.images)
        resolved.dataset.mean = tuple(float(x) for x in mean)
        resolved.dataset.std = tuple(float(x) for x in std)
    elif len(config.dataset.mean) != channels:
        raise UsageError(
            f'dataset.mean={config.dataset.mean!r}: must hold {channels} numbers, '
            'one for each channel of the images, or none'
        )
    return resolved


def check_devices() -> None:
    """Raises UsageError if JAX has no device, or is told not to compile or not to use it; or if
    Python leaves out assert statements."""
    if not __debug__:
        raise UsageError(
            'python -O, or PYTHONOPTIMIZE: leaves out the assert statements that Flax relies on; '
            'start Python without it'
        )
    names = ('jax_platforms', 'jax_platform_name')
    asked = [f'{name.upper()}={x}' for name in names if (x := jax.config.values.get(name))]
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, of a plugin that is missing
        reason = str(error).partition('\n')[0] or 'JAX has no plugin for it'
        raise UsageError(
            f'{", ".join(asked) or "JAX_PLATFORMS"}: no such device ({reason}); install the extra '
            f'gpu or tpu, or {"unset it" if asked else "set it to cpu"}'
        ) from error
    for name in IN_THE_WAY:
        value = getattr(jax.config, name)
        if value is True or 'disallow' in str(value):
            raise UsageError(
                f'{name.upper()}={value}: a run is compiled, its data are brought to the device '
                'and it is computed there; unset it'
            )


def check_backend(mode: str) -> None:
    """Raises UsageError as `check_devices`, or if the mode of determinism cannot be granted here,
    or not in this process."""
    check_mode(mode)
    try:
        determinism.check_process(mode)
    except ValueError as error:
        raise UsageError(f'determinism.{error}') from error


def check_mode(mode: str) -> None:
    """Raises UsageError as `check_devices`, or if no process can grant the mode here."""
    check_devices()
    try:
        determinism.check_supported(mode)
    except ValueError as error:
        raise UsageError(f'determinism.{error}') from error


def check_structure(config: ConfigDict, dataset: Dataset, *, here: bool = True) -> None:
    """Checks a resolved config without compiling anything, so that no other run is trained first.

    Unless it is trained `here`, nothing that depends on the devices is checked.

    Raises:
        UsageError: the mode cannot be granted, the network is too large, or as `check_layers`.
    """
    if here:
        check_mode(config.determinism.mode)
    with numbers_of(config.param_dtype):
        model = config_lib.build_model(config, dataset.num_classes)
        new = functools.partial(new_state, config, model, dataset.image_shape)
        state = check_memory(config, new) if here else jax.eval_shape(new, scalars_of(config))
        check_layers(config, state.params, model.feature_axes()['params'])


def check_layers(config: ConfigDict, params: Tree, feature_axes: Tree) -> None:
    """Checks what is chosen by step, layer or stream: perturbation, freezing, pruning.

    Raises:
        UsageError: it comes after the run's end, a stream is none of the network's, a pattern
            matches no parameter, or what is chosen has nothing in common.
    """
    patterns = {}
    layers, streams = config.perturbation.layers, config.perturbation.streams
    if config.perturbation.kind != 'none':
        try:
            perturb.check_streams(streams, feature_axes)
        except ValueError as error:
            raise UsageError(f'perturbation.{error}') from error
        if config.perturbation.at_step >= config.num_steps:
            raise UsageError(
                f'perturbation.at_step={config.perturbation.at_step}: '
                f'must be below num_steps={config.num_steps}'
            )
        patterns['perturbation.layers'] = layers
    if config.optimizer.freeze:
        patterns['optimizer.freeze'] = config.optimizer.freeze
    if config.pruning.source:
        patterns['pruning.layers'] = config.pruning.layers
    if config.perturbation.kind in perturb.OUTPUT_KINDS:
        kernels = perturb.output_layers(feature_axes).values()
        if not any(re.match(layers, path) for path in kernels):
            raise UsageError(
                f'perturbation.layers={layers!r}: matches no layer with output '
                f'features; their kernels are {", ".join(kernels)}'
            )
        if not perturb.chosen_outputs(config_lib.build_perturbation(config), feature_axes):
            outputs = symmetry.output_axes(feature_axes)
            there = dict.fromkeys(outputs[path] for path in kernels if re.match(layers, path))
            raise UsageError(
                f'perturbation.streams={streams!r}: no layer that perturbation.layers={layers!r} '
                f'chooses puts out features of these, but of {", ".join(map(str, there))}; choose '
                'others in one of the two'
            )
    reordered = order.ordered_kernels(params, layers)
    if config.perturbation.kind == 'order' and not reordered:
        raise UsageError(
            f'perturbation.layers={layers!r}: matches no kernel; '
            f'they are {", ".join(order.ordered_kernels(params, ".*"))}'
        )
    for field, pattern in patterns.items():
        if not perturb.chosen(params, pattern):
            raise UsageError(
                f'{field}={pattern!r}: matches no parameter; '
                f'they are {", ".join(perturb.chosen(params, ".*"))}'
            )
    perturbs_params = config.perturbation.kind in (*perturb.WEIGHT_KINDS, 'gradient')
    if perturbs_params and not perturb.chosen_but(params, layers, '', streams, feature_axes):
        indexed = perturb.chosen_but(params, '.*', '', streams, feature_axes)
        raise UsageError(
            f'perturbation.streams={streams!r}: index nothing that perturbation.layers={layers!r} '
            f'chooses, but {", ".join(indexed)}; choose others in one of the two'
        )
    frozen = config.optimizer.freeze
    left = None
    if perturbs_params:
        left = perturb.chosen_but(params, layers, frozen, streams, feature_axes)
    elif config.perturbation.kind == 'order' and frozen:
        left = [path for path in reordered if not re.match(frozen, path)]
    if left == []:
        aim = f' and perturbation.streams={streams!r} choose' if streams else ' chooses'
        raise UsageError(
            f'optimizer.freeze={frozen!r}: freezes all that perturbation.layers={layers!r}{aim}, '
            'and what is frozen is not perturbed; choose others in one of them'
        )


def check_initial_weights(
    config: ConfigDict, params: Tree, feature_axes: Tree, orbits: symmetry.Orbits | None
) -> None:
    """Checks what depends on the weights that the run starts with.

    Raises:
        UsageError: projection would destroy them instead of keeping them, or a perturbation has
            nothing to act on.
    """
    p = config_lib.build_perturbation(config)
    scales_weights = p.kind in ('one_weight', 'ulp') or (p.kind == 'gaussian' and p.relative)
    scales_weights = scales_weights and p.at_step == 0 and not p.every
    if not (config.symmetry.project or scales_weights):
        return
    if config.symmetry.project and not symmetry.is_symmetric(params, feature_axes, orbits):
        raise UsageError(
            f'symmetry.project=True: {config.model.name} with init {config.model.init!r} does not '
            'start with equal features; must be False'
        )
    flat = flatten_dict(params, sep='/')
    paths = perturb.chosen_but(params, p.layers, config.optimizer.freeze, p.streams, feature_axes)
    nonzero = sum(int(jnp.sum(flat[path] != 0)) for path in paths)
    if scales_weights and nonzero < p.count:
        field, value = ('streams', p.streams) if p.streams else ('layers', p.layers)
        raise UsageError(
            f'perturbation.{field}={value!r}: chooses {nonzero} weights that are not 0 at step 0;'
            f' kind {p.kind!r} changes only such, and needs {p.count}'
        )


def check_memory(config: ConfigDict, new: Callable[[Scalars], TrainState]) -> TrainState:
    """Checks that a run's weights, their gradient and the optimizer's state fit into memory.

    Activations come on top; what they need is known only to the compiler. `new` is the config's
    `new_state`; what it would return comes back, with shapes in place of arrays.

    Raises:
        UsageError: they do not.
    """
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
    return state


def device_memory() -> int:
    """Bytes of memory that a device has; for CPUs, that the machine has."""
    stats = jax.local_devices()[0].memory_stats() or {}  # CPUs have none
    return stats.get('bytes_limit') or host_memory()


def host_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
