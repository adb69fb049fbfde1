import importlib.util
import itertools
import json
import pathlib
import re
import shutil

import jax
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import config_dict

from zerojax.config import (
    as_json,
    build_model,
    build_perturbation,
    check,
    check_field_exists,
    convolution_of,
    default_config,
    read,
    type_of,
    with_absolute_paths,
)
from zerojax.host.errors import UsageError
from zerojax.run.cli import count, name_of, parse, parse_flags, text_flags

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / 'configs').glob('*.py'))


@pytest.fixture
def config():
    config = default_config()
    config.num_steps = 10
    config.dataset.name = 'digits'
    return config


def test_the_fixture_is_right(config):
    check(config)


@pytest.mark.parametrize(
    'field,value,allowed',
    [
        ('seed', -1, 'from 0 to'), ('seed', True, 'of type int'), ('num_steps', 0, 'from 1 to'),
        ('num_steps', 2**31, 'from 1 to'), ('num_epochs', 3, 'exactly one'),
        ('num_steps', None, 'exactly one'), ('batch_size', 0, 'from 1 to'),
        ('log_every_steps', 0, 'from 1 to'), ('eval_every_steps', -5, 'from 1 to'),
        ('checkpoint_every_steps', 0, 'from 1 to'), ('steps_per_call', 0, 'from 1 to'),
        ('model.name', 'resnet', 'constnet, leakynet, mlp, wideresnet'),
        ('model.depth', 11, r'3n \+ 4'),
        ('model.width', 0, 'from 1 to'), ('model.init', 'hee', 'averaging, random'),
        ('perturbation.scale', 1e-300, 'from 1e-37'), ('dataset.std', (1e300,), r'to 3e\+38'),
        ('optimizer.learning_rate', 1e300, '1e-37 to'),
        ('model.dropout', 1.0, 'below 1'), ('model.shortcut', 'x', 'post_relu, pre_relu'),
        ('model.convolution', 'x', 'auto, direct, patches, mixed'),
        ('dataset.name', 'imagenet', 'digits, cifar10, cifar100, fashion_mnist'),
        ('dataset.mean', (1.0,), 'as many'), ('dataset.std', (0.0,), 'above 0'),
        ('dataset.mean', ('a',), 'tuple of numbers'),
        ('determinism.mode', 'maybe', 'deterministic, hardware'),
        ('perturbation.kind', 'x', 'none, gaussian'), ('perturbation.scale', -1.0, 'at least 0'),
        ('perturbation.scale', float('nan'), 'finite'), ('perturbation.seed', -1, 'from 0 to'),
        ('perturbation.at_step', -1, 'from 0'), ('perturbation.every', -1, 'from 0'),
        ('perturbation.streams', (1,), 'tuple of names'),
        ('perturbation.streams', 'stem', 'of type tuple'),
        ('perturbation.layers', '(', 'regular expression'), ('perturbation.count', 0, 'from 1'),
        ('perturbation.strength', -1.0, 'at least 0'),
        ('perturbation.strength', float('inf'), 'finite'),
        ('perturbation.relative', 1, 'of type bool'), ('param_dtype', 'float16', 'bfloat16'),
        ('optimizer.learning_rate', float('inf'), 'finite'), ('optimizer.momentum', 1.0, 'below 1'),
        ('optimizer.weight_decay', -1.0, '>= 0'), ('optimizer.drop_at', (0.5, 0.2), 'rising'),
        ('optimizer.drop_at', (1.5,), 'between 0 and 1'), ('optimizer.drop_factor', -1.0, '>= 0'),
        ('symmetry.project', 1, 'of type bool'), ('model.sigma_w', -0.5, 'from 0 to 1e6'),
        ('model.negative_slope', 1.0, 'below 1'),
        ('model.unique_features', 2, 'no use for it'), ('model.dropout_at', 'x', 'blocks, stem'),
        ('dataset.last_batch', 'pad', 'drop, keep'),
        ('dataset.cutout', -1, 'from 0'), ('dataset.mixup', float('inf'), 'from 0.001'),
        ('optimizer.name', 'adam', 'sgd, radam'), ('optimizer.b1', 1.0, 'below 1'),
        ('optimizer.b2', -0.1, 'at least 0'), ('optimizer.b1', 0.5, 'sgd has no use for it'),
        ('dataset.mean', (10**400,), 'finite'), ('model.depth', 10003, '10000'),
        ('optimizer.freeze', '(', 'regular expression'),
        ('optimizer.freeze', 'a{99999999999}', 'regular expression'),
        ('perturbation.layers', '(' * 5000 + ')' * 5000, 'regular expression'),
        ('pruning.fraction', 0.5, 'needs pruning.source'), ('pruning.fraction', 1.0, 'below 1'),
        ('pruning.mask', 'x', 'magnitude, random'), ('pruning.layers', '(', 'regular expression'),
        ('pruning.rewind_step', -1, 'from 0'), ('pruning.seed', -1, 'from 0'),
        ('keep_checkpoints_at', (1.5,), 'whole numbers'), ('keep_checkpoints_at', (-1,), 'steps'),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_field_value_and_what_is_allowed(config, field, value, allowed):
    group, _, name = field.rpartition('.')
    with config.ignore_type():
        (config[group] if group else config)[name] = value
    with pytest.raises(UsageError, match=rf'{field}=.*{allowed}') as error:
        check(config)
    assert '\n' not in str(error.value)


def test_projection_and_pruning_exclude_each_other(config):
    config.symmetry.project = True
    check(config)
    config.pruning.source = 'a/run'
    with pytest.raises(
        UsageError, match=r"symmetry\.project=True: .*pruning\.source='a/run'"
    ) as error:
        check(config)
    assert '\n' not in str(error.value)


def test_a_group_is_no_field_and_says_which_are_its_own():
    with pytest.raises(UsageError, match=r'^model: is a group of fields; .*: model\.convolution, '):
        check_field_exists('model')


def test_unknown_and_missing_fields_are_named(config):
    with config.unlocked():
        config.model.detph = 3
    with pytest.raises(UsageError, match=r'model\.detph: no such field; allowed: .*model\.depth'):
        check(config)
    with config.unlocked():
        del config.model.detph
        config.model[7] = 8
    with pytest.raises(UsageError, match='names of fields must be strings'):
        check(config)
    config = default_config()
    with config.unlocked():
        del config.optimizer.momentum
    with pytest.raises(UsageError, match=r'optimizer\.momentum: missing'):
        check(config)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_how_to_run_it(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check(module.get_config())
    assert f'python -m zerojax.main --config=configs/{path.name}' in module.__doc__
    for variant in re.findall(rf'{path.name}:(\w+)', module.__doc__):
        check(module.get_config(variant))
        with pytest.raises(ValueError, match=f"'{variant}'"):
            module.get_config(f'not {variant}')


def test_the_workdir_is_named_after_the_config_unless_given():
    assert name_of('configs/digits.py') == 'digits'
    assert name_of('/a/b.c/cifar.py:trial') == 'cifar_trial'
    argv = ['sweep', f'--config={CONFIGS[0].parent}/cifar.py:trial']
    assert parse_flags(argv, workdir='runs/sweep_NAME')[1] == pathlib.Path('runs/sweep_cifar_trial')
    assert name_of('zerojax:digits') == 'digits'
    assert name_of('zerojax:cifar:trial') == 'cifar_trial'


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_the_package_is_that_of_its_file_wherever_the_user_is(
    path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config, workdir = parse_flags(['main', f'--config=zerojax:{path.stem}'])
    assert config == parse_flags(['main', f'--config={path}'])[0]
    assert workdir == pathlib.Path('runs') / path.stem


def test_a_variant_of_a_config_of_the_package_is_named_behind_it():
    config, workdir = parse_flags(['main', '--config', 'zerojax:cifar:cpu'])
    assert config == parse_flags(['main', f'--config={CONFIGS[0].parent}/cifar.py:cpu'])[0]
    assert workdir == pathlib.Path('runs/cifar_cpu')


@pytest.mark.parametrize('name', ['', 'digitz', 'digits.py', '../configs/digits', ':cpu'])
def test_an_unknown_config_of_the_package_is_refused_with_those_there_are(name):
    there = ', '.join(f'zerojax:{path.stem}' for path in CONFIGS)
    with pytest.raises(UsageError) as error:
        parse_flags(['main', f'--config=zerojax:{name}'])
    assert str(error.value) == f'--config=zerojax:{name}: no such config; must be one of {there}'


def test_a_wheel_has_the_configs_in_the_package(tmp_path, monkeypatch):
    folder = tmp_path / 'zerojax' / 'configs'
    folder.mkdir(parents=True)
    text = CONFIGS[1].read_text().replace('num_steps = 700', 'num_steps = 7')
    (folder / 'ours.py').write_text(text)
    monkeypatch.setattr('zerojax.__file__', str(tmp_path / 'zerojax' / '__init__.py'))
    assert parse_flags(['main', '--config=zerojax:ours'])[0].num_steps == 7


@pytest.mark.parametrize('form', ['{}={}', '{} {}'])
def test_flags_override_fields(form):
    flags = {
        '--config': f'{CONFIGS[0].parent}/digits.py', '--config.model.width': '3',
        '--config.optimizer.drop_at': '(0.1,0.2)', '--workdir': 'w', '--text': 'x', '--number': '5',
    }  # fmt: skip
    argv = ['main', *itertools.chain(*(form.format(*flag).split() for flag in flags.items()))]
    values = text_flags(text='default', other='default', number='3')
    config, workdir = parse_flags(argv, values)
    assert config.model.width == 3
    assert config.optimizer.drop_at == (0.1, 0.2)
    assert workdir == pathlib.Path('w')
    assert (values.text, values.other, count(values, 'number', least=5)) == ('x', 'default', 5)
    with pytest.raises(UsageError, match=r'^--number=5: must be a whole number of at least 6$'):
        count(values, 'number', least=6)


@pytest.mark.parametrize('text', ['', 'x', '-1', '1.0', '1_0', '²', '9' * 5000])
def test_a_count_is_a_whole_number(text):
    values = text_flags(number=text)
    parse(['command'], values)
    with pytest.raises(UsageError, match=r'^--number=.*: must be a whole number of at least 0$'):
        count(values, 'number', least=0)


def test_arguments_that_are_no_flags_may_stand_between_them():
    values = text_flags(output=None)
    argv = ['compare', 'a', '--output', 'x', 'b']
    assert parse(argv, values, positional=True) == ['a', 'b']
    assert values.output == 'x'
    with pytest.raises(UsageError, match=r"^command line: unexpected argument 'a'$"):
        parse(argv, text_flags(output=None))


@pytest.mark.parametrize(
    'text,expected',
    [("('stem','block2_0')", ('stem', 'block2_0')), ("('stem',)", ('stem',)),
     ('stem', ('stem',)), ('()', ())],
)  # fmt: skip
def test_names_of_streams_are_given_as_a_tuple(text, expected, config, tmp_path):
    """On the command line, where one may stand alone; and as JSON has them."""
    argv = ['main', f'--config={CONFIGS[0].parent}/digits.py']
    given, _ = parse_flags([*argv, f'--config.perturbation.streams={text}'])
    assert given.perturbation.streams == expected
    (tmp_path / 'config.json').write_text(json.dumps(as_json(given)))
    assert read(tmp_path / 'config.json').perturbation.streams == expected
    assert build_perturbation(given).streams == expected


def optional_fields():
    """Those that are placeholders, and what they hold if they are not None."""
    values = {int: 3, float: 0.5, str: 'bfloat16'}
    fields = flatten_dict(default_config().to_dict(preserve_field_references=True), sep='.')
    return {
        name: values[field.get_type()]
        for name, field in fields.items()
        if isinstance(field, config_dict.FieldReference)
    }


@pytest.fixture
def all_set(tmp_path):
    """A config file in which every optional field has a value; the model is one that takes them."""
    file = tmp_path / 'all_set.py'
    file.write_text(
        'from zerojax.config import default_config\n'
        'def get_config():\n'
        '    config = default_config()\n'
        '    config.update_from_flattened_dict(\n'
        f'        {optional_fields() | {"dataset.name": "digits"}!r}\n'
        '    )\n'
        '    return config\n'
    )
    return file


def test_there_are_optional_fields_of_each_type():
    assert {type(value) for value in optional_fields().values()} == {int, float, str}
    for field, value in optional_fields().items():
        assert type_of(field) is type(value)


@pytest.mark.parametrize('form', ['{0}=None', '{0} None', '{0}=None {0}={1} {0}=None'])
def test_every_optional_field_takes_none_whatever_it_held(all_set, form):
    """Whoever changes num_steps to num_epochs has to set the other to None."""
    fields = {name: value for name, value in optional_fields().items() if name != 'num_epochs'}
    flags = [form.format(f'--config.{name}', value).split() for name, value in fields.items()]
    config, _ = parse_flags(['main', f'--config={all_set}', *itertools.chain(*flags)])
    given = flatten_dict(config.to_dict(), sep='.')
    assert given['num_epochs'] == 3
    assert {given[name] for name in fields} == {None}


def test_a_field_takes_its_last_value_after_none(all_set):
    flags = ['--config.num_epochs=None', '--config.num_steps=None', '--config.num_steps=7']
    rest = [f'--config.model.{name}=None' for name in ('sigma_w', 'unique_features')]
    config, _ = parse_flags(['main', f'--config={all_set}', *flags, *rest])
    assert (config.num_steps, config.num_epochs) == (7, None)


@pytest.mark.parametrize('field', ['seed', 'perturbation.scale', 'model.name', 'dataset.name'])
def test_a_field_that_is_not_optional_refuses_none(field):
    argv = ['main', f'--config={CONFIGS[0].parent}/digits.py', f'--config.{field}=None']
    with pytest.raises(UsageError, match=rf'^{field}=None: must be of type \w+$'):
        parse_flags(argv)


def test_the_advice_on_steps_and_epochs_can_be_followed():
    """On the very command line that it answers."""
    argv = ['main', f'--config={CONFIGS[0].parent}/digits.py', '--config.num_epochs=1']
    with pytest.raises(UsageError, match='give exactly one of them') as error:
        parse_flags(argv)
    advice = re.search(r'--\S+', str(error.value))[0]
    config, _ = parse_flags([*argv, advice])
    assert (config.num_steps, config.num_epochs) == (None, 1)


@pytest.mark.parametrize('name', ['workdir', 'config', 'text'])
@pytest.mark.parametrize('form', [['--{}='], ['--{}', '']])
def test_a_flag_is_not_left_out_by_being_empty(name, form):
    """As where a variable of the shell is not set."""
    argv = ['main', f'--config={CONFIGS[0].parent}/digits.py', *(x.format(name) for x in form)]
    with pytest.raises(UsageError, match=rf'^--{name}=: is empty; '):
        parse_flags(argv, text_flags(text='default'))


@pytest.mark.parametrize(
    'field,value',
    [('dataset.data_dir', ''), ('dataset.data_dir', 'file:///x'), ('pruning.source', 'gs://a/b'),
     ('pruning.source', '~nobody_of_this_name'), ('dataset.data_dir', 'a\0b')],
)  # fmt: skip
def test_a_field_that_is_no_path_is_refused(config, field, value):
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UsageError, match=rf'^{field}=.*: (is empty|must be|no path|~nobody)'):
        check(config)


def test_paths_of_fields_are_meant_once_and_for_all(config, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config.dataset.data_dir, config.pruning.source = '~/data', 'runs/dense'
    absolute = with_absolute_paths(config)
    assert absolute.dataset.data_dir == str(tmp_path / 'data')
    assert absolute.pruning.source == str(tmp_path / 'runs/dense')
    assert with_absolute_paths(absolute).to_dict() == absolute.to_dict()
    assert config.dataset.data_dir == '~/data'
    config.dataset.data_dir, config.pruning.source = 'gs://sets', ''
    assert with_absolute_paths(config).to_dict() == config.to_dict()


@pytest.mark.parametrize('variant', ['', ':trial'])
def test_a_config_file_is_where_the_user_means_it(tmp_path, monkeypatch, variant):
    shutil.copy(CONFIGS[0].parent / 'cifar.py', tmp_path / 'my config.py')
    monkeypatch.setenv('HOME', str(tmp_path))
    config, workdir = parse_flags(['main', f'--config=~/my config.py{variant}'])
    assert config.num_epochs == (None if variant else 300)
    assert workdir == pathlib.Path('runs/my config' + variant.replace(':', '_'))
    _, workdir = parse_flags(['main', f'--config=~/my config.py{variant}', '--workdir=~/x'])
    assert workdir == tmp_path / 'x'


@pytest.mark.parametrize(
    'name,reason',
    [('nowhere.py', 'No such file'), ('folder', 'Is a directory'), ('file.py/x.py', 'Not a dir'),
     ('dangling.py', 'No such file'), ('~nobody_of_this_name/x.py', 'is nobody'),
     ('file:///x.py', 'not a URL'), (':trial', 'is empty')],
)  # fmt: skip
def test_why_a_config_file_cannot_be_read_is_said(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file.py').touch()
    (tmp_path / 'dangling.py').symlink_to('nowhere')
    with pytest.raises(UsageError, match=rf'^--config={name}: .*{reason}'):
        parse_flags(['main', f'--config={name}'])


def test_a_number_may_be_as_small_as_the_precision_of_the_run_has_it(config):

    config.param_dtype = 'float64'
    config.perturbation.scale = 1e-300
    check(config)
    config.perturbation.scale = 1e-308
    with pytest.raises(UsageError, match=r'perturbation\.scale=1e-308: must be 0, or .* 1e-307'):
        check(config)


@pytest.mark.parametrize(
    'steps_per_call,batched,every,expected',
    [
        (1, False, 1, 'mixed'),
        (1, True, 1, 'patches'),
        (2, False, 1, 'patches'),
        (1, False, 2, 'patches'),
    ],
)
def test_auto_becomes_the_convolution_that_is_fast_for_the_run(
    config, steps_per_call, batched, every, expected
):
    config.steps_per_call = steps_per_call
    config.perturbation.kind, config.perturbation.every = 'dropout', every
    model = build_model(config, 10, batched=batched)
    assert convolution_of(config, batched=batched) == model.convolution == expected
    assert config.model.convolution == 'auto', 'as a run says it that may go on elsewhere'
    config.model.convolution = 'direct'
    assert build_model(config, 10, batched=batched).convolution == 'direct'


def test_a_config_is_checked_before_anything_asks_for_a_device(config, monkeypatch):
    """Several processes join only then."""

    def no_device():
        raise AssertionError('asked for a device')

    monkeypatch.setattr(jax, 'default_backend', no_device)
    check(config)
