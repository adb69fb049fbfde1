import json

import pytest

from zerojax.host import manifest
from zerojax.host.errors import UsageError


def test_the_manifest_keeps_every_start(tmp_path):
    path = tmp_path / 'manifest.json'
    facts = {'execution': {'steps_per_call': 5}, 'dataset': {'train_sha256': 'a'}}
    manifest.add_start(path, 0, facts)
    manifest.add_start(path, 7, facts)
    with pytest.raises(UsageError, match='started on other data'):
        manifest.add_start(path, 9, facts | {'dataset': {'train_sha256': 'b'}})
    found = json.loads(path.read_text())
    assert [start['step'] for start in found['starts']] == [0, 7]
    assert found['execution'] == {'steps_per_call': 5}
    assert {'jax', 'jaxlib', 'flax', 'zerojax'} <= found['versions'].keys()
    assert found['backend'] == 'cpu'
    assert found['device_count'] == 2


def test_a_damaged_manifest_is_refused(tmp_path):
    (tmp_path / 'manifest.json').write_text('{')
    with pytest.raises(UsageError, match=r'manifest\.json cannot be read'):
        manifest.add_start(tmp_path / 'manifest.json', 0, {})
