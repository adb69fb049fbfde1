"""Imports run one way, and no two rooms or files import one another in a circle."""

import ast
import graphlib
import pathlib
import re

from zerojax import _ROOMS

ROOT = pathlib.Path(__file__).parents[1] / 'zerojax'
MODULES = {
    '.'.join(['zerojax', *path.relative_to(ROOT).with_suffix('').parts]).removesuffix(
        '.__init__'
    ): path
    for path in ROOT.rglob('*.py')
}
SCIENCE = {'symmetry', 'models', 'step', 'measure', 'perturb'}
GENERAL = SCIENCE - {'models'}  # works on any model


def imported(path):
    """The modules of zerojax that a file imports, but for type checkers."""
    tree = ast.parse(path.read_text())
    unseen = {
        id(each)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'
        for each in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: a relative import'
            found |= {node.module, *(f'{node.module}.{each.name}' for each in node.names)}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
    # `from zerojax import train` is loaded from its room when asked for.
    found |= {
        f'zerojax.{room}.{name}' for name, room in _ROOMS.items() if f'zerojax.{name}' in found
    }
    # `from zerojax.run import train` needs the file, not the room.
    inner = found & MODULES.keys()
    return {x for x in inner if not any(y.startswith(f'{x}.') for y in inner)} - {'zerojax'}


GRAPH = {name: imported(path) for name, path in MODULES.items()}


def room(name):
    return name.split('.')[1] if '.' in name else ''


def test_science_knows_no_config_file_or_flag():
    strangers = {
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if room(name) in SCIENCE and room(other) not in SCIENCE
    }
    assert not strangers


def test_what_works_on_any_model_knows_no_network():
    strangers = [
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if room(name) in GENERAL and room(other) == 'models'
    ]
    assert not strangers


def test_no_circles():
    graphlib.TopologicalSorter(GRAPH).prepare()
    rooms = {}
    for name, others in GRAPH.items():
        rooms.setdefault(room(name), set()).update(map(room, others))
    for name, others in rooms.items():
        others.discard(name)
    graphlib.TopologicalSorter(rooms).prepare()


def test_the_front_shows_the_plan():
    """Few enough entries that one glance is enough; the README's map has these and no others."""
    entries = {x.name for x in ROOT.iterdir() if x.name not in ('__pycache__', 'py.typed')}
    assert len(entries) <= 17
    readme = (ROOT.parent / 'README.md').read_text()
    drawn = re.search(r'## Layout\n\n```\nzerojax/\n(.*?)^\S', readme, re.M | re.S)[1]
    names = re.findall(r'^  (\S+(?:, \S+)*)  ', drawn, re.M)
    assert {name.strip('/') for each in names for name in each.split(', ')} == entries


def test_test_files_are_found_by_pytest_and_by_ci():
    """They are imported by their names alone, and those of PyTorch are run by their mark."""
    files = list((ROOT.parent / 'tests').rglob('test_*.py'))
    names = [file.name for file in files]
    assert len(set(names)) == len(names)
    for file in files:
        text = file.read_text()
        if "importorskip('torch')" in text and file != pathlib.Path(__file__):
            assert 'pytestmark = pytest.mark.torch' in text, file
