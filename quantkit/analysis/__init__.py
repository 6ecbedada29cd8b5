"""What hurts: calibration, Fisher information, probes, super weights, sensitivity."""
