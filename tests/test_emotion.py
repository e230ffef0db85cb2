"""Reading feelings, the mood of a branch, and what is worth remembering."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import persona_memory as pm

LINES = Path(__file__).resolve().parent / "bench" / "emotion_lines.jsonl"
SCENES, PLAIN = LINES.with_name("emotion_scenes.jsonl"), LINES.with_name("emotion_plain.jsonl")

texts = st.one_of(
    st.text(max_size=400),
    st.lists(
        st.sampled_from(
            ["*", "_", '"', "so", "not", "happy", "afraid", "sobs", "😭", ":(", "!", "?!", "\ud800", "\n", "…", "but"]
        )
    ).map(" ".join),
)
scores = st.lists(st.floats(0, 1), min_size=7, max_size=7).filter(lambda s: sum(s) > 0.01).map(np.array)
readings = scores.map(lambda s: pm.reading_of(s / s.sum()))


@pytest.fixture(scope="module")
def embedder():
    """The real model."""
    return pm.Embedder("all-MiniLM-L6-v2")


def sure(label: str, confidence: float = 0.9) -> pm.EmotionReading:
    """A reading of that label; what is left is neutral, or joy where the label is neutral."""
    values = dict.fromkeys(pm.EMOTIONS, 0.0)
    values["joy" if label == "neutral" else "neutral"] = 1 - confidence
    return pm.EmotionReading(label, confidence, values | {label: confidence})


def evidence(text: str) -> dict[str, float]:
    """What the lexicon finds, as "channel label" -> strength."""
    channels = ("speech", "action", "picture", "negated", "anothers", "supposed")
    names = [f"{channel} {label}" for channel in channels for label in pm.EMOTIONS]
    return {n: float(v) for n, v in zip(names, pm.emotion_features(text), strict=False) if v and "neutral" not in n}


@given(texts, st.booleans())
@example("", True)
@example("\ud800\udc00 \udfff *", False)
@example("(╯°□°)╯︵ ┻━┻" * 300, True)
def test_any_text_is_read(text, with_vector):
    """Seven probabilities that sum to 1, the label is the likeliest, the confidence its own."""
    vector = np.full(pm.VECTOR_SIZE, pm.VECTOR_SIZE**-0.5, dtype=np.float32) if with_vector else None
    reading = pm.read_emotion(text, vector)
    assert tuple(reading.scores) == pm.EMOTIONS
    assert abs(sum(reading.scores.values()) - 1) < 1e-6
    assert min(reading.scores.values()) >= 0 and reading.confidence == max(reading.scores.values()) <= 1
    assert reading.scores[reading.label] == reading.confidence
    features = pm.emotion_features(text)
    assert features.shape == (pm.FEATURES,) and features.dtype == np.float32 and np.isfinite(features).all()
    assert 0 <= pm.message_importance(text, reading) <= 1


@pytest.mark.parametrize("text", ["a" * 100_000, "*" * 100_000, "so happy " * 12_000, '"*_' * 33_000, "😭" * 100_000])
def test_a_text_of_any_length_is_read(text):
    """Of long texts the two ends count."""
    assert len(pm.clip(text)) <= pm.READ_LIMIT + 1
    assert pm.read_emotion(text).label in pm.EMOTIONS
    long = "She walks along the road. " * 1000
    assert pm.read_emotion(long + "I love you, I am so happy!").scores["joy"] > pm.read_emotion(long).scores["joy"]


def test_a_reading_depends_on_its_text_alone():
    """The same twice, and another embedder's vector is not looked at."""
    text = "I'm so happy to see you!"
    assert pm.read_emotion(text) == pm.read_emotion(text) == pm.read_emotion(text, np.ones(768, dtype=np.float32))


def test_the_weights_fit_the_code():
    """The constant is compact and decodes to heads of the sizes that the inputs have."""
    assert 4000 <= len(pm.EMOTION_WEIGHTS) <= 97000
    heads = pm.emotion_heads()
    shapes = {name: [(sum(blocks), hidden), (hidden, pm.OUTPUTS)] for name, (blocks, hidden) in pm.HEADS.items()}
    assert {name: [weights.shape for weights, _ in layers] for name, layers in heads.items()} == shapes
    parts = [part for layers in heads.values() for layer in layers for part in layer]
    assert all(np.isfinite(part).all() and np.abs(part).max() > 0 for part in parts)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I am happy", {"speech joy"}),
        ("I am not happy", {"negated joy"}),
        ("I'm not really all that happy", {"negated joy"}),
        ("She is no longer afraid", {"negated fear"}),
        ("He isn't angry", {"negated anger"}),
        ("My cat is afraid of thunder", {"anothers fear"}),
        ("I think that he was angry", {"anothers anger"}),
        ("You look sad", {"anothers sadness"}),
        ("Last night Elena was scared", {"anothers fear"}),
        ("My heart is broken", {"speech sadness"}),
        ("I am afraid of him", {"speech fear"}),
        ("I hate my boss", {"speech anger"}),
        ("If I were angry, I would go", {"supposed anger"}),
        ("Suppose that you were terrified", {"supposed fear"}),
        ("I used to be happy. Now I am sad", {"supposed joy", "speech sadness"}),
        ("*ties off the bandage*", set()),
        ("I have never been happier", {"speech joy"}),
        ("I have never been so scared", {"speech fear"}),
        ("I have never been happy", {"negated joy"}),
        ("I can't help but smile", {"speech joy"}),
        ("I can't stop smiling", {"speech joy"}),
        ("Not only happy, proud", {"speech joy"}),
        ("No. I am happy", {"speech joy"}),
        ("don’t cry", {"negated sadness"}),
        ("*sobs*", {"action sadness"}),
        ("_sobs_ I know", {"action sadness"}),
        ("She sobs into her sleeve.", {"action sadness"}),
        ('"Go," she sobs.', {"action sadness"}),
        ("*slams the front door*", {"action anger"}),
        ("You make me sick", {"speech disgust"}),
        ("Help me!", {"speech fear"}),
        ("She looks forward to the feast", {"action joy"}),
        ("great 😭😭", {"speech joy", "picture sadness"}),
        ("(╯°□°)╯︵ ┻━┻", {"picture anger"}),
        ("see https://example.org/ at 12:30", set()),
        ("snake_case_name", set()),
        ("She opens the door and walks in.", set()),
    ],
)
def test_the_lexicon_finds(text, found):
    """Negation, actions in all their spellings, phrases, pictures."""
    assert set(evidence(text)) == found


def test_words_before_a_feeling_weaken_and_strengthen_it():
    """Dampened < plain < intensified, and shouting counts as one more feature."""
    slight, plain, very = (evidence(f"I am {word} sad")["speech sadness"] for word in ("slightly", "just", "very"))
    assert slight < plain < very
    assert not np.array_equal(pm.emotion_features("you lied to me"), pm.emotion_features("YOU LIED TO ME"))


FEELINGS = [
    ("*sobs into her sleeve* He's gone...", "sadness"),
    ("_cries_ I miss him", "sadness"),
    ("I'm not happy.", "sadness"),
    ("😭😭😭", "sadness"),
    ("*slams the door* How dare you!", "anger"),
    ("You lied to me, and I'm furious!", "anger"),
    ("*beams* You did it! I'm so proud of you!", "joy"),
    ("I can't help but smile at you.", "joy"),
    ("I've never been happier!", "joy"),
    ("*trembles and hides behind you* I'm scared", "fear"),
    ("*gasps* No way! You're alive?!", "surprise"),
    ("The smell makes me sick!", "disgust"),
    ("*wrinkles her nose* Eww, gross!", "disgust"),
]
NARRATION = [
    "My cat is afraid of thunder.",
    "*ties off the bandage*",
    "She opens the door and walks in.",
    "*He puts the cup on the table and looks out of the window.*",
    "*nods*",
    "The road leads north, past the mill.",
    "What time does the shop close?",
    "I'm not angry, I only asked.",
    "You hand me the map.",
    "He isn't angry.",
    "...",
    "",
    "12",
]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Her heart pounds as the footsteps come closer.", "fear"),
        ("You kept it? After all these years?", "surprise"),
        ("My dog died yesterday.", "sadness"),
    ],
)
def test_what_stands_in_no_single_word_is_read_by_vector_and_bag(embedder, text, label):
    """A feeling that is shown and not named."""
    assert pm.feeling_in("en", text, embedder.encode([text])[0], embedder.bag).label == label


@pytest.mark.parametrize(("text", "label"), [*FEELINGS, *((text, "neutral") for text in NARRATION)])
def test_role_play_is_read_with_and_without_vectors(embedder, text, label):
    """Feelings are found in actions, talk and emoji; narration says nothing."""
    assert pm.feeling_in("en", text, embedder.encode([text])[0], embedder.bag).label == label
    assert pm.feeling_in("en", text).label == label


def test_the_scenes_cover_the_labels():
    """Many lines of each label in both halves, none twice, none among the older lines."""
    older = {json.loads(line)["text"] for line in LINES.read_text(encoding="utf8").splitlines()}
    rows = [json.loads(line) for line in SCENES.read_text(encoding="utf8").splitlines()]
    texts = {row["text"] for row in rows}
    assert len(texts) == len(rows) >= 3000 and not texts & older
    halves = Counter((hashlib.sha256(row["scene"].encode()).digest()[0] % 2, row["label"]) for row in rows)
    assert len(halves) == 2 * len(pm.EMOTIONS) and min(halves.values()) >= 150


def test_the_lexicon_is_short_and_says_nothing_twice():
    """General words: few of them, and a word of one label has one strength."""
    assert sum(block.count("\n") for block in pm.LEXICON.values()) <= 90
    for block in pm.LEXICON.values():
        words = [word for word in block.split() if not word.isdecimal()]
        assert len(set(words)) == len(words)


def test_the_role_play_lines_cover_the_labels():
    """Enough lines of each label, none twice, nearly a third held out of training."""
    rows = [json.loads(line) for line in LINES.read_text(encoding="utf8").splitlines()]
    assert len({row["text"] for row in rows}) == len(rows) >= 300
    for label in pm.EMOTIONS:
        splits = [row["split"] for row in rows if row["label"] == label]
        assert len(splits) >= 40 and abs(1 - splits.count("train") / len(splits) - 0.31) < 0.05


def test_the_importance_table_is_what_counts():
    """Its weights sum to 1, each factor has one and moves the result by it."""
    assert abs(sum(pm.IMPORTANCE_FACTORS.values()) - 1) < 1e-9
    calm = sure("neutral", 1.0)
    assert set(pm.importance_factors("x", calm)) == set(pm.IMPORTANCE_FACTORS)
    assert pm.message_importance("", calm) == 0
    assert pm.message_importance("", sure("anger", 1.0)) == pytest.approx(pm.IMPORTANCE_FACTORS["emotion"])
    name = "it was sold to Elena"
    known = pm.message_importance(name, calm, {"elena"})
    assert pm.message_importance(name, calm) == pytest.approx(known + pm.IMPORTANCE_FACTORS["first"] / 2)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ("I promise I will come back.", "I think I will come back."),
        ("I swear on my life.", "I rely on my wife."),
        ("I'll never leave you.", "I'll soon leave you."),
        ("Then it's a deal.", "Then it's a door."),
        ("They met Elena in Karlsburg.", "They met someone in town."),
        ("Is it far?", "It is far."),
        ("I need you.", "It needs it."),
        ("There are two roads to the mill, and one is longer.", "There are two."),
    ],
)
def test_importance_prefers(more, less):
    """Promises, names, questions, persons and length, at the same feeling."""
    calm = sure("neutral")
    assert pm.message_importance(more, calm) > pm.message_importance(less, calm)


def test_names_stand_inside_sentences():
    """Neither a sentence's first word nor shouting nor a weekday is a name."""
    assert pm.names_in("Today I met Elena and the Baron. Then HELP came on Monday, said Tom") == {
        "elena",
        "baron",
        "tom",
    }


def chat(*labels: str) -> list[tuple[int, pm.EmotionReading]]:
    """Readings of user messages at every other place of a branch."""
    return [(2 * n, sure(label)) for n, label in enumerate(labels)]


def test_a_mood_settles_and_fades():
    """One word of anger in a cheerful chat is no mood; several are; silence lets it fade."""
    assert pm.mood_of([]) is None
    assert pm.mood_of(chat("joy")) == pm.Mood("joy", pytest.approx(0.9), 0, None)
    assert pm.mood_of(chat("joy", "joy", "joy", "anger")).label == "joy"
    turned = pm.mood_of(chat("joy", "joy", "joy", "anger", "anger", "anger"))
    assert (turned.label, turned.previous, turned.since) == ("anger", "joy", 8)
    assert pm.mood_of(chat("anger", *["neutral"] * 6)).label == "neutral"


def test_an_unsure_feeling_is_no_mood():
    """Nobody would say of it that the user is angry; twice as sure, it is one, and lasts a calm message."""
    assert pm.mood_of([(0, sure("anger", pm.MOOD_START - 0.01))]).label == "neutral"
    mood = pm.mood_of([(0, sure("anger")), (2, sure("neutral", 1.0))])
    assert (mood.label, mood.confidence) == ("anger", pytest.approx(0.9))
    assert pm.guidance_line(mood).startswith("[User seems angry since #1")


def test_a_mood_lasts_from_where_it_began():
    """`since` stays while the mood does, `previous` too."""
    mood = pm.mood_of(chat("sadness", "joy", "joy", "joy", "joy", "joy"))
    assert mood == pm.Mood("joy", pytest.approx(mood.confidence), 4, "sadness")


def test_swings_are_told():
    """Each turn once, in words that count messages from 1."""
    swings = pm.mood_swings([(213 + 2 * n, r) for n, (_, r) in enumerate(chat("joy", "sadness", "sadness", "sadness"))])
    assert [pm.swing_line(swing) for swing in swings] == ["was cheerful, turned sad at message 218"]
    assert pm.mood_swings(chat("joy")) == pm.mood_swings([]) == []


@given(st.lists(readings, max_size=30))
def test_moods_of_any_readings(some):
    """Confidence is a probability, the mood began at a message of the branch, swings lead up to it."""
    branch = list(enumerate(some))
    mood, swings = pm.mood_of(branch), pm.mood_swings(branch)
    assert (mood is None) == (not some)
    if mood:
        assert 0 <= mood.confidence <= 1.000001 and 0 <= mood.since < len(some) and mood.previous != mood.label
        assert mood.since == (swings[-1].since if swings else 0)
    assert all(a.label == b.previous for a, b in zip(swings, swings[1:], strict=False))


def test_guidance_is_short_and_only_when_sure():
    """Nothing for a calm or an unsure mood, else a line of at most 30 tokens with the name and the place."""
    assert pm.guidance_line(None) == pm.guidance_line(pm.Mood("neutral", 1.0, 0)) == ""
    assert pm.guidance_line(pm.Mood("sadness", pm.MOOD_SURE - 0.01, 0)) == ""
    assert set(pm.MOOD_WORDS) == set(pm.EMOTIONS)
    for label in pm.EMOTIONS[: pm.NEUTRAL]:
        line = pm.guidance_line(pm.Mood(label, 0.95, 1213), "Robin")
        assert "Robin" in line and "#1214" in line and pm.count_tokens(line) <= 30 and "\n" not in line


def test_a_mood_is_told_where_a_reader_would_agree(embedder):
    """Of ordinary lines hardly any is told as a mood, and most told moods are right (bench/emotion.py has the rest)."""
    rows = [json.loads(line) for line in PLAIN.read_text(encoding="utf8").splitlines()]
    rows = [row for row in rows if row["split"] == "looked at"]
    found = [
        pm.mood_of([(0, pm.feeling_in("en", row["text"], vector, embedder.bag))])
        for row, vector in zip(rows, embedder.encode([row["text"] for row in rows]), strict=True)
    ]
    told = [(mood.label, row["label"]) for mood, row in zip(found, rows, strict=True) if pm.guidance_line(mood)]
    assert len(told) >= 25 and sum(label == truth for label, truth in told) >= 0.8 * len(told)
    assert sum(truth == "neutral" for _, truth in told) <= 0.1 * sum(row["label"] == "neutral" for row in rows)


@given(readings, readings)
def test_matching_emotions_are_a_small_symmetric_nudge(a, b):
    """0 to 1, and never more than either message feels."""
    (match,), (other,) = pm.emotion_matches(a, [b]), pm.emotion_matches(b, [a])
    assert 0 <= match <= 1 and match == pytest.approx(other)
    assert match <= 1 - max(a.scores["neutral"], b.scores["neutral"]) + 1e-9


def test_like_feelings_match():
    """The same feeling matches, another does not, and what is neutral matches nothing."""
    assert pm.emotion_matches(sure("joy"), [sure("joy"), sure("anger")]) == [pytest.approx(0.9), 0]
    assert pm.emotion_matches(sure("neutral", 1.0), [sure("neutral", 1.0)]) == [0]


def test_a_bag_of_words_knows_no_order(embedder):
    """A unit vector of all pieces, the same in any order; zeros where there is none; any text is taken."""
    embedder.encode(["loaded"])
    bag = embedder.bag("the dog bites the postman")
    assert (
        bag.shape == (pm.VECTOR_SIZE,) and bag.dtype == np.float32 and np.linalg.norm(bag) == pytest.approx(1, abs=1e-5)
    )
    assert np.allclose(bag, embedder.bag("the postman bites the dog"), atol=1e-5)
    assert bag @ embedder.bag("a cat scratched the milkman") > bag @ embedder.bag("interest rates fell in March")
    assert not embedder.bag("").any() and np.isfinite(embedder.bag("\ud800\0 " * 5000)).all()
