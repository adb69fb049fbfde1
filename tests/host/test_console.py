"""`zerojax NAME` is `python -m zerojax.NAME`."""

import importlib
import importlib.metadata
import re
import subprocess
import sys

import pytest
from shell import DIGITS, ROOT

import zerojax
from zerojax.host import console

MODULES = {
    name: 'zerojax.compare.__main__' if name == 'compare' else f'zerojax.{name}'
    for name in console.COMMANDS
}


def test_the_commands_are_those_of_the_package():
    files = [
        path
        for path in (ROOT / 'zerojax').rglob('*.py')
        if "__name__ == '__main__'" in path.read_text()
    ]
    assert {file.parent.name if file.stem == '__main__' else file.stem for file in files} == set(
        console.COMMANDS
    )


@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_has_a_line_for_each_command_and_needs_no_jax(flag, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'jax', None)
    assert console.main(['zerojax', flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith('  ')] == [
        *console.COMMANDS, 'zerojax',
    ]  # fmt: skip
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize('name,module', MODULES.items())
def test_the_help_of_a_command_names_it_as_it_was_called(name, module, capsys):
    documentation = importlib.import_module(module).__doc__
    assert console.main(['zerojax', name, '--help']) == 0
    said = capsys.readouterr().out
    assert f'\nzerojax {name} ' in said
    assert 'python -m' not in said
    words = documentation.replace('python -m zerojax.', 'zerojax ').split()
    assert said.split() == words
    # What goes on in a line of its own stands below the first argument, as in the docstring.
    began = f'zerojax {name} '
    for line, following in re.findall(rf'^({began}.*)\n( {{10,}})\S', said, re.M):
        assert len(following) == len(began), line


@pytest.mark.parametrize('name,module', MODULES.items())
@pytest.mark.parametrize('flags', [[], ['--nonsense'], [DIGITS, '--workdir=~nobody_of_this_name']])
def test_a_mistake_is_what_it_is_for_the_module(name, module, flags, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(module).main(['x', *flags]) == 2
    expected = capsys.readouterr()
    assert console.main(['zerojax', name, *flags]) == 2
    assert capsys.readouterr() == expected
    assert expected.err.startswith('error: ') and expected.err.count('\n') == 1


@pytest.mark.parametrize(
    'arguments,advice',
    [
        (['predcit'], "no command 'predcit', the nearest is predict;"),
        (['train'], "no command 'train', the nearest is main;"),
        (['com'], "no command 'com', the nearest is compile or compare;"),
        (['frob\n', 'main'], r"no command 'frob\n', must be one of main, sweep, audit, "),
        ([DIGITS], f'no command {DIGITS!r}, must be one of main, sweep, audit, '),
        (
            [],
            'names no command, must be one of main, sweep, audit, predict, compile, compare, ',
        ),
        ([''], 'names no command, must be one of main'),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(arguments, advice, capsys):
    assert console.main(['zerojax', *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ''
    assert said.err.startswith(f'error: command line: {advice}')
    assert said.err.endswith('; see zerojax --help\n') and said.err.count('\n') == 1


def test_the_script_is_installed_and_a_config_imports_what_is_beside_it(tmp_path):
    """As `python -m` has it; the folder of a script is not where the user is."""
    (script,) = importlib.metadata.entry_points(group='console_scripts', name='zerojax')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'steps.py').write_text('STEPS = 0\n')
    (tmp_path / 'mine' / 'config.py').write_text(
        'from zerojax.config import default_config\n'
        'from mine.steps import STEPS\n'
        'def get_config():\n'
        '    config = default_config()\n'
        '    config.num_steps = STEPS\n'
        '    config.dataset.name = "digits"\n'
        '    return config\n'
    )
    (tmp_path / 'bin').mkdir()
    installed = tmp_path / 'bin' / 'zerojax'
    installed.write_text(
        f'import sys\nfrom {script.module} import {script.attr}\nsys.exit({script.attr}())\n'
    )

    def run(*arguments):
        return subprocess.run(
            [sys.executable, installed, *arguments], cwd=tmp_path, capture_output=True, text=True
        )

    done = run('--version')
    assert (done.returncode, done.stdout) == (0, f'zerojax {zerojax.__version__}\n')
    done = run('main', '--config=mine/config.py')
    assert done.returncode == 2
    assert done.stderr.startswith('error: num_steps=0: must be from 1'), done.stderr
