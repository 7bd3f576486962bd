"""Augmentation against torchvision's, the network against the full one, training, resuming."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import ROOT, files_of, read_json, same_bits, train_quietly
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet, resnet18

import ood_data
import train
from ood_data import normalise
from ood_utils import InputError
from train import Config, build_optimizer, train_step


def test_crops_are_torchvisions_and_uniform():
    """All 162 of one image, each as often within five standard deviations."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 32, 32), generator=generator).byte()
    padded = TF.pad(image, 4)
    crops = [TF.crop(padded, row, column, 32, 32) for row in range(9) for column in range(9)]
    crops += [TF.hflip(crop) for crop in crops]
    found = train.crop_and_flip(image.expand(16200, 3, 32, 32), generator)
    counts = Counter(crop.numpy().tobytes() for crop in found)
    assert set(counts) == {crop.numpy().tobytes() for crop in crops}
    assert all(abs(count - 100) < 50 for count in counts.values())
    greys = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 32, 32)
    found = train.crop_and_flip(greys, generator)
    assert torch.equal(found[:, :, 16, 16], greys[:, :, 16, 16])  # each image has its own crop


def test_epochs_are_functions_of_seed_and_epoch(monkeypatch):
    numbered = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 3, 32, 32)
    monkeypatch.setitem(ood_data.CLOSED_SETS, "mine", lambda *args: (numbered, range(50), ["x"]))
    orders, drawn = [], []

    def augment(images, generator):
        drawn.append(torch.rand(1, generator=generator).item())
        return 255 - images

    monkeypatch.setattr(train, "augment_batch", augment)
    for seed, epoch in ((5, 3), (5, 3), (5, 4), (6, 3)):
        loader = train.get_loader(True, "mine", batch_size=16, seed=seed)
        loader.epoch = epoch
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert torch.equal(images, normalise(255 - numbered[labels]))
        orders.append(labels.tolist())
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] == orders[1] and len(set(map(tuple, orders))) == 3
    assert drawn[:4] == drawn[4:8] and len(set(drawn)) == 3 * 4
    for is_train, augmented in ((True, False), (False, True)):
        ((images, labels),) = train.get_loader(is_train, "mine", augment=augmented)
        assert torch.equal(images, normalise(numbered)) and labels.tolist() == list(range(50))
    monkeypatch.setattr(train, "augment_batch", lambda images, generator: images * 0.5)
    with pytest.raises(InputError, match="Only uint8 images can be normalised"):
        list(loader)  # floats would be trained on as they are, and tested normalised


def test_the_network_is_torchvisions(tmp_path):
    """In float64, after a step, small convolutions and all; the stem is known from the weights."""
    if not isinstance(train.build_network(10), ResNet):
        pytest.skip("another network: --stem is for ResNets")
    full, small_stem = resnet18(num_classes=10), resnet18(num_classes=10)
    small_stem.conv1, small_stem.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    config = Config(lr=0.001, precision="float32")
    for stem, other, count in (("imagenet", full, 5), ("cifar", small_stem, 2)):
        images, labels = torch.randn(count, 3, 32, 32).double(), torch.arange(count)
        torch.save(train.build_network(10, stem).state_dict(), tmp_path / "a.pth")
        other.load_state_dict(torch.load(tmp_path / "a.pth"))
        models = train.load_network(tmp_path / "a.pth").double(), other.double()
        for model in models:
            train_step(model.train(), build_optimizer(model, config), images, labels, config)
        ours, theirs = (model.state_dict() for model in models)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind,able,expected", [
    ("cpu", {"avx512_bf16": True}, "bfloat16"), ("cpu", {"avx2": True}, "float32"),
    ("cuda:1", (9, 0), "bfloat16"), ("cuda:1", (7, 0), "float32"), ("mps", None, "float32"),
])  # fmt: skip
def test_auto_is_bfloat16_where_the_chosen_device_has_it(kind, able, expected, monkeypatch):
    device = torch.device(kind)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {device: able}.get)
    assert train.native_precision(device) == expected


@pytest.mark.parametrize("precision,least,most", [("float32", 0, 1e-6), ("bfloat16", 1e-5, 1e-2)])
def test_train_step_is_sgd_by_hand(precision, least, most):
    """v = m v + (g + wd w); w = w - lr v; the smoothed target is (1 - s) at the label + s / C."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    settings = {"momentum": 0.8, "weight_decay": 0.01, "label_smoothing": 0.3}
    config = Config(lr=0.5, precision=precision, **settings)
    optimizer = build_optimizer(model, config)
    if not isinstance(optimizer, torch.optim.SGD) or optimizer.defaults["nesterov"]:
        pytest.skip("another optimizer: its steps are others")
    inputs, labels = torch.randn(6, 4), torch.arange(6) % 3
    weight, velocity = model.weight.detach().clone(), 0
    for _ in range(3):
        target = 0.7 * F.one_hot(labels, 3) + 0.3 / 3
        loss = -(target * model(inputs).log_softmax(1)).sum(1).mean()
        gradient = torch.autograd.grad(loss, model.weight)[0]
        velocity = 0.8 * velocity + gradient + 0.01 * weight
        weight = weight - 0.5 * velocity
        train_step(model, optimizer, inputs, labels, config)
    assert least <= (model.weight.detach() - weight).abs().max() <= most


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_steps_have_the_bits_of_eager_ones(tmp_path, monkeypatch):
    """At both learning rates; the last batch of an epoch is a smaller one."""
    settings = {"dataset": "digits", "epochs": 2, "device": "cuda", "precision": "bfloat16"}
    for name, eager_steps in (("captured.pth", 3), ("eager.pth", 100)):
        monkeypatch.setattr(train, "EAGER_STEPS", eager_steps)
        train.train_model(Config(checkpoint=tmp_path / name, **settings))
    assert same_bits(tmp_path / "captured.pth", tmp_path / "eager.pth")


@pytest.mark.parametrize("settings,rates", [
    ({"gamma": 0.5, "milestones": (0.5, 0.7, 1.0)}, [0.02, 0.02, 0.01, 0.005]),
    ({"schedule": "cosine", "lr": 0.2}, [0.2, 0.1 + 0.1 * 0.5**0.5, 0.1, 0.1 - 0.1 * 0.5**0.5]),
])  # fmt: skip
def test_the_log_holds_settings_and_rates(settings, rates, in_tiny_run, monkeypatch):
    """The rates by hand; a group of parameters keeps its own, here ten times as high. Whatever
    edited code draws from, a second run draws the same, each epoch something else."""
    seen, drawn = [], []

    def build(model, config):
        head = {"params": model[-1].parameters(), "lr": 10 * config.lr}
        return torch.optim.SGD([{"params": model[0].parameters()}, head], config.lr)

    def epoch(model, sgd, *rest):
        seen.append([group["lr"] for group in sgd.param_groups])
        drawn.append((np.random.rand(), random.random(), torch.rand(1).item()))
        return 0.5

    monkeypatch.setattr(train, "build_optimizer", build)
    monkeypatch.setattr(train, "train_epoch", epoch)
    for name in ("one.pth", "two.pth"):
        train_quietly("pets", name, **settings)
    log = read_json("two.json")
    np.testing.assert_allclose([epoch["lr"] for epoch in log["epochs"]], rates)
    np.testing.assert_allclose(seen, [[rate, 10 * rate] for rate in 2 * rates])
    assert drawn[:4] == drawn[4:] and len(set(drawn)) == 4
    assert log["config"]["dataset"] == str(in_tiny_run / "pets")  # for a start elsewhere
    assert log["sources"]["train.py"] == (ROOT / "train.py").read_text()


def test_a_loss_that_is_not_finite_stops_the_run(in_tiny_run, monkeypatch):
    """Of epochs of two steps, in the third: two are saved."""
    losses = iter(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, torch.nan]))
    monkeypatch.setattr(train, "train_step", lambda *args: next(losses))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    with pytest.raises(InputError, match="epoch 3: lower --lr"):
        train_quietly("pets", "new.pth")
    log = train.read_run("new.resume.pth")["log"]
    assert [epoch["loss"] for epoch in log["epochs"]] == [1.5, 3.5]
    assert set(files_of("new")) == {".resume.pth"}


def test_a_second_run_of_one_checkpoint_touches_nothing(in_tiny_run, monkeypatch):
    """Started in the middle of the first, it ends in a line; the first goes on undisturbed."""

    def epoch(*args):
        with pytest.raises(InputError, match="Another run"):
            train_quietly("pets", "new.pth")
        assert not files_of("new")
        return 0.5

    monkeypatch.setattr(train, "train_epoch", epoch)
    train_quietly("pets", "new.pth", epochs=1)
    assert set(files_of("new")) == {".pth", ".json"}


@pytest.mark.slow
def test_the_real_command_survives_ten_kills(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "digits", "--epochs", "12", "--resume", "--checkpoint"]
    command = [sys.executable, ROOT / "train.py", *flags]
    subprocess.run([*command, "whole.pth"], check=True)
    moments, kills = random.Random(0), 0
    while kills < 10:
        try:
            subprocess.run([*command, "cut.pth"], check=True, timeout=moments.uniform(4, 24))
            Path("cut.pth").unlink()  # finished: the next one starts anew
        except subprocess.TimeoutExpired:  # it was killed
            kills += 1
    subprocess.run([*command, "cut.pth"], check=True)
    assert same_bits("cut.pth", "whole.pth")
