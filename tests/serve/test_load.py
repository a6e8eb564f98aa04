"""More requests than there is room for, all at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.serve_load import measure
from malpyeong.samples import TINY_BASE


@pytest.mark.slow
def test_every_request_of_many_is_answered_or_refused():
    options = ("--queue", "48", "--timeout", "60", "--max-new-tokens", "64", "--dtype", "float32")
    with ThreadPoolExecutor(1) as thread:  # the browser of other tests has an event loop in this one
        rounds, peaks = thread.submit(measure, str(TINY_BASE), 200, 2, *options).result()
    for statuses in rounds:
        assert sum(statuses.values()) == 200
        assert set(statuses) <= {"200", "429", "504", "timed out while streaming"}
        assert statuses["200"]
        assert statuses["429"]
    assert peaks[2] - peaks[1] < 100, "the second round took memory that the first one did not"
