"""Carry over: chats with one character recall from each other where the user wants that, marked as another time."""

import threading

import httpx
import pytest
from chats import open_chat
from fakes import LocalServer, say, settings

import persona_memory as pm

PERSONA = {"role": "system", "content": "You are Mira, keeper of the light."}
OTHER_TIME = [
    {"role": "user", "content": "My brother Tomas sold the mule in Ostrava."},
    {"role": "assistant", "name": "Mira", "content": "He always loved a bargain more than an animal."},
]
BEGUN = [
    {"role": "user", "content": "Good evening."},
    {"role": "assistant", "name": "Mira", "content": "The lamp is lit, sit down."},
]
ASKED = {"role": "user", "content": "Who sold the mule in Ostrava?"}


@pytest.fixture
def running(upstream, data_dir):
    """A proxy that holds a chat of another time with Mira, and one with another character."""
    with LocalServer(settings(data_dir, upstream.url, no_guidance=True)) as server:
        append(server, "before", OTHER_TIME)
        stranger = [{"role": "assistant", "name": "Igor", "content": "Nobody but Igor sold the mule in Ostrava."}]
        append(server, "stranger", stranger)
        yield server


def append(running, chat_id: str, messages: list[dict]) -> None:
    """Puts messages into a chat."""
    address = f"{running.url}/api/persona_memory/chats/{chat_id}/messages"
    assert httpx.post(address, json={"messages": messages}, timeout=60).status_code == 200


def carry_over(running, on: bool, character: str = "Mira") -> dict:
    """Turns the option on or off; what is set then."""
    address = f"{running.url}/api/persona_memory/characters/{character}"
    assert httpx.patch(address, json={"carry_over": on}, timeout=60).json() == httpx.get(address, timeout=60).json()
    return httpx.get(address, timeout=60).json()


def ask(running, upstream, chat_id: str = "now", asked: dict = ASKED) -> str:
    """The newest part of a turn's prompt."""
    say(running.url, [PERSONA, *BEGUN, asked], stream=False, chat_id=chat_id)
    return upstream.last["body"]["messages"][-1]["content"]


def recalled(running, chat_id: str = "now") -> list[dict]:
    """What the last prompt recalled, by its report."""
    address = f"{running.url}/api/persona_memory/chats/{chat_id}/prompts?limit=1"
    return httpx.get(address, timeout=60).json()["prompts"][0]["recalled"]


def test_other_chats_are_silent_unless_the_user_wants_them(running, upstream):
    """It is off by default, and can be turned off again."""
    assert ask(running, upstream) == ASKED["content"]
    assert carry_over(running, True)["carry_over"] is True
    assert "Tomas sold the mule" in ask(running, upstream)
    carry_over(running, False)
    assert ask(running, upstream) == ASKED["content"]


def test_a_chat_that_cannot_be_read_keeps_no_other_from_being_carried_over(running, upstream):
    """It is the first that is looked at; a newer version of the program has written it."""
    carry_over(running, True)
    append(running, "newer", OTHER_TIME)
    registry = running.server.memory.registry
    with open_chat(running, "newer").store._database.transaction() as cache:
        cache["format"] = pm.STORE_FORMAT + 1
    registry._forget(pm.chat_folder("newer"), registry._lent[pm.chat_folder("newer")])
    assert registry.catalogue.chats()[0]["chat_id"] == "newer"
    assert "Tomas sold the mule" in ask(running, upstream)


def test_what_is_carried_over_is_marked_and_dated(running, upstream):
    """As another time, in a block of its own; the report names the chat."""
    assert carry_over(running, True) == {"character": "Mira", "chats": 1, "carry_over": True}
    prompt = ask(running, upstream)
    block = prompt[prompt.index(pm.ENGLISH.carried) : prompt.index(pm.ENGLISH.end_of_memories)]
    assert "Tomas sold the mule" in block and "Igor" not in prompt
    assert pm.ENGLISH.memories not in prompt
    (one, *_) = recalled(running)
    message = open_chat(running, "before").store.read([one["id"]])[0]
    day = pm.datetime.fromtimestamp(message.said_at, pm.UTC).date()
    assert one["chat_id"] == "before" and f"{day} User: My brother" in block


def test_small_talk_carries_nothing_over(running, upstream):
    """Every token of it is evaluated anew at each turn."""
    carry_over(running, True)
    said = {"role": "user", "content": "I sit down and warm my hands."}
    assert ask(running, upstream, asked=said) == said["content"]


def test_what_another_chat_has_forgotten_is_not_carried_over(running, upstream):
    """Forgetting holds everywhere."""
    carry_over(running, True)
    rows = httpx.get(f"{running.url}/api/persona_memory/chats/before/messages", timeout=60).json()["messages"]
    address = f"{running.url}/api/persona_memory/chats/before/messages/{rows[0]['id']}"
    assert httpx.delete(address, timeout=60).status_code == 200
    assert "Tomas" not in ask(running, upstream)


def test_the_option_survives_a_restart(upstream, data_dir):
    """It stands on disk, beside the chats."""
    given = settings(data_dir, upstream.url)
    with LocalServer(given) as server:
        carry_over(server, True)
    with LocalServer(given) as server:
        address = f"{server.url}/api/persona_memory/characters/Mira"
        assert httpx.get(address, timeout=60).json()["carry_over"] is True


def test_two_chats_that_recall_from_each_other_do_not_wait_for_each_other(running, upstream):
    """Turns in both at once come to an end."""
    carry_over(running, True)
    ask(running, upstream, "one"), ask(running, upstream, "two")
    done: list[str] = []
    turns = [
        threading.Thread(target=lambda chat=chat: done.append(ask(running, upstream, chat)), daemon=True)
        for chat in ("one", "two") * 4
    ]
    for turn in turns:
        turn.start()
    for turn in turns:
        turn.join(60)
    assert len(done) == len(turns)


@pytest.mark.parametrize("body", [{}, {"carry_over": 1}, {"carry_over": None}, []], ids=str)
def test_nonsense_is_refused(running, body):
    """The option is on or off."""
    address = f"{running.url}/api/persona_memory/characters/Mira"
    assert httpx.patch(address, json=body, timeout=60).status_code == 400


@pytest.mark.parametrize("words", [1, 900, 1500, 1700, 1800, 1850, 1900])
def test_what_is_carried_over_keeps_to_the_budget(upstream, data_dir, words):
    """Dates and frame included, however little room a long persona leaves."""
    persona = {"role": "system", "content": "light " * words}
    with LocalServer(settings(data_dir, upstream.url, context=3000, budget="20/40/20/20")) as server:
        many = [
            {"role": "user", "content": f"Of the mule in Ostrava: owner {n} sold it to the {what}."}
            for n, what in enumerate(["miller", "smith", "monk", "baker", "tailor", "judge", "ferryman", "cooper"] * 4)
        ]
        append(server, "before", [*many, OTHER_TIME[1]])
        carry_over(server, True)
        say(server.url, [persona, *BEGUN, ASKED], stream=False, chat_id="now")
        carried = [row for row in recalled(server) if row.get("chat_id")]
        assert carried or words > 1
        sent = sum(map(pm.message_tokens, upstream.last["body"]["messages"])) + pm.REPLY_PRIMING
        address = f"{server.url}/api/persona_memory/chats/now/prompts?limit=1"
        (report,) = httpx.get(address, timeout=60).json()["prompts"]
        assert sent + report["budget"]["response"] <= 3000
