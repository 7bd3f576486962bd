"""Did it help? Files of runs that are grouped, named and compared, from figures known by hand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_json
from matplotlib.image import imread
from scipy import stats

from experiments import compare

SETS = {"right / wrong": None, "gaussian": "noise", "blob": "noise"}
SETS |= {"svhn": "images", "photos": "images"}
SETTINGS = {"epochs": 3, "lr": 0.1, "weight_decay": 1e-4, "classes": ["cat", "dog"]}


def write_evaluation(name, seed, figures, sources=None, weights=None, **changes):
    """What test.py writes of a run: error rate, AUROC by set; each further metric is 1 more."""
    error_rate, *aurocs = figures
    rows = []
    for score in ("msp", "gen"):
        for one, auroc in zip(SETS, aurocs, strict=True):
            metrics = {metric: auroc + i for i, metric in enumerate(compare.METRICS)}
            rows.append({"score": score, "set": one} | metrics)
    sets = {one: {"kind": kind, "digest": one} for one, kind in SETS.items() if kind}
    for one in sets.values():
        one["effective_classes"] = 5 + 2 * seed
    done = [{"epoch": i, "test_accuracy": 0.1 * i} for i in range(changes.pop("epochs_done", 3))]
    training = {"device": changes.pop("device", "cpu"), "versions": {"torch": "2"}}
    settings = SETTINGS | {"seed": seed, "data": "d", "code": "c"} | changes
    training |= {"settings": settings, "sources": sources, "epochs": done}
    training["code"] = settings["code"]
    run = {"training": training, "checkpoint": {"weights": weights or name}, "rows": rows}
    run |= {"sets": sets, "scores": {"msp": "m"}, "error_rate": error_rate}
    path = Path(f"{name}.ood.json")
    path.write_text(json.dumps(run))
    return path


def write_runs(*runs):
    """A file for each dictionary of what a run has unlike the others."""
    figures = draw_figures(1)[0]
    return [
        write_evaluation(f"r{i}", **{"seed": i, "figures": figures} | run)
        for i, run in enumerate(runs)
    ]


def write_groups(*groups):
    """A file for each run of each group of figures; groups differ in lr."""
    return [
        write_evaluation(f"{'abc'[number]}_seed{seed}", seed, values, lr=0.1 + number)
        for number, figures in enumerate(groups)
        for seed, values in enumerate(figures)
    ]


def edit(path, **parts):
    path.write_text(json.dumps(read_json(path) | parts))
    return path


def draw_figures(count, seed=0):
    return np.random.default_rng(seed).normal(70, 5, (count, len(SETS) + 1))


def lines_of(figures):
    """The lines of the table by hand: the figures, then the means of noises and of images."""
    noises, images = figures[:, [2, 3]].mean(1), figures[:, [4, 5]].mean(1)
    return np.column_stack([figures, noises, images])


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def printed(capsys):
    """printed(*files) is what compare.py prints, without its picture: it takes half a second."""

    def run(*files, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compare, "draw", lambda *args: True)
            assert compare.main(compare.Config(files, **options)) == 0
        return capsys.readouterr().out

    return run


def cells_of(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def last_table(out):
    """The cells of the comparison, a list for each line."""
    return [cells for cells in cells_of(out.split("\n\n")[-2]) if cells]


@pytest.mark.parametrize("counts", [(3, 3), (5, 2)])
def test_two_settings_are_compared_with_welchs_interval(counts, printed):
    """By its formula, unpaired whatever the seeds; stars by Holm's steps over all rows."""
    base, tweak = draw_figures(counts[0]), draw_figures(counts[1], seed=1)
    tweak[:, 1] += 15
    title, _, *lines = last_table(printed(*write_groups(base, tweak)))
    runs = f"a_seed: lr 0.1 ({counts[0]} runs)", f"b_seed: lr 1.1 ({counts[1]} runs)"
    assert title == ["error rate and AUROC, msp", *runs, "b_seed minus a_seed"]
    names = ["error rate", *SETS, "mean of noises", "mean of image sets"]
    assert [line[0] for line in lines] == names

    a, b = lines_of(base), lines_of(tweak)
    squares = a.var(0, ddof=1) / len(a), b.var(0, ddof=1) / len(b)
    freedom = (squares[0] + squares[1]) ** 2
    freedom /= squares[0] ** 2 / (len(a) - 1) + squares[1] ** 2 / (len(b) - 1)
    error = (squares[0] + squares[1]) ** 0.5
    difference = b.mean(0) - a.mean(0)
    half_width = stats.t.ppf(0.975, freedom) * error
    p_values = 2 * stats.t.sf(np.abs(difference / error), freedom)
    star = " *" if p_values.min() < 0.05 / len(p_values) else ""
    for line, mean, half, p in zip(lines, difference, half_width, p_values, strict=True):
        marked = star if p == p_values.min() else ""
        assert line[-1] == f"{mean:+.2f} [{mean - half:.2f}, {mean + half:.2f}]{marked}"
    assert counts == (5, 2) or star


@pytest.mark.parametrize("p_values,expected", [
    ([0.01, 0.04, 0.03, 0.005], [True, False, False, True]),  # 0.005 < 0.0125, 0.01 < 0.0167
    ([0.02, 0.02, 0.001], [True, True, True]),  # 0.001 < 0.0167, 0.02 < 0.025, 0.02 < 0.05
    ([0.04, np.nan, 0.03], [False, False, False]),  # 0.03 is not below 0.025: stop
    ([0.04, np.nan], [True, False]),
    ([0.05], [False]),
    ([], []),
])  # fmt: skip
def test_holms_correction_by_hand(p_values, expected):
    assert compare.holm(p_values).tolist() == expected


def test_a_change_without_effect_earns_a_star_in_one_table_of_twenty():
    """Independent rows of one distribution, five runs a side: any star in at most 6%."""
    base, other = np.random.default_rng(0).normal(size=(2, 2000, 11, 5))
    p_values = stats.ttest_ind(other, base, axis=-1, equal_var=False).pvalue
    assert compare.compare_means(base[0, 0], other[0, 0])[-1] == pytest.approx(p_values[0, 0])
    assert np.mean([compare.holm(of_table).any() for of_table in p_values]) <= 0.06


def test_holm_counts_the_rows_of_both_changes(printed):
    """A difference that would be significant among 8 rows is not among 16."""
    base, tweak = draw_figures(4), draw_figures(4)
    p_value = 1
    while p_value > 0.9 * 0.05 / 8:
        tweak[:, 0] += 0.05
        p_value = stats.ttest_ind(tweak[:, 0], base[:, 0], equal_var=False).pvalue
    files = write_groups(base, tweak, base)
    assert [printed(*taken).count("] *") for taken in (files[:8], files)] == [1, 0]


def test_one_run_has_the_range_of_the_others(printed):
    base, tweak = draw_figures(3), draw_figures(1, seed=1)
    out = printed(*write_groups(base, tweak))
    low, mean, high = base[:, 0].min(), base[:, 0].mean(), base[:, 0].max()
    assert last_table(out)[2][-1] == f"{tweak[0, 0] - mean:+.2f} ({low:.2f} to {high:.2f})"
    assert "No interval and no star for a single run" in out
    out = printed(*write_groups(base[:1], tweak))
    assert last_table(out)[2][-1] == f"{tweak[0, 0] - base[0, 0]:+.2f}"


def test_equal_differences_leave_no_interval(printed, recwarn):
    """Runs that all classify as many images: the rounding of a few images, not certainty."""
    groups = (np.full((2, len(SETS) + 1), value) for value in (50.0, 51.0))
    lines = last_table(printed(*write_groups(*groups)))[2:]
    assert {line[-1] for line in lines} == {"+1.00 (51.00 to 51.00)"} and not recwarn.list


def test_undefined_figures_are_not_compared(printed):
    files = write_groups(draw_figures(2), draw_figures(2, seed=1))
    rows = read_json(files[0])["rows"]
    edit(files[0], rows=[row | ({"auroc": None} if row["set"] == "blob" else {}) for row in rows])
    lines = {name: cells for name, *cells in last_table(printed(*files))}
    for cells in (lines["blob"], lines["mean of noises"]):
        assert cells[0] == cells[2] == "n/a"


def test_runs_of_one_seed_are_averaged_first(printed):
    """Two runs of seed 0, on other devices, and one of seed 1: two figures, not three."""
    runs = [
        {"seed": seed, "device": f"d{error_rate}", "figures": [error_rate, *[50.0] * len(SETS)]}
        for seed, error_rate in ((0, 40), (0, 42), (1, 44))
    ]
    out = printed(*write_runs(*runs, {"lr": 1}))
    title, _, line, *_ = last_table(out)
    assert title[1].endswith(": lr 0.1 (2 runs)") and line[1] == "42.50 +- 2.12"
    assert "same seed are averaged first" in out
    assert "different devices: d40; d42; d44; cpu" in out


def test_tables_of_a_group_show_its_own_figures(printed):
    runs = [{"figures": [46 + i, *[10 + 2 * i] * 4, 16 + 2 * i]} for i in range(2)]
    out = printed(*write_runs(*runs))
    assert "mean +- standard deviation of 2 runs; error rate 46.50 +- 0.71" in out
    lines = cells_of(out)
    means = [f"{mean}.00 +- 1.41" for mean in (11, 12, 13, 14, 15)]
    assert ["svhn", *means, "6.00 +- 1.41"] in lines
    assert ["mean of noises", *["11.00 +- 1.41"] * 2] in lines  # by score
    assert ["mean of image sets", *["14.00 +- 1.41"] * 2] in lines
    assert "minus" not in out


OLD, NEW = {"train.py": "a = 1\nb = 2\n"}, {"train.py": "a = 1\nb = loss(3)\n"}
FILE = NEW | {"losses.py": "def loss(x):\n"}
LONG = {"train.py": "\n".join(f"c{i} = {i}" for i in range(100))}


@pytest.mark.parametrize("runs,names", [
    ([{}, {"seed": 1}], ["r"]),
    ([{"lr": 0.2}, {}], ["r0: lr 0.2", "r1: lr 0.1"]),
    ([{"lr": 0.2}, {"epochs": 9, "epochs_done": 9}],
     ["r0: epochs 3, lr 0.2", "r1: epochs 9, lr 0.1"]),
    ([{}, {"epochs_done": 2}], ["r0", "r1: only 2 epochs done"]),
    ([{}, {"data": "other"}], ["r0: data d", "r1: data other"]),
    ([{}, {"data": None}], ["r0: data d", "r1: data None"]),  # shipped logs older than this entry
    ([{}, {"warm_up": 5}], ["r0: warm_up None", "r1: warm_up 5"]),  # a setting that one log lacks
    ([{}, {"classes": ["cat"]}], ["r0: 2 classes", "r1: 1 classes"]),
    ([{"sources": OLD}, {"sources": NEW, "code": "e"}], ["r0: code c", "r1: code `b = loss(3)`"]),
    ([{"sources": NEW}, {"sources": FILE, "code": "e"}], ["r0: code c", "r1: code `def loss(x):`"]),
    ([{}, {"code": None}], ["r0: code c", "r1: code unknown"]),
    ([{"code": None}, {"code": None}], ["r"]),
    ([{"lr": 0.2}, {"lr": 0.2, "code": "e"}, {}],
     ["r0: lr 0.2, code c", "r1: lr 0.2, code e", "r2: lr 0.1, code c"]),
])  # fmt: skip
def test_groups_are_named_by_what_differs(runs, names, printed):
    titles = [line for line in printed(*write_runs(*runs)).splitlines() if "; error rate" in line]
    assert [title.rsplit(": ", 1)[0] for title in titles] == names


def test_ignore_code_groups_by_settings_and_data(printed):
    out = printed(*write_runs({}, {"code": "e"}, {"lr": 9}), ignore_code=True)
    assert "of 2 runs" in out and "r2: lr 9 (1 run)" in out


def test_runs_without_a_log_are_groups_of_their_own(printed):
    one, two, logged = write_runs({}, {}, {})
    out = printed(edit(one, training=None), edit(two, training=None), logged)
    titles = "r0 (1 run)|r1 (1 run)|r1 minus r0|r2 (1 run)|r2 minus r0"
    assert "|".join(last_table(out)[0][1:]) == titles


def test_codes_are_compared_line_by_line(printed):
    runs = {"sources": OLD}, {"sources": FILE, "code": "e"}, {"sources": LONG, "code": "f"}
    out = printed(*write_runs(*runs))
    assert "The code of r1 against that of r0:\n" in out
    assert "\n-b = 2\n+b = loss(3)\n" in out and "\n+def loss(x):\n" in out
    assert "+c37" not in out and "... and 65 lines more" in out  # of 2 + 1 + 2 + 100
    assert out.index("-b = 2") < out.index("error rate and AUROC")


def test_equal_weights_count_once_or_had_no_effect(printed):
    twin, change = {"seed": 0, "weights": "r0"}, {"seed": 0, "weights": "r0", "lr": 9}
    one, two, twin, change = write_runs({}, {}, twin, change)
    out = printed(one, two, one, twin)
    assert "of 2 runs" in out and out.count("equal weights: they count once") == 2
    out = printed(one, two, change)
    assert "r0.ood.json and r3.ood.json have equal weights: the change had no effect" in out
    assert "r3 minus r" in out


def test_what_does_not_compare_ends_in_one_line(capsys):
    one, two, whole = write_runs({}, {}, {})
    run = read_json(two)
    Path("weights.pth").write_bytes(bytes(range(256)) * 4000)
    sets = run["sets"] | {"svhn": run["sets"]["svhn"] | {"digest": "others"}}
    unknown = write_evaluation("unknown", 0, draw_figures(1)[0])  # as the published figures
    edit(unknown, sets={name: {"kind": kind} for name, kind in SETS.items()}, scores={})
    many = [row | {"auroc": "many"} for row in run["rows"]]
    for parts, message in (
        ({"sets": sets}, "r0.ood.json and r1.ood.json differ in the content of set svhn"),
        ({"scores": {"msp": "edited"}}, "differ in the content of score msp"),
        ({"rows": []}, "r1.ood.json is no .ood.json file of test.py"),
        ({"error_rate": float("nan")}, "a figure is no percentage"),
        ({"rows": many}, "is no .ood.json file"),
        (Path("none.ood.json"), "none.ood.json"),
        (Path("weights.pth"), "weights.pth"),
        ("odin", "has no score odin: use msp, gen"),
    ):
        score = parts if parts == "odin" else "msp"
        other = edit(two, **run | parts) if isinstance(parts, dict) else parts
        with pytest.raises(SystemExit) as stop:
            files = (unknown, one, whole if parts == "odin" else other)
            compare.main(compare.Config(files, score))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and message in err
        assert err.count("\n") == 1 and len(err) < 300, err


def test_sets_that_only_some_files_have_are_left_out(printed):
    one, two = write_runs({}, {"lr": 2})
    rows = [row for row in read_json(two)["rows"] if row["set"] != "photos"]
    out = printed(one, edit(two, rows=rows))
    assert "Left out, not in every file: photos." in out
    assert "photos" not in [line[0] for line in last_table(out)]


@pytest.mark.parametrize("count", [3, 12])
def test_the_picture_shows_every_run(count):
    """Nothing but white along its borders; as many colours as groups; long names fit."""
    files = [write_evaluation(f"{'n' * 70}_{i}", i, [50 + i] * 6, lr=i + 0.5) for i in range(count)]
    assert compare.main(compare.Config(files)) == 0
    pixels = imread("comparison.png")  # from 0 to 1
    for border in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert (border == 1).all()
    colours = {tuple(colour) for colour in np.round(pixels[..., :3].reshape(-1, 3), 2)}
    assert sum(max(colour) - min(colour) > 0.3 for colour in colours) >= count


@pytest.mark.parametrize("environment,picture", [
    ({}, "none/x.png"), ({"MPLBACKEND": "module://matplotlib_inline.none"}, "x.png"),
    ({"MPLBACKEND": "Qt4Agg"}, "x.png"), ({"MATPLOTLIBRC": "rc"}, "x.png"),
])  # fmt: skip
def test_tables_are_printed_whatever_becomes_of_the_picture(environment, picture):
    """In a process of its own, which imports neither torch nor the scripts."""
    Path("rc").write_bytes("axes.xmargin: none # é".encode("latin-1"))
    files = write_groups(draw_figures(2), draw_figures(2, seed=1))
    program = "import sys; from experiments import compare; from pathlib import Path;"
    program += "picture, *files = map(Path, sys.argv[1:]);"
    program += "status = compare.main(compare.Config(files, picture=picture));"
    program += "assert not {'torch', 'train', 'ood_utils'} & sys.modules.keys(); sys.exit(status)"
    command = [sys.executable, "-c", program, picture, *map(str, files)]
    environment = {"PYTHONPATH": str(ROOT), **environment}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "b_seed minus a_seed" in run.stdout and "Traceback" not in run.stderr
    drawn = Path(picture).exists()
    assert run.returncode == (not drawn) and run.stderr.count("error: no picture") == (not drawn)
    assert drawn or picture == "x.png" or run.stderr.count("\n") == 1
