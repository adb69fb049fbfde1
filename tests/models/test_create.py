"""What networks may be made of, and what is said of anything else."""

import pytest

from zerojax import models

LEAKY = {'name': 'leakynet', 'init': '1_1_1_1', 'depth': 7}


@pytest.mark.parametrize(
    'arguments',
    [
        {
            'name': 'constnet', 'depth': 7, 'width': 2, 'num_classes': 3, 'init': 'random',
            'dropout': 0.1, 'dropout_at': 'stem', 'shortcut': 'pre_relu', 'sigma_w': 0.5,
            'convolution': 'patches', 'dtype': 'bfloat16',
        },
        {**LEAKY, 'width': 2, 'num_classes': 3, 'dropout': 0.1, 'negative_slope': 0.2,
         'convolution': 'patches', 'dtype': 'bfloat16'},
        {'name': 'wideresnet', 'depth': 10, 'width': 2, 'num_classes': 3, 'init': 'fixup',
         'dropout': 0.1, 'convolution': 'patches', 'dtype': 'bfloat16'},
        {'name': 'mlp', 'width': 4, 'num_classes': 3, 'init': 'random', 'unique_features': 2},
    ],
    ids=lambda arguments: arguments['name'],
)  # fmt: skip
def test_each_argument_reaches_the_network(arguments):
    """And networks of the same arguments are equal, so nothing is compiled twice."""
    network = models.create(**arguments)
    for argument, value in arguments.items():
        if argument != 'name':
            assert getattr(network, 'weight_init' if argument == 'init' else argument) == value
    assert network == models.create(**arguments)
    assert hash(network) == hash(models.create(**arguments))


def test_the_toy_lets_be_what_any_config_holds():
    arguments = {'depth': 7, 'convolution': 'patches'}
    assert models.create('mlp', **arguments) == models.create('mlp')


@pytest.mark.parametrize(
    'argument,value',
    [
        ('depth', 11), ('depth', 4), ('width', 0), ('num_classes', 0), ('dropout', 1.0),
        ('dropout', -0.1), ('dropout', float('nan')), ('init', 'hee'), ('shortcut', 'relu'),
        ('convolution', 'fft'), ('name', 'resnet'), ('sigma_w', -1.0), ('negative_slope', 0.2),
        ('unique_features', 3), ('dropout_at', 'head'), ('dtype', 'float16'),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named_with_its_value(argument, value):
    arguments = {'name': 'constnet', argument: value}
    with pytest.raises(ValueError, match=f'^{argument}={value!r}: '):
        models.create(**arguments)


@pytest.mark.parametrize(
    'arguments,message',
    [
        ({**LEAKY, 'negative_slope': 1.0}, 'negative_slope=1.0: must be 0, or from 1e-6'),
        ({**LEAKY, 'sigma_w': 0.1}, 'sigma_w=0.1: leakynet with init'),
        ({'name': 'mlp', 'init': 'random', 'width': 4, 'unique_features': 5}, 'unique_features=5'),
        ({'name': 'mlp', 'unique_features': 5}, "unique_features=5: mlp with init 'averaging' has"),
        ({'name': 'mlp', 'init': 'he'}, "init='he': must be one of averaging, random"),
        ({'name': 'mlp', 'dropout': 0.1}, 'dropout=0.1: mlp with init'),
        ({'name': 'wideresnet', 'init': 'he', 'depth': 13}, r'depth=13: must be 6n \+ 4'),
        ({'name': 'wideresnet', 'depth': 10}, "init='averaging': must be one of he, fixup"),
        ({'name': 'constnet', 'init': 'he', 'sigma_w': 0.1}, 'sigma_w=0.1: constnet with init'),
        ({**LEAKY, 'shortcut': 'pre_relu'},
         "shortcut='pre_relu': leakynet with init '1_1_1_1' has no use for it; leave it at 'post"),
    ],
)  # fmt: skip
def test_what_a_network_has_no_use_for_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        models.create(**arguments)
