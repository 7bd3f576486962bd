"""Several processes under torchrun."""

import json
import subprocess
import sys

import torch
from conftest import ROOT
from ranks import exact_network

import train


def test_two_processes_take_the_steps_of_one_and_a_killed_one_is_resumed_by_one(
    class_folder, tmp_path, monkeypatch, capsys
):
    """24 images in batches of 5: 3 + 2 images a rank, then 2 + 2. Rank 1 is killed in the second epoch."""
    options = dict(dataset=str(class_folder), epochs=3, batch_size=5, lr=0.01, device="cpu")
    cut = options | {"checkpoint": str(tmp_path / "cut.pth")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*torchrun, ROOT / "tests/ranks.py", json.dumps(cut)], capture_output=True, text=True, timeout=60
    )
    assert run.returncode != 0 and "Signal 9 (SIGKILL)" in run.stderr
    assert run.stdout.count("epoch   1/3") == 1 and "epoch   2/3" not in run.stdout

    monkeypatch.setattr(train, "build_network", exact_network)
    one_epoch = torch.load(tmp_path / "cut.pth", weights_only=True)
    resumed = train.train_model(**cut, resume=True).state_dict()
    assert "resuming after epoch 1 of 3" in capsys.readouterr().out
    whole = train.train_model(**options, checkpoint=str(tmp_path / "whole.pth")).state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-10, atol=1e-10)
    assert not torch.equal(one_epoch["fc.weight"], whole["fc.weight"])
    losses = [json.loads((tmp_path / f"{name}.json").read_text())["epochs"][0]["loss"] for name in ("cut", "whole")]
    assert abs(losses[0] - losses[1]) < 1e-6
