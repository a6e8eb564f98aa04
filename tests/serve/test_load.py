"""More requests than there is room for, all at once."""

import pytest

from benchmarks.serve_load import measure
from malpyeong.samples import TINY_BASE


@pytest.mark.slow
def test_every_request_of_many_is_answered_or_refused():
    options = ("--queue", "48", "--timeout", "60", "--max-new-tokens", "64", "--dtype", "float32")
    rounds, peaks = measure(str(TINY_BASE), 200, 2, *options)
    for statuses in rounds:
        assert sum(statuses.values()) == 200
        assert set(statuses) <= {"200", "429", "504", "timed out while streaming"}
        assert statuses["200"]
        assert statuses["429"]
    assert peaks[2] - peaks[1] < 100, "the second round took memory that the first one did not"
