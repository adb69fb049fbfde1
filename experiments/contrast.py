"""Does ConstNet learn after noise of 1e-6, and without it? Seed by seed.

    python -m experiments.contrast

Also at the paper's learning rate, without drops, and its L2. 4 seeds, in five minutes on two CPU
cores. See `experiments.runs` for flags and restarts.
"""

import sys
from typing import Any

from experiments import runs
from experiments.arms import DETERMINISTIC, INJECTED, SYMMETRIC

PAPERS: dict[str, Any] = {
    'optimizer.learning_rate': 0.03,
    'optimizer.weight_decay': 5e-4,
    'optimizer.drop_at': (),
}
ARMS: dict[str, dict[str, Any]] = {
    'gaussian, 1e-6': {**INJECTED, **DETERMINISTIC},
    'none': {**SYMMETRIC, **DETERMINISTIC},
    "gaussian, 1e-6, the paper's rate and L2": {**INJECTED, **DETERMINISTIC, **PAPERS},
}


def row(run: runs.FinishedRun) -> dict[str, str]:
    """Of the table."""
    summary = run.summary
    counts = summary['unique_features_by_stream'].items()
    broken = summary['broken_at_step']
    return {
        'arm': run.arm,
        'seed': str(run.seed),
        'last accuracy': f'{summary["eval_accuracy"]:.4f}',
        'best accuracy': f'{summary["best_eval_accuracy"]:.4f}',
        'asymmetry': f'{summary["asymmetry"]:.4g}' if summary['asymmetry'] else '0 exactly',
        'unique features': ', '.join(f'{name} {count}' for name, count in counts),
        'broken at step': 'never' if broken is None else str(broken),
    }


def draw(experiment: runs.Experiment, by_arm: dict[str, list[runs.FinishedRun]]) -> None:
    """Accuracy of each seed against the step, and asymmetry where it is not 0."""
    figure, (accuracy, asymmetry) = runs.new_figure(1, 2, width=12, height=4.5)
    for i, (arm, its_runs) in enumerate(by_arm.items()):
        for k, run in enumerate(its_runs):
            look = {'color': runs.COLORS[i], 'lw': 1, 'label': None if k else arm}
            lines = run.of_kind('eval')
            steps = [line['step'] for line in lines]
            accuracy.plot(steps, [line['accuracy'] for line in lines], **look)
            lines = [line for line in run.of_kind('train') if line['asymmetry'] > 0]
            steps = [line['step'] for line in lines]
            asymmetry.plot(steps, [line['asymmetry'] for line in lines], **look)
    accuracy.set(xlabel='step', ylabel='held-out accuracy', ylim=(0, 1.02))
    asymmetry.set(yscale='log', xlabel='step', ylabel='asymmetry (not drawn where exactly 0)')
    figure.legend(
        *accuracy.get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False,
        title='a line a seed',
    )  # fmt: skip
    runs.save_figure(experiment, figure)


def run(experiment: runs.Experiment) -> None:
    trained = runs.train_all(experiment, ARMS)
    draw(experiment, runs.by_arm(trained))
    runs.write_table(experiment, [row(each) for each in trained])


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=4))
