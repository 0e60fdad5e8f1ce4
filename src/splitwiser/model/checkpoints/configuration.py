"""A model's configuration and dtype: all that is known of it before its weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging

from splitwiser import constants
from splitwiser.errors import InputError, UnsupportedModelError, first_line, unknown_name
from splitwiser.machine.device import resolve_device
from splitwiser.model.checkpoints.catalog import CatalogEntry, check_model
from splitwiser.model.checkpoints.checkpoint import find_eos_problem
from splitwiser.model.checkpoints.gguf_file import add_missing_settings, read_header
from splitwiser.model.checkpoints.hub import check_hub, not_available, only_files_of
from splitwiser.model.dtypes import SPELLINGS, dtype_name

T = TypeVar("T")

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in SPELLINGS if name != "auto"}


def resolve_dtype(dtype: str, config: PreTrainedConfig) -> torch.dtype:
    """Return the torch dtype named ``dtype``, in any spelling; ``auto`` is the checkpoint's own. Raises :class:`InputError`
    for an unknown name and :class:`UnsupportedModelError` if the checkpoint's own is not supported."""
    name = dtype_name(dtype)
    if name == "auto":
        own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        if own not in DTYPES.values():
            raise UnsupportedModelError(
                f"--dtype auto: the checkpoint's own type is {own}, which is not served; give one of {', '.join(DTYPES)}"
            )
        return own
    return DTYPES[name]


def plan_model(
    model: str | Path, *, models: str | Path = constants.MODELS, dtype: str, device: str, load_format: str
) -> tuple[CatalogEntry, torch.device, PreTrainedConfig, torch.dtype]:
    """Return what :func:`splitwiser.model.loading.load_model` would load with the same arguments: the catalogue's entry,
    device, configuration and dtype. Raises :class:`InputError`."""
    entry = check_model(model, models)
    place = resolve_device(device)
    config = _dummy_config(entry) if load_format == "dummy" else _checkpoint_config(entry)
    if problem := find_eos_problem(config.get_text_config()):
        raise UnsupportedModelError(f"model {entry.name}: its configuration's {problem}")
    return entry, place, config, resolve_dtype(dtype, config)


def _dummy_config(entry: CatalogEntry) -> PreTrainedConfig:
    if entry.config:
        figures = dict(entry.config)
        kind = figures.pop("model_type")
        if kind not in CONFIG_MAPPING:
            problem = unknown_name("model_type", kind, CONFIG_MAPPING)
            raise UnsupportedModelError(f"model {entry.name}: {problem.cli_message}")
        try:
            built: PreTrainedConfig = AutoConfig.for_model(kind, **figures)
        except Exception as error:  # inconsistent figures raise various errors
            raise cannot_be_made(entry, error) from error
        return built
    return _checkpoint_config(entry)


def _checkpoint_config(entry: CatalogEntry) -> PreTrainedConfig:
    def load(local_files_only: bool) -> PreTrainedConfig:
        with only_files_of(entry) as place:
            config: PreTrainedConfig = AutoConfig.from_pretrained(**place, local_files_only=local_files_only)
        if entry.gguf:
            add_missing_settings(config, read_header(entry.gguf))
        return config

    try:
        return from_cache_or_hub(entry, load)
    except ValueError as error:  # transformers does not know the architecture
        raise UnsupportedModelError(f"model {entry.name}: {first_line(error)}") from error
    except InputError:
        raise
    except Exception as error:
        raise cannot_be_made(entry, error) from error


def from_cache_or_hub(entry: CatalogEntry, load: Callable[[bool], T]) -> T:
    """Return ``load(local_files_only)`` from this machine or, if it is not there, from the hub. Raises
    :class:`InputError`."""
    try:
        with without_bars():
            return load(True)
    except OSError as error:
        if not entry.hub:
            raise InputError(
                f"model {entry.name}: cannot be read from {entry.location}: {first_line(error)}"
            ) from error
    check_hub(entry)
    try:
        return load(False)
    except (OSError, RuntimeError) as error:
        raise InputError(not_available(entry, first_line(error))) from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from showing progress bars: files of this machine take no time that needs one."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def cannot_be_made(entry: CatalogEntry, error: Exception) -> UnsupportedModelError:
    """Return the error for whatever exception a library raises over a checkpoint's files."""
    return UnsupportedModelError(
        f"model {entry.name}: cannot be built from {entry.location}: {type(error).__name__}: {first_line(error)}"
    )
