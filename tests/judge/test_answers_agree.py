"""Right answers written otherwise: relations, sets, matrices, decimals beside a value, powers."""

import pytest

from nanomath.judge.answers import is_equivalent
from tests.judge.test_answers import cpu_seconds

SAME = r"""
\frac23 \approx 0.67 ~ \frac{2}{3}
\frac23 ≈ 0.667 ~ 2/3
x = \frac23 \approx 0.67 ~ 2/3
\sqrt2 \approx 1.41 ~ \sqrt{2}
\left[\begin{array}{c}1\\2\end{array}\right] ~ \begin{pmatrix}1\\2\end{pmatrix}
\left(\begin{array}{cc}1&0\\0&1\end{array}\right) ~ \begin{bmatrix}1&0\\0&1\end{bmatrix}
x >= 5 ~ x \geq 5
x \ge 5 ~ 5 \le x
x \geqslant 5 ~ [5, \infty)
-x > -1 ~ x < 1
x \ne 3 ~ x \neq 3
x \ne 3 ~ (-\infty,3)\cup(3,\infty)
2x + 1 < 5 ~ x < 2
1 < x \leq 3 ~ (1, 3]
x \in [1,3) ~ [1,3)
\{x : x > 2\} ~ x > 2
\{x \mid x > 2\} ~ (2, \infty)
\{x \in \mathbb{R} : x \ge 2\} ~ [2,\infty)
x < 2 \text{ or } x > 5 ~ (-\infty,2)\cup(5,\infty)
{5} ~ \{5\}
{5} ~ 5
\{5\} ~ 5
\emptyset ~ \varnothing
\{\} ~ \emptyset
∅ ~ \emptyset
\text{empty set} ~ \emptyset
\mathbb{R} ~ (-\infty,\infty)
all real numbers ~ \mathbb{R}
ℝ ~ (-\infty, \infty)
x \in \mathbb{R} ~ \mathbb{R}
(n+1)2^n ~ 2^n(n+1)
2|x| ~ |x|\cdot 2
|x-1| ~ |1-x|
|2x| ~ 2|x|
\lvert x \rvert ~ |x|
p(x)=x^2 ~ x^2
f(x)=2x+1 ~ 2x+1
v_{\max}=5 ~ 5
v_{max}=5 ~ v_{max} = 5
(0;0;0) ~ (0,0,0)
(1;2) ~ (1,2)
\textnormal{5 cm} ~ 5\text{ cm}
\textnormal{Monday} ~ Monday
\textcolor{red}{5} ~ 5
\color{blue}5 ~ 5
\color{blue}{x+1} ~ x+1
5\u200b ~ 5
x² ~ x^2
10⁻³ ~ 10^{-3}
x¹² ~ x^{12}
a₁ ~ a_1
2^{n+1} ~ 2\cdot2^n
2^{n+1} ~ 2\cdot 2^{n}
a^m a^n ~ a^{m+n}
e^{x+1} ~ e e^x
4^n ~ 2^{2n}
6^n ~ 2^n 3^n
2^{2n} ~ (2^n)^2
2^{n-1} ~ \frac{2^n}{2}
\mathsf{x} ~ x
\underline{5} ~ 5
5\hspace{1cm} ~ 5
5\phantom{0} ~ 5
3^{2n+1} ~ 3\cdot 9^n
\frac13 \approx 0.333 \approx 0.33 ~ 1/3
\frac16 \approx 0.2 ~ 1/6
\frac23 \approx 66.7\% ~ 2/3
\pi \approx 3.14 ~ \pi
\ln 2 \approx 0.693 ~ \ln 2
|AB| < 3 ~ 3 > |BA|
x \approx 0.67 ~ 0.67
\left[\begin{array}{c c} 1 & 2 \end{array}\right] ~ \begin{bmatrix} 1 & 2 \end{bmatrix}
\left[\begin{array}[t]{@{}cc@{}} 1 & 2 \end{array}\right] ~ \begin{bmatrix} 1 & 2 \end{bmatrix}
\begin{bmatrix*}[r] 1 & 2 \end{bmatrix*} ~ \begin{bmatrix} 1 & 2 \end{bmatrix}
\left[\begin{smallmatrix} 1 & 2 \end{smallmatrix}\right] ~ \begin{Bmatrix} 1 & 2 \end{Bmatrix}
\frac{1}{2}\left[\begin{array}{cc} 2 & 4 \end{array}\right] ~ \begin{pmatrix} 1 & 2 \end{pmatrix}
x ⩾ 5 ~ x \geqq 5
x \not= 3 ~ x \ne 3
x > \pi ~ (\pi, \infty)
x - \sqrt2 > 0 ~ x > \sqrt2
1 < 2x < 6 ~ \frac12 < x < 3
-1 \le -x < 2 ~ -2 < x \le 1
-3 \le x-1 \le 3 ~ [-2, 4]
x + y \le 3 ~ 0 \ge 2y + 2x - 6
-\infty < x < \infty ~ \mathbb{R}
x \le \frac12 \text{ or } x > \sqrt2 ~ (-\infty,\frac12]\cup(\sqrt2,\infty)
x < -2 \text{ or } 1 < x < 3 ~ (1,3)\cup(-\infty,-2)
\{x : x < 1 \text{ or } x > 3\} ~ (-\infty,1)\cup(3,\infty)
\mathbb R ~ \R
\Bbb{R} ~ \mathbb{R}
ℤ ~ \mathbb Z
|xy| ~ |y||x|
|1-\sqrt2| ~ \sqrt2-1
|-\pi| ~ \pi
|3i| ~ 3
|AB| = 5 ~ 5
\abs{x} ~ |x|
v_{\mathrm{max}} = 5 ~ v_{\max} = 5
\underline{\frac{1}{2}} ~ 1/2
\mathbf{x^2} ~ x^2
\boldsymbol{x^{2}+1}\cdot 2 ~ 2x^2+2
\textbf{$\frac{1}{2}$} ~ 1/2
\colorbox{yellow}{5} ~ 5
\color[RGB]{1} 5 ~ 5
\huge{5} ~ \tiny 5
5\thinspace x ~ 5\enspace x
5\>x ~ 5x
\nicefrac{1}{2} ~ 1/2
(\frac12)^n ~ 2^{-n}
0.5^n ~ \frac{1}{2^n}
\left(\frac{2}{3}\right)^n ~ \frac{2^n}{3^n}
\sqrt{2}^n ~ 2^{n/2}
(2x)^n ~ 2^n x^n
"""
DIFFERENT = r"""
\frac23 \approx 0.67 ~ 0.67
\frac23 \approx 5 ~ \frac23
5 \approx 7 ~ 5
x > 5 ~ x \ge 5
x > 5 ~ x < 5
-x > -1 ~ x > 1
x \ne 3 ~ x \ne 4
x \ne 3 ~ (-\infty,3)
x \ne 3 ~ 3
(1,2), (3,4) ~ (1,2)\cup(3,4)
{5} ~ 6
\emptyset ~ 0
\{0\} ~ \emptyset
\mathbb{R} ~ \mathbb{N}
\mathbb{R} ~ R
\mathbb{Z} ~ \mathbb{Q}
(n+1)2^n ~ (n+1)^2n
2|x| ~ 2x
|x-1| ~ |x+1|
|x| ~ x
p(x)=x^2 ~ x^3
(0;0;0) ~ (0,0,1)
(1;2) ~ 12
x² ~ x2
10⁻³ ~ 10^3
2^{n+1} ~ 2^n+1
2^{n+1} ~ 2^n
a^m a^n ~ a^{mn}
4^n ~ 2^n
6^n ~ 3^n
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\1\end{pmatrix}
\{x : x > 2\} ~ x > 3
x < 2 \text{ or } x > 5 ~ (-\infty,2)
1 < x \leq 3 ~ [1, 3)
v_{\max}=5 ~ v_{\min}=5
|x| < 3 ~ x < 3
\sqrt{x} > 2 ~ x > 2
2^x > 4 ~ x > 4
|x| < 3 ~ (-\infty,3)
2f(1) > 6 ~ (3,\infty)
2x + x^2 > 4 ~ (2-\frac{x^2}{2},\infty)
\ln 2 \approx 0.693 ~ 0.693
|AB| < 3 ~ |CD| < 3
f(1) > 3 ~ f(2) > 3
\pi > 3 ~ x > 3
3 < \infty ~ x > 3
x < 5 \text{ cm} ~ x < 5 \text{ km}
x < 3 ~ y < 3
x \ne 3 ~ y \ne 3
2x > 4 ~ 2y > 4
1 < x < 3 ~ 1 < y < 3
-1 \le -x < 2 ~ -2 \le x < 1
x + y \le 3 ~ x + y \ge 3
2 < 3 ~ 5 < 9
\{x : y > 2\} ~ x > 2
\{x \in \mathbb{Z} : x > 2\} ~ x > 2
x > 1 \text{ and } x < 3 ~ (-\infty,3)\cup(1,\infty)
x < 1 \text{ or } y > 3 ~ (-\infty,1)\cup(3,\infty)
x \le 2 \text{ or } x \ge 2 ~ (-\infty,2]\cup[2,\infty)
\mathbb{R}^2 ~ \mathbb{R}
x \approx 5 ~ x
\pi \approx 5 ~ \pi
\frac23 \approx 0.67 \text{ cm} ~ \frac23 \text{ km}
\frac13 \approx 0.3 ~ 0.3
(0,5;1) ~ (0,5,1)
\begin{vmatrix} 1 & 2 \end{vmatrix} ~ \begin{pmatrix} 1 & 2 \end{pmatrix}
\left|\begin{array}{cc}1&2\end{array}\right| ~ \begin{pmatrix}1&2\end{pmatrix}
\sqrt{x} = 2 ~ 2
2^n = 8 ~ 8
x! = 6 ~ 6
\pi = 3 ~ 3
|x+y| ~ |x|+|y|
|2-\sqrt2| ~ \sqrt2-2
|AB| ~ AB
(-2)^n ~ -2^n
(-2)^{2n} ~ 2^{2n+1}
(ab)^{1/2} ~ a^{1/2} b
(\frac23)^n ~ \frac{2^n}{3}
(x^2)^n ~ x^n
"""


def pairs_of(table: str) -> list[tuple[str, str]]:
    rows = [row.replace(r"\u200b", "\u200b").split(" ~ ") for row in table.splitlines() if row]
    return [(a, b) for a, b in rows]


@pytest.mark.parametrize(("a", "b"), pairs_of(SAME))
def test_same(a, b):
    """The same answer is equal however it is written, in either order."""
    assert is_equivalent(a, b) and is_equivalent(b, a)


@pytest.mark.parametrize(("a", "b"), pairs_of(DIFFERENT))
def test_different(a, b):
    """What is read in more ways still tells different answers apart."""
    assert not is_equivalent(a, b) and not is_equivalent(b, a)


@pytest.mark.parametrize(
    "piece",
    ["x<1,", "x\\ne1,", "1<x,", "(3^{2000})^{x/2}", "(2^{4000})^n", "|x+1|", "|\\pi^{-999}|",
     "\\frac12\\approx0.5", "\\begin{array}{@{}", "\\mathbf{x+1}", "\\{x:", "2x+1<", "a^{n+m}"],
)  # fmt: skip
def test_repeated_pieces_are_quick(piece):
    """A thousand characters of relations, powers, bars and wrappers are judged within 50 ms."""
    text = (piece * 1000)[:999]
    for other in ("1", text.replace("1", "2"), text + "1"):
        assert cpu_seconds(is_equivalent, text, other) < 0.05
        assert is_equivalent(text, other) == is_equivalent(other, text)
