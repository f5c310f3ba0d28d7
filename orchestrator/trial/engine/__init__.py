"""DeepSpeed behind the engine's interface: the only folder that imports it."""
