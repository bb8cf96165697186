"""Log-likelihoods of many texts for each image.

The reference runs the decoder over all 64 positions of every (image, text)
pair. Here the texts are arranged in prefix trees: a prefix that several texts
share ("a photo of a") is one node, and each node is computed once per image.
An attention mask lets a node attend to its ancestors only.

Abbreviations for dimensions:
    B: batch (of images).      T: texts, the same for all images.
    K: texts per image.        L: length of the text.  M: `max_length`.
    G: groups of texts.        C: texts in a group.    N: nodes of a group.
    P: number of patches.      D: width.               V: vocabulary.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from cappa_tf.models.losses import cross_entropy

# Nodes that pass through the decoder together for an image. Attention is
# quadratic in them; beyond a few hundred it costs more than sharing saves.
NODES_PER_GROUP = 192


@dataclasses.dataclass(frozen=True)
class PrefixGroups:
    """Texts as prefix trees, G of them with N nodes each.

    Node 0 is the empty prefix; the hidden state of a node predicts the token
    after its prefix. Unused nodes attend to themselves only.

    Attributes:
        tokens: int32 [G, N], the input at each node, its prefix's last token.
        depths: int32 [G, N], the position of each node.
        ancestors: bool [G, N, N], True for the nodes that a node attends to.
        nodes: int32 [G, C, L], the node that predicts each token of a text.
        targets: int32 [G, C, L], the tokens of each text, pad for none.
        order: int32 [T], the index of each given text among the G * C.
    """

    tokens: np.ndarray
    depths: np.ndarray
    ancestors: np.ndarray
    nodes: np.ndarray
    targets: np.ndarray
    order: np.ndarray


class _Tree:
    """A prefix tree that grows by one text at a time."""

    def __init__(self, start):
        self.children = {}  # (node, token) -> node
        self.parents, self.tokens, self.depths = [-1], [start], [0]
        self.paths = []

    def add(self, text):
        """Adds the nodes that predict the tokens of `text`."""
        node, path = 0, []
        for token in text:
            path.append(node)
            node = self.children.get((node, token), -1)
            if node < 0 and len(path) < len(text):
                node = len(self.tokens)
                self.children[path[-1], token] = node
                self.parents.append(path[-1])
                self.tokens.append(token)
                self.depths.append(len(path))
        self.paths.append(path)

    def ancestors(self, size):
        """Bool [size, size], True for the nodes that a node attends to."""
        mask = np.eye(size, dtype=bool)
        for node, parent in enumerate(self.parents[1:], 1):
            mask[node] |= mask[parent]  # Parents come before children.
        return mask


def group_by_prefix(
    labels,
    special_tokens,
    nodes_per_group=NODES_PER_GROUP,
    prompt_lengths=None,
):
    """Arranges texts in prefix trees of about equal size.

    Args:
        labels: int [T, L] token ids, padded.
        special_tokens: The decoder's `SpecialTokens`.
        nodes_per_group: Approximate number of nodes per tree.
        prompt_lengths: int [T], how many first tokens of each text are its
            prompt, which is read and not scored; None for none.

    Returns:
        `PrefixGroups`; equal texts are stored once.
    """
    if prompt_lengths is None:
        prompt_lengths = np.zeros(len(labels), np.int32)
    # Sorting makes texts with a common beginning neighbors.
    both = np.concatenate([labels, prompt_lengths[:, None]], axis=1)
    both, inverse = np.unique(both, axis=0, return_inverse=True)
    labels, prompt_lengths = both[:, :-1], both[:, -1]
    pad, start = special_tokens.pad, special_tokens.start
    lengths = [
        int(np.max(np.flatnonzero(t != pad), initial=-1)) + 1 for t in labels
    ]
    texts = [t[:n].tolist() for t, n in zip(labels, lengths)]
    whole = _Tree(start)
    for text in texts:
        whole.add(text)
    count = -(-len(whole.tokens) // nodes_per_group)
    target = -(-len(whole.tokens) // count)
    trees, places = [_Tree(start)], []
    for text in texts:
        if len(trees[-1].tokens) >= target:
            trees.append(_Tree(start))
        places.append((len(trees) - 1, len(trees[-1].paths)))
        trees[-1].add(text)
    most = max(len(tree.paths) for tree in trees)
    order = np.array([g * most + c for g, c in places], np.int32)
    size = max(len(tree.tokens) for tree in trees)
    nodes = np.zeros((len(trees), most, max(lengths)), np.int32)
    targets = np.full_like(nodes, pad)
    for (g, c), text, first in zip(places, texts, prompt_lengths):
        nodes[g, c, : len(text)] = trees[g].paths[c]
        targets[g, c, first : len(text)] = text[first:]
    return PrefixGroups(
        tokens=_stack([tree.tokens for tree in trees], size),
        depths=_stack([tree.depths for tree in trees], size),
        ancestors=np.stack([tree.ancestors(size) for tree in trees]),
        nodes=nodes,
        targets=targets,
        order=order[inverse.reshape(-1)],
    )


def _stack(rows, size):
    stacked = np.zeros((len(rows), size), np.int32)
    for row, values in zip(stacked, rows):
        row[: len(values)] = values
    return stacked


def score_groups(decoder, memory, groups):
    """Left-to-right log-likelihood of every text for every image.

    Args:
        decoder: `TextDecoder`.
        memory: From `decoder.project_memory`, or None (no image, B = 1).
        groups: `PrefixGroups` of T texts.

    Returns:
        float32 [B, T].
    """
    count, pad = _batch_size(memory), decoder.special_tokens.pad
    kernel, bias = (tf.cast(w, tf.float32) for w in decoder.head_weights)
    columns = tf.transpose(kernel)  # -> [V, D], to gather them as rows

    def one_group(parts):
        tokens, depths, ancestors, nodes, targets = parts
        hidden = decoder(
            tf.repeat(tokens[None], count, axis=0),
            memory,
            positions=depths,
            attention_mask=ancestors[None, None],
        )
        hidden = tf.cast(hidden, tf.float32)  # [B, N, D]
        # The logits of all tokens are needed only for the normalizer.
        sums = cross_entropy.log_normalizers(
            tf.reshape(hidden, [-1, hidden.shape[-1]]), kernel, bias
        )
        sums = tf.reshape(sums, [count, -1])  # -> [B, N]
        flat = tf.reshape(targets, [-1])
        chosen = tf.gather(hidden, tf.reshape(nodes, [-1]), axis=1)
        logits = tf.reduce_sum(chosen * tf.gather(columns, flat), axis=-1)
        logits += tf.gather(bias, flat)  # [B, C * L]
        log_probs = logits - tf.gather(sums, tf.reshape(nodes, [-1]), axis=1)
        log_probs = tf.where(flat != pad, log_probs, 0.0)
        shape = tf.concat([[count], tf.shape(targets)], 0)
        return tf.reduce_sum(tf.reshape(log_probs, shape), -1)  # -> [B, C]

    scores = tf.map_fn(
        one_group,
        (
            groups.tokens,
            groups.depths,
            groups.ancestors,
            groups.nodes,
            groups.targets,
        ),
        fn_output_signature=tf.float32,
        parallel_iterations=1,
    )
    scores = tf.reshape(tf.transpose(scores, [1, 0, 2]), [count, -1])
    return tf.gather(scores, groups.order, axis=1)  # [B, G * C] -> [B, T]


def score_parallel(decoder, memory, labels, prompt_lengths=None):
    """Log-likelihood of texts, all tokens predicted at once.

    Takes one pass over M MASK tokens per image, whatever the number of texts;
    with prompts, which the decoder sees in place of MASK, one per text. The
    score of a text does not depend on the other texts.

    Args:
        decoder: `TextDecoder` with a MASK token.
        memory: From `decoder.project_memory`, or None (no image, B = 1).
        labels: int32 [B, K, L] token ids, padded.
        prompt_lengths: int32 [B, K], how many first tokens of a text are its
            prompt, which is not scored; None for none.

    Returns:
        float32 [B, K].
    """
    if prompt_lengths is not None:
        return _score_after_prompts(decoder, memory, labels, prompt_lengths)
    count, length = _batch_size(memory), tf.shape(labels)[-1]
    special = decoder.special_tokens
    masks = tf.fill([count, decoder.max_length], special.require_mask())
    hidden = decoder(masks, memory, parallel=tf.fill([count], True))
    log_probs = tf.nn.log_softmax(decoder.logits(hidden[:, :length]))
    vocabulary = log_probs.shape[-1]
    places = tf.range(length) * vocabulary + labels
    log_probs = tf.gather(
        tf.reshape(log_probs, [count, -1]), places, batch_dims=1
    )
    real = labels != special.pad
    return tf.reduce_sum(tf.where(real, log_probs, 0.0), axis=-1)


def _score_after_prompts(decoder, memory, labels, prompt_lengths):
    """`score_parallel` with prompts."""
    shape = tf.shape(labels)
    flat = tf.reshape(labels, [-1, shape[2]])  # -> [N, L]
    lengths = tf.reshape(prompt_lengths, [-1])
    count, special = tf.shape(flat)[0], decoder.special_tokens
    masks = tf.fill([count, decoder.max_length], special.require_mask())
    hidden = decoder(
        show_prompts(masks, flat, lengths),
        memory,
        parallel=tf.fill([count], True),
    )
    log_probs = tf.nn.log_softmax(decoder.logits(hidden[:, : shape[2]]))
    log_probs = tf.gather(log_probs, flat, batch_dims=2)
    scored = scored_tokens(flat, lengths, special.pad)
    scores = tf.reduce_sum(tf.where(scored, log_probs, 0.0), axis=-1)
    return tf.reshape(scores, shape[:2])


def show_prompts(tokens, prompts, lengths):
    """Puts prompts in front of tokens, in place of what is there.

    Args:
        tokens: int32 [N, any length].
        prompts: int32 [N, any length], whose first tokens are the prompt.
        lengths: int32 [N], how many.

    Returns:
        Tensor like `tokens`.
    """
    length = tf.shape(tokens)[1]
    missing = tf.maximum(length - tf.shape(prompts)[1], 0)
    prompts = tf.pad(prompts, [[0, 0], [0, missing]])[:, :length]
    in_prompt = tf.range(length)[None] < lengths[:, None]
    return tf.where(in_prompt, prompts, tokens)


def scored_tokens(labels, prompt_lengths, pad):
    """Which tokens of labels [..., L] count: neither padding nor prompt.

    Args:
        labels: int32 [..., L].
        prompt_lengths: int32 [...], or None.
        pad: Id of padding.

    Returns:
        bool [..., L].
    """
    real = labels != pad
    if prompt_lengths is None:
        return real
    return real & (tf.range(tf.shape(labels)[-1]) >= prompt_lengths[..., None])


def cut_padding(labels, pad):
    """Labels [..., L] without the positions that are padding in all texts.

    Labels whose values are unknown at tracing time keep their length.
    """
    # A graph captures a tensor of more than 128 elements without its values,
    # so they are read before that and kept as a constant.
    known = labels
    if tf.is_tensor(labels):
        known = tf.get_static_value(labels)
    if known is None:
        return tf.cast(labels, tf.int32)
    known = np.asarray(known, np.int32)
    real = (known != pad).reshape(-1, known.shape[-1])
    used = np.flatnonzero(real.any(0))
    return tf.constant(known[..., : int(np.max(used, initial=0)) + 1])


def _batch_size(memory):
    return 1 if memory is None else tf.shape(memory[0][0])[0]
