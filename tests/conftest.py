"""One thread, fixed seeds, and every shape in a signature of vlae checked at each call, but where a test is long."""

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what the tests start, too: as many at a time as there are cores
# nothing leaves this machine: what would be downloaded meets a closed port
os.environ |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
os.environ |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

# before the first import of a module of vlae; by runpy, vlae would leave these checks in the bytecode that others find
install_import_hook(["vlae"], "beartype.beartype")
# what a shell starts in the background ignores Ctrl-C, and so would what the tests start to interrupt it
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # likewise nohup
torch.set_num_threads(1)  # tensors here are so small that threads only wait for one another


@pytest.fixture(autouse=True)
def seed() -> None:
    np.random.seed(0)  # noqa: NPY002 (for libraries that still read the global state)
    torch.manual_seed(0)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shapes are checked: of loops over pixels and codes that is half the time. Shorter tests check the same."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@pytest.fixture
def forks() -> None:
    """For what starts ranks or kills a run by forking."""
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use in this process, which then cannot fork")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries of downloads follow at once."""
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Where the real data sets are."""
    root = os.environ.get("VLAE_DATA_DIR")
    if not root:
        pytest.skip("VLAE_DATA_DIR is not set, so there are no real data to test on")
    return Path(root)
