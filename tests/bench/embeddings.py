"""What a turn takes while clients ask for embeddings, as Vector Storage does with a long chat.

    python tests/bench/embeddings.py --clients 20 --turns 20

Prints what a turn adds, in milliseconds (median and worst), alone and beside so many clients that ask without a pause,
and how many of their requests were answered meanwhile. What it adds is its time less that of the same request straight
to the upstream. The program runs in a process of its own, as it does everywhere, and so do the clients.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

from fakes import PATIENCE, Server, Upstream  # noqa: E402

PAUSE = 0.4  # seconds before each turn, as in turn.py: nobody reads and writes faster
SHOWN = [
    {"role": ("user", "assistant")[n % 2], "content": f"Line {n} of the log: the lamp is lit and the sea is loud."}
    for n in range(40)
]


def timed(client: httpx.Client, url: str, number: int) -> float:
    """Milliseconds until a turn of the chat is answered."""
    question = {"role": "user", "content": f"What was said on night number {number}?"}
    body = {"model": "m", "messages": [*SHOWN, question], "chat_id": "bench"}
    begun = time.perf_counter()
    client.post(f"{url}/chat/completions", json=body, timeout=PATIENCE).raise_for_status()
    return 1000 * (time.perf_counter() - begun)


def added(client: httpx.Client, urls: tuple[str, str], numbers: itertools.count, turns: int) -> list[float]:
    """Milliseconds that each turn took longer than the same request straight to the upstream."""
    found = []
    for number in itertools.islice(numbers, turns):
        time.sleep(PAUSE)
        alone = timed(client, urls[1], number)
        found.append(timed(client, urls[0], number) - alone)
    return found


def embed(url: str, clients: int, over, answered) -> None:
    """So many clients ask for embeddings, of one text and of five in turns, until it is over."""

    def ask(name: int) -> None:
        with httpx.Client(timeout=PATIENCE) as client:
            for number in itertools.count():
                texts = [f"Note {name} {number} {n}: the keeper counts the boats and the wind." for n in range(5)]
                body = {"input": texts if number % 2 else texts[0]}
                client.post(f"{url}/v1/embeddings", json=body).raise_for_status()
                with answered.get_lock():
                    answered.value += 1
                if over.is_set():
                    return

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def show(words: str, found: list[float]) -> float:
    """Prints the median and the worst; returns the median."""
    print(f"{words}: median {statistics.median(found):.0f} ms, worst {max(found):.0f} ms")
    return statistics.median(found)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--turns", type=int, default=20)
    given = parser.parse_args()
    over, answered = multiprocessing.Event(), multiprocessing.Value("i", 0)
    with Upstream() as fake, tempfile.TemporaryDirectory() as data, Server(data, fake.url) as server:
        server.wait_ready()
        urls, numbers = (f"{server.url}/v1", fake.url), itertools.count()
        clients = multiprocessing.Process(target=embed, args=(server.url, given.clients, over, answered))
        with httpx.Client() as client:
            added(client, urls, numbers, 5)  # vectors of what the chat shows
            alone = show("a turn alone adds", added(client, urls, numbers, given.turns))
            clients.start()
            beside = show(f"beside {given.clients} clients", added(client, urls, numbers, given.turns))
        over.set()
        clients.join()
        print(f"{beside / alone:.2f} times as much; {answered.value} requests for embeddings answered meanwhile")


if __name__ == "__main__":
    main()
