"""The README against what it speaks of: the commands that CI runs and the files that its tables were made from."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT

import test as evaluation
import train
from ood_data import NOISES

README = (ROOT / "README.md").read_text()
each_evaluation = pytest.mark.parametrize(
    "path", sorted((ROOT / "results").glob("*.ood.json")), ids=lambda path: path.name
)


def test_ci_runs_the_two_commands_of_the_first_screen():
    commands = re.findall(r"^```\n(pip install .*)\n```$", README, re.MULTILINE)
    assert len(commands) == 2
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert all(command in lines for command in commands)


@each_evaluation
def test_tables_are_those_of_the_results(path, command):
    _, out, _ = command("test.py", "--table", path)
    rows = [line for line in out.splitlines() if line.startswith(("|", "Closed set"))]
    assert len(rows) > 10 and all(row in README.splitlines() for row in rows)
    assert f"results/{path.stem}.png" in README and path.with_suffix(".png").exists()


@each_evaluation
def test_every_evaluated_run_has_its_log_of_the_full_recipe(path):
    minutes = []
    for run in json.loads(path.read_text())["runs"]:
        log = json.loads((ROOT / "results" / run["checkpoint"]).with_suffix(".json").read_text())
        recipe = dict(dataset="cifar100", images=50_000, epochs=train.EPOCHS, batch_size=train.BATCH_SIZE, lr=train.LR)
        assert recipe.items() <= log["config"].items() and len(log["epochs"]) == train.EPOCHS
        assert 100 * (1 - log["epochs"][-1]["test_accuracy"]) == pytest.approx(run["error_rate"], abs=1e-9)
        minutes.append(f"{sum(epoch['seconds'] for epoch in log['epochs']) / 60:.0f}")
    assert f"{', '.join(minutes[:-1])} and {minutes[-1]} minutes" in README


def test_the_text_under_results_speaks_of_these_runs():
    runs = json.loads((ROOT / "results/cifar100_seed0.ood.json").read_text())["runs"]

    def auroc(run, name, score="msp"):
        return run["sets"][name][score]["auroc"]

    images = [name for name in runs[0]["sets"] if name not in {evaluation.SPLIT, *NOISES}]
    assert len(runs) == 3 and len(images) == 4
    assert all(auroc(run, name, "max_logit") > auroc(run, name) for run in runs for name in images)
    sets = [*NOISES, *images]
    means = [[np.mean([auroc(run, name, score) for name in sets]) for score in ("msp", "max_logit")] for run in runs]
    figures = [*np.ravel(means), *np.mean(means, axis=0), *(run["error_rate"] for run in runs)]
    figures += [auroc(run, name) for run in runs for name in run["sets"]]
    known = {f"{figure:.2f}" for figure in figures} | {text.split(" / ")[0] for text in evaluation.PUBLISHED.values()}
    text = README[README.index("**What repeats.**") : README.index("The same figures with OOD")]
    said = re.findall(r"\d+\.\d\d", text)
    assert len(said) > 20 and set(said) <= known


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r"^\| `([\w./]+)`", README, re.MULTILINE):
        assert (ROOT / target).exists(), target
