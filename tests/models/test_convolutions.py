import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from zerojax.models import convolutions
from zerojax.models.convolutions import CONVOLUTIONS, convolve_direct

SHAPES = [  # side, channels, features, kernel size, stride: each way that a pass can take
    (8, 1, 4, 3, 1), (8, 3, 4, 3, 1), (8, 3, 4, 3, 2), (8, 3, 4, 1, 2), (2, 3, 4, 3, 1),
    (1, 3, 4, 3, 1), (3, 3, 4, 3, 2),
]  # fmt: skip


@pytest.mark.parametrize('convolve', CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize('size,stride', [(3, 1), (3, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize('side', [2, 7, 8])
@pytest.mark.parametrize('channels', [1, 3])
def test_convolution_is_the_sum_over_taps(convolve, size, stride, side, channels):
    """Against the definition, in float64; padding k // 2 on both sides as in PyTorch."""
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.normal(size=(2, side, side, channels)),
        rng.normal(size=(size, size, channels, 5)),
    )
    pad = size // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = (side + 2 * pad - size) // stride + 1
    expected = np.zeros((2, out, out, 5))
    for i in range(out):
        for j in range(out):
            window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
            expected[:, i, j] = np.einsum('bhwc,hwcd->bd', window, kernel)
    with jax.enable_x64(True):
        actual = jax.jit(convolve, static_argnums=2)(x, kernel, stride)
        assert actual.dtype == jnp.float64
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize('convolution', CONVOLUTIONS)
@pytest.mark.parametrize('side,channels,features,size,stride', SHAPES)
def test_gradients_and_their_derivatives_are_those_of_the_direct_convolution(
    convolution, side, channels, features, size, stride
):
    """In float64: output, both gradients, and a derivative of these along a direction."""

    def passes(convolve, x, kernel, dx, dkernel):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel, stride, 'highest')))

        forward = jax.jvp(lambda *x: convolve(*x, stride, 'highest'), (x, kernel), (dx, dkernel))
        return forward, jax.jvp(jax.grad(loss, (0, 1)), (x, kernel), (dx, dkernel))

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = [(3, side, side, channels), (size, size, channels, features)]
        given = [jnp.asarray(rng.normal(size=shape)) for shape in shapes * 2]
        actual, expected = (
            quick.jit(passes, static_argnums=0)(convolve, *given)
            for convolve in (CONVOLUTIONS[convolution], convolve_direct)
        )
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize('side,channels,features,size,stride', SHAPES)
def test_mixed_takes_for_each_pass_the_way_that_it_names(side, channels, features, size, stride):
    """As the compiled programs say: a convolution is left of `convolve_direct` alone."""
    x, kernel = jnp.ones((3, side, side, channels)), jnp.ones((size, size, channels, features))
    out = convolve_direct(x, kernel, stride)

    def gradients(x, kernel, out):
        return jax.vjp(lambda *x: convolutions.convolve_mixed(*x, stride, 'highest'), x, kernel)[1](
            out
        )

    def number_of_convolutions(function):
        compiled = quick.jit(function).lower(x, kernel, out).compile()
        return compiled.as_text().count(' convolution(')

    assert number_of_convolutions(
        lambda x, kernel, out: convolutions.convolve_mixed(x, kernel, stride, 'highest')
    ) == (0 if channels == 1 or side <= 2 else 1)
    of_inputs = number_of_convolutions(lambda *x: gradients(*x)[0])
    assert of_inputs == (0 if side <= 2 or stride > 1 else 1)
    assert number_of_convolutions(lambda *x: gradients(*x)[1]) == 1
    with jax.enable_x64(True):
        x, kernel, out = (each.astype(jnp.float64) for each in (x, kernel, out))
        assert number_of_convolutions(gradients) == 0


@pytest.mark.parametrize(
    'backend,alone,expected',
    [('cpu', True, 'mixed'), ('cpu', False, 'patches'), ('gpu', True, 'direct'),
     ('tpu', False, 'direct')],
)  # fmt: skip
def test_auto_depends_on_backend_and_surroundings(monkeypatch, backend, alone, expected):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    assert convolutions.resolve('auto', alone=alone) == expected
    for convolution in CONVOLUTIONS:
        assert convolutions.resolve(convolution, alone=alone) == convolution
