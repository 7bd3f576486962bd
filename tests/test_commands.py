"""The command lines as a user starts them: digits from end to end, the report, bad input."""

import contextlib
import hashlib
import io
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, same_bits, tiny_network, train_quietly, write_class_folder, write_images
from PIL import Image
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
    device, *epochs, wrote = out.splitlines()
    assert re.fullmatch(r"device: cpu .*, \d+ threads, (bfloat16|float32)", device)
    assert status == 0 and wrote == "wrote digits_resnet18.pth"
    pattern = r"epoch   \d/2  loss (\S+)  test accuracy (\S+)%  lr \S+  .* s  \d+ images/s  .* left"
    printed = [re.fullmatch(pattern, line).groups() for line in epochs]
    assert float(printed[-1][0]) < float(printed[0][0])
    torch.load("digits_resnet18.pth", weights_only=True)
    files = {path.name for path in tmp_path.glob("digits*")}
    assert files == {"digits_resnet18.json", "digits_resnet18.pth"}
    log = json.loads((tmp_path / "digits_resnet18.json").read_text())
    figures = [(epoch["loss"], 100 * epoch["test_accuracy"]) for epoch in log["epochs"]]
    assert [(f"{loss:.4f}", f"{accuracy:.2f}") for loss, accuracy in figures] == printed

    sets = ("gaussian", "rademacher", "blob", "photos")
    status, out, err = command("test.py", "--dataset", "digits", "--ood-types", *sets)
    assert status == 0 and err.startswith("device: ")
    report, tables = out.split("\n\n", 1)
    lines = report.splitlines()
    assert lines[2::2] == [f"ood type: {name}" for name in sets] and len(lines) == 10
    assert "mean of noises" in tables and "published" not in tables  # those are CIFAR-100's
    written = [f"digits_resnet18.ood.{ending}" for ending in ("npz", "json", "png")]
    assert out.splitlines()[-3:] == [f"wrote {name}" for name in written]

    results = json.loads((tmp_path / written[1]).read_text())
    arrays = np.load(written[0])
    (checkpoint,) = results["checkpoints"]
    digest = hashlib.sha256((tmp_path / "digits_resnet18.pth").read_bytes()).hexdigest()
    assert checkpoint["sha256"] == digest and results["skipped"] == {}
    assert arrays["scores/closed set"].dtype == np.float64
    correct = arrays["labels"] == arrays["predictions/closed set"]
    assert lines[0] == f"Error Rate {100 * (1 - correct.mean()):.4f}"
    rows = {(row["set"], row["score"]): row for row in results["rows"]}
    for column, score in enumerate(arrays["score_names"]):
        closed = arrays["scores/closed set"][:, column]
        assert np.mean(closed >= checkpoint["threshold"][score]) >= 0.95
        assert np.mean(closed > checkpoint["threshold"][score]) < 0.95
        for name in sets:
            row, is_in = rows[name, score], np.repeat([1, 0], [360, 72])
            both = np.r_[closed, arrays[f"scores/{name}"][:, column]]
            out_aupr = average_precision_score(1 - is_in, -both)
            assert row["auroc"] == pytest.approx(100 * roc_auc_score(is_in, both), abs=1e-10)
            assert row["aupr_out"] == pytest.approx(100 * out_aupr, abs=1e-10)
            assert (row["positives"], row["negatives"]) == (360, 72)
            assert row["chance_aupr"] == pytest.approx(100 * 5 / 6)
    for line, name in zip(lines[1::2], ("right / wrong", *sets), strict=True):
        form = "AUROC: {auroc:.4f}, AUPR: {aupr:.4f}, FPR95: {fpr95:.4f}"
        assert line == form.format(**rows[name, "msp"])
    for row in results["sets"]:
        counts = np.bincount(arrays[f"predictions/{row['set']}"], minlength=10)
        shares = counts[counts > 0] / counts.sum()
        assert row["images"] == counts.sum()
        assert row["largest_share"] == pytest.approx(100 * counts.max() / counts.sum())
        assert row["effective_classes"] == pytest.approx(np.prod(shares**-shares))

    again = command("test.py", "--dataset", "digits", "--ood-types", "blob", "--batch-size", "97")
    assert again[1].splitlines()[3] == lines[7]


def test_the_files_are_there_before_the_report(in_tiny_run, monkeypatch):
    """`python test.py | head -1` leaves them."""

    def write(*args):
        raise BrokenPipeError

    monkeypatch.setattr(evaluation, "print_report", write)
    with pytest.raises(BrokenPipeError):
        evaluation.evaluate(evaluation.Config("digits_resnet18.pth", ood_types="blob"))
    endings = {path.suffix for path in in_tiny_run.glob("digits_resnet18.ood.*")}
    assert endings == {".npz", ".json", ".png"}


def test_tables_show_their_own_figures_and_the_published_run(capsys):
    """Every metric has a figure of its own, which says where a cell comes from."""
    config = {"dataset": "cifar100", "score": "msp", "ood_types": ["gaussian", "svhn", "photos"]}
    results = {"config": config, "skipped": {"blob": "no blob"}}
    results |= {"checkpoints": [], "rows": [], "sets": []}
    for i, path in enumerate(("a.pth", "b.pth")):
        training = {"settings": evaluation.PUBLISHED_RECIPE, "epochs_done": 100, "seed": i}
        run = {"path": path, "error_rate": 46.0 + i, "training": training, "group": "ours"}
        results["checkpoints"].append(run)
        for name in ("right / wrong", "gaussian", "svhn", "photos"):
            for score in ("msp", "a score of the file"):
                row = {"checkpoint": path, "set": name, "score": score, "group": "ours"}
                figures = {m: 10.0 + 2 * i + j for j, m in enumerate(evaluation.METRICS)}
                figures["auroc"] += 6 * (name == "photos")
                results["rows"].append(row | figures)
        for name in ("closed set", "svhn", "gaussian", "photos"):
            row = {"checkpoint": path, "set": name, "images": 10, "group": "ours"}
            row |= {"effective_classes": 5.0 + 2 * i, "largest_share": 20.0}
            results["sets"].append(row)
    evaluation.print_tables(results)
    out = capsys.readouterr().out
    assert "error rate 46.50 +- 0.71 (published 46.30)" in out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    tables = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    means = [f"{mean}.00 +- 1.41" for mean in (11, 12, 13, 14, 15)]
    assert ["svhn", *means, "6.00 +- 1.41", "66.97 / 91.65 / 89.05"] in tables
    assert ["right / wrong", *means, "", "81.98 / 85.74 / 73.39"] in tables
    assert ["blob", *["skipped"] * 6, "68.06 / 92.75 / 97.55"] in tables
    assert ["gaussian", *["11.00 +- 1.41"] * 2] in tables  # by the scores of the file
    assert ["mean of noises", *["11.00 +- 1.41"] * 2] in tables
    assert ["mean of image sets", *["14.00 +- 1.41"] * 2] in tables
    training["epochs_done"] = 99
    evaluation.print_tables(results)
    assert "published" not in capsys.readouterr().out


def test_unavailable_sets_are_skipped_and_files_kept(in_tiny_run, command, no_network, monkeypatch):
    """In a report of another score than MSP; a reader that fails is named by file and line."""

    def read(root, count):
        raise OSError("no such tape")

    monkeypatch.setitem(ood_data.OOD_IMAGES, "tapes", read)
    flags = ["--dataset", "digits", "--data-root", in_tiny_run, "--score", "gen", "--ood-types"]
    status, out, _ = command("test.py", *flags, "svhn", "tapes", "gaussian")
    path = in_tiny_run / "digits_resnet18.ood.json"
    results = json.loads(path.read_text())
    skipped = results["skipped"]
    assert status == 1 and skipped["svhn"].startswith("SVHN is missing")
    assert skipped["tapes"].startswith("no such tape (test_commands.py:")
    lines = ["ood type: svhn", f"skipped: {skipped['svhn']}", "ood type: tapes"]
    lines += [f"skipped: {skipped['tapes']}", "ood type: gaussian"]
    (row,) = (row for row in results["rows"] if (row["set"], row["score"]) == ("gaussian", "gen"))
    assert out.splitlines()[2:7] == lines
    assert out.splitlines()[7].startswith(f"AUROC: {row['auroc']:.4f},") and "\n| gen " in out

    before = path.stat().st_mtime_ns
    status, out, _ = command("test.py", *flags, "svhn")
    assert status == 1 and "skipped: " in out and "wrote" not in out
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("shift,missing", [(0, "misclassified"), (1, "correctly classified")])
def test_an_empty_half_of_the_split_is_reported_as_such(shift, missing, capsys, tmp_path):
    """20 images that a network gets all right or all wrong."""
    (tmp_path / "a.pth").touch()
    scores = {"closed set": np.random.default_rng(0).random((20, len(ood_utils.SCORES)))}
    labels, predictions = (np.arange(20) + shift) % 20, {"closed set": np.arange(20)}
    run, rows, sets = evaluation.measure_run(tmp_path / "a.pth", scores, predictions, labels)
    results = {"checkpoints": [run], "rows": rows, "sets": sets, "skipped": {}}
    results["config"] = {"dataset": "none", "score": "msp", "ood_types": []}
    results = evaluation.combine([], [results])
    evaluation.print_report(results, 1)
    evaluation.print_tables(results)
    error_rate, split, *tables = capsys.readouterr().out.splitlines()
    assert error_rate == f"Error Rate {100.0 * shift:.4f}"
    assert split == f"AUROC: n/a, AUPR: n/a, FPR95: n/a (no {missing} image)"
    assert any(re.match(r"\| right / wrong +\| +n/a \|", line) for line in tables)


def test_own_images_as_closed_set_and_ood_set(class_folder, tmp_path, command, monkeypatch, tiny):
    """The folder's set has the folder's name; closed set and stem are known from the log."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "far/labels", 3, seed=5)  # also the name of an array in the .npz
    train_quietly(class_folder, "a.pth", epochs=1, stem="cifar")
    flags = ["--checkpoint", "a.pth", "--ood-types", "far/labels", "photos"]
    status, out, err = command("test.py", *flags)
    assert status == 0 and "ood type: labels\n" in out and "note" not in err
    rows = json.loads((tmp_path / "a.ood.json").read_text())["rows"]
    counts = {row["set"]: (row["positives"], row["negatives"]) for row in rows}
    assert counts["photos"] == counts["labels"] == (10, 2)

    class_folder.rename("moved")  # the same classes
    assert command("test.py", *flags, "--dataset", "moved")[0] == 0
    for split in ("train", "test"):
        (tmp_path / "moved" / split / "dog").rename(tmp_path / "moved" / split / "wolf")
    status, _, err = command("test.py", *flags, "--dataset", "moved")
    assert status == 2 and "was trained on" in err


def test_an_unfinished_run_is_named_as_such(cut_run, command):
    flags = ["--checkpoint", cut_run[1], "--ood-types", "gaussian"]
    status, _, err = command("test.py", *flags)
    assert status == 0 and "is an unfinished run, 1 of 4 epochs" in err


@pytest.mark.parametrize("sets,checkpoints", [(1, 1), (6, 3)])
def test_the_picture_shows_every_run(sets, checkpoints):
    """Nothing but white along its borders; dots of the first group on every line."""
    names = ["right / wrong", *(f"a folder of images with a long name {i}" for i in range(sets))]
    paths = [f"{i}.pth" for i in range(checkpoints)]
    row = {"score": "msp", "auroc": 60.0}
    rows = [row | {"checkpoint": p, "group": p, "set": name} for p in paths for name in names]
    results = {"config": {"dataset": "cifar100", "score": "msp"}, "rows": rows}
    training = {"accuracy": [0.1, 0.4], "settings": {}, "epochs_done": 2}
    results["checkpoints"] = [{"path": p, "group": p, "training": training} for p in paths]
    with Image.open(io.BytesIO(evaluation.draw(results))) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for border in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert (border == 255).all()
    blue = pixels[..., 2] - pixels[..., 0] > 80
    assert blue.sum() > 30 * len(names)


def test_help_lists_what_the_tables_hold(command, monkeypatch):
    helps = [command(script, "--help")[1] for script in ("train.py", "test.py")]
    of_train, of_test = (" ".join(text.replace("│", " ").split()) for text in helps)
    for name in (*ood_data.NOISES, *ood_data.OOD_IMAGES, *ood_utils.SCORES, *ood_data.CLOSED_SETS):
        assert name in of_test
    assert f"(default: {train.Config.epochs})" in of_train
    assert ", ".join(ood_data.CLOSED_SETS) in of_train
    status, _, err = command("train.py", "--stem", "resnet")
    assert status == 2 and "imagenet" in err
    monkeypatch.setenv("COLUMNS", "3")
    assert command("train.py", "--help")[0] == 0  # it ends


# Bad input: script, flags, what stderr says. {f} is a folder made by bad_folder().
BAD = [
    ("train.py", "--dataset nosuch", "Unknown data set 'nosuch': use " + ood_data.CLOSED_SET_NAMES),
    ("train.py", "--dataset digits --device abacus", "Device 'abacus' cannot be used"),
    ("train.py", "--dataset digits --device cuda:99", "Device 'cuda:99' cannot be used"),
    ("train.py", "--dataset cifar100 --data-root {f}/damaged", "under {f}/damaged .*: copy it"),
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
    ("test.py", "--dataset cifar100 --checkpoint {f}/ten.pth --data-root {f}/a", "under {f}/a "),
    ("test.py", "--dataset digits --checkpoint {f}/code.pth", "code.pth is damaged, or holds code"),
    ("test.py", "--dataset digits --checkpoint {f}/two.pth", "trained on 2 classes, not on digits"),
    ("test.py", "--dataset digits --checkpoint {f}/logged.pth", "on letters, not on digits"),
    ("test.py", "--dataset digits --output {f} --checkpoint {f}/ten.pth {f}/a/ten.pth", "same"),
]  # fmt: skip


class Payload:
    """Loaded by a pickle that executes code, it creates a file."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    """Closed sets and checkpoints, each with one thing wrong."""
    folder = tmp_path_factory.mktemp("bad")
    write_class_folder(folder / "unreadable")
    (folder / "unreadable/train/dog/broken.png").write_bytes(b"no picture")
    for path in ("train/cat", "test/cat", "test/bird", "../no_test/train/cat", "../a/x", "../b/x"):
        write_images(folder / "other" / path, 1)
    (folder / "damaged/cifar-100-python").mkdir(parents=True)
    (folder / "damaged/cifar-100-python/train").write_bytes(b"half a pickle")
    torch.save(tiny_network(2).state_dict(), folder / "two.pth")
    torch.save({"fc.weight": Payload()}, folder / "code.pth")
    for name in ("ten", "a/ten", "logged"):
        torch.save(tiny_network(10).state_dict(), folder / f"{name}.pth")
    config = {"dataset": "letters", "stem": "imagenet", "epochs": 1}
    log = {"config": config, "classes": list("abcdefghij"), "epochs": [{}]}
    (folder / "logged.json").write_text(json.dumps(log))
    return folder


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize("script,flags,message", BAD, ids=[" ".join(case[:2]) for case in BAD])
def test_bad_input_ends_in_one_line(
    script, flags, message, bad_folder, command, monkeypatch, no_network, tiny
):
    monkeypatch.chdir(bad_folder)
    monkeypatch.setattr(torch.Tensor, "backward", None)  # nothing may be trained
    before = contents(bad_folder)
    status, out, err = command(script, *flags.format(f=bad_folder).split())
    lines = [line for line in err.splitlines() if not line.startswith("device: ")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert re.search(message.format(f=bad_folder), lines[0]), lines[0]
    assert contents(bad_folder) == before  # nor written


def test_ctrl_c_ends_with_status_130(class_folder, tmp_path, command, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "backward", interrupt)
    flags = ["--dataset", class_folder, "--checkpoint", tmp_path / "a.pth", "--batch-size", 8]
    status, _, err = command("train.py", *flags, "--device", "cpu")
    assert status == 130 and "--resume continues" in err and "Traceback" not in err


@pytest.mark.slow
def test_the_real_command_survives_ten_kills(tmp_path):
    """`python train.py --dataset digits` killed at random moments and resumed."""

    def start(name, *flags):
        options = ["--dataset", "digits", "--epochs", "12", "--checkpoint", f"{name}.pth", *flags]
        return subprocess.Popen([sys.executable, ROOT / "train.py", *options], cwd=tmp_path)

    assert start("whole").wait() == 0
    moments, kills = random.Random(0), 0
    while kills < 10:
        run = start("cut", "--resume")
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(moments.uniform(4, 24))
        if run.poll() is None:
            run.kill()
            kills += 1
        run.wait()
        for path in tmp_path.glob("cut*.pth"):
            torch.load(path, weights_only=True)
        if run.returncode == 0:
            (tmp_path / "cut.pth").unlink()  # finished: the next one starts anew
    assert start("cut", "--resume").wait() == 0
    assert same_bits(tmp_path / "whole.pth", tmp_path / "cut.pth")
