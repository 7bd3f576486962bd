"""The command lines as a user starts them: digits from end to end, the report, bad input."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import evaluate, files_of, read_json, train_quietly, write_images

import ood_data
import ood_utils
import test as evaluation
import train
from ood_utils import InputError


def test_digits_from_end_to_end(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    flags = "--dataset digits --epochs 2 --lr 0.05 --batch-size 240 --device cpu"
    status, out, _ = command("train.py", *flags.split())
    _, *lines, wrote = out.splitlines()
    assert status == 0 and wrote == "wrote digits_resnet18.pth"
    assert set(files_of("digits_resnet18")) == {".json", ".pth"}
    epochs = read_json("digits_resnet18.json")["epochs"]
    assert epochs[1]["loss"] < epochs[0]["loss"]
    for epoch, line in zip(epochs, lines, strict=True):
        shown = f"loss {epoch['loss']:.4f}  test accuracy {100 * epoch['test_accuracy']:.2f}% "
        assert shown in line

    sets = ("gaussian", "rademacher", "blob", "photos")
    status, out, _ = command("test.py", "--dataset", "digits", "--ood-types", *sets)
    report, tables = out.split("\n\n", 1)
    error_rate, *lines = report.splitlines()
    assert status == 0 and lines[1::2] == [f"ood type: {name}" for name in sets]
    assert re.search(r"\| right / wrong +\| +\d", tables)
    name = "digits_resnet18.ood"
    assert tables.splitlines()[-1] == f"wrote {name}.json and {name}.npz"

    results, arrays = read_json(f"{name}.json"), np.load(f"{name}.npz")
    digest = hashlib.sha256(Path("digits_resnet18.pth").read_bytes()).hexdigest()
    assert read_json("digits_resnet18.json")["sha256"] == digest
    kinds = {name: (one["kind"], one["images"]) for name, one in results["sets"].items()}
    assert kinds["blob"] == ("noise", 72) and kinds["photos"] == ("images", 72)
    correct = arrays["labels"] == arrays["predictions/closed set"]
    assert error_rate == f"Error Rate {100 * (1 - correct.mean()):.4f}"
    rows = {row["set"]: row for row in results["rows"] if row["score"] == evaluation.Config.score}
    assert (rows["blob"]["positives"], rows["blob"]["negatives"]) == (360, 72)
    for line, name in zip(lines[::2], ("right / wrong", *sets), strict=True):
        form = "AUROC: {auroc:.4f}, AUPR: {aupr:.4f}, FPR95: {fpr95:.4f}"
        assert line == form.format(**rows[name])


def test_scores_are_kept_and_shown_each_on_its_own(in_tiny_run, command, monkeypatch):
    """`python test.py | head -1` leaves the files; a full disk leaves the report."""
    full, closed = mock.Mock(side_effect=OSError(28, "full", "x")), BrokenPipeError
    with monkeypatch.context() as patch:
        patch.setattr(ood_utils, "write_file", full)
        status, out, err = command("test.py", "--dataset", "digits", "--ood-types", "blob")
    assert status == 2 and "AUROC" in out and "full" in err and err.count("\n") == 3
    monkeypatch.setattr(evaluation, "print_report", mock.Mock(side_effect=closed))
    with pytest.raises(closed):
        evaluate()
    assert set(files_of("digits_resnet18.ood")) == {".npz", ".json"}


def test_unavailable_sets_are_skipped_in_their_place(in_tiny_run, command, no_network):
    """In a report of another score than MSP; a set that is a mistake stops the command."""
    flags = ["--dataset", "digits", "--data-root", ".", "--score", "gen", "--ood-types", "svhn"]
    status, out, _ = command("test.py", *flags, "gaussian")
    results = read_json("digits_resnet18.ood.json")
    rows = {row["score"]: row for row in results["rows"] if row["set"] == "gaussian"}
    skipped = f"ood type: svhn\nskipped: {results['skipped']['svhn']}\nood type: gaussian\n"
    assert status == 1 and f"{skipped}AUROC: {rows['gen']['auroc']:.4f}," in out
    assert "SVHN is missing" in results["skipped"]["svhn"]
    status, _, err = command("test.py", *flags, "fog")
    assert status == 2 and "Unknown OOD type 'fog'" in err


def test_another_evaluation_is_moved_not_replaced(in_tiny_run, capsys):
    """Of other sets or another seed; an equal one stays as it is."""
    evaluate()
    first = files_of("digits_resnet18.ood")
    evaluate()
    assert "kept" not in capsys.readouterr().out and files_of("digits_resnet18.ood") == first
    evaluate(ood_types=("photos",))
    assert "digits_resnet18.ood.json as digits_resnet18.1.ood.json" in capsys.readouterr().out
    second = files_of("digits_resnet18.ood")
    evaluate(seed=1)
    assert files_of("digits_resnet18.1.ood") == first
    assert files_of("digits_resnet18.2.ood") == second


@pytest.mark.parametrize("shift,missing", [(0, "misclassified"), (1, "correctly classified")])
def test_an_empty_half_of_the_split_is_named(shift, missing, in_tiny_run, command, monkeypatch):
    images, _, classes = ood_data.read_closed_set("digits", train=False)
    loader = train.get_loader(False, "digits")
    logits, _ = ood_utils.get_logits(train.load_network("digits_resnet18.pth"), loader)
    labels = (logits.argmax(1) + shift) % 10
    monkeypatch.setitem(ood_data.CLOSED_SETS, "digits", lambda *args: (images, labels, classes))
    _, out, _ = command("test.py", "--dataset", "digits", "--ood-types", "blob")
    assert out.startswith(f"Error Rate {100.0 * shift:.4f}\nAUROC: n/a, ")
    assert f"no {missing} image" in out
    assert re.search(r"\| right / wrong +\| +n/a +\|", out)


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
    assert len(np.load("new.ood.npz")["files/labels"]) == 2
    status, _, err = command("test.py", *flags, "cut.resume.pth")
    assert status == 0 and "is unfinished, 1 of 4 epochs" in err

    moved = (in_tiny_run / "pets").rename(in_tiny_run / "moved")  # the same classes
    assert command("test.py", *flags, "new.pth", "--dataset", "moved")[0] == 0
    for split in ("train", "test"):
        (moved / split / "dog").rename(moved / split / "wolf")
    status, _, err = command("test.py", *flags, "new.pth", "--dataset", "moved")
    assert status == 2 and "was trained on" in err


def test_several_checkpoints_are_independent(in_tiny_run, command, monkeypatch):
    """Scores that are not finite cost no other checkpoint."""
    state = torch.load("digits_resnet18.pth", weights_only=True)
    *_, bias = state
    for name, shift in (("bad", 1e30), ("good", 0.1)):
        torch.save(state | {bias: state[bias] + shift}, f"{name}.pth")
    monkeypatch.setitem(ood_utils.SCORES, "square", lambda logits: logits.float().square().sum(1))
    flags = ["--dataset", "digits", "--ood-types", "blob", "--checkpoint", "bad.pth"]
    status, out, err = command("test.py", *flags, "good.pth", "digits_resnet18.pth")
    assert status == 1 and "bad.pth: scores of closed set are not finite" in err
    assert out.count("Error Rate") == 2 and Path("digits_resnet18.ood.json").exists()
    status, _, err = command("test.py", *flags)
    assert status == 2 and "bad.pth: scores of" in err


@pytest.mark.parametrize("shift,fits", [(0.0055, True), (-0.0055, True), (0.0057, False)])
def test_old_weights_under_new_code_are_refused(shift, fits, in_tiny_run):
    """They load, but compute something else than the log says. Two of 360 images may differ."""
    log = read_json("digits_resnet18.json")
    log["epochs"][-1]["test_accuracy"] += shift
    Path("digits_resnet18.json").write_text(json.dumps(log))
    message = r"error rate of .*, but .* by its log"
    with contextlib.nullcontext() if fits else pytest.raises(InputError, match=message):
        evaluate(ood_types=())


def test_the_checkpoint_edited_in_train_is_the_default(monkeypatch):
    monkeypatch.setattr(train.Config, "checkpoint", "nosuch.pth")
    with pytest.raises(InputError, match="No checkpoint at nosuch.pth"):
        evaluation.evaluate()


def test_the_shipped_results_are_not_written_to_by_default(in_tiny_run, monkeypatch):
    """From inside that folder neither."""
    path = in_tiny_run / "digits_resnet18.pth"
    monkeypatch.setattr(evaluation, "RESULTS", in_tiny_run)
    with pytest.raises(InputError, match="is not written to: pass --output"):
        evaluate(path)
    (in_tiny_run / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    evaluate(path)
    assert os.path.exists("digits_resnet18.ood.json")
    evaluate(path, output=in_tiny_run)
    assert path.with_suffix(".ood.json").exists()


def test_a_run_with_validation_never_reads_the_test_images(in_tiny_run, command, monkeypatch):
    read = mock.Mock(side_effect=ood_data.CLOSED_SETS["digits"])
    monkeypatch.setitem(ood_data.CLOSED_SETS, "digits", read)
    train_quietly("digits", "v.pth", epochs=1, batch_size=128, validation=200)
    (epoch,) = read_json("v.json")["epochs"]
    flags = ["--split", "validation", "--ood-types", "blob", "--checkpoint"]
    status, _, _ = command("test.py", *flags, "v.pth")
    assert status == 0 and {is_train for (_, is_train), _ in read.call_args_list} == {True}
    results = read_json("v.val.ood.json")  # not the name of the test images' figures
    assert results["error_rate"] == pytest.approx(100 * (1 - epoch["validation_accuracy"]))
    *_, row = results["rows"]
    assert (row["set"], row["positives"], row["negatives"]) == ("blob", 200, 40)
    status, _, err = command("test.py", *flags, "digits_resnet18.pth")
    assert status == 2 and "--validation NUMBER" in err
    train_quietly("digits", "w.pth", epochs=1, batch_size=128, validation=100)
    status, out, _ = command("test.py", *flags, "v.pth", "w.pth", "digits_resnet18.pth")
    assert status == 1 and out.count("Error Rate") == 2
    assert read_json("w.val.ood.json")["sets"]["closed set"]["images"] == 100


def test_help_lists_what_the_tables_hold(command):
    helps = [command(script, "--help")[1] for script in ("train.py", "test.py")]
    of_train, of_test = (" ".join(text.replace("│", " ").split()) for text in helps)
    for name in (*ood_data.NOISES, *ood_data.OOD_IMAGES, *ood_utils.SCORES):
        assert name in of_test
    for text in (of_train, of_test):
        assert ", ".join(ood_data.CLOSED_SETS) in text
    assert f"(default: {train.Config.epochs})" in of_train
    status, _, err = command("train.py", "--stem", "resnet")
    assert status == 2 and "imagenet" in err


# Bad input: script, flags, what stderr says. {f} is a folder made by bad_folder().
BAD = [
    ("train.py", "--dataset nosuch", "Unknown data set 'nosuch': use " + ood_data.CLOSED_SET_NAMES),
    ("train.py", "--dataset digits --device abacus", "Device 'abacus' cannot be used"),
    ("train.py", "--dataset digits --device cuda:99", "Device 'cuda:99' cannot be used"),
    ("train.py", "--dataset cifar100 --data-root {f}/empty", "under {f}/empty, .*: copy it"),
    ("train.py", "--dataset {f}/no_test", "no_test/test"),
    ("train.py", "--dataset {f}/other", "other: train/ and test/ do not both have bird"),
    ("train.py", "--dataset digits --batch-size 359", "1437 images leave a batch of 1"),
    ("train.py", "--epochs 0", "^error: --epochs 0: Input should be greater than 0.$"),
    ("train.py", "--milestones 0.5 80", "--milestones 80.0: Input should be less than or equal"),
    ("train.py", "--dataset digits --checkpoint {f}/ten.pth/a.pth", "ten.pth"),
    ("test.py", "--dataset digits", "No checkpoint at digits_resnet18.pth: run `python train.py`"),
    ("test.py", "--dataset cifar10 --ood-types cifar10 --checkpoint {f}/ten.pth", "the closed set"),
    ("test.py", "--dataset digits --checkpoint {f}/ten.pth --ood-types {f}/a/x {f}/b/x", "'x'"),
    ("test.py", "--dataset digits --checkpoint {f}/code.pth", "code.pth is damaged, or no state"),
    ("test.py", "--dataset digits --checkpoint {f}/two.pth", "trained on 2 classes, not on these"),
    ("test.py", "--checkpoint {f}/ten.pth", "no log and 10 classes: pass --dataset"),
]  # fmt: skip


class Payload:
    def __reduce__(self):
        return sys.exit, ("a pickle's code was executed",)


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory, tiny_folder):
    """Closed sets and checkpoints, each with one thing wrong."""
    folder = tmp_path_factory.mktemp("bad")
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
