"""The benchmark, on few images: what it calls of the project still fits, and its parts add up."""

import runpy

import pytest
import torch
from conftest import ROOT


@pytest.mark.parametrize("side", ["Plain", "Project"])
@pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data")
def test_both_sides_train_and_evaluate(side):
    speed = runpy.run_path(str(ROOT / "benchmarks/speed.py"))
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8), torch.arange(512) % 100
    data = [(images, labels), (images[:20], labels[:20])]
    timed = speed[side](data, torch.device("cpu"))
    rate, parts = speed["time_training"](timed, 2)
    assert list(parts) == ["load and augment", "forward", "backward", "optimiser"]
    assert rate == pytest.approx(2 * 128 / (2 * sum(parts.values()) / 1000))
    rate, parts = speed["time_evaluation"](timed)
    assert set(parts) == {"score", "build noise", "metrics"} and min(parts.values()) > 0
    assert rate == pytest.approx((20 + 2 * 4) / (sum(parts.values()) / 1000))
