"""What is measured at an evaluation: loss and accuracy on the held-out set, and every layer.

`for_all_runs` lifts a pure function of a run's variables, as `jax.vmap` does, where several runs
are computed at once; what is returned then has a leading axis [R].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import distributed
from zerojax.host.records import Record
from zerojax.measure import metrics
from zerojax.models import Network
from zerojax.run.data import Dataset, normalization
from zerojax.step import TrainState, cross_entropy, eval_step_function, jit_in_mode
from zerojax.step.batch import normalize

EVAL_BATCH_SIZE = 500


def one_run(function: Any, in_axes: Any = 0) -> Any:
    """The `for_all_runs` of a single run."""
    del in_axes
    return function


def make_evaluation(
    config: ConfigDict,
    dataset: Dataset,
    model: Network,
    for_all_runs: Any = one_run,
    batch_sharding: jax.sharding.NamedSharding | None = None,
) -> Callable[[TrainState], dict[str, Any]]:
    """A function state -> {'loss', 'accuracy'}, means over the whole held-out set."""
    mean, std = normalization(config)
    eval_step = eval_step_function(model, lambda images: normalize(images, mean, std))
    eval_step = jit_in_mode(for_all_runs(eval_step, (0, None, None)), config.determinism.mode)
    split = dataset.eval
    size = min(EVAL_BATCH_SIZE, len(split.labels))
    size += -size % config.mesh.data
    padding = -len(split.labels) % size
    images = np.pad(split.images, ((0, padding), (0, 0), (0, 0), (0, 0)))
    labels = np.pad(split.labels, (0, padding), constant_values=-1)
    batches = [
        jax.device_put((images[i : i + size], labels[i : i + size]), batch_sharding)
        for i in range(0, len(labels), size)
    ]

    def evaluate(state: TrainState) -> dict[str, Any]:
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        sums = distributed.fetch([eval_step(variables, *batch) for batch in batches])
        loss, correct = (
            np.sum([each[name] for each in sums], axis=0, dtype=np.float64)
            for name in ('loss', 'correct')
        )
        return {'loss': loss / len(split.labels), 'accuracy': correct / len(split.labels)}

    return evaluate


def make_layer_measurement(
    config: ConfigDict,
    dataset: Dataset,
    for_all_runs: Any = one_run,
    batch_sharding: jax.sharding.NamedSharding | None = None,
) -> Callable[[TrainState], Any]:
    """A function state -> what the 'layers' lines of metrics.jsonl hold, as arrays on the host.

    Activations and gradients are those of the mean loss over the first batch_size training images,
    neither shuffled nor augmented, normalised by that batch and without dropout.
    """
    model = config_lib.build_model(config, dataset.num_classes, dropout=0.0)
    mean, std = normalization(config)
    split = dataset.train
    images = jax.device_put(split.images[: config.batch_size], batch_sharding)
    labels = jax.device_put(split.labels[: config.batch_size], batch_sharding)

    def measure(
        params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array
    ) -> dict[str, Any]:
        def loss() -> jax.Array:
            logits, _ = model.apply(
                {'params': params, 'batch_stats': batch_stats},
                normalize(images, mean, std),
                train=True,
                mutable=['batch_stats'],
            )
            return jnp.mean(cross_entropy(logits, labels))

        outputs = metrics.layer_outputs(loss, model.layers())
        return metrics.of_kernels(params) | metrics.of_layer_outputs(*outputs)

    measure = jit_in_mode(for_all_runs(measure, (0, 0, None, None)), config.determinism.mode)

    def measure_layers(state: TrainState) -> Any:
        return distributed.fetch(measure(state.params, state.batch_stats, images, labels))

    return measure_layers


def as_record(measured: Any) -> Record:
    """One run's measurements of its layers, as JSON takes them.

    Only the diversity can be infinite, where features are identical; JSON knows no infinity.
    """
    return jax.tree.map(lambda x: x.item() if np.isfinite(x) else None, measured)
