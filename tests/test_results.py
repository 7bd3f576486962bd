"""The shipped results: figures from scores, scores from weights, READMEs from files."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, write_images
from torchvision.models import resnet18

import ood_data
import ood_utils
import test as evaluation
import train
from experiments import detectors, published_test_pass

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results/README.md").read_text()
EXPERIMENTS = (ROOT / "experiments/README.md").read_text()
PATH = ROOT / "results/cifar100_seed0.pth"
ARRAYS = np.load(PATH.with_suffix(".ood.npz"))
STORED_SCORES = [str(name) for name in ARRAYS["score_names"]]


def read(name):
    return json.loads((ROOT / "results" / name).read_text())


SEEDS = read("cifar100_seeds.ood.json")


def arrays_of(kind):
    return {key.split("/")[1]: ARRAYS[key] for key in ARRAYS if key.startswith(f"{kind}/")}


def test_the_figures_are_of_these_weights():
    digest = hashlib.sha256(PATH.read_bytes()).hexdigest()
    for name in ("cifar100_seed0.ood", "cifar100_seeds.ood", "published_test_pass", "detectors"):
        assert read(f"{name}.json")["checkpoints"][0]["sha256"] == digest, name


def test_every_figure_follows_from_the_raw_scores(monkeypatch):
    monkeypatch.setattr(evaluation, "SCORES", dict.fromkeys(STORED_SCORES))
    arrays = arrays_of("scores"), arrays_of("predictions"), ARRAYS["labels"]
    run, rows, sets = evaluation.measure_run(PATH, *arrays)
    results = read("cifar100_seed0.ood.json")
    written = (*results["checkpoints"], *results["rows"], *results["sets"])
    for found, stored in zip((run, *rows, *sets), written, strict=True):
        for name, value in found.items():
            if name not in ("checkpoint", "path", "training"):
                assert stored[name] == pytest.approx(value, abs=1e-9), name


def test_the_raw_scores_follow_from_the_weights():
    """By torchvision's network, of the first images of the sets that need no download."""
    model = resnet18(num_classes=100)
    model.load_state_dict(torch.load(PATH, weights_only=True))
    for name in ("gaussian", "rademacher", "blob", "photos"):
        logits, _ = ood_utils.get_logits(model, ood_data.build_ood_loader(name, 500))
        scores = [getattr(ood_utils, score)(logits.double()) for score in STORED_SCORES]
        stored = arrays_of("scores")[name][:500]
        np.testing.assert_allclose(torch.stack(scores, dim=1), stored, rtol=0, atol=1e-4)
        same = logits.argmax(1).numpy() == arrays_of("predictions")[name][:500]
        assert same.mean() > 0.99  # a tie may fall the other way on another processor


@pytest.mark.parametrize("name", ["cifar100_seeds", "wd5e-4", "steps30", "cosine30"])
def test_every_evaluated_run_has_its_log(name):
    runs = read(f"{name}.ood.json")["checkpoints"]
    digests = [run["sha256"] for run in SEEDS["checkpoints"]]
    assert [run["sha256"] for run in runs[:5]] == digests
    for run in runs:
        log = read(f"{Path(run['path']).stem}.json")
        training = run["training"]
        assert train.trained_with(log) == training["settings"] | {"seed": training["seed"]}
        assert log["config"]["epochs"] == len(log["epochs"]) == training["epochs_done"]
        error_rate = 100 * (1 - log["epochs"][-1]["test_accuracy"])
        tolerance = 0.1 if run["sha256"] in digests else 0.02  # the five were rounded to float16
        assert error_rate == pytest.approx(run["error_rate"], abs=tolerance)


def test_ci_runs_the_set_up_commands_of_the_readme():
    commands = re.findall(r"^(pip install .*)$", README, re.MULTILINE)
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert len(commands) == 2 and all(command in lines for command in commands)


@pytest.mark.parametrize("text,show,arguments", [
    (README, evaluation.print_performance, (SEEDS,)),
    (README, evaluation.print_comparison, (read("schedules.ood.json"),)),
    (RESULTS, evaluation.print_comparison, (read("wd5e-4.ood.json"),)),
    (RESULTS, evaluation.print_comparison, (read("steps30.ood.json"),)),
    (RESULTS, evaluation.print_comparison, (read("cosine30.ood.json"),)),
    (RESULTS, evaluation.print_comparison, (read("validation.ood.json"),)),
    (RESULTS, evaluation.print_scores, (SEEDS, "auroc")),
    (RESULTS, evaluation.print_scores, (SEEDS, "fpr95")),
    (EXPERIMENTS, published_test_pass.print_tables, (read("published_test_pass.json"),)),
    (EXPERIMENTS, detectors.print_tables, (read("detectors.json"),)),
])  # fmt: skip
def test_tables_are_those_of_the_results(text, show, arguments, capsys):
    show(*arguments)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 5 and all(row in text.splitlines() for row in rows)


def test_the_first_table_follows_from_the_files():
    values = evaluation.set_values(evaluation.shown_rows(SEEDS), "auroc")
    values["error rate"] = [run["error_rate"] for run in SEEDS["checkpoints"]]
    published = {name: figures[0] for name, figures in evaluation.PUBLISHED.items()}
    noises = [published[name] for name in ("gaussian", "rademacher", "blob")]
    published |= {"mean of noises": np.mean(noises), "error rate": evaluation.PUBLISHED_ERROR_RATE}
    for name in ("error rate", "right / wrong", "mean of noises", "mean of image sets", "svhn"):
        title = name if name == "error rate" else f"AUROC, {name}"
        cell = f" {published[name]:.2f} " if name in published else " "
        assert f"| {title} |{cell}| {evaluation.spread(values[name])} |" in README.splitlines()


def test_the_findings_follow_from_the_files(capsys):
    """What the READMEs conclude, not how they say it."""
    aurocs = pd.DataFrame(SEEDS["rows"]).pivot_table("auroc", ["set", "checkpoint"], "score")
    images = [name for name in SEEDS["config"]["ood_types"] if name not in ood_data.NOISES]
    spans = aurocs["msp"].groupby("set").agg(np.ptp)
    assert spans[images].max() < 3.9 and spans[["gaussian", "rademacher"]].min() > 15
    assert (aurocs["max_logit"] > aurocs["msp"])[images].all()
    rows = pd.DataFrame(read("detectors.json")["rows"])
    rows["noise"] = rows["set"].isin(list(ood_data.NOISES))
    ranks = rows.pivot_table("auroc", "detector", "noise").rank(ascending=False)
    assert list(ranks.loc["Mahalanobis"]) == [20, 1] and list(ranks.loc["DICE"]) == [5, 21]
    means = rows.pivot_table("auroc", ["checkpoint", "detector"], "noise")
    correlations = means.groupby("checkpoint").corr("spearman").xs(True, level="noise")[False]
    detectors.print_tables(read("detectors.json"))
    assert f"by network: {evaluation.spread(correlations)}\n" in capsys.readouterr().out
    wins = rows.pivot_table("auroc", ["set", "checkpoint"], "detector")
    wins = wins.gt(wins["MaxSoftmax"], axis=0)
    exceptions = wins.index[~wins["RMD"]].get_level_values(0)
    assert not wins.all().any() and list(exceptions) == ["rademacher"]
    published_test_pass.print_tables(read("published_test_pass.json"))
    assert capsys.readouterr().out.count(" yes |") == 13


def test_the_python_examples_run(in_tiny_run, capsys):
    """A threshold for one image, a score from features, a detector of pytorch-ood."""
    evaluation.evaluate(evaluation.Config("digits_resnet18.pth", ood_types="gaussian"))
    write_images(in_tiny_run / "images", 1)
    (in_tiny_run / "images/000.png").rename("image.png")
    snippets = re.findall(r"^```python\n(.*?)^```$", EXPERIMENTS, re.MULTILINE | re.DOTALL)
    capsys.readouterr()
    for snippet in snippets:
        exec(snippet, {})
    out = capsys.readouterr().out
    for pattern in (r"(in|out) [01]\.\d+", r"AUROC: \d+\.\d{4}, AUPR: .*", r"{'AUROC': .*}"):
        assert re.search(f"^{pattern}$", out, re.MULTILINE), pattern


def test_links_lead_somewhere():
    for folder in (".", "results", "experiments"):
        text = (ROOT / folder / "README.md").read_text()
        files = re.findall(r"\]\((?!http)([^)#]+)", text)
        files += re.findall(r"^\| `([\w./]+)`", text, re.MULTILINE)
        for target in files:
            assert (ROOT / folder / target).exists(), target
