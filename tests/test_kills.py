"""The program killed under load: what it acknowledged is there, once, and nothing else. `bench/kills.py` kills more."""

from killing import Scene

WRONG = ("lost", "twice", "ghosts", "not open", "undeleted", "salvaged")


def test_what_was_acknowledged_outlives_a_kill(upstream, data_dir):
    """Turns, imports and deletions, with summaries behind them, cut off again and again on one data folder."""
    scene = Scene(data_dir, upstream.url, ["/no/embedder"])
    for _ in range(2):
        scene.play(0.3)
    counts = {"acknowledged": 0} | scene.finish()
    assert {name: counts.get(name, 0) for name in WRONG} == dict.fromkeys(WRONG, 0)
    assert counts["acknowledged"] > 0
