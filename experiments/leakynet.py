"""Which layers of LeakyNet may start constant? The paper's seven init strings.

    python -m experiments.leakynet
    python -m experiments.leakynet --config=configs/leakynet.py

The first trains LeakyNet-16-1 on the digits with 3 seeds, in half an hour on two CPU cores;
the second is the paper's size, for a GPU. Each string is trained with a perturbation of 1e-6 on the
initial weights and without, always at depth 16 and the paper's learning rate of 0.03. See
`experiments.runs` for flags and restarts.
"""

import sys
from typing import Any

from experiments import runs

STRINGS = (
    'h_hhhh_hhhh_hhhh', 'i_iiii_iiii_iiii', '1_iiii_iiii_iiii', '1_iiii_11ii_iiii',
    '1_iiii_1111_iiii', '1_ii11_ii11_ii11', '1_1111_1111_1111',
)  # fmt: skip
PERTURBATIONS = {'none': 0.0, 'gaussian': 1e-6}


def arms() -> dict[str, dict[str, object]]:
    """Name of each arm: the fields that make it."""
    return {
        f'{string} {kind}': {
            'model.name': 'leakynet',
            'model.init': string,
            'model.depth': 16,
            'optimizer.learning_rate': 0.03,
            'perturbation.kind': kind,
            'perturbation.scale': scale,
        }
        for string in STRINGS
        for kind, scale in PERTURBATIONS.items()
    }


def unique(layers: list[list[dict[str, Any]]], evaluation: int) -> str:
    """Number of unique features of the last block's output, over all seeds."""
    counts = {lines[evaluation]['unique_activations']['block3_3'] for lines in layers}
    return ', '.join(str(count) for count in sorted(counts))


def draw(experiment: runs.Experiment, by_arm: dict[str, list[runs.FinishedRun]]) -> None:
    figure, panels = runs.new_figure(1, 2, width=10, height=5)
    for axes, kind in zip(panels, PERTURBATIONS, strict=True):
        for i, string in enumerate(STRINGS):
            its_runs = by_arm[f'{string} {kind}']
            steps = [line['step'] for line in its_runs[0].of_kind('eval')]
            curves = [[line['accuracy'] for line in run.of_kind('eval')] for run in its_runs]
            look = {**runs.style(i), **runs.marks(i), 'label': string, 'lw': 1.5}
            runs.plot_band(axes, steps, curves, at_most=1, **look)
        title = 'no perturbation' if kind == 'none' else f'perturbation {PERTURBATIONS[kind]:g}'
        axes.set(xlabel='step', ylabel='held-out accuracy', ylim=(0, 1.02), title=title)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False
    )
    runs.save_figure(experiment, figure)


def run(experiment: runs.Experiment) -> None:
    by_arm = runs.by_arm(runs.train_all(experiment, arms()))
    rows = []
    for arm, its_runs in by_arm.items():
        string, kind = arm.split()
        layers = [run.of_kind('layers') for run in its_runs]
        rows.append(
            {
                'init': f'`{string}`',
                'perturbation': 'none' if kind == 'none' else f'{PERTURBATIONS[kind]:g}',
                **runs.accuracies(its_runs),
                'unique features of the last block, first step': unique(layers, 0),
                'last step': unique(layers, -1),
            }
        )
    draw(experiment, by_arm)
    runs.write_table(experiment, rows)


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=3))
