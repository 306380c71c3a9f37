"""Which implementations there are, and where they are offered."""

import pytest
import torch

from benchmarks.providers import PROVIDERS, select


def test_selection() -> None:
    assert [provider.name for provider in select(["fused", "compiled"])] == ["fused", "compiled"]
    assert select(["all"]) == list(PROVIDERS.values())
    with pytest.raises(ValueError, match=r"providers: expected one of eager_nchw.*'cudnn'"):
        select(["cudnn"])


def test_nhwc_reference_is_not_offered_for_nchw_input() -> None:
    assert "convert x" in (PROVIDERS["eager_nhwc"].why_not("nchw") or "")
    assert PROVIDERS["eager_nchw"].why_not("channels_last") is None


def test_the_interpreter_is_never_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in (PROVIDERS["fused"].why_not("nchw") or "")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert PROVIDERS["fused"].why_not("nchw") is None
