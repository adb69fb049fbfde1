"""The fields of a config, their defaults, and what they may be.

A config file's `get_config` takes `default_config()` and changes what it wants; the fields are
locked, so a misspelt one is an error. `check` says what is wrong with a config before anything is
loaded or compiled.
"""

import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_dict

from zerojax import models, perturb
from zerojax.host import objectstore, paths
from zerojax.host.errors import UsageError
from zerojax.models import convolutions
from zerojax.step import determinism, pruning

__all__ = ['check', 'default_config', 'read']


class DatasetFacts(NamedTuple):
    """What is known of an image set without having it.

    Attributes:
        image_shape: (H, W, C).
        num_classes: labels run from 0 to num_classes - 1.
        splits: {name: number of examples}.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    splits: dict[str, int]


DATASETS = {
    'digits': DatasetFacts((8, 8, 1), 10, {'train': 1437, 'test': 360}),
    'cifar10': DatasetFacts((32, 32, 3), 10, {'train': 50_000, 'test': 10_000}),
    'cifar100': DatasetFacts((32, 32, 3), 100, {'train': 50_000, 'test': 10_000}),
    'fashion_mnist': DatasetFacts((28, 28, 1), 10, {'train': 60_000, 'test': 10_000}),
    'mnist': DatasetFacts((28, 28, 1), 10, {'train': 60_000, 'test': 10_000}),
    'svhn_cropped': DatasetFacts(
        (32, 32, 3), 10, {'train': 73_257, 'test': 26_032, 'extra': 531_131}
    ),
    'imagenet_resized/32x32': DatasetFacts(
        (32, 32, 3), 1000, {'train': 1_281_167, 'validation': 50_000}
    ),
}
PARAM_DTYPES = ('float32', 'float64', 'bfloat16')


def default_config() -> ConfigDict:
    """All fields with their defaults: the paper's ConstNet and training settings, no dataset."""
    config = ConfigDict()
    config.seed = 0  # initial weights, order of examples, augmentation, dropout
    config.num_steps = config_dict.placeholder(int)  # updates; or give num_epochs instead
    # An epoch: train examples // batch_size steps, and one more with dataset.last_batch = 'keep'.
    config.num_epochs = config_dict.placeholder(int)
    config.batch_size = 128
    config.log_every_steps = 100  # a 'train' line in metrics.jsonl
    config.eval_every_steps = 1000  # an 'eval' and a 'symmetry' line
    config.checkpoint_every_steps = 1000
    config.keep_checkpoints_at = ()  # steps kept for good, beside the newest three
    config.steps_per_call = 1  # train steps in one dispatch; see docs/performance.md

    config.param_dtype = 'float32'  # or 'float64', 'bfloat16': of weights and arithmetic

    config.model = ConfigDict()
    config.model.name = 'constnet'  # or 'leakynet', 'mlp' (the toy), 'wideresnet' (a baseline)
    config.model.depth = 16  # 3n + 4: n blocks in each of three stages; wideresnet: 6n + 4
    config.model.width = 10  # stages have 16, 32, 64 times this many features; mlp: hidden features
    config.model.init = 'averaging'  # or 'random', the paper's control, ...: see models.create
    config.model.sigma_w = config_dict.placeholder(float)  # noise of constnet's initial weights
    config.model.negative_slope = 0.01  # of leakynet's leaky ReLU
    config.model.unique_features = config_dict.placeholder(int)  # of mlp at the start; None: all
    config.model.dropout = 0.0  # rate in each block
    config.model.dropout_at = 'blocks'  # or 'stem': behind constnet's stem only
    config.model.shortcut = 'post_relu'  # as the paper's code; or 'pre_relu'
    config.model.convolution = 'auto'  # what is fast here; or 'direct', 'patches', 'mixed'
    config.model.precision = 'highest'  # of products; or 'high', 'default': TF32, bfloat16
    config.model.dtype = config_dict.placeholder(str)  # 'bfloat16': mixed precision; None: not

    config.dataset = ConfigDict()
    config.dataset.name = ''
    config.dataset.data_dir = config_dict.placeholder(str)  # prepared TFDS sets; None: TFDS's place
    config.dataset.train_split = 'train'
    config.dataset.eval_split = 'test'
    config.dataset.augment = False  # reflect-pad 4, crop, mirror
    # The examples left at an epoch's end: 'drop' (all batches have one shape, compiled once, and
    # BatchNorm always sees as many examples), or 'keep' as the paper's code, in a smaller batch.
    config.dataset.last_batch = 'drop'
    config.dataset.cutout = 0  # side in pixels of a square set to the mean; 0: none
    config.dataset.mixup = 0.0  # alpha of the Beta distribution that mixes images; 0: none
    config.dataset.mean = ()  # per channel, in units of 0 to 255; (): measured on the train split
    config.dataset.std = ()

    config.determinism = ConfigDict()
    config.determinism.mode = 'deterministic'  # or 'hardware': whatever the kernels do

    config.perturbation = ConfigDict()
    config.perturbation.kind = 'none'  # or 'gaussian', 'one_weight', ...: see zerojax/perturb.py
    config.perturbation.scale = 0.0
    config.perturbation.seed = 0
    config.perturbation.at_step = 0  # after this many updates; 0: the initial weights
    # Again every so many steps; 0: only once; None: as the kind has it, see zerojax/perturb.py.
    config.perturbation.every = config_dict.placeholder(int)
    config.perturbation.layers = '.*'  # regular expression on paths such as block1_0/conv/kernel
    config.perturbation.streams = ()  # names such as 'stem', whose symmetry alone breaks; (): all
    config.perturbation.relative = False  # of gaussian, activation: to what is perturbed
    config.perturbation.count = 1  # of ulp: how many weights; of unequal_init: unique features
    config.perturbation.backward = False  # of activation: perturb gradients instead
    config.perturbation.strength = 0.01  # of disout: of its noise; see zerojax/perturb.py

    config.mesh = ConfigDict()
    config.mesh.data = 1  # devices that share each batch; see docs/cloud.md

    config.symmetry = ConfigDict()
    config.symmetry.project = False  # put the weights back on the symmetric subspace at each step

    config.optimizer = ConfigDict()
    config.optimizer.name = 'sgd'  # or 'radam'
    config.optimizer.learning_rate = 0.03
    config.optimizer.momentum = 0.9  # of sgd
    config.optimizer.nesterov = False
    config.optimizer.b1 = 0.9  # of radam
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 5e-4  # on every parameter; sgd: inside the gradient (L2)
    # Regular expression on paths: these stay as they start, whatever perturbation.layers says.
    config.optimizer.freeze = ''  # '': none
    config.optimizer.drop_at = ()  # fractions of the run at which the learning rate is multiplied
    config.optimizer.drop_factor = 0.2  # by this factor

    config.pruning = ConfigDict()  # the lottery ticket: a finished run's weights decide what goes
    config.pruning.source = ''  # that run's workdir; '': no pruning
    config.pruning.fraction = 0.0  # of each chosen layer's weights is removed
    config.pruning.mask = 'magnitude'  # the smallest; or 'random'
    config.pruning.layers = pruning.LAYERS  # regular expression on paths
    config.pruning.rewind_step = 0  # start from the weights that the source had after this step
    config.pruning.seed = 0  # of the random mask
    config.lock()
    return config


Rule = tuple[Callable[[Any], bool], str]


def _at_least(low: float) -> Rule:
    return (lambda value: math.isfinite(value) and value >= low), f'must be finite and >= {low}'


def _between(low: float, high: float) -> Rule:
    return (lambda value: low <= value <= high), f'must be from {low} to {high}'


def _below_1() -> Rule:
    return (lambda value: 0 <= value < 1), 'must be at least 0 and below 1'


def _is_pattern(value: str) -> bool:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


_PATTERN: Rule = (_is_pattern, 'must be a regular expression')


def _one_of(allowed: tuple[str, ...]) -> Rule:
    return (lambda value: value in allowed), f'must be one of {", ".join(allowed)}'


INT32 = 2**31 - 1  # steps and seeds are int32
_COUNT = _between(1, INT32)
_SEED = _between(0, INT32)

# Fields of model and perturbation not named here are checked by the things they build.
RULES: dict[str, Rule] = {
    'seed': _SEED,
    'num_steps': _COUNT,
    'num_epochs': _COUNT,
    'batch_size': _COUNT,
    'log_every_steps': _COUNT,
    'eval_every_steps': _COUNT,
    'checkpoint_every_steps': _COUNT,
    'steps_per_call': _COUNT,
    'param_dtype': _one_of(PARAM_DTYPES),
    'mesh.data': _COUNT,
    'dataset.name': _one_of(tuple(DATASETS)),
    'determinism.mode': _one_of(determinism.MODES),
    'perturbation.seed': _SEED,
    'perturbation.at_step': _between(0, INT32),
    'perturbation.every': _between(0, INT32),
    'perturbation.count': _COUNT,
    'optimizer.learning_rate': _at_least(0),
    'optimizer.name': _one_of(('sgd', 'radam')),
    'optimizer.momentum': _below_1(),
    'optimizer.b1': _below_1(),
    'optimizer.b2': _below_1(),
    'optimizer.freeze': _PATTERN,
    'pruning.fraction': _below_1(),
    'pruning.mask': _one_of(pruning.MASKS),
    'pruning.layers': _PATTERN,
    'pruning.rewind_step': _between(0, INT32),
    'pruning.seed': _SEED,
    'keep_checkpoints_at': (
        lambda value: all(type(step) is int and 0 <= step <= INT32 for step in value),
        'must be steps, whole numbers of at least 0',
    ),
    'dataset.last_batch': _one_of(('drop', 'keep')),
    'dataset.cutout': _between(0, 4096),
    'dataset.mixup': (
        lambda value: value == 0 or 1e-3 <= value <= 1e3,
        'must be 0 (none) or from 0.001 to 1000',
    ),
    'optimizer.weight_decay': _at_least(0),
    'optimizer.drop_at': (
        lambda value: all(0 < each < 1 for each in value) and list(value) == sorted(value),
        'must be rising fractions of the run between 0 and 1',
    ),
    'optimizer.drop_factor': _at_least(0),
    'dataset.mean': (lambda value: all(math.isfinite(each) for each in value), 'must be finite'),
    'dataset.std': (
        lambda value: all(math.isfinite(each) and each > 0 for each in value),
        'must be finite and above 0',
    ),
}


def check(config: ConfigDict) -> None:
    """Checks names, types and ranges of all fields.

    Raises:
        UsageError: names the field, its value, and what is allowed.
    """
    template = default_config()
    expected = flatten_dict(template.to_dict(), sep='.')
    try:
        given = flatten_dict(config.to_dict(), sep='.')
    except TypeError as error:  # they are sorted and joined
        raise UsageError('config: names of fields must be strings') from error
    for field in sorted(given.keys() - expected.keys()):
        check_field_exists(field)
    for field in sorted(expected.keys() - given.keys()):
        raise UsageError(f'{field}: missing; start from zerojax.config.default_config()')
    for field, value in given.items():
        _check_type(field, value, expected[field])
        _check_size(field, value, config.param_dtype)
        if field in RULES and value is not None:
            allowed, text = RULES[field]
            try:
                fits = allowed(value)
            except OverflowError:  # an integer that no float can hold
                fits = False
            if not fits:
                raise UsageError(f'{field}={value!r}: {text}')
    if (config.num_steps is None) == (config.num_epochs is None):
        raise UsageError(
            f'num_steps={config.num_steps}, num_epochs={config.num_epochs}: '
            'give exactly one of them, and None for the other, as --config.num_steps=None'
        )
    with_absolute_paths(config)  # raises if one is no path
    unused = ('b1', 'b2') if config.optimizer.name == 'sgd' else ('momentum', 'nesterov')
    for name in unused:
        if config.optimizer[name] != template.optimizer[name]:
            raise UsageError(
                f'optimizer.{name}={config.optimizer[name]!r}: {config.optimizer.name} has no use '
                f'for it; leave it at {template.optimizer[name]!r}'
            )
    if config.pruning.fraction > 0 and not config.pruning.source:
        raise UsageError(
            f'pruning.fraction={config.pruning.fraction}: needs pruning.source, the workdir of a '
            'finished run'
        )
    if config.symmetry.project and config.pruning.source:
        raise UsageError(
            f'symmetry.project=True: would bring weights back that pruning.source='
            f'{config.pruning.source!r} removes; leave out one of the two'
        )
    if len(config.dataset.mean) != len(config.dataset.std):
        raise UsageError(
            f'dataset.mean={config.dataset.mean!r}: needs as many numbers as '
            f'dataset.std={config.dataset.std!r}'
        )
    _create_model(dict(config.model), num_classes=1)
    build_perturbation(config)


def with_absolute_paths(config: ConfigDict) -> ConfigDict:
    """A copy whose paths stay what they are if the working directory changes.

    Raises:
        UsageError: one is no path, see `paths.meant`.
    """
    config = config.copy_and_resolve_references()
    data_dir, source = config.dataset.data_dir, config.pruning.source
    if data_dir is not None and not data_dir.startswith(objectstore.SCHEME):
        found = paths.meant(data_dir, f'dataset.data_dir={data_dir!r}')
        config.dataset.data_dir = str(found.absolute())
    if source:
        found = paths.meant(source, f'pruning.source={source!r}')
        config.pruning.source = str(found.absolute())
    return config


_OPTIONAL = {
    'num_steps': int,
    'num_epochs': int,
    'dataset.data_dir': str,
    'perturbation.every': int,
    'model.sigma_w': float,
    'model.dtype': str,
    'model.unique_features': int,
}


TUPLES_OF_NAMES = ('perturbation.streams',)  # all other tuples hold numbers


def type_of(field: str) -> type:
    """Type of a dotted field's values; fields that may be None as well are not told apart."""
    default = flatten_dict(default_config().to_dict(), sep='.')[field]
    return _OPTIONAL.get(field, type(default))


def _check_type(field: str, value: Any, default: Any) -> None:
    if field in _OPTIONAL and value is None:
        return
    kind = _OPTIONAL.get(field, type(default))
    if type(value) is not kind:
        raise UsageError(f'{field}={value!r}: must be of type {kind.__name__}')
    if isinstance(value, tuple):
        types, what = ((str,), 'names') if field in TUPLES_OF_NAMES else ((int, float), 'numbers')
        if not all(type(each) in types for each in value):
            raise UsageError(f'{field}={value!r}: must be a tuple of {what}')


def _check_size(field: str, value: Any, param_dtype: Any) -> None:
    """Checks that a number stays what it is in the run's precision: neither infinite nor 0."""
    least, most = (1e-307, 1e308) if param_dtype == 'float64' else (1e-37, 3e38)
    for each in value if isinstance(value, tuple) else (value,):
        fits = not isinstance(each, float) or each == 0 or least <= abs(each) <= most
        if not fits and math.isfinite(each):  # others are refused with more to the point
            raise UsageError(f'{field}={value!r}: must be 0, or of a size from {least} to {most}')


def check_field_exists(field: str) -> None:
    """Checks a dotted name such as 'model.depth'.

    Raises:
        UsageError: there is no such field, or it is a group of them; names those of its group.
    """
    fields = sorted(flatten_dict(default_config().to_dict(), sep='.'))
    if field not in fields:
        own = [each for each in fields if each.startswith(f'{field}.')]
        if own:
            raise UsageError(f'{field}: is a group of fields; set one of them: {", ".join(own)}')
        group = field.rpartition('.')[0]
        siblings = [each for each in fields if each.rpartition('.')[0] == group] or fields
        raise UsageError(f'{field}: no such field; allowed: {", ".join(siblings)}')


def read(file: pathlib.Path) -> ConfigDict:
    """The checked config of a run, from its workdir's config.json.

    Raises:
        UsageError: the file cannot be read, or a field of it is wrong.
    """
    try:
        fields = flatten_dict(json.loads(file.read_text()))
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise UsageError(f'{file}: cannot be read: {error}') from error
    # JSON has no tuples.
    fields = {path: tuple(x) if isinstance(x, list) else x for path, x in fields.items()}
    if fields.get(('num_steps',)) is not None:
        fields['num_epochs',] = None  # an earlier version left beside what it had made of them
    config = ConfigDict(unflatten_dict(fields))
    ours = flatten_dict(default_config().to_dict())
    differing = sorted('.'.join(path) for path in fields.keys() ^ ours.keys())
    if differing:
        raise UsageError(
            f'{file}: of another version of zerojax, whose config has other fields than this '
            f"version's ({', '.join(differing)}); read it with that version"
        )
    try:
        check(config)
    except UsageError as error:
        raise UsageError(f'{file}: {error}') from error
    return config


def convolution_of(config: ConfigDict, *, batched: bool = False, backend: str | None = None) -> str:
    """How the run computes its convolutions: `model.convolution`, resolved if it is 'auto'.

    `batched` runs are computed at once, see `zerojax.run.program`; `backend` as in
    `zerojax.models.convolutions.resolve`.

    Raises:
        UsageError: as `build_perturbation`.
    """
    perturbation = build_perturbation(config)
    branches = perturbation.kind in perturb.LAYER_KINDS and not perturbation.always_due
    alone = config.steps_per_call == 1 and not batched and not branches
    return convolutions.resolve(config.model.convolution, alone=alone, backend=backend)


def build_model(
    config: ConfigDict,
    num_classes: int,
    *,
    dropout: float | None = None,
    batched: bool = False,
    backend: str | None = None,
) -> models.Network:
    """The config's network, with another rate of dropout if one is given.

    `batched` and `backend` as in `convolution_of`.

    Raises:
        UsageError: names the field of `config.model` that is wrong.
    """
    convolution = convolution_of(config, batched=batched, backend=backend)
    fields = dict(config.model) | {'convolution': convolution}
    if dropout is not None:
        fields['dropout'] = dropout
    return _create_model(fields, num_classes)


def _create_model(fields: dict[str, Any], num_classes: int) -> models.Network:
    try:
        return models.create(**fields, num_classes=num_classes)
    except ValueError as error:
        raise UsageError(f'model.{error}') from error


def build_perturbation(
    config: ConfigDict, scale: perturb.Scale | None = None
) -> perturb.Perturbation:
    """The config's perturbation, with another scale if one is given.

    Raises:
        UsageError: names the field of `config.perturbation` that is wrong.
    """
    fields = {name: value for name, value in config.perturbation.items() if name != 'seed'}
    if scale is not None:
        fields['scale'] = scale
    try:
        return perturb.Perturbation(**fields)
    except ValueError as error:
        raise UsageError(f'perturbation.{error}') from error


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config's fields as a JSON file gives them back: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))
