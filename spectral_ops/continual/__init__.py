"""The reference continual-learning trainer: data, streams of tasks, models, methods, metrics and reports."""
