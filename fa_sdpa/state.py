"""Who is on, and with which policy: one token for the process, one for each thread's innermost open block.

A token is the repr of a frozen ``Policy``, or ``OFF``. Compiled code is guarded by ``current_token()``, and so tied
to the policy it was traced under.
"""

from __future__ import annotations

import os
import threading

from . import tables
from ._torch_private import constant_while_tracing
from .meta.crossover import Crossover
from .policy import Policy

OFF = "off"


class _Thread(threading.local):
    def __init__(self) -> None:
        self.token = ""  # "": no block is open in this thread, the process decides
        self.outer: list[str] = []  # the tokens of the blocks around the innermost one
        self.traced = ""  # the same for blocks inside compiled code: only Dynamo ever sees another value


class _Process:
    def __init__(self) -> None:
        self.token = OFF


thread = _Thread()
process = _Process()
_policies: dict[str, Policy] = {}


def current_token() -> str:
    """The token that holds for the calling thread."""
    return thread.token or process.token


def token_of(policy: str | Policy) -> str:
    """The token of a policy or of a mode's name; ValueError from ``Policy`` if it is none."""
    if isinstance(policy, Policy):
        return _token(policy.mode, policy.crossover, policy.jit)
    return _token(policy, None, jit_from_environment())


def traced_token() -> str:
    """Traced by Dynamo: the token of the innermost block inside the compiled code, "" outside of all."""
    return thread.traced


@constant_while_tracing
def jit_from_environment() -> str | None:
    """What FA_SDPA_JIT says; a policy that was named in full does not ask."""
    return os.environ.get("FA_SDPA_JIT") or None


@constant_while_tracing  # takes a policy apart, because Dynamo can pass its fields as constants, but not the policy
def _token(mode: str, crossover: Crossover | None, jit: str | None) -> str:
    policy = Policy(mode, crossover, jit)  # type: ignore[arg-type]
    if crossover is None:
        tables.named()  # what FA_SDPA_POLICY names must be one
    token = repr(policy)
    _policies[token] = policy
    return token


def policy_of(token: str) -> Policy:
    return _policies[token]
