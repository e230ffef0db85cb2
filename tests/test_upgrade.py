"""A data folder of version 0.1.0 opens with all that is in it, and stays that of the newer version."""

import json
import shutil
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import pytest
from chats import open_chat
from fakes import API, LocalServer, get, say, settings

import persona_memory as pm

OLD_FOLDER = Path(__file__).parent / "data" / "version_0_1_0.zip"  # a chat that version 0.1.0 has written
PERSONA = {"role": "system", "content": "You are Mira, keeper of the light."}
FORGOTTEN, PINNED = "My brother Tomas sold the mule in Ostrava.", "The red key opens the crypt below the chapel."
REWORDED, OWN_WORDS = "My horse is called Zephyr.", "We counted the posts by the ferry, which I hated."
FACT = "The user was born in Lisen."
SMALL = {"context": 1024, "budget": "10/50/20/20", "no_guidance": True}


@pytest.fixture
def old_data(tmp_path) -> Path:
    """That folder, unpacked."""
    shutil.unpack_archive(OLD_FOLDER, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def running(upstream, old_data):
    """The program on it."""
    with LocalServer(settings(old_data, upstream.url, **SMALL)) as server:
        yield server


def api(running, path: str = ""):
    """What the API says of the chat."""
    return get(running, f"{API}/chats/tale{path}")


def rows_of(folder: Path, prefix: str) -> dict:
    """The rows of the chat's database under a prefix."""
    (database,) = folder.glob("chats/*/cache.db")
    with sqlite3.connect(database) as rows:
        return dict(rows.execute("SELECT key, value FROM Cache WHERE key GLOB ?", (prefix + "*",)).fetchall())


def test_marks_story_and_facts_are_there(running, upstream):
    """In the API and in the prompt; the client shows another beginning by now."""
    before = api(running)
    said = api(running, "/messages?limit=100")["messages"]
    assert [said[n][mark] for n, mark in ((0, "forgotten"), (2, "pinned"), (4, "edited"))] == [True] * 3
    assert said[4]["content"] == REWORDED and said[4]["original"] == "My horse is called Comet."
    assert OWN_WORDS in [s["text"] for s in before["story"]]
    assert [f["text"] for f in before["facts"]] == [FACT]
    shown = [{"role": m["role"], "content": m.get("original") or m["content"]} for m in said]
    shown[1]["content"] += " Always."
    say(running.url, [PERSONA, *shown, {"role": "user", "content": "Who sold it?"}], stream=False, chat_id="tale")
    prompt = json.dumps(upstream.last["body"])
    assert all(words in prompt for words in (PINNED, OWN_WORDS, FACT)) and FORGOTTEN not in prompt
    after = api(running)
    assert [s["id"] for s in after["story"]] == [s["id"] for s in before["story"][1:]], (
        "only the changed stretch is gone"
    )
    assert [m["forgotten"] for m in api(running, "/messages?limit=3")["messages"]] == [True, False, False]


def test_vectors_are_kept(running):
    """No text is embedded anew that the old version has embedded."""
    store = open_chat(running, "tale").store
    messages = store.read(store.tree.path(store.head)[:12])
    hashes = [h for m in messages for h in pm.embedded_texts(m)]
    assert set(store.vectors("all-MiniLM-L6-v2", hashes)) == set(hashes)


def test_the_folder_is_of_the_new_format_then(old_data):
    """Which a program that knows only the old one refuses; opening it again changes nothing more."""
    (folder,) = old_data.glob("chats/*")
    assert rows_of(old_data, "format") == {}
    pm.ChatStore(folder).close()
    assert rows_of(old_data, "format") == {"format": pm.STORE_FORMAT}
    assert len(rows_of(old_data, "k:")) == 3
    with pytest.raises(TypeError, match="newer version"):  # so version 0.1.0 reads summaries
        pm.Summary(**json.loads(rows_of(old_data, pm.NEWER_ROW)[pm.NEWER_ROW]))
    now = rows_of(old_data, "")
    store = pm.ChatStore(folder)
    assert {s.source for s in store.summaries.values()} >= {"model", "extract", "user"}
    store.close()
    assert rows_of(old_data, "") == now


def with_thoughts(message: pm.Message, thought: str = "<think>I distrust him.</think>\n") -> pm.Message:
    """A reply as version 0.1.0 kept it."""
    return replace(message, content=thought + message.content) if message.role == "assistant" else message


def old_messages(folder: Path) -> list[dict]:
    """The rows of the chat's messages, oldest first."""
    return sorted(map(json.loads, rows_of(folder, "m:").values()), key=lambda row: row["order"])


def keep_thoughts(folder: Path) -> None:
    """Has an old chat hold thoughts: in each reply, in two swipes with the same words, and in a reply that is nothing
    else; with the ids that this version gave them."""
    rows = old_messages(folder)
    reply = next(row for row in rows if row["role"] == "assistant" and not row["confirmed"])
    twin = {**reply, "id": "twin", "content": "<think>Or do I?</think>" + reply["content"]}
    lone = {**reply, "id": "lone", "content": "<think>Nothing to say.</think>"}
    before = [pm.message_of(row) for row in rows]
    messages, moved = pm.rehung([*map(with_thoughts, before), pm.message_of(twin), pm.message_of(lone)])
    (database,) = folder.glob("chats/*/cache.db")
    with sqlite3.connect(database) as cache:
        cache.execute("DELETE FROM Cache WHERE key GLOB 'm:*'")
        put = "INSERT INTO Cache (key, raw, mode, value, store_time) VALUES (?, 1, 1, ?, 0)"
        for order, message in enumerate(messages):
            cache.execute(put, (f"m:{message.id}", json.dumps(asdict(message) | {"order": order})))
        for key, value in cache.execute(
            "SELECT key, value FROM Cache WHERE key GLOB '[sf]:*' OR key = 'info'"
        ).fetchall():
            for old, new in moved.items():
                value = value.replace(f'"{old}"', f'"{new}"')
            cache.execute("UPDATE Cache SET value = ? WHERE key = ?", (value, key))


def test_thoughts_that_the_old_version_kept_are_taken_out(old_data, tmp_path):
    """The chat is then what it would have been without them: ids, marks, summaries and facts."""
    shutil.copytree(old_data, tmp_path / "thoughtful")
    keep_thoughts(tmp_path / "thoughtful")
    assert any("<think>" in row["content"] for row in old_messages(tmp_path / "thoughtful"))
    opened = [pm.ChatStore(next(f.glob("chats/*"))) for f in (old_data, tmp_path / "thoughtful")]
    plain, thoughtful = [(s.tree.nodes, s.head, s.marks.keys(), s.summaries, s.facts) for s in opened]
    for store in opened:
        store.close()
    assert plain[:3] == thoughtful[:3] and plain[3:] == thoughtful[3:]
    again = pm.ChatStore(next((tmp_path / "thoughtful").glob("chats/*")))
    assert all("think" not in m.content for m in again.read(list(again.tree.nodes)))
    again.close()


def test_an_old_export_comes_in_with_all_of_it(upstream, tmp_path, old_data):
    """Its summaries and facts name messages; they are known by words then, in whatever chat they come to."""
    rows = {prefix: rows_of(old_data, prefix) for prefix in ("m:", "s:", "f:")}
    plain = {prefix: [json.loads(value) for value in some.values()] for prefix, some in rows.items()}
    messages = sorted(plain["m:"], key=lambda row: row.pop("order"))
    info = json.loads(rows_of(old_data, "info")["info"])
    export = {"format": "persona_memory", "version": 1, "chat": {"chat_id": "tale", "head": info["head"]},
              "messages": messages, "summaries": plain["s:"], "facts": plain["f:"]}  # fmt: skip
    with LocalServer(settings(tmp_path / "new", upstream.url, **SMALL)) as running:
        answers = [httpx.post(f"{running.url}/api/persona_memory/import", json=export, timeout=60) for _ in range(2)]
        assert [a.json()["chats"][0]["added"] > 0 for a in answers] == [True, False]
        about, said = api(running), api(running, "/messages?limit=5")["messages"]
        assert OWN_WORDS in [s["text"] for s in about["story"]] and about["facts"][0]["text"] == FACT
        assert (said[0]["forgotten"], said[2]["pinned"], said[4]["content"]) == (True, True, REWORDED)
        export["summaries"][0]["last"] = "nowhere"
        answer = httpx.post(f"{running.url}/api/persona_memory/import?chat_id=x", json=export, timeout=60)
        assert answer.status_code == 400 and "not there" in answer.json()["error"]["message"]
