"""Fixtures for all tests: tokenizers by the name of their chat template."""

import functools
import gc
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ["LANGUAGE"] = "en"  # whatever the developer reads: the tests compare what is said
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the setup cell does: several tests run at the same time


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """To collect the tests imports every library: nothing of it is garbage, and searching it takes half of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def shared_tokenizer():
    """`shared_tokenizer(name)` of `tests/templates.py`'s `ALL_KINDS`, built once: tests that change one copy it."""
    import templates

    return functools.cache(templates.build)
