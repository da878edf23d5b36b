"""ptqsam: post-training quantization of the Segment Anything family."""

__version__ = '0.1.0'
