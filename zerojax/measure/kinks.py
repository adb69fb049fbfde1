"""Kinks: where the derivative that JAX takes of a function is not the only one.

A ReLU has two derivatives at 0, one to each side. A feature that sits exactly there turns any
perturbation, however small, into a finite change of the gradient, and no linearised train step
knows of it. `margins` finds the distance of every input from the kink of every piecewise operation
of any JAX function, whatever library the model is written in.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from zerojax.symmetry.following import CALLS

__all__ = ['count', 'crossings', 'margins']

Tree = Any
Margins = dict[str, jax.Array]

# Comparisons stand for the `where` that follows them, as in a leaky ReLU.
_COMPARES_TWO = ('max', 'min', 'gt', 'ge', 'lt', 'le')
_COMPARES_WITH_0 = ('abs', 'sign')


def margins(function: Callable[..., Any], *args: Any) -> Margins:
    """Distance of every input of every piecewise operation from its kink, at `function(*args)`.

    Piecewise operations are max, min, clamp, abs, sign and comparisons of floats, so ReLU, leaky
    ReLU, hard tanh and their like, however they are written. A margin is the difference of the two
    numbers that are compared, a ReLU's its input: a float array, 0 at the kink. Reductions (max
    pooling, `lax.reduce`) are not looked at, nor what is inside `cond`, `while`, `shard_map`,
    `pmap`, `custom_vmap` and Pallas kernels. Pure: may be jitted and differentiated.

    Returns:
        margins by name scope ('ConstNet/block1_0/relu'), as Linen modules and `jax.named_scope` set
        it, with the name of the jitted function around the operation; '_1', '_2', ... is added to
        names that come again. Inside a scan, margins of all iterations are stacked.
    """
    closed = jax.make_jaxpr(function)(*args)
    _, found = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), '')
    seen: collections.Counter[str] = collections.Counter()
    named: Margins = {}
    for name, margin in found:
        named[f'{name}_{seen[name]}' if seen[name] else name] = margin
        seen[name] += 1
    return named


def count(margins: Margins) -> dict[str, jax.Array]:
    """Number of inputs exactly at each kink, int32 []."""
    return {name: jnp.sum(x == 0, dtype=jnp.int32) for name, x in margins.items()}


def crossings(
    function: Callable[[Tree], Any], params: Tree, tangent: Tree, epsilon: float
) -> dict[str, jax.Array]:
    """Number of inputs of each kink that `params + epsilon · tangent` moves over it, int32 [].

    To first order in epsilon: inputs whose margin m becomes m + epsilon · m', its derivative along
    the tangent, and with it 0 or of the other sign; inputs that move away from the kink do not
    count. Those that begin at the kink count if they are moved at all, also with epsilon 0: a
    ReLU's input that is 0 whatever the weights are does not. A negative epsilon moves backwards.
    """
    at, rates = jax.jvp(lambda params: margins(function, params), (params,), (tangent,))

    def crosses(margin: jax.Array, rate: jax.Array) -> jax.Array:
        way = jnp.asarray(epsilon, rate.dtype) * rate
        towards = jnp.sign(margin) * jnp.sign(way) <= 0
        return (jnp.abs(margin) <= jnp.abs(way)) & towards & (rate != 0)

    return {name: jnp.sum(crosses(at[name], rate), dtype=jnp.int32) for name, rate in rates.items()}


def _evaluate(
    jaxpr: core.Jaxpr, consts: list[Any], args: list[Any], scope: str
) -> tuple[list[Any], list[tuple[str, jax.Array]]]:
    """Outputs of the jaxpr, and (name, margin) of its piecewise operations, in order."""
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)
    found: list[tuple[str, jax.Array]] = []
    for eqn in jaxpr.eqns:
        inputs = [x.val if isinstance(x, core.Literal) else values[x] for x in eqn.invars]
        here = '/'.join(part for part in (scope, str(eqn.source_info.name_stack)) if part)
        primitive = eqn.primitive.name
        if primitive == 'scan':
            outputs, inner = _evaluate_scan(eqn, inputs, here)
        else:
            # The equation as it stands, because a custom derivative is lost in evaluating its body.
            outputs, inner = _evaluate_alone(jaxpr, eqn, inputs), []
            if primitive in CALLS:
                body = eqn.params[CALLS[primitive]]
                name = eqn.params.get('name', '')
                _, inner = _evaluate(
                    getattr(body, 'jaxpr', body),
                    getattr(body, 'consts', []),
                    inputs,
                    '/'.join(part for part in (here, name) if part),
                )
        found += inner + [(here, margin) for margin in _own_margins(primitive, inputs)]
        values |= zip(eqn.outvars, outputs, strict=True)
    outputs = [x.val if isinstance(x, core.Literal) else values[x] for x in jaxpr.outvars]
    return outputs, found


def _evaluate_alone(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
    """Outputs of one equation. As a jaxpr of its own, because how equations are bound is private to
    JAX and differs between its versions."""
    given = {
        x: value
        for x, value in zip(eqn.invars, inputs, strict=True)
        if not isinstance(x, core.Literal)
    }
    alone = jaxpr.replace(
        constvars=[],
        invars=list(given),
        outvars=eqn.outvars,
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*given.values())


def _own_margins(primitive: str, inputs: list[Any]) -> list[jax.Array]:
    if not jnp.issubdtype(jnp.result_type(inputs[0]) if inputs else bool, jnp.floating):
        return []
    if primitive in _COMPARES_TWO:
        return [jnp.subtract(*inputs)]
    if primitive in _COMPARES_WITH_0:
        return [inputs[0]]
    if primitive == 'clamp':
        low, x, high = inputs
        return [x - low, x - high]
    return []


def _evaluate_scan(
    eqn: core.JaxprEqn, inputs: list[Any], scope: str
) -> tuple[list[Any], list[tuple[str, jax.Array]]]:
    """A scan that hands out its iterations' margins too."""
    closed = eqn.params['jaxpr']
    body, body_consts = getattr(closed, 'jaxpr', closed), getattr(closed, 'consts', [])
    # Told by the leading axis of what is scanned over; how a scan's equation counts its arguments
    # differs between versions of JAX.
    num_carry = sum(map(_same_rank, eqn.outvars, body.outvars))
    num_scanned = len(inputs) - sum(map(_same_rank, eqn.invars, body.invars))
    num_consts = len(inputs) - num_scanned - num_carry
    consts, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
    names: list[str] = []

    def iteration(carry: list[Any], x: list[Any]) -> tuple[list[Any], Any]:
        outputs, found = _evaluate(body, body_consts, [*consts, *carry, *x], scope)
        names[:] = [name for name, _ in found]
        return outputs[:num_carry], (outputs[num_carry:], [margin for _, margin in found])

    carry, (stacked, found) = jax.lax.scan(
        iteration,
        carry,
        inputs[num_consts + num_carry :],
        length=eqn.params['length'],
        reverse=eqn.params['reverse'],
    )
    return [*carry, *stacked], list(zip(names, found, strict=True))


def _same_rank(outside: Any, inside: Any) -> bool:
    return len(outside.aval.shape) == len(inside.aval.shape)
