"""Which trial comes next: Ray Tune asks, Optuna's studies answer."""
