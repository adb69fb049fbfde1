"""Paths as users mean them, and what is wrong with one, by its real cause."""

import contextlib
import os
import pathlib
import re
import stat

from zerojax.host.errors import UsageError

_EFFECTIVE = os.access in os.supports_effective_ids
URL = re.compile(r'[a-zA-Z][a-zA-Z0-9+.-]+:/')  # also as pathlib spells it, with one slash


def meant(path: str | os.PathLike[str], where: str) -> pathlib.Path:
    """The path, '~' and '~USER' at its beginning being homes: no shell replaces them behind a '='.

    Args:
        path: what a user gave.
        where: flag or field and value, which a message begins with.

    Raises:
        UsageError: it is empty, as of a variable that is not set, no path, a URL, not text in the
            locale's encoding, or there is no such user.
    """
    text = os.fspath(path)
    if not text:
        raise UsageError(f'{where}: is empty; name a path')
    if '\0' in text:
        raise UsageError(f'{where}: no path has a null character')
    if URL.match(text):
        raise UsageError(f'{where}: must be a path of a file system, not a URL')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Orbax and TensorStore take no such name
        raise UsageError(
            f'{where}: holds bytes that are no text here; name another path'
        ) from error
    found = pathlib.Path(os.path.expanduser(text))
    if not str(found).startswith('~'):
        return found
    if not text.startswith('~'):
        return found.absolute()  # ./~ is no home, however often it is asked
    user = text.partition('/')[0]
    raise UsageError(f'{where}: {user} is nobody; a folder of that name is ./{user}')


def to_write(path: str | os.PathLike[str], where: str) -> pathlib.Path:
    """`meant`, of a folder; absolute, so that it stays what it is if the working directory changes.

    Raises:
        UsageError: as `meant`, or nothing there is a folder or can become one.
    """
    found = meant(path, where)
    obstacle = why_no_folder(found)
    if obstacle:
        raise UsageError(f'{where}: cannot be written ({obstacle}); name another folder')
    return found.absolute()


def shown(path: pathlib.Path) -> pathlib.Path:
    """What is shorter to read of a path in the working directory."""
    with contextlib.suppress(OSError, ValueError):
        return path.relative_to(pathlib.Path.cwd())
    return path


def why_no_folder(path: pathlib.Path, *, must_exist: bool = False) -> str | None:
    """What on the way to a folder is in the way, from the root on; None if nothing is.

    If it `must_exist`, also whether it does and can be read.
    """
    for part in (*reversed(path.parents), path):
        try:
            if not stat.S_ISDIR(part.stat().st_mode):
                return f'{part} is a file'
        except FileNotFoundError:
            if part.is_symlink():
                return f'{part} is a link to {os.readlink(part)}, which does not exist'
            return f'there is no folder {part}' if must_exist else None
        except PermissionError:
            return f'{part.parent}: permission denied'
        except OSError as error:
            return f'{part}: {error.strerror}'
    if must_exist and not os.access(path, os.R_OK | os.X_OK, effective_ids=_EFFECTIVE):
        return f'{path}: permission denied'
    return None
