"""What a determined stranger tries, at the server's socket, from the upstream's side, and with the data folder."""

import gzip
import os
import shutil
import threading
import time

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


def bomb(handler, status: int = 200) -> None:
    """A quarter of a gigabyte of blanks in a few hundred kilobytes."""
    packed = gzip.compress(b"[" + b" " * 2**28, 1)
    handler.send_response(status)
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


def test_an_errors_body_is_read_to_a_limit(upstream):
    """The piece that goes beyond it is the last that is asked for; small ones are counted."""
    large, small = iter([b"x" * 2**19] * 9), iter([b"x"] * 999)
    assert len(pm.start_of(large)) == pm.MOST_OF_ERROR and len(list(large)) == 7
    assert len(pm.start_of(small)) == pm.MOST_ERROR_PACKETS and len(list(small)) == 899
    upstream.steer(routes={"/v1/chat/completions": lambda h: bomb(h, 400)})
    with pytest.raises(pm.UpstreamError) as refused:
        openai(upstream).complete(TURN, pm.Call(retry=False))
    assert refused.value.status == 400


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


def turn(running, text: str, *shown: str) -> str:
    """A turn of the chat "tale"; what memory says of it."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": words} for n, words in enumerate((*shown, text))]
    answer = httpx.post(
        f"{running.url}/v1/chat/completions", json={"messages": messages, "chat_id": "tale"}, timeout=60
    )
    return answer.raise_for_status().headers["X-Persona-Memory"]


@pytest.fixture
def running(upstream, data_dir):
    """A server that finds memories by their words."""
    given = settings(data_dir / "deep" / "data", upstream.url, embedder="/nonexistent")
    with LocalServer(given, ready=False) as running:
        yield running


@pytest.fixture
def open_mask():
    """A process whose files are everybody's, where nothing is said about it."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_every_folder_is_its_owners_whatever_the_umask_is(open_mask, running, data_dir):
    """Also those that are made again after somebody has removed them all."""
    api = f"{running.url}/api/persona_memory"
    for _ in range(2):
        assert not turn(running, "Hello.").startswith("degraded")
        httpx.patch(f"{api}/characters/Maren", json={"carry_over": True}).raise_for_status()
        refs = f"{running.url}/persona_memory.git/info/refs?service=git-upload-pack"
        assert httpx.get(refs).status_code == 200
        data = data_dir / "deep" / "data"
        folders = [data_dir, data.parent, data, *(f for f in data.iterdir() if f.is_dir())]
        assert len(folders) == 7
        assert [f for f in folders if f.stat().st_mode & 0o077] == []
        shutil.rmtree(data_dir)


def test_what_is_set_after_the_data_was_removed_is_kept(running, data_dir):
    """SQLite would go on writing into files that no longer have a name; and no chat is listed that is gone."""
    api = f"{running.url}/api/persona_memory"
    turn(running, "Hello.")
    httpx.patch(f"{api}/characters/Maren", json={"carry_over": True}).raise_for_status()
    shutil.rmtree(data_dir)
    assert httpx.get(f"{api}/chats").json() == []
    assert httpx.get(f"{api}/characters/Maren").json()["carry_over"] is False
    httpx.patch(f"{api}/characters/Maren", json={"carry_over": True}).raise_for_status()
    httpx.post(f"{api}/chats/other/messages", json=TURN).raise_for_status()
    again = pm.PersonaMemory(running.server.memory.settings)
    assert again.recaller.character("Maren")["carry_over"] is True
    assert [line["chat_id"] for line in again.chats()] == ["other"]
    again.close()


def test_a_damaged_copy_of_the_extension_is_made_anew(running, data_dir):
    """It is derived from the program; git gets the same commit as before."""
    refs = f"{running.url}/persona_memory.git/info/refs?service=git-upload-pack"
    before = httpx.get(refs).content
    folder = data_dir / "deep" / "data" / "extension.git"
    for file in [folder / "HEAD", folder / "config", *folder.glob("refs/heads/*"), *folder.glob("objects/pack/*")]:
        file.chmod(0o600)
        file.write_bytes(b"\xff[")
        answer = httpx.get(refs)
        assert (answer.status_code, answer.content) == (200, before), file


def test_a_clock_that_jumps_costs_no_turn_its_memory(running, monkeypatch):
    """Ten years back, sixty ahead: a chat goes on, keeps its order, and can be exported and taken in."""
    real, said = time.time, []
    for number, years in enumerate((0, -10, 60, 0)):
        monkeypatch.setattr(time, "time", lambda years=years: real() + years * 365 * 86_400)
        said.append(f"Evening {number}: we count the boats.")
        assert not turn(running, said[-1]).startswith("degraded")
    api = f"{running.url}/api/persona_memory"
    rows = httpx.get(f"{api}/chats/tale/messages").json()["messages"]
    assert [row["content"] for row in rows if row["role"] == "user"] == said
    whole = httpx.get(f"{api}/chats/tale/export").content
    [taken] = httpx.post(f"{api}/import", params={"chat_id": "copy"}, content=whole).json()["chats"]
    assert taken["added"] == len(rows)
