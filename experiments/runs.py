"""What the experiments share: flags, many restartable runs, tables and figures.

An experiment takes any run config as its base and changes a few fields for each of its arms:

    python -m experiments.NAME [--config=configs/NAME.py] [--workdir=DIR] [--seeds=N]
                               [--config.FIELD=VALUE ...]

Each run has a folder of its own under DIR/runs, as if `zerojax.main` had trained it. Stopped and
started again, an experiment goes on where it was: finished runs are not run again, and a folder
that holds a run of another config is an error.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from zerojax.host import figures, records
from zerojax.host.command import run_command
from zerojax.host.errors import UsageError
from zerojax.host.records import Record
from zerojax.host.stop import exit_on_signals
from zerojax.host.terminal import say
from zerojax.run import checks, cli
from zerojax.sweep import sweep

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#999999')
STYLES = ('-', '--', ':')
MARKERS = ('o', 's', '^', 'D', 'v', 'X', 'P')
MAX_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What an experiment was asked for on the command line."""

    name: str
    command: str
    config: ConfigDict
    workdir: pathlib.Path
    seeds: int
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the experiment's own


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that was trained: its arm, seed, summary.json and the lines of metrics.jsonl."""

    arm: str
    seed: int
    workdir: pathlib.Path
    summary: Record
    lines: list[Record]

    def of_kind(self, kind: str) -> list[Record]:
        """The lines of one kind, in the order of their steps."""
        return [line for line in self.lines if line['kind'] == kind]


def main(
    run: Callable[[Experiment], None],
    documentation: str,
    seeds: int,
    config_file: str = 'configs/digits.py',
    **flags: str,
) -> int:
    """Reads the command line, runs the experiment, and returns the exit status.

    `seeds`, `config_file` and the `flags`, which are its own, are what it takes by default.
    """
    name = pathlib.PurePath(sys.argv[0]).stem

    def run_experiment(argv: list[str]) -> None:
        values = cli.text_flags(seeds=str(seeds), **flags)
        config, workdir = cli.parse_flags(
            argv, values, config_file=config_file, workdir=f'runs/experiments/{name}'
        )
        number = cli.count(values, 'seeds', least=1)
        if number > MAX_SEEDS:
            raise UsageError(f'--seeds={number}: must be at most {MAX_SEEDS}')
        checks.check_devices()
        cli.make_folder(workdir)
        command = shlex.join(['python', '-m', f'experiments.{name}', *argv[1:]])
        own = {each: getattr(values, each) for each in flags}
        run(Experiment(name, command, config, workdir, number, own))

    return run_command(run_experiment, sys.argv, documentation, exit_on_signals)


def counts(experiment: Experiment, name: str, *, least: int) -> list[int]:
    """The whole numbers that a flag of the experiment's own holds, rising, each once.

    Raises:
        UsageError: it holds anything else, or one is less than `least` or has ten digits.
    """
    text = experiment.flags[name]
    words = text.split(',')
    if not all(x.isascii() and x.isdigit() and len(x) < 10 and int(x) >= least for x in words):
        raise UsageError(
            f'--{name}={text}: must be whole numbers from {least} to 999999999, as '
            f'{least},{2 * least}'
        )
    return sorted({int(x) for x in words})


def changed(config: ConfigDict, **fields: Any) -> ConfigDict:
    """A copy of the config with other values; fields are named 'model.depth' and so on."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(fields)
    return copy


def train_all(
    experiment: Experiment, arms: dict[str, dict[str, Any]], *, only_seed: int | None = None
) -> list[FinishedRun]:
    """Trains each arm (name: changed fields) with each seed (or one), unless it is finished.

    The seed decides everything random in the run, the perturbation included.

    Raises:
        UsageError: a field is wrong, or a run's folder holds a run of another config.
    """
    jobs = {}
    for arm, fields in arms.items():
        for seed in range(experiment.seeds) if only_seed is None else [only_seed]:
            config = changed(experiment.config, **fields)
            config.seed = config.perturbation.seed = seed
            jobs[arm, seed] = config, run_folder(experiment, arm, seed)
    runs = []
    for (arm, seed), summary in zip(jobs, sweep(list(jobs.values())), strict=True):
        workdir = run_folder(experiment, arm, seed)
        lines = records.read_metrics(workdir / 'metrics.jsonl')
        runs.append(FinishedRun(arm, seed, workdir, summary, lines))
    return runs


def run_folder(experiment: Experiment, arm: str, seed: int) -> pathlib.Path:
    """Where the run of an arm and seed lives."""
    name = ''.join(c if c.isalnum() or c in '.-' else '_' for c in arm)
    return experiment.workdir / 'runs' / f'{name}_{seed}'


def mean_and_deviation(values: Sequence[float], digits: int = 3) -> str:
    """'mean ± sample standard deviation', or the value alone if there is only one."""
    mean = f'{statistics.fmean(values):.{digits}f}'
    if len(values) == 1:
        return mean
    return f'{mean} ± {statistics.stdev(values):.{digits}f}'


def accuracies(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """The columns on accuracy: that of the last evaluation, and the best of all."""
    return {
        'n': str(len(runs)),
        'last accuracy': mean_and_deviation([run.summary['eval_accuracy'] for run in runs]),
        'best accuracy': mean_and_deviation([run.summary['best_eval_accuracy'] for run in runs]),
    }


def by_arm(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Runs of each arm, arms in the order of their first run."""
    arms: dict[str, list[FinishedRun]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return arms


def write_table(experiment: Experiment, rows: list[dict[str, Any]]) -> None:
    """Prints a table and writes it, see `save_table`."""
    save_table(experiment.workdir, experiment.command, circumstances(experiment), rows)


def save_table(
    workdir: pathlib.Path, command: str, conditions: str, rows: list[dict[str, Any]]
) -> None:
    """Prints a table and writes it as table.md (with command, hardware, versions) and table.csv."""
    records.write_csv(workdir / 'table.csv', rows)
    table = markdown(rows)
    (workdir / 'table.md').write_text(
        f'    {command}\n\n{conditions}\n\n{table}\n', encoding='utf-8'
    )
    say(f'\n{table}\n\n{workdir}/table.md, table.csv')


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of rows of the same columns."""
    columns = list(rows[0])
    lines = [columns, ['---'] * len(columns), *([str(row[c]) for c in columns] for row in rows)]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def circumstances(experiment: Experiment) -> str:
    """Data, hardware and versions in a sentence."""
    config = experiment.config
    return (
        f'{config.dataset.name}, {config.num_steps or config.num_epochs} '
        f'{"steps" if config.num_steps else "epochs"} of {config.batch_size}; {machine()}.'
    )


def machine() -> str:
    """Hardware and versions."""
    versions = ', '.join(
        f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'jaxlib', 'flax', 'optax')
    )
    return (
        f'{jax.device_count()} {jax.devices()[0].device_kind} device ({platform.machine()}, '
        f'{os.cpu_count()} CPU cores), Python {platform.python_version()}, {versions}'
    )


def new_figure(rows: int, columns: int, width: float = 10, height: float = 4) -> tuple[Figure, Any]:
    """A figure and its axes, in inches; without pyplot, so nothing global is touched."""
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns)
    for each in np.ravel(axes):
        each.grid(alpha=0.3)
        each.spines[['top', 'right']].set_visible(False)
    return figure, axes


def style(index: int) -> dict[str, Any]:
    """Colour and line style number `index`: 24 that can be told apart."""
    return {
        'color': COLORS[index % len(COLORS)],
        'linestyle': STYLES[index // len(COLORS) % len(STYLES)],
    }


def marks(index: int) -> dict[str, Any]:
    """Marks for curve number `index`, at places of its own, that show it under others too."""
    return {
        'marker': MARKERS[index % len(MARKERS)],
        'markersize': 5,
        'markevery': (0.02 * (index % len(MARKERS)), 0.15),
    }


def plot_band(
    axes: Any, x: ArrayLike, series: Sequence[ArrayLike], at_most: float = np.inf, **kwargs: Any
) -> None:
    """The mean of several series as a line, mean ± sample standard deviation as a band.

    On a logarithmic axis both are taken of the logarithms. The band ends at `at_most`, which the
    series cannot exceed.
    """
    logarithmic = axes.get_yscale() == 'log'
    values = np.array(series, float)
    values = np.log(values) if logarithmic else values
    mean = values.mean(0)
    deviation = values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
    curves = [mean, mean - deviation, mean + deviation]
    mean, low, high = np.exp(curves) if logarithmic else curves
    axes.plot(x, mean, **kwargs)
    axes.fill_between(x, low, np.minimum(high, at_most), color=kwargs['color'], alpha=0.2, lw=0)


def save_figure(experiment: Experiment, figure: Figure) -> None:
    """Writes figure.png and figure.pdf, if they can be drawn."""

    def save() -> None:
        for suffix in ('png', 'pdf'):
            figure.savefig(experiment.workdir / f'figure.{suffix}', dpi=150)

    if figures.try_to_draw(experiment.workdir / 'figure.png', save):
        say(f'{experiment.workdir}/figure.png, figure.pdf')
