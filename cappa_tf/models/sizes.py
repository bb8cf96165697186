"""Sizes of vision transformers, by their names in the literature."""

# hidden_dim, num_layers, num_heads, mlp_dim.
# Reference: "Scaling Vision Transformers" (arXiv 2106.04560), table 2;
# So400m: "Getting ViT in Shape" (arXiv 2305.13035).
_SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "M": (512, 12, 8, 2048),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
}


def variant(name):
    """Returns the sizes of a variant such as "B/16".

    Args:
        name: "SIZE/PATCH" with SIZE one of Ti, S, M, B, L, So400m and PATCH
            the side of a patch in pixels.

    Returns:
        Dict of `hidden_dim`, `num_layers`, `num_heads`, `mlp_dim` and
        `patch_size`, the arguments of `VisionEncoder`.

    Raises:
        ValueError: If the name is not of that form.
    """
    size, _, patch = str(name).partition("/")
    if size not in _SIZES or not patch.isdigit() or int(patch) < 1:
        raise ValueError(
            'A variant must be "SIZE/PATCH" with SIZE one of '
            f"{', '.join(_SIZES)}. Received: {name!r}"
        )
    keys = ("hidden_dim", "num_layers", "num_heads", "mlp_dim")
    return dict(zip(keys, _SIZES[size], strict=True), patch_size=int(patch))
