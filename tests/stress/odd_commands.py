"""Configs, flags and grids at random, most of them mistakes."""

import contextlib
import pathlib
import re
import shutil
from typing import Any
from unittest import mock

from damaged_data import prepare_tiny_sets
from fire import ROOT, Fire, check_refusal, contents, in_this_process


class Claimed(Exception):
    """All checks before training have passed, and the folder is claimed; instead of training."""


LONG_NUMBER = '9' * 5000
ODD_TEXTS = (
    '', ' ', 'nan', 'inf', '-inf', '1e400', '1e-300', '1e300', '-1', '-0.0', '0', '1', '2', '0.5',
    '7', '2147483647', '2147483648', '1' + '0' * 30, LONG_NUMBER, '0x10', '1_0', '²', '٣', 'None',
    'True', 'false', '()', '(1,', '(1,2)', '(0.1,0.2)', '(nan,)', "('a',)", '[1]', '{}', '(' * 300,
    '10**30', "'", '"', '(', '[', '*', '(?P<', 'a{1,2', '\\', '.*', '(?i)stem', '(a+)+$', 'ü', '𝕬',
    '\u202e', '\u2028', '\n', 'a\nb', '\r', '\x1b[31m', '\x7f', '\udc80', '%s', '{0}', '$HOME', '~',
    '..', '/', '/dev/null', '/dev/null/x', 'a' * 300, 'a/' * 3000, 'gs://b/x', 'file:///x',
    'constnet', 'leakynet', 'mlp', 'wideresnet', 'averaging', 'random', 'he', 'hadamard', 'fixup',
    'delta_orthogonal', '1_iiii_iiii_iiii', '1iii', 'hhhh', 'kaka', 'direct', 'patches', 'pre_relu',
    'bfloat16', 'float64', 'float16', 'hardware', 'deterministic', 'gaussian', 'one_weight', 'ulp',
    'gradient', 'order', 'activation', 'dropout', 'disout', 'unequal_init', 'sgd', 'radam',
    'digits', 'cifar10', 'svhn_cropped', 'imagenet_resized/32x32', 'imagenet', 'train', 'test',
    'train[:8]', 'train[:0]', 'train[', 'train+test', 'all', 'magnitude', 'stem', 'block1_0/.*',
    'nowhere',
)  # fmt: skip
ODD_VALUES = (
    None, True, False, 0, 1, 2, 3, 7, 10, 16, 1000, -1, 2**20, 2**31 - 1, 2**31, 2**63, 10**30,
    -(10**400), 0.0, -0.0, 0.5, 0.999, 1.0, 1e-6, 1e-45, 1e-300, 1e30, 1e300, -1.5, float('nan'),
    float('inf'), float('-inf'), 1j, b'', b'a', (), (1,), (0.5, 0.6), (0.6, 0.5), (1.0, 2.0, 3.0),
    (float('nan'),), (1e300,), (1e-300,), (10**400,), (True,), ('a',), ((1,),), (None,), [], [1],
    {}, {'a': 1}, {1: 2}, range(3), '\0', 'a\0b',
)  # fmt: skip


LIKELY_TEXTS = {
    'batch_size': '1 2 8 40 41 1437 1438',
    'dataset.augment': 'true',
    'dataset.cutout': '1 8 9 33',
    'dataset.mean': '() (1.0,) (1.0,2.0,3.0)',
    'dataset.mixup': '0.001 1.0 1e-9',
    'dataset.std': '() (1.0,) (1.0,2.0,3.0)',
    'determinism.mode': 'hardware deterministic',
    'keep_checkpoints_at': '(0,) (5,5) (10000,)',
    'mesh.data': '1 2 2147483647',
    'model.convolution': 'auto direct patches mixed',
    'model.depth': '1 4 7 10 16 22 9998',
    'model.dropout': '0.0 0.5',
    'model.dropout_at': 'stem blocks',
    'model.dtype': 'bfloat16',
    'model.init': 'averaging random he hadamard delta_orthogonal fixup 1iii 1_hiak hhhhhhh',
    'model.name': 'mlp constnet leakynet wideresnet',
    'model.negative_slope': '0 0.3',
    'model.shortcut': 'pre_relu',
    'model.sigma_w': '0 0.5 1e6',
    'model.unique_features': '1 3 4 5',
    'model.width': '1 2 3 5 1000 1000000 2147483647',
    'num_epochs': '1 2147483647',
    'num_steps': '1 5 2147483647',
    'optimizer.b1': '0.8',
    'optimizer.drop_at': '() (0.5,) (0.1,0.1,0.9)',
    'optimizer.freeze': 'stem .*bias .* ( *',
    'optimizer.learning_rate': '0 0.1 1e30',
    'optimizer.momentum': '0 0.5',
    'optimizer.name': 'radam sgd',
    'optimizer.nesterov': 'true',
    'param_dtype': 'bfloat16 float64 float32',
    'perturbation.at_step': '0 1 5 700 2147483647',
    'perturbation.backward': 'true',
    'perturbation.count': '1 2 100 2147483647',
    'perturbation.every': '0 1 100',
    'perturbation.kind': 'none gaussian ulp unequal_init gradient order activation disout',
    'perturbation.layers': '.*bias stem block1_0 hidden/kernel head [',
    'perturbation.relative': 'true',
    'perturbation.scale': '0 0.5 1.0 1e30',
    'perturbation.streams': "stem hidden block2_0 ('hidden','stem') () 3",
    'pruning.fraction': '0.5',
    'pruning.layers': 'head (',
    'pruning.source': '. nowhere /',
    'steps_per_call': '1 7 2147483647',
    'symmetry.project': 'true',
}


def odd_commands(sets: pathlib.Path) -> Any:
    """Draws commands as (argv, what a config file sets fields to), most of them with a mistake."""
    import hypothesis.strategies as st
    from flax.traverse_util import flatten_dict

    from zerojax.config import default_config

    toy = ['--config.model.name=mlp', '--config.model.init=averaging', '--config.model.width=4',
           '--config.model.convolution=direct']  # fmt: skip
    small = ['--config.model.width=1', '--config.batch_size=8', f'--config.dataset.data_dir={sets}']
    shallow = ['--config.model.depth=7', *small]
    whole = ['--config.dataset.train_split=train', '--config.dataset.eval_split=test']
    bases = [
        ['digits.py', *toy], ['digits.py', *toy], ['digits.py', *shallow], ['onset.py:long', *toy],
        ['cifar.py', *shallow], ['cifar.py:trial', *shallow, *whole], ['leakynet.py', *small],
        ['fashion_mnist.py:trial', *shallow, *whole], ['imagenet32.py', *shallow],
    ]  # fmt: skip
    fields = sorted(flatten_dict(default_config().to_dict(), sep='.'))
    processes = (
        '', '\n', 'auto', 'h:1,2,1', 'h:1,2,2', 'h:1,2', ':1,1,0', 'h:99999,1,0', 'h:²,1,0',
        'h:1,²,0', 'h:1,0,0', 'h:1,2,-1', f'h:1,{LONG_NUMBER},0', f'h:{LONG_NUMBER},1,0',
    )  # fmt: skip

    @st.composite
    def commands(draw: Any) -> tuple[list[str], dict[Any, Any]]:
        field, text = st.sampled_from(fields), st.sampled_from(ODD_TEXTS)
        text |= st.text(max_size=8).map(lambda x: x.replace('\0', ''))
        text |= st.integers().map(str) | st.floats().map(str)
        value = st.sampled_from(ODD_VALUES) | text | st.integers() | st.floats()
        value |= st.lists(st.floats(0, 1), max_size=3).map(tuple)

        def flag() -> str:
            kinds = ['likely'] * 6 + ['field'] * 4 + ['main', 'main', 'odd'] + ['grid'] * 4 * sweep
            match draw(st.sampled_from(kinds)):
                case 'likely':
                    name = draw(st.sampled_from(sorted(LIKELY_TEXTS)))
                    return f'--config.{name}={draw(st.sampled_from(LIKELY_TEXTS[name].split()))}'
                case 'field':
                    return f'--config.{draw(field)}={draw(text)}'
                case 'main':
                    return draw(
                        st.builds('--distributed={}'.format, st.sampled_from(processes))
                        | st.builds('--distributed_timeout={}'.format, text)
                        | st.builds('--workdir={}'.format, text)
                    )
                case 'grid':
                    values = ','.join(draw(st.lists(text, max_size=3)))
                    return draw(
                        st.builds('--seeds={}'.format, text | st.just('999999999'))
                        | st.builds('--runs_at_once={}'.format, text | st.just('auto'))
                        | (field | text).map(lambda name: f'--grid.{name}={values}')
                    )
                case _:
                    names = '', '--', '--config', '--confg', '--flagfile', '--config.', '--grid.'
                    name = draw(st.sampled_from(names) | text)
                    return draw(st.sampled_from(['', '='])).join([name, draw(text)])

        sweep = draw(st.booleans())
        config, *overrides = draw(st.sampled_from(bases))
        argv = [f'--config={ROOT}/configs/{config}', *overrides]
        argv += [flag() for _ in range(draw(st.integers(0, 3)))]
        values = draw(
            st.just({})
            | st.just({})
            | st.dictionaries(field | text | st.integers(), value, max_size=2)
        )
        return ['sweep' if sweep else 'main', *argv], values

    return commands()


def fuzzed_config(file: pathlib.Path, argv: list[str], values: dict[Any, Any]) -> list[str]:
    """`argv` with a config file between that sets fields to any values, as `get_config` may."""
    base, variant = re.match(r'--config=(.*\.py):?(.*)', argv[1]).groups()  # type: ignore[union-attr]
    file.write_text(
        'import runpy\n'
        'from math import inf, nan\n'
        'def get_config():\n'
        f'    config = runpy.run_path({base!r})["get_config"]({repr(variant) if variant else ""})\n'
        '    with config.ignore_type(), config.unlocked():\n'
        f'        for name, value in {values!r}.items():\n'
        '            parts = name.rpartition(".") if type(name) is str else ("", "", name)\n'
        '            (config[parts[0]] if parts[0] in config else config)[parts[2]] = value\n'
        '    return config\n'
    )
    return [argv[0], f'--config={file}', *argv[2:]]


def configs(fire: Fire, number: int) -> None:
    """Commands at random, in this process, up to where the training would begin."""
    import hypothesis
    import jax

    from zerojax.run.program import Programs

    sets = fire.new_folder('sets')
    prepare_tiny_sets(sets, 'cifar10', 'fashion_mnist', 'imagenet_resized/32x32')
    undisturbed = fire.undisturbed(100)
    existing = shutil.copytree(undisturbed, fire.new_folder('existing'))
    before = contents(existing)
    here = fire.new_folder('here')
    here.mkdir()
    programs, counts = Programs(), {'refused': 0, 'passed': 0}

    @hypothesis.seed(fire.random.randrange(2**32))
    @hypothesis.settings(
        max_examples=number, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(odd_commands(sets), hypothesis.strategies.booleans())
    def refused_or_passed(command: tuple[list[str], dict[Any, Any]], in_existing: bool) -> None:
        argv, values = command
        if values:
            files = fire.workdir / 'configs'
            files.mkdir(exist_ok=True)
            argv = fuzzed_config(files / f'fuzzed_{sum(counts.values())}.py', argv, values)
        if in_existing:
            argv = [*argv, f'--workdir={existing}']
        try:
            check_refusal(*in_this_process(argv))
        except Claimed:
            counts['passed'] += 1
            for folder in here.iterdir():
                shutil.rmtree(folder)
            if contents(existing) != before:  # a sweep in it
                shutil.rmtree(existing)
                shutil.copytree(undisturbed, existing)
        else:
            counts['refused'] += 1
            assert contents(existing) == before, argv
        assert not contents(here), argv
        if sum(counts.values()) % 100 == 0:
            jax.clear_caches()

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(here))
        for name, instead in {
            'zerojax.run.train.Recorder': mock.Mock(side_effect=Claimed),
            'jax.distributed.initialize': mock.Mock(side_effect=Claimed),
            'zerojax.run.train.Programs': lambda: programs,
            'zerojax.run.many.Programs': lambda: programs,
            'zerojax.run.checks.device_memory': lambda: 2**30,  # spares the machine
            'zerojax.run.data._why_unreachable': lambda url, timeout: 'not asked',
        }.items():
            stack.enter_context(mock.patch(name, instead))
        refused_or_passed()
    total = sum(counts.values())
    assert 0.05 * total < counts['passed'] < 0.95 * total, counts
    print(f'configs: {total} commands; {counts["refused"]} were refused, {counts["passed"]} passed')
