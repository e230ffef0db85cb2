"""Fixtures: a recording upstream, an empty data folder, and the program in this process between them."""

import functools
import os
import shutil
import ssl
import sys
import tempfile
import threading
from pathlib import Path

import httpx
import hypothesis
import numpy as np
import pytest

# Hundreds of data folders are written durably: in RAM, where there is room, no test waits for a disk.
IN_RAM, ROOM = Path("/dev/shm"), 2 << 30
if "TMPDIR" not in os.environ and IN_RAM.is_dir() and shutil.disk_usage(IN_RAM).free > ROOM:
    os.environ["TMPDIR"] = tempfile.tempdir = str(IN_RAM)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from fakes import PATIENCE, LocalServer, Upstream, settings  # noqa: E402

import persona_memory  # noqa: E402

ssl.create_default_context = functools.cache(ssl.create_default_context)  # each client would read all certificates anew

for part in ("connect", "read", "write", "pool"):  # of requests that name no timeout; a busy machine takes seconds
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, part, PATIENCE)

REAL_PAUSES = {name: getattr(persona_memory, name) for name in ("FIRST_PAUSE_SECONDS", "PAUSE_JITTER_SECONDS")}

# How long a step takes is the benchmarks' matter.
hypothesis.settings.register_profile("any", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("repeatable", hypothesis.settings.get_profile("any"), derandomize=True)


def pytest_configure(config):
    """Property tests try the same cases in every run, so that none fails by a case that no run had before;
    `--hypothesis-seed=N` has others tried."""
    searched = config.getoption("--hypothesis-seed", None) is not None
    hypothesis.settings.load_profile("any" if searched else "repeatable")


MOST_WORKERS = 4  # each loads the embedder


def pytest_xdist_auto_num_workers(config) -> int:
    """A process for each core runs the whole suite; a file or a test of it runs in this one, which is there already."""
    whole = all(Path(given).is_dir() for given in config.args)
    return min(os.cpu_count() or 1, MOST_WORKERS) if whole else 0


class SharedModel:
    """One loaded model for all servers of this process, used by one thread at a time as its tokenizer needs it.

    It embeds every text once: the tests' chats say the same words again and again.
    """

    def __init__(self, model):
        self.model = model
        self.lock = threading.Lock()
        self.known = {}

    def encode(self, texts, **options):
        """Vectors, float32 [len(texts), dimensions]."""
        how = tuple(sorted(options.items()))
        with self.lock:
            if fresh := [text for text in dict.fromkeys(texts) if (text, how) not in self.known]:
                vectors = self.model.encode(fresh, **options)
                self.known |= {(text, how): vector for text, vector in zip(fresh, vectors, strict=True)}
            return np.stack([self.known[text, how] for text in texts])

    def __getattr__(self, name):
        return getattr(self.model, name)


@pytest.fixture(scope="session", autouse=True)
def load_the_embedder_once():
    """The model is the real one, loaded when first needed; only doing the same work again for each server is saved."""
    load, faster = persona_memory.load_sentence_transformer, persona_memory.faster
    persona_memory.load_sentence_transformer = functools.cache(lambda name: SharedModel(faster(load(name))))
    persona_memory.faster = lambda model: model
    yield
    persona_memory.load_sentence_transformer, persona_memory.faster = load, faster


@pytest.fixture(scope="session", autouse=True)
def short_pauses():
    """Before another try of a failed request; test_gate.py looks at the real ones."""
    persona_memory.FIRST_PAUSE_SECONDS, persona_memory.PAUSE_JITTER_SECONDS = 0.01, 0.01


@pytest.fixture(scope="session", autouse=True)
def patience():
    """A turn waits for the embedder, and for what an upstream says of itself, as long as a busy machine may take: what
    is late is a matter of the tests that look at that."""
    for name in ("RECALL_SECONDS", "INJECTION_SECONDS", "ASK_SECONDS"):
        setattr(persona_memory, name, 30.0)


def shares(request) -> bool:
    """Whether a module's tests share one upstream and one proxy, since nothing there depends on what was said before:
    it says `ONE_SERVER = True`."""
    return getattr(request.module, "ONE_SERVER", False)


@pytest.fixture
def upstream(request):
    """A recording upstream, well-behaved and with nothing recorded."""
    if not shares(request):
        with Upstream() as fake:
            yield fake
        return
    fake = request.getfixturevalue("shared_upstream")
    fake.reset()
    yield fake
    fake.reset()


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """A folder for the program's data that does not exist yet."""
    return tmp_path / "data"


@pytest.fixture
def server(request, upstream, data_dir):
    """The program in this process, ready to answer."""
    if shares(request):
        yield request.getfixturevalue("shared_server")
        return
    with LocalServer(settings(data_dir, upstream.url)) as running:
        yield running


@pytest.fixture
def chat(request) -> list[dict]:
    """A transcript that no other test sends."""
    return [
        {"role": "system", "content": "You are Mira, a lighthouse keeper."},
        {"role": "user", "content": f"Good evening from {request.node.name}"},
    ]


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
