"""The command `zerojax`: what `python -m zerojax.NAME` does, as `zerojax NAME`."""

import difflib
import importlib
import sys

from zerojax import __version__
from zerojax.host import terminal

COMMANDS = {
    'main': 'trains one config, or goes on where it was stopped',
    'sweep': 'trains many: a grid over any fields, with as few compilations as there are programs',
    'audit': "measures whether this machine's kernels repeat, and keep equal features equal",
    'predict': 'says when a run would begin to learn, and which streams would break',
    'compile': "compiles a run's step for devices that are not here, and says whether it fits",
    'compare': 'says where two runs part, how far they end, and what several gain together',
    'convert': "takes weights of the paper's PyTorch code in and out",
}
HELP = '\n'.join(
    [
        'zerojax COMMAND [FLAGS ...]',
        '',
        *(f'  {name:<9}{line}' for name, line in COMMANDS.items()),
        '',
        '`zerojax COMMAND --help` has the flags of each; `zerojax --version`. To begin with:',
        '',
        '  zerojax main --config=zerojax:digits',
    ]
)


def console() -> int:
    """The command line of this process; its exit status."""
    if not sys.flags.safe_path:
        sys.path[0] = ''  # as `python -m` has it: a config may import what is beside it
    return main(sys.argv)


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    name = argv[1] if len(argv) > 1 else ''
    if name in COMMANDS:
        package = f'zerojax.{name}'
        module = importlib.import_module(f'{package}.__main__' if name == 'compare' else package)
        return module.main([f'zerojax {name}', *argv[2:]])
    terminal.open_closed_streams()
    try:
        if name in ('-h', '--help'):
            terminal.say(HELP)
            return 0
        if name == '--version':
            terminal.say(f'zerojax {__version__}')
            return 0
        terminal.complain(f'error: command line: {_why_not(name)}; see zerojax --help')
        return 2
    finally:
        terminal.let_broken_streams_go()


def _why_not(name: str) -> str:
    if near := difflib.get_close_matches(name, COMMANDS):
        return f'no command {name!r}, the nearest is {" or ".join(near)}'
    problem = f'no command {name!r}' if name else 'names no command'
    return f'{problem}, must be one of {", ".join(COMMANDS)}'
