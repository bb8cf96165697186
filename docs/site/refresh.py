"""Makes what the documentation shows: pictures, and the notebook's results.

    python docs/site/refresh.py --model=scenes_mini --run=runs/quickstart

images/scenes.png shows held-out scenes: with --model its captions of them,
otherwise the true ones. images/curve.png shows the losses of --run. With
--model the notebook is run, too, and what it prints is saved in it.
"""

import contextlib
import io
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl import app, flags
from PIL import Image

FLAGS = flags.FLAGS
_DOCS = pathlib.Path(__file__).resolve().parents[1]
_FOLDER = _DOCS / "images"
_NOTEBOOK = _DOCS / "quickstart.ipynb"
_SCENES = 4
_LOSSES = {
    "autoregressive/nll_per_token": "left to right (Cap)",
    "parallel/nll_per_token": "all at once (Pa)",
}


def define_flags():
    """Defines the flags of this program."""
    flags.DEFINE_string("model", None, "Preset or run to caption with.")
    flags.DEFINE_string("run", None, "Run whose losses to show.")


def rows(model):
    """Rows of held-out scenes."""
    from cappa_tf.data.scenes import world
    from cappa_tf.inference.captions import CaptionRow

    scenes = [*world.examples("heldout", _SCENES)]
    if model is None:
        return [
            CaptionRow(x.key, x.captions[0], 0.0, [], [], image=x.image)
            for x in scenes
        ]
    import numpy as np

    import cappa_tf

    predictor = cappa_tf.from_preset(model, batch_size=_SCENES).predictor
    read = predictor.preprocessing.read_bytes
    pixels = np.stack([read(x.image) for x in scenes])
    found = predictor.decoder.decode(pixels, [x.key for x in scenes])
    for row, scene in zip(found, scenes):
        row.image, row.references = scene.image, scene.captions
    return found


def small(path):
    """Reduces a PNG file to 256 colors, so that it is small."""
    image = Image.open(path).convert("RGB").quantize(256, kmeans=2)
    image.save(path, optimize=True)


def draw_curve(run, path):
    """Draws the losses of a run, from its TensorBoard events."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )
    from tensorboard.util import tensor_util

    every = {"tensors": 0}
    events = EventAccumulator(f"{run}/tensorboard", size_guidance=every)
    events.Reload()
    figure, axes = pyplot.subplots(figsize=(6, 3), dpi=110)
    for name, label in _LOSSES.items():
        points = events.Tensors(f"train/{name}")
        values = [tensor_util.make_ndarray(x.tensor_proto) for x in points]
        axes.plot([x.step for x in points], values, label=label)
    axes.set(xlabel="step of 64 images", ylabel="nats per token", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def run_notebook(path=_NOTEBOOK):
    """Runs a notebook's code in this process.

    Args:
        path: The notebook, as JSON.

    Returns:
        (dict of the notebook as it was after the run, dict of its variables).
    """
    notebook, names = json.loads(path.read_text()), {"__name__": "__main__"}
    cells = [x for x in notebook["cells"] if x["cell_type"] == "code"]
    for count, cell in enumerate(cells, 1):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec("".join(cell["source"]), names)
        text = printed.getvalue().splitlines(keepends=True)
        output = {"output_type": "stream", "name": "stdout", "text": text}
        cell |= {"execution_count": count, "outputs": [output] if text else []}
    return notebook, names


def main(argv):
    """Writes the pictures, and the notebook with its results."""
    del argv
    from cappa_tf.evaluation.sheet import write_sheet

    title = "Compositions that training never shows"
    write_sheet(_FOLDER / "scenes.png", rows(FLAGS.model), title)
    small(_FOLDER / "scenes.png")
    if FLAGS.run is not None:
        draw_curve(FLAGS.run, _FOLDER / "curve.png")
        small(_FOLDER / "curve.png")
    if FLAGS.model is not None:
        notebook, _ = run_notebook()
        _NOTEBOOK.write_text(json.dumps(notebook, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    app.run(main)
