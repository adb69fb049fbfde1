"""How close are predicted curves of asymmetry to those of the run, stream by stream?

    python -m experiments.curves [--features=8]
    python -m experiments.curves --features=8,16 --config=configs/cifar.py \\
        --config.num_epochs=None --config.num_steps=200 --config.optimizer.drop_at='()' \\
        --config.determinism.mode=deterministic --config.dataset.eval_split='test[:500]' \\
        --workdir=runs/experiments/curves_cifar

Gaussian noise of 1e-3 and of 1e-6 on the initial weights, and, without a prediction, an emulated
order of additions in every step. The prediction is made by reduced networks of so many features a
stream, and by linear theory. At the paper's size, the second command, few steps can be had and
most of them lie before an onset, so the measure is the difference of log10 of the asymmetry, at
each step; steps.csv has them all, onsets.csv the onsets. One seed; on the digits in three minutes
on two CPU cores, at the paper's size an hour and a quarter. See `experiments.runs` for flags and
restarts.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import runs
from experiments.trajectories import FEATURES, Laboratory, Trajectory, first_at_least
from zerojax.host import records
from zerojax.host.terminal import say
from zerojax.measure.prediction import ALONE, Curves
from zerojax.measure.stability import ONSET
from zerojax.perturb import Perturbation

SCALES = {'noise of 1e-3': 1e-3, 'noise of 1e-6': 1e-6}
ORDER = 'order of additions'
LINEAR = 'linear'
LARGEST = 2.0  # that an asymmetry can be, see `zerojax.symmetry.asymmetry`


def steps_of(
    name: str, trajectory: Trajectory, predicted: dict[str, Curves | None]
) -> list[dict[str, Any]]:
    """A row a step: loss, each stream's asymmetry, and what each method of prediction says of it.

    NaN where that says nothing.
    """
    columns = trajectory.by_stream.copy()
    for method, logs in predicted.items():
        for stream, curve in trajectory.by_stream.items():
            nothing = np.full(len(curve), np.nan)
            with np.errstate(over='ignore'):
                of_stream = nothing if logs is None else np.exp(logs[stream][1:])
            columns[f'{method}: {stream}'] = of_stream
    return [
        {'run': name, 'step': i + 1, 'loss': loss} | {key: x[i] for key, x in columns.items()}
        for i, loss in enumerate(trajectory.loss)
    ]


def methods(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Those of prediction that rows of `steps_of` have."""
    return list(dict.fromkeys(name.split(': ')[0] for name in rows[0] if ': ' in name))


def streams(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Those of which rows of `steps_of` have the asymmetry."""
    return list(dict.fromkeys(name.split(': ')[1] for name in rows[0] if ': ' in name))


def column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Of rows of one run, [num_steps]; float64."""
    return np.array([row[name] for row in rows], np.float64)


def by_run(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of `steps_of` of each run, runs in the order of their first row."""
    return {
        name: [row for row in rows if row['run'] == name]
        for name in dict.fromkeys(row['run'] for row in rows)
    }


def log_errors(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """|Δ log10| after each step; infinite where either is not finite, or 0 alone."""
    with np.errstate(divide='ignore', invalid='ignore'):
        off = np.abs(np.log10(predicted) - np.log10(measured))
    off[predicted == measured] = 0
    return np.where(np.isnan(off), np.inf, off)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a run and stream: its asymmetry, and how far each method is off, median and largest."""
    found = []
    for name, of_run in by_run(rows).items():
        for stream in streams(rows):
            curve = column(of_run, stream)
            row = {
                'run': name,
                'steps': len(curve),
                'stream': stream,
                'asymmetry after step 1': f'{curve[0]:.1e}',
                'at the end': f'{curve[-1]:.1e}',
            }
            for method in methods(rows):
                predicted = column(of_run, f'{method}: {stream}')
                off = log_errors(curve, predicted)
                none = np.isnan(predicted).all()
                row[method] = '-' if none else f'{np.median(off):.2f}, {off.max():.2f}'
            found.append(row)
    return found


def onsets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a run: its onset (see `Trajectory.onset`), and the one that each method predicts."""

    def onset(of_run: list[dict[str, Any]], prefix: str) -> str:
        of_streams = np.array([column(of_run, prefix + stream) for stream in streams(rows)])
        if np.isnan(of_streams).all():
            return '-'
        step = first_at_least(of_streams.max(axis=0), ONSET)
        return 'never' if step is None else str(step)

    return [
        {
            'run': name,
            'onset': onset(of_run, ''),
            **{method: onset(of_run, f'{method}: ') for method in methods(rows)},
        }
        for name, of_run in by_run(rows).items()
    ]


def draw(rows: Sequence[dict[str, Any]], across: int) -> Figure:
    """Asymmetry of each stream after each step, a panel a run, `across` of them side by side."""
    found = by_run(rows)
    down = -(-len(found) // across)
    figure, panels = runs.new_figure(down, across, width=4 * across, height=1 + 3.5 * down)
    panels = np.ravel(panels)
    last = max(row['step'] for row in rows)
    *_, reduced = (method for method in methods(rows) if method != LINEAR)
    styles = {'': ('-', 1.5), f'{reduced}: ': (':', 2.5), f'{LINEAR}: ': ('--', 1)}
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes, (name, of_run) in zip(panels, found.items(), strict=False):
        steps = [row['step'] for row in of_run]
        measured = np.array([column(of_run, stream) for stream in streams(rows)])
        for i, stream in enumerate(sorted(streams(rows))):  # one colour a stream in every figure
            for prefix, (style, width) in styles.items():
                curve = column(of_run, prefix + stream)
                curve[(curve <= 0) | (curve > LARGEST)] = np.nan  # linear theory has no bound
                color = runs.COLORS[i % len(runs.COLORS)]
                label = None if prefix else stream
                axes.plot(steps, curve, style, color=color, lw=width, label=label)
        least = 10 ** np.floor(np.log10(np.min(measured[measured > 0], initial=0.1)))
        limits = {'ylim': (least, LARGEST), 'xlim': (0, last)}
        axes.set(yscale='log', xlabel='step', ylabel='asymmetry', **limits)
        axes.set_title(name.replace(' (', '\n('), fontsize=10)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=5, frameon=False,
        title=f'line: the run; dots: {reduced}; dashes: linear prediction',
    )  # fmt: skip
    return figure


def run(experiment: runs.Experiment) -> None:
    features = runs.counts(experiment, 'features', least=ALONE + 1)
    laboratory = Laboratory(experiment.config, experiment.workdir / 'runs')
    seeds = range(experiment.seeds)
    scales = list(SCALES.values())
    predicted = {m: [laboratory.predict(seed, scales, m) for seed in seeds] for m in features}
    arms = {name: Perturbation('gaussian', scale) for name, scale in SCALES.items()}
    measured = laboratory.run_arms(arms | {ORDER: Perturbation('order')}, experiment.seeds)

    def predictions(arm: str, seed: int) -> dict[str, Curves | None]:
        if arm not in SCALES:
            return {LINEAR: None, **dict.fromkeys(names.values())}
        i = list(SCALES).index(arm)
        return {
            LINEAR: predicted[features[0]][seed]['linear'][i],
            **{names[m]: predicted[m][seed]['reduced'][i] for m in features},
        }

    names = {m: f'reduced, {m} features' for m in features}
    of_seeds = [
        [
            row
            for arm, trajectories in measured.items()
            for row in steps_of(f'{arm}, seed {seed}', trajectories[seed], predictions(arm, seed))
        ]
        for seed in seeds
    ]
    rows = [row for of_seed in of_seeds for row in of_seed]
    shown = [
        {name: f'{x:.7g}' if isinstance(x, float) else x for name, x in row.items()} for row in rows
    ]
    records.write_csv(experiment.workdir / 'steps.csv', shown)
    records.write_csv(experiment.workdir / 'onsets.csv', onsets(rows))
    runs.save_figure(experiment, draw(of_seeds[0], across=len(measured)))
    say(f'\n{runs.markdown(onsets(rows))}')
    runs.write_table(experiment, summary(rows))


if __name__ == '__main__':
    sys.exit(
        runs.main(run, __doc__, seeds=1, config_file='configs/onset.py', features=str(FEATURES))
    )
