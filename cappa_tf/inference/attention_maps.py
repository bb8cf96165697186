"""Attention maps: where a captioner looks for each word of a caption.

Abbreviations for dimensions:
    N: captions, one of each image.  H, W: height and width in pixels.
    L: length of prompt and caption in tokens.  P: patches, rows x columns.
"""

import numpy as np
import tensorflow as tf

from cappa_tf.inference import prompting
from cappa_tf.inference.captions import word_slices


def attention_maps(model, tokenizer, images, rows):
    """The decoder's attention to the patches, word by word.

    The cross-attention with which a token was predicted, averaged over heads,
    blocks and the tokens of a word. It shows where information was read, which
    is not always where a thing is.

    Args:
        model: Built captioner whose encoder has a grid of patches.
        tokenizer: Its `Tokenizer`.
        images: float [N, H, W, 3] in [-1, 1].
        rows: Their `CaptionRow`s.

    Returns:
        List of N lists of (word, float32 [rows, columns]); a map sums to at
        most 1, as class tokens and registers are left out.

    Raises:
        ValueError: If there is no decoder, or no grid.
    """
    if not has_attention_maps(model):
        raise ValueError(
            "Attention maps need a captioner whose encoder has a grid of "
            f"patches. Received: {type(model).__name__}"
        )
    grid, pad = model.vision_encoder.grid, tokenizer.pad_id
    prompts = prompting.encode(
        model, tokenizer, [row.prompt for row in rows], len(rows)
    )
    starts = [0] * len(rows)
    texts = [list(row.tokens) for row in rows]
    if prompts is not None:
        asked = [
            [t for t in p if t != pad] for p in np.asarray(prompts).tolist()
        ]
        starts = [len(prompt) for prompt in asked]
        texts = [prompt + text for prompt, text in zip(asked, texts)]
    length = max(map(len, texts))
    labels = np.full((len(rows), length), pad, np.int32)
    for i, text in enumerate(texts):
        labels[i, : len(text)] = text
    decoder = model.text_decoder
    memory = decoder.project_memory(model.encode(tf.constant(images)))
    maps = decoder.image_attention(
        decoder.shift_right(tf.constant(labels)), memory
    )
    # Blocks and heads -> [N, L, P]. A class token comes before the patches,
    # registers behind them.
    mean = np.mean([np.asarray(one).mean(1) for one in maps], axis=0)
    end = mean.shape[-1] - getattr(model.vision_encoder, "kept_registers", 0)
    mean = mean[..., end - grid[0] * grid[1] : end]
    mean = mean.reshape(len(rows), length, *grid)
    return [
        [
            (word, mean[i, start:][pieces].mean(0))
            for word, pieces in word_slices(row.pieces)
        ]
        for i, (row, start) in enumerate(zip(rows, starts))
    ]


def has_attention_maps(model):
    """Whether a model has a decoder that attends to a grid of patches."""
    encoder = getattr(model, "vision_encoder", None)
    return (
        getattr(encoder, "grid", None) is not None
        and hasattr(model, "text_decoder")
        and model.feature_kind is None
    )
