"""Runs in processes of their own: killed at random moments, and several under torchrun."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, same_bits, small_config, train_quietly, write_class_folder
from ranks import exact_network

import ood_utils
import train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CASES = {  # what happens, flags, the one line that is said of it
    "full": ("--epochs 3", "error: Out of memory: pass a smaller --batch-size"),
    "slow": ("--epochs 40", "interrupted: what was saved is kept"),
}


@pytest.fixture(scope="module", autouse=True)
def torchruns(tmp_path_factory):
    """{case: (process, folder)} of two gloo processes each; they run beside the other tests."""
    runs = {}
    for what, (flags, _) in CASES.items():
        folder = tmp_path_factory.mktemp(what)
        write_class_folder(folder / "pets")
        common = "--dataset pets --device cpu --batch-size 10 --lr 0.01 --checkpoint a.pth"
        command = [*TORCHRUN, ROOT / "tests/ranks.py", what, *common.split(), *flags.split()]
        output = open(folder / "output", "w")  # noqa: SIM115
        runs[what] = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=folder, start_new_session=True
        ), folder  # fmt: skip
    yield runs
    for process, _ in runs.values():
        process.kill()


def slow_run(config, training):
    """A run that tells when it trains, saves every epoch, and lingers in each write."""
    real_step = train.train_step
    train.train_step = lambda *args: (training.touch(), real_step(*args))[1]

    real_fsync, real_replace = os.fsync, os.replace
    ood_utils.os.fsync = lambda descriptor: (real_fsync(descriptor), time.sleep(0.02))
    ood_utils.os.replace = lambda *paths: (time.sleep(0.02), real_replace(*paths), time.sleep(0.02))
    train.SAVE_SECONDS = 0
    train.train_model(config)


def test_kills_at_random_moments_lose_nothing(cut_run, tmp_path):
    """Two kills of a run that has a state to resume; at its end it has the whole run's bits."""
    folder, *saved = cut_run
    context = multiprocessing.get_context("forkserver")  # imports torch once for all runs
    context.set_forkserver_preload(["train"])
    config = small_config(folder, tmp_path / "cut.pth", resume=True)
    moments = random.Random(0)
    training, kills, finished, ends = tmp_path / "training", 0, True, []
    while kills < 2 or not finished:
        if finished:
            for path in (*saved, saved[0].with_suffix(".json")):
                shutil.copy(path, tmp_path)
        training.unlink(missing_ok=True)
        process = context.Process(target=slow_run, args=(config, training))
        process.start()
        while process.is_alive() and not training.exists():
            time.sleep(0.01)
        process.join(moments.uniform(0, 0.8) if kills < 2 else 60)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        for path in tmp_path.glob("cut*.pth"):  # the old file or the new one, whole
            torch.load(path, weights_only=True)
        finished = process.exitcode == 0
        if finished:
            ends.append(shutil.copy(tmp_path / "cut.pth", tmp_path / f"end{len(ends)}.pth"))
    train_quietly(folder, tmp_path / "whole.pth")
    assert all(same_bits(end, tmp_path / "whole.pth") for end in ends)


def test_ctrl_c_under_torchrun_is_one_line(torchruns):
    """It reaches torchrun and its processes alike, and torchrun sends it to them once more."""
    process, folder = torchruns["slow"]
    while "epoch   2/" not in (folder / "output").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    check_output(*torchruns["slow"], CASES["slow"][1])


def check_output(process, folder, line):
    """The one line about the error, no traceback of the scripts, nothing left behind."""
    assert process.wait(60) != 0
    output = (folder / "output").read_text()
    said = re.findall("^(?:error: |interrupted: ).*", output, re.MULTILINE)
    assert len(said) == 1 and re.match(line, said[0]), output
    assert "in train_model" not in output and "has not been destroyed" not in output
    assert "Warning" not in output and not list(folder.glob("*.lock"))


def test_of_several_errors_the_first_is_told(monkeypatch):
    """It is claimed in the store before the group is destroyed, by which the others fail."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    claimed, options = [], {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: options.update(given))
    monkeypatch.setattr(
        dist, "destroy_process_group", lambda: claimed.append(server.add("failures of start 0", 0))
    )
    train.first_to_fail.cache_clear()
    with pytest.raises(ood_utils.InputError), train.process_group():
        raise ood_utils.InputError("a data set that no process can read")
    assert claimed == [1] and train.first_to_fail()
    assert options["timeout"].total_seconds() >= 3600  # one process may read for long
    train.first_to_fail.cache_clear()  # as another process
    assert not train.first_to_fail()
    train.first_to_fail.cache_clear()

    def gone(*args, **options):
        raise dist.DistNetworkError("the store has ended")

    monkeypatch.setattr(dist, "TCPStore", gone)
    with pytest.raises(ood_utils.InputError), train.process_group():
        raise ood_utils.InputError("is told all the same")
    assert train.first_to_fail()
    train.first_to_fail.cache_clear()


def test_two_processes_take_the_steps_of_one_and_a_failed_run_is_resumed_by_one(
    torchruns, tmp_path, monkeypatch, capsys
):
    """Shares of 5 of batches of 10 images, then of 2; the second process fails in epoch 2."""
    process, folder = torchruns["full"]
    check_output(process, folder, CASES["full"][1])
    output = (folder / "output").read_text()
    assert output.count("epoch   1/3") == 1 and "epoch   2/3" not in output

    monkeypatch.setattr(train, "build_network", exact_network)
    monkeypatch.chdir(folder)
    log = json.loads((folder / "a.json").read_text())
    assert log["processes"] == 2
    config = train.Config(
        dataset="pets", checkpoint="a.pth", epochs=3, batch_size=10, lr=0.01, device="cpu"
    )
    resumed = train.train_model(replace(config, resume=True)).state_dict()
    assert "resuming after epoch 1 of 3" in capsys.readouterr().out
    whole = train.train_model(replace(config, checkpoint="b.pth")).state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-10, atol=1e-10)
    losses = json.loads((folder / "b.json").read_text())["epochs"]
    assert losses[0]["loss"] == pytest.approx(log["epochs"][0]["loss"], abs=1e-6)
    assert abs(losses[0]["loss"] - losses[1]["loss"]) > 1e-3


def test_each_process_takes_its_own_gpu_and_mps_is_refused(monkeypatch):
    picked = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", picked.append)
    monkeypatch.setattr(ood_utils, "pick_device", torch.device)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.process_device(None) == torch.device("cuda:1") and picked == ["cuda:1"]
    with pytest.raises(ood_utils.InputError, match="torchrun does not work on MPS"):
        train.process_device("mps")
