"""How close are predicted curves of asymmetry to those of the run, stream by stream?

    python -m experiments.curves
    python -m experiments.curves --config=configs/cifar.py --config.num_epochs=None \\
        --config.num_steps=200 --config.optimizer.drop_at='()' \\
        --config.determinism.mode=deterministic --config.dataset.eval_split='test[:500]'

Gaussian noise of 1e-3 and of 1e-6 on the initial weights, and, without a prediction, an emulated
order of additions in every step. At the paper's size, the second command, few steps can be had and
most of them lie before an onset, so the measure is the difference of log10 of the asymmetry, at
each step; steps.csv has them all. One seed; on the digits in three minutes on two CPU cores, at
the paper's size two hours. See `experiments.runs` for flags and restarts.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import runs
from experiments.trajectories import METHODS, Laboratory, Trajectory
from zerojax.host import records
from zerojax.measure.prediction import Curves
from zerojax.perturb import Perturbation

SCALES = {'noise of 1e-3': 1e-3, 'noise of 1e-6': 1e-6}
ORDER = 'order of additions'
STYLES = {'{}': ('-', 1.5), 'reduced: {}': (':', 2.5), 'linear: {}': ('--', 1)}  # of columns


def steps_of(
    run: str, trajectory: Trajectory, predicted: dict[str, Curves]
) -> list[dict[str, Any]]:
    """A row a step: loss, each stream's asymmetry, and what each method of prediction says.

    NaN where that says nothing.
    """
    columns = trajectory.by_stream.copy()
    for method in METHODS:
        for stream, curve in trajectory.by_stream.items():
            nothing = np.full(len(curve), np.nan)
            of_method = predicted.get(method)
            with np.errstate(over='ignore'):
                columns[f'{method}: {stream}'] = (
                    nothing if of_method is None else np.exp(of_method[stream][1:])
                )
    return [
        {'run': run, 'step': step + 1, 'loss': loss}
        | {name: x[step] for name, x in columns.items()}
        for step, loss in enumerate(trajectory.loss)
    ]


def streams(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Those of which rows of `steps_of` have the asymmetry."""
    return [name for name in rows[0] if f'{METHODS[0]}: {name}' in rows[0]]


def by_run(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of `steps_of` of each run, runs in the order of their first row."""
    return {
        name: [row for row in rows if row['run'] == name]
        for name in dict.fromkeys(row['run'] for row in rows)
    }


def log_errors(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """|Δ log10| after each step; infinite where one of both is not finite, or 0."""
    with np.errstate(divide='ignore', invalid='ignore'):
        off = np.abs(np.log10(predicted) - np.log10(measured))
    return np.where(np.isnan(off), np.inf, off)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a run and stream: its asymmetry, and how far each method's predictions are off."""
    found = []
    for run, of_run in by_run(rows).items():
        for stream in streams(rows):
            curve = np.array([row[stream] for row in of_run])
            row = {
                'run': run,
                'steps': len(curve),
                'stream': stream,
                'asymmetry after step 1': f'{curve[0]:.1e}',
                'at the end': f'{curve[-1]:.1e}',
            }
            for method in METHODS:
                predicted = np.array([row[f'{method}: {stream}'] for row in of_run])
                off = log_errors(curve, predicted)
                for name, of_all in (('median', np.median), ('largest', np.max)):
                    none = np.isnan(predicted).all()
                    row[f'{method}, {name}'] = '-' if none else f'{of_all(off):.2f}'
            found.append(row)
    return found


def draw(rows: Sequence[dict[str, Any]], across: int) -> Figure:
    """Asymmetry of each stream after each step, a panel a run, `across` of them side by side."""
    found = by_run(rows)
    down = -(-len(found) // across)
    figure, panels = runs.new_figure(down, across, width=4 * across, height=1 + 3.5 * down)
    panels = np.ravel(panels)
    last = max(row['step'] for row in rows)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes, (name, of_run) in zip(panels, found.items(), strict=False):
        steps = [row['step'] for row in of_run]
        measured = np.array([[row[stream] for stream in streams(rows)] for row in of_run])
        for i, stream in enumerate(streams(rows)):
            for column, (style, width) in STYLES.items():
                # Of a prediction only what is an asymmetry: below 1.
                curve = np.array([row[column.format(stream)] for row in of_run])
                curve[(curve <= 0) | (curve > 1)] = np.nan
                color = runs.COLORS[i % len(runs.COLORS)]
                label = stream if column == '{}' else None
                axes.plot(steps, curve, style, color=color, lw=width, label=label)
        least = 10 ** np.floor(np.log10(np.min(measured[measured > 0], initial=0.1)))
        axes.set(yscale='log', ylim=(least, 1), xlim=(0, last), xlabel='step', ylabel='asymmetry')
        axes.set_title(name.replace(' (', '\n('), fontsize=10)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=5, frameon=False,
        title='line: the run; dots: reduced network; dashes: linear prediction',
    )  # fmt: skip
    return figure


def run(experiment: runs.Experiment) -> None:
    laboratory = Laboratory(experiment.config, experiment.workdir / 'runs')
    seeds = range(experiment.seeds)
    predicted = [laboratory.predict(seed, list(SCALES.values())) for seed in seeds]
    arms = {name: Perturbation('gaussian', scale) for name, scale in SCALES.items()}
    measured = laboratory.run_arms(arms | {ORDER: Perturbation('order')}, experiment.seeds)
    rows = []
    for seed in seeds:
        for i, (arm, trajectories) in enumerate(measured.items()):
            of_arm = {m: predicted[seed][m][i] for m in METHODS} if arm in SCALES else {}
            rows += steps_of(f'{arm}, seed {seed}', trajectories[seed], of_arm)
    shown = [
        {name: f'{x:.5g}' if isinstance(x, float) else x for name, x in row.items()} for row in rows
    ]
    records.write_csv(experiment.workdir / 'steps.csv', shown)
    runs.save_figure(experiment, draw(rows, across=len(measured)))
    runs.write_table(experiment, summary(rows))


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=1, config_file='configs/onset.py'))
