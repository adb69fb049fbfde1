"""Streams broken one at a time, for a model and a step of anyone."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from crooked import Crooked

from zerojax import models, step, symmetry
from zerojax.measure import equal_features, step_audit

AXES = {
    'first': {'kernel': (None, 'a'), 'bias': ('a',)},
    'second': {'kernel': ('a', 'b')},
    'third': {'kernel': ('b', 'c'), 'bias': ('c',)},
    'head': {'kernel': ('c', None), 'bias': (None,)},
}


class Net(nn.Module):
    crooked: bool

    @nn.compact
    def __call__(self, x, train):
        del train
        x = nn.relu(nn.Dense(7, name='first')(x))
        x = nn.relu(Crooked(6, self.crooked, name='second')(x))
        x = nn.relu(nn.Dense(5, name='third')(x))
        return nn.Dense(3, name='head')(x)

    def feature_axes(self):
        return {'params': AXES, 'batch_stats': {}}


def compiled_step(model):
    tx = optax.sgd(0.1, 0.9)
    state = quick.jit(
        lambda: step.create_state(model, tx, (4,), seed=0, perturbation_seed=0),
    )()
    state = step_audit.symmetric_state(state, model, tx)
    batch = {'image': jax.random.normal(jax.random.key(1), (32, 4)), 'label': jnp.arange(32) % 3}
    inspect = step_audit.make_inspection(model, ['first', 'second', 'third'], lambda _, x: x)
    one_step = step.train_step_function(model, tx)
    train_steps = quick.jit(lambda state, data, _: one_step(state, data))
    return step_audit.CompiledStep(
        train_steps.lower(state, batch, np.int32(1)).compile(),
        quick.jit(inspect).lower(state, batch).compile(),
        state,
        batch,
    )


def verdict(compiled, streams):
    spreads = step_audit.audit_compiled(compiled, AXES, repeats=2)
    fields = spreads.compared, spreads.noise, spreads.operations, spreads.features
    return step_audit.Verdict(*fields, streams)


def test_an_order_of_summation_that_depends_on_the_feature_shows_where_the_inputs_differ():
    """While all features are equal it does not show."""
    compiled = compiled_step(Net(crooked=True))
    axes = Net(crooked=True).feature_axes()
    streams = step_audit.break_streams(compiled, axes, new_state=True)
    told = verdict(compiled, streams)
    assert not told.unequal_layers()
    unequal = told.unequal_streams()
    assert unequal['b'] == unequal['c'] == {}
    assert set(unequal['a']) >= {'b'}
    assert streams['a']['b']['outputs/second'].distinct == 2
    assert told.sentences()[-1].startswith(
        'Kernels do not keep all other streams equal while one is broken, for 1 of 3 streams, '
        'least of all b while a is broken, in '
    )
    assert any(
        line.startswith('  a ') and 'differ, in ULPs: b by ' in line for line in told.table()
    )
    assert told.record(full=True)['streams']['a']['b']['outputs/second']['distinct'] == 2
    assert 'streams' not in told.record(full=False)


def test_kernels_that_sum_all_features_alike_keep_every_other_stream(caplog):
    compiled = compiled_step(Net(crooked=False))
    axes = Net(crooked=False).feature_axes()
    compiled.run()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        streams = step_audit.break_streams(compiled, axes, new_state=True)
    assert 'ompil' not in caplog.text, 'only the state is another one'
    assert list(streams) == ['a', 'b', 'c']
    for broken, others in streams.items():
        assert others.keys() == {'a', 'b', 'c'} - {broken}
        assert all(x.distinct == 1 for tensors in others.values() for x in tensors.values())
    assert streams['a']['b'].keys() == {
        'outputs/second', 'output_gradients/second', 'gradients/second/kernel',
        'gradients/third/kernel', 'new_params/second/kernel', 'new_params/third/kernel',
    }  # fmt: skip
    assert all(x.magnitude > 0 for x in streams['a']['b'].values()), 'they tell something'
    told = verdict(compiled, streams)
    assert (
        told.sentences()[-1] == 'Each of 3 streams, broken alone, leaves all others bitwise equal.'
    )
    assert verdict(compiled, None).sentences() == told.sentences()[:-1]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('stream', ['stem', 'block2_0', 'block3_0'])
def test_a_filled_network_is_broken_in_one_stream_alone(stream, dtype):
    model = models.create('constnet', depth=7, width=1)
    axes = model.feature_axes()['params']
    image, key = jnp.zeros((1, 8, 8, 1)), jax.random.key(0)
    shapes = jax.eval_shape(lambda: model.init(key, image, train=False))['params']
    params = jax.tree.map(lambda x: np.ones(x.shape, dtype), shapes)
    filled = equal_features.symmetric_fill(params, axes)
    broken = equal_features.broken_fill(filled, axes, stream)
    for name in symmetry.stream_names(axes):
        spreads = equal_features.equal_features(broken, axes, stream=name).values()
        assert {x.distinct > 1 for x in spreads} == {name == stream}, 'in every array'
    for path, x, names in symmetry.named_axes(broken, axes):
        assert x.dtype == dtype
        if stream not in names.values():
            before = filled
            for key in path:
                before = before[key]
            np.testing.assert_array_equal(x, before)
    with pytest.raises(ValueError, match=r"streams=\('nowhere',\): 'nowhere' is no stream"):
        equal_features.broken_fill(filled, axes, 'nowhere')


def test_a_network_of_one_stream_has_no_other_to_compare():
    told = step_audit.Verdict({}, {}, [], {}, {'hidden': {}})
    assert told.unequal_streams() == {}
    assert told.table()[-2:] == [
        'streams, each broken alone',
        '  no other stream has equal features',
    ]
