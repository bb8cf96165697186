"""Agreement of captions with people's: CIDEr, BLEU, ROUGE-L and METEOR.

The scorers are pycocoevalcap's (an optional dependency, imported where it is
used), because everybody reports theirs. Its tokenizer starts a Java program;
`tokenize` does the same in Python: the Penn Treebank tokens of Stanford
CoreNLP 3.4.1 with `-lowerCase`, less the punctuation that pycocoevalcap drops.
On the 40,445 captions of Flickr8k, and on 16,217 of COCO and SugarCrepe, both
give the same tokens. Where they differ (sums of money, a sentence that ends in
a single letter, emoji) captions seldom go.
"""

import dataclasses
import re
import shutil

from cappa_tf.utils.arguments import check_extra

# What pycocoevalcap/tokenizer/ptbtokenizer.py drops. Its "-LRB-" and the like
# never match, as the tokens are lower-cased first: "-lrb-" stays, here too,
# or figures would differ from everybody else's.
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
    """Caption -> tokens joined by spaces, as the caption metrics count them.

    "A dog's ball." -> "a dog 's ball"
    "Two T-shirts, black/white!" -> "two t-shirts black/white"
    "They don't (yet) jump ..." -> "they do n't -lrb- yet -rrb- jump"

    Args:
        caption: A string.

    Returns:
        A lower-case string without punctuation.
    """
    text = caption.translate(_QUOTES).replace('"', " '' ")
    tokens = (_BRACKETS.get(t, t.lower()) for t in _TOKEN.findall(text))
    return " ".join(token for token in tokens if token not in _DROPPED)


@dataclasses.dataclass
class Scores:
    """What `score_captions` finds.

    Attributes:
        corpus: Name -> float, over all images: `cider` (CIDEr-D; 1 is as high
            as people score, up to 10 is possible), `bleu_1` to `bleu_4`,
            `rouge_l` and, if asked for, `meteor`, each in [0, 1].
        cider: Image key -> its own CIDEr; the corpus' is their mean.
    """

    corpus: dict
    cider: dict


def score_captions(captions, references, meteor=False):
    """Scores of one caption an image against several references.

    Args:
        captions: A dict, image key -> caption.
        references: A dict with the same keys, key -> list of captions. CIDEr
            weighs words by how few images' references have them, so the
            figure belongs to this set of images as a whole.
        meteor: Whether to compute METEOR, which runs a Java program.

    Returns:
        `Scores`.

    Raises:
        ValueError: The keys differ, or METEOR is asked for without Java.
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
    """Refuses what cannot be computed here; to be asked before any work.

    Args:
        meteor: Whether METEOR is wanted.

    Raises:
        ImportError: Without pycocoevalcap; names the command.
        ValueError: METEOR without Java.
    """
    check_extra("Caption metrics", "eval", "pycocoevalcap")
    if meteor and not has_java():
        raise ValueError("METEOR needs Java: no program `java` was found")


def has_java():
    """Whether METEOR can be computed here."""
    return shutil.which("java") is not None


def _meteor(wanted, found):
    from pycocoevalcap.meteor.meteor import Meteor

    return float(Meteor().compute_score(wanted, found)[0])


def _check_keys(captions, references):
    if captions.keys() != references.keys() or not captions:
        differing = sorted(captions.keys() ^ references.keys())[:5]
        raise ValueError(
            "Captions and references must have the same, at least one, keys. "
            f"Received: {len(captions)} captions, {len(references)} images "
            f"with references; keys in only one of them: {differing}"
        )
    for key, texts in references.items():
        if isinstance(texts, str) or not texts:
            raise ValueError(
                "References must be a list of at least one caption. "
                f"Received: references[{key!r}]={texts!r}"
            )
