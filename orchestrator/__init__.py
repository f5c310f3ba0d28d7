"""Runs experiments: the only code that knows Ray, DeepSpeed, Optuna and MLflow. Importing it imports none of them."""

__version__ = "0.1.0"
