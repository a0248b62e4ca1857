"""What math-verify cannot be told: which part of a text is the answer, and how answers are written.

Text in, text out; the standard library alone, since the grading process loads this file by its path. Each
rule stands in `RULES` under the name that tests/grade/pairs.jsonl and docs/grading.md call it by. Whatever
these rules leave open is wrong: a wrong answer that passes costs more than a right one that does not.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

RULES = {
    "own box": "A reference is right against its own box, whatever it holds: equal text is equal.",
    "last box": "The last box that is not empty is the answer; what was boxed before it is not.",
    "list of boxes": "Boxes with only commas, semicolons, `and` or `or` between them are one list.",
    "cut box": "A last box that is never closed is no answer, and neither is an earlier one.",
    "beside the box": "A sign right before a box, and `_`, `^`, `!`, `%`, a degree sign or a unit right "
    "after it, belong to the answer.",
    "thinking": "Only what follows the thinking is read. Thinking that is never closed has no answer.",
    "no box": "Without a box: what follows the last `####`, `answer is` or `answer:`; else a text of one "
    "short line; else the last thing that math-verify finds.",
    "reference": "A reference that is a whole solution (`#### 72`, a box inside) means its answer.",
    "notation": "Thin spaces, `{,}`, `\\left`, typographic minus signs, fractions, roots, Greek letters and "
    "sets mean their plain LaTeX.",
    "thousands": "1,234 = 1{,}234 = 1\\,234 = 1 234. A comma with a space after it makes a list.",
    "scientific": "1e-05 = 0.00001 = 10^{-5}, as JSON numbers are written.",
    "repeating": "0.\\overline{3} = 0.\\dot{3} = 0.(3) = 1/3, exactly.",
    "tolerance": "Exact values must be equal. A decimal may differ from an exact value by a millionth, and "
    "by two millionths of it, whichever is less.",
    "percent": "50% = 50 \\text{ percent} = 0.5, and 50% is also 50; below 1% only the first holds.",
    "degrees": "A degree sign at the end is a unit, like `degrees`.",
    "units": "A unit on one side only does not count; two units must be the same. Nothing is converted.",
    "money": "$, €, £, `dollars`, `USD` are units that may stand in front.",
    "multipliers": "5 \\text{ million} = 5,000,000; so with dozen, hundred, thousand, billion.",
    "bases": "A subscript is the base: both must name the same one. Digits without one are taken as meant.",
    "choices": "A single capital letter matches that choice, with or without its text: `C: forty`, `(C)`. "
    "Two choices are none.",
    "words": "Words are compared as words, case and white space aside, never as products of letters.",
    "times": "Hours, minutes and a.m. or p.m. must be the same: 1:20 is not 2:40, though 1:2 is 2:4; "
    "15:30 is 3:30 p.m.",
    "dates": "Day, month and year must be the same; a date is not a subtraction.",
    "numbers": "Fractions, decimals, roots and mixed numbers of one value are equal.",
    "algebra": "Expressions are equal if they always are; 2t is not 2.",
    "equations": "x = 5 answers 5, and 5 answers x = 5; 3x = 6 does not answer 6.",
    "sets": "Sets and lists are equal in any order.",
    "intervals": "Ends and their kinds must be the same; x > 3 is (3, \\infty). > 5 is not 5.",
    "points": "Points, tuples and matrices are equal entry by entry, in order; (2, 1) is not {1, 2}.",
}
"""Name → what the rule says, in the order of the page."""

# --- which text is the answer ---------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_CUT_COMMAND = re.compile(r"\\(?:b|bo|box|boxe|boxed|f|fb|fbo|fbox)\s*$")
_MARKS = re.compile(r"\\[()\[\],;:! ]|\\quad|\\qquad|\\text\s*(?=\{)|[\s${}&~*.]|\\\\")
_JOINED = re.compile(r"(?:[,;]|and|or|,and|,or)")
_SIGN = re.compile(r"(?:^|[=:$(\[{\u2248]\s*|\s)-$")
_SUFFIX = re.compile(
    r"\s*(?:\}?\s*(?:[_^]\s*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\\circ|[0-9A-Za-z])|\\?%|!|\u00b0|"
    r"\\text\s*\{[^{}]*\}(?:\^\{?\d\}?)?))"
)
_SHORT = 80
"""Characters of a line that may be an answer as a whole."""
_STATED = re.compile(
    r"(?:####|\b(?:answer|correct (?:option|choice))\s*(?:is|:|=)\s*:?|\banswer\s*\*\*\s*:?)", re.I
)
_BOUND = re.compile(
    r"(?:not|(?:greater|less|more|fewer|larger|smaller) than|at (?:least|most)|above|below)\b", re.I
)
"""What is said so is no value."""
_SENTENCE_END = re.compile(r"\n|(?<!\d)\.(?:\s|$)|\.\s+(?=[A-Z])|\.$")


@dataclass(frozen=True)
class Found:
    """An answer in a text. `sure`: it was boxed or announced, so that its verdict stands."""

    text: str
    sure: bool


def boxes(text: str) -> list[tuple[int, int, str]]:
    """Outermost boxes as (start, end, content), in order; the end is -1 where a box is never closed."""
    closing: dict[int, int] = {}
    stack: list[int] = []
    at = 0
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        if text[at] == "{":
            stack.append(at)
        elif text[at] == "}" and stack:
            closing[stack.pop()] = at
        at += 1
    found: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        start, inner = match.start(), match.end()
        if found and start < found[-1][1]:
            continue  # a box inside a box
        if text[inner : inner + 1] != "{":
            bare = re.match(r"\\?\w+", text[inner:])  # MATH writes \boxed 2 now and then
            end = inner + (bare.end() if bare else 0)
            found.append((start, end if bare else -1, bare.group() if bare else ""))
        elif inner in closing:
            found.append((start, closing[inner] + 1, text[inner + 1 : closing[inner]]))
        else:
            found.append((start, -1, ""))
    return found


def boxed(text: str) -> Found | None:
    """The answer that a text boxes; an empty one where its last box is cut; None: it boxes nothing."""
    if _CUT_COMMAND.search(text):
        return Found("", True)
    found = [box for box in boxes(text) if box[1] < 0 or box[2].strip()]
    if not found:
        return None
    if found[-1][1] < 0:
        return Found("", True)
    first = len(found) - 1
    while first and _is_join(text[found[first - 1][1] : found[first][0]]):
        first -= 1
    parts = [_with_neighbours(text, box) for box in found[first:]]
    return Found(", ".join(dict.fromkeys(parts)), True)


def _is_join(between: str) -> bool:
    return len(between) < _SHORT and bool(_JOINED.fullmatch(_MARKS.sub("", between)))


def _with_neighbours(text: str, box: tuple[int, int, str]) -> str:
    start, end, content = box
    before = text[max(0, start - 20) : start]
    # "- \boxed{7}" at the start of a line is an item of a list; "5-\boxed{7}" a calculation.
    if _SIGN.search(before) and not content.lstrip().startswith("-"):
        content = "-" + content
    while (suffix := _SUFFIX.match(text, end)) and suffix.end() > end:
        taken = suffix.group().strip()
        if taken.startswith("}") or untexted(taken) in ("and", "or"):
            break
        content, end = content + taken, suffix.end()
    return content


def stated(text: str) -> list[Found]:
    """Answers that a text without boxes states, the likeliest first."""
    found = []
    announced = list(_STATED.finditer(text))
    if announced:
        tail = text[announced[-1].end() :].strip().lstrip("*: ")
        tail = _SENTENCE_END.split(tail, maxsplit=1)[0].strip().strip("*")
        if _BOUND.match(tail):
            return [Found("", True)]
        if 0 < len(tail) <= _SHORT:
            found.append(Found(tail, True))
    if not found and len(text.strip()) <= _SHORT and "\n" not in text.strip():
        found.append(Found(text.strip(), False))
    return found


def last_maths(text: str) -> str | None:
    """The last piece between dollar signs or \\( \\)."""
    pieces = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", text)
    return next((p for p in pieces[-1] if p), None) if pieces else None


def meant(reference: str) -> str:
    """The answer that a reference stands for: of a whole solution, what it ends in.

    >>> meant("48/2 = 24 and 48 + 24 = 72\\n#### 72"), meant("so $x = \\\\boxed{5}$."), meant("[0, 1)")
    ('72', '5', '[0, 1)')
    """
    if (box := boxed(reference)) is not None and box.text:
        return box.text
    if "####" in reference:
        return reference.rpartition("####")[2].strip()
    return reference


# --- how answers are written ----------------------------------------------------------------------------

# fmt: off
_CHARACTERS = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2010": "-", "\u2011": "-", "×": r"\times ", "÷": "/",
    "·": r"\cdot ", "\u22c5": r"\cdot ",
    "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "±": r"\pm ", "°": r"^\circ ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "μ": r"\mu ", "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "′": "'",
    "\u2009": r"\,", "\u202f": r"\,", "\u00a0": r"\,", "\u2005": r"\,", "\u2006": r"\,", "\u2007": r"\,",
    "\u200b": "", "\u2061": "", "\ufeff": "", "’": "'", "‘": "'", "“": '"', "”": '"', "ℝ": r"\mathbb{R}",
    "％": "%", "，": ", ", "（": "(", "）": ")", "：": ":",
}
_COMMANDS = {
    r"\\[dtc]frac(?![a-zA-Z])": r"\\frac", r"\\(?:left|right|displaystyle|textstyle|limits)(?![a-zA-Z])": "",
    r"\\(?:big|Big|bigg|Bigg)[lr]?(?![a-zA-Z])": "",
    r"\\(?:varnothing|O)(?![a-zA-Z])|\\\{\s*\\\}": r"\\emptyset ",
    r"\\(?:leq|leqslant)(?![a-zA-Z])": r"\\le ",
    r"\\(?:geq|geqslant)(?![a-zA-Z])": r"\\ge ", r"\\neq(?![a-zA-Z])": r"\\ne ",
    r"\\degree(?![a-zA-Z])": r"^\\circ ",
    r"\\(?:lbrace)(?![a-zA-Z])": r"\\{", r"\\(?:rbrace)(?![a-zA-Z])": r"\\}", r"\\lbrack(?![a-zA-Z])": "[",
    r"\\rbrack(?![a-zA-Z])": "]", r"\\!": "", r"\{,\}": ",", r"\^\s*\{\s*\\circ\s*\}": r"^\\circ ",
    r"\\(?:mathrm|textrm|textbf|textit|mathbf|mathit|mathsf|boldsymbol|bm|mbox|textnormal|textup|operatorname|"
    r"text|rm)\s*\{": r"\\text{",
    r"\\text\{\s*(-?[\d.,]*\d)\s*\}": r"\1",
    r"^(\*{1,3}|`)(.+)\1$": r"\2", r"(?<=[\w)}])\*\*(?=[-\w({])": "^",
    r"\^\s*(-\d+)": r"^{\1}", r"(?<=\d)\s*[xX]\s*(?=10\s*\^)": r"\\times ",
    r"(?<![\\a-zA-Z])\\?sqrt\s*\(([^()]*)\)": r"\\sqrt{\1}",
    r"(?<![\\a-zA-Z])(pi|ln|log|sqrt|sin|cos|tan)(?![a-zA-Z])": r"\\\1 ",
    r"\\%": "%", r"\\\$": "$", r"\\\\\s*\[[^\]]*\]": r"\\\\", r"^\s*\\(?:approx|sim)(?![a-zA-Z])": "",
    r"\\(?:underline|(?:text)?color\s*\{[^{}]*\}|(?:bf|it|tiny|small|large|Large|LARGE|huge)(?![a-zA-Z]))":
        "",
}
_UNITS = {
    "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre",
    "m": "meter metre", "ft": "foot feet", "in": "inch", "mi": "mile", "yd": "yard", "kg": "kilogram",
    "g": "gram gm",
    "mg": "milligram", "lb": "pound", "oz": "ounce", "l": "liter litre", "ml": "milliliter millilitre",
    "gal": "gallon",
    "h": "hour hr", "min": "minute", "s": "second sec", "day": "", "week": "", "month": "", "year": "yr",
    "mph": "", "km/h": "kmh kmph kph", "m/s": "", "deg": "degree", "rad": "radian", "deg F": "", "deg C": "",
    "unit": "", "cent": "¢", "$": "dollar usd buck", "€": "euro eur", "£": "gbp", "¥": "yen jpy yuan",
    "₹": "rupee rs inr", "ohm": "", "hz": "", "n": "newton", "j": "joule", "w": "watt",
    "v": "volt", "acre": "",
}
_CANONICAL = {word: unit for unit, words in _UNITS.items() for word in (unit, *words.split())}
_MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
                "trillion": 10**12}
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)
_MATHS_WORDS = frozenset((
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh",
    "log", "exp", "sqrt", "infty", "infinity", "inf", "frac", "times", "cdot", "and", "det", "min",
    "max", "gcd", "lcm", "mod", "pmod", "deg", "alpha", "beta", "gamma", "theta", "lambda",
))
_NO_UNITS = (_MATHS_WORDS - {"min", "deg", "sec"}) | frozenset((
    "or", "if", "when", "for", "pi", "half", "halves", "third", "thirds", "quarter", "quarters", "fourth",
    "fourths", "fifth", "fifths", "sixth", "sixths", "eighth", "eighths", "tenth", "tenths",
))
_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
    "november", "december",
)
# fmt: on

_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[a-zA-Z]))")
_CHARACTER = re.compile("|".join(map(re.escape, _CHARACTERS)))
_COMMAND = [(re.compile(pattern), to) for pattern, to in _COMMANDS.items()]
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "₀₁₂₃₄₅₆₇₈₉"
_PLAIN = str.maketrans(_RAISED + _LOWERED, "0123456789+-()n0123456789")
_SCRIPTS = re.compile(f"([{_RAISED}]+)|([{_LOWERED}]+)")
_SPACES = re.compile(r"(?:(?<!\\)\\[,;:> ]|~|\\quad|\\qquad|\\thinspace|\s)+")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_GROUPED = re.compile(r"(?<![\d.,])(\d{1,3})((?:(?:,| |\\,)\d{3})+)(?![\d,])(?! \d)")
_NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


def clean(text: str) -> str:
    """One spelling of the same maths: LaTeX without layout, thousands without separators.

    >>> clean("$1{,}234$"), clean("\\\\left[0,\\\\, 1\\\\right)"), clean("90°")
    ('1234', '[0, 1)', '90^\\\\circ')
    """
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m.group(1) or m.group(2)}}}", text)
    text = _SCRIPTS.sub(lambda m: "^_"[m.lastindex == 2] + f"{{{m.group().translate(_PLAIN)}}}", text)
    text = _CHARACTER.sub(lambda m: _CHARACTERS[m.group()], text)
    text = _undelimited(text)
    for pattern, to in _COMMAND:
        text = pattern.sub(to, text)
    text = _SPACES.sub(" ", text).strip()
    text = re.sub(r"\s*\^\s*\\circ", r"^\\circ", text)
    if (whole := _TEXT.fullmatch(text)) and re.search(r"\d", text):
        text = whole.group(1).strip()
    text = re.sub(r"(?:[,; ]|\\\\)+$", "", text)
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip() if not re.search(r"\b[ap]\.\s?m\.$", text) else text
    return _ungrouped(text)


def _undelimited(text: str) -> str:
    """Without dollar signs, \\( \\) and \\[ \\] that say where maths is; a single dollar sign is money."""
    text = text.strip()
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if opening in text and closing in text:
            text = text.replace(opening, " ").replace(closing, " ")
    plain = len(re.findall(r"(?<!\\)\$", text))
    if plain and plain % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    if (box := boxes(text)) and (box[0][0], box[0][1]) == (0, len(text)):
        text = box[0][2]
    return text.strip()


def _ungrouped(text: str) -> str:
    """Thousands joined: by spaces anywhere, by commas only where the number is all there is to the list."""
    bare = re.fullmatch(
        r"[^\d,()\[\]{}]*" + _GROUPED.pattern + r"(\.\d+)?[^\d,()\[\]]*(?:\{[^{}]*\})?(?:\^\{?\d\}?)?", text
    )
    if bare:
        return _GROUPED.sub(lambda m: m.group(1) + re.sub(r"\D", "", m.group(2)), text)
    spaced = re.compile(r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d,.]|\s\d|\s*/)")
    return spaced.sub(lambda m: m.group(1) + m.group(2).replace(" ", ""), text)


def untexted(text: str) -> str:
    """`\\text{…}` replaced by what it holds."""
    while (less := _TEXT.sub(lambda m: m.group(1), text)) != text:
        text = less
    return _SPACES.sub(" ", text).strip()


def flat(text: str) -> str:
    """For comparison as words: case, white space, quotes and \\text aside."""
    return re.sub(r"\s*([,.:;()/-])\s*", r"\1", re.sub(r"[\"'`*]", "", untexted(text))).casefold().strip(" .")


@dataclass(frozen=True)
class Written:
    """A cleaned answer: its maths and its unit."""

    value: str
    unit: str | None = None
    percent: str | None = None
    """Of n% the n, which somebody who was asked for a percentage may have meant."""


_CURRENCY = re.compile(r"^(-?)\s*(?:\\text\{\s*)?(\$|€|£|¥|₹|USD|EUR|GBP|Rs\.?)(?:\s*\})?\s*(?=[-\d.\\(])")
_DEGREES = re.compile(r"\^\\circ\s*(?:\\text\{\s*)?([CF]?)(?:\s*\})?$")
_TEXT_UNIT = re.compile(r"\s*\\text\{\s*([^{}\d]+?)\s*\}\s*(?:\^\s*\{?(\d)\}?)?$")
_BARE_UNIT = re.compile(
    r"^(" + _NUMBER + r"(?:\s*/\s*\d+)?)\s*([a-zA-Z¢€$£¥₹][a-zA-Z¢ ./]*?)\s*(?:\^\s*\{?(\d)\}?)?$"
)
_LATEX_BARE_UNIT = re.compile(r"^(.*[\d})])\s+([a-zA-Z]{2,}(?: [a-zA-Z]+)*)\s*(?:\^\s*\{?(\d)\}?)?$")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_PERCENT = re.compile(r"\s*(?:\\text\{\s*)?(?:percent|per cent|percentage|pct|%)\s*\}?$")


def written(text: str) -> Written:
    """Maths and unit of a cleaned text.

    >>> written("12 \\\\text{ cm}^2"), written("$5.50")
    (Written(value='12', unit='cm^2'), Written(value='5.50', unit='$'))
    """
    if money := _CURRENCY.match(text):
        unit = unit_of(money.group(2))
        return Written(_multiplied(money.group(1) + text[money.end() :]), unit)
    if re.search(r"\d", text) and (percent := _PERCENT.search(text)):
        value = re.sub(r"^[a-zA-Z]\s*=\s*", "", text[: percent.start()])
        if re.search(r",|\band\b|\bor\b|%", value):
            return Written(text)  # several of them
        alone = re.fullmatch(r"-?(?:\d+|[1-9]\d*\.\d+)", value)
        return Written(rf"\frac{{{value}}}{{100}}", percent=value if alone else None)
    if _TRIGONOMETRY.search(text):
        return Written(re.sub(r"(\d+(?:\.\d+)?)\^\\circ", r"(\\frac{\1\\pi}{180})", text))
    if degrees := _DEGREES.search(text):
        kind = degrees.group(1)
        return Written(text[: degrees.start()], f"deg {kind}" if kind else "deg")
    if (many := _multiplied(text)) != text:
        return Written(many)
    found = _TEXT_UNIT.search(text)
    value = text[: found.start()].strip() if found else ""
    if (
        found
        and re.search(r"\d|\\pi", value)
        and not re.search(r"\\text", value)
        and _is_unit(found.group(1))
    ):
        return _with_unit(value, found.group(1), found.group(2))
    bare = _BARE_UNIT.match(text) or _LATEX_BARE_UNIT.match(text)
    if bare and _is_unit(bare.group(2)) and _spaced(text, bare) and not is_words(bare.group(1)):
        return _with_unit(*bare.groups())
    return Written(text)


def _with_unit(value: str, words: str, power: str | None) -> Written:
    """`5` and `million dollars`: the first word may belong to the number."""
    first, _, rest = words.strip().partition(" ")
    if (
        first.casefold() in _MULTIPLIERS
        and rest
        and (many := _multiplied(f"{value} {first}")) != f"{value} {first}"
    ):
        return Written(many, unit_of(rest, power))
    return Written(_multiplied(value), unit_of(words, power))


def _spaced(text: str, bare: "re.Match[str]") -> bool:
    """12 m is a length; 12m may be algebra, 12cm is not."""
    word = bare.group(2)
    if re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", bare.group(1))):  # 4 ac behind b^2 is algebra
        return known_unit(word) is not None and text[bare.end(1)] == " "
    if len(word) >= 2:
        return word.casefold() in _CANONICAL or text[bare.end(1)] == " "
    return text[bare.end(1)] == " " and word.casefold() in _CANONICAL


def _is_unit(words: str) -> bool:
    split = {w.casefold() for w in re.findall(r"[a-zA-Z]+", words)}
    return bool(words.strip()) and not split & _NO_UNITS


def unit_of(words: str, power: str | None = None) -> str:
    """One name per unit: `square centimeters` and `cm^2` are the same."""
    words = words.strip().strip(".").casefold()
    for prefix, of in (("square ", "2"), ("sq. ", "2"), ("sq ", "2"), ("cubic ", "3"), ("cu ", "3")):
        if words.startswith(prefix):
            words, power = words.removeprefix(prefix), power or of
    singular = [words, words.removesuffix("s"), words.removesuffix("es")]
    known = next((_CANONICAL[w] for w in singular if w in _CANONICAL), singular[1])
    known = re.sub(r"\bdegrees? ([cf])\w*", lambda m: f"deg {m.group(1).upper()}", known)
    return known if power is None else f"{known}^{power}"


def known_unit(words: str) -> str | None:
    """The unit that a word surely is, if any."""
    name = words.casefold()
    return next(
        (_CANONICAL[w] for w in (name, name.removesuffix("s"), name.removesuffix("es")) if w in _CANONICAL),
        None,
    )


def _multiplied(text: str) -> str:
    names = "|".join(_MULTIPLIERS)
    found = re.fullmatch(rf"({_NUMBER})\s*(?:\\text\{{\s*)?({names})\s*\}}?", text.strip(), re.I)
    if not found:
        return text
    return str(Fraction(found.group(1).replace(",", "")) * _MULTIPLIERS[found.group(2).casefold()])


_SCIENTIFIC = re.compile(r"(-?)(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,3})")
_MIXED = re.compile(r"(-?)(\d+) (\d+)/(\d+)")
_REPEATING = re.compile(
    r"(-?)(\d*)\.(\d*)(?:\\overline\{(\d+)\}|\\overline (\d)|\\bar\{(\d+)\}|\\bar (\d)|"
    r"\\dot\{(\d)\}(?:(\d*)\\dot\{(\d)\})?|\((\d+)\))"
)


def exact(value: str) -> str:
    """Scientific and repeating decimals and mixed numbers as exact fractions; anything else unchanged.

    >>> exact("1e-05"), exact("0.1\\\\overline{6}")
    ('\\\\frac{1}{100000}', '\\\\frac{1}{6}')
    """
    if found := re.fullmatch(r"(-?\d+)\.0+", value):
        return found.group(1)
    if found := _SCIENTIFIC.fullmatch(value):
        sign, digits, power = found.groups()
        return _fraction(sign, Fraction(digits) * Fraction(10) ** int(power))
    if (found := _MIXED.fullmatch(value)) and int(found.group(4)):
        sign, whole, top, bottom = found.groups()
        return _fraction(sign, int(whole) + Fraction(int(top), int(bottom)))
    if found := _REPEATING.fullmatch(value):
        sign, whole, fixed, *rest = found.groups()
        first, middle, last = rest[4:7]
        cycle = next((r for r in (*rest[:4], rest[7]) if r), None) or f"{first}{middle or ''}{last or ''}"
        both, alone = int(f"{whole or 0}{fixed}{cycle}"), int(f"{whole or 0}{fixed}")
        return _fraction(sign, Fraction(both - alone, (10 ** len(cycle) - 1) * 10 ** len(fixed)))
    return value


def _fraction(sign: str, value: Fraction) -> str:
    if value.denominator == 1:
        return f"{sign}{value.numerator}"
    return f"{sign}\\frac{{{value.numerator}}}{{{value.denominator}}}"


# --- kinds of answers that are not compared as maths ----------------------------------------------------

_CHOICE = re.compile(r"\(([A-Z])\)|([A-Z])|([A-Z])[).:]|\\?\[([A-Z])\]")
_CHOSEN = re.compile(r"\(([A-Z])\).*|([A-Z])(?:\s*[):]|\.\s)\s*.*|([A-Z])\.?", re.S)
_TWO_CHOICES = re.compile(
    r"\(?[A-Z][).:]?\s*(?:,|;|/|&|and\b|or\b)\s*(?:and\b|or\b)?\s*\(?[A-Z](?![a-zA-Z])|"
    r"\(?[A-Z][).:]\s*\(?[A-Z](?:[).:]|$)"
)
_BASED = re.compile(r"\(?\s*([0-9A-Za-z.]+)\s*\)?\s*_\s*(?:\{\s*([0-9a-z]+)\s*\}|([0-9]))")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*(?:([ap])\.?\s?m\.?)?", re.I)
_HOUR = re.compile(r"(\d{1,2})\s*([ap])\.?\s?m\.?", re.I)
_WORD = re.compile(r"(?<![\\a-zA-Z])[^\W\d_]{3,}")


def choice(text: str, *, chosen: bool = False) -> str | None:
    """The letter of a choice; `chosen`: in an answer, where its text may follow."""
    found = (_CHOSEN if chosen else _CHOICE).fullmatch(untexted(text))
    if found and chosen and _TWO_CHOICES.match(untexted(text)):
        return None
    return next(g for g in found.groups() if g) if found else None


def based(text: str) -> tuple[str, int] | None:
    """Digits and base of a number that names its base."""
    if found := re.fullmatch(r"0x([0-9a-f]+)", text, re.I):
        return found.group(1).casefold().lstrip("0") or "0", 16
    found = _BASED.fullmatch(untexted(text))
    if not found:
        return None
    name = found.group(2) or found.group(3)
    base = int(name) if name.isdigit() else _SMALL.index(name) if name in _SMALL else 0
    digits = found.group(1).casefold()
    if not any(c.isdigit() for c in digits) and not (
        base > 10 and found.group(1).isupper() and len(digits) > 1
    ):
        return None  # x_1 is a variable
    fits = all(c == "." or int(c, 36) < base for c in digits)
    return (digits.lstrip("0") or "0", base) if 2 <= base <= 36 and fits else None


def clock(text: str) -> tuple[int, int, int, str] | None:
    """Hour, minute, second and `a`, `p` or nothing."""
    text = untexted(text)
    if found := _CLOCK.fullmatch(text):
        hour, minute, second, half = found.groups()
        return int(hour), int(minute), int(second or 0), (half or "").casefold()
    if found := _HOUR.fullmatch(text):
        return int(found.group(1)), 0, 0, found.group(2).casefold()
    return None


def date(text: str) -> tuple[int, ...] | str | None:
    """(year, month, day), year 0 where none is named; digits with slashes stay in their order."""
    text = untexted(text).replace(",", " ").casefold()
    if found := re.fullmatch(r"(\d{4})-(\d{1,2})-(\d{1,2})", text):
        return tuple(map(int, found.groups()))
    if re.fullmatch(r"\d{1,2}/\d{1,2}/\d{4}", text):
        return "/".join(part.lstrip("0") for part in text.split("/"))
    words = text.split()
    months = [i for i, m in enumerate(_MONTHS, 1) for w in words if w.strip(".") in (m, m[:3])]
    rest = [re.sub(r"(?<=\d)(?:st|nd|rd|th)$", "", w) for w in words if w.strip(".") not in ("of", "the")]
    numbers = [int(w) for w in rest if w.isdigit() and len(w) <= 4]
    if len(months) != 1 or len(numbers) + 1 != len(rest) or not 1 <= len(numbers) <= 2:
        return None
    days = [n for n in numbers if n <= 31]
    years = [n for n in numbers if n > 31]
    return (years[0] if years else 0, months[0], days[0] if days else 0) if len(days) <= 1 else None


def is_words(text: str) -> bool:
    """Whether it is language: no product of letters is meant by it.

    >>> is_words("Paris"), is_words("x + y"), is_words("\\\\sin x"), is_words("7 hours 30 minutes")
    (True, False, False, True)
    """
    bare = re.sub(r"\\(?:text|mathbb|begin|end|vec|overline|angle|triangle)\{([^{}]*)\}", r" \1 ", text)
    inside = " ".join(_TEXT.findall(text))
    if re.search(r"[a-zA-Z]{2,}", inside) and set(inside.casefold().split()) - {"and", "or", "if"}:
        return True
    if "\\begin" in text:
        return False
    words = {w.casefold() for w in _WORD.findall(bare)} - _MATHS_WORDS
    return bool(words) or untexted(text).casefold() in ("no", "up", "on")


def compared(candidate: str, reference: str) -> bool | None:
    """A verdict on two cleaned texts without maths; None: maths decides."""
    if _squeezed(candidate) == _squeezed(reference):
        return True
    if re.fullmatch("[a-zA-Z]", reference) and re.fullmatch("[a-zA-Z]", candidate):
        return False  # c is not C
    if (letter := choice(reference)) is not None:
        return choice(candidate, chosen=True) == letter
    for verdict in (_dates(candidate, reference), _times(candidate, reference), _bases(candidate, reference)):
        if verdict is not None:
            return verdict
    theirs, ours = written(candidate), written(reference)
    if None not in (theirs.unit, ours.unit) and theirs.unit != ours.unit:
        return False
    if is_words(ours.value) or is_words(theirs.value):
        return flat(theirs.value) == flat(ours.value)
    modular = _congruence(theirs.value), _congruence(ours.value)
    if None not in modular:
        return modular[0] == modular[1]
    return False if _apart(theirs.value, ours.value) else None


def _apart(candidate: str, reference: str) -> bool:
    """Whether two texts of maths are not the same for a reason that math-verify does not see."""
    pair = candidate, reference
    bounds = [found.group(1) if (found := _RELATION.match(text)) else "" for text in pair]
    sides = [text.partition("=")[0] if text.count("=") == 1 else "" for text in pair]
    items = [_items(text) for text in pair]
    return (
        bounds[0] != bounds[1]  # > 5 is not 5
        # 3x = 6 is not 6, whichever side says so; x = 6 is, and so is a + b = 6 where that is asked for
        or (bool(sides[0]) != bool(sides[1]) and _is_calculation(sides[0] or sides[1]))
        or (candidate.casefold() == reference.casefold() and exact(candidate) != exact(reference))
        or (any(map(_PRIMED.search, pair)) and candidate.count("'") != reference.count("'"))
        or any(map(_is_empty_interval, pair))
        # (2, 1) is a point, and no set of these two
        or (
            candidate[:1] == "(" != reference[:1]
            and sorted(items[0]) == sorted(items[1])
            and items[0] != items[1]
        )
        or sorted(text.lstrip("\\")[:1] for text in pair) == ["(", "{"]  # nor is the interval (3, 4)
        or any(map(_contradicts_itself, pair))
        # what f is at 1 does not say what it is at 2
        or (all(map(_CALLED.fullmatch, sides)) and _squeezed(sides[0]) != _squeezed(sides[1]))
    )


_CALLED = re.compile(r"\s*[a-zA-Z]\w*\s*\([^()]*\)\s*")
_VALUE = re.compile(r"\s*(-?)\s*(?:(\d+(?:\.\d+)?)(?:/(\d+))?|\\frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?)\s*")
_ROUGHLY = 0.01
_RELATION = re.compile(r"\s*(<|>|\\le|\\ge|\\ne)(?![a-zA-Z])")
_PRIMED = re.compile(r"[a-zA-Z)]'")
_CONGRUENT = re.compile(
    r"(?:.*\\equiv)?\s*(.*?)\s*(?:\\pmod|\(\s*\\?(?:text\{)?mod\}?|\\bmod|\\mod)\s*\{?\s*(\d+)\}?\s*\)?"
)
_HALF_OPEN = re.compile(r"[\[(]\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*[\])]")


def _contradicts_itself(text: str) -> bool:
    """Whether it says that one number is another, as `7 = 8` does; rounded ones may differ by a hundredth."""
    values = [float(v) for side in text.split("=") if (v := _value(side)) is not None]
    return "=" in text and len(values) > 1 and max(values) - min(values) > _ROUGHLY * max(map(abs, values))


def _value(side: str) -> Fraction | None:
    found = _VALUE.fullmatch(side)
    if found is None:
        return None
    sign, plain, over, top, bottom = found.groups()
    below = int(over or bottom or 1)
    return Fraction(f"{sign}{plain or top}") / below if below else None


def _is_calculation(side: str) -> bool:
    """Whether a side of an equation is more than a name: letters with numbers or powers."""
    names = re.sub(r"_\s*(?:\{[^{}]*\}|\w)|\\text\{[^{}]*\}|[a-zA-Z]\s*\([^()]*\)|\\[a-zA-Z]+", " ", side)
    return bool(re.search(r"[a-zA-Z]", names)) and bool(re.search(r"[\d^]", names))


def _congruence(text: str) -> tuple[str, str] | None:
    found = _CONGRUENT.fullmatch(text)
    return (_squeezed(found.group(1)), found.group(2)) if found else None


def _is_empty_interval(text: str) -> bool:
    """[5, 3): all of these are one empty set, and none is anybody's answer."""
    found = _HALF_OPEN.fullmatch(text)
    mixed = found is not None and (text[0] == "[") is not (text[-1] == "]")
    return found is not None and mixed and float(found.group(1)) >= float(found.group(2))


def _items(text: str) -> list[str]:
    return [
        _squeezed(part.strip()) for part in re.sub(r"^(?:\\\{|[({\[])|(?:\\\}|[)}\]])$", "", text).split(",")
    ]


def _squeezed(text: str) -> str:
    """Without spaces but those between digits, which may separate two numbers, and between words."""
    return re.sub(r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", "", text)


def _dates(candidate: str, reference: str) -> bool | None:
    theirs, ours = date(candidate), date(reference)
    return None if theirs is None and ours is None else theirs == ours


def _times(candidate: str, reference: str) -> bool | None:
    """Where neither side says a.m. or p.m. it may be a ratio, unless both read as a time of the day. A
    candidate may say more than the reference."""
    theirs, ours = clock(candidate), clock(reference)
    if theirs is not None and ours is not None:
        theirs, ours = _halved(theirs, beside=ours), _halved(ours, beside=theirs)
    may_be_ratio = any(time is None or time[0] > 23 or time[1] > 59 for time in (theirs, ours))
    if may_be_ratio and not any(time is not None and time[3] for time in (theirs, ours)):
        return None
    if theirs is None or ours is None:
        return False
    return theirs[:3] == ours[:3] and ours[3] in ("", theirs[3])


def _halved(
    time: tuple[int, int, int, str], *, beside: tuple[int, int, int, str]
) -> tuple[int, int, int, str]:
    """15:30 as 3:30 p.m., where the other one says which half it means: 13:20 alone may be a ratio."""
    hour, minute, second, half = time
    return (hour - 12, minute, second, "p") if beside[3] and not half and 12 < hour < 24 else time


def _bases(candidate: str, reference: str) -> bool | None:
    theirs, ours = based(candidate), based(reference)
    if theirs is None and ours is None:
        return None
    if theirs is None or ours is None:
        digits = [
            (text.casefold().lstrip("0") or "0") if read is None else read[0]
            for text, read in ((candidate, theirs), (reference, ours))
        ]
        return digits[0] == digits[1]
    return theirs == ours


def is_maths(reference: str) -> bool:
    """Whether a cleaned reference may be looked for anywhere in a text: no choice, word, date, time, base."""
    if choice(reference) or date(reference) or based(reference):
        return False
    time = clock(reference)
    return not (time and time[3]) and not is_words(written(reference).value)


def alternatives(value: str) -> list[str]:
    """Inequalities with `or` between them, one by one; nothing if it is something else."""
    parts = re.split(r"\s+or\s+", untexted(value))
    relations = all(re.search(r"[<>]|\\[lg]e(?![a-z])", part) for part in parts)
    return parts if len(parts) > 1 and relations else []


def may_have_unit(text: str, number: str, unit: str | None) -> bool:
    """Whether the last place of a number in a text is not followed by another unit than the reference's."""
    if unit is None or not number:
        return True
    after = text.rpartition(number)[2].lstrip(" \\")
    word = re.match(r"(?:text\{\s*)?([a-zA-Z¢€£]+)", after)
    known = known_unit(word.group(1)) if word else None
    return known is None or known == unit
