"""Who writes the summaries: another upstream, one that fails, and extracts that a model replaces later."""

import re

import httpx
import pytest
from fakes import PATIENCE, LocalServer, Upstream, health, say, settings, wait_until

import persona_memory as pm

PERSONA = {"role": "system", "content": "You are Mira, a lighthouse keeper."}
SMALL = {"context": 1024, "summary_every": 4, "no_guidance": True}


def line(number: int) -> str:
    return (
        f"Line {number}: the lantern keeper number {number} carries bread and candles up to the harbour wall at dusk."
    )


def transcript(count: int) -> list[dict]:
    return [{"role": pm.CHAT_ROLES[i % 2], "content": line(i)} for i in range(count)]


def is_summary(body: dict) -> bool:
    return str(body["messages"][0]["content"]).startswith("You keep the chronicle")


def summary(body: dict) -> str:
    """The text of a good summary: words of the first lines that it is to tell, or a turn's reply."""
    if not is_summary(body):
        return "Mira nods."
    rows = [re.sub(r"^\W*#[\d-]+\W*|\w+( \(\w+\))?: ", "", row) for row in body["messages"][-1]["content"].split("\n")]
    return ". ".join(" ".join(row.split()[:12]).rstrip(".") for row in rows if row.strip())[:300] + "."


def summaries(fake: Upstream) -> list[dict]:
    return [request for request in fake.chats if is_summary(request["body"])]


def story(running, chat_id: str) -> list[dict]:
    address = f"{running.url}/api/persona_memory/chats/{chat_id}"
    return httpx.get(address, params={"mood": "off"}, timeout=PATIENCE).json()["story"]


def sources(running, chat_id: str) -> set[str]:
    """What wrote a chat's summaries."""
    return {row["source"] for row in story(running, chat_id)}


def details(running) -> dict:
    return httpx.get(f"{running.url}/api/persona_memory/health", timeout=PATIENCE).json()


def turn(running, chat_id: str, count: int, headers: dict | None = None):
    """A turn of a chat of so many messages."""
    shown = [PERSONA, *transcript(count), {"role": "user", "content": f"Good evening after {count}."}]
    return say(running.url, shown, stream=False, chat_id=chat_id, headers=headers)


@pytest.fixture
def writer():
    """A second upstream, which writes summaries."""
    with Upstream(reply=summary, models=[{"id": "scribe"}]) as fake:
        yield fake


def test_summaries_on_a_connection_of_their_own(upstream, writer, data_dir):
    """Neither the chat's model nor its key are that server's business."""
    given = settings(data_dir, upstream.url, summary_upstream=writer.url, summary_key="sk-scribe", **SMALL)
    with LocalServer(given) as running:
        turn(running, "apart", 60, {"Authorization": "Bearer sk-chat"})
        wait_until(lambda: "model" in sources(running, "apart"), "a summary")
    assert not summaries(upstream)
    for request in writer.chats:
        assert is_summary(request["body"])
        assert (request["headers"]["Authorization"], request["body"]["model"]) == ("Bearer sk-scribe", "scribe")


def test_another_model_of_the_other_connection(upstream, writer, data_dir):
    given = settings(data_dir, upstream.url, summary_upstream=writer.url, summary_model="monk", model="bard", **SMALL)
    with LocalServer(given) as running:
        turn(running, "monk", 60)
        wait_until(lambda: "model" in sources(running, "monk"), "a summary")
    assert {request["body"]["model"] for request in writer.chats} == {"monk"}
    assert {request["body"]["model"] for request in upstream.chats} == {"bard"}


@pytest.mark.parametrize("named", ["gemini", "nonsense"])
def test_a_connection_that_cannot_be(data_dir, named):
    with pytest.raises(pm.SettingsError):
        pm.PersonaMemory(pm.load_settings(["--data", str(data_dir), "--summary-upstream", named], {}))


def test_summaries_that_fail_are_told(upstream, writer, data_dir):
    """In the upstream's words, with what to do: by the health and by the next turn's header, until one is written."""
    writer.steer(status=404, error="The model `scribe` is retired.")
    given = settings(data_dir, upstream.url, summary_upstream=writer.url, **SMALL)
    with LocalServer(given) as running:
        turn(running, "failing", 60)
        wait_until(lambda: details(running)["summary_failure"], "the failure in the health")
        told = details(running)
        assert (told["level"], told["summary_failure"]["model"]) == ("notice", "scribe")
        assert "is retired" in told["words"] and "--summary-model" in told["advice"]
        reply = turn(running, "failing", 62)
        assert (reply.status, reply.text) == (200, upstream.last["answer"])
        assert "summaries=failing" in reply.memory
        writer.steer(status=200)
        turn(running, "failing", 80)
        wait_until(lambda: details(running)["summary_failure"] is None, "the failure gone")
        assert "retired" not in details(running)["words"]


@pytest.mark.parametrize("bad", ["I cannot help with that.", ""])
def test_a_model_that_writes_no_usable_summary_is_told_of(upstream, data_dir, bad):
    """It answers every request, so that nothing else says so; the health that needs no key quotes nobody."""
    upstream.steer(reply=lambda body: bad if is_summary(body) else "Mira nods.")
    with LocalServer(settings(data_dir, upstream.url, **SMALL)) as running:
        turn(running, "useless", 60)
        wait_until(lambda: details(running)["summary_failure"], "the failure")
        told = details(running)
        assert told["level"] == "notice" and "times in a row could not be used: " in told["words"]
        assert "--summary-model" in told["advice"] and "server" not in told["advice"].removeprefix(pm.SUMMARY_ADVICE)
        assert health(running.url)["summaries"] == "failing"
        assert "summaries=failing" in turn(running, "useless", 62).memory
        upstream.steer(reply=summary)
        turn(running, "useless", 80)
        wait_until(lambda: health(running.url)["summaries"] == "ok", "a usable one")


def test_extracts_are_replaced_over_time_and_after_a_restart(upstream, data_dir):
    """What was told by its own sentences, since the model was not there, is told by the model when it is, oldest
    first, without another turn."""
    upstream.steer(reply=lambda body: "I cannot help with that." if is_summary(body) else "Mira nods.")
    with LocalServer(settings(data_dir, upstream.url, **SMALL, summary_calls=8)) as running:
        turn(running, "later", 120)
        wait_until(lambda: len(story(running, "later")) > 1, "the story")
        wait_until(lambda: len(summaries(upstream)) >= 8, "the hour's requests")
        assert sources(running, "later") == {"extract"}
    upstream.reset()
    upstream.steer(reply=summary)
    with LocalServer(settings(data_dir, upstream.url, **SMALL, summary_calls=0)) as running:
        wait_until(lambda: "model" in sources(running, "later"), "a better summary")
        wait_until(lambda: "extract" not in sources(running, "later"), "all better")
    assert not [request for request in upstream.chats if not is_summary(request["body"])]


def test_the_hour_is_not_exceeded(upstream, data_dir):
    """An import of many stretches asks for as much as the hour allows, and is not done with it."""
    upstream.steer(reply=summary)
    with LocalServer(settings(data_dir, upstream.url, **SMALL, summary_calls=3)) as running:
        turn(running, "hour", 120)
        wait_until(lambda: len(story(running, "hour")) > 1, "the story")
        running.server.memory.summarizer._thread.submit(int).result(PATIENCE)
        turn(running, "hour", 122)
        running.server.memory.summarizer._thread.submit(int).result(PATIENCE)
        assert len(summaries(upstream)) == 3
        assert running.server.memory.registry.catalogue.due() == ["hour"]
