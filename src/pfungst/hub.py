"""Image classifiers of Hugging Face's transformers, from a local folder or the hub: safetensors only.

transformers is imported here only, when a model is asked for.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pfungst.domains import preprocessing
from pfungst.domains.preprocessing import Preprocess
from pfungst.errors import MissingExtra, ModelError, PfungstError, first_line
from pfungst.weights import put_weights, read_weights

_REMEDY = "give hf:FOLDER with config.json and model.safetensors, or the hub's name of an image classifier"


class Logits(nn.Module):
    """A model of transformers with one tensor of scores, (n, classes), for pictures (n, channels, height, width)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        scores: Tensor = self.model(pixel_values=pixel_values).logits
        return scores


def load(name: str, weights: str | Path | None) -> tuple[nn.Module, Preprocess | None, list[str] | None]:
    """The model, its preprocessing and class names where its folder tells; ``weights`` replace its own.

    Raises MissingExtra without transformers, ModelError where there is no such model.
    """
    folder = Path(name).expanduser()
    place = str(folder) if folder.is_dir() else name
    automatic, configurations = _classes()
    try:
        if weights is None:
            model = automatic.from_pretrained(place, use_safetensors=True, trust_remote_code=False)
        else:
            configuration = configurations.from_pretrained(place, trust_remote_code=False)
            model = automatic.from_config(configuration)
            put_weights(model, read_weights(weights), weights)
        settings = _settings(place)
    except PfungstError:
        raise
    except Exception as error:  # No network, no such name, another kind of model, no safetensors: many kinds.
        why = first_line(error)
        raise ModelError(f"hf:{name} cannot be loaded: {type(error).__name__}: {why}", _REMEDY) from error
    preprocess = None if settings is None else preprocessing.from_transformers(settings)
    return Logits(model.float().eval()), preprocess, _labels(model.config)


def _classes() -> tuple[Any, Any]:
    """AutoModelForImageClassification and AutoConfig."""
    try:
        library = importlib.import_module("transformers")
        return library.AutoModelForImageClassification, library.AutoConfig
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise MissingExtra(f"transformers cannot be imported: {error}", f"install {error.name}") from error
        raise MissingExtra("transformers is not installed", "pip install 'pfungst[hf]'") from error
    except Exception as error:  # It imports torchvision, which may belong to another torch.
        raise MissingExtra(
            f"transformers is installed but cannot be imported: {error}", "pip install 'pfungst[hf,vision]'"
        ) from error


def _settings(place: str) -> dict[str, Any] | None:
    """What preprocessor_config.json says, None where there is none."""
    file: Any = Path(place) / "preprocessor_config.json"
    if not Path(place).is_dir():
        find = importlib.import_module("transformers.utils").cached_file
        file = find(place, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if file is None or not Path(file).is_file():
        return None
    settings: dict[str, Any] = json.loads(Path(file).read_text("utf-8"))
    return settings


def _labels(configuration: Any) -> list[str] | None:
    """Class names; None if they are only "LABEL_0" and so on, which transformers puts where there are none."""
    names = {int(key): str(value) for key, value in (getattr(configuration, "id2label", None) or {}).items()}
    if not names or sorted(names) != list(range(len(names))):
        return None
    ordered = [names[i] for i in range(len(names))]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(ordered)) else ordered
