"""The shipped results: figures from scores, scores from weights, READMEs from files."""

import hashlib
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, evaluate, read_json, write_images
from torchvision.models import resnet18

import ood_data
import ood_utils
import test as evaluation
import train
from experiments import compare, detectors, published_test_pass

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results/README.md").read_text()
EXPERIMENTS = (ROOT / "experiments/README.md").read_text()
FOLDER = ROOT / "results"
PATH = FOLDER / "cifar100_seed0.pth"
SEED0 = read_json(FOLDER / "cifar100_seed0.ood.json")
ARRAYS = np.load(FOLDER / "cifar100_seed0.ood.npz")
STORED_SCORES = [str(name) for name in ARRAYS["score_names"]]
OFFLINE = ("gaussian", "rademacher", "blob", "photos")  # sets that need no download


def test_every_figure_follows_from_the_raw_scores(monkeypatch):
    monkeypatch.setattr(evaluation, "SCORES", dict.fromkeys(STORED_SCORES))
    closed = ood_data.build_ood_loader("photos", 10)  # stands for the one that needs a download
    closed.labels = torch.from_numpy(ARRAYS["labels"])
    scores = {name: ARRAYS[f"scores/{name}"] for name in SEED0["sets"]}
    predictions = {name: ARRAYS[f"predictions/{name}"] for name in SEED0["sets"]}
    figures = evaluation.measure(scores, predictions, dict.fromkeys(scores, closed))
    rows, stored_rows = figures.pop("rows"), SEED0["rows"]
    for name, of_set in figures.pop("sets").items():
        for figure in ("effective_classes", "largest_share"):
            assert SEED0["sets"][name][figure] == pytest.approx(of_set[figure], abs=1e-9)
    for found, stored in zip((figures, *rows), (SEED0, *stored_rows), strict=True):
        for name, value in found.items():
            assert stored[name] == pytest.approx(value, abs=1e-9), name


def test_the_raw_scores_follow_from_the_weights():
    """By torchvision's network. All files name the weights that were rounded to float16."""
    model = resnet18(num_classes=100)
    model.load_state_dict(torch.load(PATH, weights_only=True))
    digest = hashlib.sha256(PATH.read_bytes()).hexdigest()
    weights = hashlib.sha256(b"".join(value.numpy() for value in model.state_dict().values()))
    assert SEED0["checkpoint"]["weights"] == weights.hexdigest()[:8]
    assert read_json(FOLDER / "cifar100_seed0.json")["sha256"] == digest
    for name in ("published_test_pass", "detectors"):
        checkpoints = read_json(FOLDER / f"{name}.json")["checkpoints"]
        assert checkpoints[0] == SEED0["checkpoint"], name
    for name in OFFLINE:
        logits, _ = ood_utils.get_logits(model, ood_data.build_ood_loader(name, 200))
        scores = [getattr(ood_utils, score)(logits.double()) for score in STORED_SCORES]
        stored = ARRAYS[f"scores/{name}"][:200]
        np.testing.assert_allclose(torch.stack(scores, dim=1), stored, rtol=0, atol=1e-4)
        same = logits.argmax(1).numpy() == ARRAYS[f"predictions/{name}"][:200]
        assert same.mean() > 0.99  # a tie may fall the other way on another processor


def test_every_file_has_the_log_of_its_run_and_the_contents_that_are_compared():
    """As computed now: of the sets that need no download, and of the scores."""
    loaders = {name: ood_data.build_ood_loader(name, 2000) for name in OFFLINE}
    sets = {name: ood_utils.digest(one.images, one.labels) for name, one in loaders.items()}
    scores = {name: evaluation.digest_score(score, 100) for name, score in ood_utils.SCORES.items()}
    for path in FOLDER.glob("*_*.ood.json"):
        run, log = read_json(path), read_json(FOLDER / path.name.replace(".ood", ""))
        assert {name: run["sets"][name]["digest"] for name in OFFLINE} == sets, path
        assert run["scores"].items() <= scores.items(), path
        assert run["training"] == log, path
        assert not log["sources"] or log["code"] == train.digest_code(log["sources"]), path


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
    (RESULTS, ["before_redesign/before_seed?", "cifar100_seed?"]),
])  # fmt: skip
def test_tables_are_what_compare_prints(text, patterns, capsys, monkeypatch):
    """The comparison of groups; of a single group one of its two tables."""
    monkeypatch.setattr(compare, "draw", lambda *args: True)
    files = [sorted(FOLDER.glob(f"{pattern}.ood.json")) for pattern in patterns]
    compare.main(compare.Config(tuple(sum(files, []))))
    tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    assert any(table in text for table in tables[-1 if len(patterns) > 1 else 0 :])


def test_tables_of_the_experiments_are_those_of_their_files(capsys):
    published_test_pass.print_tables(read_json(FOLDER / "published_test_pass.json"))
    detectors.print_tables(read_json(FOLDER / "detectors.json"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 50 and all(row in EXPERIMENTS.splitlines() for row in rows)


def test_the_first_table_follows_from_the_files():
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines()]
    for name in ("error rate", "right / wrong", "mean of noises", "mean of image sets", "svhn"):
        row = [name if name == "error rate" else f"AUROC, {name}"]
        for pattern in ("published.ood.json", "cifar100_seed?.ood.json"):
            runs = [compare.read(file, compare.Config(())) for file in FOLDER.glob(pattern)]
            figures = compare.get_figures(runs, "msp")
            figures["error rate"] = [run["error_rate"] for run in runs]
            row.append(compare.spread(figures[name]) if name in figures else "")
        assert row in cells, name


def test_the_table_of_seeds_follows_from_its_snippet(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (snippet,) = re.findall(r"^```python\n(import json\nfrom.*?)^```$", RESULTS, re.M | re.S)
    exec(snippet, {})
    assert capsys.readouterr().out.strip() in RESULTS


def test_links_lead_somewhere():
    for folder, text in ((".", README), ("results", RESULTS), ("experiments", EXPERIMENTS)):
        links = re.findall(r"\]\((?!http)([^)#]+)|^\| `([\w./]+)`", text, re.MULTILINE)
        for target in map("".join, links):
            assert (ROOT / folder / target).exists(), target


def test_the_python_examples_run(in_tiny_run, capsys):
    """A threshold for one image, a score from features, a detector of pytorch-ood."""
    evaluate()
    write_images(in_tiny_run / "images", 1)
    (in_tiny_run / "images/000.png").rename("image.png")
    snippets = re.findall(r"^```python\n(.*?)^```$", EXPERIMENTS, re.MULTILINE | re.DOTALL)
    capsys.readouterr()
    for snippet in snippets:
        exec(snippet, {})
    out = capsys.readouterr().out
    for pattern in (r"(in|out) [01]\.\d+", r"AUROC: \d+\.\d{4}, AUPR: .*", r"{'AUROC': .*}"):
        assert re.search(f"^{pattern}$", out, re.MULTILINE), pattern
