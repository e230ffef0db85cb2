"""Files that are damaged or of a newer version, and disks that take nothing: what can be read is read, and said."""

import contextlib
import os
import random
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from fakes import settings

import persona_memory as pm

LINES = [f"Line {n}: the ferry leaves at noon, and the red key stays with the abbot." for n in range(60)]
ROUNDS = 15


def corrupt(file, number: int) -> None:
    """Damages a file in one of five ways, by its number."""
    dice, raw = random.Random(number), bytearray(file.read_bytes())
    where = dice.randrange(len(raw))
    if number % 5 == 0:
        for _ in range(30):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
    elif number % 5 == 1:
        raw[where // 4096 * 4096 : where // 4096 * 4096 + 4096] = bytes(4096)
    elif number % 5 == 2:
        del raw[where:]
    elif number % 5 == 3:
        raw[:100] = dice.randbytes(100)
    else:
        raw[where : where + 600] = dice.randbytes(600)
    file.write_bytes(raw[: max(len(raw), 1)])


def written(data) -> pm.PersonaMemory:
    """A program with two chats on its disk, none of them open."""
    memory = pm.PersonaMemory(settings(data, "http://127.0.0.1:9/v1", embedder="/nonexistent"))
    for chat in ("hurt", "well"):
        rows = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(LINES)]
        memory.archive.append(chat, rows)
    memory.close()
    return pm.PersonaMemory(settings(data, "http://127.0.0.1:9/v1", embedder="/nonexistent"))


def file_of(data, chat: str):
    """The database of a chat."""
    return pm.database_of(data / "chats" / pm.chat_folder(chat))


@pytest.mark.parametrize("part", ["chats", "catalogue", "characters"])
def test_a_damaged_file_harms_no_other_chat_and_can_be_got_rid_of(tmp_path, part):
    """Whatever is broken: memory is on for the other chat; the damaged one is read as far as it can be, or says in
    words what is the matter; it is deleted in any case, and made anew."""
    read = []
    for number in range(ROUNDS):
        data = tmp_path / str(number)
        memory = written(data)
        corrupt(file_of(data, "hurt") if part == "chats" else pm.database_of(data / part), number)
        try:
            memory.archive.append("well", [{"role": "user", "content": "It goes on."}])
        except pm.StoreError:  # the first to notice; what it needs is made anew by then
            memory.archive.append("well", [{"role": "user", "content": "It goes on."}])
        assert memory.describe("well", mood=False)["branch_length"] == len(LINES) + 1
        for _ in range(2):
            try:
                read.append(memory.describe("hurt", mood=False)["branch_length"])
                memory.messages("hurt")
            except pm.StoreError as error:
                assert error.status == 503 and "damaged" in str(error), str(error)
        memory.registry.start()
        assert memory.registry._listed.wait(60)
        states = {line["chat_id"]: line["state"] for line in memory.chats()}
        assert states["well"] == "ok" and states.get("hurt") in ("ok", "salvaged", "chat_damaged")
        memory.registry.delete("hurt")
        assert [line["chat_id"] for line in memory.chats()] == ["well"]
        assert len(list((data / "chats").iterdir())) == 1
        memory.archive.append("hurt", [{"role": "user", "content": "Anew."}])
        assert memory.describe("hurt", mood=False)["stored"] == 1
        memory.close()
    assert max(read) == len(LINES)


ROWS = {  # tables that can be made anew, and keys in them, each of which something reads
    "catalogue": ("c:well", "c:hurt", "d:{digest}", "n:{digest}", "u:well", "x:well", "changes", "embedder"),
    "characters": ("Maren",),
}


def uses_of(memory: pm.PersonaMemory) -> list:
    """What is done with chats, as calls that read and write every table."""
    turn = {"messages": [{"role": "user", "content": LINES[0]}]}
    return [
        lambda: memory.archive.append("well", [{"role": "user", "content": "It goes on."}]),
        lambda: memory.builder.prepare(turn, "", pm.Call()),
        lambda: memory.recaller.change_character("Maren", True),
        memory.chats,
        lambda: memory.find("ferry"),
        lambda: memory.registry.erase_lapsed(0),
    ]


@pytest.mark.parametrize("value", ["[1", "[7]", '{"chat_id": 5}', b"\xff\xfe"])
def test_a_row_that_nobody_can_have_written_is_damage_too(tmp_path, value):
    """SQLite finds nothing wrong with a file in which only words have changed. Each row in turn is such a one: memory
    is on for every chat at the second try at the latest, and every chat is listed and deleted."""
    written(tmp_path / "whole").close()
    digest = pm.message_digest("user", LINES[0])
    for part, keys in ROWS.items():
        for key in (key.replace("{digest}", digest) for key in keys):
            data = shutil.copytree(tmp_path / "whole", tmp_path / f"{part} {key[:2]}{key[-4:]}")
            with contextlib.closing(sqlite3.connect(pm.database_of(data / part), isolation_level=None)) as connection:
                connection.execute("DELETE FROM Cache WHERE key = ?", (key,))
                row = key, 1, 0.0, 0.0, 0, 0, 1, None, value
                connection.execute(
                    "INSERT INTO Cache (key, raw, store_time, access_time, access_count, size, mode, filename, value) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row,
                )  # fmt: skip
            memory = pm.PersonaMemory(settings(data, "http://127.0.0.1:9/v1", embedder="/nonexistent"))
            for use in uses_of(memory):
                try:
                    use()
                except pm.StoreError:  # the first to notice
                    use()
            memory.registry.start()
            assert memory.registry._listed.wait(60)
            assert {"well", "hurt"} <= {line["chat_id"] for line in memory.chats()}, key
            for chat in ("well", "hurt"):
                memory.registry.delete(chat)
            assert not {"well", "hurt"} & {line["chat_id"] for line in memory.chats()}, key
            memory.close()


@pytest.mark.parametrize("part", ["chats", "catalogue", "characters"])
@pytest.mark.parametrize(("name", "value"), [("key", None), ("value", b"\xff"), ("value", "many"), ("key", 7)])
def test_settings_that_make_no_sense_are_damage(tmp_path, part, name, value):
    """diskcache keeps its settings in a table of the file and believes them: some are spoiled, in each kind of file."""
    memory = written(tmp_path)
    file = file_of(tmp_path, "hurt") if part == "chats" else pm.database_of(tmp_path / part)
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
        rows = connection.execute("SELECT key, value FROM Settings").fetchall()
        connection.execute("DROP TABLE Settings")  # it is made again without what forbids such rows
        connection.execute("CREATE TABLE Settings (key, value)")
        connection.executemany("INSERT INTO Settings VALUES (?, ?)", rows)
        connection.execute(f"UPDATE Settings SET {name} = ? WHERE rowid % 2 = 0", (value,))
    assert memory.messages("hurt")["total"] == len(LINES)
    for use in uses_of(memory):
        use()
    memory.close()


def test_rows_that_can_be_read_are_salvaged(tmp_path):
    """One page of the file is lost: the messages on the others are still there, in their order, on one branch."""
    memory = written(tmp_path)
    file = file_of(tmp_path, "hurt")
    raw = bytearray(file.read_bytes())
    at = raw.index(b"Line 30:") // 4096 * 4096
    raw[at : at + 4096] = bytes(4096)
    file.write_bytes(raw)
    with pytest.raises(pm.NotFound):
        memory.messages("none")
    rows = memory.messages("hurt")["messages"]
    texts = [row["content"] for row in rows]
    assert 30 < len(texts) < len(LINES) and texts == [line for line in LINES if line in texts]
    line = next(line for line in memory.chats() if line["chat_id"] == "hurt")
    assert line["state"] == "salvaged" and f"{len(texts)} messages" in line["words"]
    memory.close()


@pytest.mark.parametrize("number", range(4))
def test_the_doctor_names_damaged_chats_and_kept_copies(tmp_path, number):
    """It changes nothing: the chat is salvaged when it is next used, or refused, and then the copy is told of."""
    written(tmp_path).close()
    given = settings(tmp_path, "http://127.0.0.1:9/v1")
    assert [(f.level, f.words) for f in pm.check_chats(given)] == [("ok", "2 checked, all can be read")]
    file, raw = file_of(tmp_path, "hurt"), file_of(tmp_path, "hurt").read_bytes()
    corrupt(file, 10 + number)
    spoiled = file.read_bytes()
    assert spoiled != raw
    [finding] = pm.check_chats(given)
    assert finding.level == "note" and "1 of 2 are damaged" in finding.words
    assert "hurt." in finding.words or str(file.parent) in finding.words
    assert file.read_bytes() == spoiled
    pm.set_aside(file.parent)
    assert [f.subject for f in pm.check_chats(given)] == ["Chats", "Copies"]


def test_a_chat_of_a_newer_version_says_so_and_is_left_alone(tmp_path):
    """It is not salvaged, since nothing is wrong with it; it can be deleted."""
    memory = written(tmp_path)
    with memory.registry.borrow("hurt") as chat, chat.store._database.transaction() as cache:
        cache["format"] = pm.STORE_FORMAT + 1
    memory.close()
    memory = pm.PersonaMemory(settings(tmp_path, "http://127.0.0.1:9/v1"))
    with pytest.raises(pm.NewerFormat):
        memory.messages("hurt")
    line = next(line for line in memory.chats() if line["chat_id"] == "hurt")
    assert line["state"] == "newer_version" and "newer version" in line["words"]
    assert len(list((tmp_path / "chats").iterdir())) == 2
    memory.registry.delete("hurt")
    assert [line["chat_id"] for line in memory.chats()] == ["well"]
    memory.close()


@pytest.fixture
def unwritable(tmp_path):
    """The two chats on a disk that takes nothing, and a context that says so of every connection opened."""
    memory = written(tmp_path)
    yield memory
    memory.close()


def refuse(chat: pm.Chat, how: str) -> None:
    """Has SQLite refuse what is written over a chat's connection."""
    with chat.store._database.use() as cache:
        pages = cache._sql("PRAGMA page_count").fetchone()[0]
        cache._sql(f"PRAGMA max_page_count = {pages}" if how == "full" else "PRAGMA query_only = 1")


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_turn_on_a_disk_that_takes_nothing_has_its_memory(unwritable, how):
    """It is answered with what can be read, says why it is not kept, and is kept as soon as the disk takes it."""
    archive, long = unwritable.archive, "A very long word. " * 4000
    shown = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(LINES)]
    request = pm.parse_request({"messages": [*shown, {"role": "user", "content": long}]})
    with archive.enter(request, "hurt", pm.Deadline.after(60)) as (chat, *_):
        assert chat.store.unwritten == ""
    request = pm.parse_request({"messages": [*shown, {"role": "user", "content": long + "Again."}]})
    refuse(chat, how)
    with archive.enter(request, "hurt", pm.Deadline.after(60)) as (chat, path, _):
        assert chat.store.unwritten.startswith(pm.UNKEPT)
        assert [m.content for m in chat.store.read(path)] == [*LINES, long + "Again."]
    with pytest.raises(pm.StoreError) as refused:
        archive.append("hurt", [{"role": "user", "content": long + "And again."}])
    assert refused.value.status == (507 if how == "full" else 503) and pm.UNKEPT in str(refused.value)
    assert unwritable.messages("hurt")["total"] == len(LINES) + 1
    chat.store._database.rest()
    with archive.enter(request, "hurt", pm.Deadline.after(60)) as (chat, path, _):
        assert chat.store.unwritten == ""
    assert unwritable.messages("hurt")["messages"][-1]["content"] == long + "Again."


def test_a_folder_that_cannot_be_written_can_be_read():
    """Lists, messages and searches work from a start on; what would change something is refused in words."""
    data = Path(tempfile.mkdtemp(prefix="unwritable-"))
    memory = written(data)
    memory.close()
    user = os.geteuid()
    for place in (data, *data.rglob("*")):
        os.chown(place, 65534, 65534) if user == 0 else None
        place.chmod(0o500 if place.is_dir() else 0o400)
    try:
        os.seteuid(65534) if user == 0 else None
        memory = pm.PersonaMemory(settings(data, "http://127.0.0.1:9/v1", embedder="/nonexistent"))
        assert {line["chat_id"]: line["state"] for line in memory.chats()} == {"hurt": "ok", "well": "ok"}
        assert memory.messages("hurt")["total"] == len(LINES)
        assert memory.find("ferry abbot")["found"]
        assert memory.state("hurt")["chat"]
        with pytest.raises(pm.StoreError) as refused:
            memory.archive.append("hurt", [{"role": "user", "content": "No."}])
        assert refused.value.status == 503 and "cannot be written" in str(refused.value)
        request = pm.parse_request({"messages": [{"role": "user", "content": LINES[0]}]})
        with memory.archive.enter(request, "hurt", pm.Deadline.after(60)) as (chat, *_):
            assert chat.store.unwritten.startswith(pm.UNKEPT)
        memory.close()
    finally:
        os.seteuid(user) if user == 0 else None
        for place in (data, *data.rglob("*")):
            place.chmod(0o700)
        shutil.rmtree(data)


def test_a_page_is_told_that_nothing_is_kept():
    """It never says OK then."""
    turn = {"outcome": "degraded", "status": 200, "why": f"degraded; reason={pm.UNKEPT}: the disk is full."}
    level, words, _ = pm.diagnosis({"status": "ready"}, "ready", turn)
    assert (level, words) == ("trouble", f"{pm.UNKEPT}: the disk is full.")


@pytest.mark.parametrize("part", ["chats", "catalogue", "characters"])
@pytest.mark.parametrize("broken", [b"CREATE TABLX \x88ache", b"CREATE TABLE \x88ache", b"\xff" * 18])
def test_a_schema_that_is_no_text_is_damage(tmp_path, part, broken):
    """SQLite quotes it in its error, which Python then cannot decode."""
    memory = written(tmp_path)
    file = file_of(tmp_path, "hurt") if part == "chats" else pm.database_of(tmp_path / part)
    whole = file.read_bytes()
    assert len(broken) == 18 and b"CREATE TABLE Cache" in whole
    file.write_bytes(whole.replace(b"CREATE TABLE Cache", broken))
    for use in uses_of(memory):
        use()
    if part == "chats":
        assert [(f.level, f.subject) for f in pm.check_chats(memory.settings)] == [("note", "Chats")]
        assert memory.messages("hurt")["messages"] == []
        [line] = [line for line in memory.chats() if line["chat_id"] == "hurt"]
        assert line["state"] == "salvaged" and line["words"].startswith("0 messages could be saved")
        assert [(f.level, f.subject) for f in pm.check_chats(memory.settings)] == [("ok", "Chats"), ("note", "Copies")]
    memory.close()


def test_a_chat_that_another_process_has_made_anew_is_not_salvaged(tmp_path):
    """Who still has the deleted file open may find it broken: that says nothing of the new one."""
    one, other = written(tmp_path), pm.PersonaMemory(settings(tmp_path, "http://127.0.0.1:9/v1"))
    with one.registry.borrow("hurt") as chat:
        chat.store.read(chat.path())
    other.registry.delete("hurt")
    other.archive.append("hurt", [{"role": "user", "content": "Anew."}])
    with pytest.raises(pm.StoreDamaged), chat.store._database.use():
        raise sqlite3.DatabaseError("no such table: Cache")
    assert [row["content"] for row in one.messages("hurt")["messages"]] == ["Anew."]
    assert not list((tmp_path / "chats").glob("*.damaged-*"))
    assert list(pm.readable_rows(tmp_path / "none" / "cache.db")) == []
    one.close()
    other.close()
