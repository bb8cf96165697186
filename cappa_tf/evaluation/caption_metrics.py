"""Caption metrics: CIDEr, BLEU, ROUGE-L and METEOR.

The scorers are those of pycocoevalcap (an optional dependency, imported where
it is used), as these are the ones commonly reported. Its tokenizer starts a
Java program; `tokenize` does the same in Python: the Penn Treebank tokens of
Stanford CoreNLP 3.4.1 with `-lowerCase`, without the punctuation that
pycocoevalcap drops. On the 40,445 captions of Flickr8k, and on 16,217 of COCO
and SugarCrepe, both give the same tokens. They differ on text that is rare in
captions (sums of money, a sentence that ends in a single letter, emoji).
"""

import dataclasses
import re
import shutil

from cappa_tf.utils.arguments import check_extra

# Tokens that pycocoevalcap/tokenizer/ptbtokenizer.py drops. Its "-LRB-" and the
# like never match, as the tokens are lower-cased first. So "-lrb-" stays here
# too, or scores would differ from those commonly reported.
_DROPPED = frozenset(
    ["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_QUOTES = str.maketrans(
    {"‘": "`", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-"}
)
_BRACKETS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
}
_ABBREVIATION = (
    r"(?:mr|mrs|ms|dr|st|mt|jr|sr|vs|etc|inc|co|corp|ltd|lt|col|gen|sgt|capt"
    r"|prof|rev|hon|ave|blvd|rd|dept|no|jan|feb|mar|apr|aug|sept?|oct|nov|dec)\."
)
_TOKEN = re.compile(
    rf"""
    [!?]{{2,}}                          # ?! (kept, where ! and ? are dropped)
    | '(?:s|m|d|ll|re|ve)\b             # dog 's
    | n't\b                             # do n't
    | \w+?(?=n't\b)                     # do, before n't
    | (?:can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b))
    | (?:gim(?=me\b) | lem(?=me\b))
    | 'n' | [od]'[a-z]+                 # rock 'n' roll, o'clock
    | (?<!\w)(?:[a-z]\.)+(?!\w)        # u.s.
    | (?<!\w){_ABBREVIATION}(?!\w)      # mr.
    | '\d0s\b                           # '90s
    | (?-i:[A-Z]+(?:&[A-Z]+)+)          # AT&T, but: r & b
    | [a-z]+(?:\.[a-z]+)+               # statefarm.com
    | \d+(?:[.,:/]\d+)*(?:-?\w+)*      # 10:30 1/2 1950s 2nd 4-wheeler
    | \w+(?:[-/]\w+)*                  # t-shirt black/white
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(caption):
    """Splits a caption into the tokens that the metrics count.

    "A dog's ball." -> "a dog 's ball"
    "Two T-shirts, black/white!" -> "two t-shirts black/white"
    "They don't (yet) jump ..." -> "they do n't -lrb- yet -rrb- jump"

    Args:
        caption: A string.

    Returns:
        The tokens joined by spaces, in lower case and without punctuation.
    """
    text = caption.translate(_QUOTES).replace('"', " '' ")
    tokens = (_BRACKETS.get(t, t.lower()) for t in _TOKEN.findall(text))
    return " ".join(token for token in tokens if token not in _DROPPED)


@dataclasses.dataclass
class Scores:
    """Scores of captions against references.

    Attributes:
        corpus: Dict name -> float, over all images: `cider` (CIDEr-D; people
            score about 1, the maximum is 10), `bleu_1` to `bleu_4`, `rouge_l`
            and, if requested, `meteor`, each in [0, 1].
        cider: Dict image key -> CIDEr of the image; the corpus has their mean.
    """

    corpus: dict
    cider: dict


def score_captions(captions, references, meteor=False):
    """Scores one caption per image against several references.

    Args:
        captions: Dict image key -> caption.
        references: Dict with the same keys, key -> list of captions. CIDEr
            weights words by how few images' references contain them, so it
            depends on the set of images.
        meteor: Whether to compute METEOR, which runs a Java program.

    Returns:
        `Scores`.

    Raises:
        ValueError: If the keys differ, or METEOR is requested without Java.
    """
    _check_keys(captions, references)
    check_installed(meteor)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    found = {key: [tokenize(captions[key])] for key in captions}
    wanted = {key: [tokenize(c) for c in references[key]] for key in captions}
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    cider, each = Cider().compute_score(wanted, found)
    corpus = {
        "cider": float(cider),
        **{f"bleu_{n}": float(score) for n, score in enumerate(bleu, 1)},
        "rouge_l": float(Rouge().compute_score(wanted, found)[0]),
    }
    if meteor:
        corpus["meteor"] = _meteor(wanted, found)
    return Scores(corpus, dict(zip(captions, map(float, each))))


def check_installed(meteor=False):
    """Checks that the metrics can be computed, before any work is done.

    Args:
        meteor: Whether METEOR is requested.

    Raises:
        ImportError: If pycocoevalcap is missing; names the command.
        ValueError: If METEOR is requested and Java is missing.
    """
    check_extra("Caption metrics", "eval", "pycocoevalcap")
    if meteor and not has_java():
        raise ValueError("METEOR needs Java: no program `java` was found")


def has_java():
    """Returns whether Java is installed, which METEOR needs."""
    return shutil.which("java") is not None


def _meteor(wanted, found):
    from pycocoevalcap.meteor.meteor import Meteor

    return float(Meteor().compute_score(wanted, found)[0])


def _check_keys(captions, references):
    if captions.keys() != references.keys() or not captions:
        differing = sorted(captions.keys() ^ references.keys())[:5]
        raise ValueError(
            "Captions and references must have the same keys, at least one. "
            f"Received: {len(captions)} captions, {len(references)} images "
            f"with references; keys in only one of them: {differing}"
        )
    for key, texts in references.items():
        if isinstance(texts, str) or not texts:
            raise ValueError(
                "References must be a list of at least one caption. "
                f"Received: references[{key!r}]={texts!r}"
            )
