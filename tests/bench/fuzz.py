"""Requests that nobody should send, by schemathesis and hypothesis, to the program as a process. Prints figures.

python tests/bench/fuzz.py [REQUESTS]
"""

import contextlib
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

from fakes import Server, Upstream  # noqa: E402
from fuzzing import Fuzz  # noqa: E402
from hostile import held  # noqa: E402

ROUND = 500
SETTLED = 2000  # requests after which the program's memory is taken as its usual


def main(count: int = 20_000) -> None:
    """Sends so many requests, in rounds; prints how memory goes on, and at the end what was wrong."""
    started, settled = time.monotonic(), 0.0
    with contextlib.ExitStack() as held_open:
        data, upstream = map(held_open.enter_context, (tempfile.TemporaryDirectory(), Upstream()))
        running = held_open.enter_context(Server(Path(data), upstream.url))
        running.wait_ready()
        fuzz = held_open.enter_context(Fuzz(running.url))
        for number in range(count):
            fuzz.run(ROUND, number)
            upstream.requests.clear()
            memory = held(running.process.pid)["MB"]
            settled = settled if settled or fuzz.sent < SETTLED else memory
            seconds = time.monotonic() - started
            print(f"{fuzz.sent} requests, {seconds:.0f} s, {memory:.0f} MB, {len(fuzz.wrong)} wrong", flush=True)
            if fuzz.sent >= count:
                break
        tracebacks = running.log().count("Traceback (most recent call last)")
    print(f"{fuzz.sent} requests: {dict(sorted(fuzz.statuses.items()))}")
    print(f"{fuzz.statuses[500]} x 500, {tracebacks} tracebacks, {len(fuzz.wrong)} wrong")
    if settled:
        growth = 100 * (memory / settled - 1)
        print(f"memory after {SETTLED}: {settled:.0f} MB, at the end: {memory:.0f} MB ({growth:+.1f} %)")
    for line, times in Counter(line[:400] for line in fuzz.wrong).most_common(50):
        print(f"{times:5} {line}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
