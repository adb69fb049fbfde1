"""Do the predictions of the onset hold on other settings than those they were made on?

    python -m experiments.held_out

Other depths, widths, batches, learning rates and weight decays than those that the predictions were
developed on, Fashion-MNIST and CIFAR-10, both places of the shortcut: the onset that
`python -m zerojax.predict` gives, by the linearised step and by a reduced network, beside that of
the runs. errors.csv sums up. 3 seeds, 108 runs of 300 steps, in an hour on two CPU cores. Both data
sets must have been prepared (see configs/cifar.py). See `experiments.runs` for flags and restarts.
"""

import statistics
import sys
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from configs import cifar, fashion_mnist
from experiments import runs
from experiments.trajectories import METHODS, Laboratory, listed_steps
from zerojax.host import records
from zerojax.host.terminal import say
from zerojax.measure import stability
from zerojax.measure.prediction import largest
from zerojax.perturb import Perturbation
from zerojax.predict import median_onset

SCALES = (1e-3, 1e-5)
SHORTCUTS = ('pre_relu', 'post_relu')
STEPS, SHARE = 3, 0.05  # a prediction is right if it is off by no more than one of them

# Of each setting and shortcut, what `measure` returns.
Found = dict[tuple[str, str], list[dict[str, Any]]]


def settings() -> dict[str, dict[str, Any]]:
    """Name of each: the fields in which it differs from the base."""
    found: dict[str, dict[str, Any]] = {
        'depth 7': {'model.depth': 7},
        'depth 16': {'model.depth': 16},
        'width 3': {'model.width': 3},
        'batches of 32': {'batch_size': 32},
        'learning rate 0.05': {'optimizer.learning_rate': 0.05},
        'learning rate 0.2': {'optimizer.learning_rate': 0.2},
        'weight decay 0.005': {'optimizer.weight_decay': 5e-3},
    }
    for name, module in (('Fashion-MNIST', fashion_mnist), ('CIFAR-10', cifar)):
        data = module.get_config('trial').dataset.items()
        found[name] = {f'dataset.{field}': x for field, x in data if field != 'data_dir'}
    return found


def measure(laboratory: Laboratory, seeds: int) -> list[dict[str, Any]]:
    """For each scale the onsets of the runs, and those predicted, by seed."""
    predicted = [laboratory.predict(seed, SCALES) for seed in range(seeds)]
    measured = laboratory.run_arms({x: Perturbation('gaussian', x) for x in SCALES}, seeds)
    return [
        {
            'scale': scale,
            'measured': [run.onset() for run in measured[scale]],
            **{
                method: [stability.predict_onset(largest(each[method][i])) for each in predicted]
                for method in METHODS
            },
        }
        for i, scale in enumerate(SCALES)
    ]


def error(found: dict[str, Any], method: str) -> float | None:
    """Median predicted less median measured onset, in steps; None if one of them never comes."""
    predicted, measured = median_onset(found[method]), median_onset(found['measured'])
    if predicted is None and measured is None:
        return 0.0
    return None if predicted is None or measured is None else predicted - measured


def is_right(found: dict[str, Any], method: str) -> bool:
    """Whether the median prediction is within `STEPS` steps or `SHARE` of the measured onset."""
    off = error(found, method)
    return off is not None and abs(off) <= max(
        STEPS, SHARE * (median_onset(found['measured']) or 0)
    )


def draw(found: Found, never: int) -> Figure:
    """Predicted against measured median onset, a row of panels a scale, a column a method.

    What never comes is drawn at `never`.
    """
    scales = [each['scale'] for each in next(iter(found.values()))]
    figure, panels = runs.new_figure(
        len(scales), len(METHODS), width=12, height=1 + 5 * len(scales)
    )
    panels = np.reshape(panels, (len(scales), len(METHODS)))
    names = list(dict.fromkeys(name for name, _ in found))
    some_never = False
    for i, scale in enumerate(scales):
        medians = {
            (key, each): median_onset(rows[i][each])
            for key, rows in found.items()
            for each in ('measured', *METHODS)
        }
        some_never |= None in medians.values()
        drawn = {key: never if x is None else x for key, x in medians.items()}
        line = np.array([0, STEPS / SHARE, 1.05 * max(STEPS / SHARE, *drawn.values())])
        off = np.maximum(STEPS, SHARE * line)
        for axes, method in zip(panels[i], METHODS, strict=True):
            for key in found:
                name, shortcut = key
                which, hollow = names.index(name), shortcut == 'post_relu'
                color = runs.COLORS[which % len(runs.COLORS)]
                axes.plot(
                    drawn[key, 'measured'], drawn[key, method], linestyle='', color=color,
                    marker=runs.MARKERS[which % len(runs.MARKERS)], clip_on=False,
                    markersize=9 if hollow else 6, markerfacecolor='none' if hollow else color,
                    label=None if hollow else name,
                )  # fmt: skip
            axes.plot(line, line, color='0.5', lw=0.8)
            axes.fill_between(line, line - off, line + off, color='0.5', alpha=0.2, lw=0)
            axes.set(
                xlabel='measured onset (step, median over seeds)',
                ylabel='predicted onset (step, median over seeds)',
                title=f'{method} prediction, noise of {scale:.0e}',
                xlim=(0, line[-1]), ylim=(0, line[-1]), aspect='equal',
            )  # fmt: skip
    at_never = f'; at {never}: never' if some_never else ''
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=5,
        frameon=False, title=f'filled: pre_relu, hollow: post_relu; grey: within {STEPS} steps or '
        f'{SHARE:.0%}{at_never}',
    )  # fmt: skip
    return figure


def summed(found: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """The errors of a method in all settings."""
    sizes = [abs(off) for each in found if (off := error(each, method)) is not None]
    return {
        'method': method,
        'medians': len(found),
        f'within {STEPS} steps or {SHARE:.0%}': sum(is_right(each, method) for each in found),
        'median error (steps)': statistics.median(sizes) if sizes else '-',
        'largest error (steps)': max(sizes, default='-'),
        'one of them never comes': len(found) - len(sizes),
    }


def run(experiment: runs.Experiment) -> None:
    # All of them first, so that data that is not there stops it before anything is computed.
    laboratories = {
        (name, shortcut): Laboratory(
            runs.changed(experiment.config, **fields, **{'model.shortcut': shortcut}),
            experiment.workdir / 'runs' / name.replace(' ', '_') / shortcut,
        )
        for name, fields in settings().items()
        for shortcut in SHORTCUTS
    }
    found: Found = {}
    for (name, shortcut), laboratory in laboratories.items():
        say(f'-- {experiment.name}: {name}, {shortcut}')
        found[name, shortcut] = measure(laboratory, experiment.seeds)
    runs.save_figure(experiment, draw(found, never=experiment.config.num_steps))
    rows = []
    for (name, shortcut), by_scale in found.items():
        for each in by_scale:
            errors = {method: error(each, method) for method in METHODS}
            rows.append(
                {
                    'setting': name,
                    'shortcut': shortcut,
                    'scale': f'{each["scale"]:.0e}',
                    'n': experiment.seeds,
                    'onset': listed_steps(each['measured']),
                    **{f'predicted, {method}': listed_steps(each[method]) for method in METHODS},
                    **{
                        f'error, {method}': '-' if off is None else f'{off:+g}'
                        for method, off in errors.items()
                    },
                }
            )
    runs.write_table(experiment, rows)
    of_all = [each for by_scale in found.values() for each in by_scale]
    records.write_csv(experiment.workdir / 'errors.csv', [summed(of_all, x) for x in METHODS])
    say(f'{experiment.workdir}/errors.csv')


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=3, config_file='configs/onset.py'))
