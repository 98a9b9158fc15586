"""Text made comparable as the VQA challenge does it: punctuation, number words, articles, contractions.

Known defects of the reference, kept: whether a mark is deleted or becomes a blank depends on blanks beside it anywhere in
the text, or on a digit with a comma; only the first 32 lone periods are removed; "somebody'd" loses its apostrophe.
"""

import re


MARKS = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_WITH_COMMA = re.compile(r"\d,\d")
LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
PERIODS_REMOVED = 32  # the reference passes re.UNICODE, which is 32, where the number of replacements belongs
ARTICLES = ("a", "an", "the")
NUMBERS = dict(zero="0", one="1", two="2", three="3", four="4", five="5", six="6", seven="7", eight="8", nine="9")
NUMBERS |= {"ten": "10", "none": "0"}

# Each is also found where one of its apostrophes is missing.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
MISSING_APOSTROPHE = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def strip_punctuation(text: str) -> str:
    """The text with its marks deleted, or blanks in their place."""
    with_comma = DIGITS_WITH_COMMA.search(text) is not None
    bare = text
    for mark in MARKS:
        alone = with_comma or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if alone else " ")
    return LONE_PERIOD.sub("", bare, count=PERIODS_REMOVED)


def normalize(text: str) -> str:
    """An answer as the VQA metric compares it."""
    bare = strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBERS.get(word, word) for word in bare.lower().split()]
    return " ".join(MISSING_APOSTROPHE.get(word, word) for word in words if word not in ARTICLES)
