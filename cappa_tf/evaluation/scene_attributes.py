"""What frozen features say about synthetic scenes: a probe of each attribute.

Ridge regression from the pooled features to each word of a scene's caption:
size, color and shape of both objects, their relation, and the printed word. The
compositions of the test split do not occur in the split "train".
"""

import numpy as np

from cappa_tf.data.scenes import world
from cappa_tf.evaluation.compositional.scene_choices import parse
from cappa_tf.evaluation.evaluator import Evaluator, Report, table
from cappa_tf.evaluation.fewshot import RidgeRegression
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.inference.predictor import FEATURES
from cappa_tf.utils.arguments import check_counts, check_number

# Attributes of a caption -> the metric that they are averaged in.
_SCENE = {
    "size_1": "size",
    "size_2": "size",
    "color_1": "color",
    "color_2": "color",
    "shape_1": "shape",
    "shape_2": "shape",
    "relation": "relation",
}
_PRINT = {"word": "word", "word_color": "word_color", "ground": "word_color"}


def attributes(caption):
    """Dict attribute -> word of a scene's caption, or None if it is not one."""
    content = parse(caption)
    if content is None:
        return None
    if isinstance(content, world.Print):
        return {
            "word": content.word,
            "word_color": content.color,
            "ground": content.ground,
        }
    found = {"relation": content.relation}
    for i, thing in enumerate((content.first, content.second), 1):
        found |= {
            f"size_{i}": thing.size,
            f"color_{i}": thing.color,
            f"shape_{i}": thing.shape,
        }
    return found


class SceneAttributes(Evaluator):
    """Accuracy of linear probes of each attribute of synthetic scenes.

    Args:
        path: Folder of the scenes.
        train_split: Split to fit the probes on.
        test_split: Split to test them on.
        train_limit: Number of images to fit them on.
        test_limit: Maximum number of images to test on, or None for all.
        l2: Penalty of the ridge regression.
        name: Name of the evaluator in the results.
    """

    needs = (FEATURES,)

    def __init__(
        self,
        path: str,
        train_split="train",
        test_split="heldout",
        *,
        train_limit=4_000,
        test_limit: int | None = None,
        l2=10.0,
        name="scene_attributes",
    ):
        super().__init__(name)
        check_counts(train_limit=train_limit)
        check_counts(optional=True, test_limit=test_limit)
        self._train = EvaluationImages(path, train_split)
        self._test = EvaluationImages(path, test_split)
        self._limits = (train_limit, test_limit)
        self._l2 = check_number("l2", l2, exclusive=True)

    def open(self):
        """Checks that the data can be found."""
        self._train.open()
        self._test.open()

    def evaluate(self, predictor):
        """Fits and tests the probes.

        Returns:
            A `Report` of `size`, `color`, `shape`, `relation`, `word` and
            `word_color`, each the mean over the attributes of this kind, and
            of `mean`, the mean over these.
        """
        self.check(predictor)
        train, test = (
            _features(predictor, data, limit)
            for data, limit in zip((self._train, self._test), self._limits)
        )
        metrics, items, chance = {}, {}, {}
        kinds = _SCENE | _PRINT
        for kind in dict.fromkeys(kinds.values()):
            names = [name for name in kinds if kinds[name] == kind]
            probed = [self._probe(train, test, name) for name in names]
            items[kind] = np.mean([right for right, _ in probed], 0).tolist()
            metrics[kind] = float(np.mean(items[kind]))
            chance[kind] = float(np.mean([guess for _, guess in probed]))
        metrics["mean"] = float(np.mean(list(metrics.values())))
        lines = [
            f"{len(train[1])} images to fit on, {len(test[1])} to test on",
            *table(
                ("", "accuracy", "most frequent"),
                [(k, v, chance.get(k)) for k, v in metrics.items()],
            ),
        ]
        details = {
            "examples": {"train": len(train[1]), "test": len(test[1])},
            "most_frequent": chance,
            "l2": self._l2,
        }
        return Report(metrics, lines, details, items=items)

    def _probe(self, train, test, name):
        """(bool [M], which test images are right; accuracy of guessing)."""
        (x, y), (x_test, y_test) = (
            _with(split, name) for split in (train, test)
        )
        words = sorted(set(y))
        if not words or not len(y_test):
            raise ValueError(
                "The splits must hold synthetic scenes (cappa_tf.data.scenes)."
                f" Received: no caption with {name!r} in {self._train.path}"
            )
        numbers = {word: i for i, word in enumerate(words)}
        labels = np.array([numbers[word] for word in y])
        # A word that only the test split has counts as wrong.
        wanted = np.array([numbers.get(word, -1) for word in y_test])
        model = RidgeRegression(x, labels, len(words))
        most = np.bincount(labels).argmax()
        guess = float(np.mean(wanted == most))
        return model.is_right(x_test, wanted, self._l2), guess


def _features(predictor, data, limit):
    """(features float32 [N, D], list of N attribute dicts)."""
    features, found = [], []
    for images, examples in data.captioned(predictor, limit):
        features.append(predictor.features(images))
        found += [attributes(e.captions[0]) or {} for e in examples]
    return np.concatenate(features), found


def _with(split, name):
    """The examples that have an attribute, and its words."""
    features, found = split
    has = [i for i, one in enumerate(found) if name in one]
    return features[has], [found[i][name] for i in has]
