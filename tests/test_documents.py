"""README and site: their Python runs, their commands parse, and the reference has what is public.

A block of Python that needs what is not here stands under `<!-- not run: REASON -->`; one that is a
command, under `<!-- arguments: FLAGS -->`, with which it is run here.
"""

import csv
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings

import pytest
from shell import ROOT, TOY, shell

import zerojax
from experiments import runs
from zerojax.run import cli

PAGES = sorted([ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')])
FENCE = re.compile(r'(?:<!-- ([a-z ]+): (.*?) -->\n)?^( *)```(\S*)\n(.*?)^ *```$', re.M | re.S)
QUICK = ('README.md', 'docs/howto/trackers.md')  # the others compile more

# What stands for what a reader chooses.
CHOICES = {
    'experiments.NAME': 'experiments.arms', '[:VARIANT]': '', 'NAME.py': 'digits.py',
    '=CONFIG': '=configs/digits.py', '$TARGET': 'cpu', '=TARGET': '=cpu', '=BATCH': '=128',
    'convolution=C': 'convolution=direct', 'gs://BUCKET/RUN': 'runs/x', ' FLAGS': '',
    '--config.FIELD=VALUE': '', '...': '', '[': '', ']': '',
}  # fmt: skip


def name_of(page):
    return str(page.relative_to(ROOT))


def python_blocks():
    for page in PAGES:
        for number, found in enumerate(FENCE.finditer(page.read_text()), 1):
            key, value, _, language, code = found.groups()
            if language == 'python' and key != 'not run':
                arguments = shlex.split(value) if key == 'arguments' else []
                marks = [] if name_of(page) in QUICK else [pytest.mark.slow]
                yield pytest.param(
                    code, arguments, id=f'{name_of(page)}, block {number}', marks=marks
                )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Where a reader may be: with the configs, and the run of the digits."""
    folder = tmp_path_factory.mktemp('reader')
    (folder / 'configs').symlink_to(ROOT / 'configs')
    done = shell(f'python -m zerojax.main {TOY} --workdir={folder}/runs/digits')
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(('code', 'arguments'), list(python_blocks()))
def test_python_runs_as_it_stands(folder, code, arguments):
    (folder / 'block.py').write_text(code)
    done = subprocess.run(
        [sys.executable, 'block.py', *arguments], cwd=folder, capture_output=True, text=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def commands():
    """(page, module, flags) of each `python -m` line in a block, fenced or indented."""
    for page in PAGES:
        text = page.read_text()
        fenced = [found[5] for found in FENCE.finditer(text) if found[4] != 'python']
        indented = re.findall(r'(?:^    .*\n)+', FENCE.sub('', text), re.M)
        for block in [*fenced, *indented]:
            for old, new in CHOICES.items():
                block = block.replace(old, new)
            lines = re.sub(r'\\\n', ' ', block)
            for module, rest in re.findall(
                r'python -m ((?:zerojax|experiments)\.[\w.]+)(.*)', lines
            ):
                yield name_of(page), module, flags_of(rest)


def flags_of(rest):
    """The words up to where the shell begins another command."""
    if rest.count('"') % 2:  # within a word of another command
        rest = rest.rpartition('"')[0]
    words = shlex.shlex(rest, posix=True, punctuation_chars=True)
    words.whitespace_split, words.commenters = True, '#'
    found = []
    for word in words:
        if set(word) <= set('();<>|&'):
            break
        found.append(word)
    return found


class Parsed(Exception):
    """The command line was understood, with all its fields."""


@pytest.mark.parametrize(
    ('module', 'flags'),
    [
        pytest.param(module, flags, id=f'{page}: {module} {shlex.join(flags)}')
        for page, module, flags in dict.fromkeys((p, m, tuple(f)) for p, m, f in commands())
    ],
)
def test_command_lines_parse(module, flags, monkeypatch, capsys):
    """Their module is there, and its own parser knows flags, fields and values."""
    depth = []

    def stops_once_parsed(parse):
        def wrapped(*args, **kwargs):
            depth.append(parse)
            found = parse(*args, **kwargs)
            depth.pop()
            if not depth:
                raise Parsed
            return found

        return wrapped

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, 'parse', stops_once_parsed(cli.parse))
    monkeypatch.setattr(cli, 'parse_flags', stops_once_parsed(cli.parse_flags))
    monkeypatch.setattr(sys, 'argv', [f'{module.split(".")[-1]}.py', *flags])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # it may have been imported before
        try:
            runpy.run_module(module, run_name='__main__')
        except Parsed:
            return
        except SystemExit:
            pytest.fail(capsys.readouterr().err)
    pytest.fail('it parsed nothing')


def test_there_are_commands_to_parse():
    assert len(list(commands())) > 60


def test_commands_that_are_named_in_passing_exist():
    for page in PAGES:
        for name in re.findall(r'python -m ((?:zerojax|experiments)[\w.]*\w)', page.read_text()):
            assert name.endswith('.NAME') or importlib.util.find_spec(name), f'{page}: {name}'


def test_tables_are_those_that_commands_wrote():
    """One of docs/tables whose columns stand in a document stands there whole."""
    texts = [page.read_text() for page in PAGES]
    shown = set()
    for file in (ROOT / 'docs' / 'tables').glob('*.csv'):
        with open(file, newline='') as text:
            table = runs.markdown(list(csv.DictReader(text)))
        columns = table.splitlines()[0]
        if any(columns in text for text in texts):
            assert any(f'{table}\n\n' in text for text in texts), file.name
            shown.add(file.stem)
    assert {
        'architectures', 'arms', 'cifar_arms', 'contrast', 'diversity', 'diversity_cifar',
        'fashion_mnist_arms', 'hardware', 'leakynet', 'lottery', 'onset', 'signal', 'streams',
        'threshold', 'timing', 'unique_features',
    } <= shown  # fmt: skip


def test_each_public_module_is_in_the_reference_once():
    text = ''.join(page.read_text() for page in (ROOT / 'docs' / 'reference').glob('*.md'))
    headings = re.findall(r'^## `zerojax\.(\w+)`', text, re.M)
    for name in zerojax.__all__:
        assert headings.count(name) == 1, name


def test_the_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 120


def test_the_notebook_holds_no_outputs_and_installs_first():
    cells = json.loads((ROOT / 'docs' / 'tutorial.ipynb').read_text())['cells']
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    assert not any(cell['outputs'] or cell['execution_count'] for cell in code)
    assert ''.join(code[0]['source']).startswith('%pip install')
    tagged = [cell for cell in code if 'skip-execution' in cell['metadata'].get('tags', [])]
    assert tagged == code[:1]


def test_the_readme_links_to_files_that_are_there():
    """Those of the site are checked by its build."""
    for target in re.findall(r'\]\(([^)#]+)[^)]*\)', (ROOT / 'README.md').read_text()):
        assert (ROOT / target).exists(), target
