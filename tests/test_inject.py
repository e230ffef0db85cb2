"""The injection hook: what a client that makes its prompt itself is told to add, and what named requests change."""

import itertools
import json
import re
from urllib.parse import quote

import httpx
import pytest
from chats import open_chat
from fakes import LocalServer, branch_texts, figure, say, settings, wait_until

import persona_memory as pm

INJECT = "/api/persona_memory/inject"
ONE_SERVER = True
TIMEOUT = 60
NUMBERS = itertools.count(1)
ELVEN = "The password of the northern gate is silverthorn, and only Mira's brother Aldo knows it besides us."


@pytest.fixture(scope="module")
def hook(tmp_path_factory, shared_upstream):
    """The program without the proxy: nothing but the memory's own API."""
    data = tmp_path_factory.mktemp("hook") / "data"
    with LocalServer(settings(data, shared_upstream.url, proxy=False, no_guidance=True)) as running:
        yield running


@pytest.fixture
def chat_id() -> str:
    """A chat that no other test uses."""
    return f"st-{next(NUMBERS)}"


def line(role: str, content: str, **more) -> dict:
    """A message as a client shows it."""
    return {"role": role, "name": {"user": "Robin", "assistant": "Mira"}.get(role), "content": content, **more}


def filler(count: int, topic: str = "harbour") -> list[dict]:
    """Exchanges of some 60 tokens each that have nothing to do with the facts asked for."""
    return [
        message
        for i in range(count)
        for message in (
            line("user", f"Walk {i}: we went along the {topic} again and counted {i + 3} grey gulls on the wall."),
            line("assistant", f"*Mira nods at walk {i}.* The {topic} is quiet today, and the tide takes its own time."),
        )
    ]


ASKED = line("user", "What is the password of the northern gate?")
LONG = [line("user", ELVEN), line("assistant", "Then I will guard it well."), *filler(60), ASKED]


def inject(server, chat_id: str, messages: list[dict], **more) -> dict:
    """The hook's answer to a chat that is shown whole."""
    body = {"chat_id": chat_id, "messages": messages, "complete": True, **more}
    answer = httpx.post(server.url + INJECT, content=json.dumps(body), timeout=TIMEOUT)
    assert answer.status_code == 200, answer.text
    return answer.json()


def embed(server, chat_id: str):
    """See to it that all vectors of a chat's branch are there; a search waits for them."""
    address = f"{server.url}/api/persona_memory/chats/{quote(chat_id)}/search"
    assert httpx.get(address, params={"q": "gate"}, timeout=TIMEOUT).status_code == 200


def recalled(answer: dict) -> list[str]:
    """The texts that were recalled."""
    return [memory["content"] for memory in answer["recalled"]]


def texts(answer: dict) -> str:
    """All that is to be added to the prompt."""
    return "\n".join(row["text"] for row in answer["injections"])


# ---------------------------------------------------------------------------- what is told


def test_what_the_prompt_no_longer_shows_is_recalled(hook, chat_id):
    inject(hook, chat_id, LONG)
    embed(hook, chat_id)
    answer = inject(hook, chat_id, LONG, context_tokens=2000, character="Mira", persona="Mira keeps the light.")
    assert answer["chat_id"] == chat_id
    assert ELVEN in recalled(answer)
    (memories,) = [row for row in answer["injections"] if ELVEN in row["text"]]
    assert {k: memories[k] for k in ("position", "depth", "role")} == {"position": 1, "depth": 1, "role": "system"}
    assert "Robin: " + ELVEN in memories["text"]
    assert answer["report"]["history"] + answer["report"]["hidden"] == len(LONG)
    assert answer["report"]["degraded"] == ""


def test_what_the_prompt_shows_is_not_repeated(hook, chat_id):
    answer = inject(hook, chat_id, LONG, context_tokens=30_000)
    assert (answer["recalled"], answer["injections"]) == ([], [])
    assert answer["report"]["history"] == len(LONG)


@pytest.mark.parametrize("window", [1000, 1500, 3000, 6000, 7500])
def test_no_memory_stands_inside_the_window_that_is_left(hook, chat_id, window):
    """Whatever the window, the newest messages that fit beside the injections are not among them."""
    words = ["silverthorn", "moonpetal", "kestrel", "anvil", "saltmarsh", "ember", "walnut", "lantern", "otter", "reed"]
    facts = [line("user", f"For one more gate the password is {word}, Aldo told us.") for word in words]
    shown = [m for i, fact in enumerate(facts) for m in (fact, *filler(6, f"bank of river {i}"))]
    inject(hook, chat_id, [*shown, ASKED])
    embed(hook, chat_id)
    answer = inject(hook, chat_id, [*shown, ASKED], context_tokens=window)
    sizes = [4 + len(m["content"]) // 3 + 6 for m in shown]  # more than any counting makes of them
    left = window - sum(4 + len(row["text"]) // 2 for row in answer["injections"])
    first = len(shown)
    while first and sizes[first - 1] <= left:
        first, left = first - 1, left - sizes[first - 1]
    assert all(memory["index"] < first for memory in answer["recalled"])
    assert answer["recalled"] or first == 0


def test_hidden_messages_are_memory_and_not_in_the_prompt(hook, chat_id):
    hidden = [line("user", ELVEN, hidden=True), line("assistant", "Then I will guard it well.", hidden=True)]
    answer = inject(hook, chat_id, [*filler(2), *hidden, *filler(2, "market"), ASKED], context_tokens=8000)
    assert ELVEN in recalled(answer)
    assert answer["report"]["hidden"] == 2
    assert all("gulls" not in text for text in recalled(answer))


def test_a_chat_shown_in_part_goes_on(hook, chat_id):
    inject(hook, chat_id, LONG[:-1])
    answer = inject(hook, chat_id, [*LONG[-7:-1], ASKED], complete=False)
    assert ELVEN in recalled(answer)
    assert branch_texts(hook.url, chat_id) == [m["content"] for m in LONG]


def test_depth_counts_what_stands_behind_the_newest_user_message(hook, chat_id):
    answer = inject(hook, chat_id, [*LONG, line("assistant", "Let me think ...")], context_tokens=2000)
    assert [row["depth"] for row in answer["injections"]] == [2]


def test_narration_is_no_part_of_the_chat_but_takes_its_place(hook, chat_id):
    narrated = [*LONG[:2], {"role": "system", "content": "Night falls over the marsh."}, *LONG[2:]]
    answer = inject(hook, chat_id, narrated, context_tokens=2000)
    assert ELVEN in recalled(answer)
    assert branch_texts(hook.url, chat_id) == [m["content"] for m in LONG]


def test_dates_and_names_are_kept(hook, chat_id):
    shown = [message | {"timestamp": "2026-03-01T20:15:00+01:00"} for message in LONG]
    answer = inject(hook, chat_id, shown, context_tokens=2000)
    assert "2026-03-01 Robin: " + ELVEN in texts(answer)
    chat = httpx.get(f"{hook.url}/api/persona_memory/chats/{chat_id}", timeout=TIMEOUT).json()
    assert (chat["character"], chat["messages"]) == ("Mira", len(LONG))


def test_a_sad_user_is_told_of_in_one_line(tmp_path, shared_upstream):
    sad = line("user", "*sobs* My dog died this morning and I can't stop crying. I feel so empty and alone.")
    with LocalServer(settings(tmp_path / "data", shared_upstream.url, proxy=False)) as running:
        answer = inject(running, "sad", [line("assistant", "What is it?"), sad], context_tokens=4000)
    assert answer["emotion"]["label"] == "sadness"
    assert "Robin seems sad" in texts(answer)


def test_the_story_so_far_stands_behind_the_main_prompt(tmp_path, shared_upstream):
    """Without the proxy it is told in the messages' own sentences, and no model is asked."""
    shared_upstream.reset()
    given = settings(tmp_path / "data", shared_upstream.url, proxy=False, no_guidance=True, summary_every=10)
    with LocalServer(given) as running:
        inject(running, "told", LONG, context_tokens=2000)
        due, store = running.server.memory.registry.catalogue.due, open_chat(running, "told").store
        wait_until(lambda: store.summaries and not due(), "the story of what has left")
        first, second = (inject(running, "told", LONG, context_tokens=2000) for _ in range(2))
    (story,) = [row for row in first["injections"] if row["position"] == 0]
    assert story["role"] == "system"
    assert "(#1-" in story["text"]
    assert first["report"]["summaries"] > 0
    assert story in second["injections"]
    last = max(int(end) for end in re.findall(r"^\(#\d+-(\d+)\)", story["text"], re.MULTILINE))
    assert last <= first["report"]["hidden"]
    assert shared_upstream.requests == []


# ---------------------------------------------------------------------------- branches


def test_an_edit_moves_the_branch(hook, chat_id):
    edited = ELVEN.replace("silverthorn", "moonpetal")
    inject(hook, chat_id, LONG, context_tokens=2000)
    answer = inject(hook, chat_id, [line("user", edited), *LONG[1:]], context_tokens=2000)
    assert edited in recalled(answer)
    assert "silverthorn" not in texts(answer)
    assert ELVEN in recalled(inject(hook, chat_id, LONG, context_tokens=2000))


def test_a_deletion_in_front_moves_the_branch(hook, chat_id):
    """The whole chat is shown, so what is missing in front was deleted, not merely left out."""
    inject(hook, chat_id, LONG, context_tokens=2000)
    answer = inject(hook, chat_id, LONG[2:], context_tokens=2000)
    assert "silverthorn" not in texts(answer)
    assert branch_texts(hook.url, chat_id) == [m["content"] for m in LONG[2:]]


def test_a_rejected_swipe_is_not_recalled(hook, chat_id):
    rejected = line("assistant", "The password of the northern gate is nightshade, says Mira.")
    inject(hook, chat_id, [*LONG[:1], rejected, *filler(1)])
    answer = inject(hook, chat_id, LONG, context_tokens=2000)
    assert ELVEN in recalled(answer)
    assert "nightshade" not in texts(answer)


def test_other_chats_are_not_recalled(hook, chat_id):
    inject(hook, f"{chat_id}-other", LONG)
    answer = inject(hook, chat_id, [*filler(60), ASKED], context_tokens=2000)
    assert "silverthorn" not in texts(answer)


def test_a_branch_adopts_what_its_parent_knows(hook, chat_id):
    """Vectors are copied, not computed again, and the parent stays as it was."""
    inject(hook, chat_id, LONG)
    child = [*LONG[:80], ASKED]
    answer = inject(hook, f"{chat_id}-child", child, context_tokens=1500, parent_chat_id=chat_id)
    assert ELVEN in recalled(answer)
    assert branch_texts(hook.url, f"{chat_id}-child") == [m["content"] for m in child]
    assert branch_texts(hook.url, chat_id) == [m["content"] for m in LONG]


def test_a_branch_does_not_carry_over_what_its_parent_did_later(hook, chat_id):
    character = f"{chat_id} Mira"
    later = [line("user", "The password of the northern gate is nightshade now."), line("assistant", "So be it.")]
    inject(hook, chat_id, [*filler(2), *later], character=character)
    inject(hook, f"{chat_id}-other", [*LONG[:2], *filler(2)], character=character)
    url = f"{hook.url}/api/persona_memory/characters/{quote(character)}"
    httpx.patch(url, json={"carry_over": True}, timeout=TIMEOUT).raise_for_status()
    branch = {"character": character, "parent_chat_id": chat_id}
    answer = inject(hook, f"{chat_id}-child", [*filler(2), ASKED], **branch)
    assert ELVEN in recalled(answer)
    assert "nightshade" not in texts(answer)


def test_a_member_of_a_group_recalls_what_any_member_heard(hook, chat_id):
    group = [
        {"role": "user", "name": "Robin", "content": ELVEN},
        {"role": "assistant", "name": "Borin", "content": "My forge in Emberhold has the spare key to the gate."},
        *filler(60),
        {"role": "user", "name": "Robin", "content": "Who has the spare key to the gate?"},
        {"role": "assistant", "name": "Borin", "content": "I shall let Mira answer that."},
    ]
    answer = inject(hook, chat_id, group, context_tokens=2000, character="Mira")
    assert "Borin: My forge in Emberhold has the spare key" in texts(answer)
    assert [row["depth"] for row in answer["injections"]] == [2]


# ---------------------------------------------------------------------------- bad input, failures

REFUSED = {
    "no object": [],
    "no chat": {"messages": [ASKED]},
    "blank chat": {"chat_id": " ", "messages": [ASKED]},
    "chat number": {"chat_id": 7, "messages": [ASKED]},
    "no messages": {"chat_id": "x"},
    "empty messages": {"chat_id": "x", "messages": []},
    "role missing": {"chat_id": "x", "messages": [{"content": "hello"}]},
    "content number": {"chat_id": "x", "messages": [line("user", 7)]},
    "name number": {"chat_id": "x", "messages": [{"role": "user", "name": 7, "content": "hello"}]},
    "hidden text": {"chat_id": "x", "messages": [line("user", "hello", hidden="no")]},
    "no date": {"chat_id": "x", "messages": [line("user", "hello", timestamp="yesterday")]},
    "window text": {"chat_id": "x", "messages": [ASKED], "context_tokens": "2000"},
    "window negative": {"chat_id": "x", "messages": [ASKED], "context_tokens": -1},
    "persona list": {"chat_id": "x", "messages": [ASKED], "persona": ["Mira"]},
    "complete text": {"chat_id": "x", "messages": [ASKED], "complete": "yes"},
    "parent number": {"chat_id": "x", "messages": [ASKED], "parent_chat_id": 1},
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED.keys())
def test_what_makes_no_sense_is_refused_with_a_name(hook, body):
    answer = httpx.post(hook.url + INJECT, json=body, timeout=TIMEOUT)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{hook.url}/api/persona_memory/chats/x", timeout=TIMEOUT).status_code == 404


ODD = {
    "only narration": [{"role": "system", "content": "Night falls."}],
    "nothing said": [line("user", " ")],
    "all hidden": [line("user", ELVEN, hidden=True), line("assistant", "Yes.", hidden=True)],
    "only a reply": [line("assistant", "You must be Robin.")],
    "no names": [{"role": "user", "content": "hello"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    "lone surrogate": [line("user", "\ud83d hello")],
    "a long one": [line("user", "word " * 20_000)],
}


@pytest.mark.parametrize("messages", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("window", [1, 500, 10_000_000])
def test_odd_chats_get_an_answer(hook, chat_id, messages, window):
    answer = inject(hook, chat_id, messages, context_tokens=window, persona="Mira. " * 300)
    assert set(answer) == {"chat_id", "injections", "recalled", "emotion", "report"}
    assert answer["report"]["degraded"] == ""


def test_a_persona_longer_than_the_window_is_the_clients_matter(hook, chat_id):
    answer = inject(hook, chat_id, LONG, context_tokens=1000, persona="Mira keeps the light. " * 1000)
    assert answer["report"]["degraded"] == ""


def test_a_store_that_cannot_be_used_costs_the_memories_only(tmp_path, shared_upstream):
    (tmp_path / "data").write_text("a file in the folder's place")
    with LocalServer(settings(tmp_path / "data", shared_upstream.url, proxy=False)) as running:
        answer = inject(running, "lost", LONG, context_tokens=2000)
    assert answer["injections"] == []
    assert answer["report"]["degraded"]


# ---------------------------------------------------------------------------- pages of other origins


def test_a_page_of_this_machine_may_ask(hook):
    asked = {
        "Origin": "http://127.0.0.1:8000",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = httpx.options(hook.url + INJECT, headers=asked, timeout=TIMEOUT)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == "http://127.0.0.1:8000"
    allowed = answer.headers["Access-Control-Allow-Headers"].lower()
    assert {"authorization", "content-type"} <= {name.strip() for name in allowed.split(",")}
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]


def test_the_key_is_asked_for(tmp_path, shared_upstream):
    body = {"chat_id": "locked", "messages": [ASKED]}
    with LocalServer(settings(tmp_path / "data", shared_upstream.url, proxy=False, api_key="sesame-7")) as running:
        refused = httpx.post(running.url + INJECT, json=body, timeout=TIMEOUT)
        taken = httpx.post(running.url + INJECT, json=body, headers={"Authorization": "Bearer sesame-7"}, timeout=60)
    assert (refused.status_code, taken.status_code) == (401, 200)


# ---------------------------------------------------------------------------- named requests through the proxy

CARD = {"role": "system", "content": "You are Mira, keeper of the light."}


def plain(messages: list[dict]) -> list[dict]:
    """Messages as chat completions have them."""
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def spoken(server, messages: list[dict], max_tokens: int = 300, **named):
    """One turn of a client that says which chat it is."""
    return say(server.url, [CARD, *plain(messages)], persona_memory=named, max_tokens=max_tokens)


def test_the_upstream_sees_nothing_of_the_identity(shared_server, upstream, chat_id):
    reply = spoken(shared_server, [ASKED], chat_id=chat_id, character="Mira", kind="normal")
    assert reply.chat_id == chat_id
    assert "persona_memory" not in upstream.last["body"]
    assert [row["character"] for row in chats(shared_server) if row["chat_id"] == chat_id] == ["Mira"]


def test_a_request_that_passes_by_memory_leaves_its_identity_behind(shared_server, upstream, chat_id):
    body = {"model": "m", "messages": [ASKED], "persona_memory": {"chat_id": chat_id}, "top_k": 40}
    off = {"X-Persona-Memory": "off"}
    answer = httpx.post(f"{shared_server.url}/v1/chat/completions", json=body, headers=off, timeout=TIMEOUT)
    assert answer.headers["X-Persona-Memory"] == "off"
    assert upstream.last["body"] == {"model": "m", "messages": [ASKED], "top_k": 40}


def chats(server) -> list[dict]:
    """The list of chats."""
    return httpx.get(f"{server.url}/api/persona_memory/chats", timeout=TIMEOUT).json()


def stored(server, chat_id: str) -> int:
    """How many messages a chat's tree holds, shown or not."""
    return httpx.get(f"{server.url}/api/persona_memory/chats/{quote(chat_id)}", timeout=TIMEOUT).json()["stored"]


@pytest.mark.parametrize(("kind", "kept"), [("normal", 1), ("swipe", 1), ("regenerate", 1), ("something new", 1),
                                           ("quiet", 0), ("impersonate", 0), ("continue", 0)])  # fmt: skip
def test_replies_that_the_chat_will_not_show_are_not_kept(shared_server, upstream, chat_id, kind, kept):
    opening = [line("user", "I lost my compass."), line("assistant", "Then steer by the stars.")]
    spoken(shared_server, [*opening, ASKED], chat_id=chat_id, kind="normal")
    before = stored(shared_server, chat_id)
    spoken(shared_server, [*opening, ASKED], chat_id=chat_id, kind=kind)
    assert stored(shared_server, chat_id) == before + kept


def test_a_raw_prompt_under_the_chats_name_changes_nothing(shared_server, upstream, chat_id):
    """Extensions send words of their own; those are no message of the chat, not even of a chat that is new."""
    raw = [line("user", "Summarise in five words: the gate is shut.")]
    spoken(shared_server, raw, chat_id=f"{chat_id}-new", kind="quiet")
    assert f"{chat_id}-new" not in {row["chat_id"] for row in chats(shared_server)}
    spoken(shared_server, LONG[:5], chat_id=chat_id, kind="normal")
    spoken(shared_server, raw, chat_id=chat_id, kind="quiet")
    assert branch_texts(shared_server.url, chat_id) == [m["content"] for m in LONG[:5]]
    assert upstream.last["body"]["messages"] == [CARD, *plain(raw)]


def test_the_first_message_of_a_named_chat_is_not_appended_to_another_one(shared_server, upstream, chat_id):
    """A client that names its chat shows it, so one lone message is the whole chat."""
    spoken(shared_server, [line("user", "Good morning.")], chat_id=chat_id)
    spoken(shared_server, [line("user", "Good evening.")], chat_id=chat_id)
    assert branch_texts(shared_server.url, chat_id) == ["Good evening."]


def test_a_checkpoint_adopts_its_parents_branch_through_the_proxy(shared_server, upstream, chat_id):
    spoken(shared_server, LONG, chat_id=chat_id)
    embed(shared_server, chat_id)
    memory = shared_server.server.memory
    encoded, encode = [], memory.embedder.encode
    memory.embedder.encode = lambda texts, *a, **k: encoded.extend(texts) or encode(texts, *a, **k)
    try:
        spoken(shared_server, [*LONG[90:100], ASKED], chat_id=f"{chat_id}-child", parent_chat_id=chat_id)
    finally:
        memory.embedder.encode = encode
    assert branch_texts(shared_server.url, f"{chat_id}-child") == [m["content"] for m in [*LONG[:100], ASKED]]
    assert not [text for text in encoded if "gulls" in text]


def test_a_group_through_the_proxy_recalls_what_any_member_said(shared_server, upstream, chat_id):
    """Without names, who spoke is what the messages begin with."""
    told = line("assistant", "Borin: The spare key to the gate lies under the anvil in my forge.")
    chat = [line("user", "Robin: Where is the spare key, Borin?"), told, *filler(40)]
    asked = line("user", "Robin: Mira, do you remember where the spare key to the gate lies?")
    spoken(shared_server, chat, chat_id=chat_id)
    embed(shared_server, chat_id)
    with shared_server.context(1500):
        spoken(shared_server, [*chat, asked], chat_id=chat_id, character="Mira", max_tokens=200)
    block = next(m["content"] for m in upstream.last["body"]["messages"] if "Earlier in this chat" in m["content"])
    assert told["content"] in block


@pytest.mark.parametrize("given", ["a string", 7, ["x"], {"chat_id": 7}, {"kind": ["quiet"]}])
def test_an_identity_that_makes_no_sense_is_refused(shared_server, upstream, given):
    reply = say(shared_server.url, [CARD, ASKED], persona_memory=given)
    assert reply.status == 400
    assert upstream.chats == []


def test_both_ways_are_one_memory(shared_server, upstream, chat_id):
    """A chat that was injected into goes on through the proxy, and back."""
    inject(shared_server, chat_id, plain(LONG[:-1]))
    reply = spoken(shared_server, LONG[-9:], chat_id=chat_id)
    assert reply.chat_id == chat_id
    assert ELVEN in str(upstream.last["body"]["messages"])
    assert branch_texts(shared_server.url, chat_id) == [m["content"] for m in LONG]
    assert figure(shared_server, "recalled_messages_count") >= 2


# ---------------------------------------------------------------------------- the whole chat


def sync(server, chat_id: str, messages: list[dict], status: int = 200) -> dict:
    """The whole chat as a client shows it."""
    address = f"{server.url}/api/persona_memory/chats/{quote(chat_id)}/sync"
    answer = httpx.post(address, json={"messages": messages}, timeout=TIMEOUT)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_a_chat_that_is_read_in_is_known_as_it_stands(shared_server, upstream, chat_id):
    """From the first window on that a request shows; an edit, a deletion and a swipe above it count."""
    answer = sync(shared_server, chat_id, LONG)
    assert (answer["chat_id"], answer["messages"]) == (chat_id, len(LONG))
    assert branch_texts(shared_server.url, chat_id) == [m["content"] for m in LONG]
    changed = [*LONG[:3], *LONG[5:50], {**LONG[50], "content": "Other words."}, *LONG[51:]]
    again = sync(shared_server, chat_id, changed)
    assert branch_texts(shared_server.url, chat_id) == [m["content"] for m in changed]
    assert again["last"] != answer["last"]
    spoken(shared_server, [*changed[-20:], ASKED], chat_id=chat_id)
    assert branch_texts(shared_server.url, chat_id) == [m["content"] for m in [*changed, ASKED]]


def test_reading_in_the_same_chat_again_writes_nothing(shared_server, chat_id):
    """Its last message's id stands for all of it."""
    first = sync(shared_server, chat_id, LONG[:30])
    address = f"{shared_server.url}/api/persona_memory/chats/{quote(chat_id)}"
    before = httpx.get(address, timeout=TIMEOUT).json()
    assert sync(shared_server, chat_id, LONG[:30])["last"] == first["last"]
    after = httpx.get(address, timeout=TIMEOUT).json()
    assert (after["changes"], after["stored"], after["branches"]) == (before["changes"], 30, 1)
    tip = httpx.get(f"{address}/messages", params={"tip": first["last"], "limit": 0}, timeout=TIMEOUT)
    assert (tip.status_code, tip.json()["total"]) == (200, 30)


@pytest.mark.parametrize("messages", [[], [{"role": "system", "content": "x"}], "x", [{"role": "user", "content": 5}]])
def test_what_is_no_chat_is_not_read_in(shared_server, chat_id, messages):
    """400, and no chat is made."""
    assert sync(shared_server, chat_id, messages, status=400)["error"]["message"]
    assert (
        httpx.get(f"{shared_server.url}/api/persona_memory/chats/{quote(chat_id)}", timeout=TIMEOUT).status_code == 404
    )


def known(server, chat_id: str, messages: list[dict]) -> tuple[int, int, bool]:
    """Of how many messages how many are known, and whether they are the chat as it stands."""
    address = f"{server.url}/api/persona_memory/chats/{quote(chat_id)}/known"
    answer = httpx.post(address, json={"messages": messages}, timeout=TIMEOUT).raise_for_status().json()
    return answer["messages"], answer["known"], answer["current"]


def test_how_much_of_a_chat_is_known_is_told_and_nothing_is_written(shared_server, chat_id):
    shown = LONG[:10]
    assert known(shared_server, chat_id, shown) == (10, 0, False)
    assert httpx.get(f"{shared_server.url}/api/persona_memory/chats/{chat_id}", timeout=TIMEOUT).status_code == 404
    inject(shared_server, chat_id, shown[:4])
    assert known(shared_server, chat_id, shown) == (10, 4, False)
    assert branch_texts(shared_server.url, chat_id) == [m["content"] for m in shown[:4]]
    inject(shared_server, chat_id, shown)
    assert known(shared_server, chat_id, shown) == (10, 10, True)
    assert known(shared_server, chat_id, shown[:6]) == (6, 6, False), "deleted at the end"
    assert known(shared_server, chat_id, [*shown[:9], {**shown[9], "hidden": True}]) == (10, 10, False)
    assert known(shared_server, chat_id, [line("user", "Changed."), *shown[1:]]) == (10, 0, False)


def test_thoughts_in_a_shown_message_make_it_no_unknown_one(shared_server, chat_id):
    """The server keeps only what was said."""
    shown = [LONG[0], line("assistant", "<think>He trusts me.</think>Then I will guard it well."), *LONG[2:6]]
    inject(shared_server, chat_id, shown)
    assert known(shared_server, chat_id, shown) == (6, 6, True)


NOTE = "Mira has a scar on her left hand."


def test_a_users_note_is_in_every_prompt(hook, chat_id):
    """From the first one on, also in a branch, after an export and an import; until it is forgotten."""
    api = f"{hook.url}/api/persona_memory"
    assert httpx.post(f"{api}/chats/{chat_id}/facts", json={"text": NOTE}, timeout=TIMEOUT).status_code == 404
    inject(hook, chat_id, LONG[:2])
    note = httpx.post(f"{api}/chats/{chat_id}/facts", json={"text": f" {NOTE} "}, timeout=TIMEOUT).json()
    other = httpx.post(f"{api}/chats/{chat_id}/facts", json={"text": "He fears bells."}, timeout=TIMEOUT).json()
    for shown in (LONG[:3], [line("user", "Another beginning."), *LONG[:3]]):
        told = texts(inject(hook, chat_id, shown))
        assert told.count(NOTE) == 1 and "He fears bells." in told and "#0" not in told
    answer = inject(hook, chat_id, LONG, context_tokens=1500)
    assert NOTE in texts(answer) and [m["content"] for m in answer["recalled"]][:1] == [ELVEN], (
        "recall goes on beside it"
    )
    assert NOTE in texts(inject(hook, f"{chat_id}-branch", LONG[:3], parent_chat_id=chat_id))
    exported = httpx.get(f"{api}/chats/{chat_id}/export", timeout=TIMEOUT).content
    taken = httpx.post(f"{api}/import", params={"chat_id": f"{chat_id}-copy"}, content=exported, timeout=TIMEOUT)
    assert taken.status_code == 200, taken.text
    assert NOTE in texts(inject(hook, f"{chat_id}-copy", LONG[:3]))
    assert httpx.delete(f"{api}/chats/{chat_id}/facts/{note['id']}", timeout=TIMEOUT).status_code == 200
    told = texts(inject(hook, chat_id, LONG[:5]))
    assert NOTE not in told and other["text"] in told
    assert httpx.post(f"{api}/chats/{chat_id}/facts", json={"text": " "}, timeout=TIMEOUT).status_code == 400


# ---------------------------------------------------------------------------- one chat, however it is sent


def prompt_of(shown: list[dict], processing: str, names: bool | str, members: tuple[str, ...] = ()) -> list[dict]:
    """A chat as SillyTavern sends it with one of its "prompt post-processings", with or without names in the texts; in
    groups these are the members' by default, and with names "in content" the user's too."""
    start = f"[Start a new group chat. Group members: {', '.join(members)}]" if members else "[Start a new Chat]"
    prompt = [CARD, {"role": "system", "content": start}]
    named = [m["name"] for m in shown if names and (m["role"] == "assistant" or not members or names == "all")]
    prompt += [
        {"role": m["role"], "content": f"{m['name']}: {m['content']}" if m["name"] in named else m["content"]}
        for m in shown
    ]
    if processing == "strict":
        prompt.insert(2, {"role": "user", "content": "Let's get started."})
    if processing in ("none", "single"):
        joined = [{"role": "user", "content": "\n\n".join(m["content"] for m in prompt)}]
        return joined if processing == "single" else prompt
    merged: list[dict] = []
    for m in prompt:
        m = {**m, "role": "user"} if m["role"] == "system" and merged and merged[-1]["role"] != "system" else m
        if merged and merged[-1]["role"] == m["role"]:
            merged[-1] = {**m, "content": f"{merged[-1]['content']}\n\n{m['content']}"}
        else:
            merged.append(m)
    return merged


def holds(server, chat_id: str, shown: list[dict]) -> bool:
    """Whether a chat's branch is what is shown: names are no words, wherever they stand, and none is a wrong one."""
    address = f"{server.url}/api/persona_memory/chats/{chat_id}/messages"
    rows = httpx.get(address, timeout=TIMEOUT).json()["messages"]
    texts = [row["content"] for row in rows]
    named = all(row["name"] in (None, m["name"]) for row, m in zip(rows, shown, strict=False))
    return named and texts == [m["content"] for m in shown]


STYLES = [(p, n) for p in ("none", "merge", "semi", "strict", "single") for n in (False, True) if p != "single" or n]


def test_switching_the_post_processing_leaves_one_branch(shared_server, upstream, chat_id):
    """A chat that the extension has had read in, with a turn that was stopped: two user messages in a row."""
    shown = [*LONG[:20], line("user", "I was stopped here."), *LONG[20:30], line("user", "Is it late?")]
    sync(shared_server, chat_id, shown)
    for turn, (processing, names) in enumerate([*STYLES, *STYLES[::-1]]):
        shown = [*shown, line("assistant", f"Reply {turn}, she says."), line("user", f"Question {turn}, he asks?")]
        reply = say(
            shared_server.url,
            prompt_of(shown[-16:], processing, names),
            persona_memory={"chat_id": chat_id, "character": "Mira", "kind": "normal"},
        )
        assert reply.status == 200
        assert holds(shared_server, chat_id, shown), (processing, names)
    address = f"{shared_server.url}/api/persona_memory/chats/{chat_id}"
    described = httpx.get(address, timeout=TIMEOUT).json()
    assert (described["branches"], described["branch_length"]) == (1, len(shown))
    first = httpx.get(f"{address}/messages", params={"limit": 1}, timeout=TIMEOUT).json()["messages"][0]
    assert first["name"] == "Robin", "who speaks is known from the extension, though no request has said it"


@pytest.mark.parametrize("names", [True, "all"])
@pytest.mark.parametrize("begins", ["hook", "proxy"])
def test_a_group_is_one_branch_through_the_proxy_and_the_hook(shared_server, upstream, chat_id, names, begins):
    """Names stand in front of the texts in the one, and beside them in the other."""
    members = ("Mira", "Borin")
    shown = [line("user", "Borin, where is the spare key?")]
    for turn in range(12):
        name = members[turn % 2]
        shown += [{**line("assistant", f"Line {turn} about the harbour and the key."), "name": name}]
        if turn % 3 == 0:
            shown += [line("user", f"Walk {turn} with both of you.")]
        if (turn % 4 < 2) == (begins == "hook"):
            answer = inject(shared_server, chat_id, shown, character=name, group="The crew")
            assert answer["report"]["degraded"] == "" or "embedder" in answer["report"]["degraded"]
        else:
            say(
                shared_server.url,
                prompt_of(shown, "merge" if turn % 4 == 2 else "none", names, members),
                persona_memory={"chat_id": chat_id, "character": name, "group": "The crew", "kind": "normal"},
            )
        assert holds(shared_server, chat_id, shown), turn
    described = httpx.get(f"{shared_server.url}/api/persona_memory/chats/{chat_id}", timeout=TIMEOUT).json()
    assert (described["branches"], described["branch_length"]) == (1, len(shown))


def test_names_in_the_texts_may_be_known_later(shared_server, upstream, chat_id):
    """Of a chat that begins with one text in a group nobody can tell; its extension, or the next texts, do."""
    shown = [line("user", "Where is the spare key?")]
    say(shared_server.url, prompt_of(shown, "none", "all", ("Mira", "Borin")), chat_id=chat_id)
    address = f"{shared_server.url}/api/persona_memory/chats/{chat_id}/messages"
    (row,) = httpx.get(address, timeout=TIMEOUT).json()["messages"]
    assert row["content"] == "Robin: Where is the spare key?"
    sync(shared_server, chat_id, shown)
    assert holds(shared_server, chat_id, shown)
    shown += [line("assistant", "Under the anvil."), line("user", "Note: it rains.")]
    say(shared_server.url, prompt_of(shown, "none", "all", ("Mira", "Borin")), chat_id=chat_id)
    assert holds(shared_server, chat_id, shown)
    told = f"{chat_id}-told"
    prompt = prompt_of(shown[:1], "none", "all", ("Mira", "Borin"))
    say(shared_server.url, prompt, persona_memory={"chat_id": told, "character": "Mira", "user": "Robin"})
    assert holds(shared_server, told, shown[:1])
    later = f"{chat_id}-later"
    for count in (1, 3):
        say(shared_server.url, prompt_of(shown[:count], "none", "all", ("Mira", "Borin")), chat_id=later)
    assert holds(shared_server, later, shown)


def voices(*texts: str, prompt: str = "", **body) -> list[str | None]:
    """Who speaks in texts of the user and the character by turns, as a request alone tells."""
    messages = [{"role": "system", "content": prompt}] if prompt else []
    messages += [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]
    return [turn.voice for turn in pm.parse_request({"messages": messages, **body}).turns]


GROUP = "[Start a new group chat. Group members: Mira, Borin]"


@pytest.mark.parametrize(
    ("texts", "more", "expected"),
    [
        (("Robin: Hi.", "Mira: Hm.", "Robin: Go."), {"prompt": GROUP}, ["Robin", "Mira", "Robin"]),
        (("Robin: Hi.", "Mira: Hm.", "Alex: Go.", "Mira: So.", "Robin: Go."), {"prompt": GROUP},
         ["Robin", "Mira", "Alex", "Mira", "Robin"]),  # another persona
        (("Robin: Hi.",), {"prompt": GROUP, "stop": ["\nRobin:"]}, ["Robin"]),
        (("Robin: Hi.",), {"prompt": GROUP, "persona_memory": {"user": "Robin"}}, ["Robin"]),
        (("Robin: Hi.", "Mira: Hm.", "no name", "Borin: Ho."), {"prompt": GROUP, "stop": "Robin:"},
         ["Robin", "Mira", None, "Borin"]),
        (("Ann: Hi.", "Hello all.", "Bob: Hi.", "Yes.", "Ann: Who is it?"), {"prompt": "Be kind to all here."},
         ["Ann", None, "Bob", None, "Ann"]),
        (("Robin: Note: it rains.", "Mira: Hm."), {"prompt": "You are Mira. Robin is late."}, ["Robin", "Mira"]),
        # What names nobody.
        (("Note: it rains.", "Hm.", "Note: it pours.", "So?"), {}, [None] * 4),
        (("PS: I love you.", "Mira: Hm."), {"prompt": GROUP}, [None, "Mira"]),
        (("Borin: you fool! So he said.", "Mira: Hm."), {"prompt": GROUP}, [None, "Mira"]),
        (("Mira: you are late. You said so.", "Hm."),
         {"prompt": "You are Mira.", "persona_memory": {"character": "Mira"}}, [None, None]),
        (("Hi.", "Robin: come here! *she calls*"), {"prompt": "You are Mira. Robin is late.",
                                                    "persona_memory": {"user": "Robin"}}, [None, None]),
        (("Translate: eggs.", "Oeufs.", "Translate: milk.", "Lait."), {"prompt": "Be brief."}, [None] * 4),
        (("My list: eggs.", "Hm.", "Go on: what else?", "So."), {}, [None] * 4),
        (("Hi.", "*Day 1: she waits.*", "Hm.", "She smiles: well.", "So?", "*Day 3: rain.*"), {}, [None] * 6),
    ],
)  # fmt: skip
def test_what_begins_with_a_colon_behind_it_is_a_name_only_where_that_is_certain(texts, more, expected):
    assert voices(*texts, **more) == expected


def test_restored_messages_bear_names_where_the_client_puts_them(shared_server, upstream, chat_id):
    """The extension tells the names, and the client's prompts show none: what comes back has none either."""
    sync(shared_server, chat_id, LONG)
    for names, beside in ((False, False), (True, False), (False, True)):
        shown = prompt_of(LONG[-6:], "none", names)
        shown = [m | ({"name": "Robin_"} if beside and m["role"] != "system" else {}) for m in shown]
        say(shared_server.url, shown, persona_memory={"chat_id": chat_id, "character": "Mira"})
        sent = [m for m in upstream.last["body"]["messages"] if m["role"] != "system"]
        assert len(sent) > 6, "messages are restored"
        assert all(m["content"].startswith(("Robin: ", "Mira: ")) == names for m in sent[:-1])
        assert all(("name" in m) == beside for m in sent)


def test_what_was_joined_is_one_chat_when_it_is_parted(shared_server, upstream, chat_id):
    """A client that joins neighbours from the first message on; the marks of a joined message hold for its parts."""
    api = f"{shared_server.url}/api/persona_memory/chats/{chat_id}"
    shown = [line("assistant", "Come in.")]
    for turn in range(6):
        shown += [line("user", f"Walk {turn} along the harbour."), line("user", f"Extra {turn}: the gulls are loud.")]
        say(shared_server.url, prompt_of(shown, "strict", False), chat_id=chat_id)
        shown += [line("assistant", f"Reply {turn}, she says.")]
    rows = httpx.get(f"{api}/messages", timeout=TIMEOUT).json()["messages"]
    assert [row["content"] for row in rows][1] == "Walk 0 along the harbour.\n\nExtra 0: the gulls are loud."
    for index, mark in ((1, "forgotten"), (3, "pinned")):
        assert httpx.patch(f"{api}/messages/{rows[index]['id']}", json={mark: True}, timeout=TIMEOUT).status_code == 200
    shown += [line("user", "Is it late?")]
    for processing in ("none", "strict", "none"):
        say(shared_server.url, prompt_of(shown, processing, False), chat_id=chat_id)
        assert holds(shared_server, chat_id, shown)
        described = httpx.get(api, timeout=TIMEOUT).json()
        assert described["branches"] == 1 and described["stored"] <= len(shown) + 3, "and the replies to the last three"
        shown += [line("assistant", "It is."), line("user", "Then good night.")]
    rows = httpx.get(f"{api}/messages", timeout=TIMEOUT).json()["messages"]
    assert [row["index"] for row in rows if row["forgotten"]] == [1, 2]
    assert [row["index"] for row in rows if row["pinned"]] == [4, 5]


def test_a_window_may_begin_in_the_middle_of_what_was_joined(shared_server, upstream, chat_id):
    """It is cut between messages, and joined after that; what stands above it stays what it was."""
    api = f"{shared_server.url}/api/persona_memory/chats/{chat_id}"
    shown = [line("assistant", "Come in.")]
    for turn in range(12):
        shown += [line("user", f"Extra {turn}: the gulls are loud.")] if turn % 3 == 1 else []
        shown += [line("user", f"Walk {turn} along the harbour.")]
        prompt = prompt_of(shown[-9:], "none" if turn > 8 else "merge", False)
        say(shared_server.url, prompt, chat_id=chat_id)
        shown += [line("assistant", f"Reply {turn}, she says.")]
    rows = httpx.get(f"{api}/messages", timeout=TIMEOUT).json()["messages"]
    told = "\n\n".join(row["content"] for row in rows)
    assert told == "\n\n".join(m["content"] for m in shown[:-1])
    assert httpx.get(api, timeout=TIMEOUT).json()["branches"] == 1


def test_a_note_before_the_first_message_is_none_when_it_has_moved(shared_server, upstream, chat_id):
    """An author's note in the user's role, in plain words, at a depth that the young chat does not have yet."""
    note = line("user", "It rains in the town and all are tired.")
    shown = [line("assistant", "Come in."), line("user", "Hello.")]
    for turn in range(5):
        prompt = [CARD, *plain([*shown[:-4], note, *shown[-4:]])]
        say(shared_server.url, prompt, chat_id=chat_id)
        shown += [line("assistant", f"Reply {turn}, she says."), line("user", f"Question {turn}, he asks?")]
    assert holds(shared_server, chat_id, shown[:-2])
    described = httpx.get(f"{shared_server.url}/api/persona_memory/chats/{chat_id}", timeout=TIMEOUT).json()
    assert described["branches"] == 1 and described["stored"] < len(shown) + 5, "and a reply to each message"


def test_hidden_messages_stay_when_another_client_has_gone_on_without_them(shared_server, upstream, chat_id):
    """It knows nothing of them; who knows shows them in no prompt, and they are memory again."""
    hidden = [{**m, "hidden": True} for m in LONG[:4]]
    sync(shared_server, chat_id, [*hidden, *LONG[4:20]])
    shown = [*LONG[4:20], line("user", "Good morning.")]
    say(shared_server.url, [CARD, *plain(shown)], chat_id=chat_id)
    assert holds(shared_server, chat_id, [*LONG[:4], *shown]), "the beginning may be missing anywhere"
    cut = [*LONG[4:8], *LONG[10:20], *shown[16:], line("assistant", "So it is."), line("user", "Is it?")]
    sync(shared_server, chat_id, [*LONG[:8], *({**m, "hidden": True} for m in LONG[8:10]), *LONG[10:20]])
    say(shared_server.url, [CARD, *plain(cut)], chat_id=chat_id)
    for _ in range(2):
        cut += [line("assistant", "It is."), line("user", "Then I stay.")]
        say(shared_server.url, [CARD, *plain(cut)], persona_memory={"chat_id": chat_id, "character": "Mira"})
        assert holds(shared_server, chat_id, [*LONG[:20], *cut[14:]])
