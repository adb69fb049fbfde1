"""Where two runs part: the first recorded number, and the first tensor, in which they differ."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from zerojax.host.records import Record
from zerojax.measure.noise import ulps_apart

Tree = Any


@dataclasses.dataclass(frozen=True)
class DifferingLine:
    """The first line of two metrics files that differs, and the first field in it."""

    step: int
    kind: str
    field: str  # dots lead into groups: 'asymmetry_by_layer.stem'
    values: tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class DifferingTensor:
    """The first array of two trees that differs."""

    tensor: str  # path, as 'params/stem/kernel'
    differing: int  # entries
    entries: int
    max_ulps: int | None  # None: the dtypes differ


def compare_lines(
    a: Sequence[Record], b: Sequence[Record]
) -> tuple[list[int], DifferingLine | None]:
    """Compares the lines of two metrics files that have kind and step in common, step by step.

    Returns:
        (the steps before the first difference that have common lines, all of them equal; the first
        difference, or None). Fields that only one of two lines has do not count.
    """
    theirs = {(line['step'], line['kind']): flatten_dict(line, sep='.') for line in b}
    equal: list[int] = []
    common = [line for line in a if (line['step'], line['kind']) in theirs]
    for line in sorted(common, key=lambda line: line['step']):
        step, kind = line['step'], line['kind']
        other = theirs[step, kind]
        for field, value in flatten_dict(line, sep='.').items():
            if field in other and other[field] != value:
                before = [each for each in equal if each < step]
                return before, DifferingLine(step, kind, field, (value, other[field]))
        if step not in equal[-1:]:
            equal.append(step)
    return equal, None


def first_differing_tensor(a: Tree, b: Tree, order: Sequence[str]) -> DifferingTensor | None:
    """The first array, in the order of paths such as 'params/stem/kernel', that differs in a value.

    0.0 equals -0.0. None if all are equal. Both trees have exactly the arrays of `order`.
    """
    ours, theirs = flatten_dict(a, sep='/'), flatten_dict(b, sep='/')
    for path in order:
        x, y = ours[path], theirs[path]
        differing = int(np.count_nonzero(x.astype(np.float64) != y.astype(np.float64)))
        if differing:
            most = int(ulps_apart(x, y)) if x.dtype == y.dtype else None
            return DifferingTensor(path, differing, x.size, most)
    return None
