"""Did it help? Runs that are kept apart, grouped by setting, and compared with intervals."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, same_bits, train_quietly, write_images
from scipy import stats

import ood_data
import test as evaluation
import train
from ood_utils import InputError

SETS = ("right / wrong", "gaussian", "blob", "svhn", "photos")


def make_evaluation(path, seed, figures, epochs_done=3, **settings):
    """What test.py writes of a run, with an AUROC for each of SETS after the error rate."""
    error_rate, *aurocs = figures
    run = {"path": path, "sha256": path, "error_rate": error_rate, "threshold": {"msp": 0.5}}
    if settings:
        settings = {"weight_decay": 1e-4, "stem": "imagenet", "images": 50000} | settings
        run["training"] = {"seed": seed, "settings": settings, "epochs_done": epochs_done}
    row = {"checkpoint": path, "score": "msp"}
    rows = [row | {"set": name, "auroc": a} for name, a in zip(SETS, aurocs, strict=True)]
    config = {"dataset": "none", "score": "msp", "seed": 0, "ood_types": SETS[1:]}
    results = {"config": config, "skipped": {}, "checkpoints": [run], "rows": rows}
    return results | {"sets": [{"checkpoint": path, "set": name, "images": 9} for name in SETS]}


def draw_figures(count, seed=0):
    return np.random.default_rng(seed).normal(70, 5, (count, len(SETS) + 1))


def cell_of(difference, half_width):
    low, high = difference - half_width, difference + half_width
    marked = " *" if low > 0 or high < 0 else ""
    return f"{difference:+.2f} [{low:.2f}, {high:.2f}]{marked}"


def lines_of(figures):
    """The lines of the table by hand: the figures, then the means of noises and of images."""
    noises, images = figures[:, [2, 3]].mean(1), figures[:, [4, 5]].mean(1)
    return np.column_stack([figures, noises, images])


def test_two_settings_with_the_same_seeds_are_compared_by_pairs(capsys):
    """In whatever order; by the formula of the paired t interval."""
    base, tweak = draw_figures(3), draw_figures(3, seed=1) + [0, 9, 9, 9, 9, 9]
    evaluations = [make_evaluation(f"b{i}", i, base[i], weight_decay=1e-4) for i in range(3)]
    evaluations += [make_evaluation(f"{i}", i, tweak[i], weight_decay=5e-4) for i in (2, 0, 1)]
    results = evaluation.combine([], evaluations)
    groups = [run["group"] for run in results["checkpoints"]]
    assert groups == ["weight_decay 0.0001"] * 3 + ["weight_decay 0.0005"] * 3
    table = evaluation.compare(results)
    assert list(table.index) == ["error rate", *SETS, "mean of noises", "mean of image sets"]
    first, second, difference = table.columns
    assert first == "weight_decay 0.0001 (3 runs)" and "paired by seed" in difference
    pairs = lines_of(tweak) - lines_of(base)
    half_width = stats.t.ppf(0.975, 2) * pairs.std(0, ddof=1) / 3**0.5
    assert list(table[difference]) == list(map(cell_of, pairs.mean(0), half_width))
    mean, spread = lines_of(base).mean(0), lines_of(base).std(0, ddof=1)
    assert list(table[first]) == [f"{m:.2f} +- {s:.2f}" for m, s in zip(mean, spread, strict=True)]
    evaluation.print_comparison(results)
    assert "8 intervals at 95%" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 3])
def test_other_seeds_are_compared_by_students_interval(count):
    """For one run against five: t of 4 degrees times s sqrt(1 + 1/5), a prediction interval."""
    base, tweak = draw_figures(5), draw_figures(count, seed=1)
    earlier = [make_evaluation(f"b{i}.pth", i, base[i], lr=0.1) for i in range(5)]
    mine = [make_evaluation(f"m{i}.pth", 7 + i, tweak[i], lr=0.2) for i in range(count)]
    *_, column = evaluation.compare(evaluation.combine(earlier, mine)).items()
    title, cells = column
    assert "unpaired" in title
    a, b = lines_of(base), lines_of(tweak)
    squares = ((a - a.mean(0)) ** 2).sum(0) + ((b - b.mean(0)) ** 2).sum(0)
    s = np.sqrt(squares / (3 + count))
    half_width = stats.t.ppf(0.975, 3 + count) * s * np.sqrt(1 / 5 + 1 / count)
    assert list(cells) == list(map(cell_of, b.mean(0) - a.mean(0), half_width))


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


def test_a_run_of_unknown_code_is_not_averaged_in_silence(capsys):
    runs = [make_evaluation("a.pth", 0, draw_figures(1)[0], lr=0.1)]
    runs.append(make_evaluation("b.pth", 1, draw_figures(1)[0], lr=0.1, code="edited"))
    evaluation.print_comparison(evaluation.combine(runs[:1], runs[1:]))
    assert "may differ, too: unknown, edited." in capsys.readouterr().out
    results = evaluation.combine([], runs)
    assert len({run["group"] for run in results["checkpoints"]}) == 1
    for row in (*results["rows"], *results["sets"]):
        row |= dict.fromkeys((*evaluation.METRICS, "effective_classes"), 50.0)
    evaluation.print_tables(results)
    assert "The code of some of these runs is unknown" in capsys.readouterr().out


def test_one_run_against_one_has_no_interval(capsys):
    figures = draw_figures(2)
    pair = [make_evaluation(f"{i}.pth", 0, figures[i], lr=0.1 + i) for i in range(2)]
    results = evaluation.combine([], pair)
    cells = evaluation.compare(results).iloc[:, -1]
    assert list(cells) == [f"{value:+.2f}" for value in lines_of(figures)[1] - lines_of(figures)[0]]
    results["config"]["dataset"] = "cifar100"
    evaluation.print_comparison(results)
    out = capsys.readouterr().out
    assert "no interval" in out and "shipped" in out
    shipped = pd.DataFrame(json.loads(evaluation.SEEDS.read_text())["rows"])
    svhn = shipped[(shipped["set"] == "svhn") & (shipped["score"] == "msp")]["auroc"]
    (line,) = [line for line in out.splitlines() if line.startswith("| svhn")]
    assert line.split("|")[-2].strip() == f"{np.ptp(svhn):.2f}"


@pytest.mark.parametrize("runs,earlier,names", [
    ([{"lr": 0.1, "code": "a"}, {"lr": 0.1, "code": "a"}], 0, ["0", "0"]),
    ([{"lr": 0.1, "code": "a"}, {"lr": 0.1, "code": "b"}], 0, ["code a", "code b"]),
    ([{"lr": 0.1, "code": "a"}, {"lr": 0.2, "code": "b"}], 0, ["lr 0.1", "lr 0.2"]),
    ([{"lr": 0.1, "stem": "x"}, {"lr": 0.2, "stem": "x"}, {"lr": 0.1, "stem": "y"}], 0,
     ["stem x, lr 0.1", "stem x, lr 0.2", "stem y, lr 0.1"]),
    ([{"lr": 0.1}, {"lr": 0.1, "epochs_done": 2}], 0, ["epochs_done 3", "epochs_done 2"]),
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


def copy_run(folder, name, seed, shift, **settings):
    """A copy of the digits run with another seed, other settings and a few other logits."""
    state = torch.load("digits_resnet18.pth", weights_only=True)
    *_, bias = state
    state[bias] = state[bias] + shift * torch.linspace(-1, 1, 10)
    torch.save(state, folder / f"{name}.pth")
    log = json.loads(Path("digits_resnet18.json").read_text())
    log["config"] |= settings | {"seed": seed}
    (folder / f"{name}.json").write_text(json.dumps(log))
    return str(folder / f"{name}.pth")


def test_runs_are_compared_from_the_command_line(in_tiny_run, tmp_path, command):
    """Own files for each run, one of all; earlier evaluations without their weights."""
    base = [copy_run(tmp_path, f"base{seed}", seed, 0.1 * seed) for seed in range(2)]
    tweak = [copy_run(tmp_path, f"t{seed}", seed, 2 + 0.3 * seed, lr=0.9) for seed in range(2)]
    status, out, _ = command("test.py", "--checkpoint", *base, "--ood-types", "blob", "gaussian")
    assert status == 0 and "of 2 runs, mean +- standard deviation" in out and "minus" not in out
    files = sorted(path.name for path in tmp_path.glob("*.ood.*"))
    assert files == ["base0.ood.json", "base0.ood.npz", "base0_and_1.ood.json",
                     "base0_and_1.ood.png", "base1.ood.json", "base1.ood.npz"]  # fmt: skip
    for path in base:
        shutil.move(path, path + ".gone")
    flags = ["--checkpoint", *tweak, "--ood-types", "blob", "photos", "--name", "both", "--compare"]
    earlier = [tmp_path / f"base{seed}.ood.json" for seed in range(2)]
    status, out, _ = command("test.py", *flags, *earlier)
    assert status == 0 and out.count("Error Rate") == 2
    assert "lr 0.9 minus lr 0.05, paired by seed" in out
    assert "Left out, not in every evaluation: gaussian, photos." in out
    results = json.loads((tmp_path / "both.ood.json").read_text())
    assert [run["training"]["seed"] for run in results["checkpoints"]] == [0, 1, 0, 1]
    own = json.loads((tmp_path / "t1.ood.json").read_text())
    assert {row["checkpoint"] for row in own["rows"]} == {tweak[1]}
    assert {row["group"] for row in own["rows"]} == {"lr 0.9"}
    assert own["checkpoints"][0]["training"]["settings"]["lr"] == 0.9
    with_both = command("test.py", *flags, tmp_path / "base0_and_1.ood.json")[1]
    assert "paired by seed" in with_both

    def edit(name, change):
        results = json.loads(earlier[0].read_text())
        change(results)
        (tmp_path / f"{name}.ood.json").write_text(json.dumps(results))

    edit("count", lambda results: results["sets"][0].update(images=361))
    edit("content", lambda results: results["content"].update({"closed set": "other"}))
    edit("empty", lambda results: results.update(rows=[]))
    edit("code", lambda results: results.update(code="edited"))
    _, _, err = command("test.py", *flags, tmp_path / "code.ood.json")
    assert "ood_utils.py has changed since" in err
    (tmp_path / "log.ood.json").write_text((tmp_path / "t0.json").read_text())
    for file, message in (
        ("count.ood.json", "images of closed set 361 -> 360"),
        ("content.ood.json", "content of closed set other -> "),
        ("empty.ood.json", "is not an .ood.json file of test.py"),
        ("log.ood.json", "is not an .ood.json file of test.py"),
        ("none.ood.json", "No such file"),
        ("t1.ood.json", "pass it once"),
        (ROOT / "results/cifar100_seeds.ood.json", "closed set cifar100 -> digits"),
    ):
        status, _, err = command("test.py", *flags, tmp_path / file)
        assert status == 2 and message in err and err.count("\n") == 2, err
    shutil.copy(tweak[0], tmp_path / "twin.pth")
    for twin in ("twin.pth", "t0.pth"):
        status, _, err = command("test.py", "--checkpoint", tweak[0], tmp_path / twin)
        assert status == 2 and "has the weights of" in err


def test_two_runs_of_one_seed_are_named(in_tiny_run, tmp_path, command):
    runs = [copy_run(tmp_path, name, 0, shift) for name, shift in (("a", 0), ("b", 0.1))]
    out = command("test.py", "--ood-types", "blob", "--checkpoint", *runs)[1]
    assert "of 2 runs" in out and "have the same seed" in out


def test_the_checkpoint_of_train_is_the_default(in_tiny_run, command, monkeypatch):
    """Also where it is edited in train.py's Config."""
    monkeypatch.setattr(train.Config, "checkpoint", "nosuch.pth")
    status, _, err = command("test.py", "--dataset", "digits")
    assert status == 2 and "No checkpoint at nosuch.pth" in err


def test_a_folder_that_cannot_be_written_is_refused_before_scoring(in_tiny_run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(InputError, match="cannot be written to: pass --output"):
        evaluation.load(evaluation.Config("digits_resnet18.pth"))


def test_the_shipped_results_are_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    config = evaluation.Config()
    assert evaluation.output_path(config, tmp_path / "a.pth", ".x").parent == Path()
    config = evaluation.Config(output=str(tmp_path))
    assert evaluation.output_path(config, tmp_path / "a.pth", ".x") == tmp_path / "a.x"


def files_of(folder, stem):
    return {path.name.removeprefix(stem): path.read_bytes() for path in folder.glob(f"{stem}.*")}


@pytest.fixture
def finished(in_tiny_run):
    """(data set, checkpoint, its files) of a finished run that was evaluated."""
    for ending in ("json", "npz", "png"):
        (in_tiny_run / f"a.ood.{ending}").write_bytes(ending.encode())
    return in_tiny_run / "pets", in_tiny_run / "a.pth", files_of(in_tiny_run, "a")


@pytest.mark.parametrize("option,message", [
    ({"lr": 0.03}, "lr 0.02 -> 0.03"),
    ({"seed": 1}, "seed 0 -> 1"),
    ({}, "code ........ -> edited"),
    ({"content": "other"}, "content ........ -> other"),  # a folder of the same name
])  # fmt: skip
def test_a_finished_run_of_another_kind_is_kept(finished, option, message, monkeypatch, capsys):
    folder, path, before = finished
    if not option:
        monkeypatch.setattr(train, "digest_code", lambda *files: "edited")
    if "content" in option:
        content = option.pop("content")
        monkeypatch.setattr(ood_data, "digest", lambda loader: content)
    train_quietly(folder, path, epochs=1, **option)
    out = capsys.readouterr().out
    assert re.search(f"kept the finished run as .*a.1.pth \\({message}\\)", out)
    assert f"test.py --checkpoint {path.with_name('a.1.pth')} {path}" in out
    assert "starting over" not in out
    train_quietly(folder, path, epochs=1, **option)  # the same again starts over
    out = capsys.readouterr().out
    assert "starting over: the first save replaces" in out and "kept" not in out
    assert files_of(path.parent, "a.1") == before
    assert not path.with_name("a.2.pth").exists() and path.exists()


@pytest.mark.parametrize("moves", range(17))
def test_a_kill_before_a_file_is_moved_loses_nothing(finished, moves, monkeypatch, capsys):
    """First the five files of the kept run, then in each of four epochs state, checkpoint, log."""
    folder, path, before = finished
    moved = []

    def until_killed(operation):
        def run(*args, **options):
            if len(moved) == moves:
                raise KeyboardInterrupt
            operation(*args, **options)
            moved.append(Path(args[-1]).name)

        return run

    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.os, "replace", until_killed(train.os.replace))
        patch.setattr(Path, "unlink", until_killed(Path.unlink))  # of the last state
        train_quietly(folder, path, lr=0.03)
    capsys.readouterr()
    saves = ["a.resume.pth", "a.pth", "a.json"] * 3 + ["a.pth", "a.json", "a.resume.pth"]
    assert moved[5:] == saves[: max(moves - 5, 0)]
    state_is_there = path.with_name("a.resume.pth").exists()
    train_quietly(folder, path, lr=0.03, resume=state_is_there)
    saved = min((moves - 3) // 3, 3)
    assert (f"resuming after epoch {saved} of 4" in capsys.readouterr().out) == (saved > 0)
    assert same_bits(path, path.with_name("whole.pth"))
    assert files_of(path.parent, "a.1") == before and not path.with_name("a.2.pth").exists()
    assert not path.with_name("a.resume.pth").exists()


def test_the_name_has_the_seed():
    assert str(train.checkpoint_path(None, "digits", 0)) == "digits_resnet18.pth"
    assert str(train.checkpoint_path(None, "digits", 3)) == "digits_resnet18_seed3.pth"
    assert str(train.checkpoint_path("b.pth", "digits", 3)) == "b.pth"


def test_words_in_the_code_do_not_count_and_what_is_computed_does(tmp_path):
    texts = {tmp_path / name: (ROOT / name).read_text() for name in ("train.py", "ood_data.py")}

    def digest(edits):
        for file, text in texts.items():
            for old, new in edits.items():
                text = text.replace(old, new)
            file.write_text(text)
        return train.digest_code(*texts)

    code = digest({})
    words = {
        '"""Pad with black': '"""Pad it',
        "    return crop_and_flip": "\n    # so\n    return crop_and_flip",
        "def build_optimizer(model, config):\n": 'def build_optimizer(model, config):\n    "x"\n',
        "    epochs: int = 100": "    epochs: int = 9",
    }
    assert digest(words) == code
    assert digest({"F.cross_entropy(model(images)": "F.cross_entropy(2 * model(images)"}) != code
    assert digest({"MEAN = (0.4914": "MEAN = (0.5"}) != code


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
    read, splits = ood_data.CLOSED_SETS["digits"], []

    def note_split(root, train):
        splits.append(train)
        return read(root, train)

    monkeypatch.setitem(ood_data.CLOSED_SETS, "digits", note_split)
    options = {"dataset": "digits", "checkpoint": "v.pth", "device": "cpu"}
    train.train_model(train.Config(**options, epochs=1, validation=200))
    assert set(splits) == {True}
    log = json.loads((in_tiny_run / "v.json").read_text())
    assert "test_accuracy" not in log["epochs"][0] and log["validation_images"] == 200
    flags = ["--split", "validation", "--ood-types", "blob", "--checkpoint"]
    status, out, _ = command("test.py", *flags, "v.pth")
    assert status == 0 and "validation images" in out
    results = json.loads((in_tiny_run / "v.ood.json").read_text())
    (run,) = results["checkpoints"]
    assert run["error_rate"] == pytest.approx(100 * (1 - log["epochs"][0]["validation_accuracy"]))
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
