"""The command lines, as a user starts them: the whole experiment on digits, the report, and every kind of bad input."""

import contextlib
import hashlib
import inspect
import io
import json
import random
import re
import runpy
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, Payload, write_images
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torchvision.models import resnet18

import ood_data
import test as evaluation
import train
from ood_utils import InputError, pick_device

NUMBER = r"-?\d+\.\d{4}"
FIGURES = rf"AUROC: {NUMBER}, AUPR: {NUMBER}, FPR95: {NUMBER}"


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """(folder, what train.py printed) of an epoch on digits."""
    folder = tmp_path_factory.mktemp("digits")
    flags = ["--dataset", "digits", "--epochs", "1", "--lr", "0.02", "--batch-size", "32"]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder), contextlib.redirect_stdout(out):
        out.reconfigure = lambda **options: None
        patch.setattr(sys, "argv", ["train.py", *flags])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return folder, out.getvalue()


def test_train_prints_a_line_per_epoch_and_writes_a_torchvision_checkpoint(digits_run):
    folder, out = digits_run
    device, *epochs, wrote = out.splitlines()
    assert device.startswith("device: ") and "digits_resnet18.pth" in wrote
    pattern = r"epoch   1/1  loss \d\.\d{4}  test accuracy (\d+\.\d\d)%  lr 0\.02  \d+\.\d s  \d+ images/s"
    assert len(epochs) == 1 and re.fullmatch(pattern, epochs[0])
    assert float(re.fullmatch(pattern, epochs[0])[1]) > 15  # chance is 10
    resnet18(num_classes=10).load_state_dict(torch.load(folder / "digits_resnet18.pth", weights_only=True))
    assert sorted(path.name for path in folder.iterdir() if "ood" not in path.name) == [
        "digits_resnet18.json",
        "digits_resnet18.pth",
    ]
    log = json.loads((folder / "digits_resnet18.json").read_text())
    assert [f"{100 * epoch['test_accuracy']:.2f}" for epoch in log["epochs"]] == [
        re.fullmatch(pattern, line)[1] for line in epochs
    ]


@pytest.fixture
def in_digits_run(digits_run, monkeypatch):
    monkeypatch.chdir(digits_run[0])
    return digits_run[0]


def test_report_has_the_published_form_and_files_agree_with_it(in_digits_run, command):
    names = ("gaussian", "rademacher", "blob", "photos")
    status, out, err = command("test.py", "--dataset", "digits", "--ood-types", *names)
    assert status == 0 and err.startswith("device: ")
    report, tables = out.split("\n\n", 1)
    lines = report.splitlines()
    assert re.fullmatch(rf"Error Rate {NUMBER}", lines[0]) and re.fullmatch(FIGURES, lines[1])
    assert lines[2::2] == [f"ood type: {name}" for name in names]
    assert len(lines) == 10 and all(re.fullmatch(FIGURES, line) for line in lines[3::2])
    assert "positive class" in tables and "mean over sets" in tables and "AURC" in tables

    results = json.loads((in_digits_run / "digits_resnet18.ood.json").read_text())
    checkpoint = (in_digits_run / "digits_resnet18.pth").read_bytes()
    run = results["runs"][0]
    assert run["sha256"] == hashlib.sha256(checkpoint).hexdigest() and results["skipped"] == {}
    assert run["counts"]["photos"] == [360, 72]
    arrays = np.load(in_digits_run / "digits_resnet18.ood.npz")
    correct = arrays["labels"] == arrays["predictions"]
    assert lines[0] == f"Error Rate {100 * (1 - correct.mean()):.4f}"
    for line, name in zip(lines[3::2], names, strict=True):
        for column, score in enumerate(arrays["score_names"]):
            closed, ood = arrays["scores/closed set"][:, column], arrays[f"scores/{name}"][:, column]
            is_in = np.r_[np.ones(360), np.zeros(72)]
            figures = run["sets"][name][score]
            assert figures["auroc"] == pytest.approx(100 * roc_auc_score(is_in, np.r_[closed, ood]), abs=1e-10)
            out_aupr = 100 * average_precision_score(1 - is_in, -np.r_[closed, ood])
            assert figures["aupr_out"] == pytest.approx(out_aupr, abs=1e-10)
            assert figures["chance_aupr"] == pytest.approx(100 * 5 / 6)
        msp = run["sets"][name]["msp"]
        assert line == f"AUROC: {msp['auroc']:.4f}, AUPR: {msp['aupr']:.4f}, FPR95: {msp['fpr95']:.4f}"
    with Image.open(in_digits_run / "digits_resnet18.ood.png") as picture:
        assert picture.width > 1000 and len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50

    again = command("test.py", "--dataset", "digits", "--ood-types", "blob", "gaussian", "--batch-size", "97")[1]
    assert [line for line in again.splitlines() if line.startswith("AUROC: ")][1:3] == [lines[7], lines[3]]


def test_several_checkpoints_give_mean_and_sample_standard_deviation(in_digits_run, command, tmp_path):
    state = torch.load("digits_resnet18.pth", weights_only=True)
    paths = [tmp_path / f"{name}.pth" for name in "abc"]
    for i, path in enumerate(paths):
        torch.save(state | {"fc.bias": state["fc.bias"] + i * torch.linspace(-1, 1, 10)}, path)
    status, out, _ = command("test.py", "--dataset", "digits", "--ood-types", "gaussian", "--checkpoint", *paths)
    assert status == 0 and out.count("Error Rate") == 3 and "ddof 1" in out
    results = json.loads((tmp_path / "a.ood.json").read_text())
    values = [run["sets"]["gaussian"]["msp"]["auroc"] for run in results["runs"]]
    mean = sum(values) / 3
    std = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    assert results["summary"]["sets"]["gaussian"]["msp"]["auroc"] == pytest.approx({"mean": mean, "std": std})
    assert f"{mean:.2f} +- {std:.2f}" in out and std > 0
    errors = [run["error_rate"] for run in results["runs"]]
    assert f"error rate {np.mean(errors):.2f} +- {np.std(errors, ddof=1):.2f}, AURC" in out
    assert all(path.with_suffix(".ood.npz").exists() for path in paths)
    again = command("test.py", "--table", tmp_path / "a.ood.json")
    assert again == (0, out[out.index("\nmsp of 3 runs") :], "")
    assert "published" not in out  # the published figures are CIFAR-100's


def test_tables_have_both_conventions_skipped_sets_and_the_published_run(tmp_path, command):
    """Every metric has a figure of its own, so that a cell says where it comes from; the two runs lie 2 apart."""
    metrics = ("auroc", "aupr", "fpr95", "chance_aupr", "aupr_out", "fpr95_out", "chance_aupr_out")
    figures = {score: {metric: 10.0 + i for i, metric in enumerate(metrics)} for score in evaluation.SCORES}
    other = {score: {metric: 12.0 + i for i, metric in enumerate(metrics)} for score in evaluation.SCORES}
    runs = [
        dict(error_rate=error, aurc=dict.fromkeys(evaluation.SCORES, 30.0), counts=counts, sets=sets)
        for error, counts, sets in (
            (46.0, {"right / wrong": [54, 46], "svhn": [100, 20]}, {"right / wrong": figures, "svhn": figures}),
            (47.0, {"right / wrong": [53, 47], "svhn": [100, 20]}, {"right / wrong": other, "svhn": other}),
        )
    ]
    config = dict(dataset="cifar100", score="msp")
    results = dict(config=config, skipped={"blob": "no"}, runs=runs, summary=evaluation.summarise_runs(runs))
    (tmp_path / "a.ood.json").write_text(json.dumps(results))
    status, out, _ = command("test.py", "--table", tmp_path / "a.ood.json")
    assert status == 1  # a set was skipped
    assert "error rate 46.50 +- 0.71 (published run 46.30), AURC of selective classification 30.00 +- 0.00" in out
    tables = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    inside = ["11.00 +- 1.41", "12.00 +- 1.41", "13.00 +- 1.41", "14.00"]
    outside = ["11.00 +- 1.41", "15.00 +- 1.41", "16.00 +- 1.41", "17.00"]
    assert ["svhn", *inside, "100 / 20", "66.97 / 91.65 / 89.05"] in tables
    assert ["svhn", *outside, "20 / 100"] in tables
    assert ["blob", *["skipped"] * 5, "68.06 / 92.75 / 97.55"] in tables and ["blob", *["skipped"] * 5] in tables
    assert [row[0] for row in tables[:2]] == ["positive: in-distribution, right", "-" * 32]


def test_the_report_follows_the_score(in_digits_run, command, score="energy"):
    _, out, _ = command("test.py", "--dataset", "digits", "--ood-types", "rademacher", "--score", score)
    figures = json.loads((in_digits_run / "digits_resnet18.ood.json").read_text())["runs"][0]["sets"]["rademacher"]
    assert f"AUROC: {figures[score]['auroc']:.4f}," in out.splitlines()[3]
    assert f"{score}, in percent" in out


def test_a_set_that_cannot_be_had_is_skipped_with_its_reason(in_digits_run, command, tmp_path, no_network):
    flags = ["--ood-types", "svhn", "gaussian", "--data-root", tmp_path]
    status, out, _ = command("test.py", "--dataset", "digits", *flags)
    lines = out.splitlines()
    assert status == 1 and lines[2] == "ood type: svhn" and lines[3].startswith("skipped: svhn is not at ")
    assert lines[4] == "ood type: gaussian" and re.fullmatch(FIGURES, lines[5])
    skipped = json.loads((in_digits_run / "digits_resnet18.ood.json").read_text())["skipped"]
    assert list(skipped) == ["svhn"] and lines[3] == f"skipped: {skipped['svhn']}"


@pytest.mark.parametrize("shift,missing", [(0, "misclassified"), (1, "correctly classified")])
def test_an_empty_half_of_the_split_is_reported_as_such(shift, missing, capsys):
    """A network whose logits are its input, on 20 images that it gets all right or all wrong."""
    model = torch.nn.Linear(20, 20, bias=False)
    model.weight.data = torch.eye(20)
    run, _, _ = evaluation.evaluate_network(model, [(10 * torch.eye(20), (torch.arange(20) + shift) % 20)], {})
    evaluation.print_report(run, "msp", {}, ())
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"Error Rate {100.0 * shift:.4f}", f"AUROC: n/a, AUPR: n/a, FPR95: n/a (no {missing} test image)"]
    assert evaluation.measure(np.ones(3), np.ones(0)) is None


def test_own_images_as_closed_set_and_ood_set(class_folder, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "labels", 3, seed=5)  # also the name of an array in the .npz
    status, out, _ = command("train.py", "--dataset", class_folder, "--epochs", 1, "--batch-size", 8, "--stem", "cifar")
    assert status == 0 and (tmp_path / "pets_resnet18.pth").exists()
    status, out, _ = command("test.py", "--dataset", class_folder, "--ood-types", "labels", "photos")
    assert status == 0
    counts = json.loads((tmp_path / "pets_resnet18.ood.json").read_text())["runs"][0]["counts"]
    assert counts["photos"] == [10, 2] and counts["labels"] == [10, 2]


def test_the_cpu_by_default_says_why_where_the_driver_is_too_old(monkeypatch):
    def is_available():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    device, note = pick_device()
    assert device.type == "cpu" and "driver on your system is too old" in note
    with pytest.raises(InputError, match="'cuda' is not available .*too old.*: use one of cpu"):
        pick_device("cuda")


def test_a_constant_reaches_both_scripts():
    """What both scripts need is assigned once, in ood_data.py, and is the default of both entry functions."""
    for option in ("dataset", "data_root", "seed"):
        name = option.upper()
        assigned = [path.name for path in ROOT.glob("*.py") if re.search(rf"^{name} =", path.read_text(), re.MULTILINE)]
        assert assigned == ["ood_data.py"]
        for entry in (train.train_model, evaluation.evaluate):
            assert inspect.signature(entry).parameters[option].default is getattr(ood_data, name)


# Bad input: (script, flags, what stderr says). {folder} is a folder made by bad_folder().
BAD = [
    ("train.py", "--dataset nosuch", "Unknown dataset 'nosuch': use cifar100, cifar10, digits or the path"),
    ("test.py", "--dataset nosuch --checkpoint {folder}/two.pth", "Unknown dataset 'nosuch'"),
    ("test.py", "--table {folder}/none.ood.json", "No such file"),
    ("test.py", "--table {folder}/list.pth", "list.pth is not a .ood.json of `python test.py`: 'utf-8' codec"),
    ("test.py", "--table {folder}/log.json", "log.json is not a .ood.json of `python test.py`: 'runs'"),
    ("test.py", "--dataset digits --ood-types fog", "Unknown OOD type 'fog': use gaussian, rademacher, blob, svhn"),
    ("test.py", "--dataset digits --score sharpness", "Unknown score 'sharpness': use msp, max_logit"),
    ("test.py", "--ood-types cifar100", "'cifar100' is, or holds, the closed set itself"),
    ("test.py", "--dataset {folder}/pets --ood-types {folder}/pets/test", "the closed set itself"),
    ("train.py", "--stem resnet", "Unknown stem 'resnet': use imagenet or cifar"),
    ("train.py", "--dataset digits --device abacus", "Device 'abacus' is not available: use one of"),
    ("train.py", "--dataset digits --device cuda:99", "Device 'cuda:99' is not available"),
    ("test.py", "--dataset digits --checkpoint {folder}/ten.pth --device abacus", "Device 'abacus' is not available"),
    (
        "train.py",
        "--data-root {folder}",
        r"cifar-100-python.tar.gz on a machine .* put it into .*--dataset digits` needs",
    ),
    ("train.py", "--dataset cifar10 --data-root {folder}", "cifar-10-python.tar.gz on a machine"),
    ("train.py", "--data-root {folder}/damaged", r"cifar-100-python/train is damaged or missing: remove"),
    ("test.py", "--dataset digits", "No checkpoint at digits_resnet18.pth. Run `python train.py` first"),
    ("test.py", "--dataset digits --checkpoint {folder}/cut.pth", "cut.pth is damaged or truncated"),
    ("test.py", "--dataset digits --checkpoint {folder}/code.pth", "code.pth is damaged, or holds code"),
    ("test.py", "--dataset digits --checkpoint {folder}/two.pth", "two.pth has 2 classes, digits 10"),
    ("test.py", "--dataset digits --checkpoint {folder}/stem.pth", "stem.pth is not a ResNet-18 of"),
    ("test.py", "--dataset digits --checkpoint {folder}/list.pth", "list.pth is not a ResNet-18 of"),
    ("test.py", "--dataset digits --checkpoint {folder}/nan.pth", "nan.pth holds weights that are not finite: train"),
    ("test.py", "--dataset digits --checkpoint {folder}/ten.pth --batch-size 0", "--batch-size .0. must be at least 1"),
    ("train.py", "--epochs 0", "--epochs must be greater than 0, not 0"),
    ("train.py", "--epochs -3", "--epochs must be greater than 0, not -3"),
    ("train.py", "--batch-size 0", "--batch-size must be greater than 0, not 0"),
    ("train.py", "--lr 0", "--lr must be greater than 0, not 0.0"),
    ("train.py", "--lr nan", "--lr must be greater than 0, not nan"),
    ("train.py", "--momentum -0.1", "--momentum must be 0 or greater"),
    ("train.py", "--seed -1", "--seed must be 0 or greater"),
    ("train.py", "--milestones 0.5 1.0", "--milestones must lie between 0 and 1"),
    ("train.py", "--milestones 50 75", "--milestones must lie between 0 and 1"),
    ("train.py", "--dataset digits --batch-size 1", "leave a batch of 1"),
    ("train.py", "--dataset digits --batch-size 359", "1437 images in batches of 359 leave a batch of 1"),
    ("train.py", "--dataset {folder}/no_test", "no_test has no folder test/"),
    ("train.py", "--dataset {folder}/no_train", "no_train has no folder train/"),
    ("train.py", "--dataset {folder}/other", "must hold the same classes; only one has bird"),
    ("train.py", "--dataset {folder}/unreadable", "dog/broken.png is not a readable image"),
    ("train.py", "--dataset digits --checkpoint {folder}/nowhere/a.pth", "nowhere does not exist: create it"),
    ("train.py", "--dataset digits --checkpoint {folder}/pets", "pets is a folder: pass a file"),
    ("train.py", "--dataset digits --checkpoint .", "is a folder: pass a file"),
    ("test.py", "--dataset digits --checkpoint {folder}/pets", "pets is a folder: pass a file"),
    ("train.py", "--dataset digits --checkpoint {folder}/a.json", "a.json is a .json file"),
    ("train.py", "--dataset digits --checkpoint {folder}/two.pth/a.pth", "two.pth does not exist: create it"),
]


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    """Closed sets and checkpoints, each with one thing wrong."""
    tmp_path = tmp_path_factory.mktemp("bad")
    for split in ("train", "test"):
        write_images(tmp_path / "pets" / split / "cat", 2)
    write_images(tmp_path / "no_test/train/cat", 2)
    write_images(tmp_path / "no_train/test/cat", 2)
    for split, name in (("train", "cat"), ("test", "cat"), ("test", "bird")):
        write_images(tmp_path / "other" / split / name, 2)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            write_images(tmp_path / "unreadable" / split / name, 2)
    (tmp_path / "unreadable/train/dog/broken.png").write_bytes(b"no picture")
    damaged = tmp_path / "damaged/cifar-100-python"
    damaged.mkdir(parents=True)
    (damaged / "train").write_bytes(b"half a pickle")
    ten = resnet18(num_classes=10).state_dict()
    torch.save(ten, tmp_path / "ten.pth")
    torch.save(resnet18(num_classes=2).state_dict(), tmp_path / "two.pth")
    torch.save(ten | {"conv1.weight": torch.zeros(64, 3, 5, 5)}, tmp_path / "stem.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    torch.save(ten | {"fc.bias": torch.full((10,), float("nan"))}, tmp_path / "nan.pth")
    torch.save({"fc.weight": Payload(tmp_path / "executed")}, tmp_path / "code.pth")
    (tmp_path / "log.json").write_text('{"config": {}, "epochs": []}')
    (tmp_path / "cut.pth").write_bytes((tmp_path / "ten.pth").read_bytes()[:100_000])
    return tmp_path


@pytest.mark.parametrize("script,flags,message", BAD, ids=[f"{script} {flags}" for script, flags, _ in BAD])
def test_bad_input_ends_in_one_line(script, flags, message, bad_folder, command, monkeypatch, no_network):
    monkeypatch.chdir(bad_folder)
    monkeypatch.setattr(train, "train_step", None)  # nothing may be trained
    before = {path: path.stat().st_mtime_ns for path in bad_folder.rglob("*")}
    status, out, err = command(script, *flags.format(folder=bad_folder).split())
    lines = [line for line in err.splitlines() if not line.startswith("device: ")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    after = {path: path.stat().st_mtime_ns for path in bad_folder.rglob("*")}
    assert {path for path in before if path.is_file() and before[path] != after[path]} == set()
    assert after.keys() == before.keys() and not (bad_folder / "executed").exists()


def test_a_diverging_run_ends_with_status_1(class_folder, tmp_path, command):
    flags = ["--dataset", class_folder, "--checkpoint", tmp_path / "a.pth", "--batch-size", 8, "--lr", 1e30]
    status, _, err = command("train.py", *flags)
    assert status == 1 and re.search(r"^error: The loss is (nan|inf) at epoch \d+, step \d+, lr 1e\+30", err)


def test_ctrl_c_ends_with_status_130(class_folder, tmp_path, command, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "backward", interrupt)
    status, _, err = command(
        "train.py", "--dataset", class_folder, "--checkpoint", tmp_path / "a.pth", "--batch-size", 8
    )
    assert status == 130 and "no epoch was saved yet" in err and "Traceback" not in err


@pytest.mark.slow
def test_the_real_command_survives_ten_kills(tmp_path):
    """`python train.py --dataset digits` killed at random moments, resumed, and compared with one that was not."""

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
    whole, cut = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("whole", "cut"))
    assert all(torch.equal(weight, cut[name]) for name, weight in whole.items())
