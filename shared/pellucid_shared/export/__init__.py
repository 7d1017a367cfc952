"""An experiment as a standalone script of plain PyTorch hooks over transformers: what a reader can check."""

from .script import hooks_script

__all__ = ["hooks_script"]
