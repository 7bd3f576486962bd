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

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results/README.md").read_text()
EXPERIMENTS = (ROOT / "experiments/README.md").read_text()


def read(name):
    return json.loads((ROOT / "results" / name).read_text())


SEEDS = read("cifar100_seeds.ood.json")
EARLIER = read("3dc3a9b/cifar100_seeds.ood.json")
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
    (RESULTS, evaluation.print_performance, (EARLIER, "in-distribution, at 3dc3a9b")),
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
    for results, folder in ((SEEDS, "."), (EARLIER, "results/3dc3a9b")):
        for run in results["checkpoints"]:
            log = train.read_log(ROOT / folder / run["path"])
            recipe = {"dataset": "cifar100", "epochs": 100, "batch_size": 128, "lr": 0.1}
            assert recipe.items() <= log["config"].items() and log["finished"]
            error_rate = 100 * (1 - log["epochs"][-1]["test_accuracy"])
            assert error_rate == pytest.approx(run["error_rate"], abs=0.1)  # float16 moves it
            minutes = sum(epoch["seconds"] for epoch in log["epochs"]) / 60
            assert folder != "." or f" {minutes:.0f} " in RESULTS


def aurocs(results, name, score="msp"):
    """Of each run, in the order of the checkpoints."""
    rows = results["rows"]
    return [row["auroc"] for row in rows if (row["set"], row["score"]) == (name, score)]


def test_the_text_speaks_of_these_runs():
    errors = [run["error_rate"] for run in SEEDS["checkpoints"]]
    sets = SEEDS["config"]["ood_types"]
    images = [name for name in sets if name not in NOISES]
    msp = np.mean([aurocs(SEEDS, name) for name in sets])
    max_logit = np.mean([aurocs(SEEDS, name, "max_logit") for name in sets])
    text = " ".join(README.split())
    assert f"error rate of {evaluation.spread(errors)}%" in text
    assert "error rate ({:.2f} and {:.2f})".format(*errors) in text
    assert "AUROC of {:.2f} and {:.2f}, in".format(*aurocs(SEEDS, "rademacher")) in text
    assert "{:.2f}, {:.2f} and {:.2f}.".format(*aurocs(EARLIER, "rademacher")) in text
    assert f"`msp` is ahead of it, {msp:.2f} to {max_logit:.2f}, and" in text
    found = [auroc for name in images for auroc in aurocs(SEEDS, name)]
    assert f"AUROC of {min(found):.0f} to {max(found):.0f}. From" in text
    assert max(np.ptp(aurocs(SEEDS, name)) for name in images) < 2.5
    earlier_images = [name for name in EARLIER["config"]["ood_types"] if name not in NOISES]
    assert max(np.ptp(aurocs(EARLIER, name)) for name in earlier_images) < 3.1
    assert 42 < max(np.ptp(aurocs(EARLIER, name)) for name in NOISES) < 43
    for results, names in ((SEEDS, images), (EARLIER, earlier_images)):
        for name in names:
            assert np.less(aurocs(results, name), aurocs(results, name, "max_logit")).all()
    by_set = [
        np.subtract(aurocs(EARLIER, name), aurocs(EARLIER, name, "max_logit"))
        for name in EARLIER["config"]["ood_types"]
    ]
    assert (np.mean(by_set, axis=0) < 0).sum() == 1
    classes = {name: [] for name in sets}
    for row in SEEDS["sets"]:
        classes.setdefault(row["set"], []).append(row["effective_classes"])
    means = [np.mean(classes[name]) for name in ("rademacher", "gaussian", "cifar10")]
    found = "({:.1f} effective ones; gaussian's for {:.1f}, CIFAR-10's for {:.1f})"
    assert found.format(*means) in text


def test_the_findings_of_the_experiments_are_in_their_files(capsys):
    text = " ".join(EXPERIMENTS.split())
    published_test_pass.print_tables(TEST_PASS)
    lines = capsys.readouterr().out.splitlines()[2:18]
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    outside_by = sorted(float(row[5].removeprefix("no, by ")) for row in cells if row[5] != "yes")
    assert len(cells) == 16 and len(outside_by) == 8 and "of all 16 figures 8 lie in" in text
    assert f"outside it by at most {outside_by[-2]} points" in text and outside_by[-1] == 9
    away = [[abs(float(row[i].split()[0]) - float(row[4])) for i in (0, 1)] for row in cells]
    assert sum(after < before for before, after in away) == 8
    after = re.search(r"\| error rate +\|[^|]+\| +(.*?) \|", EXPERIMENTS)[1]
    assert f"error rate of {after}%" in " ".join(README.split())

    detectors.print_tables(DETECTORS)
    correlation = re.search("by network: (.*)", capsys.readouterr().out)[1]
    assert f"by network, is {correlation}; " in text
    assert f"uncorrelated ({correlation})" in " ".join(README.split())
    ranks = pd.DataFrame(DETECTORS["rows"])
    ranks = ranks.assign(noise=ranks["set"].isin(list(NOISES)))
    ranks = ranks.pivot_table("auroc", "detector", "noise").rank(ascending=False)
    assert list(ranks.loc["Mahalanobis"]) == [19, 1] and list(ranks.loc["DICE"]) == [3, 21]
    by_set = pd.DataFrame(DETECTORS["rows"]).pivot_table("auroc", "detector", "set")
    by_set = by_set.rank(ascending=False)
    for name in ("gaussian", "rademacher"):
        assert by_set.loc["Mahalanobis", name] == 1 and by_set.loc["DICE", name] == 21
    correlations = by_set.corr()
    assert f"correlation {correlations.loc['gaussian', 'rademacher']:.2f})" in text
    unlike = correlations.loc[
        ["gaussian", "rademacher"], ["cifar10", "photos", "textures_10_of_47_classes"]
    ]
    assert f"({unlike.min(axis=None):.2f} to {unlike.max(axis=None):.2f})" in text
    wins = pd.DataFrame(DETECTORS["rows"]).pivot_table("auroc", ["set", "checkpoint"], "detector")
    wins = wins.gt(wins["MaxSoftmax"], axis=0)
    assert list(wins.columns[wins.all()]) == ["RMD"]
    for name in ("MaxLogit", "EnergyBased", "GEN", "ODIN", "ASH", "SCALE", "VRA"):
        assert wins[name][["svhn", "cifar10", "photos", "textures_10_of_47_classes"]].all()
        assert not wins[name][["gaussian", "rademacher"]].any()


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
