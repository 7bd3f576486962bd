"""train.py under torchrun with one thing made to happen.

torchrun --nproc-per-node=2 tests/ranks.py WHAT --dataset ...

full    in its fifth step the second process is out of memory; all in float64 with batch norm
        by its running statistics, so that only the order of sums differs from one process's
slow    every step takes a while
"""

import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ood_utils
import train

build_network, train_step = train.build_network, train.train_step
train.SAVE_SECONDS = 0


def exact_network(num_classes, stem):
    model = build_network(num_classes, stem).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module
    model.register_forward_pre_hook(lambda model, inputs: (inputs[0].double(),))
    return model


def eventful_step(what, *args, steps=[]):  # noqa: B006
    steps.append(None)
    if what == "full" and len(steps) == 5 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if what == "slow":
        time.sleep(0.5)
    return train_step(*args)


if __name__ == "__main__":
    what = sys.argv.pop(1)
    if what == "full":
        train.build_network = exact_network
    train.train_step = lambda *args: eventful_step(what, *args)
    ood_utils.run_command(train.train_model, train.Config, speaks=train.first_to_fail)
