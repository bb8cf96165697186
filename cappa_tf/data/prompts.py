"""Prompts: what captions answer, from templates and the questions of records.

A template is a text such as "caption:", or one with a place for the question
of a record: "answer: {question}". Without a template the question itself is
the prompt.

Dimensions:
    C: records of a chunk.
    M: captions of a record.
    L: text length.
"""

import dataclasses
import re

import tensorflow as tf

QUESTION = "{question}"


def check_template(template, name="prompt"):
    """Checks that a template is None, or text with at most one `{question}`.

    Raises:
        ValueError: If it is not.
    """
    if template is None:
        return
    text = template if isinstance(template, str) else "{"
    if re.search("[{}]", text.replace(QUESTION, "", 1)) or not text.strip():
        raise ValueError(
            f"`{name}` must be text, with at most one {QUESTION} in place of "
            f"the record's question. Received: {name}={template!r}"
        )


def check_questions(template, records):
    """Checks that records have the questions that a template wants.

    Raises:
        ValueError: If they have none at all.
    """
    if QUESTION in (template or "") and not records.has_prompts:
        raise ValueError(
            f"The prompt {template!r} has a place for the question of each "
            f"record. Received: {records.name}, which has no questions "
            "(tools/prepare_data.py reads them)"
        )


def composed(template, inner):
    """The templates of all prompts of a data set.

    Args:
        template: That of the data set, or None.
        inner: Tuple of those of its records; empty if they have no prompts.

    Returns:
        A tuple of different templates.
    """
    if template is None:
        return tuple(inner)
    if QUESTION not in template:
        return (template,)
    return tuple(dict.fromkeys(template.replace(QUESTION, p) for p in inner))


def fill_in(template, prompts, captions):
    """Prompts by a template, in a TensorFlow graph.

    Args:
        template: Template or None.
        prompts: string [..., M], the questions of records; "" for none.
        captions: string [..., M].

    Returns:
        (prompts, captions), both [..., M]; a caption is "" if the template
        has a place for its question, and there is none.
    """
    prompts = tf.strings.strip(prompts)
    if template is None:
        return prompts, captions
    if QUESTION not in template:
        return tf.fill(tf.shape(captions), template), captions
    before, after = template.split(QUESTION)
    asked = tf.strings.length(prompts) > 0
    return (
        tf.strings.strip(tf.strings.join([before, prompts, after])),
        tf.where(asked, captions, ""),
    )


def fill_in_example(template, example):
    """Does the same as `fill_in` with a `schema.Example`, which it returns."""
    prompts = [p.strip() for p in example.prompts or []]
    prompts = prompts or [""] * len(example.captions)
    captions = example.captions
    if template is not None:
        captions = [
            caption if prompt or QUESTION not in template else ""
            for caption, prompt in zip(captions, prompts)
        ]
        prompts = [template.replace(QUESTION, p).strip() for p in prompts]
    return dataclasses.replace(example, captions=captions, prompts=prompts)


def matches(templates, prompt):
    """Whether a prompt is one that some templates make.

    Args:
        templates: Templates; "" is that of captions without a prompt.
        prompt: A string.
    """
    return bool(re.fullmatch(pattern(templates), prompt.strip()))


def pattern(templates):
    """A regular expression of prompts, for Python and for TensorFlow (RE2).

    Letters may be of either case, as vocabularies are of lower case.
    """
    alternatives = (
        "(?:.|\n)+".join(map(_escaped, template.strip().split(QUESTION)))
        for template in templates
    )
    return f"(?i)(?:{'|'.join(alternatives)})"


def _escaped(text):
    """Text that stands for itself, in RE2 as well."""
    return re.sub(r"([^\w\s])", r"\\\1", text, flags=re.ASCII)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a data set's captions.

    A prompt must leave room for a token and the end of the caption. A caption
    whose prompt does not, or lacks its question, is left out and counted; a
    record that has no other caption is a bad record.

    Attributes:
        template: Template, or None.
        tokenizer: The `Tokenizer`, of texts of L tokens.
    """

    template: str | None
    tokenizer: object

    @property
    def most_tokens(self):
        """Maximum length of a prompt in tokens, L - 2."""
        return self.tokenizer.max_length - 2

    @property
    def too_long(self):
        """The reason by which those of too many tokens are counted."""
        return f"prompt of more than {self.most_tokens} tokens"

    def fill_in(self, prompts, captions):
        """Prompts and captions of C records, in a graph.

        Args:
            prompts: string [C, M or fewer], questions, padded with "".
            captions: string [C, M], padded with "".

        Returns:
            (prompts [C, M], captions [C, M] as in the function `fill_in`, bool
            [C, M] of the captions whose prompt is too long).
        """
        most = tf.shape(captions)[1]
        missing = tf.maximum(most - tf.shape(prompts)[1], 0)
        prompts = tf.pad(prompts[:, :most], [[0, 0], [0, missing]])
        prompts, captions = fill_in(self.template, prompts, captions)
        tokens = self.tokenizer.count_tokens(prompts)
        return prompts, captions, tokens > self.most_tokens

    def usable(self, example):
        """The example with the captions that can be used, and their prompts."""
        example = fill_in_example(self.template, example)
        tokens = self.tokenizer.count_tokens(example.prompts).numpy()
        kept = [
            i
            for i, caption in enumerate(example.captions)
            if caption.strip() and tokens[i] <= self.most_tokens
        ]
        types = example.question_types
        return dataclasses.replace(
            example,
            captions=[example.captions[i] for i in kept],
            prompts=[example.prompts[i] for i in kept],
            question_types=types and [types[i] for i in kept],
        )

    def problem(self, example):
        """Why an example with captions has none to use; None if it has."""
        if self.usable(example).captions:
            return None
        filled = fill_in_example(self.template, example)
        asked = any(caption.strip() for caption in filled.captions)
        return self.too_long if asked else "no question"
