"""Requests that nobody should send, made from /openapi.json and by breaking sound ones. `bench/fuzz.py` sends many."""

from fuzzing import Fuzz

REQUESTS = 240


def test_no_request_brings_about_what_nobody_declared(shared_server, caplog):
    """No 500, no status or content that the document does not have, no traceback, no turn without its memory."""
    with Fuzz(shared_server.url) as fuzz:
        fuzz.run(REQUESTS)
    assert fuzz.wrong == []
    assert [r.getMessage() for r in caplog.records if r.exc_info] == []
    assert fuzz.sent > REQUESTS / 2 and {200, 400, 404} <= fuzz.statuses.keys()
