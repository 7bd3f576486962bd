"""Inputs as users' machines have them: the right value, or one line that names the cause."""

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
from torch.nn.functional import one_hot
from torchvision.transforms.functional import pil_to_tensor

import ood_data
import ood_utils
import test as evaluation
import train
from ood_data import build_ood_loader, decode, normalise
from ood_utils import InputError, get_logits, get_ood_scores

IMAGES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
NORMAL, UNIT = normalise(IMAGES), IMAGES / 255
LABELS = torch.arange(6) % 3


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3))


@pytest.mark.parametrize("batch", [
    (IMAGES, LABELS),
    (NORMAL, LABELS.tolist()),
    [NORMAL, LABELS.numpy()],
    (NORMAL, one_hot(LABELS)),
    (NORMAL, LABELS[:, None]),
    (NORMAL, LABELS.double()),
    (NORMAL.double(), LABELS),
    (NORMAL, LABELS, LABELS + 7),  # with an index
    {"image": NORMAL, "label": LABELS},
    {"pixel_values": NORMAL, "labels": LABELS},
    UserDict(img=IMAGES, fine_label=LABELS),
])  # fmt: skip
def test_batches_come_in_many_forms(batch, network):
    logits, labels = get_logits(network, [batch])
    assert torch.equal(logits, network(NORMAL)) and torch.equal(labels, LABELS)


@pytest.mark.parametrize("batch", [(NORMAL,), NORMAL])
def test_batches_without_labels_are_no_closed_set(batch, network):
    logits, labels = get_logits(network, [batch])
    assert torch.equal(logits, network(NORMAL)) and labels.tolist() == [-1] * 6
    with pytest.raises(InputError, match="needs a label"):
        get_ood_scores(network, [batch], closed_set=True)


@pytest.mark.parametrize("batch", [[], {"x": 1}, [None, None], "ab"])
def test_a_batch_of_another_form_is_named(batch, network):
    with pytest.raises(InputError, match="A batch must be"):
        get_logits(network, [batch])


def test_images_that_are_not_normalised_are_refused(network):
    resized = UNIT * 1.1 - 0.05  # a bicubic one is a little wider than [0, 1]
    for images in (UNIT, IMAGES.float(), resized):
        with pytest.raises(InputError, match="not normalised"):
            get_logits(network, [images])
    get_logits(network, [normalise(torch.full_like(IMAGES, 255))])
    get_logits(network, [NORMAL, UNIT])  # some batch is
    get_logits(network, ood_data.ImageLoader(UNIT, LABELS))  # a noise may lie anywhere


@pytest.mark.parametrize("backend,precision", [
    (torch.backends, "ieee"),
    (torch.backends.cudnn, "ieee"),
    (torch.backends.cudnn.conv, "ieee"),
    (torch.backends.mkldnn.matmul, "bf16"),
])  # fmt: skip
def test_the_precision_of_the_caller_is_left_alone(backend, precision, network):
    expected = network(NORMAL)
    before = backend.fp32_precision
    try:
        backend.fp32_precision = precision
        assert torch.equal(get_logits(network, [NORMAL])[0], expected)
        assert backend.fp32_precision == precision
    finally:
        backend.fp32_precision = before


def test_autocast_and_default_dtype_of_the_caller_change_no_score(in_tiny_run):
    def score_digits():
        model = train.load_network("digits_resnet18.pth")
        return get_ood_scores(model, train.get_loader(False, "digits"))

    expected = score_digits()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            scores = score_digits()
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(scores, expected)


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
    (Image.new("I;16", (32, 32), 30000), {}, Image.new("L", (32, 32), 117)),  # 30000 / 257
])  # fmt: skip
def test_pictures_are_read_as_viewers_show_them(image, options, expected, tmp_path):
    image.save(tmp_path / "a.png", **options)
    assert torch.equal(decode(tmp_path / "a.png"), pil_to_tensor(expected.convert("RGB")))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_have_no_known_range(mode, tmp_path):
    Image.new(mode, (32, 32)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="a.tiff .*no known range"):
        decode(tmp_path / "a.tiff")


def test_a_long_strip_is_cut_before_it_is_resized(tmp_path):
    pixels = np.zeros((1, 200_001), np.uint8)
    pixels[0, 100_000] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (decode(tmp_path / "a.png")[:, :, 15:17] > 100).any()


def clutter(folder):
    """What machines leave in folders of images."""
    write_images(folder / ".ipynb_checkpoints", 1)
    (folder / "album.jpg").mkdir()
    for name in ("._000.png", "notes.txt", "moving.gif"):
        (folder / name).touch()


def test_entries_that_are_no_images_are_passed_over(class_folder, tmp_path, capsys):
    clutter(class_folder / "train")
    clutter(class_folder / "train/cat")
    _, labels, classes = ood_data.read_closed_set(str(class_folder))
    assert classes == ["cat", "dog"] and np.bincount(labels).tolist() == [12, 12]
    far = tmp_path / "far"
    write_images(far / "b", 2)
    clutter(far)
    write_images(tmp_path / "elsewhere", 1, seed=3)
    (far / "a").symlink_to(tmp_path / "elsewhere")
    (far / "b/loop").symlink_to(far)
    loader = build_ood_loader(str(far), 9)
    assert sorted(loader.files) == ["a/000.png", "b/000.png", "b/001.png"]
    assert "1 files of" in capsys.readouterr().err
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


def test_names_of_the_tables_are_refused(tmp_path):
    for name in (*evaluation.MEANS, evaluation.ERROR, evaluation.CLOSED, "svhn"):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=f"named '{name}'"):
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


@pytest.mark.parametrize("name,stream", [
    ("stdout", None),  # python test.py >&-
    ("stderr", None),
    ("stdout", io.StringIO()),  # a notebook's
    ("stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii")),
])  # fmt: skip
def test_any_stream_can_be_written_to(name, stream, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test.py"])
    monkeypatch.setattr(sys, name, stream)
    ood_utils.run_command(lambda config: getattr(sys, name).write("中文\n"), evaluation.Config)


@pytest.mark.parametrize("entry,prefix", [
    ("state_dict", ""), ("model", "module."), (None, "_orig_mod."), (None, "module._orig_mod.")
])  # fmt: skip
def test_state_dicts_of_other_tools_are_read(entry, prefix, in_tiny_run, capsys):
    state = torch.load("digits_resnet18.pth", weights_only=True)
    others = {prefix + name: state[name] for name in sorted(state)}  # in another order
    torch.save({entry: others, "epoch": 3} if entry else others, "m.pth")
    (in_tiny_run / "m.json").write_text('{"lr": 0.1}')  # another tool's
    model = train.load_network("m.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "m.json is no log" in capsys.readouterr().err


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
    with pytest.raises(InputError, match=f"{name} cannot be a checkpoint"):
        train.checkpoint_path(name)


def test_files_of_others_are_never_replaced(class_folder, tmp_path, tiny):
    """A twin that shares the log, another tool's .json, another tool's weights."""
    (tmp_path / "a.pt").write_text("of another run")
    (tmp_path / "b.json").write_text('{"lr": 1}')
    for name in ("a.pth", "b.pth"):
        with pytest.raises(InputError, match="would share files"):
            train_quietly(class_folder, tmp_path / name, epochs=1)
    for name in ("c.pth", "c.1.pth"):
        (tmp_path / name).write_text(name)
    train_quietly(class_folder, tmp_path / "c.pth", epochs=1)
    contents = [(tmp_path / name).read_text() for name in ("c.2.pth", "c.1.pth")]
    assert contents == ["c.pth", "c.1.pth"]


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
    for text in ("", "a\0b"):
        with pytest.raises(InputError, match="--output .* is empty"):
            ood_utils.as_path(text, "--output")


def test_every_path_may_lead_nowhere(in_tiny_run):
    for setting in ("checkpoint", "dataset", "data_root", "output", "compare", "ood_types"):
        options = {"checkpoint": "digits_resnet18.pth", "ood_types": "svhn"}
        options[setting] = "~nosuchuser/x"
        with pytest.raises(InputError, match="home directory"):
            results = evaluation.evaluate(evaluation.Config(**options))
            raise InputError(results["skipped"]["svhn"])  # where only the set needs the path


@pytest.mark.parametrize("name,value", [
    ("seed", -1), ("seed", None), ("seed", 2**64), ("batch_size", 0), ("batch_size", 10**20),
    ("lr", float("nan")), ("momentum", -0.1), ("epochs", 0), ("validation", -1),
    ("lr", 0.0), ("gamma", 0.0), ("score", "maxlogit"),
])  # fmt: skip
def test_settings_out_of_range_are_named(name, value):
    checks = {train.Config: train.check_settings, evaluation.Config: evaluation.evaluate}
    for config_class, check in checks.items():
        if hasattr(config_class, name):
            with pytest.raises(InputError, match=f"{name.replace('_', '-')} '?{value}"):
                check(config_class(**{name: value}))


def test_settings_from_python_may_be_one_path_and_numbers_of_numpy(class_folder, tmp_path, tiny):
    path, folder = tmp_path / "a.pth", tmp_path / "images"
    options = {"epochs": 1, "batch_size": 8, "seed": np.int64(3), "lr": np.float32(0.5)}
    train.train_model(train.Config(class_folder, tmp_path, checkpoint=path, **options))
    assert {"seed": 3, "lr": 0.5}.items() <= train.read_log(path)["config"].items()
    write_images(folder, 2)
    options = {"ood_types": folder, "output": tmp_path / "new/folder", "seed": np.int64(3)}
    evaluation.evaluate(evaluation.Config(path, **options))
    results = json.loads((tmp_path / "new/folder/a.ood.json").read_text())
    assert results["config"]["ood_types"] == ["images"] and results["config"]["seed"] == 3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(number, tmp_path, monkeypatch, capsys):
    def acquire(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ood_utils.filelock.FileLock, "acquire", acquire)
    with ood_utils.lock(tmp_path / "lock", "held"):
        assert "note: no lock on" in capsys.readouterr().err
