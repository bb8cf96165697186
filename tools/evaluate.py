"""Evaluates a trained model on a task.

    python tools/evaluate.py --task=caption --checkpoint=runs/mine \
        --data=data/mine
    python tools/evaluate.py --task=zero_shot --checkpoint=runs/mine \
        --data=pets --templates="a photo of a {}" --parallel
    python tools/evaluate.py --task=zero_shot --checkpoint=runs/clip_s16 \
        --data=pets --templates=clip_paper
    python tools/evaluate.py --task=vqa --checkpoint=runs/decoder \
        --data=data/vqa --prompt="answer: {question}" --answers=answers.txt
    python tools/evaluate.py --task=ocr --checkpoint=runs/decoder \
        --data=data/receipts --prompt="read:"
    python tools/evaluate.py --task=sugar_crepe --checkpoint=runs/mine \
        --data=sugar_crepe --pictures=coco/val2017
    python tools/evaluate.py --gin_file=gin/evaluation/zero_shot.gin \
        --checkpoint=runs/mine --data=pets

A gin file may have several evaluators, the same ones as during training; --data
is its macro DATA. --task and the flags that go with it are short forms.

Tasks:
    caption      captions, greedy or by --beams: CIDEr, BLEU, ROUGE-L, METEOR
                 (with Java); the result of each image, and image sheets of the
                 worst and the best
    perplexity   likelihood of people's captions, with and without the image
    retrieval    captions of an image and images of a caption: Recall@1, 5, 10
    zero_shot    classification by the class name that fits an image best
    vqa          answers to questions: exact match and VQA accuracy, by type of
                 question; beside them those without the image, and with
                 another one
    ocr          text read from images: word accuracy, character error rate,
                 normalized edit distance, with the same two baselines
    geometry     embeddings of a contrastive model: modality gap, alignment,
                 uniformity
    classification  a classifier's top-1, top-5, confusion, calibration
    fewshot      ridge regression on frozen features of few examples a class
    sugar_crepe  right caption against hard negatives; --data has its 7 files
    aro          the same in ARO's format; --data is one of its files
    scenes       the same for synthetic scenes; --data is their folder
    scene_attributes  probes of size, color, shape, relation and word of scenes
    swapped_words  right caption against one with two colors or nouns swapped
    judgments    Kendall's tau with human judgments; --data is Flickr8k

--data may be anything that training reads: a folder of TFRecords
(tools/prepare_data.py), or one of images. caption, perplexity, retrieval and
ocr need captions.jsonl or another table of captions, vqa one of questions and
answers; zero_shot, fewshot and classification need labels.jsonl with lines
such as
{"image": "a/1.jpg", "label": 3, "class_name": "cat", "split": "train"}.

A captioner scores by likelihood, a contrastive model by the cosine of its
embeddings; the latter has no captions and no perplexity.

--checkpoint is the folder of a run or its .keras file, a preset, a SigLIP
folder of transformers or an npz of big_vision; --tokenizer is the vocabulary of
one that has none beside it. fewshot takes any .keras file (captioner or vision
encoder), too. A model that cannot perform the task is refused before any data
is read. A table is printed; the metrics are written as JSON to --output, by
default beside the checkpoint (with several evaluators, --output is a folder),
the results of single images or choices to .jsonl files and sheets to .png files
of the same name. A metric that is not defined is null.
"""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

from cappa_tf import config
from cappa_tf.utils import console, files

_HUB = "hf://"


def define_flags(flag_values=flags.FLAGS):
    """Defines the flags of this tool."""
    where = {"flag_values": flag_values}
    config.define_flags(runs=False, **where)
    flags.DEFINE_enum("task", None, sorted(TASKS), "Evaluator.", **where)
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Folder of a run, preset (its folder, hf://user/name or name), .keras "
        "file, npz file of big_vision or SigLIP folder of transformers.",
        required=True,
        **where,
    )
    flags.DEFINE_string(
        "tokenizer",
        None,
        "SentencePiece vocabulary of a checkpoint that has none beside it.",
        **where,
    )
    flags.DEFINE_enum(
        "weights",
        "auto",
        ["auto", "final", "best", "latest"],
        "Weights of a run: at its end, best by validation, those of the "
        "newest checkpoint, or the first of these that exists.",
        **where,
    )
    flags.DEFINE_string(
        "data", None, "Data to evaluate on, described above.", **where
    )
    flags.DEFINE_string(
        "test_split",
        None,
        "Split to evaluate on; by default test, for scenes heldout.",
        **where,
    )
    flags.DEFINE_integer(
        "limit",
        None,
        "Maximum number of images; by default all, but 100 for retrieval by "
        "likelihood.",
        lower_bound=1,
        **where,
    )
    flags.DEFINE_integer(
        "batch_size", 32, "Images per batch.", lower_bound=1, **where
    )
    flags.DEFINE_string(
        "output",
        None,
        "JSON file to write; by default TASK.json in the folder of the run, "
        "or CHECKPOINT.TASK.json beside a file. With several evaluators, or if "
        "it exists as a folder, the folder of these files.",
        **where,
    )
    _define_caption_flags(where)
    _define_label_flags(where)
    _define_question_flags(where)
    _define_fewshot_flags(where)
    _define_benchmark_flags(where)


def _define_benchmark_flags(where):
    flags.DEFINE_string(
        "pictures",
        None,
        "sugar_crepe, aro: folder of the images that their files name.",
        **where,
    )
    flags.DEFINE_enum(
        "judgments",
        "expert",
        ["expert", "crowdflower"],
        "judgments: source of the judgments.",
        **where,
    )


def _define_caption_flags(where):
    flags.DEFINE_integer(
        "beams",
        None,
        "caption: number of beams; by default captions are greedy.",
        lower_bound=1,
        **where,
    )
    flags.DEFINE_float(
        "length_penalty",
        None,
        "caption: length penalty of --beams; 0.6 by default.",
        **where,
    )


def _define_question_flags(where):
    flags.DEFINE_string(
        "prompt",
        None,
        "vqa, ocr, caption, perplexity, zero_shot: what a model that was "
        "trained with prompts answers, such as 'caption:', with {question} in "
        "place of the question. vqa and ocr know it if there is only one.",
        **where,
    )
    flags.DEFINE_string(
        "answers",
        None,
        "vqa: text file with an answer on each line, of which the likeliest is "
        "given; by default answers are generated.",
        **where,
    )


def _define_label_flags(where):
    flags.DEFINE_bool(
        "parallel",
        False,
        "zero_shot, retrieval: also score by parallel prediction.",
        **where,
    )
    flags.DEFINE_multi_string(
        "templates",
        ["a photo of a {}"],
        "zero_shot: caption of a class with {} in place of its name; repeat "
        "for more. clip_paper stands for 81 of them, clip_best for 8.",
        **where,
    )
    flags.DEFINE_string(
        "labels",
        None,
        "zero_shot: JSON file from keys of images to lists of class numbers, "
        "any of which is right, in place of the data's labels.",
        **where,
    )
    flags.DEFINE_enum(
        "aliases",
        None,
        ["first", "all", "whole"],
        "zero_shot: part to use of a class name with commas, which separate "
        "aliases; by default first by cosine, whole by likelihood.",
        **where,
    )
    flags.DEFINE_list(
        "class_names",
        None,
        "zero_shot: names by class number; by default those of the data.",
        **where,
    )


def _define_fewshot_flags(where):
    flags.DEFINE_string(
        "train_split", "train", "fewshot: split to train on.", **where
    )
    flags.DEFINE_list(
        "shots",
        ["1", "5", "10", "25"],
        "fewshot: numbers of examples per class.",
        **where,
    )
    flags.DEFINE_list(
        "l2",
        ["1024"],
        "fewshot: penalties of the regression, above 0.",
        **where,
    )
    flags.DEFINE_integer(
        "num_seeds",
        3,
        "fewshot: number of samples of the training examples.",
        lower_bound=1,
        **where,
    )
    flags.DEFINE_enum(
        "resize",
        "squash",
        ["squash", "resize_small"],
        "zero_shot, fewshot: use the whole image (as for the paper's results) "
        "or its center. fewshot also crops a margin: 224 of 256 pixels.",
        **where,
    )


# A task maps the parsed flags to its evaluator. TensorFlow takes seconds to
# load, so each imports its own modules, and --help needs none of them.


def _caption(options):
    from cappa_tf.evaluation.caption_report import Captions

    return Captions(
        options.data,
        _split(options),
        limit=options.limit,
        prompt=options.prompt,
        sampler=_sampler(options),
    )


def _sampler(options):
    """Beam search if --beams asks for it, or None."""
    penalty = options.length_penalty
    if options.beams is None:
        if penalty is not None:
            raise ValueError(
                "--length_penalty is that of --beams, so both must be given. "
                f"Received: --length_penalty={penalty:g}"
            )
        return None
    from cappa_tf.inference import samplers

    given = {} if penalty is None else {"length_penalty": penalty}
    return samplers.make_sampler("beam", beams=options.beams, **given)


def _perplexity(options):
    from cappa_tf.evaluation.perplexity import Perplexity

    return Perplexity(
        options.data,
        _split(options),
        limit=options.limit,
        blind=True,
        prompt=options.prompt,
    )


def _retrieval(options):
    from cappa_tf.evaluation.retrieval import Retrieval

    return Retrieval(
        options.data,
        _split(options),
        limit=options.limit,
        parallel=options.parallel,
    )


def _vqa(options):
    from cappa_tf.evaluation.vqa import VQA

    return VQA(
        options.data,
        _split(options),
        prompt=options.prompt,
        answers=options.answers,
        limit=options.limit,
    )


def _ocr(options):
    from cappa_tf.evaluation.ocr import OCR

    return OCR(
        options.data,
        _split(options),
        prompt=options.prompt,
        limit=options.limit,
    )


def _zero_shot(options):
    from cappa_tf.evaluation.zero_shot import ZeroShot

    return ZeroShot(
        options.data,
        _split(options),
        labels=options.labels,
        class_names=options.class_names,
        templates=_templates(options.templates),
        aliases=options.aliases,
        resize=options.resize,
        parallel=options.parallel,
        limit=options.limit,
        prompt=options.prompt,
    )


def _templates(values):
    """The name of a set of templates, or a list of templates."""
    return values[0] if len(values) == 1 and "{}" not in values[0] else values


def _fewshot(options):
    from cappa_tf.evaluation.fewshot import Fewshot

    return Fewshot(
        options.data,
        options.train_split,
        _split(options),
        shots=_numbers("shots", options.shots, int),
        l2=_numbers("l2", options.l2, float),
        num_seeds=options.num_seeds,
        resize=options.resize,
        batch_size=options.batch_size,
    )


def _classification(options):
    from cappa_tf.evaluation.classification import Classification

    return Classification(
        options.data,
        _split(options),
        limit=options.limit,
        batch_size=options.batch_size,
    )


def _sugar_crepe(options):
    from cappa_tf.evaluation.compositional.benchmarks import SugarCrepe

    pictures = _pictures(options)
    return SugarCrepe(options.data, pictures, limit=options.limit)


def _aro(options):
    from cappa_tf.evaluation.compositional.benchmarks import Aro

    return Aro(options.data, _pictures(options), limit=options.limit)


def _scenes(options):
    from cappa_tf.evaluation.compositional.benchmarks import Scenes

    split = _split(options, "heldout")
    return Scenes(options.data, split, limit=options.limit)


def _scene_attributes(options):
    from cappa_tf.evaluation.scene_attributes import SceneAttributes

    return SceneAttributes(
        options.data,
        options.train_split,
        _split(options, "heldout"),
        test_limit=options.limit,
    )


def _swapped_words(options):
    from cappa_tf.evaluation.compositional.benchmarks import SwappedWords

    return SwappedWords(options.data, _split(options), limit=options.limit)


def _judgments(options):
    from cappa_tf.evaluation.human_judgments import Judgments

    return Judgments(options.data, options.judgments, limit=options.limit)


def _geometry(options):
    from cappa_tf.evaluation.embedding_geometry import EmbeddingGeometry

    return EmbeddingGeometry(options.data, _split(options), limit=options.limit)


TASKS = {
    "caption": _caption,
    "perplexity": _perplexity,
    "retrieval": _retrieval,
    "zero_shot": _zero_shot,
    "vqa": _vqa,
    "ocr": _ocr,
    "classification": _classification,
    "fewshot": _fewshot,
    "sugar_crepe": _sugar_crepe,
    "aro": _aro,
    "scenes": _scenes,
    "scene_attributes": _scene_attributes,
    "swapped_words": _swapped_words,
    "judgments": _judgments,
    "geometry": _geometry,
}


def _split(options, default="test"):
    return options.test_split or default


def _pictures(options):
    if options.pictures is None:
        raise ValueError(
            f"--task={options.task} needs --pictures, the folder of the "
            "images that its files name"
        )
    return options.pictures


def _numbers(name, values, kind):
    """Positive numbers of a list flag."""
    try:
        numbers = [kind(value) for value in values]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < n < float("inf") for n in numbers):
        raise ValueError(
            f"--{name} must be numbers above 0, separated by commas. "
            f"Received: --{name}={','.join(values)}"
        )
    return numbers


# Flags that only --task reads.
_OF_TASKS = (
    "test_split limit parallel templates labels aliases class_names prompt "
    "answers beams length_penalty "
    "train_split shots l2 num_seeds resize pictures judgments"
).split()


def _evaluators(options):
    """The evaluators of --task or of the gin files."""
    if not options.gin_file:
        if options.task is None or options.data is None:
            raise ValueError(
                "Give --task with --data, or --gin_file. Received: "
                f"--task={options.task}, --data={options.data}"
            )
        if options.gin_param:
            raise ValueError(
                "--gin_param goes with --gin_file. Received: "
                f"--gin_param={options.gin_param[0]}"
            )
        return [TASKS[options.task](options)]
    vain = [n for n in ("task", *_OF_TASKS) if options[n].present]
    if vain:
        raise ValueError(
            f"--{vain[0]} does not go with --gin_file; use --gin_param to set "
            f"a binding. Received: --{vain[0]}={options[vain[0]].value}"
        )
    params = list(options.gin_param)
    if options.data is not None:
        params.append(f"DATA = {options.data!r}")
    config.parse(options.gin_file, params, root=config.EVALUATION_ROOT)
    return config.arguments(config.EVALUATION_ROOT)["evaluators"]


def evaluate(options):
    """Runs the evaluators, prints tables and writes files.

    Returns:
        Path of the last JSON file.
    """
    evaluators = _evaluators(options)
    outputs = [
        _output(options, one.name, len(evaluators)) for one in evaluators
    ]
    # Of a hub it is not known yet, and nothing is written there.
    is_hub = options.checkpoint.startswith(_HUB)
    if is_hub or files.exists(options.checkpoint):
        for output in outputs:
            files.check_output("output", output)
    # TensorFlow takes seconds to load, and is needed only with valid flags.
    from cappa_tf.evaluation import evaluate as evaluation
    from cappa_tf.inference.predictor import Predictor

    with console.naming("checkpoint", options.checkpoint):
        predictor = Predictor.open(
            options.checkpoint,
            options.weights,
            tokenizer=options.tokenizer,
            batch_size=options.batch_size,
        )
    reports = evaluation.evaluate(predictor, evaluators)
    for output, (one, report) in zip(outputs, reports):
        print("\n".join(report.lines))
        write_report(report, one.name, options, output)
    return outputs[-1]


def _output(options, name, count):
    """Path of the JSON file of an evaluator, one of `count`."""
    if options.output is None:
        return default_output(options.checkpoint, name)
    if count == 1 and not files.isdir(options.output):
        return options.output
    return os.path.join(options.output, f"{name}.json")


def write_report(report, name, options, path):
    """Writes a `Report`: its JSON to `path`, and other files beside it."""
    from cappa_tf.evaluation.evaluator import json_value
    from cappa_tf.evaluation.sheet import write_sheet

    stem = os.path.splitext(path)[0]
    written = [path]
    content = {
        "task": name,
        "checkpoint": options.checkpoint,
        "data": options.data,
        "split": options.test_split,
        "metrics": report.metrics,
        **report.details,
    }
    text = json.dumps(
        json_value(content), indent=2, ensure_ascii=False, allow_nan=False
    )
    _write_lines(path, [text])
    if report.rows:
        written.append(f"{stem}.jsonl")
        lines = (
            json.dumps(json_value(row), ensure_ascii=False, allow_nan=False)
            for row in report.rows
        )
        _write_lines(written[-1], lines)
    if report.items:
        written.append(f"{stem}.items.json")
        _write_lines(written[-1], [json.dumps(json_value(report.items))])
    for name, (title, rows) in report.sheets.items():
        written.append(f"{stem}_{name}.png")
        write_sheet(written[-1], rows, title=title, marks=False)
    print(f"written to {', '.join(written)}")


def _write_lines(path, lines):
    # A name that is not UTF-8 becomes an escape sequence, as JSON allows.
    text = "".join(f"{line}\n" for line in lines)
    files.write_text(path, text, errors="backslashreplace")


def default_output(checkpoint, task):
    """Path of the JSON file beside a checkpoint, here for one of a hub."""
    if checkpoint.startswith(_HUB):
        name = checkpoint.removeprefix(_HUB).replace("/", "_")
        return f"{name}.{task}.json"
    if files.isdir(checkpoint):
        return os.path.join(checkpoint, f"{task}.json")
    return f"{os.path.splitext(checkpoint)[0]}.{task}.json"


def main(argv):
    """Evaluates a model; input errors are printed as one line."""
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    with console.errors_as_lines("evaluate"):
        evaluate(flags.FLAGS)


if __name__ == "__main__":
    console.run(main, define_flags)
