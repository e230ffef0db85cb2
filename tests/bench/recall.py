"""Does recall find it? Evidence recall on any file in LoCoMo's format (Maharana et al. 2024; not part of this project).

Per question: which of its annotated evidence turns are among the first 5 and 10 messages recalled, and which fit into
500 and 1,000 tokens (taken best first, what no longer fits is skipped). One run prints the whole picture:

    table          ours beside the baselines, per category, asked as a third person and as the other chat partner
    ablation       the absence of every signal and nudge, the other weights as they are
    leave-one-out  weights fitted without the conversation that is judged
    written        the role-play chats of tests/data, and those in other languages, by words alone and with vectors
    speed          milliseconds in a chat of 10,000 messages

    python tests/bench/recall.py --data roleplay_dev.json locomo_dev.json [--parts table ablation] [--embedder NAME]

The baselines: BM25 as FTS5 has it (k1 1.2, b 0.75, Porter's stemmer); the cosine of question and "Speaker: text" by the
same embedder; their plain sum, cosine + BM25 / (2 * the best BM25); SillyTavern's Vector Storage as it is shipped; and
the newest messages. Everything goes through the program's own functions, in this process; vectors are kept in
$LOCOMO_CACHE.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import chats  # noqa: E402

import persona_memory as pm  # noqa: E402

DEPTH = 60  # memories asked for
RIDGE = 0.004
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
COLUMNS = ("r@5", "r@10", "b@500", "b@1000")
STYLES = ("third person", "partner")
ADVERSARIAL = "5 adversarial"
WRITTEN_DEPTHS = (1, 3, 5, 10)


class Encoder:
    """The program's embedder; keeps what it has encoded on disk."""

    def __init__(self, name: str):
        self.embedder = pm.Embedder(name)
        self.embedder.encode(["loaded"])
        self.folder = Path(os.environ.get("LOCOMO_CACHE", tempfile.gettempdir())) / "persona-memory-vectors"

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Unit vectors, from the cache where these texts have been encoded before."""
        key = hashlib.sha256("\0".join([self.embedder.name, *texts]).encode()).hexdigest()[:32]
        file = self.folder / f"{key}.npy"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            np.save(file, self.embedder.encode(texts))
        return np.load(file)


encode = Encoder(pm.Settings().embedder)


def as_partner(question: str, speakers: list[str]) -> tuple[str, str]:
    """The question as the other participant would put it, and who that is; unchanged where not exactly one is named."""
    named = [s for s in speakers if re.search(rf"\b{re.escape(s)}\b", question, re.I)]
    if len(named) != 1:
        return question, ""
    text = re.sub(rf"\b{re.escape(named[0])}'s\b", "your", question, flags=re.I)
    text = re.sub(rf"\b{re.escape(named[0])}\b", "you", text, flags=re.I)
    for wrong, right in (("does", "do"), ("has", "have"), ("is", "are"), ("was", "were")):
        text = re.sub(rf"\b{wrong} you\b", f"{right} you", text, flags=re.I)
    return text[0].upper() + text[1:], next(s for s in speakers if s != named[0])


# ---------------------------------------------------------------------------- a conversation


class Conversation:
    """A recorded conversation in the program's own index."""

    def __init__(self, recorded: dict, kind: str):
        self.kind = kind
        self.id, self.speakers = recorded["id"], recorded["speakers"]
        self.messages = list(chain(recorded))
        place = {turn["id"]: i for i, turn in enumerate(recorded["turns"])}
        self.questions = [q for q in recorded["questions"] if q["evidence"]]
        self.small_talk = recorded.get("small_talk", [])
        self.gold = [{place[e] for e in q["evidence"]} for q in self.questions]
        self.costs = [pm.count_tokens(f"[{t['date']}] {t['speaker']}: {t['text']}\n") for t in recorded["turns"]]
        self.index = chats.indexed(self.messages, encode)
        self.vectors = self.index.vectors([m.fingerprint for m in self.messages])
        texts = [m.content for m in self.messages]
        bags = map(encode.embedder.bag, texts)
        self.readings = [pm.read_emotion(*row[:2], bag=row[2]) for row in zip(texts, self.vectors, bags, strict=True)]
        self.importance = np.array([
            pm.message_importance(m.content, r, pm.names_in(m.content))
            for m, r in zip(self.messages, self.readings, strict=True)
        ])  # fmt: skip

    def asked(self, style: str) -> list[tuple[str, str]]:
        """Every question and who asks it."""
        texts = [q["question"] for q in self.questions]
        return [as_partner(t, self.speakers) for t in texts] if style == "partner" else [(t, "") for t in texts]

    def evidence(self, style: str) -> list[tuple[pm.Query, pm.Evidence]]:
        """For every question what it asks, and what speaks for each message."""
        return self.found(self.asked(style))

    def found(self, asked: list[tuple[str, str]]) -> list[tuple[pm.Query, pm.Evidence]]:
        """For every text, with who says it, what it asks and what speaks for each message."""
        index, look_up = self.index, encode.embedder.word_vectors
        queries = [pm.understand(t, a, index.speakers, index.now, (), index.language) for t, a in asked]
        vectors = encode([q.spoken for q in queries])
        return [(q, index.evidence(q.words, v, None, look_up)) for q, v in zip(queries, vectors, strict=True)]

    def nudges(self, text: str, scores: np.ndarray) -> dict[str, np.ndarray]:
        """The nudges of the best messages by score, as the program's search gives them; 0 elsewhere."""
        now, size = pm.read_emotion(text), len(scores)
        best = np.argsort(-scores, kind="stable")[: pm.MOST_MEMORIES]
        given = {name: np.zeros(size, np.float32) for name in pm.TIE_BREAKERS}
        given["emotion"][best] = pm.emotion_matches(now, [self.readings[i] for i in best])
        given["importance"][best] = self.importance[best]
        given["recency"][best] = best / size
        return {name: np.float32(pm.TIE_BREAKERS[name]) * values for name, values in given.items()}


class Written(Conversation):
    """One of the role-play chats of tests/data."""

    def __init__(self, name: str):
        self.id, self.kind, self.speakers, self.small_talk = name, "written", ["", ""], []
        self.messages, asks = chats.read_chat(f"roleplay_{name}")
        self.questions = [{"question": text, "asker": "" if a == "user" else a, "category": 4} for a, text, *_ in asks]
        self.gold = [set(evidence) for _, _, evidence, _ in asks]
        self.costs = [pm.count_tokens(f"{m.speaker}: {m.content}\n") for m in self.messages]
        self.index = chats.indexed(self.messages, encode)

    def asked(self, style: str) -> list[tuple[str, str]]:
        """Every question and who asks it."""
        return [(q["question"], q["asker"]) for q in self.questions]


def chain(recorded: dict):
    """The turns as the program stores them, one under the other."""
    parent = pm.ROOT
    for turn in recorded["turns"]:
        role = "user" if turn["speaker"] == recorded["speakers"][0] else "assistant"
        key = pm.message_id(parent, pm.message_digest(role, turn["text"]))
        yield pm.Message(key, parent, role, turn["text"], turn["speaker"], turn.get("timestamp"))
        parent = key


# ---------------------------------------------------------------------------- systems


def ours(c: Conversation, style: str) -> list[np.ndarray]:
    """The program's scores, nudges and all, of statements about the same thing the newest first."""
    rows = []
    for (text, _), (query, evidence) in zip(c.asked(style), c.evidence(style), strict=True):
        scores = pm.weigh(query, evidence)["score"]
        scores += sum(c.nudges(text, scores).values())
        best = np.argsort(-scores, kind="stable")[: pm.NEWEST_AMONG].tolist()
        memories = [pm.Memory(c.messages[i], i, float(scores[i]), {}) for i in best]
        for memory in pm.with_newest_first(memories, c.index, query, encode([query.spoken])[0]):
            scores[memory.index] = memory.score
        rows.append(scores)
    return rows


def bm25(c: Conversation, style: str) -> list[np.ndarray]:
    """FTS5's BM25 of the question as asked."""
    return [c.index.evidence(pm.query_words(text), None).bm25 for text, _ in c.asked(style)]


def cosine(c: Conversation, style: str) -> list[np.ndarray]:
    """Cosine of the question as asked."""
    return [c.index.evidence((), v).cosine for v in encode([text for text, _ in c.asked(style)])]


def plain_sum(c: Conversation, style: str) -> list[np.ndarray]:
    """Cosine plus half of BM25 as a share of the best."""
    pairs = zip(cosine(c, style), bm25(c, style), strict=True)
    return [dense + 0.5 * words / max(words.max(), 1e-6) for dense, words in pairs]


def vector_storage(c: Conversation, style: str) -> list[np.ndarray]:
    """SillyTavern's Vector Storage as shipped: chunks of 400 characters without names, the question with the newest
    message as the query, the three best chunks; nothing else is found."""
    owners, texts = [], []
    for place, message in enumerate(c.messages):
        rest = message.content
        while rest:
            cut = len(rest) if len(rest) <= 400 else max(rest.rfind(d, 1, 400) for d in ("\n", ". ", " ")) + 1 or 400
            owners.append(place), texts.append(rest[:cut].strip())
            rest = rest[cut:]
    vectors, rows = encode(texts), []
    for query in encode([f"{text}\n{c.messages[-1].content}" for text, _ in c.asked(style)]):
        near, scores = vectors @ query, np.full(len(c.messages), -np.inf)
        for chunk in np.argsort(-near, kind="stable")[:3][::-1]:
            scores[owners[chunk]] = near[chunk]
        rows.append(scores)
    return rows


def recency(c: Conversation, style: str) -> list[np.ndarray]:
    """The newest messages."""
    return [np.arange(len(c.messages), dtype=float)] * len(c.questions)


SYSTEMS = {"ours": ours, "BM25": bm25, "cosine": cosine, "plain sum": plain_sum, "Vector Storage": vector_storage}
SYSTEMS["recency"] = recency


# ---------------------------------------------------------------------------- the metric


def judged(c: Conversation, gold: set[int], scores: np.ndarray) -> list[float]:
    """One question's row of COLUMNS."""
    ranking = [int(i) for i in np.argsort(-scores, kind="stable")[:DEPTH] if scores[i] > -np.inf]
    row = [len(gold.intersection(ranking[:k])) / len(gold) for k in (5, 10)]
    for left in (500, 1000):
        found = 0
        for place in ranking:
            if c.costs[place] <= left:
                left -= c.costs[place]
                found += place in gold
        row.append(found / len(gold))
    return row


def table(conversations: list[Conversation], scores: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
    """The means of COLUMNS in percent, by category and over categories 1-4."""
    rows, kinds = [], []
    for c, found in zip(conversations, scores, strict=True):
        rows += [judged(c, gold, s) for gold, s in zip(c.gold, found, strict=True)]
        kinds += [q["category"] for q in c.questions]
    rows, kinds = 100 * np.array(rows), np.array(kinds)
    groups = {"1-4": kinds < 5} | {f"{k} {name}": kinds == k for k, name in CATEGORIES.items()}
    return {name: rows[chosen].mean(axis=0) for name, chosen in groups.items() if chosen.any()}


def line(label: str, figures: np.ndarray) -> str:
    return f"{label:34s}" + "".join(f"{value:8.1f}" for value in figures)


def head(title: str) -> str:
    return f"\n{title:34s}" + "".join(f"{name:>8s}" for name in COLUMNS)


# ---------------------------------------------------------------------------- weights


COLUMNS_FITTED = [  # a signal's weight in any chat, and what a coherent chat adds to it, where it has that
    (name, coherent)
    for name, s in pm.SIGNALS.items()
    for coherent in (False, True)
    if (s.coherent if coherent else s.weight)
]


def signal_rows(conversations: list[Conversation], style: str) -> list[list[np.ndarray]]:
    """Per conversation and question the value of every column, float32 [n, columns]."""
    return [[signal_columns(q, e) for q, e in c.evidence(style)] for c in conversations]


def signal_columns(q: pm.Query, e: pm.Evidence) -> np.ndarray:
    """What COLUMNS_FITTED name, float32 [n, columns]."""
    blank = np.zeros(len(e.cosine), np.float32)
    found = {name: s.of(q, e) for name, s in pm.SIGNALS.items()}
    values = {name: blank if some is None else some for name, some in found.items()}
    return np.stack([values[name] * (e.coherence if coherent else 1) for name, coherent in COLUMNS_FITTED], axis=1)


def weighted(rows: list[list[np.ndarray]], weights: np.ndarray) -> list[list[np.ndarray]]:
    return [[values @ weights for values in questions] for questions in rows]


def likeliest(scores, gold, blank):
    """Loss per question: each piece of evidence should be likely beside what is none (softmax over the messages)."""
    import torch

    others = torch.logsumexp(scores.masked_fill(gold > 0, -1e9), 1, keepdim=True)
    return (gold * torch.nn.functional.softplus(others - scores).masked_fill(blank, 0)).sum(1)


def missed(scores, gold):
    """Loss per question: the share of the evidence that stands below the RANKS-th message that is none, each softly."""
    import torch

    rivals = scores.masked_fill(gold > 0, -1e9).topk(max(RANKS)).values[:, [rank - 1 for rank in RANKS]]
    return (gold * torch.sigmoid(rivals[:, None, :] - scores[:, :, None]).mean(2)).sum(1)


RANKS = (5, 10, 20)
WRITTEN_SHARE = 0.3  # what the chats of tests/data weigh beside a kind of talk
SHARES = {1: 1.5, 5: 0.6}  # by category, what a question weighs: one with much evidence, and one of another speaker's


def fitted(conversations: list[Conversation], rows: list[list[np.ndarray]]) -> np.ndarray:
    """Weights that put the evidence first, and among the first RANKS: likelihood alone looks most at what is far away.
    Every kind of talk (data file) counts as much, the written chats less.
    Multi-hop questions count for more, adversarial ones for less."""
    import torch

    torch.set_num_threads(1)
    width = max(len(c.messages) for c in conversations)
    items = [(v, g, q) for c, r in zip(conversations, rows, strict=True)
             for v, g, q in zip(r, c.gold, c.questions, strict=True)]  # fmt: skip
    values = np.zeros((len(items), width, len(COLUMNS_FITTED)), np.float32)
    gold, blank = np.zeros((len(items), width), np.float32), np.ones((len(items), width), bool)
    for i, (v, g, _) in enumerate(items):
        values[i, : len(v)], blank[i, : len(v)], gold[i, sorted(g)] = v, False, 1 / len(g)
    spread = values[~blank].std(axis=0) + 1e-3
    ridge = torch.tensor([RIDGE * (1.5 if coherent else 1) for _, coherent in COLUMNS_FITTED])
    values, gold, blank = torch.tensor(values / spread), torch.tensor(gold), torch.tensor(blank)
    sizes = Counter(c.kind for c in conversations for q in c.questions if q["category"] != 5)
    shares = [(WRITTEN_SHARE if c.kind == "written" else 1) / sizes[c.kind] for c in conversations for _ in c.gold]
    counts = torch.tensor(shares) * torch.tensor([SHARES.get(q["category"], 1.0) for *_, q in items])
    counts /= counts.sum()
    weights = torch.zeros(len(spread), requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        scores = (values @ weights).masked_fill(blank, -1e9)
        value = (counts * (likeliest(scores, gold, blank) + missed(scores, gold))).sum() + (ridge * weights**2).sum()
        value.backward()
        return value

    optimiser.step(loss)
    return weights.detach().numpy() / spread


def ablation_rows(conversations: list[Conversation], style: str) -> tuple[list[str], list[list[np.ndarray]]]:
    """The names of all parts of a score, and per conversation and question their weighted values [n, parts]."""
    names = [*pm.SIGNALS, *pm.TIE_BREAKERS]
    rows = []
    for c in conversations:
        rows.append([])
        for (text, _), (q, e) in zip(c.asked(style), c.evidence(style), strict=True):
            parts = pm.weigh(q, e)
            parts |= c.nudges(text, parts["score"])
            blank = np.zeros(len(e.cosine), np.float32)
            rows[-1].append(np.stack([parts.get(name, blank) for name in names], axis=1))
    return names, rows


def show_fit(conversations: list[Conversation]) -> None:
    """Weights fitted to all conversations, and what makes probabilities of the scores that the program gives."""
    rows = signal_rows(conversations, "partner")
    weights = fitted(conversations, rows)
    by_kind("weights fitted to all", conversations, weighted(rows, weights))
    for (name, coherent), weight in zip(COLUMNS_FITTED, weights, strict=True):
        now = pm.SIGNALS[name].coherent if coherent else pm.SIGNALS[name].weight
        print(f"{name + ', where coherent' * coherent:34s}{weight:8.2f}   (now {now})")
    show_need(conversations)


def by_kind(title: str, conversations: list[Conversation], scores: list[list[np.ndarray]]) -> None:
    """The figures of every kind of talk (data file), multi-hop and adversarial questions apart."""
    print(head(title))
    for kind in dict.fromkeys(c.kind for c in conversations):
        chosen = [i for i, c in enumerate(conversations) if c.kind == kind]
        found = table([conversations[i] for i in chosen], [scores[i] for i in chosen])
        for group in ("1-4", "1 multi-hop", ADVERSARIAL):
            if group == "1-4" or (group in found and ADVERSARIAL in found):
                print(line(f"  {kind}, {group}", found[group]), flush=True)


def show_need(conversations: list[Conversation]) -> None:
    """How a score becomes a probability, by logistic regression on the best messages of every question, and the same
    without each chat; and by how much the best message stands out, for questions and for small talk."""
    from sklearn.linear_model import LogisticRegression

    values, labels, chats_of, stands = [], [], [], []
    for place, c in enumerate(conversations):
        lines = [(text, "") for text in c.small_talk]
        for (q, e), gold in zip(c.found(c.asked("partner") + lines), c.gold + [None] * len(lines), strict=True):
            scores = pm.weigh(q, e)["score"]
            usual, spread = pm.usual_scores(scores)
            told = bool(pm.admissible(q, scores))
            stands.append((c.kind, int(q.asks), gold is not None, (scores.max() - usual) / spread, told))
            best = np.argsort(-scores, kind="stable")[: pm.MOST_MEMORIES] if gold else []
            values += [(scores[i], scores[i] - scores.max()) for i in best]
            labels += [i in gold for i in best]
            chats_of += [place] * len(best)
    values, labels, chats_of = np.array(values), np.array(labels), np.array(chats_of)
    fits = [
        LogisticRegression(C=1000).fit(values[kept], labels[kept])
        for kept in (np.ones(len(labels), bool), *(chats_of != place for place in range(len(conversations))))
    ]
    found = np.array([(*fit.coef_[0], fit.intercept_[0]) for fit in fits])
    print(f"\n{'need':34s}{'fitted':>8s}{'without a chat, from':>24s}{'to':>8s}")
    for name, column in zip(("NEED_SCORE", "NEED_BELOW", "NEED_BIAS"), found.T, strict=True):
        print(f"{name:34s}{column[0]:8.2f}{column[1:].min():24.2f}{column[1:].max():8.2f}   (now {getattr(pm, name)})")
    show_standing_out(stands)


def show_standing_out(stands: list[tuple[str, int, bool, float, bool]]) -> None:
    """By how much the best message stands out: (kind of talk, how it asks, whether it is a question, deviations,
    whether anything is recalled)."""
    print(
        f"\n{'standing out, deviations':34s}{'lines':>8s}"
        + "".join(f"{q:>8s}" for q in ("least", "2 %", "median", "98 %", "most", "recall"))
    )
    for kind, asks, question in sorted({s[:3] for s in stands}):
        values, told = np.array([s[3:] for s in stands if s[:3] == (kind, asks, question)]).T
        label = f"  {kind}, {'question' if question else 'small talk'}, {('tells', 'doubtful', 'asks')[asks]}"
        figures = (*np.quantile(values, (0, 0.02, 0.5, 0.98, 1)), 100 * np.mean(told))
        print(f"{label:42s}{len(values):8d}" + "".join(f"{f:8.2f}" for f in figures))


def show_ablation(conversations: list[Conversation]) -> None:
    """What the absence of every signal and nudge changes, the other weights as they are."""
    for style in STYLES:
        names, rows = ablation_rows(conversations, style)
        ones = np.ones(len(names), np.float32)
        whole = table(conversations, weighted(rows, ones))
        print(head(f"without, asked as {style}, points") + f"{'5 r@10':>8s}")
        groups = {name: [name] for name in names} | {"all nudges": list(pm.TIE_BREAKERS)}
        for label, absent in groups.items():
            kept = np.array([name not in absent for name in names], np.float32)
            without = table(conversations, weighted(rows, kept))
            change = without["1-4"] - whole["1-4"]
            adversarial = (without[ADVERSARIAL] - whole[ADVERSARIAL])[1] if ADVERSARIAL in whole else np.nan
            print(f"{label:34s}" + "".join(f"{value:+8.1f}" for value in (*change, adversarial)), flush=True)


def show_left_out(conversations: list[Conversation]) -> None:
    """Weights fitted to all but one conversation, judged on that one."""
    rows = signal_rows(conversations, "partner")
    all_in = weighted(rows, fitted(conversations, rows))
    out = []
    for place in range(len(conversations)):
        others = [i for i in range(len(conversations)) if i != place]
        weights = fitted([conversations[i] for i in others], [rows[i] for i in others])
        out += weighted([rows[place]], weights)
    by_kind("weights fitted to all chats", conversations, all_in)
    by_kind("to all but the judged one", conversations, out)
    print(head("each, by the others' weights, and by its cosines alone"))
    for c, scores, near in zip(conversations, out, (cosine(c, "partner") for c in conversations), strict=True):
        print(line(f"  {c.id}", table([c], [scores])["1-4"]), line("", table([c], [near])["1-4"]).strip())


# ---------------------------------------------------------------------------- speed


def show_speed(count: int) -> None:
    """Milliseconds of the Recall room, without the encode, in a made-up chat of `count` messages."""
    dice = np.random.default_rng(7)
    vocabulary = np.array([f"word{i}" for i in range(8000)])
    often = 1 / np.arange(1, 8001) ** 0.9
    often /= often.sum()

    def sentence(words: int) -> str:
        return " ".join(dice.choice(vocabulary, words, p=often))

    recorded = {"speakers": ["Ann", "Bo"], "turns": [
        {"speaker": ("Ann", "Bo")[i % 2], "text": sentence(25), "timestamp": None} for i in range(count)
    ]}  # fmt: skip
    messages = list(chain(recorded))
    vectors = dice.normal(size=(count, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    tree, index, by_id = pm.Tree(), pm.MemoryIndex(), {m.id: m for m in messages}
    for order, message in enumerate(messages):
        tree.put(message, order)
    nodes = tree.branch(messages[-1].id)
    index.follow(nodes[: count // 2], lambda ids: [by_id[i] for i in ids])
    adding = []
    for n in range(count // 2, count):
        start = time.perf_counter()
        index.follow(nodes[: n + 1], lambda ids: [by_id[i] for i in ids])
        adding.append(time.perf_counter() - start)
    index.add_vectors({n.fingerprint: v for n, v in zip(nodes, vectors, strict=True)})
    index._split.clear()  # made-up sentences, three to a message
    index.add_sentences({n.fingerprint: pm.vector_codes(vectors[[i, i - 1, i - 2]]) for i, n in enumerate(nodes)})
    known = dice.normal(size=(len(vocabulary), pm.WORD_AXES)).astype(np.float32)
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    places = {word: i for i, word in enumerate(vocabulary)}

    def word_vectors(words: list[str]) -> np.ndarray:
        return known[[places.get(word, 0) for word in words]]

    asking = []
    for _ in range(200):
        start = time.perf_counter()
        index.follow(nodes, lambda ids: [by_id[i] for i in ids])
        topics = " ".join(dice.choice(vocabulary[50:], 6, p=often[50:] / often[50:].sum()))  # the first are stop words
        query = pm.understand(f"When did Ann say {topics}?", "Bo", index.speakers, index.now)
        scores = pm.weigh(query, index.evidence(query.words, vectors[0], None, word_vectors))["score"]
        pm.admissible(query, scores)
        asking.append(time.perf_counter() - start)
    for label, times in (("a turn's recall", asking), ("adding a message", adding)):
        ms = 1000 * np.array(times)
        print(f"{label:34s} median {statistics.median(ms):.2f} ms, 95 % {np.quantile(ms, 0.95):.2f} ms")


# ---------------------------------------------------------------------------- written chats


def show_written(embedders: list[str]) -> None:
    """Recall in the written chats, by words alone and with each embedder's vectors."""
    names = [*(f"roleplay_{name}" for name in chats.ROLE_PLAY), *(f"language_{name}" for name in chats.LANGUAGES)]
    ways = {"words": None} | {name: Encoder(name) for name in embedders}
    print("\nwritten chats".ljust(35) + "".join(f"{f'r@{k}':>8s}" for k in WRITTEN_DEPTHS))
    for name in names:
        for label, encoder in ways.items():
            found = [100 * np.mean(list(chats.recall_at(name, k, encoder).values())) for k in WRITTEN_DEPTHS]
            print(line(f"  {name}, {Path(label).name}", found), flush=True)


def show_table(conversations: list[Conversation]) -> None:
    """Ours and the baselines, per category, in both styles."""
    for style in STYLES:
        for name, scores in SYSTEMS.items():
            print(head(f"{name}, asked as {style}"))
            for group, row in table(conversations, [scores(c, style) for c in conversations]).items():
                print(line(f"  {group}", row), flush=True)


PARTS = {"table": show_table, "ablation": show_ablation, "leave-one-out": show_left_out}


def main() -> None:
    global encode
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[])
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "written", "speed"], help="default: all")
    parser.add_argument("--fit", action="store_true", help="fit the weights and print them, nothing else")
    parser.add_argument("--speed", type=int, default=10_000, help="messages of the chat in which recall is timed")
    parser.add_argument("--embedder", default=pm.Settings().embedder, help="another one than the program's default")
    args = parser.parse_args()
    parts = args.parts or [*PARTS, "written", "speed"]
    encode = Encoder(args.embedder)
    files = {path.stem: json.loads(path.read_text("utf-8"))["conversations"] for path in args.data}
    conversations = [Conversation(c, kind) for kind, recorded in files.items() for c in recorded]
    if args.fit:
        parts = show_fit(conversations + [Written(name) for name in chats.ROLE_PLAY]) or []
    for name, show in PARTS.items():
        if conversations and name in parts:
            show(conversations)
    if "written" in parts:
        show_written(list(dict.fromkeys([pm.Settings().embedder, args.embedder])))
    if "speed" in parts:
        show_speed(args.speed)


if __name__ == "__main__":
    main()
