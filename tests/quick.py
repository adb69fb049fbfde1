"""For what is compiled once and run for a moment, where compiling takes most of a test's time."""

import functools

import jax

# Without optimisation, so also without contracting products and sums: each operation rounds alone.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
