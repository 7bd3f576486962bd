"""The files of runs: what is kept, what is continued, which code is which."""

import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import files_of, read_json, same_bits, train_quietly

import ood_data
import train
from ood_utils import InputError


def test_resume_is_exact_and_appends(in_tiny_run, capsys):
    before = train.read_run("cut.resume.pth")["log"]["epochs"]
    for name in (".cut.lock", "cut.resume.pth.tmp"):
        Path(name).write_bytes(b"what a killed run left")
    torch.manual_seed(9)  # what a caller draws changes nothing
    train_quietly("pets", "cut.pth", resume=True)
    assert "resuming after epoch 1 of 4" in capsys.readouterr().out
    after = read_json("cut.json")["epochs"]
    assert after[:1] == before and [epoch["epoch"] for epoch in after] == [1, 2, 3, 4]
    assert same_bits("cut.pth", "whole.pth")
    files = files_of("cut")
    assert files.keys() == {".resume.pth.tmp", ".json", ".pth"}

    model = train_quietly("pets", "cut.pth", resume=True)
    assert "resuming after epoch 4 of 4" in capsys.readouterr().out and files_of("cut") == files
    state = torch.load("cut.pth", weights_only=True)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    train_quietly(Path("pets"), "other.pth", seed=np.int64(1), resume=True)  # nothing to continue
    assert not same_bits("other.pth", "whole.pth")


@pytest.mark.parametrize("stem,options,edit,message", [
    ("cut", {"lr": 0.05, "stem": "cifar"}, None, "lr 0.02 -> 0.05, stem imagenet -> cifar"),
    ("whole", {"seed": 3, "milestones": [0.2]}, None, r"0.7\] -> \[0.2\], seed 0 -> 3"),
    ("whole", {}, lambda patch: patch.setitem(train.SOURCES, "new.py", "A = 1"), "code .* -> "),
    ("cut", {}, lambda patch: patch.setattr(ood_data, "MEAN", (0.5,) * 3), r"mean .* -> \[0.5"),
    ("whole", {}, lambda patch: Path("pets/train/cat/000.png").unlink(), "data ........ -> "),
    ("cut", {}, lambda patch: Path("cut.resume.pth").write_bytes(b""), "cut.resume.pth is damaged"),
    ("cut", {}, lambda patch: shutil.copy("whole.pth", "cut.resume.pth"), "resume.pth has no log"),
])  # fmt: skip
def test_resume_refuses_another_run(stem, options, edit, message, in_tiny_run, monkeypatch):
    """Finished, too: a job array must not return the result of the code before."""
    if edit:
        edit(monkeypatch)
    before = files_of(stem)
    with pytest.raises(InputError, match=message):
        train_quietly("pets", f"{stem}.pth", resume=True, **options)
    assert files_of(stem) == before


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


SOURCE = """
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


@pytest.mark.parametrize("name,old,new,same", [
    ("train.py", "0.1", "0.2", True),  # a value of Config, which the log holds
    ("train.py", '    "Twice x."\n', "    # so\n\n", True),
    ("train.py", "2 * x if y is None", "(2 * x) if (y is None)", True),
    ("train.py", "2 * x", "3 * x", False),
    ("train.py", "LIMIT = 5", "LIMIT = 6", False),
    ("train.py", "y=None", "y=0", False),
    ("losses.py", "0.1", "0.2", False),
    ("ood_data.py", "2 * x", "3 * x", True),  # the data have a digest of their own
])  # fmt: skip
def test_words_in_the_code_do_not_count_and_what_is_computed_does(name, old, new, same):
    sources = dict.fromkeys(("train.py", "losses.py", "ood_data.py"), SOURCE)
    edited = sources | {name: SOURCE.replace(old, new)}
    assert edited != sources
    assert (train.digest_code(edited) == train.digest_code(sources)) == same
    assert train.digest_code({"train.py": SOURCE}) == "6e2544f6"  # with every Python


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
    }
    for name, text in texts.items():
        encoding = {"losses.py": "utf-8-sig", "extra.py": "latin-1"}.get(name, "utf-8")
        (tmp_path / name).write_text(text, encoding=encoding)
    (tmp_path / "other.py").touch()
    (tmp_path / "nets/old.py").write_text("print 1\n")  # of Python 2, not imported
    assert train.read_sources(tmp_path / "train.py") == texts


def test_a_setting_without_a_type_is_refused(monkeypatch):
    monkeypatch.setattr(train.Config, "warm_up", 5, raising=False)
    with pytest.raises(InputError, match="Config.warm_up has no type: write `warm_up: int"):
        train.train_model(train.Config("nosuch"))
