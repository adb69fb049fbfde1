"""How close are predicted curves of asymmetry to those of the run, stream by stream?

    python -m experiments.curves
    python -m experiments.curves --config=configs/cifar.py --config.num_epochs=None \\
        --config.num_steps=60 --config.optimizer.drop_at='()' \\
        --config.determinism.mode=deterministic --config.dataset.eval_split='test[:500]'

Gaussian noise of 1e-3 and of 1e-6 on the initial weights. At the paper's size, the second command,
few steps can be had, in which asymmetry hardly reaches 0.1, so that there is no onset to compare:
the measure is the difference of log10 of the asymmetry, at each step. One seed; on the digits in
two minutes on two CPU cores, at the paper's size 25 minutes. See `experiments.runs` for flags and
restarts.
"""

import sys
from typing import Any

import numpy as np

from experiments import runs
from experiments.trajectories import METHODS, Laboratory, Trajectory
from zerojax.measure.prediction import Curves
from zerojax.perturb import Perturbation

SCALES = (1e-3, 1e-6)


def errors(measured: np.ndarray, log_predicted: np.ndarray) -> np.ndarray:
    """|Δ log10| after each step; infinite where one of both is not finite, or 0."""
    with np.errstate(divide='ignore', invalid='ignore'):
        off = np.abs(log_predicted[1:] - np.log(measured)) / np.log(10)
    return np.where(np.isnan(off), np.inf, off)


def draw(
    experiment: runs.Experiment,
    measured: dict[float, list[Trajectory]],
    predicted: dict[str, list[Curves]],
) -> None:
    """A panel a scale, of the first seed."""
    figure, panels = runs.new_figure(1, len(SCALES), width=12, height=5)
    for i, (axes, scale) in enumerate(zip(panels, SCALES, strict=True)):
        trajectory = measured[scale][0]
        steps = np.arange(1, len(trajectory.loss) + 1)
        for k, (name, curve) in enumerate(trajectory.by_stream.items()):
            color = runs.COLORS[k % len(runs.COLORS)]
            axes.plot(steps, curve, color=color, lw=1.5, label=name)
            axes.plot(steps, np.exp(predicted['reduced'][i][name][1:]), ':', color=color, lw=2.5)
            linear = predicted['linear'][i][name][1:]
            axes.plot(steps, np.exp(np.where(linear < 0, linear, np.nan)), '--', color=color, lw=1)
        axes.set(yscale='log', xlabel='step', ylabel='asymmetry', title=f'noise of {scale:g}')
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=5, frameon=False,
        title='line: the run; dots: reduced network; dashes: linear prediction',
    )  # fmt: skip
    runs.save_figure(experiment, figure)


def run(experiment: runs.Experiment) -> None:
    laboratory = Laboratory(experiment.config, experiment.workdir / 'runs')
    seeds = range(experiment.seeds)
    predicted = [laboratory.predict(seed, SCALES) for seed in seeds]
    arms = {scale: Perturbation('gaussian', scale) for scale in SCALES}
    measured = laboratory.run_arms(arms, experiment.seeds)
    rows: list[dict[str, Any]] = []
    for i, scale in enumerate(SCALES):
        for seed in seeds:
            for name, curve in measured[scale][seed].by_stream.items():
                of_each = {m: errors(curve, predicted[seed][m][i][name]) for m in METHODS}
                rows.append(
                    {
                        'scale': f'{scale:.0e}',
                        'seed': seed,
                        'stream': name,
                        'asymmetry at the start': f'{curve[0]:.1e}',
                        'at the end': f'{curve[-1]:.1e}',
                        **{f'{m}, median': f'{np.median(off):.2f}' for m, off in of_each.items()},
                        **{f'{m}, largest': f'{np.max(off):.2f}' for m, off in of_each.items()},
                    }
                )
    draw(experiment, measured, predicted[0])
    runs.write_table(experiment, rows)


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=1, config_file='configs/onset.py'))
