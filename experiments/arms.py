"""Which source of asymmetry lets ConstNet train? The paper's arms, and ordinary initialisations.

    python -m experiments.arms
    python -m experiments.arms --config=configs/cifar.py

The first trains each arm on the digits with 3 seeds, in a quarter of an hour on two CPU cores; the
second is the paper's size, for a GPU. In 'hardware' arms nothing but the kernels may break the
symmetry; on a CPU they do not. See `experiments.runs` for flags and restarts.
"""

import sys

import numpy as np

from experiments import runs

SYMMETRIC = {'model.name': 'constnet', 'model.init': 'averaging', 'perturbation.kind': 'none'}
INJECTED = {**SYMMETRIC, 'perturbation.kind': 'gaussian', 'perturbation.scale': 1e-6}


def arms() -> dict[str, dict[str, object]]:
    """Name of each arm: the fields that make it."""
    hardware = {'determinism.mode': 'hardware'}
    deterministic = {'determinism.mode': 'deterministic'}
    other = {**SYMMETRIC, **deterministic}
    return {
        'ConstNet, hardware': {**SYMMETRIC, **hardware},
        'ConstNet, deterministic': {**SYMMETRIC, **deterministic},
        'ConstNet, hardware, dropout 0.01': {**SYMMETRIC, **hardware, 'model.dropout': 0.01},
        'ConstNet, deterministic, dropout 0.01': {
            **SYMMETRIC,
            **deterministic,
            'model.dropout': 0.01,
        },
        'ConstNet, injected 1e-6': {**INJECTED, **deterministic},
        'ConstNet, injected 1e-6, projected': {
            **INJECTED,
            **deterministic,
            'symmetry.project': True,
        },
        # Stands for a GPU's atomics where there is no GPU.
        'ConstNet, emulated order of additions': {
            **SYMMETRIC,
            **deterministic,
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


def correlation_curve(run: runs.FinishedRun, direction: str) -> list[float]:
    """-ln |c| at each evaluation, mean over the block convolutions; 0 where features are equal."""
    return [
        float(
            np.mean(
                [
                    -np.log(max(abs(c), 1e-12))
                    for layer, c in line[f'{direction}_correlation'].items()
                    if '/conv' in layer
                ]
            )
        )
        for line in run.of_kind('layers')
    ]


def draw(experiment: runs.Experiment, by_arm: dict[str, list[runs.FinishedRun]]) -> None:
    figure, (accuracy, forward, backward) = runs.new_figure(1, 3, width=13, height=5)
    for i, (arm, its_runs) in enumerate(by_arm.items()):
        look = {**runs.style(i), 'label': arm, 'lw': 1.5}
        steps = [line['step'] for line in its_runs[0].of_kind('eval')]
        curves = [[line['accuracy'] for line in run.of_kind('eval')] for run in its_runs]
        runs.plot_band(accuracy, steps, curves, **look)
        for axes, direction in ((forward, 'forward'), (backward, 'backward')):
            runs.plot_band(
                axes, steps, [correlation_curve(run, direction) for run in its_runs], **look
            )
    accuracy.set(xlabel='step', ylabel='held-out accuracy', ylim=(0, 1.02))
    forward.set(xlabel='step', ylabel='−ln |forward correlation| of block convolutions')
    backward.set(xlabel='step', ylabel='−ln |backward correlation| of block convolutions')
    figure.legend(
        *accuracy.get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False
    )
    runs.save_figure(experiment, figure)


def run(experiment: runs.Experiment) -> None:
    by_arm = runs.by_arm(runs.train_all(experiment, arms()))
    rows = []
    for arm, its_runs in by_arm.items():
        asymmetry = max(run.summary['asymmetry'] for run in its_runs)
        rows.append(
            {
                'arm': arm,
                **runs.accuracies(its_runs),
                'largest asymmetry': f'{asymmetry:.2g}' if asymmetry else '0 exactly',
            }
        )
    draw(experiment, by_arm)
    runs.write_table(experiment, rows)


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=3))
