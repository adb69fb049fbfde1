"""Which source of asymmetry lets ConstNet train? The paper's arms, and ordinary initialisations.

    python -m experiments.arms
    python -m experiments.arms --config=configs/cifar.py

The first trains each arm on the digits with 3 seeds, in a quarter of an hour on two CPU cores; the
second is the paper's size, for a GPU. In 'hardware' arms nothing but the kernels may break the
symmetry; on a CPU they do not. curves.csv holds every number that is drawn. See `experiments.runs`
for flags and restarts.
"""

import re
import sys
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import runs
from zerojax.host import records
from zerojax.host.records import Record

SYMMETRIC = {'model.name': 'constnet', 'model.init': 'averaging', 'perturbation.kind': 'none'}
INJECTED = {**SYMMETRIC, 'perturbation.kind': 'gaussian', 'perturbation.scale': 1e-6}
DETERMINISTIC = {'determinism.mode': 'deterministic'}


def arms() -> dict[str, dict[str, object]]:
    """Name of each arm: the fields that make it."""
    hardware = {'determinism.mode': 'hardware'}
    other: dict[str, object] = {**SYMMETRIC, **DETERMINISTIC}
    return {
        'ConstNet, hardware': {**SYMMETRIC, **hardware},
        'ConstNet, deterministic': other,
        'ConstNet, hardware, dropout 0.01': {**SYMMETRIC, **hardware, 'model.dropout': 0.01},
        'ConstNet, deterministic, dropout 0.01': {**other, 'model.dropout': 0.01},
        'ConstNet, injected 1e-6': {**INJECTED, **DETERMINISTIC},
        'ConstNet, injected 1e-6, projected': {
            **INJECTED,
            **DETERMINISTIC,
            'symmetry.project': True,
        },
        # Stands for a GPU's atomics where there is no GPU.
        'ConstNet, emulated order of additions': {
            **other,
            'perturbation.kind': 'order',
            'perturbation.scale': 0.0,
        },
        'random control': {**other, 'model.init': 'random'},
        'He': {**other, 'model.init': 'he'},
        'Delta-Orthogonal': {**other, 'model.init': 'delta_orthogonal'},
        'ZerO (Hadamard)': {**other, 'model.init': 'hadamard'},
        'Wide ResNet': {**other, 'model.name': 'wideresnet', 'model.init': 'he'},
        # Without normalisation 0.1, the rate of configs/digits.py, diverges.
        'Wide ResNet, Fixup, learning rate 0.03': {
            **other,
            'model.name': 'wideresnet',
            'model.init': 'fixup',
            'optimizer.learning_rate': 0.03,
        },
    }


def correlation(line: Record, direction: str) -> float:
    """-ln |c|, mean over the block convolutions; 0 where all features are equal."""
    return float(
        np.mean(
            [
                -np.log(max(abs(c), 1e-12))
                for layer, c in line[f'{direction}_correlation'].items()
                if '/conv' in layer
            ]
        )
    )


def last_block(line: Record) -> float:
    """Effective width of the last block's output."""
    widths = {name: x for name, x in line['effective_width'].items() if name.startswith('block')}
    return widths[max(widths, key=lambda name: [int(x) for x in re.findall(r'\d+', name)])]


def curves(run: runs.FinishedRun) -> list[dict[str, Any]]:
    """A row for each evaluation of a run.

    'forward' and 'backward' are those of `correlation`, 'effective width' is in features, 'loss' in
    nats.
    """
    return [
        {
            'arm': run.arm,
            'seed': run.seed,
            'step': evaluated['step'],
            'loss': evaluated['loss'],
            'accuracy': evaluated['accuracy'],
            'asymmetry': symmetry['asymmetry'],
            'forward': correlation(layers, 'forward'),
            'backward': correlation(layers, 'backward'),
            'effective width': last_block(layers),
        }
        for evaluated, symmetry, layers in zip(
            *(run.of_kind(kind) for kind in ('eval', 'symmetry', 'layers')), strict=True
        )
    ]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Of the rows of `curves`."""
    figure, panels = runs.new_figure(2, 2, width=12, height=10)
    kinds = ('accuracy', 'effective width', 'forward', 'backward')
    for kind, axes in zip(kinds, panels.flat, strict=True):
        for i, arm in enumerate(dict.fromkeys(row['arm'] for row in rows)):
            of_arm = [row for row in rows if row['arm'] == arm]
            first, *others = dict.fromkeys(row['seed'] for row in of_arm)
            steps = [row['step'] for row in of_arm if row['seed'] == first]
            series = [
                [row[kind] for row in of_arm if row['seed'] == seed] for seed in (first, *others)
            ]
            look = {**runs.style(i), **runs.marks(i), 'label': arm, 'lw': 1.5}
            at_most = 1 if kind == 'accuracy' else np.inf
            runs.plot_band(axes, steps, series, at_most=at_most, **look)
        axes.set(xlabel='step')
    accuracy, width, forward, backward = panels.flat
    accuracy.set(ylabel='held-out accuracy', ylim=(0, 1.02))
    width.set(ylabel="effective width of the last block's output (features)")
    forward.set(ylabel='−ln |forward correlation| of block convolutions')
    backward.set(ylabel='−ln |backward correlation| of block convolutions')
    figure.legend(
        *accuracy.get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False
    )
    return figure


def report(experiment: runs.Experiment, finished: list[runs.FinishedRun]) -> None:
    """Table, curves.csv and figure of the runs of some arms."""
    rows = [row for run in finished for row in curves(run)]
    records.write_csv(experiment.workdir / 'curves.csv', rows)
    runs.save_figure(experiment, draw(rows))
    table = []
    for arm, its_runs in runs.by_arm(finished).items():
        asymmetry = max(run.summary['asymmetry'] for run in its_runs)
        table.append(
            {
                'arm': arm,
                **runs.accuracies(its_runs),
                'asymmetry at the end': f'{asymmetry:.2g}' if asymmetry else '0 exactly',
            }
        )
    runs.write_table(experiment, table)


def run(experiment: runs.Experiment) -> None:
    report(experiment, runs.train_all(experiment, arms()))


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=3))
