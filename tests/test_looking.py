"""What the memory page asks for: branches, feelings in few bytes, the search across chats, how things stand."""

import json
import logging
import re

import httpx
import pytest
from fakes import API, LocalServer, get, say, settings
from hypothesis import given
from hypothesis import strategies as st
from sillytavern import Character, Client

import persona_memory as pm

SYSTEM = {"role": "system", "content": "You keep a lighthouse."}
FIRST = {"role": "user", "content": "Who goes there?"}


def call(server, path, status=200, **query):
    return get(server, f"{API}{path}", status, **query)


def fill(server, chat, *texts):
    """A chat of those lines, user first."""
    rows = [{"role": pm.CHAT_ROLES[i % 2], "content": text} for i, text in enumerate(texts)]
    answer = httpx.post(f"{server.url}/api/persona_memory/chats/{chat}/messages", json={"messages": rows}, timeout=60)
    assert answer.status_code == 200, answer.text


@pytest.fixture
def swiped(server, upstream):
    """The id of a chat whose first reply was swiped away and that went on with the second."""
    for reply in ("A ghost.", "A traveller."):
        upstream.steer(reply=lambda body, text=reply: text)
        say(server.url, [SYSTEM, FIRST])
    chosen = {"role": "assistant", "content": "A traveller."}
    return say(server.url, [SYSTEM, FIRST, chosen, {"role": "user", "content": "Come in."}]).chat_id


# ---------------------------------------------------------------------------- branches


def test_a_row_names_its_siblings_and_a_tip_reads_their_branch(server, swiped):
    """The swipe that was not chosen has nothing after it; its branch is the path to it."""
    first, reply, last = call(server, f"/chats/{swiped}/messages")["messages"]
    assert first["siblings"] == last["siblings"] == []
    [other] = reply["siblings"]
    assert (other["tip"], other["after"]) == (other["id"], 0)
    branch = call(server, f"/chats/{swiped}/messages", tip=other["tip"])
    assert [m["content"] for m in branch["messages"]] == ["Who goes there?", "A ghost."]
    [back] = branch["messages"][1]["siblings"]
    assert (back["id"], back["after"]) == (reply["id"], 2)  # the message after it, and the reply to that


def test_a_tip_that_is_no_message_is_not_found(server, swiped):
    """An id of another chat, or none at all."""
    assert call(server, f"/chats/{swiped}/messages", status=404, tip="nothing")["error"]["code"] == "not_found"


def test_a_chat_tells_its_size_its_marked_messages_and_the_waiting_replies(server, swiped):
    """What the page shows beside the branch."""
    row = call(server, f"/chats/{swiped}/messages")["messages"][0]
    httpx.patch(f"{server.url}/api/persona_memory/chats/{swiped}/messages/{row['id']}", json={"forgotten": True})
    chat = call(server, f"/chats/{swiped}")
    assert [m["id"] for m in chat["forgotten"]] == [row["id"]]
    assert [m["role"] for m in chat["replies"]] == ["assistant"]
    assert chat["size"] > 10_000 and call(server, "/chats")[0]["size"] > 10_000


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42m"
    "Nk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def test_a_chat_is_listed_with_the_picture_that_its_client_gives(server):
    """A small one of a kind that a page may show; anything else is refused, and so is what does not come as data."""
    shown = {"messages": [{"role": "user", "content": "Who goes there?"}, {"role": "assistant", "content": "A ghost."}]}
    address = f"{server.url}/api/persona_memory/chats/seen/sync"
    assert httpx.post(address, json=shown | {"picture": PIXEL}, timeout=60).status_code == 200
    assert httpx.post(address, json=shown, timeout=60).status_code == 200
    assert [row["picture"] for row in call(server, "/chats")] == [PIXEL]
    for odd in ("http://127.0.0.1/a.png", "data:image/svg+xml;base64,AAAA", "data:image/png;base64," + "A" * 9000):
        refused = httpx.post(address, json=shown | {"picture": odd}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "picture")


def test_a_chat_without_names_is_listed_by_the_name_in_sillytaverns_prompt(server):
    """A plain SillyTavern sends no names; its main prompt, unless it was changed, says whose reply it is."""
    client = Client(server.url, Character("Mira Vale", "A baker.", "Good morning!"))
    client.send("Good morning to you.")
    assert [row["character"] for row in call(server, "/chats")] == ["Mira Vale"]


# ---------------------------------------------------------------------------- feelings in few bytes


def test_compact_feelings_are_those_of_the_long_form(server):
    """Percentages in the order of the labels; a range is a range; nothing is waited for."""
    fill(server, "felt", "I love you so much!", "I hate this, go away!", "The table has four legs.", "I am so scared.")
    long = call(server, "/chats/felt/emotions")["messages"]
    short = call(server, "/chats/felt/emotions", form="compact")
    assert (short["labels"], short["total"], short["since"]) == (list(pm.EMOTIONS), 4, 0)
    for compact, m in zip(short["scores"], long, strict=True):  # the long form is rounded, too
        assert all(abs(c - 100 * m["scores"][e]) <= 0.6 for c, e in zip(compact, pm.EMOTIONS, strict=True))
    assert short["user"] == [1, 0, 1, 0] and all(0 <= w <= 100 for w in short["importance"])
    part = call(server, "/chats/felt/emotions", form="compact", since=1, until=2)
    assert (part["scores"], part["since"]) == (short["scores"][1:3], 1)


# ---------------------------------------------------------------------------- the search across chats


def test_a_search_finds_all_words_in_any_spelling_and_order(server):
    """Across chats, newest chat first, newest message first; keys of the store's rows are no words of the chat."""
    fill(server, "one", "The Wandering Heron struck the Teeth.", "An old heron.", 'She said "naïve", he said ÉTÉ.')
    fill(server, "two", "a heron, wandering")
    found = call(server, "/search", q="heron wandering")
    assert found["complete"] is True
    assert [(m["chat_id"], m["content"]) for m in found["found"]] == [
        ("two", "a heron, wandering"),
        ("one", "The Wandering Heron struck the Teeth."),
    ]
    assert [m["chat_id"] for m in call(server, "/search", q='"NAÏVE", été')["found"]] == ["one"]
    assert call(server, "/search", q="confirmed fingerprint role")["found"] == []
    assert len(call(server, "/search", q="heron", limit=2)["found"]) == 2
    assert call(server, "/search", status=400, q=" ")["error"]["param"] == "q"


def test_what_is_forgotten_or_no_memory_is_not_found(server, swiped):
    """A reply that was swiped away, and a message that the user forgot."""
    assert call(server, "/search", q="ghost")["found"] == []
    [found] = call(server, "/search", q="traveller")["found"]
    httpx.delete(f"{server.url}/api/persona_memory/chats/{swiped}/messages/{found['id']}")
    assert call(server, "/search", q="traveller")["found"] == []


def test_a_broken_chat_spoils_no_search(server):
    """The others are still searched."""
    fill(server, "broken", "a heron")
    fill(server, "sound", "a heron")
    registry = server.server.memory.registry
    pm.database_of(registry.folder / pm.chat_folder("broken")).write_bytes(b"no database")
    assert [m["chat_id"] for m in call(server, "/search", q="heron")["found"]] == ["sound"]


def test_a_search_that_does_not_wait_says_how_much_is_unread(server):
    """Words are found at once; how many messages have no vector yet comes with it, and is 0 in the end."""
    fill(server, "unread", *(f"A heron of kind {i}." for i in range(40)))
    found = call(server, "/chats/unread/search", q="heron", wait="off")
    assert len(found["memories"]) == 10 and 0 <= found["unread"] <= 40
    assert call(server, "/chats/unread/search", q="heron")["unread"] == 0


# ---------------------------------------------------------------------------- reuse of the prompt's beginning


def prompt_of(*texts):
    return [{"role": "user", "content": text} for text in texts]


def reuse(before, now):
    sent = pm.sent_prompt(before)
    return pm.prefix_reuse(sent, pm.sent_prompt(now, sent))


def test_what_begins_alike_is_reused():
    """All, nothing, and the part before the first message that differs, whose own beginning counts by letters."""
    chat = prompt_of("one", "two", "three")
    assert reuse(chat, chat) == 1
    assert reuse(chat, prompt_of("ten", "two", "three")) == 0
    assert reuse(prompt_of("x"), prompt_of("one")) == 0
    assert reuse(chat, [*chat, *prompt_of("four")]) == pytest.approx(3 / 4)
    assert reuse(prompt_of("one", "word " * 50), prompt_of("one", "word " * 100)) == pytest.approx(0.5, abs=0.05)


@given(st.lists(st.text(max_size=20), min_size=1), st.lists(st.text(max_size=20), min_size=1))
def test_reuse_is_a_share(before, now):
    """Whatever the prompts; and counting with the last prompt's figures changes nothing."""
    share = reuse(prompt_of(*before), prompt_of(*now))
    assert 0 <= share <= 1
    counted = pm.sent_prompt(prompt_of(*now), pm.sent_prompt(prompt_of(*before)))
    assert counted == pm.sent_prompt(prompt_of(*now))


def test_reports_say_how_much_was_reused(server, upstream):
    """None for the first prompt of a chat, then nearly all of a chat that grows."""
    chat = [{"role": "system", "content": "You are a lighthouse keeper. " * 40}, FIRST]
    say(server.url, chat, chat_id="grown")
    chat += [{"role": "assistant", "content": upstream.last["answer"]}, {"role": "user", "content": "Come in."}]
    say(server.url, chat, chat_id="grown")
    newest, first = call(server, "/chats/grown/prompts")["prompts"]
    assert first["reused"] is None
    assert 0.8 < newest["reused"] < 1


# ---------------------------------------------------------------------------- settings, health


def test_settings_know_where_they_come_from(tmp_path):
    """Flag, variable, file, default; keys of Google's variables; what the program itself sets. No key is shown, nor one
    in an address."""
    file = tmp_path / ".env"
    file.write_text("PERSONA_MEMORY_MODEL=from-file\nPERSONA_MEMORY_PORT=1\n")
    environ = {"GEMINI_API_KEY": "AIza-secret", "PERSONA_MEMORY_CONTEXT": "4096", "PERSONA_MEMORY_PORT": "2"}
    writer = "https://me:hunter22@llm.example/v1?key=sk-in-it"
    found = pm.load_settings(["--port", "3", "--data", str(tmp_path), "--summary-upstream", writer], environ, file)
    assert found.sources == {
        "model": ".env PERSONA_MEMORY_MODEL", "context": "variable PERSONA_MEMORY_CONTEXT", "port": "flag --port",
        "data": "flag --data", "upstream_key": "variable GEMINI_API_KEY", "summary_upstream": "flag --summary-upstream",
    }  # fmt: skip
    memory = pm.PersonaMemory(found)
    rows = {row["name"]: row for row in memory.status.options()}
    memory.close()
    assert list(rows) == [f.name for f in pm.OPTIONS]
    assert (rows["upstream_key"]["value"], rows["api_key"]["value"]) == ("(hidden)", "")
    assert rows["budget"]["source"] == "default" and rows["port"]["value"] == 3
    assert rows["summary_upstream"]["value"] == "https://llm.example/v1"
    assert not re.search("AIza-secret|hunter22|sk-in-it", json.dumps(list(rows.values())))


@pytest.mark.parametrize(
    ("upstream", "embedder", "turn", "level", "words", "advice"),
    [
        ("ok", "ready", {}, "ok", "OK", ""),
        ("ok", "loading", {}, "loading", "loading", "by words"),
        ("failed: no memory", "ready", {}, "trouble", "cannot be used", "no memory"),
        ("ok", "failed: no file", {}, "notice", "not by meaning", "--embedder"),
        (
            "ok",
            "ready",
            {"outcome": "upstream_error", "status": 502, "why": "refused"},
            "trouble",
            "refused",
            "http://x",
        ),
        ("ok", "ready", {"outcome": "upstream_error", "status": 504, "why": "silent"}, "trouble", "silent", "-timeout"),
        ("ok", "ready", {"outcome": "upstream_error", "status": 401, "why": "no"}, "trouble", "no", "--upstream-key"),
        ("ok", "ready", {"outcome": "failed", "status": 500, "why": "bug"}, "trouble", "bug", "log"),
        (
            "ok",
            "ready",
            {"outcome": "degraded", "status": 200, "why": "degraded; reason=late"},
            "notice",
            "late",
            "not aff",
        ),
        ("ok", "ready", {"outcome": "client_gone", "status": 499, "why": "left"}, "ok", "OK", ""),
    ],
)
def test_how_things_stand_is_said_in_words(upstream, embedder, turn, level, words, advice):
    """The gravest thing first, with what to do about it."""
    found = pm.diagnosis({"status": upstream, "url": "http://x", "model": "small"}, embedder, turn)
    assert found[0] == level and words in found[1] and advice in found[2]


def test_health_counts_turns_and_keeps_the_last_warnings_without_keys(upstream, data_dir):
    """What the page shows of the queue, the turns and the log."""
    given = settings(data_dir, upstream.url, upstream_key="sk-very-secret", upstream_limit=3)
    with LocalServer(given) as server:
        say(server.url, [FIRST])
        upstream.steer(status=400, error="sk-very-secret is odd")
        say(server.url, [FIRST])
        pm.log_event("tested", "sk-very-secret was here", level=logging.WARNING)
        found = call(server, "/health")
    assert (found["turns"]["ok"], found["turns"]["upstream_error"]) == (1, 1)
    assert found["queue"] == {"waiting": 0, "running": 0, "limit": 3}
    assert (found["level"], found["last_turn"]["status"]) == ("trouble", 400)
    assert [row["message"] for row in found["troubles"] if row["event"] == "tested"] == ["*** was here"]
    assert "sk-very-secret" not in json.dumps(found)


def test_health_without_a_key_quotes_nobody(upstream, data_dir):
    """The route that needs no key does not tell what the upstream said."""
    with LocalServer(settings(data_dir, upstream.url, api_key="open sesame")) as server:
        upstream.steer(status=400, error="private words")
        say(server.url, [FIRST], headers={"Authorization": "Bearer open sesame"})
        assert "private words" not in httpx.get(f"{server.url}/health").text


def test_the_state_changes_with_everything_that_changes_and_with_nothing_else(server, upstream):
    """A chat's counter with its messages, marks and reports; the list's with what the list shows."""

    def state():
        return call(server, "/state", chat="watched")

    assert state()["chat"] is None
    fill(server, "watched", "a heron")
    first = state()
    assert state() == first
    fill(server, "other", "a heron")
    second = state()
    assert second["chats"] > first["chats"] and second["chat"] == first["chat"]
    row = call(server, "/chats/watched/messages")["messages"][0]
    httpx.patch(f"{server.url}/api/persona_memory/chats/watched/messages/{row['id']}", json={"pinned": True})
    assert state()["chat"] > second["chat"]
    httpx.delete(f"{server.url}/api/persona_memory/chats/watched")
    assert state()["chat"] is None and state()["chats"] > second["chats"]
