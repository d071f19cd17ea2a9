"""The fastText classifier: determinism, the exact collapse, Chinese, hostile pages."""

import random

import fasttext
import numpy as np
import pytest

from nanomath.corpus import classifier
from nanomath.corpus.settings import CorpusConfig
from nanomath.corpus.text import normalise

SMALL = CorpusConfig(dim=16, lr=1.0, min_count=1, epochs=5, buckets=5000)


def _pages(seed: int, num: int = 300) -> list[tuple[str, bool]]:
    rng = random.Random(seed)
    math, other = [f"m{i}" for i in range(200)], [f"o{i}" for i in range(200)]
    common = [f"c{i}" for i in range(200)]
    return [
        (" ".join(rng.choices(common + (math if i % 2 else other), k=60)), bool(i % 2))
        for i in range(num)
    ]


def test_two_trainings_give_the_same_file(tmp_path):
    """One thread and a seed: the model files are equal byte by byte, and nothing else is left."""
    for name in ("a.bin", "b.bin"):
        classifier.train(_pages(0), tmp_path / name, SMALL)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "b.bin"]


def test_collapse_keeps_every_probability(tmp_path):
    """One number per row instead of 16: probabilities within 1e-6, a file 16 times smaller."""
    train_path, whole = tmp_path / "train.txt", tmp_path / "whole.bin"
    lines = [
        f"{classifier.POSITIVE if is_math else classifier.NEGATIVE} {normalise(text)}"
        for text, is_math in _pages(0)
    ]
    train_path.write_text("\n".join(lines) + "\n")
    options = {"dim": 16, "lr": 1.0, "epoch": 40, "wordNgrams": 3, "bucket": 5000, "thread": 1}
    model = fasttext.train_supervised(str(train_path), minCount=1, verbose=0, **options)
    model.save_model(str(whole))
    classifier.collapse(whole, tmp_path / "small.bin")
    texts = [text for text, _ in _pages(1)] + ["", "unseen words only", "小明 有 12 个"]
    first = np.array(list(classifier.math_probabilities(classifier.load(whole), texts)))
    small = classifier.load(tmp_path / "small.bin")
    second = np.array(list(classifier.math_probabilities(small, texts)))
    assert np.abs(first - second).max() < 1e-6
    assert first[:300].max() > 0.9 and first[:300].min() < 0.1
    assert small.get_dimension() == 1
    assert (tmp_path / "small.bin").stat().st_size < whole.stat().st_size / 8


def test_chinese_math_is_told_from_chinese_notices(tmp_path):
    """Characters are tokens, so unspaced Chinese text of both classes is separated."""
    rng = random.Random(0)
    math, other, common = "加减乘除求解等于分数方程", "天气公园车站城市通知电话", "的一是在有个"
    pages = [
        ("".join(rng.choices((math if i % 2 else other) + common, k=50)), bool(i % 2))
        for i in range(400)
    ]
    classifier.train(pages[:300], tmp_path / "m.bin", SMALL)
    model = classifier.load(tmp_path / "m.bin")
    found = list(classifier.math_probabilities(model, [text for text, _ in pages[300:]]))
    assert np.mean([(p > 0.5) == is_math for p, (_, is_math) in zip(found, pages[300:])]) > 0.95


def test_a_page_cannot_label_itself(tmp_path):
    """Pages of the other class that say __label__math, or </s>, train nothing new."""
    pages = [
        (text if is_math else f"__label__math </s> {text}", is_math) for text, is_math in _pages(0)
    ]
    classifier.train(pages, tmp_path / "m.bin", SMALL)
    model = classifier.load(tmp_path / "m.bin")
    assert sorted(model.get_labels()) == [classifier.POSITIVE, classifier.NEGATIVE]
    found = list(classifier.math_probabilities(model, [text for text, _ in pages]))
    assert np.mean([(p > 0.5) == is_math for p, (_, is_math) in zip(found, pages)]) > 0.95


def test_one_class_is_an_error(tmp_path):
    """Training needs math pages and others."""
    with pytest.raises(ValueError, match="2 math pages and 0 others"):
        classifier.train([("a b", True), ("c d", True)], tmp_path / "m.bin", SMALL)
