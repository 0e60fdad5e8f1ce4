"""Checks of a run that need no loaded model, for commands that start many runs."""

from splitwiser.config import RunConfig
from splitwiser.model.loading import plan_model
from splitwiser.placement.checks import refuse_mode_here
from splitwiser.workload.job import Job, prepare_job


def check(config: RunConfig) -> Job:
    """Return the job of ``config``. Raises the :class:`~splitwiser.errors.InputError` of :func:`splitwiser.run.run`, as far
    as errors can be found before the model is loaded."""
    refuse_mode_here(config.mode, config.device_name)
    plan_model(
        config.model,
        models=config.models,
        dtype=config.dtype,
        device=config.device_name,
        load_format=config.load_format,
    )
    return prepare_job(config, config.seed)
