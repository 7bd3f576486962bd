"""Inputs as users' machines have them: the right value, or one line that names the cause."""

import contextlib
import errno
import importlib
import os
import re
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import evaluate, read_json, same_bits, train_quietly, write_images
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import ood_data
import ood_utils
import test as evaluation
import train
from ood_data import build_ood_loader, decode, read_closed_set
from ood_utils import InputError

# Images and folders ---------------------------------------------------------------------


def halves(mode, left, right):
    image = Image.new(mode, (32, 32), right)
    image.paste(left, (0, 0, 16, 32))
    return image


CLEAR = halves("RGBA", (0, 0, 0, 0), (0, 0, 0, 255))  # black is hidden under it
TURNED = Image.Exif()
TURNED[0x0112] = 6  # the left half of the file is the top of the picture


@pytest.mark.parametrize("image,options,expected", [
    (halves("L", 80, 7), {"exif": TURNED}, halves("L", 80, 7).rotate(-90)),
    (CLEAR, {}, halves("L", 255, 0)),
    (CLEAR.convert("LA"), {}, halves("L", 255, 0)),
    (CLEAR.quantize(2), {}, halves("L", 255, 0)),
    (halves("RGB", (1, 1, 1), 0), {"transparency": (1, 1, 1)}, halves("L", 255, 0)),
])  # fmt: skip
def test_pictures_are_read_as_viewers_show_them(image, options, expected, tmp_path):
    image.save(tmp_path / "a.png", **options)
    assert torch.equal(decode(tmp_path / "a.png"), pil_to_tensor(expected.convert("RGB")))


def test_pixels_of_more_than_8_bits_are_refused(tmp_path):
    for mode in ("I;16", "I", "F"):
        Image.new(mode, (32, 32)).save(tmp_path / "a.tiff")
        with pytest.raises(InputError, match=f"a.tiff .*mode {mode}, save it with 8 bits"):
            decode(tmp_path / "a.tiff")


def test_unreadable_images_are_counted_and_three_are_named(class_folder):
    for name in "abcd":
        (class_folder / f"train/cat/{name}.png").write_bytes(b"no picture")
    names = ", ".join(f"[^,]*cat/{name}.png is not a readable image [^,]*" for name in "abc")
    with pytest.raises(InputError, match=f"^Fix or remove 4 files: {names}$"):
        read_closed_set(class_folder)


def test_a_lack_of_memory_is_not_the_images_fault(class_folder, monkeypatch):
    monkeypatch.setattr(ood_data.TF, "resize", mock.Mock(side_effect=MemoryError))
    with pytest.raises(OSError, match="No memory is left for .*000.png"):
        read_closed_set(class_folder)


def clutter(folder):
    """What machines leave in folders of images."""
    write_images(folder / ".ipynb_checkpoints", 1)
    (folder / "album.jpg").mkdir()
    for name in ("._000.png", "notes.txt", "moving.gif"):
        (folder / name).touch()
    os.mkfifo(folder / "pipe.png")  # would be waited for


def test_entries_that_are_no_images_are_passed_over(class_folder, tmp_path):
    clutter(class_folder / "train")
    clutter(class_folder / "train/cat")
    _, labels, classes = read_closed_set(class_folder)
    assert classes == ["cat", "dog"] and np.bincount(labels).tolist() == [12, 12]
    far = tmp_path / "far"
    write_images(far / "b", 2)
    clutter(far)
    write_images(tmp_path / "elsewhere", 1, seed=3)
    (far / "a").symlink_to(tmp_path / "elsewhere")
    (far / "b/loop").symlink_to(far)
    loader = build_ood_loader(far, 9)
    assert sorted(loader.files) == ["a/000.png", "b/000.png", "b/001.png"]
    for file, image in zip(loader.files, loader.images, strict=True):
        assert torch.equal(image, decode(far / file))


def test_the_files_taken_do_not_depend_on_the_systems_order(tmp_path, monkeypatch):
    for name in ("b", "A", "a.d", "a"):
        write_images(tmp_path / name, 3)
    expected = ood_data.find_images(tmp_path)
    assert [path.parent.name for path in expected[::3]] == ["A", "a", "a.d", "b"]
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((r, d, f[::-1]) for r, d, f in walk(*a, **k)))
    assert ood_data.find_images(tmp_path) == expected


@pytest.mark.parametrize("name", ["empty", "@eaDir", "__MACOSX", "lost+found", "gifs"])
def test_a_class_without_images_is_named(name, class_folder):
    for split in ("train", "test"):
        (class_folder / split / name).mkdir()
        if name == "gifs":
            (class_folder / split / name / "moving.gif").touch()
    with pytest.raises(InputError, match=re.escape(f"train/{name} holds no image")):
        read_closed_set(class_folder)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_cannot_be_listed_is_named(number, class_folder, in_tiny_run, monkeypatch):
    """Another user's, or on a failing file system: no image of it may be left out in silence."""
    locked = class_folder / "train/cat/private"
    write_images(locked, 2)
    scandir, fail = os.scandir, mock.Mock(side_effect=OSError(number, "refused", str(locked)))
    monkeypatch.setattr(os, "scandir", lambda at: (fail if at == str(locked) else scandir)(at))
    with pytest.raises(OSError, match="train/cat/private"):
        read_closed_set(class_folder)
    (results,) = evaluate(ood_types=(str(class_folder / "train/cat"), "photos"))
    assert "train/cat/private" in results["skipped"]["cat"]


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def test_names_that_look_the_same_are_the_same(class_folder, tmp_path):
    """A Mac writes an accent as a letter of its own."""
    assert COMPOSED != DECOMPOSED
    write_images(class_folder / "train" / COMPOSED, 2)
    write_images(class_folder / "train" / DECOMPOSED, 3, seed=9)
    write_images(class_folder / "test" / DECOMPOSED, 1)
    for is_train, count in ((True, 5), (False, 1)):
        _, labels, classes = read_closed_set(class_folder, train=is_train)
        assert classes == [COMPOSED, "cat", "dog"] and list(labels).count(0) == count
    (tmp_path / DECOMPOSED).mkdir()
    assert list(evaluation.name_sets([str(tmp_path / DECOMPOSED)], "digits")) == [COMPOSED]


def test_names_of_the_tables_are_refused(tmp_path):
    for name in ("error rate", "mean of noises", "closed set", "svhn"):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=f"named '{name}'"):
            evaluation.name_sets([str(tmp_path / name)], "digits")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_shown_as_they_are(in_tiny_run, command):
    names = ("a|b", "$x^2$", "中文", "two\nlines")
    for name in names:
        write_images(in_tiny_run / name, 2)
    status, out, _ = command("test.py", "--dataset", "digits", "--ood-types", *names)
    assert status == 0
    for text in ("ood type: a|b\n", "| a\\|b ", "ood type: $x^2$\n", "中文", "two?lines"):
        assert text in out, text
    status, out, _ = command("experiments/compare.py", "digits_resnet18.ood.json")
    assert status == 0 and "| a\\|b " in out and "drew" in out


def test_a_windows_path_in_a_log_is_the_same_folder(in_tiny_run):
    """A run that began there goes on here, and its seeds are of one setting."""
    state = torch.load("cut.resume.pth", weights_only=True)
    state["log"]["config"]["dataset"] = "C:\\data\\pets"
    torch.save(state, "cut.resume.pth")
    train_quietly("pets", "cut.pth", resume=True)
    assert same_bits("cut.pth", "whole.pth")
    run = evaluation.describe_run(Path("x"), torch.nn.Linear(1, 1), state["log"])
    assert run["training"]["settings"]["dataset"] == "pets"


# Checkpoints and logs -------------------------------------------------------------------


def test_a_log_beside_other_weights_is_refused(in_tiny_run):
    shutil.copy("whole.pth", "a.pth")
    message = "a.json is damaged, or the log of another checkpoint"
    with pytest.raises(InputError, match=message):
        evaluate("a.pth")
    with pytest.raises(InputError, match=message):
        train_quietly("pets", "a.pth", epochs=1, resume=True)


def test_a_damaged_log_is_named(in_tiny_run):
    for text in ("{", '{"lr": 1}', "[1]", "\x00"):
        Path("digits_resnet18.json").write_text(text)
        with pytest.raises(InputError, match="digits_resnet18.json is damaged"):
            evaluate()


def test_a_link_has_the_log_of_its_target(in_tiny_run, tmp_path):
    (tmp_path / "best.pth").symlink_to(in_tiny_run / "digits_resnet18.pth")
    assert train.read_run(tmp_path / "best.pth")["log"]["config"]["dataset"] == "digits"
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    with pytest.raises(InputError, match="No checkpoint at .*loop.pth"):
        train.load_network(tmp_path / "loop.pth")
    with pytest.raises(InputError, match="Unknown data set"):
        train.train_model(train.Config(dataset=tmp_path / "loop.pth"))


@pytest.mark.parametrize("entry,prefix", [
    ("state_dict", ""), ("model", "module."), (None, "_orig_mod."), (None, "module._orig_mod.")
])  # fmt: skip
def test_state_dicts_of_other_tools_are_read(entry, prefix, in_tiny_run, capsys):
    state = torch.load("digits_resnet18.pth", weights_only=True)
    others = {prefix + name: state[name] for name in sorted(state)}  # in another order
    torch.save({entry: others, "model_ema": {}} if entry else others, "m.pth")
    model = train.load_network("m.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    note = f"note: of {entry}, model_ema in m.pth, {entry} is taken"
    assert (note in capsys.readouterr().err) == bool(entry)
    torch.save({name: value for name, value in state.items() if "num_batches" not in name}, "m.pth")
    assert torch.equal(train.load_network("m.pth")[0].weight, state["0.weight"])


class Wrapped(torch.nn.Module):
    """A head before its backbone, without a bias, in an attribute `module`."""

    def __init__(self, num_classes):
        super().__init__()
        self.head = torch.nn.Linear(4, num_classes, bias=False)
        self.module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 32), torch.nn.Flatten())

    def forward(self, images):
        return self.head(self.module(images))


def test_a_network_of_another_form_is_loaded_again(in_tiny_run, monkeypatch):
    monkeypatch.setattr(train, "build_network", lambda num_classes, stem: Wrapped(num_classes))
    model = train_quietly("pets", "new.pth", epochs=1)
    loaded = train.load_network("new.pth").state_dict()
    torch.testing.assert_close(loaded, model.state_dict(), rtol=0, atol=0)
    monkeypatch.setattr(train, "build_network", lambda num_classes, stem: Wrapped(20))
    with pytest.raises(InputError, match="must have num_classes outputs"):
        train_quietly("pets", "other.pth", epochs=1)


def test_what_does_not_fit_is_told_in_one_short_line(in_tiny_run):
    state = torch.load("digits_resnet18.pth", weights_only=True)
    first, *_, last = state
    others = {name: value for name, value in state.items() if name != first}
    for content, message in (
        (state | {f"x{i}": state[last] for i in range(999)}, "x0"),
        (others, first),
        (state | {first: state[first][:, :1]}, first),
        (state | {last: state[last] * torch.nan}, "has weights that are not finite"),
        (state | {first: state[first].to("meta")}, "does not fit"),
        (state | {first: state[first].to_sparse()}, "does not fit"),
        ({number: value for number, value in enumerate(state.values())}, "does not fit"),
        ([1, 2], "no state dict"),
        ({}, "does not fit"),
    ):
        torch.save(content, "m.pth")
        with pytest.raises(InputError, match=f"m.pth.*{message}") as error:
            train.load_network("m.pth")
        assert len(str(error.value)) < 400


def test_patterns_are_expanded_where_no_shell_does(in_tiny_run, command):
    for name in "ab":
        shutil.copy("digits_resnet18.pth", f"{name}9.pth")
    flags = ["test.py", "--dataset", "digits", "--ood-types", "blob", "--checkpoint"]
    status, out, _ = command(*flags, "?9.pth")
    assert status == 0 and out.count("Error Rate") == 2
    status, _, err = command(*flags, "?8.pth")
    assert status == 2 and "No checkpoint at ?8.pth" in err
    shutil.copy("digits_resnet18.pth", "[9].pth")
    shutil.copy("a.pth", "9.pth")  # of two classes
    assert command(*flags, "[9].pth")[0] == 0
    status, out, _ = command("experiments/compare.py", "?9.ood.json")
    assert status == 0 and "they count once" in out


def test_settings_from_python_may_be_paths_and_numbers_of_numpy(class_folder, tmp_path, tiny):
    path, folder = tmp_path / "new/a.pth", tmp_path / "images"
    options = {"epochs": 1, "batch_size": 8, "seed": np.int64(3), "lr": np.float32(0.5)}
    train.train_model(train.Config(class_folder, tmp_path, checkpoint=path, **options))
    log = train.read_run(path)["log"]
    assert {"seed": 3, "lr": 0.5}.items() <= log["config"].items()
    write_images(folder, 2)
    evaluate(str(path), (folder,), output=tmp_path / "new/folder", seed=np.int64(3))
    results = read_json(tmp_path / "new/folder/a.ood.json")
    assert results["config"]["ood_types"] == ["images"] and results["config"]["seed"] == 3


def test_a_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ood_utils.check(evaluation.Config(("~/a.pth",), output=Path("~/out")))
    assert config.checkpoint == (tmp_path / "a.pth",) and config.output == tmp_path / "out"
    write_images(tmp_path / "far", 1)
    assert len(build_ood_loader("~/far", 5).images) == 1
    with pytest.raises(InputError, match="Unknown OOD type '~nosuchuser/x'"):
        build_ood_loader("~nosuchuser/x", 5)


# Machines -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["EINVAL", "ENOTSUP", "ENOSYS", "EIO", "ENOSPC"])
def test_a_file_system_without_fsync_is_written_to(error, tmp_path, monkeypatch):
    """CIFS, FUSE. Any other answer leaves the old file, and names it."""
    path, number = tmp_path / "model.pth", getattr(errno, error)
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(number, error)))
    refused = pytest.raises(OSError, match=f"{error}.*model.pth")
    with refused if error in ("EIO", "ENOSPC") else contextlib.nullcontext():
        ood_utils.write_file(path, b"new")
    assert path.read_bytes() == (b"old" if error in ("EIO", "ENOSPC") else b"new")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(number, tmp_path, monkeypatch, capsys):
    acquire = mock.Mock(side_effect=OSError(number, "no locks"))
    monkeypatch.setattr(ood_utils.FileLock, "acquire", acquire)
    with ood_utils.lock(tmp_path / "lock", "held"):
        assert "note: no lock on" in capsys.readouterr().err


def test_complete_data_are_read_without_a_lock(tmp_path, monkeypatch):
    """The lock file may be another user's, the quota full."""
    monkeypatch.setattr(ood_utils, "lock", None)
    assert ood_data.fetch(lambda root, split: (root, split), tmp_path, split=1) == (tmp_path, 1)


def test_a_run_keeps_the_precision_that_auto_chose(in_tiny_run, monkeypatch, capsys):
    """Where the run began with bfloat16, on a node without; with --precision it is refused."""
    train_quietly("pets", "whole.pth", precision="bfloat16", epochs=2)
    run = train.read_run("whole.pth")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert train.pick_precision("auto", torch.device("cpu"), run) == "bfloat16"
    assert "the run began in bfloat16 and keeps it" in capsys.readouterr().out
    train_quietly("pets", "whole.pth", epochs=2, resume=True)
    with pytest.raises(InputError, match="precision bfloat16 -> float32"):
        train_quietly("pets", "whole.pth", epochs=2, resume=True, precision="float32")


def test_a_package_without_metadata_is_no_error(monkeypatch):
    """pillow-simd, a distribution's python3-*: the version is the module's own, or unknown."""
    real = importlib.import_module
    packages = {"PIL": SimpleNamespace(), "sklearn": SimpleNamespace(__version__="9.9")}
    monkeypatch.setattr(importlib, "import_module", lambda name: packages.get(name) or real(name))
    versions = ood_utils.describe(torch.device("cpu"))["versions"]
    assert (versions["PIL"], versions["sklearn"]) == ("unknown", "9.9")
    assert versions["torch"] == torch.__version__


def test_the_default_dtype_of_the_caller_changes_nothing(in_tiny_run):
    expected = evaluate()
    torch.set_default_dtype(torch.float64)
    try:
        train_quietly("pets", "new.pth", epochs=1)
        assert evaluate() == expected
    finally:
        torch.set_default_dtype(torch.float32)
