"""The fastText classifier that tells math pages from others (Sec. 2.1, step 2).

Trained with one thread, because only then do two runs give the same model. A two-class fastText
model is linear in its rows, so `collapse` rewrites it with one number per row: the same
probabilities, dim times smaller and about four times faster.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import fasttext
import numpy as np

from nanomath.base.files import open_atomically
from nanomath.corpus.settings import CorpusConfig
from nanomath.corpus.text import normalise

POSITIVE = "__label__math"
NEGATIVE = "__label__other"
_BATCH = 256


def train(pages: Iterable[tuple[str, bool]], model_path: str | Path, cfg: CorpusConfig) -> None:
    """Train on (page text, is math) in the order given; write the collapsed model.

    Raises ValueError where either class has no page.
    """
    model_path = Path(model_path)
    train_path = model_path.with_suffix(".train.txt")
    whole_path = model_path.with_suffix(".whole.bin")
    counts = {True: 0, False: 0}
    with open(train_path, "w", encoding="utf-8") as lines:
        for text, is_math in pages:
            counts[is_math] += 1
            lines.write(f"{POSITIVE if is_math else NEGATIVE} {normalise(text)}\n")
    if not all(counts.values()):
        raise ValueError(
            f"the classifier needs pages of both classes, not {counts[True]} math pages "
            f"and {counts[False]} others"
        )
    try:
        model = fasttext.train_supervised(
            input=str(train_path),
            dim=cfg.dim,
            lr=cfg.lr,
            wordNgrams=cfg.word_ngrams,
            minCount=cfg.min_count,
            epoch=cfg.epochs,
            bucket=cfg.buckets,
            seed=cfg.seed,
            loss="softmax",
            thread=1,
            verbose=0,
        )
    except ValueError as error:  # "Empty vocabulary. Try a smaller -minCount value."
        raise ValueError(
            f"fastText cannot train on {sum(counts.values())} pages: {error}"
        ) from None
    model.save_model(str(whole_path))
    del model  # before collapse loads it again: never two copies in memory
    collapse(whole_path, model_path)
    whole_path.unlink()
    train_path.unlink()


def collapse(source: str | Path, target: str | Path) -> None:
    """Write an exact one-dimensional copy of a two-class softmax model.

    softmax([h.o0, h.o1]) depends only on h.(o0 - o1), and h is a mean of rows, so each row can be
    replaced by its product with o0 - o1 and the output layer by [1, 0].
    Raises ValueError where fastText has written another layout of file.
    """
    model = fasttext.load_model(str(source))
    rows, output = model.get_input_matrix(), model.get_output_matrix()
    num_rows, dim = rows.shape
    scores = (rows @ (output[0] - output[1])).astype("<f4")
    # The file ends with, for input and output: a quantised flag, (rows, columns), the values.
    tail = (1 + 16 + 4 * num_rows * dim) + (1 + 16 + 4 * output.size)
    with open(source, "rb") as whole, open_atomically(target, "wb") as small:
        header = bytearray(whole.read(os.path.getsize(source) - tail))
        if struct.unpack_from("<i", header, 8)[0] != dim:  # after magic number and version
            raise ValueError(f"{source}: not the fastText file layout this was written for")
        struct.pack_into("<i", header, 8, 1)
        small.write(header)
        small.write(b"\0" + struct.pack("<qq", num_rows, 1) + scores.tobytes())
        small.write(b"\0" + struct.pack("<qq", 2, 1) + np.array([1, 0], "<f4").tobytes())


def load(model_path: str | Path):
    """Load a trained or collapsed model."""
    return fasttext.load_model(str(model_path))


def math_probabilities(model, texts: Iterable[str]) -> Iterator[float]:
    """Yield the probability of the math class for each page text.

    Only list calls: a single string fails in some releases of the package with numpy 2.
    """
    texts = iter(texts)
    while batch := [normalise(text) for text in islice(texts, _BATCH)]:
        labels, probabilities = model.predict(batch, k=2, threshold=-1.0)
        for page_labels, page_probabilities in zip(labels, probabilities):
            yield float(page_probabilities[list(page_labels).index(POSITIVE)])
