"""The networks in timm's registry, where timm can be imported beside the installed torch."""

import importlib
import sys

import pytest
import torch

import smlp

try:
    import timm  # type: ignore[import-not-found,unused-ignore]

    import smlp.timm_models
except (ImportError, RuntimeError) as error:
    missing = f"timm cannot be imported: {error}"
else:
    missing = ""
needs_timm = pytest.mark.skipif(bool(missing), reason=missing)


@needs_timm
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_timm_builds_the_published_networks(size: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(f"smlpnet_{size}")
        ours = getattr(smlp, f"smlpnet_{size}")()
    shapes = [{n: p.shape for n, p in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert theirs.num_features == ours.channels[-1]
    rates = [
        [m.drop_rate for m in net.modules() if hasattr(m, "drop_rate")] for net in (theirs, ours)
    ]
    assert rates[0] == rates[1]


SMALL = {"img_size": (32, 64), "in_chans": 1, "num_classes": 7, "d_model": 8, "depth": (1, 2, 1)}


@needs_timm
def test_timms_arguments_reach_the_network() -> None:
    torch.manual_seed(0)
    model = timm.create_model("smlpnet_tiny", drop_path_rate=0.5, **SMALL).eval()
    torch.manual_seed(0)
    expected = smlp.SMLPNet((32, 64), 4, 1, 7, d_model=8, depth=(1, 2, 1)).eval()
    x = torch.randn(2, 1, 32, 64)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    assert model.stages[2][1].drop_path.drop_rate == 0.5
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["interpolation"]) == ((1, 32, 64), "bicubic")


@needs_timm
@pytest.mark.parametrize("indices", [None, (0, 2), (-1,), (-2, -1)])
def test_features_only_is_a_pyramid(indices: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    options = {} if indices is None else {"out_indices": indices}
    backbone = timm.create_model("smlpnet_tiny", features_only=True, **SMALL, **options).eval()
    torch.manual_seed(0)
    network = smlp.SMLPNet((32, 64), 4, 1, 7, d_model=8, depth=(1, 2, 1)).eval()
    x = torch.randn(2, 1, 32, 64)
    with torch.no_grad():
        maps, every = backbone(x), network.forward_features(x)
    expected = every if indices is None else [every[i] for i in indices]
    assert len(maps) == len(expected)
    assert all(map(torch.equal, maps, expected))
    assert backbone.feature_info.channels() == [stage.shape[1] for stage in expected]
    assert backbone.feature_info.reduction() == [32 // stage.shape[2] for stage in expected]
    assert not any("mlp_head" in name for name, _ in backbone.named_parameters())


@needs_timm
def test_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="pretrained: expected False, got True: no weights come"):
        timm.create_model("smlpnet_tiny", pretrained=True)
    with pytest.raises(ValueError, match="stages: expected some of 0 to 2"):
        timm.create_model("smlpnet_tiny", features_only=True, out_indices=(3,), **SMALL)


def test_without_timm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "smlp.timm_models", raising=False)
    for name in ("timm", "timm.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install torchvision timm"):
        importlib.import_module("smlp.timm_models")
