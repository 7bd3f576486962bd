"""The command lines as a user starts them: digits from end to end, bad input, experiments."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import evaluate, files_of, read_json, train_quietly, write_images
from PIL import Image
from torch.nn.functional import normalize

import ood_data
import ood_utils
import test as evaluation
import train
from experiments import detectors, published_test_pass
from ood_utils import InputError, get_features, get_performance

DIGITS = "test.py --dataset digits --ood-types"


def test_digits_from_end_to_end(tmp_path, monkeypatch, command):
    """What is printed is what the files hold; their name has the seed."""
    monkeypatch.chdir(tmp_path)
    name = "digits_resnet18_seed1"
    flags = "--dataset digits --epochs 2 --lr 0.05 --batch-size 240 --device cpu --seed 1"
    status, out, _ = command(f"train.py {flags}")
    _, *lines, wrote = out.splitlines()
    assert status == 0 and wrote == f"wrote {name}.pth"
    epochs = read_json(f"{name}.json")["epochs"]
    assert epochs[1]["loss"] < epochs[0]["loss"]
    for epoch, line in zip(epochs, lines, strict=True):
        assert f"loss {epoch['loss']:.4f}  test accuracy {epoch['test_accuracy']:.2%} " in line

    sets = ("blob", "photos")
    status, out, _ = command(f"test.py --checkpoint {name}.pth --score energy --ood-types", *sets)
    report, table = out.split("\n\n", 1)
    error_rate, *lines = report.splitlines()
    assert status == 0 and lines[1::2] == [f"ood type: {one}" for one in sets]
    results, arrays = read_json(f"{name}.ood.json"), np.load(f"{name}.ood.npz")
    assert [one["kind"] for one in results["sets"].values()] == ["images", "noise", "images"]
    assert not np.array_equal(arrays["scores/blob"], np.float32(arrays["scores/blob"]))  # float64
    correct = arrays["labels"] == arrays["predictions/closed set"]
    assert error_rate == f"Error Rate {100 * (1 - correct.mean()):.4f}"
    rows = {row["set"]: row for row in results["rows"] if row["score"] == "energy"}
    for line, one in zip(lines[::2], ("right / wrong", *sets), strict=True):
        form = "AUROC: {auroc:.4f}, AUPR: {aupr:.4f}, FPR95: {fpr95:.4f}"
        assert line == form.format(**rows[one])
        assert re.search(rf"\| {one} +\| +{rows[one]['auroc']:.2f} \|", table)


def test_a_full_disk_leaves_the_report_and_head_the_files(in_tiny_run, command, monkeypatch):
    """An equal evaluation then changes no file, another one moves them."""
    with monkeypatch.context() as patch:
        patch.setattr(ood_utils, "write_file", mock.Mock(side_effect=OSError(28, "full", "x")))
        status, out, err = command(DIGITS, "blob")
    assert status == 2 and "AUROC" in out and "full" in err and err.count("\n") == 3
    with monkeypatch.context() as patch, pytest.raises(BrokenPipeError):
        patch.setattr(evaluation, "print_report", mock.Mock(side_effect=BrokenPipeError))
        evaluate()
    first = files_of("digits_resnet18.ood")
    _, out, _ = command(DIGITS, "blob")
    assert first.keys() == {".npz", ".json"} and files_of("digits_resnet18.ood") == first
    assert out.endswith("\nwrote digits_resnet18.ood.json and digits_resnet18.ood.npz\n")
    _, out, _ = command(DIGITS, "blob", "--seed", "1")
    assert "kept the earlier digits_resnet18.ood.npz as digits_resnet18.1.ood.npz\n" in out
    assert files_of("digits_resnet18.1.ood") == first
    assert files_of("digits_resnet18.ood")[".npz"] != first[".npz"]  # scores of other noise


def test_what_has_no_figures_is_named_in_its_place(in_tiny_run, command, monkeypatch):
    """Of a network without mistakes, whose scores are all equal."""
    monkeypatch.setattr(
        ood_utils, "get_logits", lambda _, loader: (torch.eye(10)[loader.labels], loader.labels)
    )
    Path("digits_resnet18.json").unlink()  # some mistakes by the log
    status, out, _ = command(DIGITS, "svhn", "gaussian", "--data-root", ".")
    reason = read_json("digits_resnet18.ood.json")["skipped"]["svhn"]
    lines = "Error Rate 0.0000\nAUROC: n/a, AUPR: n/a, FPR95: n/a (one group has no image)\n"
    lines += f"ood type: svhn\nskipped: {reason}\nood type: gaussian\nAUROC: 50.0000,"
    assert status == 1 and out.startswith(lines) and "SVHN is missing" in reason


def test_own_images_as_closed_set_and_ood_set(in_tiny_run, command):
    """Closed set and stem are known from the log, of a link from that of its target."""
    write_images(in_tiny_run / "far/a|b\nc", 3)
    train_quietly("pets", "new.pth", epochs=1, stem="cifar")
    Path("link.pth").symlink_to("new.pth")
    flags = ["test.py --checkpoint link.pth --ood-types", "far/a|b\nc", "photos"]
    status, out, err = command(*flags)
    assert status == 0 and "ood type: a|b?c\n" in out and "| a\\|b?c " in out
    rows = {row["set"]: row for row in read_json("link.ood.json")["rows"]}
    assert (rows["a|b?c"]["positives"], rows["a|b?c"]["negatives"]) == (10, 2)
    assert len(np.load("link.ood.npz")["files/a|b?c"]) == 2 and "note" not in err
    status, _, err = command("test.py --checkpoint cut.resume.pth")
    assert "is unfinished, 1 of 4 epochs" in err
    Path("pets").rename("moved")  # the same classes
    assert command(*flags, "--dataset", "moved")[0] == 0


def test_a_network_that_is_not_that_of_its_log_is_refused(in_tiny_run):
    """Old weights under new code load, but two of 360 images at most may be classified anew."""
    log = read_json("digits_resnet18.json")
    accuracy = log["epochs"][-1]["test_accuracy"]
    for part, message in (
        ({"epochs": [{"test_accuracy": accuracy - 1.98 / 360}]}, None),
        ({"epochs": [{"test_accuracy": accuracy - 2.02 / 360}]}, "rate of .*, but .* by its log"),
        ({"settings": log["settings"] | {"std": [0.3] * 3}}, "with another MEAN and STD"),
        ({"classes": [*"abcdefghij"]}, "was trained on 10 classes, not on these"),
    ):
        Path("digits_resnet18.json").write_text(json.dumps(log | part))
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            evaluate()


def test_scores_that_are_not_finite_cost_no_other_checkpoint(in_tiny_run, command, monkeypatch):
    state = torch.load("digits_resnet18.pth", weights_only=True)
    *_, bias = state
    torch.save(state | {bias: state[bias] + 1e30}, "bad.pth")
    monkeypatch.setitem(ood_utils.SCORES, "square", lambda logits: logits.float().square().sum(1))
    status, out, err = command(DIGITS, "blob", "--checkpoint", "bad.pth", "digits_resnet18.pth")
    assert status == 1 and "bad.pth: scores of closed set are not finite" in err
    assert out.count("Error Rate") == 1 and Path("digits_resnet18.ood.json").exists()
    assert command(DIGITS, "fog", "--checkpoint", "bad.pth", "digits_resnet18.pth")[0] == 2
    status, out, _ = command(DIGITS, "--checkpoint", "bad.pth", "digits_resnet18.pth", "bad.pth")
    assert status == 1 and out.count("Error Rate") == 1


def test_the_shipped_results_are_not_written_to_by_default(in_tiny_run, monkeypatch):
    """From inside that folder neither. ~ is expanded where no shell does."""
    monkeypatch.setattr(evaluation, "RESULTS", in_tiny_run)
    monkeypatch.setenv("HOME", str(in_tiny_run))
    with pytest.raises(InputError, match="is not written to: pass --output"):
        evaluate()
    monkeypatch.chdir("pets")
    for output, folder in ((None, "."), ("~/new", "../new")):
        evaluate("~/digits_resnet18.pth", ("~/pets",), output=output)
        assert Path(folder, "digits_resnet18.ood.json").exists()


def test_runs_with_validation_never_read_the_test_images(in_tiny_run, command, monkeypatch):
    """Nor does their evaluation, of a pattern, of which some files are none of them."""
    read = mock.Mock(side_effect=ood_data.CLOSED_SETS["digits"])
    monkeypatch.setitem(ood_data.CLOSED_SETS, "digits", read)
    train_quietly("digits", "v.pth", epochs=1, batch_size=128, validation=200)
    flags = "--split validation --ood-types blob --checkpoint ?.pth ?8.pth"
    status, _, err = command(f"test.py {flags}")
    assert status == 1 and "No checkpoint at ?8.pth" in err
    assert "--split validation needs a run of" in err  # unlike a.pth
    assert {is_train for (_, is_train), _ in read.call_args_list} == {True}
    log, results = read_json("v.json"), read_json("v.val.ood.json")  # not that of test images
    accuracy = log["epochs"][0]["validation_accuracy"]
    assert results["error_rate"] == pytest.approx(100 * (1 - accuracy))
    *_, row = results["rows"]
    assert (row["set"], row["positives"], row["negatives"]) == ("blob", 200, 40)
    assert evaluate("v.pth")[0]["sets"]["closed set"]["images"] == 360  # now the test images
    Path("v.json").write_text(json.dumps(log | {"tested_on": "others"}))
    status, _, err = command("test.py --split validation --checkpoint v.pth")
    assert status == 2 and "v.pth did not hold out these" in err
    status, out, _ = command("experiments/compare.py [v].val.ood.json")
    assert status == 0 and "v.val: one run" in out


@pytest.fixture
def bad_files(in_tiny_run, monkeypatch):
    """Each has something wrong. Nothing may be trained, nor written."""
    for folder in ("pets/test", "none/train", "broken/train"):
        Path(folder, "bird").mkdir(parents=True)
    shutil.copytree("pets/train/cat", "pets/train/wolf")
    for name in "bcd":
        Path(f"broken/train/bird/{name}.png").write_bytes(b"no picture")
    Image.new("I;16", (32, 32)).save("broken/train/bird/a.tiff")
    Path("loop.pth").symlink_to("loop.pth")
    torch.save({"fc.weight": Path()}, "code.pth")  # to load it is to call its class
    for name in ("two.pth", "a.pth"):
        shutil.copy("whole.pth", name)
    Path("whole.json").write_text("{")
    monkeypatch.setattr(torch.Tensor, "backward", None)
    monkeypatch.setattr(ood_utils, "write_file", None)


@pytest.mark.parametrize("line,message", [
    ("train.py --dataset nosuch", f"'nosuch': use {', '.join(ood_data.CLOSED_SETS)}, or"),
    ("train.py --dataset cifar100 --data-root empty", "under empty, .*: copy it"),
    ("train.py --dataset pets", "pets: train/ and test/ do not both have bird, wolf"),
    ("train.py --dataset none", "none/train/bird holds no image"),
    ("train.py --dataset broken", "remove 4 files: .*/a.tiff .* 8 bits.*/b.png .*/c.png is [^,]*$"),
    ("train.py --dataset digits --batch-size 359", "1437 images leave a batch of 1"),
    ("train.py --checkpoint a.ood.pth", "a.ood.pth cannot be a checkpoint"),
    ("train.py --dataset pets --checkpoint a.pth --resume", "a.json is damaged, old, or the log"),
    ("train.py --epochs 0", "^error: --epochs 0: Input should be greater than 0.$"),
    ("test.py --checkpoint loop.pth", "No checkpoint at loop.pth"),
    ("test.py --dataset cifar10", "No checkpoint at cifar10_resnet18.pth: run `python train.py`"),
    ("test.py --checkpoint whole.pth", "whole.json is damaged"),
    ("test.py --checkpoint code.pth", "code.pth is damaged, or no state dict of plain tensors"),
    ("test.py --checkpoint two.pth", "no log and 2 classes: pass --dataset"),
    ("test.py --checkpoint two.pth --dataset digits", "on 2 classes, not on these: pass"),
    (f"{DIGITS} svhn fog", f"'fog': use {', '.join([*ood_data.NOISES, *ood_data.OOD_IMAGES])}, or"),
    (f"{DIGITS} a/x b/x", "Two sets would be named 'x'"),
])  # fmt: skip
def test_bad_input_ends_in_one_line(line, message, bad_files, command):
    status, _, err = command(line)
    *notes, error = err.splitlines()
    assert status == 2 and all(note.startswith("device: ") for note in notes), err
    assert error.startswith("error: ") and re.search(message, error), error


def test_ctrl_c_ends_with_status_130(in_tiny_run, command, monkeypatch):
    """Of a run with the name of an unfinished one, whose file is moved to a free name."""
    before = files_of("cut")
    Path("cut.1.pth").touch()
    monkeypatch.setattr(torch.Tensor, "backward", mock.Mock(side_effect=KeyboardInterrupt))
    status, out, err = command("train.py --dataset pets --checkpoint cut.pth --batch-size 8")
    assert status == 130 and "--resume continues" in err
    assert "kept the earlier cut.resume.pth as cut.2.resume.pth\n" in out
    assert files_of("cut.2") == before


def test_the_published_test_pass_is_a_test_in_train_mode(in_tiny_run):
    """The statistics that a network has after the usual loop without model.eval()."""
    loader = train.get_loader(False, "digits", batch_size=128)
    model, full = (train.load_network("digits_resnet18.pth") for _ in range(2))
    full.train()
    with torch.no_grad():
        for images, _ in loader:  # 128, 128 and 104
            full(images)
    published_test_pass.published_test_pass(model, loader.images, np.arange(360))
    assert not model.training
    torch.testing.assert_close(model.state_dict(), full.state_dict(), rtol=1e-4, atol=1e-5)


def test_detectors_are_those_of_the_library(in_tiny_run):
    """MaxSoftmax is test.py's MSP; KNN is the distance to the 50th neighbour, by torch.cdist."""
    path = "digits_resnet18.pth"
    config = evaluation.Config((path,), ood_types=("photos",), output=".", device="cpu")
    aurocs = {row["detector"]: row for row in detectors.compare(config)["rows"]}
    assert list(aurocs.values()) == read_json("detectors.json")["rows"]
    for row in map(aurocs.get, ("MaxSoftmax", "MaxLogit", "EnergyBased", "Entropy")):
        assert row["auroc"] == pytest.approx(row["auroc_of_test_py"], abs=0.01)
    training, closed = (train.get_loader(is_train, "digits", False) for is_train in (True, False))
    loaders = training, closed, ood_data.build_ood_loader("photos", 72)
    model = train.load_network(path)
    known, *others = [normalize(get_features(model, loader).double()) for loader in loaders]
    scores = [-torch.cdist(one, known).kthvalue(50)[0] for one in others]
    expected = 100 * get_performance(*scores)[0]
    assert aurocs["KNN"]["auroc"] == pytest.approx(expected, abs=0.05)
