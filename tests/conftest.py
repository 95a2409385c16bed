import os

import pytest
import torch

import fa_sdpa
from fa_sdpa import router

os.environ["FA_SDPA_CACHE_LIMIT_MB"] = "0"  # tests neither find what was compiled before nor leave anything behind

os.environ["FA_SDPA_CONFIG_DIR"] = os.devnull  # nor do they see what this machine's user has qualified


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """Every test starts and ends with routing off and nothing compiled."""
    torch.manual_seed(0)
    fa_sdpa.reset_stats()
    yield
    fa_sdpa.disable()
    torch._dynamo.reset()


@pytest.fixture
def through_op(monkeypatch):
    """The calls that the router makes through the op."""
    return counted_calls(monkeypatch, router, "_fa4")


def counted_calls(monkeypatch, module, name: str) -> list[object]:
    """The calls of a module's function from now on, which are made all the same."""
    calls: list[object] = []
    function = getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls
