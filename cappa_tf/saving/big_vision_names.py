"""Table of names: big_vision's arrays and the variables of this project.

A row holds the name of an array, the path of the variable (or, with `{}`, of
the variables of all blocks) and the shape in letters. A letter is a size that
the array tells, so the same table gives the shapes to expect, the model to
build and the arrays to write.

Letters of shapes:
    h, w: height, width of a patch.  P: patches.  D: width.  H: heads.
    C: width of one head, D / H.     M: hidden width of the MLP.
    R: width of pre-logits.          K: classes.
    E: width of the encoder.         L: text length.   V: vocabulary.
    T: rows of the token embedding, V or (with MASK) V + 1.
    N: number of blocks, if they are stacked in one array.
    I, J: width of the image and of the text tower.  Z: of the embeddings.
"""

import collections
import dataclasses
import re

# Axes along which a scanned model stacks its blocks. Reference: `nn.scan` in
# big_vision models/vit.py `Encoder`, models/proj/cappa/cappa.py `Decoder`.
_ENCODER_SCAN_AXIS = 0
_DECODER_SCAN_AXIS = 1

_GEMMA_VOCABULARY = 256_000


@dataclasses.dataclass(frozen=True)
class Row:
    """One array of big_vision.

    Attributes:
        name: Name of the array, without `params/`.
        path: Path of the variable below its model; `{}` stands for the number
            of the block if blocks are stacked.
        shape: Letters (sizes that vary) and ints.
        axis: Axis along which blocks are stacked, or None.
    """

    name: str
    path: str
    shape: tuple
    axis: int | None = None


def _norm(name, path, use_bias=True):
    rows = [(f"{name}/scale", f"{path}/gamma", "D")]
    return rows + [(f"{name}/bias", f"{path}/beta", "D")] * use_bias


def _dense(name, path, shape, use_bias=True):
    rows = [(f"{name}/kernel", f"{path}/kernel", shape)]
    return rows + [(f"{name}/bias", f"{path}/bias", shape[-1])] * use_bias


def _attention(name, path, use_bias=True, memory="D"):
    rows = []
    for part in ("query", "key", "value"):
        source = "D" if part == "query" else memory
        rows.append(
            (f"{name}/{part}/kernel", f"{path}/{part}/kernel", f"{source}HC")
        )
        if use_bias:
            rows.append(
                (f"{name}/{part}/bias", f"{path}/{part}/bias", "HC"),
            )
    return rows + _dense(f"{name}/out", f"{path}/out", "HCD", use_bias)


def _mlp(name, path, use_bias=True):
    return [
        *_dense(f"{name}/Dense_0", f"{path}/expand", "DM", use_bias),
        *_dense(f"{name}/Dense_1", f"{path}/project", "MD", use_bias),
    ]


_ENCODER_BLOCK = [
    *_norm("LayerNorm_0", "attention_norm"),
    *_attention("MultiHeadDotProductAttention_0", "attention"),
    *_norm("LayerNorm_1", "mlp_norm"),
    *_mlp("MlpBlock_0", "mlp"),
]

# As a part of either tower.
_MAP_HEAD = [
    ("MAPHead_0/probe", "pool/probe", (1, 1, "D")),
    *_attention("MAPHead_0/MultiHeadDotProductAttention_0", "pool/attention"),
    *_norm("MAPHead_0/LayerNorm_0", "pool/norm"),
    *_mlp("MAPHead_0/MlpBlock_0", "pool/mlp"),
]


def _decoder_block(use_bias):
    return [
        *_norm("LayerNorm1", "self_attention_norm", use_bias),
        *_attention("SelfAttn", "self_attention", use_bias=False),
        *_norm("LayerNorm2", "cross_attention_norm", use_bias),
        *_attention("CrossAttn", "cross_attention", False, memory="E"),
        *_norm("LayerNorm3", "mlp_norm", use_bias),
        *_mlp("MLP", "mlp", use_bias),
    ]


def _blocks(block, name, path, num_layers, scan_axis):
    """Rows of all blocks, stacked if `scan_axis` is not None."""
    if scan_axis is None:
        return [
            Row(f"{name.format(i)}/{n}", f"{path.format(i)}/{p}", tuple(shape))
            for i in range(num_layers)
            for n, p, shape in block
        ]
    # The stacked layer's name has no number: "encoderblock", "EncDecBlock".
    name = name.format("").rstrip("_")
    return [
        Row(
            f"{name}/{n}",
            f"{path}/{p}",
            (*shape[:scan_axis], "N", *shape[scan_axis:]),
            scan_axis,
        )
        for n, p, shape in block
    ]


def vision_rows(
    *, num_layers, scanned=False, learned=True, pooling="gap", rep=False, head=0
):
    """The table of an encoder.

    Args:
        num_layers: Number of blocks; ignored if they are stacked.
        scanned: Whether blocks are stacked.
        learned: Whether positions are learned.
        pooling: Pooling of the `VisionEncoder`.
        rep: Whether there is a layer `pre_logits`.
        head: Whether there is a head.

    Returns:
        List of `Row`, names as in an encoder-only file.
    """
    rows = [
        ("embedding/kernel", "patches/kernel", ("h", "w", 3, "D")),
        ("embedding/bias", "patches/bias", "D"),
    ]
    if learned:
        position = "positions/position_embedding"
        rows.append(("pos_embedding", position, (1, "P", "D")))
    if pooling == "tok":
        rows.append(("cls", "class_token", (1, 1, "D")))
    rows += _norm("Transformer/encoder_norm", "encoder_norm")
    if pooling == "map":
        rows += _MAP_HEAD
    if rep:
        rows += _dense("pre_logits", "representation", "DR")
    if head:
        rows += _dense("head", "head", "RK" if rep else "DK")
    return [Row(n, p, tuple(shape)) for n, p, shape in rows] + _blocks(
        _ENCODER_BLOCK,
        "Transformer/encoderblock_{}",
        "encoder_block_{}",
        num_layers,
        _ENCODER_SCAN_AXIS if scanned else None,
    )


def text_rows(*, num_layers, scanned=False, learned=True, use_bias=False):
    """The table of a captioner's decoder.

    Args:
        num_layers: Number of blocks; ignored if they are stacked.
        scanned: Whether blocks are stacked.
        learned: Whether positions are learned.
        use_bias: Whether the blocks' MLPs and LayerNorms have biases.

    Returns:
        List of `Row`, names as in the captioner's file.
    """
    rows = [("decoder/EmbedTargets/embedding", "tokens/embeddings", "TD")]
    if learned:
        position = "positions/position_embedding"
        rows.append(("pos_embedding_decoder", position, (1, "L", "D")))
    rows += _norm("decoder/LayerNorm", "decoder_norm")
    rows += _dense("decoder/LogitsDense", "head", "DV")
    return [Row(n, p, tuple(shape)) for n, p, shape in rows] + _blocks(
        _decoder_block(use_bias),
        "decoder/EncDecBlock{}",
        "decoder_block_{}",
        num_layers,
        _DECODER_SCAN_AXIS if scanned else None,
    )


def text_tower_rows(*, num_layers, scanned=False, pooling="last"):
    """The table of the text tower of a contrastive model.

    Args:
        num_layers: Number of blocks; ignored if they are stacked.
        scanned: Whether blocks are stacked.
        pooling: Pooling of the `TextEncoder`.

    Returns:
        List of `Row`, names as below `txt/`.
    """
    rows = [
        ("Embed_0/embedding", "tokens/embeddings", "VD"),
        ("pos_embedding", "positions/position_embedding", (1, "L", "D")),
        *_norm("Encoder_0/encoder_norm", "encoder_norm"),
    ]
    if pooling == "map":
        rows += _MAP_HEAD
    return [Row(n, p, tuple(shape)) for n, p, shape in rows] + _blocks(
        _ENCODER_BLOCK,
        "Encoder_0/encoderblock_{}",
        "encoder_block_{}",
        num_layers,
        _ENCODER_SCAN_AXIS if scanned else None,
    )


def contrastive_rows(*, image_head=False, text_head=True, bias=False):
    """The table of a contrastive head.

    Args:
        image_head: Whether image features are projected.
        text_head: Whether text features are projected.
        bias: Whether there is a bias of the similarities.

    Returns:
        List of `Row`, names as in the file of a two-tower model.
    """
    rows = [("t", "log_temperature", (1,))]
    if bias:
        rows.append(("b", "logit_bias", (1,)))
    if image_head:
        rows += _dense("img/head", "image", "IZ")
    if text_head:
        rows += _dense("txt/head", "text", "JZ")
    return [Row(n, p, tuple(shape)) for n, p, shape in rows]


def _under(names, prefix):
    return any(name.startswith(prefix) for name in names)


def _block_count(names, pattern):
    """Number of blocks, one more than the highest index; at least 1."""
    found = [re.match(pattern, name) for name in names]
    return 1 + max((int(match[1]) for match in found if match), default=0)


def vision_structure(names):
    """Arguments of `vision_rows` for the names of an encoder's arrays."""
    pooling = "gap"
    if "cls" in names:
        pooling = "tok"
    elif _under(names, "MAPHead_0/"):
        pooling = "map"
    return {
        "num_layers": _block_count(names, r"Transformer/encoderblock_(\d+)/"),
        "scanned": _under(names, "Transformer/encoderblock/"),
        "learned": "pos_embedding" in names,
        "pooling": pooling,
        "rep": _under(names, "pre_logits/"),
        "head": _under(names, "head/"),
    }


def text_structure(names):
    """Arguments of `text_rows` for the names of a captioner's arrays."""
    biases = r"decoder/EncDecBlock\d*/(LayerNorm\d|MLP/Dense_\d)/bias"
    return {
        "num_layers": _block_count(names, r"decoder/EncDecBlock(\d+)/"),
        "scanned": _under(names, "decoder/EncDecBlock/"),
        "learned": "pos_embedding_decoder" in names,
        "use_bias": any(re.fullmatch(biases, name) for name in names),
    }


def pads_with_eos(vocabulary_size):
    """Whether the text tower of a public file reads padding as eos.

    CLIP, LiT and SigLIP pad with eos; SigLIP 2, of Gemma's vocabulary, with 0.
    """
    return vocabulary_size != _GEMMA_VOCABULARY


def text_tower_structure(names):
    """Arguments of `text_tower_rows` for names below `txt/`.

    `pooling` is None without a MAP head: arrays do not tell the others apart.
    """
    pattern = r"Encoder_0/encoderblock_(\d+)/"
    return {
        "num_layers": _block_count(names, pattern),
        "scanned": _under(names, "Encoder_0/encoderblock/"),
        "pooling": "map" if _under(names, "MAPHead_0/") else None,
    }


def contrastive_structure(names):
    """Arguments of `contrastive_rows` for the names of a two-tower model."""
    return {
        "image_head": _under(names, "img/head/"),
        "text_head": _under(names, "txt/head/"),
        "bias": "b" in names,
    }


def read_sizes(rows, arrays):
    """Reads the sizes from the shapes of the arrays.

    Args:
        rows: List of `Row`.
        arrays: Dict of arrays by name.

    Returns:
        Dict from letter to int. For each letter it holds the size on which
        most arrays agree, so that one misshapen array is detected. A letter
        that no array tells is missing.
    """
    votes = collections.defaultdict(collections.Counter)
    for row in rows:
        shape = getattr(arrays.get(row.name), "shape", ())
        if len(shape) != len(row.shape):
            continue
        for letter, size in zip(row.shape, shape):
            if isinstance(letter, str):
                votes[letter][int(size)] += 1
    sizes = {
        letter: count.most_common(1)[0][0] for letter, count in votes.items()
    }
    if "D" in sizes and sizes["D"] % sizes.get("H", sizes["D"] + 1) == 0:
        sizes["C"] = sizes["D"] // sizes["H"]
    if "V" in sizes and "T" in sizes:
        sizes["T"] = sizes["V"] + int(sizes["T"] != sizes["V"])
    return sizes


def expected_shapes(rows, sizes, prefix=""):
    """Dict from name to shape, with None for an unknown size."""
    return {
        prefix + row.name: tuple(
            sizes.get(s) if isinstance(s, str) else s for s in row.shape
        )
        for row in rows
    }


def check_arrays(expected, arrays, source, owner="a big_vision model"):
    """Compares all names and shapes at once.

    Args:
        expected: Dict from name to shape, from `expected_shapes`.
        arrays: Dict of arrays by name.
        source: Source of the arrays, for the message.
        owner: What the arrays should be of, for the message.

    Raises:
        ValueError: If any array is missing, extra or misshapen. The message
            lists all of them with the expected and the actual shape.
    """
    missing = expected.keys() - arrays.keys()
    extra = arrays.keys() - expected.keys()
    misshapen = [
        name
        for name in expected.keys() & arrays.keys()
        if len(expected[name]) != arrays[name].ndim
        or any(
            want is not None and want != got
            for want, got in zip(expected[name], arrays[name].shape)
        )
    ]
    if not (missing or extra or misshapen):
        return
    lines = [f"The arrays are not those of {owner}."]
    lines += _listed("Missing", missing, lambda n: _shown(expected[n]), " - ")
    lines += _listed("Extra", extra, lambda n: _shown(arrays[n].shape), " + ")
    lines += _listed(
        "Misshapen",
        misshapen,
        lambda n: (
            f"expected {_shown(expected[n])}, found {_shown(arrays[n].shape)}"
        ),
        " ! ",
    )
    raise ValueError("\n".join([*lines, f"Received: {source}"]))


def _listed(title, names, describe, mark):
    if not names:
        return []
    return [
        f"{title} ({len(names)}):",
        *(f"{mark}{name} {describe(name)}" for name in sorted(names)),
    ]


def _shown(shape):
    """A shape as text: "(32, ?, 16)" for (32, None, 16)."""
    sizes = ", ".join("?" if s is None else str(s) for s in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"
