"""Several runs: the first against each other one, and all of them together."""

import pathlib
from collections.abc import Sequence

import numpy as np

from zerojax.compare import ensemble
from zerojax.compare.pair import compare_pair, differing_fields, finite, same_network
from zerojax.compare.saved_runs import (
    Predictions,
    SavedRun,
    describe_streams,
    load_dataset,
    predict,
    read_run,
)
from zerojax.host.hashes import params_sha256
from zerojax.host.records import Record
from zerojax.run.checks import check_devices
from zerojax.run.data import Dataset
from zerojax.step.precision import numbers_of


def compare(workdirs: Sequence[pathlib.Path]) -> Record:
    """All that the command finds out, as a JSON object.

    Raises:
        UsageError: a workdir holds no run, or runs of other data; or as `check_devices`.
        RunError: a checkpoint is damaged.
    """
    check_devices()
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
                **describe_streams(run),
            }
            for run, found in zip(runs, predictions, strict=True)
        ],
        'pairs': pairs,
        'ensemble': describe_ensemble(runs, predictions, dataset),
    }


def describe_ensemble(
    runs: Sequence[SavedRun], predictions: Sequence[Predictions], dataset: Dataset
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
            ensemble.variance_on_distribution(correct_RxN)
            if comparable and correct_RxN.shape[1] > 1
            else None
        ),
        'varied': sorted(varied),
    }
