import functools

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zerojax import models
from zerojax.measure import kinks
from zerojax.models import layers

KEY = jax.random.key(0, impl='rbg')  # compiles much faster


def test_fixup_starts_as_its_skip_connections():
    """Rule 1: the last convolution of each branch is 0, so a branch adds nothing."""
    model = models.create('wideresnet', depth=10, width=1, init='fixup')
    images = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
    start = functools.partial(model.init_with_output, train=True, capture_intermediates=True)
    _, variables = jax.jit(start)(KEY, images)
    captured = variables['intermediates']
    np.testing.assert_array_equal(
        captured['block1_0']['__call__'][0], captured['stem']['__call__'][0]
    )


def test_fixup_has_every_scalar_of_rule_3():
    """A bias before each convolution but the stem, each ReLU and the head: a scalar that shifts all
    of what it reads by the same; and a multiplier in every branch."""
    model = models.create('wideresnet', depth=10, width=1, init='fixup', convolution='patches')
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    params = jax.jit(functools.partial(model.init, train=False))(KEY, images)['params']
    scalars = [path for path, x in flatten_dict(params).items() if x.shape == (1,)]

    @jax.jit
    def read(params):
        """What each layer reads, by its path or its name scope."""
        inputs = {}

        def intercept(call, args, kwargs, context):
            if isinstance(context.module, (layers.Conv, nn.Dense)):
                inputs['/'.join(context.module.path)] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            model.apply({'params': params}, images, train=False)
        return inputs | kinks.margins(
            lambda params: model.apply({'params': params}, images, train=False), params
        )

    before = read(params)
    has_bias = dict.fromkeys(before, False)
    for scalar in scalars:
        if scalar[-1] != 'bias':
            continue
        flat = flatten_dict(params)
        flat[scalar] = flat[scalar] + 0.25
        for name, x in read(unflatten_dict(flat)).items():
            has_bias[name] |= bool(np.allclose(x - before[name], 0.25, atol=1e-5))
    assert [name for name, has in has_bias.items() if not has] == ['stem']
    blocks = {path[0] for path in flatten_dict(params) if path[0].startswith('block')}
    assert {path[0] for path in scalars if path[-1] == 'scale'} == blocks
