"""Written chats for tests and benchmarks: from lines of text to messages, and to an index as the program has it."""

import re
from pathlib import Path

import numpy as np

import persona_memory as pm

DATA = Path(__file__).resolve().parent / "data"
ROLE_PLAY = ("keep", "city", "star")
LANGUAGES = ("de", "es", "fr", "ja", "ru", "zh")


def chat(*lines, at=None):
    """Messages one under the other, from (speaker, text); a bare role is no name."""
    messages, parent, roles = [], pm.ROOT, {}
    for place, (speaker, text) in enumerate(lines):
        role = speaker if speaker in pm.CHAT_ROLES else roles.setdefault(speaker, ("user", "assistant")[len(roles) % 2])
        key = pm.message_id(parent, pm.message_digest(role, text))
        name = None if speaker in pm.CHAT_ROLES else speaker
        messages.append(pm.Message(key, parent, role, text, name, at[place] if at else None))
        parent = key
    return messages


def nodes_of(messages):
    """The messages as the store's tree holds them."""
    tree = pm.Tree()
    for order, message in enumerate(messages):
        tree.put(message, order)
    return [tree.nodes[m.id] for m in messages]


def followed(index, messages):
    """The index, following those messages."""
    by_id = {m.id: m for m in messages}
    index.follow(nodes_of(messages), lambda ids: [by_id[i] for i in ids])
    return index


def indexed(messages, encode=None):
    """An index of those messages; with their vectors where `encode` (an `Encoder`) gives some."""
    index = followed(pm.MemoryIndex(), messages)
    if encode:
        texts = {key: text for m in messages for key, text in pm.embedded_texts(m).items()}
        index.add_vectors(dict(zip(texts, encode(list(texts.values())), strict=True)))
        parts = {m.fingerprint: some for m in messages if (some := pm.sentences(m.content))}
        index.add_sentences({h: pm.vector_codes(encode(some)) for h, some in parts.items()})
    return index


class Encoder:
    """The program's embedder; texts are encoded once."""

    def __init__(self, name=""):
        self.embedder, self.known = pm.Embedder(name or pm.Settings().embedder), {}

    def __call__(self, texts):
        """Unit vectors, float32 [len(texts), dimensions]."""
        fresh = [t for t in dict.fromkeys(texts) if t not in self.known]
        self.known.update(zip(fresh, self.embedder.encode(fresh), strict=True) if fresh else {})
        return np.stack([self.known[t] for t in texts])


def asked(index, text, asker="", encode=None, before=()):
    """Places, best first, and the scores by signal."""
    query = pm.understand(text, asker, index.speakers, index.now, before, index.language)
    vector = encode([query.spoken])[0] if encode and encode.embedder.reads(query.spoken) else None
    word_vectors = encode.embedder.word_vectors if encode else None
    scores = pm.weigh(query, index.evidence(query.words, vector, None, word_vectors))
    return np.argsort(-scores["score"], kind="stable").tolist(), scores


def newest_first(messages, index, text, asker="", encode=None):
    """The memories that a question finds, best first, in the order in which the program tells them."""
    ranking, scores = asked(index, text, asker, encode)
    query = pm.understand(text, asker, index.speakers, index.now, (), index.language)
    memories = [pm.Memory(messages[i], i, float(scores["score"][i]), {}) for i in ranking]
    return pm.with_newest_first(memories, index, query, encode([query.spoken])[0])


def read_chat(name):
    """Messages, and (asker, question, places of the evidence, place of the older fact) from a file of tests/data."""
    lines, tags, asks = [], {}, []
    for line in (DATA / f"{name}.txt").read_text("utf-8").splitlines():
        if line.startswith("? "):
            evidence, asker, question = line[2:].split(" | ")
            new, _, old = evidence.partition(">")
            asks.append((asker, question, [tags[t] for t in new.split()], tags.get(old)))
        elif found := re.match(r"(?:@(\w+) )?(\w+): (.*)", line):
            tags[found[1]] = len(lines)
            lines.append((found[2], found[3]))
    return chat(*lines), asks


def recall_at(name, k, encode=None):
    """Per question of a written chat the share of its evidence among the first k messages found."""
    messages, asks = read_chat(name)
    index, shares = indexed(messages, encode), {}
    for asker, question, evidence, _ in asks:
        best = asked(index, question, "" if asker == "user" else asker, encode)[0][:k]
        shares[question] = len(set(best) & set(evidence)) / len(evidence)
    return shares


def open_chat(running, chat_id: str) -> pm.Chat:
    """An open chat of a server in this process; it stays open, since a test has few."""
    with running.server.memory.registry.borrow(chat_id) as chat:
        return chat


def tiny_bert(folder: Path, labels=("answers",), seed=7):
    """A BERT classifier of a few hundred weights, untrained, and its tokenizer of letters, saved in a folder."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in words[5:]]
    (folder / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
        max_position_embeddings=64, initializer_range=1.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    return model
