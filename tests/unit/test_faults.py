"""Whose fault a failure is."""

from __future__ import annotations

import errno

import pytest
import torch

from orchestrator import errors, faults
from strategies.base import StrategyError
from strategies.checkpoint import CheckpointError
from strategies.optim import lr_at


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def of_ray():
    from ray.exceptions import ActorDiedError, GetTimeoutError

    return [ActorDiedError(), GetTimeoutError("x")]


@pytest.mark.parametrize("fault, found", [
    ("trial", [
        errors.NonFiniteLossError("nan"), errors.ModelError("x"), errors.DataError("x"), StrategyError("knob"), FloatingPointError("x"),
        torch.OutOfMemoryError("CUDA out of memory"),
        errors.JudgeError("gave no verdict on 9 of 9 answers, more than the share; the first: I think it is. Look"),
        raised(lambda: lr_at(0, max_steps=1, learning_rate=1.0, warmup_ratio=0.0, kind="nope")),
    ]),
    ("machine", [
        OSError(errno.ENOSPC, "No space left on device"), ConnectionResetError("x"), TimeoutError(), MemoryError(), CheckpointError("damaged"),
        errors.StorageError("full"), RuntimeError("CUDA error: uncorrectable ECC error encountered"), RuntimeError("NCCL communicator was aborted"),
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
        errors.JudgeError("gave no verdict on 9 of 9 answers; the first: no connection: refused. Look"), *of_ray(),
    ]),
    ("safebasin", [
        KeyError("x"), AssertionError(), TypeError("x"), ZeroDivisionError(), RuntimeError("The size of tensor a (3) must match"),
        RuntimeError("CUDA error: device-side assert triggered"), ValueError("nobody raised it on purpose"), raised(lambda: int("x")),
    ]),
])  # fmt: skip
def test_every_class_has_its_fault(fault, found):
    for error in found:
        assert faults.of(error) == fault, repr(error)


def test_the_sentence_says_whose_fault_it_is_and_what_to_do():
    assert faults.said("lower the rate", "trial") == "lower the rate"
    assert faults.said("disk full", "machine") == "disk full (a machine's fault, not the trial's: `safebasin resume` takes it up again)"
    assert "report it with the traceback" in faults.said("KeyError: 'x'", "safebasin")
