"""A path is where the user means it, and what is wrong with one is said by its real cause."""

import contextlib
import os
import pathlib
import tempfile

import pytest

from zerojax.compare.saved_runs import read_run
from zerojax.host import paths
from zerojax.host.errors import UsageError
from zerojax.host.workdir import lock


@contextlib.contextmanager
def as_nobody():
    """Root may enter any folder."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'home'


@pytest.mark.parametrize(
    'text,expected',
    [
        ('~', '{}/home'), ('~/', '{}/home'), ('~/a b/c/', '{}/home/a b/c'), ('x/', 'x'),
        ('./~', '{}/~'), ('./~x/y', '{}/~x/y'), ('x/~/y', 'x/~/y'), (' x', ' x'),
        ('$HOME/x', '$HOME/x'), ('~root', os.path.expanduser('~root')), ('a~', 'a~'),
        ('a:b', 'a:b'), ('../x', '../x'),
    ],
)  # fmt: skip
def test_home_alone_is_put_in_place_of_a_tilde(home, text, expected):
    found = paths.meant(text, 'here')
    assert str(found) == expected.format(home.parent)
    assert paths.meant(found, 'here') == found, 'meant once and for all'


@pytest.mark.parametrize(
    'text,message',
    [
        ('', 'is empty'), ('file:///x', 'not a URL'), ('gs://a/b', 'not a URL'),
        ('http://x', 'not a URL'), (pathlib.Path('file:///x'), 'not a URL'),
        ('~nobody_of_this_name/x', '~nobody_of_this_name is nobody'), ('a\0b', 'null character'),
        ('a\udcff', 'no text'),
    ],
)  # fmt: skip
def test_what_is_no_path_is_refused(home, text, message):
    with pytest.raises(UsageError, match=f'^--workdir=x: .*{message}') as error:
        paths.meant(text, '--workdir=x')
    assert '\n' not in str(error.value)


@pytest.fixture
def tree(tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'folder' / 'in').mkdir(parents=True)
    (tmp_path / 'locked' / 'in').mkdir(parents=True)
    (tmp_path / 'dangling').symlink_to('nowhere')
    (tmp_path / 'link').symlink_to('folder')
    (tmp_path / 'loop').symlink_to('loop')
    for folder in (tmp_path, *tmp_path.parents):  # pytest's own, in which nobody else may look
        if tempfile.gettempdir() in map(str, folder.parents):
            folder.chmod(0o755)
    (tmp_path / 'folder').chmod(0o555)
    (tmp_path / 'locked').chmod(0)
    with as_nobody():
        yield tmp_path
    (tmp_path / 'folder').chmod(0o755)
    (tmp_path / 'locked').chmod(0o755)


OBSTACLES = {
    'file': 'file is a file',
    'file/': 'file is a file',
    'file/x/y': 'file is a file',
    'dangling': 'dangling is a link to nowhere, which does not exist',
    'dangling/x': 'dangling is a link to nowhere, which does not exist',
    'loop': 'loop: Too many levels of symbolic links',
    'locked/in': 'locked: permission denied',
    'locked/new/x': 'locked: permission denied',
}
IF_IT_MUST_EXIST = {
    'nowhere/x': 'there is no folder .*nowhere',
    'locked': 'locked: permission denied',
}


@pytest.mark.parametrize('path', OBSTACLES | IF_IT_MUST_EXIST)
def test_an_obstacle_is_said_to_be_what_it_is(tree, path):
    reason = OBSTACLES.get(path)
    if reason:
        with pytest.raises(UsageError, match=rf'^where: cannot be written \(.*{reason}\); name'):
            paths.to_write(tree / path, 'where')
    else:
        reason = IF_IT_MUST_EXIST[path]
        assert paths.to_write(tree / path, 'where') == tree / path
    with pytest.raises(UsageError, match=f'{path.strip("/")}: not a folder, .*{reason}; name the'):
        read_run(tree / path)


@pytest.mark.parametrize('path', ['folder', 'folder/in', 'link/in/', 'folder/../folder'])
def test_what_is_a_folder_is_none(tree, path):
    assert paths.why_no_folder(tree / path, must_exist=True) is None


def test_a_folder_that_may_not_be_written_is_said_to_be_so(tree):
    for path in ('folder', 'folder/new', 'locked'):
        with pytest.raises(UsageError, match=r'cannot be written \(Permission denied\)'):
            lock(tree / path)


def test_a_folder_stays_where_it_was_when_the_program_goes_elsewhere(home, monkeypatch):
    home.mkdir()
    found = paths.to_write('x', 'here')
    assert paths.shown(found) == pathlib.Path('x')
    monkeypatch.chdir(home)
    assert found == home.parent / 'x'
    assert paths.shown(found) == found
