"""The files of runs: what is kept, what is continued, which code is which."""

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import files_of, read_json, same_bits, train_quietly, write_images

import ood_data
import ood_utils
import train
from ood_utils import InputError


def test_resume_is_exact_and_appends(in_tiny_run, capsys, monkeypatch):
    """After a kill, and after an OOD set was added: training takes no line of it."""
    before = train.read_run("cut.resume.pth")["log"]["epochs"]
    for name in (".cut.lock", "cut.resume.pth.tmp"):
        Path(name).write_bytes(b"what a killed run left")
    text = train.SOURCES["ood_data.py"] + "\nOOD_IMAGES['mine'] = read_photos\n"
    monkeypatch.setattr(train, "SOURCES", train.SOURCES | {"ood_data.py": text})
    torch.manual_seed(9)  # what a caller draws changes nothing
    train_quietly("pets", "cut.pth", resume=True)
    assert "resuming after epoch 1 of 4" in capsys.readouterr().out
    after = read_json("cut.json")["epochs"]
    assert after[:1] == before and [epoch["epoch"] for epoch in after] == [1, 2, 3, 4]
    assert same_bits("cut.pth", "whole.pth")
    assert files_of("cut").keys() - {".resume.pth.tmp"} == {".json", ".pth"}
    train_quietly("pets", "other.pth", seed=1)
    assert not same_bits("other.pth", "whole.pth")


def test_a_finished_run_is_not_trained_again(in_tiny_run, capsys):
    before = files_of("a")
    model = train_quietly("pets", "a.pth", epochs=1, resume=True)
    assert "a.pth is finished" in capsys.readouterr().out
    state = torch.load("a.pth", weights_only=True)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert files_of("a") == before
    train_quietly("pets", "new.pth", epochs=1, resume=True)  # nothing to continue
    assert Path("new.pth").exists()


@pytest.mark.parametrize("options,edit,message", [
    ({"lr": 0.05, "schedule": "cosine"}, None, "lr 0.02 -> 0.05, schedule steps -> cosine"),
    ({"stem": "cifar", "seed": 3}, None, "stem imagenet -> cifar, seed 0 -> 3"),
    ({"epochs": 9, "milestones": [0.2]}, None, r"epochs 4 -> 9, .*0.7\] -> \[0.2\]"),
    ({}, lambda cat: (cat / "000.png").unlink(), "data ........ -> ........"),
    ({}, lambda cat: write_images(cat.with_name("eel"), 2), r"classes \['cat', 'dog'\] -> "),
    ({}, lambda cat: Path("cut.resume.pth").write_bytes(b""), "cut.resume.pth is damaged"),
    ({}, lambda cat: shutil.copy("whole.pth", "cut.resume.pth"), "cut.(resume.)?pth has no log"),
    ({}, lambda cat: shutil.copy("a.pth", "cut.pth"), "cut.(resume.)?pth has no log"),
])  # fmt: skip
def test_resume_refuses_another_run(in_tiny_run, options, edit, message):
    for split in ("train", "test") if edit else ():
        edit(in_tiny_run / "pets" / split / "cat")
    before = files_of("cut")
    with pytest.raises(InputError, match=message):
        train_quietly("pets", "cut.pth", resume=True, **options)
    assert files_of("cut") == before


@pytest.mark.parametrize("stem", ["cut", "whole"])
def test_resume_refuses_other_code(stem, in_tiny_run, monkeypatch):
    """Unfinished or finished: a job array must not return the result of the code before."""
    before = files_of(stem)
    text = train.SOURCES["train.py"] + "\nWARM_UP = 5\n"
    patches = (train, "SOURCES", {"train.py": text}), (ood_data, "MEAN", (0.5, 0.5, 0.5))
    for (module, name, value), what in zip(patches, ("code", "data"), strict=True):
        ood_data.statistics.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            with pytest.raises(InputError, match=f"{what} [0-9a-f]{{8}} -> [0-9a-f]{{8}}"):
                train_quietly("pets", f"{stem}.pth", resume=True)
        ood_data.statistics.cache_clear()
    assert files_of(stem) == before


@pytest.mark.parametrize("stem", ["a", "cut"])
def test_a_new_run_moves_what_was_there(stem, in_tiny_run, capsys):
    """Finished or not, with its evaluations, whatever its settings; twice, to two names."""
    before = files_of(stem)
    train_quietly("pets", f"{stem}.pth", epochs=1)
    out = capsys.readouterr().out
    for ending in before:
        assert f"kept the earlier {stem}{ending} as {stem}.1{ending}\n" in out
    assert files_of(f"{stem}.1") == before
    second = {ending: files_of(stem)[ending] for ending in (".pth", ".json")}
    train_quietly("pets", f"{stem}.pth", epochs=1)
    assert files_of(f"{stem}.2") == second
    assert files_of(f"{stem}.1") == before


@pytest.mark.parametrize("moves", range(9))
def test_a_kill_before_a_file_is_moved_loses_nothing(moves, in_tiny_run, monkeypatch, capsys):
    """First the four files of the earlier run, then three states, log and checkpoint."""
    before = files_of("a")
    step = mock.Mock(side_effect=[*[None] * moves, KeyboardInterrupt])
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for owner, name in ((os, "replace"), (Path, "rename")):
            move = getattr(owner, name)
            patch.setattr(owner, name, lambda *paths, move=move: step() or move(*paths))
        train_quietly("pets", "a.pth")
    capsys.readouterr()
    train_quietly("pets", "a.pth", resume=Path("a.resume.pth").exists())
    saved = min(max(moves - 4, 0), 3)
    assert (f"resuming after epoch {saved} of 4" in capsys.readouterr().out) == (saved > 0)
    assert same_bits("a.pth", "whole.pth") and not Path("a.resume.pth").exists()
    assert files_of("a.1") == before and not files_of("a.2")


def test_the_name_has_the_seed_and_none_of_other_files():
    path = train.checkpoint_path
    assert str(path(None, "digits", 0)) == "digits_resnet18.pth"
    assert str(path(None, "digits", 3)) == "digits_resnet18_seed3.pth"
    assert str(path(Path("b.pth"), "digits", 3)) == "b.pth"
    for name in ("a.pt", "a.pth.tar", "a.resume.pth", "a.ood.pth", "lr0.1", "a.json"):
        with pytest.raises(InputError, match=f"{name} cannot be a checkpoint"):
            path(Path(name))


CODE = """
import losses
@dataclass
class Config:
    "Settings."
    lr: float = 0.1
LIMIT = 5
def double(x, *, y=None):
    "Twice x."
    return 2 * x if y is None else f"{x!r:>{y}}"
"""


@pytest.mark.parametrize("old,new,same", [
    ("0.1", "0.2", True),  # a value of Config, which the log holds
    ('    "Twice x."\n', "    # so\n\n", True),
    ('"Settings."', '"Others."', True),
    ("2 * x if y is None", "(2 * x) if (y is None)", True),
    ("LIMIT = 5", "LIMIT = 6", False),
    ("2 * x", "3 * x", False),
    ("y=None", "y=0", False),
])  # fmt: skip
def test_words_in_the_code_do_not_count_and_what_is_computed_does(old, new, same):
    digest = train.digest_code({"train.py": CODE})
    assert old in CODE and digest == "6e2544f6"  # by Python 3.11: it is the same for every Python
    assert (train.digest_code({"train.py": CODE.replace(old, new)}) == digest) == same
    assert train.digest_code({"train.py": CODE, "ood_data.py": new}) == digest
    assert train.digest_code({"train.py": CODE, "losses.py": "A = 1"}) != digest


def test_settings_are_left_out_in_train_only():
    other = CODE.replace("0.1", "0.2")
    digest = train.digest_code({"train.py": CODE, "losses.py": CODE})
    assert train.digest_code({"train.py": other, "losses.py": CODE}) == digest
    assert train.digest_code({"train.py": CODE, "losses.py": other}) != digest


def test_the_log_holds_every_file_that_is_imported(tmp_path):
    """As Python reads them: with a byte order mark, or in the encoding that a line names."""
    (tmp_path / "nets").mkdir()
    texts = {
        "train.py": "import os, losses\nfrom nets.small import build\n",
        "losses.py": "def smooth():\n    from extra import é\n",
        "nets/small.py": "from . import blocks\nfrom .heads import head\nbuild = 1\n",
        "nets/__init__.py": "",
        "nets/blocks.py": "width = 64\n",
        "nets/heads.py": "head = 1\n",
        "extra.py": "# coding: latin-1\né = 1\n",
        "other.py": "import train\n",
    }
    for name, text in texts.items():
        encoding = {"losses.py": "utf-8-sig", "extra.py": "latin-1"}.get(name, "utf-8")
        (tmp_path / name).write_text(text, encoding=encoding)
    del texts["other.py"]
    assert train.read_sources(tmp_path / "train.py") == texts


def test_a_setting_without_a_type_is_refused(monkeypatch):
    monkeypatch.setattr(train.Config, "warm_up", 5, raising=False)
    with pytest.raises(InputError, match="Config.warm_up has no type: write `warm_up: int"):
        train.train_model(train.Config())


@pytest.mark.parametrize("name,value,limit", [
    ("seed", -1, "greater than or equal to 0"), ("seed", None, "integer"), ("seed", 2**64, "less"),
    ("batch_size", 0, "greater than 0"), ("lr", 0.0, "greater than 0"),
    ("lr", float("nan"), "greater"), ("momentum", -0.1, "greater"), ("validation", -1, "greater"),
    ("gamma", 0.0, "greater"), ("label_smoothing", 1.5, "less than or equal to 1"),
    ("schedule", "step", "'steps' or 'cosine'"),
])  # fmt: skip
def test_settings_out_of_range_are_named(name, value, limit):
    flag = name.replace("_", "-")
    with pytest.raises(InputError, match=f"^--{flag} {value}: Input should be .*{limit}"):
        ood_utils.check(train.Config(**{name: value}))
