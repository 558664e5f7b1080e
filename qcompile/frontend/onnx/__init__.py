"""ONNX models: read, interpreted with torch, traced like any other module."""

from qcompile.frontend.onnx.load import load_onnx

__all__ = ["load_onnx"]
