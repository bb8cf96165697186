"""Caption metrics: tokens of the Java tokenizer, and known scores."""

import json
import random
import shutil
import sys

import pytest
from conftest import shared_data

from cappa_tf.evaluation import caption_metrics
from cappa_tf.evaluation.caption_report import Captions

# Output of Stanford's PTBTokenizer -lowerCase, without punctuation.
WORKED_EXAMPLES = {
    "A dog's ball.": "a dog 's ball",
    "Two T-shirts, black/white!": "two t-shirts black/white",
    "They don't (yet) jump ...": "they do n't -lrb- yet -rrb- jump",
    "We cannot see it ; can't you ?": "we can not see it ca n't you",
    'The letter " P. " on the U.S. flag': "the letter p. on the u.s. flag",
    "Mr. Smith, 3 p.m., at St. John st.": "mr. smith 3 p.m. at st. john st.",
    "A slip 'n' slide at five o'clock": "a slip 'n' slide at five o'clock",
    "a 4-wheeler, the 2nd of 1950s": "a 4-wheeler the 2nd of 1950s",
    "1/2 of 3,000 at 10:30": "1/2 of 3,000 at 10:30",
    "An AT&T sign, r&b, statefarm.com": "an at&t sign r & b statefarm.com",
    "A man's ‘red’ “hat” – on--off": "a man 's red hat on off",
    "What?! No way!": "what ?! no way",
    "the dogs' toys..": "the dogs toys",
    "I'm gonna, they've, she'll": "i 'm gon na they 've she 'll",
    "": "",
}


@pytest.mark.parametrize("caption", WORKED_EXAMPLES)
def test_worked_examples(caption):
    assert caption_metrics.tokenize(caption) == WORKED_EXAMPLES[caption]


def _flickr8k():
    lines = shared_data("flickr8k/captions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_same_tokens_as_the_java_tokenizer():
    if shutil.which("java") is None:
        pytest.skip("no java: apt-get install default-jre-headless")
    ptb = pytest.importorskip(
        "pycocoevalcap.tokenizer.ptbtokenizer", reason="pip install '.[test]'"
    )
    captions = [c for row in _flickr8k() for c in row["captions"]]
    captions = random.Random(0).sample(captions, 4000)
    captions += [example for example in WORKED_EXAMPLES if example]
    captions.append("the end")  # a clitic that ends the file is left whole
    java = ptb.PTBTokenizer().tokenize(
        {i: [{"caption": caption}] for i, caption in enumerate(captions)}
    )
    different = [
        (caption, java[i][0])
        for i, caption in enumerate(captions)
        if caption_metrics.tokenize(caption) != java[i][0]
    ]
    assert not different


def test_a_perfect_caption_and_a_wrong_one():
    pytest.importorskip("pycocoevalcap", reason="pip install '.[test]'")
    references = {
        "a": ["a red ball on green grass", "The red ball."],
        "b": ["two dogs run along a beach", "dogs at the sea"],
    }
    perfect = {key: texts[0] for key, texts in references.items()}
    scores = caption_metrics.score_captions(perfect, references).corpus
    for name in ("bleu_1", "bleu_4", "rouge_l"):
        assert scores[name] == pytest.approx(1.0, abs=1e-6)
    assert scores["cider"] > 4
    swapped = {"a": perfect["b"], "b": perfect["a"]}
    wrong = caption_metrics.score_captions(swapped, references).corpus
    assert wrong["cider"] < 0.1 and wrong["bleu_4"] < 0.01


def test_bleu_by_hand():
    """3 of 4 words occur; 2 of 3 pairs; no penalty, lengths are equal."""
    pytest.importorskip("pycocoevalcap", reason="pip install '.[test]'")
    scores = caption_metrics.score_captions(
        {0: "a red dog runs"}, {0: ["a red dog sits"]}
    ).corpus
    assert scores["bleu_1"] == pytest.approx(3 / 4, abs=1e-6)
    assert scores["bleu_2"] == pytest.approx((3 / 4 * 2 / 3) ** 0.5, abs=1e-6)


def test_people_against_people_on_flickr8k():
    """One caption of five against the other four: the scores of that set."""
    pytest.importorskip("pycocoevalcap", reason="pip install '.[test]'")
    rows = [row for row in _flickr8k() if row["split"] == "test"]
    scores = caption_metrics.score_captions(
        {row["image"]: row["captions"][0] for row in rows},
        {row["image"]: row["captions"][1:] for row in rows},
    ).corpus
    # Computed with pycocoevalcap and its Java tokenizer.
    assert scores["cider"] == pytest.approx(0.788596797524874, abs=1e-9)
    assert scores["bleu_4"] == pytest.approx(0.20945675889555992, abs=1e-9)


@pytest.mark.parametrize(
    "captions, references, message",
    [
        ({}, {}, "at least one"),
        ({"a": "x"}, {"b": ["x"]}, r"only one of them: \['a', 'b'\]"),
        ({"a": "x"}, {"a": []}, r"references\['a'\]=\[\]"),
        ({"a": "x"}, {"a": "x"}, r"references\['a'\]='x'"),
    ],
)
def test_bad_arguments_are_named(captions, references, message):
    with pytest.raises(ValueError, match=message):
        caption_metrics.score_captions(captions, references)


def test_what_is_missing_is_found_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    evaluator = Captions("nowhere")
    with pytest.raises(ImportError, match=r"pip install 'cappa-tf\[eval\]'"):
        evaluator.open()
    monkeypatch.setitem(sys.modules, "pycocoevalcap", json)
    monkeypatch.setattr(caption_metrics, "has_java", lambda: False)
    with pytest.raises(ValueError, match="METEOR needs Java"):
        Captions("nowhere", meteor=True).open()
