"""ONNX files of compiled graphs: `export` is what `CompiledModel.export_onnx` calls."""

from qcompile.exporters.onnx.export import OnnxFile, export
from qcompile.exporters.onnx.serving import require_exportable, serving_file

__all__ = ["OnnxFile", "export", "require_exportable", "serving_file"]
