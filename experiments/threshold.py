"""How small may a perturbation be? The smallest that still starts training, at three precisions.

    python -m experiments.threshold

scale · N(0, 1) is added to the initial weights. The smallest scale after which the asymmetry
reaches 0.1 within the config's steps is found by bisection in its logarithm, for weights (and
arithmetic) in float64, float32 and bfloat16, and both places of the shortcut: what lies below is
swallowed by rounding, or grows too slowly. The noise is the same at all precisions, up to rounding.
2 seeds, in a quarter of an hour on two CPU cores. See `experiments.runs` for flags and restarts.
"""

import sys
from typing import Any

import numpy as np

from experiments import runs
from experiments.trajectories import Laboratory
from zerojax.perturb import Perturbation

LOWEST = {'float64': -300.0, 'float32': -37.0, 'bfloat16': -37.0}  # decades; normal numbers
RESOLUTION = 0.25  # decades
LEFT_EDGE = -40.0  # decades, of the figure; what was tried below is drawn there
SHORTCUTS = ('pre_relu', 'post_relu')


def smallest_scale(laboratory: Laboratory, seed: int, lowest: float) -> tuple[float, list[Any]]:
    """Log10 of the smallest scale that starts training, and (log10, onset) of all that were tried.

    Minus infinity if already 10^lowest does. Presumes that more noise never starts later.
    """
    tried = []

    def starts(decades: float) -> bool:
        onset = laboratory.run(Perturbation('gaussian', 10.0**decades), seed).onset()
        tried.append((decades, onset))
        return onset is not None

    low, high = lowest, 0.0
    if starts(low):
        return -np.inf, tried
    if not starts(high):
        return np.inf, tried
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        low, high = (low, middle) if starts(middle) else (middle, high)
    return high, tried


def describe(decades: float, lowest: float) -> str:
    if decades == -np.inf:
        return f'below 1e{lowest:.0f}'
    return 'above 1' if decades == np.inf else f'{10.0**decades:.1e}'


def draw(
    experiment: runs.Experiment, found: dict[tuple[str, str], list[Any]], num_steps: int
) -> None:
    figure, panels = runs.new_figure(1, len(SHORTCUTS), width=11, height=4.5)
    for axes, shortcut in zip(panels, SHORTCUTS, strict=True):
        for i, dtype in enumerate(LOWEST):
            tried = found[shortcut, dtype]
            shown = [(10.0 ** max(decades, LEFT_EDGE), onset) for decades, onset in tried]
            started = [(scale, onset) for scale, onset in shown if onset is not None]
            never = [scale for scale, onset in shown if onset is None]
            color = runs.COLORS[i]
            if started:
                axes.plot(*zip(*started, strict=True), 'o', color=color, ms=4, label=dtype)
            height = num_steps * (1.06 + 0.05 * i)
            axes.plot(never, [height] * len(never), 'x', color=color, ms=5)
        axes.axhline(num_steps, color='0.5', lw=0.8)
        axes.set(
            xscale='log',
            xlim=(10.0 ** (LEFT_EDGE - 1), 10.0),
            xlabel=f'scale of the perturbation (at the left edge: 1e{LEFT_EDGE:.0f} or less)',
            ylabel='steps until asymmetry 0.1 (x: never)',
            title=f'shortcut {shortcut}',
            ylim=(0, num_steps * 1.25),
        )
        axes.legend(fontsize=8, frameon=False)
    runs.save_figure(experiment, figure)


def run(experiment: runs.Experiment) -> None:
    rows, found = [], {}
    for shortcut in SHORTCUTS:
        for dtype, lowest in LOWEST.items():
            config = runs.changed(
                experiment.config, **{'model.shortcut': shortcut, 'param_dtype': dtype}
            )
            laboratory = Laboratory(config, experiment.workdir / 'trajectories')
            smallest, onsets, tried = [], [], []
            for seed in range(experiment.seeds):
                print(f'-- {experiment.name}: {shortcut}, {dtype}, seed {seed}', flush=True)
                decades, its_tried = smallest_scale(laboratory, seed, lowest)
                smallest.append(decades)
                onsets.append(dict(its_tried).get(max(decades, lowest), None))
                tried += its_tried
            found[shortcut, dtype] = tried
            rows.append(
                {
                    'shortcut': shortcut,
                    'weights': dtype,
                    'n': experiment.seeds,
                    'smallest scale that starts training': ', '.join(
                        describe(each, lowest) for each in smallest
                    ),
                    'onset there (step)': ', '.join(map(str, onsets)),
                }
            )
    draw(experiment, found, laboratory.config.num_steps)
    runs.write_table(experiment, rows)


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=2, config_file='configs/onset.py'))
