"""What clients expect of an OpenAI server beside its answers: addresses, headers, retries, and a proper end."""

import gzip
import json
import signal
import socket
import threading
import zlib
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fakes import LocalServer, Server, Upstream, branch_texts, client, say, settings

ONE_SERVER = True
FOREVER = 60


@pytest.fixture
def chat(request) -> list[dict]:
    """A transcript that no other test sends."""
    return [{"role": "user", "content": f"Good evening from {request.node.name}"}]


def post(server, path: str, **body) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=FOREVER, verify=False)


# ---------------------------------------------------------------------------- addresses


CARELESS = ["/v1/chat/completions/", "/chat/completions/", "/v1//chat/completions//", "/v1/v1/chat/completions"]


@pytest.mark.parametrize("path", CARELESS)
def test_carelessly_joined_addresses_work(server, upstream, chat, path):
    assert post(server, path, messages=chat).json()["choices"][0]["message"]["content"] == upstream.last["answer"]
    models = path.replace("chat/completions", "models")
    assert httpx.get(server.url + models, timeout=FOREVER).status_code == 200


@pytest.mark.parametrize("path", ["/v1", "/v1/chat/completions", "/v1/chat/completions/models", "/api/v1/models"])
def test_a_base_url_that_is_nearly_right_is_answered_with_the_right_one(server, path):
    """Many open it in a browser first."""
    words = httpx.get(server.url + path, timeout=FOREVER).json()["error"]["message"]
    assert f"{server.url}/v1," in words and "--proxy" not in words


def test_a_client_without_a_host_header_is_served(server):
    """Old ones speak HTTP/1.0; browsers, whose pages have to be kept out, always name the host."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), FOREVER) as sock:
        sock.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        answer = sock.makefile("rb").read()
    assert b" 200 OK" in answer and b"fake-model" in answer


def test_https_is_refused_at_once_and_in_the_log(server, caplog):
    """A client that says hello in TLS would wait for its answer without end."""
    with pytest.raises(httpx.ConnectError, match=r"(?i)wrong.version"):
        httpx.get(f"{server.url.replace('http:', 'https:')}/v1/models", verify=False, timeout=FOREVER)
    assert "http:// alone" in caplog.text


# ---------------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("form", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("X-GZIP", gzip.compress)]
)
def test_a_compressed_request_is_read(server, upstream, chat, form, pack):
    packed, headers = pack(json.dumps({"messages": chat}).encode()), {"Content-Encoding": form}
    for body in (packed, iter([packed[:20], packed[20:]])):  # in one piece, and in chunks
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=FOREVER)
        assert answer.json()["choices"][0]["message"]["content"] == upstream.last["answer"]
    assert upstream.last["body"]["messages"] == chat


@pytest.mark.parametrize("form", ["gzip", "deflate", "br", "zstd"])
@pytest.mark.parametrize("off", [False, True], ids=["", "off"])
def test_what_cannot_be_unpacked_is_refused_in_words(server, chat, form, off):
    headers = {"Content-Encoding": form} | ({"X-Persona-Memory": "off"} if off else {})
    plain = json.dumps({"messages": chat}).encode()
    for body in (plain, gzip.compress(plain)[:-9]):
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=FOREVER)
        assert answer.status_code == 400 and "compressed" in answer.json()["error"]["message"]


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_one_model(server, upstream, prefix):
    """An id may hold slashes, quoted or not."""
    upstream.models = [{"id": "org/model:free", "object": "model"}]
    for name in ("org/model:free", "org%2Fmodel:free"):
        assert httpx.get(f"{server.url}{prefix}/models/{name}", timeout=FOREVER).json()["id"] == "org/model:free"
    missing = httpx.get(f"{server.url}{prefix}/models/other", timeout=FOREVER)
    assert missing.status_code == 404
    assert "other" in missing.json()["error"]["message"]


def test_openais_client_reads_models(server, upstream):
    with client(server.url) as api:
        assert [row.id for row in api.models.list()] == ["fake-model"]
        assert api.models.retrieve("fake-model").id == "fake-model"


@pytest.mark.parametrize("steering", [{"models": []}, {"routes": {"/v1/models": b"<html>"}}], ids=["404", "a page"])
@pytest.mark.parametrize("model", ["mine", ""])
def test_a_server_without_a_list_has_the_model_of_the_settings(upstream, data_dir, steering, model):
    """A client can then connect."""
    upstream.steer(**steering)
    with LocalServer(settings(data_dir, upstream.url, model=model), ready=False) as running:
        answer = httpx.get(f"{running.url}/v1/models", timeout=FOREVER)
    if model:
        assert [row["id"] for row in answer.json()["data"]] == ["mine"]
    else:
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/completions", "/v1/responses", "/responses"])
def test_other_apis_are_refused_in_words(server, path):
    answer = post(server, path, model="m", prompt="Once upon a time")
    assert answer.status_code == 404
    assert "/v1/chat/completions" in answer.json()["error"]["message"]


# ---------------------------------------------------------------------------- limits of a reply


@pytest.mark.parametrize("value", [-1, 0, 1024.0, "512", None])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_limits_in_every_form_reach_the_upstream_as_they_came(server, upstream, chat, name, value):
    assert say(server.url, chat, **{name: value}).status == 200
    assert upstream.last["body"][name] == value


@pytest.mark.parametrize("value", ["many", 1.5, True, [1]])
def test_limits_that_are_none_are_the_clients_mistake(server, chat, value):
    assert "max_tokens" in say(server.url, chat, max_tokens=value).error


def test_a_models_name_has_its_limit(server, chat):
    assert "model" in say(server.url, chat, model="m" * 300).error


# ---------------------------------------------------------------------------- retries


def test_what_was_tried_enough_is_not_tried_again(server, upstream, chat):
    """OpenAI's library has three tries of its own; together that would be twelve."""
    upstream.steer(status=429, error="slow down")
    with client(server.url).with_options(max_retries=2) as api, pytest.raises(openai.RateLimitError) as failure:
        api.chat.completions.create(model="m", messages=chat)
    assert failure.value.response.headers["x-should-retry"] == "false"
    assert len(upstream.chats) == 4


@pytest.mark.parametrize(("status", "headers"), [(400, {}), (429, {"Retry-After": "120"})])
def test_what_was_not_tried_again_is_the_clients_to_try(server, upstream, chat, status, headers):
    upstream.steer(status=status, error="no luck", headers=headers)
    answer = post(server, "/v1/chat/completions", messages=chat)
    assert answer.status_code == status
    assert "x-should-retry" not in answer.headers


# ---------------------------------------------------------------------------- browsers

OPENAI_HEADERS = "authorization,content-type,x-stainless-os,x-stainless-lang,x-stainless-retry-count"


def preflight(running, origin: str, **headers) -> httpx.Headers:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", **headers}
    return httpx.options(f"{running.url}/v1/chat/completions", headers=asked, timeout=FOREVER).headers


def test_the_headers_that_a_browser_asks_for_are_allowed(server):
    answer = preflight(server, "http://localhost:5173", **{"Access-Control-Request-Headers": OPENAI_HEADERS})
    allowed = answer["Access-Control-Allow-Headers"].split(", ")
    assert {*OPENAI_HEADERS.split(","), "x-chat-id", "x-persona-memory"} <= set(allowed)
    assert len(allowed) == len(set(allowed))
    assert "Access-Control-Request-Headers" in answer["Vary"]


@pytest.mark.parametrize("names", ["x y", "x-a,<script>", "x" * 400, ",,,"])
def test_odd_header_names_are_not_repeated(server, names):
    allowed = preflight(server, "http://localhost:5173", **{"Access-Control-Request-Headers": names})
    assert "<" not in allowed["Access-Control-Allow-Headers"]
    assert len(allowed["Access-Control-Allow-Headers"]) < 200


def test_nobody_is_told_to_let_in_all_pages_without_an_address(server):
    """Any web site can make such a page."""
    answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": "null"}, timeout=FOREVER)
    assert answer.status_code == 403 and "http://localhost" in answer.text and "--allow-origin" not in answer.text


def test_foreign_origins_get_nothing(server):
    answer = preflight(server, "https://evil.example", **{"Access-Control-Request-Headers": OPENAI_HEADERS})
    assert not [name for name in answer if name.startswith("access-control-allow")]


@pytest.mark.parametrize(("origin", "allowed"), [("https://chat.example.org", "true"), ("https://evil.example", None)])
def test_pages_that_the_user_has_named_may_call_this_machine(upstream, data_dir, origin, allowed):
    """A browser asks before a page of the internet may call a private address; localhost's pages need no such leave."""
    asked = {"Access-Control-Request-Private-Network": "true"}
    with LocalServer(settings(data_dir, upstream.url, allow_origin="https://chat.example.org"), ready=False) as named:
        assert preflight(named, origin, **asked).get("Access-Control-Allow-Private-Network") == allowed


def test_only_origins_that_were_named_get_into_the_private_network(server):
    answer = preflight(server, "http://localhost:5173", **{"Access-Control-Request-Private-Network": "true"})
    assert "Access-Control-Allow-Private-Network" not in answer


# ---------------------------------------------------------------------------- histories


def test_a_client_that_sends_only_its_newest_message_has_its_history(server, upstream, chat):
    """It showed the chat once, under an id; from then on its newest messages are enough."""
    told = [*chat, {"role": "assistant", "content": "The lamp is lit."}]
    newest = [{"role": "user", "content": "Who lit it?"}]
    say(server.url, [*told, {"role": "user", "content": "And now?"}], chat_id="delta")
    answer = upstream.last["answer"]
    say(server.url, newest, chat_id="delta")
    expected = [*told, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": answer}, *newest]
    assert upstream.last["body"]["messages"] == expected


# ---------------------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_reply_is_kept_as_far_as_it_came(data_dir, number):
    """The program is ended in the middle of a stream: what the client has seen is there after the next start."""
    with Upstream(hold_after=(3, threading.Event())) as upstream:
        server = Server(data_dir, upstream.url, embedder=False)
        with server:
            lines, stream = [], {"messages": [{"role": "user", "content": "Go on."}], "stream": True, "chat_id": "cut"}
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=stream, timeout=FOREVER) as answer:
                for line in answer.iter_lines():
                    lines += [line] if line.startswith("data:") else []
                    if len(lines) == 3:
                        server.process.send_signal(number)
                        break
                assert server.process.wait(FOREVER) == 0
            shown = "".join(json.loads(line[5:])["choices"][0]["delta"]["content"] for line in lines)
        upstream.hold_after = None
        with LocalServer(settings(data_dir, upstream.url), ready=False) as server:
            assert branch_texts(server.url, "cut") == ["Go on."]
            chat = httpx.get(f"{server.url}/api/persona_memory/chats/cut", timeout=FOREVER).json()
            assert [row["content"] for row in chat["replies"]] == [shown]
