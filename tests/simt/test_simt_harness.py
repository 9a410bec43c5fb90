"""The harness itself: every planted error is reported, in the builds that can see it, and clean kernels are not."""

import harness
import pytest
import torch

NAN = float("nan")


def conv_arguments(sim):
    x, w = torch.randn(3, 16, 16), torch.randn(1, 3, 3, 3)
    expected = torch.nn.functional.conv2d(x[None], w, padding=1)[0, 0]
    out = sim.output("y", torch.full((16, 16), NAN))
    return (sim.input("x", x), sim.input("w", w), out, 3, 16, 16), out, expected


def vector(sim, n=64):
    return sim.output("out", torch.full((n,), NAN))


def kinds(sim):
    return {report.kind for report in sim.reports()}


# What each build reports. Races and uninitialised reads show in the instrumented build alone, bounds there and with
# the sanitizers (which alone see the end of one static array), and what the engine itself sees shows everywhere.
# The undefined-behaviour sanitizer reports a line once per process, so there each bug is run once.
PLANTED_ORDERS = harness.ORDERS[:1] if "asan" in harness.BUILDS else harness.ORDERS
EVERYWHERE = ("plain", "instrumented", "asan")
PLANTED = [
    ("missing_first_barrier", "conv", {"instrumented": "race"}),
    ("missing_second_barrier", "conv", {"instrumented": "race"}),
    ("halo_off_by_one", "conv", {"instrumented": "out-of-bounds-read", "asan": "address-sanitizer"}),
    ("dynamic_overrun", "vector", {"instrumented": "out-of-bounds-shared", "asan": "address-sanitizer"}),
    ("static_overrun", "vector", {"instrumented": "race", "asan": "undefined-behaviour"}),
    ("shuffle_as_barrier", "vector", {"instrumented": "race"}),
    ("half_warp_mistaken", "vector", {"instrumented": "race"}),
    ("block_race", "vector", {"instrumented": "race"}),
    ("uninitialised_shared", "vector", {"instrumented": "uninitialised-shared"}),
    ("divergent_barrier", "vector", dict.fromkeys(EVERYWHERE, "divergent-barrier")),
    ("deadlock", "vector", dict.fromkeys(EVERYWHERE, "deadlock")),
    ("exited_lane", "vector", dict.fromkeys(EVERYWHERE, "exited-lane")),
    ("copy_never_awaited", "vector", dict.fromkeys(EVERYWHERE, "unawaited-copy")),
    ("copy_awaited_late", "vector", {"instrumented": "race"}),
    ("bad_launch", "vector", dict.fromkeys(EVERYWHERE, "bad-launch")),
]


@pytest.mark.parametrize(("kernel", "arguments", "expected"), PLANTED, ids=[row[0] for row in PLANTED])
@pytest.mark.parametrize("order", PLANTED_ORDERS)
def test_planted_bug_is_reported(sim, kernel, arguments, expected, order):
    sim.schedule(order)
    sim.run(kernel, *(conv_arguments(sim)[0] if arguments == "conv" else (vector(sim),)))
    reports = sim.reports()
    wanted = expected.get(sim.build)
    if wanted is None:
        assert not reports  # this build cannot see it: no false name for it either
        return
    found = [report for report in reports if report.kind == wanted]
    assert found, reports
    if wanted not in ("address-sanitizer", "bad-launch"):  # these know the kernel, not the line
        assert found[0].line.startswith("planted.cu:"), found[0]


def test_a_poisoned_value_betrays_an_uninitialised_read(sim):
    out = vector(sim)
    sim.run("uninitialised_shared", out)
    sim.reports()
    poisoned = out.read().isnan().nonzero().flatten().tolist()
    assert poisoned == ([] if sim.build == "asan" else [63 - 17])  # asan: ordinary statics, zero


@pytest.mark.parametrize("order", harness.ORDERS)
@pytest.mark.parametrize("preempt", [0, 20])
def test_clean_convolution(sim, order, preempt):
    sim.schedule(order, preempt=preempt)
    arguments, out, expected = conv_arguments(sim)
    sim.run("clean_conv3x3", *arguments)
    assert not sim.reports()
    torch.testing.assert_close(out.read(), expected)


@pytest.mark.skipif("instrumented" not in harness.BUILDS, reason="preemption happens in the memory hooks")
def test_missing_barrier_gives_wrong_values_under_preemption():
    sim, wrong = harness.simulator("instrumented"), 0
    for seed in range(5):
        sim.schedule("random", seed=seed, preempt=20)
        arguments, out, expected = conv_arguments(sim)
        sim.run("missing_second_barrier", *arguments)
        assert "race" in kinds(sim)
        wrong += not torch.allclose(out.read(), expected, atol=1e-5, rtol=1e-5)
        sim.traffic()
        sim.close()
    assert wrong


@pytest.mark.parametrize("order", harness.ORDERS)
def test_clean_kernels_are_not_reported(sim, order):
    sim.schedule(order)
    reverse, half, exits, static, ones, copied = (vector(sim) for _ in range(6))
    sim.run("clean_reverse", reverse)
    sim.run("clean_half_warp", half)
    sim.run("clean_early_exit", exits)
    sim.run("clean_static", static)
    sim.run("clean_initialised", ones)
    sim.run("clean_copy", copied)
    assert not sim.reports()
    lanes = torch.arange(32.0)
    assert torch.equal(reverse.read()[:32], lanes.flip(0))
    assert torch.equal(half.read()[:32], lanes.view(2, 16).flip(1).flatten())
    assert torch.equal(exits.read()[:48], (torch.arange(48) // 16 * 16).float())
    assert torch.equal(static.read()[:16], torch.ones(16))
    assert torch.equal(ones.read(), torch.ones(64))
    assert torch.equal(copied.read()[:16], torch.ones(16))


@pytest.mark.parametrize("order", harness.ORDERS)
def test_atomics_do_not_race(sim, order):
    sim.schedule(order)
    x = torch.randn(5000)
    out = sim.output("out", torch.zeros(1))
    sim.run("clean_sum", sim.input("x", x), out, x.numel())
    assert not sim.reports()
    torch.testing.assert_close(out.read()[0], x.sum(), atol=1e-3, rtol=1e-5)


def test_misaligned_access(sim):
    out = vector(sim)
    sim.run("misaligned", sim.input("in", torch.ones(4)), out)
    expected = {"plain": set(), "instrumented": {"misaligned"}, "asan": {"undefined-behaviour"}}
    assert kinds(sim) == expected[sim.build]


def transpose_traffic(sim, kernel):
    x = torch.randn(64, 64)
    out = sim.output("out", torch.full((64, 64), NAN))
    sim.run(kernel, sim.input("in", x), out, 64)
    assert not sim.reports()
    assert torch.equal(out.read(), x.T)
    return {(row.region, row.mode): row.moved / row.ideal for row in sim.traffic()}


def test_transposes_differ_in_traffic(sim):
    padded = transpose_traffic(sim, "clean_transpose")
    conflicting = transpose_traffic(sim, "transpose_bank_conflict")
    uncoalesced = transpose_traffic(sim, "transpose_uncoalesced")
    if sim.build != "instrumented":
        assert padded == conflicting == uncoalesced == {}
        return
    one = {("in", "read"): 1, ("out", "write"): 1}
    assert padded == one | {("shared", "write"): 1, ("shared", "read"): 1}
    assert conflicting == one | {("shared", "write"): 1, ("shared", "read"): 32}  # 32-way bank conflict
    assert uncoalesced == {("in", "read"): 1, ("out", "write"): 8}  # a sector for every 4-byte word


def test_a_write_beside_a_buffer_is_seen_when_it_is_freed(sim):
    small = sim.output("small", torch.full((28,), NAN))
    sim.run("clean_reverse", small)  # writes 32 values
    seen = kinds(sim)
    assert seen == {"plain": set(), "instrumented": {"out-of-bounds-write"}, "asan": {"address-sanitizer"}}[sim.build]
    if sim.build == "plain":
        with pytest.raises(AssertionError, match="beside small"):
            sim.close()


def test_an_input_is_read_only(sim):
    x = sim.input("x", torch.full((64,), NAN))
    sim.run("clean_initialised", x)
    assert kinds(sim) == ({"write-to-read-only"} if sim.build == "instrumented" else set())
    with pytest.raises(AssertionError, match="x was written"):
        sim.close()
