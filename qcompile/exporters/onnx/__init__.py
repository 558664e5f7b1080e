"""ONNX files of compiled graphs: `export` is what `CompiledModel.export_onnx` calls."""

from qcompile.exporters.onnx.export import OnnxFile, export

__all__ = ["OnnxFile", "export"]
