"""Image features kept in a table in place of images, by number of the record.

The table (`inference.feature_cache.FeatureCache`) also holds what else is in a
record, so that neither images nor records are read.

Dimensions:
    B: batch size.
    M: most captions of a record of the batch.
    N: records of the split.
"""

import json

import tensorflow as tf

# What a table gives of each record, besides its features.
_PARTS = {
    "captions": tf.string,
    "prompts": tf.string,
    "label": tf.int64,
    "ok": tf.bool,
}


@tf.autograph.experimental.do_not_convert
def batches(table, decoder, numbers, batch_size):
    """Features and chosen captions of a stream of record numbers.

    Args:
        table: Has `row_shape`, `dtype` and `rows(numbers)`; see
            `FeatureCache`.
        decoder: `decoding.RecordDecoder`, which chooses the captions.
        numbers: A tf.data.Dataset of (position, record number); a negative
            number is padding.
        batch_size: B.

    Returns:
        A tf.data.Dataset of the dicts of `RecordDecoder.decode_chunk` for B
        records, with "image_features" float32 [B, ...] in place of "image";
        "raw" is for `diagnose`.
    """
    types = [tf.as_dtype(table.dtype), *_PARTS.values(), tf.string]

    def look_up(index, number):
        features, captions, prompts, label, ok, raw = tf.numpy_function(
            table.rows, [number], types, stateful=False
        )
        features.set_shape([batch_size, *table.row_shape])
        for one in (captions, prompts):
            one.set_shape([batch_size, None])
        for one in (label, ok, raw):
            one.set_shape([batch_size])
        chunk = {
            "image_features": tf.cast(features, tf.float32),
            "captions": captions,
            "prompts": prompts,
            "label": label,
            "ok": ok,
            "raw": raw,
        }
        chunk = decoder.choose(chunk, index)
        if decoder.prompts is not None:
            chunk["raw"] = _note_prompts(chunk, number, decoder.prompts)
        # Padding is neither a good record nor a bad one.
        return {**chunk, "raw": tf.where(number < 0, "", chunk["raw"])}

    return numbers.batch(batch_size, drop_remainder=True).map(
        look_up, num_parallel_calls=2
    )


def _note_prompts(chunk, number, prompts):
    """The "raw" of a chunk, with what is wrong with prompts."""
    long = chunk["left_out"] > 0
    reason = tf.where(long, prompts.too_long, "no question")
    name = tf.strings.join(["record ", tf.strings.as_string(number)])
    found = tf.strings.join(['["', reason, '", "', name, '"]'])
    told = (chunk["raw"] != "") | (chunk["ok"] & ~long)
    return tf.where(told, chunk["raw"], found)


def note(reason, name):
    """What a table gives as "raw" of a record, for `diagnose`."""
    return json.dumps([reason, name]).encode()


def diagnose(raw):
    """Says what is wrong with a record, as `RecordDecoder.diagnose`."""
    reason, name = json.loads(raw)
    return reason, name
