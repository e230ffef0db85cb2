"""Plays the chats of tests/data through the program, as a client that names its speakers would."""

from __future__ import annotations

import json
import re

from chats import read_chat
from fakes import say

PERSONA = (
    "You are Maren Oldwick, keeper of the lighthouse on the Teeth, forty-four, dry-witted and stubborn. You have kept "
    "the lamp alone for eleven winters, with the grey cat Bosun. You speak plainly, distrust millers, and never leave "
    "a boat unwarned. You do not speak of your husband Edric unless you trust someone.\n\nScenario: a storm has "
    "driven the sellsword Tobin to your door. He is looking for his sister Ysolde, who sailed on the Wandering Heron."
)


def messages(name: str, user: str) -> list[dict]:
    """The chat as messages, with names where the file gives some."""
    rows = [(m.name or m.role, m.content) for m in read_chat(f"roleplay_{name}")[0]]
    rows = [("user" if speaker == user else "assistant", speaker, text) for speaker, text in rows]
    return [{"role": r, "content": t} | ({"name": s} if s != r and s != "user" else {}) for r, s, t in rows]


def play(url: str, upstream, chat: list[dict], persona: str = PERSONA, window: int = 0, **how) -> str:
    """Sends every turn of a chat with its recorded reply, the newest `window` messages of it at most where that is set;
    returns the chat's id."""
    chat_id = None
    for place, message in enumerate(chat):
        if message["role"] != "assistant" or place == 0:
            continue
        upstream.steer(reply=lambda body, text=message["content"]: chronicle(body) or text)
        shown = [{"role": "system", "content": persona}, *chat[max(0, place - window) if window else 0 : place]]
        chat_id = say(url, shown, **how).chat_id or chat_id
    return chat_id


def chronicle(body: dict) -> str:
    """A model's answer to a request for a summary: sentences of the chat, and a fact; empty for any other request."""
    task, told = body["messages"][0]["content"], body["messages"][-1]["content"]
    if "chronicle" not in task:
        return ""
    said = [re.fullmatch(r"#(\d+) ([^:(]+)(?: \([^)]*\))?: (.*)", line) for line in told.splitlines()]
    if not all(said):
        return json.dumps({"summary": told.splitlines()[0], "facts": []})
    telling = sorted(said, key=lambda line: len(line[3]))[-7:]
    summary = " ".join(re.sub(r"\*[^*]+\* ?", "", line[3]).strip() for line in said if line in telling)
    fact = telling[-1]
    quote = re.split(r"[.!?*]", fact[3].strip("* "))[0]
    facts = [{"about": f"line {fact[1]}", "fact": f"{quote}.", "message": int(fact[1]), "quote": quote}]
    return json.dumps({"summary": summary, "facts": facts})
