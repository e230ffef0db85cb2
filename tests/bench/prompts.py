"""What the model is asked: the same chats give the same prompts, before and after a change of the program.

Chats are played through a program file with a recording upstream behind it: requests that other programs were seen to
send, the written role-play chats, recorded conversations (LoCoMo's form; Maharana et al. 2024), and what users do to
their chats: swipe, edit, delete, branch off, pin, forget, import. A line is written for each request: what the upstream
got, the header that says what memory did, and for an injection the whole answer.

    python tests/bench/prompts.py --out before.jsonl --captures FOLDER ... --data locomo_dev.json
    python tests/bench/prompts.py --out after.jsonl  --captures FOLDER ... --data locomo_dev.json --program changed.py
    python tests/bench/prompts.py --compare before.jsonl after.jsonl

Two runs of one program write the same bytes. For that the program's clock stands still in a request, what it does in
the background is done between requests, nothing is ever late, each text is embedded alone (in a batch the last bits of
a vector depend on its neighbours), and made-up chat ids are numbered.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[1:3])

import httpx
from fakes import LocalServer, Upstream
from prefix import conversation_messages, progress, requests_of
from roleplay import PERSONA, chronicle

TESTS = Path(__file__).resolve().parent.parent
DATA = TESTS / "data"
USERS = {"roleplay_keep": "Tobin", "roleplay_city": "June", "roleplay_star": "user"}
LANGUAGES = ("language_de", "language_es", "language_ja", "language_ru", "language_zh")
START = datetime(2024, 3, 1, 9, tzinfo=UTC).timestamp()
HOUR = 3600.0
MADE_UP_ID = re.compile(r"\bchat-[0-9a-f]{16}\b")
TIMED = ("milliseconds", "size")  # what an answer says of time, and of the disk
API = "/api/persona_memory"

# ---------------------------------------------------------------------------- a program that does the same each time


class Clock:
    """The program's module `time`, whose clocks stand still until they are set."""

    def __init__(self):
        self.now = START

    def time(self) -> float:
        """Unix seconds."""
        return self.now

    monotonic = time

    def __getattr__(self, name: str):
        return getattr(time, name)


class Background:
    """Holds back what is given to the thread pools of this process until a request is over, or somebody waits for it.

    So a turn meets the same vectors and summaries each time, however busy the machine. A wait for a result has no end.
    """

    def __init__(self):
        self.held: collections.deque = collections.deque()  # (pool, future, event that lets it run), oldest first
        pool, future = concurrent.futures.ThreadPoolExecutor, concurrent.futures.Future
        submit, shutdown, result = pool.submit, pool.shutdown, future.result

        def hold(self_, work, *args, **kwargs):
            allowed = threading.Event()
            self.held.append((self_, made := submit(self_, lambda: allowed.wait() and work(*args, **kwargs)), allowed))
            return made

        def wait(self_, timeout=None):
            self.let_go(next((row[0] for row in list(self.held) if row[1] is self_), None))
            return result(self_)

        def end(self_, *args, **kwargs):
            self.let_go(self_)
            return shutdown(self_, *args, **kwargs)

        pool.submit, pool.shutdown, future.result = hold, end, wait

    def let_go(self, pool):
        """Lets all run that waits in a pool; it has one thread, and does first what came first."""
        for row in list(self.held):
            if row[0] is pool:
                row[2].set()

    def settle(self):
        """Does what is held back, one after the other, and what follows from that."""
        while self.held:
            _, future, allowed = self.held.popleft()
            allowed.set()
            concurrent.futures.wait([future])


def embed_alone():
    """Has every text embedded by itself, and once."""
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    encode, known = SentenceTransformer.encode, {}

    def one_by_one(model, texts, **options):
        options["batch_size"] = 1
        for text in texts:
            if (id(model), text) not in known:
                known[id(model), text] = encode(model, [text], **options)[0]
        return np.stack([known[id(model), text] for text in texts])

    SentenceTransformer.encode = one_by_one


def load_program(path: Path):
    """The program of that file as the module `persona_memory`; it loads its embedder once."""
    spec = importlib.util.spec_from_file_location("persona_memory", path)
    module = sys.modules["persona_memory"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.load_sentence_transformer = functools.cache(module.load_sentence_transformer)
    return module


# ---------------------------------------------------------------------------- recording


class Stage:
    """A running program between a client and an upstream; `lines` gets a line for each request."""

    def __init__(self, way: str, make: Callable, background: Background, clock: Clock, lines: list[str], **options):
        self.way, self.make, self.background, self.clock, self.lines = way, make, background, clock, lines
        self.options = {"context": 2048, "summary_every": 0, **options}
        self.upstream, self.ids, self.numbers = Upstream(), {}, itertools.count(1)
        self.summarise: Callable[[dict], str] = chronicle
        self.folder = tempfile.TemporaryDirectory()
        self.upstream.steer(reply=lambda body: self.summarise(body) or self.reply)
        self.reply, self.server = "", None
        clock.now = START

    def __enter__(self):
        given = {"proxy": True, "host": "127.0.0.1", "port": 0, "data": self.folder.name}
        self.server = LocalServer(self.make(upstream=self.upstream.url, **given, **self.options)).start()
        return self

    def __exit__(self, *_):
        self.background.settle()
        self.server.close()

    def restart(self):
        """Ends the program and starts it again on the same data."""
        self.__exit__()
        self.__enter__()

    def end(self):
        """Lets go of the upstream and of the data."""
        self.upstream.close()
        self.folder.cleanup()

    def request(self, method: str, path: str, **more) -> httpx.Response:
        """The answer to a request; what follows from it has happened when this returns."""
        self.clock.now += HOUR
        answer = httpx.request(method, self.server.url + path, timeout=600, **more)
        self.background.settle()
        return answer

    def chat(self, what: str, body: dict, reply: str = "", headers: dict | None = None) -> str:
        """A chat completion; returns the id of its chat, empty where there is none."""
        before = len(self.upstream.chats)
        self.reply = reply or f"Let me think about request {len(self.lines) + 1} for a moment."
        answer = self.request("POST", "/v1/chat/completions", json=body, headers=headers)
        asked = [r["body"] for r in self.upstream.chats[before:] if not chronicle(r["body"])]
        self.note(what, answer, asked)
        return answer.headers.get("X-Chat-Id", "")

    def inject(self, what: str, body: dict) -> dict:
        """An injection's answer, which is recorded."""
        answer = self.request("POST", f"{API}/inject", json=body)
        self.note(what, answer, [])
        return answer.json()

    def change(self, method: str, path: str, **more) -> dict:
        """A change to what is kept, by the program's own API."""
        answer = self.request(method, f"{API}/{path}", **more)
        self.note(f"{method} {path}", answer, [])
        return answer.json()

    def note(self, what: str, answer: httpx.Response, asked: list[dict]):
        header = {k: answer.headers.get(k) for k in ("X-Persona-Memory", "X-Chat-Id")}
        row = {"way": self.way, "what": what, "status": answer.status_code, "headers": header, "asked": asked}
        if not asked:
            row["answer"] = without(answer.json(), TIMED)
        text = json.dumps(row, ensure_ascii=False)
        self.lines.append(MADE_UP_ID.sub(lambda found: self.numbered(found[0]), text))
        if len(self.lines) % 100 == 0:
            progress(f"{len(self.lines)} requests, now at: {self.way}")

    def numbered(self, chat_id: str) -> str:
        return self.ids.setdefault(chat_id, f"chat {len(self.ids) + 1}")


def without(value, names):
    """JSON without the fields of those names."""
    if isinstance(value, dict):
        return {k: without(v, names) for k, v in value.items() if k not in names}
    return [without(v, names) for v in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------- what is played


def written(name: str) -> tuple[list[dict], list[str]]:
    """A written chat's messages, and the questions at its end. Read here: the program's own names change."""
    messages, questions = [], []
    for line in (DATA / f"{name}.txt").read_text("utf-8").splitlines():
        if line.startswith("? "):
            questions.append(line.split(" | ")[2])
        elif found := re.match(r"(?:@\w+ )?(\w+): (.*)", line):
            speaker, text = found.groups()
            user = USERS.setdefault(name, speaker)
            named = {} if speaker in ("user", "assistant") else {"name": speaker}
            messages.append({"role": "user" if speaker == user else "assistant", **named, "content": text})
    return messages, questions


def request(messages: list[dict], persona: str = PERSONA, **more) -> dict:
    """The body of a chat completion."""
    return {"model": "fake-model", "messages": [{"role": "system", "content": persona}, *messages], **more}


def play(stage: Stage, what: str, messages: list[dict], window: int | None = None, dates: list | None = None, **more):
    """Every turn of a chat, with its own next message as the reply; by turns as a stream and whole."""
    for number, (shown, reply) in enumerate(requests_of(messages, None), 1):
        if dates:
            stage.clock.now = max(stage.clock.now, dates[len(shown) - 1])
        shown = shown[-window:] if window else shown
        stage.chat(f"{what}, turn {number}", request(shown, stream=number % 2 == 0, max_tokens=300, **more), reply)


def ask(stage: Stage, what: str, messages: list[dict], questions: list[str], window: int | None = None):
    """Every question, on a branch of its own at the chat's end."""
    for question in questions:
        shown = [*messages, {"role": "user", "content": question}][-(window or 0) :]
        stage.chat(f"{what}: {question}", request(shown, max_tokens=300))


def captured(folders: list[Path]) -> Iterator[tuple[str, dict, dict]]:
    """What clients were seen to send, in the order of the files' names: a name, the body, its telling headers."""
    for file in (f for folder in folders for f in sorted(folder.glob("*.json"))):
        content = json.loads(file.read_text("utf-8"))
        for number, row in enumerate(content.get("requests") or [content], 1):
            headers = {k: v for k, v in row.get("headers", {}).items() if re.match(r"x-(chat|open|persona)", k, re.I)}
            yield f"{file.parent.name}/{file.stem} {number}", row.get("body", row), headers


def play_clients(stage: Stage, args):
    for what, body, headers in captured(args.captures):
        stage.chat(what, body, headers=headers)
    for file in (f for folder in args.captures for f in sorted(folder.glob("*.jsonl"))):
        stage.change("POST", "import", content=file.read_bytes())
    for what, body, headers in captured(args.captures):
        stage.chat(f"{what}, with imported chats", body, headers=headers)


def play_whole(stage: Stage, args):
    for name in ("roleplay_keep", "roleplay_star"):
        messages, questions = written(name)
        play(stage, name, messages)
        ask(stage, name, messages, questions)


def play_windows(stage: Stage, args):
    messages, questions = written("roleplay_city")
    play(stage, "newest 12", messages, window=12)
    ask(stage, "newest 12", messages, questions, window=12)


def play_languages(stage: Stage, args):
    for name in LANGUAGES:
        messages, questions = written(name)
        play(stage, name, messages, window=6)
        ask(stage, name, messages, questions, window=6)


def play_extracts(stage: Stage, args):
    stage.summarise = lambda body: "No." if chronicle(body) else ""  # the model writes no summary
    play_windows(stage, args)


def play_summaries(stage: Stage, args):
    play_whole(stage, args)
    stage.restart()
    messages, questions = written("roleplay_keep")
    ask(stage, "restarted", messages, questions)


def play_recorded(stage: Stage, args, window: int | None = None):
    for recorded in json.loads(args.data.read_text("utf-8"))["conversations"][:2]:
        turns, messages = recorded["turns"], conversation_messages(recorded)
        dates = [datetime.fromisoformat(turn["timestamp"]).replace(tzinfo=UTC).timestamp() for turn in turns]
        stage.clock.now = min(stage.clock.now, dates[0])
        last = [n for n, message in enumerate(messages, 1) if message["role"] == "user"][: args.turns][-1]
        play(stage, recorded["id"], messages[:last], window, dates)
        asked = [q["question"] for q in recorded["questions"] if q["category"] != 5]
        asked = asked[:: max(1, len(asked) // args.questions)][: args.questions]
        ask(stage, recorded["id"], messages, asked, window)
        stage.restart()
        ask(stage, f"{recorded['id']} restarted", messages, asked, window)


def play_changes(stage: Stage, args):
    """What users do to a chat: a request each, with the turn after it."""
    chat = written("roleplay_keep")[0]
    play(stage, "begun", chat[:60])

    def turn(what: str, messages: list[dict], reply: str = "", **more) -> str:
        return stage.chat(what, request(messages, **more), reply)

    for number in range(3):
        turn(f"swipe {number}", chat[:59], f"*Swipe {number}.* The lamp needs oil, and you need sleep, Tobin.")
    swiped = [*chat[:59], {**chat[59], "content": "*Swipe 1.* The lamp needs oil, and you need sleep, Tobin."}]
    turn("a swipe is taken", [*swiped, {"role": "user", "content": "Which animal did I say I am afraid of?"}])
    turn("back to the first", [*chat[:60], {"role": "user", "content": "What must I never eat, Maren?"}])
    edited = [{**m, "content": m["content"].replace("Harrowmere", "Saltmarsh")} for m in chat[:60]]
    turn("edited above", [*edited, {"role": "user", "content": "Which town do I come from?"}])
    turn("the edit is taken back", [*chat[:60], {"role": "user", "content": "Which town do I come from?"}])
    turn("deleted in the middle", [*chat[:12], *chat[14:60], {"role": "user", "content": "Where did I get my limp?"}])
    turn("deleted at the end", chat[:51])
    turn("deleted in front", [*chat[20:60], {"role": "user", "content": "What is your cat called?"}])
    turn("continue", chat[:60], " And she pours again.")
    turn(
        "continued", [*chat[:59], {**chat[59], "content": chat[59]["content"] + " And she pours again."}, *chat[60:63]]
    )
    turn("the chat ends with a system message", [*chat[:41], {"role": "system", "content": "[Write in rhyme.]"}])
    noted = [*chat[:37], {"role": "system", "content": "[It is raining.]"}, *chat[37:41]]
    turn("a note in the chat", noted)
    turn("another persona", chat[:41], **{"persona": "You are Maren, and you are asleep."})


def play_identities(stage: Stage, args):
    """How clients say which chat it is."""
    chat, questions = written("roleplay_keep")
    ways = {
        "header": ({}, {"X-Chat-Id": "by header"}),
        "chat_id": ({"chat_id": "by field"}, {}),
        "metadata": ({"metadata": {"chat_id": "by metadata"}}, {}),
        "user": ({"user": "chat_123"}, {}),
        "object": ({"persona_memory": {"chat_id": "by object", "character": "Maren", "complete": True}}, {}),
        "placeholder": ({"chat_id": "{{chat}}"}, {"X-Chat-Id": "undefined"}),
        "off": ({}, {"X-Persona-Memory": "off"}),
    }
    for name, (more, headers) in ways.items():
        for last in (21, 41, 61):
            stage.chat(f"{name}, {last} messages", request(chat[:last], **more), headers=headers)
        for number in (63, 67, 73):  # clients that send nothing but the newest message, and no persona
            body = {"model": "fake-model", "messages": [chat[number]], **more}
            stage.chat(f"{name}, message {number} alone", body, headers=headers)
        for question in questions[:4]:
            shown = [*chat[:61], {"role": "user", "content": question}]
            stage.chat(f"{name}: {question}", request(shown, **more), headers=headers)
    for number, (shown, reply) in enumerate(requests_of(chat[:60], 1), 1):
        stage.chat(f"newest message only, turn {number}", request(shown, user="chat_delta"), reply)
    for number, question in enumerate(questions[:8]):
        body = request([{"role": "user", "content": question}], user="chat_delta")
        stage.chat(f"newest message only, question {number}", body)
    branched = {"chat_id": "branched", "parent_chat_id": "by object", "character": "Maren", "complete": True}
    stage.chat("branched off", request(chat[:31], persona_memory=branched))
    for kind in ("normal", "swipe", "regenerate", "continue", "impersonate", "quiet"):
        told = {**branched, "kind": kind}
        stage.chat(f"kind {kind}", request([*chat[:31], *chat[31:33]], persona_memory=told))
    stage.chat("a quiet prompt's own words", request([{"role": "user", "content": "[Describe the room.]"}],
               persona_memory={**branched, "kind": "quiet"}))  # fmt: skip


def play_forms(stage: Stage, args):
    """Forms that requests take: folded personas, groups, parts, tools, refusals."""
    chat, questions = written("roleplay_keep")
    plain = [{"role": m["role"], "content": m["content"]} for m in chat]
    for last in range(21, 90, 4):
        folded = [{"role": "user", "content": PERSONA}, *plain[max(0, last - 14) : last]]
        stage.chat(f"folded persona, {last} messages", {"messages": folded})
    for last in range(22, 90, 4):
        merged = [{"role": "user", "content": f"{PERSONA}\n\n{plain[0]['content']}"}, *plain[1:last]]
        stage.chat(f"persona in the first message, {last} messages", {"messages": merged})
    group = "[Start a new group chat. Group members: Maren, Tobin, Bosun]"
    voices = [{"role": m["role"], "content": f"{m.get('name', 'User')}: {m['content']}"} for m in chat]
    for last in range(31, 111, 5):
        persona = (PERSONA, "Bosun is a grey cat who never answers a question.")[last % 2]
        shown = [{"role": "system", "content": group}, *voices[:last]]
        stage.chat(f"group, {last} messages", request(shown, persona))
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in plain]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    for last in range(31, 91, 12):
        shown = [*parts[: last - 1], {**parts[last - 1], "content": [*parts[last - 1]["content"], picture]}]
        stage.chat(f"parts, {last} messages", request(shown))
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    tools = [
        *plain[:40], {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "A dark sea."}, *plain[40:43],
    ]  # fmt: skip
    stage.chat("tools", request(tools, tools=[{"type": "function", "function": {"name": "look"}}]))
    stage.chat("developer's words", {"messages": [{"role": "developer", "content": PERSONA}, *plain[:41]]})
    stage.chat("a long persona", request(plain[:41], PERSONA * 6))
    stage.chat("a persona that does not fit", request(plain[:41], PERSONA * 30))
    stage.chat("a long answer is wanted", request(plain[:61], max_tokens=1200))
    stage.chat("more is wanted than there is", request(plain[:61], max_tokens=5000))
    stage.chat("a long message", request([*plain[:60], {"role": "user", "content": " ".join(questions) * 3}]))
    stage.chat("one message alone", {"messages": [{"role": "user", "content": "Hello, Maren."}]})
    stage.chat("no chat at all", {"messages": [{"role": "system", "content": PERSONA}]})
    stage.chat("no messages", {"messages": []})
    stage.chat("a role that is none", {"messages": [{"role": 7, "content": "Hello."}]})


def play_marks(stage: Stage, args):
    """What users change in what is kept, and what they allow."""
    chat, questions = written("roleplay_keep")
    play(stage, "Maren", chat[:80], persona_memory={"chat_id": "marked", "character": "Maren"})
    rows = stage.change("GET", "chats/marked/messages")["messages"]
    for place, changes in ((3, {"pinned": True}), (14, {"forgotten": True}), (16, {"content": "*limps, as ever*"})):
        stage.change("PATCH", f"chats/marked/messages/{rows[place]['id']}", json=changes)
    ask(stage, "marked", chat[:80], questions[:8])
    named = {"chat_id": "marked", "character": "Maren"}
    for question in questions[:8]:
        body = request([*chat[:80], {"role": "user", "content": question}], persona_memory=named)
        stage.chat(f"marked: {question}", body)
    stage.change("PATCH", f"chats/marked/messages/{rows[14]['id']}", json={"forgotten": False})
    stage.change("PATCH", f"characters/{quote('Maren')}", json={"carry_over": True})
    other = {"chat_id": "another chat", "character": "Maren"}
    begin = [{"role": "assistant", "content": "*Maren opens the door again.* You are back, Tobin."}]
    for question in questions[:12]:
        begin = [*begin, {"role": "user", "content": question}]
        reply = f"Ask me that when the lamp is lit. {question[::-1]}"
        stage.chat(f"carried over: {question}", request(begin, persona_memory=other), reply)
        begin = [*begin, {"role": "assistant", "content": reply}]


def play_injections(stage: Stage, args):
    """Clients that make their prompt themselves."""
    for name, tokens in (("roleplay_keep", 1500), ("roleplay_city", None)):
        chat, questions = written(name)
        dated = [
            {**m, "timestamp": datetime.fromtimestamp(START - HOUR * (400 - 7 * n), UTC).isoformat()}
            for n, m in enumerate(chat)
        ]
        told = {"persona": PERSONA, "complete": True, "character": name} | (
            {"context_tokens": tokens} if tokens else {}
        )
        for last in range(11, len(chat), 10):
            hidden = [{**m, "hidden": True} if n % 9 == 4 else m for n, m in enumerate(dated[:last])]
            for form, messages in (("dated", dated[:last]), ("hidden", hidden), ("plain", chat[:last])):
                body = {"chat_id": f"{name} {form}", "messages": messages, **told}
                stage.inject(f"{name} {form}, {last} messages", body)
        for question in questions[:10]:
            body = {"chat_id": f"{name} dated", "messages": [*dated, {"role": "user", "content": question}], **told}
            stage.inject(f"{name}: {question}", body)
        branched = {"chat_id": f"{name} branched", "parent_chat_id": f"{name} dated"}
        stage.inject(f"{name} branched off", {"messages": dated[:31], **told, **branched})
    stage.inject("no chat", {"messages": [{"role": "user", "content": "Hello."}]})


WAYS = {
    "clients": (play_clients, {"context": 8192}),
    "whole chats": (play_whole, {}),
    "windows": (play_windows, {}),
    "languages": (play_languages, {"context": 700}),
    "extracts": (play_extracts, {"summary_every": 8, "summary_calls": 0}),
    "summaries": (play_summaries, {"summary_every": 8, "summary_calls": 0}),
    "changes": (play_changes, {}),
    "identities": (play_identities, {"context": 1024}),
    "forms": (play_forms, {}),
    "marks": (play_marks, {}),
    "injections": (play_injections, {"summary_every": 8}),
    "conversations, whole": (play_recorded, {"context": 4096}),
    "conversations, newest 20": (functools.partial(play_recorded, window=20), {"context": 4096}),
}


# ---------------------------------------------------------------------------- figures


def differences(before: dict, after: dict, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, and how."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from differences(before.get(key), after.get(key), f"{where}.{key}")
        if list(before) != list(after) and before == after:
            yield f"{where}: the order of the fields"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, f"{where}[{place}]")
    elif isinstance(before, str) and isinstance(after, str) and before != after:
        same = max(0, len(os.path.commonprefix([before, after])) - 40)
        yield f"{where} at {same}:\n      - {before[same : same + 200]!r}\n      + {after[same : same + 200]!r}"
    elif before != after or type(before) is not type(after):
        yield f"{where}:\n      - {json.dumps(before)[:200]}\n      + {json.dumps(after)[:200]}"


def compare(old: Path, new: Path, most: int) -> int:
    """Prints the first requests that differ; returns how many do."""
    before, after = (file.read_text("utf-8").splitlines() for file in (old, new))
    differing = [
        (n, json.loads(a or "{}"), json.loads(b or "{}"))
        for n, (a, b) in enumerate(itertools.zip_longest(before, after), 1)
        if a != b
    ]
    for number, a, b in differing[:most]:
        print(f"request {number}: {a.get('way')}, {a.get('what')}")
        for line in itertools.islice(differences(a, b), 5):
            print(f"    {line}")
    counts = collections.Counter(a.get("way") for _, a, _ in differing)
    print(f"{len(differing)} of {max(len(before), len(after))} requests differ", dict(counts) or "")
    return len(differing)


def record(args) -> list[str]:
    """A line for each request of the ways that are wanted."""
    os.environ |= {"TZ": "UTC", "TOKENIZERS_PARALLELISM": "false"}
    time.tzset()
    clock, background, lines = Clock(), Background(), []
    program = load_program(args.program)
    program.time = clock
    embed_alone()
    for way, (played, options) in WAYS.items():
        if way.startswith("conversations") and not args.data:
            continue
        if args.way and way not in args.way:
            continue
        stage = Stage(way, program.Settings, background, clock, lines, **options)
        with contextlib.closing(contextlib.ExitStack()) as ending:
            ending.callback(stage.end)
            with stage:
                played(stage, args)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=TESTS.parent / "persona_memory.py")
    parser.add_argument("--out", type=Path, help="the file that the lines go to")
    parser.add_argument("--captures", type=Path, nargs="+", default=[], help="folders of captured requests")
    parser.add_argument("--data", type=Path, help="a file of recorded conversations")
    parser.add_argument("--turns", type=int, default=80, help="of each recorded conversation")
    parser.add_argument("--questions", type=int, default=15, help="about each recorded conversation")
    parser.add_argument("--way", action="append", choices=WAYS, help="only this part; may be given again")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--most", type=int, default=10, help="differing requests to print")
    args = parser.parse_args()
    if args.compare:
        return min(1, compare(*args.compare, args.most))
    started, lines = time.perf_counter(), record(args)
    text = "".join(f"{line}\n" for line in lines)
    if args.out:
        args.out.write_text(text, "utf-8")
    rows = [json.loads(line) for line in lines]
    headers = [row["headers"]["X-Persona-Memory"] or "" for row in rows]
    degraded = collections.Counter(re.sub(r"\d+", "N", h.split(";")[1]) for h in headers if h.startswith("degraded"))
    for way, count in collections.Counter(row["way"] for row in rows).items():
        print(f"{way}: {count} requests")
    print("recalled in", sum(bool(re.search(r"recalled=[1-9]", h)) for h in headers), "degraded:", dict(degraded))
    print("with summaries:", sum(bool(re.search(r"summary=[1-9]", h)) for h in headers))
    print("status:", dict(collections.Counter(row["status"] for row in rows)))
    print(f"{len(lines)} requests in {time.perf_counter() - started:.0f} s")
    print("sha256", hashlib.sha256(text.encode()).hexdigest())
    return 0


if __name__ == "__main__":
    sys.exit(main())
