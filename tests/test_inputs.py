"""Inputs as users' machines have them: the right value, or one line that names the cause."""

import dataclasses
import errno
import io
import json
import os
import sys
from collections import UserDict

import numpy as np
import pytest
import torch
from conftest import train_quietly, write_images
from PIL import Image

import ood_data
import ood_utils
import test as evaluation
import train
from ood_data import build_ood_loader, decode, normalise
from ood_utils import InputError, get_logits, get_ood_scores, get_performance

IMAGES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
LABELS = torch.arange(6) % 3


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3))


NORMAL, UNIT = normalise(IMAGES), IMAGES / 255
FORMS = {
    "bytes": (IMAGES, LABELS),
    "list": (NORMAL, LABELS.tolist()),
    "array": [NORMAL, LABELS.numpy()],
    "one-hot": (NORMAL, torch.nn.functional.one_hot(LABELS)),
    "column": (NORMAL, LABELS[:, None]),
    "float labels": (NORMAL, LABELS.double()),
    "double images": (NORMAL.double(), LABELS),
    "datasets": {"image": NORMAL, "label": LABELS},
    "transformers": {"pixel_values": NORMAL, "labels": LABELS},
    "datasets' CIFAR": UserDict(img=IMAGES, fine_label=LABELS),
    "with an index": (NORMAL, LABELS, LABELS + 7),
    "one-tuple": (NORMAL,),
    "bare": NORMAL,
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_come_in_many_forms(form, network):
    expected, _ = get_logits(network, [(NORMAL, LABELS)])
    logits, labels = get_logits(network, [FORMS[form]])
    assert torch.equal(logits, expected)
    if form in ("one-tuple", "bare"):
        assert (labels == -1).all() and len(labels) == 6
        with pytest.raises(InputError, match="needs a label"):
            get_ood_scores(network, [FORMS[form]], closed_set=True)
    else:
        assert torch.equal(labels, LABELS)


def test_images_that_are_not_normalised_are_refused(network):
    resized = UNIT * 1.1 - 0.05  # a bicubic one is a little wider than [0, 1]
    for images in (UNIT, IMAGES.float(), resized):
        with pytest.raises(InputError, match=r"within \[0, 1\] .*, so not normalised: pass uint8"):
            get_logits(network, [(images, LABELS)])
    get_logits(network, [(normalise(torch.full_like(IMAGES, 255)), LABELS)])
    get_logits(network, [(NORMAL, LABELS), (UNIT, LABELS)])  # some batch is
    loader = ood_data.ImageLoader(UNIT, LABELS)  # a noise may lie anywhere
    assert len(get_logits(network, loader)[0]) == 6


@pytest.mark.parametrize("batch", [[], {"x": 1}, [None, None], "ab"])
def test_a_batch_of_another_form_is_named(batch, network):
    with pytest.raises(InputError, match="A batch must be"):
        get_logits(network, [batch])


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_wrapped_networks_have_features(wrap, network):
    expected = ood_utils.get_features(network, [(IMAGES, LABELS)])
    assert torch.equal(ood_utils.get_features(wrap(network), [(IMAGES, LABELS)]), expected)


@pytest.mark.parametrize("backend", [
    torch.backends, torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul
])  # fmt: skip
def test_the_precision_of_the_caller_is_left_alone(backend, network):
    expected, _ = get_logits(network, [(IMAGES, LABELS)])
    before = backend.fp32_precision
    chosen = "bf16" if backend is torch.backends.mkldnn.matmul else "ieee"
    try:
        backend.fp32_precision = chosen
        assert torch.equal(get_logits(network, [(IMAGES, LABELS)])[0], expected)
        assert backend.fp32_precision == chosen
    finally:
        backend.fp32_precision = before


def test_autocast_and_default_dtype_of_the_caller_change_no_score(in_tiny_run):
    scores = []
    for dtype, autocast in ((torch.float32, False), (torch.float64, False), (torch.float32, True)):
        torch.set_default_dtype(dtype)
        try:
            model = train.load_network("digits_resnet18.pth")
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                scores.append(get_ood_scores(model, train.get_loader(False, "digits")))
        finally:
            torch.set_default_dtype(torch.float32)
        assert np.array_equal(scores[0], scores[-1])


@pytest.mark.parametrize("scores", [
    np.ma.masked_array([1.0, 2.0], [False, True]), ["1", "2"], np.array([1 + 2j]), [None, 1.0],
    torch.tensor([1 + 1j]), [True, False],
], ids=str)  # fmt: skip
def test_what_is_no_real_number_is_refused(scores):
    with pytest.raises(InputError, match="positive scores must be real numbers"):
        get_performance(scores, [0.0])


@pytest.mark.parametrize("scores", [
    torch.tensor([3.0, 4.0], dtype=torch.bfloat16), [torch.tensor(3.0, requires_grad=True), 4.0],
    [torch.tensor([3.0, 4.0], requires_grad=True)], np.array([3, 4], np.float16),
    torch.tensor([3, 4]), np.ma.masked_array([3.0, 4.0], [False, False]),
], ids=str)  # fmt: skip
def test_real_numbers_come_in_many_types(scores):
    assert get_performance(scores, [1.0, 3.5])[0] == 0.75


def save(path, image, **options):
    image.save(path, **options)
    return decode(path)


def test_images_are_turned_as_viewers_turn_them(tmp_path):
    """Tag 6: the left half of the file is the top of the picture."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = save(tmp_path / "a.png", Image.fromarray(pixels), exif=exif)
    assert (shown[0, :16] == 255).all() and (shown[0, 16:] == 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_are_white(mode, tmp_path):
    rgba = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    rgba.paste((0, 0, 0, 0), (0, 0, 16, 32))  # black is hidden under it
    options = {}
    image = rgba.convert(mode) if mode == "LA" else rgba
    if mode in ("P", "RGB"):  # one colour is transparent
        image = Image.new(mode, (32, 32), 0)
        image.paste(1 if mode == "P" else (1, 1, 1), (0, 0, 16, 32))
        if mode == "P":
            image.putpalette([0, 0, 0, 0, 0, 0] + [0] * 762)
        options["transparency"] = 1 if mode == "P" else (1, 1, 1)
    shown = save(tmp_path / "a.png", image, **options)
    assert (shown[:, :, :16] == 255).all() and (shown[:, :, 16:] == 0).all()


@pytest.mark.parametrize("dtype,value,pixel", [
    (np.uint16, 30000, 117), (np.uint8, 80, 80), (np.int32, 200, None), (np.float32, 0.5, None)
])  # fmt: skip
def test_grey_keeps_its_value_or_is_refused(dtype, value, pixel, tmp_path):
    """16 bits: 30000 / 257; 32 bits have no known range."""
    image = Image.fromarray(np.full((32, 32), value, dtype))
    if pixel is None:
        with pytest.raises(InputError, match="a.tiff .*no known range: save it with 8 or 16 bits"):
            save(tmp_path / "a.tiff", image)
    else:
        assert (save(tmp_path / "a.tiff", image) == pixel).all()


def test_a_long_strip_is_cut_before_it_is_resized(tmp_path):
    pixels = np.zeros((1, 200_001), np.uint8)
    pixels[0, 100_000] = 200
    assert (save(tmp_path / "a.png", Image.fromarray(pixels))[:, :, 15:17] > 100).any()


def clutter(folder):
    """What machines leave in folders of images, and links."""
    write_images(folder / ".ipynb_checkpoints", 1)
    (folder / ".git").mkdir()
    (folder / "._000.png").write_bytes(b"macOS")
    (folder / "album.jpg").mkdir()
    (folder / "notes.txt").write_text("no image")
    (folder / "moving.gif").write_bytes(b"")


def test_entries_that_are_no_images_are_passed_over(class_folder, tmp_path, capsys):
    clutter(class_folder / "train")
    clutter(class_folder / "train/cat")
    images, labels, classes = ood_data.read_closed_set(str(class_folder))
    assert classes == ["cat", "dog"] and np.bincount(labels).tolist() == [12, 12]
    write_images(tmp_path / "far/b", 2)
    write_images(tmp_path / "elsewhere", 1, seed=3)
    clutter(tmp_path / "far")
    (tmp_path / "far/a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "far/b/loop").symlink_to(tmp_path / "far")
    loader = build_ood_loader(str(tmp_path / "far"), 9)
    assert sorted(loader.files) == ["a/000.png", "b/000.png", "b/001.png"]
    assert "1 files of" in capsys.readouterr().err
    for file, image in zip(loader.files, loader.images, strict=True):
        assert torch.equal(image, decode(tmp_path / "far" / file))


def test_the_files_taken_do_not_depend_on_the_systems_order(tmp_path, monkeypatch):
    for name in ("b", "A", "a.d", "a"):
        write_images(tmp_path / "x" / name, 3, size=(32, 32))
    expected = ood_data.find_images(tmp_path / "x")
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((r, d, f[::-1]) for r, d, f in walk(*a, **k)))
    assert ood_data.find_images(tmp_path / "x") == expected and len(expected) == 12
    assert [path.parent.name for path in expected[::3]] == ["A", "a", "a.d", "b"]


def test_names_of_the_tables_are_refused(tmp_path):
    for name in (*evaluation.MEANS, evaluation.ERROR, evaluation.CLOSED, "svhn"):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=f"would be named '{name}'"):
            evaluation.name_sets([str(tmp_path / name)], "digits")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_shown_as_they_are(in_tiny_run, command):
    names = ("a|b", "$x^2$", "中文", "two\nlines")
    for name in names:
        write_images(in_tiny_run / name, 2)
    flags = ["--checkpoint", "digits_resnet18.pth", "--ood-types", *names]
    status, out, _ = command("test.py", *flags)
    assert status == 0
    for text in ("ood type: a|b\n", "| a\\|b ", "ood type: $x^2$\n", "中文", "two?lines"):
        assert text in out, text


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_streams_end_nothing(closed, class_folder, monkeypatch, tmp_path, tiny):
    """python train.py >&-, or 2>&-"""
    flags = ["--dataset", class_folder, "--checkpoint", tmp_path / "a.pth", "--epochs", 1]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--batch-size", "8"])
    monkeypatch.setattr(sys, closed, None)
    ood_utils.run_command(train.train_model, train.Config)
    assert (tmp_path / "a.pth").exists()


def test_an_output_that_is_not_utf8_ends_nothing(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(sys, "stdout", out)
    ood_utils.run_command(lambda config: print("中文"), evaluation.Config)
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a notebook's
    ood_utils.run_command(lambda config: print("中文"), evaluation.Config)
    out.seek(0)
    assert out.read() == "\\u4e2d\\u6587\n"


@pytest.mark.parametrize("wrap", [
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    lambda state: dict(sorted(state.items())),  # in another order
])  # fmt: skip
def test_state_dicts_of_other_tools_are_read(wrap, in_tiny_run, capsys):
    state = torch.load("digits_resnet18.pth", weights_only=True)
    torch.save(wrap(state), "m.pth")
    (in_tiny_run / "m.json").write_text('{"lr": 0.1}')  # another tool's
    model = train.load_network("m.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "m.json is no log of train.py" in capsys.readouterr().err


def test_what_does_not_fit_is_told_by_three_names(in_tiny_run):
    state = torch.load("digits_resnet18.pth", weights_only=True)
    first, *_, last = state
    (variance,) = [name for name in state if "running_var" in name]
    others = {name: value for name, value in state.items() if name != first}
    for content, message in (
        (state | {f"x{i}": state[last] for i in range(9)}, "9 weights .* x0, x1, x2"),
        (others, first),
        (state | {first: state[first].long()}, first),
        (state | {first: state[first][:, :1]}, first),
        (state | {last: state[last] * torch.nan}, f"{last} is not finite"),
        (state | {variance: state[variance] - 1e6}, f"{variance} is not finite, or"),
        ([1, 2], "no state dict"),
        ({}, "no state dict"),
    ):
        torch.save(content, "m.pth")
        with pytest.raises(InputError, match=f"m.pth.*{message}"):
            train.load_network("m.pth")


def test_a_link_has_the_log_of_its_target(in_tiny_run, tmp_path):
    (tmp_path / "best.pth").symlink_to(in_tiny_run / "digits_resnet18.pth")
    assert train.read_log(tmp_path / "best.pth")["config"]["dataset"] == "digits"


@pytest.mark.parametrize("name", [
    "a.ckpt", "a.pth.tar", "a.PTH", "a.resume.pth", "a.ood.pth", "a", "lr0.1", "a.json"
])  # fmt: skip
def test_names_that_collide_with_files_of_runs_are_refused(name):
    with pytest.raises(InputError, match=f"{name} cannot be a checkpoint: .* end in .pth or .pt"):
        train.checkpoint_path(name)


def test_files_of_others_are_never_replaced(class_folder, tmp_path, tiny):
    """A twin that shares the log, another tool's .json, another tool's weights."""
    (tmp_path / "a.pt").write_bytes(b"of another run")
    (tmp_path / "b.json").write_text('{"lr": 1}')
    for name in ("c.pth", "c.1.pth"):
        (tmp_path / name).write_text(name)
    for name in ("a.pth", "b.pth"):
        with pytest.raises(InputError, match="would share files"):
            train_quietly(class_folder, tmp_path / name, epochs=1)
    train_quietly(class_folder, tmp_path / "c.pth", epochs=1)
    contents = [(tmp_path / name).read_text() for name in ("c.2.pth", "c.1.pth", "b.json")]
    assert contents == ["c.pth", "c.1.pth", '{"lr": 1}']


def test_scores_that_are_not_finite_cost_no_other_checkpoint(in_tiny_run, command, monkeypatch):
    state = torch.load("digits_resnet18.pth", weights_only=True)
    *_, bias = state
    torch.save(state | {bias: state[bias] + 0.1}, "good.pth")
    torch.save(state | {bias: state[bias] + 1e30}, "bad.pth")
    monkeypatch.setitem(ood_utils.SCORES, "square", lambda logits: logits.float().square().sum(1))
    flags = ["--dataset", "digits", "--ood-types", "blob", "--checkpoint", "bad.pth"]
    status, out, err = command("test.py", *flags, "good.pth")
    assert status == 1 and "bad.pth: scores of closed set are not finite" in err
    assert "Error Rate" in out and (in_tiny_run / "good.ood.json").exists()
    status, _, err = command("test.py", *flags)
    assert status == 2 and "bad.pth: scores of" in err


def test_paths_are_expanded_or_lead_nowhere(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert str(ood_utils.as_path("$SCRATCH/data", "--output")) == "/scratch/data"
    empty = "--output '.*' is empty: is a shell variable unset"
    for text, message in (("", empty), ("a\0b", empty), ("~nosuchuser/x", "home directory")):
        with pytest.raises(InputError, match=message):
            ood_utils.as_path(text, "--output")


def test_every_path_may_lead_nowhere(in_tiny_run):
    for flag in ("checkpoint", "dataset", "data_root", "output", "compare", "ood_types"):
        options = {"checkpoint": "digits_resnet18.pth", "ood_types": "svhn", flag: "~nosuchuser/x"}
        with pytest.raises(InputError, match="home directory"):
            results = evaluation.evaluate(evaluation.Config(**options))
            raise InputError(results["skipped"]["svhn"])  # where only the set needs the path


@pytest.mark.parametrize("option", [
    {"seed": -1}, {"seed": None}, {"seed": 2**64}, {"batch_size": 0}, {"batch_size": 10**20},
    {"lr": float("nan")}, {"momentum": -0.1}, {"epochs": 0}, {"validation": -1},
], ids=str)  # fmt: skip
def test_numbers_out_of_range_are_named(option):
    (name,) = option
    message = f"--{name.replace('_', '-')} .* is out of range"
    with pytest.raises(InputError, match=message):
        train.check_settings(train.Config(**option))
    if hasattr(evaluation.Config, name):
        with pytest.raises(InputError, match=message):
            evaluation.evaluate(evaluation.Config(**option))
    with pytest.raises(InputError, match="Unknown score 'maxlogit': use .*max_logit"):
        evaluation.evaluate(evaluation.Config(score="maxlogit"))


def test_settings_from_python_may_be_one_path_and_numbers_of_numpy(class_folder, tmp_path, tiny):
    path, folder = tmp_path / "a.pth", tmp_path / "images"
    config = train.Config(class_folder, tmp_path, checkpoint=path, epochs=1, batch_size=8)
    train.train_model(dataclasses.replace(config, seed=np.int64(3), lr=np.float32(0.5)))
    assert {"seed": 3, "lr": 0.5}.items() <= train.read_log(path)["config"].items()
    write_images(folder, 2)
    options = {"checkpoint": path, "ood_types": folder, "output": tmp_path / "new/folder"}
    evaluation.evaluate(evaluation.Config(**options, seed=np.int64(3)))
    results = json.loads((tmp_path / "new/folder/a.ood.json").read_text())
    assert results["config"]["ood_types"] == ["images"]
    assert results["config"]["seed"] == results["checkpoints"][0]["training"]["seed"] == 3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(number, tmp_path, monkeypatch, capsys):
    def acquire(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ood_utils.filelock.FileLock, "acquire", acquire)
    with ood_utils.lock(tmp_path / "lock", "held"):
        assert "note: no lock on" in capsys.readouterr().err
