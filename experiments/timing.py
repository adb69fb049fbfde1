"""Does it matter when the symmetry is broken? The same perturbation at step 0, 10, 100 and 1000.

    python -m experiments.timing

scale · N(0, 1), 1e-6 unless --config.perturbation.scale says otherwise, is added to all weights
once; both places of the shortcut; 1300 steps and 3 seeds, in ten minutes on two CPU cores. See
`experiments.runs` for flags and restarts, `experiments.trajectories` for the runs.
"""

import statistics
import sys

import numpy as np

from experiments import runs
from experiments.trajectories import Laboratory, Trajectory
from zerojax.host.errors import UsageError
from zerojax.perturb import NONE, Perturbation

STEPS = (0, 10, 100, 1000)
SHORTCUTS = ('pre_relu', 'post_relu')


def delays(at_step: int, trajectories: list[Trajectory]) -> list[int | None]:
    """Steps from the perturbation to the onset of training, for each seed."""
    onsets = [each.onset() for each in trajectories]
    return [None if onset is None else onset - at_step for onset in onsets]


def draw(experiment: runs.Experiment, found: dict[str, dict[int | None, list[Trajectory]]]) -> None:
    figure, panels = runs.new_figure(2, len(SHORTCUTS), width=11, height=7)
    for column, shortcut in enumerate(SHORTCUTS):
        loss, asymmetry = panels[:, column]
        asymmetry.set_yscale('log')
        for i, (at_step, its_runs) in enumerate(found[shortcut].items()):
            label = 'never' if at_step is None else f'at step {at_step}'
            look = {**runs.style(i), **runs.marks(i), 'lw': 1.2, 'label': label}
            steps = np.arange(1, len(its_runs[0].loss) + 1)
            runs.plot_band(loss, steps, [each.loss for each in its_runs], **look)
            if at_step is not None:
                curves = [each.asymmetry[at_step:] for each in its_runs]
                runs.plot_band(asymmetry, steps[at_step:], curves, **look)
        loss.set(title=f'shortcut {shortcut}', ylabel='loss of the training batch (nats)')
        asymmetry.set(xlabel='step', ylabel='asymmetry')
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=5,
        frameon=False, title='perturbed',
    )  # fmt: skip
    runs.save_figure(experiment, figure)


def run(experiment: runs.Experiment) -> None:
    scale = experiment.config.perturbation.scale
    if scale <= 0:
        raise UsageError(f'perturbation.scale={scale}: must be above 0')
    found: dict[str, dict[int | None, list[Trajectory]]] = {}
    rows = []
    for shortcut in SHORTCUTS:
        config = runs.changed(experiment.config, **{'model.shortcut': shortcut})
        laboratory = Laboratory(config, experiment.workdir / 'runs' / shortcut)
        if laboratory.config.num_steps <= STEPS[-1]:
            raise UsageError(
                f'num_steps={laboratory.config.num_steps}: must be above {STEPS[-1]}, the last '
                'step that this experiment perturbs'
            )
        arms: dict[int | None, Perturbation] = {
            at_step: Perturbation('gaussian', scale, at_step=at_step) for at_step in STEPS
        }
        found[shortcut] = laboratory.run_arms(arms | {None: NONE}, experiment.seeds)
        for at_step, its_runs in found[shortcut].items():
            waits = [] if at_step is None else delays(at_step, its_runs)
            rows.append(
                {
                    'shortcut': shortcut,
                    'perturbed at step': 'never' if at_step is None else at_step,
                    'n': experiment.seeds,
                    'steps until asymmetry 0.1': ', '.join(
                        'not reached' if each is None else str(each) for each in waits
                    )
                    or '-',
                    'last loss': runs.mean_and_deviation(
                        [statistics.fmean(each.loss[-11:]) for each in its_runs]
                    ),
                    'held-out accuracy': runs.mean_and_deviation(
                        [each.accuracy for each in its_runs]
                    ),
                }
            )
    draw(experiment, found)
    runs.write_table(experiment, rows)


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=3, config_file='configs/onset.py:long'))
