"""The adapters that users name, and what their files say; found without importing PyTorch or peft."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from splitwiser.errors import InputError, first_line, unknown_name
from splitwiser.model.checkpoints.catalog import CatalogEntry, Kind
from splitwiser.request import NO_ADAPTER
from splitwiser.text import read_text

KINDS = {
    "LORA": "LoRA",
    "PREFIX_TUNING": "prefix tuning",
    "PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "p-tuning",
}
"""The kinds that are served, by peft's name."""
TASKS: dict[Kind, str] = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
"""What adapters are made for, by peft's name and the kind of model."""
OWN = "adapters"  # in the directory of a checkpoint: one folder for each adapter that comes with it
CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

AdaptersGiven = str | Mapping[str, str | Path]


@dataclass(frozen=True)
class AdapterFiles:
    """A directory with an adapter: ``config`` is the content of its adapter_config.json."""

    name: str
    directory: Path
    config: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """A key of :data:`KINDS`."""
        return str(self.config["peft_type"])

    @property
    def kind_name(self) -> str:
        """The kind, as users write it."""
        return KINDS[self.kind]

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens before each prompt."""
        return 0 if self.kind == "LORA" else int(self.config["num_virtual_tokens"])

    def __str__(self) -> str:
        size = f"{self.virtual_tokens} virtual tokens" if self.virtual_tokens else f"rank {self.config.get('r')}"
        return f"{self.kind_name}, {size}, from {self.directory}"

    def describe_weights(self) -> str:
        """Return a text that changes when a file of the adapter changes."""
        stats = [(path.name, path.stat()) for path in sorted(self.directory.iterdir()) if path.is_file()]
        return str([(self.name, name, each.st_size, each.st_mtime_ns, each.st_ino) for name, each in stats])


def find_adapters(given: AdaptersGiven, entry: CatalogEntry) -> dict[str, AdapterFiles]:
    """Return the adapters of the model ``entry`` that ``given`` names, by name: ``NAME=DIRECTORY``, or the name alone of one
    that comes with the model, several with commas between them; or a mapping of names to directories. Raises
    :class:`InputError` for a name that is given twice or means something else, for a directory that holds no adapter, and
    for a kind that is not served."""
    own = find_own_adapters(entry)
    found: dict[str, AdapterFiles] = {}
    for name, directory in _pairs(given):
        if name in found:
            raise InputError(f"--adapter {name} is given twice; each adapter needs a name of its own")
        if name == NO_ADAPTER.name or not name:
            raise InputError(f"--adapter {name}={directory}: write NAME=DIRECTORY, with a name other than 'none'")
        if directory:
            found[name] = _read(name, Path(directory).expanduser())
        elif name in own:
            found[name] = own[name]
        else:
            known = f"brings {', '.join(own)}" if own else "comes without adapters"
            raise InputError(
                f"--adapter {name}: model {entry.name} {known}; write --adapter {name}=DIRECTORY for another"
            )
    if found and find_spec("peft") is None:
        raise InputError("--adapter: reading adapters needs the 'peft' package; pip install peft")
    return found


def find_own_adapters(entry: CatalogEntry) -> dict[str, AdapterFiles]:
    """Return the adapters that come with the model ``entry``, in the folder ``adapters`` of its directory."""
    folders = sorted((Path(entry.path) / OWN).glob(f"*/{CONFIG}")) if entry.path else []
    return {path.parent.name: _read(path.parent.name, path.parent) for path in folders}


def _pairs(given: AdaptersGiven) -> list[tuple[str, str]]:
    if isinstance(given, Mapping):
        return [(name, str(directory)) for name, directory in given.items()]
    parts = [each.strip().partition("=") for each in given.split(",") if each.strip()]
    return [(name.strip(), directory.strip()) for name, _, directory in parts]


def _read(name: str, directory: Path) -> AdapterFiles:
    where = f"--adapter {name}: {directory}"
    if not directory.is_dir():
        raise InputError(f"{where}: no such directory; one as peft's save_pretrained writes it is needed")
    for names in ((CONFIG,), WEIGHTS):
        if not any((directory / each).is_file() for each in names):
            raise InputError(f"{where}: no {names[0]} in it; a directory as peft's save_pretrained writes it is needed")
    try:
        config = json.loads(read_text(directory / CONFIG))
        kind, task = config["peft_type"], config.get("task_type")
        virtual_tokens = config.get("num_virtual_tokens", 1)
    except (ValueError, OSError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: {CONFIG} cannot be read: {type(error).__name__}: {first_line(error)}") from error
    if kind not in KINDS:
        raise InputError(f"{where}: {unknown_name('kind of adapter', kind, KINDS)}")
    if task not in (None, *TASKS.values()):
        raise InputError(f"{where}: is made for the task {task}; one for {' or '.join(TASKS.values())} is needed")
    if kind != "LORA" and not (isinstance(virtual_tokens, int) and virtual_tokens > 0):
        raise InputError(f"{where}: num_virtual_tokens must be a whole number of 1 or more, not {virtual_tokens!r}")
    return AdapterFiles(name, directory, config)
