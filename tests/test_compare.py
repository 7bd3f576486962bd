"""Did it help? Files of runs that are grouped, named and compared, from figures known by hand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_json
from scipy import stats

from experiments import compare

METRICS = {"auroc": "AUROC", "fpr95": "FPR95"}
SETS = {"gaussian": "noise", "blob": "noise", "svhn": "images", "photos": "images"}
SETTINGS = {"seed": 0, "epochs": 3, "lr": 0.1, "classes": ["cat", "dog"], "code": "c"}
OLD = {"sources": {"train.py": "a = 1\nb = 2\n"}}
NEW = {"sources": {"train.py": "a = 1\nb = loss(3)\n", "losses.py": "def loss(x):\n"}, "code": "e"}
SAME = {"sources": {"train.py": "a = 1  # one\nb = 2\n"}}  # of equal digest
LONG = {"sources": {"train.py": "\n".join(f"c{i} = {i}" for i in range(100))}, "code": "f"}


def write_run(name, figures=(40, 50, 50, 50, 50), weights=None, sources=None, **changes):
    """What test.py writes of a run: error rate, and every metric by set."""
    error_rate, *aurocs = figures
    rows = [
        {"score": score, "set": one} | dict.fromkeys(METRICS, auroc)
        for score in ("msp", "gen")
        for one, auroc in zip(SETS, aurocs, strict=True)
    ]
    sets = {one: {"kind": kind, "digest": one} for one, kind in SETS.items()}
    log = {"device": changes.pop("device", "cpu"), "versions": {"torch": "2"}, "sources": sources}
    log["epochs"] = [{"test_accuracy": 0.5}] * changes.pop("epochs_done", 3)
    log["settings"] = SETTINGS | changes
    log["code"] = log["settings"]["code"]
    run = {"training": log, "checkpoint": {"weights": weights or name}, "rows": rows, "sets": sets}
    run |= {"scores": {"msp": "m"}, "metrics": METRICS, "error_rate": error_rate}
    path = Path(f"{name}.ood.json")
    path.write_text(json.dumps(run))
    return path


def write_runs(*runs):
    """A file for each dictionary of what a run has unlike the others."""
    return [write_run(f"r{i}", **{"seed": i} | run) for i, run in enumerate(runs)]


def write_groups(*groups):
    """A file for each run of each group of figures; groups differ in lr."""
    runs = [{"figures": row, "lr": lr} for lr, rows in enumerate(groups) for row in rows]
    return write_runs(*runs)


def edit(path, **parts):
    path.write_text(json.dumps(read_json(path) | parts))


def draw_figures(count, seed=0):
    return np.random.default_rng(seed).normal(70, 5, (count, 1 + len(SETS)))


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def printed(capsys, monkeypatch):
    """printed(*files) is what compare.py prints, without its picture: it takes half a second."""
    monkeypatch.setattr(compare, "draw", lambda *args: True)

    def run(*files, **options):
        assert compare.main(compare.Config(files, **options)) == 0
        return capsys.readouterr().out

    return run


def last_table(out):
    """{first cell: the others} of the lines of the comparison."""
    lines = [line.split("|")[1:-1] for line in out.split("\n\n")[-2].splitlines()]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


def test_two_settings_are_compared_with_welchs_interval(printed):
    groups = draw_figures(5), draw_figures(2, seed=1)
    table = last_table(printed(*write_groups(*groups)))
    titles = ["r: lr 0 (5 runs)", "r5.ood.json: lr 1 (2 runs)", "r5.ood.json minus r"]
    assert table["error rate and AUROC, msp"] == titles
    a, b = (np.column_stack([x, x[:, 1:3].mean(1), x[:, 3:].mean(1)]) for x in groups)
    squares = a.var(0, ddof=1) / len(a), b.var(0, ddof=1) / len(b)
    freedom = (squares[0] + squares[1]) ** 2
    freedom /= squares[0] ** 2 / (len(a) - 1) + squares[1] ** 2 / (len(b) - 1)
    half_width = stats.t.ppf(0.975, freedom) * (squares[0] + squares[1]) ** 0.5
    means = b.mean(0) - a.mean(0)
    names = ("error rate", *SETS, "mean of noises", "mean of image sets")
    for name, mean, half in zip(names, means, half_width, strict=True):
        assert table[name][-1] == f"{mean:+.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def test_holms_correction_by_hand(printed):
    p_values = [0.01, 0.04, 0.03, 0.005]  # 0.005 < 0.0125, 0.01 < 0.0167, but 0.03 > 0.025: stop
    assert compare.holm(p_values).tolist() == [True, False, False, True]
    assert compare.holm([0.02, np.nan, 0.04]).tolist() == [True, False, True]  # of two
    base = draw_figures(4)  # what would be significant among 7 rows is not among 14
    error = base[:, 0].std(ddof=1) * (2 / 4) ** 0.5
    shift = stats.t.isf(0.9 * 0.05 / 7 / 2, 6) * error
    files = write_groups(base, base + [shift, 0, 0, 0, 0], base)
    assert [printed(*taken).count("] *") for taken in (files[:8], files)] == [1, 0]


def test_a_change_without_effect_earns_a_star_in_one_table_of_twenty():
    """Independent rows of one distribution, five runs a side: any star in at most 6%."""
    base, other = np.random.default_rng(0).normal(size=(2, 2000, 11, 5))
    p_values = stats.ttest_ind(other, base, axis=-1, equal_var=False).pvalue
    assert compare.compare_means(base[0, 0], other[0, 0])[-1] == pytest.approx(p_values[0, 0])
    assert np.mean([compare.holm(of_table).any() for of_table in p_values]) <= 0.06


@pytest.mark.parametrize("base,tweak,expected", [
    ([50, None], [54, 55], "n/a"),  # an undefined figure
    ([50, 51, 53], [54], "+2.67 (50.00 to 53.00)"),
    ([50], [54], "+4.00"),
    ([50, 50], [51, 51], "+1.00 (51.00 to 51.00)"),  # the rounding of a few images, not certainty
])  # fmt: skip
def test_without_an_interval_the_range_is_shown(base, tweak, expected, printed, recwarn):
    groups = [[[40, *[figure] * 4] for figure in figures] for figures in (base, tweak)]
    table = last_table(printed(*write_groups(*groups)))
    assert table["blob"][-1] == expected and not recwarn.list


def test_runs_of_one_seed_are_averaged_first(printed):
    """Two runs of seed 0, on other devices, and one of seed 1: two figures, not three."""
    figures = [[error_rate, *[50] * 4] for error_rate in (40, 42, 44)]
    runs = [{"seed": i // 2, "device": f"d{i}", "figures": figures[i]} for i in range(3)]
    out = printed(*write_runs(*runs, {"lr": 1}))
    assert last_table(out)["error rate"][0] == "42.50 +- 2.12"
    assert "with the same seed are averaged first" in out
    assert "d0, torch 2; d1, torch 2; d2, torch 2; cpu, torch 2" in out


@pytest.mark.parametrize("runs,names", [
    ([{}, {"seed": 1}], ["r"]),
    ([{"lr": 0.2}, {"epochs": 9, "epochs_done": 2}],
     ["r0: epochs 3, lr 0.2", "r1: epochs 9, lr 0.1, only 2 epochs done"]),
    ([{}, {"warm_up": 5}], ["r0: warm_up None", "r1: warm_up 5"]),  # a setting that one log lacks
    ([{}, {"classes": ["cat"]}], ["r0: 2 classes", "r1: 1 classes"]),
    ([OLD, NEW], ["r0: code c", "r1: code `def loss(x):`"]),
    ([OLD, SAME | {"lr": 9}, LONG],
     ["r0: lr 0.1, code c", "r1: lr 9, code c", "r2: lr 0.1, code `c0 = 0`"]),
])  # fmt: skip
def test_groups_are_named_by_what_differs(runs, names, printed):
    titles = [line for line in printed(*write_runs(*runs)).splitlines() if "; error rate" in line]
    assert [title.rsplit(": ", 1)[0] for title in titles] == names


def test_files_without_a_log_are_groups_of_their_own(printed):
    """As the published figures, which have no digests either. Sets may be missing."""
    one, two, logged = write_runs({}, {}, {})
    rows = [row for row in read_json(two)["rows"] if row["set"] != "photos"]
    edit(one, training=None, sets={"svhn": {"kind": "images"}}, scores={})
    edit(two, training=None, rows=rows)
    out = printed(one, two, logged)
    titles, *_ = last_table(out).values()
    assert titles == ["r0 (1 run)", "r1 (1 run)", "r1 minus r0", "r2 (1 run)", "r2 minus r0"]
    assert "Left out, not in every file: photos." in out and "photos" not in last_table(out)


def test_codes_are_compared_line_by_line(printed):
    files = write_runs(OLD, NEW)
    out = printed(*files)
    assert "The code of r1 against that of r0.ood.json:\n" in out
    assert "\n-b = 2\n+b = loss(3)\n" in out and "\n+def loss(x):\n" in out
    assert "of 2 runs" in printed(*files, ignore_code=True)
    out = printed(*write_runs(OLD, LONG))
    assert "+c34" in out and "+c36" not in out and "... and 65 lines more" in out  # of 105


def test_equal_weights_count_once_or_had_no_effect(printed):
    twin = {"seed": 0, "weights": "r0"}
    one, two, twin, change = write_runs({}, {}, twin, twin | {"lr": 9})
    out = printed(one, two, one, twin)
    assert "of 2 runs" in out and out.count("equal weights: they count once") == 2
    out = printed(one, two, change)
    assert "r0.ood.json and r3.ood.json have equal weights: the change had no effect" in out
    assert "r3 minus r" in out


@pytest.mark.parametrize("damage,message", [
    (lambda file: edit(file, sets={"svhn": {"digest": "others"}}),
     "r0.ood.json and r1.ood.json differ in the content of set svhn"),
    (lambda file: edit(file, scores={"msp": "edited"}), "differ in the content of score msp"),
    (lambda file: edit(file, error_rate=float("nan")), "a figure is no percentage"),
    (lambda file: edit(file, rows=read_json(file)["rows"][4:]), "has no score msp: use gen"),
    (lambda file: file.write_bytes(bytes(range(256)) * 4000), "r1.ood.json is no .ood.json file"),
])  # fmt: skip
def test_what_does_not_compare_ends_in_one_line(damage, message, capsys):
    files = write_runs({}, {})
    damage(files[1])
    with pytest.raises(SystemExit) as stop:
        compare.main(compare.Config(files))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err
    assert err.count("\n") == 1 and len(err) < 300, err


def test_tables_are_printed_where_no_picture_can_be_drawn():
    """In a process of its own, in which neither torch nor the scripts can be imported."""
    Path("torch.py").write_text("raise SystemExit('torch is imported')")
    files = write_runs({}, {"lr": 1})
    command = [sys.executable, ROOT / "experiments/compare.py", *files]
    environment = {"PYTHONPATH": ".", "MPLBACKEND": "nosuch"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "r1 minus r0" in run.stdout
    assert run.stderr.startswith("error: no picture") and run.stderr.count("\n") == 1
