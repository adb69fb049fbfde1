"""Follows the axes of parameters through a jaxpr, call by call and loop by loop."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from zerojax.symmetry.arithmetic_rules import ARITHMETIC
from zerojax.symmetry.axis_rules import shape_of, stopped, unknown
from zerojax.symmetry.derivatives import own_derivative
from zerojax.symmetry.identities import (
    Axes,
    Axis,
    Factor,
    Identities,
    equal_along,
    is_equal_along,
    length,
)
from zerojax.symmetry.layout_rules import LAYOUT, TELLING

JAX = pathlib.Path(jax.__file__).parent
RULES = ARITHMETIC | LAYOUT

# The parameter that holds what is called.
CALLS = {
    'checkpoint': 'jaxpr', 'closed_call': 'call_jaxpr', 'composite': 'jaxpr',
    'core_call': 'call_jaxpr', 'custom_jvp_call': 'call_jaxpr', 'custom_vjp_call': 'call_jaxpr',
    'custom_vjp_call_jaxpr': 'fun_jaxpr', 'jit': 'jaxpr', 'pjit': 'jaxpr', 'remat': 'jaxpr',
    'remat2': 'jaxpr',
}  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _is_of_jax(file: str) -> bool:
    return JAX in pathlib.Path(file).parents


def _source(eqn: Any) -> list[tuple[str, int]]:
    """Files and lines that an equation comes from, but for those of JAX, the innermost first."""
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback else ()
    return [(x.file_name, x.line_num) for x in frames if not _is_of_jax(x.file_name)]


def _needed(jaxpr: Any) -> list[Any]:
    """The equations that the results follow from, and those that write to a `jax.Ref`."""
    variables = {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    needed = []
    for eqn in reversed(jaxpr.eqns):
        writes = eqn.effects and eqn.primitive.name not in TELLING
        if writes or not variables.isdisjoint(eqn.outvars):
            needed.append(eqn)
            variables |= {x for x in eqn.invars if not isinstance(x, Literal)}
    return needed[::-1]


def _is_equal_along(values: np.ndarray, axis: int) -> bool:
    """To the bit: 0.0 and -0.0 have different inverses."""
    return np.broadcast_to(values.take([0], axis), values.shape).tobytes() == values.tobytes()


def _number_longer(atoms: Sequence[Any], avals: Sequence[Any]) -> int:
    """How many arrays have more axes than their counterparts."""
    return sum(len(shape_of(a)) > len(b.shape) for a, b in zip(atoms, avals, strict=True))


class Following:
    """Axes of all values of a jaxpr, from those of its inputs.

    Attributes:
        ids: identities of axes.
        written: identities of axes that products put out, in the order of the computation.
        used: identities of axes that an operation has read.
    """

    def __init__(self) -> None:
        self.ids = Identities()
        self.written: list[int] = []
        self.used: set[int] = set()
        self._in_derivative = False  # one of a derivative is not needed
        self._calls: list[Any] = []  # the equations whose inner jaxpr is being followed

    def writes(self, axes: Sequence[Axis]) -> None:
        """Takes down that features along these axes are put out here."""
        self.written += [x.identity for axis in axes for x in axis if x.identity is not None]

    def place(self, eqn: Any) -> str:
        """The operation and where it stands in the source, in parentheses.

        JAX's own functions are traced once, so that an operation in them may tell of another call
        than the one it belongs to: it is believed if it tells of its caller as well.
        """
        place: tuple[str, int] | None = None
        for each in (*self._calls, eqn):
            places = _source(each)
            if places and (place is None or place in places):
                place = places[0]
        if place is None:
            return f'({eqn.primitive.name})'
        return f'({eqn.primitive.name}, {"/".join(pathlib.Path(place[0]).parts[-3:])}:{place[1]})'

    def _constant(self, x: Any, eqn: Any) -> Axes:
        """Axes of an array that is no parameter: pinned where its values differ along them. The
        equation is the one that reads it."""
        if np.ndim(x) == 0:
            return ()
        place = self.place(eqn) if eqn else '(put out)'
        reason = f'numbers that are no parameters differ along it {place}'
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
        if is_key or isinstance(x, jax.Ref):  # whose values are none, or may change
            return tuple(stopped(self, (), size, reason) for size in x.shape)
        values = np.asarray(x)
        return tuple(
            equal_along(size)
            if not values.size or _is_equal_along(values, i)
            else stopped(self, (), size, reason)
            for i, size in enumerate(values.shape)
        )

    def follow(self, jaxpr: Any, inputs: Sequence[Axes]) -> list[Axes]:
        """Axes of the results of a jaxpr, open or closed."""
        known: dict[Any, Axes] = {}
        if isinstance(jaxpr, ClosedJaxpr):
            constants = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
            jaxpr = jaxpr.jaxpr
        else:
            constants = {}
        known |= zip(jaxpr.invars, inputs, strict=True)

        def read(atom: Any, eqn: Any) -> Axes:
            if isinstance(atom, Literal):
                return self._constant(atom.val, eqn)
            if atom not in known:
                known[atom] = self._constant(constants[atom], eqn)
            return known[atom]

        for eqn in _needed(jaxpr):
            results = self._through(eqn, [read(atom, eqn) for atom in eqn.invars])
            known |= zip(eqn.outvars, results, strict=True)
        return [read(atom, None) for atom in jaxpr.outvars]

    def _through(self, eqn: Any, operands: list[Axes]) -> list[Axes]:
        name = eqn.primitive.name
        of_others = {'scan': self._scan, 'while': self._while, 'cond': self._cond}
        of_others |= dict.fromkeys(CALLS, self._call)
        if name in of_others:
            self._calls.append(eqn)
            results = of_others[name](eqn, operands)
            self._calls.pop()
            return results
        self.used |= {
            x.identity for axes in operands for axis in axes for x in axis if x.identity is not None
        }
        return RULES.get(name, unknown)(self, eqn, *operands)

    def _roots(self, values: Sequence[Axes]) -> Any:
        """What tells whether axes are the same, as far as it is known by now."""
        return [
            [[(x.identity is not None and self.ids.root(x.identity), x.size) for x in axis]
             for axis in axes]
            for axes in values
        ]  # fmt: skip

    def _call(self, eqn: Any, operands: list[Axes]) -> list[Axes]:
        name = eqn.primitive.name
        results = self.follow(eqn.params[CALLS[name]], operands)
        if name.startswith('custom_') and not self._in_derivative:
            return self._with_derivative(eqn, operands, results)
        return results

    def _with_derivative(self, eqn: Any, operands: list[Axes], results: list[Axes]) -> list[Axes]:
        """Follows the derivative that a function gives for itself, which need not be its own.

        It may differ along axes that the function is equal along, so no such axes are left.
        """
        results = [tuple(map(self._as_if_different, axes)) for axes in results]
        derivative = own_derivative(eqn, eqn.params[CALLS[eqn.primitive.name]])
        entering = [operands[i] for i in derivative.float_operands]
        leaving = [results[i] for i in derivative.float_results]
        if derivative.backwards:
            entering, leaving = leaving, entering
        self._in_derivative = True
        found = self.follow(
            derivative.jaxpr, [*entering, *(operands[i] for i in derivative.operands)]
        )
        self._in_derivative = False
        place = self.place(eqn)
        for axes, others in zip(leaving, found, strict=True):
            for a, b in zip(axes, others, strict=True):
                self.ids.align(a, b, place)
        return results

    def _as_if_different(self, axis: Axis) -> Axis:
        return tuple(Factor(self.ids.new(), x.size) if x.identity is None else x for x in axis)

    def _carried_on(self, eqn: Any, before: Axis, after: Axis) -> Axis:
        """An axis of a carried value that is the one at first and the other later.

        Unlike where values meet but once, factors of other sizes are given up, so that a loop comes
        to an end: from equal along, to some factors, to a single pinned one.
        """
        joined = self.ids.align(before, after, self.place(eqn))
        if is_equal_along(before) or [x.size for x in joined] == [x.size for x in before]:
            return joined
        reason = f'a loop groups its positions in several ways {self.place(eqn)}'
        self.ids.pin((*before, *joined), reason)
        return before if len(before) == 1 else self.ids.new_pinned(length(before), reason)

    def _repeat(self, eqn: Any, carry: list[Axes], body: Any) -> list[Axes]:
        """The carried values' axes that the body, carry -> (carry, ...), leaves as they are; and
        what else it returns."""
        while True:
            results = body(carry)
            carried = [
                tuple(self._carried_on(eqn, a, b) for a, b in zip(x, y, strict=True))
                for x, y in zip(carry, results[: len(carry)], strict=True)
            ]
            if self._roots(carried) == self._roots(carry):
                return [*carried, *results[len(carry) :]]
            carry = carried

    def _scan(self, eqn: Any, operands: list[Axes]) -> list[Axes]:
        # Operands are constants, carried values and stacked ones, results are carried values and
        # stacked ones; what is stacked has an axis more than in the body.
        body_jaxpr, reason = eqn.params['jaxpr'], f'a loop goes along it {self.place(eqn)}'
        stacked = _number_longer(eqn.invars, body_jaxpr.in_avals)
        carried = len(eqn.outvars) - _number_longer(eqn.outvars, body_jaxpr.out_avals)
        first = len(operands) - stacked
        constants, carry = operands[: first - carried], operands[first - carried : first]
        for axes in operands[first:]:
            self.ids.pin(axes[0], reason)

        def body(carry: list[Axes]) -> list[Axes]:
            inputs = [*constants, *carry, *(axes[1:] for axes in operands[first:])]
            return self.follow(body_jaxpr, inputs)

        results = self._repeat(eqn, carry, body)
        steps = eqn.params['length']
        return [
            *results[:carried],
            *((stopped(self, (), steps, reason), *axes) for axes in results[carried:]),
        ]

    def _while(self, eqn: Any, operands: list[Axes]) -> list[Axes]:
        of_condition = eqn.params['cond_nconsts']
        constants = of_condition + eqn.params['body_nconsts']

        def body(carry: list[Axes]) -> list[Axes]:
            self.follow(eqn.params['cond_jaxpr'], [*operands[:of_condition], *carry])
            inputs = [*operands[of_condition:constants], *carry]
            return self.follow(eqn.params['body_jaxpr'], inputs)

        return self._repeat(eqn, operands[constants:], body)

    def _cond(self, eqn: Any, operands: list[Axes]) -> list[Axes]:
        results, *others = [self.follow(branch, operands[1:]) for branch in eqn.params['branches']]
        place = self.place(eqn)
        for other in others:
            results = [
                tuple(self.ids.align(a, b, place) for a, b in zip(x, y, strict=True))
                for x, y in zip(results, other, strict=True)
            ]
        return results
