"""Two trained runs: where they part, how far apart their weights, losses and features are."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from zerojax.compare import interpolation, parting, similarity
from zerojax.compare.saved_runs import (
    Predictions,
    SavedRun,
    Variables,
    held_out_logits,
    mean_loss,
    network,
)
from zerojax.host.checkpoint import Checkpoints
from zerojax.host.errors import RunError
from zerojax.host.records import Record
from zerojax.models import Network
from zerojax.run import data
from zerojax.step import determinism
from zerojax.step.batch import normalize
from zerojax.symmetry import alignment

POINTS = [i / 10 for i in range(11)]  # on the straight line between two networks
STATISTICS_EXAMPLES = 5000  # training images that BatchNorm's statistics are computed on, at most
CKA_EXAMPLES = 500  # held-out images whose features are compared, at most

# What two networks may differ in although all their weights have the same shapes.
FUNCTION_FIELDS = ('name', 'shortcut', 'negative_slope')


@functools.cache
def statistics_function(model: Network) -> Any:
    """Jitted (variables, images, mean, std) -> what `interpolation.batch_statistics` returns."""
    return determinism.jit_in_mode(
        lambda variables, images, mean, std: interpolation.batch_statistics(
            model, variables, normalize(images, mean, std)
        ),
        'deterministic',
    )


@functools.cache
def grams_function(model: Network) -> Any:
    """Jitted (variables, images, mean, std) -> the Gram matrix [B, B] of each layer's features."""
    layers = model.layers()

    def grams(variables: Variables, images: Any, mean: Any, std: Any) -> dict[str, jax.Array]:
        _, captured = model.apply(
            variables,
            normalize(images, mean, std),
            train=False,
            capture_intermediates=lambda module, _: '/'.join(module.path) in layers,
            mutable=['intermediates'],
        )
        outputs = flatten_dict(captured['intermediates'], sep='/')
        return {layer: similarity.gram(outputs[f'{layer}/__call__'][0]) for layer in layers}

    return determinism.jit_in_mode(grams, 'deterministic')


def compare_pair(
    a: SavedRun, b: SavedRun, found_a: Predictions, found_b: Predictions, dataset: data.Dataset
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
    axes = network(a, dataset.num_classes).feature_axes()['params']
    return record | {
        'parting': find_parting(a, b, dataset.num_classes),
        'weights': {
            'l2': similarity.l2_distance(a.variables['params'], b.variables['params']),
            'l2_by_stream': similarity.l2_by_stream(
                a.variables['params'], b.variables['params'], axes
            ),
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
    """None for nan and infinity, which JSON does not know."""
    return value if math.isfinite(value) else None


def align(a: SavedRun, b: SavedRun, num_classes: int) -> tuple[Variables, alignment.Permutations]:
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


def find_parting(a: SavedRun, b: SavedRun, num_classes: int) -> Record:
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


def common_checkpoints(a: SavedRun, b: SavedRun) -> Iterator[tuple[int, Variables, Variables]]:
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


def compare_losses(a: SavedRun, b: Variables, aligned: Variables, dataset: data.Dataset) -> Record:
    """Held-out loss on the straight lines from a to b and to b aligned, and their barriers."""

    def losses(end: Variables) -> list[float]:
        return [loss_with_own_statistics(a, at, dataset) for at in line_to(end)]

    def line_to(end: Variables) -> Iterator[Variables]:
        return (interpolation.interpolate(a.variables, end, t) for t in POINTS)

    before, after = losses(b), losses(aligned)
    return {
        't': POINTS,
        'loss': [finite(loss) for loss in before],
        'loss_aligned': [finite(loss) for loss in after],
        'barrier': finite_barrier(before),
        'barrier_aligned': finite_barrier(after),
    }


def finite_barrier(losses: list[float]) -> float | None:
    """The barrier of losses at POINTS; None where one of them is not finite."""
    return interpolation.barrier(POINTS, losses) if np.isfinite(losses).all() else None


def loss_with_own_statistics(run: SavedRun, variables: Variables, dataset: data.Dataset) -> float:
    """Held-out loss of the run's network with BatchNorm's statistics recomputed.

    They are means over batches of the run's size of the first training images, not augmented.
    """
    statistics = statistics_function(network(run, dataset.num_classes))
    images = dataset.train.images[:STATISTICS_EXAMPLES]
    size = min(run.config.batch_size, len(images))
    on_device = jax.device_put(variables)
    of_batches = [
        statistics(on_device, images[i : i + size], *data.normalization(run.config))
        for i in range(0, len(images) - size + 1, size)
    ]
    mean = jax.tree.map(
        lambda *each: np.mean(each, axis=0, dtype=np.float64).astype(each[0].dtype),
        *jax.device_get(of_batches),
    )
    logits_NxC = held_out_logits(run, {**variables, 'batch_stats': mean}, dataset)
    return mean_loss(logits_NxC, dataset.eval.labels)


def compare_features(a: SavedRun, b: SavedRun, dataset: data.Dataset) -> dict[str, float | None]:
    """Linear CKA of each layer's features on the first held-out images.

    By unbiased estimates, as the features of a convolution outnumber the images: the usual ones
    would say of any two networks that they are alike.
    """
    images = dataset.eval.images[:CKA_EXAMPLES]
    ours, theirs = (
        jax.device_get(
            grams_function(network(run, dataset.num_classes))(
                run.variables, images, *data.normalization(run.config)
            )
        )
        for run in (a, b)
    )
    layers = network(a, dataset.num_classes).layers()
    return {layer: finite(similarity.debiased_cka(ours[layer], theirs[layer])) for layer in layers}


def differing_fields(a: ConfigDict, b: ConfigDict) -> Record:
    """{field: [value in a, value in b]}; a field that one of them lacks is null there."""
    ours, theirs = flatten_dict(a.to_dict(), sep='.'), flatten_dict(b.to_dict(), sep='.')
    return {
        field: [ours.get(field), theirs.get(field)]
        for field in sorted(ours.keys() | theirs.keys())
        if ours.get(field) != theirs.get(field)
    }


def same_network(a: SavedRun, b: SavedRun) -> bool:
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
