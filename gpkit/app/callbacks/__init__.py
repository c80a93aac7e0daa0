"""Callbacks that every run has: a bar, a guard against NaN, signals, the cost of a step."""
