"""A worker that runs Hugging Face's transformers in PyTorch.

Models of the same sizes, with random weights.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parent)

import protocol  # noqa: E402


def make(options):
    """What to measure, by the function of the name in `benchmark`."""
    return {"embed": embed, "caption": caption}[options["benchmark"]](options)


def _vit(options, dtype):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=options["hidden_dim"],
        num_hidden_layers=options["num_layers"],
        num_attention_heads=options["num_heads"],
        intermediate_size=options["mlp_dim"],
        patch_size=options["patch_size"],
        image_size=options["image_size"],
    )
    model = transformers.ViTModel(config, add_pooling_layer=False)
    return model.eval().to(dtype), config


def _images(options, dtype):
    import torch

    side = options["image_size"]
    torch.manual_seed(1)
    images = torch.rand(options["batch_size"], 3, side, side) * 2 - 1
    return images.to(dtype)


def embed(options):
    """Mean of the patches of a ViT."""
    import torch

    dtype = getattr(torch, options["dtype"])
    model, _ = _vit(options, dtype)
    images = _images(options, dtype)

    @torch.inference_mode()
    def run():
        patches = model(images).last_hidden_state[:, 1:]
        patches.mean(1).float().numpy()  # With a class token: not comparable.

    return run, {"products": options["dtype"]}


def caption(options):
    """Greedy captions of an encoder and a decoder with cross-attention."""
    import torch
    import transformers

    dtype = getattr(torch, options["dtype"])
    encoder, encoder_config = _vit(options, dtype)
    # With its cache of keys and values, and cross-attention in each block.
    decoder_config = transformers.BertGenerationConfig(
        vocab_size=options["vocabulary_size"],
        hidden_size=options["hidden_dim"],
        num_hidden_layers=options["decoder_layers"],
        num_attention_heads=options["num_heads"],
        intermediate_size=options["mlp_dim"],
        max_position_embeddings=options["length"],
        is_decoder=True,
        add_cross_attention=True,
    )
    decoder = transformers.BertGenerationDecoder(decoder_config)
    model = transformers.VisionEncoderDecoderModel(
        encoder=encoder, decoder=decoder.to(dtype)
    ).eval()
    images = _images(options, dtype)
    tokens = options["tokens"]

    @torch.inference_mode()
    def run():
        found = model.generate(
            images,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            bos_token_id=2,
            decoder_start_token_id=2,
            eos_token_id=1,
            pad_token_id=0,
        )
        if found.shape[1] != tokens + 1:
            raise ValueError(f"{tokens} tokens were asked for: {found.shape}")

    return run, {"products": options["dtype"]}


if __name__ == "__main__":
    protocol.serve(make)
