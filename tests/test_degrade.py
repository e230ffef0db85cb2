"""Memory never breaks a chat: with the store, the vectors or the embedder really broken the reply still comes.

What was acknowledged before is there again when the damage is mended.
"""

import contextlib
import json
import os
import pickle
import resource
import shutil
import sqlite3
import threading

import diskcache
import httpx
import openai
import pytest
from fakes import LocalServer, Server, Upstream, health, say, settings, wait_until

import persona_memory

TIMEOUT = 60
PERSONA = {"role": "system", "content": "You are Mira, keeper of the light."}
TALK = [
    {"role": "user", "content": "My brother Tomas sold the mule in Ostrava."},
    {"role": "assistant", "content": "He always loved a bargain more than an animal."},
    {"role": "user", "content": "The red key opens the crypt below the chapel."},
    {"role": "assistant", "content": "Then keep it away from the abbot."},
]
NEXT = {"role": "user", "content": "Who sold the mule?"}
QUESTION = [PERSONA, *TALK, NEXT]
FILLER = [
    {
        "role": "assistant" if n % 2 else "user",
        "content": f"Step {n}: we walk on through the wet grass and count the posts along the road to the ferry.",
    }
    for n in range(40)
]
LONG = [PERSONA, *TALK, *FILLER, NEXT]  # at SMALL tokens of context the talk is out of sight
SMALL = 1024


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A data folder with one remembered chat, made by a server that has ended."""
    data_dir = tmp_path_factory.mktemp("template") / "data"
    with Upstream() as fake, LocalServer(settings(data_dir, fake.url)) as running:
        assert say(running.url, [PERSONA, *TALK], chat_id="tale").status == 200
        assert say(running.url, LONG[:-1], chat_id="long").status == 200
        for chat_id in ("tale", "long"):
            assert search(running, chat_id, "who sold an animal?")  # computes the vectors that are missing
    return data_dir


@pytest.fixture
def store(template, data_dir):
    """The folder of the remembered chat, in a data folder of the test's own."""
    shutil.copytree(template, data_dir)
    return folder_of(data_dir, "tale")


@pytest.fixture
def long_store(template, data_dir):
    """The same for the long chat."""
    shutil.copytree(template, data_dir)
    return folder_of(data_dir, "long")


def folder_of(data_dir, chat_id: str):
    """The folder of a chat: the one whose facts name it."""
    for database in data_dir.glob("chats/*/cache.db"):
        with contextlib.closing(sqlite3.connect(database)) as connection:
            [[info]] = connection.execute("SELECT value FROM Cache WHERE key = 'info'")
        if json.loads(info)["chat_id"] == chat_id:
            return database.parent
    raise AssertionError(f"no folder of {chat_id}")


def replace(path, content: bytes):
    """Put another file in a file's place, and take what SQLite keeps beside it away."""
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)
    path.write_bytes(content)


def chat_url(running, chat_id: str, rest: str) -> str:
    """The address of a chat's call."""
    return f"{running.url}/api/persona_memory/chats/{chat_id}/{rest}"


def contents(running, chat_id: str) -> list[str]:
    """The texts on a chat's current branch."""
    answer = httpx.get(chat_url(running, chat_id, "messages"), params={"limit": 1000}, timeout=TIMEOUT)
    assert answer.status_code == 200, answer.text
    return [message["content"] for message in answer.json()["messages"]]


def append(running, chat_id: str, content: str) -> httpx.Response:
    """Append one message."""
    return httpx.post(
        chat_url(running, chat_id, "messages"),
        timeout=TIMEOUT,
        json={"messages": [{"role": "user", "content": content}]},
    )


def search(running, chat_id: str, query: str) -> list[dict]:
    """The memories that a search finds."""
    answer = httpx.get(chat_url(running, chat_id, "search"), params={"q": query, "k": 2}, timeout=TIMEOUT)
    assert answer.status_code == 200, answer.text
    return answer.json()["memories"]


def assert_degraded(reply, upstream, messages):
    """The turn came through untouched in words, and says that it went without memory."""
    assert (reply.status, reply.error, reply.text) == (200, None, upstream.last["answer"])
    assert reply.memory.startswith("degraded; reason="), reply.memory
    assert upstream.last["body"]["messages"] == messages


def assert_whole(running, *more: str):
    """Everything that was acknowledged is there, in order."""
    texts = [message["content"] for message in TALK]
    assert contents(running, "tale")[: len(TALK)] == texts
    reply = say(running.url, [*QUESTION, *({"role": "user", "content": text} for text in more)], chat_id="tale")
    assert reply.status == 200
    assert not reply.memory.startswith("degraded"), reply.memory
    assert contents(running, "tale")[: len(TALK) + 1 + len(more)] == [*texts, NEXT["content"], *more]


# ---------------------------------------------------------------------------- the store

GARBAGE = {
    "garbage": lambda old: b"this is not a database " * 1000,
    "cut in half": lambda old: old[: len(old) // 2],
    "torn pages": lambda old: old[:4096] + os.urandom(len(old) - 4096),
}


@pytest.mark.parametrize("damage", GARBAGE.values(), ids=GARBAGE)
def test_a_store_that_cannot_be_read(data_dir, store, upstream, damage):
    """The damaged file is set aside, the chat goes on from what can be read and what the client shows, the list says
    so, and other chats do not notice; put back, the old file is whole."""
    database, backup = store / "cache.db", data_dir.parent / "backup"
    shutil.copytree(store, backup)
    replace(database, damage(database.read_bytes()))
    damaged = database.read_bytes()
    with LocalServer(settings(data_dir, upstream.url)) as running:
        for stream in (True, False):
            reply = say(running.url, QUESTION, stream, chat_id="tale")
            assert (reply.status, reply.error, reply.text) == (200, None, upstream.last["answer"])
        assert contents(running, "tale")[: len(TALK)] == [message["content"] for message in TALK]
        other = say(running.url, QUESTION, chat_id="other")
        assert not other.memory.startswith("degraded")
        assert contents(running, "other")[: len(TALK)] == [message["content"] for message in TALK]
        chats = httpx.get(f"{running.url}/api/persona_memory/chats", timeout=TIMEOUT).json()
        assert {c["chat_id"]: c["state"] for c in chats} == {"tale": "salvaged", "other": "ok", "long": "ok"}
        assert health(running.url)["status"] == "ok"
    (aside,) = store.parent.glob(f"{store.name}.damaged-*")
    assert damaged[:4096] == (aside / "cache.db").read_bytes()[:4096]
    shutil.rmtree(store)
    shutil.copytree(backup, store)
    with LocalServer(settings(data_dir, upstream.url)) as running:
        assert_whole(running)


def empty_rows(database):
    """The tables of a new store, and nothing in them."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("DELETE FROM Cache")


@pytest.mark.parametrize("leave", [empty_rows, lambda database: replace(database, b"")], ids=["no rows", "no bytes"])
def test_a_store_whose_making_was_cut_short(data_dir, store, upstream, leave):
    """A crash while a chat's files are made leaves an empty store: the chat starts from what the client shows."""
    leave(store / "cache.db")
    with LocalServer(settings(data_dir, upstream.url)) as running:
        assert say(running.url, QUESTION, chat_id="tale").text == upstream.last["answer"]
        assert_whole(running)
        assert append(running, "tale", "acknowledged").json()["chat_id"] == "tale"
        assert "acknowledged" in contents(running, "tale")


def test_a_store_that_breaks_under_a_running_server(data_dir, store, upstream):
    """Another chat's turns go on; the broken chat's reply comes."""
    with LocalServer(settings(data_dir, upstream.url)) as running:
        assert contents(running, "tale")
        for path in store.iterdir():
            path.write_bytes(b"garbage " * 4096)
        messages = [*QUESTION, {"role": "assistant", "content": "Tomas."}, {"role": "user", "content": "Where?"}]
        assert say(running.url, messages, chat_id="tale").text == upstream.last["answer"]
        assert upstream.last["body"]["messages"][-1] == messages[-1]
        assert not say(running.url, QUESTION, chat_id="other").memory.startswith("degraded")


def test_a_deleted_folder_under_a_running_server(data_dir, store, upstream):
    """Somebody tidies the data folder: the chat starts again from what the client shows."""
    with LocalServer(settings(data_dir, upstream.url)) as running:
        assert contents(running, "tale")
        shutil.rmtree(store)
        assert say(running.url, QUESTION, chat_id="tale").text == upstream.last["answer"]
        assert_whole(running)


@contextlib.contextmanager
def locked(database):
    """Another program holds the database."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


def test_a_locked_store_makes_no_turn_wait_for_ever(data_dir, store, upstream):
    """The chat's reply comes without memory, other chats do not notice, and memory comes back."""
    with LocalServer(settings(data_dir, upstream.url)) as running:
        assert contents(running, "tale")
        replies = []
        turn = threading.Thread(target=lambda: replies.append(say(running.url, QUESTION, chat_id="tale")), daemon=True)
        with locked(store / "cache.db"):
            turn.start()
            other = say(running.url, QUESTION, chat_id="other")
            assert other.text
            assert not other.memory.startswith("degraded"), other.memory
            turn.join(TIMEOUT)
            assert [reply.status for reply in replies] == [200]
            assert replies[0].memory.startswith("degraded"), replies[0].memory
        wait_until(lambda: not say(running.url, QUESTION, chat_id="tale").memory.startswith("degraded"), "memory again")
        assert_whole(running)


def test_a_locked_catalogue_makes_no_turn_wait_for_ever(data_dir, store, upstream):
    """With and without an id the reply comes; afterwards the chat is listed and found."""
    with LocalServer(settings(data_dir, upstream.url)) as running:
        assert contents(running, "tale")
        with locked(data_dir / "catalogue" / "cache.db"):
            assert say(running.url, QUESTION, chat_id="tale").text == upstream.last["answer"]
            assert say(running.url, QUESTION).text == upstream.last["answer"]
        wait_until(lambda: not say(running.url, QUESTION, chat_id="tale").memory.startswith("degraded"), "memory again")
        assert_whole(running)


def test_a_data_folder_that_goes_away(data_dir, store, upstream):
    """The folder's disk is unplugged and plugged in again."""
    with LocalServer(settings(data_dir, upstream.url)) as running:
        away = data_dir.rename(data_dir.parent / "away")
        data_dir.write_text("a file where the folder was")
        reply = say(running.url, QUESTION, chat_id="tale")
        assert_degraded(reply, upstream, QUESTION)
        assert append(running, "tale", "not to be acknowledged").status_code >= 500
        data_dir.unlink()
        away.rename(data_dir)
        assert_whole(running)


def test_a_full_disk(data_dir, store, upstream):
    """No file can grow: the reply comes, nothing is acknowledged; with room again all goes on."""
    with Server(data_dir, upstream.url, embedder=False) as running:
        assert contents(running, "tale")
        limits = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (0, limits[1]))
        reply = say(running.url, QUESTION, chat_id="tale")
        assert (reply.status, reply.text) == (200, upstream.last["answer"])
        assert reply.memory.startswith("degraded"), reply.memory
        assert append(running, "tale", "not to be acknowledged").status_code >= 500
        assert say(running.url, QUESTION, chat_id="new").memory.startswith("degraded")
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, limits)
        assert_whole(running)


@pytest.mark.parametrize("folder", ["catalogue", "characters"])
@pytest.mark.parametrize("damage", GARBAGE.values(), ids=GARBAGE)
def test_what_stands_beside_the_chats_is_made_anew_where_it_is_broken(data_dir, upstream, damage, folder):
    """What finds chats without an id is derived: losing it loses nothing. A character's option falls back to off."""
    with LocalServer(settings(data_dir, upstream.url)) as running:
        chat_id = say(running.url, [PERSONA, *TALK]).chat_id
    database = data_dir / folder / "cache.db"
    replace(database, damage(database.read_bytes()))
    with LocalServer(settings(data_dir, upstream.url)) as running:
        reply = say(running.url, QUESTION)
        assert (reply.status, reply.chat_id) == (200, chat_id)
        assert not reply.memory.startswith("degraded")
        listed = httpx.get(f"{running.url}/api/persona_memory/chats", timeout=TIMEOUT).json()
        assert [chat["chat_id"] for chat in listed] == [chat_id]


def test_a_data_folder_that_cannot_be_used_before_the_first_turn(data_dir, upstream):
    """The reply comes, the log names the folder without a traceback; with the folder usable memory begins. (A server
    that finds it so at its start says that in place of serving.)"""
    with Server(data_dir, upstream.url, embedder=False) as running:
        shutil.rmtree(data_dir, ignore_errors=True)
        data_dir.write_text("a file where the folder should be")
        assert_degraded(say(running.url, QUESTION, chat_id="tale"), upstream, QUESTION)
        assert httpx.get(f"{running.url}/api/persona_memory/chats", timeout=TIMEOUT).status_code >= 500
        assert str(data_dir) in running.log()
        assert "Traceback" not in running.log()
        data_dir.unlink()
        assert say(running.url, QUESTION, chat_id="tale").status == 200
        assert_whole(running)


# ---------------------------------------------------------------------------- vectors and the embedder

BAD_VECTORS = {
    "truncated": b"\0",
    "empty": b"",
    "other dimension": b"\0\0\x80?" * 3,
    "not numbers": b"\xff" * 1536,
    "zeros": b"\0" * 1536,
    "infinite": b"\0\0\x80\x7f" * 384,
}


@pytest.mark.parametrize("vector", BAD_VECTORS.values(), ids=BAD_VECTORS)
def test_corrupted_vectors(data_dir, long_store, upstream, vector):
    """Vectors are derived: with every one of them broken the reply comes, and the messages are found."""
    with contextlib.closing(sqlite3.connect(long_store / "cache.db")) as database, database:
        broken = database.execute(
            "UPDATE Cache SET value = ? WHERE typeof(value) = 'blob' AND length(value) = 1536", (vector,)
        ).rowcount
    assert broken >= len(TALK) + len(FILLER)
    with LocalServer(settings(data_dir, upstream.url, context=SMALL)) as running:
        reply = say(running.url, LONG, chat_id="long")
        assert (reply.status, reply.text) == (200, upstream.last["answer"])
        assert upstream.last["body"]["messages"][-1]["content"].endswith(NEXT["content"])
        assert contents(running, "long")[: len(LONG) - 1] == [message["content"] for message in LONG[1:]]
        assert 0 in {memory["index"] for memory in search(running, "long", "Tomas sold the mule in Ostrava")}


def recalled(upstream) -> str:
    """What the newest prompt's memory block holds."""
    text = upstream.last["body"]["messages"][-1]["content"]
    return text.partition("[Earlier in this chat")[2].partition("[End of memories]")[0]


def test_whole_vectors_recall(data_dir, long_store, upstream):
    """What the tests around this one break: undamaged, the hidden message comes back into the prompt."""
    with LocalServer(settings(data_dir, upstream.url, context=SMALL)) as running:
        reply = say(running.url, LONG, chat_id="long")
        assert not reply.memory.startswith("degraded"), reply.memory
        assert TALK[0]["content"] in recalled(upstream)


@pytest.mark.parametrize("kind", ["missing", "no model"])
def test_an_embedder_that_is_no_model(data_dir, upstream, kind):
    """Replies come and messages are kept and found by their words; with a real model again also by meaning."""
    model = data_dir.parent / "model"
    if kind == "no model":
        model.mkdir()
        (model / "config.json").write_text("not a model")
    broken = settings(data_dir, upstream.url, embedder=str(model), context=SMALL)
    with LocalServer(broken, ready=False) as running:
        wait_until(lambda: "fail" in health(running.url)["embedder"]["status"], "the embedder's failure")
        reply = say(running.url, LONG, chat_id="long")
        assert (reply.status, reply.text) == (200, upstream.last["answer"])
        assert reply.memory.startswith("degraded; reason="), reply.memory
        assert TALK[0]["content"] in recalled(upstream)
        assert append(running, "import", TALK[0]["content"]).json()["added"] == 1
        assert 0 in {memory["index"] for memory in search(running, "long", "the mule in Ostrava")}
    with LocalServer(settings(data_dir, upstream.url, context=SMALL)) as running:
        assert contents(running, "long")[: len(LONG) - 1] == [message["content"] for message in LONG[1:]]
        assert contents(running, "import") == [TALK[0]["content"]]
        assert 0 in {memory["index"] for memory in search(running, "long", "relatives trading livestock")}
        assert not say(running.url, LONG, chat_id="long").memory.startswith("degraded")


def test_a_turn_while_the_embedder_is_loading(data_dir, upstream, monkeypatch):
    """The turn does not wait for the model, and is remembered; with the model there recall is whole."""
    go_on, load = threading.Event(), persona_memory.load_sentence_transformer
    monkeypatch.setattr(persona_memory, "load_sentence_transformer", lambda name: go_on.wait(TIMEOUT) and load(name))
    with LocalServer(settings(data_dir, upstream.url, context=SMALL), ready=False) as running:
        reply = say(running.url, LONG, chat_id="long")
        assert (reply.status, reply.text) == (200, upstream.last["answer"])
        assert reply.memory.startswith("degraded; reason="), reply.memory
        assert health(running.url)["status"] == "loading"
        go_on.set()
        wait_until(lambda: not say(running.url, LONG, chat_id="long").memory.startswith("degraded"), "whole recall")
        assert contents(running, "long")[: len(LONG) - 1] == [message["content"] for message in LONG[1:]]
        assert TALK[0]["content"] in recalled(upstream)


class GatedModel:
    """The real model behind a gate, as a machine that is busy embedding."""

    def __init__(self, model, gate: threading.Event):
        self.model, self.gate = model, gate

    def encode(self, *args, **kwargs):
        assert self.gate.wait(TIMEOUT)
        return self.model.encode(*args, **kwargs)


def test_a_turn_does_not_wait_for_a_busy_embedder_or_a_search(data_dir, upstream, monkeypatch):
    """While a search of the same chat waits for a vector the reply comes, without one."""
    gate, load, asked = threading.Event(), persona_memory.load_sentence_transformer, threading.Semaphore(0)
    encode = persona_memory.Embedder.encode

    def noted(*args, **kwargs):
        asked.release()
        return encode(*args, **kwargs)

    monkeypatch.setattr(persona_memory, "load_sentence_transformer", lambda name: GatedModel(load(name), gate))
    monkeypatch.setattr(persona_memory, "RECALL_SECONDS", 0.5)
    monkeypatch.setattr(persona_memory.Embedder, "encode", noted)
    gate.set()
    with LocalServer(settings(data_dir, upstream.url, context=SMALL)) as running:
        append(running, "long", LONG[1]["content"])
        assert search(running, "long", "the mule")  # all that is there has its vector now
        gate.clear()
        while asked.acquire(blocking=False):
            pass
        found, replies = [], []
        searching = threading.Thread(target=lambda: found.extend(search(running, "long", "the mule")), daemon=True)
        talking = threading.Thread(target=lambda: replies.append(say(running.url, LONG, chat_id="long")), daemon=True)
        searching.start()
        assert asked.acquire(timeout=TIMEOUT)  # the search wants the vector of its question
        talking.start()
        talking.join(TIMEOUT / 3)
        assert not gate.is_set()
        came = list(replies)
        gate.set()
        searching.join(TIMEOUT)
        talking.join(TIMEOUT)
    assert [reply.status for reply in came] == [200]
    assert came[0].memory.startswith("degraded"), came[0].memory
    assert found


# ---------------------------------------------------------------------------- kill -9


def test_kill_9_right_after_a_reply_loses_nothing(data_dir, upstream):
    """A client that sends only its newest message: user and reply of every turn are there after each crash."""
    said, running = [], Server(data_dir, upstream.url, embedder=False)
    try:
        for stream in (True, False):
            running.start()
            question = {"role": "user", "content": f"With stream {stream}, what now?"}
            reply = say(running.url, [question], stream, chat_id="crash")
            running.kill()
            assert reply.text == upstream.last["answer"]
            said += [question["content"], reply.text]
        running.start()
        assert append(running, "crash", "acknowledged").json()["added"] == 1
        running.kill()
        running.start()
        assert say(running.url, [{"role": "user", "content": "And at last?"}], chat_id="crash").status == 200
        assert contents(running, "crash")[:3] == said[:3]
        assert contents(running, "crash")[-2:] == ["acknowledged", "And at last?"]
    finally:
        running.stop()


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_is_on_disk_before_the_client_sees_its_end(data_dir, upstream, monkeypatch, stream):
    """Otherwise a crash in between loses what the client has; its end is held back while the reply is recorded."""
    ended, seen_too_early = threading.Event(), []
    record = persona_memory.PersonaMemory.record

    def slow_record(*args, **kwargs):
        seen_too_early.append(ended.wait(0.5))
        record(*args, **kwargs)

    monkeypatch.setattr(persona_memory.PersonaMemory, "record", slow_record)
    with LocalServer(settings(data_dir, upstream.url), ready=False) as running:
        reply = say(running.url, QUESTION, stream, chat_id="tale")
        ended.set()
        assert reply.text == upstream.last["answer"]
        wait_until(lambda: seen_too_early, "the record")
    assert seen_too_early == [False]


def test_kill_9_in_the_middle_of_a_reply(data_dir, upstream):
    """The user's message is kept before the model has answered it."""
    with Server(data_dir, upstream.url, embedder=False) as running:
        upstream.hold_after = (2, threading.Event())
        turn = threading.Thread(target=interrupted, args=(running.url,), daemon=True)
        turn.start()
        upstream.wait_for_chats(1)
        running.kill()
        turn.join(TIMEOUT)
        upstream.hold_after = None
        running.start()
        assert contents(running, "tale")[:5] == [message["content"] for message in QUESTION[1:]]
        assert_whole(running)


def interrupted(url: str):
    """A turn whose server dies."""
    with contextlib.suppress(openai.APIError):
        say(url, QUESTION, chat_id="tale")


# ---------------------------------------------------------------------------- pickles


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def plant(database, payload: bytes, where: str):
    """Put a pickle into a store, as diskcache itself would read one: as every value, or as a key beside the others."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        if where == "values":
            connection.execute("UPDATE Cache SET mode = 4, value = ?", (payload,))
        else:
            connection.execute(
                "INSERT INTO Cache (key, raw, store_time, access_time, mode, value) VALUES (?, 0, 0, 0, 1, 'x')",
                (payload,),
            )


def set_off(database, where: str):
    """Read a store as plain diskcache does."""
    with diskcache.Cache(str(database.parent)) as cache, contextlib.suppress(Exception):
        for key in cache:
            cache[key]


@pytest.mark.parametrize("where", ["values", "keys"])
def test_a_planted_pickle_does_not_run(data_dir, store, upstream, where):
    """In every database of the data folder; plain diskcache would run it."""
    marker = data_dir.parent / "ran"
    databases = list(data_dir.rglob("cache.db"))
    assert len(databases) >= 2
    for database in databases:
        plant(database, pickle.dumps(Bomb(marker)), where)
    with LocalServer(settings(data_dir, upstream.url)) as running:
        for chat_id in ("tale", "new"):
            reply = say(running.url, QUESTION, chat_id=chat_id)
            assert (reply.status, reply.text) == (200, upstream.last["answer"])
        assert say(running.url, QUESTION).status == 200
        for call in ("messages", "search?q=mule", "prompts"):
            assert httpx.get(chat_url(running, "tale", call), timeout=TIMEOUT).status_code < 600
        httpx.get(f"{running.url}/api/persona_memory/chats", timeout=TIMEOUT)
        assert not marker.exists()
        httpx.delete(chat_url(running, "tale", "").rstrip("/"), timeout=TIMEOUT)
    assert not marker.exists()


@pytest.mark.parametrize("where", ["values", "keys"])
def test_the_planted_pickle_is_a_real_one(tmp_path, where):
    """The test above can fail: read as plain diskcache reads it, the same pickle runs."""
    marker = tmp_path / "ran"
    with diskcache.Cache(str(tmp_path / "plain")) as cache:
        cache["known"] = "value"
    plant(tmp_path / "plain" / "cache.db", pickle.dumps(Bomb(marker)), where)
    set_off(tmp_path / "plain" / "cache.db", where)
    assert marker.exists()


@pytest.mark.parametrize("stream", [False, True])
def test_a_report_that_cannot_be_made_costs_no_answer(data_dir, upstream, monkeypatch, stream):
    """It is made when the upstream has been asked already."""

    def fail(*_):
        raise RuntimeError("no report today")

    with LocalServer(settings(data_dir, upstream.url, embedder="/nonexistent"), ready=False) as running:
        monkeypatch.setattr(running.server.memory.status, "note_turn", fail)
        reply = say(running.url, QUESTION, stream=stream, chat_id="tale")
        assert (reply.status, reply.text) == (200, upstream.last["answer"])
        assert reply.memory.startswith("degraded")
        monkeypatch.undo()
        reply = say(running.url, QUESTION, stream=stream, chat_id="tale")
        assert reply.memory.startswith("recalled")
        assert contents(running, "tale") == [m["content"] for m in QUESTION[1:]]


def test_an_upstream_error_is_not_blamed_on_memory(data_dir, store):
    """With memory in order and the upstream broken the client gets the upstream's error."""
    with Upstream(status=500, error="out of tokens") as broken, LocalServer(settings(data_dir, broken.url)) as running:
        reply = say(running.url, QUESTION, chat_id="tale")
        assert reply.status == 500
        assert "out of tokens" in reply.error
        assert contents(running, "tale")[: len(TALK)] == [message["content"] for message in TALK]
