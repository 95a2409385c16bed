import pytest
import torch

import fa_sdpa


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """Every test starts and ends with routing off and nothing compiled."""
    torch.manual_seed(0)
    fa_sdpa.reset_stats()
    yield
    fa_sdpa.disable()
    torch._dynamo.reset()
