"""Hostile input: what a server could answer, and what a caller could pass, made from bytes that a fuzzer finds."""
