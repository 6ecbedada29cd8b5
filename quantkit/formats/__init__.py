"""What the bytes mean: one class per format, its layout as data, a registry and decode. No I/O."""

from quantkit.formats.base import Format, format_by_gguf_id, formats, get_format

__all__ = ["Format", "format_by_gguf_id", "formats", "get_format"]
