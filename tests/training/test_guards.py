"""A run that can learn nothing stops and says why."""

from types import SimpleNamespace

import pytest

from malpyeong.training.callbacks import Guards, TrainingStoppedError

GOOD = {"loss": 0.1, "grad_norm": 1.0, "dead_groups": 0.5, "completions/clipped_ratio": 0.5, "reason_length": 0.9}


def feed(guards, *rows):
    for step, row in enumerate(rows, 1):
        state = SimpleNamespace(global_step=step, log_history=[GOOD, *rows[:step]])  # as TRL has it
        guards.on_log(None, state, None, logs=row)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"loss": float("nan")}, "not a number; lower training.learning_rate"),
        ({"grad_norm": float("inf")}, "not a number"),
        ({"dead_groups": 1.0}, "only dead groups"),
        ({"completions/clipped_ratio": 0.51}, "raise training.max_completion_length"),
        ({"reason_length": 0.44}, "less than half the length that they had at first"),
    ],
)
def test_the_same_trouble_three_times_in_a_row_stops(bad, message):
    row = {**GOOD, **bad}
    with pytest.raises(TrainingStoppedError, match=f"stopped at step 4: .*{message}") as stopped:
        feed(Guards(steps=3), GOOD, row, row, row)
    assert stopped.value.exit_code == 3
    feed(Guards(steps=3), row, row, GOOD, row, row)


def test_rows_that_say_nothing_neither_count_nor_reset():
    row = {**GOOD, "dead_groups": 1.0}
    with pytest.raises(TrainingStoppedError):
        feed(Guards(steps=3), row, {"eval_loss": 1.0}, row, {}, row)
