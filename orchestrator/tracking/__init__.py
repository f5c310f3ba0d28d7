"""What MLflow is told, through a queue that outlives an outage."""
