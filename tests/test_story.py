"""The story so far: how summaries and facts are made, kept, shown, and what becomes of bad answers.

Pure functions first, then the program in front of an upstream that answers requests for summaries as it is told to.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import httpx
import pytest
from chats import open_chat
from fakes import API, PATIENCE, Handler, LocalServer, Server, Upstream, completion, get, say, settings, wait_until
from hypothesis import example, given
from hypothesis import settings as trials
from hypothesis import strategies as st

import persona_memory as pm

PERSONA = {"role": "system", "content": "You are Mira, a lighthouse keeper."}
LINES = [
    "#1 User: Good evening, I am Tomas. I bring the copper lantern from the harbour.",
    "#2 Mira: Welcome, Tomas. The lantern must hang in the tower before the storm comes.",
    "#3 User: I promise to carry it up tonight, even if the captain forbids it.",
    "#4 Mira: Then take the brown mule, and mind the broken stair.",
]
SHARES = pm.parse_shares(pm.Settings().budget)
SOUND = "Tomas brought Mira the copper lantern and promised to carry it up the tower before the storm."


# ---------------------------------------------------------------------------- pieces


def message(text: str, parent: str = pm.ROOT, role: str = "user", name: str | None = None) -> pm.Message:
    """A message under its parent."""
    digest = pm.message_digest(role, text)
    return pm.Message(pm.message_id(parent, digest), parent, role, text, name, tokens=pm.count_tokens(text))


def branch(*texts: str) -> list[pm.Message]:
    """Messages one under the other, the user's and the character's in turn."""
    messages, parent = [], pm.ROOT
    for place, text in enumerate(texts):
        messages.append(message(text, parent, pm.CHAT_ROLES[place % 2]))
        parent = messages[-1].id
    return messages


def summary(start: int, end: int, level: int = 1, text: str = SOUND, texts: list[str] | None = None) -> pm.Summary:
    """A summary of those places of a branch."""
    covered = texts[start : end + 1] if texts else [f"m{i}" for i in range(start, end + 1)]
    return pm.new_summary(level, covered, start, text, 400, "model")


def fact(about: str, text: str, index: int, **more) -> pm.Fact:
    """A fact out of message `m<index>`."""
    return pm.Fact(f"{about}{index}", about, text, "words", f"m{index}", index, index, **more)


def texts(count: int) -> list[str]:
    """The texts of a branch of messages m0, m1, ..."""
    return [f"m{i}" for i in range(count)]


# ---------------------------------------------------------------------------- which summaries make the story


def test_the_story_is_what_no_higher_level_has_taken_in():
    """Oldest first; summaries whose texts are not all on the branch, or not side by side, are not in it."""
    low = [summary(i, i + 3) for i in (0, 4, 8, 12)]
    high = summary(0, 7, 2)
    elsewhere = replace(summary(16, 19), texts=("m16", "m17", "m18", "other"))
    parted = replace(summary(16, 19), texts=("m16", "m17", "m19", "m18"))
    assert pm.Places(texts(20)).story([*reversed(low), elsewhere, parted, high]) == [high, *low[2:]]
    assert pm.Places(texts(7)).story([*low, high]) == low[:1]
    assert pm.Places(texts(3)).story([]) == []


def test_the_oldest_line_is_improved_first_and_in_it_what_tells_most():
    """Then the line itself, out of its better parts; then the next line. Who has failed too often is left alone."""
    told = ["It rained.", "Tomas promised Mira, crying, never to leave her.", "They ate.", "Then they slept."]
    parts = [replace(summary(4 * i, 4 * i + 3, text=text), source="extract") for i, text in enumerate(told)]
    line, newer = replace(summary(0, 15, 2), source="extract"), replace(summary(16, 19), source="extract")
    branch, order = pm.Places(texts(20)), []
    stored = {s.id: s for s in (*parts, line, newer)}
    while found := pm.extract_to_improve([line, newer], branch.standing(stored)):
        order.append(found)
        stored[found.id] = replace(found, source="model")
        line, newer = stored[line.id], stored[newer.id]
    assert order[0].text == told[1]
    assert {s.id for s in order[:4]} == {s.id for s in parts} and [s.id for s in order[4:]] == [line.id, newer.id]
    assert pm.extract_to_improve([replace(parts[0], tries=pm.MOST_TRIES)], []) is None


def test_a_summary_moves_with_what_it_covers():
    """Deleting or inserting above it changes its numbers and nothing else; what stands twice is told twice."""
    low = summary(4, 7)
    (moved,) = pm.Places(texts(20)[2:]).story([low])
    assert (moved.start, moved.end, moved.since) == (2, 5, 5) and moved.tokens == pm.line_tokens(moved)
    assert replace(moved, start=4, end=7, since=7, tokens=low.tokens) == low
    assert [s.start for s in pm.Places([*texts(8), *texts(8)]).story([low])] == [4, 12]
    same = pm.new_summary(1, ["ok"] * 4, 0, SOUND, 400, "model")
    assert [s.start for s in pm.Places(["ok"] * 10).story([same])] == [0, 4], "they do not overlap"


@trials(max_examples=200)
@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=12), min_size=2, max_size=5))
def test_where_summaries_stand_is_the_same_for_a_branch_that_another_has_gone_over_to(branches):
    """However long what they share is, and however often a text stands there."""
    places = pm.Places(branches[0])
    covered = [path[i : i + n] for path in branches for n in (1, 2, 4) for i in range(len(path) - n + 1)]
    summaries = [pm.new_summary(1, some, 0, SOUND, 400, "model") for some in covered]
    for path in (*branches, branches[0]):
        kept = pm.shared_front(places.texts, path)
        places.go_over(kept, path[kept:])
        assert list(map(places.of, summaries)) == list(map(pm.Places(path).of, summaries))


@trials(max_examples=200)
@given(st.lists(st.text("abc", max_size=12), min_size=2, max_size=4), st.lists(st.integers(0, 10**6), max_size=12))
def test_a_summary_of_summaries_stands_where_its_texts_do(branches, choices):
    """Whatever it is put together of, on a branch that another has gone over to, and one by one as well as at once."""
    parts = [pm.new_summary(1, some, 0, SOUND, 400, "model") for some in ("a", "ab", "cab", "bb", branches[0] or "c")]
    for level, choice in enumerate(choices, 2):
        group = [("", tuple("ab"[: choice % 3])), *((p.id, p.texts) for p in (parts[choice % len(parts)], parts[-1]))]
        texts = pm.Stretch(group[choice % 2 :])
        if len(texts) < 100:
            parts.append(pm.new_summary(level, texts, 0, SOUND, 400, "model"))
    flat = [replace(part, texts=tuple(part.texts)) for part in parts]
    assert [pm.Stretch([("", part.texts)]) for part in flat] == [part.texts for part in parts]
    for part, plain in zip(parts, flat, strict=True):
        assert all(part.texts[at] == plain.texts[at] for at in range(-len(plain.texts), len(plain.texts)))
    places = pm.Places(branches[0])
    for path in (*branches, branches[0]):
        kept, moves = pm.shared_front(places.texts, list(path)), places.moves
        before = list(map(places.of, parts))
        places.go_over(kept, path[kept:])
        assert list(map(places.of, parts)) == list(map(pm.Places(path).of, flat))
        assert places.moves > moves or list(map(places.of, parts)) == before
        stored = {s.id: s for s in (*parts, replace(parts[-1], text=path))}
        assert places.standing(stored) == sorted(places.placed(stored.values()), key=pm.told_order)


def test_a_gap_that_a_change_has_left_is_filled_whatever_its_length():
    """One that is a little longer than a stretch is filled at once; behind the story it takes a whole stretch."""
    story = [summary(20, 39), summary(40, 59)]
    assert pm.next_stretch(story, 0, 70, 20) == range(20)
    assert pm.next_stretch(story, 1, 70, 20) == range(1, 20)
    assert pm.next_stretch(story[1:], 15, 70, 20) == range(15, 40)
    assert pm.next_stretch(story[1:], 5, 70, 20) == range(5, 25)
    assert pm.next_stretch(story, 20, 79, 20) is None
    assert pm.next_stretch(story, 20, 80, 20) == range(60, 80)
    assert pm.next_stretch(story[1:], 30, 35, 20) is None


def test_a_users_words_are_kept_beside_what_has_replaced_them():
    """As long as half of what they cover is on the branch; those that stand there are in the story."""
    own = replace(summary(4, 7), source="user")
    branch = texts(20)
    assert pm.replaced_words([own], pm.Places(branch)) == []
    branch[5] = "other"
    (kept,) = pm.replaced_words([own, summary(8, 11)], pm.Places(branch))
    assert (kept.text, kept.start, kept.end) == (own.text, 4, 7)
    assert pm.replaced_words([own], pm.Places(branch[6:])) == [replace(own, start=0, end=1)]
    assert pm.replaced_words([own], pm.Places(branch[7:])) == []


def test_the_next_gap_is_the_first_place_without_a_summary():
    """And ends where the story goes on."""
    assert pm.next_gap([], 1) == (1, float("inf"))
    assert pm.next_gap([summary(0, 3), summary(4, 7)], 0) == (8, float("inf"))
    assert pm.next_gap([summary(0, 3), summary(12, 15)], 0) == (4, 12)
    assert pm.next_gap([summary(4, 7)], 0) == (0, 4)


def test_a_story_that_fits_is_not_condensed():
    """Nor is one summary alone, whatever it takes."""
    story = [summary(i, i + 3) for i in (0, 4, 8, 12)]
    total = sum(s.tokens for s in story)
    assert pm.to_condense(story, total) == []
    assert pm.to_condense(story[:1], 0) == []
    assert pm.to_condense(story, total - 1) == story


def test_the_oldest_neighbours_of_the_lowest_full_level_are_condensed():
    """A gap between them keeps a level from it; then the oldest of all are."""
    high = [summary(0, 15, 2)]
    low = [summary(i, i + 3) for i in range(16, 36, 4)]
    assert pm.to_condense([*high, *low], 1) == low[:4]
    assert pm.to_condense([*high, *low[:3]], 1) == [*high, *low[:3]]
    assert pm.to_condense([*high, low[0], *low[2:]], 1) == [*high, low[0], *low[2:4]]


@given(st.integers(0, 10**6), st.integers(0, 20_000))
def test_a_summary_is_much_shorter_than_what_it_covers(covered, budget):
    """At most COMPRESSION of it, and so small that several stand in a story; but long enough to say something."""
    room = pm.summary_room(covered, budget)
    assert room >= pm.SHORTEST_SUMMARY
    if room > pm.SHORTEST_SUMMARY:
        assert room <= pm.COMPRESSION * covered
        assert room * pm.SUMMARIES_IN_STORY <= (1 - pm.FACTS_SHARE) * budget


def uncondensed_story(budget: int, tokens: int) -> list[pm.Summary]:
    """The longest story of summaries of so many tokens that is not condensed, in a long chat."""
    text = pm.first_tokens("the lamp went out " * 200, tokens)
    story, start = [], 1000
    while not pm.to_condense(story, int((1 - pm.FACTS_SHARE) * budget)):
        story.append(summary(start, start + 19, text=text))
        start += 20
    return story[:-1]


@pytest.mark.parametrize("context", [1024, 2048, 4096, 8192, 32768])
@pytest.mark.parametrize("size", ["shortest", "largest"])
def test_what_is_not_condensed_is_told(context, size):
    """The parts of a story that condensing leaves alone all stand in the prompt, headings and numbers counted."""
    budget = pm.story_tokens(context, SHARES)
    tokens = pm.SHORTEST_SUMMARY if size == "shortest" else pm.summary_room(10**6, budget)
    story = uncondensed_story(budget, tokens)
    assert pm.render_story(story, [], budget).summaries == tuple(story)


# ---------------------------------------------------------------------------- the request and its answer


def test_long_lines_are_shortened_for_a_small_model():
    """Short lines stay whole; all together take what the model has room for."""
    lines = ["#1 User: Yes.", "#2 Mira: " + "a long story about the sea " * 100, "#3 User: " + "and another one " * 100]
    clipped = pm.clipped_lines(lines, 120)
    assert clipped[0] == lines[0]
    assert sum(pm.count_tokens(line) + 1 for line in clipped) <= 120
    assert all(line.startswith(short) and short for line, short in zip(lines, clipped, strict=True))
    assert pm.clipped_lines(lines, 10_000) == lines


ROW = {"about": "lantern", "fact": "The lantern is copper.", "message": 1, "quote": "the copper lantern"}
WHOLE = json.dumps({"summary": SOUND, "facts": [ROW]})
ANSWERS = {
    "json": (WHOLE, (SOUND, [ROW])),
    "json in prose": (f"Sure! Here it is:\n{WHOLE}\nShall I go on?", (SOUND, [ROW])),
    "fenced": (f"```json\n{WHOLE}\n```", (SOUND, [ROW])),
    "fenced without a word": (f"```\n{WHOLE}\n```", (SOUND, [ROW])),
    "braces before": (f"{{thinking}} I use {{curly}} signs. {WHOLE} {{}}", (SOUND, [ROW])),
    "cut off in the facts": (WHOLE[: WHOLE.index("facts") + 20], (SOUND, [])),
    "cut off in the summary": (WHOLE[:40], (WHOLE[len('{"summary": "') : 40], [])),
    "no facts": (json.dumps({"summary": SOUND}), (SOUND, [])),
    "facts that are no list": (json.dumps({"summary": SOUND, "facts": "none"}), (SOUND, [])),
    "plain": (SOUND, (SOUND, [])),
    "fenced plain": (f"```\n{SOUND}\n```", (SOUND, [])),
    "label": (f"Summary: {SOUND}", (SOUND, [])),
    "bold label": (f"**Summary:** {SOUND}", (SOUND, [])),
    "polite label": (f"Here is the summary: {SOUND}", (SOUND, [])),
    "thoughts first": (f"<think>\nThe user wants {{}} a summary.\n</think>\n\n{WHOLE}", (SOUND, [ROW])),
    "thoughts first, plain": (f"<thinking>Hm.</thinking>{SOUND}", (SOUND, [])),
    "thoughts only": ("<think>The user wants a summary of the lantern", ("", [])),
    "other json": ('{"error": "no"}', ("", [])),
    "a list": ('["a", "b"]', ("", [])),
    "empty": ("", ("", [])),
    "white space": (" \n\t", ("", [])),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_summary_and_facts_are_found_in_what_models_answer(name):
    """Whatever stands around them; what is no summary gives none."""
    text, expected = ANSWERS[name]
    found = pm.read_answer(text)
    assert (found[0].strip("`* \n"), found[1]) == expected


@given(st.text(alphabet='{}[]"\\:, \nsumary<think>/`', max_size=60))
def test_no_answer_makes_reading_it_fail(text):
    """Text and a list come out of anything."""
    found, facts = pm.read_answer(text)
    assert isinstance(found, str) and isinstance(facts, list)


# ---------------------------------------------------------------------------- sound and unsound summaries

CHATS = {
    "English": (
        LINES,
        "Tomas came to the lighthouse in the evening and brought Mira the copper lantern from the harbour. "
        "He promised to carry it up the tower before the storm, even against the captain's word.",
    ),
    "German": (
        [
            "#1 Anna: Guten Abend, Herr Weber. Ich habe Ihren Schlüssel im Garten gefunden, unter dem Apfelbaum.",
            "#2 Weber: Danke, Anna! Ich war schon verzweifelt. Ohne den Schlüssel kommt niemand in den Keller.",
            "#3 Anna: Ich verspreche, niemandem vom Keller zu erzählen. Aber wer hat die alte Truhe geöffnet?",
            "#4 Weber: Das war mein Bruder Karl, bevor er nach Hamburg ging. Er hat nie ein Wort gesagt.",
        ],
        "Anna fand Webers Schlüssel unter dem Apfelbaum im Garten und brachte ihn zurück. Weber war verzweifelt "
        "gewesen. Anna versprach, niemandem vom Keller zu erzählen. Die alte Truhe hatte sein Bruder Karl geöffnet, "
        "bevor er nach Hamburg ging.",
    ),
    "Spanish": (
        [
            "#1 Lucía: Buenas noches, Diego. Mi hermana Carmen ha perdido el anillo de nuestra abuela en el mercado.",
            "#2 Diego: No llores, Lucía. Mañana iré al mercado y hablaré con el viejo pescador.",
            "#3 Lucía: Prométeme que no dirás nada a mi padre. Tiene el corazón enfermo.",
            "#4 Diego: Te lo prometo. Guardaré el secreto y traeré el anillo antes del domingo.",
        ],
        "Carmen, la hermana de Lucía, perdió en el mercado el anillo de la abuela. Lucía lloraba. Diego prometió "
        "hablar con el viejo pescador, guardar el secreto ante el padre enfermo y traer el anillo antes del domingo.",
    ),
    "Japanese": (
        [
            "#1 健太: こんばんは、美咲さん。灯台の鍵を海岸で見つけました。",
            "#2 美咲: ありがとう、健太。嵐の前に灯台の明かりをつけなければなりません。",
            "#3 健太: 約束します。今夜、祖父の船で島まで行きます。",
            "#4 美咲: 気をつけて。去年の嵐で兄が行方不明になったの。とても怖い。",
        ],
        "健太は海岸で灯台の鍵を見つけ、美咲に渡した。健太は今夜、祖父の船で島まで行くと約束した。"
        "美咲は去年の嵐で兄が行方不明になったので、とても怖いと話した。",
    ),
    "Russian": (
        [
            "#1 Иван: Добрый вечер, Мария. Я принёс письмо от твоего брата Алексея из Москвы.",
            "#2 Мария: Наконец-то! Я ждала этого письма всю зиму и боялась самого худшего.",
            "#3 Иван: Он обещает вернуться весной, когда растает лёд на реке.",
            "#4 Мария: Тогда я подожду у старой мельницы. Передай ему мой красный платок.",
        ],
        "Иван принёс Марии письмо от её брата Алексея из Москвы. Мария ждала письма всю зиму и боялась худшего. "
        "Алексей обещал вернуться весной, когда растает лёд на реке; Мария будет ждать у старой мельницы и передала "
        "ему красный платок.",
    ),
}


@pytest.mark.parametrize("language", CHATS)
def test_a_sound_summary_passes(language):
    """Hand-written ones, in the language of their chat."""
    lines, told = CHATS[language]
    assert pm.flaw_of(told, "\n".join(lines)) == ""


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("language", CHATS)
def test_a_summary_in_another_language_than_the_chats_is_flagged(chat, language):
    """A model that translates has not kept the words."""
    flaw = pm.flaw_of(CHATS[language][1], "\n".join(CHATS[chat][0]))
    assert bool(flaw) == (chat != language)


TRANSLATIONS = {
    "German": "Tomas kam am Abend zum Leuchtturm und brachte Mira die kupferne Laterne vom Hafen. Er versprach, sie "
    "noch vor dem Sturm in den Turm zu tragen.",
    "Spanish": "Tomas llegó al faro por la noche y trajo a Mira el farol de cobre del puerto. Prometió subirlo a la "
    "torre antes de la tormenta.",
    "French": "Tomas est venu au phare le soir et a apporté à Mira le fanal de cuivre du port. Il a juré de le monter "
    "dans la tour avant la tempête.",
    "Chinese": "托马斯晚上来到灯塔，把港口的铜灯笼交给了米拉。他答应在暴风雨之前把灯笼搬上塔楼。",
    "Russian": "Томас вечером пришёл на маяк и принёс Мире медный фонарь из гавани. Он обещал поднять его до бури.",
}


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_faithful_translation_is_flagged_too(language):
    """The names alone are no ground: the story must be in the chat's language."""
    assert pm.flaw_of(TRANSLATIONS[language], "\n".join(LINES))


UNSOUND = {
    "empty": "",
    "a dot": ".",
    "two words": "The lantern.",
    "sorry": "I'm sorry, but I can't help with a story about Tomas, Mira and the copper lantern in the tower.",
    "sorry, typographic": "I’m sorry, I can’t retell how Tomas brought Mira the copper lantern to the tower.",
    "cannot": "I cannot summarise how Tomas promised Mira the copper lantern before the storm.",
    "unable": "I am unable to tell of Tomas, Mira, the harbour, the tower and the storm.",
    "as an AI": "As an AI language model, I do not retell how Tomas brought Mira the lantern from the harbour.",
    "unfortunately": "Unfortunately, I can't retell how Tomas carried the lantern up the tower for Mira.",
    "apology": "I apologize, but Tomas and Mira and the lantern in the tower are not something to retell.",
    "will not": "I won't continue with Tomas, Mira, the captain, the lantern and the tower.",
    "dialogue": '"Hang the lantern, Tomas!" Mira cried. "The storm comes, take the mule, mind the broken stair!"',
    "typographic dialogue": "“Hang the lantern, Tomas! The storm comes to the tower,” said Mira. “Take the mule!”",
    "actions": "*Tomas takes the copper lantern and climbs the broken stair* The storm comes. *Mira waits there*",
    "speaker lines": "Tomas: I carry the lantern up the tower.\nMira: Mind the broken stair and the storm, Tomas.",
    "something else": "Cooking pasta requires boiling water, olive oil, fresh basil and plenty of grated cheese.",
    "invented names": "Tomas gave Mira the lantern; then Gandalf, Frodo, Aragorn and Legolas came up the tower.",
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_summary_is_flagged(name):
    """Nothing, a refusal, the story continued, or what was not said."""
    assert pm.flaw_of(UNSOUND[name], "\n".join(LINES))


@pytest.mark.parametrize(
    "told",
    [
        SOUND,
        'Tomas brought the copper lantern from the harbour and told Mira "I promise". She offered the brown mule.',
        "Mira welcomed Tomas and warned him of the broken stair. Note: the captain had forbidden the lantern.",
        "The storm was near when Tomas came up from the harbour with the lantern for Mira's tower.",
        "Mira was afraid of the storm; Tomas promised that the lantern would hang in the tower tonight.",
    ],
)
def test_no_sound_summary_is_flagged(told):
    """A short quotation or a colon does not make a scene."""
    assert pm.flaw_of(told, "\n".join(LINES)) == ""


# ---------------------------------------------------------------------------- sentences

PROSE = st.lists(
    st.sampled_from(["Mira", "Tomas", "said.", "went,", "home!", "lamp?", "あい。", "嵐", "слово.", "x"]),
    max_size=60,
).map(" ".join)


@given(PROSE, st.integers(1, 60))
def test_whole_sentences_stay_within_their_tokens(text, limit):
    """They are the text's beginning; what fits is left as it is."""
    cut = pm.whole_sentences(text, limit)
    assert pm.count_tokens(cut) <= limit
    assert " ".join(text.split()).startswith(cut)
    if pm.count_tokens(" ".join(text.split())) <= limit:
        assert cut == " ".join(text.split())


def test_a_summary_ends_with_a_sentence():
    """Where it has to be cut, and where a sentence ends in what fits."""
    assert pm.whole_sentences("Mira went home. Tomas stayed in the tower all night.", 8) == "Mira went home."
    assert pm.whole_sentences("嵐が来た。" * 40, 30).endswith("。")
    assert pm.whole_sentences("a word after another without any end at all", 4) == "a word after"


ROWS = st.lists(st.tuples(st.sampled_from(["Mira", "Tomas", ""]), PROSE, st.floats(0, 2)), max_size=12)


@given(ROWS, st.integers(pm.SHORTEST_SUMMARY, 200))
@example([("Mira", "Mira Mira Mira Mira Mira Mira Mira Tomas Tomas 嵐 Mira", 0.0)], 24)  # cut inside a word once
def test_an_extract_says_only_what_was_said(rows, room):
    """In its tokens, with the rows' own words and their speakers' names."""
    text = pm.extract_summary(rows, room)
    said = pm.plain_words(" ".join(f"{speaker} {words}" for speaker, words, _ in rows)).split()
    assert pm.count_tokens(text) <= room
    assert set(pm.plain_words(text).split()) <= set(said)


@pytest.mark.parametrize(
    "texts", [["Yes.", "No.", "Go on!"], ["Hello there"] * 4, ["😀", "😀😀"], ["はい。", "いいえ"]]
)
def test_an_extract_of_short_words_says_something(texts):
    """A stretch of short messages still has a summary that is not empty."""
    assert pm.extract_summary([("Mira", text, 0.5) for text in texts], 40)


def test_an_extract_names_who_speaks_where_another_one_does():
    """Once for each stretch of one speaker's sentences."""
    rows = [
        ("Tomas", "I bring the lantern. The road was long.", 0.5),
        ("Tomas", "The mule is tired now.", 0.5),
        ("Mira", "Hang it in the tower.", 0.5),
    ]
    assert pm.extract_summary(rows, 200) == (
        "Tomas: I bring the lantern. The road was long. The mule is tired now. Mira: Hang it in the tower."
    )


def test_an_extract_keeps_promises_and_names():
    """They go before small talk of the same length and weight."""
    idle = [("Mira", "The weather was rather grey over the quiet water today.", 0.5)] * 8
    told = [
        ("User", "I promise you that the lamp will burn until the morning.", 0.5),
        ("Mira", "My brother is called Aurelio and my sister is called Benedetta.", 0.5),
    ]
    text = pm.extract_summary([*idle[:4], *told, *idle[4:]], 45)
    assert "I promise you" in text and "Aurelio" in text


# ---------------------------------------------------------------------------- facts

TOLD = branch(
    "My name is Tomas and I live in Porto.",
    "Welcome! The red key opens the tower.",
    "My cat Miso hates the rain.",
    "I will feed her tomorrow.",
)


def row(quote: str, number: int = 1, about: str = "Tomas's home", text: str = "Tomas lives in Porto.") -> dict:
    """A fact as a model gives it."""
    return {"about": about, "fact": text, "message": number, "quote": quote}


def test_a_fact_stands_in_the_message_that_it_quotes():
    """Case and signs do not matter; a wrong number is mended, or none at all."""
    (found,) = pm.checked_facts([row("i live in PORTO", 11)], TOLD, 10)
    assert (found.digest, found.index, found.end) == (TOLD[0].digest, 10, 13)
    for number in (1, 12, 999, -4, "two", None, 12.0, [1]):
        (mended,) = pm.checked_facts([row("hates the rain", number)], TOLD, 10)
        assert (mended.digest, mended.index) == (TOLD[2].digest, 12)


@pytest.mark.parametrize(
    "bad",
    [
        row("I live in Lisbon"), row(""), row("!!"), row("I"), row("in"), {}, "fact", None, 5, ["x"],
        row("hates the rain") | {"about": ""}, row("hates the rain") | {"fact": 7},
        row("Porto Welcome"), {"fact": "x", "quote": "hates the rain"},
    ],
)  # fmt: skip
def test_an_invented_fact_is_dropped(bad):
    """So is one without its words, and what is no fact at all; the others are kept."""
    kept = pm.checked_facts([bad, row("opens the tower", 2, "key", "The red key opens the tower.")], TOLD, 0)
    assert [f.text for f in kept] == ["The red key opens the tower."]


def test_a_quote_is_whole_words():
    """Letters out of the middle of words are no quotation."""
    assert pm.checked_facts([row("ame is Tom")], TOLD, 0) == []


def test_one_stretch_gives_few_facts():
    """And one for each thing and message."""
    rows = [row("I live in Porto", 1, f"thing {i}") for i in range(20)]
    assert len(pm.checked_facts([*rows, *rows], TOLD, 0)) == pm.MOST_FACTS


def test_a_newer_fact_supersedes_the_older_and_says_so():
    """The same thing under another spelling of its name; the older one stands behind it in the same line."""
    old, new = fact("Home of Tomas", "Tomas lives in Porto.", 2), fact("home of tomas!", "Tomas lives in Faro.", 9)
    ((held, before),) = pm.facts_of([new, old], pm.Places(texts(12)), 12)
    assert (held, before) == (new, old)
    assert pm.fact_line(held, before) == "- #10 Tomas lives in Faro. (earlier, #3: Tomas lives in Porto.)"
    assert pm.fact_line(held, None) == "- #10 Tomas lives in Faro."
    assert pm.fact_line(held, replace(old, text=new.text)) == "- #10 Tomas lives in Faro."


def test_facts_come_pinned_first_then_the_newest():
    """Forgotten ones, those of other branches and those that the prompt still shows do not come."""
    facts = [
        fact("a", "old", 1), fact("b", "new", 8), fact("c", "pinned", 3, pinned=True),
        fact("d", "gone", 4, forgotten=True),
        fact("e", "elsewhere", 40), replace(fact("f", "still shown", 5), end=10),
    ]  # fmt: skip
    assert [f.text for f, _ in pm.facts_of(facts, pm.Places(texts(20)), 10)] == ["pinned", "new", "old"]


def test_what_superseded_a_fact_can_be_forgotten():
    """Then the older one holds again; a pinned one holds against newer ones."""
    old, new = fact("home", "Porto", 2), fact("home", "Faro", 9)
    assert pm.facts_of([old, replace(new, forgotten=True)], pm.Places(texts(12)), 12) == [(old, None)]
    assert pm.facts_of([replace(old, pinned=True), new], pm.Places(texts(12)), 12)[0][0].text == "Porto"


# ---------------------------------------------------------------------------- the story in the prompt

STORIES = st.lists(st.text(min_size=1, max_size=80) | PROSE.filter(bool), max_size=8).map(
    lambda texts: [summary(4 * i, 4 * i + 3, text=text) for i, text in enumerate(texts)]
)
FACTS = st.lists(st.text(min_size=1, max_size=60), max_size=8).map(
    lambda texts: [(fact(str(i), text, i), None) for i, text in enumerate(texts)]
)


@given(STORIES, FACTS, st.integers(-20, 400))
def test_the_story_never_takes_more_than_its_budget(story, facts, budget):
    """What is told is the newest part of the story; the facts keep their order."""
    told = pm.render_story(story, facts, budget)
    assert told.tokens <= max(0, budget)
    assert told.summaries == tuple(story[len(story) - len(told.summaries) :])
    held = [f for f, _ in facts]
    assert [f for f in held if f in told.facts] == list(told.facts)
    assert bool(told.text) == bool(told.summaries or told.facts)


def test_the_story_is_framed_and_in_order():
    """Numbered from 1, oldest first, facts behind."""
    story = [summary(0, 19, text="Tomas came."), summary(20, 39, text="Tomas went.")]
    told = pm.render_story(story, [(fact("cat", "The cat is called Miso.", 7), None)], 300)
    assert told.text.splitlines() == [
        "[The story so far, oldest first:]", "(#1-20) Tomas came.", "(#21-40) Tomas went.", "Facts:",
        "- #8 The cat is called Miso.", "[End of the story so far]",
    ]  # fmt: skip
    assert pm.render_story([], [], 300) == pm.Story()


def test_the_story_stands_behind_the_only_system_message():
    """In its text, which stays in front byte for byte."""
    given = {"role": "system", "content": " You are Mira.\r\n ", "name": "x"}
    (got,) = pm.with_story([given], "STORY")
    assert got == given | {"content": given["content"] + "\n\nSTORY"}
    assert pm.with_story([given], "") == [given]
    assert given["content"] == " You are Mira.\r\n "


def test_the_story_is_a_system_message_of_its_own_where_the_client_has_several():
    """They stay as they are."""
    block = [{"role": "system", "content": "One."}, {"role": "developer", "content": "Two."}]
    assert pm.with_story(block, "STORY") == [*block, {"role": "system", "content": "STORY"}]


def test_the_story_stands_in_a_folded_first_user_message():
    """Strict clients have no system message: the persona is in the first user message then."""
    folded = {"role": "user", "content": "[You are Mira.]"}
    assert pm.with_story([folded], "STORY") == [{"role": "user", "content": "[You are Mira.]\n\nSTORY"}]
    assert pm.with_story([], "STORY") == []


def test_the_story_is_one_more_part_of_content_in_parts():
    """The client's own parts stay as they are."""
    parts = [{"type": "text", "text": "You are Mira."}]
    (got,) = pm.with_story([{"role": "system", "content": parts}], "STORY")
    assert got["content"] == [*parts, {"type": "text", "text": "STORY"}]
    assert len(parts) == 1


# ---------------------------------------------------------------------------- branches, as pure functions


def grown(choices: list[int]) -> tuple[list[list[str]], dict[str, list[str]]]:
    """A tree of messages: each hangs under an earlier one or the root. All its branches, and each message's."""
    above: dict[str, list[str]] = {"": []}
    for number, choice in enumerate(choices):
        parent = list(above)[choice % len(above)]
        key = pm.message_id(parent, pm.message_digest("user", str(number)))
        above[key] = [*above[parent], key]
    del above[""]
    return list(above.values()), above


@st.composite
def told_trees(draw):
    """A tree, and summaries and facts of random stretches of random branches."""
    deep = draw(st.lists(st.sampled_from([-1, -1, -1, -1, -2, -4, -8]), min_size=1, max_size=40))
    branches, _ = grown([choice % (number + 1) for number, choice in enumerate(deep)])
    summaries, facts = [], []
    for _ in range(draw(st.integers(1, 10))):
        path = draw(st.sampled_from(branches))
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(path) - 1)] * 2)))
        summaries.append(summary(start, end, draw(st.integers(1, 3)), texts=path))
        facts.append(replace(fact(f"thing {len(facts)}", "so", start), digest=path[start], end=end))
    return branches, summaries, facts


@trials(max_examples=200)
@given(told_trees())
def test_a_branchs_story_is_made_of_stretches_that_are_all_on_it(tree):
    """A summary stands on a branch exactly when all messages of its range do; none of them is told twice."""
    branches, summaries, _ = tree
    for path in branches:
        standing = [s for s in summaries if path[s.start : s.end + 1] == list(s.texts)]
        story = pm.Places(path).story(summaries)
        assert set(story) <= set(standing)
        for one in standing:  # alone it would be told
            assert pm.Places(path).story([one]) == [one]
        covered = {place for s in story for place in range(s.start, s.end + 1)}
        assert covered == {place for s in standing for place in range(s.start, s.end + 1)}


@trials(max_examples=200)
@given(told_trees())
def test_a_fact_holds_on_the_branches_that_its_message_is_on(tree):
    """And nowhere else, and not while its stretch still stands in the prompt."""
    branches, _, facts = tree
    for path in branches:
        held = {f.id for f, _ in pm.facts_of(facts, pm.Places(path), len(path))}
        assert held == {f.id for f in facts if f.digest in path and f.end < len(path)}


# ---------------------------------------------------------------------------- what summaries are stored as


def condensed(told: list[pm.Summary], level: int = 2) -> pm.Summary:
    """A summary of those that stand one behind the other on the branch m0, m1, ..."""
    texts = pm.stretch_of(told, lambda start, end: [f"m{i}" for i in range(start, end)])
    return pm.new_summary(level, texts, told[0].start, SOUND, 400, "model")


def ladder(steps: int) -> list[pm.Summary]:
    """The summaries of a long story, four messages each, and what took in the beginning and the next one, again and
    again."""
    low = [summary(4 * i, 4 * i + 3) for i in range(steps + 1)]
    line, found = low[0], [*low]
    for level, newer in enumerate(low[1:], 2):
        line = condensed([line, newer], level)
        found.append(line)
    return found


def test_what_a_summary_shares_with_those_that_it_was_made_of_is_stored_once(tmp_path):
    """Also where it is written before them, and where there is a gap between them; opened again it is the same."""
    told = ladder(60)
    gap = condensed([told[0], told[2]], 70)
    assert list(gap.texts) == texts(12)
    store = pm.ChatStore(tmp_path / "chat")
    store.commit(summaries=[*reversed(told), gap])
    rows = [json.loads(row) for row in rows_of(store, "s:").values()]
    assert sum(isinstance(d, str) for row in rows for d in row["texts"]) == 61 * 4 + 4
    assert store.summaries == {s.id: s for s in (*told, gap)}
    store.close()
    store = pm.ChatStore(tmp_path / "chat")
    assert store.summaries == {s.id: s for s in (*told, gap)}
    assert store.summaries[told[-1].id].texts.parts[0][1] is store.summaries[told[-2].id].texts
    store.close()


def test_a_chat_of_the_format_before_has_its_summaries_put_together(tmp_path):
    """There each had all its texts: a chat of 100,000 messages took a gigabyte for them."""
    told = [replace(s, texts=tuple(s.texts)) for s in ladder(30)]
    store = pm.ChatStore(tmp_path / "chat")
    store.commit(summaries=told, info={"chat_id": "long"})
    with store._database.use() as cache:
        cache["format"] = 2
    before = rows_of(store, "s:")
    store.close()
    store = pm.ChatStore(tmp_path / "chat")
    assert store.summaries == {s.id: s for s in told}
    rows = rows_of(store, "s:")
    assert rows.keys() == before.keys()
    assert sum(isinstance(d, str) for row in rows.values() for d in json.loads(row)["texts"]) == 31 * 4
    assert rows_of(store, "format") == {"format": pm.STORE_FORMAT}
    store.close()


def test_another_process_learns_of_summaries_whatever_was_changed_last(tmp_path):
    """A part that has changed after the whole was made is read before it."""
    told = ladder(2)
    ours, theirs = pm.ChatStore(tmp_path / "chat"), pm.ChatStore(tmp_path / "chat")
    ours.commit(info={"chat_id": "shared"})
    for some in (told[:3], told[3:], [replace(told[0], text="Other words.")]):
        ours.commit(summaries=some)
    theirs.catch_up()
    assert theirs.summaries == ours.summaries and theirs.summaries[told[0].id].text == "Other words."
    ours.close()
    theirs.close()


def rows_of(store: pm.ChatStore, prefix: str) -> dict:
    """The rows of a store under a prefix."""
    with store._database.use() as cache:
        rows = cache._sql("SELECT key, value FROM Cache WHERE key GLOB ?", (prefix + "*",)).fetchall()
    return {key: value for key, value in rows if key != pm.NEWER_ROW}


def test_a_story_is_made_anew_only_where_something_in_it_has_changed(tmp_path):
    """A message more changes nothing in it; other words, a mark, a note, or another branch do."""
    with contextlib.closing(pm.Chat(tmp_path / "chat")) as chat:
        messages = branch(*(f"Line {n}." for n in range(12)))
        told = [pm.new_summary(1, [m.digest for m in messages[i : i + 4]], i, SOUND, 40, "model") for i in (0, 4)]
        chat.store.commit(messages, {"chat_id": "x"}, summaries=told)

        def story(tip: str) -> pm.Story:
            with chat.lock:
                return pm.branch_story(chat, chat.path(tip), 8, 500)

        first = story(messages[-1].id)
        assert first.summaries == tuple(told)
        more = message("And one more.", messages[-1].id)
        chat.store.commit([more])
        assert story(more.id) is first
        chat.store.commit(summaries=[replace(told[0], text="Other words.")])
        assert "Other words." in story(more.id).text
        chat.store.commit(marked=[replace(messages[2], pinned=True)])
        assert "Line 2." in story(more.id).text
        chat.store.commit(facts=[pm.Fact("n", "", "A note.", "", "", -1, -1, pinned=True)])
        assert "A note." in story(more.id).text
        chat.store.commit(marked=[replace(messages[5], content="Reworded.", shown=messages[5].content)])
        assert [s.start for s in story(more.id).summaries] == [0], "what has been reworded is told anew later"
        other = message("Elsewhere.", messages[2].id, "assistant")
        chat.store.commit([other])
        assert story(other.id).summaries == () and "Line 2." in story(other.id).text
        assert story(more.id).summaries and story(messages[1].id).text.count("Line 2.") == 0


def test_what_covers_a_text_is_found_whatever_it_is_put_together_of():
    """By any of its texts, or where all of them are there; a user's own summaries are not stale."""
    told = ladder(20)
    own = replace(told[5], source="user")
    touched = pm.summaries_of([*told[:5], own, *told[6:]], {"m21"})
    assert {s.id for s in touched} == {s.id for s in told if "m21" in tuple(s.texts)} - {own.id}
    held = pm.covering_texts(told, set(texts(40)).issuperset, all)
    assert {s.id for s in held} == {s.id for s in told if set(s.texts) <= set(texts(40))}


def test_an_export_names_what_summaries_are_made_of(tmp_path):
    """And is read again; of older ones, too, where each had all its texts. What covers more than the chat has is left
    out: a file could make that endless."""
    messages = branch(*(f"Line {n}." for n in range(12)))
    low = [pm.new_summary(1, [m.digest for m in messages[i : i + 4]], i, SOUND, 40, "model") for i in (0, 4, 8)]
    high = condensed(low[:2])
    top = condensed([high, low[2]], 3)
    copy = pm.ChatCopy(tuple(messages), messages[-1].id, {"chat_id": "x"}, (top, high, *low), ())
    data = json.loads(json.dumps(pm.write_export(copy)))
    assert data["summaries"][-1]["texts"] == [{"summary": high.id}, {"summary": low[2].id}]
    assert set(pm.read_export(data).summaries) == {top, high, *low}
    old = [{**row, "texts": list(s.texts)} for row, s in zip(data["summaries"], (*low, high, top), strict=True)]
    assert set(pm.read_export({**data, "version": 1, "summaries": old}).summaries) == {top, high, *low}
    endless, name = [], low[0].id
    for level in range(2, 80):
        endless.append({**data["summaries"][3], "id": f"s{level}", "level": level, "texts": 2 * [{"summary": name}]})
        name = f"s{level}"
    read = pm.read_export({**data, "summaries": [*data["summaries"], *endless]}).summaries
    assert {s.id for s in read} == {s.id for s in (top, high, *low)} | {"s2"}
    for odd in ([{"summary": "nowhere"}], [5], [{}], [], [{"summary": []}], [None, "m"], [{"summary": high.id}]):
        with pytest.raises(pm.InvalidRequest, match="texts"):
            pm.read_export({**data, "summaries": [{**data["summaries"][0], "texts": odd}, *data["summaries"][1:]]})


# ---------------------------------------------------------------------------- an upstream that writes summaries

TASK = pm.ENGLISH.retell.split(".")[0]
STRICT = pm.ENGLISH.as_text[:40]
CHATS_OF = "persona_memory/chats"
WORDS = """
harbour lantern mule copper captain storm bread market river bell tower letter sword horse winter meadow candle
"""


def line(number: int, words: int = 20) -> str:
    """What is said in a turn: the same words at every run, others for every number."""
    return f"Line {number}: " + " ".join(random.Random(number).choices(WORDS.split(), k=words)) + "."


def asks_for_summary(body: dict) -> bool:
    """Whether a request is one of the program's own."""
    return bool(body) and str(body["messages"][0]["content"]).startswith(TASK)


def source_of(body: dict) -> str:
    """What a request for a summary holds to be summarised."""
    return body["messages"][1]["content"]


def is_strict(body: dict) -> bool:
    """Whether it is the second try, which asks for plain text."""
    return STRICT in body["messages"][0]["content"]


def sound_summary(body: dict) -> str:
    """A summary as a good model writes it: the first words of every line."""
    told = [
        re.sub(r"^\(#\d+-\d+\) |^(#\d+ )?\w+( \(\w+\))?: (Line \d+:)?", "", row) for row in source_of(body).splitlines()
    ]
    return ", then ".join(" ".join(row.rstrip(".").split()[:5]) for row in told) + "."


def sound_facts(body: dict) -> list[dict]:
    """One fact, out of the first line; none out of summaries."""
    first = re.match(r"#(\d+) [^:]*: (Line \d+: \w+ \w+)", source_of(body))
    return [{"about": "the line", "fact": f"{first[2]}.", "message": int(first[1]), "quote": first[2]}] if first else []


def good(body: dict) -> str:
    """The answer of a model that does as it is told."""
    told = sound_summary(body)
    return told if is_strict(body) else json.dumps({"summary": told, "facts": sound_facts(body)})


def answer(body: dict) -> str:
    """What the model says to any request."""
    return good(body) if asks_for_summary(body) else f"Mira nods and answers: {body['messages'][-1]['content'][-200:]}"


class ChroniclerHandler(Handler):
    """Requests for summaries behave as the chronicler's pages say; `finish` is the finish_reason of one that is cut."""

    def chat(self, body: dict):
        upstream = self.server.upstream
        if not asks_for_summary(body):
            return super().chat(body)
        page = dict(upstream.page(body) if callable(upstream.page) else upstream.page)
        finish, choices = page.pop("finish", None), page.pop("choices", None)
        self.steering |= page
        with upstream.at_work():
            if finish is None and choices is None:
                return super().chat(body)
            whole = completion(body, page["reply"](body) if "reply" in page else "")
            whole["choices"][0]["finish_reason"] = finish
            return self.send_json(200, whole if choices is None else whole | {"choices": choices})


class Chronicler(Upstream):
    """An upstream whose answers to requests for summaries are steered apart from the others, by `page`."""

    def __init__(self, **steering):
        super().__init__(reply=answer, **steering)
        self.httpd.RequestHandlerClass = ChroniclerHandler
        self.page: dict | None = {}
        self.counting = threading.Lock()
        self.working = 0  # requests for summaries that are being answered

    @contextlib.contextmanager
    def at_work(self):
        """Counts a request for a summary for as long as it is answered."""
        with self.counting:
            self.working += 1
        try:
            yield
        finally:
            with self.counting:
                self.working -= 1

    @property
    def summaries(self) -> list[dict]:
        """The bodies of the recorded requests for summaries, oldest first."""
        return [chat["body"] for chat in self.chats if asks_for_summary(chat["body"])]

    @property
    def prompts(self) -> list[dict]:
        """The bodies of the recorded turns, oldest first."""
        return [chat["body"] for chat in self.chats if not asks_for_summary(chat["body"])]


@pytest.fixture
def chronicler():
    """An upstream that writes good summaries."""
    with Chronicler() as fake:
        yield fake


SMALL = {"context": 2048, "summary_every": 4, "no_guidance": True, "budget": "10/50/20/20"}
TIGHT = SMALL | {"budget": "20/25/35/20"}  # little room for the story: it is condensed soon


@pytest.fixture
def small(chronicler, data_dir):
    """A proxy with so small a context that messages leave it soon."""
    with LocalServer(settings(data_dir, chronicler.url, **SMALL)) as running:
        yield running


def settle(running) -> None:
    """Wait until the storyteller has done all that it was told to."""
    running.server.memory.summarizer._thread.submit(int).result(PATIENCE)


class Game:
    """A chat as a client plays it: the whole transcript in every request."""

    def __init__(self, running, chat_id: str, persona=(PERSONA,), words: int = 40):
        self.running, self.chat_id, self.words = running, chat_id, words
        self.messages = list(persona)
        self.first = len(self.messages)

    def turn(self, number: int, settled: bool = True, **more):
        """One turn, and the work in the background that follows from it."""
        self.messages.append({"role": "user", "content": line(number, self.words)})
        reply = say(self.running.url, self.messages, stream=False, chat_id=self.chat_id, **more)
        self.messages.append({"role": "assistant", "content": reply.text})
        if settled:
            settle(self.running)
        return reply

    def fill(self, count: int):
        """A history of so many turns that the client brings along."""
        for number in range(count):
            said = line(number, self.words)
            reply = {"role": "assistant", "content": f"Mira nods and answers: {said[-200:]}"}
            self.messages += [{"role": "user", "content": said}, reply]
        return self

    def play(self, count: int, **more):
        """So many turns more; the last one's reply."""
        start = (len(self.messages) - self.first) // 2
        return [self.turn(number, **more) for number in range(start, start + count)][-1]

    def until_told(self, count: int = 1, most: int = 60):
        """Turns until the prompt shows so many summaries; a chat that begins brings a history along."""
        if len(self.messages) < self.first + 4:
            self.fill(14)
        for _ in range(most):
            reply = self.play(1)
            if shown(reply) >= count:
                return reply
        raise AssertionError(f"{most} turns and no {count} summaries")

    def about(self) -> dict:
        """The chat as the API shows it."""
        return chat_of(self.running.url, self.chat_id)

    @property
    def contents(self) -> list[str]:
        """The texts of the transcript."""
        return [m["content"] for m in self.messages[self.first :]]


def shown(reply) -> int:
    """How many summaries stood in a turn's prompt, by the response header."""
    found = re.search(r"summary=(\d+)", reply.memory)
    return int(found[1])


def chat_of(url: str, chat_id: str) -> dict:
    """A chat as the API shows it."""
    return get(url, f"{API}/chats/{chat_id}")


def call(url: str, method: str, path: str, body=None) -> httpx.Response:
    """A call of the API."""
    return httpx.request(method, f"{url}/api/{path}", json=body, timeout=PATIENCE)


def lead(body: dict) -> str:
    """The first message of a prompt."""
    return body["messages"][0]["content"]


def story_in(body: dict) -> str:
    """The story so far in a prompt; empty where there is none."""
    found = re.search(re.escape(pm.ENGLISH.story) + ".*" + re.escape(pm.ENGLISH.end_of_story), lead(body), re.DOTALL)
    return found[0] if found else ""


def shown_ranges(body: dict) -> list[tuple[int, int]]:
    """The stretches that the story in a prompt tells, numbered from 1."""
    return [(int(a), int(b)) for a, b in re.findall(r"^\(#(\d+)-(\d+)\)", story_in(body), re.MULTILINE)]


def assert_sound(about: dict, contents: list[str]):
    """Every summary of a story is sound, by the messages that it covers; the story has no hole."""
    reach = 0
    for one in about["story"]:
        assert one["start"] == reach, "a hole, or told twice"
        reach = one["end"] + 1
        assert one["text"].strip()
        assert pm.flaw_of(one["text"], "\n".join(contents[one["start"] : reach])) == "", one["text"]


# ---------------------------------------------------------------------------- a story comes into the prompt


def test_what_has_left_the_prompt_is_told_in_it(small, chronicler):
    """In the background, behind the persona's unchanged text; the header, the API and the report say so."""
    game = Game(small, "told")
    assert shown(game.play(1)) == 0
    reply = game.until_told()
    body, about = chronicler.prompts[-1], game.about()
    assert lead(body).startswith(PERSONA["content"] + "\n\n" + pm.ENGLISH.story)
    assert about["story"][0]["text"] in story_in(body)
    assert about["summary"].startswith(f"(#1-4) {about['story'][0]['text']}")
    assert (about["story"][0]["start"], about["story"][0]["end"], about["story"][0]["source"]) == (0, 3, "model")
    report = about["last_prompt"]
    assert report["summaries"] == shown(reply) and report["tokens"]["story"] > 0
    assert all(story["end"] < report["hidden"] for story in about["story"][: report["summaries"]])
    assert_sound(about, game.contents)


def test_a_fact_stands_in_the_story_with_its_message(small, chronicler):
    """It quotes what was said, and comes with its summary."""
    game = Game(small, "facts")
    reply = game.until_told(2)
    (held,) = game.about()["facts"]  # each stretch's is about the same: the newest holds
    assert held["quote"] in game.contents[held["index"]]
    assert held["supersedes"]["index"] < held["index"]
    assert pm.ENGLISH.facts in story_in(chronicler.prompts[-1])
    assert shown(reply) >= 2


def test_without_summaries_nothing_is_asked_for(chronicler, data_dir):
    """The setting 0 turns them off."""
    with LocalServer(settings(data_dir, chronicler.url, **SMALL | {"summary_every": 0})) as running:
        game = Game(running, "off")
        assert shown(game.play(25)) == 0
        assert chronicler.summaries == [] and game.about()["story"] == []
        assert lead(chronicler.prompts[-1]) == PERSONA["content"]


def test_a_long_chats_prompt_begins_the_same_for_many_turns(chronicler, data_dir):
    """The story stays in its share at every turn, and the prompt's beginning changes once in many messages."""
    with LocalServer(settings(data_dir, chronicler.url, context=4096, summary_every=20, no_guidance=True)) as running:
        game, reports = Game(running, "long", words=45), []
        for _ in range(3):
            game.play(40)
            reports += reversed(call(running.url, "GET", f"{CHATS_OF}/long/prompts?limit=40").json()["prompts"])
        assert all(r["tokens"]["story"] <= pm.story_tokens(4096, SHARES) for r in reports)
        assert all(r["tokens"]["story"] <= r["budget"]["memories"] for r in reports)
        heads, hidden = [lead(body) for body in chronicler.prompts], [r["hidden"] for r in reports]
        changes = [i for i in range(1, len(heads)) if heads[i] != heads[i - 1]]
        assert len(changes) >= 5
        assert all(hidden[i] != hidden[i - 1] for i in changes), "the story moved, the anchor did not"
        assert all(2 * (b - a) >= 15 for a, b in pairwise(changes)), changes
        assert 2 * (changes[-1] - changes[0]) >= 20 * (len(changes) - 1), "oftener than once in 20 messages"
        assert_sound(game.about(), game.contents)


def test_levels_keep_a_growing_story_in_its_share(chronicler, data_dir):
    """The oldest summaries are condensed into one of a higher level, oldest first in the prompt."""
    with LocalServer(settings(data_dir, chronicler.url, **TIGHT)) as running:
        game = Game(running, "levels").fill(20)
        game.play(25)
        about = game.about()
    levels = [one["level"] for one in about["story"]]
    assert max(levels) >= 2
    assert sum(one["tokens"] for one in about["story"]) <= pm.story_tokens(2048, SHARES)
    assert levels == sorted(levels, reverse=True)
    assert_sound(about, game.contents)
    ranges = shown_ranges(chronicler.prompts[-1])
    assert ranges[0][0] == 1 and all(end + 1 == start for (_, end), (start, _) in pairwise(ranges))


def test_five_hundred_messages_tell_one_story(chronicler, data_dir):
    """An imported chat's story is told at once, the most of it by its own sentences, and stays inside its share."""
    contents = [line(number, 12) for number in range(520)]
    given = {"context": 2048, "summary_every": 20, "summary_calls": 30, "no_guidance": True}
    rows = [{"role": pm.CHAT_ROLES[i % 2], "content": content} for i, content in enumerate(contents)]
    with LocalServer(settings(data_dir, chronicler.url, **given)) as running:
        for start in range(0, len(rows), 260):
            call(running.url, "POST", f"{CHATS_OF}/import/messages", {"messages": rows[start : start + 260]})
        for number in (2000, 2001, 2002):
            said = [PERSONA, {"role": "user", "content": line(number)}]
            reply = say(running.url, said, stream=False, chat_id="import")
            settle(running)
            about = chat_of(running.url, "import")
        assert_sound(about, contents)
        assert about["story"][-1]["end"] >= 440 and max(one["level"] for one in about["story"]) >= 3
        assert about["last_prompt"]["tokens"]["story"] <= pm.story_tokens(2048, SHARES)
        ranges = shown_ranges(chronicler.prompts[-1])
        assert len(ranges) == shown(reply) and ranges[0][0] == 1
        assert all(end + 1 == start for (_, end), (start, _) in pairwise(ranges))
        assert len(chronicler.summaries) <= 30, "an import asks for no more than an hour's requests"


def test_a_client_that_sends_only_its_newest_message_has_a_story_too(small, chronicler):
    """Also where it sends no persona: the summaries that it pays for are told to the model."""
    for number in range(10):
        say(small.url, [PERSONA, {"role": "user", "content": line(number, 150)}], stream=False, chat_id="delta")
        settle(small)
    assert story_in(chronicler.prompts[-1])
    chronicler.requests.clear()
    for number in range(10):
        say(small.url, [{"role": "user", "content": line(number, 150)}], stream=False, chat_id="bare")
        settle(small)
    assert chronicler.summaries and pm.ENGLISH.story in json.dumps(chronicler.prompts[-1])


@pytest.mark.parametrize("shape", ["several", "folded", "parts"])
def test_every_shape_of_persona_carries_the_story(small, chronicler, shape):
    """The client's own messages stay as they are; no role is added that it does not use."""
    texts = {"type": "text", "text": "You are Mira, a lighthouse keeper."}
    given = {
        "several": [PERSONA, {"role": "system", "content": "The year is 1899."}],
        "folded": [{"role": "user", "content": "You are Mira, a lighthouse keeper."}],
        "parts": [{"role": "system", "content": [texts]}],
    }[shape]
    game = Game(small, f"shape-{shape}", persona=given)
    if shape == "folded":
        game.messages.append({"role": "assistant", "content": "Good evening."})
    game.until_told()
    got = chronicler.prompts[-1]["messages"]
    if shape == "several":
        assert got[:2] == given and got[2]["role"] == "system" and got[2]["content"].startswith(pm.ENGLISH.story)
    elif shape == "folded":
        assert got[0]["content"].startswith(f"{given[0]['content']}\n\n{pm.ENGLISH.story}")
        assert {m["role"] for m in got} == {"user", "assistant"}
        assert given[0]["content"] not in json.dumps([source_of(body) for body in chronicler.summaries])
    else:
        assert got[0]["content"][0] == texts and got[0]["content"][1]["text"].startswith(pm.ENGLISH.story)


# ---------------------------------------------------------------------------- branches in the running program


def edited(game: Game, place: int, text: str) -> Game:
    """The same chat, with a message of its transcript changed."""
    other = Game(game.running, game.chat_id)
    other.messages = [dict(m) for m in game.messages]
    other.messages[game.first + place]["content"] = text
    return other


def look(game: Game, chronicler: Chronicler) -> str:
    """The story in the prompt of the same transcript with one more message at its end."""
    asked = [*game.messages, {"role": "user", "content": "And now?"}]
    say(game.running.url, asked, stream=False, chat_id=game.chat_id)
    settle(game.running)
    return story_in(chronicler.prompts[-1])


def test_an_edit_inside_a_range_retires_its_summary(small, chronicler):
    """Those before it stay; going back to the old words revives it, with its facts."""
    game = Game(small, "edit")
    game.until_told(3)
    before = game.about()
    other = edited(game, 5, "Line 5000: no such thing was ever said in this place.")
    assert look(game, chronicler).count("(#")
    after = look(other, chronicler)
    assert "(#1-4)" in after and before["story"][1]["text"] not in after
    assert before["story"][0]["text"] in after
    told = other.about()
    assert_sound(told, other.contents)
    again = look(game, chronicler)
    assert before["story"][1]["text"] in again
    assert_sound(game.about(), game.contents)


def changed_above(game: Game, change: str) -> Game:
    """The same chat with a message above its second one: another one, none, or one more."""
    other = edited(game, 1, "Line 5000: no such thing was ever said in this place.")
    if change == "deletion":
        del other.messages[game.first + 1]
    elif change == "insertion":
        other.messages.insert(game.first + 1, dict(game.messages[game.first + 1]))
    return other


@pytest.mark.parametrize("change", ["edit", "deletion", "insertion"])
def test_a_change_above_the_story_costs_one_stretch(small, chronicler, change):
    """What the other summaries cover still stands there: they stay as they are, at their new places."""
    game = Game(small, "above")
    game.until_told(5)
    before = game.about()
    asked, other = len(chronicler.summaries), changed_above(game, change)
    look(other, chronicler)
    after = other.about()
    shift = {"edit": 0, "deletion": -1, "insertion": 1}[change]
    assert len(chronicler.summaries) - asked <= 2
    assert [s["text"] for s in after["story"][1:]][: len(before["story"]) - 1] == [
        s["text"] for s in before["story"][1:]
    ]
    assert [s["start"] for s in after["story"]][:2] == [0, 4 + shift]
    assert after["story"][0]["id"] != before["story"][0]["id"]
    facts = {(f["text"], f["index"] + shift) for f in before["facts"] if f["index"] > 3}
    assert facts <= {(f["text"], f["index"]) for f in after["facts"]}
    assert_sound(after, other.contents)
    kept = look(game, chronicler), game.about()
    assert kept[1]["story"][0]["id"] == before["story"][0]["id"], "and going back brings the old one back"


def test_a_users_words_are_kept_when_what_they_cover_changes(small, chronicler):
    """They are told as long as the client shows what they are about; then the API shows them beside the new ones."""
    game, own = Game(small, "kept"), "The lantern was never theirs."
    game.until_told(2)
    assert call(small.url, "PATCH", story_path(game), {"text": own}).status_code == 200
    lower = edited(game, 5, "Line 5000: no such thing was ever said in this place.")
    assert own in look(lower, chronicler), "nothing that it covers has changed"
    other = edited(game, 2, "Line 5000: no such thing was ever said in this place.")
    told = look(other, chronicler)
    about = other.about()
    assert own not in told and own not in about["summary"]
    assert [(s["text"], s["source"], s["start"]) for s in about["replaced"]] == [(own, "user", 0)]
    assert own in look(game, chronicler) and game.about()["replaced"] == []


def test_a_swipe_of_the_newest_reply_keeps_the_story(small, chronicler):
    """It is below all that the story covers."""
    game = Game(small, "swipe")
    game.until_told(2)
    before = game.about()["story"]
    told = look(game, chronicler)
    other = edited(game, len(game.contents) - 1, game.contents[-1].replace("nods", "smiles"))
    assert look(other, chronicler) == told
    assert other.about()["story"][: len(before)] == before


def test_another_chat_does_not_see_the_story(small, chronicler):
    """Nor its facts, even with the same persona."""
    Game(small, "mine").until_told(2)
    other = Game(small, "theirs")
    other.messages.append({"role": "user", "content": "A wholly different beginning."})
    say(small.url, other.messages, stream=False, chat_id="theirs")
    assert other.about()["story"] == other.about()["facts"] == []


def test_stories_follow_branches_through_any_course_of_a_chat(small, chronicler):
    """After turns, edits, swipes and going back: what a prompt tells are stretches of its own branch, all hidden."""
    rng, games = random.Random(7), [Game(small, "course")]
    games[0].until_told(2)
    for step in range(14):
        game = rng.choice(games)
        if step % 2:
            games.append(edited(game, rng.randrange(len(game.contents)), line(9000 + step)))
            game = games[-1]
        game.turn(7000 + step)
        about, store = game.about(), open_chat(small, "course").store
        path, hidden = store.tree.path(about["last_prompt"]["tip"]), about["last_prompt"]["hidden"]
        on_it = pm.Places([store.tree.nodes[i].digest for i in path]).placed(store.summaries.values())
        standing = {pm.summary_line(s) for s in on_it if s.end < hidden}
        told = story_in(chronicler.prompts[-1]).split(pm.ENGLISH.facts)[0].splitlines()[1:]
        assert {one for one in told if one != pm.ENGLISH.end_of_story} <= standing
        assert_sound(about, game.contents)


# ---------------------------------------------------------------------------- never in the way


def test_a_turn_never_waits_for_a_summary(small, chronicler):
    """The request for one is held at the upstream; turns are answered, and it is asked again after them."""
    game, release = Game(small, "held").fill(16), threading.Event()
    chronicler.page = {"hold": release}
    game.turn(12, settled=False)
    wait_until(lambda: chronicler.working, "the request at the upstream")
    assert game.turn(900, settled=False).text
    assert chronicler.hangups.acquire(timeout=PATIENCE), "a server for one at a time is freed for the turn"
    wait_until(lambda: len(chronicler.summaries) > 1, "the summary asked for again")
    release.set()
    settle(small)
    about = game.about()
    assert about["story"][0]["source"] == "model" and about["story"][0]["tries"] == 1
    assert_sound(about, game.contents)


def test_one_summary_is_asked_for_at_a_time(small, chronicler, monkeypatch):
    """However many chats are due."""
    asking, at_once, complete = [], set(), pm.OpenAIUpstream.complete

    def noted(self, body, call):
        if not call.background:
            return complete(self, body, call)
        asking.append(call)
        at_once.add(len(asking))
        try:
            return complete(self, body, call)
        finally:
            asking.remove(call)

    monkeypatch.setattr(pm.OpenAIUpstream, "complete", noted)
    games = [Game(small, f"many-{i}") for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda game: game.fill(16).play(4, settled=False), games))
    settle(small)
    assert at_once == {1}
    for game in games:
        assert_sound(game.about(), game.contents)
        assert game.about()["story"]


def test_the_hours_requests_are_limited(chronicler, data_dir):
    """Beyond them the story is told by extraction: no request more, and no hole."""
    with LocalServer(settings(data_dir, chronicler.url, summary_calls=1, **SMALL)) as running:
        game = Game(running, "metered")
        game.until_told(3)
        sources = [one["source"] for one in game.about()["story"]]
        assert sources[0] == "model" and set(sources[1:]) == {"extract"}
        assert len(chronicler.summaries) == 1
        assert_sound(game.about(), game.contents)
        told = game.about()["story"][-1]["end"]
        game.play(8)  # an extract that waits for the next hour's requests keeps nothing else waiting
        assert game.about()["story"][-1]["end"] >= told + 12
        assert len(chronicler.summaries) == 1


def test_bad_answers_count_as_requests_of_the_hour(chronicler, data_dir):
    """The stricter second try is a request too, and must not go beyond the limit."""
    chronicler.page = {"reply": lambda body: "I'm sorry, I can't do that."}
    with LocalServer(settings(data_dir, chronicler.url, summary_calls=1, **SMALL)) as running:
        Game(running, "metered").until_told(2)
    assert len(chronicler.summaries) == 1


def test_condensing_keeps_to_the_hours_limit(chronicler, data_dir):
    """However many requests one round of the story would take."""
    with LocalServer(settings(data_dir, chronicler.url, summary_calls=7, **TIGHT)) as running:
        Game(running, "metered").fill(14).play(25)
    assert len(chronicler.summaries) <= 7


def test_another_model_can_write_the_summaries(chronicler, data_dir):
    """Else the chat's own does."""
    with LocalServer(settings(data_dir, chronicler.url, summary_model="small-model", **SMALL)) as running:
        Game(running, "model").until_told()
    assert {body["model"] for body in chronicler.summaries} == {"small-model"}
    assert {body["model"] for body in chronicler.prompts} == {"fake-model"}
    chronicler.requests.clear()
    with LocalServer(settings(data_dir, chronicler.url, **SMALL)) as running:
        Game(running, "own").until_told()
    assert {body["model"] for body in chronicler.summaries} == {"fake-model"}


def test_the_clients_key_is_passed_on_and_never_stored(small, chronicler, data_dir):
    """Requests in the background carry the turn's authorization; no file holds it."""
    key = {"Authorization": "Bearer sk-a-secret-of-the-client"}
    Game(small, "key").fill(16).play(2, headers=key)
    asked = [chat for chat in chronicler.chats if asks_for_summary(chat["body"])]
    assert asked and all(chat["headers"]["Authorization"] == key["Authorization"] for chat in asked)
    files = [path for path in data_dir.rglob("*") if path.is_file()]
    assert files and not any(b"a-secret-of-the-client" in path.read_bytes() for path in files)


def test_a_missing_key_is_waited_for(chronicler, data_dir):
    """After a restart nobody has given one yet: the story stays due until a turn brings it."""
    refused = {"status": 401, "error": "no key"}
    chronicler.page = refused
    with LocalServer(settings(data_dir, chronicler.url, **SMALL)) as running:
        game = Game(running, "locked")
        game.fill(16).play(1)
        assert game.about()["story"] == [] and chronicler.summaries
    with LocalServer(settings(data_dir, chronicler.url, **SMALL)) as running:
        settle(running)
        assert chat_of(running.url, "locked")["story"] == []
        chronicler.page = {}
        game.running = running
        game.play(1)
        assert {one["source"] for one in game.about()["story"]} == {"model"}
        assert_sound(game.about(), game.contents)


def test_without_an_upstream_the_story_goes_on(small, chronicler):
    """Turns are answered while every request for a summary fails; extracts tell the story."""
    chronicler.page = {"status": 500, "error": "overloaded"}
    game = Game(small, "alone")
    game.until_told(2)
    assert {one["source"] for one in game.about()["story"]} == {"extract"}
    assert_sound(game.about(), game.contents)


# ---------------------------------------------------------------------------- bad answers


def says(text: str) -> dict:
    """A page: the model answers this."""
    return {"reply": lambda body: text}


FOREIGN = "Der Leuchtturmwärter ging abends zum Hafen hinunter, weil niemand die Glocken läuten wollte."
SCENE = '*Mira takes the lantern* "Come up the tower, captain!" she cries. "The storm is near, and the bell!" *runs*'
BAD = {
    "empty": says(""),
    "cut": {"reply": lambda body: '{"summary": "', "finish": "length"},
    "cut in thoughts": {"reply": lambda body: "<think>The user wants", "finish": "length"},
    "thoughts only": says("<think>The user wants a summary of the lantern and the storm.</think>"),
    "refusal": says("I'm sorry, but I can't summarise the harbour, the lantern, the mule and the captain."),
    "continued": says(SCENE),
    "continued in json": says(json.dumps({"summary": SCENE, "facts": []})),
    "speaker lines": says("User: Bring the lantern to the tower.\nMira: The storm and the captain are near the river."),
    "foreign": says(FOREIGN),
    "foreign in json": says(json.dumps({"summary": FOREIGN, "facts": []})),
    "other json": says('{"error": {"message": "too long"}}'),
    "json that is cut early": says('{"sum'),
    "no text": {"choices": [{"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": "stop"}]},
    "no message": {"choices": [{"index": 0, "finish_reason": "stop"}]},
}
FAILURES = {
    "http 500": {"status": 500, "error": "overloaded"},
    "http 400": {"status": 400, "error": "max_tokens is too large"},
    "no choices": {"choices": []},
    "html": {"status": 502, "error": b"<html>Bad Gateway</html>"},
}


@pytest.fixture(scope="module")
def bad_house(tmp_path_factory):
    """One proxy and its upstream for all bad answers."""
    data = tmp_path_factory.mktemp("bad") / "data"
    with Chronicler() as fake, LocalServer(settings(data, fake.url, summary_calls=0, **SMALL)) as running:
        yield running, fake


@pytest.fixture
def bad(bad_house):
    """That house with nothing on record and a good model."""
    running, fake = bad_house
    settle(running)
    fake.requests.clear()
    fake.page = {}
    yield running, fake
    fake.page = {}


def stretches(fake) -> dict[str, list[bool]]:
    """Requests by the lines that they ask to be told: whether each was the strict one."""
    found: dict[str, list[bool]] = {}
    for body in fake.summaries:
        words = re.sub(r"^\(?#[\d-]+\)? ", "", source_of(body))[:25]  # the strict one has no numbers
        found.setdefault(words, []).append(is_strict(body))
    return found


def assert_clean(fake, contents: list[str], told: list[str]):
    """No request holds anything but messages of the chat (long ones shortened), or summaries that were made."""
    known = {" ".join(text.split()) for text in contents}
    for body in fake.summaries:
        assert len(body["messages"]) == 2
        for row in source_of(body).splitlines():
            words = re.sub(r"^\(#\d+-\d+\) |^(#\d+ )?(User|Character)( \(\w+\))?: ", "", row)
            assert any(text.startswith(words) for text in (*known, *told)), row


def all_told(running, chat_id: str) -> list[str]:
    """The texts of all summaries that a chat ever had."""
    return [one.text for one in open_chat(running, chat_id).store.summaries.values()]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_asked_for_again_once(bad, name):
    """By the stricter prompt, whose good answer is then used: two requests for the stretch."""
    running, fake = bad
    fake.page = lambda body: {} if is_strict(body) else BAD[name]
    game = Game(running, f"once-{name.replace(' ', '-')}")
    game.until_told()
    assert all(asked == [False, True] for asked in stretches(fake).values())
    about = game.about()
    assert {one["source"] for one in about["story"]} == {"model"}
    assert_sound(about, game.contents)
    assert_clean(fake, game.contents, all_told(running, game.chat_id))


@pytest.mark.parametrize("name", [*BAD, *FAILURES])
def test_bad_answers_never_harm_the_story(bad, name):
    """Extracts stand in for them, and the newest is told anew by the model once it answers well."""
    running, fake = bad
    page = (BAD | FAILURES)[name]
    fake.page = page
    game = Game(running, f"never-{name.replace(' ', '-')}")
    game.until_told()
    if name in BAD:
        assert all(asked[:2] == [False, True] for asked in stretches(fake).values())
    about = game.about()
    extracts = {(one["start"], one["end"]) for one in about["story"]}
    assert {one["source"] for one in about["story"]} == {"extract"}
    assert_sound(about, game.contents)
    fake.page = {}
    game.play(4)
    assert_sound(game.about(), game.contents)
    kept = open_chat(running, game.chat_id).store.summaries.values()
    assert extracts & {(one.start, one.end) for one in kept if one.source == "model"}
    assert_clean(fake, game.contents, all_told(running, game.chat_id))


def test_a_json_answer_in_prose_is_used(bad):
    """Without another request, and with its facts."""
    running, fake = bad
    fake.page = {"reply": lambda body: f"Certainly! {{}} Here you are:\n```json\n{good(body)}\n```\nAnything else?"}
    game = Game(running, "prose")
    game.until_told()
    assert all(asked == [False] for asked in stretches(fake).values())
    assert {one["source"] for one in game.about()["story"]} == {"model"}
    assert game.about()["facts"]


def test_a_summary_that_is_cut_off_keeps_its_whole_sentences(bad):
    """A model that ran into max_tokens has still said something."""
    running, fake = bad
    cut = {"reply": lambda body: '{"summary": "' + sound_summary(body) + " And the", "finish": "length"}
    fake.page = lambda body: {} if is_strict(body) else cut
    game = Game(running, "half")
    game.until_told()
    assert_sound(game.about(), game.contents)
    assert not any(one["text"].endswith("And the") for one in game.about()["story"])


def test_invented_facts_are_not_kept(bad):
    """A fact quotes words of the covered messages, or it is none."""
    running, fake = bad
    lie = {"about": "Mira", "fact": "Mira is a queen.", "message": 1, "quote": "I am the queen of the sea"}
    fake.page = {"reply": lambda body: json.dumps({"summary": sound_summary(body), "facts": [lie, *sound_facts(body)]})}
    game = Game(running, "lies")
    game.until_told()
    assert game.about()["facts"] and all("queen" not in f["text"] for f in game.about()["facts"])
    assert "queen" not in story_in(fake.prompts[-1])


def test_a_chat_of_short_words_has_a_story(bad):
    """Extracts say something even where nobody says a sentence."""
    running, fake = bad
    fake.page, fake.reply = FAILURES["http 500"], lambda body: "Go on!"
    messages = [PERSONA]
    try:
        for number in range(60):
            said = ["Yes.", "No.", "Really?", "A walk.", "Oh dear."][number % 5]
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": "Go on!"}]
        messages.append({"role": "user", "content": "Well then. " + line(1, 700)})
        say(running.url, messages, stream=False, chat_id="short")
        settle(running)
    finally:
        fake.reply = answer
    story = chat_of(running.url, "short")["story"]
    assert story and all(one["text"].strip() for one in story)


# ---------------------------------------------------------------------------- restarts


def told_up_to(game: Game) -> int:
    """The place before which a chat's story is told."""
    return max((one["end"] + 1 for one in game.about()["story"]), default=0)


def test_a_summary_that_a_crash_interrupted_is_made_after_it(chronicler, data_dir):
    """Once, and without any turn; nothing that was answered is lost."""
    release = threading.Event()
    chronicler.page = {"hold": release}
    small = ("--context", "2048", "--summary-every", "4", "--budget", SMALL["budget"])
    with Server(data_dir, chronicler.url, *small, embedder=False) as running:
        game = Game(running, "crash").fill(16)
        game.turn(12, settled=False)
        wait_until(lambda: chronicler.working, "the request for a summary at the upstream")
        running.kill()
        assert chronicler.hangups.acquire(timeout=PATIENCE)
        asked = len(chronicler.summaries)
        chronicler.page = {}
        running.start()
        wait_until(lambda: told_up_to(game) > chat_of(running.url, "crash")["last_prompt"]["hidden"] - 4, "the story")
        assert_sound(game.about(), game.contents)
        game.turn(13, settled=False)
        sources = [source_of(body) for body in chronicler.summaries[asked:]]
        assert len(sources) == len(set(sources)), "made twice"
        assert {one["source"] for one in game.about()["story"]} == {"model"}
        stored = call(running.url, "GET", f"{CHATS_OF}/crash/messages").json()["messages"]
        assert [m["content"] for m in stored][: len(game.contents) - 1] == game.contents[:-1]
    release.set()


def test_a_story_that_is_due_from_the_first_second_survives_too(chronicler, data_dir):
    """A turn may come before the program has looked for what was due, and the program may end then."""
    release = threading.Event()
    chronicler.page = {"hold": release}
    given = settings(data_dir, chronicler.url, **SMALL)
    early = pm.PersonaMemory(given)  # not started yet
    body = {"messages": [*Game(None, "early").fill(16).messages, {"role": "user", "content": line(16)}]}
    early.record(early.builder.prepare(body, "early", pm.Call()), ["Mira nods."])
    wait_until(lambda: chronicler.working, "the request for a summary at the upstream")
    early.close()
    assert chronicler.hangups.acquire(timeout=PATIENCE)
    chronicler.page = {}
    with LocalServer(given) as running:
        wait_until(lambda: chat_of(running.url, "early")["story"], "the story that was due")
    release.set()


def test_what_was_due_is_forgotten_once_it_is_done(chronicler, data_dir):
    """Another restart asks for nothing."""
    with LocalServer(settings(data_dir, chronicler.url, **SMALL)) as running:
        game = Game(running, "done")
        game.until_told(2)
    chronicler.requests.clear()
    with LocalServer(settings(data_dir, chronicler.url, **SMALL)) as running:
        settle(running)
        assert chronicler.summaries == []
        game.running = running
        assert shown(game.play(1)) >= 2


# ---------------------------------------------------------------------------- the API


def story_path(game: Game, place: int = 0) -> str:
    """The address of one of a chat's summaries."""
    return f"{CHATS_OF}/{game.chat_id}/story/{game.about()['story'][place]['id']}"


def fact_path(game: Game) -> str:
    """The address of the fact that the API shows first."""
    return f"{CHATS_OF}/{game.chat_id}/facts/{game.about()['facts'][0]['id']}"


def first_fact(game: Game) -> pm.Fact:
    """The fact of a chat's first message, which newer ones supersede."""
    facts = open_chat(game.running, game.chat_id).store.facts.values()
    return next(f for f in facts if f.index == 0)


def test_a_users_own_summary_is_what_the_prompt_shows(chronicler, data_dir):
    """From the next turn on, also after a restart, and no model writes over it."""
    own = "Tomas and Mira agreed that the red door stays locked."
    with LocalServer(settings(data_dir, chronicler.url, **SMALL)) as running:
        game = Game(running, "own")
        game.until_told(2)
        got = call(running.url, "PATCH", story_path(game), {"text": own})
        assert (got.status_code, got.json()["text"], got.json()["source"]) == (200, own, "user")
        assert got.json()["tokens"] >= pm.count_tokens(own)
        game.play(1)
        assert f"(#1-4) {own}" in story_in(chronicler.prompts[-1])
    with LocalServer(settings(data_dir, chronicler.url, **SMALL)) as running:
        game.running = running
        game.play(1)
        assert f"(#1-4) {own}" in story_in(chronicler.prompts[-1])
        assert game.about()["story"][0]["source"] == "user"


def test_a_users_words_outlast_a_model_that_is_still_writing(small, chronicler):
    """An extract that is edited while the model tells its stretch anew keeps the user's words."""
    chronicler.page = {"status": 500, "error": "overloaded"}
    game, release = Game(small, "race"), threading.Event()
    game.until_told()
    newest = len(game.about()["story"]) - 1
    wanted = game.about()["story"][newest]
    chronicler.requests.clear()
    again = f"#{wanted['start'] + 1} "
    chronicler.page = lambda body: {"hold": release} if source_of(body).startswith(again) else {}

    def held() -> bool:
        return any(source_of(body).startswith(again) for body in chronicler.summaries)

    for number in range(100, 120):
        game.turn(number, settled=False)
        done = small.server.memory.summarizer._thread.submit(int)
        wait_until(lambda done=done: held() or done.done(), "the stretch's next try")
        if held():
            break
    assert held()
    call(small.url, "PATCH", story_path(game, newest), {"text": "My own words of it."})
    release.set()
    settle(small)
    shown_now = [one["text"] for one in game.about()["story"] if one["start"] == wanted["start"]]
    assert shown_now == ["My own words of it."]


def test_words_that_are_forgotten_while_a_model_retells_them_are_in_no_summary(small, chronicler):
    """What it writes is thrown away; the stretch is told anew without them."""
    game, release = Game(small, "late").fill(16), threading.Event()
    chronicler.page = {"hold": release}
    game.turn(12, settled=False)
    wait_until(lambda: chronicler.working, "the request at the upstream")
    secret = httpx.get(f"{small.url}/api/{CHATS_OF}/late/messages?limit=1", timeout=PATIENCE).json()["messages"][0]
    assert secret["content"] in source_of(chronicler.summaries[0])
    assert call(small.url, "DELETE", f"{CHATS_OF}/late/messages/{secret['id']}").status_code == 200
    chronicler.page = {}
    release.set()
    settle(small)
    game.play(2)
    told = game.about()
    assert told["story"][0]["start"] == 0
    assert secret["content"][:20] not in json.dumps([told["story"], told["facts"]])
    assert all(secret["content"] not in source_of(body) for body in chronicler.summaries[1:])


def test_facts_can_be_edited_and_pinned(small, chronicler):
    """The next prompt shows them so."""
    game = Game(small, "pin")
    game.until_told(2)
    path = f"{CHATS_OF}/pin/facts/{first_fact(game).id}"
    got = call(small.url, "PATCH", path, {"text": "The lantern is made of glass.", "pinned": True})
    assert (got.status_code, got.json()["text"], got.json()["pinned"]) == (200, "The lantern is made of glass.", True)
    game.play(1)
    assert "The lantern is made of glass." in story_in(chronicler.prompts[-1])
    assert game.about()["facts"][0]["pinned"] is True
    assert call(small.url, "PATCH", path, {"pinned": False}).json()["pinned"] is False


def test_a_fact_can_be_forgotten(small, chronicler):
    """It leaves prompt and API; there is nothing to forget a second time."""
    game = Game(small, "forget")
    game.until_told(2)
    path, gone = fact_path(game), game.about()["facts"][0]
    assert call(small.url, "DELETE", path).json()["forgotten"] is True
    game.play(1)
    assert gone["id"] not in [f["id"] for f in game.about()["facts"]]
    assert f"- #{gone['index'] + 1} {gone['text']}" not in story_in(chronicler.prompts[-1])
    assert call(small.url, "DELETE", path).status_code == 404
    assert call(small.url, "PATCH", path, {"pinned": True}).status_code == 404


def test_a_forgotten_fact_stays_forgotten(small, chronicler):
    """Also where its message is summarised again, on a branch that an edit behind it has made."""
    game = Game(small, "stays").fill(11)
    game.until_told()
    gone, first = first_fact(game), game.about()["story"][0]["id"]
    assert call(small.url, "DELETE", f"{CHATS_OF}/stays/facts/{gone.id}").status_code == 200
    other = edited(game, 2, "Line 5000: no such thing was ever said in this place.")
    look(other, chronicler)
    again = other.about()["story"][0]
    assert (again["end"], again["source"]) == (3, "model") and again["id"] != first, "summarised again, with its facts"
    assert open_chat(small, "stays").store.facts[gone.id].forgotten


BAD_CALLS = [
    ("PATCH", "story", {}, 400, "text"),
    ("PATCH", "story", {"text": ""}, 400, "text"),
    ("PATCH", "story", {"text": "  "}, 400, "text"),
    ("PATCH", "story", {"text": 5}, 400, "text"),
    ("PATCH", "story", [], 400, None),
    ("PATCH", "story/no-such", {"text": "Words."}, 404, None),
    ("PATCH", "facts", {"pinned": "yes"}, 400, "pinned"),
    ("PATCH", "facts", {"pinned": 1}, 400, "pinned"),
    ("PATCH", "facts", {"text": " "}, 400, "text"),
    ("PATCH", "facts", {"text": ["x"]}, 400, "text"),
    ("PATCH", "facts/no-such", {"pinned": True}, 404, None),
    ("DELETE", "facts/no-such", None, 404, None),
    ("DELETE", "story", None, 405, None),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A proxy with a usual context, and its upstream."""
    data = tmp_path_factory.mktemp("wide") / "data"
    with Chronicler() as fake, LocalServer(settings(data, fake.url)) as running:
        yield running, fake


@pytest.fixture(scope="module")
def told_house(bad_house):
    """A chat with a story and facts."""
    running, fake = bad_house
    fake.page = {}
    game = Game(running, "told-house")
    game.until_told(2)
    return game


@pytest.mark.parametrize(("method", "what", "body", "status", "param"), BAD_CALLS)
def test_bad_calls_are_refused_in_openais_shape(told_house, method, what, body, status, param):
    """And change nothing."""
    before = told_house.about()
    kind, _, key = what.partition("/")
    path = f"{CHATS_OF}/told-house/{kind}/{key or before[kind][0]['id']}"
    got = call(told_house.running.url, method, path, body)
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (status, param)
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    after = told_house.about()
    assert (after["story"], after["facts"]) == (before["story"], before["facts"])


def test_unknown_chats_are_not_found(told_house):
    """Whatever is asked of their story."""
    url = told_house.running.url
    for method, path in (("PATCH", "story/x"), ("PATCH", "facts/x"), ("DELETE", "facts/x")):
        got = call(url, method, f"{CHATS_OF}/nowhere/{path}", {"text": "Words."})
        assert got.status_code == 404 and "nowhere" in got.json()["error"]["message"]


def test_no_json_is_refused(told_house):
    """In the same shape."""
    for path in (story_path(told_house), fact_path(told_house)):
        got = httpx.patch(f"{told_house.running.url}/api/{path}", content=b"{", timeout=PATIENCE)
        assert got.status_code == 400 and got.json()["error"]["type"]


# ---------------------------------------------------------------------------- SillyTavern's Summarize extension

LONG_TEXT = "\n".join(f"{'Mira' if i % 2 else 'Tomas'}: {line(i, 25)}" for i in range(8))


def test_the_summarize_module_is_on_offer(told_house):
    """The stock extension asks for it."""
    assert "summarize" in call(told_house.running.url, "GET", "modules").json()["modules"]


def test_the_stock_extension_gets_a_summary(wide):
    """As it calls: a text, and parameters that this program has no use for."""
    running, fake = wide
    fake.page = {"reply": lambda body: json.dumps({"summary": "Tomas and Mira spoke of " + line(0, 25)[8:]})}
    got = call(running.url, "POST", "summarize", {"text": LONG_TEXT, "params": {"temperature": 1}})
    assert got.status_code == 200 and set(got.json()) == {"summary"}
    assert got.json()["summary"].startswith("Tomas and Mira spoke of")
    assert pm.count_tokens(got.json()["summary"]) <= pm.COMPRESSION * pm.count_tokens(LONG_TEXT)
    assert source_of(fake.summaries[-1]) == LONG_TEXT


@pytest.mark.parametrize("name", ["http 500", "no choices", "refusal", "empty"])
def test_the_stock_extension_gets_an_extract_of_a_failing_upstream(wide, name):
    """Out of the text's own sentences."""
    running, fake = wide
    fake.page = (BAD | FAILURES)[name]
    got = call(running.url, "POST", "summarize", {"text": LONG_TEXT})
    assert got.status_code == 200 and got.json()["summary"]
    assert set(pm.plain_words(got.json()["summary"]).split()) <= set(pm.plain_words(LONG_TEXT).split())


@pytest.mark.parametrize("body", [{}, {"text": None}, {"text": ""}, {"text": 5}, [], "text"])
def test_the_stock_extension_must_send_a_text(told_house, body):
    """Else it is told so."""
    got = call(told_house.running.url, "POST", "summarize", body)
    param = "text" if isinstance(body, dict) else None
    assert got.status_code == 400 and got.json()["error"]["param"] == param


# ---------------------------------------------------------------------------- two programs, one folder


def test_two_programs_share_stories(small, chronicler, data_dir):
    """What one makes, edits or forgets, the other shows, in its API and its prompts; none is made twice."""
    with LocalServer(settings(data_dir, chronicler.url, **SMALL)) as other:
        game = Game(small, "shared")
        game.until_told(2)
        assert chat_of(other.url, "shared")["story"] == game.about()["story"]
        asked = len(chronicler.summaries)
        assert call(other.url, "PATCH", story_path(game), {"text": "Words of the other program."}).status_code == 200
        assert game.about()["story"][0]["text"] == "Words of the other program."
        game.running = other
        game.play(1)
        assert "(#1-4) Words of the other program." in story_in(chronicler.prompts[-1])
        fresh = [source_of(body) for body in chronicler.summaries[asked:]]
        assert not {source_of(body) for body in chronicler.summaries[:asked]} & set(fresh)
        assert call(other.url, "DELETE", fact_path(game)).status_code == 200
        assert chat_of(small.url, "shared")["facts"] == chat_of(other.url, "shared")["facts"]
