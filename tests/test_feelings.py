"""Feelings in a running chat: what the model is told of them, what the API shows, whose model reads them."""

import httpx
import pytest
from chats import tiny_bert
from fakes import API, LocalServer, branch_texts, get, say, settings, wait_until

import persona_memory as pm

TIMEOUT = 60
PERSONA = {"role": "system", "content": "You are Mira, a lighthouse keeper."}
SAD = "My grandmother died yesterday. I can't stop crying."
GLAD = "I'm so happy, this is the best day of my life! *laughs*"
FLAT = "I put the lamp on the table."


def chat(*lines: str) -> list[dict]:
    """A transcript: the user's lines with the character's between them."""
    turns = [[{"role": "assistant", "content": f"Mira nods, {i} times."}] * bool(i) for i in range(len(lines))]
    users = [{"role": "user", "content": line} for line in lines]
    return [PERSONA, *(m for before, user in zip(turns, users, strict=True) for m in (*before, user))]


def prompt_text(upstream) -> str:
    """All text of the newest prompt."""
    return "\n".join(m["content"] for m in upstream.last["body"]["messages"])


def emotions(running, chat_id: str, **query) -> dict:
    """The emotional history of a chat."""
    return get(running, f"{API}/chats/{chat_id}/emotions", **query)


# ---------------------------------------------------------------------------- guidance


def test_the_model_is_told_how_the_user_feels_and_since_when(server, upstream):
    """One line in front of the newest message, where the message that began it is numbered."""
    say(server.url, chat("We are on the pier.", SAD), chat_id="sad")
    newest = upstream.last["body"]["messages"][-1]["content"]
    assert newest.endswith(SAD)
    assert newest.startswith("[User seems sad since #3")
    assert upstream.last["body"]["messages"][:-1] == chat("We are on the pier.", SAD)[:-1]
    report = get(server, f"{API}/chats/sad")["last_prompt"]
    assert (report["mood"]["label"], report["mood"]["since"]) == ("sadness", 2)
    assert report["tokens"]["memories"] > 0


def test_the_line_stands_in_a_system_message_where_the_client_uses_such(server, upstream):
    """And names the user as the client does."""
    messages = [*chat(FLAT), {"role": "system", "content": "Stay in character."}]
    messages += [{"role": "user", "name": "Ann", "content": SAD}]
    say(server.url, messages, chat_id="system")
    *_, block, newest = upstream.last["body"]["messages"]
    assert block["role"] == "system" and block["content"].startswith("[Ann seems sad since #2")
    assert newest == messages[-1]


def test_narration_is_no_feeling(server, upstream):
    """A line that carries none leaves the prompt as it is."""
    messages = chat("She opens the door and walks in.", FLAT)
    say(server.url, messages)
    assert upstream.last["body"]["messages"] == messages


def test_the_line_can_be_turned_off(upstream, data_dir):
    """The mood is read all the same."""
    with LocalServer(settings(data_dir, upstream.url, no_guidance=True)) as running:
        say(running.url, chat(SAD), chat_id="off")
        assert upstream.last["body"]["messages"] == chat(SAD)
        assert get(running, f"{API}/chats/off")["mood"]["label"] == "sadness"


def test_the_mood_follows_the_branch(server, upstream):
    """An edited line takes its feeling with it; the old branch still has it."""
    say(server.url, chat(SAD, FLAT), chat_id="edited")
    assert "seems sad" in prompt_text(upstream)
    say(server.url, chat("I went to the market.", FLAT), chat_id="edited")
    assert "seems sad" not in prompt_text(upstream)
    assert [m["label"] for m in emotions(server, "edited", label="sadness")["messages"]] == []
    say(server.url, chat(SAD, FLAT), chat_id="edited")
    assert "seems sad" in prompt_text(upstream)


def test_without_vectors_the_words_are_read(upstream, data_dir):
    """An embedder that cannot be loaded costs the turn its recall, not the user's feelings."""
    absent = str(data_dir / "no-such-model")
    with LocalServer(settings(data_dir, upstream.url, embedder=absent)) as running:
        reply = say(running.url, chat(SAD), chat_id="sad")
        assert reply.status == 200
        assert "seems sad" in prompt_text(upstream)


def test_what_messages_feel_is_stored_for_later_turns(server, upstream):
    """Of each message that has a vector, as the turn itself has read it."""
    say(server.url, chat("We are on the pier.", SAD), chat_id="stored")
    feelings = server.server.memory.feelings
    with server.server.memory.registry.borrow("stored") as held:
        hashes = [node.fingerprint for node in held.nodes(held.path())]
        reader = feelings._reader(held)
        wait_until(lambda: held.store.readings(reader, hashes).keys() == set(hashes))
        stored = held.store.readings(reader, hashes)
        assert pm.reading_of(stored[hashes[-1]]) == held.readings[hashes[-1]]
        assert pm.reading_of(stored[hashes[-1]]).label == "sadness"


def test_a_reader_that_fails_costs_the_turn_nothing_else(server, upstream, monkeypatch):
    """The reply comes, the message is kept."""

    def broken(*_):
        raise RuntimeError("a bug in the reader")

    monkeypatch.setattr(pm, "read_emotion", broken)
    reply = say(server.url, chat(SAD), chat_id="broken")
    assert (reply.status, reply.text) == (200, upstream.last["answer"])
    assert upstream.last["body"]["messages"] == chat(SAD)
    assert branch_texts(server.url, "broken") == [SAD]


# ---------------------------------------------------------------------------- the history


@pytest.fixture
def told(server):
    """A chat that was cheerful and turned sad."""
    lines = [GLAD, FLAT, GLAD, SAD, "I miss her so much. *sobs*", "Everything hurts, I feel so empty."]
    say(server.url, chat(*lines), chat_id="told")
    return server


def test_the_emotional_history(told):
    """Every message of the branch with its label, confidence and importance; and the mood with its swings."""
    found = emotions(told, "told")
    assert found["total"] == len(found["messages"]) == 11
    assert [m["index"] for m in found["messages"]] == list(range(11))
    for row in found["messages"]:
        assert row["label"] in pm.EMOTIONS
        assert 0 <= row["confidence"] <= 1 and 0 <= row["importance"] <= 1
        assert row["label"] == max(row["scores"], key=row["scores"].get)
    assert found["mood"]["label"] == "sadness"
    assert found["swings"][-1]["text"] == f"was cheerful, turned sad at message {found['swings'][-1]['since'] + 1}"


def test_the_history_can_be_narrowed(told):
    """By label, by span, and to its strongest moments."""
    joys = emotions(told, "told", label="joy")["messages"]
    assert [m["index"] for m in joys if m["role"] == "user"] == [0, 4]
    assert {m["index"] for m in emotions(told, "told", since=3, until=6)["messages"]} == {3, 4, 5, 6}
    strongest = emotions(told, "told", strongest=3)["messages"]
    values = [m["intensity"] for m in strongest]
    assert len(values) == 3 and values == sorted(values, reverse=True)
    everything = sorted((m["intensity"] for m in emotions(told, "told")["messages"]), reverse=True)
    assert values == everything[:3]


@pytest.mark.parametrize("query", [{"label": "boredom"}, {"since": "x"}, {"until": "-1"}, {"strongest": "many"}])
def test_odd_queries_are_refused(told, query):
    """With the name of what is wrong."""
    answer = httpx.get(f"{told.url}/api/persona_memory/chats/told/emotions", params=query, timeout=TIMEOUT)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(query))


def test_the_history_of_a_chat_that_is_not_there(server):
    """404, in JSON."""
    assert httpx.get(f"{server.url}/api/persona_memory/chats/nobody/emotions", timeout=TIMEOUT).status_code == 404


# ---------------------------------------------------------------------------- recall


def test_the_nudges_break_ties_and_never_bury_a_match():
    """Between equals the same feeling wins; a better match stays better."""

    def score(match: float, **given) -> float:
        return match + sum(pm.tie_breakers(given).values())

    everything = dict.fromkeys(pm.TIE_BREAKERS, 1.0)
    for name in ("emotion", "importance", "recency"):
        assert score(0.7, **{name: 0.9}) > score(0.7, **{name: 0.2}) > score(0.7)
    assert score(1.0) > score(0.7, **everything)
    assert pm.tie_breakers(everything).keys() == pm.TIE_BREAKERS.keys()


# ---------------------------------------------------------------------------- the Extras API


@pytest.mark.parametrize("text, label", [(SAD, "sadness"), (GLAD, "joy"), (FLAT, "neutral"), ("", "neutral")])
def test_classify_as_the_stock_extension_calls_it(server, text, label):
    """All seven labels, best first, scores that sum to 1."""
    answer = httpx.post(f"{server.url}/api/classify", json={"text": text}, timeout=TIMEOUT).json()
    rows = answer["classification"]
    assert rows[0]["label"] == label
    assert {row["label"] for row in rows} == set(pm.EMOTIONS)
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert sum(row["score"] for row in rows) == pytest.approx(1)


def test_the_labels_and_the_module(server):
    """What the extension asks first."""
    assert get(server, "/api/classify/labels") == {"labels": list(pm.EMOTIONS)}
    assert "classify" in get(server, "/api/modules")["modules"]


@pytest.mark.parametrize("body", [{}, {"text": 3}, [], "x"])
def test_classify_refuses_what_is_no_text(server, body):
    """400 in OpenAI's shape."""
    answer = httpx.post(f"{server.url}/api/classify", json=body, timeout=TIMEOUT)
    param = "text" if isinstance(body, dict) else None
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_extras_api_is_there_without_the_proxy(upstream, data_dir):
    """It needs no language model."""
    with LocalServer(pm.Settings(data=str(data_dir), port=0, upstream=upstream.url)) as running:
        answer = httpx.post(f"{running.url}/api/classify", json={"text": SAD}, timeout=TIMEOUT)
        assert answer.json()["classification"][0]["label"] == "sadness"


# ---------------------------------------------------------------------------- a model of the user's own


@pytest.fixture(scope="module")
def own_model(tmp_path_factory) -> str:
    """A text-classification model as transformers saves it: tiny, untrained but for its bias, which says "grief"."""
    import torch

    folder = tmp_path_factory.mktemp("model")
    model = tiny_bert(folder, ("grief", "amusement", "boredom"))
    model.classifier.weight.data.zero_()
    model.classifier.bias.data = torch.tensor([3.0, 0.0, 3.0])
    model.save_pretrained(folder)
    return str(folder)


def test_a_model_of_the_users_own_reads_instead(upstream, data_dir, own_model):
    """Its fine labels count as the basic ones, others are left out; what it read is kept with the chat."""
    with LocalServer(settings(data_dir, upstream.url, emotion_model=own_model)) as running:
        answer = httpx.post(f"{running.url}/api/classify", json={"text": "x"}, timeout=TIMEOUT).json()
        scores = {row["label"]: row["score"] for row in answer["classification"]}
        assert scores["sadness"] == pytest.approx(0.953, abs=0.01)
        assert scores["joy"] == pytest.approx(0.047, abs=0.01)
        say(running.url, chat(GLAD, FLAT), chat_id="own")
        read = lambda: [m["label"] for m in emotions(running, "own")["messages"]]  # noqa: E731
        wait_until(lambda: read() == ["sadness"] * 3, "the messages read by the model")
    with LocalServer(settings(data_dir, upstream.url, emotion_model=own_model)) as running:
        assert [m["label"] for m in emotions(running, "own")["messages"]] == ["sadness"] * 3


def test_a_model_that_is_not_there_leaves_the_built_in_reader(upstream, data_dir):
    """Said in the log; the chat goes on."""
    with LocalServer(settings(data_dir, upstream.url, emotion_model=str(data_dir / "none"))) as running:
        assert say(running.url, chat(SAD), chat_id="sad").status == 200
        assert "seems sad" in prompt_text(upstream)
        answer = httpx.post(f"{running.url}/api/classify", json={"text": SAD}, timeout=TIMEOUT).json()
        assert answer["classification"][0]["label"] == "sadness"


def test_labels_that_mean_nothing_are_refused():
    """A model of another kind is no reader of feelings."""
    with pytest.raises(ValueError, match="none of the labels"):
        pm.grouped_reading([("spam", 0.9), ("ham", 0.1)])
