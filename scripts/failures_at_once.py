"""A plugin of pytest that prints each failure as it happens: a run that is cut never prints its summary."""

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print why a test failed; with pytest-xdist, called in the process that distributes the tests."""
    if report.failed:
        print(f"\nFAILED {report.nodeid} ({report.when}, {report.duration:.0f} s)\n{report.longreprtext}", flush=True)
