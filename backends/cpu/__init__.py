"""The CPU target: ONNX Runtime with qcompile's own operators."""
