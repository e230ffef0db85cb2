"""Requests that nobody should send: schemathesis makes them from /openapi.json, hypothesis breaks sound ones.

Each answer is judged: no status that the document does not declare, no 5xx but a 503 or one of the upstream's, no
other type of content, no turn whose memory an input has cost.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from urllib.parse import urlsplit

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, strategies
from hypothesis import settings as run_settings
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
API = "/api/persona_memory"
TURN = {
    "model": "fake-model",
    "stream": False,
    "max_tokens": 64,
    "user": "chat_1",
    "messages": [
        {"role": "system", "content": "You are Maren."},
        {"role": "assistant", "name": "Maren", "content": "*looks up* Who is it?"},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "It is Ann, of the ferry."}]},
    ],
    "persona_memory": {"chat_id": "tale", "character": "Maren", "kind": "normal", "complete": False, "title": "A tale"},
}
SHOWN = [{"role": r, "name": r, "content": "The ferry leaves at noon.", "timestamp": "2024-05-06T07:08:09Z"}
         for r in ("user", "assistant", "user")]  # fmt: skip
INJECT = {"chat_id": "tale", "messages": SHOWN, "persona": "Maren", "context_tokens": 4096, "complete": True}
FILE = [
    {"user_name": "Ann", "character_name": "Maren", "create_date": "2024-5-6 @07h 08m 09s 10ms", "chat_metadata": {}},
    {"name": "Ann", "is_user": True, "is_system": False, "send_date": "May 6, 2024 7:08am", "mes": "Good day."},
    {"name": "Maren", "mes": "Aye.", "swipes": ["Aye.", "No."], "swipe_id": 0, "send_date": 1714979289000},
]
SOUND = [  # (method, path, body): requests whose parts are replaced, one or a few at a time
    ("POST", "/v1/chat/completions", TURN),
    ("POST", "/v1/chat/completions", {**TURN, "stream": True}),
    ("POST", f"{API}/inject", INJECT),
    ("POST", f"{API}/chats/tale/sync", INJECT),
    ("POST", f"{API}/chats/tale/messages", {"messages": SHOWN}),
    ("PATCH", f"{API}/chats/tale/messages/x", {"content": "Other words.", "pinned": True, "forgotten": False}),
    ("PATCH", f"{API}/characters/Maren", {"carry_over": True}),
    ("POST", f"{API}/import", FILE),
    ("POST", "/v1/embeddings", {"input": ["a", "b"], "encoding_format": "float", "dimensions": 384, "model": "x"}),
    ("POST", "/api/embed", {"input": ["a"], "model": "x"}),
    ("POST", "/api/classify", {"text": "I am glad."}),
    ("POST", "/api/summarize", {"text": "They met. They parted.", "params": {"max_length": 10}}),
]
NUMBERS = (0, -1, 1, 2.5, -0.0, 1e308, 1e999, -1e999, float("nan"), 2**31, 2**63, 2**64, 10**400, -(10**400))
TEXTS = (
    "", " ", "\0", "\ud800", "a\udfffb", "\u202e\u2028\u0085\x1b[31m", "\r\nX-Evil: 1", "../../etc/passwd", "%00",
    "x" * 501, "9" * 4000, "[" * 3000, "<think>" * 500, "<|im_end|>", "{{user}}", "*" * 999, "\U0001f600" * 300,
    "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2024-02-30", "P1D", "undefined", "null", "__proto__",
    "data:image/png;base64,AAAA", "June 5, 2024 " * 40, "'; DROP TABLE x; --", "NEAR(a b, 2)", '"', "a AND b OR",
)  # fmt: skip
HOSTILE = strategies.one_of(
    strategies.sampled_from(NUMBERS),
    strategies.sampled_from(TEXTS),
    strategies.sampled_from((None, True, False, [], {}, [[]], [{}], {"": ""}, [None], {"type": ["x"]}, [{"type": 1}])),
    strategies.text(max_size=40),
    strategies.recursive(strategies.none() | strategies.text(max_size=4), lambda s: strategies.lists(s, max_size=3)),
)
RAW = strategies.one_of(
    strategies.binary(max_size=60),
    strategies.sampled_from(
        (
            b"",
            b"[" * 100_000,
            b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
            b'{"a":' * 100_000,
            b"9" * 5000,
            b'"\\ud800"',
            b"NaN",
            b"{}",
            b"[]",
        )
    ),
)
UNDER_WAY = re.compile(r"loading|late|vectors|too long")  # of the embedder: no input's fault


def places(value, path=()):
    """The paths to all the parts of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def replaced(value, path, other):
    """The JSON value with another part at that path."""
    if not path:
        return other
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], other)
    return copy


@strategies.composite
def broken(draw):
    """A sound request with one to three parts replaced, or with a body that is no JSON at all; and its headers."""
    method, path, body = draw(strategies.sampled_from(SOUND))
    headers = {"X-Persona-Memory": "off"} if draw(strategies.integers(0, 19)) == 0 else {}
    if draw(strategies.integers(0, 9)) == 0:
        return method, path, draw(RAW), headers
    for _ in range(draw(strategies.integers(1, 3))):
        body = replaced(body, draw(strategies.sampled_from(list(places(body)))), draw(HOSTILE))
    if path.endswith("/import") and isinstance(body, list):
        return method, path, "\n".join(map(json.dumps, body)).encode(), headers
    return method, path, json.dumps(body).encode(), headers


@schemathesis.serializer("application/x-git-upload-pack-request")
def pack_request(_, value) -> bytes:
    """What git sends is bytes; schemathesis makes texts and other values."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


class Fuzz:
    """Sends requests to a server, and counts what came of them.

    `wrong` holds a line for each answer that should not have been.
    """

    def __init__(self, url: str, key: str = ""):
        self.url, self.statuses, self.wrong, self.sent = url, Counter(), [], 0
        self.session = requests.Session()
        document = httpx.get(f"{url}/openapi.json").json()
        self.schema = schemathesis.openapi.from_dict(document)
        self.operations = {o.label: o for o in (found.ok() for found in self.schema.get_all_operations())}
        modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        made = [o.as_strategy(mode) for o in self.operations.values() for mode in modes if may_be(o, mode)]
        self.cases = strategies.one_of(made)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session.close()

    def run(self, count: int, number: int = 0, share: float = 0.5) -> None:
        """So many requests, that share of them by schemathesis, by the number of the run."""

        def check(strategy, send, times: int) -> None:
            """Sends what the strategy makes."""
            seeded = seed(number)(given(strategy)(send))
            run_settings(
                max_examples=times, database=None, deadline=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(seeded)()  # fmt: skip

        check(self.cases, self.send_case, round(count * share))
        check(broken(), self.send_broken, count - round(count * share))

    def send_case(self, case) -> None:
        """Sends what schemathesis made."""
        try:
            answer = case.call(base_url=self.url, session=self.session, timeout=120)
        except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
            return  # no client can send it
        self.note(f"{case.method} {case.formatted_path}", answer.status_code, answer.headers, answer.content)
        try:
            case.validate_response(answer, checks=CHECKS)
        except FailureGroup as group:
            self.wrong += [f"{case.method} {case.path}: {failure}"[:600] for failure in group.exceptions]

    def send_broken(self, request) -> None:
        """Sends a broken request."""
        method, path, raw, headers = request
        headers = {"Content-Type": "application/json"} | headers
        answer = self.session.request(method, self.url + path, data=raw, headers=headers, timeout=120)
        self.note(f"{method} {path} {raw[:300]!r}", answer.status_code, answer.headers, answer.content)
        declared = self.declared(method, path)
        if not {str(answer.status_code), "default"} & declared:
            self.wrong.append(f"{method} {path} {raw[:300]!r}: {answer.status_code} is not declared")

    def declared(self, method: str, path: str) -> set[str]:
        """The statuses that the document has for a path."""
        segments = urlsplit(path).path.split("/")
        for label, operation in self.operations.items():
            other, template = label.split(" ", 1)
            parts = template.split("/")
            fitting = [p.startswith("{") or p == s for p, s in zip(parts, segments, strict=False)]
            if other == method and len(parts) == len(segments) and all(fitting):
                return set(operation.definition.raw["responses"])
        raise KeyError(path)

    def note(self, what: str, status: int, headers, content: bytes) -> None:
        """Counts an answer, and notes what no input may bring about."""
        self.sent += 1
        self.statuses[status] += 1
        memory = "".join({k.lower(): v for k, v in headers.items()}.get("x-persona-memory", ()))
        if status == 500 or b"Something went wrong" in content:
            self.wrong.append(f"{what}: {status}")
        elif memory.startswith("degraded") and not UNDER_WAY.search(memory):
            self.wrong.append(f"{what}: {memory}")


def may_be(operation, mode) -> bool:
    """Whether an operation has anything that can be wrong: `NEGATIVE` cases of others cannot be made."""
    raw = operation.definition.raw
    return mode is GenerationMode.POSITIVE or bool(raw.get("requestBody") or raw.get("parameters"))
