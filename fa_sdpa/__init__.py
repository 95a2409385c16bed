"""Unchanged ``scaled_dot_product_attention`` calls on FlashAttention kernels of our own, call by call by a policy."""

from .counts import Counts, Stats, reset_stats, stats
from .policy import Policy
from .router import conflicts, explain
from .switch import disable, enable, enable_from_environment, is_enabled

__all__ = [
    "Counts",
    "Policy",
    "Stats",
    "conflicts",
    "disable",
    "enable",
    "explain",
    "is_enabled",
    "reset_stats",
    "stats",
]
__version__ = "0.1.0"

enable_from_environment()
