"""A small SillyTavern: keeps a chat as a list of messages and sends what the real one sends for each action.

The order and the shape of the request bodies follow SillyTavern's "Custom (OpenAI-compatible)" chat completions.
Nothing in them names the chat, the character or the user; editing, deleting and swiping back send nothing.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from dataclasses import dataclass
from urllib.parse import unquote

import httpx
from fakes import PATIENCE, Reply

HEADERS = {"Authorization": "Bearer undefined", "User-Agent": "node-fetch/1.0 (+https://github.com/bitinn/node-fetch)"}
SAMPLING = {"presence_penalty": 0, "frequency_penalty": 0, "top_p": 1, "logit_bias": {}}


@dataclass(frozen=True)
class Character:
    """A character card."""

    name: str
    description: str
    greeting: str
    personality: str = ""
    examples: tuple[tuple[str, str], ...] = ()
    post_history: str = ""


class Message:
    """A message of the chat with its swipes, of which one is chosen."""

    def __init__(self, role: str, text: str, name: str):
        self.role, self.name = role, name
        self.swipes, self.chosen = [text], 0

    @property
    def text(self) -> str:
        return self.swipes[self.chosen]

    @text.setter
    def text(self, text: str):
        self.swipes[self.chosen] = text

    def add_swipe(self, text: str):
        self.swipes.append(text)
        self.chosen = len(self.swipes) - 1


class Client:
    """One chat. `window`: only the newest messages fit the client's own context; the greeting is dropped first.

    `note` and `note_depth`: the author's note and how many messages stand after it. `group`: the members' names;
    replies then carry their speaker's name. `strict`: system messages become user messages and neighbours of one
    role are merged, as versions before 1.13 do it. `processing` is the post-processing of newer ones: "merge", "semi",
    "strict" or "single"; `names` says that all texts begin with their speaker's name. `headers` and `body` are what the
    user's "include headers / body" settings add. `answer` is the last request's answer, `sent` holds the bodies of all
    requests.
    """

    processing, names = "", False

    def __init__(
        self,
        url: str,
        character: Character,
        *,
        user: str = "Robin",
        window: int | None = None,
        note: str = "",
        note_depth: int = 4,
        group: tuple[str, ...] = (),
        strict: bool = False,
        max_tokens: int = 300,
        headers: dict | None = None,
        body: dict | None = None,
        http: httpx.Client | None = None,
    ):
        self.url, self.character, self.user, self.window = url, character, user, window
        self.note, self.note_depth, self.group, self.strict = note, note_depth, group, strict
        self.max_tokens, self.headers, self.extra_body = max_tokens, headers or {}, body or {}
        self.http = http or httpx.Client(timeout=PATIENCE)
        self.chat = [Message("assistant", character.greeting, character.name)]
        self.answer: Reply | None = None
        self.sent: list[dict] = []

    # -- what the user does

    def send(self, text: str, **how) -> Reply:
        """Write a message and let the character reply."""
        self.chat.append(Message("user", text, self.user))
        return self.reply(**how)

    def reply(self, character: Character | None = None, **how) -> Reply:
        """Let the character (in a group: this member) reply to the chat as it stands."""
        self.character = character or self.character
        answer = self.post(self.body(self.chat), **how)
        if answer.text:
            self.chat.append(Message("assistant", answer.text, self.character.name))
        return answer

    def regenerate(self, **how) -> Reply:
        """Throw the last reply away, if there is one, and ask again."""
        if self.chat[-1].role == "assistant":
            self.chat.pop()
        return self.reply(**how)

    def swipe(self, **how) -> Reply:
        """Ask for another reply beside the last one."""
        answer = self.post(self.body(self.chat[:-1]), **how)
        if answer.text:
            self.chat[-1].add_swipe(answer.text)
        return answer

    def swipe_back(self, chosen: int = 0):
        """Choose an earlier swipe of the last reply."""
        self.chat[-1].chosen = chosen

    def edit(self, index: int, text: str):
        """Change a message's text."""
        self.chat[index].text = text

    def delete(self, index: int):
        """Delete this message and all that follow."""
        del self.chat[index:]

    def branch(self, index: int) -> Client:
        """A new chat that begins with a copy of this one up to and with this message; this one stays as it is."""
        other = copy.copy(self)
        other.chat, other.sent = copy.deepcopy(self.chat[: index + 1]), []
        return other

    def continue_(self, nudge: bool = True, **how) -> Reply:
        """Let the last reply go on: asked for by a system message, or by the reply simply standing last."""
        last = self.chat[-1]
        text = (
            "[Continue the following message. Do not include ANY parts of the original message. "
            f"Use capitalization and punctuation as if your reply is a part of the original message: {last.text}]"
        )
        answer = self.post(self.body(self.chat, [text] if nudge else []), **how)
        if answer.text:
            last.text = f"{last.text} {answer.text}"
        return answer

    def impersonate(self) -> Reply:
        """Let the model write what the user might say: the answer goes to the input box, not into the chat."""
        return self.post(
            self.body(
                self.chat,
                [
                    f"[Write your next reply from the point of view of {self.user}, using the chat history so far as a "
                    f"guideline for the writing style of {self.user}. Don't write as {self.character.name} or system.]"
                ],
            )
        )

    def quiet(self, instruction: str) -> Reply:
        """A quiet prompt over the chat as it stands, as the Summarize extension sends it."""
        return self.post({**self.body(self.chat, [instruction]), "stream": False})

    def raw(self, instruction: str, system: str = "") -> Reply:
        """A raw prompt: nothing of the chat goes with it."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": instruction})
        return self.post({**self.shaped(messages), "stream": False})

    # -- what is kept

    def file(self) -> str:
        """The chat as the file that the client keeps of it; a group's has no header."""
        header = {"user_name": self.user, "character_name": self.character.name, "chat_metadata": {"tainted": True}}
        rows = [] if self.group else [header]
        return "".join(json.dumps(row) + "\n" for row in [*rows, *map(self.row, self.chat)])

    def row(self, message: Message) -> dict:
        """A message's line in the file."""
        row = {
            "name": message.name,
            "is_user": message.role == "user",
            "is_system": False,
            "send_date": "November 22, 2026 10:53am",
            "mes": message.text,
            "extra": {},
        }
        if message.role == "user":
            return row
        details = [{"send_date": row["send_date"], "extra": {}} for _ in message.swipes]
        return {**row, "swipes": message.swipes, "swipe_id": message.chosen, "swipe_info": details}

    # -- what is sent

    def body(self, history: list[Message], ending: list[str] = ()) -> dict:
        """The request for this history; `ending`: the action's own system messages, at the very end."""
        messages = [*self.leading(), *self.noted(self.visible(history))]
        if self.group:
            ending = [*ending, f"[Write the next reply only as {self.character.name}.]"]
        messages += [system(text) for text in (self.character.post_history, *ending) if text]
        return self.shaped(merged(messages) if self.strict else self.processed(messages))

    def processed(self, messages: list[dict]) -> list[dict]:
        """The messages after the post-processing of version 1.19."""
        speakers = {"user": self.user, "assistant": self.character.name}
        if self.processing == "single":
            texts = [(speakers.get(m["role"]), m["content"]) for m in messages]
            said = [f"{name}: {text}" if name and not text.startswith(f"{name}: ") else text for name, text in texts]
            return [{"role": "user", "content": "\n\n".join(said)}]
        messages = squashed(messages) if self.processing else messages
        if self.processing in ("semi", "strict"):
            messages = [{**m, "role": "user"} if i and m["role"] == "system" else m for i, m in enumerate(messages)]
            if self.processing == "strict" and len(messages) > 1 and messages[1]["role"] != "user":
                messages.insert(1, {"role": "user", "content": "[Start a new chat]"})
            messages = squashed(messages)
        return messages

    def shaped(self, messages: list[dict]) -> dict:
        return {
            "messages": messages,
            "model": "fake-model",
            "temperature": 1,
            "max_tokens": self.max_tokens,
            "stream": True,
            **SAMPLING,
            **self.extra_body,
        }

    def visible(self, history: list[Message]) -> list[Message]:
        """The part of the history that fits the client's context."""
        return history[-self.window :] if self.window else history

    def leading(self) -> list[dict]:
        """The card: prompts, then example dialogue, then the line that starts the chat."""
        card = self.character
        texts = [
            f"Write {card.name}'s next reply in a fictional chat between {card.name} and {self.user}.",
            card.description,
            f"[{card.name}'s personality: {card.personality}]" if card.personality else "",
        ]
        messages = [system(text) for text in texts if text]
        for question, answer in card.examples:
            messages += [
                system("[Example Chat]"),
                {"role": "system", "name": "example_user", "content": self.spoken(self.user, question)},
                {"role": "system", "name": "example_assistant", "content": self.spoken(card.name, answer)},
            ]
        start = f"[Start a new group chat. Group members: {', '.join(self.group)}]" if self.group else ""
        return [*messages, system(start or "[Start a new Chat]")]

    def noted(self, history: list[Message]) -> list[dict]:
        """The history with the author's note at its depth, counted from the end."""
        messages = [{"role": message.role, "content": self.line(message)} for message in history]
        if self.note:
            messages.insert(max(0, len(messages) - self.note_depth), system(self.note))
        return messages

    def line(self, message: Message) -> str:
        return self.spoken(message.name, message.text) if message.role == "assistant" or self.names else message.text

    def spoken(self, name: str, text: str) -> str:
        return f"{name}: {text}" if self.group or self.names else text

    # -- the wire

    def post(self, body: dict, stop_after: int | None = None) -> Reply:
        """Send a request and read the answer; `stop_after`: hang up after so many pieces of text."""
        self.sent.append(body)
        with self.http.stream(
            "POST", f"{self.url}/v1/chat/completions", json=body, headers={**HEADERS, **self.headers}
        ) as response:
            text, error = self.read(response, body["stream"], stop_after)
        chat_id = response.headers.get("X-Chat-Id")
        self.answer = Reply(
            text,
            unquote(chat_id) if chat_id else None,
            response.headers.get("X-Persona-Memory"),
            response.status_code,
            error,
        )
        return self.answer

    def read(self, response: httpx.Response, stream: bool, stop_after: int | None) -> tuple[str, str | None]:
        """The text and the error message of an answer, whatever came before the error included."""
        if response.status_code != 200 or not stream:
            response.read()
            answer = response.json()
            error = answer.get("error")
            return ("", error["message"]) if error else (answer["choices"][0]["message"]["content"], None)
        return joined(itertools.islice(pieces(response.iter_lines()), stop_after))


def system(text: str) -> dict:
    """A system message."""
    return {"role": "system", "content": text}


def merged(messages: list[dict]) -> list[dict]:
    """Strict post-processing: no system messages, names written into the text, no neighbours of one role."""
    return squashed([{**m, "role": "user" if m["role"] == "system" else m["role"]} for m in messages])


def squashed(messages: list[dict]) -> list[dict]:
    """The messages with neighbours of one role as one."""
    runs = itertools.groupby(messages, key=lambda message: message["role"])
    return [{"role": role, "content": "\n\n".join(m["content"] for m in run)} for role, run in runs]


def pieces(lines):
    """The (text, error) pairs of a stream, one for each event that says something."""
    for line in lines:
        if not line.startswith("data:") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data:"))
        if "error" in event:
            yield "", event["error"]["message"]
        # A chunk without `choices` ends the turn in the real client: a KeyError here is what a user would notice.
        elif event["choices"] and event["choices"][0]["delta"].get("content"):
            yield event["choices"][0]["delta"]["content"], None


def joined(pairs) -> tuple[str, str | None]:
    text, error = "", None
    for piece, failure in pairs:
        text, error = text + piece, failure or error
    return text, error


# ---------------------------------------------------------------------------- what the model got

MEMORIES = re.compile(r"^\[Earlier in this chat.*?^\[End of memories\][^\n]*\n*", re.M | re.S)


def memories_in(messages: list[dict]) -> str:
    """A prompt's memory block, or nothing."""
    return "".join(block for message in messages for block in MEMORIES.findall(message["content"]))


def without_memories(messages: list[dict]) -> list[dict]:
    """The prompt as it would be without its memory block."""
    left = [(message, MEMORIES.sub("", message["content"])) for message in messages]
    return [{**message, "content": text} for message, text in left if text or not message["content"]]
