"""Fixtures that several test files share."""

from __future__ import annotations

import pytest

from tiny import tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, no special tokens added."""
    return tiny_tokenizer()
