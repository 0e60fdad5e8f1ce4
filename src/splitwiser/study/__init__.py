"""Many runs and what they say: comparisons, sweeps, profiles, predictions and advice."""
