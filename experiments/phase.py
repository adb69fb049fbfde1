"""Over learning rate, weight decay and depth: does a small asymmetry grow or die?

    python -m experiments.phase

Networks of two features a stream tell how fast small asymmetry of each stream grows, per step over
the second half of the steps, and what becomes of the symmetric network itself: it learns, or learns
nothing (its loss is no better than a constant answer's), or is not finite. Beside each point of
learning rate and weight decay stands a run with noise of 1e-4 on the initial weights and the same
batches: does training start in it, and does its asymmetry grow as predicted before it does? The
prediction is linear, and knows nothing of features on a kink, as `post_relu` has them at the start;
--config.model.shortcut=pre_relu has none. At most 300 steps, at a constant learning rate;
growth.csv has the growth of all streams. 2 seeds, in 20 minutes on two CPU cores. See
`experiments.runs` for flags and restarts.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.artist import Artist
from matplotlib.colors import Normalize, SymLogNorm, to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from ml_collections import ConfigDict

from experiments import runs
from experiments.trajectories import Laboratory, first_at_least
from zerojax import symmetry
from zerojax.host import records
from zerojax.host.errors import RunError
from zerojax.host.terminal import say
from zerojax.measure import prediction, stability
from zerojax.measure.prediction import growth_per_step
from zerojax.measure.stability import ONSET
from zerojax.run.building import Source, build_optimizer, scalars_of
from zerojax.run.prediction import check_predictable, check_symmetric
from zerojax.run.reduction import Reduction
from zerojax.step import TrainState, jit_in_mode, train_step_function
from zerojax.sweep import folder_name, sweep
from zerojax.symmetry import quotient
from zerojax.symmetry.orbits import feature_counts

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 3.0)
WEIGHT_DECAYS = (5e-4, 1e-2, 3e-2, 0.1, 0.3)
DEPTHS = (7, 10, 16, 22, 34)
MAX_STEPS = 300
SCALE = 1e-4  # of the noise of runs
LEARNT = 0.99  # of a constant answer's loss: what has a larger one has learnt nothing

# What becomes of small asymmetry, or of the symmetric network without it.
GROWS, DIES, NOTHING, NOT_FINITE = 'grows', 'dies', 'learns nothing', 'not finite'
# What runs do that learn: their asymmetry reaches `ONSET`, or never does.
STARTS, STAYS = 'starts', 'does not start'
EXPECTED = {GROWS: STARTS, DIES: STAYS, NOTHING: NOTHING, NOT_FINITE: NOT_FINITE}


@dataclasses.dataclass(frozen=True)
class Point:
    """What becomes of the symmetric network and of small asymmetry with these settings.

    Attributes:
        curves: of each stream, natural logarithm of its asymmetry but for a constant, [N + 1];
            None if the linearised step is not finite.
        loss: of the symmetric network, mean over the second half of the steps, in nats; None if
            a step is not finite.
        constant_loss: the least that a constant answer reaches, in nats.
        failure: what was not finite, and at which step; '' if nothing was.
    """

    depth: int
    learning_rate: float
    weight_decay: float
    curves: dict[str, np.ndarray] | None
    loss: float | None
    constant_loss: float
    failure: str

    def growth(self, steps: int | None = None) -> dict[str, float]:
        """Of each stream, per step, over the second half of the first `steps` steps, or of all;
        without those that have none."""
        end = None if steps is None else steps + 1
        found = {name: growth_per_step(x[:end]) for name, x in (self.curves or {}).items()}
        return {name: x for name, x in found.items() if x is not None}

    def fate(self) -> str:
        if self.curves is None or self.loss is None:
            return NOT_FINITE
        if learns_nothing(self.loss, self.constant_loss):
            return NOTHING
        return GROWS if max(self.growth().values(), default=0.0) > 0 else DIES


def learns_nothing(loss: float, constant_loss: float) -> bool:
    return loss >= LEARNT * constant_loss


@dataclasses.dataclass(frozen=True)
class Run:
    """A run with noise on its initial weights; its losses and asymmetries are of each step.

    Attributes:
        loss: of the batches, [N].
        asymmetry: of each stream, [N].
        accuracy: on the held-out set after the last step.
    """

    loss: np.ndarray
    asymmetry: dict[str, np.ndarray]
    accuracy: float

    def onset(self) -> int | None:
        """Number of updates after which the largest asymmetry first is `ONSET`."""
        return first_at_least(np.max(list(self.asymmetry.values()), axis=0), ONSET)

    def last_loss(self) -> float:
        """The mean over the second half of the steps."""
        return float(np.mean(self.loss[len(self.loss) // 2 :]))


def fate_of(run: Run | None, constant_loss: float) -> str:
    """What a run did; it is None if it ended with what is not finite."""
    if run is None:
        return NOT_FINITE
    if learns_nothing(run.last_loss(), constant_loss):
        return NOTHING
    return STAYS if run.onset() is None else STARTS


def growth_in(run: Run | None, point: Point) -> tuple[str, float, float] | None:
    """(stream, predicted, measured growth per step) of the stream that should grow fastest.

    Over the second half of the steps before the run's onset; None where these are too few.
    """
    steps = 0 if run is None else run.onset() or len(run.loss)
    predicted = point.growth(steps) if steps >= 4 else {}
    if run is None or not predicted:
        return None
    stream = max(predicted, key=lambda name: predicted[name])
    with np.errstate(divide='ignore'):  # the asymmetry before the first step is not known
        measured = growth_per_step(np.log([math.nan, *run.asymmetry[stream][:steps]]))
    return None if measured is None else (stream, predicted[stream], measured)


class Pairs(Laboratory):
    """Networks of two features a stream, and runs, at any learning rate and weight decay.

    These two are arguments of all compiled programs, which are the same for all points. The
    config's seed decides the batches, and the noise of runs.
    """

    @functools.cached_property
    def _reduction(self) -> tuple[Any, stability.State, list[Source]]:
        """Train step of the pair, its state before the first step, and what each step reads."""
        large = self.initial_state(self.config.seed)
        check_symmetric(self.program, large.params)
        halves = quotient.shares(feature_counts(large.params, self.axes), 2)
        small = self.model.with_features(halves.counts())
        model = quotient.Quotient(small, self.model.feature_axes(), halves)
        average = quotient.average_gradients(self.axes, halves)

        def train_step(state: TrainState, source: Source) -> tuple[TrainState, Any]:
            tx = optax.chain(average, build_optimizer(self.config, source.scalars))
            return train_step_function(model, tx)(state, self.make_batch(state, source))

        params = quotient.reduce(large.params, self.axes, halves)
        start = Reduction(self.program, halves).state(params, self.config.seed)
        return train_step, start, list(self.sources(large))

    @functools.cached_property
    def _train_step(self) -> Any:
        return jit_in_mode(self._reduction[0], self.config.determinism.mode)

    def point(self, learning_rate: float, weight_decay: float) -> Point:
        fields = {
            'optimizer.learning_rate': learning_rate,
            'optimizer.weight_decay': weight_decay,
        }

        def compute() -> dict[str, Any]:
            _, start, sources = self._reduction
            scalars = scalars_of(runs.changed(self.config, **fields))
            sources = [source._replace(scalars=scalars) for source in sources]
            return self._train(start, sources) | self._push(start, sources)

        found = self.remember(compute, what='phase', at=fields)
        curves = found['curves']
        if found['not_finite_at'] is not None:
            failure = f'{NOT_FINITE} at step {found["not_finite_at"]}'
        else:
            failure = found['error'] or ''
        return Point(
            depth=self.config.model.depth,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            curves=curves and {name: np.array(x, np.float64) for name, x in curves.items()},
            loss=found['loss'],
            constant_loss=self._constant_loss(),
            failure=failure,
        )

    def _constant_loss(self) -> float:
        """The entropy of the training labels, in nats."""
        _, counts = np.unique(self.dataset.train.labels, return_counts=True)
        share = counts / counts.sum()
        return float(-np.sum(share * np.log(share)))

    def _train(self, start: stability.State, sources: list[Source]) -> dict[str, Any]:
        """The symmetric network's loss, and the first step that is not finite."""
        params, rest = start
        state, losses = dataclasses.replace(rest, params=params), []
        for source in sources:
            state, metrics = self._train_step(state, source)
            losses.append(metrics['loss'])
        loss = float(np.mean(jax.device_get(losses[len(losses) // 2 :])))
        at_step = int(state.nonfinite_at_step)
        if at_step >= 0:
            return {'loss': None, 'not_finite_at': at_step}
        return {'loss': loss, 'not_finite_at': None}

    def _push(self, start: stability.State, sources: list[Source]) -> dict[str, Any]:
        """What small asymmetry of each stream comes to, or why that is not known."""
        step = stability.of_train_step(self._reduction[0])
        params = jax.device_get(start[0])
        random = np.random.default_rng(0)
        noise = jax.tree.map(lambda w: random.normal(size=w.shape), params)
        tangents = jax.tree.map(
            lambda x, w: np.asarray(x, w.dtype), prediction.two_features(noise, self.axes), params
        )
        try:
            by_stream = stability.growth(step, start, sources, tangents, self.axes).log_by_stream
        except ValueError as error:
            return {'curves': None, 'error': str(error)}
        curves = {
            name: [float(x) if math.isfinite(x) else None for x in by_stream[name][:, i]]
            for i, name in enumerate(symmetry.stream_names(self.axes))
        }
        return {'curves': curves, 'error': None}

    def run_at(self, point: Point) -> Run | None:
        """A run at the point; None if it ended with what is not finite."""
        fields = {
            'optimizer.learning_rate': point.learning_rate,
            'optimizer.weight_decay': point.weight_decay,
            'seed': self.config.seed,
        }
        noise = {
            'perturbation.kind': 'gaussian',
            'perturbation.scale': SCALE,
            'perturbation.seed': self.config.seed,
        }
        workdir = self.folder / folder_name(fields)
        job = runs.changed(self.config, **fields, **noise), workdir

        def compute() -> dict[str, Any]:
            try:
                sweep([job], programs=self.programs)
            except RunError as error:
                if 'not finite' not in str(error):
                    raise
                return {'error': str(error)}
            return {'error': None}

        if self.remember(compute, what='run', at=fields | noise)['error']:
            return None
        summary = records.read_json(workdir / 'summary.json')
        lines = records.read_metrics(workdir / 'metrics.jsonl')
        lines = [line for line in lines if line['kind'] == 'train']
        asymmetry = {
            name: np.array([line['asymmetry_by_stream'][name] for line in lines])
            for name in summary['asymmetry_by_stream']
        }
        loss = np.array([line['loss'] for line in lines])
        return Run(loss, asymmetry, summary['eval_accuracy'])


def short(config: ConfigDict, folder: pathlib.Path) -> ConfigDict:
    """At most `MAX_STEPS` steps of the config, at a constant learning rate."""
    noise = {'perturbation.kind': 'gaussian', 'perturbation.scale': SCALE}
    check_predictable(runs.changed(config, **noise))
    num_steps = min(Laboratory(config, folder).config.num_steps, MAX_STEPS)
    fields = {'optimizer.drop_at': (), 'determinism.mode': 'deterministic'}  # as what is predicted
    return runs.changed(config, num_steps=num_steps, num_epochs=None, **fields)


Case = tuple[Point, Run | None]  # of a seed
Grid = dict[tuple[int, int], list[Case]]  # by number of rate and of decay


def measure_grid(of_seeds: Sequence[Pairs]) -> Grid:
    grid: Grid = {}
    for pairs in of_seeds:
        for i, learning_rate in enumerate(LEARNING_RATES):
            for j, weight_decay in enumerate(WEIGHT_DECAYS):
                where = f'{learning_rate=:g}, {weight_decay=:g}, seed {pairs.config.seed}'
                say(f'-- {where}')
                point = pairs.point(learning_rate, weight_decay)
                grid.setdefault((i, j), []).append((point, pairs.run_at(point)))
    return grid


def row_of(points: Sequence[Point], its_runs: Sequence[Run | None]) -> dict[str, Any]:
    """Of one point of the grid, with each seed; no runs if none were trained."""
    fates = [fate_of(run, points[0].constant_loss) for run in its_runs]
    expected = [EXPECTED[point.fate()] for point in points]
    agreeing = sum(x == y for x, y in zip(fates, expected, strict=False))
    growths = [growth_in(run, point) for run, point in zip(its_runs, points, strict=False)]
    row = {
        'depth': str(points[0].depth),
        'learning rate': f'{points[0].learning_rate:g}',
        'weight decay': f'{points[0].weight_decay:g}',
        'n': str(len(points)),
        'predicted': ', '.join(point.failure or point.fate() for point in points),
        'largest growth a step': ', '.join(
            named(max(point.growth().items(), key=lambda each: each[1], default=None))
            for point in points
        ),
        'runs': ', '.join(fates),
        'as predicted': f'{agreeing} of {len(fates)}' if fates else '',
        'step of onset': ', '.join(
            '-' if run is None else str(run.onset() or 'never') for run in its_runs
        ),
        'growth before it: predicted, measured': '; '.join(
            '-' if x is None else f'{named(x[:2])}, {x[2]:+.3f}' for x in growths
        ),
        'loss, symmetric': ', '.join('-' if x.loss is None else f'{x.loss:.3f}' for x in points),
        'loss, runs': ', '.join('-' if x is None else f'{x.last_loss():.3f}' for x in its_runs),
        'held-out accuracy': ', '.join('-' if x is None else f'{x.accuracy:.3f}' for x in its_runs),
    }
    return {column: value or '-' for column, value in row.items()}


def named(growth: tuple[str, float] | None) -> str:
    return '-' if growth is None else f'{growth[0]} {round(growth[1], 3) + 0.0:+.3f}'


def growth_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Of a point of the grid, with each seed."""
    return [
        {
            'depth': point.depth, 'learning rate': point.learning_rate,
            'weight decay': point.weight_decay, 'seed': seed, 'stream': stream, 'growth': growth,
        }
        for seed, point in enumerate(points)
        for stream, growth in point.growth().items()
    ]  # fmt: skip


HATCHES: dict[str, dict[str, Any]] = {
    NOTHING: {'facecolor': 'none', 'edgecolor': '0.65', 'hatch': '///', 'lw': 0},
    NOT_FINITE: {'facecolor': '0.8', 'edgecolor': '0.5', 'hatch': 'xxx', 'lw': 0},
}


def draw(
    experiment: runs.Experiment,
    grid: Grid,
    depths: list[list[Point]],
    streams: list[str],
    num_steps: int,
) -> None:
    columns = 3
    rows = -(-(len(streams) + 3) // columns)
    figure, axes = runs.new_figure(rows, columns, width=15, height=4.2 * rows + 0.8)
    panels = list(np.ravel(axes))
    of_streams, (scatter, depth, accuracy, *spare) = panels[: len(streams)], panels[len(streams) :]
    fates = {place: [point.fate() for point, _ in cases] for place, cases in grid.items()}
    growth = {
        stream: {
            place: mean([point.growth().get(stream) for point, _ in cases])
            for place, cases in grid.items()
        }
        for stream in streams
    }
    sizes = [abs(x) for values in growth.values() for x in values.values() if x is not None]
    largest = max([*sizes, 1 / num_steps])
    norm = SymLogNorm(1 / num_steps, vmin=-largest, vmax=largest)
    for panel, stream in zip(of_streams, streams, strict=True):
        image = draw_map(panel, growth[stream], fates, cmap='RdBu_r', norm=norm, form='+.3f')
        panel.set_title(f'predicted growth of stream {stream}')
    bar = figure.colorbar(image, ax=of_streams, label='growth (natural logarithm per step)')
    ticks = [x for x in (-0.1, -0.01, 0, 0.01, 0.1) if abs(x) <= largest]
    bar.set_ticks(ticks, labels=[f'{x:g}' for x in ticks])
    draw_growth(scatter, grid, streams)
    draw_depths(depth, depths, streams)
    draw_accuracy(accuracy, grid)
    for panel in spare:
        panel.set_axis_off()
    handles: list[Artist] = [
        Patch(**HATCHES[NOTHING], label='network learns nothing with some seed'),
        Patch(**HATCHES[NOT_FINITE], label='is not finite with some seed'),
        Line2D([], [], **dot('0.3', hollow=True), label='symmetric network learns nothing'),
    ]
    for i, stream in enumerate(streams):
        handles.append(Line2D([], [], marker='o', ms=5, label=f'stream {stream}', **runs.style(i)))
    figure.legend(handles=handles, loc='outside lower center', ncols=6, frameon=False)
    runs.save_figure(experiment, figure)


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    found = [x for x in values if x is not None]
    return statistics.fmean(found) if found else None


def dot(color: str, *, hollow: bool) -> dict[str, Any]:
    """How a run is drawn."""
    return {
        'color': color, 'marker': 'o', 'ms': 5, 'ls': '', 'mfc': 'none' if hollow else color,
    }  # fmt: skip


def draw_map(
    axes: Any,
    values: dict[tuple[int, int], float | None],
    fates: dict[tuple[int, int], list[str]],
    *,
    cmap: str,
    norm: Normalize,
    form: str,
) -> Any:
    """Numbers over learning rate and weight decay; hatched where one of the fates says so."""
    table = np.full((len(WEIGHT_DECAYS), len(LEARNING_RATES)), np.nan)
    for (i, j), value in values.items():
        table[j, i] = np.nan if value is None else value
    image = axes.imshow(table, cmap=cmap, norm=norm, origin='lower', aspect='auto')
    for (i, j), value in values.items():
        worst = [fate for fate in HATCHES if fate in fates[i, j]][-1:]
        for fate in worst:
            axes.add_patch(Rectangle((i - 0.5, j - 0.5), 1, 1, **HATCHES[fate]))
        if value is not None:
            background = '0.8' if worst == [NOT_FINITE] else image.cmap(norm(value))
            axes.text(
                i, j, format(round(value, 3) + 0.0, form), ha='center', va='center', fontsize=8,
                color='white' if luminance(background) < 0.5 else 'black',
                path_effects=[withStroke(linewidth=3, foreground=background)],
            )  # fmt: skip
    axes.grid(visible=False)
    axes.set_xticks(range(len(LEARNING_RATES)), [f'{x:g}' for x in LEARNING_RATES])
    axes.set_yticks(range(len(WEIGHT_DECAYS)), [f'{x:g}' for x in WEIGHT_DECAYS])
    axes.set(xlabel='learning rate', ylabel='weight decay (L2)')
    return image


def luminance(color: Any) -> float:
    return float(np.dot(to_rgb(color), (0.3, 0.6, 0.1)))


def draw_accuracy(axes: Any, grid: Grid) -> None:
    """Of the runs: mean of those that are finite."""
    values, fates = {}, {}
    for place, cases in grid.items():
        values[place] = mean([None if run is None else run.accuracy for _, run in cases])
        fates[place] = [fate_of(run, point.constant_loss) for point, run in cases]
    image = draw_map(axes, values, fates, cmap='viridis', norm=Normalize(0, 1), form='.2f')
    axes.figure.colorbar(image, ax=axes, label='held-out accuracy')
    axes.set_title(f'runs with noise of {SCALE:g}')


def draw_growth(axes: Any, grid: Grid, streams: list[str]) -> None:
    """Predicted and measured growth of each run's fastest stream."""
    both = []
    for point, run in itertools.chain(*grid.values()):
        if (growth := growth_in(run, point)) is not None:
            stream, predicted, measured = growth
            color = runs.style(streams.index(stream))['color']
            axes.plot(predicted, measured, **dot(color, hollow=point.fate() == NOTHING))
            both += [predicted, measured]
    ends = [min(both, default=0), max(both, default=0)]
    axes.plot(ends, ends, color='0.5', lw=0.8)
    for scale in (axes.set_xscale, axes.set_yscale):
        scale('symlog', linthresh=0.01)
    axes.set(
        xlabel='predicted growth (natural logarithm per step)',
        ylabel='measured growth (natural logarithm per step)',
        title='fastest stream of each run, before onset',
    )


def draw_depths(axes: Any, depths: list[list[Point]], streams: list[str]) -> None:
    numbers = [points[0].depth for points in depths]
    for i, stream in enumerate(streams):
        for of_seed in zip(*depths, strict=True):
            growth = [point.growth().get(stream, math.nan) for point in of_seed]
            axes.plot(numbers, growth, marker='o', ms=5, lw=1.5, **runs.style(i))
    for point in itertools.chain(*depths):
        if point.fate() in HATCHES:
            axes.axvspan(point.depth - 0.4, point.depth + 0.4, zorder=0, **HATCHES[point.fate()])
    axes.axhline(0, color='0.5', lw=0.8)
    axes.set_xticks(numbers)
    rate, decay = depths[0][0].learning_rate, depths[0][0].weight_decay
    axes.set(
        xlabel='depth (layers)',
        ylabel='predicted growth (natural logarithm per step)',
        title=f'learning rate {rate:g}, weight decay {decay:g}, each seed',
    )


def run(experiment: runs.Experiment) -> None:
    folder = experiment.workdir / 'runs'
    config = short(experiment.config, folder)

    def of_seeds(**fields: Any) -> list[Pairs]:
        seeds = range(experiment.seeds)
        return [Pairs(runs.changed(config, seed=seed, **fields), folder) for seed in seeds]

    depths = []
    for depth in DEPTHS:
        say(f'-- {depth=}')
        rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
        depths.append([pairs.point(rate, decay) for pairs in of_seeds(**{'model.depth': depth})])
    at_base = of_seeds()
    grid = measure_grid(at_base)
    draw(experiment, grid, depths, symmetry.stream_names(at_base[0].axes), config.num_steps)
    points = [[point for point, _ in cases] for cases in grid.values()]
    growths = [row for each in [*points, *depths] for row in growth_rows(each)]
    if growths:
        records.write_csv(experiment.workdir / 'growth.csv', growths)
        say(f'{experiment.workdir}/growth.csv')
    rows = [row_of(*zip(*cases, strict=True)) for cases in grid.values()]
    runs.write_table(experiment, rows + [row_of(points, []) for points in depths])


if __name__ == '__main__':
    sys.exit(runs.main(run, __doc__, seeds=2, config_file='configs/onset.py'))
