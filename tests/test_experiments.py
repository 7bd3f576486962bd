"""The experiments on digits, against the usual test loop, torch.cdist and figures known by hand."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import ood_data
import test as evaluation
import train
from experiments import detectors, published_test_pass
from ood_utils import InputError, get_features, get_performance


def test_the_published_test_pass_is_a_test_in_train_mode(in_tiny_run, monkeypatch):
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
    monkeypatch.setattr(published_test_pass, "BATCH_SIZE", 359)
    config = evaluation.Config(("digits_resnet18.pth",), ood_types=("photos",), output=".")
    with pytest.raises(InputError, match="last batch of one image"):
        published_test_pass.ask(config)


@pytest.fixture
def wide_checkpoint(tmp_path, monkeypatch):
    """Random features, as ViM wants over 256; the last layer knows the mean of every class."""

    def build_network(num_classes, stem):
        layers = torch.nn.Conv2d(3, 300, 32), torch.nn.ReLU(), torch.nn.Flatten()
        return torch.nn.Sequential(*layers, torch.nn.Linear(300, num_classes))

    monkeypatch.setattr(train, "build_network", build_network)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build_network(10, "imagenet")
    loader = train.get_loader(True, "digits", augment=False)
    features = get_features(model, loader)
    means = torch.stack([features[loader.labels == digit].mean(0) for digit in range(10)])
    weights = {"3.weight": means, "3.bias": -means.square().sum(1) / 2}
    torch.save(model.state_dict() | weights, "wide.pth")
    return "wide.pth"


def test_detectors_are_those_of_the_library(wide_checkpoint, tmp_path):
    """MaxSoftmax is test.py's MSP; KNN is the distance to the 50th neighbour, by torch.cdist."""
    options = {"dataset": "digits", "output": ".", "device": "cpu"}
    settings = evaluation.Config((wide_checkpoint,), ood_types=("photos",), **options)
    results = detectors.compare(settings)
    aurocs = {row["detector"]: row for row in results["rows"]}
    assert len(aurocs) == 21
    for name in ("MaxSoftmax", "MaxLogit", "EnergyBased", "Entropy"):
        row = aurocs[name]
        assert row["auroc"] == pytest.approx(row["auroc_of_test_py"], abs=0.01)
    model = train.load_network(wide_checkpoint)
    training = train.get_loader(True, "digits", augment=False)
    loaders = training, train.get_loader(False, "digits"), ood_data.build_ood_loader("photos", 72)
    known, *others = [normalize(get_features(model, loader).double()) for loader in loaders]
    scores = [-torch.cdist(one, known).kthvalue(50)[0] for one in others]
    expected = 100 * get_performance(*scores)[0]
    assert aurocs["KNN"]["auroc"] == pytest.approx(expected, abs=0.05)
    assert json.loads((tmp_path / "detectors.json").read_text())["rows"] == results["rows"]
    with pytest.raises(InputError, match="pass --ood-types"):
        detectors.compare(dataclasses.replace(settings, ood_types=()))
