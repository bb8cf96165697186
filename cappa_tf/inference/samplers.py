"""Samplers by name, with the options that each of them takes.

Importing this module does not load TensorFlow, so that a tool can list them.
"""

from cappa_tf.utils.arguments import check_choice

# Name -> the options that it uses. The seed is an option of `generate`.
OPTIONS = {
    "greedy": (),
    "random": ("temperature",),
    "top_k": ("top_k", "temperature"),
    "top_p": ("top_p", "top_k", "temperature"),
    "beam": ("beams", "length_penalty"),
}
# Those whose captions depend on a seed.
RANDOM = ("random", "top_k", "top_p")


def make_sampler(name, **options):
    """Makes a sampler for `Captioner.generate`.

    Args:
        name: "greedy", "random", "top_k", "top_p" or "beam".
        **options: Some of those that it uses, see `OPTIONS`; by default a
            temperature of 1, the 5 best tokens (top_k), a total probability
            of 0.9 (top_p), 4 beams and a length penalty of 0.6.

    Returns:
        A sampler, or None for greedy.

    Raises:
        ValueError: If the name is unknown, it does not use an option, or a
            value is wrong.
    """
    check_choice(OPTIONS, sampler=name)
    vain = sorted(options.keys() - set(OPTIONS[name]))
    if vain:
        raise ValueError(
            f"sampler={name} uses {list(OPTIONS[name])}. Received: {vain}"
        )
    if name == "greedy":
        return None
    from cappa_tf.models import sampling

    if name == "beam":
        return sampling.BeamSearch(
            options.get("beams", 4), options.get("length_penalty", 0.6)
        )
    return sampling.RandomSearch(
        options.get("temperature", 1.0),
        options.get("top_k", 5 if name == "top_k" else None),
        options.get("top_p", 0.9) if name == "top_p" else 1.0,
    )
