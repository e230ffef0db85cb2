"""The story so far: how small summaries are, what survives in them, and how still they keep the prompt's beginning.

    python tests/bench/story.py --data conversations.json                    extracts alone (LoCoMo's form)
    python tests/bench/story.py --data conversations.json --upstream local   the embedded model, else extracts
    python tests/bench/story.py --data conversations.json --upstream URL     any other model
    python tests/bench/story.py --messages 2000                              a long made chat through the proxy

Reduction is 1 - tokens of a summary / tokens of what it was made from. Facts are the names, places, dates and numbers
in the gold answers of questions whose evidence lies in what was summarised; their share in the story is what a reader
of the story alone could still answer with. `story` is what a prompt shows, `level 1` all summaries of messages.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from fakes import LocalServer, Upstream, say, settings
from prefix import print_table, progress, requests_of, roleplay

import persona_memory as pm

CONTEXT, EVERY = 8192, 20
SHARES = pm.parse_shares(pm.Settings.budget)


class Extracting(pm.Summarizer):
    """Asks no model."""

    def _asker(self, *_):
        return None


# ---------------------------------------------------------------------------- recorded conversations


def told(conversation: dict, data: Path, args) -> tuple[pm.ChatStore, int]:
    """A conversation's chat with its story told, and how many of its messages that covers."""
    engine = pm.PersonaMemory(
        pm.Settings(data=str(data), upstream=args.upstream, proxy=bool(args.upstream), summary_calls=0)
    )
    if not args.upstream:
        engine.storyteller = Extracting(engine.settings, engine.upstream, engine.embedder.name)
    engine.start()
    user = conversation["speakers"][0]
    engine.archive.append(
        conversation["id"],
        [
            {"role": "user" if t["speaker"] == user else "assistant", "name": t["speaker"], "content": t["text"]}
            for t in conversation["turns"]
        ],
    )
    engine.recaller.search(conversation["id"], "hello")  # waits for the vectors
    with engine.registry.borrow(conversation["id"]) as chat:
        end = min(len(conversation["turns"]) // EVERY, args.stretches or 10**6) * EVERY
        for until in range(EVERY, end + 1, EVERY):
            plan = pm.SummaryPlan(chat.store.head, 0, until, pm.story_tokens(CONTEXT, SHARES), CONTEXT)
            engine.summarizer.summarize_branch(chat, plan)
            progress(f"{conversation['id']}: {until} of {end} messages")
    engine.close()
    return chat.store, end


def gold_terms(conversation: dict, end: int) -> set[str]:
    """Names, places, dates and numbers in the answers whose evidence stands among the first `end` messages."""
    covered = {turn["id"] for turn in conversation["turns"][:end]}
    terms = set()
    for question in conversation["questions"]:
        if question["category"] in (1, 2, 3, 4) and question["evidence"] and covered.issuperset(question["evidence"]):
            terms |= set(re.findall(r"\b(?:[A-Z][\w'-]{2,}|\d[\d:.,]*)\b", str(question["answer"])[1:]))
    return terms


def share_in(terms: set[str], text: str) -> float:
    """The share of terms that stand in a text."""
    return sum(term.lower() in text.lower() for term in terms) / len(terms) if terms else 0.0


def measure_conversations(args) -> None:
    """Prints reduction by level, who wrote the summaries, and what survives."""
    rows, survived, sources = defaultdict(list), [], defaultdict(int)
    conversations = json.loads(Path(args.data).read_text("utf8"))["conversations"][: args.conversations]
    for conversation in conversations:
        with tempfile.TemporaryDirectory() as folder:
            store, end = told(conversation, Path(folder), args)
        for summary in store.summaries.values():
            rows[summary.level].append(1 - summary.tokens / summary.covered)
            sources[summary.source] += 1
        path = store.tree.path(store.head)
        story = pm.Places([store.tree.nodes[m].digest for m in path]).story(store.summaries.values())
        terms = gold_terms(conversation, end)
        first = " ".join(s.text for s in store.summaries.values() if s.level == 1)
        shown = " ".join(s.text for s in story)
        survived.append(
            (share_in(terms, shown), share_in(terms, first), sum(s.tokens for s in story), len(store.facts))
        )
    print_table(
        [
            {"level": n, "summaries": len(r), "reduction mean": f"{statistics.mean(r):.1%}", "least": f"{min(r):.1%}"}
            for n, r in sorted(rows.items())
        ]
    )
    means = [statistics.mean(column) for column in zip(*survived, strict=True)]
    print(f"written by: {dict(sources)}")
    print(f"gold terms in the story: {means[0]:.1%}, in all level 1 summaries: {means[1]:.1%}")
    print(
        f"story: {means[2]:.0f} tokens of {pm.story_tokens(CONTEXT, SHARES)}; facts kept: {means[3]:.1f} a conversation"
    )


# ---------------------------------------------------------------------------- a long chat through the proxy


def retelling(body: dict) -> str | None:
    """What a well-behaved model would answer to a request for a summary; None for a turn."""
    if not body["messages"][0]["content"].startswith(pm.ENGLISH.retell[:30]):
        return None
    rows = [("", line.split(": ", 1)[-1], 0.0) for line in body["messages"][-1]["content"].splitlines()]
    return json.dumps({"summary": pm.extract_summary(rows, 140), "facts": []})


def measure_chat(messages: int) -> None:
    """Prints how often the prompt's beginning changes, and the story's size, over a long chat."""
    persona = {"role": "system", "content": "You are Ilse, keeper of the Lantern Inn."}
    chat = requests_of(roleplay(messages // 2))
    answers = iter([])
    with tempfile.TemporaryDirectory() as folder, Upstream() as upstream:
        upstream.steer(reply=lambda body: retelling(body) or next(answers))
        with LocalServer(settings(folder, upstream.url, context=CONTEXT, summary_every=EVERY)) as server:
            changes, sizes, before = [], [], None
            for number, (shown, answer) in enumerate(chat):
                answers = iter([answer])
                say(server.url, [persona, *shown], stream=False, chat_id="long")
                turns = [c["body"]["messages"] for c in upstream.chats if retelling(c["body"]) is None]
                upstream.requests.clear()
                prompt = turns[-1]
                if before is not None and prompt[: len(before) - 1] != before[:-1]:
                    changes.append(2 * number)
                before = prompt
                report = server.server.memory.prompts("long", 1)[0]
                sizes.append((report["tokens"].get("story", 0), report["summaries"]))
                if number % 50 == 49:
                    progress(f"{2 * number + 2} of {messages} messages")
    gaps = [b - a for a, b in zip(changes, changes[1:], strict=False)]
    share = pm.story_tokens(CONTEXT, SHARES)
    print(f"the prompt's beginning changed {len(changes)} times in {messages} messages;", end=" ")
    print(f"messages between changes: least {min(gaps)}, median {statistics.median(gaps)}")
    print(f"story: at most {max(s for s, _ in sizes)} tokens of {share}, at most {max(n for _, n in sizes)} summaries")


def main() -> None:
    """Reads the options, prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="recorded conversations in LoCoMo's form")
    parser.add_argument("--conversations", type=int)
    parser.add_argument("--stretches", type=int, help="how many stretches of a conversation are summarised")
    parser.add_argument("--upstream", default="", help="local, gemini, a URL or a .gguf file; none: extracts alone")
    parser.add_argument("--messages", type=int, help="length of a made chat")
    args = parser.parse_args()
    if args.data:
        measure_conversations(args)
    if args.messages:
        measure_chat(args.messages)


if __name__ == "__main__":
    main()
