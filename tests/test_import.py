"""Chat files and exports: an import is the chat as it would have been lived through; an export comes back as it was."""

import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from fakes import PATIENCE, PROGRAM, LocalServer, branch_texts, clean_environment, run_program, settings, wait_until
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from sillytavern import Character, Client, memories_in
from sillytavern import Message as Line

import persona_memory as pm

HELENA = Character("Helena", "Helena keeps the Thornwick lighthouse.", '*Helena lifts the lantern.* "Come in."')
BORIN = Character("Borin", "Borin is a dwarf blacksmith.", '*Borin sets down his hammer.* "What needs mending?"')
TEXTS = [
    "My cat is called Miso and he is afraid of thunder.",
    "I live in Larkspur Lane 9, above the bakery.",
    "My sister Ottilie mends clocks in Emberhold.",
    "I am allergic to walnuts, mind the cake.",
    "What shall we cook tonight?",
]
QUESTIONS = ("What is my cat afraid of?", "Where do I live?", "Who mends clocks?", "walnuts")


def call(server, method: str, path: str, **how) -> httpx.Response:
    """A call of the API."""
    return httpx.request(method, f"{server.url}/api/persona_memory/{path}", timeout=PATIENCE, **how)


def take_in(server, text: str, **query) -> list[dict]:
    """Imports a file; what the answer says of its chats."""
    return answered(server, text, **query)["chats"]


def answered(server, text: str | bytes, **query) -> dict:
    """The whole answer to an import."""
    raw = text if isinstance(text, bytes) else text.encode()
    answer = call(server, "POST", "import", content=raw, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tree(server, chat_id: str) -> dict[str, bool]:
    """A chat's messages: id -> whether they are memory."""
    return {m["id"]: m["confirmed"] for m in export(server, chat_id)["messages"]}


def export(server, chat_id: str) -> dict:
    """A chat's export."""
    answer = call(server, "GET", f"chats/{chat_id}/export")
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat_file(server, chat_id: str) -> str:
    """A chat as a SillyTavern chat file."""
    return call(server, "GET", f"chats/{chat_id}/export", params={"format": "sillytavern"}).text


def found(server, chat_id: str) -> list[list[tuple]]:
    """What a chat remembers of the questions: ids, places and scores."""
    answers = (call(server, "GET", f"chats/{chat_id}/search", params={"q": q, "k": 4}) for q in QUESTIONS)
    return [[(m["id"], m["index"], round(m["score"], 3)) for m in a.json()["memories"]] for a in answers]


def line(name: str, mes: str, **more) -> dict:
    """A message of a chat file."""
    return {"name": name, "is_user": name == "Robin", "is_system": False, "mes": mes, "extra": {}, **more}


def written(*rows: dict, header: dict | None = None) -> str:
    """A chat file of those rows under Helena's header, or under another."""
    header = {"user_name": "Robin", "character_name": "Helena"} if header is None else header
    return "\n".join(json.dumps(row) for row in ([header] if header else []) + list(rows))


def lived(server, **how) -> Client:
    """A chat as a user lives it: swipes, going back to a swipe, an edited reply."""
    client = Client(server.url, HELENA, **how)
    for text in TEXTS:
        client.send(text)
    client.swipe()
    client.swipe()
    client.swipe_back(1)
    client.send("Stew it is, then.")
    return client


@pytest.fixture
def small(upstream, data_dir):
    """The program before a model of little context."""
    with LocalServer(settings(data_dir, upstream.url, context=2048)) as running:
        yield running


@pytest.fixture
def other(upstream, tmp_path):
    """A second program with a data folder of its own."""
    with LocalServer(settings(tmp_path / "other", upstream.url)) as running:
        yield running


# ---------------------------------------------------------------------------- living through


def test_a_file_imports_to_the_same_memories_as_living_through_the_chat(server, other):
    """The same ids, the same rejected swipes, the same branch, the same search; the last reply is shown by the file."""
    client = lived(server)
    (line,) = take_in(other, client.file())
    chat = client.answer.chat_id
    client.send("Good night.")  # shows the last reply
    grown = take_in(other, client.file())
    assert grown == [{"chat_id": line["chat_id"], "added": 2, "total": len(client.chat)}]
    client.send("Wake up.")
    take_in(other, client.file())
    last = client.chat[-1]
    seen, imported = tree(server, chat), tree(other, line["chat_id"])
    shown = pm.message_id(export(server, chat)["chat"]["head"], pm.message_digest("assistant", last.text))
    assert seen == imported | {shown: False} and imported[shown]
    assert branch_texts(other.url, line["chat_id"]) == [m.text for m in client.chat]
    client.send("Who are you?")
    take_in(other, client.file()[: client.file().rindex('{"name"')])
    assert found(server, chat) == found(other, line["chat_id"])


def test_the_chat_goes_on_where_the_file_ended(server, upstream):
    """No id: the client's next request finds the imported chat, and what it has dropped comes back from there."""
    client = Client(server.url, HELENA, window=4)
    for number in range(300):
        filler = f"Night {number}: the wind turns, the lamp is trimmed, the log has one more line about the sea."
        client.chat += [Line("user", filler, "Robin"), Line("assistant", "*nods*", "H")]
    client.chat[1].text = TEXTS[0]
    (line,) = take_in(server, client.file())
    assert line == {"chat_id": line["chat_id"], "added": 601, "total": 601}
    answer = client.send("What is my cat afraid of?")
    assert answer.chat_id == line["chat_id"]
    assert TEXTS[0] in memories_in(upstream.last["body"]["messages"])


def test_the_beginning_of_a_chat_may_come_later(small, upstream):
    """A chat that was met half-way, since the client had dropped its beginning, gets that from its file."""
    client = Client(small.url, HELENA, window=4)
    client.chat += [Line("user", TEXTS[0], "Robin"), Line("assistant", "*nods*", "Helena")]
    for number in range(60):
        client.chat += [Line("user", f"Night {number}: the wind turns, and the log has one more line.", "Robin")]
        client.chat += [Line("assistant", "*looks at the water for a long while*", "Helena")]
    chat = client.send("The lamp is lit.").chat_id
    client.send("The lamp is out.")
    assert TEXTS[0] not in branch_texts(small.url, chat)
    (line,) = take_in(small, client.file())
    assert line == {"chat_id": chat, "added": len(client.chat), "total": len(client.chat)}
    assert client.send("What is my cat afraid of?").chat_id == chat
    assert TEXTS[0] in branch_texts(small.url, chat)
    assert TEXTS[0] in memories_in(upstream.last["body"]["messages"])


def test_again_adds_nothing(server):
    """Importing is idempotent, also after the chat has gone on."""
    client = lived(server)
    first = take_in(server, client.file())
    before = export(server, client.answer.chat_id)
    assert take_in(server, client.file()) == [{**first[0], "added": 0}]
    assert export(server, client.answer.chat_id) == before
    assert [c["chat_id"] for c in call(server, "GET", "chats").json()] == [client.answer.chat_id]


def test_an_import_that_was_cut_off_goes_on(server, monkeypatch):
    """What was written stays; the same file again adds the rest to the same chat."""
    monkeypatch.setattr(pm, "IMPORT_BATCH", 4)
    client = lived(server)
    client.chat = client.chat[:1] + [Line(m.role, m.text + " Once more.", m.name) for m in client.chat[1:]]
    text = client.file()
    archive, add = server.server.memory.archive, server.server.memory.archive._add_messages
    batches = iter(range(2))

    def cut(store, messages):
        if next(batches, None) is None:
            raise pm.StoreError("the power is out")
        return add(store, messages)

    monkeypatch.setattr(archive, "_add_messages", cut)
    assert call(server, "POST", "import", content=text.encode()).status_code == 503
    monkeypatch.setattr(archive, "_add_messages", add)
    (line,) = take_in(server, text)
    assert (line["added"], line["total"]) == (len(client.chat) - 8, len(client.chat))
    assert branch_texts(server.url, line["chat_id"]) == [m.text for m in client.chat]
    assert len(call(server, "GET", "chats").json()) == 2


def test_checkpoints_share_a_tree_and_their_vectors(server, other):
    """Files that begin alike land in one chat as branches; what they share is embedded once."""
    client = lived(server)
    branch = client.branch(4)
    branch.chat += [Line("user", "In this branch we sail at dawn.", "Robin")]
    memory, seen = other.server.memory, Counter()
    encode = memory.embedder.encode
    memory.embedder.encode = lambda texts, *args, **how: (seen.update(texts), encode(texts, *args, **how))[1]
    (first,), (second,) = take_in(other, client.file()), take_in(other, branch.file())
    assert second == {"chat_id": first["chat_id"], "added": 1, "total": 6}
    memory.vectors._thread.submit(len, ()).result(PATIENCE)  # behind the jobs that compute vectors
    assert set(seen) == {m.text for m in (*client.chat, *branch.chat)} and max(seen.values()) == 1
    described = call(other, "GET", f"chats/{first['chat_id']}").json()
    assert (described["branches"], described["messages"]) == (2, len(client.chat))


def test_an_old_checkpoint_does_not_turn_the_chat_back(server):
    """The current branch stays the newest, whichever file comes last."""
    old = [line("Helena", "Come in."), line("Robin", "Hello."), line("Helena", "Sit.")]
    dated = [{**row, "send_date": "July 12, 2024 9:30pm"} for row in old]
    newer = [*dated, {**line("Robin", "On the newer way."), "send_date": "July 14, 2024 9:30am"}]
    older = [*dated, {**line("Robin", "On the older way."), "send_date": "July 13, 2024 9:30am"}]
    for rows in ([newer, older], [older, newer]):
        for file in rows:
            (chat,) = take_in(server, written(*file))
        assert branch_texts(server.url, chat["chat_id"])[-1] == "On the newer way."


def test_with_an_id_the_chat_is_that_one(server):
    """An explicit id is not found by any transcript, and no other chat takes its messages."""
    file = written(line("Helena", "Come in."), line("Robin", "Hello, it is me."))
    assert take_in(server, file, chat_id="card/one") == [{"chat_id": "card/one", "added": 2, "total": 2}]
    (loose,) = take_in(server, file)
    assert loose["chat_id"].startswith("chat-") and loose["added"] == 2


# ---------------------------------------------------------------------------- what a file holds


def test_rejected_swipes_are_kept_and_never_recalled(server):
    """They hang beside the chosen one, unconfirmed."""
    swipes = ["The harpoon is in the shed.", "The harpoon is under the bed.", "The harpoon is on the roof."]
    file = written(
        line("Helena", "Come in.", swipes=["Come in.", "Go away."], swipe_id=0),
        line("Robin", "Where is the harpoon?"),
        line("Helena", swipes[1], swipes=swipes, swipe_id=1),
    )
    (chat,) = take_in(server, file)
    assert chat["total"] == chat["added"] == 3
    kept = export(server, chat["chat_id"])["messages"]
    assert [(m["content"], m["confirmed"]) for m in kept] == [
        ("Come in.", True), ("Go away.", False), ("Where is the harpoon?", True),
        (swipes[0], False), (swipes[1], True), (swipes[2], False),
    ]  # fmt: skip
    hits = call(server, "GET", f"chats/{chat['chat_id']}/search", params={"q": "harpoon"}).json()["memories"]
    assert {m["content"] for m in hits} == {"Come in.", "Where is the harpoon?", swipes[1]}


def test_a_swipe_that_was_edited_counts_as_it_reads_now(server):
    """The message's own text goes before the list of swipes."""
    row = line("Helena", "A corrected reply.", swipes=["Another.", "A repiy."], swipe_id=1)
    (chat,) = take_in(server, written(line("Robin", "Hello."), row))
    kept = export(server, chat["chat_id"])["messages"]
    assert [(m["content"], m["confirmed"]) for m in kept[1:]] == [("Another.", False), ("A corrected reply.", True)]


def test_hidden_messages_are_memory_and_notices_are_not(server):
    """Hidden means hidden from the prompt. Narrator lines, comments and notices are no one's words in the chat."""
    file = written(
        line("Helena", "Come in."),
        line("Robin", "My cat is called Miso.", is_system=True),
        line("SillyTavern System", "You are in a checkpoint.", is_system=True, extra={"type": "bookmark_created"}),
        line("System", "The storm rises.", extra={"type": "narrator"}),
        line("Note", "nice one", is_system=True, extra={"type": "comment"}),
        line("Helena", "  "),
        line("Robin", "Good night."),
    )
    (chat,) = take_in(server, file)
    assert branch_texts(server.url, chat["chat_id"]) == ["Come in.", "My cat is called Miso.", "Good night."]


def test_what_was_hidden_from_the_beginning_on_comes_back(server, upstream):
    """The client goes on without the hidden messages; they are recalled where they matter."""
    rows = [line("Helena", "Come in."), line("Robin", TEXTS[0]), line("Helena", "*nods*")]
    for number in range(40):
        rows += [line("Robin", f"Night {number}: the wind turns."), line("Helena", f"*looks at wave {number}*")]
    hidden = [{**row, "is_system": n < 60} for n, row in enumerate(rows)]
    (chat,) = take_in(server, written(*hidden))
    client = Client(server.url, HELENA)
    client.chat = [Line("user" if r["is_user"] else "assistant", r["mes"], r["name"]) for r in rows[60:]]
    answer = client.send("What is my cat afraid of?")
    assert answer.chat_id == chat["chat_id"]
    assert any(TEXTS[0] in message["content"] for message in upstream.last["body"]["messages"])


@pytest.mark.parametrize(
    "given, expected",
    [
        ("2024-07-12 @21h 30m 12s 123ms", datetime(2024, 7, 12, 21, 30, 12, 123000)),
        ("2024-7-2@01h31m37s", datetime(2024, 7, 2, 1, 31, 37)),
        ("July 12, 2024 9:30pm", datetime(2024, 7, 12, 21, 30)),
        ("December 1, 2023 12:05am", datetime(2023, 12, 1, 0, 5)),
        ("2024-07-12T21:30:12.123Z", datetime.fromisoformat("2024-07-12T21:30:12.123+00:00")),
        (1720819812123, datetime.fromisoformat("2024-07-12T21:30:12.123+00:00")),
        ("1720819812123", datetime.fromisoformat("2024-07-12T21:30:12.123+00:00")),
        (1720819812, datetime.fromisoformat("2024-07-12T21:30:12+00:00")),
        ("7/12/2026, 2:18:29\u202fPM", datetime(2026, 7, 12, 14, 18, 29)),
        ("Jul 12, 2026 2:18 PM", datetime(2026, 7, 12, 14, 18)),
        ("12/07/2026, 14:18:29", datetime(2026, 7, 12, 14, 18, 29)),
        ("12.7.2026, 14:18:29", datetime(2026, 7, 12, 14, 18, 29)),
    ],
)
def test_every_format_of_dates_is_read(given, expected):
    """SillyTavern has had several; those without a zone are of this machine's."""
    assert datetime.fromisoformat(pm.parse_send_date(given)) == expected.astimezone()


@pytest.mark.parametrize(
    "given",
    [
        "yesterday", "", None, [], {}, "July 99, 2024 9:30pm", 1e300, -(10**30), "Mai 1, 2024 1:00am",
        "x" * 100 + "July 12, 2024 9:30pm", "x" * 1_000_000, "9" * 4000,
        "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00",
    ],
    ids=lambda given: str(given)[:20],
)  # fmt: skip
def test_a_date_that_cannot_be_read_is_none(given):
    """The message is worth more than its date."""
    assert pm.parse_send_date(given) is None


DAYS = ("2024-07-12", "1850-01-01", "20240712", "2024-W28-5")
TIMES = (
    "",
    "T21",
    "T2130",
    "T21:30",
    "t21:30:12",
    " 21:30:12",
    "x21:30:12",
    "T213012",
    "T21:30:12.5",
    "T21:30:12,123456",
)
ZONES = ("", "Z", "+02:00", "+0200", "-05", "-00:00:36", "+00:17:30.5")


@pytest.mark.skipif(not shutil.which("node"), reason="no JavaScript here")
def test_a_date_that_is_kept_can_be_read_by_javascript():
    """Whatever form of ISO 8601 it came in; and it is the same moment."""
    kept = {}
    for text in map("".join, itertools.product(DAYS, TIMES, ZONES)):
        try:
            kept[text] = pm.parse_timestamp(text, "timestamp")
        except pm.InvalidRequest:
            continue  # Python does not read it either
    script = f"console.log(JSON.stringify({json.dumps(list(kept.values()))}.map((text) => Date.parse(text))))"
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, env={"TZ": "UTC"}, check=True)
    moments = dict(zip(kept, json.loads(done.stdout), strict=True))
    assert len(kept) > 100 and None not in moments.values()
    for text, moment in moments.items():
        when = datetime.fromisoformat(text)
        assert int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000) == pytest.approx(
            moment, abs=1
        )


def test_a_date_that_javascript_reads_is_kept_as_it_came():
    """Clients send the same date with every request."""
    for text in ("2024-07-12", "2024-07-12T21:30", "2024-07-12T21:30:12.123Z", "2024-07-12T21:30:12.123456+05:30"):
        assert pm.parse_timestamp(text, "timestamp") == text
    assert pm.parse_timestamp("2024-W28-5", "timestamp") == "2024-07-12T00:00:00"
    assert pm.parse_timestamp(None, "timestamp") is None


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "yesterday", 5, ""])
def test_a_date_that_no_calendar_can_hold_is_refused(text):
    """In some time zone such a date would be before the year 1, or after 9999."""
    with pytest.raises(pm.InvalidRequest, match="timestamp"):
        pm.parse_timestamp(text, "timestamp")


def test_dates_are_kept(server):
    """The API shows when a message was said."""
    (chat,) = take_in(server, written({**line("Robin", "Hello."), "send_date": "2024-07-12T21:30:12Z"}))
    (row,) = call(server, "GET", f"chats/{chat['chat_id']}/messages").json()["messages"]
    assert row["timestamp"] == "2024-07-12T21:30:12+00:00"


def test_a_greeting_alone_is_no_chat_yet(server):
    """The client keeps a file for every character that was ever opened."""
    assert take_in(server, written(line("Helena", "Come in."))) == []
    assert take_in(server, written()) == []
    assert call(server, "GET", "chats").json() == []


NAMELESS = {"chat_metadata": {"integrity": "1"}, "user_name": "unused", "character_name": "unused"}


@pytest.mark.parametrize("header", [None, NAMELESS], ids=["named", "unused"])
def test_the_list_names_the_character(server, header):
    """As the file's header does, or where newer versions put nothing there, the messages."""
    lent = line("Ottilie", "Am I late?", force_avatar="/thumbnail?file=Ottilie.png", original_avatar="Ottilie.png")
    file = written(line("Robin", "Hello.", force_avatar="x.png"), lent, line("Helena", "Sit."), header=header)
    (chat,) = take_in(server, file)
    assert [c["character"] for c in call(server, "GET", "chats").json()] == ["Helena"]
    assert branch_texts(server.url, chat["chat_id"]) == ["Hello.", "Am I late?", "Sit."]


def test_names_of_half_characters_are_mended(server):
    """Names are cut where an emoji was; what is left of it would keep the chat from being stored."""
    file = written(line("Robin", "Hello."), line("Helena", "Sit."), header={"character_name": "Helena \ud83d"})
    take_in(server, file)
    assert [c["character"] for c in call(server, "GET", "chats").json()] == ["Helena \ufffd"]


# ---------------------------------------------------------------------------- groups


def group(url: str, **how) -> Client:
    """A group chat of Helena and Borin, lived for two rounds."""
    client = Client(url, HELENA, group=("Helena", "Borin"), **how)
    client.chat.append(Line("assistant", BORIN.greeting, "Borin"))
    client.send("Hello both of you. What do you hide?")
    client.reply(BORIN)
    client.send("And where is the anvil?")
    client.reply(HELENA)
    client.send("Good.")
    return client


def test_a_group_imports_as_it_was_lived(server, other):
    """Each reply begins with its speaker's name, as the client sends it, and the speaker is known."""
    client = group(server.url)
    client.chat.pop()
    (chat,) = take_in(other, client.file())
    seen = {i for i, confirmed in tree(server, client.answer.chat_id).items() if confirmed}
    assert {i for i, confirmed in tree(other, chat["chat_id"]).items() if confirmed} == seen
    lived_voices = [m["voice"] for m in export(server, client.answer.chat_id)["messages"] if m["confirmed"]]
    voices = [m["voice"] for m in export(other, chat["chat_id"])["messages"] if m["confirmed"]]
    assert voices == lived_voices == ["Helena", "Borin", None, "Helena", "Borin", None, "Borin", "Helena", None]
    assert found(other, chat["chat_id"]) == found(server, client.answer.chat_id)


@pytest.mark.parametrize("way", ["sync", "names"])
def test_a_groups_file_adds_nothing_however_the_group_was_lived(server, way):
    """Names stood beside the texts, as the extension tells them, or in front of the user's too."""
    said = [
        ("Robin", "Where is the key?"),
        ("Helena", "By the lamp."),
        ("Robin", "And the other?"),
        ("Borin", "In ash."),
    ]
    shown = [{"role": "user" if n == "Robin" else "assistant", "name": n, "content": t} for n, t in said]
    if way == "sync":
        assert call(server, "POST", "chats/st-1/sync", json={"messages": shown}).status_code == 200
    else:
        opening = {"role": "system", "content": "[Start a new group chat. Group members: Helena, Borin]"}
        texts = [{"role": m["role"], "content": f"{m['name']}: {m['content']}"} for m in shown]
        for count in (3, 4):
            sayings = {"messages": [opening, *texts[:count]], "persona_memory": {"chat_id": "st-1", "user": "Robin"}}
            httpx.post(f"{server.url}/v1/chat/completions", json=sayings, timeout=60)
    file = written(*(line(n, t, original_avatar=f"{n}.png") for n, t in said), header=known("st-1"))
    for _ in range(2):
        assert take_in(server, file) == [{"chat_id": "st-1", "added": 0, "total": 4}]
    described = call(server, "GET", "chats/st-1").json()
    assert (described["branches"], described["branch_length"]) == (1, 4)
    rows = call(server, "GET", "chats/st-1/messages").json()["messages"]
    assert [(m["name"], m["content"]) for m in rows] == said


def test_newer_group_files_have_a_header(server):
    """It names nobody; that all replies say whose card they came from makes it a group's."""
    rows = [line(name, "Hm.", original_avatar=f"{name}.png") for name in ("Helena", "Borin")]
    (chat,) = take_in(server, written(*rows, line("Robin", "Hello."), header=NAMELESS))
    rows = call(server, "GET", f"chats/{chat['chat_id']}/messages").json()["messages"]
    assert [(m["name"], m["content"]) for m in rows] == [("Helena", "Hm."), ("Borin", "Hm."), (None, "Hello.")]


def test_whoever_answers_recalls_the_whole_groups_past(small, upstream):
    """A question about a member finds that member's words; another member is answering."""
    said = {"Helena": "The key hangs on a nail by the lamp.", "Borin": "The key lies in the ash of my forge."}
    client = Client(small.url, HELENA, group=("Helena", "Borin"), window=4)
    for name, text in said.items():
        client.chat += [Line("user", f"And you, {name}?", "Robin"), Line("assistant", text, name)]
    for number in range(60):
        client.chat += [Line("user", f"Day {number}. The sea is grey and the gulls are loud again.", "Robin")]
        client.chat += [Line("assistant", "*nods and looks at the water for a while*", "Helena")]
    take_in(small, client.file())
    client.chat.append(Line("user", "Where did Borin say that the key is?", "Robin"))
    client.reply(HELENA)
    assert f"Borin: {said['Borin']}" in memories_in(upstream.last["body"]["messages"])
    best = call(small, "GET", f"chats/{client.answer.chat_id}/search", params={"q": "Where did Borin put the key?"})
    assert [best.json()["memories"][0][k] for k in ("name", "content")] == ["Borin", said["Borin"]]


def turns_of(*contents: str, leading: str = "") -> list[str | None]:
    """The voices of a request's assistant messages."""
    messages = [{"role": "system", "content": leading}] if leading else []
    messages += [{"role": "assistant", "content": c} for c in contents]
    return [t.voice for t in pm.parse_request({"messages": [*messages, {"role": "user", "content": "Ann: hm"}]}).turns][
        :-1
    ]


def test_names_in_front_of_texts_are_speakers():
    """A colon alone names nobody: the client says who is in a group, or every text of a side begins with a name."""
    opening = "[Start a new group chat. Group members: Helena, Borin]"
    assert turns_of("Helena: hi", "Note: closed", "hm", leading=opening) == ["Helena", None, None]
    assert turns_of("Helena: hi", "Borin: hm", leading="Be both.") == ["Helena", "Borin"]
    assert turns_of("Helena: hi", "Helena: hm", leading="Be her.") == ["Helena", "Helena"]
    assert turns_of("Helena: hi", "Well: hm", "no name", leading="Be her.") == [None, None, None]
    assert turns_of("Helena: ", "Borin: x", leading=opening) == ["Borin"]  # the first is nobody's words


# ---------------------------------------------------------------------------- import and life are one


def chats(server) -> list[str]:
    """The ids of all chats."""
    return [c["chat_id"] for c in call(server, "GET", "chats").json()]


def known(chat_id: str, header: dict | None = None) -> dict:
    """A header as the extension leaves it in a chat that has that id."""
    metadata = {"persona_memory": {"id": chat_id, "file": "Helena - 1", "main": "", "group": False}, **(header or {})}
    return {"chat_metadata": metadata, "user_name": "unused", "character_name": "unused"}


def test_a_file_whose_header_names_the_chat_is_that_chat(server):
    """Also where the chat has not been met yet; a copy of the header in a branch names the branch's parent."""
    rows = [line("Helena", "Come in."), line("Robin", "Hello, it is me.")]
    (chat,) = take_in(server, written(*rows, header=known("st-1")))
    assert chat == {"chat_id": "st-1", "added": 2, "total": 2}
    other = [*rows, line("Helena", "Sit."), line("Robin", "Another way.")]
    (branch,) = take_in(server, written(*other, header=known("st-1", {"main_chat": "Helena - 1"})))
    assert branch["chat_id"] != "st-1" and sorted(chats(server)) == sorted(["st-1", branch["chat_id"]])


def test_files_that_their_headers_tell_apart_are_two_chats(server):
    """Though they begin alike; and one that a header names is that chat, whatever has become of its messages."""
    rows = [line("Helena", "Come in."), line("Robin", "Hi."), line("Helena", "Sit.")]
    files = {way: [*rows, *(line("Robin", f"{way} {n}.") for n in range(6))] for way in ("left", "right")}

    def taken(rows: list[dict], **metadata) -> str:
        (chat,) = take_in(server, written(*rows, header={"user_name": "unused", "chat_metadata": metadata}))
        return chat["chat_id"]

    found = {way: taken(rows, integrity=way) for way, rows in files.items()}
    assert sorted(chats(server)) == sorted(set(found.values())) and len(found) == 2
    assert {way: taken(rows, integrity=way) for way, rows in files.items()} == found
    edited = [{**row, "mes": row["mes"] + " So."} for row in files["left"]]
    assert taken(edited, integrity="left") == found["left"]
    assert taken([*files["left"][:5], line("Robin", "Back.")], integrity="left", main_chat="left") == found["left"]
    assert taken(files["right"], chat_id_hash=4077425931751214) == found["right"]
    assert taken(files["right"], integrity="right", chat_id_hash=1) == found["right"]
    assert len(chats(server)) == 2


@pytest.mark.parametrize("how", ["header", "extension", "file", "query"])
def test_an_imported_chat_becomes_the_one_that_gets_its_id(server, upstream, how):
    """However the id comes: the chat is listed once, and the same file adds nothing, with and without the id."""
    client = Client(server.url, HELENA, window=4)
    client.chat += [Line("user", TEXTS[0], "Robin"), Line("assistant", "*nods*", "Helena")]
    for number in range(60):
        client.chat += [Line("user", f"Night {number}: the wind turns, and the log has one more line.", "Robin")]
        client.chat += [Line("assistant", f"*looks at wave {number} for a long while*", "Helena")]
    text = client.file()
    (chat,) = take_in(server, text)
    named = written(*map(json.loads, text.splitlines()[1:]), header=known("st-1"))
    if how == "header":
        client.headers = {"X-Chat-Id": "st-1"}
        client.send("What is my cat afraid of?")
        assert client.answer.chat_id == "st-1" and TEXTS[0] in branch_texts(server.url, "st-1")
    elif how == "extension":
        turns = [{"role": m.role, "content": m.text} for m in client.chat] + [{"role": "user", "content": "Well?"}]
        said = {"chat_id": "st-1", "complete": True, "messages": turns}
        assert call(server, "POST", "inject", json=said).status_code == 200
    else:
        (line_,) = take_in(server, named) if how == "file" else take_in(server, text, chat_id="st-1")
        assert line_ == {"chat_id": "st-1", "added": 0, "total": chat["total"]}
    assert chats(server) == ["st-1"]
    for again in (text, named):
        assert take_in(server, again) == [{"chat_id": "st-1", "added": 0, "total": chat["total"]}]
    assert chats(server) == ["st-1"]


def test_the_marks_of_an_imported_chat_stay_with_it(server):
    """Pinned and forgotten, and what stands on its rejected swipes."""
    swipes = ["Sit.", "Stand."]
    file = written(line("Robin", "Hello."), line("Helena", "Sit.", swipes=swipes, swipe_id=0), line("Robin", "Why?"))
    (chat,) = take_in(server, file)
    before = export(server, chat["chat_id"])["messages"]
    path = f"chats/{chat['chat_id']}/messages/{before[0]['id']}"
    assert call(server, "PATCH", path, json={"pinned": True, "content": "Good evening."}).status_code == 200
    before = export(server, chat["chat_id"])["messages"]
    take_in(server, file, chat_id="st-1")
    assert export(server, "st-1")["messages"] == before and chats(server) == ["st-1"]


def test_an_imported_chat_of_two_branches_becomes_two_chats(server):
    """It stays until each of its branches is a named chat, and neither of those holds the other's end."""
    rows = [line("Helena", "Come in."), line("Robin", "Hello, it is me."), line("Helena", "Sit.")]
    one, two = ([*rows, line("Robin", f"The {way} way."), line("Helena", f"{way}.")] for way in ("First", "Second"))
    for file in (one, two):
        take_in(server, written(*file))
    assert len(chats(server)) == 1
    take_in(server, written(*one), chat_id="st-1")
    assert len(chats(server)) == 2
    take_in(server, written(*two), chat_id="st-2")
    assert sorted(chats(server)) == ["st-1", "st-2"]
    for chat_id, file in (("st-1", one), ("st-2", two)):
        kept = [m["content"] for m in export(server, chat_id)["messages"]]
        assert kept == [row["mes"] for row in file] == branch_texts(server.url, chat_id)


def test_the_file_of_a_chat_that_was_lived_under_an_id_adds_what_is_new(server):
    """Though nothing in the file names it; a file that only begins alike is another chat."""
    client = lived(server, headers={"X-Chat-Id": "card-7"})
    grown = take_in(server, client.file())
    assert grown == [{"chat_id": "card-7", "added": 1, "total": len(client.chat)}]
    assert take_in(server, client.file()) == [{**grown[0], "added": 0}] and chats(server) == ["card-7"]
    other = [Line("user", f"Quite another evening, {n}.", "Robin") for n in range(12)]
    client.chat[3:] = other
    (line_,) = take_in(server, client.file())
    assert line_["chat_id"] != "card-7"


def named(server) -> list[tuple]:
    """What the list calls its chats."""
    return [(c["title"], c["name"], c["character"]) for c in call(server, "GET", "chats").json()]


def test_chats_are_called_what_their_clients_call_them(server):
    """The file's name is the chat's title; a group is called by its members; without any name the id must do."""
    take_in(server, written(line("Robin", "Hello."), line("Helena", "Sit.")), name="Helena - 2026-07-12.jsonl")
    assert named(server) == [("Helena - 2026-07-12", "Helena", "Helena")]
    rows = [line(name, "Hm.", original_avatar=f"{name}.png") for name in ("Helena", "Borin", "Helena")]
    (chat,) = take_in(server, written(*rows, line("Robin", "Hello, all."), header=NAMELESS), name="C:\\chats\\g.jsonl")
    assert ("g", "Helena, Borin", "Helena") in named(server)
    assert call(server, "GET", f"chats/{chat['chat_id']}").json()["name"] == "Helena, Borin"
    turns = {"messages": [{"role": "user", "content": "A chat of nobody."}]}
    said = {"chat_id": "st-9", "title": "The harbour", "group": "The crew", "complete": True, **turns}
    assert call(server, "POST", "inject", json=said).status_code == 200
    assert ("The harbour", "The crew", None) in named(server)
    call(server, "POST", "inject", json={"chat_id": "st-10", "complete": True, **turns})
    assert (None, "st-10", None) in named(server)
    hit = call(server, "GET", "search", params={"q": "all"}).json()["found"][0]
    assert (hit["chat"], hit["title"]) == ("Helena, Borin", "g")


def test_a_group_that_is_lived_is_called_by_its_members(server):
    client = group(server.url)
    (line_,) = call(server, "GET", "chats").json()
    assert line_["name"] == "Helena, Borin" and line_["chat_id"] == client.answer.chat_id


# ---------------------------------------------------------------------------- other programs

WEBUI = {
    "internal": [
        ["<|BEGIN-VISIBLE-CHAT|>", "How can I help?"],
        ["Where is the key?", "Under the mill."],
        ["Bye", ""],
    ],
    "visible": [["", "How can I help?"], ["Where is the key?", "Under the mill."], ["Bye", ""]],
    "metadata": {"user_1": {"timestamp": "Jul 12, 2026 14:18"}},
}
AGNAI = {
    "name": "Exported", "greeting": "Hello",
    "messages": [
        {"_id": "1", "characterId": "c", "msg": "Hello", "handle": "Bea"},
        {"_id": "2", "userId": "u", "msg": "Hi", "handle": "Ann", "createdAt": "2026-07-12T14:01:29.287Z"},
    ],
}  # fmt: skip
CHARACTER_AI = {
    "info": {"character": {"name": "Bea"}},
    "histories": {"histories": [
        {"msgs": [{"text": "Hello", "src": {"is_human": False}}, {"text": "Hi", "src": {"is_human": True}}]},
        {"msgs": [{"text": "Hello", "src": {"is_human": False}}]},
        {"msgs": [{"text": "Who?", "src": {"is_human": True}}, {"text": "Me.", "src": {"is_human": False}}]},
    ]},
}  # fmt: skip
KOBOLD = {
    "prompt": "The door opens.", "actions": ["{{[INPUT]}}Hi{{[OUTPUT]}}", "Hello", "{{[INPUT]}}Bye"],
    "savedsettings": {"chatname": "Ann", "chatopponent": "Bea||$||Cleo", "opmode": 4},
}  # fmt: skip
KOBOLD_NAMES = {**KOBOLD, "prompt": "", "actions": ["\nAnn: Hi", "\nBea: Hello\nthere", "\nCleo: Ho"]}
RISU = {
    "type": "risuChat", "ver": 1,
    "data": {"name": "One", "note": "", "localLore": [], "message": [
        {"role": "user", "data": "Hi", "time": 1783864889287}, {"role": "char", "data": "Hello", "saying": "x"},
    ]},
}  # fmt: skip


@pytest.mark.parametrize(
    "document, expected",
    [
        (WEBUI, [["a How can I help?", "u Where is the key?", "a Under the mill.", "u Bye"]]),
        ({"data": WEBUI["internal"][:2], "data_visible": []},
         [["a How can I help?", "u Where is the key?", "a Under the mill."]]),
        (AGNAI, [["a Hello", "u Hi"]]),
        (CHARACTER_AI, [["a Hello", "u Hi"], ["u Who?", "a Me."]]),
        (KOBOLD, [["a The door opens.", "u Hi", "a Hello", "u Bye"]]),
        (KOBOLD_NAMES, [["u Hi", "a Hello\nthere", "a Ho"]]),
        (RISU, [["u Hi", "a Hello"]]),
        ({**RISU, "type": "risuAllChats", "data": [RISU["data"], RISU["data"]]}, [["u Hi", "a Hello"]] * 2),
    ],
    ids=["webui", "old webui", "agnai", "character.ai", "kobold", "kobold by names", "risu", "all of risu"],
)  # fmt: skip
@pytest.mark.parametrize("indent", [None, 2])
def test_chats_of_other_programs_are_read(document, expected, indent):
    """On one line or on several."""
    copies, _ = pm.read_chats(json.dumps(document, indent=indent).encode())
    assert [[f"{m.role[0]} {m.content}" for m in copy.path] for copy in copies] == expected


def test_names_and_dates_of_other_programs_are_read():
    copies = [pm.read_chats(json.dumps(d).encode())[0][0] for d in (WEBUI, AGNAI, CHARACTER_AI, KOBOLD, RISU)]
    names = [(copy.info.get("user_name"), copy.info.get("character")) for copy in copies]
    assert names == [(None, None), ("Ann", "Bea"), (None, "Bea"), ("Ann", "Bea"), (None, None)]
    dates = [pm.parse_send_date("Jul 12, 2026 14:18"), pm.parse_send_date(AGNAI["messages"][1]["createdAt"])]
    assert [copies[0].path[1].timestamp, copies[1].path[1].timestamp] == dates
    assert copies[4].path[0].timestamp == pm.parse_send_date(1783864889287)


def test_a_bad_message_of_another_program_costs_that_message(server):
    odd = {**AGNAI, "messages": [*AGNAI["messages"], {"msg": 5}, None]}
    taken = answered(server, json.dumps(odd), name="a.json")
    assert [left["why"].split(" ")[0] for left in taken["passed_over"]] == ["messages[2]", "messages[3]"]
    assert taken["chats"][0]["total"] == 2


def test_a_room_of_tavernai_keeps_its_speakers(server):
    """Its header lists several characters; each reply is known to be its speaker's, as a group's are."""
    header = {"user_name": "You", "character_names": ["Ilsa", "Bram"], "create_date": 1684669029632}
    rows = [{"name": n, "is_user": n == "You", "mes": t} for n, t in (("Ilsa", "Hm."), ("You", "Hi."), ("Bram", "Ho."))]
    (chat,) = take_in(server, written(*rows, header=header))
    shown = call(server, "GET", f"chats/{chat['chat_id']}/messages").json()["messages"]
    assert [(m["name"], m["content"]) for m in shown] == [("Ilsa", "Hm."), (None, "Hi."), ("Bram", "Ho.")]


# ---------------------------------------------------------------------------- from the command line


def command(data: Path, *names) -> list[str]:
    """The program's own command for an import."""
    return [sys.executable, str(PROGRAM), "--data", str(data), "--import", *map(str, names)]


def run_import(data: Path, *names) -> subprocess.CompletedProcess:
    """An import that is waited for."""
    return run_program("--data", data, "--import", *names)


def long_file(count: int) -> str:
    """A chat file of so many messages."""
    return written(
        *(line("Robin" if n % 2 else "Helena", f"Line {n} of the log: the lamp is lit.") for n in range(count))
    )


def test_a_folder_of_chats_is_imported(tmp_path, server):
    """Chat files, group files and exports, however deep; other JSON is passed over, broken files are named."""
    chats, data = tmp_path / "chats", tmp_path / "imported"
    (chats / "Helena").mkdir(parents=True)
    (chats / "Helena" / "one.jsonl").write_text(written(line("Robin", "Hello."), line("Helena", "Sit.")))
    (chats / "Helena" / "greeting.jsonl").write_text(written(line("Helena", "Come in.")))
    (chats / "group.jsonl").write_text(written(line("Borin", "Hm."), line("Robin", "Hello, Borin."), header={}))
    (chats / "settings.json").write_text('{"power_user": {}}')
    (chats / "broken.jsonl").write_text(written(line("Robin", "Half of it.")) + "\n{oops")
    (chats / "none.jsonl").write_text("{oops")
    for name in ("a.png", "b.png"):
        (chats / name).write_bytes(b"")
    take_in(server, written(line("Robin", "Out and in."), line("Helena", "Again.")), chat_id="x")
    (chats / "export.json").write_text(json.dumps(export(server, "x")))
    done = subprocess.run(  # as a user does it
        command(data, chats), env=clean_environment(None), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2 and "Chats: 4. Messages: 7 added, 0 already present. 1 of 6 files" in done.stderr
    assert "Traceback" not in done.stderr
    for words in (
        "one.jsonl: 2 messages, 2 of them new", "greeting.jsonl: skipped: it holds no message of the user",
        "settings.json: skipped. This is not a chat", "object with power_user", "broken.jsonl: skipped: line 3",
        "none.jsonl: line 1", "2 files of other kinds were skipped (2 .png)",
    ):  # fmt: skip
        assert words in done.stderr
    assert "chats" in done.stderr and "vectors" in done.stderr  # the bars
    for name in ("broken.jsonl", "none.jsonl"):
        (chats / name).unlink()
    done = run_import(data, chats)
    assert done.returncode == 0 and "Chats: 3. Messages: 0 added, 6 already present." in done.stdout
    memory = pm.PersonaMemory(pm.Settings(data=str(data)))
    assert len(memory.chats()) == 4
    for row in memory.chats():
        with memory.registry.borrow(row["chat_id"]) as chat:
            store = chat.store
        hashes = [n.fingerprint for n in store.tree.nodes.values()]
        assert len(store.vectors(memory.embedder.key, hashes)) == len(hashes)
    memory.close()


UNREADABLE = Path("/proc/self/mem")  # a file that is there and cannot be read, not even by root


@pytest.mark.skipif(not UNREADABLE.is_file(), reason="no /proc here")
def test_files_that_cannot_be_read_cost_only_themselves(tmp_path):
    """Wherever they stand, what follows them is imported, and each is named."""
    chats = tmp_path / "chats"
    chats.mkdir()
    for name in ("a.json", "b.jsonl"):
        (chats / name).symlink_to(UNREADABLE)
    (chats / "c.jsonl").write_text(written(line("Robin", "Hello."), line("Helena", "Sit.")))
    done = run_import(tmp_path / "data", tmp_path / "nowhere.jsonl", chats)
    assert done.returncode == 2 and "Chats: 1. Messages: 2 added, 0 already present. 3 of 4 files" in done.stderr
    assert all(name in done.stderr for name in ("nowhere.jsonl", "a.json:", "b.jsonl:"))
    assert "Traceback" not in done.stderr


def test_an_import_that_is_killed_goes_on_where_it_was(tmp_path):
    """Killed after its first messages were written, run again: all of them, in one chat."""
    data, file = tmp_path / "data", tmp_path / "long.jsonl"
    file.write_text(long_file(3000))
    with subprocess.Popen(command(data, file), env=clean_environment(None), stderr=subprocess.DEVNULL) as running:
        wait_until(lambda: list(data.glob("chats/*/cache.db")) or running.poll() is not None, "the first chat")
        running.kill()
    memory = pm.PersonaMemory(pm.Settings(data=str(data)))
    written_by_then = sum(row["messages"] for row in memory.chats())
    (chat,) = memory.archive.take_in(file.read_bytes(), embed=False)["chats"]
    assert (
        chat["added"] <= 3000 - written_by_then
        and chat["total"] == 3000
        and [row["messages"] for row in memory.chats()] == [3000]
    )
    assert [m["content"] for m in memory.messages(chat["chat_id"], 2998)["messages"]] == [
        "Line 2998 of the log: the lamp is lit.", "Line 2999 of the log: the lamp is lit.",
    ]  # fmt: skip
    memory.close()


def test_a_file_that_is_not_there_is_named(tmp_path):
    """In one line."""
    done = run_import(tmp_path / "data", tmp_path / "nowhere.jsonl")
    assert done.returncode == 2 and "nowhere.jsonl" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------- files that are none

GOOD = json.dumps(line("Robin", "Hello."))
EXPORT = {
    "format": "persona_memory",
    "version": 1,
    "chat": {"chat_id": "x"},
    "messages": [],
    "summaries": [],
    "facts": [],
}
ROW_ID = pm.message_id("", pm.message_digest("user", "Hi"))
TEXT = pm.message_digest("user", "Hi")
FACT = pm.asdict(pm.Fact("f", "cat", "The cat is Miso.", "Miso", TEXT, 0, 0))
SUMMARY = pm.asdict(pm.new_summary(1, [TEXT], 0, "They met.", 9, "user"))
ROW = {"id": ROW_ID, "parent": "", "role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "line 1"),
        ("{", "line 1"),
        ("[1, 2]", "the file holds a list"),
        ("{}", "an empty object"),
        ("5", "a number"),
        ('{"spec": "chara_card_v2", "data": {}}', "an object with spec, data"),
        ('{"a": 1}\n{"a": 2}', "line 1"),
        ('{"mes": 5}', "line 1"),
        ('{"savedsettings": {}, "prompt": "Once upon a time.", "actions": []}', "story of KoboldAI Lite"),
        ('{"savedsettings": {}, "prompt": "Once upon a time.", "actions": 5}', "story of KoboldAI Lite"),
        ('{"messages": 5}', "an object with messages"),
        ('{\n  "format": "persona_memory",\n  "version": oops\n}', "line 3"),
        (json.dumps({**EXPORT, "version": 3}), "version"),
        (json.dumps({**EXPORT, "format": "other"}), "neither"),
        (json.dumps({**EXPORT, "chat": {}}), "chat.chat_id"),
        (json.dumps({**EXPORT, "chat": {"chat_id": "x", "created": "now"}}), "chat.created"),
        (json.dumps({**EXPORT, "chat": {"chat_id": "\ud800"}}), "chat.chat_id"),
        (json.dumps({**EXPORT, "chat": {"chat_id": "x", "updated": 1e300}}), "chat.updated"),
        (json.dumps({**EXPORT, "chat": {"chat_id": "x", "created": -1}}), "chat.created"),
        (json.dumps({**EXPORT, "chat": {"chat_id": "x", "updated": 5}}).replace("5", "1e999"), "not valid JSON"),
        (json.dumps({**EXPORT, "chat": {"chat_id": "x", "updated": 5}}).replace("5", "9" * 4000), "not valid JSON"),
        (json.dumps({**EXPORT, "messages": None}), "messages"),
        (json.dumps({**EXPORT, "messages": [None]}), "messages[0]"),
        (json.dumps({**EXPORT, "messages": [{}]}), "messages[0]"),
        (json.dumps({**EXPORT, "messages": [{**ROW, "id": "0"}]}), "messages[0].id"),
        (json.dumps({**EXPORT, "messages": [{**ROW, "role": "system"}]}), "messages[0].role"),
        (json.dumps({**EXPORT, "messages": [{**ROW, "timestamp": "now"}]}), "messages[0].timestamp"),
        (json.dumps({**EXPORT, "messages": [{**ROW, "confirmed": 1}]}), "messages[0].confirmed"),
        (json.dumps({**EXPORT, "messages": [ROW, ROW]}), "messages[1]"),
        (json.dumps({**EXPORT, "messages": [{**ROW, "parent": "0" * 32}]}), "messages[0]"),
        (json.dumps({**EXPORT, "chat": {"chat_id": "x", "head": "gone"}}), "chat.head"),
        (json.dumps({**EXPORT, "chat": {"chat_id": "x", "head": []}}), "chat.head"),
        (json.dumps({**EXPORT, "facts": [{"id": "f"}]}), "facts[0]"),
    ],
)
def test_a_file_of_which_nothing_can_be_read_is_refused(shared_server, text, words):
    """The error names the line or the field, and nothing is half imported."""
    before = call(shared_server, "GET", "chats").json()
    raw = text if isinstance(text, bytes) else text.encode()
    answer = call(shared_server, "POST", "import", content=raw, params={"name": "a file.jsonl"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["message"].startswith("a file.jsonl: ") and words in answer.json()["error"]["message"]
    assert call(shared_server, "GET", "chats").json() == before


@pytest.mark.parametrize(
    "row, words",
    [
        ("nonsense", "not valid JSON"),
        ('{"name": "Robin", "is_us', "not valid JSON: Unterminated string at character 19"),
        ("{}", "no text"),
        ("[1, 2]", "a JSON object"),
        ('{"mes": 5}', "no text"),
        ('{"mes": null, "swipes": [5], "swipe_id": 0}', "no text"),
        ('{"mes": "x", "is_user": "perhaps"}', "is_user"),
        ('{"mes": NaN}', "not valid JSON: NaN"),
        ("[" * 100_000, "nested"),
        ('{"mes": "x", "swipe_id": ' + "9" * 4000 + "}", "too long"),
        (b"\xff\xfe", "UTF-8"),
        (b"\0" * 500, "zero bytes"),
    ],
    ids=lambda given: repr(given)[:30],
)
def test_a_bad_row_costs_that_row(shared_server, row, words):
    """The others come in, and the answer names the file, the line and the reason."""
    before, after = "Hello before it.", "And after it."
    rows = [json.dumps(line("Robin", before)).encode(), row if isinstance(row, bytes) else row.encode()]
    raw = b"\n".join([*rows, json.dumps(line("Helena", after)).encode()])
    taken = answered(shared_server, raw, name="a file.jsonl", chat_id=f"bad row {words} {row!r:.50}")
    (left,), (chat,) = taken["passed_over"], taken["chats"]
    assert (left["file"], left["line"]) == ("a file.jsonl", 2)
    assert left["why"].startswith("line 2") and words in left["why"]
    assert branch_texts(shared_server.url, chat["chat_id"])[0] == before and chat["total"] == 2


def test_a_header_that_was_cut_off_makes_no_group(server):
    """Nor does it cost the names, which the messages hold too."""
    rows = written(line("Robin", "Hello."), line("Helena", "Sit."), header={})
    (chat,) = take_in(server, '{"user_name": "unused", "chara\n' + rows)
    assert branch_texts(server.url, chat["chat_id"]) == ["Hello.", "Sit."]
    assert [c["character"] for c in call(server, "GET", "chats").json()] == ["Helena"]


def test_many_bad_rows_are_counted(server):
    """An answer names the first ones."""
    taken = answered(server, written(line("Robin", "Hello.")) + "\noops" * 200)
    assert len(taken["passed_over"]) == 101 and "100 more" in taken["passed_over"][-1]["why"]


def test_odd_types_are_read_where_their_meaning_is_clear(server):
    """Numbers and words for flags, an empty text for none, a null in place of an object, a text inside an object."""
    rows = [
        {"name": "Robin", "is_user": 1, "mes": "One.", "extra": "", "is_system": ""},
        {
            "name": "Helena",
            "is_user": "",
            "mes": {"message": "Two."},
            "swipes": [{"message": "Two."}, {"message": "B"}],
        },
        {"name": 5, "is_user": "true", "mes": "Three.", "swipes": "no", "swipe_info": 7, "extra": []},
        {"is_user": False, "mes": None, "swipes": ["y", "Four."], "swipe_id": "1"},
        {"is_user": None, "mes": "Five.", "swipes": [None, "Five.", 3], "swipe_id": 1.0, "send_date": {}},
    ]
    rows[1] |= {"swipes": [{"message": "Two."}, {"message": "B"}], "swipe_id": 0}
    taken = answered(server, written(*rows))
    assert taken["passed_over"] == []
    kept = export(server, taken["chats"][0]["chat_id"])["messages"]
    assert [m["content"] for m in kept if m["confirmed"]] == ["One.", "Two.", "Three.", "Four.", "Five."]
    assert [m["content"] for m in kept if not m["confirmed"]] == ["B", "y"]
    assert [m["role"][0] for m in kept if m["confirmed"]] == ["u", "a", "u", "a", "a"]


def test_tool_notices_and_thoughts_are_no_messages(server):
    """A model's thoughts are cut out of its replies and swipes; a reply that was nothing else is none."""
    notice = {"tool_invocations": [{"name": "roll", "result": "6"}], "isSmallSys": True}
    sit = "<think>Lie to Robin.</think>\nSit."
    file = written(
        line("Robin", "Hello. <think>is a tag."),
        line("SillyTavern System", "<details>Tool calls</details>", is_system=True, extra=notice),
        line("Helena", sit, swipes=["Stand.", sit], swipe_id=1),
        line("Robin", "What is that?"),
        line("Helena", "<think>I do not know"),
    )
    (chat,) = take_in(server, file)
    kept = [(m["content"], m["confirmed"]) for m in export(server, chat["chat_id"])["messages"]]
    assert kept == [("Hello. <think>is a tag.", True), ("Stand.", False), ("Sit.", True), ("What is that?", True)]


@pytest.mark.parametrize(
    "text, plain",
    [
        ("plain </details> text", "plain </details> text"),
        ("<think>a</think>b", "b"),
        ("a\n</think>\n\nb", "b"),
        ("<reasoning>a<think>b</think>c</reasoning>d", "d"),
        ('<details type="reasoning" done="true">\n<summary>x</summary>\na</details>\nb', "b"),
        ("x <details>kept</details> <think >a</think> y", "x <details>kept</details>  y"),
    ],
)
def test_thoughts_are_cut_out_of_texts(text, plain):
    assert pm.without_thoughts(text) == plain


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ("name", "is_user", "is_system", "mes", "extra", "swipes", "swipe_id", "swipe_info", "send_date", "force_avatar")


@given(st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=10), max_size=4))
def test_odd_lines_are_read_or_refused(rows):
    """Whatever the lines hold, there is a chat or an error in words."""
    try:
        copies, _ = pm.read_chats("\n".join(json.dumps(row) for row in rows).encode())
    except pm.InvalidRequest as error:
        assert str(error)
    else:
        for copy in copies:
            pm.check_tree(copy.messages)
            assert all(m.confirmed for m in copy.path)


# ---------------------------------------------------------------------------- there and back

SAID = st.text(
    "abc\n .:\"'\u00e9\u2028\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), min_size=1
).filter(str.strip)


@st.composite
def trees(draw) -> list[dict]:
    """Messages of a chat, parents first: branches, swipes, names, dates, replies that were cut off."""
    rows: dict[str, pm.Message] = {}
    for _ in range(draw(st.integers(1, 12))):
        parent = draw(st.sampled_from(["", *rows]))
        role, content = draw(st.sampled_from(pm.CHAT_ROLES)), draw(SAID)
        key = pm.message_id(parent, pm.message_digest(role, content))
        voice = draw(st.sampled_from([None, "Borin"])) if content.startswith("Borin: ") else None
        made = pm.Message(
            key, parent, role, content, draw(st.sampled_from([None, "Ann"])),
            draw(st.sampled_from([None, "2024-07-12T21:30:12+02:00", "2024-07-12T21:30:12"])),
            draw(st.floats(1e9, 2e9)), 0, role == "user" or draw(st.booleans()), draw(st.booleans()), None,
            draw(st.booleans()), draw(st.booleans()), voice,
        )  # fmt: skip
        words = draw(st.none() | SAID)
        rows.setdefault(key, pm.with_mark(made, pm.replace(made.mark, content=words)))
    marks = pm.changed_marks({}, list(rows.values()), (), 0.0)  # the same words have the same marks everywhere
    return [pm.with_mark(m, pm.mark_for(marks.get(m.digest, {}), m)) for m in rows.values()]


class Shelf:
    """An engine on an empty data folder, for one example."""

    def __init__(self, folder: Path):
        self.memory = pm.PersonaMemory(pm.Settings(data=str(folder), upstream="http://127.0.0.1:9/v1"))
        self.memory.vectors.later = lambda *_: None  # vectors are no part of an export

    def __enter__(self) -> pm.PersonaMemory:
        return self.memory

    def __exit__(self, *_):
        self.memory.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """New empty folders."""
    return lambda: tmp_path_factory.mktemp("shelf")


def test_what_an_export_says_of_a_summarys_size_is_counted_anew():
    """Somebody may have written other words into the file; a prompt's budget goes by the size."""
    longer = {**SUMMARY, "texts": [TEXT], "text": "They met at the mill. " * 300, "tokens": 4}
    (summary,) = pm.read_export({**EXPORT, "messages": [ROW], "summaries": [longer]}).summaries
    assert summary.tokens == pm.line_tokens(summary) > 1000


@pytest.mark.parametrize("quote", ["", "!"])
def test_a_fact_of_a_file_may_quote_nothing(server, quote):
    """Also where the message that it is of has been changed since."""
    row, facts = {**ROW, "pinned": True}, [{**FACT, "quote": quote}]
    export = {**EXPORT, "chat": {"chat_id": f"no quote {quote}", "head": ROW_ID}, "messages": [row], "facts": facts}
    take_in(server, json.dumps(export))
    about = call(server, "GET", f"chats/no quote {quote}")
    assert (about.status_code, [f["text"] for f in about.json()["facts"]]) == (200, [FACT["text"]] if quote else [])


@effort(max_examples=25)
@given(messages=trees(), data=st.data())
def test_an_export_comes_back_as_it_was(folders, messages, data):
    """Export, import into an empty folder, export: equal, whatever the tree."""
    tip = data.draw(st.sampled_from(["", *(m.id for m in messages)]))
    text = data.draw(st.sampled_from(messages)).digest
    told = {
        "summaries": [{**pm.asdict(pm.new_summary(1, [text], 0, "They met.", 9, "user")), "texts": [text]}],
        "facts": [pm.asdict(pm.Fact("f", "cat", "The cat is Miso.", "Miso", text, 0, 0, True, False))],
    }
    whole = {
        "format": "persona_memory", "version": 2,
        "chat": {"chat_id": "a/b", "explicit": data.draw(st.booleans()), "created": 1.5, "updated": 2.5,
                 "character": "Helena", "shows_history": True, "head": tip},
        "messages": [pm.asdict(m) for m in messages], **told,
    }  # fmt: skip
    with Shelf(folders()) as first, Shelf(folders()) as second:
        first.archive.take_in(json.dumps(whole).encode())
        exported = first.archive.export("a/b")
        second.archive.take_in(json.dumps(exported).encode())
        assert second.archive.export("a/b") == exported
        assert second.archive.take_in(json.dumps(exported).encode())["chats"][0]["added"] == 0
        assert second.archive.export("a/b") == exported
    untouched = [{**m, "tokens": 0} for m in exported["messages"]]
    whole["messages"] = [{**m, "tokens": 0} for m in whole["messages"]]
    assert {**exported, "messages": untouched} == whole


ODD = st.text(max_size=3) | st.sampled_from(["x", "\ud800", "\0", " ", "a/b", None, 1.5, 10**20, True])


@effort(max_examples=40)
@given(data=st.data())
def test_odd_exports_are_taken_in_or_refused(folders, data):
    """One field of an export is something else: there is a chat that can be read and exported, or an error in words."""
    whole = {**EXPORT, "messages": [{**ROW}], "facts": [{**FACT}], "summaries": [{**SUMMARY}]}
    whole["chat"] = {"chat_id": "x", "head": ROW["id"], "created": 1.5, "character": "Helena"}
    part = data.draw(st.sampled_from([whole["chat"], whole["messages"][0], whole["facts"][0], whole["summaries"][0]]))
    names = {**part, "timestamp": None, "at": None, "shown": None, "updated": None}
    part[data.draw(st.sampled_from(sorted(names)))] = data.draw(ODD | VALUES | st.just("0001-01-01T00:00:00"))
    with Shelf(folders()) as memory:
        try:
            (chat,) = memory.archive.take_in(json.dumps(whole).encode())["chats"]
        except pm.InvalidRequest as error:
            assert str(error)
        else:
            assert memory.archive.export(chat["chat_id"])["messages"][0]["id"] == ROW["id"]
            assert memory.archive.export_transcript(chat["chat_id"])
            assert memory.describe(chat["chat_id"])["messages"] == 1


@st.composite
def transcripts(draw) -> str:
    """Chat files: one character or a group, swipes, dates."""
    members = draw(st.sampled_from([["Helena"], ["Helena", "Borin"]]))
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        name = draw(st.sampled_from(["Robin", *members]))
        swipes = draw(st.lists(SAID, min_size=1, max_size=3, unique_by=pm.normalise))
        at = draw(st.integers(0, len(swipes) - 1))
        more = {} if name == "Robin" else {"swipes": swipes, "swipe_id": at}
        rows.append(line(name, swipes[at], send_date="July 12, 2024 9:30pm", **more))
    rows.append(line("Robin", "Good night.", send_date="July 13, 2024 9:30am"))
    group_chat = len(members) > 1 and any(row["name"] != "Robin" for row in rows)
    return written(*rows, header={} if group_chat else None)


@effort(max_examples=25)
@given(text=transcripts())
def test_a_chat_file_comes_back_as_it_was(folders, text):
    """Import, export as a chat file, import elsewhere: the same messages with the same swipes, names and dates."""
    with Shelf(folders()) as first, Shelf(folders()) as second:
        (chat,) = first.archive.take_in(text.encode())["chats"]
        back = first.archive.export_transcript(chat["chat_id"])
        (again,) = second.archive.take_in(back.encode())["chats"]
        assert again == chat

        def kept(memory):
            rows = memory.archive.export(chat["chat_id"])["messages"]
            return [(m["id"], m["confirmed"], m["voice"], m["confirmed"] and m["timestamp"]) for m in rows]

        assert kept(second) == kept(first)
        assert second.archive.export_transcript(chat["chat_id"]) == back


SHAPE = ("is_user", "is_system", "mes", "swipes", "swipe_id")


def test_a_chat_file_looks_as_the_client_writes_it(server):
    """Header, names, dates, swipes with the chosen one: what the client itself would have kept."""
    client = lived(server)
    client.send("Good night.")
    text = chat_file(server, client.answer.chat_id)
    rows = [json.loads(row) for row in text.splitlines()]
    own = [json.loads(row) for row in client.file().splitlines()]
    assert rows[0]["user_name"] == "User" and len(rows) == len(own) - 1  # the last reply has not been shown yet
    for row, expected in zip(rows[1:], own[1:-1], strict=True):
        assert {k: row.get(k) for k in SHAPE} == {k: expected.get(k) for k in SHAPE}


def test_an_export_in_a_format_that_is_none_is_refused(server):
    """And so is one of a chat that is not there."""
    (chat,) = take_in(server, written(line("Robin", "Hello.")))
    assert call(server, "GET", f"chats/{chat['chat_id']}/export", params={"format": "pdf"}).status_code == 400
    assert call(server, "GET", "chats/nobody/export").status_code == 404
