"""The shipped results: figures from scores, scores from weights, READMEs from files."""

import hashlib
import json
import re

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
from experiments import compare, detectors, published_test_pass

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results/README.md").read_text()
EXPERIMENTS = (ROOT / "experiments/README.md").read_text()
PATH = ROOT / "results/cifar100_seed0.pth"
ARRAYS = np.load(PATH.with_suffix(".ood.npz"))
STORED_SCORES = [str(name) for name in ARRAYS["score_names"]]


def read(name):
    return json.loads((ROOT / "results" / name).read_text())


FIVE = [read(f"cifar100_seed{seed}.ood.json") for seed in range(5)]
FILES = sorted((ROOT / "results").glob("*_*.ood.json"))


def arrays_of(kind):
    return {key.split("/")[1]: ARRAYS[key] for key in ARRAYS if key.startswith(f"{kind}/")}


def test_the_figures_are_of_these_weights():
    """The checkpoint was rounded to float16: its log and experiments name the rounded file."""
    digest = hashlib.sha256(PATH.read_bytes()).hexdigest()
    assert read("cifar100_seed0.json")["sha256"] == digest
    model = resnet18(num_classes=100)
    model.load_state_dict(torch.load(PATH, weights_only=True))
    run = evaluation.describe_run(PATH, model, None)
    assert run["checkpoint"] == FIVE[0]["checkpoint"]
    for name in ("published_test_pass", "detectors"):
        assert read(f"{name}.json")["checkpoints"][0]["sha256"] == digest, name


def test_every_figure_follows_from_the_raw_scores(monkeypatch):
    monkeypatch.setattr(evaluation, "SCORES", dict.fromkeys(STORED_SCORES))
    closed = ood_data.build_ood_loader("photos", 10)  # stands for the one that needs a download
    closed.labels = torch.from_numpy(ARRAYS["labels"])
    loaders = dict.fromkeys(arrays_of("scores"), closed)
    figures = evaluation.measure(arrays_of("scores"), arrays_of("predictions"), loaders)
    rows, stored_rows = figures.pop("rows"), FIVE[0]["rows"]
    for name, of_set in figures.pop("sets").items():
        for figure in ("effective_classes", "largest_share"):
            assert FIVE[0]["sets"][name][figure] == pytest.approx(of_set[figure], abs=1e-9)
    for found, stored in zip((figures, *rows), (FIVE[0], *stored_rows), strict=True):
        for name, value in found.items():
            assert stored[name] == pytest.approx(value, abs=1e-9), name


def test_the_raw_scores_follow_from_the_weights():
    """By torchvision's network, of the first images of the sets that need no download."""
    model = resnet18(num_classes=100)
    model.load_state_dict(torch.load(PATH, weights_only=True))
    for name in ("gaussian", "rademacher", "blob", "photos"):
        logits, _ = ood_utils.get_logits(model, ood_data.build_ood_loader(name, 200))
        scores = [getattr(ood_utils, score)(logits.double()) for score in STORED_SCORES]
        stored = arrays_of("scores")[name][:200]
        np.testing.assert_allclose(torch.stack(scores, dim=1), stored, rtol=0, atol=1e-4)
        same = logits.argmax(1).numpy() == arrays_of("predictions")[name][:200]
        assert same.mean() > 0.99  # a tie may fall the other way on another processor


def test_every_file_has_the_contents_that_are_compared():
    """Of the noises and photos, which need no download, and of the scores: as computed now."""
    scores = {name: evaluation.digest_score(score) for name, score in ood_utils.SCORES.items()}
    names = ("gaussian", "rademacher", "blob", "photos")
    loaders = {name: ood_data.build_ood_loader(name, 2000) for name in names}
    digests = {name: ood_data.digest(loader) for name, loader in loaders.items()}
    for path in FILES:
        run = read(path.name)
        assert run["scores"].items() <= scores.items() and len(run["scores"]) >= 5
        for name, digest in digests.items():
            kind = "noise" if name in ood_data.NOISES else "images"
            assert (run["sets"][name]["kind"], run["sets"][name]["digest"]) == (kind, digest), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_evaluated_run_has_its_log(path):
    run, log = read(path.name), read(path.name.replace(".ood", ""))
    described = evaluation.describe_run(path, torch.nn.Linear(1, 1), log)
    assert run["training"] == described["training"]
    assert log["config"]["epochs"] == len(log["epochs"])
    assert not log["sources"] or log["code"] == train.digest_code(log["sources"])
    if "test_accuracy" in log["epochs"][-1]:
        error_rate = 100 * (1 - log["epochs"][-1]["test_accuracy"])
        assert error_rate == pytest.approx(run["error_rate"], abs=0.1)  # some are of float16


def test_ci_runs_the_set_up_commands_of_the_readme():
    commands = re.findall(r"^(pip install .*)$", README, re.MULTILINE)
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert len(commands) == 2 and all(command in lines for command in commands)


@pytest.mark.parametrize("text,patterns", [
    (README, ["cifar100_seed?"]),
    (RESULTS, ["cifar100_seed?"]),
    (README, ["steps30_seed?", "cosine30_seed?"]),
    (RESULTS, ["cifar100_seed?", "wd5e-4_seed?"]),
    (RESULTS, ["cifar100_seed?", "steps30_seed?", "cosine30_seed?"]),
    (RESULTS, ["steps30_validation", "cosine30_validation"]),
    (RESULTS, ["cifar100_seed?", "redesign_seed?"]),
])  # fmt: skip
def test_tables_are_what_compare_prints(text, patterns, capsys, monkeypatch):
    """The comparison of groups; of a single group one of its two tables."""
    monkeypatch.setattr(compare, "draw", lambda *args: True)
    files = [sorted((ROOT / "results").glob(f"{pattern}.ood.json")) for pattern in patterns]
    compare.main(compare.Config(tuple(sum(files, []))))
    tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    assert any(table in text for table in tables[-1 if len(patterns) > 1 else 0 :])


@pytest.mark.parametrize("print_tables,name", [
    (published_test_pass.print_tables, "published_test_pass.json"),
    (detectors.print_tables, "detectors.json"),
])  # fmt: skip
def test_tables_of_the_experiments_are_those_of_their_files(print_tables, name, capsys):
    print_tables(read(name))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 5 and all(row in EXPERIMENTS.splitlines() for row in rows)


def test_the_first_table_follows_from_the_files():
    paths = [path for path in FILES if path.name.startswith("cifar100")]
    runs = [compare.read(path, compare.Config(())) for path in paths]
    published = compare.read(ROOT / "results/published.ood.json", compare.Config(()))
    values, known = (compare.get_figures(group, "msp") for group in (runs, [published]))
    values["error rate"] = [run["error_rate"] for run in runs]
    known["error rate"] = published["error_rate"]
    for name in ("error rate", "right / wrong", "mean of noises", "mean of image sets", "svhn"):
        title = name if name == "error rate" else f"AUROC, {name}"
        cell = f" {known[name].item():.2f} " if name in known else " "
        assert f"| {title} |{cell}| {compare.spread(values[name])} |" in README.splitlines()


def test_the_table_of_seeds_follows_from_its_snippet(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (snippet,) = re.findall(r"^```python\n(import json\nfrom.*?)^```$", RESULTS, re.M | re.S)
    exec(snippet, {})
    assert capsys.readouterr().out.strip() in RESULTS


def test_the_findings_follow_from_the_files(capsys):
    """What the READMEs conclude, not how they say it."""
    rows = pd.concat([pd.DataFrame(run["rows"]).assign(seed=i) for i, run in enumerate(FIVE)])
    aurocs = rows.pivot_table("auroc", ["set", "seed"], "score")
    images = ["svhn", "cifar10", "photos", "textures_10_of_47_classes"]
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
    assert f"by network: {compare.spread(correlations)}\n" in capsys.readouterr().out
    wins = rows.pivot_table("auroc", ["set", "checkpoint"], "detector")
    wins = wins.gt(wins["MaxSoftmax"], axis=0)
    exceptions = wins.index[~wins["RMD"]].get_level_values(0)
    assert not wins.all().any() and list(exceptions) == ["rademacher"]
    published_test_pass.print_tables(read("published_test_pass.json"))
    assert capsys.readouterr().out.count(" yes |") == 13


def test_the_python_examples_run(in_tiny_run, capsys):
    """A threshold for one image, a score from features, a detector of pytorch-ood."""
    evaluation.evaluate(evaluation.Config(("digits_resnet18.pth",), ood_types=("gaussian",)))
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
