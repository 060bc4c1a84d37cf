"""Storing: where runs are kept: on object stores, and on the driver's node of a cluster."""
