"""Requests captions, scores, labels or embeddings from a server.

    python tools/serving_client.py photo.jpg folder/
    python tools/serving_client.py --signature=score \
        --text="a dog" --text="a cat" photo.jpg
    python tools/serving_client.py --protocol=rest --address=localhost:8501 \
        --signature=embed --format=jsonl photo.jpg
    python tools/serving_client.py --signature=zero_shot \
        --text="a photo of a dog" --text="a photo of a cat" photo.jpg
    python tools/serving_client.py --signature=embed_text --format=jsonl \
        --texts_file=captions.txt
    python tools/serving_client.py --prompt="answer: what color is the car" \
        photo.jpg
    python tools/serving_client.py --concurrency=8 --batch_size=4 --repeat=10 \
        folder/

The server must run a model that `tools/export.py --what=saved_model` wrote:
caption, score and embed are signatures of a captioner, embed_image, embed_text
and zero_shot of a contrastive model. Prints one line per image (per text for
embed_text) to stdout; errors, and finally images per second and the percentiles
of a request's latency, go to stderr. gRPC needs the extra `serving` (`pip
install 'cappa-tf[serving]'`); REST needs no extra. The exit code is 0 if all
images were answered, 1 if some were not, 2 if there was nothing to send.
"""

import concurrent.futures
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags

from cappa_tf.export import serving_clients
from cappa_tf.utils import console

PORTS = {"grpc": 8500, "rest": 8501}
# Signatures, and what the server calls their model by default.
SIGNATURES = {
    "caption": "captioner",
    "score": "captioner",
    "embed": "captioner",
    "embed_image": "contrastive",
    "embed_text": "contrastive",
    "zero_shot": "contrastive",
}
TEXT_SIGNATURES = ("score", "zero_shot", "embed_text")
PROMPTED = ("caption", "score")


def define_flags(flag_values=flags.FLAGS):
    """Defines the flags of this tool."""
    where = {"flag_values": flag_values}
    flags.DEFINE_string(
        "address",
        None,
        "HOST:PORT of the server; localhost:8500 (gRPC) or localhost:8501 "
        "(REST) by default.",
        **where,
    )
    flags.DEFINE_enum("protocol", "grpc", [*PORTS], "Protocol.", **where)
    flags.DEFINE_string(
        "model",
        None,
        "Name of the model on the server; by default captioner or contrastive, "
        "depending on the signature.",
        **where,
    )
    flags.DEFINE_enum(
        "signature",
        "caption",
        [*SIGNATURES],
        "Signature of the model to call.",
        **where,
    )
    flags.DEFINE_multi_string(
        "text",
        [],
        "Text to score or embed, or a label; repeatable. Only for score, "
        "zero_shot and embed_text.",
        **where,
    )
    flags.DEFINE_string(
        "texts_file",
        None,
        "File of such texts, one per line.",
        **where,
    )
    flags.DEFINE_string(
        "prompt",
        None,
        "What the caption of each image (the texts, for score) answers; for a "
        "model that was trained with prompts.",
        **where,
    )
    flags.DEFINE_integer(
        "batch_size",
        1,
        "Images (for embed_text: texts) per request.",
        lower_bound=1,
        **where,
    )
    flags.DEFINE_integer(
        "concurrency", 1, "Parallel requests.", lower_bound=1, **where
    )
    flags.DEFINE_integer(
        "repeat",
        1,
        "Number of times to send everything, for a load test; answers are "
        "printed once.",
        lower_bound=1,
        **where,
    )
    flags.DEFINE_float(
        "timeout", 60.0, "Timeout of a request in seconds.", 0.001, **where
    )
    flags.DEFINE_enum(
        "format",
        "table",
        ["table", "jsonl"],
        "Output format; features are only written as jsonl.",
        **where,
    )


def ask(client, signature, items, texts, prompt=None):
    """Sends images, after reading them, or texts in one request.

    Args:
        client: `RestClient` or `GrpcClient`.
        signature: Name of the signature.
        items: Image files; for embed_text, texts.
        texts: List of strings, for score and zero_shot.
        prompt: String, for caption and score of a model that takes one.

    Returns:
        rows: A dict for each item: `image` (the path) or `text`, and either
            `error` or the answer (`caption` and `log_likelihood`; `scores`, a
            dict from text to log-likelihood or score; or `embedding`).
        seconds: Duration of the request; None if no file could be read.
    """
    rows, contents = {}, {}  # by position in `items`
    name = "image"
    if signature == "embed_text":
        name, contents = "text", dict(enumerate(items))
    else:
        _read(items, contents, rows)
    seconds = None
    if contents:
        key = "texts" if name == "text" else "image_bytes"
        inputs = {key: [*contents.values()]}
        if signature in ("score", "zero_shot"):
            inputs["texts"] = [texts] * len(contents)
        if prompt is not None:
            inputs["prompt"] = [prompt] * len(contents)
        start = time.perf_counter()
        answers = serving_clients.ask(client, signature, inputs, texts)
        seconds = time.perf_counter() - start
        rows |= dict(zip(contents, answers))
    return [{name: item, **rows[i]} for i, item in enumerate(items)], seconds


def _read(paths, contents, rows):
    """Reads files into `contents`; what cannot be read gets a row."""
    # TensorFlow takes seconds to load, and is needed only with valid flags.
    from cappa_tf.data.images import image_files

    for i, path in enumerate(paths):
        try:
            # Rotated and converted as in tools/caption.py.
            contents[i] = image_files.read(path)
        except image_files.UnusableError as error:
            rows[i] = {"error": error.reason}


def send_all(client, options, items, texts):
    """Sends all files or texts, with several requests in parallel.

    Args:
        client: `RestClient` or `GrpcClient`.
        options: The parsed flags.
        items: As of `ask`.
        texts: As of `ask`.

    Yields:
        (rows, seconds) of each request, as `ask` returns them, in order.
    """
    size = options.batch_size
    batches = [items[i : i + size] for i in range(0, len(items), size)]
    pool = concurrent.futures.ThreadPoolExecutor(options.concurrency)
    try:
        yield from pool.map(
            lambda batch: ask(
                client, options.signature, batch, texts, options.prompt
            ),
            batches * options.repeat,
        )
    finally:
        # The rest may not be needed, as with `| head`.
        pool.shutdown(cancel_futures=True)


def summary(latencies, count, kind, failed, seconds):
    """The last line: throughput and latency, of images or texts."""
    import numpy as np

    milliseconds = 1e3 * np.percentile(latencies, [50, 90, 99, 100])
    names = ("p50", "p90", "p99", "max")
    percentiles = "  ".join(
        f"{name} {value:.0f}" for name, value in zip(names, milliseconds)
    )
    return (
        f"{count} {kind} in {len(latencies)} requests, {failed} failed; "
        f"{count / seconds:.1f} {kind}/s; latency in ms: {percentiles}"
    )


def _texts(options):
    texts = [*options.text]
    if options.texts_file is not None:
        try:
            lines = pathlib.Path(options.texts_file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(
                f"--texts_file={options.texts_file}: {error}"
            ) from None
        texts += [line for line in lines.splitlines() if line.strip()]
    if (options.signature in TEXT_SIGNATURES) != bool(texts):
        raise SystemExit(
            "--text and --texts_file are for --signature="
            f"{', '.join(TEXT_SIGNATURES)}, which needs at least one. "
            f"Received: --signature={options.signature}, {len(texts)} texts"
        )
    return list(dict.fromkeys(texts))  # The answer has each text once.


def _print(row, table):
    if "error" in row:
        item = row.get("image", row.get("text"))
        print(f"{item}: {row['error']}", file=sys.stderr)
    if not table:
        print(console.json_line(row))
    elif "caption" in row:
        print(f"{row['log_likelihood']:9.3f}  {row['image']}  {row['caption']}")
    elif "scores" in row:
        best_first = sorted(row["scores"].items(), key=lambda x: -x[1])
        for text, score in best_first:
            # Probabilities may be small, log-likelihoods are below zero.
            number = f"{score:9.3g}" if score >= 0 else f"{score:9.3f}"
            print(f"{number}  {row['image']}  {text}")


def main(argv):
    """Sends the images and prints the answers."""
    with console.errors_as_lines("serving_client"):
        return _send_and_print(flags.FLAGS, argv[1:])


def _send_and_print(options, arguments):
    """Sends the images in the arguments, or texts; returns the exit code."""
    texts = _texts(options)
    if options.prompt is not None and options.signature not in PROMPTED:
        raise SystemExit(
            f"--prompt is for --signature={', '.join(PROMPTED)}. Received: "
            f"--signature={options.signature}"
        )
    table = options.format == "table"
    if table and options.signature.startswith("embed"):
        raise SystemExit(
            f"--signature={options.signature} needs --format=jsonl"
        )
    if options.signature == "embed_text":
        items, kind = texts, "texts"
        if arguments:
            raise SystemExit(
                "--signature=embed_text takes no images. "
                f"Received: {' '.join(arguments)}"
            )
    else:
        from cappa_tf.data.images import image_files

        items, kind = image_files.find_pictures(arguments), "images"
    if not items:
        print("Nothing to send: give images or folders.", file=sys.stderr)
        return 2
    address = options.address or f"localhost:{PORTS[options.protocol]}"
    try:
        client = serving_clients.CLIENTS[options.protocol](
            address,
            options.model or SIGNATURES[options.signature],
            options.timeout,
        )
        client.connect()
    except serving_clients.NoServerError as error:
        raise SystemExit(f"--address={address}: {error}") from None
    latencies, wrong, seen, start = [], 0, 0, time.perf_counter()
    for rows, seconds in send_all(client, options, items, texts):
        if seconds is not None:
            latencies.append(seconds)
        wrong += sum("error" in row for row in rows)
        if seen < len(items):
            for row in rows:
                _print(row, table)
        seen += len(rows)
    if latencies:
        passed = time.perf_counter() - start
        print(summary(latencies, seen, kind, wrong, passed), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    console.run(main, define_flags)
