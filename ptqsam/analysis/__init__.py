"""Which quantizer costs what, and why: sensitivity, statistics, histograms (`tools/analyze.py`)."""
