"""The Hugging Face hub: a model's files in its local cache, and whether it can be reached for others."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit
from urllib.request import getproxies

from splitwiser.errors import InputError, first_line
from splitwiser.model.checkpoints.catalog import CatalogEntry

CONNECT_S = 2.0  # longest that the hub may take to accept a connection


def find_file(entry: CatalogEntry, name: str) -> Path | None:
    """Return the path of the model's file ``name`` in its directory or in the hub's local cache; None if it is in
    neither. A GGUF file stands alone: those beside it are not the model's."""
    if entry.gguf:
        return None
    if entry.path:
        path = Path(entry.location) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache  # slow to import, and of no use to a checkpoint directory

    found = try_to_load_from_cache(entry.hub, name)
    return Path(found) if isinstance(found, str) else None


@contextmanager
def only_files_of(entry: CatalogEntry) -> Iterator[dict[str, str]]:
    """Yield the arguments by which transformers' ``from_pretrained`` finds the model's files. A GGUF file is in a folder of
    its own meanwhile, since transformers takes tokenizers and adapters beside it for the model's."""
    if not entry.gguf:
        yield {"pretrained_model_name_or_path": entry.location}
        return
    with TemporaryDirectory() as folder:
        (Path(folder) / entry.gguf.name).symlink_to(entry.gguf.resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": entry.gguf.name}


def check_hub(entry: CatalogEntry) -> None:
    """Raise :class:`InputError` if files of ``entry``, a model of the hub, would have to be downloaded and the hub cannot be
    reached. Its library would find that out only after half a minute of further attempts."""
    if problem := _find_hub_problem():
        raise InputError(not_available(entry, problem))


def not_available(entry: CatalogEntry, why: str) -> str:
    """Return the error message for a model of the hub that is not on this machine and cannot be downloaded."""
    return (
        f"model {entry.name}: {entry.hub} is neither in the local cache nor available from the hub; give a checkpoint "
        f"directory, or use --load_format dummy for timing with random weights ({why})"
    )


def _find_hub_problem() -> str | None:
    """Return why no connection to the hub can be made, or None if one can, or if a proxy would have to make it."""
    from huggingface_hub import constants as hub

    if hub.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if getproxies():
        return None
    address = urlsplit(hub.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    problem = f"no answer within {CONNECT_S:g} s"

    def connect() -> None:
        nonlocal problem
        try:
            socket.create_connection((str(address.hostname), port), CONNECT_S).close()
            problem = ""
        except OSError as error:
            problem = os.strerror(error.errno) if error.errno and error.errno > 0 else first_line(error)

    attempt = threading.Thread(target=connect, daemon=True)  # a name server that does not answer has no other limit
    attempt.start()
    attempt.join(CONNECT_S)
    return f"{address.hostname} cannot be reached: {problem}" if problem else None
