"""Runs in processes of their own: killed at random moments, and several under torchrun."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, same_bits, train_quietly, write_class_folder
from ranks import exact_network

import ood_utils
import train


@pytest.fixture(scope="module", autouse=True)
def two_ranks(tmp_path_factory):
    """(process, options) of two ranks, of which one is killed in the second epoch; it runs beside the first test."""
    folder = tmp_path_factory.mktemp("ranks")
    options = dict(dataset=str(write_class_folder(folder / "pets")), epochs=3, batch_size=5, lr=0.01, device="cpu")
    options["checkpoint"] = str(folder / "cut.pth")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, ROOT / "tests/ranks.py", json.dumps(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process, options
    process.kill()


def slow_run(folder, checkpoint, training):
    """A run that tells when it trains, saves every epoch, and lingers in each write, so that kills hit writes too."""
    real_step = train.train_step
    train.train_step = lambda *args: (training.touch(), real_step(*args))[1]

    real_fsync, real_replace = os.fsync, os.replace
    ood_utils.os.fsync = lambda descriptor: (real_fsync(descriptor), time.sleep(0.02))
    ood_utils.os.replace = lambda source, target: (time.sleep(0.02), real_replace(source, target), time.sleep(0.02))
    train.SAVE_SECONDS = 0
    train_quietly(folder, checkpoint, resume=True)


def test_kills_at_random_moments_lose_nothing(cut_run, tmp_path):
    """Five kills of a run that has a state to resume; when it ends, its weights are those of one not killed."""
    folder, *saved = cut_run
    train_quietly(folder, tmp_path / "whole.pth")
    context = multiprocessing.get_context("forkserver")  # imports torch once for all runs
    context.set_forkserver_preload(["train"])
    moments = random.Random(0)
    training, kills, finished = tmp_path / "training", 0, True
    while kills < 5 or not finished:
        if finished:
            for path in saved:
                shutil.copy(path, tmp_path)
        training.unlink(missing_ok=True)
        process = context.Process(target=slow_run, args=(folder, tmp_path / "cut.pth", training))
        process.start()
        while process.is_alive() and not training.exists():
            time.sleep(0.01)
        process.join(moments.uniform(0, 0.8) if kills < 5 else 60)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        for path in tmp_path.glob("cut*.pth"):  # the old file or the new one, whole
            torch.load(path, weights_only=True)
        finished = process.exitcode == 0
        assert not finished or same_bits(tmp_path / "cut.pth", tmp_path / "whole.pth")


def test_two_processes_take_the_steps_of_one_and_a_killed_one_is_resumed_by_one(
    two_ranks, tmp_path, monkeypatch, capsys
):
    """24 images in batches of 5: 3 + 2 images a rank, then 2 + 2. Rank 1 is killed in the second epoch."""
    process, options = two_ranks
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in err
    assert out.count("epoch   1/3") == 1 and "epoch   2/3" not in out

    monkeypatch.setattr(train, "build_network", exact_network)
    one_epoch = torch.load(options["checkpoint"], weights_only=True)
    first_loss = json.loads(Path(options["checkpoint"]).with_suffix(".json").read_text())["epochs"][0]["loss"]
    resumed = train.train_model(**options, resume=True).state_dict()
    assert "resuming after epoch 1 of 3" in capsys.readouterr().out
    whole = train.train_model(**options | {"checkpoint": str(tmp_path / "whole.pth")}).state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-10, atol=1e-10)
    assert not torch.equal(one_epoch["fc.weight"], whole["fc.weight"])
    losses = json.loads((tmp_path / "whole.json").read_text())["epochs"]
    assert abs(losses[0]["loss"] - first_loss) < 1e-6
