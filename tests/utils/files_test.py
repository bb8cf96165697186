"""Files are written atomically, on disk and in a bucket.

`ram://` is TensorFlow's own file system in memory, which Python's `os` and
`open` cannot reach.
"""

import json
import os
import subprocess
import sys
import uuid

import pytest
import tensorflow as tf

from cappa_tf.utils import files


@pytest.fixture(params=["disk", "not UTF-8", "ram"])
def place(request, tmp_path):
    """An existing folder, as a string."""
    if request.param == "ram":
        path = f"ram://{uuid.uuid4().hex}/folder"
    else:
        path = os.path.join(str(tmp_path), "folder")
    if request.param == "not UTF-8":
        path += os.fsdecode(b"\xff")
    files.makedirs(path)
    return path


def test_a_file_is_written_replaced_and_read(place):
    path = os.path.join(place, "new", "folder", "file.json")
    assert not files.exists(path)
    files.write_text(path, "old, and longer")
    files.write_json(path, {"ä": [1, None]})
    assert files.read_bytes(path) == (
        b'{\n  "\\u00e4": [\n    1,\n    null\n  ]\n}\n'
    )
    assert json.loads(files.read_text(path)) == {"ä": [1, None]}
    folder = os.path.dirname(path)
    assert files.listdir(folder, unfinished=True) == ["file.json"]
    assert files.isfile(path) and not files.isdir(path)
    assert files.isdir(folder) and not files.isfile(folder)
    assert files.listdir(os.path.dirname(folder), unfinished=True) == ["folder"]
    files.write_bytes(path, b"a\r\nb\rc\n")
    assert files.read_text(path) == "a\nb\nc\n"
    files.rename(path, os.path.join(folder, "other"))
    files.remove(os.path.join(folder, "other"))
    assert files.listdir(folder, unfinished=True) == []
    files.rmtree(folder)
    assert not files.isdir(folder)


def test_a_failure_leaves_the_old_file_and_nothing_else(place):
    path = os.path.join(place, "file.txt")
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as unfinished:
        with open(unfinished, "w") as file:
            file.write("ha")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, float("nan"))
    assert files.read_text(path) == "old"
    assert files.listdir(place, unfinished=True) == ["file.txt"]


def test_a_writer_to_disks_reaches_any_file_system(place):
    path = os.path.join(place, "model.keras")
    with files.replacing(path) as unfinished:
        assert unfinished.endswith(".keras") and not files.is_remote(unfinished)
        with open(unfinished, "wb") as file:
            file.write(b"model")
        assert not files.exists(path)
    assert files.read_bytes(path) == b"model"
    assert files.listdir(place, unfinished=True) == ["model.keras"]


def test_a_file_right_below_the_root_of_a_file_system():
    path = f"ram://{uuid.uuid4().hex}.txt"
    files.write_text(path, "here")
    assert files.read_text(path) == "here"
    assert not os.path.exists("ram:")


def test_a_new_folder_without_a_file_goes_again(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    with pytest.raises(KeyError), files.replacing(path):
        raise KeyError
    with pytest.raises(FileNotFoundError), files.replacing(path):
        pass  # Nothing was written.
    assert os.listdir(tmp_path) == []


def test_others_may_read_what_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_folder_is_written_whole(place):
    path = os.path.join(place, "model.d")

    def write(folder):
        os.makedirs(os.path.join(folder, "variables"))
        for name in ("graph", "variables/data"):
            with open(os.path.join(folder, name), "w") as file:
                file.write(name)

    with pytest.raises(KeyError), files.replacing_folder(path) as unfinished:
        write(unfinished)
        raise KeyError
    assert files.listdir(place, unfinished=True) == []
    with files.replacing_folder(path) as unfinished:
        write(unfinished)
        assert not files.exists(path)
    assert files.listdir(place, unfinished=True) == ["model.d"]
    assert files.read_text(os.path.join(path, "graph")) == "graph"
    below = os.path.join(path, "variables", "data")
    assert files.read_text(below) == "variables/data"


def test_of_a_remote_folder_the_last_file_comes_last(monkeypatch):
    path = f"ram://{uuid.uuid4().hex}/model"
    real, copied = tf.io.gfile.copy, []

    def copy(source, target, overwrite=False):
        copied.append(os.path.basename(target))
        if len(copied) == 4:  # Of the second attempt.
            raise tf.errors.ResourceExhaustedError(None, None, "no quota")
        real(source, target, overwrite)

    monkeypatch.setattr(tf.io.gfile, "copy", copy)

    def attempt():
        with files.replacing_folder(path, last=("a",)) as unfinished:
            os.mkdir(unfinished)
            for name in "abc":
                with open(os.path.join(unfinished, name), "w"):
                    pass

    attempt()
    assert copied == ["b", "c", "a"]
    files.rmtree(path)
    with pytest.raises(OSError, match="no quota"):
        attempt()
    assert not files.exists(f"{path}/b")


def test_errors_are_those_of_a_disk(place):
    absent = os.path.join(place, "absent")
    for function in (files.read_bytes, files.remove, files.listdir):
        with pytest.raises(FileNotFoundError, match="absent"):
            function(absent)


def test_a_file_system_that_nobody_knows():
    # As s3:// is without the plug-in tensorflow-io.
    for function in (files.exists, files.makedirs, files.read_bytes):
        with pytest.raises(OSError, match="'none' not implemented"):
            function("none://bucket/folder")
    rule = "--output must be in a folder that can be written to. Received: --ou"
    with pytest.raises(ValueError, match=rule):
        files.check_output("output", "none://folder/file")


def test_an_output_is_checked_before_the_work(place):
    files.check_output("output", os.path.join(place, "file"))
    files.check_output("output", os.path.join(place, "new"), is_folder=True)
    file = os.path.join(place, "there")
    files.write_text(file, "")
    with pytest.raises(ValueError, match="--output must be a file.*a folder$"):
        files.check_output("output", place)
    with pytest.raises(ValueError, match="--output must be a folder.*a file$"):
        files.check_output("output", file, is_folder=True)


def test_a_folder_in_which_files_cannot_be_replaced(monkeypatch):
    def rename(source, target, overwrite=False):
        raise tf.errors.UnimplementedError(None, None, "rename")

    path = f"ram://{uuid.uuid4().hex}/folder"
    files.check_folder(path)
    for name, double, reason in (
        ("rename", rename, "rename"),
        # Through a proxy that answers from its memory.
        ("listdir", lambda path: [], "does not have its new content"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(tf.io.gfile, name, double)
            with pytest.raises(OSError, match=reason):
                files.check_folder(path)
        assert files.listdir(path, unfinished=True) == []


def test_what_a_killed_process_left_goes(place):
    mine = files.temporary_name(os.path.join(place, "file"))
    theirs = mine.replace(f"-{os.getpid()}-", "-999999999-")
    for path in (mine, theirs, os.path.join(f"{theirs}-folder", "file")):
        files.write_text(path, "half")
    files.remove_abandoned(place)
    assert files.listdir(place, unfinished=True) == [os.path.basename(mine)]


def test_a_folder_is_listed_without_what_is_being_written(place):
    path = os.path.join(place, "done.json")
    files.write_json(path, 1)
    with files.replacing(path) as unfinished:
        with open(unfinished, "w") as file:
            file.write("ha")
        files.write_text(files.temporary_name(path), "half")
        assert files.listdir(place) == ["done.json"]
        assert len(files.listdir(place, unfinished=True)) > 1


def test_a_file_grows_by_lines(place):
    path = os.path.join(place, "log")
    first = files.LineFile(path, period=0.0)
    first.append("a")
    assert files.read_text(path) == "a\n"
    first.append("ä")
    first.close()
    # Another process, whose lines come too fast for the bucket.
    second = files.LineFile(path, period=1e6)
    for line in "bcd":
        second.append(line)
    kept = files.read_text(path)
    assert kept == "a\nä\nb\n" + ("" if files.is_remote(path) else "c\nd\n")
    second.close()
    second.append("e")
    second.close()
    assert files.read_text(path) == "a\nä\nb\nc\nd\ne\n"


def test_files_on_disk_need_no_tensorflow(tmp_path):
    program = (
        "import sys\n"
        "from cappa_tf.utils import files\n"
        "files.write_json(sys.argv[1], 1)\n"
        "files.check_output('output', sys.argv[1])\n"
        "files.LineFile(sys.argv[1]).append('x')\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    path = tmp_path / "file"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert path.read_text() == "1\nx\n"
