"""NumPy reference of the models, float64, from the paper's equations.

It does not use this project's layers. It works on arrays with
big_vision's names, with one line per equation.
Sources: arXiv 2306.07915, section 3 and appendix; big_vision models/vit.py
and models/proj/cappa/cappa.py for what papers leave out (epsilons, order).

Letters: B images, P patches, L text, D width, H heads, C head width, T labels,
V vocabulary.
"""

import dataclasses

import numpy as np

KEY_BIAS = "MultiHeadDotProductAttention_0/key/bias"


def dense(p, name, x):
    """Multiplies by a kernel (of any rank); adds a bias where there is one."""
    kernel = p[f"{name}/kernel"].astype(np.float64)
    axes = 2 if name.endswith("/out") else 1
    y = np.tensordot(x, kernel, axes)
    return y + p[f"{name}/bias"] if f"{name}/bias" in p else y


def layer_norm(p, name, x):
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return y * p[f"{name}/scale"] + p.get(f"{name}/bias", 0.0)


def gelu(x):
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def attention(p, name, x, memory, causal=False):
    """One head after the other."""
    query, key, value = (
        dense(p, f"{name}/{part}", source)
        for part, source in (("query", x), ("key", memory), ("value", memory))
    )
    heads = []
    for h in range(query.shape[2]):
        q, k, v = query[:, :, h], key[:, :, h], value[:, :, h]
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        if causal:
            scores = np.where(np.tri(len(scores[0])), scores, -np.inf)
        heads.append(np.exp(log_softmax(scores)) @ v)
    return dense(p, f"{name}/out", np.stack(heads, 2))


def mlp(p, name, x):
    return dense(p, f"{name}/Dense_1", gelu(dense(p, f"{name}/Dense_0", x)))


def sincos2d(rows, columns, width):
    """Element by element: sines, cosines of x, then of y."""
    count = width // 4
    table = np.zeros((rows * columns, width))
    for position in range(rows * columns):
        for i in range(count):
            frequency = 10_000.0 ** (-i / (count - 1))
            x, y = position % columns, position // columns
            angles = (np.sin, x), (np.cos, x), (np.sin, y), (np.cos, y)
            for part, (function, where) in enumerate(angles):
                table[position, part * count + i] = function(where * frequency)
    return table


def below(p, prefix):
    return {k[len(prefix) :]: v for k, v in p.items() if k.startswith(prefix)}


def vit(p, image):
    """Encoder: dict with encoded, pre_logits and (with a head) logits."""
    kernel = p["embedding/kernel"].astype(np.float64)
    h, w = kernel.shape[:2]
    rows, columns = image.shape[1] // h, image.shape[2] // w
    x = np.zeros((len(image), rows * columns, kernel.shape[-1]))
    for r in range(rows):
        for c in range(columns):
            patch = image[:, r * h : (r + 1) * h, c * w : (c + 1) * w]
            x[:, r * columns + c] = np.tensordot(patch, kernel, 3)
    x += p["embedding/bias"]
    if "pos_embedding" in p:
        x += p["pos_embedding"]
    else:
        x += sincos2d(rows, columns, x.shape[-1])
    if "cls" in p:
        token = np.broadcast_to(p["cls"], (len(x), 1, x.shape[-1]))
        x = np.concatenate([token, x], 1)
    x = transformer(below(p, "Transformer/"), x)
    return {"encoded": x, **pool(p, x)}


def transformer(p, x):
    """Blocks and final LayerNorm, without any mask."""
    for i in range(block_count(p, "encoderblock_")):
        block = below(p, f"encoderblock_{i}/")
        y = layer_norm(block, "LayerNorm_0", x)
        x = x + attention(block, "MultiHeadDotProductAttention_0", y, y)
        x = x + mlp(block, "MlpBlock_0", layer_norm(block, "LayerNorm_1", x))
    return layer_norm(p, "encoder_norm", x)


def map_head(p, x):
    """Attention of a probe, [B, D]."""
    head = below(p, "MAPHead_0/")
    probe = np.broadcast_to(head["probe"], (len(x), 1, x.shape[-1]))
    y = attention(head, "MultiHeadDotProductAttention_0", probe, x)
    y = y + mlp(head, "MlpBlock_0", layer_norm(head, "LayerNorm_0", y))
    return y[:, 0]


def pool(p, x):
    """Mean, class token or MAP head, then what follows it."""
    pooled = x[:, 0] if "cls" in p else x.mean(1)
    if "MAPHead_0/probe" in p:
        pooled = map_head(p, x)
    if "pre_logits/kernel" in p:
        pooled = np.tanh(dense(p, "pre_logits", pooled))
    outputs = {"pre_logits": pooled}
    if "head/kernel" in p:
        outputs["logits"] = dense(p, "head", pooled)
    return outputs


def text_tower(p, text, pooling="last"):
    """Pooled features [T, D] of token ids [T, L], padding included."""
    x = p["Embed_0/embedding"].astype(np.float64)[text] + p["pos_embedding"]
    x = transformer(below(p, "Encoder_0/"), x)
    if "MAPHead_0/probe" in p:
        return map_head(p, x)
    positions = {"last": x[:, -1], "first": x[:, 0]}
    positions |= {"gap": x.mean(1), "max": x.max(1)}
    return positions[pooling]


def two_towers(p, image, text, pooling="last"):
    """Embeddings of images and of texts, and their logits."""
    towers = {
        "img": vit(below(p, "img/"), image)["pre_logits"],
        "txt": text_tower(below(p, "txt/"), text, pooling),
    }
    for name, features in towers.items():
        if f"{name}/head/kernel" in p:
            features = dense(p, f"{name}/head", features)
        norm = np.sqrt((features**2).sum(-1, keepdims=True)) + 1e-8
        towers[name] = features / norm
    images, texts = towers["img"], towers["txt"]
    return images, texts, images @ texts.T * np.exp(p["t"]) + p.get("b", 0.0)


def block_count(p, prefix):
    numbers = [k[len(prefix) :] for k in p if k.startswith(prefix)]
    return 1 + max(int(n.split("/")[0]) for n in numbers)


def decoder_logits(p, encoded, text, parallel=False):
    """[B, L, V] of captions `text` (not shifted)."""
    vocabulary = p["decoder/LogitsDense/bias"].shape[0]
    if parallel:
        tokens = np.full_like(text, vocabulary)
    else:
        tokens = np.concatenate([0 * text[:, :1], text[:, :-1]], 1)
    x = p["decoder/EmbedTargets/embedding"].astype(np.float64)[tokens]
    if "pos_embedding_decoder" in p:
        x = x + p["pos_embedding_decoder"][:, : text.shape[1]]
    else:
        x = x + sincos2d(1, text.shape[1], x.shape[-1])
    for i in range(block_count(p, "decoder/EncDecBlock")):
        block = below(p, f"decoder/EncDecBlock{i}/")
        y = layer_norm(block, "LayerNorm1", x)
        x = x + attention(block, "SelfAttn", y, y, causal=not parallel)
        y = layer_norm(block, "LayerNorm2", x)
        x = x + attention(block, "CrossAttn", y, encoded)
        x = x + mlp(block, "MLP", layer_norm(block, "LayerNorm3", x))
    x = layer_norm(p, "decoder/LayerNorm", x)
    return dense(p, "decoder/LogitsDense", x)


def logits(p, image, text, parallel=False):
    encoded = vit(below(p, "encoder/"), image)["encoded"]
    return decoder_logits(p, encoded, text, parallel)


def token_nll(scores, text):
    """[B, L], 0 at padding."""
    picked = np.take_along_axis(log_softmax(scores), text[..., None], -1)
    return -picked[..., 0] * (text != 0)


def loss(p, image, text, parallel=False):
    """Mean over each caption's tokens, then over captions."""
    nll = token_nll(logits(p, image, text, parallel), text)
    return (nll.sum(1) / (text != 0).sum(1)).mean()


def scores(p, image, labels):
    """Log-likelihood [B, T] of labels [T, L], autoregressive."""
    encoded = vit(below(p, "encoder/"), image)["encoded"]
    result = np.zeros((len(image), len(labels)))
    for t, label in enumerate(labels):
        text = np.tile(label, (len(image), 1))
        nll = token_nll(decoder_logits(p, encoded, text), text)
        result[:, t] = -nll.sum(1)
    return result


def slope(function, p, direction, step=1e-4):
    """Derivative of function(p) along `direction`, a dict of some arrays.

    Central differences of fourth order.
    """

    def at(distance):
        moved = {k: p[k] + distance * v for k, v in direction.items()}
        return function({**p, **moved})

    near = at(step) - at(-step)
    far = at(2 * step) - at(-2 * step)
    return (8 * near - far) / (12 * step)


@dataclasses.dataclass
class Sizes:
    """Sizes of a captioner (decoder_* default to the encoder's)."""

    width: int = 16
    depth: int = 1
    heads: int = 2
    mlp: int = 24
    patch: tuple = (4, 4)
    image: tuple = (8, 8)
    learned: bool = True
    vocabulary: int = 11
    length: int = 5
    decoder_width: int | None = None
    decoder_heads: int | None = None
    decoder_depth: int = 1
    decoder_mlp: int | None = None
    decoder_bias: bool = False
    mask: bool = True
    pooling: str = "gap"
    rep: int | None = None
    classes: int | None = None


def random_captioner(sizes, seed=0):
    """Random arrays, none of them zero, of a captioner with these sizes."""
    rng = np.random.default_rng(seed)
    arrays = {f"encoder/{k}": v for k, v in random_encoder(sizes, rng).items()}
    d = sizes.decoder_width or sizes.width
    h = sizes.decoder_heads or sizes.heads
    m = sizes.decoder_mlp or sizes.mlp
    v = sizes.vocabulary
    arrays["decoder/EmbedTargets/embedding"] = rng.normal(
        size=(v + sizes.mask, d)
    )
    if sizes.learned:
        arrays["pos_embedding_decoder"] = 0.3 * rng.normal(
            size=(1, sizes.length, d)
        )
    _norm(arrays, rng, "decoder/LayerNorm", d)
    _dense(arrays, rng, "decoder/LogitsDense", (d, v), (v,))
    for i in range(sizes.decoder_depth):
        name = f"decoder/EncDecBlock{i}"
        for n in (1, 2, 3):
            _norm(arrays, rng, f"{name}/LayerNorm{n}", d, sizes.decoder_bias)
        _attention(arrays, rng, f"{name}/SelfAttn", d, d, h, False)
        _attention(arrays, rng, f"{name}/CrossAttn", d, sizes.width, h, False)
        _mlp(arrays, rng, f"{name}/MLP", d, m, sizes.decoder_bias)
    return {k: v.astype(np.float32) for k, v in arrays.items()}


def random_encoder(sizes, rng):
    """Random arrays of an encoder."""
    arrays = {}
    d, patch = sizes.width, sizes.patch
    _dense(arrays, rng, "embedding", (*patch, 3, d), (d,), patch[0] * patch[1])
    if sizes.learned:
        grid = [i // p for i, p in zip(sizes.image, patch)]
        arrays["pos_embedding"] = 0.3 * rng.normal(size=(1, np.prod(grid), d))
    if sizes.pooling == "tok":
        arrays["cls"] = rng.normal(size=(1, 1, d))
    _transformer(arrays, rng, "Transformer", sizes)
    if sizes.rep:
        _dense(arrays, rng, "pre_logits", (d, sizes.rep), (sizes.rep,))
    if sizes.classes:
        shape = (sizes.rep or d, sizes.classes)
        _dense(arrays, rng, "head", shape, shape[1:])
    return {k: v.astype(np.float32) for k, v in arrays.items()}


def random_two_towers(image, text, heads, bias=False, seed=0):
    """Random arrays of a contrastive model.

    Args:
        image: `Sizes` of the image tower.
        text: `Sizes` of the text tower; of its poolings "map" has weights.
        heads: Widths of the output heads (image, text), None for no head.
        bias: Whether there is a bias of the similarities.
        seed: Of the generator.
    """
    rng = np.random.default_rng(seed)
    arrays = {f"img/{k}": v for k, v in random_encoder(image, rng).items()}
    tower = {
        "Embed_0/embedding": rng.normal(size=(text.vocabulary, text.width)),
        "pos_embedding": rng.normal(size=(1, text.length, text.width)),
    }
    _transformer(tower, rng, "Encoder_0", text)
    arrays |= {f"txt/{k}": v for k, v in tower.items()}
    for name, sizes, width in zip(("img", "txt"), (image, text), heads):
        if width is not None:
            shape = (sizes.width, width)
            _dense(arrays, rng, f"{name}/head", shape, shape[1:])
    arrays["t"] = rng.normal(2.0, 0.1, 1)
    if bias:
        arrays["b"] = rng.normal(-9.0, 1.0, 1)
    return {k: v.astype(np.float32) for k, v in arrays.items()}


def _transformer(arrays, rng, prefix, sizes):
    """Blocks and final LayerNorm below a prefix, and a MAP head beside it."""
    d = sizes.width
    _norm(arrays, rng, f"{prefix}/encoder_norm", d)
    attention_name = "MultiHeadDotProductAttention_0"
    for i in range(sizes.depth):
        name = f"{prefix}/encoderblock_{i}"
        _norm(arrays, rng, f"{name}/LayerNorm_0", d)
        _norm(arrays, rng, f"{name}/LayerNorm_1", d)
        _attention(arrays, rng, f"{name}/{attention_name}", d, d, sizes.heads)
        _mlp(arrays, rng, f"{name}/MlpBlock_0", d, sizes.mlp)
    if sizes.pooling == "map":
        arrays["MAPHead_0/probe"] = rng.normal(size=(1, 1, d))
        _norm(arrays, rng, "MAPHead_0/LayerNorm_0", d)
        name = f"MAPHead_0/{attention_name}"
        _attention(arrays, rng, name, d, d, sizes.heads)
        _mlp(arrays, rng, "MAPHead_0/MlpBlock_0", d, sizes.mlp)


def _dense(arrays, rng, name, shape, bias_shape, fan_in=None):
    scale = (fan_in or shape[0]) ** -0.5
    arrays[f"{name}/kernel"] = scale * rng.normal(size=shape)
    if bias_shape:
        arrays[f"{name}/bias"] = 0.2 * rng.normal(size=bias_shape)


def _norm(arrays, rng, name, width, bias=True):
    arrays[f"{name}/scale"] = 1 + 0.2 * rng.normal(size=width)
    if bias:
        arrays[f"{name}/bias"] = 0.2 * rng.normal(size=width)


def _attention(arrays, rng, name, width, memory, heads, bias=True):
    head = (heads, width // heads)
    _dense(arrays, rng, f"{name}/query", (width, *head), bias and head)
    _dense(arrays, rng, f"{name}/key", (memory, *head), bias and head)
    _dense(arrays, rng, f"{name}/value", (memory, *head), bias and head)
    shape, bias_shape = (*head, width), bias and (width,)
    _dense(arrays, rng, f"{name}/out", shape, bias_shape, width)


def _mlp(arrays, rng, name, width, hidden, bias=True):
    shapes = (width, hidden), (hidden, width)
    for i, shape in enumerate(shapes):
        _dense(arrays, rng, f"{name}/Dense_{i}", shape, bias and shape[1:])


def random_batch(sizes, batch=3, seed=1):
    """Images [B, H, W, 3] and captions [B, L] of different lengths."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (batch, *sizes.image, 3)).astype(np.float32)
    text = rng.integers(2, sizes.vocabulary, (batch, sizes.length))
    for row, caption in enumerate(text):
        end = sizes.length - 1 - row % (sizes.length - 1)
        caption[end] = 1
        caption[end + 1 :] = 0
    return image, text.astype(np.int32)


def stacked(arrays):
    """The same captioner or encoder as big_vision's scan=True stores it."""
    result, groups = {}, {}
    for name, array in arrays.items():
        for prefix, axis in (("encoderblock_", 0), ("EncDecBlock", 1)):
            head, found, tail = name.partition(prefix)
            if found:
                number, _, rest = tail.partition("/")
                key = (f"{head}{prefix.rstrip('_')}/{rest}", axis)
                groups.setdefault(key, {})[int(number)] = array
                break
        else:
            result[name] = array
    for (name, axis), parts in groups.items():
        ordered = [parts[i] for i in range(len(parts))]
        result[name] = np.stack(ordered, axis)
    return result
