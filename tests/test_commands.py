"""The command lines as a user starts them: digits from end to end, the report, bad input."""

import hashlib
import os
import re
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import files_of, read_json, train_quietly, write_class_folder, write_images
from sklearn.metrics import average_precision_score, roc_auc_score

import ood_data
import ood_utils
import test as evaluation
import train


def test_digits_from_end_to_end(tmp_path, monkeypatch, command):
    """With the network of build_network: a line per epoch, checkpoint and log, then the report."""
    monkeypatch.chdir(tmp_path)
    flags = "--dataset digits --epochs 2 --lr 0.05 --batch-size 240 --device cpu"
    status, out, _ = command("train.py", *flags.split())
    _, *lines, wrote = out.splitlines()
    assert status == 0 and wrote == "wrote digits_resnet18.pth"
    assert set(files_of(tmp_path, "digits_resnet18")) == {".json", ".pth"}
    epochs = read_json("digits_resnet18.json")["epochs"]
    assert epochs[1]["loss"] < epochs[0]["loss"]
    for epoch, line in zip(epochs, lines, strict=True):
        assert f"loss {epoch['loss']:.4f} " in line
        assert f"accuracy {100 * epoch['test_accuracy']:.2f}% " in line

    sets = ("gaussian", "rademacher", "blob", "photos")
    status, out, _ = command("test.py", "--dataset", "digits", "--ood-types", *sets)
    report, tables = out.split("\n\n", 1)
    error_rate, *lines = report.splitlines()
    assert status == 0 and lines[1::2] == [f"ood type: {name}" for name in sets]
    assert "mean of noises" in tables and "published" not in tables  # those are CIFAR-100's
    written = [f"digits_resnet18.ood.{ending}" for ending in ("npz", "json", "png")]
    assert out.splitlines()[-3:] == [f"wrote {name}" for name in written]

    results, arrays = read_json(written[1]), np.load(written[0])
    digest = hashlib.sha256((tmp_path / "digits_resnet18.pth").read_bytes()).hexdigest()
    assert results["checkpoints"][0]["sha256"] == digest
    correct = arrays["labels"] == arrays["predictions/closed set"]
    assert error_rate == f"Error Rate {100 * (1 - correct.mean()):.4f}"
    rows = {(row["set"], row["score"]): row for row in results["rows"]}
    for column, score in enumerate(arrays["score_names"]):
        closed = arrays["scores/closed set"][:, column]
        for name in sets:
            row, is_in = rows[name, score], np.repeat([1, 0], [360, 72])
            both = np.r_[closed, arrays[f"scores/{name}"][:, column]]
            out_aupr = average_precision_score(1 - is_in, -both)
            assert row["auroc"] == pytest.approx(100 * roc_auc_score(is_in, both), abs=1e-10)
            assert row["aupr_out"] == pytest.approx(100 * out_aupr, abs=1e-10)
            assert row["chance_aupr"] == pytest.approx(100 * 5 / 6)
    for line, name in zip(lines[::2], ("right / wrong", *sets), strict=True):
        form = "AUROC: {auroc:.4f}, AUPR: {aupr:.4f}, FPR95: {fpr95:.4f}"
        assert line == form.format(**rows[name, evaluation.Config.score])


def test_the_files_are_there_before_the_report(in_tiny_run, monkeypatch):
    """`python test.py | head -1` leaves them."""
    monkeypatch.setattr(evaluation, "print_report", mock.Mock(side_effect=BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        evaluation.evaluate(evaluation.Config("digits_resnet18.pth", ood_types="blob"))
    assert set(files_of(in_tiny_run, "digits_resnet18.ood")) == {".npz", ".json", ".png"}


def test_unavailable_sets_are_skipped_and_files_kept(in_tiny_run, command, no_network, monkeypatch):
    """In a report of another score than MSP; a reader that fails is named by file and line."""
    monkeypatch.setitem(ood_data.OOD_IMAGES, "tapes", lambda *args: os.listdir("no such tape"))
    flags = ["--dataset", "digits", "--data-root", in_tiny_run, "--score", "gen", "--ood-types"]
    status, out, _ = command("test.py", *flags, "svhn", "tapes", "gaussian")
    results = read_json("digits_resnet18.ood.json")
    (row,) = (row for row in results["rows"] if (row["set"], row["score"]) == ("gaussian", "gen"))
    assert status == 1 and f"ood type: gaussian\nAUROC: {row['auroc']:.4f}," in out
    for name, reason in (("svhn", "SVHN is missing"), ("tapes", "tape' (test_commands.py:")):
        assert reason in results["skipped"][name]
        assert f"ood type: {name}\nskipped: {results['skipped'][name]}\n" in out

    before = files_of(in_tiny_run, "digits_resnet18")
    status, out, _ = command("test.py", *flags, "svhn")
    assert status == 1 and "skipped: " in out and "wrote" not in out
    assert files_of(in_tiny_run, "digits_resnet18") == before


@pytest.mark.parametrize("shift,missing", [(0, "misclassified"), (1, "correctly classified")])
def test_an_empty_half_of_the_split_is_named(shift, missing, in_tiny_run, command, monkeypatch):
    images, _, classes = ood_data.read_closed_set("digits", train=False)
    logits, _ = ood_utils.get_logits(train.load_network("digits_resnet18.pth"), [images])
    labels = (logits.argmax(1) + shift) % 10
    monkeypatch.setitem(ood_data.CLOSED_SETS, "digits", lambda *args: (images, labels, classes))
    _, out, _ = command("test.py", "--dataset", "digits", "--ood-types", "blob")
    assert out.startswith(f"Error Rate {100.0 * shift:.4f}\nAUROC: n/a, ")
    assert f"no {missing} image" in out
    assert re.search(r"\| right / wrong +\| +n/a \|", out)


def test_own_images_as_closed_set_and_ood_set(in_tiny_run, command):
    """The folder's set has the folder's name; closed set and stem are known from the log."""
    write_images(in_tiny_run / "far/labels", 3)  # also the name of an array in the .npz
    train_quietly("pets", "new.pth", epochs=1, stem="cifar")
    flags = ["--ood-types", "far/labels", "photos", "--checkpoint"]
    status, out, err = command("test.py", *flags, "new.pth")
    assert status == 0 and "ood type: labels\n" in out and "note" not in err
    rows = read_json("new.ood.json")["rows"]
    counts = {row["set"]: (row["positives"], row["negatives"]) for row in rows}
    assert counts["photos"] == counts["labels"] == (10, 2)
    assert "an unfinished run, 1 of 4 epochs" in command("test.py", *flags, "cut.pth")[2]

    moved = (in_tiny_run / "pets").rename(in_tiny_run / "moved")  # the same classes
    assert command("test.py", *flags, "new.pth", "--dataset", "moved")[0] == 0
    for split in ("train", "test"):
        (moved / split / "dog").rename(moved / split / "wolf")
    status, _, err = command("test.py", *flags, "new.pth", "--dataset", "moved")
    assert status == 2 and "was trained on" in err


def test_help_lists_what_the_tables_hold(command, monkeypatch):
    helps = [command(script, "--help")[1] for script in ("train.py", "test.py")]
    of_train, of_test = (" ".join(text.replace("│", " ").split()) for text in helps)
    for name in (*ood_data.NOISES, *ood_data.OOD_IMAGES, *ood_utils.SCORES):
        assert name in of_test
    for text in (of_train, of_test):
        assert ", ".join(ood_data.CLOSED_SETS) in text
    assert f"(default: {train.Config.epochs})" in of_train
    status, _, err = command("train.py", "--stem", "resnet")
    assert status == 2 and "imagenet" in err
    monkeypatch.setenv("COLUMNS", "3")
    assert command("train.py", "--help")[0] == 0  # it ends


# Bad input: script, flags, what stderr says. {f} is a folder made by bad_folder().
BAD = [
    ("train.py", "--dataset nosuch", "Unknown data set 'nosuch': use " + ood_data.CLOSED_SET_NAMES),
    ("train.py", "--dataset digits --device abacus", "Device 'abacus' cannot be used"),
    ("train.py", "--dataset digits --device cuda:99", "Device 'cuda:99' cannot be used"),
    ("train.py", "--dataset cifar100 --data-root {f}/empty", "under {f}/empty .*: copy it"),
    ("train.py", "--dataset {f}/no_test", "no_test needs images in .* test/<class>/"),
    ("train.py", "--dataset {f}/other", "only one of train/ and test/ has the class bird"),
    ("train.py", "--dataset {f}/unreadable", "dog/broken.png is not a readable image"),
    ("train.py", "--dataset digits --batch-size 359", "1437 images leave a last batch of 1"),
    ("train.py", "--epochs 100 --milestones 0.5 80", "pass --milestones 0.5 0.8"),
    ("train.py", "--label-smoothing 1.5", "--label-smoothing must lie between 0 and 1"),
    ("train.py", "--dataset digits --checkpoint {f}/ten.pth/a.pth", "ten.pth"),
    ("test.py", "--dataset digits", "No checkpoint at digits_resnet18.pth. Run `python train.py`"),
    ("test.py", "--dataset digits --ood-types fog --checkpoint {f}/ten.pth", "OOD type 'fog'"),
    ("test.py", "--dataset cifar10 --ood-types cifar10 --checkpoint {f}/ten.pth", "set itself"),
    ("test.py", "--dataset digits --checkpoint {f}/ten.pth --ood-types {f}/a/x {f}/b/x", "'x'"),
    ("test.py", "--dataset digits --checkpoint {f}/code.pth", "code.pth is damaged, or holds code"),
    ("test.py", "--dataset digits --checkpoint {f}/two.pth", "trained on 2 classes, not on digits"),
    ("test.py", "--dataset digits --output {f} --checkpoint {f}/ten.pth {f}/a/ten.pth", "same"),
]  # fmt: skip


class Payload:
    def __reduce__(self):
        return sys.exit, ("a pickle's code was executed",)


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory, tiny_folder):
    """Closed sets and checkpoints, each with one thing wrong."""
    folder = tmp_path_factory.mktemp("bad")
    write_class_folder(folder / "unreadable")
    (folder / "unreadable/train/dog/broken.png").write_bytes(b"no picture")
    for path in ("train/cat", "test/cat", "test/bird", "../no_test/train/cat", "../a/x", "../b/x"):
        write_images(folder / "other" / path, 1)
    torch.save({"fc.weight": Payload()}, folder / "code.pth")
    for name, run in (("ten", "digits_resnet18"), ("two", "a"), ("a/ten", "a")):
        shutil.copy(tiny_folder / f"{run}.pth", folder / f"{name}.pth")
    return folder


@pytest.mark.parametrize("script,flags,message", BAD, ids=[" ".join(case[:2]) for case in BAD])
@pytest.mark.usefixtures("no_network", "tiny")
def test_bad_input_ends_in_one_line(script, flags, message, bad_folder, command, monkeypatch):
    monkeypatch.chdir(bad_folder)
    monkeypatch.setattr(torch.Tensor, "backward", None)  # nothing may be trained
    monkeypatch.setattr(ood_utils, "write_file", None)  # nor written
    status, _, err = command(script, *flags.format(f=bad_folder).split())
    lines = [line for line in err.splitlines() if not line.startswith("device: ")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert re.search(message.format(f=bad_folder), lines[0]), lines[0]


def test_ctrl_c_ends_with_status_130(in_tiny_run, command, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", mock.Mock(side_effect=KeyboardInterrupt))
    flags = "--dataset pets --checkpoint new.pth --batch-size 8 --device cpu"
    status, _, err = command("train.py", *flags.split())
    assert status == 130 and "--resume continues" in err and "Traceback" not in err
