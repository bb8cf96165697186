"""Shows what a trained model says about images, on a page of this machine.

    python tools/demo.py --checkpoint=runs/flickr8k
    python tools/demo.py --preset=scenes_mini --scenes
    python tools/demo.py --server=localhost:8501

Open the address that it prints in a browser and drop images on the page: it
shows captions with the probability of every word and where the model looked
for it, and ranks labels that you type. Captions can be greedy, of a beam search
or sampled; a model that was trained with prompts is asked for one. A model
behind TensorFlow Serving (tools/export.py --what=saved_model) gives what its
signatures give. Only browsers on this machine can reach the page, unless --host
says otherwise, and the page asks no other machine for anything. Ctrl-C ends it.
"""

import contextlib
import pathlib
import signal
import sys
import tempfile
import threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

from cappa_tf.utils import console

FLAGS = flags.FLAGS

_MODELS = ("checkpoint", "preset", "server")
# What a server calls its models by default.
_SERVED = ("captioner", "contrastive")
_SCENES, _SCENE_PIXELS = 8, 96


def define_flags():
    """Defines the flags of this tool."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Folder of a run, or any other model that can be opened.",
    )
    flags.DEFINE_string(
        "preset",
        None,
        "A preset in place of a checkpoint: scenes_mini, which comes with this "
        "program, hf://user/name, or a folder.",
    )
    flags.DEFINE_enum(
        "weights",
        "auto",
        ["auto", "final", "best", "latest"],
        "Weights of the run: at its end, best by validation, those of the "
        "newest checkpoint, or the first of these that exists.",
    )
    flags.DEFINE_string(
        "server",
        None,
        "HOST:PORT of a TensorFlow Serving in place of a checkpoint.",
    )
    flags.DEFINE_enum(
        "protocol",
        "rest",
        ["rest", "grpc"],
        "Protocol of the server; gRPC needs the extra `serving`.",
    )
    flags.DEFINE_string(
        "model",
        None,
        "Name of the model on the server; by default captioner, or else "
        "contrastive.",
    )
    flags.DEFINE_float(
        "timeout",
        60.0,
        "Timeout of a request to the server in seconds.",
        lower_bound=0.001,
    )
    flags.DEFINE_integer(
        "port",
        8808,
        "Port of the page; 0 for any that is free.",
        lower_bound=0,
        upper_bound=65535,
    )
    flags.DEFINE_string(
        "host",
        "127.0.0.1",
        "Address to listen at. 0.0.0.0 lets other machines use the page, "
        "without encryption and without a password.",
    )
    flags.DEFINE_float(
        "max_megabytes",
        20.0,
        "Maximum size of an image file.",
        lower_bound=0.001,
    )
    flags.DEFINE_bool(
        "scenes",
        False,
        "Offers a few rendered scenes on the page, of which scenes_mini was "
        "trained to caption others.",
    )
    flags.DEFINE_integer(
        "batch_size",
        8,
        "Images that the model takes at a time, if that many are waiting.",
        lower_bound=1,
    )


def main(argv):
    """Loads the model and serves the page until Ctrl-C."""
    with console.errors_as_lines("demo"):
        if argv[1:]:
            raise app.UsageError(
                f"Images are dropped on the page. Received: {argv[1:]}"
            )
        given = [x for x in _MODELS if FLAGS[x].value is not None]
        if len(given) != 1:
            raise app.UsageError(
                "Give one of --checkpoint, --preset and --server."
            )
        return _serve(given[0])


def _serve(flag):
    # TensorFlow takes seconds to load, and --help does not need it.
    from cappa_tf.demo.server import DemoServer

    with console.naming("port", FLAGS.port):
        server = DemoServer(
            FLAGS.port,
            FLAGS.host,
            int(1e6 * FLAGS.max_megabytes),
            _scenes() if FLAGS.scenes else (),
        )
    # Where Ctrl-C is not at hand.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with console.naming(flag, FLAGS[flag].value):
            server.answers = _answers(flag)
        threading.Thread(target=_warm_up, args=(server,), daemon=True).start()
        print(f"{server.url} shows {server.about()['name']}; Ctrl-C ends it")
        sys.stdout.flush()
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopping", file=sys.stderr)
    finally:
        server.stop()
    return 0


def _scenes():
    """Paths of rendered scenes, of compositions that no training shows."""
    from cappa_tf.data.scenes import world

    folder = tempfile.mkdtemp(prefix="cappa_demo_")
    return world.write_pictures(folder, _SCENES, _SCENE_PIXELS)


def _answers(flag):
    """The answers of the model that a flag names."""
    from cappa_tf import presets
    from cappa_tf.demo.answers import ModelAnswers, ServedAnswers

    if flag == "server":
        return ServedAnswers(*_connect())
    path = FLAGS[flag].value
    pretrained = presets.from_preset(
        path, FLAGS.weights, batch_size=FLAGS.batch_size
    )
    return ModelAnswers(pretrained, path)


def _connect():
    """A client of the server, and what the page calls its model."""
    from cappa_tf.export import serving_clients

    names = _SERVED if FLAGS.model is None else (FLAGS.model,)
    failures = []
    for name in names:
        client = serving_clients.CLIENTS[FLAGS.protocol](
            FLAGS.server, name, FLAGS.timeout
        )
        try:
            client.connect()
            client.signatures()
        except serving_clients.NoServerError as error:
            failures.append(str(error))
        else:
            return client, f"{name} at {FLAGS.server}"
    raise ValueError("; ".join(failures))


def _warm_up(server):
    """Captions once while the first image is being chosen."""
    from cappa_tf.demo.batches import BusyError

    with contextlib.suppress(BusyError):  # It is being stopped.
        server.answers.warm_up()


if __name__ == "__main__":
    console.run(main, define_flags)
