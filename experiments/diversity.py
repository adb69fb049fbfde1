"""How many unique features a stream does the deep network need, in all streams or in the last?

    python -m experiments.diversity [--unique=1,2,4,8,16,32] [--scales=1e-4,1e-2]
    python -m experiments.diversity --config=configs/cifar.py --unique=1,2,4,8,16 --scales=1e-4 \\
        --seeds=1 --config.num_epochs=15 --config.optimizer.drop_at='(0.5,0.75,0.9)'

ConstNet-10-10, or a config's network, starts with m unique features in every stream (of 16 to 640;
all of them in a stream of fewer), or in the last stream and 1 in all others: feature d is a copy of
feature d mod m. Copies stay equal, so it is trained and evaluated as the reduced network that it is
equal to, see `zerojax.symmetry.quotient`.

Noise of each scale · N(0, 1) is added to the initial weights of the reduced network, one draw for
each pair of unique features and position of a kernel. In the large network all copies of such a
pair get the same, as of kind 'unequal_init'. So a sum over n features gets noise that grows as
n / sqrt(m), not as sqrt(n): the fewer are unique, the more comes through.

3 seeds on the digits, in nine minutes on two CPU cores; the second command, on CIFAR-10, in two
hours on one. See `experiments.runs` for flags and restarts.
"""

import dataclasses
import functools
import sys

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import runs
from experiments.trajectories import Laboratory
from zerojax import symmetry
from zerojax.host.errors import UsageError
from zerojax.host.terminal import say
from zerojax.measure.stability import State
from zerojax.perturb import Perturbation, perturb_weights
from zerojax.predict import parse_scales
from zerojax.run.evaluate import Evaluation
from zerojax.run.prediction import check_predictable, check_symmetric
from zerojax.run.reduction import Reduction
from zerojax.step import jit_in_mode
from zerojax.step.precision import numbers_of
from zerojax.symmetry import quotient
from zerojax.symmetry.orbits import feature_counts

Accuracies = dict[tuple[float, str, int], list[float]]  # by noise, where, m; one for each seed
WHERE = {'all': 'all streams', 'last': 'last stream alone'}


class DiverseNetwork:
    """The network with m unique features in each of these streams and 1 in all others."""

    def __init__(self, laboratory: Laboratory, streams: list[str], m: int) -> None:
        self._laboratory = laboratory
        params = laboratory.initial_state(seed=0).params
        check_symmetric(laboratory.program, params)
        shares = quotient.shares(feature_counts(params, laboratory.axes), m).first
        self.orbits = symmetry.Orbits(
            {name: x if name in streams else np.zeros_like(x) for name, x in shares.items()},
            entries={},
        )
        self._reduction = Reduction(laboratory.program, self.orbits)
        self._step = jit_in_mode(self._reduction.step, 'deterministic')
        self._evaluate = Evaluation(laboratory.config, laboratory.dataset, self._reduction.model)

    def start(self, scale: float, seed: int) -> State:
        """Of the reduced network, before the first step, with noise on its weights."""
        large = self._laboratory.initial_state(seed)
        params = perturb_weights(
            Perturbation('gaussian', scale),
            quotient.reduce(large.params, self._laboratory.axes, self.orbits),
            large.keys['perturbation'],
            jnp.int32(0),
            frozen=self._laboratory.config.optimizer.freeze,
        )
        return self._reduction.state(params, seed)

    def train(self, scale: float, seed: int) -> dict[str, float]:
        """{'loss', 'accuracy'} on the held-out set after the last step."""
        state = self.start(scale, seed)
        for source in self._laboratory.sources(state[1]):
            state = self._step(state, source)
        params, rest = state
        measured = self._evaluate(dataclasses.replace(rest, params=params))
        return {name: float(x) for name, x in measured.items()}

    def accuracy(self, scale: float, seed: int) -> float:
        """On the held-out set after the last step, computed only once."""
        return self._laboratory.remember(
            functools.partial(self.train, scale, seed),
            unique=self.orbits.counts(),
            scale=scale,
            seed=seed,
        )['accuracy']


def measure(
    experiment: runs.Experiment, laboratory: Laboratory, unique: list[int], scales: list[float]
) -> Accuracies:
    names = symmetry.stream_names(laboratory.axes)
    found: Accuracies = {}
    for where, streams in {'all': names, 'last': names[-1:]}.items():
        for m in unique:
            with numbers_of(laboratory.config.param_dtype):
                network = DiverseNetwork(laboratory, streams, m)
            for scale in scales:
                accuracies = [network.accuracy(scale, seed) for seed in range(experiment.seeds)]
                found[scale, where, m] = accuracies
                listed = ', '.join(f'{x:.3f}' for x in accuracies)
                say(f'{m} unique, {where}, noise {scale:g}: accuracy {listed}')
    return found


def draw(found: Accuracies) -> Figure:
    """A panel a noise: the median of all seeds, and the lowest and the highest."""
    scales = list(dict.fromkeys(scale for scale, _, _ in found))
    unique = list(dict.fromkeys(m for _, _, m in found))
    figure, panels = runs.new_figure(1, len(scales), width=5 * len(scales), height=4)
    labels = {'all': 'in each stream', 'last': 'in the last stream, 1 in the others'}
    for axes, scale in zip(np.ravel(panels), scales, strict=True):
        for i, (where, label) in enumerate(labels.items()):
            accuracies = np.array([found[scale, where, m] for m in unique])
            look = runs.style(i)
            axes.plot(unique, np.median(accuracies, 1), 'o-', color=look['color'], label=label)
            axes.fill_between(
                unique, accuracies.min(1), accuracies.max(1), color=look['color'], alpha=0.2, lw=0
            )
        axes.set_xscale('log', base=2)
        axes.set(
            xticks=unique,
            xticklabels=unique,
            xlabel='unique features a stream',
            ylabel='held-out accuracy',
            ylim=(0, 1.02),
            title=f'noise {scale:g}',
        )
    np.ravel(panels)[0].legend(frameon=False, loc='lower right')
    return figure


def run(experiment: runs.Experiment) -> None:
    unique = runs.counts(experiment, 'unique', least=1)
    scales = parse_scales(experiment.flags['scales'], experiment.config)
    check_predictable(runs.changed(experiment.config, **{'perturbation.kind': 'gaussian'}))
    config = runs.changed(experiment.config, **{'determinism.mode': 'deterministic'})
    laboratory = Laboratory(config, experiment.workdir / 'accuracies')
    largest = max(feature_counts(laboratory.initial_state(0).params, laboratory.axes).values())
    if unique[-1] > largest:
        raise UsageError(
            f'--unique={experiment.flags["unique"]}: must be at most {largest}, the number of '
            'features of the largest stream'
        )
    found = measure(experiment, laboratory, unique, scales)
    rows = [
        {
            'noise': f'{scale:g}',
            'unique features a stream': m,
            'n': experiment.seeds,
            **{
                f'accuracy, {where}': runs.mean_and_deviation(found[scale, key, m])
                for key, where in WHERE.items()
            },
        }
        for scale in scales
        for m in unique
    ]
    runs.save_figure(experiment, draw(found))
    runs.write_table(experiment, rows)


if __name__ == '__main__':
    sys.exit(
        runs.main(
            run, __doc__, seeds=3, config_file='configs/digits.py:wide', unique='1,2,4,8,16,32',
            scales='1e-4,1e-2',
        )
    )  # fmt: skip
