"""Which axes are indexed by the same features: identities of axes, united and pinned.

An axis of a value is a tuple of factors, the last one running fastest: an axis that a reshape made
of height, width and channels has three. A factor's identity tells what its positions are; two axes
of one identity are permuted together or not at all. A factor without identity is one along which
the value is equal. A pinned identity is one whose positions must not be permuted, with the reason.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Factor(NamedTuple):
    """A factor of an axis; `identity` None where the value is equal along it."""

    identity: int | None
    size: int


Axis = tuple[Factor, ...]  # of an array; sizes multiply to its length, none: length 1
Axes = tuple[Axis, ...]  # of a value


def length(axis: Iterable[Factor]) -> int:
    """Number of positions along an axis."""
    return math.prod(factor.size for factor in axis)


def equal_along(size: int) -> Axis:
    """An axis along which the value is equal."""
    return () if size == 1 else (Factor(None, size),)


def is_equal_along(axis: Axis) -> bool:
    """Whether the value is known to be equal along the axis."""
    return all(factor.identity is None for factor in axis)


class Identities:
    """Identities made so far: a union-find with a reason for each pinned one."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._reasons: dict[int, str] = {}  # of roots that are pinned

    def new(self) -> int:
        """An identity like no other, free to be permuted."""
        self._parents.append(len(self._parents))
        return self._parents[-1]

    def new_pinned(self, size: int, reason: str) -> Axis:
        """An axis like no other that must not be permuted."""
        axis = (Factor(self.new(), size),)
        self.pin(axis, reason)
        return axis

    def root(self, identity: int) -> int:
        """The one that stands for all that are united with it."""
        while self._parents[identity] != identity:
            self._parents[identity] = self._parents[self._parents[identity]]
            identity = self._parents[identity]
        return identity

    def reason(self, identity: int) -> str | None:
        """Why it is pinned; None if it is not."""
        return self._reasons.get(self.root(identity))

    def pin(self, axis: Iterable[Factor], reason: str) -> None:
        """Pins all factors of an axis; those that are pinned already keep their reason."""
        for factor in axis:
            if factor.identity is not None:
                self.pin_identity(factor.identity, reason)

    def pin_identity(self, identity: int, reason: str) -> None:
        """Pins it, and so all that are united with it."""
        self._reasons.setdefault(self.root(identity), reason)

    def _unite(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        if a == b:
            return
        reason = self._reasons.get(a) or self._reasons.pop(b, None)
        self._reasons.pop(b, None)
        self._parents[b] = a
        if reason is not None:
            self._reasons[a] = reason

    def align(self, x: Axis, y: Axis, place: str) -> Axis:
        """Unites two axes of one length that meet position by position.

        Where their factors have different sizes they are pinned, for the permutations of the one
        are not those of the other.
        """
        if not x or not y:
            return x or y
        left, right, joined = list(x), list(y), []
        while left and right:
            a, b = left.pop(), right.pop()
            if a.size == b.size:
                if a.identity is not None and b.identity is not None:
                    self._unite(a.identity, b.identity)
                joined.append(b if a.identity is None else a)
            elif b.size and a.size % b.size == 0:
                left += self._split(a, b.size, place)
                right.append(b)
            elif a.size and b.size % a.size == 0:
                right += self._split(b, a.size, place)
                left.append(a)
            else:
                rest = [*left, a, *right, b]
                reason = f'its positions meet others in groups of another size {place}'
                self.pin(rest, reason)
                return (*self.new_pinned(length([*left, a]), reason), *reversed(joined))
        self.pin([*left, *right], f'its only position is taken with others {place}')
        return tuple(reversed(joined))

    def regroup(self, factors: Sequence[Factor], sizes: Sequence[int], place: str) -> Axes:
        """The axes that a reshape to these sizes makes of these factors.

        A factor that is taken apart is pinned: its permutations are not those of its parts.
        """
        left = list(factors)
        axes: list[Axis] = []
        if 0 in sizes:
            self.pin(left, f'there is nothing along another axis {place}')
            return tuple(equal_along(size) for size in sizes)
        for i in reversed(range(len(sizes))):
            axis: list[Factor] = []
            needed = sizes[i]
            if needed == 1 and left and left[-1].size == 1:
                axis.append(left.pop())
            while needed > 1:
                factor = left.pop()
                if needed % factor.size == 0:
                    axis.append(factor)
                    needed //= factor.size
                elif factor.size % needed == 0:
                    left += self._split(factor, needed, place)
                else:
                    reason = f'a reshape mixes its positions with those of others {place}'
                    self.pin([*left, factor, *axis], reason)
                    rest = [self.new_pinned(size, reason) for size in sizes[: i + 1]]
                    return (*rest, *reversed(axes))
            axes.append(tuple(reversed(axis)))
        self.pin(left, f'its only position is taken away {place}')
        return tuple(reversed(axes))

    def _split(self, factor: Factor, inner: int, place: str) -> Axis:
        """The factor as two, the last one of this size."""
        outer = factor.size // inner
        if factor.identity is None:
            return (Factor(None, outer), Factor(None, inner))
        reason = f'its {factor.size} positions are taken apart as {outer} x {inner} {place}'
        reason = self.reason(factor.identity) or reason
        self.pin((factor,), reason)
        return (*self.new_pinned(outer, reason), *self.new_pinned(inner, reason))
