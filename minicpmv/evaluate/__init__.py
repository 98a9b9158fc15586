"""Evaluation: questions with known answers, and how many a model gets right."""
