"""What memory adds to a turn: the same request through the program and straight to the upstream, one after the other.

    python tests/bench/turn.py --data locomo.json                  chats of 100, 1,000, 10,000 and 100,000 messages
    python tests/bench/turn.py --messages 100 10000 --turns 30     of made talk

Each chat is stored before, its vectors with it; the client shows its newest messages under a chat id. `calm` turns come
when nothing else runs and the chat's summaries are made, `busy` ones while the vectors of another chat are made.
`split` says where in the program the thread of a calm turn was, sampled every half millisecond and by room
("Embedding" is the wait for the encode).
`scoring` is what finding and scoring all messages and choosing the candidates takes after a new message, without the
encode. The time of one encode is printed too: by the program, and by sentence-transformers alone, as it comes. The
figures that this program's ancestor was specified with: emotion 10 to 20 ms, retrieval 50 to 100, context 20 to 50,
storage 50 to 100.

Talk repeats: the copies of a text have another last word, and its vectors with a little noise, so that a chat of
100,000 messages is stocked in a minute.
"""

import argparse
import bisect
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx

# As the program does it: numpy reads this when it is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
import numpy as np  # noqa: E402

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

from fakes import PATIENCE, PROGRAM, Server, Upstream  # noqa: E402
from prefix import PERSONA, conversation_messages, percentile, print_table, progress, roleplay  # noqa: E402

import persona_memory as pm  # noqa: E402

SHOWN = 60  # messages that the client shows
BUSY = 3000  # messages of the chat whose vectors are made beside
NOISE = 0.1  # length of what is added to a copied vector
TOPICS = ("the camping trip", "the painting class", "the old dog", "the concert", "my grandmother", "the new job")
PAUSE = 0.4  # seconds before each turn, in which the vectors of the one before are made: nobody reads and writes faster
APPENDED = 2000  # messages to a request
ROOM = re.compile(r"^# =+\n# (.+)\n# =+$", re.M)


def talk(count: int, data: Path | None) -> list[dict]:
    """So many messages, user and assistant in turns; later copies of a text end with another word."""
    if data:
        recorded = json.loads(data.read_text("utf-8"))["conversations"]
        texts = [m["content"] for conversation in recorded for m in conversation_messages(conversation)]
    else:
        texts = [m["content"] for m in roleplay(1000)]
    copies = (f"{text} ({n})" if n else text for n in itertools.count() for text in texts)
    return [{"role": pm.CHAT_ROLES[i % 2], "content": t} for i, t in enumerate(itertools.islice(copies, count))]


class Stock:
    """Makes data folders that hold chats with their vectors."""

    def __init__(self, messages: list[dict], embedder: pm.Embedder):
        self.messages, self.embedder = messages, embedder
        self.random = np.random.default_rng(1)
        self.known: dict[str, np.ndarray] = {}  # by text, without a copy's last word

    def vectors(self, texts: list[str]) -> np.ndarray:
        """Unit vectors of texts; a copy has its original's with noise."""
        plain = [re.sub(r" \(\d+\)$", "", text) for text in texts]
        if fresh := [text for text in dict.fromkeys(plain) if text not in self.known]:
            self.known |= zip(fresh, self.embedder.encode(fresh, priority=pm.BACKGROUND), strict=True)
        found = np.stack([self.known[text] for text in plain])
        noise = self.random.standard_normal(found.shape).astype(np.float32)
        found = found + NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def fill(self, memory: pm.PersonaMemory, chat_id: str, messages: list[dict]) -> None:
        """Appends messages to a chat, and stores the vectors of their texts and sentences."""
        for some in pm.batches(messages, APPENDED):
            texts = [m["content"] for m in some]
            whole = dict(zip(texts, self.vectors(texts), strict=True))
            split = {text: pm.sentences(text) for text in texts}
            parts = iter(self.vectors([part for some in split.values() for part in some]))
            rows = {text: np.stack([next(parts) for _ in some]) for text, some in split.items() if some}
            codes = {text: pm.vector_codes(some) for text, some in rows.items()}
            memory.archive.append(chat_id, some)
            with memory.registry.borrow(chat_id) as chat, chat.lock:
                digests = {m["content"]: pm.text_fingerprint(None, m["content"]) for m in some}
                chat.store.put_vectors(self.embedder.key, {digests[t]: v for t, v in whole.items()})
                chat.store.put_sentence_codes(self.embedder.key, {digests[t]: v for t, v in codes.items()})

    def folder(self, folder: str, count: int, chats: int = 1) -> None:
        """A data folder with so many messages in so many chats `chat-<n>`."""
        memory = pm.PersonaMemory(pm.Settings(data=folder, upstream="http://127.0.0.1:9/v1"))
        memory.vectors.later = lambda chat, ids: None
        memory.vectors.embedder = self.embedder
        each = count // chats
        for n in range(chats):
            self.fill(memory, f"chat-{n}", self.messages[n * each : (n + 1) * each])
            with memory.registry.borrow(f"chat-{n}") as chat:
                chat.keep_derived(lambda: False)  # as the background does after an import
                memory.feelings.read_ahead(chat, chat.path(), lambda: False)
        memory.registry.catalogue.note_embedder(self.embedder.key)  # else the program looks through all vectors first
        memory.registry.close()


def body(messages: list[dict], question: str) -> dict:
    """A turn's request."""
    shown = [{"role": "system", "content": PERSONA}, *messages[-SHOWN:], {"role": "user", "content": question}]
    return {"model": "m", "messages": shown, "chat_id": "chat-0"}


def questions():
    """Questions, no two alike."""
    return (f"Do you remember what I said about {TOPICS[n % len(TOPICS)]}, time {n}?" for n in itertools.count())


def timed(client: httpx.Client, url: str, request: dict) -> tuple[float, str]:
    """Milliseconds of a request, and its memory header."""
    begun = time.perf_counter()
    answer = client.post(f"{url}/chat/completions", json=request, timeout=PATIENCE).raise_for_status()
    return 1000 * (time.perf_counter() - begun), answer.headers.get("x-persona-memory", "")


def added(client, urls, messages, asked, turns) -> tuple[list[float], int]:
    """Milliseconds that each turn took longer than its twin, and how many turns were degraded."""
    found, degraded = [], 0
    for _ in range(turns):
        time.sleep(PAUSE)
        request = body(messages, next(asked))
        alone, _ = timed(client, urls[1], request)
        through, header = timed(client, urls[0], request)
        found.append(through - alone)
        degraded += "degraded" in header
    return found, degraded


def rooms() -> tuple[list[int], list[str]]:
    """The lines at which the program's rooms begin, and their names."""
    text = PROGRAM.read_text("utf-8")
    found = [(text.count("\n", 0, m.start()) + 1, m[1]) for m in ROOM.finditer(text)]
    return [line for line, _ in found], [name for _, name in found]


def split(memory: pm.PersonaMemory, messages: list[dict], asked, turns: int) -> dict[str, float]:
    """Milliseconds a turn that its thread spent in each room, the innermost frame of the program's counting."""
    starts, names = rooms()
    counts, over, thread, spent = Counter(), threading.Event(), threading.get_ident(), 0.0
    running = threading.Event()

    def sample() -> None:
        while not over.wait(0.0005):
            running.wait()
            frame = sys._current_frames()[thread]
            while frame and frame.f_code.co_filename != pm.__file__:
                frame = frame.f_back
            if frame and frame.f_lineno:
                counts[names[bisect.bisect(starts, frame.f_lineno) - 1]] += 1

    memory.builder.prepare(body(messages, next(asked)), "chat-0", pm.Call(""))
    sampler = threading.Thread(target=sample)
    sampler.start()
    for _ in range(turns):
        time.sleep(PAUSE)
        running.set()
        begun = time.perf_counter()
        memory.record(memory.builder.prepare(body(messages, next(asked)), "chat-0", pm.Call("")), ["I do."])
        spent += 1000 * (time.perf_counter() - begun) / turns
        running.clear()
    over.set()
    running.set()
    sampler.join()
    return {room: round(spent * n / counts.total(), 1) for room, n in counts.most_common(8)}


def scoring(memory: pm.PersonaMemory, asked, turns: int) -> float:
    """Milliseconds, median, from a question and its vector to the memories it may recall, in a chat with one more
    message than the question before had."""
    found, ask = [], memory.embedder.encode
    with memory.registry.borrow("chat-0") as chat, chat.lock:
        nodes = chat.tree.branch(chat.store.head)
        feeling = memory.feelings.read(chat, nodes[-1:])[0]
        for n in range(turns):
            branch = nodes[: len(nodes) - turns + n]
            index = chat.follow(branch, memory.embedder)
            query = pm.understand(next(asked), "", index.speakers, index.now)
            vector = ask([], queries=[query.spoken])[0]
            begun = time.perf_counter()
            index.look_up(query.words, memory.embedder.word_vectors)
            scores = pm.weigh(query, index.evidence(query.words, vector, None, memory.embedder.word_vectors))
            chosen = pm.admissible(query, scores["score"])
            pm.with_newest_first(memory.recaller._memories(chat, branch, scores, chosen, feeling), index, query, vector)
            found.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(found), 1)


def measure(stock: Stock, count: int, turns: int) -> list[dict]:
    """The rows of one chat length."""
    messages, rows = stock.messages[:count], []
    with tempfile.TemporaryDirectory() as data, Upstream() as upstream, httpx.Client() as client:
        stock.folder(data, count)
        asked = questions()
        with Server(data, upstream.url, "--context", 8192) as server:
            server.wait_ready()
            urls = (f"{server.url}/v1", upstream.url)
            added(client, urls, messages, asked, 3)  # opens the chat, and has its story begun
            while any(row["waiting"] for row in server.answers()["progress"]["work"]):
                time.sleep(PAUSE)
            calm, degraded = added(client, urls, messages, asked, turns)
            rows.append(row(count, "calm", calm, degraded))
            busy = [{"role": "user", "content": f"{m['content']} And so on."} for m in stock.messages[:BUSY]]
            address = f"{server.url}/api/persona_memory/chats/other/messages"
            client.post(address, json={"messages": busy}, timeout=PATIENCE).raise_for_status()
            found, degraded = added(client, urls, messages, asked, turns)
            rows.append(row(count, "busy", found, degraded))
        given = pm.Settings(data=data, upstream=upstream.url, proxy=True, context=8192, summary_every=0, model="m")
        memory = pm.PersonaMemory(given)
        memory.embedder.close()
        memory.embedder = memory.vectors.embedder = stock.embedder
        rows[0]["split"] = split(memory, messages, asked, turns)
        rows[0]["scoring"] = scoring(memory, asked, turns)
        memory.registry.close()
    return rows


def row(count: int, state: str, found: list[float], degraded: int) -> dict:
    return {
        "messages": count, "state": state, "added ms": round(statistics.median(found), 1),
        "least": round(min(found), 1), "90 %": round(percentile(found, 0.9), 1), "degraded": degraded, "split": {},
    }  # fmt: skip


def encode_ms(encode: Callable[[list[str]], object], texts: Iterable[str]) -> float:
    """Milliseconds of the encode of one text, median."""
    found = []
    for text in itertools.islice(texts, 30):
        begun = time.perf_counter()
        encode([text])
        found.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(found), 1)


def encodes(embedder: pm.Embedder, messages: list[dict]) -> dict[str, float]:
    """Milliseconds of one encode: by the program, and by sentence-transformers alone as it comes, of a question and of
    a message."""
    import torch

    ours = encode_ms(lambda texts: embedder.encode([], queries=texts), questions())
    bare = pm.load_sentence_transformer("all-MiniLM-L6-v2").encode
    torch.set_num_threads(os.cpu_count() or 1)
    return {
        "program": ours, "bare, a question": encode_ms(bare, questions()),
        "bare, a message": encode_ms(bare, (m["content"] for m in messages)),
    }  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--data", type=Path, help="a file of recorded conversations (LoCoMo's form)")
    given = parser.parse_args()
    embedder = pm.Embedder("all-MiniLM-L6-v2")
    embedder.encode(["loads it"])
    stock, rows = Stock(talk(max(*given.messages, BUSY), given.data), embedder), []
    for count in given.messages:
        progress(f"{count} messages")
        rows += measure(stock, count, given.turns)
        progress("\n".join(map(json.dumps, rows[-2:])))
    encode = encodes(embedder, stock.messages)
    print_table([{k: v for k, v in found.items() if k not in ("split", "scoring")} for found in rows])
    for found in rows:
        if found["split"]:
            print(f"{found['messages']} messages, ms a turn by room: {found['split']}; scoring: {found['scoring']}")
    print(f"ms of one encode: {encode}")
    print(json.dumps({"benchmark": "turn", "encode_ms": encode, "rows": rows}))


if __name__ == "__main__":
    main()
