"""What the program bears: idle connections, half-sent requests, damaged files. Prints figures.

python tests/bench/hostile.py connections [IDLE] [HALF]
python tests/bench/hostile.py corruptions [ROUNDS]
"""

import contextlib
import resource
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

import httpx  # noqa: E402
from fakes import Server, Upstream, say  # noqa: E402

import persona_memory as pm  # noqa: E402


def held(pid: int) -> dict:
    """What a process holds: megabytes in RAM, threads, open files."""
    proc = Path(f"/proc/{pid}")
    pages = int((proc / "statm").read_text().split()[1])
    counts = {name: len(list((proc / place).iterdir())) for name, place in (("threads", "task"), ("files", "fd"))}
    return {"MB": pages * resource.getpagesize() / 2**20, **counts}


def connections(idle: int = 1000, half: int = 200) -> None:
    """Opens so many sockets that ask nothing, and so many that stop in the middle of asking; times what others get."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, idle + half + 500), hard))
    with tempfile.TemporaryDirectory() as data, Upstream() as upstream, contextlib.ExitStack() as held:
        running = held.enter_context(Server(Path(data) / "data", upstream.url))
        address = urlsplit(running.url)
        for number in range(idle + half):
            sock = held.enter_context(socket.create_connection((address.hostname, address.port), 60))
            if number >= idle:
                sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
        calls = {
            "health": lambda: httpx.get(f"{running.url}/health", timeout=120),
            "page": lambda: httpx.get(f"{running.url}/", timeout=120),
            "turn": lambda: say(running.url, [{"role": "user", "content": "Hello."}], chat_id="tale"),
        }
        for name, call in calls.items():
            started = time.monotonic()
            call()
            print(f"{idle} idle, {half} half-sent: {name} after {time.monotonic() - started:.2f} s")


def corruptions(rounds: int = 250) -> None:
    """Damages each kind of file so many times; counts how often the other chat had its memory at once, and what became
    of the damaged one."""
    from test_damage import corrupt, file_of, written

    for part in ("chats", "catalogue", "characters"):
        counts = Counter()
        for number in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder)
                memory = written(data)
                corrupt(file_of(data, "hurt") if part == "chats" else pm.database_of(data / part), number)
                for _ in range(2):
                    try:
                        memory.archive.append("well", [{"role": "user", "content": "It goes on."}])
                        counts["other chat at once" if not _ else "other chat at the second try"] += 1
                        break
                    except pm.StoreError:
                        continue
                try:
                    counts["messages of the damaged chat"] += memory.describe("hurt", mood=False)["branch_length"]
                    counts["damaged chat usable"] += 1
                except pm.PersonaMemoryError as error:
                    counts[type(error).__name__] += 1
                memory.registry.delete("hurt")
                counts["deleted"] += 1
                memory.close()
        print(part, rounds, dict(counts))


if __name__ == "__main__":
    {"connections": connections, "corruptions": corruptions}[sys.argv[1]](*map(int, sys.argv[2:]))
