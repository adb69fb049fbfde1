"""How many unique features does a network need at the start? The paper's toy.

    python -m experiments.unique_features

One hidden ReLU layer of 256 features, of which 1, 2, 4, ... 256 differ at the start, with and
without noise of 1e-3 · N(0, 1) on the initial weights: 54 runs on the digits, three minutes on two
CPU cores. The sizes are ours; the paper's are not known. Other data by
`--config=configs/fashion_mnist.py:trial`. See `experiments.runs` for flags and restarts.
"""

import sys

import numpy as np

from experiments import runs

WIDTH = 256
UNIQUE = tuple(2**k for k in range(9))
NOISES = (0.0, 1e-3)


def arms() -> dict[str, dict[str, object]]:
    """Name of each arm: the fields that make it."""
    return {
        f'{unique} unique, noise {noise:g}': {
            'model.name': 'mlp',
            'model.width': WIDTH,
            'model.init': 'random',
            'model.unique_features': unique,
            'perturbation.kind': 'gaussian' if noise else 'none',
            'perturbation.scale': noise,
        }
        for noise in NOISES
        for unique in UNIQUE
    }


def draw(experiment: runs.Experiment, by_arm: dict[str, list[runs.FinishedRun]]) -> None:
    figure, axes = runs.new_figure(1, 1, width=6, height=4)
    per_noise = np.array_split(list(by_arm.values()), len(NOISES))
    for i, (noise, its_arms) in enumerate(zip(NOISES, per_noise, strict=True)):
        accuracies = np.array([[run.summary['eval_accuracy'] for run in arm] for arm in its_arms]).T
        label = f'noise {noise:g}' if noise else 'no noise'
        look = {**runs.style(i), 'label': label, 'marker': 'o'}
        runs.plot_band(axes, UNIQUE, accuracies.tolist(), at_most=1, **look)
    axes.set_xscale('log', base=2)
    axes.set(
        xlabel=f'unique hidden features at the start (of {WIDTH})',
        ylabel='held-out accuracy',
        ylim=(0, 1.02),
    )
    axes.legend(frameon=False)
    runs.save_figure(experiment, figure)


def run(experiment: runs.Experiment) -> None:
    by_arm = runs.by_arm(runs.train_all(experiment, arms()))
    rows = []
    for (arm, its_runs), fields in zip(by_arm.items(), arms().values(), strict=True):
        at_end = sorted({run.summary['unique_features']['hidden'] for run in its_runs})
        rows.append(
            {
                'unique features at the start': fields['model.unique_features'],
                'noise': arm.split()[-1],
                **runs.accuracies(its_runs),
                'unique features at the end': ', '.join(map(str, at_end)),
            }
        )
    draw(experiment, by_arm)
    runs.write_table(experiment, rows)


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=3))
