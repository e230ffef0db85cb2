"""Many turns at once: no chat waits for another, whatever its turn waits for, and what is open stays bounded."""

import contextlib
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from chats import chat as messages_of
from fakes import PATIENCE, LocalServer, branch_texts, say, settings, wait_until

import persona_memory as pm

OPEN_FILES = Path("/proc/self/fd")
API = "api/persona_memory"
PERSONA = {"role": "system", "content": "You are Mira, keeper of the light."}
MULE = "My brother Tomas sold the mule in Ostrava."


def told(chat_id: str) -> list[dict]:
    """A chat whose beginning has left the prompt, with a question for it."""
    steps = [f"Step {n} of {chat_id}: we walk on and count the posts along the road to the ferry." for n in range(40)]
    rows = [MULE, "He always loved a bargain more than an animal.", *steps, "Who sold the mule?"]
    return [PERSONA, *({"role": pm.CHAT_ROLES[n % 2], "content": row} for n, row in enumerate(rows))]


class Gate:
    """The real model, which answers nobody while the gate is shut."""

    def __init__(self, model, is_open: threading.Event):
        self.model, self.is_open = model, is_open

    def encode(self, *args, **kwargs):
        assert self.is_open.wait(PATIENCE)
        return self.model.encode(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self.model, name)


@pytest.fixture
def gate(monkeypatch):
    """The gate before the embedder of every server that begins in the test; it is open at first."""
    is_open, load = threading.Event(), pm.load_sentence_transformer
    is_open.set()
    monkeypatch.setattr(pm, "load_sentence_transformer", lambda name: Gate(load(name), is_open))
    yield is_open
    is_open.set()


@pytest.fixture
def patient_turn(monkeypatch):
    """Set as soon as a turn that may wait long stands in the embedder."""
    stands, ask = threading.Event(), pm.Embedder.ask

    def noted(self, texts, timeout, *how, **more):
        if timeout and timeout > PATIENCE / 2:
            stands.set()
        return ask(self, texts, timeout, *how, **more)

    monkeypatch.setattr(pm.Embedder, "ask", noted)
    return stands


def test_a_turn_in_the_embedder_keeps_nobody_waiting(gate, patient_turn, data_dir, upstream, monkeypatch):
    """While one chat's turn stands in the embedder, another chat has its turn, and the same chat another, a new chat
    begins, and what is kept can be read and changed."""
    with LocalServer(settings(data_dir, upstream.url, context=1024)) as running, ThreadPoolExecutor(1) as thread:
        for chat_id in ("one", "two"):
            assert say(running.url, told(chat_id), chat_id=chat_id).status == 200
            found = httpx.get(f"{running.url}/{API}/chats/{chat_id}/search", params={"q": "mule"}, timeout=PATIENCE)
            assert found.json()["unread"] == 0
        gate.clear()
        patient_turn.clear()  # a search is patient too
        monkeypatch.setattr(pm, "RECALL_SECONDS", PATIENCE)
        stuck = thread.submit(say, running.url, [*told("one"), *told("more")[1:]], chat_id="one")
        assert patient_turn.wait(PATIENCE)
        monkeypatch.setattr(pm, "RECALL_SECONDS", 0.0)
        for chat_id, shown in (("two", [*told("two"), *told("on")[1:]]), ("one", told("one")), ("new", told("new"))):
            reply = say(running.url, shown, chat_id=chat_id)
            assert reply.status == 200 and "too slow" in reply.memory, (chat_id, reply)
        assert say(running.url, told("nameless")).status == 200
        row = httpx.get(f"{running.url}/{API}/chats/one/messages", timeout=PATIENCE).json()["messages"][0]
        address = f"{running.url}/{API}/chats/one/messages/{row['id']}"
        assert httpx.patch(address, json={"pinned": True}, timeout=PATIENCE).status_code == 200
        listed = httpx.get(f"{running.url}/{API}/chats", timeout=PATIENCE).json()
        assert {"one", "two", "new"} < {line["chat_id"] for line in listed}
        assert httpx.delete(f"{running.url}/{API}/chats/new", timeout=PATIENCE).status_code == 200
        assert not stuck.done()
        gate.set()
        reply = stuck.result(PATIENCE)
        assert reply.status == 200 and "too slow" not in reply.memory
        assert branch_texts(running.url, "two")[:2] == [MULE, told("two")[2]["content"]]


def test_nobody_waits_for_vectors_in_vain(gate):
    """Where those who wait already take longer than somebody may wait, memory goes on without vectors at once."""
    embedder = pm.Embedder("all-MiniLM-L6-v2")
    embedder.start()
    assert embedder.loaded.wait(PATIENCE)
    gate.clear()
    with ThreadPoolExecutor(9) as threads:
        waiting = [threads.submit(embedder.encode, ["the mule"], PATIENCE) for _ in range(8)]
        wait_until(lambda: len(embedder._urgent) == 8)
        embedder._pace = PATIENCE
        late = threads.submit(embedder.encode, ["the inn"], 2 * PATIENCE)
        with pytest.raises(pm.EmbedderUnavailable, match="too slow"):
            late.result(PATIENCE)
        gate.set()
        assert [job.result(PATIENCE).shape for job in waiting] == [(1, 384)] * 8
    embedder.close()


def chats_in_open_files(data: Path) -> set[str]:
    """The folders of a data folder's chats whose files this process has open."""
    targets = []
    for handle in OPEN_FILES.iterdir():
        try:
            targets.append(os.readlink(handle))
        except FileNotFoundError:  # the handle of this very listing, or closed by now
            continue
    there = re.compile(rf"{re.escape(str(data.resolve()))}/chats/([^/]+)/")
    return {found[1] for target in targets if (found := there.match(target))}


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="open files are looked up under /proc")
def test_files_stay_few_however_many_chats_are_used(tmp_path):
    """Threads that write into 300 chats, each chat twice: beside those in use a few stay open, and no word is lost."""
    most_open, threads, chats = 4, 8, 300
    registry, seen = pm.ChatRegistry(tmp_path, most_open=most_open), []
    begun, more = messages_of(("Mira", "Good evening."), ("Robin", "I brought the key."))

    def write(number: int):
        chat_id, message = f"chat {number % chats}", (begun, more)[number // chats]
        if message is begun:
            registry.create(chat_id, explicit=True)
        with registry.borrow(chat_id) as chat, chat.lock:
            chat.store.commit([message], {"head": message.id})
            registry.enter(chat, [message.id])
        if number % 50 == 0:
            seen.append(len(chats_in_open_files(tmp_path)))

    with ThreadPoolExecutor(threads) as pool:
        for first in (0, chats):
            list(pool.map(write, range(first, first + chats)))
    # Beside those that may stay open each thread has one in use, and may be closing another.
    assert max(seen) <= most_open + 2 * threads, seen
    assert len(chats_in_open_files(tmp_path)) == most_open
    for number in range(chats):
        with registry.borrow(f"chat {number}") as chat:
            assert [m.content for m in chat.store.read(chat.path())] == [begun.content, more.content]
    registry.close()
    assert chats_in_open_files(tmp_path) == set()


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="open files are looked up under /proc")
def test_long_chats_close_sooner_but_the_last_used_one_stays(tmp_path, monkeypatch):
    """What is open is bounded by the bytes it takes, not by how many chats it is."""
    monkeypatch.setattr(pm, "OPEN_BYTES", 2 * pm.CHAT_BYTES)
    registry = pm.ChatRegistry(tmp_path)
    for chat_id, count in (("short", 1), ("long", 3), ("longer", 4)):
        registry.create(chat_id, explicit=True)
        with registry.borrow(chat_id) as chat, chat.lock:
            chat.store.commit(messages_of(*[("Mira", f"Line {n}.") for n in range(count)]))
        assert pm.chat_folder(chat_id) in chats_in_open_files(tmp_path)
    assert len(chats_in_open_files(tmp_path)) == 1
    registry.close()


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="open files are looked up under /proc")
def test_a_chat_that_is_opened_anew_leaves_no_file_open(tmp_path):
    """Another program has deleted it and made it again, or its file is damaged and set aside."""
    one, other = pm.ChatRegistry(tmp_path), pm.ChatRegistry(tmp_path)
    one.create("c", explicit=True)
    other.delete("c")
    other.create("c", explicit=True)
    with one.borrow("c") as chat, chat.lock:
        folder, messages = chat.store.directory, messages_of(("Mira", "Good evening."))
        chat.store.commit(messages, {"head": messages[-1].id})
        one.enter(chat, [m.id for m in messages])
    assert chats_in_open_files(tmp_path) == {folder.name}
    one.close()
    other.close()
    pm.database_of(folder).write_bytes(bytes(9000))
    with contextlib.closing(pm.ChatRegistry(tmp_path)) as anew:
        with anew.borrow("c") as chat:
            assert "could be saved" in chat.store.info["salvaged"]
        assert chats_in_open_files(tmp_path) == {folder.name}
