"""The command `vit2dpe`, one file a command."""

from .main import main

__all__ = ["main"]
