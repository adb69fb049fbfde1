"""Small files: JSON, CSV, and how a file is replaced."""

import csv
import io
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from zerojax.host import objectstore
from zerojax.host.errors import UsageError

Record = dict[str, Any]


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that it is at every moment either the old or the new one, whole."""
    if objectstore.in_store(path):
        path.write_bytes(content)
        return
    beside = path.with_name(path.name + '.tmp')
    with open(beside, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON with `replace_file`."""
    replace_file(path, (json.dumps(value, indent=2, allow_nan=False) + '\n').encode())


def read_json(path: pathlib.Path, fields: Sequence[str] = ()) -> Record:
    """Reads an object that has these fields.

    Raises:
        UsageError: it is damaged.
    """
    try:
        value = json.loads(path.read_text())
        missing = [name for name in fields if name not in value]
        if not isinstance(value, dict) or missing:
            raise ValueError(f'lacks {", ".join(missing)}')
    except (ValueError, TypeError) as error:
        raise UsageError(
            f'{path}: cannot be read ({error}); move it away, and the same command makes it anew'
        ) from error
    return value


def write_csv(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows of the same columns with `replace_file`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())


def read_metrics(file: pathlib.Path) -> list[Record]:
    """The whole lines of a `metrics.jsonl`; the last one may be half written.

    Raises:
        ValueError: a line is damaged.
    """
    whole, _, _ = file.read_text().rpartition('\n')
    lines = []
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
            line['step'], line['kind']
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file.name}, line {number}: damaged') from error
        lines.append(line)
    return lines
