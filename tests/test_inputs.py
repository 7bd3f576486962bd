"""Inputs as users' machines have them: the right value, or one line that names the cause."""

import errno
import os
import unicodedata
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import evaluate, read_json, tiny_network, train_quietly, write_images
from PIL import Image

import ood_data
import ood_utils
import test as evaluation
import train
from ood_data import build_ood_loader, decode, path_name, read_closed_set
from ood_utils import InputError


def test_pictures_are_read_as_viewers_show_them(tmp_path):
    """Turned as EXIF says, and white where they are transparent."""
    image, exif = Image.new("RGBA", (32, 32), (0, 0, 0, 255)), Image.Exif()
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))  # black is hidden under it
    exif[0x0112] = 6  # the left half of the file is the top of the picture
    for saved in (image, image.quantize(2)):
        saved.save(tmp_path / "a.png", exif=exif)
        found = decode(tmp_path / "a.png")
        assert (found[:, :16] == 255).all() and (found[:, 16:] == 0).all()


def test_files_are_taken_in_a_fixed_order_without_clutter(class_folder, tmp_path, monkeypatch):
    """Without what machines leave among images. Links are followed, each folder is read once."""
    far, scandir = tmp_path / "far", os.scandir
    for folder in (far / "b", far / ".hidden", tmp_path / "links", class_folder / "train/.hidden"):
        write_images(folder, 2, seed=len(folder.name))
    (class_folder / "train/album.jpg").mkdir()
    for name in ("b/._000.png", "b/notes.txt", "moving.gif"):
        (far / name).touch()
    os.mkfifo(far / "pipe.png")  # would be waited for
    (far / "a").symlink_to(tmp_path / "links")
    (far / "b/loop").symlink_to(far)
    monkeypatch.setattr(os, "scandir", lambda at: sorted(scandir(at), key=repr, reverse=True))
    loader, names = build_ood_loader(far, 9), ["a/000.png", "a/001.png", "b/000.png", "b/001.png"]
    assert loader.files == [names[i] for i in ood_data.fixed_order(4)]
    assert torch.equal(loader.images, ood_data.decode_all([far / file for file in loader.files]))
    _, labels, classes = read_closed_set(class_folder)
    assert classes == ["cat", "dog"] and np.bincount(labels).tolist() == [12, 12]


def test_a_folder_that_cannot_be_listed_is_an_error(class_folder, monkeypatch):
    """Another user's, or on a failing file system: no image of it may be left out in silence."""
    listed, refused = os.scandir(class_folder), OSError(errno.EIO, "refused")
    monkeypatch.setattr(os, "scandir", mock.Mock(side_effect=[listed, refused]))
    with pytest.raises(OSError, match="refused"):
        build_ood_loader(class_folder, 5)


def test_names_that_look_the_same_are_the_same(class_folder, tiny_folder):
    """A Mac writes an accent as a letter of its own. A run may have begun on Windows."""
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    write_images(class_folder / "train" / composed, 2)
    write_images(class_folder / "train" / decomposed, 3, seed=9)
    write_images(class_folder / "test" / decomposed, 1)
    for is_train, count in ((True, 5), (False, 1)):
        _, labels, classes = read_closed_set(class_folder, train=is_train)
        assert classes == [composed, "cat", "dog"] and list(labels).count(0) == count
    assert list(evaluation.name_sets([decomposed], "digits")) == [composed]
    assert path_name(f"C:\\data\\a:{decomposed}\\") == f"a:{composed}"


def test_state_dicts_of_other_tools_are_read(in_tiny_run, capsys, monkeypatch):
    state = torch.load("digits_resnet18.pth", weights_only=True)
    others = {f"module._orig_mod.{name}": state[name] for name in sorted(state)}
    torch.save({"state_dict": others, "model_ema": {}}, "m.pth")
    loaded = train.load_network("m.pth").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())
    assert "note: of state_dict, model_ema in m.pth, state_dict is" in capsys.readouterr().err
    wrapped = torch.nn.DataParallel(tiny_network(2)).cpu()  # its own names begin like that
    monkeypatch.setattr(train, "build_network", lambda *args: wrapped)
    train_quietly("pets", "own.pth", epochs=1)
    assert list(train.load_network("own.pth").state_dict()) == list(wrapped.state_dict())


def test_what_does_not_fit_is_told_in_one_short_line(in_tiny_run, monkeypatch):
    state = torch.load("digits_resnet18.pth", weights_only=True)
    first, *_, last = state
    for content, message in (
        (state | {f"x{i}": state[last] for i in range(999)}, "does not fit build_network: .*x0"),
        ({name: state[name] for name in state if name != first}, f"does not fit .*{first}"),
        (state | {first: state[first] * torch.nan}, f"{first} is not finite"),
        (state | {last: state[last].long()}, f"{last} is not finite, or of another type"),
    ):
        torch.save(content, "m.pth")
        with pytest.raises(InputError, match=f"m.pth.*{message}") as error:
            train.load_network("m.pth")
        assert len(str(error.value)) < 400
    monkeypatch.setattr(train, "build_network", lambda *args: tiny_network(20))
    with pytest.raises(InputError, match="must have num_classes outputs"):
        train_quietly("pets", "other.pth")
    monkeypatch.setattr(train.Config, "warm_up", 5, raising=False)
    with pytest.raises(InputError, match="Config.warm_up has no type: write `warm_up: int"):
        train_quietly("pets", "other.pth")


def test_a_file_system_without_fsync_is_written_to(tmp_path, monkeypatch):
    """CIFS, FUSE. Any other answer leaves the old file, and names it."""
    path = tmp_path / "new/model.pth"
    fsync = mock.Mock(side_effect=OSError(errno.EINVAL, "no fsync"))
    monkeypatch.setattr(os, "fsync", fsync)
    ood_utils.write_file(path, b"old")
    fsync.side_effect = OSError(errno.ENOSPC, "is full")
    with pytest.raises(OSError, match="is full.*model.pth"):
        ood_utils.write_file(path, b"new")
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    """Complete data need no lock: its file may be another user's, the quota full."""
    acquire = mock.Mock(side_effect=OSError(errno.ENOLCK, "no locks"))
    monkeypatch.setattr(ood_utils.FileLock, "acquire", acquire)
    data_set = mock.Mock(__name__="SET", side_effect=["complete", RuntimeError, "downloaded"])
    for found, note in (("complete", ""), ("downloaded", "note: no lock on")):
        assert ood_data.fetch(data_set, tmp_path) == found
        assert capsys.readouterr().err.startswith(note) and acquire.called == bool(note)


def test_a_run_goes_on_where_packages_and_processor_are_others(in_tiny_run, monkeypatch):
    """Without bfloat16 it keeps its precision; with --precision it is refused."""
    monkeypatch.delattr("PIL.__version__")  # of pillow-simd, say
    train_quietly("pets", "new.pth", precision="bfloat16", epochs=1)
    versions = read_json("new.json")["versions"]
    assert (versions["PIL"], versions["torch"]) == ("unknown", torch.__version__)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    train_quietly("pets", "new.pth", epochs=1, resume=True)
    with pytest.raises(InputError, match="precision bfloat16 -> float32"):
        train_quietly("pets", "new.pth", epochs=1, resume=True, precision="float32")


def test_the_default_dtype_of_the_caller_changes_nothing(in_tiny_run, request):
    expected = evaluate()
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    train_quietly("pets", "new.pth", epochs=1)
    assert evaluate() == expected
