"""Long recorded conversations through the proxy: does what a question needs stand in the model's prompt?

Every conversation of a LoCoMo file (Maharana et al. 2024; not part of this project) is played turn by turn, once by a
client that shows the whole chat and once by one that shows its newest messages only. Then questions are asked, each on
a branch of its own at the chat's end. A question's evidence share is the part of its annotated evidence turns whose
text stands in the prompt; `without` is the same for the client's messages alone (the whole chat, cut to its newest
messages that fit the context). Then the program is killed, started again on the same data and asked again.

    python tests/bench/locomo.py --data locomo_dev.json --conversations 1 --questions 20 --window both

Added time is a turn through the program minus the same turn with the upstream itself, client and machine the same.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fakes import Server, Upstream, client
from prefix import (
    MAX_TOKENS,
    conversation_messages,
    count,
    percentile,
    print_table,
    progress,
    requests_of,
    send,
    shown,
    text_of,
)

BLOCK = re.compile(r"\[Earlier in this chat.*?\[End of memories\]", re.DOTALL)
PLACE = r"(?:#\d+(?:-\d+)?|\d{4}-\d\d-\d\d) "  # an excerpt's numbers in the chat, or its date
MEMORY = re.compile(rf"^(?:{PLACE})?[^:\n\[]*: (.*(?:\n  .*)*)", re.MULTILINE)
LATER = re.compile(r" \(changed later\)$", re.MULTILINE)  # our mark at an excerpt, no words of the chat
ANSWER = "Let me think about that for a moment."


# ---------------------------------------------------------------------------- reading prompts


def plain(text: str) -> str:
    """Text without regard to white space."""
    return " ".join(text.split())


def memory_block(prompt: list[dict]) -> str:
    """The recalled memories' block; empty where nothing was recalled."""
    found = BLOCK.search("\n".join(map(text_of, prompt)))
    return found.group() if found else ""


def memories(block: str) -> list[str]:
    """The texts of a block's memories."""
    return [plain(text) for text in MEMORY.findall(LATER.sub("", block))]


def evidence_share(texts: list[str], prompt: list[dict]) -> float:
    """The share of the evidence that stands in the prompt."""
    whole = plain("\n".join(map(text_of, prompt)))
    return sum(plain(text) in whole for text in texts) / len(texts)


def newest_that_fit(messages: list[dict], room: int) -> list[dict]:
    """The persona and the newest messages, as a client would cut them to a context."""
    room -= count(text_of(messages[0]))
    kept = []
    for message in reversed(messages[1:]):
        room -= count(text_of(message))
        if room < 0:
            break
        kept.insert(0, message)
    return [messages[0], *kept]


# ---------------------------------------------------------------------------- one conversation


@dataclass
class Asked:
    """What came of asking a conversation's questions once."""

    shares: list[float] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    foreign: int = 0  # memories that are no text of this conversation
    visible: int = 0  # memories that the prompt's history shows as well
    leaked: int = 0  # questions of other branches in the prompt
    degraded: int = 0  # answers without memory because something failed


class Conversation:
    """A recorded conversation, its messages, and the questions chosen from it."""

    def __init__(self, recorded: dict, questions: int, names: bool):
        self.id = recorded["id"]
        self.messages = conversation_messages(recorded)
        if names:
            for message, turn in zip(self.messages, recorded["turns"], strict=True):
                message["name"] = turn["speaker"]
        self.persona = {"role": "system", "content": persona_of(*recorded["speakers"])}
        self.texts = {turn["id"]: turn["text"] for turn in recorded["turns"]}
        pool = [item for item in recorded["questions"] if item["category"] in (1, 2, 3, 4) and item["evidence"]]
        number = min(questions, len(pool))
        self.questions = [pool[at * len(pool) // number] for at in range(number)]

    def evidence(self, question: dict) -> list[str]:
        return [self.texts[turn] for turn in question["evidence"]]

    def asking(self, question: dict, window: int | None) -> list[dict]:
        """The request that asks a question at the conversation's end."""
        return [self.persona, *shown([*self.messages, {"role": "user", "content": question["question"]}], window)]


def persona_of(user: str, character: str) -> str:
    return (
        f"You are {character}, an old friend of {user}. The two of you have been writing to each other for months. "
        f"Answer as {character} would: warmly, in a few sentences, true to everything that has been said so far."
    )


class Player:
    """Plays one conversation through a running server."""

    def __init__(
        self, conversation: Conversation, server: Server, upstream: Upstream, window: int | None, context: int
    ):
        self.conversation, self.server, self.upstream = conversation, server, upstream
        self.window, self.context = window, context
        self.added: list[float] = []

    def play(self):
        """The whole conversation; each turn also goes to the upstream directly, for the time that it takes alone."""
        with client(self.server.url) as api, client(self.upstream.url) as direct:
            for number, (visible, answer) in enumerate(requests_of(self.conversation.messages, self.window), 1):
                request = [self.conversation.persona, *visible]
                self.added.append(self.timed(api, request, answer) - self.timed(direct, request, answer))
                if number % 50 == 0:
                    progress(
                        f"{self.conversation.id}: turn {number}, {len(visible)} messages shown, "
                        f"added {1000 * statistics.median(self.added[-50:]):.1f} ms"
                    )

    def timed(self, api, request: list[dict], answer: str) -> float:
        start = time.perf_counter()
        send(api, self.upstream, request, answer)
        return time.perf_counter() - start

    def ask(self) -> Asked:
        """Every question as a turn of its own."""
        asked = Asked()
        with client(self.server.url) as api:
            for question in self.conversation.questions:
                request = self.conversation.asking(question, self.window)
                received = send(api, self.upstream, request, ANSWER)
                prompt = received["body"]["messages"]
                asked.degraded += "degraded" in received["memory"]
                asked.shares.append(evidence_share(self.conversation.evidence(question), prompt))
                asked.blocks.append(memory_block(prompt))
                self.check(asked, question, prompt)
        return asked

    def check(self, asked: Asked, question: dict, prompt: list[dict]):
        """Count what must not be in a prompt: foreign memories, memories in sight, other branches' questions."""
        recalled = memories(asked.blocks[-1])
        known = [plain(text) for text in self.conversation.texts.values()]
        history = {plain(text_of(message)) for message in prompt[:-1]}
        asked.foreign += sum(not any(text.rstrip("….") in own for own in known) for text in recalled)
        asked.visible += sum(text in history for text in recalled)
        whole = plain("\n".join(map(text_of, prompt)))
        others = [item["question"] for item in self.conversation.questions if item is not question]
        asked.leaked += sum(plain(text) in whole for text in others)

    def ask_without(self) -> list[float]:
        """The evidence shares of the client's own messages, which must reach the upstream as they are."""
        shares = []
        with client(self.server.url) as api:
            for question in self.conversation.questions:
                request = self.conversation.asking(question, self.window)
                prompt = send(api, self.upstream, request, ANSWER, extra_headers={"X-Persona-Memory": "off"})
                if prompt["body"]["messages"] != request:
                    raise SystemExit("a request with X-Persona-Memory: off reached the upstream changed")
                kept = newest_that_fit(request, self.context - MAX_TOKENS)
                shares.append(evidence_share(self.conversation.evidence(question), kept))
        return shares

    def run(self) -> dict:
        self.play()
        first, without = self.ask(), self.ask_without()
        self.server.kill()
        self.server.start().wait_ready()
        return self.figures(first, without, self.ask())

    def figures(self, first: Asked, without: list[float], again: Asked) -> dict:
        same = [before == after for before, after in zip(first.blocks, again.blocks, strict=True)]
        return {
            "conversation": self.conversation.id,
            "messages": len(self.conversation.messages),
            "with %": share(first.shares),
            "without %": share(without),
            "restarted %": share(again.shares),
            "identical %": share(same),
            "recalled": mean([len(memories(block)) for block in first.blocks]),
            "block tokens": mean([count(block) for block in first.blocks]),
            "added ms": round(1000 * statistics.median(self.added), 1),
            "p95 ms": round(1000 * percentile(self.added, 0.95), 1),
            "foreign": first.foreign + again.foreign,
            "in sight": first.visible + again.visible,
            "leaked": first.leaked + again.leaked,
            "degraded": first.degraded + again.degraded,
        }


# ---------------------------------------------------------------------------- figures


def mean(values: list[float]) -> float:
    return round(statistics.mean(values), 1) if values else 0.0


def share(values: list) -> float:
    return round(100 * statistics.mean(values), 1) if values else 0.0


def mean_row(rows: list[dict]) -> dict:
    """The mean of every column; sums where a column counts what must not happen."""
    summed = ("messages", "foreign", "in sight", "leaked", "degraded")
    return {
        key: "mean"
        if key == "conversation"
        else sum(row[key] for row in rows)
        if key in summed
        else mean([row[key] for row in rows])
        for key in rows[0]
    }


def run_way(label: str, window: int | None, conversations: list[Conversation], args) -> dict:
    """All conversations through one server, with a fresh data directory."""
    rows = []
    with (
        tempfile.TemporaryDirectory() as data,
        Upstream() as upstream,
        Server(data, upstream.url, "--context", args.context, *["--lean"] * args.lean) as server,
    ):
        server.wait_ready()
        for conversation in conversations:
            start = time.perf_counter()
            rows.append(Player(conversation, server, upstream, window, args.context).run())
            progress(f"{label}: {conversation.id} took {time.perf_counter() - start:.0f} s")
    print(f"client shows: {label}")
    print_table([*rows, mean_row(rows)])
    return {"rows": rows, "mean": mean_row(rows)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--conversations", type=int, help="only the first so many")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--window", default="both", help="messages that the client shows: a number, `full`, or `both`")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--lean", action="store_true", help="start the program with --lean")
    parser.add_argument("--names", action="store_true", help="send the speakers' names with the messages")
    args = parser.parse_args()
    recorded = json.loads(args.data.read_text("utf-8"))["conversations"][: args.conversations]
    conversations = [Conversation(item, args.questions, args.names) for item in recorded]
    windows = {"both": (None, 20), "full": (None,)}.get(args.window) or (int(args.window),)
    labels = {window: f"its newest {window} messages" if window else "the whole chat" for window in windows}
    ways = {labels[window]: run_way(labels[window], window, conversations, args) for window in windows}
    print(
        json.dumps(
            {
                "benchmark": "locomo",
                "context": args.context,
                "questions": args.questions,
                "names": args.names,
                "lean": args.lean,
                "ways": ways,
            }
        )
    )


if __name__ == "__main__":
    main()
