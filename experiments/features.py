"""What do features that part look like? The last layer's weights as training goes on.

    python -m experiments.features

Trains the network with noise of 1e-6 on its initial weights and without, and draws what each
feature of the last stream (a row) gives to each class (a column) at some steps, each on a scale of
its own: equal rows are equal features. The figure is of seed 0. Two runs on the digits, two minutes
on two CPU cores. See `experiments.runs` for flags and restarts.
"""

import sys

import numpy as np

from experiments import runs
from zerojax.host.checkpoint import Checkpoints
from zerojax.run import checks, data

SHARES = (0.01, 0.03, 0.06, 0.1, 0.2, 1.0)  # of the run's steps
ARMS: dict[str, dict[str, object]] = {
    'noise of 1e-6': {'perturbation.kind': 'gaussian', 'perturbation.scale': 1e-6},
    'no noise': {'perturbation.kind': 'none'},
}


def head_kernels(run: runs.FinishedRun, steps: list[int]) -> list[np.ndarray]:
    """The weights from the last stream's features to the classes [C, N], after each step."""
    with Checkpoints(run.workdir / 'checkpoints', read_only=True) as checkpoints:
        found = [checkpoints.read_variables(step) for step in steps]
    return [np.asarray(variables['params']['head']['kernel']) for variables in found]


def draw(
    experiment: runs.Experiment, steps: list[int], kernels: dict[str, list[np.ndarray]]
) -> None:
    figure, panels = runs.new_figure(len(kernels), len(steps), width=1.7 * len(steps), height=5)
    for row, (arm, of_arm) in zip(panels, kernels.items(), strict=True):
        for axes, step, kernel_CxN in zip(row, steps, of_arm, strict=True):
            largest = np.abs(kernel_CxN).max()
            axes.imshow(kernel_CxN, aspect='auto', cmap='RdBu', vmin=-largest, vmax=largest)
            axes.grid(False)
            axes.set(title=f'step {step}', xticks=[], yticks=[])
        row[0].set_ylabel(f'{arm}\nfeatures')
    for axes in panels[-1]:
        axes.set_xlabel('classes')
    runs.save_figure(experiment, figure)


def run(experiment: runs.Experiment) -> None:
    config = checks.resolve(experiment.config, data.load_of(experiment.config))
    steps = sorted({max(1, round(share * config.num_steps)) for share in SHARES})
    kept = {'keep_checkpoints_at': tuple(steps), 'log_every_steps': 1}
    arms = {arm: fields | kept for arm, fields in ARMS.items()}
    trained = runs.train_all(experiment, arms)
    kernels = {(each.arm, each.seed): head_kernels(each, steps) for each in trained}
    draw(experiment, steps, {arm: kernels[arm, 0] for arm in arms})
    rows = []
    for each in trained:
        lines = {line['step']: line for line in each.of_kind('train')}
        for step, kernel_CxN in zip(steps, kernels[each.arm, each.seed], strict=True):
            rows.append(
                {
                    'arm': each.arm,
                    'seed': each.seed,
                    'step': step,
                    'loss': f'{lines[step]["loss"]:.3f}',
                    'asymmetry': f'{lines[step]["asymmetry"]:.1e}',
                    'different rows': len(np.unique(kernel_CxN, axis=0)),
                }
            )
    runs.write_table(experiment, rows)


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=1))
