"""What can be wrong with a run is found here, before anything is written."""

import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax import perturb, symmetry
from zerojax.host import objectstore
from zerojax.host.checkpoint import COMMITTED, Checkpoints
from zerojax.host.errors import UsageError
from zerojax.run import data
from zerojax.run.program import Program, check_memory, new_state, scalars_of
from zerojax.step import TrainState, determinism, pruning
from zerojax.step.precision import numbers_of

Ticket = dict[str, Any]


def resolve(config: ConfigDict, dataset: data.Dataset) -> ConfigDict:
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
    if config.dataset.augment and min(height, width) <= data.PAD:
        raise UsageError(
            f'dataset.augment=True: images of {height}x{width} are too small to be padded by '
            f'{data.PAD}; must be False'
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
        resolved.num_steps = config.num_epochs * (num_examples // config.batch_size)
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
        mean, std = data.channel_statistics(dataset.train.images)
        resolved.dataset.mean = tuple(float(x) for x in mean)
        resolved.dataset.std = tuple(float(x) for x in std)
    elif len(config.dataset.mean) != channels:
        raise UsageError(
            f'dataset.mean={config.dataset.mean!r}: must hold {channels} numbers, '
            'one for each channel of the images, or none'
        )
    return resolved


def check_backend(mode: str) -> None:
    """Raises UsageError if the determinism mode cannot be granted here."""
    try:
        determinism.check_supported(mode)
    except ValueError as error:
        raise UsageError(f'determinism.{error}') from error


def check_structure(config: ConfigDict, dataset: data.Dataset) -> None:
    """Checks a resolved config without compiling anything, so that no other run is trained first.

    Raises:
        UsageError: the mode cannot be granted, the network is too large, or as `check_layers`.
    """
    check_backend(config.determinism.mode)
    with numbers_of(config.param_dtype):
        check_memory(config, dataset)
        new = functools.partial(new_state, config, dataset)
        check_layers(config, jax.eval_shape(new, scalars_of(config)).params)


def check_layers(config: ConfigDict, params: Any) -> None:
    """Checks what is chosen by step or by layer: perturbation, freezing, pruning.

    Raises:
        UsageError: it comes after the run's end, or a pattern matches no parameter.
    """
    patterns = {}
    if config.perturbation.kind != 'none':
        if config.perturbation.at_step >= config.num_steps:
            raise UsageError(
                f'perturbation.at_step={config.perturbation.at_step}: '
                f'must be below num_steps={config.num_steps}'
            )
        patterns['perturbation.layers'] = config.perturbation.layers
    if config.optimizer.freeze:
        patterns['optimizer.freeze'] = config.optimizer.freeze
    if config.pruning.source:
        patterns['pruning.layers'] = config.pruning.layers
    if config.perturbation.kind in perturb.OUTPUT_KINDS:
        axes = config_lib.build_model(config, num_classes=1).feature_axes()['params']
        kernels = perturb.output_layers(axes).values()
        if not any(re.match(config.perturbation.layers, path) for path in kernels):
            raise UsageError(
                f'perturbation.layers={config.perturbation.layers!r}: matches no layer with output '
                f'features; their kernels are {", ".join(kernels)}'
            )
    for field, pattern in patterns.items():
        if not perturb.chosen(params, pattern):
            raise UsageError(
                f'{field}={pattern!r}: matches no parameter; '
                f'they are {", ".join(perturb.chosen(params, ".*"))}'
            )


def check_initial_weights(config: ConfigDict, params: Any, program: Program) -> None:
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
    if config.symmetry.project and not symmetry.is_symmetric(
        params, program.feature_axes, program.orbits
    ):
        raise UsageError(
            f'symmetry.project=True: {config.model.name} with init {config.model.init!r} does not '
            'start with equal features; must be False'
        )
    flat = flatten_dict(params, sep='/')
    nonzero = sum(int(jnp.sum(flat[path] != 0)) for path in perturb.chosen(params, p.layers))
    if scales_weights and nonzero < p.count:
        raise UsageError(
            f'perturbation.layers={p.layers!r}: chooses {nonzero} weights that are not 0 at step 0;'
            f' kind {p.kind!r} changes only such, and needs {p.count}'
        )


def checkpoint_steps(workdir: pathlib.Path) -> list[int]:
    """Steps of the checkpoints of the run in `workdir`, without reading them.

    Raises:
        UsageError: the folder cannot be read.
    """
    folder = workdir / 'checkpoints'
    try:
        if not folder.is_dir():
            return []
        return sorted(
            int(x.name)
            for x in folder.iterdir()
            if x.name.isdigit()
            and x.is_dir()
            and (not objectstore.in_store(x) or (x / COMMITTED).exists())
        )
    except OSError as error:
        reason = error.strerror or objectstore.one_line(error)
        raise UsageError(
            f'--workdir={workdir}: cannot be read ({reason}); name another folder'
        ) from error


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether a run can be resumed there."""
    return bool(checkpoint_steps(workdir))


def load_ticket(config: ConfigDict, shapes: TrainState) -> Ticket | None:
    """The lottery ticket {'params', 'batch_stats', 'mask'} to start from; None without pruning.

    The mask comes from the final weights of the run in `config.pruning.source`, the weights from
    its checkpoint of `config.pruning.rewind_step`.

    Raises:
        UsageError: the source has not finished, is of another network, or lacks the checkpoint.
    """
    settings = config.pruning
    if not settings.source:
        return None
    where = f'pruning.source={settings.source!r}'
    source = pathlib.Path(settings.source)
    if not ((source / 'summary.json').exists() and has_checkpoint(source)):
        raise UsageError(f'{where}: holds no finished run')
    with Checkpoints(source / 'checkpoints', read_only=True) as checkpoints:
        steps = checkpoints.steps
        if settings.rewind_step not in steps:
            raise UsageError(
                f'pruning.rewind_step={settings.rewind_step}: {where} keeps checkpoints of the '
                f'steps {steps}; run it with keep_checkpoints_at=({settings.rewind_step},)'
            )
        trained = checkpoints.read_variables(steps[-1])['params']
        start = checkpoints.read_variables(settings.rewind_step)
    for name, ours in (('params', shapes.params), ('batch_stats', shapes.batch_stats)):
        theirs = jax.tree.map(lambda x: (x.shape, x.dtype), start[name])
        if theirs != jax.tree.map(lambda x: (x.shape, x.dtype), ours):
            raise UsageError(f'{where}: holds a run of another network than model.* describes')
    if settings.mask == 'magnitude':
        mask = pruning.magnitude_mask(trained, settings.fraction, settings.layers)
    else:
        key = jax.random.key(settings.seed)
        mask = pruning.random_mask(trained, settings.fraction, key, settings.layers)
    return {
        'params': jax.tree.map(np.multiply, start['params'], jax.device_get(mask)),
        'batch_stats': start['batch_stats'],
        'mask': mask,
    }
