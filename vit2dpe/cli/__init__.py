"""The command `vit2dpe`, one file a command."""

from .commands import main

__all__ = ["main"]
