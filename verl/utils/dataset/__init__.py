"""Prompts from parquet files."""
