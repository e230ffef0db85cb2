"""How long an import takes: a SillyTavern chat file of many messages, with every tenth reply swiped twice.

    python tests/bench/importing.py --messages 10000

Prints seconds and messages a second for reading and writing, the vectors, the same file again, and an export.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import persona_memory as pm  # noqa: E402

PLACES = ("the harbour", "the bakery", "the lighthouse", "the old mill", "the market", "the forge", "the library")
DEEDS = ("hid a letter", "met a stranger", "lost a glove", "heard a bell", "found a coin", "saw a fox", "told a lie")


def line(number: int) -> dict:
    """A message of the chat; no two are alike."""
    place, deed = PLACES[number % len(PLACES)], DEEDS[number // len(PLACES) % len(DEEDS)]
    text = f"On day {number} at {place} somebody {deed}, and I have thought of it ever since. *looks at the sea* " * 2
    row = {"name": "Helena", "is_user": False, "is_system": False, "mes": text, "send_date": "July 12, 2024 9:30pm"}
    if number % 2:
        return row | {"name": "Robin", "is_user": True}
    swipes = [text, f"A rejected reply {number}.", f"Another one {number}."] if number % 20 == 0 else [text]
    return row | {"swipes": swipes, "swipe_id": 0}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=10_000)
    count = parser.parse_args().messages
    rows = [{"user_name": "Robin", "character_name": "Helena"}, *map(line, range(count))]
    raw = "\n".join(map(json.dumps, rows)).encode()
    with tempfile.TemporaryDirectory() as folder:
        memory = pm.PersonaMemory(pm.Settings(data=folder, upstream="local"))
        memory.embedder.start()
        memory.embedder.loaded.wait()
        pm.count_tokens("loads the encoding")
        chat = ""

        def measure(what: str, work) -> None:
            begun = time.perf_counter()
            result = work()
            seconds = time.perf_counter() - begun
            print(f"{what}: {seconds:.1f} s, {count / seconds:.0f} messages/s ({result})")

        measure("read and written", lambda: memory.archive.take_in(raw, embed=False))
        chat = memory.chats()[0]["chat_id"]
        measure("vectors", lambda: sum(memory.vectors.of_chat(chat)))
        measure("the same again", lambda: memory.archive.take_in(raw, embed=False))
        measure("its vectors again", lambda: sum(memory.vectors.of_chat(chat)))
        measure("exported, bytes", lambda: len(json.dumps(memory.archive.export(chat))))
        memory.close()


if __name__ == "__main__":
    main()
