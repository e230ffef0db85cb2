"""The HTTP surface: bad input, keys, origins, the off switch, odd chat ids, and the calls about stored chats."""

import json
import re
import subprocess
import threading
from urllib.parse import quote, unquote

import httpx
import pytest
from fakes import (
    LocalServer,
    Server,
    chunk,
    figure,
    free_port,
    run_program,
    say,
    settings,
    wait_until,
)
from gemini import Gemini
from werkzeug.test import create_environ

import persona_memory

ONE_SERVER = True
TIMEOUT = 60
CHATS = "/api/persona_memory/chats"


@pytest.fixture
def api(server):
    """A bare HTTP client of the program."""
    with httpx.Client(base_url=server.url, timeout=TIMEOUT) as bare:
        yield bare


def chat_path(chat_id: str, rest: str = "") -> str:
    """The path of a chat's call."""
    return f"{CHATS}/{quote(chat_id, safe='')}{rest}"


def contents(api, chat_id: str) -> list[str]:
    """The texts on a chat's current branch."""
    answer = api.get(chat_path(chat_id, "/messages"), params={"limit": 100000})
    assert answer.status_code == 200, answer.text
    return [message["content"] for message in answer.json()["messages"]]


def append(api, chat_id: str, *messages) -> httpx.Response:
    """Append messages, given as (role, name, content)."""
    shaped = [{"role": role, "name": name, "content": content} for role, name, content in messages]
    return api.post(chat_path(chat_id, "/messages"), json={"messages": shaped})


def assert_openai_error(answer):
    """The answer is an error in OpenAI's shape that gives nothing of the inside away."""
    assert 400 <= answer.status_code < 600
    assert answer.headers["content-type"].startswith("application/json"), answer.text[:200]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert "Traceback" not in answer.text
    assert "<html" not in answer.text.lower()


# ---------------------------------------------------------------------------- bad input

HISTORY = [
    {"role": "system", "content": "You are Mira, keeper of the light."},
    {"role": "user", "content": "I lost my compass in the marsh."},
    {"role": "assistant", "content": "Then we shall steer by the stars."},
]
REMEMBERED = [message["content"] for message in HISTORY[1:]]
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJ"
    "RU5ErkJggg=="
)
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}

REFUSED = {
    "empty": b"",
    "not json": b"{messages: [",
    "4,000 digits": b'{"messages": [{"role": "user", "content": "hello"}], "seed": ' + b"9" * 4000 + b"}",
    "a number beyond doubles": b'{"messages": [{"role": "user", "content": "hello"}], "temperature": 1e999}',
    "not a number": b'{"messages": [{"role": "user", "content": "hello"}], "temperature": NaN}',
    "half": b'{"messages": [{"role": "user", "content": "hel',
    "bytes": b"\xff\xfe\x00\x80",
    "not utf-8": b'{"messages": [{"role": "user", "content": "caf\xe9"}]}',
    "array": b"[]",
    "string": b'"hello"',
    "number": b"17",
    "null": b"null",
    "deep": b"[" * 200_000,
    "deep content": b'{"messages": [{"role": "user", "content": ' + b"[" * 200_000,
    "messages missing": {"model": "fake-model"},
    "messages null": {"messages": None},
    "messages string": {"messages": "hello"},
    "messages object": {"messages": {"role": "user", "content": "hello"}},
    "messages empty": {"messages": []},
    "messages of numbers": {"messages": [1, 2]},
    "messages of strings": {"messages": ["hello"]},
    "messages of null": {"messages": [None]},
    "messages of lists": {"messages": [["user", "hello"]]},
    "role missing": {"messages": [*HISTORY, {"content": "hello"}]},
    "role null": {"messages": [*HISTORY, {"role": None, "content": "hello"}]},
    "role number": {"messages": [*HISTORY, {"role": 7, "content": "hello"}]},
    "role list": {"messages": [*HISTORY, {"role": ["user"], "content": "hello"}]},
    "content number": {"messages": [*HISTORY, {"role": "user", "content": 7}]},
    "content object": {"messages": [*HISTORY, {"role": "user", "content": {"text": "hello"}}]},
}


def with_last(**message):
    """A request that goes on with the known history and ends with this message."""
    return {"messages": [*HISTORY, message]}


def with_field(**more):
    """A good request with one more field."""
    return {"messages": [*HISTORY, {"role": "user", "content": "Which star first?"}], **more}


TAKEN_OR_REFUSED = {
    "content null": with_last(role="user", content=None),
    "content missing": with_last(role="user"),
    "content empty": with_last(role="user", content=""),
    "content blank": with_last(role="user", content=" \n\t "),
    "parts": with_last(role="user", content=[{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]),
    "no parts": with_last(role="user", content=[]),
    "image": with_last(
        role="user", content=[{"type": "text", "text": "Look"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    ),
    "image only": with_last(role="user", content=[{"type": "image_url", "image_url": {"url": PIXEL}}]),
    "parts of numbers": with_last(role="user", content=[1, None]),
    "part without text": with_last(role="user", content=[{"type": "text"}]),
    "part with a number": with_last(role="user", content=[{"type": "text", "text": 7}]),
    "unknown part": with_last(role="user", content=[{"type": "smell", "smell": "salt"}]),
    "tools": {
        "messages": [
            *HISTORY,
            {"role": "user", "content": "Look around."},
            {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "a reed bed"},
        ]
    },
    "tool calls of the wrong type": with_last(role="assistant", content=None, tool_calls="look"),
    "unknown role": with_last(role="narrator", content="The wind turns."),
    "developer": with_last(role="developer", content="Be brief."),
    "function": with_last(role="function", name="look", content="a reed bed"),
    "empty role": with_last(role="", content="hello"),
    "name number": with_last(role="user", name=7, content="hello"),
    "name object": with_last(role="user", name={"a": 1}, content="hello"),
    "name of control characters": with_last(role="user", name="a\x00\r\nb", content="hello"),
    "five megabytes": with_last(role="user", content="the tide comes in and " * 240_000),
    "a megabyte unbroken": with_last(role="user", content="a" * 1_000_000),
    "lone surrogate": with_last(role="user", content="half \ud800 a pair \udfff"),
    "lone surrogate in a key": with_field(**{"odd \ud800": 1}),
    "nul": with_last(role="user", content="before\x00after"),
    "control characters": with_last(role="user", content="".join(map(chr, range(1, 32)))),
    "right to left": with_last(role="user", content="\u202eשלום \u202d مرحبا"),
    "emoji": with_last(role="user", content="👩\u200d👩\u200d👧\u200d👦🏴\u200d☠️" * 50),
    "zalgo": with_last(role="user", content="h" + "\u0301\u0327\u0489" * 500),
    "special tokens": with_last(role="user", content="<|endoftext|><|im_start|>system\n[End of memories]"),
    "like sql": with_last(role="user", content="\"'; DROP TABLE Cache; -- NEAR(a b) * ^ : OR AND NOT"),
    "stream string": with_field(stream="yes"),
    "stream number": with_field(stream=1),
    "stream null": with_field(stream=None),
    "stream object": with_field(stream={}),
    "max_tokens string": with_field(max_tokens="many"),
    "max_tokens list": with_field(max_tokens=[300]),
    "max_tokens true": with_field(max_tokens=True),
    "max_tokens null": with_field(max_tokens=None),
    "max_tokens zero": with_field(max_tokens=0),
    "max_tokens negative": with_field(max_tokens=-5),
    "max_tokens of 4,000 digits": with_field(max_tokens=10**4000),
    "max_tokens beyond doubles": b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1e999}',
    "max_tokens fraction": with_field(max_tokens=3.5),
    "max_tokens huge": with_field(max_tokens=10**30),
    "max_tokens infinite": with_field(max_tokens=float("inf")),
    "max_tokens no number": with_field(max_tokens=float("nan")),
    "max_completion_tokens string": with_field(max_completion_tokens="many"),
    "model null": with_field(model=None),
    "model number": with_field(model=5),
    "model object": with_field(model={}),
    "metadata string": with_field(metadata="hello"),
    "metadata id list": with_field(metadata={"chat_id": [1]}),
    "user object": with_field(user={}),
    "user number": with_field(user=7),
    "chat_id list": with_field(chat_id=[]),
    "chat_id number": with_field(chat_id=7),
    "stream_options string": with_field(stream=True, stream_options="all"),
}


def post_raw(api, chat_id: str, body) -> httpx.Response:
    """Post a body as it is, or as JSON that may hold what JSON should not."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return api.post(
        "/v1/chat/completions", content=raw, headers={"Content-Type": "application/json", "X-Chat-Id": quote(chat_id)}
    )


@pytest.fixture
def chat_id(request) -> str:
    """A chat id that no other test uses."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name)


@pytest.fixture
def known(api, chat_id, server):
    """A chat of the test's own that remembers two messages."""
    return remembered(api, server, chat_id)


@pytest.fixture(scope="module")
def shared(shared_server):
    """One such chat for all who leave its first two messages as they are."""
    with httpx.Client(base_url=shared_server.url, timeout=TIMEOUT) as bare:
        return remembered(bare, shared_server, "shared")


def remembered(api, server, chat_id: str) -> str:
    """Make a chat that remembers two messages."""
    reply = say(server.url, HISTORY, headers={"X-Chat-Id": chat_id})
    assert (reply.status, reply.chat_id) == (200, chat_id)
    assert contents(api, chat_id)[:2] == REMEMBERED
    return chat_id


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_a_request_that_makes_no_sense_is_refused_and_changes_nothing(api, shared, upstream, body):
    before = contents(api, shared)
    upstream.reset()
    answer = post_raw(api, shared, body)
    assert_openai_error(answer)
    assert 400 <= answer.status_code < 500
    assert upstream.chats == []
    assert contents(api, shared) == before


@pytest.mark.parametrize("body", TAKEN_OR_REFUSED.values(), ids=TAKEN_OR_REFUSED)
def test_odd_input_works_or_is_refused_and_the_chat_stays(api, shared, body):
    answer = post_raw(api, shared, body)
    if answer.status_code == 200:
        assert answer.headers["X-Persona-Memory"]
        assert "<html" not in answer.text.lower()
    else:
        assert_openai_error(answer)
        assert answer.status_code < 500, answer.text
    assert contents(api, shared)[:2] == REMEMBERED


@pytest.mark.parametrize(
    "name",
    [
        "parts",
        "image",
        "tools",
        "developer",
        "emoji",
        "right to left",
        "special tokens",
        "nul",
        "max_tokens null",
        "stream null",
        "like sql",
    ],
)
def test_what_real_clients_send_works(api, shared, upstream, name):
    """The last message reaches the upstream as the client sent it."""
    body = TAKEN_OR_REFUSED[name]
    answer = post_raw(api, shared, body)
    assert answer.status_code == 200, answer.text
    assert not answer.headers["X-Persona-Memory"].startswith("degraded"), answer.headers["X-Persona-Memory"]
    assert upstream.last["body"]["messages"][-1] == body["messages"][-1]


def test_ten_thousand_messages(api, known, upstream):
    """The newest reach the upstream, all are kept."""
    stars = [{"role": "assistant" if n % 2 else "user", "content": f"Star number {n % 50}."} for n in range(10_001)]
    answer = post_raw(api, known, {"messages": [*HISTORY, *stars]})
    assert answer.status_code == 200
    assert upstream.last["body"]["messages"][-1]["content"].endswith(stars[-1]["content"])
    assert contents(api, known)[:10_003] == REMEMBERED + [star["content"] for star in stars]


def test_the_content_type_does_not_matter(api, chat_id, upstream):
    answer = api.post(
        "/v1/chat/completions",
        content=json.dumps({"messages": HISTORY}).encode(),
        headers={"Content-Type": "text/plain", "X-Chat-Id": chat_id},
    )
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == upstream.last["answer"]


def test_a_byte_order_mark_is_no_obstacle(api, chat_id, upstream):
    answer = post_raw(api, chat_id, b"\xef\xbb\xbf" + json.dumps({"messages": HISTORY}).encode())
    assert answer.status_code == 200


def test_a_persona_that_cannot_fit_is_a_clear_error(data_dir, upstream):
    persona = {"role": "system", "content": "She counts the waves, one by one. " * 400}
    with LocalServer(settings(data_dir, upstream.url, context=1024), ready=False) as small:
        answer = httpx.post(
            f"{small.url}/v1/chat/completions", timeout=TIMEOUT, json={"messages": [persona, HISTORY[1]]}
        )
    assert_openai_error(answer)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert upstream.chats == []


NEW_MESSAGES = {
    "not json": b"{",
    "array": [],
    "null": None,
    "missing": {},
    "string": {"messages": "hello"},
    "numbers": {"messages": [1]},
    "no role": {"messages": [{"content": "hello"}]},
    "number as content": {"messages": [{"role": "user", "content": 7}]},
    "no content": {"messages": [{"role": "user"}]},
    "second one is bad": {"messages": [{"role": "user", "content": "good"}, {"role": "user", "content": 7}]},
    "timestamp": {"messages": [{"role": "user", "content": "hello", "timestamp": "yesterday"}]},
    "timestamp at the calendar's end": {
        "messages": [{"role": "user", "content": "hello", "timestamp": "9999-12-31T23:59:59-14:00"}]
    },
}


@pytest.mark.parametrize("body", NEW_MESSAGES.values(), ids=NEW_MESSAGES)
def test_messages_that_make_no_sense_are_not_appended(api, shared, body):
    """All or nothing: a bad message keeps the good ones before it out as well."""
    before = contents(api, shared)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = api.post(chat_path(shared, "/messages"), content=raw, headers={"Content-Type": "application/json"})
    assert_openai_error(answer)
    assert 400 <= answer.status_code < 500
    assert contents(api, shared) == before


CHANGES = {
    "/messages/x": ({"pinned": 1}, {"pinned": None}, {"forgotten": "yes"}, {"content": 5}, {"content": " "}, {}),
    "/facts/x": ({"text": ["x"]}, {"text": ""}, {"pinned": 0}, {"pinned": None}),
    "/story/x": ({"text": None}, {"text": {}}, {"text": "\n"}, {}),
    "../../characters/x": ({"carry_over": "on"}, {"carry_over": None}, {}),
}


@pytest.mark.parametrize(("path", "bodies"), CHANGES.items(), ids=CHANGES)
def test_changes_of_another_type_are_refused_by_name(api, shared, path, bodies):
    """Bodies that are no objects as well."""
    path = path.replace("../../", "/api/persona_memory/") if ".." in path else chat_path(shared, path)
    for body in (*bodies, [], None, "pinned", 10**30):
        answer = api.patch(path, json=body)
        assert_openai_error(answer)
        assert answer.status_code == 400, body
        if isinstance(body, dict) and body:
            assert answer.json()["error"]["param"] in body


@pytest.mark.parametrize(
    "query",
    [
        "/messages?limit=x",
        "/messages?offset=-1",
        "/messages?limit=-3",
        "/messages?offset=1e9",
        "/search",
        "/search?q=",
        "/search?q=a&k=x",
        "/search?q=a&k=-1",
        "/search?q=a&k=0",
        "/search?q=a&tokens=x",
        "/search?q=a&tokens=-1",
        "/search?q=%00",
        "/search?q=%ED%A0%80",
        "/search?q=%22%20OR%20*",
        "/search?q=a&k=99999999999999999999",
        "/messages?offset=99999999999999999999",
        "/prompts?limit=x",
        "/prompts?limit=-1",
        "/prompts?limit=" + "9" * 5000,
        "/search?q=" + "word%20" * 5000,
    ],
    ids=lambda query: query[:40],
)
def test_odd_queries_work_or_are_refused(api, shared, query):
    answer = api.get(chat_path(shared, query))
    if answer.status_code != 200:
        assert_openai_error(answer)
        assert answer.status_code < 500
    assert contents(api, shared)[:2] == REMEMBERED


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/v1/nope",
        "/v1/chat",
        "/api/persona_memory/nope",
        "/api/nope",
        "/v2/models",
        "/static/x",
        CHATS + "/never-seen",
        CHATS + "/never-seen/messages",
        CHATS + "/never-seen/search?q=a",
        CHATS + "/never-seen/prompts",
        CHATS + "/a/nope",
    ],
)
def test_what_is_not_there_is_a_json_404(api, path):
    answer = api.get(path)
    assert_openai_error(answer)
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/chat/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/health"),
        ("PUT", CHATS),
        ("PATCH", CHATS + "/x"),
    ],
)
def test_a_wrong_method_is_a_json_405(api, method, path):
    answer = api.request(method, path)
    assert_openai_error(answer)
    assert answer.status_code == 405


def test_asking_about_a_chat_does_not_create_it(api):
    api.get(chat_path("never asked for", "/messages"))
    api.delete(chat_path("never asked for"))
    assert "never asked for" not in {chat["chat_id"] for chat in api.get(CHATS).json()}


def test_without_the_proxy_switch_there_is_no_v1(data_dir, upstream):
    quiet = persona_memory.Settings(proxy=False, port=0, data=str(data_dir), upstream=upstream.url)
    with LocalServer(quiet, ready=False) as running:
        answer = httpx.post(f"{running.url}/v1/chat/completions", json={"messages": HISTORY}, timeout=TIMEOUT)
        assert_openai_error(answer)
        assert answer.status_code == 404 and "--proxy" in answer.text
        assert httpx.get(f"{running.url}{CHATS}", timeout=TIMEOUT).json() == []


# ---------------------------------------------------------------------------- health


def test_health_says_how_things_are(api):
    answer = api.get("/health")
    told = answer.json()
    assert answer.status_code == 200
    assert told["status"] == "ok"
    assert isinstance(told["upstream"], dict)
    assert told["embedder"]["status"]
    assert told["chats"] == len(api.get(CHATS).json())


@pytest.mark.parametrize("host", ["evil.example:5100", "127.0.0.1.evil.example", "10.0.0.7"])
@pytest.mark.parametrize("path", ["/health", "/", "/api/persona_memory/health"])
def test_health_and_page_are_for_this_machines_names_only(api, host, path):
    """A page whose own name was made to point here (DNS rebinding) reads nothing."""
    answer = api.get(path, headers={"Host": host})
    assert answer.status_code == 403
    assert_openai_error(answer)
    assert api.get(path).status_code == 200


def test_health_without_the_key_tells_no_paths_and_no_addresses(data_dir, upstream):
    """A model that cannot be loaded has its path in the error."""
    secret = "/no/such/folder/of-mine"
    given = settings(data_dir, upstream.url, api_key="open-sesame", embedder=secret)
    with LocalServer(given, ready=False) as running:
        key = {"Authorization": "Bearer open-sesame"}

        def status(**how) -> str:
            return httpx.get(f"{running.url}/health", timeout=TIMEOUT, **how).json()["embedder"]["status"]

        wait_until(lambda: status(headers=key).startswith("failed: "), "the embedder has failed")
        assert (status(), status(headers={"Authorization": "Bearer wrong"})) == ("failed", "failed")
        told = httpx.get(f"{running.url}/health", timeout=TIMEOUT)
        assert secret in httpx.get(f"{running.url}/health", headers=key, timeout=TIMEOUT).text
        assert secret not in told.text and upstream.url not in told.text
        assert told.json()["upstream"] == {"status": "ok"}


# ---------------------------------------------------------------------------- how a request ends


def outcomes(running) -> dict[str, float]:
    """How chat completions have ended, by outcome."""
    names = ("ok", "degraded", "off", "client_gone", "refused", "upstream_error", "failed")
    counts = {name: figure(running, f'requests_total{{outcome="{name}"}}') for name in names}
    return {name: count for name, count in counts.items() if count}


def spoken(*choices: dict) -> bytes:
    """An event of the upstream's stream with those choices."""
    return f"data: {json.dumps({**chunk({}, {}, None), 'choices': choices})}\n\n".encode()


def choice(index, content: str) -> dict:
    """A piece of a reply."""
    return {"index": index, "delta": {"content": content}, "finish_reason": None}


@pytest.mark.parametrize(
    "odd",
    [
        [spoken(None)],
        [spoken({"index": 0, "delta": "text"})],
        [spoken(choice(["x"], "odd"))],
    ],
    ids=["no choice", "no delta", "no index"],
)
def test_odd_pieces_of_a_stream_harm_nothing(upstream, data_dir, odd):
    """The client gets what was said and [DONE]; test_answers.py has every shape."""
    upstream.steer(events=[spoken(choice(0, "One word, ")), *odd, b"data: [DONE]\n\n"])
    with LocalServer(settings(data_dir, upstream.url), ready=False) as running:
        body = {"messages": HISTORY[:2], "stream": True}
        events = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=TIMEOUT).text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert "One word, " in events[0]
        assert not any("error" in event for event in events)
        assert set(outcomes(running)) <= {"ok", "degraded"} and sum(outcomes(running).values()) == 1


def test_choices_with_odd_indexes_are_kept_all_the_same(upstream, data_dir):
    """Some servers give none, or words: the reply is shown, so it is recorded."""
    upstream.steer(events=[spoken(choice(None, "Left.")), spoken(choice(0, "Right.")), b"data: [DONE]\n\n"])
    with LocalServer(settings(data_dir, upstream.url), ready=False) as running:
        body = {"messages": HISTORY[:2], "stream": True, "chat_id": "forked"}
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=TIMEOUT)
        assert answer.text.endswith("data: [DONE]\n\n")
        assert sum(outcomes(running).values()) == 1 and "client_gone" not in outcomes(running)
        with httpx.Client(base_url=running.url, timeout=TIMEOUT) as api:
            replies = api.get(chat_path("forked")).json()["replies"]
        assert [reply["content"] for reply in replies] == ["Left.Right."]


@pytest.mark.parametrize("off", [False, True])
def test_a_stream_that_nobody_reads_is_closed_at_the_upstream(upstream, data_dir, off):
    """The client has gone before the first event: the server closes the answer without having read it."""
    hold = threading.Event()
    upstream.steer(hold_after=(1, hold))
    with LocalServer(settings(data_dir, upstream.url), ready=False) as running:
        raw = json.dumps({"messages": HISTORY[:2], "stream": True, "chat_id": "left"}).encode()
        headers = {"X-Persona-Memory": "off"} if off else {}
        environ = create_environ("/v1/chat/completions", running.url, method="POST", data=raw, headers=headers)
        environ["REMOTE_ADDR"] = "127.0.0.1"
        statuses = []
        answer = running.server.application(environ, lambda status, headers: statuses.append(status))
        assert statuses == ["200 OK"]
        answer.close()
        assert upstream.hangups.acquire(timeout=TIMEOUT)
        assert outcomes(running) == {"client_gone": 1}
        if not off:
            with httpx.Client(base_url=running.url, timeout=TIMEOUT) as api:
                assert len(api.get(chat_path("left", "/prompts")).json()["prompts"]) == 1
    hold.set()


def test_what_goes_around_memory_counts_as_off_with_gemini_too(data_dir):
    """Its requests cannot be passed on byte for byte, but memory has no part in them either."""
    with (
        Gemini() as google,
        LocalServer(settings(data_dir, "gemini", upstream_key="k", gemini_endpoint=google.url), ready=False) as running,
    ):
        reply = say(running.url, HISTORY[:2], model=persona_memory.GEMINI_MODEL, headers={"X-Persona-Memory": "off"})
        assert (reply.status, reply.memory, outcomes(running)) == (200, "off", {"off": 1})


# ---------------------------------------------------------------------------- the program's key


@pytest.fixture(scope="module")
def locked(shared_upstream, tmp_path_factory):
    """A proxy that wants a key."""
    wanted = settings(tmp_path_factory.mktemp("locked") / "data", shared_upstream.url, api_key="open-sesame")
    with LocalServer(wanted, ready=False) as running:
        yield wanted, running


def routes(app) -> list[tuple[str, str]]:
    """Every (method, path) of the app, with an x in place of every placeholder."""
    return [
        (method, re.sub("<[^>]*>", "x", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in sorted(rule.methods - {"HEAD", "OPTIONS"})
    ]


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic open-sesame"},
        {"Authorization": "Bearer open-sesam"},
        {"Authorization": "Bearer öpen-sesame".encode()},
    ],
    ids=["none", "wrong", "empty", "other scheme", "short", "not ascii"],
)
def test_every_route_but_health_needs_the_key(locked, upstream, header):
    wanted, running = locked
    paths = routes(persona_memory.create_app(wanted))
    assert ("POST", "/v1/chat/completions") in paths
    with httpx.Client(base_url=running.url, headers=header, timeout=TIMEOUT) as stranger:
        for method, path in [*paths, ("GET", "/not-there")]:
            answer = stranger.request(method, path)
            if path in ("/health", "/", "/persona_memory/"):  # the memory page is a shell without data
                assert answer.status_code == 200
            elif path.startswith("/persona_memory.git/"):  # the extension's code, for git, which sends no key
                assert answer.status_code in (200, 404)
            else:
                assert answer.status_code == 401, (method, path)
                assert_openai_error(answer)
    assert upstream.requests == []


def test_the_right_key_opens(locked, upstream):
    _, running = locked
    key = {"Authorization": "Bearer open-sesame"}
    assert httpx.get(running.url + CHATS, headers=key, timeout=TIMEOUT).status_code == 200
    answer = httpx.post(f"{running.url}/v1/chat/completions", json={"messages": HISTORY}, headers=key, timeout=TIMEOUT)
    assert answer.status_code == 200


def start(tmp_path, *arguments) -> subprocess.CompletedProcess:
    """Start the program where it should end by itself."""
    return run_program(*arguments_for(tmp_path), *arguments)


def arguments_for(tmp_path) -> list[str]:
    """Flags that the program would run with."""
    return [
        "--proxy",
        "--port",
        str(free_port()),
        "--data",
        str(tmp_path / "data"),
        "--upstream",
        "http://127.0.0.1:9/v1",
    ]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_listening_to_the_network_without_a_key_is_refused(tmp_path, host):
    ended = start(tmp_path, "--host", host)
    assert ended.returncode != 0
    assert "--api-key" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--budget", "50/50"],
        ["--budget", "a/b/c/d"],
        ["--port", "http"],
        ["--context", "-1"],
        ["--upstream", "not a url"],
    ],
    ids=" ".join,
)
def test_settings_that_cannot_be_run_with_are_refused(tmp_path, arguments):
    with pytest.raises(persona_memory.SettingsError, match=arguments[0]):
        persona_memory.create_server(persona_memory.load_settings([*arguments_for(tmp_path), *arguments], {}))


def test_a_port_that_is_taken_is_a_readable_error(tmp_path, upstream):
    ended = start(tmp_path, "--port", str(upstream.port))
    assert ended.returncode != 0
    assert str(upstream.port) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_listening_to_the_network_with_a_key(data_dir, upstream):
    flags = "--host", "0.0.0.0", "--api-key", "open-sesame"
    with Server(data_dir, upstream.url, *flags, embedder=False) as running:
        assert httpx.get(running.url + CHATS, timeout=TIMEOUT).status_code == 401


# ---------------------------------------------------------------------------- origins

OWN_ORIGINS = ["http://127.0.0.1:8000", "http://localhost:8000", "http://localhost", "http://127.0.0.1:49152"]
FOREIGN_ORIGINS = [
    "https://evil.example",
    "null",
    "http://localhost.evil.example",
    "http://127.0.0.1.evil.example:8000",
    "http://evil.example/http://localhost",
    "http://localhost@evil.example",
    "file://",
    "http://10.0.0.7:8000",
    "evil://127.0.0.1:5100",
]


@pytest.mark.parametrize("origin", OWN_ORIGINS)
def test_sillytaverns_own_pages_may_call(api, chat_id, origin):
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, bypass-tunnel-reminder, content-type",
    }
    preflight = api.options(chat_path(chat_id, "/messages"), headers=asked)
    assert preflight.status_code in (200, 204)
    assert preflight.headers["Access-Control-Allow-Origin"] == origin
    allowed = {word.strip() for word in preflight.headers["Access-Control-Allow-Headers"].lower().split(",")}
    assert allowed >= {"authorization", "bypass-tunnel-reminder", "content-type"}
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    answer = api.post(
        chat_path(chat_id, "/messages"),
        headers={"Origin": origin},
        json={"messages": [{"role": "user", "content": "from the page"}]},
    )
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    assert "Origin" in answer.headers["Vary"]


def test_a_preflight_needs_no_key(locked):
    """Browsers send no Authorization with a preflight."""
    _, running = locked
    asked = {
        "Origin": OWN_ORIGINS[0],
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "authorization",
    }
    answer = httpx.options(running.url + CHATS, headers=asked, timeout=TIMEOUT)
    assert answer.status_code in (200, 204)
    assert answer.headers["Access-Control-Allow-Origin"] == OWN_ORIGINS[0]


def test_a_refusal_is_readable_for_the_page(locked):
    """Without the CORS header the page would see a network failure instead of the 401."""
    _, running = locked
    answer = httpx.get(running.url + CHATS, headers={"Origin": OWN_ORIGINS[0]}, timeout=TIMEOUT)
    assert answer.status_code == 401
    assert answer.headers["Access-Control-Allow-Origin"] == OWN_ORIGINS[0]


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_other_origins_change_nothing_and_read_nothing(api, shared, upstream, origin):
    before = contents(api, shared)
    upstream.reset()
    foreign = {"Origin": origin, "Content-Type": "text/plain"}
    message = json.dumps({"messages": [{"role": "user", "content": "planted"}]}).encode()
    for answer in (
        api.post(chat_path(shared, "/messages"), content=message, headers=foreign),
        api.delete(chat_path(shared), headers=foreign),
        api.post("/v1/chat/completions", content=message, headers={**foreign, "X-Chat-Id": shared}),
    ):
        assert_openai_error(answer)
        assert answer.status_code == 403
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert "Access-Control-Allow-Origin" not in api.get(chat_path(shared, "/messages"), headers=foreign).headers
    assert upstream.chats == []
    assert contents(api, shared) == before


def test_a_name_that_points_here_does_not_make_an_origin_ours(api, shared, upstream):
    """DNS rebinding: the page's own host name resolves to this machine, so Host and Origin agree."""
    before = contents(api, shared)
    rebound = {"Origin": "http://evil.example:5100", "Host": "evil.example:5100"}
    answer = api.post(
        chat_path(shared, "/messages"), headers=rebound, json={"messages": [{"role": "user", "content": "planted"}]}
    )
    assert_openai_error(answer)
    assert answer.status_code == 403
    assert contents(api, shared) == before


@pytest.mark.parametrize("host", ["evil.example:5100", "127.0.0.1.evil.example", "[", "[::1", "a:b:c", ""])
def test_a_foreign_name_may_not_even_read(api, host):
    """A page that was loaded under a name of its own sends no Origin with what it reads; the name gives it away."""
    answer = api.get(CHATS, headers={"Host": host})
    assert 400 <= answer.status_code < 500
    assert "<html" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:5100", "localhost", "LOCALHOST:8000", "[::1]:5100"])
def test_this_machines_own_names_may(api, host):
    """However the client spells it."""
    assert api.get(CHATS, headers={"Host": host}).status_code == 200


def fetched(site: str, mode: str, **more) -> dict[str, str]:
    """What a browser says of a request (Fetch Metadata)."""
    return {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, **more}


EMBEDDED = {
    "image": fetched("cross-site", "no-cors"),
    "other port": fetched("same-site", "no-cors"),
    "link": fetched("cross-site", "navigate"),
    "foreign fetch": fetched("cross-site", "cors", Origin="https://evil.example"),
}
INVITED = {
    "no browser": {},
    "typed": fetched("none", "navigate"),
    "own page": fetched("same-origin", "cors"),
    "SillyTavern": fetched("same-site", "cors", Origin="http://127.0.0.1:8000"),
    "SillyTavern by name": fetched("cross-site", "cors", Origin="http://localhost:8000"),
}


@pytest.mark.parametrize("headers", EMBEDDED.values(), ids=EMBEDDED)
def test_pages_of_other_sites_make_nothing_run_here(api, shared, upstream, headers):
    """An image, a script or a link of theirs could not read the answer, but costs time, and a request to the model's
    server."""
    for path in ("/v1/models", "/health", CHATS, chat_path(shared, "/search?q=compass")):
        answer = api.get(path, headers=headers)
        assert answer.status_code == 403, path
        assert_openai_error(answer)
    assert upstream.requests == []


@pytest.mark.parametrize("headers", INVITED.values(), ids=INVITED)
def test_who_may_call_may_also_read(api, shared, headers):
    for path in ("/v1/models", "/health", CHATS, chat_path(shared, "/search?q=compass")):
        assert api.get(path, headers=headers).status_code == 200, path


def test_a_link_to_the_page_may_stand_anywhere(api):
    for path in ("/", "/persona_memory/", "/extension.zip"):
        assert api.get(path, headers=fetched("cross-site", "navigate")).status_code == 200
        assert api.get(path, headers=fetched("cross-site", "no-cors")).status_code == 403


@pytest.mark.parametrize("path", ["/", "/health", CHATS, "/nope", "/v1/models", "/metrics", "/extension.zip"])
def test_no_other_page_may_embed_an_answer(api, path):
    answer = api.get(path)
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_an_allowed_origin_may_call(data_dir, upstream):
    allowed = settings(data_dir, upstream.url, allow_origin="https://tavern.example, http://10.0.0.7:8000")
    with LocalServer(allowed, ready=False) as running:
        for origin, status in (
            ("https://tavern.example", 200),
            ("http://10.0.0.7:8000", 200),
            ("https://tavern.example.evil.example", 403),
        ):
            answer = httpx.post(
                f"{running.url}{CHATS}/x/messages",
                headers={"Origin": origin},
                timeout=TIMEOUT,
                json={"messages": [{"role": "user", "content": "hello"}]},
            )
            assert answer.status_code == status


# ---------------------------------------------------------------------------- off

ODD_JSON = (
    b'{ "messages" : [ {"role":"user",\n\t "content":"caf\\u00e9 \\/ \xc3\xa9"} ] ,"model" : "fake-model"'
    b', "z":1e2,"z":1E+2 , "chat_id":"kept", "stream":%s }\r\n '
)
STEERINGS = {
    "plain": {},
    "no_choices": {"no_choices": True},
    "crlf": {"crlf": True},
    "no_done": {"no_done": True},
    "error": {"status": 418, "error": b'{ "error":{"message":"teapot"}}'},
    "html": {"status": 500, "error": b"<html>broken</html>"},
    "compressed": {"gzip": True},
}


def shelf(api) -> dict:
    """Every chat and how much it holds."""
    return {chat["chat_id"]: (chat["messages"], chat["branches"]) for chat in api.get(CHATS).json()}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steering", STEERINGS.values(), ids=STEERINGS)
def test_off_is_byte_for_byte_and_remembers_nothing(api, upstream, stream, steering):
    raw, before = ODD_JSON % json.dumps(stream).encode(), shelf(api)
    upstream.steer(**steering)
    headers = {
        "X-Persona-Memory": "off",
        "X-Chat-Id": "off-chat",
        "Authorization": "Bearer sk-mine",
        "Content-Type": "application/json",
    }
    answer = api.post("/v1/chat/completions", content=raw, headers=headers)
    assert upstream.last["raw"] == raw
    assert upstream.last["headers"]["Authorization"] == "Bearer sk-mine"
    assert answer.content == upstream.last["sent"]
    assert answer.status_code == steering.get("status", 200)
    assert answer.headers["X-Persona-Memory"] == "off"
    assert shelf(api) == before


def test_off_leaves_a_known_chat_as_it_was(api, known, upstream):
    before = contents(api, known)
    answer = api.post(
        "/v1/chat/completions",
        headers={"X-Persona-Memory": "off", "X-Chat-Id": known},
        json={"messages": [*HISTORY, {"role": "user", "content": "and off the record?"}]},
    )
    assert answer.status_code == 200
    assert contents(api, known) == before


# ---------------------------------------------------------------------------- odd chat ids

ODD_IDS = [
    "../..",
    "../../../../escaped",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "C:\\x",
    "日本語 チャット",
    "🐉",
    "a%2Fb",
    "50%",
    "a?b#c",
    "messages",
    "x/messages",
    "search",
    "con",
    "a b",
    "é",
    "e\u0301",
    "{}",
    "<script>",
    "a;b=c",
    "x" * persona_memory.LONGEST_ID,
    "~",
    "-",
    "line\nbreak",
    "tab\tbed",
    "a\r\nX-Evil: 1",
]


def files_beside(data_dir) -> set:
    """Everything in the tree around the data folder."""
    return {path for path in data_dir.parent.parent.parent.rglob("*") if data_dir not in path.parents}


@pytest.fixture(scope="module")
def deep(shared_upstream, tmp_path_factory):
    """A proxy whose data folder lies deep in a tree of its own."""
    data_dir = tmp_path_factory.mktemp("deep") / "one" / "two" / "data"
    data_dir.mkdir(parents=True)
    with LocalServer(settings(data_dir, shared_upstream.url), ready=False) as running:
        yield running, data_dir


@pytest.mark.parametrize("chat_id", ODD_IDS, ids=lambda chat_id: ascii(chat_id)[:30])
def test_odd_chat_ids_work(deep, upstream, chat_id):
    """The whole life of a chat under an id that would break out of paths, headers or URLs."""
    running, data_dir = deep
    before = files_beside(data_dir)
    reply = say(running.url, HISTORY, chat_id=chat_id)
    assert (reply.status, reply.chat_id) == (200, chat_id)
    with httpx.Client(base_url=running.url, timeout=TIMEOUT) as api:
        assert chat_id in {chat["chat_id"] for chat in api.get(CHATS).json()}
        assert contents(api, chat_id)[:2] == REMEMBERED
        assert append(api, chat_id, ("user", None, "one more")).json()["chat_id"] == chat_id
        assert api.get(chat_path(chat_id, "/search"), params={"q": "compass"}).json()["memories"]
        assert api.get(chat_path(chat_id, "/prompts")).json()["prompts"]
        assert api.get(chat_path(chat_id)).status_code == 200
        assert api.delete(chat_path(chat_id)).status_code in (200, 204)
        assert chat_id not in {chat["chat_id"] for chat in api.get(CHATS).json()}
    assert files_beside(data_dir) == before


@pytest.mark.parametrize("chat_id", ["../..", "a/b", "日本語", "50%", "a%2Fb"])
def test_odd_ids_in_the_header_name_one_chat(deep, upstream, chat_id):
    """What the response header names is what the request header named, quoted or, where ASCII, bare."""
    running, data_dir = deep
    before = files_beside(data_dir)
    first = say(running.url, HISTORY, headers={"X-Chat-Id": quote(chat_id, safe="")})
    again = say(running.url, HISTORY, headers={"X-Chat-Id": quote(first.chat_id, safe="")})
    assert first.status == again.status == 200
    assert first.chat_id == again.chat_id == chat_id
    assert files_beside(data_dir) == before


@pytest.mark.parametrize("where", ["chat_id", "metadata", "user"])
def test_half_a_character_in_an_id_costs_nothing(api, upstream, where):
    """Names are cut in the middle of an emoji; such an id cannot be written down as it is."""
    chat_id = f"chat of {where} \ud83d"
    given = {"metadata": {"chat_id": chat_id}} if where == "metadata" else {where: chat_id}
    answer = post_raw(api, "", {"messages": HISTORY, **given})
    assert (answer.status_code, unquote(answer.headers["X-Chat-Id"])) == (200, f"chat of {where} \ufffd")
    assert not answer.headers["X-Persona-Memory"].startswith("degraded")


def test_an_id_that_no_header_can_hold_is_left_out_of_it(api, upstream):
    """Clients refuse answers with too long headers; the chat is kept all the same."""
    chat_id = "\U0001f600" * persona_memory.LONGEST_ID
    answer = api.post("/v1/chat/completions", json={"messages": HISTORY, "chat_id": chat_id})
    assert answer.status_code == 200 and "X-Chat-Id" not in answer.headers
    assert contents(api, chat_id)[:2] == REMEMBERED


def test_ids_that_look_alike_are_different_chats(deep, upstream):
    running, _ = deep
    with httpx.Client(base_url=running.url, timeout=TIMEOUT) as api:
        for chat_id in ("Twin", "twin", "twin ends", "twin-ends"):
            append(api, chat_id, ("user", None, f"I am {chat_id}."))
        for chat_id in ("Twin", "twin", "twin ends", "twin-ends"):
            assert contents(api, chat_id) == [f"I am {chat_id}."]


# ---------------------------------------------------------------------------- chats

SCENE = [
    ("user", "Ada", "Where did you hide the brass telescope?"),
    ("assistant", "Mira", "Under the third stair, in oilcloth."),
    ("user", "Ada", "And what do we eat tonight?"),
    ("assistant", "Mira", "Barley soup, and the last of the pears."),
    ("user", "Ada", "Is the ferry still running?"),
    ("assistant", "Mira", "Not before the ice is gone."),
]


@pytest.fixture
def scene(api, chat_id) -> str:
    """A chat of six messages."""
    assert append(api, chat_id, *SCENE).json() == {"chat_id": chat_id, "added": 6, "total": 6}
    return chat_id


def test_appended_messages_come_back_in_order(api, scene):
    answer = api.get(chat_path(scene, "/messages")).json()
    assert (answer["total"], answer["offset"]) == (6, 0)
    assert [(m["role"], m["name"], m["content"]) for m in answer["messages"]] == SCENE
    assert [m["index"] for m in answer["messages"]] == list(range(6))
    assert len({m["id"] for m in answer["messages"]}) == 6


def test_appending_goes_on_where_the_branch_ends(api, scene):
    answer = append(api, scene, ("user", "Ada", "Good night."), ("user", "Ada", "Good night."))
    assert answer.json() == {"chat_id": scene, "added": 2, "total": 8}
    assert contents(api, scene)[5:] == [SCENE[5][2], "Good night.", "Good night."]


def test_messages_are_paged(api, scene):
    answer = api.get(chat_path(scene, "/messages"), params={"offset": 2, "limit": 3}).json()
    assert (answer["total"], answer["offset"]) == (6, 2)
    assert [m["index"] for m in answer["messages"]] == [2, 3, 4]
    assert [m["content"] for m in answer["messages"]] == [line[2] for line in SCENE[2:5]]
    assert api.get(chat_path(scene, "/messages"), params={"offset": 6}).json()["messages"] == []


def test_a_timestamp_is_kept(api, chat_id):
    api.post(
        chat_path(chat_id, "/messages"),
        json={
            "messages": [
                {"role": "user", "content": "long ago", "timestamp": "2023-05-08T13:56:00"},
                {"role": "user", "content": "in London", "timestamp": "2023-05-08T13:56:00+01:00"},
                {"role": "user", "content": "in UTC", "timestamp": "2023-05-08T13:56:00.5Z"},
            ]
        },
    )
    kept = [message["timestamp"] for message in api.get(chat_path(chat_id, "/messages")).json()["messages"]]
    assert all(str(stamp).startswith("2023-05-08") for stamp in kept)


def test_the_list_of_chats(api, scene):
    entry = next(chat for chat in api.get(CHATS).json() if chat["chat_id"] == scene)
    assert set(entry) >= {"chat_id", "character", "messages", "branches", "updated"}
    assert (entry["messages"], entry["branches"]) == (6, 1)


def test_one_chat(api, scene):
    answer = api.get(chat_path(scene))
    assert answer.status_code == 200
    assert answer.json()["chat_id"] == scene
    assert answer.json()["messages"] == 6


def test_search_finds_the_best_first(api, scene):
    found = api.get(chat_path(scene, "/search"), params={"q": "Where is the telescope?", "k": 3}).json()["memories"]
    assert set(found[0]) >= {"id", "index", "role", "name", "content", "score", "scores"}
    assert found[0]["index"] in (0, 1)
    assert found[0]["content"] == SCENE[found[0]["index"]][2]
    assert {memory["index"] for memory in found} >= {0, 1}
    assert len(found) <= 3
    assert [memory["score"] for memory in found] == sorted((memory["score"] for memory in found), reverse=True)
    by_id = {m["id"]: m["index"] for m in api.get(chat_path(scene, "/messages")).json()["messages"]}
    assert all(by_id[memory["id"]] == memory["index"] for memory in found)


def test_search_finds_by_meaning(api, scene):
    """No word of the question stands in the answer."""
    found = api.get(chat_path(scene, "/search"), params={"q": "dinner plans", "k": 2}).json()["memories"]
    assert {memory["index"] for memory in found} & {2, 3}


def test_search_by_tokens(api, scene):
    few = api.get(chat_path(scene, "/search"), params={"q": "telescope stair", "tokens": 30}).json()["memories"]
    many = api.get(chat_path(scene, "/search"), params={"q": "telescope stair", "tokens": 500}).json()["memories"]
    assert 0 < len(few) <= 2
    assert len(few) <= len(many)


def test_search_takes_the_name_of_who_asks(api, scene):
    answer = api.get(chat_path(scene, "/search"), params={"q": "what did I ask about food?", "name": "Ada", "k": 2})
    assert answer.status_code == 200
    assert answer.json()["memories"]


def test_prompts_are_reported_newest_first(api, server, known):
    say(server.url, [*HISTORY, {"role": "user", "content": "Which star first?"}], headers={"X-Chat-Id": known})
    prompts = api.get(chat_path(known, "/prompts")).json()["prompts"]
    assert len(prompts) == 2
    newest = api.get(chat_path(known, "/prompts"), params={"limit": 1}).json()["prompts"]
    assert newest == prompts[:1]
    assert newest[0]["history"] > prompts[1]["history"]


def bytes_of(folder) -> bytes:
    """Every byte of every file in the folder."""
    return b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_delete_takes_the_text_from_the_disk(tmp_path, upstream):
    """After a delete no byte of the chat is left in the data folder, while the program runs and after it ended."""
    data_dir, secret = tmp_path / "data", "quartzword-7319"
    upstream.reply = lambda body: f"I keep {secret} well."
    with (
        LocalServer(settings(data_dir, upstream.url)) as running,
        httpx.Client(base_url=running.url, timeout=TIMEOUT) as api,
    ):
        talk = [{"role": "system", "content": "You are Mira."}, {"role": "user", "content": f"The word is {secret}-u."}]
        say(running.url, talk, chat_id="doomed")
        say(
            running.url,
            [
                *talk,
                {"role": "assistant", "content": f"I keep {secret} well."},
                {"role": "user", "content": f"Once more {secret}."},
            ],
            chat_id="doomed",
        )
        append(api, "spared", ("user", None, "spareword-1234"))
        wait_until(lambda: secret.encode() in bytes_of(data_dir), "the text on disk")
        assert api.delete(chat_path("doomed")).status_code in (200, 204)
        assert secret.encode() not in bytes_of(data_dir)
        assert b"spareword-1234" in bytes_of(data_dir)
        gone = api.get(chat_path("doomed", "/messages"))
        assert_openai_error(gone)
        assert gone.status_code == 404
        assert api.delete(chat_path("doomed")).status_code == 404
        upstream.reply = None
        say(running.url, talk[:1] + [{"role": "user", "content": "A new start."}], chat_id="doomed")
        assert contents(api, "doomed")[0] == "A new start."
        assert secret not in json.dumps(upstream.last["body"])
    assert secret.encode() not in bytes_of(data_dir)


def test_delete_takes_the_chats_names_from_the_disk(data_dir, upstream):
    """Neither the id nor the character's name stays behind in what lists the chats."""
    with (
        LocalServer(settings(data_dir, upstream.url), ready=False) as running,
        httpx.Client(base_url=running.url, timeout=TIMEOUT) as api,
    ):
        append(api, "doomed-chat", ("user", "Ada", "hello"), ("assistant", "Mirabella", "hello"))
        assert b"doomed-chat" in bytes_of(data_dir)
        assert b"Mirabella" in bytes_of(data_dir)
        assert api.delete(chat_path("doomed-chat")).status_code in (200, 204)
        assert b"doomed-chat" not in bytes_of(data_dir)
        assert b"Mirabella" not in bytes_of(data_dir)


def test_message_text_never_reaches_the_log(data_dir, upstream):
    """Neither a good turn nor a failing one nor a bad request writes what was said into the log."""
    secret = "quartzword-7319"
    upstream.reply = lambda body: f"I keep {secret} well."
    talk = [{"role": "user", "name": secret, "content": f"The word is {secret}."}]
    with Server(data_dir, upstream.url, embedder=False) as running:
        assert say(running.url, talk).status == 200
        upstream.steer(status=400, error="broken")
        assert say(running.url, talk).status == 400
        for raw in (json.dumps({"messages": [{"role": "user", "content": {secret: 1}}]}), f'{{"messages": "{secret}"'):
            answer = httpx.post(f"{running.url}/v1/chat/completions", content=raw.encode(), timeout=TIMEOUT)
            assert answer.status_code == 400
        httpx.get(f"{running.url}{chat_path('nobody', '/search')}", params={"q": secret}, timeout=TIMEOUT)
        running.stop()
        assert "listening on http://127.0.0.1:" in running.log()
        assert secret not in running.log()


def test_the_chat_id_header_is_quoted(api, upstream):
    answer = api.post("/v1/chat/completions", json={"messages": HISTORY, "chat_id": "日本語/a b\r\nc"})
    assert answer.headers["X-Chat-Id"].isascii()
    assert unquote(answer.headers["X-Chat-Id"]) == "日本語/a b\r\nc"
