"""Trains the heads of the emotion reader and prints the constant that carries them, or writes it into the program.

The data is GoEmotions (Demszky et al. 2020, Google Research, CC BY 4.0), grouped to six emotions and neutral, one JSON
object a line with `text` and `labels`; and the role-play lines beside this script: those of emotion_lines.jsonl marked
"train", and all of emotion_scenes.jsonl.

    python tests/bench/train_emotion.py --data ~/goemotions --write

A head is two linear experts, one for comments and one for role play, with a gate between them. The scenes fall into two
halves by a hash of their names. While the numbers below were chosen, heads were trained on half "a"; scores on half
"b", "hard" and "held" were watched meanwhile, so they are no blind test (emotion.py trains a head without "b" to show
them). The head that is shipped is trained on both. The optimiser takes all rows at once and no random numbers, so that
a rerun on the same machine gives the same weights.
"""

import argparse
import base64
import hashlib
import json
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import torch

import persona_memory as pm

LINES = Path(__file__).resolve().parent / "emotion_lines.jsonl"
SCENES = Path(__file__).resolve().parent / "emotion_scenes.jsonl"
EMBEDDER = "all-MiniLM-L6-v2"
SPEAKERS = ("User", "Robin", "Mira", "Anon", "Alex", "You", "Kai", "Elena")  # the program embeds "Robin: what she said"
NAMED = 8000  # so many of the comments are seen a second time, under a speaker's name
NAMED_WEIGHT = 0.5
COMMENTS_POWER = 0.4  # comments' classes are weighted by frequency ** -this: between what is common and what is fair
PLAYED_POWER = 0.8  # and the role play's: nearly alike, as neutral lines are plenty
VECTOR_SCALE = 6.0  # brings a unit vector's 384 small numbers to the size of the features
COMMENTS_DECAY = 5e-5  # L2 penalty on the weights of the comments' expert
PLAYED_DECAY = 1.5e-3  # on the role play's: few lines, so that it is also what keeps their probabilities honest
GATE_DECAY = 3e-4  # on the gate's
GATE_LEAN = -0.5  # added to the gate's log odds: a doubtful text is read as a comment,
LEXICON_LEAN = 0.5  # and as role play where there is no vector, which tells them apart
EVENING = np.arange(-0.5, 0.51, 0.1)  # what may be added to a class of the comments' expert at a time
ANOTHERS_LEAN = 1.0  # and to its weights of others' feelings: comments are labelled by their tone, whoever feels it
STEPS = 150
CALIBRATION = 20  # every so manieth comment is kept back to set the temperature


@dataclass
class Examples:
    """Inputs by block [n, size], targets [n, 7] that sum to 1, and what each row counts [n]."""

    vectors: np.ndarray
    features: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def inputs(self, blocks: tuple[str, ...]) -> np.ndarray:
        """The blocks side by side, float32."""
        parts = {"vector": self.vectors, "features": self.features}
        return np.concatenate([parts[block] for block in blocks], axis=1)

    def pick(self, rows: np.ndarray) -> "Examples":
        """The rows that a mask or a list of places names."""
        return Examples(*(getattr(self, field.name)[rows] for field in fields(self)))


def joined(parts: list[Examples]) -> Examples:
    """Several sets one under the other."""
    return Examples(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Examples)))


def encode(texts: list[str], cache: Path | None = None) -> np.ndarray:
    """Unit vectors float32 [n, 384], kept in the folder `cache` where one is given."""
    key = hashlib.sha256("\0".join([EMBEDDER, *texts]).encode()).hexdigest()[:24]
    kept = cache / f"{key}.npy" if cache else None
    if kept and kept.exists():
        return np.load(kept)
    if not hasattr(encode, "model"):
        encode.model = pm.load_sentence_transformer(EMBEDDER)
        torch.set_num_threads(1)
    vectors = encode.model.encode(texts, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    if kept:
        cache.mkdir(parents=True, exist_ok=True)
        np.save(kept, vectors)
    return vectors.astype(np.float32)


def read_rows(path: Path) -> list[dict]:
    """The JSON objects of a file, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def half_of(scene: str) -> str:
    """The half, "a" or "b", that a scene belongs to."""
    return "ab"[hashlib.sha256(scene.encode()).digest()[0] % 2]


def role_play_lines(split: str) -> list[dict]:
    """The role-play lines of a split, such as "train" or "held", with `labels` as the comments have them."""
    return [row | {"labels": [row["label"]]} for row in read_rows(LINES) if row["split"] == split]


def scene_lines(half: str) -> list[dict]:
    """The lines of the scenes of a half, or of both: "ab"."""
    rows = [row | {"labels": [row["label"]]} for row in read_rows(SCENES)]
    return [row for row in rows if half_of(row["scene"]) in half]


def named(rows: list[dict]) -> list[dict]:
    """The rows as different speakers' words."""
    return [row | {"speaker": SPEAKERS[n % len(SPEAKERS)]} for n, row in enumerate(rows)]


def examples(rows: list[dict], weight: float, cache: Path | None) -> Examples:
    """Rows as a head sees them; the labels of a row share its target evenly."""
    spoken = [f"{row['speaker']}: {row['text']}" if "speaker" in row else row["text"] for row in rows]
    targets = np.array([[label in row["labels"] for label in pm.EMOTIONS] for row in rows], dtype=np.float32)
    return Examples(
        encode(spoken, cache),
        np.stack([pm.emotion_features(row["text"]) for row in rows]),
        targets / targets.sum(1, keepdims=True),
        np.full(len(rows), weight, dtype=np.float32),
    )


def training_data(data: Path, cache: Path | None, half: str = "ab") -> tuple[Examples, Examples, Examples]:
    """Comments to train on, comments to calibrate on, role-play lines to train on (of the scenes those of `half`)."""
    rows, lines = read_rows(data / "goemotions_train.jsonl"), role_play_lines("train") + scene_lines("ab")
    comments = examples(rows, 1.0, cache)
    kept_back = np.arange(len(rows)) % CALIBRATION == 0
    kept_back &= np.array([len(row["labels"]) == 1 for row in rows])
    again = examples(named(rows[:NAMED]), NAMED_WEIGHT, cache).pick(~kept_back[:NAMED])
    played = joined([examples(lines, 1.0, cache), examples(named(lines), 1.0, cache)])
    ours = np.array([half_of(row["scene"]) in half if "scene" in row else True for row in 2 * lines])
    return joined([comments.pick(~kept_back), again]), comments.pick(kept_back), played.pick(ours)


def fit(data: Examples, blocks: tuple[str, ...], decay: float, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights [inputs, classes] and bias [classes] of a multinomial logistic regression, by L-BFGS."""
    scales = {"vector": np.full(data.vectors.shape[1], VECTOR_SCALE), "features": np.ones(data.features.shape[1])}
    scale = np.concatenate([scales[block] for block in blocks]).astype(np.float32)
    x, y = torch.tensor(data.inputs(blocks) * scale), torch.tensor(data.targets)
    share = (data.targets * data.weights[:, None]).sum(0) / data.weights.sum()
    counts = torch.tensor((1 / len(share) / share) ** power, dtype=torch.float32)
    weighted = y * counts * torch.tensor(data.weights / data.weights.sum())[:, None]
    weights = torch.zeros(x.shape[1], y.shape[1], requires_grad=True)
    bias = torch.zeros(y.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = -(weighted * torch.log_softmax(x @ weights + bias, 1)).sum() + decay * weights.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return weights.detach().numpy() * scale[:, None], bias.detach().numpy()


def calibrated(head: tuple, data: Examples, blocks: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The head divided by the temperature at which kept-back comments are likeliest (Guo et al. 2017)."""
    logits, target = torch.tensor(data.inputs(blocks) @ head[0] + head[1]), torch.tensor(data.targets.argmax(1))
    losses = {t: torch.nn.functional.cross_entropy(logits / t, target).item() for t in np.arange(0.4, 3.0, 0.02)}
    temperature = min(losses, key=losses.__getitem__)
    return head[0] / temperature, head[1] / temperature


def macro_f1(truth: np.ndarray, guess: np.ndarray) -> float:
    """Macro-F1 over the labels, from one count of pairs."""
    labels = len(pm.EMOTIONS)
    table = np.bincount(truth * labels + guess, minlength=labels**2).reshape(labels, labels)
    return float(np.mean(2 * table.diagonal() / np.maximum(table.sum(0) + table.sum(1), 1)))


def evened(head: tuple, data: Examples, blocks: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The head with what its classes' biases lack for the best macro-F1 on the comments of one label, found class by
    class: rare classes are told less often, and more surely."""
    one = data.pick(data.targets.max(1) == 1)
    logits, truth, bias = one.inputs(blocks) @ head[0] + head[1], one.targets.argmax(1), np.zeros(len(pm.EMOTIONS))
    for label in 3 * list(range(len(bias))):
        tried = [bias + step * (np.arange(len(bias)) == label) for step in EVENING]
        bias = max(tried, key=lambda b: macro_f1(truth, (logits + b).argmax(1)))
    return head[0], head[1] + bias


def gate(comments: Examples, played: Examples, blocks: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A head of one output, the log odds that a text is role play; both sources count the same, then it is leant."""
    evened = replace(played, weights=np.full_like(played.weights, comments.weights.sum() / len(played.weights)))
    data = joined([comments, evened])
    source = np.arange(len(data.weights)) >= len(comments.weights)
    weights, bias = fit(
        replace(data, targets=np.stack([~source, source], axis=1).astype(np.float32)), blocks, GATE_DECAY, 0.0
    )
    weights, bias = (
        weights[:, 1:] - weights[:, :1],
        bias[1:] - bias[:1] + (GATE_LEAN if "vector" in blocks else LEXICON_LEAN),
    )
    anothers = len(weights) - pm.FEATURES + pm.ANOTHERS * len(pm.EMOTIONS)
    weights[anothers : anothers + pm.NEUTRAL] += ANOTHERS_LEAN
    return weights, bias


def train(data: tuple[Examples, Examples, Examples], blocks: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A head over the blocks: the comments' expert, the role play's, and the gate."""
    comments, kept_back, played = data
    first = calibrated(fit(comments, blocks, COMMENTS_DECAY, COMMENTS_POWER), kept_back, blocks)
    first = evened(first, comments, blocks) if "vector" in blocks else first
    parts = [first, fit(played, blocks, PLAYED_DECAY, PLAYED_POWER), gate(comments, played, blocks)]
    weights, bias = (np.concatenate(part, axis=-1).astype(np.float32) for part in zip(*parts, strict=True))
    return weights, bias


def packed(head: tuple[np.ndarray, np.ndarray], sizes: tuple[int, ...]) -> bytes:
    """A head as the program reads it: scales by block and label, bias, int8 weights."""
    weights, bias = head
    edges = np.cumsum([0, *sizes])
    scales = np.stack([np.abs(weights[a:b]).max(0) / 127 + 1e-12 for a, b in zip(edges, edges[1:], strict=False)])
    whole = np.round(weights / np.repeat(scales, sizes, axis=0)).astype(np.int8)
    return scales.astype("<f4").tobytes() + bias.astype("<f4").tobytes() + whole.tobytes()


def constant(data: tuple[Examples, Examples, Examples]) -> str:
    """The text of EMOTION_WEIGHTS: the heads of HEADS one after the other, in lines of 116 characters."""
    blocks = {"vector": ("vector", "features"), "lexicon": ("features",)}
    raw = b"".join(packed(train(data, blocks[name]), sizes) for name, sizes in pm.HEADS.items())
    text = base64.b85encode(raw).decode()
    return "\n".join(text[i : i + 116] for i in range(0, len(text), 116))


def main() -> None:
    """Trains, and prints or writes the constant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with goemotions_train.jsonl")
    parser.add_argument("--cache", type=Path, help="folder to keep vectors in between runs")
    parser.add_argument("--write", action="store_true", help="write into persona_memory.py instead of printing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = constant(training_data(args.data, args.cache))
    if not args.write:
        return print(text)
    program = Path(pm.__file__)
    source = program.read_text(encoding="utf8")
    source = re.sub(r'(?<=EMOTION_WEIGHTS = """\n)[^"]*', lambda _: text + "\n", source)
    program.write_text(source, encoding="utf8")
    return print(f"wrote {len(text)} characters into {program.name}")


if __name__ == "__main__":
    main()
