"""Did it help? Runs that are kept apart, grouped by setting, and compared with intervals."""

import io
import json
import os
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, files_of, read_json, same_bits, train_quietly, write_images
from matplotlib.image import imread
from scipy import stats

import ood_data
import test as evaluation
import train
from ood_utils import InputError

SETS = ("right / wrong", "gaussian", "blob", "svhn", "photos")


def make_evaluation(path, seed, figures, epochs_done=3, **settings):
    """What test.py writes of a run: error rate, AUROC by set; each further metric is 1 more."""
    error_rate, *aurocs = figures
    run = {"path": path, "sha256": path, "error_rate": error_rate, "threshold": {"msp": 0.5}}
    if settings:
        settings = {"weight_decay": 1e-4, "stem": "imagenet", "images": 50000} | settings
        training = {"seed": seed, "settings": settings, "epochs_done": epochs_done}
        run["training"] = training | {"accuracy": [0.1, 0.4]}
    rows = []
    for name, auroc in zip(SETS, aurocs, strict=True):
        metrics = {metric: auroc + i for i, metric in enumerate(evaluation.METRICS)}
        rows.append({"checkpoint": path, "score": "msp", "set": name} | metrics)
    classes = {"checkpoint": path, "images": 9, "effective_classes": 5 + 2 * seed}
    sets = [classes | {"set": name} for name in ("closed set", *SETS[1:])]
    config = {"dataset": "none", "score": "msp", "seed": 0, "ood_types": SETS[1:]}
    results = {"config": config, "skipped": {}, "checkpoints": [run], "rows": rows}
    return results | {"sets": sets}


def draw_figures(count, seed=0):
    return np.random.default_rng(seed).normal(70, 5, (count, len(SETS) + 1))


def lines_of(figures):
    """The lines of the table by hand: the figures, then the means of noises and of images."""
    noises, images = figures[:, [2, 3]].mean(1), figures[:, [4, 5]].mean(1)
    return np.column_stack([figures, noises, images])


@pytest.mark.parametrize("seeds,how", [
    ((2, 0, 1), "paired by seed"), ((7,), "unpaired"), ((7, 8, 9), "unpaired")
])  # fmt: skip
def test_two_settings_are_compared_with_intervals(seeds, how, capsys):
    """By the formula of Student's interval, of pairs or of two groups; a group may be one run."""
    base, tweak = draw_figures(3), draw_figures(len(seeds), seed=1)
    tweak[:, 1:] += 9
    evaluations = [make_evaluation(f"b{i}", i, base[i], lr=0.1) for i in range(3)]
    for seed, figures in zip(seeds, tweak, strict=True):
        evaluations.append(make_evaluation(f"{seed}", seed, figures, lr=0.2))
    results = evaluation.combine([], evaluations)
    table = evaluation.compare(results)
    assert list(table.index) == ["error rate", *SETS, "mean of noises", "mean of image sets"]
    first, _, title = table.columns
    assert first == "lr 0.1 (3 runs)" and title == f"lr 0.2 minus lr 0.1, {how}"

    a, b = lines_of(base), lines_of(tweak)
    if how == "unpaired":
        squares = ((a - a.mean(0)) ** 2).sum(0) + ((b - b.mean(0)) ** 2).sum(0)
        freedom = 1 + len(seeds)
        error = np.sqrt(squares / freedom * (1 / 3 + 1 / len(seeds)))
    else:
        pairs = b - a[list(seeds)]
        freedom = 2
        error = pairs.std(0, ddof=1) / 3**0.5
    half_width = stats.t.ppf(0.975, freedom) * error
    for cell, difference, half in zip(table[title], b.mean(0) - a.mean(0), half_width, strict=True):
        low, high = difference - half, difference + half
        marked = " *" if low > 0 or high < 0 else ""
        assert cell == f"{difference:+.2f} [{low:.2f}, {high:.2f}]{marked}"
    evaluation.print_comparison(results)
    assert "8 intervals at 95%" in capsys.readouterr().out


@pytest.mark.parametrize("seeds,cell", [((0, 1), "-0.28"), ((2, 3), "-0.28 [")])
def test_equal_differences_leave_no_interval(seeds, cell, recwarn):
    """Two seeds that each classify one image more: the rounding of 360 images, not certainty."""
    base = [make_evaluation(f"b{i}.pth", i, [10 + i, *[50] * 5], lr=0.1) for i in (0, 1)]
    errors = np.array([10, 11]) - 1 / 3.6
    mine = [
        make_evaluation(f"m{i}.pth", i, [error, *[50] * 5], lr=0.2)
        for i, error in zip(seeds, errors, strict=True)
    ]
    cells = evaluation.compare(evaluation.combine(base, mine)).iloc[:, -1]
    assert cells["error rate"].startswith(cell) and cells["gaussian"] == "+0.00"
    assert ("[" in cells["error rate"]) == ("[" in cell) and not recwarn.list


def test_runs_of_unknown_code_or_one_seed_are_not_averaged_in_silence(capsys):
    runs = [make_evaluation("a.pth", 0, draw_figures(1)[0], lr=0.1)]
    runs.append(make_evaluation("b.pth", 0, draw_figures(1)[0], lr=0.1, code="edited"))
    evaluation.print_tables(evaluation.combine(runs[:1], runs[1:]))
    assert "unknown, edited." in capsys.readouterr().out
    evaluation.print_tables(evaluation.combine([], runs))
    out = capsys.readouterr().out
    assert "of 2 runs" in out and "unknown, edited." in out and "have the same seed" in out


def test_one_run_against_one_has_no_interval(capsys):
    figures = draw_figures(2)
    pair = [make_evaluation(f"{i}.pth", 0, figures[i], lr=0.1 + i) for i in range(2)]
    results = evaluation.combine([], pair)
    cells = evaluation.compare(results).iloc[:, -1]
    assert list(cells) == [f"{value:+.2f}" for value in lines_of(figures)[1] - lines_of(figures)[0]]
    results["config"]["dataset"] = "cifar100"
    evaluation.print_comparison(results)
    out = capsys.readouterr().out
    shipped = read_json(evaluation.SEEDS)["rows"]
    svhn = [row["auroc"] for row in shipped if (row["set"], row["score"]) == ("svhn", "msp")]
    assert "no interval" in out
    assert re.search(rf"\| svhn .*\| +{np.ptp(svhn):.2f} \|\n", out)


def test_tables_show_their_own_figures_and_the_published_run(capsys):
    evaluations = []
    for i in range(2):
        figures = [46 + i, *[10 + 2 * i] * 4, 16 + 2 * i]
        evaluations.append(make_evaluation(f"{i}", i, figures, **evaluation.PUBLISHED_RECIPE))
    results = evaluation.combine([], evaluations)
    results["skipped"] = {"rademacher": "no reason"}
    results["rows"] += [row | {"score": "a score of the file"} for row in results["rows"]]
    evaluation.print_tables(results)
    out = capsys.readouterr().out
    assert "46.50 +- 0.71 (published 46.30)" in out
    assert "is unknown" not in out and "have the same seed" not in out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    tables = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    means = [f"{mean}.00 +- 1.41" for mean in (11, 12, 13, 14, 15)]
    assert ["svhn", *means, "6.00 +- 1.41", "66.97 / 91.65 / 89.05"] in tables
    assert ["rademacher", *["skipped"] * 6, "69.91 / 93.18 / 96.15"] in tables
    assert ["mean of noises", *["11.00 +- 1.41"] * 2] in tables  # by the scores of the file
    assert ["mean of image sets", *["14.00 +- 1.41"] * 2] in tables
    results["checkpoints"][1]["training"]["epochs_done"] = 99
    evaluation.print_tables(results)
    assert "published" not in capsys.readouterr().out


@pytest.mark.parametrize("runs,earlier,names", [
    ([{"lr": 0.1, "code": "a"}, {"lr": 0.1, "code": "b"}], 0, ["code a", "code b"]),
    ([{"lr": 0.1, "code": "a"}, {"lr": 0.2, "code": "b"}], 0, ["lr 0.1", "lr 0.2"]),
    ([{"lr": 0.1, "stem": "x"}, {"lr": 0.2, "stem": "x"}, {"lr": 0.1, "stem": "y"}], 0,
     ["stem x, lr 0.1", "stem x, lr 0.2", "stem y, lr 0.1"]),
    ([{"lr": 0.1}, {"lr": 0.1, "epochs_done": 2}, {"lr": 0.2}], 0,
     ["lr 0.1, epochs_done 3", "lr 0.1, epochs_done 2", "lr 0.2, epochs_done 3"]),
    # A log without code matches any, but the group then has one code.
    ([{"lr": 0.1}, {"lr": 0.1, "code": "a"}, {"lr": 0.1, "code": "b"}], 0,
     ["code a", "code a", "code b"]),
    # Earlier evaluations have groups of their own.
    ([{"lr": 0.1}, {"lr": 0.1}, {"lr": 0.1, "code": "a"}], 2, ["0", "0", "2"]),
    ([{}, {}], 0, ["0", "1"]),  # without logs nobody knows
    ([{"path": "a/m.pth"}, {"path": "b/m.pth"}], 0, ["a/m.pth", "b/m.pth"]),
])  # fmt: skip
def test_groups_are_named_by_what_differs(runs, earlier, names):
    evaluations = []
    for i, run in enumerate(runs):
        known = {"path": f"{i}.pth", "seed": i, "figures": draw_figures(1)[0]}
        evaluations.append(make_evaluation(**known | run))
    results = evaluation.combine(evaluations[:earlier], evaluations[earlier:])
    assert [run["group"] for run in results["checkpoints"]] == names


def test_the_picture_shows_every_run():
    """Nothing but white along its borders; dots of the first group on every line."""
    evaluations = [make_evaluation(f"{i}.pth", i, [50] + [60] * 5, lr=i) for i in range(3)]
    results = evaluation.combine([], evaluations)
    for row in results["rows"]:
        row["set"] += " of images in a folder with a long name"
    results["rows"] += [row | {"set": f"more {row['set']}"} for row in results["rows"]]
    pixels = imread(io.BytesIO(evaluation.draw(results)))  # from 0 to 1
    for border in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert (border == 1).all()
    blue = pixels[..., 2] - pixels[..., 0] > 0.3
    assert blue.sum() > 30 * 2 * len(SETS)


def copy_run(folder, name, seed, shift, **settings):
    """A copy of the digits run with another seed, other settings and a few other logits."""
    state = torch.load("digits_resnet18.pth", weights_only=True)
    *_, bias = state
    state[bias] = state[bias] + shift * torch.linspace(-1, 1, 10)
    torch.save(state, folder / f"{name}.pth")
    log = read_json("digits_resnet18.json")
    log["config"] |= settings | {"seed": seed}
    (folder / f"{name}.json").write_text(json.dumps(log))
    return str(folder / f"{name}.pth")


def test_runs_are_compared_from_the_command_line(in_tiny_run, tmp_path, command):
    """Own files for each run, one of all; earlier evaluations without their weights."""
    base = [copy_run(tmp_path, f"base{seed}", seed, 0.1 * seed) for seed in range(2)]
    tweak = [copy_run(tmp_path, f"t{seed}", seed, 2 + 0.3 * seed, lr=0.9) for seed in range(2)]
    status, out, _ = command("test.py", "--checkpoint", *base, "--ood-types", "blob", "gaussian")
    assert status == 0 and "of 2 runs" in out and "minus" not in out
    assert set(files_of(tmp_path, "base1.ood")) == {".json", ".npz"}
    assert set(files_of(tmp_path, "base0_and_1.ood")) == {".json", ".png"}
    for path in base:
        Path(path).unlink()
    flags = ["--checkpoint", *tweak, "--ood-types", "blob", "photos", "--name", "both", "--compare"]
    earlier = [tmp_path / f"base{seed}.ood.json" for seed in range(2)]
    for files in (earlier, [tmp_path / "base0_and_1.ood.json"]):
        status, out, _ = command("test.py", *flags, *files)
        assert status == 0 and out.count("Error Rate") == 2
        assert "lr 0.9 minus lr 0.05, paired by seed" in out
        assert "Left out, not in every evaluation: gaussian, photos." in out
    runs = read_json(tmp_path / "both.ood.json")["checkpoints"]
    assert [run["training"]["seed"] for run in runs] == [0, 1, 0, 1]
    (run,) = read_json(tmp_path / "t1.ood.json")["checkpoints"]
    assert run["path"] == tweak[1] and run["group"] == "lr 0.9"

    results = read_json(earlier[0])
    edits = {
        "count": {"sets": [row | {"images": 361} for row in results["sets"]]},
        "content": {"content": {"closed set": "other"}},
        "empty": {"rows": []},
        "text": {"rows": [row | {"auroc": "70"} for row in results["rows"]]},
        "no_rate": {"checkpoints": [results["checkpoints"][0] | {"error_rate": float("nan")}]},
        "code": {"code": "edited"},
    }
    for name, edit in edits.items():
        (tmp_path / f"{name}.ood.json").write_text(json.dumps(results | edit))
    status, _, err = command("test.py", *flags, tmp_path / "code.ood.json")
    assert status == 0 and "ood_utils.py has changed since" in err
    for file, message in (
        ("count.ood.json", "images of closed set 361 -> 360"),
        ("content.ood.json", "content of closed set other -> "),
        ("empty.ood.json", "is not an .ood.json file"),
        ("text.ood.json", "is not an .ood.json file"),
        ("no_rate.ood.json", "is not an .ood.json file"),
        ("t0.json", "is not an .ood.json file"),
        ("none.ood.json", "No such file"),
        ("t1.ood.json", "pass it once"),
        (ROOT / "results/cifar100_seeds.ood.json", "closed set cifar100 -> digits"),
    ):
        status, _, err = command("test.py", *flags, tmp_path / file)
        assert status == 2 and message in err and err.count("\n") == 2, err
    torch.save(torch.load(tweak[0], weights_only=True), tmp_path / "twin.pth")  # another file
    for twin in (tweak[0], tmp_path / "twin.pth"):
        status, _, err = command("test.py", "--checkpoint", tweak[0], twin)
        assert status == 2 and "has the weights of" in err


def test_the_checkpoint_edited_in_train_is_the_default(monkeypatch):
    monkeypatch.setattr(train.Config, "checkpoint", "nosuch.pth")
    with pytest.raises(InputError, match="No checkpoint at nosuch.pth"):
        evaluation.load(evaluation.Config(dataset="digits"))


def test_a_folder_that_cannot_be_written_is_refused_before_scoring(in_tiny_run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(InputError, match="cannot be written to: pass --output"):
        evaluation.load(evaluation.Config("digits_resnet18.pth"))


def test_the_shipped_results_are_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    for output, path in ((None, Path("a.x")), (str(tmp_path), tmp_path / "a.x")):
        config = evaluation.Config(output=output)
        assert evaluation.output_path(config, tmp_path / "a.pth", ".x") == path


@pytest.mark.parametrize("option,digest,message", [
    ({"lr": 0.03, "seed": 1}, None, "lr 0.02 -> 0.03, seed 0 -> 1"),
    ({}, (train, "digest_code"), "code ........ -> edited"),
    ({}, (ood_data, "digest"), "content ........ -> edited"),  # a folder of the same name
])  # fmt: skip
def test_a_finished_run_is_kept(option, digest, message, in_tiny_run, monkeypatch, capsys):
    before = files_of(in_tiny_run, "a")
    if digest:
        monkeypatch.setattr(*digest, lambda *args: "edited")
    train_quietly("pets", "a.pth", epochs=1, **option)
    out = capsys.readouterr().out
    assert re.search(f"kept the finished run as a.1.pth \\({message}\\)", out)
    assert "test.py --checkpoint a.1.pth a.pth" in out and "starting over" not in out
    train_quietly("pets", "a.pth", epochs=1, **option)  # the same again starts over
    out = capsys.readouterr().out
    assert "starting over" in out and "kept" not in out
    assert files_of(in_tiny_run, "a.1") == before and not files_of(in_tiny_run, "a.2")


@pytest.mark.parametrize("moves", range(16))
def test_a_kill_before_a_file_is_moved_loses_nothing(moves, in_tiny_run, monkeypatch, capsys):
    """First the five files of the kept run, then in each of four epochs state, checkpoint, log."""
    before = files_of(in_tiny_run, "a")
    replace, moved = os.replace, []

    def until_killed(*paths):
        if len(moved) == moves:
            raise KeyboardInterrupt
        replace(*paths)
        moved.append(paths)

    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", until_killed)
        train_quietly("pets", "a.pth")
    capsys.readouterr()
    train_quietly("pets", "a.pth", resume=Path("a.resume.pth").exists())
    saved = min((moves - 3) // 3, 3)
    assert (f"resuming after epoch {saved} of 4" in capsys.readouterr().out) == (saved > 0)
    assert same_bits("a.pth", "whole.pth")
    assert files_of(in_tiny_run, "a.1") == before and not files_of(in_tiny_run, "a.2")
    assert not Path("a.resume.pth").exists()


def test_the_name_has_the_seed():
    assert str(train.checkpoint_path(None, "digits", 0)) == "digits_resnet18.pth"
    assert str(train.checkpoint_path(None, "digits", 3)) == "digits_resnet18_seed3.pth"
    assert str(train.checkpoint_path("b.pth", "digits", 3)) == "b.pth"


CODE = 'class Config:\n    lr = 0.1\n\n\ndef double(x):\n    "Twice x."\n    return 2 * x\n'


def test_words_in_the_code_do_not_count_and_what_is_computed_does(tmp_path):
    files = [tmp_path / "a.py", tmp_path / "b.py"]

    def digest(*texts):
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        return train.digest_code(*files)

    code = digest(CODE, CODE)
    words = CODE.replace("0.1", "0.2").replace('    "Twice x."\n', "\n    # so\n")
    computed = CODE.replace("2 * x", "3 * x")
    assert digest(words, words) == code
    assert digest(computed, CODE) != code and digest(CODE, computed) != code


def contents_of(loader):
    pairs = zip(loader.images, loader.labels.tolist(), strict=True)
    return {(image.numpy().tobytes(), label) for image, label in pairs}


def test_validation_images_are_neither_trained_on_nor_tested_on():
    rest = contents_of(train.get_loader(True, "digits", validation=200))
    held_out = contents_of(train.get_loader(False, "digits", validation=200))
    test = contents_of(train.get_loader(False, "digits"))
    assert (len(rest), len(held_out), len(test)) == (1237, 200, 360)
    assert rest | held_out == contents_of(train.get_loader(True, "digits"))
    assert not held_out & rest and not held_out & test
    assert held_out == contents_of(train.get_loader(False, "digits", validation=200, seed=5))


def test_a_run_with_validation_never_reads_the_test_images(in_tiny_run, command, monkeypatch):
    read = mock.Mock(side_effect=ood_data.CLOSED_SETS["digits"])
    monkeypatch.setitem(ood_data.CLOSED_SETS, "digits", read)
    train_quietly("digits", "v.pth", epochs=1, batch_size=128, validation=200)
    (epoch,) = read_json("v.json")["epochs"]
    flags = ["--split", "validation", "--ood-types", "blob", "--checkpoint"]
    status, out, _ = command("test.py", *flags, "v.pth")
    assert status == 0 and "validation images" in out
    assert {is_train for (_, is_train), _ in read.call_args_list} == {True}
    results = read_json("v.ood.json")
    (run,) = results["checkpoints"]
    assert run["error_rate"] == pytest.approx(100 * (1 - epoch["validation_accuracy"]))
    *_, row = results["rows"]
    assert (row["set"], row["positives"], row["negatives"]) == ("blob", 200, 40)
    status, _, err = command("test.py", *flags, "digits_resnet18.pth")
    assert status == 2 and "--validation NUMBER" in err


def test_a_folder_may_have_validation_images_of_its_own(class_folder):
    for name in ("cat", "dog"):
        write_images(class_folder / "val" / name, 3, seed=20)
    rest, labels, _ = ood_data.read_closed_set(str(class_folder), train=True, validation=5)
    held_out, _, classes = ood_data.read_closed_set(str(class_folder), train=False, validation=5)
    assert len(rest) == 24 and len(held_out) == 6 and classes == ["cat", "dog"]
    with pytest.raises(InputError, match="--validation 1437 leaves none of the 1437 images"):
        ood_data.read_closed_set("digits", train=True, validation=1437)
