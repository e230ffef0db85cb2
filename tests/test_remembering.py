"""What a turn's prompt gets of the past, through real turns: what is asked, what is chosen, and how it reads."""

import re
import shutil

import httpx
import numpy as np
import pytest
from chats import LANGUAGES, Encoder, open_chat, read_chat, recall_at, tiny_bert
from fakes import LocalServer, say, settings, wait_until
from multilingual import write_model, written_texts
from sillytavern import memories_in

import persona_memory as pm

PERSONA = {"role": "system", "content": "You are Mira, keeper of the light."}
TALK = [
    ("user", "I met Clara at the harbour, she sells maps of the northern isles."),
    ("assistant", "Clara? Her father drowned off the isles, she never sails."),
    ("user", "My sister gave me this silver compass before she left for Brest."),
    ("assistant", "Then guard it well."),
]
FILLER = [
    ("assistant" if n % 2 else "user", f"Step {n}: we walk on through the wet grass and count the posts by the ferry.")
    for n in range(60)
]

SEEN = ("whales", "seals", "ice", "terns", "fog", "kelp", "squid", "rain", "a wreck", "an isle", "smoke", "flags")
DOORS = (
    "red",
    "blue",
    "green",
    "black",
    "white",
    "gold",
    "iron",
    "oak",
    "stone",
    "glass",
    "bone",
    "salt",
    "ash",
    "rust",
)


def lines(*pairs) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.fixture(scope="module")
def running(shared_upstream, tmp_path_factory):
    """A proxy whose context holds the last part of a long chat."""
    given = settings(tmp_path_factory.mktemp("remembering"), shared_upstream.url, context=2048, no_guidance=True)
    with LocalServer(given) as server:
        yield server


def ask(server, upstream, text: str, talk=TALK, before=(), persona=PERSONA) -> list[dict]:
    """The prompt of a turn that stands behind a long chat and the exchange `before` it."""
    shown = lines(*talk, *FILLER, *before)
    chat_id = pm.short_hash(str(talk), str(before))
    for _ in range(2):  # the first time most of the chat has no vectors yet
        asked = [persona, *shown, {"role": "user", "content": text}]
        reply = say(server.url, asked, stream=False, chat_id=chat_id)
        embedded(server, reply.chat_id)
    return upstream.last["body"]["messages"]


def embedded(server, chat_id: str) -> None:
    """Waits for the vectors of a chat."""
    chat = open_chat(server, chat_id)
    server.server.memory.vectors.embed(chat, chat.path())


def report_of(server, upstream) -> dict:
    """The report of the chat that was last used."""
    chat_id = httpx.get(f"{server.url}/api/persona_memory/chats", timeout=60).json()[0]["chat_id"]
    path = f"{server.url}/api/persona_memory/chats/{chat_id}/prompts?limit=1"
    return httpx.get(path, timeout=60).json()["prompts"][0]


# ---------------------------------------------------------------------------- what is asked


def test_a_question_that_says_little_is_understood_with_the_exchange_before(running, shared_upstream):
    """A pronoun brings back who is meant; an assent or a gesture asks for nothing."""
    before = [("user", "There is Clara again."), ("assistant", "With all her maps.")]
    asking = ask(running, shared_upstream, "what did I tell you about her?", before=before)
    assert "I met Clara at the harbour" in memories_in(asking)
    assert memories_in(ask(running, shared_upstream, "*smiles and nods*", before=before)) == ""


@pytest.mark.parametrize("text", ["Haha, nice one.", "*yawns and stretches*", "Good night, sleep well!"])
def test_small_talk_recalls_nothing(running, shared_upstream, text):
    """Every recalled token is evaluated anew each turn."""
    before = [("user", "I am tired."), ("assistant", "It is late.")]
    assert memories_in(ask(running, shared_upstream, text, before=before)) == ""


def test_do_you_remember_recalls_more(running, shared_upstream):
    """It asks for the past itself, and gets a greater share."""
    talk = [
        (("user", "assistant")[n % 2], f"On day {n} of the voyage we saw {what} from the deck of the Heron at dawn.")
        for n, what in enumerate(SEEN)
    ]
    plain = memories_in(ask(running, shared_upstream, "We saw so much from the deck of the Heron.", talk))
    asking = memories_in(ask(running, shared_upstream, "Do you remember when we sailed on the Heron?", talk))
    assert pm.count_tokens(asking) > pm.count_tokens(plain)


# ---------------------------------------------------------------------------- a reranker


def test_a_reranker_puts_the_best_memories_in_its_order(shared_upstream, data_dir, tmp_path):
    """A search's first ones stand as the CrossEncoder reads them; they keep the scores of their places."""
    from sentence_transformers import CrossEncoder

    tiny_bert(tmp_path)
    model = CrossEncoder(str(tmp_path), device="cpu")
    with LocalServer(settings(data_dir, shared_upstream.url, reranker=str(tmp_path), context=2048)) as server:
        question = "Where does Clara sell her maps?"
        ask(server, shared_upstream, question)
        report = report_of(server, shared_upstream)
        chat_id = httpx.get(f"{server.url}/api/persona_memory/chats", timeout=60).json()[0]["chat_id"]
        path = f"{server.url}/api/persona_memory/chats/{chat_id}/search"
        found = httpx.get(path, params={"q": question, "k": 40}, timeout=60).json()["memories"]
    head, tail = found[: pm.RERANKED], found[pm.RERANKED :]
    read = model.predict([(question, row["content"]) for row in head])
    assert sorted(read, reverse=True) == pytest.approx(read)
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    assert any("reranker" in row["scores"] for row in head) and not any("reranker" in row["scores"] for row in tail)
    assert report["recalled"] and any("reranker" in row["scores"] for row in report["recalled"])
    assert report["degraded"] == ""


def test_a_reranker_that_cannot_be_used_costs_nothing_but_its_order(shared_upstream, data_dir, tmp_path):
    """Recall goes on in its own order, and the report says so; one that is late likewise."""
    with LocalServer(settings(data_dir, shared_upstream.url, reranker=str(tmp_path / "none"), context=2048)) as server:
        prompt = ask(server, shared_upstream, "Where does Clara sell her maps?")
        degraded = report_of(server, shared_upstream)["degraded"]
    assert "I met Clara at the harbour" in memories_in(prompt)
    assert "The reranker" in degraded and "cannot be used" in degraded
    tiny_bert(tmp_path)
    with pytest.raises(pm.EmbedderUnavailable, match="too slow"):
        pm.Reranker(str(tmp_path)).order("Where?", ["here", "there"], timeout=0)


# ---------------------------------------------------------------------------- what is chosen


def test_near_duplicates_are_dropped_and_the_report_says_so(running, shared_upstream):
    """One of many that say the same stands in the prompt; the others are named with the reason."""
    said = "The key to the crypt lies under the third stone"
    talk = [pair for end in (".", "!", "...", " .", "!!") for pair in (("user", said + end), ("assistant", "I see."))]
    block = memories_in(ask(running, shared_upstream, "Where is the key to the crypt?", talk))
    assert block.count(said) == 1
    report = report_of(running, shared_upstream)
    (kept,) = [row["index"] for row in report["recalled"] if row["index"] % 2 == 0 and row["index"] < 10]
    twins = [row for row in report["left_out"] if row["reason"] == f"says the same as #{kept + 1}"]
    assert {row["index"] for row in twins} == {0, 2, 4, 6, 8} - {kept}
    assert all(row.keys() == {"id", "index", "role", "name", "score", "reason"} for row in report["left_out"])


def test_a_prompt_without_memories_says_why(running, shared_upstream):
    """Everything is shown; nothing is asked; nothing fits."""
    ask(running, shared_upstream, "Is the lamp lit?", [])
    assert report_of(running, shared_upstream)["nothing"] == pm.ALL_SHOWN
    said = [f"The {word} door of the crypt leads to the hall of the {word} kings. " * 6 for word in DOORS]
    talk = [(("user", "assistant")[n % 2], text) for n, text in enumerate(said)]
    ask(running, shared_upstream, "Ok.", talk)
    assert report_of(running, shared_upstream)["nothing"] == pm.TALK
    ask(running, shared_upstream, "Which doors of the crypt do you know?", talk)
    assert report_of(running, shared_upstream)["nothing"] == ""


def test_what_has_no_room_is_named(running, shared_upstream):
    """At most a dozen, best first."""
    talk = [
        (("user", "assistant")[n % 2], f"Secret number {n} of the crypt: " + f"the {word} door leads to hall {n}. " * 6)
        for n, word in enumerate(DOORS)
    ]
    ask(running, shared_upstream, "Which doors of the crypt do you know?", talk)
    left_out = report_of(running, shared_upstream)["left_out"]
    assert 0 < len(left_out) <= pm.LEFT_OUT
    assert {row["reason"] for row in left_out} == {pm.NO_ROOM}
    assert [row["score"] for row in left_out] == sorted((row["score"] for row in left_out), reverse=True)


def test_what_stands_in_the_prompt_is_not_repeated(running, shared_upstream):
    """Neither by the same words nor by nearly the same."""
    before = [("user", "My sister gave me this silver compass before she left for Brest!"), ("assistant", "I know.")]
    prompt = ask(running, shared_upstream, "Who gave me the silver compass?", before=before)
    assert "silver compass" not in memories_in(prompt)
    reasons = [row["reason"] for row in report_of(running, shared_upstream)["left_out"]]
    assert any("which the prompt shows" in reason for reason in reasons)


def test_of_a_very_long_message_the_relevant_part_is_recalled(running, shared_upstream):
    """Neither all of it nor nothing; what is left out is marked."""
    page = "The harvest was poor and the roads were bad, so the tax collectors came late to the valley this year. "
    letter = page * 60 + "Old Bertram hid the crown jewels beneath the mill wheel at Ashford. " + page * 60
    talk = [("user", letter), ("assistant", "A long letter."), *TALK]
    block = memories_in(ask(running, shared_upstream, "Where did Bertram hide the crown jewels?", talk))
    assert "beneath the mill wheel at Ashford" in block
    assert pm.GAP in block and pm.count_tokens(block) < 500
    (row,) = [row for row in report_of(running, shared_upstream)["recalled"] if row["index"] == 0]
    assert row["part"] is True


def test_where_no_part_of_a_long_message_fits_its_sentence_is_recalled(shared_upstream, data_dir):
    """In a small context."""
    page = "The harvest was poor and the roads were bad, so the tax collectors came late to the valley this year. "
    letter = page * 20 + "Old Bertram hid the crown jewels beneath the mill wheel at Ashford. " + page * 20
    talk = [("user", letter), ("assistant", "A long letter."), *TALK]
    with LocalServer(settings(data_dir, shared_upstream.url, context=900, no_guidance=True)) as server:
        block = memories_in(ask(server, shared_upstream, "Where did Bertram hide the crown jewels?", talk))
    assert "beneath the mill wheel at Ashford" in block and block.count("The harvest was poor") < 3


def test_neighbours_are_one_excerpt_with_its_speakers(running, shared_upstream):
    """Oldest first, framed as the past, numbered once."""
    talk = [
        *TALK,
        ("user", "The smith brought a new anvil from Brest today."),
        ("assistant", "The smith calls his new anvil Bertha."),
    ]
    block = memories_in(ask(running, shared_upstream, "What do we know of the smith's new anvil?", talk))
    assert block.startswith(pm.ENGLISH.memories)
    (excerpt,) = re.findall(r"^#\d+-\d+ (.*?)(?=^#|^\[End)", block, re.M | re.S)
    assert (
        "User: The smith brought a new anvil from Brest today.\nYou: The smith calls his new anvil Bertha.\n" in excerpt
    )


def test_scores_by_signal_add_up_in_search_and_prompts(running, shared_upstream):
    """Nudges among them."""
    ask(running, shared_upstream, "Who sells maps of the northern isles?")
    report = report_of(running, shared_upstream)
    chat_id = httpx.get(f"{running.url}/api/persona_memory/chats", timeout=60).json()[0]["chat_id"]
    path = f"{running.url}/api/persona_memory/chats/{chat_id}/search"
    found = httpx.get(path, params={"q": "Who sells maps of the northern isles?"}, timeout=60).json()["memories"]
    assert report["recalled"] and found
    for row in (*report["recalled"], *found):
        assert set(row["scores"]) <= {*pm.SIGNALS, *pm.TIE_BREAKERS, "supersedes"}
        assert row["scores"].keys() & pm.TIE_BREAKERS.keys()
        assert sum(row["scores"].values()) == pytest.approx(row["score"], abs=0.005)


def test_the_same_turn_after_a_restart_is_the_same_prompt(shared_upstream, tmp_path):
    given = settings(tmp_path, shared_upstream.url, context=2048)
    with LocalServer(given) as server:
        before = ask(server, shared_upstream, "Do you remember Clara?")
    with LocalServer(given) as server:
        assert ask(server, shared_upstream, "Do you remember Clara?") == before
    assert "Clara at the harbour" in memories_in(before)


# ---------------------------------------------------------------------------- the persona

CARD = {
    "role": "system",
    "content": "Mira keeps the lighthouse of Skerry Point and counts its hundred and twelve stairs every night. "
    "She is terrified of deep water since the ferry sank under her as a child, and she cannot swim. "
    "She speaks four languages and swears in all of them. Her pockets are full of string and candle stubs. "
    "She owes the baker Odo three silver pieces and avoids his street. She never drinks wine, only cider.",
}
LONG = [(role, f"{content} The wind is up and the gulls cry over the dunes all day long.") for role, content in FILLER]


def reminded(server, upstream, text: str, card=CARD) -> list[dict]:
    """The prompt of a turn behind a long history."""
    shown = lines(*LONG, *LONG)
    for _ in range(2):
        reply = say(server.url, [card, *shown, {"role": "user", "content": text}], stream=False)
        embedded(server, reply.chat_id)
        known = open_chat(server, reply.chat_id).persona_vectors
        wait_until(lambda known=known: known and all(v is not None for v in known.values()), "the persona's vectors")
    return upstream.last["body"]["messages"]


@pytest.fixture(scope="module")
def roomy(shared_upstream, tmp_path_factory):
    """A proxy with a context so long that the persona is far away."""
    given = settings(tmp_path_factory.mktemp("roomy"), shared_upstream.url, context=8192, no_guidance=True)
    with LocalServer(given) as server:
        yield server


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("*takes your hand* Come, let us swim out to the rock together!", "terrified of deep water"),
        ("Let us buy some bread at the baker's, I am hungry.", "owes the baker"),
    ],
)
def test_a_persona_that_is_far_away_is_recalled_where_the_turn_touches_it(roomy, shared_upstream, text, piece):
    """Just before the newest message; the prompt's beginning stays as it was."""
    prompt = reminded(roomy, shared_upstream, text)
    assert prompt[0] == CARD
    line, _, rest = prompt[-1]["content"].rpartition("[Keep in mind, from the description: ")[2].partition("]")
    assert piece in line and rest.strip() == text
    assert piece in report_of(roomy, shared_upstream)["reminder"]


@pytest.mark.parametrize("text", ["What a morning!", "Haha, very funny.", "I think it is about noon now."])
def test_a_turn_that_touches_nothing_of_the_persona_is_left_alone(roomy, shared_upstream, text):
    assert "[Keep in mind" not in reminded(roomy, shared_upstream, text)[-1]["content"]


def test_a_persona_that_is_near_is_not_said_again(running, shared_upstream):
    """A short prompt is read whole."""
    prompt = ask(running, shared_upstream, "Come, let us swim out to the rock!", FILLER[:4], persona=CARD)
    assert "[Keep in mind" not in prompt[-1]["content"]


def test_a_persona_costs_no_turn_an_encode(roomy, shared_upstream):
    """Vectors of its pieces are computed in the background and kept with the chat."""
    reminded(roomy, shared_upstream, "Shall we swim?")
    memory, encoded = roomy.server.memory, []
    encode = memory.embedder.encode
    memory.embedder.encode = lambda texts, *a, **k: encoded.extend(texts) or encode(texts, *a, **k)
    try:
        say(
            roomy.url,
            [CARD, *lines(*LONG, *LONG), {"role": "user", "content": "Shall we swim out there?"}],
            stream=False,
        )
    finally:
        memory.embedder.encode = encode
    assert not any("deep water" in text for text in encoded)
    assert sum("swim" in text for text in encoded) <= 2  # the message, and the query where that is another text


# ---------------------------------------------------------------------------- languages and embedders


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    """A real model that knows the words of the written chats."""
    return str(write_model(tmp_path_factory.mktemp("model"), written_texts()))


# Share of the evidence among the first three and the first ten found: by words alone; by another embedder.
LEAST = {
    "de": (22, 44, 35, 65),  # equal messages by words: 45 or 55, as they come
    "es": (20, 42, 32, 62),
    "fr": (25, 47, 37, 70),
    "ja": (45, 60, 50, 75),
    "ru": (43, 53, 50, 75),
    "zh": (42, 57, 47, 82),
}


@pytest.mark.parametrize("code", LANGUAGES)
def test_chats_in_other_languages_are_remembered(code, multilingual):
    encode, (words3, words10, vectors3, vectors10) = Encoder(multilingual), LEAST[code]

    def found(k, encode=None):
        shares = list(recall_at(f"language_{code}", k, encode).values())
        return 100 * sum(shares) / len(shares)

    assert found(3) >= words3 and found(10) >= words10
    assert found(3, encode) >= vectors3 and found(10, encode) >= vectors10


@pytest.mark.parametrize("code", ["de", "es", "fr"])
def test_an_embedder_that_knows_little_of_a_language_takes_nothing_from_what_its_words_find(code):
    """The default reads English; in other languages its cosines count for less, see `MemoryIndex.trust`."""
    encode = Encoder()
    words, both = (sum(recall_at(f"language_{code}", 10, by).values()) for by in (None, encode))
    assert both >= words


def test_another_embedder_takes_over_in_the_background(shared_upstream, tmp_path, multilingual):
    """At once words find what they can; then the chat has vectors of the new length, and no turn waited for them."""
    chat = read_chat("language_es")[0]
    talk = [{"role": m.role, "name": m.name, "content": m.content} for m in chat]
    address = "/api/persona_memory/chats/tale"
    with LocalServer(settings(tmp_path, shared_upstream.url)) as server:
        assert httpx.post(f"{server.url}{address}/messages", json={"messages": talk}, timeout=60).status_code == 200
        embedded(server, "tale")
        old = vectors_of(server, chat)
    with LocalServer(settings(tmp_path, shared_upstream.url, embedder=multilingual)) as server:
        new = wait_until(lambda: vectors_of(server, chat), "the new vectors")
        params = {"q": "¿Dónde vive la abuela de Alba?", "k": 5}
        found = httpx.get(f"{server.url}{address}/search", params=params, timeout=60).json()["memories"]
    assert {len(v) for v in old.values()} == {384}
    assert {len(v) for v in new.values()} == {512}
    assert any("Cádiz" in m["content"] for m in found)


def vectors_of(server, messages) -> dict:
    """The chat's stored vectors by the server's embedder, once all are there."""
    store = open_chat(server, "tale").store
    found = store.vectors(server.server.memory.embedder.key, [m.fingerprint for m in messages])
    return found if len(found) == len({m.fingerprint for m in messages}) else {}


def test_changed_weights_have_another_key_and_at_takes_first_dimensions(tmp_path, multilingual):
    """The same path with other weights makes vectors anew; `@64` shortens them, to unit length."""
    from sentence_transformers import SentenceTransformer

    whole, short = pm.Embedder(multilingual), pm.Embedder(f"{multilingual}@64")
    (long,), (first,) = whole.encode(["El mar"]), short.encode(["El mar"])
    assert first == pytest.approx(long[:64] / np.linalg.norm(long[:64]), abs=1e-5)
    assert whole.key != short.key and whole.key.partition("#")[2] == short.key.partition("#")[2] != ""
    shutil.copytree(multilingual, tmp_path / "model")
    before = pm.Embedder(str(tmp_path / "model")).key
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    model[0].embedding.weight.data *= 1.5
    model.prompts = {"query": "la casa ", "document": ""}
    model.save(str(tmp_path / "model"))
    changed = pm.Embedder(str(tmp_path / "model"))
    assert changed.key != before
    document, asked = changed.encode(["El mar"], queries=["El mar"])  # a model's own prompt stands before a query
    assert document == pytest.approx(long, abs=1e-5) and asked != pytest.approx(long, abs=1e-2)


def test_turns_go_on_by_words_while_vectors_are_computed(shared_upstream, tmp_path, multilingual):
    """With a chat's vectors all gone and none computed yet."""
    with LocalServer(settings(tmp_path, shared_upstream.url, context=2048)) as server:
        ask(server, shared_upstream, "Where did I meet Clara?")
    with LocalServer(
        settings(tmp_path, shared_upstream.url, context=2048, embedder=multilingual), ready=False
    ) as server:
        server.server.memory.vectors.embed = lambda chat, ids: None  # the background has not come to it
        server.wait_ready()
        shown = lines(*TALK, *FILLER)
        reply = say(server.url, [PERSONA, *shown, {"role": "user", "content": "Where did I meet Clara?"}], stream=False)
    assert re.search(r"degraded; reason=\d+ messages not embedded yet", reply.memory)
    assert "I met Clara at the harbour" in memories_in(shared_upstream.last["body"]["messages"])
