"""Decoding for checks: why a file cannot be read, in a few words."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

# All that Pillow raises for files that are damaged, foreign or dangerous.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError)


def decode(file: Path) -> Image.Image:
    """An image, read to the last pixel: a truncated file fails here only.

    Raises:
        DecodingError: With the reason in a few words.
    """
    try:
        with Image.open(file) as opened:
            opened.load()
            return opened
    except DECODING_ERRORS as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DecodingError(reason) from error


class DecodingError(Exception):
    """An image cannot be decoded."""
