import json
import pathlib
import re

import jax
import pytest

from zerojax.host import manifest
from zerojax.host.compilation_cache import cpu_name
from zerojax.host.errors import UsageError


def test_the_manifest_keeps_every_start(tmp_path):
    path = tmp_path / 'manifest.json'
    facts = {'execution': {'steps_per_call': 5}, 'dataset': {'train_sha256': 'a'}}
    manifest.add_start(path, 0, facts)
    manifest.add_start(path, 7, facts)
    found = json.loads(path.read_text())
    assert [start['step'] for start in found['starts']] == [0, 7]
    assert found['execution'] == {'steps_per_call': 5}
    assert {'jax', 'jaxlib', 'flax', 'zerojax'} <= found['versions'].keys()
    assert found['backend'] == 'cpu'
    assert found['device_count'] == 2


@pytest.mark.parametrize('content', [b'model name\t: A\xc2\xae 1\n', b'model name\t: A\xae 1\n'])
def test_a_cpu_is_the_same_in_any_locale(monkeypatch, content):
    """Else a resumed run would say that it was started on another one."""
    found = set()
    for locale in ('ascii', 'latin-1', 'utf-8'):

        def read_text(_, encoding=locale, errors='strict'):
            return content.decode(encoding, errors)

        monkeypatch.setattr(pathlib.Path, 'read_text', read_text)
        found.add((manifest.cpuinfo(), cpu_name()))
    assert len(found) == 1


def test_a_damaged_manifest_is_refused(tmp_path):
    (tmp_path / 'manifest.json').write_text('{')
    with pytest.raises(UsageError, match=r'manifest\.json cannot be read'):
        manifest.add_start(tmp_path / 'manifest.json', 0, {})


FACTS = {
    'compiler_options': {}, 'execution': {'runs_at_once': 1}, 'dataset': {'train_sha256': 'a'},
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    manifest.add_start(tmp_path / 'manifest.json', 0, FACTS)
    return tmp_path / 'manifest.json'


def test_under_the_same_conditions_there_is_nothing_to_say(path, tmp_path):
    assert manifest.differences(path, FACTS) == []
    assert manifest.differences(tmp_path / 'none.json', FACTS) == []


def test_other_data_are_refused(path):
    with pytest.raises(UsageError, match='started on other data'):
        manifest.differences(path, FACTS | {'dataset': {'train_sha256': 'b'}})


@pytest.mark.parametrize(
    'option,value',
    [
        ('jax_threefry_partitionable', False), ('jax_default_matmul_precision', 'bfloat16'),
        ('jax_default_prng_impl', 'rbg'), ('jax_random_seed_offset', 1),
        ('jax_optimization_level', 'O1'), ('jax_use_direct_linearize', False),
        ('jax_exec_time_optimization_effort', 0.5),
    ],
)  # fmt: skip
def test_another_setting_of_jax_is_refused(path, option, value):
    if not hasattr(jax.config, option):
        pytest.skip(f'jax {jax.__version__} has no {option}')
    before = getattr(jax.config, option)
    jax.config.update(option, value)
    try:
        with pytest.raises(UsageError, match=f'{option.upper()}=.*here it is .*set it as it was'):
            manifest.differences(path, FACTS)
    finally:
        jax.config.update(option, before)


def test_a_setting_of_this_thread_alone_counts(path):
    with jax.default_matmul_precision('bfloat16'), pytest.raises(UsageError, match='PRECISION'):
        manifest.differences(path, FACTS)


@pytest.mark.parametrize(
    'name,value',
    [
        ('XLA_FLAGS', '--xla_cpu_enable_fast_math=true'), ('NVIDIA_TF32_OVERRIDE', '0'),
        ('LIBTPU_INIT_ARGS', '--xla_tpu_x=1'), ('NCCL_ALGO', 'Ring'), ('NPROC', '1'),
        ('CUBLAS_WORKSPACE_CONFIG', ':4096:8'),
    ],
)  # fmt: skip
def test_another_variable_that_xla_reads_is_refused(path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=rf'{name}=None, here it is {value!r}'):
        manifest.differences(path, FACTS)


def test_what_decides_no_bit_is_no_difference(path, monkeypatch):
    flags = (
        '--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=7 '
        '--xla_cpu_collective_call_terminate_timeout_seconds=240'
    )
    monkeypatch.setenv('XLA_FLAGS', flags)
    monkeypatch.setenv('HOME', '/elsewhere')
    monkeypatch.setenv('NCCL_DEBUG', 'INFO')
    monkeypatch.setenv('NCCL_SOCKET_IFNAME', 'eth0')
    with jax.log_compiles(False), jax.numpy_rank_promotion('allow'), jax.debug_nans(True):
        assert manifest.differences(path, FACTS) == []


@pytest.mark.parametrize(
    'change,said',
    [
        ({'cpu': 'Abacus'}, "cpu was 'Abacus', is "),
        ({'cpu_cores': 96}, 'cpu_cores was 96, is '),
        ({'device_kind': 'H100'}, "device_kind was 'H100', is 'cpu'"),
        ({'git': 'abc'}, "git was 'abc', is "),
        ({'versions': {'zerojax': '9', 'jaxlib': '0.1'}}, r"versions\.jaxlib was '0\.1', is "),
        ({'execution': {'runs_at_once': 4}}, r'execution\.runs_at_once was 4, is 1'),
        ({'compiler_options': {'xla_x': 1}}, r'compiler_options\.xla_x was 1, is None'),
    ],
)
def test_another_machine_version_or_execution_is_said(path, change, said):
    fields = json.loads(path.read_text())
    fields['starts'][-1] |= change
    path.write_text(json.dumps(fields))
    assert any(re.match(said, each) for each in manifest.differences(path, FACTS))


def test_a_run_of_a_version_that_did_not_note_settings_is_refused_by_its_version(path):
    fields = json.loads(path.read_text())
    del fields['starts'][-1]['settings']
    fields['starts'][-1]['versions']['zerojax'] = '0.0.1'
    path.write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=r'by zerojax 0\.0\.1, which did not note'):
        manifest.differences(path, FACTS)


def test_an_option_that_only_one_version_of_jax_has_is_no_setting(path):
    fields = json.loads(path.read_text())
    fields['starts'][-1]['settings']['JAX_OF_ANOTHER_VERSION'] = 1
    del fields['starts'][-1]['settings']['EAGER_CONSTANT_FOLDING']
    path.write_text(json.dumps(fields))
    assert manifest.differences(path, FACTS) == []


def test_processors_of_one_name_are_told_apart(monkeypatch):
    one = 'processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nstepping\t: 1\n'
    monkeypatch.setattr(manifest, 'cpuinfo', lambda: f'{one}\n{one}')
    assert manifest.environment()['cpu'] == 'AMD EPYC (cpu family 26, model 2, stepping 1)'
    monkeypatch.setattr(manifest, 'cpuinfo', lambda: 'model name\t: Neoverse')
    assert manifest.environment()['cpu'] == 'Neoverse'
    monkeypatch.setattr(manifest, 'cpuinfo', lambda: '')
    assert manifest.environment()['cpu']
