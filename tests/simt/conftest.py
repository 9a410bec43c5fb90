import harness
import pytest


def pytest_collection_modifyitems(items):
    reason = harness.why_not()
    if reason is None:
        return
    for item in items:
        if item.path.parent == harness.HERE:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=harness.BUILDS)
def sim(request):
    """A build of the kernels in the ascending schedule; afterwards every report must have been asked for."""
    simulator = harness.simulator(request.param)
    simulator.schedule("ascending")
    simulator.traffic()
    yield simulator
    unseen = simulator.reports()
    simulator.close()
    assert not unseen, unseen
