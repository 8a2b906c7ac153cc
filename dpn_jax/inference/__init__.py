"""Running a model: labels for photos, accuracy on a data set, throughput, export."""
