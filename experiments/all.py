"""Every experiment of docs/results.md and docs/findings.md, one after another.

    python -m experiments.all [--data_dir=DIR]

The first lines say what it will cost. DIR holds CIFAR-10 and Fashion-MNIST as TensorFlow Datasets
has prepared them (see configs/cifar.py); without it they are where that puts them. Each experiment
is a command of its own, with nothing beside it; the first that fails ends this, with status 1.
Stopped and started again, it goes on where it was. On a GPU it must be started again some times: a
process keeps to one mode of determinism there, as the lines say that it ends with.
"""

import pathlib
import shlex
import subprocess
import sys

from zerojax.host.command import run_command
from zerojax.host.errors import RunError
from zerojax.host.stop import exit_on_signals
from zerojax.host.terminal import say
from zerojax.run import cli

PAPER_SIZE = [
    'curves --features=8,16 --config=configs/cifar.py --config.num_epochs=None '
    f'--config.num_steps=200 --config.optimizer.drop_at=() --config.model.shortcut={shortcut} '
    '--config.determinism.mode=deterministic --config.dataset.eval_split=test[:500] '
    f'--workdir=runs/experiments/curves_cifar_{shortcut}'
    for shortcut in ('post_relu', 'pre_relu')
]
DIVERSITY = (
    'diversity --config=configs/cifar.py --unique=1,2,4,8,16 --scales=1e-4 --seeds=1 '
    '--config.num_epochs=15 --config.optimizer.drop_at=(0.5,0.75,0.9) '
    '--workdir=runs/experiments/diversity_cifar'
)
FASHION = (
    'images --config=configs/fashion_mnist.py:cpu --seeds=3 '
    '--workdir=runs/experiments/images_fashion_mnist'
)
MINUTES = {  # of each on two CPU cores; those of `images` are estimated from one epoch
    'contrast': 5,
    'arms': 15,
    'leakynet': 30,
    'unique_features': 3,
    'signal': 3,
    'features': 2,
    'lottery': 15,
    'hardware': 10,
    'onset': 25,
    'threshold': 15,
    'sources': 15,
    'timing': 10,
    'streams': 10,
    'diversity': 9,
    'phase': 20,
    'curves': 3,
    'architectures': 5,
    'held_out': 60,
    **dict.fromkeys(PAPER_SIZE, 70),
    DIVERSITY: 130,
    FASHION: 240,
    'images': 360,
}
ON_IMAGES = ('held_out', *PAPER_SIZE, DIVERSITY, FASHION, 'images')


def command(experiment: str, data_dir: str | None) -> list[str]:
    """The command line of one of `MINUTES`."""
    name, *flags = experiment.split()
    if data_dir is not None and experiment in ON_IMAGES:
        flags.append(f'--config.dataset.data_dir={data_dir}')
    return [sys.executable, '-m', f'experiments.{name}', *flags]


def workdir(experiment: str) -> pathlib.Path:
    """Where that leaves its table."""
    name, *flags = experiment.split()
    given = [flag.removeprefix('--workdir=') for flag in flags if flag.startswith('--workdir=')]
    return pathlib.Path(given[0] if given else f'runs/experiments/{name}')


def run(argv: list[str]) -> None:
    values = cli.text_flags(data_dir=None)
    cli.parse(argv, values)
    for experiment, minutes in MINUTES.items():
        finished = ' (has a table)' if (workdir(experiment) / 'table.csv').exists() else ''
        say(f'{minutes:4} min  {experiment}{finished}')
    say(f'{sum(MINUTES.values()) / 60:.1f} hours on two CPU cores, if none was begun')
    for experiment in MINUTES:
        line = command(experiment, values.data_dir)
        shown = shlex.join(['python', *line[1:]])
        say(f'\n== {shown}')
        status = subprocess.run(line, check=False).returncode
        if status:
            raise RunError(f'{shown}: exit status {status}; see above')


if __name__ == '__main__':
    sys.exit(run_command(run, sys.argv, __doc__, exit_on_signals))
