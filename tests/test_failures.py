"""Every way an upstream can fail: what the client gets, that the chat goes on, and what memory holds afterwards.

The client sends the failing turn as raw HTTP and the turns after it with the openai client; the upstreams are real
HTTP servers, to one of which google-generativeai speaks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import gemini
import httpx
import pytest
from fakes import API, STEERING, LocalServer, Upstream, chunk, client, completion, free_port, get, pieces, say, settings
from gemini import GEMINI_STEERING, Gemini

import persona_memory

FOREVER = 60
KEY = "house-key-of-the-upstream"
KINDS = ("gemini", "openai")
HELD = "held"  # in steering: an event that the test lets go
GOOD: dict = {}


@pytest.fixture(scope="module", autouse=True)
def short_pauses():
    """Between two tries nobody waits for long: the pauses are not the matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(persona_memory, "FIRST_PAUSE_SECONDS", 0.01)
        patch.setattr(persona_memory, "PAUSE_JITTER_SECONDS", 0.005)
        yield


# ---------------------------------------------------------------------------- upstreams and servers


class Scripted:
    """An upstream that follows a script: a steering for each chat completion in turn, the last one for the rest."""

    defaults: dict
    script: tuple = ()

    def play(self, *script: dict):
        """Forget what was and begin a script."""
        self.script = ()
        self.reset()
        self.script = script
        self.turn_page()

    def turn_page(self):
        """Behave as the next page of the script says."""
        if self.script:
            page, *self.script = self.script
            self.steer(**self.defaults | page)

    def record(self, request: dict):
        """A request takes its steering just before it is recorded."""
        super().record(request)
        if request in self.chats[-1:]:
            self.turn_page()


class ScriptedOpenAI(Scripted, Upstream):
    """An OpenAI-compatible server with a script."""

    defaults = STEERING


class ScriptedGemini(Scripted, Gemini):
    """A Gemini API with a script."""

    defaults = GEMINI_STEERING


def settings_for(kind: str, data, url: str, **more) -> persona_memory.Settings:
    """Settings for a proxy in front of an upstream of a kind."""
    if kind == "gemini":
        return settings(data, "gemini", upstream_key=KEY, gemini_endpoint=url, model="gemini-flash-latest", **more)
    return settings(data, url, upstream_key=KEY, **more)


@pytest.fixture(scope="module")
def houses(tmp_path_factory):
    """For each kind an upstream, a proxy before it, and one that gives it up after a second of silence."""
    with contextlib.ExitStack() as stack:
        yield {kind: open_house(stack, kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def open_house(stack: contextlib.ExitStack, kind: str, folder) -> SimpleNamespace:
    api = stack.enter_context(ScriptedGemini() if kind == "gemini" else ScriptedOpenAI())
    patient = stack.enter_context(LocalServer(settings_for(kind, folder / "data", api.url)))
    hasty = stack.enter_context(LocalServer(settings_for(kind, folder / "hasty", api.url, upstream_timeout=1)))
    return SimpleNamespace(kind=kind, api=api, patient=patient, hasty=hasty)


@pytest.fixture(params=KINDS)
def house(houses, request):
    """An upstream that behaves well, and its proxies."""
    houses[request.param].api.play(GOOD)
    return houses[request.param]


# ---------------------------------------------------------------------------- the table


VARYING = ("status", "words", "requests", "text", "finish")


@dataclass(frozen=True)
class Case:
    """A way to fail (or not) and what must come of it; where the kinds or modes differ, a value is a dict of both."""

    name: str
    gemini: tuple[dict | Callable, ...] | None = (GOOD,)  # a page for each request in turn; None: no such thing there
    openai: tuple[dict | Callable, ...] | None = (GOOD,)
    status: int | dict = 200
    words: str | dict = ""  # in the error; empty: there is none
    requests: int | dict = 1  # that the upstream sees
    modes: tuple[str, ...] = ("plain", "stream")
    text: str | dict = ""  # the reply, where it is not the one that the upstream has made up
    finish: str | dict = "stop"
    partial: bool = False  # the stream has begun when it fails
    headers: dict = field(default_factory=dict)  # of the answer
    body: dict = field(default_factory=dict)  # more in the request
    upstream: str = "shared"  # or "hasty", "refused", "nowhere"

    def of(self, kind: str, mode: str) -> SimpleNamespace:
        """The case for one kind of upstream and one mode."""
        chosen = {name: pick(getattr(self, name), kind, mode) for name in VARYING}
        pages = [page(mode) if callable(page) else page for page in getattr(self, kind)]
        return SimpleNamespace(**{**vars(self), **chosen}, pages=pages, kind=kind, mode=mode)


def pick(value, kind: str, mode: str):
    """A value for a kind and a mode, from one that may be a dict of either or of both."""
    while isinstance(value, dict):
        value = value[kind] if kind in value else value[mode]
    return value


def openai_error(message: str, code: str | None = None, kind: str = "invalid_request_error") -> dict:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


PROMPT = {"messages": [{"role": "user", "content": "Good evening"}]}  # for usage that is made up


def openai_reply(text: str, finish: str, usage: bool = True) -> Callable:
    """A page: the OpenAI-compatible server says this and ends like this."""

    def page(mode: str) -> dict:
        whole = completion(PROMPT, text)
        whole["choices"][0]["finish_reason"] = finish
        if mode == "plain":
            return {"routes": {"/v1/chat/completions": without(whole, () if usage else ("usage",))}}
        chunks = [chunk({}, {"content": piece}, None) for piece in pieces(text) if piece]
        chunks.append(chunk({}, {}, finish))
        if usage:
            chunks.append({**chunks[-1], "choices": [], "usage": whole["usage"]})
        return {"events": [event(c) for c in chunks] + [b"data: [DONE]\n\n"]}

    return page


def openai_choiceless(mode: str) -> dict:
    """A page: an answer without choices."""
    whole = completion({}, "") | {"choices": []}
    if mode == "plain":
        return {"routes": {"/v1/chat/completions": whole}}
    return {"events": [event(chunk({}, {}, None) | {"choices": []}), b"data: [DONE]\n\n"]}


def openai_garbage(mode: str) -> dict:
    """A page: an answer that is no JSON at all, under the right content type."""
    if mode == "plain":
        return {"routes": {"/v1/chat/completions": b"<html>Bad Gateway</html>"}}
    return {"events": [b"data: {<html>Bad Gateway</html>\n\n"]}


def event(payload: dict) -> bytes:
    return b"data: %s\n\n" % json.dumps(payload).encode()


def without(value: dict, names: tuple) -> dict:
    return {name: entry for name, entry in value.items() if name not in names}


def google(body: dict, **more) -> dict:
    """A page: Gemini answers with this error."""
    return {"error": body, **more}


def refused(status: int, message: str, code: str | None = None, **more) -> dict:
    """A page: the OpenAI-compatible server answers with this error."""
    return {"status": status, "error": openai_error(message, code), **more}


SENTENCE = "The lamp is lit."
LONG_DELAY = {"Retry-After": "31"}  # just beyond what is waited for
STREAM = ("stream",)
FIRST_WORDS = [event(chunk({}, {"content": "The lamp"}, None))]
CUT_PLAIN = {"cut_after": 0}

CASES = [
    Case("success"),
    Case(
        "400",
        (google(gemini.invalid_argument("* GenerateContentRequest: no luck")),),
        (refused(400, "no luck"),),
        status=400,
        words="no luck",
    ),
    Case(
        "400 key invalid",
        (google(gemini.api_key_invalid(KEY)),),
        (refused(400, f"API key '{KEY}' not valid"),),
        status=400,
        words="not valid",
    ),
    Case(
        "401",
        (google(gemini.google_error(401, "Request had invalid authentication credentials.")),),
        (refused(401, f"Incorrect API key provided: {KEY}.", "invalid_api_key"),),
        status=401,
        words={"gemini": "invalid authentication credentials", "openai": "Incorrect API key"},
    ),
    Case(
        "403",
        (google(gemini.permission_denied(KEY)),),
        (refused(403, f"The account of {KEY} has been suspended."),),
        status=403,
        words="has been suspended",
    ),
    Case(
        "404",
        (google(gemini.not_found("gemini-flash-latest")),),
        (refused(404, "The model does not exist.", "model_not_found"),),
        status=404,
        words={"gemini": "gemini-pro-latest", "openai": "does not exist"},
    ),
    Case(
        "429 that stays",
        (google(gemini.exhausted()),),
        (refused(429, "Resource has been exhausted"),),
        status=429,
        words="Resource has been exhausted",
        requests=persona_memory.ATTEMPTS,
    ),
    Case(
        "429 with a short delay",
        (google(gemini.rate_limit("0.2s")), GOOD),
        (refused(429, "slow down", headers={"Retry-After": "0.2"}), GOOD),
        requests=2,
    ),
    Case(
        "429 with a long delay",
        (google(gemini.rate_limit("31s")),),
        (refused(429, "Please retry in 31s"),),
        status=429,
        words="Please retry in 31s",
        requests={"gemini": 1, "openai": persona_memory.ATTEMPTS},  # words alone are not understood
    ),
    Case(
        "429 with a long Retry-After",
        (google(gemini.exhausted(), headers=LONG_DELAY),),
        (refused(429, "Resource has been exhausted", headers=LONG_DELAY),),
        status=429,
        words="Resource has been exhausted",
        headers=LONG_DELAY,
    ),
    Case(
        "daily quota",
        (google(gemini.daily_quota("0.1s")),),
        (refused(429, "Rate limit exceeded: free-models-per-day. Add credits."),),
        status=429,
        words={"gemini": "You exceeded your current quota", "openai": "free-models-per-day"},
    ),
    Case(
        "no money",
        None,
        (refused(429, "You exceeded your current quota, check your plan.", "insufficient_quota"),),
        status=429,
        words="check your plan",
    ),
    Case(
        "limit 0",
        (google(gemini.zero_quota("0.1s")),),
        (refused(429, "Quota exceeded for metric: requests, limit: 0, model: gemini-pro"),),
        status=429,
        words="limit: 0",
    ),
    Case(
        "500 that stays",
        (google(gemini.internal()),),
        (refused(500, "An internal error has occurred."),),
        status=500,
        words="An internal error has occurred.",
        requests=persona_memory.ATTEMPTS,
    ),
    Case(
        "500 as HTML",
        (google(b"<html>Error 500</html>", status=500),),
        ({"status": 500, "error": b"<html>Error 500</html>"},),
        status=500,
        words="status 500",
        requests=persona_memory.ATTEMPTS,
    ),
    Case("503 once", (google(gemini.unavailable()), GOOD), (refused(503, "overloaded"), GOOD), requests=2),
    Case(
        "502, 504, 503",
        tuple(google(gemini.google_error(code, "overloaded")) for code in (502, 504, 503)) + (GOOD,),
        (*(refused(code, "overloaded") for code in (502, 504, 503)), GOOD),
        requests=4,
    ),
    Case("slow first byte", ({"hold": HELD},), ({"hold": HELD},)),
    Case("cut before the first token", ({"cut_after": 0}, GOOD), ({"cut_after": 0}, GOOD), requests=2),
    Case(
        "always cut",
        (CUT_PLAIN,),
        (CUT_PLAIN,),
        status=502,
        words={"openai": "broke off", "gemini": "ended"},
        requests=persona_memory.ATTEMPTS,
    ),
    Case(
        "cut after the role",
        None,
        ({"events": [event(chunk({}, {"role": "assistant", "content": ""}, None))]}, GOOD),
        requests=2,
        modes=STREAM,
    ),
    Case(
        "cut in the middle",
        ({"cut_after": 3},),
        ({"cut_after": 3},),
        words={"gemini": "ended in the middle", "openai": "broke off in the middle"},
        modes=STREAM,
        partial=True,
    ),
    Case(
        "ended without an end",
        ({"error_after": (2, gemini.unavailable())},),
        None,
        words="cut off",
        modes=STREAM,
        partial=True,
    ),
    Case(
        "error in the middle",
        None,
        ({"events": [*FIRST_WORDS, event(openai_error("overloaded", 503))]},),
        words="overloaded",
        text="The lamp",
        modes=STREAM,
        partial=True,
    ),
    Case(
        "garbage in the middle",
        ({"garbage_after": 2},),
        ({"events": [*FIRST_WORDS, b"data: {<html>Bad Gateway</html>\n\n"]},),
        words={"gemini": "cannot be read", "openai": "cut off"},
        text={"gemini": "", "openai": "The lamp"},
        modes=STREAM,
        partial=True,
    ),
    Case(
        "garbage from the start",
        ({"garbage_after": 0},),
        (openai_garbage,),
        status=502,
        words="cannot be read",
    ),
    Case(
        "no candidates, no choices",
        ({"empty_candidates": True},),
        (openai_choiceless,),
        status=502,
        words="empty",
        requests=2,
    ),
    Case(
        "no candidates once",
        ({"empty_candidates": True}, GOOD),
        None,
        requests=2,
    ),
    Case(
        "blocked prompt",
        ({"blocked": "PROHIBITED_CONTENT"},),
        (refused(400, "The prompt was filtered: violence.", "content_filter"),),
        status=400,
        words={"gemini": "PROHIBITED_CONTENT", "openai": "violence"},
    ),
    Case(
        "reply blocked half-way",
        ({"finish": "SAFETY"},),
        (openai_reply(SENTENCE, "content_filter"),),
        finish="content_filter",
        text={"gemini": "", "openai": SENTENCE},
    ),
    Case(
        "reply blocked before the first word",
        ({"answers": [gemini.response("", "SAFETY")]},),
        (openai_reply("", "content_filter"),),
        status=400,
        words={"gemini": "SAFETY", "openai": "filter"},
    ),
    Case(
        "thoughts only once",
        ({"thoughts_only": 20_000},),
        None,
        requests=2,
        body={"max_tokens": 50},
    ),
    Case(
        "thoughts only",
        ({"thoughts_only": True},),
        None,
        status=502,
        words="thoughts",
        requests=2,
        body={"max_tokens": 50},
    ),
    Case(
        "no usage",
        ({"no_usage": True},),
        (openai_reply(SENTENCE, "stop", usage=False),),
        text={"gemini": "", "openai": SENTENCE},
    ),
    Case(
        "unknown finish reason",
        ({"finish": "BORED"},),
        (openai_reply(SENTENCE, "bored"),),
        finish={"gemini": "stop", "openai": "bored"},
        text={"gemini": "", "openai": SENTENCE},
    ),
    Case("no finish reason", ({"no_finish": True},), None),
    Case("connection refused", status=502, words="reach", requests=0, upstream="refused"),
    Case("no such host", status=502, words="reach", requests=0, upstream="nowhere"),
    Case("hang", ({"hold": HELD},), ({"hold": HELD},), status=504, words="was silent for 1 seconds", upstream="hasty"),
    Case(
        "hang in the middle",
        ({"hold_after": (3, HELD)},),
        ({"hold_after": (3, HELD)},),
        words="was silent for 1 seconds",
        modes=STREAM,
        partial=True,
        upstream="hasty",
    ),
]
MATRIX = [
    pytest.param(case.of(kind, mode), id=f"{case.name}-{kind}-{mode}")
    for case in CASES
    for kind in KINDS
    if getattr(case, kind) is not None
    for mode in case.modes
]


# ---------------------------------------------------------------------------- what the client gets


@dataclass(frozen=True)
class Answer:
    """A raw answer to a chat completion: its status, its headers, and the payloads of a stream or its one body."""

    status: int
    headers: httpx.Headers
    raw: str
    payloads: list

    @property
    def error(self) -> dict | None:
        return next((payload["error"] for payload in self.payloads if "error" in payload), None)

    @property
    def choices(self) -> list[dict]:
        return [choice for payload in self.payloads for choice in payload.get("choices", [])]

    @property
    def text(self) -> str:
        return "".join(
            (choice.get("delta") or choice.get("message") or {}).get("content") or "" for choice in self.choices
        )

    @property
    def finish(self) -> str | None:
        return next((choice["finish_reason"] for choice in self.choices if choice["finish_reason"]), None)

    @property
    def usage(self) -> dict | None:
        return next((payload["usage"] for payload in self.payloads if payload.get("usage")), None)


def ask(url: str, messages: list[dict], mode: str, go_on: threading.Event | None = None, **more) -> Answer:
    """One raw turn; `go_on` is set at the first keep-alive. Raises where the answer does not end properly."""
    body = {"messages": messages, "stream": mode == "stream", **more}
    body |= {"stream_options": {"include_usage": True}} if mode == "stream" else {}
    lines = []
    address = f"{url}/v1/chat/completions"
    with httpx.stream("POST", address, json=body, timeout=FOREVER, verify=False) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if line == ": keep-alive" and go_on:
                go_on.set()
    streamed = "text/event-stream" in answer.headers["content-type"]
    payloads = stream_payloads(lines) if streamed else [json.loads("\n".join(lines))]
    return Answer(answer.status_code, answer.headers, "\n".join(lines), payloads)


def stream_payloads(lines: list[str]) -> list:
    """A stream's payloads; it must end with the only [DONE]."""
    texts = [line.removeprefix("data: ") for line in lines if line.startswith("data:")]
    assert texts[-1] == "[DONE]"
    assert texts.count("[DONE]") == 1
    return [json.loads(text) for text in texts[:-1]]


def assert_failed(answer: Answer, case):
    """An error in OpenAI's shape that says what went wrong, and keeps keys and Python's insides to itself."""
    assert answer.error, answer.raw
    assert set(answer.error) >= {"message", "type", "param", "code"}
    assert case.words in answer.error["message"]
    for insides in ("object at 0x", "ConnectionPool", "Traceback", "<html"):
        assert insides not in answer.error["message"]
    assert answer.error == answer.payloads[-1]["error"]


def assert_answered(answer: Answer, case, api):
    """The whole reply, the way it ended, and its tokens."""
    assert answer.error is None, answer.raw
    assert (answer.text, answer.finish) == (case.text or api.last["answer"], case.finish)
    assert answer.text.strip()
    usage = answer.usage
    assert min(usage["prompt_tokens"], usage["completion_tokens"]) > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def assert_partial(answer: Answer, case, api):
    """Where a stream fails on its way, the text so far stays; else there is none."""
    if case.partial:
        assert answer.text.strip()
        assert (case.text or api.last["answer"]).startswith(answer.text)
        assert answer.finish is None
    else:
        assert answer.text == ""


# ---------------------------------------------------------------------------- what memory holds


def remembered(url: str, chat_id: str) -> list[tuple]:
    """The chat's current branch: who said what."""
    rows = get(url, f"{API}/chats/{chat_id}/messages")["messages"]
    return [(row["role"], row["content"]) for row in rows]


def spoken(messages: list[dict]) -> list[tuple]:
    """What a transcript shows of the chat: who said what."""
    return [(message["role"], message["content"]) for message in messages if message["role"] != "system"]


def said(url: str, messages: list[dict], stream: bool, **more):
    """A turn with the openai client that must go well."""
    reply = say(url, messages, stream=stream, **more)
    assert (reply.status, reply.error) == (200, None)
    assert reply.text.strip()
    return reply


def goes_on(url: str, chat: list[dict], told: str, stream: bool, fragment: str = ""):
    """The chat goes on behind the reply that the client was told, and memory holds all of it once, and nothing else.

    `fragment` is what the client was shown of a reply that broke off: it is kept beside the branch.
    """
    question = f"And then? You said: {told} I said: {chat[-1]['content']}"
    transcript = [*chat, {"role": "assistant", "content": told}, {"role": "user", "content": question}]
    chat_id = said(url, transcript, stream).chat_id
    assert remembered(url, chat_id) == spoken(transcript)
    beside = get(url, f"{API}/chats/{chat_id}")["stored"] - len(spoken(transcript))
    assert beside in (1, 1 + bool(fragment))  # the newest reply, and a fragment that says other words than the reply


# ---------------------------------------------------------------------------- the matrix


@pytest.fixture
def stage(houses, case, tmp_path, monkeypatch):
    """The upstream and the proxy that a case needs, and later a proxy whose upstream behaves well."""
    house = houses[case.kind]
    go_on = threading.Event()
    house.api.play(*(with_event(page, go_on) for page in case.pages))
    if case.upstream in ("refused", "nowhere"):
        yield from unreachable_stage(house, case, tmp_path / "data", monkeypatch)
    else:
        proxy = house.hasty if case.upstream == "hasty" else house.patient
        asked = proxy.server.memory.upstream
        # One that another case has left open is tried first, and its cut counts as nothing.
        monkeypatch.setattr(asked, "_kept", [], raising=False)

        def mend() -> str:
            monkeypatch.setattr(asked, "_timeout", float(FOREVER))  # a good one may be slow on a busy machine
            return proxy.url

        yield SimpleNamespace(api=house.api, url=proxy.url, mend=mend, go_on=go_on)
    go_on.set()


def with_event(page: dict, go_on: threading.Event) -> dict:
    """A page of a script with the test's own event in it."""
    if "hold_after" in page:
        return page | {"hold_after": (page["hold_after"][0], go_on)}
    return page | ({"hold": go_on} if "hold" in page else {})


def unreachable_stage(house, case, data, monkeypatch):
    """A proxy whose upstream is not there; a new one on the same data has a good one."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    address = f"127.0.0.1:{free_port()}" if case.upstream == "refused" else "no-such-host.invalid"
    address = f"http://{address}" + ("" if case.kind == "gemini" else "/v1")
    with contextlib.ExitStack() as stack:
        lost = stack.enter_context(LocalServer(settings_for(case.kind, data, address)))

        def mend() -> str:
            lost.close()
            return stack.enter_context(LocalServer(settings_for(case.kind, data, house.api.url))).url

        yield SimpleNamespace(api=house.api, url=lost.url, mend=mend, go_on=threading.Event())


def let_go_of_the_slow(stage, case, monkeypatch):
    """A slow first byte comes when the client has had a keep-alive; without a stream when it waits."""
    monkeypatch.setattr(persona_memory, "KEEPALIVE_SECONDS", 0.05)
    monkeypatch.setattr(persona_memory, "HEADER_GRACE_SECONDS", 0.05)
    if case.mode == "plain":
        threading.Thread(target=lambda: (stage.api.wait_for_chats(1), stage.go_on.set()), daemon=True).start()


@pytest.mark.parametrize("case", MATRIX)
def test_every_way_an_upstream_can_fail(stage, case, chat, monkeypatch):
    """The client gets the reply or a readable error, the upstream no needless request, and the chat goes on whole."""
    if case.name == "slow first byte":
        let_go_of_the_slow(stage, case, monkeypatch)
    answer = ask(stage.url, chat, case.mode, stage.go_on if case.upstream == "shared" else None, **case.body)
    assert (answer.status, len(stage.api.chats)) == (case.status, case.requests), answer.raw
    assert {name: answer.headers.get(name) for name in case.headers} == case.headers
    assert KEY not in answer.raw + str(answer.headers)
    if case.words:
        assert_failed(answer, case)
        assert_partial(answer, case, stage.api)
    else:
        assert_answered(answer, case, stage.api)
    if case.name == "slow first byte" and case.mode == "stream":
        assert ": keep-alive" in answer.raw
    stage.api.play(GOOD)
    url, stream = stage.mend(), case.mode == "stream"
    if answer.error:
        goes_on(url, chat, said(url, chat, stream).text, stream, answer.text)
    else:
        goes_on(url, chat, answer.text, stream)


# ---------------------------------------------------------------------------- retries


DELAYED = {"gemini": google(gemini.rate_limit("0.2s")), "openai": refused(429, "slow", headers={"Retry-After": "0.2"})}
TOO_LONG = {"gemini": google(gemini.rate_limit("31s")), "openai": refused(429, "slow", headers=LONG_DELAY)}
USED_UP = {"gemini": google(gemini.daily_quota()), "openai": refused(429, "Rate limit exceeded: free-models-per-day.")}
FALLEN = {"gemini": google(gemini.internal()), "openai": refused(500, "An internal error has occurred.")}


@pytest.mark.parametrize("mode", ["plain", "stream"])
def test_the_delay_that_an_upstream_asks_for_is_waited(house, chat, mode, caplog):
    """The next try comes no sooner than asked, where the pause would be shorter by itself."""
    house.api.play(DELAYED[house.kind], GOOD)
    assert ask(house.patient.url, chat, mode).error is None
    pauses = [record.figures["pause_seconds"] for record in caplog.records if record.event == "retry"]
    assert len(pauses) == 1
    assert pauses[0] >= 0.2


def test_pauses_grow(house, chat, caplog):
    """Without a delay that is asked for, each pause is longer than the one before; only the first is a warning."""
    caplog.set_level(logging.INFO, "persona_memory")
    house.api.play(FALLEN[house.kind])
    assert ask(house.patient.url, chat, "plain").status == 500
    pauses = [record.figures["pause_seconds"] for record in caplog.records if record.event == "retry"]
    assert len(pauses) == persona_memory.ATTEMPTS - 1
    assert pauses == sorted(set(pauses))
    levels = [record.levelname for record in caplog.records if record.event == "retry"]
    assert levels == ["WARNING", "INFO", "INFO"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_own_retry_leaves_one_copy_of_the_turn(house, chat, stream, monkeypatch):
    """The openai client sends a turn again that was not tried again here; memory has it once."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    house.api.play(USED_UP[house.kind], GOOD)
    with client(house.patient.url).with_options(max_retries=2) as api:
        answer = api.chat.completions.create(model="any", messages=chat, stream=stream)
        told = joined(answer) if stream else answer.choices[0].message.content
    assert told == house.api.last["answer"]
    assert len(house.api.chats) == 2
    goes_on(house.patient.url, chat, told, stream)


def joined(chunks) -> str:
    """A stream's text."""
    return "".join(choice.delta.content or "" for part in chunks for choice in part.choices)


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_that_fails_again_and_again_is_remembered_once(house, chat, stream):
    """Three failures of the same turn and then a good one: one copy."""
    house.api.play(TOO_LONG[house.kind], TOO_LONG[house.kind], TOO_LONG[house.kind], GOOD)
    for _ in range(3):
        assert say(house.patient.url, chat, stream=stream).status == 429
    goes_on(house.patient.url, chat, said(house.patient.url, chat, stream).text, stream)


# ---------------------------------------------------------------------------- blocked because of memory

SMALL = 1024  # tokens of context, in which the beginning of the long chat is out of sight
FACT = "My brother Tomas sold the mule in Ostrava."


@pytest.fixture(scope="module")
def narrow(houses, tmp_path_factory):
    """For each kind a proxy with a small context."""
    with contextlib.ExitStack() as stack:
        yield {kind: stack.enter_context(narrow_proxy(houses[kind], tmp_path_factory)) for kind in KINDS}


def narrow_proxy(house, tmp_path_factory) -> LocalServer:
    return LocalServer(settings_for(house.kind, tmp_path_factory.mktemp("narrow"), house.api.url, context=SMALL))


@pytest.fixture
def tale(request) -> list[dict]:
    """A long chat that no other test sends, whose newest message asks for the first one."""
    own = request.node.name
    steps = [
        {"role": "assistant" if n % 2 else "user", "content": f"Step {n} of {own}: wet grass, and posts to count."}
        for n in range(1, 60)
    ]
    question = {"role": "user", "content": f"Who sold the mule? ({own})"}
    return [
        {"role": "system", "content": "You are Mira."},
        {"role": "user", "content": f"{FACT} ({own})"},
        *steps,
        question,
    ]


def has_memories(request: dict) -> bool:
    """Whether a recorded request has recalled memories in it."""
    return persona_memory.ENGLISH.memories in json.dumps(request["body"], ensure_ascii=False)


def blocks_memories(kind: str) -> list[dict]:
    """A script: the provider's filter takes offence at the recalled memories, and at nothing else."""
    if kind == "openai":
        return [refused(400, "The prompt was filtered: violence.", "content_filter"), GOOD]
    return [{"blocked_if": lambda body: persona_memory.ENGLISH.memories in gemini.prompt_text(body)}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_blocked_for_its_memories_is_asked_again_without(house, narrow, tale, stream):
    """The client gets its reply, and a header that says what the turn went without; the chat is as any other."""
    house.api.play(*blocks_memories(house.kind))
    reply = said(narrow[house.kind].url, tale, stream)
    assert reply.text == house.api.last["answer"]
    assert [has_memories(request) for request in house.api.chats] == [True, False]
    assert FACT not in json.dumps(house.api.last["body"])
    assert reply.memory.startswith("degraded; reason=asked again without memories"), reply.memory
    assert "recalled=0" in reply.memory
    report = get(narrow[house.kind], f"{API}/chats/{reply.chat_id}")["last_prompt"]
    assert (report["recalled"], report["tokens"]["memories"]) == ([], 0)
    assert "asked again without memories" in report["degraded"]
    goes_on(narrow[house.kind].url, tale, reply.text, stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_blocked_with_and_without_memories_is_an_error(house, narrow, tale, stream):
    """Asked again once, no more; the error names the filter's reason, and the next turn works."""
    page = {"blocked": "BLOCKLIST"} if house.kind == "gemini" else refused(400, "BLOCKLIST", "content_filter")
    house.api.play(page)
    reply = say(narrow[house.kind].url, tale, stream=stream)
    assert (reply.status, reply.text) == (400, "")
    assert "BLOCKLIST" in reply.error
    assert [has_memories(request) for request in house.api.chats] == [True, False]
    house.api.play(GOOD)
    goes_on(narrow[house.kind].url, tale, said(narrow[house.kind].url, tale, stream).text, stream)


def test_other_refusals_are_not_asked_again_without_memories(house, narrow, tale):
    """A 400 for another reason is the client's at once."""
    house.api.play(google(gemini.invalid_argument("no")) if house.kind == "gemini" else refused(400, "no"))
    assert say(narrow[house.kind].url, tale).status == 400
    assert [has_memories(request) for request in house.api.chats] == [True]


def test_what_was_refused_stays_out_also_after_a_restart(house, tale, tmp_path):
    """The next turn does not begin with the memories that the provider's filter refused, and says so."""
    given = settings_for(house.kind, tmp_path / "data", house.api.url, context=SMALL)
    for turn, with_memories in enumerate(([True, False], [False], [False])):
        house.api.play(*blocks_memories(house.kind) if turn == 0 or house.kind == "gemini" else [GOOD])
        if turn != 1:  # the first two turns share a server
            proxy = LocalServer(given).start()
        reply = say(proxy.url, tale, stream=False)
        if turn != 0:
            proxy.close()
        assert (reply.status, [has_memories(request) for request in house.api.chats]) == (200, with_memories)
        assert ("left out, since the provider's filter refused it: memories" in reply.memory) is (turn > 0)
