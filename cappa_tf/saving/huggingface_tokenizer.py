"""A SentencePiece vocabulary in the files that transformers opens.

transformers' own SiglipTokenizer removes punctuation, which this project does
not, so a general tokenizer with the same steps as `data.tokenizer.Tokenizer` is
written: lower-casing, SentencePiece's normalization, unigram pieces, eos.

Reference: the formats of huggingface/tokenizers and of SentencePiece's
sentencepiece_model.proto.
"""

import base64
import functools
import json

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)

from cappa_tf.data.tokenizer import EOS_ID, PAD_ID, UNKNOWN_ID
from cappa_tf.utils import files

VOCABULARY = "spiece.model"
_UNIGRAM = 1  # In the field `model_type` of SentencePiece.
_SPACE = "\u2581"  # What SentencePiece writes for a space.

# The fields of a vocabulary that are read: number, name, type, default. (The
# module that sentencepiece installs needs a newer protobuf than TensorFlow's.)
_FIELDS = {
    "ModelProto": [
        (1, "pieces", "SentencePiece", None),
        (2, "trainer_spec", "TrainerSpec", None),
        (3, "normalizer_spec", "NormalizerSpec", None),
    ],
    "SentencePiece": [(1, "piece", "string", ""), (2, "score", "float", "0")],
    "TrainerSpec": [
        (3, "model_type", "int32", "1"),
        (35, "byte_fallback", "bool", "false"),
    ],
    "NormalizerSpec": [
        (2, "precompiled_charsmap", "bytes", ""),
        (3, "add_dummy_prefix", "bool", "true"),
        (4, "remove_extra_whitespaces", "bool", "true"),
    ],
}


def contents(tokenizer, max_length, pad_with_eos):
    """The files of a tokenizer.

    Args:
        tokenizer: A `Tokenizer`.
        max_length: Tokens of a text, to which it is padded.
        pad_with_eos: Whether padding is eos.

    Returns:
        Dict from file name to bytes: spiece.model, and (for a unigram
        vocabulary, whose texts always end in eos) tokenizer.json and
        tokenizer_config.json, which transformers opens.
    """
    content = files.read_bytes(tokenizer.path)
    model = _model_class().FromString(content)
    result = {VOCABULARY: content}
    if model.trainer_spec.model_type != _UNIGRAM or not tokenizer.sticky_eos:
        return result
    pieces = [piece.piece for piece in model.pieces]
    special = [pieces[i] for i in (PAD_ID, EOS_ID, UNKNOWN_ID)]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        # The text tower has no mask: it attends to padding, too.
        "model_input_names": ["input_ids"],
        "padding_side": "right",
        "eos_token": special[1],
        "pad_token": special[1 if pad_with_eos else 0],
        "unk_token": special[2],
        "clean_up_tokenization_spaces": False,
    }
    written = {
        "tokenizer.json": _tokenizer_json(model, tokenizer.lowercase, special),
        "tokenizer_config.json": config,
    }
    for name, value in written.items():
        result[name] = json.dumps(value, ensure_ascii=False).encode()
    return result


@functools.cache
def _model_class():
    """The protobuf message of a vocabulary, as far as it is read."""
    file = descriptor_pb2.FileDescriptorProto(
        name="cappa_tf/sentencepiece.proto", package="cappa_tf"
    )
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for number, field_name, kind, default in fields:
            field = message.field.add(name=field_name, number=number)
            field.label = field.LABEL_OPTIONAL
            if kind in _FIELDS:
                field.type = field.TYPE_MESSAGE
                field.type_name = f".cappa_tf.{kind}"
            else:
                field.type = getattr(field, f"TYPE_{kind.upper()}")
                field.default_value = default
            if field_name == "pieces":
                field.label = field.LABEL_REPEATED
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName("cappa_tf.ModelProto")
    )


def _tokenizer_json(model, lowercase, special):
    spec = model.normalizer_spec
    normalizers = [{"type": "Lowercase"}] * lowercase
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        normalizers.append(
            {"type": "Precompiled", "precompiled_charsmap": charsmap}
        )
    if spec.remove_extra_whitespaces:
        normalizers += [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    metaspace = {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": "always" if spec.add_dummy_prefix else "never",
        "split": True,
    }
    text = {"Sequence": {"id": "A", "type_id": 0}}
    eos = {"SpecialToken": {"id": special[1], "type_id": 0}}
    pair = [text, eos, {"Sequence": {"id": "B", "type_id": 1}}, eos]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, piece in enumerate(special)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [text, eos],
            "pair": pair,
            "special_tokens": {
                special[1]: {
                    "id": special[1],
                    "ids": [EOS_ID],
                    "tokens": [special[1]],
                }
            },
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": UNKNOWN_ID,
            "vocab": [[piece.piece, piece.score] for piece in model.pieces],
            "byte_fallback": model.trainer_spec.byte_fallback,
        },
    }
