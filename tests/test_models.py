"""Loading models: every form, every kind of weights, and every way in which it goes wrong."""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pfungst.domains.image import load_batch, read_images
from pfungst.domains.preprocessing import Preprocess
from pfungst.errors import MissingExtra, ModelError, SettingError
from pfungst.models import LoadedModel, load_model

NET = """
from torch import nn
from neighbour import WIDTH

def build():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 2))
    model.classes = ["cat", "dog"]
    return model

def broken():
    return build().nothing

def number():
    return 7
"""


@pytest.fixture
def net_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    (tmp_path / "net.py").write_text(NET)
    sys.modules.pop("neighbour", None)
    return tmp_path / "net.py"


def small() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()


def test_function_in_a_file(net_file: Path) -> None:
    before = list(sys.path)
    loaded = load_model(f"{net_file}:build", size=8)
    assert isinstance(loaded, LoadedModel)
    assert loaded.classes == ("cat", "dog")
    assert not any(part.training for part in loaded.module.modules())
    assert loaded.module(torch.rand(2, 3, 8, 8)).shape == (2, 2)
    assert loaded.preprocess is not None
    assert (loaded.preprocess.size, loaded.preprocess.mean, loaded.preprocess.std) == ((8, 8), (0,) * 3, (1,) * 3)
    assert sys.path == before
    assert not [name for name in sys.modules if name.startswith("_pfungst_model")]


def test_function_in_a_module(net_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(net_file.parent)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    assert load_model("net:build", size=8, classes=["a", "b"]).classes == ("a", "b")
    with pytest.raises(ModelError, match="no module 'nowhere_at_all'"):
        load_model("nowhere_at_all:build", size=8)
    monkeypatch.delitem(sys.modules, "net", raising=False)


@pytest.mark.parametrize(
    ("function", "cause"), [("broken", "AttributeError.*net.py|nothing"), ("number", "returns int"), ("buidl", "build")]
)
def test_function_that_gives_no_model(net_file: Path, function: str, cause: str) -> None:
    with pytest.raises(ModelError, match=cause):
        load_model(f"{net_file}:{function}", size=8)


@pytest.mark.parametrize(
    ("spec", "cause"),
    [
        ("model.onnx", "ONNX.*not supported yet"),
        ("model.keras", "Keras.*not supported yet"),
        ("model.h5", "Keras.*not supported yet"),
        ("weights.pth", "do not say what the model computes"),
        ("nonsense", "names no model"),
        ("missing.pt2", "does not exist"),
        ("missing.py:build", "does not exist"),
    ],
)
def test_specs_that_name_no_model(spec: str, cause: str) -> None:
    with pytest.raises(ModelError, match=cause) as caught:
        load_model(spec, size=8)
    assert caught.value.remedy


def test_module_stays_untouched() -> None:
    model = small()
    loaded = load_model(model, size=2)
    assert loaded.module is model
    model[1].train()
    with pytest.raises(ModelError, match="training mode") as caught:
        load_model(model, size=2)
    assert "model.eval()" in caught.value.remedy
    assert model[1].training
    with pytest.raises(SettingError, match="weights"):
        load_model(small(), weights="x.pt", size=2)
    traced: Any = torch.fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.Dropout()))
    with pytest.raises(ModelError, match="training mode"):
        load_model(traced, size=2)
    exported = torch.export.export(small(), (torch.rand(1, 3, 2, 2),)).module()
    assert load_model(exported, size=2).module is exported
    with pytest.raises(ModelError, match="is on meta"):
        load_model(small().to("meta"), size=2)
    with pytest.raises(SettingError, match="device"):
        load_model(small(), size=2, device="nonsense")


def test_neither_model_nor_flags_give_preprocessing() -> None:
    with pytest.raises(ModelError) as caught:
        load_model(small())
    assert all(flag in caught.value.remedy for flag in ("--size", "--mean", "--std"))
    with pytest.raises(ModelError, match="does not say"):
        load_model(small(), mean=0.5)


def test_flags_and_units() -> None:
    caffe = load_model(small(), size=2, mean=(104, 117, 123), channels="BGR").preprocess
    assert caffe is not None
    assert caffe(Image.new("RGB", (2, 2), (10, 20, 30)))[:, 0, 0].tolist() == [30 - 104, 20 - 117, 10 - 123]
    signed = load_model(small(), size=2, mean=127.5, std=127.5).preprocess
    assert signed is not None
    assert signed.low is not None
    assert signed.high is not None
    assert (signed.low.tolist(), signed.high.tolist()) == ([-1] * 3, [1] * 3)
    grey = load_model(small(), size=(3, 2), mean=0.5, std=0.5, channels="L").preprocess
    assert grey is not None
    assert grey(Image.new("RGB", (2, 3), "white")).tolist() == [[[1.0, 1.0]] * 3]
    with pytest.raises(SettingError, match="2 values for 3 channels"):
        load_model(small(), size=2, mean=(0.5, 0.5))
    with pytest.raises(SettingError, match="channels"):
        load_model(small(), size=2, channels="XYZ")
    with pytest.raises(SettingError, match="std"):
        load_model(small(), size=2, std=0)


def test_own_preprocess_and_overrides() -> None:
    model: Any = small()
    model.preprocess = Preprocess((8, 6), (0.1, 0.2, 0.3), (1, 1, 1), resize=12)
    assert load_model(model).preprocess == model.preprocess
    changed = load_model(model, size=(4, 3), channels="BGR").preprocess
    assert changed is not None
    assert (changed.size, changed.resize, changed.mean) == ((4, 3), 6, (0.3, 0.2, 0.1))
    with pytest.raises(SettingError, match="0 to 255, the model's own of 0 to 1"):
        load_model(model, mean=104)
    with pytest.raises(SettingError, match="of RGB"):
        load_model(model, channels="L")

    model.preprocess = lambda image: torch.tensor(np.asarray(image.resize((5, 4)))).permute(2, 0, 1) / 255
    own = load_model(model).preprocess
    assert own is not None
    assert own.shape == (3, 4, 5)
    assert own.low is None
    assert own.measured([0] * 3, [1] * 3).high is not None
    for wrong, cause in (
        (lambda image: 7, "gave int"),
        (lambda image: 1 / 0, "ZeroDivision"),
        (lambda image: torch.rand(3, 4, 5), "random"),
        (lambda image: torch.full((3, 4, 5), torch.nan), "not finite"),
    ):
        model.preprocess = wrong
        with pytest.raises(ModelError, match=cause):
            load_model(model)
    assert load_model(model, size=9).preprocess == load_model(small(), size=9).preprocess


def test_digests_tell_models_apart() -> None:
    model = small()
    first = load_model(model, size=2).digest
    assert first == load_model(model, size=2).digest
    assert len(first) == 64
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    assert load_model(model, size=2).digest != first
    other = nn.Sequential(nn.Flatten(), model[1], nn.ReLU()).eval()
    assert load_model(other, size=2).digest != load_model(model, size=2).digest


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module."])
@pytest.mark.parametrize("kind", [".pt", ".pth", ".safetensors"])
def test_weights(net_file: Path, tmp_path: Path, kind: str, wrap: str) -> None:
    origin = load_model(f"{net_file}:build", size=8)
    state: dict[str, Any] = dict(origin.module.state_dict())
    if wrap == "module.":
        state = {f"module.{key}": value for key, value in state.items()}
    path = tmp_path / f"weights{kind}"
    if kind == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state if wrap in ("plain", "module.") else {wrap: state, "epoch": 3}, path)
    if kind == ".safetensors" and wrap == "module.":
        with pytest.raises(ModelError, match=r"missing.*unexpected"):
            load_model(f"{net_file}:build", weights=path, size=8)
        return
    assert load_model(f"{net_file}:build", weights=path, size=8).digest == origin.digest
    assert load_model(f"{net_file}:build", size=8).digest != origin.digest


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


def test_pickle_is_refused(net_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Trap()}, "whole.pt")
    Path("old.pth").write_bytes(pickle.dumps(Trap()))
    torch.save(small(), "module.pt")
    for name in ("whole.pt", "old.pth", "module.pt"):
        with pytest.raises(ModelError, match="refused: it is a pickle") as caught:
            load_model(f"{net_file}:build", weights=name, size=8)
        assert "safetensors" in caught.value.remedy
    assert not Path("sprung").exists()


def test_weights_that_do_not_fit(net_file: Path, tmp_path: Path) -> None:
    save_file({"1.weight": torch.zeros(5, 7), "odd": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"missing: 1.bias.*unexpected: odd.*1.weight \(file \(5, 7\)"):
        load_model(f"{net_file}:build", weights=tmp_path / "a.safetensors", size=8)
    (tmp_path / "b.safetensors").write_bytes(b"no")
    (tmp_path / "c.pt").write_bytes(b"PK\3\4 broken")
    (tmp_path / "d.txt").write_text("x")
    torch.save([1, 2], tmp_path / "e.pt")
    for name in ("b.safetensors", "c.pt", "d.txt", "e.pt", "f.pt"):
        with pytest.raises(ModelError):
            load_model(f"{net_file}:build", weights=tmp_path / name, size=8)


def test_exported_program(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(72, 4))
    x = torch.rand(2, 3, 8, 8)
    torch.export.save(torch.export.export(model.eval(), (x,)), tmp_path / "model.pt2")
    loaded = load_model(str(tmp_path / "model.pt2"), size=8)
    assert torch.equal(loaded.module(x), model(x))
    assert loaded.digest == load_model(str(tmp_path / "model.pt2"), size=8).digest
    torch.export.save(torch.export.export(model.train(), (x,)), tmp_path / "train.pt2")
    with pytest.raises(ModelError, match="training mode"):
        load_model(str(tmp_path / "train.pt2"), size=8)
    (tmp_path / "bad.pt2").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path / "bad.pt2"), size=8)


def test_classes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("tench, Tinca\ngoldfish\ncock\n")
    assert load_model(small(), size=2, classes=tmp_path / "names.txt").classes == ("tench, Tinca", "goldfish", "cock")
    with pytest.raises(SettingError, match="cannot be read"):
        load_model(small(), size=2, classes=tmp_path / "none.txt")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_missing_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=f"{package} is not installed") as caught:
        load_model(f"{package}:resnet18")
    assert "pfungst[vision]" in caught.value.remedy


def test_unknown_names(torchvision: Any) -> None:
    pytest.importorskip("timm")
    for library in ("torchvision", "timm"):
        with pytest.raises(ModelError, match="resnet50"):
            load_model(f"{library}:resnet05")


def test_failed_download(torchvision: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ModelError, match="no network") as caught:
        load_model("torchvision:squeezenet1_1")
    assert "--weights" in caught.value.remedy


@pytest.mark.parametrize("name", ["squeezenet1_1", "regnet_x_400mf", "googlenet"])
def test_torchvision_classes_from_the_weights(torchvision: Any, tmp_path: Path, name: str) -> None:
    more = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=7, **more)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load_model(f"torchvision:{name}", weights=tmp_path / "w.pth")
    assert loaded.module(torch.rand(1, 3, 224, 224)).shape == (1, 7)
    assert loaded.classes is None
    assert loaded.preprocess is not None
    assert loaded.preprocess.size == (224, 224)


def test_torchvision_transformer_size_from_the_weights(torchvision: Any, tmp_path: Path) -> None:
    model = torchvision.models.vit_b_32(weights=None, image_size=64, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load_model("torchvision:vit_b_32", weights=tmp_path / "w.pth")
    assert loaded.preprocess is not None
    assert loaded.module(torch.rand(1, *loaded.preprocess.shape)).shape == (1, 3)
    assert loaded.preprocess.size == (64, 64)


def test_timm_weights(torchvision: Any, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    name = "test_convnext"
    model = timm.create_model(name, pretrained=False, num_classes=5)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    loaded = load_model(f"timm:{name}", weights=tmp_path / "w.safetensors")
    assert loaded.preprocess is not None
    assert loaded.preprocess.size == (160, 160)
    assert loaded.classes is None
    x = torch.rand(1, 3, 160, 160)
    assert torch.equal(loaded.module(x), model.eval()(x))


@pytest.mark.data
def test_trained_model_on_real_photographs(torchvision: Any, data_root: Path, tmp_path: Path) -> None:
    """SqueezeNet as its weights want it: the flags of Caffe (BGR, 0 to 255) reach the accuracy known for it."""
    with zipfile.ZipFile(data_root / "imagenet-sample-images" / "imagenet_1000x1_256.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg")))[::10]
        rows = ["path,label"]
        for name in names:
            (tmp_path / Path(name).name).write_bytes(archive.read(name))
            rows.append(f"{Path(name).name},{int(Path(name).name.partition('_')[0])}")
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    loaded = load_model(
        "torchvision:squeezenet1_1",
        weights=data_root / "imagenet-models" / "squeezenet1_1_imagenet.safetensors",
        size=227,
        mean=(104, 117, 123),
        std=1,
        channels="BGR",
    )
    assert loaded.classes is not None
    assert loaded.preprocess is not None
    data = read_images(tmp_path / "list.csv", loaded.classes)
    inputs, ok, skipped = load_batch(data, range(len(data)), loaded.preprocess, workers=2)
    assert not skipped
    assert ok == list(range(100))
    with torch.no_grad():
        right = (loaded.module(inputs).argmax(1).numpy() == data.labels).mean()
    assert right > 0.5
