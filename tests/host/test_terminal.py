"""Whatever reads what is printed, or does not, ends nothing."""

import ast
import errno
import io
import pathlib
import subprocess
import sys

import pytest

from zerojax.host import progress, terminal

ROOT = pathlib.Path(__file__).parents[2]


class Nothing:
    """A stream without a single method of one."""


class WriteAlone:
    def __init__(self):
        self.written = ''

    def write(self, text):
        self.written += text


class Raising:
    """A terminal of which everything fails, in a way that nobody expects."""

    encoding = 'no such encoding'

    def isatty(self):
        return True

    def write(self, text):
        raise RuntimeError(text)

    flush = fileno = write


class Nameless:
    """A stream of which no name can even be asked for."""

    def __getattribute__(self, name):
        raise RuntimeError(name)


class Gone(io.StringIO):
    """The reader has left, as `head` does."""

    def write(self, text):
        raise BrokenPipeError


class Full(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, 'No space left on device')


class Terminal(io.StringIO):
    def isatty(self):
        return True


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


ODD = {
    'none': lambda: None,
    'closed': closed,
    'nothing': Nothing,
    'write alone': WriteAlone,
    'raising': Raising,
    'nameless': Nameless,
    'gone': Gone,
    'full': Full,
    'ascii': lambda: io.TextIOWrapper(io.BytesIO(), encoding='ascii'),
}


def show_everything():
    with progress.Progress(10) as bar:
        bar.advance(3)
        bar.show(loss=1.0)
        bar.say('über ± \udc80')
        bar.start_clock()
        bar.skip(2)
        bar.evaluated('step 5', loss=0.5)


@pytest.mark.parametrize('name', ODD)
@pytest.mark.parametrize('which', ['stdout', 'stderr', 'both'])
def test_no_stream_ends_what_is_shown_on_it(monkeypatch, name, which):
    for each in ('stdout', 'stderr') if which == 'both' else (which,):
        monkeypatch.setattr(sys, each, ODD[name]())
    show_everything()
    terminal.say('über')
    terminal.complain('über')
    terminal.let_broken_streams_go()


# tqdm flushes stdout, too
@pytest.mark.parametrize('other', sorted(ODD.keys() - {'raising', 'nameless'}))
def test_a_bar_on_a_terminal_goes_with_any_other_stream(monkeypatch, other):
    """`python -m zerojax.main | head -1`, typed at a terminal."""
    shown = Terminal()
    monkeypatch.setattr(sys, 'stdout', ODD[other]())
    monkeypatch.setattr(sys, 'stderr', shown)
    monkeypatch.setattr(progress.Bar, 'monitor_interval', 0)
    show_everything()
    assert '5/10' in shown.getvalue()
    monkeypatch.undo()


@pytest.mark.parametrize(
    'encoding,expected',
    [
        ('ascii', 'a\\xb1\\u2028\\udc80'),
        ('latin-1', 'a±\\u2028\\udc80'),
        ('utf-8', 'a±\u2028\\udc80'),
    ],
)
def test_a_character_that_a_stream_does_not_know_is_spelled(monkeypatch, encoding, expected):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, 'stdout', stream)
    assert terminal.say('a±\u2028\udc80')
    assert stream.buffer.getvalue().decode(encoding) == expected + '\n'


def test_it_is_told_whether_anybody_could_read_it(monkeypatch):
    for name, told in {'gone': True, 'full': False, 'none': False, 'closed': False}.items():
        stream = ODD[name]()
        monkeypatch.setattr(sys, 'stdout', stream)
        assert terminal.say('result') == told, name
        terminal.let_broken_streams_go()


def test_a_complaint_is_one_printable_line(capsys):
    terminal.complain('a\nb\r\u2028\x1b[31m')
    assert capsys.readouterr().err == 'a\\nb\\r\\u2028\\x1b[31m\n'


@pytest.mark.parametrize('closed', ['0', '1', '2', '12', '012'])
def test_no_file_takes_the_place_of_a_stream_that_was_closed(tmp_path, closed):
    """Else libraries, and children, would print into it."""
    code = (
        'import os, subprocess, sys\n'
        'from zerojax.host import terminal\n'
        'terminal.open_closed_streams()\n'
        f'file = open({str(tmp_path / "file")!r}, "w")\n'
        'assert file.fileno() > 2, file.fileno()\n'
        'for number in (1, 2): os.write(number, b"from a library\\n")\n'
        'print("from here"); print("from here", file=sys.stderr)\n'
        'child = "import sys; sys.stdin.read(); print(1); print(2, file=sys.stderr)"\n'
        'subprocess.run([sys.executable, "-c", child], check=True)\n'
        'file.write("whole"); file.close()\n'
    )
    shell = 'exec "$0" -c "$1" ' + ' '.join(f'{number}>&-' for number in closed)
    subprocess.run(
        ['bash', '-c', shell, sys.executable, code], check=True, cwd=ROOT,
        stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip
    assert (tmp_path / 'file').read_text() == 'whole'


def test_all_that_is_printed_goes_through_here():
    """But for what a test of ours or a user's own program prints."""
    printing = {
        str(path.relative_to(ROOT))
        for room in ('zerojax', 'experiments')
        for path in (ROOT / room).rglob('*.py')
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ('print', 'sys.stderr.write')
    }
    assert printing == {'experiments/own_model.py'}


NOTEBOOK = """
import sys, types
for name in ('ipykernel', 'ipykernel.zmqshell', 'IPython', 'IPython.display', *{more!r}):
    sys.modules[name] = types.ModuleType(name)
sys.modules['IPython'].get_ipython = lambda: object()
displayed = []
sys.modules['IPython.display'].display = displayed.append
class Widget:
    def __init__(self, children=(), **values):
        self.children, self.layout = children, types.SimpleNamespace()
        self.style = types.SimpleNamespace()
        vars(self).update(values)
    def close(self): pass
if 'ipywidgets' in sys.modules:
    for name in ('FloatProgress', 'HBox', 'HTML'): setattr(sys.modules['ipywidgets'], name, Widget)
from zerojax.host import progress
with progress.Progress(10) as bar:
    bar.advance(7); bar.show(loss=1.0); bar.say('a line'); bar.start_clock(); bar.advance(3)
print(progress.IN_NOTEBOOK, [each.children[1].value for each in displayed])
"""


@pytest.mark.parametrize(
    'more,expected',
    [((), 'a line\nFalse []\n'), (('ipywidgets',), 'a line\nTrue [10]\n')],
    ids=['without ipywidgets', 'with ipywidgets'],
)
def test_a_notebook_has_a_widget_or_lines_and_no_warning(more, expected):
    done = subprocess.run(
        [sys.executable, '-W', 'always', '-c', NOTEBOOK.format(more=more)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, '')
