"""Measuring a model on labeled images: accuracies, confusions, calibration, and a report of them."""
