"""The commands of ``splitwiser``, one module each; :mod:`splitwiser.cli` maps their names to the modules.

A module has ``DESCRIPTION`` and ``USAGE`` (what follows the command's name), ``add_arguments`` and ``run``. It imports
PyTorch and transformers only after it has checked its options.
"""
