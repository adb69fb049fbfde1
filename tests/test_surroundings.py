"""A command in whatever surroundings: it trains as in any other, or says in one line why it cannot.

Streams that are closed, full or left by their reader, figures that cannot be drawn, and locales.
"""

import re
import shutil

import pytest
from shell import TOY, shell, whole

from zerojax import predict

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    done = shell(f'python -m zerojax.main {TOY} --workdir={workdir}')
    assert (done.returncode, done.stderr) == (0, '')
    accuracy, broken, where = done.stdout.splitlines()[-3:]
    numbers = r'held-out accuracy 0\.\d{4} after step 4, best 0\.\d{4}; asymmetry 0\.000\d+'
    assert re.fullmatch(numbers, accuracy)
    assert broken == 'symmetry broken: at step 0 (hidden)'
    assert where == f'{workdir}/summary.json, figures/run.png'
    return workdir


def test_a_run_that_is_finished_says_once_more_what_came_of_it(undisturbed):
    done = shell(f'python -m zerojax.main {TOY} --workdir={undisturbed}')
    assert (done.returncode, done.stderr) == (0, '')
    resuming, accuracy, broken, where = done.stdout.splitlines()
    assert resuming == f'RESUMING at step 4 of 4 in {undisturbed}'
    assert accuracy.startswith('held-out accuracy 0.')
    assert broken == 'symmetry broken: at step 0 (hidden)'
    assert where == f'{undisturbed}/summary.json, figures/run.png'


@pytest.mark.parametrize(
    'streams',
    ['2>&-', '>&-', '>&- 2>&-', '<&- >&- 2>&-', '| head -1', '2>&1 | head -1', '| true',
     '> /dev/full', '2> /dev/full', '> /dev/full 2>&1'],
)  # fmt: skip
def test_no_stream_ends_a_run(undisturbed, tmp_path, streams):
    done = shell(f'python -m zerojax.main {TOY} --workdir={tmp_path}/run {streams}')
    assert done.returncode == 0, done.stderr
    if '2>&1' not in streams:
        assert done.stderr == ''
    whole(tmp_path / 'run', undisturbed)


@pytest.mark.parametrize('streams', ['2>&-', '2> /dev/full', '| head -1'])
def test_nor_does_it_change_the_status_of_a_mistake(tmp_path, streams):
    flags = f'{TOY} --config.batch_size=0 --workdir={tmp_path}/run'
    assert shell(f'python -m zerojax.main {flags} {streams}').returncode == 2
    assert shell(f'python -m zerojax.main --help {streams}').returncode == 0
    assert not (tmp_path / 'run').exists()


LATEX, FONT = 'text.usetex: True\n', 'font.family: No Such Font\n'


@pytest.mark.parametrize(
    'matplotlibrc,variables,drawn',
    [
        (LATEX, {'PATH': '/usr/bin:/bin'}, False),
        (LATEX, {'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C', 'PATH': '/bin'}, False),
        (FONT, {}, True),
        ('', {'MPLBACKEND': 'nonsense'}, True),
        ('', {'MPLBACKEND': 'module://nowhere'}, True),
        ('no such: key\nbackend: nonsense\n', {}, True),
        ('', {'MPLCONFIGDIR': '/proc/nowhere'}, True),
        ('', {'MPLCONFIGDIR': '/proc/nowhere', 'TMPDIR': '/proc/nowhere'}, None),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_a_line(
    undisturbed, tmp_path, matplotlibrc, variables, drawn
):
    if drawn is False and shutil.which('latex', path=variables['PATH']):
        pytest.skip('LaTeX is there')
    (tmp_path / 'matplotlibrc').write_text(matplotlibrc)
    variables = {'MATPLOTLIBRC': str(tmp_path / 'matplotlibrc')} | variables
    done = shell(f'python -m zerojax.main {TOY} --workdir={tmp_path}/run', **variables)
    assert done.returncode == 0, done.stderr
    if drawn is None:
        drawn = not done.stderr
    line = '' if drawn else f'note: {tmp_path}/run/figures/run.png could not be drawn ('
    assert done.stderr.startswith(line)
    assert done.stderr.count('\n') == (not drawn), done.stderr
    whole(tmp_path / 'run', undisturbed, drawn=drawn)
    assert done.stdout.splitlines()[-1].endswith('run.png' if drawn else 'summary.json')


ASCII = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}


@pytest.mark.parametrize(
    'variables,name',
    [
        (ASCII, 'run'),
        ({'PYTHONIOENCODING': 'ascii'}, 'Lauf ± 1'),
        ({'PYTHONIOENCODING': 'utf-16'}, 'Lauf ± 1'),
        ({'LC_ALL': 'nowhere.UTF-8', 'LANG': 'nonsense'}, 'Lauf ± 1'),
        ({'TERM': 'dumb', 'COLUMNS': '3'}, 'run'),
    ],
)
def test_a_locale_that_lacks_a_character_is_no_matter(undisturbed, tmp_path, variables, name):
    done = shell(f'python -m zerojax.main {TOY} --workdir="{tmp_path}/{name}"', **variables)
    assert (done.returncode, done.stderr) == (0, '')
    whole(tmp_path / name, undisturbed)


def test_a_name_that_the_locale_cannot_read_is_refused(tmp_path):
    done = shell(f'python -m zerojax.main {TOY} --workdir={tmp_path}/±', **ASCII)
    assert done.returncode == 2
    assert done.stderr.endswith('holds bytes that are no text here; name another path\n')
    assert done.stderr.count('\n') == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def other(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('other') / 'run'
    done = shell(f'python -m zerojax.main {TOY} --config.seed=1 --workdir={workdir}')
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize('command', ['compare {0} {1}', 'convert to-torch x --workdir={0}'])
@pytest.mark.parametrize('variable', ['JAX_PLATFORMS=cuda', 'JAX_DISABLE_JIT=1'])
def test_a_device_that_is_missing_is_no_damage_to_a_run(undisturbed, other, command, variable):
    name, _, value = variable.partition('=')
    command = command.format(undisturbed, other)
    done = shell(f'python -m zerojax.{command}', **{name: value})
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: {name}=') and done.stderr.count('\n') == 1


@pytest.mark.parametrize(
    'streams,status,output,complaint',
    [
        ('', 0, '±', ''), ('| head -1', 0, 'Newest', ''), ('2>&-', 0, '±', ''),
        ('> /dev/full', 1, '', 'error: stdout cannot be written; name a file with --output='),
        ('--output={tmp}/found.json > /dev/full', 0, '', ''),
    ],
)  # fmt: skip
def test_a_comparison_is_read_to_its_end_or_not(
    undisturbed, other, tmp_path, streams, status, output, complaint
):
    streams = streams.format(tmp=tmp_path)
    done = shell(f'python -m zerojax.compare {undisturbed} {other} {streams}')
    assert done.returncode == status, done.stderr
    assert output in done.stdout
    assert done.stderr.startswith(complaint) and done.stderr.count('\n') == bool(complaint)


def test_a_comparison_in_ascii(undisturbed, other):
    done = shell(f'python -m zerojax.compare {undisturbed} {other}', PYTHONIOENCODING='ascii')
    assert (done.returncode, done.stderr) == (0, '')
    assert '\\xb1' in done.stdout


@pytest.mark.parametrize('streams', ['>&- 2>&-', '| head -1', '> /dev/full'])
def test_a_sweep_is_whole_whoever_reads(tmp_path, streams):
    done = shell(f'python -m zerojax.sweep {TOY} --seeds=2 --workdir={tmp_path} {streams}')
    assert (done.returncode, done.stderr) == (0, '')
    assert (tmp_path / 'sweep.csv').read_text().count('\n') == 3


def test_a_prediction_without_its_figure_is_whole(tmp_path, monkeypatch, capsys):
    def failing(*_):
        raise RuntimeError('latex could not be found\nand more')

    monkeypatch.setattr(predict, 'draw', failing)
    flags = [*TOY.split(), '--steps=3', '--seeds=1', f'--workdir={tmp_path}']
    assert predict.main(['predict', *flags]) == 0
    printed = capsys.readouterr()
    note = f'note: {tmp_path}/figures/predict.png could not be drawn (RuntimeError: latex could not'
    assert printed.err == f'{note} be found)\n'
    assert printed.out.endswith(f'{tmp_path}/predict.json\n')
    assert {path.name for path in tmp_path.iterdir()} == {'predict.json'}
