"""Compares runs: where two of them part, how far apart they end, what several gain together.

python -m zerojax.compare RUN_A RUN_B [RUN_C ...] [--output=FILE.json]

The runs are workdirs, finished or still in training; their newest checkpoints are compared. With
more than two, RUN_A is compared with each other one. Nothing is written but FILE.json.

Exit status: 0 success; 1 a damaged checkpoint; 2 a mistake in flags or files.
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import scipy.special
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from zerojax import alignment, cli, data, determinism, ensemble, interpolation, parting, similarity
from zerojax import config as config_lib
from zerojax.checkpoint import Checkpoints
from zerojax.errors import RunError, UsageError
from zerojax.models import Network
from zerojax.records import Record, params_sha256, write_json
from zerojax.train import has_checkpoint

Tree = Any
Variables = dict[str, Tree]

BATCH_SIZE = 500  # held-out images at once
POINTS = [i / 10 for i in range(11)]  # on the straight line between two networks
STATISTICS_EXAMPLES = 5000  # training images that BatchNorm's statistics are computed on, at most
CKA_EXAMPLES = 500  # held-out images whose features are compared, at most

# What two networks may differ in although all their weights have the same shapes.
FUNCTION_FIELDS = ('name', 'shortcut', 'negative_slope')


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir as it was found."""

    workdir: pathlib.Path
    config: ConfigDict
    dataset: Record  # of the manifest: sizes and hashes
    lines: list[Record]  # of metrics.jsonl
    steps: list[int]  # of its checkpoints
    variables: Variables  # of the newest

    @property
    def step(self) -> int:
        return self.steps[-1]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Of a run's newest checkpoint on the held-out set of N examples and C classes."""

    loss: float  # mean cross-entropy in nats
    probabilities: np.ndarray  # [N, C]
    classes: np.ndarray  # int [N]
    correct: np.ndarray  # bool [N]


def compare(workdirs: Sequence[pathlib.Path]) -> Record:
    """All that the command finds out, as a JSON object.

    Raises:
        UsageError: a workdir holds no run, or runs of other data.
        RunError: a checkpoint is damaged.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    dataset = load_dataset(runs)
    with jax.enable_x64(any(has_float64(run.variables) for run in runs)):
        predictions = [predict(run, dataset) for run in runs]
        pairs = [
            compare_pair(runs[0], run, predictions[0], other, dataset)
            for run, other in zip(runs[1:], predictions[1:], strict=True)
        ]
    return {
        'eval_examples': len(dataset.eval.labels),
        'runs': [
            {
                'workdir': str(run.workdir),
                'step': run.step,
                'num_steps': run.config.num_steps,
                'loss': found.loss,
                'accuracy': float(np.mean(found.correct)),
                'params_sha256': params_sha256(run.variables['params']),
            }
            for run, found in zip(runs, predictions, strict=True)
        ],
        'pairs': pairs,
        'ensemble': describe_ensemble(runs, predictions, dataset),
    }


def read_run(workdir: pathlib.Path) -> Run:
    """Reads a workdir, in which another process may be training.

    Raises:
        UsageError: it is no folder, has no checkpoint yet, or its files are damaged.
        RunError: its newest checkpoint is damaged.
    """
    if not workdir.is_dir():
        raise UsageError(f'{workdir}: not a folder; name the workdir of a run')
    if not has_checkpoint(workdir):
        raise UsageError(f'{workdir}: holds no finished checkpoint; name the workdir of a run')
    try:
        config = ConfigDict(json.loads((workdir / 'config.json').read_text()))
        dataset = json.loads((workdir / 'manifest.json').read_text())['dataset']
        lines = read_lines(workdir / 'metrics.jsonl')
        config_lib.build_model(config, num_classes=1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f'{workdir}: holds no run that can be read: {error}') from error
    with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
        steps = checkpoints.steps
        return Run(workdir, config, dataset, lines, steps, checkpoints.read_variables(steps[-1]))


def read_lines(file: pathlib.Path) -> list[Record]:
    """The whole lines of a metrics file; the last one may be half written.

    Raises:
        ValueError: a line is damaged.
    """
    whole, _, _ = file.read_text().rpartition('\n')
    return [json.loads(line) for line in whole.splitlines()]


def load_dataset(runs: Sequence[Run]) -> data.Dataset:
    """The data of the first run, on whose held-out part all of them can be compared.

    Raises:
        UsageError: the runs were evaluated on different data, or the data have changed since.
    """
    first = runs[0]
    for run in runs[1:]:
        if run.dataset['eval_sha256'] != first.dataset['eval_sha256']:
            raise UsageError(
                f'{run.workdir}: its held-out set is part of another dataset '
                f'({describe_dataset(run)}) than that of {first.workdir} '
                f'({describe_dataset(first)}); compare runs of the same data'
            )
    fields = first.config.dataset
    dataset = data.load(fields.name, fields.data_dir, fields.train_split, fields.eval_split)
    for part, split in (('train', dataset.train), ('eval', dataset.eval)):
        if split.sha256() != first.dataset[f'{part}_sha256']:
            raise UsageError(
                f'{first.workdir}: dataset.{part}_split={fields[f"{part}_split"]!r} of '
                f'{fields.name} holds other examples now than when the run was trained; '
                'put the data of that time back'
            )
    return dataset


def describe_dataset(run: Run) -> str:
    fields = run.config.dataset
    return f'dataset.name={fields.name!r}, eval_split={fields.eval_split!r}'


def has_float64(tree: Tree) -> bool:
    return any(x.dtype == np.float64 for x in jax.tree.leaves(tree))


def network(run: Run, num_classes: int) -> Network:
    """The run's network without dropout, which has no part in what is compared."""
    config = ConfigDict(run.config.to_dict())
    config.model.dropout = 0.0
    return config_lib.build_model(config, num_classes)


def normalization(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel."""
    fields = run.config.dataset
    return np.array(fields.mean, np.float32), np.array(fields.std, np.float32)


@functools.cache
def logits_function(model: Network, mode: str) -> Any:
    """Jitted (variables, images uint8 [B, H, W, C], mean [C], std [C]) -> logits [B, N]."""
    return determinism.jit_in_mode(
        lambda variables, images, mean, std: model.apply(
            variables, data.normalize(images, mean, std), train=False
        ),
        mode,
    )


@functools.cache
def statistics_function(model: Network, mode: str) -> Any:
    """Jitted, of the same arguments: what `interpolation.batch_statistics` returns."""
    return determinism.jit_in_mode(
        lambda variables, images, mean, std: interpolation.batch_statistics(
            model, variables, data.normalize(images, mean, std)
        ),
        mode,
    )


@functools.cache
def grams_function(model: Network, mode: str) -> Any:
    """Jitted, of the same arguments: the Gram matrix [B, B] of each layer's features."""
    layers = model.layers()

    def grams(variables: Variables, images: Any, mean: Any, std: Any) -> dict[str, jax.Array]:
        _, captured = model.apply(
            variables,
            data.normalize(images, mean, std),
            train=False,
            capture_intermediates=lambda module, _: '/'.join(module.path) in layers,
            mutable=['intermediates'],
        )
        outputs = flatten_dict(captured['intermediates'], sep='/')
        return {layer: similarity.gram(outputs[f'{layer}/__call__'][0]) for layer in layers}

    return determinism.jit_in_mode(grams, mode)


def held_out_logits(run: Run, variables: Variables, dataset: data.Dataset) -> np.ndarray:
    """Logits of the held-out set, float64 [N, C], that the run's network gives with `variables`."""
    apply = logits_function(network(run, dataset.num_classes), run.config.determinism.mode)
    images = dataset.eval.images
    size = min(BATCH_SIZE, len(images))
    padded = np.pad(images, ((0, -len(images) % size), (0, 0), (0, 0), (0, 0)))
    variables = jax.device_put(variables)
    parts = [
        apply(variables, padded[i : i + size], *normalization(run))
        for i in range(0, len(padded), size)
    ]
    return np.concatenate(jax.device_get(parts)).astype(np.float64)[: len(images)]


def mean_loss(logits_NxC: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean cross-entropy in nats."""
    log_probabilities_NxC = scipy.special.log_softmax(logits_NxC, axis=-1)
    return -float(np.mean(log_probabilities_NxC[np.arange(len(labels_N)), labels_N]))


def predict(run: Run, dataset: data.Dataset) -> Predictions:
    """What the run's newest checkpoint predicts, with the statistics that it was saved with."""
    logits_NxC = held_out_logits(run, run.variables, dataset)
    classes_N = np.argmax(logits_NxC, axis=-1)
    return Predictions(
        loss=mean_loss(logits_NxC, dataset.eval.labels),
        probabilities=scipy.special.softmax(logits_NxC, axis=-1),
        classes=classes_N,
        correct=classes_N == dataset.eval.labels,
    )


def compare_pair(
    a: Run, b: Run, found_a: Predictions, found_b: Predictions, dataset: data.Dataset
) -> Record:
    """Run a against run b; where their networks differ only what needs no common weights."""
    same = same_network(a, b)
    record = {
        'runs': [str(a.workdir), str(b.workdir)],
        'config': differing_fields(a.config, b.config),
        'same_training_data': a.dataset['train_sha256'] == b.dataset['train_sha256'],
        'same_network': same,
        'disagreement': similarity.disagreement(found_a.classes, found_b.classes),
    }
    if not same:
        return record
    aligned, permutations = align(a, b, dataset.num_classes)
    return record | {
        'parting': find_parting(a, b, dataset.num_classes),
        'weights': {
            'l2': similarity.l2_distance(a.variables['params'], b.variables['params']),
            'angle': finite(similarity.angle(a.variables['params'], b.variables['params'])),
            'l2_aligned': similarity.l2_distance(a.variables['params'], aligned['params']),
            'angle_aligned': finite(similarity.angle(a.variables['params'], aligned['params'])),
            'features': sum(len(each) for each in permutations.values()),
            'features_moved': sum(
                int(np.sum(each != np.arange(len(each)))) for each in permutations.values()
            ),
        },
        'line': compare_losses(a, b.variables, aligned, dataset),
        'cka': compare_features(a, b, dataset),
    }


def finite(value: float) -> float | None:
    """JSON knows no nan."""
    return value if math.isfinite(value) else None


def differing_fields(a: ConfigDict, b: ConfigDict) -> Record:
    """{field: [value in a, value in b]}; a field that one of them lacks is null there."""
    ours, theirs = flatten_dict(a.to_dict(), sep='.'), flatten_dict(b.to_dict(), sep='.')
    return {
        field: [ours.get(field), theirs.get(field)]
        for field in sorted(ours.keys() | theirs.keys())
        if ours.get(field) != theirs.get(field)
    }


def same_network(a: Run, b: Run) -> bool:
    """Whether weights and statistics of one compute the same function in the other.

    How they start, dropout and the way a convolution is computed make no difference, nor do dtypes.
    """
    shapes = [jax.tree.map(np.shape, run.variables) for run in (a, b)]
    same_function = all(
        a.config.model.get(field) == b.config.model.get(field) for field in FUNCTION_FIELDS
    )
    same_images = all(
        a.config.dataset[field] == b.config.dataset[field] for field in ('mean', 'std')
    )
    return shapes[0] == shapes[1] and same_function and same_images


def align(a: Run, b: Run, num_classes: int) -> tuple[Variables, alignment.Permutations]:
    """b's variables with their features permuted to be like a's, and the permutations."""
    axes = network(a, num_classes).feature_axes()
    permutations = alignment.weight_matching(
        a.variables['params'], b.variables['params'], axes['params']
    )
    aligned = {
        name: alignment.permute(b.variables[name], axes[name], permutations)
        for name in ('params', 'batch_stats')
    }
    return aligned, permutations


def find_parting(a: Run, b: Run, num_classes: int) -> Record:
    """What is known of the step after which they part, from common metrics lines and checkpoints.

    'equal_at' is the last step at which nothing known differs, 'different_at' the first at which
    something does. Equal weights prove the former ('proven'); where no checkpoint of both is kept,
    equal lines only suggest it.
    """
    equal_lines, line = parting.compare_lines(a.lines, b.lines)
    paths = list(flatten_dict(network(a, num_classes).feature_axes(), sep='/'))
    equal_checkpoints: list[int] = []
    checkpoint: Record | None = None
    for step, ours, theirs in common_checkpoints(a, b):
        tensor = parting.first_differing_tensor(ours, theirs, paths)
        if tensor is not None:
            checkpoint = {'step': step, **dataclasses.asdict(tensor)}
            break
        equal_checkpoints.append(step)
    different = [line.step] if line else []
    different += [checkpoint['step']] if checkpoint else []
    different_at = min(different, default=None)
    equal = [
        step
        for step in (*equal_lines, *equal_checkpoints)
        if different_at is None or step < different_at
    ]
    equal_at = max(equal, default=None)
    return {
        'equal_at': equal_at,
        'proven': equal_at in equal_checkpoints,
        'different_at': different_at,
        'equal_lines': equal_lines,
        'differing_line': dataclasses.asdict(line) if line else None,
        'equal_checkpoints': equal_checkpoints,
        'differing_checkpoint': checkpoint,
    }


def common_checkpoints(a: Run, b: Run) -> Iterator[tuple[int, Variables, Variables]]:
    """Step and both runs' variables for each checkpoint that both have, rising."""
    with (
        Checkpoints(a.workdir / 'checkpoints', read_only=True) as ours,
        Checkpoints(b.workdir / 'checkpoints', read_only=True) as theirs,
    ):
        for step in sorted(set(a.steps) & set(b.steps)):
            try:
                pair = ours.read_variables(step), theirs.read_variables(step)
            except RunError:
                if all((run.workdir / 'checkpoints' / str(step)).is_dir() for run in (a, b)):
                    raise
                continue  # a run in training has removed its oldest one meanwhile
            yield step, *pair


def compare_losses(a: Run, b: Variables, aligned: Variables, dataset: data.Dataset) -> Record:
    """Held-out loss on the straight lines from a to b and to b aligned, and their barriers."""

    def losses(end: Variables) -> list[float]:
        return [loss_with_own_statistics(a, at, dataset) for at in line_to(end)]

    def line_to(end: Variables) -> Iterator[Variables]:
        return (interpolation.interpolate(a.variables, end, t) for t in POINTS)

    before, after = losses(b), losses(aligned)
    return {
        't': POINTS,
        'loss': before,
        'loss_aligned': after,
        'barrier': interpolation.barrier(POINTS, before),
        'barrier_aligned': interpolation.barrier(POINTS, after),
    }


def loss_with_own_statistics(run: Run, variables: Variables, dataset: data.Dataset) -> float:
    """Held-out loss of the run's network with BatchNorm's statistics recomputed.

    They are means over batches of the run's size of the first training images, not augmented.
    """
    statistics = statistics_function(network(run, dataset.num_classes), run.config.determinism.mode)
    images = dataset.train.images[:STATISTICS_EXAMPLES]
    size = min(run.config.batch_size, len(images))
    on_device = jax.device_put(variables)
    of_batches = [
        statistics(on_device, images[i : i + size], *normalization(run))
        for i in range(0, len(images) - size + 1, size)
    ]
    mean = jax.tree.map(
        lambda *each: np.mean(each, axis=0, dtype=np.float64).astype(each[0].dtype),
        *jax.device_get(of_batches),
    )
    logits_NxC = held_out_logits(run, {**variables, 'batch_stats': mean}, dataset)
    return mean_loss(logits_NxC, dataset.eval.labels)


def compare_features(a: Run, b: Run, dataset: data.Dataset) -> dict[str, float | None]:
    """Linear CKA of each layer's features on the first held-out images."""
    images = dataset.eval.images[:CKA_EXAMPLES]
    ours, theirs = (
        jax.device_get(
            grams_function(network(run, dataset.num_classes), run.config.determinism.mode)(
                run.variables, images, *normalization(run)
            )
        )
        for run in (a, b)
    )
    layers = network(a, dataset.num_classes).layers()
    return {layer: finite(similarity.cka(ours[layer], theirs[layer])) for layer in layers}


def describe_ensemble(
    runs: Sequence[Run], predictions: Sequence[Predictions], dataset: data.Dataset
) -> Record:
    """What all runs do together; the variance only of runs of one network and training set."""
    correct_RxN = np.stack([each.correct for each in predictions])
    accuracies_R = np.mean(correct_RxN, axis=1)
    accuracy = ensemble.ensemble_accuracy(
        np.stack([each.probabilities for each in predictions]), dataset.eval.labels
    )
    first = runs[0]
    comparable = all(
        same_network(first, run) and run.dataset['train_sha256'] == first.dataset['train_sha256']
        for run in runs
    )
    varied = {field for run in runs for field in differing_fields(first.config, run.config)}
    return {
        'accuracy_mean': float(np.mean(accuracies_R)),
        'accuracy_deviation': float(np.std(accuracies_R, ddof=1)),
        'ensemble_accuracy': accuracy,
        'gain': accuracy - float(np.mean(accuracies_R)),
        'diversity': ensemble.diversity(np.stack([each.classes for each in predictions])),
        'variance_on_test_set': ensemble.variance_on_test_set(correct_RxN) if comparable else None,
        'variance_on_distribution': (
            ensemble.variance_on_distribution(correct_RxN) if comparable else None
        ),
        'varied': sorted(varied),
    }


def report(found: Record) -> str:
    """What `compare` returns as a text of one screen."""
    lines = [f'Newest checkpoints, {found["eval_examples"]} held-out examples:']
    for number, run in enumerate(found['runs'], start=1):
        lines.append(
            f'  {number}  {run["workdir"]}: step {run["step"]} of {run["num_steps"]}, '
            f'loss {run["loss"]:.4f}, accuracy {run["accuracy"]:.4f}, '
            f'weights {run["params_sha256"][:12]}'
        )
    for number, pair in enumerate(found['pairs'], start=2):
        lines += ['', f'1 and {number}', *_wrapped(_pair_rows(pair))]
    lines += [
        '',
        f'All {len(found["runs"])} runs together',
        *_wrapped(_ensemble_rows(found['ensemble'])),
    ]
    return '\n'.join(lines)


def _wrapped(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, text in rows:
        yield from textwrap.wrap(
            text, 100, initial_indent=f'  {name:<15}', subsequent_indent=' ' * 17
        )


def _pair_rows(pair: Record) -> Iterator[tuple[str, str]]:
    fields = [f'{field} {x!r} | {y!r}' for field, (x, y) in pair['config'].items()]
    yield 'config', '; '.join(fields) or 'the same'
    yield 'training data', 'the same' if pair['same_training_data'] else 'not the same'
    if pair['same_network']:
        yield from _parting_rows(pair['parting'])
        weights, line = pair['weights'], pair['line']
        yield (
            'weights',
            f'L2 distance {weights["l2"]:.4g}, angle {_degrees(weights["angle"])}; '
            f'aligned {weights["l2_aligned"]:.4g}, {_degrees(weights["angle_aligned"])} '
            f'({weights["features_moved"]} of {weights["features"]} features moved)',
        )
        yield (
            'loss barrier',
            f'{line["barrier"]:.4f}; aligned {line["barrier_aligned"]:.4f} '
            '(statistics of BatchNorm recomputed on training data at each point)',
        )
        values = (f'{k} {"none" if x is None else f"{x:.3f}"}' for k, x in pair['cka'].items())
        yield 'linear CKA', ', '.join(values)
    else:
        yield 'network', 'not the same, so weights, line and features are not compared'
    yield 'disagreement', f'{pair["disagreement"]:.2%} of held-out examples'


def _degrees(angle: float | None) -> str:
    return 'none' if angle is None else f'{angle:.4g}°'


def _parting_rows(known: Record) -> Iterator[tuple[str, str]]:
    if known['different_at'] is None:
        verdict = f'nowhere: equal to step {known["equal_at"]}, in all that both have recorded'
    elif known['equal_at'] is None:
        verdict = f'by step {known["different_at"]}; nothing from before is common to both'
    else:
        proof = 'equal weights' if known['proven'] else 'equal metrics, no weights of it are kept'
        verdict = f'after step {known["equal_at"]} ({proof}) and by step {known["different_at"]}'
    yield 'they part', verdict
    line, checkpoint = known['differing_line'], known['differing_checkpoint']
    if line:
        a, b = line['values']
        yield (
            'metrics',
            f'first differ at step {line["step"]}: {line["kind"]} {line["field"]} {a} | {b}',
        )
    else:
        yield 'metrics', f'equal at all {len(known["equal_lines"])} steps that both recorded'
    equal = ', '.join(map(str, known['equal_checkpoints'])) or 'none'
    if checkpoint:
        most = checkpoint['max_ulps']
        yield (
            'checkpoints',
            f'equal: {equal}; first that differs: {checkpoint["step"]}, from '
            f'{checkpoint["tensor"]} on, in {checkpoint["differing"]} of its '
            f'{checkpoint["entries"]} entries, '
            + (
                'of another dtype' if most is None else f'by {most} units in the last place at most'
            ),
        )
    else:
        yield 'checkpoints', f'equal: {equal}'


def _ensemble_rows(found: Record) -> Iterator[tuple[str, str]]:
    yield (
        'accuracy',
        f'{found["accuracy_mean"]:.4f} ± {found["accuracy_deviation"]:.4f} (mean and deviation)',
    )
    yield 'as ensemble', f'{found["ensemble_accuracy"]:.4f}, a gain of {found["gain"]:+.4f}'
    yield 'diversity', f'{found["diversity"]:.2%} of examples, mean disagreement of two runs'
    if found['variance_on_test_set'] is None:
        yield 'variance', 'not of one network and training set'
    else:
        beyond = [field for field in found['varied'] if not field.endswith('seed')]
        yield (
            'variance',
            f'between runs: {found["variance_on_test_set"]:.3g} on these examples, '
            f'{found["variance_on_distribution"]:.3g} on their distribution (unbiased estimate)'
            + (f'; the runs differ in more than seeds: {", ".join(beyond)}' if beyond else ''),
        )


def parse(argv: Sequence[str]) -> tuple[list[pathlib.Path], pathlib.Path | None]:
    """Workdirs and output file that a command line (with the program's name) asks for.

    Raises:
        UsageError: an unknown flag, less than two runs, or a file that cannot be written.
    """
    workdirs, output = [], None
    for argument in argv[1:]:
        if argument.startswith('--output='):
            output = pathlib.Path(argument.removeprefix('--output='))
        elif argument.startswith('-'):
            raise UsageError(f'{argument}: unknown flag; allowed: --output=FILE.json')
        else:
            workdirs.append(pathlib.Path(argument))
    if len(workdirs) < 2:
        raise UsageError(f'command line: {len(workdirs)} runs; name at least two workdirs')
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UsageError(f'--output={output}: must be a file in a folder that exists')
    return workdirs, output


def run_command(argv: Sequence[str]) -> None:
    workdirs, output = parse(argv)
    found = compare(workdirs)
    if output is not None:
        try:
            write_json(output, found)
        except OSError as error:
            raise UsageError(f'--output={output}: cannot be written ({error.strerror})') from error
    print(report(found))


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    if {'-h', '--help'} & set(argv[1:]):
        print(__doc__)
        return 0
    return cli.exit_status(lambda: run_command(argv))


if __name__ == '__main__':
    sys.exit(main(sys.argv))
