"""OCRBench v2: thirty kinds of questions with a rule each (Yuliang-Liu/MultimodalOCR, 794c36d; Fu et al. 2024).

What is special:
- a question's `type` chooses its rule; figures are means over abilities (`ABILITIES`), English and Chinese apart;
- kept defects: a reply counts as a table only from its first <body or <table on; a chart's values are compared letter by
  letter with blanks between; the fence of a Markdown table is taken off letter by letter, so cells at its ends may lose
  some; two nodes of a document that are blank count as different; exact counting looks for the digits anywhere in the reply;
- METEOR looks for synonyms where nltk's WordNet is installed, as the reference always does; without it `synonyms` of a score
  is False. It matters little: a synonym of what is printed is a misreading.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

from minicpmv.evaluate.benchmark import Metrics, Scores
from minicpmv.evaluate.scoring import Scoring
from minicpmv.evaluate.scoring.teds import Node, teds, tree_distance


Expected = Mapping[str, Any]

# Abilities, and the types of questions that make them up.
ABILITIES = {
    "en_text_recognition": ("text recognition en", "fine-grained text recognition en", "full-page OCR en"),
    "en_text_detection": ("text grounding en", "VQA with position en"),
    "en_text_spotting": ("text spotting en",),
    "en_relationship_extraction": ("key information extraction en", "key information mapping en"),
    "en_element_parsing": ("document parsing en", "chart parsing en", "table parsing en", "formula recognition en"),
    "en_mathematical_calculation": ("math QA en", "text counting en"),
    "en_visual_text_understanding": ("document classification en", "cognition VQA en", "diagram QA en"),
    "en_knowledge_reasoning": (
        "reasoning VQA en",
        "science QA en",
        "APP agent en",
        "ASCII art classification en",
    ),
    "cn_text_recognition": ("full-page OCR cn",),
    "cn_relationship_extraction": ("key information extraction cn", "handwritten answer extraction cn"),
    "cn_element_parsing": ("document parsing cn", "table parsing cn", "formula recognition cn"),
    "cn_visual_text_understanding": ("cognition VQA cn",),
    "cn_knowledge_reasoning": ("reasoning VQA cn", "text translation cn"),
}
ABILITY_OF = {kind: ability for ability, kinds in ABILITIES.items() for kind in kinds}

FEW_WORDS = 5  # an answer of fewer words has to be contained in the reply
FEW_PARTS = 4  # the same of a Chinese answer, in parts between commas
ALIKE = 0.5  # of an edit similarity or a count: less is 0
SIDE = 1000  # coordinates are thousandths
BOX = re.compile(r"[(\[]\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*[)\]]")
FENCE = re.compile(r"```(?:python|json)?\n(.*?)\n```", re.DOTALL | re.IGNORECASE)
PAIR = re.compile(r"[\"']?([\w\s]+)[\"']?\s*[:=]\s*[\"']?([^\n,\"'{}]+)[\"']?")
QUOTED = re.compile(r'\A\s*"(.*)"\s*\Z')
LIST_ITEM = re.compile(r"[\[(]\s*([^\[\]()]*?)\s*[\])]")
CHINESE = re.compile(r"[\u4e00-\u9fa5]")
SEPARATORS = ("", ".", ". ", ",", ", ", "、", ";", "; ", " ", "和")  # between the letters of several choices
NOT_COUNTED = "###"  # print that a spotted box may cover or not
SPOTTED_MARKS = "!?.:,*\"()·[]/'"  # which may be missing at either end of spotted print


def ocrbench_v2(answer: str, expected: Expected, *, scoring: Scoring = "current", strict: bool = False) -> Scores:
    """The score of one question by its type.

    Args:
        expected: `type`, `question` and `answers`, a list; for some types `eval` ("multiple choice", "case sensitive",
            "exact match", "regression"), `bbox` and `content`.
        strict: where a count has to be exact, the first number of the reply has to be the right one; values of charts are
            compared as they are.

    Raises:
        ValueError: there is no such type.
    """
    kind = expected["type"]
    if kind not in ABILITY_OF:
        raise ValueError(f"OCRBench v2 has no questions of type {kind!r}")
    scores: Scores = {"score": float(RULES[kind](answer, {**expected, "strict": strict})), "type": kind}
    if kind == "text translation cn" and not expected["answers"][0]:
        scores["ignored"] = True
    if kind in PROSE and not _has_wordnet():
        scores["synonyms"] = False
    return scores


def ocrbench_v2_score(scores: list[Scores]) -> Metrics:
    """Means over abilities: `en` (eight), `cn` (five), and each ability by itself; None where nothing was asked."""
    found: dict[str, list[float]] = {ability: [] for ability in ABILITIES}
    for score in scores:
        if not score.get("ignored"):
            found[ABILITY_OF[score["type"]]].append(score["score"])
    means = {ability: fmean(values) if values else None for ability, values in found.items()}
    of_language = {
        language: [mean for ability, mean in means.items() if ability.startswith(language) and mean is not None]
        for language in ("en", "cn")
    }
    return {language: fmean(values) if values else None for language, values in of_language.items()} | means


# --- Texts ---


def _plain(text: Any) -> str:
    return str(text).strip().replace("\n", " ")


def _similar(answer: str, text: str) -> float:
    """1 - edits / the longer length, or 0 where that is under one half."""
    from rapidfuzz.distance import Levenshtein

    share = 1 - Levenshtein.distance(answer, text) / max(len(answer), len(text), 1)
    return share if share >= ALIKE else 0.0


def _contained_or_similar(answer: str, texts: Iterable[str], is_short: Callable[[str], bool]) -> float:
    return max(float(text in answer) if is_short(text) else _similar(answer, text) for text in texts)


def vqa(answer: str, expected: Expected) -> float:
    texts = [_plain(text).lower() for text in expected["answers"]]
    return _contained_or_similar(_plain(answer).lower(), texts, lambda text: len(text.split()) < FEW_WORDS)


def case_sensitive(answer: str, expected: Expected) -> float:
    texts = [_plain(text) for text in expected["answers"]]
    return _contained_or_similar(_plain(answer), texts, lambda text: len(text.split()) < FEW_WORDS)


def chinese_vqa(answer: str, expected: Expected) -> float:
    texts = [_plain(text).lower().replace(" ", "") for text in expected["answers"]]
    reply = _plain(answer).lower().replace(" ", "")
    return _contained_or_similar(reply, texts, lambda text: len(text.split(",")) < FEW_PARTS)


def multiple_choice(answer: str, expected: Expected) -> float:
    """Right if the reply's letters, all of them, are the answer."""
    return float("".join(filter(str.isalpha, answer)) == expected["answers"][0])


def by_eval(rule: Callable[[str, Expected], float]) -> Callable[[str, Expected], float]:
    """The rule, unless the question itself says another."""

    def score(answer: str, expected: Expected) -> float:
        named = {"multiple choice": multiple_choice, "case sensitive": case_sensitive}
        return named.get(expected.get("eval", ""), rule)(answer, expected)

    return score


def formula(answer: str, expected: Expected) -> float:
    reply = _plain(answer).replace(" ", "")
    return max(float(_plain(text).replace(" ", "") in reply) for text in expected["answers"])


def chinese_formula(answer: str, expected: Expected) -> float:
    """The same, where \\text{...} stands for its content."""
    without = [re.sub(r"\\text\{([^{}]*)\}", r"\1", text) for text in (answer, expected["answers"][0])]
    return formula(without[0], {"answers": without[1:]})


def handwritten_answer(answer: str, expected: Expected) -> float:
    """Letters of choices however they are separated; short essays (简答) as prose."""
    text = expected["answers"][0]
    if "简答" in expected["question"]:
        return prose(answer, expected)
    return max(float(separator.join(text) in answer) for separator in SEPARATORS)


# --- Counting ---


def _first_number(text: str) -> int | None:
    match = re.search(r"\d+", text)
    return int(match.group()) if match else None


def counting(answer: str, expected: Expected) -> float:
    """Exact: the digits stand in the reply. Regression: 1 - |difference| / reference where that is above one half."""
    number, exact = _first_number(answer), expected.get("eval") == "exact match"
    if exact and expected.get("strict"):
        return max(float(_first_number(str(text)) == number) for text in expected["answers"])
    if exact:
        return max(float(_plain(text).lower() in answer) for text in expected["answers"])
    return max(_closeness(number, int(text)) for text in expected["answers"])


def _closeness(number: int | None, reference: int) -> float:
    if not number or number >= 2 * reference:
        return 0.0
    share = 1 - abs(number - reference) / reference
    return share if share > ALIKE else 0.0


# --- Prose: mean of BLEU, METEOR, F measure and edit similarity ---


def prose(answer: str, expected: Expected) -> float:
    from nltk.metrics import f_measure
    from nltk.translate import bleu
    from rapidfuzz.distance import Levenshtein

    text = expected["answers"][0]
    if not answer or not text:
        return 0.0
    reference, hypothesis = _words(text, answer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns of n-grams that do not overlap: the reference does not smooth
        overlap = bleu([reference], hypothesis)
    words = f_measure(set(reference), set(hypothesis)) or 0.0
    return (overlap + _meteor(reference, hypothesis) + words + 1 - Levenshtein.normalized_distance(answer, text)) / 4


def _words(*texts: str) -> list[list[str]]:
    """Words of texts: Chinese ones by jieba if any of the texts is Chinese, else what stands between blanks."""
    if not any(map(CHINESE.search, texts)):
        return [text.split() for text in texts]
    import jieba

    jieba.setLogLevel("ERROR")
    return [jieba.lcut(text) for text in texts]


def _meteor(reference: list[str], hypothesis: list[str]) -> float:
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import single_meteor_score

    synonyms: Any = wordnet if _has_wordnet() else NoSynonyms()
    return single_meteor_score(reference, hypothesis, wordnet=synonyms)


class NoSynonyms:
    """Stands for WordNet where it is not installed."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _has_wordnet() -> bool:
    import nltk

    try:
        nltk.data.find("corpora/wordnet.zip")
    except LookupError:
        return False
    return True


# --- Keys and values ---


def key_information(answer: str, expected: Expected) -> float:
    """The best F1 over what the values may be: the share of keys, named or wanted, whose values agree but for blanks."""
    found = _pairs(answer)
    return max((_agreement(found, wanted) for wanted in _alternatives(expected["answers"][0])), default=0.0)


def chinese_key_information(answer: str, expected: Expected) -> float:
    pairs = expected["answers"][0]
    pairs = ast.literal_eval(pairs) if isinstance(pairs, str) else pairs
    values = {key: value if isinstance(value, list) else [value] for key, value in pairs.items()}
    return key_information(answer, {"answers": [values]})


def _alternatives(pairs: Any) -> list[dict[str, Any]]:
    """Every choice of one value for each key; pairs may be written as JSON or Python."""
    if isinstance(pairs, str):
        pairs = _parsed(pairs.strip('"'))
        pairs = _parsed(pairs) if isinstance(pairs, str) else pairs  # written twice
        if not isinstance(pairs, dict):
            return []
        pairs = {key: value if isinstance(value, list) else [value] for key, value in pairs.items()}
    return [dict(zip(pairs, values, strict=True)) for values in product(*pairs.values())]


def _parsed(text: str) -> Any:
    """JSON or a Python literal; None for neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _pairs(reply: str) -> dict[str, str]:
    """Keys and values of a reply: JSON, a Python dict, or lines such as `key: value`; without a code fence."""
    match = FENCE.search(reply)
    content = match.group(1) if match else reply.strip()
    found = _parsed(content)
    if found is None:
        found = {key.strip(): value.strip() for key, value in PAIR.findall(content)}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        return {}
    return {key.strip(): str(value).strip() for key, value in found.items()}


def _agreement(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> float:
    keys = found.keys() | {key for key, value in wanted.items() if value is not None}
    agreed = [key in found and key in wanted and _squeezed(found[key]) == _squeezed(wanted[key]) for key in keys]
    return sum(agreed) / len(agreed) if agreed else 0.0


def _squeezed(value: Any) -> str:
    return str(value).lower().strip().replace("\n", " ").replace(" ", "")


# --- Boxes ---


def grounding(answer: str, expected: Expected) -> float:
    """IoU of the last box of the reply whose coordinates are thousandths."""
    boxes = [[int(number) for number in match.groups()] for match in BOX.finditer(answer)]
    boxes = [box for box in boxes if max(box) <= SIDE]
    return iou(boxes[-1], expected["answers"]) if boxes else 0.0


def iou(box: Sequence[Any], other: Sequence[Any]) -> float:
    """Intersection over union of (left, top, right, bottom); 0 for what is no box."""
    try:
        (x1, y1, x2, y2), (u1, v1, u2, v2) = ([int(number) for number in corners[:4]] for corners in (box, other))
    except (TypeError, ValueError, OverflowError, KeyError):
        return 0.0
    both = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - both
    return both / union if union else 0.0


def answer_with_box(answer: str, expected: Expected) -> float:
    """Half for the content, half for the box, of a reply that gives both by name."""
    found = _pairs(answer)
    content = vqa(found["answer"], expected) if "answer" in found else 0.0
    box = _parsed(found["bbox"]) if "bbox" in found else None
    return 0.5 * content + 0.5 * (iou(box, expected["bbox"]) if isinstance(box, (list, tuple)) else 0.0)


def spotting(answer: str, expected: Expected) -> float:
    """Harmonic mean of precision and recall: a box is found if it overlaps by more than half and its print is the same."""
    found = [item for item in _spotted(answer) if item[0] < item[2] and item[1] < item[3]]
    wanted = [
        (min(box[0::2]), min(box[1::2]), max(box[0::2]), max(box[1::2]), QUOTED.sub(r"\1", str(text)))
        for box, text in zip(expected["bbox"], expected["content"], strict=False)
    ]
    if not found or not wanted:
        return 0.0
    open_boxes = [item for item in wanted if item[4] == NOT_COUNTED]
    counted = [item for item in found if not any(_covered(item, box) > ALIKE for box in open_boxes)]
    wanted = [item for item in wanted if item[4] != NOT_COUNTED]
    taken: set[int] = set()
    right = 0
    for item in wanted:
        for number, other in enumerate(counted):
            if number not in taken and iou(item, other) > ALIKE:
                taken.add(number)
                right += _is_same_print(item[4].upper(), other[4].upper())
                break
    return 2 * right / (len(wanted) + len(counted)) if wanted and counted else 0.0


def _covered(item: tuple, box: tuple) -> float:
    """The share of an item's area that lies in a box."""
    width, height = min(item[2], box[2]) - max(item[0], box[0]), min(item[3], box[3]) - max(item[1], box[1])
    return max(0, width) * max(0, height) / ((item[2] - item[0]) * (item[3] - item[1]))


def _is_same_print(wanted: str, found: str) -> bool:
    """Equal, but for a mark at the beginning or the end of what is wanted."""
    if wanted == found or not wanted:
        return wanted == found
    first, last = wanted[0] in SPOTTED_MARKS, wanted[-1] in SPOTTED_MARKS
    return (
        (first and wanted[1:] == found)
        or (last and wanted[:-1] == found)
        or (first and last and wanted[1:-1] == found)
    )


def _spotted(reply: str) -> list[tuple[int, int, int, int, str]]:
    """Boxes with print: a Python list of lists, or anything in brackets with four numbers and a text."""
    try:
        data = ast.literal_eval(reply)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        items: list[Any] = [part.split(",", 4) for part in LIST_ITEM.findall(reply)]
    else:
        items = list(data) if isinstance(data, (list, tuple)) else []
    found: dict[tuple[int, int, int, int, str], None] = {}
    for item in items:
        if not isinstance(item, (list, tuple)) or len(item) < 5:
            continue
        try:
            box = [int(str(number).strip()) for number in item[:4]]
        except ValueError:
            continue
        text = str(item[4]).replace("\n", "").strip().strip('"').strip("'")
        if all(0 <= number <= SIDE for number in box):
            found[box[0], box[1], box[2], box[3], text] = None
    return list(found)


# --- Tables, charts, documents ---


def html_table(answer: str, expected: Expected) -> float:
    reply = answer.replace("\n", "")
    start = next((place for tag in ("<body", "<table") if (place := reply.find(tag)) >= 0), None)
    return 0.0 if start is None else teds(_as_page(reply[start:]), _as_page(expected["answers"][0]))


def _as_page(table: str) -> str:
    """With the tags around it that TEDS wants."""
    table = table.replace("\n", "")
    opened, closed = "<table" in table, "</table>" in table
    table = ("" if opened else "<table>") + table + ("" if closed else "</table>")
    table = table if "<body>" in table else f"<body>{table}</body>"
    return table if "<html>" in table else f"<html>{table}</html>"


def table(answer: str, expected: Expected) -> float:
    """A table in the form that the question asks for."""
    asked = str(expected["question"]).lower()
    if "html" in asked:
        return html_table(answer, expected)
    if "markdown" in asked:
        return teds(_markdown_table(answer), _markdown_table(expected["answers"][0]))
    return 0.0


def _markdown_table(text: str) -> str:
    lines = text.strip("`markdown").strip("`").strip().split("\n")
    rows = [
        [cell.strip() if cell.strip(" ") or not cell else " " for cell in line.strip().split("|")[1:-1]]
        for line in lines
    ]
    return _page_of([rows[0], *rows[2:]])


def _page_of(rows: Iterable[Iterable[Any]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<html><body><table>{cells}</table></body></html>".replace("\n", "")


def chart(answer: str, expected: Expected) -> float:
    wanted = expected["answers"][0]
    wanted = ast.literal_eval(wanted) if isinstance(wanted, str) else wanted
    found = _chart_of(answer)
    strict = bool(expected.get("strict"))
    return teds(_chart_page(found, strict), _chart_page(wanted, strict)) if found else 0.0


def _chart_of(reply: str) -> dict[str, Any]:
    """The longest fenced part, or all, as a Python dict; without `name =`, comments, and what stands behind the last }."""
    content = max(FENCE.findall(reply), key=len, default=reply.strip())
    content = re.sub(r"^\s*\w+\s*=\s*", "", content.strip(), count=1)
    content = re.sub(r"#.*", "", content)
    end = content.rfind("}")
    try:
        found = ast.literal_eval(content[: end + 1] if end >= 0 else content)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _chart_page(pairs: Mapping[str, Any], strict: bool) -> str:
    texts = {key: str(value) if strict else " ".join(str(value)) for key, value in pairs.items()}
    rows = "".join(f"  <tr><td>{key}</td><td>{text}</td></tr>\n" for key, text in texts.items())
    return f"<html><body><table>\n{rows}</table></body></html>"


def document(answer: str, expected: Expected) -> float:
    """The outlines: headings, with their lines below them; what the lines say does not matter, unless they are blank."""
    found, wanted = (_outline(text) for text in (answer, expected["answers"][0]))
    return 1 - tree_distance(found, wanted, _line_change) / max(_size(found), _size(wanted))


def _line_change(old: Node, new: Node) -> float:
    return 0.0 if old.label[0].split() and new.label[0].split() else 1.0


def _outline(text: str) -> Node:
    """Lines below the first heading of the latest heading's name, or below the title where there is none yet."""
    title = _node("TITLE")
    root = _node("ROOT")
    root.children.append(title)
    latest = ""
    for line in map(_without_markup, text.split("\n")):
        if line.startswith("#"):
            latest = line.replace("#", "")
            root.children.append(_node(latest))
        else:
            (_named(root, latest) if latest else title).children.append(_node(line))
    return root


def _node(label: str) -> Node:
    return Node((label, 1, 1), [], [])


def _named(node: Node, label: str) -> Node:
    """The first node of a name, from the top."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.label[0] == label:
            break
        waiting += reversed(node.children)
    return node


def _size(node: Node) -> int:
    return 1 + sum(map(_size, node.children))


# What is changed in a line of a document, in this order.
MARKUP = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<bos>|<eos>|<pad>|<unk>", ""),
        (r"\s##(\S)", r"\1"),
        (r"\\\s", r"\\"),
        (r"\s\*\s\*\s", "**"),
        (r"{\s", "{"),
        (r"\s}", "}"),
        (r"\s}", "}"),
        (r"\\begin\s", r"\\begin"),
        (r"\\end\s", r"\\end"),
        (r"\\end{table}", r"\\end{table}   "),
        (r"[\n*_]", " "),
    )
]


def _without_markup(line: str) -> str:
    for pattern, replacement in MARKUP:
        line = pattern.sub(replacement, line)
    return line


PROSE = ("fine-grained text recognition en", "full-page OCR en", "full-page OCR cn", "text translation cn")
RULES: dict[str, Callable[[str, Expected], float]] = {
    **dict.fromkeys(
        (*ABILITIES["en_knowledge_reasoning"], *ABILITIES["en_visual_text_understanding"], "math QA en"), by_eval(vqa)
    ),
    "text recognition en": by_eval(vqa),
    **dict.fromkeys(("cognition VQA cn", "reasoning VQA cn"), by_eval(chinese_vqa)),
    **dict.fromkeys(PROSE, prose),
    "handwritten answer extraction cn": handwritten_answer,
    "formula recognition en": formula,
    "formula recognition cn": chinese_formula,
    "text counting en": counting,
    "table parsing en": table,
    "table parsing cn": html_table,
    "chart parsing en": chart,
    **dict.fromkeys(("document parsing en", "document parsing cn"), document),
    **dict.fromkeys(ABILITIES["en_relationship_extraction"], key_information),
    "key information extraction cn": chinese_key_information,
    "VQA with position en": answer_with_box,
    "text grounding en": grounding,
    "text spotting en": spotting,
}
