"""The commands of ``splitwiser``, a module each; :mod:`splitwiser.cli` has the table of their names.

A module has ``DESCRIPTION`` and ``USAGE`` (what follows the command's name), ``add_arguments`` and ``run``. It imports
PyTorch and transformers only once its options have been found right.
"""
