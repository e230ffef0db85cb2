"""What the program tells about itself: figures, log lines, and never a key or a word of the chat."""

import json
import logging
import sys
import threading

import httpx
import pytest
from fakes import LocalServer, Server, Upstream, client, figure, say, settings, wait_until
from gemini import Gemini, permission_denied

import persona_memory as pm

TIMEOUT = 60
KEY = "sk-verysecret-0123456789"
CLIENT_KEY = "sk-theclientsown-987654321"
WORDS = "the heron keeps a copper lantern"


def turn(text: str) -> list[dict]:
    """A short chat."""
    return [{"role": "system", "content": "You are Mira."}, {"role": "user", "content": text}]


def test_figures_of_good_turns(server, upstream):
    """Requests, the time that memory added, tokens by share, recall and the first token of the streamed one."""
    say(server.url, turn("one"), stream=True)
    say(server.url, turn("two"), stream=False)
    assert figure(server, 'requests_total{outcome="ok"}') == 2
    assert figure(server, "added_seconds_count") == 2
    assert figure(server, "recalled_messages_count") == 2
    assert figure(server, "first_token_seconds_count") == 1
    for share in ("persona", "history"):
        assert figure(server, f'prompt_tokens_total{{share="{share}"}}') > 0
    assert figure(server, 'usage_tokens_total{kind="prompt"}') > 0
    assert figure(server, 'usage_tokens_total{kind="completion"}') > 0
    assert figure(server, "upstream_in_flight") == figure(server, "upstream_queued") == 0


def test_figures_of_bad_turns(server, upstream):
    """How a request ended; each failed attempt and each retry by its status."""
    upstream.steer(status=503)
    say(server.url, turn("failing"))
    upstream.steer(status=400)
    say(server.url, turn("refused there"))
    httpx.post(f"{server.url}/v1/chat/completions", json={"messages": []}, timeout=TIMEOUT)
    upstream.steer(status=200)
    say(server.url, turn("passed by"), headers={"X-Persona-Memory": "off"})
    outcomes = {
        o: figure(server, f'requests_total{{outcome="{o}"}}') for o in ("ok", "upstream_error", "refused", "off")
    }
    assert outcomes == {"ok": 0, "upstream_error": 2, "refused": 1, "off": 1}
    assert figure(server, 'upstream_errors_total{status="503"}') == pm.ATTEMPTS
    assert figure(server, 'upstream_retries_total{status="503"}') == pm.ATTEMPTS - 1
    assert figure(server, 'upstream_errors_total{status="400"}') == 1


def test_a_stream_that_is_cut_counts_as_the_upstreams_error(server, upstream):
    """It had its status 200, yet it failed."""
    upstream.steer(cut_after=2)
    say(server.url, turn("cut"))
    assert figure(server, 'requests_total{outcome="upstream_error"}') == 1
    assert figure(server, "upstream_retries_total") == 0


def test_waiting_requests_are_counted(upstream, data_dir):
    """The queue's length while two wait for one place."""
    hold = threading.Event()
    upstream.steer(hold=hold)
    with LocalServer(settings(data_dir, upstream.url, upstream_limit=1)) as running:
        talkers = [threading.Thread(target=say, args=(running.url, turn(str(n)))) for n in range(3)]
        for talker in talkers:
            talker.start()
        upstream.wait_for_chats(1)
        wait_until(lambda: figure(running, "upstream_queued") == 2, "two in the queue")
        assert figure(running, "upstream_in_flight") == 1
        hold.set()
        for talker in talkers:
            talker.join()
        assert figure(running, 'requests_total{outcome="ok"}') == 3


def test_the_figures_are_what_prometheus_reads(server):
    """Its text format, under its content type."""
    answer = httpx.get(f"{server.url}/metrics", timeout=TIMEOUT)
    assert answer.headers["content-type"].startswith("text/plain")
    assert "# TYPE persona_memory_requests_total counter" in answer.text


def test_the_figures_need_the_key_where_there_is_one(upstream, data_dir):
    """Only /health is open."""
    with LocalServer(settings(data_dir, upstream.url, api_key="open sesame")) as running:
        assert httpx.get(f"{running.url}/metrics", timeout=TIMEOUT).status_code == 401


# ---------------------------------------------------------------------------- the log


@pytest.fixture
def process(upstream, data_dir):
    """The program as a process, with a log for machines."""
    with Server(data_dir, upstream.url, "--log-format", "json", "--upstream-key", KEY) as running:
        yield running.wait_ready()


def events(running) -> list[dict]:
    """The log's lines."""
    return [json.loads(line) for line in running.log().splitlines()]


def test_every_line_is_an_object_and_none_holds_text(process, upstream):
    """An event a line, with the chat's id, times and counts; not a word of the chat."""
    upstream.steer(reply=lambda body: f"Reply: {WORDS}")
    chat = say(process.url, turn(f"Remember: {WORDS}")).chat_id
    upstream.steer(status=500, error="broken")
    say(process.url, turn(f"And again {WORDS}"))
    lines = events(process)
    assert all({"at", "level", "event", "message"} <= line.keys() for line in lines)
    first = next(line for line in lines if line["event"] == "turn")
    assert (first["chat"], first["recalled"], first["history"]) == (chat, 0, 1)
    assert first["milliseconds"] > 0 and first["tokens"]["persona"] > 0
    ended = [line for line in lines if line["event"] == "request"]
    assert [(line["outcome"], line["status"]) for line in ended] == [("ok", 200), ("upstream_error", 500)]
    assert ended[0]["chat"] == chat and 0 < ended[0]["first_token_seconds"] <= ended[0]["seconds"]
    assert [line["attempt"] for line in lines if line["event"] == "retry"] == [1, 2, 3]
    assert WORDS not in process.log()
    assert "started" in [line["event"] for line in lines]


def test_text_is_logged_only_when_asked_for(upstream, data_dir):
    """`--log-text` shows what was said, in the console that people read."""
    upstream.steer(reply=lambda body: "Aye.")
    with Server(data_dir, upstream.url, "--log-text", embedder=False) as running:
        say(running.url, turn(WORDS))
        assert f"user: {WORDS}" in running.log()
        assert not running.log().startswith("{")


def test_a_traceback_is_part_of_its_line():
    """One object a line, also where something went wrong."""
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    line = pm.LogFormatter("json").format(record)
    assert "\n" not in line
    assert "ValueError" in json.loads(line)["traceback"]


# ---------------------------------------------------------------------------- keys


def everything(running, chat_id: str | None) -> str:
    """All that the program shows of itself and of a chat."""
    paths = ["/health", "/metrics", "/v1/models", "/api/persona_memory/chats"]
    if chat_id:
        paths += [f"/api/persona_memory/chats/{chat_id}{rest}" for rest in ("", "/messages", "/prompts")]
    answers = [httpx.get(running.url + path, timeout=TIMEOUT) for path in paths]
    return "\n".join(f"{answer.headers}{answer.text}" for answer in answers)


def kept(data_dir) -> bytes:
    """Every byte of the data folder."""
    return b"".join(path.read_bytes() for path in data_dir.rglob("*") if path.is_file())


def assert_silent(running, data_dir, *replies):
    """No key in any answer, page, figure, log or file."""
    shown = everything(running, replies[0].chat_id) + running.log() + repr(replies)
    stored = kept(data_dir)
    for key in (KEY, CLIENT_KEY):
        assert key not in shown
        assert key.encode() not in stored
    assert "***" in repr(replies)  # an upstream did quote it


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_openai_keys_stay_hidden(upstream, data_dir, log_format):
    """An upstream that quotes the key which it refuses, in an error, in a stream, and for a request passed through."""
    quote = {"error": {"message": f"Incorrect API key provided: {KEY}", "details": [KEY]}}
    flags = "--upstream-key", KEY, "--log-format", log_format
    with Server(data_dir, upstream.url, *flags, embedder=False) as running:
        replies = [say(running.url, turn("hello"))]
        for stream in (True, False):
            upstream.steer(status=401, error=quote)
            replies.append(say(running.url, turn("refused"), stream))
            replies.append(say(running.url, turn("passed"), stream, headers={"X-Persona-Memory": "off"}))
        upstream.steer(status=200, events=[f"data: {json.dumps(quote)}\n\n".encode()])
        replies.append(say(running.url, turn("in a stream")))
        assert upstream.last["headers"]["Authorization"] == f"Bearer {KEY}"
        assert_silent(running, data_dir, *replies)


def test_the_clients_own_key_stays_hidden(upstream, data_dir):
    """It goes to the upstream and nowhere else."""
    with Server(data_dir, upstream.url, embedder=False) as running:
        replies = []
        for status in (200, 401):
            upstream.steer(status=status, error=f"Incorrect API key provided: {CLIENT_KEY}")
            replies.append(say(running.url, turn("hi"), headers={"Authorization": f"Bearer {CLIENT_KEY}"}))
        assert upstream.last["headers"]["Authorization"] == f"Bearer {CLIENT_KEY}"
        assert_silent(running, data_dir, *replies)


def test_geminis_key_stays_hidden(data_dir):
    """Google quotes a suspended key in three places of one error."""
    with Gemini() as api:
        env = {"GEMINI_API_KEY": KEY, "GOOGLE_GEMINI_BASE_URL": api.url}
        with Server(data_dir, "gemini", env=env, embedder=False) as running:
            replies = [say(running.url, turn("hello"), model=pm.GEMINI_MODEL)]
            api.steer(error=permission_denied(KEY))
            replies += [say(running.url, turn("again"), stream, model=pm.GEMINI_MODEL) for stream in (True, False)]
            assert api.last["headers"]["x-goog-api-key"] == KEY
            assert_silent(running, data_dir, *replies)


def test_a_password_in_the_upstreams_address_is_not_shown(data_dir):
    """Neither by /health nor by the error of an upstream that is not there."""
    with Upstream() as upstream:
        address = upstream.url.replace("http://", f"http://me:{KEY}@")
    with Server(data_dir, address, embedder=False) as running:
        reply = say(running.url, turn("hello"), model=pm.GEMINI_MODEL)
        assert reply.status == 502
        assert KEY not in everything(running, None) + running.log() + repr(reply)


def test_short_placeholders_are_no_secrets():
    """Clients without a key send a word for it; hiding that would tear errors apart."""
    assert pm.redact("none of the models", ["none", ""]) == "none of the models"
    assert pm.redact(f"key {KEY}!", [KEY]) == "key ***!"


def test_the_client_gets_usage_from_the_upstream(server, upstream):
    """What the upstream counts goes before what is counted here."""
    answer = client(server.url).chat.completions.create(model="m", messages=turn("hello"))
    assert answer.usage.completion_tokens == len(upstream.last["answer"].split())


def test_what_others_say_forges_no_line_of_the_log_and_steers_no_terminal():
    """Ids and the words of an upstream's error stand in log lines; an exception's words in tracebacks."""
    forged = "x\n12:00:00 INFO forged\x1b[2J\u2028y\r\x85z"
    for words, error in ((forged, None), ("A request failed", ValueError(forged))):
        record = logging.LogRecord(
            "persona_memory", logging.INFO, "", 1, words, None, error and (type(error), error, None)
        )
        lines = pm.LogFormatter("text").format(record).splitlines()
        assert [line for line in lines if line.startswith("12:00:00 INFO forged")] == []
        assert "\x1b" not in "".join(lines)
        assert all(line.startswith("  ") for line in lines[1:])
        (line,) = pm.LogFormatter("json").format(record).splitlines()
        assert "\x1b" not in line


def test_another_programs_log_is_not_forged_either(caplog):
    """As a module of SillyTavern-Extras this program does not format its own lines."""
    caplog.set_level(logging.INFO, "persona_memory")
    pm.log_event("forged", "chat x\n12:00:00 INFO forged\x1b[2J\u2028: ok")
    said = [record.getMessage() for record in caplog.records if record.event == "forged"]
    assert said == [r"chat x\n12:00:00 INFO forged\x1b[2J\u2028: ok"]


def test_a_missing_embedder_is_told_of_now_and_then(data_dir, caplog, monkeypatch):
    """The first job that it costs its vectors, the tenth; and once that they are made again. Other errors always."""
    memory = pm.PersonaMemory(settings(data_dir, "http://127.0.0.1:9/v1", embedder="/nonexistent"))
    embedder, vectors = memory.embedder, memory.vectors
    embedder.start()
    assert embedder.loaded.wait(TIMEOUT)

    def jobs(count: int, work=lambda: embedder.encode(["The lamp is lit."])) -> list[str]:
        """What so many jobs say."""
        caplog.clear()
        for _ in range(count):
            vectors._guarded(work)
        return [record.getMessage() for record in caplog.records if record.thread == threading.get_ident()]

    caplog.set_level(logging.INFO, "persona_memory")
    [said] = jobs(9)
    assert "found by their words alone" in said and "/nonexistent" in said
    assert [words.endswith("(10 times by now)") for words in jobs(40)] == [True]
    assert jobs(3, work=lambda: None) == []  # a job that asked nothing of the embedder proves nothing
    assert len(jobs(2, work=lambda: 1 / 0)) == 2
    monkeypatch.setattr(embedder, "status", "ready")
    [said] = jobs(2, work=lambda: None)
    assert said.startswith("Messages get vectors again. 49 times")
    memory.close()
