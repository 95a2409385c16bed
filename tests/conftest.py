import os

import pytest
import torch

import fa_sdpa

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
