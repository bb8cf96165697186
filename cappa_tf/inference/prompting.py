"""Prompts as strings: checks against a model, and token ids.

Abbreviations for dimensions:
    N: number of prompts.      M: length of the longest in tokens.
"""

import numpy as np

from cappa_tf.data import prompts as prompts_lib

# Lengths are rounded up to a multiple of this, which limits shapes and graphs.
_LENGTH_MULTIPLE = 8


def check(model, tokenizer, prompt):
    """Checks that a model can answer a prompt.

    Args:
        model: A `Captioner`, whose `prompts` are what it was trained with.
        tokenizer: Its `Tokenizer`.
        prompt: A string; "" or None for no prompt.

    Raises:
        ValueError: The model needs a prompt, knows none, was trained with
            others, or has no room for the caption after this one.
    """
    taught = getattr(model, "prompts", ())
    shown = ", ".join(map(repr, taught))
    prompt = (prompt or "").strip()
    if not taught and prompt:
        raise ValueError(
            "This model was trained without prompts, so it cannot answer one. "
            f"Received: prompt={prompt!r}"
        )
    if not taught or prompts_lib.matches(taught, prompt):
        _check_length(model, tokenizer, prompt)
        return
    if not prompt:
        raise ValueError(
            f"This model was trained with prompts and needs one: {shown}. "
            "Received: no prompt"
        )
    raise ValueError(
        f"This model was trained with other prompts: {shown}. Received: "
        f"prompt={prompt!r}"
    )


def _check_length(model, tokenizer, prompt):
    if not prompt:
        return
    most = model.text_decoder.max_length - 2
    count = int(tokenizer.count_tokens([prompt])[0])
    if count > most:
        raise ValueError(
            f"A prompt has at most {most} tokens, which leaves room for a "
            f"caption of one. Received: {count} tokens of {prompt!r}"
        )


def encode(model, tokenizer, prompts, count=None):
    """Token ids of prompts.

    Args:
        model: As of `check`, which is called with each of them.
        tokenizer: The model's `Tokenizer`.
        prompts: N strings; "" or None for no prompt.
        count: Rows to return, of which those after N are empty; by default N.

    Returns:
        int32 [count, M], padded, with M a multiple of 8 or the most that the
        decoder allows; None if no prompt is there.

    Raises:
        ValueError: As `check`.
    """
    prompts = [(prompt or "").strip() for prompt in prompts]
    for prompt in dict.fromkeys(prompts):
        check(model, tokenizer, prompt)
    if not any(prompts):
        return None
    ids = tokenizer.encode_prompts(prompts).numpy()
    length = -(-ids.shape[1] // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    length = min(length, model.text_decoder.max_length - 1)
    count = len(prompts) if count is None else count
    filled = np.full((count, length), tokenizer.pad_id, np.int32)
    filled[: len(ids), : ids.shape[1]] = ids
    return filled
