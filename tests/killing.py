"""The program killed in the middle of everything, again and again, and what its clients can count on afterwards.

A `Scene` is one data folder and clients that work on it at once: turns in named and unnamed chats, imports, chats made
and deleted; summaries and vectors go on behind them. Each round starts a server, lets the clients work for a moment,
kills it as a power cut would, and has another one tell what is there.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import httpx
from fakes import PATIENCE, free_port, health, settings, wait_until

import persona_memory as pm

API = "/api/persona_memory"
PERSONA = {"role": "system", "content": "You are Maren, keeper of the lighthouse on the Teeth."}
PROCESSES = multiprocessing.get_context("forkserver")  # a server starts at once: all is imported already
PROCESSES.set_forkserver_preload(["killing"])
FILLER = "The ferry leaves at noon, and the red key stays with the abbot until the lamps are lit again."


def serve(given: pm.Settings) -> None:
    """The program, in a process of its own that has imported it already."""
    server = pm.create_server(given)
    server.run()


class Scene:
    """What clients were told, and what there is of it. `counts` holds how often something was `lost`, stood there
    `twice`, was a `ghost`, did `not open`, or was `salvaged` from a file taken for damaged; and how much was
    acknowledged."""

    def __init__(self, data: Path, upstream_url: str, embedders: list[str], number: int = 0):
        self.data, self.upstream_url, self.embedders = data, upstream_url, embedders
        self.dice, self.counts = random.Random(number), Counter()
        self.said: dict[str, list[dict]] = {}  # by chat: what its client shows
        self.imported: dict[str, list[str]] = {}
        self.deleted: dict[str, str] = {}  # by chat: a text of it
        self.round = 0

    def play(self, seconds: float, soon: bool = False) -> None:
        """One round: a server, work, the kill so many seconds after the first acknowledgement, or as soon as the server
        answers; another server, a look at everything that was worked on."""
        self.round += 1
        with self.server() as url:
            stop, works = threading.Event(), (self.turns, self.unnamed_turns, self.imports, self.deletions)
            threads = [threading.Thread(target=self.until, args=(stop, work, url), daemon=True) for work in works]
            for thread in threads:
                thread.start()
            before = self.counts["acknowledged"]
            if not soon:
                wait_until(lambda: self.counts["acknowledged"] > before, "the first acknowledgement")
            time.sleep(seconds)
            self.process.kill()
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
        with self.server() as url:
            self.look(url)

    @contextlib.contextmanager
    def server(self):
        """A server's address for as long as the block runs; it is killed at its end."""
        port, embedder = free_port(), self.embedders[self.round // 4 % len(self.embedders)]
        given = settings(self.data, self.upstream_url, port=port, summary_every=4, context=1024, embedder=embedder)
        self.process = PROCESSES.Process(target=serve, args=(given,), daemon=True)
        self.process.start()
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: health(url), "the server's /health")
        try:
            yield url
        finally:
            self.process.kill()
            self.process.join()

    def until(self, stop: threading.Event, work, url: str) -> None:
        """Works on and on until the server is gone."""
        with httpx.Client(base_url=url, timeout=PATIENCE) as api:
            number = 0
            while not stop.is_set():
                number += 1
                try:
                    work(api, f"{self.round}-{number}")
                except httpx.TransportError:
                    stop.wait(0.05)

    def turns(self, api: httpx.Client, mark: str, chat: str = "tale") -> None:
        """A turn; the same again, as a client does it, where the last one was not answered."""
        shown = self.said.setdefault(chat, [])
        if not shown or shown[-1]["role"] == "assistant":
            shown.append({"role": "user", "content": f"turn {chat} {mark}: {FILLER}"})
        headers = {"X-Chat-Id": chat} if chat == "tale" else {}
        body = {"model": "fake-model", "messages": [PERSONA, *shown], "persona_memory": {"character": "Maren"}}
        answer = api.post("/v1/chat/completions", json=body, headers=headers).raise_for_status()
        if answer.headers["X-Persona-Memory"].startswith("degraded; reason=store"):
            self.counts["not open"] += 1
        shown.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]})
        shown[-2]["kept"] = True  # an unknown field, which the program passes on
        self.counts["acknowledged"] += 1

    def unnamed_turns(self, api: httpx.Client, mark: str) -> None:
        """A turn of a chat that its transcript names."""
        self.turns(api, mark, chat=f"unnamed {self.round // 5}")

    def imports(self, api: httpx.Client, mark: str) -> None:
        """A chat file."""
        texts = [f"import {mark} {n}: {FILLER}" for n in range(40)]
        rows = [
            {"name": "Ann" if n % 2 == 0 else "Maren", "is_user": n % 2 == 0, "mes": t} for n, t in enumerate(texts)
        ]
        lines = [{"user_name": "Ann", "character_name": "Maren"}, *rows]
        chat = f"import {mark}"
        api.post(
            f"{API}/import", params={"chat_id": chat}, content="\n".join(map(json.dumps, lines))
        ).raise_for_status()
        self.imported[chat] = texts
        self.counts["acknowledged"] += len(texts)

    def deletions(self, api: httpx.Client, mark: str) -> None:
        """A chat that is made and deleted."""
        chat, text = f"doomed {mark}", f"secret{mark.replace('-', 'x')}of{self.dice.randrange(10**9)}"
        place = f"{API}/chats/{quote(chat)}"
        api.post(f"{place}/messages", json={"messages": [{"role": "user", "content": text}]}).raise_for_status()
        api.delete(place).raise_for_status()
        self.deleted[chat] = text
        self.counts["deleted"] += 1

    def look(self, url: str, everything: bool = False) -> None:
        """Compares what is there with what was acknowledged, in this round or, with `everything`, ever."""
        with httpx.Client(base_url=url, timeout=PATIENCE) as api:
            [listed] = wait_until(lambda: self.listed(api), "the list of chats")
            for chat, shown in self.said.items():
                if everything or chat in ("tale", f"unnamed {self.round // 5}"):
                    self.look_at_turns(api, chat, shown, listed)
            recent = [c for c in self.imported if everything or c.startswith(f"import {self.round}-")]
            for chat in recent:
                self.compare(self.texts(api, chat), self.imported[chat])
            for line in listed if everything else [line for line in listed if f" {self.round}-" in line["chat_id"]]:
                answer = api.get(f"{API}/chats/{quote(line['chat_id'], safe='')}")
                self.counts["ghosts"] += answer.status_code == 404
                self.counts["not open"] += answer.status_code not in (200, 404)
            for chat in [c for c in self.deleted if everything or c.startswith(f"doomed {self.round}-")]:
                self.counts["undeleted"] += chat in {line["chat_id"] for line in listed}
            if everything:
                self.counts["salvaged"] += sum(bool(line["salvaged"]) for line in listed)
                raw = b"".join(file.read_bytes() for file in self.data.rglob("*") if file.is_file())
                self.counts["undeleted"] += sum(text.encode() in raw for text in self.deleted.values())

    def finish(self) -> dict:
        """A last look at everything, some minutes later: what was only begun is gone then. Returns the counts."""
        for file in (self.data / "chats").rglob("*"):
            os.utime(file, (0, 0))
        with self.server() as url, httpx.Client(base_url=url, timeout=PATIENCE) as api:
            wait_until(lambda: not self.orphans(api), "no chat that was only begun")
            self.look(url, everything=True)
        return dict(self.counts)

    def orphans(self, api: httpx.Client) -> set[str]:
        """Folders that no listed chat is in, and listed chats without a message."""
        lines = api.get(f"{API}/chats").json()
        folders = {folder.name for folder in (self.data / "chats").iterdir() if "." not in folder.name}
        return folders ^ {pm.chat_folder(line["chat_id"]) for line in lines if line["messages"]}

    def listed(self, api: httpx.Client) -> list[list[dict]]:
        """The list of chats, if it can be had."""
        answer = api.get(f"{API}/chats")
        if answer.status_code != 200:
            self.counts["not open"] += 1
        return [answer.json()] if answer.status_code == 200 else []

    def texts(self, api: httpx.Client, chat: str) -> list[str]:
        """The texts of all of a chat's messages, on every branch."""
        answer = api.get(f"{API}/chats/{quote(chat, safe='')}/export")
        self.counts["not open"] += answer.status_code not in (200, 404)
        return [m["content"] for m in answer.json()["messages"]] if answer.status_code == 200 else []

    def look_at_turns(self, api: httpx.Client, chat: str, shown: list[dict], listed: list[dict]) -> None:
        """Compares a chat of turns, the unnamed one being where its first message is."""
        told = [m["content"] for m in shown if m["role"] == "user" and m.get("kept")]
        if not told:
            return
        names = [chat] if chat == "tale" else [c["chat_id"] for c in listed if c["chat_id"].startswith("chat-")]
        held = [texts for texts in (self.texts(api, name) for name in names) if told[0] in texts]
        self.counts["twice"] += len(held) > 1
        self.compare(held[0] if held else [], told)

    def compare(self, texts: list[str], told: list[str]) -> None:
        """Counts what was told and is not among the texts, and what is there more than once."""
        counted = Counter(texts)
        self.counts["lost"] += sum(text not in counted for text in told)
        self.counts["twice"] += sum(counted[text] > 1 for text in told)
