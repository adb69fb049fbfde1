"""The prediction of a model that no config describes: `zerojax.predict --model`."""

import json
import sys

import numpy as np
import pytest

from zerojax import own_model, predict

MODULE = """
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zerojax import own_model

mlp = eqx.nn.MLP(4, 3, width_size=16, depth=2, activation=jnp.tanh, key=jax.random.key(0))
params, rest = eqx.partition(mlp, eqx.is_array)
params = jax.tree.map(lambda x: jnp.full_like(x, 0.1 if x.ndim == 2 else 0.0), params)


def apply(params, x):
    return jax.vmap(eqx.combine(params, rest))(x)


def loss(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def parts(scale=0.5, tx=optax.sgd(0.5)):
    rng = np.random.default_rng(3)
    means, labels = rng.normal(0, 1, (3, 4)), rng.integers(0, 3, 64)
    x = rng.normal(means[labels], scale).astype(np.float32)
    return apply, params, tx, loss, [(x, labels)] * 12


def model():
    return own_model.Model(*parts())


def diverging():
    return parts(tx=optax.sgd(np.nan))


def unequal():
    apply, params, *rest = parts()
    return apply, eqx.tree_at(lambda x: x.layers[0].bias, params, jnp.arange(16.0)), *rest


def single():
    *rest, batches = parts()
    return *rest, batches[:1]


def generator():
    *rest, batches = parts()
    return *rest, iter(batches)


def later():
    *rest, batches = parts()
    x, labels = batches[0]
    return *rest, [*batches, (x[:, :3], labels)]


def frozen():
    _, params, _, loss, batches = parts()
    inputs = [((x, 2), labels) for (x, labels) in batches]
    return lambda p, x, n: n * apply(p, x), params, optax.set_to_zero(), loss, inputs


class Net(nn.Module):
    width: int = 12

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(self.width, kernel_init=nn.initializers.constant(0.3), name='h')(x))
        return nn.Dense(3, kernel_init=nn.initializers.zeros, name='head')(x)


def linen():
    _, _, *rest = parts()
    params = Net().init(jax.random.key(0), rest[-1][0][0])
    return own_model.Model(
        Net().apply, params, *rest, make=lambda counts: Net(counts['params/h']).apply
    )


def other():
    return own_model.Model(*parts(), make=lambda counts: apply)


def thin():
    params = {'w': np.ones((4, 1), np.float32), 'v': np.ones((1, 3), np.float32)}
    return lambda p, x: jnp.tanh(x @ p['w']) @ p['v'], params, *parts()[2:]


def raising():
    raise KeyError('a key')


def nothing():
    pass
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / 'users_model.py').write_text(MODULE)
    (tmp_path / 'users_broken.py').write_text('import json, nothing_of_this_name\n')
    (tmp_path / 'users_typo.py').write_text('x = 1 +\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ('users_model', 'users_broken', 'users_typo'):
        sys.modules.pop(name, None)


@pytest.mark.parametrize('function', ['parts', 'model'])
def test_a_model_of_equinox_is_predicted_from_its_function(tmp_path, capsys, function):
    flags = ['--scales=1e-3,1e-6', '--steps=10', f'--workdir={tmp_path}/p']
    assert predict.main(['predict', f'--model=users_model:{function}', *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 100
    found = json.loads((tmp_path / 'p' / 'predict.json').read_text())
    streams = {'layers/0': 16, 'layers/1': 16}
    assert {name: stream['features'] for name, stream in found['streams'].items()} == streams
    assert found['model'] == f'users_model:{function}' and 'config' not in found
    assert 'layers/0' in found['feature_axes']
    assert [(each['scale'], each['stream']) for each in found['onsets']] == [
        (scale, stream) for scale in (1e-3, 1e-6) for stream in (*streams, None)
    ]
    for each in found['onsets']:
        assert each['reduced'] is None and each['reduced_seeds'] == []
    assert found['curves'] == found['linear_curves']
    with_jax = sys.modules['users_model'].model()
    predicted = own_model.predict(with_jax, (1e-3,), 10).linear[1e-3]
    for name, curve in found['linear_curves']['0.001'].items():
        np.testing.assert_allclose(curve, predicted[name] / np.log(10), rtol=1e-5)
    assert found['steps'] == 10 and found['operations']['full'] > 0
    assert found['operations']['reduced'] is None
    assert (tmp_path / 'p' / 'figures' / 'predict.png').read_bytes()[:4] == b'\x89PNG'


def test_where_every_stream_has_one_feature_no_noise_is_an_asymmetry(tmp_path):
    flags = ['--scales=1e-3', f'--workdir={tmp_path}/p']
    assert predict.main(['predict', '--model=users_model:thin', *flags]) == 0
    found = json.loads((tmp_path / 'p' / 'predict.json').read_text())
    assert found['streams'] == {'w': {'features': 1, 'growth': None}}
    assert found['rounding_scale'] == 0 and found['onsets'][-1]['linear'] is None


def test_a_model_that_can_be_made_smaller_has_the_reduced_prediction_too(tmp_path, capsys):
    flags = ['--scales=1e-2', '--features=4', '--seeds=2', f'--workdir={tmp_path}/p']
    assert predict.main(['predict', '--model=users_model:linen', *flags]) == 0
    found = json.loads((tmp_path / 'p' / 'predict.json').read_text())
    assert [len(each['reduced_seeds']) for each in found['onsets']] == [2, 2]
    curve, linear = (found[name]['0.01']['params/h'] for name in ('curves', 'linear_curves'))
    assert len(curve) == len(linear) == 13 and curve != linear
    np.testing.assert_allclose(curve[:8], linear[:8], atol=0.3)
    assert 'reduced, by seed of the noise' in capsys.readouterr().out


@pytest.mark.parametrize(
    'flags,message',
    [
        (['--model=users_model'], '--model=users_model: must be MODULE:FUNCTION, such as'),
        (['--model=nowhere_at_all:f'], "--model=nowhere_at_all:f: there is no module 'nowhere_at"),
        (['--model=users_model:f'], "--model=users_model:f: users_model has no function 'f'"),
        (['--model=users_model:nothing'], '--model=users_model:nothing: returns NoneType; must re'),
        (['--model=users_model:raising'], "--model=users_model:raising: KeyError: 'a key' ("),
        (['--model=users_model:generator'], '--model=users_model:generator: batches: must be a l'),
        (['--model=users_model:later'], '--model=users_model:later: TypeError: dot_general requi'),
        (['--model=users_model:unequal'], '--model=users_model:unequal: params: all features of'),
        (['--model=users_model:single'], '--model=users_model:single: has 1 batch; must have at'),
        (['--model=users_broken:f'], '--model=users_broken:f: ModuleNotFoundError: No module na'),
        (['--model=users_typo:f'], '--model=users_typo:f: SyntaxError: '),
        (['--model=users_model:parts', '--config=configs/digits.py'], '--model, --config: one run'),
        (['--model=users_model:parts', '--config.seed=1'], '--config.seed: is a field of a con'),
        (['--model=users_model:parts', '--seeds=3'], '--seeds: is of the reduced prediction'),
        (['--model=users_model:parts', '--features=9'], '--features: is of the reduced predict'),
        (['--model=users_model:parts', '--scales=0'], '--scales=0: must be numbers above 0'),
        (['--model=users_model:parts', '--steps=1'], '--steps=1: must be a whole number'),
        (['--model='], '--model=: is empty'),
        ([], '--config: missing; give it, or --model=MODULE:FUNCTION; to begin with, --config'),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, flags, message):
    assert predict.main(['predict', *flags, f'--workdir={tmp_path}/p']) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {message}')
    assert error.count('\n') == 1
    assert not (tmp_path / 'p').exists()


def test_a_step_without_operations_is_predicted(tmp_path):
    """XLA counts none where nothing is trained. An input may be a number of Python's."""
    flags = ['--model=users_model:frozen', '--steps=2', f'--workdir={tmp_path}/p']
    assert predict.main(['predict', *flags]) == 0
    found = json.loads((tmp_path / 'p' / 'predict.json').read_text())
    assert found['operations']['full'] == 0


def test_a_run_that_diverges_is_one_line(tmp_path, capsys):
    flags = ['--model=users_model:diverging', f'--workdir={tmp_path}/p']
    assert predict.main(['predict', *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: the symmetric run itself: step 1: ') and error.count('\n') == 1


def test_a_small_network_that_is_another_one_is_one_line(tmp_path, capsys):
    flags = ['--model=users_model:other', '--steps=2', f'--workdir={tmp_path}/p']
    assert predict.main(['predict', *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: --model=users_model:other: make: ') and error.count('\n') == 1
    assert not (tmp_path / 'p').exists()
