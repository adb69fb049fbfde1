"""Converts checkpoints of the paper's PyTorch code. Needs PyTorch: pip install 'zerojax[torch]'.

python -m zerojax.convert from-torch FILE.pth.tar --config=CONFIG --workdir=DIR [--config.F=V ...]

Makes DIR a run of CONFIG whose initial weights and statistics are those of the file; then
`python -m zerojax.main` with the same config and workdir trains it. DIR/origin.json says for good
where they came from: {"file", "sha256", "epoch"}, the epoch null if the file has none.

The file must hold the weights of that network and no others; names may all begin with 'module.',
'_orig_mod.' or both, as torch.nn.DataParallel and torch.compile have it.

python -m zerojax.convert to-torch FILE.pth.tar --workdir=DIR

Writes the newest checkpoint of the run in DIR as the paper's code saves its own, so that its
`load_state_dict` takes it.

Exit status: 0 success; 1 a damaged checkpoint; 2 a mistake in flags, config, data or files.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax import interop, models, symmetry
from zerojax.host import paths, torch_checkpoint
from zerojax.host.checkpoint import Checkpoints, has_checkpoint
from zerojax.host.command import run_command
from zerojax.host.errors import UsageError
from zerojax.host.records import read_metrics, write_json
from zerojax.host.stop import exit_on_signals
from zerojax.host.terminal import say
from zerojax.host.workdir import Workdir
from zerojax.run import checks, cli, data
from zerojax.run.building import build_orbits, new_state, scalars_of
from zerojax.step import TrainState, jit_in_mode
from zerojax.step.batch import steps_per_epoch
from zerojax.step.precision import numbers_of


def from_torch(file: pathlib.Path, argv: list[str]) -> None:
    """The first command; `argv` are the program's name and the flags of `zerojax.main`."""
    config, workdir = cli.parse_flags(argv)
    dataset = data.load_of(config)
    config = checks.resolve(config, dataset)
    saved = torch_checkpoint.load(file)
    if config.pruning.source:
        raise UsageError(
            f'pruning.source={config.pruning.source!r}: the initial weights are those of {file}; '
            "must be ''"
        )
    remains = ('config.json', 'manifest.json', 'metrics.jsonl', 'checkpoints', 'origin.json')
    if any((workdir / name).exists() for name in remains):
        raise UsageError(f'--workdir={workdir}: holds a run already; name another folder')
    checks.check_backend(config.determinism.mode)
    with contextlib.ExitStack() as stack:
        stack.enter_context(numbers_of(config.param_dtype))
        state = _initial_state(config, dataset, file, saved.arrays)
        stack.enter_context(Workdir(workdir, config_lib.as_json(config)))
        checkpoints = stack.enter_context(
            Checkpoints(workdir / 'checkpoints', config.keep_checkpoints_at)
        )
        checkpoints.save(state, seconds=0.0)
        checkpoints.wait()
        # Last, so that it never tells of weights that are not there.
        write_json(
            workdir / 'origin.json',
            {'file': file.name, 'sha256': saved.sha256, 'epoch': saved.epoch},
        )
    say(f'{workdir}: step 0 has the weights of {file}')


def _initial_state(
    config: ConfigDict, dataset: data.Dataset, file: pathlib.Path, arrays: dict[str, Any]
) -> TrainState:
    """The initial state of a resolved config, but for the weights and statistics.

    Raises:
        UsageError: they are not those of the config's network, or cannot be trained as it says.
    """
    model = config_lib.build_model(config, dataset.num_classes)
    axes = model.feature_axes()
    orbits = build_orbits(model, dataset.image_shape)
    new = functools.partial(new_state, config, model, dataset.image_shape)
    state = jit_in_mode(new, config.determinism.mode)(scalars_of(config))
    checks.check_layers(config, state.params, axes['params'])
    # Training checks, at every start, the weights that the config itself begins with.
    checks.check_initial_weights(config, state.params, axes['params'], orbits)
    largest = float(jnp.finfo(config.param_dtype).max)
    for name, x in arrays.items():
        if (abs(x) > largest).any():
            raise UsageError(f'{file}: {name} is too large for param_dtype={config.param_dtype!r}')
    try:
        interop.check_unused(arrays, model)
        variables = interop.from_reference(arrays, model)
    except ValueError as error:
        raise UsageError(f'{file}: {error}') from error
    _check_shapes(file, variables['params'], state.params)
    ours = {'params': state.params, 'batch_stats': state.batch_stats}
    variables = jax.tree.map(lambda x, own: x.astype(own.dtype), variables, ours)
    if config.symmetry.project and not all(
        symmetry.is_symmetric(variables[name], axes[name], orbits) for name in variables
    ):
        raise UsageError(
            f'symmetry.project=True: the features in {file} are not equal, projection would '
            'destroy them; must be False'
        )
    checks.check_initial_weights(config, variables['params'], axes['params'], orbits)
    return dataclasses.replace(state, **variables)


def _check_shapes(file: pathlib.Path, theirs: Any, ours: Any) -> None:
    """The parts of a shape that `from_reference` cannot know: the images' channels."""
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(theirs)[0], jax.tree.leaves(ours), strict=True
    ):
        if a.shape != b.shape:
            name = jax.tree_util.keystr(path, simple=True, separator='/')
            raise UsageError(f'{file}: {name} has shape {a.shape}, the config needs {b.shape}')


def to_torch(file: pathlib.Path, argv: list[str]) -> None:
    """The second command; `argv` are the program's name and `--workdir=DIR`."""
    values = cli.text_flags(workdir=None)
    cli.parse(argv, values)
    if values.workdir is None:
        raise UsageError('command line: to-torch FILE.pth.tar --workdir=DIR')
    workdir = paths.meant(values.workdir, f'--workdir={values.workdir}')
    obstacle = paths.why_no_folder(workdir, must_exist=True)
    if obstacle or not has_checkpoint(workdir):
        raise UsageError(
            f'--workdir={workdir}: holds no checkpoint' + (f', {obstacle}' if obstacle else '')
        )
    checks.check_devices()
    with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
        step = checkpoints.steps[-1]
        variables = checkpoints.read_variables(step)
    num_classes = len(variables['params']['head']['bias'])
    try:
        config = json.loads((workdir / 'config.json').read_text())
        model = models.create(**config['model'], num_classes=num_classes)
        arrays = interop.unused_in_reference(model) | interop.to_reference(variables)
        epoch, best = _progress(workdir, config, step)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f'--workdir={workdir}: no run of the paper: {error}') from error
    torch_checkpoint.write(file, arrays, epoch=epoch, best_prec1=100.0 * best)
    say(f'{file}: weights of step {step} of {workdir}')


def _progress(workdir: pathlib.Path, config: dict[str, Any], step: int) -> tuple[int, float]:
    """Whole epochs done by `step`, and the best accuracy up to now."""
    if step == 0:
        return 0, 0.0
    examples = json.loads((workdir / 'manifest.json').read_text())['dataset']['train_examples']
    lines = read_metrics(workdir / 'metrics.jsonl')
    best = max(x['accuracy'] for x in lines if x['kind'] == 'eval' and x['step'] <= step)
    keep_last = config['dataset']['last_batch'] == 'keep'
    return step // steps_per_epoch(examples, config['batch_size'], keep_last), best


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and its arguments."""
    if len(argv) < 3 or argv[1] not in ('from-torch', 'to-torch'):
        raise UsageError('command line: needs from-torch or to-torch, and a file; see --help')
    command = from_torch if argv[1] == 'from-torch' else to_torch
    command(paths.meant(argv[2], f'command line: file {argv[2]!r}'), [argv[0], *argv[3:]])


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, exit_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
