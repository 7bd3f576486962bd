"""The network in results/: its figures follow from its raw scores, and these from its weights."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from torchvision.models import resnet18

import ood_data
import test as evaluation
import train

PATH = ROOT / "results/cifar100_seed0.pth"
ARRAYS = np.load(PATH.with_suffix(".ood.npz"))
RESULTS = json.loads(PATH.with_suffix(".ood.json").read_text())


def arrays_of(kind):
    prefix = f"{kind}/"
    return {key.removeprefix(prefix): ARRAYS[key] for key in ARRAYS if key.startswith(prefix)}


def test_the_weights_are_torchvisions():
    resnet18(num_classes=100).load_state_dict(torch.load(PATH, weights_only=True))
    assert PATH.stat().st_size < 9e6


@pytest.mark.parametrize("name", [
    "cifar100_seed0.ood", "cifar100_seeds.ood", "published_test_pass", "detectors"
])  # fmt: skip
def test_the_figures_are_of_these_weights(name):
    results = json.loads((PATH.parent / f"{name}.json").read_text())
    digest = hashlib.sha256(PATH.read_bytes()).hexdigest()
    assert results["checkpoints"][0]["sha256"] == digest


def test_every_figure_follows_from_the_raw_scores():
    arrays = arrays_of("scores"), arrays_of("predictions"), ARRAYS["labels"]
    checkpoint, rows, sets = evaluation.measure_checkpoint(PATH, *arrays)
    assert len(rows) == 8 * 5 and len(sets) == 8
    for found, written in zip(
        (checkpoint, *rows, *sets),
        (*RESULTS["checkpoints"], *RESULTS["rows"], *RESULTS["sets"]),
        strict=True,
    ):
        for name, value in found.items():
            if name not in ("checkpoint", "path"):
                assert written[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("name", [*ood_data.NOISES, "photos"])
def test_the_raw_scores_follow_from_the_weights(name):
    """Of the sets that need no download."""
    loaders = {name: ood_data.build_ood_loader(name, 2000)}
    loaders[evaluation.CLOSED] = [(torch.zeros(1, 3, 32, 32), torch.zeros(1))]
    scores, predictions, _ = evaluation.score_sets(train.load_network(PATH), loaders)
    np.testing.assert_allclose(scores[name], arrays_of("scores")[name], rtol=0, atol=1e-4)
    same = predictions[name] == arrays_of("predictions")[name]
    assert same.mean() > 0.999  # a tie may fall the other way on another processor
