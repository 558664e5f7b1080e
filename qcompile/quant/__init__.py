"""Formats: element type, granularity, scheme; and the plain-torch definition of quantize, dequantize and pack."""
