"""kill -9 under load: turns, summaries, imports, deletions, vectors made anew. Prints what was lost.

python tests/bench/kills.py [KILLS] [SEED]
"""

import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

from fakes import Upstream  # noqa: E402
from killing import PROCESSES, Scene  # noqa: E402


def main(kills: int = 200, number: int = 0) -> None:
    """So many rounds on one data folder; every fourth round the embedder is another one."""
    started, dice = time.monotonic(), random.Random(number)
    PROCESSES.set_forkserver_preload(["killing", "sentence_transformers"])
    with tempfile.TemporaryDirectory() as folder, Upstream() as upstream:
        embedders = [static_model(Path(folder) / f"static-{n}", n) for n in (1, 2)]
        scene = Scene(Path(folder) / "data", upstream.url, embedders, number)
        for count in range(1, kills + 1):
            scene.play(dice.uniform(0.05, 1.5), soon=count % 5 == 0)
            upstream.requests.clear()
            if count % 10 == 0 or count == kills:
                print(f"{count} kills, {time.monotonic() - started:.0f} s: {dict(scene.counts)}", flush=True)
        print(f"{kills} kills: {scene.finish()}")


def static_model(folder: Path, number: int) -> str:
    """An embedder's folder that loads at once; another number is another model."""
    from multilingual import write_model, written_texts

    return str(write_model(folder, written_texts()[number::2]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
