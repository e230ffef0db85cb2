"""Every string that a user can see, in one list: `python tests/test_words.py` prints it with the lines it stands in.

The list is collected from the program's source, so that nothing new is missing from it. The tests keep it plain.
"""

import ast
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "persona_memory.py"
SOURCE = PROGRAM.read_text(encoding="utf8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# ={20,}\n# (.+)\n# ={20,}", re.MULTILINE)
ROOMS = [(SOURCE.count("\n", 0, banner.start()) + 1, banner[1]) for banner in BANNER.finditer(SOURCE)]
SCRIPTS = ("PAGE_SCRIPT", "EXTENSION_SCRIPT")
# Rooms of word lists, patterns and prompts for models: what a user sees of them are errors and log lines alone.
PROGRAMS = ("LLAMA_PROGRAM", "EXTRAS_BLOCK", "PAGE_STYLE", "EXTENSION_STYLE")  # constants of code
ROOMS_OF_DATA = ("Languages", "Emotion", "Requests", "Index", "Recall", "Summaries", "Prompt", "Protocol")
TELLING = {"log_event", "note_failure", "print", "tell", "write", "setting", "Action", "Finding", "degraded_header"}
WORDS = re.compile(r"[A-Za-z]{2,}[,.;:]? (?:[A-Za-z{]|--)")
NO_PROSE = re.compile(
    r"\\[bsdwW]|\(\?|\|\||SELECT |INSERT |DELETE FROM|CREATE |PRAGMA|LIKE \?|default-src|^\[|\bvar\(--|^import |"
    r"^(?:GET|X-Chat-Id|Origin), |Bearer \{|attachment;|Application Support|ORDER BY|^data: "
)


def text_of(node: ast.expr) -> str | None:
    """The text of a literal, with what is filled in as `{}`; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def room_of(line: int) -> str:
    """The room that a line stands in."""
    return next((name for start, name in reversed(ROOMS) if start <= line), "")


def python_strings() -> list[tuple[int, str]]:
    """Prose in Python: all literals of some words but docstrings, and in the rooms of data what errors and logs say."""
    skipped, told, inner = set(), set(), set()
    for node in ast.walk(TREE):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            skipped.add(id(body[0].value))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in PROGRAMS:
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in node.values}
        call = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(call, ast.Call):
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if isinstance(node, ast.Raise) or name in TELLING:
                told |= {id(n) for n in ast.walk(call)}
    found = []
    for node in ast.walk(TREE):
        text = text_of(node) if isinstance(node, ast.expr) else None
        if not text or id(node) in skipped | inner or len(text) > 2000 or not WORDS.search(text):
            continue
        if not NO_PROSE.search(text) and (id(node) in told or room_of(node.lineno) not in ROOMS_OF_DATA):
            found += [(node.lineno, " ".join(line.split())) for line in text.split("\n") if line.strip()]
    return found


def constant(name: str) -> tuple[int, str]:
    """A string constant of the program, with the line that it begins in."""
    node = next(n for n in TREE.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == name)
    return node.lineno, text_of(node.value)


def script_strings(name: str) -> list[tuple[int, str]]:
    """Prose in the literals of a script; in a template literal what is filled in is `{}`."""
    first, script = constant(name)
    script = re.sub(r"/\*.*?\*/|(?<![:'\"])//[^\n]*", lambda m: re.sub(r"[^\n]", " ", m[0]), script, flags=re.DOTALL)
    found = []
    for literal in re.finditer(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"|`(?:[^`\\]|\\.)*`", script):
        text = re.sub(r"\$\{(?:[^{}]|\{[^{}]*\})*\}", "{}", literal[0][1:-1])
        capital = re.fullmatch(r"[A-Z][a-z]+(?:…|\.)?", text)
        if (capital or WORDS.search(text)) and not re.search(r"[<>=]|translateY|\{\}px|\.\w+\(", text):
            found.append((first + script.count("\n", 0, literal.start()), " ".join(text.split())))
    return found


class PageText(HTMLParser):
    """The texts of the page's markup, and of its attributes that are read out or shown."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[int, str]] = []
        self.silent = 0

    def handle_starttag(self, tag, attrs):
        self.silent += tag in ("style", "script")
        shown = [value for name, value in attrs if name in ("placeholder", "aria-label", "title")]
        self.found += [(self.getpos()[0], value) for value in shown]

    def handle_endtag(self, tag):
        self.silent -= tag in ("style", "script")

    def handle_data(self, data):
        if not self.silent and data.strip():
            self.found.append((self.getpos()[0], " ".join(data.split())))


def page_strings() -> list[tuple[int, str]]:
    """The memory page's own words outside its script."""
    first, markup = constant("PAGE")
    parser = PageText()
    parser.feed(markup)
    return [(first + line - 1, text) for line, text in parser.found]


def user_strings() -> list[tuple[int, str]]:
    """Everything that a user can see, by line of the program."""
    return sorted({*python_strings(), *page_strings(), *(row for name in SCRIPTS for row in script_strings(name))})


def sentences(text: str) -> list[str]:
    """A string's sentences; what a colon or a semicolon sets apart reads as one of its own."""
    return [part for part in re.split(r"(?<=[.!?:;])\s+", text) if part]


# Words that a reader must guess, and turns of phrase that must be read twice.
ODD = re.compile(
    r"\b(?:shelf|shelves|lately|at home|lived through|patience|wired|its old self|all is well|hitherto|thereof|herein|"
    r"nothing that was not|as if they|is no [a-z]+ of|passed over|told in|is made anew|made anew|goes by words)\b",
    re.IGNORECASE,
)
LONGEST_SENTENCE = 30  # words


def test_the_list_holds_strings_of_every_kind():
    """An error, a log line, a setting, a check, the command line; the page's markup and script; the extension."""
    every = "\n".join(text for _, text in user_strings())
    for words in (
        "persona_memory cannot reach your model's server at {}: {}. Is it running?", "The model {} is ready.",
        "folder where the chats are kept", "another program is using {}.", "Every option has a variable too",
        "is listening on {}", "Three steps to your first chat", "The strongest moments", "Delete this chat?",
        "no message fits well enough.", "Searching…", "Open the memory page", "name must be", "Models are loading.",
    ):  # fmt: skip
        assert words.removeprefix("name ") in every, words
    assert len(user_strings()) > 350


def test_no_string_has_words_that_must_be_guessed():
    """The ecosystem's words instead: chat, message, swipe, branch, persona, memory, summary, tokens, upstream."""
    assert [(line, text) for line, text in user_strings() if ODD.search(text)] == []


def test_no_sentence_is_too_long_to_read_at_once():
    """Lists of names, commands and options are no sentences."""
    long = [
        (line, sentence)
        for line, text in user_strings()
        for sentence in sentences(text)
        if len(sentence.split()) > LONGEST_SENTENCE and sentence.count(",") < 5
    ]
    assert long == []


def test_errors_are_whole_sentences():
    """Each begins with a capital or with the name of the field that is wrong, and ends where it ends."""
    errors = {n.name for n in TREE.body if isinstance(n, ast.ClassDef) and n.bases} & {
        "SettingsError", "InvalidRequest", "ContextLengthExceeded", "NotAuthenticated", "ForeignOrigin", "NotFound",
        "UpstreamUnavailable", "UpstreamTimeout", "NoReply", "UnreadableAnswer",
    }  # fmt: skip
    raised = [n.exc for n in ast.walk(TREE) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
    given = [(c.lineno, text_of(c.args[0])) for c in raised if getattr(c.func, "id", "") in errors and c.args]
    texts = [(line, text) for line, text in given if text]
    assert len(texts) > 80
    assert [(line, text) for line, text in texts if not re.search(r"[.?}]$", text)] == []


if __name__ == "__main__":
    sys.stdout.write("".join(f"{line}: {text}\n" for line, text in user_strings()))
