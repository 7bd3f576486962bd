"""What the tests share: the command lines as a user starts them, and small data sets."""

import contextlib
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu():
    """A GPU beside it changes nothing, and no test waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(torch.accelerator, "current_accelerator", lambda **options: None)
        yield


@pytest.fixture
def command(monkeypatch, capsys):
    """command("train.py", "--epochs", 0) runs the script as __main__; (status, stdout, stderr)."""
    handler = signal.getsignal(signal.SIGINT)

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGINT, handler)


def tiny_network(num_classes=100, stem=None):
    """With batch norm, a convolution of small maps, and dropout: a resumed run needs each."""
    width = 8 if stem == "cifar" else 16
    layers = [nn.Conv2d(3, width, 16, 16, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, 16, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten()]
    layers += [nn.Dropout(0.1), nn.Linear(64, num_classes)]
    return train.shorten_small_maps(nn.Sequential(*layers))


@pytest.fixture
def tiny(monkeypatch):
    """Another network in build_network, for tests that are not about the network."""
    monkeypatch.setattr(train, "build_network", tiny_network)


def write_images(folder, count, seed=0, size=(40, 34)):
    """`count` PNG files of random pixels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


def write_class_folder(folder):
    """A closed set of two classes, 12 training and 5 test images each."""
    for i, name in enumerate(("cat", "dog")):
        write_images(folder / "train" / name, 12, seed=i)
        write_images(folder / "test" / name, 5, seed=10 + i)
    return folder


@pytest.fixture
def class_folder(tmp_path):
    return write_class_folder(tmp_path / "pets")


def small_config(folder, checkpoint, **options):
    """Four epochs of two steps each; on the CPU, where the same run has the same bits."""
    defaults = {"epochs": 4, "batch_size": 12, "lr": 0.02, "device": "cpu", "seed": 0}
    defaults |= {"schedule": "steps", "milestones": (0.5, 0.7), "stem": "imagenet"}
    options = defaults | options
    return train.Config(dataset=str(folder), checkpoint=str(checkpoint), **options)


def train_quietly(folder, checkpoint, **options):
    return train.train_model(small_config(folder, checkpoint, **options))


def same_bits(path, other):
    one, two = torch.load(path, weights_only=True), torch.load(other, weights_only=True)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_class_folder(folder / "pets")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(train, "build_network", tiny_network)
        patch.setattr(train, "SAVE_SECONDS", 0)
        train.train_model(train.Config(dataset="digits", epochs=2, lr=0.05, device="cpu"))
        train_quietly("pets", "a.pth", epochs=1)
        train_quietly("pets", "whole.pth", lr=0.03)
        interrupted = mock.Mock(side_effect=[0.5, KeyboardInterrupt])  # after two epochs
        patch.setattr(train, "get_accuracy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_quietly("pets", "cut.pth")
    return folder


@pytest.fixture
def in_tiny_run(tiny_folder, tmp_path, tiny, monkeypatch):
    """A folder of the test's own with digits_resnet18.pth, of the tiny network, and its log."""
    monkeypatch.chdir(shutil.copytree(tiny_folder, tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def cut_run(in_tiny_run):
    """(data set, checkpoint, state) of a tiny run that was interrupted in its second epoch."""
    return in_tiny_run / "pets", in_tiny_run / "cut.pth", in_tiny_run / "cut.resume.pth"


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails at once, as on a machine without a network."""

    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
