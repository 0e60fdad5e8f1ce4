"""Checks of a run that need no loaded model: before the seconds that importing PyTorch takes, and before many runs."""

from splitwiser.config import RunConfig
from splitwiser.model.checkpoints.catalog import check_model
from splitwiser.model.checkpoints.hub import check_hub, find_file
from splitwiser.placement.checks import check_backend, find_missing_gpu, refuse_mode_here
from splitwiser.workload.job import Job, prepare_job


def check_quickly(config: RunConfig) -> Job:
    """Return the job of ``config``. Raises the :class:`~splitwiser.errors.InputError` of :func:`splitwiser.run.run`, as far
    as errors can be found without PyTorch and transformers."""
    entry = check_model(config.model, config.models)
    if entry.hub and not (config.load_format == "dummy" and entry.config) and not find_file(entry, "config.json"):
        check_hub(entry)
    if find_missing_gpu(config.mode):
        refuse_mode_here(config.mode, config.device_name)
    check_backend(config)
    return prepare_job(config, config.seed)


def check_thoroughly(config: RunConfig) -> None:
    """Check what :func:`check_quickly` leaves and what can be found before the model is loaded; imports PyTorch. Raises
    :class:`~splitwiser.errors.InputError`."""
    refuse_mode_here(config.mode, config.device_name)
    from splitwiser.model.checkpoints.configuration import plan_model

    plan_model(
        config.model,
        models=config.models,
        dtype=config.dtype,
        device=config.device_name,
        load_format=config.load_format,
    )
