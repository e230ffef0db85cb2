"""Shared test pieces: a recording upstream, the program as a process or in this process, and one chat turn.

Only the language model is faked, by a real HTTP server that records every request and misbehaves on demand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import httpx
import openai

PROGRAM = Path(__file__).resolve().parent.parent / "persona_memory.py"
PATIENCE = 120  # seconds until a condition that never comes true fails its test


def wait_until(condition, what="the condition", timeout=PATIENCE):
    """Poll a real condition until it holds and return its value; fail after a deadline."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        pause.wait(0.05)
    return value


def free_port() -> int:
    """A port that is free now, and none of those that systems give to connections: one of them could take it before
    the server that it is meant for listens."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(12_000, 32_000)))
            return probe.getsockname()[1]


# ---------------------------------------------------------------------------- upstream

STEERING = {
    "reply": None,  # callable: request body -> text; None: a different text for every request
    "status": 200,  # HTTP status of chat completions
    "error": None,  # with another status: the message (str), the JSON body (dict) or the raw body (bytes)
    "cut_after": None,  # close the connection after so many chunks; a plain answer: before its first byte
    "no_done": False,  # end a stream without [DONE]
    "no_choices": False,  # put JSON chunks without `choices` among the others
    "hold": None,  # Event to wait for before the first byte
    "hold_after": None,  # (number of chunks, Event): wait after so many chunks
    "crlf": False,  # CRLF line ends in streams
    "events": None,  # list of bytes: send these instead of a stream made from the reply
    "headers": None,  # more response headers for plain answers
    "gzip": False,  # compress plain answers for clients that accept it
    "context": None,  # n_ctx in GET /props (llama.cpp); None: no such route
    "routes": None,  # dict: path -> JSON answer, bytes sent as HTML, or a callable on the handler: odd answers
    "raw": None,  # (status, content type or None, body): sent as it is for chat completions; or a callable on the body
    "models": None,  # the entries of GET /models; an empty list: no such route
}


class HangUp(Exception):
    """The client went away."""


class Upstream:
    """A recording OpenAI-compatible server on a free port of 127.0.0.1.

    A request obeys the steering attributes as they stood when it arrived. `requests` holds a dict for each
    (method, path, headers, raw, body, answer, sent); `answer` is the reply's text, `sent` the body bytes sent so far.
    `hangups` is a semaphore, released once for every client that went away in the middle of an answer.
    """

    def __init__(self, port: int = 0, **steering):
        self.requests: list[dict] = []
        self.hangups = threading.Semaphore(0)
        self.closing = threading.Event()
        self.arrived = threading.Condition()
        self.counter = itertools.count(1)
        self.sockets: set[socket.socket] = set()
        self.steer(**{**STEERING, **steering})
        self.httpd = QuietServer(("127.0.0.1", port), Handler)
        self.httpd.upstream = self
        self.port = self.httpd.server_port
        self.root = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.root}/v1"
        serve = threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        serve.start()

    def steer(self, **steering):
        """Set steering attributes."""
        for name, value in steering.items():
            assert name in STEERING, name
            setattr(self, name, value)

    def reset(self):
        """Forget what was recorded and behave well again."""
        self.steer(**STEERING)
        self.requests.clear()
        while self.hangups.acquire(blocking=False):
            pass

    @property
    def chats(self) -> list[dict]:
        """The recorded chat completions, oldest first."""
        return [request for request in list(self.requests) if request["path"].endswith("/chat/completions")]

    @property
    def last(self) -> dict:
        """The newest chat completion."""
        return self.chats[-1]

    def wait_for_chats(self, count: int, timeout: float = PATIENCE) -> list[dict]:
        """Wait until so many chat completions have arrived."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.chats) >= count, timeout), f"{len(self.chats)} of {count}"
        return self.chats

    def record(self, request: dict):
        with self.arrived:
            self.requests.append(request)
            self.arrived.notify_all()

    def close(self):
        """Stop listening, drop every connection, let go of everything that is on hold."""
        self.closing.set()
        self.httpd.shutdown()
        self.httpd.server_close()
        for sock in list(self.sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class QuietServer(ThreadingHTTPServer):
    """Many connections at once, and no tracebacks for clients that go away."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    upstream: Upstream

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (OSError, HangUp)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection to the fake upstream."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.server.upstream.sockets.add(self.connection)

    def finish(self):
        self.server.upstream.sockets.discard(self.connection)
        super().finish()

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        if len(raw) < length:  # the client hung up in the middle of asking: it has asked nothing
            self.close_connection = True
            return
        upstream = self.server.upstream
        self.steering = {name: getattr(upstream, name) for name in STEERING}
        self.request_record = {
            "method": self.command,
            "path": self.path,
            "headers": dict(self.headers.items()),
            "raw": raw,
            "body": parsed(raw),
            "answer": None,
            "sent": b"",
        }
        upstream.record(self.request_record)
        try:
            self.route(re.sub("/+", "/", urlsplit(self.path).path))
        except (HangUp, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            upstream.hangups.release()

    def route(self, path: str):
        steering = self.steering
        if path in (steering["routes"] or {}):
            answer = steering["routes"][path]
            if callable(answer):
                answer(self)
            elif isinstance(answer, bytes):
                self.send_plain(200, answer, "text/html")
            else:
                self.send_json(200, answer)
        elif path == "/props" and steering["context"]:
            self.send_json(200, {"default_generation_settings": {"n_ctx": steering["context"]}, "total_slots": 1})
        elif path.endswith("/chat/completions"):
            body = self.request_record["body"]
            self.chat(body if isinstance(body, dict) else {})
        elif path == "/v1/models" and steering["models"] != []:
            entries = steering["models"] or [{"id": "fake-model", "object": "model", "owned_by": "tests"}]
            self.send_json(200, {"object": "list", "data": entries})
        else:
            self.send_json(404, {"error": {"message": f"no route {path}", "type": "invalid_request_error"}})

    def chat(self, body: dict):
        if self.steering["hold"]:
            self.hold(self.steering["hold"])
        raw = self.steering["raw"]
        raw = raw(body) if callable(raw) else raw
        if raw is not None:
            return self.send_raw(*raw)
        if self.steering["status"] != 200:
            return self.send_error_answer()
        make = self.steering["reply"]
        number = next(self.server.upstream.counter)
        text = make(body) if make else f"Reply {number}: the story goes on, line {number}."
        self.request_record["answer"] = text
        if body.get("stream") is True:
            return self.send_stream(body, text)
        if self.steering["cut_after"] is not None:
            return self.cut()
        return self.send_json(200, completion(body, text))

    def hold(self, event: threading.Event):
        """Wait for the test's event; notice a client that goes away meanwhile."""
        while not event.wait(0.02) and not self.server.upstream.closing.is_set():
            if self.client_is_gone():
                raise HangUp

    def client_is_gone(self) -> bool:
        poll = select.poll()  # takes any file descriptor, where select() ends at 1024
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0)) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def cut(self):
        """Close the connection in the middle of an answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send_error_answer(self):
        error = self.steering["error"]
        if isinstance(error, bytes):
            return self.send_plain(self.steering["status"], error, "text/html")
        if not isinstance(error, dict):
            error = {"error": {"message": error or "something went wrong", "type": "fake_error", "code": None}}
        return self.send_json(self.steering["status"], error)

    def send_json(self, status: int, value):
        self.send_plain(status, json.dumps(value).encode(), "application/json")

    def send_plain(self, status: int, content: bytes, kind: str):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in (self.steering["headers"] or {}).items():
            self.send_header(name, value)
        if self.steering["gzip"] and "gzip" in self.headers.get("Accept-Encoding", ""):
            content = gzip.compress(content)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.request_record["sent"] += content  # first: who has the answer may look at once
        self.wfile.write(content)

    def send_raw(self, status: int, kind: str | None, content: bytes):
        """Bytes under any content type or none, then the end of the connection."""
        self.close_connection = True
        self.send_response(status)
        if kind:
            self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.end_headers()
        self.request_record["sent"] += content
        self.wfile.write(content)

    def send_stream(self, body: dict, text: str):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        hold_count, hold_event = self.steering["hold_after"] or (None, None)
        for count, event in enumerate(self.events(body, text)):
            if count == hold_count:
                self.hold(hold_event)
            if count == self.steering["cut_after"]:
                return self.cut()
            self.send_chunk(event)
        return self.wfile.write(b"0\r\n\r\n")

    def send_chunk(self, event: bytes):
        self.request_record["sent"] += event
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

    def events(self, body: dict, text: str):
        """The stream's events as bytes: an event for each word, the end, [DONE]."""
        if self.steering["events"] is not None:
            yield from self.steering["events"]
            return
        for payload in self.payloads(body, text):
            end = "\r\n\r\n" if self.steering["crlf"] else "\n\n"
            yield f"data: {payload}{end}".encode()

    def payloads(self, body: dict, text: str):
        for count, piece in enumerate(pieces(text)):
            delta = {"content": piece} if count else {"role": "assistant", "content": piece}
            yield json.dumps(chunk(body, delta, None))
            if self.steering["no_choices"]:
                yield json.dumps({"object": "ping", "n": count})
        yield json.dumps(chunk(body, {}, "stop"))
        if (body.get("stream_options") or {}).get("include_usage"):
            yield json.dumps({**chunk(body, {}, None), "choices": [], "usage": usage(body, text)})
        if not self.steering["no_done"]:
            yield "[DONE]"


def pieces(text: str) -> list[str]:
    """A reply as the tokens a stream carries: words with the white space before them."""
    return re.findall(r"\s*\S+|\s+", text) or [""]


def parsed(raw: bytes):
    """JSON, or None where it is none."""
    try:
        return json.loads(raw)
    except ValueError:
        return None


def usage(body: dict, text: str) -> dict:
    """Counted as the program counts, so that it learns no other ratio."""
    from persona_memory import message_tokens

    prompt = 3 + sum(map(message_tokens, body.get("messages", [])))
    return {"prompt_tokens": prompt, "completion_tokens": len(pieces(text)), "total_tokens": prompt + len(pieces(text))}


def completion(body: dict, text: str) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": 1,
        "model": body.get("model") or "fake-model",
        "choices": [choice],
        "usage": usage(body, text),
    }


def chunk(body: dict, delta: dict, finish: str | None) -> dict:
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": body.get("model") or "fake-model",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }


# ---------------------------------------------------------------------------- the program


def health(url: str) -> dict | None:
    """GET /health, or None where nobody answers."""
    try:
        answer = httpx.get(f"{url}/health", timeout=5, verify=False)  # verify: no time lost on certificates
    except httpx.TransportError:
        return None
    return answer.json() if answer.status_code == 200 else None


def clean_environment(extra: dict | None) -> dict:
    """This process's environment without the program's own settings. What Python compiles is kept, as it usually is."""
    ours = ("PERSONA_MEMORY_", "GEMINI_API_KEY", "GOOGLE_API_KEY", "PYTHONDONTWRITEBYTECODE")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)} | (extra or {})


def run_program(*arguments, env: dict | None = None) -> subprocess.CompletedProcess:
    """What the program's command does and says; in this process, where its libraries are loaded already."""
    import persona_memory

    said, complained = io.StringIO(), io.StringIO()
    with (
        unittest.mock.patch.dict(os.environ, clean_environment(env), clear=True),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(complained),
    ):
        try:
            code = persona_memory.main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(arguments, code, said.getvalue(), complained.getvalue())


class Server:
    """persona_memory.py --proxy as a process of its own; keeps its port and its log over restarts.

    Without `embedder` it does not spend seconds on loading one.
    """

    def __init__(self, data_dir, upstream_url: str, *extra_args: str, env: dict | None = None, embedder: bool = True):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [
            sys.executable,
            str(PROGRAM),
            "--proxy",
            "--port",
            str(self.port),
            "--data",
            str(data_dir),
            "--upstream",
            upstream_url,
            "--summary-every",  # off: nothing comes between a test's own requests unless it asks for that
            "0",
            *(() if embedder else ("--embedder", "/nowhere/model")),
            *map(str, extra_args),
        ]
        self.env = clean_environment(env)
        handle, name = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self.log_path = Path(name)
        self.process: subprocess.Popen | None = None

    def start(self) -> Server:
        """Start and wait for /health to answer."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        wait_until(self.answers, "the server's /health")
        return self

    def answers(self) -> dict | None:
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log()}"
        return health(self.url)

    def wait_ready(self) -> Server:
        """Wait until /health says "ok": the embedder is loaded."""
        wait_until(lambda: (self.answers() or {}).get("status") == "ok", "the server's status ok")
        return self

    def kill(self):
        """SIGKILL, as a crash or a power cut would end it."""
        self._end(signal.SIGKILL)

    def stop(self):
        """SIGTERM, as a user ends it."""
        self._end(signal.SIGTERM)

    def _end(self, number: int):
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise

    def log(self) -> str:
        return self.log_path.read_text("utf-8", "replace")

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        try:
            self.stop()
        finally:
            self.log_path.unlink(missing_ok=True)


def settings(data_dir, upstream_url: str, **more):
    """Settings for a proxy on a free port; without summaries, whose requests would come between a test's own."""
    import persona_memory

    given = {"proxy": True, "host": "127.0.0.1", "port": 0, "data": str(data_dir), "summary_every": 0, **more}
    return persona_memory.Settings(upstream=upstream_url, **given)


class LocalServer:
    """The program's own server in a thread of this process; ready (embedder loaded) when entered."""

    def __init__(self, settings, ready: bool = True):
        import persona_memory

        self.ready = ready
        self.server = persona_memory.create_server(settings)
        self.server.adj.asyncore_loop_timeout = 0.05  # how soon the loop sees that it was closed
        self.url = f"http://127.0.0.1:{self.server.effective_port}"
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        with contextlib.suppress(OSError):  # the listening socket is closed under the loop
            self.server.run()

    def start(self) -> LocalServer:
        self.thread.start()
        if self.ready:
            self.wait_ready()
        return self

    def wait_ready(self) -> LocalServer:
        """Wait until /health says "ok": the embedder is loaded."""
        wait_until(lambda: (health(self.url) or {}).get("status") == "ok", "the server's status ok")
        return self

    @contextlib.contextmanager
    def context(self, tokens: int):
        """The server as if it had been started with that context length."""
        memory = self.server.memory
        services = (memory.completions, memory.builder)
        for service in services:
            service._settings = dataclasses.replace(memory.settings, context=tokens)
        try:
            yield
        finally:
            for service in services:
                service._settings = memory.settings

    def close(self):
        self._hang_up()  # a task that answers nobody ends soon
        self.server.task_dispatcher.shutdown()  # before the loop's trigger is closed: a task pulls it at its end
        self.server.close()
        self._hang_up()  # browsers keep their connections, and the loop waits for them
        self.thread.join(10)
        self.server.memory.close()

    def _hang_up(self):
        for channel in list(self.server.active_channels.values()):
            with contextlib.suppress(OSError, AttributeError):  # it may be gone by itself
                channel.socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.close()


def hang_up_later(server, body: dict, header: bytes = b"") -> socket.socket:
    """Send a request on a bare socket and return the socket, still waiting."""
    raw = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    sock.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"%sContent-Length: %d\r\n\r\n%s" % (header, len(raw), raw)
    )
    return sock


API = "/api/persona_memory"


def get(server, path: str, status: int = 200, **query):
    """The JSON that a server (or the server at an address) answers to a GET."""
    answer = httpx.get(getattr(server, "url", server) + path, params=query or None, timeout=PATIENCE, verify=False)
    assert answer.status_code == status, answer.text
    return answer.json()


def branch_texts(url: str, chat_id: str) -> list[str]:
    """The texts on a chat's current branch, oldest first."""
    answer = get(url, f"{API}/chats/{quote(chat_id, safe='')}/messages", limit=10_000)
    return [message["content"] for message in answer["messages"]]


def figure(running, name: str) -> float:
    """A figure of /metrics, by its name without the program's; 0 where it is not there yet."""
    rows = httpx.get(f"{running.url}/metrics", timeout=PATIENCE).text.splitlines()
    return next((float(row.rsplit(" ", 1)[1]) for row in rows if row.startswith(f"persona_memory_{name} ")), 0)


# ---------------------------------------------------------------------------- the client


def client(base_url: str) -> openai.OpenAI:
    """The real openai client for a server's root or /v1 address."""
    base = base_url.rstrip("/")
    return openai.OpenAI(
        base_url=base if base.endswith("/v1") else f"{base}/v1",
        api_key="none",
        max_retries=0,
        timeout=PATIENCE,
        http_client=openai.DefaultHttpxClient(verify=False, timeout=PATIENCE),
    )


@dataclass(frozen=True)
class Reply:
    """What one turn came to. A failed turn has `error`; a stream that failed half-way keeps the text before it."""

    text: str
    chat_id: str | None
    memory: str | None
    status: int
    error: str | None = None


def say(base_url: str, messages: list[dict], stream: bool = True, headers: dict | None = None, **body) -> Reply:
    """One turn with the real openai client."""
    with client(base_url) as api:
        try:
            answer = api.chat.completions.with_raw_response.create(
                model=body.pop("model", "fake-model"),
                messages=[],
                stream=stream,
                extra_headers=headers,
                extra_body={"messages": messages, **body},  # as they are: 0.1 s less for a thousand messages
            )
        except openai.APIStatusError as failure:
            return _reply("", failure.response, failure.message)
        if not stream:
            return _reply(answer.parse().choices[0].message.content or "", answer)
        text, error = _read(answer.parse())
        return _reply(text, answer, error)


def _read(stream) -> tuple[str, str | None]:
    """A stream's text and, where it ended with one, its error."""
    text = ""
    try:
        for event in stream:
            text += (event.choices[0].delta.content or "") if event.choices else ""
    except openai.APIError as failure:
        return text, failure.message
    return text, None


def _reply(text: str, answer, error: str | None = None) -> Reply:
    chat_id = answer.headers.get("X-Chat-Id")
    return Reply(
        text,
        unquote(chat_id) if chat_id else chat_id,
        answer.headers.get("X-Persona-Memory"),
        answer.status_code,
        error,
    )
