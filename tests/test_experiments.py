"""The experiments on digits, against the usual test loop and torch.cdist."""

import copy

import numpy as np
import pytest
import torch
from conftest import read_json, train_quietly
from torch import nn
from torch.nn.functional import normalize

import ood_data
import test as evaluation
import train
from experiments import detectors, published_test_pass
from ood_utils import get_features, get_performance


def test_the_published_test_pass_is_a_test_in_train_mode(in_tiny_run):
    """The statistics that a network has after the usual loop without model.eval()."""
    loader = train.get_loader(False, "digits", batch_size=128)
    model = train.load_network("digits_resnet18.pth")
    full = copy.deepcopy(model).train()
    with torch.no_grad():
        for images, _ in loader:  # 128, 128 and 104
            full(images)
    published_test_pass.published_test_pass(model, loader.images, np.arange(360))
    assert not model.training
    torch.testing.assert_close(model.state_dict(), full.state_dict(), rtol=1e-4, atol=1e-5)


def test_detectors_are_those_of_the_library(in_tiny_run, monkeypatch):
    """MaxSoftmax is test.py's MSP; KNN is the distance to the 50th neighbour, by torch.cdist."""

    def build_network(classes, stem):  # ViM wants 256 features
        layers = nn.Conv2d(3, 300, 32), nn.ReLU(), nn.Flatten(), nn.Linear(300, classes)
        return nn.Sequential(*layers)

    monkeypatch.setattr(train, "build_network", build_network)
    train_quietly("digits", "wide.pth", batch_size=128)
    config = evaluation.Config(("wide.pth",), ood_types=("photos",), output=".", device="cpu")
    aurocs = {row["detector"]: row for row in detectors.compare(config)["rows"]}
    assert list(aurocs.values()) == read_json("detectors.json")["rows"]
    for row in map(aurocs.get, ("MaxSoftmax", "MaxLogit", "EnergyBased", "Entropy")):
        assert row["auroc"] == pytest.approx(row["auroc_of_test_py"], abs=0.01)
    training, closed = (train.get_loader(is_train, "digits", False) for is_train in (True, False))
    loaders = training, closed, ood_data.build_ood_loader("photos", 72)
    model = train.load_network("wide.pth")
    known, *others = [normalize(get_features(model, loader).double()) for loader in loaders]
    scores = [-torch.cdist(one, known).kthvalue(50)[0] for one in others]
    expected = 100 * get_performance(*scores)[0]
    assert aurocs["KNN"]["auroc"] == pytest.approx(expected, abs=0.05)
