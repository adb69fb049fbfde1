"""One run, from top to bottom."""

import dataclasses
import functools
import json
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax import (
    data,
    determinism,
    figures,
    optimizer,
    perturb,
    pruning,
    records,
    step_audit,
    symmetry,
)
from zerojax.checkpoint import Checkpoints
from zerojax.errors import RunError, UsageError
from zerojax.evaluate import make_evaluation, make_layer_measurement
from zerojax.precision import numbers_of
from zerojax.progress import Progress
from zerojax.step import (
    Batch,
    TrainState,
    create_state,
    make_train_steps,
    train_step_function,
)
from zerojax.stop import Stopped, StopRequest
from zerojax.workdir import Workdir

Tree = Any
Ticket = dict[str, Tree]

AUDIT_REPEATS = 5  # steps of the audit that a run of mode 'hardware' begins with


def train(config: ConfigDict, workdir: pathlib.Path) -> records.Record:
    """Trains `config` in `workdir`, or goes on with the run that is there.

    Returns:
        The run's summary, as in `workdir`/summary.json.

    Raises:
        UsageError: config, data or workdir are wrong; nothing was trained.
        RunError: loss, gradient or state became infinite or NaN, and the last good checkpoint is
            kept; or a checkpoint is damaged.
        Stopped: SIGTERM or SIGINT came; a checkpoint was saved.
    """
    started = time.monotonic()
    with StopRequest() as stop:
        # What can be wrong is found out before anything is written or compiled.
        config_lib.check(config)
        dataset = data.load(
            config.dataset.name,
            config.dataset.data_dir,
            config.dataset.train_split,
            config.dataset.eval_split,
        )
        config = resolve(config, dataset)
        check_backend(config.determinism.mode)
        with numbers_of(config.param_dtype):
            shapes = jax.eval_shape(functools.partial(new_state, config, dataset))
            check_layers(config, shapes.params)
            check_initial_weights(config, dataset)
            ticket = None if has_checkpoint(workdir) else load_ticket(config, shapes)
            with (
                Workdir(workdir, json.loads(json.dumps(config.to_dict()))),
                Checkpoints(workdir / 'checkpoints', config.keep_checkpoints_at) as checkpoints,
            ):
                return _train(config, dataset, ticket, workdir, checkpoints, stop, started)


def _train(
    config: ConfigDict,
    dataset: data.Dataset,
    ticket: Ticket | None,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    stop: StopRequest,
    started: float,
) -> records.Record:
    mode = config.determinism.mode
    jit = functools.partial(determinism.jit_in_mode, mode=mode)
    model = config_lib.build_model(config, dataset.num_classes)
    feature_axes = model.feature_axes()['params']
    orbits = build_orbits(config, dataset)
    schedule = build_schedule(config)

    # The state: new, or where the run was left.
    state = jit(functools.partial(new_state, config, dataset))()
    seconds_before = 0.0
    resumed = checkpoints.latest_step is not None
    if resumed:
        state, seconds_before = checkpoints.restore(like=state)
    elif ticket is not None:
        state = dataclasses.replace(state, **jax.device_put(ticket))
    step = int(state.step)
    manifest_file = workdir / 'manifest.json'
    manifest = records.add_start(manifest_file, step, run_facts(config, dataset))
    verb = 'RESUMING at' if resumed else 'starting at'
    print(f'{verb} step {step} of {config.num_steps} in {workdir}', flush=True)

    # The executables, and the training set on the device.
    device_data = jax.device_put({'image': dataset.train.images, 'label': dataset.train.labels})
    steps_per_epoch = len(dataset.train.labels) // config.batch_size
    train_steps = build_train_steps(config, dataset.num_classes, orbits)
    epoch_order = jit(functools.partial(data.epoch_order, num_examples=len(dataset.train.labels)))
    first_order = epoch_order(state.keys['order'], step // steps_per_epoch)
    train_steps = train_steps.lower(state, (device_data, first_order), np.int32(1)).compile()
    if mode == 'hardware' and 'audit' not in manifest:
        audit = audit_start(config, dataset, orbits, train_steps, state, (device_data, first_order))
        records.add_audit(manifest_file, manifest, audit)
    evaluate = make_evaluation(config, dataset, model)
    measure_layers = make_layer_measurement(config, dataset)
    measure_asymmetry = jit(
        functools.partial(symmetry.asymmetry, feature_axes=feature_axes, orbits=orbits)
    )

    with (
        records.Metrics(workdir, step if step > 0 else -1) as metrics,
        Progress(step, config.num_steps) as progress,
    ):

        def record_evaluation() -> None:
            evaluation = evaluate(state)
            if not np.isfinite(evaluation['loss']):
                raise RunError(
                    f'step {step}: the loss on the held-out set is not finite; try smaller initial '
                    'weights (model.*) or a lower optimizer.learning_rate'
                )
            metrics.write(step, 'eval', **evaluation)
            by_layer = {k: float(x) for k, x in measure_asymmetry(state.params).items()}
            worst = max(by_layer.values())
            metrics.write(
                step,
                'symmetry',
                asymmetry=worst,
                asymmetry_by_layer=by_layer,
                unique_features=symmetry.unique_features(
                    jax.device_get(state.params), feature_axes, orbits
                ),
            )
            metrics.write(step, 'layers', **measure_layers(state))
            progress.evaluated(step, **evaluation, asymmetry=worst)

        def save() -> None:
            metrics.flush()  # a checkpoint presumes the lines up to its step
            checkpoints.save(state, seconds_before + time.monotonic() - started)

        if step > 0 and metrics.last('eval') is None:
            raise UsageError(
                f'--workdir={workdir}: has a checkpoint of step {step} but metrics.jsonl is empty; '
                'name another folder'
            )
        if step == 0:
            record_evaluation()
            save()
        order, order_epoch, last_metrics = None, -1, None
        progress.start_clock(step)
        while step < config.num_steps and stop.signal is None:
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(state.keys['order'], epoch), epoch
            count = min(
                config.steps_per_call,
                steps_per_epoch - position,
                config.num_steps - step,
                *(
                    every - step % every
                    for every in (
                        config.log_every_steps,
                        config.eval_every_steps,
                        config.checkpoint_every_steps,
                    )
                ),
                *(keep - step for keep in config.keep_checkpoints_at if keep > step),
            )
            # Wait for the call before the last, so that a signal is answered soon.
            jax.block_until_ready(last_metrics)
            state, last_metrics = train_steps(state, (device_data, order), np.int32(count))
            step += count

            last = step == config.num_steps
            if last or step % config.log_every_steps == 0:
                check_finite(state, checkpoints)
                values = {name: float(value) for name, value in last_metrics.items()}
                by_layer = measure_asymmetry(state.params).values()
                values['asymmetry'] = max(float(x) for x in by_layer)
                values['learning_rate'] = float(schedule(step - 1))
                metrics.write(step, 'train', **values)
                progress.update(step, **{k: values[k] for k in ('loss', 'accuracy', 'asymmetry')})
            if last or step % config.eval_every_steps == 0:
                check_finite(state, checkpoints)
                record_evaluation()
            due = step % config.checkpoint_every_steps == 0 or step in config.keep_checkpoints_at
            if last or due:
                check_finite(state, checkpoints)
                save()
        if step < config.num_steps:
            assert stop.signal is not None
            check_finite(state, checkpoints)
            save()
            checkpoints.wait()
            raise Stopped(stop.signal, step)

        checkpoints.wait()
        summary = summarize(
            state, metrics, feature_axes, seconds_before + time.monotonic() - started
        )
        records.write_json(workdir / 'summary.json', summary)
        figures.draw_run(metrics.lines, summary['broken_at_step'], workdir / 'figures' / 'run.png')
        progress.say(f'finished: {workdir}/summary.json, figures/run.png')
        return summary


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


def check_initial_weights(config: ConfigDict, dataset: data.Dataset) -> None:
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
    params = jax.jit(functools.partial(new_state, config, dataset))().params
    axes = config_lib.build_model(config, dataset.num_classes).feature_axes()['params']
    if config.symmetry.project and not symmetry.is_symmetric(
        params, axes, build_orbits(config, dataset)
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


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether a run can be resumed there."""
    folder = workdir / 'checkpoints'
    return folder.is_dir() and any(
        each.name.isdigit() and each.is_dir() for each in folder.iterdir()
    )


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


def build_schedule(config: ConfigDict) -> Callable[[Any], Any]:
    """Learning rate of update n (from 0)."""
    settings = config.optimizer
    return optimizer.step_schedule(
        settings.learning_rate, config.num_steps, settings.drop_at, settings.drop_factor
    )


def build_optimizer(config: ConfigDict) -> Any:
    """The config's optax transformation."""
    settings = config.optimizer
    schedule, decay = build_schedule(config), settings.weight_decay
    if settings.name == 'sgd':
        tx = optimizer.sgd(schedule, settings.momentum, settings.nesterov, decay)
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
    params = init(jax.random.key(config.seed), images)['params']
    return symmetry.find_orbits(params, model.feature_axes()['params'])


def build_train_steps(config: ConfigDict, num_classes: int, orbits: symmetry.Orbits | None) -> Any:
    """The config's train steps, jitted: (state, (training set, order of the epoch), count)."""
    train_step = train_step_function(
        config_lib.build_model(config, num_classes),
        build_optimizer(config),
        perturbation=config_lib.build_perturbation(config),
        project=config.symmetry.project,
        orbits=orbits,
    )
    return make_train_steps(
        train_step,
        make_batch_function(config, num_classes),
        determinism=config.determinism.mode,
        steps_per_call=config.steps_per_call,
    )


def compile_inspection(
    config: ConfigDict, num_classes: int, state: TrainState, source: tuple[Batch, jax.Array]
) -> Any:
    """What `step_audit.CompiledStep` calls beside the train steps, without dropout."""
    undropped = ConfigDict(config.to_dict())
    undropped.model.dropout = 0.0
    inspect = step_audit.make_inspection(
        config_lib.build_model(undropped, num_classes), make_batch_function(config, num_classes)
    )
    return determinism.jit_in_mode(inspect, config.determinism.mode).lower(state, source).compile()


def audit_start(
    config: ConfigDict,
    dataset: data.Dataset,
    orbits: symmetry.Orbits | None,
    train_steps: Any,
    state: TrainState,
    source: tuple[Batch, jax.Array],
) -> records.Record:
    """What the manifest says of the noise that the run's own executable makes on this machine.

    Measured in a few steps that are thrown away, at symmetric random weights; `zerojax.audit` tells
    more, of compilations and processes too.
    """
    began = time.monotonic()
    model = config_lib.build_model(config, dataset.num_classes)
    state = step_audit.symmetric_state(state, model, build_optimizer(config), orbits)
    inspection = compile_inspection(config, dataset.num_classes, state, source)
    compiled = step_audit.CompiledStep(train_steps, inspection, state, source)
    params_axes = model.feature_axes()['params']
    verdict = step_audit.audit_compiled(compiled, params_axes, AUDIT_REPEATS, orbits)
    for sentence in verdict.sentences():
        print(f'audit: {sentence}', flush=True)
    return {'seconds': round(time.monotonic() - began, 1), **verdict.record(full=False)}


def new_state(config: ConfigDict, dataset: data.Dataset) -> TrainState:
    """The state before the first step; with pruning, its mask still keeps every weight."""
    state = create_state(
        config_lib.build_model(config, dataset.num_classes),
        build_optimizer(config),
        dataset.train.images.shape[1:],
        seed=config.seed,
        perturbation_seed=config.perturbation.seed,
        dtype=jnp.dtype(config.param_dtype),
    )
    if config.pruning.source:
        mask = jax.tree.map(lambda x: jnp.ones(x.shape, bool), state.params)
        state = dataclasses.replace(state, mask=mask)
    return state


def run_facts(config: ConfigDict, dataset: data.Dataset) -> records.Record:
    """What the manifest says of this run beyond versions and devices."""
    return {
        'compiler_options': determinism.compiler_options(config.determinism.mode),
        'execution': {
            'determinism': config.determinism.mode,
            'steps_per_call': config.steps_per_call,
            'convolution': config.model.convolution,
            'param_dtype': config.param_dtype,
            'mesh': None,
        },
        'dataset': {
            'name': config.dataset.name,
            'train_examples': len(dataset.train.labels),
            'eval_examples': len(dataset.eval.labels),
            'train_sha256': dataset.train.sha256(),
            'eval_sha256': dataset.eval.sha256(),
        },
    }


def make_batch_function(
    config: ConfigDict, num_classes: int
) -> Callable[[TrainState, tuple[Batch, jax.Array]], Batch]:
    """A pure (state, (training set, order of the epoch)) -> batch of the state's step."""
    mean, std = (np.array(x, np.float32) for x in (config.dataset.mean, config.dataset.std))

    def make_batch(state: TrainState, source: tuple[Batch, jax.Array]) -> Batch:
        examples, order = source
        indices = data.batch_indices(order, state.step, config.batch_size)
        images = examples['image'][indices]
        labels = examples['label'][indices]
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


def check_finite(state: TrainState, checkpoints: Checkpoints) -> None:
    """Raises RunError if a step up to here gave a number that is not finite."""
    step = int(state.nonfinite_at_step)
    if step >= 0:
        checkpoints.wait()
        raise RunError(
            f'step {step}: loss, gradient or weights are not finite; the last good checkpoint is '
            f'that of step {checkpoints.latest_step}; try a lower optimizer.learning_rate'
        )


def summarize(
    state: TrainState, metrics: records.Metrics, feature_axes: Any, seconds: float
) -> records.Record:
    """What `summary.json` holds; the fields are explained in the README."""
    symmetry_line = metrics.of_kind('symmetry')[-1]
    broken_at_step = int(state.broken_at_step)
    if broken_at_step < 0 and symmetry_line['asymmetry'] > 0:
        broken_at_step = int(state.step)  # the very last update broke it
    evaluations = metrics.of_kind('eval')
    return {
        'step': int(state.step),
        'train_loss': metrics.of_kind('train')[-1]['loss'],
        'eval_accuracy': evaluations[-1]['accuracy'],
        'best_eval_accuracy': max(line['accuracy'] for line in evaluations),
        'asymmetry': symmetry_line['asymmetry'],
        'unique_features': symmetry_line['unique_features'],
        'broken_at_step': None if broken_at_step < 0 else broken_at_step,
        'params_sha256': records.params_sha256(jax.device_get(state.params)),
        'seconds': round(seconds, 1),
    }
