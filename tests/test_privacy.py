"""Whose eyes the data folder is for, and that forgotten words are nowhere in it once they are erased."""

import os
import re
import stat
import time

import httpx
import pytest
from fakes import LocalServer, say, settings, wait_until

import persona_memory as pm

SECRET = "Xanthippe"
TOLD = [
    {"role": "user", "content": f"My secret name is {SECRET}, born in Ostrava. I slept above the mule market."},
    {"role": "assistant", "content": "I will keep that name like a lamp under a cloak."},
    {"role": "user", "content": "The red key opens the crypt below the chapel."},
    {"role": "assistant", "content": "Then keep it away from the abbot."},
]


def call(running, method: str, path: str, **options) -> httpx.Response:
    """A call of the API on the chat."""
    return httpx.request(method, f"{running.url}/api/persona_memory/chats/tale{path}", timeout=60, **options)


def hits(folder, word: str = SECRET) -> list[str]:
    """The files below a folder that hold a word, as text or inside JSON."""
    return [str(f) for f in folder.rglob("*") if f.is_file() and word.encode() in f.read_bytes()]


def keys(chat) -> list[str]:
    """The keys of all rows of a chat."""
    with chat.store._database.use() as cache:
        return list(cache.iterkeys())


def told(running) -> list[dict]:
    """The chat, told to the memory, with everything that the memory makes of it."""
    say(running.url, [{"role": "system", "content": "You are Mira."}, *TOLD], stream=False, chat_id="tale")
    call(running, "GET", "/search", params={"q": "what is the secret name?", "k": 5})
    call(running, "GET", "/emotions")
    with running.server.memory.registry.borrow("tale") as chat:
        texts = chat.tree.nodes[chat.path()[0]].digest, chat.tree.nodes[chat.path()[1]].digest
        summary = pm.new_summary(1, texts, 0, f"The user's name is {SECRET}.", 80, "model")
        fact = pm.Fact("f1", "name", f"The name is {SECRET}", f"name is {SECRET}", texts[0], 0, 3)
        chat.store.commit(summaries=[summary], facts=[fact])
    return call(running, "GET", "/messages").json()["messages"]


@pytest.fixture
def running(upstream, data_dir):
    """A proxy."""
    with LocalServer(settings(data_dir, upstream.url, no_guidance=True)) as server:
        yield server


def test_words_that_are_forgotten_for_good_are_nowhere_on_the_disk(running, upstream, data_dir):
    """Text, summaries, facts, vectors, readings and the catalogue; and the client's showing them again changes that
    not."""
    row = told(running)[0]
    assert hits(data_dir)
    with running.server.memory.registry.borrow("tale") as chat:
        fingerprint, digest = chat.tree.nodes[row["id"]].fingerprint, chat.tree.nodes[row["id"]].digest
        # Its vector, its sentences' vectors, and its reading, some of which the background makes.
        wait_until(lambda: {"v", "q", "e"} <= {key[0] for key in keys(chat) if key.endswith(fingerprint)})
    answer = call(running, "DELETE", f"/messages/{row['id']}", params={"for_good": "on"})
    assert answer.json()["forgotten"] and answer.json()["erased"] and not answer.json()["content"]
    assert hits(data_dir) == []
    assert [f for f in data_dir.rglob("*") if f.is_file() and fingerprint.encode() in f.read_bytes()] == []
    assert hits(data_dir / "catalogue", digest) == []
    say(running.url, [*TOLD, {"role": "user", "content": "And now?"}], stream=False, chat_id="tale")
    with running.server.memory.registry.borrow("tale") as chat:
        assert row["id"] in chat.path()
    assert hits(data_dir) == []
    assert len(call(running, "GET", "/search", params={"q": "what is the secret name?"}).json()["memories"]) > 0


def test_words_that_were_erased_come_back_where_the_user_wants_them_and_the_client_shows_them(running):
    """The client has them; the memory takes them anew."""
    row = told(running)[0]
    call(running, "DELETE", f"/messages/{row['id']}", params={"for_good": "on"})
    call(running, "PATCH", f"/messages/{row['id']}", json={"forgotten": False})
    shown = [{"role": "system", "content": "You are Mira."}, *TOLD, {"role": "user", "content": "And now?"}]
    say(running.url, shown, stream=False, chat_id="tale")
    assert SECRET in call(running, "GET", "/messages").json()["messages"][0]["content"]


def test_forgotten_words_are_kept_for_the_undo_and_erased_after_it(running, data_dir):
    """The time is in days; the look for them is part of the start, and of every hour."""
    row = told(running)[0]
    call(running, "DELETE", f"/messages/{row['id']}")
    registry = running.server.memory.registry
    registry.erase_lapsed(30)
    assert hits(data_dir)
    with registry.borrow("tale") as chat:  # as if it had been forgotten 31 days ago
        marks = {
            digest: {name: pm.asdict(pm.replace(m, at=time.time() - 31 * 86400)) for name, m in some.items()}
            for digest, some in chat.store.marks.items()
        }
        with chat.store._database.transaction() as cache:
            for digest, some in marks.items():
                cache[f"k:{digest}"] = pm.json.dumps(some)
        chat.store._take_over(f"k:{digest}", some)
        registry.enter(chat, ())
    registry.erase_lapsed(30)
    assert hits(data_dir) == []
    assert registry.catalogue.forgetful(time.time()) == []


def test_a_program_with_no_undo_erases_at_once(upstream, data_dir):
    """`--forget-after 0`."""
    with LocalServer(settings(data_dir, upstream.url, forget_after=0)) as running:
        row = told(running)[0]
        call(running, "PATCH", f"/messages/{row['id']}", json={"forgotten": True})
        assert hits(data_dir) == []


def test_the_same_words_of_another_speaker_keep_what_was_made_of_them(data_dir):
    """Forgetting is by speaker and words; vectors are by name and words."""
    chat = pm.Chat(data_dir)
    first = pm.new_message("", "user", "I am from Ostrava.", "Ann")
    second = pm.new_message(first.id, "user", "I am from Ostrava.", "Bob")
    chat.store.commit([first, second])
    vector = pm.np.eye(1, 384, dtype=pm.np.float32)[0]
    chat.store.put_vectors("e", {m.fingerprint: vector for m in (first, second)})
    chat.store.commit(marked=[pm.replace(first, forgotten=True)])
    chat.erase([first.digest])
    assert [m.content for m in chat.store.read([first.id, second.id])] == ["", "I am from Ostrava."]
    assert list(chat.store.vectors("e", [first.fingerprint, second.fingerprint])) == [second.fingerprint]
    chat.close()


def test_what_is_made_of_erased_words_too_late_is_not_kept(data_dir):
    """Whoever read them before may bring their vectors after; when they are said again, these are kept."""
    chat, other = pm.Chat(data_dir), pm.ChatStore(data_dir)
    said = pm.new_message("", "user", "I am from Ostrava. It is far.", "Ann")
    chat.store.commit([said], {"chat_id": "tale"})
    other.catch_up()
    chat.store.commit(marked=[pm.replace(said, forgotten=True)])
    chat.erase([said.digest])
    other.catch_up()
    vectors = {said.fingerprint: pm.np.eye(1, 384, dtype=pm.np.float32)}

    def bring(store) -> list[int]:
        """How many vectors of the text and of its sentences are there after they were brought."""
        store.put_vectors("e", {h: rows[0] for h, rows in vectors.items()})
        store.put_sentence_codes("e", {h: pm.vector_codes(rows) for h, rows in vectors.items()})
        return [
            len(store.vectors("e", vectors)),
            sum(len(names) for names, *_ in store.sentence_codes("e", vectors)),
        ]

    assert bring(chat.store) == bring(other) == [0, 0]
    chat.store.commit([pm.new_message(said.id, "user", said.content, "Ann")])
    chat.store.commit(marked=[pm.replace(said, forgotten=False)])
    chat.store.commit([said])
    assert bring(chat.store) == [1, 1]
    chat.close()
    other.close()


def test_what_the_index_keeps_of_erased_words_is_erased(data_dir):
    """It holds many messages' words, compressed; another program that has the chat open does not bring it back."""
    store, other = pm.ChatStore(data_dir), pm.ChatStore(data_dir)
    message = pm.new_message("", "user", SECRET)
    for one in (store, other):
        one.catch_up()
        one.put_derived(f"of {id(one)}", SECRET)
    store.commit([message], info={"chat_id": "c"})
    store.commit(marked=[pm.replace(message, forgotten=True)])
    assert store.derived(f"of {id(store)}") == SECRET
    store.erase([message.digest])
    other.commit(info={"seen": 1})
    for one in (store, other):
        with one._database.use() as cache:
            assert pm.stored_rows(cache, "t:") == {}
        one.close()


def test_what_is_known_of_a_text_is_not_kept_as_known_of_the_one_that_stood_there_before(data_dir):
    """The index of a branch may be made while a user rewords one of its messages."""
    chat, messages = pm.Chat(data_dir), []
    for number in range(pm.SEGMENT):
        messages.append(pm.new_message(messages[-1].id if messages else "", "user", f"Line {number} of the log."))
    chat.store.commit(messages)
    nodes = chat.tree.branch(messages[-1].id)
    chat.store.commit(marked=[pm.replace(messages[3], content="Other words.", shown=messages[3].content)])
    for branch, kept in ((nodes, 0), (chat.tree.branch(messages[-1].id), 1)):
        list(pm.segments_of(branch, 0, pm.Counter(), chat.store.read, chat.store))
        assert len(chat.store._derived) == kept
    chat.close()


def test_a_forgotten_fact_is_erased_and_does_not_come_back(running, data_dir):
    """There is no undo for it, so nothing of it is kept; its id is, so that it is not found again."""
    told(running)
    with running.server.memory.registry.borrow("tale") as chat:
        digest = chat.tree.nodes[chat.path()[3]].digest
        chat.store.commit(facts=[pm.Fact("f2", "pet", "Has a griffinfly", "griffinfly", digest, 3, 3)])
    assert hits(data_dir, "griffinfly")
    assert call(running, "DELETE", "/facts/f2").json()["forgotten"]
    assert hits(data_dir, "griffinfly") == []
    with running.server.memory.registry.borrow("tale") as chat:
        assert chat.store.facts["f2"].forgotten


def test_a_chat_that_is_deleted_leaves_nothing(running, data_dir):
    """Words and what was made of them."""
    told(running)
    assert call(running, "DELETE", "").json()["deleted"]
    wait_until(lambda: not hits(data_dir), "the words are gone", 10)


@pytest.mark.skipif(os.name != "posix", reason="Windows has other rights")
def test_files_and_folders_are_for_their_owners_eyes(running, data_dir):
    """Whatever the umask was; an older version's folders are closed at the start."""
    told(running)
    modes = {str(f): stat.S_IMODE(f.stat().st_mode) for f in (data_dir, *data_dir.rglob("*"))}
    assert len(modes) > 5
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


@pytest.mark.skipif(os.name != "posix", reason="Windows has other rights")
def test_the_folders_of_an_older_version_are_closed(data_dir):
    """Those of this program only, not the one that a user has named."""
    for name in ("chats", "catalogue", "characters"):
        (data_dir / name).mkdir(parents=True)
        (data_dir / name).chmod(0o755)
    data_dir.chmod(0o755)
    registry = pm.ChatRegistry(data_dir)
    registry.start()
    registry.close()
    assert {f.name: oct(stat.S_IMODE(f.stat().st_mode)) for f in data_dir.iterdir()} == dict.fromkeys(
        ("chats", "catalogue", "characters"), "0o700"
    )
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o755


def test_an_export_of_erased_words_can_be_read_again(running, data_dir, tmp_path):
    """Place and digest are in it, the words are not."""
    row = told(running)[0]
    call(running, "DELETE", f"/messages/{row['id']}", params={"for_good": "on"})
    exported = call(running, "GET", "/export").text
    assert SECRET not in exported
    call(running, "DELETE", "")
    answer = httpx.post(f"{running.url}/api/persona_memory/import", content=exported, timeout=60)
    assert answer.status_code == 200, answer.text
    rows = call(running, "GET", "/messages").json()["messages"]
    assert rows[0]["erased"] and rows[0]["forgotten"] and re.match("I will keep", rows[1]["content"])
