"""Draws figures of docs/ again that are not of an experiment.

    python -m experiments.drawings [--workdir=DIR]

Those of runs that take hours or a GPU, from the tables in docs/tables: a figure of each
NAME_curves.csv (`ARMS`), gpu_steps.png of gpu_steps.csv (without runs whose features stay equal),
and a table of how far predictions in the latter are off; diversity_cifar.png of
diversity_cifar.csv. And networks.png, the networks and their streams. DIR is docs/figures.
"""

import csv
import pathlib
import sys
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import arms, diversity, networks, runs
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
STREAMS = ('stem', 'block1_0', 'block2_0', 'block3_0')


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


def prediction_errors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """|Δ log10| of the asymmetry of each run and stream that has predictions, over its steps."""
    found = []
    for name in dict.fromkeys(row['run'] for row in rows):
        of_run = [row for row in rows if row['run'] == name]
        if np.isnan(of_run[0][f'reduced: {STREAMS[0]}']):
            continue
        for stream in STREAMS:
            line = {'run': name, 'steps': len(of_run), 'stream': stream}
            for method in ('reduced', 'linear'):
                logs = np.log10([[row[f'{method}: {stream}'], row[stream]] for row in of_run])
                off = np.abs(logs[:, 0] - logs[:, 1])
                line |= {
                    f'{method}, median': f'{np.median(off):.2f}',
                    f'{method}, largest': f'{off.max():.2f}',
                }
            found.append(line)
    return found


def draw_steps(rows: list[dict[str, Any]]) -> Figure:
    """Asymmetry of each stream after each step, a panel a run, predictions where there are some."""
    broken = [row['run'] for row in rows if any(row[stream] > 0 for stream in STREAMS)]
    names = list(dict.fromkeys(broken))
    figure, panels = runs.new_figure(2, (len(names) + 1) // 2, width=16, height=8)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels.flat, names, strict=False):
        of_run = [row for row in rows if row['run'] == name]
        steps = [row['step'] for row in of_run]
        for color, stream in zip(runs.COLORS, STREAMS, strict=False):
            # Of a prediction only what is an asymmetry: below 1.
            for kind, style, width in (
                ('', '-', 1.5),
                ('reduced: ', ':', 2.5),
                ('linear: ', '--', 1),
            ):
                curve = np.array([row[kind + stream] for row in of_run])
                curve[(curve <= 0) | (curve > 1)] = np.nan
                label = {'label': stream} if not kind else {}
                axes.plot(steps, curve, style, color=color, lw=width, **label)
        least = 1e-3 if 'injected' in name else 1e-12
        axes.set(yscale='log', ylim=(least, 1), xlim=(0, 200), xlabel='step', ylabel='asymmetry')
        axes.set_title(name.replace(' (', '\n('), fontsize=10)
    figure.legend(
        *panels.flat[0].get_legend_handles_labels(), loc='outside lower center', ncols=4,
        frameon=False, title='line: the run; dots: reduced network; dashes: linear prediction',
    )  # fmt: skip
    return figure


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
    steps = read('gpu_steps.csv')
    drawn = {name: (title, arms.draw(read(f'{name}_curves.csv'))) for name, title in ARMS.items()}
    drawn['gpu_steps'] = f'{PAPERS}, one NVIDIA H200, where named H100', draw_steps(steps)
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
    say(f'\n{runs.markdown(prediction_errors(steps))}')


if __name__ == '__main__':
    sys.exit(run_command(run, sys.argv, __doc__, exit_on_signals))
