"""Which streams must break? Every subset of them, each broken at the start by noise of 0.01.

    python -m experiments.streams

The noise is aimed at the streams of the subset; all others stay symmetric to the bit if the kernels
keep them so, and the table says which broke. Beside the accuracies stands how fast small asymmetry
of each stream grows, from networks of two features a stream. 3 seeds on the digits, 24 runs, in ten
minutes on two CPU cores. See `experiments.runs` for flags and restarts.
"""

import itertools
import sys
from typing import Any

from experiments import runs
from experiments.trajectories import Laboratory
from zerojax import symmetry
from zerojax.measure.prediction import growth_per_step
from zerojax.run.prediction import Predictor

SCALE = 1e-2
MAX_STEPS = 400  # over the second half of which growth is measured


def subsets(streams: list[str]) -> list[tuple[str, ...]]:
    """The smallest first."""
    sizes = range(len(streams) + 1)
    return [each for size in sizes for each in itertools.combinations(streams, size)]


def arms(streams: list[str]) -> dict[str, dict[str, Any]]:
    """Name of each arm: the fields that make it."""
    found: dict[str, dict[str, Any]] = {}
    for subset in subsets(streams):
        broken: dict[str, Any] = {
            'perturbation.kind': 'gaussian',
            'perturbation.scale': SCALE,
            'perturbation.streams': subset,
        }
        found[' + '.join(subset) or 'none'] = broken if subset else {'perturbation.kind': 'none'}
    return found


def growth(experiment: runs.Experiment, laboratory: Laboratory) -> dict[str, float | None]:
    """Of each stream, natural logarithm of its asymmetry per step, with the batches of seed 0."""

    def compute() -> dict[str, Any]:
        fields = {'perturbation.kind': 'gaussian', 'seed': 0, 'perturbation.seed': 0}
        config = runs.changed(experiment.config, **fields)
        active = Predictor(config, laboratory.dataset, MAX_STEPS, features=8).active()
        return {'growth': {name: growth_per_step(curve) for name, curve in active.items()}}

    return laboratory.remember(compute, what='growth', steps=MAX_STEPS)['growth']


def draw(experiment: runs.Experiment, by_arm: dict[str, list[runs.FinishedRun]]) -> None:
    figure, (accuracy, asymmetry) = runs.new_figure(1, 2, width=12, height=5)
    asymmetry.set_yscale('log')
    for i, (arm, its_runs) in enumerate(by_arm.items()):
        look = {**runs.style(i), **runs.marks(i), 'label': arm, 'lw': 1.5}
        steps = [line['step'] for line in its_runs[0].of_kind('eval')]
        curves = [[line['accuracy'] for line in run.of_kind('eval')] for run in its_runs]
        runs.plot_band(accuracy, steps, curves, at_most=1, **look)
        lines = [run.of_kind('train') for run in its_runs]
        if all(line['asymmetry'] > 0 for each in lines for line in each):
            steps = [line['step'] for line in lines[0]]
            curves = [[line['asymmetry'] for line in each] for each in lines]
            runs.plot_band(asymmetry, steps, curves, **look)
    accuracy.set(xlabel='step', ylabel='held-out accuracy', ylim=(0, 1.02))
    asymmetry.set(xlabel='step', ylabel='largest asymmetry (none: exactly 0)')
    figure.legend(
        *accuracy.get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False
    )
    runs.save_figure(experiment, figure)


def run(experiment: runs.Experiment) -> None:
    laboratory = Laboratory(experiment.config, experiment.workdir / 'predictions')
    streams = symmetry.stream_names(laboratory.axes)
    by_arm = runs.by_arm(runs.train_all(experiment, arms(streams)))
    growths = growth(experiment, laboratory)
    rows = []
    for (arm, its_runs), subset in zip(by_arm.items(), subsets(streams), strict=True):
        of_each = [growths[name] for name in subset]
        broke = {
            name
            for run in its_runs
            for name, at_step in run.summary['broken_streams'].items()
            if at_step is not None
        }
        rows.append(
            {
                'perturbed streams': arm,
                'streams that broke': ' + '.join(x for x in streams if x in broke) or 'none',
                **runs.accuracies(its_runs),
                'growth a step': ', '.join('-' if x is None else f'{x:+.3f}' for x in of_each)
                or '-',
            }
        )
    draw(experiment, by_arm)
    runs.write_table(experiment, rows)


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=3))
