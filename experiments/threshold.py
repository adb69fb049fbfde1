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


Tried = dict[float, int | None]  # onset of each scale, by its log10


def smallest_scales(laboratory: Laboratory, seeds: int, lowest: float) -> list[tuple[float, Tried]]:
    """For each seed log10 of the smallest scale that starts training, and all that were tried.

    Minus infinity if already 10^lowest does. Presumes that more noise never starts later. The
    bisections of all seeds go on side by side, so that their runs can share a batched program.
    """
    tried: list[Tried] = [{} for _ in range(seeds)]
    low, high = [lowest] * seeds, [0.0] * seeds

    def run(chosen: dict[int, float]) -> None:
        wanted = [(Perturbation('gaussian', 10.0**x), seed) for seed, x in chosen.items()]
        for (seed, x), trajectory in zip(chosen.items(), laboratory.run_all(wanted), strict=True):
            tried[seed][x] = trajectory.onset()

    run(dict.fromkeys(range(seeds), lowest))
    run(dict.fromkeys(range(seeds), 0.0))
    found = {}
    for seed in range(seeds):
        if tried[seed][lowest] is not None:
            found[seed] = -np.inf
        elif tried[seed][0.0] is None:
            found[seed] = np.inf
    while middles := {
        seed: (low[seed] + high[seed]) / 2
        for seed in range(seeds)
        if seed not in found and high[seed] - low[seed] > RESOLUTION
    }:
        run(middles)
        for seed, middle in middles.items():
            (low if tried[seed][middle] is None else high)[seed] = middle
    return [(found.get(seed, high[seed]), tried[seed]) for seed in range(seeds)]


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
            laboratory = Laboratory(config, experiment.workdir / 'runs' / f'{shortcut}_{dtype}')
            smallest = smallest_scales(laboratory, experiment.seeds, lowest)
            found[shortcut, dtype] = [each for _, tried in smallest for each in tried.items()]
            rows.append(
                {
                    'shortcut': shortcut,
                    'weights': dtype,
                    'n': experiment.seeds,
                    'smallest scale that starts training': ', '.join(
                        describe(each, lowest) for each, _ in smallest
                    ),
                    'onset there (step)': ', '.join(
                        str(tried.get(max(each, lowest), '-')) for each, tried in smallest
                    ),
                }
            )
    draw(experiment, found, laboratory.config.num_steps)
    runs.write_table(experiment, rows)


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=2, config_file='configs/onset.py'))
