"""Convolutions whose epilogue is an expression, as graphs that cuDNN compiles."""
