"""What the program bears: idle connections, half-sent requests, damaged files. Prints figures.

python tests/bench/hostile.py connections [IDLE] [HALF]
python tests/bench/hostile.py watchdog [CHARACTERS] [SECONDS]
python tests/bench/hostile.py streams [STREAMS] [POLLS] [IDLE]
python tests/bench/hostile.py soak [MINUTES] [MESSAGES A MINUTE] [MEGABYTES OF OPEN CHATS] [CHATS]
python tests/bench/hostile.py rooms [MESSAGES] [CHATS] [SENTENCES]
python tests/bench/hostile.py corruptions [ROUNDS] [chats] [catalogue] [characters]
"""

import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import resource
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import urlsplit

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

import httpx  # noqa: E402
import numpy as np  # noqa: E402
from fakes import LocalServer, Server, Upstream, say, settings  # noqa: E402
from hostiles import SEEDS, chat_file, repeated, turn  # noqa: E402

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


def hostile_requests(length: int) -> Iterator[tuple[str, str, bytes]]:
    """A name, a path and a body for each: texts of that length in turns and chat files, JSON that is hard to read."""
    for name, raw in (
        ("deep", b"[" * 30 * length), ("values", b"[" + b"[]," * (pm.MOST_VALUES - 1) + b"1]"),
        ("objects", b"[" + b'{"a":1},' * (pm.MOST_VALUES - 1) + b"1]"), ("digits", b"9" * 10 * length),
        ("escapes", b'"' + b"\\u00e9" * 10 * length + b'"'), ("too many values", b"[" + b"1," * 20 * length + b"1]"),
        ("names", json.dumps({str(number): "" for number in range(pm.MOST_VALUES - 1)}).encode()),
        ("messages", json.dumps({"messages": turn('"' * length)["messages"] * 9}).encode()),
    ):  # fmt: skip
        yield f"JSON: {name}", "/v1/chat/completions", raw
    yield "an export", "/api/persona_memory/import", long_export(length // 50)
    for seed in SEEDS:
        text = repeated(seed, length)
        yield f"a turn of {seed!r}", "/v1/chat/completions", json.dumps(turn(text)).encode()
        yield f"a file of {seed!r}", "/api/persona_memory/import", chat_file(repeated(seed, length // 4))


def long_export(count: int) -> bytes:
    """An export of a chat of so many messages, as one value on one line."""
    rows = [asdict(message) for message in some_messages(count)]
    chat = {"chat_id": "long", "explicit": True, "head": rows[-1]["id"]}
    return json.dumps({"format": pm.EXPORT_FORMAT, "version": pm.EXPORT_VERSION, "chat": chat, "messages": rows,
                       "summaries": [], "facts": []}).encode()  # fmt: skip


def some_messages(count: int, sentences: int = 1) -> Iterator[pm.Message]:
    """The messages of a chat, each of so many sentences."""
    parent = ""
    for number in range(count):
        lines = (f"Line {number}, {part}: the ferry leaves at {TOWNS[part % 5]}, and the red key stays with the abbot."
                 for part in range(sentences))  # fmt: skip
        message = pm.Message("", parent, ("user", "assistant")[number % 2], " ".join(lines))
        yield replace(message, id=(parent := pm.key_of(message, parent)))


def send_hostile(pipe, length: int, seconds: int) -> None:
    """Sends them all to the address that the pipe gives, telling it the name of each, as far as the time goes."""
    url, started = pipe.recv(), time.monotonic()
    with httpx.Client(base_url=url, timeout=600) as api:
        for name, path, raw in hostile_requests(length):
            if time.monotonic() - started > seconds:
                break
            pipe.send(name)
            answer = api.post(path, content=raw, headers={"Content-Type": "application/json"})
            pipe.send(str(answer.status_code))
        pipe.send("reading it out")
        pipe.send(str(api.get("/api/persona_memory/chats/long/export").status_code))
    pipe.send("")


def watchdog(length: int = pm.LONGEST_MESSAGE, seconds: int = 200) -> None:
    """The longest times for which no other thread of the program could run, while another process sends it texts of
    that length."""
    pipe, end = multiprocessing.Pipe()
    client = multiprocessing.get_context("fork").Process(target=send_hostile, args=(end, length, seconds), daemon=True)
    client.start()
    holds, statuses, doing, over = Counter(), Counter(), ["nothing"], threading.Event()

    def watch() -> None:
        """Wakes every five milliseconds, if it is let. What other processes take of the machine does not count: the
        program cannot have held the interpreter for longer than it computed."""
        while not over.is_set():
            before, worked = time.perf_counter(), time.process_time()
            time.sleep(0.005)
            passed = min(time.perf_counter() - before - 0.005, time.process_time() - worked)
            holds[doing[0]] = max(holds[doing[0]], passed)

    with tempfile.TemporaryDirectory() as data, Upstream() as upstream:
        given = settings(data, upstream.url, embedder="/nonexistent")  # the embedder itself lets others run
        with LocalServer(given, ready=False) as running:
            watcher = threading.Thread(target=watch)
            watcher.start()
            pipe.send(running.url)
            while name := pipe.recv():
                doing[0] = name
                statuses[pipe.recv()] += 1
                upstream.requests.clear()
            over.set()
            watcher.join()
    for name, hold in holds.most_common(15):
        print(f"{1000 * hold:5.0f} ms  {name}")
    print(f"longest hold {max(holds.values()):.3f} s in {statuses.total()} requests, {dict(statuses)}")


def streams(count: int = 50, polls: int = 50, idle: int = 200) -> None:
    """So many streams and polls at once beside so many idle sockets: what completes, and how long a new /health takes
    meanwhile."""
    gate, stop, waits, polled = threading.Event(), threading.Event(), [], []
    with tempfile.TemporaryDirectory() as data, Upstream() as upstream, contextlib.ExitStack() as held_open:
        running = held_open.enter_context(
            Server(Path(data) / "data", upstream.url, "--upstream-limit", count)
        ).wait_ready()
        upstream.steer(reply=lambda body: "The lamp is lit, and the ferry is late. " * 20, hold_after=(20, gate))
        address = urlsplit(running.url)
        for _ in range(idle):
            held_open.enter_context(socket.create_connection((address.hostname, address.port), 60))

        def stream(number: int) -> bool:
            """A turn of a chat of its own; whether all of it came."""
            reply = say(running.url, [{"role": "user", "content": f"Tale {number}: hello."}], chat_id=f"tale {number}")
            return reply.status == 200 and reply.text == upstream.reply({}) and not reply.error

        def poll(number: int) -> None:
            """Asks for news until everything is over."""
            with httpx.Client(base_url=running.url, timeout=120) as api:
                while not stop.is_set():
                    started = time.monotonic()
                    api.get("/api/persona_memory/state", params={"chat": f"tale {number}"}).raise_for_status()
                    polled.append(time.monotonic() - started)
                    stop.wait(0.5)

        with ThreadPoolExecutor(count + polls) as threads:
            told = [threads.submit(stream, number) for number in range(count)]
            asked = [threads.submit(poll, number) for number in range(polls)]
            upstream.wait_for_chats(count)
            for _ in range(20):
                started = time.monotonic()
                httpx.get(f"{running.url}/health", timeout=120, verify=False)
                waits.append(time.monotonic() - started)
            gate.set()
            complete = sum(f.result() for f in told)
            stop.set()
            failed = sum(f.exception() is not None for f in asked)
        print(f"{complete} of {count} streams complete, {failed} of {polls} polls failed, {idle} idle sockets")
        for name, times in (("a new /health", waits), ("polls", polled)):
            print(f"{name}: median {statistics.median(times):.2f} s, most {max(times):.2f} s of {len(times)}")


def soak(minutes: int = 30, pace: int = 69, megabytes: int = 0, chats: int = pm.OPEN_CHATS + 8) -> None:
    """Turns at a pace for so long, on as many chats as may be open and more; what the program holds, minute by minute,
    once each has had a few turns. A turn is two messages: the user's and the reply that it shows later. Open chats may
    take so many `megabytes`: with few of them, the bound that a long run comes to is there at once."""
    persona = {"role": "system", "content": "You are Maren, keeper of the lighthouse on the Teeth. " * 8}
    counts, rows = Counter(), []
    shown: dict[int, list[dict]] = {chat: [] for chat in range(chats)}

    def take_turn(number: int) -> None:
        """One turn, in the chat that it is the turn of, and a look for news."""
        history = shown[number % chats]
        words = f"Evening {number}: I count {number * 7 % 90} boats at {TOWNS[number % len(TOWNS)]}, and the keys."
        history.append({"role": "user", "content": words})
        body = {"model": "fake-model", "messages": [persona, *history[-60:]]}
        answer = api.post("/v1/chat/completions", json=body, headers={"X-Chat-Id": f"tale {number % chats}"})
        counts[answer.status_code, answer.headers.get("X-Persona-Memory", "").partition("=")[0]] += 1
        history.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]})
        api.get("/api/persona_memory/state")

    with tempfile.TemporaryDirectory() as data, Upstream() as upstream:
        server = Server(Path(data) / "data", upstream.url, "--context", 4096)
        server.command[server.command.index("--summary-every") + 1] = "20"
        if megabytes:
            bound = f"import persona_memory as pm; pm.OPEN_BYTES = {megabytes}_000_000; pm.main()"
            server.command[1:2] = ["-c", bound]
            server.env["PYTHONPATH"] = str(Path(pm.__file__).parent)
        with server as running, httpx.Client(base_url=running.url, timeout=120) as api:
            running.wait_ready()
            for number in range(10 * chats):
                take_turn(number)
            started = time.monotonic()
            for turns in range(minutes * pace // 2 + 1):
                take_turn(10 * chats + turns)
                passed = time.monotonic() - started
                if passed >= 60 * len(rows):
                    rows.append(held(running.process.pid))
                    words = ", ".join(f"{name} {value:.0f}" for name, value in rows[-1].items())
                    print(f"minute {len(rows) - 1}: {2 * turns} messages, {words}, {dict(counts)}", flush=True)
                    upstream.requests.clear()
                time.sleep(max(0.0, (turns + 1) * 120 / pace - passed))
            third = len(rows) // 3
            for name in rows[-1]:
                early, late = (statistics.mean(row[name] for row in some) for some in (rows[:third], rows[-third:]))
                print(f"{name}: first third {early:.0f}, last {late:.0f} ({100 * (late / early - 1):+.1f} %)")
            print(f"{running.log().count('Traceback')} tracebacks, {dict(counts)}")


def rooms(count: int = 2000, chats: int = 1, sentences: int = 4) -> None:
    """What open chats of so many messages take in RAM, beside what `Chat.bytes` tells of them."""

    def taken() -> float:
        """Megabytes that the process holds, what it has let go of left out."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return held(os.getpid())["MB"]

    with tempfile.TemporaryDirectory() as data:
        writer = multiprocessing.get_context("fork").Process(target=write_chats, args=(data, count, chats, sentences))
        writer.start()
        writer.join()
        registry = pm.ChatRegistry(Path(data), most_open=chats + 1)
        write_chat(registry, "first", 1, sentences)  # what the libraries take once is not a chat's
        index_chat(registry, "first")
        before = taken()
        for number in range(chats):
            index_chat(registry, str(number))
        after, told = taken(), sum(lent.bytes for lent in registry._lent.values()) / 2**20
        each = (after - before) * 2**20 / count / chats
        print(f"{chats} chats of {count} messages with {sentences} sentences each: {each:.0f} bytes a message")
        print(f"in all {after - before:.1f} MB, `Chat.bytes` tells {told:.1f} MB")
        registry.close()
        print(f"closed: {taken() - before:+.1f} MB")


WRITTEN = "made up"  # the name under which vectors are kept that no model has computed


def write_chats(data: str, count: int, chats: int, sentences: int) -> None:
    """Fills a folder with such chats."""
    registry = pm.ChatRegistry(Path(data))
    for number in range(chats):
        write_chat(registry, str(number), count, sentences)
    registry.close()


def write_chat(registry: pm.ChatRegistry, chat_id: str, count: int, sentences: int) -> None:
    """Makes a chat of so many messages, their vectors drawn at random."""
    draw = np.random.default_rng(1)

    def units(rows: int) -> np.ndarray:
        """So many unit vectors, float32 [rows, 384]."""
        drawn = draw.standard_normal((rows, 384)).astype(np.float32)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    registry.create(chat_id, explicit=True)
    with registry.borrow(chat_id) as chat, chat.lock:
        for some in pm.batches(list(some_messages(count, sentences)), 500):
            chat.store.commit(some, {"head": some[-1].id})
            hashes = [message.fingerprint for message in some]
            chat.store.put_vectors(WRITTEN, dict(zip(hashes, units(len(some)), strict=True)))
            chat.store.put_sentence_codes(WRITTEN, {h: pm.vector_codes(units(sentences)) for h in hashes})
        registry.enter(chat, ())


def index_chat(registry: pm.ChatRegistry, chat_id: str) -> None:
    """Opens a chat, and its index."""
    with registry.borrow(chat_id) as chat, chat.lock:
        chat.follow(chat.tree.branch(chat.store.head), pm.Embedder(WRITTEN))


TOWNS = ("Harrowmere", "Saltmarsh", "Thornwick", "Dunmoor", "Eastfold")


def corruptions(rounds: int = 250, *parts: str) -> None:
    """Damages each kind of file so many times; counts how often the other chat had its memory at once, and what became
    of the damaged one."""
    from test_damage import corrupt, file_of, written

    given = settings("", "http://127.0.0.1:9/v1", embedder="/nonexistent")  # no model is loaded a thousand times
    with tempfile.TemporaryDirectory() as whole:
        written(Path(whole)).close()
        for part in parts or ("chats", "catalogue", "characters"):
            counts = Counter()
            for number in range(rounds):
                with tempfile.TemporaryDirectory() as folder:
                    data = Path(shutil.copytree(whole, Path(folder) / "data"))
                    corrupt(file_of(data, "hurt") if part == "chats" else pm.database_of(data / part), number)
                    counts.update(after_damage(pm.PersonaMemory(replace(given, data=str(data)))))
            print(part, rounds, dict(counts), flush=True)


def after_damage(memory: pm.PersonaMemory) -> Iterator[str]:
    """What came of the other chat and of the damaged one."""
    for once_more in range(2):
        try:
            memory.archive.append("well", [{"role": "user", "content": "It goes on."}])
            yield "other chat at the second try" if once_more else "other chat at once"
            break
        except pm.StoreError:
            continue
    try:
        messages = memory.describe("hurt", mood=False)["branch_length"]
        yield "damaged chat whole" if messages == 60 else "damaged chat salvaged"
    except pm.StoreError as error:
        yield f"damaged chat refused in words: {type(error).__name__}"
    memory.registry.delete("hurt")
    yield "damaged chat deleted"
    memory.close()


if __name__ == "__main__":
    parts = {f.__name__: f for f in (connections, watchdog, streams, soak, rooms, corruptions)}
    parts[sys.argv[1]](*(int(word) if word.isdigit() else word for word in sys.argv[2:]))
