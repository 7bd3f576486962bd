"""The README against what it speaks of: the commands that CI runs and the files that its tables were made from."""

import json
import re

import pytest
from conftest import ROOT

import train

README = (ROOT / "README.md").read_text()


def test_ci_runs_the_two_commands_of_the_first_screen():
    commands = re.findall(r"^```\n(pip install .*)\n```$", README, re.MULTILINE)
    assert len(commands) == 2
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert all(command in lines for command in commands)


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.ood.json")), ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path, command):
    _, out, _ = command("test.py", "--table", path)
    rows = [line for line in out.splitlines() if line.startswith(("|", "Closed set"))]
    assert len(rows) > 10 and all(row in README.splitlines() for row in rows)
    assert f"results/{path.stem}.png" in README and path.with_suffix(".png").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.ood.json")), ids=lambda path: path.name)
def test_every_evaluated_run_has_its_log_of_the_full_recipe(path):
    minutes = []
    for run in json.loads(path.read_text())["runs"]:
        log = json.loads((ROOT / "results" / run["checkpoint"]).with_suffix(".json").read_text())
        recipe = dict(dataset="cifar100", images=50_000, epochs=train.EPOCHS, batch_size=train.BATCH_SIZE, lr=train.LR)
        assert recipe.items() <= log["config"].items() and len(log["epochs"]) == train.EPOCHS
        assert 100 * (1 - log["epochs"][-1]["test_accuracy"]) == pytest.approx(run["error_rate"], abs=1e-9)
        minutes.append(f"{sum(epoch['seconds'] for epoch in log['epochs']) / 60:.0f}")
    assert " and ".join(minutes) + " minutes" in README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r"^\| `([\w./]+)`", README, re.MULTILINE):
        assert (ROOT / target).exists(), target
