"""Fixtures: a recording upstream, an empty data folder, and the program in this process between them."""

import functools
import os
import sys
import threading
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from fakes import LocalServer, Upstream, settings  # noqa: E402

import persona_memory  # noqa: E402

REAL_PAUSES = {name: getattr(persona_memory, name) for name in ("FIRST_PAUSE_SECONDS", "PAUSE_JITTER_SECONDS")}

hypothesis.settings.register_profile("unhurried", deadline=None)  # how long a step takes is the benchmarks' matter
hypothesis.settings.load_profile("unhurried")


class SharedModel:
    """One loaded model for all servers of this process, used by one thread at a time as its tokenizer needs it."""

    def __init__(self, model):
        self.model = model
        self.lock = threading.Lock()

    def encode(self, *args, **kwargs):
        with self.lock:
            return self.model.encode(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.model, name)


@pytest.fixture(scope="session", autouse=True)
def load_the_embedder_once():
    """The model is the real one, loaded when first needed; only loading it again for each server is saved."""
    load = persona_memory.load_sentence_transformer
    persona_memory.load_sentence_transformer = functools.cache(lambda name: SharedModel(load(name)))
    yield
    persona_memory.load_sentence_transformer = load


@pytest.fixture(scope="session", autouse=True)
def short_pauses():
    """Before another try of a failed request; test_gate.py looks at the real ones."""
    persona_memory.FIRST_PAUSE_SECONDS, persona_memory.PAUSE_JITTER_SECONDS = 0.01, 0.01


@pytest.fixture
def upstream():
    """A recording upstream."""
    with Upstream() as fake:
        yield fake


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """A folder for the program's data that does not exist yet."""
    return tmp_path / "data"


@pytest.fixture
def server(upstream, data_dir):
    """The program in this process, ready to answer."""
    with LocalServer(settings(data_dir, upstream.url)) as running:
        yield running


@pytest.fixture(scope="module")
def shared_upstream():
    """One fake upstream for a whole module."""
    with Upstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def shared_server(shared_upstream, tmp_path_factory):
    """One program before it, for a whole module; without the line on the user's mood, so that prompts are foreseen."""
    data = tmp_path_factory.mktemp("shared") / "data"
    with LocalServer(settings(data, shared_upstream.url, no_guidance=True)) as running:
        yield running
