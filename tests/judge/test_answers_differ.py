r"""Answers that look alike and differ, beside twins of each kind that are equal; and the
vote, which reads them as the verdict does."""

import itertools

import pytest

from nanomath.judge.answers import is_equivalent
from nanomath.measure.evaluation import judge_outputs
from nanomath.tasks import Problem


def pairs_of(text: str) -> list[tuple[str, str]]:
    return [tuple(line.strip().split(" | ")) for line in text.strip().splitlines()]


WORDS_DIFFER = r"""
On Monday | On Friday
No solution | No limit
no solution | on limit
the cat | the dog
an apple | an orange
ten | net
ten | \text{net}
odd | ddo
cat | act
two | tow
no | on
is | si
by car | by bus
At noon | At night
It is odd | It is even
is odd | is even
in order | in total
no one | on one
we win | we lose
a day | a week
not a number | not a prime
Ann, Bob | Ann, Tom
x is odd | x is even
x = no solution | x = no limit
up | pu
go left | go right
a b c is odd | a b c is even
xy z | x yz w
(ten) | (net)
\{ten\} | \{net\}
on/off | no/off
xy z | yx z
at ant | ta ant
x - ten | x - net
x-ten | x-net
x = at noon | x = ta noon
x = ten | x = net
"""
WORDS_EQUAL = r"""
no solution | \text{no solution}
No solution | \text{no solution.}
odd | \text{odd}
ten | \text{ten}
in | \text{in}
On Monday | \text{On Monday}
On Monday | \text{On } \text{Monday}
an apple | \text{an apple}
the cat | \text{cat}
yes | \text{Yes}
not a number | \text{not a number}
xy | yx
xy | x y
xy | x \cdot y
abc | cba
xyz | \text{xyz}
ab | ba
mgh | hgm
abx | a \cdot b \cdot x
bi | b \cdot i
x and y | y, x
xy, yz | yz, xy
pi | \pi
sin x | \sin x
x cm | x
oo | \infty
"""
COMMAS_DIFFER = r"""
2,001 | 1,002
0,001 | 1,000
0,001 | 1,0
0,001 | 1
1,234 | 234,1
12,345 | 345,12
70,110 | 110,70
70,110 | 110, 70
3,100 | 100,3
100,200 | 200,100
1,234,567 | 567,234,1
1,234 | 1,432
0,012 | 12,0
1,002 | 1, 2
2,001 | (2,001)
10,020 | 20, 10
"""
COMMAS_EQUAL = r"""
1,234 | 1234
2,001 | 2001
70,110 | 70, 110
70,110 | \{70,110\}
1,234,567 | 1234567
\$2,001 | 2001
1,002 | 1{,}002
2, 1 | 1, 2
110, 70 | 70, 110
12,34 | 34,12
1,2,3 | 3,2,1
100, 200 | 200, 100
3,4 | 4,3
1000 | 1,000.00
-2,016 | -2016
"""
UNITS_DIFFER = r"""
5\text{ tenths} | 5
3\text{ trillion} | 3
5\text{ divided by two} | 5
7\text{ is wrong} | 7
7\%\text{ is wrong} | 7\%
x = 5 km | x = 5 cm
x = 5 km | 5 cm
5 km = 5 cm | 5 cm
5\text{ mg} | 5\text{ g}
5 mg | 5 kg
5\text{ ml} | 5\text{ dl}
5 kPa | 5 Pa
3 quarters | 3
2 thirds | 2
1 tenth | 1
5 \text{ out of ten} | 5
4\text{ hundreds} | 4
5\text{ dozens} | 5
5\text{ times two} | 5
5\text{ less than ten} | 5
7\text{ is not it} | 7
7\text{, which isn't right} | 7
5\text{ multiplied by } x | 5
5\text{ cm} x | 5 cm
5\text{ at most} | 5
5 on | 5
5 no | 5 on
5 \text{ m/s} | 5 m
5 \text{ m/s} | 5 \text{ km/s}
5 \text{ m}/\text{s} | 5 \text{ m}/\text{h}
5 pages per hour | 5 pages per minute
5 miles per hour | 5 km per hour
20 degrees Celsius | 20 degrees Fahrenheit
5平方厘米 | 5平方米
5立方米 | 5平方米
5吨 | 5千克
3个半 | 3
5分之一 | 5
5不对 | 5
2(5 cm) | 2(5 km)
(50\%)(2) | 100
(1, 2) cm | (1, 2) km
x = 5 cm, y = 3 cm | x = 5 km, y = 3 km
5 months | 5 years
5 nickels | 5 dimes
5\text{ euros} | 5 dollars
5 over two | 5
5\text{ (incorrect)} | 5
5\text{, not six} | 5
5 Hz | 5 kHz
5 millimeters | 5 micrometers
5\% | 5 cm
5\text{ units squared} | 5\text{ units cubed}
"""
UNITS_EQUAL = r"""
5 cm | 5
5\text{ mg} | 5
5 mg | 5 milligrams
5 apples | 5
5 red apples | 5 apples
x = 5 km | x = 5
x = 5 km | 5 kilometers
x = 5 km | 5 km = x
3\text{ trillion} | 3 \cdot 10^{12}
8 (quarters) | 8
9 third graders | 9
14 times | 14
12 (hot dogs) | 12
16 (bad carrots) | 16
60 mph | 60 miles per hour
5\text{ m/s} | 5 \text{ m}/\text{s}
\$5 per hour | \$5
5 cents | 5
20 degrees Celsius | 20^\circ
5平方厘米 | 5
5平方厘米 | 5\text{ cm}^2
5 tons of sand | 5吨
15 cm squared | 15 cm^2
7\% | 0.07
2(3 \cdot 4) | 24
5 gallons of milk | 5 gallons
-(90) | -90
"""
LABELS_DIFFER = r"""
A: 3 | A: 7
A. 3 | A. 7
(A) 3 | (A) 7
B: yes | B: no
(C) \frac12 | (C) \frac13
A: 3 | B: 3
A: 3 | 3
x: 3 | x: 7
C, A, B | A, B, C
CAB | ABC
\text{B, A, C} | \text{A, B, C}
D, C, B, A | A, B, C, D
B, A | A, B
C, A, B | B, A, C
A, C | A, D
"""
LABELS_EQUAL = r"""
A: 3 | A
(A) 3 | (A)
(C) 12 cm | C. 12
(C) \frac12 | C. 0.5
C, A, B | \text{CAB}
A, B, C | ABC
(A, B, C) | A B C
B, C | C, B
A, D | D, A
C, F, H | \text{H, C, F}
A | (A)
x: 3 | x : 3
3:7 | 3 : 7
A. | A
BCD | B, C, D
"""
FUNCTIONS_DIFFER = r"""
H(0) | 0
P(0) | 0
y(0) | 0
H(2) | 2H
P(A) | AP
P(A) | A(P)
G(1) | G(1) + G(0)
F(1-1) | 0
T(3) | 3T
u(t) | t(u)
F(3) - F(0) | 3F
H(0) | P(0)
P_1(0) | 0
\Phi(0) | 0
\Gamma(5) | 5\Gamma
H(\frac12) | \frac{H}{2}
H(2x) | 2Hx
f^{-1}(0) | 0
f^{-1}(x) | \frac{1}{f(x)}
F'(0) | 0
\cos^{-1} x | 1/\cos x
\sin^{-1} x | \frac{1}{\sin x}
\tan^{-1}(1) | \cot(1)
\cos^{-1} x | \sin^{-1} x
\ln^{-1} x | 1/\ln x
"""
FUNCTIONS_EQUAL = r"""
H(0) | H( 0 )
P(A) + P(B) | P(B) + P(A)
2H(0) | H(0) + H(0)
k(k+1) | k^2 + k
n(n-1) | n^2 - n
A(x+1) | Ax + A
x(y+z) | xy + xz
\pi(4) | 4\pi
2(3) | 6
2x(x+1) | 2x^2 + 2x
f(1+1) | f(2)
e(2) | 2e
F(1+1) | F(2)
f^2 + 1 | 1 + f \cdot f
r(\sqrt2-1) | \sqrt2 r - r
\theta(2) | 2\theta
\cos^{-1} x | \arccos x
\sin^{-1}(x) | \arcsin(x)
\cos^{2} x | \cos x \cos x
\cos^{-2} x | \frac{1}{(\cos x)^2}
"""
DIFFERENT = (WORDS_DIFFER, COMMAS_DIFFER, UNITS_DIFFER, LABELS_DIFFER, FUNCTIONS_DIFFER)
EQUAL = (WORDS_EQUAL, COMMAS_EQUAL, UNITS_EQUAL, LABELS_EQUAL, FUNCTIONS_EQUAL)


@pytest.mark.parametrize(("a", "b"), [pair for text in DIFFERENT for pair in pairs_of(text)])
def test_different(a, b):
    """Answers that look alike and differ are not equal, in either order; each equals itself."""
    assert not is_equivalent(a, b)
    assert not is_equivalent(b, a)
    assert is_equivalent(a, a + " ") and is_equivalent(b, b + " ")


@pytest.mark.parametrize(("a", "b"), [pair for text in EQUAL for pair in pairs_of(text)])
def test_equal(a, b):
    """The twins of those that differ are equal, in both orders."""
    assert is_equivalent(a, b)
    assert is_equivalent(b, a)


@pytest.mark.parametrize(
    ("answers", "reference", "classes"),
    [
        (["5", "5 cm", "5 km", "5 cm"], "7", [0, 1, 2, 1]),
        (["5", "5 cm", "5", "5 cm"], "7", [0, 0, 0, 0]),
        (["5", "5 cm", "6 km", "5"], "5 km", [0, 1, 2, 0]),  # 5 is right, 5 cm is wrong
        (["25", "25%", "0.25", "25"], "7", [0, 1, 2, 0]),
        (["70,110", "70110", "70, 110", "110, 70"], "7", [0, 1, 2, 3]),
        (["Monday", r"\text{Monday}", "Friday", "monday"], "Sunday", [0, 0, 1, 0]),
    ],
)
def test_the_vote_is_a_partition_of_any_order(answers, reference, classes):
    """In every order of the samples the same answers vote together, each class under one verdict,
    and two answers alone vote together where the judge calls them equal."""
    problem = Problem(0, "math", "What is it?", {"answer": reference})
    for order in itertools.permutations(range(len(answers))):
        outputs = [{"text": rf"\boxed{{{answers[i]}}}".replace("%", r"\%")} for i in order]
        judged = judge_outputs(problem, outputs)
        for (i, a), (j, b) in itertools.combinations(zip(order, judged, strict=True), 2):
            assert (a["class"] == b["class"]) == (classes[i] == classes[j])
            assert a["correct"] == b["correct"] or a["class"] != b["class"]
    for a, b in itertools.combinations(answers, 2):
        outputs = [{"text": rf"\boxed{{{text}}}".replace("%", r"\%")} for text in (a, b)]
        alone = judge_outputs(problem, outputs)
        same = alone[0]["class"] == alone[1]["class"]
        assert same == (is_equivalent(a, b) and alone[0]["correct"] == alone[1]["correct"])
