import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax._src import compiler

from zerojax.host import compilation_cache
from zerojax.host.compilation_cache import (
    default_folder,
    leave_compilation_cache,
    use_compilation_cache,
)

ROOT = pathlib.Path(__file__).parents[2]
MINIMUM = 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'
COMMAND = [
    sys.executable, '-m', 'zerojax.main', '--config=configs/digits.py', '--config.num_steps=10',
    '--config.model.depth=7',
]  # fmt: skip


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """JAX as it starts without any variable; the user's cache folder is `tmp_path`."""
    names = (
        'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs',
        'jax_persistent_cache_enable_xla_caches',
    )  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    enabled = jax.config.jax_enable_compilation_cache
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', raising=False)
    jax.config.update('jax_compilation_cache_dir', None)
    jax.config.update('jax_enable_compilation_cache', True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.config.update('jax_enable_compilation_cache', enabled)


def test_the_cache_lies_in_the_users_folder_for_caches(settings, tmp_path):
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(default_folder())
    assert default_folder().parent.parent == tmp_path / 'zerojax'
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


@pytest.mark.parametrize('named', [None, '/elsewhere'])
def test_xla_keeps_no_choices_of_its_autotuner_beside_it(settings, named):
    """JAX's cache does not tell apart what was compiled with them from what was not."""
    jax.config.update('jax_compilation_cache_dir', named)
    use_compilation_cache()
    options = compiler.get_compile_options(1, 1)
    debug_options = options.executable_build_options.debug_options
    assert debug_options.xla_gpu_per_fusion_autotune_cache_dir == ''


def test_several_processes_have_none_but_the_one_that_was_named(settings):
    use_compilation_cache()
    leave_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update('jax_compilation_cache_dir', '/elsewhere')
    leave_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == '/elsewhere'


@pytest.mark.parametrize('of_user', [None, '', 'relative'])
def test_without_the_variable_it_lies_in_home(monkeypatch, tmp_path, of_user):
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    if of_user is not None:
        monkeypatch.setenv('XDG_CACHE_HOME', of_user)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert default_folder().parent.parent == tmp_path / '.cache' / 'zerojax'


def test_each_number_of_cpus_has_a_folder_of_its_own(monkeypatch):
    names = set()
    for cores in (1, 2):
        monkeypatch.setattr(compilation_cache, 'usable_cores', lambda cores=cores: cores)
        names.add(default_folder())
    assert len(names) == 2


def test_each_kind_of_cpu_has_a_folder_of_its_own(monkeypatch):
    names = set()
    for flags in ('fpu sse avx2', 'fpu sse avx2 avx512f'):
        text = f'processor : 0\nmodel name : A\nflags : {flags}\ncpu MHz : 1\n\nprocessor : 1\n'
        monkeypatch.setattr(compilation_cache, 'cpuinfo', lambda text=text: text)
        names.add(default_folder())
        changed = text.replace('MHz : 1', 'MHz : 2')  # what changes on one machine
        monkeypatch.setattr(compilation_cache, 'cpuinfo', lambda text=changed: text)
        names.add(default_folder())
    assert len(names) == 2


def test_a_place_or_a_no_that_jax_was_told_is_left_alone(settings, tmp_path):
    jax.config.update('jax_compilation_cache_dir', '/elsewhere')
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == '/elsewhere'
    jax.config.update('jax_compilation_cache_dir', None)
    jax.config.update('jax_enable_compilation_cache', False)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_a_note(settings, monkeypatch, tmp_path, capsys):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    use_compilation_cache()
    said = capsys.readouterr().err
    assert said.startswith('note: programs are compiled anew') and str(tmp_path / 'file') in said
    assert said.count('\n') == 1
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.slow
def test_cold_warm_and_damaged_caches_give_the_same_run(tmp_path):
    variables = {
        'XDG_CACHE_HOME': str(tmp_path / 'cache'),
        **dict.fromkeys(('JAX_COMPILATION_CACHE_DIR', 'JAX_ENABLE_COMPILATION_CACHE', MINIMUM)),
    }
    environment = {k: v for k, v in (os.environ | variables).items() if v is not None}

    def run(name, **more):
        workdir = tmp_path / name
        done = subprocess.run(
            [*COMMAND, f'--workdir={workdir}'], capture_output=True, text=True, cwd=ROOT,
            env=environment | more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        damaged = 'Error reading persistent compilation cache entry' in done.stderr
        assert damaged == (name == 'damaged')
        lines = (workdir / 'metrics.jsonl').read_bytes()
        return json.loads((workdir / 'summary.json').read_text())['params_sha256'], lines

    def entries():
        return {x: x.read_bytes() for x in (tmp_path / 'cache/zerojax').rglob('*-cache')}

    without = run('without', JAX_ENABLE_COMPILATION_CACHE='false')
    assert not (tmp_path / 'cache/zerojax').exists()
    assert run('cold') == without
    made = entries()
    assert any('single_step' in x.name for x in made)
    assert run('warm') == without
    assert entries() == made, 'nothing was compiled that was not there'
    for i, (path, content) in enumerate(made.items()):
        half, flipped = content[: len(content) // 2], bytearray(content)
        flipped[len(flipped) // 2] ^= 1
        path.write_bytes((half, bytes(flipped), b'')[i % 3])
    assert run('damaged') == without
