"""Compares runs: where two of them part, how far apart they end, what several gain together.

python -m zerojax.compare RUN_A RUN_B [RUN_C ...] [--output=FILE.json]

The runs are workdirs, finished or still in training; their newest checkpoints are compared. With
more than two, RUN_A is compared with each other one. Nothing is written but FILE.json.

Exit status: 0 success; 1 a damaged checkpoint; 2 a mistake in flags or files.
"""

import os
import pathlib
import sys

from zerojax.compare.report import report
from zerojax.compare.several import compare
from zerojax.host import paths
from zerojax.host.command import run_command
from zerojax.host.errors import RunError, UsageError
from zerojax.host.records import write_json
from zerojax.host.stop import exit_on_signals
from zerojax.host.terminal import say
from zerojax.run import cli


def parse(argv: list[str]) -> tuple[list[pathlib.Path], pathlib.Path | None]:
    """Workdirs and output file that a command line (with the program's name) asks for.

    Raises:
        UsageError: an unknown flag, less than two runs, one run twice, or a file that cannot be
            written.
    """
    values = cli.text_flags(output=None)
    given = cli.parse(argv, values, positional=True)
    workdirs = [paths.meant(each, f'command line: workdir {each!r}') for each in given]
    output = None
    if values.output is not None:
        output = paths.meant(values.output, f'--output={values.output}')
    if len(workdirs) < 2:
        raise UsageError(f'command line: {len(workdirs)} runs; name at least two workdirs')
    if output is not None:
        no_file = f'{output} is none' if output.exists() and not output.is_file() else None
        obstacle = no_file or paths.why_no_folder(output.parent, must_exist=True)
        if obstacle:
            raise UsageError(
                f'--output={output}: must be a file in a folder that exists, {obstacle}'
            )
    for workdir in workdirs:
        if [os.path.realpath(each) for each in workdirs].count(os.path.realpath(workdir)) > 1:
            raise UsageError(f'{workdir}: named twice; compare different runs')
    return workdirs, output


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and its arguments."""
    workdirs, output = parse(argv)
    found = compare(workdirs)
    if output is not None:
        try:
            write_json(output.resolve(), found)  # a link stays one
        except OSError as error:
            raise UsageError(f'--output={output}: cannot be written ({error.strerror})') from error
    if not say(report(found)) and output is None:
        raise RunError('stdout cannot be written; name a file with --output=FILE.json')


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, exit_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
