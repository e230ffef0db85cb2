"""Many turns at once with a slow embedder: how long does memory make each wait, and what stays open?

Three measurements, each of a program file (`--program`):

crowd   Threads take turns on a few chats, more chats than may be open; each encode takes `--slow` seconds. The wait is
        the time from a request's start to its arrival at the upstream; what a turn may wait for recall is its deadline.
beside  The embedder stands still. One chat's turn is begun, then another's: the second must not wait for the first.
many    One turn in each of many chats, the program a process with few file handles: open files, threads, stores.

    python tests/bench/contention.py
    python tests/bench/contention.py --program before.py --many 500
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[1:3])

import httpx
from fakes import LocalServer, Server, Upstream
from prefix import percentile, print_table, progress
from prompts import load_program

PROGRAM = Path(__file__).resolve().parents[2] / "persona_memory.py"
DEADLINE, GRACE = 2.0, 0.2  # seconds that a turn may wait for recall, and that everything else may take
MOST_FAILURES = 5  # after which the many chats are given up
PERSONA = {"role": "system", "content": "You are Maren, keeper of the lighthouse on the Teeth."}
MARK = re.compile(r"turn-(\d+)-(\d+)")


class SlowModel:
    """The embedder's model; each encode takes some seconds more, and none ends while `gate` is shut."""

    def __init__(self, model, seconds: float):
        self.model, self.seconds, self.encode_at_once = model, seconds, model.encode
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        model.encode = self.encode  # the rest of the model stays as it is

    def encode(self, *args, **kwargs):
        self.entered.set()
        time.sleep(self.seconds)
        self.gate.wait()
        return self.encode_at_once(*args, **kwargs)


def line(chat: int, turn: int) -> str:
    """A message that no other is like; only its mark is the benchmark's."""
    town = ("Harrowmere", "Saltmarsh", "Thornwick", "Dunmoor")[(chat + turn) % 4]
    return f"turn-{chat}-{turn}: what did I tell you of {town}, and of the {turn * 7 + chat} boats that lay there?"


class Crowd:
    """A program in this process between its clients and an upstream that notes when each turn arrives."""

    def __init__(self, program, open_chats: int, seconds: float):
        self.arrived: dict[tuple[str, ...], float] = {}
        load = program.load_sentence_transformer
        self.model = SlowModel(load("all-MiniLM-L6-v2"), seconds)
        program.load_sentence_transformer = lambda name: self.model.model
        program.faster = lambda model: model
        limit_open_chats(program, open_chats)
        self.folder, self.upstream = tempfile.TemporaryDirectory(), Upstream(reply=self.reply)
        given = {"proxy": True, "host": "127.0.0.1", "port": 0, "data": self.folder.name, "context": 1024}
        settings = program.Settings(upstream=self.upstream.url, upstream_limit=256, summary_every=0, **given)
        self.server = LocalServer(settings)
        self.api = httpx.Client(timeout=120, limits=httpx.Limits(max_connections=None))

    def reply(self, body: dict) -> str:
        self.arrived.setdefault(MARK.findall(body["messages"][-1]["content"])[-1], time.perf_counter())
        return "*She nods, and trims the lamp.*"

    def turn(self, chat: int, turn: int, history: list[dict]) -> tuple[float, str]:
        """Seconds from a turn's request to its arrival at the upstream, and the header of its answer."""
        body = {"model": "fake-model", "messages": [PERSONA, *history, {"role": "user", "content": line(chat, turn)}]}
        started, address = time.perf_counter(), f"{self.server.url}/v1/chat/completions"
        answer = self.api.post(address, json=body, headers={"X-Chat-Id": f"chat {chat}"})
        answer.raise_for_status()
        arrived = self.arrived[str(chat), str(turn)]
        return arrived - started, answer.headers["X-Persona-Memory"]

    def __enter__(self):
        self.server.start()
        return self

    def __exit__(self, *_):
        self.model.gate.set()
        self.api.close()
        self.server.close()
        self.upstream.close()
        self.folder.cleanup()


def limit_open_chats(program, count: int):
    """Has the program keep at most so many chats open beside those in use."""
    registry = getattr(program, "ChatRegistry", None)
    if registry is None:  # as before there was one
        program.OPEN_CHATS = count
    else:
        program.ChatRegistry = functools.partial(registry, most_open=count)


def told(length: int) -> list[dict]:
    """A history that is longer than its share of the prompt, so that turns have something to recall."""
    return [
        {
            "role": ("user", "assistant")[n % 2],
            "content": f"{line(99, n)} I count them each evening, and the lamps too.",
        }
        for n in range(length)
    ]


def crowd(program, args) -> dict:
    """Waits of many threads' turns on few chats."""
    with Crowd(program, args.open, args.slow) as scene, ThreadPoolExecutor(args.threads) as threads:
        start = threading.Barrier(args.threads)

        def play(thread: int) -> list[tuple[float, str]]:
            start.wait()
            chat = thread % args.chats
            return [scene.turn(chat, 1000 * thread + n, told(40)) for n in range(args.turns)]

        rows = [row for rows in threads.map(play, range(args.threads)) for row in rows]
    waits = [wait for wait, _ in rows]
    return {
        "measured": "crowd",
        "turns": len(rows),
        "median s": round(statistics.median(waits), 2),
        "p95 s": round(percentile(waits, 0.95), 2),
        "most s": round(max(waits), 2),
        "may be s": DEADLINE + GRACE,
        "over it": sum(wait > DEADLINE + GRACE for wait in waits),
        "degraded": sum(header.startswith("degraded") for _, header in rows),
    }


def beside(program, args) -> dict:
    """A turn's wait while another chat's stands in the embedder, and the same turn's alone."""
    with Crowd(program, args.open, 0.0) as scene, ThreadPoolExecutor(2) as threads:
        for chat in (1, 2):
            scene.turn(chat, 0, told(40))
        alone = scene.turn(2, 1, told(41))[0]
        scene.model.gate.clear()
        scene.model.entered.clear()
        first = threads.submit(scene.turn, 1, 2, told(42))
        scene.model.entered.wait()
        second = threads.submit(scene.turn, 2, 2, told(43))
        waits = first.result()[0], second.result()[0]
    return {
        "measured": "beside",
        "alone s": round(alone, 2),
        "first s": round(waits[0], 2),
        "second s": round(waits[1], 2),
        "may be s": DEADLINE + GRACE,
    }


def opened(pid: int, data: Path) -> dict:
    """What a process holds: open files, those of chats, and threads."""
    files = []
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            files.append(os.readlink(handle))
    chats = {found[1] for file in files if (found := re.match(rf"{re.escape(str(data))}/chats/([^/]+)/", file))}
    return {"files": len(files), "open chats": len(chats), "threads": len(list(Path(f"/proc/{pid}/task").iterdir()))}


def single_turn(api: httpx.Client, url: str, chat: int) -> str:
    """How a chat's only turn went: "ok", "degraded" or "failed"."""
    body = {"model": "fake-model", "messages": [PERSONA, {"role": "user", "content": line(chat, 1)}]}
    try:
        answer = api.post(f"{url}/v1/chat/completions", json=body, headers={"X-Chat-Id": f"chat {chat}"})
    except httpx.TransportError:
        return "failed"
    if answer.status_code != 200:
        return "failed"
    return "degraded" if answer.headers["X-Persona-Memory"].startswith("degraded") else "ok"


def many(args) -> list[dict]:
    """One turn in each of many chats, with few file handles."""
    rows, limit = [], (args.files, args.files)
    with tempfile.TemporaryDirectory() as folder, Upstream(reply=lambda body: "*She nods.*") as upstream:
        server = Server(folder, upstream.url, "--context", 2048)
        server.command[1] = str(args.program)
        with server, httpx.Client(timeout=30) as api:
            server.wait_ready()
            resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limit)
            counts = {"degraded": 0, "failed": 0}
            started = time.perf_counter()
            for chat in range(1, args.many + 1):
                outcome = single_turn(api, server.url, chat)
                if outcome in counts:
                    counts[outcome] += 1
                given_up = counts["failed"] == MOST_FAILURES
                if chat % (args.many // 10 or 1) == 0 or given_up:
                    held = opened(server.process.pid, Path(folder))
                    rows.append({"chats": chat, **held, **counts, "s": round(time.perf_counter() - started, 1)})
                    progress(str(rows[-1]))
                if given_up:
                    break
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=PROGRAM)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--open", type=int, default=4, help="chats that may be open at once")
    parser.add_argument("--turns", type=int, default=4, help="of each thread")
    parser.add_argument("--slow", type=float, default=0.5, help="seconds that an encode takes")
    parser.add_argument("--many", type=int, default=2000, help="chats of the last measurement; 0 leaves it out")
    parser.add_argument("--files", type=int, default=256, help="file handles that the program has there")
    args = parser.parse_args()
    program = load_program(args.program)
    found = []
    for measure in (crowd, beside):
        found.append(measure(program, args))
        print_table(found[-1:])
    rows = many(args) if args.many else []
    if rows:
        print_table(rows)
    print(json.dumps({"benchmark": "contention", "figures": found, "many": rows}))


if __name__ == "__main__":
    main()
