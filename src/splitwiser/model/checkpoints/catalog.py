"""The catalogue of models, ``configs/models.yaml`` or another file: finds a model's checkpoint or configuration by the name
a user gives."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from splitwiser import constants
from splitwiser.errors import InputError, UnsupportedModelError, first_line, unknown_name
from splitwiser.files import read_entries
from splitwiser.formats import Text, must_be, parse_as
from splitwiser.model.checkpoints.gguf_file import check_gguf, is_gguf

Kind = Literal["decoder", "encoder-decoder"]
EMBEDDED_MODEL = "radiology-opt"


@dataclass(frozen=True)
class CatalogEntry:
    """A model by name: its checkpoint directory, GGUF file or hub id and, for a decoder, the configuration to build it
    without any."""

    name: Text
    path: Text = ""
    hub: Text = ""
    kind: Annotated[Kind, must_be(f"one of {', '.join(get_args(Kind))}")] = "decoder"
    config: Annotated[dict[str, Any], must_be("a mapping")] = field(default_factory=dict)

    @property
    def location(self) -> str:
        """The directory, file or hub id that transformers loads the model from."""
        return self.path or self.hub

    @property
    def gguf(self) -> Path | None:
        """The model's GGUF file, if it is one."""
        return Path(self.path) if is_gguf(self.path) else None


def load_catalog(path: Path) -> dict[str, CatalogEntry]:
    """Read a ``models.yaml``, whose paths are relative to its folder. Raises :class:`InputError` naming the file, the model
    and the key."""
    entries = read_entries(path, "opt-125m: {hub: facebook/opt-125m}")
    return {name: _entry(name, entry, path) for name, entry in entries.items()}


def _entry(name: str, content: dict[str, Any], path: Path) -> CatalogEntry:
    where = f"{path}, model {name}"
    entry = parse_as(CatalogEntry, content, where, name=name)
    if "config" in content and "model_type" not in entry.config:
        raise InputError(f"{where}: 'config' needs a 'model_type', as transformers names architectures")
    if not entry.path and not entry.hub:
        raise InputError(f"{where}: needs a 'path' or a 'hub' id")
    if not entry.path:
        return entry
    place = (path.parent / entry.path).resolve()
    return replace(entry, path="" if entry.hub and not place.exists() else str(place))


def resolve_model(model: str | Path, models: str | Path = constants.MODELS) -> CatalogEntry:
    """Return the entry for a name of the file ``models``, a checkpoint directory, a GGUF file, or a hub id such as
    ``org/name``.

    Raises :class:`InputError` for anything else, such as another file, and for a directory without ``config.json``.
    """
    catalog = load_catalog(Path(models))
    name = str(model)
    if name in catalog:
        return catalog[name]
    if not name:
        raise unknown_name("model", name, catalog)
    try:
        directory = Path(name).expanduser()
    except RuntimeError as error:  # no such user, or a user without a home folder
        raise InputError(f"model {name}: {first_line(error)}") from error
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise InputError(
                f"model directory {name}: no config.json in it; a checkpoint as save_pretrained writes it is needed"
            )
        return CatalogEntry(name=directory.resolve().name, path=str(directory.resolve()))
    if is_gguf(directory):
        if not directory.is_file():
            raise InputError(f"model {name}: no such file")
        return CatalogEntry(name=directory.stem, path=str(directory.resolve()))
    if directory.is_file():
        raise InputError(
            f"model {name}: is a file; give the directory of config.json and the weights, or a GGUF file (.gguf)"
        )
    if name.count("/") == 1 and all(part and not part.startswith((".", "~")) for part in name.split("/")):
        return CatalogEntry(name=name.split("/")[1], hub=name)
    raise unknown_name("model", name, catalog)


def check_model(model: str | Path, models: str | Path = constants.MODELS) -> CatalogEntry:
    """Return the entry for ``model``; see :func:`resolve_model`. Raises those of
    :func:`splitwiser.model.checkpoints.gguf_file.check_gguf`, too."""
    entry = resolve_model(model, models)
    if entry.gguf:
        check_gguf(entry.gguf)
    return entry


def check_decoder(model: str | Path, models: str | Path = constants.MODELS) -> None:
    """Raise :class:`UnsupportedModelError` for a model that the catalogue knows to be no decoder alone, and the errors of
    :func:`check_model`: for ``splitwiser advise``."""
    entry = check_model(model, models)
    if entry.kind != "decoder":
        raise decoders_only(entry.name, "splitwiser advise")


def decoders_only(name: str, what: str) -> UnsupportedModelError:
    """Return the error for the model ``name``, an encoder-decoder, where ``what`` takes decoders only."""
    return UnsupportedModelError(f"model {name} is an encoder-decoder, and {what} takes decoders only")
