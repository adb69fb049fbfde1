"""What is said of another's exception."""

import pytest

from zerojax.host.errors import first_line


@pytest.mark.parametrize(
    'error, line',
    [
        (ValueError('first\nsecond'), 'first'),
        (ValueError('\n first\n'), 'first'),
        (ValueError(), 'ValueError'),
        (RuntimeError(' \n'), 'RuntimeError'),
    ],
)
def test_the_first_line_is_never_empty(error, line):
    assert first_line(error) == line
