"""What each operation of a jaxpr does to the axes of its operands.

A rule is a function (follower, equation, axes of each operand) -> axes of each result. It is sound
if the operation commutes with every permutation that the united and pinned identities still allow:
permuting the operands' axes permutes those of the results. To pin all axes of all operands is
always sound; that is what becomes of an operation without a rule. Rules of operations that compute
are in `arithmetic_rules`, those of operations that move numbers in `layout_rules`; what all need is
here. A new rule is a function there, and an entry in the table below it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from zerojax.symmetry.identities import (
    Axes,
    Axis,
    Identities,
    equal_along,
    is_equal_along,
    length,
)


class Follower(Protocol):
    """What rules know of the one who follows a jaxpr, see `following`."""

    ids: Identities

    def place(self, eqn: Any) -> str:
        """The operation and where it stands in the source, in parentheses."""

    def writes(self, axes: Sequence[Axis]) -> None:
        """Takes down that features along these axes are put out here."""


Rule = Callable[..., list[Axes]]


def shape_of(atom: Any) -> tuple[int, ...]:
    """Shape of an operand or result; () of what is no array."""
    return tuple(getattr(atom.aval, 'shape', ()))


def stopped(f: Follower, axis: Axis, size: int, reason: str) -> Axis:
    """The axis [size] of a result of an operation along `axis` that is not symmetric in it."""
    f.ids.pin(axis, reason)
    return () if size == 1 else f.ids.new_pinned(size, reason)


def unknown(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
    """Pins all."""
    return all_stopped(
        f, eqn, operands, f'it cannot be followed through this operation {f.place(eqn)}'
    )


def all_stopped(f: Follower, eqn: Any, operands: Sequence[Axes], reason: str) -> list[Axes]:
    """Pins all axes of the operands, and those of the results."""
    for axes in operands:
        for axis in axes:
            f.ids.pin(axis, reason)
    return [
        tuple(stopped(f, (), size, reason) for size in shape_of(result)) for result in eqn.outvars
    ]


def silent(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
    """Of an operation that only tells the user something."""
    return []


def each_by_itself(f: Follower, eqn: Any, *operands: Axes) -> list[Axes]:
    """Results are the operands."""
    return list(operands)


def spread_and_align(
    f: Follower, eqn: Any, joined: Axis, axis: Axis, size: int, spread: int
) -> Axis:
    """Aligns an axis of this size with one of size `spread`, repeated if it is shorter."""
    if size == spread:
        return f.ids.align(joined, axis, f.place(eqn))
    f.ids.pin(axis, f'its only position is repeated {f.place(eqn)}')
    return joined


def part(f: Follower, axis: Axis, size: int, reason: str, start: int | None = None) -> Axis:
    """As `stopped`, of an operation whose result is equal along where its operand is.

    If it takes `size` positions in a row from `start`, and these are just one round of the last
    factors, such as one of several arrays that were joined, those factors stay.
    """
    if is_equal_along(axis):
        return equal_along(size)
    if start is not None and size:
        for i in range(1, len(axis)):
            if length(axis[i:]) == size and start % size == 0:
                f.ids.pin(axis[:i], reason)
                return axis[i:]
    return stopped(f, axis, size, reason)
