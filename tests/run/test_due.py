"""How many steps one call may take."""

from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from zerojax.run.train import steps_to_next_due

COUNT = st.integers(1, 40)


@given(st.data())
def test_calls_end_where_something_is_due_and_nowhere_short_of_it(data):
    """Every step at which an epoch ends or something is logged, evaluated or saved is the last of
    a call; all other calls have `steps_per_call` steps."""
    names = ('steps_per_call', 'log_every_steps', 'eval_every_steps', 'checkpoint_every_steps')
    config = ConfigDict({name: data.draw(COUNT) for name in names})
    config.num_steps = data.draw(st.integers(1, 100))
    config.keep_checkpoints_at = tuple(data.draw(st.lists(st.integers(0, config.num_steps))))
    epoch = data.draw(COUNT)
    due = {config.num_steps, *config.keep_checkpoints_at}
    for period in (epoch, *(config[name] for name in names[1:])):
        due.update(range(period, config.num_steps, period))
    step, ends = 0, set()
    while step < config.num_steps:
        count = steps_to_next_due(step, config, epoch)
        assert 1 <= count <= config.steps_per_call
        step += count
        assert step in due or count == config.steps_per_call
        ends.add(step)
    assert due - {0} <= ends
