"""VQA accuracy: how well an answer agrees with those of several people.

Reference: https://visualqa.org/evaluation.html; big_vision
evaluators/proj/paligemma/transfers/vqav2.py.
"""

import collections
import re

import numpy as np

# Number of people who must agree with an answer that counts in full.
PEOPLE = 3

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
# A point that no digit follows. (The rule was to keep all those of numbers.)
_FULL_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
# The benchmark's list; a form that lacks one of its apostrophes gets it back.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd
    it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've
    you'll you're you've
""".split()


def _replacements():
    """Dict from a word to the word that replaces it."""
    found = {name: str(number) for number, name in enumerate(_NUMBERS)}
    found["none"] = "0"
    for word in _CONTRACTIONS:
        for place in (i for i, letter in enumerate(word) if letter == "'"):
            found[word[:place] + word[place + 1 :]] = word
    # The list has this one the wrong way round.
    found["somebody'd"] = "somebodyd"
    return found


_REPLACEMENTS = _replacements()


def clean(answer):
    """Normalizes an answer as VQA does: punctuation, numbers, articles.

    "Two." -> "2", "dont know" -> "don't know", "the red-ish car" -> "red ish
    car".
    """
    kept = answer
    for mark in _PUNCTUATION:
        at_edge = f"{mark} " in answer or f" {mark}" in answer
        # As in the official code, "1,000" also changes the other marks.
        joined = at_edge or _DIGIT_COMMA.search(answer)
        kept = kept.replace(mark, "" if joined else " ")
    words = _FULL_STOP.sub("", kept).lower().split()
    return " ".join(
        _REPLACEMENTS.get(word, word) for word in words if word not in _ARTICLES
    )


def vqa_accuracy(answer, answers):
    """Agreement of an answer with people's.

    It counts in full if three people gave it. The average is over all groups of
    people that leave one out, as people's own accuracy is measured. Answers are
    normalized only if they differ among themselves, as in the official code.

    Args:
        answer: The answer to judge.
        answers: The answers of several people, ten in VQAv2.

    Returns:
        A number in [0, 1].
    """
    answer, answers = _strip(answer), [_strip(each) for each in answers]
    if len(set(answers)) > 1:
        answer, answers = clean(answer), [clean(each) for each in answers]
    matches = np.array([each == answer for each in answers], np.float64)
    others = matches.sum() - matches  # the matches without each person
    return float(np.minimum(others / PEOPLE, 1.0).mean())


def answer_type(answers):
    """The type of a question by its answers, as VQAv2 has three of them.

    Args:
        answers: One or more answers.

    Returns:
        "yes/no" or "number" if the most frequent answer is one, else "other".
    """
    most = collections.Counter(map(clean, answers)).most_common(1)[0][0]
    if most in ("yes", "no"):
        return "yes/no"
    return "number" if re.fullmatch(r"\d+([.,]\d+)?", most) else "other"


def _strip(answer):
    return answer.replace("\n", " ").replace("\t", " ").strip()
