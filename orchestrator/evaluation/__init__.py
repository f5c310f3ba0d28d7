"""A model is asked and its answers are judged: suites, attacks, task metrics, the landscape around its weights."""
