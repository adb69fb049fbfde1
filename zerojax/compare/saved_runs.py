"""Trained runs: read from their workdirs, and asked for what they predict."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import scipy.special
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import paths
from zerojax.host.checkpoint import Checkpoints, has_checkpoint
from zerojax.host.errors import UsageError
from zerojax.host.records import Record, read_metrics
from zerojax.models import Network
from zerojax.run import data
from zerojax.run.recorder import when_broken
from zerojax.step import determinism
from zerojax.step.batch import normalize

Tree = Any
Variables = dict[str, Tree]

BATCH_SIZE = 500  # held-out images at once


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A workdir as it was found."""

    workdir: pathlib.Path
    config: ConfigDict
    dataset: Record  # of the manifest: sizes and hashes
    lines: list[Record]  # of metrics.jsonl
    steps: list[int]  # of its checkpoints
    variables: Variables  # of the newest
    broken_streams: dict[str, int] | None  # as its state has them; None of an older version

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


def read_run(workdir: pathlib.Path) -> SavedRun:
    """Reads a workdir, in which another process may be training.

    Raises:
        UsageError: it is no folder, has no checkpoint yet, or its files are damaged.
        RunError: its newest checkpoint is damaged.
    """
    obstacle = paths.why_no_folder(workdir, must_exist=True)
    if obstacle:
        raise UsageError(f'{workdir}: not a folder, {obstacle}; name the workdir of a run')
    if not has_checkpoint(workdir):
        raise UsageError(f'{workdir}: holds no finished checkpoint; name the workdir of a run')
    config = config_lib.read(workdir / 'config.json')
    try:
        dataset = json.loads((workdir / 'manifest.json').read_text())['dataset']
        dataset['train_sha256'], dataset['eval_sha256']
        lines = read_metrics(workdir / 'metrics.jsonl')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{workdir}: holds no run that can be read: {error}') from error
    with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
        steps = checkpoints.steps
        variables = checkpoints.read_variables(steps[-1])
        broken_streams = checkpoints.read_broken_streams(steps[-1])
    return SavedRun(workdir, config, dataset, lines, steps, variables, broken_streams)


def describe_streams(run: SavedRun) -> Record:
    """{'broken_streams', 'asymmetry_by_stream'} at the newest checkpoint, as in summary.json; None
    where an older version did not record them, or nothing was measured at that step."""
    measured = [
        line['asymmetry_by_stream']
        for line in run.lines
        if line['step'] == run.step and 'asymmetry_by_stream' in line
    ]
    asymmetry = measured[-1] if measured else None
    known = run.broken_streams
    return {
        'broken_streams': None if known is None else when_broken(known, asymmetry or {}, run.step),
        'asymmetry_by_stream': asymmetry,
    }


def load_dataset(runs: Sequence[SavedRun]) -> data.Dataset:
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
    dataset = data.load_of(first.config)
    for part, split in (('train', dataset.train), ('eval', dataset.eval)):
        if split.sha256() != first.dataset[f'{part}_sha256']:
            raise UsageError(
                f'{first.workdir}: dataset.{part}_split={fields[f"{part}_split"]!r} of '
                f'{fields.name} holds other examples now than when the run was trained; '
                'put the data of that time back'
            )
    return dataset


def describe_dataset(run: SavedRun) -> str:
    fields = run.config.dataset
    return f'dataset.name={fields.name!r}, eval_split={fields.eval_split!r}'


def network(run: SavedRun, num_classes: int) -> Network:
    """The run's network without dropout, which has no part in what is compared."""
    return config_lib.build_model(run.config, num_classes, dropout=0.0)


@functools.cache
def logits_function(model: Network) -> Any:
    """Jitted (variables, images uint8 [B, H, W, C], mean [C], std [C]) -> logits [B, N]."""
    return determinism.jit_in_mode(
        lambda variables, images, mean, std: model.apply(
            variables, normalize(images, mean, std), train=False
        ),
        'deterministic',  # whatever the runs' was: both networks are asked alike
    )


def held_out_logits(run: SavedRun, variables: Variables, dataset: data.Dataset) -> np.ndarray:
    """Logits of the held-out set, float64 [N, C], that the run's network gives with `variables`."""
    apply = logits_function(network(run, dataset.num_classes))
    images = dataset.eval.images
    size = min(BATCH_SIZE, len(images))
    padded = np.pad(images, ((0, -len(images) % size), (0, 0), (0, 0), (0, 0)))
    variables = jax.device_put(variables)
    mean_and_std = data.normalization(run.config)
    parts = [
        apply(variables, padded[i : i + size], *mean_and_std) for i in range(0, len(padded), size)
    ]
    return np.concatenate(jax.device_get(parts)).astype(np.float64)[: len(images)]


def mean_loss(logits_NxC: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean cross-entropy in nats; nan or infinity where the logits are."""
    with np.errstate(invalid='ignore'):
        log_probabilities_NxC = scipy.special.log_softmax(logits_NxC, axis=-1)
    return -float(np.mean(log_probabilities_NxC[np.arange(len(labels_N)), labels_N]))


def predict(run: SavedRun, dataset: data.Dataset) -> Predictions:
    """What the run's newest checkpoint predicts, with the statistics that it was saved with."""
    logits_NxC = held_out_logits(run, run.variables, dataset)
    classes_N = np.argmax(logits_NxC, axis=-1)
    with np.errstate(invalid='ignore'):
        probabilities_NxC = scipy.special.softmax(logits_NxC, axis=-1)
    return Predictions(
        loss=mean_loss(logits_NxC, dataset.eval.labels),
        probabilities=probabilities_NxC,
        classes=classes_N,
        correct=classes_N == dataset.eval.labels,
    )
