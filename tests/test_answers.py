"""Answers of every shape: what a client gets, what is kept, what the health says, and what a summary makes of it.

Each row of the table is a body that some server really sends, or nearly. It answers plain requests and streams alike,
under a content type that may be wrong: the reader looks at the bytes.
"""

import json
import re
from dataclasses import dataclass
from urllib.parse import quote

import httpx
import pytest
from fakes import settings

import persona_memory as pm

ONE_SERVER = True
FOREVER = 60
WORDS = "The lamp burns low."


def line(payload) -> bytes:
    """An event of a stream."""
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


def whole(message=None, finish="stop", choice=None, **more) -> bytes:
    """A whole answer."""
    message = {"role": "assistant", "content": WORDS} if message is None else message
    choice = {"index": 0, "message": message, "finish_reason": finish} if choice is None else choice
    return json.dumps({"id": "1", "object": "chat.completion", "model": "m", "choices": [choice], **more}).encode()


def piece(delta, finish=None, **choice) -> dict:
    """A chunk of a stream."""
    return {"id": "1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish, **choice}]}


def streamed(*pieces, done=True) -> bytes:
    """A whole stream."""
    return b"".join(map(line, pieces)) + (line(b"[DONE]") if done else b"")


TWO = ({"content": "The lamp "}, {"content": "burns low."})
GOOD_STREAM = streamed(*map(piece, TWO), piece({}, "stop"))
REFUSED = {"message": "Provider returned error", "code": 429, "metadata": {"raw": "the model is rate-limited upstream"}}
THOUGHT_PART = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
WRAPPED = {
    "message": "Provider returned error",
    "code": 403,
    "metadata": {"raw": '{"error": {"message": "wrong region"}}'},
}
TIMED_OUT = {"message": {"content": ""}, "finish_reason": "error", "error": {"code": 502, "message": "idle timeout"}}
DEEP = b'{"choices":' + b"[" * 5000 + b"]" * 5000 + b"}"


@dataclass(frozen=True)
class Shape:
    """A body and what comes of it: the words of the reply, or an error's status and words."""

    name: str
    body: bytes
    words: str = WORDS
    status: int = 200
    kind: str | None = "application/json"
    answered: int = 200  # the upstream's own status
    after_words: bool = False  # in a stream the error comes after some words of the reply
    tries: int = 1


def failing(name, body, status, words, tries=1, **more) -> Shape:
    """A shape that is an error."""
    return Shape(name, body, words, status, tries=tries, **more)


UNREADABLE = (502, "cannot be read")
RETRIES = pm.ATTEMPTS
SHAPES = [
    # whole answers
    Shape("an OpenAI answer", whole()),
    Shape("under text/plain", whole(), kind="text/plain"),
    Shape("under text/event-stream", whole(), kind="text/event-stream"),
    Shape("under no content type", whole(), kind=None),
    Shape("with a glued [DONE]", whole() + b"data: [DONE]\n\n"),
    Shape("as one event", line(whole())),
    Shape("behind a byte order mark", b"\xef\xbb\xbf" + whole()),
    Shape("behind white space", b"\n\n  \n" + whole()),
    Shape("pretty printed", json.dumps(json.loads(whole()), indent=2).encode()),
    Shape("in a list", b"[" + whole() + b"]"),
    Shape("no finish reason", whole(finish=None)),
    Shape("an empty finish reason", whole(finish="")),
    Shape("a finish reason that is no text", whole(finish={"type": "stop"})),
    Shape("no index", whole(choice={"message": {"content": WORDS}})),
    Shape("an index that is none", whole(choice={"index": [1], "message": {"content": WORDS}})),
    Shape("an index as text", whole(choice={"index": "0", "message": {"content": WORDS}})),
    Shape("choices as an object", b'{"choices": {"message": {"content": "The lamp burns low."}}}'),
    Shape("a null choice beside", b'{"choices": [null, {"message": {"content": "The lamp burns low."}}]}'),
    Shape("message as text", whole(WORDS)),
    Shape("message as a list of parts", whole([{"type": "text", "text": WORDS}])),
    Shape("text in place of a message", whole(choice={"text": WORDS, "finish_reason": "stop"})),
    Shape("delta in a whole answer", whole(choice={"delta": {"content": WORDS}, "finish_reason": "stop"})),
    Shape("content as parts", whole({"content": [{"type": "text", "text": "The lamp "}, {"text": "burns low."}]})),
    Shape("content as a list of strings", whole({"content": ["The lamp ", "burns low."]})),
    Shape("content as an object", whole({"content": {"type": "text", "text": WORDS}})),
    Shape("content as output_text", whole({"content": [{"type": "output_text", "text": WORDS}]})),
    Shape("thoughts among the parts", whole({"content": [THOUGHT_PART, {"type": "text", "text": WORDS}]})),
    Shape("thoughts beside", whole({"content": WORDS, "reasoning_content": "Hm."})),
    Shape("content as a number", whole({"content": 42}), words="42"),
    Shape("no usage", whole(usage=None)),
    Shape("usage as a list", whole(usage=[1])),
    Shape("usage as text", whole(usage="many")),
    Shape("usage with odd details", whole(usage={"prompt_tokens": 7, "prompt_tokens_details": "x"})),
    Shape("usage with odd counts", whole(usage={"prompt_tokens": "7", "completion_tokens": None, "total_tokens": 9.0})),
    Shape("usage of 400 digits", whole()[:-1] + b', "usage": {"prompt_tokens": ' + b"9" * 400 + b"}}"),
    Shape("a number that JSON has not", whole()[:-1] + b', "score": NaN}'),
    Shape("a name of 100,000 letters", whole(model="m" * 100_000)),
    Shape("error: null beside the answer", whole(error=None)),
    Shape("an error of nothing beside the answer", whole(error={"message": "", "type": "", "param": "", "code": None})),
    Shape("an empty delta beside the message", whole(choice={"delta": {}, "message": {"content": WORDS}})),
    Shape("a delta of null beside the message", whole(choice={"delta": None, "message": {"content": WORDS}})),
    Shape("an id, a time and a model of other types", whole(id=7, created="now", model=["m"])),
    Shape("another role", whole({"role": "model", "content": WORDS})),
    Shape("tool calls of null", whole({"role": "assistant", "content": WORDS, "tool_calls": None, "refusal": None})),
    Shape("a finish reason of no reason", whole(finish="null")),
    Shape("odd parts", whole({"content": [None, {"type": "text"}, {"type": "text", "text": None}, WORDS]})),
    Shape("Ollama's own shape", b'{"message": {"role": "assistant", "content": "The lamp burns low."}, "done": true}'),
    Shape("Ollama's lines", b'{"message": {"content": "The lamp "}, "done": false}\n'
                            b'{"message": {"content": "burns low."}, "done": true}\n'),
    # streams
    Shape("a stream", GOOD_STREAM, kind="text/event-stream"),
    Shape("a stream under JSON's type", GOOD_STREAM),
    Shape("a stream under no type", GOOD_STREAM, kind=None),
    Shape("a stream with CRLF", GOOD_STREAM.replace(b"\n", b"\r\n")),
    Shape("a stream with CR", GOOD_STREAM.replace(b"\n", b"\r")),
    Shape("a stream without empty lines", GOOD_STREAM.replace(b"\n\n", b"\n")),
    Shape("a stream with comments and other fields", b": hello\n\nevent: message\nid: 1\nretry: 5\n" + GOOD_STREAM),
    Shape("a stream without [DONE]", streamed(*map(piece, TWO), piece({}, "stop"), done=False)),
    Shape("a stream without a finish reason", streamed(*map(piece, TWO))),
    Shape("a stream that just ends", streamed(*map(piece, TWO), done=False)),
    Shape("a stream that ends without an empty line", streamed(*map(piece, TWO), done=False).rstrip()),
    Shape("null deltas", streamed(piece(None), *map(piece, TWO), piece(None, "stop"))),
    Shape("deltas as text", streamed(piece("The lamp "), piece("burns low."), piece({}, "stop"))),
    Shape("messages in a stream", streamed({"choices": [{"index": 0, "message": {"content": WORDS}}]})),
    Shape("indexes that are none", streamed(piece(TWO[0], index=None), piece(TWO[1], index="a"), piece({}, "stop"))),
    Shape("parts in a stream", streamed(
        piece({"content": [THOUGHT_PART]}),
        piece({"content": [{"type": "text", "text": "The lamp "}]}), piece({"content": ["burns low."]}, "stop"))),
    Shape("pings", streamed({"object": "ping"}, *map(piece, TWO), {"choices": None}, piece({}, "stop"))),
    Shape("garbage among the chunks", streamed(piece(TWO[0]), b"<oops>", piece(TWO[1]), piece({}, "stop"))),
    Shape("messages that repeat the deltas", streamed(
        piece(TWO[0], message={"content": TWO[0]["content"]}), piece(TWO[1], message={"content": WORDS}),
        piece({}, "stop", message={"content": WORDS}))),
    Shape("a finish reason of no reason in each chunk", streamed(*(piece(p, "null") for p in TWO), piece({}, "stop"))),
    Shape("data: twice", GOOD_STREAM.replace(b"data: ", b"data: data: ")),
    Shape("a byte order mark in each event", GOOD_STREAM.replace(b"data: ", b"data: \xef\xbb\xbf")),
    Shape("no blank behind data:", GOOD_STREAM.replace(b"data: ", b"data:")),
    Shape("events after [DONE]", GOOD_STREAM + streamed(piece({"content": " More."}))),
    Shape("[DONE] twice", GOOD_STREAM + line(b"[DONE]")),
    Shape("payloads of nothing", streamed(None, 0, [], "", {}, *map(piece, TWO), piece({}, "stop"))),
    Shape("two events in one", line(json.dumps(piece(TWO[0])).encode() + b"\ndata: " + json.dumps(
        piece(TWO[1], "stop")).encode()) + line(b"[DONE]")),
    Shape("JSON over several lines of data", b"".join(
        b"data: " + row + b"\n" for row in json.dumps(piece({"content": WORDS}, "stop"), indent=1).encode().split(b"\n")
    ) + b"\n" + line(b"[DONE]")),
    Shape("chunks without data:", b"\n".join(json.dumps(piece(p)).encode() for p in TWO)),
    Shape("a mark in two halves", streamed(piece({"content": "\ud83d"}), piece({"content": "\ude00"}, "stop")),
          words="\U0001f600"),
    Shape("half a mark", whole({"role": "assistant", "content": f"\ud83d{WORDS}"}), words=f"\ufffd{WORDS}"),
    Shape("usage first", streamed({"choices": [], "usage": {"prompt_tokens": 3}}, *map(piece, TWO), piece({}, "stop"))),
    Shape("odd usage in a stream", streamed(*map(piece, TWO), {**piece({}, "stop"), "usage": [{}]})),
    # errors inside a 200
    failing("an error in a 200", json.dumps({"error": REFUSED}).encode(), 429, "rate-limited upstream", RETRIES),
    failing("an error in a stream", line({"error": REFUSED}), 429, "rate-limited upstream", RETRIES),
    failing("a raw reason that is JSON", json.dumps({"error": WRAPPED}).encode(), 403, "wrong region"),
    failing("a choice that ended in an error", whole(choice=TIMED_OUT), 502, "idle timeout", RETRIES),
    failing("finish_reason error alone", whole({"content": ""}, "error"), 502, "ended its reply in an error", RETRIES),
    failing("an error that is text", b'{"error": "model is overloaded"}', 502, "model is overloaded", RETRIES),
    failing("an error of a kind", b'{"error": {"type": "overloaded_error", "message": "busy"}}', 503, "busy", RETRIES),
    failing("an event named error", b'event: error\ndata: {"type": "rate_limit_error", "message": "slower"}\n\n', 429,
            "slower", RETRIES),
    failing("FastAPI's detail", b'{"detail": [{"loc": ["body", "seed"], "msg": "field required"}]}', 502,
            "'seed': field required", RETRIES),
    failing("Cloudflare's errors", b'{"errors": [{"code": 7003, "message": "no route"}]}', 502, "no route", RETRIES),
    failing("MiniMax's frame", b'{"choices": null, "base_resp": {"status_code": 1008, "status_msg": "no balance"}}',
            502, "no balance", RETRIES),
    failing("a code and a msg", b'{"code": 1210, "msg": "the API is busy"}', 502, "the API is busy", RETRIES),
    failing("Baidu's names", b'{"error_code": 18, "error_msg": "QPS limit"}', 502, "QPS limit", RETRIES),
    failing("no success", b'{"success": false, "error": {"message": "bad model", "status": 404}}', 404, "bad model"),
    failing("an error of a list", b'{"error": ["a", "wrong turn"]}', 502, "wrong turn", RETRIES),
    failing("a flat error", b'{"object": "error", "message": "bad key", "code": 401}', 401, "bad key"),
    failing("an error after some words", streamed(piece(TWO[0]), {"error": {"message": "idle", "code": 504}}), 504,
            "idle", RETRIES, after_words=True),
    failing("a filter's stop before the first word", whole({"content": ""}, "content_filter"), 400, "content filter"),
    failing("an error's status", b'{"error": {"message": "no such model", "code": null}}', 404, "no such model",
            answered=404),
    failing("a redirect", b"", 502, "redirects", RETRIES, answered=302),
    # answers that are none
    failing("nothing", b"", *UNREADABLE),
    failing("null", b"null", *UNREADABLE),
    failing("text", b'"The lamp burns low."', *UNREADABLE),
    failing("a web page", b"<!DOCTYPE html><html><body>Welcome</body></html>", *UNREADABLE, kind="text/html"),
    failing("half an answer", whole()[:-30], *UNREADABLE),
    failing("null choices", b'{"choices": null}', *UNREADABLE),
    failing("a choice that is null", b'{"choices": [null]}', *UNREADABLE),
    failing("a choice that is text", b'{"choices": ["x"]}', *UNREADABLE),
    failing("a choice that is a number", b'{"choices": [1]}', *UNREADABLE),
    failing("no choices", b'{"choices": []}', 502, "empty", 2),
    failing("nested too deep", DEEP, *UNREADABLE),
    failing("garbage in a stream", line(b"{<html>"), *UNREADABLE),
    failing("[DONE] alone", line(b"[DONE]"), *UNREADABLE),
    failing("a blank answer", whole({"content": ""}), 502, "empty", 2),
    failing("a blank stream", streamed(piece({"role": "assistant"}), piece({}, "stop")), 502, "empty", 2),
    failing("white space", whole({"content": " \n"}), 502, "empty", 2),
    failing("null content", whole({"content": None}), 502, "empty", 2),
    failing("all tokens used up", whole({"content": ""}, "length"), 502, "Raise max_tokens"),
]  # fmt: skip


def shape_rows():
    """Every shape as a parameter."""
    return [pytest.param(shape, id=shape.name) for shape in SHAPES]


def ask(server, shape: Shape, stream: bool) -> tuple[int, str, dict, list]:
    """A raw turn: its status, its text, its error, and the stream's payloads. A stream has to end properly."""
    body = {"model": "m", "stream": stream, "chat_id": f"{shape.name} {stream}", "messages": [
        {"role": "user", "content": f"Light the lamp, {shape.name} {stream}."}]}  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=FOREVER, verify=False)
    if "event-stream" not in answer.headers["content-type"]:
        found = answer.json()
        text = found["choices"][0]["message"]["content"] if answer.status_code == 200 else ""
        return answer.status_code, text, found.get("error") or {}, [found]
    rows = [row.removeprefix("data: ") for row in answer.text.split("\n\n") if row.startswith("data: ")]
    assert rows[-1] == "[DONE]" and rows.count("[DONE]") == 1
    payloads = [json.loads(row) for row in rows[:-1]]
    text = "".join(c["delta"].get("content") or "" for p in payloads for c in p.get("choices", []))
    return answer.status_code, text, next((p["error"] for p in payloads if p.get("error")), {}), payloads


def kept(server, shape: Shape, stream: bool) -> list[str]:
    """The words that memory has of the reply."""
    name = quote(f"{shape.name} {stream}", safe="")
    found = httpx.get(f"{server.url}/api/persona_memory/chats/{name}", params={"mood": "off"}, timeout=FOREVER).json()
    return [row["content"] for row in found["replies"]]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("shape", shape_rows())
def test_what_a_client_gets_and_what_is_kept(server, upstream, shape, stream):
    """The reply's words or an error in OpenAI's shape; what was shown is kept, and nothing else."""
    upstream.raw = (shape.answered, shape.kind, shape.body)
    status, text, error, payloads = ask(server, shape, stream)
    if shape.status == 200:
        assert (status, text, error) == (200, shape.words, {})
        finishes = [c["finish_reason"] for p in payloads for c in p["choices"] if c.get("finish_reason")]
        assert finishes == ["stop"] or (shape.name.endswith("reason that is no text") and finishes)
        assert kept(server, shape, stream) == [shape.words]
    else:
        begun = stream and shape.after_words
        assert status == (200 if begun else shape.status)
        assert shape.words in error["message"]
        assert set(error) >= {"message", "type", "param", "code"}
        assert kept(server, shape, stream) == (["The lamp "] if begun else [])
        assert len(upstream.chats) == (1 if begun else shape.tries)
    assert httpx.get(f"{server.url}/health", timeout=FOREVER).json()["status"] == "ok"


@pytest.mark.parametrize("shape", shape_rows())
def test_what_a_summary_gets(upstream, data_dir, shape):
    """A request of our own, which is always a plain one, reads the same words or gets the same error."""
    asked = pm.make_upstream(settings(data_dir, upstream.url), pm.Metrics())
    upstream.raw = (shape.answered, shape.kind, shape.body)
    call = pm.Call(background=True, retry=False)
    body = {"model": "m", "messages": [{"role": "user", "content": "Summarise."}], "max_tokens": 100}
    if shape.status == 200:
        assert pm.text_of_choice(asked.complete(body, call)["choices"][0]) == shape.words
        return
    with pytest.raises(pm.PersonaMemoryError, match=re.escape(shape.words)) as failure:
        asked.complete(body, call)
    assert failure.value.status == shape.status


def test_the_table_is_large_enough():
    """Sixty shapes at least, none twice."""
    assert len({shape.name for shape in SHAPES}) == len(SHAPES) >= 60
    assert len({(shape.body, shape.kind, shape.answered) for shape in SHAPES}) == len(SHAPES)
