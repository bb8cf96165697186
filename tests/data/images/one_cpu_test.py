"""Images in a process with one CPU, where TensorFlow has a single thread."""

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import io, os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np
import tensorflow as tf
from PIL import Image
from cappa_tf.data.images import image_files
from cappa_tf.data.preprocessing import ImagePreprocessing

preprocessing = ImagePreprocessing((8, 8))
for kind in ("GIF", "BMP", "WebP", "PNG"):
    file = io.BytesIO()
    Image.new("RGB", (9, 12), (255, 0, 0)).save(file, kind)
    file = file.getvalue()
    assert preprocessing.read_bytes(file).shape == (8, 8, 3)

    def checked(content):
        return image_files.why_unusable(content[:40]).encode()

    reasons = tf.data.Dataset.from_tensors(file).map(
        lambda x: tf.numpy_function(checked, [x], tf.string)
    )
    print(kind, next(iter(reasons)).numpy().decode())
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="CPUs are chosen on Linux only"
)
def test_python_in_a_graph_waits_for_no_other_thread():
    """Its graph functions had waited for the thread that Python held."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{kind} image cannot be decoded"
        for kind in ("GIF", "BMP", "WebP", "PNG")
    ]
