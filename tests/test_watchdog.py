"""No text takes the square of its length: eight times as long takes about eight times the work, whatever it holds.

What is measured is the thread's own CPU time, of two sizes against each other, so that a slow or busy machine does not
matter. `bench/hostile.py watchdog` prints how long the interpreter is held by texts of the largest size.
"""

import contextlib
import json
import time

import pytest
from hostiles import SEEDS, chat_file, repeated, turn

import persona_memory as pm

SHORT, LONG = 2000, 16_000  # characters
LINEAR = LONG / SHORT
WORTH_A_LOOK = 0.03  # seconds of CPU time; all that is linear takes a few milliseconds


def summary_of(text: str) -> None:
    """A model's answer is read as a summary."""
    words, _ = pm.read_answer(text)
    pm.flaw_of(pm.whole_sentences(words, 400), text)


WORK = {
    "a turn": lambda text: pm.parse_request(turn(text)),
    "a chat's only message": lambda text: pm.parse_request({"messages": [{"role": "user", "content": text}]}),
    "a chat file": lambda text: pm.read_chats(chat_file(text)),
    "any file": lambda text: pm.read_chats(text.encode("utf8", "surrogatepass")),
    "sentences and words": lambda text: (pm.sentences(text), pm.chunks(text), pm.lexical_words(text)),
    "a question": lambda text: (pm.query_words(text), pm.asked_clauses(text, "en"), pm.named_dates(text, 20_000.0)),
    "a feeling": lambda text: pm.message_importance(text, pm.read_emotion(text)),
    "a frame": lambda text: (pm.quoted(text), pm.one_line(text), pm.normalise(text), pm.count_tokens(text)),
    "a summary": summary_of,
    "an error of the upstream": lambda text: pm.exceeded_context(pm.UpstreamError(400, {"message": text})),
    "an upstream's JSON": lambda text: pm.is_shallow(text + "[" * pm.DEEPEST_JSON + "{"),
}


def seconds(work, text: str) -> float:
    """CPU time that the work takes for the text; it may be refused."""
    started = time.thread_time()
    with contextlib.suppress(pm.PersonaMemoryError, ValueError):
        work(text)
    return time.thread_time() - started


def is_square(work, seed: str) -> bool:
    """Whether the work for a text of the seed grows with the square of its length, each time that it is tried."""
    for _ in range(3):
        long = seconds(work, repeated(seed, LONG))
        if long < WORTH_A_LOOK or long < 3 * LINEAR * seconds(work, repeated(seed, SHORT)):
            return False
    return True


@pytest.mark.parametrize("name", WORK)
def test_no_text_takes_the_square_of_its_length(name):
    """Such a text of a megabyte would stop every chat for hours."""
    seconds(WORK[name], "to load what is loaded once")
    assert [seed for seed in SEEDS if is_square(WORK[name], seed)] == []


def messages(content) -> dict:
    """A request of one message."""
    return {"messages": [{"role": "user", "content": content}]}


def test_a_message_has_a_longest_length():
    """The stated one, as one text or in parts; in a chat file it costs its line only, and swipes beyond the stated
    number are passed over."""
    most = "x" * pm.LONGEST_MESSAGE
    assert pm.parse_request(messages(most)).turns[0].content == most
    for content in (most + "x", [{"type": "text", "text": most}, {"type": "text", "text": "x"}]):
        with pytest.raises(pm.InvalidRequest) as refused:
            pm.parse_request(messages(content))
        assert refused.value.param == "messages[0].content"
    rows = [{"name": "Ann", "is_user": True, "mes": most + "x"}, {"name": "Ann", "is_user": True, "mes": "Hello."}]
    swiped = {"name": "Maren", "is_user": False, "mes": "Aye.", "swipes": [f"No. {n}" for n in range(5000)]}
    raw = "\n".join(map(json.dumps, [{"user_name": "Ann"}, *rows, swiped | {"swipe_id": 4000}])).encode()
    [copy], passed_over = pm.read_chats(raw)
    assert [m.content for m in copy.path] == ["Hello.", "Aye."] and len(copy.messages) == pm.MOST_SWIPES + 2
    assert [row["line"] for row in passed_over] == [2]


@pytest.mark.parametrize("raw", ["[" + "1," * pm.MOST_VALUES + "1, 2]", "[" * 100_000, "9" * 4000])
def test_json_that_would_hold_everything_up_is_refused(raw):
    """Too many values, too deep, too long a number."""
    for text in (raw, raw.encode()):
        with pytest.raises(ValueError):
            pm.json_value(text)
    assert len(pm.json_value("[" + "1," * (pm.MOST_VALUES - 1) + "1]")) == pm.MOST_VALUES


def test_large_json_is_read_by_what_lets_others_run():
    """As many names and values as are read in one call into C, and one more; both readers read the same."""
    few = "[" + "0," * pm.JSON_AT_ONCE + "1]"
    many = "{" + ",".join(f'"{n}":[]' for n in range(pm.JSON_AT_ONCE // 2 + 2)) + "}"
    in_python = type(json.scanner.py_make_scanner(json.JSONDecoder()))
    assert not isinstance(pm.json_reader(few).scan_once, in_python)
    assert isinstance(pm.json_reader(many).scan_once, in_python)
    assert pm.json_value(few) == json.loads(few) and pm.json_value(many) == json.loads(many)
    odd = many[:-1] + ',"\\ud83d\\ude00 \\u00e9\\n": {"x": [1.5, -2, true, null, ""]}}'
    assert pm.json_value(odd) == json.loads(odd)
    for broken in (many[:-1], many[:-1] + ',"a":}', many + "x", many[:-1] + ',"a":NaN}', many[:-1] + ',"a":1e999}'):
        with pytest.raises(ValueError):
            pm.json_value(broken)


def test_large_json_is_written_item_by_item():
    """As json writes it."""
    for value in ({}, {"a": []}, {"a": [1, {"b": "\u00e9\ud800"}], "c": (None,), "d": {"e": [1.5]}, "f": "x"}):
        assert pm.json_text(value) == json.dumps(value)


@pytest.mark.parametrize("unit", ["\ufdfa", "\ufdfa ", "e\u0301", "caf\u00e9 ", "\u3042", "ab\ud800", "\U0001f600 x"])
def test_long_texts_are_worked_at_in_pieces(unit, monkeypatch):
    """None is longer than what takes a few milliseconds, nothing is lost between them, and where there is white space
    words come out as they would of the whole."""
    text, sizes = repeated(unit, 3 * pm.PIECE + 7), []
    assert pm.in_pieces(lambda piece: sizes.append(len(piece)) or piece, text) == text
    assert max(sizes) <= pm.PIECE and len(sizes) <= 8
    if " " in unit:
        pieced = pm.normalise(text), pm.sane_text(text), pm.lexical_text(text)
        monkeypatch.setattr(pm, "PIECE", len(text))
        assert pieced == (pm.normalise(text), pm.sane_text(text), pm.lexical_text(text))


def test_tokens_are_counted_without_lone_surrogates(monkeypatch):
    """tiktoken replaces them in one call, during which everything stands still; halves that belong together are one
    character, as tiktoken has it."""
    encoding, seen = pm.token_encoding(), []
    whole = "Aye, \U0001f600 said Maren. \ufffd"
    monkeypatch.setattr(encoding, "_core_bpe", spy := Spy(encoding._core_bpe, seen))
    assert pm.tokens_of("Aye, \ud83d\ude00 said Maren. \ud83d") == spy.encode_ordinary(whole)
    assert seen == [whole, whole]


class Spy:
    """tiktoken's core; notes what it is given."""

    def __init__(self, core, seen: list[str]):
        self.core, self.seen = core, seen

    def encode_ordinary(self, text: str) -> list[int]:
        self.seen.append(text)
        return self.core.encode_ordinary(text)


def test_a_heap_of_marks_keeps_its_first():
    """A letter with a few marks is put in order; of a thousand only as many are kept as a text may have."""
    assert pm.normalise("e\u0301") == "\u00e9"
    heap = pm.normalise("\u3042" + "\u0316\u0301" * 500 + "!")
    assert len(heap) == pm.MOST_MARKS + 2 and heap.endswith("!")
    emoji = "\U0001f600" * 200
    assert pm.normalise(emoji) == emoji


def test_thoughts_end_where_their_own_end_stands():
    """Others within are part of them; one without an end goes on to the text's."""
    assert pm.without_thoughts("<think>a<reasoning>b</think>c</reasoning>d <think>e</think>f") == "d f"
    assert pm.without_thoughts("<THINK>a</think>b<details type='reasoning' x>c</DETAILS>d") == "bd"
