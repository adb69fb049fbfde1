"""Compares runs: where two of them part, how far apart they end, what several gain together.

python -m zerojax.compare RUN_A RUN_B [RUN_C ...] [--output=FILE.json]

The runs are workdirs, finished or still in training; their newest checkpoints are compared. With
more than two, RUN_A is compared with each other one. Nothing is written but FILE.json.

Exit status: 0 success; 1 a damaged checkpoint; 2 a mistake in flags or files.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from zerojax import cli, ensemble
from zerojax.compare_pair import compare_pair, differing_fields, finite, same_network
from zerojax.compare_report import report
from zerojax.data import Dataset
from zerojax.errors import UsageError
from zerojax.precision import numbers_of
from zerojax.records import Record, params_sha256, write_json
from zerojax.trained import Predictions, Run, load_dataset, predict, read_run


def compare(workdirs: Sequence[pathlib.Path]) -> Record:
    """All that the command finds out, as a JSON object.

    Raises:
        UsageError: a workdir holds no run, or runs of other data.
        RunError: a checkpoint is damaged.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    dataset = load_dataset(runs)
    dtypes = [run.config.param_dtype for run in runs]
    with numbers_of('float64' if 'float64' in dtypes else dtypes[0]):
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
                'loss': finite(found.loss),
                'accuracy': float(np.mean(found.correct)),
                'params_sha256': params_sha256(run.variables['params']),
            }
            for run, found in zip(runs, predictions, strict=True)
        ],
        'pairs': pairs,
        'ensemble': describe_ensemble(runs, predictions, dataset),
    }


def describe_ensemble(
    runs: Sequence[Run], predictions: Sequence[Predictions], dataset: Dataset
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


def parse(argv: Sequence[str]) -> tuple[list[pathlib.Path], pathlib.Path | None]:
    """Workdirs and output file that a command line (with the program's name) asks for.

    Raises:
        UsageError: an unknown flag, less than two runs, one run twice, or a file that cannot be
            written.
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
    for workdir in workdirs:
        if [each.resolve() for each in workdirs].count(workdir.resolve()) > 1:
            raise UsageError(f'{workdir}: named twice; compare different runs')
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
