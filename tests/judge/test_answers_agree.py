"""Right answers written otherwise: relations, sets, matrices, decimals beside a value, powers."""

import pytest

from nanomath.judge.answers import is_equivalent

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
