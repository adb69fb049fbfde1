import json

import pytest

from zerojax.host import records


def test_json_files_are_replaced_whole(tmp_path):
    path = tmp_path / 'summary.json'
    records.write_json(path, {'step': 1})
    with pytest.raises(ValueError, match='JSON'):
        records.write_json(path, {'step': float('inf')})
    assert json.loads(path.read_text()) == {'step': 1}
