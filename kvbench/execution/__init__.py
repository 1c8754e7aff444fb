"""Execution of runs: a parent process that schedules and writes, and child processes that measure."""
