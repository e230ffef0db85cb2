"""What many messages and many chats cost: starting, opening, importing, vectors, memory and disk.

    python tests/bench/scale.py --data locomo.json
    python tests/bench/scale.py --only start vectors

`start`: seconds from the process's start to /health, to the first turn's answer, and to the first turn with its full
memory, in a chat of 5,000 messages. `open`: seconds of the first turn in a cold chat. `vectors`: messages a second of
an import, and texts a second beside what the encoder does in its best batch. `memory`: the process with 20 open chats
of 1,000 on disk that hold 100,000 messages in all, and a process that has only loaded the encoder.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

from fakes import PATIENCE, PROGRAM, Server, Upstream, wait_until  # noqa: E402
from prefix import print_table, progress  # noqa: E402
from turn import Stock, body, questions, talk, timed  # noqa: E402

import persona_memory as pm  # noqa: E402

BARE = (
    "import persona_memory as pm; pm.faster(pm.load_sentence_transformer('all-MiniLM-L6-v2')).encode(['one text']); "
    "print(open('/proc/self/status').read())"
)


def resident(status: str) -> int:
    """MB of memory, of a Linux process's status."""
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024


def start(stock: Stock, given) -> dict:
    """The seconds from the start of the program."""
    messages, asked = stock.messages[:5000], questions()
    with tempfile.TemporaryDirectory() as data, Upstream() as upstream, httpx.Client() as client:
        stock.folder(data, 5000)
        server = Server(data, upstream.url, "--context", 8192)
        begun = time.perf_counter()
        with server:
            found = {"/health s": round(time.perf_counter() - begun, 2)}
            timed(client, f"{server.url}/v1", body(messages, next(asked)))
            found["first turn s"] = round(time.perf_counter() - begun, 2)
            wait_until(lambda: "degraded" not in timed(client, f"{server.url}/v1", body(messages, next(asked)))[1])
            found["full memory s"] = round(time.perf_counter() - begun, 2)
    return found


def opening(stock: Stock, given) -> dict:
    """Seconds of the first turn in a cold chat, what it was without, and the chat's size on disk."""
    found = {}
    for count in given.messages:
        messages, asked = stock.messages[:count], questions()
        with tempfile.TemporaryDirectory() as data, Upstream() as upstream, httpx.Client() as client:
            stock.folder(data, count)
            files = [f for f in Path(data, "chats").rglob("*") if f.is_file()]
            found[f"{count} disk MB"] = round(sum(f.stat().st_size for f in files) / 1e6, 1)
            found[f"{count} files"] = len(files)
            with Server(data, upstream.url, "--context", 8192) as server:
                server.wait_ready()
                taken, header = timed(client, f"{server.url}/v1", body(messages, next(asked)))
                found[f"{count} first turn s"] = round(taken / 1000, 2)
                found[f"{count} degraded"] = int("degraded" in header)
                found[f"{count} second s"] = round(
                    timed(client, f"{server.url}/v1", body(messages, next(asked)))[0] / 1000, 2
                )
    return found


def batch_rate(model, texts: list[str]) -> float:
    """Texts a second of a model that does nothing else."""
    begun = time.perf_counter()
    model.encode(texts, batch_size=32, show_progress_bar=False)
    return len(texts) / (time.perf_counter() - begun)


def vectors(stock: Stock, given) -> dict:
    """How fast an import's vectors are made."""
    messages = stock.messages[: given.imported]
    texts = [m["content"] for m in messages]
    parts = [part for text in texts for part in pm.sentences(text)]
    with tempfile.TemporaryDirectory() as data:
        memory = pm.PersonaMemory(pm.Settings(data=data, upstream="http://127.0.0.1:9/v1"))
        memory.embedder = memory.vectors.embedder = stock.embedder
        memory.vectors.later = lambda chat, ids: None
        model = pm.faster(pm.load_sentence_transformer("all-MiniLM-L6-v2"))
        before = batch_rate(model, [*texts, *parts])
        begun = time.perf_counter()
        memory.archive.append("c", messages)
        written = time.perf_counter()
        sum(memory.vectors.of_chat("c"))
        taken = time.perf_counter() - written
        memory.registry.close()
    best = (before + batch_rate(model, [*texts, *parts])) / 2  # around it: a machine is not always equally fast
    mine = (len(texts) + len(parts)) / taken
    return {
        "written messages/s": round(len(texts) / (written - begun)), "vectors messages/s": round(len(texts) / taken),
        "texts/s": round(mine), "encoder's best texts/s": round(best), "share": round(mine / best, 2),
    }  # fmt: skip


def memory(stock: Stock, given) -> dict:
    """MB of the program with many chats."""
    with tempfile.TemporaryDirectory() as data, Upstream() as upstream, httpx.Client() as client:
        stock.folder(data, given.chats * 100, given.chats)
        with Server(data, upstream.url, "--context", 8192) as server:
            server.wait_ready()
            for n, question in zip(range(20), questions(), strict=False):
                request = body(stock.messages[n * 100 : (n + 1) * 100], question) | {"chat_id": f"chat-{n}"}
                client.post(f"{server.url}/v1/chat/completions", json=request, timeout=PATIENCE).raise_for_status()
            mine = resident(Path(f"/proc/{server.process.pid}/status").read_text())
    done = subprocess.run([sys.executable, "-c", BARE], cwd=PROGRAM.parent, capture_output=True, text=True, check=True)
    bare = resident(done.stdout)
    return {"program MB": mine, "bare encoder MB": bare, "above it MB": mine - bare}


PARTS = {"start": start, "open": opening, "vectors": vectors, "memory": memory}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, nargs="+", default=[10_000, 100_000], help="of the chats to open")
    parser.add_argument("--imported", type=int, default=2000, help="messages whose vectors are made")
    parser.add_argument("--chats", type=int, default=1000, help="of 100 messages each")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", type=Path, help="a file of recorded conversations (LoCoMo's form)")
    given = parser.parse_args()
    embedder = pm.Embedder("all-MiniLM-L6-v2")
    embedder.encode(["loads it"], priority=pm.BACKGROUND)  # as a turn it would make slices short for half a minute
    stock = Stock(talk(max(*given.messages, 100 * given.chats, 5000), given.data), embedder)
    found = {}
    for part in given.only:
        progress(part)
        found[part] = PARTS[part](stock, given)
    print_table(
        [{"part": part, "figure": name, "": value} for part, row in found.items() for name, value in row.items()]
    )
    print(json.dumps({"benchmark": "scale", **found}))


if __name__ == "__main__":
    main()
