"""The router in many threads: each has its own blocks, none sees another's, and no call is lost in the counts."""

import sys
import threading

import torch
import torch.nn.functional as F

import fa_sdpa
from fa_sdpa import _torch_private as private
from fa_sdpa import switch


def qkv():
    return [torch.randn(1, 2, 8, 8) for _ in range(3)]


def run(*bodies):
    """Run each body in a thread of its own, switching between them as often as Python can."""
    errors = []

    def guarded(body):
        try:
            body()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def code():
    return fa_sdpa.explain(*X).reasons[0].code


X = qkv()


def test_blocks_of_two_threads_at_once():
    inside = threading.Barrier(2, timeout=60)
    routed = {}

    def body(name, block):
        with block():
            inside.wait()  # both blocks are open
            out = F.scaled_dot_product_attention(*[x.requires_grad_() for x in qkv()])
            routed[name] = "_Attention" in type(out.grad_fn).__name__
            inside.wait()

    run(lambda: body("on", lambda: fa_sdpa.enable("always")), lambda: body("off", fa_sdpa.disable))
    assert routed == {"on": True, "off": False}
    assert not fa_sdpa.is_enabled()


def test_one_block_in_two_threads():
    block = fa_sdpa.enable("always")
    fa_sdpa.disable()

    def body(around):
        for _ in range(100):
            with around():
                outside = code()
                with block:
                    assert code() == "policy_always"
                assert code() == outside

    run(lambda: body(fa_sdpa.disable), lambda: body(lambda: fa_sdpa.enable("never")))
    assert not fa_sdpa.is_enabled()


def test_enable_while_another_thread_traces_a_block(monkeypatch):
    """A thread that traces holds Dynamo's lock and asks for ours: enable must not hold ours and ask for Dynamo's."""
    dynamos_lock = torch._dynamo.convert_frame.compile_lock
    tracing, enabling, waited = threading.Event(), threading.Event(), []

    def forget():
        enabling.set()
        waited.append(dynamos_lock.acquire(timeout=30))
        dynamos_lock.release()

    def traces():
        with dynamos_lock:
            tracing.set()
            assert enabling.wait(30)
            switch._installation.open_trace()
            switch._installation.close_trace()

    def enables():
        assert tracing.wait(30)
        fa_sdpa.enable("always")

    monkeypatch.setattr(private, "forget_compiled_code", forget)
    run(traces, enables)
    assert waited == [True]


def test_a_thread_without_a_block_never_sees_another_threads():
    before = torch._C._dispatch_dump(private.OP)
    stop = threading.Event()

    def switches():
        try:
            for _ in range(150):
                with fa_sdpa.enable("always"):
                    assert code() == "policy_always"
                    with fa_sdpa.disable():
                        assert code() == "off"
        finally:
            stop.set()

    def looks():
        while not stop.is_set():
            assert code() == "off"
            F.scaled_dot_product_attention(*X)

    run(switches, looks, looks)
    assert fa_sdpa.stats().routed == 0
    fa_sdpa.disable()
    assert torch._C._dispatch_dump(private.OP) == before


def test_blocks_take_no_kernel_out_under_another_thread(monkeypatch):
    """Torch's dispatcher would crash calls in flight: the kernel stays until a block is left by the only thread."""
    before = torch._C._dispatch_dump(private.OP)

    def body():
        with fa_sdpa.enable("always"):
            pass
        assert torch._C._dispatch_dump(private.OP) != before

    run(body)
    assert torch._C._dispatch_dump(private.OP) != before
    monkeypatch.setattr(switch, "_alone", lambda: True)  # the test runner may have threads of its own
    with fa_sdpa.enable("always"):
        pass
    assert torch._C._dispatch_dump(private.OP) == before


def test_calls_set_every_thread():
    fa_sdpa.enable("always")
    codes = []
    run(lambda: codes.append(code()))
    fa_sdpa.disable()
    run(lambda: codes.append(code()))
    assert codes == ["policy_always", "off"]


def test_disable_while_another_threads_block_is_open():
    opened, called = threading.Event(), threading.Event()

    def holds():
        with fa_sdpa.enable("always"):
            opened.set()
            assert called.wait(60)
            assert code() == "policy_always"  # its block wins
            F.scaled_dot_product_attention(*X)

    def calls():
        assert opened.wait(60)
        fa_sdpa.disable()
        assert code() == "off"
        called.set()

    before = torch._C._dispatch_dump(private.OP)
    run(holds, calls)
    assert fa_sdpa.stats().routed == 1
    fa_sdpa.disable()
    assert torch._C._dispatch_dump(private.OP) == before


def test_every_call_is_counted():
    def body():
        with fa_sdpa.enable("never"):
            for _ in range(500):
                F.scaled_dot_product_attention(*X)

    run(*[body] * 4)
    assert fa_sdpa.stats().eager == (0, 2000, {"policy_never": 2000})
