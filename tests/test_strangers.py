"""What a determined stranger tries, at the server's socket, from the upstream's side, and with the data folder."""

import gzip
import threading

import httpx
import pytest
from fakes import LocalServer, Upstream, settings
from gemini import Gemini

import persona_memory as pm

KEY = "house-key-of-the-upstream"
TURN = {"messages": [{"role": "user", "content": "Hello."}]}


def endless(handler, piece: bytes, pause: float = 0.0, header: bytes = b"") -> None:
    """An answer that never ends, for as long as anybody listens."""
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + (header or b"\r\n"))
    ended, closing = threading.Event(), handler.server.upstream.closing
    while not closing.is_set():
        handler.wfile.write(piece)
        handler.wfile.flush()
        ended.wait(pause)


def bomb(handler) -> None:
    """A quarter of a gigabyte of blanks in a few hundred kilobytes."""
    packed = gzip.compress(b"[" + b" " * 2**28, 1)
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", str(len(packed)))
    handler.end_headers()
    handler.wfile.write(packed)


def openai(upstream: Upstream, timeout: float = 60.0) -> pm.OpenAIUpstream:
    """The program's side of an upstream."""
    return pm.OpenAIUpstream(upstream.url, KEY, pm.Gate(5, pm.Metrics()), timeout)


@pytest.mark.parametrize("answer", [lambda h: endless(h, b" " * 2**16), bomb])
def test_a_list_of_models_without_end_is_read_to_a_limit(upstream, answer):
    """The same for what a server is asked about its context: memory has a bound."""
    upstream.steer(routes={"/v1/models": answer, "/props": answer})
    with pytest.raises(pm.UnreadableAnswer) as refused:
        openai(upstream).models(pm.Call())
    assert pm.TOO_LARGE in str(refused.value)
    assert openai(upstream).context_length("fake-model", pm.Call()) is None


@pytest.mark.parametrize("header", [b"", b"X-Slow: "])
def test_an_answer_that_drips_is_cut_off_in_time(upstream, monkeypatch, header):
    """httpx would wait for each byte anew, and a turn with it: a byte a moment, in the head or in the body."""
    monkeypatch.setattr(pm, "ASK_SECONDS", 0.3)
    upstream.steer(routes=dict.fromkeys(("/props", "/v1/models"), lambda h: endless(h, b"1", 0.02, header)))
    assert openai(upstream).context_length("fake-model", pm.Call()) is None
    with pytest.raises(pm.UpstreamUnavailable):
        openai(upstream).models(pm.Call(), timeout=0.3)


@pytest.mark.parametrize("kind", ["openai", "gemini"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_gets_neither_the_key_nor_the_words(kind, status, upstream, data_dir):
    """Whoever may answer in the upstream's place could send both where he likes. The error names the address."""
    made = Upstream if kind == "openai" else Gemini
    with made() as first:
        elsewhere = f"{upstream.root}/v1/chat/completions"

        def away(handler) -> None:
            handler.send_response(status)
            handler.send_header("Location", elsewhere)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        paths = ["/v1/chat/completions", "/v1/models"] if kind == "openai" else list(gemini_paths())
        first.steer(routes=dict.fromkeys(paths, away))
        address = (
            {"upstream_url": first.url}
            if kind == "openai"
            else {"upstream_url": "gemini", "gemini_endpoint": first.root}
        )
        with LocalServer(settings(data_dir, **address, upstream_key=KEY), ready=False) as running:
            for stream in (False, True):
                answer = httpx.post(f"{running.url}/v1/chat/completions", json={**TURN, "stream": stream}, timeout=60)
                assert (answer.status_code, elsewhere in answer.text) == (502, True), answer.text
            models = httpx.get(f"{running.url}/v1/models", timeout=60)
            assert models.status_code == 502 and KEY not in models.text
        assert first.requests and upstream.requests == []


def gemini_paths():
    """The paths of Google's API that are asked."""
    model = "gemini-flash-latest"
    yield "/v1beta/models"
    for method in ("", ":generateContent", ":streamGenerateContent"):
        yield f"/v1beta/models/{model}{method}"
