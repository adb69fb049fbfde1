"""Trains one configuration.

python -m zerojax.main --config=configs/NAME.py[:VARIANT] [--workdir=DIR] [--config.FIELD=VALUE ...]
                       [--distributed=auto|HOST:PORT,N,I] [--distributed_timeout=SECONDS]

A config that comes with zerojax is --config=zerojax:NAME[:VARIANT], such as zerojax:digits.
Without --workdir the run goes to runs/NAME. In a workdir that holds a run of the same config it
resumes. DIR may be gs://BUCKET/RUN, and on several hosts the same command with --distributed runs
on each, see docs/cloud.md. Exit status: 0 success; 1 a failure during the run; 2 a mistake in
flags, config, data or workdir; 143 or 130 after SIGTERM or SIGINT, once a checkpoint is saved.
"""

import sys

from zerojax.host.command import run_command
from zerojax.host.stop import exit_on_signals


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    # Imported only now, so that a signal during these slow imports ends in the right status too.
    from zerojax.host import objectstore
    from zerojax.run import cli
    from zerojax.run.train import train

    values = cli.text_flags(**cli.DISTRIBUTED)
    config, workdir = cli.parse_flags(argv, values, stores=True)
    cli.join_processes(values)
    with objectstore.failures(workdir):
        train(config, workdir)


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, exit_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
