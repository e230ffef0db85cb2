"""How well feelings are read: GoEmotions' development set, role-play lines held out of training, time, an ablation.

    python tests/bench/emotion.py --data ~/goemotions --films ~/XED/AnnotatedData/en-annotated.tsv

"held" (every third of the older lines), "fresh" and "fresh2" are never trained on; neither are the lines of
emotion_plain.jsonl, ordinary talk and plain feelings, of which "blind" was not looked at while the reader was
developed; nor "hard", hard lines by others, where the folder has emotion_roleplay_dev.jsonl. Half "b" of the scenes is
trained on in the end, so it is shown for a head that has not seen it. A mood is "told" as after the first message of a
chat. Macro-F1 is the mean over the seven labels. The calibration error is the expected one over 15 equal bins of
confidence (Guo et al. 2017). Only comments of one label count.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, f1_score
from train_emotion import (
    PLAIN,
    Examples,
    bag,
    calibration_error,
    encode,
    examples,
    named,
    one_label,
    outputs_of,
    read_rows,
    role_play_lines,
    scene_lines,
    train,
    training_data,
)

import persona_memory as pm

PARTS = ("comments", "held", "fresh", "fresh2", "looked at", "blind", "hard")
FEW_WORDS = {  # what a reader without lexicon, negation or head would do
    "joy": "happy love great laugh laughs smile smiles glad good thank",
    "sadness": "sad cry cries sob sobs tears sorry miss lonely alone",
    "anger": "angry hate furious mad slams glares damn annoying shut yells",
    "fear": "afraid scared fear trembles terrified worried nervous panic hides shakes",
    "surprise": "wow surprised gasps what suddenly shocked unexpected amazed blinks wait",
    "disgust": "disgusting gross eww sick yuck nasty vile disgusted ugh revolting",
}


def f1(truth: np.ndarray, guess: np.ndarray) -> float:
    """Macro-F1 over the labels."""
    return f1_score(truth, guess, average="macro", labels=range(len(pm.EMOTIONS)), zero_division=0)


def scores_of(rows: list[dict], vectors: Iterable[np.ndarray | None], lean: float = 0.0) -> np.ndarray:
    """The program's own reading of rows, with vectors or without, [n, 7]."""
    pairs = zip((row["text"] for row in rows), vectors, strict=False)
    readings = [pm.read_emotion(text, v, lean, None if v is None else bag(text)) for text, v in pairs]
    return np.array([[reading.scores[label] for label in pm.EMOTIONS] for reading in readings])


def told(scores: np.ndarray) -> np.ndarray:
    """The place in EMOTIONS of the mood that a model is told after each row [n], NEUTRAL where it is told none."""
    moods = [pm.mood_of([(0, pm.reading_of(row))]) for row in scores]
    return np.array([pm.EMOTIONS.index(m.label) if pm.guidance_line(m) else pm.NEUTRAL for m in moods])


def report_told(names: list[str], sets: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """What share of neutral lines is told as a mood, of felt ones as the right one, and of told moods is right."""
    print("\nmoods told in a chat      neutral told    felt told right    told is right")
    for name, (truth, scores) in zip(names, sets, strict=True):
        moods = told(scores)
        neutral, said = truth == pm.NEUTRAL, moods != pm.NEUTRAL
        shares = [share.mean() for share in (said[neutral], (moods == truth)[~neutral], (moods == truth)[said])]
        print(f"{name:19}" + "".join(f"{100 * share:17.1f}%" for share in shares))


def truth_of(rows: list[dict]) -> np.ndarray:
    """The places of the rows' first labels in EMOTIONS."""
    return np.array([pm.EMOTIONS.index(row["labels"][0]) for row in rows])


def few_words(text: str) -> int:
    """The label of a plain keyword list."""
    words = pm.word_tokens(text)
    counts = [sum(word in FEW_WORDS[label].split() for word in words) for label in pm.EMOTIONS[: pm.NEUTRAL]]
    return int(np.argmax(counts)) if any(counts) else pm.NEUTRAL


def report(name: str, sets: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """One line of the table: macro-F1 and calibration error on each of the sets of (truth, scores)."""
    cells = [f"{f1(t, s.argmax(1)):8.3f} {calibration_error(t, s):7.3f}" for t, s in sets]
    print(f"{name:48}" + "".join(cells))


def unseen_half(data: Path, films: Path, cache: Path | None, parts: list[Examples], names: list[str]) -> None:
    """Heads trained without half "b" of the scenes (not quantised), on parts of the input."""
    rows = scene_lines("b")
    parts, names = [examples(rows, 1.0, cache), *parts], [f"b: {len(rows)}", *names]
    print("\ntrained on half a" + " " * 31 + "".join(f"{name:>16}" for name in names))
    seen = training_data(data, films, cache, half="a")
    for name, blocks in (
        ("features", ("features",)),
        ("vector", ("vector",)),
        ("vector + features", ("vector", "features")),
        ("vector + bag + features", ("vector", "bag", "features")),
    ):
        head = train(seen, blocks)
        scores = [np.stack([pm.blended(row) for row in outputs_of(head, part.inputs(blocks))]) for part in parts]
        report(name, [(part.targets.argmax(1), each) for part, each in zip(parts, scores, strict=True)])
    print("\nrows: what is felt on half b; columns: what is read" + confusion(parts[0].targets.argmax(1), scores[0]))


def confusion(truth: np.ndarray, scores: np.ndarray) -> str:
    """How often each label was read as each, as a table."""
    table = confusion_matrix(truth, scores.argmax(1), labels=range(len(pm.EMOTIONS)))
    lines = [f"{label:10}" + "".join(f"{n:5}" for n in row) for label, row in zip(pm.EMOTIONS, table, strict=True)]
    return "\n" + "\n".join([" " * 10 + "".join(f"{label[:4]:>5}" for label in pm.EMOTIONS), *lines])


def milliseconds(rows: list[dict], vectors: np.ndarray) -> float:
    """Time of one reading with importance, without the encode."""
    start = time.perf_counter()
    for row, vector in zip(rows, vectors, strict=True):
        pm.message_importance(row["text"], pm.read_emotion(row["text"], vector, bag=bag(row["text"])))
    return 1000 * (time.perf_counter() - start) / len(rows)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with goemotions_train.jsonl and _dev.jsonl")
    parser.add_argument("--cache", type=Path, help="folder to keep vectors in between runs")
    parser.add_argument("--films", type=Path, help="XED's en-annotated.tsv; without it there is no ablation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comments = one_label(args.data / "goemotions_dev.jsonl")
    parts = [comments, *(role_play_lines(split) for split in PARTS[1:4])]
    parts += [role_play_lines(split, PLAIN) for split in PARTS[4:6]]
    hard = args.data / "emotion_roleplay_dev.jsonl"
    parts += [read_rows(hard)] if hard.exists() else []
    names = [f"{name}: {len(rows)}" for name, rows in zip(PARTS, parts, strict=False)]
    vectors = [encode([row["text"] for row in rows], args.cache) for rows in parts]
    spoken = [encode([f"{row['speaker']}: {row['text']}" for row in named(rows)], args.cache) for rows in parts[1:]]
    truths = [truth_of(rows) for rows in parts]

    print(" " * 48 + "".join(f"{name:>16}" for name in names) + f"\n{'':48}" + "      F1     ECE" * len(parts))
    plain = [np.eye(len(pm.EMOTIONS))[[few_words(row["text"]) for row in rows]] for rows in parts]
    full = [scores_of(rows, part) for rows, part in zip(parts, vectors, strict=True)]
    chats = [scores_of(rows, part, pm.CHAT_LEAN) for rows, part in zip(parts[1:], spoken, strict=True)]
    report("ten keywords a label", zip(truths, plain, strict=True))
    report(
        "program, lexicon alone", zip(truths, [scores_of(rows, itertools.repeat(None)) for rows in parts], strict=True)
    )
    report("program", zip(truths, full, strict=True))
    report("program, in a chat, embedded with a name", zip(truths, [full[0], *chats], strict=True))
    report_told(names[1:], zip(truths[1:], chats, strict=True))
    print("\nF1 by label" + " " * 8 + "".join(f"{label:>10}" for label in pm.EMOTIONS))
    for name, truth, scores in zip(names, truths, full, strict=True):
        values = f1_score(truth, scores.argmax(1), average=None, labels=range(len(pm.EMOTIONS)))
        print(f"{name:19}" + "".join(f"{value:10.3f}" for value in values))
    if args.films:
        unseen_half(args.data, args.films, args.cache, [examples(rows, 1.0, args.cache) for rows in parts], names)
    print(f"\n{milliseconds(comments, vectors[0]):.3f} ms a message without the encode")


if __name__ == "__main__":
    main()
