"""The services around a chat: what they do when replies come late, models fail, and several things happen at once."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from chats import chat as messages_of
from chats import open_chat
from fakes import LocalServer, say, settings, wait_until

import persona_memory as pm

API = "/api/persona_memory"
PERSONA = {"role": "system", "content": "You are Mira, keeper of the light."}
LONG = [
    {"role": pm.CHAT_ROLES[i % 2], "content": f"Line {i}: the ferry came in at {i % 12} o'clock with salt and letters."}
    for i in range(60)
]


def call(running, method: str, path: str, body=None) -> httpx.Response:
    """One call of the API."""
    return httpx.request(method, f"{running.url}{API}/{path}", json=body, timeout=60)


def contents(running, chat_id: str) -> list[str]:
    """The current branch."""
    return [m["content"] for m in call(running, "GET", f"chats/{chat_id}/messages").json()["messages"]]


@pytest.fixture
def memory(data_dir):
    """An engine without a server; nobody asks its upstream."""
    made = pm.PersonaMemory(pm.Settings(data=str(data_dir), upstream="http://127.0.0.1:9/v1"))
    yield made
    made.close()


# ---------------------------------------------------------------------------- replies and requests


@pytest.mark.parametrize("anew", [False, True])
def test_a_reply_to_a_deleted_chat_is_dropped(server, upstream, anew):
    """Also where the chat was made anew under its id meanwhile: it opens, goes on and can be deleted."""
    go_on, replies = threading.Event(), []
    first = [PERSONA, {"role": "user", "content": "Who goes there?"}]
    upstream.steer(hold=go_on)
    asking = threading.Thread(target=lambda: replies.append(say(server.url, first, chat_id="tale")))
    asking.start()
    upstream.wait_for_chats(1)
    assert call(server, "DELETE", "chats/tale").status_code == 200
    if anew:
        call(server, "POST", "chats/tale/messages", {"messages": [{"role": "user", "content": "Another beginning."}]})
    upstream.steer(hold=None)
    go_on.set()
    asking.join(60)
    assert [reply.status for reply in replies] == [200]
    server.server.memory.registry.close()  # as at the program's end; read again from disk:
    again = pm.ChatRegistry(server.server.memory.registry.folder.parent)
    with again.lookup("tale") as chat:
        found = [m.content for m in chat.store.read(list(chat.tree.nodes))] if chat else None
    assert found == (["Another beginning."] if anew else None)
    if anew:
        again.delete("tale")
    assert len(again) == 0


def test_a_quiet_prompt_in_the_users_role_is_no_message(server, upstream):
    """Strict post-processing turns SillyTavern's quiet prompts into user messages."""
    shown = [PERSONA, {"role": "user", "content": "Good evening."}, {"role": "assistant", "content": "Sit down."}]
    say(server.url, [*shown, {"role": "user", "content": "Thank you."}], chat_id="quiet")
    before = contents(server, "quiet")
    instruction = {"role": "user", "content": "[Pause the roleplay. Summarise the story so far.]"}
    asked = [*shown, {"role": "user", "content": "Thank you."}, instruction]
    body = {"persona_memory": {"chat_id": "quiet", "kind": "quiet"}}
    say(server.url, asked, stream=False, **body)
    assert contents(server, "quiet") == before
    assert upstream.last["body"]["messages"][-1]["content"].endswith(instruction["content"])
    assert call(server, "GET", "chats/quiet").json()["stored"] == len(before) + 1  # and the first reply


def test_appending_what_is_there_keeps_what_the_user_made_of_it(server):
    """A pin, other words and a forgotten message outlive the same message appended under the same parent."""
    said = {"role": "user", "content": "My cat is called Miso."}
    call(server, "POST", "chats/c/messages", {"messages": [said]})
    (row,) = call(server, "GET", "chats/c/messages").json()["messages"]
    changed = call(server, "PATCH", f"chats/c/messages/{row['id']}", {"pinned": True, "content": "The cat is Miso."})
    assert changed.status_code == 200
    with server.server.memory.registry.borrow("c") as chat:
        chat.store.commit(info={"head": pm.ROOT})
    call(server, "POST", "chats/c/messages", {"messages": [said]})
    (again,) = call(server, "GET", "chats/c/messages").json()["messages"]
    assert (again["pinned"], again["content"], again["original"]) == (True, "The cat is Miso.", said["content"])


def test_two_first_requests_with_one_explicit_id_make_one_branch(memory):
    """Both may come before either has written anything."""
    body = {"messages": [PERSONA, *LONG[:9]], "model": "m"}
    barrier, made = threading.Barrier(6), []

    def ask(chat_id: str):
        barrier.wait(60)
        made.append(memory.builder.prepare(body, chat_id, pm.Call("")).chat_id)

    threads = [threading.Thread(target=ask, args=(chat_id,)) for chat_id in ("named", "") for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(set(made)) == 2 and made.count("named") == 3
    for chat_id in set(made):
        assert memory.describe(chat_id)["stored"] == 9


def test_what_is_known_of_a_chat_that_has_become_long_is_kept(server, monkeypatch):
    """For its next opening, and anew when it has grown by much; turn by turn it is never an import."""
    monkeypatch.setattr(pm, "SEGMENT", 4)
    monkeypatch.setattr(pm, "LEAST_KEPT", 8)
    said, known = [PERSONA], 0
    for number in range(10):
        said.append({"role": "user", "content": f"Boat {number} is in."})
        said.append({"role": "assistant", "content": say(server.url, said, chat_id="long").text})
        if number in (4, 9):
            chat = open_chat(server, "long")
            wait_until(functools.partial(lambda c, before: c.index.kept_count > before and not c.outgrown, chat, known))
            known = chat.index.kept_count
    assert open_chat(server, "long").store.derived_bytes("index")


def test_content_of_null_takes_a_block_in_front():
    """A message that only calls tools has no text."""
    assert pm.preceded({"role": "assistant", "content": None}, "BLOCK")["content"] == "BLOCK"


# ---------------------------------------------------------------------------- one deadline a turn


def test_a_turn_waits_no_longer_than_its_deadline_whatever_it_waits_for(memory, monkeypatch):
    """Own vectors and those of five other chats: each wait gets what the ones before it have left."""
    clock = SimpleNamespace(now=1000.0, waits=[])
    monkeypatch.setattr(pm, "time", SimpleNamespace(**{**vars(pm.time), "monotonic": lambda: clock.now}))

    def late(texts, timeout=None, priority=pm.TURN, queries=()):
        if priority == pm.TURN and timeout is not None:
            clock.waits.append(timeout)
            clock.now += timeout
        raise pm.EmbedderUnavailable("embedder late")

    monkeypatch.setattr(memory.embedder, "encode", late)
    monkeypatch.setattr(memory.completions, "context_length", lambda *_: (2048, 2048))
    memory.recaller.change_character("Mira", True)
    for number in range(5):
        named = [m | ({"name": "Mira"} if m["role"] == "assistant" else {}) for m in LONG]
        memory.archive.append(f"other {number}", named)
    started = clock.now
    walked = [{**m, "content": f"Step {i}: we walk on through the wet grass."} for i, m in enumerate(LONG * 3)]
    asked = [PERSONA, *walked, {"role": "user", "content": "Do you remember when the ferry came in with letters?"}]
    body = {"messages": asked, "model": "m", "persona_memory": {"chat_id": "now", "character": "Mira"}}
    prepared = memory.builder.prepare(body, "now", pm.Call(""))
    assert prepared.header.startswith("degraded")
    assert clock.now - started <= pm.RECALL_SECONDS + 1e-6 and len(clock.waits) > 1


def test_opening_a_long_chat_takes_no_turn_its_vectors(data_dir, monkeypatch):
    """It is work and no waiting: a query's vector is waited for all the same."""
    given = pm.Settings(data=str(data_dir), upstream="http://127.0.0.1:9/v1", model="m", context=700)
    with contextlib.closing(pm.PersonaMemory(given)) as memory:
        memory.vectors.later = lambda *_: None
        memory.archive.append("c", LONG[:40])
        sum(memory.vectors.of_chat("c"))
        clock = SimpleNamespace(now=1000.0)
        monkeypatch.setattr(pm, "time", SimpleNamespace(**{**vars(pm.time), "monotonic": lambda: clock.now}))
        follow = pm.Chat.follow

        def slow(chat, *branch):
            clock.now += 0 if chat.index._hashes else 10 * pm.RECALL_SECONDS
            return follow(chat, *branch)

        monkeypatch.setattr(pm.Chat, "follow", slow)
        monkeypatch.setattr(memory.embedder, "foresee", lambda *_, **__: None)  # no job is timed while the clock jumps
        asked = {"messages": [PERSONA, *LONG[:40], {"role": "user", "content": "Do you remember the ferry?"}]}
        prepared = memory.builder.prepare(asked, "c", pm.Call(""))
        assert clock.now > 1000 + pm.RECALL_SECONDS and not prepared.header.startswith("degraded")


def test_a_deadline_never_gives_negative_time():
    """What has passed leaves nothing."""
    assert pm.Deadline.after(-5).left == 0.0 < pm.Deadline.after(60).left <= 60


# ---------------------------------------------------------------------------- vectors


def test_a_turn_comes_between_the_slices_of_a_background_job(memory):
    """The job goes on afterwards, and its vectors are those of the texts in their order."""
    texts = [f"Line {n} of the log: {'the sea is loud, and ' * (n % 9)}the lamp is lit." for n in range(300)]
    with ThreadPoolExecutor(1) as threads:
        background = threads.submit(memory.embedder.encode, texts, priority=pm.BACKGROUND)
        memory.embedder.encode(texts[:1])
        assert not background.done()
        vectors = background.result()
    alone = memory.embedder.encode(texts[7:9])
    assert len(vectors) == len(texts) and np.allclose(vectors[7:9], alone, atol=0.02)


LOADED_ALONE = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import persona_memory as pm
COMPILERS = {"torch._dynamo", "torch._meta_registrations"}
pm.UNUSED_BY_TORCH = ("torch._meta_registrations",)  # as in the program's own process
pm.UNUSED_BY_ENCODING += tuple(sys.argv[1:])
names = ["all-MiniLM-L6-v2", "all-MiniLM-L6-v2@256", "all-MiniLM-L6-v2@128"]
with ThreadPoolExecutor(len(names)) as threads:
    models = list(threads.map(pm.load_sentence_transformer, names))
vector = pm.unit_vectors(models[0], ["The ferry is late."])[0]
before = sorted(COMPILERS & sys.modules.keys())
import torch

class Compiled(pm.OwnModel):
    def _load(self):
        return torch.export.export(torch.nn.Linear(4, 2), (torch.zeros(1, 4),))

compiled = Compiled("").model.module()(torch.zeros(1, 4))
print(json.dumps([vector.tolist(), before, list(compiled.shape), torch.distributed.is_available.__module__]))
"""


@pytest.mark.parametrize("missed", [(), ("transformers.modeling_utils",)])
def test_a_model_is_loaded_without_the_compiler_where_that_works(memory, missed):
    """And as its libraries would load it where a version of them needs more than is left out; several at once too.
    Other models find torch whole."""
    command = [sys.executable, "-c", LOADED_ALONE, *missed]
    told = subprocess.run(command, cwd=Path(pm.__file__).parent, capture_output=True, check=True)
    vector, compilers, compiled, distributed = json.loads(told.stdout)
    assert vector @ memory.embedder.encode(["The ferry is late."])[0] >= pm.SAME_VECTORS
    assert compilers == (["torch._dynamo", "torch._meta_registrations"] if missed else [])
    assert compiled == [1, 2] and distributed == "torch.distributed"


def test_a_traced_model_gives_the_vectors_that_it_gave():
    """Of texts of any length and script, alone and together."""
    model = pm.load_sentence_transformer("all-MiniLM-L6-v2").model
    texts = ["Hm.", " Wo ÄRGERTE er sich?\n", "\u7063\u5cb8", "The keeper counts the boats. " * 90]
    before, traced = pm.unit_vectors(model, texts), pm.TracedModel(model)
    for after in (pm.unit_vectors(traced, texts), [pm.unit_vectors(traced, [text])[0] for text in texts]):
        assert (before * after).sum(axis=1).min() >= pm.SAME_VECTORS


def test_a_program_that_ends_does_not_wait_to_make_its_model_faster(monkeypatch):
    """Which it puts off until no turn has come for a moment."""
    begun, faster = threading.Event(), pm.faster
    monkeypatch.setattr(pm, "CALM_SECONDS", 3600)
    monkeypatch.setattr(pm, "faster", lambda model: begun.set() or faster(model))
    embedder = pm.Embedder("all-MiniLM-L6-v2")
    embedder.start()
    assert embedder.loaded.wait(60)
    wait_until(lambda: any(thread.name == "quicken" for thread in threading.enumerate()))
    embedder.close()
    wait_until(lambda: all(thread.name != "quicken" for thread in threading.enumerate()))
    assert not begun.is_set()


def test_a_traced_model_meets_few_lengths(monkeypatch):
    """What it has code for is kept for ever."""
    traced, met = pm.TracedModel(pm.load_sentence_transformer("all-MiniLM-L6-v2").model), set()
    program = traced._program
    monkeypatch.setattr(traced, "_program", lambda ids, *more: met.add(ids.shape[1]) or program(ids, *more))
    for count in range(1, 300, 3):
        traced.encode([" ".join(["sea"] * count)])
    assert met == set(range(pm.TOKEN_STEP, 256 + 1, pm.TOKEN_STEP))


def test_a_model_whose_traced_vectors_are_others_is_not_traced():
    """Here one that gives fewer dimensions where it is asked by `encode`."""
    model = copy(pm.load_sentence_transformer("all-MiniLM-L6-v2").model)
    model.truncate_dim = 64
    with pytest.raises(ValueError, match="other vectors"):
        pm.TracedModel(model)


@pytest.mark.skipif(len(pm.two_cores()) != 2, reason="threads are bound where there are two cores, on Linux")
def test_on_two_cores_a_turn_has_one_of_its_own(memory):
    """What it begins in the background has both, and so has a second turn beside it, and whatever comes after."""
    cores, background = set(pm.two_cores()), pm.Background()
    with pm.background_thread("behind") as behind, background.turn(), ThreadPoolExecutor(1) as beside:
        assert os.sched_getaffinity(0) == {min(cores)}
        assert behind.submit(os.sched_getaffinity, 0).result() == cores

        def second_turn() -> set[int]:
            pm.run_on(cores)  # a thread of the server has them from the start
            with background.turn():
                return os.sched_getaffinity(0)

        assert beside.submit(second_turn).result() == cores
    assert os.sched_getaffinity(0) == cores
    memory.embedder.encode(["loads it"])
    assert os.sched_getaffinity(memory.embedder._thread.native_id) == {max(cores)}


def test_the_background_can_be_paused_and_tells_how_far_it_is(server):
    """Nothing is lost by that: it goes on where it stopped."""
    assert call(server, "POST", "pause", {"paused": True}).json() == {"progress": {"paused": True, "work": []}}
    assert call(server, "POST", "pause", {"paused": "yes"}).status_code == 400
    call(server, "POST", "chats/long/messages", {"messages": LONG})
    vectors, store = server.server.memory.vectors, open_chat(server, "long").store
    texts = [pm.text_fingerprint(None, m["content"]) for m in LONG]
    wait_until(lambda: "long" in vectors._held)
    assert not store.vectors(vectors.embedder.key, texts)
    assert call(server, "POST", "pause", {"paused": False}).json()["progress"]["paused"] is False
    wait_until(lambda: len(store.vectors(vectors.embedder.key, texts)) == len(LONG))


def test_the_end_comes_while_the_background_is_paused(memory):
    """A summary that waits for it to go on is left for the next start."""
    chat, plan = summarised(memory, "c")
    memory.pause(True)
    memory.summarizer._plan("c", plan, "")
    wait_until(lambda: not memory.summarizer._plans)
    ending = threading.Thread(target=memory.close, daemon=True)
    ending.start()
    ending.join(60)
    assert not ending.is_alive()


def test_work_on_a_chat_that_is_deleted_meanwhile_is_no_trouble(memory, monkeypatch, caplog):
    """Its summaries, its vectors: nothing is left of them, and nobody is warned."""
    _, plan = summarised(memory, "c")
    note = memory.registry.catalogue.mark_due

    def too_late(chat_id, due):
        monkeypatch.undo()
        memory.registry.delete("c")
        note(chat_id, due)

    monkeypatch.setattr(memory.registry.catalogue, "mark_due", too_late)
    memory.summarizer._plans["c"] = plan, ""
    memory.summarizer._work_off("c")
    assert memory.registry.catalogue.due() == []
    memory.archive.append("d", LONG)
    with memory.registry.borrow("d") as chat:
        memory.registry.delete("d")
        memory.vectors._guarded(chat.put_vectors, "e", {})
    assert [r.getMessage() for r in caplog.records if r.thread == threading.get_ident()] == []


def test_an_imported_chat_that_is_deleted_as_it_becomes_a_named_one(memory, monkeypatch):
    """What was taken over of it stays, and the turn goes on."""
    rows = [{"is_user": m["role"] == "user", "name": m["role"], "mes": m["content"]} for m in LONG[:9]]
    [old] = memory.archive.take_in("\n".join(map(pm.json.dumps, rows)).encode())["chats"]

    def later(*_):
        monkeypatch.undo()
        memory.registry.delete(old["chat_id"])

    monkeypatch.setattr(memory.vectors, "later", later)
    request = pm.parse_request({"messages": [*LONG[:9], LONG[9], LONG[10]]})
    with memory.archive.enter(request, "named", pm.Deadline.after(60)) as (chat, path, _):
        assert (chat.id, len(path)) == ("named", 11)
    assert [line["chat_id"] for line in memory.chats()] == ["named"]


def test_feelings_of_messages_that_a_turn_takes_out_meanwhile_are_left_out(memory, monkeypatch):
    """Long chats are read in pieces, between which turns come."""
    monkeypatch.setattr(pm, "READ_AT_ONCE", 2)
    memory.archive.append("c", LONG[:5])
    with memory.registry.borrow("c") as chat:
        path = chat.path()
        rows = memory.feelings._rows(chat, path)
        first = next(rows)[0].id
        chat.store.commit(dropped=path[3:])
        assert [first, *(node.id for node, _, _ in rows)] == list(path[:3])
        assert len(list(pm.read_in_batches(chat, path))) == 3


@pytest.mark.parametrize("whole", [True, False])
def test_an_export_holds_together_though_a_turn_takes_messages_out_meanwhile(memory, monkeypatch, whole):
    """It can be read again."""
    monkeypatch.setattr(pm, "READ_AT_ONCE", 2)
    memory.archive.append("c", LONG[:5])
    with memory.registry.borrow("c") as chat:
        path, read = chat.path(), chat.store.read

        def taken_out_after(ids):
            """The messages that are asked for first."""
            del chat.store.read
            found = read(ids)
            chat.store.commit(dropped=path[3:])
            return found

        chat.store.read = taken_out_after
        if whole:
            copy = pm.read_export(memory.archive.export("c"))
        else:
            [copy], _ = pm.read_chats(memory.archive.export_transcript("c").encode())
    assert [m.content for m in copy.path] == [m["content"] for m in LONG[:3]]


def test_long_work_tells_what_is_left_and_how_long_it_takes():
    """By the rate of its newest steps; of little that waits nothing is told."""
    work = pm.LongWork("vectors", "messages wait", 2)
    assert work.row() is None
    work.expect("a", 100)
    assert work.row()["seconds"] is None
    for left in (60, 30, 10):
        work.expect("a", left)
    work.expect("b", 5)
    row = work.row()
    assert (row["waiting"], row["done"]) == (15, 90) and row["rate"] > 0 and "messages wait: 15" in row["words"]
    work.expect("a", 0)
    work.expect("b", 0)
    assert work.row() is None


def test_an_emotion_model_that_fails_stops_no_vectors(shared_upstream, data_dir):
    """Feelings are then read by the built-in reader, and the model is not loaded again for each message."""
    given_settings = settings(data_dir, shared_upstream.url, emotion_model=str(data_dir / "no model"))
    with LocalServer(given_settings) as running:
        call(running, "POST", "chats/long/messages", {"messages": LONG[:31]})
        index = open_chat(running, "long")
        keys = [n.fingerprint for n in index.nodes(index.path())]
        vectors = running.server.memory.vectors
        wait_until(
            lambda: len(index.store.vectors(vectors.embedder.name, keys)) == len(set(keys)), "the vectors of all"
        )
        rows = call(running, "GET", "chats/long/emotions").json()["messages"]
        assert len(rows) == 31
        model = running.server.memory.feelings._model
        assert model._failed
        with pytest.raises(pm.EmbedderUnavailable, match="no model"):
            model.read(["again"])


def test_a_message_is_looked_up_on_disk_once_where_the_embedder_has_failed(memory, monkeypatch):
    """Not three to five times a turn, for ever."""
    monkeypatch.setattr(memory.vectors, "later", lambda *_: None)  # whose job looks them up too
    memory.archive.append("c", LONG)
    with memory.registry.borrow("c") as chat:
        asked = []
        for name in ("vector_rows", "sentence_codes"):
            rows = getattr(chat.store, name)
            monkeypatch.setattr(chat.store, name, lambda *of, rows=rows: asked.extend(of[1]) or rows(*of))
        for _ in range(3):
            with chat.lock:
                chat.follow(chat.nodes(chat.path()), memory.embedder)
        assert len(asked) == 2 * len(set(asked)) == 2 * len(LONG)  # its own vectors, and its sentences'
        assert len(chat.index.unembedded) == len(LONG)


def test_vectors_that_a_disk_has_kept_waiting_are_made_when_it_is_back(memory):
    """A folder that is away for a moment, as one on a network drive may be: the chat's next turn has them made."""
    messages = messages_of(("Mira", "Good evening."), ("Robin", "I brought the key."))
    finish = memory.vectors._thread.submit
    memory.registry.create("c", explicit=True)
    with memory.registry.borrow("c") as chat:
        chat.store.commit(messages, {"head": messages[-1].id})
    away = chat.store.directory.rename(chat.store.directory.with_name("away"))
    memory.vectors.later(chat, [m.id for m in messages])
    finish(int).result()
    away.rename(chat.store.directory)
    memory.vectors.later(chat, [])
    finish(int).result()
    assert len(chat.store.vectors(memory.embedder.key, [m.fingerprint for m in messages])) == 2


def test_a_mood_is_not_read_anew_when_its_chat_is_opened_again(memory, monkeypatch):
    """Two hundred messages would be, in the first turn. The next program finds their readings, and the same mood."""

    def mood(engine) -> pm.Mood:
        with engine.registry.borrow("c") as chat, chat.lock:
            found = engine.feelings.mood(chat, chat.nodes(chat.path()))
            chat.store.commit()
            return found

    memory.archive.append("c", [*LONG, {"role": "user", "content": "I am so happy, this is the best day of my life!"}])
    assert sum(memory.vectors.of_chat("c")) == len(LONG) + 1
    before = mood(memory)
    memory.registry.close()
    monkeypatch.setattr(pm, "read_emotion", lambda *_: pytest.fail("a message was read anew"))
    with contextlib.closing(pm.PersonaMemory(memory.settings)) as again:
        assert mood(again) == before and before.label == "joy"


def test_a_mood_that_the_background_has_followed_is_the_same(memory, monkeypatch):
    """The chat goes on, or its newest message is another one: one or two messages are felt. On an older branch all."""
    memory.archive.append("c", [*LONG, {"role": "user", "content": "I am so happy, this is the best day of my life!"}])
    assert sum(memory.vectors.of_chat("c")) == len(LONG) + 1
    felt, feel = [], pm.MoodTrack.felt
    monkeypatch.setattr(pm.MoodTrack, "felt", lambda *given: felt.append(1) or feel(*given))
    with memory.registry.borrow("c") as chat, chat.lock:

        def mood(nodes) -> tuple[pm.Mood, int]:
            felt.clear()
            return memory.feelings.mood(chat, nodes), len(felt)

        nodes = chat.nodes(chat.path())
        fresh = [mood(some) for some in (nodes, nodes[:-1], nodes[:20])]
        assert fresh[0][0].label == "joy" != fresh[1][0].label and min(count for _, count in fresh) > 2
        mood(nodes[:-1])
        memory.feelings.read_ahead(chat, [], lambda: False)
        assert mood(nodes[:-1]) == (fresh[1][0], 1) and mood(nodes) == (fresh[0][0], 2)
        memory.feelings.read_ahead(chat, [], lambda: False)
        assert mood(nodes) == (fresh[0][0], 1) and mood(nodes[:20]) == fresh[2]


def test_a_turn_has_the_model_loaded_by_the_background(memory):
    """Itself it cannot wait for that, and would share the interpreter with it."""
    turn = {"messages": [PERSONA, *LONG[:9]]}
    late = memory.embedder.ask(["the ferry"], timeout=60)
    with pytest.raises(pm.EmbedderUnavailable, match="still loading"):
        late.result()
    memory.embedder.foresee(["the ferry"], [], timeout=60)
    assert memory.embedder._thread is None
    memory.builder.prepare(turn, "c", pm.Call(""))
    memory.vectors._thread.submit(int).result()
    assert memory.embedder.status == "ready"


def test_what_a_turn_will_ask_of_the_embedder_is_foreseen(data_dir, monkeypatch):
    """Where its chat looks for memories that is its query, embedded while its messages are written, and behind it the
    newest message; and nothing is embedded twice, once it is known that it does."""
    given = pm.Settings(data=str(data_dir), upstream="http://127.0.0.1:9/v1", model="m", context=700)
    with contextlib.closing(pm.PersonaMemory(given)) as memory:
        memory.embedder.encode(["loads it"])
        asked = ["Do you remember the ferry?", "Do you remember the letters?", "Do you remember the salt?"]
        asked.append(f"{asked[-1]} {'I still taste it on every wall of this old house. ' * 5}".strip())
        turns = [{"messages": [PERSONA, *LONG[:40], {"role": "user", "content": text}]} for text in asked]
        memory.vectors.later = lambda *_: None
        put, priorities = memory.embedder._put, []
        monkeypatch.setattr(memory.embedder, "_put", lambda job, p: priorities.append(p) or put(job, p))
        for turn in turns[:2]:
            priorities.clear()
            memory.builder.prepare(turn, "c", pm.Call(""))
        assert priorities.count(pm.TURN) == 3  # the query; the newest message; older ones
        foresee = functools.partial(memory.recaller.foresee, deadline=pm.Deadline.after(60))
        for turn, own in zip(turns[2:], asked[2:], strict=True):
            with memory.archive.enter(pm.parse_request(turn), "c", pm.Deadline.after(60), foresee):
                (none, (query,)), last = list(memory.embedder._foreseen)[-2:]
                assert none == () and query.startswith("the salt?") and last == ((own,), ())


def test_a_turn_waits_for_the_disk_at_its_end(memory):
    """Once, for its messages and the reply together; what is no turn waits at once."""
    request, levels = pm.parse_request({"messages": LONG[:1]}), []

    def level(chat, *_):
        with chat.store._database.use() as cache:
            levels.append(cache._sql("PRAGMA synchronous").fetchone()[0])

    memory.archive.append("c", LONG[:2])
    with memory.archive.enter(request, "c", pm.Deadline.after(60), level) as (chat, *_):
        level(chat)
    assert levels == [1, 2]


def test_a_pin_makes_no_index_anew(memory, monkeypatch):
    """What a user marks changes no word."""
    memory.archive.append("c", LONG)
    with memory.registry.borrow("c") as chat:
        with chat.lock:
            chat.follow(chat.nodes(chat.path()), memory.embedder)
        memory.archive.change_message("c", chat.path()[1], {"pinned": True})
        monkeypatch.setattr(chat.index, "put_on", lambda *_: pytest.fail("the index was made anew"))
        with chat.lock:
            chat.follow(chat.nodes(chat.path()), memory.embedder)


def test_an_index_lets_go_of_what_has_left_its_branch():
    """A chat that is swiped and edited for months holds no more than its branch."""
    index, nodes = pm.MemoryIndex(), []
    store = {}
    for number in range(3 * pm.STALE_ROWS):
        message = pm.new_message(pm.ROOT, "user", f"swipe {number}")
        tree = pm.Tree()
        tree.put(message, 0)
        store[message.id] = message
        nodes = list(tree.nodes.values())
        index.follow(nodes, lambda ids: [store[i] for i in ids])
        index.add_vectors({nodes[0].fingerprint: np.ones(1, np.float32)})
    assert len(index._rows) <= pm.STALE_ROWS + 3
    assert index.vector(nodes[0].fingerprint) is not None


def test_an_index_whose_texts_could_not_be_read_is_made_whole_by_the_next_turn():
    """A locked file in the middle of a long chat: no message is left out afterwards."""
    tree, messages = pm.Tree(), {}
    for number in range(pm.SEGMENT + 1):
        message = pm.new_message(next(reversed(messages), pm.ROOT), "user", f"line {number}")
        messages[message.id] = message
        tree.put(message, number)
    nodes, index = tree.branch(message.id), pm.MemoryIndex()

    def read(ids):
        """The messages, as long as the last one is not among them."""
        if message.id in ids:
            raise pm.StoreError("locked")
        return [messages[i] for i in ids]

    with pytest.raises(pm.StoreError):
        index.follow(nodes, read)
    assert len(index.follow(nodes, lambda ids: [messages[i] for i in ids])) == 1
    assert len(index.evidence(["line"], None).cosine) == len(messages)


def stored_rows(store: pm.ChatStore) -> int:
    """How many derived ones the disk holds."""
    with store._database.use() as cache:
        return len(pm.stored_rows(cache, "t:"))


def read_at_opening(memory, monkeypatch) -> tuple[list[str], pm.Evidence]:
    """The messages that are read for the index of a chat which is opened, and what speaks for each one then."""
    registry = pm.ChatRegistry(Path(memory.settings.data))
    with contextlib.closing(registry), registry.borrow("c") as chat, chat.lock, monkeypatch.context() as patched:
        asked, read = [], chat.store.read
        patched.setattr(chat.store, "read", lambda ids: asked.extend(ids) or read(ids))
        index = chat.follow(chat.nodes(chat.path()), memory.embedder)
        chat.store.commit()
        return asked, index.evidence(["lamp", "ferry"], None)


def test_a_chat_that_is_opened_again_is_not_read_again(memory, monkeypatch):
    """What its index knows of the messages was kept, but for the last of them; it is the same, and damage does none."""
    monkeypatch.setattr(memory.vectors, "later", lambda *_: None)
    lines = [f"Line {n}. Did {('Ann', 'we')[n % 2]} see lamp {n % 7}? The ferry left in May." for n in range(450)]
    memory.archive.append("c", [{"role": pm.CHAT_ROLES[n % 2], "content": text} for n, text in enumerate(lines)])
    asked, fresh = read_at_opening(memory, monkeypatch)
    assert len(asked) == len(lines)
    for damaged, count in ((None, 50), (b"no longer what it was", 450), (5, 450), ("text", 450)):
        if damaged:
            with memory.registry.borrow("c") as chat, chat.store._database.transaction() as cache:
                cache._sql("UPDATE Cache SET value = ? WHERE key GLOB 't:*'", (damaged,))
        asked, again = read_at_opening(memory, monkeypatch)
        assert len(asked) == count, damaged
        for one, other in zip(vars(fresh).values(), vars(again).values(), strict=True):
            np.testing.assert_equal(one, other)


def test_an_imported_chat_is_read_for_its_index_in_the_background(memory, monkeypatch):
    """Its first turn finds that done."""
    monkeypatch.setattr(memory.vectors, "embed", lambda *_: None)
    memory.archive.append("c", [LONG[0] | {"content": f"Line {n}."} for n in range(3 * pm.SEGMENT)])
    with memory.registry.borrow("c") as chat:
        wait_until(lambda: stored_rows(chat.store) == 3 + 2)  # the tree, and the index as a whole
    monkeypatch.setattr(pm, "message_rows_of", lambda cache: pytest.fail("all messages were read"))
    assert read_at_opening(memory, monkeypatch)[0] == []


def test_clauses_are_read_in_linear_time():
    """Each character is looked at once: counted, not timed."""
    steps = [m.end() - m.start() for m in pm.CLAUSES.finditer("word " * 600)]
    assert sum(steps) == 3000
    assert pm.message_traits("Really?? Yes")[0] == pytest.approx(8 / 12)


# ---------------------------------------------------------------------------- other chats


def test_chats_of_one_family_are_not_opened_to_carry_over(memory, monkeypatch):
    """A hundred branches of one chat: their lines say whose they are."""
    named = [m | ({"name": "Mira"} if m["role"] == "assistant" else {}) for m in LONG[:4]]
    memory.archive.append("root", named)
    for number in range(12):
        memory.registry.create(f"branch {number}", explicit=True)
        with memory.registry.borrow(f"branch {number}") as chat, chat.lock:
            chat.store.commit(info={"family": "root", "character": "Mira"})
            memory.registry.enter(chat, ())
    memory.recaller.change_character("Mira", True)
    with memory.registry.borrow("root") as chat:
        opened, take = [], memory.registry._take
        monkeypatch.setattr(memory.registry, "_take", lambda folder: opened.append(folder) or take(folder))
        assert memory.recaller._related_chats(chat) == [] and opened == []


def test_what_is_found_is_dated_as_it_was_said(server):
    """Not as it was imported."""
    said = {"role": "user", "content": "The heron stood in the reeds.", "timestamp": "2021-05-04T10:00:00+00:00"}
    call(server, "POST", "chats/old/messages", {"messages": [said]})
    (found,) = call(server, "GET", "search?q=heron").json()["found"]
    assert found["at"] == 1620122400.0


# ---------------------------------------------------------------------------- summaries


def summarised(memory, chat_id: str) -> tuple[pm.Chat, pm.SummaryPlan]:
    """A chat with summaries, and the plan that made them."""
    memory.archive.append(chat_id, LONG)
    with memory.registry.borrow(chat_id) as chat:
        plan = pm.SummaryPlan(chat.store.head, 0, 40, 1200, 8192)
        memory.summarizer.summarize_branch(chat, plan)
        return chat, plan


def test_a_users_words_for_a_stale_summary_end_its_making(memory):
    """They stand for the stretch, which is due no more: nothing is made over and over."""
    chat, plan = summarised(memory, "c")
    first = next(s for s in chat.store.summaries.values() if s.start == 0)
    memory.archive.change_message("c", chat.path()[2], {"content": "Other words."})
    assert chat.store.summaries[first.id].stale
    memory.summarizer.change_summary("c", first.id, "My own words of it.")
    assert not memory.summarizer._due(chat, plan)
    memory.summarizer.summarize_branch(chat, plan)
    assert chat.store.summaries[first.id].text == "My own words of it."


def test_a_summary_that_can_not_be_stored_is_not_tried_for_ever(memory):
    """As where an older version has left a user's summary stale."""
    chat, plan = summarised(memory, "c")
    first = next(s for s in chat.store.summaries.values() if s.start == 0)
    chat.store.commit(summaries=[pm.replace(first, source="user", stale=True)])
    memory.summarizer.summarize_branch(chat, plan)
    assert chat.store.summaries[first.id].source == "user"


def test_after_closing_no_model_is_asked(memory, monkeypatch):
    """A summary that was about to ask finds out that the program ends."""
    monkeypatch.setattr(memory.upstream, "complete", lambda *_: pytest.fail("the model was asked"))
    memory.summarizer.close()
    with pytest.raises(pm.UpstreamUnavailable):
        memory.summarizer._ask("m", "", True, [], 10)


def test_the_end_waits_for_no_embedder(data_dir, shared_upstream, monkeypatch, caplog):
    """Python joins a pool's thread before it ends: one that waits for a model that is still loading has to go on."""
    loading, load = threading.Event(), pm.load_sentence_transformer
    monkeypatch.setattr(pm, "load_sentence_transformer", lambda name: loading.wait(60) and load(name))
    with LocalServer(settings(data_dir, shared_upstream.url), ready=False) as running:
        vectors = running.server.memory.vectors
        assert say(running.url, [PERSONA, *LONG, LONG[0]], chat_id="long").status == 200
        wait_until(lambda: not vectors.embedder._jobs.empty(), "the background to want vectors")
        (thread,) = vectors._thread._threads
    thread.join(30)
    assert not thread.is_alive()
    with pytest.raises(pm.EmbedderUnavailable):
        vectors.embedder.encode(["what comes too late"])
    loading.set()
    assert "could not be computed" not in caplog.text


def test_the_background_waits_for_turns_and_not_for_ever(monkeypatch):
    """A turn that takes very long keeps nothing from being done."""
    background, over = pm.Background(), threading.Event()
    monkeypatch.setattr(pm, "GIVE_WAY_SECONDS", 60)
    worker = threading.Thread(target=lambda: (background.give_way(), over.set()))
    with background.turn():
        worker.start()
        assert not over.wait(0.02)
    assert over.wait(60)
    worker.join()
    monkeypatch.setattr(pm, "GIVE_WAY_SECONDS", 0.001)
    with background.turn():
        background.give_way()
