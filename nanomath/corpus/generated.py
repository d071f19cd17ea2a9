"""Hosts of generated arithmetic, and some of generated notices, all labelled as generated.

Installed documentation explains mathematics but hardly calculates. These hosts do: worksheets and
problems worked step by step, in English and Chinese. The notices are full of numbers without being
mathematics, so that a digit or a Chinese character alone does not make a math page. A page is a
function of (seed, host, number), so any part can be made again anywhere.
"""

import random
from collections.abc import Callable, Iterator
from fractions import Fraction

from nanomath.corpus.pages import Page

_NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Lena",
    "Max",
    "Nora",
    "Oscar",
    "Paula",
    "Sam",
)
_THINGS = (
    "apples",
    "pencils",
    "books",
    "stickers",
    "marbles",
    "cards",
    "shells",
    "cookies",
    "stamps",
    "beads",
)
_PLACES = (
    "Northgate",
    "Millbrook",
    "Harbour",
    "Station",
    "Castle",
    "Airport",
    "Riverside",
    "Oakfield",
)
_ZH_NAMES = ("小明", "小红", "小刚", "小丽", "小华", "小芳", "乐乐", "明明")
_ZH_THINGS = ("个苹果", "支铅笔", "本书", "张邮票", "颗糖", "朵花", "个气球", "块饼干")
_ZH_PLACES = ("城东", "城西", "火车站", "图书馆", "人民公园", "体育馆", "东湖", "西山")


def _sums(rng: random.Random) -> str:
    high = rng.choice((20, 50, 100, 200, 1000))
    lines = [f"Worksheet: addition and subtraction up to {high}"]
    for number in range(1, rng.randint(60, 110)):
        a, b = rng.randint(0, high), rng.randint(0, high)
        if rng.random() < 0.5:
            lines.append(f"{number}) {a} + {b} = {a + b}")
        else:
            lines.append(f"{number}) {max(a, b)} - {min(a, b)} = {max(a, b) - min(a, b)}")
    return "\n".join(lines)


def _products(rng: random.Random) -> str:
    high = rng.choice((10, 12, 20, 100))
    lines = [f"Worksheet: multiplication and division up to {high}"]
    for number in range(1, rng.randint(60, 110)):
        a, b = rng.randint(1, high), rng.randint(1, 12)
        if rng.random() < 0.5:
            lines.append(f"{number}) {a} * {b} = {a * b}")
        else:
            lines.append(f"{number}) {a * b} / {b} = {a}")
    return "\n".join(lines)


def _apply(a: int, symbol: str, b: int) -> int | None:
    if symbol == "/":
        return a // b if b and a % b == 0 else None
    return {"+": a + b, "-": a - b if a >= b else None, "*": a * b}[symbol]


def _expression(rng: random.Random) -> tuple[str, list[str], int]:
    """Draw an expression of three or four numbers; return it, its steps and its value."""
    while True:
        values = [rng.randint(1, 99) for _ in range(rng.choice((3, 3, 4)))]
        terms = [(str(v), v) for v in values]
        steps = []
        while len(terms) > 1:
            place = rng.randrange(len(terms) - 1)
            (left, a), (right, b) = terms[place : place + 2]
            symbol = rng.choice("++--*/")
            value = _apply(a, symbol, b)
            if value is None or value > 2000:
                break
            steps.append(f"{a} {symbol} {b} = {value}")
            whole = f"{left} {symbol} {right}"
            terms[place : place + 2] = [(f"({whole})" if len(terms) > 2 else whole, value)]
        if len(terms) == 1:
            return terms[0][0], steps, terms[0][1]


def _order_of_operations(rng: random.Random) -> str:
    lines = ["Order of operations: work out the brackets first"]
    for number in range(1, rng.randint(20, 40)):
        expression, steps, value = _expression(rng)
        lines += [f"{number}. Calculate {expression}", *steps, f"So {expression} = {value}"]
    return "\n".join(lines)


def _chains(rng: random.Random) -> str:
    lines = ["Mental arithmetic: follow the chain"]
    for _ in range(rng.randint(15, 30)):
        value = rng.randint(1, 99)
        lines.append(f"Start with {value}.")
        for _ in range(rng.randint(2, 5)):
            symbol, other = rng.choice("+-*/"), rng.randint(1, 40)
            after = _apply(value, symbol, other)
            if after is None or after > 1000:
                symbol, after = "+", value + other
            lines.append(f"{value} {symbol} {other} = {after}")
            value = after
        lines.append(f"The result is {value}.")
    return "\n".join(lines)


def _fractions(rng: random.Random) -> str:
    lines = ["Adding and multiplying fractions, worked examples"]
    for number in range(1, rng.randint(15, 30)):
        a, b = (Fraction(rng.randint(1, 12), rng.randint(2, 12)) for _ in range(2))
        (p, q), (r, s) = a.as_integer_ratio(), b.as_integer_ratio()
        if rng.random() < 0.5:
            lines.append(
                f"{number}. {p}/{q} + {r}/{s}: the common denominator is {q * s}. "
                f"{p}*{s} = {p * s} and {r}*{q} = {r * q}, the sum is {p * s + r * q}/{q * s} "
                f"= {a + b}."
            )
        else:
            lines.append(
                f"{number}. {p}/{q} times {r}/{s}: {p}*{r} = {p * r} over {q}*{s} = {q * s}, "
                f"which is {p * r}/{q * s} = {a * b}."
            )
    return "\n".join(lines)


def _equations(rng: random.Random) -> str:
    lines = ["Solving linear equations step by step"]
    for number in range(1, rng.randint(15, 30)):
        a, x, b = rng.randint(2, 12), rng.randint(-20, 30), rng.randint(1, 60)
        lines.append(
            f"{number}. Solve {a}x + {b} = {a * x + b}. Subtract {b} from both sides: "
            f"{a}x = {a * x}. Divide by {a}: x = {x}. Check: {a} * {x} + {b} = {a * x + b}."
        )
    return "\n".join(lines)


def _word_problems(rng: random.Random) -> str:
    lines = ["Word problems with solutions"]
    for number in range(1, rng.randint(10, 20)):
        name, other = rng.sample(_NAMES, 2)
        thing, a, b, c = rng.choice(_THINGS), *(rng.randint(2, 60) for _ in range(3))
        story = rng.randrange(3)
        if story == 0:
            lines.append(
                f"{number}. {name} has {a} {thing} and {other} has {b}. They share them in bags "
                f"of {c}. How many are left over? Together they have {a} + {b} = {a + b} {thing}. "
                f"{a + b} divided by {c} is {(a + b) // c} with remainder {(a + b) % c}. "
                f"Answer: {(a + b) % c}."
            )
        elif story == 1:
            lines.append(
                f"{number}. {name} buys {a} {thing} for {b} cents each and pays with {a * b + c} "
                f"cents. How much change is there? The price is {a} * {b} = {a * b} cents. "
                f"{a * b + c} - {a * b} = {c}. Answer: {c} cents."
            )
        else:
            lines.append(
                f"{number}. {other} had {a + b} {thing}, gave {a} of them to {name} and then found "
                f"{c} more. How many now? {a + b} - {a} = {b}. {b} + {c} = {b + c}. "
                f"Answer: {b + c}."
            )
    return "\n".join(lines)


def _zh_sums(rng: random.Random) -> str:
    high = rng.choice((20, 50, 100))
    lines = [f"口算练习：{high}以内的加减乘除法"]
    for number in range(1, rng.randint(50, 90)):
        a, b, symbol = rng.randint(1, high), rng.randint(1, 12), rng.choice("+-×÷")
        if symbol == "÷":
            lines.append(f"第{number}题：{a * b} ÷ {b} = {a}")
        elif symbol == "-":
            lines.append(f"第{number}题：{a + b} - {b} = {a}")
        else:
            lines.append(f"第{number}题：{a} {symbol} {b} = {a + b if symbol == '+' else a * b}")
    return "\n".join(lines)


def _zh_word_problems(rng: random.Random) -> str:
    lines = ["小学数学应用题及解答"]
    for number in range(1, rng.randint(10, 20)):
        name, other = rng.sample(_ZH_NAMES, 2)
        thing, a, b, c = rng.choice(_ZH_THINGS), *(rng.randint(2, 60) for _ in range(3))
        if rng.random() < 0.5:
            lines.append(
                f"{number}、{name}有{a}{thing}，{other}比他多{b}{thing}，两人一共有多少{thing[1:]}？"
                f"解：{other}有{a} + {b} = {a + b}，一共有{a} + {a + b} = {2 * a + b}。"
                f"答：一共有{2 * a + b}{thing}。"
            )
        else:
            lines.append(
                f"{number}、{name}买了{a}{thing}，每{thing[0]}{b}元，付了{a * b + c}元，"
                f"应找回多少元？解：{a} × {b} = {a * b}元，"
                f"{a * b + c} - {a * b} = {c}元。答：应找回{c}元。"
            )
    return "\n".join(lines)


def _timetable(rng: random.Random) -> str:
    lines = [f"Bus line {rng.randint(1, 99)}, timetable and notices for passengers"]
    for _ in range(rng.randint(20, 50)):
        start, end = rng.sample(_PLACES, 2)
        lines.append(
            f"{start} {rng.randint(5, 22):02}:{rng.randint(0, 59):02}, platform "
            f"{rng.randint(1, 12)}, to {end}, seat reservation by telephone 0{rng.randint(10, 99)} "
            f"{rng.randint(100, 999)} {rng.randint(1000, 9999)}"
        )
    return "\n".join(lines)


def _weather(rng: random.Random) -> str:
    lines = ["Weather report and outlook"]
    for _ in range(rng.randint(20, 40)):
        lines.append(
            f"{rng.choice(_PLACES)}: {rng.choice(('sunny', 'cloudy', 'rain', 'snow', 'fog'))}, "
            f"{rng.randint(-9, 35)} degrees, wind {rng.randint(0, 90)} km/h from the "
            f"{rng.choice(('north', 'east', 'south', 'west'))}, pressure {rng.randint(970, 1040)}"
        )
    return "\n".join(lines)


def _zh_notices(rng: random.Random) -> str:
    lines = ["市民服务通知"]
    for _ in range(rng.randint(15, 30)):
        place, other = rng.sample(_ZH_PLACES, 2)
        lines.append(
            f"{rng.randint(1, 12)}月{rng.randint(1, 28)}日，{place}到{other}的"
            f"{rng.randint(1, 99)}路公交车临时改道，请乘客提前到{other}站候车，"
            f"咨询电话{rng.randint(1000000, 9999999)}，"
            f"当天天气{rng.choice(('晴', '多云', '小雨', '大风'))}，气温{rng.randint(-5, 33)}度。"
        )
    return "\n".join(lines)


# host: (writer, weight); truth (math or not) is in url_rules.tsv like that of any other host.
HOSTS: dict[str, tuple[Callable[[random.Random], str], int]] = {
    "sums.worksheets": (_sums, 3),
    "products.worksheets": (_products, 3),
    "brackets.worksheets": (_order_of_operations, 4),
    "chains.worked": (_chains, 3),
    "fractions.worked": (_fractions, 2),
    "equations.worked": (_equations, 2),
    "stories.worked": (_word_problems, 3),
    "kousuan.shuxue": (_zh_sums, 2),
    "yingyongti.shuxue": (_zh_word_problems, 2),
    "timetable.notices": (_timetable, 1),
    "weather.notices": (_weather, 1),
    "tongzhi.notices": (_zh_notices, 1),
}


def generated_pages(num_pages: int, seed: int) -> Iterator[Page]:
    """Yield about num_pages pages, shared out to the hosts by weight."""
    total = sum(weight for _, weight in HOSTS.values())
    for host, (write, weight) in HOSTS.items():
        for number in range(num_pages * weight // total):
            rng = random.Random(f"{seed}/{host}/{number}")  # a string seeds alike everywhere
            sections = [write(rng) for _ in range(rng.randint(8, 16))]
            yield Page(f"https://{host}/page/{number}", "\n\n".join(sections), "generated")
