"""What a turn takes while clients ask for embeddings, as Vector Storage does with a long chat.

    python tests/bench/embeddings.py --clients 20 --turns 20

Prints milliseconds of a turn (median and worst) alone and beside so many clients that ask without a pause, and how many
of their requests were answered meanwhile. The upstream answers at once.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

from fakes import PATIENCE, LocalServer, Upstream, settings  # noqa: E402

SHOWN = [
    {"role": ("user", "assistant")[n % 2], "content": f"Line {n} of the log: the lamp is lit and the sea is loud."}
    for n in range(40)
]


def turn(url: str, number: int) -> float:
    """Seconds until a turn of the chat is answered."""
    question = {"role": "user", "content": f"What was said on night number {number}?"}
    begun = time.perf_counter()
    body = {"model": "m", "messages": [*SHOWN, question], "chat_id": "bench"}
    httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE).raise_for_status()
    return time.perf_counter() - begun


def embed(url: str, client: int, over: threading.Event, answered: list[int]) -> None:
    """Asks for embeddings, of one text and of five in turns, until it is over."""
    for number in itertools.count():
        texts = [f"Note {client} {number} {n}: the keeper counts the boats and writes down the wind." for n in range(5)]
        body = {"input": texts if number % 2 else texts[0]}
        httpx.post(f"{url}/v1/embeddings", json=body, timeout=PATIENCE).raise_for_status()
        answered.append(client)
        if over.is_set():
            return


def show(words: str, seconds: list[float]) -> None:
    """Prints the median and the worst."""
    print(f"{words}: median {1000 * statistics.median(seconds):.0f} ms, worst {1000 * max(seconds):.0f} ms")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--turns", type=int, default=20)
    given = parser.parse_args()
    with Upstream() as fake, tempfile.TemporaryDirectory() as data, LocalServer(settings(data, fake.url)) as server:
        numbers = itertools.count()
        for _ in range(5):  # vectors of what the chat shows
            turn(server.url, next(numbers))
        show("a turn alone", [turn(server.url, next(numbers)) for _ in range(given.turns)])
        over, answered = threading.Event(), []
        clients = [threading.Thread(target=embed, args=(server.url, n, over, answered)) for n in range(given.clients)]
        for client in clients:
            client.start()
        show(f"beside {given.clients} clients", [turn(server.url, next(numbers)) for _ in range(given.turns)])
        over.set()
        for client in clients:
            client.join()
        print(f"{len(answered)} requests for embeddings answered meanwhile")


if __name__ == "__main__":
    main()
