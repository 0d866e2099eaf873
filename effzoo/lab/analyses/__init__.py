"""Analyses as plain functions of any model, tensor or result: what the experiments are made of, without their settings
and figures."""
