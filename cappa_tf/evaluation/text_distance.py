"""Edit distance, and the error rates of recognized text that rest on it."""

import numpy as np


def edit_distance(first, second):
    """Levenshtein's distance: insertions, deletions and replacements.

    Args:
        first: A sequence, such as a string or a list of words.
        second: Another one.

    Returns:
        The least number of edits that turn one into the other, an integer.
    """
    codes = {}
    first, second = (
        np.array([codes.setdefault(each, len(codes)) for each in one], np.int64)
        for one in (first, second)
    )
    places = np.arange(len(second) + 1)
    row = places
    for number, element in enumerate(first, 1):
        changed = np.minimum(row[1:] + 1, row[:-1] + (second != element))
        row = np.concatenate([[number], changed])
        # Insertions cost 1 a place, from any place before.
        row = places + np.minimum.accumulate(row - places)
    return int(row[-1])


def recognition_scores(pairs):
    """Error rates of recognized texts.

    Args:
        pairs: List of (recognized text, true text), the latter not empty.

    Returns:
        Dict of `exact_match`, the fraction of texts that are equal;
        `word_accuracy`, one minus the word error rate (below 0 if there are
        more errors than words); `character_error_rate`; both rates are
        the edits of all texts divided by the words or characters of the true
        ones; and `normalized_edit_distance`, the mean over texts of the edits
        divided by the length of the longer one.
    """
    edits = [edit_distance(*pair) for pair in pairs]
    words = [(said.split(), true.split()) for said, true in pairs]
    word_edits = sum(edit_distance(*pair) for pair in words)
    return {
        "exact_match": sum(said == true for said, true in pairs) / len(pairs),
        "word_accuracy": 1 - word_edits / sum(len(true) for _, true in words),
        "character_error_rate": sum(edits)
        / sum(len(true) for _, true in pairs),
        "normalized_edit_distance": float(
            np.mean([e / max(map(len, pair)) for e, pair in zip(edits, pairs)])
        ),
    }
