"""Draws figures of docs/ again that are not of an experiment.

    python -m experiments.drawings [--workdir=DIR]

Those of runs that take hours or a GPU, from the tables in docs/tables: a figure of each
NAME_curves.csv (`ARMS`); gpu_steps.png of gpu_steps.csv (without runs whose features stay equal)
and steps_cifar_SHORTCUT.png of its csv (`SHORTCUTS`); diversity_cifar.png of diversity_cifar.csv;
held_out.png of held_out.csv. And networks.png, the networks and their streams. DIR is docs/figures.

Prints tables of the onsets of gpu_steps.csv, steps_gpu_pre_relu.csv and steps_cifar_SHORTCUT.csv,
of their asymmetries and of how far predictions of them are off, of the last ones' first `EARLY`
steps too.
"""

import csv
import pathlib
import sys
from typing import Any

from configs import onset as onset_config
from experiments import arms, curves, diversity, held_out, networks, runs
from zerojax.host import paths
from zerojax.host.command import run_command
from zerojax.host.stop import exit_on_signals
from zerojax.host.terminal import say
from zerojax.run import cli

TABLES = pathlib.Path(__file__).parents[1] / 'docs' / 'tables'
COPY = 'CIFAR-10 (JPEG-75 copy)'
PAPERS = f'ConstNet-16-10 on {COPY}'
ARMS = {  # name of a table of curves: title of its figure
    'gpu_arms': f'{PAPERS}, TF32, one NVIDIA H200',
    'gpu_bfloat16_arms': f'{PAPERS}, bfloat16, one NVIDIA H100',
    'fashion_mnist_arms': 'ConstNet-10-1 on Fashion-MNIST',
    'cifar_arms': f'ConstNet-16-1 on {COPY}',
}
SHORTCUTS = ('post_relu', 'pre_relu')  # of the paper's network
EARLY = (60, 100)  # steps, of which there are tables of their own


def number(text: str) -> float | str:
    """The text as a number if it is one; NaN if it is empty."""
    try:
        return float(text or 'nan')
    except ValueError:
        return text


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a table."""
    with open(TABLES / name, newline='') as file:
        return [{key: number(x) for key, x in row.items()} for row in csv.DictReader(file)]


def is_broken(rows: list[dict[str, Any]]) -> bool:
    """Whether the features of any stream ever differ."""
    return any(row[stream] > 0 for row in rows for stream in curves.streams(rows))


def accuracies(rows: list[dict[str, Any]]) -> diversity.Accuracies:
    """Of a table of `diversity` of one seed."""
    return {
        (row['noise'], key, int(row['unique features a stream'])): [row[f'accuracy, {where}']]
        for row in rows
        for key, where in diversity.WHERE.items()
    }


def held_out_cases(rows: list[dict[str, Any]]) -> held_out.Found:
    """Those of a table of `held_out`, CIFAR-10 named as the copy that it is."""
    columns = {'measured': 'onset'} | {x: f'predicted, {x}' for x in held_out.METHODS}
    found: held_out.Found = {}
    for row in rows:
        name = row['setting'].replace('CIFAR-10', COPY)
        steps = {
            key: [None if step == 'never' else int(step) for step in row[column].split(', ')]
            for key, column in columns.items()
        }
        found.setdefault((name, row['shortcut']), []).append({'scale': row['scale']} | steps)
    return found


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    values = cli.text_flags(workdir=str(TABLES.parent / 'figures'))
    cli.parse(argv, values)
    workdir = paths.meant(values.workdir, f'--workdir={values.workdir}')
    cli.make_folder(workdir)
    gpu_steps = read('gpu_steps.csv')
    drawn = {name: (title, arms.draw(read(f'{name}_curves.csv'))) for name, title in ARMS.items()}
    broken = [row for rows in curves.by_run(gpu_steps).values() if is_broken(rows) for row in rows]
    drawn['gpu_steps'] = (
        f'{PAPERS}, NVIDIA H200, or H100 where it says so',
        curves.draw(broken, across=4),
    )
    tables = [gpu_steps, read('steps_gpu_pre_relu.csv')]
    for shortcut in SHORTCUTS:
        steps = read(f'steps_cifar_{shortcut}.csv')
        title = f'{PAPERS}, {shortcut}, two CPU cores'
        drawn[f'steps_cifar_{shortcut}'] = title, curves.draw(steps, across=3)
        tables += [steps, *([row for row in steps if row['step'] <= last] for last in EARLY)]
    drawn['diversity_cifar'] = (
        f'{PAPERS}, reduced',
        diversity.draw(accuracies(read('diversity_cifar.csv'))),
    )
    drawn['held_out'] = (
        'Onsets, three seeds of each setting',
        held_out.draw(held_out_cases(read('held_out.csv')), onset_config.get_config().num_steps),
    )
    for name, (title, figure) in drawn.items():
        figure.suptitle(title)
        figure.savefig(workdir / f'{name}.png', dpi=110)
        say(f'{workdir / name}.png')
    networks.draw().savefig(workdir / 'networks.png', dpi=110)
    say(f'{workdir / "networks.png"}')
    for rows in tables:
        say(f'\n{runs.markdown(curves.onsets(rows))}\n\n{runs.markdown(curves.summary(rows))}')


if __name__ == '__main__':
    sys.exit(run_command(run, sys.argv, __doc__, exit_on_signals))
