"""What a model still knows of a chat that has outgrown its prompt: with memory, without, and with the evidence given.

    python tests/bench/forgetting.py                              the embedded model answers
    python tests/bench/forgetting.py --upstream URL --model NAME  any other one, with `--key` where it asks for one

Facts are planted in a made chat, each once; after 50, 100, 200 and 400 messages they are asked for as a user asks, and
the persona is asked about itself. The client shows its newest messages. `without` is the same request in a chat that
stores nothing else; in `given` the message that tells the fact stands right before the question, with its reply: what
this model makes of the evidence in a chat that it sees whole. No answer can be guessed from the question. `right` is
the share of replies that hold the answer; `log p` the mean, over the questions, of the highest log-probability that any
token of the reply had of beginning the answer, where the server tells it among the 20 likeliest (the 20th's where it is
not among them).
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fakes import Server, health, wait_until  # noqa: E402
from prefix import FETCHING, SAYINGS, WISHES, print_table, progress, speech  # noqa: E402

SHOWN = 8  # messages that the client shows
PERSONA = (
    "You are Ilse, keeper of the Lantern Inn in the town of Harrowmere. Your lame dog is called Bracken. You were a "
    "smuggler's pilot before, and you swear by the river. You answer questions in a few plain words."
)
FACTS = (  # what the user says, the question, and the answer
    ("My sister's name is Margarethe, she writes every week.", "What is my sister's name?", "Margarethe"),
    ("I was born in Lisbon, in the old part of town.", "Where was I born?", "Lisbon"),
    ("My horse is called Pepper and bites everyone but me.", "What is my horse called?", "Pepper"),
    ("I am a carpenter by trade, like my father.", "What is my trade?", "carpenter"),
    ("My favourite dish is pumpkin soup with bread.", "What is my favourite dish?", "pumpkin"),
    ("I am terribly afraid of geese, I must confess.", "Which animal am I afraid of?", "geese"),
    ("I play the bassoon, though only when nobody listens.", "Which instrument do I play?", "bassoon"),
    ("My best friend Theodore sailed to Iceland last spring.", "Who is my best friend?", "Theodore"),
    ("My birthday is in February, on a Sunday this year.", "In which month is my birthday?", "February"),
    ("I lost my left thumb to a saw when I was twelve.", "What did I lose to a saw?", "thumb"),
    ("The password to my strongbox is 'marigold'.", "What is the password to my strongbox?", "marigold"),
    ("I am saving money for a windmill of my own.", "What am I saving money for?", "windmill"),
    ("My favourite colour is turquoise, like the old tiles.", "What is my favourite colour?", "turquoise"),
    ("I grew up with my uncle Barnaby, who was a tinker.", "Which uncle did I grow up with?", "Barnaby"),
    ("I never eat mushrooms, they make me ill.", "What do I never eat?", "mushroom"),
    ("My daughter Philippa will be nine at midsummer.", "What is my daughter's name?", "Philippa"),
    ("I hid the map inside the grandfather clock.", "Where did I hide the map?", "clock"),
    ("I served three years as a drummer in the army.", "What was I in the army?", "drummer"),
    ("I am on my way to Salzburg to see a notary.", "Which town am I on my way to?", "Salzburg"),
    ("My cat is called Biscuit and sleeps in the oven.", "What is my cat called?", "Biscuit"),
    ("I collect thimbles, I own more than two hundred.", "What do I collect?", "thimble"),
    ("I owe the miller forty guilders since the flood.", "To whom do I owe money?", "miller"),
    ("My old teacher was Professor Quillfeather.", "Who was my old teacher?", "Quillfeather"),
    ("I carry a brass compass that was my mother's.", "What do I carry that was my mother's?", "compass"),
)
QUIZ = (
    ("What is your dog called?", "Bracken"),
    ("What is your inn called?", "Lantern"),
    ("In which town is your inn?", "Harrowmere"),
    ("What were you before you kept an inn?", "pilot"),
)


def chat(messages: int, facts: int) -> list[dict]:
    """A chat of so many messages, the facts in the first half of it, in the user's."""
    rng, places = random.Random(messages), {}
    users = range(0, max(2 * facts, (messages - SHOWN) // 2), 2)
    for place, fact in zip(sorted(rng.sample(users, facts)), FACTS, strict=False):
        places[place] = fact[0]
    texts = [speech(rng, places.get(n, ""), WISHES if n % 2 == 0 else SAYINGS) for n in range(messages)]
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def ask(client: httpx.Client, url: str, given, chat_id: str, shown: list[dict], question: str) -> dict:
    """The reply's choice to a question after those messages."""
    body = {
        "model": given.model, "chat_id": chat_id, "max_tokens": 40, "temperature": 0, "logprobs": True,
        "top_logprobs": 20,
        "messages": [{"role": "system", "content": PERSONA}, *shown, {"role": "user", "content": question}],
    }  # fmt: skip
    answer = client.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
    return answer.json()["choices"][0] | {"memory": answer.headers.get("x-persona-memory", "")}


def best_logprob(choice: dict, answer: str) -> float | None:
    """The highest log-probability that a token of the reply begins the answer."""
    found = []
    for place in (choice.get("logprobs") or {}).get("content") or []:
        likely = place.get("top_logprobs") or []
        begun = [t["logprob"] for t in likely if begins(t["token"], answer)]
        found += [max(begun)] if begun else [min(t["logprob"] for t in likely)] if likely else []
    return max(found, default=None)


def begins(token: str, answer: str) -> bool:
    """Whether a token, of two letters at least, begins the answer."""
    text = token.strip().lower()
    return len(text) > 1 and answer.lower().startswith(text)


def measure(client: httpx.Client, url: str, given, count: int) -> list[dict]:
    """The rows of one chat length."""
    stored, facts = chat(count, given.facts), FACTS[: given.facts]
    shown, found = (
        stored[-SHOWN:],
        {"with memory": [], "without": [], "given": [], "persona, with": [], "without it": []},
    )
    client.post(f"{url}/api/persona_memory/chats/c{count}/messages", json={"messages": stored}).raise_for_status()
    client.get(f"{url}/api/persona_memory/chats/c{count}/search", params={"q": "vectors"}).raise_for_status()
    for number, (fact, question, answer) in enumerate(facts):
        at = next(n for n, message in enumerate(stored) if message["content"].startswith(fact))
        handed = [*shown[2:], *stored[at : at + 2]]
        for kind, chat_id, visible in (
            ("with memory", f"c{count}", shown), ("without", f"w{count}-{number}", shown),
            ("given", f"g{count}-{number}", handed),
        ):  # fmt: skip
            found[kind].append((ask(client, url, given, chat_id, visible, question), answer))
    for number, (question, answer) in enumerate(QUIZ):
        found["persona, with"].append((ask(client, url, given, f"c{count}", shown, question), answer))
        found["without it"].append((ask(client, url, given, f"q{count}-{number}", shown, question), answer))
    return [row(count, kind, asked) for kind, asked in found.items()]


def row(count: int, kind: str, asked: list[tuple[dict, str]]) -> dict:
    texts = [(choice["message"]["content"] or "", answer) for choice, answer in asked]
    logs = [p for choice, answer in asked if (p := best_logprob(choice, answer)) is not None]
    recalled = [int(c["memory"].split("recalled=")[1].split()[0]) for c, _ in asked if "recalled=" in c["memory"]]
    return {
        "messages": count, "kind": kind, "asked": len(asked),
        "right": round(statistics.mean(answer.lower() in text.lower() for text, answer in texts), 3),
        "log p": round(statistics.mean(logs), 2) if logs else None,
        "recalled": round(statistics.mean(recalled), 1) if recalled else 0,
    }  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--facts", type=int, default=len(FACTS), help="how many are planted")
    parser.add_argument("--upstream", default="local", help="`local`, a model file, or the address of a server")
    parser.add_argument("--model", default="local")
    parser.add_argument("--key", default="", help="for the upstream")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--lean", action="store_true", help="with the program's --lean")
    given = parser.parse_args()
    headers = {"Authorization": f"Bearer {given.key}"} if given.key else {}
    more = ["--lean"] if given.lean else []
    rows, begun = [], time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as data,
        Server(data, given.upstream, "--context", given.context, "--no-guidance", *more) as server,
        httpx.Client(timeout=FETCHING, headers=headers) as client,
    ):
        wait_until(lambda: (health(server.url) or {}).get("status") == "ok", "the models", timeout=FETCHING)
        for count in given.messages:
            rows += measure(client, server.url, given, count)
            progress(f"{count} messages: {time.perf_counter() - begun:.0f} s")
    print_table(rows)
    print(json.dumps({"benchmark": "forgetting", "model": given.upstream, "context": given.context, "rows": rows}))


if __name__ == "__main__":
    main()
