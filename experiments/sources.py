"""Where may the asymmetry come from? Every kind of perturbation at several scales, layer by layer.

    python -m experiments.sources

All layers together at several scales of each kind; then a single weight, and noise on the weights,
of one parameter at a time; both places of the shortcut. 154 runs of 300 steps, 15 minutes on two
CPU cores with one seed. See `experiments.runs` for flags and restarts.
"""

import statistics
import sys
from typing import Any

from flax.traverse_util import flatten_dict
from matplotlib import colormaps
from matplotlib.patches import Rectangle

from experiments import runs
from experiments.trajectories import Laboratory, listed_steps
from zerojax.perturb import Perturbation
from zerojax.step.order import ORDER_GROUPS

SHORTCUTS = ('pre_relu', 'post_relu')
VIRIDIS = colormaps['viridis']


def all_layers() -> dict[str, list[tuple[float, Perturbation]]]:
    """Name of each source: (scale, count or number of groups, perturbation) along its axis."""

    def at(kind: str, scales: tuple[float, ...], **fields: Any) -> list[tuple[float, Perturbation]]:
        return [(scale, Perturbation(kind, scale, **fields)) for scale in scales]

    def counts(kind: str, scale: float, numbers: tuple[int, ...]) -> Any:
        return [(number, Perturbation(kind, scale, count=number)) for number in numbers]

    return {
        'gaussian': at('gaussian', (1e-8, 1e-6, 1e-4, 1e-2)),
        'gaussian, relative': at('gaussian', (1e-8, 1e-6, 1e-4, 1e-2), relative=True),
        'one weight': at('one_weight', (1e-6, 1e-4, 1e-2, 1.0)),
        'ulp, by count': counts('ulp', 0.0, (1, 10, 100, 1000)),
        'unequal init 0.01, by count': counts('unequal_init', 1e-2, (1, 2, 4, 16)),
        'order of additions, each step': [(ORDER_GROUPS, Perturbation('order'))],
        'gradient, each step': at('gradient', (1e-8, 1e-6, 1e-4, 1e-2)),
        'activation, each step': at('activation', (1e-8, 1e-6, 1e-4, 1e-2)),
        'activation, once': at('activation', (1e-8, 1e-6, 1e-4, 1e-2), every=0),
        'activation backward, each step': at(
            'activation', (1e-12, 1e-10, 1e-8, 1e-6), backward=True
        ),
        'dropout': at('dropout', (1e-4, 1e-3, 1e-2, 1e-1)),
        'disout': at('disout', (1e-4, 1e-3, 1e-2, 1e-1)),
    }


def one_layer(laboratory: Laboratory) -> dict[str, dict[str, Perturbation]]:
    """{source: {parameter: perturbation}}; a single weight only where one is not 0 at the start."""
    params = flatten_dict(laboratory.initial_state(seed=0).params, sep='/')
    return {
        'one weight, 0.01': {
            path: Perturbation('one_weight', 1e-2, layers=f'{path}$')
            for path, x in params.items()
            if x.any()
        },
        'gaussian 1e-6': {
            path: Perturbation('gaussian', 1e-6, layers=f'{path}$') for path in params
        },
    }


def median(onsets: list[int | None], never: float) -> float:
    return statistics.median(never if each is None else each for each in onsets)


def draw_grid(
    axes: Any, rows: list[str], cells: list[list[tuple[str, float] | None]], num_steps: int
) -> None:
    """A row a source; in each cell a text, coloured by its onset."""
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            if cell is None:
                continue
            text, onset = cell
            never = onset > num_steps
            shade = '#DDDDDD' if never else VIRIDIS(1 - 0.85 * onset / num_steps)
            axes.add_patch(Rectangle((j, i), 0.96, 0.92, color=shade, lw=0))
            dark = not never and onset > 0.5 * num_steps
            axes.text(
                j + 0.48, i + 0.46, text, ha='center', va='center', fontsize=6.5,
                color='white' if dark else 'black',
            )  # fmt: skip
    axes.set(xlim=(0, max(map(len, cells))), ylim=(len(rows), 0), xticks=[])
    axes.set_yticks([i + 0.46 for i in range(len(rows))], rows, fontsize=7)
    axes.grid(False)
    axes.spines[['left', 'bottom']].set_visible(False)
    axes.tick_params(length=0)


def run(experiment: runs.Experiment) -> None:
    figure, panels = runs.new_figure(2, len(SHORTCUTS), width=12, height=12)
    table = []
    for column, shortcut in enumerate(SHORTCUTS):
        config = runs.changed(experiment.config, **{'model.shortcut': shortcut})
        laboratory = Laboratory(config, experiment.workdir / 'runs' / shortcut)
        num_steps = laboratory.config.num_steps
        never = num_steps + 1
        everywhere, alone = all_layers(), one_layer(laboratory)
        perturbations = {
            (source, value): perturbation
            for source, axis in everywhere.items()
            for value, perturbation in axis
        } | {
            (source, path): perturbation
            for source, by_path in alone.items()
            for path, perturbation in by_path.items()
        }
        onsets = {
            where: [each.onset() for each in its_runs]
            for where, its_runs in laboratory.run_arms(perturbations, experiment.seeds).items()
        }
        rows: list[str] = []
        cells: list[list[tuple[str, float] | None]] = []
        for source, axis in everywhere.items():
            rows.append(source)
            cells.append([])
            for value, _ in axis:
                found = onsets[source, value]
                cells[-1].append((f'{value:g}\n{listed_steps(found)}', median(found, never)))
                table.append(row(shortcut, source, value, 'all', found))
        draw_grid(panels[0, column], rows, cells, num_steps)
        panels[0, column].set_title(f'shortcut {shortcut}: scale, and step of onset')

        by_parameter: dict[str, list[tuple[str, float] | None]] = {}
        for j, (source, by_path) in enumerate(alone.items()):
            for path, perturbation in by_path.items():
                found = onsets[source, path]
                line = by_parameter.setdefault(path, [None] * len(alone))
                line[j] = (listed_steps(found), median(found, never))
                table.append(row(shortcut, source, float(perturbation.scale), path, found))
        draw_grid(panels[1, column], list(by_parameter), list(by_parameter.values()), num_steps)
        panels[1, column].set_title(' | '.join(alone))
    runs.save_figure(experiment, figure)
    runs.write_table(experiment, table)


def row(
    shortcut: str, source: str, value: float, layers: str, found: list[int | None]
) -> dict[str, Any]:
    return {
        'shortcut': shortcut,
        'source': source,
        'scale or count': f'{value:g}',
        'parameters': layers,
        'n': len(found),
        'step of onset': listed_steps(found),
    }


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=1, config_file='configs/onset.py'))
