"""A made-up web for the tests: hosts of mathematics and others, with words of their own."""

import random

import pytest

from nanomath.corpus.pages import Page

MATH_HOSTS = [f"{name}.sympy" for name in ("sums", "roots", "limits", "series", "groups", "bases")]
MATH_HOSTS += [f"{name}.mpmath" for name in ("zeta", "gamma", "quad")]
HOSTS = [*MATH_HOSTS, "weather.notices", "trains.notices", "menus.notices", "tongzhi.notices"]
MATH_WORDS = "sum product root prime integral matrix proof lemma equals 3 7 12 方程 题 解"
OTHER_WORDS = "rain train ticket menu mayor garden street music harbour 9 am 通知 天气"
COMMON_WORDS = "the of and a in is that for with on as by this from at page"


def pages(num: int, seed: int) -> list[Page]:
    """Return num pages of 1,000 words, the hosts taking turns; the same for the same seed."""
    found = []
    for number in range(num):
        host, rng = HOSTS[number % len(HOSTS)], random.Random(f"{seed} {number}")
        words = COMMON_WORDS.split() + [f"{host[:3]}{i}" for i in range(40)]
        words += (MATH_WORDS if host in MATH_HOSTS else OTHER_WORDS).split()
        found.append(Page(f"https://{host}/{seed}/{number}", " ".join(rng.choices(words, k=1000))))
    return found


@pytest.fixture(scope="session")
def made_up_pages():
    return pages
