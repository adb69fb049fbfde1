"""A command in whatever surroundings: it trains as in any other, or says in one line why it cannot.

Streams that are closed, full or left by their reader, figures that cannot be drawn, locales, and
environment variables of JAX.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from zerojax import predict
from zerojax.host import figures

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
DIGITS = f'--config={ROOT}/configs/digits.py'
TOY = (
    f'{DIGITS} --config.num_steps=4 --config.model.name=mlp --config.model.init=averaging '
    '--config.model.width=8 --config.model.convolution=direct --config.eval_every_steps=2'
)


def shell(command, **variables):
    """A command line of bash, as a user has it, with one device."""
    environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | variables
    command = command.replace('python', sys.executable, 1)
    return subprocess.run(
        ['bash', '-c', f'set -o pipefail; {command}'],
        capture_output=True, cwd=ROOT, env=environment, errors='replace', timeout=300,
    )  # fmt: skip


def files(workdir):
    return {
        str(x.relative_to(workdir)) for x in workdir.rglob('*')
        if '/d/' not in str(x) and 'ocdbt' not in str(x) and 'tfevents' not in x.name
    }  # fmt: skip


def sha256(workdir):
    return json.loads((workdir / 'summary.json').read_text())['params_sha256']


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    done = shell(f'python -m zerojax.main {TOY} --workdir={workdir}')
    assert (done.returncode, done.stderr) == (0, '')
    accuracy, broken, where = done.stdout.splitlines()[-3:]
    numbers = r'accuracy 0\.\d{4} after step 4, best 0\.\d{4}; asymmetry 0\.000\d+'
    assert re.fullmatch(numbers, accuracy)
    assert broken == 'symmetry broke: hidden at step 0'
    assert where == f'{workdir}/summary.json, figures/run.png'
    return workdir


def whole(workdir, undisturbed, *, drawn=True):
    """All that a run leaves is there, and is what it is of a run that nobody disturbed."""
    left_out = set() if drawn else {'figures', 'figures/run.png'}
    assert files(workdir) == files(undisturbed) - left_out
    assert sha256(workdir) == sha256(undisturbed)
    metrics = 'metrics.jsonl'
    assert (workdir / metrics).read_bytes() == (undisturbed / metrics).read_bytes()


def test_a_run_that_is_finished_says_once_more_what_came_of_it(undisturbed):
    done = shell(f'python -m zerojax.main {TOY} --workdir={undisturbed}')
    assert (done.returncode, done.stderr) == (0, '')
    resuming, accuracy, broken, where = done.stdout.splitlines()
    assert resuming == f'RESUMING at step 4 of 4 in {undisturbed}'
    assert accuracy.startswith('accuracy 0.')
    assert broken == 'symmetry broke: hidden at step 0'
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
    if drawn is False and shell('latex --version', **variables).returncode == 0:
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


@pytest.mark.parametrize(
    'variables',
    [
        {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
        {'PYTHONIOENCODING': 'ascii'},
        {'PYTHONIOENCODING': 'utf-16'},
        {'LC_ALL': 'nowhere.UTF-8', 'LANG': 'nonsense'},
        {'TERM': 'dumb', 'COLUMNS': '3'},
        {'PYTHONWARNINGS': 'error::BytesWarning', 'PYTHONUNBUFFERED': '1'},
    ],
)
def test_a_locale_that_lacks_a_character_is_no_matter(undisturbed, tmp_path, variables):
    workdir = tmp_path / 'Lauf ± 1'
    done = shell(f'python -m zerojax.main {TOY} "--workdir={workdir}"', **variables)
    assert (done.returncode, done.stderr) == (0, '')
    whole(workdir, undisturbed)


WORKS, REFUSED, OTHER_BITS = (
    'the same weights',
    'refused',
    'other weights, of which config or manifest tell',
)


@pytest.mark.parametrize(
    'variable,outcome',
    [
        ('JAX_DISABLE_JIT=1', REFUSED), ('JAX_NO_TRACING=1', REFUSED),
        ('JAX_PLATFORMS=cuda', REFUSED), ('JAX_PLATFORMS=nonsense', REFUSED),
        ('JAX_PLATFORM_NAME=gpu', REFUSED), ('JAX_PLATFORMS=cpu', WORKS),
        ('JAX_TRANSFER_GUARD=disallow', REFUSED),
        ('JAX_TRANSFER_GUARD=disallow_explicit', REFUSED),
        ('XLA_FLAGS=--nonsense', REFUSED), ('XLA_FLAGS=--xla_nonsense=1 --xla_dump_to=', REFUSED),
        ('XLA_FLAGS=nonsense', REFUSED), ('XLA_FLAGS=--xla_backend_optimization_level=x', REFUSED),
        ('XLA_FLAGS=--xla_backend_optimization_level=0', OTHER_BITS),
        ('XLA_FLAGS=--xla_force_host_platform_device_count=2', WORKS),
        ('JAX_ENABLE_X64=maybe', REFUSED), ('JAX_ENABLE_X64=1', WORKS),
        ('JAX_DEFAULT_MATMUL_PRECISION=nonsense', REFUSED),
        ('JAX_DEFAULT_MATMUL_PRECISION=highest', WORKS),
        ('JAX_DEFAULT_MATMUL_PRECISION=bfloat16', WORKS),
        ('JAX_DEBUG_NANS=1', WORKS), ('JAX_DEBUG_INFS=1', WORKS),
        ('JAX_CHECK_TRACER_LEAKS=1', WORKS), ('JAX_DEBUG_KEY_REUSE=1', WORKS),
        ('JAX_ENABLE_CHECKS=1', WORKS), ('JAX_LOG_COMPILES=1', WORKS),
        ('JAX_EXPLAIN_CACHE_MISSES=1', WORKS), ('JAX_TRACEBACK_FILTERING=off', WORKS),
        ('JAX_NUMPY_RANK_PROMOTION=raise', WORKS), ('JAX_NUMPY_DTYPE_PROMOTION=strict', WORKS),
        ('JAX_TRANSFER_GUARD=log', WORKS), ('JAX_NUM_CPU_DEVICES=3', WORKS),
        ('JAX_CPU_ENABLE_ASYNC_DISPATCH=0', WORKS),
        ('JAX_COMPILATION_CACHE_DIR=/proc/none', WORKS),
        ('JAX_THREEFRY_PARTITIONABLE=0', OTHER_BITS), ('JAX_DEFAULT_PRNG_IMPL=rbg', OTHER_BITS),
        ('JAX_RANDOM_SEED_OFFSET=3', OTHER_BITS),
        ('JAX_DISABLE_MOST_OPTIMIZATIONS=1', OTHER_BITS),
    ],
)  # fmt: skip
def test_a_variable_of_jax_changes_nothing_unseen(undisturbed, tmp_path, variable, outcome):
    name, _, value = variable.partition('=')
    workdir = tmp_path / 'run'
    done = shell(f'python -m zerojax.main {TOY} --workdir={workdir}', **{name: value})
    if outcome == REFUSED:
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
        assert name in done.stderr
        assert not workdir.exists()
        return
    assert done.returncode == 0, done.stderr
    if outcome == WORKS:
        whole(workdir, undisturbed)
        return
    assert files(workdir) == files(undisturbed)
    settings, usual = (
        json.loads((folder / 'manifest.json').read_text())['settings']
        for folder in (workdir, undisturbed)
    )
    assert settings != usual
    resumed = shell(f'python -m zerojax.main {TOY} --workdir={workdir}')
    assert resumed.returncode == 2
    assert f'was started with {name}=' in resumed.stderr


@pytest.fixture(scope='module')
def other(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('other') / 'run'
    done = shell(f'python -m zerojax.main {TOY} --config.seed=1 --workdir={workdir}')
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize(
    'streams,status,output,complaint',
    [
        ('', 0, '±', ''), ('| head -1', 0, 'Newest', ''), ('2>&-', 0, '±', ''),
        ('> /dev/full', 1, '', 'error: stdout cannot be written; name a file with --output='),
        ('--output=/tmp/zerojax.json > /dev/full; rm /tmp/zerojax.json', 0, '', ''),
    ],
)  # fmt: skip
def test_a_comparison_is_read_to_its_end_or_not(
    undisturbed, other, streams, status, output, complaint
):
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


def test_a_figure_is_drawn_for_one_thread_at_a_time(tmp_path):
    assert figures.try_to_draw(tmp_path, lambda: figures._DRAWING.locked())
