"""Draws figures of docs/ again that are not of an experiment.

    python -m experiments.drawings [--workdir=DIR]

Those of runs that take hours or a GPU, from the tables in docs/tables: a figure of each
NAME_curves.csv (`ARMS`); gpu_steps.png of gpu_steps.csv (without runs whose features stay equal)
and steps_cifar_post_relu.png of its csv, with tables of their onsets, their asymmetries and how far
predictions of them are off, of the latter's first 100 steps too; diversity_cifar.png of
diversity_cifar.csv. And networks.png, the networks and their streams. DIR is docs/figures.
"""

import csv
import pathlib
import sys
from typing import Any

from experiments import arms, curves, diversity, networks, runs
from zerojax.host import paths
from zerojax.host.command import run_command
from zerojax.host.stop import exit_on_signals
from zerojax.host.terminal import say
from zerojax.run import cli

TABLES = pathlib.Path(__file__).parents[1] / 'docs' / 'tables'
PAPERS = 'ConstNet-16-10 on CIFAR-10 (JPEG-75 copy)'
ARMS = {  # name of a table of curves: title of its figure
    'gpu_arms': f'{PAPERS}, TF32, one NVIDIA H200',
    'gpu_bfloat16_arms': f'{PAPERS}, bfloat16, one NVIDIA H100',
    'fashion_mnist_arms': 'ConstNet-10-1 on Fashion-MNIST',
    'cifar_arms': 'ConstNet-16-1 on CIFAR-10 (JPEG-75 copy)',
}
EARLY = 100  # steps, of which there is a table of their own


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


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    values = cli.text_flags(workdir=str(TABLES.parent / 'figures'))
    cli.parse(argv, values)
    workdir = paths.meant(values.workdir, f'--workdir={values.workdir}')
    cli.make_folder(workdir)
    gpu_steps = read('gpu_steps.csv')
    steps = read('steps_cifar_post_relu.csv')
    drawn = {name: (title, arms.draw(read(f'{name}_curves.csv'))) for name, title in ARMS.items()}
    broken = [row for rows in curves.by_run(gpu_steps).values() if is_broken(rows) for row in rows]
    drawn['gpu_steps'] = (
        f'{PAPERS}, one NVIDIA H200, where named H100',
        curves.draw(broken, across=4),
    )
    drawn['steps_cifar_post_relu'] = f'{PAPERS}, two CPU cores', curves.draw(steps, across=3)
    drawn['diversity_cifar'] = (
        f'{PAPERS}, reduced',
        diversity.draw(accuracies(read('diversity_cifar.csv'))),
    )
    for name, (title, figure) in drawn.items():
        figure.suptitle(title)
        figure.savefig(workdir / f'{name}.png', dpi=110)
        say(f'{workdir / name}.png')
    networks.draw().savefig(workdir / 'networks.png', dpi=110)
    say(f'{workdir / "networks.png"}')
    for rows in (gpu_steps, steps, [row for row in steps if row['step'] <= EARLY]):
        say(f'\n{runs.markdown(curves.onsets(rows))}\n\n{runs.markdown(curves.summary(rows))}')


if __name__ == '__main__':
    sys.exit(run_command(run, sys.argv, __doc__, exit_on_signals))
