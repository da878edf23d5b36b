"""mmdet plug-ins: models, detectors, datasets and metrics that ptqsam quantizes and evaluates."""
