"""What the READMEs say against what they speak of: commands, code, links and figures."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, write_images

import test as evaluation
import train
from experiments import detectors, float16, published_test_pass
from ood_data import NOISES
from ood_utils import SCORES

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results/README.md").read_text()
EXPERIMENTS = (ROOT / "experiments/README.md").read_text()


def read(name):
    return json.loads((ROOT / "results" / name).read_text())


SEEDS = read("cifar100_seeds.ood.json")
TEST_PASS = read("published_test_pass.json")
DETECTORS = read("detectors.json")
INSIDE = "in-distribution, right"


def test_ci_runs_the_two_commands_of_the_first_screen():
    commands = re.findall(r"^```\n(pip install .*)\n```$", README, re.MULTILINE)
    assert len(commands) == 2
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert all(command in lines for command in commands)


@pytest.mark.parametrize("text,show,arguments", [
    (README, evaluation.print_performance, (SEEDS, INSIDE)),
    (RESULTS, evaluation.print_performance, (SEEDS, "OOD, wrong", "_out")),
    (RESULTS, evaluation.print_scores, (SEEDS, "auroc", "AUROC")),
    (RESULTS, evaluation.print_scores, (SEEDS, "fpr95", "FPR95, in-distribution positive")),
    (RESULTS, evaluation.print_predicted_classes, (SEEDS,)),
    (RESULTS, float16.print_tables, (read("float16.json"),)),
    (EXPERIMENTS, published_test_pass.print_tables, (TEST_PASS,)),
    (EXPERIMENTS, detectors.print_tables, (DETECTORS,)),
])  # fmt: skip
def test_tables_are_those_of_the_results(text, show, arguments, capsys):
    show(*arguments)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 5 and all(row in text.splitlines() for row in rows)


def test_every_evaluated_run_has_its_log_of_the_full_recipe():
    for seed, run in enumerate(SEEDS["checkpoints"]):
        log = train.read_log(ROOT / run["path"])
        recipe = {"dataset": "cifar100", "epochs": 100, "batch_size": 128, "lr": 0.1, "seed": seed}
        assert recipe.items() <= log["config"].items() and log["finished"]
        error_rate = 100 * (1 - log["epochs"][-1]["test_accuracy"])
        assert error_rate == pytest.approx(run["error_rate"], abs=0.1)  # float16 moves it
    assert seed == 4


def of_runs(name, score="msp", metric="auroc"):
    """A figure of each run, in the order of the checkpoints."""
    rows = SEEDS["rows"]
    return [row[metric] for row in rows if (row["set"], row["score"]) == (name, score)]


def test_the_text_speaks_of_these_runs():
    sets = SEEDS["config"]["ood_types"]
    images = [name for name in sets if name not in NOISES]
    errors = [run["error_rate"] for run in SEEDS["checkpoints"]]
    moves = {name: np.ptp(of_runs(name)) for name in sets}
    of_images = max(moves[name] for name in images)
    of_noises = max(moves[name] for name in NOISES)
    found = [auroc for name in images for auroc in of_runs(name)]
    means = {score: np.mean([of_runs(name, score) for name in sets], axis=0) for score in SCORES}
    effective = {
        name: np.mean([row["effective_classes"] for row in SEEDS["sets"] if row["set"] == name])
        for name in sets
    }
    text = " ".join(README.split())
    for claim in (
        f"error rate of {evaluation.spread(errors)}%",
        f"AUROC of {min(found):.0f} to {max(found):.0f}.",
        f"noise move by up to {of_noises:.0f} points of AUROC, rows of images by {of_images:.1f}.",
        f"the error rate ({min(errors):.2f} to {max(errors):.2f})",
        f"lie within {of_images:.1f} points of each other",
        "Rademacher has an AUROC of {}".format(low_to_high(of_runs("rademacher"))),
        "gaussian of {}".format(low_to_high(of_runs("gaussian"))),
        "blob of {}".format(low_to_high(of_runs("blob"))),
        "({rademacher:.1f} effective ones; gaussian's for {gaussian:.1f}, CIFAR-10's for "
        "{cifar10:.1f})".format(**effective),
        "In each run `max_logit` is above `msp` on each of the four sets of images, and below it "
        "in the mean over all seven sets.",
    ):
        assert claim in text, claim
    for name in images:
        assert np.less(of_runs(name), of_runs(name, "max_logit")).all()
    assert np.less(means["max_logit"], means["msp"]).all()


def low_to_high(values):
    return f"{min(values):.2f} to {max(values):.2f}"


def test_the_findings_of_the_test_pass_are_in_its_file(capsys):
    published_test_pass.print_tables(TEST_PASS)
    lines = capsys.readouterr().out.splitlines()[2:18]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    errors = [run["error_rate"] for run in SEEDS["checkpoints"]]
    before = [min(errors) <= evaluation.PUBLISHED_ERROR_RATE <= max(errors)]
    for name, published in evaluation.PUBLISHED.items():
        for metric, value in zip(("auroc", "aupr", "fpr95"), published, strict=True):
            found = of_runs(name, metric=metric)
            before.append(min(found) <= value <= max(found))
    missed = {row[0]: row[6].removeprefix("no, by ") for row in cells if row[6] != "yes"}
    raised = float(cells[0][2].split()[0]) - float(cells[0][1].split()[0])
    text = " ".join(EXPERIMENTS.split())
    assert f"raises the error rate by {raised:.1f} points" in text
    assert f"Before it {sum(before)} of these 16 figures" in text
    assert f"after it {16 - len(missed)};" in text
    assert f"outside by {missed.pop('blob, FPR95')}." in text
    assert len(missed) == 2 and max(map(float, missed.values())) <= 0.3
    explained = ("error rate", "right / wrong, AUPR", "svhn, AUROC", "svhn, AUPR")
    for row, inside in zip(cells, before, strict=True):
        assert row[0] not in explained or (not inside and row[6] == "yes")
    assert f"error rate of {cells[0][2]}%" in " ".join(README.split())


def test_the_findings_of_the_detectors_are_in_their_file(capsys):
    rows = pd.DataFrame(DETECTORS["rows"])
    noise = rows["set"].isin(list(NOISES))
    by_kind = rows.assign(noise=noise).pivot_table("auroc", "detector", "noise")
    by_kind = by_kind.rank(ascending=False)
    by_set = rows.pivot_table("auroc", "detector", "set").rank(ascending=False)
    raw = ["gaussian", "rademacher"]
    images = ["cifar10", "photos", "textures_10_of_47_classes"]
    correlations = by_set.corr()
    unlike = correlations.loc[raw, images]
    detectors.print_tables(DETECTORS)
    by_network = re.search("by network: (.*)", capsys.readouterr().out)[1]
    text = " ".join(EXPERIMENTS.split())
    assert f"by network, is {by_network}; " in text
    assert f"uncorrelated ({by_network})" in " ".join(README.split())
    assert f"correlation {correlations.loc[*raw]:.2f})" in text
    assert f"({unlike.min(axis=None):.2f} to {unlike.max(axis=None):.2f})" in text
    of_blob = correlations["blob"].drop("blob")
    assert f"({of_blob.min():.2f} to {of_blob.max():.2f} with any other set)" in text
    assert list(by_kind.loc["Mahalanobis"]) == [20, 1] and list(by_kind.loc["DICE"]) == [5, 21]
    assert (by_set.loc["Mahalanobis", raw] == 1).all()
    wins = rows.pivot_table("auroc", ["set", "checkpoint"], "detector")
    wins = wins.gt(wins["MaxSoftmax"], axis=0)
    assert not wins.all().any()
    lost = wins.index[~wins["RMD"]]
    assert list(lost.get_level_values("set")) == ["rademacher"]
    for name in ("MaxLogit", "EnergyBased", "GEN", "ODIN", "ASH", "SCALE", "VRA"):
        assert wins[name][["svhn", *images]].all() and not wins[name][raw].any()


def test_the_python_of_the_readme_runs(in_digits_run, capsys):
    """A threshold for one image, a score from features, a detector of pytorch-ood."""
    checkpoint = ("digits_resnet18.pth",)
    evaluation.evaluate(evaluation.Config(checkpoint, ood_types=("gaussian",)))
    write_images(in_digits_run / "images", 1)
    (in_digits_run / "images/000.png").rename(in_digits_run / "image.png")
    snippets = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    said = []
    for snippet in snippets:
        capsys.readouterr()
        exec(snippet, {})
        said.append(capsys.readouterr().out)
    assert re.fullmatch(r"(in|out) [01]\.\d+\n", said[0])
    assert re.fullmatch(r"AUROC: \d+\.\d{4}, AUPR: .*\n", said[1])
    assert len(said) == 3 and 0 <= eval(said[2])["AUROC"] <= 1


def test_links_lead_somewhere():
    for folder in (".", "results", "experiments"):
        text = (ROOT / folder / "README.md").read_text()
        files = re.findall(r"\]\((?!http)([^)#]+)", text)
        files += re.findall(r"^\| `([\w./]+)`", text, re.MULTILINE)
        for target in files:
            assert (ROOT / folder / target).exists(), target
