"""What the READMEs say against what they speak of: commands, code, links and figures."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT, write_images

import test as evaluation
import train
from ood_data import NOISES

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results/README.md").read_text()
SEEDS = json.loads((ROOT / "results/cifar100_seeds.ood.json").read_text())


def test_ci_runs_the_two_commands_of_the_first_screen():
    commands = re.findall(r"^```\n(pip install .*)\n```$", README, re.MULTILINE)
    assert len(commands) == 2
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert all(command in lines for command in commands)


def test_tables_are_those_of_the_results(capsys):
    evaluation.print_performance(SEEDS, "in-distribution, right")
    rows = capsys.readouterr().out.split("\n")
    assert len(rows) > 10 and all(row in README.splitlines() for row in rows)
    evaluation.print_performance(SEEDS, "OOD, wrong", "_out")
    evaluation.print_scores(SEEDS, "auroc", "AUROC")
    evaluation.print_scores(SEEDS, "fpr95", "FPR95, in-distribution positive")
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) > 30 and all(row in RESULTS.splitlines() for row in rows)


def test_every_evaluated_run_has_its_log_of_the_full_recipe():
    minutes = []
    for run in SEEDS["checkpoints"]:
        log = train.read_log(ROOT / "results" / run["path"])
        recipe = {"dataset": "cifar100", "epochs": 100, "batch_size": 128, "lr": 0.1}
        assert recipe.items() <= log["config"].items() and log["finished"]
        error_rate = 100 * (1 - log["epochs"][-1]["test_accuracy"])
        assert error_rate == pytest.approx(run["error_rate"], abs=1e-9)
        minutes.append(f"{sum(epoch['seconds'] for epoch in log['epochs']) / 60:.0f}")
    assert f"{', '.join(minutes[:-1])} and {minutes[-1]} minutes" in RESULTS


def test_the_text_speaks_of_these_runs():
    def aurocs(name, score="msp"):
        rows = SEEDS["rows"]
        return [row["auroc"] for row in rows if (row["set"], row["score"]) == (name, score)]

    errors = [run["error_rate"] for run in SEEDS["checkpoints"]]
    sets = list(dict.fromkeys(row["set"] for row in SEEDS["rows"]))[1:]
    images = [name for name in sets if name not in NOISES]
    means = [np.mean([aurocs(name, score) for name in sets]) for score in ("msp", "max_logit")]
    text = " ".join(README.split())
    assert f"error rate of {evaluation.spread(errors)}%" in text
    assert f"error rate ({min(errors):.2f} to {max(errors):.2f})" in text
    assert "{:.2f}, {:.2f} and {:.2f}".format(*aurocs("rademacher")) in text
    assert "`msp` is ahead of it, {:.2f} to {:.2f}.".format(*means) in text
    assert max(np.ptp(aurocs(name)) for name in images) < 3.1
    assert max(np.ptp(aurocs(name)) for name in ("cifar10_test", "textures_10_of_47_classes")) < 0.7
    assert 42 < max(np.ptp(aurocs(name)) for name in NOISES) < 43
    assert min(min(aurocs(name)) for name in images) > 61.5
    assert max(max(aurocs(name)) for name in images) < 71.5
    assert len(images) == 4
    assert all(np.less(aurocs(name), aurocs(name, "max_logit")).all() for name in images)


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
