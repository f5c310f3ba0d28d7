"""One trial in a worker: build, train, monitor, evaluate, save. No Ray."""
