"""The chat store and the shelf, on a real disk."""

import pickle
import shutil
import sqlite3
from dataclasses import replace

import diskcache
import numpy as np
import pytest

import persona_memory as pm


def chain(*texts, parent=pm.ROOT, **more) -> list[pm.Message]:
    """Messages one under the other, user first."""
    messages = []
    for i, text in enumerate(texts):
        role = "assistant" if i % 2 else "user"
        key = pm.message_id(parent, pm.message_digest(role, text))
        messages.append(pm.Message(key, parent, role, text, tokens=5, **more))
        parent = key
    return messages


@pytest.fixture
def shelf(tmp_path):
    """An opened shelf in an empty folder."""
    opened = pm.ChatShelf(tmp_path)
    opened.start()
    return opened


@pytest.fixture
def store(shelf):
    """A chat on it."""
    return shelf.create("a chat", explicit=True)


def reopened(store) -> pm.ChatStore:
    """The same chat as another process sees it."""
    return pm.ChatStore(store.directory)


def test_what_was_written_is_read_again(store):
    """Messages in all their fields, the chat's facts, and the tree."""
    messages = chain("héllo 🐈", "hi\r\nthere \ud800", "two\0parts", timestamp="2024-05-01", name="Robin", at=12.5)
    store.commit(messages, {"head": messages[-1].id})
    again = reopened(store)
    assert again.read([m.id for m in messages]) == messages
    assert (again.head, again.id) == (messages[-1].id, "a chat")
    assert again.tree.path(again.head) == [m.id for m in messages]
    assert again.tree.nodes == store.tree.nodes


def test_another_process_catches_up(store):
    """New messages and new states of old ones, written by either side, reach the other."""
    other = reopened(store)
    first = chain("one", "two", confirmed=False)
    store.commit(first)
    other.catch_up()
    assert other.tree.nodes == store.tree.nodes
    other.commit([replace(first[0], confirmed=True), *chain("three", parent=first[1].id)], {"head": "x"})
    store.commit(chain("four"))  # catches up inside its own transaction
    other.catch_up()
    assert other.tree.nodes == store.tree.nodes
    assert store.tree.is_confirmed(first[0].id) and store.head == "x"
    assert sorted(n.order for n in store.tree.nodes.values()) == [0, 1, 2, 3]


def test_only_the_newest_messages_stay_in_ram_and_the_rest_is_read(store):
    """Working memory is bounded; what is not in it comes from the disk."""
    messages = chain(*[f"line {n}" for n in range(300)])
    store.commit(messages)
    path = [m.id for m in messages]
    store.keep_recent(path)
    assert list(store._recent) == path[-pm.WORKING_MEMORY :]
    for end in range(40, 300):
        store.keep_recent(path[:end])
    assert len(store._recent) <= pm.WORKING_MEMORY * pm.OPEN_BRANCHES
    assert store.read(path) == messages


def test_the_tree_knows_its_branches_and_replies():
    """Counts go by what requests have shown; replies wait under their parent until one does."""
    tree = pm.Tree()
    messages = chain("one", "two", "three")
    for order, message in enumerate(messages):
        tree.put(message, order)
    reply = pm.Message("r", messages[-1].id, "assistant", "reply", confirmed=False)
    tree.put(reply, 3)
    assert (tree.messages, tree.branches, tree.replies[messages[-1].id]) == (3, 1, ["r"])
    tree.put(replace(reply, confirmed=True), 3)
    assert (tree.messages, tree.branches, tree.replies[messages[-1].id]) == (4, 1, [])
    tree.put(chain("other", parent=messages[0].id)[0], 4)
    assert (tree.messages, tree.branches) == (5, 2)
    assert tree.is_below("r", messages[0].id) and not tree.is_below(messages[0].id, "r")


def test_vectors_are_kept_by_text_and_broken_ones_are_left_out(store):
    """Unit vectors come back; bytes of another length or of no unit vector count as missing."""
    good = np.array([0.6, 0.8], np.float32)
    store.put_vectors("model", {"good": good, "long": good * 9})
    store._disk.run(store._cache.set, "v:model:odd", b"123")
    store._disk.run(store._cache.set, "v:model:text", "no bytes")
    found = store.vectors("model", ["good", "long", "odd", "text", "absent"])
    assert list(found) == ["good"] and np.array_equal(found["good"], good)
    assert store.vectors("another model", ["good"]) == {}


def test_pickles_are_refused_both_ways(store, tmp_path):
    """A value that would be pickled is not written, and a planted pickle is not loaded."""
    with pytest.raises(pm.StoreError):
        store._disk.run(store._cache.set, "m:x", {"a": "dict"})
    with pytest.raises(pm.StoreError):
        store._disk.run(store._cache.set, ("a", "tuple"), "text")
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    database = sqlite3.connect(store.directory / "cache.db")
    database.execute("UPDATE Cache SET mode = ?, value = ?", (diskcache.core.MODE_PICKLE, pickle.dumps(Payload())))
    database.commit()
    database.close()
    with pytest.raises(pm.StoreError):
        reopened(store)
    assert not marker.exists()


def test_nothing_is_evicted(store):
    """diskcache's defaults, which delete old entries past a size, are off."""
    assert store._cache.eviction_policy == "none"
    assert store._cache.size_limit == store._cache.disk_min_file_size == pm.FOREVER
    assert store._cache.sqlite_synchronous == 2


def test_the_last_reports_are_kept(store):
    """Newest first, and no more than are asked for or kept."""
    for number in range(pm.KEPT_REPORTS + 3):
        store.commit(report=pm.PromptReport(number, "", 1, {}, {"memories": 0}, 0, 0, [], 0.0))
    assert [r["at"] for r in store.reports(2)] == [pm.KEPT_REPORTS + 2, pm.KEPT_REPORTS + 1]
    assert len(store.reports(1000)) == pm.KEPT_REPORTS
    assert sum(k.startswith("p:") for k in store._disk.run(lambda: list(store._cache.iterkeys()))) == pm.KEPT_REPORTS


def test_ids_cannot_walk_the_file_system(shelf, tmp_path):
    """Whatever the id, the chat is one folder of the shelf."""
    for chat_id in ("../../up", "/etc/passwd", "a\0b", "x" * 5000, "..", "ü 🐈"):
        store = shelf.create(chat_id, explicit=True)
        assert store.directory.parent == tmp_path / "chats" and len(store.directory.name) == 32
        assert shelf.get(chat_id).id == chat_id


@pytest.mark.parametrize("damage", ["absent", "garbage"])
def test_a_lost_catalogue_is_made_anew(shelf, tmp_path, damage):
    """The list and the locator come back from the chats."""
    store = shelf.create("chat-1", explicit=False)
    messages = chain("where is the key", "under the mat")
    store.commit(messages)
    shelf.enter(store, [m.id for m in messages])
    shelf._disk.run(shelf._catalogue.close)
    shutil.rmtree(tmp_path / "catalogue")
    if damage == "garbage":
        (tmp_path / "catalogue").mkdir()
        (tmp_path / "catalogue" / "cache.db").write_bytes(b"no database" * 1000)
    again = pm.ChatShelf(tmp_path)
    again.start()
    assert [c["chat_id"] for c in again.chats()] == ["chat-1"]
    digests = [(m.role, m.digest) for m in messages]
    found, _ = again.locate(digests, lambda chat: pm.align(chat.tree, [d for _, d in digests]))
    assert found.id == "chat-1"


def test_a_deleted_chat_is_gone_from_list_locator_and_disk(shelf, tmp_path):
    """Another chat with the same text stays."""
    for chat_id in ("chat-1", "chat-2"):
        store = shelf.create(chat_id, explicit=False)
        store.commit(chain("the very same words"))
        shelf.enter(store, store.tree.nodes)
    shelf.delete(shelf.get("chat-1"))
    assert [c["chat_id"] for c in shelf.chats()] == ["chat-2"] and len(shelf) == 1
    assert shelf.get("chat-1") is None
    digest = chain("the very same words")[0].digest
    assert shelf._chats_of([digest]) == [["chat-2"]]


def test_many_chats_may_be_used_by_turns(shelf):
    """More chats than stay open; each is found again whole."""
    for number in range(pm.OPEN_CHATS + 8):
        shelf.create(f"chat {number}", explicit=True).commit(chain(f"words of {number}"))
    for number in range(pm.OPEN_CHATS + 8):
        store = shelf.get(f"chat {number}")
        assert store.read(list(store.tree.nodes))[0].content == f"words of {number}"
    assert len(shelf._open) == pm.OPEN_CHATS


def test_a_chat_that_another_process_deletes_or_makes_anew(shelf, tmp_path):
    """Nothing is written into a file that is gone, and nothing of the old chat is read."""
    shelf.create("chat", explicit=True).commit(chain("old words"))
    other = pm.ChatShelf(tmp_path)
    other.start()
    other.delete(other.get("chat"))
    assert shelf.get("chat") is None
    other.create("chat", explicit=True).commit(chain("new words"))
    seen = shelf.get("chat")
    assert [m.content for m in seen.read(list(seen.tree.nodes))] == ["new words"]
