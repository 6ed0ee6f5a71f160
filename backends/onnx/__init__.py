"""ONNX: programs to models of the standard operators, and whatever a target adds to them."""
