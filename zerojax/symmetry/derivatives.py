"""Derivatives that functions give for themselves, by `jax.custom_jvp` and `custom_vjp`: jaxprs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, DropVar, Literal, jaxpr_as_fun


class Derivative(NamedTuple):
    """Of an equation that calls such a function.

    `jaxpr` takes the tangents of those `operands` that are floats, then all `operands`, and returns
    the tangents of those `results` that are; if `backwards` it takes the cotangents of the results,
    then all operands, and returns the cotangents of the operands. Operands and results are indices
    among the equation's.
    """

    jaxpr: Any
    operands: list[int]
    float_operands: list[int]
    float_results: list[int]
    backwards: bool


def own_derivative(eqn: Any, called: Any) -> Derivative:
    """That of an equation which calls the closed jaxpr `called`; backwards if it has a
    `custom_vjp`, which cannot be differentiated forwards."""
    variables = dict.fromkeys(x for x in eqn.invars if not isinstance(x, Literal))
    operands = [eqn.invars.index(x) for x in variables]
    floats = [i for i in operands if _is_float(eqn.invars[i])]
    results = [i for i, x in enumerate(eqn.outvars) if not isinstance(x, DropVar) and _is_float(x)]
    alone = called.jaxpr.replace(
        constvars=[],
        invars=list(variables),
        outvars=[eqn.outvars[i] for i in results],
        eqns=[eqn],
        debug_info=called.jaxpr.debug_info.with_unknown_names(),
    )
    function = jaxpr_as_fun(ClosedJaxpr(alone, []))
    backwards = eqn.primitive.name != 'custom_jvp_call'

    def differentiate(entering: list[Any], arrays: list[Any]) -> Any:
        def of_floats(*chosen: Any) -> list[Any]:
            replaced = dict(zip(operands, arrays, strict=True)) | dict(
                zip(floats, chosen, strict=True)
            )
            return function(*replaced.values())

        chosen = [x for i, x in zip(operands, arrays, strict=True) if i in floats]
        if backwards:
            return jax.vjp(of_floats, *chosen)[1](entering)
        return jax.jvp(of_floats, chosen, entering)[1]

    entering = [eqn.outvars[i] for i in results] if backwards else [eqn.invars[i] for i in floats]
    jaxpr = jax.make_jaxpr(differentiate)([x.aval for x in entering], [x.aval for x in variables])
    return Derivative(jaxpr, operands, floats, results, backwards)


def _is_float(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)
