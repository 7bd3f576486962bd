"""The command lines as a user starts them: digits from end to end, the report, bad input."""

import contextlib
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, Payload, same_bits, write_images
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

import ood_data
import ood_utils
import test as evaluation
import train

NUMBER = r"-?\d+\.\d{4}"
FIGURES = rf"AUROC: {NUMBER}, AUPR: {NUMBER}, FPR95: {NUMBER}"
NOISES_AND_PHOTOS = ("gaussian", "rademacher", "blob", "photos")


def test_train_prints_a_line_per_epoch_and_writes_checkpoint_and_log(digits_run):
    folder, out = digits_run
    device, *epochs, wrote = out.splitlines()
    assert re.fullmatch(r"device: cpu .*, \d+ threads, (bfloat16|float32)", device)
    assert wrote == "wrote digits_resnet18.pth"
    pattern = r"epoch   \d/2  loss (\S+)  test accuracy (\S+)%  lr \S+  .* s  \d+ images/s  .* left"
    printed = [re.fullmatch(pattern, line).groups() for line in epochs]
    assert float(printed[-1][0]) < float(printed[0][0])
    torch.load(folder / "digits_resnet18.pth", weights_only=True)
    files = {path.name for path in folder.glob("digits*") if "ood" not in path.name}
    assert files == {"digits_resnet18.json", "digits_resnet18.pth"}
    log = json.loads((folder / "digits_resnet18.json").read_text())
    figures = [(epoch["loss"], 100 * epoch["test_accuracy"]) for epoch in log["epochs"]]
    assert [(f"{loss:.4f}", f"{accuracy:.2f}") for loss, accuracy in figures] == printed


def test_the_report_has_the_published_form_and_files_agree_with_it(in_digits_run, command):
    status, out, err = command("test.py", "--dataset", "digits", "--ood-types", *NOISES_AND_PHOTOS)
    assert status == 0 and err.startswith("device: ")
    report, tables = out.split("\n\n", 1)
    lines = report.splitlines()
    assert re.fullmatch(rf"Error Rate {NUMBER}", lines[0]) and re.fullmatch(FIGURES, lines[1])
    assert lines[2::2] == [f"ood type: {name}" for name in NOISES_AND_PHOTOS]
    assert len(lines) == 10 and all(re.fullmatch(FIGURES, line) for line in lines[3::2])
    assert "mean of noises" in tables and "published" not in tables  # those are CIFAR-100's
    written = [f"digits_resnet18.ood.{ending}" for ending in ("npz", "json", "png")]
    assert out.splitlines()[-3:] == [f"wrote {name}" for name in written]

    results = json.loads((in_digits_run / written[1]).read_text())
    arrays = np.load(in_digits_run / written[0])
    (checkpoint,) = results["checkpoints"]
    digest = hashlib.sha256((in_digits_run / "digits_resnet18.pth").read_bytes()).hexdigest()
    assert checkpoint["sha256"] == digest and results["skipped"] == {}
    assert arrays["scores/closed set"].dtype == np.float64
    labels, predictions = arrays["labels"], arrays["predictions/closed set"]
    correct = labels == predictions
    assert lines[0] == f"Error Rate {100 * (1 - correct.mean()):.4f}"
    rows = {(row["set"], row["score"]): row for row in results["rows"]}
    for column, score in enumerate(arrays["score_names"]):
        closed = arrays["scores/closed set"][:, column]
        assert np.mean(closed >= checkpoint["threshold"][score]) >= 0.95
        assert np.mean(closed > checkpoint["threshold"][score]) < 0.95
        for name in NOISES_AND_PHOTOS:
            ood, row = arrays[f"scores/{name}"][:, column], rows[name, score]
            is_in = np.r_[np.ones(360), np.zeros(72)]
            both = np.r_[closed, ood]
            out_aupr = average_precision_score(1 - is_in, -both)
            assert row["auroc"] == pytest.approx(100 * roc_auc_score(is_in, both), abs=1e-10)
            assert row["aupr_out"] == pytest.approx(100 * out_aupr, abs=1e-10)
            assert (row["positives"], row["negatives"]) == (360, 72)
            assert row["chance_aupr"] == pytest.approx(100 * 5 / 6)
    for line, name in zip(lines[3::2], NOISES_AND_PHOTOS, strict=True):
        row = rows[name, "msp"]
        figures = [f"{row[metric]:.4f}" for metric in ("auroc", "aupr", "fpr95")]
        assert re.findall(NUMBER, line) == figures
    for row in results["sets"]:
        counts = np.bincount(arrays[f"predictions/{row['set']}"], minlength=10)
        shares = counts[counts > 0] / counts.sum()
        assert row["images"] == counts.sum()
        assert row["largest_share"] == pytest.approx(100 * counts.max() / counts.sum())
        assert row["effective_classes"] == pytest.approx(np.prod(shares**-shares))

    again = command("test.py", "--dataset", "digits", "--ood-types", "blob", "--batch-size", "97")
    assert again[1].splitlines()[3] == lines[7]


def test_the_files_are_there_before_the_report(in_digits_run, tmp_path):
    """`python test.py | head -1` leaves them."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    config = evaluation.Config(("digits_resnet18.pth",), ood_types=("blob",), output=str(tmp_path))
    with contextlib.redirect_stdout(Closed()), pytest.raises(BrokenPipeError):
        evaluation.evaluate(config)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"digits_resnet18.ood.{ending}" for ending in ("npz", "json", "png")}


def test_tables_show_their_own_figures_and_the_published_run(capsys):
    """Every metric has a figure of its own, which says where a cell comes from."""
    config = {"dataset": "cifar100", "score": "msp", "ood_types": ["gaussian", "svhn", "photos"]}
    results = {"config": config, "skipped": {"blob": "no blob"}}
    recipe = evaluation.PUBLISHED_RECIPE
    results |= {"checkpoints": [], "rows": [], "sets": []}
    for i, path in enumerate(("a.pth", "b.pth")):
        training = {"settings": dict(recipe), "epochs_done": 100, "seed": i}
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


def test_the_report_follows_the_score(in_digits_run, command):
    flags = ["--dataset", "digits", "--ood-types", "rademacher", "--score", "gen"]
    _, out, _ = command("test.py", *flags)
    rows = json.loads((in_digits_run / "digits_resnet18.ood.json").read_text())["rows"]
    (row,) = (row for row in rows if (row["set"], row["score"]) == ("rademacher", "gen"))
    assert f"AUROC: {row['auroc']:.4f}," in out.splitlines()[3]
    assert "\n| gen " in out


def test_unavailable_sets_are_skipped_and_files_kept(in_digits_run, command, tmp_path, no_network):
    flags = ["--dataset", "digits", "--data-root", tmp_path, "--ood-types", "svhn"]
    status, out, _ = command("test.py", *flags, "gaussian")
    lines = out.splitlines()
    assert status == 1 and lines[2] == "ood type: svhn" and lines[3].startswith("skipped: SVHN is")
    assert lines[4] == "ood type: gaussian" and re.fullmatch(FIGURES, lines[5])
    path = in_digits_run / "digits_resnet18.ood.json"
    skipped = json.loads(path.read_text())["skipped"]
    assert lines[3] == f"skipped: {skipped['svhn']}"

    before = path.stat().st_mtime_ns
    status, out, _ = command("test.py", *flags)
    assert status == 1 and "skipped: " in out and "wrote" not in out
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("shift,missing", [(0, "misclassified"), (1, "correctly classified")])
def test_an_empty_half_of_the_split_is_reported_as_such(shift, missing, capsys, tmp_path):
    """20 images that a network gets all right or all wrong."""
    (tmp_path / "a.pth").touch()
    scores = {"closed set": np.random.default_rng(0).random((20, len(ood_utils.SCORES)))}
    labels = (np.arange(20) + shift) % 20
    run, rows, sets = evaluation.measure_run(
        tmp_path / "a.pth", scores, {"closed set": np.arange(20)}, labels
    )
    results = {"checkpoints": [run], "rows": rows, "sets": sets, "skipped": {}}
    results["config"] = {"dataset": "none", "score": "msp", "ood_types": []}
    results = evaluation.combine([], [results])
    evaluation.print_report(results, 1)
    evaluation.print_tables(results)
    error_rate, split, *tables = capsys.readouterr().out.splitlines()
    assert error_rate == f"Error Rate {100.0 * shift:.4f}"
    assert split == f"AUROC: n/a, AUPR: n/a, FPR95: n/a (no {missing} image)"
    assert any(re.match(r"\| right / wrong +\| +n/a \|", line) for line in tables)


def test_own_images_as_closed_set_and_ood_set(class_folder, tmp_path, command, monkeypatch):
    """The folder's set has the folder's name; the closed set is known from the log."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "far/labels", 3, seed=5)  # also the name of an array in the .npz
    flags = ["--epochs", 1, "--batch-size", 8, "--stem", "cifar", "--device", "cpu"]
    assert command("train.py", "--dataset", class_folder, *flags)[0] == 0
    flags = ["--checkpoint", "pets_resnet18.pth", "--ood-types", "far/labels", "photos"]
    status, out, err = command("test.py", *flags)
    assert status == 0 and "ood type: labels\n" in out and "note" not in err
    rows = json.loads((tmp_path / "pets_resnet18.ood.json").read_text())["rows"]
    counts = {row["set"]: (row["positives"], row["negatives"]) for row in rows}
    assert counts["photos"] == counts["labels"] == (10, 2)

    shutil.copytree(class_folder, tmp_path / "moved")  # the same classes
    assert command("test.py", *flags, "--dataset", "moved")[0] == 0
    for split in ("train", "test"):
        (tmp_path / "moved" / split / "dog").rename(tmp_path / "moved" / split / "wolf")
    status, _, err = command("test.py", *flags, "--dataset", "moved")
    assert status == 2 and "was trained on" in err


def test_an_unfinished_run_is_named_as_such(cut_run, command, tmp_path):
    folder, checkpoint, _ = cut_run
    flags = ["--checkpoint", checkpoint, "--ood-types", "gaussian", "--output", tmp_path]
    status, _, err = command("test.py", *flags)
    assert status == 0 and "is an unfinished run, 1 of 4 epochs" in err


@pytest.mark.parametrize("sets,checkpoints", [(1, 1), (6, 3)])
def test_the_picture_shows_every_run(sets, checkpoints):
    """Nothing but white along its borders; dots of the first group on every line."""
    names = ["right / wrong", *(f"a folder of images with a long name {i}" for i in range(sets))]
    paths = [f"{i}.pth" for i in range(checkpoints)]
    rows = [
        {"checkpoint": path, "group": path, "set": name, "score": "msp", "auroc": 60.0 + i}
        for path in paths
        for i, name in enumerate(names)
    ]
    results = {"config": {"dataset": "cifar100", "score": "msp"}, "rows": rows}
    training = {"accuracy": [0.1, 0.4], "settings": {}, "epochs_done": 2}
    results["checkpoints"] = [{"path": p, "group": p, "training": training} for p in paths]
    with Image.open(io.BytesIO(evaluation.draw(results))) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for border in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert (border == 255).all()
    blue = pixels[..., 2] - pixels[..., 0] > 80
    assert blue.sum() > 30 * len(names)


def test_help_lists_what_the_tables_hold(command):
    text = " ".join(command("test.py", "--help")[1].replace("│", " ").split())
    for name in (*ood_data.NOISES, *ood_data.OOD_IMAGES, *ood_utils.SCORES, *ood_data.CLOSED_SETS):
        assert name in text
    text = " ".join(command("train.py", "--help")[1].replace("│", " ").split())
    assert f"(default: {train.Config.epochs})" in text
    assert ", ".join(ood_data.CLOSED_SETS) in text


# Bad input: script, flags, what stderr says. {f} is a folder made by bad_folder().
BAD = [
    ("train.py", "--dataset nosuch", "Unknown data set 'nosuch': use cifar100, cifar10, digits"),
    ("test.py", "--dataset nosuch --checkpoint {f}/two.pth", "Unknown data set 'nosuch'"),
    ("test.py", "--dataset digits --ood-types fog --checkpoint {f}/ten.pth", "OOD type 'fog'"),
    ("test.py", "--ood-types cifar10 --dataset cifar10 --checkpoint {f}/ten.pth", "set itself"),
    ("test.py", "--dataset {f}/pets --checkpoint {f}/one.pth --ood-types {f}/pets/test", "itself"),
    ("test.py", "--dataset digits --checkpoint {f}/ten.pth --ood-types {f}/a/x {f}/b/x", "'x'"),
    ("test.py", "--dataset digits --checkpoint {f}/ten.pth --ood-types {f}/svhn", "'svhn'"),
    ("train.py", "--dataset digits --device abacus", "Device 'abacus' cannot be used"),
    ("test.py", "--dataset digits --checkpoint {f}/ten.pth --device cuda:99", "cannot be used"),
    ("train.py", "--dataset cifar100 --data-root {f}", "CIFAR100 is missing .*copy it .* digits"),
    ("train.py", "--dataset cifar100 --data-root {f}/damaged", "CIFAR100 is missing or damaged"),
    ("test.py", "--dataset digits", "No checkpoint at digits_resnet18.pth. Run `python train.py`"),
    ("test.py", "--dataset digits --checkpoint {f}/cut.pth", "cut.pth is damaged"),
    ("test.py", "--dataset digits --checkpoint {f}/code.pth", "code.pth is damaged, or holds code"),
    ("test.py", "--dataset digits --checkpoint {f}/two.pth", "trained on 2 classes, not on digits"),
    ("test.py", "--dataset digits --checkpoint {f}/logged.pth", "on letters, not on digits"),
    ("test.py", "--dataset digits --checkpoint {f}/stem.pth", "stem.pth does not fit"),
    ("test.py", "--dataset digits --checkpoint {f}/list.pth", "list.pth holds no state dict"),
    ("test.py", "--dataset digits --checkpoint {f}/nan.pth", "nan.pth: .* is not finite"),
    ("test.py", "--dataset digits --checkpoint {f}/ten.pth --batch-size 0", "batch-size 0 is out"),
    ("test.py", "--dataset digits --output {f} --checkpoint {f}/ten.pth {f}/a/ten.pth", "same"),
    ("train.py", "--epochs 0", "--epochs 0 is out of range"),
    ("train.py", "--lr nan", "--lr nan is out of range"),
    ("train.py", "--momentum -0.1", "--momentum -0.1 is out of range"),
    ("train.py", "--epochs 100 --milestones 0.5 80", "pass --milestones 0.5 0.8"),
    ("train.py", "--label-smoothing 1.5", "--label-smoothing must lie between 0 and 1"),
    ("train.py", "--dataset digits --checkpoint lr0.1", "lr0.1 cannot be a checkpoint"),
    ("train.py", "--dataset digits --batch-size 359", "1437 images leave a last batch of 1"),
    ("train.py", "--dataset {f}/no_test", "no_test needs images in .* test/<class>/"),
    ("train.py", "--dataset {f}/other", "only one of train/ and test/ has the class bird"),
    ("train.py", "--dataset {f}/unreadable", "dog/broken.png is not a readable image"),
    ("train.py", "--dataset digits --checkpoint {f}/ten.pth/a.pth", "ten.pth"),
    ("train.py", "--dataset digits --checkpoint {f}/a.json", "a.json cannot be a checkpoint"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    """Closed sets and checkpoints, each with one thing wrong."""
    folder = tmp_path_factory.mktemp("bad")
    for split in ("train", "test"):
        write_images(folder / "pets" / split / "cat", 2)
        for name in ("cat", "dog"):
            write_images(folder / "unreadable" / split / name, 2)
    write_images(folder / "no_test/train/cat", 2)
    write_images(folder / "a/x", 1)
    write_images(folder / "b/x", 1)
    write_images(folder / "svhn", 1)
    for split, name in (("train", "cat"), ("test", "cat"), ("test", "bird")):
        write_images(folder / "other" / split / name, 2)
    (folder / "unreadable/train/dog/broken.png").write_bytes(b"no picture")
    (folder / "damaged/cifar-100-python").mkdir(parents=True)
    (folder / "damaged/cifar-100-python/train").write_bytes(b"half a pickle")
    ten = train.build_network(10).state_dict()
    *_, bias = ten
    for name in ("ten", "logged"):
        torch.save(ten, folder / f"{name}.pth")
    torch.save(ten | {bias: ten[bias] + 1}, folder / "a/ten.pth")
    for name, classes in (("one", 1), ("two", 2)):
        torch.save(train.build_network(classes).state_dict(), folder / f"{name}.pth")
    first = next(iter(ten))
    torch.save(ten | {first: torch.zeros(64, 3, 5, 5)}, folder / "stem.pth")
    torch.save([1, 2, 3], folder / "list.pth")
    torch.save(ten | {bias: torch.full((10,), float("nan"))}, folder / "nan.pth")
    torch.save({"fc.weight": Payload(folder / "executed")}, folder / "code.pth")
    config = {"dataset": "letters", "stem": "imagenet", "epochs": 1}
    log = {"config": config, "classes": list("abcdefghij"), "epochs": [{}]}
    (folder / "logged.json").write_text(json.dumps(log))
    (folder / "cut.pth").write_bytes((folder / "ten.pth").read_bytes()[:100_000])
    return folder


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize("script,flags,message", BAD, ids=[" ".join(case[:2]) for case in BAD])
def test_bad_input_ends_in_one_line(
    script, flags, message, bad_folder, command, monkeypatch, no_network
):
    monkeypatch.chdir(bad_folder)
    monkeypatch.setattr(train, "train_step", None)  # nothing may be trained
    before = contents(bad_folder)
    status, out, err = command(script, *flags.format(f=bad_folder).split())
    lines = [line for line in err.splitlines() if not line.startswith("device: ")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert contents(bad_folder) == before and not (bad_folder / "executed").exists()


def test_a_choice_that_is_none_is_refused(command):
    status, _, err = command("train.py", "--stem", "resnet")
    assert status == 2 and "imagenet" in err


def test_the_closed_set_is_read_through_the_command_line(cifar100_files, tmp_path, command):
    """CIFAR-100 in torchvision's layout, by both scripts."""
    root, _, _ = cifar100_files
    common = [
        "--dataset",
        "cifar100",
        "--data-root",
        root,
        "--checkpoint",
        tmp_path / "a.pth",
        "--device",
        "cpu",
    ]
    status, out, _ = command("train.py", *common, "--epochs", 1, "--batch-size", 20)
    assert status == 0 and "epoch   1/1" in out
    status, out, _ = command("test.py", *common, "--ood-types", "gaussian")
    assert status == 0 and "published" not in out  # not at full length


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
