"""The proxy between a client and a language model: what goes through, what is mended, what ends when."""

import importlib.util
import json
import queue
import socket
import sys
import threading

import httpx
import pytest
from fakes import LocalServer, Upstream, completion, free_port, hang_up_later, say, settings
from hypothesis import given
from hypothesis import strategies as st

import persona_memory

ONE_SERVER = True
FOREVER = 60


@pytest.fixture
def model(request) -> str:
    """A model of this test's own: what a model's context is gets asked once."""
    return request.node.name


class Reader(threading.Thread):
    """Reads a raw HTTP answer in the background; `line()` waits for the next line that is not empty."""

    def __init__(self, server, messages, path="/v1/chat/completions", **body):
        super().__init__(daemon=True)
        self.address = server.url + path
        self.body = {"model": "fake-model", "messages": messages, "stream": True, **body}
        self.lines: queue.Queue = queue.Queue()
        self.status = self.headers = self.failure = None
        self.start()

    def run(self):
        try:
            with httpx.stream("POST", self.address, json=self.body, timeout=FOREVER, verify=False) as answer:
                self.status, self.headers = answer.status_code, answer.headers
                for line in answer.iter_lines():
                    if line:
                        self.lines.put(line)
        except httpx.HTTPError as failure:
            self.failure = failure
        self.lines.put(None)

    def line(self) -> str | None:
        """The next line; None at the end."""
        return self.lines.get(timeout=FOREVER)

    def rest(self) -> list[str]:
        """All lines up to the end, which must be a proper one."""
        lines = list(iter(self.line, None))
        assert self.failure is None, f"the answer did not end properly: {self.failure!r}"
        return lines


def payloads(lines) -> list:
    """What the data lines carry, in order: parsed JSON, or the text [DONE]."""
    texts = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def content(lines) -> str:
    """A stream's text."""
    return "".join(
        payload["choices"][0]["delta"].get("content") or ""
        for payload in payloads(lines)
        if payload != "[DONE]" and payload.get("choices")
    )


# ---------------------------------------------------------------------------- pass-through


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_reach_the_upstream_and_chat_id_does_not(server, upstream, chat, stream):
    extra = {
        "mirostat": 2,
        "logit_bias": {"50256": -100},
        "stop": ["\n\n"],
        "min_p": 0.05,
        "user": "someone",
        "nested": {"deep": [1, None]},
    }
    reply = say(server.url, chat, stream=stream, chat_id=f"fields-{stream}", temperature=0.7, **extra)
    sent = upstream.last["body"]
    assert (reply.status, reply.error, reply.text) == (200, None, upstream.last["answer"])
    assert reply.chat_id == f"fields-{stream}"
    assert {key: sent.get(key) for key in extra} == extra
    assert (sent["temperature"], sent["model"], sent["stream"]) == (0.7, "fake-model", stream)
    assert "chat_id" not in sent


def test_a_first_turn_reaches_the_upstream_unchanged(server, upstream, chat):
    """With nothing to remember the messages are the client's own."""
    say(server.url, chat)
    assert upstream.last["body"]["messages"] == chat


def test_a_plain_answer_keeps_the_upstreams_fields(server, upstream, chat):
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "fake-model", "messages": chat})
    assert answer.json() == json.loads(upstream.last["sent"])
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["X-Chat-Id"]
    assert "recalled=0" in answer.headers["X-Persona-Memory"]


def test_a_streams_chunks_keep_the_upstreams_fields(server, upstream, chat):
    """Every event is the upstream's own, a usage chunk with an empty list of choices among them."""
    reader = Reader(server, chat, stream_options={"include_usage": True})
    lines = reader.rest()
    assert payloads(lines) == payloads(upstream.last["sent"].decode().splitlines())
    assert [payload["usage"] for payload in payloads(lines)[:-1] if not payload["choices"]]
    assert reader.headers["content-type"].startswith("text/event-stream")
    assert reader.headers["X-Chat-Id"]
    assert "recalled=0" in reader.headers["X-Persona-Memory"]


def test_reasoning_and_tool_call_deltas_pass(server, upstream, chat):
    deltas = [
        {"reasoning_content": "hm"},
        {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "{}"}}]},
        {"content": None},
        {"content": "yes"},
    ]
    upstream.events = [event({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas] + [b"data: [DONE]\n\n"]
    received = payloads(Reader(server, chat).rest())
    assert [payload["choices"][0]["delta"] for payload in received[:-1]] == [*deltas, {}]  # the last one ends it


def test_a_compressed_answer_is_readable(server, upstream, chat):
    upstream.gzip = True
    reply = say(server.url, chat, stream=False)
    assert (reply.status, reply.text) == (200, upstream.last["answer"])


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/chat/completions",
        "/v1//chat/completions",
        "//chat/completions",
        "//v1/chat/completions",
    ],
)
def test_chat_completions_answer_under_every_path_clients_use(server, upstream, chat, path):
    assert content(Reader(server, chat, path).rest()) == upstream.last["answer"]


@pytest.mark.parametrize("path", ["/v1/models", "/models", "//models", "/v1//models"])
def test_models_are_the_upstreams(server, upstream, path):
    upstream.models = [{"id": "one", "object": "model"}, {"id": "two", "object": "model", "note": "kept"}]
    answer = httpx.get(server.url + path)
    assert answer.status_code == 200
    assert answer.json()["data"] == upstream.models


# ---------------------------------------------------------------------------- streaming


def event(payload) -> bytes:
    """One server-sent event."""
    return b"data: %s\n\n" % json.dumps(payload).encode()


def text_event(text: str) -> bytes:
    """One server-sent event that carries some of the reply."""
    payload = {"choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: %s\n\n" % json.dumps(payload, ensure_ascii=False).encode()


def test_tokens_are_passed_on_one_by_one(server, upstream, chat):
    """While the upstream holds after three chunks the client has already seen three."""
    go_on = threading.Event()
    upstream.hold_after = (3, go_on)
    reader = Reader(server, chat)
    seen = []
    while len(payloads(seen)) < 3:
        seen.append(reader.line())
    assert None not in seen
    assert not go_on.is_set()
    go_on.set()
    assert content(seen + reader.rest()) == upstream.last["answer"]


@pytest.mark.parametrize("stream", [True, False])
def test_the_connection_is_kept_for_the_next_turn(server, upstream, chat, stream):
    """And cut where that one's client hangs up."""
    clients = []

    def answer(handler):
        """Notes the connection that asks."""
        clients.append(handler.client_address)
        handler.chat(handler.request_record["body"])

    upstream.routes = {"/v1/chat/completions": answer}
    for _ in range(2):
        assert say(server.url, chat, stream=stream).text == upstream.last["answer"]
    upstream.hold = threading.Event()
    sock = hang_up_later(server, {"messages": chat})
    upstream.wait_for_chats(3)
    sock.close()
    assert upstream.hangups.acquire(timeout=FOREVER)
    assert len(set(clients)) == 1
    upstream.hold = None
    assert say(server.url, chat, stream=False).text == upstream.last["answer"]


def test_a_stream_whose_end_is_not_told_is_not_waited_for(server, upstream, chat):
    """Its connection is closed, and the next turn gets another one."""
    asked = []

    def answer(handler):
        """Sends all events, and then nothing until the client goes away."""
        asked.append(handler.client_address)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in handler.events(handler.request_record["body"], "It goes on."):
            handler.send_chunk(event)
        handler.close_connection = True
        handler.hold(threading.Event())

    upstream.routes = {"/v1/chat/completions": answer}
    for _ in range(2):
        assert say(server.url, chat).text == "It goes on."
        assert upstream.hangups.acquire(timeout=FOREVER)
    assert len(set(asked)) == 2


def test_a_kept_connection_that_the_server_cuts_is_opened_anew(server, upstream, chat):
    """Some servers close it just when the next request is on its way."""
    asked = []

    def answer(handler):
        """Answers the first request over a connection, and cuts that at the second."""
        asked.append(handler.client_address)
        if asked.count(handler.client_address) > 1:
            handler.close_connection = True
        else:
            handler.chat(handler.request_record["body"])

    upstream.routes = {"/v1/chat/completions": answer}
    for _ in range(3):
        assert say(server.url, chat, stream=False).text == upstream.last["answer"]
    assert [asked.count(client) for client in dict.fromkeys(asked)] == [2, 2, 1]


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_before_the_first_byte_closes_the_upstream_connection(server, upstream, chat, stream):
    upstream.hold = threading.Event()
    sock = hang_up_later(server, {"messages": chat, "stream": stream})
    upstream.wait_for_chats(1)
    sock.close()
    assert upstream.hangups.acquire(timeout=FOREVER)


def read_until(sock: socket.socket, mark: bytes, count: int):
    """Read until the mark has come so many times."""
    received = b""
    while received.count(mark) < count:
        packet = sock.recv(65536)
        assert packet, f"ended after {received!r}"
        received += packet


@pytest.mark.parametrize("header", [b"", b"X-Persona-Memory: off\r\n"], ids=["on", "off"])
def test_hanging_up_mid_stream_closes_the_upstream_connection(server, upstream, chat, header):
    upstream.hold_after = (3, threading.Event())
    sock = hang_up_later(server, {"messages": chat, "stream": True}, header)
    read_until(sock, b"data:", 3)
    sock.close()
    assert upstream.hangups.acquire(timeout=FOREVER)


def test_hanging_up_between_keep_alive_comments_closes_the_upstream_connection(server, upstream, chat, monkeypatch):
    monkeypatch.setattr(persona_memory, "KEEPALIVE_SECONDS", 0.05)
    monkeypatch.setattr(persona_memory, "HEADER_GRACE_SECONDS", 0.05)
    upstream.hold = threading.Event()
    sock = hang_up_later(server, {"messages": chat, "stream": True})
    read_until(sock, b": keep-alive", 2)
    sock.close()
    assert upstream.hangups.acquire(timeout=FOREVER)


def test_the_chat_goes_on_after_a_hang_up(server, upstream, chat):
    upstream.hold_after = (2, threading.Event())
    sock = hang_up_later(server, {"messages": chat, "stream": True})
    upstream.wait_for_chats(1)
    sock.close()
    assert upstream.hangups.acquire(timeout=FOREVER)
    upstream.hold_after = None
    reply = say(server.url, chat)
    assert (reply.status, reply.text) == (200, upstream.last["answer"])


@pytest.mark.parametrize("steering", ["hold", "hold_after"])
def test_keep_alive_comments_while_the_upstream_is_silent(server, upstream, chat, monkeypatch, steering):
    """Before the first byte and between two chunks alike; the reply follows whole."""
    monkeypatch.setattr(persona_memory, "KEEPALIVE_SECONDS", 0.05)
    monkeypatch.setattr(persona_memory, "HEADER_GRACE_SECONDS", 0.05)
    go_on = threading.Event()
    upstream.steer(**{steering: go_on if steering == "hold" else (2, go_on)})
    reader = Reader(server, chat)
    seen = []
    while seen.count(": keep-alive") < 3:
        seen.append(reader.line())
        assert seen[-1] is not None
    go_on.set()
    seen += reader.rest()
    assert reader.status == 200
    assert content(seen) == upstream.last["answer"]
    assert payloads(seen)[-1] == "[DONE]"


@pytest.mark.parametrize("count", [1, 4])
def test_a_cut_stream_ends_with_an_error_event_and_done(server, upstream, chat, count):
    upstream.cut_after = count
    lines = Reader(server, chat).rest()
    *chunks, error, done = payloads(lines)
    assert len(chunks) == count
    assert isinstance(error["error"]["message"], str)
    assert error["error"]["message"]
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_never_comes_is_a_readable_error(server, upstream, chat, stream):
    """Cut before the first byte: the status can still say so."""
    upstream.cut_after = 0
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": chat, "stream": stream}, timeout=FOREVER)
    assert answer.status_code == 502
    assert answer.json()["error"]["message"]


def test_an_error_after_the_headers_went_out_is_an_error_event(server, upstream, chat, monkeypatch):
    """The 200 goes out while the upstream is silent; its 500 then comes as an event with its message."""
    monkeypatch.setattr(persona_memory, "KEEPALIVE_SECONDS", 0.05)
    monkeypatch.setattr(persona_memory, "HEADER_GRACE_SECONDS", 0.05)
    go_on = threading.Event()
    upstream.steer(hold=go_on, status=500, error="the model fell over")
    reader = Reader(server, chat)
    assert reader.line() == ": keep-alive"
    go_on.set()
    error, done = payloads(reader.rest())
    assert "the model fell over" in error["error"]["message"]
    assert done == "[DONE]"


@pytest.mark.parametrize("no_done", [False, True])
def test_every_stream_ends_with_one_done(server, upstream, chat, no_done):
    upstream.no_done = no_done
    received = payloads(Reader(server, chat).rest())
    assert received[-1] == "[DONE]"
    assert received.count("[DONE]") == 1


def test_chunks_without_choices_are_dropped(server, upstream, chat):
    upstream.no_choices = True
    received = payloads(Reader(server, chat).rest())
    assert b'"ping"' in upstream.last["sent"]
    assert all("choices" in payload for payload in received[:-1])


def test_an_error_inside_a_stream_reaches_the_client(server, upstream, chat):
    upstream.events = [text_event("Once"), event({"error": {"message": "overloaded", "code": 503}})]
    received = payloads(Reader(server, chat).rest())
    assert received[0]["choices"][0]["delta"]["content"] == "Once"
    assert received[1]["error"]["message"] == "overloaded"
    assert received[-1] == "[DONE]"


def test_crlf_streams(server, upstream, chat):
    upstream.crlf = True
    lines = Reader(server, chat).rest()
    assert content(lines) == upstream.last["answer"]
    assert payloads(lines)[-1] == "[DONE]"


def test_events_may_be_torn_anywhere(server, upstream, chat):
    """The upstream's packets end inside characters and between the two line ends of an event."""
    whole = text_event("smörgås 🐉 ") + text_event("ещё") + b"data: [DONE]\n\n"
    upstream.events = [whole[place : place + 1] for place in range(len(whole))]
    assert content(Reader(server, chat).rest()) == "smörgås 🐉 ещё"


def test_odd_but_legal_event_streams(server, upstream, chat):
    """Comments, other fields, no space after the colon, events without a blank last line."""
    upstream.events = [
        b": PROCESSING\n\n",
        b"event: message\nid: 7\n",
        text_event("one "),
        text_event("two").replace(b"data: ", b"data:"),
        b"data: [DONE]",
    ]
    lines = Reader(server, chat).rest()
    assert content(lines) == "one two"
    assert payloads(lines).count("[DONE]") == 1


def test_a_plain_answer_to_a_stream_request_is_not_lost(server, upstream, chat):
    """Some backends ignore `stream`: the client gets the text or an error, never an empty turn."""
    plain = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "All at once."}, "finish_reason": "stop"}],
    }
    upstream.routes = {"/v1/chat/completions": plain}
    reply = say(server.url, chat)
    assert reply.error or reply.text == "All at once."


@pytest.mark.parametrize("stream", [False, True])
def test_an_html_answer_is_an_error(server, upstream, chat, stream):
    upstream.routes = {"/v1/chat/completions": b"<html>Welcome to the router</html>"}
    reply = say(server.url, chat, stream=stream)
    assert reply.error
    assert reply.text == ""
    assert "<html" not in reply.error


@pytest.mark.parametrize("steering", ["hold", "hold_after"])
def test_forty_slow_streams_do_not_block_another_chat(data_dir, upstream, chat, steering):
    """As long as the upstream takes so many at once."""
    with LocalServer(settings(data_dir, upstream.url, upstream_limit=64)) as server:
        forty_slow_streams(server, upstream, chat, steering)


def forty_slow_streams(server, upstream, chat, steering):
    """Forty streams stand still; another chat's turns go through."""
    go_on = threading.Event()
    upstream.steer(**{steering: go_on if steering == "hold" else (1, go_on)})
    slow = [Reader(server, [{"role": "user", "content": f"{steering} slow chat {n}"}]) for n in range(40)]
    upstream.wait_for_chats(40)
    upstream.steer(hold=None, hold_after=None)
    assert say(server.url, chat).text == upstream.last["answer"]
    assert say(server.url, chat, stream=False).text == upstream.last["answer"]
    assert httpx.get(f"{server.url}/health", timeout=FOREVER).status_code == 200
    assert not go_on.is_set()
    go_on.set()
    answers = {content(reader.rest()) for reader in slow}
    assert answers == {request["answer"] for request in upstream.chats[:40]}
    assert len(answers) == 40


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503, 529])
def test_upstream_errors_keep_status_and_message(server, upstream, chat, status, stream):
    upstream.steer(status=status, error=f"no luck, {status}")
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": chat, "stream": stream}, timeout=FOREVER)
    assert answer.status_code == status
    assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}
    assert f"no luck, {status}" in answer.json()["error"]["message"]
    assert len(upstream.chats) == (persona_memory.ATTEMPTS if status in persona_memory.RETRIED_STATUSES else 1)


def test_retry_after_is_passed_on(server, upstream, chat):
    """A wait that is too long to be waited for here is the client's to know."""
    upstream.steer(status=429, error="slow down", headers={"Retry-After": "170"})
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": chat}, timeout=FOREVER)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "170")


@pytest.mark.parametrize(
    "body",
    [
        {"error": "model 'x' not found"},
        {"detail": "model 'x' not found"},
        {"message": "model 'x' not found"},
        {"object": "error", "message": "model 'x' not found", "code": 40401},
        b'[{"error": {"message": "model \'x\' not found"}}]',
        b"model 'x' not found",
    ],
    ids=["string", "detail", "message", "flat", "list", "text"],
)
def test_other_backends_error_shapes_become_openais(server, upstream, chat, body):
    upstream.steer(status=404, error=body)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": chat}, timeout=FOREVER)
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "model 'x' not found" in answer.json()["error"]["message"]


def test_an_html_error_page_never_reaches_the_client(server, upstream, chat):
    upstream.steer(status=502, error=b"<!DOCTYPE html><html><body><h1>502 Bad Gateway</h1></body></html>")
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": chat}, timeout=FOREVER)
    assert answer.status_code == 502
    assert answer.json()["error"]["message"]
    assert "<html" not in answer.text


def test_an_upstream_that_is_not_there_is_a_readable_502(data_dir):
    with LocalServer(settings(data_dir, f"http://127.0.0.1:{free_port()}/v1")) as alone:
        for stream in (False, True):
            answer = httpx.post(
                f"{alone.url}/v1/chat/completions",
                timeout=FOREVER,
                json={"messages": [{"role": "user", "content": "hello?"}], "stream": stream},
            )
            message = answer.json()["error"]["message"]
            assert answer.status_code == 502
            assert "your model's server" in message
            assert "Traceback" not in message
            assert "object at 0x" not in message
        models = httpx.get(f"{alone.url}/v1/models", timeout=FOREVER)
        assert models.status_code == 502
        assert models.json()["error"]["message"]
        assert httpx.get(f"{alone.url}/health", timeout=FOREVER).status_code == 200


def test_an_upstream_that_comes_back_is_used_again(data_dir):
    """A pooled connection that died with the upstream does not fail the next turn."""
    with Upstream() as first, LocalServer(settings(data_dir, first.url)) as running:
        hello = [{"role": "user", "content": "are you there?"}]
        assert say(running.url, hello).status == 200
        first.close()
        assert say(running.url, hello).status == 502
        with Upstream(port=first.port) as second:
            assert say(running.url, hello).text == second.last["answer"]


@pytest.mark.parametrize(("base", "hint"), [("/openai", True), ("/v1", False)])
def test_an_address_without_its_version_is_told_with_it(upstream, data_dir, chat, base, hint):
    """A 404 for the address says what was meant; one for the model does not."""
    upstream.steer(status=404, error="Not Found")
    with LocalServer(settings(data_dir, upstream.root + base), ready=False) as running:
        assert (f"Did you mean --upstream {upstream.root}{base}/v1?" in say(running.url, chat).error) is hint
        upstream.error = "The model `x` does not exist"
        assert "Did you mean" not in say(running.url, chat).error


# ---------------------------------------------------------------------------- how a model wants to be asked


def refusing(rules: list[tuple]):
    """An upstream that refuses requests as the rules say: each a test of the body, and the error's words and fields."""

    def answer(body):
        for applies, message, more in rules:
            if applies(body):
                return 400, "application/json", json.dumps({"error": {"message": message, **more}}).encode()
        return 200, "application/json", json.dumps(completion(body, "At last.")).encode()

    return answer


def has_role(role):
    return lambda body: any(message["role"] == role for message in body["messages"])


ASKED = {"max_tokens": 900, "temperature": 0.3, "top_p": 0.9, "seed": 7, "frequency_penalty": 0.5, "stop": ["x"]}
NO_MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
ONE_TEMPERATURE = (
    "Unsupported value: 'temperature' does not support 0.3 with this model. Only the default (1) is supported."
)
TOO_MANY = "max_tokens is too large: 900. This model supports at most 512 completion tokens, whereas you provided 900."
EXTRA = [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]


def asked_without(*names: str) -> dict:
    return {name: value for name, value in ASKED.items() if name not in names}


REFUSALS = {  # kind -> (rules, what is sent in the end, requests until then)
    "max_tokens": (
        [
            (
                lambda body: "max_tokens" in body,
                NO_MAX_TOKENS,
                {"param": "max_tokens", "code": "unsupported_parameter"},
            ),
            (lambda body: body.get("temperature", 1) != 1, ONE_TEMPERATURE, {"param": "temperature"}),
        ],
        asked_without("max_tokens", "temperature") | {"max_completion_tokens": 900},
        3,
    ),
    "too many": (
        [(lambda body: body["max_tokens"] > 512, TOO_MANY, {"param": "max_tokens"})],
        ASKED | {"max_tokens": 512},
        2,
    ),
    "penalties": (
        [(lambda body: "frequency_penalty" in body, "Penalty is not enabled for this model", {})],
        asked_without("frequency_penalty"),
        2,
    ),
    "both": (
        [(lambda body: "top_p" in body, "`temperature` and `top_p` cannot both be specified for this model.", {})],
        asked_without("top_p"),
        2,
    ),
    "extra": ([(lambda body: "seed" in body, "", {"detail": EXTRA})], asked_without("seed"), 2),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", REFUSALS)
def test_what_a_model_refuses_is_learned_from_its_error(server, upstream, chat, model, kind, stream):
    """It is asked again at once, and from then on in the right way."""
    rules, sent, requests = REFUSALS[kind]
    upstream.raw = refusing(rules)
    for turn in (requests, requests + 1):
        reply = say(server.url, chat, stream=stream, model=f"{model} {stream}", **ASKED)
        assert (reply.text, reply.error, len(upstream.chats)) == ("At last.", None, turn)
        assert {k: v for k, v in upstream.last["body"].items() if k in {**ASKED, "max_completion_tokens": 0}} == sent
    say(server.url, chat, model=f"{model} another", **ASKED | {"seed": 8})
    assert upstream.chats[turn]["body"]["seed"] == 8  # what one model refuses is none of another's business


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("temperature must be between 0 and 1", None),
        ("Invalid value for 'temperature'", "temperature"),
        ("The model `x` does not support images", None),
        ("Please stop, this is not supported", None),
    ],
)
def test_other_refusals_are_the_clients_to_know(server, upstream, chat, model, message, param):
    upstream.raw = refusing([(lambda body: True, message, {"param": param})])
    reply = say(server.url, chat, model=model, **ASKED)
    assert message in reply.error
    assert len(upstream.chats) == 1


@pytest.mark.parametrize(
    "words",
    [
        "System role not supported",
        "Developer instruction is not enabled for models/gemma-3-27b-it",
        "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
    ],
)
def test_a_model_without_a_system_role_reads_the_text_from_the_user(server, upstream, chat, model, words):
    upstream.raw = refusing([(has_role("system"), words, {})])
    say(server.url, chat, model=model)
    (message,) = upstream.last["body"]["messages"]
    assert message == {"role": "user", "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}


def test_a_server_that_knows_no_developer_gets_a_system_message(server, upstream, chat, model):
    upstream.raw = refusing([(has_role("developer"), "'developer' is not one of ['system', 'user', 'assistant']", {})])
    say(server.url, [chat[0] | {"role": "developer"}, chat[1]], model=model)
    assert upstream.last["body"]["messages"] == chat


def test_system_text_without_a_user_to_say_it():
    messages = [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "system", "content": "Late."}]
    told = persona_memory.without_system([{"role": "system", "content": "Mira."}, *messages])
    assert told[0]["content"] == [{"type": "text", "text": "Mira."}, {"type": "image_url"}]
    assert told[1] == {"role": "user", "content": "Late."}


class Thinker:
    """A model that needs so many tokens before its first word."""

    def __init__(self, needs: int, hidden: bool):
        self.needs, self.hidden = needs, hidden

    def __call__(self, body):
        limit = body.get("max_tokens") or body.get("max_completion_tokens")
        if limit >= self.needs:
            answer = completion(body, "A summary.")
        else:
            answer = completion(body, "")
            answer["choices"][0]["finish_reason"] = "length"
            answer["choices"][0]["message"] |= {} if self.hidden else {"reasoning_content": "Hm. " * 40}
        return 200, "application/json", json.dumps(answer).encode()


@pytest.mark.parametrize("hidden", [False, True])
def test_requests_of_our_own_get_room_for_thoughts(upstream, data_dir, hidden):
    """A summary that was all thoughts is asked for with more room and low effort; the next one at once."""
    asked = persona_memory.make_upstream(settings(data_dir, upstream.url), persona_memory.Metrics())
    upstream.raw = Thinker(20_000, hidden)
    body = {"model": "thinker", "messages": [{"role": "user", "content": "Summarise."}], "max_tokens": 400}
    for requests in (3, 4):
        answer = asked.complete(body, persona_memory.Call(background=True))
        assert answer["choices"][0]["message"]["content"] == "A summary."
        assert len(upstream.chats) == requests
        assert upstream.last["body"]["reasoning_effort"] == "low"
    assert "reasoning_effort" not in asked._dialects.get("thinker").request(body)  # a client's request is the client's


def test_thoughts_without_end_are_given_up(upstream, data_dir):
    """Three requests, and an error that says what to do."""
    asked = persona_memory.make_upstream(settings(data_dir, upstream.url), persona_memory.Metrics())
    upstream.raw = Thinker(10**9, False)
    body = {"model": "thinker", "messages": [{"role": "user", "content": "Summarise."}], "max_tokens": 400}
    with pytest.raises(persona_memory.NoReply, match="before the first word"):
        asked.complete(body, persona_memory.Call(background=True))
    assert len(upstream.chats) == 3


# ---------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("status", "error", "blocked"),
    [
        (400, {"message": "The response was filtered", "code": "content_filter"}, True),
        (400, {"message": "Rejected.", "code": "content_policy_violation"}, True),
        (400, {"message": "Content Exists Risk"}, True),
        (400, {"message": "Output data may contain inappropriate content.", "code": "data_inspection_failed"}, True),
        (403, {"message": 'm requires moderation. Your input was flagged for "violence".', "code": 403}, True),
        (400, {"message": "Gemini refuses the prompt: PROHIBITED_CONTENT."}, True),
        (400, {"message": "Invalid content type in messages[0]"}, False),
        (429, {"message": "moderation is busy"}, False),
        (401, {"message": "invalid key", "code": "invalid_api_key"}, False),
    ],
)
def test_what_a_filter_refused(status, error, blocked):
    assert persona_memory.is_blocked(persona_memory.UpstreamError(status, error)) is blocked


# ---------------------------------------------------------------------------- prompts too long

REQUESTED = (
    "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4000 in the "
    "messages, 1000 in the completion)."
)


@pytest.mark.parametrize(
    ("message", "more", "prompt", "context"),
    [
        ("maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.", {}, 9000, 8192),
        (REQUESTED, {"code": "context_length_exceeded"}, 4000, 4096),
        ("the request exceeds the available context size", {"n_prompt_tokens": 9000, "n_ctx": 2048}, 9000, 2048),
        ("the request exceeds the available context size (9000 tokens, 2048)", {}, 9000, 2048),
        ("request (8230 tokens) exceeds the available context size (8192 tokens), try increasing it", {}, 8230, 8192),
        ("prompt is too long: 208310 tokens > 200000 maximum", {}, 208310, 200000),
        ("The input token count (120000) exceeds the maximum number of tokens allowed (104857).", {}, 120000, 104857),
        ("`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 1900", {}, 0, 2048),
        ("Too long.", {"code": "context_length_exceeded"}, 0, 0),
    ],
)  # fmt: skip
def test_how_much_a_prompt_was_too_long(message, more, prompt, context):
    error = persona_memory.UpstreamError(400, {"message": message, **more})
    assert persona_memory.exceeded_context(error) == persona_memory.Overflow(prompt, context)


@pytest.mark.parametrize(
    "message", ["max_tokens is too large: 8000. This model supports at most 4096.", "no such model", ""]
)
def test_other_errors_are_about_no_length(message):
    assert persona_memory.exceeded_context(persona_memory.UpstreamError(400, {"message": message})) is None


@given(
    roles=st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1, max_size=12),
    tokens=st.integers(0, 200),
)
def test_without_the_oldest(roles, tokens):
    """What stays is the head up to the first message of the chat, and an end that holds the newest user message; no
    tool's result begins it."""
    messages = [{"role": role, "content": f"{role} {place} says some words"} for place, role in enumerate(roles)]
    first = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    kept = persona_memory.without_oldest(messages, tokens, first)
    gone = len(messages) - len(kept)
    assert kept == [*messages[:first], *messages[first + gone :]]
    newest = [m for m in messages if m["role"] == "user"][-1:]
    assert not newest or newest[0] in kept
    if gone and first < len(kept):
        assert kept[first]["role"] != "tool"
        assert newest[0] is kept[first] or not (roles[first] == "user" and kept[first]["role"] == "assistant")


@pytest.mark.parametrize(
    ("ours", "theirs", "ratio"),
    [(1000, 1000, 1), (1000, 700, 1), (1000, 1210, 1.25), (1000, 9000, 4), (300, 520, 1.75)],
)
def test_the_ratio_of_a_models_tokens_to_ours(ours, theirs, ratio):
    assert persona_memory.token_ratio(ours, theirs) == pytest.approx(ratio)


# ---------------------------------------------------------------------------- context size

LONG = [
    {"role": "user" if n % 2 else "assistant", "content": f"Line {n}: " + "the rain goes on over the grey sea " * 4}
    for n in range(1, 302)
]


def words_sent(running, upstream, model: str) -> int:
    """How many words of a long chat are sent upstream."""
    reply = say(running.url, [{"role": "system", "content": "You are Mira."}, *LONG], model=model)
    assert reply.status == 200
    return sum(len(message["content"].split()) for message in upstream.last["body"]["messages"])


def probes(model: str) -> dict:
    """What each backend says when a model's context is 1500 tokens."""
    return {
        "llama.cpp": {"context": 1500},
        "KoboldCpp": {"routes": {"/api/extra/true_max_context_length": {"value": 1500}}},
        "LM Studio": {
            "routes": {
                "/api/v0/models": {
                    "data": [
                        {"id": "other", "state": "not-loaded", "max_context_length": 4096},
                        {"id": model, "state": "loaded", "max_context_length": 131072, "loaded_context_length": 1500},
                    ]
                }
            }
        },
        "LM Studio, older": {
            "routes": {"/api/v0/models": {"data": [{"id": model, "state": "loaded", "max_context_length": 1500}]}}
        },
        "Ollama, loaded": {
            "routes": {"/api/ps": {"models": [{"name": model, "model": model, "context_length": 1500}]}}
        },
        "Ollama, not loaded": {
            "routes": {
                "/api/ps": {"models": []},
                "/api/show": {
                    "parameters": 'stop                           "<|eot|>"\nnum_ctx                        1500',
                    "model_info": {"general.architecture": "llama", "llama.context_length": 131072},
                },
            }
        },
        "TabbyAPI": {"routes": {"/v1/model": {"id": model, "parameters": {"max_seq_len": 1500}}}},
        "OpenRouter": {"models": [{"id": "other", "context_length": 9000}, {"id": model, "context_length": 1500}]},
        "vLLM": {"models": [{"id": model, "object": "model", "max_model_len": 1500}]},
    }


@pytest.mark.parametrize("backend", probes(""))
def test_the_context_size_is_asked_of_the_upstream(server, upstream, model, backend):
    """A chat of 9900 words is cut to what fits, and not to much less."""
    upstream.steer(**probes(model)[backend])
    assert 300 < words_sent(server, upstream, model) < 1500


WHOLE = 9900  # words of the long chat


def test_a_guessed_context_cuts_nothing(server, upstream, model):
    """Where nobody says how much a model takes, all that the client shows is sent."""
    assert words_sent(server, upstream, model) > WHOLE


LINE_IN_CHINESE = "灯塔看守人在暴风雨的夜里数着海上的船只，把风向写进那本旧册子。"
PICTURE = {"type": "image_url", "image_url": {"url": "https://pictures.example/1.png"}}


@pytest.mark.parametrize(
    "contents",
    [
        [f"第{n}句：" + LINE_IN_CHINESE * 6 for n in range(33)],
        [[{"type": "text", "text": f"Picture {n}"}, PICTURE] if n % 2 == 0 else f"Seen {n}" for n in range(23)],
    ],
    ids=["Chinese", "pictures"],
)
def test_a_guessed_context_cuts_nothing_that_takes_more_tokens_than_it_looks(server, upstream, model, contents):
    """In Chinese a sign takes a token and more, and a picture takes hundreds."""
    chat = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    assert say(server.url, chat, model=model).status == 200
    assert [m["content"] for m in upstream.last["body"]["messages"]] == contents


@pytest.mark.parametrize("max_tokens", [300, 9000])
def test_a_guessed_context_refuses_nothing(server, upstream, model, max_tokens):
    """A card of twice the guess, and a reply that is longer than it."""
    card = {"role": "system", "content": "The tower has another floor. " * 2500}
    reply = say(server.url, [card, *LONG[-3:]], model=model, max_tokens=max_tokens)
    assert (reply.status, reply.error) == (200, None)
    assert [m["content"] for m in upstream.last["body"]["messages"][:1]] == [card["content"]]


def test_a_known_context_refuses_only_what_the_model_cannot_take(server, upstream, model):
    """Prompts are made for 32768 tokens; a card that is larger than that fits into a model that takes more."""
    card = {"role": "system", "content": "The tower has another floor. " * 6000}
    upstream.models = [{"id": model, "context_length": 131072}, {"id": f"{model} small", "context_length": 32768}]
    assert say(server.url, [card, *LONG[-3:]], model=model).status == 200
    refused = say(server.url, [card, *LONG[-3:]], model=f"{model} small")
    assert refused.status == 400
    assert "maximum context length is 32768 tokens" in refused.error  # the words that clients' libraries look for


class Narrow:
    """A model that counts more tokens than this program, and takes so many of them."""

    def __init__(self, context: int, ratio: float = 1.0, says: bool = True):
        self.context, self.ratio, self.says = context, ratio, says

    def __call__(self, body):
        tokens = int(self.ratio * sum(map(persona_memory.message_tokens, body["messages"])))
        if tokens > self.context:
            numbers = {"n_prompt_tokens": tokens, "n_ctx": self.context} if self.says else {}
            error = {"message": "The context size is exceeded.", "type": "exceed_context_size_error", **numbers}
            return 400, "application/json", json.dumps({"error": error}).encode()
        answer = completion(body, "It fits.") | {"usage": {"prompt_tokens": tokens, "completion_tokens": 3}}
        return 200, "application/json", json.dumps(answer).encode()


@pytest.mark.parametrize(("says", "context", "tries"), [(True, 6000, 2), (False, 6000, 2), (False, 2600, 4)])
def test_a_prompt_that_is_too_long_loses_its_oldest_messages(server, upstream, model, says, context, tries):
    """It is asked again, and says so; card and question stay, and the next turn is made to fit."""
    upstream.raw = Narrow(context, 1.3, says)
    card = {"role": "system", "content": "You are Mira."}
    lines = [{**m, "content": f"{m['content']}({says}, {context})"} for m in LONG[-120:]]  # a chat of its own
    for turn, requests in enumerate((tries, tries + 1)):
        question = {"role": "user", "content": f"What do you see, {turn}?"}
        shown = [card, *lines, question]
        reply = say(server.url, shown, stream=False, model=model, max_tokens=100, chat_id=model)
        assert (reply.text, len(upstream.chats)) == ("It fits.", requests)
        sent = upstream.last["body"]["messages"]
        assert sent[0] == card and sent[-1]["content"].endswith(question["content"])
        assert sent[1:-1] == lines[-len(sent[1:-1]) :]
        assert ("lost its oldest messages" in reply.memory) is (turn == 0)


@pytest.mark.parametrize("says", [True, False])
def test_what_memory_adds_goes_before_the_turn_fails(server, upstream, model, says):
    """A client that shows only its newest message is answered by a model that has no room for the chat behind it."""
    card, question = {"role": "system", "content": "You are Mira."}, {"role": "user", "content": f"Line 7? ({says})"}
    lines = [{**m, "content": f"{m['content']}({says}, {model})"} for m in LONG[:100]]
    say(server.url, [card, *lines[1:], lines[0]], stream=False, model=f"wide {model}", chat_id=model)
    upstream.reset()
    upstream.raw = Narrow(persona_memory.prompt_tokens([card, question]) + 10, says=says)
    reply = say(server.url, [card, question], stream=False, model=model, max_tokens=1, chat_id=model)
    assert (reply.status, reply.text) == (200, "It fits.")
    prompts = [request["body"]["messages"] for request in upstream.chats]
    assert len(prompts[0]) > 50 and prompts[-1] == [card, question]
    assert all(prompt[0]["content"].startswith(card["content"]) for prompt in prompts)


def test_a_small_models_tokens_are_learned_from_its_error(server, upstream, model):
    """Also where a whole prompt has some hundred tokens: it is refused once, not at every turn."""
    upstream.steer(raw=Narrow(512, 1.8), models=[{"id": model, "context_length": 512}])
    card = {"role": "system", "content": "You are Mira."}
    for turn, requests in enumerate((2, 3)):
        shown = [card, *LONG[-15:], {"role": "user", "content": f"And now, {turn}?"}]
        reply = say(server.url, shown, stream=False, model=model, max_tokens=16, chat_id=model)
        assert (reply.status, len(upstream.chats)) == (200, requests)


def test_a_prompt_that_stays_too_long_is_an_error(server, upstream, model):
    upstream.raw = Narrow(10)
    reply = say(server.url, [{"role": "system", "content": "You are Mira."}, *LONG[-9:]], model=model)
    assert "context size" in reply.error
    assert len(upstream.chats) == 2


def test_a_false_alarm_makes_no_prompt_shorter(server, upstream, model):
    """A server that refuses every prompt for its length, without a number, has told nothing of the model."""
    upstream.raw = Narrow(0, says=False)
    assert "context size" in say(server.url, LONG, model=model).error
    assert len(upstream.chats) == 1 + persona_memory.MOST_SHORTENED
    upstream.reset()
    assert words_sent(server, upstream, model) > WHOLE


def test_a_models_tokens_are_learned_from_its_answers(server, upstream, model):
    """A model that counts 1.5 tokens for one of ours gets two thirds of the prompt, before it has to refuse one."""
    upstream.steer(raw=Narrow(10**6, 1.5), models=[{"id": model, "context_length": 6000}])
    words = [words_sent(server, upstream, model) for _ in range(2)]
    assert 0.5 * words[0] < words[1] < 0.8 * words[0]


def test_a_refused_model_list_does_not_fail_the_turn(server, upstream, model):
    upstream.models = []
    assert words_sent(server, upstream, model) > WHOLE


def test_an_answer_that_makes_no_sense_is_not_believed(server, upstream, model):
    upstream.routes = {
        "/props": {"default_generation_settings": {"n_ctx": "many"}},
        "/api/show": b"<html>",
        "/api/extra/true_max_context_length": {"value": 0},
        "/api/v0/models": [],
        "/api/ps": None,
    }
    assert words_sent(server, upstream, model) > WHOLE


def test_a_context_that_the_upstream_names_too_large_is_capped(server, upstream, model):
    """With the cap of 32768 all of the long chat fits; the probe itself is not the chat's problem."""
    upstream.context = 10_000_000
    assert words_sent(server, upstream, model) > 9900


def test_the_setting_beats_what_the_upstream_says(upstream, data_dir, model):
    upstream.context = 16384
    with LocalServer(settings(data_dir, upstream.url, context=1500), ready=False) as running:
        assert 300 < words_sent(running, upstream, model) < 1500


@pytest.mark.parametrize(
    ("entry", "context"),
    [
        ({"context_length": 131072}, 131072),
        ({"context_window": 8192, "max_completion_tokens": 4096}, 8192),
        ({"max_context_length": 32768}, 32768),
        ({"max_model_len": "4096"}, 4096),
        ({"meta": {"n_ctx": 2048, "n_ctx_train": 131072}}, 2048),
        ({"model_info": {"max_input_tokens": 200000}}, 200000),
        ({"top_provider": {"context_length": None}, "context_size": 16384.0}, 16384),
        ({"capabilities": {"chat": True}, "pricing": {"context_length": 1}, "created": 5000}, None),
        ({"context_length": -1}, None),
        ({"context_length": True}, None),
        (None, None),
    ],
)
def test_the_context_is_read_under_every_name(entry, context):
    assert persona_memory.stated_context(entry) == context


@pytest.mark.parametrize(
    ("listed", "ids"),
    [
        ({"object": "list", "data": [{"id": "a"}, {"id": "b"}]}, ["a", "b"]),
        ([{"id": "a"}, {"id": "b"}], ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        ({"models": [{"name": "a", "size": 1}]}, ["a"]),
        ({"data": [None, 7, {"id": None}, {"id": 3}, {"id": "a" * 201}, {"id": "a"}]}, ["a"]),
        ({"data": []}, []),
        ({"data": {"id": "a"}}, None),
        ({"object": "list"}, None),
        ("a", None),
        (None, None),
    ],
)
def test_lists_of_models_in_every_frame(listed, ids):
    entries = persona_memory.model_entries(listed)
    assert entries is ids is None or [entry["id"] for entry in entries] == ids


@pytest.mark.parametrize(
    ("pasted", "meant"),
    [
        ("http://127.0.0.1:5001", "http://127.0.0.1:5001/v1"),
        ("http://127.0.0.1:5001/", "http://127.0.0.1:5001/v1"),
        ("http://127.0.0.1:5001/v1/", "http://127.0.0.1:5001/v1"),
        ("http://127.0.0.1:5001/api", "http://127.0.0.1:5001/v1"),
        ("http://127.0.0.1:5001/api/v1/generate", "http://127.0.0.1:5001/v1"),
        ("http://127.0.0.1:11434/api/chat", "http://127.0.0.1:11434/v1"),
        ("http://127.0.0.1:11434/api/tags", "http://127.0.0.1:11434/v1"),
        ("http://127.0.0.1:1234/v1/models", "http://127.0.0.1:1234/v1"),
        ("http://127.0.0.1:1234/v1/completions", "http://127.0.0.1:1234/v1"),
        ("http://127.0.0.1:1234/v1/chat/completions/", "http://127.0.0.1:1234/v1"),
        ("https://openrouter.ai/api/v1/chat/completions", "https://openrouter.ai/api/v1"),
        ("https://api.groq.com/openai/v1", "https://api.groq.com/openai/v1"),
        (
            "https://x.openai.azure.com/openai/deployments/gpt/chat/completions?api-version=2026-01-01",
            "https://x.openai.azure.com/openai/deployments/gpt",
        ),
    ],
)
def test_pasted_addresses_become_base_urls(pasted, meant):
    assert persona_memory.base_url(pasted) == meant


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:5001/v1", True),
        ("http://[::1]:5001/v1", True),
        ("http://192.168.1.20/v1", True),
        ("http://[fd00::7]/v1", True),
        ("http://ollama:11434/v1", True),
        ("http://host.docker.internal:5001/v1", True),
        ("http://nas.local/v1", True),
        ("https://openrouter.ai/api/v1", False),
        ("https://8.8.8.8/v1", False),
        ("https://local.example.com/v1", False),
    ],
)
def test_only_servers_of_ones_own_are_probed(url, local):
    assert persona_memory.is_on_local_network(url) is local


def test_the_query_of_an_address_stays(upstream, data_dir, chat):
    """Azure's servers want their api-version."""
    with LocalServer(settings(data_dir, f"{upstream.url}?api-version=7"), ready=False) as running:
        assert say(running.url, chat).status == 200
    assert upstream.requests[-1]["path"] == "/v1/chat/completions?api-version=7"


def test_an_address_without_its_scheme_is_told_with_it(data_dir):
    with pytest.raises(persona_memory.SettingsError, match="Did you mean --upstream http://localhost:1234/v1?"):
        persona_memory.make_upstream(settings(data_dir, "localhost:1234/v1"), persona_memory.Metrics())


# ---------------------------------------------------------------------------- keys and models


def authorization(server, upstream, chat, **headers) -> str | None:
    """The Authorization header that the upstream saw."""
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": chat}, headers=headers, timeout=FOREVER)
    assert answer.status_code == 200
    return {key.lower(): value for key, value in upstream.last["headers"].items()}.get("authorization")


def test_the_clients_key_is_passed_on(server, upstream, chat):
    assert authorization(server, upstream, chat, Authorization="Bearer sk-mine") == "Bearer sk-mine"


@pytest.mark.parametrize("value", ["Bearer undefined", "Bearer null", "Bearer"])
def test_a_key_that_is_none_is_not_passed_on(server, upstream, chat, value):
    """SillyTavern without a saved key sends the word undefined."""
    assert authorization(server, upstream, chat, Authorization=value) is None


def test_no_key_at_all(server, upstream, chat):
    assert authorization(server, upstream, chat) is None


def test_a_clients_odd_key_is_refused_in_words(server, upstream, chat):
    """One that was not copied whole, as pages show them."""
    odd = {"Authorization": "Bearer sk-\u2026rest".encode()}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": chat}, headers=odd, timeout=FOREVER)
    assert answer.status_code == 400 and "API key" in answer.json()["error"]["message"]
    assert not upstream.requests


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "gopher://127.0.0.1:1"), ("ALL_PROXY", "http://127.0.0.1:x"), ("ALL_PROXY", "socks5://[::1]:1"),
        ("SSL_CERT_FILE", "/missing/ca.pem"),
    ],
)  # fmt: skip
def test_what_is_of_no_use_in_the_environment_is_named(tmp_path, monkeypatch, upstream, name, value):
    """It may be there for other programs; a server on this machine is asked without it."""
    monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "socksio", None)  # which not everybody has
    given, call = settings(tmp_path, "https://llm.example/v1"), persona_memory.Call()
    remote = persona_memory.make_upstream(given, persona_memory.Metrics())
    local = persona_memory.make_upstream(settings(tmp_path, upstream.url), persona_memory.Metrics())
    for ask in (lambda: remote.models(call), lambda: remote.complete({"messages": []}, call)):
        with pytest.raises(persona_memory.UpstreamUnavailable, match=name):
            ask()
    assert remote.context_length("m", call) is None
    assert local.models(call)


@pytest.mark.skipif(importlib.util.find_spec("socks") is not None, reason="what is missing is there")
def test_gemini_behind_a_socks_proxy_says_what_that_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://[::1]:1")
    given = settings(tmp_path, "gemini", upstream_key="k", gemini_endpoint="https://llm.example")
    with pytest.raises(persona_memory.UpstreamUnavailable, match="pip install socksio pysocks"):
        persona_memory.make_upstream(given, persona_memory.Metrics()).models(persona_memory.Call(retry=False))


def test_the_upstream_key_replaces_the_clients(upstream, data_dir, chat):
    with LocalServer(settings(data_dir, upstream.url, upstream_key="sk-house"), ready=False) as running:
        assert authorization(running, upstream, chat, Authorization="Bearer sk-mine") == "Bearer sk-house"
        httpx.get(f"{running.url}/v1/models", timeout=FOREVER)
        listing = next(seen for seen in reversed(upstream.requests) if seen["path"] == "/v1/models")
        assert listing["headers"]["Authorization"] == "Bearer sk-house"


def test_the_programs_own_key_is_not_the_upstreams(upstream, data_dir, chat):
    """A key that opens this program is not shown to the upstream."""
    with LocalServer(settings(data_dir, upstream.url, api_key="sk-door"), ready=False) as running:
        assert authorization(running, upstream, chat, Authorization="Bearer sk-door") is None


def test_the_model_setting_overrides_the_request(upstream, data_dir, chat):
    with LocalServer(settings(data_dir, upstream.url, model="house-model"), ready=False) as running:
        assert say(running.url, chat, model="wished-for").status == 200
    assert upstream.last["body"]["model"] == "house-model"


def test_a_request_without_a_model_gets_the_upstreams_first(server, upstream, chat):
    httpx.post(f"{server.url}/v1/chat/completions", json={"messages": chat}, timeout=FOREVER)
    assert upstream.last["body"]["model"] == "fake-model"
