"""Batch jobs: a file of prompts in, a file of answers out, in this process or on Ray."""

from pydllm.integrations.jobs.job import Job, Row, Summary
from pydllm.integrations.jobs.run import run_job
from pydllm.integrations.jobs.worker import Recipe, Worker

__all__ = ["Job", "Recipe", "Row", "Summary", "Worker", "run_job"]
