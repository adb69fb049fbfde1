"""What is measured at an evaluation: loss and accuracy on the held-out set, and every layer.

`for_all_runs` lifts a pure function of a run's variables, as `jax.vmap` does, where several runs
are computed at once; what is returned then has a leading axis [R].
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import distributed
from zerojax.host.records import Record
from zerojax.measure import metrics
from zerojax.run.data import Dataset, normalization
from zerojax.run.executable import Executable
from zerojax.step import TrainState, cross_entropy, eval_step_function, jit_in_mode
from zerojax.step.batch import normalize
from zerojax.step.model import Model

EVAL_BATCH_SIZE = 500


def one_run(function: Any, in_axes: Any = 0) -> Any:
    """The `for_all_runs` of a single run."""
    del in_axes
    return function


class Evaluation:
    """Called with a state: {'loss', 'accuracy'}, means over the whole held-out set."""

    def __init__(
        self,
        config: ConfigDict,
        dataset: Dataset,
        model: Model,
        for_all_runs: Any = one_run,
        batch_sharding: jax.sharding.NamedSharding | None = None,
    ) -> None:
        mean, std = normalization(config)
        eval_step = eval_step_function(model, lambda images: normalize(images, mean, std))
        self._eval_step = Executable(
            jit_in_mode(for_all_runs(eval_step, (0, None, None)), config.determinism.mode)
        )
        split = dataset.eval
        self._number = len(split.labels)
        size = min(EVAL_BATCH_SIZE, self._number)
        size += -size % config.mesh.data
        padding = -self._number % size
        images = np.pad(split.images, ((0, padding), (0, 0), (0, 0), (0, 0)))
        labels = np.pad(split.labels, (0, padding), constant_values=-1)
        self._batches = [
            jax.device_put((images[i : i + size], labels[i : i + size]), batch_sharding)
            for i in range(0, len(labels), size)
        ]

    def lower(self, state: TrainState) -> Executable:
        """What is called with such a state, lowered."""
        return self._eval_step.lower(_variables(state), *self._batches[0])

    def __call__(self, state: TrainState) -> dict[str, Any]:
        variables = _variables(state)
        sums = distributed.fetch([self._eval_step(variables, *batch) for batch in self._batches])
        loss, correct = (
            np.sum([each[name] for each in sums], axis=0, dtype=np.float64)
            for name in ('loss', 'correct')
        )
        return {'loss': loss / self._number, 'accuracy': correct / self._number}


class LayerMeasurement:
    """Called with a state: size and features of every layer's output and of its gradient.

    On the host. They are those of the mean loss over the first batch_size training images, neither
    shuffled nor augmented, normalised by that batch and without dropout.
    """

    def __init__(
        self,
        config: ConfigDict,
        dataset: Dataset,
        batched: bool = False,
        for_all_runs: Any = one_run,
        batch_sharding: jax.sharding.NamedSharding | None = None,
    ) -> None:
        model = config_lib.build_model(config, dataset.num_classes, dropout=0.0, batched=batched)
        mean, std = normalization(config)
        split = dataset.train
        images, labels = split.images[: config.batch_size], split.labels[: config.batch_size]
        self._batch = jax.device_put((images, labels), batch_sharding)

        def measure(variables: Any, images: jax.Array, labels: jax.Array) -> dict[str, Any]:
            def loss() -> jax.Array:
                images_normalized = normalize(images, mean, std)
                logits, _ = model.apply(
                    variables, images_normalized, train=True, mutable=['batch_stats']
                )
                return jnp.mean(cross_entropy(logits, labels))

            return metrics.of_layer_outputs(*metrics.layer_outputs(loss, model.layers()))

        self._measure = Executable(
            jit_in_mode(for_all_runs(measure, (0, None, None)), config.determinism.mode)
        )

    def lower(self, state: TrainState) -> Executable:
        """What is called with such a state, lowered."""
        return self._measure.lower(_variables(state), *self._batch)

    def __call__(self, state: TrainState) -> Any:
        return distributed.fetch(self._measure(_variables(state), *self._batch))


def _variables(state: TrainState) -> dict[str, Any]:
    return {'params': state.params, 'batch_stats': state.batch_stats}


def as_record(measured: Any) -> Record:
    """One run's measurements, as JSON takes them, which knows no infinity.

    The diversity is infinite where features are identical; a distance, where its square is too
    large for the dtype.
    """
    return jax.tree.map(lambda x: np.asarray(x).item() if np.isfinite(x) else None, measured)
