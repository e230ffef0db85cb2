"""The chat store and the registry of chats, on a real disk."""

import json
import os
import pickle
import shutil
import sqlite3
import tempfile
import threading
import tracemalloc
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import diskcache
import numpy as np
import pytest
from fakes import wait_until
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

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
def registry(tmp_path):
    """The chats of an empty folder."""
    opened = pm.ChatRegistry(tmp_path)
    yield opened
    opened.close()


def made(registry, chat_id: str, *texts: str, explicit=True) -> pm.ChatStore:
    """The store of a new chat with those messages."""
    registry.create(chat_id, explicit)
    with registry.borrow(chat_id) as chat, chat.lock:
        chat.store.commit(chain(*texts))
        registry.enter(chat, chat.tree.nodes)
        return chat.store


def texts_of(registry, chat_id: str) -> list[str]:
    """The messages of a chat."""
    with registry.borrow(chat_id) as chat:
        return [m.content for m in chat.store.read(list(chat.tree.nodes))]


@pytest.fixture
def store(registry):
    """A chat in it."""
    return made(registry, "a chat")


def put(store, key, value) -> None:
    """Writes a row of any kind into a chat's database."""
    with store._database.use() as cache:
        cache.set(key, value)


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


def test_a_message_that_was_taken_out_and_written_again_is_there(store):
    """For another process that has seen neither."""
    (message,) = chain("said")
    store.commit([message])
    other = reopened(store)
    store.commit(dropped=[message.id])
    store.commit(chain("said", "answered"))
    other.catch_up()
    assert [m.content for m in other.read(list(other.tree.nodes))] == ["said", "answered"]


def test_what_was_asked_for_last_stays_in_ram_and_the_rest_is_read(store, monkeypatch):
    """Working memory is bounded; what is not in it comes from the disk."""
    monkeypatch.setattr(pm, "WORKING_MEMORY", 50)
    messages = chain(*[f"line {n}" for n in range(300)])
    store.commit(messages)
    path = [m.id for m in messages]
    assert store.read_again(path) == messages
    assert list(store._recent) == path[-50:]
    store.read_again(path[-50:-40])
    store.read_again(path[:40])
    assert list(store._recent) == [*path[-50:-40], *path[:40]]
    assert store.read(path) == messages


def test_opening_a_long_chat_takes_little_more_than_it_holds(store):
    """Its texts are not read all at once, and SQLite keeps few pages of its files, and maps none."""
    store.commit(chain(*(f"{n}: {'the lamp is lit ' * 100}" for n in range(4000))))
    shares = []
    for _ in range(3):  # threads that other tests have left behind may take some, too
        tracemalloc.start()
        again = reopened(store)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        shares.append(peak / kept)
        if shares[-1] < 3:
            break
    assert len(again.tree.nodes) == 4000 and min(shares) < 3, shares
    with again._database.use() as cache:
        assert cache._sql("PRAGMA cache_size").fetchone() == (pm.PAGES_IN_RAM,)
        assert cache._sql("PRAGMA mmap_size").fetchone() == (0,)


def state_of(tree: pm.Tree) -> tuple:
    """All that a tree tells, its nodes in all their fields."""
    lists = [{key: ids for key, ids in some.items() if ids} for some in (tree.children, tree.by_digest, tree.replies)]
    return {n.id: asdict(n) for n in tree.nodes.values()}, *lists, tree.marked, tree.unshown, tree.ends, tree.messages


def test_a_long_chat_is_opened_without_its_messages(store, monkeypatch):
    """Its tree was kept; what has changed since then is taken over. Damage to what was kept costs no more than time."""
    messages = chain(*(f"line {n}" for n in range(pm.LEAST_KEPT)), name="Ann", at=12.5)
    store.commit(messages)
    store.commit(marked=[replace(messages[3], content="other words", shown=messages[3].content)])
    parts = [pm.new_summary(1, [m.digest for m in some], 0, "so far", 9, "m") for some in (messages[:4], messages[4:8])]
    store.commit(summaries=parts)
    reopened(store).commit(info={"seen": 1})  # it reads all, and what is committed next keeps the tree
    (reply,) = chain("a reply", parent=messages[-1].id, confirmed=False)
    branch = chain("another branch", "goes on", "and is dropped", parent=messages[-9].id)
    store.commit([reply, *branch])
    store.commit(marked=[replace(messages[7], pinned=True), replace(messages[8], forgotten=True)])
    store.commit(dropped=[reply.id, branch[-1].id])
    store.commit([replace(reply, confirmed=True)])
    both = pm.Stretch([(part.id, part.texts) for part in parts])  # its row names the others
    fact = pm.Fact("f", "mule", "The mule is sold.", "line 0", messages[0].digest, 0, 3)
    store.commit(summaries=[pm.new_summary(2, both, 0, "all so far", 9, "m")], facts=[fact])
    with monkeypatch.context() as patched:
        patched.setattr(pm, "message_rows_of", lambda cache: pytest.fail("all messages were read"))
        again = reopened(store)
    assert state_of(again.tree) == state_of(store.tree)
    assert (again.summaries, again.facts, again.marks) == (store.summaries, store.facts, store.marks)
    senseless = zlib.compress(json.dumps([pm.TREE_RULES, store.changes, [[-1, "no node"]]]).encode())
    for damaged in (b"no longer what it was", 5, "text", senseless):
        put(store, "t:tree", damaged)
        assert state_of(reopened(store).tree) == state_of(store.tree)


def told_of(store) -> tuple:
    """All that a store knows of its chat."""
    return *state_of(store.tree), store.summaries, store.facts, store.marks, store.info


def work(store, kind: str, number: int) -> None:
    """Does something of that kind with a chat, `number` choosing with what."""
    store.catch_up()
    nodes = list(store.tree.nodes)
    (message,) = store.read([nodes[number % len(nodes)]])
    texts = [store.tree.nodes[i].digest for i in store.tree.path(message.id)]
    match kind:
        case "say" | "answer":
            said = chain(f"line {number % 7}", parent=message.id, confirmed=kind == "say")
            store.commit(said if kind == "say" or said[0].id not in nodes else ())
        case "pin" | "forget":
            store.commit(marked=[replace(message, pinned=kind == "pin", forgotten=kind == "forget")])
        case "reword":
            store.commit(marked=[replace(message, content=f"other words {number}", shown=message.original)])
        case "drop":
            waiting = [i for i in store.tree.unshown if not store.tree.children.get(i)]
            store.commit(dropped=sorted(waiting)[:1])
        case "summarise":
            store.commit(summaries=[pm.new_summary(1, texts, 0, "so far", 9, "m")])
        case "sum up":
            parts = [part for part in store.summaries.values() if part.level == 1][: 1 + number % 3]
            both = pm.Stretch([(part.id, part.texts) for part in parts])
            store.commit(summaries=[pm.new_summary(2, both, 0, "all", 9, "m")] if parts else [])
        case "learn":
            store.commit(facts=[pm.Fact(f"f{number}", "it", "It is so.", "line", message.digest, 0, 3)])
        case "erase":
            store.erase([store.tree.nodes[i].digest for i in store.tree.marked if store.tree.nodes[i].forgotten])
        case "keep":
            store.keep_tree()
            store.commit(info={"seen": number})


WORK = ("say", "answer", "pin", "forget", "reword", "drop", "summarise", "sum up", "learn", "erase", "keep")


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(WORK), st.integers(0, 99)), max_size=30))
def test_a_chat_that_is_opened_is_the_one_that_was_written(done):
    """By two processes, whatever they did, and whenever its tree was kept; and the same as without what was kept."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(pm, "LEAST_KEPT", 1)
        stores = [pm.ChatStore(Path(folder) / "chat") for _ in range(2)]
        stores[0].commit(chain("one", "two"), {"chat_id": "chat"})
        for second, kind, number in done:
            work(stores[second], kind, number)
        for store in stores:
            store.catch_up()
        assert told_of(stores[0]) == told_of(stores[1])
        opened = [pm.ChatStore(Path(folder) / "chat")]
        put(stores[0], "t:tree", b"")
        opened.append(pm.ChatStore(Path(folder) / "chat"))
        assert told_of(opened[0]) == told_of(opened[1]) == told_of(stores[0])
        for store in (*stores, *opened):
            store.close()


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
    put(store, "v:model:odd", b"123")
    put(store, "v:model:text", "no bytes")
    found = store.vectors("model", ["good", "long", "odd", "text", "absent"])
    assert list(found) == ["good"] and np.array_equal(found["good"], good)
    assert store.vectors("another model", ["good"]) == {}


@pytest.mark.parametrize("more", [0, pm.VERY_MANY_KEYS])
@pytest.mark.parametrize("kind", ["q", "c"])  # as they are kept, and as chats of before keep them
def test_broken_vectors_cost_no_others(store, kind, more):
    """However many are read at once: those of a text are left out where one of them is broken, and no other text's."""
    numbers, scale = {"q": (np.int8, 127), "c": (np.float16, 1)}[kind]
    good = scale * np.eye(3, 4)

    def stored(rows, count=None) -> bytes:
        return (len(rows) if count is None else count).to_bytes(pm.SET_HEAD, "little") + rows.astype(numbers).tobytes()

    sets = {"one": good[:1], "three": good, "other": scale * np.eye(2, 6)}
    sets |= {f"more{n}": np.roll(good, n, axis=1)[: 1 + n % 3] for n in range(more)}
    broken = {"short": b"1", "count": stored(good, 9), "none": stored(good, 0), "dark": stored(good * [1, 1, 0, 1])}
    if kind == "q":
        broken["low"] = stored(-good - np.eye(3, 4))
    for name, value in {**broken, **{name: stored(rows) for name, rows in sets.items()}}.items():
        put(store, f"{kind}:model:{name}", value)
    found = {}
    for names, counts, codes in store.sentence_codes("model", [*broken, "absent", *sets]):
        found |= zip(names, np.split(codes, np.cumsum(counts)[:-1]), strict=True)
    expected = {name: (127 * rows / scale).tolist() for name, rows in sets.items()}
    assert {name: rows.tolist() for name, rows in found.items()} == expected


def test_sentences_that_an_older_chat_keeps_are_found_beside_newer_ones(store):
    """Each once."""
    rows = np.eye(2, 4, dtype=np.float16)
    put(store, "c:model:old", (2).to_bytes(pm.SET_HEAD, "little") + rows.tobytes())
    put(store, "c:model:both", (2).to_bytes(pm.SET_HEAD, "little") + rows.tobytes())
    store.put_sentence_codes("model", {h: pm.vector_codes(rows[::-1].astype(np.float32)) for h in ("new", "both")})
    found = [(h, codes.tolist()) for (h,), _, codes in store.sentence_codes("model", ["old"])]
    assert found == [("old", (127 * rows).tolist())]
    names = [name for some, *_ in store.sentence_codes("model", ["old", "new", "both"]) for name in some]
    assert sorted(names) == ["both", "new", "old"]


@given(arrays(np.float32, (3, 8), elements=st.floats(-1, 1, width=32)))
def test_codes_of_vectors_are_near_them_and_sound(rows):
    """Whatever their numbers are, those of no length excepted."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units = (rows / np.maximum(lengths, 1e-3))[lengths[:, 0] > 1e-3]
    if len(units):
        codes = pm.vector_codes(units).astype(float)
        assert pm.are_codes(codes.astype(np.int8)).all()
        assert np.allclose(codes / np.linalg.norm(codes, axis=1, keepdims=True), units, atol=0.006)


def test_pickles_are_refused_both_ways(store, tmp_path):
    """A value that would be pickled is not written, and a planted pickle is not loaded."""
    with pytest.raises(pm.StoreError):
        put(store, "m:x", {"a": "dict"})
    with pytest.raises(pm.StoreError):
        put(store, ("a", "tuple"), "text")
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
    with store._database.use() as cache:
        assert cache.eviction_policy == "none"
        assert cache.size_limit == cache.disk_min_file_size == pm.FOREVER
        assert cache.sqlite_synchronous == 2


def test_the_last_reports_are_kept(store):
    """Newest first, and no more than are asked for or kept."""
    for number in range(pm.KEPT_REPORTS + 3):
        store.commit(report=pm.PromptReport(number, "", 1, {}, {"memories": 0}, 0, 0, [], 0.0))
    assert [r["at"] for r in store.reports(2)] == [pm.KEPT_REPORTS + 2, pm.KEPT_REPORTS + 1]
    assert len(store.reports(1000)) == pm.KEPT_REPORTS
    with store._database.use() as cache:
        assert len(pm.stored_rows(cache, "p:")) == pm.KEPT_REPORTS


def test_ids_cannot_walk_the_file_system(registry, tmp_path):
    """Whatever the id, the chat is one folder of the data."""
    for chat_id in ("../../up", "/etc/passwd", "a\0b", "x" * pm.LONGEST_ID, "..", "ü 🐈"):
        store = made(registry, chat_id)
        assert store.directory.parent == tmp_path / "chats" and len(store.directory.name) == 32
        with registry.borrow(chat_id) as chat:
            assert chat.id == chat_id


def rebuilt(tmp_path) -> pm.ChatRegistry:
    """The registry of another start, once its catalogue is complete."""
    again = pm.ChatRegistry(tmp_path)
    again.start()
    assert again._listed.wait(60)
    return again


@pytest.mark.parametrize("damage", ["absent", "garbage"])
def test_a_lost_catalogue_is_made_anew(registry, tmp_path, damage):
    """The list and the locator come back from the chats; what was damaged is kept aside."""
    made(registry, "chat-1", "where is the key", "under the mat", explicit=False)
    registry.close()
    shutil.rmtree(tmp_path / "catalogue")
    if damage == "garbage":
        (tmp_path / "catalogue").mkdir()
        (tmp_path / "catalogue" / "cache.db").write_bytes(b"no database" * 1000)
    again = rebuilt(tmp_path)
    assert [c["chat_id"] for c in again.catalogue.chats()] == ["chat-1"]
    digests = [(m.role, m.digest) for m in chain("where is the key", "under the mat")]
    found, _ = again.locate(digests, lambda chat: pm.align(chat.tree, [d for _, d in digests]))
    assert found == "chat-1"
    assert len(list(tmp_path.glob("catalogue.damaged-*"))) == (damage == "garbage")


@pytest.mark.parametrize("error", ["database is locked", "database or disk is full", "disk I/O error"])
def test_what_cannot_be_read_just_now_is_not_taken_for_damaged(tmp_path, monkeypatch, error):
    """A user's settings for characters outlive a full disk and another program's lock."""
    settings = pm.CharacterSettings(tmp_path / "characters")
    settings.set("Mira", carry_over=True)
    settings.close()

    def fails(*_):
        raise sqlite3.OperationalError(error)

    again = pm.CharacterSettings(tmp_path / "characters")
    with monkeypatch.context() as broken:
        broken.setattr(pm.SharedCache, "get", fails)
        with pytest.raises(pm.StoreError):
            again.get("Mira")
    assert again.get("Mira") == {"carry_over": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["characters"]


def test_settings_of_characters_are_changed_one_by_one(tmp_path):
    """By several processes at once, too: what one sets, the other keeps."""
    ours, theirs = (pm.CharacterSettings(tmp_path / "characters") for _ in range(2))
    ours.set("Mira", carry_over=True)
    theirs.set("Mira", other=1)
    assert ours.get("Mira") == {"carry_over": True, "other": 1}


def test_a_deleted_chat_is_gone_from_list_locator_and_disk(registry, tmp_path):
    """Another chat with the same text stays."""
    for chat_id in ("chat-1", "chat-2"):
        made(registry, chat_id, "the very same words", explicit=False)
    registry.delete("chat-1")
    assert [c["chat_id"] for c in registry.catalogue.chats()] == ["chat-2"] and len(registry) == 1
    with registry.lookup("chat-1") as chat:
        assert chat is None
    digest = chain("the very same words")[0].digest
    assert registry.catalogue.holding([digest]) == [["chat-2"]]
    assert len(list((tmp_path / "chats").iterdir())) == 1


def test_a_chat_that_is_deleted_while_somebody_has_it_is_not_listed_again(registry):
    """As when the catalogue is being made anew, or a reply comes to its end."""
    made(registry, "chat-1", "the very same words", explicit=False)
    with registry.borrow("chat-1") as chat:
        registry.delete("chat-1")
        with chat.lock:
            registry.enter(chat, list(chat.tree.nodes))
    assert registry.catalogue.chats(lone=True) == []
    assert registry.catalogue.holding([chain("the very same words")[0].digest]) == [[]]


def test_a_chat_that_is_deleted_while_it_is_looked_up_stays_gone(registry, monkeypatch):
    """Opening it makes no empty one in its place."""
    made(registry, "chat-1", "words")
    registry._forget(pm.chat_folder("chat-1"), registry._lent[pm.chat_folder("chat-1")])
    take = registry._take

    def too_late(folder, **how):
        monkeypatch.undo()
        registry.delete("chat-1")
        return take(folder, **how)

    monkeypatch.setattr(registry, "_take", too_late)
    with registry.lookup("chat-1") as chat:
        assert chat is None
    assert len(registry) == 0
    made(registry, "chat-1", "other words")
    assert registry.standing({"chat_id": "chat-1"}) == {"state": "ok"}


def test_who_deletes_a_chat_that_somebody_else_deletes_has_done_so(registry, monkeypatch):
    """Both are told that it is gone."""
    made(registry, "chat-1", "words")
    rename = Path.rename

    def too_late(folder, target):
        monkeypatch.undo()
        registry.delete("chat-1")
        return rename(folder, target)

    monkeypatch.setattr(Path, "rename", too_late)
    registry.delete("chat-1")
    assert registry.catalogue.chats() == [] and len(registry) == 0


def test_a_chat_that_was_made_anew_is_listed_as_it_is(registry):
    """Whoever had the old one meanwhile changes nothing of that."""
    made(registry, "chat-1", "old words", explicit=False)
    with registry.borrow("chat-1") as chat:
        registry.delete("chat-1")
        made(registry, "chat-1", "new words", "and more", explicit=False)
        with chat.lock:
            registry.enter(chat, list(chat.tree.nodes))
    assert [line["messages"] for line in registry.catalogue.chats()] == [0]
    assert registry.catalogue.holding([chain(text)[0].digest for text in ("old words", "new words")]) == [
        [],
        ["chat-1"],
    ]


def test_after_its_end_a_registry_opens_no_chat(registry):
    """A thread of the background that is late would leave its files open."""
    made(registry, "chat-1", "words")
    registry.close()
    with pytest.raises(pm.ChatClosed), registry.lookup("chat-1"):
        pass


def test_a_list_is_not_whole_because_an_older_one_is(registry, tmp_path):
    """The catalogue is lost twice: who waits for all chats waits for the second time."""
    older = registry._listed
    registry._relist()
    registry._enter_all({}, older)
    assert older.is_set() and not registry._listed.is_set()


def test_a_chat_that_was_only_begun_is_removed_whoever_opens_it_first(registry, tmp_path, monkeypatch):
    """Opening writes to its file: what counts is when it was written to before the program began."""
    registry.create("chat-1", True)
    registry.close()
    folder = registry.folder / pm.chat_folder("chat-1")
    for file in (*folder.iterdir(), folder):
        os.utime(file, (0, 0))
    look, kept = pm.ChatRegistry._enter_all, []
    monkeypatch.setattr(pm.ChatRegistry, "_enter_all", lambda *given: kept.append(given))
    later = pm.ChatRegistry(tmp_path)
    later.start()
    wait_until(lambda: kept, "the look through the folders")
    os.utime(folder)
    look(*kept[0])
    later.close()
    assert not folder.exists()


def test_the_files_of_a_chat_come_and_go(store, monkeypatch):
    """SQLite deletes its log when nobody has the chat open."""
    there = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: [*there(folder), folder / "cache.db-journal"])
    assert len(pm.stats_of(store.directory)) == len(list(there(store.directory)))
    assert pm.size_on_disk(store.directory) > 0


def test_a_damaged_chat_keeps_no_other_from_being_erased(registry, tmp_path):
    """What was forgotten there goes all the same."""
    for chat_id in ("a", "b"):
        store = made(registry, chat_id, "secret words")
        store.commit(marked=[replace(store.read(list(store.tree.nodes))[0], forgotten=True)])
        with registry.borrow(chat_id) as chat, chat.lock:
            registry.enter(chat, ())
    first, second = registry.catalogue.forgetful(pm.time.time() + 1)
    with registry.borrow(first) as chat:
        chat.close()
    registry.erase_lapsed(-1)
    with registry.borrow(second) as chat:
        assert chat.store.read(list(chat.tree.nodes))[0].erased


def test_a_chat_that_cannot_be_read_harms_no_other_and_can_be_deleted(registry, tmp_path):
    """Chats that share its texts are still found; it stays in the list until it is deleted."""
    damaged = made(registry, "damaged", "the same greeting", "a", explicit=False)
    made(registry, "sound", "the same greeting", "b", explicit=False)
    registry.close()
    pm.database_of(damaged.directory).write_bytes(b"no database" * 1000)
    again = rebuilt(tmp_path)
    with again.lookup("damaged") as chat:
        assert chat.store.info["salvaged"] and not chat.tree.nodes
    digests = [(m.role, m.digest) for m in chain("the same greeting", "b")]
    assert again.locate(digests, lambda chat: pm.align(chat.tree, [d for _, d in digests]))[0] == "sound"
    again.delete("damaged")
    assert [c["chat_id"] for c in again.catalogue.chats()] == ["sound"]


def test_a_deletion_that_was_cut_off_is_finished_at_the_next_start(registry, tmp_path):
    """Neither a line without a chat nor a folder without a line stays."""
    for chat_id in ("renamed", "gone", "kept"):
        made(registry, chat_id, f"words of {chat_id}")
    registry.close()
    folder = {chat_id: tmp_path / "chats" / pm.chat_folder(chat_id) for chat_id in ("renamed", "gone")}
    folder["renamed"].rename(tmp_path / "chats" / f"{pm.DELETED}1")
    shutil.rmtree(folder["gone"])
    again = rebuilt(tmp_path)
    assert [c["chat_id"] for c in again.catalogue.chats()] == ["kept"]
    assert len(list((tmp_path / "chats").iterdir())) == 1
    with pytest.raises(pm.NotFound):
        again.delete("gone")


def test_a_message_that_hangs_under_none_is_left_out(registry, tmp_path):
    """As a reply that came after its chat was deleted and made anew: the chat opens all the same."""
    store = made(registry, "chat", "one")
    orphan = chain("lost", parent="0" * 32)[0]
    put(store, f"m:{orphan.id}", json.dumps(pm.asdict(orphan) | {"order": 7}))
    registry.close()
    again = rebuilt(tmp_path)
    assert texts_of(again, "chat") == ["one"]
    with again.borrow("chat") as chat:
        chat.store.commit(chain("two"))
    assert texts_of(again, "chat") == ["one", "two"]


def test_a_chat_of_a_newer_version_is_refused_in_words(registry, tmp_path):
    """And keeps no other from being opened."""
    newer, unknown = made(registry, "newer", "one"), made(registry, "unknown field", "one")
    made(registry, "ours", "two")
    put(newer, "format", pm.STORE_FORMAT + 1)
    put(unknown, "m:x", json.dumps({"order": 9, "parent": "", "mood": "?"}))
    registry.close()
    shutil.rmtree(tmp_path / "catalogue")
    again = rebuilt(tmp_path)
    with pytest.raises(pm.StoreError, match="newer version"), again.lookup("newer"):
        pass
    with again.lookup("unknown field") as chat:  # the row that cannot be understood is set aside with the old file
        assert chat.store.info["salvaged"] and len(chat.tree.nodes) == 1
    assert sorted(c["chat_id"] for c in again.catalogue.chats()) == ["ours", "unknown field"]


def test_who_lags_far_behind_reads_the_chat_anew(store, monkeypatch):
    """Changes are kept for others for a while only."""
    monkeypatch.setattr(pm, "KEPT_GENERATIONS", 3)
    other = reopened(store)
    for number in range(9):
        store.commit(chain(f"message {number}"))
    other.catch_up()
    assert other.tree.nodes == store.tree.nodes and len(other.tree.nodes) == 9
    with store._database.use() as cache:
        assert len([key for key in cache.iterkeys() if key.startswith("g:")]) == 3


def test_many_chats_may_be_used_by_turns(tmp_path):
    """More chats than stay open, each is found again whole; one in use is never closed."""
    registry = pm.ChatRegistry(tmp_path, most_open=4)
    first = made(registry, "chat 0", "words of 0")
    with registry.borrow("chat 0") as held:
        assert held.store is first
        for number in range(1, 12):
            made(registry, f"chat {number}", f"words of {number}")
        for number in range(12):
            assert texts_of(registry, f"chat {number}") == [f"words of {number}"]
        assert len(registry._lent) == 4
        with registry.borrow("chat 0") as again:
            assert again is held
        held.store.commit(chain("more"))
    for number in range(1, 6):
        texts_of(registry, f"chat {number}")
    with pytest.raises(pm.StoreError):
        held.store.commit(chain("too late"))
    assert texts_of(registry, "chat 0") == ["words of 0", "more"]


def test_one_who_opens_a_chat_keeps_nobody_from_another(registry, monkeypatch):
    """A long chat that is read from disk stands in the way of those alone who want that chat."""
    made(registry, "long", "one")
    made(registry, "short", "two")
    with registry.borrow("short"):
        pass
    opening, go_on = threading.Event(), threading.Event()
    registry._forget(pm.chat_folder("long"), registry._lent[pm.chat_folder("long")])
    open_chat = pm.Chat

    def slowly(*where):
        opening.set()
        assert go_on.wait(60)
        return open_chat(*where)

    monkeypatch.setattr(pm, "Chat", slowly)
    found = []
    waiting = [threading.Thread(target=lambda: found.append(texts_of(registry, "long"))) for _ in range(2)]
    for thread in waiting:
        thread.start()
    assert opening.wait(60)
    assert texts_of(registry, "short") == ["two"] and found == []
    go_on.set()
    for thread in waiting:
        thread.join(60)
    assert found == [["one"], ["one"]]


def test_a_chat_that_another_process_deletes_or_makes_anew(registry, tmp_path):
    """Nothing is written into a file that is gone, and nothing of the old chat is read."""
    made(registry, "chat", "old words")
    other = pm.ChatRegistry(tmp_path)
    other.delete("chat")
    with registry.lookup("chat") as chat:
        assert chat is None
    made(other, "chat", "new words")
    assert texts_of(registry, "chat") == ["new words"]


def test_words_are_found_in_any_case(registry):
    """English letters whatever their case in the middle of a word; others as a word is usually written."""
    store = made(registry, "chat", "We met at McDonald's, 100% sure.", "ÄRGER in Überlingen", 'under_score "quoted"')
    for words in (
        ["mcdonald's"],
        ["MCDONALD", "SURE"],
        ["100%"],
        ["ärger"],
        ["überlingen"],
        ["under_score", '"QUOTED"'],
    ):
        assert len(list(pm.messages_holding(pm.database_of(store.directory), words))) == 1, words
    assert list(pm.messages_holding(pm.database_of(store.directory), ["under", "%_"])) == []
