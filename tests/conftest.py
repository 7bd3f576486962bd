"""What the tests share: the command lines as a user starts them, small data sets, tiny runs."""

import contextlib
import json
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import test as evaluation
import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu():
    """A GPU beside it changes nothing; no test waits for the disk, for threads, or to save."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(train, "SAVE_SECONDS", 0)
        patch.setattr(torch.accelerator, "current_accelerator", lambda **options: None)
        yield


@pytest.fixture
def command(monkeypatch, capsys):
    """command("train.py --epochs 0") runs a script as __main__; (status, stdout, stderr)."""

    def run(line, *more):
        script, *flags = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [script, *flags, *more])
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def tiny_network(num_classes=100, stem=None):
    """With batch norm, a convolution of small maps, and dropout: a resumed run needs each."""
    width = 8 if stem == "cifar" else 16
    conv = nn.Conv2d(width, 80, 3, padding=1, bias=False)  # 320 features: ViM wants 256
    layers = [nn.Conv2d(3, width, 16, 16, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [train.SmallMapConv(conv, slice(0, 3)), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(320, num_classes))


def write_images(folder, count, seed=0, size=(40, 34)):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


@pytest.fixture
def class_folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder / "pets", tmp_path / "pets")


def train_quietly(folder, checkpoint, **options):
    """Four epochs of two steps each; on the CPU, where the same run has the same bits."""
    settings = {"epochs": 4, "batch_size": 12, "lr": 0.02, "device": "cpu", "seed": 0}
    settings |= {"schedule": "steps", "milestones": (0.5, 0.7), "stem": "imagenet"}
    return train.train_model(train.Config(folder, checkpoint=checkpoint, **settings | options))


def evaluate(path="digits_resnet18.pth", ood_types=("blob",), **options):
    return evaluation.evaluate(evaluation.Config((path,), ood_types=ood_types, **options))


def same_bits(path, other):
    one, two = torch.load(path, weights_only=True), torch.load(other, weights_only=True)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def read_json(path):
    return json.loads(Path(path).read_text())


def files_of(stem):
    """{ending: bytes} of the files of a run in the working directory."""
    return {path.name.removeprefix(stem): path.read_bytes() for path in Path().glob(f"{stem}.*")}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A closed set of two classes, 12 training and 5 test images each, and runs of the tiny
    network, of which `cut` stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("tiny")
    for seed, name in enumerate(("cat", "dog")):
        write_images(folder / "pets/train" / name, 12, seed)
        write_images(folder / "pets/test" / name, 5, seed + 10)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(train, "build_network", tiny_network)
        train.train_model(train.Config(dataset="digits", epochs=2, lr=0.05, device="cpu"))
        train_quietly("pets", "a.pth", epochs=1)
        for ending in ("json", "npz"):
            Path(f"a.ood.{ending}").write_text("an evaluation")
        train_quietly("pets", "whole.pth")
        patch.setattr(train, "rate_factor", mock.Mock(side_effect=[1, KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            train_quietly("pets", "cut.pth")
    return folder


@pytest.fixture
def in_tiny_run(tiny_folder, tmp_path, monkeypatch):
    """The working directory of a test: a copy of tiny_folder. Every download fails at once."""
    monkeypatch.setattr("urllib.request.urlopen", mock.Mock(side_effect=OSError("no network")))
    monkeypatch.setattr(train, "build_network", tiny_network)
    monkeypatch.chdir(shutil.copytree(tiny_folder, tmp_path / "runs"))
    return tmp_path / "runs"
