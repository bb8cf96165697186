"""Requests captions, scores or features of images from a server.

    python tools/serving_client.py photo.jpg folder/
    python tools/serving_client.py --signature=score \
        --text="a dog" --text="a cat" photo.jpg
    python tools/serving_client.py --protocol=rest --address=localhost:8501 \
        --signature=embed --format=jsonl photo.jpg
    python tools/serving_client.py --concurrency=8 --batch_size=4 --repeat=10 \
        folder/

The server must run a model that `tools/export.py --what=saved_model` wrote.
Prints one line per image to stdout; errors, and finally images per second and
the percentiles of a request's latency, go to stderr. gRPC needs the extra
`serving` (`pip install 'cappa-tf[serving]'`); REST needs no extra. The exit
code is 0 if all images were answered, 1 if some were not, 2 if there was
nothing to send.
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
        "model", "captioner", "Name of the model on the server.", **where
    )
    flags.DEFINE_enum(
        "signature",
        "caption",
        ["caption", "score", "embed"],
        "Signature of the model to call.",
        **where,
    )
    flags.DEFINE_multi_string(
        "text", [], "Text to score; repeatable. Only for score.", **where
    )
    flags.DEFINE_string(
        "texts_file",
        None,
        "File of texts to score, one per line. Only for score.",
        **where,
    )
    flags.DEFINE_integer(
        "batch_size", 1, "Images per request.", lower_bound=1, **where
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


def ask(client, signature, paths, texts):
    """Reads files and sends them in one request.

    Args:
        client: `RestClient` or `GrpcClient`.
        signature: Name of the signature.
        paths: Image files.
        texts: List of strings, for score.

    Returns:
        rows: A dict for each file: `image` (the path) and either `error` or
            the answer (`caption` and `log_likelihood`; `scores`, a dict from
            text to log-likelihood; or `embedding`).
        seconds: Duration of the request; None if no file could be read.
    """
    # TensorFlow takes seconds to load, and is needed only with valid flags.
    from cappa_tf.data.images import image_files

    rows, contents = {}, {}  # by position in `paths`
    for i, path in enumerate(paths):
        try:
            # Rotated and converted as in tools/caption.py.
            contents[i] = image_files.read(path)
        except image_files.UnusableError as error:
            rows[i] = {"error": error.reason}
    seconds = None
    if contents:
        inputs = {"image_bytes": [*contents.values()]}
        if signature == "score":
            inputs["texts"] = [texts] * len(contents)
        start = time.perf_counter()
        answers = _answers(client, signature, inputs, texts)
        seconds = time.perf_counter() - start
        rows |= dict(zip(contents, answers))
    return [{"image": path, **rows[i]} for i, path in enumerate(paths)], seconds


def _answers(client, signature, inputs, texts):
    """A dict for each image of a request."""
    count = len(inputs["image_bytes"])
    try:
        outputs = client.predict(signature, inputs)
        return [_row(signature, outputs, i, texts) for i in range(count)]
    except serving_clients.RequestFailedError as error:
        message = str(error)
    except (KeyError, IndexError, TypeError) as error:
        message = f"the answer does not fit signature {signature}: {error!r}"
    return [{"error": message}] * count


def _row(signature, outputs, i, texts):
    if not outputs["ok"][i]:
        return {"error": _text(outputs["error"][i])}
    if signature == "embed":
        return {"embedding": [float(x) for x in outputs["embedding"][i]]}
    likelihood = outputs["log_likelihood"][i]
    if signature == "score":
        # A server that batches may have padded columns on the right.
        numbers = [float(likelihood[j]) for j in range(len(texts))]
        return {"scores": dict(zip(texts, numbers))}
    return {
        "caption": _text(outputs["caption"][i]),
        "log_likelihood": float(likelihood),
    }


def _text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def send_all(client, options, paths, texts):
    """Sends all files, with several requests in parallel.

    Args:
        client: `RestClient` or `GrpcClient`.
        options: The parsed flags.
        paths: Image files.
        texts: List of strings, for score.

    Yields:
        (rows, seconds) of each request, as `ask` returns them, in order.
    """
    size = options.batch_size
    batches = [paths[i : i + size] for i in range(0, len(paths), size)]
    pool = concurrent.futures.ThreadPoolExecutor(options.concurrency)
    try:
        yield from pool.map(
            lambda batch: ask(client, options.signature, batch, texts),
            batches * options.repeat,
        )
    finally:
        # The rest may not be needed, as with `| head`.
        pool.shutdown(cancel_futures=True)


def summary(latencies, images, failed, seconds):
    """The last line: throughput and latency."""
    import numpy as np

    milliseconds = 1e3 * np.percentile(latencies, [50, 90, 99, 100])
    names = ("p50", "p90", "p99", "max")
    percentiles = "  ".join(
        f"{name} {value:.0f}" for name, value in zip(names, milliseconds)
    )
    return (
        f"{images} images in {len(latencies)} requests, {failed} failed; "
        f"{images / seconds:.1f} images/s; latency in ms: {percentiles}"
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
    if (options.signature == "score") != bool(texts):
        raise SystemExit(
            "--text and --texts_file are for --signature=score, which needs "
            f"at least one. Received: --signature={options.signature}, "
            f"{len(texts)} texts"
        )
    return list(dict.fromkeys(texts))  # The answer has each text once.


def _print(row, table):
    if "error" in row:
        print(f"{row['image']}: {row['error']}", file=sys.stderr)
    if not table:
        print(console.json_line(row))
    elif "caption" in row:
        print(f"{row['log_likelihood']:9.3f}  {row['image']}  {row['caption']}")
    elif "scores" in row:
        best_first = sorted(row["scores"].items(), key=lambda x: -x[1])
        for text, score in best_first:
            print(f"{score:9.3f}  {row['image']}  {text}")


def main(argv):
    """Sends the images and prints the answers."""
    with console.errors_as_lines("serving_client"):
        return _send_and_print(flags.FLAGS, argv[1:])


def _send_and_print(options, arguments):
    """Sends the images in the arguments; returns the exit code."""
    texts = _texts(options)
    table = options.format == "table"
    if table and options.signature == "embed":
        raise SystemExit("--signature=embed needs --format=jsonl")
    from cappa_tf.data.images import image_files

    paths = image_files.find_pictures(arguments)
    if not paths:
        print("Nothing to send: give images or folders.", file=sys.stderr)
        return 2
    address = options.address or f"localhost:{PORTS[options.protocol]}"
    try:
        client = serving_clients.CLIENTS[options.protocol](
            address, options.model, options.timeout
        )
        client.connect()
    except serving_clients.NoServerError as error:
        raise SystemExit(f"--address={address}: {error}") from None
    latencies, wrong, seen, start = [], 0, 0, time.perf_counter()
    for rows, seconds in send_all(client, options, paths, texts):
        if seconds is not None:
            latencies.append(seconds)
        wrong += sum("error" in row for row in rows)
        if seen < len(paths):
            for row in rows:
                _print(row, table)
        seen += len(rows)
    if latencies:
        passed = time.perf_counter() - start
        print(summary(latencies, seen, wrong, passed), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    console.run(main, define_flags)
